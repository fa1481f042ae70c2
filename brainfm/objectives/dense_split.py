"""dense_split: anatomy at every voxel, one small code for the contrast; encoder and skip decoder learn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm import seeds
from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead, Pointwise, decoder_for
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import DenseSplitSettings
from brainfm.specs import ViewSpec

_MIRRORED_MM = 8.0  # of a place's mirror image that is no wrong answer
_ON_FLOOR = 1e-3  # a voxel this near to the smallest value is air


@dataclass(frozen=True)
class _Views:
    """Both views of a batch, one after the other: V = 2 B, the a first; V = B where there is no partner."""

    image: Tensor  # [V, 1, X, Y, Z] float32
    hidden: Tensor  # [V, 1, X, Y, Z] bool
    regions: Tensor  # [V, X, Y, Z] int64, -1 unknown
    lesion: Tensor  # [V, X, Y, Z] int8, -1 unknown
    corners: Tensor  # [B, 2, 3] int64 on the host


class ContrastCode(nn.Module):
    """What a scan's contrast is, as a few numbers of the whole view: a mean over voxels of what intensity goes with
    what anatomy. A mean over all voxels cannot hold where things are.

    Args:
        channels: of the dense map it is read with; its gradient stops there.
        code: E, at most 16 is meant.

    Source: one global code a contrast as in Zuo et al. 2021, CALAMITI (NeuroImage 243:118569).
    """

    def __init__(self, channels: int, code: int, hidden: int = 32) -> None:
        super().__init__()
        self.meet = Pointwise(channels + 1, hidden)
        self.out = nn.Linear(2 * hidden, code)

    def forward(self, dense: Tensor, image: Tensor) -> Tensor:
        """[V, E, X, Y, Z] and [V, 1, X, Y, Z] -> [V, code] float32."""
        met = F.leaky_relu(self.meet(torch.cat([dense.detach(), image.to(dense.dtype)], dim=1))).float()
        moments = torch.cat([met.mean(dim=(2, 3, 4)), met.square().mean(dim=(2, 3, 4)).clamp(min=1e-6).sqrt()], dim=1)
        code: Tensor = self.out(moments.to(self.out.weight.dtype))
        return code.float()


class Recolour(nn.Module):
    """Anatomy and a contrast code to intensities, voxel by voxel: contrast is a map from tissue to intensity.

    Args:
        channels: of the anatomy.
        code: numbers of a contrast code.
        hidden: features between.

    Source: feature-wise modulation: Perez et al. 2018, FiLM (arXiv 1709.07871).
    """

    def __init__(self, channels: int, code: int, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.second, self.out = Pointwise(channels, hidden), Pointwise(hidden, hidden), Pointwise(hidden, 1)
        self.film = nn.Linear(code, 4 * hidden)

    def forward(self, anatomy: Tensor, code: Tensor) -> Tensor:
        """[V, E, X, Y, Z] and [V, code] -> [V, 1, X, Y, Z]."""
        a, b, c, d = (m[..., None, None, None] for m in self.film(code.to(self.film.weight.dtype)).chunk(4, dim=1))
        features = F.leaky_relu(self.first(anatomy) * (1 + a) + b)
        features = F.leaky_relu(self.second(features) * (1 + c) + d)
        recoloured: Tensor = self.out(features)
        return recoloured


class DenseSplit(Objective):
    """Two views of a head, each at its own corner: both tell the anatomy, and each can be redrawn in the other's look.

    (a) ``regions``: anatomy -> label map, cross-entropy and Dice; merged labels are met by any of their classes.
    (b) ``match``: the anatomy of a voxel is nearest to that of the same place in the other view, among others.
    (c) ``self``, ``cross``: anatomy of a view and the contrast code of the same or the other view -> that view, over
        the place that both show; the code is taken from the view's own picture, which hides nothing.
    (d) ``lesion``: pathology -> lesions, inserted or real.
    (e) ``volumes``: whole heads: coarsest features -> z-scored log shares of the brain's regions.

    Args:
        backbone: trained; owned from here on.
        settings: see DenseSplitSettings; ``classes``, ``merged`` and ``volumes`` of None are none (the trainer fills in
            what the data have), ``merged`` holds the places of a merged label's classes. Every ``stride``-th voxel
            along each axis is what (a), (c) and (d) look at, from a random phase in every sample: neighbours say much
            the same, and a CPU has little time.
        patch_vox: X, Y, Z.
        seed: of masks and of the voxels that are matched.

    Source: SynthSeg (arXiv 2107.09559) for (a), anatomix (arXiv 2411.02372) and supervised InfoNCE (van den Oord et al.
    2018, arXiv 1807.03748) for (b), FOMO25's winner (arXiv 2601.13166) for (c), the SSL3D winner's idea for (d).
    Differs: negatives exclude the same structure and its mirror image; the contrast is global.
    Raises: ConfigError for impossible values.
    """

    name = "dense_split"
    dense: DenseDecoder
    heads: nn.ModuleDict

    def __init__(
        self,
        backbone: Backbone,
        settings: DenseSplitSettings,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        classes, merged, volumes = settings.classes or (), settings.merged or (), settings.volumes or 0
        settings = replace(settings, classes=classes, merged=merged, volumes=volumes)
        stride, parts = settings.stride, settings.parts
        if stride < 1 or any(edge % stride for edge in patch_vox):
            raise ConfigError(f"objective.stride={stride}: expected a divisor of every edge of the patch {patch_vox}")
        lesions = settings.lesion_weight > 0
        views = ViewSpec(
            patch_vox, pairs=True, regions=bool(classes), volumes=bool(volumes), lesions=lesions, windows=True
        )
        super().__init__(backbone, views, seed, settings)
        self.settings, self.weights, self.stride, self.classes = settings, settings.weights, stride, classes
        self.merged = [list(of) for of in merged]
        self.dense = decoder_for(backbone, parts)
        heads: dict[str, nn.Module] = {"lesion": DenseHead("pathology", parts["pathology"], ("lesion",))}
        if classes:
            heads["regions"] = DenseHead("anatomy", parts["anatomy"], classes)
        self.heads = nn.ModuleDict(heads)
        self.code = ContrastCode(sum(parts.values()), settings.code)
        self.recolour = Recolour(parts["anatomy"], settings.code)
        self.volume_head = nn.Linear(2 * backbone.widths[-1], volumes) if volumes else None

    def forward(self, batch: Batch, progress: float) -> Terms:
        """``progress`` changes nothing. Parts, unweighted: ``regions``, ``match``, ``self``, ``cross``, ``lesion``,
        ``volumes``; and ``match_right``, how many matched voxels found their place."""
        views = self._views(batch)
        maps = self.backbone.features_masked(views.image, views.hidden)
        features = self.dense.climb(maps)[-1]
        phases = self._phases(batch, views)
        some = self._thinned(views, phases)
        dense = self.dense.out(thin(features, phases, self.stride))
        split = self.dense.split(dense)
        parts: dict[str, Tensor] = {}
        if "regions" in self.heads and self.weights["regions"]:
            parts["regions"] = region_errors(self.heads["regions"](split["anatomy"]), some.regions, self.merged)
        if self.weights["match"] and self.settings.points:
            parts["match"], right = self._match(features, views, batch)
        if self.weights["self"] or self.weights["cross"]:
            parts["self"], parts["cross"] = self._recolour(dense, split["anatomy"], some)
        if self.weights["lesion"]:
            seen = some.lesion.masked_fill(some.hidden[:, 0], -1)
            parts["lesion"] = lesion_errors(self.heads["lesion"](split["pathology"])[:, 0], seen).mean()
        if self.volume_head is not None and self.weights["volumes"]:
            parts["volumes"] = self._volumes(maps[-1], batch)
        total = torch.stack([self.weights[name] * term for name, term in parts.items()]).sum()
        shown = {name: term.detach() for name, term in parts.items()}
        if "match" in parts:
            shown["match_right"] = right
        return Terms(total, shown)

    def predict_regions(self, image: Tensor) -> Tensor:
        """[B, 1, X, Y, Z] -> logits of the fine classes [B, K, X, Y, Z]. Raises: ConfigError without a regions head."""
        if "regions" not in self.heads:
            raise ConfigError("this dense_split was trained without label maps, expected a regions head")
        anatomy = self.dense.split(self.dense(self.backbone.features(image)))["anatomy"]
        logits: Tensor = self.heads["regions"](anatomy)
        return logits

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """``anatomy``, ``pathology``, ... at the resolution of the image, ``contrast`` [B, code, 1, 1, 1]."""
        dense = self.dense(self.backbone.features(image))
        parts = {name: part.float() for name, part in self.dense.split(dense).items()}
        return {**parts, "contrast": self.code(dense, image)[..., None, None, None]}

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``masked``, ``partner``, ``self``, ``cross`` (the input's anatomy in the partner's look), and with
        label maps ``regions`` and ``predicted`` as grey values."""
        views = self._views(batch)
        count = len(batch)
        dense = self.dense(self.backbone.features_masked(views.image, views.hidden))
        anatomy = self.dense.split(dense)["anatomy"]
        codes = self.code(dense, views.image)
        image, partner = views.image[:count], views.image[count:]
        pictures = {
            "input": image, "masked": image.masked_fill(views.hidden[:count], 0), "partner": partner,
            "self": self.recolour(anatomy[:count], codes[:count]).float(),
            "cross": self.recolour(anatomy[:count], codes[count:]).float(),
        }  # fmt: skip
        if "regions" in self.heads:
            low, step = image.amin(), (image.amax() - image.amin()) / max(1, len(self.classes) - 1)
            predicted = self.heads["regions"](anatomy[:count]).argmax(dim=1, keepdim=True)
            pictures["regions"] = low + step * views.regions[:count, None].clamp(min=0).float()
            pictures["predicted"] = low + step * predicted.float()
        return pictures

    # ---- the terms -------------------------------------------------------------------------------------------------

    def _views(self, batch: Batch) -> _Views:
        image = batch.image if batch.partner is None else torch.cat([batch.image, batch.partner])
        device, shape, times = image.device, image.shape[2:], len(image) // len(batch)
        unit, ratio, share = self.settings.mask_unit_vox, self.settings.mask_ratio, self.settings.mask_share
        hidden = []
        for purpose in ("mask_a", "mask_b")[:times]:
            drawn = draw_mask(batch.sample, shape, unit, ratio, self.seed, purpose, device)
            some = [seeds.stream(self.seed, f"{purpose} or not", n).random() < share for n in batch.sample.tolist()]
            hidden.append(drawn & torch.tensor(some).to(device, non_blocking=True)[:, None, None, None, None])
        unknown = torch.full((len(batch), *shape), -1, dtype=torch.int64, device=device)

        def both(one: Tensor | None, other: Tensor | None) -> Tensor:
            return torch.cat([unknown if value is None else value.long() for value in (one, other)[:times]])

        corners = torch.zeros(len(batch), 2, 3, dtype=torch.int64) if batch.corners is None else batch.corners.cpu()
        regions, lesion = both(batch.regions, batch.partner_regions), both(batch.lesion, batch.partner_lesion)
        return _Views(image.float(), torch.cat(hidden), regions, lesion.to(torch.int8), corners)

    def _phases(self, batch: Batch, views: _Views) -> list[tuple[int, int, int]]:
        """Where the lattice of looked-at voxels begins in each view: drawn for a, and the same places in b."""
        first, second = [], []
        for number, corners in zip(batch.sample.tolist(), views.corners, strict=True):
            drawn = seeds.stream(self.seed, "phase", number).integers(0, self.stride, 3)
            first.append((int(drawn[0]), int(drawn[1]), int(drawn[2])))
            x, y, z = ((int(at) + int(step)) % self.stride for at, step in zip(drawn, corners[0] - corners[1]))
            second.append((x, y, z))
        return first if len(views.image) == len(batch) else first + second

    def _thinned(self, views: _Views, phases: list[tuple[int, int, int]]) -> _Views:
        """The voxels of the lattices, and the corners counted in its steps."""
        count, stride = len(views.corners), self.stride
        corners = views.corners.clone()
        if len(views.image) > count:
            starts = torch.tensor(phases).reshape(2, count, 3)
            steps = (starts[0] + views.corners[:, 0] - views.corners[:, 1] - starts[1]) // stride
            corners = torch.stack([steps.clamp(min=0), (-steps).clamp(min=0)], dim=1)
        return _Views(
            thin(views.image, phases, stride),
            thin(views.hidden, phases, stride),
            thin(views.regions, phases, stride),
            thin(views.lesion, phases, stride),
            corners,
        )

    def _match(self, features: Tensor, views: _Views, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean over the samples of matching_errors, and of the share that is right; 0 without second views."""
        if batch.partner is None:
            return features.sum() * 0, features.new_zeros(())
        count, shape = len(batch), features.shape[2:]
        losses, rights = [], []
        for b, number in enumerate(batch.sample.tolist()):
            corners, voxel_mm = views.corners[b], 1.0 if batch.voxel_mm is None else float(batch.voxel_mm[b])
            generator = seeds.torch_stream(self.seed, "points", number, device=features.device)
            one, other = overlap_points(views.image[b, 0], views.regions[b], corners, self.settings.points, generator)
            codes = []
            for view, voxels in ((b, one), (count + b, other)):
                at = features[view].flatten(1)[:, flat_index(voxels, shape)]
                codes.append(self.dense.split(self.dense.out(at[None, :, :, None, None]))["anatomy"][0, :, :, 0, 0].t())
            loss, right = matching_errors(
                codes[0], codes[1], views.regions[b].flatten()[flat_index(one, shape)], one.float() * voxel_mm,
                temperature=self.settings.temperature, apart_mm=self.settings.apart_mm,
                width_mm=(shape[0] - 1) * voxel_mm,
            )  # fmt: skip
            losses.append(loss)
            rights.append(right)
        return torch.stack(losses).mean(), torch.stack(rights).mean()

    def _recolour(self, dense: Tensor, anatomy: Tensor, views: _Views) -> tuple[Tensor, Tensor]:
        """Errors of a view redrawn with its own code, and of its anatomy redrawn in the other's look, where both see
        the place, against the other."""
        count = len(views.corners)
        codes = self.code(dense, views.image)
        same = F.smooth_l1_loss(self.recolour(anatomy, codes).float(), views.image, beta=0.1)
        if not self.weights["cross"] or len(views.image) == count:
            return same, same.new_zeros(())
        errors = []
        for b in range(count):
            mine, its = overlap(views.corners[b], anatomy.shape[2:])
            for source, target, seen, wanted in ((b, count + b, mine, its), (count + b, b, its, mine)):
                part = anatomy[source : source + 1][(slice(None), slice(None), *seen)]
                redrawn = self.recolour(part.contiguous(), codes[target : target + 1]).float()
                truth = views.image[target : target + 1][(slice(None), slice(None), *wanted)]
                errors.append(F.smooth_l1_loss(redrawn, truth, beta=0.1))
        return same, torch.stack(errors).mean()

    def _volumes(self, coarsest: Tensor, batch: Batch) -> Tensor:
        assert self.volume_head is not None
        flat = coarsest.float().flatten(2)
        moments = torch.cat([flat.mean(dim=2), flat.var(dim=2, correction=0).clamp(min=1e-6).sqrt()], dim=1)
        found = self.volume_head(moments).float()
        if batch.volumes is None:
            return found.sum() * 0
        wanted = batch.volumes.repeat(len(found) // len(batch.volumes), 1)
        known = ~wanted.isnan()
        errors = F.smooth_l1_loss(found, wanted.nan_to_num(0.0), reduction="none") * known
        return errors.sum() / known.sum().clamp(min=1)


def thin(values: Tensor, phases: Sequence[tuple[int, int, int]], stride: int) -> Tensor:
    """Every ``stride``-th voxel along each axis, from a phase of each row's own: [V, ..., X, Y, Z] with edges that are
    multiples of the stride -> [V, ..., X/s, Y/s, Z/s]."""
    if stride == 1:
        return values
    return torch.stack([row[..., x::stride, y::stride, z::stride] for row, (x, y, z) in zip(values, phases)])


def region_errors(logits: Tensor, target: Tensor, merged: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy plus 1 - soft Dice, over known voxels and the targets that occur in a view; a scalar.

    A target from K on is merged: the probability of its classes counts together. Views without any known voxel count
    nothing.

    Args:
        logits: [V, K, X, Y, Z].
        target: [V, X, Y, Z] int64 in 0..K + len(merged) - 1, -1 where unknown.
        merged: for each merged target the places of its classes.

    Source: Dice: Milletari et al. 2016 (arXiv 1606.04797), equation 1; merged labels: Fidon et al. 2021
    (arXiv 2107.03846), marginalised.
    """
    count, classes = logits.shape[:2]
    log_p = F.log_softmax(logits.float().flatten(2), dim=1)  # [V, K, N]
    extra = [torch.logsumexp(log_p[:, list(of)], dim=1, keepdim=True) for of in merged]
    log_p = torch.cat([log_p, *extra], dim=1) if extra else log_p
    place = target.flatten(1)
    known = place >= 0
    safe = place.clamp(min=0)
    own = log_p.gather(1, safe[:, None])[:, 0] * known
    entropy = -own.sum(dim=1) / known.sum(dim=1).clamp(min=1)
    kinds = classes + len(merged)
    zeros = log_p.new_zeros(count, kinds)
    sizes = zeros.scatter_add(1, safe, known.float())
    both = zeros.scatter_add(1, safe, own.exp() * known)
    claimed = (log_p.exp() * known[:, None]).sum(dim=2)
    occurs = sizes > 0
    dice = torch.where(occurs, (2 * both + 1) / (sizes + claimed + 1), 0.0).sum(dim=1)
    dice = dice / occurs.sum(dim=1).clamp(min=1)
    valid = known.any(dim=1)
    return torch.where(valid, entropy + 1 - dice, 0.0).sum() / valid.sum().clamp(min=1)


def matching_errors(
    one: Tensor,
    other: Tensor,
    label: Tensor,
    place_mm: Tensor,
    *,
    temperature: float,
    apart_mm: float,
    width_mm: float,
) -> tuple[Tensor, Tensor]:
    """InfoNCE between N voxels of two views, both ways: (mean loss, share of voxels whose nearest is their own).

    Features are centred over the voxels of both views before they are compared: what all voxels share tells nothing.
    Wrong answers are all other voxels but those of the same known label, those nearer than ``apart_mm``, and those
    nearer than that to the mirror image about the middle of the view, which may be the other side of the same place.

    Args:
        one, other: [N, E] features of the same N places.
        label: [N] int64, -1 where unknown.
        place_mm: [N, 3].
        width_mm: from the first voxel of the view to the last along X.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4.
    """
    one, other = one.float(), other.float()
    centre = torch.cat([one, other]).mean(dim=0)
    one, other = F.normalize(one - centre, dim=1, eps=1e-6), F.normalize(other - centre, dim=1, eps=1e-6)
    near = torch.cdist(place_mm, place_mm) < apart_mm
    mirrored = place_mm * place_mm.new_tensor([-1.0, 1.0, 1.0]) + place_mm.new_tensor([width_mm, 0.0, 0.0])
    near = near | (torch.cdist(place_mm, mirrored) < _MIRRORED_MM)
    alike = (label[:, None] == label[None]) & (label >= 0)[:, None]
    own = torch.eye(len(one), dtype=torch.bool, device=one.device)
    left_out = (near | alike) & ~own
    logits = (one @ other.t() / temperature).masked_fill(left_out, -torch.inf)
    wanted = torch.arange(len(one), device=one.device)
    loss = (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.t(), wanted)) / 2
    best = logits.max(dim=1).values
    ties = (logits >= best[:, None]).sum(dim=1)
    right = ((logits.diagonal() >= best) / ties).mean()  # a tie with n others is right once in n
    return loss, right.detach()


