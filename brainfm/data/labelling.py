"""Label maps made for every session of a manifest: which scans, where the files lie, and what lets a run go on.

Beside each label map lies a small JSON file with what it was made from and what was found; a scan whose JSON and files
are whole and agree with the manifest is not looked at again. How a scan is labelled is the business of others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import CONTRASTS, Manifest, Scan, check_files, plain_first, scan_names, write_manifest
from brainfm.data.sources import SourceFile
from brainfm.data.volumes import ICV_ML
from brainfm.errors import BrainfmError, ConfigError, ManifestError, ScanError
from brainfm.files import check_writable, write_table, write_text
from brainfm.imaging import nifti

_LONGEST_NAME = 200  # bytes of a folder's name, which may hold 255
OTHERS = "others"  # any contrast that is not named
PRIORITY = ("t1", "t2", "flair", "pd", OTHERS)


@dataclass(frozen=True)
class Method:
    """What a way to label leaves behind.

    Attributes:
        column: of the label maps in the new manifest.
        ending: of their names, before ``.nii.gz``.
        volumes: names of what is measured, in the order of the columns; ``icv`` among them.
        identity: JSON-able; what was made with other values is made again.
        mask_column: of the brain masks, which lie beside the label maps; None where there are none.
        together: whether the other scans of a session are read as well.
    """

    column: str
    ending: str
    volumes: tuple[str, ...]
    identity: Mapping[str, Any]
    mask_column: str | None = None
    together: bool = False


@dataclass(frozen=True)
class FoundLabels:
    """What a scan shows.

    Attributes:
        labels: [X, Y, Z] whole numbers on RAS+ axes, on the scan's own grid.
        volumes_ml: by name.
        quality: 0 to 1.
        checks: the figures behind the reason.
        reason: why the labels are not to be trusted; empty where they are.
        mask: [X, Y, Z] bool, the brain, on the same grid; None where it is not asked for.
        out_of_scope: why they may not be relied on though nothing is wrong with them as such; empty where nothing
            speaks against it.
    """

    labels: np.ndarray
    volumes_ml: Mapping[str, float]
    quality: float
    checks: Mapping[str, float]
    reason: str
    mask: np.ndarray | None = None
    out_of_scope: str = ""


@dataclass(frozen=True)
class Flagged:
    """A scan whose labels are not to be trusted, or that could not be read; it has no label file."""

    path: str
    reason: str


@dataclass(frozen=True)
class LabellingReport:
    """What a run did.

    Attributes:
        done: scans labelled by this run, flagged ones included.
        skipped: scans that were there already.
        flagged: whichever run found it.
        without: sessions that have no scan of the contrasts asked for.
        strange: labels that were written and are out of scope.
    """

    done: int
    skipped: int
    flagged: tuple[Flagged, ...]
    without: int
    strange: tuple[Flagged, ...] = ()


@dataclass(frozen=True)
class LabelJob:
    """One scan; everything a worker needs.

    Attributes:
        scan, file: the one on whose grid the labels lie.
        files: all that are read, by name; ``file`` first.
        outputs: the label map, then the brain mask where there is one.
        record: written last, so that it stands for files that are whole.
    """

    scan: Scan
    file: Path
    files: Mapping[str, Path]
    outputs: tuple[Path, ...]
    record: Path
    made_from: dict[str, Any] = field(default_factory=dict)


def label_manifest(
    manifest: Manifest,
    out: str | Path,
    method: Method,
    contrasts: Sequence[str],
    work: Callable[[Sequence[LabelJob]], Generator[Any, None, None]],
    progress: Callable[[int, int], None] | None = None,
) -> LabellingReport:
    """Leaves ``labels/``, ``volumes.csv`` and ``manifest.csv`` in a folder; the manifest has the method's columns.

    Args:
        contrasts: of a session's scans the one that comes first here is labelled; ``others`` stands for all that are
            not named.
        work: settles the jobs (see settle) and yields once for each.
        progress: called with the number of scans that are settled and their total.

    Raises:
        ManifestError: files are missing, or the manifest has label maps of its own in that column.
        ConfigError: a contrast is unknown.
    """
    check_contrasts(contrasts)
    check_files(manifest)
    out = Path(out).absolute()
    if any(scan.columns.get(method.column) for scan in manifest.scans):
        raise ManifestError(f"{manifest.path} has label maps in the column {method.column} already, expected none")
    if out / "manifest.csv" == manifest.path:
        raise ManifestError(f"{manifest.path} would be replaced, expected out= to be another folder")
    check_writable(out)  # now, and not after the first scan
    jobs, without = _jobs(manifest, out, contrasts, method)
    todo = [job for job in jobs if _record_of(job) is None]
    skipped = len(jobs) - len(todo)
    if progress:
        progress(skipped, len(jobs))
    with closing(work(todo)) as steps:  # no worker is left when this returns
        for done, _ in enumerate(steps, start=1):
            if progress:
                progress(skipped + done, len(jobs))
    records = [(job, record) for job in jobs if (record := _record_of(job)) is not None]
    rows = [(job.scan, job.file, record) for job, record in records]
    write_volumes(out / "volumes.csv", method.volumes, rows)
    _write_manifest(manifest, out, method, records)
    flagged = tuple(Flagged(str(job.file), record["reason"]) for job, record in records if record["reason"])
    strange = tuple(
        Flagged(str(job.file), record["out_of_scope"])
        for job, record in records
        if record.get("out_of_scope") and not record["reason"]
    )
    return LabellingReport(len(todo), skipped, flagged, without, strange)


def check_contrasts(contrasts: Sequence[str]) -> None:
    """Raises: ConfigError for a word that is no contrast, or none at all."""
    unknown = [word for word in contrasts if word not in (*CONTRASTS, OTHERS)]
    if unknown or not contrasts:
        found = repr(unknown[0]) if unknown else "none"
        raise ConfigError(f"contrasts: found {found}, expected some of {', '.join(CONTRASTS)} or {OTHERS}")


def pick(scans: Sequence[Scan], contrasts: Sequence[str]) -> Scan | None:
    """The scan of a session to label; of several with one contrast that with the plainest name."""
    ranked = ranked_scans(scans, contrasts)
    return ranked[0] if ranked else None


def ranked_scans(scans: Sequence[Scan], contrasts: Sequence[str]) -> list[Scan]:
    """Those of the contrasts asked for, the first in rank first."""
    ranked = []
    for scan in scans:
        word = scan.contrast if scan.contrast in contrasts else OTHERS
        if word in contrasts:
            ranked.append((list(contrasts).index(word), scan.contrast, plain_first(scan), scan))
    return [row[3] for row in sorted(ranked, key=lambda row: row[:3])]


def doubt(icv_ml: float) -> str:
    """Why an intracranial volume cannot be right; empty where it can."""
    low, high = ICV_ML
    return "" if low <= icv_ml <= high else f"intracranial volume of {icv_ml:.0f} ml, expected {low:g} to {high:g} ml"


def _jobs(manifest: Manifest, out: Path, contrasts: Sequence[str], method: Method) -> tuple[list[LabelJob], int]:
    jobs, without = [], 0
    for key, scans in sorted(manifest.sessions().items()):
        ranked = ranked_scans(scans, contrasts)
        if not ranked:
            without += 1
            continue
        names = dict(zip((scan.path for scan in scans), scan_names(scans), strict=True))
        read = ranked if method.together else ranked[:1]
        files = {names[scan.path]: manifest.resolve(scan.path) for scan in read}
        first, name = ranked[0], names[ranked[0].path]
        folder = out.joinpath("labels", *(_as_folder(part) for part in key))
        endings = (method.ending, *(["brain_mask"] if method.mask_column else []))
        made_from = {"path": first.path, "bytes": files[name].stat().st_size, **method.identity}
        if method.together:
            made_from["with"] = [[scan.path, files[names[scan.path]].stat().st_size] for scan in read[1:]]
        jobs.append(
            LabelJob(
                first, files[name], files, tuple(folder / f"{name}_{ending}.nii.gz" for ending in endings),
                folder / f"{name}_{method.ending}.json", made_from,
            )
        )  # fmt: skip
    return jobs, without


def _as_folder(name: str) -> str:
    """A key as the name of a folder: what could leave the folder or clash is marked by a digest."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")
    if plain == name and name and len(name.encode()) <= _LONGEST_NAME:
        return name
    plain = plain.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{plain or 'none'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}" if name else "none"


