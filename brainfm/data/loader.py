"""Batches in a fixed order that can begin anywhere."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from brainfm.batch import Batch
from brainfm.data.patches import collate


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
        workers: processes that read ahead; 0 reads in this process.
        pin_memory: page-locked batches, for a GPU.
    """
    return DataLoader(
        dataset,
        batch_sampler=steps,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker if workers else None,
    )


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)  # workers share the cores with the network
    # Ctrl-C and a batch system's signals reach every process of the group. The trainer finishes its step and saves; a
    # worker that died first would break that off. Workers end with the loader, or when their parent is gone.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
