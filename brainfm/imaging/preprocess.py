"""Preprocessing: from the files of one session to arrays on one grid, and back.

The store and prediction prepare scans with this very function, so a network sees in use what it saw in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from brainfm import seeds
from brainfm.errors import ScanError
from brainfm.imaging import geometry, intensity, nifti, register
from brainfm.imaging.geometry import Shape
from brainfm.imaging.intensity import Stats
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.register import Alignment, Head
from brainfm.specs import PreprocessSpec
from brainfm.volume import Volume, spacing_of

FOREGROUND_POINTS = 4096
_CANDIDATES = 1 << 14  # voxels that are looked at first to find them
_KEPT_BYTES = 512 << 20  # scans of a session up to this size are held between the two passes, larger ones read twice
_LARGEST_VOXELS = 512**3
_BETWEEN_VISITS_MM = 150.0  # a table moves further between two visits than a patient on it


@dataclass(frozen=True)
class Recipe:
    """What was done to one file's grid and values, so that it can be undone.

    Attributes:
        spec: fingerprint of the PreprocessSpec.
        file: the file's own grid.
        session_shape, session_affine_mm: the common grid before the crop.
        box_start, box_stop: the crop, in voxels of the session grid.
        shape, affine_mm: of the prepared array.
        stats: how intensities were standardised; None for a label map.
        moved_mm: [4, 4], where registration moved the file's points, in scanner coordinates; None: nowhere.
    """

    spec: str
    file: FileGrid
    session_shape: Shape
    session_affine_mm: tuple[tuple[float, ...], ...]
    box_start: Shape
    box_stop: Shape
    shape: Shape
    affine_mm: tuple[tuple[float, ...], ...]
    stats: Stats | None
    moved_mm: tuple[tuple[float, ...], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "file": self.file.to_dict(),
            "session_shape": list(self.session_shape),
            "session_affine_mm": [list(row) for row in self.session_affine_mm],
            "box_start": list(self.box_start),
            "box_stop": list(self.box_stop),
            "shape": list(self.shape),
            "affine_mm": [list(row) for row in self.affine_mm],
            "stats": None if self.stats is None else self.stats.to_dict(),
            "moved_mm": None if self.moved_mm is None else [list(row) for row in self.moved_mm],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(
            spec=str(values["spec"]),
            file=FileGrid.from_dict(values["file"]),
            session_shape=_triple(values["session_shape"]),
            session_affine_mm=_rows(values["session_affine_mm"]),
            box_start=_triple(values["box_start"]),
            box_stop=_triple(values["box_stop"]),
            shape=_triple(values["shape"]),
            affine_mm=_rows(values["affine_mm"]),
            stats=None if values["stats"] is None else Stats.from_dict(values["stats"]),
            moved_mm=None if values.get("moved_mm") is None else _rows(values["moved_mm"]),
        )


@dataclass(frozen=True)
class Prepared:
    """The scans and label maps of one session on one grid.

    Attributes:
        scans: float32 [X, Y, Z] by name, standardised; outside a scan's field of view its lowest value.
        labels: uint8 or uint16 [X, Y, Z] by name.
        recipes: for every scan and label map.
        failures: what was left out, by name, and why.
        affine_mm: [4, 4] of all arrays.
        foreground: int16 [N, 3], up to 4096 voxels drawn evenly from the union of the scans' foregrounds.
        offset_vox: where the arrays begin on the lattice of their frame, a common space of several sessions or the
            session's own.
        reference: name of the scan whose directions were kept.
        frame: the name of that space; empty for the session's own.
        alignments: what registration found, by scan name: to the reference, or of the reference to the anchor.
    """

    scans: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    recipes: dict[str, Recipe]
    failures: dict[str, str]
    affine_mm: np.ndarray
    foreground: np.ndarray
    offset_vox: Shape
    reference: str
    frame: str = ""
    alignments: dict[str, Alignment] = field(default_factory=dict)


@dataclass(frozen=True)
class Anchor:
    """The space that all visits of a subject share.

    Attributes:
        frame: its name.
        path: the reference scan of the subject's first visit.
    """

    frame: str
    path: Path


@dataclass(frozen=True)
class _Source:
    """One scan after the first pass.

    Attributes:
        affine_mm: [4, 4], of the file or, after registration, moved.
        voxels: None where the file must be read again.
        head: None where there is nothing to register.
        moved_mm: [4, 4]; None: not moved.
    """

    path: Path
    grid: FileGrid
    affine_mm: np.ndarray
    voxels: np.ndarray | None
    mask: np.ndarray
    stats: Stats
    head: Head | None = None
    moved_mm: np.ndarray | None = None

    @property
    def shape(self) -> Shape:
        return self.grid.ras_shape()

    def moved(self, matrix_mm: np.ndarray) -> _Source:
        """Where the scan lies after a motion; without one it stays exactly where it was."""
        if (matrix_mm == np.eye(4)).all():
            return replace(self, head=None)
        return replace(self, head=None, affine_mm=matrix_mm @ self.affine_mm, moved_mm=matrix_mm)


@dataclass(frozen=True)
class _Target:
    """The common grid and the crop."""

    spec: str
    session_shape: Shape
    session_affine_mm: np.ndarray
    session_offset: Shape  # of the session grid on the lattice of its frame
    start: Shape
    stop: Shape

    @property
    def offset(self) -> Shape:
        return _triple(a + b for a, b in zip(self.session_offset, self.start, strict=True))

    @property
    def shape(self) -> Shape:
        return _triple(b - a for a, b in zip(self.start, self.stop, strict=True))

    @property
    def affine_mm(self) -> np.ndarray:
        return geometry.cropped_affine(self.session_affine_mm, self.start)

    def recipe(self, file: FileGrid, stats: Stats | None, moved_mm: np.ndarray | None) -> Recipe:
        return Recipe(
            self.spec,
            file,
            self.session_shape,
            _rows(self.session_affine_mm),
            self.start,
            self.stop,
            self.shape,
            _rows(self.affine_mm),
            stats,
            None if moved_mm is None else _rows(moved_mm),
        )


# ---- there -----------------------------------------------------------------------------------------------------------


def prepare_session(
    scans: Mapping[str, Path],
    labels: Mapping[str, Path],
    spec: PreprocessSpec,
    *,
    reference: str | None = None,
    anchor: Anchor | None = None,
) -> Prepared:
    """Bring the scans and label maps of one visit onto one grid.

    The grid has the directions of the reference and the spacing of the spec; it is cropped to the union of the
    foregrounds. Intensities are measured on each scan's own voxels and standardised after resampling. With
    ``align=rigid`` every scan is moved onto the reference, and with an anchor all of them onto it and its grid; where
    registration is refused the header's position stays. Each scan is resampled once, from its own voxels. A label map
    goes with the scan on whose grid it lies (FileGrid.same_place), of several with the reference, else the first by
    name.

    Args:
        scans: file by scan name (``t1``, ``flair``, ``t1_2``); at least one.
        labels: file by name; a name that ends in ``_mask`` becomes 0 and 1, any other keeps its values.
        reference: name of the scan whose directions are kept; by default the one with the thinnest slices, then t1.
        anchor: for ``align=rigid``, the first visit of the subject where this is a later one.

    Returns:
        What could be prepared, with the reasons for what could not.

    Raises:
        ScanError: no scan could be prepared, or the common grid would be absurdly large.
        ConfigError: ``align=rigid`` without SimpleITK.
    """
    failures: dict[str, str] = {}
    sources: dict[str, _Source] = {}
    keep = _fits_in_memory(scans)
    for name, path in scans.items():
        try:
            sources[name] = _measure(Path(path), spec, keep)
        except ScanError as error:
            failures[name] = str(error)
    if not sources:
        first = next(iter(failures.values()), "no scan was given")
        raise ScanError(f"no scan of the session can be used: {first}")
    chosen = reference if reference in sources else _default_reference(sources)
    lattice = geometry.lattice(sources[chosen].affine_mm, spec.spacing_mm)
    frame, alignments = "", {}
    if spec.align == "rigid":
        alignments = _align_session(sources, chosen)
        if anchor is not None:
            fixed = nifti.read(anchor.path, compact=True)[0]
            alignments[chosen] = _align_visit(sources, chosen, fixed)
            if alignments[chosen].trusted:
                frame, lattice = anchor.frame, geometry.lattice(fixed.affine_mm, spec.spacing_mm)
    _leave_out_distant(sources, chosen, alignments, failures)
    target = _settle_target(sources, chosen, lattice, spec)
    recipes = {name: target.recipe(source.grid, source.stats, source.moved_mm) for name, source in sources.items()}
    foreground = _foreground_points(sources, target)
    arrays = {}
    for name in list(sources):
        arrays[name] = _prepare_scan(sources.pop(name), target)
    maps = {}
    owners = {name: recipes[name] for name in [chosen, *sorted(set(arrays) - {chosen})]}
    for name, path in labels.items():
        try:
            maps[name], recipes[name] = _prepare_label(name, Path(path), target, spec, owners)
        except ScanError as error:
            failures[name] = str(error)
    return Prepared(
        arrays, maps, recipes, failures, target.affine_mm, foreground, target.offset, chosen, frame, alignments
    )


def _fits_in_memory(scans: Mapping[str, Path]) -> bool:
    total = 0
    for path in scans.values():
        try:
            total += 4 * int(np.prod(nifti.read_header(Path(path)).grid.shape_vox))
        except ScanError:
            continue  # it is refused, with its reason, when it is read
    return total <= _KEPT_BYTES


def _measure(path: Path, spec: PreprocessSpec, keep: bool) -> _Source:
    volume, grid = nifti.read(path, compact=True)
    try:
        mask = intensity.foreground(volume)
        stats = intensity.statistics(volume.voxels, mask, spec.clip_percentiles)
    except ScanError as error:
        raise ScanError(f"{path}: {error}") from None
    head = Head.of(volume, mask, stats) if spec.align == "rigid" else None
    return _Source(path, grid, volume.affine_mm, volume.voxels if keep else None, mask, stats, head)


def _default_reference(sources: Mapping[str, _Source]) -> str:
    def rank(name: str) -> tuple[float, bool, str]:
        return round(max(spacing_of(sources[name].affine_mm)), 2), name != "t1", name

    return min(sources, key=rank)


def _align_session(sources: dict[str, _Source], reference: str) -> dict[str, Alignment]:
    """Moves every scan onto the reference."""
    fixed = sources[reference].head
    assert fixed is not None
    found = {}
    for name in sorted(set(sources) - {reference}):
        head = sources[name].head
        assert head is not None
        found[name] = register.rigid(fixed, head)
        sources[name] = sources[name].moved(np.array(found[name].matrix_mm))
    return found


def _align_visit(sources: dict[str, _Source], reference: str, anchor: Volume) -> Alignment:
    """Moves all scans of a visit together, by where its reference belongs on the anchor."""
    head = sources[reference].head
    assert head is not None
    found = register.rigid(Head.of(anchor), head, _BETWEEN_VISITS_MM)
    between = np.array(found.matrix_mm)
    for name, source in sources.items():
        sources[name] = source.moved(between if source.moved_mm is None else between @ source.moved_mm)
    return found


def _leave_out_distant(
    sources: dict[str, _Source], reference: str, alignments: Mapping[str, Alignment], failures: dict[str, str]
) -> None:
    """Drop scans that share no space with the reference: their headers cannot be trusted."""
    anchor = sources[reference]
    for name in [n for n in sources if n != reference]:
        source = sources[name]
        low, high = geometry.box_between(np.zeros(3), np.array(source.shape), source.affine_mm, anchor.affine_mm)
        if (high < -0.5).any() or (low > np.array(anchor.shape) - 0.5).any():
            tried = f"; registration was refused: {alignments[name].refused}" if name in alignments else ""
            place = f"{anchor.path}, the reference scan of its session"
            failures[name] = f"{source.path}: lies wholly outside {place}{tried}"
            del sources[name]


def _settle_target(
    sources: Mapping[str, _Source], reference: str, lattice: np.ndarray, spec: PreprocessSpec
) -> _Target:
    shape, affine, offset = geometry.session_grid(sources, lattice)
    boxes = [geometry.extent_between(source.mask, source.affine_mm, affine) for source in sources.values()]
    margin = spec.margin_mm / np.array(spec.spacing_mm)
    low = np.min([box[0] for box in boxes], axis=0) - margin
    high = np.max([box[1] for box in boxes], axis=0) + margin
    first = _triple(np.clip(np.floor(low + 0.5 + geometry.SAME_VOX), 0, np.array(shape) - 1))
    last = _triple(np.clip(np.ceil(high + 0.5 - geometry.SAME_VOX), np.array(first) + 1, shape))
    target = _Target(spec.fingerprint(), shape, affine, offset, first, last)
    if np.prod(target.shape, dtype=np.int64) > _LARGEST_VOXELS:
        text = " x ".join(str(size) for size in target.shape)
        raise ScanError(
            f"{sources[reference].path}: its session needs a grid of {text} voxels, expected {_LARGEST_VOXELS} at most"
        )
    return target


def _prepare_scan(source: _Source, target: _Target) -> np.ndarray:
    voxels = source.voxels
    if voxels is None:
        voxels = nifti.read(source.path, compact=True)[0].voxels
    bright = intensity.background_above(voxels, source.stats.high)
    if bright is not None:
        voxels = np.where(voxels == bright, source.stats.low, voxels.astype(np.float32))
    array = geometry.resample(
        voxels, source.affine_mm, target.shape, target.affine_mm, order="cubic", fill=source.stats.low
    )
    prepared = intensity.apply(array, source.stats)
    if not np.isfinite(prepared).all():
        raise ScanError(f"{source.path}: numbers that cannot be standardised, expected an image")
    return prepared


def _prepare_label(
    name: str, path: Path, target: _Target, spec: PreprocessSpec, owners: Mapping[str, Recipe]
) -> tuple[np.ndarray, Recipe]:
    volume, grid = nifti.read(path, labels=True)
    owner = next((recipe for recipe in owners.values() if grid.same_place(recipe.file)), None)
    if owner is None and not grid.placed:
        raise ScanError(f"{path}: says nothing of its place (neither sform nor qform), expected that of its scan")
    if owner is None:
        raise ScanError(f"{path}: lies on another grid than every scan of its session")
    values = volume.voxels
    if name.endswith("_mask"):
        values = (values != 0).astype(np.uint8, order="K")
    elif values.max() > 65535:
        raise ScanError(f"{path}: labels from {values.min()} to {values.max()}, expected 0 to 65535")
    else:
        values = values.astype(np.uint8 if values.max() < 256 else np.uint16, order="K")
    how: Any = spec.labels
    # On the scan's grid, from which the file's own may be off by what rounding makes of a header.
    array = geometry.resample_labels(values, _place(owner), target.shape, target.affine_mm, how=how)
    return array, replace(owner, file=grid, stats=None)


def _foreground_points(sources: Mapping[str, _Source], target: _Target) -> np.ndarray:
    """int16 [N, 3]; the draw depends on the spec, the names and the box alone."""
    total = int(np.prod(target.shape))
    rng = seeds.stream(0, f"foreground {target.spec} {' '.join(sorted(sources))}")
    found = _in_any_mask(rng.choice(total, size=min(total, _CANDIDATES), replace=False), sources, target)
    if len(found) < FOREGROUND_POINTS and total > _CANDIDATES:  # a small patient in a large box: look everywhere
        found = _in_any_mask(rng.permutation(total), sources, target)
    return found[:FOREGROUND_POINTS].astype(np.int16)


def _in_any_mask(flat: np.ndarray, sources: Mapping[str, _Source], target: _Target) -> np.ndarray:
    """Those of the flat indices that lie in some scan's foreground, as [N, 3]."""
    points = np.stack(np.unravel_index(flat, target.shape), axis=1)
    hit = np.zeros(len(points), dtype=bool)
    for source in sources.values():
        transform = np.linalg.inv(source.affine_mm) @ target.affine_mm
        index = np.floor(points @ transform[:3, :3].T + transform[:3, 3] + 0.5).astype(np.int64)
        inside = ((index >= 0) & (index < np.array(source.shape))).all(axis=1)
        hit[inside] |= source.mask[tuple(index[inside].T)]
    return points[hit]


