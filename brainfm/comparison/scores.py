"""Scores of a comparison: every model's answers in one document, with intervals, paired tests, and what it cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.comparison.contenders import Contender
from brainfm.comparison.cost import forward
from brainfm.comparison.questions import Question, arrays, metric_of
from brainfm.comparison.runs import Comparison
from brainfm.files import write_table, write_text
from brainfm.scoring.intervals import crossed_scores, holm, mean_score, paired_permutation
from brainfm.settings import plain
from brainfm.study.results import finite
from brainfm.tasks.study import Row

TABLE, TESTS, DOCUMENT = "table.csv", "tests.csv", "comparison.json"
FROZEN = "frozen"
_COSTS = (
    "parameters", "trained_parameters", "flops_a_sample", "encoder_flops", "steps", "samples", "training_flops",
    "samples_a_second", "device_hours", "core_hours", "peak_memory_gib", "energy_kwh",
)  # fmt: skip
_SUMS, _PEAKS = ("device_hours", "core_hours", "energy_kwh"), ("peak_memory_gib",)


@dataclass(frozen=True)
class Asked:
    """A question asked in one way, and what every model answered.

    Attributes:
        how: frozen, or so many shots.
        rows: model -> the answers of each seed; models without an answer are left out.
    """

    question: Question
    how: str
    fitted: int
    rows: Mapping[str, Sequence[Sequence[Row]]]

    @property
    def name(self) -> str:
        return f"{self.question.target} {self.how}"

    def table(self) -> tuple[Callable[[np.ndarray, np.ndarray], float], np.ndarray, dict[str, np.ndarray], list[str]]:
        """The score, the truth [S], of each model answers [R, S, ...] and the person of each case; of a score that is a
        mean over cases, such as an error, the scores of the cases and their mean."""
        found = {model: [arrays(self.question, rows) for rows in runs] for model, runs in self.rows.items()}
        people = [row["subject"] for row in next(iter(self.rows.values()))[0]]
        answers = {model: np.stack([given for _, given in runs]) for model, runs in found.items()}
        truth = next(iter(found.values()))[0][0]
        if truth is None:
            return mean_score, np.zeros(len(people)), answers, people
        metric = metric_of(self.question)
        each = {model: np.array([_by_case(metric, truth, row) for row in runs]) for model, runs in answers.items()}
        whole = {model: [metric(truth, row) for row in runs] for model, runs in answers.items()}
        if all(np.allclose(each[model].mean(axis=1), whole[model]) for model in answers):
            return mean_score, truth, each, people
        return metric, truth, answers, people


def _by_case(metric: Callable[[np.ndarray, np.ndarray], float], truth: np.ndarray, answers: np.ndarray) -> list[float]:
    return [metric(truth[n : n + 1], answers[n : n + 1]) for n in range(len(truth))]


def collected(comparison: Comparison) -> list[Asked]:
    """All answers, which lie there already."""
    found, settings = [], comparison.settings
    for question in comparison.questions:
        ways: list[tuple[str, int | None]] = [(FROZEN, None), *((f"{n} shots", n) for n in settings.shots)]
        for how, shots in ways:
            rows: dict[str, list[list[Row]]] = {}
            for contender in comparison.contenders:
                for seed in range(settings.seeds):
                    weights = comparison.file(contender, seed)
                    if shots is None:
                        said = comparison.frozen(contender, weights, seed, question)
                    else:
                        said = comparison.tuned(contender, weights, seed, question, shots)
                    if said is not None:
                        rows.setdefault(contender.name, []).append(said)
            people = question.people
            fitted = shots or (max(settings.shots) if question.is_mask else len(people.pool) + len(people.trial))
            found.append(Asked(question, how, fitted, rows))
    return found


def document(comparison: Comparison) -> dict[str, Any]:
    """All that the tables and the page show; numbers that are not finite become null."""
    asked, settings = collected(comparison), comparison.settings
    found = [_measure(one) for one in asked if one.rows]
    people = {
        q.target: {"trial": len(q.people.trial), "pool": len(q.people.pool), "held": len(q.people.held)}
        for q in comparison.questions
    }
    return finite(
        {
            "command": settings.command or "brainfm compare, called from Python",
            "settings": plain(settings),
            "store": comparison.store.fingerprint(),
            "spacing_mm": list(comparison.store.spec.spacing_mm),
            "people": people,
            "against": settings.against or comparison.contenders[0].name,
            "models": [_model(comparison, contender) for contender in comparison.contenders],
            "measures": [measure for measure, _ in found],
            "tests": [test for _, tests in found for test in tests],
        }
    )


def _measure(one: Asked) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of every model, and the tests of every pair of models: Holm's correction is over these pairs."""
    metric, truth, answers, people = one.table()
    crossed = crossed_scores(metric, truth, list(answers.values()), people, seed=0)
    names = list(answers)
    scores = {
        name: vars(crossed.interval(place)) | {"runs": crossed.observed[place].tolist()}
        for place, name in enumerate(names)
    }
    primary, larger = one.question.primary
    told = {
        "name": one.name, "task": one.question.target, "how": one.how, "metric": primary, "larger_is_better": larger,
        "unit": getattr(one.question.study.spec, "unit", ""), "fitted": one.fitted, "people": len(set(people)),
        "scores": scores,
    }  # fmt: skip
    tests: list[dict[str, Any]] = []
    for a, b in itertools.combinations(range(len(names)), 2):
        apart = crossed.interval(a, b)
        mine, theirs = (np.moveaxis(answers[names[place]], 0, 1) for place in (a, b))
        rounds = 5000 if metric is mean_score else 2000
        p = paired_permutation(_over_runs(metric), truth, mine, theirs, groups=people, seed=0, rounds=rounds)
        each = crossed.observed[a] - crossed.observed[b]
        better = each > 0 if larger else each < 0
        tests.append(
            {
                "measure": one.name, "metric": primary, "model": names[a], "other": names[b],
                "difference": apart.mean, "low": apart.low, "high": apart.high, "p": p,
                "better_runs": int(better.sum()), "runs": len(each),
            }
        )  # fmt: skip
    adjusted = holm([1.0 if math.isnan(test["p"]) else test["p"] for test in tests])
    return told, [test | {"p_holm": p} for test, p in zip(tests, adjusted)]


