"""Typed settings: frozen dataclasses made from plain values, checked key by key, and described for ``--help``.

A field whose annotation carries a text is a key, and the text is its help::

    @dataclass(frozen=True)
    class Trainer:
        max_steps: Annotated[int, "steps of the optimiser"] = 10_000

Other fields are set by code. A name that Python keeps for itself is written with a ``_`` behind it (``from_``). The
settings of a package lie in its ``settings.py``, which imports neither torch nor numpy, so that help comes at once.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from brainfm.errors import ConfigError

_Settings = TypeVar("_Settings")
_COUNTS = {2: "two", 3: "three"}
_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_MANY = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


class Free:
    """Mark of a field that may change between two calls that go on with one run: it moves no weight."""


class Later:
    """Mark of a field that came after runs had been begun, and whose default is what these did: while it has it, it is
    no part of a run's identity."""


class Verbatim:
    """Mark of a text that is taken as it stands, and may hold blanks, brackets or '=': a column, a pattern, a path that
    may also be a word. A `Path` needs no mark."""


FREE, LATER, VERBATIM = Free(), Later(), Verbatim()


@dataclass(frozen=True)
class Group:
    """Of a field that is chosen by name, ``objective=mae``, and then changed key by key. Options have the field's name
    as their folder in configs/.

    Attributes:
        default: the option that is taken where nobody chooses.
        kinds: values -> the class that holds them, where options are of several classes.
        named: options that need no file, with their values.
        over: what a verb puts over the values of any option.
        gone: names that are no options any more -> what to write now.
    """

    default: str
    kinds: Callable[[Mapping[str, Any]], type] | None = None
    named: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    over: Mapping[str, Any] = field(default_factory=dict)
    gone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """One key of some settings.

    Attributes:
        name: as users write it.
        field: the attribute that holds it.
        hint: its type, without annotations.
        doc: one line for people.
        default: MISSING where it must be given.
        group: where it is chosen by name.
        free: whether it may change between two calls that go on with one run.
        later: whether its default stands for not being there.
        verbatim: whether what is given, or what lies in it, is taken as it stands.
    """

    name: str
    field: str
    hint: Any
    doc: str
    default: Any
    group: Group | None
    free: bool
    later: bool
    verbatim: bool

    def kind(self, values: Any) -> type | None:
        """The settings' class that holds these values; None where the key's values are no settings."""
        if self.group is not None and self.group.kinds is not None:
            return self.group.kinds(values)
        return next((hint for hint in _alternatives(self.hint) if is_dataclass(hint)), None)  # type: ignore[return-value]


class UnknownKey(ConfigError):
    """A key that some settings do not have.

    Attributes:
        key: as it was given, with all it lies in.
    """

    def __init__(self, key: str, there: Sequence[str]) -> None:
        self.key = key
        near = difflib.get_close_matches(key, there, n=1, cutoff=0.7)
        same = [name for name in there if name.rpartition(".")[2] == key.rpartition(".")[2]]
        found = near or same
        self.hint = f"; did you mean {found[0]}?" if found else ""
        super().__init__(f"there is no key {key!r}{self.hint or '; expected one of ' + ', '.join(sorted(there))}")


@cache
def keys_of(kind: type) -> dict[str, Key]:
    """The keys of a settings' class by name, in their order."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    for each in fields(kind):
        hint, *marks = get_args(hints[each.name]) if get_origin(hints[each.name]) is Annotated else (hints[each.name],)
        doc = next((mark for mark in marks if isinstance(mark, str)), None)
        if doc is None:
            continue
        default = each.default if each.default_factory is MISSING else each.default_factory()
        group = next((mark for mark in marks if isinstance(mark, Group)), None)
        name = each.name.rstrip("_")
        paths = any(_is_path(inner) for inner in _alternatives(hint))
        found[name] = Key(
            name, each.name, hint, doc, default, group, FREE in marks, LATER in marks, paths or VERBATIM in marks
        )
    return found


def build(kind: type[_Settings], values: Mapping[str, Any], at: str = "") -> _Settings:
    """Settings out of plain values.

    A list becomes a tuple and a text a path where these are meant; no number changes, so that `plain` gives back what
    came in.

    Args:
        values: by key; what is absent has its default.
        at: what these settings lie in, for sentences: ``trainer.``.

    Raises:
        UnknownKey: for a key that is not there, with the nearest that is.
        ConfigError: for a value of another type, or a missing one.
    """
    known = keys_of(kind)  # type: ignore[arg-type]
    check_keys(kind, values, at)
    missing = [name for name, key in known.items() if key.default is MISSING and name not in values]
    if missing:
        raise ConfigError(f"{at}{missing[0]} must be given")
    return kind(**{known[name].field: _fitted(known[name], value, f"{at}{name}") for name, value in values.items()})


def check_keys(kind: type, values: Mapping[str, Any], at: str = "") -> None:
    """Raises: UnknownKey for the first key that is not there, at any depth."""
    known = keys_of(kind)
    for name, value in values.items():
        if name not in known:
            raise UnknownKey(f"{at}{name}", [f"{at}{key}" for key in dotted(kind, values)])
        within = known[name].kind(value) if isinstance(value, Mapping) else None
        if within is not None:
            check_keys(within, value, f"{at}{name}.")


def dotted(kind: type, values: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Every key with all that lies in it; of a group's option those of the class that ``values`` ask for."""
    for name, key in keys_of(kind).items():
        yield f"{at}{name}"
        inner = values.get(name)
        within = key.kind(inner) if isinstance(inner, Mapping) else None
        if within is not None:
            yield from dotted(within, inner, f"{at}{name}.")  # type: ignore[arg-type]


def plain(settings: Any, *, free: bool = True) -> Any:
    """Settings as values for JSON, by key: what `build` was given and what it completed.

    Args:
        free: whether the fields that are marked FREE are among them, and those marked LATER that have their default.
    """
    if is_dataclass(settings) and not isinstance(settings, type):

        def told(key: Key) -> bool:
            return free or not (key.free or (key.later and getattr(settings, key.field) == key.default))

        kept = [key for key in keys_of(type(settings)).values() if told(key)]
        return {key.name: plain(getattr(settings, key.field), free=free) for key in kept}
    if isinstance(settings, Mapping):
        return {str(name): plain(value, free=free) for name, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [plain(value, free=free) for value in settings]
    return str(settings) if isinstance(settings, Path) else settings


def narrowed(kind: type[_Settings], settings: Any) -> _Settings:
    """The fields of ``kind`` alone, out of settings that have more."""
    return kind(**{each.name: getattr(settings, each.name) for each in fields(kind)})  # type: ignore[arg-type]


def defaults(kind: type) -> dict[str, Any]:
    """The defaults by key, as values for JSON, with ``???`` for what must be given. Groups are left out."""
    found: dict[str, Any] = {}
    for name, key in keys_of(kind).items():
        if key.group is None:
            found[name] = "???" if key.default is MISSING else plain(key.default)
    return found


def verbatim(kind: type, key: str, values: Mapping[str, Any]) -> bool:
    """Whether the value of a dotted key is taken as it stands, where these are the values of the options chosen."""
    name, _, rest = key.partition(".")
    found = keys_of(kind).get(name)
    if found is None:
        return False
    inner = values.get(name)
    within = found.kind(inner) if rest and isinstance(inner, Mapping) else None
    return found.verbatim if within is None else verbatim(within, rest, inner)  # type: ignore[arg-type]


def words(hint: Any) -> list[str]:
    """What a type allows, in words, one for each alternative."""
    found: list[str] = []
    for each in _alternatives(hint):
        if get_origin(each) is Literal:
            found += [shown(value) for value in get_args(each)]
        elif get_origin(each) in (tuple, Sequence):
            inner = get_args(each)
            many = ", ".join(words(inner[0])) if get_origin(inner[0]) is Literal else _MANY.get(inner[0], "values")
            alike = Ellipsis in inner or get_origin(each) is Sequence
            found.append(f"a list of {many}" if alike else f"{_COUNTS.get(len(inner), len(inner))} {many}")
        elif each is bool:
            found += ["true", "false"]
        elif is_dataclass(each) or get_origin(each) is _MAPPING:
            found.append("a mapping")
        else:
            found.append(_NAMES.get(each, "any value"))
    return list(dict.fromkeys(found))


def shown(value: Any) -> str:
    """A plain value as one would type it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {shown(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(shown(inner) for inner in value)}]"
    return str(value) if value != "" else '""'


# ---- one value -------------------------------------------------------------------------------------------------------

_MAPPING = get_origin(Mapping[str, int])
_NOT = object()  # what does not fit


def _fitted(key: Key, value: Any, at: str) -> Any:
    """Raises: ConfigError where the value does not fit the key."""
    if isinstance(value, Mapping):
        kind = key.kind(value)
        if kind is not None:
            return build(kind, value, f"{at}.")
    for hint in _alternatives(key.hint):
        found = _as(hint, value)
        if found is not _NOT:
            return found
    raise ConfigError(f"{at}={shown(value)}: expected {one_of(words(key.hint))}")


def one_of(alternatives: Sequence[str]) -> str:
    """``a, b or c``."""
    *most, last = alternatives
    return f"{', '.join(most)} or {last}" if most else last


def _as(hint: Any, value: Any) -> Any:
    """The value as this type wants it, or _NOT."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Literal:
        return next((legal for legal in inner if legal == value and type(legal) is type(value)), _NOT)
    if kind is tuple:
        return _as_tuple(inner, value)
    if kind is _MAPPING:
        if not isinstance(value, Mapping):
            return _NOT
        fitted = {str(name): _first(inner[1], each) for name, each in value.items()}
        return _NOT if any(each is _NOT for each in fitted.values()) else fitted
    if hint is Any:
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else _NOT  # type: ignore[arg-type]
    return _as_one(hint, value)


def _as_one(kind: Any, value: Any) -> Any:
    if kind is Path:
        return Path(value) if isinstance(value, (str, Path)) else _NOT
    if kind is int:
        whole = isinstance(value, float) and value.is_integer()
        return int(value) if whole or (isinstance(value, int) and not isinstance(value, bool)) else _NOT
    if kind is float:
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else _NOT
    return value if type(value) is kind else _NOT


def _as_tuple(inner: tuple[Any, ...], value: Any) -> Any:
    """One value may stand for a list of one."""
    open_ended = Ellipsis in inner
    if isinstance(value, (str, int, float)) and open_ended:
        value = [value]
    if not isinstance(value, (list, tuple)) or (not open_ended and len(value) != len(inner)):
        return _NOT
    hints = [inner[0]] * len(value) if open_ended else inner
    fitted = tuple(_first(hint, each) for hint, each in zip(hints, value))
    return _NOT if any(each is _NOT for each in fitted) else fitted


def _first(hint: Any, value: Any) -> Any:
    return next((found for each in _alternatives(hint) if (found := _as(each, value)) is not _NOT), _NOT)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is_path(hint: Any) -> bool:
    return hint is Path or (get_origin(hint) is _MAPPING and get_args(hint)[1] is Path)
