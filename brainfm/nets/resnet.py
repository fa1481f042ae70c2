"""ResNet-18 and ResNet-50 for images, with the tensor names of torchvision's weights files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.exchange.checkpoint import read_checkpoint
from brainfm.nets.transfer import TransferReport, transfer

DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, E, H, W] -> [B, E', H/s, W/s]."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels_in, width, stride)

    def forward(self, maps: Tensor) -> Tensor:
        beside = maps if self.downsample is None else self.downsample(maps)
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(maps))))) + beside)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut: [B, E, H, W] -> [B, 4 width, H/s, W/s].

    Differs: from the paper in that the stride is the 3x3 convolution's, as in torchvision's files.
    """

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        wide = width * self.expansion
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(channels_in, wide, stride)

    def forward(self, maps: Tensor) -> Tensor:
        beside = maps if self.downsample is None else self.downsample(maps)
        maps = self.relu(self.bn1(self.conv1(maps)))
        maps = self.relu(self.bn2(self.conv2(maps)))
        return self.relu(self.bn3(self.conv3(maps)) + beside)


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and channels_in == channels_out:
        return None
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out))


class ResNet(nn.Module):
    """[B, 3, H, W] -> four maps [B, E, H/s, W/s] of strides 4, 8, 16 and 32.

    Args:
        name: resnet18 or resnet50.
        generator: fresh weights are drawn from it; None: from torch's own.

    Source: He et al. 2016 (arXiv 1512.03385), table 1; fresh weights as He et al. 2015 (arXiv 1502.01852), fan-out.
    """

    def __init__(self, name: str = "resnet18", generator: torch.Generator | None = None) -> None:
        super().__init__()
        if name not in DEPTHS:
            raise ConfigError(f"unknown network {name!r}, expected one of {', '.join(DEPTHS)}")
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if name == "resnet18" else Bottleneck
        self.name = name
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        before = 64
        for stage, depth in enumerate(DEPTHS[name]):
            width, blocks = 64 * 2**stage, []
            for place in range(depth):
                blocks.append(block(before, width, 2 if stage and not place else 1))
                before = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.widths = tuple(64 * 2**stage * block.expansion for stage in range(4))
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = [self.maxpool(self.relu(self.bn1(self.conv1(image))))]
        for stage in range(1, 5):
            maps.append(self.get_submodule(f"layer{stage}")(maps[-1]))
        return maps[1:]


def load_resnet(network: ResNet, path: Path) -> TransferReport:
    """Weights from a local file, all of them; the classifier ``fc`` of the file is not used.

    Raises: WeightsError where the file cannot be read, or does not fit.
    """
    state = read_checkpoint(path).tensors
    return transfer(network, state, allow_unused=("fc.*",), allow_missing=("*.num_batches_tracked",), origin=str(path))
