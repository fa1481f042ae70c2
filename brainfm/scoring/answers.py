"""Scores of answers for a whole session: a class, several findings, a number.

The functions are small and fast, because a bootstrap asks for them thousands of times; the tests hold them against
scikit-learn. A score that cannot be computed (one class alone, a constant) is NaN, never an exception and never a
number that looks like a result. Cases whose truth is NaN are left out; a case whose answer is not finite makes every
score NaN, because leaving it out would flatter the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Score = Callable[[np.ndarray, np.ndarray], float]

_SMALLEST = 1e-7  # probability that the logarithmic loss still believes: what float32 can tell from 1


def auroc(true: np.ndarray, score: np.ndarray) -> float:
    """The probability that a positive case scores higher than a negative one; ties count half.

    Args:
        true: [N], anything but 0 is positive.
        score: [N], larger for positives; only the order matters.

    Returns:
        In [0, 1]; NaN where there is only one class or a score is NaN.

    Source: Hanley & McNeil 1982, Radiology 143:29 (the Mann-Whitney form).
    """
    positive, score = np.asarray(true) != 0, np.asarray(score)
    high, low = score[positive], np.sort(score[~positive])
    if not high.size or not low.size or np.isnan(score).any():
        return math.nan
    pairs = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(pairs / (2 * high.size * low.size))


def aurocs(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[P]: `auroc` of each column of [N, P]."""
    return np.array([auroc(t, s) for t, s in zip(np.asarray(truth).T, np.asarray(score).T)])


def average_precision(true: np.ndarray, score: np.ndarray) -> float:
    """The mean of the precision over the positives, each at its own threshold; cases that tie share one threshold.

    Args:
        true, score: as in `auroc`.

    Returns:
        In (0, 1]; NaN where there is only one class. Chance gives the share of positives.

    Source: the step-wise sum of scikit-learn's ``average_precision_score``.
    Differs: positives alone are NaN and not 1, no positives NaN and not 0.
    """
    positive = np.asarray(true) != 0
    total = int(positive.sum())
    if total in (0, positive.size):
        return math.nan
    order = np.argsort(-np.asarray(score, dtype=np.float64), kind="stable")
    last = np.append(np.flatnonzero(np.diff(np.asarray(score)[order])), order.size - 1)  # of each run of ties
    found = np.cumsum(positive[order])[last]
    return float(np.sum(np.diff(found, prepend=0) * found / (last + 1)) / total)


def value_scores() -> dict[str, Score]:
    """Of a value: truth and answers [N] or [N, 1] in its unit."""
    return {name: _of_values(score) for name, score in _REGRESSION.items()}


def class_scores(classes: int, ordered: bool = False) -> dict[str, Score]:
    """Of one class of several: truth [N] or [N, 1] the class's place, answers probabilities [N, K]."""
    scores = _EXCLUSIVE | (_ORDINAL if ordered else {})
    return {name: _of_classes(score, classes) for name, score in scores.items()}


def label_scores(labels: Sequence[str]) -> dict[str, Score]:
    """Of several labels: truth [N, T] of 0 and 1, answers probabilities [N, T]; the mean over the labels for which a
    score is defined, and ``<score>/<label>`` for each."""
    table = {name: _macro_of_labels(score, len(labels)) for name, score in _BINARY.items()}
    for name, score in _BINARY.items():
        table |= {f"{name}/{label}": _of_label(score, i, len(labels)) for i, label in enumerate(labels)}
    return table


def _of_values(score: Score) -> Score:
    def wrapped(truth: np.ndarray, answers: np.ndarray) -> float:
        t, a = np.asarray(truth, dtype=np.float64), np.asarray(answers, dtype=np.float64)
        if any(x.shape not in ((len(t),), (len(t), 1)) for x in (t, a)):
            raise ValueError(f"a regression has one value and one answer a case, found {t.shape} and {a.shape}")
        return _on_known(score, t.reshape(-1), a.reshape(-1))

    return wrapped


def _of_classes(score: Score, classes: int) -> Score:
    def wrapped(truth: np.ndarray, answers: np.ndarray) -> float:
        t, p = np.asarray(truth, dtype=np.float64), np.asarray(answers, dtype=np.float64)
        if t.shape not in ((len(p),), (len(p), 1)) or p.shape != (len(t), classes):
            raise ValueError(f"expected truth [N] and probabilities [N, {classes}], found {t.shape} and {p.shape}")
        return _on_known(lambda x, y: score(x.astype(np.int64), y), t.reshape(-1), p)

    return wrapped


def _of_label(score: Score, label: int, labels: int) -> Score:
    def wrapped(truth: np.ndarray, answers: np.ndarray) -> float:
        t, p = np.asarray(truth, dtype=np.float64), np.asarray(answers, dtype=np.float64)
        if t.ndim != 2 or t.shape != p.shape or t.shape[1] != labels:
            raise ValueError(f"expected truth and probabilities [N, {labels}], found {t.shape} and {p.shape}")
        return _on_known(score, t[:, label], p[:, label])

    return wrapped


def _macro_of_labels(score: Score, labels: int) -> Score:
    each = [_of_label(score, label, labels) for label in range(labels)]

    def wrapped(truth: np.ndarray, answers: np.ndarray) -> float:
        values = [one(truth, answers) for one in each]
        answered = np.isfinite(np.asarray(answers)[np.isfinite(np.asarray(truth))]).all()
        return _defined_mean(values) if answered else math.nan

    return wrapped


def _on_known(score: Score, truth: np.ndarray, answers: np.ndarray) -> float:
    known = np.isfinite(truth)
    answers = answers[known]
    return score(truth[known], answers) if answers.size and np.isfinite(answers).all() else math.nan


