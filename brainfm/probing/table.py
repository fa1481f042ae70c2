"""Probe table: what frozen features know of a column of the manifest, next to chance and a random network.

Nearest neighbours, and a logistic or a ridge regression, on the pooled features of whole heads: tuned and tested by
subject (scoring/linear), with intervals over subjects. A network that was never trained is probed in the same way,
because random convolutions already tell ages and sexes apart: what pre-training taught is the difference to that row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm import seeds
from brainfm.data.columns import Unusable, cell, who
from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.files import check_writable, write_table, write_text
from brainfm.nets.backbone_file import load_backbone
from brainfm.probing import brainmarks
from brainfm.probing.features import TOKEN, WHOLE_HEADS, Embedding, Encoder, Extent, embed, read, write
from brainfm.scoring import linear
from brainfm.scoring.answers import Score
from brainfm.scoring.folds import folds_by_answer
from brainfm.scoring.intervals import Interval, bootstrap, paired_bootstrap, paired_permutation
from brainfm.seen import overlap
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import KINDS, kind_of

TABLE = "table.csv"
SCORES = "scores.json"
RANDOM = "random network"
CHANCE = "nothing"
_KINDS = ("auto", *(name for name in KINDS if kind_of(name).column))
_FEW_VALUES = 10  # of a column of numbers that is still one of classes
_NAMED = 3  # sessions named in one sentence

Key = tuple[str, str, str]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ProbeTableSpec:
    """What is asked, and how.

    Attributes:
        target: a column of the manifest.
        kind: ``classification``, ``regression``, or ``auto``: more than ten different numbers are regression.
        folds: of the cross-validation, by subject.
        repeats: cross-validations, each with other folds; scores are means over them.
        seed: of the folds, the bootstrap and the random network.
        random: whether a random network is probed too.
        resamples: cohorts of an interval's bootstrap.
        protocol: ``nested`` (this module's), or ``brainmarks`` (probing/brainmarks.py), which leaves folds and repeats
            aside.
    """

    target: str
    kind: str = "auto"
    folds: int = 5
    repeats: int = 3
    seed: int = 0
    random: bool = True
    resamples: int = 2000
    protocol: str = "nested"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ConfigError(f"kind={self.kind}: expected one of {', '.join(_KINDS)}")
        if self.protocol not in ("nested", "brainmarks"):
            raise ConfigError(f"protocol={self.protocol}: expected nested or brainmarks")
        if self.folds < 2:
            raise ConfigError(f"folds={self.folds}: expected 2 or more")
        if self.repeats < 1:
            raise ConfigError(f"repeats={self.repeats}: expected 1 or more")
        if self.resamples < 1:
            raise ConfigError(f"resamples={self.resamples}: expected 1 or more")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: expected 0 or more")


@dataclass(frozen=True)
class ProbedColumn:
    """A column as a asked.

    Attributes:
        spec: kind, target, and the classes.
        sessions: that have an answer.
        truth: [S] class indices (int64) or values (float64).
        left_out: sentences, each with a number and names.
    """

    spec: TaskSpec
    sessions: tuple[SessionEntry, ...]
    truth: np.ndarray
    left_out: tuple[str, ...]

    @property
    def subjects(self) -> list[str]:
        """[S] whose each session is."""
        return [session.subject_key for session in self.sessions]


@dataclass(frozen=True)
class ProbeRow:
    """One model on one set of features.

    Attributes:
        features: the part of the latent, or what else was looked at.
        model: ``knn``, ``logistic``, ``ridge``; of chance ``prior`` or ``mean``.
        scores: means over the repeats.
        intervals: of the primary score and a second one, over subjects.
        minus_random: the primary score minus the random network's with the same model, where there is one.
        p_random: of that difference, by exchanging both models' answers.
    """

    features: str
    model: str
    scores: dict[str, float]
    intervals: dict[str, Interval]
    minus_random: Interval | None = None
    p_random: float | None = None


@dataclass(frozen=True)
class ProbeTable:
    """What `probe` found."""

    asked: ProbedColumn
    rows: tuple[ProbeRow, ...]
    notes: tuple[str, ...]


def probe(
    store: PathLike | Store,
    out: PathLike,
    spec: ProbeTableSpec,
    *,
    backbone: PathLike | None = None,
    features: PathLike | Embedding | None = None,
    contrasts: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    extent: Extent = WHOLE_HEADS,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ProbeTable:
    """Probes features and writes ``table.csv`` and ``scores.json``.

    Args:
        store: has the column; with ``backbone`` also the scans.
        out: a folder. Features that are made here are kept in it, and used again by the next call that needs the same.
        backbone, features: one of them; ``features`` is what `features.write` left. Of features whose file names its
            backbone the random network is made all the same.
        contrasts, parts, extent, device: see `features.embed`. Features of a session's scans are averaged.
        progress: called with (scans embedded, scans in all).

    Raises:
        ConfigError: neither or both of backbone and features; one class, a constant, fewer subjects than folds.
        ManifestError: no session has the column, or an age is impossible.
        WeightsError, StoreError: as `features.embed`.
    """
    if (backbone is None) == (features is None):
        raise ConfigError("brainfm probe needs either backbone=FILE or features=FILE, found both or neither")
    folder = Path(out)
    check_writable(folder)
    store = store if isinstance(store, Store) else Store.open(Path(store))
    asked = ask(store, spec, contrasts)
    check_enough(asked, spec.folds)

    def embedded(encoder: Encoder, name: str) -> Embedding:
        return _kept(folder, name, encoder, store, asked, contrasts, extent, device, progress)

    known = None
    if features is None:
        loaded = load_backbone(str(backbone))
        known, found = loaded.subjects, embedded(Encoder.load(loaded, parts), "features")
    else:
        found = features if isinstance(features, Embedding) else read(features)
    notes = [found.about["note"]] if "note" in found.about else []
    asked, places = _matched(asked, found.rows)
    check_enough(asked, spec.folds)
    seen = overlap(known, asked.subjects)
    notes += [str(seen)] if seen is not None else []
    by_name = {part: _averaged(values, places) for part, values in found.parts.items() if not parts or part in parts}
    if not by_name:
        raise ConfigError(f"parts={', '.join(parts or ())}: the features have only {', '.join(found.parts)}")
    if spec.random and "backbone" not in found.about:
        notes.append("no random network to compare with: the features do not say which backbone made them")
    elif spec.random:
        random = embedded(Encoder.random(found.about["backbone"], spec.seed), "random")
        shown = {found.rows[place] for some in places for place in some}
        chosen = [place for place, row in enumerate(random.rows) if row in shown]
        rows = tuple(random.rows[place] for place in chosen)
        for part, values in random.parts.items():
            by_name[_twin(part)] = _averaged(values[chosen], _matched(asked, rows)[1])
    if spec.protocol == "brainmarks":
        rows_found, said = _brainmarks(asked, by_name, spec)
        notes.append(said)
    else:
        rows_found = tuple(_rows(asked, by_name, spec))
    table = ProbeTable(asked, rows_found, tuple(notes))
    write_table(folder / TABLE, *_csv(table))
    document = _document(table, spec, found.about)
    document["seen_in_pretraining"] = "unknown" if seen is None else seen.to_dict()
    write_text(folder / SCORES, json.dumps(document, indent=1) + "\n")
    return table


# ------------------------------------------------------------------------------------------------------ the asked


def ask(store: Store, spec: ProbeTableSpec, contrasts: Sequence[str] | None = None) -> ProbedColumn:
    """The column as a asked, and who can answer it.

    Raises: ManifestError, ConfigError as `probe`.
    """
    sessions = [s for s in store.sessions if any(contrasts is None or scan.contrast in contrasts for scan in s.scans)]
    cells = {s.key: text for s in sessions if (text := cell(s, spec.target)) is not None}
    if not cells:
        there = sorted({column for session in store.sessions for column in session.columns})
        raise ManifestError(
            f"{store.path}: no session has a value in column {spec.target}; columns in the store: "
            f"{', '.join(there) or 'none'}"
        )
    numbers = [text for text in cells.values() if _is_number(text)]
    kind = spec.kind
    if kind == "auto":
        many = len(set(numbers)) > _FEW_VALUES and len(numbers) >= 0.9 * len(cells)
        kind = next(name for name in KINDS if kind_of(name).column == ("values" if many else "classes"))
    classes: tuple[str, ...] = ()
    of_classes = kind_of(kind).column == "classes"
    if of_classes:
        spelt: dict[str, Counter[str]] = {}
        for text in cells.values():
            spelt.setdefault(text.casefold(), Counter())[text] += 1
        found = [min(c, key=lambda text: (-c[text], text)) for c in spelt.values()]
        classes = tuple(sorted(found, key=float) if all(map(_is_number, found)) else sorted(found))
        subjects = len({s.subject_key for s in sessions if s.key in cells})
        if len(classes) > max(_FEW_VALUES, subjects // 2):
            raise ConfigError(
                f"{store.path}: column {spec.target} has {len(classes)} different values in {subjects} subjects, "
                "expected classes, or numbers with kind=regression"
            )
    there = sorted({scan.contrast for session in sessions for scan in session.scans})
    shown = tuple(contrast for contrast in there if contrasts is None or contrast in contrasts)
    mode = "exclusive" if of_classes else ""
    task = TaskSpec(kind, spec.target, shown, classes, (0, 0, 0), mode=mode)
    kept, truth = [], []
    empty: list[tuple[SessionEntry, str]] = []
    strange: list[tuple[SessionEntry, str]] = []
    for session in sessions:
        try:
            answer = kind_of(kind).read_column(session, task)
        except Unusable as reason:
            (strange if session.key in cells else empty).append((session, str(reason)))
            continue
        kept.append(session)
        truth.append(float(answer[0]))
    left_out = []
    if empty:
        left_out.append(f"{len(empty)} of {len(sessions)} sessions have no {spec.target}: {_named(empty)}")
    if strange:
        left_out.append(f"{len(strange)} of {len(sessions)} sessions cannot be read, e.g. {strange[0][1]}")
    return ProbedColumn(task, tuple(kept), np.array(truth), tuple(left_out))


def check_enough(asked: ProbedColumn, folds: int) -> None:
    """Raises: ConfigError where nothing can be learnt, or not with so many folds."""
    truth, subjects, target = asked.truth, len(set(asked.subjects)), asked.spec.target
    if len(np.unique(truth)) < 2:
        value = asked.spec.values[int(truth[0])] if asked.spec.values else f"{truth[0]:g}"
        expected = "two classes or more" if asked.spec.values else "values that differ"
        raise ConfigError(f"column {target} is {value} in all {len(truth)} sessions, expected {expected}")
    if subjects < folds:
        raise ConfigError(f"folds={folds}: expected at most the {subjects} subjects that have {target}")


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _named(sessions: Sequence[tuple[SessionEntry, str]]) -> str:
    names = [who(session) for session, _ in sessions]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


# ------------------------------------------------------------------------------------------------------ the features


def _kept(
    folder: Path,
    name: str,
    encoder: Encoder,
    store: Store,
    asked: ProbedColumn,
    contrasts: Sequence[str] | None,
    extent: Extent,
    device: str,
    progress: Callable[[int, int], None],
) -> Embedding:
    """Features from the folder, where an earlier call left the same ones, else made now; the file's name tells."""
    keys = {session.key for session in asked.sessions}
    what = [encoder.about, encoder.parts, store.fingerprint(), sorted(keys), contrasts, asdict(extent)]
    mark = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
    file = folder / f"{name}-{mark}.npz"
    if not file.is_file():
        found = embed(
            encoder, store, contrasts=contrasts, sessions=keys, extent=extent, device=device, progress=progress
        )
        write(found, file)
    return read(file)


def _matched(asked: ProbedColumn, rows: Sequence[Sequence[str]]) -> tuple[ProbedColumn, list[list[int]]]:
    """The asked to the sessions that have features, and for each the rows of its scans.

    Raises: ConfigError where none has.
    """
    shown = set(asked.spec.contrasts)
    of: dict[Key, list[int]] = {}
    for place, (dataset, subject, session, _, contrast) in enumerate(rows):
        if contrast in shown:
            of.setdefault((dataset, subject, session), []).append(place)
    has = [session.key in of for session in asked.sessions]
    if not any(has):
        raise ConfigError(f"none of the {len(has)} sessions with {asked.spec.target} has a row in the features")
    without = [(session, "") for session, there in zip(asked.sessions, has) if not there]
    said = (f"{len(without)} sessions with {asked.spec.target} have no features: {_named(without)}",)
    sessions = tuple(session for session, there in zip(asked.sessions, has) if there)
    left_out = asked.left_out + (said if without else ())
    return replace(asked, sessions=sessions, truth=asked.truth[has], left_out=left_out), [
        of[session.key] for session in sessions
    ]


def _averaged(values: np.ndarray, places: Sequence[Sequence[int]]) -> np.ndarray:
    """[S, F]: the mean over each session's scans."""
    return np.stack([values[list(some)].astype(np.float64).mean(axis=0) for some in places])


# --------------------------------------------------------------------------------------------------------- the table


def _rows(asked: ProbedColumn, by_name: Mapping[str, np.ndarray], spec: ProbeTableSpec) -> Iterator[ProbeRow]:
    """Chance first, then the random network, then the parts."""
    task, truth, subjects = asked.spec, asked.truth, asked.subjects
    y = truth.astype(np.int64) if task.values else truth
    strata = [str(value) for value in y] if task.values else None
    # Each repeat deals other folds, the same ones to every model.
    numbers = [int(seeds.stream(spec.seed, "probe folds", r).integers(2**31)) for r in range(spec.repeats)]
    dealt = [folds_by_answer(subjects, y, spec.folds, number) for number in numbers]
    main = kind_of(task.kind).primary(task)[0]
    yield _row(asked, CHANCE, "prior" if task.values else "mean", _guesses(y, subjects, dealt, task), strata, spec)
    random: dict[tuple[str, str], np.ndarray] = {}
    twins = (RANDOM, _twin(TOKEN))
    for name in sorted(by_name, key=lambda name: name not in twins):
        for model in ("knn", "logistic" if task.values else "ridge"):
            answers = np.stack(
                [
                    linear.nested(by_name[name], y, subjects, folds, model, number, classes=len(task.values) or None)
                    for folds, number in zip(dealt, numbers)
                ],
                axis=1,
            )
            row = _row(asked, name, model, answers, strata, spec)
            if name in twins:
                random[name, model] = answers
            elif (_twin(name), model) in random:
                metric = _over_repeats(kind_of(task.kind).scores(task)[main])
                pair = (metric, truth, answers, random[_twin(name), model], subjects, spec.seed)
                apart = paired_bootstrap(*pair, strata, spec.resamples)
                row = replace(row, minus_random=apart, p_random=paired_permutation(*pair))
            yield row


def _brainmarks(
    asked: ProbedColumn, by_name: Mapping[str, np.ndarray], spec: ProbeTableSpec
) -> tuple[tuple[ProbeRow, ...], str]:
    """The rows of that protocol, and a sentence about its split."""
    task, who = asked.spec, asked.subjects
    y = asked.truth.astype(np.int64) if task.values else asked.truth
    split = brainmarks.split_of(who, y, bool(task.values), spec.seed)
    truth, tested = y[split.test], [who[row] for row in split.test]
    strata = [str(value) for value in truth] if task.values else None
    kind = kind_of(task.kind)
    scores = dict(kind.scores(task)) | ({} if task.values else {"r2": brainmarks.r2})
    main = kind.primary(task)[0]
    shown = (main, kind.second, *(() if task.values else ("r2",)))
    model = "logistic_cv" if task.values else "ridge_cv"
    random: dict[str, np.ndarray] = {}
    rows = []
    twins = (RANDOM, _twin(TOKEN))
    for name, answers in brainmarks.asked_in_turn(by_name, y, split, len(task.values), twins):
        intervals = {
            what: bootstrap(
                scores[what], truth, answers, groups=tested, seed=spec.seed, strata=strata, resamples=spec.resamples
            )
            for what in shown
        }
        row = ProbeRow(name, model, {what: score(truth, answers) for what, score in scores.items()}, intervals)
        if name in twins:
            random[name] = answers
        elif _twin(name) in random:
            pair = (scores[main], truth, answers, random[_twin(name)], tested, spec.seed)
            apart = paired_bootstrap(*pair, strata, spec.resamples)
            row = replace(row, minus_random=apart, p_random=paired_permutation(*pair))
        rows.append(row)
    said = (
        f"brainmarks: fitted on {len(split.train)} sessions, scored on {len(split.test)} of {len(set(tested))} others"
    )
    return tuple(rows), said


def _twin(part: str) -> str:
    """The row of the random network that a part is held against."""
    return f"{RANDOM}, {TOKEN}" if part == TOKEN else RANDOM


def _row(
    asked: ProbedColumn, name: str, model: str, answers: np.ndarray, strata: list[str] | None, spec: ProbeTableSpec
) -> ProbeRow:
    """Scores of ``answers`` [S, R, ...]."""
    task, truth = asked.spec, asked.truth
    kind = kind_of(task.kind)
    table = kind.scores(task)
    each = [{what: score(truth, answers[:, r]) for what, score in table.items()} for r in range(answers.shape[1])]
    scores = {what: float(np.mean([found[what] for found in each])) for what in each[0]}
    intervals = {
        what: bootstrap(
            _over_repeats(table[what]), truth, answers, groups=asked.subjects, seed=spec.seed,
            strata=strata, resamples=spec.resamples,
        )
        for what in (kind.primary(task)[0], kind.second)
    }  # fmt: skip
    return ProbeRow(name, model, scores, intervals)


def _over_repeats(score: Score) -> Score:
    """The mean of a score over the repeats of answers [S, R, ...]: repeats are no further cases."""
    return lambda truth, answers: float(np.mean([score(truth, answers[:, r]) for r in range(answers.shape[1])]))


def _guesses(
    y: np.ndarray, subjects: Sequence[str], dealt: Sequence[Sequence[Sequence[str]]], task: TaskSpec
) -> np.ndarray:
    """[S, R, ...] of somebody who sees no scan: every class as likely, or the mean of the training side."""
    if task.values:
        return np.full((len(y), len(dealt), len(task.values)), 1 / len(task.values))
    nothing = np.zeros((len(y), 1))
    means = [
        linear.crossed(nothing, y, subjects, folds, lambda train, target, other: np.full(len(other), target.mean()))
        for folds in dealt
    ]
    return np.stack(means, axis=1)


# --------------------------------------------------------------------------------------------------------- in words


def describe(table: ProbeTable) -> list[str]:
    """Who was asked, who was left out, and the table, for people."""
    asked, task = table.asked, table.asked.spec
    lines = [f"{task.target}: {task.kind}, {_cohort(asked)}"]
    lines += [f"left out: {said}" for said in asked.left_out]
    lines += [f"note: {note}" for note in table.notes]
    main, second = kind_of(task.kind).primary(task)[0], kind_of(task.kind).second
    header = ["features", "model", f"{main} [95 % interval]", f"{second} [95 % interval]", "minus random", "p"]
    cells = [header]
    for row in table.rows:
        compared = _interval(row.minus_random, sign=True) if row.minus_random else ""
        p = "" if row.p_random is None else f"{row.p_random:.2g}"
        cells.append(
            [row.features, row.model, _interval(row.intervals[main]), _interval(row.intervals[second]), compared, p]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    return lines + ["  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells]


def _cohort(asked: ProbedColumn) -> str:
    sessions, subjects = len(asked.sessions), len(set(asked.subjects))
    said = f"{sessions} sessions of {subjects} subjects" if sessions != subjects else f"{subjects} subjects"
    if not asked.spec.values:
        return f"{said}, {asked.truth.mean():.4g} +- {asked.truth.std():.3g}"
    counts = np.bincount(asked.truth.astype(np.int64), minlength=asked.spec.classes)
    return f"{said}, " + ", ".join(f"{n} {name}" for name, n in zip(asked.spec.values, counts))


def _interval(found: Interval, sign: bool = False) -> str:
    size = max((abs(v) for v in (found.mean, found.low, found.high) if math.isfinite(v)), default=0)
    digits = 3 if size < 2 else 2 if size < 20 else 1
    mean, low, high = (f"{v:{'+' if sign else ''}.{digits}f}" for v in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def _csv(table: ProbeTable) -> tuple[list[str], list[list[Any]]]:
    names = list(table.rows[0].scores)
    with_ends = list(table.rows[0].intervals)
    ends = [f"{name}_{end}" for name in with_ends for end in ("low", "high")]
    compared = ["minus_random", "minus_random_low", "minus_random_high", "p_random"]
    rows = []
    for row in table.rows:
        found = [v for name in with_ends for v in (row.intervals[name].low, row.intervals[name].high)]
        more: list[Any] = [""] * 4
        if row.minus_random is not None:
            more = [row.minus_random.mean, row.minus_random.low, row.minus_random.high, row.p_random]
        counts = [len(table.asked.sessions), len(set(table.asked.subjects))]
        rows.append([row.features, row.model, *counts, *(row.scores[name] for name in names), *found, *more])
    return ["features", "model", "sessions", "subjects", *names, *ends, *compared], rows


def _document(table: ProbeTable, spec: ProbeTableSpec, about: Mapping[str, Any]) -> dict[str, Any]:
    asked = table.asked
    counts = np.bincount(asked.truth.astype(np.int64)) if asked.spec.values else np.zeros(0, int)
    return {
        "target": spec.target,
        "kind": asked.spec.kind,
        "contrasts": list(asked.spec.contrasts),
        "primary": kind_of(asked.spec.kind).primary(asked.spec)[0],
        "larger_is_better": kind_of(asked.spec.kind).primary(asked.spec)[1],
        "sessions": len(asked.sessions),
        "subjects": len(set(asked.subjects)),
        "classes": dict(zip(asked.spec.values, counts.tolist())),
        "left_out": list(asked.left_out),
        "notes": list(table.notes),
        "protocol": spec.protocol,
        "folds": spec.folds,
        "repeats": spec.repeats,
        "seed": spec.seed,
        "features": {key: value for key, value in about.items() if key != "features"},
        "rows": [_plain(asdict(row)) for row in table.rows],
    }


def _plain(values: Any) -> Any:
    """NaN as null, which every JSON reader knows."""
    if isinstance(values, Mapping):
        return {key: _plain(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values
