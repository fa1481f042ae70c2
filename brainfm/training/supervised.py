"""Supervised module: a task as the loop trains it, augmented, averaged, and watched."""

from __future__ import annotations

from dataclasses import replace

import torch
from safetensors.torch import save

from brainfm.batch import Batch, Terms
from brainfm.data.augment import AugmentSpec, apply, draw
from brainfm.nets.branches import draw_branches
from brainfm.seeds import torch_stream
from brainfm.tasks.task import Task
from brainfm.training.average import WeightAverage


class Supervised(torch.nn.Module):
    """(Batch, progress) -> Terms, augmented on the device in training mode; carries the average of the weights and,
    where a task has one, what watches its answers."""

    def __init__(self, task: Task, augment: AugmentSpec | None, seed: int, decay: float, max_steps: int) -> None:
        super().__init__()
        self.task, self.augment, self.seed = task, augment, seed
        self.average = WeightAverage(task, decay) if decay else None
        self.foreground = task.watch(max_steps)

    def forward(self, batch: Batch, progress: float) -> Terms:
        if self.training and self.augment is not None:
            flat, views = _flattened(batch)
            batch = _unflattened(apply(flat, draw(flat, self.augment, self.seed)), views)
        if self.training:  # dropout draws from torch's own stream: begun anew, a resumed run draws the same
            torch.manual_seed(torch_stream(self.seed, "dropout", int(batch.sample[0])).initial_seed())
            draw_branches(self.task, self.seed, batch.sample)
        output = self.task(batch.image, batch.present)
        if self.training and self.foreground is not None:
            self.foreground.add(output, batch)
        return self.task.loss(output, batch)

    @property
    def answering(self) -> Task:
        """The network that is scored and shipped: the averaged one, where there is an average."""
        return self.task if self.average is None else self.average.network  # type: ignore[return-value]

    def member(self) -> bytes:
        """What goes into the bundle."""
        state = self.answering.bundle_state()
        return save({name: value.detach().cpu().clone().contiguous() for name, value in state.items()})


def _flattened(batch: Batch) -> tuple[Batch, int]:
    """Views of a head as samples of their own: all are augmented in the same way, for what is drawn for a sample is
    drawn from its number."""
    if batch.image.ndim == 5:
        return batch, 0
    views = batch.image.shape[1]
    lesion = None if batch.lesion is None else batch.lesion.flatten(0, 1)
    assert batch.present is not None
    return replace(
        batch,
        image=batch.image.flatten(0, 1),
        sample=batch.sample.repeat_interleave(views),
        present=batch.present.repeat_interleave(views, dim=0),
        lesion=lesion,
    ), views


def _unflattened(batch: Batch, views: int) -> Batch:
    if not views:
        return batch
    assert batch.present is not None
    return replace(
        batch,
        image=batch.image.unflatten(0, (-1, views)),
        sample=batch.sample[::views],
        present=batch.present[::views],
        lesion=None if batch.lesion is None else batch.lesion.unflatten(0, (-1, views)),
    )
