"""The page of a comparison of models: scores with their intervals, accuracy against compute, cost, paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm.reports.charts import compute_figure, interval_figure
from brainfm.reports.page import Section, write_page
from brainfm.reports.wording import count, interval, number, p_value, sentence, signed

FIGURE = "accuracy_against_compute.png"
PAGE = "index.html"
_WORDS = {"dice": "Dice", "auroc": "AUROC", "mae": "mean absolute error"}
_COSTS = (
    ("parameters", "parameters of the encoder", 1e-6, "M"),
    ("trained_parameters", "parameters in pre-training", 1e-6, "M"),
    ("encoder_flops", "arithmetic of a patch, encoder alone", 1e-9, "GFLOP"),
    ("flops_a_sample", "arithmetic of a sample in training", 1e-9, "GFLOP"),
    ("training_flops", "arithmetic of a run", 1e-15, "PFLOP"),
    ("steps", "steps of a run", 1, ""),
    ("samples", "samples of a run", 1, ""),
    ("samples_a_second", "samples a device-second", 1, ""),
    ("device_hours", "device-hours of a run", 1, "h"),
    ("core_hours", "core-hours of a run", 1, "h"),
    ("peak_memory_gib", "peak memory", 1, "GiB"),
    ("energy_kwh", "energy of a run", 1, "kWh"),
)


def write_models_page(out: Path, found: Mapping[str, Any]) -> Path:
    """OUT/index.html and OUT/accuracy_against_compute.png.

    Args:
        found: what comparison.scores.document gives.

    Raises: OSError where they cannot be written.
    """
    by_arithmetic = _compute_figure(found, "training_flops", "arithmetic of a pre-training (FLOP)")
    (out / FIGURE).write_bytes(by_arithmetic)
    by_hours = _compute_figure(found, "device_hours", "device-hours of a pre-training")
    sections = [
        _scores(found),
        Section(
            "Accuracy against compute",
            "A point is the mean over the runs of a model, with its 95 % interval; a dashed line is a model that was "
            "not pre-trained. Arithmetic is counted (multiplications and additions); hours are measured: of a GPU by "
            "the clock, of a CPU as processor time.",
            figures=(
                ("Scores over the arithmetic of one pre-training", by_arithmetic),
                ("Scores over the device-hours of one pre-training", by_hours),
            ),
        ),
        _cost(found),
        _differences(found),
        _tried(found),
        _each_run(found),
        _limits(found),
    ]
    path = out / PAGE
    write_page(path, "Models, pre-trained and asked alike", _lead(found), sections, found["command"], _numbers(found))
    return path


def word(measure: Mapping[str, Any]) -> str:
    """``age, frozen: mean absolute error (years)``."""
    unit = f" ({measure['unit']})" if measure.get("unit") and measure["metric"] == "mae" else ""
    return f"{measure['task']}, {measure['how']}: {_WORDS.get(measure['metric'], measure['metric'])}{unit}"


# ---- parts -----------------------------------------------------------------------------------------------------------


def _lead(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    budget = f"{settings['steps']} steps" if settings["budget"] == "steps" else f"{settings['hours']:g} device-hours"
    people = "; ".join(
        f"{task}: {n['held']} held out, {n['pool']} to learn from, {n['trial']} to try rates on"
        for task, n in found["people"].items()
    )
    seeds = settings["seeds"]
    more = "" if seeds >= 3 else f" {count(seeds, 'run')} of each model: too few to say which is better."
    return (
        f"{count(len(found['models']), 'model')}: each pre-training has the same data and {budget}, in "
        f"{count(seeds, 'run')} from fresh weights; then all are asked alike, on people whom no pre-training and no "
        f"choice of a setting has seen.{more}\n\nPeople: {people}."
    )


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    hours = sum(sum(model.get("each_device_hours") or ()) for model in found["models"])
    held = max((n["held"] for n in found["people"].values()), default=0)
    return [
        (str(len(found["models"])), "models"),
        (str(found["settings"]["seeds"]), "runs of each"),
        (str(held), "people tested, at most"),
        (number(hours), "device-hours of pre-training"),
    ]


def _scores(found: Mapping[str, Any]) -> Section:
    measures = found["measures"]
    head = ("model", *(f"{word(m)}, {'larger' if m['larger_is_better'] else 'smaller'} is better" for m in measures))
    rows = [head]
    for model in found["models"]:
        scores = (m["scores"].get(model["name"]) for m in measures)
        rows.append((f"`{model['name']}`", *("" if score is None else interval(score) for score in scores)))
    figures = []
    for m in measures:
        bars = [
            (name, s["mean"], s["low"], s["high"], m["people"]) for name, s in m["scores"].items()
            if None not in (s["mean"], s["low"], s["high"])
        ]  # fmt: skip
        whole = m["metric"] in ("dice", "auroc") and all(bar[2] >= 0 and bar[3] <= 1 for bar in bars)
        if bars:
            figure = interval_figure(bars, f"{_WORDS.get(m['metric'], m['metric'])}, mean and 95 % interval",
                                     (0.0, 1.0) if whole else None)  # fmt: skip
            figures.append((f"{sentence(word(m))}. {_how(m)}", figure))
    text = (
        "Mean over runs; 95 % intervals over runs and people together: another time there would be other fresh "
        "weights, other people to learn from and others to test. Frozen: linear models of the frozen maps (of whole "
        "heads the mean and deviation of the deepest map; of masks all maps, voxel by voxel at 2 mm). Shots: "
        "fine-tuned on so many people as `brainfm finetune` does it; answers for whole heads stay linear below a "
        "hundred people."
    )
    return Section("Scores", text, figures=tuple(figures), table=tuple(rows))


def _how(measure: Mapping[str, Any]) -> str:
    return f"Fitted on {measure['fitted']} people, asked of {measure['people']}."


def _compute_figure(found: Mapping[str, Any], cost: str, label: str) -> bytes:
    costs = {model["name"]: model.get(cost) for model in found["models"]}
    panels = [
        (
            word(m),
            [(n, costs[n], s["mean"], s["low"], s["high"]) for n, s in m["scores"].items() if s["mean"] is not None],
        )
        for m in found["measures"]
    ]
    return compute_figure(panels, label)


def _cost(found: Mapping[str, Any]) -> Section:
    models = [model for model in found["models"] if model.get("parameters") is not None]
    rows = [("", *(f"`{model['name']}`" for model in models))]
    for key, name, scale, unit in _COSTS:
        cells = ("" if (value := model.get(key)) is None else _amount(value * scale, unit) for model in models)
        rows.append((name, *cells))
    rows.append(("device", *(model.get("device") or "" for model in models)))
    text = (
        "Means over the runs, memory the largest. Arithmetic counts convolutions, matrix products and attention, "
        "forward and backward. Device-hours and samples a device-second are by the clock on a GPU, and processor time "
        "of all cores on a CPU. Energy is that of the GPUs (NVML), or of the processor's packages (RAPL), with "
        "whatever else ran on them; empty where the machine does not tell."
    )
    return Section("Cost", text, table=tuple(rows))


def _amount(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.3g}"
    return f"{shown} {unit}".strip()


def _differences(found: Mapping[str, Any]) -> Section:
    against = found["against"]
    tables = []
    for m in found["measures"]:
        rows = [(f"against `{against}`", "difference", "95 % interval", "p", "p, Holm", "better in")]
        for test in found["tests"]:
            if test["measure"] != m["name"] or against not in (test["model"], test["other"]):
                continue
            mine = test["other"] == against  # the difference is that of the model that is named
            sign = 1 if mine else -1
            name = test["model"] if mine else test["other"]
            ends = [None if test[e] is None else sign * test[e] for e in ("low", "high")][::sign]
            better = test["better_runs"] if mine else test["runs"] - test["better_runs"]
            difference = None if test["difference"] is None else sign * test["difference"]
            rows.append((f"`{name}`", signed(difference), f"{signed(ends[0])} to {signed(ends[1])}", p_value(test["p"]),
                         p_value(test["p_holm"]), f"{better} of {count(test['runs'], 'run')}"))  # fmt: skip
        if len(rows) > 1:
            good = "above" if m["larger_is_better"] else "below"
            tables.append((f"{sentence(word(m))}; {good} 0 the model is better than `{against}`", tuple(rows)))
    text = (
        "Pairs: the same seed, the same people to learn from, the same people tested. Intervals are over runs and "
        "people. p: two-sided, by exchanging both models' answers to a person in all runs together, the runs taken as "
        "they are; Holm's correction is over all pairs of models of one table. All pairs stand in `tests.csv`."
    )
    return Section("Paired differences", text, tables=tuple(tables))


def _tried(found: Mapping[str, Any]) -> Section:
    rows = [("model", "of", "rate that was taken", "trials", "rate: score on inner people, larger is better")]
    for model in found["models"]:
        for one in model["tried"]:
            scores = ", ".join(f"{rate}: {number(score)}" for rate, score in one["scores"].items())
            rows.append(
                (f"`{model['name']}`", one["of"], f"{one['rate']:g}", str(one["trials"]), scores or "none tried")
            )
    text = (
        "What was tuned for each model, with as many trials for all of them, on people of the training side who are "
        "neither learned from nor tested afterwards. A rate of pre-training without trials is the one of the settings."
    )
    return Section("Settings that were tried", text, table=tuple(rows) if len(rows) > 1 else None)


def _each_run(found: Mapping[str, Any]) -> Section:
    seeds = range(found["settings"]["seeds"])
    tables = []
    for m in found["measures"]:
        rows: list[tuple[str, ...]] = [("model", *(f"seed {seed}" for seed in seeds))]
        rows += [(f"`{name}`", *(number(value) for value in s["runs"])) for name, s in m["scores"].items()]
        tables.append((sentence(word(m)), tuple(rows)))
    return Section("Every run", "The scores that the means are of.", tables=tuple(tables))


def _limits(found: Mapping[str, Any]) -> Section:
    settings: Mapping[str, Any] = found["settings"]
    spacing = " x ".join(f"{edge:g}" for edge in found["spacing_mm"])
    said: Sequence[str] = (
        f"The store has voxels of {spacing} mm; its fingerprint is `{found['store'][:16]}`.",
        "Models are alike in data and budget, not in how much is known about training them: each has the settings of "
        "its own recipe but for what was tried above. A small budget says nothing about a large one: transformers are "
        "known to need longer trainings than convolutions.",
        "An objective that learns from label maps (`dense_split`, `anatomy_pathology`) has seen those of the training "
        "side where the store has them; the others have seen scans alone.",
        "Frozen answers and few shots are two questions among many; a difference within its interval is none.",
        f"With {count(settings['seeds'], 'run')} an interval over runs is "
        + ("wide by itself." if settings["seeds"] < 5 else "narrow enough to be read."),
    )
    return Section("What this can and cannot say", "\n\n".join(said))
