"""What is taken out of a label map after the network has spoken; kept only where held-out cases gain by it.

Parts are voxels that touch by a face, an edge or a corner (26 neighbours), of one class each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy import ndimage

from brainfm.scoring.masks import dice
from brainfm.specs import Decisions

_TOUCHING = np.ones((3, 3, 3), dtype=bool)
_SMALLEST_ML = (0.01, 0.03, 0.1, 0.3)  # 10 to 300 voxels of 1 mm: specks, up to a lesion of 8 mm
_HARMLESS = 0.005  # mean Dice that a clean-up may take from the truth itself


def apply(labels: np.ndarray, decisions: Decisions, spacing_mm: Sequence[float]) -> np.ndarray:
    """The label map as the decisions want it; ``mirror`` and the others are not its business.

    Args:
        labels: [X, Y, Z] class indices, 0 the background; not changed.
        spacing_mm: edge lengths of a voxel.
    """
    if decisions.min_ml > 0:
        labels = drop_small(labels, spacing_mm, decisions.min_ml)
    return largest_component(labels) if decisions.largest_component else labels


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


def candidates(true: Iterable[np.ndarray] = (), spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> list[Decisions]:
    """Clean-ups worth a trial, no clean-up first.

    Args:
        true: label maps [X, Y, Z] of cases that may be learned from. A clean-up that would harm the truth itself (a
            largest component where patients have many lesions) is left out; without any, nothing is.
        spacing_mm: of those.
    """
    tried = [Decisions(largest_component=True), *(Decisions(min_ml=ml) for ml in _SMALLEST_ML)]
    kept: list[list[float]] = [[] for _ in tried]
    for labels in true:
        if labels.any():
            for scores, decisions in zip(kept, tried, strict=True):
                scores.append(_agreement(apply(labels, decisions, spacing_mm), labels))
    return [Decisions(), *(d for d, scores in zip(tried, kept, strict=True) if not _harms(scores))]


def _harms(scores: Sequence[float]) -> bool:
    return len(scores) > 0 and float(np.mean(scores)) < 1 - _HARMLESS


def _agreement(cleaned: np.ndarray, labels: np.ndarray) -> float:
    """Mean Dice over the classes that are there."""
    classes = np.unique(labels)
    return float(np.mean([dice(cleaned == k, labels == k) for k in classes[classes > 0]]))


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
