"""Recomputation, memory for time: a block forgets its maps after the forward pass and makes them again later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(on: bool, block: Callable[..., Any], *inputs: Any) -> Any:
    """``block(*inputs)``; where ``on``, only the inputs are kept for the gradient. Values and gradients are the same.

    Source: Chen et al. 2016 (arXiv 1604.06174).
    """
    if on and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Switches every part of a network that can recompute: those with an attribute ``checkpointing``."""
    for part in module.modules():
        if isinstance(getattr(part, "checkpointing", None), bool):
            part.checkpointing = on  # type: ignore[assignment]


class Blocks(nn.Sequential):
    """Layers one after the other; with ``checkpointing`` each keeps its input only."""

    checkpointing: bool = False

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            features = recomputed(self.checkpointing, layer, features)
        return features
