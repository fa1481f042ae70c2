"""From the words of a command line to a verb's settings, and to its help. The only file that knows hydra.

A verb's settings say which of their fields are chosen by name (`Group`); the options are the files of configs/NAME/,
which hold what differs from the defaults of their class. Hydra applies the words to all that; `build` checks what
comes out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import Any

from brainfm.errors import ConfigError
from brainfm.settings import Key, UnknownKey, build, check_keys, defaults, keys_of, shown, verbatim, words

# A group whose options change the settings as a whole; of verbs with a class attribute RECIPES. An option is one of
# every verb that has all of its keys.
RECIPES = "experiment"
_OVERRIDE = "override /"  # before a group that a recipe chooses an option of
_HEAD = re.compile(r"(?:#.*\n)*")
_WIDEST = 44  # columns of key=value in help


def configs() -> Path:
    """The folder of the options: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def settings_of(verb: str) -> type:
    """The class of a verb's settings."""
    found: type = import_module(f"brainfm.verbs.{verb}").Settings
    return found


def options(group: str, key: Key | None = None) -> list[str]:
    """What may follow ``group=``."""
    named = key.group.named if key is not None and key.group is not None else {}
    return sorted({path.stem for path in (configs() / group).glob("*.yaml")} | set(named))


def recipes(kind: type) -> list[str]:
    """What may follow ``experiment=`` for settings of this class."""
    if not hasattr(kind, "RECIPES"):
        return []
    known = set(keys_of(kind))
    return [
        name for name in options(RECIPES) if {*(recipe := _recipe(name)), *_chosen_by(recipe)} - {"defaults"} <= known
    ]


def _recipe(name: str) -> dict[str, Any]:
    """A recipe's file."""
    import yaml

    return yaml.safe_load((configs() / RECIPES / f"{name}.yaml").read_text()) or {}