# ---- and back --------------------------------------------------------------------------------------------------------


def restore_probabilities(probabilities: np.ndarray, recipe: Recipe, *, shares: bool = False) -> np.ndarray:
    """Class probabilities on the prepared grid to a label map on the file's own grid.

    Each class is interpolated apart and the largest wins, the lower one in a tie, so that outlines stay smooth where
    the file is finer than the network's grid. Outside the crop the answer is class 0.

    Args:
        probabilities: [K, X, Y, Z] real, on the grid of `recipe`; logits serve as well.
        recipe: of the scan on whose file's grid the answer is wanted.
        shares: whether they are 0 or more and sum to 1 over K. Then one of them is at least 1 / K, and a class is
            looked at only around the voxels where it has half of that: the same answer, much sooner for many classes.

    Returns:
        uint8 (uint16 from 257 classes on) class indices, in the file's own shape and axis order.
    """
    _check_shape(probabilities.shape[1:], recipe)
    file_shape, file_affine = recipe.file.ras_shape(), _place(recipe)
    source_affine = np.array(recipe.affine_mm)
    dtype = np.uint8 if len(probabilities) <= 256 else np.uint16
    winner = np.zeros(file_shape, dtype=dtype)
    best = np.full(file_shape, -np.inf, dtype=np.float32)
    for index, share in enumerate(probabilities):
        box: tuple[slice, ...] | None = tuple(slice(0, size) for size in file_shape)
        if shares and index > 0:
            box = _reach_of(share >= 0.5 / len(probabilities), source_affine, file_shape, file_affine)
        if box is None:
            continue
        moved = geometry.resample(
            np.asarray(share, dtype=np.float32),
            source_affine,
            _triple(side.stop - side.start for side in box),
            geometry.cropped_affine(file_affine, _triple(side.start for side in box)),
            order="linear",
            fill=np.inf if index == 0 else -np.inf,
        )
        better = moved > best[box]
        winner[box][better] = index
        np.maximum(best[box], moved, out=best[box])
    return np.ascontiguousarray(recipe.file.from_ras(winner))


