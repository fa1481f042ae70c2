"""Files in; a mask on the grid of one of them, or an answer for the whole session, out."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.manifest import (
    CONTRASTS,
    LABEL_ENDINGS,
    Manifest,
    Scan,
    contrast_of,
    plain_first,
    read_manifest,
    session_labels,
)
from brainfm.data.sources import SourceFile
from brainfm.errors import BrainfmWarning, BundleError, ConfigError, FileError, ManifestError, ScanError
from brainfm.files import check_writable, write_table, write_text
from brainfm.imaging import nifti
from brainfm.imaging.endings import companions
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.preprocess import prepare_session, restore_probabilities
from brainfm.inference.engine import Engine, PathLike, in_order
from brainfm.inference.label_maps import check_labels, note_missing, reads_of
from brainfm.inference.scan_answers import (
    ScanAnswer,
    answer_scan,
    check_answer_file,
    read_answer,
    table_columns,
    write_answer,
)
from brainfm.specs import TaskSpec
from brainfm.tasks import postprocess
from brainfm.tasks.bundle import Bundle
from brainfm.tasks.windows import predict_windows

Key = tuple[str, str, str]  # dataset, subject, session
CLAIM = "predictions.json"
LISTING = "predictions.csv"
FAILURES = "failures.csv"
SOURCES = "sources.jsonl"  # a line an answer: what it was made from, so that a corrected scan is answered again
_LONGEST = 180  # characters of a name's readable part: with target and ending it stays below the 255 of most systems
_ENDINGS = (".nii", ".nii.gz")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")


def predict(
    bundle: PathLike | Bundle,
    inputs: Mapping[str, PathLike],
    out: PathLike | None = None,
    on: str | None = None,
    *,
    labels: Mapping[str, PathLike] | None = None,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
) -> np.ndarray | ScanAnswer:
    """The mask of one session, on the grid of one of its files; or what a scan-level bundle answers for the session.

    Args:
        bundle: a bundle's folder.
        inputs: file by contrast, e.g. ``{"flair": "flair.nii.gz"}``; any subset of the bundle's contrasts. A contrast
            that it was never trained on is used too, with a BrainfmWarning.
        out: where to write the mask, ``.nii`` or ``.nii.gz``: uint8, with the affine and orientation of the file it
            answers for; or the answer, ``.json`` (all that is known) or ``.txt`` (the bare number). It appears whole or
            not at all.
        on: the contrast whose file's grid is answered on; by default the first of the inputs.
        labels: the label map that a bundle may answer from, by its name, on the grid of an input; without it such a
            bundle answers from the scans alone, with a BrainfmWarning.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overlap: share of a window that its neighbour repeats; less is quicker and coarser.
        precision: ``auto`` (bfloat16 on a GPU that has it), ``32-true``, ``bf16-mixed`` or ``16-mixed``.

    Returns:
        uint8 label values, in the shape and axis order of that file; or the answer.

    Raises:
        BundleError: the bundle is missing, incomplete or was changed.
        ConfigError: an unknown contrast, no input at all, or an impossible output.
        ScanError: an input file is missing or cannot be used.
    """
    engine = Engine.load(bundle, device, precision, overlap)
    files = check_inputs(inputs, engine.task)
    on = next(iter(files)) if on is None else on
    if on not in files:
        raise ConfigError(f"no input {on} to answer on, expected one of the inputs {', '.join(files)}")
    maps = check_labels(labels or {}, engine.networks)
    if engine.task.kind != "segmentation":
        place = None if out is None else check_answer_file(Path(out))
        if not maps:
            note_missing(engine.networks, str(files[on]))
        found = answer_scan(engine, files, reference=on, labels=maps)
        if place is not None:
            write_answer(place, found)
        return found
    target = None if out is None else check_output(out, files.values())
    found_labels = answer(engine, files, reference=on)
    if target is not None:
        write_mask(target, found_labels, files[on])
    return found_labels


def answer(engine: Engine, files: Mapping[str, Path], reference: str, grid: FileGrid | None = None) -> np.ndarray:
    """Label values of one session, uint8, in the shape and axis order of a file.

    Args:
        files: file by contrast; those that the task was not trained on are looked at as well.
        reference: the contrast whose directions the network's grid takes.
        grid: of the file that is answered for; by default the reference's.

    Raises:
        ScanError: where any file cannot be used: what the user gave is used or refused, never dropped in silence.
    """
    prepared = prepare_session(files, {}, engine.preprocess, reference=reference, within=engine.region)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))
    order = in_order(files, engine.task)
    image = torch.stack([torch.from_numpy(prepared.scans.pop(contrast)) for contrast in order])
    recipe = prepared.recipes[reference]
    probabilities = _mean_probabilities(engine, image, torch.ones(len(files), dtype=torch.bool))
    if grid is not None:
        recipe = replace(recipe, file=grid)
    indices = restore_probabilities(probabilities.numpy(), recipe, shares=True)
    spacing_mm = np.linalg.norm(np.array(recipe.file.affine_mm)[:3, :3], axis=0)
    indices = postprocess.apply(indices, engine.decisions, spacing_mm.tolist())
    return np.asarray(engine.task.values, dtype=np.uint8)[indices]


def _mean_probabilities(engine: Engine, image: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[K, X, Y, Z] float32, the mean over the members of the ensemble."""
    total: torch.Tensor | None = None
    for network in engine.networks:
        probabilities = predict_windows(
            network,
            image,
            present,
            engine.task.patch_vox,
            overlap=engine.overlap,
            batch=1 if engine.device.type == "cpu" else 2,  # more gains no time on a CPU and costs memory
            device=engine.device,
            autocast=engine.autocast,
            mirror=engine.decisions.mirror,
        )
        total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise BundleError("the bundle has no networks, expected at least one")
    return total.div_(len(engine.networks))


