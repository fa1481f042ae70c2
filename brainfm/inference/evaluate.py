"""Masks against labels: a row a case, and means with their uncertainty."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import Manifest, read_manifest
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.files import check_writable, write_table, write_text
from brainfm.imaging import nifti
from brainfm.inference.engine import Engine
from brainfm.inference.evaluate_scans import evaluate_answers
from brainfm.inference.predict import (
    LISTING,
    Key,
    grid_owner,
    label_of,
    predict_manifest,
    read_claim,
    strange_grid,
)
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.scoring.masks import dice, require_monai, surface_dice, volume_ml
from brainfm.seen import Overlap, overlap
from brainfm.specs import TaskSpec
from brainfm.tasks.bundle import Bundle

CASES = "cases.csv"
SUMMARY = "summary.json"
_BOTH_EMPTY = {
    "one": "dice 1, surface dice 1",
    "fomo": "dice 1, surface dice 0 (as FOMO26 counts)",
    "skip": "left out of dice and surface dice",
}
EMPTY = tuple(_BOTH_EMPTY)
_SCORES = ("dice", "surface_dice_1mm", "volume_ml_true", "volume_ml_predicted")


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

    Of a scan-level question: the scores of scoring/answers.py with intervals by subject. Of a segmentation, per case:
    Dice, surface Dice at 1 mm and volumes in ml; with several classes each of these per class too, and the first two
    as the mean over the classes. A labelled case without a mask, because its prediction failed, scores 0 and says so
    in the column ``note``. Sessions without the label are counted and left out.

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
    engine = None if bundle is None else Engine.load(bundle, device, precision, overlap)
    if engine is not None:
        mark, task = engine.fingerprint, engine.task
    else:
        mark, task = read_claim(Path(str(predictions)))
    if task.kind != "segmentation":
        place = folder / "predictions" if engine is not None else Path(str(predictions))
        rows, summary = evaluate_answers(engine, manifest, folder, place, task, seed, progress)
        summary |= {"bundle": mark} | _seen(engine, rows)
        write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
        return Evaluation(rows, summary)
    require_monai()  # now, and not after hours of prediction
    if engine is not None:
        labels = _labels(manifest, task.target, check_grids=True)
        masks = folder / "predictions"
        predict_manifest(engine, manifest, masks, sessions=labels, progress=progress)
    else:
        masks = Path(str(predictions))
        labels = _labels(manifest, task.target, check_grids=False)
    files = _listed(masks)
    rows = [_row(key, label, is_mask, files.get(key), task, empty) for key, (label, is_mask) in labels.items()]
    summary = _summary(rows, task, mark, len(manifest.sessions()) - len(labels), seed, empty) | _seen(engine, rows)
    write_table(folder / CASES, list(rows[0]), [[_cell(v) for v in row.values()] for row in rows])
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return Evaluation(rows, summary)


def _seen(engine: Engine | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the people of these rows the bundle's backbone was pre-trained on, where it is known."""
    found = overlap(engine.seen if engine is not None else None, (f"{row['dataset']}/{row['subject']}" for row in rows))
    return {"seen_in_pretraining": "unknown" if found is None else found.to_dict()}


def _labels(manifest: Manifest, target: str, check_grids: bool) -> dict[Key, tuple[Path, bool]]:
    """The label file of every session that has one, and whether it is a mask. Raises: ManifestError where none has."""
    found: dict[Key, tuple[Path, bool]] = {}
    for key, scans in manifest.sessions().items():
        label = label_of(scans, target)
        if label is None:
            continue
        found[key] = manifest.resolve(label.path), label.is_mask
        if check_grids:
            _check_grid(found[key][0], [manifest.resolve(scan.path) for scan in scans])
    if not found:
        raise ManifestError(
            f"{manifest.path} has no session with a path in {target}_mask or {target}_labels, expected at least one"
        )
    return found


def _check_grid(label: Path, scans: list[Path]) -> None:
    """Raises: ScanError where the label cannot be read or was drawn on no scan of its session."""
    nifti.read_header(label)
    try:
        owner = grid_owner(label, scans)
    except ScanError:
        return  # a scan's fault: its session is listed with this reason in failures.csv, and scores 0
    if owner is None:
        raise strange_grid(label)


