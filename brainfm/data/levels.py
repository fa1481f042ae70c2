"""Levels: coarser copies of a volume, with voxels of twice, four times, ... the edge length.

Voxel i of level n covers the voxels i 2^n to (i + 1) 2^n - 1 of the volume along each axis, so all levels begin at one
corner and nothing moves by a part of a voxel. A volume whose edge is no multiple of 2^n is continued at its end with
copies of its last voxels. Every level is made from the volume itself and never from another level: the most frequent of
the most frequent is not the most frequent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

COARSEST_MM = 4.5  # beyond it a head has too few voxels to be worth a copy
_AT_ONCE = 1 << 20  # voxels that are sorted in one go

Triple = tuple[int, int, int]


def kept_levels(spacing_mm: Sequence[float]) -> int:
    """How many levels a store of this spacing keeps beside its own: 2 at 1 mm, 1 at 2 mm.

    The longest edge decides, and all edges double together: thick slices soon have no coarser copy.
    """
    level = 0
    while max(spacing_mm) * 2 ** (level + 1) <= COARSEST_MM:
        level += 1
    return level


def coarse_shape(shape: Sequence[int], level: int) -> Triple:
    """The shape of a level: [X, Y, Z] / 2^level, rounded up."""
    x, y, z = (-(-n >> level) for n in shape)
    return x, y, z


def coarse_image(voxels: np.ndarray, level: int) -> np.ndarray:
    """The means of 2^level x 2^level x 2^level voxels.

    Args:
        voxels: [X, Y, Z], real.

    Returns:
        float32, of `coarse_shape`. Sums of values in the steps of the store are exact.
    """
    sums = _folded(_whole_cells(voxels, level).astype(np.float32), level, np.add)
    return sums * np.float32(0.125**level)


def coarse_labels(labels: np.ndarray, level: int) -> np.ndarray:
    """The most frequent of 2^level x 2^level x 2^level values.

    Of equally frequent values one that is not 0 wins, or small lesions would be the first to go (of 369 in 54 masks at
    1 mm, 2 mm keep 257 at 1.05 of their volume; else 234 at 0.89). Of several of these the one of the first voxel wins,
    and only then the smallest. Were it always the smallest, white matter would gain 6 % at 2 mm, and left, whose ids
    are the smaller ones, would gain on right; so all lies within 2 %, at 0.1 mm towards the end of the axes.

    Args:
        labels: [X, Y, Z], integers from 0.

    Returns:
        The same dtype, of `coarse_shape`.
    """
    labels = _whole_cells(labels, level)
    out = _folded(labels, level, np.minimum)
    mixed = out != _folded(labels, level, np.maximum)  # few: most cells lie within one structure
    edge = 1 << level
    x, y, z = out.shape
    cells = labels.reshape(x, edge, y, edge, z, edge).transpose(0, 2, 4, 1, 3, 5)
    places = np.stack(np.nonzero(mixed))
    step = max(_AT_ONCE >> 3 * level, 1)
    for start in range(0, places.shape[1], step):
        some = tuple(places[:, start : start + step])
        out[some] = _most_frequent(cells[some].reshape(-1, edge**3))
    return out


def _most_frequent(rows: np.ndarray) -> np.ndarray:
    """[M, N] values -> [M]: the most frequent of each row, with the ties of `coarse_labels`."""
    first = rows[:, :1]
    rows = np.sort(rows, axis=1)
    place = np.arange(rows.shape[1], dtype=np.int32)
    begins = np.zeros(rows.shape, np.int32)
    begins[:, 1:] = np.where(rows[:, 1:] != rows[:, :-1], place[1:], 0)
    length = place + 1 - np.maximum.accumulate(begins, axis=1)  # of the run of equal values up to here
    best = np.argmax(4 * length - 2 * (rows == 0) + (rows == first), axis=1)  # of equals the earliest, so the smallest
    return np.take_along_axis(rows, best[:, None], axis=1)[:, 0]


def _whole_cells(voxels: np.ndarray, level: int) -> np.ndarray:
    """Continued at the end of every axis up to a multiple of 2^level."""
    short = [(0, (n << level) - m) for n, m in zip(coarse_shape(voxels.shape, level), voxels.shape)]
    return np.pad(voxels, short, mode="edge") if any(s for _, s in short) else voxels


def _folded(voxels: np.ndarray, level: int, combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Neighbours combined two by two, `level` times along each axis."""
    for axis in range(3):
        before = (slice(None),) * axis
        for _ in range(level):
            voxels = combine(voxels[(*before, slice(0, None, 2))], voxels[(*before, slice(1, None, 2))])
    return voxels
