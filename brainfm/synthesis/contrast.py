"""Other contrasts of a real subject, rendered from a T1 and its label map.

Where cohorts have T1 alone, this gives a subject's brain a second and third look on the same grid, so that questions
about several contrasts can be tried. The anatomy is real, the contrast is not: a rendered scan holds no information
that the T1 and the labels do not hold, and scores on it say nothing about scans from a scanner.

How: the T1 of a voxel says how its tissue is mixed, so a curve through the tissues' (T1, target) means renders partial
volume, sulci and texture; the label map says where the T1 of a region differs from its tissue's for other reasons (the
coil's field, iron) and what the region shall look like in the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from brainfm import seeds
from brainfm.errors import ConfigError, ScanError
from brainfm.imaging.intensity import foreground
from brainfm.synthesis.deform import random_field
from brainfm.volume import Volume

# Mean signal of a tissue, CSF of a T2 being 1: the order that relaxation times and usual settings give.
SIGNALS: dict[str, dict[str, float]] = {
    "t2": {"csf": 1.0, "grey": 0.56, "deep_grey": 0.48, "pallidum": 0.36, "white": 0.40, "brainstem": 0.43},
    "flair": {"csf": 0.14, "grey": 0.74, "deep_grey": 0.68, "pallidum": 0.56, "white": 0.60, "brainstem": 0.62},
    "pd": {"csf": 0.78, "grey": 0.90, "deep_grey": 0.84, "pallidum": 0.74, "white": 0.70, "brainstem": 0.73},
}
# Head outside the brain: factor and exponent of the T1 in units of white matter's. Fat is bright in both, muscle is
# darker in T2 than in T1, bone is dark in all.
_HEAD: dict[str, tuple[float, float]] = {"t2": (0.45, 1.5), "flair": (0.50, 1.2), "pd": (0.70, 0.7)}
_NOISE = {"t2": 0.015, "flair": 0.020, "pd": 0.015}  # standard deviation of each channel
_BIAS = {"t2": 0.15, "flair": 0.20, "pd": 0.12}  # largest logarithm of the multiplicative field
_BIAS_KNOTS_MM = 95.0
_CSF_VOID = 0.6  # of the T1 of CSF; what is darker is bone, dura or air, and dark in every contrast
_CSF_PURE = 0.35  # of the way from the T1 of CSF to that of grey matter; flow and noise, no other tissue
_NEAR_MM = 4.0  # standard deviation of how far outside the labels CSF may lie
_BORDER_VOX = 0.6  # standard deviation over which regions blend


@dataclass(frozen=True)
class Appearance:
    """How one contrast of one subject will look.

    Attributes:
        contrast: one of SIGNALS.
        tissues: tissue -> mean signal in this subject.
        regions: label id -> mean signal; what `render` aims at within each region.
        head: factor and exponent for the head outside the brain.
        bias_log: largest absolute logarithm of the multiplicative field.
        blur_vox: standard deviation of the blur; other contrasts are mostly acquired more coarsely than a T1.
        noise: standard deviation of each channel of the Rician noise.
        gain: scanner units for a signal of 1.
        seed: of the field and the noise.
    """

    contrast: str
    tissues: dict[str, float]
    regions: dict[int, float]
    head: tuple[float, float]
    bias_log: float
    blur_vox: float
    noise: float
    gain: float
    seed: int


def draw(
    rng: np.random.Generator, contrast: str, tissue_of: Mapping[int, str], region_jitter: float = 0.015
) -> Appearance:
    """The look of a contrast: tissue means near those of SIGNALS, in their order, and regions near their tissue.

    Args:
        rng: of this subject and contrast.
        contrast: one of SIGNALS.
        tissue_of: label id -> tissue, for every id that counts as labelled; tissues are the names in SIGNALS.
        region_jitter: standard deviation of a region's relative deviation from its tissue.

    Raises:
        ConfigError: for an unknown contrast or tissue.
    """
    if contrast not in SIGNALS:
        raise ConfigError(f"contrast {contrast!r} cannot be rendered, expected one of {', '.join(SIGNALS)}")
    signals = SIGNALS[contrast]
    strange = sorted(set(tissue_of.values()) - set(signals))
    if strange:
        raise ConfigError(f"unknown tissue {strange[0]!r}, expected one of {', '.join(signals)}")
    ordered = sorted(signals, key=signals.__getitem__)
    factors = rng.uniform(0.95, 1.05, len(ordered))
    drawn = np.sort([signals[tissue] * factor for tissue, factor in zip(ordered, factors)])  # the order is kept
    tissues = {tissue: float(value) for tissue, value in zip(ordered, drawn)}
    regions = {
        label: tissues[tissue_of[label]] * float(1 + region_jitter * np.clip(rng.standard_normal(), -2, 2))
        for label in sorted(tissue_of)
    }
    factor, exponent = _HEAD[contrast]
    return Appearance(
        contrast=contrast,
        tissues=tissues,
        regions=regions,
        head=(factor * float(rng.uniform(0.8, 1.2)), exponent * float(rng.uniform(0.85, 1.15))),
        bias_log=_BIAS[contrast] * float(rng.uniform(0.4, 1.0)),
        blur_vox=float(rng.uniform(0.2, 0.5)),
        noise=_NOISE[contrast] * float(rng.uniform(0.6, 1.4)),
        gain=600 * float(np.clip(rng.lognormal(0, 0.35), 0.4, 2.5)),
        seed=int(rng.integers(2**31)),
    )


def render(t1: Volume, labels: Volume, tissue_of: Mapping[int, str], look: Appearance) -> Volume:
    """The contrast as float32 on the grid of the T1, 0 outside the head.

    Args:
        t1: any units, higher in white than in grey matter and lower in CSF.
        labels: whole numbers on the same grid; ids without a tissue count as unlabelled.
        tissue_of: as for `draw`; csf, grey and white must occur in the labels.
        look: what `draw` gave.

    Raises:
        ScanError: where the grids differ, a tissue is missing, or the T1 is not that of a T1.
    """
    if t1.shape != labels.shape or not np.allclose(t1.affine_mm, labels.affine_mm, atol=1e-3):
        raise ScanError(f"a T1 of {t1.shape} and labels of {labels.shape} voxels, expected both on one grid")
    source = t1.voxels.astype(np.float32)
    present = [int(i) for i in np.unique(labels.voxels) if int(i) in tissue_of]
    index = np.searchsorted(present, labels.voxels) if present else np.zeros(t1.shape, int)
    index = np.clip(index, 0, max(len(present) - 1, 0))
    brain = np.isin(labels.voxels, present)
    levels = _tissue_levels(source, brain, index, [tissue_of[i] for i in present])
    curve = _curve(levels, look)

    own = np.asarray(ndimage.median(source[brain], index[brain], np.arange(len(present))), dtype=np.float32)
    reference = np.array([levels[tissue_of[i]] for i in present], dtype=np.float32)
    aim = np.array([look.regions[i] for i in present], dtype=np.float32)
    near = ndimage.gaussian_filter(brain.astype(np.float32), _BORDER_VOX)
    # Regions differ by what is added to the T1 before and to the signal after the curve; both blend at borders.
    before, after = (
        ndimage.gaussian_filter(np.where(brain, values[index], 0).astype(np.float32), _BORDER_VOX)
        / np.maximum(near, 1e-3)
        for values in (reference - own, aim - np.interp(reference, *curve).astype(np.float32))
    )
    inside = np.interp(source + before, *curve).astype(np.float32) + after

    head = ndimage.binary_fill_holes(foreground(t1) | brain)
    outside = _outside(source, brain, levels, look, t1.spacing_mm)
    mix = np.where(brain, np.maximum(near, 0.5), np.minimum(near, 0.5))  # a labelled voxel stays mostly what it is
    signal = ndimage.gaussian_filter(np.maximum(mix * inside + (1 - mix) * outside, 0), look.blur_vox)

    spacing = float(np.mean(t1.spacing_mm))
    field = random_field(seeds.stream(look.seed, "contrast.bias"), t1.shape, spacing, _BIAS_KNOTS_MM)
    signal *= np.exp(look.bias_log * field)
    real, imaginary = look.noise * seeds.stream(look.seed, "contrast.noise").standard_normal((2, *t1.shape))
    image = np.where(head, look.gain * np.hypot(signal + real, imaginary), 0)
    return Volume(image.astype(np.float32), t1.affine_mm)


def _tissue_levels(source: np.ndarray, brain: np.ndarray, index: np.ndarray, tissues: list[str]) -> dict[str, float]:
    """tissue -> median T1 of its voxels."""
    names = np.array(tissues, dtype=object)
    levels = {}
    for tissue in sorted(set(tissues)):
        member = brain & (names == tissue)[index]
        levels[tissue] = float(np.median(source[member]))
    missing = [tissue for tissue in ("csf", "grey", "white") if tissue not in levels]
    if missing:
        raise ScanError(f"no voxel is labelled {missing[0]}, expected csf, grey and white in the label map")
    if not 0 < levels["csf"] < levels["grey"] < levels["white"]:
        found = ", ".join(f"{tissue} {levels[tissue]:.4g}" for tissue in ("csf", "grey", "white"))
        raise ScanError(f"medians of the T1: {found}; expected csf < grey < white, all above 0, as in a T1")
    return levels


def _curve(levels: dict[str, float], look: Appearance) -> tuple[list[float], list[float]]:
    """Knots (T1, signal): void, CSF and what scatters about it, grey, white, and on beyond white."""
    csf, grey, white = (levels[tissue] for tissue in ("csf", "grey", "white"))
    target = look.tissues
    beyond = target["white"] + 0.3 * (target["white"] - target["grey"])
    return (
        [0.0, _CSF_VOID * csf, csf + _CSF_PURE * (grey - csf), grey, white, white + 0.5 * (white - grey)],
        [0.0, target["csf"], target["csf"], target["grey"], target["white"], beyond],
    )


def _outside(
    source: np.ndarray,
    brain: np.ndarray,
    levels: dict[str, float],
    look: Appearance,
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    """The head where there are no labels: skin, fat, muscle and bone from the T1, and CSF that the labels left out.

    A voxel within some mm of the labels counts as CSF as far as its T1 looks like CSF's; bone, which is darker, does
    not. What is bright in T2 for other reasons (eyes, mucosa) is not known and comes out dark.
    """
    factor, exponent = look.head
    signal = factor * (np.maximum(source, 0) / np.float32(levels["white"])) ** np.float32(exponent)
    near = 2.5 * ndimage.gaussian_filter(brain.astype(np.float32), _NEAR_MM / np.array(spacing_mm), truncate=3)
    width = 0.5 * (1 - _CSF_VOID) * levels["csf"]
    like = np.exp(-0.5 * ((source - levels["csf"]) / width) ** 2) * np.minimum(near, 1)
    return (signal + like * (look.tissues["csf"] - signal)).astype(np.float32)
