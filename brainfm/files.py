"""A file that appears whole or not at all."""

from __future__ import annotations

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


def _drop(part: Path) -> None:
    with suppress(OSError):  # a file system that is read-only holds no part of ours
        part.unlink(missing_ok=True)
