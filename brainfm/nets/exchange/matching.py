"""Which tensor of another tool's file goes where, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import Tensor

from brainfm.errors import WeightsError
from brainfm.files import write_table
from brainfm.nets.transfer import listed

COLUMNS = ("state", "brainfm", "file", "shape")
STATES = ("matched", "copy", "unused", "missing", "misfit", "unexpected")


@dataclass(frozen=True)
class Row:
    """What became of one tensor.

    Attributes:
        state: ``matched``; ``copy`` of a matched one under another name; ``unused``: known, and of no use here;
            ``missing`` in the file; ``misfit``: there, with another shape; ``unexpected``: nobody knows what it is.
        ours, theirs: its names, empty where it has none.
        shape: in the file, or as it is expected.
    """

    state: str
    ours: str
    theirs: str
    shape: tuple[int, ...]

    def cells(self) -> tuple[str, str, str, str]:
        return self.state, self.ours, self.theirs, "x".join(map(str, self.shape))


class MisfitError(WeightsError):
    """A file that does not fill a network.

    Attributes:
        rows: what became of each of its tensors.
    """

    def __init__(self, sentence: str, rows: tuple[Row, ...]) -> None:
        super().__init__(sentence)
        self.rows = rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """The table of a transfer, as CSV. Raises: FileError."""
    write_table(path, COLUMNS, (row.cells() for row in rows))


def summary(rows: Sequence[Row]) -> str:
    """How many tensors are in which state; what found no place by name, what is of no use by its module."""
    found = Counter(row.state for row in rows)
    lines = [f"{state:<10} {found[state]:>5}" for state in STATES if found[state]]
    modules = Counter(".".join(row.theirs.split(".")[:2]) for row in rows if row.state == "unused")
    if modules:
        lines.append("unused: " + listed((f"{module}.* ({count})" for module, count in modules.items()), ", "))
    for state in ("missing", "misfit", "unexpected"):
        if found[state]:
            lines.append(f"{state}: {listed((row.theirs or row.ours for row in rows if row.state == state), ', ')}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Matching:
    """Tensors of a file under our names, and what became of each."""

    tensors: dict[str, Tensor]
    rows: tuple[Row, ...]

    def check(self, origin: str, network: str) -> None:
        """Raises: MisfitError naming what is missing, misfits or is unknown."""
        wrong = [
            *(f"{row.ours} ({row.theirs}) is missing" for row in self._of("missing")),
            *(f"{row.theirs} is {row.cells()[3]}, not the expected shape" for row in self._of("misfit")),
            *(f"{row.theirs} is unknown" for row in self._of("unexpected")),
        ]
        if wrong:
            raise MisfitError(f"{origin}: does not fit {network}: {listed(wrong)}", self.rows)

    def _of(self, state: str) -> list[Row]:
        return [row for row in self.rows if row.state == state]


def match(
    own: Mapping[str, Tensor],
    theirs: Callable[[str], Sequence[str]],
    tensors: Mapping[str, Tensor],
    unused: Iterable[str] = (),
) -> Matching:
    """Fills the tensors of a network of ours from a file.

    Args:
        own: name -> tensor of the expected shape; may lie on the meta device.
        theirs: our name -> names it may have there, the most trustworthy first; the others are copies.
        tensors: of the file.
        unused: patterns of names in the file that are known and of no use.
    """
    filled: dict[str, Tensor] = {}
    rows: list[Row] = []
    claimed: set[str] = set()
    for name, expected in own.items():
        names = theirs(name)
        there = [other for other in names if other in tensors]
        claimed |= set(there)
        if not there:
            rows.append(Row("missing", name, names[0], tuple(expected.shape)))
            continue
        value = tensors[there[0]]
        fits = value.shape == expected.shape
        rows.append(Row("matched" if fits else "misfit", name, there[0], tuple(value.shape)))
        rows += [Row("copy", name, other, tuple(tensors[other].shape)) for other in there[1:]]
        if fits:
            filled[name] = value
    patterns = tuple(unused)
    for name, value in tensors.items():
        if name not in claimed:
            known = any(fnmatchcase(name, pattern) for pattern in patterns)
            rows.append(Row("unused" if known else "unexpected", "", name, tuple(value.shape)))
    return Matching(filled, tuple(rows))


def with_channels(stem: Tensor, channels: int) -> Tensor:
    """The first convolution of a network for another number of input channels.

    From one to n: the weights n times, divided by n, so that n equal channels give what the one gave. From n to one:
    their sum, so that the one gives what n equal channels gave.

    Args:
        stem: [E, C, ...].
        channels: wanted.

    Raises: WeightsError from several channels to several others.
    """
    there = stem.shape[1]
    if there == channels:
        return stem
    if there == 1:
        return stem.repeat(1, channels, *(1,) * (stem.ndim - 2)) / channels
    if channels == 1:
        return stem.sum(1, keepdim=True)
    raise WeightsError(
        f"a first convolution of {there} channels cannot be made one of {channels}; expected 1 on a side"
    )


def axes_reversed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The kernels of a convolutional network for arrays whose axes come in the reverse order (Z, Y, X for X, Y, Z).

    The network then gives for the turned array what it gave for the array, turned.
    """
    return {
        name: value.permute(0, 1, 4, 3, 2).contiguous() if value.ndim == 5 else value for name, value in tensors.items()
    }
