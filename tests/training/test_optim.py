from __future__ import annotations

import math
from itertools import pairwise

import pytest
from torch import nn

from brainfm.errors import ConfigError
from brainfm.training.optim import build_optimizer, lr_factor


def test_learning_rate_of_each_step() -> None:
    factors = [lr_factor(s, 100, 10) for s in range(101)]
    assert factors[0] == pytest.approx(1e-3) and factors[10] == 1.0 and factors[100] == pytest.approx(0, abs=1e-12)
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert lr_factor(0, 10, 0) == 1.0


def test_vectors_are_not_decayed_and_frozen_weights_left_out() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2, affine=True), nn.Conv3d(2, 1, 1))
    net[2].weight.requires_grad_(False)
    decayed, free = build_optimizer(net, lr=1e-3, weight_decay=0.1).param_groups
    assert [p.ndim for p in decayed["params"]] == [5] and decayed["weight_decay"] == 0.1
    assert [p.ndim for p in free["params"]] == [1, 1, 1, 1] and free["weight_decay"] == 0


def test_impossible_values() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        build_optimizer(nn.Linear(1, 1), lr=0, weight_decay=0)
