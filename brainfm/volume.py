"""A volume: voxels and the affine that says where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Volume:
    """Voxels on a right-handed grid whose axes run, as nearly as the scan allows, to the Right, Anterior and Superior.

    Attributes:
        voxels: [X, Y, Z] array of any real dtype.
        affine_mm: [4, 4] float64; takes voxel indices to scanner coordinates in mm (RAS+). Oblique grids are legal.

    Raises:
        ValueError: where the array is not 3D or empty, or the affine is not finite, is singular, or is not RAS+.
    """

    voxels: np.ndarray
    affine_mm: np.ndarray

    def __post_init__(self) -> None:
        if self.voxels.ndim != 3 or 0 in self.voxels.shape:
            raise ValueError(f"a volume has three axes with at least one voxel each, found shape {self.voxels.shape}")
        affine = np.array(self.affine_mm, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"an affine is a finite [4, 4] matrix, found shape {affine.shape}")
        if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError("the affine is singular: a voxel has no extent along some axis")
        if not is_ras(affine):
            raise ValueError("the voxel axes do not run to the Right, Anterior and Superior")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_mm", affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.voxels.shape

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return spacing_of(self.affine_mm)


def spacing_of(affine_mm: np.ndarray) -> tuple[float, float, float]:
    """The edge lengths of a voxel in mm: the column norms of the affine."""
    x, y, z = np.linalg.norm(np.asarray(affine_mm, dtype=np.float64)[:3, :3], axis=0)
    return float(x), float(y), float(z)


def is_ras(affine_mm: np.ndarray) -> bool:
    """Whether no permutation or flip of axes would bring the grid nearer to RAS+.

    The test is the diagonal of the direction cosines made orthogonal (polar decomposition), the same rule by which
    a file's axes are assigned when it is read.
    """
    directions = np.asarray(affine_mm, dtype=np.float64)[:3, :3]
    norms = np.linalg.norm(directions, axis=0)
    if (norms == 0).any():
        return False
    u, _, vt = np.linalg.svd(directions / norms)
    rotation = u @ vt
    left = np.abs(rotation)
    for axis in np.argsort(-left.max(axis=0), kind="stable"):  # the surest axis first, as nibabel's io_orientation does
        # At 45 degrees two answers are equally near; either is accepted.
        if left[axis, axis] < left[:, axis].max() - 1e-6 or rotation[axis, axis] <= 0:
            return False
        left[axis, :] = 0
    return True
