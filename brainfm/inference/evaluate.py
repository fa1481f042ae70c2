"""Evaluation: answers against what a manifest says, a row a case, and scores with their uncertainty."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfm.data.manifest import Manifest, read_manifest
from brainfm.errors import ConfigError
from brainfm.files import check_writable, write_table, write_text
from brainfm.inference.predict import predict_manifest, read_claim
from brainfm.seen import Overlap, overlap
from brainfm.tasks.bundle import Bundle, load_engine
from brainfm.tasks.engine import Engine
from brainfm.tasks.registry import kind_of

CASES = "cases.csv"
SUMMARY = "summary.json"
EMPTY = ("one", "fomo", "skip")


@dataclass(frozen=True)
class Evaluation:
    """What evaluate found.

    Attributes:
        rows: a mapping a case, as written to cases.csv.
        summary: as written to summary.json.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def evaluate(
    manifest: str | os.PathLike[str] | Manifest,
    out: str | os.PathLike[str],
    *,
    bundle: str | os.PathLike[str] | Bundle | None = None,
    predictions: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
    empty: str = "one",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Scores a bundle, or what it answered earlier, on the labelled sessions of a manifest.

    Of an answer for a whole session: the scores of scoring/answers.py with intervals by subject. Of a segmentation, per
    case: Dice, surface Dice at 1 mm and volumes in ml; with several classes each of these per class too, and the first
    two as the mean over the classes. A labelled case without a mask, because its prediction failed, scores 0 and says
    so in the column ``note``. Sessions without the label are counted and left out.

    Args:
        out: a folder; gets ``cases.csv``, ``summary.json`` and, with a bundle, the masks in ``predictions/``.
        bundle, predictions: one of them; ``predictions`` is a folder that predict_manifest wrote.
        seed: of the bootstrap.
        empty: of a segmentation, what a class counts that neither mask nor label has in a case: ``one`` Dice and
            surface Dice 1; ``fomo`` surface Dice 0, as the FOMO26 challenge does; ``skip`` neither.
        progress: called with (cases predicted, cases in all).

    Raises:
        ManifestError: no session has the label.
        ScanError: a label cannot be read or lies on another grid than its mask.
        ConfigError: neither or both of bundle and predictions, or monai is missing.
    """
    if (bundle is None) == (predictions is None):
        raise ConfigError("evaluate needs either bundle= or predictions=, found both or neither")
    if empty not in EMPTY:
        raise ConfigError(f"empty={empty}: expected {', '.join(EMPTY)}")
    folder = Path(out)
    check_writable(folder)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    engine = None if bundle is None else load_engine(bundle, device, precision, overlap)
    if engine is not None:
        mark, task = engine.fingerprint, engine.task
    else:
        mark, task = read_claim(Path(str(predictions)))
    scorer = kind_of(task.kind).evaluator(manifest, task, fresh=engine is not None, empty=empty)
    answers = folder / "predictions" if engine is not None else Path(str(predictions))
    if engine is not None:
        predict_manifest(engine, manifest, answers, sessions=scorer.sessions, progress=progress)
    rows = scorer.rows(answers)
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_table(folder / CASES, names, [[_cell(row.get(name)) for name in names] for row in rows])
    summary = scorer.summary(rows, mark, seed) | _seen(engine, rows)
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return Evaluation(rows, summary)


def _seen(engine: Engine | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the people of these rows the bundle's backbone was pre-trained on, where it is known."""
    found = overlap(engine.seen if engine is not None else None, (f"{row['dataset']}/{row['subject']}" for row in rows))
    return {"seen_in_pretraining": "unknown" if found is None else found.to_dict()}


def _cell(value: Any) -> Any:
    """Six digits are enough for a table; a number that is not there is an empty cell."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return "" if value is None else value


def describe(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines for a terminal."""
    lines = [
        f"{summary['cases']} cases of {summary['subjects']} subjects, {summary['sessions_without_label']} sessions "
        f"without the label {summary['target']} left out, {summary['without_prediction']} without a prediction"
    ]
    if isinstance(summary.get("seen_in_pretraining"), Mapping):
        lines.append(f"note: {Overlap(**summary['seen_in_pretraining'])}")
    if "empty" in summary:
        both = f"both masks empty in {summary['both_empty']} cases"
        lines.append(f"{both}; {summary['conventions']} (empty={'|'.join(EMPTY)})")
    metrics = summary["metrics"]
    for name in ("dice", "surface_dice_1mm") if "dice" in metrics else metrics:
        if metrics[name] is None:
            lines.append(f"{name}: undefined, no case counts")
            continue
        numbers = [
            "undefined" if metrics[name][k] is None else f"{metrics[name][k]:.3f}" for k in ("mean", "low", "high")
        ]
        lines.append(f"{name}: {numbers[0]} [{numbers[1]}, {numbers[2]}]")
    return lines
