"""A pre-training that goes on from the weights of a backbone file, with an optimiser of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.nets.decoders import DenseHead
from brainfm.nets.transfer import TransferReport, misfits, transfer
from brainfm.objectives.objective import Objective


def take_weights(objective: Objective, loaded: LoadedBackbone, origin: str) -> TransferReport:
    """Copies what a backbone file holds into an objective of the same network.

    The encoder must fit. The skip decoder, each head and the objective's own tensors are taken as far as the objective
    has them in these shapes, each of them whole or not at all: another objective asks with other ones.

    Args:
        objective: changed in place.
        loaded: the file.
        origin: its name, for messages.

    Returns: what was loaded, left as it was and unused.

    Raises: WeightsError where the encoder does not fit; nothing is then changed.
    """
    own = objective.state_dict()
    state: dict[str, Tensor] = _named("backbone", loaded.backbone.state_dict())
    beside = [
        _named(f"heads.{name}", head.state_dict())
        for name, head in sorted(loaded.heads.items())
        if not _means_other_classes(objective, name, head)
    ]
    if loaded.decoder is not None:
        beside.append(_named("dense", loaded.decoder.state_dict()))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in loaded.extra.items():
        parts.setdefault(name.split(".")[0], {})[name] = value
    for group in (*beside, *parts.values()):
        there = {name: own[name] for name in group if name in own}
        if len(there) == len(group) and not misfits(there, group):
            state |= group
    report = transfer(objective, state, allow_missing=[n for n in own if not n.startswith("backbone.")], origin=origin)
    every = {name for group in (*beside, *parts.values()) for name in group}
    return TransferReport(report.loaded, report.left_at_init, tuple(sorted(every - state.keys())))


def so_far(loaded: LoadedBackbone) -> dict[str, Any]:
    """``steps``, ``samples``, ``hours`` and ``cpu_hours`` of all trainings that led to a file, its own included."""
    origin = loaded.provenance
    before = origin.config.get("before") or {}
    own = {"steps": origin.steps, "samples": origin.samples, "hours": origin.hours}
    own["cpu_hours"] = origin.receipt.get("cpu_hours", 0.0)
    return {name: round(before.get(name, 0) + value, 4) for name, value in own.items()}


def voxels_seen(loaded: LoadedBackbone | None, voxel_mm: tuple[float, float]) -> tuple[float, float]:
    """Smallest and largest edge of a voxel of a training and of those that led to the file it went on from."""
    if loaded is None or loaded.voxel_mm is None:
        return voxel_mm
    return min(loaded.voxel_mm[0], voxel_mm[0]), max(loaded.voxel_mm[1], voxel_mm[1])


def _means_other_classes(objective: Objective, name: str, head: DenseHead) -> bool:
    """Whether the objective's head of this name tells other classes, or the same in another order: shapes may agree."""
    own = objective.heads[name] if objective.heads is not None and name in objective.heads else None
    return isinstance(own, DenseHead) and (own.names, own.part) != (head.names, head.part)


def _named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}
