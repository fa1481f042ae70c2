"""Where in the head a bundle's answer comes from: a map on the scan, and a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from brainfm.settings import VERBATIM
from brainfm.verbs.running import bar

PLACE = 11


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where in the head an answer comes from: a map on the grid of the first input, and a picture of it (.png) beside.

    brainfm explain bundle=runs/b/bundle input.flair=flair.nii.gz input.t1=t1.nii.gz out=why.nii.gz
    """

    bundle: Annotated[Path, "a finished model, as `finetune` leaves it"]
    input: Annotated[Mapping[str, Path], "input.CONTRAST=FILE; any of the bundle's contrasts may be missing"] = field(
        default_factory=dict
    )
    labels: Annotated[
        Mapping[str, Path], "labels.NAME=FILE: the label map that a bundle answers from, where its card names one"
    ] = field(default_factory=dict)
    out: Annotated[Path, ".nii.gz: 0 to 1, or for a regression -1 (lowers the value) to 1 (raises it)"]
    class_: Annotated[
        str | None, "the class or label asked about; null: the one answered, of a segmentation the largest", VERBATIM
    ] = None
    method: Annotated[
        Literal["hirescam", "gradcam", "occlusion"],
        "hirescam: maps x gradients, voxel by voxel; gradcam: mean gradients",
    ] = "hirescam"
    layer: Annotated[
        str | None,
        "encoder (all maps that reach the head) | encoder.N | of a segmentation decoder.N; null: encoder, of a "
        "segmentation its deepest",
    ] = None
    grid: Annotated[str | None, "the contrast on whose grid the map shall lie; null: the first given"] = None
    cube_mm: Annotated[float, "occlusion: edge of the cube of background that is moved over the head"] = 30
    step_mm: Annotated[float | None, "occlusion: by which it moves; null: half its edge"] = None
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    overlap: Annotated[float, "of a segmentation: share of a window that its neighbour repeats"] = 0.5
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.extras import demand
    from brainfm.inference.explain import describe, explain
    from brainfm.reports.explanation import write_picture
    from brainfm.tasks.bundle import read_bundle

    demand("matplotlib", "brainfm explain")  # it draws a picture at the end
    bundle = read_bundle(settings.bundle)
    with bar("explain") as move:
        found = explain(
            bundle, settings.input, settings.out, settings.class_,
            on=settings.grid, labels=settings.labels, method=settings.method, layer=settings.layer,
            device=settings.device, overlap=settings.overlap, cube_mm=settings.cube_mm, step_mm=settings.step_mm,
            progress=move,
        )  # fmt: skip
    write_picture(settings.out, found, bundle.task, bundle.preprocess.spacing_mm)
    print(f"{settings.out}: {describe(found, bundle.task)}")
    if not found.heat.any():
        print("the map is empty: nothing in these scans speaks for it")
    return 0
