"""Scores against hand-made cases, naive loops and DeepMind's reference."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest

from brainfm.errors import ConfigError
from brainfm.scoring.masks import dice, instance_scores, surface_dice, volume_ml


def blob(shape, spacing, shift=(0.0, 0.0, 0.0), radius=5.5):
    """A ragged ball; the same seed makes the same noise, so that a shift moves the surface and not the noise."""
    rng = np.random.default_rng(1)
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    cx, cy, cz = rng.uniform(-2, 2, 3)
    noise = rng.normal(0, 0.6, shape)
    distance = ((x - cx - shift[0]) ** 2 + (y - cy - shift[1]) ** 2 + (z - cz - shift[2]) ** 2) ** 0.5
    return distance + noise < radius


# google-deepmind/surface-distance 0.1, compute_surface_dice_at_tolerance: (shape, spacing, shift) -> at 1 mm, at 2 mm.
DEEPMIND = [
    ((20, 22, 18), (1.0, 1.0, 1.0), (1.0, 0.0, 0.5), 0.9738388877278792, 0.9996107829916597),
    ((24, 20, 8), (0.8, 0.9, 4.0), (1.2, 0.0, 0.0), 0.9374515455590862, 0.9908663820671134),
    ((10, 30, 24), (3.0, 0.5, 1.0), (0.0, 1.6, 0.0), 0.952429259424888, 0.9959538674080276),
    ((14, 14, 14), (1.0, 1.0, 1.0), (3.0, 0.0, 0.0), 0.7114460923038392, 0.941995293534109),
]


@pytest.mark.parametrize(("shape", "spacing", "shift", "at_1", "at_2"), DEEPMIND)
def test_surface_dice_is_deepminds(shape, spacing, shift, at_1, at_2):
    pytest.importorskip("monai")
    true, predicted = blob(shape, spacing), blob(shape, spacing, shift)
    assert surface_dice(predicted, true, spacing) == pytest.approx(at_1, abs=1e-5)
    assert surface_dice(predicted, true, spacing, tolerance_mm=2.0) == pytest.approx(at_2, abs=1e-5)


def test_surface_dice_of_boxes_at_the_border():
    """Reference values of the same package; the masks touch the border of the volume."""
    pytest.importorskip("monai")
    a, b = np.zeros((6, 6, 6), bool), np.zeros((6, 6, 6), bool)
    a[:3, :3, :3] = b[:4, :3, :3] = True
    assert surface_dice(a, b, (1.0, 1.0, 4.0)) == pytest.approx(1.0)
    assert surface_dice(a, b, (2.0, 1.0, 1.0)) == pytest.approx(0.9130184649410933, abs=1e-5)


def test_surface_dice_against_loops():
    """Every 2x2x2 neighbourhood is looked at and every pair of surface elements measured, one after the other."""
    pytest.importorskip("monai")
    from monai.metrics.utils import get_code_to_measure_table

    shape, spacing = (9, 8, 6), (1.0, 0.7, 2.5)
    predicted, true = blob(shape, spacing, (1.0, 0.4, 0.0), 3.0), blob(shape, spacing, radius=3.4)
    areas, kernel = get_code_to_measure_table(spacing)
    weights = kernel.numpy()[0, 0]

    def elements(mask):
        padded = np.pad(mask, 1).astype(int)
        for corner in itertools.product(*(range(n - 1) for n in padded.shape)):
            code = int((padded[tuple(slice(c, c + 2) for c in corner)] * weights).sum())
            if 0 < code < 255:
                yield np.array(corner) * spacing, float(areas[code])

    surfaces = [list(elements(predicted)), list(elements(true))]
    near = total = 0.0
    for one, other in (surfaces, surfaces[::-1]):
        for place, area in one:
            total += area
            if min(np.linalg.norm(place - q) for q, _ in other) <= 1.0:
                near += area
    assert 0.3 < near / total < 0.99
    assert surface_dice(predicted, true, spacing) == pytest.approx(near / total, abs=1e-5)


def test_surface_dice_counts_millimetres():
    pytest.importorskip("monai")
    a, b = np.zeros((12, 12, 12), bool), np.zeros((12, 12, 12), bool)
    a[3:8, 3:8, 3:8] = True
    b[3:8, 3:8, 5:10] = True  # two voxels higher
    assert surface_dice(a, b, (1.0, 1.0, 0.5)) > 0.99
    assert surface_dice(a, b, (1.0, 1.0, 5.0)) < surface_dice(a, b, (1.0, 1.0, 1.0)) < 0.9


def test_dice():
    rng = np.random.default_rng(0)
    p, t = rng.random((5, 6, 7)) < 0.3, rng.random((5, 6, 7)) < 0.4
    both = sum(1 for i in np.ndindex(p.shape) if p[i] and t[i])
    assert dice(p, t) == pytest.approx(2 * both / (p.sum() + t.sum()))
    assert dice(p.astype(np.uint8) * 3, t) == dice(p, t)
    assert dice(p, p) == 1
    with pytest.raises(ValueError, match="one shape"):
        dice(p, t[:4])


def test_dice_and_surface_dice_agree_on_empty_masks():
    """Both empty is right for both; FOMO26's own 0 for the surface is to be had."""
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert dice(empty, empty) == surface_dice(empty, empty, (1, 1, 1)) == 1
    assert surface_dice(empty, empty, (1, 1, 1), both_empty=0.0) == 0
    assert dice(empty, full) == dice(full, empty) == 0
    assert surface_dice(empty, full, (1, 1, 1)) == surface_dice(full, empty, (1, 1, 1)) == 0


