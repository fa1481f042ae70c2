"""Scan files of any format as a NIfTI header, as it stands in the file, and the stored numbers.

NIfTI-1 and NIfTI-2 are read here from their bytes: single files (plain, gzip or bzip2, told by content, not by name)
and pairs of ``.hdr`` and ``.img``. ANALYZE, MGH, MINC and AFNI go through nibabel and get a NIfTI header of their own.
"""

from __future__ import annotations

import bz2
import gzip
import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.fileholders import FileHolder
from nibabel.spatialimages import HeaderDataError

from brainfm.errors import ScanError
from brainfm.imaging.endings import companions, ending_of, header_names
from brainfm.volume import spacing_of

_HEADER_BYTES = 544  # enough for either header
_NIFTI = (nib.Nifti1Header, nib.Nifti2Header)
_ANALYZE = (nib.Spm2AnalyzeImage, nib.Spm99AnalyzeImage, nib.AnalyzeImage)
_BY_NIBABEL = (".mgz", ".mgh", ".mgh.gz", ".mnc", ".mnc.gz", ".brik", ".brik.gz")
_GUESSED_SIDES = "an ANALYZE header does not say where left and right are, they are a guess"


@dataclass(frozen=True)
class Opened:
    """A file of which the header is read.

    Attributes:
        header: nibabel's Nifti1Header or Nifti2Header, unchecked and unmended.
        faults: what the doctor should know of the format.
        stored: for a shape of three axes, the numbers as stored, in the file's axes. Raises ScanError.
    """

    header: Any
    faults: tuple[str, ...]
    stored: Callable[[tuple[int, int, int]], np.ndarray]


def open_scan(path: Path) -> Opened:
    """Reads as little as tells the header; of a packed file only the first block is unpacked.

    Raises:
        ScanError: the file is missing, or its format is not read.
    """
    path = Path(path)
    ending = ending_of(path.name).lower()
    if ending in _BY_NIBABEL:
        return _of_nibabel(path, lambda: nib.load(path))
    if ending.startswith(".img") or path.name.lower().endswith((".hdr", ".hdr.gz", ".hdr.bz2")):
        return _of_pair(path)
    first = _first_bytes(path)
    header = _nifti_header(first, single=True)
    if header is None:
        raise ScanError(f"{path}: not a single-file NIfTI image, expected .nii or .nii.gz")
    return Opened(header, (), lambda shape: _numbers(_all_bytes(path), header, shape, path, single=True))


def _of_pair(path: Path) -> Opened:
    """NIfTI or ANALYZE in two files; either of them may be named."""
    numbers, header_file = _pair(path)
    first = _first_bytes(header_file)
    header = _nifti_header(first, single=False)
    if header is not None:
        return Opened(header, (), lambda shape: _numbers(_all_bytes(numbers), header, shape, numbers, single=False))
    kind = next((kind for kind in _ANALYZE if kind.header_class.may_contain_header(first[:348])), None)
    if kind is None:
        raise ScanError(f"{header_file}: not a header of a NIfTI or ANALYZE pair, expected one beside {numbers.name}")
    files = {"header": FileHolder(str(header_file)), "image": FileHolder(str(numbers))}
    mat = next((str(file) for file in companions(numbers) if file.suffix == ".mat"), None)
    if "mat" in dict(kind.files_types):
        # An empty file stands for none: nibabel asks for one of SPM's images always.
        files["mat"] = FileHolder(mat) if mat else FileHolder(fileobj=io.BytesIO())
    opened = _of_nibabel(numbers, lambda: kind.from_file_map(files))
    return opened if mat else Opened(opened.header, (_GUESSED_SIDES,), opened.stored)


def _pair(path: Path) -> tuple[Path, Path]:
    """The file of the numbers and that of the header. Raises: ScanError where one is missing."""
    if ".hdr" not in path.name.lower():
        header = next((file for file in companions(path) if ".hdr" in file.name.lower()), None)
        if header is None:
            _first_bytes(path)  # says so where it is this one that is missing
            raise ScanError(f"{path}: has no header file beside it, expected {header_names(path.name)[0]}")
        return path, header
    for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else []:
        if path.name in header_names(file.name):
            return file, path
    _first_bytes(path)
    raise ScanError(f"{path}: a header without its numbers, expected an .img file beside it")


