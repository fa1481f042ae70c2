"""Where in a head a structure lies: a region where it has a place of its own, and none where it may be anywhere."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.tasks.place import box_of, learned, words

SPACING = (1.0, 1.0, 2.0)
RNG = np.random.default_rng(0)


def cohort(n=24, anywhere=False, neck=40):
    """Heads of about 150 x 180 x 200 mm, with a neck of any length below; the structure 60 mm below the top."""
    shapes, boxes, people = [], [], []
    for number in range(n):
        shape = np.array([150, 180, 100]) + RNG.integers(-4, 5, 3) + [0, 0, RNG.integers(0, neck)]
        back = np.array([shape[0] // 2 - 10, 60, shape[2] - 30]) + RNG.integers(-3, 4, 3)
        if anywhere:
            back = np.array([RNG.integers(0, size - 20) for size in shape])
        shapes.append(tuple(int(v) for v in shape))
        boxes.append(tuple(slice(int(b), int(b) + 20) for b in back))
        people.append(f"d/{number}")
    return shapes, boxes, people


def test_a_structure_with_a_place_is_found_in_new_heads_whatever_their_necks():
    region = learned(*cohort(), SPACING)
    assert len(region) == 9 and "region of" in words(region)
    for shape, box, _ in zip(*cohort(50)):
        found = box_of(region, shape, SPACING, (16, 16, 16))
        assert all(a.start <= b.start and b.stop <= a.stop for a, b in zip(found, box))
        assert np.prod([s.stop - s.start for s in found]) < 0.25 * np.prod(shape)


def test_a_lesion_has_no_place_and_few_people_do_not_tell_one():
    assert learned(*cohort(anywhere=True), SPACING) == ()
    assert learned(*cohort(19), SPACING) == ()
    shapes, boxes, people = cohort(40)
    assert learned(shapes, boxes, [f"d/{n % 10}" for n in range(40)], SPACING) == (), "visits are not people"
    assert learned(shapes, [None] * 40, people, SPACING) == () and words(()) == ""


def test_the_margin_grows_with_a_straggler():
    shapes, boxes, people = cohort(30)
    usual = learned(shapes, boxes, people, SPACING)
    boxes[3] = (boxes[3][0], slice(40, 60), boxes[3][2])
    assert learned(shapes, boxes, people, SPACING)[1] < usual[1] - 40, "20 mm further, and twice 17 mm of margin"


def test_a_head_of_another_size_is_looked_at_whole():
    region = learned(*cohort(), SPACING)
    assert box_of((), (150, 180, 100), SPACING, (16, 16, 16)) is None
    for strange in ((100, 130, 70), (150, 180, 40), (200, 180, 100)):
        assert box_of(region, strange, SPACING, (16, 16, 16)) is None


@pytest.mark.parametrize("patch", [(16, 16, 16), (96, 96, 64)])
def test_a_window_fits(patch):
    region = learned(*cohort(), SPACING)
    found = box_of(region, (150, 180, 100), SPACING, patch)
    assert all(side.stop - side.start >= size for side, size in zip(found, patch))
    assert all(side.start >= 0 and side.stop <= size for side, size in zip(found, (150, 180, 100)))
