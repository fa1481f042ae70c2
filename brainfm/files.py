"""Files that appear whole or not at all: bytes, text, tables, streams and folders."""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from brainfm.errors import BrainfmError, FileError

if TYPE_CHECKING:
    import numpy as np

PathLike = str | os.PathLike[str]


@contextmanager
def writing(path: PathLike, mark: str = ".") -> Iterator[IO[bytes]]:
    """A file to write into, under another name; at the end of the block it is brought onto the disk and renamed.

    Makes the folder where there is none. The other name is short whatever the file is called: a name that is as long
    as the system allows can be written.

    Args:
        path: what appears.
        mark: how the other name begins, for whoever sweeps a folder after a killed run.

    Raises:
        FileError: where the folder or the file cannot be written; nothing is left behind, nor after any other error.
    """
    path = Path(path)
    part = path.with_name(f"{mark}{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:  # Ctrl-C included
        with suppress(OSError):  # a file system that is read-only holds no part of ours
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FileError):
            raise FileError.of(error, path) from None
        raise


def write_whole(path: PathLike, content: bytes, mark: str = ".") -> None:
    """Bytes, as `writing` writes them. Raises: FileError."""
    with writing(path, mark) as file:
        file.write(content)


def write_text(path: PathLike, text: str) -> None:
    """Text in UTF-8; what it cannot hold is escaped. Raises: FileError."""
    write_whole(path, text.encode(errors="backslashreplace"))


def write_table(path: PathLike, columns: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> None:
    """A table with a line of names. Raises: FileError."""
    write_text(path, table_text(columns, rows, delimiter))


def table_text(columns: Sequence[str], rows: Iterable[Sequence[object]], delimiter: str = ",") -> str:
    """What `write_table` writes."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def write_arrays(path: PathLike, arrays: Mapping[str, np.ndarray], compressed: bool = False) -> None:
    """Arrays by name as .npz, without pickles. Raises: FileError."""
    write_whole(path, npz_bytes(arrays, compressed))


def npz_bytes(arrays: Mapping[str, np.ndarray], compressed: bool = False) -> bytes:
    """What `write_arrays` writes. Raises: ValueError for an array of Python objects."""
    import numpy as np  # here: nothing else in this file needs it, and help waits for nothing

    strange = [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]
    if strange:
        raise ValueError(f"{strange[0]}: an array of Python objects would be pickled")
    held = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(held, **arrays)  # type: ignore[arg-type]
    return held.getvalue()


def npy_bytes(array: np.ndarray) -> bytes:
    """One array as .npy, without pickles."""
    import numpy as np

    held = io.BytesIO()
    np.save(held, array, allow_pickle=False)
    return held.getvalue()


# What numpy raises over files that are missing, cut short, no arrays, or hold pickles.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: PathLike, refused: type[BrainfmError], what: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz by name; pickles are never loaded.

    Args:
        refused: raised, in one sentence, where the file is missing, damaged or holds anything else.
        what: that was expected, e.g. ``episodes``.
    """
    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it holds one array, expected several by name")
        with file:
            return {name: file[name] for name in file.files}
    except _UNREADABLE as error:
        raise refused(f"{path}: cannot be read as {what} ({_told(error)})") from None


def read_array(path: PathLike, refused: type[BrainfmError], what: str) -> np.ndarray:
    """The array of an .npy, as `read_arrays` reads several."""
    import numpy as np

    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            found.close()
            raise ValueError("it holds arrays by name, expected one array")
        return found
    except _UNREADABLE as error:
        raise refused(f"{path}: cannot be read as {what} ({_told(error)})") from None


def _told(error: BaseException) -> str:
    """What numpy says, in a line, without its advice to load pickles: it gives that for any file it does not know."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    line = (str(error).splitlines() or [""])[0]
    return "no arrays of numbers or text" if "pickle" in line else line or type(error).__name__


def write_synced(path: PathLike, content: bytes) -> None:
    """Bytes onto the disk under their own name: for folders that get their name when all is in them."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: PathLike, contents: Mapping[str, bytes]) -> None:
    """A folder of files, as `writing_folder` writes it, in place of what was there. Raises: FileError."""
    with writing_folder(folder) as part:
        for name, content in contents.items():
            (part / name).write_bytes(content)


@contextmanager
def writing_folder(folder: PathLike) -> Iterator[Path]:
    """A folder to fill, beside its place and hidden; at the end of the block all of it is brought onto the disk and
    swapped in.

    A crash leaves the old folder or the new one in place, or, between the two renames, both whole under their
    temporary names.

    Raises:
        FileError: where it cannot be written; what was there stays, as after any other error.
    """
    folder = Path(folder)
    mark = secrets.token_hex(4)
    fresh = folder.with_name(f".{folder.name}.{mark}.tmp")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        yield fresh
        for path in (path for path in fresh.rglob("*") if path.is_file()):
            sync(path)
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(fresh, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        if old.exists():
            shutil.rmtree(old)
    except FileError as error:  # of a file within
        told = str(error.filename).replace(str(fresh), str(folder))
        raise FileError(error.errno or errno.EIO, str(error.strerror), told) from None
    except OSError as error:
        raise FileError.of(error, folder) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until what a file or a folder holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: PathLike) -> None:
    """Raises: FileError where nothing can be written into a folder, or where it could not be made; asked before long
    work is done."""
    wanted = Path(folder).absolute()
    there = next(place for place in (wanted, *wanted.parents) if os.path.lexists(place))
    if not there.is_dir():
        number = errno.ENOTDIR
    elif not os.access(there, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
    else:
        return
    reason = os.strerror(number)
    sentence = f"{folder}: nothing can be written there ({reason.lower()}), expected a folder that may be written to"
    raise FileError(number, reason, str(folder), sentence)
