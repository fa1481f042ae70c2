"""Tables of a benchmark, from the answers on disk: AUROC with intervals, paired differences, harmonic means."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from brainfm.crossdomain.benchmark import BenchmarkJob, answers_path, load_answers
from brainfm.crossdomain.episode_scores import (
    Answers,
    episode_auroc,
    harmonic_mean,
    interval,
    over_episodes,
    replicates,
)
from brainfm.crossdomain.methods import FewShotMethod
from brainfm.errors import DatasetError
from brainfm.files import write_table
from brainfm.scoring.intervals import Interval

ALL = "harmonic mean"
_HEAD = ("setting", "dataset", "task", "method", "auroc", "low", "high", "episode_ci95", "episodes", "images",
         "minus_floor", "minus_floor_low", "minus_floor_high", "seconds_an_episode", "feature_seconds",
         "pretraining_seconds")  # fmt: skip
_PAIRS = ("setting", "dataset", "task", "method", "other", "difference", "low", "high")


@dataclass(frozen=True)
class TableRow:
    """A line of the table.

    Attributes:
        found: the mean AUROC with its interval over episodes and images; n episodes.
        half: half the width of the interval over episodes alone, as published.
        drawn: [B] what the interval is of.
        floor: the difference to the floor, or None of the floor itself.
        seconds: processor time of an episode, features apart.
    """

    setting: str
    dataset: str
    task: str
    method: str
    found: Interval
    half: float
    images: int
    drawn: np.ndarray = field(repr=False)
    floor: Interval | None = None
    seconds: float = math.nan
    feature_seconds: float = math.nan
    pretraining_seconds: float = math.nan


@dataclass(frozen=True)
class Pair:
    """How much better one method is than another on the same episodes and images."""

    setting: str
    dataset: str
    task: str
    method: str
    other: str
    found: Interval


def tables(
    out: Path, jobs: Sequence[BenchmarkJob], methods: Sequence[FewShotMethod], seed: int = 0
) -> tuple[list[TableRow], list[Pair]]:
    """Rows by setting, data set and method, with a harmonic mean over data sets where there are several, and all pairs
    of methods of each task. What is not on disk is left out."""
    rows: list[TableRow] = []
    for job in jobs:
        for method in methods:
            path = answers_path(out, job, method)
            if path.is_file():
                groups, about = load_answers(path)
                rows += [_row(job, method, setting, answers, about, seed) for setting, answers in groups.items()]
    rows = _sorted([*rows, *_harmonic(rows)], methods)
    pairs = _pairs(rows)
    against = {(p.setting, p.dataset, p.task, p.method): p.found for p in pairs if _is_floor(p.other)}
    return [
        TableRow(**{**row.__dict__, "floor": against.get((row.setting, row.dataset, row.task, row.method))})
        for row in rows
    ], pairs


def _row(
    job: BenchmarkJob, method: FewShotMethod, setting: str, answers: Sequence[Answers], about: dict, seed: int
) -> TableRow:
    values = [episode_auroc(each) for each in answers]
    drawn = replicates(answers, int(about["images"]), seed, f"{job.dataset}: {job.task}, {setting}")
    seconds = (float(about["seconds"]) - float(about["feature_seconds"])) / len(answers)
    return TableRow(
        setting, job.dataset, job.task, str(method), interval(values, drawn), over_episodes(values),
        len(np.unique(np.concatenate([each.rows for each in answers]))), drawn, None, max(0.0, seconds),
        float(about["feature_seconds"]), float(about["pretraining_seconds"]),
    )  # fmt: skip


def _harmonic(rows: Sequence[TableRow]) -> list[TableRow]:
    """Over the tasks, of each method that has answered all of them; tasks are independent, so their draws are, too."""
    found = []
    for setting in dict.fromkeys(row.setting for row in rows):
        here = [row for row in rows if row.setting == setting]
        tasks = {(row.dataset, row.task) for row in here}
        for method in dict.fromkeys(row.method for row in here):
            own = [row for row in here if row.method == method]
            if len(own) < len(tasks) or len(tasks) < 2:
                continue
            drawn = harmonic_mean(np.stack([row.drawn for row in own]))
            mean = float(harmonic_mean(np.array([row.found.mean for row in own])))
            whole = interval([mean], drawn)
            whole = Interval(mean, whole.low, whole.high, sum(row.found.n for row in own))
            found.append(TableRow(setting, ALL, f"{len(own)} tasks", method, whole, math.nan,
                             sum(row.images for row in own), drawn))  # fmt: skip
    return found


def _sorted(rows: Sequence[TableRow], methods: Sequence[FewShotMethod]) -> list[TableRow]:
    order = {str(method): place for place, method in enumerate(methods)}
    return sorted(rows, key=lambda row: (row.setting, row.dataset == ALL, row.dataset, row.task, order[row.method]))


def _pairs(rows: Sequence[TableRow]) -> list[Pair]:
    found = []
    for row in rows:
        for other in rows:
            same = (row.setting, row.dataset, row.task) == (other.setting, other.dataset, other.task)
            if same and row.method != other.method:
                difference = row.drawn - other.drawn
                whole = interval([row.found.mean - other.found.mean], difference)
                whole = Interval(whole.mean, whole.low, whole.high, row.found.n)
                found.append(Pair(row.setting, row.dataset, row.task, row.method, other.method, whole))
    return found


def _is_floor(method: str) -> bool:
    return method in ("logistic@statistics", "full_logistic@statistics")


def write_tables(out: Path, rows: Sequence[TableRow], pairs: Sequence[Pair]) -> None:
    """OUT/table.csv and OUT/differences.csv."""
    write_table(out / "table.csv", _HEAD, [
        (row.setting, row.dataset, row.task, row.method, *_cells(row.found), _cell(row.half), row.found.n, row.images,
         *(_cells(row.floor) if row.floor is not None else ("", "", "")), _cell(row.seconds, 5),
         _cell(row.feature_seconds, 2), _cell(row.pretraining_seconds, 1))
        for row in rows
    ])  # fmt: skip
    write_table(out / "differences.csv", _PAIRS, [
        (pair.setting, pair.dataset, pair.task, pair.method, pair.other, *_cells(pair.found)) for pair in pairs
    ])  # fmt: skip


def read_twins(out: Path, dataset: str) -> tuple[int, int]:
    """Images of the test split with a near-duplicate in what is learnt from, and images of the test split."""
    path = out / "answers" / dataset / "twins.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return sum(bool(row["r"]) for row in rows), int(rows[0]["test_images"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"{path}: cannot be read as a list of twins ({error}); delete it and run again") from None


def _cells(found: Interval) -> tuple[str, str, str]:
    return _cell(found.mean), _cell(found.low), _cell(found.high)


def _cell(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""
