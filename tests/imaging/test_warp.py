"""Bending the atlas: it finds a known shift, does not fold, and moves the right way on any grid."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from brainfm.imaging import warp
from brainfm.imaging.warp import Warp

GRID = np.diag([2.0, 2.0, 2.0, 1.0])


def ball(centre: tuple[float, float, float], radius: float = 7.0) -> np.ndarray:
    """[2, 28, 28, 28] maps: outside and inside of a soft ball, in voxels."""
    index = np.indices((28, 28, 28), dtype=np.float32)
    distance = np.sqrt(sum((i - c) ** 2 for i, c in zip(index, centre)))
    inside = 1 / (1 + np.exp(distance - radius))
    return np.stack([1 - inside, inside]).astype(np.float32)


def still() -> Warp:
    return Warp(np.eye(4), np.zeros((3, 28, 28, 28), np.float32), GRID)


def test_a_shift_along_one_axis_is_found_with_its_sign() -> None:
    maps, seen = ball((14, 14, 14)), ball((16.5, 14, 14))
    found = warp.refine(still(), 0.02 + seen**4, maps, GRID, 30, 1.5, 0.5)
    moved = warp.sample(maps, GRID, found.points((28, 28, 28), GRID))[1]
    overlap = [np.minimum(m, seen[1]).sum() / np.maximum(m, seen[1]).sum() for m in (maps[1], moved)]
    assert overlap[0] < 0.65 < 0.75 < overlap[1]
    assert found.displacement_mm[0][16, 14, 14] < -1  # a voxel of the scan shows an atlas point further left
    assert found.determinant().min() > 0


def test_the_right_place_stays() -> None:
    maps = ball((14, 14, 14))
    found = warp.refine(still(), 0.02 + maps**4, maps, GRID, 10, 1.5, 0.5)
    assert np.abs(found.displacement_mm).mean() < 0.3


def test_points_are_affine_after_displacement_on_an_oblique_grid() -> None:
    affine = np.array([[1.1, 0, 0, 3], [0, 0.9, 0.1, -2], [0, 0, 1, 5], [0, 0, 0, 1.0]])
    displacement = np.zeros((3, 28, 28, 28), np.float32)
    displacement[1] = 2.5
    tilted = GRID.copy()
    tilted[:3, :3] = [[1.9, 0.3, 0], [-0.3, 1.9, 0], [0, 0, 2]]
    found = Warp(affine, displacement, GRID).points((5, 6, 7), tilted)
    at = tilted @ [2, 3, 4, 1] + [0, 2.5, 0, 0]
    assert np.allclose(found[:, 2, 3, 4], (affine @ at)[:3], atol=1e-4)


def test_the_determinant_tells_growth_and_folds() -> None:
    index = np.indices((28, 28, 28), dtype=np.float32) * 2
    grown = Warp(np.eye(4), 0.1 * index, GRID).determinant()
    assert np.allclose(grown, 1.1**3, atol=1e-3)
    assert (Warp(np.eye(4), -1.5 * index, GRID).determinant() < 0).all()


def test_carried_to_another_grid_it_says_the_same() -> None:
    rng = np.random.default_rng(0)
    smooth = np.stack([ndimage.gaussian_filter(rng.normal(0, 30, (28, 28, 28)), 4) for _ in range(3)])
    one = Warp(np.eye(4), smooth.astype(np.float32), GRID)
    other = np.diag([3.0, 3.0, 3.0, 1.0])
    other[:3, 3] = 1
    two = warp.onto_grid(one, (18, 18, 18), other)
    points = rng.uniform(6, 48, (3, 200)).astype(np.float32)
    assert np.abs(one.at(points) - two.at(points)).max() < 0.2 * np.abs(one.at(points)).max()
