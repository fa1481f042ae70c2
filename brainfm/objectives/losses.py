"""Terms of the objectives, one value per sample, in float32 whatever the network computes in."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from brainfm.nets.latents import Code

RECONSTRUCTIONS = ("mse", "smooth_l1")


def mean_of_valid(values: Tensor) -> Tensor:
    """The mean of [V] values of the samples a term applies to; exactly 0, and still part of the graph, where V is 0."""
    return mean_over_processes(values.sum(), values.new_full((), len(values)))


def mean_where(values: Tensor, known: Tensor) -> Tensor:
    """The mean of [V] values where ``known``; exactly 0, and still part of the graph, where nothing is."""
    return mean_over_processes(torch.where(known, values, 0.0).sum(), known.sum())


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """``total`` / ``count``, both summed over the processes of a run: what one process with all the samples would find.

    A term that applies to few samples would otherwise weigh more on the rank that has fewest of them. The value is the
    same on every process; the gradient is that of this process's own ``total``, times the number of processes, because
    DDP averages where a sum is meant. Every process has to call this, in the same order, also with a count of 0. The
    parts of an accumulated batch cannot be joined here: each is a batch of its own, as LoopSpec.accumulate says.

    Args:
        total: scalar, with its gradient.
        count: scalar >= 0, samples or their weights; where all of them are 0, so is the mean.
    """
    processes = _processes()
    if processes == 1:
        return total / _at_least(count.to(total))
    sums = torch.stack([total.detach(), count.to(total)])
    dist.all_reduce(sums)
    count = _at_least(sums[1])
    share = total * (processes / count)
    return share + (sums[0] / count - share).detach()


def centred(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [V, E, X, Y, Z] twice, less their mean over samples at each cell, over the processes of a run.

    A vector that all codes share says nothing of any of them, but makes every cosine between them large; so does a
    vector that tells the cell alone, which padding gives away. A single pair has no other sample beside it: there the
    mean is over cells as well, which leaves the second of these ways open.
    """
    total = _sum_over_processes(one.float().sum(dim=0) + other.float().sum(dim=0))
    pairs = _sum_over_processes(one.new_full((), len(one), dtype=torch.float32))
    mean = total / _at_least(2 * pairs)
    mean = torch.where(pairs > 1, mean, mean.mean(dim=(1, 2, 3), keepdim=True))
    return one.float() - mean, other.float() - mean


def spread_floor(one: Tensor, other: Tensor) -> Tensor:
    """How far the deviation of each channel of centred codes, over all their cells, falls short of 1: scalar in [0, 1],
    0 where there is no code.

    The companion of a cosine, which does not see how large a code is: without it a hair's breadth of difference would
    do, and the noise of a variational code would drown it.

    Source: Bardes et al. 2022, VICReg (arXiv 2105.04906), equation 1, with its target of 1.
    """
    squares = torch.cat([one, other]).float().square()
    total = _sum_over_processes(squares.sum(dim=(0, 2, 3, 4)))
    count = _sum_over_processes(squares.new_full((), squares[:, 0].numel()))
    short = (1 - (total / _at_least(count) + 1e-4).sqrt()).clamp(min=0).mean()
    return torch.where(count > 0, short, 0.0)


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


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _sum_over_processes(values: Tensor) -> Tensor:
    """With gradients to every process's own values."""
    if _processes() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce

    summed: Tensor = all_reduce(values)
    return summed


def _at_least(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1.0)
