"""A segmenting bundle as one network of tensors: windows in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainfm.nets.exchange.graphs import Graph
from brainfm.specs import TaskSpec


class MeanProbabilities(nn.Module):
    """A segmenting bundle on one window: [B, M, X, Y, Z] standardised voxels of all its contrasts, in its order ->
    [B, K, X, Y, Z] probabilities, the mean over its members."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        answers = [torch.softmax(member(image), dim=1) for member in self.members]
        return torch.stack(answers).mean(0)


def window_graph(members: Sequence[nn.Module], task: TaskSpec) -> Graph:
    """See Kind.graph."""
    image = torch.randn(2, len(task.contrasts), *task.patch_vox)
    said = f"image: [cases, {', '.join(task.contrasts)}, X, Y, Z], RAS+, prepared as `preprocess` says"
    return Graph(MeanProbabilities(members).eval(), {"image": image}, ("probabilities",), {"input": said})
