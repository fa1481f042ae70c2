"""Find the scans under a folder: one row a scan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from brainfm.settings import VERBATIM

PLACE = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Find the scans under a folder and write one row a scan. What was left out, and why, is listed beside it in
    NAME.left_out.csv, which `brainfm doctor` reads.

      brainfm manifest root=DATA out=manifest.csv masks.lesion='*lesion_mask*'
    """

    root: Annotated[Path, "folder with the data"]
    out: Annotated[Path, "manifest to write, .csv or .tsv"]
    layout: Annotated[str, "how the folder is laid out: bids | fomo60k | fomo300k | openmind | nnunet | folder"] = (
        "auto"
    )
    masks: Annotated[
        Mapping[str, str],
        "masks.NAME=GLOB: column NAME_mask, anything but 0 is the finding; alternatives: 'A|B'",
        VERBATIM,
    ] = field(default_factory=dict)
    labels: Annotated[Mapping[str, str], "labels.NAME=GLOB: column NAME_labels, a label map", VERBATIM] = field(
        default_factory=dict
    )
    participants: Annotated[
        str | None,
        "table whose columns are joined by subject; null: the data set's own participants.tsv and sessions.tsv; none",
        VERBATIM,
    ] = None
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.data.layouts import find
    from brainfm.data.manifest import write_left_out, write_manifest

    participants, out = settings.participants, settings.out
    found = find(
        settings.root,
        settings.layout,
        masks=settings.masks,
        labels=settings.labels,
        participants=Path(participants) if participants and participants != "none" else None,
        own_tables=participants != "none",
    )
    write_manifest(out, found.scans)
    write_left_out(out, found.left_out)
    for note in found.notes:
        print(note)
    subjects = {(s.dataset, s.subject) for s in found.scans}
    sessions = {(s.dataset, s.subject, s.session) for s in found.scans}
    print(f"{out}: {len(found.scans)} scans, {len(sessions)} sessions, {len(subjects)} subjects")
    return 0
