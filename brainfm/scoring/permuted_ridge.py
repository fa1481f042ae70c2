"""Whether numbers tell an answer at all: cross-validated ridge regression with an exact permutation test.

A ridge regression is a matrix that does not depend on the answers. So the whole procedure, the choice of its penalty on
the training side included, is repeated on a thousand permuted answers for the price of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainfm.data.splits import folds
from brainfm.seeds import stream
from brainfm.tasks.linear import standardised

_PENALTIES = tuple(10.0**e for e in np.arange(4.0, -4.5, -1.0))  # strongest first, of rows of mean square length 1
_FOLDS = 5
_FARTHEST = 4.0  # deviations from the mean; what lies beyond is put there


@dataclass(frozen=True)
class Crossed:
    """Ridge regressions of fixed numbers, cross-validated by subject; made once, then asked for any answers.

    Attributes:
        parts: for each fold: rows held out, and for each penalty the matrices [H, N - H] (answers of held-out rows) and
            [N - H, N - H] (of the training rows), and the leverage [N - H] of the latter.
        repeats: how often all rows are held out.
    """

    parts: tuple[tuple[np.ndarray, tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]], ...]
    repeats: int

    def answers(self, y: np.ndarray, centred: bool = False) -> np.ndarray:
        """What each row is answered by regressions that have seen none of its subject's rows, averaged over repeats.

        The penalty is chosen for each fold and column by the leave-one-out error of the training rows.

        Args:
            y: [N, P]; each column is a question of its own.
            centred: leaves out the training rows' mean. Where a class is held out more often than its share, that mean
                is lower: pooled over folds it would tell the wrong class, and an AUROC of chance would fall below .5.

        Returns:
            [N, P] float64.

        Source: for the leave-one-out error Golub, Heath & Wahba 1979 (Technometrics 21:215), section 2.
        """
        y = np.asarray(y, np.float64)
        total = np.zeros_like(y)
        for away, paths in self.parts:
            known = y[~away]
            mean = known.mean(axis=0)
            known = known - mean
            errors = np.stack(
                [(((known - hat @ known) / (1 - leverage)[:, None]) ** 2).sum(axis=0) for _, hat, leverage in paths]
            )
            chosen = errors.argmin(axis=0)
            found = np.zeros((int(away.sum()), y.shape[1]))
            for place, (held, _, _) in enumerate(paths):
                columns = chosen == place
                if columns.any():
                    found[:, columns] = held @ known[:, columns]
            total[away] += found if centred else found + mean
        return total / self.repeats

    def baseline(self, y: np.ndarray) -> np.ndarray:
        """[N, P]: the mean of the training rows alone, for the same folds."""
        y = np.asarray(y, np.float64)
        total = np.zeros_like(y)
        for away, _ in self.parts:
            total[away] += y[~away].mean(axis=0)
        return total / self.repeats


def crossed(x: np.ndarray, groups: Sequence[str], seed: int, repeats: int = 2) -> Crossed:
    """Prepares the regressions of numbers ``x``.

    The folds do not depend on any answers, so that permuted answers are treated exactly as the true ones.

    Args:
        x: [N, F] finite.
        groups: [N] the subject of each row; at least two.
        repeats: of the cross-validation, each with other folds.

    Raises:
        ValueError: where there are fewer than two subjects.
    """
    subjects = sorted(set(groups))
    if len(subjects) < 2:
        raise ValueError(f"{len(subjects)} subjects: expected at least two to hold one out")
    parts = []
    for repeat in range(repeats):
        for fold in folds(subjects, min(_FOLDS, len(subjects)), seed * 1000 + repeat):
            away = np.isin(groups, fold)
            parts.append((away, _paths(x[~away], x[away])))
    return Crossed(tuple(parts), repeats)


def _paths(train: np.ndarray, held: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
    scale = np.sqrt(max(1, int((np.ptp(train, axis=0) > 0).sum())))
    # A number that hardly varies among the training rows would throw a held-out row any distance away.
    train, held = (np.clip(rows, -_FARTHEST, _FARTHEST) for rows in standardised(train, held))
    train, held = train - train.mean(axis=0), held - train.mean(axis=0)
    left, singular, right = np.linalg.svd(train / scale, full_matrices=False)
    turned = held / scale @ right.T
    paths = []
    for penalty in _PENALTIES:
        shrunk = singular**2 / (singular**2 + penalty)
        hat = (left * shrunk) @ left.T
        leverage = np.minimum(hat.diagonal() + 1 / len(train), 1 - 1e-6)
        paths.append(((turned * (singular / (singular**2 + penalty))) @ left.T, hat, leverage))
    return tuple(paths)


def shuffles(groups: Sequence[str], rounds: int, seed: int, strata: np.ndarray | None = None) -> np.ndarray:
    """[rounds, N] indices that deal the rows of each subject to another subject with as many rows.

    Args:
        strata: [N]; subjects change places only where all of their rows have the same strata in the same order.
    """
    rows: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    alike: dict[tuple, list[list[int]]] = {}
    for own in rows.values():
        kind = (len(own),) if strata is None else tuple(strata[own].tolist())
        alike.setdefault(kind, []).append(own)
    blocks = [np.array(found) for found in alike.values()]  # [subjects, rows of each]
    rng = stream(seed, "shuffles")
    order = np.tile(np.arange(len(groups)), (rounds, 1))
    for block in blocks:
        if len(block) > 1:
            dealt = np.argsort(rng.random((rounds, len(block))), axis=1)
            order[:, block] = block[dealt]
    return order


def resampled_counts(groups: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """[resamples, N] float64: how often each row is drawn when subjects are drawn with replacement."""
    subjects, place = np.unique(np.asarray(groups), return_inverse=True)
    rng = stream(seed, "bootstrap by subject")
    counts = rng.multinomial(len(subjects), np.full(len(subjects), 1 / len(subjects)), size=resamples)
    return counts[:, place].astype(np.float64)


def aurocs(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[P] areas under the ROC curve of columns [N, P]; ties count half; NaN where a class is absent.

    Source: Hanley & McNeil 1982 (Radiology 143:29): the Mann-Whitney statistic.
    """
    from scipy.stats import rankdata

    truth = np.asarray(truth, np.float64)
    ranks = rankdata(score, axis=0)
    positive = truth.sum(axis=0)
    pairs = positive * (len(truth) - positive)
    above = (ranks * truth).sum(axis=0) - positive * (positive + 1) / 2
    return np.divide(above, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)


def permutation_p(observed: float, null: np.ndarray) -> float:
    """The share of the null that is as large, itself counted in; 1 where nothing was observed.

    Source: Phipson & Smyth 2010 (Stat. Appl. Genet. Mol. Biol. 9:39).
    """
    null = null[np.isfinite(null)]
    if not np.isfinite(observed):
        return 1.0
    return float((1 + (null >= observed - 1e-12).sum()) / (1 + len(null)))


def holm(values: Sequence[float]) -> list[float]:
    """p values for a family of questions: the chance of one false alarm among all of them.

    Source: Holm 1979 (Scand. J. Stat. 6:65).
    """
    order = np.argsort(values, kind="stable")
    adjusted, highest = [1.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted
