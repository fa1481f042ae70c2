"""Tissue classes of voxels: Gaussians, a smooth bias field and a Markov random field around an atlas's priors.

Nothing here knows a contrast. Class 0 is everything that is not brain or its fluid, described by a histogram; classes
1 to 4 are CSF, grey matter, white matter and deep grey matter, each a Gaussian. The deep nuclei are a class of their
own because in many contrasts they look like white matter and only their place tells them from it. Arrays of classes
are [5, X, Y, Z] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.special import ndtr

_BINS = 64
_OUTLIER = 0.02  # share of a tissue's voxels that may have any intensity
_LEAST_SPREAD = 0.02  # of a Gaussian, in units of the range of intensities
_TINY = 1e-12
# Least share of mixed voxels, and the largest. Without the least, the Gaussian of CSF widens and takes mixed voxels.
_MIXED, _MOST_MIXED = (0.5, 0.3, 0.2, 0.2), 0.7
_TABLE = 2048
# With which tissues each shares voxels, and how often.
_MEETS = {1: ((2, 1.0),), 2: ((1, 0.5), (3, 0.5)), 3: ((2, 1.0),), 4: ((3, 1.0),)}


@dataclass(frozen=True)
class Mixture:
    """What intensities the classes have, after the bias field.

    A tissue's density is a Gaussian for pure voxels and, for those it shares with another tissue but fills by more than
    half, a flat stretch from its mean to the middle between the two means, blurred like the Gaussians.

    Attributes:
        means, spreads: of pure CSF, grey matter, white matter and deep grey matter.
        mixed: share of the tissue's voxels that are mixed.
        others: [bins] the density of class 0 between `low` and `high`.
        low, high: the range of intensities.
    """

    means: tuple[float, ...]
    spreads: tuple[float, ...]
    mixed: tuple[float, ...]
    others: np.ndarray
    low: float
    high: float

    @property
    def contrasts(self) -> tuple[float, float]:
        """|difference of means| over the root of the mean variance: CSF to grey, grey to white matter."""
        m, s = self.means, self.spreads
        first, second = (abs(m[i] - m[i + 1]) / np.sqrt((s[i] ** 2 + s[i + 1] ** 2) / 2) for i in range(2))
        return float(first), float(second)


def fit(
    values: np.ndarray, classes: np.ndarray, pure: np.ndarray, low: float, high: float, near: np.ndarray
) -> Mixture:
    """The mixture that explains the values best, given how much each voxel belongs to each class.

    Args:
        values: [X, Y, Z] float32, bias removed.
        classes: [5, X, Y, Z] posterior.
        pure: [4, X, Y, Z] how probable it is that a voxel of that tissue is pure.
        low, high: range of the intensities that count.
        near: [X, Y, Z] bool, where class 0 is looked at.
    """
    clipped = np.clip(values[near], low, high)
    means, spreads, mixed = [], [], []
    for tissue, clean, least in zip(classes[1:], pure, _MIXED):
        weights = tissue[near] * clean[near]
        total = float(weights.sum(dtype=np.float64)) + _TINY
        mean = float((weights * clipped).sum(dtype=np.float64)) / total
        variance = float((weights * (clipped - mean) ** 2).sum(dtype=np.float64)) / total
        means.append(mean)
        spreads.append(max(variance**0.5, _LEAST_SPREAD * (high - low)))
        share = 1 - total / (float(tissue[near].sum(dtype=np.float64)) + _TINY)
        mixed.append(min(max(share, least), _MOST_MIXED))
    spreads[0] = min(spreads[0], max(spreads[1:3]))  # fluid is no more varied than tissue; what is, is mixed
    counts, _ = np.histogram(clipped, _BINS, (low, high), weights=classes[0][near])
    smooth = ndimage.gaussian_filter1d(counts + 1e-2 * counts.sum() / _BINS, 1.0, mode="nearest")
    others = smooth / (smooth.sum() + _TINY) * _BINS / (high - low)
    return Mixture(tuple(means), tuple(spreads), tuple(mixed), others, low, high)


def likelihood(values: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """([5, ...] density of each value in each class, [4, ...] probability that a voxel of a tissue is pure), float32.

    Source: the mixed classes are those of Shattuck et al. 2001, here counted to the tissue that fills more of a voxel.
    """
    low, high = mixture.low, mixture.high
    # Densities are functions of one number: a fine table, read by linear interpolation, replaces the exponentials.
    table = np.linspace(low, high, _TABLE)
    columns = np.empty((9, _TABLE))
    centres = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS
    columns[0] = np.interp(table, centres, mixture.others)
    for k, (mean, spread, mixed) in enumerate(zip(mixture.means, mixture.spreads, mixture.mixed), start=1):
        pure = (1 - _OUTLIER - mixed) / (spread * np.sqrt(2 * np.pi)) * np.exp(-0.5 * ((table - mean) / spread) ** 2)
        shared = mixed * sum(
            share * _stretch(table, mean, (mean + mixture.means[other - 1]) / 2, spread) for other, share in _MEETS[k]
        )
        columns[k] = pure + shared + _OUTLIER / (high - low)
        columns[k + 4] = pure / columns[k]
    place = (np.clip(values, low, high) - low) * np.float32((_TABLE - 1) / (high - low))
    found = columns.astype(np.float32)[:, np.rint(place).astype(np.intp)]
    return found[:5], found[5:]


def _stretch(at: np.ndarray, start: float, stop: float, blur: float) -> np.ndarray:
    """The density of a flat stretch between two values after a Gaussian blur."""
    first, last = sorted((start, stop))
    last = max(last, first + 0.1 * blur)
    return (ndtr((at - first) / blur) - ndtr((at - last) / blur)) / (last - first)


def posterior(densities: np.ndarray, prior: np.ndarray, support: np.ndarray | None = None) -> np.ndarray:
    """[5, ...] float32: how probable each class is; `support` is what the neighbours say, in natural logarithms."""
    found = densities * prior
    if support is not None:
        found *= np.exp(support)
    found /= np.maximum(found.sum(0), _TINY)
    return found


def neighbours(classes: np.ndarray, strength: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The mean field of a Potts model: for each class, the weighted share of it among the six neighbours.

    Args:
        classes: [5, X, Y, Z] posterior.
        strength: the logarithm of the odds by which a voxel amid one class is drawn to it.
        spacing_mm: a near neighbour counts more, as 1 / distance; the weights sum to `strength`.

    Returns:
        [5, X, Y, Z]; beyond the border the border's own class goes on.

    Source: Zhang, Brady and Smith 2001, hidden Markov random fields; the mean field after Van Leemput et al. 1999.
    """
    nearness = 1 / np.array(spacing_mm)
    weights = strength * nearness / (2 * nearness.sum())
    found = np.zeros_like(classes)
    for axis, weight in enumerate(weights, start=1):
        lower, upper = _ends(axis)
        found[lower] += np.float32(weight) * classes[upper]
        found[upper] += np.float32(weight) * classes[lower]
        first, last = [slice(None)] * 4, [slice(None)] * 4
        first[axis], last[axis] = slice(0, 1), slice(-1, None)
        for edge in (tuple(first), tuple(last)):
            found[edge] += np.float32(weight) * classes[edge]
    return found


