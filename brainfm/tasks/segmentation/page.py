"""Page of a segmentation: what the report of a fine-tuning says and shows of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from brainfm.data.store import SessionEntry
from brainfm.reports import pictures
from brainfm.reports.kind_page import KindPage, Row
from brainfm.reports.run import FinishedRun
from brainfm.specs import Decisions
from brainfm.tasks.segmentation import cleanup


class SegmentationPage(KindPage):
    """Masks are outlined beside the true ones; cases are ranked by their Dice."""

    baselines: ClassVar[Mapping[str, str]] = {
        "features": "a logistic regression, voxel by voxel, on intensities and position"
    }
    method, method_name = "gradcam", "Grad-CAM"
    nothing = "nothing speaks for it where nothing is predicted"

    def __init__(self, run: FinishedRun) -> None:
        super().__init__(run)
        how = "A map of voxels cannot be asked for, so the label here is the logarithm of the volume of "
        self.audited = ("volume", f"{how}{self.spec.target} in ml. ")

    @property
    def columns(self) -> tuple[str, str, str]:
        return "true, ml", "predicted, ml", "Dice"

    def cells(self, row: Row) -> tuple[str, str, str]:
        return f"{row['true_ml']:.2f}", f"{row['predicted_ml']:.2f}", f"{row['dice']:.3f}"

    def miss(self, row: Row) -> float:
        return -float(row["dice"])

    def said(self, row: Row) -> str:
        return f"Dice {row['dice']:.3f}, {row['true_ml']:.1f} ml true, {row['predicted_ml']:.1f} ml predicted"

    def conventions(self) -> str:
        if len(self.spec.values) <= 2:
            return ""
        return " Every label is outlined; Dice is the mean over labels, volumes are of all labels together."

    def picture(self, row: Row, entry: SessionEntry) -> bytes:
        truth, answer = self.truth(entry), self.predicted(row)
        assert truth is not None
        return pictures.overlay_figure(
            self.run.shown(entry)[0], truth, answer, spacing_mm=self.run.store.spec.spacing_mm,
            titles=("True", "Predicted"),
        )  # fmt: skip

    def about(self, target: str) -> str:
        return f"what speaks for {self.spec.target}" + (f" label {target}" if len(self.spec.values) > 2 else "")

    def outline(self, entry: SessionEntry, target: str) -> np.ndarray | None:
        truth = self.truth(entry)
        return truth if truth is None or truth.dtype == bool else truth == int(target)

    def truth(self, entry: SessionEntry) -> np.ndarray | None:
        """[X, Y, Z] label values of the target, or a mask; what the task does not know is 0."""
        names = (f"{self.spec.target}_mask", f"{self.spec.target}_labels")
        label = next((e.name for e in entry.labels if e.name in names), None)
        if label is None:
            return None
        volume = self.run.store.volume(entry, label)
        return (volume != 0) if label.endswith("_mask") else np.where(np.isin(volume, self.spec.values), volume, 0)

    def predicted(self, row: Row) -> np.ndarray:
        """[X, Y, Z] label values that the row's scores are of."""
        decisions = Decisions.from_dict(row["decisions"])
        with np.load(self.run.folder / row["file"], allow_pickle=False) as saved:
            indices = saved["indices"][1 if decisions.mirror else 0]
        spacing_mm = self.run.store.spec.spacing_mm
        return np.asarray(self.spec.values)[cleanup.apply(indices, decisions, spacing_mm)]
