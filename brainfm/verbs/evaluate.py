"""Compare masks with labels: Dice, surface Dice, volumes, intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.verbs.running import Overlapping, bar

PLACE = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare masks with the labels of a manifest: Dice, surface Dice at 1 mm, volumes, 95 % bootstrap intervals.

    brainfm evaluate bundle=runs/b/bundle manifest=test.csv out=scores
    brainfm evaluate predictions=predictions manifest=test.csv out=scores
    """

    bundle: Annotated[Path | None, "predict first, then compare"] = None
    predictions: Annotated[Path | None, "or compare a folder that `brainfm predict manifest=` left"] = None
    manifest: Annotated[Path, "with the labels"]
    out: Annotated[Path, "folder for cases.csv and summary.json"]
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed", "16-mixed"], "of the network"] = "auto"
    overlap: Overlapping = 0.5
    empty: Annotated[
        Literal["one", "fomo", "skip"],
        "a class that neither mask nor label has in a case: one (Dice and surface Dice 1) | fomo (surface Dice 0, as "
        "FOMO26 counts) | skip",
    ] = "one"
    seed: Annotated[int, "of the bootstrap"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.inference.evaluate import describe, evaluate

    with bar("evaluate") as move:
        found = evaluate(
            settings.manifest, settings.out, bundle=settings.bundle, predictions=settings.predictions,
            seed=settings.seed, device=settings.device, precision=settings.precision, overlap=settings.overlap,
            empty=settings.empty, progress=move,
        )  # fmt: skip
    print("\n".join(describe(found.summary)))
    return 0
