"""The published augmentation of a batch of images: mirrored, turned, cropped, in one resampling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SHARE, _DEGREES, _CROP = 0.25, 10.0, 200 / 224


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """[B, C, H, W] -> the same shape. With a chance of .25 each: mirrored left to right, upside down, turned by up to
    10 degrees, cropped to 200 of 224 pixels and enlarged again; bilinear, with zeros outside.

    Source: the training transforms of Woerner et al. 2024 (arXiv 2404.16000).
    """
    count = len(images)
    draws = torch.rand(count, 4, generator=generator) < _SHARE
    numbers = torch.rand(count, 3, generator=generator) * 2 - 1
    angle = torch.where(draws[:, 2], numbers[:, 0] * math.radians(_DEGREES), 0.0)
    scale = torch.where(draws[:, 3], _CROP, 1.0)
    shift = torch.where(draws[:, 3:], numbers[:, 1:] * (1 - _CROP), 0.0)
    mirrored = 1 - 2 * draws[:, :2].to(torch.float32)
    rows = torch.stack([torch.cos(angle), -torch.sin(angle), torch.sin(angle), torch.cos(angle)], 1).view(-1, 2, 2)
    theta = torch.cat([rows * scale[:, None, None] * mirrored[:, None], shift[..., None]], dim=2)
    theta = theta.to(images.device, images.dtype)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).contiguous(memory_format=torch.channels_last)
