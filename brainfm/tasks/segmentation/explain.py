"""Explanation of a segmentation: a class's log odds, or its probability, over the voxels predicted as it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.nets.saliency import cams, gradients, log_odds, upsampled, watched
from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase, Triple
from brainfm.tasks.windows import gaussian_weight, predict_windows, window_slices


class ExplainedVoxels(ExplainedAnswer):
    """A class of a segmentation: its log odds, or its probability, over the voxels that are predicted as it."""

    def __init__(self, members: Sequence[nn.Module], case: ExplainedCase, index: int | None) -> None:
        self.members, self.case, patch = members, case, case.spec.patch_vox
        total: Tensor | None = None
        for member in members:
            found = predict_windows(
                member, case.image, case.present, patch, overlap=case.overlap, batch=1, device=case.device
            )
            total = found if total is None else total.add_(found)
        assert total is not None
        labels = total.argmax(dim=0)
        if index is None:
            counts = torch.bincount(labels.flatten(), minlength=case.spec.classes)[1:]
            index = int(counts.argmax()) + 1
        self.index, self.name = index, str(case.spec.values[index])
        self.mask = labels == index
        self.answer = float(self.mask.sum()) * float(np.prod(case.spacing_mm)) / 1000
        self.image, self.origin = case.grown(case.image)
        self.grown_mask = torch.zeros(self.image.shape[1:], dtype=torch.bool)
        self.grown_mask[self.inner] = self.mask
        # Few windows do for occlusion: the same ones before and after.
        self.bases: list[tuple[tuple[slice, slice, slice], list[float]]] = []

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        x, y, z = (slice(o, o + s) for o, s in zip(self.origin, self.case.shape))
        return x, y, z

    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        patch = self.case.spec.patch_vox
        weight = gaussian_weight(patch)
        total, mass = torch.zeros(self.image.shape[1:]), torch.zeros(self.image.shape[1:])
        for window in window_slices(tuple(self.image.shape[1:]), patch, self.case.overlap):
            mass[window] += weight
            inside = self.grown_mask[window]
            if not inside.any():  # nothing is asked there, so the gradient is 0
                continue
            with watched(network, layer) as leaves:
                logits = self._logits(network, self.image[(slice(None), *window)])
                score = log_odds(logits, self.index)[0][inside.to(logits.device)].sum()
                maps = cams(leaves, gradients(score, leaves), how, signed=False)
            total[window] += upsampled(maps, patch)[0] * weight
        return (total / mass)[self.inner].numpy()

    def places(self, start: Triple, stop: Triple) -> bool:
        if not self.bases:
            self._base()
        return any(self._meets(window, start, stop) for window, _ in self.bases)

    def without(self, start: Triple, stop: Triple) -> float:
        covered = self.image.clone()
        x, y, z = (slice(a + o, b + o) for a, b, o in zip(start, stop, self.origin))
        covered[:, x, y, z] = self.case.background
        drop = 0.0
        for window, base in self.bases:
            if self._meets(window, start, stop):
                drop += sum(base) - sum(self._mean_probability(covered, window))
        return drop / (len(self.members) * max(int(self.mask.sum()), 1))

    def _base(self) -> None:
        seen = torch.zeros_like(self.grown_mask)
        for window in window_slices(tuple(self.image.shape[1:]), self.case.spec.patch_vox, 0.0):
            if (self.grown_mask[window] & ~seen[window]).any():
                self.bases.append((window, self._mean_probability(self.image, window)))
                seen[window] = True

    def _mean_probability(self, image: Tensor, window: tuple[slice, slice, slice]) -> list[float]:
        """For each member the sum of the class's probability over the voxels of a window predicted as it."""
        inside = self.grown_mask[window].to(self.case.device)
        sums = []
        with torch.no_grad():
            for member in self.members:
                logits = self._logits(member, image[(slice(None), *window)])
                sums.append(float(torch.softmax(logits, dim=1)[0, self.index][inside].double().sum()))
        return sums

    def _meets(self, window: tuple[slice, slice, slice], start: Triple, stop: Triple) -> bool:
        return all(a + o < w.stop and w.start < b + o for w, a, b, o in zip(window, start, stop, self.origin))

    def _logits(self, network: nn.Module, patch: Tensor) -> Tensor:
        image, present = patch[None].to(self.case.device), self.case.present[None].to(self.case.device)
        return network(image, present).float()
