"""Tissue label maps and volumes of a single scan, whatever its contrast.

An atlas is laid on the scan by an affine transform (SimpleITK, mutual information); the tissues' intensities and the
bias field are fitted (tissue), the atlas is bent (warp), and at last each voxel of the scan's own grid gets its most
probable tissue. The intensities rest while the atlas bends: fitted together, the two drift into each other's errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from scipy import ndimage

from brainfm.errors import ScanError
from brainfm.extras import missing
from brainfm.imaging import geometry, tissue, warp
from brainfm.imaging.atlas import tissue_maps
from brainfm.imaging.intensity import foreground
from brainfm.imaging.tissue import Mixture
from brainfm.imaging.warp import Warp
from brainfm.volume import Volume, spacing_of

VOLUMES = ("csf", "gm", "wm", "brain", "icv")
VERSION = 1  # raised when the same scan would get other labels

_AFFINE_MM, _WARP_MM, _WORK_MM, _FINEST_MM = 4.0, 3.0, 2.0, 0.85  # grids; finer scans are labelled at 1 mm
_SOFT_MM = 1.2  # the priors are blurred by so much, for a person differs from the average
_FLOOR = 2e-3  # least prior of a tissue within reach of the brain
_FAR_FLOOR = 1e-6  # and elsewhere: so little that only what a stripped scan shows outside the atlas is decided by it
_LEFT_BY_STRIPPING = 1e-8  # odds that a voxel of a stripped scan is neither brain nor fluid
_RIM_MM = 4.0  # around the atlas's head, counted by the mutual information; with 8 mm the head comes out too small
_ENLARGED = 1.04  # on whole heads mutual information lays the atlas so much too small: it would rather miss skull
_MIDDLE_MM = (0.0, -17.0, 7.0)  # of the atlas
_REACH_MM = 16.0  # around the atlas's head, where class 0 is looked at
_APART_MM = 6.0  # but not next to it: brain that the atlas misses there would be learnt as class 0
_BINS = 24
_KNOTS_MM = 18.0
_MRF = 0.8
_STEPS, _FLUID_VOX, _ELASTIC_VOX = (10, 8), 1.5, 0.5
_FIRST_TURNS, _LATER_TURNS, _LAST_TURNS = 12, 2, 5
# An ellipsoid of the template that holds thalamus, caudate, putamen and pallidum, but neither insula nor hippocampus.
_DEEP_CENTRE_MM, _DEEP_RADII_MM = (0, -6, 3), (33, 34, 20)

_SMALLEST_MM, _FEWEST_SLICES, _THICKEST_MM = 90.0, 12, 8.0
_ICV_ML = (800.0, 2200.0)
_LEAST_HEAD_ML = 2300.0  # within the atlas's reach a whole head fills more, a bare brain less
_LEAST_INFORMATION = 0.15  # nats
_LEAST_CONTRAST = 0.7
_LEAST_CONFIDENCE = 0.6
_LEAST_AGREEMENT = 0.45
_MOST_FOLDED = 0.005
_LEAST_SHARES = {"csf": 0.02, "gm": 0.2, "wm": 0.12}  # of the intracranial volume


@dataclass(frozen=True)
class Tissues:
    """What a scan shows.

    Attributes:
        labels: [X, Y, Z] uint8 on the scan's grid: 0 outside, 1 CSF, 2 grey matter, 3 white matter.
        volumes_ml: by the names of `VOLUMES`; brain is gm + wm, icv is brain + csf.
        checks: what the quality is made of: ``information`` (mutual, nats) between scan and atlas, ``contrast`` between
            grey and white matter in standard deviations, ``confidence`` (mean of the largest posterior in the brain),
            ``agreement`` of atlas and posterior, ``folded`` share of the deformation.
        quality: 0 to 1; the worst check.
        reason: why the labels should not be trusted; empty where they may be.
    """

    labels: np.ndarray
    volumes_ml: dict[str, float]
    checks: dict[str, float]
    quality: float
    reason: str


@dataclass(frozen=True)
class _Level:
    """A scan on one grid.

    Attributes:
        image: [X, Y, Z] float32, 0 is the least value of the file.
        grid_mm: [4, 4].
        inside: bool, within the field of view.
        empty: bool, brain-extracted scans' exact background; nowhere in other scans.
    """

    image: np.ndarray
    grid_mm: np.ndarray
    inside: np.ndarray
    empty: np.ndarray

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return spacing_of(self.grid_mm)


@dataclass(frozen=True)
class _Fit:
    """What was learnt of a scan: the atlas's place, the intensities, the bias field and its grid."""

    warp: Warp
    mixture: Mixture
    bias: np.ndarray
    bias_mm: np.ndarray


