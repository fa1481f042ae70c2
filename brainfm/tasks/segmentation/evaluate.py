"""Evaluation of masks against labels: Dice, surface Dice and volumes of each case, and their means."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import Manifest
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.imaging import nifti
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.scoring.masks import dice, require_monai, surface_dice, volume_ml
from brainfm.specs import TaskSpec
from brainfm.tasks.answers import LISTING, Key, grid_owner, label_of, strange_grid
from brainfm.tasks.evaluator import Evaluator

BOTH_EMPTY = {
    "one": "dice 1, surface dice 1",
    "fomo": "dice 1, surface dice 0 (as FOMO26 counts)",
    "skip": "left out of dice and surface dice",
}
_SCORES = ("dice", "surface_dice_1mm", "volume_ml_true", "volume_ml_predicted")


class MaskEvaluator(Evaluator):
    """Scores masks; see `Kind.evaluator`.

    A labelled case without a mask, because its prediction failed, scores 0 and says so.
    """

    def __init__(self, manifest: Manifest, task: TaskSpec, *, fresh: bool, empty: str) -> None:
        require_monai()  # now, and not after hours of prediction
        self.task, self.empty = task, empty
        self.labels = _labels(manifest, task.target, check_grids=fresh)
        self.sessions = self.labels.keys()
        self.unlabelled = len(manifest.sessions()) - len(self.labels)

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        files = _listed(folder)
        return [
            _row(key, label, is_mask, files.get(key), self.task, self.empty)
            for key, (label, is_mask) in self.labels.items()
        ]

    def summary(self, rows: list[dict[str, Any]], bundle: str, seed: int) -> dict[str, Any]:
        return _summary(rows, self.task, bundle, self.unlabelled, seed, self.empty)


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
        "conventions": f"both masks empty: {BOTH_EMPTY[empty]}; one empty: 0; no prediction: 0",
        "seed": seed,
        "metrics": metrics,
    }
