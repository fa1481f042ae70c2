"""A mask for a session: prepared, predicted in windows by every member, brought back onto the grid of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from brainfm.errors import BundleError, ScanError
from brainfm.imaging.nifti import FileGrid
from brainfm.imaging.preprocess import prepare_session, restore_probabilities
from brainfm.tasks.engine import Engine, in_order
from brainfm.tasks.segmentation import cleanup
from brainfm.tasks.windows import predict_windows

_SLACK = 0.05  # of windows in a region, whose edges are where its margin ends: an overlap of .5 is at least .475


def answer(engine: Engine, files: Mapping[str, Path], reference: str, grid: FileGrid | None = None) -> np.ndarray:
    """Label values of one session, uint8, in the shape and axis order of a file.

    Args:
        files: file by contrast; those that the task was not trained on are looked at as well.
        reference: the contrast whose directions the network's grid takes.
        grid: of the file that is answered for; by default the reference's.

    Raises:
        ScanError: where any file cannot be used: what the user gave is used or refused, never dropped in silence.
    """
    prepared = prepare_session(files, {}, engine.preprocess, reference=reference, within=engine.region)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))
    order = in_order(files, engine.task)
    image = torch.stack([torch.from_numpy(prepared.scans.pop(contrast)) for contrast in order])
    recipe = prepared.recipes[reference]
    probabilities = _mean_probabilities(engine, image, torch.ones(len(files), dtype=torch.bool))
    if grid is not None:
        recipe = replace(recipe, file=grid)
    indices = restore_probabilities(probabilities.numpy(), recipe, shares=True)
    spacing_mm = np.linalg.norm(np.array(recipe.file.affine_mm)[:3, :3], axis=0)
    indices = cleanup.apply(indices, engine.decisions, spacing_mm.tolist())
    return np.asarray(engine.task.values, dtype=np.uint8)[indices]


def _mean_probabilities(engine: Engine, image: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """[K, X, Y, Z] float32, the mean over the members of the ensemble."""
    total: torch.Tensor | None = None
    for network in engine.networks:
        probabilities = predict_windows(
            network,
            image,
            present,
            engine.task.patch_vox,
            overlap=engine.overlap,
            batch=1 if engine.device.type == "cpu" else 2,  # more gains no time on a CPU and costs memory
            device=engine.device,
            autocast=engine.autocast,
            mirror=engine.decisions.mirror,
            slack=_SLACK if engine.decisions.region else 0.0,
        )
        total = probabilities if total is None else total.add_(probabilities)
    if total is None:
        raise BundleError("the bundle has no networks, expected at least one")
    return total.div_(len(engine.networks))
