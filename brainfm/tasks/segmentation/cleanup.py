"""Cleaning of a label map after the network has spoken; kept only where held-out cases gain by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from brainfm.imaging.components import drop_small, largest_component
from brainfm.scoring.masks import dice
from brainfm.specs import Decisions

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
