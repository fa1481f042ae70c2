"""AUROC over episodes, with intervals over episodes and images, and paired differences.

Episodes drawn with replacement from one data set say how much the draw matters, not what other images would have
given. The interval here draws both again: episodes, and within them the images that are asked about. The images that
are learnt from change with the episode alone.

Source: Bendou et al. 2024 (arXiv 2409.02850): intervals of episodes drawn with replacement leave the data out; Owen
    2007, The pigeonhole bootstrap, Ann. Appl. Stat. 1:386: both drawn apart, never too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import Interval, crossed_counts
from brainfm.seeds import stream

RESAMPLES = 1000
_TAIL = 0.025


@dataclass(frozen=True)
class Answers:
    """What a method answers in one episode.

    Attributes:
        rows: [Q] numbers of the images.
        truth: bool [Q, C] what is so.
        scores: [Q, C] larger for what is so.
    """

    rows: np.ndarray
    truth: np.ndarray
    scores: np.ndarray


def episode_auroc(answers: Answers) -> float:
    """The mean over columns that have both answers; NaN where none has."""
    values = [auroc(truth, score) for truth, score in zip(answers.truth.T, answers.scores.T)]
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


def replicates(episodes: Sequence[Answers], count: int, seed: int, name: str, resamples: int = RESAMPLES) -> np.ndarray:
    """float64 [B] the mean AUROC, with episodes and images drawn again; of one seed and name the same draws, so that
    two methods on the same episodes can be subtracted.

    Args:
        count: number of images of the data set, which ``rows`` are numbers of.
        name: of the task.
    """
    rng = stream(seed, f"bootstrap of episodes of {name}")
    images, drawn = crossed_counts(rng, (count, len(episodes)), resamples)
    images = images.astype(np.float32)
    values = np.stack([_weighted(episode, images[:, episode.rows]) for episode in episodes], axis=1)
    if len(episodes) == 1:
        return values[:, 0]
    weight = np.where(np.isfinite(values), drawn, 0)
    with np.errstate(invalid="ignore"):
        return (weight * np.nan_to_num(values)).sum(axis=1) / weight.sum(axis=1)


def _weighted(episode: Answers, weight: np.ndarray) -> np.ndarray:
    """[B] the AUROC where image q counts weight[b, q] times."""
    total, defined = np.zeros(len(weight)), np.zeros(len(weight))
    for truth, score in zip(episode.truth.T, episode.scores.T):
        yes, no = score[truth], score[~truth]
        wins = ((yes[:, None] > no) + 0.5 * (yes[:, None] == no)).astype(np.float32)
        with_it, without = weight[:, truth], weight[:, ~truth]
        pairs = with_it.sum(axis=1) * without.sum(axis=1)
        there = pairs > 0
        value = ((with_it @ wins) * without).sum(axis=1) / np.where(there, pairs, 1)
        total += np.where(there, value, 0)
        defined += there
    return np.where(defined > 0, total / np.maximum(defined, 1), np.nan)


def interval(values: Sequence[float] | np.ndarray, drawn: np.ndarray) -> Interval:
    """The mean of episodes' values with the percentiles of `replicates`; n is the number of episodes."""
    found = np.asarray(values, dtype=np.float64)
    found, drawn = found[np.isfinite(found)], drawn[np.isfinite(drawn)]
    if not len(found) or not len(drawn):
        return Interval(float("nan"), float("nan"), float("nan"), len(found))
    low, high = np.quantile(drawn, [_TAIL, 1 - _TAIL])
    return Interval(float(found.mean()), float(low), float(high), len(found))


def over_episodes(values: Sequence[float]) -> float:
    """Half of the published interval's width: 1.96 deviations of the mean, of episodes alone; NaN of one episode."""
    known = np.asarray([value for value in values if np.isfinite(value)])
    return float(1.96 * known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the first axis: what the published benchmark chooses by."""
    return len(values) / (1 / np.maximum(np.asarray(values, dtype=np.float64), 1e-9)).sum(axis=0)
