"""Sessions of a manifest as a data set of nnU-Net: ``imagesTr``, ``labelsTr`` and ``dataset.json``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.data.manifest import Manifest, Scan, plain_first, session_labels, write_left_out
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.files import check_writable, write_text, writing_folder
from brainfm.imaging import nifti

_NAME = re.compile(r"Dataset\d{3}_\w+")


@dataclass(frozen=True)
class NnunetDataset:
    """What became of a manifest.

    Attributes:
        cases: names of the cases that were written.
        labels: name -> value in the label volumes.
        left_out: (session, reason), also beside ``dataset.json``.
    """

    cases: tuple[str, ...]
    labels: Mapping[str, int]
    left_out: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Case:
    name: str
    scans: tuple[Path, ...]
    labels: Path


def write_dataset(manifest: Manifest, out: Path, target: str, contrasts: Sequence[str]) -> NnunetDataset:
    """Writes every session that has all the contrasts and the label volume on one grid.

    Files are turned to RAS+, so that arrays read as Z, Y, X are those that brainfm reads as X, Y, Z, and lose what a
    header says beside the grid. Label values become 0, 1, 2, ... in their order, as nnU-Net asks.

    Args:
        out: the folder, called ``DatasetNNN_Name``.
        target: column ``<target>_mask`` (anything but 0 is 1) or ``<target>_labels``.
        contrasts: the channels, in this order.

    Raises:
        ConfigError: for another name of a folder, one that holds something, or a channel that is named twice.
        FileError: where it cannot be written; it appears whole or not at all.
        ManifestError: where no session can be written, or two columns could be meant.
    """
    if not _NAME.fullmatch(out.name):
        raise ConfigError(f"out={out}: nnU-Net wants a folder called DatasetNNN_Name, e.g. Dataset501_{target}")
    if not contrasts or len(set(contrasts)) < len(contrasts):
        raise ConfigError(f"contrasts=[{', '.join(contrasts)}]: expected one or more channels, each once")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is there already, and cases of two data sets would mix; expected a free place")
    check_writable(out.parent)
    column = _column(manifest, target)
    cases, left_out = _cases(manifest, column, contrasts)
    usable, values = [], set()
    for case in cases:
        reason, found = _fault(case)
        if reason:
            left_out.append((case.name, reason))
        else:
            usable.append(case)
            values |= found
    if not usable:
        raise ManifestError(
            f"{manifest.path}: none of {len(manifest.sessions())} sessions has {', '.join(contrasts)} and {column} on "
            f"one grid{f' (first: {left_out[0][0]}: {left_out[0][1]})' if left_out else ''}"
        )
    foreground = [1] if column.endswith("_mask") else sorted(values - {0})
    names = [target] if column.endswith("_mask") else [f"{target}_{value}" for value in foreground]
    labels = {"background": 0} | {name: index + 1 for index, name in enumerate(names)}
    about = {
        "channel_names": {str(index): contrast for index, contrast in enumerate(contrasts)},
        "labels": labels,
        "numTraining": len(usable),
        "file_ending": ".nii.gz",
        "label_values": {name: value for name, value in zip(names, foreground, strict=True)},
    }
    with writing_folder(out) as part:
        for case in usable:
            _write(case, part, foreground, binary=column.endswith("_mask"))
        write_text(part / "dataset.json", json.dumps(about, indent=1) + "\n")
        write_left_out(part / "dataset.csv", left_out)
    return NnunetDataset(tuple(case.name for case in usable), labels, tuple(left_out))


def _column(manifest: Manifest, target: str) -> str:
    there = {name for scan in manifest.scans for name in scan.columns}
    found = [name for name in (f"{target}_mask", f"{target}_labels") if name in there]
    if len(found) != 1:
        columns = ", ".join(sorted(name for name in there if name.endswith(("_mask", "_labels")))) or "none"
        raise ManifestError(f"{manifest.path}: expected one column {target}_mask or {target}_labels, found {columns}")
    return found[0]


def _cases(manifest: Manifest, column: str, contrasts: Sequence[str]) -> tuple[list[_Case], list[tuple[str, str]]]:
    """The sessions that have all that is needed, and why the others have not."""
    cases, left_out, taken = [], [], set()
    for key, scans in manifest.sessions().items():
        name = re.sub(r"[^A-Za-z0-9-]+", "-", "-".join(part for part in key[1:] if part)).strip("-") or "case"
        while name in taken:
            name += "-2"
        taken.add(name)
        chosen = {contrast: _plainest(scans, contrast) for contrast in contrasts}
        label = session_labels(scans).get(column)
        lacking = [contrast for contrast, scan in chosen.items() if scan is None] + ([] if label else [column])
        if lacking or label is None:
            left_out.append((name, f"has no {', '.join(lacking)}"))
            continue
        files = tuple(manifest.resolve(scan.path) for scan in chosen.values() if scan is not None)
        cases.append(_Case(name, files, manifest.resolve(label)))
    return cases, left_out


def _plainest(scans: Sequence[Scan], contrast: str) -> Scan | None:
    return min((scan for scan in scans if scan.contrast == contrast), key=plain_first, default=None)


def _fault(case: _Case) -> tuple[str, set[int]]:
    """Why a case cannot be written, or nothing, and the values of its label volume."""
    try:
        volume, grid = nifti.read(case.labels, labels=True)
        apart = [path.name for path in case.scans if not nifti.read_header(path).grid.same_place(grid)]
    except ScanError as error:
        return str(error), set()
    if apart:
        return f"{', '.join(apart)}: on another grid than the label volume, and nnU-Net takes one a case", set()
    return "", {int(value) for value in np.unique(volume.voxels)}


def _write(case: _Case, out: Path, foreground: Sequence[int], binary: bool) -> None:
    for index, path in enumerate(case.scans):
        volume, _ = nifti.read(path)
        nifti.write(out / "imagesTr" / f"{case.name}_{index:04d}.nii.gz", volume)
    volume, _ = nifti.read(case.labels, labels=True)
    values = np.zeros(volume.voxels.shape, np.uint8)
    if binary:
        values[volume.voxels != 0] = 1
    else:
        for index, value in enumerate(foreground):
            values[volume.voxels == value] = index + 1
    path = out / "labelsTr" / f"{case.name}.nii.gz"
    nifti.write_labels(path, values, out / "imagesTr" / f"{case.name}_0000.nii.gz")
