"""Source files: what something was made from, known again by size, time of change and content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class SourceFile:
    """A file as it is now.

    Attributes:
        path: where it lies.
        bytes: its size.
        changed_ns: when its content and when its inode was changed last; the second cannot be set back.
    """

    path: Path
    bytes: int
    changed_ns: tuple[int, int]

    @classmethod
    def of(cls, path: Path) -> Self:
        """Raises: OSError where there is none."""
        status = path.stat()
        return cls(path, status.st_size, (status.st_mtime_ns, status.st_ctime_ns))

    def stamp(self) -> dict[str, Any]:
        """What `is_as` compares with later; JSON-able. Reads the file."""
        return {"changed_ns": list(self.changed_ns), "digest": self.digest()}

    def digest(self) -> str:
        """32 hexadecimal digits of the content, packed as it lies there; empty where it cannot be read."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        except OSError:
            return ""

    def is_as(self, stamp: Mapping[str, Any] | None) -> bool:
        """Whether the content is that of the stamp. The file is read only where a time differs, as after a copy.

        Without a stamp (stores of before had none) it is taken to be.
        """
        if stamp is None or list(self.changed_ns) == stamp.get("changed_ns"):
            return True
        return self.digest() == stamp.get("digest")
