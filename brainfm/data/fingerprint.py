"""Fingerprint of a data set: what the data themselves say about the grid and the patch that suit them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import ndimage

from brainfm.data.manifest import Manifest
from brainfm.data.store import SessionEntry, Store, read_spec
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.imaging.nifti import read_header
from brainfm.volume import spacing_of

Triple = tuple[int, int, int]
Lengths = tuple[float, float, float]

_ANISOTROPIC = 3.0  # an axis this many times coarser than both others is made of thick slices
_LABELS = 200  # label volumes that are read; more would not move a median
_HEADERS = 2000
_TOUCHING = np.ones((3, 3, 3), dtype=bool)


class HasLabel(Protocol):
    """A session and the name of its label volume."""

    @property
    def session(self) -> SessionEntry: ...

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Fingerprint:
    """Labelled cases in a few numbers. Percentiles are the 5th, 50th and 95th; NaN where there is nothing to count.

    Attributes:
        cases: how many; ``empty`` of those that were read hold no labelled voxel.
        read: label volumes that were read, evenly spread over the cases.
        spacing_mm: of the store's grid.
        file_spacing_mm: median over the label files' own grids, along X, Y, Z.
        smallest_vox, median_vox, largest_vox: shapes of the sessions, each axis by itself.
        foreground_ml: of all classes together, over cases that have any.
        foreground_share: of the volume.
        part_ml: sizes of connected parts (26 neighbours) of all classes together.
        parts: of a case, the median number.
    """

    cases: int
    read: int
    empty: int
    spacing_mm: Lengths
    file_spacing_mm: Lengths
    smallest_vox: Triple
    median_vox: Triple
    largest_vox: Triple
    foreground_ml: Lengths
    foreground_share: Lengths
    part_ml: Lengths
    parts: float

    @property
    def anisotropy(self) -> float:
        """The longest edge of a voxel of the label files by the shortest."""
        return max(self.file_spacing_mm) / min(self.file_spacing_mm)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "anisotropy": self.anisotropy}


def fingerprint(store: Store, cases: Sequence[HasLabel]) -> Fingerprint:
    """The fingerprint of cases of a store; the same for the same cases in the same order.

    Raises:
        ConfigError: without any case.
    """
    if not cases:
        raise ConfigError(f"{store.path}: no case to take a fingerprint of, expected at least one labelled session")
    shapes = np.array([case.session.shape for case in cases])
    voxel_ml = float(np.prod(store.spec.spacing_mm)) / 1000
    spacings, volumes, shares, parts, numbers = [], [], [], [], []
    chosen = _spread(cases, _LABELS)
    for case in chosen:
        spacings.append(spacing_of(store.recipe(case.session, case.label).file.ras_affine()))
        sizes = _part_sizes(store.volume(case.session, case.label) != 0)
        if len(sizes):
            volumes.append(float(sizes.sum()) * voxel_ml)
            shares.append(float(sizes.sum()) / float(np.prod(case.session.shape)))
            parts += [float(size) * voxel_ml for size in sizes]
            numbers.append(len(sizes))
    return Fingerprint(
        cases=len(cases),
        read=len(chosen),
        empty=len(chosen) - len(volumes),
        spacing_mm=store.spec.spacing_mm,
        file_spacing_mm=_lengths(np.median(spacings, axis=0)),
        smallest_vox=_triple(shapes.min(axis=0)),
        median_vox=_triple(np.median(shapes, axis=0)),
        largest_vox=_triple(shapes.max(axis=0)),
        foreground_ml=_percentiles(volumes),
        foreground_share=_percentiles(shares),
        part_ml=_percentiles(parts),
        parts=float(np.median(numbers)) if numbers else float("nan"),
    )


def choose_patch(found: Fingerprint, strides_last: int, most_voxels: int) -> Triple:
    """The patch that shows the most of a volume along the axis of which it shows the least; then along the others.

    So it follows the shape of the volumes, in voxels: flat where slices are thick and few. No edge is longer than the
    median volume, but for the two strides that some axis must have for instance norm to work.

    Args:
        strides_last: coarsest stride of the backbone; edges are multiples of it.
        most_voxels: that the patch may hold.

    Raises:
        ConfigError: where not even the smallest patch fits.
    """
    smallest = 2 * strides_last**3
    if most_voxels < smallest:
        raise ConfigError(f"most_voxels={most_voxels}: expected at least {smallest}, the backbone's smallest patch")
    steps = [max(1, length // strides_last) for length in found.median_vox]
    if max(steps) < 2:
        steps[int(np.argmax(found.median_vox))] = 2
    best: tuple[tuple[float, ...], Triple] | None = None
    for x, y, z in itertools.product(*(range(1, step + 1) for step in steps)):
        patch = x * strides_last, y * strides_last, z * strides_last
        if max(x, y, z) < 2 or patch[0] * patch[1] * patch[2] > most_voxels:
            continue
        shown = tuple(sorted(edge / length for edge, length in zip(patch, found.median_vox)))
        if best is None or (shown, patch) > best:
            best = shown, patch
    assert best is not None
    return best[1]


def choose_spacing(manifest: Manifest) -> Lengths:
    """The edge lengths of the voxels that suit a manifest's scans, along X, Y, Z, in steps of 0.01 mm.

    Along each axis the median over the scans. Where that makes one axis more than three times as coarse as both
    others, most scans are stacks of thick slices: a grid that fine across them would be mostly interpolated, one that
    coarse would throw away what the better scans show. The axis then gets the 10th percentile, but is made no finer
    than the others. Headers alone are read, of at most 2000 scans evenly spread over the manifest; those that cannot
    be read are left to the doctor.

    Source: Isensee et al. 2021 (nnU-Net, arXiv:1809.10486), rule for the target spacing.
        Differs: contrasts of a session need not share a grid here, so every scan counts; the rule looks at spacings
        alone, not at the number of slices.
    Raises:
        ManifestError: where no header can be read.
    """
    spacings = list(_spacings(manifest))
    if not spacings:
        raise ManifestError(f"{manifest.path}: no scan has a header that can be read, expected at least one")
    median = np.median(spacings, axis=0)
    thick = int(median.argmax())
    others = np.delete(median, thick)
    if median[thick] > _ANISOTROPIC * others.max():
        median[thick] = max(np.percentile(np.asarray(spacings)[:, thick], 10), others.max())
    return _lengths(median.round(2))


def settled_spacing(manifest: Manifest, store_path: Path) -> Lengths:
    """What ``preprocess.spacing_mm=auto`` stands for: the grid of the store that is there, or else a chosen one.

    A store that was begun keeps its grid when the manifest grows: the same command goes on.
    """
    if (store_path / "spec.json").exists():
        return read_spec(store_path).spacing_mm
    return choose_spacing(manifest)


def _spacings(manifest: Manifest) -> Iterable[Lengths]:
    for path in _spread(sorted({scan.path for scan in manifest.scans}), _HEADERS):
        try:
            yield spacing_of(read_header(manifest.resolve(path)).grid.ras_affine())
        except (ScanError, FileNotFoundError):
            continue


def _spread(things: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the things, evenly spread."""
    if len(things) <= most:
        return list(things)
    return [things[int(place)] for place in np.linspace(0, len(things) - 1, most).round()]


def _part_sizes(mask: np.ndarray) -> np.ndarray:
    """Voxels of each connected part; only the box around the foreground is looked at."""
    boxes = ndimage.find_objects(mask.view(np.int8))
    if not boxes:
        return np.zeros(0, dtype=np.int64)
    return np.bincount(ndimage.label(mask[boxes[0]], _TOUCHING)[0].ravel())[1:]


def _percentiles(values: Sequence[float]) -> Lengths:
    if not values:
        return float("nan"), float("nan"), float("nan")
    return _lengths(np.percentile(values, [5, 50, 95]))


def _lengths(values: np.ndarray) -> Lengths:
    return float(values[0]), float(values[1]), float(values[2])


def _triple(values: np.ndarray) -> Triple:
    return int(values[0]), int(values[1]), int(values[2])
