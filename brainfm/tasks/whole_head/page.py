"""Page of answers for a whole head: what the report of a fine-tuning says of classes, several labels, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brainfm.data.store import SessionEntry
from brainfm.errors import ScanError
from brainfm.imaging.descriptors import head_mask
from brainfm.reports import charts, pictures
from brainfm.reports.kind_page import KindPage, Row
from brainfm.reports.page import Section
from brainfm.reports.run import FinishedRun
from brainfm.reports.wording import number
from brainfm.tasks.explained import share_inside


def whole_head_page(run: FinishedRun) -> KindPage:
    """The page's part for a run whose task answers for a whole head."""
    return _BY_ANSWER[run.spec.mode or run.spec.kind](run)


class WholeHeadPage(KindPage):
    """Heads are shown in three planes, with the lesion that guided training where one is known."""

    balanced = ("the answer",)
    audited = ("answer", "")
    method, method_name = "hirescam", "HiResCAM"
    nothing = "nothing speaks for it"

    def said(self, row: Row) -> str:
        true, answered, _ = self.cells(row)
        unit = f" {self.spec.unit}" if self.spec.unit else ""
        return f"true {true}{unit}, answered {answered}{unit}"

    def conventions(self) -> str:
        return ""

    def picture(self, row: Row, entry: SessionEntry) -> bytes:
        volume, _ = self.run.shown(entry)
        return pictures.slices_figure(
            [("", volume)], contours=[self.outline(entry, "")], spacing_mm=self.run.store.spec.spacing_mm
        )

    def about(self, target: str) -> str:
        return f"what speaks for {self.spec.target} {target}"

    def outline(self, entry: SessionEntry, target: str) -> np.ndarray | None:
        """The mask that guided the task, where the session has one."""
        return self.run.mask(entry, f"{self.run.found['config']['task'].get('lesion')}_mask")

    def cut(self, volume: np.ndarray, heat: np.ndarray) -> tuple[str, tuple[int, int, int] | None]:
        """Within the head: outside it there is nothing to see."""
        head = _head(volume)
        x, y, z = np.unravel_index(int((np.abs(heat) * head).argmax()), head.shape)
        said = f"; {1 - share_inside(heat, head):.0%} of the map lies outside the head"
        return said, (int(x), int(y), int(z))

    def map_note(self) -> str:
        against = "the shortcuts" if self.run.found.get("audit") else "what else could tell the answer"
        return (
            " The planes cut the head where the map is strongest. What lies outside the head is no anatomy: compare "
            f"it with {against}."
        )


class ClassPage(WholeHeadPage):
    """One class of several, in order or not."""

    @property
    def columns(self) -> tuple[str, str, str]:
        return "true", "answered (probability)", "probability missed"

    def cells(self, row: Row) -> tuple[str, str, str]:
        top = int(np.argmax(row["answer"]))
        answered = f"{self.spec.values[top]} ({row['answer'][top]:.2f})"
        return str(self.spec.values[int(row["truth"][0])]), answered, f"{self.miss(row):.2f}"

    def miss(self, row: Row) -> float:
        return 1 - float(row["answer"][int(row["truth"][0])])

    def conventions(self) -> str:
        return " Probability missed: 1 less the probability of the true class."

    def calibration(self, found: Mapping[str, Any], rows: Sequence[Row]) -> Section | None:
        text = (
            "On the diagonal of the plot, what is said with a probability of 70 % is right 7 times in 10. Expected "
            f"calibration error: {number(found['ece_before'])} as the networks answer"
        )
        text += (
            f", {number(found['ece_after'])} after a temperature fitted on the other folds, which was kept (the bundle "
            f"divides its logits by {found['temperature']:.2f})." if found["kept"] else
            "; scaling with a temperature was not kept."
        )  # fmt: skip
        figure = charts.reliability_figure(found["reliability"], *self.reliability_labels())
        caption = "Held-out answers in bins; beside a point: how many"
        return Section("How sure it is", text, figures=((caption, figure),))

    def reliability_labels(self) -> tuple[str, str]:
        """Names of the axes: what is said, what is right."""
        if len(self.spec.values) == 2:
            return f"probability of {self.spec.values[1]}", f"share that is {self.spec.values[1]}"
        return "probability of the class that is answered", "share that is right"


