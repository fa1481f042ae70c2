"""The mixture: known Gaussians are found again, sums equal naive loops, neighbours mend isolated errors."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.imaging import tissue
from brainfm.imaging.tissue import Mixture

MEANS, SPREADS = (0.3, 0.6, 0.9, 0.8), (0.03, 0.04, 0.03, 0.03)


def mixture(means: tuple[float, ...] = MEANS, spreads: tuple[float, ...] = SPREADS) -> Mixture:
    return Mixture(means, spreads, (0.5, 0.3, 0.2, 0.2), np.full(64, 1 / 1.2), 0.0, 1.2)


def blocks() -> np.ndarray:
    """[12, 12, 15] whole numbers: slabs of class 0 to 4."""
    return np.broadcast_to(np.repeat(np.arange(5), 3), (12, 12, 15))


def one_hot(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels == k for k in range(5)]).astype(np.float32)


@pytest.mark.parametrize("order", [(0.3, 0.6, 0.9, 0.8), (1.0, 0.6, 0.35, 0.5), (0.2, 0.8, 0.6, 0.7)])
def test_em_recovers_gaussians_in_any_order_of_brightness(order: tuple[float, ...]) -> None:
    rng = np.random.default_rng(0)
    labels = blocks()
    image = np.array([0.05, *order])[labels] + rng.normal(0, 0.02, labels.shape)
    prior = 0.8 * one_hot(labels) + 0.04  # the atlas knows, but not for sure
    classes, pure = prior.copy(), np.ones_like(prior[1:])
    near = np.ones(labels.shape, dtype=bool)
    for _ in range(10):
        found = tissue.fit(image.astype(np.float32), classes, pure, 0.0, 1.2, near)
        densities, pure = tissue.likelihood(image.astype(np.float32), found)
        classes = tissue.posterior(densities, prior)
    assert np.allclose(found.means, order, atol=0.02)
    assert np.all(np.array(found.spreads) < 0.05)
    assert (classes.argmax(0) == labels).mean() > 0.97


def test_fit_equals_a_naive_loop() -> None:
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 1.2, (2, 3, 2)).astype(np.float32)
    classes = rng.dirichlet(np.ones(5), values.shape).transpose(3, 0, 1, 2).astype(np.float32)
    pure = rng.uniform(0.3, 0.7, (4, *values.shape)).astype(np.float32)
    found = tissue.fit(values, classes, pure, 0.0, 1.2, np.ones(values.shape, dtype=bool))
    for k in range(4):
        total = first = 0.0
        for place in np.ndindex(values.shape):
            weight = float(classes[k + 1][place] * pure[k][place])
            total, first = total + weight, first + weight * float(values[place])
        assert found.means[k] == pytest.approx(first / total, abs=1e-5)
        second = sum(
            float(classes[k + 1][p] * pure[k][p]) * (float(values[p]) - found.means[k]) ** 2
            for p in np.ndindex(values.shape)
        )
        if k:  # CSF is held to the spread of the others
            assert found.spreads[k] == pytest.approx((second / total) ** 0.5, rel=1e-4)
    assert found.others.sum() * 1.2 / 64 == pytest.approx(1, abs=1e-6)


def test_densities_are_densities() -> None:
    at = np.linspace(0, 1.2, 4001, dtype=np.float32)
    densities, pure = tissue.likelihood(at, mixture())
    assert np.allclose(np.trapezoid(densities, at, axis=1), 1, atol=0.02)
    assert pure.min() >= 0 and pure.max() < 1
    assert pure[0][np.argmin(np.abs(at - 0.3))] > pure[0][np.argmin(np.abs(at - 0.42))]  # towards grey matter: mixed


def test_posterior_equals_bayes_on_one_voxel() -> None:
    densities = np.array([1, 2, 3, 4, 5], dtype=np.float32)[:, None]
    prior = np.array([0.1, 0.2, 0.3, 0.2, 0.2], dtype=np.float32)[:, None]
    support = np.log(np.array([1, 1, 2, 1, 1], dtype=np.float32))[:, None]
    product = np.array([0.1, 0.4, 1.8, 0.8, 1.0])
    assert np.allclose(tissue.posterior(densities, prior, support)[:, 0], product / product.sum(), atol=1e-6)


def test_neighbours_equal_a_naive_loop() -> None:
    rng = np.random.default_rng(2)
    classes = rng.dirichlet(np.ones(5), (3, 4, 2)).transpose(3, 0, 1, 2).astype(np.float32)
    spacing, strength = (1.0, 1.0, 4.0), 1.5
    found = tissue.neighbours(classes, strength, spacing)
    share = 1 / np.array(spacing) / (2 * np.sum(1 / np.array(spacing)))
    for place in np.ndindex(classes.shape[1:]):
        expected = np.zeros(5)
        for axis in range(3):
            for step in (-1, 1):
                other = list(place)
                other[axis] = min(max(other[axis] + step, 0), classes.shape[axis + 1] - 1)
                expected += strength * share[axis] * classes[(slice(None), *other)]
        assert np.allclose(found[(slice(None), *place)], expected, atol=1e-5)


def test_the_random_field_lowers_isolated_errors() -> None:
    rng = np.random.default_rng(3)
    labels = np.where(np.arange(16)[:, None, None] < 8, 2, 3) * np.ones((16, 16, 16), dtype=int)
    image = np.array([0, 0.3, 0.6, 0.8, 0.7])[labels] + rng.normal(0, 0.09, labels.shape)
    prior = np.full((5, *labels.shape), 0.01, dtype=np.float32)
    prior[2:4] = 0.485
    densities, _ = tissue.likelihood(image.astype(np.float32), mixture((0.3, 0.6, 0.8, 0.7), (0.05, 0.09, 0.09, 0.09)))
    alone = tissue.posterior(densities, prior)
    together = alone
    for _ in range(4):
        together = tissue.posterior(densities, prior, tissue.neighbours(together, 2.0, (1.0, 1.0, 1.0)))
    wrong_alone, wrong_together = ((c.argmax(0) != labels).mean() for c in (alone, together))
    assert wrong_alone > 0.05 and wrong_together < 0.5 * wrong_alone


def test_the_bias_field_is_found_and_leaves_the_contrast() -> None:
    rng = np.random.default_rng(4)
    shape = (24, 24, 24)
    labels = rng.integers(1, 4, shape)
    truth = np.exp(0.3 * (np.arange(24) / 23 - 0.5))[:, None, None]
    image = (np.array([0, 0.3, 0.6, 0.9])[labels] * truth).astype(np.float32)
    found = tissue.bias_field(image, one_hot(labels)[1:], mixture(), (4.0, 4.0, 4.0), 16.0)
    error = found / found.mean() * truth.mean() / truth - 1
    assert np.abs(error).max() < 0.06 and np.abs(truth / truth.mean() - 1).max() > 0.14
