"""The ICBM152 tissue maps (2009a, non-linear, symmetric) that nilearn ships: an average of 152 heads."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy import ndimage

from brainfm.errors import ConfigError
from brainfm.extras import DISTRIBUTION, missing
from brainfm.imaging import nifti

__all__ = ["tissue_maps"]


def _template_file(tissue: str) -> Path:
    found = find_spec("nilearn")  # nilearn itself is not imported: that takes seconds, and only its data are needed
    if found is None or not found.submodule_search_locations:
        raise missing("nilearn", "what reads the ICBM152 tissue maps")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    matches = sorted(folder.glob(f"mni_icbm152_{tissue}_*.nii.gz"))
    if not matches:
        raise ConfigError(f"no ICBM152 {tissue} map in {folder}, expected one as in nilearn 0.10.4: "
                          f"pip install '{DISTRIBUTION}[anatomy]'")  # fmt: skip
    return matches[0]


@lru_cache(maxsize=1)
def _template_1mm() -> tuple[np.ndarray, np.ndarray]:
    """([3, X, Y, Z] float32 csf, grey, white; [4, 4] affine) at 1 mm, cut to the head."""
    t1, _ = nifti.read(_template_file("t1"))
    grey, white = (nifti.read(_template_file(tissue))[0].voxels / np.float32(255) for tissue in ("gm", "wm"))
    # The T1 is stripped so tightly that the outer sulci end open; two millimetres of CSF close them.
    head = ndimage.binary_dilation(ndimage.binary_closing(t1.voxels > 0, iterations=3), iterations=2)
    box = ndimage.find_objects(head.astype(np.uint8))[0]
    maps = np.stack([m[box] for m in (np.clip(1 - grey - white, 0, 1), grey, white)]) * head[box]
    affine = t1.affine_mm.copy()
    affine[:3, 3] += affine[:3, :3] @ [side.start for side in box]
    return maps, affine


@lru_cache(maxsize=4)
def tissue_maps(spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities of CSF, grey and white matter of the ICBM152 template (2009a, non-linear, symmetric).

    Args:
        spacing_mm: edge length of the voxels, 0.5 to 6 mm.

    Returns:
        [3, X, Y, Z] float32 that sum to 1 in the head and to 0 outside, and the [4, 4] affine; RAS+, cut to the head.

    Raises:
        ConfigError: where nilearn is not installed, or the spacing is out of range.
    """
    if not 0.5 <= spacing_mm <= 6:
        raise ConfigError(f"spacing_mm={spacing_mm}: expected an edge length from 0.5 to 6 mm for the tissue maps")
    maps, affine = _template_1mm()
    shape = tuple(int(np.ceil(n / spacing_mm)) for n in maps.shape[1:])
    offset = (spacing_mm - 1) / 2  # the first large voxel begins where the first small one does
    sigma = 0.35 * max(spacing_mm - 1, 0)
    coarse = np.stack([
        ndimage.affine_transform(ndimage.gaussian_filter(m, sigma), [spacing_mm] * 3, offset, shape, order=1)
        for m in maps
    ])  # fmt: skip
    coarse = _normalised(coarse)
    coarse.setflags(write=False)  # it is cached
    coarse_affine = affine.copy()
    coarse_affine[:3, :3] *= spacing_mm
    coarse_affine[:3, 3] += affine[:3, :3] @ np.full(3, offset)
    return coarse, coarse_affine


def _normalised(maps: np.ndarray) -> np.ndarray:
    """[3, ...] so that the sum is 1 where it was above one half, and 0 elsewhere."""
    total = maps.sum(0)
    return maps * np.where(total > 0.5, 1 / np.maximum(total, 0.5), 0).astype(np.float32)
