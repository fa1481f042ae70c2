"""Lesions: a synthetic subject's white-matter lesions, and lesions inserted into patches of healthy scans.

Both are drawn first and painted afterwards: all randomness is in the drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from brainfm.synthesis.deform import random_field
from brainfm.synthesis.shapes import FEWEST_VOXELS, Shapes, resized


@dataclass(frozen=True)
class Lesion:
    """One irregular ellipsoid.

    Attributes:
        centre_vox: [3] voxel indices.
        axes: [3, 3] orthonormal columns, the longest axis first.
        radii_mm: [3] half-lengths along the axes.
        strength: of its contrast to white matter, 1 on average.
        rim_mm: width over which it fades into its surroundings.
    """

    centre_vox: np.ndarray
    axes: np.ndarray
    radii_mm: np.ndarray
    strength: float
    rim_mm: float


def _axes(rng: np.random.Generator, first: np.ndarray) -> np.ndarray:
    """A random right-handed frame whose first column is near the given direction (any length, 0 for any direction)."""
    size = float(np.linalg.norm(first))
    toward = first / size if size > 1e-6 else np.zeros(3)
    q, _ = np.linalg.qr(np.column_stack([toward + 0.35 * rng.standard_normal(3), rng.standard_normal((3, 2))]))
    return q


def draw(
    rng: np.random.Generator, count: int, white: np.ndarray, ventricle_mm: np.ndarray, spacing_mm: float
) -> list[Lesion]:
    """Lesions of a subject: two thirds beside the ventricles, standing out from their wall, the others deep.

    Args:
        rng: where they come from.
        count: how many.
        white: [X, Y, Z] probability of white matter.
        ventricle_mm: [X, Y, Z] distance to the lateral ventricles.
        spacing_mm: of the grid.
    """
    near = np.argwhere((white > 0.6) & (ventricle_mm > 1) & (ventricle_mm < 6))
    deep = np.argwhere((white > 0.9) & (ventricle_mm >= 9) & (ventricle_mm < 30))
    lesions = []
    for _ in range(count):
        beside = bool(rng.random() < 0.65)
        places = near if beside and len(near) else deep
        if not len(places):
            continue
        centre = places[rng.integers(len(places))]
        box = tuple(slice(max(c - 1, 0), c + 2) for c in centre)
        patch = ventricle_mm[box]
        wall = np.array([np.gradient(patch, axis=a).mean() if patch.shape[a] > 1 else 0.0 for a in range(3)])
        longest = float(np.clip(rng.lognormal(np.log(8.5 if beside else 6.0), 0.38), 4.0, 18))
        thin = rng.uniform(0.5, 0.9, 2) if beside else rng.uniform(0.7, 1.0, 2)
        radii = np.maximum(longest * np.array([1.0, *thin]), 1.1 * spacing_mm)
        axes = _axes(rng, wall if beside else np.zeros(3))
        strength = float(np.clip(rng.normal(0.7, 0.2), 0.35, 1.2))
        lesions.append(Lesion(centre.astype(float), axes, radii, strength, float(rng.uniform(0.8, 2.2))))
    return lesions


def paint(
    lesions: list[Lesion], rng: np.random.Generator, shape: tuple[int, ...], spacing_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """([X, Y, Z] membership 0..1, [X, Y, Z] strength): the border is bent by a random field, lesions may flow together.

    A voxel belongs to the lesion where its membership is above one half; its contrast is membership times strength.
    """
    bent = random_field(rng, shape, spacing_mm, 4.5) + random_field(rng, shape, spacing_mm, 9.0)
    membership = np.zeros(shape, dtype=np.float32)
    contrast = np.zeros(shape, dtype=np.float32)
    for lesion in lesions:
        reach = np.ceil((1.6 * lesion.radii_mm.max() + 2 * lesion.rim_mm) / spacing_mm).astype(int)
        low = np.maximum(np.round(lesion.centre_vox).astype(int) - reach, 0)
        high = np.minimum(np.round(lesion.centre_vox).astype(int) + reach + 1, shape)
        box = tuple(slice(a, b) for a, b in zip(low, high))
        offset_mm = spacing_mm * (np.moveaxis(np.mgrid[box], 0, -1) - lesion.centre_vox)
        radius = np.linalg.norm((offset_mm @ lesion.axes) / lesion.radii_mm, axis=-1)
        inside_mm = (1 - radius + 0.6 * bent[box]) * lesion.radii_mm.mean()
        new = 1 / (1 + np.exp(np.clip(-4 * inside_mm / lesion.rim_mm, -30, 30)))
        membership[box] = np.maximum(membership[box], new)
        contrast[box] = np.maximum(contrast[box], new * lesion.strength)
    return membership, contrast / np.maximum(membership, 1e-6)


# ---- on healthy tissue -----------------------------------------------------------------------------------------------

# How far a lesion's intensity lies from its surroundings, in standard deviations of healthy tissue at strength 1.
# What depends on the lesion (adc, md, dwi, t1c) is settled in `_shift`.
_SHIFTS = {
    "t1": -0.8, "t1c": -0.8, "t2": 1.0, "flair": 1.2, "pd": 0.7, "t2s": 0.9, "swi": -0.8, "minip": -0.8,
    "dwi": 1.3, "adc": 0.9, "md": 0.9, "fa": -0.9, "t1map": 0.9, "t2map": 1.0,
}  # fmt: skip
_MOST_SHARE = 0.12  # of the patch's tissue that one lesion may take
_LEAST_INSIDE = 0.5  # of a shape that must fall on tissue within the patch
_TRIES = 6
_TAIL = 2.5  # standard deviations at which a rim ends
_RING_MM = 2.0  # blur that leaves an enhancing ring
_LEAST_UNIT = 0.2  # of a standardised scan: lesions show even where the tissue is flat


@dataclass(frozen=True)
class Inserted:
    """One lesion of an insertion, in a box of the patch.

    Attributes:
        start_vox: the box's corner.
        inside: [x, y, z] bool: what counts as lesion.
        weight: [x, y, z] float32 0..1: the lesion and its soft rim, which ends one voxel outside the tissue.
        texture: [x, y, z] float32, about 0: how the shift varies, as a part of it.
        core: [x, y, z] float32 0..1: 1 deep inside, 0 at the border; None where no ring enhances.
        strength: factor of the shift, 1 on average.
    """

    start_vox: tuple[int, int, int]
    inside: np.ndarray
    weight: np.ndarray
    texture: np.ndarray
    core: np.ndarray | None
    strength: float

    @property
    def box(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + n) for s, n in zip(self.start_vox, self.inside.shape))


@dataclass(frozen=True)
class Insertion:
    """Lesions of one subject within a patch: the same for every scan of that place.

    Attributes:
        lesions: one to three.
        acute: bright on dwi and dark on adc; else bright on adc and faintly so on dwi.
        enhancing: on t1c: ``none``, ``solid`` or ``ring``.
        unknown_sign: of the shift where the contrast does not tell it, 1 or -1.
        levelling: 0..1, how much of the tissue's own structure the lesion wipes out.
    """

    lesions: tuple[Inserted, ...]
    acute: bool
    enhancing: str
    unknown_sign: int
    levelling: float

    def mask(self, patch_vox: Sequence[int]) -> np.ndarray:
        """What counts as lesion: bool [X, Y, Z] of this size, which is the tissue's when it was drawn."""
        mask = np.zeros(tuple(patch_vox), dtype=bool)
        for lesion in self.lesions:
            mask[lesion.box] |= lesion.inside
        return mask