# ---- what the user gave ----------------------------------------------------------------------------------------------


def check_inputs(inputs: Mapping[str, PathLike], task: TaskSpec) -> dict[str, Path]:
    """The files as paths, in the order given.

    Raises:
        ConfigError: for no input, a contrast outside the vocabulary, or one file twice.
        ScanError: for a file that is not there.
    """
    legal = ", ".join(task.contrasts)
    if not inputs:
        raise ConfigError(f"no input was given, expected one or more of {legal}")
    files: dict[str, Path] = {}
    for contrast, text in inputs.items():
        if contrast not in CONTRASTS:
            meant = contrast_of(contrast)
            hint = f"perhaps {meant!r}; " if meant in task.contrasts else ""
            raise ConfigError(f"input.{contrast}: unknown contrast, expected {hint}one of {', '.join(CONTRASTS)}")
        if contrast not in task.contrasts:
            warnings.warn(
                f"input.{contrast}: the bundle was trained on {legal}, never on {contrast}; its answer may be worse",
                BrainfmWarning,
                stacklevel=2,
            )
        path = Path(text)
        if not os.path.isfile(path):
            raise ScanError(f"{path}: no such file, given as input.{contrast}")
        twin = next((name for name, other in files.items() if other.samefile(path)), None)
        if twin is not None:
            raise ConfigError(f"input.{twin} and input.{contrast} are one file, {path}; expected a file each")
        files[contrast] = path
    return files


def check_output(out: PathLike, inputs: Collection[Path]) -> Path:
    """The output as a path. Raises: ConfigError where it is no mask or an input, FileError."""
    path = Path(out)
    if not path.name.endswith(_ENDINGS) or path.name in _ENDINGS:
        raise ConfigError(f"out={path}: expected a file that ends in .nii or .nii.gz")
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder, expected a file")
    if path.exists() and any(path.samefile(file) for file in inputs):
        raise ConfigError(f"out={path} is one of the inputs, expected another file")
    check_writable(path.parent)
    return path


def write_mask(path: Path, labels: np.ndarray, like: Path) -> None:
    """Writes labels in the axis order of ``like`` on its grid. Raises: FileError."""
    nifti.write_labels(path, nifti.read_header(like).grid.to_ras(labels), like)


