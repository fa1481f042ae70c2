"""Scores and ranks as the organisers of FOMO25 and FOMO26 compute them, their rules for what is missing included.

An answer that is missing is None or not finite. Of a class it counts as the worst answer that could have been given, of
a mask as 0; of ages one missing answer costs the whole task (MAE 100, correlation -100), as the code of 2026 has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from brainfm.scoring import answers as scores
from brainfm.scoring import masks
from brainfm.submission.challenge import LOWER_IS_BETTER, Challenge, ChallengeTask

WORST_MAE, WORST_CORRELATION = 100.0, -100.0
TOLERANCE_MM = 1.0

Row = Sequence[float] | None  # the scores of a case, one a class


# ---- classes ---------------------------------------------------------------------------------------------------------


def auroc(true: Sequence[int], score: Sequence[float | None]) -> float:
    """Area under the curve of one class; a missing score is 0 of a positive case and 1 of a negative one.

    Returns: in [0, 1]; NaN where there is only one class.

    Source: fomo-metrics, classification.py.
    """
    filled = [float(1 - t) if _missing(s) else float(s) for t, s in zip(true, score, strict=True)]  # type: ignore[arg-type]
    return scores.auroc(np.asarray(true), np.asarray(filled))


def ovr_auroc(true: Sequence[int], rows: Sequence[Row]) -> float:
    """Mean over the classes of one against the rest; classes that are absent, or alone, are left out.

    A missing row is 0 for the true class and the same for each other. Of two classes the second one's scores count.

    Args:
        true: N class numbers, 0 to C-1.
        rows: N times C scores; C is that of the first row that is there.

    Returns: in [0, 1]; NaN where no class has both, or no row is there.

    Source: fomo-metrics, classification.py.
    """
    classes = _classes(rows)
    if classes < 2:
        return math.nan
    filled = np.array([_row(t, row, classes) for t, row in zip(true, rows, strict=True)])
    truth = np.asarray(true)
    asked = [1] if classes == 2 else range(classes)
    found = [scores.auroc(truth == k, filled[:, k]) for k in asked]
    defined = [value for value in found if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def ovr_f1(true: Sequence[int], rows: Sequence[Row]) -> float:
    """Macro F1 of the class with the largest score; a missing row is the class after the true one.

    Returns: the mean over the classes that occur in truth or answers; NaN where no row is there.

    Source: fomo-metrics, classification.py.
    """
    classes = _classes(rows)
    if not classes:
        return math.nan
    answers = [
        (t + 1) % classes if row is None or any(map(_missing, row)) else int(np.argmax(row))
        for t, row in zip(true, rows, strict=True)
    ]
    f1 = []
    for k in sorted({*true, *answers}):
        hit = sum(t == a == k for t, a in zip(true, answers, strict=True))
        f1.append(2 * hit / (sum(t == k for t in true) + sum(a == k for a in answers)))
    return float(np.mean(f1))


def fairness(
    metric: Callable[[Sequence[int], Sequence[Row]], float],
    true: Sequence[int],
    rows: Sequence[Row],
    groups: Mapping[str, Sequence[Hashable | None]],
) -> float:
    """The mean over the variables of 1 - (best group - worst group).

    Args:
        metric: `ovr_f1` or `ovr_auroc`.
        groups: variable -> the group of each case; None is unknown and left out.

    Returns: 1 where all groups are served alike, well or badly; NaN where no variable has two groups with a score.
    Source: fomo-lp and fomo-metrics. Their treatment of a group without a defined score is not published: here such a
        group is left out.
    """
    found = []
    for of_variable in groups.values():
        values = []
        for group in {g for g in of_variable if g is not None}:
            inside = [i for i, g in enumerate(of_variable) if g == group]
            values.append(metric([true[i] for i in inside], [rows[i] for i in inside]))
        defined = [value for value in values if not math.isnan(value)]
        if len(defined) > 1:
            found.append(1 - (max(defined) - min(defined)))
    return float(np.mean(found)) if found else math.nan


# ---- masks -----------------------------------------------------------------------------------------------------------


def dice(predicted: np.ndarray | None, true: np.ndarray, labels: Sequence[int] = (1,)) -> float:
    """Mean over the labels, 1 where neither mask has a label; 0 for a missing mask or one of another shape.

    Source: fomo-metrics, segmentation.py. How several labels are averaged is not published: the plain mean here.
    """
    if predicted is None or predicted.shape != true.shape:
        return 0.0
    return float(np.mean([masks.dice(predicted == label, true == label) for label in labels]))


def nsd(
    predicted: np.ndarray | None, true: np.ndarray, spacing_mm: Sequence[float], labels: Sequence[int] = (1,)
) -> float:
    """Surface Dice at 1 mm, mean over the labels; 0 where either mask lacks a label, both included.

    Args:
        predicted, true: [X, Y, Z] label values.
        spacing_mm: edge lengths of a voxel.

    Raises: ConfigError where monai is not installed.
    Source: fomo-metrics, segmentation.py.
    """
    if predicted is None or predicted.shape != true.shape:
        return 0.0
    x, y, z = spacing_mm
    found = [
        masks.surface_dice(predicted == label, true == label, (x, y, z), TOLERANCE_MM, both_empty=0.0)
        for label in labels
    ]
    return float(np.mean(found))


# ---- ages ------------------------------------------------------------------------------------------------------------


def mae(true: Sequence[float], answers: Sequence[float | None]) -> float:
    """Mean absolute error; 100 where any answer is missing, or there is none.

    Source: fomo-metrics, regression.py.
    """
    if not true or len(true) != len(answers) or any(map(_missing, answers)):
        return WORST_MAE
    return float(np.mean(np.abs(np.asarray(true, dtype=np.float64) - np.asarray(answers, dtype=np.float64))))


def correlation(true: Sequence[float], answers: Sequence[float | None]) -> float:
    """Pearson's; -100 where it is undefined (a constant), any answer is missing, or there are fewer than two.

    Source: fomo-metrics, regression.py.
    """
    if len(true) < 2 or len(true) != len(answers) or any(map(_missing, answers)):
        return WORST_CORRELATION
    centred = []
    for values in (true, answers):
        array = np.asarray(values, dtype=np.float64)
        if np.ptp(array) <= 1e-13 * np.abs(array).max():  # of a constant only rounding is left
            return WORST_CORRELATION
        centred.append((array - array.mean()) / np.linalg.norm(array - array.mean()))
    return float(np.clip((centred[0] * centred[1]).sum(), -1, 1))


# ---- a task ----------------------------------------------------------------------------------------------------------


def score(
    task: ChallengeTask,
    true: Sequence[Any],
    answers: Sequence[Any],
    spacings_mm: Sequence[Sequence[float]] = (),
    groups: Mapping[str, Sequence[Hashable | None]] | None = None,
) -> dict[str, float]:
    """Every metric of a task over its cases.

    Args:
        true: a class or an age each; of a segmentation [X, Y, Z] label values; of an embedding a class.
        answers: a probability, an age, label values, or of an embedding the probe's scores of the classes; None: none.
        spacings_mm: of a segmentation, edge lengths of a voxel in the axes of the arrays.
        groups: of the fairness metrics.

    Raises: ValueError where the lengths differ, or what a metric needs is not given.
    """
    if len(true) != len(answers) or (task.kind == "segmentation" and len(spacings_mm) != len(true)):
        raise ValueError(f"{len(true)} cases, {len(answers)} answers and {len(spacings_mm)} spacings: expected as many")
    if groups is None and any(metric.startswith("fairness") for metric in task.metrics):
        raise ValueError(f"{task.id} is scored between groups, expected groups")
    labels = range(1, int(task.high) + 1)
    of_group = groups or {}
    table: dict[str, Callable[[], float]] = {
        "auroc": lambda: auroc(true, answers),
        "mae": lambda: mae(true, answers),
        "correlation": lambda: correlation(true, answers),
        "dice": lambda: float(np.mean([dice(a, t, labels) for t, a in zip(true, answers)])),
        "nsd": lambda: float(np.mean([nsd(a, t, s, labels) for t, a, s in zip(true, answers, spacings_mm)])),
        "ovr_auroc": lambda: ovr_auroc(true, answers),
        "ovr_f1": lambda: ovr_f1(true, answers),
        "fairness_auroc": lambda: fairness(ovr_auroc, true, answers, of_group),
        "fairness_f1": lambda: fairness(ovr_f1, true, answers, of_group),
    }
    return {metric: table[metric]() for metric in task.metrics}


# ---- ranks -----------------------------------------------------------------------------------------------------------


def task_ranks(values: Mapping[str, Sequence[float]]) -> list[float]:
    """The rank of each team in one task: the mean over its metrics of the rank in each.

    Args:
        values: metric -> one value a team; NaN: no valid submission, which is ranked behind all valid ones.

    Returns: from 1 (best); teams that tie share the mean of their ranks.

    Source: fomo26.github.io results (ties: the two teams with equal ages there).
    """
    return list(np.mean([_ranks(values[metric], metric in LOWER_IS_BETTER) for metric in values], axis=0))


def overall_ranks(challenge: Challenge, values: Mapping[str, Mapping[str, Sequence[float]]]) -> list[float]:
    """The weighted mean of the task ranks of each team.

    Args:
        values: task -> metric -> one value a team, for every task of the challenge.
    """
    weights = [task.weight for task in challenge.tasks]
    ranks = [task_ranks({metric: values[task.name][metric] for metric in task.metrics}) for task in challenge.tasks]
    return list(np.average(ranks, axis=0, weights=weights))


def _ranks(values: Sequence[float], lower_is_better: bool) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    valid = ~np.isnan(array)
    ranks = np.full(len(array), float(valid.sum() + 1))
    ranks[valid] = rankdata(array[valid] if lower_is_better else -array[valid])
    return ranks


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _classes(rows: Sequence[Row]) -> int:
    return next((len(row) for row in rows if row is not None), 0)


def _row(true: int, row: Row, classes: int) -> list[float]:
    if row is None or any(map(_missing, row)):
        return [0.0 if k == true else 1 / (classes - 1) for k in range(classes)]
    return [float(value) for value in row]
