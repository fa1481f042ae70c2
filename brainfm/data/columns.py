"""Columns of a manifest as answers: what they say about a session, as numbers a loss or a score can use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from brainfm.errors import ManifestError

_MISSING = {"", "n/a", "na", "nan", "null", "unknown", "unspecified", "?"}
_YES = {"1", "yes", "y", "true", "positive", "present"}
_NO = {"0", "no", "n", "false", "negative", "absent"}
AGE = re.compile(r"(^|_)age($|_)")
_OLDEST_YEARS = 130
_IN_A_YEAR = {"month": 12, "week": 53, "day": 366}


class HasColumns(Protocol):
    """A session of a store or of a manifest."""

    @property
    def key(self) -> tuple[str, str, str]: ...

    @property
    def columns(self) -> Mapping[str, str]: ...


class Unusable(Exception):
    """Why a session cannot answer, as a sentence that names it."""


def who(session: HasColumns) -> str:
    return "/".join(part for part in session.key if part)


def tidy(text: str) -> str:
    """One spelling for whole numbers: 1.0 and 01 are 1."""
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return text
    return str(int(number)) if math.isfinite(number) and number == int(number) else text


def cell(session: HasColumns, column: str) -> str | None:
    """What the manifest says, None where it says nothing."""
    text = tidy(session.columns.get(column, ""))
    return None if text.casefold() in _MISSING else text


def read_class(session: HasColumns, column: str, classes: Sequence[Any]) -> int:
    """The place of a session's class, capitals or not. Raises: Unusable where it has none, or none of these."""
    index = {str(name).casefold(): place for place, name in enumerate(classes)}
    text = session.columns.get(column, "").strip()
    place = index.get(tidy(text).casefold())  # asked first: a class may be called unknown
    if place is not None:
        return place
    if cell(session, column) is None:
        raise Unusable(f"{who(session)}: no {column}")
    raise Unusable(f"{who(session)}: {column} is {text!r}, expected one of {', '.join(map(str, classes))}")


def read_labels(session: HasColumns, columns: Sequence[str]) -> np.ndarray:
    """[T] float32 0 or 1, NaN where a label is not known. Raises: Unusable where none is, or a cell says neither."""
    answer = np.full(len(columns), np.nan, np.float32)
    for place, column in enumerate(columns):
        text = cell(session, column)
        if text is None:
            continue
        if text.casefold() not in _YES | _NO:
            raise Unusable(f"{who(session)}: {column} is {text!r}, expected 0 or 1")
        answer[place] = text.casefold() in _YES
    if np.isnan(answer).all():
        raise Unusable(f"{who(session)}: none of {', '.join(columns)}")
    return answer


def read_number(session: HasColumns, column: str, unit: str) -> float:
    """Raises: Unusable where there is no number, ManifestError for an age that nobody has."""
    text = cell(session, column)
    if text is None:
        raise Unusable(f"{who(session)}: no {column}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Unusable(f"{who(session)}: {column} is {text!r}, expected a number")
    if AGE.search(column.lower()):
        most = _OLDEST_YEARS * _IN_A_YEAR.get(unit.lower().rstrip("s"), 1)
        if not 0 <= value <= most:
            raise ManifestError(
                f"session {who(session)} has {column} {text}, expected an age from 0 to {most} {unit}; "
                "mend or empty that cell"
            )
    return value
