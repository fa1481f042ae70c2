"""Collapse of a segmenter to background: noticed, lifted once, then stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from brainfm.batch import Batch
from brainfm.errors import TrainingError
from brainfm.tasks.task import TrainingWatch

_LOOKS = 40  # in a training
_WARMUP, _PATIENCE = 0.2, 0.15  # of the steps
_AT_LEAST = 100  # steps of each: a shorter training is over before anything can be said


class CollapseGuard:
    """Notices a segmenter that answers background everywhere, where there is foreground to be found.

    A network that begins with little foreground may need a while to find any, and small lesions make "none" a good
    first answer: hence the warm-up, and the patience after it.

    Args:
        kept: what it remembers; changed in place, JSON-able, kept with the checkpoint.
        warmup_steps: before these nothing is said.
        steps: for how many steps it must last.
        least: the answer counts as none where it holds less than this part of the true foreground.
    """

    def __init__(self, kept: dict[str, Any], warmup_steps: int = 300, steps: int = 300, least: float = 0.001) -> None:
        self.kept, self.warmup_steps, self.steps, self.least = kept, warmup_steps, steps, least

    def see(self, step: int, predicted: float, true: float) -> str | None:
        """Looks at training patches. A sentence where there was no foreground in the answers for long.

        Args:
            step: steps done.
            predicted, true: shares of foreground in the answers and in the labels of one batch, or of the batches since
                the last look (``foreground_shares``). Patches without any foreground say nothing.
        """
        if predicted > self.least * true:
            self.kept.pop("none_since", None)
            return None
        if true <= 0 or step <= self.warmup_steps:
            return None
        since = self.kept.setdefault("none_since", step)
        if step - since < self.steps:
            return None
        return (
            f"the segmentation has answered background everywhere from step {since} to {step}, while {true:.2%} of the "
            "voxels of its training patches are foreground; try task.loss=focal_tversky, a larger "
            "data.foreground_share or a smaller optim.lr"
        )

    def forget(self) -> None:
        """After the foreground was lifted: the patience begins anew."""
        self.kept.pop("none_since", None)


@torch.no_grad()
def foreground_shares(output: Any, label: Tensor) -> Tensor:
    """What CollapseGuard wants to know of a batch; stays on the device, so that no step waits for it.

    Args:
        output: of ``SegmentationTask.forward``.
        label: [B, X, Y, Z] int64 class indices.

    Returns:
        [2] float32: the shares of the voxels that are foreground in the answer and in the label.
    """
    logits = getattr(output, "finest", output)
    predicted = logits[:, 1:].amax(dim=1) > logits[:, 0]
    return torch.stack([predicted.float().mean(), (label > 0).float().mean()])


class ForegroundWatch(TrainingWatch):
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
    def add(self, output: Any, batch: Batch) -> None:
        assert batch.label is not None
        self.shares[:2] += foreground_shares(output, batch.label)
        self.shares[2] += 1

    def look(
        self, task: Any, optimizer: torch.optim.Optimizer, total: Callable[[Tensor], Tensor], step: int
    ) -> str | None:
        if step % self.every:
            return None
        predicted, true, batches = total(self.shares).tolist()
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
