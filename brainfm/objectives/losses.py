"""Terms of the objectives, one value per sample, in float32 whatever the network computes in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.nets.latents import Code

RECONSTRUCTIONS = ("mse", "smooth_l1")


def mean_of_valid(values: Tensor) -> Tensor:
    """The mean of [V] values of the samples a term applies to; exactly 0, and still part of the graph, where V is 0."""
    return values.sum() / max(len(values), 1)


def reconstruction(
    prediction: Tensor, target: Tensor, kind: str, beta: float = 0.1, where: Tensor | None = None
) -> Tensor:
    """Mean error over a sample's voxels: [V, 1, X, Y, Z] twice -> [V].

    Args:
        kind: one of RECONSTRUCTIONS.
        beta: where smooth L1 turns from quadratic to linear, in units of the standardised intensity.
        where: bool [V, 1, X, Y, Z], the voxels that count, some in every sample; None for all.

    Source: smooth L1: Girshick 2015 (arXiv 1504.08083), equation 3, in torch's scaling by beta; hidden voxels only:
    He et al. 2022 (arXiv 2111.06377), section 3.
    """
    prediction, target = prediction.float(), target.float()
    if kind == "mse":
        error = F.mse_loss(prediction, target, reduction="none")
    else:
        error = F.smooth_l1_loss(prediction, target, beta=beta, reduction="none")
    if where is None:
        return error.flatten(1).mean(dim=1)
    error = torch.where(where, error, 0.0)
    return error.flatten(1).sum(dim=1) / where.flatten(1).sum(dim=1)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Cosine between flattened codes: [V, E, X, Y, Z] twice -> [V] in [-1, 1]."""
    return F.cosine_similarity(one.float().flatten(1), other.float().flatten(1), dim=1)


def kl_to_standard_normal(code: Code) -> Tensor:
    """Divergence of a variational code from N(0, 1), a mean over its elements: -> [V].

    Source: Kingma & Welling 2014 (arXiv 1312.6114), appendix B.
    Differs: a mean instead of a sum, so that a weight means the same at any patch size (as the winner of FOMO25 does).
    """
    if code.logvar is None:
        return code.mean.new_zeros(len(code.mean))
    divergence = 0.5 * (code.mean.float() ** 2 + code.logvar.float().exp() - 1 - code.logvar.float())
    return divergence.flatten(1).mean(dim=1)


def ramp(progress: float, length: float) -> float:
    """0 at the start of the run, 1 from ``length`` (a share of the run) on; always 1 where the length is 0."""
    return 1.0 if length <= 0 else min(1.0, max(0.0, progress / length))
