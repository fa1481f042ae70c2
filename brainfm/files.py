"""A file that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under another name, brings it onto the disk and renames it; makes the folder where there is none.

    The other name is short whatever the file is called: a name that is as long as the system allows can be written.

    Raises:
        OSError: naming ``path``, where the folder or the file cannot be written; nothing is left behind.
    """
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        _drop(part)
        raise type(error)(error.errno, error.strerror, str(path)) from None
    except BaseException:  # Ctrl-C included
        _drop(part)
        raise


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raises: OSError where nothing can be written into a folder, or where it could not be made; asked before long work
    is done."""
    wanted = Path(folder).absolute()
    there = next(place for place in (wanted, *wanted.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(there, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(folder))


def _drop(part: Path) -> None:
    with suppress(OSError):  # a file system that is read-only holds no part of ours
        part.unlink(missing_ok=True)