def _listed(masks: Path) -> dict[Key, Path]:
    """The masks of a folder by session."""
    path = masks / LISTING
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {(row["dataset"], row["subject"], row["session"]): masks / row["file"] for row in rows}
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; run predict again to the end") from None
    except (KeyError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}); expected a table that brainfm predict wrote") from None


def _row(key: Key, label: Path, is_mask: bool, mask: Path | None, task: TaskSpec, empty: str) -> dict[str, Any]:
    """One case. Raises: ScanError where label and mask lie on different grids or the label cannot be read."""
    row: dict[str, Any] = dict(zip(("dataset", "subject", "session"), key))
    true_volume, true_grid = nifti.read(label, labels=True)
    true, spacing = true_volume.voxels, true_volume.spacing_mm
    if is_mask:
        true = (true != 0).astype(np.int32) * task.values[1]
    predicted = np.zeros_like(true)
    if mask is not None:
        mask_volume, mask_grid = nifti.read(mask, labels=True)
        if not mask_grid.same_place(true_grid):
            raise ScanError(f"{label}: lies on another grid than its prediction {mask}, expected the same grid")
        predicted = mask_volume.voxels
    scores = {value: _scores(predicted == value, true == value, spacing, empty) for value in task.values[1:]}
    if mask is None:  # as the challenge counts a container that crashed, even where both masks would be empty
        none = {"dice": 0.0, "surface_dice_1mm": 0.0, "volume_ml_predicted": math.nan}
        scores = {value: found | none for value, found in scores.items()}
    for name in _SCORES:
        values = [s[name] for s in scores.values()]
        known = [value for value in values if math.isfinite(value)]
        row[name] = float(np.sum(values)) if name.startswith("volume") else float(np.mean(known)) if known else math.nan
    if len(scores) > 1:
        row |= {f"{name}_{value}": s[name] for name in _SCORES for value, s in scores.items()}
    row["both_empty"] = int(mask is not None and not any((predicted == v).any() or (true == v).any() for v in scores))
    row["note"] = "" if mask is not None else "no prediction"
    return row


def _scores(
    predicted: np.ndarray, true: np.ndarray, spacing_mm: tuple[float, float, float], empty: str
) -> dict[str, float]:
    skipped = empty == "skip" and not predicted.any() and not true.any()
    both_empty = 0.0 if empty == "fomo" else 1.0
    return {
        "dice": math.nan if skipped else dice(predicted, true),
        "surface_dice_1mm": math.nan if skipped else surface_dice(predicted, true, spacing_mm, both_empty=both_empty),
        "volume_ml_true": volume_ml(true, spacing_mm),
        "volume_ml_predicted": volume_ml(predicted, spacing_mm),
    }


def _summary(
    rows: list[dict[str, Any]], task: TaskSpec, bundle: str, unlabelled: int, seed: int, empty: str
) -> dict[str, Any]:
    """Means over cases with 95 % bootstrap intervals; a case without a number (no predicted volume) does not count."""
    metrics = {}
    for name in (n for n in rows[0] if n.startswith(_SCORES)):
        known = [row for row in rows if math.isfinite(row[name])]
        values = np.array([row[name] for row in known])
        who = [f"{row['dataset']}/{row['subject']}" for row in known]
        metrics[name] = vars(bootstrap(mean_score, values, values, groups=who, seed=seed)) if known else None
    return {
        "target": task.target,
        "values": list(task.values),
        "bundle": bundle,
        "cases": len(rows),
        "subjects": len({(row["dataset"], row["subject"]) for row in rows}),
        "without_prediction": sum(row["note"] != "" for row in rows),
        "both_empty": sum(row["both_empty"] for row in rows),
        "sessions_without_label": unlabelled,
        "interval": "bootstrap of the mean over cases by subject, expanded percentiles, 95 %, 2000 resamples",
        "empty": empty,
        "conventions": f"both masks empty: {_BOTH_EMPTY[empty]}; one empty: 0; no prediction: 0",
        "seed": seed,
        "metrics": metrics,
    }


def _cell(value: Any) -> Any:
    """Six digits are enough for a table; a number that is not there is an empty cell."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


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