# ---- one scan --------------------------------------------------------------------------------------------------------


def settle(job: LabelJob, find: Callable[[LabelJob], FoundLabels]) -> None:
    """Labels one scan. One that cannot be read, or whose labels are not to be trusted, gets a record and no files."""
    job.record.parent.mkdir(parents=True, exist_ok=True)
    for path in (job.record, *job.outputs):
        path.unlink(missing_ok=True)
    stamps = _stamps(job)  # before they are read: what changes meanwhile is noticed
    try:
        found = find(job)
    except ScanError as error:
        found = _nothing(str(error).removeprefix(f"{job.file}: "))
    except (BrainfmError, OSError):
        raise  # of packages or the machine: the next scan would meet it as well
    except Exception as error:  # one scan in 60,000 must not end the run; it is reported, not swallowed
        found = _nothing(f"cannot be labelled ({type(error).__name__}: {error})")
    record = record_of(found) | {"made_from": job.made_from, "stamps": stamps, "sha256": ""}
    if not found.reason:
        write_found(found, job.outputs, like=job.file)
        record["sha256"] = _digest(job.outputs)
    write_text(job.record, json.dumps(record, indent=1) + "\n")


def _nothing(reason: str) -> FoundLabels:
    return FoundLabels(np.zeros((0, 0, 0), np.uint8), {}, 0.0, {}, reason)


