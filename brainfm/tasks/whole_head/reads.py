"""Reads: what an answer for a whole head is made of beside the encoder's maps, and in which shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead

PARTS = ("mean", "volumes", "regions", "network", "measurements")
"""What a member can answer from: nothing but the training cases' mean or class shares; volumes of a label map; volumes
of the regions that its own decoder sees; the network's features; simple measurements of intensities and outline. The
answer is a mixture of their logits. Members of before have the first four."""

_LEAST_ML = 0.1  # of a region in a logarithm, as in data/region_volumes.py
_DENSE_LEVELS = 2  # of the decoder, finest


@dataclass(frozen=True)
class Reads:
    """How a member is built, as the bundle says it in ``reads.json``.

    Attributes:
        labels: the label column that volumes are measured on, e.g. ``dseg_labels``; empty: no volumes.
        scheme: of that label map.
        volumes: names of the numbers (data/region_volumes.py).
        decoder: ``DenseDecoder.config``, where the backbone's file had a decoder.
        regions: ``DenseHead.config`` of what tells the regions from the decoder's maps.
        outside: of its classes those that are not inside the skull.
        tissues: sums of its classes by name, e.g. ``grey``: few numbers, for few cases.
        measurements: names of numbers about intensities and outline (imaging/descriptors.content_descriptors).
    """

    labels: str = ""
    scheme: str = ""
    volumes: tuple[str, ...] = ()
    decoder: Mapping[str, Any] | None = None
    regions: Mapping[str, Any] | None = None
    outside: tuple[str, ...] = ()
    tissues: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    measurements: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.regions is not None and self.decoder is None:
            raise ConfigError("a head that tells regions reads a decoder's maps, found no decoder")
        known = set(self.regions["names"]) if self.regions else set()
        strange = {*self.outside, *(name for names in self.tissues.values() for name in names)} - known
        if strange:
            raise ConfigError(f"region {min(strange)!r}: the head that tells regions has no such class")

    @property
    def parts(self) -> tuple[str, ...]:
        """Of PARTS, those that a member has a share for."""
        return PARTS if self.measurements else PARTS[:-1]

    @property
    def inside(self) -> tuple[str, ...]:
        """The classes whose volumes are read."""
        names = self.regions["names"] if self.regions else ()
        return tuple(name for name in names if name not in self.outside)

    @property
    def region_names(self) -> tuple[str, ...]:
        """Of the numbers about the volumes of regions; tissues first, the total last."""
        if not self.inside:
            return ()
        return (*(f"tissue/{name}" for name in self.tissues), *self.inside, "total")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "labels": self.labels, "scheme": self.scheme, "volumes": list(self.volumes),
            "decoder": None if self.decoder is None else dict(self.decoder),
            "regions": None if self.regions is None else dict(self.regions), "outside": list(self.outside),
            "tissues": {name: list(names) for name, names in self.tissues.items()},
            "measurements": list(self.measurements),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reads:
        tissues = {name: tuple(names) for name, names in values["tissues"].items()}
        tuples = {name: tuple(values.get(name, ())) for name in ("volumes", "outside", "measurements")}
        return cls(**{**values, **tuples, "tissues": tissues})


def head_voxels(scans: Tensor) -> Tensor:
    """[B, 1, X, Y, Z] bool: brighter than half way from the background, which is constant, to the rest's mean."""
    background = scans.amin(dim=(2, 3, 4), keepdim=True)
    rest = scans > background + 1e-6
    mean = (scans * rest).sum(dim=(2, 3, 4), keepdim=True) / rest.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1)
    return scans > (background + mean) / 2


def log_head_volume(scans: Tensor, voxel_ml: float) -> Tensor:
    """[B, 1] log ml of the head in whole-head views [B, 1, X, Y, Z]."""
    return torch.log(head_voxels(scans).sum(dim=(2, 3, 4)) * voxel_ml + _LEAST_ML)


def averaged(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Means over the boxes of a coarser grid, [B, E, X, Y, Z] -> [B, E, x, y, z]; in a trace by a layer that every
    runtime knows."""
    x, y, z = (int(edge) for edge in grid)
    if not torch.jit.is_tracing():
        return F.adaptive_avg_pool3d(values, (x, y, z))
    i, j, k = (int(edge) // n for edge, n in zip(values.shape[2:], (x, y, z), strict=True))
    return F.avg_pool3d(values, (i, j, k))


def dense_width(reads: Reads, decoder: DenseDecoder | None) -> int:
    """F of `dense_numbers`; 0 without a decoder."""
    if decoder is None:
        return 0
    return len(reads.region_names) + 2 * sum(decoder.widths[:_DENSE_LEVELS]) + len(reads.inside) * decoder.widths[0]


@torch.no_grad()
def dense_numbers(
    reads: Reads, backbone: Backbone, decoder: DenseDecoder, regions: DenseHead | None, scans: Tensor, voxel_ml: float
) -> Tensor:
    """What the decoder sees of whole heads of one contrast, [B, dense_width].

    First ``reads.region_names``: log of each tissue's and region's share of what is inside the skull, log of that in
    ml (volumes are sums of probabilities). Then the last two levels' mean and deviation over the head, and the finest
    level's mean over each region. Nothing here carries a gradient.

    Args:
        scans: [B, 1, X, Y, Z].
    """
    levels = decoder.climb(backbone.features(scans))
    head = head_voxels(scans).float()
    numbers: list[Tensor] = []
    over: list[Tensor] = []
    if regions is not None:
        logits = regions(decoder.split(decoder.out(levels[-1]))[regions.part])
        places = {name: place for place, name in enumerate(regions.names)}
        shares = torch.softmax(logits.float(), dim=1)
        ml = shares.sum(dim=(2, 3, 4)) * voxel_ml
        groups = [*reads.tissues.values(), *((name,) for name in reads.inside)]
        sums = torch.stack([ml[:, [places[name] for name in names]].sum(dim=1) for names in groups], dim=1)
        inside = [places[name] for name in reads.inside]
        total = ml[:, inside].sum(dim=1, keepdim=True) + _LEAST_ML
        numbers = [torch.log((sums + _LEAST_ML) / total), torch.log(total)]
        weight = shares[:, inside] / shares[:, inside].sum(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        over = [torch.einsum("bkxyz,bexyz->bke", weight, levels[-1].float()).flatten(1)]
    for level in levels[-_DENSE_LEVELS:]:
        inside_head = averaged(head, level.shape[2:])
        inside_head = inside_head / inside_head.sum(dim=(2, 3, 4), keepdim=True).clamp(min=1e-6)
        mean = (inside_head * level.float()).sum(dim=(2, 3, 4))
        square = (inside_head * level.float().square()).sum(dim=(2, 3, 4))
        numbers += [mean, (square - mean.square()).clamp(min=1e-6).sqrt()]
    return torch.cat([*numbers, *over], dim=1)
