"""What a run leaves to look at: curves (CSV and TensorBoard), pictures, progress."""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from brainfm.nets.backbone_file import write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FIELDS = ("step", "name", "value")


class Curves:
    """``curves.csv`` (long form: step, name, value) and the same for TensorBoard.

    The CSV holds nothing that depends on the clock and every digit of a value, so that the curves of a resumed run
    can be compared with those of an uninterrupted one to the last bit. What a killed run wrote after its last
    checkpoint is dropped when it resumes.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / "curves.csv"
        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_curves(self.path) if row[0] <= first_step] if first_step else []
        partial = self.path.with_suffix(".tmp")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            writer.writerows((step, name, repr(value)) for step, name, value in kept)
        os.replace(partial, self.path)
        self._folder, self._first_step = folder, first_step
        self._board: SummaryWriter | None = None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values after ``step`` steps."""
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows((step, name, repr(float(value))) for name, value in values.items())
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def add_speed(self, step: int, values: Mapping[str, float]) -> None:
        """Figures that depend on the machine: TensorBoard only."""
        for name, value in values.items():
            self.board.add_scalar(f"speed/{name}", value, step)

    @property
    def board(self) -> SummaryWriter:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._first_step + 1)
        return self._board

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def read_curves(path: Path) -> list[tuple[int, str, float]]:
    """The rows of a ``curves.csv``; a half-written last line is ignored."""
    if not path.exists():
        return []
    rows = []
    with path.open(newline="") as file:
        reader = csv.reader(file)
        next(reader, None)
        for row in reader:
            if len(row) == len(FIELDS) and row[2]:
                rows.append((int(row[0]), row[1], float(row[2])))
    return rows


def save_pictures(folder: Path, step: int, pictures: Mapping[str, Tensor], rows: int = 4) -> Path:
    """One PNG: a row a sample, a column a picture; the middle axial slice of each patch, left on the left.

    Args:
        pictures: name to [B, 1, X, Y, Z].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(pictures)
    count = min(rows, next(iter(pictures.values())).shape[0])
    figure = Figure(figsize=(2 * len(names), 2 * count + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(names), squeeze=False)
    for row in range(count):
        slices = [pictures[name][row, 0].float().cpu() for name in names]
        slices = [s[:, :, s.shape[2] // 2].T for s in slices]
        low, high = torch.quantile(slices[0].flatten(), torch.tensor([0.01, 0.99])).tolist()
        for column, (name, image) in enumerate(zip(names, slices)):
            panel = axes[row][column]
            panel.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-3))
            panel.set_axis_off()
            if row == 0:
                panel.set_title(name, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    write_atomically(path, drawn.getvalue())
    return path


class Progress:
    """A bar on a terminal, a plain line now and then in a log."""

    def __init__(self, title: str, total: int, first: int = 0, enabled: bool = True, every_s: float = 15.0) -> None:
        self.title, self.total, self.done, self.enabled = title, total, first, enabled
        self.note = ""
        self._every_s, self._last = every_s, time.monotonic()
        self._began, self._first = time.monotonic(), first
        self._bar = None
        if enabled and sys.stderr.isatty():
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
