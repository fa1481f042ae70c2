"""The network of a segmentation: a class for every voxel, from any set of contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import DenseHead, Pointwise, chained, decoder_for
from brainfm.nets.heads import Fusion, fused_features
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation.collapse import ForegroundWatch
from brainfm.tasks.segmentation.losses import SegmentationLoss, deep_loss, segmentation_loss
from brainfm.tasks.task import Task, TrainingWatch

_PRIOR = 0.01  # least share of foreground, and of background, that a fresh network answers
_AUXILIARY = "auxiliary."
_DEFAULT = SegmentationLoss()


class DeepLogits(NamedTuple):
    """What a deeply supervised segmenter says while it trains.

    Attributes:
        finest: [B, K, X, Y, Z], all that it says in eval mode.
        coarser: [B, K, X/s, Y/s, Z/s] of the decoder's coarser levels, fine to coarse.
    """

    finest: Tensor
    coarser: tuple[Tensor, ...]


class SegmentationTask(Task):
    """Contrasts pass one by one through the encoder, meet at every level, and a decoder with skips answers.

    The decoder is fresh and ends in the classes, or it is one that was pre-trained with the encoder: then it ends in
    its own widened map, from which one more 1x1x1 convolution tells the classes.

    Args:
        spec: contrasts, classes and patch of the task.
        backbone: pre-trained or fresh.
        loss: what training minimises.
        deep_supervision: whether the coarser levels of the decoder get heads of their own while training; the same as
            ``loss.deep_supervision``. Prediction and bundles know nothing of them.
        shares: of the voxels of a training patch that belong to each class (cases.class_shares): what the fresh
            network answers everywhere, but never less than 1 % for the foreground, evenly divided, or the background.
            None: 1 % of foreground.
        dense_channels: E of the widened map of a pre-trained decoder (nets/dense.py), whose weights are for the caller
            to load into ``decoder``; 0: a decoder of its own.

    Attributes:
        decoder: levels and ``out``, in both cases.
        head: after a pre-trained decoder, the last layer; else None.
        began: in words, what the last layer began as.

    Source: for the bias of the last layer: Lin et al. 2017 (arXiv:1708.02002), section 4.1.
    Raises:
        ValueError: where ``shares`` does not have one number a class.
        ConfigError: where the spec is not a segmentation, lists a contrast twice or none, its values are not
            0 followed by distinct values up to 255 (masks are uint8), or the patch does not pass the backbone.
    """

    def __init__(
        self,
        spec: TaskSpec,
        backbone: Backbone,
        *,
        loss: SegmentationLoss = _DEFAULT,
        deep_supervision: bool = False,
        shares: Sequence[float] | None = None,
        dense_channels: int = 0,
    ) -> None:
        super().__init__()
        _check(spec)
        if dense_channels < 0:
            raise ConfigError(f"dense_channels={dense_channels}: expected 0 or more channels")
        self.prior = _prior(spec.classes, shares)
        backbone.check_patch(spec.patch_vox)
        self.spec = spec
        self.backbone = backbone
        self.loss_spec = loss
        self.fusion = Fusion(backbone.widths, spec.fusion)
        self.decoder = decoder_for(backbone, dense_channels or spec.classes)
        self.head = Pointwise(dense_channels, spec.classes) if dense_channels else None
        self.began = "fresh"
        self.auxiliary = nn.ModuleList()  # last, so that the weights before it are drawn alike with and without
        if deep_supervision or loss.deep_supervision:
            self.auxiliary.extend(Pointwise(width, spec.classes) for width in self.decoder.widths[1:])
        for head in self.heads():
            _answer(head, self.prior)
        self.register_buffer("_values", torch.tensor(spec.values, dtype=torch.uint8), persistent=False)

    def forward(self, image: Tensor, present: Tensor | None = None) -> Any:
        """Logits of the classes. What stands in the channel of an absent contrast is never looked at.

        Args:
            image: [B, M, X, Y, Z] standardised voxels; any contrasts in any order, also such as training never saw.
            present: [B, M] bool, at least one contrast a case; None: all of them.

        Returns:
            [B, K, X, Y, Z]; with deep supervision, in training mode, DeepLogits.

        Raises:
            ValueError: where the shapes do not fit or a case has no contrast.
        """
        *coarser, finest = self.climb(image, present)
        if not (self.training and self.auxiliary):
            return self._logits(finest)
        answers = tuple(head(level) for head, level in zip(self.auxiliary, reversed(coarser), strict=True))
        return DeepLogits(self._logits(finest), answers)

    def climb(self, image: Tensor, present: Tensor | None) -> list[Tensor]:
        """The decoder's features [B, E, X/s, Y/s, Z/s], coarse to fine, of what ``forward`` reads."""
        return self.decoder.climb(fused_features(self.backbone, self.fusion, image, present))

    def _logits(self, finest: Tensor) -> Tensor:
        """The decoder's last features -> [B, K, X, Y, Z]."""
        out = self.decoder.out
        logits: Tensor = out(finest) if self.head is None else chained(finest, out, self.head)
        return logits

    def loss(self, output: Any, batch: Batch) -> Terms:
        """The loss of the task's SegmentationLoss, in float32.

        Args:
            output: of ``forward``, in any precision; ``batch.label`` holds the class indices.

        Returns:
            The sum over an overlap and a voxel term, which are its parts (losses.py); with coarser levels
            the weighted sum over levels.
        """
        if batch.label is None:
            raise ValueError("a segmentation needs batch.label")
        if isinstance(output, DeepLogits):
            return deep_loss(*output, batch.label, lambda a, target: segmentation_loss(a, target, self.loss_spec))
        return segmentation_loss(output, batch.label, self.loss_spec)

    def loss_of(self, features: Tensor, classes: Tensor) -> float:
        """The loss of the last layer's answers for voxels: their features [N, E] before it, their classes [N]."""
        logits = self._logits(features.t()[None, :, :, None, None])
        return float(segmentation_loss(logits.float(), classes[None, :, None, None], self.loss_spec).total)

    def decode(self, output: Tensor) -> Tensor:
        """Logits or probabilities [B, K, X, Y, Z] -> label values [B, X, Y, Z] uint8."""
        return self._values[output.argmax(dim=1)]  # type: ignore[index]  # a buffer

    def watch(self, max_steps: int) -> TrainingWatch:
        return ForegroundWatch(max_steps)

    def settings(self) -> dict[str, Any]:
        return {} if self.head is None else {"dense_channels": self.head.in_channels}

    @torch.no_grad()
    def begin_fresh(self) -> None:
        """Behind a pre-trained decoder, once its weights are loaded: the last layer answers as a fresh one on the
        decoder's last features would, whatever the scale of the widened map between them."""
        assert self.head is not None and self.head.bias is not None and self.decoder.out.bias is not None
        composed = self.head.weight.flatten(1) @ self.decoder.out.weight.flatten(1)
        usual = 3**-0.5  # norm of a row as torch draws it
        self.head.weight.mul_((usual / composed.norm(dim=1).clamp(min=1e-6))[:, None, None, None, None])
        _answer(self.head, self.prior)
        self.head.bias.sub_(self.head.weight.flatten(1) @ self.decoder.out.bias)

    def begin_linear(self, features: Tensor, classes: Tensor) -> None:
        """Lets the last layer begin as a linear probe: a logistic regression of the classes on the decoder's last
        features (in units of their deviation, L2 penalty 1e-3, L-BFGS in float64).

        Args:
            features: [N, E] of voxels of training patches.
            classes: [N] int64.

        Source: Kumar et al. 2022 (arXiv 2202.10054), linear probing before fine-tuning.
        """
        mean, scale = features.double().mean(0), features.double().std(0).clamp(min=1e-6)
        known = (features.double() - mean) / scale
        weight = known.new_zeros(self.spec.classes, known.shape[1], requires_grad=True)
        bias = self.prior.to(known).log().requires_grad_()
        solver = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            solver.zero_grad()
            error = cross_entropy(known @ weight.t() + bias, classes) + 1e-3 * weight.square().sum()
            error.backward()
            return error

        with torch.enable_grad():
            solver.step(loss)
        with torch.no_grad():
            weight, out = weight / scale, self.decoder.out
            bias = bias - weight @ mean
            if self.head is not None:
                # the smallest weights on the widened map that say the same of the features before it
                weight = weight @ torch.linalg.pinv(out.weight.flatten(1).double())
                bias = bias - weight @ cast(Tensor, out.bias).double()
            last = self.heads()[0]
            last.weight.copy_(weight[:, :, None, None, None])
            cast(Tensor, last.bias).copy_(bias)
        self.began = "a linear probe of the decoder's features"

    @torch.no_grad()
    def begin_as(self, head: DenseHead, start: int) -> None:
        """Lets the answer of two classes begin as that of a pre-trained head with one output: the same probability in
        every voxel, bias included.

        Args:
            start: the widened map's channel at which the head's part begins.

        Raises:
            ValueError: where there are other classes than two, no pre-trained decoder, or no such channels.
        """
        fits = self.head is not None and start + head.in_channels <= self.head.in_channels
        if self.spec.classes != 2 or head.out_channels != 1 or not fits:
            raise ValueError(f"{self.spec.classes} classes cannot begin as a head of {head.config} at {start}")
        assert self.head is not None and self.head.bias is not None and head.bias is not None
        nn.init.zeros_(self.head.weight)  # softmax over (0, z) is the sigmoid of z
        self.head.weight[1, start : start + head.in_channels] = head.weight[0]
        self.head.bias.copy_(torch.stack([head.bias.new_zeros(()), head.bias[0]]))
        self.began = f"a pre-trained head on part {head.part}"

    def bundle_state(self) -> dict[str, Tensor]:
        """The weights without the heads of coarser levels, which nothing asks after training."""
        return {name: value for name, value in super().bundle_state().items() if not name.startswith(_AUXILIARY)}

    def lift_foreground(self) -> None:
        """Lets a network that answers background everywhere begin anew: its last layers answer the fresh shares of
        the classes in every voxel, whatever the features; all other weights stay.

        The last weights become 0 as well, since a collapse may sit in them as much as in the bias. They learn again
        from the first step, the layers before them from the second. An optimiser's moments of these layers are stale.
        """
        for head in self.heads():
            nn.init.zeros_(head.weight)
            _answer(head, self.prior)

    def heads(self) -> list[nn.Conv3d]:
        """The last layers: the answer's, then those of the coarser levels where there are any."""
        last = self.decoder.out if self.head is None else self.head
        return [last, *(cast(Pointwise, head) for head in self.auxiliary)]


def _prior(classes: int, shares: Sequence[float] | None) -> Tensor:
    """[K] what a fresh network answers; else the first steps go into learning how frequent the classes are."""
    if shares is not None and len(shares) != classes:
        raise ValueError(f"expected a share for each of {classes} classes, found {list(shares)}")
    least = torch.tensor([_PRIOR] + [_PRIOR / (classes - 1)] * (classes - 1), dtype=torch.float64)
    known = torch.tensor([1.0] + [0.0] * (classes - 1) if shares is None else list(shares), dtype=torch.float64)
    # what is lifted to its least is taken from the others in proportion to what they have above theirs
    above = (known - least).clamp(min=0)
    return (least + above * (1 - least.sum()) / above.sum()).float()


def _answer(head: nn.Conv3d, prior: Tensor) -> None:
    assert head.bias is not None
    with torch.no_grad():
        head.bias.copy_((prior / prior[0]).log())


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
