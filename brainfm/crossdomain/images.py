"""Images of a data set in the MedIMeta layout, read in batches as uint8, in any process.

An images.hdf5 is one array without compression: where it lies in one piece, it is mapped, and a batch is one indexing
of it; else it is read through h5py, opened anew in each process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from brainfm.crossdomain.layout import IMAGES, DatasetInfo
from brainfm.errors import DatasetError
from brainfm.extras import missing

_SAMPLE = 64  # images that a fingerprint is of


class Images:
    """uint8 images [N, H, W] or [N, H, W, 3] by number.

    An object can be handed to other processes, forked or spawned: handles stay behind.

    Args:
        info: of the data set.
        use_hdf5: whether to read images.hdf5, else the TIFF files.

    Raises: DatasetError where the file is missing, or holds other images than info.yaml says.
    """

    def __init__(self, info: DatasetInfo, use_hdf5: bool = True) -> None:
        self.info, self.use_hdf5 = info, use_hdf5
        pixels = (info.height, info.width)
        self.shape = (info.total, *pixels) if info.channels == 1 else (info.total, *pixels, info.channels)
        self._process = -1
        self._array: Any = None
        self._file: Any = None
        if use_hdf5:
            self._open()
        else:
            last = self._tiff(info.total - 1)
            if not last.is_file():
                raise DatasetError(f"{last}: no such file, expected {info.total} images")

    def __len__(self) -> int:
        return self.info.total

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B, H, W] or [B, H, W, 3], in the order asked for. Raises: DatasetError, IndexError."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"image {int(rows.max())} of {len(self)}")
        if not self.use_hdf5:
            return (
                np.stack([self._read_tiff(int(row)) for row in rows]) if rows.size else np.empty((0, *self.shape[1:]))
            )
        array = self._open()
        if isinstance(array, np.ndarray):
            return np.asarray(array[rows])
        ordered, place = np.unique(rows, return_inverse=True)
        found = np.empty((len(ordered), *self.shape[1:]), np.uint8)
        breaks = np.flatnonzero(np.diff(ordered) > 1) + 1
        for run in np.split(np.arange(len(ordered)), breaks):  # a read for each run of neighbours
            if len(run):
                found[run[0] : run[-1] + 1] = array[int(ordered[run[0]]) : int(ordered[run[-1]]) + 1]
        return found[place]

    def fingerprint(self) -> str:
        """Of 64 of the images, evenly spread: what tells them from others in the same place."""
        rows = np.unique(np.linspace(0, len(self) - 1, _SAMPLE).astype(np.int64))
        return hashlib.sha256(self.read(rows).tobytes()).hexdigest()[:16]

    def close(self) -> None:
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._process, self._array, self._file = -1, None, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_process": -1, "_array": None, "_file": None}

    def _open(self) -> Any:
        if self._process == os.getpid():
            return self._array
        self._process, self._file = os.getpid(), None  # a forked child leaves its parent's handle alone
        path = self.info.folder / IMAGES
        try:
            import h5py
        except ModuleNotFoundError:
            raise missing("h5py", str(path)) from None
        if not path.is_file():
            raise DatasetError(f"{path}: no such file, expected the images of the data set")
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise DatasetError(f"{path}: cannot be read as HDF5 ({str(error).splitlines()[0]})") from None
        array = file.get("images")
        if not isinstance(array, h5py.Dataset):
            raise DatasetError(f"{path}: holds {', '.join(file) or 'nothing'}, expected an array named images")
        if array.shape != self.shape or array.dtype != np.uint8:
            found = f"{array.dtype} {list(array.shape)}"
            raise DatasetError(f"{path}: images are {found}, expected uint8 {list(self.shape)} as info.yaml says")
        offset = array.id.get_offset()
        if offset is not None:
            self._array = np.memmap(path, np.uint8, "r", offset, self.shape)
            file.close()
        else:
            self._array, self._file = array, file
        return self._array

    def _tiff(self, row: int) -> Any:
        return self.info.folder / "images" / f"{row:06d}.tiff"

    def _read_tiff(self, row: int) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        path = self._tiff(row)
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image)
        except FileNotFoundError:
            raise DatasetError(f"{path}: no such file, expected {len(self)} images") from None
        except (UnidentifiedImageError, OSError) as error:
            raise DatasetError(f"{path}: cannot be read as an image ({error})") from None
        if pixels.shape != self.shape[1:] or pixels.dtype != np.uint8:
            found = f"{pixels.dtype} {list(pixels.shape)}"
            raise DatasetError(f"{path}: is {found}, expected uint8 {list(self.shape[1:])} as info.yaml says")
        return pixels


def read_mask(info: DatasetInfo, row: int, size: int) -> np.ndarray | None:
    """bool [size, size]: the region of interest ``masks/NNNNNN.tiff`` of an image; None where there is none."""
    from PIL import Image

    path = info.folder / "masks" / f"{row:06d}.tiff"
    if not path.is_file():
        return None
    with Image.open(path) as mask:
        return np.asarray(mask.convert("L").resize((size, size), Image.Resampling.NEAREST)) > 0


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """[B, H, W] or [B, H, W, 3] -> uint8 [B, channels, H, W]: grey is repeated, colours become their luminance.

    Source: ITU-R BT.601 luma in 16-bit integers, the weights and the rounding of Pillow's conversion to L.
    """
    if images.ndim == 3:
        return np.repeat(images[:, None], channels, axis=1)
    if channels == 3:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    red, green, blue = (images[..., c].astype(np.uint32) for c in range(3))
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey.astype(np.uint8)[:, None]
