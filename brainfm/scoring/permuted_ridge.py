"""Ridge regression, cross-validated by subject, of permuted answers: whether numbers tell an answer at all.

A ridge regression is a matrix that does not depend on the answers. So the whole procedure, the choice of its penalty on
the training side included, is repeated on a thousand permuted answers for the price of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainfm.scoring.folds import folds
from brainfm.scoring.linear import standardised

_PENALTIES = tuple(10.0**e for e in np.arange(4.0, -4.5, -1.0))  # strongest first, of rows of mean square length 1
_FOLDS = 5
_FARTHEST = 4.0  # deviations from the mean; what lies beyond is put there


@dataclass(frozen=True)
class PermutedRidge:
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


def permuted_ridge(x: np.ndarray, groups: Sequence[str], seed: int, repeats: int = 2) -> PermutedRidge:
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
        for fold in folds(subjects, _FOLDS, seed * 1000 + repeat, fewer=True):
            away = np.isin(groups, fold)
            parts.append((away, _paths(x[~away], x[away])))
    return PermutedRidge(tuple(parts), repeats)


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
