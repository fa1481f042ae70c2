"""Losses of a segmentation: overlap over the foreground, and each voxel by itself.

Every loss is a sum of two terms. The overlap term is about structures, however small; the voxel term teaches in batches
without foreground, where the overlap term has hardly a gradient. Targets are class indices [B, X, Y, Z], or shares of
the classes [B, K, X, Y, Z] where voxels are so coarse that several classes meet in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from brainfm.batch import Terms
from brainfm.errors import ConfigError

_SMOOTH = 1e-5
LOSSES = ("dice_ce", "dice_focal", "focal_tversky", "tversky")


@dataclass(frozen=True)
class SegmentationLoss:
    """Which loss a segmentation minimises.

    Attributes:
        name: ``dice_ce``, or for small structures ``tversky``, ``focal_tversky`` (missed voxels cost more than false
            ones) or ``dice_focal`` (hard voxels cost more than easy ones).
        alpha, beta: of the Tversky losses, what a false and what a missed voxel costs.
        power: of ``focal_tversky``, the exponent of 1 - index, above 0 and up to 1; below 1 it favours classes that are
            nearly right.
        gamma: of ``dice_focal``, the exponent of 1 - p.
        deep_supervision: whether the decoder's coarser levels answer as well while training.
    """

    name: str = "dice_ce"
    alpha: float = 0.3
    beta: float = 0.7
    power: float = 0.75
    gamma: float = 2.0
    deep_supervision: bool = False

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ConfigError(f"task.loss={self.name!r}: expected one of {', '.join(LOSSES)}")
        if self.alpha < 0 or self.beta <= 0:
            raise ConfigError(f"task.loss: alpha={self.alpha} and beta={self.beta}: expected alpha >= 0 and beta > 0")
        if not 0 < self.power <= 1 or self.gamma < 0:
            raise ConfigError(
                f"task.loss: power={self.power} and gamma={self.gamma}: expected 0 < power <= 1 and gamma >= 0"
            )


def segmentation_loss(logits: Tensor, target: Tensor, loss: SegmentationLoss) -> Terms:
    """The loss of one resolution, in float32.

    Args:
        logits: [B, K, X, Y, Z] in any precision.
        target: [B, X, Y, Z] int64 class indices, or [B, K, X, Y, Z] shares that sum to 1.

    Returns:
        The sum, and both of its terms as parts.
    """
    logits = logits.float()
    probabilities = torch.softmax(logits, dim=1)
    overlap_name, voxel_name = {
        "dice_ce": ("dice", "cross_entropy"),
        "dice_focal": ("dice", "focal"),
        "tversky": ("tversky", "cross_entropy"),
        "focal_tversky": ("focal_tversky", "cross_entropy"),
    }[loss.name]
    if overlap_name == "dice":
        overlap = soft_dice_loss(probabilities, target)
    else:
        power = loss.power if overlap_name == "focal_tversky" else 1.0
        overlap = tversky_loss(probabilities, target, loss.alpha, loss.beta, power)
    if voxel_name == "focal":
        voxel = focal_loss(logits, target, loss.gamma)
    else:
        voxel = functional.cross_entropy(logits, target)
    return Terms(overlap + voxel, {overlap_name: overlap.detach(), voxel_name: voxel.detach()})


def soft_dice_loss(probabilities: Tensor, target: Tensor, smooth: float = _SMOOTH) -> Tensor:
    """1 - the mean over foreground classes of (2 sum p t + smooth) / (sum p + sum t + smooth).

    The sums run over the whole batch, not over each patch: small lesions leave many patches without foreground, and
    for those alone Dice is a step from 1 to 0 at the first false voxel. With this small ``smooth`` a batch without a
    class gives hardly any gradient for it, and the voxel term decides there.

    Args:
        probabilities: [B, K, X, Y, Z] float32, class 0 is the background and does not count.
        target: [B, X, Y, Z] int64 class indices, or shares [B, K, X, Y, Z].

    Source: Milletari et al. 2016 (V-Net, arXiv:1606.04797), eq. of section 3.
        Differs: sums of p and t instead of their squares, as in nnU-Net; over the batch.
    """
    terms = []
    for k, true in _foreground(target, probabilities.shape[1]):
        predicted = probabilities[:, k]
        both = (predicted * true).sum()
        terms.append((2 * both + smooth) / (predicted.sum() + true.sum() + smooth))
    return 1 - torch.stack(terms).mean()


def tversky_loss(
    probabilities: Tensor, target: Tensor, alpha: float, beta: float, power: float = 1.0, smooth: float = _SMOOTH
) -> Tensor:
    """The mean over foreground classes of (1 - T)^power, T = (tp + smooth) / (tp + alpha fp + beta fn + smooth).

    With tp = sum p t, fp = sum p (1 - t), fn = sum (1 - p) t over the whole batch. alpha = beta = 1/2 is soft Dice;
    beta above alpha asks for sensitivity.

    Args:
        probabilities: [B, K, X, Y, Z] float32, class 0 is the background and does not count.
        target: [B, X, Y, Z] int64 class indices, or shares [B, K, X, Y, Z].
        alpha, beta: what a false and what a missed voxel costs.
        power: 1 for the plain loss.

    Source: Salehi et al. 2017 (arXiv:1706.05721) for the index; Abraham & Khan 2018 (arXiv:1810.07842) for the power,
        their 1/gamma.
        Differs: sums over the batch; the mean over classes instead of the sum.
    """
    terms = []
    for k, true in _foreground(target, probabilities.shape[1]):
        predicted = probabilities[:, k]
        both = (predicted * true).sum()
        false, missed = predicted.sum() - both, true.sum() - both
        index = (both + smooth) / (both + alpha * false + beta * missed + smooth)
        # the slope of x^power has no end at 0: a class that is nowhere and is predicted nowhere must not divide by it
        terms.append((1 - index).clamp(min=1e-6) ** power if power != 1 else 1 - index)
    return torch.stack(terms).mean()


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """The mean over voxels of (1 - p)^gamma * -log p, p the probability of the true class.

    Args:
        logits: [B, K, X, Y, Z] float32.
        target: [B, X, Y, Z] int64 class indices, or shares [B, K, X, Y, Z], over which the voxel's loss is averaged.
        gamma: 0 is cross-entropy.

    Source: Lin et al. 2017 (arXiv:1708.02002), eq. 4. Differs: softmax over the classes, no class weights.
    """
    log_p = functional.log_softmax(logits, dim=1)
    if target.ndim == logits.ndim:
        return (target * (1 - log_p.exp()) ** gamma * -log_p).sum(dim=1).mean()
    log_p = log_p.gather(1, target[:, None])
    return ((1 - log_p.exp()) ** gamma * -log_p).mean()


def class_shares(label: Tensor, classes: int, stride: int) -> Tensor:
    """What share of each class the voxels of a coarser level hold.

    Shares and not the nearest label: a lesion smaller than a coarse voxel stays in the target.

    Args:
        label: [B, X, Y, Z] int64 class indices, edges multiples of ``stride``.

    Returns:
        [B, K, X/s, Y/s, Z/s] float32, summing to 1 over K.
    """
    pooled = [functional.avg_pool3d((label == k).float()[:, None], stride) for k in range(classes)]
    return torch.cat(pooled, dim=1)


def deep_loss(
    logits: Tensor, coarser: Sequence[Tensor], label: Tensor, loss: Callable[[Tensor, Tensor], Terms]
) -> Terms:
    """The loss of every level of a decoder, the weight halved from each to the next coarser; the weights sum to 1.

    Args:
        logits: [B, K, X, Y, Z].
        coarser: logits [B, K, X/s, Y/s, Z/s] of the coarser levels, fine to coarse; s is read off their shapes.
        label: [B, X, Y, Z] int64 class indices.
        loss: of (logits, target), for one level.

    Returns:
        The weighted sum; the parts are those of the finest level, and ``coarser``, the weighted rest.

    Source: Lee et al. 2015 (arXiv:1409.5185); the weights as in Isensee et al. 2021 (arXiv:1809.10486).
        Differs: coarse targets are shares of the classes instead of the nearest label; the coarsest level counts.
    """
    weights = [0.5**level for level in range(1 + len(coarser))]
    finest = loss(logits, label)
    total = finest.total * (weights[0] / sum(weights))
    rest = torch.zeros_like(finest.total)
    for weight, answer in zip(weights[1:], coarser, strict=True):
        stride = label.shape[1] // answer.shape[2]
        rest = rest + loss(answer, class_shares(label, answer.shape[1], stride)).total * (weight / sum(weights))
    return Terms(total + rest, {**finest.parts, "coarser": rest.detach()})


def _foreground(target: Tensor, classes: int) -> Iterator[tuple[int, Tensor]]:
    """Where each class truly is, one after the other: a one-hot label of many classes would not fit in memory."""
    for k in range(1, classes):
        yield k, (target == k if target.ndim == 4 else target[:, k])
