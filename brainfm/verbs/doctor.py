"""Read every scan and say what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from brainfm.files import check_writable
from brainfm.verbs.running import bar, processes

PLACE = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Read every scan and say what is wrong with it. Exit code 1 if any scan has a fault.

    brainfm doctor manifest=manifest.csv
    """

    manifest: Annotated[Path, "what to examine"]
    out: Annotated[Path | None, "CSV of the faults; null: beside the manifest, NAME.doctor.csv"] = None
    workers: Annotated[int, "processes; 0: one a core"] = 0
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.data.doctor import examine, write_faults
    from brainfm.data.manifest import read_manifest

    manifest = read_manifest(settings.manifest)
    out = settings.out or manifest.path.with_suffix(".doctor.csv")
    check_writable(out.parent)  # now, and not after hours of reading
    with bar("doctor", len(manifest.scans)) as move:
        found = examine(manifest, processes(settings.workers), move)
    faults = found.faults
    write_faults(out, faults)
    for fault in faults:
        print(f"{fault.path}: {fault.fault}")
    for note in found.notes:
        print(f"note: {note}")
    bad = len({fault.path for fault in faults})
    print(f"{out}: {len(faults)} faults in {bad} files of {len(manifest.scans)} scans")
    return 1 if faults else 0
