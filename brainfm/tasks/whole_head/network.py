"""The network of a whole-head answer: a class, several yes or no, or a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead, decoder_for
from brainfm.nets.heads import (
    Fusion,
    GatedAttention,
    LinearHead,
    Standardise,
    fused_features,
    mean_summary,
    moments,
)
from brainfm.specs import TaskSpec
from brainfm.tasks.task import Task
from brainfm.tasks.whole_head.reads import PARTS, Reads, averaged, dense_numbers, dense_width, log_head_volume
from brainfm.tasks.whole_head.sorts import MODES, linear_head, sort_of

_LEVELS = 3  # deepest maps that are pooled
POOLINGS = ("attention", "mean", "token")


class WholeHeadOutput(NamedTuple):
    """What the head says.

    Attributes:
        logits: [B, T']: K classes, K - 1 thresholds between ordered classes, T labels, or 1 standardised value.
        attention: [B, V, X/s, Y/s, Z/s] float32, sums to 1 over a case; even where nothing is learned (``mean``,
            ``token``).
    """

    logits: Tensor
    attention: Tensor


class WholeHeadTask(Task):
    """All views of a head pass through the encoder, its deepest maps are pooled by attention, and one layer answers.

    A token is a voxel of the deepest map with what lies in its place in the maps above it: after instance norms the
    deepest map alone says little that a few cases could teach to read. ``spec.pooling=mean`` weighs all tokens of a
    view alike; ``token`` takes a transformer's class token in place of mean and deviation, the mean over contrasts.

    A view is the whole head on coarse voxels or a window of it. Both scales begin with the same total weight, so the
    answer does not hang on how many windows are given: training shows a few, prediction all that cover the head.

    With ``reads`` the answer is a mixture of several parts' logits (reads.PARTS): the network, linear models of
    region volumes, and the mean. Which, inner folds have chosen (`mix`); fresh, it is the network alone. The network
    then sees the size of the head as well and, where there is a decoder, what that sees.

    Args:
        spec: a classification or regression.
        backbone: pre-trained or fresh.
        guidance: weight of the term that draws attention to a lesion where its mask is known.
        label_smoothing: how far the classes' targets are moved towards indifference, in [0, 1).
        dropout: of the pooled features, in [0, 1).
        balanced: whether rare classes count more in the loss, see ``set_statistics``.
        reads: what there is beside the encoder's maps, or the same as ``reads.json`` says it; None: nothing, as in
            bundles of before.

    Raises:
        ConfigError: where the spec answers for no whole head, lists a contrast twice or none, its classes do not suit
            its mode, it has neither a whole-head view nor crops, the patch does not pass the backbone, a class token
            is asked for that there is not, or a number is out of range.
    """

    class_weights: Tensor
    mean: Tensor
    std: Tensor
    mix: Tensor
    prior: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        backbone: Backbone,
        *,
        guidance: float = 0.1,
        label_smoothing: float = 0.05,
        dropout: float = 0.2,
        balanced: bool = True,
        reads: Reads | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(spec)
        self.sort = sort_of(spec)
        backbone.check_patch(spec.patch_vox)
        for name, value, most in (("label_smoothing", label_smoothing, 1), ("dropout", dropout, 1)):
            if not 0 <= value < most:
                raise ConfigError(f"task.{name}={value}: expected 0 <= {name} < {most}")
        if guidance < 0:
            raise ConfigError(f"task.guidance={guidance}: expected 0 or more")
        self.spec, self.backbone = spec, backbone
        self.guidance, self.label_smoothing, self.balanced = guidance, label_smoothing, balanced
        if spec.pooling == "token" and not backbone.class_token:
            raise ConfigError(
                f"task.pooling=token: {backbone.config['name']} has no class token; expected attention or mean"
            )
        widths = backbone.widths[-_LEVELS:]
        width = sum(widths)
        learned = spec.pooling == "attention"
        self.fusion = Fusion(widths, "mean" if spec.pooling == "token" else spec.fusion)
        both = spec.view_mm > 0 and spec.crops and learned
        self.scale = nn.Parameter(torch.zeros(2, width)) if both else None  # row 0: whole head, row 1: windows
        self.pool = GatedAttention(width) if learned else None
        self.reads = Reads.from_dict(reads) if isinstance(reads, Mapping) else reads
        seen = (backbone.widths[-1] if spec.pooling == "token" else 2 * width) + self._build_parts()
        self.norm = Standardise(seen)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(seen, self.sort.outputs(spec))
        nn.init.normal_(self.out.weight, std=0.01)  # a fresh network is undecided, or answers the training mean
        nn.init.zeros_(self.out.bias)
        self.measure_head: LinearHead | None = None
        if self.reads is not None and self.reads.measurements:
            with torch.random.fork_rng(devices=[]):  # what else is drawn stays as it was without it
                head = LinearHead(len(self.reads.measurements), self.sort.outputs(spec))
            self.measure_head = head.requires_grad_(False)
        self.register_buffer("class_weights", torch.ones(max(1, spec.classes)))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def _build_parts(self) -> int:
        """What ``reads`` asks for, frozen: closed forms fill it. Returns how many numbers it adds to the features."""
        self.dense: DenseDecoder | None = None
        self.regions: DenseHead | None = None
        self.volume_head: LinearHead | None = None
        self.region_head: LinearHead | None = None
        reads, outputs = self.reads, self.sort.outputs(self.spec)
        if reads is None:
            return 0
        self.register_buffer("prior", torch.zeros(outputs))
        self.register_buffer("mix", torch.zeros(2, len(reads.parts)))
        self.mix[:, PARTS.index("network")] = 1
        if reads.volumes:
            self.volume_head = LinearHead(len(reads.volumes), outputs).requires_grad_(False)
        if not self.spec.view_mm:  # the size of a head is not seen in windows
            return 0
        if reads.decoder is None:
            return 1
        self.dense = decoder_for(self.backbone, reads.decoder["parts"])
        self.dense.requires_grad_(False)
        self.reads_of_file = {"decoder.": "dense.", "heads.regions.": "regions."}
        if reads.regions is not None:
            self.regions = DenseHead(**reads.regions).requires_grad_(False)
            self.region_head = LinearHead(len(reads.region_names), outputs).requires_grad_(False)
        return 1 + dense_width(reads, self.dense)

    def forward(
        self,
        image: Tensor,
        present: Tensor | None = None,
        volumes: Tensor | None = None,
        measured: Tensor | None = None,
    ) -> WholeHeadOutput:
        """Without gradients the views pass one by one, so that a head of many windows takes the memory of one.

        Args:
            image: [B, V, M, X, Y, Z] standardised voxels, the whole head first if the spec has that view; any contrasts
                in any order.
            present: [B, M] bool, at least one contrast a case; None: all of them.
            volumes: [B, F] numbers of a label map, as ``reads`` names them; NaN for a case without, None for all.
            measured: [B, F] measurements, as ``reads`` names them; NaN where one is unknown.

        Raises:
            ValueError: where the shapes do not fit, a case has no contrast, or lacks measurements that are asked for.
        """
        if measured is None and self.asks_measurements:
            raise ValueError("this member answers from measurements of the scan, expected them as `measured`")
        pooled, weights = self.pooled(image, present)
        if self.reads is None:
            return WholeHeadOutput(self.out(self.dropout(self.norm(pooled))), weights)
        parts = self.parts(pooled, volumes, measured)
        shares = self.mix[1:].expand_as(parts[:, :, 0].t())  # [B, P]
        if self.volume_head is not None and volumes is not None:
            shares = self.mix[torch.where(torch.isfinite(volumes).all(dim=1), 0, 1)]
        return WholeHeadOutput(torch.einsum("bp,pbk->bk", shares, parts), weights)

    def parts(self, pooled: Tensor, volumes: Tensor | None = None, measured: Tensor | None = None) -> Tensor:
        """[P, B, T'] float32: the logits of each of PARTS; 0 of one that this member lacks.

        Args:
            pooled: of `pooled`.
            volumes: as for ``forward``; NaN counts as 0.
            measured: as for ``forward``; NaN counts as the training cases' mean.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            network = self.out(self.dropout(self.norm(pooled.float())))
        found = {"mean": self.prior.expand_as(network), "network": network}
        if self.volume_head is not None and volumes is not None:
            found["volumes"] = self.volume_head(torch.nan_to_num(volumes))
        if self.region_head is not None:
            found["regions"] = self.region_head(pooled[:, self.region_columns])
        if self.measure_head is not None and measured is not None:
            usual = self.measure_head.norm.mean.expand_as(measured)
            found["measurements"] = self.measure_head(torch.where(torch.isfinite(measured), measured, usual))
        lacking = torch.zeros_like(self.prior).expand_as(network)  # of as many cases in a trace, too
        names = PARTS[:4] if self.reads is None else self.reads.parts
        return torch.stack([found.get(name, lacking) for name in names])

    @property
    def asks_measurements(self) -> bool:
        """Whether any share of the answer is that of simple measurements."""
        return self.measure_head is not None and bool(self.mix[:, PARTS.index("measurements")].any())

    @property
    def region_columns(self) -> slice:
        """Where the numbers about the volumes of regions lie in what `pooled` gives."""
        assert self.reads is not None
        first = self.norm.mean.numel() - dense_width(self.reads, self.dense)
        return slice(first, first + len(self.reads.region_names))

    def pooled(self, image: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the last layers see of each case, [B, E], and the attention that made it; see ``forward``."""
        if image.ndim != 6 or (present is not None and present.shape != (image.shape[0], image.shape[2])):
            found = None if present is None else tuple(present.shape)
            raise ValueError(f"expected [B, V, M, X, Y, Z] and [B, M], found {tuple(image.shape)} and {found}")
        cases, views = image.shape[:2]
        grid = torch.Size(edge // self.backbone.strides[-1] for edge in image.shape[3:])
        of_view = torch.full((views,), 1 / views)
        if self.spec.view_mm > 0 and self.spec.crops and views > 1:
            of_view = torch.tensor([0.5] + [0.5 / (views - 1)] * (views - 1))
        prior = (of_view / grid.numel()).to(image.device).repeat_interleave(grid.numel())
        together = views if torch.is_grad_enabled() else 1
        shown = [image[:, v : v + together] for v in range(0, views, together)]
        if self.spec.pooling == "token":
            said = torch.cat([self._summaries(some, present) for some in shown], dim=1)  # [B, V, E]
            pooled, weights = torch.einsum("v,bve->be", of_view.to(said), said), prior.expand(cases, -1)
        else:
            parts = [self._tokens(some, present) for some in shown]
            tokens, squares = (torch.cat(each, dim=1).flatten(1, 4) for each in zip(*parts))  # [B, N, E]
            pooled, weights = self._weighed(tokens, squares, prior, views)
        if self.reads is not None and self.spec.view_mm:
            pooled = torch.cat([pooled, self._measured(image[:, 0], present)], dim=1)
        return pooled, weights.view(cases, views, *grid)

    def _weighed(self, tokens: Tensor, squares: Tensor, prior: Tensor, views: int) -> tuple[Tensor, Tensor]:
        """The pooled vector [B, 2 E] of tokens [B, N, E], and what each of them weighs [B, N]."""
        if self.pool is None:
            weights = prior.expand(len(tokens), -1)
            return moments(tokens, squares, weights), weights
        place = None
        if self.scale is not None:
            place = self.scale[[0] + [1] * (views - 1)].repeat_interleave(len(prior) // views, dim=0)
        pooled: tuple[Tensor, Tensor] = self.pool(tokens, squares, prior, place)
        return pooled

    def _summaries(self, image: Tensor, present: Tensor | None) -> Tensor:
        """[B, V, M, X, Y, Z] -> the class tokens [B, V, E], the mean over the contrasts."""
        there = None if present is None else present.repeat_interleave(image.shape[1], dim=0)
        return mean_summary(self.backbone, image.flatten(0, 1), there).unflatten(0, image.shape[:2])

    @torch.no_grad()
    def _measured(self, whole: Tensor, present: Tensor | None) -> Tensor:
        """Numbers about the whole-head views [B, M, X, Y, Z], the mean over the contrasts that are there. Without a
        gradient: they tell the head of the encoder's maps nothing, and keep no activations."""
        if present is None:
            return torch.stack([self._numbers(scans) for scans in whole.split(1, dim=1)]).mean(dim=0)
        total: Tensor | None = None
        for m in range(whole.shape[1]):
            cases = present[:, m].nonzero()[:, 0]
            if not len(cases):
                continue
            numbers = self._numbers(whole[cases, m : m + 1])
            total = numbers.new_zeros(len(whole), numbers.shape[1]) if total is None else total
            total.index_add_(0, cases, numbers)
        assert total is not None
        return total / present.sum(dim=1, keepdim=True)

    def _numbers(self, scans: Tensor) -> Tensor:
        """The same of scans of one contrast [B, 1, X, Y, Z]."""
        scans, voxel_ml = scans.float(), self.spec.view_mm**3 / 1000
        numbers = log_head_volume(scans, voxel_ml)
        if self.dense is None:
            return numbers
        assert self.reads is not None
        seen = dense_numbers(self.reads, self.backbone, self.dense, self.regions, scans, voxel_ml)
        return torch.cat([numbers, seen], dim=1)

    def _tokens(self, image: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, V, M, X, Y, Z] -> means and mean squares of all levels on the coarsest grid, [B, V, x, y, z, E]."""
        there = None if present is None else present.repeat_interleave(image.shape[1], dim=0)
        maps = [level.float() for level in fused_features(self.backbone, self.fusion, image.flatten(0, 1), there)]
        grid = maps[-1].shape[2:]
        means = torch.cat([averaged(level, grid) for level in maps], dim=1)
        squares = torch.cat([averaged(level.square(), grid) for level in maps], dim=1)
        means, squares = (m.movedim(1, -1).unflatten(0, image.shape[:2]) for m in (means, squares))
        return means, squares

    # ---- training ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start_linear(
        self, features: Tensor, answers: np.ndarray, groups: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        """Makes the last layer the linear model that tells most from the features as they are.

        Few steps then go on from a linear probe instead of from nothing, and the encoder is not distorted by the
        gradients of a head that knows nothing yet. After training the same is done again: features drift together, and
        what is small against what all heads share makes that drift large. Call ``set_statistics`` before.

        Args:
            features: [N, E] of ``pooled``, of the cases that are trained on.
            answers: [N, T] as in ``Batch.answer``.
            groups: [N] their subjects, see `linear_head`.

        Source: Kumar et al. 2022 (arXiv:2202.10054), linear probing, then fine-tuning.
        """
        self.norm.fit(features)
        x = self.norm(features).double().cpu().numpy()
        weight, bias = linear_head(
            x, answers, self.spec, float(self.mean), float(self.std), self.balanced, groups, seed
        )
        self.out.weight.copy_(torch.from_numpy(weight))
        self.out.bias.copy_(torch.from_numpy(bias))

    def set_statistics(self, answers: np.ndarray | Tensor) -> None:
        """Takes from the cases trained on what the loss needs; it travels with the weights.

        Classes weigh N / (K n): their total weights are equal. A label's positive cases weigh what there are negatives
        for each of them. A regression remembers mean and standard deviation.

        Args:
            answers: [N, T] as in ``Batch.answer``; NaN where unknown.
        """
        values = np.asarray(answers, dtype=np.float64)
        if not self.sort.probable:
            known = values[np.isfinite(values)]
            self.mean.fill_(float(known.mean()))
            self.std.fill_(max(float(known.std()), 1e-6))
        elif self.balanced:
            self.class_weights.copy_(torch.from_numpy(self.sort.weights(values, self.spec)))

    def loss(self, output: WholeHeadOutput, batch: Batch) -> Terms:
        """The error of the answer, plus, where a lesion's mask is known, what attention lies beside the lesion.

        Weighted cross-entropy with smoothed labels (exclusive); the same for "beyond this class" at each of the K - 1
        thresholds (ordinal) and for each label (multilabel); smooth L1 of the standardised value (regression). Weights
        are not divided out again: in batches of one or two they would be without effect. Unknown answers are left out.

        Args:
            output: of ``forward``; float32 is used throughout.
            batch: ``answer`` [B, T], NaN where unknown; ``lesion`` [B, V, X, Y, Z] or None.

        Returns:
            The sum, with parts ``answer`` and, where there is ``batch.lesion``, ``guidance``: minus the logarithm of
            the attention on the lesion's tokens, the mean over cases with a lesion in view.

        Source: thresholds: Frank & Hall 2001; Cheng et al. 2008 (arXiv:0704.1028).
        """
        if batch.answer is None:
            raise ValueError("an answer for a whole head needs batch.answer")
        answer = self._error(output.logits.float(), batch.answer.float())
        parts = {"answer": answer.detach()}
        total = answer
        if batch.lesion is not None:
            guidance = lesion_guidance(output.attention, batch.lesion)
            parts["guidance"] = guidance.detach()
            total = total + self.guidance * guidance
        return Terms(total, parts)

    def _error(self, logits: Tensor, answer: Tensor) -> Tensor:
        known = torch.isfinite(answer)
        answer = torch.where(known, answer, 0)
        error = self.sort.errors(self, logits, answer)
        return (error * known).sum() / known.sum().clamp(min=1)

    def smoothed(self, target: Tensor, outcomes: int) -> Tensor:
        """Targets moved towards indifference between so many outcomes."""
        return target * (1 - self.label_smoothing) + self.label_smoothing / outcomes

    # ---- answers -----------------------------------------------------------------------------------------------------

    def decode(self, output: WholeHeadOutput) -> Tensor:
        """Probabilities of the classes [B, K] or labels [B, T], or values [B] in the target's unit; float32."""
        return self.decode_logits(output.logits)

    def decode_logits(self, logits: Tensor) -> Tensor:
        """The same of logits [B, T']."""
        return self.sort.decode(logits.float(), self.mean, self.std)


def lesion_guidance(attention: Tensor, lesion: Tensor) -> Tensor:
    """-log of the attention on tokens that hold any lesion voxel, mean over the cases that have one in view; else 0.

    Args:
        attention: [B, V, x, y, z], sums to 1 over a case.
        lesion: [B, V, X, Y, Z] 1 in lesions, 0 outside, -1 where unknown, which adds nothing.
    """
    inside = F.adaptive_max_pool3d((lesion == 1).float(), attention.shape[2:])
    mass = (attention.float() * inside).flatten(1).sum(dim=1)
    there = inside.flatten(1).any(dim=1)
    # a floor that hardly any attention reaches: below it there is no gradient to find back to the lesion
    return (-mass.clamp(min=1e-30).log() * there).sum() / there.sum().clamp(min=1)


def _check(spec: TaskSpec) -> None:
    if spec.kind not in ("classification", "regression"):
        raise ConfigError(f"task.kind={spec.kind!r}: expected 'classification' or 'regression'")
    if not spec.contrasts or len(set(spec.contrasts)) != len(spec.contrasts):
        raise ConfigError(f"task.contrasts={list(spec.contrasts)}: expected one or more contrasts, each once")
    if spec.view_mm < 0 or (spec.view_mm == 0 and not spec.crops):
        raise ConfigError(f"task.view_mm={spec.view_mm:g}: expected a whole-head view (above 0 mm), or crops")
    if spec.kind == "classification" and spec.mode not in MODES:
        raise ConfigError(f"task.mode={spec.mode!r}: expected one of {', '.join(MODES)}")
    if spec.pooling not in POOLINGS:
        raise ConfigError(f"task.pooling={spec.pooling!r}: expected one of {', '.join(POOLINGS)}")
    sort_of(spec).check(spec)
