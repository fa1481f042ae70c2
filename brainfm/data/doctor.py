"""Looks at every file of a manifest and lists what is wrong with it, each fault once."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from brainfm.data.manifest import Manifest, Scan, label_paths
from brainfm.imaging.nifti import FileGrid, header_faults, read, read_header, voxel_faults
from brainfm.specs import ScanError

_LARGEST_LABEL = 65535  # label volumes are stored as uint16 at most


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with one row. For a label volume ``contrast`` is its column."""

    dataset: str
    subject: str
    session: str
    contrast: str
    path: str
    fault: str


@dataclass(frozen=True, slots=True)
class _Finding:
    """What a worker saw in one file: its faults, the digest of its voxels, its grid; None where it cannot be read."""

    faults: tuple[str, ...]
    digest: str | None = None
    grid: FileGrid | None = None


_Job = tuple[Path, str]  # the file and what it is: "scan", "mask" or "labels"
Progress = Callable[[int, int], None]


def examine(manifest: Manifest, workers: int = 0, progress: Progress | None = None) -> list[Fault]:
    """Examines every scan and label volume: the file, its header, its voxels, its likeness to others.

    Two scans are duplicates where their voxels are the same numbers on the same RAS+ shape, however they were
    compressed, stored or oriented and whatever their headers say; the later row is the fault. A file that kills the
    process that reads it is a fault of that file alone.

    Args:
        workers: processes; 0 reads in this one.
        progress: called with (files done, files in all).

    Returns:
        The faults in the manifest's order. The scans that are not named are usable.
    """
    jobs: dict[_Job, None] = {}
    for scan in manifest.scans:
        jobs[manifest.resolve(scan.path), "scan"] = None
        jobs.update((_label_job(manifest, column, path), None) for column, path in label_paths(scan).items())
    findings: dict[_Job, _Finding] = {}
    for job, finding in _run(list(jobs), workers):
        findings[job] = finding
        if progress is not None:
            progress(len(findings), len(jobs))
    faults: list[Fault] = []
    first_of: dict[str, Scan] = {}
    for scans in manifest.sessions().values():
        for scan in scans:
            found = findings[manifest.resolve(scan.path), "scan"]
            faults.extend(_fault(scan, text) for text in found.faults)
            first = first_of.setdefault(found.digest, scan) if found.digest else scan
            if first is not scan:
                faults.append(_fault(scan, f"the same voxels as {first.path} of {'/'.join(filter(None, first.key))}"))
        faults.extend(_label_faults(manifest, scans, findings))
    return faults


def write_faults(path: str | os.PathLike[str], faults: Iterable[Fault]) -> None:
    """A CSV with one line a fault, written whole or not at all; a header alone where there is none."""
    path = Path(path).absolute()
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Fault)])
    writer.writerows(astuple(fault) for fault in faults)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text.getvalue(), encoding="utf-8", newline="")
    os.replace(part, path)


def _label_job(manifest: Manifest, column: str, path: str) -> _Job:
    return manifest.resolve(path), column.rpartition("_")[2]


def _fault(scan: Scan, text: str) -> Fault:
    return Fault(*scan.key, scan.contrast, scan.path, text)


def _label_faults(manifest: Manifest, scans: Sequence[Scan], findings: dict[_Job, _Finding]) -> Iterator[Fault]:
    """What is wrong with the label volumes of one session, each file once."""
    grids = [findings[manifest.resolve(scan.path), "scan"].grid for scan in scans]
    readable = [grid for grid in grids if grid is not None]
    seen = set()
    for scan in scans:
        for column, path in label_paths(scan).items():
            if (column, path) in seen:
                continue
            seen.add((column, path))
            found = findings[_label_job(manifest, column, path)]
            texts = list(found.faults)
            if found.grid is not None and readable and not any(found.grid.same_place(grid) for grid in readable):
                texts.append("lies on another grid than every scan of its session")
            if len({p for s in scans for c, p in label_paths(s).items() if c == column}) > 1:
                texts.append(f"one of several files in column {column} of one session")
            yield from (Fault(*scan.key, column, path, text) for text in texts)


# ------------------------------------------------------------------------------------------------- one file


def inspect(path: Path, kind: str) -> _Finding:
    """Everything that can be said of one file by itself. Runs in a worker."""
    if not path.is_file():
        return _Finding(("no such file",))
    try:
        return _inspect(path, kind)
    except ScanError as error:
        return _Finding((str(error).removeprefix(f"{path}: "),))
    except Exception as error:  # one file in 60,000 must not end the examination; it is reported, not swallowed
        return _Finding((f"cannot be examined: {type(error).__name__}: {error}",))


def _inspect(path: Path, kind: str) -> _Finding:
    faults = header_faults(path)
    try:
        grid = read_header(path).grid
    except ScanError:
        return _Finding(tuple(faults))  # header_faults has said why
    # An empty label volume is a finding about the patient, not a fault.
    of_voxels = voxel_faults(path) if kind == "scan" else []
    faults.extend(of_voxels)
    try:
        volume, _ = read(path, labels=kind != "scan")
    except ScanError as error:
        if not of_voxels:  # else they have said the same in other words
            faults.append(str(error).removeprefix(f"{path}: "))
        return _Finding(tuple(faults), grid=grid)
    if kind == "labels" and (volume.voxels.min() < 0 or volume.voxels.max() > _LARGEST_LABEL):
        faults.append(f"labels from {volume.voxels.min()} to {volume.voxels.max()}, expected 0 to {_LARGEST_LABEL}")
    if kind != "scan":
        return _Finding(tuple(faults), grid=grid)
    digest = hashlib.blake2b(repr(volume.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(volume.voxels).data)
    return _Finding(tuple(faults), digest.hexdigest(), grid)


# ------------------------------------------------------------------------------------------------- many files


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[_Job, _Finding]]:
    """Each job with its finding, as they come.

    When a worker dies its pool is lost. The jobs that were under way are suspects: each is tried again in a process
    of its own, so that only the one that kills is lost; the others go on in a new pool.
    """
    if workers <= 0:
        yield from ((job, inspect(*job)) for job in jobs)
        return
    waiting = deque(jobs)
    while waiting:
        suspects: list[_Job] = []
        with _pool(workers) as pool:
            under_way: dict[Future[_Finding], _Job] = {}
            while (waiting or under_way) and not suspects:
                while waiting and len(under_way) < 2 * workers and not suspects:
                    job = waiting.popleft()
                    try:
                        under_way[pool.submit(inspect, *job)] = job
                    except BrokenProcessPool:
                        suspects.append(job)
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    job = under_way.pop(future)
                    try:
                        yield job, future.result()
                    except BrokenProcessPool:
                        suspects.append(job)
            suspects.extend(under_way.values())
        for job in suspects:
            yield job, _alone(job)


def _alone(job: _Job) -> _Finding:
    with _pool(1) as pool:
        try:
            return pool.submit(inspect, *job).result()
        except BrokenProcessPool:
            return _Finding(("the process that read it died, perhaps for want of memory",))


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forking a process that holds threads (torch, BLAS) can hang; spawning cannot.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
