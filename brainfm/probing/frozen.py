"""Frozen baselines: a 2D network on slices along three axes, and an untrained 3D network pooled by covariance.

Neither has seen a volume in training. A pre-trained 3D network that does not beat them has learned nothing that helps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainfm.errors import ConfigError
from brainfm.extras import missing
from brainfm.nets.backbone import Backbone
from brainfm.nets.resnet import ResNet, load_resnet
from brainfm.nets.untrained import random_backbone
from brainfm.probing.features import Embedding, Row, heads_of
from brainfm.tasks.engine import settle_device

SLICES, RANDOM_SLICES, COVARIANCE = "slices", "slices_random", "covariance"
_EDGE = 224  # pixels of a slice
_A_SIDE = 16  # slices along an axis, evenly through the head
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's networks expect
_DIRECTIONS = 16  # of a level whose covariance is read
_UNTRAINED: dict[str, Any] = {"name": "unet_s"}


class Describer(Protocol):
    """What makes one vector of a head."""

    part: str
    about: dict[str, Any]

    def __call__(self, volume: np.ndarray, points: np.ndarray) -> np.ndarray:
        """[X, Y, Z] prepared, [N, 3] voxels of the head -> [F] float32."""
        ...


class SliceDescriber:
    """Mean and deviation over slices of what a 2D network says, along X, Y and Z: [6 E].

    Args:
        weights: ``random``; a local file with torchvision's names (``network`` says which ResNet); or ``timm:NAME``, a
            pre-trained network of timm, which fetches its own weights.
        network: resnet18 or resnet50.
        seed: of random weights.

    Raises: ConfigError where timm is missing or has no such network; WeightsError where a file does not fit.
    """

    def __init__(self, weights: str = "random", network: str = "resnet18", seed: int = 0, device: str = "auto") -> None:
        self.part = RANDOM_SLICES if weights == "random" else SLICES
        self.device = settle_device(device)
        self.about = {"network": network, "weights": f"random, seed {seed}" if weights == "random" else weights}
        self.network: nn.Module
        if weights.startswith("timm:"):
            self.about["network"], self.network = weights, _of_timm(weights.removeprefix("timm:"))
        else:
            self.network = ResNet(network, torch.Generator().manual_seed(seed))
            if weights != "random":
                load_resnet(self.network, Path(weights))
        of_timm = getattr(self.network, "pretrained_cfg", None) or {}
        self.edge = int(of_timm.get("input_size", (3, _EDGE, _EDGE))[-1])
        self.network.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, volume: np.ndarray, points: np.ndarray) -> np.ndarray:
        low, high = np.percentile(volume[tuple(points.astype(int).T)], [1, 99])
        scaled = np.clip((volume - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
        found = []
        for axis in range(3):
            first, last = points[:, axis].min(), points[:, axis].max()
            places = np.linspace(first, last, _A_SIDE + 2)[1:-1].round().astype(int)  # not the head's very rim
            said = torch.cat([self._said(np.take(scaled, place, axis=axis)) for place in places]).double()
            found += [said.mean(0), said.std(0, correction=0)]
        return torch.cat(found).cpu().numpy().astype(np.float32)

    def _said(self, image: np.ndarray) -> Tensor:
        """[1, E] of one slice, its longer side filling the network's edge."""
        height, width = image.shape
        edge = max(height, width)
        square = F.pad(torch.from_numpy(np.ascontiguousarray(image)), (0, edge - width, 0, edge - height))
        pixels = F.interpolate(square[None, None], (self.edge, self.edge), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
        answer = self.network(((pixels - mean) / std).to(self.device))
        return answer[-1].mean((2, 3)) if isinstance(answer, list) else answer


class CovarianceDescriber:
    """Mean, deviation and covariance of every level of an untrained 3D network over the head.

    A level of more than 16 channels is turned to 16 random orthonormal directions before its covariance is taken.

    Args:
        config: of the backbone; None: unet_s.
        seed: of weights and directions.
    """

    part = COVARIANCE

    def __init__(self, config: dict[str, Any] | None = None, seed: int = 0, device: str = "auto") -> None:
        self.device = settle_device(device)
        self.network: Backbone = random_backbone(config or _UNTRAINED, seed).to(self.device)
        self.about = {"network": self.network.config, "weights": f"random, seed {seed}"}
        generator = torch.Generator().manual_seed(seed)
        self.directions = [
            torch.linalg.qr(torch.randn(width, min(width, _DIRECTIONS), generator=generator, dtype=torch.float64))[0]
            for width in self.network.widths
        ]

    @torch.no_grad()
    def __call__(self, volume: np.ndarray, points: np.ndarray) -> np.ndarray:
        coarsest = self.network.strides[-1]
        room = [max(2, -(-edge // coarsest)) * coarsest - edge for edge in volume.shape]
        padded = np.pad(volume, [(0, r) for r in room], constant_values=volume.min()).astype(np.float32)
        maps = self.network.features(torch.from_numpy(padded)[None, None].to(self.device))
        found = []
        for level, stride, turn in zip(maps, self.network.strides, self.directions):
            weight = np.zeros(level.shape[2:])
            np.add.at(weight, tuple((points.astype(np.int64) // stride).T), 1)
            share = torch.from_numpy(weight / weight.sum()).flatten()
            flat = level[0].flatten(1).double().cpu()
            mean = flat @ share
            apart = flat - mean[:, None]
            turned = turn.T @ apart
            covariance = (turned * share) @ turned.T
            upper = torch.triu_indices(*covariance.shape)
            found += [mean, ((apart**2) @ share).sqrt(), covariance[upper[0], upper[1]]]
        return torch.cat(found).numpy().astype(np.float32)


def described(
    describer: Describer, store: Any, progress: Callable[[int, int], None] = lambda done, total: None
) -> Embedding:
    """A row for each scan of a store, as `features.embed` gives them; ``describer.part`` is the only part."""
    heads, total, about = heads_of(store)
    rows: list[Row] = []
    vectors: list[np.ndarray] = []
    for row, vector in _each(describer, heads):
        rows.append(row)
        vectors.append(vector)
        progress(len(rows), total)
    return Embedding(tuple(rows), {describer.part: np.stack(vectors)}, {**describer.about, **about})


def _each(describer: Describer, heads: Iterator[Any]) -> Iterator[tuple[Row, np.ndarray]]:
    for row, volume, points in heads:
        vector = describer(volume, points)
        if not all(math.isfinite(value) for value in vector):
            raise ConfigError(f"{'/'.join(row[:4])}: {describer.part} gave a number that is not finite")
        yield row, vector


def _of_timm(name: str) -> nn.Module:
    try:
        import timm
    except ModuleNotFoundError:
        raise missing("timm", f"weights=timm:{name}", "or give a local file of a ResNet's weights") from None
    try:
        made: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"weights=timm:{name}: {error}") from None
    return made