def test_surface_dice_refuses_senseless_spacing():
    ones = np.ones((4, 4, 4), bool)
    for spacing in ((1, 1, 0), (1, float("nan"), 1), (1, 1)):
        with pytest.raises(ValueError, match="spacings > 0"):
            surface_dice(ones, ones, spacing)


def test_surface_dice_without_monai_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    ones = np.ones((4, 4, 4), bool)
    with pytest.raises(ConfigError, match=r"surface Dice needs monai.*pip install 'brainfm-mri\[report\]'"):
        surface_dice(ones, ones, (1, 1, 1))


def parts_by_flooding(mask):
    """Sets of voxels that touch, found one after the other."""
    left, parts = {tuple(v) for v in np.argwhere(mask)}, []
    while left:
        front = [left.pop()]
        part = set(front)
        while front:
            x, y, z = front.pop()
            for dx, dy, dz in itertools.product((-1, 0, 1), repeat=3):
                near = (x + dx, y + dy, z + dz)
                if near in left:
                    left.remove(near)
                    part.add(near)
                    front.append(near)
        parts.append(part)
    return parts


@pytest.mark.parametrize(("seed", "overlap"), [(0, 1), (1, 1), (2, 2), (3, 3)])
def test_lesions_against_flooding(seed, overlap):
    rng = np.random.default_rng(seed)
    predicted, true = rng.random((12, 11, 10)) < 0.04, rng.random((12, 11, 10)) < 0.05
    predicted |= true & (rng.random(true.shape) < 0.5)
    sides = [{tuple(v) for v in np.argwhere(mask)} for mask in (predicted, true)]
    lesions, answers = parts_by_flooding(true), parts_by_flooding(predicted)
    missed = [part for part in lesions if len(part & sides[0]) < min(overlap, len(part))]
    wrong = [part for part in answers if len(part & sides[1]) < min(overlap, len(part))]
    detected = len(lesions) - len(missed)
    assert missed and wrong and detected
    assert instance_scores(predicted * 3, true, (0.5, 1, 4), min_overlap_vox=overlap) == pytest.approx(
        {
            "lesions": len(lesions),
            "detected": detected,
            "missed": len(missed),
            "false_positives": len(wrong),
            "f1": detected / (detected + (len(missed) + len(wrong)) / 2),
            "sensitivity": detected / len(lesions),
            "missed_ml": sum(map(len, missed)) * 0.002,
            "false_positive_ml": sum(map(len, wrong)) * 0.002,
        }
    )


def test_lesions_that_touch_by_a_corner_are_one_and_one_answer_finds_two():
    true, predicted = np.zeros((8, 8, 8), bool), np.zeros((8, 8, 8), bool)
    true[1, 1, 1] = true[2, 2, 2] = True
    assert instance_scores(predicted, true, (1, 1, 1))["missed"] == 1
    true[2, 2, 2], true[6, 6, 6] = False, True
    predicted[:] = True
    found = instance_scores(predicted, true, (1, 1, 1))
    assert (found["detected"], found["false_positives"], found["f1"]) == (2, 0, 1)


def test_lesions_of_empty_masks():
    empty, one = np.zeros((4, 4, 4), bool), np.zeros((4, 4, 4), bool)
    one[1, 1, 1] = True
    none = instance_scores(empty, empty, (1, 1, 1))
    assert none["f1"] == 1 and none["sensitivity"] is None and none["missed"] == none["false_positives"] == 0
    extra = instance_scores(one, empty, (1, 1, 1))
    assert extra["f1"] == 0 and extra["sensitivity"] is None and extra["false_positives"] == 1
    missed = instance_scores(empty, one, (1, 1, 2))
    assert missed["f1"] == missed["sensitivity"] == 0 and missed["missed_ml"] == pytest.approx(0.002)


def test_lesions_that_cannot_be_counted():
    with pytest.raises(ValueError, match=r"3D masks by an overlap >= 1, found \(4, 4\) and 1"):
        instance_scores(np.ones((4, 4)), np.ones((4, 4)), (1, 1, 1))
    with pytest.raises(ValueError, match=r"found \(2, 2, 2\) and 0"):
        instance_scores(np.ones((2, 2, 2)), np.ones((2, 2, 2)), (1, 1, 1), min_overlap_vox=0)


def test_volume():
    mask = np.zeros((10, 10, 10), np.uint8)
    mask[:5, :4, :2] = 7
    assert volume_ml(mask, (0.5, 0.5, 4.0)) == pytest.approx(0.04)
