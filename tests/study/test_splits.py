"""Splits of a cross-validation: nobody on two sides, balance, sites apart, repeats, shots, refusals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from brainfm.errors import ConfigError
from brainfm.study.splits import SplitSpec, split_cases, with_shots
from brainfm.tasks.study import Split


@dataclass(frozen=True)
class Session:
    subject_key: str
    key: tuple[str, str, str]


@dataclass(frozen=True)
class Case:
    session: Session


def people(count: int, visits: int = 1) -> list[Case]:
    names = [f"{n:02d}" for n in range(count)]
    return [Case(Session(f"d/{n}", ("d", n, str(v)))) for n in names for v in range(visits)]


def classes(cases: list[Case], share: float) -> dict[str, str]:
    """The first share of the subjects is ill."""
    keys = sorted({c.session.subject_key for c in cases})
    return {key: "ill" if place < share * len(keys) else "well" for place, key in enumerate(keys)}


def subjects(side: tuple[Case, ...]) -> set[str]:
    return {case.session.subject_key for case in side}


@pytest.mark.parametrize("inner", [0.0, 0.25])
def test_every_case_is_held_out_once_a_repeat_and_subjects_stay_together(inner: float) -> None:
    cases = people(11, visits=2)
    splits = split_cases(cases, SplitSpec(folds=4, repeats=3, inner=inner, seed=5))
    assert len(splits) == 12 and len({s.name for s in splits}) == 12
    for repeat in range(3):
        held = [case for s in splits if s.repeat == repeat for case in s.held]
        assert Counter(held) == Counter(cases)
    for s in splits:
        sides = [subjects(s.trained), subjects(s.inner), subjects(s.held)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
        assert len(s.trained) + len(s.inner) + len(s.held) == len(cases), "nobody is lost"
        assert bool(s.inner) == (inner > 0)


def test_repeats_differ_and_the_same_seed_gives_the_same() -> None:
    cases = people(12)
    held = [[frozenset(subjects(s.held)) for s in split_cases(cases, SplitSpec(3, 2, seed=seed))] for seed in (0, 0, 1)]
    assert held[0] == held[1] and set(held[0][:3]) != set(held[0][3:]) and set(held[0]) != set(held[2])


def test_folds_and_inner_cases_are_balanced_in_the_answer() -> None:
    cases = people(20)
    strata = classes(cases, 0.25)
    for s in split_cases(cases, SplitSpec(folds=5, repeats=4, inner=0.25), strata):
        assert sum(strata[k] == "ill" for k in subjects(s.held)) == 1
        assert sum(strata[k] == "ill" for k in subjects(s.inner)) == 1 and len(s.inner) == 4


def test_sites_are_balanced_or_kept_apart() -> None:
    cases = people(16)
    sites = {key: "ABCD"[place % 4] for place, key in enumerate(sorted(subjects(tuple(cases))))}
    for s in split_cases(cases, SplitSpec(folds=4, repeats=2), None, sites):
        assert Counter(sites[k] for k in subjects(s.held)) == Counter("ABCD")
    for s in split_cases(cases, SplitSpec(folds=2, repeats=2, inner=0.2, sites_apart=True), None, sites):
        held, others = ({sites[k] for k in subjects(side)} for side in (s.held, s.trained + s.inner))
        assert len(held) == 2 and not held & others
    with pytest.raises(ConfigError, match="5 folds of 4 sites"):
        split_cases(cases, SplitSpec(folds=5, sites_apart=True), None, sites)


def test_one_fold_holds_a_fifth_out() -> None:
    (split,) = split_cases(people(20), SplitSpec(folds=1))
    assert len(split.held) == 4 and len(split.trained) == 16
    (split,) = split_cases(people(3), SplitSpec(folds=1))
    assert len(split.held) == 1 and len(split.trained) == 2


def test_shots_are_nested_have_every_class_and_leave_the_held_alone() -> None:
    cases = people(20)
    strata = classes(cases, 0.25)
    for split in split_cases(cases, SplitSpec(folds=4, inner=0.2), strata):
        few = [with_shots(split, shots, 3, strata) for shots in (2, 5, 15)]
        assert [len(s.trained) + len(s.inner) for s in few] == [2, 5, 15]
        assert [len(s.inner) for s in few] == [0, 1, 3], "as large a share as before"
        both = [subjects((*s.trained, *s.inner)) for s in few]
        assert both[0] < both[1] < both[2]
        assert {strata[k] for k in subjects(few[0].trained)} == {"ill", "well"}
        for s in few:
            assert s.held == split.held and s.name == split.name
            assert not subjects(s.trained) & subjects(s.held) and not subjects(s.inner) & subjects(s.held)
            assert not subjects(s.trained) & subjects(s.inner)
        with pytest.raises(ConfigError, match="at most the 15 training subjects"):
            with_shots(split, 16, 3, strata)


def test_folds_of_a_few_shot_run_draw_other_subjects() -> None:
    splits = split_cases(people(20), SplitSpec(folds=2, repeats=2))
    drawn = [frozenset(subjects(with_shots(s, 3, 0, None).trained)) for s in splits]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"folds": 7}, "folds=7: expected at least one and at most the 6 labelled subjects"),
        ({"folds": 0}, "expected 1 or more"),
        ({"folds": 2, "repeats": 0}, "expected 1 or more"),
        ({"folds": 2, "inner": 0.5}, "inner=0.5"),
        ({"folds": 2, "inner": 0.1}, "leave none on one side"),
    ],
)
def test_refusals(spec: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        split_cases(people(6), SplitSpec(**spec))


def test_one_subject_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="1 labelled subjects"):
        split_cases(people(1, visits=4), SplitSpec(folds=1))


def test_names_of_folders() -> None:
    assert Split(0, 3, (), (), ()).name == "fold3" and Split(2, 1, (), (), ()).name == "repeat2_fold1"
