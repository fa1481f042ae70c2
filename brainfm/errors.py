"""Exceptions that a user can cause, with one root, and the warning beside them."""

from __future__ import annotations

import errno
import os
from typing import Any, Self


class BrainfmError(Exception):
    """Something the user can mend. The text is one sentence: what was found, what was expected, which file."""


class ConfigError(BrainfmError):
    """A wrong or missing key on the command line or in a configuration."""


class ManifestError(BrainfmError):
    """A manifest that cannot be read or contradicts itself."""


class ScanError(BrainfmError):
    """One scan that cannot be used; the others stay usable."""


class StoreError(BrainfmError):
    """A store that is missing, damaged or was made with another spec."""


class DatasetError(BrainfmError):
    """A 2D data set that is missing, damaged or contradicts itself."""


class WeightsError(BrainfmError):
    """A weights file that is damaged or does not fit."""


class BundleError(BrainfmError):
    """A bundle that is incomplete, damaged or was tampered with."""


class TrainingError(BrainfmError):
    """A run that cannot go on; the last good state was kept."""


class FileError(BrainfmError, OSError):
    """A file or folder that cannot be written. ``errno`` and ``filename`` are those of the system's refusal.

    Args:
        number: of the refusal, from `errno`.
        refusal: in the system's words.
        filename: what could not be written.
        sentence: in place of the one about the file.
    """

    def __init__(self, number: int, refusal: str, filename: str, sentence: str = "") -> None:
        super().__init__(number, refusal, filename)
        self._sentence = sentence

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str]) -> Self:
        """The system's refusal, about the file that was asked for instead of a part of it."""
        return cls(error.errno or errno.EIO, error.strerror or str(error), str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errno, self.strerror, self.filename, self._sentence)

    def __str__(self) -> str:
        if self.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"no space left on the disk for {self.filename}: free some and run again"
        return self._sentence or f"{self.filename}: cannot be written ({str(self.strerror).lower()})"


class BrainfmWarning(UserWarning):
    """Something that the user should know, and that is done all the same."""
