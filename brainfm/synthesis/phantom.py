"""A synthetic cohort with known truth: brains that differ, in three contrasts, most of them with white-matter lesions.

The anatomy is the ICBM152 template, bent smoothly for every subject; the images are tissue probabilities times tissue
intensities, then what a scanner adds. Nothing here is a person's scan. It is made to take every step of brainfm on any
machine and to be hard enough that a threshold does not solve it; scores on it say nothing about patients.
"""

from __future__ import annotations

import csv
import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from brainfm import seeds
from brainfm.imaging.nifti import FileGrid
from brainfm.synthesis import deform, lesions, template
from brainfm.synthesis.template import Anatomy, tissue_maps
from brainfm.volume import Volume

__all__ = ["CONTRASTS", "SyntheticSubject", "subject", "tissue_maps", "write_cohort"]

CONTRASTS = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR"}  # and how their files end

# Signal of CSF, grey matter, white matter and a lesion: the order that relaxation times give at usual settings.
_SIGNALS = {
    "t1": (0.26, 0.66, 1.00, 0.74),
    "t2": (1.00, 0.62, 0.44, 0.70),
    "flair": (0.16, 0.70, 0.56, 0.90),
}
_NOISE = {"t1": 0.025, "t2": 0.030, "flair": 0.035}  # standard deviation of each channel, in the same units
_BIAS = {"t1": 0.22, "t2": 0.18, "flair": 0.30}  # largest logarithm of the multiplicative field
_FIELD_OF_VIEW_MM = (172.0, 204.0, 176.0)
_THICK_EVERY, _THICK_MM = 6, 4.0  # every 6th FLAIR has thick slices and thereby a grid of its own
_HEALTHY_EVERY = 7  # every 7th subject has no lesion
_ORIENTATIONS = ("RAS", "LPS", "RAS", "PIR")  # of the files, by turns, as converters and scanners leave them
_OBLIQUE_TURN = 2  # of these turns, the one whose scans are tilted in the scanner


@dataclass(frozen=True)
class SyntheticSubject:
    """One subject as it would come from a scanner, and the truth about it.

    Attributes:
        scans: contrast -> float32 volume, 0 outside the brain; all on one grid but for a FLAIR with thick slices.
        lesion: uint8 volume, 1 in lesions, on the grid of the T1.
        tissue: uint8 volume on that grid: 0 outside, 1 CSF, 2 grey matter, 3 white matter (lesions included).
        age_years: 20 to 85; ventricles, sulci and the load of lesions grow with it.
        sex: ``F`` or ``M``.
    """

    scans: dict[str, Volume]
    lesion: Volume
    tissue: Volume
    age_years: float
    sex: str


@dataclass(frozen=True)
class _Person:
    """What is drawn once for a subject: age, sex, size of the head and the marks of age."""

    age_years: float
    sex: str
    scale: float
    widening_mm: float
    atrophy: float
    lesion_count: int

    @property
    def aged(self) -> float:
        """0 at 20 years, 1 at 85."""
        return (self.age_years - 20) / 65


def _draw_person(seed: int, index: int) -> _Person:
    rng = seeds.stream(seed, "phantom.person", index)
    age = float(rng.uniform(20, 85))
    aged = (age - 20) / 65
    sex = "M" if rng.random() < 0.5 else "F"
    scale = (1.03 if sex == "M" else 0.985) * float(np.clip(rng.normal(1, 0.02), 0.95, 1.05))
    widening = float(np.clip(-0.8 + 4.2 * aged**1.5 + rng.normal(0, 0.5), -1.2, 4.5))
    atrophy = float(np.clip(0.05 + 0.5 * aged + rng.normal(0, 0.06), 0, 0.7))
    load = (4 + 18 * aged**2) * np.clip(rng.lognormal(0, 0.45), 0.4, 2.5)
    count = 0 if index % _HEALTHY_EVERY == _HEALTHY_EVERY - 1 else 2 + int(rng.poisson(load))
    return _Person(age, sex, scale, widening, atrophy, count)


def _grid(seed: int, index: int, spacing_mm: float) -> tuple[tuple[int, int, int], np.ndarray]:
    """Shape and affine of a subject's scans: fields of view differ by some voxels, some heads lie tilted."""
    rng = seeds.stream(seed, "phantom.grid", index)
    x, y, z = (round(side / spacing_mm) + int(rng.integers(-1, 3)) for side in _FIELD_OF_VIEW_MM)
    if index % _THICK_EVERY == _THICK_EVERY - 1:
        z -= z % _thickness(spacing_mm)
    tilted = index % len(_ORIENTATIONS) == _OBLIQUE_TURN
    turn = deform.random_affine(rng, 1.0) if tilted else np.eye(3)
    directions = turn / np.linalg.norm(turn, axis=0)
    if tilted:
        u, _, vt = np.linalg.svd(directions)  # a scanner's axes are orthogonal
        directions = u @ vt
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing_mm
    affine[:3, 3] = np.round(rng.uniform(-15, 15, 3), 2) - affine[:3, :3] @ (np.array([x, y, z]) - 1) / 2
    return (x, y, z), affine


def _thickness(spacing_mm: float) -> int:
    return max(2, round(_THICK_MM / spacing_mm))


