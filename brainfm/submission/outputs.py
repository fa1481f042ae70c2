"""One output file looked at as the organisers look at it, and a little closer: checks with a sentence each.

Besides imaging's readers the only file that opens images through nibabel: it must see what the organisers' one sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm.errors import ConfigError
from brainfm.files import read_array
from brainfm.submission.challenge import ChallengeTask

ORGANISERS, STRICTER = "organisers", "stricter"
_SAME_MM = 1e-2  # the corners of a mask and of its scan


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the check.
        case: on which it was made; empty for the submission as a whole.
        passed: whether it holds.
        sentence: what was found and expected; empty where the check holds.
        whose: ``organisers`` would refuse the submission or count the case as missing; ``stricter`` is our addition.
    """

    name: str
    case: str
    passed: bool
    sentence: str
    whose: str = ORGANISERS

    @classmethod
    def of(cls, name: str, case: str, passed: Any, sentence: str, whose: str = ORGANISERS) -> Check:
        """With the sentence only where it is true."""
        return cls(name, case, bool(passed), "" if passed else sentence, whose)


def check_output(task: ChallengeTask, case: str, output: Path, inputs: Sequence[Path]) -> list[Check]:
    """Everything about one output file, in the organisers' order; what follows a failure that forbids it is left out.

    Args:
        output: where the file was asked for.
        inputs: that were passed, the first one first.

    Source: fomo25/container-validator and fomo26/container_templates (see challenges/*/challenge.yaml).
    """
    if not output.is_file():
        beside = sorted(p.name for p in output.parent.iterdir())
        found = f"only {', '.join(beside)}" if beside else "nothing"
        return [Check.of("file", case, False, f"{found} was written, expected {output.name}")]
    if not output.stat().st_size:
        return [Check.of("file", case, False, f"{output.name} is empty")]
    found_checks = {".txt": _text, ".nii.gz": _image, ".npy": _array}[task.ending](task, case, output, inputs)
    return [Check.of("file", case, True, f"{output.name} is there"), *found_checks]


def value_of(task: ChallengeTask, output: Path) -> Any:
    """The number, the label values or the embedding of a file that passed `check_output`."""
    if task.ending == ".txt":
        return float(output.read_text())
    if task.ending == ".npy":
        return read_array(output, ConfigError, "one array without pickle")
    return np.asarray(_loaded(output).dataobj)


def labels_of(path: Path) -> tuple[np.ndarray, list[float]]:
    """Whole label values [X, Y, Z] in the file's own axes, and the edges of a voxel in mm.

    Raises: ConfigError where the file cannot be read.
    """
    try:
        image = _loaded(path)
        return np.asarray(image.dataobj).round().astype(np.int32), [float(e) for e in image.header.get_zooms()[:3]]
    except Exception as error:  # nibabel raises whatever its formats raise
        raise ConfigError(f"{path}: cannot be read ({error}), expected a label volume") from None


def in_ras(output: Path) -> np.ndarray:
    """Label values [X, Y, Z] of a mask, its axes turned towards right, anterior, superior."""
    return np.asarray(nib.as_closest_canonical(_loaded(output)).dataobj)


def _loaded(path: Path) -> Any:
    return nib.load(path)


# ---- text ------------------------------------------------------------------------------------------------------------


def _text(task: ChallengeTask, case: str, output: Path, inputs: Sequence[Path]) -> list[Check]:
    try:
        tokens = output.read_bytes().decode("utf-8").split()
    except UnicodeDecodeError as error:
        return [Check.of("text", case, False, f"{output.name} is not UTF-8 (byte {error.start})")]
    if len(tokens) != 1:
        return [Check.of("text", case, False, f"{len(tokens)} words ({' '.join(tokens)[:40]}), expected one number")]
    try:
        value = float(tokens[0])
    except ValueError:
        return [Check.of("text", case, False, f"{tokens[0][:40]!r} is no number")]
    checks = [
        Check.of("text", case, True, "one number"),
        Check.of("finite", case, bool(np.isfinite(value)), f"{tokens[0]}, expected a finite number"),
    ]
    if np.isfinite(value):
        whose = ORGANISERS if task.kind == "classification" else STRICTER
        what = "a probability" if task.kind == "classification" else "a value"
        expected = f"{tokens[0]}, expected {what} from {task.low:g} to {task.high:g}"
        checks.append(Check.of("range", case, task.low <= value <= task.high, expected, whose))
    return checks


# ---- images ----------------------------------------------------------------------------------------------------------


