"""Prediction in a container, as ``/app/predict.py`` calls it: an organiser's flags in, one file out.

Beside the script lie ``task.json`` (the task's flags and output), ``settings.json``, and ``bundle/``, or for an
embedding ``backbone.safetensors`` and ``scale.npy``. Scans are answered as ``brainfm predict`` and ``embed`` do.
What is added: a scan without any signal counts as not given, and where none is left a harmless answer is written, since
a case without a file costs more than a poor answer. A file that cannot be read is refused: one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from brainfm.errors import BrainfmError, BrainfmWarning, BundleError, ConfigError, ScanError
from brainfm.submission.challenge import ChallengeTask, Input

TASK, SETTINGS, BUNDLE, BACKBONE, SCALE = "task.json", "settings.json", "bundle", "backbone.safetensors", "scale.npy"
DEBUG = "BRAINFM_DEBUG"  # set: a fault shows its traceback


@dataclass(frozen=True)
class AppSettings:
    """How a container answers.

    Attributes:
        device: ``auto``, ``cpu`` or ``cuda``.
        precision, overlap: of ``brainfm predict``.
        whole_mvox: of ``brainfm embed``: million voxels up to which a head passes in one piece.
        parts: of a backbone that are embedded; empty: all there are.
    """

    device: str = "auto"
    precision: str = "auto"
    overlap: float = 0.5
    whole_mvox: float = 20.0
    parts: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> AppSettings:
        """Raises: ConfigError where the file is not as to_json wrote it."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            unknown = set(plain) - {f.name for f in fields(cls)}
            if unknown:
                raise ConfigError(f"{path}: unknown key {min(unknown)!r}")
            return cls(**plain)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: cannot be read as settings of a container ({error})") from None


