"""A task put to a store, as fine-tuning sees it: its cases and patches, how held-out cases are answered and scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfm.data.store import SessionEntry, Store
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.scoring.intervals import Interval
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.settings import FinetuneData, TaskSettings
from brainfm.tasks.task import Task

Row = dict[str, Any]
CHOICE = "choice.json"  # in the folder of a fold, where candidates were chosen among


@dataclass(frozen=True)
class Split:
    """One training run of a cross-validation.

    Attributes:
        repeat, fold: its place.
        trained: cases that the weights are fitted to.
        inner: cases of other subjects that the checkpoint is chosen on; none: the last weights are taken.
        held: cases that are scored and nothing else.
    """

    repeat: int
    fold: int
    trained: tuple[Any, ...]
    inner: tuple[Any, ...]
    held: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"fold{self.fold}" if self.repeat == 0 else f"repeat{self.repeat}_fold{self.fold}"


@dataclass(frozen=True)
class Place:
    """Where and how precisely held-out cases are answered; ``autocast`` None is float32."""

    device: torch.device
    autocast: torch.dtype | None


@dataclass(frozen=True)
class Scored:
    """A set of out-of-fold answers in numbers.

    Attributes:
        metrics: name -> value over cases with its interval, by subject.
        rows: the cases as they are reported, after what was decided.
    """

    metrics: dict[str, Interval]
    rows: list[Row]


@dataclass(frozen=True)
class Decided:
    """What cross-validation decided.

    Attributes:
        decisions: for the bundle, from all held-out cases.
        rows: the held-out rows, each under what the OTHER folds decided: so they can be scored honestly.
        said: a sentence for each thing that was tried.
        calibration: numbers of the reliability plot or of the prediction intervals; JSON-able.
    """

    decisions: Decisions
    rows: list[Row]
    said: tuple[str, ...] = ()
    calibration: dict[str, Any] | None = None


class Study(ABC):
    """A task put to the cases of a store.

    Attributes:
        store: where the scans are.
        spec: of the task; ``settle`` replaces it once patch and view are known.
        cases: the sessions that can answer.
        left_out: a sentence for each session that cannot.
        settings: of the task.
        views: patches that a sample shows.
        primary: name of the score that decides; ``larger_is_better`` says which way.
        takes_decoder: whether its network can begin with a decoder of a backbone's file.
        starts_well: whether the fresh task is worth scoring before its first step.
        notes: sentences about what was found, for the log.
    """

    starts_well: bool = False
    notes: Sequence[str] = ()
    views: int = 1

    store: Store
    spec: TaskSpec
    cases: tuple[Any, ...]
    left_out: tuple[str, ...]
    settings: TaskSettings
    primary: str
    larger_is_better: bool
    takes_decoder: bool = False

    @property
    def counted(self) -> str:
        """The answers that the cases have, for the log, where they can be counted."""
        return ""

    @abstractmethod
    def patch(self, backbone: Backbone, most_voxels: int) -> tuple[int, int, int]:
        """The patch asked for, or chosen from the data with at most this many voxels."""

    @abstractmethod
    def settle(self, patch_vox: tuple[int, int, int]) -> None:
        """Completes ``spec`` for this patch."""

    @abstractmethod
    def task(self, backbone: Backbone, trained: Sequence[Any], pretrained: LoadedBackbone | None = None) -> Task:
        """A fresh task around the backbone, with the statistics of the cases it will be trained on.

        Args:
            pretrained: the file that the backbone's weights come from. Of a task that takes a decoder it is given
                where its decoder and heads are what the task begins with.
        """

    @abstractmethod
    def start(self, task: Task, trained: Sequence[Any], device: torch.device) -> None:
        """What is learned in one go before the first step, if anything."""

    @abstractmethod
    def patches(self, trained: Sequence[Any], seed: int, data: FinetuneData) -> Dataset:
        """What it is trained on."""

    @abstractmethod
    def watch(self, task: Task, cases: Sequence[Any], place: Place) -> float:
        """The primary score of some cases, as the task stands; for curves and for choosing a checkpoint."""

    @abstractmethod
    def each(self, task: Task, cases: Sequence[Any], place: Place) -> list[float]:
        """How good the answer to each case is, as the task stands; larger or smaller is better as the primary score
        has it."""

    @abstractmethod
    def answer(self, task: Task, split: Split, place: Place, folder: Path) -> list[Row]:
        """A JSON-able row for each held-out case, with all that deciding and scoring needs; larger things go into
        files of the folder."""

    def trains(self, split: Split) -> bool:
        """Whether any weights are trained for this split."""
        return True

    def arranged(self, split: Split, seed: int, strata: Mapping[str, str] | None) -> Split:
        """The split with the inner cases that this task needs."""
        return split

    def refitted(self, task: Task, trained: Sequence[Any], place: Place) -> AbstractContextManager[None]:
        """While open, the task is as it is scored and shipped: what is learned in one go has been learned anew."""
        return nullcontext()

    def conclude(
        self, tuned: Task | None, fresh: Callable[[], Task], split: Split, place: Place, folder: Path, seed: int
    ) -> tuple[list[Row], dict[str, Tensor] | None]:
        """`answer`, and the weights that are shipped where they are not those that were trained.

        Args:
            tuned: as its training left it; None where nothing was trained.
            fresh: makes the task with the encoder as it was before.
            seed: of this split.
        """
        assert tuned is not None
        return self.answer(tuned, split, place, folder), None

    @abstractmethod
    def decide(self, rows: Sequence[Row]) -> Decided:
        """Chooses what is done to the answers."""

    @abstractmethod
    def score(self, rows: Sequence[Row], seed: int) -> Scored:
        """The scores of decided rows."""

    @abstractmethod
    def baseline(self, name: str, backbone: Backbone, splits: Sequence[Split], seed: int) -> list[Row]:
        """Decided rows of a baseline without training of a network: ``random_linear``, ``features`` or, where
        `has_volumes`, ``volumes``."""

    def bundle_reads(self, loaded: LoadedBackbone | None) -> dict[str, Any] | None:
        """``reads.json`` of the bundle (whole_head/reads.py), where it needs one."""
        return None

    @property
    def has_volumes(self) -> bool:
        """Whether region volumes of every case are there to answer from."""
        return False

    @abstractmethod
    def audit(self, rows: Sequence[Row], columns: Sequence[str], seed: int) -> dict[str, Any] | None:
        """What can be told of the answer without looking at the brain (study/shortcuts.py), from decided rows of the
        first repeat; None where that cannot be asked."""

    @abstractmethod
    def strata(self) -> dict[str, str] | None:
        """Subject key -> what the folds are balanced in."""

    def compare(self, rows: Sequence[Row], others: Sequence[Row], seed: int) -> dict[str, Any]:
        """Model against a baseline on the same cases: paired difference with interval and p of the primary score."""
        mine, theirs = paired(rows, others)
        return self._compare(mine, theirs, seed)

    @abstractmethod
    def _compare(self, mine: Sequence[Row], theirs: Sequence[Row], seed: int) -> dict[str, Any]: ...


def identity(session: SessionEntry, split: Split) -> Row:
    """The columns that every row begins with."""
    dataset, subject, name = session.key
    return {
        "dataset": dataset, "subject": subject, "session": name, "repeat": split.repeat, "fold": split.fold,
    }  # fmt: skip


def key_of(row: Row) -> tuple[Any, ...]:
    return row["dataset"], row["subject"], row["session"], row["repeat"]


def subjects_of(rows: Sequence[Row]) -> list[str]:
    return [f"{row['dataset']}/{row['subject']}" for row in rows]


def paired(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the cases that both have, in one order."""
    there = {key_of(row): row for row in others}
    mine = [row for row in rows if key_of(row) in there]
    return mine, [there[key_of(row)] for row in mine]


def cases_of(rows: Sequence[Row], cases: Sequence[Any]) -> list[Any]:
    """The case of each row."""
    there = {case.session.key: case for case in cases}
    return [there[row["dataset"], row["subject"], row["session"]] for row in rows]


def fold_key(row: Row) -> str:
    return f"{row['repeat']}/{row['fold']}"
