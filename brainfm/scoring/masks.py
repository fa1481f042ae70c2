"""Scores of masks, and of the lesions in them.

Where neither mask holds a voxel, Dice and surface Dice are 1: nothing was asked for and nothing was said. Where only
one does, both are 0. A mean over cases therefore never meets a NaN. The metric code of the FOMO26 challenge
(fomo26/fomo-metrics, segmentation) has the same Dice, but a surface Dice of 0 where both are empty: ``both_empty=0``.
"""

from __future__ import annotations

import importlib
import warnings

import numpy as np
from scipy import ndimage

from brainfm.extras import missing


def dice(predicted: np.ndarray, true: np.ndarray) -> float:
    """2 |P and T| / (|P| + |T|).

    Args:
        predicted, true: arrays of one shape; a voxel that is not 0 belongs to the mask.

    Raises:
        ValueError: where the shapes differ.
    """
    p, t = _masks(predicted, true)
    total = int(np.count_nonzero(p)) + int(np.count_nonzero(t))
    return 1.0 if total == 0 else 2.0 * int(np.count_nonzero(p & t)) / total


def surface_dice(
    predicted: np.ndarray,
    true: np.ndarray,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float = 1.0,
    both_empty: float = 1.0,
) -> float:
    """The share of both surfaces that lies within the tolerance of the other one.

    Surfaces are made of elements between voxel centres, each with its area in mm^2, so that thick slices count by
    their true extent and not by their number of voxels.

    Args:
        predicted, true: [X, Y, Z]; a voxel that is not 0 belongs to the mask. The volume's border counts as surface.
        spacing_mm: edge lengths of a voxel along the three axes.
        tolerance_mm: how far the surfaces may lie apart.
        both_empty: the answer where neither mask holds a voxel; 1 as Dice has it, 0 as FOMO26 counts.

    Raises:
        ValueError: where the shapes differ or are not 3D, or a spacing is not a positive number.
        ConfigError: where monai is not installed.

    Source: Nikolov et al. 2018 (arXiv:1809.04430), eq. 1 of the appendix on surface DSC; elements as in
        google-deepmind/surface-distance, computed by monai.
    """
    p, t = _masks(predicted, true)
    spacing = tuple(float(s) for s in spacing_mm)
    if p.ndim != 3 or len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"surface Dice needs 3D masks and three spacings > 0, found {p.shape} and {spacing_mm}")
    if not p.any() or not t.any():
        return both_empty if not p.any() and not t.any() else 0.0
    require_monai()
    from monai.metrics import compute_surface_dice
    from monai.utils import convert_to_tensor

    box = _union_box(p, t)
    # One empty voxel all around closes the surfaces of masks that touch the border, as DeepMind's code does.
    pair = [convert_to_tensor(np.pad(mask[box], 1)[None, None]) for mask in (p, t)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # monai 1.5 and 1.6 warn about an argument of their own calls
        value = float(
            compute_surface_dice(
                pair[0], pair[1], [tolerance_mm], include_background=True, spacing=spacing, use_subvoxels=True
            )
        )
    return value if np.isfinite(value) else 0.0


def require_monai() -> None:
    """Raises: ConfigError where surface Dice cannot be computed, for callers who want to know before long work."""
    try:
        importlib.import_module("monai.metrics")
    except ModuleNotFoundError:
        raise missing("monai", "surface Dice") from None


def instance_scores(
    predicted: np.ndarray,
    true: np.ndarray,
    spacing_mm: tuple[float, float, float],
    min_overlap_vox: int = 1,
) -> dict[str, float | None]:
    """Which lesions were found, whatever their size: Dice is decided by the largest one.

    A lesion is a part of a mask whose voxels touch by a face, an edge or a corner. It is detected where the other mask
    covers ``min_overlap_vox`` of its voxels (all, where it has fewer); a predicted part that covers no lesion in this
    way is a false positive. One predicted part may detect several lesions.

    Args:
        predicted, true: [X, Y, Z]; a voxel that is not 0 belongs to the mask.
        spacing_mm: edge lengths of a voxel along the three axes.
        min_overlap_vox: at least 1.

    Returns:
        ``lesions``, ``detected`` and ``missed`` of the true mask; ``false_positives`` of the predicted one; ``f1`` =
        2 detected / (2 detected + missed + false positives), 1 where both masks are empty; ``sensitivity`` = detected /
        lesions, None where there is no lesion; ``missed_ml`` and ``false_positive_ml``, the volumes of those parts.

    Raises:
        ValueError: where the shapes differ or are not 3D, or the overlap is less than one voxel.

    Source: lesion-wise true and false positives by any overlap as in Carass et al. 2017, NeuroImage 148:77.
    """
    p, t = _masks(predicted, true)
    if p.ndim != 3 or min_overlap_vox < 1:
        raise ValueError(f"lesions are counted in 3D masks by an overlap >= 1, found {p.shape} and {min_overlap_vox}")
    if p.any() or t.any():
        box = _union_box(p, t)
        p, t = p[box], t[box]
    found, missed_vox = _covered(t, p, min_overlap_vox)
    good, extra_vox = _covered(p, t, min_overlap_vox)
    lesions, detected, extra = found.size, int(found.sum()), int((~good).sum())
    parts = lesions + detected + extra  # 2 detected + missed + false positives
    voxel_ml = float(np.prod(np.asarray(spacing_mm, dtype=np.float64))) / 1000.0
    return {
        "lesions": lesions,
        "detected": detected,
        "missed": lesions - detected,
        "false_positives": extra,
        "f1": 2.0 * detected / parts if parts else 1.0,
        "sensitivity": detected / lesions if lesions else None,
        "missed_ml": missed_vox * voxel_ml,
        "false_positive_ml": extra_vox * voxel_ml,
    }


def volume_ml(mask: np.ndarray, spacing_mm: tuple[float, float, float]) -> float:
    """Millilitres of the voxels that are not 0; ``spacing_mm`` are the edge lengths of a voxel."""
    return int(np.count_nonzero(mask)) * float(np.prod(np.asarray(spacing_mm, dtype=np.float64))) / 1000.0


def _masks(predicted: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, t = np.asarray(predicted), np.asarray(true)
    if p.shape != t.shape:
        raise ValueError(f"masks of one shape can be compared, found {p.shape} and {t.shape}")
    return p != 0, t != 0


def _covered(mask: np.ndarray, other: np.ndarray, min_overlap_vox: int) -> tuple[np.ndarray, int]:
    """Whether the other mask covers each part of this one, and the voxels of the parts that it does not."""
    parts, number = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    size = np.bincount(parts.ravel(), minlength=number + 1)[1:]
    shared = np.bincount(parts[other], minlength=number + 1)[1:]
    covered = shared >= np.minimum(size, min_overlap_vox)
    return covered, int(size[~covered].sum())


def _union_box(p: np.ndarray, t: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around both masks: distances outside it are never asked for."""
    union = p | t
    box = []
    for axis in range(union.ndim):
        others = tuple(a for a in range(union.ndim) if a != axis)
        used = np.flatnonzero(union.any(axis=others))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)
