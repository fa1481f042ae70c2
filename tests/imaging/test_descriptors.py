"""Descriptors: against known shapes and naive loops, and blind to what they must not see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import descriptors
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.preprocess import Recipe

SPACING = (2.0, 1.0, 3.0)


def box(shape=(20, 24, 16), start=(3, 4, 5), stop=(13, 20, 11)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(start, stop))] = True
    return mask


def scan(head: np.ndarray, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(head, rng.normal(0, 1, head.shape), -4 + rng.random(head.shape) * 0.1).astype(np.float32)


def test_a_box_has_the_volume_and_extents_of_a_box() -> None:
    found = descriptors.shape_descriptors(box(), SPACING)
    assert found["volume_ml"] == pytest.approx(20 * 16 * 18 / 1000)
    assert (found["extent_x_mm"], found["extent_y_mm"], found["extent_z_mm"]) == (20, 16, 18)
    assert found["filled"] == 1 and found["asymmetry"] == 0
    uniform = sorted(s * np.sqrt((n * n - 1) / 12) for s, n in zip(SPACING, (10, 16, 6)))
    assert [found[f"spread{i}_mm"] for i in range(3)] == pytest.approx(uniform)
    assert [found[f"block{i}"] for i in range(512)] == pytest.approx([1.0] * 512)


def test_shape_does_not_depend_on_the_place() -> None:
    rng = np.random.default_rng(1)
    part = rng.random((9, 11, 7)) < 0.6
    one, other = (np.zeros((20, 20, 20), bool) for _ in range(2))
    one[1:10, 2:13, 3:10] = part
    other[8:17, 5:16, 12:19] = part
    first, second = (descriptors.shape_descriptors(m, SPACING) for m in (one, other))
    assert first == pytest.approx(second)


def test_silhouette_is_the_share_of_each_block() -> None:
    rng = np.random.default_rng(2)
    mask = rng.random((16, 24, 8)) < 0.5
    mask[0, 0, 0] = mask[-1, -1, -1] = True
    found = descriptors.shape_descriptors(mask, SPACING)
    for i, (x, y, z) in enumerate(np.ndindex(8, 8, 8)):
        assert found[f"block{i}"] == pytest.approx(mask[2 * x : 2 * x + 2, 3 * y : 3 * y + 3, z].mean())


def test_otsu_finds_three_levels_and_agrees_with_a_naive_search() -> None:
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(m, 0.1, n) for m, n in ((0, 300), (2, 500), (5, 200))])
    low, high = descriptors.otsu_thresholds(values)
    assert 0.3 < low < 1.7 and 2.3 < high < 4.7
    assert np.bincount(np.digitize(values, (low, high))).tolist() == [300, 500, 200]
    rough = rng.gamma(2, 1, 400)
    a, b = np.percentile(rough, (0.5, 99.5))
    counts, edges = np.histogram(np.clip(rough, a, b), 64, (a, b))
    centres = (edges[:-1] + edges[1:]) / 2
    best, chosen = -1.0, (0, 0)
    for i in range(1, 63):
        for j in range(i + 1, 64):
            total = 0.0
            for part in (slice(0, i), slice(i, j), slice(j, 64)):
                n = counts[part].sum()
                total += (counts[part] * centres[part]).sum() ** 2 / n if n else 0.0
            if total > best + 1e-9:
                best, chosen = total, (i, j)
    assert descriptors.otsu_thresholds(rough) == pytest.approx((edges[chosen[0]], edges[chosen[1]]))
    assert descriptors.otsu_thresholds(np.full(9, 2.0)) == (2.0, 2.0)


def test_intensities_are_those_inside_the_head_alone() -> None:
    head = box()
    voxels = scan(head)
    found = descriptors.intensity_descriptors(voxels, head, SPACING)
    inside = voxels[head].astype(np.float64)
    z = (inside - inside.mean()) / inside.std()
    assert found["p50"] == pytest.approx(np.median(inside))
    assert (found["skew"], found["kurtosis"]) == pytest.approx(((z**3).mean(), (z**4).mean()))
    assert sum(found[f"bin{i}"] for i in range(10)) == pytest.approx(1)
    assert found["dark_ml"] + found["middle_ml"] + found["bright_ml"] == pytest.approx(head.sum() * 6 / 1000)
    other = np.where(head, voxels, 99).astype(np.float32)
    assert descriptors.intensity_descriptors(other, head, SPACING) == found


def test_a_mirrored_head_is_as_asymmetric_and_a_symmetric_one_not_at_all() -> None:
    head = box()
    voxels = scan(head)
    found = descriptors.intensity_descriptors(voxels, head, SPACING)["asymmetry"]
    mirrored = descriptors.intensity_descriptors(voxels[::-1], head[::-1], SPACING)["asymmetry"]
    assert found == pytest.approx(mirrored) and found > 0.5
    symmetric = voxels.copy()
    symmetric[3:8] = voxels[8:13][::-1]
    assert descriptors.intensity_descriptors(symmetric, head, SPACING)["asymmetry"] == 0


def test_background_is_blind_to_the_head() -> None:
    head = box()
    voxels = scan(head)
    found = descriptors.background_descriptors(voxels, head)
    changed = np.where(head, 7, voxels).astype(np.float32)
    assert descriptors.background_descriptors(changed, head) == found
    assert found["std"] == pytest.approx(voxels[~head].astype(np.float64).std())
    assert found["face_x0"] == pytest.approx(voxels[0].mean(), abs=1e-5)
    noisier = np.where(head, voxels, voxels + np.random.default_rng(4).normal(0, 1, head.shape)).astype(np.float32)
    assert descriptors.background_descriptors(noisier, head)["std"] > 2 * found["std"]
    full = descriptors.background_descriptors(voxels, np.ones_like(head))
    assert full["empty"] == 1 and set(full) == set(found)


def recipe(shift_mm=(0.0, 0.0, 0.0), moved=None, start=(0, 0, 0)) -> Recipe:
    """A file whose first axis runs from front to back, prepared on RAS voxels of 2 mm from ``start`` on."""
    file_affine = np.array([[0, 0, 2, -30], [-2, 0, 0, 40], [0, 2, 0, -20], [0, 0, 0, 1.0]])
    file_affine[:3, 3] += shift_mm
    grid = FileGrid((40, 30, 32), tuple(map(tuple, file_affine)), ((1, -1), (2, 1), (0, 1)))
    prepared = grid.ras_affine().copy()
    prepared[:3, 3] += prepared[:3, :3] @ np.array(start)
    if moved is not None:
        prepared = moved @ prepared
    rows = tuple(map(tuple, prepared))
    return Recipe("s", grid, grid.ras_shape(), rows, start, (9, 9, 9), (9, 9, 9), rows, None,
                  None if moved is None else tuple(map(tuple, moved)))  # fmt: skip


def test_position_is_the_share_of_the_file_whatever_was_cropped_or_moved() -> None:
    head = box((32, 40, 30), (8, 10, 5), (24, 20, 25))
    plain = descriptors.position_descriptors(recipe(), head)
    assert (plain["centre_x"], plain["centre_y"], plain["centre_z"]) == pytest.approx((0.5, 0.375, 0.5))
    assert (plain["start_x"], plain["stop_x"]) == pytest.approx((8.5 / 32, 23.5 / 32))
    cropped = descriptors.position_descriptors(recipe(start=(5, 6, 4)), head[5:, 6:, 4:])
    assert cropped == pytest.approx(plain)
    angle = np.deg2rad(8)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0, 4], [np.sin(angle), np.cos(angle), 0, -3], [0, 0, 1, 2],
                     [0, 0, 0, 1.0]])  # fmt: skip
    assert descriptors.position_descriptors(recipe(moved=turn), head) == pytest.approx(plain)
    shifted = descriptors.position_descriptors(recipe(shift_mm=(5, 0, 0)), head)
    assert shifted["centre_x"] == pytest.approx(plain["centre_x"])
    assert shifted["head_x_mm"] == pytest.approx(plain["head_x_mm"] + 5)


def test_grid_tells_voxel_size_and_order_of_axes() -> None:
    found = descriptors.grid_descriptors(recipe().file)
    assert found["voxel_x_mm"] == 2 and (found["shape_x"], found["shape_y"], found["shape_z"]) == (32, 40, 30)
    assert found["view_y_mm"] == 80
    assert (found["axis0_y"], found["axis1_z"], found["axis2_x"], found["axis0_x"]) == (-1, 1, 1, 0)
    turned = dataclasses.replace(recipe().file, orientation=((1, 1), (2, 1), (0, 1)))
    assert descriptors.grid_descriptors(turned)["axis0_y"] == 1


def test_head_is_the_union_without_specks_or_holes() -> None:
    one, other = box(), box(start=(10, 4, 5), stop=(17, 20, 11))
    scans = {"t1": np.where(one, 5.0, 0.0), "t2": np.where(other, 5.0, 0.0)}
    scans["t1"][7, 10, 8] = 0  # a hole
    scans["t1"][0, 0, 0] = 5  # a speck
    assert (descriptors.head_mask(scans) == (one | other)).all()
    flat = descriptors.head_mask({"t1": scans["t1"], "t2": np.zeros_like(scans["t1"])})
    assert (flat == one).all()
    with pytest.raises(ScanError, match="the value 0"):
        descriptors.head_mask({"t2": np.zeros((8, 8, 8))})
    with pytest.raises(ValueError, match="at least one scan"):
        descriptors.head_mask({})
