"""Preparing: from a manifest to a store, in parallel, and resumable after any interruption.

A session is one piece of work: it is prepared and written by one worker, or not at all. With ``align=rigid`` all visits
of a subject are one piece, since the later ones lie in the space of the first. Which sessions are missing is read off
the store itself, so there is no journal that could disagree with it.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from brainfm.data.manifest import Manifest, Scan, check_files, label_paths, scan_names, session_labels
from brainfm.data.sources import SourceFile
from brainfm.data.store import Failure, Key, Share, Store
from brainfm.data.workers import in_pool, in_this_process, one_thread
from brainfm.errors import ConfigError, ScanError, StoreError
from brainfm.extras import missing
from brainfm.imaging import register
from brainfm.imaging.endings import companions
from brainfm.imaging.preprocess import Anchor, prepare_session
from brainfm.specs import PreprocessSpec


@dataclass(frozen=True)
class PrepareReport:
    """What a run did.

    Attributes:
        done: sessions prepared by this run.
        skipped: sessions that were there already.
        failed: the manifest's scans and labels that are not in the store, whichever run found that.
        again: of those prepared, the sessions that were there, and what of them had changed.
        empty: label -> in how many of its sessions it has no voxel, and how many there are; those without are left out.
    """

    done: int
    skipped: int
    failed: tuple[Failure, ...]
    again: tuple[tuple[Key, str], ...] = ()
    empty: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Session:
    """The work on one session; everything a worker needs."""

    key: Key
    scans: tuple[Scan, ...]
    folder: Path  # where relative paths of the manifest begin
    sources: dict[str, SourceFile]  # by their path as written


_Piece = tuple[_Session, ...]  # sessions of one subject, the first visit first


def prepare(
    manifest: Manifest,
    store_path: str | Path,
    spec: PreprocessSpec,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    share: Share | None = None,
    scheduler: str | None = None,
) -> PrepareReport:
    """Brings every session of the manifest into the store, leaving those alone that are there already.

    A session counts as there if it was made from the same rows of the manifest and from files of the same content
    (Store.why_not_current). That holds for failures as well: a scan that could not be prepared is tried again when it
    changes. A session that fails in a way nobody foresaw is a failure of that session alone. Sessions of the store that
    the manifest does not name stay.

    Args:
        store_path: a store made with the same spec, or a folder that is empty or does not exist.
        workers: processes, by default one a core; 0 and 1 work in this process. A worker needs up to 1.5 GB. A script
            that asks for more than one must guard its start with ``if __name__ == "__main__":``.
        progress: called with the number of sessions that are settled and their total, first with those skipped.
        share: of the subjects; several runs, each with another share, may write one store at the same time, and the
            last one to end leaves the whole index. By default all.
        scheduler: ``HOST:PORT`` of a Dask scheduler whose workers see the files under the same names, or ``local`` for
            a Dask cluster on this machine; by default processes of our own.

    Raises:
        ConfigError: a package that is asked for is not installed, or no scheduler answers.
        ManifestError: files are missing, or a session names two files for one label; nothing was written.
        StoreError: the store was made with another spec, is in use, cannot be written, or a worker was killed. What was
            prepared stays, and another run goes on from there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers={workers}: expected 0 or more")
    if spec.align == "rigid":
        register.require()
    share = share or Share()
    check_files(manifest)
    sessions = {key: scans for key, scans in sorted(manifest.sessions().items()) if share.holds(key[0], key[1])}
    for scans in sessions.values():
        session_labels(scans)  # refuses contradictions before anything is written
    store = Store.create(store_path, spec, share)
    with store.locked():
        again: list[tuple[Key, str]] = []
        pieces = [(piece, _missing(store, piece, again)) for piece in _pieces(_sessions(manifest, sessions), spec)]
        todo = [(piece, missing) for piece, missing in pieces if missing]
        settled = len(sessions) - sum(missing for _, missing in todo)
        if progress:
            progress(settled, len(sessions))
        done = 0
        with closing(_run(store, [piece for piece, _ in todo], workers, scheduler)) as steps:
            for number, prepared in steps:  # no worker is left when the store is let go
                done += prepared
                settled += todo[number][1]
                if progress:
                    progress(settled, len(sessions))
        store.sweep()
        failures = store.finish()
    failed = tuple(f for f in failures if (f.dataset, f.subject, f.session) in sessions)
    return PrepareReport(done, len(sessions) - done, failed, tuple(again), _empty_labels(store, sessions))


def _empty_labels(store: Store, sessions: Collection[Key]) -> dict[str, tuple[int, int]]:
    """Label -> sessions in which it has no voxel, and all that have it; without those that are empty nowhere."""
    labelled, empty = Counter[str](), Counter[str]()
    for entry in store.sessions:
        for label in entry.labels if entry.key in sessions else ():
            labelled[label.name] += 1
            empty[label.name] += len(store.label_points(entry, label.name)) == 0
    return {name: (count, labelled[name]) for name, count in sorted(empty.items()) if count}


def _sessions(manifest: Manifest, sessions: dict[Key, list[Scan]]) -> Iterator[_Session]:
    for key, scans in sessions.items():
        folder = manifest.path.parent
        paths = {path for scan in scans for path in (scan.path, *label_paths(scan).values())}
        paths |= {os.path.relpath(file, folder) for path in paths for file in companions(manifest.resolve(path))}
        yield _Session(key, tuple(scans), folder, {path: SourceFile.of(folder / path) for path in sorted(paths)})


