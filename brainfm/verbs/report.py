"""Write the report of a finished fine-tuning again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

PLACE = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write RUN/report.html again from what a finished fine-tuning left there and from its store.

    brainfm report run=runs/b
    """

    run: Annotated[Path, "folder of the fine-tuning"]
    store: Annotated[Path | None, "where the scans are now, if the store has moved"] = None
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.reports.finetuning import write_finetuning_page

    print(write_finetuning_page(settings.run, store=settings.store))
    return 0
