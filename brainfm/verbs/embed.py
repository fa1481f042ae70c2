"""Frozen features of whole heads, a row a scan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM
from brainfm.verbs.running import bar

if TYPE_CHECKING:
    from brainfm.probing.features import Embedding

PLACE = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Frozen features of whole heads, float32, one row a scan: mean and standard deviation of each channel over the
    head.

      brainfm embed backbone=runs/a/backbone.safetensors store=store out=features.parquet
      brainfm embed backbone=runs/a/backbone.safetensors input.t1=t1.nii.gz out=features.csv
      brainfm embed baseline=slices weights=resnet50.pth network=resnet50 store=store out=slices.npz
    """

    backbone: Annotated[Path | None, "a backbone file, or the name of weights that ship (`brainfm weights`)"] = None
    baseline: Annotated[
        Literal["slices", "covariance"] | None,
        "or, of a store: a frozen 2D network on slices along three axes; an untrained 3D network, its covariance",
    ] = None
    weights: Annotated[
        str, "of baseline=slices: random | a file with torchvision's names | timm:NAME, which timm fetches", VERBATIM
    ] = "random"
    network: Annotated[Literal["resnet18", "resnet50"], "of baseline=slices"] = "resnet18"
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
        if (self.backbone is None) == (self.baseline is None):
            raise ConfigError("brainfm embed: expected either backbone=FILE or baseline=slices|covariance")
        if self.baseline is not None and not self.store:
            raise ConfigError(
                f"baseline={self.baseline}: expected store=DIR, for no backbone says how files are prepared"
            )
        if bool(self.input) == bool(self.store):
            raise ConfigError("brainfm embed: expected either store=DIR or input.CONTRAST=FILE")


def run(settings: Settings) -> int:
    from brainfm.probing.features import Extent, check_format, embed, write

    out = check_format(settings.out)
    with bar("embed") as move:
        found = _of_baseline(settings, move) if settings.backbone is None else embed(
            settings.backbone, settings.store or settings.input, contrasts=settings.contrasts, parts=settings.parts,
            extent=Extent(settings.whole_mvox, settings.window_vox), device=settings.device, progress=move,
        )  # fmt: skip
    if "note" in found.about:
        print(f"note: {found.about['note']}")
    files = write(found, out)
    parts = ", ".join(f"{part} {values.shape[1]}" for part, values in found.parts.items())
    print(f"{', '.join(map(str, files))}: {len(found.rows)} scans; features: {parts}")
    return 0


def _of_baseline(settings: Settings, move: Callable[[int, int], None]) -> Embedding:
    from brainfm.data.store import Store
    from brainfm.probing.frozen import CovarianceDescriber, Describer, SliceDescriber, described

    assert settings.store is not None
    describer: Describer
    if settings.baseline == "slices":
        describer = SliceDescriber(settings.weights, settings.network, device=settings.device)
    else:
        describer = CovarianceDescriber(device=settings.device)
    return described(describer, Store.open(settings.store), move)