def _image(task: ChallengeTask, case: str, output: Path, inputs: Sequence[Path]) -> list[Check]:
    try:
        image = _loaded(output)
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel raises whatever its formats raise
        return [Check.of("image", case, False, f"{output.name} cannot be read ({type(error).__name__}: {error})")]
    kinds = isinstance(image, (nib.Nifti1Image, nib.Nifti2Image))
    checks = [Check.of("image", case, kinds, f"{type(image).__name__}, expected a NIfTI image")]
    legal = np.isfinite(image.affine).all() and image.affine[:3].any()
    checks.append(Check.of("affine", case, legal, "the affine has NaN or is zero, expected a finite one"))
    flat = values.ndim == 3
    checks.append(Check.of("three axes", case, flat, f"the shape {values.shape}, expected three axes"))
    shapes = {path.name: tuple(_loaded(path).shape[:3]) for path in inputs}
    first = next(iter(shapes))
    legal_shapes = list(shapes.values())[: 1 if task.challenge == "fomo25" else None]
    said = f"the shape {values.shape[:3]}, expected {shapes[first]} as {first} has"
    checks.append(Check.of("shape", case, tuple(values.shape[:3]) in legal_shapes, said))
    checks += _labels(task, case, values)
    if all(check.passed for check in checks):
        checks += _placed(task, case, image, values, {p.name: p for p in inputs})
    return checks


def _labels(task: ChallengeTask, case: str, values: np.ndarray) -> list[Check]:
    floating = np.issubdtype(values.dtype, np.floating)
    finite = not floating or bool(np.isfinite(values).all())
    whole = np.issubdtype(values.dtype, np.integer) or (floating and finite and (values == np.round(values)).all())
    checks = [
        Check.of("finite", case, finite, "the mask holds NaN or infinite values"),
        Check.of("whole numbers", case, whole, f"{values.dtype} with values between whole numbers, expected labels"),
    ]
    if not finite or not values.size:
        return checks
    low, high = float(values.min()), float(values.max())
    said = f"values from {low:g} to {high:g}, expected {task.low:g} to {task.high:g}"
    checks.append(Check.of("labels", case, task.low <= low and high <= task.high, said))
    if task.empty == "refused":
        there = sorted(np.unique(values).tolist())
        said = f"the values {', '.join(f'{v:g}' for v in there[:5])}, expected both 0 and 1: an empty mask is refused"
        checks.append(Check.of("both values", case, there == [0, 1], said))
    return checks


def _placed(task: ChallengeTask, case: str, image: Any, values: np.ndarray, inputs: Mapping[str, Path]) -> list[Check]:
    """Whether the mask lies where its scan does: the organisers compare voxels and not millimetres."""
    corners = np.array([[0, 0, 0, 1], [*(n - 1 for n in values.shape), 1]]).T
    apart = {}
    for name, path in inputs.items():
        scan = _loaded(path)
        if tuple(scan.shape[:3]) == values.shape:
            apart[name] = float(np.abs((scan.affine - image.affine) @ corners).max())
    nearest = min(apart, key=lambda name: apart[name])
    said = f"{apart[nearest]:.2f} mm off {nearest}, expected its affine"
    return [
        Check.of("place", case, apart[nearest] <= _SAME_MM, said, STRICTER),
        Check.of(
            "integer type", case, np.issubdtype(image.get_data_dtype(), np.integer),
            f"stored as {image.get_data_dtype()}, expected an integer type", STRICTER,
        ),
    ]  # fmt: skip


# ---- arrays ----------------------------------------------------------------------------------------------------------


def _array(task: ChallengeTask, case: str, output: Path, inputs: Sequence[Path]) -> list[Check]:
    try:
        values = read_array(output, ConfigError, "one array without pickle")
    except ConfigError as error:
        return [Check.of("array", case, False, str(error))]
    checks = [
        Check.of("array", case, True, "an array without pickle"),
        Check.of("floats", case, np.issubdtype(values.dtype, np.floating), f"{values.dtype}, expected a floating type"),
        Check.of("one axis", case, values.squeeze().ndim == 1, f"the shape {values.shape}, expected one axis"),
    ]
    if checks[1].passed:
        finite = bool(np.isfinite(values).all())
        checks.append(Check.of("finite", case, finite, "the embedding holds NaN or infinite values"))
        plain = values.ndim == 1 and values.dtype == np.float32
        said = f"{values.dtype} of shape {values.shape}, expected float32 with one axis as the probe reads it"
        checks.append(Check.of("float32", case, plain, said, STRICTER))
    return checks
