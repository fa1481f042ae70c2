"""Sides depend on the person alone, folds are balanced, and both are what they were in earlier versions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from brainfm.errors import ConfigError
from brainfm.scoring.folds import (
    deal,
    draw_shots,
    fold_of,
    folds,
    folds_by_answer,
    holdout,
    side,
    strata_of,
    stratified_folds,
)

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


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


@pytest.mark.parametrize(("n", "k", "seed"), [(23, 5, 0), (47, 5, 1), (100, 3, 2), (150, 10, 3), (6, 5, 4)])
def test_stratified_folds_are_even_in_size_and_in_every_stratum(n: int, k: int, seed: int) -> None:
    subjects = SUBJECTS[:n]
    strata = {s: "ill" if i % 4 == 0 else "well" if i % 7 else "other" for i, s in enumerate(subjects)}
    parts = stratified_folds(subjects, k, seed, strata)
    assert sorted(s for part in parts for s in part) == sorted(subjects)
    assert spread([len(part) for part in parts]) <= 1
    for name in set(strata.values()):
        assert spread([sum(strata[s] == name for s in part) for part in parts]) <= 1
    assert stratified_folds(subjects[::-1], k, seed, strata) == parts == [sorted(part) for part in parts]
    assert stratified_folds(subjects, k, seed + 1, strata) != parts


def test_stratified_folds_share_the_sites_too() -> None:
    subjects = SUBJECTS[:90]
    strata = {s: str(i % 2) for i, s in enumerate(subjects)}
    sites = {s: "abc"[(i % 9 > 3) + (i % 9 > 6)] for i, s in enumerate(subjects)}  # 40, 30 and 20 subjects
    aware, blind = (stratified_folds(subjects, 5, 3, strata, given) for given in (sites, None))
    for name, size in Counter(sites.values()).items():
        assert spread([sum(sites[s] == name for s in part) for part in aware]) <= 2, (name, size)
    worst = max(spread([sum(sites[s] == name for s in part) for part in blind]) for name in "abc")
    assert worst > 2  # without being told, the same folds are less even


def test_a_class_smaller_than_the_folds_is_spread_as_far_as_it_goes() -> None:
    subjects = SUBJECTS[:21]
    strata = {s: "rare" if i < 3 else "often" for i, s in enumerate(subjects)}
    parts = stratified_folds(subjects, 5, 0, strata)
    assert sorted(sum(strata[s] == "rare" for s in part) for part in parts) == [0, 0, 1, 1, 1]
    assert sorted(len(part) for part in parts) == [4, 4, 4, 4, 5]


def test_subjects_without_a_stratum_are_a_stratum() -> None:
    parts = stratified_folds(SUBJECTS[:20], 5, 0, {s: "known" for s in SUBJECTS[:10]})
    assert all(sum(s in SUBJECTS[:10] for s in part) == 2 for part in parts)


def test_sites_kept_apart_are_whole_and_sizes_even() -> None:
    subjects = SUBJECTS[:100]
    sizes = {"a": 30, "b": 25, "c": 15, "d": 10, "e": 10, "f": 5, "g": 5}
    names = [name for name, size in sizes.items() for _ in range(size)]
    sites = dict(zip(subjects, names))
    parts = stratified_folds(subjects, 3, 0, sites=sites, apart=True)
    homes = [{sites[s] for s in part} for part in parts]
    assert sum(len(home) for home in homes) == len(set.union(*homes)) == 7
    assert spread([len(part) for part in parts]) <= 5  # 30+5, 25+10, 15+10+5 or alike: the best is 35, 35, 30
    assert stratified_folds(subjects[::-1], 3, 0, sites=sites, apart=True) == parts


def test_between_equal_sites_the_strata_decide() -> None:
    """Four sites of five: all of a site share a class, so two folds should each get one of either class."""
    subjects = SUBJECTS[:20]
    sites = {s: "abcd"[i // 5] for i, s in enumerate(subjects)}
    strata = {s: "ill" if sites[s] in "ab" else "well" for s in subjects}
    for seed in range(6):
        parts = stratified_folds(subjects, 2, seed, strata, sites, apart=True)
        assert [sum(strata[s] == "ill" for s in part) for part in parts] == [5, 5]


def test_impossible_stratified_folds_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 folds of 3 subjects: expected from 2 folds to one for each subject"):
        stratified_folds(["a", "b", "c"], 5, 0)
    with pytest.raises(ConfigError, match="3 folds of 2 sites that stay on one side: expected at most 2 folds"):
        stratified_folds(list("abcdef"), 3, 0, sites=dict(zip("abcdef", "xxxyyy")), apart=True)
    with pytest.raises(ConfigError, match="a site for each subject, found none"):
        stratified_folds(list("abcdef"), 3, 0, apart=True)


def test_strata_of_values_are_quantiles_and_ties_stay_together() -> None:
    ages = {s: float(20 + i) for i, s in enumerate(SUBJECTS[:50])}
    bins = strata_of(ages)
    assert Counter(bins.values()) == {f"q{i}": 10 for i in range(1, 6)}
    assert [bins[s] for s in SUBJECTS[:50:10]] == ["q1", "q2", "q3", "q4", "q5"]
    assert len(set(strata_of({s: 7.0 for s in SUBJECTS[:9]}).values())) == 1
    assert strata_of({}) == {}
    with pytest.raises(ValueError, match="finite"):
        strata_of({"a": 1.0, "b": float("nan")})


def test_shots_are_nested_and_hold_every_class() -> None:
    subjects = SUBJECTS[:60]
    strata = {s: "rare" if i % 20 == 0 else "two" if i % 3 == 0 else "one" for i, s in enumerate(subjects)}
    for seed in range(5):
        draws = [set(draw_shots(subjects, n, seed, strata)) for n in range(1, 61)]
        assert [len(d) for d in draws] == list(range(1, 61))
        assert all(few < more for few, more in pairwise(draws))
        assert all({strata[s] for s in d} == {"rare", "one", "two"} for d in draws[2:])
        counts = Counter(strata[s] for s in draws[29])  # half of 3, 18 and 39
        assert abs(counts["two"] - 9) <= 1 and abs(counts["one"] - 19.5) <= 1
    assert draw_shots(subjects[::-1], 10, 0, strata) == draw_shots(subjects, 10, 0, strata)
    assert draw_shots(subjects, 10, 0, strata) != draw_shots(subjects, 10, 1, strata)
    assert len({draw_shots(subjects, 1, seed, strata)[0] for seed in range(40)}) > 10
    assert len({strata[draw_shots(subjects, 1, seed, strata)[0]] for seed in range(40)}) == 3
    assert len(draw_shots(subjects, 7, 0)) == 7


def test_impossible_shots_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task\.shots=50: expected at most the 38 training subjects"):
        draw_shots(SUBJECTS[:38], 50, 0)
    with pytest.raises(ConfigError, match=r"task\.shots=0: expected 1 or more"):
        draw_shots(SUBJECTS[:38], 0, 0)


def test_folds_are_dealt_by_subject_and_stratum_and_the_order_of_rows_does_not_matter() -> None:
    groups = [f"s{i}" for i in range(40) for _ in range(2)]
    y = np.repeat([0] * 10 + [1] * 30, 2)
    folds = folds_by_answer(groups, y, 5, 0)
    assert sorted(g for fold in folds for g in fold) == sorted(set(groups))
    zeros = {g for g, value in zip(groups, y) if value == 0}
    assert [len(zeros & set(fold)) for fold in folds] == [2] * 5
    assert folds_by_answer(groups[::-1], y[::-1], 5, 0) == folds != folds_by_answer(groups, y, 5, 1)
    values = np.repeat(np.linspace(0, 100, 40), 2)
    means = [np.mean([values[groups.index(g)] for g in fold]) for fold in folds_by_answer(groups, values, 5, 0)]
    assert np.ptp(means) < 25
    assert len(folds_by_answer(["a", "b", "c"], [0, 1, 0], 5, 0)) == 3


def test_fewer_subjects_than_folds() -> None:
    assert folds("abc", 5, seed=1, fewer=True) == folds("abc", 3, seed=1)
    assert folds(SUBJECTS[:23], 5, seed=1, fewer=True) == folds(SUBJECTS[:23], 5, seed=1)
    with pytest.raises(ConfigError, match="1 folds of 1 subjects"):
        folds("a", 5, seed=1, fewer=True)


def test_the_fold_of_a_row() -> None:
    dealt = deal(["d", "a", "c", "b"], 3)
    assert dealt == [["b", "d"], ["a"], ["c"]]
    assert fold_of(["a", "d", "a", "c"], dealt).tolist() == [1, 0, 1, 2]


def test_folds_are_those_of_commit_9328027() -> None:
    """Folds decide which cases a finished run was scored on: another deal would be another result."""
    who = [f"d/s{i:02d}" for i in range(13)]

    def numbers(dealt: list[list[str]]) -> list[int]:
        return fold_of(who, dealt).tolist()

    assert numbers(folds(who, 4, 3)) == [3, 0, 2, 0, 3, 1, 0, 2, 2, 1, 0, 3, 1]
    squares, values = [i * i % 7 for i in range(13)], [(i * 37) % 101 / 7 for i in range(13)]
    assert numbers(folds_by_answer(who, squares, 3, 5)) == [1, 1, 0, 2, 2, 0, 2, 0, 0, 2, 1, 0, 1]
    assert numbers(folds_by_answer(who, values, 3, 5)) == [1, 1, 0, 2, 2, 1, 0, 2, 2, 1, 0, 0, 0]
    by_value = deal(sorted(who, key=lambda s: values[who.index(s)]), 5)
    assert numbers(by_value) == [0, 0, 0, 2, 2, 1, 3, 3, 2, 4, 4, 1, 1]
    strata, sites = ({s: names[i % len(names)] for i, s in enumerate(who)} for names in ("01", "ABC"))
    assert numbers(stratified_folds(who, 3, 2, strata, sites)) == [2, 2, 0, 0, 1, 1, 1, 0, 2, 1, 0, 2, 0]
