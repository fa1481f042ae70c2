"""Settings out of plain values: what fits, what is refused in which words, and that nothing changes on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from brainfm.errors import ConfigError
from brainfm.settings import (
    FREE,
    VERBATIM,
    Group,
    UnknownKey,
    build,
    defaults,
    dotted,
    keys_of,
    narrowed,
    plain,
    shown,
    verbatim,
    words,
)


@dataclass(frozen=True)
class Inner:
    low_mm: Annotated[float, "length"] = 1
    names: Annotated[tuple[str, ...], "some"] = ("a",)


@dataclass(frozen=True)
class Other(Inner):
    high_mm: Annotated[float, "another length"] = 2.5


def kind_of(values: Mapping[str, Any]) -> type[Inner]:
    return Other if "high_mm" in values else Inner


@dataclass(frozen=True, kw_only=True)
class Outer:
    store: Annotated[Path, "a folder", FREE]
    target: Annotated[str | None, "a column", VERBATIM] = None
    steps: Annotated[int | Literal["auto"], "how many"] = 10
    edge: Annotated[tuple[int, int, int] | None, "of a cube"] = None
    loud: Annotated[bool, "or not", FREE] = False
    from_: Annotated[Path | None, "where it begins"] = None
    parts: Annotated[Mapping[str, float], "shares"] = field(default_factory=lambda: {"x": 1.0})
    free: Annotated[Any, "whatever"] = None
    inner: Annotated[Inner | None, "more of it"] = field(default_factory=Inner)
    chosen: Annotated[Inner, "one of two", Group("small", kinds=kind_of)] = field(default_factory=Inner)
    counted: int = 7


def test_what_came_in_comes_out_again() -> None:
    values = {
        "store": "a//b", "target": "x", "steps": "auto", "edge": [1, 2, 3], "loud": True, "from": "c", "free": [1, {}],
        "parts": {"x": 1, "y": 0.5}, "inner": {"low_mm": 3, "names": []}, "chosen": {"low_mm": 1, "high_mm": 2},
    }  # fmt: skip
    made = build(Outer, values)
    assert made.store == Path("a/b") and made.edge == (1, 2, 3) and made.from_ == Path("c") and made.counted == 7
    assert isinstance(made.chosen, Other) and made.inner == Inner(3, ())
    again = plain(made)
    assert json.dumps(again["parts"]) == '{"x": 1, "y": 0.5}', "1 stays 1, and is not 1.0"
    assert build(Outer, again) == made and again == values | {
        "store": "a/b", "chosen": {"low_mm": 1, "names": ["a"], "high_mm": 2}
    }  # fmt: skip
    assert plain(made, free=False) == {k: v for k, v in again.items() if k not in ("store", "loud")}
    assert build(Inner, {"names": "t1"}).names == ("t1",), "one may stand for a list of one"
    assert build(Outer, {"store": "s", "steps": 1e3}).steps == 1000


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": "ten"}, "steps=ten: expected a whole number or auto"),
        ({"steps": 1.5}, "steps=1.5: expected"),
        ({"steps": True}, "steps=true: expected"),
        ({"loud": 1}, "loud=1: expected true or false"),
        ({"target": 3}, "target=3: expected text or null"),
        ({"edge": [1, 2]}, r"edge=\[1, 2\]: expected three whole numbers or null"),
        ({"parts": {"x": "much"}}, "parts={x: much}: expected a mapping"),
        ({"inner": {"low_mm": "low"}}, "inner.low_mm=low: expected a number"),
        ({"inner": 3}, "inner=3: expected a mapping or null"),
        ({"inner": {"low": 1}}, "no key 'inner.low'; did you mean inner.low_mm?"),
        ({"low_mm": 1}, "no key 'low_mm'; did you mean inner.low_mm?"),
        ({"chosen": {"low_mm": 1, "hihg_mm": 1}}, "no key 'chosen.hihg_mm'"),
        ({"colour": 1}, "no key 'colour'; expected one of"),
        ({"from_": "x"}, "no key 'from_'; did you mean from?"),
    ],
)
def test_refusals(values: dict[str, Any], said: str) -> None:
    filled = {"inner": {}, "chosen": {}} | values
    with pytest.raises(ConfigError, match=said):
        build(Outer, {"store": "s", **filled})


def test_what_must_be_given_and_what_is_no_key() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.store must be given"):
        build(Outer, {}, "trainer.")
    with pytest.raises(UnknownKey):
        build(Outer, {"store": "s", "counted": 3})
    assert defaults(Outer)["store"] == "???" and "chosen" not in defaults(Outer)
    assert list(dotted(Inner, {})) == ["low_mm", "names"] and keys_of(Outer)["loud"].free


def test_paths_and_marked_texts_are_taken_as_they_stand() -> None:
    found = {key for key in keys_of(Outer) if verbatim(Outer, key, defaults(Outer))}
    assert found == {"store", "target", "from"}
    assert not verbatim(Outer, "inner.low_mm", {"inner": {}}) and not verbatim(Outer, "no_such", {})


def test_words_for_people() -> None:
    assert words(keys_of(Outer)["edge"].hint) == ["three whole numbers", "null"]
    assert words(bool | Literal["auto"]) == ["true", "false", "auto"] and words(tuple[str, ...]) == ["a list of texts"]
    assert shown({"a": [True, None, ""], "b": 0.5}) == '{a: [true, null, ""], b: 0.5}'


def test_a_part_of_the_settings() -> None:
    assert narrowed(Inner, Other(3, (), 4)) == Inner(3, ())
