"""Explanation of an answer for a whole head: by a class's log odds or probability, or the value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.data.region_volumes import voxel_effects
from brainfm.errors import ConfigError
from brainfm.nets.saliency import cams, gradients, upsampled, watched
from brainfm.specs import Decisions
from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase, Triple
from brainfm.tasks.whole_head.answer import joined
from brainfm.tasks.whole_head.label_maps import decisions_for, reads_of, volumes_of
from brainfm.tasks.whole_head.measured import measurements_of
from brainfm.tasks.whole_head.sorts import sort_of
from brainfm.tasks.whole_head.views import covering_corners, views_of_volumes, whole_view_to_volume


class ExplainedHead(ExplainedAnswer):
    """A class's log odds or probability, or a regression's value, for the whole session."""

    def __init__(
        self, members: Sequence[nn.Module], case: ExplainedCase, index: int | None, decisions: Decisions
    ) -> None:
        self.members, self.case = members, case
        self.volumes = volumes_of(members, case.labels, case.spacing_mm, "the label map")
        self.decisions = decisions_for(members, decisions, self.volumes is not None)
        spec = case.spec
        answers = self._answers(case.image)
        self.sort = sort_of(spec)
        self.index = self.sort.most(answers) if index is None else index
        self.name = self.sort.name(spec, self.index)
        self.answer = float(answers[self.index])

    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        case, spec = self.case, self.case.spec
        if spec.pooling == "token":
            raise ConfigError(
                f"the bundle answers for {spec.target} from a class token, which no map leads to; expected one that "
                "was fine-tuned with task.pooling=mean or attention"
            )
        signed = not self.sort.probable
        with watched(network, layer) as leaves:
            volumes = None if self.volumes is None else self.volumes.to(case.device).requires_grad_(True)
            measured = self._measured(case.image)
            logits = self._output(network, self._views(case.image), volumes, measured).logits.float()[0]
            score = self.sort.asked(logits, self.index)
            *slopes, slope = gradients(score, [*leaves, torch.zeros(1) if volumes is None else volumes])
            heats = upsampled(cams(leaves, slopes, how, signed), spec.patch_vox).numpy()
        total = self._of_volumes(slope, signed)
        if spec.view_mm > 0:
            whole = whole_view_to_volume(heats[0], case.spacing_mm, spec.view_mm, spec.patch_vox, case.shape)
            total += whole * float(
                np.prod(case.spacing_mm) / spec.view_mm**3
            )  # its voxels are larger: the same in less
            heats = heats[1:]
        if spec.crops:
            added, count = np.zeros(case.shape, dtype=np.float32), np.zeros(case.shape, dtype=np.float32)
            corners = covering_corners(case.shape, spec.patch_vox)
            for corner, heat in zip(corners, heats, strict=True):
                # a corner lies before the volume where that is thinner than the window
                inside = tuple(slice(max(c, 0), c + p) for c, p in zip(corner, spec.patch_vox))
                x, y, z = (slice(max(-c, 0), n - c) for c, n in zip(corner, case.shape))
                added[inside] += heat[x, y, z]
                count[inside] += 1
            total += added / count
        return total

    def _of_volumes(self, slope: Tensor, signed: bool) -> np.ndarray:
        """[X, Y, Z] what the label map's voxels have to do with the answer; 0 without one."""
        reads = reads_of(self.members)
        if self.volumes is None or reads is None or self.case.labels is None:
            return np.zeros(self.case.shape, dtype=np.float32)
        found = voxel_effects(
            self.case.labels, self.case.spacing_mm, reads.scheme, reads.volumes, slope[0].double().cpu().numpy()
        )
        return found if signed else np.maximum(found, 0)

    def places(self, start: Triple, stop: Triple) -> bool:
        return True

    def without(self, start: Triple, stop: Triple) -> float:
        covered = self.case.image.clone()
        x, y, z = (slice(a, b) for a, b in zip(start, stop))
        covered[:, x, y, z] = self.case.background
        return self.answer - float(self._answers(covered)[self.index])

    def _answers(self, image: Tensor) -> np.ndarray:
        """[K] probabilities, or [1] value: of all members."""
        views = self._views(image)
        with torch.no_grad():
            volumes = None if self.volumes is None else self.volumes.to(self.case.device)
            measured = self._measured(image)
            outputs = [self._output(member, views, volumes, measured) for member in self.members]
            found = [member.decode(output).float().cpu()[0] for member, output in zip(self.members, outputs)]  # type: ignore[operator]
        raw = torch.stack(found).reshape(len(found), -1).numpy().astype(np.float64)
        return joined(raw, self.case.spec, self.decisions)

    def _views(self, image: Tensor) -> Tensor:
        return torch.from_numpy(views_of_volumes(image.numpy(), self.case.spacing_mm, self.case.spec))

    def _measured(self, image: Tensor) -> Tensor | None:
        """[1, F] where members ask for measurements."""
        here = zip(self.case.spec.contrasts, image.numpy(), self.case.present.tolist())  # the task's own come first
        scans = {contrast: scan for contrast, scan, there in here if there}
        found = measurements_of(self.members, scans, self.case.spacing_mm)
        return None if found is None else found.to(self.case.device)

    def _output(self, network: nn.Module, views: Tensor, volumes: Tensor | None, measured: Tensor | None) -> Any:
        asked = {"volumes": volumes, "measured": measured}
        given = {name: value for name, value in asked.items() if value is not None}
        return network(views[None].to(self.case.device), self.case.present[None].to(self.case.device), **given)
