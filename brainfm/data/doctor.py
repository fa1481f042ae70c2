"""The doctor: reads every file of a manifest and lists what is wrong with it, each fault once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from brainfm.data.manifest import Manifest, Scan, label_paths, plain_first, read_left_out
from brainfm.data.workers import why_no_processes
from brainfm.errors import ScanError
from brainfm.files import write_table
from brainfm.imaging import intensity
from brainfm.imaging.nifti import FileGrid, header_faults, read, read_header, voxel_faults
from brainfm.specs import PreprocessSpec
from brainfm.volume import Volume

_LARGEST_LABEL = 65535  # label volumes are stored as uint16 at most
_NAMED = 5  # files of one kind that are named, before the rest is counted


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
    """What a worker saw in one file.

    Attributes:
        faults: one line each.
        digest: of the voxels; None where they cannot be read, and of label volumes.
        grid: None where there is none.
        values: of a mask those that are not 0, the first few; None where it cannot be read.
        full: whether no voxel of a mask is 0.
    """

    faults: tuple[str, ...]
    digest: str | None = None
    grid: FileGrid | None = None
    values: tuple[int, ...] | None = None
    full: bool = False


@dataclass(frozen=True)
class Examined:
    """What the doctor found.

    Attributes:
        faults: in the manifest's order. The scans that are not named are usable.
        notes: what is no fault of a file but should be known, a line each.
    """

    faults: list[Fault]
    notes: list[str]


_Job = tuple[Path, str]  # the file and what it is: "scan", "mask" or "labels"
Progress = Callable[[int, int], None]


def examine(manifest: Manifest, workers: int = 0, progress: Progress | None = None) -> Examined:
    """Examines every scan and label volume: the file, its header, its voxels, its likeness to others and to no scan.

    Two scans are duplicates where their voxels are the same numbers on the same RAS+ shape, however they were
    compressed, stored or oriented and whatever their headers say; the later row is the fault. A file that kills the
    process that reads it is a fault of that file alone.

    Args:
        workers: processes; 0 reads in this one.
        progress: called with (files done, files in all).
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
    notes = [*_mask_notes(manifest, findings), *_session_notes(manifest), *_left_out_notes(manifest.path)]
    return Examined(faults, notes)


def write_faults(path: str | os.PathLike[str], faults: Iterable[Fault]) -> None:
    """A CSV with one line a fault, written whole or not at all; a header alone where there is none."""
    write_table(path, [f.name for f in fields(Fault)], (astuple(fault) for fault in faults))


# ---- notes -----------------------------------------------------------------------------------------------------------


def _mask_notes(manifest: Manifest, findings: dict[_Job, _Finding]) -> list[str]:
    """Masks without any voxel or any background, and masks of several values, which all count as the finding."""
    seen: dict[str, dict[str, tuple[int, ...]]] = {}
    filled: dict[str, dict[str, None]] = {}
    for scan in manifest.scans:
        for column, path in label_paths(scan).items():
            found = findings[_label_job(manifest, column, path)]
            if found.values is not None:
                seen.setdefault(column, {})[path] = found.values
            if found.full and column.endswith("_mask"):
                filled.setdefault(column, {})[path] = None
    notes = []
    for column, files in seen.items():
        empty = [path for path, values in files.items() if not values]
        if empty:
            notes.append(f"{column}: {len(empty)} of {len(files)} are empty{_examples(empty)}")
        if column in filled:
            full = list(filled[column])
            notes.append(f"{column}: {len(full)} of {len(files)} fill the whole image{_examples(full)}")
        several = {path: values for path, values in files.items() if len(values) > 1}
        if several and column.endswith("_mask"):
            shown = ", ".join(map(str, next(iter(several.values()))))
            name = column.removesuffix("_mask")
            notes.append(
                f"{column}: {len(several)} of {len(files)} hold several values ({shown}), which all count as {name}; "
                f"labels.{name}= keeps them apart{_examples(list(several))}"
            )
    return notes


def _session_notes(manifest: Manifest) -> list[str]:
    several = []
    for scans in manifest.sessions().values():
        kinds = Counter(scan.contrast for scan in scans)
        for contrast, count in kinds.items():
            if count > 1 and contrast != "unknown":
                first = min((scan for scan in scans if scan.contrast == contrast), key=plain_first)
                who = "/".join(filter(None, first.key))
                several.append(f"{who} has {count} of {contrast}, {first.path} comes first")
    if not several:
        return []
    return [f"several scans of one contrast in a session, {len(several)} times{_examples(several)}"]


def _left_out_notes(manifest: Path) -> list[str]:
    return [
        f"manifest left out {len(files)} files ({reason}){_examples(files)}"
        for reason, files in read_left_out(manifest).items()
    ]


def _examples(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f": {', '.join(names[:_NAMED])}{more}"


# ---- faults of label volumes -----------------------------------------------------------------------------------------


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
    if kind == "labels" and volume.voxels.max() > _LARGEST_LABEL:
        faults.append(f"labels from {volume.voxels.min()} to {volume.voxels.max()}, expected 0 to {_LARGEST_LABEL}")
    if kind != "scan":
        there = np.unique(volume.voxels)
        values = tuple(int(value) for value in there[there != 0][:_NAMED])
        return _Finding(tuple(faults), grid=grid, values=values, full=bool((there != 0).all()))
    if not of_voxels:
        faults.extend(_content_faults(volume))
    digest = hashlib.blake2b(repr(volume.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(volume.voxels).data)
    return _Finding(tuple(faults), digest.hexdigest(), grid)


def _content_faults(volume: Volume) -> list[str]:
    """What `prepare` would refuse, and what it would take though it is no scan."""
    try:
        mask = intensity.foreground(volume)
        intensity.statistics(volume.voxels, mask, PreprocessSpec().clip_percentiles)
    except ScanError as error:
        return [str(error)]
    found = intensity.no_scan(volume.voxels)
    return [f"does not look like a scan: {found}"] if found else []


# ------------------------------------------------------------------------------------------------- many files


def _run(jobs: Sequence[_Job], workers: int) -> Iterator[tuple[_Job, _Finding]]:
    """Each job with its finding, as they come.

    When a worker dies its pool is lost. The jobs that were under way are suspects: each is tried again in a process
    of its own, so that only the one that kills is lost; the others go on in a new pool.
    """
    if workers <= 0 or why_no_processes():
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
