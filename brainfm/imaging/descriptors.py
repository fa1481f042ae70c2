"""Descriptors: a prepared session in a few dozen numbers that a simple model, or a shortcut, can read off it.

Groups of descriptors are kept apart by where they look, so that one can ask what the outline of the head alone, the air
around it alone, or its place in the file alone tells about a label. All arrays are [X, Y, Z] on one grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.ndimage

from brainfm.errors import ScanError
from brainfm.imaging import intensity
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.preprocess import Recipe
from brainfm.volume import Volume

Numbers = dict[str, float]

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_HISTOGRAM = np.linspace(-2.5, 2.5, 11)  # edges in standard deviations, the outer bins open
_OTSU_BINS = 64
_SILHOUETTE = 8
_AXES = "xyz"


def head_mask(scans: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [X, Y, Z]: the voxels that show the patient in any of the scans: the largest piece, holes closed.

    Raises:
        ValueError: where there is no scan.
        ScanError: where no scan shows more than one value.
    """
    if not scans:
        raise ValueError("a head is looked for in at least one scan")
    found: np.ndarray | None = None
    problem: ScanError | None = None
    for voxels in scans.values():
        try:
            mask = intensity.foreground(Volume(np.asarray(voxels, np.float32), np.eye(4)))
        except ScanError as error:
            problem = error
            continue
        found = mask if found is None else found | mask
    if found is None:
        raise problem or ScanError("no scan shows a head")
    pieces, count = scipy.ndimage.label(found)
    if count > 1:  # specks of noise would widen every box
        found = pieces == 1 + int(np.bincount(pieces.ravel())[1:].argmax())
    return scipy.ndimage.binary_fill_holes(found)


def content_descriptors(scans: Mapping[str, np.ndarray], head: np.ndarray, spacing_mm: Sequence[float]) -> Numbers:
    """Of what a session shows of the patient: the outline's numbers but for its silhouette as ``head/...``, and those
    of each contrast's intensities inside it as ``<contrast>/...``.

    Args:
        scans: contrast -> standardised voxels.
        head: of `head_mask`.
    """
    outline = shape_descriptors(head, spacing_mm)
    numbers = {f"head/{k}": v for k, v in outline.items() if not k.startswith("block")}
    for contrast, voxels in scans.items():
        inside = intensity_descriptors(voxels, head, spacing_mm)
        numbers |= {f"{contrast}/{k}": v for k, v in inside.items()}
    return numbers


def content_names(contrasts: Sequence[str]) -> tuple[str, ...]:
    """Names of `content_descriptors` of a session that has all contrasts, sorted."""
    cube = np.arange(8.0, dtype=np.float32).reshape(2, 2, 2)
    found = content_descriptors(dict.fromkeys(contrasts, cube), np.ones((2, 2, 2), dtype=bool), (1.0, 1.0, 1.0))
    return tuple(sorted(found))


def intensity_descriptors(voxels: np.ndarray, head: np.ndarray, spacing_mm: Sequence[float]) -> Numbers:
    """Of one contrast inside the head: percentiles, moments, histogram, three tissue-like volumes, asymmetry.

    Tissue-like classes are the three of Otsu's method, darkest first: of a T1 about fluid, grey and white matter, of
    another contrast something else that varies with the same anatomy.

    Args:
        voxels: standardised.
        head: bool; at least one voxel is True.
        spacing_mm: edge lengths of a voxel.

    Source: for the classes Otsu 1979 (IEEE Trans. SMC 9:62), extended to two thresholds as in its section V.
    """
    inside = voxels[head].astype(np.float64)
    numbers = {f"p{q}": float(v) for q, v in zip(_PERCENTILES, np.percentile(inside, _PERCENTILES))}
    mean, std = inside.mean(), inside.std()
    scale = std if std > 1e-9 else 1.0
    numbers |= {"mean": float(mean), "std": float(std)}
    z = (inside - mean) / scale
    squared = z * z  # powers of arrays are many times slower than products
    numbers |= {"skew": float((squared * z).mean()), "kurtosis": float((squared * squared).mean())}
    counts = np.histogram(np.clip(inside, _HISTOGRAM[0], _HISTOGRAM[-1]), _HISTOGRAM)[0]
    numbers |= {f"bin{i}": float(share) for i, share in enumerate(counts / len(inside))}
    low, high = otsu_thresholds(inside)
    classes = np.digitize(inside, (low, high))
    ml = float(np.prod(np.asarray(spacing_mm, np.float64))) / 1000
    for k, name in enumerate(("dark", "middle", "bright")):
        chosen = inside[classes == k]
        numbers[f"{name}_share"] = len(chosen) / len(inside)
        numbers[f"{name}_ml"] = len(chosen) * ml
        numbers[f"{name}_mean"] = float(chosen.mean()) if len(chosen) else float(mean)
    numbers["asymmetry"] = _asymmetry(voxels, head)
    return numbers


