"""Calibration: probabilities that come true as often as they claim, ages without a pull to the mean, intervals that
hold the truth.

Everything here is learned from cases that the model was not trained on, and scored on others again (`cross_fitted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

_COOLEST, _HOTTEST = 0.05, 20.0
_SMALLEST = 1e-7  # probability whose logarithm is taken: what float32 can tell from 1
_FEW = 8  # cases from which no line is drawn
_FLATTEST = 0.1  # slope that is still undone: a flatter line would blow noise up more than tenfold


class Reliability(NamedTuple):
    """The answers of one bin: what they claimed on average, how often they were right, how many they are."""

    confidence: float
    right: float
    n: int


def logits_of(probabilities: np.ndarray, mode: str) -> np.ndarray:
    """The logarithms that a temperature divides: of each class, or of the odds where ``mode`` is ``multilabel``."""
    p = np.clip(np.asarray(probabilities, dtype=np.float64), _SMALLEST, 1 - _SMALLEST)
    return np.log(p) - np.log1p(-p) if mode == "multilabel" else np.log(p)


def fit_temperature(logits: np.ndarray, truth: np.ndarray, mode: str) -> float:
    """The number that logits are divided by so that the probabilities of cases held out become likeliest.

    Above 1 the model was too sure, below 1 not sure enough; the order of the answers stays. A model that is right
    everywhere is pushed to the lowest temperature: a handful of cases cannot show how wrong it may be, so keep the
    result only where it helps on further cases (`cross_fitted`).

    Args:
        logits: [N, K], or [N, T] for ``multilabel``; of an ensemble `logits_of` its mean probabilities.
        truth: [N] or [N, 1] class numbers, or [N, T] 0 or 1; NaN is left out.
        mode: of the TaskSpec; ``ordinal`` classes are calibrated as exclusive ones.

    Returns:
        From 0.05 to 20; 1 where no truth is known.

    Raises:
        ValueError: where the shapes do not belong together.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2. The likelihood has one peak in the inverse temperature.
    """
    x, t = _pair(logits, truth, mode)
    known = np.isfinite(t)
    if not known.any():
        return 1.0
    if mode == "multilabel":
        signed = np.where(t[known] != 0, x[known], -x[known])
        classes = None
    else:
        signed = x[known]
        classes = t[known].astype(np.int64)[:, None]

    def loss(log_temperature: float) -> float:
        scaled = signed / math.exp(log_temperature)
        if classes is None:
            return -float(log_expit(scaled).mean())
        return -float(np.take_along_axis(log_softmax(scaled, axis=1), classes, axis=1).mean())

    found = minimize_scalar(
        loss, bounds=(math.log(_COOLEST), math.log(_HOTTEST)), method="bounded", options={"xatol": 1e-5}
    )
    return float(np.clip(math.exp(found.x), _COOLEST, _HOTTEST))


def apply_temperature(probabilities: np.ndarray, temperature: float, mode: str) -> np.ndarray:
    """Probabilities of the same shape whose logarithms (or log odds) were divided by the temperature.

    Args:
        probabilities: [N, K] summing to 1, or [N, T] for ``multilabel``; any leading axes.
        temperature: > 0; 1 changes nothing but values within 1e-7 of 0 and 1.
        mode: of the TaskSpec.

    Raises:
        ValueError: where the temperature is not a positive number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"a temperature of {temperature}: expected a number above 0")
    scaled = logits_of(probabilities, mode) / temperature
    return expit(scaled) if mode == "multilabel" else softmax(scaled, axis=-1)


def reliability(prob: np.ndarray, truth: np.ndarray, bins: int = 10) -> list[Reliability]:
    """The rows of a reliability diagram; bins without answers are left out.

    Args:
        prob: probabilities of classes [N, K] with ``truth`` [N] or [N, 1]: the answer is the most probable class, its
            probability the confidence. Or probabilities of events [N] or [N, T] with ``truth`` of the same shape: then
            the claim is the probability of the event, and right is how often it happened.
        truth: class numbers, or 0 and 1; NaN is left out.
        bins: of equal width over [0, 1], closed on the right.

    Raises:
        ValueError: where the shapes do not belong together, a probability lies outside [0, 1], or there is no bin.

    Source: Guo et al. 2017, section 2, figure 1; events as in Niculescu-Mizil & Caruana 2005 (ICML).
    """
    claimed, right = _claims(prob, truth)
    if bins < 1 or not ((claimed >= 0) & (claimed <= 1)).all():
        raise ValueError(f"expected probabilities from 0 to 1 and one or more bins, found {bins} bins")
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], claimed)
    rows = []
    for number in range(bins):
        here = place == number
        if here.any():
            rows.append(Reliability(float(claimed[here].mean()), float(right[here].mean()), int(here.sum())))
    return rows


def expected_calibration_error(prob: np.ndarray, truth: np.ndarray, bins: int = 10) -> float:
    """The mean distance between claim and success over the bins of `reliability`, each weighted by its answers.

    With few cases it is biased upwards: 40 answers of a perfectly calibrated model give about 0.15 in ten bins.

    Args:
        prob, truth, bins: as in `reliability`.

    Returns:
        In [0, 1]; NaN where no truth is known.

    Source: Naeini et al. 2015 (AAAI); Guo et al. 2017, eq. 3.
    """
    rows = reliability(prob, truth, bins)
    total = sum(row.n for row in rows)
    return sum(row.n * abs(row.confidence - row.right) for row in rows) / total if total else math.nan


