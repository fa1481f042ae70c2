"""Compare masks with labels: Dice, surface Dice, volumes, intervals."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM
from brainfm.verbs.running import Overlapping, bar

PLACE = 10


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare masks with the labels of a manifest: Dice, surface Dice at 1 mm, volumes, 95 % bootstrap intervals.

    brainfm evaluate bundle=runs/b/bundle manifest=test.csv out=scores
    brainfm evaluate predictions=predictions manifest=test.csv out=scores
    brainfm evaluate challenge=fomo26 task=task2 bundle=runs/fomo26_task2/bundle manifest=task2.csv out=scores
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
    challenge: Annotated[
        str | None,
        "fomo25 | fomo26: as its organisers score, missing answers included; manifest as `convert` leaves it",
    ] = None
    task: Annotated[str | None, "of challenge=: task1, task2, ..."] = None
    target: Annotated[
        str | None, "of challenge= and embeddings: the column of classes for the linear probe", VERBATIM
    ] = None
    groups: Annotated[tuple[str, ...], "of challenge= and embeddings: columns for fairness, e.g. [sex, age]"] = ()
    seed: Annotated[int, "of the bootstrap"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if (self.challenge is None) != (self.task is None):
            raise ConfigError("brainfm evaluate: expected challenge= and task= together")


def run(settings: Settings) -> int:
    if settings.challenge is not None:
        return _as_organisers(settings)
    from brainfm.inference.evaluate import describe, evaluate

    with bar("evaluate") as move:
        found = evaluate(
            settings.manifest, settings.out, bundle=settings.bundle, predictions=settings.predictions,
            seed=settings.seed, device=settings.device, precision=settings.precision, overlap=settings.overlap,
            empty=settings.empty, progress=move,
        )  # fmt: skip
    print("\n".join(describe(found.summary)))
    return 0


def _as_organisers(settings: Settings) -> int:
    from brainfm.submission import scores
    from brainfm.submission.challenge import read_challenge

    task = read_challenge(str(settings.challenge)).task(str(settings.task))
    how = {"device": settings.device, "precision": settings.precision, "overlap": settings.overlap}
    with bar("evaluate") as move:
        found = scores.evaluate(
            task, settings.manifest, settings.out, bundle=settings.bundle, predictions=settings.predictions,
            target=settings.target or "", groups=settings.groups, seed=settings.seed, how=how, progress=move,
        )  # fmt: skip
    print("\n".join(scores.describe(task, found)))
    return 0
