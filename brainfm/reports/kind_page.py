"""What the page of a fine-tuning asks about the kind of its task: one object, chosen once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from brainfm.data.store import SessionEntry
from brainfm.reports.page import Section
from brainfm.reports.run import FinishedRun

Row = Mapping[str, Any]  # a case of results.json


class KindPage(ABC):
    """Words, tables and pictures of a run that its kind of task decides.

    Attributes:
        balanced: what the folds are balanced in, beside the site.
        baselines: what a baseline is, where it is not the same for every kind.
        inner_loss: what candidates are compared by in inner folds.
        audited: what side information may tell, and how that is asked for.
        method, method_name: of the maps of what mattered.
        nothing: why such a map is empty.
    """

    balanced: tuple[str, ...] = ()
    baselines: ClassVar[Mapping[str, str]] = {}
    inner_loss = "log loss"
    audited: tuple[str, str]
    method: str
    method_name: str
    nothing: str

    def __init__(self, run: FinishedRun) -> None:
        self.run, self.spec = run, run.spec

    @property
    @abstractmethod
    def columns(self) -> tuple[str, str, str]:
        """Heads above `cells`."""

    @abstractmethod
    def cells(self, row: Row) -> tuple[str, str, str]:
        """What is true, what was answered, and how far that is apart."""

    @abstractmethod
    def miss(self, row: Row) -> float:
        """How bad an answer is: the worst case has the largest."""

    @abstractmethod
    def said(self, row: Row) -> str:
        """`cells` as part of a sentence."""

    @abstractmethod
    def conventions(self) -> str:
        """How to read pictures and table of the cases; sentences that begin with a blank."""

    @abstractmethod
    def picture(self, row: Row, entry: SessionEntry) -> bytes:
        """A case as a PNG."""

    @abstractmethod
    def about(self, target: str) -> str:
        """What a map of a target shows."""

    @abstractmethod
    def outline(self, entry: SessionEntry, target: str) -> np.ndarray | None:
        """[X, Y, Z] bool: what a map is held against; None where nothing is known."""

    def cut(self, volume: np.ndarray, heat: np.ndarray) -> tuple[str, tuple[int, int, int] | None]:
        """What more is said of a map that is not empty, and the voxel where it is cut, None: where it is strongest."""
        return "", None

    def map_note(self) -> str:
        """How to read the maps of this kind; sentences that begin with a blank."""
        return ""

    def calibration(self, found: Mapping[str, Any], rows: Sequence[Row]) -> Section | None:
        """How sure the answers are: of results.json its ``calibration`` and its cases."""
        return None
