"""Linear models and nearest neighbours on frozen features, tuned and scored by subject.

Everything that is learnt, the scaling of the features included, is learnt on the training side of a fold; the
strength of a model is chosen by a second cross-validation inside that side. All of it is a function of the rows, the
folds and a seed, on one thread, so that a table is the same to the last digit wherever it is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, softmax

from brainfm.scoring.folds import folds_by_answer

KINDS = ("logistic", "ridge", "knn")
# Strengths are those of rows scaled to a mean square length of 1, strongest penalty first: they mean the same for
# three features and for a thousand.
LOGISTIC = tuple(10.0**e for e in range(-2, 4))  # 1 / penalty
_RIDGE = tuple(10.0 ** (e / 2) for e in range(8, -9, -1))
_NEIGHBOURS = (41, 25, 15, 9, 5, 3, 1)
_STRENGTHS: dict[str, Sequence[float]] = {"logistic": LOGISTIC, "ridge": _RIDGE, "knn": _NEIGHBOURS}
_INNER = 5
_ENOUGH = 5  # subjects, before a penalty can be chosen among them
_NEWTON = 50  # steps at most
_TOLERANCE = 1e-4  # of L-BFGS, as scikit-learn has it
_LEAST = 1e-6  # a probability, where its logarithm is taken

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # training x, training y, other x -> answers


@dataclass(frozen=True)
class Tuned:
    """What a tuned model answers.

    Attributes:
        answers: [M, K] probabilities or [M] values.
        strength: that was chosen: 1 / penalty (logistic), penalty (ridge) or neighbours (knn).
    """

    answers: np.ndarray
    strength: float


def nested(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str],
    folds: Sequence[Sequence[str]],
    kind: str = "logistic",
    seed: int = 0,
    *,
    classes: int | None = None,
    balanced: bool = True,
    inner: int = _INNER,
) -> np.ndarray:
    """What a model answers for each row, fitted and tuned on the folds that the row's subject is not in.

    Args:
        x: [N, F] features, finite.
        y: [N]; whole numbers 0..K-1 are classes (always with ``logistic``; with ``knn`` where the type is an integer
            one), else values.
        groups: [N] the subject of each row.
        folds: subjects; each of ``groups`` in exactly one. Subjects without a row may be named.
        kind: ``logistic`` (multinomial, L2), ``ridge``, or ``knn``.
        seed: of the inner folds.
        classes: K, where not all of them need be in ``y``.
        balanced: whether every class counts alike, however many rows it has.
        inner: folds of the tuning, fewer where there are fewer subjects.

    Returns:
        [N, K] probabilities of the classes, float64; or [N] values.

    Raises:
        ValueError: where the kind is unknown, lengths differ, a feature is not finite, or a subject is in no fold or in
            two.

    Source: Varma & Simon 2006 (BMC Bioinformatics 7:91): tuning inside the training side of each fold.
    """
    y, classes = _answers_of(y, kind, classes)
    by_fold = _held(groups, folds)

    def fit(train: np.ndarray, other: np.ndarray, away: np.ndarray) -> np.ndarray:
        theirs = [group for group, is_away in zip(groups, away) if not is_away]
        return _tuned(train, y[~away], theirs, other, kind, seed, classes, balanced, inner).answers

    return _over(_matrix(x, len(y)), by_fold, fit, (len(y),) if classes is None else (len(y), classes))


def tuned(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str],
    other: np.ndarray,
    kind: str = "logistic",
    seed: int = 0,
    *,
    classes: int | None = None,
    balanced: bool = True,
    inner: int = _INNER,
) -> Tuned:
    """What a model fitted on rows ``x`` [N, F], and tuned among them by subject, answers for rows ``other`` [M, F].

    The other arguments and what is raised are `nested`'s.
    """
    y, classes = _answers_of(y, kind, classes)
    return _tuned(_matrix(x, len(y)), y, list(groups), _matrix(other, len(other)), kind, seed, classes, balanced, inner)


def crossed(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], folds: Sequence[Sequence[str]], fit: Fit
) -> np.ndarray:
    """What ``fit`` answers for each row when it has seen none of that subject's; it is given `prepared` rows."""

    def call(train: np.ndarray, other: np.ndarray, away: np.ndarray) -> np.ndarray:
        train, other = prepared(train, other)
        return fit(train, y[~away], other)

    return _over(_matrix(x, len(y)), _held(groups, folds), call, (len(y),))


# -------------------------------------------------------------------------------------------------------- the models


