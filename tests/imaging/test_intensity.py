"""The foreground of stripped and of whole heads, and standardised intensities."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import intensity
from brainfm.imaging.intensity import Stats
from brainfm.volume import Volume
from tests.phantoms import centred, head, world_mm

SHAPE = (56, 60, 52)
AFFINE = centred(np.eye(3), (2, 2, 2), SHAPE)


def inside_head() -> np.ndarray:
    return np.square(world_mm(SHAPE, AFFINE) / (34, 40, 32)).sum(axis=-1) < 1


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("background", [0.0, -1000.0])
@pytest.mark.parametrize("memory", ["C", "F"])
def test_a_stripped_brain_is_what_differs_from_the_padding(
    background: float, memory: str, rng: np.random.Generator
) -> None:
    voxels = head(SHAPE, AFFINE, rng)
    truth = inside_head()
    voxels[28:31, 28:31, 24:28] = 2  # dark fluid belongs to the brain
    voxels[~truth] = background
    got = intensity.foreground(Volume(np.array(voxels, order=memory), AFFINE))
    np.testing.assert_array_equal(got, truth)


@pytest.mark.parametrize("padded", [0, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_whole_head_leaves_the_noise_of_the_air_out(padded: int, dtype: type, rng: np.random.Generator) -> None:
    truth = inside_head()
    voxels = head(SHAPE, AFFINE, rng) * 5 + np.abs(rng.normal(0, 12, SHAPE))
    voxels[2:4, 2:4, 2:4] = 400  # a speck in the air
    if padded:
        voxels[:padded] = 0
        voxels[-padded:] = 0
        voxels[:, :padded] = 0
        voxels[:, -padded:] = 0
        voxels[:, :, :padded] = 0
        voxels[:, :, -padded:] = 0
        truth[:padded] = False
    for order in ("C", "F"):
        got = intensity.foreground(Volume(np.array(voxels, dtype=dtype, order=order), AFFINE))
        share = 2 * (got & truth).sum() / (got.sum() + truth.sum())
        assert share > 0.97
        assert not got[2:4, 2:4, 2:4].any()
        assert got.flags.c_contiguous == (order == "C")


def test_a_crop_full_of_tissue_is_nearly_all_foreground(rng: np.random.Generator) -> None:
    voxels = (200 + 40 * rng.standard_normal((20, 24, 22))).astype(np.float32)
    assert intensity.foreground(Volume(voxels, np.eye(4))).mean() > 0.9


def test_standardised_foreground_has_zero_mean_and_unit_deviation(rng: np.random.Generator) -> None:
    voxels = head(SHAPE, AFFINE, rng, noise=20)
    before, mask = voxels.copy(), inside_head()
    got, stats = intensity.standardise(voxels, mask, (0.5, 99.5))
    np.testing.assert_array_equal(voxels, before)
    assert got.dtype == np.float32
    assert abs(got[mask].mean()) < 1e-4 and abs(got[mask].std() - 1) < 1e-4
    np.testing.assert_allclose([stats.low, stats.high], np.percentile(voxels[mask], (0.5, 99.5)), rtol=1e-5)
    np.testing.assert_allclose(got, (np.clip(voxels, stats.low, stats.high) - stats.mean) / stats.std, atol=1e-5)
    np.testing.assert_allclose(got[~mask], got.min(), atol=1e-6)
    assert Stats.from_dict(stats.to_dict()) == stats


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int8])
def test_counting_and_sorting_give_the_same_statistics(dtype: type, rng: np.random.Generator) -> None:
    limits = np.iinfo(dtype)
    voxels = np.clip(rng.normal(100, 60, (30, 31, 32)), limits.min, limits.max).astype(dtype)[::-1, ::-1]
    voxels[0, 0, 0], voxels[0, 0, 1] = limits.min, limits.max
    mask = rng.random(voxels.shape) < 0.7
    for percentiles in ((0.5, 99.5), (0, 100), (3.3, 61.7)):
        counted = intensity.statistics(voxels, mask, percentiles)
        sorted_ = intensity.statistics(voxels.astype(np.float64), mask, percentiles)
        for name, value in counted.to_dict().items():
            assert value == pytest.approx(sorted_.to_dict()[name], rel=1e-5)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_scan_is_refused(value: float) -> None:
    with pytest.raises(ScanError, match=f"all voxels have the value {value:g}"):
        intensity.foreground(Volume(np.full((5, 6, 7), value, np.float32), np.eye(4)))
    with pytest.raises(ScanError, match="no foreground"):
        intensity.statistics(np.zeros((3, 3, 3)), np.zeros((3, 3, 3), bool), (0.5, 99.5))
    with pytest.raises(ScanError, match=f"has the value {value:g}"):
        intensity.statistics(np.full((3, 3, 3), value), np.ones((3, 3, 3), bool), (0.5, 99.5))
