"""One HTML page to show to a colleague: text, tables and pictures in a file that loads nothing from elsewhere.

What it looks like stands in page.html.jinja; whatever text comes is shown as text.
"""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined, Template

from brainfm import __version__
from brainfm.files import write_whole
from brainfm.reports.style import DOTS_PER_INCH

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: paragraphs, an empty line between them; `words in backticks` are set as code, a paragraph of nothing else
            as a block of it.
        figures: (caption, PNG) pairs.
        table: rows of cells, the first row being the heads of the columns; heads that are all empty are not shown.
        tables: more of them, each with a caption above it.
        figures_first: whether the figures stand above the tables.
    """

    title: str
    text: str
    figures: tuple[tuple[str, bytes], ...] = ()
    table: tuple[tuple[str, ...], ...] | None = None
    tables: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = ()
    figures_first: bool = False


def write_page(
    path: Path,
    title: str,
    lead: str,
    sections: Sequence[Section],
    command: str,
    numbers: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes the page; a crash leaves no half-written file.

    Args:
        path: of the ``.html`` file; an existing one is replaced.
        title: of the page.
        lead: what was done and what came of it, in a few sentences; paragraphs as in a section.
        sections: in order.
        command: what to type to get this page again.
        numbers: a few (value, what it is) pairs shown large at the top.

    Raises:
        OSError: where it cannot be written.
    """
    text = _template().render(
        title=title, lead=_paragraphs(lead), sections=[_section(s) for s in sections], command=command,
        numbers=numbers, version=__version__,
    )  # fmt: skip
    write_whole(path, text.encode("utf-8"))


@cache
def _template() -> Template:
    source = resources.files("brainfm.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    settings = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return Environment(autoescape=True, undefined=StrictUndefined, **settings).from_string(source)  # type: ignore[arg-type]


# ---- what the template is given --------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Words of a line, set as code or not."""

    words: str
    code: bool


class _Paragraph(NamedTuple):
    pieces: list[_Piece]
    block: bool


class _Cell(NamedTuple):
    pieces: list[_Piece]
    number: bool


class _Table(NamedTuple):
    caption: list[_Piece]
    head: list[_Cell]
    rows: list[list[_Cell]]


class _Figure(NamedTuple):
    """A PNG in base64, the width and height it is shown with in CSS pixels, and its caption."""

    data: str
    width: int
    height: int
    name: str
    caption: list[_Piece]


class _Section(NamedTuple):
    title: str
    text: list[_Paragraph]
    figures: list[_Figure]
    tables: list[_Table]
    figures_first: bool


def _section(section: Section) -> _Section:
    tables = [_table("", section.table)] if section.table else []
    tables += [_table(caption, rows) for caption, rows in section.tables]
    figures = [_figure(caption, png) for caption, png in section.figures]
    return _Section(section.title, _paragraphs(section.text), figures, tables, section.figures_first)


def _pieces(text: str) -> list[_Piece]:
    found = re.split(r"`([^`]+)`", text)
    return [_Piece(words, place % 2 == 1) for place, words in enumerate(found) if words]


def _paragraphs(text: str) -> list[_Paragraph]:
    parts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [_Paragraph(_pieces(part), re.fullmatch(r"`[^`]+`", part) is not None) for part in parts]


def _figure(caption: str, png: bytes) -> _Figure:
    width, height = (round(dots * 100 / DOTS_PER_INCH) for dots in struct.unpack(">2I", png[16:24]))
    return _Figure(base64.b64encode(png).decode("ascii"), width, height, caption, _pieces(caption))


def _table(caption: str, rows: Sequence[Sequence[str]]) -> _Table:
    head, *body = rows
    numeric = [bool(body) and all(_is_number(r[c].strip()) for r in body if c < len(r)) for c in range(len(head))]

    def cells(row: Sequence[str]) -> list[_Cell]:
        return [_Cell(_pieces(cell), number) for cell, number in zip(row, numeric)]

    return _Table(_pieces(caption), cells(head) if any(head) else [], [cells(row) for row in body])


def _is_number(cell: str) -> bool:
    """Numbers, intervals, numbers with a unit, or nothing; a sentence that begins with a number is none."""
    begins = re.match(r"[-+−±\[(<]?\s?\d|[–—-]?$", cell)
    return begins is not None and re.search(r"[^\W\d_]{4,}", cell) is None
