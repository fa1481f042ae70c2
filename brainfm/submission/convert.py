"""Organisers' fine-tuning data -> a manifest: scans by contrast, answers as columns, masks where they lie on a scan.

``FOLDER/preprocessed/sub_N/ses_M/NAME.nii.gz`` with ``FOLDER/labels/sub_N/[ses_M/]{label.txt,labels.txt,seg.nii.gz}``,
where FOLDER is the task's folder, once or twice (``Task_1/Task_1``), or the folder given. Nothing is copied or changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.data.manifest import Scan, delimiter_of, write_left_out, write_manifest
from brainfm.errors import ManifestError, ScanError
from brainfm.files import check_writable
from brainfm.imaging import nifti
from brainfm.imaging.nifti import FileGrid
from brainfm.submission.challenge import IMAGES, ChallengeTask, input_of

SCANS, LABELS = "preprocessed", "labels"


@dataclass(frozen=True)
class Converted:
    """What became of a folder.

    Attributes:
        manifest: the file that was written.
        sessions, answered: how many there are, and how many of them have the task's answer.
        notes: what is missing, strange or was left out; one line each.
        left_out: (file, reason), also beside the manifest.
    """

    manifest: Path
    sessions: int
    answered: int
    notes: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Answer:
    columns: Mapping[str, str]
    notes: Sequence[str]
    left_out: Sequence[tuple[str, str]]
    copies: Sequence[_Copy]


@dataclass(frozen=True)
class _Copy:
    """A mask that gets the grid of a scan of its own shape."""

    path: Path
    mask: Path
    scan: Path

    def write(self) -> None:
        volume, grid = nifti.read(self.mask, labels=True)
        stored = grid.from_ras(volume.voxels)  # in the file's own order, which is what the scan's header describes
        other = nifti.read_header(self.scan).grid
        nifti.write_labels(self.path, other.to_ras(stored).astype(np.uint16), self.scan)


def convert(task: ChallengeTask, root: Path, out: Path, repair: bool = False) -> Converted:
    """Writes the manifest of a task's fine-tuning data.

    A mask that lies on another grid than every scan of its session is left out and said: its place cannot be trusted.

    Args:
        root: what the organisers' archive unpacks to, or the task's folder in it.
        out: the manifest, ``.csv`` or ``.tsv``.
        repair: where such a mask has the very shape of a scan, its voxels are taken as that scan's, and a copy with the
            scan's header is written into ``<out>_masks/``.

    Raises:
        ManifestError: another ending, no scan of the task is there, or no session has an answer.
        FileError: where the manifest cannot be written.
    """
    delimiter_of(out)
    check_writable(out.parent)
    folder = task_folder(task, root)
    rows: list[Scan] = []
    notes: list[str] = []
    left_out: list[tuple[str, str]] = []
    copies: list[_Copy] = []
    answered = sessions = 0
    for subject, session, place in _sessions(folder / SCANS):
        name = f"{subject}/{session}" if session else subject
        found, strange = _scans(task, place)
        left_out += [(str(file), f"no scan of {task.id}") for file in strange]
        if not found:
            left_out.append((str(place), "no scan of the task in this session"))
            continue
        notes += [f"{name}: {said}" for said in _missing(task, found)]
        labels = [folder / LABELS / subject / session, folder / LABELS / subject] if session else []
        answer = _answer(task, labels or [folder / LABELS / subject], found, _copies(out, name) if repair else None)
        notes += [f"{name}: {said}" for said in answer.notes]
        left_out += answer.left_out
        copies += answer.copies
        sessions += 1
        answered += _target_column(task) in answer.columns
        rows += [
            Scan(task.id, subject, session, contrast, str(path.absolute()), dict(answer.columns))
            for contrast, path in found.items()
        ]
    if not rows:
        raise ManifestError(
            f"{folder / SCANS}: no scan of {task.id} ({_expected(task)}) in sub_N/ses_M folders{_first_of(left_out)}"
        )
    if not answered:
        expected = " or ".join([*task.answers, *([task.mask] if task.kind == "segmentation" else [])])
        raise ManifestError(
            f"{folder / LABELS}: no answer for any of {sessions} sessions, expected {expected} in each"
            f"{_first_of(left_out)}"
        )
    for copy in copies:
        copy.write()
    write_manifest(out, rows)
    write_left_out(out, left_out)
    if sessions != task.cases:
        notes.append(f"{sessions} sessions, {task.cases} were given out")
    return Converted(out, sessions, answered, tuple(notes), tuple(left_out))


def task_folder(task: ChallengeTask, root: Path) -> Path:
    """The folder that holds ``preprocessed/``. Raises: ManifestError where there is none."""
    tried = [root, *(root / Path(*[name] * times) for name in task.folders for times in (1, 2))]
    found = next((folder for folder in tried if (folder / SCANS).is_dir()), None)
    if found is None:
        raise ManifestError(f"no folder {SCANS} in {', '.join(map(str, tried))}; expected the data of {task.id} there")
    return found


def _sessions(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """Subject, session (empty: the scans lie in the subject's folder) and folder, sorted as people count."""
    for subject in sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: _counted(p.name)):
        visits = sorted((p for p in subject.iterdir() if p.is_dir()), key=lambda p: _counted(p.name))
        for place in visits or [subject]:
            yield subject.name, place.name if visits else "", place


