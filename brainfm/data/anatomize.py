"""Tissue label maps and volumes for every session of a manifest: in parallel, and resumable after any interruption.

One scan of a session is segmented. Beside each label map lies a small JSON file with what it was made from and what was
found; a scan whose JSON and labels are whole and agree with the manifest is not looked at again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brainfm.data.manifest import CONTRASTS, Manifest, Scan, check_files, plain_first, scan_names, write_manifest
from brainfm.data.sources import SourceFile
from brainfm.data.workers import in_pool, in_this_process
from brainfm.files import check_writable, write_whole
from brainfm.imaging import anatomy, nifti
from brainfm.specs import BrainfmError, ConfigError, ManifestError, ScanError

COLUMN = "tissue_labels"
_LONGEST_NAME = 200  # bytes of a folder's name, which may hold 255
OTHERS = "others"  # any contrast that is not named
PRIORITY = ("t1", "t2", "flair", "pd", OTHERS)


@dataclass(frozen=True)
class Flagged:
    """A scan whose labels are not to be trusted, or that could not be read; it has no label file."""

    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        done: scans segmented by this run, flagged ones included.
        skipped: scans that were there already.
        flagged: whichever run found it.
        without: sessions that have no scan of the contrasts asked for.
    """

    done: int
    skipped: int
    flagged: tuple[Flagged, ...]
    without: int


@dataclass(frozen=True)
class _Job:
    """One scan; everything a worker needs."""

    scan: Scan
    file: Path
    labels: Path
    record: Path
    made_from: dict[str, Any]


