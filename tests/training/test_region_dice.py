"""Dice of fine classes where some maps merge them."""

from __future__ import annotations

import math

import pytest
import torch

from brainfm.training.region_dice import RegionDice

NAMES, MERGED = ("background", "cuneus", "lingual", "insula"), [[1, 2]]


def test_equals_a_count_by_hand() -> None:
    score = RegionDice(NAMES, MERGED)
    target = torch.tensor([1, 1, 1, 2, 0, 0, -1, 3])
    predicted = torch.tensor([1, 1, 2, 2, 1, 0, 3, 0])
    score.add(predicted[:4], target[:4])
    score.add(predicted[4:], target[4:])
    assert score.by_class() == pytest.approx({"cuneus": 2 * 2 / (3 + 3), "lingual": 2 / (2 + 1), "insula": 0.0})
    assert score.mean() == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


def test_a_merged_answer_says_nothing_of_its_members_and_that_others_are_wrong() -> None:
    score = RegionDice(NAMES, MERGED)
    score.add(torch.tensor([1, 3]), torch.tensor([1, 3]))
    alone = score.by_class()
    assert alone == {"cuneus": 1.0, "insula": 1.0}
    score.add(torch.tensor([1, 2, 2]), torch.tensor([4, 4, 4]))  # any of cuneus and lingual
    assert score.by_class() == alone
    score.add(torch.tensor([3]), torch.tensor([4]))
    assert score.by_class() == pytest.approx({"cuneus": 1.0, "insula": 2 / 3})


def test_without_any_map_there_is_no_score() -> None:
    score = RegionDice(NAMES, MERGED)
    score.add(torch.tensor([1, 2]), torch.tensor([-1, -1]))
    assert math.isnan(score.mean())
