"""A library of lesion shapes: cut out of lesion masks, or grown from noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import scipy.ndimage

from brainfm import seeds
from brainfm.errors import ManifestError
from brainfm.synthesis.deform import random_field

_Thing = TypeVar("_Thing")
FEWEST_VOXELS = 20  # a smaller piece is noise at this spacing
_MOST_SHAPES = 400
_MOST_EDGE = 64  # voxels; what is longer is shrunk: it will hardly meet a patch that holds it
_MEDIAN_ML, _LOG_SPREAD = 1.5, 1.3  # of procedural volumes: 95 % between 0.12 and 19 ml, as stroke lesions are
_BLOB_VOXELS = 4000
_VOLUMES_ML = (0.08, 60.0)


@dataclass(frozen=True)
class Shapes:
    """Lesion shapes, one bit a voxel.

    Attributes:
        spacing_mm: edge length of their voxels, the same along every axis.
        sizes: of their arrays.
        bits: the arrays as np.packbits leaves them.
    """

    spacing_mm: float
    sizes: tuple[tuple[int, int, int], ...]
    bits: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, number: int) -> np.ndarray:
        """Shape of this number: bool [X, Y, Z] that touches all six sides of its array."""
        size = self.sizes[number]
        return np.unpackbits(self.bits[number], count=int(np.prod(size))).reshape(size).astype(bool)

    @property
    def volumes_ml(self) -> np.ndarray:
        """[N] float64."""
        counts = [int(self[n].sum()) for n in range(len(self))]
        return np.array(counts) * self.spacing_mm**3 / 1000


def load_shapes(folder: Path, spacing_mm: float | Sequence[float]) -> Shapes:
    """Every connected piece of every ``*_mask.nii`` or ``*_mask.nii.gz`` at or below a folder.

    Args:
        folder: lesion masks, anything but 0 is lesion; of more than 400 files, or pieces, 400 spread evenly are taken.
        spacing_mm: of the store; the shapes get its finest edge along every axis.

    Raises:
        ManifestError: no such file, or no lesion of at least 20 voxels in any.
        ScanError: a file that is no label map.
    """
    from brainfm.imaging import nifti  # imported when used: shapes that are at hand need no reader of files

    edge_mm = finest(spacing_mm)
    files = sorted(p for p in Path(folder).rglob("*_mask.nii*") if p.name.endswith(("_mask.nii", "_mask.nii.gz")))
    if not files:
        raise ManifestError(f"{folder}: found no file *_mask.nii or *_mask.nii.gz, expected a folder of lesion masks")
    shapes: list[np.ndarray] = []
    for path in _spread(files):
        volume, _ = nifti.read(path, labels=True)
        pieces, count = scipy.ndimage.label(_trimmed(volume.voxels != 0))
        boxes = scipy.ndimage.find_objects(pieces) if count else []  # a subject without a lesion
        for number, box in enumerate(boxes, start=1):
            piece = pieces[box] == number
            if piece.sum() * np.prod(volume.spacing_mm) < FEWEST_VOXELS * edge_mm**3:
                continue
            steps = edge_mm / np.array(volume.spacing_mm)
            shape = _trimmed(_bounded(resized(np.pad(piece, 1), steps) > 0.5))
            if np.count_nonzero(shape) >= FEWEST_VOXELS:
                shapes.append(shape)
    if not shapes:
        raise ManifestError(
            f"{folder}: none of {len(files)} masks holds a lesion of {FEWEST_VOXELS} voxels of {edge_mm:g} mm, "
            "expected at least one"
        )
    return _packed(_spread(shapes), edge_mm)


def procedural_shapes(seed: int, count: int, spacing_mm: float | Sequence[float]) -> Shapes:
    """Irregular blobs with log-normal volumes, for where there are no lesion masks.

    Each is a turned ellipsoid whose border is bent by a smooth random field, cut at the level that gives it the volume
    drawn, and of it the largest piece.

    Args:
        seed: of the run; shape *i* is a function of seed, i and spacing alone.
        count: how many, 1 or more.
        spacing_mm: of the store; the shapes get its finest edge along every axis.
    """
    edge_mm = finest(spacing_mm)
    return _packed([_blob(seeds.stream(seed, "lesion shape", n), edge_mm) for n in range(count)], edge_mm)


def _blob(rng: np.random.Generator, edge_mm: float) -> np.ndarray:
    low, high = max(_VOLUMES_ML[0], 1.5 * FEWEST_VOXELS * edge_mm**3 / 1000), _VOLUMES_ML[1]
    volume_ml = float(np.clip(rng.lognormal(np.log(_MEDIAN_ML), _LOG_SPREAD), low, max(low, high)))
    step = max(1.0, (volume_ml * 1000 / edge_mm**3 / _BLOB_VOXELS) ** (1 / 3))  # large ones are grown on a coarser grid
    wanted = max(FEWEST_VOXELS, round(volume_ml * 1000 / (step * edge_mm) ** 3))
    radii = np.exp(rng.normal(0, 0.3, 3))
    radii *= (3 * wanted / (4 * np.pi * np.prod(radii))) ** (1 / 3)  # in voxels
    axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    reach = int(np.ceil(1.8 * radii.max())) + 2
    grid = np.moveaxis(np.mgrid[-reach : reach + 1, -reach : reach + 1, -reach : reach + 1], 0, -1)
    distance = np.linalg.norm((grid @ axes) / radii, axis=-1)
    mean = float(radii.mean())
    bent = distance + 1.2 * random_field(rng, distance.shape, 1.0, max(2.5, 0.9 * mean))
    bent += 0.7 * random_field(rng, distance.shape, 1.0, max(2.0, 0.4 * mean))
    level = np.partition(bent, wanted, axis=None)[wanted]
    pieces, _ = scipy.ndimage.label(bent < level)
    largest = int(np.argmax(np.bincount(pieces.ravel())[1:])) + 1
    return _trimmed(_bounded(resized(np.pad(_trimmed(pieces == largest), 1), (1 / step,) * 3) > 0.5))


def finest(spacing_mm: float | Sequence[float]) -> float:
    """The shortest edge of a voxel."""
    return float(np.min(spacing_mm))


def resized(shape: np.ndarray, steps: Sequence[float] | np.ndarray) -> np.ndarray:
    """[X', Y', Z'] float32 0..1: the shape on voxels that are ``steps`` of its own wide, about the same middle."""
    result = np.asarray(shape, dtype=np.float32)
    for step in steps:  # each product moves the next axis to the front; after three the order is restored
        n_in = result.shape[0]
        n_out = max(1, int(np.ceil(n_in / step)))
        result = np.tensordot(result, _weights(n_in, n_out, float(step)), axes=(0, 0))
    return result


def _weights(n_in: int, n_out: int, step: float) -> np.ndarray:
    """[in, out] linear interpolation, widened to the output's voxel when shrinking; outside the array is 0."""
    place = (np.arange(n_out) - (n_out - 1) / 2) * step + (n_in - 1) / 2
    width = max(1.0, step)
    tent = np.maximum(0, 1 - np.abs(np.arange(n_in)[:, None] - place) / width)
    whole = np.arange(-n_in, 2 * n_in)  # the same sum without the array's border
    total = np.maximum(0, 1 - np.abs(whole[:, None] - place) / width).sum(0)
    return (tent / total).astype(np.float32)


def _spread(things: list[_Thing]) -> list[_Thing]:
    """At most as many as the library keeps, evenly over their order."""
    return [things[n] for n in np.unique(np.linspace(0, len(things) - 1, _MOST_SHAPES).round().astype(int))]


def _bounded(shape: np.ndarray) -> np.ndarray:
    """The shape, shrunk where it is longer than the library keeps."""
    step = max(shape.shape) / _MOST_EDGE
    return shape if step <= 1 else resized(shape, (step,) * 3) > 0.5


def _trimmed(shape: np.ndarray) -> np.ndarray:
    """The array without its empty margins; nothing of it where all is empty."""
    for _ in range(3):
        filled = np.flatnonzero(shape.any(axis=(1, 2)))
        shape = shape[filled[0] : filled[-1] + 1] if len(filled) else shape[:0]
        shape = np.moveaxis(shape, 0, -1)  # the next axis to the front; after three the order is restored
    return shape


def _packed(shapes: list[np.ndarray], edge_mm: float) -> Shapes:
    sizes = tuple((s.shape[0], s.shape[1], s.shape[2]) for s in shapes)
    return Shapes(edge_mm, sizes, tuple(np.packbits(s) for s in shapes))
