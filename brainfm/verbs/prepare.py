"""Bring every session to one grid, in a store of random patches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from brainfm.settings import VERBATIM, Group
from brainfm.verbs.running import bar, processes

if TYPE_CHECKING:
    from brainfm.data.manifest import Manifest
    from brainfm.specs import PreprocessSpec

PLACE = 3
_MOST_SAID = 10  # sessions of one kind that are named


@dataclass(frozen=True)
class PreprocessSettings:
    """What is done to every scan. Every key changes results."""

    spacing_mm: Annotated[
        float | tuple[float, float, float] | Literal["auto"],
        "one length, [x, y, z], or auto: from the scans' headers (data/fingerprint.py)",
    ] = 1
    align: Annotated[
        Literal["header", "rigid"],
        "header: trust the affines of a session's scans; rigid: register them, and all visits of a subject",
    ] = "header"
    clip_percentiles: Annotated[tuple[float, float], "of the foreground"] = (0.5, 99.5)
    margin_mm: Annotated[float, "kept around the foreground"] = 2
    labels: Annotated[Literal["linear", "nearest"], "linear: each class apart, then the largest"] = "linear"

    def spec(self, manifest: Manifest, store: Path) -> PreprocessSpec:
        """As the store keeps it; what is ``auto`` is settled by the scans, and said."""
        from brainfm.data.fingerprint import settled_spacing
        from brainfm.specs import PreprocessSpec

        spacing_mm = self.spacing_mm
        if isinstance(spacing_mm, str):
            spacing_mm = settled_spacing(manifest, store)
            print(f"preprocess.spacing_mm={list(spacing_mm)}")
        return PreprocessSpec(
            spacing_mm if isinstance(spacing_mm, tuple) else (spacing_mm, spacing_mm, spacing_mm),
            align=self.align,
            clip_percentiles=self.clip_percentiles,
            margin_mm=self.margin_mm,
            labels=self.labels,
        )


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Bring every session to one grid and write the store. Interrupted, the same command goes on.

    brainfm prepare manifest=manifest.csv store=store preprocess.spacing_mm=1
    """

    manifest: Annotated[Path, "what to prepare"]
    store: Annotated[Path, "folder of the store"]
    workers: Annotated[int, "processes; 0: one a core"] = 0
    shard: Annotated[
        str, "i/n: only this share of the subjects; n machines may write one store at the same time", VERBATIM
    ] = "1/1"
    scheduler: Annotated[str | None, "HOST:PORT of a Dask scheduler, or local, instead of processes", VERBATIM] = None
    preprocess: Annotated[PreprocessSettings, "the grid", Group("iso1mm")] = field(default_factory=PreprocessSettings)
    debug: Annotated[bool, "a traceback in place of the sentence"] = False


def run(settings: Settings) -> int:
    from brainfm.data.manifest import read_manifest
    from brainfm.data.prepare import prepare
    from brainfm.data.store import Share

    share = Share.parse(settings.shard)
    manifest = read_manifest(settings.manifest)
    spec = settings.preprocess.spec(manifest, settings.store)
    with bar("prepare", len(manifest.sessions())) as move:
        report = prepare(
            manifest, settings.store, spec, processes(settings.workers), move,
            share=share, scheduler=settings.scheduler,
        )  # fmt: skip
    for failure in report.failed:
        print(f"left out: {failure.reason if failure.path in failure.reason else f'{failure.path}: {failure.reason}'}")
    for key, changed in report.again[:_MOST_SAID]:
        print(f"prepared again: {'/'.join(filter(None, key))}, for {changed} has changed")
    if len(report.again) > _MOST_SAID:
        print(f"prepared again: {len(report.again) - _MOST_SAID} more")
    for label, (empty, labelled) in report.empty.items():
        print(f"{label}: {empty} of {labelled} are empty")
    print(
        f"{settings.store}: {report.done} sessions prepared, {report.skipped} were there, "
        f"{len(report.failed)} files left out"
    )
    return 0
