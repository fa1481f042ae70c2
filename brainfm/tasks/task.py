"""What every supervised question offers to training and to prediction."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.cpu import swap_in
from brainfm.specs import TaskSpec

# kind -> (module, class); imported when it is built
TASKS: dict[str, tuple[str, str]] = {
    "segmentation": ("brainfm.tasks.segmentation", "SegmentationTask"),
    "classification": ("brainfm.tasks.scan_level", "ScanTask"),
    "regression": ("brainfm.tasks.scan_level", "ScanTask"),
}


class Task(nn.Module, ABC):
    """A backbone with a head that answers one question.

    Attributes:
        spec: the question.
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

    def bundle_state(self) -> dict[str, Tensor]:
        """The weights that answering needs: what a bundle ships."""
        return dict(self.state_dict())


def build_task(spec: TaskSpec, backbone: Backbone, **settings: Any) -> Task:
    """The task of this kind around a backbone, its head with fresh weights, all with the layers of a CPU.

    Args:
        settings: of the task; answering needs none but those of ``Task.settings``.

    Raises: ConfigError where the kind is unknown or the spec does not suit it.
    """
    if spec.kind not in TASKS:
        raise ConfigError(f"task.kind={spec.kind!r}: expected one of {', '.join(sorted(TASKS))}")
    module, name = TASKS[spec.kind]
    task: Task = swap_in(getattr(importlib.import_module(module), name)(spec, backbone, **settings))
    return task
