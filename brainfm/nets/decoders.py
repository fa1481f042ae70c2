"""From feature maps back to voxels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.nets import cpu
from brainfm.nets.recompute import recomputed
from brainfm.nets.unet import ConvNormAct


class Upsample(nn.ConvTranspose3d):
    """A transposed convolution whose kernel is its stride: [B, E, X, Y, Z] -> [B, E', s X, s Y, s Z]."""

    def __init__(self, channels_in: int, channels_out: int, scale: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=scale, stride=scale)

    def forward(self, features: Tensor, output_size: list[int] | None = None) -> Tensor:
        return cpu.upsampled(features, self) if cpu.is_for(features) else super().forward(features, output_size)


class Pointwise(nn.Conv3d):
    """A 1x1x1 convolution: [B, E, X, Y, Z] -> [B, E', X, Y, Z]."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        return cpu.pointwise(features, self) if cpu.is_for(features) else super().forward(features)


def chained(features: Tensor, first: Pointwise, second: Pointwise) -> Tensor:
    """``second(first(features))`` as one 1x1x1 convolution: the wider map between them is never made.

    The product of the weights is taken in float32; gradients reach both layers.
    """
    assert first.bias is not None and second.bias is not None
    with torch.autocast(features.device.type, enabled=False):
        outer = second.weight.flatten(1)
        weight, bias = outer @ first.weight.flatten(1), outer @ first.bias + second.bias
    if cpu.is_for(features):
        return F.linear(features.movedim(1, -1), weight, bias).movedim(-1, 1)
    return F.conv3d(features, weight[..., None, None, None], bias)


class LightDecoder(nn.Module):
    """Latents to voxels, without skip connections, so that everything has to pass the latents.

    Args:
        latent_channels: E of the latents.
        widths: channels of the backbone's maps, fine to coarse; the decoder climbs back through them.
        strides: of the same maps, starting at 1.
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
        for width, scale in _climb(widths, strides):
            self.levels.append(nn.Sequential(Upsample(before, width, scale), ConvNormAct(width, width)))
            before = width
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
        strides: of the same maps, starting at 1.
        out_channels: K.

    Attributes:
        checkpointing: whether each level is computed a second time in the backward pass instead of keeping its maps.

    Source: Ronneberger et al. 2015 (arXiv 1505.04597) with the blocks of UNetEncoder.
    """

    checkpointing: bool = False

    def __init__(self, widths: Sequence[int], strides: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.ups, self.merges = nn.ModuleList(), nn.ModuleList()
        before = widths[-1]
        for width, scale in _climb(widths, strides):
            self.ups.append(Upsample(before, width, scale))
            self.merges.append(ConvNormAct(2 * width, width))
            before = width
        self.out = Pointwise(before, out_channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, E, X/s, Y/s, Z/s], fine to coarse, of an image whose edges are multiples of the coarsest stride
        (Backbone.check_patch) -> [B, K, X, Y, Z]."""
        return self.out(self.climb(maps)[-1])

    def climb(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The decoder's features [B, E, X/s, Y/s, Z/s] for every stride but the coarsest, coarse to fine."""
        features, levels = maps[-1], []
        for level, skip in enumerate(reversed(maps[:-1])):
            features = recomputed(self.checkpointing, self._step, level, features, skip)
            levels.append(features)
        return levels

    def _step(self, level: int, features: Tensor, skip: Tensor) -> Tensor:
        merged: Tensor = self.merges[level](torch.cat([self.ups[level](features), skip], dim=1))
        return merged


def _climb(widths: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """(width, upsampling factor) of every step from the coarsest map to the finest."""
    if strides[0] != 1 or len(widths) != len(strides):
        raise ValueError(f"a decoder needs a map at stride 1 and one width a stride, not {widths} at {strides}")
    scales = [coarse // fine for fine, coarse in pairwise(strides)]
    return list(zip(reversed(widths[:-1]), reversed(scales), strict=True))
