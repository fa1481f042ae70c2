"""Resampling against functions whose values are known everywhere, and against other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage

from brainfm.imaging import geometry
from brainfm.volume import Volume
from tests.phantoms import centred, rotation, world_mm

SHAPE = (30, 34, 26)
GRIDS = {
    "finer": ((60, 68, 52), (1, 1, 1)),
    "coarser": ((14, 16, 12), (4.2, 4.2, 4.2)),
    "mixed": ((80, 20, 24), (0.7, 3.3, 2)),
    "barely coarser": ((26, 30, 22), (2.2, 2.3, 2.3)),
}


def ramp(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return (world_mm(shape, affine) @ np.array([1.0, -2.0, 0.5]) + 3).astype(np.float32)


def smooth(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    x, y, z = np.moveaxis(world_mm(shape, affine), -1, 0)
    return (np.sin(x / 9) + np.cos(y / 11) * np.sin(z / 13)).astype(np.float32)


def depth_vox(
    shape: tuple[int, ...], affine: np.ndarray, source_shape: tuple[int, ...], source: np.ndarray
) -> np.ndarray:
    """How far each target centre lies within the outermost source centres, in source voxels."""
    index = (world_mm(shape, affine) - source[:3, 3]) @ np.linalg.inv(source[:3, :3]).T
    return np.minimum(index, np.array(source_shape) - 1 - index).min(axis=-1)


@pytest.fixture
def source() -> np.ndarray:
    return centred(np.eye(3), (2, 2, 2), SHAPE)


@pytest.mark.parametrize("order", ["cubic", "linear"])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("memory", ["C", "F"])
def test_ramps_stay_ramps(order: str, name: str, memory: str, source: np.ndarray) -> None:
    shape, spacing = GRIDS[name]
    target = centred(np.eye(3), spacing, shape)
    target[:3, 3] += (0.3, -0.4, 0.2)
    array = np.array(ramp(SHAPE, source), order=memory)
    got = geometry.resample(array, source, shape, target, order=order, fill=0)
    inside = depth_vox(shape, target, SHAPE, source) > 2 * 2 * max(1, max(spacing) / 2)
    assert inside.sum() > 100 and got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got[inside], ramp(shape, target)[inside], atol=2e-4)


def test_a_smooth_image_keeps_its_values(source: np.ndarray) -> None:
    shape, spacing = GRIDS["finer"]
    target = centred(np.eye(3), spacing, shape)
    truth = smooth(shape, target)  # peaks between voxels are cut off, since no value leaves the range of the source
    inside = (depth_vox(shape, target, SHAPE, source) > 1) & (np.abs(truth) < 0.98 * np.abs(truth).max())
    for order, limit in (("cubic", 1e-3), ("linear", 1.2e-2)):
        got = geometry.resample(smooth(SHAPE, source), source, shape, target, order=order, fill=0)
        assert np.abs(got - truth)[inside].max() < limit


@pytest.mark.parametrize("order", ["cubic", "linear", "nearest"])
def test_a_constant_stays_constant_up_to_the_edge_and_the_rest_is_filled(order: str, source: np.ndarray) -> None:
    for shape, spacing in GRIDS.values():
        for turn in (np.eye(3), rotation(10, 20)):
            target = centred(turn, spacing, shape)
            got = geometry.resample(np.full(SHAPE, 5, np.float32), source, shape, target, order=order, fill=-1)
            depth = depth_vox(shape, target, SHAPE, source)
            np.testing.assert_allclose(got[depth > -0.49], 5, atol=1e-5)
            assert (got[depth < -0.51] == -1).all()


@pytest.mark.parametrize("order", ["cubic", "linear", "nearest"])
@pytest.mark.parametrize("jitter", [0.0, 4e-4])
def test_the_same_lattice_is_bit_identical(order: str, jitter: float, source: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal(SHAPE).astype(np.float32)
    target = geometry.cropped_affine(source, (3, -2, 5))  # cut on one side, padded on another
    target[:3, 3] += jitter
    got = geometry.resample(array, source, (20, 40, 40), target, order=order, fill=7)
    expected = np.full((20, 40, 40), 7, np.float32)
    expected[:, 2:36, :21] = array[3:23, :, 5:]
    np.testing.assert_array_equal(got, expected)
    got[:] = 0
    assert array.any(), "the result shares no memory with the source"


def test_turned_axes_are_permuted_exactly(source: np.ndarray) -> None:
    array = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    turned = np.zeros((4, 4))  # target axes x, y, z run along source axes z, -x, y
    turned[[2, 0, 1, 3], [0, 1, 2, 3]] = 1, -1, 1, 1
    turned[0, 3] = SHAPE[0] - 1
    got = geometry.resample(array, source, (26, 30, 34), source @ turned, order="cubic", fill=0)
    np.testing.assert_array_equal(got, array.transpose(2, 0, 1)[:, ::-1])


def test_fine_detail_is_averaged_not_aliased(source: np.ndarray) -> None:
    stripes = np.zeros(SHAPE, np.float32)
    stripes[::2] = 1
    shape = (10, 11, 8)
    target = centred(np.eye(3), (6, 6, 6), shape)
    for order in ("cubic", "linear"):
        got = geometry.resample(stripes, source, shape, target, order=order, fill=0)
        assert np.abs(got[2:-2] - 0.5).max() < 0.06
    oblique = centred(rotation(5, 8), (6, 6, 6), shape)
    got = geometry.resample(stripes, source, shape, oblique, order="cubic", fill=0.5)
    assert np.abs(got[3:-3, 3:-3, 3:-3] - 0.5).max() < 0.06


def test_cubic_stays_within_the_range_of_the_source(source: np.ndarray) -> None:
    step = np.zeros(SHAPE, np.float32)
    step[15:] = 1
    for turn in (np.eye(3), rotation(10, 20)):
        target = centred(turn, (1, 1, 1), (50, 50, 50))
        got = geometry.resample(step, source, (50, 50, 50), target, order="cubic", fill=0)
        assert got.min() == 0 and got.max() == 1


def test_oblique_agrees_with_the_truth_scipy_and_simpleitk() -> None:
    source = centred(rotation(12, 7), (1, 1.1, 2), (60, 60, 34))
    array = smooth((60, 60, 34), source)
    target, shape = centred(np.eye(3), (1, 1, 1), (40, 44, 48)), (40, 44, 48)
    deep = depth_vox(shape, target, (60, 60, 34), source) > 3
    assert deep.mean() > 0.5
    got = geometry.resample(array, source, shape, target, order="cubic", fill=0)
    assert np.abs(got - smooth(shape, target))[deep].max() < 2e-3
    transform = np.linalg.inv(source) @ target
    linear = geometry.resample(array, source, shape, target, order="linear", fill=0)
    expected = scipy.ndimage.affine_transform(array, transform[:3, :3], transform[:3, 3], shape, order=1)
    np.testing.assert_allclose(linear[deep], expected[deep], atol=2e-3)

    sitk = pytest.importorskip("SimpleITK")

    def image(values: np.ndarray, affine: np.ndarray) -> object:
        made = sitk.GetImageFromArray(np.ascontiguousarray(values.T))
        lps = np.diag([-1, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        made.SetSpacing(spacing.tolist())
        made.SetOrigin(lps[:3, 3].tolist())
        made.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        return made

    reference = image(np.zeros(shape, np.float32), target)
    moved = sitk.Resample(image(array, source), reference, sitk.Transform(), sitk.sitkBSpline, 0.0)
    np.testing.assert_allclose(got[deep], sitk.GetArrayFromImage(moved).T[deep], atol=2e-3)


# ---- labels ----------------------------------------------------------------------------------------------------------


def blobs(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    where = world_mm(shape, affine)
    labels = np.zeros(shape, np.uint8)
    for value, centre, radius in ((1, (-10, 0, 0), 9), (2, (9, 8, 4), 7), (200, (6, -14, -6), 8)):
        labels[np.linalg.norm(where - centre, axis=-1) < radius] = value
    return labels


@pytest.mark.parametrize("how", ["nearest", "linear"])
@pytest.mark.parametrize("turn", [(0, 0), (9, 15)])
def test_labels_survive_the_round_trip(how: str, turn: tuple[int, int]) -> None:
    coarse, fine = centred(np.eye(3), (2, 2, 2), SHAPE), centred(rotation(*turn), (1, 1, 1), (70, 74, 64))
    labels = blobs(SHAPE, coarse)
    there = geometry.resample_labels(labels, coarse, (70, 74, 64), fine, how=how)
    back = geometry.resample_labels(there, fine, SHAPE, coarse, how=how)
    truth = blobs((70, 74, 64), fine)
    assert there.dtype == back.dtype == np.uint8
    assert set(np.unique(there)) == set(np.unique(back)) == {0, 1, 2, 200}
    for value in (1, 2, 200):
        assert 2 * ((back == value) & (labels == value)).sum() / ((back == value).sum() + (labels == value).sum()) > 0.9
        share = 2 * ((there == value) & (truth == value)).sum() / ((there == value).sum() + (truth == value).sum())
        assert share > (0.9 if how == "linear" else 0.87)
        np.testing.assert_allclose(
            world_mm((70, 74, 64), fine)[there == value].mean(axis=0),
            world_mm(SHAPE, coarse)[labels == value].mean(axis=0),
            atol=0.3,
        )


def test_linear_labels_agree_with_all_classes_at_once(source: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 5, (8, 9, 7))
    labels = np.kron(coarse, np.ones((4, 4, 4), int))[:30, :34, :26].astype(np.uint16) * 100
    shape, spacing = GRIDS["mixed"]
    target = centred(np.eye(3), spacing, shape)
    shares = np.stack(
        [
            geometry.resample(
                (labels == v).astype(np.float32), source, shape, target, order="linear", fill=float(v == 0)
            )
            for v in range(0, 500, 100)
        ]
    )
    clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-3
    got = geometry.resample_labels(labels, source, shape, target, how="linear")
    assert clear.mean() > 0.8
    np.testing.assert_array_equal(got[clear], shares.argmax(axis=0)[clear] * 100)


def test_an_empty_label_map_stays_empty(source: np.ndarray) -> None:
    shape, spacing = GRIDS["finer"]
    target = centred(np.eye(3), spacing, shape)
    assert not geometry.resample_labels(np.zeros(SHAPE, np.uint8), source, shape, target, how="linear").any()


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_a_session_grid_keeps_the_reference_and_holds_everybody() -> None:
    reference = centred(rotation(5, 3), (1, 1, 1), (40, 44, 36))
    slab = centred(rotation(10, -4), (0.7, 0.7, 4), (60, 64, 12))
    slab[:3, 3] += (6, 3, 5)
    volumes = {
        "t1": Volume(np.zeros((40, 44, 36), np.float32), reference),
        "t2": Volume(np.zeros((60, 64, 12), np.float32), slab),
    }
    lattice = geometry.lattice(reference, (1, 1, 1))
    shape, affine, begin = geometry.session_grid(volumes, lattice)
    np.testing.assert_allclose(geometry.cropped_affine(lattice, begin), affine)
    np.testing.assert_allclose(affine[:3, :3], reference[:3, :3])
    offset = np.linalg.solve(affine[:3, :3], reference[:3, 3] - affine[:3, 3])
    np.testing.assert_allclose(offset, np.rint(offset), atol=1e-9)
    for volume in volumes.values():
        low, high = geometry.box_between(np.zeros(3), np.array(volume.shape), volume.affine_mm, affine)
        assert (low >= -0.51).all() and (high <= np.array(shape) - 0.49).all()
    alone, _, begin = geometry.session_grid({"t1": volumes["t1"]}, lattice)
    assert alone == (40, 44, 36) and begin == (0, 0, 0)
    coarse, _, _ = geometry.session_grid({"t1": volumes["t1"]}, geometry.lattice(reference, (2, 4, 8)))
    assert coarse == (20, 11, 5)


def test_the_extent_of_a_mask_is_that_of_its_voxels_corners() -> None:
    rng = np.random.default_rng(0)
    affine, other = centred(rotation(12, 30), (1, 2, 3), (12, 14, 10)), centred(np.eye(3), (1.5, 1, 2), (30, 30, 30))
    for order in ("C", "F"):
        mask = np.array(rng.random((12, 14, 10)) < 0.02, order=order)
        boxes = [geometry.box_between(voxel, voxel + 1, affine, other) for voxel in np.argwhere(mask)]
        low, high = geometry.extent_between(mask, affine, other)
        np.testing.assert_allclose(low, np.min([box[0] for box in boxes], axis=0))
        np.testing.assert_allclose(high, np.max([box[1] for box in boxes], axis=0))


@pytest.mark.parametrize("step", [0.25, 0.5, 1.0])
def test_smaller_voxels_whose_centres_meet_larger_ones_are_interpolated(step: float) -> None:
    """Some target voxels lie exactly on a source voxel, the others between two: none of them is undefined."""
    array = np.arange(24, dtype=np.float32).reshape(6, 4, 1) ** 2
    target = np.diag([step, 1, 1, 1.0])
    count = round(5 / step) + 1
    for shift in (0.0, step / 2):
        target[1, 3] = shift
        found = geometry.resample(array, np.eye(4), (count, 3, 1), target, order="linear", fill=-1)
        x, y = np.meshgrid(np.arange(count) * step, np.arange(3) + shift, indexing="ij")
        expected = scipy.ndimage.map_coordinates(array[..., 0], [x, y], order=1)
        np.testing.assert_allclose(found[..., 0], expected, rtol=1e-5)
