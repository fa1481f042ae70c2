"""Transferred weights: what a fine-tuning took from a backbone's file, and what is to be said of the two together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm.data.store import Store
from brainfm.files import write_whole
from brainfm.nets.backbone_file import LoadedBackbone, spacing_note
from brainfm.nets.transfer import TransferReport
from brainfm.seen import Overlap, overlap
from brainfm.specs import TaskSpec
from brainfm.study import decoder_trial
from brainfm.tasks.study import Split
from brainfm.tasks.task import Task

FILE = "transfer.json"


def report_of(task: Task, pretrained: LoadedBackbone, decoder: bool) -> TransferReport:
    """Tensors of the task that came from the file, those that are fresh, and those of the file that found no use."""
    groups = {
        "backbone": list(pretrained.backbone.state_dict()),
        "decoder": list(pretrained.decoder.state_dict()) if pretrained.decoder is not None else [],
        "objective": list(pretrained.extra),
    }
    groups["heads"] = [f"{key}.{name}" for key, head in pretrained.heads.items() for name in head.state_dict()]
    names = [f"{group}.{name}" for group in groups for name in groups[group]]
    # what the file calls it -> what the task does
    places = {"backbone.": "backbone."} | ({"decoder.": "decoder."} if decoder else {}) | dict(task.reads_of_file)

    def place(name: str) -> str | None:
        return next((own + name.removeprefix(there) for there, own in places.items() if name.startswith(there)), None)

    taken = {place(name) for name in names}
    return TransferReport(
        tuple(name for name in names if place(name)),
        tuple(name for name in task.state_dict() if name not in taken),
        tuple(name for name in names if not place(name)),
    )


def write(folder: Path, report: TransferReport, last_layer: str) -> None:
    """Beside a training's checkpoint."""
    values = {name: list(names) for name, names in vars(report).items()}
    write_whole(folder / FILE, (json.dumps(values | {"last_layer": last_layer}, indent=1) + "\n").encode())


def notes(pretrained: LoadedBackbone, store: Store, spec: TaskSpec) -> list[str]:
    """Sentences about voxels of a size that the pre-training never saw."""
    views = [("the scans", store.spec.spacing_mm)]
    if spec.view_mm:
        views.append(("the whole-head view", (spec.view_mm,) * 3))
    found = ((what, spacing_note(spacing, pretrained.voxel_mm)) for what, spacing in views)
    return [f"{what} of {store.path}: {note}" for what, note in found if note is not None]


def tested(pretrained: LoadedBackbone, splits: Sequence[Split]) -> Overlap | None:
    """How many of the people that are held out the backbone has seen; None where its file does not say."""
    return overlap(pretrained.subjects, (case.session.subject_key for split in splits for case in split.held))


def of_run(
    folder: Path, splits: Sequence[Split], pretrained: LoadedBackbone | None, asked: bool | str
) -> dict[str, Any]:
    """What results.json says of it: ``transfer`` (None from fresh weights) and ``seen_in_pretraining`` (None from fresh
    weights, ``unknown`` where the file does not say).

    Args:
        folder: holds a folder for each split.
        asked: ``adapt.decoder``.
    """
    if pretrained is None:
        return {"transfer": None, "seen_in_pretraining": None}
    seen = tested(pretrained, splits)
    return {
        "transfer": _summary(folder, splits, pretrained, asked),
        "seen_in_pretraining": "unknown" if seen is None else seen.to_dict(),
    }


def dense_channels(folder: Path, pretrained: LoadedBackbone | None) -> int:
    """Of the member that was trained in this folder: those of the decoder that it took, or 0."""
    if pretrained is None or pretrained.decoder is None:
        return 0
    report = json.loads((folder / FILE).read_text())
    taken = any(name.startswith("decoder.") for name in report["loaded"])
    return sum(pretrained.decoder.parts.values()) if taken else 0


def trials(folder: Path, splits: Sequence[Split]) -> list[dict[str, Any]]:
    """What the trials of some folds found and cost."""
    files = [folder / split.name / decoder_trial.FILE for split in splits]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def _summary(folder: Path, splits: Sequence[Split], pretrained: LoadedBackbone, asked: bool | str) -> dict[str, Any]:
    folds: dict[str, Any] = {}
    for split in splits:
        report = json.loads((folder / split.name / FILE).read_text())
        file = folder / split.name / decoder_trial.FILE
        trial = json.loads(file.read_text()) if file.exists() else None
        folds[split.name] = {
            "decoder": any(name.startswith("decoder.") for name in report["loaded"]),
            "last_layer": report["last_layer"],
            "report": str(TransferReport(*(tuple(report[k]) for k in ("loaded", "left_at_init", "unused")))),
            "trial": {k: v for k, v in trial.items() if k not in ("receipts", "mark")} if trial else None,
        }
    return {
        "backbone": pretrained.fingerprint, "file_has_decoder": pretrained.decoder is not None, "asked": asked,
        "folds": folds,
    }  # fmt: skip


def describe(found: Mapping[str, Any]) -> list[str]:
    """The same in sentences; nothing where the file has no decoder."""
    if not found["file_has_decoder"]:
        return []
    folds = found["folds"]
    taken = sum(fold["decoder"] for fold in folds.values())
    if found["asked"] is False and taken:
        return [f"decoder of the backbone file: read as it is, never trained, in {taken} of {len(folds)} members"]
    lines = [
        f"decoder of the backbone file (adapt.decoder={str(found['asked']).lower()}): taken in {taken} of {len(folds)} "
        "trainings"
    ]
    return lines + [f"{name}: {decoder_trial.words(f['trial'])}" for name, f in folds.items() if f["trial"]]


def headline(found: Mapping[str, Any]) -> dict[str, Any]:
    """What scores.json and the model card say of it."""
    said: dict[str, Any] = {}
    transfer, seen = found.get("transfer"), found.get("seen_in_pretraining")
    if transfer and transfer["file_has_decoder"]:
        folds = list(transfer["folds"].values())
        tried = [fold["trial"] for fold in folds if fold["trial"] and fold["trial"]["subjects"]]
        said["decoder"] = {
            "asked": transfer["asked"], "taken": sum(fold["decoder"] for fold in folds), "of": len(folds),
            "gain_in_trials": sum(t["gain"] for t in tried) / len(tried) if tried else None,
            "trial_steps": sum(t["steps"] for t in tried),
        }  # fmt: skip
    return said if seen is None else said | {"seen_in_pretraining": seen}