def draw_insertion(
    rng: np.random.Generator,
    shapes: Shapes,
    tissue: np.ndarray,
    patch_vox: Sequence[int],
    spacing_mm: float | Sequence[float],
    most: int = 3,
) -> Insertion | None:
    """Lesions for a patch of healthy tissue, or None where there is no room for one.

    Args:
        rng: where everything random comes from.
        shapes: to choose from; they are turned by quarters, mirrored, scaled, and cut where the tissue ends.
        tissue: bool [X, Y, Z], where lesions may be.
        patch_vox: the shape of the patch, that of tissue.
        spacing_mm: of the patch.
        most: lesions; one to so many are tried.
    """
    size = tuple(int(n) for n in patch_vox)
    if tissue.shape != size:
        raise ValueError(f"tissue has shape {tissue.shape}, expected that of the patch, {size}")
    spacing = np.broadcast_to(np.asarray(spacing_mm, dtype=float), 3)
    room = int(np.count_nonzero(tissue))
    if room < FEWEST_VOXELS:
        return None
    acute = bool(rng.random() < 0.7)
    enhancing = str(rng.choice(["none", "solid", "ring"], p=[0.4, 0.25, 0.35]))
    sign = 1 if rng.random() < 0.5 else -1
    levelling = float(rng.uniform(0.2, 0.8))
    wanted = 1 + int(rng.binomial(most - 1, 0.3))
    lesions: list[Inserted] = []
    for _ in range(_TRIES * wanted):
        lesion = _draw_one(rng, shapes, tissue, room, spacing, enhancing == "ring")
        if lesion is not None:
            lesions.append(lesion)
        if len(lesions) == wanted:
            break
    return Insertion(tuple(lesions), acute, enhancing, sign, levelling) if lesions else None


