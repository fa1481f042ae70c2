"""Numbers, intervals and counts as a reader is told them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def count(n: int, noun: str) -> str:
    """``1 session``, ``2 sessions``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def number(value: float | None) -> str:
    """Three decimals, fewer from 10 on and none from 1000 on; a minus sign that is as wide as the digits; - of None."""
    if value is None:
        return "-"
    size = abs(value)
    shown = f"{value:.{3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0}f}"
    return shown.replace("-", "−") if float(shown) else shown.removeprefix("-")


def signed(value: float | None) -> str:
    """A difference: `number` with a plus sign where it is above 0."""
    shown = number(value)
    return shown if value is None or shown.startswith("−") or not float(shown) else f"+{shown}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}".replace("-", "−")


def p_value(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def interval(found: Mapping[str, Any]) -> str:
    """``mean [low, high]`` of a score, or its mean alone where no interval is known."""
    if found["low"] is None or found["high"] is None:
        return number(found["mean"])
    return f"{number(found['mean'])} [{number(found['low'])}, {number(found['high'])}]"


def short(value: Any) -> str:
    """A number, or an interval, with two decimals."""

    def two(one: float | None) -> str:
        return "-" if one is None else f"{one:.2f}".replace("-", "−")

    if not isinstance(value, Mapping):
        return two(value)
    return f"{two(value['mean'])} [{two(value['low'])}, {two(value['high'])}]"


def sentence(text: str) -> str:
    """With a capital letter at its beginning."""
    return text[0].upper() + text[1:]
