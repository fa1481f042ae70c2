"""Questions of a comparison: a task put to the store, who answers it from frozen maps, and who is fine-tuned for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.comparison.contenders import VOLUMES, Contender
from brainfm.comparison.frozen import column_answers, mask_answers
from brainfm.comparison.people import People, dealt
from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.probing.table import ProbeTableSpec, ask
from brainfm.tasks.registry import KINDS, kind_of
from brainfm.tasks.study import Row, Split, Study
from brainfm.training.finetune import HELD, MEMBER, answered
from brainfm.training.loop import CHECKPOINT, first_difference
from brainfm.training.settings import FinetuneSettings

SALT = "comparison"
_HEAVY = ("held", CHECKPOINT, MEMBER, HELD)  # of a finished fold, whose answers are recorded


@dataclass(frozen=True)
class Question:
    """A task put to the store.

    Attributes:
        target: as it was asked for.
        finetune: how models are fine-tuned for it, without a run, a seed or a start.
        study: with the cases that have an answer.
        people: of these.
    """

    target: str
    finetune: FinetuneSettings
    study: Study
    people: People

    @property
    def is_mask(self) -> bool:
        """Whether voxels are asked, and not a column of the manifest."""
        return not kind_of(self.study.spec.kind).column

    @property
    def primary(self) -> tuple[str, bool]:
        """The score, and whether larger is better."""
        return self.study.primary, self.study.larger_is_better

    def sessions(self, people: Collection[str]) -> list[SessionEntry]:
        return [case.session for case in self.study.cases if case.session.subject_key in people]

    def trains(self, people: Sequence[str]) -> bool:
        """Whether any weights are trained for so many people, so that there is a rate to be chosen."""
        return self.study.trains(self._split(self.study, people, ()))

    def frozen(
        self,
        contender: Contender,
        file: Path | None,
        seed: int,
        people: tuple[Sequence[str], Sequence[str]],
        kept: Path,
        device: str = "auto",
    ) -> list[Row] | None:
        """Answers to the second people of linear models fitted on the first; None where this model has none.

        Args:
            file: the backbone file; None of a network that is not trained.
            kept: file of the whole heads' features.
        """
        if self.is_mask:
            if contender.network is None:
                return None
            return mask_answers(self.study, contender.network, file, seed, people, device)
        return column_answers(self.study, contender.network, file, seed, people, kept, device)

    def tuned(
        self,
        contender: Contender,
        file: Path | None,
        seed: int,
        rate: float,
        people: tuple[Sequence[str], Sequence[str]],
        folder: Path,
    ) -> list[Row] | None:
        """Answers to the second people of the model fine-tuned on the first; None where it was interrupted.

        Args:
            folder: of this run.
        """
        settings = replace(
            self.finetune,
            run=folder,
            seed=seed,
            optim=replace(self.finetune.optim, lr=rate),
            backbone_from="none" if file is None else str(file),
        )
        if contender.network is not None:
            settings = replace(settings, backbone=contender.network)
        own = {"candidates": (VOLUMES,)} if contender.network is None else {"volumes": "none"}
        if {each.name for each in fields(settings.task)} >= own.keys():  # answers for whole heads choose among these
            settings = replace(settings, task=replace(settings.task, **own))
        studies: list[Study] = []

        def choose(study: Study) -> Split:
            studies.append(study)
            return study.arranged(self._split(study, *people), seed, study.strata())

        rows = answered(settings, choose)
        if rows is None:
            return None
        decided = studies[0].decide(rows).rows
        for name in _HEAVY:
            place = folder / "fold0" / name
            shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)
        score = studies[0].primary
        return [told(row, row.get(score)) for row in decided]

    def _split(self, study: Study, trained: Collection[str], held: Collection[str]) -> Split:
        of = [tuple(case for case in study.cases if case.session.subject_key in who) for who in (trained, held)]
        return Split(0, 0, of[0], (), of[1])


def told(row: Mapping[str, Any], score: float | None) -> Row:
    """What is recorded of an answer: the case and its score, or the truth and what was said."""
    who = {"subject": f"{row['dataset']}/{row['subject']}", "session": row["session"]}
    return who | ({"truth": row["truth"], "answer": row["answer"]} if score is None else {"score": score})


def kind_in(store: Store, target: str, contrasts: Sequence[str] | None) -> str:
    """Of masks where there is a label of this name, else of a column as a probe would have it.

    Raises: ManifestError where there is neither, naming what there is; ConfigError.
    """
    labels = {label.name for session in store.sessions for label in session.labels}
    there = {scan.contrast for session in store.sessions for scan in session.scans}
    strange = [contrast for contrast in contrasts or () if contrast not in there]
    if strange:
        raise ManifestError(f"contrasts: {store.path} has no {strange[0]}, expected some of {', '.join(sorted(there))}")
    if labels & {f"{target}_labels", f"{target}_mask"}:
        return next(name for name in KINDS if not kind_of(name).column)
    if not any(session.columns.get(target) for session in store.sessions):
        columns = sorted({name for session in store.sessions for name in session.columns})
        raise ManifestError(
            f"tasks: {store.path} has no column {target}, {target}_labels or {target}_mask; expected one of "
            f"{', '.join([*columns, *sorted(labels)]) or 'none'}"
        )
    return ask(store, ProbeTableSpec(target), contrasts).spec.kind


def question_of(
    target: str, finetune: FinetuneSettings, store: Store, sides: Mapping[str, str], inner: int, most: int
) -> Question:
    """The task put to the store.

    Args:
        sides: key of a person -> train or held.
        inner: people that rates are tried on.
        most: held people that masks are tested on; 0: all.

    Raises: BrainfmError where it cannot be asked.
    """
    study = kind_of(finetune.task.kind).study(store, finetune.task, mirror=finetune.mirror, clean=finetune.clean)
    there = {case.session.subject_key for case in study.cases}
    known = {key: side for key, side in sides.items() if key in there}
    limited = most or None if not kind_of(study.spec.kind).column else None
    people = dealt(known, SALT, trial=inner, held=limited)
    if not people.held or not people.pool:
        counts = [sum(side == name for side in known.values()) for name in ("train", "held")]
        raise ConfigError(
            f"tasks: {target} is known of {counts[0]} people of the training side, of whom inner={inner} are tried on, "
            f"and of {counts[1]} held out; expected more of both"
        )
    return Question(target, finetune, study, people)


def record(file: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished run has left. Raises: ConfigError where it was asked something else."""
    if not file.exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    differing = first_difference(found["asked"], json.loads(json.dumps(asked)))
    if differing is not None:
        key, old, new = differing
        raise ConfigError(f"{file}: was made with {key}={old}, found {key}={new}: use another out=, or the same values")
    return found


def score_of(question: Question, rows: Sequence[Row]) -> float:
    """The primary score of the answers of one run."""
    truth, answers = arrays(question, rows)
    if truth is None:
        return float(np.mean(answers))
    return float(metric_of(question)(truth, answers))


def metric_of(question: Question) -> Any:
    """Of truth and answers in a column."""
    spec = question.study.spec
    return kind_of(spec.kind).scores(spec)[question.primary[0]]


def arrays(question: Question, rows: Sequence[Row]) -> tuple[np.ndarray | None, np.ndarray]:
    """Truth [S] and answers [S, ...]; of masks None and scores [S]."""
    if "score" in rows[0]:
        return None, np.array([row["score"] for row in rows], np.float64)
    truth = np.array([row["truth"][0] for row in rows], np.float64)
    answers = np.array([row["answer"] for row in rows], np.float64)
    return (truth.astype(np.int64), answers) if question.study.spec.values else (truth, answers[:, 0])
