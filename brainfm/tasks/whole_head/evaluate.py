"""Evaluation of answers for whole heads against the manifest: a row a session, scores with intervals by subject."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.columns import Unusable
from brainfm.data.manifest import Manifest
from brainfm.errors import ManifestError
from brainfm.scoring.calibration import expected_calibration_error
from brainfm.scoring.intervals import bootstrap
from brainfm.specs import TaskSpec
from brainfm.tasks.answers import Key, SessionAnswer
from brainfm.tasks.evaluator import Evaluator
from brainfm.tasks.registry import answer_name
from brainfm.tasks.whole_head.answer import read_answer
from brainfm.tasks.whole_head.scores import answer_score, answer_scores
from brainfm.tasks.whole_head.sorts import read_session, sort_of


@dataclass(frozen=True)
class _Visit:
    """A session of a manifest: the columns of its rows, of several the first that is filled in."""

    key: Key
    columns: Mapping[str, str]


def truths(manifest: Manifest, spec: TaskSpec) -> tuple[dict[Key, np.ndarray], list[str]]:
    """The answers that the manifest has, and a sentence for each session without one.

    Raises: ManifestError where no session has one, or one is impossible.
    """
    found, left_out = {}, []
    for key, scans in manifest.sessions().items():
        columns: dict[str, str] = {}
        for scan in scans:
            columns |= {name: text for name, text in scan.columns.items() if text and name not in columns}
        try:
            found[key] = read_session(_Visit(key, columns), spec)
        except Unusable as reason:
            left_out.append(str(reason))
    if not found:
        raise ManifestError(f"{manifest.path}: no session has an answer to {spec.target}; {left_out[0]}")
    return found, left_out


class AnswerEvaluator(Evaluator):
    """Scores answers for whole heads; see `Kind.evaluator`.

    A session whose prediction failed has no answer: it is counted, and does not enter the scores.
    """

    def __init__(self, manifest: Manifest, task: TaskSpec) -> None:
        self.task, self.path = task, manifest.path
        self.truths, self.left_out = truths(manifest, task)
        self.sessions = self.truths.keys()
        self.answered: list[tuple[Key, np.ndarray, list[float]]] = []

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        self.answered = []
        for key, truth in self.truths.items():
            file = folder / answer_name(key, self.task)
            row: dict[str, Any] = dict(zip(("dataset", "subject", "session"), key))
            row["truth"] = sort_of(self.task).shown(truth, self.task)
            if file.is_file():
                found = read_answer(file)
                row |= found.cells()
                self.answered.append((key, truth, _numbers(found)))
            rows.append(row | {"note": "" if file.is_file() else "no prediction"})
        if not self.answered:
            raise ManifestError(f"{folder}: no session with an answer in {self.path} was predicted")
        return rows

    def summary(self, rows: list[dict[str, Any]], bundle: str, seed: int) -> dict[str, Any]:
        return _summary(self.answered, self.task, rows, self.left_out, seed) | {"bundle": bundle}


def _numbers(found: SessionAnswer) -> list[float]:
    if found.probabilities is None:
        assert isinstance(found.answer, float | int)
        return [float(found.answer)]
    return list(found.probabilities.values())


def _summary(
    answered: list[tuple[Key, np.ndarray, list[float]]],
    task: TaskSpec,
    rows: list[dict[str, Any]],
    left_out: list[str],
    seed: int,
) -> dict[str, Any]:
    sort = sort_of(task)
    truth = sort.right(np.stack([t for _, t, _ in answered]).astype(np.float64))
    given = sort.given(np.array([a for _, _, a in answered]))
    groups = [f"{key[0]}/{key[1]}" for key, _, _ in answered]
    strata = sort.strata(truth)
    metrics: dict[str, Any] = {}
    for name in answer_scores(task, truth, given):
        found = vars(bootstrap(answer_score(task, name), truth, given, groups=groups, seed=seed, strata=strata))
        metrics[name] = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in found.items()}
    if sort.probable:
        metrics["calibration_error"] = {"mean": expected_calibration_error(given, truth), "low": None, "high": None,
                                        "n": len(groups)}  # fmt: skip
    return {
        "target": task.target,
        "values": list(task.values),
        "cases": len(rows),
        "subjects": len(set(groups)),
        "without_prediction": sum(row["note"] != "" for row in rows),
        "sessions_without_label": len(left_out),
        "left_out": left_out,
        "interval": "bootstrap by subject, expanded percentiles, 95 %, 2000 resamples",
        "seed": seed,
        "metrics": metrics,
    }