# ---- a whole manifest ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of a manifest.

    Attributes:
        done, kept: sessions predicted now, and found finished.
        failures: key -> reason.
        again: of those predicted now, the ones that were there but whose files had changed.
    """

    done: int
    kept: int
    failures: dict[Key, str]
    again: tuple[Key, ...] = ()


def predict_manifest(
    bundle: PathLike | Bundle | Engine,
    manifest: PathLike | Manifest,
    out: PathLike,
    *,
    sessions: Collection[Key] | None = None,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """One mask or answer a session, ``<dataset>__<subject>__<session>_<target>.nii.gz`` or ``.json``; called again, it
    continues.

    A mask lies on the grid of the session's label for the target, where it has one, so that both can be compared; else
    on that of the first contrast of the task that the session has. A session that fails, in whatever way, is listed in
    ``failures.csv`` and the rest is done; ``predictions.csv`` lists the masks, or the answers themselves.

    Args:
        out: a folder of its own; masks of this bundle that are already there are kept, unless the files that they were
            made from have changed.
        sessions: only these.
        progress: called with (sessions done, sessions in all).

    Raises:
        BundleError, ManifestError: the bundle or the manifest cannot be used.
        ConfigError: the folder holds masks of another bundle.
        FileError: it cannot be written.
    """
    engine = bundle if isinstance(bundle, Engine) else Engine.load(bundle, device, precision, overlap)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    folder = Path(out)
    _claim(folder, engine)
    wanted = {key: scans for key, scans in manifest.sessions().items() if sessions is None or key in sessions}
    dense = engine.task.kind == "segmentation"
    maps = {} if dense else _label_maps(manifest, wanted, engine)
    columns = ["grid"] if dense else table_columns(engine.task)
    listed: list[list[object]] = []
    failures: dict[Key, str] = {}
    again: list[Key] = []
    kept = 0
    made_from = _read_sources(folder)
    for number, (key, scans) in enumerate(wanted.items()):
        progress(number, len(wanted))
        name = answer_name(key, engine.task)
        try:
            plan = _plan(manifest, key, scans, engine.task)
            there = (folder / name).is_file()
            if there and _have_changed(_files_of(plan, maps.get(key)), made_from.get(name, {})):
                again.append(key)
                there = False
            if there:
                kept += 1
                cells = [str(plan[2])] if dense else _table_cells(read_answer(folder / name), columns)
            else:
                stamps = {str(path): SourceFile.of(path).stamp() for path in _files_of(plan, maps.get(key))}
                cells = _answered(engine, plan, folder / name, columns, maps.get(key))
                _note_sources(folder, name, stamps)
            listed.append([*key, *cells, name])
        except (ScanError, ManifestError) as error:
            failures[key] = str(error)
        except (ConfigError, BundleError):
            raise  # of the folder or the bundle: the next session would meet it as well
        except Exception as error:  # one session's trouble must not cost the others; it is reported, not swallowed
            failures[key] = f"cannot be answered ({type(error).__name__}: {error})"
    progress(len(wanted), len(wanted))
    write_table(folder / LISTING, ["dataset", "subject", "session", *columns, "file"], listed)
    write_table(folder / FAILURES, ["dataset", "subject", "session", "reason"], [[*k, r] for k, r in failures.items()])
    return Report(len(listed) - kept, kept, failures, tuple(again))


_Plan = tuple[dict[str, Path], str, Path]  # input files by contrast, the reference contrast, whose grid is answered on


def _answered(
    engine: Engine, plan: _Plan, path: Path, columns: Sequence[str], maps: Mapping[str, Path] | None
) -> list[object]:
    """Answers one session and writes it; returns its cells of the table."""
    files, reference, like = plan
    if engine.task.kind == "segmentation":
        write_mask(path, answer(engine, files, reference, nifti.read_header(like).grid), like)
        return [str(like)]
    found = answer_scan(engine, files, reference, maps)
    write_answer(path, found)
    return _table_cells(found, columns)


def _table_cells(found: ScanAnswer, columns: Sequence[str]) -> list[object]:
    cells = found.cells()
    return [cells[column] for column in columns]


def _files_of(plan: _Plan, maps: Mapping[str, Path] | None) -> list[Path]:
    """All files that an answer depends on."""
    shown = [*plan[0].values(), plan[2], *(maps or {}).values()]
    return list(dict.fromkeys([*shown, *(other for path in shown for other in companions(path))]))


def _have_changed(files: Sequence[Path], stamps: Mapping[str, Any]) -> bool:
    """Whether any of the files is another than when the answer was made; of answers of before nothing is known."""
    return bool(stamps) and any(
        str(path) not in stamps or not SourceFile.of(path).is_as(stamps[str(path)]) for path in files
    )


def _note_sources(folder: Path, name: str, stamps: Mapping[str, Any]) -> None:
    try:
        with (folder / SOURCES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "made_from": stamps}) + "\n")
    except OSError as error:
        raise FileError.of(error, folder / SOURCES) from None


def _read_sources(folder: Path) -> dict[str, dict[str, Any]]:
    """Answer -> path -> stamp; of several lines the last counts, half a line is passed over."""
    found = {}
    path = folder / SOURCES
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            found[str(entry["file"])] = dict(entry["made_from"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _label_maps(
    manifest: Manifest, sessions: Mapping[Key, Sequence[Scan]], engine: Engine
) -> dict[Key, dict[str, Path]]:
    """The label map that the bundle reads, by session and column; who lacks it is said once."""
    reads = reads_of(engine.networks)
    if reads is None:
        return {}
    named = {key: session_labels(scans).get(reads.labels) for key, scans in sessions.items()}
    lacking = [key for key, path in named.items() if path is None]
    if lacking:
        first = "/".join(part for part in lacking[0] if part)
        note_missing(engine.networks, f"{len(lacking)} of {len(named)} sessions, first {first}")
    return {key: {reads.labels: manifest.resolve(path)} for key, path in named.items() if path is not None}


def answer_name(key: Key, task: TaskSpec) -> str:
    """The file in which the answer for a session lies."""
    return mask_name(key, task.target, ".nii.gz" if task.kind == "segmentation" else ".json")


def mask_name(key: Key, target: str, ending: str = ".nii.gz") -> str:
    """A file name that is readable, legal on every system and another one for every session.

    An empty session is left out. Where a part holds other characters than letters, digits, ``.``, ``-`` and single
    ``_``, they become ``-``, what is too long is cut, and eight digits of a hash keep the name unique.
    """
    parts = list(key if key[2] else key[:2])
    readable = "__".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip(".-") for part in parts)
    if all(_PLAIN.fullmatch(part) for part in parts) and len("__".join(parts)) <= _LONGEST:
        readable = "__".join(parts)
    else:
        digest = hashlib.blake2b("\0".join(key).encode(errors="surrogateescape"), digest_size=4).hexdigest()
        readable = f"{readable[:_LONGEST]}-{digest}"
    return f"{readable}_{re.sub(r'[^A-Za-z0-9.-]+', '-', target)[:50]}{ending}"


@dataclass(frozen=True)
class Label:
    """A session's label for the target: its path as written, and whether any value but 0 means the one class."""

    path: str
    is_mask: bool


