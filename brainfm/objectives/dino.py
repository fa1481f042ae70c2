"""Self-distillation: what a teacher says of a large crop, its student says of other and smaller ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm import seeds
from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.objectives.crops import draw_crops
from brainfm.objectives.losses import mean_of_valid, mean_over_processes
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import DINOSettings
from brainfm.objectives.teacher import (
    Centre,
    PrototypeHead,
    Teacher,
    balanced,
    cosine_ramp,
    entropy_share,
    koleo,
)
from brainfm.specs import ViewSpec


class DINO(Objective):
    """DINOv2 in three dimensions: crops of one scan agree on prototypes, as a whole and cube by cube where hidden.

    Works with any backbone: what describes a crop is ``Backbone.summarised`` (a class token, or the mean of the
    coarsest map), and cubes are the voxels of the coarsest map.

    Args:
        backbone: trained, the student; owned from here on.
        settings: see DINOSettings.
        patch_vox: X, Y, Z, from which crops are cut.
        seed: of crops and masks.

    Source: DINOv2, Oquab et al. 2023 (arXiv 2304.07193); in 3D: 3DINO, Xu et al. 2025 (npj Digital Medicine), whose
    settings are the defaults but for ``prototypes``.
    Differs: fewer prototypes, for batches of a few scans; prototypes have no learned length; the same crops serve all
    terms; one scan of a visit, contrasts are no views of one another.
    Raises: ConfigError for impossible values.
    """

    name = "dino"

    def __init__(
        self, backbone: Backbone, settings: DINOSettings, *, patch_vox: tuple[int, int, int], seed: int
    ) -> None:
        super().__init__(backbone, ViewSpec(patch_vox=patch_vox), seed, settings)
        self.settings = settings
        stride = backbone.strides[-1]
        self.large_vox = settings.global_vox or self.views.patch_vox
        self.small_vox = settings.local_vox or tuple(max(2 * stride, p // 2 // stride * stride) for p in self.large_vox)
        for size in (self.large_vox, self.small_vox):
            backbone.check_patch(size)
        self._grid = tuple(edge // stride for edge in self.large_vox)
        width, sizes = backbone.widths[-1], (settings.hidden_channels, settings.bottleneck, settings.prototypes)
        self.head = PrototypeHead(width, *sizes)
        self.cube_head = PrototypeHead(width, *sizes) if settings.ibot_weight else None
        self.centre, self.cube_centre = Centre(settings.prototypes), Centre(settings.prototypes)
        self.teacher = Teacher(**self._students())

    def _students(self) -> dict[str, torch.nn.Module]:
        found: dict[str, torch.nn.Module] = {"backbone": self.backbone, "head": self.head}
        return found if self.cube_head is None else found | {"cube_head": self.cube_head}

    def forward(self, batch: Batch, progress: float) -> Terms:
        """Batch.image [B, 1, X, Y, Z]. Parts: ``dino``, ``ibot`` and ``koleo``, and of the teacher ``used`` (how evenly
        its prototypes are used, 1: all alike), ``sure`` (1 less the entropy of one answer over log K) and ``entropy``
        (of the prototypes, as ``used``, but before anything balances the answers: it falls to 0 in a collapse)."""
        if self.settings.koleo_weight and len(batch) < 2:
            raise ConfigError(
                f"objective.koleo_weight={self.settings.koleo_weight:g}: a batch's scans are spread apart, found one; "
                "expected trainer.batch_size=2 or more on each device, or objective.koleo_weight=0"
            )
        large, small = self._crops(batch)
        rows = self._hidden(batch)
        hidden = self._voxels(rows, large.device)
        temperature = self._temperature(progress)
        with torch.no_grad():
            maps, whole = self.teacher["backbone"].summarised(large)  # type: ignore[operator]
            scores = self.teacher["head"](whole)
            entropy = entropy_share(F.softmax(scores.float() / temperature, dim=-1))
            taught = self._shares(scores, self.centre, temperature)
        own_maps, own = self.backbone.summarised(large, hidden)
        said = [self.head(one) for one in own.chunk(2)]
        if small is not None:
            said += self.head(self.backbone.summarised(small)[1]).chunk(self.settings.local_crops)
        terms = {"dino": self._agreement(taught.chunk(2), said)}
        if self.cube_head is not None:
            terms["ibot"] = self._cubes(own_maps[-1], maps[-1], rows, temperature)
        if self.settings.koleo_weight:
            terms["koleo"] = torch.stack([koleo(one) for one in own.chunk(2)]).mean()
        weights = {"dino": 1.0, "ibot": self.settings.ibot_weight, "koleo": self.settings.koleo_weight}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        sure = 1 - torch.stack([entropy_share(row[None]) for row in taught]).mean()
        seen = {"used": entropy_share(taught), "sure": sure, "entropy": entropy}
        return Terms(total, {name: term.detach() for name, term in (terms | seen).items()})

    def after_step(self, progress: float) -> None:
        momentum = cosine_ramp(self.settings.momentum, 1.0, progress)
        self.teacher.follow(momentum, **self._students())

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``global``, the first large crop, and ``masked``, what the student sees of it."""
        large, _ = self._crops(batch)
        first = large[: len(batch)]
        hidden = self._voxels(self._hidden(batch)[: len(batch)], large.device)
        return {"input": batch.image.float(), "global": first, "masked": first.masked_fill(hidden, 0)}

    def state_for_file(self) -> dict[str, Tensor]:
        """Without the teacher, which the run's own average stands for, and the centres."""
        apart = ("teacher.", "centre.", "cube_centre.")
        return {name: value for name, value in super().state_for_file().items() if not name.startswith(apart)}

    def _crops(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Two large crops of every patch [2B, 1, ...], and small ones [local_crops * B, 1, ...]."""
        said, number = self.settings, self.settings.local_crops
        large = draw_crops(batch.image, batch.sample, 2, said.global_scale, self.large_vox, self.seed, "global crop")
        if not number:
            return large, None
        small = draw_crops(batch.image, batch.sample, number, said.local_scale, self.small_vox, self.seed, "local crop")
        return large, small

    def _hidden(self, batch: Batch) -> Tensor:
        """bool [2B, N] on the host: which cubes of the large crops; a share of the cubes in a share of the crops."""
        low, high = self.settings.mask_ratio
        rows = torch.zeros(2 * len(batch), math.prod(self._grid), dtype=torch.bool)
        for number, row in enumerate(rows):
            view, place = divmod(number, len(batch))
            generator = seeds.torch_stream(self.seed, "hidden cubes", int(batch.sample[place]), view)
            chance, share = torch.rand(2, generator=generator).tolist()
            if self.cube_head is not None and chance < self.settings.mask_share:
                count = min(len(row) - 1, max(1, round((low + (high - low) * share) * len(row))))
                row[torch.randperm(len(row), generator=generator)[:count]] = True
        return rows

    def _voxels(self, rows: Tensor, device: torch.device) -> Tensor:
        """The same as voxels of the crops, bool [2B, 1, X, Y, Z] on the device."""
        hidden = rows.to(device, non_blocking=True).view(-1, 1, *self._grid)
        for axis in (2, 3, 4):
            hidden = hidden.repeat_interleave(self.backbone.strides[-1], dim=axis)
        return hidden

    def _temperature(self, progress: float) -> float:
        start, end, warm = (
            self.settings.teacher_temperature_start,
            self.settings.teacher_temperature,
            self.settings.warm,
        )
        return end if progress >= warm else start + (end - start) * progress / warm

    def _shares(self, scores: Tensor, centre: Centre, temperature: float) -> Tensor:
        if self.settings.centring == "sinkhorn":
            return balanced(scores, temperature)
        return centre.shares(scores, temperature, learn=self.training)

    def _agreement(self, taught: tuple[Tensor, ...], said: list[Tensor]) -> Tensor:
        """Mean cross-entropy of every crop's answer with the teacher's of each other large crop."""
        answers = [F.log_softmax(one / self.settings.student_temperature, dim=-1) for one in said]
        losses = [
            -(target * answer).sum(-1)
            for view, target in enumerate(taught)
            for crop, answer in enumerate(answers)
            if crop != view
        ]
        return mean_of_valid(torch.cat(losses))

    def _cubes(self, own: Tensor, theirs: Tensor, rows: Tensor, temperature: float) -> Tensor:
        """Cross-entropy at the hidden cubes, each crop's mean, as in iBOT (Zhou et al. 2021, arXiv 2111.07832)."""
        assert self.cube_head is not None
        each = rows.sum(1)
        gone = rows.flatten().nonzero()[:, 0].to(own.device, non_blocking=True)
        weight = (1 / each.clamp(min=1))[:, None].expand_as(rows)[rows].to(own.device, non_blocking=True)
        crops = (each > 0).sum().to(own.device, non_blocking=True)
        with torch.no_grad():
            scores = self.teacher["cube_head"](theirs.movedim(1, -1).flatten(0, 3)[gone])
            target = self._shares(scores, self.cube_centre, temperature)
        said = self.cube_head(own.movedim(1, -1).flatten(0, 3)[gone])
        answer = F.log_softmax(said / self.settings.student_temperature, dim=-1)
        return mean_over_processes(-(target * answer).sum(-1).mul(weight).sum(), crops)
