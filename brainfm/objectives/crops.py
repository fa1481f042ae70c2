"""Crops of a patch: a smaller or larger share of it at a size of its own, each with its own intensities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm import seeds

_ASPECT = math.log(4 / 3)  # of an edge, either way
_GAIN, _OFFSET, _NOISE = 0.2, 0.2, 0.1  # in units of the standardised intensity
_BLUR_VOX = 1.0  # deviation at most, in half of the crops
_TAPS = 5


def draw_crops(
    image: Tensor,
    samples: Tensor,
    number: int,
    scale: tuple[float, float],
    size_vox: Sequence[int],
    seed: int,
    name: str,
) -> Tensor:
    """``number`` crops of every patch, resampled to one size: [B, 1, X, Y, Z] -> [number * B, 1, *size_vox], float32.

    The first B are the first crops of the B patches. A crop is a box anywhere inside its patch, left and right mirrored
    in half of them, then blurred, scaled, shifted and given noise. Where it lies and how it looks is a function of
    (seed, name, the sample's number, the crop's number) alone.

    Args:
        samples: [B] int64, the samples' numbers.
        scale: share of the patch's volume in a box, from and to.
        size_vox: of the crops, X, Y, Z.
        name: a word; other names give independent crops.

    Source: multi-crop of Caron et al. 2020 (arXiv 2006.09882), in three dimensions.
    """
    draws = [
        [_box(seeds.torch_stream(seed, name, sample, crop), scale) for sample in samples.tolist()]
        for crop in range(number)
    ]
    drawn = torch.tensor(draws, dtype=torch.float32).flatten(0, 1).to(image.device, non_blocking=True)
    edges, centres, flips, looks = drawn.split([3, 3, 1, 4], dim=1)
    theta = torch.zeros(len(drawn), 3, 4, device=image.device)
    for axis in range(3):  # torch counts the last axis first
        theta[:, axis, axis] = edges[:, 2 - axis]
        theta[:, axis, 3] = centres[:, 2 - axis]
    theta[:, 2, 2] *= 1 - 2 * flips[:, 0]
    grid = F.affine_grid(theta, [len(drawn), 1, *size_vox], align_corners=False)
    whole = image.float().repeat(number, 1, 1, 1, 1)
    crops = F.grid_sample(whole, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return _looked(crops, looks, samples, number, seed, name)


def _box(generator: torch.Generator, scale: tuple[float, float]) -> list[float]:
    """Edges as shares of the patch's, centre in [-1, 1], whether mirrored, and gain, offset, noise, blur."""
    volume, *more = torch.rand(12, generator=generator).tolist()
    edge = (scale[0] + (scale[1] - scale[0]) * volume) ** (1 / 3)
    edges = [min(1.0, edge * math.exp(_ASPECT * (2 * u - 1))) for u in more[:3]]
    centres = [(1 - e) * (2 * u - 1) for e, u in zip(edges, more[3:6])]
    gain, offset = 1 + _GAIN * (2 * more[7] - 1), _OFFSET * (2 * more[8] - 1)
    blur = _BLUR_VOX * max(0.0, 2 * more[10] - 1)
    return [*edges, *centres, float(more[6] < 0.5), gain, offset, _NOISE * more[9], blur]


def _looked(crops: Tensor, looks: Tensor, samples: Tensor, number: int, seed: int, name: str) -> Tensor:
    gain, offset, noise, blur = (value[:, None, None, None, None] for value in looks.unbind(1))
    crops = _blurred(crops, blur.flatten()) * gain + offset
    words = [
        int(seeds.stream(seed, f"{name} noise", sample, crop).integers(2**31))
        for crop in range(number)
        for sample in samples.tolist()
    ]
    words_there = torch.tensor(words).to(crops.device, non_blocking=True)
    return crops + noise * _noise(words_there, crops[0].numel()).view_as(crops)


def _noise(words: Tensor, count: int) -> Tensor:
    """[N] numbers -> [N, count] values of mean 0 and deviation 1, the sum of two even ones, the same on every device.

    Source: the multiply and shift rounds of a 32-bit integer hash; a generator would have to live on the device, one a
    crop.
    """
    mixed = torch.arange(count, device=words.device) * 2654435769 + words[:, None] * 40503
    for _ in range(2):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 16)) * 73244475
    mixed = mixed & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return ((mixed & 0xFFFF) + (mixed >> 16)).float().sub(65535).mul(math.sqrt(6) / 65536)


def _blurred(crops: Tensor, deviations: Tensor) -> Tensor:
    """Each of [B, 1, X, Y, Z] by a Gaussian of its own deviation in voxels [B]; 0: as it is."""
    steps = torch.arange(_TAPS, device=crops.device) - _TAPS // 2
    weights = torch.exp(-0.5 * (steps / deviations.clamp(min=1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    blurred = crops.transpose(0, 1)
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = _TAPS
        padding = [n // 2 for n in reversed(shape) for _ in range(2)]
        padded = F.pad(blurred, padding, mode="replicate")
        blurred = F.conv3d(padded, weights.view(-1, 1, *shape), groups=len(crops))
    return blurred.transpose(0, 1)
