"""Progress: a bar or plain lines while something long runs, and what is said meanwhile."""

from __future__ import annotations

import os
import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import Self

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # the first that is set counts
_speaks: bool | None = None


class Progress:
    """A bar on a terminal, a plain line now and then in a log, and where rich is not installed."""

    def __init__(self, title: str, total: int, first: int = 0, enabled: bool = True, every_s: float = 15.0) -> None:
        self.title, self.total, self.done, self.enabled = title, total, first, enabled
        self.note = ""
        self._every_s, self._last = every_s, time.monotonic()
        self._began, self._first = time.monotonic(), first
        self._bar = None
        if enabled and sys.stderr.isatty() and find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, completed=first)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more is done."""
        self.done += 1
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=f"{self.title} {self.note}")
            return
        now = time.monotonic()
        if now - self._last >= self._every_s or self.done == self.total:
            self._last = now
            rate = (self.done - self._first) / max(1e-9, now - self._began)
            print(f"{self.title} {self.done}/{self.total} {self.note} ({rate:.2f}/s)", file=sys.stderr, flush=True)


def speak(first: bool) -> None:
    """Settles whether this process is the one that speaks; until then its environment tells."""
    global _speaks
    _speaks = first


def say(text: str) -> None:
    """To the log, once however many processes a run has; what a file's words would do to a terminal is escaped."""
    ranks = [os.environ[name] for name in _RANKS if name in os.environ]
    if _speaks if _speaks is not None else ranks[:1] in ([], ["0"]):
        print("\n".join(map(on_one_line, text.split("\n"))), file=sys.stderr, flush=True)


def on_one_line(text: str) -> str:
    """The text with line breaks and control characters escaped: names in files may hold what a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
