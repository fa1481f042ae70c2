"""Views of a whole head: all of it on coarse voxels, and windows that together cover it.

Both lie about the middle of the volume. Every head is shown at one scale, so that its size can be seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from brainfm.imaging import geometry
from brainfm.specs import TaskSpec

Triple = tuple[int, int, int]
Lengths = tuple[float, float, float]


def whole_view(volume: np.ndarray, spacing_mm: Lengths, view_mm: float, patch_vox: Triple) -> np.ndarray:
    """The volume on cubic voxels of ``view_mm``; what does not fit into the patch is cut off on both sides.

    Args:
        volume: [X, Y, Z] real; voxels larger than before are averages of what they cover.

    Returns:
        [patch_vox] float32; the volume's minimum where it has ended.
    """
    array = np.asarray(volume, dtype=np.float32)
    return geometry.resample(
        array,
        _centred(array.shape, spacing_mm),
        patch_vox,
        _centred(patch_vox, (view_mm,) * 3),
        order="linear",
        fill=float(array.min()),
    )


def whole_view_mask(mask: np.ndarray, spacing_mm: Lengths, view_mm: float, patch_vox: Triple) -> np.ndarray:
    """Where the whole-head view shows any of a mask, bool [patch_vox]: the smallest lesion stays at least a voxel."""
    source, target = _centred(mask.shape, spacing_mm), _centred(patch_vox, (view_mm,) * 3)
    view = geometry.resample(mask.astype(np.uint8), source, patch_vox, target, order="nearest", fill=0) > 0
    inside = np.argwhere(mask)
    places = np.rint((inside * spacing_mm + source[:3, 3] - target[:3, 3]) / view_mm).astype(int)
    places = places[((places >= 0) & (places < patch_vox)).all(axis=1)]
    view[tuple(places.T)] = True
    return view


def whole_view_to_volume(
    view: np.ndarray, spacing_mm: Lengths, view_mm: float, patch_vox: Triple, shape: Triple
) -> np.ndarray:
    """A map over the whole-head view, e.g. of attention, back on the volume's voxels.

    Args:
        view: [x, y, z] on any grid that divides the patch, such as one voxel a token.

    Returns:
        [shape] float32, interpolated; 0 where the view does not reach. Sums are not kept, values are.
    """
    x, y, z = (view_mm * edge / size for edge, size in zip(patch_vox, view.shape, strict=True))
    return geometry.resample(
        np.asarray(view, dtype=np.float32),
        _centred(view.shape, (x, y, z)),
        shape,
        _centred(shape, spacing_mm),
        order="linear",
        fill=0.0,
    )


def covering_counts(shape: Triple, patch_vox: Triple) -> Triple:
    """How many windows along each axis it takes to cover a volume."""
    x, y, z = (math.ceil(size / edge) for size, edge in zip(shape, patch_vox, strict=True))
    return x, y, z


def covering_corners(shape: Triple, patch_vox: Triple, counts: Triple | None = None) -> list[Triple]:
    """The first voxels of windows that together cover a volume, evenly spread.

    Args:
        counts: windows along each axis, at least ``covering_counts``; None: as few as possible.

    Returns:
        Corners; negative along an axis where the volume is thinner than the window, which then lies about it.
    """
    along = []
    for size, edge, count in zip(shape, patch_vox, counts or covering_counts(shape, patch_vox), strict=True):
        room = size - edge
        along.append([room // 2] * count if room <= 0 or count == 1 else [
            round(i * room / (count - 1)) for i in range(count)
        ])  # fmt: skip
    return [(x, y, z) for x, y, z in itertools.product(*along)]


def views_of_volumes(image: np.ndarray, spacing_mm: Lengths, spec: TaskSpec) -> np.ndarray:
    """All that a whole-head task looks at when it answers.

    Args:
        image: [M, X, Y, Z] prepared voxels, 0 in the channel of an absent contrast.

    Returns:
        [V, M, x, y, z] float32: the whole head where the spec has that view, then, with crops, the covering windows;
        where a window reaches beyond the volume it holds the contrast's minimum.
    """
    views = []
    if spec.view_mm > 0:
        views.append(np.stack([whole_view(scan, spacing_mm, spec.view_mm, spec.patch_vox) for scan in image]))
    if spec.crops:
        shape = (image.shape[1], image.shape[2], image.shape[3])
        views += [
            np.stack([_window(scan, corner, spec.patch_vox) for scan in image])
            for corner in covering_corners(shape, spec.patch_vox)
        ]
    return np.stack(views)


def _window(volume: np.ndarray, corner: Triple, patch_vox: Triple) -> np.ndarray:
    out = np.full(patch_vox, volume.min(), np.float32)
    source, target = [], []
    for start, edge, size in zip(corner, patch_vox, volume.shape, strict=True):
        low, high = max(start, 0), min(start + edge, size)
        source.append(slice(low, high))
        target.append(slice(low - start, high - start))
    out[tuple(target)] = volume[tuple(source)]
    return out


def _centred(shape: Sequence[int], spacing_mm: Lengths) -> np.ndarray:
    """[4, 4] the affine of a grid whose middle lies at 0 mm."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(np.asarray(shape) - 1) / 2 * np.asarray(spacing_mm)
    return affine