# ---- public ----------------------------------------------------------------------------------------------------------


def check_packages() -> None:
    """Raises: ConfigError where SimpleITK or nilearn is not installed."""
    _sitk()
    tissue_maps(6.0)


def segment(volume: Volume) -> Tissues:
    """Brain tissues of one structural scan of a whole or brain-extracted head.

    Args:
        volume: any contrast in which CSF, grey and white matter differ; 1 to 3 mm, or thicker slices.

    Returns:
        The labels, whether or not they should be trusted: see `Tissues.reason`.

    Raises:
        ScanError: the scan is too small or too flat to hold a head, or shows nothing.
        ConfigError: SimpleITK or nilearn is not installed.
    """
    _refuse_small(volume)
    volume = Volume(volume.voxels.astype(np.float32) - np.float32(volume.voxels.min()), volume.affine_mm)
    image, grid_mm = _resampled(volume, _AFFINE_MM, None)
    fore = foreground(Volume(image, grid_mm))
    top = float(np.percentile(image[fore], 99))
    affine, information = affine_to_atlas(np.clip(image / top, 0, 1), grid_mm, fore)
    box = _head_box(affine)
    level = _level(volume, _WORK_MM, box)
    low = Warp(affine, *_still(_level(volume, _WARP_MM, box)))
    stripped = _is_stripped(level, low)
    if not stripped:
        affine = _enlarged(affine)
        box = _head_box(affine)
        level = _level(volume, _WORK_MM, box)
        low = Warp(affine, *_still(_level(volume, _WARP_MM, box)))
    fitted = _fit(volume, level, low, stripped)
    return _finish(volume, fitted, stripped, information)


def merge(classes: np.ndarray) -> np.ndarray:
    """[4, ...] from [5, ...]: the deep grey matter joins the grey matter."""
    found = classes[:4].copy()
    found[2] += classes[4]
    return found


# ---- steps -----------------------------------------------------------------------------------------------------------


def _refuse_small(volume: Volume) -> None:
    extent = [n * s for n, s in zip(volume.shape, volume.spacing_mm)]
    if min(volume.shape) < _FEWEST_SLICES or min(extent) < _SMALLEST_MM or max(volume.spacing_mm) > _THICKEST_MM:
        size = " x ".join(f"{e:.0f}" for e in extent)
        raise ScanError(
            f"{' x '.join(map(str, volume.shape))} voxels over {size} mm, expected a 3D scan of a whole brain of at "
            f"least {_FEWEST_SLICES} slices and {_SMALLEST_MM:.0f} mm along each axis, slices up to "
            f"{_THICKEST_MM:.0f} mm"
        )


