"""Curves of a run: curves.csv and the same for TensorBoard."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from brainfm.files import write_whole

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
        kept = [row for row in read_curves(self.path) if row[0] <= first_step] if first_step else []
        text = io.StringIO(newline="")
        csv.writer(text).writerows([FIELDS, *((step, name, repr(value)) for step, name, value in kept)])
        write_whole(self.path, text.getvalue().encode())
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