def otsu_thresholds(values: np.ndarray) -> tuple[float, float]:
    """The two thresholds between three classes whose variance between classes is largest, of a 64-bin histogram.

    Where all values are one, both thresholds are that value.

    Source: Otsu 1979, section V.
    """
    low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
    if high - low < 1e-9:
        return low, low
    counts, edges = np.histogram(np.clip(values, low, high), _OTSU_BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * centres)])
    i, j = np.triu_indices(_OTSU_BINS - 1, k=1)
    i, j = i + 1, j + 1  # classes are bins [0, i), [i, j), [j, end)
    zero, end = np.zeros_like(i), np.full_like(i, _OTSU_BINS)
    between = np.zeros(len(i))
    for start, stop in ((zero, i), (i, j), (j, end)):
        weight = mass[stop] - mass[start]
        between += np.divide((moment[stop] - moment[start]) ** 2, weight, out=np.zeros(len(i)), where=weight > 0)
    best = int(between.argmax())
    return float(edges[i[best]]), float(edges[j[best]])


def _asymmetry(voxels: np.ndarray, head: np.ndarray) -> float:
    """Mean absolute difference of the voxels and their mirror image about the head's middle, over the deviation."""
    columns = np.flatnonzero(head.any(axis=(1, 2)))
    box = slice(int(columns[0]), int(columns[-1]) + 1)
    part, both = voxels[box].astype(np.float32), head[box] & head[box][::-1]
    if not both.any():
        return 0.0
    std = float(part[both].std())
    return float(np.abs(part - part[::-1])[both].mean()) / std if std > 1e-9 else 0.0


def shape_descriptors(head: np.ndarray, spacing_mm: Sequence[float]) -> Numbers:
    """Of the outline alone: volume, extents, moments of its shape, and its silhouette in 8^3 blocks of its own box.

    Args:
        head: bool; at least one voxel is True. Its place in the array makes no difference.
        spacing_mm: edge lengths of a voxel.
    """
    spacing = np.asarray(spacing_mm, np.float64)
    box = _box(head)
    inner = head[box]
    places = (np.argwhere(inner) + 0.5) * spacing
    size = np.array(inner.shape) * spacing
    numbers = {"volume_ml": len(places) * float(np.prod(spacing)) / 1000}
    numbers |= {f"extent_{a}_mm": float(s) for a, s in zip(_AXES, size)}
    numbers["filled"] = float(inner.mean())
    centred = places - places.mean(axis=0)
    numbers |= {f"centre_{a}": float(c / s) for a, c, s in zip(_AXES, places.mean(axis=0), size)}
    spread = np.linalg.eigvalsh(centred.T @ centred / len(places))
    numbers |= {f"spread{i}_mm": float(np.sqrt(max(v, 0.0))) for i, v in enumerate(spread)}
    numbers |= {f"skew_{a}": float((c * c * c).mean() / (c.std() ** 3 + 1e-9)) for a, c in zip(_AXES, centred.T)}
    numbers["asymmetry"] = float((inner != inner[::-1]).mean())
    edges = [np.linspace(0, n, _SILHOUETTE + 1) for n in inner.shape]
    sums = np.pad(inner.astype(np.float64), ((1, 0),) * 3).cumsum(0).cumsum(1).cumsum(2)
    for axis, at in enumerate(edges):  # the integral at fractional edges, so that any size of box has 8 blocks
        sums = _interpolated(sums, at, axis)
    blocks = np.diff(np.diff(np.diff(sums, axis=0), axis=1), axis=2) * _SILHOUETTE**3 / inner.size
    numbers |= {f"block{i}": float(v) for i, v in enumerate(blocks.ravel())}
    return numbers


