"""Answers of a scan-level bundle against the manifest's columns: a row a session, scores with intervals by subject."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.answers import Unusable, read_answer
from brainfm.data.manifest import Manifest
from brainfm.errors import ManifestError
from brainfm.files import write_table
from brainfm.inference.engine import Engine
from brainfm.inference.predict import Key, answer_name, predict_manifest
from brainfm.inference.scan_answers import ScanAnswer
from brainfm.inference.scan_answers import read_answer as read_file
from brainfm.scoring.answers import scan_score, scan_scores
from brainfm.scoring.calibration import expected_calibration_error
from brainfm.scoring.intervals import bootstrap
from brainfm.specs import TaskSpec


@dataclass(frozen=True)
class _Session:
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
            found[key] = read_answer(_Session(key, columns), spec)
        except Unusable as reason:
            left_out.append(str(reason))
    if not found:
        raise ManifestError(f"{manifest.path}: no session has an answer to {spec.target}; {left_out[0]}")
    return found, left_out


def evaluate_answers(
    engine: Engine | None,
    manifest: Manifest,
    folder: Path,
    masks: Path,
    task: TaskSpec,
    seed: int,
    progress: Callable[[int, int], None],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows, written to ``cases.csv``, and the summary.

    A session whose prediction failed has no answer: it is counted, and does not enter the scores.

    Args:
        engine: predicts into ``masks``; None where the answers lie there already.
        seed: of the bootstrap.
    """
    true, left_out = truths(manifest, task)
    if engine is not None:
        predict_manifest(engine, manifest, masks, sessions=true, progress=progress)
    rows, answered = [], []
    for key, truth in true.items():
        file = masks / answer_name(key, task)
        row: dict[str, Any] = dict(zip(("dataset", "subject", "session"), key))
        row["truth"] = " ".join("" if not math.isfinite(t) else f"{t:g}" for t in truth)
        if task.kind == "classification" and task.mode != "multilabel":
            row["truth"] = str(task.values[int(truth[0])])
        if file.is_file():
            found = read_file(file)
            row |= found.cells()
            answered.append((key, truth, _numbers(found)))
        rows.append(row | {"note": "" if file.is_file() else "no prediction"})
    if not answered:
        raise ManifestError(f"{masks}: no session with an answer in {manifest.path} was predicted")
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(folder / "cases.csv", names, [[_cell(row.get(name)) for name in names] for row in rows])
    return rows, _summary(answered, task, rows, left_out, seed)


def _numbers(found: ScanAnswer) -> list[float]:
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
    truth = np.stack([t for _, t, _ in answered]).astype(np.float64)
    given = np.array([a for _, _, a in answered])
    truth = truth if task.mode == "multilabel" else truth[:, 0]
    given = given[:, 0] if task.kind == "regression" else given
    groups = [f"{key[0]}/{key[1]}" for key, _, _ in answered]
    strata = truth.tolist() if task.kind == "classification" and task.mode != "multilabel" else None
    metrics: dict[str, Any] = {}
    for name in scan_scores(task, truth, given):
        found = vars(bootstrap(scan_score(task, name), truth, given, groups=groups, seed=seed, strata=strata))
        metrics[name] = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in found.items()}
    if task.kind == "classification":
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


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return "" if value is None else value