def main(app: str | os.PathLike[str], arguments: Sequence[str] | None = None) -> int:
    """Answers one case. Returns the exit code: 0, or 2 after one sentence on stderr."""
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", BrainfmWarning)
    warnings.showwarning = _note
    try:
        folder = Path(app)
        task = ChallengeTask.read(folder / TASK)
        given = _parsed(task, sys.argv[1:] if arguments is None else arguments)
        output = Path(given.pop("output"))
        respond(folder, task, {contrast: Path(file) for contrast, file in given.items()}, output)
        return 0
    except BrainfmError as error:
        sentence = str(error)
        if DEBUG in os.environ:
            raise
    except Exception as error:  # the organiser's log shows a sentence and not a stack; nothing is written
        sentence = f"{type(error).__name__}: {error}"
        if DEBUG in os.environ:
            raise
    print(f"predict.py: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def respond(app: Path, task: ChallengeTask, inputs: Mapping[str, Path], output: Path) -> None:
    """Writes the answer for one case.

    Args:
        app: the folder with task, settings and weights.
        inputs: file by contrast.
        output: appears whole or not at all.

    Raises:
        ScanError: an input cannot be used.
        BundleError, ConfigError, WeightsError: the folder cannot be used, or the output not be written.
    """
    settings = AppSettings.read(app / SETTINGS)
    _deterministic()
    if not output.name.endswith(task.ending):
        raise ConfigError(f"--output {output}: expected a file that ends in {task.ending}")
    if task.kind == "embedding":
        _write_embedding(app, settings, next(iter(inputs.values())), output)
        return
    on = next(iter(inputs))
    try:
        _write_answer(app, settings, task, inputs, output, on)
    except ScanError as error:
        seen = {contrast: file for contrast, file in inputs.items() if not is_blank(file)}
        if len(seen) == len(inputs):
            raise
        blank = ", ".join(contrast for contrast in inputs if contrast not in seen)
        print(f"note: nothing is to be seen in {blank}", file=sys.stderr)
        if not seen:
            _write_blank(task, inputs[on], output)
        elif on in seen or task.kind != "segmentation":
            _write_answer(app, settings, task, seen, output, on if on in seen else next(iter(seen)))
        else:
            raise ScanError(f"{error}; the mask is to lie on its grid") from None


def is_blank(path: Path) -> bool:
    """Whether all voxels of a file have one value. Raises: ScanError where it cannot be read."""
    from brainfm.imaging import nifti

    voxels = nifti.read(path, compact=True)[0].voxels
    return bool(voxels.min() == voxels.max())


# ---- answers ---------------------------------------------------------------------------------------------------------


def _write_answer(
    app: Path, settings: AppSettings, task: ChallengeTask, inputs: Mapping[str, Path], output: Path, on: str
) -> None:
    from brainfm.imaging.nifti import write_mask
    from brainfm.inference.predict import predict
    from brainfm.tasks.answers import SessionAnswer

    dense = task.kind == "segmentation"
    found = predict(
        app / BUNDLE, inputs, output if dense else None, on,
        device=settings.device, precision=settings.precision, overlap=settings.overlap,
    )  # fmt: skip
    if isinstance(found, SessionAnswer) == dense:
        raise BundleError(f"{app / BUNDLE} answers otherwise than {task.id} asks, expected a bundle for {task.kind}")
    if isinstance(found, SessionAnswer):
        _write_text(output, in_range(found.to_text(), task))
    elif task.empty == "refused" and not found.any():
        found[tuple(size // 2 for size in found.shape)] = int(task.high)
        write_mask(output, found, inputs[on])


def in_range(text: str, task: ChallengeTask) -> str:
    """The number that ``brainfm predict`` writes, as it is; outside the task's range the nearest end of it.

    Raises: BundleError where it is no finite number, or there are several.
    """
    try:
        value = float(text)
    except ValueError:
        raise BundleError(f"the bundle answers {text.split()}, expected one number for {task.id}") from None
    if not math.isfinite(value):
        raise BundleError(f"the bundle answers {text.strip()}, expected a finite number for {task.id}")
    return text if task.low <= value <= task.high else f"{min(max(value, task.low), task.high)}\n"


def _write_blank(task: ChallengeTask, like: Path, output: Path) -> None:
    """What is answered where nothing is to be seen: all background, or the value that the challenge's YAML names."""
    if task.kind != "segmentation":
        _write_text(output, f"{task.blank}\n")
        return
    from brainfm.imaging import nifti

    mask = np.zeros(nifti.read_header(like).grid.shape_vox, np.uint8)
    if task.empty == "refused":
        mask[tuple(size // 2 for size in mask.shape)] = int(task.high)
    nifti.write_mask(output, mask, like)


def _write_embedding(app: Path, settings: AppSettings, file: Path, output: Path) -> None:
    try:
        scale = np.load(app / SCALE, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{app / SCALE}: cannot be read ({error})") from None
    try:
        raw = embedding(app / BACKBONE, settings, file)
    except ScanError:
        if not is_blank(file):
            raise
        print("note: nothing is to be seen in the scan", file=sys.stderr)
        raw = scale[0]  # the middle of all heads
    if scale.ndim != 2 or scale.shape != (2, len(raw)):
        raise ConfigError(f"{app / SCALE} has the shape {scale.shape}, expected (2, {len(raw)}) as the embedding needs")
    buffer = io.BytesIO()
    np.save(buffer, scaled(raw, scale), allow_pickle=False)
    _write_whole(output, buffer.getvalue())


def embedding(backbone: Path, settings: AppSettings, file: Path) -> np.ndarray:
    """[F] float32 of one scan, as ``brainfm embed`` gives it. Raises: WeightsError, ScanError."""
    from brainfm.probing.features import Encoder, Extent, embed

    encoder = Encoder.load(backbone, settings.parts or None)
    return embed(encoder, file, extent=Extent(settings.whole_mvox), device=settings.device).matrix[0]


def scaled(raw: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(raw - scale[0]) * scale[1], float32, cut at +-1e3: one strange scan must not throw a probe off."""
    return np.clip((raw - scale[0]) * scale[1], -1e3, 1e3).astype(np.float32)


# ---- the command line ------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _parsed(task: ChallengeTask, arguments: Sequence[str]) -> dict[str, str]:
    """File by contrast in the order of the task, and ``output``.

    Any input may be missing as long as one is there, and both alternatives may be given: the networks read any set.
    """
    parser = _Parser(prog="predict.py", description=f"{task.id}: {task.title}", allow_abbrev=False)
    for one in task.inputs:
        parser.add_argument(*_flags(one), dest=one.contrast, metavar="FILE", help=f"the {one.contrast} scan")
    parser.add_argument("--output", required=True, metavar="FILE", help=f"what is written, *{task.ending}")
    found = vars(parser.parse_args(list(arguments)))
    given = {name: file for name, file in found.items() if file is not None}
    if len(given) < 2:
        raise ConfigError(f"no scan was given, expected one or more of {', '.join(_flags(i)[0] for i in task.inputs)}")
    return given


def _flags(one: Input) -> list[str]:
    """The organiser's flag first; the name of the fine-tuning data and that of the contrast are understood as well."""
    return [f"--{name}" for name in dict.fromkeys((one.flag, one.file, one.contrast))]


def _note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


def _deterministic() -> None:
    """The same bits twice on one machine, on a GPU as well."""
    import torch

    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _write_text(path: Path, text: str) -> None:
    _write_whole(path, text.encode())


def _write_whole(path: Path, content: bytes) -> None:
    from brainfm.files import write_whole

    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
