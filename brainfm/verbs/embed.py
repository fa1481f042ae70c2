"""Frozen features of whole heads, a row a scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from brainfm.errors import ConfigError
from brainfm.verbs.running import bar

PLACE = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Frozen features of whole heads, float32, one row a scan: mean and standard deviation of each channel over the
    head.

      brainfm embed backbone=runs/a/backbone.safetensors store=store out=features.parquet
      brainfm embed backbone=runs/a/backbone.safetensors input.t1=t1.nii.gz out=features.csv
    """

    backbone: Annotated[Path, "a backbone file"]
    store: Annotated[Path | None, "every scan of a prepared store"] = None
    input: Annotated[
        Mapping[str, Path], "or input.CONTRAST=FILE of one visit, prepared here as the backbone's scans were"
    ] = field(default_factory=dict)
    out: Annotated[Path, ".parquet | .npy (and ids in .ids.csv) | .npz | .csv"]
    contrasts: Annotated[tuple[str, ...] | None, "e.g. [t1,flair]; null: every scan"] = None
    parts: Annotated[
        tuple[str, ...] | None,
        "of backbone, token (a transformer's class token) and the latent's named parts, e.g. [backbone,anatomy]; "
        "null: all there are",
    ] = None
    whole_mvox: Annotated[
        float, "million voxels up to which the whole head passes the network at once; else windows"
    ] = 12
    window_vox: Annotated[tuple[int, int, int], "of larger heads; their cells are pooled together"] = (160, 160, 160)
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if bool(self.input) == bool(self.store):
            raise ConfigError("brainfm embed: expected either store=DIR or input.CONTRAST=FILE")


def run(settings: Settings) -> int:
    from brainfm.probing.features import Extent, check_format, embed, write

    out = check_format(settings.out)
    with bar("embed") as move:
        found = embed(
            settings.backbone, settings.store or settings.input, contrasts=settings.contrasts, parts=settings.parts,
            extent=Extent(settings.whole_mvox, settings.window_vox), device=settings.device, progress=move,
        )  # fmt: skip
    if "note" in found.about:
        print(f"note: {found.about['note']}")
    files = write(found, out)
    parts = ", ".join(f"{part} {values.shape[1]}" for part, values in found.parts.items())
    print(f"{', '.join(map(str, files))}: {len(found.rows)} scans; features: {parts}")
    return 0