def _counted(name: str) -> tuple[int, str]:
    digits = "".join(c for c in name if c.isdigit())
    return int(digits or 0), name


def _scans(task: ChallengeTask, place: Path) -> tuple[dict[str, Path], list[Path]]:
    """The task's scans by contrast, in its order, and the images that are none of them."""
    found: dict[str, Path] = {}
    strange = []
    for path in sorted(p for p in place.iterdir() if p.name.endswith(IMAGES)):
        one = input_of(task, path.name)
        if one is None or one.contrast in found:
            strange.append(path)
        else:
            found[one.contrast] = path
    return {one.contrast: found[one.contrast] for one in task.inputs if one.contrast in found}, strange


def _missing(task: ChallengeTask, found: Mapping[str, Path]) -> list[str]:
    always = [one.file for one in task.inputs if not one.group and one.contrast not in found]
    groups = [
        " or ".join(one.file for one in choices)
        for choices in task.groups.values()
        if not any(one.contrast in found for one in choices)
    ]
    return [f"no {name}.nii.gz" for name in [*always, *groups]]


def _expected(task: ChallengeTask) -> str:
    return ", ".join(f"{one.file}.nii.gz" for one in task.inputs)


def _first_of(left_out: Sequence[tuple[str, str]]) -> str:
    """Why the first file was left out, and how many were: for a sentence about nothing that is left."""
    if not left_out:
        return ""
    file, reason = left_out[0]
    return f" ({len(left_out)} left out, first {file}: {reason})"


def _copies(out: Path, name: str) -> Path:
    return out.with_name(f"{out.stem}_masks") / f"{name.replace('/', '_')}.nii.gz"


# ---- answers ---------------------------------------------------------------------------------------------------------


def _target_column(task: ChallengeTask) -> str:
    return _mask_column(task) if task.kind == "segmentation" else task.target


def _mask_column(task: ChallengeTask) -> str:
    """``_labels`` where a segmentation has several classes; the mask of another task is no more than a mask."""
    return f"{task.target}_labels" if task.kind == "segmentation" and task.high > 1 else f"{task.target}_mask"


def _answer(task: ChallengeTask, folders: Sequence[Path], scans: Mapping[str, Path], copy: Path | None) -> _Answer:
    columns: dict[str, str] = {}
    notes: list[str] = []
    left_out: list[tuple[str, str]] = []
    copies: list[_Copy] = []
    if task.answers:
        file = _first(folders, task.answers)
        try:
            columns[task.target] = _value(task, file) if file else ""
        except ManifestError as error:
            left_out.append((str(file), str(error)))
        if not columns.get(task.target):
            columns.pop(task.target, None)
            notes.append("no answer" if file is None else "its answer cannot be used")
    if task.mask:
        file = _first(folders, [task.mask])
        if file is not None:
            path, twin, said, reason = _mask(task, file, scans, copy)
            notes += said
            copies += [] if twin is None else [twin]
            if path is not None:
                columns[_mask_column(task)] = str(path.absolute())
            else:
                left_out.append((str(file), reason))
        elif task.kind == "segmentation":
            notes.append(f"no {task.mask}")
    return _Answer(columns, notes, left_out, copies)


def _first(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    return next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)


def _value(task: ChallengeTask, path: Path) -> str:
    """The number in a file; a class as a whole number, an age as exactly as it stands there."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    try:
        value = float(text)
    except ValueError:
        raise ManifestError(f"holds {text[:40]!r}, expected one number") from None
    if not (math.isfinite(value) and task.low <= value <= task.high):
        raise ManifestError(f"holds {text}, expected {task.low:g} to {task.high:g}")
    if task.kind == "classification" and value != int(value):
        raise ManifestError(f"holds {text}, expected a class: {task.low:g} or {task.high:g}")
    return str(int(value)) if value == int(value) else text


def _mask(
    task: ChallengeTask, path: Path, scans: Mapping[str, Path], copy: Path | None
) -> tuple[Path | None, _Copy | None, list[str], str]:
    """The mask to use, the copy that is still to be written where it is one, what is to be said of it, and the reason
    where there is none to use."""
    try:
        volume, grid = nifti.read(path, labels=True)
        grids = {contrast: nifti.read_header(scan).grid for contrast, scan in scans.items()}
    except ScanError as error:
        return None, None, [f"{task.mask} cannot be read"], str(error)
    top = int(volume.voxels.max())
    said = [f"{task.mask} holds the label {top}, expected {task.low:g} to {task.high:g}"] if top > task.high else []
    if top == 0:
        said.append(f"{task.mask} is empty")
    if any(grid.same_place(other) for other in grids.values()):
        return path, None, said, ""
    twin = next((contrast for contrast, other in grids.items() if other.shape_vox == grid.shape_vox), None)
    apart = "" if twin is None else f", {_apart(grid, grids[twin])} off {scans[twin].name} of the same shape"
    said.append(f"{task.mask} lies on another grid than every scan{apart}")
    if twin is None or copy is None:
        return None, None, said, f"lies on another grid than every scan of its session{apart}"
    said.append(f"its voxels were taken as those of {scans[twin].name}")
    return copy, _Copy(copy, path, scans[twin]), said, ""


def _apart(grid: FileGrid, other: FileGrid) -> str:
    """How far apart two grids of one shape lie, or that they are turned against each other."""
    if grid.orientation != other.orientation:
        return "turned"
    return f"{grid.apart_mm(other):.1f} mm"