def _draw_one(
    rng: np.random.Generator, shapes: Shapes, tissue: np.ndarray, room: int, spacing: np.ndarray, ring: bool
) -> Inserted | None:
    """A lesion, or None where the shape drawn does not fit at the place drawn."""
    shape = shapes[int(rng.integers(len(shapes)))].transpose(rng.permutation(3))
    shape = shape[tuple(slice(None, None, 1 if rng.random() < 0.5 else -1) for _ in range(3))]
    voxel_mm3 = float(np.prod(spacing))
    full = np.count_nonzero(shape) * shapes.spacing_mm**3 / voxel_mm3  # voxels of the patch at scale 1
    scale = float(np.clip(rng.lognormal(0, 0.25), 0.5, 1.6))
    scale = min(scale, (_MOST_SHARE * room / full) ** (1 / 3))
    centre = _place(rng, tissue)
    expected = full * scale**3
    if expected < FEWEST_VOXELS:
        return None
    radius_mm = (3 * expected * voxel_mm3 / (4 * np.pi)) ** (1 / 3)
    body = _bent(rng, resized(shape, spacing / (shapes.spacing_mm * scale)), min(2.0, 0.3 * radius_mm), spacing)
    corner = centre - np.array(body.shape) // 2  # of the body in the patch, perhaps outside of it
    low, high = np.maximum(corner, 0), np.minimum(corner + body.shape, tissue.shape)
    seen = body[_box(low - corner, high - corner)] & tissue[_box(low, high)]
    if np.count_nonzero(seen) < max(FEWEST_VOXELS, _LEAST_INSIDE * expected):
        return None
    sigma = min(float(rng.uniform(0.4, 1.6)), 0.35 * radius_mm) / spacing  # voxels
    margin = np.ceil(_TAIL * sigma).astype(int)
    start, stop = np.maximum(low - margin, 0), np.minimum(high + margin, tissue.shape)
    inside = np.zeros(tuple(stop - start), dtype=bool)
    inside[_box(low - start, high - start)] = seen
    weight = np.minimum(1.5 * _blurred(inside, sigma), 1)  # three quarters at the border: all of the mask is seen
    weight[~_neighbourhood(tissue[_box(start, stop)])] = 0
    core = np.clip(2 * _blurred(inside, _RING_MM / spacing) - 1, 0, 1) if ring else None
    texture = random_field(rng, inside.shape, float(spacing.min()), max(4.0, 2 * float(spacing.min())))
    uneven = float(rng.uniform(0.2, 0.8))
    strength = float(np.clip(rng.lognormal(-0.05, 0.35), 0.45, 2.2))
    return Inserted((int(start[0]), int(start[1]), int(start[2])), inside, weight, uneven * texture, core, strength)


