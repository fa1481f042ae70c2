"""Masked autoencoding: say what the hidden voxels hold."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.latents import Latents
from brainfm.objectives.losses import mean_of_valid, reconstruction
from brainfm.objectives.masking import draw_mask, hidden_blocks
from brainfm.objectives.objective import Objective
from brainfm.objectives.settings import MAESettings
from brainfm.specs import ViewSpec


class MAE(Objective):
    """One scan, cubic blocks hidden, reconstructed from the latents; only hidden voxels count.

    Args:
        backbone: trained; owned from here on.
        settings: see MAESettings.
        patch_vox: X, Y, Z.
        seed: of the masks.

    Source: He et al. 2022 (arXiv 2111.06377).
    Differs: a convolutional backbone sees zeros instead of dropping tokens, and the decoder has no skip connections.
    Raises: ConfigError for impossible values.
    """

    name = "mae"
    latents: Latents

    def __init__(
        self,
        backbone: Backbone,
        settings: MAESettings,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
    ) -> None:
        super().__init__(backbone, ViewSpec(patch_vox=patch_vox), seed, settings)
        self.settings = settings
        hidden_blocks(self.views.patch_vox, settings.mask_unit_vox, settings.mask_ratio)
        if settings.mask_unit_vox % backbone.cube_vox:
            unit, cube = settings.mask_unit_vox, backbone.cube_vox
            raise ConfigError(
                f"objective.mask_unit_vox={unit}: {backbone.config['name']} leaves out whole cubes of {cube} voxels, "
                f"and such blocks hide hardly one; expected a multiple of {cube}"
            )
        self.latents = Latents(backbone.widths, {"all": 1.0}, settings.latent_channels)
        self.decoder = decoder_for(backbone, 1, latent_channels=settings.latent_channels)

    def forward(self, batch: Batch, progress: float) -> Terms:
        """Batch.image [B, 1, X, Y, Z]; ``progress`` changes nothing here. Parts: ``hidden``."""
        image = batch.image.float()
        hidden = self._hidden(batch)
        loss, beta = self.settings.loss, self.settings.beta
        errors = reconstruction(self._reconstruct(image, hidden), image, loss, beta, where=hidden)
        total = mean_of_valid(errors)
        return Terms(total, {"hidden": total.detach()})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """``input``, ``masked`` (hidden voxels 0), ``self`` (the whole reconstruction)."""
        image = batch.image.float()
        hidden = self._hidden(batch)
        output = self._reconstruct(image, hidden).float()
        return {"input": image, "masked": image.masked_fill(hidden, 0), "self": output}

    def _hidden(self, batch: Batch) -> Tensor:
        shape, device = batch.image.shape[2:], batch.image.device
        unit, ratio = self.settings.mask_unit_vox, self.settings.mask_ratio
        return draw_mask(batch.sample, shape, unit, ratio, self.seed, "mask", device)

    def _reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        codes = self.latents(self.backbone.features_masked(image, hidden))
        return self.decoder(codes["all"].mean)
