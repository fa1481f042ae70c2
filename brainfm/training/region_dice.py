"""Dice of fine regions on windows, class by class, where maps merge some of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_OUTSIDE = ("background", "head")


class RegionDice:
    """Counts voxels of many windows.

    A voxel of a merged target is wrong for every class but its members, of which it says nothing.

    Args:
        names: of the K fine classes; targets from K on are merged.
        merged: for each merged target the places of its classes.
    """

    def __init__(self, names: Sequence[str], merged: Sequence[Sequence[int]]) -> None:
        self.names, self.merged = tuple(names), [list(of) for of in merged]
        self.counts = torch.zeros(len(names) + len(merged), len(names), dtype=torch.int64)

    def add(self, predicted: Tensor, target: Tensor) -> None:
        """Two tensors of one shape: classes, and targets with -1 where unknown."""
        known = target >= 0
        kinds, classes = self.counts.shape
        place = target[known].long() * classes + predicted[known].long()
        self.counts += torch.bincount(place, minlength=kinds * classes).view(kinds, classes).cpu()

    def by_class(self) -> dict[str, float]:
        """Dice of each class of the brain that occurs in a map."""
        found = {}
        for place, name in enumerate(self.names):
            silent = [len(self.names) + n for n, members in enumerate(self.merged) if place in members]
            claimed = int(self.counts[:, place].sum() - self.counts[silent, place].sum())
            true = int(self.counts[place].sum())
            if true and name not in _OUTSIDE:
                found[name] = 2 * int(self.counts[place, place]) / (claimed + true)
        return found

    def mean(self) -> float:
        """Over the classes; nan where no map shows one."""
        scores = list(self.by_class().values())
        return sum(scores) / len(scores) if scores else float("nan")
