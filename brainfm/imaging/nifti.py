"""Scan files: read onto RAS+ axes without losing the way back, write label maps onto the grid of an input file.

Knows nibabel, as `imaging/formats` does, which says what is read. What is written is single-file NIfTI.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from brainfm.errors import ScanError
from brainfm.files import write_whole
from brainfm.imaging.formats import Opened, open_scan
from brainfm.volume import Volume, spacing_of

MAX_NON_FINITE = 0.01  # of the voxels; a scan with more has lost data, not a few divisions by zero
_FEW_SLICES = 8
_DISAGREEMENT_MM = 0.1  # header fields are float32, and programs round them in ways of their own
_DISAGREEMENT_VOX = 0.25  # where voxels are so small that 0.1 mm is much of one
_PLAUSIBLE_SPACING_MM = (0.1, 20.0)
_MM_IN = {1: 1000.0, 3: 0.001}  # codes of xyzt_units: metres, micrometres
_LONG_QUATERNION = 1e-3  # above a length of 1; less is rounding
_REACH = 2.0**60  # float32 can square and add up numbers of up to this size


@dataclass(frozen=True)
class FileGrid:
    """The grid of a file as it came.

    Attributes:
        shape_vox: in the file's own axis order.
        affine_mm: four rows of four; file indices to scanner mm (RAS+).
        orientation: per file axis, the RAS axis it runs along (0, 1, 2) and whether with it (1) or against it (-1).
        placed: whether the header says where the voxels are; else the affine is a guess of the voxel sizes.
    """

    shape_vox: tuple[int, int, int]
    affine_mm: tuple[tuple[float, ...], ...]
    orientation: tuple[tuple[int, int], ...]
    placed: bool = field(default=True, compare=False)  # of the file, not of the grid; kept in no record

    def to_ras(self, array: np.ndarray) -> np.ndarray:
        """A view of [..., file axes] as [..., X, Y, Z]: axes permuted and flipped, nothing else."""
        self._check(array, self.shape_vox)
        lead = array.ndim - 3
        turned = array[self._flips()]
        order = [0, 0, 0]
        for file_axis, (ras_axis, _) in enumerate(self.orientation):
            order[ras_axis] = lead + file_axis
        return turned.transpose(*range(lead), *order)

    def from_ras(self, array: np.ndarray) -> np.ndarray:
        """The inverse of to_ras: a view of [..., X, Y, Z] as [..., file axes]."""
        self._check(array, self.ras_shape())
        lead = array.ndim - 3
        turned = array.transpose(*range(lead), *(lead + ras_axis for ras_axis, _ in self.orientation))
        return turned[self._flips()]

    def ras_shape(self) -> tuple[int, int, int]:
        """The shape of the reoriented array."""
        shape = [0, 0, 0]
        for size, (ras_axis, _) in zip(self.shape_vox, self.orientation, strict=True):
            shape[ras_axis] = size
        return shape[0], shape[1], shape[2]

    def ras_affine(self) -> np.ndarray:
        """The affine [4, 4] float64 of the reoriented array."""
        source = np.array(self.affine_mm, dtype=np.float64)
        affine = np.eye(4)
        affine[:3, 3] = source[:3, 3]
        for file_axis, (ras_axis, flip) in enumerate(self.orientation):
            affine[:3, ras_axis] = flip * source[:3, file_axis]
            if flip < 0:
                affine[:3, 3] += source[:3, file_axis] * (self.shape_vox[file_axis] - 1)
        return affine

    def same_place(self, other: FileGrid) -> bool:
        """Whether both hold the same voxels, in whatever axis order they are stored.

        No corner may be further off than 0.1 mm, and a quarter of a voxel: what sform and qform of one file may. A
        guess never agrees with what a header says: in the middle of the same field it may be its mirror image.
        """
        if self.ras_shape() != other.ras_shape() or self.placed != other.placed:
            return False
        return self.apart_mm(other) <= min(_DISAGREEMENT_MM, _DISAGREEMENT_VOX * min(spacing_of(self.ras_affine())))

    def apart_mm(self, other: FileGrid) -> float:
        """How far the furthest corner voxel of this grid lies, along an axis, from where the other grid has it."""
        return _apart_mm(self.ras_affine(), other.ras_affine(), self.ras_shape())

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape_vox": list(self.shape_vox),
            "affine_mm": [list(row) for row in self.affine_mm],
            "orientation": [list(pair) for pair in self.orientation],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        x, y, z = (int(size) for size in values["shape_vox"])
        return cls(
            shape_vox=(x, y, z),
            affine_mm=tuple(tuple(float(v) for v in row) for row in values["affine_mm"]),
            orientation=tuple((int(axis), int(flip)) for axis, flip in values["orientation"]),
        )

    def _flips(self) -> tuple[Any, ...]:
        return (..., *(slice(None, None, flip) for _, flip in self.orientation))

    @staticmethod
    def _check(array: np.ndarray, shape: tuple[int, int, int]) -> None:
        if array.shape[-3:] != shape:
            raise ValueError(f"the last three axes are {array.shape[-3:]}, expected {shape}")


@dataclass(frozen=True)
class Header:
    """What a file says about itself, read without its voxels.

    Attributes:
        grid: the grid that `read` will use.
        dtype: of the stored numbers, before any scaling.
        spacing_mm: in the file's own axis order.
        faults: one line each, for the doctor; the file is readable all the same.
    """

    grid: FileGrid
    dtype: np.dtype
    spacing_mm: tuple[float, float, float]
    faults: tuple[str, ...]


def read_header(path: Path) -> Header:
    """The header alone; of a gzipped file only the first block is unpacked.

    Raises:
        ScanError: not a file of a known format, not one real number per voxel, not 3D, or no usable affine.
    """
    return _interpret(open_scan(path), path)


def read(path: Path, *, labels: bool = False, compact: bool = False) -> tuple[Volume, FileGrid]:
    """The voxels on RAS+ axes, and the grid they came from.

    Non-finite voxels, where they are at most 1 % of all, become 0. An image whose numbers float32 cannot square, above
    2^60 or all below 2^-60, comes in another unit, a power of two, with outliers cut at 2^60 of it. The array keeps the
    file's memory order.

    Args:
        path: a file of any format that `imaging/formats` reads.
        labels: return int32, and insist on whole numbers from 0 on; else float32 with the header's scaling applied.
        compact: whole numbers of 8 or 16 bits that need no scaling stay as they are, read-only and without a copy.

    Raises:
        ScanError: as read_header, and where the file is cut short or damaged, has more than 1 % of non-finite voxels,
            or, for labels, holds anything but whole numbers from 0 on.
    """
    opened = open_scan(path)
    grid = _interpret(opened, path).grid
    stored = grid.to_ras(opened.stored(grid.shape_vox))
    slope, intercept = _scaling(opened.header)
    if labels:
        voxels = _as_labels(stored, slope, intercept, path)
    elif compact and stored.dtype.kind in "iu" and stored.dtype.itemsize <= 2 and (slope, intercept) == (1, 0):
        voxels = stored if stored.dtype.isnative else stored.astype(stored.dtype.newbyteorder("="), order="K")
    else:
        voxels = _as_image(stored, slope, intercept, path)
    try:
        return Volume(voxels, grid.ras_affine()), grid
    except ValueError as error:
        raise ScanError(f"{path}: {error}") from None


def write_mask(path: Path, labels: np.ndarray, like: Path) -> None:
    """Writes labels in the axis order of ``like`` on its grid. Raises: FileError."""
    write_labels(path, read_header(like).grid.to_ras(labels), like)


def write_labels(path: Path, labels_ras: np.ndarray, like: Path) -> None:
    """Write a label map on the grid of another file: same shape, same sform and qform with their codes, in uint8, or in
    uint16 where a label is above 255.

    Free text and extensions of `like` are not copied, for they may name the patient. A crash leaves no half a file.

    Args:
        path: ``.nii`` or ``.nii.gz``; an existing file is replaced.
        labels_ras: [X, Y, Z] whole numbers 0 to 65535 on the axes that `read` returned for `like`.
        like: the file whose grid is taken.

    Raises:
        ScanError: as read_header(like).
        ValueError: the shape is not that of `like`, or a label does not fit into uint16.
    """
    source = open_scan(like)
    grid = _interpret(source, like).grid
    if labels_ras.min() < 0 or labels_ras.max() > 65535:
        raise ValueError(f"labels reach from {labels_ras.min()} to {labels_ras.max()}, expected 0 to 65535")
    if not np.issubdtype(labels_ras.dtype, np.integer) and labels_ras.dtype != bool:
        raise ValueError(f"labels are {labels_ras.dtype}, expected whole numbers")
    dtype = np.uint16 if labels_ras.max() > 255 else np.uint8
    data = np.asfortranarray(grid.from_ras(labels_ras), dtype=dtype)
    _place(Path(path), _like(source.header, data), data)


def write_map(path: Path, map_ras: np.ndarray, like: Path) -> None:
    """Write real numbers on the grid of another file, as `write_labels` does with labels: float32.

    Args:
        path: ``.nii`` or ``.nii.gz``; an existing file is replaced.
        map_ras: [X, Y, Z] on the axes that `read` returned for `like`.
        like: the file whose grid is taken.

    Raises:
        ScanError: as read_header(like).
        ValueError: the shape is not that of `like`.
    """
    source = open_scan(like)
    data = np.asfortranarray(_interpret(source, like).grid.from_ras(map_ras), dtype=np.float32)
    _place(Path(path), _like(source.header, data), data)


def _like(source: Any, data: np.ndarray) -> Any:
    """The header of another file for new voxels: its geometry, nothing that it says about its own."""
    header = source.copy()
    _shorten_quaternion(header)  # nibabel refuses a longer one
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header["descrip"], header["aux_file"] = b"", b""
    header["intent_code"], header["intent_name"] = 0, b""
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    return header


def write(path: Path, volume: Volume, axes: str = "RAS") -> None:
    """Write a volume, its file axes running towards these directions; a crash leaves no half a file.

    Args:
        path: ``.nii`` or ``.nii.gz``; an existing file is replaced.
        volume: stored in its own dtype; sform and qform hold its affine, code 1 (scanner).
        axes: e.g. ``LPS``.
    """
    orientation = tuple(("RAS".index(a), 1) if a in "RAS" else ("LPI".index(a), -1) for a in axes)
    affine = np.eye(4)
    affine[:3, 3] = volume.affine_mm[:3, 3]
    for column, (axis, direction) in enumerate(orientation):
        affine[:3, column] = direction * volume.affine_mm[:3, axis]
        if direction < 0:
            affine[:3, 3] += volume.affine_mm[:3, axis] * (volume.shape[axis] - 1)
    a, b, c = (volume.shape[axis] for axis, _ in orientation)
    grid = FileGrid((a, b, c), tuple(tuple(float(v) for v in row) for row in affine), orientation)
    header = nib.Nifti1Header()
    header.set_data_dtype(volume.voxels.dtype)
    header.set_data_shape(grid.shape_vox)
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    _place(Path(path), header, grid.from_ras(volume.voxels))


def _place(path: Path, header: Any, data: np.ndarray) -> None:
    """A header and voxels in file order as one file, whole or not at all."""
    data = data.astype(header.get_data_dtype(), copy=False)  # in the order of bytes that the header tells
    # The four zero bytes say that no extension follows.
    content = header.binaryblock.ljust(int(header.single_vox_offset), b"\0") + data.tobytes(order="F")
    if path.name.endswith(".gz"):
        content = gzip.compress(content, compresslevel=4, mtime=0)
    write_whole(path, content)


def header_faults(path: Path) -> list[str]:
    """For the doctor: what is wrong with a file as far as its header tells, one line each."""
    try:
        return list(read_header(path).faults)
    except ScanError as error:
        return [str(error).removeprefix(f"{path}: ")]


def voxel_faults(path: Path) -> list[str]:
    """For the doctor: what is wrong with a file's voxels, one line each; empty where the header is already refused."""
    try:
        opened = open_scan(path)
        shape = _interpret(opened, path).grid.shape_vox
    except ScanError:
        return []  # header_faults says so
    try:
        stored = opened.stored(shape)
    except ScanError as error:
        return [str(error).removeprefix(f"{path}: ")]
    faults = []
    finite = stored
    if stored.dtype.kind == "f":
        good = np.isfinite(stored)
        bad = stored.size - int(np.count_nonzero(good))
        if bad:
            worse = bad > MAX_NON_FINITE * stored.size
            limit = f", more than the {MAX_NON_FINITE:.0%} that can be used" if worse else ""
            faults.append(f"{bad} of {stored.size} voxels are NaN or infinite{limit}")
            finite = stored[good]
    if not finite.size:
        return faults
    low, high = finite.min(), finite.max()
    slope, intercept = _scaling(opened.header)
    top = max(abs(float(low) * slope + intercept), abs(float(high) * slope + intercept))
    if low == high:
        faults.append(f"all voxels have the value {low:g}")
    elif not 1 / _REACH <= top <= _REACH:
        faults.append(f"numbers of up to {top:.3g}; the image is read in another unit and its outliers are cut")
    return faults


