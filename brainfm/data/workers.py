"""Worker processes: many pieces of work on one thread each, which inherit nothing half-done and outlive nobody."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import TypeVar

from brainfm.errors import BrainfmWarning, StoreError

# Every worker has one core: libraries that start a thread per core would only get in each other's way.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "BLOSC_NTHREADS",
    "VECLIB_MAXIMUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)
_QUEUED = 2  # pieces handed out per worker: one at work, one waiting

T = TypeVar("T")
R = TypeVar("R")


def why_no_processes() -> str:
    """Why this system lets no process wait for another, said as a warning as well; empty where all is well.

    Locks between processes live in shared memory, which a container may have mounted read-only, or not at all.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        why = f"shared memory cannot be used ({error.strerror or error})" if isinstance(error, OSError) else str(error)
        sentence = f"{why}, so the work is done in one process; a container needs a /dev/shm that can be written to"
        warnings.warn(sentence, BrainfmWarning, stacklevel=2)
        return sentence
    return ""


def in_this_process(work: Callable[[T], R], todo: Sequence[T]) -> Generator[tuple[int, R], None, None]:
    """What `in_pool` does, one after the other."""
    for number, piece in enumerate(todo):
        yield number, work(piece)


def in_pool(
    work: Callable[[T], R], todo: Sequence[T], workers: int, killed: str
) -> Generator[tuple[int, R], None, None]:
    """Number and result of every piece as it is done; at any error hands out no more work and waits for the rest.
    Where the system has no means for several processes, the work is done in this one.

    Args:
        work: picklable, a function of a module.
        workers: processes, at most one a piece.
        killed: the sentence for when the system kills a worker.

    Raises:
        StoreError: with ``killed``. Whatever ``work`` raises.
    """
    if why_no_processes():
        yield from in_this_process(work, todo)
        return
    workers = min(workers, len(todo))
    remaining = iter(enumerate(todo))
    pending: dict[Future[R], int] = {}
    # Spawned, not forked: a forked worker inherits locks of threads that it has not got.
    context = multiprocessing.get_context("spawn")
    with one_thread():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
        try:
            while True:
                while len(pending) < workers * _QUEUED and (following := next(remaining, None)) is not None:
                    pending[pool.submit(work, following[1])] = following[0]
                if not pending:
                    break
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield pending.pop(future), future.result()
        except BrokenProcessPool:
            raise StoreError(killed) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for each process that is started inside; a process must know before it loads numpy."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start() -> None:
    """Ctrl-C is for the parent to decide about; and a worker whose parent was killed must not go on writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