def _pieces(sessions: Iterator[_Session], spec: PreprocessSpec) -> Iterator[_Piece]:
    if spec.align != "rigid":
        yield from ((session,) for session in sessions)
        return
    for _, visits in itertools.groupby(sessions, key=lambda session: session.key[:2]):
        yield tuple(visits)


def _missing(store: Store, piece: _Piece, again: list[tuple[Key, str]]) -> int:
    """How many sessions of a piece are to be prepared; without an anchor, all that follow the first that is.

    Those that are there and have changed are added to ``again``, with what has.
    """
    anchor, missing = None, 0
    for session in piece:
        changed = _why_not_current(store, session, anchor)
        if changed:
            again.append((session.key, changed))
        if (missing and anchor is None) or changed is not None:
            missing += 1
        else:
            anchor = anchor or _anchor(store, session)
    return missing


def _why_not_current(store: Store, session: _Session, anchor: Anchor | None) -> str | None:
    return store.why_not_current(session.key, session.scans, _sources(session, anchor))


def _sources(session: _Session, anchor: Anchor | None) -> dict[str, SourceFile]:
    """The files that a session is made from: its own, and the one that its frame is taken from."""
    if anchor is None:
        return session.sources
    return session.sources | {os.path.relpath(anchor.path, session.folder): SourceFile.of(anchor.path)}


def _anchor(store: Store, session: _Session) -> Anchor | None:
    """What later visits are aligned to, where this visit is in the store and serves."""
    path = store.reference(session.key) if store.spec.align == "rigid" else None
    return None if path is None else Anchor("/".join(session.key), session.folder / path)


def _work(store: Store, piece: _Piece) -> int:
    """Prepares and writes what is missing of a piece; returns the number of sessions."""
    anchor, done = None, 0
    for session in piece:
        if _why_not_current(store, session, anchor) is not None:
            _prepare(store, session, anchor)
            done += 1
        anchor = anchor or _anchor(store, session)
    return done


def _prepare(store: Store, session: _Session, anchor: Anchor | None) -> None:
    names = scan_names(session.scans)
    scans = {name: session.folder / scan.path for name, scan in sorted(zip(names, session.scans), key=lambda s: s[0])}
    labels = {name: session.folder / path for name, path in sorted(session_labels(session.scans).items())}
    sources = _sources(session, anchor)
    stamps = {path: source.stamp() for path, source in sources.items()}  # before: what changes meanwhile is noticed
    try:
        prepared = prepare_session(scans, labels, store.spec, anchor=anchor)
        store.write_session(session.key, session.scans, prepared, sources, stamps)
    except (StoreError, ConfigError, OSError, MemoryError):
        raise  # of the store or the machine: the next session would meet it as well
    except Exception as error:  # one session in 60,000 must not end the run; it is reported, not swallowed
        reason = str(error) if isinstance(error, ScanError) else f"cannot be prepared ({type(error).__name__}: {error})"
        store.write_failure(session.key, session.scans, dict.fromkeys(names, reason), sources, stamps)


_Steps = Generator[tuple[int, int], None, None]  # the number of a piece and of the sessions prepared of it, as they end


def _run(store: Store, todo: Sequence[_Piece], workers: int, scheduler: str | None) -> _Steps:
    if scheduler and todo:
        return _in_dask(store, todo, workers, scheduler)
    if workers <= 1 or not todo:
        return in_this_process(partial(_work, store), todo)
    killed = (
        f"{store.path}: a worker was killed, most likely because memory ran out; what was prepared stays, run "
        f"prepare again with fewer than workers={workers}"
    )
    return in_pool(partial(_work, store), todo, workers, killed)


def _in_dask(store: Store, todo: Sequence[_Piece], workers: int, scheduler: str) -> _Steps:
    """The same on the workers of a Dask cluster, which must have brainfm and see the files under the same names."""
    distributed = _distributed()
    store = Store.create(store.path.absolute(), store.spec, store.share)
    todo = [tuple(replace(session, folder=session.folder.absolute()) for session in piece) for piece in todo]
    with one_thread(), ExitStack() as opened:
        try:
            if scheduler == "local":
                cluster = distributed.LocalCluster(
                    n_workers=max(1, min(workers, len(todo))), threads_per_worker=1, dashboard_address=None
                )
                client = opened.enter_context(distributed.Client(opened.enter_context(cluster)))
            else:
                client = opened.enter_context(distributed.Client(scheduler, timeout="10s"))
        except (OSError, ValueError, TimeoutError) as error:
            raise ConfigError(f"scheduler={scheduler}: no Dask scheduler answers there ({error})") from None
        futures = client.map(partial(_work, store), todo, pure=False, retries=0)
        numbers = {future.key: number for number, future in enumerate(futures)}
        try:
            for future in distributed.as_completed(futures):
                yield numbers[future.key], future.result()
        except distributed.KilledWorker:
            raise StoreError(
                f"{store.path}: a Dask worker was killed, most likely because memory ran out; what was prepared stays, "
                "run prepare again"
            ) from None
        finally:
            client.cancel(futures)


def _distributed() -> Any:
    try:
        import distributed
    except ImportError:
        raise missing("distributed", "scheduler=") from None
    return distributed
