"""DeLong's interval of an AUROC, and the test of a paired difference."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import norm

from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import Interval

_Z = 1.959964


def delong(truth: np.ndarray, score: np.ndarray) -> Interval:
    """AUROC with its 95 % interval, made on the logit scale so that it stays within 0 and 1; n is the number of cases.

    NaN where there is one class alone; without width where every pair is in order.

    Source: DeLong et al. 1988, Biometrics 44:837; the logit scale as Pepe 2003, The Statistical Evaluation of Medical
        Tests, section 5.2.
    """
    value = auroc(truth, score)
    if not math.isfinite(value):
        return Interval(value, value, value, len(truth))
    yes, no = _placements(np.asarray(truth) != 0, np.asarray(score))
    variance = _variance(yes, yes) / len(yes) + _variance(no, no) / len(no)
    if value in (0.0, 1.0) or variance <= 0:
        return Interval(value, value, value, len(truth))
    centre, half = math.log(value / (1 - value)), _Z * math.sqrt(variance) / (value * (1 - value))
    low, high = (1 / (1 + math.exp(-(centre + side * half))) for side in (-1, 1))
    return Interval(value, low, high, len(truth))


def delong_difference(truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[Interval, float]:
    """AUROC of ``a`` less that of ``b`` on the same cases with its 95 % interval, and the two-sided p."""
    positive = np.asarray(truth) != 0
    found = auroc(truth, a) - auroc(truth, b)
    if not math.isfinite(found):
        return Interval(found, found, found, len(positive)), math.nan
    (yes_a, no_a), (yes_b, no_b) = _placements(positive, np.asarray(a)), _placements(positive, np.asarray(b))
    variance = _variance(yes_a - yes_b, yes_a - yes_b) / len(yes_a) + _variance(no_a - no_b, no_a - no_b) / len(no_a)
    spread = math.sqrt(max(variance, 0.0))
    p = float(2 * norm.sf(abs(found) / spread)) if spread > 0 else 1.0 if found == 0 else 0.0
    return Interval(found, found - _Z * spread, found + _Z * spread, len(positive)), p


def _placements(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each positive the share of negatives below, and of each negative that of positives above; ties half."""
    high, low = score[positive], score[~positive]
    high_sorted, low_sorted = np.sort(high), np.sort(low)
    above = np.searchsorted(low_sorted, high, "left") + np.searchsorted(low_sorted, high, "right")
    below = np.searchsorted(high_sorted, low, "left") + np.searchsorted(high_sorted, low, "right")
    return above / (2 * len(low)), 1 - below / (2 * len(high))


def _variance(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - a.mean()) * (b - b.mean())).sum() / (len(a) - 1)) if len(a) > 1 else 0.0