def _reach_of(
    mask: np.ndarray, affine_mm: np.ndarray, other_shape: Shape, other_affine_mm: np.ndarray
) -> tuple[slice, ...] | None:
    """The box of another grid in which linear interpolation reads some voxel of a mask; None where there is none."""
    if not mask.any():
        return None
    low, high = geometry.extent_between(mask, affine_mm, other_affine_mm)
    there = np.linalg.inv(other_affine_mm) @ affine_mm
    margin = np.abs(there[:3, :3]).sum(axis=1) + 1  # a voxel of either grid, whichever is larger, is read across
    start = np.clip(np.floor(low - margin).astype(int), 0, other_shape)
    stop = np.clip(np.ceil(high + margin).astype(int) + 1, 0, other_shape)
    if (stop <= start).any():
        return None
    return tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))


def restore_labels(labels: np.ndarray, recipe: Recipe) -> np.ndarray:
    """A label map on the prepared grid to the file's own grid, by the nearest voxel.

    Args:
        labels: [X, Y, Z] whole numbers, on the grid of `recipe`.
        recipe: of the scan or label map on whose file's grid the answer is wanted.

    Returns:
        The same dtype, in the file's own shape and axis order; 0 outside the crop.
    """
    _check_shape(labels.shape, recipe)
    moved = geometry.resample(
        labels, np.array(recipe.affine_mm), recipe.file.ras_shape(), _place(recipe), order="nearest", fill=0
    )
    return np.ascontiguousarray(recipe.file.from_ras(moved))


def restore_map(values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Real numbers on the prepared grid to the file's own grid, interpolated linearly.

    Args:
        values: [X, Y, Z] real, on the grid of `recipe`.
        recipe: of the scan on whose file's grid they are wanted.

    Returns:
        float32, in the file's own shape and axis order; 0 outside the crop.
    """
    _check_shape(values.shape, recipe)
    moved = geometry.resample(
        np.asarray(values, dtype=np.float32), np.array(recipe.affine_mm), recipe.file.ras_shape(), _place(recipe),
        order="linear", fill=0,
    )  # fmt: skip
    return np.ascontiguousarray(recipe.file.from_ras(moved))


def _place(recipe: Recipe) -> np.ndarray:
    """[4, 4]: where the file's voxels, on RAS+ axes, lie in the space of the prepared array."""
    affine = recipe.file.ras_affine()
    return affine if recipe.moved_mm is None else np.array(recipe.moved_mm) @ affine


def _check_shape(shape: tuple[int, ...], recipe: Recipe) -> None:
    if tuple(shape) != recipe.shape:
        raise ValueError(f"found an array of {tuple(shape)} voxels, the recipe is for {recipe.shape}")


def _triple(values: Any) -> Shape:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _rows(matrix: Any) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)
