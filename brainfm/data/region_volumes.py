"""Region volumes: how large the parts of a brain are, as numbers that an answer can be linear in.

The parts are those that every parcellation tells alike (data/schemes.py): tissues, and groups where the scheme has
them. A label map says the same numbers of a prepared scan wherever it is measured, in a store or of new files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.data import schemes, volumes
from brainfm.data.store import Key, SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError, ScanError

AUTO, NONE = "auto", "none"
TOTAL = "total"
_LEAST_ML = 0.1  # of a part in a logarithm; a part that is not there would be minus infinity
_LOOKED_AT = 12  # label maps whose ids settle the scheme of a column


@dataclass(frozen=True)
class RegionVolumes:
    """Log volumes of the sessions of a store.

    Attributes:
        source: the label column, or the table, that they come from.
        scheme: of the label map (a key of schemes.SCHEMES); empty of a table.
        names: of the F numbers: ``tissue/grey``, ``group/ventricles``, a region of a table, and last ``total``.
        values: [F] float64 by session: log of each part's share of the total, and log of the total in ml.
    """

    source: str
    scheme: str
    names: tuple[str, ...]
    values: Mapping[Key, np.ndarray]

    @property
    def of_labels(self) -> bool:
        """Whether a label map of a new scan says the same; a table has no row of it."""
        return bool(self.scheme)


def find_volumes(
    store: Store, sessions: Sequence[SessionEntry], target: str, asked: str = AUTO
) -> tuple[RegionVolumes | None, list[str]]:
    """Region volumes of all of these sessions, and sentences for the log: what was taken, dropped, or lacking.

    Args:
        target: of the task; its own label is never looked at.
        asked: a label column, with or without ``_labels``; a table (see volumes.read_volumes); ``auto``: the first
            label column that every session has and a scheme knows; or ``none``.

    Raises:
        ManifestError: a column or table that is named, and cannot be used for every session.
    """
    if asked == NONE:
        return None, []
    there = sorted({label.name for session in sessions for label in session.labels if label.name.endswith("_labels")})
    named = next((name for name in (asked, f"{asked}_labels") if name in there), None)
    if asked != AUTO and named is None:
        if not Path(asked).exists():
            raise ManifestError(
                f"task.volumes={asked}: expected auto, none, a table, or a label column of {store.path}: "
                f"{', '.join(there) or 'it has none'}"
            )
        return _of_table(Path(asked), sessions)
    notes = []
    for name in [named] if named else [name for name in there if name != f"{target}_labels"]:
        lacking = [s for s in sessions if name not in {label.name for label in s.labels}]
        fault = f"{len(lacking)} of {len(sessions)} sessions have no {name}" if lacking else ""
        if not fault:
            try:
                return _of_labels(store, sessions, name)
            except ManifestError as error:
                fault = str(error)
        if named:
            raise ManifestError(f"task.volumes={asked}: {fault}, expected volumes of every session")
        notes.append(f"no volumes are taken from {name}: {fault}")
    return None, notes


def log_volumes(
    labels: np.ndarray, spacing_mm: Sequence[float], scheme: str, names: Sequence[str], where: str = "the label map"
) -> np.ndarray:
    """[F] float64: of each name the log of its share of the total, of ``total`` the log of its ml.

    Args:
        labels: [X, Y, Z] ids of the scheme.
        where: the file, for the sentence.

    Raises:
        ScanError: where no id is of the brain.
    """
    found = _volumes_ml(labels, spacing_mm, scheme)
    if not found[TOTAL] > 0:
        raise ScanError(f"{where} shows no part of a brain as the scheme {scheme} numbers it")
    return np.array([_logarithm(found, name) for name in names])


def voxel_effects(
    labels: np.ndarray, spacing_mm: Sequence[float], scheme: str, names: Sequence[str], gradient: np.ndarray
) -> np.ndarray:
    """[X, Y, Z] float32: by how much each voxel, counted to its part, raises an answer, to first order.

    Args:
        gradient: [F] of the answer over `log_volumes`.
    """
    ml = float(np.prod(spacing_mm)) / 1000
    volumes_ml = _volumes_ml(labels, spacing_mm, scheme)
    parts = part_of(names, scheme)
    effect = np.zeros(len(parts[0]))
    for name, inside, slope in zip(names, parts, gradient):
        if name == TOTAL:
            effect += inside * slope / max(volumes_ml[TOTAL], ml)
        elif volumes_ml[name] > _LEAST_ML:
            total = part_of([TOTAL], scheme)[0]
            effect += slope * (inside / volumes_ml[name] - total / max(volumes_ml[TOTAL], ml))
    known = (labels >= 0) & (labels < len(effect))
    return np.where(known, effect[np.where(known, labels, 0).astype(np.int64)] * ml, 0).astype(np.float32)


def part_of(names: Sequence[str], scheme: str) -> list[np.ndarray]:
    """For each name a table [largest id + 1] bool: the ids that belong to it."""
    tables = _tables(scheme)
    total = np.any([table > 0 for table in tables.values()], axis=0)
    return [
        total if name == TOTAL else tables[name.split("/")[0]] == _words(name).index(name.split("/")[1])
        for name in names
    ]


def _of_labels(store: Store, sessions: Sequence[SessionEntry], column: str) -> tuple[RegionVolumes, list[str]]:
    scheme = _scheme(store, sessions, column)
    found = {s.key: _volumes_ml(store.volume(s, column), store.spec.spacing_mm, scheme) for s in sessions}
    empty = [key for key, ml in found.items() if not ml[TOTAL] > 0]
    if empty:
        raise ManifestError(f"{column} of {'/'.join(empty[0])} shows no part of a brain as {scheme} numbers it")
    absent = [name for name in next(iter(found.values())) if any(not ml[name] > 0 for ml in found.values())]
    names = tuple(name for name in next(iter(found.values())) if name not in absent)
    values = {key: np.array([_logarithm(ml, name) for name in names]) for key, ml in found.items()}
    notes = [f"volumes of {', '.join(names)} from {column} ({scheme})"]
    if absent:
        notes.append(f"left out of them, for some sessions have none: {', '.join(absent)}")
    return RegionVolumes(column, scheme, names, values), notes


def _of_table(path: Path, sessions: Sequence[SessionEntry]) -> tuple[RegionVolumes, list[str]]:
    table = volumes.read_volumes(path)
    keys = {s.key: "/".join(part for part in s.key if part) for s in sessions}
    rows, missing = volumes.match(table, keys.values())
    if missing:
        raise ManifestError(f"task.volumes={path}: {missing[0]}, expected one for every session")
    shares, regions = volumes.log_fractions(table, [rows[name] for name in keys.values()])
    whole = np.isfinite(shares).all(axis=0)
    names = (*(region for region, kept in zip(regions, whole) if kept), TOTAL)
    values = {
        key: np.append(share[whole].astype(np.float64), np.log(table.icv_ml[rows[name]]))
        for (key, name), share in zip(keys.items(), shares)
    }
    notes = [*table.problems, f"volumes of {len(names) - 1} regions from {path} ({table.kind})"]
    return RegionVolumes(str(path), "", names, values), notes


def _scheme(store: Store, sessions: Sequence[SessionEntry], column: str) -> str:
    """From all ids of some of the maps."""
    places = np.unique(np.linspace(0, len(sessions) - 1, min(_LOOKED_AT, len(sessions))).round().astype(int))
    ids: set[int] = {0}
    for place in places:
        ids |= set(np.unique(store.volume(sessions[place], column)).tolist())
    return schemes.guess_scheme(ids, where=f"column {column} of {store.path}")


def _tables(scheme: str) -> dict[str, np.ndarray]:
    """``tissue`` and, where the scheme tells them, ``group``: id -> place among the words."""
    if scheme not in schemes.SCHEMES:
        raise ConfigError(f"volumes of the scheme {scheme!r}: expected one of {', '.join(schemes.SCHEMES)}")
    tables = {"tissue": schemes.lookup(scheme, "tissues", unknown="ignore")}
    with suppress(ManifestError):  # a tissue map tells no groups
        tables["group"] = schemes.lookup(scheme, "groups", unknown="ignore")
    return tables


def _words(name: str) -> tuple[str, ...]:
    return schemes.TISSUES if name.startswith("tissue/") else schemes.GROUPS


def _volumes_ml(labels: np.ndarray, spacing_mm: Sequence[float], scheme: str) -> dict[str, float]:
    tables = _tables(scheme)
    size = len(next(iter(tables.values())))
    ids = np.asarray(labels).ravel().astype(np.int64)
    counts = np.bincount(ids[(ids >= 0) & (ids < size)], minlength=size) * float(np.prod(spacing_mm)) / 1000
    names = [f"{level}/{word}" for level in tables for word in _words(f"{level}/")[1:]] + [TOTAL]
    return {name: float(counts[inside].sum()) for name, inside in zip(names, part_of(names, scheme))}


def _logarithm(ml: Mapping[str, float], name: str) -> float:
    return float(np.log(ml[TOTAL]) if name == TOTAL else np.log(max(ml[name], _LEAST_ML) / ml[TOTAL]))
