"""Masking: which voxels a network may not see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brainfm import seeds
from brainfm.errors import ConfigError


def hidden_blocks(patch_vox: Sequence[int], unit_vox: int, ratio: float) -> tuple[tuple[int, int, int], int]:
    """The grid of blocks and how many of them are hidden.

    Raises: ConfigError where blocks do not tile the patch, or where all or none would be hidden.
    """
    if unit_vox < 1 or any(edge % unit_vox for edge in patch_vox):
        raise ConfigError(f"mask_unit_vox={unit_vox}: expected a divisor of every edge of the patch {tuple(patch_vox)}")
    x, y, z = (edge // unit_vox for edge in patch_vox)
    count = round(ratio * x * y * z)
    if not 0 < count < x * y * z:
        raise ConfigError(
            f"mask_ratio={ratio}: hides {count} of {x * y * z} blocks of {unit_vox} voxels; expected some, but not all"
        )
    return (x, y, z), count


def draw_mask(
    samples: Tensor,
    patch_vox: Sequence[int],
    unit_vox: int,
    ratio: float,
    seed: int,
    purpose: str,
    device: torch.device | None = None,
) -> Tensor:
    """Cubic blocks drawn without replacement: bool [B, 1, X, Y, Z], True where hidden.

    Every sample hides exactly round(ratio * blocks) blocks. Row i is a function of (seed, purpose, samples[i]) alone,
    on any device.

    Args:
        samples: [B] int64, the samples' numbers.
        patch_vox: X, Y, Z.
        unit_vox: edge length of a block.
        ratio: share of the blocks that is hidden.
        purpose: a word; other purposes give independent masks.
        device: where the mask is wanted; by default where the samples are.

    Raises: ConfigError (see hidden_blocks).
    """
    grid, count = hidden_blocks(patch_vox, unit_vox, ratio)
    blocks = torch.zeros((len(samples), grid[0] * grid[1] * grid[2]), dtype=torch.bool)
    for row, number in zip(blocks, samples.tolist(), strict=True):
        row[torch.randperm(len(row), generator=seeds.torch_stream(seed, purpose, number))[:count]] = True
    hidden = blocks.to(device or samples.device, non_blocking=True).reshape(-1, 1, *grid)  # moved while it is small
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(unit_vox, dim=axis)
    return hidden
