"""A synthetic cohort with known truth: brains that differ, in three contrasts, most of them with white-matter lesions.

The anatomy is the ICBM152 template, bent smoothly for every subject; the images are tissue probabilities times tissue
intensities, then what a scanner adds. Nothing here is a person's scan. It is made to take every step of brainfm on any
machine and to be hard enough that a threshold does not solve it; scores on it say nothing about patients.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from brainfm import seeds
from brainfm.imaging import nifti
from brainfm.imaging.atlas import tissue_maps
from brainfm.synthesis import deform, lesions, template
from brainfm.synthesis.template import Anatomy
from brainfm.volume import Volume

__all__ = ["CONTRASTS", "SyntheticSubject", "subject", "tissue_maps", "write_cohort"]

CONTRASTS = {"t1": "T1w", "t2": "T2w", "flair": "FLAIR"}  # and how their files end

# Signal of CSF, grey matter, white matter and a lesion: the order that relaxation times give at usual settings.
_SIGNALS = {
    "t1": (0.26, 0.66, 1.00, 0.74),
    "t2": (1.00, 0.62, 0.44, 0.70),
    "flair": (0.16, 0.72, 0.55, 0.92),
}
_NOISE = {"t1": 0.025, "t2": 0.030, "flair": 0.035}  # standard deviation of each channel, in the same units
_BIAS = {"t1": 0.22, "t2": 0.18, "flair": 0.33}  # largest logarithm of the multiplicative field
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
    if _is_thick(index):
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


@dataclass(frozen=True)
class _Truth:
    """What all scans of a subject show.

    Attributes:
        person: age and its marks.
        anatomy: tissues on the subject's grid.
        membership: [X, Y, Z] float32, how much of a voxel is lesion.
        strength: [X, Y, Z] float32, contrast of that lesion, 1 on average.
        texture: [X, Y, Z] float32 in -1..1, how the composition of tissue differs from place to place.
        spacing_mm: of the grid.
    """

    person: _Person
    anatomy: Anatomy
    membership: np.ndarray
    strength: np.ndarray
    texture: np.ndarray
    spacing_mm: float

    def field(self, rng: np.random.Generator, knots_mm: float) -> np.ndarray:
        """[X, Y, Z] float32 in -1..1."""
        return deform.random_field(rng, self.texture.shape, self.spacing_mm, knots_mm)


def _truth(seed: int, index: int, shape: tuple[int, int, int], spacing_mm: float) -> _Truth:
    person = _draw_person(seed, index)
    young = template.bent(map_to_template(seed, index, shape, spacing_mm), spacing_mm, person.widening_mm)
    fluid = ndimage.gaussian_filter(young.csf, 2.0 / spacing_mm)
    lost = young.grey * np.clip(2.2 * person.atrophy * fluid, 0, 0.8)  # sulci open at the cost of the cortex
    anatomy = Anatomy(young.csf + lost, young.grey - lost, young.white, young.ventricle_mm)
    rng = seeds.stream(seed, "phantom.lesions", index)
    drawn = lesions.draw(rng, person.lesion_count, anatomy.white, anatomy.ventricle_mm, spacing_mm)
    membership, strength = lesions.paint(drawn, rng, shape, spacing_mm)
    lining = anatomy.grey * (anatomy.ventricle_mm < 5)  # the template shows the ventricles' wall as grey matter
    membership *= np.clip(1.6 * (anatomy.white + lining), 0, 1)  # keeps out of ventricles and cortex
    texture = deform.random_field(seeds.stream(seed, "phantom.texture", index), shape, spacing_mm, 9)
    return _Truth(person, anatomy, membership, strength, texture, spacing_mm)


def _flair_distractors(rng: np.random.Generator, truth: _Truth) -> np.ndarray:
    """[X, Y, Z] float32 added to a FLAIR: bright like lesions, but no lesions.

    A band along the ventricles' wall, patches of bright cortex, fluid that pulsates, and hazy white matter with age.
    """
    anatomy = truth.anatomy
    from_wall_mm = np.maximum(anatomy.ventricle_mm, 0)
    band = np.exp(-((from_wall_mm / 2) ** 2)) * (1 - anatomy.csf) * (1 + 0.6 * truth.field(rng, 15))
    cortex = anatomy.grey * np.maximum(truth.field(rng, 22) - 0.15, 0)
    flow = anatomy.csf * np.maximum(truth.field(rng, 28) - 0.3, 0)
    haze = (0.03 + 0.12 * truth.person.aged) * anatomy.white * np.exp(-from_wall_mm / 9)
    return rng.uniform(0.1, 0.35) * band + rng.uniform(0.4, 1.0) * cortex + 2 * flow + haze


def _signal(rng: np.random.Generator, contrast: str, truth: _Truth) -> np.ndarray:
    """[X, Y, Z] float32, white matter of a T1 is about 1: tissues, their texture, lesions, blur and bias field."""
    csf, grey, white, damaged = np.array(_SIGNALS[contrast]) * np.clip(rng.normal(1, 0.035, 4), 0.9, 1.1)
    white += 0.15 * truth.person.aged * (grey - white)  # contrast fades with age
    anatomy = truth.anatomy
    signal = csf * anatomy.csf + grey * anatomy.grey + white * anatomy.white
    signal *= 1 + 0.05 * truth.texture
    if contrast == "flair":
        signal += _flair_distractors(rng, truth)
    signal += truth.membership * (white + truth.strength * (damaged - white) - signal)
    blurred = ndimage.gaussian_filter(signal, rng.uniform(0.3, 0.5) / truth.spacing_mm**0.5)
    return (blurred * np.exp(_BIAS[contrast] * truth.field(rng, 95))).astype(np.float32)


def _thickened(array: np.ndarray, affine: np.ndarray, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of every few slices along Z, float32, and the affine of the thick ones."""
    x, y, z = array.shape
    thick_affine = affine.copy()
    thick_affine[:3, 2] *= slices
    thick_affine[:3, 3] += affine[:3, 2] * (slices - 1) / 2
    return array.reshape(x, y, z // slices, slices).mean(-1, dtype=np.float32), thick_affine


def _magnitude(rng: np.random.Generator, signal: np.ndarray, noise: float, head: np.ndarray) -> np.ndarray:
    """A magnitude image (Rician noise), 0 outside the head."""
    real, imaginary = np.float32(noise) * rng.standard_normal((2, int(head.sum())), dtype=np.float32)
    image = np.zeros(signal.shape, dtype=np.float32)
    image[head] = np.hypot(signal[head] + real, imaginary)
    return image


def subject(seed: int, index: int, spacing_mm: float) -> SyntheticSubject:
    """One subject; it depends on these three values alone, not on how many others are made.

    Args:
        seed: of the cohort.
        index: of the subject, from 0.
        spacing_mm: edge length of the voxels, 0.5 to 6 mm; about 2 gives scans of 86 x 102 x 88 voxels.

    Raises:
        ConfigError: where nilearn is not installed, or the spacing is out of range.
    """
    shape, affine = _grid(seed, index, spacing_mm)
    truth = _truth(seed, index, shape, spacing_mm)
    head = truth.anatomy.head
    scans = {}
    for contrast in CONTRASTS:
        rng = seeds.stream(seed, f"phantom.scan.{contrast}", index)
        signal, inside, grid = _signal(rng, contrast, truth), head, affine
        if contrast == "flair" and _is_thick(index):
            slices = _thickness(spacing_mm)
            inside = _thickened(head, affine, slices)[0] > 0.5
            signal, grid = _thickened(signal, affine, slices)
        gain = np.float32(600 * np.clip(rng.lognormal(0, 0.35), 0.4, 2.5))
        scans[contrast] = Volume(gain * _magnitude(rng, signal, _NOISE[contrast], inside), grid)
    lesion = ((truth.membership > 0.5) & head).astype(np.uint8)
    return SyntheticSubject(
        scans, Volume(lesion, affine), Volume(truth.anatomy.labels, affine), truth.person.age_years, truth.person.sex
    )


def _is_thick(index: int) -> bool:
    return index % _THICK_EVERY == _THICK_EVERY - 1


def _write_subject(root: Path, name: str, person: SyntheticSubject, axes: str) -> None:
    folder = root / name / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    volumes = {CONTRASTS[contrast]: volume for contrast, volume in person.scans.items()}
    for ending, volume in {**volumes, "lesion_mask": person.lesion}.items():
        if ending != "lesion_mask":  # as scanners store it
            volume = Volume(np.clip(np.rint(volume.voxels), -32768, 32767).astype(np.int16), volume.affine_mm)
        nifti.write(folder / f"{name}_{ending}.nii.gz", volume, axes)


def write_cohort(
    root: Path, subjects: int, seed: int, spacing_mm: float, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a cohort as a folder in the manner of BIDS.

    ``sub-001/anat/sub-001_{T1w,T2w,FLAIR}.nii.gz``, beside them ``sub-001_lesion_mask.nii.gz`` on the grid of the T1,
    and at the root ``participants.tsv`` (participant_id, age, sex, healthy) and ``dataset_description.json``. Files
    differ in orientation; every 6th FLAIR has thick slices; every 7th subject has no lesion.

    Args:
        root: made if it does not exist; files of the same names are replaced.
        subjects: how many, at least 1.
        seed: the same seed gives the same files.
        spacing_mm: edge length of the voxels.
        progress: called with (subjects written, subjects).

    Raises:
        ConfigError: as `subject`.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(subjects):
        name = f"sub-{index + 1:03d}"
        person = subject(seed, index, spacing_mm)
        _write_subject(root, name, person, _ORIENTATIONS[index % len(_ORIENTATIONS)])
        rows.append((name, f"{person.age_years:.1f}", person.sex, int(not person.lesion.voxels.any())))
        if progress is not None:
            progress(index + 1, subjects)
    with open(root / "participants.tsv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerows([("participant_id", "age", "sex", "healthy"), *rows])
    description = {
        "Name": "brainfm synthetic cohort",
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "License": "CC0",
        "HowToAcknowledge": "Made by brainfm from the ICBM152 2009a template; not a person's data.",
        "GeneratedBy": [{"Name": "brainfm", "Description": f"{subjects} subjects, seed {seed}, {spacing_mm} mm"}],
    }
    (root / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