# ---- header ----------------------------------------------------------------------------------------------------------


def _interpret(opened: Opened, path: Path) -> Header:
    """Check the header and settle the grid."""
    header = opened.header
    try:
        dtype = header.get_data_dtype()
    except HeaderDataError:
        raise ScanError(f"{path}: unknown data type code {int(header['datatype'])}") from None
    if dtype.fields is not None:
        raise ScanError(f"{path}: found colour (RGB) voxels, expected one number per voxel")
    if dtype.kind == "c":
        raise ScanError(f"{path}: found complex voxels, expected real ones")
    if dtype.kind not in "iuf":
        raise ScanError(f"{path}: found voxels of type {dtype}, expected real numbers")
    shape = _shape(header, path)
    affine, faults, placed = _settle_affine(header, shape, path)
    faults = [*opened.faults, *faults]
    orientation = tuple((int(axis), int(flip)) for axis, flip in nib.io_orientation(affine))
    grid = FileGrid(shape, tuple(tuple(float(v) for v in row) for row in affine), orientation, placed)
    spacing = spacing_of(affine)
    if min(shape) < _FEW_SLICES:
        faults.append(f"only {min(shape)} slices along one axis, expected {_FEW_SLICES} or more for a 3D scan")
    low, high = _PLAUSIBLE_SPACING_MM
    if min(spacing) < low or max(spacing) > high:
        text = " x ".join(f"{s:g}" for s in spacing)
        faults.append(f"voxels of {text} mm, expected {low:g} to {high:g} mm along each axis")
    return Header(grid, dtype, spacing, tuple(faults))


