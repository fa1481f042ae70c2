"""The residual U-Net of the SSL3D challenge: encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import Pointwise, SkipDecoder
from brainfm.nets.recompute import Blocks, recomputed
from brainfm.nets.unet import ConvNormAct


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut: [B, E, X, Y, Z] -> [B, E', X/s, Y/s, Z/s].

    Where the block halves its map, the shortcut averages 2x2x2 voxels; where it changes the channels, a 1x1x1
    convolution without bias and an instance norm follow.

    Args:
        channels_in, channels_out: E and E'.
        stride: s, of the first convolution and of the shortcut.

    Source: He et al. 2019 (arXiv 1812.01187), figure 2c (ResNet-D), as used by Isensee et al. 2024 (arXiv 2404.09556).
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first = ConvNormAct(channels_in, channels_out, stride=stride)
        self.second = ConvNormAct(channels_out, channels_out, slope=1.0)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = ConvNormAct(channels_in, channels_out, kernel=1, slope=1.0, bias=False)
        self.slope = 0.01

    def forward(self, features: Tensor) -> Tensor:
        beside = F.avg_pool3d(features, self.stride) if self.stride > 1 else features
        return F.leaky_relu(self.second(self.first(features)) + self.shortcut(beside), self.slope, inplace=True)


class ResEncEncoder(Backbone):
    """A convolution, then stages of residual blocks; each stage but the first halves the map.

    Args:
        widths: channels of each stage, fine to coarse; the first also of the stem.
        depths: residual blocks of each stage.
        name: what ``build_backbone`` calls this size; ``resenc`` where widths and depths are free.

    Source: Isensee et al. 2024 (arXiv 2404.09556), the encoder of ResEnc-L as SSL3D fixes it.
    Raises: ConfigError for impossible widths or depths.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], name: str = "resenc") -> None:
        super().__init__()
        for key, values, most in (("widths", widths, 4096), ("depths", depths, 64)):
            if not 2 <= len(values) <= 8 or any(not isinstance(v, int) or not 1 <= v <= most for v in values):
                raise ConfigError(f"backbone.{key}={values}: expected two to eight whole numbers from 1 to {most}")
        if len(widths) != len(depths):
            raise ConfigError(f"backbone.widths={widths}, backbone.depths={depths}: expected as many of both")
        self.widths = tuple(widths)
        self.strides = tuple(2**stage for stage in range(len(widths)))
        free = {"widths": list(widths), "depths": list(depths)} if name == "resenc" else {}
        self.config = {"name": name, **free}
        self.stem = ConvNormAct(1, self.widths[0])
        self.stages = nn.ModuleList()
        before = self.widths[0]
        for stage, (width, depth) in enumerate(zip(self.widths, depths, strict=True)):
            first = ResidualBlock(before, width, stride=2 if stage else 1)
            self.stages.append(Blocks(first, *(ResidualBlock(width, width, 1) for _ in range(depth - 1))))
            before = width

    def features(self, image: Tensor) -> list[Tensor]:
        """Raises: ConfigError where the image does not fit (see check_patch); ValueError for other than one channel."""
        self.check_image(image)
        maps = [self.stages[0](recomputed(self.checkpointing, self.stem, image))]
        for stage in self.stages[1:]:
            maps.append(stage(maps[-1]))
        return maps

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        """Hidden voxels become 0, the mean of a standardised scan's foreground: no contrast is told apart by it."""
        return self.features(image.masked_fill(hidden, 0))

    def blocks(self) -> list[nn.Module]:
        return [self.stem, *self.stages]


class ResEncDecoder(SkipDecoder):
    """The decoder half: SkipDecoder, and for deep supervision a 1x1x1 convolution to logits on every coarser level.

    Args:
        widths: channels of the maps, fine to coarse.
        strides: of the same maps, starting at 1.
        out_channels: K.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], out_channels: int) -> None:
        super().__init__(widths, strides, out_channels)
        self.coarse = nn.ModuleList(Pointwise(width, out_channels) for width in widths[-2:0:-1])

    def pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits [B, K, X/s, Y/s, Z/s] for every stride s but the coarsest, fine to coarse; the first is forward's."""
        levels = self.climb(maps)
        logits = [head(features) for head, features in zip((*self.coarse, self.out), levels, strict=True)]
        return logits[::-1]


def resenc_l() -> ResEncEncoder:
    """90.3 M parameters: the network of the SSL3D challenge and of most published 3D weights."""
    return ResEncEncoder((32, 64, 128, 256, 320, 320), (1, 3, 4, 6, 6, 6), name="resenc_l")


def resenc_s() -> ResEncEncoder:
    """The same family at the size of unet_b."""
    return ResEncEncoder((32, 64, 128, 256, 256), (1, 2, 2, 2, 2), name="resenc_s")


def resenc(widths: Sequence[int], depths: Sequence[int]) -> ResEncEncoder:
    """Free widths and depths, e.g. for an ablation."""
    return ResEncEncoder(list(widths), list(depths))