def _resampled(
    volume: Volume, spacing_mm: float, box: tuple[np.ndarray, np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The scan on a grid parallel to the axes, cut to a box in mm; and the grid."""
    low, high = geometry.box_between(np.zeros(3), np.array(volume.shape), volume.affine_mm, np.eye(4))
    if box is not None:
        low, high = np.maximum(low, box[0]), np.minimum(high, box[1])
    grid = np.diag([spacing_mm] * 3 + [1.0])
    grid[:3, 3] = low + spacing_mm / 2
    x, y, z = (int(n) for n in np.maximum(np.ceil((high - low) / spacing_mm), 4))
    return geometry.resample(volume.voxels, volume.affine_mm, (x, y, z), grid, order="linear", fill=0), grid


def _level(volume: Volume, spacing_mm: float, box: tuple[np.ndarray, np.ndarray]) -> _Level:
    image, grid = _resampled(volume, spacing_mm, box)
    ones = Volume(np.ones(volume.shape, dtype=np.float32), volume.affine_mm)
    empty = Volume((volume.voxels == 0).astype(np.float32), volume.affine_mm)
    inside = _resampled(ones, spacing_mm, box)[0] > 0.5
    return _Level(image, grid, inside, _resampled(empty, spacing_mm, box)[0] > 0.5)


def _still(level: _Level) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((3, *level.image.shape), dtype=np.float32), level.grid_mm


def _head_box(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    maps, maps_mm = tissue_maps(2.0)
    low, high = geometry.box_between(np.zeros(3), np.array(maps.shape[1:]), maps_mm, np.linalg.inv(affine))
    return low - _REACH_MM, high + _REACH_MM


def _enlarged(affine: np.ndarray) -> np.ndarray:
    """Scan mm to atlas mm with the atlas larger on the scan, about its own middle."""
    shrink = np.diag([1 / _ENLARGED] * 3 + [1.0])
    shrink[:3, 3] = np.array(_MIDDLE_MM) * (1 - 1 / _ENLARGED)
    return shrink @ affine


def _is_stripped(level: _Level, place: Warp) -> bool:
    """Whether the skull was removed: a shell around the brain is mostly of one exact value, and little else is not."""
    brain = _priors(level, place, 2.0)[0] < 0.5
    shell = ndimage.binary_dilation(brain, iterations=6) & ~ndimage.binary_dilation(brain, iterations=3) & level.inside
    shown_ml = np.count_nonzero(level.inside & ~level.empty) * _WORK_MM**3 / 1000
    return bool(shell.any() and level.empty[shell].mean() > 0.4 and shown_ml < _LEAST_HEAD_ML)


def _priors(level: _Level, place: Warp, spacing_mm: float) -> np.ndarray:
    """[5, X, Y, Z]: the atlas on a scan; tissues have a floor where the brain may reach."""
    atlas = _atlas(spacing_mm)
    maps = warp.sample(atlas.maps[1:], atlas.affine_mm, place.points(level.image.shape, level.grid_mm))
    reach = maps.sum(0)
    floor = np.float32(_FLOOR) * np.minimum(1, reach * 20)
    found = np.concatenate([np.maximum(1 - reach, 0)[None], maps]) + floor + np.float32(_FAR_FLOOR)
    return found / np.maximum(found.sum(0), 1e-6)


def _densities(level: _Level, values: np.ndarray, mixture: Mixture, stripped: bool) -> tuple[np.ndarray, np.ndarray]:
    """As tissue.likelihood; outside the field of view nothing is known, and a stripped scan's background is known."""
    found, pure = tissue.likelihood(values, mixture)
    if stripped:
        found[0] *= np.float32(_LEFT_BY_STRIPPING)
        found[0][level.empty] = 1
        found[1:, level.empty] = 0
    found[:, ~level.inside] = 1
    return found, pure


def _looked_at(level: _Level, prior: np.ndarray, stripped: bool) -> np.ndarray:
    """bool: where intensities are learnt: the brain as far as the atlas knows it, and what is not too near to it."""
    core = prior[0] < 0.5
    width = min(level.spacing_mm)
    reach = ndimage.binary_dilation(core, iterations=max(1, round(_REACH_MM / width)))
    apart = ndimage.binary_dilation(core, iterations=max(1, round(_APART_MM / width)))
    found = level.inside & (core | (reach & ~apart))
    return found & ~level.empty if stripped else found


def _learn(
    values: np.ndarray, classes: np.ndarray, pure: np.ndarray, high: float, near: np.ndarray, core: np.ndarray
) -> Mixture:
    """tissue.fit with class 0 learnt outside the brain alone."""
    outside = classes.copy()
    outside[0][core] = 0
    return tissue.fit(values, outside, pure, 0.0, high, near)


def _fit(volume: Volume, level: _Level, place: Warp, stripped: bool) -> _Fit:
    """Intensities and bias at 2 mm, the atlas's deformation at 3 mm, in turns."""
    bias = np.ones(level.image.shape, dtype=np.float32)
    coarse = _level(volume, _WARP_MM, _box_of(level))
    place = warp.onto_grid(place, coarse.image.shape, coarse.grid_mm)
    atlas = _atlas(_WORK_MM)
    mixture: Mixture | None = None
    high = 0.0
    for turn, steps in enumerate((*_STEPS, 0)):
        prior = _priors(level, place, _WORK_MM)
        near, core = _looked_at(level, prior, stripped), prior[0] < 0.5
        if not (core & near).any():
            raise ScanError("no brain was found, expected a scan of a head")
        if mixture is None:
            high = 1.25 * float(np.percentile(level.image[core & near], 99.5)) + 1e-6
            mixture = _learn(level.image, prior * (prior > 0.5), np.ones_like(prior[1:]), high, near, core)
        for _ in range(_LATER_TURNS if turn else _FIRST_TURNS):
            values = level.image / bias
            densities, pure = _densities(level, values, mixture, stripped)
            classes = tissue.posterior(densities, prior)
            mixture = _learn(values, classes, pure, high, near, core)
            seen = classes[1:] * pure * level.inside
            bias = tissue.bias_field(level.image, seen, mixture, level.spacing_mm, _KNOTS_MM)
        if steps:
            flat = coarse.image / _carried(bias, level.grid_mm, coarse)
            densities, _ = _densities(coarse, flat, mixture, stripped)
            place = warp.refine(place, densities, atlas.maps, atlas.affine_mm, steps, _FLUID_VOX, _ELASTIC_VOX)
    assert mixture is not None
    return _Fit(place, mixture, bias, level.grid_mm)


def _box_of(level: _Level) -> tuple[np.ndarray, np.ndarray]:
    return geometry.box_between(np.zeros(3), np.array(level.image.shape), level.grid_mm, np.eye(4))


def _carried(field: np.ndarray, field_mm: np.ndarray, level: _Level) -> np.ndarray:
    """A smooth field on a level's grid; beyond its own the border's value goes on."""
    index = np.linalg.inv(field_mm) @ level.grid_mm
    return ndimage.affine_transform(
        field, index[:3, :3], index[:3, 3], output_shape=level.image.shape, order=1, mode="nearest"
    )


def _final_level(volume: Volume, fitted: _Fit, stripped: bool) -> _Level:
    """The part of the scan that may hold the brain, on its own grid, or at 1 mm along the axes that are finer."""
    low, high = geometry.box_between(np.zeros(3), np.array(fitted.bias.shape), fitted.bias_mm, volume.affine_mm)
    start = np.clip(np.floor(low), 0, volume.shape).astype(int)
    stop = np.clip(np.ceil(high) + 1, 0, volume.shape).astype(int)
    part = volume.voxels[tuple(slice(a, b) for a, b in zip(start, stop))]
    grid = geometry.cropped_affine(volume.affine_mm, tuple(start))
    step = np.array([max(1.0, 1.0 / s) if s < _FINEST_MM else 1.0 for s in volume.spacing_mm])
    if (step > 1).any():
        coarser = grid.copy()
        coarser[:3, :3] *= step
        coarser[:3, 3] += grid[:3, :3] @ ((step - 1) / 2)
        x, y, z = (int(np.ceil(n / s)) for n, s in zip(part.shape, step))
        share = geometry.resample((part == 0).astype(np.float32), grid, (x, y, z), coarser, order="linear", fill=1)
        empty = share > 0.5
        part, grid = geometry.resample(part, grid, (x, y, z), coarser, order="linear", fill=0), coarser
    else:
        empty = part == 0
    return _Level(part, grid, np.ones(part.shape, dtype=bool), empty & stripped)


def _finish(volume: Volume, fitted: _Fit, stripped: bool, information: float) -> Tissues:
    """Labels on the scan's grid, volumes and checks."""
    level = _final_level(volume, fitted, stripped)
    prior = _priors(level, fitted.warp, 1.0 if min(level.spacing_mm) < 1.7 else 2.0)
    near, core = _looked_at(level, prior, stripped), prior[0] < 0.5
    values = level.image / _carried(fitted.bias, fitted.bias_mm, level)
    mixture, high = fitted.mixture, fitted.mixture.high
    classes = prior
    for turn in range(_LAST_TURNS):
        densities, pure = _densities(level, values, mixture, stripped)
        support = tissue.neighbours(classes, _MRF, level.spacing_mm) if turn else None
        classes = tissue.posterior(densities, prior, support)
        if turn < 2:  # the noise and the mixing differ from those at 2 mm
            mixture = _learn(values, classes, pure, high, near, core)
    brain = _one_piece(classes[0] < 0.5)
    found = np.where(brain, merge(classes)[1:].argmax(0) + 1, 0).astype(np.uint8)
    labels = geometry.resample_labels(found, level.grid_mm, volume.shape, volume.affine_mm, how="linear")
    ml = np.bincount(labels.ravel(), minlength=4)[1:] * abs(np.linalg.det(volume.affine_mm[:3, :3])) / 1000
    csf, gm, wm = (float(v) for v in ml)
    volumes = {"csf": csf, "gm": gm, "wm": wm, "brain": gm + wm, "icv": csf + gm + wm}
    checks = {
        "information": information,
        "contrast": mixture.contrasts[1],
        "confidence": float(merge(classes).max(0)[brain].mean()) if brain.any() else 0.0,
        "agreement": float((prior[1:] * classes[1:]).sum() / max(float(classes[1:].sum()), 1.0)),
        "folded": float((fitted.warp.determinant() <= 0).mean()),
    }
    return Tissues(labels, volumes, checks, *_judged(volumes, checks))


def _one_piece(brain: np.ndarray) -> np.ndarray:
    """The largest piece once thin bridges are cut, without holes."""
    parts, count = ndimage.label(ndimage.binary_erosion(brain))
    if count:
        core = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])
        brain = brain & ndimage.binary_dilation(core, iterations=2)
    return ndimage.binary_fill_holes(brain)


