"""Batch and Terms: what travels between loader, objective and task, and the letters of its axes.

| letter | axis | | letter | axis |
|---|---|---|---|---|
| B | scans or cases of a batch | | N | tokens |
| M | contrasts of a case | | E | features (embedding) |
| C | channels | | K | classes |
| X | left to right | | Y | posterior to anterior |
| Z | inferior to superior | | | |

Always X, Y, Z in this order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

ON_HOST = ("sample", "paired", "same_contrast", "corners", "rendered", "real", "tissue_shares", "voxel_mm")


@dataclass(frozen=True)
class Batch:
    """Patches for one step. Fields that nobody needs are None.

    Attributes:
        image: [B, 1, X, Y, Z] standardised voxels; for a task [B, M, X, Y, Z], a channel a contrast, 0 where absent;
            for a whole-head task [B, V, M, X, Y, Z], V views of each head, the whole-head view first if there is one.
        sample: [B] int64, the samples' numbers; whatever is drawn for a sample is drawn from (seed, purpose, number).
        partner: [B, 1, X, Y, Z] a second scan of the same session at the same corner.
        paired: [B] bool; False where the session has one scan only (partner then repeats image and must not count).
        same_contrast: [B] bool; True where both scans show the same known contrast. Unknown contrasts never match.
        interval_years: [B] float32, time between the visits of image and partner; 0 in one visit, NaN where unknown.
        subject: [B] int64, equal where samples are of one person.
        present: [B, M] bool; which contrasts a case has.
        label: [B, X, Y, Z] int64 class indices.
        regions: [B, X, Y, Z] int64, the subject's anatomy at this place as group indices; -1 where unknown.
        volumes: [B, R] float32, z-scored log fractions of the subject's intracranial volume; NaN where unknown.
        pathology: [B] float32, 1 where the patch or its session shows disease, 0 where not, NaN where unknown.
        lesion: [B, X, Y, Z] int8, 1 in lesions, 0 outside, -1 where unknown; [B, V, X, Y, Z] where image has views.
        partner_regions, partner_lesion: the same as regions and lesion at the partner's place, where that is another.
        corners: [B, 2, 3] int64, where image and partner begin in the window they were cut from: voxel v of image and
            v + corners[:, 0] - corners[:, 1] of partner show the same place.
        voxel_mm: [B] float32, edge length of a voxel, where it varies.
        tissue: [B, X, Y, Z] uint8 render classes of a window (data/regions.RENDERED), until it is rendered.
        tissue_shares: [B, R] float32, the share of the whole head's voxels that each render class has.
        rendered: [B, 2] bool; whether image and partner are renderings of ``tissue``.
        real: [B] bool; False where there is no scan, only a label map.
        lesion_weight: [B, X, Y, Z] how much of an inserted lesion a voxel shows, until it is rendered.
        answer: [B, T] float32, what a whole-head task should say: a class index, T yes or no, or a value in the
            target's unit; NaN where unknown.
    """

    image: Tensor
    sample: Tensor
    partner: Tensor | None = None
    paired: Tensor | None = None
    same_contrast: Tensor | None = None
    interval_years: Tensor | None = None
    subject: Tensor | None = None
    present: Tensor | None = None
    label: Tensor | None = None
    regions: Tensor | None = None
    volumes: Tensor | None = None
    pathology: Tensor | None = None
    lesion: Tensor | None = None
    partner_regions: Tensor | None = None
    partner_lesion: Tensor | None = None
    corners: Tensor | None = None
    voxel_mm: Tensor | None = None
    tissue: Tensor | None = None
    tissue_shares: Tensor | None = None
    rendered: Tensor | None = None
    real: Tensor | None = None
    lesion_weight: Tensor | None = None
    answer: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The batch on another device; float16 voxels become float32 there.

        What decides about the work (`ON_HOST`) stays where it is: asking a GPU for it would make the host wait for all
        that the GPU has still to do.
        """
        moved = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and f.name not in ON_HOST:
                value = value.to(device, non_blocking=non_blocking)
                moved[f.name] = value.float() if value.dtype == torch.float16 else value
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.pin_memory() for k, v in values.items() if isinstance(v, Tensor)})

    def __len__(self) -> int:
        return self.image.shape[0]


@dataclass(frozen=True)
class Terms:
    """A loss and what it is made of.

    Attributes:
        total: scalar to be minimised, the weighted sum.
        parts: unweighted scalars by name, detached, for the curves.
    """

    total: Tensor
    parts: dict[str, Tensor]