class LabelsPage(ClassPage):
    """Several labels, each of which is there or not, or unknown."""

    def cells(self, row: Row) -> tuple[str, str, str]:
        true = ", ".join(v for v, t in zip(self.spec.values, row["truth"]) if t) or "none"
        answered = ", ".join(f"{v} {a:.2f}" for v, a in zip(self.spec.values, row["answer"]))
        return true, answered, f"{self.miss(row):.2f}"

    def miss(self, row: Row) -> float:
        return float(np.mean([abs(a - t) for a, t in zip(row["answer"], row["truth"]) if t is not None] or [0.0]))

    def conventions(self) -> str:
        return " Probability missed: 1 less the probability of the true class, the mean over labels."

    def reliability_labels(self) -> tuple[str, str]:
        return "probability of a label", "share that has it"


class ValuePage(WholeHeadPage):
    """A number with a unit."""

    def __init__(self, run: FinishedRun) -> None:
        super().__init__(run)
        self.inner_loss = f"mean absolute error{f' ({self.spec.unit})' if self.spec.unit else ''}"

    @property
    def columns(self) -> tuple[str, str, str]:
        unit = f", {self.spec.unit}" if self.spec.unit else ""
        return f"true{unit}", f"answered{unit}", f"error{unit}"

    def cells(self, row: Row) -> tuple[str, str, str]:
        truth, answer = row["truth"][0], row["answer"][0]
        decimals = 1 if max(abs(truth), abs(answer)) >= 10 else 3
        return f"{truth:.{decimals}f}", f"{answer:.{decimals}f}", f"{self.miss(row):.{decimals}f}"

    def miss(self, row: Row) -> float:
        return float(abs(row["answer"][0] - row["truth"][0]))

    def about(self, target: str) -> str:
        return f"red raises the answer ({target}), blue lowers it"

    def calibration(self, found: Mapping[str, Any], rows: Sequence[Row]) -> Section | None:
        unit = f" {self.spec.unit}" if self.spec.unit else ""
        coverage = (
            "there are too few cases to check how often it holds the truth" if found["coverage"] is None else
            f"intervals made from the other folds' errors held the truth in {found['coverage']:.0%} of the held-out "
            "cases"
        )  # fmt: skip
        text = (
            f"Too few cases for a prediction interval of {found['level']:.0%}." if found["half_width"] is None else
            f"The {found['level']:.0%} prediction interval is the answer ± {found['half_width']:.3g}{unit} "
            f"(conformal); {coverage}."
        )  # fmt: skip
        if len({row["fold"] for row in rows}) > 1:
            did = "was kept" if found["kept"] else "was not kept"
            text += (
                "\n\nAnswers of a regression are pulled towards the mean of its training cases. Undoing that (answer = "
                f"a + b · truth, fitted on the other folds) moved the mean absolute error from "
                f"{found['mae_before']:.3g} to {found['mae_after']:.3g}{unit} and {did}."
            )
        truth, answers = [row["truth"][0] for row in rows], [row["answer"][0] for row in rows]
        figure = charts.scatter_figure(truth, answers, unit=self.spec.unit, half_width=found["half_width"])
        caption = "Held-out cases; line: equality, band: prediction interval"
        return Section("How far off", text, figures=((caption, figure),))


_BY_ANSWER: dict[str, type[WholeHeadPage]] = {
    "exclusive": ClassPage,
    "ordinal": ClassPage,
    "classification": ClassPage,
    "multilabel": LabelsPage,
    "regression": ValuePage,
}


def _head(volume: np.ndarray) -> np.ndarray:
    try:
        return head_mask({"": volume})
    except ScanError:  # one value everywhere
        return np.ones(volume.shape, dtype=bool)