def _judged(volumes: dict[str, float], checks: dict[str, float]) -> tuple[float, str]:
    """Quality from 0 to 1, and the first reason for distrust."""
    icv = volumes["icv"]
    shares = {name: volumes[name] / max(icv, 1e-6) for name in _LEAST_SHARES}
    missing = [name for name, least in _LEAST_SHARES.items() if shares[name] < least]
    reason = ""
    if checks["information"] < _LEAST_INFORMATION:
        reason = f"mutual information with the atlas of {checks['information']:.2f}, expected {_LEAST_INFORMATION}"
    elif not _ICV_ML[0] <= icv <= _ICV_ML[1]:
        reason = f"intracranial volume of {icv:.0f} ml, expected {_ICV_ML[0]:.0f} to {_ICV_ML[1]:.0f} ml"
    elif checks["contrast"] < _LEAST_CONTRAST:
        reason = f"contrast of grey to white matter of {checks['contrast']:.1f}, expected {_LEAST_CONTRAST}"
    elif missing:
        name = missing[0]
        reason = f"{name} fills {shares[name]:.0%} of the head, expected {_LEAST_SHARES[name]:.0%} or more"
    elif checks["confidence"] < _LEAST_CONFIDENCE:
        reason = f"mean posterior of {checks['confidence']:.2f}, expected {_LEAST_CONFIDENCE}"
    elif checks["agreement"] < _LEAST_AGREEMENT:
        reason = f"tissues and atlas agree by {checks['agreement']:.2f}, expected {_LEAST_AGREEMENT}"
    elif checks["folded"] > _MOST_FOLDED:
        reason = f"the deformation folds {checks['folded']:.1%} of the scan, expected {_MOST_FOLDED:.1%} at most"
    ramps = (
        checks["information"] / 0.5,
        checks["contrast"] / 2.5,
        (checks["confidence"] - 0.4) / 0.5,
        checks["agreement"] / 0.7,
    )
    return float(np.clip(min(ramps), 0, 1)), reason


