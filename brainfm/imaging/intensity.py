"""Foreground and intensities: which voxels show the patient, and values that mean the same from scan to scan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import scipy.ndimage

from brainfm.errors import ScanError
from brainfm.volume import Volume

STEP = 2.0**-7  # standard deviations; stored scans are rounded to multiples of it
_MOST_FOREGROUND = 0.6  # above this share, "differs from the background" tells nothing
_MOST_DIM = 0.35  # of the differing voxels; above, they are air noise and not tissue
_BORDER_SHARE = 0.5  # of the border that must hold the background value
_THRESHOLD = 0.1  # of the way from the 2nd to the 98th percentile
_COARSE_MM = 4.0  # blocks in which air noise averages out
_SPECK = 0.05  # of the largest piece; smaller pieces are dropped
_LABELS = 1024  # different whole numbers at most in what may be a label map
_PATCHY = 0.6  # of neighbours equal: label maps have .75 and more, scans of 8 bits .3 at most
_NEAR_TOP, _MANY_NEAR_TOP, _SATURATED = 0.95, 0.05, 0.25  # of the largest value; shares of the image: scans have .001
_OUTSIDE = (0.5, 99.5)  # percent; less is no reason to refuse a scan
_MOST_SPREAD = 1e5  # clipped range against the size of 90 % of the foreground: whole numbers of 16 bits spread less


@dataclass(frozen=True)
class Stats:
    """How a scan was standardised: clip to [low, high], subtract mean, divide by std."""

    low: float
    high: float
    mean: float
    std: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{name: float(value) for name, value in values.items()})


def foreground(volume: Volume) -> np.ndarray:
    """The voxels that show the patient and not air or padding.

    A skull-stripped or padded scan has one exact background value, the commonest one on the border of the array: its
    foreground is what differs from it, dark cerebrospinal fluid included. Where that says nothing (more than 60 % of
    the array differs, or much of what differs is as dark as noise) the foreground is what lies above the robust
    threshold of 10 % between the 2nd and the 98th percentile; for it the scan is averaged to 4 mm as well, and
    pieces smaller than 5 % of the largest are dropped. A background brighter than the 98th percentile is never
    foreground.

    Returns:
        bool [X, Y, Z] in the memory order of the voxels.

    Raises:
        ScanError: all voxels have one value, or some are outliers that would flatten all the rest.
    """
    voxels = volume.voxels
    background = _background_value(voxels)
    sample = _sample(voxels)
    if background is not None:
        differs = voxels != background
        share = np.count_nonzero(differs) / voxels.size
        if share == 0:
            raise ScanError(f"all voxels have the value {background:g}, expected an image")
        sample = sample[sample != background]
        if sample.size:
            _without_outliers(sample, _OUTSIDE)
        if sample.size == 0 or (share < _MOST_FOREGROUND and not _is_noisy(sample, background)):
            return differs
        if background > np.percentile(sample, 98):
            voxels = np.where(differs, voxels, sample.min())
    mask = _above_threshold(voxels, _threshold(sample), volume.spacing_mm)
    return mask if mask.any() else voxels > voxels.min()


def statistics(voxels: np.ndarray, mask: np.ndarray, clip_percentiles: tuple[float, float]) -> Stats:
    """Percentiles of the foreground, and mean and standard deviation of the clipped foreground.

    Raises:
        ScanError: the foreground is empty, has one value, or outliers that would flatten all the rest.
    """
    order = np.argsort(np.abs(voxels.strides))[::-1]  # selecting in memory order is several times faster
    values = voxels.transpose(order)[mask.transpose(order)]
    if values.size == 0:
        raise ScanError("no foreground was found, expected an image of a head")
    counted = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
    stats = _by_counting(values, clip_percentiles) if counted else _by_sorting(values, clip_percentiles)
    if not (stats.high > stats.low and stats.std > 0):
        raise ScanError(f"nearly all of the foreground has the value {stats.low:g}, expected an image")
    return stats


def no_scan(voxels: np.ndarray) -> str:
    """Why an image looks like a label map or a map of probabilities, in words; empty where it looks like a scan."""
    corner = voxels[0, 0, 0]
    inside = voxels != corner
    values = voxels[inside]
    if values.size < 2:
        return ""
    low, high = float(values.min()), float(values.max())
    few = high - low < 2**16 and _are_whole(values)
    kinds = int(np.count_nonzero(np.bincount((values - low).astype(np.int64)))) if few else values.size
    axis = int(np.argmin(np.abs(voxels.strides)))
    a, b = voxels.swapaxes(0, axis)[1:], voxels.swapaxes(0, axis)[:-1]
    pairs = (a != corner) & (b != corner)
    if kinds <= _LABELS and pairs.any() and (a == b)[pairs].mean() > _PATCHY:
        return f"it holds patches of {kinds} whole numbers, as a label map does"
    near_top = float((values >= _NEAR_TOP * high).mean()) if high > 0 and low >= 0 else 0.0
    if near_top > (_MANY_NEAR_TOP if high <= 1 + 1e-4 else _SATURATED):
        return f"{near_top:.0%} of it are near its largest value, {high:g}, as in a map of probabilities"
    return ""


def _are_whole(values: np.ndarray) -> bool:
    if values.dtype.kind in "iu":
        return True
    some = values[:: max(1, values.size // 4096)]
    return bool((some == np.rint(some)).all() and (values == np.rint(values)).all())


def background_above(voxels: np.ndarray, value: float) -> float | None:
    """The exact background of a scan, where it is brighter than a value: the mark of some programs for "no value"."""
    corners = voxels[:: max(1, voxels.shape[0] - 1), :: max(1, voxels.shape[1] - 1), :: max(1, voxels.shape[2] - 1)]
    if corners.max() <= value:  # the common case, told without looking at the whole border
        return None
    background = _background_value(voxels)
    return background if background is not None and background > value else None


def _by_sorting(values: np.ndarray, clip_percentiles: tuple[float, float]) -> Stats:
    values = values.astype(np.float32)
    low, high = _without_outliers(values, clip_percentiles)
    np.clip(values, low, high, out=values)
    mean = float(values.mean(dtype=np.float64))
    values -= np.float32(mean)
    std = float(np.sqrt(np.square(values, out=values).mean(dtype=np.float64)))
    return Stats(low, high, mean, std)


def _without_outliers(values: np.ndarray, clip_percentiles: tuple[float, float]) -> tuple[float, float]:
    """The percentiles of float32 values, which are put into another order. Raises: ScanError where what lies between
    them is so wide that all the rest would be one value."""
    low, high, fifth, last = (float(p) for p in np.percentile(values, (*clip_percentiles, 5, 95), overwrite_input=True))
    most = max(abs(fifth), abs(last))
    if most > 0 and high - low > _MOST_SPREAD * most:
        raise ScanError(
            f"outliers from {low:.3g} to {high:.3g} where 90 % of the foreground lie within {most:.3g} of 0, expected "
            "an image without them"
        )
    return low, high


def _by_counting(values: np.ndarray, clip_percentiles: tuple[float, float]) -> Stats:
    """The same from a histogram, ten times faster; for whole numbers of at most 16 bits."""
    lowest = int(values.min())
    counts = np.bincount(values.astype(np.int32) - lowest)
    levels = lowest + np.arange(len(counts), dtype=np.float64)
    cumulated = np.cumsum(counts)

    def percentile(percent: float) -> float:
        rank = percent / 100 * (values.size - 1)
        below, above = levels[np.searchsorted(cumulated, [np.floor(rank), np.ceil(rank)], side="right")]
        return float(below + (above - below) * (rank - np.floor(rank)))

    low, high = (percentile(p) for p in clip_percentiles)
    clipped = np.clip(levels, low, high)
    mean = float((clipped * counts).sum() / values.size)
    std = float(np.sqrt((np.square(clipped - mean) * counts).sum() / values.size))
    return Stats(low, high, mean, std)


def apply(voxels: np.ndarray, stats: Stats) -> np.ndarray:
    """Clip and standardise a float32 array in place; returns it."""
    np.clip(voxels, np.float32(stats.low), np.float32(stats.high), out=voxels)
    voxels -= np.float32(stats.mean)
    voxels /= np.float32(stats.std)
    return voxels


def standardise(
    voxels: np.ndarray, mask: np.ndarray, clip_percentiles: tuple[float, float]
) -> tuple[np.ndarray, Stats]:
    """Zero mean and unit deviation over the foreground; background is clipped like everything else.

    Args:
        voxels: [X, Y, Z]; not changed.
        mask: bool [X, Y, Z], the foreground.
        clip_percentiles: of the foreground, in percent.

    Returns:
        float32 [X, Y, Z], and what was done.

    Raises:
        ScanError: as statistics.
    """
    stats = statistics(voxels, mask, clip_percentiles)
    return apply(voxels.astype(np.float32, order="K"), stats), stats


def _background_value(voxels: np.ndarray) -> float | None:
    """The value that most of the border has, if there is one."""
    faces = [voxels[i] for i in (0, -1)] + [voxels[:, i] for i in (0, -1)] + [voxels[:, :, i] for i in (0, -1)]
    values, counts = np.unique(np.concatenate([face.ravel() for face in faces]), return_counts=True)
    most = int(counts.argmax())
    return float(values[most]) if counts[most] >= _BORDER_SHARE * counts.sum() else None


def _sample(voxels: np.ndarray) -> np.ndarray:
    """At most about a million voxels on a regular lattice, enough for robust percentiles."""
    step = max(1, round((voxels.size / 500_000) ** (1 / 3)))
    return voxels[::step, ::step, ::step].ravel().astype(np.float32)


def _threshold(sample: np.ndarray) -> float:
    low, high = np.percentile(sample, (2, 98))
    return float(low + _THRESHOLD * (high - low))


def _is_noisy(sample: np.ndarray, background: float) -> bool:
    """Whether what differs from the background is mostly a little above it, as air around a padded head is."""
    if sample.size == 0:
        return False
    high = float(np.percentile(sample, 98))
    above = sample - background
    return bool(((above > 0) & (above < _THRESHOLD * (high - background))).mean() > _MOST_DIM)


def _above_threshold(voxels: np.ndarray, threshold: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Voxels above the threshold, in and beside blocks whose mean is above it too, without specks."""
    voxels = voxels.astype(np.float32, order="K", copy=False)
    if not voxels.flags.c_contiguous and voxels.flags.f_contiguous:
        return _above_threshold(voxels.T, threshold, (spacing_mm[2], spacing_mm[1], spacing_mm[0])).T
    factors = [max(1, round(_COARSE_MM / spacing)) for spacing in spacing_mm]
    coarse = voxels
    for axis, factor in enumerate(factors):
        if factor > 1:
            starts = np.arange(0, voxels.shape[axis], factor)
            counts = np.diff(np.append(starts, voxels.shape[axis])).astype(np.float32)
            coarse = np.add.reduceat(coarse, starts, axis=axis)
            coarse = coarse / counts.reshape([-1 if i == axis else 1 for i in range(3)])
    pieces, count = scipy.ndimage.label(coarse > threshold)
    if count == 0:
        return voxels > threshold
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    kept = (sizes >= _SPECK * sizes.max())[pieces]
    kept = scipy.ndimage.binary_dilation(kept)
    for axis, factor in enumerate(factors):
        if factor > 1:
            kept = np.repeat(kept, factor, axis=axis)
    kept = kept[tuple(slice(size) for size in voxels.shape)]
    return np.logical_and(kept, voxels > threshold)


def half_precision(voxels: np.ndarray) -> np.ndarray:
    """float16 in the steps that compress well: a prepared scan as a store keeps it. Raises: ValueError."""
    rounded = np.rint(voxels * np.float32(1 / STEP))
    rounded *= np.float32(STEP)
    half = rounded.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError("a prepared scan holds voxels that are not finite or beyond float16")
    return half