def map_to_template(seed: int, index: int, shape: tuple[int, int, int], spacing_mm: float) -> np.ndarray:
    """[3, X, Y, Z] float32: for every voxel of a subject, the point of the template in mm; smooth, without folds."""
    rng = seeds.stream(seed, "phantom.shape", index)
    person = _draw_person(seed, index)
    maps, affine = tissue_maps(spacing_mm)
    centre = affine[:3, :3] @ ((np.array(maps.shape[1:]) - 1) / 2) + affine[:3, 3]
    half = (np.array(shape) - 1) / 2
    points = np.stack(np.meshgrid(*(np.arange(n) - h for n, h in zip(shape, half)), indexing="ij")) * spacing_mm
    points = points.astype(np.float32)
    points += deform.random_displacement(rng, shape, spacing_mm, knots_mm=42, strength=0.5)
    points += deform.random_displacement(rng, shape, spacing_mm, knots_mm=15, strength=0.4)
    inverse = np.linalg.inv(deform.random_affine(rng, person.scale)).astype(np.float32)
    return np.einsum("ij,jxyz->ixyz", inverse, points) + centre.astype(np.float32)[:, None, None, None]


def _anatomy(person: _Person, points_mm: np.ndarray, spacing_mm: float) -> Anatomy:
    """The bent template, with sulci that have opened at the cost of the cortex."""
    young = template.bent(points_mm, spacing_mm, person.widening_mm)
    fluid = ndimage.gaussian_filter(young.csf, 2.0 / spacing_mm)
    lost = young.grey * np.clip(2.2 * person.atrophy * fluid, 0, 0.8)
    return Anatomy(young.csf + lost, young.grey - lost, young.white, young.ventricle_mm)


def _lesions(
    seed: int, index: int, person: _Person, anatomy: Anatomy, spacing_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """([X, Y, Z] membership 0..1, [X, Y, Z] strength), kept out of the ventricles and the cortex."""
    rng = seeds.stream(seed, "phantom.lesions", index)
    drawn = lesions.draw(rng, person.lesion_count, anatomy.white, anatomy.ventricle_mm, spacing_mm)
    membership, strength = lesions.paint(drawn, rng, anatomy.white.shape, spacing_mm)
    lining = anatomy.grey * (anatomy.ventricle_mm < 5)  # the template shows the ventricles' wall as grey matter
    return membership * np.clip(1.6 * (anatomy.white + lining), 0, 1), strength


def _flair_distractors(rng: np.random.Generator, person: _Person, anatomy: Anatomy, spacing_mm: float) -> np.ndarray:
    """[X, Y, Z] float32 added to a FLAIR: bright like lesions, but no lesions.

    A band along the ventricles' wall, patches of bright cortex, fluid that pulsates, and hazy white matter with age.
    """
    shape = anatomy.white.shape
    wall = np.exp(-((np.maximum(anatomy.ventricle_mm, 0) / 2.0) ** 2)) * (1 - anatomy.csf)
    band = rng.uniform(0.1, 0.35) * wall * (1 + 0.6 * deform.random_field(rng, shape, spacing_mm, 15))
    cortex = rng.uniform(0.3, 0.8) * anatomy.grey * np.maximum(deform.random_field(rng, shape, spacing_mm, 22) - 0.15, 0)
    flow = 1.6 * anatomy.csf * np.maximum(deform.random_field(rng, shape, spacing_mm, 28) - 0.35, 0)
    haze = (0.03 + 0.12 * person.aged) * anatomy.white * np.exp(-np.maximum(anatomy.ventricle_mm, 0) / 9)
    return band + cortex + flow + haze


def _scan(
    seed: int, index: int, contrast: str, person: _Person, anatomy: Anatomy, lesion: tuple[np.ndarray, np.ndarray],
    spacing_mm: float,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """([X, Y, Z] float32 signal times gain, not yet noisy; [X, Y, Z] head): tissues, lesions, texture, blur and bias."""
    rng = seeds.stream(seed, f"phantom.scan.{contrast}", index)
    shape = anatomy.white.shape
    csf, grey, white, damaged = np.array(_SIGNALS[contrast]) * np.clip(rng.normal(1, 0.035, 4), 0.9, 1.1)
    white += 0.15 * person.aged * (grey - white)  # contrast fades with age
    membership, strength = lesion
    signal = csf * anatomy.csf + grey * anatomy.grey + white * anatomy.white
    signal *= 1 + 0.05 * deform.random_field(seeds.stream(seed, "phantom.texture", index), shape, spacing_mm, 9)
    if contrast == "flair":
        signal += _flair_distractors(rng, person, anatomy, spacing_mm)
    signal += membership * (white + strength * (damaged - white) - signal)
    signal = ndimage.gaussian_filter(signal, rng.uniform(0.6, 1.0) / max(spacing_mm, 1.0) ** 0.5 * 0.55)
    bias = _BIAS[contrast] * deform.random_field(rng, shape, spacing_mm, 95)
    gain = 600 * float(rng.lognormal(0, 0.35))
    return (gain * signal * np.exp(bias)).astype(np.float32), np.array(gain * _NOISE[contrast])


def _noisy(rng: np.random.Generator, signal: np.ndarray, sigma: float, head: np.ndarray) -> np.ndarray:
    """A magnitude image (Rician noise), 0 outside the head."""
    real, imaginary = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + real, imaginary) * head
