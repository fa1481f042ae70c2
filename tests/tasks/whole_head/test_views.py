"""Whole-head views keep size and place; windows cover; maps find back to the volume."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from brainfm.specs import TaskSpec
from brainfm.tasks.whole_head.views import (
    covering_corners,
    covering_counts,
    views_of_volumes,
    whole_view,
    whole_view_mask,
    whole_view_to_volume,
)

SPEC = TaskSpec("classification", "d", ("t1",), ("a", "b"), (16, 16, 16), mode="exclusive", view_mm=4.0, crops=True)


def ball(shape, radius_mm, spacing_mm):
    grid = np.stack(np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing_mm)], indexing="ij"))
    return ((grid**2).sum(0) < radius_mm**2).astype(np.float32)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.0, 1.0, 3.0)])
def test_a_head_keeps_its_size_and_middle(spacing):
    shape = (60, 70, round(80 / spacing[2]))
    for radius in (12.0, 24.0):
        view = whole_view(ball(shape, radius, spacing) - 1, spacing, 4.0, (32, 32, 32)) + 1
        assert view.shape == (32, 32, 32) and view.dtype == np.float32 and view.min() == 0
        assert view.sum() * 4**3 == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.03)
        place = (np.argwhere(view > 0) * view[view > 0][:, None]).sum(0) / view.sum()
        assert place == pytest.approx([15.5] * 3, abs=0.05)


def test_left_stays_left_and_the_outside_holds_the_minimum():
    volume = np.full((40, 20, 20), 5.0)
    volume[:10] = -2.0
    view = whole_view(volume, (1, 1, 1), 2.0, (32, 32, 32))
    assert view[0, 0, 0] == -2 and view[6:10, 16, 16] == pytest.approx(-2) and view[12:26, 16, 16] == pytest.approx(5)


def test_fine_detail_is_averaged_not_aliased():
    volume = np.zeros((64, 64, 64), np.float32)
    volume[::2] = 1
    view = whole_view(volume, (1, 1, 1), 4.0, (16, 16, 16))
    assert view[2:-2] == pytest.approx(0.5, abs=0.05)


def test_a_larger_head_is_cut_on_both_sides():
    view = whole_view(np.arange(40.0)[:, None, None] * np.ones((1, 8, 8)), (1, 1, 1), 1.0, (20, 8, 8))
    assert view[:, 0, 0] == pytest.approx(np.arange(10, 30))


def test_the_smallest_lesion_is_shown_where_it_lies():
    rng = np.random.default_rng(0)
    for _ in range(30):
        shape, at = rng.integers(20, 60, 3), None
        mask = np.zeros(shape, bool)
        at = tuple(int(rng.integers(4, n - 4)) for n in shape)
        mask[at] = True
        view = whole_view_mask(mask, (1.0, 1.0, 1.5), 4.0, (32, 32, 32))
        assert 1 <= view.sum() <= 2
        where = (np.argwhere(view)[0] - 15.5) * 4
        true = (np.array(at) - (np.array(mask.shape) - 1) / 2) * (1, 1, 1.5)
        assert np.abs(where - true).max() <= 2.01


def test_a_large_mask_is_the_view_of_it():
    solid = ball((60, 60, 60), 20, (1, 1, 1))
    view = whole_view_mask(solid > 0, (1, 1, 1), 0.5, (128, 128, 128))
    smooth = whole_view(solid, (1, 1, 1), 0.5, (128, 128, 128))
    assert (view != (smooth > 0.5)).mean() < 0.01


def test_maps_find_back():
    spacing, shape = (1.0, 1.0, 2.0), (64, 60, 40)
    volume = np.zeros(shape, np.float32)
    volume[40:52, 10:22, 25:31] = 1
    patch = (32, 32, 32)
    tokens = whole_view(volume, spacing, 3.0, patch).reshape(8, 4, 8, 4, 8, 4).mean((1, 3, 5))
    back = whole_view_to_volume(tokens, spacing, 3.0, patch, shape)
    assert back.shape == shape
    centre = (np.stack(np.indices(shape), -1) * back[..., None]).sum((0, 1, 2)) / back.sum()
    assert centre == pytest.approx([45.5, 15.5, 27.5], abs=1.5)
    fine = whole_view_to_volume(whole_view(volume, (1, 1, 1), 1.0, (64, 60, 40)), (1, 1, 1), 1.0, (64, 60, 40), shape)
    assert fine == pytest.approx(volume, abs=1e-5)


def test_windows_cover_with_as_few_as_possible():
    patch = (16, 12, 8)
    for shape in itertools.product((5, 16, 17, 40), (12, 25), (7, 30)):
        corners = covering_corners(shape, patch)
        assert len(corners) == math.prod(math.ceil(n / p) for n, p in zip(shape, patch)) == len(set(corners))
        seen = np.zeros(shape, bool)
        for corner in corners:
            seen[tuple(slice(max(c, 0), c + p) for c, p in zip(corner, patch))] = True
            for c, n, p in zip(corner, shape, patch):
                assert (0 <= c <= n - p) if n >= p else c == (n - p) // 2
        assert seen.all()


def test_more_windows_than_needed_still_cover():
    corners = covering_corners((20, 16, 10), (16, 16, 16), (3, 2, 1))
    assert len(corners) == 6 and {c[0] for c in corners} == {0, 2, 4} and {c[1:] for c in corners} == {(0, -3)}
    assert covering_counts((20, 16, 10), (16, 16, 16)) == (2, 1, 1)


def test_views_of_volumes():
    image = np.random.default_rng(0).normal(size=(2, 20, 16, 12)).astype(np.float32)
    image[1] = 0
    views = views_of_volumes(image, (2, 2, 2), SPEC)
    assert views.shape == (3, 2, 16, 16, 16) and views.dtype == np.float32
    assert np.array_equal(views[0, 0], whole_view(image[0], (2, 2, 2), 4.0, (16, 16, 16)))
    assert np.array_equal(views[1, 0, :, :, 2:14], image[0, :16]) and np.array_equal(
        views[2, 0, :, :, 2:14], image[0, 4:]
    )
    assert (views[1, 0, :, :, :2] == image[0].min()).all() and not views[:, 1].any()
