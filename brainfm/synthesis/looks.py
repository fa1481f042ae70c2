"""Looks: intensities of tissues that a scan may have, drawn at random around the usual contrasts or freely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brainfm.synthesis.settings import LookSpec

# Families of tissue whose intensities go together, and what a usual scan of each kind makes of them (0 is air, 1 is the
# brightest brain tissue). T1, T2, FLAIR and PD by their order in textbooks, not measured.
FAMILIES = ("air", "fluid", "cortex", "deep_grey", "white", "cerebellar_grey", "brainstem", "outside")
_KINDS: dict[str, tuple[float, ...]] = {
    #         air  fluid  cortex deep  white cereb. stem
    "t1":    (0.0, 0.15, 0.55, 0.65, 0.90, 0.55, 0.80),
    "t2":    (0.0, 1.00, 0.60, 0.50, 0.38, 0.58, 0.42),
    "flair": (0.0, 0.12, 0.75, 0.72, 0.58, 0.72, 0.60),
    "pd":    (0.0, 0.80, 0.85, 0.78, 0.62, 0.84, 0.64),
}  # fmt: skip
KINDS = (*_KINDS, "free")
_TISSUE = slice(FAMILIES.index("cortex"), FAMILIES.index("outside"))


@dataclass(frozen=True)
class Look:
    """One rendering's numbers.

    Attributes:
        kind: one of KINDS.
        means, stds: [R] float32, by render class; air is exactly 0 with a deviation of 0.
        texture: share of the real scan in it, negative where it is inverted.
        blur_vox: of the partial volume.
    """

    kind: str
    means: np.ndarray
    stds: np.ndarray
    texture: float
    blur_vox: float


def draw_look(rng: np.random.Generator, families: np.ndarray, spec: LookSpec) -> Look:
    """A look for R render classes.

    Args:
        families: [R] int, the place of each class in FAMILIES; the first class is air.

    Source: Billot et al. 2023, SynthSeg (arXiv 2107.09559), section 3: uniform means and deviations a label.
    Differs: families of tissue vary together, and part of the looks lie about those of the usual contrasts.
    """
    kind = "free" if rng.random() < spec.free_share else str(rng.choice(list(_KINDS)))
    if kind == "free":
        of_family = rng.uniform(0.05, 1.0, len(FAMILIES))
    else:
        usual = np.array([*_KINDS[kind], 0.5])
        if spec.least_contrast < 1:  # real T2s hardly tell grey from white matter, however bright their fluid is
            tissue = usual[_TISSUE]
            usual[_TISSUE] = tissue.mean() + rng.uniform(spec.least_contrast, 1) * (tissue - tissue.mean())
        of_family = usual + spec.family_std * rng.standard_normal(len(FAMILIES))
    means = of_family[families] * np.exp(spec.class_std * rng.standard_normal(len(families)))
    outside = families == FAMILIES.index("outside")
    means[outside] = rng.uniform(0.0, 1.1, int(outside.sum()))  # skull, fat, muscle: as they please
    stds = rng.uniform(0.1, 1.0, len(families)) * rng.uniform(0, spec.noise)
    air = families == FAMILIES.index("air")
    means[air] = stds[air] = 0.0
    texture = float(rng.uniform(0, spec.texture) * rng.choice([-1.0, 1.0]))
    blur_vox = float(rng.uniform(0.4, 1.0) * spec.blur_vox)
    return Look(kind, np.clip(means, 0.01, None).astype(np.float32) * ~air, stds.astype(np.float32), texture, blur_vox)
