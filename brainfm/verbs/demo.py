"""A synthetic cohort taken through every step below, and a report with pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

PLACE = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A synthetic cohort taken through every verb, ending in report.html and summary.json. No download.

    brainfm demo out=demo
    """

    out: Annotated[Path, "folder of all that is made"]
    backbone: Annotated[
        Path | None, "weights to begin with; null: those that ship; none: a short pre-training on the cohort itself"
    ] = None
    seed: Annotated[int, "of cohort and trainings"] = 0
    subjects: Annotated[int, "two fifths of them are kept for the test"] = 20
    labelled: Annotated[int, "of the others have their lesions outlined; all of them serve pre-training"] = 5
    runs: Annotated[int, "fine-tunings of each arm, each from its own seed"] = 3
    cohort_mm: Annotated[float, "voxels of the cohort's files"] = 2
    spacing_mm: Annotated[float, "voxels the networks see"] = 3
    patch_vox: Annotated[tuple[int, int, int], "of both trainings"] = (32, 32, 32)
    pretrain_steps: Annotated[int, "of pre-training, where no backbone is given"] = 75
    finetune_steps: Annotated[int, "of each fine-tuning"] = 60
    workers: Annotated[int, "processes for doctor and prepare; 0: one a core"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.cli import main
    from brainfm.demo import demo
    from brainfm.nets import shipped

    backbone = settings.backbone
    if backbone is None and shipped.USUAL in shipped.names():
        backbone = Path(shipped.USUAL)
    summary = demo(
        settings.out,
        main,
        backbone=None if backbone == Path("none") else backbone,
        seed=settings.seed,
        subjects=settings.subjects,
        labelled=settings.labelled,
        runs=settings.runs,
        cohort_mm=settings.cohort_mm,
        spacing_mm=settings.spacing_mm,
        patch_vox=settings.patch_vox,
        pretrain_steps=settings.pretrain_steps,
        finetune_steps=settings.finetune_steps,
        workers=settings.workers,
    )
    print(
        f"{settings.out / 'report.html'}: {summary['n_cases']} test subjects, "
        f"Dice {summary['dice_pretrained']:.3f} pre-trained, {summary['dice_scratch']:.3f} from scratch, "
        f"{summary['seconds']['in all'] / 60:.1f} min"
    )
    return 0