def anatomize(
    manifest: Manifest,
    out: str | Path,
    contrasts: Sequence[str] = PRIORITY,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Leaves ``labels/``, ``volumes.csv`` and ``manifest.csv`` in a folder; the manifest has the column tissue_labels.

    Args:
        contrasts: of a session's scans the one that comes first here is segmented; ``others`` stands for all that are
            not named.
        workers: processes; 0 and 1 work in this one.
        progress: called with the number of scans that are settled and their total.

    Raises:
        ManifestError: files are missing, or the manifest has label maps of its own in that column.
        ConfigError: a contrast is unknown, or SimpleITK or nilearn is not installed.
        StoreError: a worker was killed. What was made stays, and another run goes on from there.
    """
    if workers < 0:
        raise ConfigError(f"workers={workers}: expected 0 or more")
    unknown = [word for word in contrasts if word not in (*CONTRASTS, OTHERS)]
    if unknown or not contrasts:
        found = repr(unknown[0]) if unknown else "none"
        raise ConfigError(f"contrasts: found {found}, expected some of {', '.join(CONTRASTS)} or {OTHERS}")
    anatomy.check_packages()
    check_files(manifest)
    out = Path(out).absolute()
    if any(scan.columns.get(COLUMN) for scan in manifest.scans):
        raise ManifestError(f"{manifest.path} has label maps in the column {COLUMN} already, expected none")
    if out / "manifest.csv" == manifest.path:
        raise ManifestError(f"{manifest.path} would be replaced, expected out= to be another folder")
    check_writable(out)  # now, and not after the first scan
    jobs, without = _jobs(manifest, out, contrasts)
    todo = [job for job in jobs if _record_of(job) is None]
    skipped = len(jobs) - len(todo)
    if progress:
        progress(skipped, len(jobs))
    killed = (
        f"{out}: a worker was killed, most likely because memory ran out; what was made stays, run anatomy again with "
        f"fewer than workers={workers}"
    )
    pooled = workers > 1 and len(todo) > 1
    steps = in_pool(_work, todo, workers, killed) if pooled else in_this_process(_work, todo)
    with closing(steps):  # no worker is left when this returns
        for done, _ in enumerate(steps, start=1):
            if progress:
                progress(skipped + done, len(jobs))
    records = [(job, record) for job in jobs if (record := _record_of(job)) is not None]
    _write_volumes(out / "volumes.csv", records)
    _write_manifest(manifest, out, records)
    flagged = tuple(Flagged(str(job.file), record["reason"]) for job, record in records if record["reason"])
    return Report(len(todo), skipped, flagged, without)


def pick(scans: Sequence[Scan], contrasts: Sequence[str]) -> Scan | None:
    """The scan of a session to segment; of several with one contrast that with the plainest name."""
    ranked = []
    for scan in scans:
        word = scan.contrast if scan.contrast in contrasts else OTHERS
        if word in contrasts:
            ranked.append((list(contrasts).index(word), scan.contrast, plain_first(scan), scan))
    return min(ranked, key=lambda r: r[:3])[3] if ranked else None


def _jobs(manifest: Manifest, out: Path, contrasts: Sequence[str]) -> tuple[list[_Job], int]:
    jobs, without = [], 0
    for key, scans in sorted(manifest.sessions().items()):
        scan = pick(scans, contrasts)
        if scan is None:
            without += 1
            continue
        file = manifest.resolve(scan.path)
        folder = out.joinpath("labels", *(_as_folder(part) for part in key))
        name = scan_names(scans)[scans.index(scan)]
        made_from = {"path": scan.path, "bytes": file.stat().st_size, "version": anatomy.VERSION}
        jobs.append(
            _Job(scan, file, folder / f"{name}_tissue.nii.gz", folder / f"{name}_tissue.json", made_from)
        )
    return jobs, without


def _as_folder(name: str) -> str:
    """A key as the name of a folder: what could leave the folder or clash is marked by a digest."""
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")
    if plain == name and name and len(name.encode()) <= _LONGEST_NAME:
        return name
    plain = plain.encode()[:_LONGEST_NAME].decode(errors="ignore")
    return f"{plain or 'none'}-{hashlib.sha256(name.encode()).hexdigest()[:6]}" if name else "none"


# ---- one scan --------------------------------------------------------------------------------------------------------


def _work(job: _Job) -> None:
    """Segments one scan; the record is written last, so that it stands for labels that are whole."""
    job.labels.parent.mkdir(parents=True, exist_ok=True)
    job.record.unlink(missing_ok=True)
    job.labels.unlink(missing_ok=True)
    record: dict[str, Any] = {"made_from": job.made_from, "volumes_ml": {}, "quality": 0.0, "checks": {}, "sha256": ""}
    record["stamp"] = SourceFile.of(job.file).stamp()  # before it is read: what changes meanwhile is noticed
    try:
        volume, _ = nifti.read(job.file)
        found = anatomy.segment(volume)
    except ScanError as error:
        record["reason"] = str(error).removeprefix(f"{job.file}: ")
    except (BrainfmError, OSError):
        raise  # of packages or the machine: the next scan would meet it as well
    except Exception as error:  # one scan in 60,000 must not end the run; it is reported, not swallowed
        record["reason"] = f"cannot be segmented ({type(error).__name__}: {error})"
    else:
        record |= {
            "volumes_ml": found.volumes_ml,
            "quality": found.quality,
            "checks": found.checks,
            "reason": found.reason,
        }
        if not found.reason:
            nifti.write_labels(job.labels, found.labels, like=job.file)
            record["sha256"] = _digest(job.labels)
    _write_text(job.record, json.dumps(record, indent=1) + "\n")


def _record_of(job: _Job) -> dict[str, Any] | None:
    """What was found of a scan; None where it was not looked at, or what is there is not whole or not of this scan."""
    try:
        record = json.loads(job.record.read_text(encoding="utf-8"))
        if record["made_from"] != job.made_from or not SourceFile.of(job.file).is_as(record.get("stamp")):
            return None
        whole = bool(record["reason"]) or _digest(job.labels) == record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- tables ----------------------------------------------------------------------------------------------------------


def _write_volumes(path: Path, records: Sequence[tuple[_Job, dict[str, Any]]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{name}_ml" for name in anatomy.VOLUMES]
    writer.writerow(["dataset", "subject", "session", "contrast", "path", *names, "quality", "flag"])
    for job, record in records:
        volumes = [f"{record['volumes_ml'][n]:.2f}" if n in record["volumes_ml"] else "" for n in anatomy.VOLUMES]
        row = (*job.scan.key, job.scan.contrast, str(job.file))
        writer.writerow([*row, *volumes, f"{record['quality']:.3f}", record["reason"]])
    _write_text(path, text.getvalue())


def _write_manifest(manifest: Manifest, out: Path, records: Sequence[tuple[_Job, dict[str, Any]]]) -> None:
    """The manifest with absolute paths (write_manifest makes those below the folder relative) and the labels."""
    labels = {job.scan.key: str(job.labels) for job, record in records if not record["reason"]}
    rows = []
    for scan in manifest.scans:
        paths = {n: str(manifest.resolve(c)) for n, c in scan.columns.items() if c and n.endswith(("_mask", "_labels"))}
        columns = {**scan.columns, **paths, COLUMN: labels.get(scan.key, "")}
        rows.append(replace(scan, path=str(manifest.resolve(scan.path)), columns=columns))
    write_manifest(out / "manifest.csv", rows)


def _write_text(path: Path, text: str) -> None:
    write_whole(path, text.encode())
