"""Label maps that come with a scan, for answers that are made of the volumes of its regions."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.region_volumes import log_volumes
from brainfm.errors import BrainfmWarning, ConfigError, ScanError
from brainfm.specs import Decisions
from brainfm.tasks.engine import PathLike
from brainfm.tasks.whole_head.reads import PARTS, Reads


def reads_of(networks: Sequence[Any]) -> Reads | None:
    """What the members of a bundle are made of; None where they read no label map."""
    reads = getattr(networks[0], "reads", None) if networks else None
    return reads if reads is not None and reads.labels else None


def check_labels(labels: Mapping[str, PathLike], networks: Sequence[Any]) -> dict[str, Path]:
    """The label map by the column that the bundle reads, with or without its ending; empty where none was given.

    Raises:
        ConfigError: for a label map that the bundle does not read.
        ScanError: for a file that is not there.
    """
    reads, files = reads_of(networks), {}
    for name, text in labels.items():
        if reads is None or name not in (reads.labels, reads.labels.removesuffix("_labels")):
            expected = f"expected labels.{reads.labels.removesuffix('_labels')}" if reads else "expected none"
            raise ConfigError(f"labels.{name}: the bundle reads no such label map, {expected}")
        if not os.path.isfile(text):
            raise ScanError(f"{text}: no such file, given as labels.{name}")
        files[reads.labels] = Path(text)
    return files


def note_missing(networks: Sequence[Any], which: str) -> None:
    """A BrainfmWarning where a label map would change who answers.

    Args:
        which: lacks it, for the sentence.
    """
    reads = reads_of(networks)
    asking = [n for n in networks if reads is not None and bool((n.mix[0] != n.mix[1]).any())]
    if not asking or reads is None:
        return
    name = reads.labels.removesuffix("_labels")
    others = {
        "network": "the network's features", "regions": "the regions that the decoder sees", "mean": "the mean",
        "measurements": "simple measurements of the scan",
    }  # fmt: skip
    instead = sorted({others[PARTS[int(n.mix[1].argmax())]] for n in asking})
    warnings.warn(
        f"{which}: no label map {name}; {len(asking)} of {len(networks)} members answer from {' or '.join(instead)} "
        "instead of its volumes, and are expected to do worse",
        BrainfmWarning,
        stacklevel=3,
    )


def decisions_for(networks: Sequence[Any], decisions: Decisions, mapped: bool) -> Decisions:
    """What is done to the answers. Cross-validation decided it of answers with a label map: where others answer for
    want of one, no correction or interval is known."""
    reads = reads_of(networks)
    differ = reads is not None and any(bool((n.mix[0] != n.mix[1]).any()) for n in networks)
    return Decisions() if differ and not mapped else decisions


def volumes_of(
    networks: Sequence[Any], labels: np.ndarray | None, spacing_mm: Sequence[float], where: str
) -> torch.Tensor | None:
    """[1, F] float32 for the members' ``forward``, None without a label map.

    Args:
        labels: [X, Y, Z] as prepared.
        where: the file, for the sentence.

    Raises: ScanError where the map shows no part of a brain.
    """
    reads = reads_of(networks)
    if labels is None or reads is None:
        return None
    values = log_volumes(labels, spacing_mm, reads.scheme, reads.volumes, where)
    return torch.from_numpy(values).float()[None]
