"""One answer for one prepared case, as it is explained: a map of a layer, and what covering a place takes away."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm.specs import TaskSpec

Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class ExplainedCase:
    """One prepared session: image [M, X, Y, Z] and present [M] on the CPU, and how it passes a network."""

    image: Tensor
    present: Tensor
    spec: TaskSpec
    spacing_mm: Spacing
    device: torch.device
    overlap: float
    labels: np.ndarray | None = None

    @property
    def shape(self) -> Triple:
        x, y, z = self.image.shape[1:]
        return x, y, z

    @property
    def background(self) -> Tensor:
        """[M, 1, 1, 1]: what stands outside the head."""
        return self.image.amin(dim=(1, 2, 3), keepdim=True)

    def grown(self, image: Tensor) -> tuple[Tensor, Triple]:
        """An image of this case with background on both sides to at least a patch, and where the case begins in it."""
        before = [max(0, p - s) // 2 for s, p in zip(self.shape, self.spec.patch_vox)]
        after = [max(0, p - s) - b for s, p, b in zip(self.shape, self.spec.patch_vox, before)]
        widths = [w for b, a in zip(reversed(before), reversed(after)) for w in (b, a)]  # torch counts from the last
        values = self.background.flatten().tolist()
        grown = torch.stack([functional.pad(c, widths, value=v) for c, v in zip(image, values)])
        return grown, (before[0], before[1], before[2])


class ExplainedAnswer(ABC):
    """One answer of an ensemble for one case.

    Attributes:
        name: of what is explained.
        answer: before anything is covered.
    """

    name: str
    answer: float

    @abstractmethod
    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        """[X, Y, Z], one member's map before it is normalised."""

    @abstractmethod
    def places(self, start: Triple, stop: Triple) -> bool:
        """Whether covering these voxels can change the answer."""

    @abstractmethod
    def without(self, start: Triple, stop: Triple) -> float:
        """By how much the answer falls when these voxels are background."""


def share_inside(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of a map's mass, sum of |heat|, that lies in a mask [X, Y, Z]; NaN where the map is 0 everywhere."""
    mass = np.abs(heat, dtype=np.float64)
    total = float(mass.sum())
    return float(mass[np.asarray(mask, dtype=bool)].sum()) / total if total > 0 else float("nan")
