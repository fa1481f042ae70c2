"""Trial of a file's decoder: whether it helps a task, on inner folds of a training side, and remembered.

Two candidates, the encoder alone and encoder with decoder, are trained for a short while on each of two halves of the
training subjects and answer the other half; no case of the held-out side is looked at. The decoder is taken where it is
better by more than one standard error, else the simpler candidate stays. What a trial says depends on its length: a
training much shorter than the one it is for speaks for weights that need no learning.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from brainfm.errors import ConfigError
from brainfm.files import write_whole
from brainfm.scoring.folds import stratified_folds
from brainfm.tasks.study import Split

FILE = "decoder.json"
CANDIDATES = ("encoder", "decoder")
_FOLDS = 2
_LEAST = 4  # subjects, two a half


class Cost(Protocol):
    """Of a training."""

    @property
    def seconds(self) -> float: ...

    @property
    def receipt(self) -> dict[str, Any]: ...


# (split, decoder, folder, steps): trains ``split.trained`` for so many steps in the folder, with or without the
# decoder, and answers ``split.held``: the primary score of each case, and what it cost.
Trained = Callable[[Split, bool, Path, int], tuple[list[float], Cost]]


@dataclass(frozen=True)
class TrialSpec:
    """What is tried.

    Attributes:
        max_steps: of the training that the trial is for.
        share: of these steps that all short trainings take together,
        least: but each of them at least this many, or ``max_steps``.
        larger_is_better: of the score.
        seed: of the halves.
        mark: of all that the outcome depends on; an outcome of another mark is refused.
    """

    max_steps: int
    share: float
    least: int
    larger_is_better: bool
    seed: int
    mark: str

    @property
    def steps(self) -> int:
        """Of each of the four trainings."""
        share = round(self.share * self.max_steps / (_FOLDS * len(CANDIDATES)))
        return min(self.max_steps, max(self.least, share))

    def __str__(self) -> str:
        count = _FOLDS * len(CANDIDATES)
        return (
            f"trial of the decoder on inner folds of the training side: {count} trainings of {self.steps} steps, "
            f"{100 * count * self.steps / self.max_steps:.0f} % of the {self.max_steps} steps that follow"
        )


def inner_folds(split: Split, seed: int, strata: Mapping[str, str] | None) -> list[Split]:
    """Two splits of the training side, each half held out once; none where there are fewer than four subjects."""
    subjects = sorted({case.session.subject_key for case in split.trained})
    if len(subjects) < _LEAST:
        return []
    halves = stratified_folds(subjects, _FOLDS, seed + 15485863 + 7919 * split.repeat + split.fold, strata=strata)
    found = []
    for number, half in enumerate(halves):
        held = tuple(case for case in split.trained if case.session.subject_key in set(half))
        trained = tuple(case for case in split.trained if case.session.subject_key not in set(half))
        found.append(Split(split.repeat, 50 + _FOLDS * split.fold + number, trained, (), held))
    return found


def read(folder: Path, mark: str) -> dict[str, Any] | None:
    """What a trial found in this folder; None where there was none. Raises: ConfigError where it is another one's."""
    file = folder / FILE
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    if found["mark"] != mark:
        raise ConfigError(
            f"{file} was found with other settings or data: use another run= folder, or the same to go on"
        )
    return found


def tried(
    split: Split, folder: Path, spec: TrialSpec, strata: Mapping[str, str] | None, trained: Trained, chief: bool
) -> dict[str, Any]:
    """The outcome, JSON-able, from the folder where it is there already; ``taken`` is the answer.

    Interrupted, it goes on where it was. Every process calls it; the first one writes.
    """
    known = read(folder, spec.mark)
    if known is not None:
        return known
    place, rows, states = folder / "trial", [], []
    for number, inner in enumerate(inner_folds(split, spec.seed, strata)):
        answers = []
        for candidate in CANDIDATES:
            own = place / f"{candidate}{number}"
            scores, state = trained(inner, candidate == "decoder", own, spec.steps)
            answers.append(scores)
            states.append(state)
        subjects = [case.session.subject_key for case in inner.held]
        rows += [(number, subject, *pair) for subject, *pair in zip(subjects, *answers, strict=True)]
    outcome = verdict(rows, spec.larger_is_better) | {
        "steps": spec.steps * len(states),
        "of_steps": spec.max_steps,
        "seconds": sum(state.seconds for state in states),
        "receipts": [state.receipt for state in states],
        "mark": spec.mark,
    }
    if chief:
        write_whole(folder / FILE, (json.dumps(outcome, indent=1) + "\n").encode())
        shutil.rmtree(place, ignore_errors=True)  # checkpoints of trainings that nobody needs any more
    return outcome


def words(found: Mapping[str, Any]) -> str:
    """An outcome in a sentence."""
    what = "decoder taken" if found["taken"] else "encoder alone"
    if not found["subjects"]:
        return f"{what}: not tried with fewer than {_LEAST} training subjects"
    return (
        f"{what}: with the decoder {found['scores']['decoder']:.3f}, without {found['scores']['encoder']:.3f} on "
        f"{found['subjects']} inner subjects, gain {found['gain']:+.3f} with a standard error of "
        f"{found['standard_error']:.3f}; the trial took {found['steps']} steps beside {found['of_steps']}, "
        f"{found['seconds']:.0f} s"
    )


def verdict(rows: Sequence[tuple[int, str, float, float]], larger_is_better: bool) -> dict[str, Any]:
    """Whether the decoder is better by more than one standard error.

    The standard error is the larger of two: that of the mean over subjects, and that of the mean over inner folds,
    since two trainings differ by chance as well, however many subjects each of them answers.

    Args:
        rows: inner fold, subject, score of the encoder alone, score with the decoder; none: nothing could be tried.
    """
    if not rows:
        return {"taken": False, "subjects": 0}
    sign = 1 if larger_is_better else -1
    by_subject: dict[str, list[float]] = {}
    by_fold: dict[int, list[float]] = {}
    for fold, subject, alone, together in rows:
        by_subject.setdefault(subject, []).append(sign * (together - alone))
        by_fold.setdefault(fold, []).append(sign * (together - alone))
    gains = np.array([np.mean(values) for values in by_subject.values()])
    of_folds = np.array([np.mean(values) for values in by_fold.values()])
    gain = float(gains.mean())
    error = max(float(v.std(ddof=1)) / math.sqrt(len(v)) if len(v) > 1 else math.inf for v in (gains, of_folds))
    taken = gain > error  # false for what is not a number
    alone, together = (float(np.mean([row[place] for row in rows])) for place in (2, 3))
    return {
        "taken": taken, "subjects": len(gains), "scores": {"encoder": alone, "decoder": together},
        "gain": gain, "standard_error": error,
    }  # fmt: skip