def logistic(
    train: np.ndarray, y: np.ndarray, other: np.ndarray, classes: int, strengths: Sequence[float] = (1.0,),
    balanced: bool = True,
) -> np.ndarray:  # fmt: skip
    """[S, M, K] probabilities of a multinomial regression for each 1 / penalty of ``strengths``.

    Args:
        train, other: `prepared` rows.
        y: [N] integers below ``classes``; a class that is not among them gets probability 0.
        balanced: whether every class counts alike.
    """
    found = np.zeros((len(strengths), len(other), classes))
    seen, place = np.unique(y, return_inverse=True)
    if len(seen) == 1:
        found[:, :, seen[0]] = 1
        return found
    thetas = fit_logistic(train, place, row_weights(y, classes, balanced), strengths)
    if len(seen) == 2:
        right = expit(np.stack([other @ theta[:-1] + theta[-1] for (theta,) in thetas]))
        found[:, :, seen] = np.stack([1 - right, right], axis=2)
    else:
        found[:, :, seen] = softmax([other @ theta[:, :-1].T + theta[:, -1] for theta in thetas], axis=2)
    return found


def row_weights(y: np.ndarray, classes: int, balanced: bool) -> np.ndarray:
    """[N] with the sum N: every class counts alike, or every row."""
    weight = 1 / np.bincount(y, minlength=classes)[y] if balanced else np.ones(len(y))
    return weight * len(y) / weight.sum()


def fit_logistic(
    rows: np.ndarray, y: np.ndarray, weight: np.ndarray, strengths: Sequence[float] = (1.0,), *,
    tolerance: float | None = None, steps: int = 500,
) -> list[np.ndarray]:  # fmt: skip
    """Logistic regressions with an L2 penalty, one for each 1 / penalty: what every logistic answer here is fitted by.

    Two classes by Newton's method, which goes to the optimum: on up to 128 rows of up to 30 features 5 to 16 times as
    quick as scikit-learn's solvers, and equally quick with 128 (scripts/benchmark/logistic.py; their probabilities are
    off by up to .01 where they stop). More classes, or where a tolerance lets a fit stop early, by scikit-learn's
    L-BFGS. Each fit begins at the one before.

    Args:
        rows: [N, F].
        y: [N] integers from 0 to K - 1, K at least 2, each of them there.
        weight: [N] of the rows.
        strengths: 1 / penalty, strongest penalty first.
        tolerance: at which L-BFGS stops; None: scikit-learn's own, and the optimum for two classes.
        steps: of L-BFGS at most.

    Returns:
        Of each strength the weights and, last, the intercept: [1, F + 1] of class 1 against class 0, or [K, F + 1].
    """
    if y.max() == 1 and tolerance is None:
        return [theta[None] for theta in _to_the_optimum(rows, y == 1, weight, strengths)]
    return _by_lbfgs(rows, y, weight, strengths, _TOLERANCE if tolerance is None else tolerance, steps)


def _to_the_optimum(
    rows: np.ndarray, true: np.ndarray, weight: np.ndarray, strengths: Sequence[float]
) -> list[np.ndarray]:
    """For each strength the weights and the intercept [F + 1], by Newton's method, whose steps are halved where they
    lead uphill."""
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    shrunk = np.append(np.ones(rows.shape[1] - 1), 1e-9)  # the intercept is free; the trace keeps the system solvable

    def objective(theta: np.ndarray, strength: float) -> float:
        z = rows @ theta
        return float(strength * (weight * (np.logaddexp(0, z) - true * z)).sum() + 0.5 * (shrunk * theta**2).sum())

    theta, found = np.zeros(rows.shape[1]), []
    for strength in strengths:  # from the stronger penalty's answer: a path costs little more than its last step
        value = objective(theta, strength)
        for _ in range(_NEWTON):
            p = expit(rows @ theta)
            gradient = strength * (weight * (p - true)) @ rows + shrunk * theta
            curvature = (rows * (strength * weight * p * (1 - p))[:, None]).T @ rows + np.diag(shrunk)
            step = np.linalg.solve(curvature, gradient)
            length = 1.0
            while length > 1e-6 and (new := objective(theta - length * step, strength)) > value:
                length /= 2
            if length <= 1e-6:
                break
            theta = theta - length * step
            done, value = value - new <= 1e-10 * abs(value), new
            if done:
                break
        found.append(theta)
    return found


