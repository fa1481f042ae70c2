"""Lengths of the filters that an instance norm follows: they decide how fast a layer learns, not what it says."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from brainfm.nets.unet import ConvNormAct

_FRESH = 3**-0.5  # of one filter as torch draws it: each of n weights is even between -1/sqrt(n) and 1/sqrt(n)


@torch.no_grad()
def restore_lengths(network: nn.Module) -> float:
    """Brings the filters of every convolution before an instance norm back to the length they had before training.

    The norm takes the length away again, so the network answers as before (up to the norm's eps). But a step of Adam is
    about as long whatever the weights are, and a long pre-training makes them many times longer: what is left of a
    step, relative to its weights, is the smaller by that. All filters of a layer are scaled alike, bias included.

    Returns:
        How many times as long as at the start the filters were, the geometric mean over layers; 1 without such a layer.

    Source: van Laarhoven 2017 (arXiv 1706.05350), section 2: the effective rate of a normalised layer.
    """
    grown = []
    for part in network.modules():
        if not isinstance(part, ConvNormAct):
            continue
        convolution = cast(nn.Conv3d, part[0])
        length = float(convolution.weight.float().norm())
        usual = _FRESH * convolution.out_channels**0.5
        if length == 0:
            continue
        convolution.weight.mul_(usual / length)
        if convolution.bias is not None:
            convolution.bias.mul_(usual / length)
        grown.append(length / usual)
    return float(torch.tensor(grown).log().mean().exp()) if grown else 1.0