def _ends(axis: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    lower, upper = [slice(None)] * 4, [slice(None)] * 4
    lower[axis], upper[axis] = slice(None, -1), slice(1, None)
    return tuple(lower), tuple(upper)


def bias_field(
    image: np.ndarray, tissues: np.ndarray, mixture: Mixture, spacing_mm: tuple[float, float, float], knots_mm: float
) -> np.ndarray:
    """The smooth factor b that makes b times the expected tissue most like the image.

    Weighted least squares in a Gaussian window: b = G * (w m y) / G * (w m^2), m the mean and w the inverse variance of
    the classes that a voxel belongs to. A weak pull to 1 carries the field on where there is no brain.

    Args:
        image: [X, Y, Z] as it came.
        tissues: [4, X, Y, Z] how much of each voxel counts as that tissue.
        knots_mm: standard deviation of the window.

    Returns:
        [X, Y, Z] float32, its mean over the brain 1.

    Source: Wells et al. 1996, adaptive segmentation; Differs: the factor is fitted to intensities, not their logarithm.
    """
    top = np.zeros(image.shape, dtype=np.float32)
    bottom = np.zeros(image.shape, dtype=np.float32)
    for tissue, mean, spread in zip(tissues, mixture.means, mixture.spreads):
        top += tissue * np.float32(mean / spread**2) * image
        bottom += tissue * np.float32((mean / spread) ** 2)
    brain = tissues.sum(0)
    sigma = [knots_mm / s for s in spacing_mm]
    pull = np.float32(0.01 * bottom.max() + _TINY)
    field = (_blur(top, sigma) + pull) / (_blur(bottom, sigma) + pull)
    field /= np.float32((field * brain).sum(dtype=np.float64) / (brain.sum(dtype=np.float64) + _TINY))
    return np.clip(field, 0.2, 5)


def _blur(array: np.ndarray, sigma: list[float]) -> np.ndarray:
    return ndimage.gaussian_filter(array, sigma, mode="constant", truncate=3.0)