def _over_runs(metric: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """The mean over the runs of answers [S, R, ...]: a person's answers change places in all runs together."""
    if metric is mean_score:
        return mean_score
    return lambda truth, answers: float(np.mean([metric(truth, answers[:, run]) for run in range(answers.shape[1])]))


def _model(comparison: Comparison, contender: Contender) -> dict[str, Any]:
    """Cost, a mean over the runs, and the settings that were tried."""
    runs = [comparison.costs(contender, seed) for seed in range(comparison.settings.seeds)]
    there = [run for run in runs if run is not None]
    found: dict[str, Any] = {"name": contender.name, "runs": comparison.settings.seeds}
    if there:
        found |= {key: there[0].get(key) for key in (*_COSTS, "device")}
        for key in (*_SUMS, *_PEAKS, "samples_a_second"):
            known = [run[key] for run in there if run.get(key) is not None]
            whole = max(known, default=None) if key in _PEAKS else float(np.mean(known)) if known else None
            found[key] = whole if len(known) == len(there) or key in _PEAKS else None
        found["training_flops"] = there[0]["flops_a_sample"] * there[0]["samples"]
        found["each_device_hours"] = [run["device_hours"] for run in there]
    elif contender.network is not None:
        pretrained = [c.pretrain for c in comparison.contenders if c.pretrain is not None]
        patch = next((p.data.patch_vox for p in pretrained if p.backbone == contender.network), None)
        found |= forward(contender.network, patch) if patch is not None else {}
    tried: list[dict[str, Any]] = []
    if contender.pretrain is not None:
        chosen = comparison.pretrain_rate(contender)
        tried.append(_tried("pre-training", chosen, comparison.pretrain_trials(contender)))
    for question in comparison.questions:
        trials = comparison.trials(contender, question)
        if trials:
            tried.append(_tried(question.target, comparison.rate(contender, question), trials))
    return found | {"tried": tried}


def _tried(of: str, chosen: float, trials: Mapping[float, Sequence[float]]) -> dict[str, Any]:
    return {
        "of": of, "rate": chosen, "trials": sum(len(scores) for scores in trials.values()),
        "scores": {f"{rate:g}": float(np.mean(scores)) for rate, scores in trials.items()},
    }  # fmt: skip


def write_tables(out: Path, found: Mapping[str, Any]) -> None:
    """One table as CSV, the tests as another, and everything as JSON."""
    import json

    measures = found["measures"]
    columns = ["model", "runs", "device", *_COSTS]
    for one in measures:
        columns += [f"{one['name']} {one['metric']}{end}" for end in ("", " low", " high")]
    rows = []
    for model in found["models"]:
        row: list[Any] = [model["name"], model["runs"], model.get("device", "")]
        row += [_cell(model.get(key)) for key in _COSTS]
        for one in measures:
            score = one["scores"].get(model["name"], {})
            row += [_cell(score.get(key)) for key in ("mean", "low", "high")]
        rows.append(row)
    write_table(out / TABLE, columns, rows)
    names = ("measure", "metric", "model", "other", "difference", "low", "high", "p", "p_holm", "better_runs", "runs")
    write_table(out / TESTS, names, [[_cell(test[name]) for name in names] for test in found["tests"]])
    write_text(out / DOCUMENT, json.dumps(found, indent=1, allow_nan=False) + "\n")


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
