"""Files in, a mask on the grid of one of them out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from brainfm.data.manifest import CONTRASTS, LABEL_ENDINGS, Manifest, Scan, contrast_of, read_manifest, session_labels
from brainfm.imaging import nifti
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.preprocess import prepare_session, restore_probabilities
from brainfm.specs import BundleError, ConfigError, ManifestError, PreprocessSpec, ScanError, TaskSpec
from brainfm.tasks.bundle import Bundle, read_bundle
from brainfm.tasks.windows import Network, predict_windows

Key = tuple[str, str, str]  # dataset, subject, session
PathLike = str | os.PathLike[str]

CLAIM = "predictions.json"
LISTING = "predictions.csv"
FAILURES = "failures.csv"
_ENDINGS = (".nii", ".nii.gz")
_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*")


@dataclass(frozen=True)
class Engine:
    """What turns prepared scans into probabilities.

    Attributes:
        networks: give logits; their probabilities are averaged.
        task, preprocess: of the bundle.
        device: where the networks are.
        autocast: the precision they compute in, None for float32.
        overlap: share of a window that its neighbour repeats, in [0, 1).
        fingerprint: of the bundle.
    """

    networks: tuple[Network, ...]
    task: TaskSpec
    preprocess: PreprocessSpec
    device: torch.device
    autocast: torch.dtype | None
    fingerprint: str
    overlap: float = 0.5

    @classmethod
    def load(
        cls, bundle: PathLike | Bundle, device: str = "auto", precision: str = "auto", overlap: float = 0.5
    ) -> Engine:
        """Raises: BundleError where the bundle is not whole; ConfigError for impossible values."""
        if not 0 <= overlap < 1:
            raise ConfigError(f"overlap={overlap}: expected 0 or more and less than 1")
        place = settle_device(device)
        dtype = settle_precision(precision, place)
        read = bundle if isinstance(bundle, Bundle) else read_bundle(bundle)
        networks = tuple(network.to(place) for network in read.networks)
        return cls(networks, read.task, read.preprocess, place, dtype, read.fingerprint, overlap)


def predict(
    bundle: PathLike | Bundle,
    inputs: Mapping[str, PathLike],
    out: PathLike | None = None,
    on: str | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
) -> np.ndarray:
    """The mask of one session, on the grid of one of its files.

    Args:
        bundle: a bundle's folder.
        inputs: file by contrast, e.g. ``{"flair": "flair.nii.gz"}``; any subset of the bundle's contrasts.
        out: where to write the mask, ``.nii`` or ``.nii.gz``: uint8, with the affine and orientation of the file it
            answers for. It appears whole or not at all.
        on: the contrast whose file's grid is answered on; by default the first of the inputs.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        overlap: share of a window that its neighbour repeats; less is quicker and coarser.
        precision: ``auto`` (bfloat16 on a GPU that has it), ``32-true``, ``bf16-mixed`` or ``16-mixed``.

    Returns:
        uint8 label values, in the shape and axis order of that file.

    Raises:
        BundleError: the bundle is missing, incomplete or was changed.
        ConfigError: an unknown contrast, one that the bundle never saw, no input at all, or an impossible output.
        ScanError: an input file is missing or cannot be used.
    """
    engine = Engine.load(bundle, device, precision, overlap)
    files = check_inputs(inputs, engine.task)
    on = next(iter(files)) if on is None else on
    if on not in files:
        raise ConfigError(f"no input {on} to answer on, expected one of the inputs {', '.join(files)}")
    target = None if out is None else check_output(out, files.values())
    labels = answer(engine, files, reference=on)
    if target is not None:
        write_mask(target, labels, files[on])
    return labels


def answer(engine: Engine, files: Mapping[str, Path], reference: str, grid: FileGrid | None = None) -> np.ndarray:
    """Label values of one session, uint8, in the shape and axis order of a file.

    Args:
        files: file by contrast, each a contrast of the task.
        reference: the contrast whose directions the network's grid takes.
        grid: of the file that is answered for; by default the reference's.

    Raises:
        ScanError: where any file cannot be used: what the user gave is used or refused, never dropped in silence.
    """
    prepared = prepare_session(files, {}, engine.preprocess, reference=reference)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))
    contrasts = engine.task.contrasts
    shape = next(iter(prepared.scans.values())).shape
    image = torch.zeros(len(contrasts), *shape)
    present = torch.tensor([contrast in files for contrast in contrasts])
    for m, contrast in enumerate(contrasts):
        if contrast in files:
            image[m] = torch.from_numpy(prepared.scans.pop(contrast))
    recipe = prepared.recipes[reference]
    probabilities = _mean_probabilities(engine, image, present)
    if grid is not None:
        recipe = replace(recipe, file=grid)
    indices = restore_probabilities(probabilities.numpy(), recipe)
    return np.asarray(engine.task.values, dtype=np.uint8)[indices]


def _mean_probabilities(engine: Engine, image: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[K, X, Y, Z] float32, the mean over the members of the ensemble."""
    total: torch.Tensor | None = None
    for network in engine.networks:
        probabilities = predict_windows(
            network,
            image,
            present,
            engine.task.patch_vox,
            overlap=engine.overlap,
            batch=1 if engine.device.type == "cpu" else 2,  # more gains no time on a CPU and costs memory
            device=engine.device,
            autocast=engine.autocast,
        )
        total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise BundleError("the bundle has no networks, expected at least one")
    return total.div_(len(engine.networks))