def _place(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """[3] a random voxel of a mask that is not empty; looked for by trying, as listing all voxels takes longer."""
    tried = rng.integers(0, tissue.shape, size=(64, 3))
    hits = np.flatnonzero(tissue[tuple(tried.T)])
    if len(hits):
        return tried[hits[0]]
    places = np.argwhere(tissue)
    return places[int(rng.integers(len(places)))]


def _box(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high))


def _bent(rng: np.random.Generator, body: np.ndarray, sigma_mm: float, spacing: np.ndarray) -> np.ndarray:
    """bool, two voxels larger on every side: the body with its border moved by about so much, in or out.

    Masks drawn on thick slices have flat faces, which would tell an inserted lesion from a grown one.
    """
    soft = _blurred(np.pad(body, 2), sigma_mm / spacing)
    field = random_field(rng, soft.shape, float(spacing.min()), max(3 * sigma_mm, 2 * float(spacing.min())))
    return soft + 4 * soft * (1 - soft) * field > 0.5


def _blurred(mask: np.ndarray, sigma_vox: np.ndarray) -> np.ndarray:
    """float32: an array under a Gaussian that ends after 2.5 deviations; beyond the box its faces go on.

    A lesion that the patch cuts through so has no rim at the cut. Three products with banded matrices: on boxes of this
    size several times faster than a filter.
    """
    result = mask.astype(np.float32)
    for sigma in sigma_vox:  # each product moves the next axis to the front; after three the order is restored
        length = result.shape[0]
        steps = np.arange(-int(_TAIL * sigma), int(_TAIL * sigma) + 1)
        bell = np.exp(-0.5 * (steps / sigma) ** 2)
        source = np.clip(np.arange(length)[:, None] + steps, 0, length - 1)
        kernel = np.zeros((length, length))
        np.add.at(kernel, (source, np.arange(length)[:, None]), bell / bell.sum())
        result = np.tensordot(result, kernel.astype(np.float32), axes=(0, 0))
    return result


def _neighbourhood(mask: np.ndarray) -> np.ndarray:
    """The mask and the six neighbours of its voxels."""
    wide = mask.copy()
    for axis in range(3):
        ahead = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        behind = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        wide[ahead] |= mask[behind]
        wide[behind] |= mask[ahead]
    return wide


def insert(image: np.ndarray, contrast: str, insertion: Insertion, tissue: np.ndarray) -> np.ndarray:
    """The scan with the lesions in it; voxels that no rim reaches keep every bit.

    Inside, the tissue is drawn towards its mean there and shifted by so many standard deviations of the healthy tissue
    of the patch. The sign follows the contrast and, for one subject, agrees over all of them.

    Args:
        image: [X, Y, Z] float, standardised; not changed.
        contrast: a contrast of the manifest; one whose sign is not known takes the sign drawn for the subject.
        insertion: of this place.
        tissue: bool [X, Y, Z], the mask it was drawn with.

    Returns:
        [X, Y, Z] float32.
    """
    result = np.array(image, dtype=np.float32)
    coarse = (slice(None, None, 2),) * 3
    healthy = result[coarse][tissue[coarse]]
    unit = max(float(healthy.std()), _LEAST_UNIT) if healthy.size else _LEAST_UNIT
    for lesion in insertion.lesions:
        block = result[lesion.box]
        level = float(block[lesion.inside].mean())
        shift = unit * lesion.strength * _shift(contrast, insertion, lesion)
        block += lesion.weight * (insertion.levelling * (level - block) + shift * (1 + lesion.texture))
    return result


def _shift(contrast: str, insertion: Insertion, lesion: Inserted) -> float | np.ndarray:
    """In standard deviations of healthy tissue, at strength 1; an array where the core differs from the border."""
    known = _SHIFTS.get(contrast, insertion.unknown_sign * 1.0)
    if contrast in ("adc", "md"):
        return -known if insertion.acute else known
    if contrast == "dwi":
        return known if insertion.acute else 0.4 * known
    if contrast == "t1c" and insertion.enhancing == "solid":
        return 1.3
    if contrast == "t1c" and lesion.core is not None:
        return 1.3 + (known - 1.3) * lesion.core
    return known
