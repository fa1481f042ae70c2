"""Prediction: files in; a mask on the grid of one of them, or an answer for the whole session, out."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import CONTRASTS, Manifest, Scan, contrast_of, plain_first, read_manifest, session_labels
from brainfm.data.sources import SourceFile
from brainfm.errors import BrainfmWarning, BundleError, ConfigError, FileError, ManifestError, ScanError
from brainfm.files import check_writable, write_table, write_text
from brainfm.imaging import nifti, scope
from brainfm.imaging.endings import companions
from brainfm.specs import TaskSpec
from brainfm.tasks.answers import LISTING, Key, SessionAnswer, grid_owner, strange_grid
from brainfm.tasks.bundle import Bundle, load_engine
from brainfm.tasks.engine import Engine, PathLike
from brainfm.tasks.kind import Kind
from brainfm.tasks.registry import answer_name, kind_of

CLAIM = "predictions.json"
FAILURES = "failures.csv"
STRANGE = "out_of_scope.csv"
SOURCES = "sources.jsonl"  # a line an answer: what it was made from, so that a corrected scan is answered again


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
) -> np.ndarray | SessionAnswer:
    """The mask of one session, on the grid of one of its files; or what the bundle answers for the session as a whole.

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
    engine = load_engine(bundle, device, precision, overlap)
    files = check_inputs(inputs, engine.task)
    on = next(iter(files)) if on is None else on
    if on not in files:
        raise ConfigError(f"no input {on} to answer on, expected one of the inputs {', '.join(files)}")
    kind = kind_of(engine.task.kind)
    maps = kind.check_labels(labels or {}, engine.networks)
    place = None if out is None else kind.check_output(Path(out), files.values())
    if not maps:
        kind.note_missing(engine.networks, str(files[on]))
    found: np.ndarray | SessionAnswer = kind.answer(engine, files, on, maps)
    strange = _strange(files)
    if strange:
        warnings.warn(f"{files[on]}: out of scope: {'; '.join(strange)}", BrainfmWarning, stacklevel=2)
    found = _with_scope(found, strange)
    if place is not None:
        kind.write(place, found, files[on])
    return found


def _strange(files: Mapping[str, Path]) -> list[str]:
    """Why the scans of a session are out of scope of any brain MRI network, by contrast."""
    return [
        f"{contrast}: {reason}" for contrast, path in files.items() for reason in scope.strange(nifti.read(path)[0])
    ]


def _with_scope(found: np.ndarray | SessionAnswer, strange: Sequence[str]) -> np.ndarray | SessionAnswer:
    return replace(found, out_of_scope=tuple(strange)) if isinstance(found, SessionAnswer) else found


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


# ---- a whole manifest ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PredictionReport:
    """What became of a manifest.

    Attributes:
        done, kept: sessions predicted now, and found finished.
        failures: key -> reason.
        again: of those predicted now, the ones that were there but whose files had changed.
        strange: of those answered, why the scans are out of scope.
    """

    done: int
    kept: int
    failures: dict[Key, str]
    again: tuple[Key, ...] = ()
    strange: dict[Key, str] = field(default_factory=dict)


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
) -> PredictionReport:
    """One mask or answer a session, ``<dataset>__<subject>__<session>_<target>.nii.gz`` or ``.json``; called again, it
    continues.

    A mask lies on the grid of the session's label for the target, where it has one, so that both can be compared; else
    on that of the first contrast of the task that the session has. A session that fails, in whatever way, is listed in
    ``failures.csv`` and the rest is done; ``predictions.csv`` lists the masks, or the answers themselves, and
    ``out_of_scope.csv`` the sessions whose scans do not look like ordinary MRI of heads.

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
    engine = bundle if isinstance(bundle, Engine) else load_engine(bundle, device, precision, overlap)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    folder = Path(out)
    _claim(folder, engine)
    wanted = {key: scans for key, scans in manifest.sessions().items() if sessions is None or key in sessions}
    kind = kind_of(engine.task.kind)
    maps = _label_maps(manifest, wanted, engine, kind)
    columns = kind.columns(engine.task)
    listed: list[list[object]] = []
    failures: dict[Key, str] = {}
    again: list[Key] = []
    kept = 0
    made_from = _read_sources(folder)
    noted = _read_strange(folder)
    strange: dict[Key, str] = {}
    for number, (key, scans) in enumerate(wanted.items()):
        progress(number, len(wanted))
        name = answer_name(key, engine.task)
        try:
            plan = _plan(manifest, key, scans, engine.task, kind)
            there = (folder / name).is_file()
            if there and _have_changed(_files_of(plan, maps.get(key)), made_from.get(name, {})):
                again.append(key)
                there = False
            if there:
                kept += 1
                strange |= {key: noted[key]} if key in noted else {}
                cells = kind.kept_cells(folder / name, engine.task, plan[2])
            else:
                stamps = {str(path): SourceFile.of(path).stamp() for path in _files_of(plan, maps.get(key))}
                said = _strange(plan[0])
                strange |= {key: "; ".join(said)} if said else {}
                cells = _answered(engine, kind, plan, folder / name, maps.get(key), said)
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
    rows = [[*key, reason] for key, reason in strange.items() if key not in failures]
    write_table(folder / STRANGE, ["dataset", "subject", "session", "reason"], rows)
    return PredictionReport(len(listed) - kept, kept, failures, tuple(again), strange)


_Plan = tuple[dict[str, Path], str, Path]  # input files by contrast, the reference contrast, whose grid is answered on


def _answered(
    engine: Engine, kind: Kind, plan: _Plan, path: Path, maps: Mapping[str, Path] | None, strange: Sequence[str]
) -> list[object]:
    """Answers one session and writes it; returns its cells of the table."""
    files, reference, like = plan
    found = _with_scope(kind.answer(engine, files, reference, maps, like), strange)
    kind.write(path, found, like)
    return kind.cells(found, engine.task, like)


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


def _read_strange(folder: Path) -> dict[Key, str]:
    """What an earlier run said of the sessions whose answers are kept."""
    path = folder / STRANGE
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        return {(r["dataset"], r["subject"], r["session"]): r["reason"] for r in rows if r.get("reason")}


def _label_maps(
    manifest: Manifest, sessions: Mapping[Key, Sequence[Scan]], engine: Engine, kind: Kind
) -> dict[Key, dict[str, Path]]:
    """The label map that the bundle reads, by session and column; who lacks it is said once."""
    column = kind.label_column(engine.networks)
    if column is None:
        return {}
    named = {key: session_labels(scans).get(column) for key, scans in sessions.items()}
    lacking = [key for key, path in named.items() if path is None]
    if lacking:
        first = "/".join(part for part in lacking[0] if part)
        kind.note_missing(engine.networks, f"{len(lacking)} of {len(named)} sessions, first {first}")
    return {key: {column: manifest.resolve(path)} for key, path in named.items() if path is not None}


def _plan(manifest: Manifest, key: Key, scans: Sequence[Scan], task: TaskSpec, kind: Kind) -> _Plan:
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
    label = kind.label_of(scans, task.target)
    if label is None:
        return shown, first, shown[first]
    path = manifest.resolve(label.path)
    on = grid_owner(path, [manifest.resolve(scan.path) for scan in scans])
    if on is None:
        raise strange_grid(path)
    return shown, next((contrast for contrast, file in shown.items() if file == on), first), path


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
