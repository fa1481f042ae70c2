"""Decoders: from the feature maps of any backbone back to the voxels of its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.recompute import recomputed
from brainfm.nets.unet import ConvNormAct

# Where no map of the backbone joins a decoder: channels per voxel of the stride, as unet_b has them, and the fewest.
_CHANNELS_A_STRIDE, _FEWEST_CHANNELS = 32, 8


@overload
def decoder_for(backbone: Backbone, out: int) -> SkipDecoder: ...
@overload
def decoder_for(backbone: Backbone, out: Mapping[str, int]) -> DenseDecoder: ...
@overload
def decoder_for(backbone: Backbone, out: int, *, latent_channels: int, narrower: int = 1) -> nn.Module: ...
def decoder_for(
    backbone: Backbone, out: int | Mapping[str, int], *, latent_channels: int | None = None, narrower: int = 1
) -> SkipDecoder | DenseDecoder | nn.Module:
    """A fresh decoder from what a backbone gives to the voxels of its image, whatever strides its maps have.

    Where the finest map is coarser than the image (a transformer's tokens), steps without a map of the backbone lead on
    to stride 1, each half as wide as the one before. Maps of several depths but of one stride (a transformer's
    ``taps``) are first brought to different ones, the shallowest to the finest. Latents of a transformer are read by
    attention (Backbone.latents_decoder), those of other networks by LightDecoder.

    Args:
        out: channels of the answer, from the maps; or parts of a dense map by name (see DenseDecoder).
        latent_channels: E of latents on the coarsest grid, which alone the decoder then reads; None: all maps.
        narrower: what the widths are divided by, of a decoder of latents.
    """
    if isinstance(out, Mapping):
        return DenseDecoder(backbone.widths, backbone.strides, out)
    if latent_channels is None:
        return SkipDecoder(backbone.widths, backbone.strides, out)
    own = backbone.latents_decoder(latent_channels, out, narrower)
    if own is not None:
        return own
    widths = backbone.widths if narrower == 1 else [max(_FEWEST_CHANNELS, w // narrower) for w in backbone.widths]
    return LightDecoder(latent_channels, widths, backbone.strides, out)


class Upsample(nn.ConvTranspose3d):
    """A transposed convolution whose kernel is its stride: [B, E, X, Y, Z] -> [B, E', s X, s Y, s Z]."""

    def __init__(self, channels_in: int, channels_out: int, scale: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=scale, stride=scale)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution: [B, E, X, Y, Z] -> [B, E', X, Y, Z]."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, kernel_size=1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.mapped(features, self.weight, self.bias)

    def mapped(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer would answer with other weights [E', E, 1, 1, 1] and bias [E']."""
        return F.conv3d(features, weight, bias)


def chained(features: Tensor, first: Pointwise, second: Pointwise) -> Tensor:
    """``second(first(features))`` as one 1x1x1 convolution: the wider map between them is never made.

    The product of the weights is taken in float32; gradients reach both layers.
    """
    assert first.bias is not None and second.bias is not None
    with torch.autocast(features.device.type, enabled=False):
        outer = second.weight.flatten(1)
        weight, bias = outer @ first.weight.flatten(1), outer @ first.bias + second.bias
    return second.mapped(features, weight[..., None, None, None], bias)


class LightDecoder(nn.Module):
    """Latents to voxels, without skip connections, so that everything has to pass the latents.

    Args:
        latent_channels: E of the latents.
        widths: channels of the backbone's maps, fine to coarse; the decoder climbs back through them.
        strides: of the same maps.
        out_channels: C, 1 for an image.

    Source: github.com/jbanusco/fomo25 at de35782, src/models/networks/mmunetvae.py: transposed convolution, then one
    3x3x3 convolution a level; linear output.
    """

    def __init__(
        self, latent_channels: int, widths: Sequence[int], strides: Sequence[int], out_channels: int = 1
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        before = latent_channels
        for step in _climb(widths, strides):
            up = Upsample(before, step.width, step.scale)
            self.levels.append(nn.Sequential(up, ConvNormAct(step.width, step.width)))
            before = step.width
        self.out = Pointwise(before, out_channels)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, E, X/s, Y/s, Z/s] on the coarsest grid -> [B, C, X, Y, Z]."""
        for level in self.levels:
            latents = level(latents)
        return self.out(latents)


class SkipDecoder(nn.Module):
    """The decoder half of a U-Net: feature maps to logits.

    One convolution a level, not nnU-Net's two: at full resolution the decoder's first convolution already costs twice
    the encoder's, the second would add half of that again for a gain that pre-trained features make small.

    Args:
        widths: channels of the maps, fine to coarse.
        strides: of the same maps.
        out_channels: K.

    Attributes:
        widths: channels of the decoder's own features (see ``climb``), fine to coarse.
        checkpointing: whether each level is computed a second time in the backward pass instead of keeping its maps.

    Source: Ronneberger et al. 2015 (arXiv 1505.04597) with the blocks of UNetEncoder. Maps of one stride, and steps
    that no map joins: Hatamizadeh et al. 2022, UNETR (arXiv 2103.10504). Differs: nothing reads the image itself.
    """

    checkpointing: bool = False

    def __init__(self, widths: Sequence[int], strides: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.ups, self.merges = nn.ModuleList(), nn.ModuleList()
        lifted_widths, lifted_strides = _lifted(widths, strides)
        self.lifts = nn.ModuleList(
            _lift(width, to, stride // finer)
            for width, to, stride, finer in zip(widths[:-1], lifted_widths, strides, lifted_strides)
            if stride != finer
        )
        steps = _climb(lifted_widths, lifted_strides)
        before = widths[-1]
        for step in steps:
            self.ups.append(Upsample(before, step.width, step.scale))
            self.merges.append(ConvNormAct(step.width + step.joining, step.width))
            before = step.width
        self.widths = tuple(step.width for step in reversed(steps))
        self.out = Pointwise(before, out_channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, E, X/s, Y/s, Z/s], fine to coarse, of an image whose edges are multiples of the coarsest stride
        (Backbone.check_patch) -> [B, K, X, Y, Z]."""
        return self.out(self.climb(maps)[-1])

    def climb(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The decoder's features [B, E, X/s, Y/s, Z/s], coarse to fine, after each of its steps: one for every map but
        the coarsest, and then for every finer stride, down to 1. With ``lifts``, maps have strides of their own."""
        features, levels = maps[-1], []
        lifts = len(self.lifts)
        finer = [recomputed(self.checkpointing, lift, features) for lift, features in zip(self.lifts, maps)]
        joining = [*reversed([*finer, *maps[lifts:-1]]), *[None] * len(self.ups)]
        for level in range(len(self.ups)):
            features = recomputed(self.checkpointing, self._step, level, features, joining[level])
            levels.append(features)
        return levels

    def _step(self, level: int, features: Tensor, joining: Tensor | None) -> Tensor:
        larger = self.ups[level](features)
        merged: Tensor = self.merges[level](larger if joining is None else torch.cat([larger, joining], dim=1))
        return merged


class DenseDecoder(SkipDecoder):
    """Feature maps to voxels; the last map is widened by a 1x1x1 convolution and split into named parts.

    Args:
        widths: channels of the backbone's maps, fine to coarse.
        strides: of the same maps.
        parts: name -> channels, in the order of the channels.

    Attributes:
        config: ``{"parts": ...}``; with a backbone's widths and strides it makes the same decoder.

    Source: SkipDecoder for the climb; the widened last map as in anatomix (Dey et al. 2024, arXiv 2411.02372).
    Raises: ConfigError for a part without a channel.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], parts: Mapping[str, int]) -> None:
        if not parts or any(int(size) < 1 for size in parts.values()):
            raise ConfigError(f"parts of a dense decoder {dict(parts)}: expected names with one channel or more each")
        super().__init__(widths, strides, sum(parts.values()))
        self.parts = {name: int(size) for name, size in parts.items()}
        self.config: dict[str, Any] = {"parts": dict(self.parts)}

    def split(self, dense: Tensor) -> dict[str, Tensor]:
        """[B, E, X, Y, Z] as forward gives it -> part -> [B, E_part, X, Y, Z]."""
        return dict(zip(self.parts, dense.split(list(self.parts.values()), dim=1), strict=True))


class DenseHead(Pointwise):
    """A 1x1x1 convolution on one part of a dense decoder's map: [B, E_part, X, Y, Z] -> [B, K, X, Y, Z].

    Args:
        part: the part it reads.
        channels: E_part.
        names: of the K outputs, e.g. the classes of a label map.

    Attributes:
        config: ``{"part": ..., "channels": ..., "names": [...]}``; ``DenseHead(**config)`` makes the same head.
    """

    def __init__(self, part: str, channels: int, names: Sequence[str]) -> None:
        super().__init__(channels, len(names))
        self.part, self.names = part, tuple(names)
        self.config: dict[str, Any] = {"part": part, "channels": channels, "names": list(self.names)}


@dataclass(frozen=True)
class _Step:
    """From one resolution to the next finer one.

    Attributes:
        width: channels afterwards.
        scale: by which the map grows; 1 between two maps of one stride.
        joining: channels of the backbone's map that is laid beside it, 0 for none.
    """

    width: int
    scale: int
    joining: int


def _lifted(widths: Sequence[int], strides: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """Widths and strides that the maps of one stride are brought to: half the stride of the next deeper one, as wide as
    unet_b is there; other maps stay as they are."""
    stride, count = strides[-1] if strides else 1, len(strides)
    if count < 2 or len(widths) != count or set(strides) != {stride} or stride % 2 ** (count - 1):
        return widths, strides
    finer = [stride >> (count - 1 - level) for level in range(count)]
    return [
        *(max(_FEWEST_CHANNELS, min(w, _CHANNELS_A_STRIDE * s)) for w, s in zip(widths[:-1], finer)),
        widths[-1],
    ], finer


def _lift(width: int, to: int, scale: int) -> nn.Sequential:
    """[B, width, x, y, z] -> [B, to, scale x, scale y, scale z], by halves of the stride."""
    steps: list[nn.Module] = []
    while scale > 1:
        scale //= 2
        narrower = max(to, width // 2) if scale > 1 else to
        steps += [Upsample(width, narrower, 2), ConvNormAct(narrower, narrower)]
        width = narrower
    return nn.Sequential(*steps)


def _climb(widths: Sequence[int], strides: Sequence[int]) -> list[_Step]:
    """Every step from the coarsest map to the voxels.

    Raises: ConfigError where maps do not follow one another, fine to coarse, on grids that divide each other.
    """
    whole = all(fine >= 1 and coarse % fine == 0 for fine, coarse in pairwise((1, *strides)))
    if not widths or len(widths) != len(strides) or not whole:
        raise ConfigError(
            f"a decoder of maps of {list(widths)} channels at the strides {list(strides)}: expected as many of both, "
            "fine to coarse, each stride a multiple of the one before"
        )
    scales = [coarse // fine for fine, coarse in pairwise(strides)]
    steps = [_Step(w, s, w) for w, s in zip(reversed(widths[:-1]), reversed(scales), strict=True)]
    width, stride = widths[0], strides[0]
    while stride > 1 or not steps:
        scale = _largest_prime(stride)
        stride //= scale
        width = max(_FEWEST_CHANNELS, min(width // 2, _CHANNELS_A_STRIDE * stride))
        steps.append(_Step(width, scale, 0))
    return steps


def _largest_prime(number: int) -> int:
    """Of a number's factors; 1 of 1."""
    factor = 2
    while factor * factor <= number:
        if number % factor:
            factor += 1
        else:
            number //= factor
    return number
