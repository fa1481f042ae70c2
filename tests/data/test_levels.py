import time

import numpy as np
import pytest

from brainfm.data.levels import coarse_image, coarse_labels, coarse_shape, kept_levels

SHAPES = [(8, 8, 8), (9, 14, 7), (1, 2, 3), (6, 5, 4), (16, 17, 18)]


def cells(voxels: np.ndarray, level: int):
    """Each voxel of a level and those it covers, beyond the end the last ones again."""
    edge = 2**level
    for place in np.ndindex(*(-(-n // edge) for n in voxels.shape)):
        grid = np.meshgrid(*(np.arange(p * edge, p * edge + edge) for p in place), indexing="ij")
        yield place, voxels[tuple(np.minimum(g, n - 1) for g, n in zip(grid, voxels.shape))].ravel()


def most_frequent(values: np.ndarray) -> int:
    found = [(-(values == v).sum(), v == 0, v != values[0], v) for v in set(values.tolist())]
    return min(found)[-1]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_means_and_labels_most_frequent(shape, level):
    rng = np.random.default_rng(0)
    image = (rng.integers(-300, 300, shape) / 128).astype(np.float16)
    labels = rng.integers(0, 4, shape).astype(np.uint16) * 300  # few values: ties are common
    means, modes = coarse_image(image, level), coarse_labels(labels, level)
    assert means.shape == modes.shape == coarse_shape(shape, level)
    assert means.dtype == np.float32 and modes.dtype == np.uint16
    for place, values in cells(image, level):
        assert means[place] == values.astype(np.float64).mean()  # exact: the values are multiples of 2^-7
    for place, values in cells(labels, level):
        assert modes[place] == most_frequent(values)


def test_large_maps_are_done_in_parts(monkeypatch):
    labels = np.random.default_rng(1).integers(0, 3, (12, 10, 9)).astype(np.uint8)
    want = coarse_labels(labels, 1)
    monkeypatch.setattr("brainfm.data.levels._AT_ONCE", 24)
    np.testing.assert_array_equal(coarse_labels(labels, 1), want)


def test_level_2_of_labels_is_not_the_most_frequent_of_level_1():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[:2] = 1  # half of all, and all of four cells
    labels[0, 0, 0] = 0  # 31 of 1, 33 of 0
    assert coarse_labels(labels, 2).item() == 0
    assert coarse_labels(coarse_labels(labels, 1), 1).item() == 1


@pytest.mark.parametrize(
    "values, want",
    [
        ([0, 0, 0, 0, 7, 7, 7, 7], 7),  # not the background
        ([9, 9, 9, 9, 7, 7, 7, 7], 9),  # the first voxel's
        ([7, 7, 7, 7, 9, 9, 9, 9], 7),
        ([0, 0, 9, 9, 9, 7, 7, 7], 7),  # the first voxel's is not among them: the smallest
        ([0, 0, 0, 1, 1, 7, 9, 8], 0),  # no tie
    ],
)
def test_ties(values, want):
    assert coarse_labels(np.array(values, np.uint8).reshape(2, 2, 2), 1).item() == want


def test_ties_favour_neither_small_ids_nor_a_side():
    """Two structures meet in planes anywhere: each keeps its volume, whichever has the smaller id."""
    rng = np.random.default_rng(0)
    shares = []
    for low, high in ((1, 2), (2, 1)):
        labels = np.empty((64, 64, 64), np.uint8)
        for y in range(0, 64, 2):
            for x in range(0, 64, 2):
                labels[x : x + 2, y : y + 2] = np.where(np.arange(64) < rng.integers(64), low, high)
        shares.append((coarse_labels(labels, 1) == 1).mean() / (labels == 1).mean())
    assert np.mean(shares) == pytest.approx(1, abs=0.002)
    assert min(shares) > 0.98


def test_left_stays_left():
    labels = np.zeros((20, 12, 12), np.uint8)
    labels[2:6, 4:8, 4:8] = 17
    labels[14:18, 4:8, 4:8] = 53
    for level in (1, 2):
        coarse = coarse_labels(labels, level)
        for value in (17, 53):
            centre = (np.argwhere(coarse == value).mean(0) + 0.5) * 2**level
            np.testing.assert_allclose(centre, np.argwhere(labels == value).mean(0) + 0.5, atol=2 ** (level - 1))
        image = coarse_image((labels == 17).astype(np.float16), level)
        np.testing.assert_allclose(image.sum() * 8**level, (labels == 17).sum())
        assert image[image.shape[0] // 2 :].sum() == 0


@pytest.mark.parametrize(
    "spacing, count",
    [((1, 1, 1), 2), ((2, 2, 2), 1), ((4, 4, 4), 0), ((0.5, 0.5, 0.5), 3), ((1.1, 1.1, 1.1), 2), ((1.2, 1, 1), 1),
     ((0.9, 0.9, 5), 0), ((20, 20, 20), 0), ((2.25, 2.25, 2.25), 1)],
)  # fmt: skip
def test_kept_levels(spacing, count):
    assert kept_levels(spacing) == count


def test_a_whole_head_of_145_structures_is_fast():
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 146, (36, 36, 36)), np.ones((5, 5, 5), int)).astype(np.uint8)
    begin = time.process_time()
    coarse_labels(labels, 1)
    coarse_labels(labels, 2)
    assert time.process_time() - begin < 2  # 0.2 s when quiet
