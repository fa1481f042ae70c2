"""Scope of the answers: whether a scan looks like the heads that networks here are shown, by measures of its voxels.

The ranges are those of ordinary heads, whole or without skull, of the training side (scripts/evidence/scope.py), made
wider. Two ends are not: a head may vary and be smooth as it likes, and of 2D scans, which the training side lacks, the
field of view often cuts off the vertex; half a head is cut through its middle (a section of two thirds of the largest
leaves out about an eighth of a ball). A scan beyond them is answered all the same; it is said.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from brainfm.errors import ScanError
from brainfm.imaging import geometry
from brainfm.imaging.intensity import foreground
from brainfm.volume import Volume

LOOK_MM = 4.0  # voxels on which a scan is measured
_RIM_VOX = 5  # of them from the outside of the head to what is called inner: 20 mm
_LEAST_VOXELS = 64  # of a head at 4 mm; less is none
_AIR_HU, _BONE_HU, _SHARE = -500.0, 300.0, 0.01  # of a CT in Hounsfield units: a share of the voxels lies beyond each
_EDGE_MM = (0.4, 6.5)  # of voxels: half of the finest and a little over the coarsest that training draws

# what it is called, and its range over 111 scans of 105 people of the training side, widened
ORDINARY: dict[str, tuple[str, float, float]] = {
    "width_mm": ("the head is wide, in mm,", 120, 192),
    "depth_mm": ("the head is deep, in mm,", 135, 261),
    "height_mm": ("the head is high, in mm,", 104.5, 257.5),
    "head_ml": ("the head holds, in ml,", 1171, 6513),
    "cut": ("the field of view cuts off, as a share of the head's section,", 0, 2 / 3),
    "spread": ("values within the head spread by, as a share of the scan's range,", 0.0726, np.inf),
    "smooth": ("neighbouring voxels correlate by", 0.48, np.inf),
}


def measures(volume: Volume) -> dict[str, float]:
    """What a scan's voxels say about its head, by the names of ORDINARY.

    Attributes of the answer: `width_mm`, `depth_mm`, `height_mm`: extent of the head along X, Y, Z; `head_ml`: its
    volume; `cut`: the largest share of its cross-section that a face of the field of view cuts, the lower face apart;
    within the inner head `smooth`: correlation of neighbouring voxels, and `spread`: between the quartiles, in units of
    the scan's range.

    Raises: ScanError where all voxels have one value or there is no head at all.
    """
    shape = tuple(max(2, round(n * mm / LOOK_MM)) for n, mm in zip(volume.shape, volume.spacing_mm))
    scale = np.array([n / m for n, m in zip(volume.shape, shape)])
    affine = np.array(volume.affine_mm)
    affine[:3, 3] += affine[:3, :3] @ ((scale - 1) / 2)
    affine[:3, :3] *= scale
    fill = float(volume.voxels.min())
    image = geometry.resample(volume.voxels, volume.affine_mm, shape, affine, order="linear", fill=fill)  # type: ignore[arg-type]
    head = ndimage.binary_opening(foreground(Volume(image, affine)))
    if np.count_nonzero(head) < _LEAST_VOXELS:
        raise ScanError("there is no head in it")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    found = {}
    for axis, name in enumerate(("width_mm", "depth_mm", "height_mm")):
        places = np.nonzero(head.any(axis=tuple(other for other in range(3) if other != axis)))[0]
        found[name] = float((places[-1] - places[0] + 1) * edges[axis])
    found["head_ml"] = float(np.count_nonzero(head) * edges.prod() / 1000)
    found["cut"] = _cut(head)
    inner = ndimage.binary_erosion(filled(head), iterations=_RIM_VOX)
    low, high = np.percentile(image, [0.5, 99.5])
    inner = inner if np.count_nonzero(inner) >= _LEAST_VOXELS else head
    quartiles = np.percentile(image[inner], [25, 75])
    found["spread"] = float((quartiles[1] - quartiles[0]) / max(high - low, 1e-12))
    found["smooth"] = _smooth(image, inner)
    return found


def filled(head: np.ndarray) -> np.ndarray:
    """The head without holes, slice by slice: a skull is open below."""
    return np.stack([ndimage.binary_fill_holes(head[:, :, z]) for z in range(head.shape[2])], axis=2)


def _cut(head: np.ndarray) -> float:
    shares = [0.0]
    for axis in range(3):
        areas = head.sum(axis=tuple(other for other in range(3) if other != axis))
        shares += [areas[-1] / areas.max(), *([areas[0] / areas.max()] if axis < 2 else [])]
    return float(max(shares))


def _smooth(image: np.ndarray, mask: np.ndarray) -> float:
    """The least of the three axes' correlations of a voxel with its neighbour, both in a mask."""
    found = []
    for axis in range(3):
        one, other = (np.moveaxis(array, axis, 0) for array in (image, mask))
        both = other[1:] & other[:-1]
        a, b = one[1:][both], one[:-1][both]
        flat = a.size < 2 or a.std() == 0 or b.std() == 0
        found.append(0.0 if flat else float(np.corrcoef(a, b)[0, 1]))
    return min(found)


def widened(low: float, high: float) -> tuple[float, float]:
    """A range of ordinary heads as it is used: a quarter of its length more at each end, the low end at most a fifth of
    its value: what is near 0 must not reach it."""
    more = 0.25 * (high - low)
    return max(low - more, 0.8 * low) if low > 0 else low - more, high + more


def beyond(found: dict[str, float], ordinary: dict[str, tuple[str, float, float]]) -> list[str]:
    """A phrase for each measure outside its range."""
    said = []
    for name, (words, low, high) in ordinary.items():
        value = found.get(name)
        if value is not None and not low <= value <= high:
            usual = f"{low:.3g} to {high:.3g}" if np.isfinite(high) else f"{low:.3g} or more"
            said.append(f"{words} {value:.3g}, ordinary heads have {usual}")
    return said


def strange(volume: Volume) -> list[str]:
    """Why a scan is out of scope, a phrase a reason; empty where nothing speaks against it."""
    said = []
    coarse = max(volume.spacing_mm)
    if not _EDGE_MM[0] <= min(volume.spacing_mm) or coarse > _EDGE_MM[1]:
        edges = " x ".join(f"{edge:.3g}" for edge in volume.spacing_mm)
        said.append(f"voxels of {edges} mm, expected edges from {_EDGE_MM[0]:g} to {_EDGE_MM[1]:g} mm")
    voxels = volume.voxels
    if np.mean(voxels < _AIR_HU) > _SHARE and np.mean(voxels > _BONE_HU) > _SHARE / 10:
        said.append("its values look like Hounsfield units of a CT, expected an MRI")
    try:
        return said + beyond(measures(volume), ORDINARY)
    except ScanError as error:
        return [*said, str(error)]
