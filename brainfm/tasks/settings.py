"""Settings of any supervised task; those of a kind lie in its room (tasks/registry.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from brainfm.data.settings import Augment
from brainfm.errors import ConfigError
from brainfm.settings import FREE, VERBATIM


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Of any task."""

    kind: Annotated[str, "segmentation | classification | regression"]
    target: Annotated[str, "what is asked for", VERBATIM]
    contrasts: Annotated[
        tuple[str, ...] | None, "those the network may see; null: all that sessions with an answer have"
    ] = None
    fusion: Annotated[Literal["attention", "mean"], "how contrasts meet"] = "attention"
    shots: Annotated[tuple[int | Literal["all"], ...], "training subjects of each point of protocol=fewshot", FREE] = (
        1,
        5,
        10,
        20,
        "all",
    )
    augment_scale: Annotated[float, "share by which heads are scaled in training"] = 0.0

    def __post_init__(self) -> None:
        if not self.shots or any(value != "all" and value < 1 for value in self.shots):
            raise ConfigError(f"task.shots={list(self.shots)}: expected whole numbers from 1 on, or all")


@dataclass(frozen=True)
class FinetuneData:
    """What is read of the cases, and how it is varied."""

    foreground_share: Annotated[float, "of the patches have a labelled voxel in their middle"] = 0.5
    contrast_dropout: Annotated[float, "probability with which each present contrast is hidden in training"] = 0.2
    augment: Annotated[
        Augment,
        "null: none; light; full; or a mapping of AugmentSpec's keys, e.g. data.augment.ghost=0.1; "
        "torchio: transforms by name, e.g. data.augment.torchio={RandomMotion: {p: 0.1}}; "
        "scale is task.augment_scale where it is not given",
    ] = field(default_factory=lambda: {"flip": 0.5, "affine": 0.3, "rotate_deg": 15, "intensity": 0.3})
