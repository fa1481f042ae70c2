"""Answers of several networks as one: means, means weighted by certainty, and a meta-learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from brainfm.crossdomain.heads import logistic

_LEAST = 1e-7


def mean_of(answers: Sequence[np.ndarray]) -> np.ndarray:
    """[N, L] of probabilities [N, L] a network."""
    return np.mean(answers, axis=0)


def entropy_weighted(answers: Sequence[np.ndarray]) -> np.ndarray:
    """[N, L]: each network counts 1 less the entropy of its own answer, for each image and label; where all are
    undecided, alike.

    Source: Gozzi et al. 2022 (Diagnostics 12:2084) as their published code has it.
    """
    p = np.clip(np.stack(answers), _LEAST, 1 - _LEAST)
    weight = 1 + p * np.log2(p) + (1 - p) * np.log2(1 - p)
    total = weight.sum(axis=0)
    shares = np.where(total > _LEAST, weight / np.maximum(total, _LEAST), 1 / len(p))
    return (shares * p).sum(axis=0)


def stacked(train: np.ndarray, y: np.ndarray, other: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """[M, L] probabilities of a model on inputs [N, F]: answers of several networks beside each other, or embeddings.

    Args:
        y: [N, L] 0 or 1, NaN where unknown.
        kind: forest, boosted or logistic; one model a label.
    """
    found = np.zeros((len(other), y.shape[1]))
    for label in range(y.shape[1]):
        known = np.isfinite(y[:, label])
        truth = y[known, label] >= 0.5
        if truth.all() or not truth.any():
            found[:, label] = truth.mean() if truth.size else 0.5
            continue
        if kind == "logistic":
            found[:, label] = expit(logistic(train[known], truth[:, None], other, seed)[:, 0])
            continue
        found[:, label] = _trees(kind, seed).fit(train[known], truth).predict_proba(other)[:, 1]
    return found


def _trees(kind: str, seed: int) -> Any:
    """Source: forests of 200 trees and boosting of 50 rounds and depth 3 as in the published code (XGBoost there)."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    if kind == "forest":
        return RandomForestClassifier(200, max_depth=15, min_samples_leaf=2, random_state=seed, n_jobs=1)
    return HistGradientBoostingClassifier(max_iter=50, max_depth=3, min_samples_leaf=5, random_state=seed)
