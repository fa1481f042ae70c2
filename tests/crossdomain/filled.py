"""Weights that depend on their names alone, so that two libraries' networks can be compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def filled(network: nn.Module) -> nn.Module:
    """In place; the classifier ``fc`` stays."""
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.startswith("fc.") or not value.is_floating_point():
                continue
            numbers = np.random.default_rng([ord(letter) for letter in name]).standard_normal(tuple(value.shape))
            if name.endswith("running_var"):
                numbers = 0.5 + numbers**2
            elif value.ndim > 1:
                numbers *= np.sqrt(2 / np.prod(value.shape[1:]))
            elif name.endswith("weight"):
                numbers = 0.5 + 0.1 * numbers
            value.copy_(torch.from_numpy(numbers))
    return network
