"""Fine-tune a backbone on labelled cases; leaves a bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar

from brainfm.errors import ConfigError
from brainfm.settings import FREE, Group, narrowed
from brainfm.training.settings import FinetuneSettings
from brainfm.verbs import convert, prepare
from brainfm.verbs.launch import LaunchSettings, submit
from brainfm.verbs.prepare import PreprocessSettings

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
      brainfm finetune experiment=fomo26_task2 root=FOMO26 backbone_from=runs/a/backbone.safetensors
    """

    RECIPES: ClassVar[str] = "a challenge's task as configs/experiment/ has it: data, grid, question, run= and store="

    root: Annotated[
        Path | None, "a challenge's fine-tuning data: converted to STORE.csv, prepared into store=, then learned", FREE
    ] = None
    challenge: Annotated[str | None, "of root=: whose data it holds, e.g. fomo26_task2", FREE] = None
    repair: Annotated[bool, "of root=: as in `convert`", FREE] = False
    preprocess: Annotated[PreprocessSettings, "of root=: the grid", Group("iso1mm"), FREE] = field(
        default_factory=PreprocessSettings
    )
    launch: Annotated[LaunchSettings, "where it runs", Group("local"), FREE] = field(default_factory=LaunchSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.root is not None and self.challenge is None:
            raise ConfigError(f"root={self.root}: expected experiment=fomo26_task2 or the like, or challenge=")


def run(settings: Settings) -> int:
    if settings.root is not None and _is_first():
        store_of(settings.root, settings)
    asked = narrowed(FinetuneSettings, settings)
    if settings.launch.cluster is None:
        if train(asked) is not None and settings.report and _is_first():
            from brainfm.reports.finetuning import write_finetuning_page

            print(write_finetuning_page(settings.run, store=settings.store))
    else:
        job = submit("finetune", train, asked, settings.launch)
        print(f"{settings.run}: submitted as job {job.job_id}, logs in {job.paths.folder}")
    return 0


def store_of(root: Path, settings: Settings) -> None:
    """Brings a challenge's fine-tuning data into the store; what is there already stays."""
    from brainfm.submission.challenge import task_of

    task = task_of(str(settings.challenge))
    manifest = settings.store.with_name(f"{settings.store.name}.csv")
    asked = convert.Settings(
        challenge=task.challenge, task=task.name, root=root, out=manifest, repair=settings.repair
    )  # fmt: skip
    convert.run(asked)
    prepare.run(prepare.Settings(manifest=manifest, store=settings.store, preprocess=settings.preprocess))


def train(settings: FinetuneSettings) -> Path | None:
    """Returns what a finished fine-tuning left; None where it was interrupted."""
    from brainfm.training.finetune import finetune
    from brainfm.training.processes import fellows

    with fellows(settings.run):
        return finetune(settings)


def _is_first() -> bool:
    """Whether this is the first process of a run, the one that writes."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
