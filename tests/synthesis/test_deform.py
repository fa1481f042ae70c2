"""Random fields are smooth, and maps made of them do not fold."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm import seeds
from brainfm.synthesis.deform import jacobian, random_affine, random_displacement, random_field

SHAPE = (30, 34, 28)


def test_a_field_stays_in_its_range_and_is_the_same_again() -> None:
    field = random_field(seeds.stream(0, "test"), SHAPE, 2.0, 12.0)
    assert field.shape == SHAPE and field.dtype == np.float32
    assert np.abs(field).max() <= 1 and field.std() > 0.1
    assert np.array_equal(field, random_field(seeds.stream(0, "test"), SHAPE, 2.0, 12.0))


def test_a_field_is_smooth_over_the_distance_of_its_knots() -> None:
    field = random_field(seeds.stream(1, "test"), SHAPE, 1.0, 20.0)
    assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 2 / 20 * 1.5


@pytest.mark.parametrize("seed", range(4))
def test_summed_displacements_below_strength_one_do_not_fold(seed: int) -> None:
    rng = seeds.stream(seed, "fold")
    points = np.stack(np.meshgrid(*(2.0 * np.arange(n) for n in SHAPE), indexing="ij"))
    points += random_displacement(rng, SHAPE, 2.0, 24, 0.55) + random_displacement(rng, SHAPE, 2.0, 10, 0.44)
    assert jacobian(points, 2.0).min() > 0


def test_the_jacobian_of_a_stretch_is_its_volume() -> None:
    points = np.stack(np.meshgrid(*(np.arange(6.0) for _ in range(3)), indexing="ij"))
    assert np.allclose(jacobian(points * np.array([2.0, 3.0, 0.5])[:, None, None, None], 1.0), 3.0)


def test_an_affine_keeps_handedness_and_size() -> None:
    for index in range(20):
        assert 0.8 < np.linalg.det(random_affine(seeds.stream(0, "affine", index), 1.0)) < 1.25
