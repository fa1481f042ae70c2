"""Turn a challenge's fine-tuning data into a manifest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

PLACE = 20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Turn the fine-tuning data of a challenge's task into a manifest, and say what is missing or strange. Nothing is
    copied. A mask that lies on another grid than every scan of its session is left out by name.

    brainfm convert challenge=fomo26 task=task2 root=FOMO26 out=task2.csv
    """

    challenge: Annotated[str, "fomo25 | fomo26"]
    task: Annotated[str, "task1, task2, ..."]
    root: Annotated[Path, "what the organisers' archive unpacks to, or the task's folder in it"]
    out: Annotated[Path, "the manifest, .csv or .tsv"] = Path("manifest.csv")
    repair: Annotated[
        bool, "masks with the very shape of a scan but another place are taken as that scan's, as copies in OUT_masks/"
    ] = False
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.submission.challenge import read_challenge
    from brainfm.submission.convert import convert

    task = read_challenge(settings.challenge).task(settings.task)
    found = convert(task, settings.root, settings.out, settings.repair)
    for note in found.notes:
        print(f"note: {note}")
    for file, reason in found.left_out:
        print(f"left out: {file}: {reason}")
    print(f"{found.manifest}: {found.sessions} sessions of {task.id}, {found.answered} with an answer")
    return 0
