"""A whole-head bundle as one network of tensors: the view of a head in, the bundle's answer out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.exchange.graphs import Graph
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.whole_head.label_maps import reads_of
from brainfm.tasks.whole_head.sorts import sort_of

_SMALLEST = 1e-7  # of a probability in a logarithm, as in scoring/calibration.py


class HeadAnswers(nn.Module):
    """A whole-head bundle on heads whose view is made: the mean of its members, corrected as cross-validation decided.

    Args:
        members: in eval mode.
        task: a classification or regression with a whole-head view and no windows.
        decisions: what is done to the answers.
        mapped: whether the members ask for volumes of a label map, and other ones answer without it: then nothing is
            corrected where a case has none (label_maps.decisions_for).
    """

    def __init__(self, members: Sequence[nn.Module], task: TaskSpec, decisions: Decisions, mapped: bool) -> None:
        super().__init__()
        self.members, self.task, self.decisions, self.mapped = nn.ModuleList(members), task, decisions, mapped

    def forward(self, image: Tensor, volumes: Tensor | None = None) -> Tensor:
        """[B, K] probabilities, or [B, 1] values.

        Args:
            image: [B, M, X, Y, Z] whole-head views of all contrasts, in the bundle's order.
            volumes: [B, F] as ``reads`` names them; NaN in a case without a label map.
        """
        given = () if volumes is None else (volumes,)
        members: Any = self.members
        answers = [member.decode(member(image[:, None], None, *given)) for member in members]
        raw = torch.stack([answer[:, None] if answer.ndim == 1 else answer for answer in answers])
        corrected = self._corrected(raw)
        if not self.mapped or volumes is None:
            return corrected
        there = torch.isfinite(volumes).all(dim=1, keepdim=True)
        return torch.where(there, corrected, raw.mean(0))

    def _corrected(self, raw: Tensor) -> Tensor:
        """[members, B, K] -> [B, K], as Sort.joined does it."""
        decisions = self.decisions
        if not sort_of(self.task).probable:
            return (raw.mean(0) - decisions.bias[0]) / decisions.bias[1]
        p = raw.clamp(_SMALLEST, 1 - _SMALLEST)
        if self.task.mode == "multilabel":
            return torch.sigmoid((torch.log(p) - torch.log(1 - p)) / decisions.temperature).mean(0)
        return torch.softmax(torch.log(p) / decisions.temperature, dim=-1).mean(0)


def head_graph(members: Sequence[Any], task: TaskSpec, decisions: Decisions) -> Graph:
    """See Kind.graph. Raises: ConfigError for a bundle that looks at windows or measures the scan."""
    if task.crops or not task.view_mm:
        raise ConfigError(
            "answers for a whole head from windows, as many as cover it, which no graph of fixed shape holds; expected "
            "a bundle of the whole-head view alone (task.crops=0)"
        )
    if any(member.asks_measurements for member in members):
        raise ConfigError(
            "answers for a whole head from simple measurements of the scan, which no graph makes; expected a bundle "
            "without them (task.candidates=[mean,volumes,regions,features,tuned])"
        )
    examples = {"image": torch.randn(2, len(task.contrasts), *task.patch_vox)}
    edge = f"{task.view_mm:g} mm"
    told: dict[str, Any] = {
        "input": f"image: [cases, {', '.join(task.contrasts)}, X, Y, Z], RAS+, prepared as `preprocess` says, then the "
        f"whole head about the middle of the array on cubic voxels of {edge}, the contrast's minimum beyond its edge",
        "output": f"values in {task.unit or 'the unit of the target'}" if not task.values else list(task.values),
    }
    reads = reads_of(members)
    if reads is not None:
        examples["volumes"] = torch.zeros(2, len(reads.volumes))
        told["volumes"] = {"names": list(reads.volumes), "scheme": reads.scheme, "without": "NaN"}
    mapped = reads is not None and any(bool((member.mix[0] != member.mix[1]).any()) for member in members)
    return Graph(HeadAnswers(members, task, decisions, mapped).eval(), examples, ("answer",), told)
