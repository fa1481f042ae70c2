"""Prediction in a container, as ``/app/predict.py`` calls it: an organiser's flags in, one file out.

Beside the script lie ``task.json`` (the task's flags and output), ``settings.json``, and ``bundle/``, or for an
embedding ``backbone.safetensors`` and ``scale.npy``. Scans are answered as ``brainfm predict`` and ``embed`` do.
What is added, since a case without a file costs more than a poor answer: a scan without any signal, or given twice,
counts as not given; one that training would refuse for its outliers is clipped; scans that do not fit together are
answered from the first; and where none is left a harmless answer is written. All of that is said on stderr. A file that
cannot be read is refused: one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from brainfm.errors import BrainfmError, BrainfmWarning, BundleError, ConfigError, ScanError
from brainfm.files import npy_bytes, read_array, write_whole
from brainfm.progress import on_one_line
from brainfm.submission.challenge import IMAGES, ChallengeTask, Input, input_of
from brainfm.submission.mend import check_readable, mended

TASK, SETTINGS, BUNDLE, BACKBONE, SCALE = "task.json", "settings.json", "bundle", "backbone.safetensors", "scale.npy"
DEBUG = "BRAINFM_DEBUG"  # set: a fault shows its traceback
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class AppSettings:
    """How a container answers.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, there.
        precision, overlap: of ``brainfm predict``.
        whole_mvox: of ``brainfm embed``: million voxels up to which a head passes in one piece.
        parts: of a backbone that are embedded; empty: all there are.
    """

    device: str = "auto"
    precision: str = "auto"
    overlap: float = 0.5
    whole_mvox: float = 20.0
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _DEVICE.fullmatch(str(self.device)):
            raise ConfigError(f"device={self.device}: expected auto, cpu, cuda or cuda:N")
        if not 0 <= self.overlap < 1 or not 0 < self.whole_mvox < math.inf:
            raise ConfigError(
                f"overlap={self.overlap:g}, whole_mvox={self.whole_mvox:g}: expected 0 <= overlap < 1 and more than 0"
            )

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
    print(f"predict.py: {on_one_line(' '.join(sentence.split()))}", file=sys.stderr)
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
    inputs = _each_once(inputs)
    on = next(iter(inputs))
    try:
        _write_answer(app, settings, task, inputs, output, on)
    except ScanError as error:
        with tempfile.TemporaryDirectory(prefix="brainfm") as folder:
            _write_all_the_same(app, settings, task, inputs, output, Path(folder), error)


def _each_once(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Without a file that is given a second time: it can show but one contrast, and counts as the first."""
    first: dict[Path, str] = {}
    for contrast, file in inputs.items():
        other = first.setdefault(file.resolve(), contrast)
        if other != contrast:
            _say(f"{contrast} is the file of {other} again, and counts as not given")
    return {contrast: inputs[contrast] for contrast in first.values()}


def _write_all_the_same(
    app: Path,
    settings: AppSettings,
    task: ChallengeTask,
    inputs: Mapping[str, Path],
    output: Path,
    folder: Path,
    error: ScanError,
) -> None:
    """An answer to scans that the library refuses: from what is left of them, from the first of these, or a blank one.

    Args:
        folder: for mended copies.
        error: why they were refused.

    Raises: ScanError where a file cannot be read.
    """
    for file in inputs.values():
        check_readable(file)
    seen = _seen(inputs, folder)
    tries = [seen, dict(list(seen.items())[:1])] if seen else []
    if seen == inputs:
        tries = tries[1:]
        _say(str(error))
    for number, chosen in enumerate(tries):
        try:
            if number or chosen != seen:
                _say(f"answered from {', '.join(chosen)} alone")
            _write_answer(app, settings, task, chosen, output, next(iter(chosen)), like=next(iter(inputs.values())))
            return
        except ScanError as again:
            _say(str(again))
    _write_blank(task, next(iter(inputs.values())), output)


