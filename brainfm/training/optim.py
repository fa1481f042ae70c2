"""The optimiser and the learning rate of each step.

A group's own schedule is data, so that a checkpoint carries it: teeth ``(start, end, warmup)`` in steps, one after the
other. In a tooth the rate climbs for ``warmup`` steps and falls along a cosine to 0 at its end; outside all it is 0.
The other groups follow the run's schedule: one such tooth, or `Wsd`, whose rates do not depend on how long the run is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from brainfm.errors import ConfigError


def build_optimizer(
    module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms, scores) are not decayed.

    Args:
        module: what is trained; frozen parameters are left out.
        lr: peak learning rate, > 0.
        weight_decay: decoupled, >= 0.
    """
    check_rates(lr, weight_decay)
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def check_rates(lr: float, weight_decay: float) -> None:
    """Raises: ConfigError for a rate or a decay that leads nowhere, NaN among them."""
    if not (0 < lr < math.inf and 0 <= weight_decay < math.inf):
        raise ConfigError(f"optim.lr={lr}, optim.weight_decay={weight_decay}: expected lr > 0 and weight_decay >= 0")


def lr_factor(step: int, max_steps: int, warmup_steps: int, warmup_from: float = 1e-3) -> float:
    """The share of the peak learning rate at a step (0-based): linear warm-up, then a cosine to 0, per step.

    The first step after warm-up has the factor 1; the step ``max_steps`` would have 0.
    """
    if step < warmup_steps:
        return warmup_from + (1 - warmup_from) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Wsd:
    """Warm-up, then a constant rate, and a decay only where a run is finished.

    No step's rate or progress depends on how many steps follow, so a run may be continued to any length.

    Attributes:
        warmup_steps: linear, as in `lr_factor`.
        horizon_steps: over which the objective's progress goes from 0 to 1, where it then stays.
        decay: the first step of the decay and its length; None: the rate stays.
        shape: of the decay, ``linear`` or ``cosine``; the step after the last would have the rate 0.

    Source: Hu et al. 2024, MiniCPM (arXiv 2404.06395), section 4.
    Raises: ConfigError for impossible values.
    """

    warmup_steps: int = 1000
    horizon_steps: int = 10_000
    decay: tuple[int, int] | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.horizon_steps < 1:
            raise ConfigError(
                f"optim.warmup_steps={self.warmup_steps}, optim.horizon_steps={self.horizon_steps}: "
                "expected 0 or more, and 1 or more"
            )
        if self.decay is not None and self.decay[1] < 1:
            raise ConfigError(f"finish.steps={self.decay[1]}: expected 1 or more")
        if self.shape not in ("linear", "cosine"):
            raise ConfigError(f"finish.shape={self.shape}: expected linear or cosine")

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step (0-based)."""
        factor = lr_factor(min(step, self.warmup_steps), self.warmup_steps + 1, self.warmup_steps)
        if self.decay is not None and step >= self.decay[0]:
            done = min(1.0, (step - self.decay[0]) / self.decay[1])
            factor *= 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return factor

    def progress(self, step: int) -> float:
        """How far the objective's own schedules are after ``step`` steps."""
        return min(1.0, step / self.horizon_steps)


def schedule_factor(step: int, teeth: Sequence[Sequence[int]]) -> float:
    """The share of the peak learning rate at a step (0-based) of a schedule of teeth; 0 outside them."""
    for start, end, warmup in teeth:
        if start <= step < end:
            return lr_factor(step - start, end - start, warmup)
    return 0.0


class Rates:
    """Sets the learning rate of every group before each step, and lets groups sleep whose rate is 0.

    A sleeping group costs no memory of activations, moves no weight and no moment of the optimiser, and does not count
    in the norm that gradients are clipped to: the step is that of a network in which it is frozen.

    Args:
        optimizer: as it was built, before a checkpoint changes its groups: ``lr`` is the peak, ``schedule`` (teeth) is
            optional.
        factor: step -> share of the peak, of the groups without a schedule.
        alone: whether this is the only process. DDP fixes at its start which parameters get gradients: there a
            sleeping group's are computed, summed over processes like all others, and thrown away.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float], alone: bool = True) -> None:
        self.peaks = [(group["lr"], group.get("schedule")) for group in optimizer.param_groups]
        self.factor, self.alone = factor, alone

    def set(self, optimizer: Any, step: int) -> float:
        """Sets the rates of a step (0-based). Returns the highest."""
        for group, (peak, teeth) in zip(optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * (schedule_factor(step, teeth) if teeth else self.factor(step))
            if self.alone:
                for parameter in group["params"]:
                    parameter.requires_grad_(group["lr"] > 0)
        return max(group["lr"] for group in optimizer.param_groups)

    def drop_unwanted(self, optimizer: Any) -> None:
        """Between backward and the optimiser: no gradient stays with a sleeping group."""
        for group in optimizer.param_groups:
            if group["lr"] == 0:
                for parameter in group["params"]:
                    parameter.grad = None

    def wake(self, optimizer: Any) -> None:
        """After the last step: every parameter of the optimiser asks for gradients again."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
