"""What is done about a segmenter that has collapsed to background: noticed, lifted once, then stopped."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from brainfm.errors import TrainingError
from brainfm.tasks.segmentation import SegmentationTask, foreground_shares
from brainfm.training.guards import CollapseGuard

_LOOKS = 40  # in a training
_WARMUP, _PATIENCE = 0.2, 0.15  # of the steps
_AT_LEAST = 100  # steps of each: a shorter training is over before anything can be said


class ForegroundWatch(nn.Module):
    """Counts foreground on the device, and looks at it a few times in a training.

    What it remembers are buffers: a checkpoint carries them, so that a resumed run is lifted at the same step.

    Args:
        max_steps: of the training.
    """

    def __init__(self, max_steps: int) -> None:
        super().__init__()
        self.max_steps, self.every = max_steps, max(1, max_steps // _LOOKS)
        # predicted, true, batches since the last look
        self.register_buffer("shares", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("memory", torch.tensor([-1.0, 0.0], dtype=torch.float64))  # none since; how often lifted

    shares: Tensor
    memory: Tensor

    @torch.no_grad()
    def add(self, output: Any, label: Tensor) -> None:
        """After each forward pass."""
        self.shares[:2] += foreground_shares(output, label)
        self.shares[2] += 1

    def look(self, task: SegmentationTask, optimizer: torch.optim.Optimizer, fabric: Fabric, step: int) -> str | None:
        """After each optimiser step. Returns a sentence where the foreground was lifted.

        Raises:
            TrainingError: where it collapses for the second time.
        """
        if step % self.every:
            return None
        shares = fabric.all_reduce(self.shares, reduce_op="sum") if fabric.world_size > 1 else self.shares
        predicted, true, batches = shares.tolist()  # type: ignore[union-attr]
        predicted, true = predicted / batches, true / batches
        self.shares.zero_()
        since, lifted = self.memory.tolist()
        kept: dict[str, Any] = {} if since < 0 else {"none_since": int(since)}
        warmup, patience = (max(_AT_LEAST, round(share * self.max_steps)) for share in (_WARMUP, _PATIENCE))
        guard = CollapseGuard(kept, warmup, patience)
        said = guard.see(step, predicted, true)
        if said is None:
            self.memory[0] = kept.get("none_since", -1)
            return None
        if lifted:
            raise TrainingError(f"{said}; it was lifted once and fell again")
        task.lift_foreground()
        for parameter in (p for head in task.heads() for p in head.parameters()):
            optimizer.state.pop(parameter, None)  # moments of another function
        self.memory.copy_(torch.tensor([-1.0, 1.0]))
        return f"{said}; its last layers begin anew"
