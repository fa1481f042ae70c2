"""A class for every voxel, from any set of contrasts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import SkipDecoder
from brainfm.nets.heads import Fusion, fused_features
from brainfm.specs import ConfigError, TaskSpec
from brainfm.tasks.task import Task

_PRIOR = 0.01  # share of foreground that a fresh network answers


class SegmentationTask(Task):
    """Contrasts pass one by one through the encoder, meet at every level, and a decoder with skips answers.

    Args:
        spec: contrasts, classes and patch of the question.
        backbone: pre-trained or fresh.

    Source: for the bias of the last layer: Lin et al. 2017 (arXiv:1708.02002), section 4.1.
    Raises:
        ConfigError: where the spec is not a segmentation, lists a contrast twice or none, its values are not
            0 followed by distinct values up to 255 (masks are uint8), or the patch does not pass the backbone.
    """

    def __init__(self, spec: TaskSpec, backbone: Backbone) -> None:
        super().__init__()
        _check(spec)
        backbone.check_patch(spec.patch_vox)
        self.spec = spec
        self.backbone = backbone
        self.fusion = Fusion(backbone.widths, spec.fusion)
        self.decoder = SkipDecoder(backbone.widths, backbone.strides, spec.classes)
        bias = torch.zeros(spec.classes)  # else the first steps go into learning that most voxels are background
        bias[0] = math.log((1 - _PRIOR) / _PRIOR * (spec.classes - 1))
        self.decoder.out.bias = nn.Parameter(bias)
        self.register_buffer("_values", torch.tensor(spec.values, dtype=torch.uint8), persistent=False)

    def forward(self, image: Tensor, present: Tensor) -> Tensor:
        """Logits of the classes. What stands in the channel of an absent contrast is never looked at.

        Args:
            image: [B, M, X, Y, Z] standardised voxels; any contrasts in any order, also such as training never saw.
            present: [B, M] bool, at least one contrast a case.

        Returns:
            [B, K, X, Y, Z].

        Raises:
            ValueError: where the shapes do not fit or a case has no contrast.
        """
        return self.decoder(fused_features(self.backbone, self.fusion, image, present))

    def loss(self, output: Tensor, batch: Batch) -> Terms:
        """Soft Dice over the foreground classes plus cross-entropy over all, in float32.

        Args:
            output: logits [B, K, X, Y, Z] in any precision; ``batch.label`` holds the class indices.

        Returns:
            The sum, with parts ``dice`` and ``cross_entropy``.

        Source: Isensee et al. 2021 (nnU-Net, arXiv:1809.10486), the loss without deep supervision.
        """
        if batch.label is None:
            raise ValueError("a segmentation needs batch.label")
        logits = output.float()
        dice = soft_dice_loss(torch.softmax(logits, dim=1), batch.label)
        cross_entropy = functional.cross_entropy(logits, batch.label)
        return Terms(dice + cross_entropy, {"dice": dice.detach(), "cross_entropy": cross_entropy.detach()})

    def decode(self, output: Tensor) -> Tensor:
        """Logits or probabilities [B, K, X, Y, Z] -> label values [B, X, Y, Z] uint8."""
        return self._values[output.argmax(dim=1)]  # type: ignore[index]  # a buffer


def soft_dice_loss(probabilities: Tensor, label: Tensor, smooth: float = 1e-5) -> Tensor:
    """1 - the mean over foreground classes of (2 sum p t + smooth) / (sum p + sum t + smooth).

    The sums run over the whole batch, not over each patch: small lesions leave many patches without foreground, and
    for those alone Dice is a step from 1 to 0 at the first false voxel. With this small ``smooth`` a batch without a
    class gives hardly any gradient for it, and cross-entropy decides there.

    Args:
        probabilities: [B, K, X, Y, Z] float32, class 0 is the background and does not count.
        label: [B, X, Y, Z] int64 class indices.

    Source: Milletari et al. 2016 (V-Net, arXiv:1606.04797), eq. of section 3.
        Differs: sums of p and t instead of their squares, as in nnU-Net; over the batch.
    """
    terms = []
    for k in range(1, probabilities.shape[1]):  # class by class: a one-hot label of many classes would not fit
        true = label == k
        predicted = probabilities[:, k]
        both = (predicted * true).sum()
        terms.append((2 * both + smooth) / (predicted.sum() + true.sum() + smooth))
    return 1 - torch.stack(terms).mean()


def _check(spec: TaskSpec) -> None:
    if spec.kind != "segmentation":
        raise ConfigError(f"task.kind={spec.kind!r}: expected 'segmentation'")
    if not spec.contrasts or len(set(spec.contrasts)) != len(spec.contrasts):
        raise ConfigError(f"task.contrasts={list(spec.contrasts)}: expected one or more contrasts, each once")
    whole = all(isinstance(v, int) and 0 <= v <= 255 for v in spec.values)
    if spec.classes < 2 or not whole or spec.values[0] != 0 or len(set(spec.values)) != spec.classes:
        raise ConfigError(
            f"task.values={list(spec.values)}: expected 0 for the background and then at least one other value, "
            "all distinct whole numbers up to 255 (masks are uint8)"
        )
