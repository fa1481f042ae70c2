"""Prediction on DICOM series: converted on the way in, and a DICOM SEG object on the way out."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brainfm.errors import ConfigError
from brainfm.imaging import dicom, nifti
from brainfm.inference.predict import predict
from brainfm.tasks.bundle import read_bundle

ENDING = ".dcm"


def is_asked(inputs: Mapping[str, Path], out: Path) -> bool:
    """Whether any input is a series, or the output shall be a DICOM object."""
    return out.suffix == ENDING or any(path.is_dir() for path in inputs.values())


def predict_series(bundle: Path, inputs: Mapping[str, Path], out: Path, on: str | None = None, **named: Any) -> None:
    """As `predict`, where an input may be the folder of a series.

    Args:
        out: ``.dcm``: a DICOM SEG object on the slices of the series that is answered on; else as in `predict`.
        on: the contrast that is answered on; by default the first input.
        named: as in `predict`.

    Raises:
        ConfigError: ``.dcm`` for an answer that is no label map, or on an input that is no series; no package for it.
        ScanError: a folder holds no usable series.
    """
    read = read_bundle(bundle)
    on = next(iter(inputs)) if on is None else on
    if out.suffix == ENDING and read.task.kind != "segmentation":
        raise ConfigError(f"out={out}: a DICOM SEG object holds label maps, and this bundle answers for a whole head")
    if out.suffix == ENDING and on in inputs and not inputs[on].is_dir():
        raise ConfigError(f"out={out}: input.{on}={inputs[on]} is a file, expected the folder of its DICOM series")
    with tempfile.TemporaryDirectory() as folder:
        files = {
            contrast: dicom.converted(path, Path(folder) / f"{contrast}.nii.gz") if path.is_dir() else path
            for contrast, path in inputs.items()
        }
        if out.suffix != ENDING:
            predict(read, files, out, on, **named)
            return
        labels = predict(read, files, None, on, **named)
        values = [value for value in read.task.values if value != 0]
        target = read.task.target
        names = {int(v): target if len(values) == 1 else f"{target} {v}" for v in values}
        grid = nifti.read_header(files[on]).grid
        dicom.write_segmentation(out, labels, grid, inputs[on], names, read.fingerprint)  # type: ignore[arg-type]
