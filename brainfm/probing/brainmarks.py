"""The probes of brainmarks-smri: one split, standardised features, scikit-learn's own grids, bootstrap intervals.

So that numbers can be laid beside published ones. They are not those of probing/table.py, which tunes and tests by
subject in every fold.

Source: MedARC-AI, brainmarks-smri (2026): StandardScaler, LogisticRegressionCV or RidgeCV, 300 samples a split at most.
Differs: subjects are dealt by hash, one fifth is tested, where the manifest of a data set brings no split of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainfm import seeds
from brainfm.errors import ConfigError
from brainfm.scoring.folds import holdout

MOST = 300  # samples of a split
TEST = 0.2  # share of the subjects
LOGISTIC = tuple(np.logspace(-4, 4, 9).tolist())  # 1 / penalty
RIDGE = tuple(np.logspace(-2, 6, 9).tolist())  # penalty
_LEAST_TESTED = 5  # subjects
_INNER = 5  # folds of scikit-learn's choice, fewer where a class has fewer rows


@dataclass(frozen=True)
class BrainmarksSplit:
    """Rows [n] that are fitted and rows [m] that are tested; no subject is on both sides."""

    train: np.ndarray
    test: np.ndarray


def split_of(subjects: Sequence[str], truth: np.ndarray, classes: bool, seed: int) -> BrainmarksSplit:
    """One fifth of the subjects is tested; of each side at most 300 rows, drawn by the seed.

    Raises: ConfigError where a side is too small to say anything.
    """
    _, away = holdout(sorted(set(subjects)), TEST, seed)
    tested = np.isin(subjects, away)
    sides = []
    for name, mine in (("train", ~tested), ("test", tested)):
        rows = np.flatnonzero(mine)
        order = seeds.stream(seed, f"brainmarks {name}").permutation(len(rows))
        sides.append(np.sort(rows[order[:MOST]]))
    few = min(len({subjects[row] for row in rows}) for rows in sides)
    lacking = classes and any(len(np.unique(truth[rows])) < len(np.unique(truth)) for rows in sides)
    if few < _LEAST_TESTED or lacking:
        raise ConfigError(
            f"protocol=brainmarks: a side of its split has {few} subjects"
            f"{' and lacks a class' if lacking else ''}, expected {_LEAST_TESTED} or more, all classes on both sides"
        )
    return BrainmarksSplit(*sides)


def answers(x: np.ndarray, y: np.ndarray, split: BrainmarksSplit, classes: int) -> np.ndarray:
    """What the model answers for the tested rows: probabilities [m, K], or values [m].

    Args:
        x: [N, F] features.
        y: [N] whole numbers of classes, or values.
        classes: K; 0: values.
    """
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    target = y[split.train]
    model: Any = RidgeCV(alphas=RIDGE)
    if classes:
        inner = max(2, min(_INNER, int(np.bincount(target.astype(int)).min())))
        model = LogisticRegressionCV(
            Cs=LOGISTIC, cv=inner, class_weight="balanced", scoring="neg_log_loss", max_iter=1000
        )
    with threadpool_limits(1):
        fitted = make_pipeline(StandardScaler(), model).fit(x[split.train], target)
        found = fitted.predict_proba(x[split.test]) if classes else fitted.predict(x[split.test])
    return np.asarray(found, dtype=np.float64)


def r2(truth: np.ndarray, found: np.ndarray) -> float:
    """Share of the variance of [N] that answers explain; below 0 where the mean would be nearer."""
    spread = ((truth - truth.mean()) ** 2).sum()
    return float(1 - ((truth - found) ** 2).sum() / spread) if spread > 0 else float("nan")


def asked_in_turn(
    by_name: Mapping[str, np.ndarray], y: np.ndarray, split: BrainmarksSplit, classes: int, first: Sequence[str]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, answers) of each set of features; those of ``first`` come first."""
    for name in sorted(by_name, key=lambda name: name not in first):
        yield name, answers(by_name[name], y, split, classes)