def fit_bias(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """The line predicted = a + b truth, by least squares: networks answer the young too old and the old too young.

    Args:
        truth, predicted: [N] or [N, 1] in one unit; cases without a finite value of both are left out.

    Returns:
        (a, b) with b at least 0.1; (0, 1), which changes nothing, for fewer than 8 cases or a constant truth.

    Source: Cole et al. 2018, Mol. Psychiatry 23:1385, as compared in de Lange & Cole 2020, NeuroImage Clin. 26:102229.
    Differs: the slope is floored, and the line then goes through the mean of both.
    """
    t, p = _column(truth), _column(predicted)
    known = np.isfinite(t) & np.isfinite(p)
    t, p = t[known], p[known]
    if t.size < _FEW or np.ptp(t) <= 1e-12 * max(1.0, float(np.abs(t).max())):
        return 0.0, 1.0
    centred = t - t.mean()
    b = max(float(np.sum(centred * p) / np.sum(centred**2)), _FLATTEST)
    return float(p.mean() - b * t.mean()), b


def apply_bias(x: np.ndarray, line: tuple[float, float]) -> np.ndarray:
    """(x - a) / b: answers without the pull to the mean, and with errors that are 1 / b as large otherwise."""
    a, b = line
    return (np.asarray(x, dtype=np.float64) - a) / b


def conformal_quantile(residuals: np.ndarray, level: float = 0.9) -> float:
    """Half the width of an interval around an answer that holds the truth with at least this probability.

    Holds for any model and any distribution, on average over cohorts, where the model was fitted to none of these
    cases and new ones are exchangeable with them. Out-of-fold residuals come close, but then nothing is
    proven: even CV+, which keeps the model of each fold, promises only 2 level - 1.

    Args:
        residuals: [N] errors of cases that the model was not fitted to; their size counts, not their sign.
        level: in (0, 1).

    Returns:
        The ceil((N + 1) level)-th smallest; infinite where there are too few: fewer than 9 cases for 0.9.

    Raises:
        ValueError: where the level is outside (0, 1) or a residual is NaN.

    Source: Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World (2005); Lei et al. 2018, JASA 113:1094,
        algorithm 2 (split conformal); CV+: Barber et al. 2021, Ann. Statist. 49:486.
    """
    sizes = np.sort(np.abs(_column(residuals)))
    if not 0 < level < 1 or np.isnan(sizes).any():
        raise ValueError(f"expected a level between 0 and 1 and residuals without NaN, found {level}")
    rank = math.ceil((sizes.size + 1) * level - 1e-9)  # 100 * 0.55 is a little more than 55
    return float(sizes[rank - 1]) if rank <= sizes.size else math.inf


def cross_fitted(
    fit: Callable[[np.ndarray, np.ndarray], Any],
    apply: Callable[[np.ndarray, Any], np.ndarray],
    truth: np.ndarray,
    predicted: np.ndarray,
    fold: np.ndarray,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Out-of-fold answers, those of each fold corrected with what the answers of the other folds teach.

    What is measured on the result is what the correction does to cases it has not seen.

    Args:
        fit: (truth, predicted) -> anything, e.g. `fit_bias`, or
            ``lambda t, p: fit_temperature(logits_of(p, mode), t, mode)``.
        apply: (predicted, what was fitted) -> corrected, a row a case, e.g. `apply_bias`.
        truth, predicted: one row a case.
        fold: [N] of each case; two or more different ones.
        groups: the subject of each case. Nothing is learned from other answers to the subjects that are corrected;
            without groups, and in a repeated cross-validation, a subject's other repeats would teach its own.

    Raises:
        ValueError: where there is only one fold, the lengths differ, or all subjects are in one of the folds.
    """
    truth, predicted, fold = np.asarray(truth), np.asarray(predicted), np.asarray(fold)
    names = np.unique(fold)
    if fold.shape != (len(truth),) or len(truth) != len(predicted) or names.size < 2:
        raise ValueError(f"expected a fold for each case and two or more folds, found {names.size} of {fold.shape}")
    subject = np.arange(len(truth)) if groups is None else np.asarray(groups)
    corrected: list[np.ndarray] = []
    for name in names:
        held = fold == name
        others = ~np.isin(subject, subject[held])
        if not others.any():
            raise ValueError(f"fold {name} holds every subject: expected others to learn from")
        corrected.append(np.asarray(apply(predicted[held], fit(truth[others], predicted[others]))))
    rows = np.concatenate([np.flatnonzero(fold == name) for name in names])
    return np.concatenate(corrected)[np.argsort(rows)]


def _pair(logits: np.ndarray, truth: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    x, t = np.asarray(logits, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if mode == "multilabel":
        if x.shape != t.shape:
            raise ValueError(f"expected logits and truth of one shape, found {x.shape} and {t.shape}")
        return x, t
    if x.ndim != 2 or t.shape not in ((len(x),), (len(x), 1)):
        raise ValueError(f"expected logits [N, K] and truth [N], found {x.shape} and {t.shape}")
    return x, t.reshape(-1)


def _claims(prob: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What was claimed and whether it came true, flat, without what is unknown."""
    p, t = np.asarray(prob, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if p.shape == t.shape:
        known = np.isfinite(t)
        return p[known], t[known]
    if p.ndim != 2 or t.shape not in ((len(p),), (len(p), 1)):
        raise ValueError(f"expected truth for each case or each probability, found {t.shape} for {p.shape}")
    t = t.reshape(-1)
    known = np.isfinite(t)
    return p[known].max(axis=1), (p[known].argmax(axis=1) == t[known]).astype(np.float64)


def _column(values: np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64)
    if column.shape not in ((len(column),), (len(column), 1)):
        raise ValueError(f"expected one number a case, found shape {column.shape}")
    return column.reshape(-1)
