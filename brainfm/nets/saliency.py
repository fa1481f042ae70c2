"""Grad-CAM and HiResCAM: what the maps of a network's layer have to do with a number that it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Triple = tuple[int, int, int]


def log_odds(logits: Tensor, index: int) -> Tensor:
    """[B, K, ...] -> [B, ...]: log p - log(1 - p) of a softmax's class, exact however sure the network is."""
    others = [k for k in range(logits.shape[1]) if k != index]
    return logits[:, index] - torch.logsumexp(logits[:, others], dim=1)


def layers_of(network: nn.Module) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name -> (module, which of its outputs; none of them: it has one) of the maps that can be looked at.

    An encoder's maps are taken where the contrasts have met: one map stands for the case, however many it has.
    """
    fusion = network.get_submodule("fusion")
    levels = int(fusion.levels)  # type: ignore[arg-type]
    finest = len(network.backbone.widths) - levels  # type: ignore[union-attr,arg-type]
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {"encoder": (fusion, tuple(range(levels)))}
    found |= {f"encoder.{finest + i}": (fusion, (i,)) for i in range(levels)}
    decoder = getattr(network, "decoder", None)
    if decoder is not None:
        found |= {f"decoder.{i}": (merge, ()) for i, merge in enumerate(decoder.merges)}
    return found


@contextmanager
def watched(network: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """While open, each output of the layer starts the gradient graph, and is listed.

    Nothing before the layer keeps anything for a backward pass, so that the encoder costs as little as in prediction.
    """
    module, places = layers_of(network)[layer]
    leaves: list[Tensor] = []

    def restart(_: nn.Module, __: Any, output: Any) -> Any:
        fresh = [o.detach() for o in (output if places else [output])]
        watched = [fresh[i].requires_grad_(True) for i in places or (0,)]
        leaves.extend(watched)
        return fresh if places else fresh[0]

    learning = [p for p in network.parameters() if p.requires_grad]
    handle = module.register_forward_hook(restart)
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield leaves
    finally:
        handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def gradients(score: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Of a score; zeros for what it does not depend on."""
    if not score.requires_grad:
        return [torch.zeros_like(one) for one in of]
    known = [one for one in of if one.requires_grad]
    found = dict(zip(map(id, known), torch.autograd.grad(score, known, allow_unused=True)))
    return [torch.zeros_like(one) if (g := found.get(id(one))) is None else g for one in of]


def cams(leaves: Sequence[Tensor], gradients: Sequence[Tensor], how: str, signed: bool) -> list[Tensor]:
    """[B, x, y, z] for each layer on its own grid, on the CPU."""
    found = []
    for leaf, gradient in zip(leaves, gradients):
        weight = gradient.mean(dim=(2, 3, 4), keepdim=True) if how == "gradcam" else gradient
        cam = (weight * leaf.detach()).sum(dim=1).float().cpu()
        found.append(cam if signed else functional.relu(cam))
    return found


def upsampled(maps: Sequence[Tensor], patch_vox: Triple) -> Tensor:
    """[B, x, y, z] for each layer -> their sum [B, X, Y, Z], linear between the centres of the cells.

    A cell of a coarse layer stands for more voxels: its share is spread over them, so that layers can be added.
    """
    total = torch.zeros(())
    for cam in maps:
        spread = cam[0].numel() / maps[-1][0].numel()
        fine = functional.interpolate(cam[:, None], size=patch_vox, mode="trilinear", align_corners=False)[:, 0]
        total = total + spread * fine
    return total
