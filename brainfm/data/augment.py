"""Augmentation in the batch, on the device. What happens to a sample is drawn from its number; applying draws none."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm import seeds
from brainfm.batch import Batch


@dataclass(frozen=True)
class AugmentSpec:
    """How strongly. Every probability is a sample's.

    Attributes:
        flip: probability of mirroring left-right.
        affine: probability of a rotation and scaling.
        rotate_deg: largest angle about each axis, in degrees.
        scale: largest relative change of size along each axis.
        intensity: probability of each of gain, offset, gamma and noise, drawn per scan.
    """

    flip: float = 0.5
    affine: float = 0.3
    rotate_deg: float = 15.0
    scale: float = 0.15
    intensity: float = 0.3


@dataclass(frozen=True)
class Draw:
    """What will happen to a batch.

    Attributes:
        theta: [B, 3, 4] sampling matrices in grid_sample's coordinates, or None where no sample moves.
        gain, offset, gamma, noise: [B, S] for the S scans of a sample (image channels, then partner).
        noise_seed: [B] seeds of the noise fields.
    """

    theta: Tensor | None
    gain: Tensor
    offset: Tensor
    gamma: Tensor
    noise: Tensor
    noise_seed: tuple[int, ...]


def draw(batch: Batch, spec: AugmentSpec, seed: int) -> Draw:
    """The decisions for a batch, on the CPU, a function of (seed, sample number, spec)."""
    scans = batch.image.shape[1] + (0 if batch.partner is None else batch.partner.shape[1])
    thetas, gains, offsets, gammas, noises, noise_seeds = [], [], [], [], [], []
    for number in batch.sample.tolist():
        rng = seeds.stream(seed, "augment", number)
        thetas.append(_draw_theta(rng, spec, batch.image.shape[2:]))
        use = rng.random((4, scans)) < spec.intensity
        gains.append(np.where(use[0], rng.uniform(0.8, 1.25, scans), 1.0))
        offsets.append(np.where(use[1], rng.uniform(-0.2, 0.2, scans), 0.0))
        gammas.append(np.where(use[2], rng.uniform(0.7, 1.5, scans), 1.0))
        noises.append(np.where(use[3], rng.uniform(0.0, 0.15, scans), 0.0))
        noise_seeds.append(int(rng.integers(2**62)))
    theta = np.stack(thetas).astype(np.float32)
    still = np.allclose(theta, np.eye(3, 4))
    gain, offset, gamma, noise = (
        torch.from_numpy(np.stack(v).astype(np.float32)) for v in (gains, offsets, gammas, noises)
    )
    return Draw(None if still else torch.from_numpy(theta), gain, offset, gamma, noise, tuple(noise_seeds))


def _draw_theta(rng: np.random.Generator, spec: AugmentSpec, shape_vox: tuple[int, ...]) -> np.ndarray:
    """[3, 4] in grid_sample's order (Z, Y, X of our axes), rotation and scale being the same in voxels of all axes."""
    flip = rng.random() < spec.flip
    angles = rng.uniform(-1, 1, 3) * math.radians(spec.rotate_deg)
    scales = 1 + rng.uniform(-1, 1, 3) * spec.scale
    matrix = np.eye(3)
    if rng.random() < spec.affine:
        for axis, angle in enumerate(angles):
            i, j = [a for a in range(3) if a != axis]
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = math.cos(angle)
            turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        matrix = matrix @ np.diag(scales)
    if flip:
        matrix = matrix @ np.diag([-1.0, 1.0, 1.0])
    half = np.array(shape_vox, float) / 2  # grid_sample counts in half edges, which differ where the patch is no cube
    matrix = matrix * half[None, :] / half[:, None]
    return np.concatenate([matrix[::-1, ::-1], np.zeros((3, 1))], axis=1)


def apply(batch: Batch, drawn: Draw) -> Batch:
    """The batch as drawn: one fused resampling for all scans of a sample, the label with it, then the intensities."""
    images = batch.image if batch.partner is None else torch.cat([batch.image, batch.partner], dim=1)
    label = batch.label
    if drawn.theta is not None:
        theta = drawn.theta.to(images.device)
        grid = F.affine_grid(theta, [len(batch), 1, *images.shape[2:]], align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if label is not None:
            warped = F.grid_sample(label[:, None].float(), grid, mode="nearest", align_corners=False)
            label = warped[:, 0].round().to(label.dtype)
    images = _intensity(images, drawn)
    channels = batch.image.shape[1]
    partner = None if batch.partner is None else images[:, channels:]
    return replace(batch, image=images[:, :channels], partner=partner, label=label)


def _intensity(images: Tensor, drawn: Draw) -> Tensor:
    """Gain, offset, gamma (over each scan's own range) and white noise."""
    shape = (*images.shape[:2], 1, 1, 1)
    gain, offset, gamma, noise = (
        v.to(images.device).view(shape) for v in (drawn.gain, drawn.offset, drawn.gamma, drawn.noise)
    )
    if bool((drawn.gamma != 1).any()):
        low, high = images.amin(dim=(2, 3, 4), keepdim=True), images.amax(dim=(2, 3, 4), keepdim=True)
        width = (high - low).clamp_min(1e-5)
        images = ((images - low) / width).clamp(0, 1) ** gamma * width + low
    images = images * gain + offset
    if bool((drawn.noise > 0).any()):
        fields = []
        for noise_seed in drawn.noise_seed:
            generator = torch.Generator(device=images.device).manual_seed(noise_seed)
            fields.append(torch.randn(images.shape[1:], generator=generator, device=images.device))
        images = images + torch.stack(fields) * noise
    return images
