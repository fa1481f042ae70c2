"""Targets: what is known of people beside their scans (label maps, region volumes, health), and lesions to be put in.

An anatomical target belongs to the subject. One label map a subject is chosen, and serves every scan and visit that
lies in its space; a visit in another space uses its own. Where there is no label map, the region volumes stand in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data import regions, schemes, volumes
from brainfm.data.settings import TargetSpec
from brainfm.data.store import Key, SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.synthesis.shapes import Shapes, load_shapes, procedural_shapes

LESION_NAME = re.compile(r"lesion|tumou?r|infarct|stroke|wmh|h(ae|e)morrh|mening|gliom|metast|plaque|abnormal")
_HEALTH_COLUMNS = ("healthy", "health_status")
_HEALTHY_WORDS = {"healthy", "control", "healthy control", "hc", "nc", "normal"}
_NO_WORDS = {"", "n/a", "na", "nan", "none", "unknown", "unspecified"}
_LOOKED_AT = 12  # label maps whose ids settle the scheme of a column
_SHAPES = 200  # procedural ones


@dataclass(frozen=True)
class LabelMap:
    """A label volume of the store and how its ids become groups."""

    session: SessionEntry
    name: str
    scheme: str


@dataclass(frozen=True)
class Targets:
    """What the loader looks up for a sample.

    Attributes:
        groups: names of the anatomical groups, background first; empty where there is no label map.
        tables: for each scheme in use, id -> index into groups, -1 for ids that do not count.
        renders: the same for render classes (data/regions.RENDERED); only at the level ``regions``.
        maps: the label map that shows the anatomy of a session's subject.
        regions: names of the regions of the volume table; empty where there is none.
        volumes: subject key to z-scored log fractions [R] float32.
        health: 1 ill, 0 healthy, by session; those of whom nothing is known are absent.
        lesions: names of the masks that show pathology, by session.
        synthesise: share of the patches without known disease that get a lesion.
        shapes: of such lesions.
        notes: sentences for the log: what was found, guessed, left out.
    """

    groups: tuple[str, ...] = ()
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    renders: Mapping[str, np.ndarray] = field(default_factory=dict)
    maps: Mapping[Key, LabelMap] = field(default_factory=dict)
    regions: tuple[str, ...] = ()
    volumes: Mapping[str, np.ndarray] = field(default_factory=dict)
    health: Mapping[Key, float] = field(default_factory=dict)
    lesions: Mapping[Key, tuple[str, ...]] = field(default_factory=dict)
    synthesise: float = 0.0
    shapes: Shapes | None = None
    notes: tuple[str, ...] = ()


def find_targets(
    store: Store, spec: TargetSpec, trained: Collection[str], *, anatomy: bool = True, pathology: bool = True
) -> Targets:
    """The targets of every session of a store.

    Args:
        trained: keys of the subjects that are trained on: volumes are standardised by them alone.
        anatomy, pathology: what is wanted; the other is not looked for.

    Raises:
        ManifestError: a column or table that is named but not there or not readable, labels of no scheme.
        ConfigError: a level that a scheme does not tell.
    """
    notes: list[str] = []
    found: dict[str, Any] = {}
    if anatomy:
        found |= _find_maps(store, spec, notes)
        found |= _find_volumes(store, spec, trained, notes)
        if spec.level == "regions" and spec.volumes is None:
            found |= _measure_volumes(store, found["maps"], trained)
        mapped = {session.subject_key for session in store.sessions if session.key in found["maps"]}
        without = {s.subject_key for s in store.sessions} - mapped - set(found["volumes"])
        if without:
            notes.append(f"no anatomical target for {len(without)} subjects; their anatomy term is dropped")
    if pathology:
        found |= _find_health(store, spec, notes)
        found |= _find_lesions(store, spec, notes)
    return Targets(**found, notes=tuple(notes))


def _find_maps(store: Store, spec: TargetSpec, notes: list[str]) -> dict[str, Any]:
    there = {label.name for session in store.sessions for label in session.labels if label.name.endswith("_labels")}
    wanted = dict.fromkeys(sorted(there), "auto") if spec.labels is None else dict(spec.labels)
    strange = [scheme for scheme in wanted.values() if scheme not in (*schemes.SCHEMES, "auto")]
    if strange:
        known = ", ".join(schemes.SCHEMES)
        raise ConfigError(f"data.targets.labels: scheme {strange[0]!r} is not known, expected auto or one of {known}")
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ManifestError(f"{store.path}: no label column {missing[0]!r}, found {', '.join(sorted(there)) or 'none'}")
    chosen = {name: _scheme(store, name) if scheme == "auto" else scheme for name, scheme in wanted.items()}
    level = spec.level or ("groups" if all(_tells_groups(s) for s in chosen.values()) else "tissues")
    found = set(chosen.values())
    try:
        fine = level == "regions"
        tables = {s: regions.targets_of(s) if fine else schemes.lookup(s, level, unknown="ignore") for s in found}
    except ManifestError as error:
        raise ConfigError(f"data.targets.level={level}: {error}") from None
    maps: dict[Key, LabelMap] = {}
    for sessions in _by_subject(store.sessions).values():
        # The subject's one map: the first column of the list that any visit has, of the earliest visit that has it.
        reference = next((m for name in chosen for s in sessions if (m := _map_of(s, [name], chosen))), None)
        for session in sessions:
            own = _map_of(session, list(chosen), chosen)
            shared = reference if reference and reference.session.frame == session.frame else own
            if shared is not None:
                maps[session.key] = shared
    if chosen:
        columns = ", ".join(f"{name} ({scheme})" for name, scheme in chosen.items())
        notes.append(f"label maps for {len(maps)} of {len(store.sessions)} sessions as {level}: {columns}")
    words = {"groups": schemes.GROUPS, "tissues": schemes.TISSUES, "regions": regions.TARGETS}
    renders = {s: regions.renders_of(s) for s in found} if level == "regions" else {}
    return {"groups": words[level] if maps else (), "tables": tables, "renders": renders, "maps": maps}


def _map_of(session: SessionEntry, names: Iterable[str], chosen: Mapping[str, str]) -> LabelMap | None:
    there = {label.name for label in session.labels}
    return next((LabelMap(session, name, chosen[name]) for name in names if name in there), None)


def _tells_groups(scheme: str) -> bool:
    try:
        schemes.lookup(scheme, "groups")
    except ManifestError:
        return False
    return True


def _scheme(store: Store, name: str) -> str:
    """The scheme of a label column, from all ids of some of its maps."""
    having = [s for s in store.sessions if any(label.name == name for label in s.labels)]
    places = np.unique(np.linspace(0, len(having) - 1, min(_LOOKED_AT, len(having))).round().astype(int))
    ids: set[int] = {0}
    for place in places:
        ids |= set(np.unique(store.volume(having[place], name)).tolist())
    return schemes.guess_scheme(ids, where=f"column {name} of {store.path}")


def _find_volumes(store: Store, spec: TargetSpec, trained: Collection[str], notes: list[str]) -> dict[str, Any]:
    if spec.volumes is None:
        return {"regions": (), "volumes": {}}
    table = volumes.read_volumes(Path(spec.volumes))
    notes += table.problems
    subjects = sorted({s.subject_key for s in store.sessions})
    matched, missing = volumes.match(table, subjects)
    if not matched:
        raise ManifestError(
            f"{spec.volumes}: none of its {len(table.rows)} rows belongs to a subject of {store.path}, "
            f"expected ids like {subjects[0]}"
        )
    keys = sorted(matched)
    values, regions = volumes.log_fractions(table, [matched[key] for key in keys])
    basis = [place for place, key in enumerate(keys) if key in set(trained)]
    if not basis:
        raise ManifestError(f"{spec.volumes}: none of its rows belongs to a subject that is trained on")
    scores, _, _ = volumes.standardise(values, basis)
    notes.append(
        f"volumes of {len(regions)} regions ({table.kind}) for {len(keys)} subjects"
        + (f"; none for {len(missing)}, first {missing[0]}" if missing else "")
    )
    return {"regions": tuple(regions), "volumes": dict(zip(keys, scores.astype(np.float32)))}


def _measure_volumes(store: Store, maps: Mapping[Key, LabelMap], trained: Collection[str]) -> dict[str, Any]:
    """z-scored log shares of the groups of schemes.GROUPS in the brain, measured in the label maps at about 2 mm."""
    shares: dict[str, np.ndarray] = {}
    names = schemes.GROUPS[1:]
    for session in sorted(store.sessions, key=lambda s: s.key):
        chosen = maps.get(session.key)
        if chosen is None or session.subject_key in shares or not _tells_groups(chosen.scheme):
            continue
        level = min(store.levels(chosen.session), max(0, round(math.log2(2 / store.spec.spacing_mm[0]))))
        ids = store.block(chosen.session, chosen.name, (0, 0, 0), store.shape(chosen.session, level), level=level)
        table = schemes.lookup(chosen.scheme, "groups", unknown="ignore")
        group = np.where(ids < len(table), np.take(table, ids, mode="clip"), schemes.IGNORE)
        counts = np.bincount(group[group > 0].ravel(), minlength=len(names) + 1)[1:] + 0.5
        shares[session.subject_key] = np.log(counts / counts.sum())
    basis = [key for key in sorted(shares) if key in set(trained)]
    if len(basis) < 2:
        return {"regions": (), "volumes": {}}
    values = np.stack([shares[key] for key in basis])
    mean, std = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-3)
    return {
        "regions": names,
        "volumes": {key: ((share - mean) / std).astype(np.float32) for key, share in shares.items()},
    }


def _find_health(store: Store, spec: TargetSpec, notes: list[str]) -> dict[str, Any]:
    columns = (spec.health,) if spec.health else _HEALTH_COLUMNS
    if spec.health and not any(spec.health in s.columns for s in store.sessions):
        raise ManifestError(f"{store.path}: no column {spec.health!r} tells health (data.targets.health)")
    health = {}
    for session in store.sessions:
        column = next((name for name in columns if name in session.columns), None)
        if column is not None and (value := ill(column, session.columns[column])) is not None:
            health[session.key] = value
    if health:
        count = int(sum(health.values()))
        notes.append(f"health known for {len(health)} of {len(store.sessions)} sessions, {count} of them ill")
    return {"health": health}


def ill(column: str, text: str) -> float | None:
    """1 for ill, 0 for healthy, None where the text does not tell.

    A column called ``healthy`` holds yes and no in some form; any other names a state: everything but a word for health
    (``healthy``, ``control``, ...) or for not knowing is taken for a disease, as OpenMind's ``health_status`` means it.
    """
    word = text.strip().lower()
    if word in _NO_WORDS:
        return None
    if column == "healthy":
        return {"1": 0.0, "1.0": 0.0, "true": 0.0, "yes": 0.0, "0": 1.0, "0.0": 1.0, "false": 1.0, "no": 1.0}.get(word)
    return 0.0 if word in _HEALTHY_WORDS else 1.0


def _find_lesions(store: Store, spec: TargetSpec, notes: list[str]) -> dict[str, Any]:
    there = sorted({label.name for s in store.sessions for label in s.labels if label.name.endswith("_mask")})
    names = [n for n in there if LESION_NAME.search(n.lower())] if spec.lesions is None else list(spec.lesions)
    missing = [name for name in names if name not in there]
    if missing:
        raise ManifestError(f"{store.path}: no mask column {missing[0]!r}, found {', '.join(there) or 'none'}")
    masks = {}
    for session in store.sessions:
        own = tuple(label.name for label in session.labels if label.name in names)
        if own:
            masks[session.key] = own
    if names:
        notes.append(f"pathology is masked in {len(masks)} sessions by {', '.join(names)}")
    if set(there) - set(names):
        notes.append(f"not taken for pathology: {', '.join(sorted(set(there) - set(names)))}")
    if not spec.synthesise:
        return {"lesions": masks}
    spacing = store.spec.spacing_mm
    folder = spec.lesion_shapes
    made = load_shapes(Path(folder), spacing) if folder else procedural_shapes(0, _SHAPES, spacing)
    notes.append(
        f"lesions are put into {spec.synthesise:g} of the patches without known disease, {len(made)} shapes, "
        + (f"from {folder}" if folder else "procedural")
    )
    return {"lesions": masks, "synthesise": spec.synthesise, "shapes": made}


def _by_subject(sessions: Iterable[SessionEntry]) -> dict[str, list[SessionEntry]]:
    found: dict[str, list[SessionEntry]] = {}
    for session in sorted(sessions, key=lambda s: s.key):
        found.setdefault(session.subject_key, []).append(session)
    return found


def interval_years(one: SessionEntry, other: SessionEntry) -> float:
    """From one visit to the other, by ``days_from_baseline`` or else ``age``; 0 in one visit, NaN where unknown."""
    if one.key == other.key:
        return 0.0
    for column, per_year in (("days_from_baseline", 365.25), ("age", 1.0)):
        values = [number(s.columns.get(column, "")) for s in (one, other)]
        if not any(math.isnan(v) for v in values):
            return (values[1] - values[0]) / per_year
    return math.nan


def number(text: str) -> float:
    """A cell as a number, NaN where it is none."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