def _of_nibabel(path: Path, load: Callable[[], Any]) -> Opened:
    """Whatever nibabel makes of a file, under a NIfTI header."""
    _first_bytes(path)  # missing or unreadable files in our words
    try:
        image = load()
        header = _header_like(image)
    except HeaderDataError as error:
        raise ScanError(f"{path}: found voxels that cannot be read ({error}), expected one real number each") from None
    except Exception as error:  # each format of nibabel fails in words of its own
        raise ScanError(f"{path}: cannot be read ({_first_line(error)})") from None

    def stored(shape: tuple[int, int, int]) -> np.ndarray:
        try:
            return np.asanyarray(image.dataobj).reshape(shape, order="F")
        except Exception as error:
            raise ScanError(f"{path}: is cut short or damaged ({_first_line(error)})") from None

    return Opened(header, (), stored)


def _header_like(image: Any) -> Any:
    """A NIfTI header with shape, type and place of another image. Raises: HeaderDataError for colours and the like."""
    header = nib.Nifti1Header() if max(image.shape) < 2**15 else nib.Nifti2Header()
    header.set_data_dtype(image.get_data_dtype())
    header.set_data_shape(image.shape)
    affine = np.asarray(image.affine, dtype=np.float64)
    header["pixdim"][1:4] = spacing_of(affine)
    header.set_sform(affine, code=1)
    header.set_xyzt_units("mm")
    return header


def _nifti_header(first: bytes, single: bool) -> Any:
    """The header that a file's first bytes are; None where they are none."""
    for kind in _NIFTI:
        size = kind.sizeof_hdr
        if len(first) >= size and size in (int.from_bytes(first[:4], "little"), int.from_bytes(first[:4], "big")):
            header = kind(first[:size], check=False)
            magic = kind.single_magic if single else kind.pair_magic
            if header["magic"].item()[:4].rstrip(b"\0") == magic.rstrip(b"\0")[:4]:
                return header
    return None


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _first_bytes(path: Path) -> bytes:
    """Enough of the unpacked file for either header."""
    try:
        with open(path, "rb") as file:
            magic = file.read(3)
            file.seek(0)
            if magic[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return unpacked.read(_HEADER_BYTES)
            if magic == b"BZh":
                with bz2.BZ2File(file) as unpacked:
                    return unpacked.read(_HEADER_BYTES)
            return file.read(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _all_bytes(path: Path) -> bytes:
    """The unpacked file; one call on the whole, which is several times faster than a stream, checks length and CRC."""
    try:
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":
            return gzip.decompress(content)
        return _unpacked_bz2(content) if content[:3] == b"BZh" else content
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _unpacked_bz2(content: bytes) -> bytes:
    try:
        return bz2.decompress(content)
    except ValueError:  # what bz2 says of an end that is missing
        raise EOFError("Compressed file ended before the end-of-stream marker was reached") from None


def _unreadable(path: Path, error: Exception) -> ScanError:
    if isinstance(error, FileNotFoundError):
        return ScanError(f"{path}: no such file")
    damaged = isinstance(error, OSError) and error.errno is None  # bz2 speaks so of bytes that are no stream
    if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)) or damaged:
        return ScanError(f"{path}: the packed stream is cut short or damaged ({error}), expected a whole file")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ScanError(f"{path}: cannot be read ({reason})")


def _numbers(raw: bytes, header: Any, shape: tuple[int, int, int], path: Path, *, single: bool) -> np.ndarray:
    """The numbers of a NIfTI file as stored, in the file's axes, without a copy.

    A single file whose header does not say where they begin, or says within itself, has them after the four bytes that
    tell of extensions; right behind the header where the file is too short for these.
    """
    dtype = header.get_data_dtype()
    count = shape[0] * shape[1] * shape[2]
    given, size = float(header["vox_offset"]), int(header.sizeof_hdr) if single else 0
    offset = int(given) if np.isfinite(given) else 0
    if offset < size or offset < 0:
        whole = size + 4 if single else 0
        offset = whole if len(raw) >= whole + count * dtype.itemsize else size
    needed = offset + count * dtype.itemsize
    if len(raw) < needed:
        raise ScanError(f"{path}: the file is cut short, found {len(raw)} bytes where the header promises {needed}")
    return np.frombuffer(raw, dtype=dtype, count=count, offset=offset).reshape(shape, order="F")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
