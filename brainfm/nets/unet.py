"""The encoder half of a plain 3D U-Net."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.recompute import Blocks


class ConvNormAct(nn.Sequential):
    """Convolution, instance norm with scale and shift, leaky ReLU: [B, E, X, Y, Z] -> [B, E', X/s, Y/s, Z/s].

    Args:
        channels_in, channels_out: E and E'.
        kernel: edge of the convolution in voxels, odd; the map is padded by zeros.
        stride: s.
        bias: of the convolution.
        slope: of the leaky ReLU below 0; 1 leaves it out.

    Source: the block of the FOMO25 baseline and winner (see UNetEncoder).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
        slope: float = 0.01,
    ) -> None:
        conv = nn.Conv3d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=bias)
        norm = nn.InstanceNorm3d(channels_out, eps=1e-5, affine=True)
        super().__init__(conv, norm, *([nn.LeakyReLU(slope, inplace=True)] if slope != 1 else []))
        self.slope = slope

    def forward(self, features: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") and features.device.type == "cpu" and features.shape[2] == 2:
            # oneDNN's bfloat16 weight gradient of a 3x3x3 convolution over maps 2 voxels deep is uninitialised memory
            # (seen with torch 2.13 on AVX512-BF16; every other depth is right): such maps cost nothing in float32.
            with torch.autocast("cpu", enabled=False):
                return self(features.float())
        return super().forward(features)


class UNetEncoder(Backbone):
    """Levels of two convolutions each, with 2x2x2 max pooling between them.

    Args:
        widths: channels of each level, fine to coarse.
        name: what ``build_backbone`` calls this size; ``unet`` where the widths are free.

    Source: github.com/jbanusco/fomo25 at de35782, src/models/networks/unet.py (the winner of FOMO25's method track).
    """

    def __init__(self, widths: Sequence[int], name: str = "unet") -> None:
        super().__init__()
        if not 2 <= len(widths) <= 8 or any(not isinstance(w, int) or not 1 <= w <= 4096 for w in widths):
            raise ConfigError(f"backbone.widths={widths}: expected two to eight whole numbers from 1 to 4096")
        self.widths = tuple(widths)
        self.strides = tuple(2**level for level in range(len(widths)))
        self.config = {"name": name} if name != "unet" else {"name": name, "widths": list(self.widths)}
        self.levels = nn.ModuleList(
            Blocks(ConvNormAct(before, width), ConvNormAct(width, width))
            for before, width in zip((1, *self.widths[:-1]), self.widths, strict=True)
        )

    def features(self, image: Tensor) -> list[Tensor]:
        """Raises: see check_image."""
        self.check_image(image)
        maps = [self.levels[0](image)]
        for level in self.levels[1:]:
            maps.append(level(F.max_pool3d(maps[-1], 2)))
        return maps

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        """Hidden voxels become 0, the mean of a standardised scan's foreground: no contrast is told apart by it."""
        return self.features(image.masked_fill(hidden, 0))

    def blocks(self) -> list[nn.Module]:
        return list(self.levels)


def unet(widths: Sequence[int]) -> UNetEncoder:
    """Free widths, e.g. for an ablation."""
    return UNetEncoder(list(widths))


def unet_s() -> UNetEncoder:
    """3.5 M parameters: half of unet_b's channels, what a CPU can pre-train."""
    return UNetEncoder((16, 32, 64, 128, 256), name="unet_s")


def unet_b() -> UNetEncoder:
    """14.1 M parameters, the size that won FOMO25."""
    return UNetEncoder((32, 64, 128, 256, 512), name="unet_b")


def unet_l() -> UNetEncoder:
    """88.3 M parameters: what a plain U-Net does at the size of resenc_l."""
    return UNetEncoder((80, 160, 320, 640, 1280), name="unet_l")


def unet_tiny() -> UNetEncoder:
    """For tests and demonstrations on a CPU."""
    return UNetEncoder((8, 16, 32), name="unet_tiny")
