"""Answers as files: their names, the answer for a session, the scan on whose grid a label or a mask lies."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from brainfm.data.manifest import LABEL_ENDINGS, Scan, session_labels
from brainfm.errors import ConfigError, ScanError
from brainfm.files import check_writable
from brainfm.imaging import nifti

Key = tuple[str, str, str]  # dataset, subject, session
LISTING = "predictions.csv"
_LONGEST = 180  # characters of a name's readable part: with target and ending it stays below the 255 of most systems
_ENDINGS = (".nii", ".nii.gz")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")


@dataclass(frozen=True)
class SessionAnswer:
    """What a bundle answers for a session.

    Attributes:
        target: of the task.
        answer: the most probable class, the labels that are more likely than not, or the value.
        probabilities: of each class or label; None for a value.
        unit: of a value.
        low, high: prediction interval of a value, at 90 %; None where the bundle saw too few cases to give one.
        contrasts: that were looked at.
        out_of_scope: why it may not be relied on, a phrase a reason.
    """

    target: str
    answer: str | list[str] | float
    probabilities: dict[str, float] | None
    unit: str
    low: float | None
    high: float | None
    contrasts: tuple[str, ...]
    out_of_scope: tuple[str, ...] = ()

    def to_json(self) -> str:
        values = asdict(self)
        if not self.out_of_scope:
            del values["out_of_scope"]
        return json.dumps(values, indent=2) + "\n"

    def to_text(self) -> str:
        """One number a line: the value; the probability of the second of two classes; else of each class or label."""
        if self.probabilities is None:
            return f"{self.answer}\n"
        values = list(self.probabilities.values())
        two_classes = len(values) == 2 and not isinstance(self.answer, list)  # two labels are two answers
        return "".join(f"{value}\n" for value in (values[1:] if two_classes else values))

    def cells(self) -> dict[str, Any]:
        """A row of a table."""
        if self.probabilities is None:
            return {"answer": self.answer, "low": self.low, "high": self.high}
        answer = " ".join(self.answer) if isinstance(self.answer, list) else self.answer
        return {"answer": answer, **{f"p_{name}": value for name, value in self.probabilities.items()}}


def read_answer(path: Path) -> SessionAnswer:
    """Of a file that ``predict`` wrote. Raises: ConfigError where it did not."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = SessionAnswer(**values)
        return replace(found, contrasts=tuple(values["contrasts"]), out_of_scope=tuple(found.out_of_scope))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not an answer that brainfm predict wrote ({error})") from None


def mask_name(key: Key, target: str, ending: str = ".nii.gz") -> str:
    """A file name that is readable, legal on every system and another one for every session.

    An empty session is left out. Where a part holds other characters than letters, digits, ``.``, ``-`` and single
    ``_``, they become ``-``, what is too long is cut, and eight digits of a hash keep the name unique.
    """
    parts = list(key if key[2] else key[:2])
    readable = "__".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip(".-") for part in parts)
    if all(_PLAIN.fullmatch(part) for part in parts) and len("__".join(parts)) <= _LONGEST:
        readable = "__".join(parts)
    else:
        digest = hashlib.blake2b("\0".join(key).encode(errors="surrogateescape"), digest_size=4).hexdigest()
        readable = f"{readable[:_LONGEST]}-{digest}"
    return f"{readable}_{re.sub(r'[^A-Za-z0-9.-]+', '-', target)[:50]}{ending}"


def check_volume(path: Path, inputs: Collection[Path]) -> Path:
    """The file of a mask or a map. Raises: ConfigError where it is no mask or an input, FileError."""
    if not path.name.endswith(_ENDINGS) or path.name in _ENDINGS:
        raise ConfigError(f"out={path}: expected a file that ends in .nii or .nii.gz")
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder, expected a file")
    if path.exists() and any(path.samefile(file) for file in inputs):
        raise ConfigError(f"out={path} is one of the inputs, expected another file")
    check_writable(path.parent)
    return path


@dataclass(frozen=True)
class Label:
    """A session's label for the target: its path as written, and whether any value but 0 means the one class."""

    path: str
    is_mask: bool


def label_of(scans: Sequence[Scan], target: str) -> Label | None:
    """None where the session has no such label. Raises: ManifestError where its rows contradict each other."""
    labels = session_labels(scans)
    for ending in LABEL_ENDINGS:
        if target + ending in labels:
            return Label(labels[target + ending], ending == "_mask")
    return None


def grid_owner(label: Path, scans: Sequence[Path]) -> Path | None:
    """The scan of the session on whose grid the label was drawn; only headers are read.

    Raises: ScanError where the label or a scan is missing or has no usable header.
    """
    grid = nifti.read_header(label).grid
    return next((path for path in scans if nifti.read_header(path).grid.same_place(grid)), None)


def strange_grid(label: Path) -> ScanError:
    """For a label without an owner: it cannot be trusted to lie where its header says."""
    return ScanError(f"{label}: lies on another grid than every scan of its session, expected the grid of one of them")