def _chosen_by(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Options of groups that a recipe chooses."""
    return {
        group.removeprefix(_OVERRIDE): option for one in recipe.get("defaults", []) for group, option in one.items()
    }


def resolve(verb: str, overrides: Sequence[str]) -> Any:
    """The verb's settings with the overrides applied.

    Raises:
        ConfigError: for a key given twice, unknown or missing, an option that does not exist, or a value of another
            type than the key's.
    """
    kind = settings_of(verb)
    given = _given(overrides)
    options_chosen = chosen(kind, given)
    try:
        return build(kind, _composed(verb, kind, given, options_chosen))
    except UnknownKey as error:
        sentence = f"brainfm {verb} has no key {error.key!r}{error.hint}; `brainfm {verb} --help` lists them"
        raise ConfigError(sentence) from None


def _given(overrides: Sequence[str]) -> dict[str, str]:
    """The words by key. Raises: ConfigError."""
    seen: dict[str, str] = {}
    for word in overrides:
        key, separator, value = word.partition("=")
        key = key.lstrip("+")
        if not separator:
            raise ConfigError(f"found {word!r}, expected key=value")
        if key in seen:
            raise ConfigError(f"{key} is given twice ({seen[key]} and {value}), expected once")
        seen[key] = value
    return seen


def _groups(kind: type) -> dict[str, Key]:
    return {name: key for name, key in keys_of(kind).items() if key.group is not None}


def chosen(kind: type, given: Mapping[str, str]) -> dict[str, str]:
    """The option of each group, as far as the words and the defaults say. Raises: ConfigError for one that is none."""
    found = {}
    recipe = given.get(RECIPES, "null") if hasattr(kind, "RECIPES") else "null"
    if recipe != "null" and recipe not in recipes(kind):
        raise ConfigError(f"{RECIPES}={recipe}: expected one of {', '.join(recipes(kind))}")
    of_recipe = _chosen_by(_recipe(recipe)) if recipe != "null" else {}
    for name, key in _groups(kind).items():
        assert key.group is not None
        value = given.get(name, of_recipe.get(name, key.group.default))
        if value in key.group.gone:
            raise ConfigError(f"{name}={value} is no option any more, expected {key.group.gone[value]}")
        if value not in options(name, key):
            raise ConfigError(f"{name}={value}: expected one of {', '.join(options(name, key))}")
        found[name] = value
    return found


def _option(name: str, key: Key, option: str) -> dict[str, Any]:
    """All values of an option: the defaults of its class, and what its file or the group changes."""
    import yaml

    assert key.group is not None
    file = configs() / name / f"{option}.yaml"
    own = dict(key.group.named.get(option, {}))
    if file.is_file():
        own |= yaml.safe_load(file.read_text()) or {}
    kind = key.kind(own)
    return own if kind is None else defaults(kind) | own


def start(kind: type, options_chosen: Mapping[str, str]) -> dict[str, Any]:
    """The values with these options of groups, before any further word; ``???`` is what must be given."""
    values = defaults(kind)
    for name, key in _groups(kind).items():
        assert key.group is not None
        values[name] = _option(name, key, options_chosen[name]) | dict(key.group.over)
    return {name: values[name] for name in keys_of(kind)}


# ---- hydra -----------------------------------------------------------------------------------------------------------


def _composed(verb: str, kind: type, given: Mapping[str, str], options_chosen: Mapping[str, str]) -> dict[str, Any]:
    try:
        from hydra import compose, initialize
    except ModuleNotFoundError:
        raise ConfigError("the command line needs hydra, which is not installed: pip install hydra-core") from None
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups, values = _groups(kind), start(kind, options_chosen)
    overrides = []
    for key, value in given.items():
        if key in groups or (key == RECIPES and hasattr(kind, "RECIPES")):
            overrides.append(f"{key}={value}")
        else:
            overrides.append(f"++{key}={_quoted(value) if verbatim(kind, key, values) and value != 'null' else value}")
    try:
        with _store(verb, kind), initialize(config_path=None, version_base="1.3"):
            composed = compose(verb, overrides)
            check_keys(kind, OmegaConf.to_container(composed))  # type: ignore[arg-type]
            missing = sorted(OmegaConf.missing_keys(composed))
            if missing:
                raise ConfigError(f"brainfm {verb}: {', '.join(missing)} must be given, e.g. {missing[0]}=...")
            return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"brainfm {verb}: {str(error).splitlines()[0]}") from error


@contextmanager
def _store(verb: str, kind: type) -> Iterator[None]:
    """While open, hydra knows this verb's groups and no others: ``backbone`` is a group of one verb and a file of
    another."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    before, groups = store.repo, _groups(kind)
    store.repo = dict(before)
    choices: list[Any] = [{name: key.group.default} for name, key in groups.items() if key.group is not None]
    over = {name: dict(key.group.over) for name, key in groups.items() if key.group is not None and key.group.over}
    last = [{f"optional {RECIPES}": None}] if hasattr(kind, "RECIPES") else []
    try:
        store.store(name=verb, node={"defaults": [*choices, "_self_", *last], **defaults(kind), **over})
        for name, key in groups.items():
            for option in options(name, key):
                store.store(group=name, name=option, node=_option(name, key, option))
        for recipe in recipes(kind):
            node = OmegaConf.load(configs() / RECIPES / f"{recipe}.yaml")
            store.store(group=RECIPES, name=recipe, node=node, package="_global_")
        yield
    finally:
        store.repo = before


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'") if "'" in value or value.endswith("\\") else value
    return f"'{escaped}'"


# ---- help ------------------------------------------------------------------------------------------------------------


def help_of(verb: str, overrides: Sequence[str] = ()) -> str:
    """Every key of a verb, a line each, with its value, its type and its meaning; groups with the options chosen."""
    kind = settings_of(verb)
    here = chosen(kind, _given([word for word in overrides if "=" in word]))
    values = start(kind, here)
    lines = [f"usage: brainfm {verb} key=value ...   (??? must be given)", "", *_about(kind), ""]
    lines += _lines(kind, values, "")
    for name, key in _groups(kind).items():
        lines += ["", f"{name}={'|'.join(options(name, key))}   {key.doc}; here {here[name]}:"]
        file, inner = configs() / name / f"{here[name]}.yaml", key.kind(values[name])
        head = _HEAD.match(file.read_text()).group() if file.is_file() else ""  # type: ignore[union-attr]
        lines += [f"  {line}" for line in head.splitlines() or [f"# {line}" for line in _about(inner)]]
        if inner is None:
            lines += [f"  {name}.{each}={shown(value)}" for each, value in values[name].items()]
        else:
            lines += _lines(inner, values[name], f"{name}.")
    if hasattr(kind, "RECIPES"):
        lines += ["", f"{RECIPES}={'|'.join(recipes(kind))}   {kind.RECIPES}"]
    return "\n".join(lines)


def _about(kind: type | None) -> list[str]:
    """What a class of settings says of itself, without what it says to programmers."""
    text = cleandoc(kind.__doc__ or "") if kind is not None else ""
    return re.split(r"\n\n(?:Attributes|Raises):", text)[0].splitlines()


def _lines(kind: type, values: Mapping[str, Any], at: str) -> list[str]:
    lines = []
    for name, key in keys_of(kind).items():
        if key.group is not None:
            continue
        inner = key.kind(values[name]) if isinstance(values[name], Mapping) else None
        if inner is None:
            given = f"{at}{name}={shown(values[name])}"
            lines.append(f"  {given:<{_WIDEST}}  {' | '.join(words(key.hint))}; {key.doc}")
        else:
            lines += [f"  {at}{name}: {key.doc}", *_lines(inner, values[name], f"{at}{name}.")]
    return lines
