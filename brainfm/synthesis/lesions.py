"""White-matter lesions: drawn as a list, then painted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brainfm.synthesis.deform import random_field


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
