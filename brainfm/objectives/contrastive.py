"""Contrastive objectives: two views of a person are alike, other people are not; alone, or beside reconstruction."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.latents import Latents
from brainfm.objectives.losses import mean_of_valid, mean_over_processes, reconstruction
from brainfm.objectives.masking import draw_mask, hidden_blocks
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import MAEContrastiveSettings
from brainfm.specs import ViewSpec


class Projector(nn.Module):
    """Pooled codes to unit vectors.

    Source: Chen et al. 2020, SimCLR (arXiv 2002.05709), section 4.2.
    Differs: layer norm for batch norm, because a batch of volumes is small and its samples must not see each other.
    """

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out, bias=False)
        )

    def forward(self, codes: Tensor) -> Tensor:
        """[V, E, X, Y, Z] -> [V, F] float32 of length 1."""
        return F.normalize(self.layers(codes.flatten(2).mean(dim=2)).float(), dim=1)


def info_nce(
    queries: Tensor, keys: Tensor, subjects: Tensor, all_subjects: Tensor, own: Tensor, temperature: float
) -> Tensor:
    """The loss of each query against its own key, other people's keys being the wrong answers: [V].

    Args:
        queries: [V, F] of length 1.
        keys: [W, F] of length 1, W >= V.
        subjects: [V] int64, whom each query shows.
        all_subjects: [W] int64, whom each key shows; -1 for an empty place, which never counts.
        own: [V] int64, the place of each query's own key.
        temperature: > 0.

    Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 4.
    Differs: further keys of the same person are neither right nor wrong; they are left out.
    """
    logits = queries @ keys.T / temperature
    excluded = (subjects[:, None] == all_subjects[None, :]) | (all_subjects[None, :] < 0)
    excluded = excluded.scatter(1, own[:, None], False)
    return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), own, reduction="none")


class MAEContrastive(Objective):
    """Masked reconstruction of two views, and their codes drawn together against those of other people.

    The second view is another scan of the subject (of this visit, or with ``visits`` of another one) near the same
    place, or another patch of the only scan. A pair of visits counts less the longer the time between them.

    Args:
        backbone: trained; owned from here on.
        settings: see MAEContrastiveSettings; blocks are hidden apart in both views.
        patch_vox: X, Y, Z.
        seed: of the masks.

    Source: SimCLR (arXiv 2002.05709) with the memory of Wang et al. 2020, XBM (arXiv 1912.06798); the sum with masked
    reconstruction as in the SSL3D challenge entries that led on classification (mean of both tasks).
    Differs: negatives are other people only; no momentum encoder.
    Raises: ConfigError for impossible values.
    """

    name = "mae+contrastive"
    latents: Latents

    def __init__(
        self,
        backbone: Backbone,
        settings: MAEContrastiveSettings,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        views = ViewSpec(patch_vox, pairs=True, visits=settings.visits, shift=settings.shift)
        super().__init__(backbone, views, seed, settings)
        self.settings = settings
        if settings.mask_ratio:
            hidden_blocks(self.views.patch_vox, settings.mask_unit_vox, settings.mask_ratio)
        self.weights = {"hidden": settings.reconstruction_weight, "contrast": settings.contrastive_weight}
        channels = settings.latent_channels
        self.latents = Latents(backbone.widths, settings.parts, channels)
        self.part = next(iter(settings.parts))
        decoded = settings.reconstruction_weight > 0
        self.decoder = decoder_for(backbone, 1, latent_channels=channels) if decoded else None
        projected = settings.projected_channels
        self.projector = Projector(self.latents.sizes[self.part], settings.hidden_channels, projected)
        self.register_buffer("queue_codes", torch.zeros(settings.queue, projected))
        self.register_buffer("queue_subjects", torch.full((settings.queue,), -1, dtype=torch.int64))
        self.register_buffer("queue_next", torch.zeros((), dtype=torch.int64))

    queue_codes: Tensor
    queue_subjects: Tensor
    queue_next: Tensor

    def forward(self, batch: Batch, progress: float) -> Terms:
        """Parts ``contrast``, ``hidden`` (with reconstruction) and ``rank1``: how often the own key is the nearest."""
        views, hidden = self._views(batch)
        codes = self._codes(views, hidden)
        parts = {}
        if self.decoder is not None:
            assert hidden is not None
            output = self.decoder(torch.cat(list(codes.values()), dim=1))
            loss, beta = self.settings.loss, self.settings.beta
            parts["hidden"] = mean_of_valid(reconstruction(output, views, loss, beta, where=hidden))
        parts["contrast"], rank1 = self._contrast(codes[self.part], batch)
        total = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return Terms(total, {name: part.detach() for name, part in parts.items()} | {"rank1": rank1})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``partner``, and with reconstruction ``masked`` and ``self``."""
        views, hidden = self._views(batch)
        first, second = views.chunk(2)
        pictures = {"input": first, "partner": second}
        if self.decoder is not None and hidden is not None:
            output = self.decoder(torch.cat(list(self._codes(views, hidden).values()), dim=1)).float()
            pictures |= {"masked": first.masked_fill(hidden[: len(first)], 0), "self": output[: len(first)]}
        return pictures

    def state_for_file(self) -> dict[str, Tensor]:
        """Without the queue: it holds codes of people, and is of no use after the run."""
        return {name: value for name, value in super().state_for_file().items() if not name.startswith("queue_")}

    def _views(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Both views of all samples [2B, 1, X, Y, Z], the first ones first, and what is hidden of them."""
        partner = batch.image if batch.partner is None else batch.partner
        views = torch.cat([batch.image, partner]).float()
        unit, ratio, shape = self.settings.mask_unit_vox, self.settings.mask_ratio, views.shape[2:]
        if not ratio:
            return views, None
        hidden = [
            draw_mask(batch.sample, shape, unit, ratio, self.seed, purpose, views.device)
            for purpose in ("mask_a", "mask_b")
        ]
        return views, torch.cat(hidden)

    def _codes(self, views: Tensor, hidden: Tensor | None) -> dict[str, Tensor]:
        maps = self.backbone.features(views) if hidden is None else self.backbone.features_masked(views, hidden)
        return {name: code.mean for name, code in self.latents(maps).items()}

    def _contrast(self, codes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of both directions and the share of queries whose own key is the nearest of all."""
        subjects = torch.arange(len(batch), device=codes.device) if batch.subject is None else batch.subject
        mine = self.projector(codes)
        keys, whose, first = _of_all_ranks(mine, torch.cat([subjects, subjects]))
        count = len(batch)
        place = torch.arange(2 * count, device=codes.device)
        partner = (place + count) % (2 * count) + first
        known = self.queue_codes.to(keys)
        losses = info_nce(
            mine,
            torch.cat([keys, known]),
            torch.cat([subjects, subjects]),
            torch.cat([whose, self.queue_subjects]),
            partner,
            self.settings.temperature,
        )
        weight = self._weight(batch)
        loss = mean_over_processes((losses * torch.cat([weight, weight])).sum(), 2 * weight.sum())
        with torch.no_grad():
            nearest = (mine @ keys.T).scatter(1, (place + first)[:, None], -torch.inf).argmax(dim=1)
            rank1 = (nearest == partner).float().mean()
            if self.training:
                self._remember(keys, whose)
        return loss, rank1

    def _weight(self, batch: Batch) -> Tensor:
        """[B], 1 within a visit and where the interval is not known."""
        tau = self.settings.interval_tau_years
        if tau is None or batch.interval_years is None:
            return torch.ones(len(batch), device=batch.image.device)
        return torch.exp(-batch.interval_years.abs().nan_to_num(0.0) / tau)

    def _remember(self, keys: Tensor, whose: Tensor) -> None:
        size = len(self.queue_codes)
        if size == 0:
            return
        keys, whose = keys[-size:], whose[-size:]
        places = (self.queue_next + torch.arange(len(keys), device=keys.device)) % size
        self.queue_codes[places] = keys.to(self.queue_codes)
        self.queue_subjects[places] = whose
        self.queue_next.copy_((self.queue_next + len(keys)) % size)


class Contrastive(MAEContrastive):
    """The contrast alone, unless its settings say otherwise; see MAEContrastive."""

    name = "contrastive"


def _of_all_ranks(codes: Tensor, subjects: Tensor) -> tuple[Tensor, Tensor, int]:
    """The codes of all processes with gradients to each, whom they show, and where this process's own begin."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return codes, subjects, 0
    from torch.distributed.nn.functional import all_gather

    whose = [torch.empty_like(subjects) for _ in range(dist.get_world_size())]
    dist.all_gather(whose, subjects)
    return torch.cat(all_gather(codes)), torch.cat(whose), dist.get_rank() * len(codes)
