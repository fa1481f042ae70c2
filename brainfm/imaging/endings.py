"""Endings of scan files: those that are read, those of other formats, and files that belong together."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

# Longest first, and in any spelling: .NII and .nii.GZ are scans as well.
READ = (
    ".nii.gz", ".nii.bz2", ".nii", ".img.gz", ".img.bz2", ".img", ".mgz", ".mgh.gz", ".mgh",
    ".mnc.gz", ".mnc", ".brik.gz", ".brik",
)  # fmt: skip
# Images in formats that are not read; files of these are named, so that nobody wonders where they went.
OTHER = (
    ".nrrd", ".nhdr", ".mha", ".mhd", ".mif", ".mif.gz", ".gipl", ".gipl.gz", ".par", ".dcm", ".ima", ".nii.xz",
    ".nii.zst", ".nii.lzma", ".nii.7z", ".nii.rar",
)  # fmt: skip
_HEADERS = {".img": ".hdr", ".brik": ".HEAD"}  # of formats that keep their header in a file of its own


@lru_cache(maxsize=1 << 16)  # a walk asks of each name several times
def ending_of(name: str) -> str:
    """The ending of a scan as it is spelt in the name; empty where the name is none of a scan."""
    lower = name.lower()
    if not lower.endswith(READ):
        return ""
    found = next(ending for ending in READ if lower.endswith(ending))
    return name[len(name) - len(found) :] if len(name) > len(found) else ""


def is_other(name: str) -> bool:
    """Whether a name is that of an image in a format that is not read."""
    return name.lower().endswith(OTHER)


def strip_ending(name: str) -> str:
    """The name without the ending of a scan."""
    ending = ending_of(name)
    return name[: -len(ending)] if ending else name


def header_names(name: str) -> tuple[str, ...]:
    """How the header file of ``x.img`` or ``x.BRIK`` may be spelt, best first; empty where the format has none."""
    ending = ending_of(name)
    if ending.lower().startswith((".nii", ".mg")):
        return ()
    packed = next((p for p in (".gz", ".bz2") if ending.lower().endswith(p)), "")
    plain = ending[: len(ending) - len(packed)]
    header = _HEADERS.get(plain.lower())
    if header is None:
        return ()
    stem, packing = name[: -len(ending)], ending[len(plain) :]
    spelt = (header.lower(), header.upper()) if plain.islower() else (header.upper(), header.lower())
    packings = (packing, "") if packing else ("", ".gz", ".bz2")
    return tuple(stem + spelling + p for p in packings for spelling in spelt)


def companions(path: str | os.PathLike[str]) -> list[Path]:
    """The other files that a scan is made of: the header of ``.img`` and ``.BRIK``, and the ``.mat`` of SPM."""
    path = Path(path)
    headers = [path.with_name(name) for name in header_names(path.name)]
    found = [header for header in headers if header.is_file()][:1]
    if found and found[0].suffix.lower() == ".hdr":
        found += [mat for mat in (path.with_name(strip_ending(path.name) + ".mat"),) if mat.is_file()]
    return found
