"""A head with a bright marker on the left, drawn in scanner space and sampled on any grid."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np

CENTRE_MM = np.array([4.0, -6.0, 10.0])
RADII_MM = np.array([62.0, 76.0, 58.0])
MARKER_MM = np.array([-28.0, 8.0, 22.0])  # on the left: x < 0
MARKER_RADIUS_MM = 13.0


def rotation(degrees: float, axis: int) -> np.ndarray:
    a, b = (i for i in range(3) if i != axis)
    matrix = np.eye(3)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


OBLIQUE = rotation(17, 0) @ rotation(-9, 1) @ rotation(23, 2)

# name -> (columns of the affine in mm, shape)
GRIDS: dict[str, tuple[np.ndarray, tuple[int, int, int]]] = {
    "ras": (np.diag([2.0, 2.0, 2.0]), (66, 80, 62)),
    "lps": (np.diag([-2.0, -2.0, 2.0]), (66, 80, 62)),
    "sagittal_pir": (np.array([[0, 0, 2.2], [-2.0, 0, 0], [0, -2.0, 0]]), (80, 62, 60)),
    "oblique": (OBLIQUE @ np.diag([2.0, 2.0, 2.5]), (72, 86, 56)),
    "oblique_lps": (OBLIQUE @ np.diag([-2.0, -2.0, 2.0]), (72, 86, 66)),
    "anisotropic": (np.diag([1.1, 2.4, 3.0]), (120, 66, 42)),
    "thick_slice": (np.diag([-1.2, -1.2, 6.0]), (110, 134, 22)),
}


def affine_of(name: str) -> np.ndarray:
    columns, shape = GRIDS[name]
    affine = np.eye(4)
    affine[:3, :3] = columns
    affine[:3, 3] = CENTRE_MM - columns @ ((np.array(shape) - 1) / 2)
    return affine


def places_mm(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def draw(affine: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(image, marker) on a grid."""
    places = places_mm(affine, shape)
    inside = (((places - CENTRE_MM) / RADII_MM) ** 2).sum(-1) < 1
    marker = ((places - MARKER_MM) ** 2).sum(-1) < MARKER_RADIUS_MM**2
    texture = 100 + 8 * np.sin(places / 9).sum(-1)
    return (inside * texture + 200 * marker).astype(np.float32), marker


def write(path: Path, name: str, voxels: np.ndarray | None = None, sform: int = 2, qform: int = 1) -> np.ndarray:
    """Writes a head (or other voxels) on one of the grids; returns the marker in the file's axes."""
    affine, shape = affine_of(name), GRIDS[name][1]
    image, marker = draw(affine, shape)
    file = nib.Nifti1Image(image if voxels is None else voxels, affine)
    file.set_sform(affine, sform)
    file.set_qform(affine, qform)
    nib.save(file, path)
    return marker
