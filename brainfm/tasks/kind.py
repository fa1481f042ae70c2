"""A kind of task: what training, prediction, evaluation, explanation, audit and reports ask of it.

A kind's object is light: it imports what an answer needs when the answer is asked for, so that predicting loads nothing
of training and settings are read without arrays.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from brainfm.errors import ConfigError
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.settings import TaskSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from brainfm.data.columns import HasColumns
    from brainfm.data.manifest import Manifest, Scan
    from brainfm.data.store import Store
    from brainfm.nets.backbone import Backbone
    from brainfm.nets.exchange.graphs import Graph
    from brainfm.scoring.answers import Score
    from brainfm.tasks.answers import Label
    from brainfm.tasks.engine import Engine
    from brainfm.tasks.evaluator import Evaluator
    from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase
    from brainfm.tasks.study import Study
    from brainfm.tasks.task import Task


class Kind(ABC):
    """What one kind of task does where kinds differ.

    Attributes:
        name: as ``task.kind`` and task.json have it.
        settings: of a fine-tuning.
        ending: of the file of an answer.
        averaged: what of an ensemble's members is averaged, in words.
        signed: whether what an answer rests on raises or lowers it: then its map has two directions.
        measured: of which networks memory was measured (training/memory_table.json).
        voxelwise: whether what training holds in memory grows with the number of classes.
        column: how a column of the manifest can be this task's answer: as ``classes``, as ``values``, or not at all.
        second: of an answer in a column, a score that is worth an interval beside the primary one.
    """

    name: ClassVar[str]
    settings: ClassVar[type[TaskSettings]]
    ending: ClassVar[str]
    averaged: ClassVar[str] = "probabilities"
    signed: ClassVar[bool] = False
    measured: ClassVar[str]
    voxelwise: ClassVar[bool] = False
    column: ClassVar[str] = ""
    second: ClassVar[str] = ""

    def _part(self, module: str, name: str) -> Any:
        """Of this room what answering does not need: asked for by name, so that a container goes without it."""
        room = type(self).__module__.rpartition(".")[0]
        return getattr(importlib.import_module(f"{room}.{module}"), name)

    # ---- network and training ----------------------------------------------------------------------------------------

    @abstractmethod
    def network(self, spec: TaskSpec, backbone: Backbone, **settings: Any) -> Task:
        """See registry.build_task."""

    @abstractmethod
    def study(self, store: Store, settings: Any, *, mirror: Sequence[int], clean: bool) -> Study:
        """The task put to a store, for fine-tuning.

        Args:
            settings: of the task, of this kind's class.
            mirror: axes along which averaging over mirrored volumes is tried, where that can be.
            clean: whether cleaning the answers is tried, where that can be.
        """

    @abstractmethod
    def primary(self, spec: TaskSpec) -> tuple[str, bool]:
        """The score that models are compared by, and whether larger is better."""

    def answer_columns(self, spec: TaskSpec) -> tuple[str, ...]:
        """Columns of the manifest, or what they are called, in which the answer stands."""
        return (spec.target,)

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        """Of answers in a column: name -> the score as a function of truth and answers. Raises: ConfigError."""
        raise self._no_column()

    def read_column(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        """[T] float32, what a session's columns answer. Raises: Unusable, ManifestError, ConfigError."""
        raise self._no_column()

    def _no_column(self) -> ConfigError:
        return ConfigError(f"a {self.name} is answered by no column of a manifest")

    @abstractmethod
    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        """What an audit asks (study/shortcuts.py).

        Returns:
            Whether of classes, else of values; and by label (empty but for several labels) truth and answers, of
            classes as columns [N, Q] of 0 and 1 and of probabilities, of values [N].
        """

    # ---- answers -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def check_output(self, out: Path, inputs: Collection[Path]) -> Path:
        """The file of one answer. Raises: ConfigError where it cannot be that, FileError."""

    @abstractmethod
    def answer(
        self,
        engine: Engine,
        files: Mapping[str, Path],
        reference: str,
        labels: Mapping[str, Path] | None = None,
        like: Path | None = None,
    ) -> Any:
        """The answer for one session.

        Args:
            files: file by contrast; contrasts that the task was not trained on are looked at as well.
            reference: the contrast whose directions the network's grid takes.
            labels: the label map that the bundle reads, by its column, where there is one.
            like: the file on whose grid is answered; None: the reference.

        Raises:
            ScanError: where any file cannot be used: what the user gave is used or refused, never dropped in silence.
        """

    def graph(self, members: Sequence[nn.Module], spec: TaskSpec, decisions: Decisions) -> Graph:
        """The members as one network of tensors (nets/exchange/graphs.py). Raises: ConfigError where that cannot be."""
        raise ConfigError(f"a {self.name} is answered by no graph")

    @abstractmethod
    def write(self, path: Path, found: Any, like: Path) -> None:
        """Writes what `answer` gave; ``like`` is the file on whose grid it lies. Raises: FileError."""

    @abstractmethod
    def columns(self, spec: TaskSpec) -> list[str]:
        """Of the table of a manifest's answers."""

    @abstractmethod
    def cells(self, found: Any, spec: TaskSpec, like: Path) -> list[object]:
        """An answer's row of that table."""

    @abstractmethod
    def kept_cells(self, path: Path, spec: TaskSpec, like: Path) -> list[object]:
        """The same of an answer that lies there already. Raises: ConfigError where it cannot be read."""

    def label_of(self, scans: Sequence[Scan], target: str) -> Label | None:
        """The label of a session on whose grid is answered, so that both can be compared; None: there is none."""
        return None

    def label_column(self, networks: Sequence[Any]) -> str | None:
        """Of the label map that answers are made of; None where scans alone are looked at."""
        return None

    def check_labels(self, labels: Mapping[str, Any], networks: Sequence[Any]) -> dict[str, Path]:
        """The label map by the column that the bundle reads; empty where none was given.

        Raises: ConfigError for one that it does not read, ScanError for a file that is not there.
        """
        for name in labels:
            raise ConfigError(f"labels.{name}: the bundle reads no such label map, expected none")
        return {}

    def note_missing(self, networks: Sequence[Any], which: str) -> None:  # noqa: B027  # most kinds have nothing to say
        """A BrainfmWarning where a label map would change who answers; ``which`` lacks it."""

    # ---- scores, maps, words -----------------------------------------------------------------------------------------

    @abstractmethod
    def evaluator(self, manifest: Manifest, spec: TaskSpec, *, fresh: bool, empty: str) -> Evaluator:
        """Who scores the answers for a manifest.

        Args:
            fresh: whether the answers are still to be made.
            empty: see `inference.evaluate.evaluate`.

        Raises: ManifestError where no session has what is scored against; ScanError, ConfigError.
        """

    def class_index(self, spec: TaskSpec, target: str | int | None) -> int | None:
        """Which of the answers is meant; None: whichever is given. Raises: ConfigError where there is no such one."""
        return None if target is None else pick(spec, target, 0)

    @abstractmethod
    def usual_layer(self, layers: Sequence[str]) -> str:
        """Whose maps are explained by, of nets.saliency.layers_of."""

    @abstractmethod
    def explained(
        self, members: Sequence[nn.Module], case: ExplainedCase, index: int | None, decisions: Decisions
    ) -> ExplainedAnswer:
        """One answer of an ensemble for one case, to be explained; ``index`` as `class_index` gives it."""

    @abstractmethod
    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        """What was explained, in a few words."""

    @abstractmethod
    def promise(self, spec: TaskSpec) -> str:
        """What a bundle answers, for its card."""

    @abstractmethod
    def page(self, run: Any) -> Any:
        """The part of a fine-tuning's page that the kind decides (reports/kind_page.py)."""


def pick(spec: TaskSpec, target: str | int, first: int) -> int:
    """The place of a class in ``spec.values``, of those from ``first`` on. Raises: ConfigError where it is none."""
    legal = [str(value) for value in spec.values]
    if str(target) not in legal[first:]:
        *most, last = legal[first:]
        expected = f"one of {', '.join(most)} or {last}" if most else last
        raise ConfigError(f"class={target}: the bundle of {spec.target} has no such class, expected {expected}")
    return legal.index(str(target))
