"""A scan that training refuses, made usable for one answer: a challenge counts a case without a file as the worst.

What is changed is said. A damaged file stays refused: nobody knows what it showed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brainfm.errors import ScanError
from brainfm.imaging import intensity, nifti
from brainfm.imaging.formats import open_scan
from brainfm.volume import Volume

_SHARES = (10, 25, 40)  # percent that may be outliers at either end: the first that makes a scan usable
_REACH = 3.0  # times the width of what lies between: tissue of any contrast is kept
_CLIP = (0.5, 99.5)  # percentiles with which a scan is tried


def mended(file: Path, copy: Path) -> str:
    """Writes a copy of a scan without its outliers and missing numbers, on the same grid.

    Voxels that are no number become the background, and those far outside the middle 80 % of the others (50 and 20 %
    where that is not enough) its nearest end. What has the background's value stays.

    Args:
        copy: ``.nii``; written only where the scan is not usable as it is, and that makes it so.

    Returns: what was changed, in words; empty where nothing was.

    Raises: ScanError where the file cannot be read.
    """
    grid = nifti.read_header(file).grid
    stored = grid.to_ras(open_scan(file).stored(grid.shape_vox))
    values: np.ndarray = stored.astype(np.float64 if stored.dtype.itemsize > 4 else np.float32, order="K")
    finite = np.isfinite(values)
    lost = values.size - int(np.count_nonzero(finite))
    if lost == values.size:
        return ""
    corner = float(values[0, 0, 0] if finite[0, 0, 0] else values[finite].min())
    values[~finite] = corner
    if not lost and _is_usable(Volume(_small(values), grid.ras_affine())):
        return ""
    telling = values[finite & (values != corner)]
    for share in _SHARES if telling.size else ():
        low, high = (float(end) for end in np.percentile(telling, [share, 100 - share]))
        reach = _REACH * (high - low)
        hot = ((values < low - reach) | (values > high + reach)) & (values != corner)
        clipped = np.where(hot, np.clip(values, low - reach, high + reach), values)
        clipped = ((clipped - low) / max(high - low, np.finfo(np.float64).tiny)).astype(np.float32)  # any unit will do
        if (lost or hot.any()) and _is_usable(Volume(clipped, grid.ras_affine())):
            nifti.write_map(copy, clipped, file)
            said = [f"{int(hot.sum())} outliers clipped"] if hot.any() else []
            return " and ".join(said + ([f"{lost} voxels without a number filled in"] if lost else []))
    return ""


def _small(values: np.ndarray) -> np.ndarray:
    """In a unit in which float32 holds them."""
    return (values / max(1.0, float(np.abs(values).max()) / 1e18)).astype(np.float32)


def _is_usable(volume: Volume) -> bool:
    try:
        intensity.statistics(volume.voxels, intensity.foreground(volume), _CLIP)
    except ScanError:
        return False
    return True


def check_readable(file: Path) -> None:
    """Raises: ScanError where the file is missing, damaged, or no scan."""
    open_scan(file).stored(nifti.read_header(file).grid.shape_vox)
