"""The kinds of task by name: each lies in a room of its own (``tasks/NAME/``) and is imported when it is first asked.

To add a kind: a folder with an object of `Kind`, and a line here. Whoever trains, predicts, evaluates, explains, audits
or reports asks that object; nobody else compares a kind's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from brainfm.errors import ConfigError
from brainfm.specs import TaskSpec
from brainfm.tasks.kind import Kind
from brainfm.tasks.settings import TaskSettings

if TYPE_CHECKING:
    from brainfm.nets.backbone import Backbone
    from brainfm.tasks.answers import Key
    from brainfm.tasks.task import Task

# name, as task.kind has it -> module, class
KINDS: dict[str, tuple[str, str]] = {
    "segmentation": ("brainfm.tasks.segmentation.kind", "Segmentation"),
    "classification": ("brainfm.tasks.whole_head.kind", "Classification"),
    "regression": ("brainfm.tasks.whole_head.kind", "Regression"),
}


class TaskOptions(Mapping[str, Mapping[str, str]]):
    """What may follow ``task=``: the kinds that are registered now."""

    def __getitem__(self, name: str) -> Mapping[str, str]:
        if name not in KINDS:
            raise KeyError(name)
        return {"kind": name}

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)


@cache
def _made(module: str, name: str) -> Kind:
    made: Kind = getattr(importlib.import_module(module), name)()
    return made


def kind_of(name: object) -> Kind:
    """The object that knows a kind. Raises: ConfigError where there is none of this name."""
    if name not in KINDS:
        raise ConfigError(f"task.kind={name!r}: expected one of {', '.join(sorted(KINDS))}")
    return _made(*KINDS[str(name)])


def task_settings_class(values: Mapping[str, Any]) -> type[TaskSettings]:
    """Of the kind that ``values`` name. Raises: ConfigError where there is none of this name."""
    return kind_of(values.get("kind")).settings


def build_task(spec: TaskSpec, backbone: Backbone, **settings: Any) -> Task:
    """The task of this kind around a backbone, its head with fresh weights, all with the layers of a CPU.

    Args:
        settings: of the task; answering needs none but those of ``Task.settings``.

    Raises: ConfigError where the kind is unknown or the spec does not suit it.
    """
    from brainfm.nets.cpu import swap_in

    task: Task = swap_in(kind_of(spec.kind).network(spec, backbone, **settings))
    return task


def answer_name(key: Key, task: TaskSpec) -> str:
    """The file in which the answer for a session lies."""
    from brainfm.tasks.answers import mask_name

    return mask_name(key, task.target, kind_of(task.kind).ending)
