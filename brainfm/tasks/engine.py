"""The engine: a bundle on a device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from brainfm.errors import ConfigError
from brainfm.seen import SeenSubjects
from brainfm.specs import Decisions, PreprocessSpec, TaskSpec
from brainfm.tasks.windows import Network

PathLike = str | os.PathLike[str]

_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Engine:
    """What turns prepared scans into probabilities.

    Attributes:
        networks: give logits; their probabilities are averaged.
        task, preprocess: of the bundle.
        device: where the networks are.
        autocast: the precision they compute in, None for float32.
        fingerprint: of the bundle.
        overlap: share of a window that its neighbour repeats, in [0, 1).
        decisions: what is done to the answers.
        seen: the people of the pre-training behind the bundle; None where nobody knows.
    """

    networks: tuple[Network, ...]
    task: TaskSpec
    preprocess: PreprocessSpec
    device: torch.device
    autocast: torch.dtype | None
    fingerprint: str
    overlap: float = 0.5
    decisions: Decisions = field(default_factory=Decisions)
    seen: SeenSubjects | None = None


def in_order(contrasts: Iterable[str], task: TaskSpec) -> list[str]:
    """Those of the task in its order, then the others: sums do not depend on the order in which files were given."""
    given = set(contrasts)
    return [c for c in task.contrasts if c in given] + sorted(given - set(task.contrasts))


def settle_device(name: str) -> torch.device:
    """Raises: ConfigError where there is no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={name}: expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def settle_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Raises: ConfigError where the precision is unknown."""
    if name == "auto":
        # float32 on a CPU: without matrix units (AMX) bfloat16 convolutions take 2.5 times as long there.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if name not in _PRECISIONS:
        raise ConfigError(f"precision={name}: expected auto, {', '.join(_PRECISIONS)}")
    return _PRECISIONS[name]