def label_of(scans: Sequence[Scan], target: str) -> Label | None:
    """None where the session has no such label. Raises: ManifestError where its rows contradict each other."""
    labels = session_labels(scans)
    for ending in LABEL_ENDINGS:
        if target + ending in labels:
            return Label(labels[target + ending], ending == "_mask")
    return None


def _plan(manifest: Manifest, key: Key, scans: Sequence[Scan], task: TaskSpec) -> _Plan:
    """The input files, the reference contrast, and the file whose grid is answered on.

    Of several scans of one contrast the one with the plainest name is read. A session without any contrast that the
    task was trained on is answered from what it has, with a warning.
    """
    shown: dict[str, Path] = {}
    there = {scan.contrast for scan in scans} - {"unknown"}
    contrasts = task.contrasts
    if there and not there & set(contrasts):
        contrasts = tuple(sorted(there))
        trained = ", ".join(task.contrasts)
        warnings.warn(
            f"{'/'.join(key)}: has only {', '.join(contrasts)}, the bundle was trained on {trained}; its answer may be "
            "worse",
            BrainfmWarning,
            stacklevel=3,
        )
    for contrast in contrasts:
        found = sorted((scan for scan in scans if scan.contrast == contrast), key=plain_first)
        if found:
            shown[contrast] = manifest.resolve(found[0].path)
    if not shown:
        raise ManifestError(f"{'/'.join(key)} has none of the contrasts {', '.join(task.contrasts)}")
    first = next(iter(shown))
    label = label_of(scans, task.target) if task.kind == "segmentation" else None
    if label is None:
        return shown, first, shown[first]
    path = manifest.resolve(label.path)
    on = grid_owner(path, [manifest.resolve(scan.path) for scan in scans])
    if on is None:
        raise strange_grid(path)
    return shown, next((contrast for contrast, file in shown.items() if file == on), first), path


def grid_owner(label: Path, scans: Sequence[Path]) -> Path | None:
    """The scan of the session on whose grid the label was drawn; only headers are read.

    Raises: ScanError where the label or a scan is missing or has no usable header.
    """
    grid = nifti.read_header(label).grid
    return next((path for path in scans if nifti.read_header(path).grid.same_place(grid)), None)


def strange_grid(label: Path) -> ScanError:
    """For a label without an owner: it cannot be trusted to lie where its header says."""
    return ScanError(f"{label}: lies on another grid than every scan of its session, expected the grid of one of them")


def _claim(folder: Path, engine: Engine) -> None:
    """Marks the folder as this bundle's. Raises: ConfigError where it is another one's."""
    check_writable(folder)
    mark = {"bundle": engine.fingerprint, "task": engine.task.to_dict()}
    path = folder / CLAIM
    if path.exists():
        found = read_claim(folder)[0]
        if found != engine.fingerprint:
            raise ConfigError(f"{folder} holds masks of bundle {found}, this is {engine.fingerprint}: use another out=")
    else:
        write_text(path, json.dumps(mark, indent=2) + "\n")


def read_claim(folder: Path) -> tuple[str, TaskSpec]:
    """The bundle's fingerprint and task that the masks of a folder answer.

    Raises: ConfigError where the folder was not written by predict_manifest.
    """
    try:
        values = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
        return str(values["bundle"]), TaskSpec.from_dict(values["task"])
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CLAIM}; expected a folder that brainfm predict wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CLAIM} is not as brainfm predict wrote it ({error}); use another folder"
        ) from None
