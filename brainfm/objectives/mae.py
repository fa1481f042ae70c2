"""Masked autoencoding: say what the hidden voxels hold."""

from __future__ import annotations

import torch
from torch import Tensor

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.latents import Latents
from brainfm.objectives.losses import RECONSTRUCTIONS, mean_of_valid, reconstruction
from brainfm.objectives.masking import draw_mask, hidden_blocks
from brainfm.objectives.objective import Objective
from brainfm.specs import ViewSpec


class MAE(Objective):
    """One scan, cubic blocks hidden, reconstructed from the latents; only hidden voxels count.

    Args:
        backbone: trained; owned from here on.
        patch_vox: X, Y, Z.
        seed: of the masks.
        mask_unit_vox: edge length of a hidden block.
        mask_ratio: share of the blocks that is hidden.
        loss: ``mse`` or ``smooth_l1``.
        beta: of smooth_l1, in units of the standardised intensity.
        latent_channels: between backbone and decoder.

    Source: He et al. 2022 (arXiv 2111.06377).
    Differs: a convolutional backbone sees zeros instead of dropping tokens, and the decoder has no skip connections.
    Raises: ConfigError for impossible values.
    """

    name = "mae"
    latents: Latents

    def __init__(
        self,
        backbone: Backbone,
        *,
        patch_vox: tuple[int, int, int],
        seed: int,
        mask_unit_vox: int = 4,
        mask_ratio: float = 0.6,
        loss: str = "mse",
        beta: float = 0.1,
        latent_channels: int = 512,
    ) -> None:
        config = {
            "mask_unit_vox": mask_unit_vox,
            "mask_ratio": mask_ratio,
            "loss": loss,
            "beta": beta,
            "latent_channels": latent_channels,
        }
        super().__init__(backbone, ViewSpec(patch_vox=patch_vox), seed, config)
        hidden_blocks(self.views.patch_vox, mask_unit_vox, mask_ratio)
        if loss not in RECONSTRUCTIONS:
            raise ConfigError(f"objective.loss={loss!r}: expected one of {', '.join(RECONSTRUCTIONS)}")
        if beta <= 0:
            raise ConfigError(f"objective.beta={beta}: expected more than 0")
        self.mask_unit_vox, self.mask_ratio = mask_unit_vox, mask_ratio
        self.loss, self.beta = loss, beta
        self.latents = Latents(backbone.widths, {"all": 1.0}, latent_channels)
        self.decoder = decoder_for(backbone, 1, latent_channels=latent_channels)

    def forward(self, batch: Batch, progress: float) -> Terms:
        """Batch.image [B, 1, X, Y, Z]; ``progress`` changes nothing here. Parts: ``hidden``."""
        image = batch.image.float()
        hidden = self._hidden(batch)
        errors = reconstruction(self._reconstruct(image, hidden), image, self.loss, self.beta, where=hidden)
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
        return draw_mask(batch.sample, shape, self.mask_unit_vox, self.mask_ratio, self.seed, "mask", device)

    def _reconstruct(self, image: Tensor, hidden: Tensor) -> Tensor:
        codes = self.latents(self.backbone.features_masked(image, hidden))
        return self.decoder(codes["all"].mean)
