"""The tree of a folder: its image files, and the few side files that matter, from one walk."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from brainfm.errors import ManifestError
from brainfm.imaging.endings import ending_of, header_names, is_other

_SIDE = (".bval", ".zip", "participants.tsv", "sessions.tsv", "dataset.json", "label.txt", "labels.txt",
         "openneuro_metadata.csv", "dataset_description.json")  # fmt: skip
_SERIES = (".dcm", ".ima")
_NO_TEXT = "name that is not UTF-8; rename it"
_OTHER_FORMAT = "format that is not read; convert it to .nii.gz"
_NO_HEADER = "half of a pair of header and numbers; the other file is missing"
_ZIP = ".zip, not looked into; unpack it where it is"


@dataclass(frozen=True, slots=True)
class Tree:
    """A dataset's folder: its image files and side files, as tuples of path parts below ``root``.

    ``real`` has the whole paths of images that lie in a folder called like an image, by the whole path of that folder;
    ``aside`` what was no candidate, and why.
    """

    name: str
    root: str
    files: tuple[tuple[str, ...], ...]
    sides: frozenset[tuple[str, ...]]
    real: Mapping[str, str] = field(default_factory=dict)
    aside: tuple[tuple[str, str], ...] = ()

    def path(self, parts: Sequence[str]) -> str:
        """Where a file lies."""
        whole = os.path.join(self.root, *parts)
        return self.real.get(whole, whole)

    def folders(self) -> list[Tree]:
        """The first-level folders that hold images, in the order of their names."""
        files: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        sides: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for paths, found in ((self.files, files), (self.sides, sides)):
            for parts in paths:
                if len(parts) > 1:
                    found[parts[0]].append(parts[1:])
        return [
            Tree(name, os.path.join(self.root, name), tuple(inside), frozenset(sides[name]), self.real)
            for name, inside in sorted(files.items())
        ]


def walk(root: Path) -> Tree:
    """All image files and the few side files that matter; hidden ones are passed over, linked folders entered once."""
    if not root.is_dir():
        raise ManifestError(f"no folder at {root}, expected the folder of a dataset")
    top = os.path.abspath(root)
    files: list[tuple[str, ...]] = []
    sides: list[tuple[str, ...]] = []
    aside: list[tuple[str, str]] = []
    linked = {os.path.realpath(top)}
    pending: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    while pending:
        folder, parts = pending.pop()
        for entry in _entries(folder, parts, aside):
            name, inside = entry.name, (*parts, entry.name)
            if _is_folder(entry):
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if target in linked:
                        continue
                    linked.add(target)
                pending.append((entry.path, inside))
            elif ending_of(name):
                if _is_text(inside):
                    files.append(inside)
                else:
                    aside.append((_shown(inside), _NO_TEXT))
            elif is_other(name):
                series = name.lower().endswith(_SERIES)  # thousands of them are one scan
                aside.append((_shown((*parts, f"*{name[-4:]}") if series else inside), _OTHER_FORMAT))
            elif name.endswith(_SIDE) and _is_text(inside):
                sides.append(inside)
                if name.endswith(".zip"):
                    aside.append((_shown(inside), _ZIP))
    logical, real = _standing_for(files, top)
    name = os.path.basename(top) or "dataset"
    return Tree(name, top, tuple(sorted(logical)), frozenset(sides), real, tuple(sorted(set(aside))))


def _entries(folder: str, parts: tuple[str, ...], aside: list[tuple[str, str]]) -> list[os.DirEntry[str]]:
    """What a folder holds. Of pairs of files the one with the numbers stands for both; half a pair is put aside."""
    try:
        with os.scandir(folder) as found:
            entries = {entry.name: entry for entry in found if not entry.name.startswith(".")}
    except OSError as error:
        if not parts:
            raise
        aside.append((_shown(parts), f"folder that cannot be read: {error.strerror}"))
        return []
    halves, headers = set(), set()
    for name in entries:
        needed = header_names(name)
        header = next((other for other in needed if other in entries), None)
        if needed and header is None and not _is_folder(entries[name]):
            halves.add(name)
        headers.add(header)
    halves |= {name for name in entries if name.lower().endswith(".hdr") and name not in headers}
    aside.extend((_shown((*parts, name)), _NO_HEADER) for name in halves)
    return [entry for name, entry in entries.items() if name not in halves]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _shown(parts: Sequence[str]) -> str:
    """A path that can be written down and printed, with what is no text as escapes."""
    return "/".join(parts).encode(errors="backslashreplace").decode()


def _is_text(parts: Sequence[str]) -> bool:
    """Whether a path can be written down; what is not UTF-8 comes from the system with surrogates in it."""
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _standing_for(files: Sequence[tuple[str, ...]], top: str) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """The files, where the one image of a folder that is called like an image has the name of that folder; and the
    whole paths of these."""
    counts = Counter(parts[:-1] for parts in files)
    logical, real = [], {}
    for parts in files:
        if len(parts) > 1 and ending_of(parts[-2]) and counts[parts[:-1]] == 1:
            real[os.path.join(top, *parts[:-1])] = os.path.join(top, *parts)
            parts = parts[:-1]
        logical.append(parts)
    return logical, real