# ---- what the user gave ----------------------------------------------------------------------------------------------


def check_inputs(inputs: Mapping[str, PathLike], task: TaskSpec) -> dict[str, Path]:
    """The files as paths, in the order given.

    Raises:
        ConfigError: for no input, a contrast outside the vocabulary, one the task does not read, or one file twice.
        ScanError: for a file that is not there.
    """
    legal = ", ".join(task.contrasts)
    if not inputs:
        raise ConfigError(f"no input was given, expected one or more of {legal}")
    files: dict[str, Path] = {}
    for contrast, text in inputs.items():
        if contrast not in CONTRASTS:
            meant = contrast_of(contrast)
            hint = f"perhaps {meant!r}; " if meant in task.contrasts else ""
            raise ConfigError(f"input.{contrast}: unknown contrast, expected {hint}one of {', '.join(CONTRASTS)}")
        if contrast not in task.contrasts:
            raise ConfigError(f"input.{contrast}: the bundle was never trained on {contrast}, expected one of {legal}")
        path = Path(text)
        if not os.path.isfile(path):
            raise ScanError(f"{path}: no such file, given as input.{contrast}")
        twin = next((name for name, other in files.items() if other.samefile(path)), None)
        if twin is not None:
            raise ConfigError(f"input.{twin} and input.{contrast} are one file, {path}; expected a file each")
        files[contrast] = path
    return files


def check_output(out: PathLike, inputs: Collection[Path]) -> Path:
    """The output as a path. Raises: ConfigError where it cannot be written or would replace an input."""
    path = Path(out)
    if not path.name.endswith(_ENDINGS) or path.name in _ENDINGS:
        raise ConfigError(f"out={path}: expected a file that ends in .nii or .nii.gz")
    if path.is_dir():
        raise ConfigError(f"out={path} is a folder, expected a file")
    if path.exists() and any(path.samefile(file) for file in inputs):
        raise ConfigError(f"out={path} is one of the inputs, expected another file")
    check_folder(path.parent)
    return path


def check_folder(folder: Path) -> None:
    """Raises: ConfigError where the folder neither exists nor could be made, before any time is spent."""
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if os.path.exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: nothing can be written there, expected a folder that may be written to")


