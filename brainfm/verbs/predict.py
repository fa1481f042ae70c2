"""Apply a bundle; masks lie on the scans that came in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError
from brainfm.verbs.running import Overlapping, bar

PLACE = 7


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Apply a bundle. The mask lies on the grid of the first input.

    brainfm predict bundle=runs/b/bundle input.flair=flair.nii.gz input.t1=t1.nii.gz out=mask.nii.gz
    brainfm predict bundle=runs/b/bundle input.flair=DICOM_FOLDER out=seg.dcm
    brainfm predict bundle=runs/b/bundle manifest=manifest.csv out=predictions
    """

    bundle: Annotated[Path, "a finished model, as `finetune` leaves it"]
    input: Annotated[Mapping[str, Path], "input.CONTRAST=FILE, or the folder of a DICOM series; any may be missing"] = (
        field(default_factory=dict)
    )
    labels: Annotated[
        Mapping[str, Path], "labels.NAME=FILE: the label map that a bundle answers from, where its card names one"
    ] = field(default_factory=dict)
    manifest: Annotated[Path | None, "in place of input: every session of a manifest"] = None
    out: Annotated[Path, ".nii.gz, .dcm (DICOM SEG on a series), or a folder with manifest="]
    grid: Annotated[str | None, "the contrast on whose grid the mask shall lie; null: the first given"] = None
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed", "16-mixed"], "of the network"] = "auto"
    overlap: Overlapping = 0.5
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.manifest):
            raise ConfigError("brainfm predict: expected either input.CONTRAST=FILE or manifest=FILE")


def run(settings: Settings) -> int:
    from brainfm.inference.predict import predict, predict_manifest
    from brainfm.submission.series import is_asked, predict_series

    bundle, out, device, precision = settings.bundle, settings.out, settings.device, settings.precision
    overlap = settings.overlap
    if settings.manifest is None and is_asked(settings.input, out):
        predict_series(
            bundle, settings.input, out, settings.grid, labels=settings.labels,
            device=device, precision=precision, overlap=overlap,
        )  # fmt: skip
        print(out)
        return 0
    if settings.manifest is None:
        predict(
            bundle, settings.input, out, settings.grid, labels=settings.labels,
            device=device, precision=precision, overlap=overlap,
        )  # fmt: skip
        print(out)
        return 0
    with bar("predict") as move:
        report = predict_manifest(
            bundle, settings.manifest, out, device=device, precision=precision, overlap=overlap, progress=move
        )
    if report.again:
        print(f"made again, for their files have changed: {len(report.again)} of those that were there")
    for key, reason in report.strange.items():
        print(f"out of scope: {'/'.join(key)}: {reason}")
    for key, reason in report.failures.items():
        print(f"left out: {'/'.join(key)}: {reason}")
    print(f"{out}: {report.done} masks made, {report.kept} were there, {len(report.failures)} failed")
    return 0
