"""The task: what the network of every supervised task offers to training and to prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.specs import TaskSpec


class TrainingWatch(nn.Module, ABC):
    """Notices that a network's answers have collapsed while it trains; what it remembers are buffers, so that a
    checkpoint carries them."""

    @abstractmethod
    def add(self, output: Any, batch: Batch) -> None:
        """After each forward pass."""

    @abstractmethod
    def look(
        self, task: Any, optimizer: torch.optim.Optimizer, total: Callable[[Tensor], Tensor], step: int
    ) -> str | None:
        """After each optimiser step. Returns a sentence where something was done about it.

        Args:
            total: the sum of a tensor over all processes.

        Raises:
            TrainingError: where nothing more can be done.
        """


class Task(nn.Module, ABC):
    """A backbone with a head that answers one task.

    Attributes:
        spec: the task.
        backbone: reads one contrast at a time; ``backbone.blocks()`` is what freezing and rate decay need.
        reads_of_file: how names in a backbone's file begin, to how those of the same weights do here, for what is read
            from it as it is and never trained.
    """

    spec: TaskSpec
    backbone: Backbone
    reads_of_file: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def forward(self, image: Tensor, present: Tensor | None = None) -> Any:
        """[B, M, X, Y, Z], or [B, V, M, X, Y, Z] with views, present [B, M] (None: all) -> the head's raw output."""

    @abstractmethod
    def loss(self, output: Any, batch: Batch) -> Terms:
        """What training minimises, of the output of ``forward``."""

    @abstractmethod
    def decode(self, output: Any) -> Tensor:
        """The output as a user reads it."""

    def settings(self) -> dict[str, Any]:
        """What ``build_task`` needs beside spec and backbone to make this network again; JSON-able."""
        return {}

    def watch(self, max_steps: int) -> TrainingWatch | None:
        """What looks at the answers of a training of so many steps, if anything."""
        return None

    def bundle_state(self) -> dict[str, Tensor]:
        """The weights that answering needs: what a bundle ships."""
        return dict(self.state_dict())
