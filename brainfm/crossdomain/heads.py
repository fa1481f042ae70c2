"""Classifiers of frozen features that learn from a few images: logistic, prototypes, forest, and the published probe.

With ten images and a thousand features the scaling decides as much as the features do. Features are therefore centred
on the support's mean and brought to length 1, and the logistic regression's penalty is chosen inside the support;
scaling each feature by its own deviation, from ten images, is what costs (measured in docs/crossdomain.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit

from brainfm.crossdomain.layout import TaskTarget
from brainfm.scoring.folds import deal, fold_of
from brainfm.scoring.linear import LOGISTIC, fit_logistic, rotated, row_weights
from brainfm.seeds import stream

_MANY = 200  # features after rotation, from which on an approximate solver is quicker than Newton's method
_FOLDS = 5
_LEAST = 1e-6
_TREES, _PROBE_STEPS, _PROBE_RATE = 100, 150, 1e-4

Head = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]
"""(support x [S, F], support answers bool [S, C], query x [Q, F], seed) -> [Q, C], larger for what is so."""


def columns(y: np.ndarray, target: TaskTarget, classes: int) -> np.ndarray:
    """bool [N, C], what is asked of each image: class 1 alone of a binary task, each class, or each label."""
    if y.ndim == 2:
        return y.astype(bool)
    if target is TaskTarget.BINARY_CLASSIFICATION:
        return (y == 1)[:, None]
    return y[:, None] == np.arange(classes)


def logistic(x: np.ndarray, y: np.ndarray, other: np.ndarray, seed: int = 0) -> np.ndarray:
    """Log odds of each column by a logistic regression with an L2 penalty, of centred features of length 1.

    The penalty is one for all columns, chosen by cross-validation inside the support: the likelihood of held-out
    images, of equals the stronger; where a column has a single image of a kind, it is the middle one.
    """
    x, other = rotated(*centred(x, other))
    approximate = 1e-4 if x.shape[1] > _MANY else None
    fold = _folds(y, seed)
    place = len(LOGISTIC) // 2
    if fold is not None:
        loss = np.zeros(len(LOGISTIC))
        for k in range(fold.max() + 1):
            away = fold == k
            guess = _fitted(x[~away], y[~away], x[away], LOGISTIC, approximate)
            p = np.clip(expit(np.where(y[away], guess, -guess)), _LEAST, 1)
            loss -= np.log(p).sum(axis=(1, 2))
        place = int(np.argmin(loss.round(9)))
    return _fitted(x, y, other, LOGISTIC[: place + 1], approximate)[-1]


def _fitted(
    x: np.ndarray, y: np.ndarray, other: np.ndarray, strengths: tuple[float, ...], tolerance: float | None
) -> np.ndarray:
    """[P, M, C] log odds for each strength; the share in training where a column does not vary."""
    found = np.zeros((len(strengths), len(other), y.shape[1]))
    for column in range(y.shape[1]):
        yes = y[:, column].astype(np.int64)
        if yes.min() == yes.max():
            found[:, :, column] = np.log((yes.sum() + 0.5) / ((1 - yes).sum() + 0.5))
            continue
        thetas = fit_logistic(x, yes, row_weights(yes, 2, True), strengths, tolerance=tolerance)
        found[:, :, column] = [other @ theta[0, :-1] + theta[0, -1] for theta in thetas]
    return found


def _folds(y: np.ndarray, seed: int) -> np.ndarray | None:
    """[S] the fold of each image, the rows of a kind dealt in turn; None where a column has one image of a kind."""
    if min(y.sum(axis=0).min(), (~y).sum(axis=0).min()) < 2:
        return None
    kinds = np.unique(y, axis=0, return_inverse=True)[1].ravel()
    order = stream(seed, "folds inside the support").permutation(len(y))
    order = order[np.argsort(kinds[order], kind="stable")]
    return fold_of(range(len(y)), deal(order.tolist(), min(_FOLDS, len(y) // 2)))


def prototypes(x: np.ndarray, y: np.ndarray, other: np.ndarray, seed: int = 0) -> np.ndarray:
    """The square of the distance to the mean of those without, less that to the mean of those with: of centred features
    of length 1.

    Source: Snell et al. 2017 (arXiv 1703.05175); centring and length as Wang et al. 2019 (arXiv 1911.04623).
    Differs: each column against the rest, so that binary tasks and several labels are no exception.
    """
    x, other = centred(x, other)
    found = np.zeros((len(other), y.shape[1]))
    for column, yes in enumerate(y.T):
        if yes.all() or not yes.any():
            continue
        if y.shape[1] > 1 and (y.sum(axis=1) == 1).all():  # exclusive classes: the distance to one's own is enough
            found[:, column] = -((other - x[yes].mean(axis=0)) ** 2).sum(axis=1)
        else:
            with_it, without = x[yes].mean(axis=0), x[~yes].mean(axis=0)
            found[:, column] = ((other - without) ** 2).sum(axis=1) - ((other - with_it) ** 2).sum(axis=1)
    return found


def forest(x: np.ndarray, y: np.ndarray, other: np.ndarray, seed: int = 0) -> np.ndarray:
    """Shares of the trees of a random forest."""
    from sklearn.ensemble import RandomForestClassifier

    exclusive = y.shape[1] > 1 and (y.sum(axis=1) == 1).all()
    model = RandomForestClassifier(_TREES, random_state=seed, n_jobs=1)
    if exclusive or y.shape[1] == 1:
        truth = y.argmax(axis=1) if exclusive else y[:, 0].astype(np.int64)
        shares = model.fit(x, truth).predict_proba(other)
        found = np.zeros((len(other), max(2, y.shape[1])))
        found[:, model.classes_] = shares
        return found if exclusive else found[:, 1:]
    parts = [forest(x, y[:, [column]], other, seed) for column in range(y.shape[1])]
    return np.concatenate(parts, axis=1)


def linear(x: np.ndarray, y: np.ndarray, other: np.ndarray, seed: int = 0) -> np.ndarray:
    """The published probe: a linear layer on features as they are, from zero, 150 steps of Adam at 1e-4 on the whole
    support.

    Source: the preset of Woerner & Baumgartner 2024 (arXiv 2408.08058).
    """
    train, rest, truth = (torch.from_numpy(np.asarray(a, dtype=np.float32)) for a in (x, other, y))
    weight = torch.zeros(y.shape[1], x.shape[1], requires_grad=True)
    bias = torch.zeros(y.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=_PROBE_RATE)
    exclusive = y.shape[1] > 1 and (y.sum(axis=1) == 1).all()
    for _ in range(_PROBE_STEPS):
        optimiser.zero_grad()
        logits = F.linear(train, weight, bias)
        loss = F.cross_entropy(logits, truth) if exclusive else F.binary_cross_entropy_with_logits(logits, truth)
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        logits = F.linear(rest, weight, bias)
        found: np.ndarray = (logits.softmax(1) if exclusive else logits).double().numpy()
    return found


HEADS: dict[str, Head] = {"logistic": logistic, "prototypes": prototypes, "forest": forest, "linear": linear}


def centred(x: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the mean of ``x``, each row of length 1, float64."""
    mean = x.mean(axis=0, dtype=np.float64)
    return _of_length_one(x - mean), _of_length_one(other - mean)


def _of_length_one(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return found
