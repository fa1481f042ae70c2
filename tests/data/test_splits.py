"""Splits: a person's side depends on the person alone."""

from __future__ import annotations

import pytest

from brainfm.data.splits import folds, holdout, side
from brainfm.specs import ConfigError

SUBJECTS = [f"ds{i % 3}/sub-{i:03d}" for i in range(400)]


def test_growth_moves_nobody() -> None:
    train, held = holdout(SUBJECTS[:150], 0.2, seed=1)
    more_train, more_held = holdout(SUBJECTS[::-1], 0.2, seed=1)
    assert set(train) <= set(more_train)
    assert set(held) <= set(more_held)
    assert not set(more_train) & set(more_held)
    assert 50 < len(more_held) < 110
    assert set(held) < set(holdout(SUBJECTS, 0.4, seed=1)[1])
    assert holdout(SUBJECTS, 0.2, seed=2)[1] != more_held
    assert holdout(SUBJECTS, 0, seed=2)[1] == []


def test_sides_follow_the_fractions_and_a_larger_first_side_keeps_its_members() -> None:
    small = {s: side("a", s, "salt", {"test": 0.1, "train": 0.9}) for s in SUBJECTS}
    large = {s: side("a", s, "salt", {"test": 0.2, "val": 0.1, "train": 0.7}) for s in SUBJECTS}
    assert all(large[s] == "test" for s in SUBJECTS if small[s] == "test")
    assert 50 < sum(v == "test" for v in large.values()) < 110
    assert any(side("a", s, "pepper", {"test": 0.1, "train": 0.9}) != small[s] for s in SUBJECTS)


def test_folds_are_balanced_complete_and_deterministic() -> None:
    parts = folds(SUBJECTS[:23], 5, seed=3)
    assert sorted(len(part) for part in parts) == [4, 4, 5, 5, 5]
    assert sorted(s for part in parts for s in part) == sorted(SUBJECTS[:23])
    assert folds(reversed(SUBJECTS[:23]), 5, seed=3) == parts
    assert folds(SUBJECTS[:23], 5, seed=4) != parts


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 folds of 2 subjects"):
        folds(["a", "b"], 3, seed=0)
    with pytest.raises(ConfigError, match="sum to 1"):
        side("a", "b", "c", {"test": 0.5})
    with pytest.raises(ConfigError, match=r"fraction of 1\.5"):
        holdout(["a"], 1.5, seed=0)