# ---- atlas -----------------------------------------------------------------------------------------------------------


def _sitk() -> Any:
    try:
        import SimpleITK
    except ImportError:
        raise missing("SimpleITK", "the registration of the atlas") from None
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return SimpleITK


@dataclass(frozen=True)
class _Atlas:
    """The tissue maps on one grid, softened, with room around them.

    Attributes:
        maps: [4, X, Y, Z] float32, sum 1; class 0 is outside.
        affine_mm: [4, 4].
    """

    maps: np.ndarray
    affine_mm: np.ndarray


@lru_cache(maxsize=4)
def _atlas(spacing_mm: float) -> _Atlas:
    maps, affine = tissue_maps(spacing_mm)
    pad = int(np.ceil((_REACH_MM + 6) / spacing_mm))
    wide = np.pad(maps, [(0, 0), *[(pad, pad)] * 3])
    moved = affine.copy()
    moved[:3, 3] -= affine[:3, :3] @ np.full(3, pad)
    index = np.indices(wide.shape[1:], dtype=np.float32).reshape(3, -1)
    place = (moved[:3, :3] @ index + moved[:3, 3:]).reshape(3, *wide.shape[1:])
    deep = sum(((p - c) / r) ** 2 for p, c, r in zip(place, _DEEP_CENTRE_MM, _DEEP_RADII_MM)) < 1
    wide = np.concatenate([wide[:1], wide[1:2] * ~deep, wide[2:], wide[1:2] * deep])
    wide = np.stack([ndimage.gaussian_filter(m, _SOFT_MM / spacing_mm) for m in wide]).astype(np.float32)
    return _Atlas(np.concatenate([np.maximum(1 - wide.sum(0, keepdims=True), 0), wide]), moved)