def _by_lbfgs(
    rows: np.ndarray, y: np.ndarray, weight: np.ndarray, strengths: Sequence[float], tolerance: float, steps: int
) -> list[np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    model, found = LogisticRegression(max_iter=steps, tol=tolerance, warm_start=True), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: a fit that stops early is an answer too
        for strength in strengths:
            model.set_params(C=strength).fit(rows, y, weight)
            found.append(np.column_stack([model.coef_, model.intercept_]))
    return found


def ridge(train: np.ndarray, y: np.ndarray, other: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """[S, M] values of a ridge regression with a free intercept for each of the penalties."""
    mean, centre = y.mean(), train.mean(axis=0)
    left, singular, right = np.linalg.svd(train - centre, full_matrices=False)
    onto, turned = left.T @ (y - mean), (other - centre) @ right.T
    return np.stack([mean + turned @ (singular / (singular**2 + penalty) * onto) for penalty in penalties])


def neighbours(
    train: np.ndarray, y: np.ndarray, other: np.ndarray, counts: Sequence[int], classes: int | None = None,
    balanced: bool = True,
) -> np.ndarray:  # fmt: skip
    """The share of each class [S, M, K], or the mean value [S, M], of the ``counts`` nearest rows (Euclidean).

    Args:
        classes: K; None where ``y`` are values.
        balanced: whether a vote of a rare class weighs as much more as it is rarer.
    """
    distance = (train**2).sum(axis=1) - 2 * other @ train.T  # but for a constant of each row
    near = np.argsort(distance, axis=1, kind="stable")
    if classes is None:
        votes = y[near][..., None]
    else:
        frequency = np.bincount(y, minlength=classes)
        weight = 1 / np.maximum(frequency, 1) if balanced else np.ones(classes)
        votes = (np.eye(classes) * weight)[y][near]
    sums = votes.cumsum(axis=1)[:, [min(count, len(y)) - 1 for count in counts]].swapaxes(0, 1)
    if classes is None:
        return sums[..., 0] / np.minimum(counts, len(y))[:, None]
    return sums / sums.sum(axis=2, keepdims=True)


def prepared(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both `standardised`, and `rotated` where there are fewer rows than features."""
    return rotated(*standardised(train, other))


def standardised(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both with the mean and deviation of ``train``; features that do not vary there become 0."""
    train, other = train.astype(np.float64), other.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0)
    scale = np.where(std > 1e-6 * np.abs(mean) + 1e-12, std, np.inf)
    return (train - mean) / scale, (other - mean) / scale


def rotated(train: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in as many axes as there are training rows, which loses nothing: what a ridge or a logistic regression
    learns lies in their span, and of the distances to training rows only a constant is lost."""
    if train.shape[1] > len(train):
        axes = np.linalg.svd(train, full_matrices=False)[2].T
        train, other = train @ axes, other @ axes
    return train, other


# ----------------------------------------------------------------------------------------------------- as last layers


def value_head(x: np.ndarray, y: np.ndarray, groups: Sequence[str], seed: int) -> tuple[np.ndarray, float]:
    scale, centre = _scale(x), x.mean(axis=0)
    left, singular, right = np.linalg.svd((x - centre) / scale, full_matrices=False)
    penalty = _RIDGE[_place(x, y, groups, "ridge", seed, None, True)]
    weight = right.T @ (singular / (singular**2 + penalty) * (left.T @ (y - y.mean()))) / scale
    return weight, float(y.mean() - centre @ weight)


def event_head(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], seed: int, balanced: bool
) -> tuple[np.ndarray, float]:
    """Of whether something is so; where all known cases agree, the answer is their share whatever the features."""
    known = np.isfinite(y)
    x, y, groups = x[known], y[known], [g for g, k in zip(groups, known) if k]
    yes, no = int((y == 1).sum()), int((y == 0).sum())
    if not yes or not no:
        return np.zeros(x.shape[1]), float(np.log((yes + 0.5) / (no + 0.5)))
    place = _place(x, y.astype(np.int64), groups, "logistic", seed, 2, balanced)
    rows, scale, axes = x, _scale(x), None
    if x.shape[1] > len(x):
        axes = np.linalg.svd(x, full_matrices=False)[2].T
        rows = x @ axes
    true = y.astype(np.int64)
    theta = fit_logistic(rows / scale, true, row_weights(true, 2, balanced), LOGISTIC[: place + 1])[-1][0]
    weight = theta[:-1] if axes is None else axes @ theta[:-1]
    return weight / scale, float(theta[-1])


def _place(
    x: np.ndarray, y: np.ndarray, groups: Sequence[str], kind: str, seed: int, classes: int | None, balanced: bool
) -> int:
    """Of the strength among those of a kind; 1 where there are too few cases, or of a class, to choose."""
    path = {"logistic": LOGISTIC, "ridge": _RIDGE}[kind]
    few = len(set(groups)) <= _ENOUGH or (classes is not None and np.bincount(y, minlength=classes).min() < 2)
    return path.index(1.0) if few else _chosen(x, y, groups, kind, seed, classes, balanced, _INNER)


# ------------------------------------------------------------------------------------------------------------ tuning


def _tuned(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str],
    other: np.ndarray,
    kind: str,
    seed: int,
    classes: int | None,
    balanced: bool,
    inner: int,
) -> Tuned:
    from threadpoolctl import threadpool_limits  # sums must not depend on the number of cores

    with threadpool_limits(1):
        strengths = _STRENGTHS[kind]
        chosen = _chosen(x, y, groups, kind, seed, classes, balanced, inner)
        path = strengths[: chosen + 1] if kind == "logistic" else strengths[chosen : chosen + 1]
        return Tuned(_answers(x, y, other, path, kind, classes, balanced)[-1], float(strengths[chosen]))


def _chosen(
    x: np.ndarray,
    y: np.ndarray,
    groups: Sequence[str],
    kind: str,
    seed: int,
    classes: int | None,
    balanced: bool,
    inner: int,
) -> int:
    """The place of the strength that does best on subjects held out in turn; of equals the strongest penalty."""
    strengths = _STRENGTHS[kind]
    by_fold = [np.isin(groups, fold) for fold in folds_by_answer(groups, y, inner, seed)]
    if len(by_fold) < 2:
        return len(strengths) // 2
    loss, weight = np.zeros(len(strengths)), _weights(y, classes, balanced)
    for away in by_fold:
        guess = _answers(x[~away], y[~away], x[away], strengths, kind, classes, balanced)
        loss += _losses(guess, y[away], classes, weight[away], kind)
    return int(np.argmin(loss))


def _answers(
    train: np.ndarray,
    y: np.ndarray,
    rows: np.ndarray,
    path: Sequence[float],
    kind: str,
    classes: int | None,
    balanced: bool,
) -> np.ndarray:
    """[S, M, ...] of a model fitted to ``train``, for each strength."""
    scale = _scale(train)
    train, rows = prepared(train, rows)
    train, rows = train / scale, rows / scale
    if kind == "ridge":
        return ridge(train, y, rows, path)
    if kind == "knn":
        return neighbours(train, y, rows, [int(n) for n in path], classes, balanced)
    assert classes is not None
    return logistic(train, y, rows, classes, path, balanced)


def _scale(x: np.ndarray) -> float:
    """What standardised rows are divided by to have a mean square length of 1."""
    return float(np.sqrt(max(1, np.ptp(x, axis=0).astype(bool).sum())))  # of features that vary


def _losses(guess: np.ndarray, y: np.ndarray, classes: int | None, weight: np.ndarray, kind: str) -> np.ndarray:
    """[S] of answers [S, M, ...]: squared error of values and of neighbours' shares, else negative log-likelihood."""
    if classes is None:
        return (weight * (guess - y) ** 2).sum(axis=1)
    if kind == "knn":
        return (weight * ((guess - np.eye(classes)[y]) ** 2).sum(axis=2)).sum(axis=1)
    right = guess[:, np.arange(len(y)), y]
    return (-weight * np.log(np.maximum(right, _LEAST))).sum(axis=1)


def _weights(y: np.ndarray, classes: int | None, balanced: bool) -> np.ndarray:
    if classes is None or not balanced:
        return np.ones(len(y))
    return 1 / np.bincount(y, minlength=classes)[y]


def _answers_of(y: np.ndarray, kind: str, classes: int | None) -> tuple[np.ndarray, int | None]:
    """``y`` as integers with the number of classes, or as float64 values with None."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    y = np.asarray(y)
    if y.ndim != 1 or not len(y) or not np.isfinite(y.astype(np.float64)).all():
        raise ValueError(f"expected one finite answer a row and at least one row, found shape {y.shape}")
    if kind == "ridge" or (kind == "knn" and not np.issubdtype(y.dtype, np.integer)):
        return y.astype(np.float64), None
    whole = y.astype(np.int64)
    if (whole != y).any() or whole.min() < 0 or (classes is not None and whole.max() >= classes):
        raise ValueError(f"classes are whole numbers from 0 to below {classes or 'K'}, found {sorted(set(y.tolist()))}")
    return whole, classes or int(whole.max()) + 1


def _matrix(x: np.ndarray, rows: int) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 2 or len(x) != rows or not x.shape[1]:
        raise ValueError(f"expected features [{rows}, F], found shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(axis=0).sum())} of {x.shape[1]} features are not always finite")
    return x


def _held(groups: Sequence[str], folds: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """[N] bool for each fold: the rows that are held out with it."""
    by_fold = [np.isin(groups, list(fold)) for fold in folds]
    times = np.sum(by_fold, axis=0) if by_fold else np.zeros(len(groups), int)
    if (times != 1).any():
        lost = sorted({group for group, n in zip(groups, times) if n != 1})
        raise ValueError(f"{len(lost)} subjects are not in exactly one fold, e.g. {lost[0]}")
    return [away for away in by_fold if away.any()]


def _over(
    x: np.ndarray,
    by_fold: Sequence[np.ndarray],
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    shape: tuple[int, ...],
) -> np.ndarray:
    from threadpoolctl import threadpool_limits

    if len(by_fold) < 2:
        raise ValueError("all rows are in one fold: nothing is left to learn from")
    answers = np.zeros(shape)
    with threadpool_limits(1):
        for away in by_fold:
            answers[away] = fit(x[~away], x[away], away)
    return answers
