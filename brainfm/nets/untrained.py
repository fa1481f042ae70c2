"""Networks whose weights are as they were drawn: what pre-training is held against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in


def random_backbone(config: Mapping[str, Any], seed: int) -> Backbone:
    """A backbone as it is before any training, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(**config)
    return swap_in(backbone).eval().requires_grad_(False)