def settle_device(name: str) -> torch.device:
    """Raises: ConfigError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def settle_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Raises: ConfigError where the precision is unknown."""
    if name == "auto":
        # float32 on a CPU: without matrix units (AMX) bfloat16 convolutions take 2.5 times as long there.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if name not in _PRECISIONS:
        raise ConfigError(f"precision={name}: expected auto, {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]


def write_mask(path: Path, labels: np.ndarray, like: Path) -> None:
    """Writes labels in the axis order of ``like`` on its grid. Raises: ConfigError where it cannot be written."""
    grid = nifti.read_header(like).grid
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nifti.write_labels(path, grid.to_ras(labels), like)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None


# ---- a whole manifest ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What became of a manifest: sessions predicted now, found finished, and failed (key and reason)."""

    done: int
    kept: int
    failures: dict[Key, str]


def predict_manifest(
    bundle: PathLike | Bundle | Engine,
    manifest: PathLike | Manifest,
    out: PathLike,
    *,
    sessions: Collection[Key] | None = None,
    device: str = "auto",
    precision: str = "auto",
    overlap: float = 0.5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """One mask a session, ``<dataset>__<subject>__<session>_<target>.nii.gz``; called again, it continues.

    A mask lies on the grid of the session's label for the target, where it has one, so that both can be compared; else
    on that of the first contrast of the task that the session has. A session that fails is listed in ``failures.csv``
    and the rest is done; ``predictions.csv`` lists the masks.

    Args:
        out: a folder of its own; masks of this bundle that are already there are kept.
        sessions: only these.
        progress: called with (sessions done, sessions in all).

    Raises:
        BundleError, ManifestError: the bundle or the manifest cannot be used.
        ConfigError: the folder holds masks of another bundle, or cannot be written.
    """
    engine = bundle if isinstance(bundle, Engine) else Engine.load(bundle, device, precision, overlap)
    manifest = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    folder = Path(out)
    _claim(folder, engine)
    wanted = {key: scans for key, scans in manifest.sessions().items() if sessions is None or key in sessions}
    listed: list[list[str]] = []
    failures: dict[Key, str] = {}
    kept = 0
    for number, (key, scans) in enumerate(wanted.items()):
        progress(number, len(wanted))
        name = mask_name(key, engine.task.target)
        try:
            files, reference, like = _plan(manifest, key, scans, engine.task)
            if (folder / name).is_file():
                kept += 1
            else:
                labels = answer(engine, files, reference, nifti.read_header(like).grid)
                write_mask(folder / name, labels, like)
            listed.append([*key, str(like), name])
        except (ScanError, ManifestError) as error:
            failures[key] = str(error)
    progress(len(wanted), len(wanted))
    write_table(folder / LISTING, ["dataset", "subject", "session", "grid", "file"], listed)
    write_table(folder / FAILURES, ["dataset", "subject", "session", "reason"], [[*k, r] for k, r in failures.items()])
    return Report(len(listed) - kept, kept, failures)


def mask_name(key: Key, target: str) -> str:
    """A file name that is readable, legal on every system and another one for every session.

    An empty session is left out. Where a part holds other characters than letters, digits, ``.``, ``-`` and single
    ``_``, they become ``-`` and eight digits of a hash keep the name unique.
    """
    parts = list(key if key[2] else key[:2])
    readable = "__".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part).strip(".-") for part in parts)
    if all(_PLAIN.fullmatch(part) for part in parts):
        readable = "__".join(parts)
    else:
        readable += "-" + hashlib.blake2b("\0".join(key).encode(), digest_size=4).hexdigest()
    return f"{readable}_{re.sub(r'[^A-Za-z0-9.-]+', '-', target)}.nii.gz"


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


def _plan(manifest: Manifest, key: Key, scans: Sequence[Scan], task: TaskSpec) -> tuple[dict[str, Path], str, Path]:
    """The input files, the reference contrast, and the file whose grid is answered on.

    Of several scans of one contrast the first by path is read.
    """
    shown: dict[str, Path] = {}
    for contrast in task.contrasts:
        paths = sorted(scan.path for scan in scans if scan.contrast == contrast)
        if paths:
            shown[contrast] = manifest.resolve(paths[0])
    if not shown:
        raise ManifestError(f"{'/'.join(key)} has none of the contrasts {', '.join(task.contrasts)}")
    first = next(iter(shown))
    label = label_of(scans, task.target)
    if label is None:
        return shown, first, shown[first]
    path = manifest.resolve(label.path)
    on = grid_owner(path, [manifest.resolve(scan.path) for scan in scans])
    if on is None:
        raise strange_grid(path)
    return shown, next((contrast for contrast, file in shown.items() if file == on), first), path


def grid_owner(label: Path, scans: Sequence[Path]) -> Path | None:
    """The scan of the session on whose grid the label was drawn; only headers are read.

    Raises: ScanError where the label or a scan is missing or has no usable header.
    """
    grid = nifti.read_header(label).grid
    return next((path for path in scans if nifti.read_header(path).grid.same_place(grid)), None)


def strange_grid(label: Path) -> ScanError:
    """For a label without an owner: it cannot be trusted to lie where its header says."""
    return ScanError(f"{label}: lies on another grid than every scan of its session, expected the grid of one of them")


def _claim(folder: Path, engine: Engine) -> None:
    """Marks the folder as this bundle's. Raises: ConfigError where it is another one's."""
    check_folder(folder)
    mark = {"bundle": engine.fingerprint, "task": engine.task.to_dict()}
    path = folder / CLAIM
    if path.exists():
        found = read_claim(folder)[0]
        if found != engine.fingerprint:
            raise ConfigError(f"{folder} holds masks of bundle {found}, this is {engine.fingerprint}: use another out=")
    else:
        write_text(path, json.dumps(mark, indent=2) + "\n")


def read_claim(folder: Path) -> tuple[str, TaskSpec]:
    """The bundle's fingerprint and task that the masks of a folder answer.

    Raises: ConfigError where the folder was not written by predict_manifest.
    """
    try:
        values = json.loads((folder / CLAIM).read_text(encoding="utf-8"))
        return str(values["bundle"]), TaskSpec.from_dict(values["task"])
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no {CLAIM}; expected a folder that brainfm predict wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder / CLAIM} is not as brainfm predict wrote it ({error}); use another folder"
        ) from None


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV that appears whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """A text file that appears whole or not at all. Raises: ConfigError where it cannot be written."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
