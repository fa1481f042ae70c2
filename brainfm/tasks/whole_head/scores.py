"""Scores of answers for whole heads, by the sort of answer: a class, several labels, a value."""

from __future__ import annotations

import numpy as np

from brainfm.scoring.answers import Score
from brainfm.specs import TaskSpec
from brainfm.tasks.whole_head.sorts import sort_of


def answer_scores(spec: TaskSpec, truth: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Every score of an answer for a whole head.

    ========== =====================================================================================================
    exclusive  auroc and average_precision (two classes: of class 1; else one class against the rest, mean over the
               classes that are present), balanced_accuracy, f1 (mean over classes), accuracy, log_loss, brier
    ordinal    the same, and quadratic_kappa and mae_steps of the most probable class
    multilabel auroc, average_precision, balanced_accuracy, f1, accuracy (at 0.5), log_loss, brier: mean over the
               labels for which it is defined, and ``<score>/<label>`` for each
    regression mae, rmse, r (Pearson), r2, bias (mean of answer - truth), slope (of the answer over the truth; less
               than 1 is the pull to the mean)
    ========== =====================================================================================================

    The Brier score of two classes is that of class 1, of more the sum over classes.

    Args:
        spec: of kind classification or regression.
        truth: [N] or [N, 1] the class's place in ``spec.values``, [N, T] 0 or 1, or [N] or [N, 1] the value; NaN is
            unknown.
        answers: probabilities [N, K], or [N, T], or values [N] or [N, 1] in the unit.

    Raises:
        ValueError: where the shapes do not belong to the task.

    Source: balanced accuracy Brodersen et al. 2010 (ICPR); quadratic kappa Cohen 1968, Psychol. Bull. 70:213; Brier
        1950, Mon. Weather Rev. 78:1.
    """
    return {name: score(truth, answers) for name, score in sort_of(spec).scores(spec).items()}


def answer_score(spec: TaskSpec, name: str) -> Score:
    """One score of `answer_scores` alone, as the function of truth and answers that `intervals.bootstrap` takes.

    Raises:
        ValueError: where this task has no such score.
    """
    table = sort_of(spec).scores(spec)
    if name not in table:
        raise ValueError(
            f"{name} is no score of a question that is {spec.mode or spec.kind}: expected one of {sorted(table)}"
        )
    return table[name]
