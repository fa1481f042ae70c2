"""Clean-up of label maps against flood fill, and what may be tried."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from brainfm.imaging.components import drop_small, largest_component
from brainfm.specs import Decisions
from brainfm.tasks.segmentation.cleanup import apply, candidates

MM = (1.0, 1.0, 1.0)


def parts_of(labels, k):
    """Connected parts of a class by flood fill over 26 neighbours, as sets of voxels."""
    left = {tuple(v) for v in np.argwhere(labels == k)}
    steps = [s for s in itertools.product((-1, 0, 1), repeat=3) if any(s)]
    parts = []
    while left:
        part, todo = set(), [min(left)]
        left.discard(todo[0])
        while todo:
            voxel = todo.pop()
            part.add(voxel)
            for step in steps:
                near = tuple(int(a + b) for a, b in zip(voxel, step))
                if near in left:
                    left.discard(near)
                    todo.append(near)
        parts.append(part)
    return parts


def drawn(seed=0, share=0.12):
    rng = np.random.default_rng(seed)
    return np.where(rng.random((9, 8, 7)) < share, rng.integers(1, 3, (9, 8, 7)), 0).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_largest_component_against_flood_fill(seed):
    labels = drawn(seed)
    cleaned = largest_component(labels)
    for k in (1, 2):
        parts = parts_of(labels, k)
        kept = parts_of(cleaned, k)
        assert len(kept) == 1 and kept[0] in parts
        assert len(kept[0]) == max(map(len, parts))
    assert np.all((cleaned == labels) | (cleaned == 0)) and cleaned.dtype == labels.dtype


@pytest.mark.parametrize("least", [1, 2, 3, 5])
def test_drop_small_against_flood_fill(least):
    labels = drawn(5)
    spacing = (0.5, 2.0, 3.0)  # 3 mm^3 a voxel
    cleaned = drop_small(labels, spacing, least * 3 / 1000)
    for k in (1, 2):
        expected = [part for part in parts_of(labels, k) if len(part) >= least]
        assert {tuple(v) for v in np.argwhere(cleaned == k)} == set().union(*expected)


def test_only_the_classes_that_are_named():
    labels = np.zeros((5, 5, 5), np.int64)
    labels[0, 0, 0] = labels[2:4, 2:4, 2] = 1
    labels[4, 4, 4] = labels[0, 4, 0] = 2
    cleaned = largest_component(labels, classes=[1, 3])
    assert cleaned[0, 0, 0] == 0 and (cleaned == 1).sum() == 4 and (cleaned == 2).sum() == 2


def test_touching_by_a_corner_is_one_part_and_other_classes_do_not_connect():
    labels = np.zeros((6, 3, 3), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 1
    labels[2, 1, 1] = 2
    labels[3, 1, 1] = 1
    cleaned = largest_component(labels)
    assert cleaned[0, 0, 0] == cleaned[1, 1, 1] == 1 and cleaned[3, 1, 1] == 0 and cleaned[2, 1, 1] == 2


def test_apply_follows_the_decisions_and_leaves_its_input():
    labels = drawn(7)
    before = labels.copy()
    assert np.array_equal(apply(labels, Decisions(), MM), labels)
    assert np.array_equal(apply(labels, Decisions(mirror=(0,), temperature=2.0), MM), labels)
    assert np.array_equal(apply(labels, Decisions(largest_component=True), MM), largest_component(labels))
    both = apply(labels, Decisions(largest_component=True, min_ml=1.0), MM)
    assert not both.any()  # no part is as large as a millilitre, so none is left to be the largest
    assert np.array_equal(labels, before)


def test_an_empty_map_stays_empty():
    empty = np.zeros((4, 4, 4), np.uint8)
    assert not apply(empty, Decisions(largest_component=True, min_ml=0.1), MM).any()


def test_candidates_without_any_truth_are_the_same_for_every_fold():
    tried = candidates()
    assert tried == candidates() and tried[0] == Decisions() and len(tried) == len(set(tried)) > 3
    assert any(d.largest_component for d in tried) and sum(d.min_ml > 0 for d in tried) >= 3
    assert candidates([np.zeros((4, 4, 4), np.uint8)]) == tried  # a case without lesions teaches nothing


def test_candidates_that_would_harm_the_truth_are_left_out():
    many = np.zeros((40, 40, 40), np.uint8)
    for x in (2, 14, 26):
        many[x : x + 4, 5:9, 5:9] = 1  # three lesions of 0.064 ml
    tried = candidates([many], MM)
    assert not any(d.largest_component for d in tried)
    assert {d.min_ml for d in tried} == {0.0, 0.01, 0.03}
    one = np.zeros((40, 40, 40), np.uint8)
    one[5:25, 5:25, 5:25] = 1
    assert candidates([one], MM) == candidates()


def test_refusal():
    with pytest.raises(ValueError, match="three axes"):
        largest_component(np.zeros((4, 4), np.uint8))
