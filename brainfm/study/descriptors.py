"""Sessions of a store as rows of named numbers, by group: what baselines learn from and what the shortcut audit asks.

Groups: ``content`` (intensities inside the head and region volumes), ``mask`` (its outline), ``background`` (the air
around it), ``position`` (its place in the file), ``grid`` (voxel size and shape of the file).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from brainfm.data.store import SessionEntry, Store
from brainfm.imaging import descriptors

_MOST = 1024  # descriptions that a process remembers, some 0.1 MB each
GROUPS = ("content", "mask", "background", "position", "grid")


@dataclass(frozen=True)
class Described:
    """One session.

    Attributes:
        numbers: group -> name -> number; names begin with the contrast where they are about one. A contrast that the
            session lacks has no names.
        contrasts: that are there, sorted, joined by ``+``.
    """

    numbers: dict[str, dict[str, float]]
    contrasts: str


_remembered: OrderedDict[tuple, Described] = OrderedDict()


def describe(
    store: Store,
    session: SessionEntry,
    contrasts: Sequence[str],
    scans: Sequence[Sequence[str]],
    regions: Sequence[str] = (),
) -> Described:
    """Reads a session in full and describes it; the last thousand are remembered, since every repeat of a
    cross-validation, its baselines and the audit ask for the same.

    Args:
        contrasts: those of the task.
        scans: for each the names of the scans that show it; the first is looked at, none where it is missing.
        regions: names of label volumes whose structures' volumes are content: anatomy that a user has for every new
            case as well, never the annotation that is asked for.

    Raises:
        ScanError: where no scan shows a head.
        StoreError: where a file is missing or damaged.
    """
    names = {contrast: found[0] for contrast, found in zip(contrasts, scans, strict=True) if found}
    mark = (store.fingerprint(), session.key, tuple(sorted(names.items())))
    if mark not in _remembered:
        _remembered[mark] = _describe(store, session, names)
        if len(_remembered) > _MOST:
            _remembered.popitem(last=False)
    plain = _remembered[mark]
    content = dict(plain.numbers["content"])
    ml = float(np.prod(store.spec.spacing_mm)) / 1000
    for region in sorted(set(regions) & {label.name for label in session.labels}):
        structures, counts = np.unique(store.volume(session, region), return_counts=True)
        content |= {f"{region}/{v}_ml": float(n) * ml for v, n in zip(structures, counts) if v}
    return Described(plain.numbers | {"content": content}, plain.contrasts)


def _describe(store: Store, session: SessionEntry, names: Mapping[str, str]) -> Described:
    voxels = {contrast: store.volume(session, name).astype(np.float32) for contrast, name in names.items()}
    head = descriptors.head_mask(voxels)
    spacing = store.spec.spacing_mm
    numbers: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
    numbers["mask"] = descriptors.shape_descriptors(head, spacing)
    numbers["content"] |= descriptors.content_descriptors(voxels, head, spacing)
    for contrast, name in names.items():
        recipe = store.recipe(session, name)
        found = {
            "background": descriptors.background_descriptors(voxels[contrast], head),
            "position": descriptors.position_descriptors(recipe, head),
            "grid": descriptors.grid_descriptors(recipe.file),
        }
        for group, values in found.items():
            numbers[group] |= {f"{contrast}/{k}": v for k, v in values.items()}
    return Described(numbers, "+".join(sorted(names)))


def describe_all(
    store: Store,
    sessions: Sequence[SessionEntry],
    contrasts: Sequence[str],
    scans: Sequence[Sequence[Sequence[str]]],
    regions: Sequence[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Described]:
    """``describe`` of each; progress is told after each."""
    rows = []
    for session, names in zip(sessions, scans, strict=True):
        rows.append(describe(store, session, contrasts, names, regions))
        progress(len(rows), len(sessions))
    return rows


def table(rows: Sequence[dict[str, float]]) -> tuple[np.ndarray, list[str]]:
    """Named numbers as a matrix, columns that never vary left out.

    A missing number becomes the mean of those that are there, and a column ``<prefix>/missing`` (one for each prefix
    before the last slash, and only where something is missing) says so with 1. No label is looked at.

    Returns:
        [N, F] float64 and the F names.
    """
    names = sorted({name for row in rows for name in row})
    values = np.array([[row.get(name, np.nan) for name in names] for row in rows], np.float64).reshape(len(rows), -1)
    gaps = ~np.isfinite(values)
    means = np.divide(
        np.where(gaps, 0, values).sum(axis=0), (~gaps).sum(axis=0), out=np.zeros(len(names)), where=~gaps.all(axis=0)
    )
    filled = np.where(gaps, means, values)
    columns: list[np.ndarray] = []
    kept: list[str] = []
    for f, name in enumerate(names):
        if np.ptp(filled[:, f]) > 1e-9 * max(1.0, abs(means[f])):
            columns.append(filled[:, f])
            kept.append(name)
    for prefix in sorted({name.rpartition("/")[0] for name in names}):
        missing = gaps[:, [f for f, name in enumerate(names) if name.rpartition("/")[0] == prefix]].all(axis=1)
        if missing.any() and not missing.all():
            columns.append(np.asarray(missing, np.float64))
            kept.append(f"{prefix}/missing")
    return (np.stack(columns, axis=1) if columns else np.zeros((len(rows), 0))), kept