def _interpolated(values: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    below = np.minimum(at.astype(int), values.shape[axis] - 2)
    share = (at - below).reshape([-1 if a == axis else 1 for a in range(values.ndim)])
    return np.take(values, below, axis) * (1 - share) + np.take(values, below + 1, axis) * share


def background_descriptors(voxels: np.ndarray, head: np.ndarray) -> Numbers:
    """Of the voxels of one contrast outside the head alone: level, noise, padding, and the six faces of the array.

    Nothing inside the head is looked at. ``empty`` is 1 where the head fills the array, and all else is then 0.
    """
    around = voxels[~head].astype(np.float64)
    if not len(around):
        faces = {f"face_{a}{side}": 0.0 for a in _AXES for side in "01"}
        return {"empty": 1.0, "min": 0.0, "mean": 0.0, "std": 0.0, "p95": 0.0, "at_min": 0.0, **faces}
    low = float(around.min())
    numbers = {
        "empty": 0.0,
        "min": low,
        "mean": float(around.mean()),
        "std": float(around.std()),
        "p95": float(np.percentile(around, 95)),
        "at_min": float((around == low).mean()),
    }
    for axis, name in enumerate(_AXES):
        for side, place in (("0", 0), ("1", -1)):
            values, outside = np.take(voxels, place, axis), ~np.take(head, place, axis)
            numbers[f"face_{name}{side}"] = float(values[outside].mean()) if outside.any() else low
    return numbers


def position_descriptors(recipe: Recipe, head: np.ndarray) -> Numbers:
    """Where the head lies in the file as it came: its centre and its box, and where the file lies in the scanner.

    Centre and box are shares of the file's own extent along X, Y, Z, 0.5 is its middle. Registration is undone.
    """
    grid = recipe.file
    shape = np.array(grid.ras_shape(), np.float64)
    to_mm = np.array(recipe.affine_mm)
    if recipe.moved_mm is not None:
        to_mm = np.linalg.inv(np.array(recipe.moved_mm)) @ to_mm
    file_affine = grid.ras_affine()
    to_file = np.linalg.inv(file_affine) @ to_mm
    box = _box(head)
    corners = np.array([[part.start for part in box], [part.stop - 1 for part in box]], np.float64)
    centre = np.array(scipy.ndimage.center_of_mass(head))
    places = np.stack([centre, *corners]) @ to_file[:3, :3].T + to_file[:3, 3]
    shares = (places + 0.5) / shape
    numbers: Numbers = {}
    for name, row in zip(("centre", "start", "stop"), shares):
        numbers |= {f"{name}_{a}": float(v) for a, v in zip(_AXES, row)}
    in_scanner = to_mm[:3, :3] @ centre + to_mm[:3, 3]
    middle = file_affine[:3, :3] @ ((shape - 1) / 2) + file_affine[:3, 3]
    numbers |= {f"head_{a}_mm": float(v) for a, v in zip(_AXES, in_scanner)}
    return numbers | {f"file_{a}_mm": float(v) for a, v in zip(_AXES, middle)}


def grid_descriptors(grid: FileGrid) -> Numbers:
    """Of the file's own grid: voxel size, shape and field of view along X, Y, Z, and its order of axes."""
    spacing = np.linalg.norm(grid.ras_affine()[:3, :3], axis=0)
    shape = grid.ras_shape()
    numbers: Numbers = {f"voxel_{a}_mm": round(float(s), 4) for a, s in zip(_AXES, spacing)}
    numbers |= {f"shape_{a}": float(n) for a, n in zip(_AXES, shape)}
    numbers |= {f"view_{a}_mm": round(float(n * s), 2) for a, n, s in zip(_AXES, shape, spacing)}
    for file_axis, (ras_axis, sign) in enumerate(grid.orientation):
        numbers |= {f"axis{file_axis}_{a}": float(sign * (i == ras_axis)) for i, a in enumerate(_AXES)}
    return numbers


def _box(mask: np.ndarray) -> tuple[slice, slice, slice]:
    parts = []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        parts.append(slice(int(used[0]), int(used[-1]) + 1))
    return parts[0], parts[1], parts[2]
