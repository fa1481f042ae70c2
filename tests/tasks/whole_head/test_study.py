"""What cross-validation decides about answers for a whole session, on answers that are made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from brainfm.scoring.calibration import apply_bias, conformal_quantile
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.study import Row
from brainfm.tasks.whole_head.sorts import LEVEL
from brainfm.tasks.whole_head.study import WholeHeadStudy


def asked(kind: str, mode: str = "", values: tuple = ()) -> WholeHeadStudy:
    found = object.__new__(WholeHeadStudy)  # deciding and scoring look at rows and the spec alone
    found.spec = TaskSpec(kind, "x", ("t1",), values, (16, 16, 16), mode=mode, view_mm=8.0)
    found.primary, found.larger_is_better = ("mae", False) if kind == "regression" else ("auroc", True)
    return found


AGE, ILL = asked("regression"), asked("classification", "exclusive", ("no", "yes"))


def rows_of(truth: np.ndarray, raw: np.ndarray, folds: int = 4, repeat: int = 0) -> list[Row]:
    return [
        {"dataset": "d", "subject": f"{n:03d}", "session": "", "repeat": repeat, "fold": (n + repeat) % folds,
         "truth": [float(t)], "raw": np.atleast_1d(r).tolist()} for n, (t, r) in enumerate(zip(truth, raw))
    ]  # fmt: skip


def too_sure(n: int, factor: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes drawn from calibrated probabilities, and answers whose logits are ``factor`` times as large."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, 2))
    truth = (rng.random(n) < softmax(logits, axis=1)[:, 1]).astype(float)
    return truth, softmax(factor * logits, axis=1)


def pulled(n: int, slope: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ages, and answers that are pulled to 50."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(20, 80, n)
    return truth, 50 + slope * (truth - 50) + rng.normal(0, 1, n)


def answers(rows: list[Row]) -> np.ndarray:
    return np.array([row["answer"] for row in rows])


def test_a_temperature_is_kept_where_held_out_answers_gain() -> None:
    truth, raw = too_sure(200, 4.0)
    decided = ILL.decide(rows_of(truth, raw))
    assert decided.decisions.temperature == pytest.approx(4, rel=0.35) and decided.calibration["kept"]
    assert decided.calibration["ece_after"] < decided.calibration["ece_before"]
    assert "kept" in decided.said[0] and "not kept" not in decided.said[0]
    assert not np.allclose(answers(decided.rows), raw)
    order = np.argsort(raw[:, 1])
    for fold in range(4):  # within a fold the order stays
        own = [n for n in order if n % 4 == fold]
        assert (np.diff(answers(decided.rows)[own, 1]) >= 0).all()


def test_a_temperature_is_not_kept_where_they_lose() -> None:
    """Each fold errs in its own way, so that none can learn from the others."""
    truth, shy = too_sure(60, 0.3, 1)
    sure = too_sure(60, 6.0, 1)[1]
    raw = np.where((np.arange(60) % 2 == 0)[:, None], shy, sure)
    decided = ILL.decide(rows_of(truth, raw, folds=2))
    assert decided.decisions.temperature == 1.0 and not decided.calibration["kept"]
    assert not np.allclose(answers(decided.rows), raw), "scored as each other fold, at one with itself, would have it"
    assert "not kept" in decided.said[0]


def test_an_answer_is_reported_as_the_other_folds_would_have_it() -> None:
    """Fold 0 alone is too sure; the others, which are calibrated, leave nearly everything as it is."""
    truth, calibrated = too_sure(160, 1.0, 2)
    raw = np.where((np.arange(160) % 4 == 0)[:, None], too_sure(160, 8.0, 2)[1], calibrated)
    given = answers(ILL.decide(rows_of(truth, raw)).rows)
    assert np.abs(given[::4] - raw[::4]).max() < 0.05, "the temperature that fold 0 needs is not taken from itself"


def test_changing_a_case_does_not_change_its_own_correction() -> None:
    """The strictest form: the truth of a fold's subjects moves no answer of theirs, neither in value nor by what is
    chosen; it does move those of others."""
    truth, raw = too_sure(40, 3.0, 3)
    flipped = truth.copy()
    flipped[::4] = 1 - flipped[::4]
    one, other = (answers(ILL.decide(rows_of(t, raw)).rows) for t in (truth, flipped))
    assert np.array_equal(one[::4], other[::4]) and not np.array_equal(one, other)
    ages, guesses = pulled(40, 0.5)
    moved = ages.copy()
    moved[::4] += 30
    one, other = (answers(AGE.decide(rows_of(t, guesses)).rows) for t in (ages, moved))
    assert np.array_equal(one[::4], other[::4]) and not np.array_equal(one, other)


def test_repeats_of_a_subject_do_not_teach_its_correction() -> None:
    truth, raw = pulled(24, 0.5)
    moved = truth.copy()
    moved[::4] += 30
    of_zero = []
    for t in (truth, moved):
        rows = rows_of(t, raw, 4, 0) + rows_of(t, raw, 4, 1)
        of_zero.append([r["answer"] for r in AGE.decide(rows).rows if r["subject"] == "000"])
    assert of_zero[0] == of_zero[1]


def test_a_bias_is_corrected_where_held_out_answers_gain() -> None:
    truth, raw = pulled(80, 0.5)
    decided = AGE.decide(rows_of(truth, raw))
    a, b = decided.decisions.bias
    assert b == pytest.approx(0.5, abs=0.05) and decided.calibration["kept"]
    assert np.abs(apply_bias(raw, (a, b)) - truth).mean() < 3 < np.abs(raw - truth).mean()
    scored = AGE.score(decided.rows, 0).metrics["mae"]
    assert scored.mean < 3 and scored.n == 80
    residuals = np.array(decided.decisions.residuals)
    assert (np.diff(residuals) >= 0).all() and len(residuals) == 80
    assert decided.calibration["half_width"] == pytest.approx(conformal_quantile(residuals, LEVEL))


def test_a_bias_is_not_corrected_where_they_lose() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(20, 80, 40)
    raw = np.full(40, 50.0) + rng.normal(0, 3, 40)  # nothing is known: undoing a flat line blows up noise
    decided = AGE.decide(rows_of(truth, raw))
    assert decided.decisions.bias == (0.0, 1.0) and not decided.calibration["kept"]
    assert np.array_equal(answers(decided.rows)[:, 0], raw) and "not kept" in decided.said[0]


@pytest.mark.parametrize("slope", [0.5, 1.0])
def test_prediction_intervals_hold_what_they_promise(slope: float) -> None:
    """The coverage that is reported, and the coverage on people of whom nothing was known."""
    covered, fresh = [], []
    for seed in range(20):
        truth, raw = pulled(60, slope, seed)
        decided = AGE.decide(rows_of(truth, raw))
        covered.append(decided.calibration["coverage"])
        truth, raw = pulled(300, slope, 1000 + seed)
        given = apply_bias(raw, decided.decisions.bias)
        half = conformal_quantile(np.array(decided.decisions.residuals), LEVEL)
        fresh.append(np.mean(np.abs(given - truth) <= half))
    assert 0.86 < np.mean(covered) < 0.95 and 0.86 < np.mean(fresh) < 0.95


def test_few_cases_get_no_interval() -> None:
    truth, raw = pulled(6, 1.0)
    decided = AGE.decide(rows_of(truth, raw, folds=2))
    assert decided.calibration["coverage"] is None and np.isinf(decided.calibration["half_width"])


def test_one_fold_decides_nothing() -> None:
    truth, raw = too_sure(30, 4.0)
    decided = ILL.decide(rows_of(truth, raw, folds=1))
    assert decided.decisions == Decisions() and decided.said == ("nothing is decided on one fold",)
    assert np.array_equal(answers(decided.rows), raw)
    truth, raw = pulled(30, 0.5)
    decided = AGE.decide(rows_of(truth, raw, folds=1))
    assert decided.decisions.bias == (0.0, 1.0) and len(decided.decisions.residuals) == 30


def test_labels_that_are_not_known_do_not_disturb() -> None:
    findings = asked("classification", "multilabel", ("a", "b"))
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.8, (60, 2))
    truth = (rng.random((60, 2)) < p).astype(float)
    rows = rows_of(truth[:, 0], p)
    for number, row in enumerate(rows):
        row["truth"] = [truth[number, 0], None if number % 3 == 0 else truth[number, 1]]
    decided = findings.decide(rows)
    found = findings.score(decided.rows, 0).metrics
    assert 0.5 < found["auroc/a"].mean < 1 and found["auroc"].mean == pytest.approx(
        np.mean([found["auroc/a"].mean, found["auroc/b"].mean])
    )
    known = np.array([row["truth"][1] is not None for row in rows])
    assert found["brier/b"].mean == pytest.approx(
        float(np.mean((answers(decided.rows)[known, 1] - truth[known, 1]) ** 2))
    )