def _stamps(job: LabelJob) -> list[Any]:
    return [SourceFile.of(path).stamp() for path in job.files.values()]


def record_of(found: FoundLabels) -> dict[str, Any]:
    """What is kept of it beside the label map, JSON-able."""
    return {
        "volumes_ml": dict(found.volumes_ml), "quality": found.quality, "checks": dict(found.checks),
        "reason": found.reason, "out_of_scope": found.out_of_scope,
    }  # fmt: skip


def write_found(found: FoundLabels, outputs: Sequence[Path], like: Path) -> None:
    """The label map and, where there is a second path, the brain mask, on the grid of a file."""
    nifti.write_labels(outputs[0], found.labels, like=like)
    for path in outputs[1:]:
        assert found.mask is not None  # a method with a column of masks finds them
        nifti.write_labels(path, found.mask, like=like)


def _record_of(job: LabelJob) -> dict[str, Any] | None:
    """What was found of a scan; None where it was not looked at, or what is there is not whole or not of this scan."""
    try:
        record: dict[str, Any] = json.loads(job.record.read_text(encoding="utf-8"))
        unchanged = all(
            SourceFile.of(path).is_as(stamp) for path, stamp in zip(job.files.values(), record["stamps"], strict=True)
        )
        if record["made_from"] != job.made_from or not unchanged:
            return None
        whole = bool(record["reason"]) or _digest(job.outputs) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _digest(paths: Iterable[Path]) -> str:
    return " ".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)


# ---- tables ----------------------------------------------------------------------------------------------------------


def write_volumes(path: Path, volumes: Sequence[str], rows: Iterable[tuple[Scan, Path, Mapping[str, Any]]]) -> None:
    """The table that data/volumes.py reads.

    Args:
        volumes: names of the columns, without the unit.
        rows: whose, of which file, and what record_of keeps.
    """
    names = [f"{name}_ml" for name in volumes]
    lines = []
    for scan, file, record in rows:
        found = record["volumes_ml"]
        cells = [f"{found[name]:.2f}" if name in found else "" for name in volumes]
        said = [f"{record['quality']:.3f}", record["reason"], record.get("out_of_scope", "")]
        lines.append([*scan.key, scan.contrast, str(file), *cells, *said])
    header = ["dataset", "subject", "session", "contrast", "path", *names, "quality", "flag", "out_of_scope"]
    write_table(path, header, lines)


def _write_manifest(
    manifest: Manifest, out: Path, method: Method, records: Sequence[tuple[LabelJob, Mapping[str, Any]]]
) -> None:
    """The manifest with absolute paths (write_manifest makes those below the folder relative) and the labels.

    Brain masks that the manifest has already stay the only ones in their column.
    """
    made = {job.scan.key: [str(path) for path in job.outputs] for job, record in records if not record["reason"]}
    added = [method.column]
    if method.mask_column and not any(scan.columns.get(method.mask_column) for scan in manifest.scans):
        added.append(method.mask_column)
    rows = []
    for scan in manifest.scans:
        paths = {n: str(manifest.resolve(c)) for n, c in scan.columns.items() if c and n.endswith(("_mask", "_labels"))}
        new = dict(zip(added, made.get(scan.key, [""] * len(added)), strict=False))
        rows.append(replace(scan, path=str(manifest.resolve(scan.path)), columns={**scan.columns, **paths, **new}))
    write_manifest(out / "manifest.csv", rows)
