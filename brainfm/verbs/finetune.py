"""Fine-tune a backbone on labelled cases; leaves a bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from brainfm.settings import FREE, Group, narrowed
from brainfm.training.settings import FinetuneSettings
from brainfm.verbs.launch import LaunchSettings, submit

PLACE = 6


@dataclass(frozen=True, kw_only=True)
class Settings(FinetuneSettings):
    """Fine-tune a backbone on labelled cases, cross-validated by subject, against baselines; leaves a bundle and a
    report. Interrupted, the same command goes on.

      brainfm finetune task=segmentation task.target=lesion store=store run=runs/b \\
        backbone_from=runs/a/backbone.safetensors
      brainfm finetune task=classification task.target=sex store=store run=runs/c \\
        backbone_from=runs/a/backbone.safetensors
      brainfm finetune task=regression task.target=age protocol=fewshot task.shots=[10,20,all] ...
    """

    launch: Annotated[LaunchSettings, "where it runs", Group("local"), FREE] = field(default_factory=LaunchSettings)


def run(settings: Settings) -> int:
    asked = narrowed(FinetuneSettings, settings)
    if settings.launch.cluster is None:
        if train(asked) is not None and settings.report and _is_first():
            from brainfm.reports.finetuning import write_finetuning_page

            print(write_finetuning_page(settings.run, store=settings.store))
    else:
        job = submit("finetune", train, asked, settings.launch)
        print(f"{settings.run}: submitted as job {job.job_id}, logs in {job.paths.folder}")
    return 0


def train(settings: FinetuneSettings) -> Path | None:
    """Returns what a finished fine-tuning left; None where it was interrupted."""
    from brainfm.training.finetune import finetune
    from brainfm.training.processes import fellows

    with fellows(settings.run):
        return finetune(settings)


def _is_first() -> bool:
    """Whether this is the first process of a run, the one that writes."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
