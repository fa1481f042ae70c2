"""Simple measurements of a prepared session, for answers that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from brainfm.errors import ScanError
from brainfm.imaging.descriptors import content_descriptors, head_mask
from brainfm.imaging.intensity import half_precision


def measurements_of(
    networks: Sequence[Any], scans: Mapping[str, np.ndarray], spacing_mm: Sequence[float]
) -> torch.Tensor | None:
    """[1, F] float32 for the members' ``forward``, as their ``reads`` name them; NaN of a contrast that is not there.
    None where no member's answer has a share of them: they are then not measured.

    Args:
        scans: prepared voxels [X, Y, Z] by contrast; others than the task's only help to see the head.
    """
    if not any(getattr(network, "asks_measurements", False) for network in networks):
        return None
    names = networks[0].reads.measurements
    # as a store keeps them: shares of voxels between two values, and the values that most have, hang on the steps
    voxels = {contrast: half_precision(scan).astype(np.float32) for contrast, scan in scans.items()}
    known = {name.partition("/")[0] for name in names}
    own = {contrast: scan for contrast, scan in voxels.items() if contrast in known} or voxels
    try:
        head = head_mask(own)
    except ScanError:
        return torch.full((1, len(names)), torch.nan)
    told = content_descriptors(own, head, spacing_mm)
    return torch.tensor([[told.get(name, np.nan) for name in names]], dtype=torch.float32)
