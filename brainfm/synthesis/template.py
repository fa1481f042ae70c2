"""The ICBM152 anatomy that nilearn ships, and persons made of it by bending."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from brainfm.imaging.atlas import tissue_maps

_VENTRICLE_GRID_MM = 3.0  # of the field that widens the ventricles; it is smoother than that
# Where the lateral ventricles lie in the template, in mm: keeps out the third ventricle and the cisterns.
_VENTRICLE_BOX_MM = ((-40, 40), (-52, 38), (-4, 34))


@dataclass(frozen=True)
class Anatomy:
    """What a head consists of, on one grid.

    Attributes:
        csf, grey, white: [X, Y, Z] float32 probabilities; their sum is 1 in the head and 0 outside.
        ventricle_mm: [X, Y, Z] float32 distance to the lateral ventricles in mm of the template, below 0 inside them.
    """

    csf: np.ndarray
    grey: np.ndarray
    white: np.ndarray
    ventricle_mm: np.ndarray

    @property
    def head(self) -> np.ndarray:
        """[X, Y, Z] bool."""
        return self.csf + self.grey + self.white > 0.5

    @property
    def labels(self) -> np.ndarray:
        """[X, Y, Z] uint8: 0 outside, 1 CSF, 2 grey matter, 3 white matter."""
        largest = np.argmax([self.csf, self.grey, self.white], axis=0).astype(np.uint8) + np.uint8(1)
        return largest * self.head


@lru_cache(maxsize=1)
def _ventricle_distance() -> tuple[np.ndarray, np.ndarray]:
    """([X, Y, Z] float32 signed distance in mm to the lateral ventricles, affine), coarse and smooth."""
    maps, affine = tissue_maps(2.0)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in maps.shape[1:]), indexing="ij"), axis=-1)
    place = index @ affine[:3, :3].T + affine[:3, 3]
    inside = maps[0] > 0.5
    for axis, (low, high) in enumerate(_VENTRICLE_BOX_MM):
        inside &= (place[..., axis] > low) & (place[..., axis] < high)
    parts, _ = ndimage.label(inside)
    ventricles = parts == np.argmax(np.bincount(parts.ravel())[1:]) + 1
    distance = ndimage.distance_transform_edt(~ventricles) - ndimage.distance_transform_edt(ventricles)
    return (2.0 * distance).astype(np.float32), affine


@lru_cache(maxsize=1)
def _ventricle_velocity() -> tuple[np.ndarray, np.ndarray]:
    """([3, X, Y, Z] float32, affine): away from the ventricles, 1 mm long at their wall, fading over centimetres."""
    fine, fine_affine = _ventricle_distance()
    step = _VENTRICLE_GRID_MM / 2.0
    distance = ndimage.zoom(ndimage.gaussian_filter(fine, 0.5), 1 / step, order=1, grid_mode=True, mode="nearest")
    affine = fine_affine.copy()
    affine[:3, :3] *= step
    affine[:3, 3] += fine_affine[:3, :3] @ np.full(3, (step - 1) / 2)
    outward = np.stack(np.gradient(distance)) / _VENTRICLE_GRID_MM
    fading = np.exp(-np.maximum(distance, 0) / 14)
    velocity = np.stack([ndimage.gaussian_filter(fading * component, 1.0) for component in outward])
    return velocity.astype(np.float32), affine


def widening(amount_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """How points of the template move when a ventricle's wall is pulled inwards by so many mm.

    The field is the flow of a stationary velocity (scaling and squaring), so it does not fold. Sampling the template
    there shows wider ventricles.

    Args:
        amount_mm: above 0 for wider, below for narrower ventricles.

    Returns:
        [3, X, Y, Z] float32 displacement in mm and the [4, 4] affine of its grid.
    """
    velocity, affine = _ventricle_velocity()
    index = np.indices(velocity.shape[1:], dtype=np.float32)
    moved = velocity * np.float32(-amount_mm / 16)
    for _ in range(4):
        at = index + moved / _VENTRICLE_GRID_MM
        moved = moved + np.stack([ndimage.map_coordinates(m, at, order=1, mode="nearest") for m in moved])
    return moved, affine


def _sample(field: np.ndarray, affine: np.ndarray, points_mm: np.ndarray, beyond: str = "nearest") -> np.ndarray:
    """[...] values of a [X, Y, Z] field at [3, ...] points in mm, linear; beyond it the border's value, or 0."""
    spacing = np.diag(affine)[:3]
    flat = (points_mm.reshape(3, -1) - affine[:3, 3:]) / spacing[:, None]
    return ndimage.map_coordinates(field, flat, order=1, mode=beyond).reshape(points_mm.shape[1:])


def bent(points_mm: np.ndarray, spacing_mm: float, widening_mm: float, sharpness: float = 1.6) -> Anatomy:
    """The template as seen through a map.

    Args:
        points_mm: [3, X, Y, Z] for every voxel of the new head, the point of the template it shows.
        spacing_mm: of the new grid.
        widening_mm: of the lateral ventricles.
        sharpness: exponent of the probabilities: the average of 152 heads is blurred, one head is not.
    """
    maps, affine = tissue_maps(spacing_mm)
    head = _sample(maps.sum(0), affine, points_mm, beyond="constant") > 0.5
    points = points_mm[:, head]
    moved, moved_affine = widening(widening_mm)
    points = points + np.stack([_sample(m, moved_affine, points) for m in moved])
    sharp = np.stack([_sample(m, affine, points) for m in maps]) ** sharpness
    tissues = np.zeros((3, *head.shape), dtype=np.float32)
    tissues[:, head] = sharp / np.maximum(sharp.sum(0), 1e-6)
    ventricle_mm = np.full(head.shape, 99, dtype=np.float32)
    ventricle_mm[head] = _sample(*_ventricle_distance(), points)
    csf, grey, white = tissues
    return Anatomy(csf, grey, white, ventricle_mm)
