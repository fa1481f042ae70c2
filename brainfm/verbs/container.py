"""Wrap a bundle or a backbone as a challenge submission."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from brainfm.errors import ConfigError

PLACE = 21


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Wrap a bundle, or for an embedding a backbone, as a submission: OUT/app with predict.py and what it needs,
    Apptainer.def, Dockerfile, and the image where an engine is there. OUT/app/predict.py runs without any.

      brainfm container challenge=fomo26 task=task2 bundle=runs/fomo26_task2/bundle out=submission/task2 torch=cu126
      brainfm container challenge=fomo26 task=task6 backbone=backbone.safetensors scale=heads.npz out=submission/task6
    """

    challenge: Annotated[str, "fomo25 | fomo26"]
    task: Annotated[str, "task1, task2, ..."]
    bundle: Annotated[Path | None, "a finished model, as `finetune` leaves it"] = None
    backbone: Annotated[Path | None, "of an embedding, in place of bundle: a backbone file or name"] = None
    out: Annotated[Path, "a folder of its own; what was staged there before is replaced"]
    torch: Annotated[Literal["cpu", "cu126", "cu128", "cu130"], "wheels of the image"] = "cpu"
    build: Annotated[
        Literal["auto", "apptainer", "docker", "none"], "auto: with what is installed; none: the recipes alone"
    ] = "auto"
    scale: Annotated[
        Path | None,
        "of an embedding: features of any unlabelled heads, as `embed` leaves them, that say how each is scaled for "
        "the organisers' probe; null: as it is, which trains poorly",
    ] = None
    spread: Annotated[float, "standard deviation of each scaled feature"] = 3.0
    parts: Annotated[tuple[str, ...] | None, "of the backbone that are embedded; null: all there are"] = None
    device: Annotated[str, "auto | cpu | cuda, in the container"] = "auto"
    precision: Annotated[Literal["auto", "32-true", "bf16-mixed", "16-mixed"], "of a bundle's network"] = "auto"
    overlap: Annotated[float, "share of a window that its neighbour repeats; 0.25 takes half the time or less"] = 0.5
    whole_mvox: Annotated[float, "of an embedding: million voxels up to which a head passes in one piece"] = 20.0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if not 0 < self.spread < math.inf:
            raise ConfigError(f"spread={self.spread:g}: expected a standard deviation above 0")
        if self.parts == ():
            raise ConfigError("parts=[]: expected one or more parts of the backbone, or null for all there are")


def run(settings: Settings) -> int:
    from brainfm.submission.challenge import read_challenge, with_article
    from brainfm.submission.container import container, describe
    from brainfm.submission.predict import AppSettings

    task = read_challenge(settings.challenge).task(settings.task)
    wanted, other = ("backbone", "bundle") if task.kind == "embedding" else ("bundle", "backbone")
    weights = getattr(settings, wanted)
    if weights is None or getattr(settings, other) is not None:
        raise ConfigError(f"{task.id} is {with_article(task.kind)}: expected {wanted}= and no {other}=")
    if settings.scale is not None and task.kind != "embedding":
        raise ConfigError(f"scale={settings.scale}: {task.id} is no embedding, expected no scale")
    app = AppSettings(
        settings.device, settings.precision, settings.overlap, settings.whole_mvox, settings.parts or ()
    )  # fmt: skip
    scale = None
    if settings.scale is not None:
        from brainfm.probing.features import read
        from brainfm.submission.linear_probe import scale_of

        try:
            scale = scale_of(read(settings.scale).matrix, settings.spread)
        except ValueError as error:
            raise ConfigError(f"scale={settings.scale}: {error}") from None
    elif task.kind == "embedding":
        print("note: without scale= the embedding stays as it is, and the organisers' probe reads it raw")
    made = container(task, weights, settings.out, settings=app, scale=scale, torch=settings.torch, build=settings.build)
    print("\n".join(describe(made)))
    return 0
