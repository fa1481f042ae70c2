"""What frozen features know of a column: kNN, logistic and ridge regression."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.settings import VERBATIM
from brainfm.verbs.running import bar

PLACE = 9


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What frozen features know of a column: kNN and a linear model, tuned and tested by subject, against a random
    network.

      brainfm probe backbone=runs/a/backbone.safetensors store=store target=age out=probe_age
      brainfm probe features=features.parquet store=store target=sex out=probe_sex protocol=brainmarks
    """

    backbone: Annotated[Path | None, "a backbone file, or the name of weights that ship"] = None
    features: Annotated[Path | None, "or what `brainfm embed` left"] = None
    store: Annotated[Path, "whose sessions have the column; with backbone= also the scans"]
    target: Annotated[str, "a column of the manifest", VERBATIM]
    out: Annotated[Path, "folder for table.csv and scores.json; the features of backbone= are kept there too"]
    kind: Annotated[
        Literal["auto", "classification", "regression"], "auto: numbers of more than ten values are regression"
    ] = "auto"
    protocol: Annotated[
        Literal["nested", "brainmarks"],
        "nested: kNN and a linear model in every fold; brainmarks: that benchmark's one split and grids",
    ] = "nested"
    folds: Annotated[int, "by subject"] = 5
    repeats: Annotated[int, "of the cross-validation, each with other folds"] = 3
    contrasts: Annotated[tuple[str, ...] | None, "e.g. [t1]; null: every scan; a session's scans are averaged"] = None
    parts: Annotated[tuple[str, ...] | None, "see embed"] = None
    random: Annotated[bool, "whether a random frozen network of the same kind is the row to beat"] = True
    whole_mvox: Annotated[float, "see embed"] = 12
    window_vox: Annotated[tuple[int, int, int], "see embed"] = (160, 160, 160)
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    seed: Annotated[int, "of the folds, the bootstrap and the random network"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.probing.features import Extent
    from brainfm.probing.table import ProbeTableSpec, describe, probe

    spec = ProbeTableSpec(
        target=settings.target, kind=settings.kind, folds=settings.folds, repeats=settings.repeats,
        seed=settings.seed, random=settings.random, protocol=settings.protocol,
    )  # fmt: skip
    with bar("probe") as move:
        found = probe(
            settings.store, settings.out, spec, backbone=settings.backbone, features=settings.features,
            contrasts=settings.contrasts, parts=settings.parts,
            extent=Extent(settings.whole_mvox, settings.window_vox), device=settings.device, progress=move,
        )  # fmt: skip
    print("\n".join(describe(found)))
    return 0
