"""Small awkward NIfTI files: one head, always at the same place in the scanner, with a bright marker on its left.

Every writer takes a path and a numpy Generator. `READABLE` can be read, `REFUSED` cannot.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

MARKER_MM = (-20.0, 6.0, 4.0)  # on the left, a little to the front and above the centre
_MARKER_RADIUS_MM = 8.0
_HEAD_RADII_MM = (34.0, 40.0, 32.0)

Writer = Callable[[Path, np.random.Generator], None]


def world_mm(shape: tuple[int, ...], affine_mm: np.ndarray) -> np.ndarray:
    """[*shape, 3]: where each voxel centre lies."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape[:3]], indexing="ij"), axis=-1)
    return index @ affine_mm[:3, :3].T + affine_mm[:3, 3]


def marker(shape: tuple[int, ...], affine_mm: np.ndarray) -> np.ndarray:
    """bool: the marker on any grid."""
    return np.linalg.norm(world_mm(shape, affine_mm) - MARKER_MM, axis=-1) < _MARKER_RADIUS_MM


def head(shape: tuple[int, ...], affine_mm: np.ndarray, rng: np.random.Generator, noise: float = 2.0) -> np.ndarray:
    """float32: zero outside an ellipsoid, about 100 inside, 300 in the marker."""
    inside = (np.square(world_mm(shape, affine_mm) / _HEAD_RADII_MM).sum(axis=-1)) < 1
    voxels = inside * (100 + noise * rng.standard_normal(shape))
    voxels[marker(shape, affine_mm)] = 300
    return voxels.astype(np.float32)


def centred(directions: np.ndarray, spacing_mm: tuple[float, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The affine whose field of view has its middle at the scanner's origin."""
    affine = np.eye(4)
    affine[:3, :3] = directions * np.array(spacing_mm)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def rotation(about_x: float, about_z: float) -> np.ndarray:
    """[3, 3] for two angles in degrees."""
    a, b = np.deg2rad([about_x, about_z])
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return z @ x


def axes(codes: str) -> np.ndarray:
    """[3, 3] directions for nibabel axis codes such as "LPS"."""
    return nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (1, 1, 1))[:3, :3].T


def write(
    path: Path,
    voxels: np.ndarray,
    affine_mm: np.ndarray,
    codes: tuple[int, int] = (1, 1),
    dtype: type = np.float32,
) -> nib.Nifti1Image:
    """A plain file; `codes` are those of sform and qform."""
    image = nib.Nifti1Image(voxels.astype(dtype), None)
    image.set_sform(affine_mm, codes[0])
    image.set_qform(affine_mm, codes[1])
    nib.save(image, path)
    return image


def _on_grid(
    directions: np.ndarray, spacing_mm: tuple[float, ...], shape: tuple[int, ...], **options: object
) -> Writer:
    def writer(path: Path, rng: np.random.Generator) -> None:
        affine = centred(directions, spacing_mm, shape)
        write(path, head(shape, affine, rng), affine, **options)  # type: ignore[arg-type]

    return writer


_SHAPE = (40, 48, 36)
_RAS_MM = centred(np.eye(3), (2, 2, 2), _SHAPE)


def disagreeing(path: Path, rng: np.random.Generator) -> None:
    """The sform is right; the qform lies 10 mm off."""
    image = write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM)
    wrong = _RAS_MM.copy()
    wrong[0, 3] += 10
    image.set_qform(wrong, 1)
    nib.save(image, path)


def singular_sform(path: Path, rng: np.random.Generator) -> None:
    """The sform is all zero though its code is set; the qform is right."""
    image = write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM)
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = 0
    _save_raw(path, image)


def zero_pixdim(path: Path, rng: np.random.Generator) -> None:
    """Voxel sizes of zero beside a sound sform."""
    image = write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM, codes=(1, 0))
    image.header["pixdim"][1:4] = 0
    _save_raw(path, image)


def negative_pixdim(path: Path, rng: np.random.Generator) -> None:
    """A voxel size below zero beside a sound sform."""
    image = write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM, codes=(1, 0))
    image.header["pixdim"][2] = -1.5
    _save_raw(path, image)