def overlap(corners: Tensor, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The boxes of two views that show one place: where each begins in a common window is [2, 3] ``corners``."""
    first, second = [], []
    for a, b, edge in zip(corners[0].tolist(), corners[1].tolist(), shape, strict=True):
        low, high = max(a, b), min(a, b) + edge
        first.append(slice(low - a, high - a))
        second.append(slice(low - b, high - b))
    return tuple(first), tuple(second)


def overlap_points(
    image: Tensor, label: Tensor, corners: Tensor, points: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Voxels of two views that show the same places, drawn on the device without asking it: [N, 3] int64 twice.

    Every label in the overlap is drawn as often as any other, whatever its size; the unknown is one more label. Air,
    which has no place, is not drawn.

    Args:
        image, label: [X, Y, Z] of the first view; air is the image's smallest value.
        corners: [2, 3] int64 on the host.
        points: N.
    """
    mine, _ = overlap(corners, image.shape)
    low = torch.tensor([part.start for part in mine]).to(image.device, non_blocking=True)
    seen, kind = image[mine], (label[mine] + 1).flatten()
    sizes = image.new_zeros(256).scatter_add(0, kind, torch.ones_like(kind, dtype=image.dtype))
    shown = (seen > image.amin() + _ON_FLOOR).flatten()
    chances = shown / sizes[kind].clamp(min=1) + 1e-9
    drawn = torch.multinomial(chances, points, replacement=True, generator=generator)
    _, y, z = seen.shape
    one = low + torch.stack([drawn // (y * z), drawn // z % y, drawn % z], dim=1)
    return one, one + (corners[0] - corners[1]).to(image.device, non_blocking=True)


def flat_index(voxels: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, 3] voxels to places in a flattened [X, Y, Z]."""
    return (voxels[:, 0] * shape[1] + voxels[:, 1]) * shape[2] + voxels[:, 2]


def lesion_errors(logits: Tensor, target: Tensor) -> Tensor:
    """Balanced binary cross-entropy plus, where a lesion is in view, 1 - soft Dice: [V]; 0 where nothing is known.

    Lesioned and other voxels weigh alike however many there are of each.

    Args:
        logits: [V, X, Y, Z].
        target: the same, int8: 1, 0, or -1 where unknown.
    """
    logits = logits.float()
    wanted, known = (target == 1).float(), target >= 0
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    ill, well = wanted.flatten(1), (known & (target != 1)).flatten(1).float()
    losses = losses.flatten(1)
    shown = ill.sum(dim=1) > 0
    on_ill = (losses * ill).sum(dim=1) / ill.sum(dim=1).clamp(min=1)
    on_well = (losses * well).sum(dim=1) / well.sum(dim=1).clamp(min=1)
    p = logits.sigmoid().flatten(1) * known.flatten(1)
    dice = (2 * (p * ill).sum(dim=1) + 1) / (p.sum(dim=1) + ill.sum(dim=1) + 1)
    return torch.where(shown, (on_ill + on_well) / 2 + (1 - dice), on_well)
