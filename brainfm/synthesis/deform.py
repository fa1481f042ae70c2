"""Smooth deformations that cannot fold: what makes one brain differ from another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A displacement by cubic B-splines is one to one where no coefficient exceeds this part of the distance of the knots
# (Choi & Lee, "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", 2000, 3D case).
INJECTIVE = 1 / 2.4794


def _basis(length: int, spacing_mm: float, knots_mm: float) -> np.ndarray:
    """[length, knots] values of the cubic B-splines at the voxels of one axis; every row sums to 1."""
    position = np.arange(length) * spacing_mm / knots_mm
    cell = np.floor(position).astype(int)
    t = position - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    basis = np.zeros((length, cell[-1] + 4), dtype=np.float32)
    for offset in range(4):
        basis[np.arange(length), cell + offset] = weights[offset]
    return basis


def spline_bases(shape: tuple[int, ...], spacing_mm: float, knots_mm: float) -> list[np.ndarray]:
    """For each axis [length, knots] values of the cubic B-splines at its voxels."""
    return [_basis(length, spacing_mm, knots_mm) for length in shape]


def random_coefficients(rng: np.random.Generator, bases: Sequence[np.ndarray]) -> np.ndarray:
    """[kx, ky, kz] float32 normal coefficients (standard deviation 0.4, cut at 1) for these bases."""
    return np.clip(0.4 * rng.standard_normal([b.shape[1] for b in bases], dtype=np.float32), -1, 1)


def spline_field(coefficients: np.ndarray, bases: Sequence[np.ndarray]) -> np.ndarray:
    """[kx, ky, kz] coefficients to the values at the voxels, [X, Y, Z]."""
    for basis in bases:  # each product moves the next axis to the front of the queue; after three the order is restored
        coefficients = np.tensordot(coefficients, basis, axes=(0, 1))
    return coefficients


def random_field(rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: float, knots_mm: float) -> np.ndarray:
    """[X, Y, Z] float32 in [-1, 1]: cubic B-splines with random_coefficients."""
    bases = spline_bases(shape, spacing_mm, knots_mm)
    return spline_field(random_coefficients(rng, bases), bases)


def random_displacement(
    rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: float, knots_mm: float, strength: float
) -> np.ndarray:
    """[3, X, Y, Z] float32 in mm; one to one for a strength below 1, and so is a sum of them with strengths below 1.

    Args:
        rng: where the coefficients come from.
        shape: of the grid.
        spacing_mm: of the grid.
        knots_mm: distance of the knots; larger is smoother and moves further.
        strength: largest coefficient as a part of what could fold.
    """
    largest_mm = strength * INJECTIVE * knots_mm
    return largest_mm * np.stack([random_field(rng, shape, spacing_mm, knots_mm) for _ in range(3)])


def random_affine(rng: np.random.Generator, scale: float) -> np.ndarray:
    """[3, 3] turn (some degrees), stretch (some per cent an axis) and global scale of a head about its centre."""
    turn_x, turn_y, turn_z = np.deg2rad(np.clip(rng.normal(0, [4, 2.5, 3]), -8, 8))
    about_x = [[1, 0, 0], [0, np.cos(turn_x), -np.sin(turn_x)], [0, np.sin(turn_x), np.cos(turn_x)]]
    about_y = [[np.cos(turn_y), 0, np.sin(turn_y)], [0, 1, 0], [-np.sin(turn_y), 0, np.cos(turn_y)]]
    about_z = [[np.cos(turn_z), -np.sin(turn_z), 0], [np.sin(turn_z), np.cos(turn_z), 0], [0, 0, 1]]
    stretch = np.diag(scale * np.clip(rng.normal(1, 0.025, 3), 0.94, 1.06))
    return np.array(about_x) @ np.array(about_y) @ np.array(about_z) @ stretch


def jacobian(coordinates_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """[X, Y, Z] local change of volume of a map given as [3, X, Y, Z] coordinates; above 0 where it does not fold."""
    gradient = np.stack([np.stack(np.gradient(c, spacing_mm)) for c in coordinates_mm])
    return np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)))