def no_geometry(path: Path, rng: np.random.Generator) -> None:
    """Neither sform nor qform, and voxel sizes of zero."""
    image = write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM, codes=(0, 0))
    image.header["pixdim"][1:4] = 0
    _save_raw(path, image)


def trailing_axis(path: Path, rng: np.random.Generator) -> None:
    """A fourth axis of length one."""
    write(path, head(_SHAPE, _RAS_MM, rng)[..., None], _RAS_MM)


def scaled(path: Path, rng: np.random.Generator) -> None:
    """int16 with slope and intercept."""
    image = nib.Nifti1Image(np.rint((head(_SHAPE, _RAS_MM, rng) + 10) / 0.05).astype(np.int16), _RAS_MM)
    image.header.set_slope_inter(0.05, -10)
    nib.save(image, path)


def big_endian(path: Path, rng: np.random.Generator) -> None:
    """int16 with the bytes the other way round."""
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    nib.save(nib.Nifti1Image(head(_SHAPE, _RAS_MM, rng).astype(np.int16), _RAS_MM, header), path)


def _with_nan(share: float) -> Writer:
    def writer(path: Path, rng: np.random.Generator) -> None:
        voxels = head(_SHAPE, _RAS_MM, rng)
        edge = max(1, round(share * _SHAPE[0]))
        voxels[:edge] = np.nan if share > 0.01 else voxels[:edge]
        voxels[0, 0, :3] = np.nan, np.inf, -np.inf
        write(path, voxels, _RAS_MM)

    return writer


def constant(path: Path, rng: np.random.Generator) -> None:
    write(path, np.full(_SHAPE, 7.0), _RAS_MM)


def four_d(path: Path, rng: np.random.Generator) -> None:
    write(path, np.stack([head(_SHAPE, _RAS_MM, rng)] * 3, axis=-1), _RAS_MM)


def rgb(path: Path, rng: np.random.Generator) -> None:
    voxels = np.zeros(_SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(voxels, _RAS_MM), path)


def complex_valued(path: Path, rng: np.random.Generator) -> None:
    write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM, dtype=np.complex64)


def truncated(path: Path, rng: np.random.Generator) -> None:
    """A copy that broke off, as after a full disk."""
    write(path, head(_SHAPE, _RAS_MM, rng), _RAS_MM)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def _save_raw(path: Path, image: nib.Nifti1Image) -> None:
    """Save without nibabel mending the header."""
    header = image.header.copy()
    header["magic"], header["vox_offset"] = b"n+1", 352
    content = header.binaryblock + b"\0" * 4 + np.asarray(image.dataobj).tobytes(order="F")
    if path.name.endswith(".gz"):
        content = gzip.compress(content)
    path.write_bytes(content)


READABLE: dict[str, Writer] = {
    "ras": _on_grid(np.eye(3), (2, 2, 2), _SHAPE),
    "lps": _on_grid(axes("LPS"), (2, 2, 2), _SHAPE),
    "psr": _on_grid(axes("PSR"), (2, 2, 2), (48, 36, 40)),
    "left_handed": _on_grid(axes("LAS"), (2, 2, 2), _SHAPE),
    "qform_only": _on_grid(axes("LPS"), (2, 2, 2), _SHAPE, codes=(0, 1)),
    "whole_numbers": _on_grid(axes("LPS"), (2, 2, 2), _SHAPE, dtype=np.int16),
    "oblique": _on_grid(rotation(12, 20) @ axes("LPS"), (2, 2, 2), (44, 52, 44)),
    "anisotropic": _on_grid(axes("LAS"), (1.5, 1.1, 3), (56, 80, 26)),
    "thick_slices": _on_grid(rotation(8, 0), (1, 1, 5), (80, 90, 18)),
    "disagreeing": disagreeing,
    "singular_sform": singular_sform,
    "zero_pixdim": zero_pixdim,
    "negative_pixdim": negative_pixdim,
    "trailing_axis": trailing_axis,
    "scaled": scaled,
    "big_endian": big_endian,
    "few_nan": _with_nan(0.0),
    "constant": constant,
}

REFUSED: dict[str, Writer] = {
    "many_nan": _with_nan(0.1),
    "four_d": four_d,
    "rgb": rgb,
    "complex": complex_valued,
    "truncated": truncated,
    "no_geometry": no_geometry,
}
