"""Tissue label maps and volumes for every session of a manifest by the atlas: in parallel, and resumable."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from brainfm.data.labelling import (
    PRIORITY,
    FoundLabels,
    LabelJob,
    LabellingReport,
    Method,
    check_contrasts,
    label_manifest,
    settle,
)
from brainfm.data.manifest import Manifest
from brainfm.data.workers import in_pool, in_this_process
from brainfm.errors import ConfigError
from brainfm.imaging import anatomy, nifti

COLUMN = "tissue_labels"


def anatomize(
    manifest: Manifest,
    out: str | Path,
    contrasts: Sequence[str] = PRIORITY,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> LabellingReport:
    """Leaves ``labels/``, ``volumes.csv`` and ``manifest.csv`` in a folder; the manifest has the column tissue_labels.

    Args:
        contrasts, progress: as for label_manifest.
        workers: processes; 0 and 1 work in this one.

    Raises:
        ManifestError: files are missing, or the manifest has label maps of its own in that column.
        ConfigError: a contrast is unknown, or SimpleITK or nilearn is not installed.
        StoreError: a worker was killed. What was made stays, and another run goes on from there.
    """
    if workers < 0:
        raise ConfigError(f"workers={workers}: expected 0 or more")
    check_contrasts(contrasts)
    anatomy.check_packages()
    killed = (
        f"{out}: a worker was killed, most likely because memory ran out; what was made stays, run anatomy again with "
        f"fewer than workers={workers}"
    )

    def work(todo: Sequence[LabelJob]) -> Generator[Any, None, None]:
        pooled = workers > 1 and len(todo) > 1
        return in_pool(_work, todo, workers, killed) if pooled else in_this_process(_work, todo)

    method = Method(COLUMN, "tissue", anatomy.VOLUMES, {"version": anatomy.VERSION})
    return label_manifest(manifest, out, method, contrasts, work, progress)


def _work(job: LabelJob) -> None:
    settle(job, _segmented)


def _segmented(job: LabelJob) -> FoundLabels:
    volume, _ = nifti.read(job.file)
    found = anatomy.segment(volume)
    return FoundLabels(found.labels, found.volumes_ml, found.quality, found.checks, found.reason)
