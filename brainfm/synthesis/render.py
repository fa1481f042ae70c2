"""Rendering: label maps to scans of any contrast, on the device; what the views of a window show.

A window comes with a map of render classes, the real scan or scans of the head if there are any, and two corners.
Each view is cut out at its corner: as the real scan, or as a rendering of the map whose look is drawn from the sample's
number. Artefacts (bias field, noise, thick slices, ...) follow in data/augment, for real and rendered views alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.synthesis.looks import FAMILIES, Look, draw_look
from brainfm.synthesis.settings import LookSpec

_SHIFT = (0.2, 0.7)  # of a lesion's intensity, in parts of the brightest tissue
_LEAST_STD = 1e-2


@torch.no_grad()
def render_views(batch: Batch, families: np.ndarray, spec: LookSpec, patch_vox: Sequence[int], seed: int) -> Batch:
    """The two views of every window: image and partner [B, 1, X, Y, Z], with their labels at their own corners.

    Args:
        batch: of windows (data/windows.py).
        families: [R] the family of each render class, a place in looks.FAMILIES; the first class is air.
        patch_vox: X, Y, Z of a view.
        seed: looks are functions of (seed, sample number, view) alone.

    Returns:
        The batch with views instead of windows; ``tissue`` and ``lesion_weight`` are used up. ``paired`` is True where
        the views are two pictures of the head and not one, ``same_contrast`` where they are known to look alike.
    """
    assert batch.corners is not None and batch.rendered is not None and batch.tissue is not None
    assert batch.partner is not None and batch.real is not None and batch.tissue_shares is not None
    shares, cut = batch.tissue_shares.cpu().numpy(), batch.corners.tolist()
    views: list[list[Tensor]] = [[], []]
    for b, number in enumerate(batch.sample.tolist()):
        strip = bool(seeds.stream(seed, "strip", number).random() < spec.strip) and bool(shares[b].any())
        for view, scans in enumerate((batch.image, batch.partner)):
            box = _box(cut[b][view], patch_vox)
            tissue = batch.tissue[b][box].long()
            scan = scans[b, 0][box].float()
            if bool(batch.rendered[b, view]):
                weight = None if batch.lesion_weight is None else batch.lesion_weight[b][box].float()
                rng = seeds.stream(seed, "look", number, view)
                noise = seeds.torch_stream(seed, "grain", number, view, device=scan.device)
                look = draw_look(rng, families, spec)
                shift = float(rng.uniform(*_SHIFT) * rng.choice([-1.0, 1.0]))
                real = scan if bool(batch.real[b]) else None
                scan = paint(tissue, look, noise, texture_of=real, lesion=weight, shift=shift)
                scan = _standardised(scan, look, shares[b], families, strip, tissue)
            elif strip:
                scan = _stripped(scan, tissue, families)
            views[view].append(scan)
    labels = {}
    for name in ("regions", "lesion"):
        whole = getattr(batch, name)
        if whole is not None:
            for view, key in enumerate((name, f"partner_{name}")):
                labels[key] = torch.stack([whole[b][_box(cut[b][view], patch_vox)] for b in range(len(batch))])
    image, partner = (torch.stack(of)[:, None] for of in views)
    return replace(batch, image=image, partner=partner, tissue=None, lesion_weight=None, **labels)


def paint(
    tissue: Tensor,
    look: Look,
    generator: torch.Generator,
    *,
    texture_of: Tensor | None = None,
    lesion: Tensor | None = None,
    shift: float = 0.0,
) -> Tensor:
    """[X, Y, Z] intensities of a map of render classes, 0 in air, about 1 in the brightest tissue.

    Args:
        tissue: [X, Y, Z] int64 render classes.
        look: whose means and deviations are painted, and how much partial volume.
        generator: of the grain, on the device.
        texture_of: [X, Y, Z] the real scan of this place, whose structure is mixed in.
        lesion: [X, Y, Z] weight of a lesion, 0 where there is none.
        shift: of the lesion's intensity.
    """
    device = tissue.device
    means, stds = (torch.from_numpy(values).to(device) for values in (look.means, look.stds))
    painted = means[tissue] + stds[tissue] * torch.randn(tissue.shape, generator=generator, device=device)
    inside = tissue > 0
    if texture_of is not None and look.texture:
        height = texture_of - texture_of.amin()
        height = height / height.amax().clamp(min=1e-3)
        level = (height * inside).sum() / inside.sum().clamp(min=1)
        painted = painted + look.texture * (height - level) * inside
    if lesion is not None:
        painted = painted + shift * lesion * inside
    return blurred(painted.clamp(min=0), look.blur_vox)


def blurred(image: Tensor, sigma_vox: float) -> Tensor:
    """[X, Y, Z] under a Gaussian of this deviation; at the border the nearest voxel goes on."""
    if sigma_vox < 0.2:
        return image
    reach = max(1, round(2.5 * sigma_vox))
    steps = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    bell = torch.exp(-0.5 * (steps / sigma_vox) ** 2)
    bell = bell / bell.sum()
    for axis in range(3):
        sides = [reach if axis == a else 0 for a in (2, 2, 1, 1, 0, 0)]
        padded = F.pad(image[None, None], sides, mode="replicate")[0, 0]
        image = torch.stack([w * padded.narrow(axis, n, image.shape[axis]) for n, w in enumerate(bell)]).sum(dim=0)
    return image


def _standardised(
    painted: Tensor, look: Look, shares: np.ndarray, families: np.ndarray, strip: bool, tissue: Tensor
) -> Tensor:
    """As preparing does with a scan: by mean and deviation of the whole head, which the classes' shares tell."""
    weights = shares * (families != FAMILIES.index("outside")) if strip else shares
    weights = weights / max(float(weights.sum()), 1e-9)
    mean = float((weights * look.means).sum())
    variance = float((weights * (look.means**2 + look.stds**2)).sum()) - mean**2
    if strip:
        painted = painted.masked_fill(_outside(tissue, families), 0)
    return (painted - mean) / max(variance, _LEAST_STD**2) ** 0.5


def _stripped(scan: Tensor, tissue: Tensor, families: np.ndarray) -> Tensor:
    """A real scan without what is not brain, standardised by what is left."""
    outside = _outside(tissue, families) | (tissue == 0)
    left = ~outside
    count = left.sum().clamp(min=1)
    mean = (scan * left).sum() / count
    std = (((scan - mean) ** 2 * left).sum() / count).sqrt().clamp(min=_LEAST_STD)
    floor = torch.where(left, scan, torch.inf).amin()
    floor = torch.where(torch.isfinite(floor), floor, scan.amin())
    return (torch.where(outside, floor, scan) - mean) / std


def _outside(tissue: Tensor, families: np.ndarray) -> Tensor:
    away = torch.from_numpy(families == FAMILIES.index("outside")).to(tissue.device)
    return away[tissue]


def _box(corner: Sequence[int], patch_vox: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(c, c + n) for c, n in zip(corner, patch_vox, strict=True))
