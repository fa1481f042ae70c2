"""Scan-level scores against scikit-learn, and what they say where nothing can be said."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy.stats import linregress
from sklearn import metrics as reference

from brainfm.scoring.answers import auroc, average_precision
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import kind_of
from brainfm.tasks.whole_head.scores import answer_score, answer_scores


def question(kind: str = "classification", values: tuple = (), mode: str = "") -> TaskSpec:
    return TaskSpec(kind, "finding", ("t1",), values, (32, 32, 32), mode=mode)


BINARY = question(values=("well", "ill"), mode="exclusive")
THREE = question(values=("a", "b", "c"), mode="exclusive")
GRADES = question(values=(1, 2, 3, 4), mode="ordinal")
FINDINGS = question(values=("edema", "bleed", "shift"), mode="multilabel")
AGE = question("regression")


def simulated(n: int, classes: int, seed: int, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Truth, and probabilities that know something of it; rounded, so that there are ties."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.2 * np.eye(classes)[truth]
    p = np.round(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), digits)
    return truth, p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(4))
def test_two_classes_are_scikit_learns(seed: int) -> None:
    truth, p = simulated(60, 2, seed)
    found, answer = answer_scores(BINARY, truth[:, None].astype(np.float32), p), p.argmax(axis=1)
    assert found == pytest.approx(
        {
            "auroc": reference.roc_auc_score(truth, p[:, 1]),
            "average_precision": reference.average_precision_score(truth, p[:, 1]),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, answer),
            "f1": reference.f1_score(truth, answer, average="macro"),
            "accuracy": reference.accuracy_score(truth, answer),
            "log_loss": reference.log_loss(truth, np.clip(p, 1e-7, 1), labels=[0, 1]),
            "brier": reference.brier_score_loss(truth, p[:, 1]),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("seed", range(4))
def test_several_ordered_classes_are_scikit_learns(seed: int) -> None:
    truth, p = simulated(50, 4, seed)
    found, answer = answer_scores(GRADES, truth, p), p.argmax(axis=1)
    hot = np.eye(4)[truth]
    assert found == pytest.approx(
        {
            "auroc": reference.roc_auc_score(truth, p, multi_class="ovr", average="macro"),
            "average_precision": reference.average_precision_score(hot, p, average="macro"),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, answer),
            "f1": reference.f1_score(truth, answer, average="macro"),
            "accuracy": reference.accuracy_score(truth, answer),
            "log_loss": -np.mean(np.log(np.clip(p[np.arange(50), truth], 1e-7, 1))),
            "brier": np.mean([sum((p[i, k] - (truth[i] == k)) ** 2 for k in range(4)) for i in range(50)]),
            "quadratic_kappa": reference.cohen_kappa_score(truth, answer, weights="quadratic"),
            "mae_steps": np.mean(np.abs(answer - truth)),
        },
        abs=1e-6,
    )


def test_several_findings_are_scikit_learns_and_unknown_ones_are_left_out() -> None:
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 2, (70, 3)).astype(np.float32)
    p = np.round(np.clip(0.3 + 0.3 * truth + rng.normal(0, 0.25, truth.shape), 0.01, 0.99), 2)
    truth[rng.random(truth.shape) < 0.2] = np.nan
    found = answer_scores(FINDINGS, truth, p)
    functions = {
        "auroc": reference.roc_auc_score,
        "average_precision": reference.average_precision_score,
        "balanced_accuracy": lambda t, q: reference.balanced_accuracy_score(t, q >= 0.5),
        "f1": lambda t, q: reference.f1_score(t, q >= 0.5),
        "accuracy": lambda t, q: reference.accuracy_score(t, q >= 0.5),
        "log_loss": reference.log_loss,
        "brier": reference.brier_score_loss,
    }
    for name, function in functions.items():
        each = []
        for i, label in enumerate(FINDINGS.values):
            known = ~np.isnan(truth[:, i])
            each.append(function(truth[known, i].astype(int), p[known, i]))
            assert found[f"{name}/{label}"] == pytest.approx(each[-1]), name
        assert found[name] == pytest.approx(np.mean(each)), name
    assert len(found) == 7 * 4


def test_values_are_scored_as_scipy_and_scikit_learn_do() -> None:
    rng = np.random.default_rng(6)
    age = rng.uniform(20, 80, 40)
    answer = 15 + 0.7 * age + rng.normal(0, 5, 40)
    line = linregress(age, answer)
    assert answer_scores(AGE, age[:, None], answer) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(age, answer),
            "rmse": math.sqrt(reference.mean_squared_error(age, answer)),
            "r": line.rvalue,
            "r2": reference.r2_score(age, answer),
            "bias": answer.mean() - age.mean(),
            "slope": line.slope,
        }
    )
    age[3] = np.nan
    assert answer_scores(AGE, age, answer) == answer_scores(AGE, np.delete(age, 3), np.delete(answer, 3))


def test_auroc_and_precision_of_pairs_counted_by_hand() -> None:
    truth, score = np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.1, 0.7, 0.3, 0.9])
    pairs = [(a > b) + 0.5 * (a == b) for a in score[truth == 1] for b in score[truth == 0]]
    assert auroc(truth, score) == pytest.approx(np.mean(pairs))
    assert auroc(truth, -score) == pytest.approx(1 - np.mean(pairs))
    assert average_precision(truth, score) == pytest.approx((1 + 1 + 3 / 5) / 3)
    assert average_precision(truth, np.zeros(5)) == pytest.approx(0.6)


def test_what_cannot_be_said_is_nan_without_a_warning() -> None:
    truth, p = np.zeros(12), simulated(12, 2, 0)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_class = answer_scores(BINARY, truth, p)
        constant = answer_scores(AGE, np.full(6, 60.1), np.linspace(50, 70, 6))
        flat = answer_scores(AGE, np.linspace(50, 70, 6), np.full(6, 60.1))
        nobody = answer_scores(BINARY, np.full(12, np.nan), p)
        empty = answer_scores(AGE, np.zeros(0), np.zeros((0, 1)))
        agreed = answer_scores(GRADES, np.ones(5), np.eye(4)[[1] * 5])
    undefined = {name for name, value in one_class.items() if math.isnan(value)}
    assert undefined == {"auroc", "average_precision", "balanced_accuracy"}
    assert {name for name, value in constant.items() if math.isnan(value)} == {"r", "r2", "slope"}
    assert {name for name, value in flat.items() if math.isnan(value)} == {"r"} and flat["slope"] == pytest.approx(0)
    assert all(math.isnan(value) for value in (*nobody.values(), *empty.values()))
    assert math.isnan(agreed["quadratic_kappa"]) and agreed["mae_steps"] == 0


def test_a_class_that_nobody_has_is_left_out_of_the_mean() -> None:
    truth, p = simulated(40, 3, 1)
    p = p[truth != 2]
    truth = truth[truth != 2]
    each = [reference.roc_auc_score(truth == k, p[:, k]) for k in (0, 1)]
    assert answer_scores(THREE, truth, p)["auroc"] == pytest.approx(np.mean(each))


def test_an_answer_that_is_not_a_number_spoils_the_scores() -> None:
    truth, p = simulated(20, 2, 2)
    p[4] = np.nan
    assert all(math.isnan(value) for value in answer_scores(BINARY, truth, p).values())
    findings = np.random.default_rng(0).integers(0, 2, (20, 3))
    answers = np.full((20, 3), 0.4)
    answers[7, 1] = np.nan
    found = answer_scores(FINDINGS, findings, answers)
    assert math.isnan(found["brier"]) and math.isnan(found["brier/bleed"]) and not math.isnan(found["brier/edema"])


def test_one_score_alone_is_that_of_the_table() -> None:
    truth, p = simulated(30, 4, 3)
    table = answer_scores(GRADES, truth, p)
    assert {name: answer_score(GRADES, name)(truth, p) for name in table} == table
    with pytest.raises(ValueError, match="dice is no score of a question that is ordinal: expected one of"):
        answer_score(GRADES, "dice")


def test_the_primary_score_is_in_the_table_and_says_which_way_is_up() -> None:
    for spec, larger in ((BINARY, True), (THREE, True), (GRADES, True), (FINDINGS, True), (AGE, False)):
        name, up = kind_of(spec.kind).primary(spec)
        answer_score(spec, name)
        assert up is larger
    assert kind_of("segmentation").primary(question("segmentation", values=(0, 1))) == ("dice", True)


def test_shapes_of_another_question_are_refused() -> None:
    truth, p = simulated(10, 2, 0)
    with pytest.raises(ValueError, match=r"truth \[N\] and probabilities \[N, 4\], found \(10,\) and \(10, 2\)"):
        answer_scores(GRADES, truth, p)
    with pytest.raises(ValueError, match=r"truth and probabilities \[N, 3\], found \(10,\)"):
        answer_scores(FINDINGS, truth, p)
    with pytest.raises(ValueError, match="one value and one answer a case"):
        answer_scores(AGE, truth, p)
    with pytest.raises(ValueError, match="kind segmentation has no scan-level scores"):
        answer_scores(question("segmentation", values=(0, 1)), truth, p)