def _seen(inputs: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The scans that show anything, mended where they have to be."""
    seen = {}
    for contrast, file in inputs.items():
        copy = folder / f"{contrast}.nii"
        said = mended(file, copy)
        if said:
            _say(f"{file}: {said}")
            seen[contrast] = copy
        elif is_blank(file):
            _say(f"nothing is to be seen in {contrast}")
        else:
            seen[contrast] = file
    return seen


def is_blank(path: Path) -> bool:
    """Whether all voxels of a file have one value, or none is a number. Raises: ScanError where it cannot be read."""
    from brainfm.imaging import nifti
    from brainfm.imaging.formats import open_scan

    voxels = open_scan(path).stored(nifti.read_header(path).grid.shape_vox)
    return bool(voxels.min() == voxels.max()) or not np.isfinite(voxels).any()


def _say(what: str) -> None:
    print(f"note: {what}", file=sys.stderr)


# ---- answers ---------------------------------------------------------------------------------------------------------


def _write_answer(
    app: Path,
    settings: AppSettings,
    task: ChallengeTask,
    inputs: Mapping[str, Path],
    output: Path,
    on: str,
    like: Path | None = None,
) -> None:
    """The library's answer.

    Args:
        on: the contrast on whose grid a mask lies.
        like: of a mask, the file on whose grid it is written where that is another place.
    """
    from brainfm.imaging.nifti import write_mask
    from brainfm.inference.predict import predict
    from brainfm.tasks.answers import SessionAnswer

    dense = task.kind == "segmentation"
    if dense and like is not None and not _same_grid(inputs[on], like):
        from brainfm.tasks.bundle import load_engine
        from brainfm.tasks.registry import kind_of

        engine = load_engine(app / BUNDLE, settings.device, settings.precision, settings.overlap)
        kind = kind_of(engine.task.kind)
        kind.write(output, kind.answer(engine, dict(inputs), on, like=like), like)
        return
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


def _same_grid(one: Path, other: Path) -> bool:
    from brainfm.imaging import nifti

    a, b = (nifti.read_header(path).grid for path in (one, other))
    return a.same_place(b) and a.orientation == b.orientation


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
    scale = read_array(app / SCALE, ConfigError, "the scale of an embedding")
    try:
        raw = embedding(app / BACKBONE, settings, file)
    except ScanError as error:
        check_readable(file)
        with tempfile.TemporaryDirectory(prefix="brainfm") as folder:
            found = _embedding_all_the_same(app, settings, file, Path(folder), error)
        raw = scale[0] if found is None else found  # the middle of all heads
    if scale.ndim != 2 or scale.shape != (2, len(raw)):
        raise ConfigError(f"{app / SCALE} has the shape {scale.shape}, expected (2, {len(raw)}) as the embedding needs")
    _write_whole(output, npy_bytes(scaled(raw, scale)))


def _embedding_all_the_same(
    app: Path, settings: AppSettings, file: Path, folder: Path, error: ScanError
) -> np.ndarray | None:
    """[F] of a scan that the library refuses, mended; None where that does not help."""
    seen = _seen({"the scan": file}, folder)
    if not seen:
        return None
    if file in seen.values():
        _say(str(error))
        return None
    return embedding(app / BACKBONE, settings, next(iter(seen.values())))


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
    parser.add_argument(
        "--session", metavar="FOLDER", help="in place of single scans: they are told apart by what their names say"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help=f"what is written, *{task.ending}")
    found = vars(parser.parse_args(list(arguments)))
    session = found.pop("session")
    if session is not None:
        found |= {name: str(file) for name, file in _of_session(task, Path(session)).items() if not found[name]}
    given = {name: file for name, file in found.items() if file is not None}
    if len(given) < 2:
        raise ConfigError(f"no scan was given, expected one or more of {', '.join(_flags(i)[0] for i in task.inputs)}")
    return given


def _of_session(task: ChallengeTask, folder: Path) -> dict[str, Path]:
    """The task's scans in a folder, at any depth, by contrast; of several that show one contrast the first by name.

    Raises: ConfigError where there is none.
    """
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.name.endswith(IMAGES)):
        one = task.inputs[0] if task.kind == "embedding" else input_of(task, path.name)
        if one is not None:
            found.setdefault(one.contrast, path)
    if not found:
        expected = ", ".join(one.contrast for one in task.inputs)
        raise ConfigError(f"--session {folder}: no scan whose name says {expected}")
    return found


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
    try:
        write_whole(path, content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
