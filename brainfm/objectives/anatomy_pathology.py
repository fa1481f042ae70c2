"""anatomy_pathology: a part of the code knows anatomy, one disease, a rest is free; together they reconstruct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import DenseHead, Pointwise, decoder_for
from brainfm.nets.latents import Latents
from brainfm.objectives.losses import (
    centred,
    cosine,
    mean_of_valid,
    mean_where,
    reconstruction,
    spread_floor,
)
from brainfm.objectives.masking import draw_mask, hidden_blocks
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import AnatomyPathologySettings
from brainfm.specs import ViewSpec

_DENSE = MappingProxyType({"anatomy": 32})  # channels of the skip decoder's last map


@dataclass(frozen=True)
class _PatchViews:
    """The scans of a batch: every image, then the partners of the samples that have one; V in all.

    Attributes:
        image, hidden: [V, 1, X, Y, Z] voxels, and bool where they may not be seen.
        rows: [V] int64, the sample each belongs to.
        partners: [P] int64, the samples whose partners are the last P of the V.
    """

    image: Tensor
    hidden: Tensor
    rows: Tensor
    partners: Tensor


class RegionDecoder(nn.Module):
    """The anatomy part to a label map, half as wide as the image's decoder: labels hold less detail than images."""

    def __init__(self, channels: int, backbone: Backbone, groups: int) -> None:
        super().__init__()
        self.decoder = decoder_for(backbone, groups, latent_channels=channels, narrower=2)

    def forward(self, code: Tensor) -> Tensor:
        """[V, E, x, y, z] -> logits [V, K, X, Y, Z]."""
        return self.decoder(code)


class VolumeHead(nn.Module):
    """The anatomy part, averaged over the patch, to the z-scored log volume fractions of a person's regions."""

    def __init__(self, channels: int, regions: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, regions))

    def forward(self, code: Tensor) -> Tensor:
        """[V, E, x, y, z] -> [V, R] float32."""
        return self.layers(code.flatten(2).mean(dim=2)).float()


