"""Dropped branches: which samples leave out which branches of a transformer in training, drawn from their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainfm import seeds


class BranchStream:
    """Draws for one step: a function of (seed, the sample's number, which pass of the step, which copy of the sample).

    Nothing is read from torch's own stream, so that a run that goes on draws what an uninterrupted one would.

    Args:
        seed: of the run.
        samples: the numbers of the samples in the batch.
    """

    def __init__(self, seed: int, samples: Sequence[int]) -> None:
        self.seed, self.samples, self.passes = seed, tuple(samples), 0

    @torch.compiler.disable
    def draw(self, rows: int, shares: Sequence[float]) -> Tensor:
        """[L, 2, rows] bool on the host: whether both branches of L blocks stay, of a batch in which the samples come
        one after the other, once or several times.

        Args:
            shares: of the rows that leave a block's branches out, in [0, 1).
        """
        found = torch.empty(len(shares), 2, rows, dtype=torch.bool)
        least = torch.tensor(shares)[:, None]
        for row in range(rows):
            copy, place = divmod(row, len(self.samples))
            generator = seeds.torch_stream(self.seed, "dropped branches", self.samples[place], self.passes, copy)
            found[:, :, row] = torch.rand(len(shares), 2, generator=generator) >= least
        self.passes += 1
        return found


def draw_branches(network: nn.Module, seed: int, samples: Tensor) -> None:
    """From here on the parts of a network that drop branches draw for these samples.

    Args:
        samples: [B] int64 on the host.
    """
    parts = [part for part in network.modules() if isinstance(getattr(part, "branches", None), BranchStream)]
    for part in parts:
        setattr(part, "branches", BranchStream(seed, samples.tolist()))  # noqa: B010 (a Module's attribute)
