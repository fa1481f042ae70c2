"""Files that appear whole or not at all: bytes, text, tables, streams and folders."""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from brainfm.errors import FileError

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
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_synced(path: PathLike, content: bytes) -> None:
    """Bytes onto the disk under their own name: for folders that get their name when all is in them."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_folder(folder: PathLike, contents: Mapping[str, bytes]) -> None:
    """A folder of files, written beside its place and swapped in.

    A crash leaves the old folder or the new one in place, or, between the two renames, both whole under their
    temporary names.

    Raises:
        FileError: where it cannot be written; what was there stays.
    """
    folder = Path(folder)
    mark = secrets.token_hex(4)
    fresh = folder.with_name(f".{folder.name}.{mark}.tmp")
    old = folder.with_name(f".{folder.name}.{mark}.old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        for name, content in contents.items():
            write_synced(fresh / name, content)
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
    except OSError as error:
        raise FileError.of(error, folder) from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
