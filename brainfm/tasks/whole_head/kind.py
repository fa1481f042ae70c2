"""Answers for a whole head as kinds of task: classes or labels, and values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm.errors import ConfigError
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.kind import Kind
from brainfm.tasks.whole_head.settings import ClassificationSettings, RegressionSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from brainfm.data.columns import HasColumns
    from brainfm.data.manifest import Manifest
    from brainfm.data.store import Store
    from brainfm.nets.backbone import Backbone
    from brainfm.nets.exchange.graphs import Graph
    from brainfm.scoring.answers import Score
    from brainfm.tasks.engine import Engine
    from brainfm.tasks.evaluator import Evaluator
    from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase
    from brainfm.tasks.study import Study
    from brainfm.tasks.task import Task
    from brainfm.tasks.whole_head.sorts import Sort


class WholeHead(Kind):
    """What is the same for every sort of answer; see Kind. The rest the sort says (sorts.py)."""

    ending, measured = ".json", "scan"

    def sort(self, spec: TaskSpec) -> Sort:
        """Of the answers."""
        from brainfm.tasks.whole_head.sorts import sort_of

        return sort_of(spec)

    def network(self, spec: TaskSpec, backbone: Backbone, **settings: Any) -> Task:
        from brainfm.tasks.whole_head.network import WholeHeadTask

        return WholeHeadTask(spec, backbone, **settings)

    def study(self, store: Store, settings: Any, *, mirror: Sequence[int], clean: bool) -> Study:
        made: Study = self._part("study", "WholeHeadStudy")(store, settings)
        return made

    def primary(self, spec: TaskSpec) -> tuple[str, bool]:
        return self.sort(spec).primary

    def answer_columns(self, spec: TaskSpec) -> tuple[str, ...]:
        return (spec.target, *(spec.values if self.sort(spec).several else ()))

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        return self.sort(spec).scores(spec)

    def read_column(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        return self.sort(spec).read(session, spec)

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        return self.sort(spec).shortcut_columns(truth, answers, spec)

    def check_output(self, out: Path, inputs: Collection[Path]) -> Path:
        from brainfm.tasks.whole_head.answer import check_answer_file

        return check_answer_file(out)

    def answer(
        self,
        engine: Engine,
        files: Mapping[str, Path],
        reference: str,
        labels: Mapping[str, Path] | None = None,
        like: Path | None = None,
    ) -> Any:
        from brainfm.tasks.whole_head.answer import answer_session

        return answer_session(engine, files, reference, labels)

    def graph(self, members: Sequence[nn.Module], spec: TaskSpec, decisions: Decisions) -> Graph:
        made: Graph = self._part("graph", "head_graph")(members, spec, decisions)
        return made

    def write(self, path: Path, found: Any, like: Path) -> None:
        from brainfm.tasks.whole_head.answer import write_answer

        write_answer(path, found)

    def columns(self, spec: TaskSpec) -> list[str]:
        return self.sort(spec).columns(spec)

    def cells(self, found: Any, spec: TaskSpec, like: Path) -> list[object]:
        cells = found.cells()
        return [cells[column] for column in self.columns(spec)]

    def kept_cells(self, path: Path, spec: TaskSpec, like: Path) -> list[object]:
        from brainfm.tasks.answers import read_answer

        return self.cells(read_answer(path), spec, like)

    def label_column(self, networks: Sequence[Any]) -> str | None:
        from brainfm.tasks.whole_head.label_maps import reads_of

        reads = reads_of(networks)
        return None if reads is None else reads.labels

    def check_labels(self, labels: Mapping[str, Any], networks: Sequence[Any]) -> dict[str, Path]:
        from brainfm.tasks.whole_head.label_maps import check_labels

        return check_labels(labels, networks)

    def note_missing(self, networks: Sequence[Any], which: str) -> None:
        from brainfm.tasks.whole_head.label_maps import note_missing

        note_missing(networks, which)

    def evaluator(self, manifest: Manifest, spec: TaskSpec, *, fresh: bool, empty: str) -> Evaluator:
        made: Evaluator = self._part("evaluate", "AnswerEvaluator")(manifest, spec)
        return made

    def usual_layer(self, layers: Sequence[str]) -> str:
        """All maps that the head pools."""
        return "encoder"

    def explained(
        self, members: Sequence[nn.Module], case: ExplainedCase, index: int | None, decisions: Decisions
    ) -> ExplainedAnswer:
        made: ExplainedAnswer = self._part("explain", "ExplainedHead")(members, case, index, decisions)
        return made

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        return self.sort(spec).about(spec, target, answer)

    def promise(self, spec: TaskSpec) -> str:
        return self.sort(spec).promise(spec)

    def page(self, run: Any) -> Any:
        return self._part("page", "whole_head_page")(run)


class Classification(WholeHead):
    """Which class it is, or which labels it has."""

    name, settings = "classification", ClassificationSettings
    column, second = "classes", "balanced_accuracy"


class Regression(WholeHead):
    """How much it is."""

    name, settings, averaged, signed = "regression", RegressionSettings, "values", True
    column, second = "values", "r"

    def class_index(self, spec: TaskSpec, target: str | int | None) -> int | None:
        if target is not None:
            raise ConfigError(f"class={target}: the bundle answers with a value of {spec.target}, expected no class")
        return None