# ---- affine ----------------------------------------------------------------------------------------------------------


def _code(atlas: _Atlas) -> np.ndarray:
    """An image in which every tissue has a value of its own: mutual information asks for no more."""
    return np.tensordot(np.array([0, 1, 2, 3, 2], dtype=np.float32), atlas.maps, 1)


def _search(image: np.ndarray, grid_mm: np.ndarray, fore: np.ndarray, best: int) -> list[np.ndarray]:
    """Atlas mm to scan mm, [4, 4]: the likeliest of many placements of the head, by mutual information."""
    atlas = _atlas(6.0)
    code = _code(atlas)
    rim = ndimage.binary_dilation(atlas.maps[0] < 0.5, iterations=round(_RIM_MM / 6))
    points = atlas.affine_mm[:3, :3] @ np.stack(np.nonzero(rim)) + atlas.affine_mm[:3, 3:]
    bins = np.minimum(np.rint(code[rim] * 3), 9).astype(np.intp)
    smooth = ndimage.gaussian_filter(image, 1.5)
    head = np.stack(np.nonzero(fore)).astype(np.float64)
    place = grid_mm[:3, :3] @ head + grid_mm[:3, 3:]
    middle = place.mean(1)
    top = np.percentile(place[2], 99.5)
    centre = points.mean(1)
    # The middle of a bare brain; below the top of a head with a neck.
    heights = [*(middle[2] + np.array([-12, 0, 12])), *(top - 78 + np.arange(-36, 13, 12))]
    ahead = middle[1] + np.array([-15, 0, 15])
    back = np.linalg.inv(grid_mm)
    found: list[tuple[float, np.ndarray]] = []
    for z, y, pitch, size in product(heights, ahead, (-0.3, 0.0, 0.3), (0.92, 1.05)):
        turn = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]]) * size
        matrix = np.eye(4)
        matrix[:3, :3] = turn
        matrix[:3, 3] = np.array([middle[0], y, z]) - turn @ centre
        index = (back @ matrix)[:3] @ np.concatenate([points, np.ones((1, points.shape[1]))])
        seen = ndimage.map_coordinates(smooth, index, order=1, mode="constant")
        found.append((_information(bins, np.minimum(seen * 15.99, 15).astype(np.intp)), matrix))
    found.sort(key=lambda f: -f[0])
    return [matrix for _, matrix in found[:best]]


