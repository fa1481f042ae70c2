"""Connected parts of a label map: the largest kept, small ones dropped.

Parts are voxels that touch by a face, an edge or a corner (26 neighbours), of one class each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import ndimage

_TOUCHING = np.ones((3, 3, 3), dtype=bool)


def largest_component(labels: np.ndarray, classes: Iterable[int] | None = None) -> np.ndarray:
    """Keeps the largest connected part of each class; the others become background.

    Of parts of one size the first in the array's order stays.

    Args:
        labels: [X, Y, Z] class indices, 0 the background; not changed.
        classes: those to be cleaned, None for all.
    """

    def keep(sizes: np.ndarray) -> np.ndarray:
        kept = np.zeros(len(sizes), dtype=bool)
        kept[int(sizes.argmax())] = True
        return kept

    return _filtered(labels, classes, keep)


def drop_small(labels: np.ndarray, spacing_mm: Sequence[float], min_ml: float) -> np.ndarray:
    """Makes connected parts of a class that are smaller than ``min_ml`` millilitres background.

    Args:
        labels: [X, Y, Z] class indices, 0 the background; not changed.
        spacing_mm: edge lengths of a voxel.
    """
    voxel_ml = float(np.prod(np.asarray(spacing_mm, dtype=np.float64))) / 1000
    least = min_ml * (1 - 1e-9)  # a part of exactly this size stays, however the product was rounded
    return _filtered(labels, None, lambda sizes: sizes * voxel_ml >= least)


def _filtered(
    labels: np.ndarray, classes: Iterable[int] | None, keep: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """A copy without the connected parts for which ``keep``, of all parts' voxel counts, is False."""
    if labels.ndim != 3:
        raise ValueError(f"a label map has three axes, found shape {labels.shape}")
    cleaned = labels.copy()
    for k in np.unique(labels) if classes is None else classes:
        mask = labels == k
        if k == 0 or not mask.any():
            continue
        # only the box around the class: most of a head is background
        (box,) = ndimage.find_objects(mask.view(np.int8))
        parts, count = ndimage.label(mask[box], _TOUCHING)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        gone = np.concatenate([[False], ~keep(sizes)])
        cleaned[box][gone[parts]] = 0
    return cleaned