class PathologyHead(nn.Module):
    """The pathology part to a logit for each cell of the coarsest grid; a patch is as ill as its worst cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(channels, 64, 1), nn.GELU(), nn.Conv3d(64, 1, 1))

    def forward(self, code: Tensor) -> tuple[Tensor, Tensor]:
        """[V, E, x, y, z] -> logits of the cells [V, 1, x, y, z] and of the patch [V], float32."""
        cells = self.layers(code).float()
        count = cells[0].numel()
        return cells, torch.logsumexp(cells.flatten(1), dim=1) - torch.log(torch.tensor(float(count)))


class AnatomyPathology(Objective):
    """Masked reconstruction from all parts; one part must show the subject's anatomy, one must find disease.

    The anatomical target belongs to the person, not to the scan: whatever contrast or visit is looked at, the label
    map (or, where there is none, the vector of region volumes) is the same. The pathology part must find lesions in
    what is visible of the patch, or tell the session's health. A missing target drops its term for that sample.

    Args:
        backbone: trained; owned from here on.
        settings: see AnatomyPathologySettings; ``groups`` and ``volumes`` of None are 0 (the trainer fills in what the
            data have before it builds). ``region_decoder=skip``: a decoder with skip connections on the backbone's
            maps, which teaches every level where borders are and travels in the file (``dense``, and ``regions`` in
            ``heads``); the anatomy part is asked what share of each of its cells a group has. ``light``: a decoder on
            the anatomy part alone, which cannot know of borders. ``centred`` looks at codes less what all samples share
            at a cell (losses.centred), which else satisfies the agreement, beside a floor under their spread, with the
            same weight.
        patch_vox: X, Y, Z.
        seed: of the masks.

    Source: the winner of SSL3D's ResEnc-L track as described in arXiv 2601.13166: shares .5/.3/.2 and weights
    .7/.15/.15 are theirs. Soft Dice: Milletari et al. 2016 (arXiv 1606.04797), equation 1.
    Differs: label maps or standardised log fractions in place of a cosine to raw volumes, which mostly asks for the
    average brain; lesions in the patch in place of a session's label alone; parts are projections of all levels, not
    slices of the last one.
    Raises: ConfigError for impossible values.
    """

    name = "anatomy_pathology"
    latents: Latents

    def __init__(
        self,
        backbone: Backbone,
        settings: AnatomyPathologySettings,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        groups, volumes = settings.groups or 0, settings.volumes or 0
        settings = replace(settings, groups=groups, volumes=volumes)
        views = ViewSpec(
            patch_vox,
            pairs=settings.agreement_weight > 0,
            visits=settings.visits,
            regions=settings.anatomy_weight > 0 and groups > 0,
            volumes=settings.anatomy_weight > 0 and volumes > 0,
            lesions=settings.pathology_weight > 0,
        )
        super().__init__(backbone, views, seed, settings)
        self.settings, self.weights, self.groups = settings, settings.weights, groups
        hidden_blocks(self.views.patch_vox, settings.mask_unit_vox, settings.mask_ratio)
        self.latents = Latents(backbone.widths, settings.parts, settings.latent_channels)
        self.decoder = decoder_for(backbone, 1, latent_channels=settings.latent_channels)
        sizes = self.latents.sizes
        self.region_decoder: RegionDecoder | None = None
        self.share_head: Pointwise | None = None
        if views.regions:
            self._add_regions(settings.region_decoder, groups)
        self.volume_head = VolumeHead(sizes["anatomy"], volumes) if views.volumes else None
        self.pathology_head = PathologyHead(sizes["pathology"]) if views.lesions else None

    def _add_regions(self, kind: str, groups: int) -> None:
        anatomy = self.latents.sizes["anatomy"]
        if kind == "light":
            self.region_decoder = RegionDecoder(anatomy, self.backbone, groups)
            return
        self.dense = decoder_for(self.backbone, _DENSE)
        names = [f"group_{number}" for number in range(groups)]
        self.heads = nn.ModuleDict({"regions": DenseHead("anatomy", _DENSE["anatomy"], names)})
        self.share_head = Pointwise(anatomy, groups)

    def forward(self, batch: Batch, progress: float) -> Terms:
        """Parts ``reconstruction``, ``regions``, ``shares``, ``volumes``, ``patch``, ``cells``, ``agreement``,
        ``anatomy_floor``, where they apply, unweighted."""
        views = self._views(batch)
        maps = self._maps(views)
        codes = self._codes(maps)
        parts = {"reconstruction": self._reconstruction(codes, views)}
        total = self.weights["reconstruction"] * parts["reconstruction"]
        for weight, terms in (
            (self.weights["anatomy"], self._anatomy(codes["anatomy"], maps, views, batch)),
            (self.weights["pathology"], self._pathology(codes["pathology"], views, batch)),
            (self.weights["agreement"], self._agreement(codes["anatomy"], views)),
        ):
            for name, term in terms.items():
                total = total + weight * term
                parts[name] = term
        return Terms(total, {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``masked``, ``self``, and where the data have label maps ``regions`` (the target) and
        ``predicted``, group indices as grey values."""
        views = self._views(batch)
        maps = self._maps(views)
        codes = self._codes(maps)
        count = len(batch)
        output = self.decoder(torch.cat(list(codes.values()), dim=1)).float()[:count]
        image = views.image[:count]
        pictures = {"input": image, "masked": image.masked_fill(views.hidden[:count], 0), "self": output}
        if self.views.regions and batch.regions is not None:
            low, width = image.amin(), image.amax() - image.amin()  # onto the grey values of the scans beside it
            step = width / max(1, self.groups - 1)
            logits = self._regions(codes["anatomy"][:count], [level[:count] for level in maps])
            predicted = logits.argmax(dim=1, keepdim=True)
            pictures["regions"] = low + step * batch.regions[:, None].clamp(min=0).float()
            pictures["predicted"] = low + step * predicted.float()
        return pictures

    def _views(self, batch: Batch) -> _PatchViews:
        device = batch.image.device
        count = len(batch)
        shape = batch.image.shape[2:]
        every = torch.arange(count, device=device)
        unit, ratio = self.settings.mask_unit_vox, self.settings.mask_ratio
        hidden = draw_mask(batch.sample, shape, unit, ratio, self.seed, "mask_a", device)
        if batch.partner is None or not self.views.pairs:
            return _PatchViews(batch.image.float(), hidden, every, every[:0])
        chosen = torch.arange(count) if batch.paired is None else batch.paired.cpu().nonzero().squeeze(1)
        samples, partners = batch.sample.cpu()[chosen], chosen.to(device, non_blocking=True)
        second = draw_mask(samples, shape, unit, ratio, self.seed, "mask_b", device)
        image = torch.cat([batch.image, batch.partner[partners]]).float()
        return _PatchViews(image, torch.cat([hidden, second]), torch.cat([every, partners]), partners)

    def _maps(self, views: _PatchViews) -> list[Tensor]:
        return self.backbone.features_masked(views.image, views.hidden)

    def _codes(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: code.mean for name, code in self.latents(maps).items()}

    def _reconstruction(self, codes: Mapping[str, Tensor], views: _PatchViews) -> Tensor:
        output = self.decoder(torch.cat(list(codes.values()), dim=1))
        loss, beta = self.settings.loss, self.settings.beta
        return mean_of_valid(reconstruction(output, views.image, loss, beta, where=views.hidden))

    def _regions(self, code: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Logits [V, K, X, Y, Z] of the groups."""
        if self.region_decoder is not None:
            return self.region_decoder(code)
        assert self.dense is not None and self.heads is not None
        logits: Tensor = self.heads["regions"](self.dense.split(self.dense(maps))["anatomy"])
        return logits

    def _anatomy(self, code: Tensor, maps: Sequence[Tensor], views: _PatchViews, batch: Batch) -> dict[str, Tensor]:
        """The heads answer for every scan, and only known targets count: no network is ever left without a gradient."""
        terms = {}
        mapped = torch.zeros(len(views.rows), dtype=torch.bool, device=code.device)
        if self.views.regions:
            target = _or_unknown(batch.regions, batch.image)[views.rows]
            mapped = (target >= 0).flatten(1).any(dim=1)
            if self.settings.regions_on == "visible":
                target = target.masked_fill(views.hidden[:, 0], -1)
            asked = (target >= 0).flatten(1).any(dim=1)
            terms["regions"] = mean_where(region_errors(self._regions(code, maps), target), asked)
            if self.share_head is not None:
                errors, known = share_errors(self.share_head(code), target)
                terms["shares"] = mean_where(errors, known)
        if self.volume_head is not None:
            found = self.volume_head(code)
            wanted = torch.full_like(found, torch.nan) if batch.volumes is None else batch.volumes[views.rows]
            known = ~wanted.isnan()
            errors = F.smooth_l1_loss(found, wanted.nan_to_num(0.0), reduction="none") * known
            errors = errors.sum(dim=1) / known.sum(dim=1).clamp(min=1)
            terms["volumes"] = mean_where(errors, known.any(dim=1) & ~mapped)
        return terms

    def _pathology(self, code: Tensor, views: _PatchViews, batch: Batch) -> dict[str, Tensor]:
        if self.pathology_head is None:
            return {}
        cells, patch = self.pathology_head(code)
        lesion = _or_unknown(batch.lesion, batch.image)[views.rows]
        wanted = torch.full_like(patch, torch.nan) if batch.pathology is None else batch.pathology[views.rows]
        if batch.interval_years is not None:  # another visit has lesions of its own, which nobody has told
            elsewhere = torch.zeros(len(views.rows), dtype=torch.bool, device=code.device)
            elsewhere[len(batch) :] = batch.interval_years[views.partners] != 0
            lesion = lesion.masked_fill(elsewhere[:, None, None, None], -1)
            wanted = wanted.masked_fill(elsewhere, torch.nan)
        lesion = lesion.masked_fill(views.hidden[:, 0], -1)  # what is hidden cannot be found
        seen = (lesion >= 0).flatten(1).any(dim=1)
        shown = (lesion == 1).flatten(1).any(dim=1)
        # Where lesions are mapped the map decides; a lesion that is wholly hidden makes the patch no question at all.
        wanted = torch.where(seen, torch.where(shown, 1.0, torch.where(wanted == 1, torch.nan, 0.0)), wanted)
        known = ~wanted.isnan()
        losses = F.binary_cross_entropy_with_logits(patch, wanted.nan_to_num(0.0), reduction="none")
        target = _coarse(lesion, cells.shape[2:])
        return {
            "patch": mean_where(losses, known),
            "cells": mean_where(balanced_errors(cells[:, 0], target), (target == 1).flatten(1).any(dim=1)),
        }

    def _agreement(self, anatomy: Tensor, views: _PatchViews) -> dict[str, Tensor]:
        if self.weights["agreement"] == 0:
            return {}
        count = len(anatomy) - len(views.partners)
        pair = anatomy[:count][views.partners], anatomy[count:]
        if not self.settings.centred:
            return {"agreement": mean_of_valid(1 - cosine(*pair))}
        pair = centred(*pair)
        return {"agreement": mean_of_valid(1 - cosine(*pair)), "anatomy_floor": spread_floor(*pair)}


def region_errors(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy plus 1 - soft Dice over the groups that occur, where the target is known: [V].

    Args:
        logits: [V, K, X, Y, Z].
        target: [V, X, Y, Z] int64 group indices; -1 where unknown.
    """
    logits, known = logits.float(), target >= 0
    place = target.clamp(min=0)
    entropy = F.cross_entropy(logits, place, reduction="none") * known
    entropy = entropy.flatten(1).sum(dim=1) / known.flatten(1).sum(dim=1).clamp(min=1)
    shares = logits.softmax(dim=1) * known[:, None]
    truth = torch.zeros_like(shares).scatter_(1, place[:, None], 1.0) * known[:, None]
    both, sizes = (shares * truth).flatten(2).sum(dim=2), (shares + truth).flatten(2).sum(dim=2)
    occurs = truth.flatten(2).any(dim=2)
    dice = torch.where(occurs, 2 * both / sizes.clamp(min=1e-6), 0.0).sum(dim=1) / occurs.sum(dim=1).clamp(min=1)
    return entropy + (1 - dice)


def share_errors(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """How far the shares of the groups in each cell are from the truth, as a divergence: [V], and where one is known.

    Args:
        logits: [V, K, x, y, z].
        target: [V, X, Y, Z] int64 group indices; -1 where unknown. A cell counts where more than half of it is known.
    """
    logits = logits.float()
    scale = [edge // cells for edge, cells in zip(target.shape[1:], logits.shape[2:], strict=True)]
    truth = torch.cat([F.avg_pool3d((target == k).float()[:, None], scale) for k in range(logits.shape[1])], dim=1)
    sizes = truth.sum(dim=1, keepdim=True)
    known = (sizes > 0.5)[:, 0].flatten(1)
    errors = F.kl_div(logits.log_softmax(dim=1), truth / sizes.clamp(min=1e-6), reduction="none").sum(dim=1).flatten(1)
    return (errors * known).sum(dim=1) / known.sum(dim=1).clamp(min=1), known.any(dim=1)


def balanced_errors(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy, ill and healthy cells weighing alike however many there are of each: [V].

    Args:
        logits: [V, x, y, z].
        target: [V, x, y, z] int8, 1, 0, or -1 where unknown.
    """
    losses = F.binary_cross_entropy_with_logits(logits, (target == 1).float(), reduction="none")
    means = []
    for value in (0, 1):
        there = target == value
        means.append((losses * there).flatten(1).sum(dim=1) / there.flatten(1).sum(dim=1).clamp(min=1))
    return (means[0] + means[1]) / 2


def _coarse(lesion: Tensor, grid: torch.Size) -> Tensor:
    """[V, X, Y, Z] of 1, 0, -1 -> [V, *grid]: 1 where a cell shows a lesion, 0 where it shows none, -1 where it cannot
    be known because half of it or more is hidden or unknown."""
    scale = [edge // cells for edge, cells in zip(lesion.shape[1:], grid, strict=True)]
    ill = F.max_pool3d((lesion == 1).float()[:, None], scale)[:, 0] > 0
    known = F.avg_pool3d((lesion >= 0).float()[:, None], scale)[:, 0] > 0.5
    return torch.where(ill, 1, torch.where(known, 0, -1)).to(torch.int8)


def _or_unknown(values: Tensor | None, image: Tensor) -> Tensor:
    """[B, X, Y, Z] of -1 where the loader gave nothing."""
    if values is not None:
        return values
    return torch.full((len(image), *image.shape[2:]), -1, dtype=torch.int64, device=image.device)
