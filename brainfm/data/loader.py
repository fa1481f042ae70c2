"""The loader: batches in a fixed order that can begin anywhere."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from brainfm.batch import Batch
from brainfm.data.patches import Sample, collate
from brainfm.data.workers import why_no_processes
from brainfm.errors import BrainfmError, TrainingError

_AHEAD = 4  # batches that each worker reads before they are asked for
_SHARED = "/dev/shm"  # where Linux keeps what processes share; a container has 64 MB of it unless told otherwise
_RESERVE = 2  # samples are not all of one size


@dataclass(frozen=True)
class StepSampler(Sampler):
    """The sample numbers of each step: step s of all ranks together takes s * G .. (s + 1) * G - 1.

    Args:
        first_step, last_step: the steps to serve, last one excluded.
        batch_size: samples a step on one rank; G = batch_size * world_size.
        rank, world_size: this process among all.
    """

    first_step: int
    last_step: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)


def make_loader(dataset: Dataset, steps: StepSampler, workers: int, pin_memory: bool = False) -> DataLoader[Batch]:
    """A loader of Batches for these steps.

    Args:
        workers: processes that read ahead; 0 reads in this process, as do more where the system has no means for
            several processes.
        pin_memory: page-locked batches, for a GPU.
    """
    workers = 0 if workers and why_no_processes() else workers
    return _Loader(
        dataset,
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=Collate(_RESERVE * _AHEAD * workers * steps.world_size) if workers else collate,
        pin_memory=pin_memory,
        prefetch_factor=_AHEAD if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )


def shared_room() -> float:
    """Bytes that are free in shared memory; infinite where a system keeps it elsewhere."""
    try:
        status = os.statvfs(_SHARED)
    except (OSError, AttributeError):
        return float("inf")
    return status.f_bavail * status.f_frsize


@dataclass(frozen=True)
class Collate:
    """Collates in a worker. A batch goes to the trainer through shared memory where that has room for all batches that
    may be under way, else as bytes through the pipe: slower, but torch drops a batch for which there is no room, and
    the trainer would wait for it for ever.

    Args:
        under_way: batches that all workers of this machine may have sent and nobody has taken.
        room: bytes of shared memory that are free.
    """

    under_way: int
    room: Callable[[], float] = shared_room

    def __call__(self, samples: Sequence[Sample]) -> Any:
        batch = collate(list(samples))
        return batch if self.under_way * _bytes_of(batch) <= self.room() else _ByValue(batch)


@dataclass(frozen=True)
class _ByValue:
    """A batch that travels with its numbers, as arrays do; what comes out at the other end is the batch."""

    batch: Batch

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _batch_of, ({name: tensor.numpy() for name, tensor in _tensors(self.batch).items()},)


def _batch_of(arrays: dict[str, Any]) -> Batch:
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if value is not None}


def _bytes_of(batch: Batch) -> int:
    return sum(tensor.nbytes for tensor in _tensors(batch).values())


class _Loader(DataLoader[Batch]):
    """A loader that speaks of its workers in one sentence."""

    def __iter__(self) -> Any:
        return _Batches(super().__iter__())


class _Batches:
    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._shutdown_workers = getattr(inner, "_shutdown_workers", None)  # what the loop calls on every way out

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._inner)
        except StopIteration:
            raise
        except BaseException as error:
            if self._shutdown_workers is not None:  # they ignore SIGTERM: none may be left to wait for
                self._shutdown_workers()
            raise self._told(error) from None

    @staticmethod
    def _told(error: BaseException) -> BaseException:
        """An error in a worker without the worker's traceback, and the death of a worker, each in one sentence."""
        if isinstance(error, BrainfmError) and str(error).startswith("Caught "):
            return type(error)(str(error).strip().splitlines()[-1].partition("Error: ")[2])
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            return TrainingError(
                f"a process that reads ahead has died ({str(error).splitlines()[0]}), most likely for want of memory; "
                "the same command goes on from what is saved, trainer.workers=0 needs the least"
            )
        return error


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # workers share the cores with the network
    # Ctrl-C and a batch system's signals reach every process of the group. The trainer finishes its step and saves; a
    # worker that died first would break that off. Workers end with the loader, or when their parent is gone.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
