"""Warping: an atlas's tissue maps bent onto a scan whose tissues are known only by their likelihoods.

No intensities are compared: the deformation raises the probability of the scan under the mixture, voxel by voxel,
so any contrast will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

_FURTHEST_VOX = 0.6  # of one step; longer ones would fold


@dataclass(frozen=True)
class Warp:
    """Where the points of a scan lie in the atlas: p -> affine (p + displacement(p)).

    Attributes:
        affine_mm: [4, 4] scan mm to atlas mm.
        displacement_mm: [3, X, Y, Z] float32, in mm of the scan.
        grid_mm: [4, 4] diagonal affine of the displacement's grid, in mm of the scan.
    """

    affine_mm: np.ndarray
    displacement_mm: np.ndarray
    grid_mm: np.ndarray

    def points(self, shape: tuple[int, int, int], grid_mm: np.ndarray) -> np.ndarray:
        """[3, X, Y, Z] float32: the atlas point that each voxel of a grid shows. The grid may be oblique."""
        at = _grid_points(shape, grid_mm)
        return _transform(self.affine_mm, at + self.at(at))

    def at(self, points_mm: np.ndarray) -> np.ndarray:
        """[3, ...] float32 displacement at points of the scan; beyond its grid the border's goes on."""
        index = _transform(np.linalg.inv(self.grid_mm), points_mm)
        flat = index.reshape(3, -1)
        found = [ndimage.map_coordinates(d, flat, order=1, mode="nearest") for d in self.displacement_mm]
        return np.stack(found).reshape(points_mm.shape)

    def determinant(self) -> np.ndarray:
        """[X, Y, Z] float32: how much a small volume of the scan grows under the displacement; at most 0 in a fold."""
        spacing = np.diag(self.grid_mm)[:3]
        slopes = [np.gradient(d, *spacing) for d in self.displacement_mm]
        matrix = np.stack([np.stack(s, -1) for s in slopes], -2) + np.eye(3, dtype=np.float32)
        return np.linalg.det(matrix)


def sample(maps: np.ndarray, maps_mm: np.ndarray, points_mm: np.ndarray) -> np.ndarray:
    """[C, ...] float32 values of [C, X, Y, Z] maps at [3, ...] points, linear; 0 beyond them."""
    flat = _transform(np.linalg.inv(maps_mm), points_mm).reshape(3, -1)
    found = [ndimage.map_coordinates(m, flat, order=1, mode="constant") for m in maps]
    return np.stack(found).reshape(len(maps), *points_mm.shape[1:])


def refine(
    warp: Warp,
    densities: np.ndarray,
    maps: np.ndarray,
    maps_mm: np.ndarray,
    steps: int,
    fluid_vox: float,
    elastic_vox: float,
    weight: np.ndarray | None = None,
) -> Warp:
    """Some steps towards the deformation under which the scan is most probable.

    Each step moves along g / (|g|^2 + a), g the gradient of log sum_k L_k(x) pi_k(x), smoothed (fluid), composed with
    the displacement so far, which is smoothed a little in its turn (elastic).

    Args:
        densities: [K, X, Y, Z] likelihoods on the warp's grid.
        maps: [K, ...] prior probabilities of the same classes on the atlas's grid, their sum 1; beyond the grid the
            first class is certain.
        fluid_vox, elastic_vox: standard deviations of the two smoothings.

    Source: the objective is that of Ashburner and Friston 2005, unified segmentation; Differs: demons-like steps
    (Vercauteren et al. 2009) instead of a basis of cosines.
    """
    spacing = np.diag(warp.grid_mm)[:3].astype(np.float32)
    shape = densities.shape[1:]
    index = np.indices(shape, dtype=np.float32)
    at = _grid_points(shape, warp.grid_mm)
    moved = warp.displacement_mm
    others = maps[1:]
    for _ in range(steps):
        prior = sample(others, maps_mm, _transform(warp.affine_mm, at + moved))
        rest = np.maximum(1 - prior.sum(0), 0)
        total = (densities[1:] * prior).sum(0) + densities[0] * rest + 1e-9
        step = np.zeros((3, *shape), dtype=np.float32)
        for density, one in zip(densities[1:], prior):
            # d pi_0 = - sum d pi_k, so class 0 needs no gradient of its own.
            pull = (density - densities[0]) / total
            for axis in range(3):
                step[axis] += pull * _slope(one, axis)
        step /= (step**2).sum(0) + np.float32(0.7)  # in voxels: at most 0.6 long
        if weight is not None:
            step *= weight
        step = np.stack([ndimage.gaussian_filter(s, fluid_vox) for s in step])
        length = np.sqrt((step**2).sum(0))
        step *= np.minimum(1, _FURTHEST_VOX / np.maximum(length, 1e-6))
        inner = (index + step).reshape(3, -1)
        moved = np.stack([
            ndimage.map_coordinates(m, inner, order=1, mode="nearest").reshape(shape) + s * width
            for m, s, width in zip(moved, step, spacing)
        ])  # fmt: skip
        moved = np.stack([ndimage.gaussian_filter(m, elastic_vox, mode="nearest") for m in moved])
    return Warp(warp.affine_mm, moved.astype(np.float32), warp.grid_mm)


def onto_grid(warp: Warp, shape: tuple[int, int, int], grid_mm: np.ndarray) -> Warp:
    """The same warp with its displacement on another grid that is parallel to the axes."""
    return Warp(warp.affine_mm, warp.at(_grid_points(shape, grid_mm)), grid_mm)


def _slope(field: np.ndarray, axis: int) -> np.ndarray:
    """Central differences per voxel."""
    kernel = np.array([-0.5, 0, 0.5], dtype=np.float32)
    return ndimage.correlate1d(field, kernel, axis=axis, mode="nearest")


def _grid_points(shape: tuple[int, ...], grid_mm: np.ndarray) -> np.ndarray:
    return _transform(grid_mm, np.indices(shape, dtype=np.float32))


def _transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    flat = matrix[:3, :3].astype(np.float32) @ points.reshape(3, -1) + matrix[:3, 3:].astype(np.float32)
    return flat.reshape(points.shape)
