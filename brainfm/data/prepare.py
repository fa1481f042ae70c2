"""From a manifest to a store: in parallel, and resumable after any interruption.

A session is one piece of work: it is prepared and written by one worker, or not at all. Which sessions are missing is
read off the store itself, so there is no journal that could disagree with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path

from brainfm.data.manifest import Manifest, Scan, check_files, label_paths, scan_names, session_labels
from brainfm.data.store import Failure, Key, Store
from brainfm.imaging.preprocess import prepare_session
from brainfm.specs import ConfigError, PreprocessSpec, ScanError, StoreError

# Every worker has one core: libraries that start a thread per core would only get in each other's way.
_ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "BLOSC_NTHREADS",
    "VECLIB_MAXIMUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_QUEUED = 2  # sessions handed out per worker: one at work, one waiting


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        done: sessions prepared by this run.
        skipped: sessions that were there already.
        failed: the manifest's scans and labels that are not in the store, whichever run found that.
    """

    done: int
    skipped: int
    failed: tuple[Failure, ...]


@dataclass(frozen=True)
class _Session:
    """The work on one session; everything a worker needs."""

    key: Key
    scans: tuple[Scan, ...]
    folder: Path  # where relative paths of the manifest begin
    sizes: dict[str, int]


def prepare(
    manifest: Manifest,
    store_path: str | Path,
    spec: PreprocessSpec,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Brings every session of the manifest into the store, leaving those alone that are there already.

    A session counts as there if it was made from the same rows of the manifest and from files of the same sizes. That
    holds for failures as well: a scan that could not be prepared is tried again when it changes. Sessions of the store
    that the manifest does not name stay.

    Args:
        store_path: a store made with the same spec, or a folder that is empty or does not exist.
        workers: processes, by default one a core; 0 and 1 work in this process. A worker needs up to 1.5 GB. A script
            that asks for more than one must guard its start with ``if __name__ == "__main__":``.
        progress: called with the number of sessions that are settled and their total, first with those skipped.

    Raises:
        ManifestError: files are missing, or a session names two files for one label; nothing was written.
        StoreError: the store was made with another spec, is in use, cannot be written, or a worker was killed. What was
            prepared stays, and another run goes on from there.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = cores if workers is None else workers
    if workers < 0:
        raise ConfigError(f"workers={workers}: expected 0 or more")
    check_files(manifest)
    sessions = {key: scans for key, scans in sorted(manifest.sessions().items())}
    for scans in sessions.values():
        session_labels(scans)  # refuses contradictions before anything is written
    store = Store.create(store_path, spec)
    with store.locked():
        todo = [s for s in _sessions(manifest, sessions) if not store.is_current(s.key, s.scans, s.sizes)]
        skipped = len(sessions) - len(todo)
        if progress:
            progress(skipped, len(sessions))
        steps = _in_pool(store, todo, workers) if workers > 1 and todo else _in_process(store, todo)
        with closing(steps):  # no worker is left when the store is let go
            for done, _ in enumerate(steps, start=1):
                if progress:
                    progress(skipped + done, len(sessions))
        store.sweep()
        failures = store.finish()
    failed = tuple(f for f in failures if (f.dataset, f.subject, f.session) in sessions)
    return Report(len(todo), skipped, failed)


def _sessions(manifest: Manifest, sessions: dict[Key, list[Scan]]) -> Iterator[_Session]:
    for key, scans in sessions.items():
        paths = {path for scan in scans for path in (scan.path, *label_paths(scan).values())}
        sizes = {path: manifest.resolve(path).stat().st_size for path in sorted(paths)}
        yield _Session(key, tuple(scans), manifest.path.parent, sizes)


def _work(store_path: Path, spec: PreprocessSpec, session: _Session) -> None:
    """Prepares and writes one session."""
    store = Store.create(store_path, spec)
    names = scan_names(session.scans)
    scans = {name: session.folder / scan.path for name, scan in sorted(zip(names, session.scans), key=lambda s: s[0])}
    labels = {name: session.folder / path for name, path in sorted(session_labels(session.scans).items())}
    try:
        prepared = prepare_session(scans, labels, spec)
    except ScanError as error:
        store.write_failure(session.key, session.scans, dict.fromkeys(names, str(error)), session.sizes)
    else:
        store.write_session(session.key, session.scans, prepared, session.sizes)


def _in_process(store: Store, todo: Sequence[_Session]) -> Generator[None, None, None]:
    for session in todo:
        _work(store.path, store.spec, session)
        yield


def _in_pool(store: Store, todo: Sequence[_Session], workers: int) -> Generator[None, None, None]:
    """Yields once for every session that was written; at any error hands out no more work and waits for the rest."""
    workers = min(workers, len(todo))
    remaining = iter(todo)
    pending: set[Future[None]] = set()
    # Spawned, not forked: a forked worker inherits locks of threads that it has not got.
    context = multiprocessing.get_context("spawn")
    with _environment(dict.fromkeys(_ONE_THREAD, "1")):
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
        try:
            while True:
                while len(pending) < workers * _QUEUED and (session := next(remaining, None)) is not None:
                    pending.add(pool.submit(_work, store.path, store.spec, session))
                if not pending:
                    break
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    yield
        except BrokenProcessPool:
            raise StoreError(
                f"{store.path}: a worker was killed, most likely because memory ran out; what was prepared stays, run "
                f"prepare again with fewer than workers={workers}"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Ctrl-C is for the parent to decide about; and a worker whose parent was killed must not go on writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables for the processes that are started inside; a thread count must be known before numpy is loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