def _shape(header: Any, path: Path) -> tuple[int, int, int]:
    dim = [int(d) for d in header["dim"]]
    if not 1 <= dim[0] <= 7 or any(d < 1 for d in dim[1 : dim[0] + 1]):
        raise ScanError(f"{path}: impossible dimensions {dim} in the header")
    shape = dim[1 : dim[0] + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3:
        text = " x ".join(str(size) for size in shape)
        raise ScanError(f"{path}: found a {len(shape)}D image ({text}), expected 3D")
    return shape[0], shape[1], shape[2]


def _settle_affine(header: Any, shape: tuple[int, int, int], path: Path) -> tuple[np.ndarray, list[str], bool]:
    """sform where its code is set, else qform, else the voxel sizes alone; a broken one yields to the next. With the
    faults, and whether it is more than a guess."""
    faults: list[str] = []
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        text = " x ".join(f"{p:g}" for p in pixdim)
        faults.append(f"a voxel size of {text} mm in the header, expected lengths above 0")
    length = _quaternion_length(header)
    if length > 1 + _LONG_QUATERNION and int(header["qform_code"]) > 0:
        faults.append(f"the quaternion of the qform has the length {length:.3g}, expected 1; it is shortened")
    found: dict[str, np.ndarray] = {}
    for name, affine in (("sform", _sform(header)), ("qform", _qform(header))):
        if affine is None:
            continue
        affine, strange = _in_mm(affine, header)
        faults += [text for text in strange if text not in faults]
        if _usable(affine):
            found[name] = affine
        else:
            faults.append(f"the {name} is singular or not finite")
    if len(found) == 2:
        apart = _apart_mm(found["sform"], found["qform"], shape)
        if apart > _DISAGREEMENT_MM:
            faults.append(f"sform and qform disagree by {apart:.3g} mm, the sform is used")
    if found:
        return next(iter(found.values())), faults, True
    sizes = np.abs(pixdim)
    base = np.diag([-sizes[0], sizes[1], sizes[2], 1.0])  # radiological order, as the ANALYZE format had it
    base, strange = _in_mm(base, header)
    faults += strange
    base[:3, 3] = -base[:3, :3] @ ((np.array(shape) - 1) / 2)
    if not _usable(base):
        raise ScanError(f"{path}: neither sform nor qform nor the voxel sizes give a usable affine")
    faults.append("neither sform nor qform is set, so left and right are a guess")
    return base, faults, False


def _sform(header: Any) -> np.ndarray | None:
    affine = header.get_sform(coded=True)[0]
    return None if affine is None else np.asarray(affine, dtype=np.float64)


def _qform(header: Any) -> np.ndarray | None:
    """As niftilib reads it: of pixdim[0] the sign alone counts, voxel sizes are lengths, a quaternion that rounding has
    made longer than 1 is shortened. NaN where it tells no affine.

    Source: nifti1.h, METHOD 2, and nifti_quatern_to_mat44 of nifti1_io.c.
    Differs: a negative voxel size is taken as its length (as nibabel mends it), there as 1 mm.
    """
    if int(header["qform_code"]) <= 0:
        return None
    mended = header.copy()
    mended["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1
    mended["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    _shorten_quaternion(mended)
    try:
        return np.asarray(mended.get_qform(coded=False), dtype=np.float64)
    except (HeaderDataError, ValueError):
        return np.full((4, 4), np.nan)


def _shorten_quaternion(header: Any) -> None:
    length = _quaternion_length(header)
    if length > 1:
        for name in ("quatern_b", "quatern_c", "quatern_d"):
            header[name] = float(header[name]) / length


def _quaternion_length(header: Any) -> float:
    """Of the three numbers that a header keeps of it; NaN where one is."""
    return float(np.linalg.norm([float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")]))


def _in_mm(affine: np.ndarray, header: Any) -> tuple[np.ndarray, list[str]]:
    """An affine that its header gives in metres or micrometres, and what is odd about that.

    Many headers name a unit that nobody meant: it is believed only where the voxels are of no plausible size in mm.
    """
    factor = _MM_IN.get(int(header["xyzt_units"]) & 7)
    if factor is None or not np.isfinite(affine).all():
        return affine, []
    spacing, (least, most) = np.array(spacing_of(affine)), _PLAUSIBLE_SPACING_MM
    converted = spacing * factor
    if (spacing < least).any() or (spacing > most).any():
        if (converted >= least).all() and (converted <= most).all():
            return np.vstack([affine[:3] * factor, affine[3:]]), []
        return affine, []
    unit = "metres" if factor > 1 else "micrometres"
    text = " x ".join(f"{size:g}" for size in spacing)
    return affine, [f"the header gives voxels of {text} in {unit}; they are taken for mm"]


def _usable(affine: np.ndarray) -> bool:
    return bool(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9)


def corner_points(shape: tuple[int, int, int]) -> np.ndarray:
    """[8, 3] float64: the indices of the eight corner voxels."""
    return np.array(np.meshgrid(*[(0.0, size - 1.0) for size in shape], indexing="ij")).reshape(3, -1).T


def _apart_mm(affine: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """How far the furthest corner voxel moves, along an axis, from one affine to the other."""
    between = affine - other
    return float(np.abs(corner_points(shape) @ between[:3, :3].T + between[:3, 3]).max())


# ---- values ----------------------------------------------------------------------------------------------------------


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite(slope) or slope == 0:
        return 1.0, 0.0  # the standard: no scaling
    return slope, intercept if np.isfinite(intercept) else 0.0


def _as_image(stored: np.ndarray, slope: float, intercept: float, path: Path) -> np.ndarray:
    """float32 in the file's memory order, scaled, finite and of a size that can be reckoned with."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is seen below
        voxels = stored.astype(np.float32, order="K")
        if slope != 1:
            voxels *= np.float32(slope)
        if intercept != 0:
            voxels += np.float32(intercept)
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and (slope, intercept) == (1, 0):
        return voxels
    finite = np.isfinite(voxels)
    bad = voxels.size - int(np.count_nonzero(finite))
    there = voxels[finite] if bad else voxels
    top = max(-float(there.min()), float(there.max())) if there.size else 0.0
    overflowed = bad and bool(np.isfinite(stored[~finite]).any())
    if overflowed or top > _REACH or 0 < top < 1 / _REACH:
        return _brought_in_reach(stored, slope, intercept, path)
    _refuse_lost(bad, voxels.size, path)
    if bad:
        voxels[~finite] = 0
    return voxels


def _brought_in_reach(stored: np.ndarray, slope: float, intercept: float, path: Path) -> np.ndarray:
    """The same in float64 first, in a unit in which the middle of the image is near 1 where that is needed."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float64, order="K") * slope + intercept
    finite = np.isfinite(values)
    _refuse_lost(values.size - int(np.count_nonzero(finite)), values.size, path)
    values[~finite] = 0
    sizes = np.abs(values)
    # Padding has the value of a corner, which may be the largest number there is; it tells nothing of the image.
    telling = sizes[(values != 0) & (values != values[0, 0, 0])]
    middle = float(np.median(telling)) if telling.size else float(sizes.max())
    unit = 1.0 if middle == 0 or 1 / _REACH <= middle <= _REACH else 2.0 ** round(np.log2(middle))
    if unit != 1:
        values /= unit
    return np.clip(values, -_REACH, _REACH, out=values).astype(np.float32, order="K")


def _refuse_lost(bad: int, size: int, path: Path) -> None:
    """Raises: ScanError where too many voxels are not finite."""
    if bad > MAX_NON_FINITE * size:
        raise ScanError(f"{path}: {bad} of {size} voxels are NaN or infinite, expected at most {MAX_NON_FINITE:.0%}")


def _as_labels(stored: np.ndarray, slope: float, intercept: float, path: Path) -> np.ndarray:
    """int32 in the file's memory order."""
    values = stored
    if slope != 1 or intercept != 0:
        values = stored.astype(np.float64, order="K") * slope + intercept
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ScanError(f"{path}: a label map with NaN or infinite voxels, expected whole numbers")
        if np.abs(values - np.rint(values)).max() > 1e-4:  # scaled files miss whole numbers by rounding
            raise ScanError(f"{path}: a label map with fractions, expected whole numbers")
        values = np.rint(values)
    low, high = values.min(), values.max()
    if low < 0:
        raise ScanError(f"{path}: labels from {low:g} to {high:g}, expected whole numbers from 0 on, 0 for nothing")
    if high > np.iinfo(np.int32).max:
        raise ScanError(f"{path}: labels from {low:g} to {high:g}, expected 32-bit whole numbers")
    return values.astype(np.int32, order="K")
