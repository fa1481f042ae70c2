"""The optimiser and the learning rate of each step."""

from __future__ import annotations

import math

import torch
from torch import nn

from brainfm.specs import ConfigError


def build_optimizer(
    module: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms, scores) are not decayed.

    Args:
        module: what is trained; frozen parameters are left out.
        lr: peak learning rate, > 0.
        weight_decay: decoupled, >= 0.
    """
    if lr <= 0 or weight_decay < 0:
        raise ConfigError(f"optim.lr={lr}, optim.weight_decay={weight_decay}: expected lr > 0 and weight_decay >= 0")
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


def lr_factor(step: int, max_steps: int, warmup_steps: int, warmup_from: float = 1e-3) -> float:
    """The share of the peak learning rate at a step (0-based): linear warm-up, then a cosine to 0, per step.

    The first step after warm-up has the factor 1; the step ``max_steps`` would have 0.
    """
    if step < warmup_steps:
        return warmup_from + (1 - warmup_from) * step / warmup_steps
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
