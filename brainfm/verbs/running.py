"""What several verbs ask and do: how windows overlap, how many processes, a bar."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

Overlapping = Annotated[
    float,
    "share of a window that its neighbour repeats; 0.25 takes half the time or less and can cost Dice: "
    "scripts/benchmark/compare_overlap.py says how much it does for a bundle",
]


def processes(workers: int) -> int:
    """``workers``, or of 0 one a core that this process may use."""
    if workers > 0:
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def bar(title: str, total: int = 0) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, lines in a log; what is yielded takes how many are done, of how many."""
    from brainfm.progress import Progress

    with Progress(title, total) as progress:

        def move(done: int, total: int) -> None:
            progress.total = total
            progress.done = done - 1
            progress.advance()

        yield move
