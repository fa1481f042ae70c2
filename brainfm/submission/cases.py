"""Sessions to try a submission on: made ones of every kind that has broken submissions, and given ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.errors import ConfigError
from brainfm.imaging import nifti
from brainfm.submission.challenge import ChallengeTask, Input, input_of
from brainfm.submission.convert import SCANS
from brainfm.volume import Volume

KINDS = (
    "plain", "again", "alternative", "turned", "oblique", "thick", "small", "hot", "blank", "one_blank", "few",
    "corrupt", "typical",
)  # fmt: skip
_PLAIN = ((72, 84, 64), (2.6, 2.6, 2.6))  # shape in voxels, edges in mm
_OTHER = {"thick": ((128, 144, 20), (1.5, 1.5, 7.0)), "small": ((32, 32, 16), (1.0, 1.0, 1.0))}


@dataclass(frozen=True)
class Case:
    """One session that is passed.

    Attributes:
        name: of the case.
        folder: that becomes ``/input``; all files lie in it.
        files: file by flag.
        refused: whether it must be refused; else it must be answered.
        like: name of the case whose answer must be the same, byte by byte or, of another grid, voxel by voxel.
    """

    name: str
    folder: Path
    files: Mapping[str, Path]
    refused: bool = False
    like: str = ""


def made(task: ChallengeTask, folder: Path, kinds: Sequence[str] = KINDS) -> list[Case]:
    """Writes sessions with heads of noise and texture.

    ============ =====================================================================================================
    plain        2.6 mm, axes right, anterior, superior; the first of the alternatives
    again        the same files once more: the answer must be the same, byte by byte
    alternative  the other ones of the alternatives
    turned       the plain session stored posterior, inferior, right: the answer must be the same, voxel by voxel
    oblique      turned by 20 degrees against the scanner
    thick        20 slices of 7 mm
    small        32 x 32 x 16 voxels of 1 mm, as in a fixture of the organisers
    hot          one voxel in a hundred is a million times as bright as tissue
    blank        nothing but zeros
    one_blank    one of several scans holds nothing but zeros
    few          neither of the alternatives
    corrupt      the first file cut in half: must be refused
    typical      the size of the task's scans, for the time
    ============ =====================================================================================================

    Args:
        kinds: of those; one that a task cannot have (``few`` without alternatives) is left out.

    Raises: ConfigError for an unknown kind.
    """
    return [_made(task, kind, call, folder / kind) for kind, call in calls_of(task, kinds).items()]


def calls_of(task: ChallengeTask, kinds: Sequence[str] = KINDS) -> dict[str, tuple[Input, ...]]:
    """The kinds that a task can have, each with the scans that are passed. Raises: ConfigError for an unknown kind."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"cases={unknown[0]}: expected of {', '.join(KINDS)}")
    calls = task.calls()
    found = {}
    for kind in kinds:
        call = calls[-1] if kind == "alternative" else calls[0]
        if kind == "few":
            call = tuple(one for one in call if not one.group)
        if (kind == "alternative" and len(calls) < 2) or (kind == "few" and len(call) == len(calls[0])):
            continue
        if kind == "one_blank" and len(call) < 2:
            continue
        found[kind] = call
    return found


def _made(task: ChallengeTask, kind: str, call: Sequence[Input], folder: Path) -> Case:
    folder.mkdir(parents=True, exist_ok=True)
    shape, spacing = (task.shape_vox, task.spacing_mm) if kind == "typical" else _OTHER.get(kind, _PLAIN)
    files = {}
    for order, one in enumerate(call):
        volume = _head(order, shape, spacing)
        if kind == "blank" or (kind == "one_blank" and order == len(call) - 1):
            volume = Volume(np.zeros_like(volume.voxels), volume.affine_mm)
        if kind == "hot":
            volume = Volume(_with_hot_voxels(volume.voxels, order), volume.affine_mm)
        if kind == "oblique":
            volume = Volume(volume.voxels, _rotation(20.0) @ volume.affine_mm)
        files[one.flag] = folder / f"{one.flag}.nii.gz"
        nifti.write(files[one.flag], volume, "PIR" if kind == "turned" else "RAS")
    if kind == "corrupt":
        first = next(iter(files.values()))
        first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    like = "plain" if kind in ("again", "turned") else ""
    return Case(kind, folder, files, refused=kind == "corrupt", like=like)


def _head(order: int, shape: Sequence[int], spacing_mm: Sequence[float]) -> Volume:
    """A skull-stripped head: two shells of different brightness, a bright ball on the left, noise, zeros around it."""
    rng = np.random.default_rng(order)
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = x**2 + y**2 + z**2
    brightness = np.where(radius < 0.35, 300 + 60 * order, 520 - 90 * order).astype(np.float32)
    brightness = brightness + 40 * np.sin(5 * x + order) * np.cos(4 * y)
    brightness[(x + 0.4) ** 2 + (y - 0.1) ** 2 + (z - 0.1) ** 2 < 0.03] += 250
    brightness += rng.normal(0, 12, tuple(shape)).astype(np.float32)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -np.array(shape) * np.array(spacing_mm) / 2
    return Volume(np.where(radius < 0.8, np.clip(brightness, 1, 4000), 0).astype(np.int16), affine)


def _with_hot_voxels(voxels: np.ndarray, seed: int) -> np.ndarray:
    """One of a hundred voxels of the head a billion, as a division by nearly nothing leaves them."""
    hot = (np.random.default_rng(seed).random(voxels.shape) < 0.01) & (voxels > 0)
    return np.where(hot, 1e9, voxels).astype(np.float32)


def _rotation(degrees: float) -> np.ndarray:
    """[4, 4], about an axis that is none of the scanner's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turn


def given(task: ChallengeTask, root: Path, most: int | None = None) -> list[Case]:
    """Sessions of a folder: every folder below it, at any depth, that holds all that an organiser passes is one.

    Files are told apart by the organisers' names or by what their names say. Of an embedding every file is a case.

    Args:
        root: e.g. the folder of a task's fine-tuning data, of which ``preprocessed`` is looked at.
        most: the first ones, in alphabetical order; None: all.

    Raises: ConfigError where there is none.
    """
    calls = [{one.flag for one in call} for call in task.calls()]
    root = root / SCANS if (root / SCANS).is_dir() else root
    found = []
    for folder in sorted({path.parent for path in root.rglob("*.nii*")}):
        name = str(folder.relative_to(root)).replace("/", "_") if folder != root else folder.name
        scans = sorted(folder.glob("*.nii*"))
        if task.kind == "embedding":
            flag = task.inputs[0].flag
            found += [Case(f"{name}_{path.name.split('.')[0]}", folder, {flag: path}) for path in scans]
            continue
        files: dict[str, Path] = {}
        for path in scans:
            one = input_of(task, path.name)
            if one is not None:
                files.setdefault(one.flag, path)
        call = next((call for call in calls if call <= set(files)), None)
        if call is not None:
            found.append(Case(name, folder, {one.flag: files[one.flag] for one in task.inputs if one.flag in call}))
    if not found:
        expected = " or ".join(", ".join(f"{one.file}.nii.gz" for one in call) for call in task.calls())
        raise ConfigError(f"{root}: no folder holds all scans of a case of {task.id}, expected {expected}")
    return found[:most]
