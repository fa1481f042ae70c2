"""cross_contrast: two scans of one person, the anatomy of one in the contrast of the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.latents import Code, Latents, draw_noise
from brainfm.objectives.losses import (
    centred,
    cosine,
    kl_to_standard_normal,
    mean_of_valid,
    ramp,
    reconstruction,
    spread_floor,
)
from brainfm.objectives.masking import draw_mask, hidden_blocks
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import CrossContrastSettings
from brainfm.specs import ViewSpec


@dataclass(frozen=True)
class _Scans:
    """The scans of a batch that count: a of every sample [B, ...], b of the P samples that have a second scan."""

    a: Tensor
    hidden_a: Tensor
    b: Tensor
    hidden_b: Tensor
    partners: Tensor  # [P] int64 on the host: which samples the b belong to
    rows: Tensor  # the same where the scans are
    differing: Tensor  # [D] int64 there: those of the P whose a and b are not known to show the same contrast


@dataclass(frozen=True)
class _Outputs:
    """Reconstructions, each [V, 1, X, Y, Z] beside the scan it has to match."""

    self_a: Tensor
    self_b: Tensor
    cross_a: Tensor
    cross_b: Tensor


class CrossContrast(Objective):
    """Two scans a, b of one session on one grid, masked independently; A is the anatomy part of a latent, C the rest.

    self: D[A_a, C_a] -> a and D[A_b, C_b] -> b; cross: D[A_b, C_a] -> a and D[A_a, C_b] -> b; agreement
    1 - cos(A_a, A_b); separation: the cosine of the ``contrast`` parts where the contrasts differ; KL of all parts.
    A sample with one scan has only the self term and the KL of a. Each term is a mean over the samples it applies to.
    Parts beside ``anatomy`` and ``contrast`` travel with the contrast and meet no term but the KL.

    The published agreement and separation are cosines of sampled codes, as they are: noise satisfies the second, a
    large vector that all codes share the first. ``terms_on=means`` and ``centred`` close these ways.

    Args:
        backbone: trained; owned from here on.
        settings: see CrossContrastSettings. ``terms_on=means`` looks at what is used later; ``centred`` at codes less
            what all samples share at a cell (losses.centred), each beside a floor under the spread of its part, with
            the same weight: two pairs a step, or more, make the most of it. ``swap=published`` pairs D[A, C_b] -> a and
            D[A, C_a] -> b. Of a pair from two visits with the same contrast the anatomy alone counts.
        patch_vox: X, Y, Z.
        seed: of masks and latent noise.

    Source: github.com/jbanusco/fomo25 at de35782, src/models/self_supervised_crosspatch.py (arXiv 2601.13166).
    Differs: samples with one scan, and repeats of one contrast, are not pushed apart from themselves; the cross terms
    give a target its own contrast unless swap=published; hidden voxels are the foreground's mean, not the background.
    Raises: ConfigError for impossible values.
    """

    name = "cross_contrast"
    latents: Latents

    def __init__(
        self,
        backbone: Backbone,
        settings: CrossContrastSettings,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        super().__init__(backbone, ViewSpec(patch_vox=patch_vox, pairs=True, visits=settings.visits), seed, settings)
        self.settings = settings
        hidden_blocks(self.views.patch_vox, settings.mask_unit_vox, settings.mask_ratio)
        self.anatomy_from = settings.anatomy_from or ("mean" if settings.swap == "published" else "other")
        self.weights = {
            "self": settings.self_weight,
            "cross": settings.cross_weight,
            "agreement": settings.agreement_weight,
            "separation": settings.separation_weight,
            "anatomy_floor": settings.agreement_weight,
            "contrast_floor": settings.separation_weight,
            "kl": settings.kl_weight,
        }
        self.latents = Latents(
            backbone.widths, settings.parts, settings.latent_channels, settings.variational, settings.logvar_start
        )
        self.decoder = decoder_for(backbone, 1, latent_channels=settings.latent_channels)

    def forward(self, batch: Batch, progress: float) -> Terms:
        """The weighted sum; parts ``self``, ``cross``, ``agreement``, ``separation``, ``kl``, unweighted, and with
        centred codes ``anatomy_floor`` and ``contrast_floor``.

        Reads image, sample and, where there are any, partner, paired, same_contrast. A partner without ``paired``
        always counts; without ``same_contrast`` the contrasts are taken to differ.
        """
        scans = self._scans(batch)
        codes = self._encode(scans)
        values = self.latents.sample(codes, self._noise(batch, scans, codes) if self._noisy() else None)
        outputs = self._decode(values, scans)
        parts = self._terms(scans, codes, values, outputs)
        weights = self.weights | {"kl": self.weights["kl"] * ramp(progress, self.settings.kl_ramp)}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return Terms(total, {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``masked`` (hidden voxels 0) and ``self`` of scan a; ``partner`` (scan b) and ``cross`` (a made
        with b's anatomy, or as ``swap`` says), both zero where there is one scan."""
        scans = self._scans(batch)
        outputs = self._decode(self.latents.sample(self._encode(scans), None), scans)
        partner, cross = torch.zeros_like(scans.a), torch.zeros_like(scans.a)
        partner[scans.rows] = scans.b
        cross[scans.rows] = outputs.cross_a.float()
        masked = scans.a.masked_fill(scans.hidden_a, 0)
        return {"input": scans.a, "masked": masked, "self": outputs.self_a.float(), "partner": partner, "cross": cross}

    def _scans(self, batch: Batch) -> _Scans:
        device = batch.image.device
        partner = batch.image if batch.partner is None else batch.partner
        partners = torch.arange(len(batch) if batch.partner is not None else 0)
        if batch.partner is not None and batch.paired is not None:
            # Picked, not multiplied by 0: a partner that must not count costs nothing.
            partners = batch.paired.cpu().nonzero().squeeze(1)
        differing = torch.arange(len(partners))
        if batch.same_contrast is not None:
            differing = (~batch.same_contrast.cpu()[partners]).nonzero().squeeze(1)
        rows = partners.to(device, non_blocking=True)
        return _Scans(
            a=batch.image.float(),
            hidden_a=self._hidden(batch, batch.sample, "mask_a"),
            b=partner[rows].float(),
            hidden_b=self._hidden(batch, batch.sample.cpu()[partners], "mask_b"),
            partners=partners,
            rows=rows,
            differing=differing.to(device, non_blocking=True),
        )

    def _hidden(self, batch: Batch, samples: Tensor, purpose: str) -> Tensor:
        unit, ratio = self.settings.mask_unit_vox, self.settings.mask_ratio
        return draw_mask(samples, batch.image.shape[2:], unit, ratio, self.seed, purpose, batch.image.device)

    def _encode(self, scans: _Scans) -> dict[str, Code]:
        """Codes of [B + P] scans, the a first, in one pass."""
        images, hidden = torch.cat([scans.a, scans.b]), torch.cat([scans.hidden_a, scans.hidden_b])
        return self.latents(self.backbone.features_masked(images, hidden))

    def _noisy(self) -> bool:
        return self.training and self.latents.variational

    def _noise(self, batch: Batch, scans: _Scans, codes: Mapping[str, Code]) -> Tensor:
        shape = (self.latents.channels, *codes["anatomy"].mean.shape[2:])
        samples, device = (batch.sample, batch.sample.cpu()[scans.partners]), batch.image.device
        draws = [draw_noise(s, shape, self.seed, f"latent_{view}", device) for s, view in zip(samples, "ab")]
        return torch.cat(draws)

    def _decode(self, values: Mapping[str, Tensor], scans: _Scans) -> _Outputs:
        """All four reconstructions in one pass."""
        count = len(scans.a)
        every_a = {name: value[:count] for name, value in values.items()}
        a = {name: value[scans.rows] for name, value in every_a.items()}
        b = {name: value[count:] for name, value in values.items()}
        anatomy_for_a, anatomy_for_b = b["anatomy"], a["anatomy"]
        if self.anatomy_from == "mean":
            anatomy_for_a = anatomy_for_b = (a["anatomy"] + b["anatomy"]) / 2
        rest_for_a, rest_for_b = (a, b) if self.settings.swap == "standard" else (b, a)
        latents = torch.cat(
            [
                _join(every_a["anatomy"], every_a),
                _join(b["anatomy"], b),
                _join(anatomy_for_a, rest_for_a),
                _join(anatomy_for_b, rest_for_b),
            ]
        )
        pairs = len(scans.rows)
        return _Outputs(*self.decoder(latents).split([count, pairs, pairs, pairs]))

    def _terms(
        self, scans: _Scans, codes: Mapping[str, Code], values: Mapping[str, Tensor], outputs: _Outputs
    ) -> dict[str, Tensor]:
        count, rows = len(scans.a), scans.rows
        on_hidden = self.settings.loss_on == "hidden"
        hidden_a, hidden_b = (scans.hidden_a, scans.hidden_b) if on_hidden else (None, None)
        hidden_pa = scans.hidden_a[rows] if on_hidden else None

        def error(output: Tensor, target: Tensor, where: Tensor | None) -> Tensor:
            return mean_of_valid(reconstruction(output, target, "smooth_l1", self.settings.beta, where))

        a, b = scans.a, scans.b
        looked_at = values if self.settings.terms_on == "samples" else {name: code.mean for name, code in codes.items()}
        pairs = {name: (looked_at[name][:count][rows], looked_at[name][count:]) for name in ("anatomy", "contrast")}
        floors = {}
        if self.settings.centred:
            pairs = {name: centred(*pair) for name, pair in pairs.items()}
            floors = {f"{name}_floor": spread_floor(*pair) for name, pair in pairs.items()}
        apart = cosine(*pairs["contrast"])[scans.differing].clamp(min=self.settings.separation_floor)
        divergences = torch.stack([kl_to_standard_normal(code) for code in codes.values()]).sum(dim=0)
        return {
            "self": error(outputs.self_a, a, hidden_a) + error(outputs.self_b, b, hidden_b),
            "cross": error(outputs.cross_a, a[rows], hidden_pa) + error(outputs.cross_b, b, hidden_b),
            "agreement": mean_of_valid(1 - cosine(*pairs["anatomy"])),
            "separation": mean_of_valid(apart),
            **floors,
            "kl": mean_of_valid(divergences[:count]) + mean_of_valid(divergences[count:]),
        }


def _join(anatomy: Tensor, rest: Mapping[str, Tensor]) -> Tensor:
    """A latent [V, E, X, Y, Z] of one scan's anatomy and another's other parts, in the order of the parts."""
    return torch.cat([anatomy if name == "anatomy" else value for name, value in rest.items()], dim=1)
