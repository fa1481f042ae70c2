"""The trial of a decoder: halves of the training side, one standard error, remembered, never another one's."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from brainfm.errors import ConfigError
from brainfm.study import decoder_trial
from brainfm.study.decoder_trial import TrialSpec, inner_folds, tried, verdict
from brainfm.tasks.study import Split
from brainfm.training.loop import State

SPEC = TrialSpec(max_steps=200, share=0.2, least=1, larger_is_better=True, seed=0, mark="abc")


@dataclass(frozen=True)
class Session:
    subject_key: str


@dataclass(frozen=True)
class Case:
    session: Session
    visit: int = 0


def split_of(subjects: int, visits: int = 1) -> Split:
    cases = tuple(Case(Session(f"d/{n}"), visit) for n in range(subjects) for visit in range(visits))
    return Split(0, 3, cases, (Case(Session("d/inner")),), (Case(Session("d/held")),))


def rows(*gains: float, folds: int = 2) -> list[tuple[int, str, float, float]]:
    return [(n % folds, f"{n}", 0.5, 0.5 + gain) for n, gain in enumerate(gains)]


def test_halves_are_of_the_training_side_and_by_subject() -> None:
    split = split_of(7, visits=2)
    halves = inner_folds(split, 0, None)
    assert len(halves) == 2 and halves == inner_folds(split, 0, None) != inner_folds(split, 1, None)
    for half in halves:
        sides = [{case.session.subject_key for case in side} for side in (half.trained, half.held)]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == {f"d/{n}" for n in range(7)} and not half.inner
        assert len(half.trained) + len(half.held) == 14
    assert {c for half in halves for c in half.held} == set(split.trained)
    strata = {f"d/{n}": "lesion" if n < 4 else "none" for n in range(7)}
    for half in inner_folds(split, 0, strata):
        assert len({c.session.subject_key for c in half.held if strata[c.session.subject_key] == "lesion"}) == 2
    assert inner_folds(split_of(3), 0, None) == []


@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        ((0.1, 0.1, 0.1, 0.1), True),
        ((0.0, 0.0, 0.0, 0.0), False),  # equal: the simpler one
        ((-0.1, -0.1, -0.1, -0.1), False),
        ((0.3, 0.2, 0.25, 0.35), True),
        ((0.4, -0.3, 0.35, -0.25), False),  # one half likes it, the other does not
        ((0.05, 0.01, -0.04, 0.02, 0.0, -0.03), False),  # within one standard error
        ((float("nan"), 0.1, 0.1, 0.1), False),
    ],
)
def test_it_must_be_better_by_more_than_one_standard_error(gains: tuple[float, ...], taken: bool) -> None:
    assert verdict(rows(*gains), larger_is_better=True)["taken"] is taken


def test_two_runs_must_agree_however_many_subjects_they_answer() -> None:
    """Over 40 subjects the mean gain of .05 has a standard error of .016; over the two runs one of .1."""
    found = verdict(rows(*[0.15, -0.05] * 20), larger_is_better=True)
    assert found["gain"] == pytest.approx(0.05) and found["standard_error"] == pytest.approx(0.1)
    assert not found["taken"]
    assert verdict(rows(*[0.15, 0.05] * 20), larger_is_better=True)["taken"]


def test_smaller_may_be_better() -> None:
    assert verdict(rows(-0.1, -0.1, -0.1, -0.1), larger_is_better=False)["taken"]
    assert not verdict(rows(0.1, 0.1, 0.1, 0.1), larger_is_better=False)["taken"]


def test_a_subject_counts_once() -> None:
    """One with nine visits and a large gain does not outvote three that lose."""
    some = [(0, "many", 0.5, 0.9)] * 9 + [(0, "a", 0.5, 0.4), (1, "b", 0.5, 0.4), (1, "c", 0.5, 0.4)]
    found = verdict(some, larger_is_better=True)
    assert found["subjects"] == 4 and found["gain"] == pytest.approx(0.025) and not found["taken"]


def test_the_cost_is_said_before_it_is_paid() -> None:
    assert SPEC.steps == 10
    assert str(SPEC).endswith("4 trainings of 10 steps, 20 % of the 200 steps that follow")
    assert replace(SPEC, max_steps=3).steps == 1
    long = replace(SPEC, least=50)
    assert long.steps == 50 and str(long).endswith("4 trainings of 50 steps, 100 % of the 200 steps that follow")
    assert replace(long, max_steps=2000).steps == 100 and replace(long, max_steps=20).steps == 20


def test_an_outcome_is_remembered_and_goes_on_after_a_crash(tmp_path: Path) -> None:
    calls: list[tuple[bool, str, int]] = []

    def trained(split: Split, decoder: bool, folder: Path, steps: int) -> tuple[list[float], State]:
        calls.append((decoder, folder.name, steps))
        folder.mkdir(parents=True, exist_ok=True)
        assert {c.session.subject_key for c in (*split.trained, *split.held)} <= {f"d/{n}" for n in range(6)}
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return [0.6 if decoder else 0.5] * len(split.held), State(steps, 2.0, receipt={"samples": 4})

    split = split_of(6)
    with pytest.raises(RuntimeError, match="power cut"):
        tried(split, tmp_path, SPEC, None, trained, True)
    assert (tmp_path / "trial").is_dir() and not (tmp_path / decoder_trial.FILE).exists()
    calls.clear()
    calls.extend([(False, "", 0)] * 3)
    found = tried(split, tmp_path, SPEC, None, trained, True)
    assert calls[3:] == [(d, f"{c}{n}", 10) for n in (0, 1) for d, c in ((False, "encoder"), (True, "decoder"))]
    assert found["taken"] and found["steps"] == 40 and found["of_steps"] == 200 and found["seconds"] == 8
    assert not (tmp_path / "trial").exists(), "nobody needs its checkpoints any more"
    assert tried(split, tmp_path, SPEC, None, trained, True) == json.loads((tmp_path / "decoder.json").read_text())
    assert len(calls) == 7
    said = decoder_trial.words(found)
    assert said.startswith("decoder taken: with the decoder 0.600, without 0.500 on 6 inner subjects, gain +0.100")
    assert said.endswith("the trial took 40 steps beside 200, 8 s")


def test_the_outcome_of_another_trial_is_refused(tmp_path: Path) -> None:
    def trained(*args: Any) -> tuple[list[float], State]:
        return [0.5] * len(args[0].held), State(1)

    tried(split_of(4), tmp_path, SPEC, None, trained, True)
    with pytest.raises(ConfigError, match=r"decoder\.json was found with other settings or data"):
        tried(split_of(4), tmp_path, replace(SPEC, mark="other"), None, trained, True)


def test_few_subjects_are_not_tried(tmp_path: Path) -> None:
    def trained(*args: Any) -> tuple[list[float], State]:
        raise AssertionError

    found = tried(split_of(3), tmp_path, SPEC, None, trained, True)
    assert not found["taken"] and found["steps"] == 0
    assert decoder_trial.words(found) == "encoder alone: not tried with fewer than 4 training subjects"