def _defined_mean(values: Iterable[float]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return float(np.mean(defined)) if defined else math.nan


# truth [N] of class numbers, probabilities [N, K]


def _class_auroc(truth: np.ndarray, p: np.ndarray) -> float:
    return _one_against_rest(auroc, truth, p)


def _class_average_precision(truth: np.ndarray, p: np.ndarray) -> float:
    return _one_against_rest(average_precision, truth, p)


def _one_against_rest(score: Score, truth: np.ndarray, p: np.ndarray) -> float:
    classes = [1] if p.shape[1] == 2 else range(p.shape[1])
    return _defined_mean(score(truth == k, p[:, k]) for k in classes)


def _class_balanced_accuracy(truth: np.ndarray, p: np.ndarray) -> float:
    right = p.argmax(axis=1) == truth
    number = np.bincount(truth, minlength=p.shape[1])
    present = number > 0
    if present.sum() < 2:
        return math.nan
    return float(np.mean(np.bincount(truth, weights=right, minlength=p.shape[1])[present] / number[present]))


def _class_f1(truth: np.ndarray, p: np.ndarray) -> float:
    """Over the classes that occur in the truth or in the answers, as scikit-learn has it."""
    k = p.shape[1]
    predicted = p.argmax(axis=1)
    hit = np.bincount(truth[predicted == truth], minlength=k)
    either = np.bincount(truth, minlength=k) + np.bincount(predicted, minlength=k)
    return float(np.mean(2 * hit[either > 0] / either[either > 0]))


def _class_accuracy(truth: np.ndarray, p: np.ndarray) -> float:
    return float(np.mean(p.argmax(axis=1) == truth))


def _class_log_loss(truth: np.ndarray, p: np.ndarray) -> float:
    return float(-np.mean(np.log(np.clip(p[np.arange(len(p)), truth], _SMALLEST, 1.0))))


def _class_brier(truth: np.ndarray, p: np.ndarray) -> float:
    squares = (p - np.eye(p.shape[1])[truth]) ** 2
    return float(np.mean(squares[:, 1] if p.shape[1] == 2 else squares.sum(axis=1)))


def _quadratic_kappa(truth: np.ndarray, p: np.ndarray) -> float:
    k = p.shape[1]
    places = np.arange(k)
    weights = (places[:, None] - places[None]) ** 2
    observed = np.bincount(truth * k + p.argmax(axis=1), minlength=k * k).reshape(k, k)
    expected = np.outer(observed.sum(axis=1), observed.sum(axis=0)) / len(truth)
    by_chance = float((weights * expected).sum())
    return 1.0 - float((weights * observed).sum()) / by_chance if by_chance > 0 else math.nan


def _mae_steps(truth: np.ndarray, p: np.ndarray) -> float:
    return float(np.mean(np.abs(p.argmax(axis=1) - truth)))


# truth [N] of 0 and 1, probability [N]


def _as_classes(score: Score) -> Score:
    return lambda truth, p: score((truth != 0).astype(np.int64), np.stack([1 - p, p], axis=1))


def _label_f1(truth: np.ndarray, p: np.ndarray) -> float:
    """Of the finding alone: absence is no success."""
    found, present = p >= 0.5, truth != 0
    either = int(found.sum()) + int(present.sum())
    return 2.0 * int((found & present).sum()) / either if either else math.nan


def _label_accuracy(truth: np.ndarray, p: np.ndarray) -> float:
    return float(np.mean((p >= 0.5) == (truth != 0)))


def _label_balanced_accuracy(truth: np.ndarray, p: np.ndarray) -> float:
    found, present = p >= 0.5, truth != 0
    if present.all() or not present.any():
        return math.nan
    return float((np.mean(found[present]) + np.mean(~found[~present])) / 2)


# truth [N], answers [N] in the unit


def _r(truth: np.ndarray, answers: np.ndarray) -> float:
    if not (_varies(truth) and _varies(answers)):
        return math.nan
    return float(np.clip(np.corrcoef(truth, answers)[0, 1], -1.0, 1.0))


def _r2(truth: np.ndarray, answers: np.ndarray) -> float:
    if not _varies(truth):
        return math.nan
    return 1.0 - float(np.sum((answers - truth) ** 2) / np.sum((truth - truth.mean()) ** 2))


def _slope(truth: np.ndarray, answers: np.ndarray) -> float:
    if not _varies(truth):
        return math.nan
    centred = truth - truth.mean()
    return float(np.sum(centred * answers) / np.sum(centred**2))


def _varies(values: np.ndarray) -> bool:
    return bool(np.ptp(values) > 1e-12 * max(1.0, float(np.abs(values).max())))


_EXCLUSIVE: dict[str, Score] = {
    "auroc": _class_auroc,
    "average_precision": _class_average_precision,
    "balanced_accuracy": _class_balanced_accuracy,
    "f1": _class_f1,
    "accuracy": _class_accuracy,
    "log_loss": _class_log_loss,
    "brier": _class_brier,
}
_ORDINAL: dict[str, Score] = {"quadratic_kappa": _quadratic_kappa, "mae_steps": _mae_steps}
_BINARY: dict[str, Score] = {
    "auroc": auroc,
    "average_precision": average_precision,
    "balanced_accuracy": _label_balanced_accuracy,
    "f1": _label_f1,
    "accuracy": _label_accuracy,
    "log_loss": _as_classes(_class_log_loss),
    "brier": _as_classes(_class_brier),
}
_REGRESSION: dict[str, Score] = {
    "mae": lambda t, a: float(np.mean(np.abs(a - t))),
    "rmse": lambda t, a: float(np.sqrt(np.mean((a - t) ** 2))),
    "r": _r,
    "r2": _r2,
    "bias": lambda t, a: float(np.mean(a - t)),
    "slope": _slope,
}
