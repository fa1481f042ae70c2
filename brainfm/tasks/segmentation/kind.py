"""Segmentation as a kind of task: a class for every voxel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.kind import Kind, pick
from brainfm.tasks.segmentation.settings import SegmentationSettings

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from brainfm.data.manifest import Manifest, Scan
    from brainfm.data.store import Store
    from brainfm.nets.backbone import Backbone
    from brainfm.nets.exchange.graphs import Graph
    from brainfm.tasks.answers import Label
    from brainfm.tasks.engine import Engine
    from brainfm.tasks.evaluator import Evaluator
    from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase
    from brainfm.tasks.study import Study
    from brainfm.tasks.task import Task


class Segmentation(Kind):
    """See Kind."""

    name, settings, ending = "segmentation", SegmentationSettings, ".nii.gz"
    measured, voxelwise = "segmentation", True

    def network(self, spec: TaskSpec, backbone: Backbone, **settings: Any) -> Task:
        from brainfm.tasks.segmentation.network import SegmentationTask

        return SegmentationTask(spec, backbone, **settings)

    def study(self, store: Store, settings: Any, *, mirror: Sequence[int], clean: bool) -> Study:
        made: Study = self._part("study", "SegmentationStudy")(store, settings, mirror, clean)
        return made

    def primary(self, spec: TaskSpec) -> tuple[str, bool]:
        return "dice", True

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        """Of volumes in ml, which are spread over orders of magnitude: their logarithms."""
        import numpy as np

        return False, [("", np.log1p(np.maximum(truth, 0)), np.log1p(np.maximum(answers, 0)))]

    def check_output(self, out: Path, inputs: Collection[Path]) -> Path:
        from brainfm.tasks.answers import check_volume

        return check_volume(out, inputs)

    def answer(
        self,
        engine: Engine,
        files: Mapping[str, Path],
        reference: str,
        labels: Mapping[str, Path] | None = None,
        like: Path | None = None,
    ) -> Any:
        from brainfm.imaging import nifti
        from brainfm.tasks.segmentation import answer

        return answer.answer(engine, files, reference, None if like is None else nifti.read_header(like).grid)

    def graph(self, members: Sequence[nn.Module], spec: TaskSpec, decisions: Decisions) -> Graph:
        made: Graph = self._part("graph", "window_graph")(members, spec)
        return made

    def write(self, path: Path, found: Any, like: Path) -> None:
        from brainfm.imaging.nifti import write_mask

        write_mask(path, found, like)

    def columns(self, spec: TaskSpec) -> list[str]:
        return ["grid"]

    def cells(self, found: Any, spec: TaskSpec, like: Path) -> list[object]:
        return [str(like)]

    def kept_cells(self, path: Path, spec: TaskSpec, like: Path) -> list[object]:
        return [str(like)]

    def label_of(self, scans: Sequence[Scan], target: str) -> Label | None:
        from brainfm.tasks.answers import label_of

        return label_of(scans, target)

    def evaluator(self, manifest: Manifest, spec: TaskSpec, *, fresh: bool, empty: str) -> Evaluator:
        made: Evaluator = self._part("evaluate", "MaskEvaluator")(manifest, spec, fresh=fresh, empty=empty)
        return made

    def class_index(self, spec: TaskSpec, target: str | int | None) -> int | None:
        return None if target is None else pick(spec, target, first=1)  # never the background

    def usual_layer(self, layers: Sequence[str]) -> str:
        """The deepest of the encoder: finer ones say little but the mask."""
        return [name for name in layers if name.startswith("encoder.")][-1]

    def explained(
        self, members: Sequence[nn.Module], case: ExplainedCase, index: int | None, decisions: Decisions
    ) -> ExplainedAnswer:
        made: ExplainedAnswer = self._part("explain", "ExplainedVoxels")(members, case, index)
        return made

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        label = spec.target if len(spec.values) == 2 else f"{spec.target} {target}"
        return f"{label}, {answer:.3g} ml predicted"

    def promise(self, spec: TaskSpec) -> str:
        values = ", ".join(str(v) for v in spec.values)
        return f"where `{spec.target}` is, label values {values} (0 is the background), on the grid of the scan given"

    def page(self, run: Any) -> Any:
        return self._part("page", "SegmentationPage")(run)
