"""Calibration on simulated answers whose truth is known, and against naive loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit, softmax

from brainfm.scoring.calibration import (
    apply_bias,
    apply_temperature,
    conformal_quantile,
    cross_fitted,
    expected_calibration_error,
    fit_bias,
    fit_temperature,
    logits_of,
    reliability,
)


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibrated logits [n, classes], and classes drawn from what they say."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n, classes))
    p = softmax(logits, axis=1)
    return logits, (rng.random((n, 1)) > p.cumsum(axis=1)).sum(axis=1)


def log_loss(p: np.ndarray, truth: np.ndarray) -> float:
    return float(-np.log(p[np.arange(len(p)), truth]).mean())


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_the_temperature_of_too_sure_and_too_shy_models_is_found(factor: float) -> None:
    logits, truth = drawn(6000, 3, 0)
    assert fit_temperature(logits * factor, truth[:, None], "exclusive") == pytest.approx(factor, rel=0.06)
    rng = np.random.default_rng(1)
    odds = rng.normal(0, 1.5, (3000, 4))
    found = (rng.random(odds.shape) < expit(odds)).astype(float)
    found[rng.random(found.shape) < 0.3] = np.nan
    assert fit_temperature(odds * factor, found, "multilabel") == pytest.approx(factor, rel=0.06)


def test_the_temperature_is_the_best_of_a_grid() -> None:
    logits, truth = drawn(60, 4, 2)
    logits = logits * 1.7
    found = fit_temperature(logits, truth, "ordinal")
    losses = {t: log_loss(softmax(logits / t, axis=1), truth) for t in np.geomspace(0.05, 20, 400)}
    assert log_loss(softmax(logits / found, axis=1), truth) <= min(losses.values()) + 1e-9


def test_the_temperature_has_bounds_and_a_default() -> None:
    right, classes = np.eye(2)[[0, 1, 0, 1]], np.array([0, 1, 0, 1])
    assert fit_temperature(right, classes, "exclusive") == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(right, 1 - classes, "exclusive") == pytest.approx(20, rel=1e-3)
    assert fit_temperature(right, np.full(4, np.nan), "exclusive") == 1
    assert fit_temperature(right, np.full((4, 2), np.nan), "multilabel") == 1


def test_probabilities_carry_the_temperature_as_logits_do() -> None:
    logits, truth = drawn(500, 3, 3)
    p = softmax(logits, axis=1)
    assert apply_temperature(p, 2.5, "exclusive") == pytest.approx(softmax(logits / 2.5, axis=1))
    assert apply_temperature(p, 1.0, "exclusive") == pytest.approx(p)
    assert apply_temperature(expit(logits), 0.5, "multilabel") == pytest.approx(expit(2 * logits))
    from_p = fit_temperature(logits_of(p, "exclusive"), truth, "exclusive")
    assert from_p == pytest.approx(fit_temperature(logits, truth, "exclusive"), rel=1e-3)
    sure = apply_temperature(np.array([[1.0, 0.0]]), 2.0, "exclusive")
    assert np.isfinite(sure).all() and 0.99 < sure[0, 0] < 1
    with pytest.raises(ValueError, match=r"temperature of 0\.0: expected a number above 0"):
        apply_temperature(p, 0.0, "exclusive")


def test_calibration_error_against_a_loop() -> None:
    logits, truth = drawn(300, 3, 4)
    p = softmax(logits * 2, axis=1)
    total = 0.0
    for number in range(10):
        inside = [i for i in range(300) if number / 10 < p[i].max() <= (number + 1) / 10]
        if inside:
            confidence = sum(p[i].max() for i in inside) / len(inside)
            share = sum(p[i].argmax() == truth[i] for i in inside) / len(inside)
            total += len(inside) / 300 * abs(confidence - share)
    assert expected_calibration_error(p, truth) == pytest.approx(total)
    assert total > 0.1 > expected_calibration_error(softmax(logits, axis=1), truth)
    rows = reliability(p, truth, 10)
    assert sum(row.n for row in rows) == 300
    assert all(row.confidence > row.right for row in rows if row.n > 20)  # it is too sure


def test_calibration_error_of_events_against_a_loop() -> None:
    rng = np.random.default_rng(5)
    p = np.round(rng.random((80, 2)), 1)  # on the edges of the bins
    truth = (rng.random(p.shape) < p**2).astype(float)
    truth[rng.random(p.shape) < 0.1] = np.nan
    pairs = [(q, t) for q, t in zip(p.ravel(), truth.ravel()) if not math.isnan(t)]
    total = 0.0
    for number in range(5):
        inside = [(q, t) for q, t in pairs if (number / 5 < q <= (number + 1) / 5) or (number == 0 and q == 0)]
        total += abs(sum(q - t for q, t in inside)) / len(pairs)
    assert expected_calibration_error(p, truth, bins=5) == pytest.approx(total)
    assert expected_calibration_error(p.ravel(), truth.ravel(), bins=5) == pytest.approx(total)


def test_calibration_error_of_nothing_of_few_and_of_nonsense() -> None:
    assert math.isnan(expected_calibration_error(np.ones((3, 2)) / 2, np.full(3, np.nan)))
    assert expected_calibration_error(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0])) == 0
    rng = np.random.default_rng(6)
    few = [expected_calibration_error(p, rng.random(40) < p) for p in rng.beta(2, 2, (200, 40))]
    assert np.mean(few) == pytest.approx(0.15, abs=0.02)  # as the docstring says
    with pytest.raises(ValueError, match="probabilities from 0 to 1"):
        expected_calibration_error(np.array([1.2]), np.array([1.0]))
    with pytest.raises(ValueError, match="truth for each case or each probability"):
        expected_calibration_error(np.ones((3, 2)), np.ones(4))


def test_the_pull_to_the_mean_is_found_and_undone() -> None:
    rng = np.random.default_rng(7)
    age = rng.uniform(20, 80, 400)
    answer = 20 + 0.6 * age + rng.normal(0, 4, 400)
    a, b = fit_bias(age[:, None], answer)
    slope, intercept = np.polyfit(age, answer, 1)
    assert (a, b) == pytest.approx((intercept, slope))
    corrected = apply_bias(answer, (a, b))
    assert np.polyfit(age, corrected - age, 1) == pytest.approx([0, 0], abs=1e-8)
    assert np.abs(corrected - age).mean() < np.abs(answer - age).mean()


def test_lines_that_cannot_be_drawn_change_nothing() -> None:
    age = np.linspace(20, 80, 7)
    assert fit_bias(age, 20 + 0.6 * age) == (0.0, 1.0)
    assert fit_bias(np.full(20, 50.3), np.arange(20.0)) == (0.0, 1.0)
    assert fit_bias(np.append(age, np.nan), np.append(age, 3.0)) == (0.0, 1.0)  # the eighth is unknown
    a, b = fit_bias(np.linspace(20, 80, 30), np.full(30, 50.0))  # says the mean to everybody
    assert b == 0.1 and apply_bias(np.array([50.0]), (a, b)) == pytest.approx(50.0)


def test_the_conformal_rank_by_hand() -> None:
    residuals = np.array([-3.0, 1.0, 2.0, 9.0, -4.0, 5.0, 6.0, 7.0, -8.0])
    assert conformal_quantile(residuals, 0.9) == 9  # the 9th of 9
    assert conformal_quantile(residuals, 0.5) == 5  # the 5th
    assert conformal_quantile(residuals[:8], 0.9) == math.inf
    assert conformal_quantile(np.array([]), 0.9) == math.inf
    assert conformal_quantile(np.arange(1.0, 100.0), 0.55) == 55  # 100 * 0.55 is not quite 55 in a computer
    with pytest.raises(ValueError, match="level between 0 and 1"):
        conformal_quantile(residuals, 1.0)
    with pytest.raises(ValueError, match="residuals without NaN"):
        conformal_quantile(np.array([1.0, np.nan]), 0.9)


@pytest.mark.parametrize(("n", "level"), [(19, 0.9), (40, 0.9), (50, 0.8)])
def test_conformal_intervals_hold_the_truth_as_often_as_they_say(n: int, level: float) -> None:
    """Skewed errors, many cohorts: the share inside lies between level and level + 1 / (n + 1)."""
    rng = np.random.default_rng(8)
    inside = []
    for _ in range(4000):
        width = conformal_quantile(rng.gamma(1.0, 3.0, n), level)
        inside.append(rng.gamma(1.0, 3.0) <= width)
    noise = 3 * math.sqrt(level * (1 - level) / 4000)
    assert level - noise <= np.mean(inside) <= level + 1 / (n + 1) + noise


def test_each_fold_is_corrected_by_the_others() -> None:
    rng = np.random.default_rng(9)
    truth, fold = rng.normal(size=30), rng.permutation(np.repeat(["a", "b", "c"], 10))
    predicted = truth + np.array([{"a": 1.0, "b": 2.0, "c": 6.0}[f] for f in fold])
    found = cross_fitted(lambda t, p: (p - t).mean(), lambda p, shift: p - shift, truth, predicted, fold)
    expected = truth + [{"a": 1 - 4, "b": 2 - 3.5, "c": 6 - 1.5}[f] for f in fold]
    assert found == pytest.approx(expected)


def test_other_repeats_of_a_subject_teach_nothing_about_it() -> None:
    """Two repeats: the corrections of each fold are fitted to subjects that are not in it, in neither repeat."""
    subjects = [f"s{i}" for i in range(6)] * 2
    fold = np.array([0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 2, 3])
    truth = np.arange(12.0)
    held: list[set[int]] = []

    def fit(t: np.ndarray, p: np.ndarray) -> set[str]:
        return {subjects[int(i)] for i in t}

    def apply(p: np.ndarray, taught: set[str]) -> np.ndarray:
        own = {subjects[int(i)] for i in p}
        assert taught and not own & taught
        held.append({int(i) for i in p})
        return p

    assert cross_fitted(fit, apply, truth, truth, fold, groups=subjects) == pytest.approx(truth)
    assert len(held) == 4
    with pytest.raises(AssertionError):
        cross_fitted(fit, apply, truth, truth, fold)


def test_cross_fitted_temperature_helps_where_the_model_is_too_sure() -> None:
    logits, truth = drawn(200, 2, 10)
    p = softmax(4 * logits, axis=1)
    fold = np.arange(200) % 5
    found = cross_fitted(
        lambda t, q: fit_temperature(logits_of(q, "exclusive"), t, "exclusive"),
        lambda q, temperature: apply_temperature(q, temperature, "exclusive"),
        truth,
        p,
        fold,
    )
    assert found.shape == p.shape and found.sum(axis=1) == pytest.approx(np.ones(200))
    assert log_loss(found, truth) < log_loss(p, truth) - 0.2
    assert log_loss(found, truth) == pytest.approx(log_loss(softmax(logits, axis=1), truth), abs=0.03)
    assert (found.argmax(axis=1) == p.argmax(axis=1)).all()


def test_one_fold_has_nobody_to_learn_from() -> None:
    ones = np.ones(4)
    with pytest.raises(ValueError, match="two or more folds, found 1"):
        cross_fitted(fit_bias, apply_bias, ones, ones, np.zeros(4))
    with pytest.raises(ValueError, match="fold 0 holds every subject"):
        cross_fitted(fit_bias, apply_bias, ones, ones, np.array([0, 0, 1, 1]), groups=["a", "b", "a", "b"])


def test_logits_and_truth_must_belong_together() -> None:
    with pytest.raises(ValueError, match=r"logits \[N, K\] and truth \[N\], found \(3, 2\) and \(4,\)"):
        fit_temperature(np.zeros((3, 2)), np.zeros(4), "exclusive")
    with pytest.raises(ValueError, match="logits and truth of one shape"):
        fit_temperature(np.zeros((3, 2)), np.zeros(3), "multilabel")
    with pytest.raises(ValueError, match="one number a case"):
        fit_bias(np.zeros((3, 2)), np.zeros(3))