def _information(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information in nats of two arrays of small whole numbers."""
    joint = np.bincount(a * 16 + b, minlength=160).reshape(10, 16) / a.size
    outer = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / outer[filled])).sum())


def affine_to_atlas(image: np.ndarray, grid_mm: np.ndarray, fore: np.ndarray) -> tuple[np.ndarray, float]:
    """Where the points of a scan lie in the atlas, and how much the two tell of each other.

    Args:
        image: [X, Y, Z] float32 from 0 to 1 on a grid parallel to the axes of about 4 mm.
        fore: bool, the patient.

    Returns:
        [4, 4] scan mm to atlas mm, and the mutual information in nats.
    """
    moving = _to_sitk(image, grid_mm)
    starts = [_register(moving, matrix, 6.0, "similarity", 0.5) for matrix in _search(image, grid_mm, fore, 3)]
    start = min(starts, key=lambda s: s[1])[0]
    matrix, value = _register(moving, start, _AFFINE_MM, "affine", 0.35)
    return np.linalg.inv(matrix), -value


def _to_sitk(array: np.ndarray, grid_mm: np.ndarray) -> Any:
    """On a grid parallel to the axes; coordinates stay RAS, for both images alike."""
    image = _sitk().GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0), dtype=np.float32))
    image.SetSpacing([float(s) for s in np.diag(grid_mm)[:3]])
    image.SetOrigin([float(o) for o in grid_mm[:3, 3]])
    return image


@lru_cache(maxsize=2)
def _fixed(spacing_mm: float) -> tuple[Any, Any]:
    atlas = _atlas(spacing_mm)
    rim = ndimage.binary_dilation(atlas.maps[0] < 0.5, iterations=round(_RIM_MM / spacing_mm))
    mask = _sitk().Cast(_to_sitk(rim, atlas.affine_mm), _sitk().sitkUInt8)
    return _to_sitk(_code(atlas), atlas.affine_mm), mask


def _register(moving: Any, start: np.ndarray, spacing_mm: float, kind: str, share: float) -> tuple[np.ndarray, float]:
    sitk = _sitk()
    fixed, mask = _fixed(spacing_mm)
    transform = sitk.Similarity3DTransform() if kind == "similarity" else sitk.AffineTransform(3)
    transform.SetCenter(list(_MIDDLE_MM))
    size = np.cbrt(np.linalg.det(start[:3, :3]))
    if kind == "similarity":
        u, _, vt = np.linalg.svd(start[:3, :3])
        transform.SetMatrix((u @ vt * size).ravel().tolist())
    else:
        transform.SetMatrix(start[:3, :3].ravel().tolist())
    centre = np.array(transform.GetCenter())
    transform.SetTranslation((start[:3, 3] + start[:3, :3] @ centre - centre).tolist())
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricFixedMask(mask)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(share, 1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(4.0, 0.02, 80, 0.6, 1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(transform.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = np.array(transform.GetTranslation()) + centre - matrix[:3, :3] @ centre
    return matrix, float(method.GetMetricValue())
