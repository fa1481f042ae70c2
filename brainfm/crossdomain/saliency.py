"""Grad-CAM of image classifiers: a map a finding, several models' maps as one, and what share lies in a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.crossdomain.networks import Classifier


def grad_cam(model: Classifier, images: Tensor, column: int) -> np.ndarray:
    """float32 [B, H, W] from 0 to 1: what speaks for the finding in each image; all 0 where nothing does.

    Args:
        images: as the network reads them, [B, C, H, W].
        column: of the answers.

    Source: Selvaraju et al. 2017 (arXiv 1610.02391), on the deepest map.
    """
    model.eval()
    with torch.enable_grad():
        maps = model.network.maps(images)
        logits = model.head(model.network.pooled(maps))
        (slope,) = torch.autograd.grad(logits[:, column].sum(), maps[-1])
    weighted = (slope.mean((2, 3), keepdim=True) * maps[-1]).sum(1, keepdim=True).relu().detach()
    large = F.interpolate(weighted, images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    highest = large.amax((1, 2), keepdim=True)
    found: np.ndarray = torch.where(highest > 0, large / highest.clamp_min(1e-12), 0.0).float().cpu().numpy()
    return found


def agreeing(maps: Sequence[np.ndarray], probabilities: Sequence[float], threshold: float = 0.5) -> np.ndarray | None:
    """The mean of the maps [H, W] of the models that decide as the mean of all does; None where none does.

    Source: Giacomello et al. 2021 (IJCNN): maps of models that disagree are not mixed.
    """
    decision = float(np.mean(probabilities)) >= threshold
    kept = [each for each, p in zip(maps, probabilities) if (p >= threshold) == decision]
    return np.mean(kept, axis=0) if kept else None


@dataclass(frozen=True)
class RegionOverlap:
    """How a map and a region of interest agree.

    Attributes:
        share: of the map's sum that lies in the region.
        chance: the region's share of the image, what a map that knows nothing has.
        iou: of the region and the map above ``threshold`` times its maximum.
        hit: whether the maximum lies in the region.
    """

    share: float
    chance: float
    iou: float
    hit: bool


def overlap(heat: np.ndarray, region: np.ndarray, threshold: float = 0.5) -> RegionOverlap:
    """Args: heat [H, W] at least 0; region [H, W], not 0 inside."""
    inside = region != 0
    total = float(heat.sum())
    hot = heat >= threshold * heat.max() if total > 0 else np.zeros_like(inside)
    union = int((hot | inside).sum())
    return RegionOverlap(
        float(heat[inside].sum()) / total if total > 0 else 0.0, float(inside.mean()),
        int((hot & inside).sum()) / union if union else 0.0,
        bool(total > 0 and inside.flat[int(np.argmax(heat))]),
    )  # fmt: skip
