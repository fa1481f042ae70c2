"""Tables that people keep: CSV and TSV in whatever encoding, with whatever quotes, as columns and rows of text."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from brainfm.errors import ManifestError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table that was read.

    Attributes:
        path: the file.
        columns: as the header has them, without blanks around them; names may repeat.
        rows: each with as many cells as there are columns, without blanks around them.
        notes: what was odd about it, one line each.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def read_table(path: Path) -> Table:
    """Reads a table separated by tabs, commas, semicolons or, where there are none of these, blanks.

    Tabs separate whatever quotes stand between them, for TSV knows no quoting. A quote in a CSV that is never closed
    quotes nothing. A row that is too short is filled up; one with more cells than the header, or separated by blanks
    and too short, is left out, for nobody can tell which cell belongs to which column.

    Raises:
        ManifestError: the file is missing, cannot be read, is empty or is no text.
    """
    notes: list[str] = []
    text = _text(path, notes)
    lines = [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    if not lines:
        raise ManifestError(f"{path} is empty, expected a header and rows")
    delimiter = max("\t;,", key=lines[0].count)
    blanks = delimiter not in lines[0] and len(lines[0].split()) > 1
    if delimiter in lines[0]:
        cells = _unquoted(lines, delimiter) if delimiter == "\t" else _quoted(text, lines, delimiter, path, notes)
    else:
        cells = [line.split() for line in lines] if blanks else [[line.strip()] for line in lines]
    columns, rows = tuple(cells[0]), cells[1:]
    width = len(columns)
    strange = [row for row in rows if any(row[width:]) or (blanks and len(row) < width)]
    if strange:
        other = "another number of" if blanks else "more"
        shown = f"{path.name}: {len(strange)} rows have {other} cells than the header and are left out"
        notes.append(f"{shown}, e.g. {' | '.join(strange[0])[:60]}")
        rows = [row for row in rows if not any(row[width:]) and not (blanks and len(row) < width)]
    return Table(path, columns, tuple((*row[:width], *[""] * (width - len(row))) for row in rows), tuple(notes))


def decoded(raw: bytes) -> tuple[str, str]:
    """Text and the encoding it was in: UTF-8, UTF-16 where a mark or zeros say so, else Latin-1 as Windows has it.

    Raises:
        ValueError: for bytes that are no text.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return raw.decode(encoding), encoding.removesuffix("-sig")
    if b"\0" in raw:
        half = len(raw) // 2
        for encoding, place in (("utf-16-le", 1), ("utf-16-be", 0)):
            if raw[place::2].count(0) > 0.8 * half:
                return raw.decode(encoding), "utf-16"
        raise ValueError("it holds zero bytes")
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace"), "latin-1"


def _text(path: Path, notes: list[str]) -> str:
    try:
        text, encoding = decoded(path.read_bytes())
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such table, expected a CSV or TSV file") from None
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ManifestError(f"{path} is no text ({error}), expected a CSV or TSV file") from None
    if encoding != "utf-8":
        notes.append(f"{path.name}: is not UTF-8 and was read as {encoding}")
    return text


def _unquoted(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    """Cells between delimiters; quotes that enclose a whole cell, as spreadsheets write them, are taken off."""
    return [[_bare(cell) for cell in line.split(delimiter)] for line in lines]


def _bare(cell: str) -> str:
    cell = cell.strip()
    enclosed = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"').strip() if enclosed else cell


def _quoted(text: str, lines: Sequence[str], delimiter: str, path: Path, notes: list[str]) -> list[list[str]]:
    """The rows of a CSV; where a stray quote would swallow rows, line by line, those with the quote without quoting."""
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
    except csv.Error:
        rows = []
    swallowed = any("\n" in cell and delimiter in cell for row in rows for cell in row)
    if rows and not swallowed and text.count('"') % 2 == 0:
        return [[cell.strip() for cell in row] for row in rows]
    notes.append(f"{path.name}: a quote is opened and not closed; quotes were read as they stand")
    found: list[list[str]] = []
    for line in lines:
        if line.count('"') % 2:
            found += _unquoted([line], delimiter)
        else:
            found += [[cell.strip() for cell in row] for row in csv.reader([line], delimiter=delimiter)]
    return found
