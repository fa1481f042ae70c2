"""Pre-train a backbone without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from brainfm.settings import FREE, Group, narrowed
from brainfm.training.settings import PretrainSettings
from brainfm.verbs.launch import LaunchSettings, submit

PLACE = 5


@dataclass(frozen=True, kw_only=True)
class Settings(PretrainSettings):
    """Pre-train a backbone on a store without labels. Interrupted, the same command goes on.

    brainfm pretrain store=store run=runs/a backbone=unet_b objective=cross_contrast trainer.max_steps=5000
    """

    RECIPES: ClassVar[str] = "all of this as an experiment of configs/experiment/ has it"

    launch: Annotated[LaunchSettings, "where it runs", Group("local"), FREE] = field(default_factory=LaunchSettings)


def run(settings: Settings) -> int:
    asked = narrowed(PretrainSettings, settings)
    if settings.launch.cluster is None:
        train(asked)
    else:
        job = submit("pretrain", train, asked, settings.launch)
        print(f"{settings.run}: submitted as job {job.job_id}, logs in {job.paths.folder}")
    return 0


def train(settings: PretrainSettings) -> None:
    from brainfm.training.pretrain import pretrain
    from brainfm.training.processes import fellows

    with fellows(settings.run):
        pretrain(settings)
