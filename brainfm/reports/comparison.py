"""Scores of a fine-tuning beside those of baselines, of candidates, and of fewer training subjects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brainfm.reports import charts
from brainfm.reports.kind_page import KindPage
from brainfm.reports.page import Section
from brainfm.reports.wording import count, interval, number, p_value, sentence, signed

NAMES = {
    "model": "this model",
    "scratch": "same schedule from scratch",
    "random_linear": "random frozen encoder + linear",
    "features": "simple measurements + linear",
    "volumes": "region volumes + linear",
}
_EXPLAINED = {
    "scratch": "the same network and schedule from fresh weights",
    "random_linear": "a linear model on the maps of a network that never learned anything",
    "features": "a linear model on simple measurements such as intensities and volumes",
    "volumes": "a linear model on the logarithms of region volumes from label maps or a table",
}
_CANDIDATES = {
    "mean": "training mean or class shares",
    "volumes": "linear on volumes of label maps or a table",
    "regions": "linear on volumes of the regions that the backbone sees",
    "measurements": "linear on simple measurements of intensities and outline",
    "features": "linear on features of the frozen network",
    "stacked": "mixture of the linear ones",
    "tuned": "tuned network",
}
_WORDS = {
    "dice": "Dice",
    "lesion_f1": "lesion F1",
    "false_positives": "false lesions per case",
    "volume_error_ml": "volume error (ml)",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "f1": "F1",
    "log_loss": "log loss",
    "brier": "Brier score",
    "quadratic_kappa": "quadratic weighted kappa",
    "mae_steps": "mean error in steps",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r": "correlation (r)",
    "r2": "explained variance (R²)",
    "bias": "mean error, signed",
    "slope": "slope of answers on truth",
}
_MEANING = {
    "dice": "Dice: overlap of what is predicted and what is true; 1 is the same, 0 apart.",
    "auroc": "AUROC: how often, of a case that has it and one that has not, the first gets the higher answer; 0.5 is a "
    "guess.",
    "quadratic_kappa": "Quadratic weighted kappa: agreement beyond chance, where far misses count more; 0 is a guess.",
    "mae": "Mean absolute error: by how much an answer is off on average.",
}
_IN_UNIT = ("mae", "rmse", "bias")


def score_name(name: str, unit: str) -> str:
    """A score as it is told.

    Args:
        name: as results.json has it, such as ``mae``, ``dice_3`` or ``auroc/edema``.
        unit: of the answers.
    """
    if name.startswith("dice_"):
        return f"Dice of label {name.removeprefix('dice_')}"
    score, _, label = name.partition("/")
    word = _WORDS.get(score, score.replace("_", " "))
    if score in _IN_UNIT and unit:
        word += f" ({unit})"
    return f"{word} of {label}" if label else word


def scores_section(page: KindPage) -> Section:
    """Every score with its interval, and the differences to the baselines."""
    found = page.run.found
    primary, others = found["primary"], [name for name in found["scores"] if name != "model"]
    word = score_name(primary, page.spec.unit)
    metrics = [primary, *(name for name in found["scores"]["model"] if name != primary)]
    rows = [("", *(NAMES.get(name, name) for name in found["scores"]))]
    for metric in metrics:
        cells = (interval(s[metric]) if metric in s else "-" for s in found["scores"].values())
        rows.append((score_name(metric, page.spec.unit), *cells))
    bars = [
        (NAMES.get(name, name), s[primary]["mean"], s[primary]["low"], s[primary]["high"], s[primary]["n"])
        for name, s in found["scores"].items() if s[primary]["mean"] is not None and s[primary]["low"] is not None
    ]  # fmt: skip
    tables = []
    if found["comparisons"]:
        compared: list[tuple[str, ...]] = [("this model against", "difference", "95 % interval", "p", "cases")]
        for c in found["comparisons"]:
            between = f"{signed(c['low'])} to {signed(c['high'])}"
            against = NAMES.get(c["against"], c["against"])
            compared.append((against, signed(c["difference"]), between, p_value(c["p"]), str(c["n"])))
        good = "above" if found["larger_is_better"] else "below"
        tables.append((f"Paired differences in {word}: {good} 0 this model is better", tuple(compared)))
    text = f"{_MEANING.get(primary, '')} Intervals: 95 %, bootstrap over subjects."
    if others:
        words = _EXPLAINED | dict(page.baselines)
        named = "; ".join(f"“{NAMES.get(name, name)}” is {words.get(name, name)}" for name in others)
        text += f" Baselines answer the same held-out cases in the same folds: {named}. p: two-sided, by permuting the "
        text += "two methods' answers by subject."
    if "scratch" in found["config"]["baselines"] and "scratch" not in others:
        text += " There is no baseline from fresh weights, for this model began from these itself."
    whole = found["larger_is_better"] and all(b[2] >= 0 and b[3] <= 1 for b in bars)
    figure = charts.interval_figure(bars, f"{word} and 95 % interval", (0.0, 1.0) if whole else None, NAMES["model"])
    return Section(
        "Scores against baselines" if others else "Scores",
        text,
        figures=((f"{sentence(word)} on held-out cases, {_better(found)}", figure),) if bars else (),
        table=tuple(rows),
        tables=tuple(tables),
        figures_first=True,
    )


def candidates_section(page: KindPage) -> Section:
    """What each run chose among, and how every candidate does on the cases that are scored."""
    found = page.run.found
    tried = found["candidates"]
    folds = tried["folds"].values()
    word = score_name(found["primary"], page.spec.unit)
    rows = [("candidate, simplest first", f"inner folds: {page.inner_loss}", f"held-out cases: {word}", "shipped by")]
    for name, c in tried["table"].items():
        shipped = f"{c['chosen']} of {len(folds)}" if c["chosen"] else "-"
        rows.append((_CANDIDATES.get(name, name), number(c["inner"]), interval(c["outer"]), shipped))
    text = (
        "Each run fits these candidates to its training side and ships the simplest that is within one standard error "
        "of the best there, in inner folds by subject, and none that does worse than the mean. The held-out cases are "
        "scored for all of them afterwards and choose nothing."
    )
    instead = [f for f in folds if f["fallback"] != f["chosen"]]
    if instead:
        names = sorted({_CANDIDATES.get(f["fallback"], f["fallback"]) for f in instead})
        text += f" Where a new case has no label map, {count(len(instead), 'run')} ship another for it: "
        text += f"{'; '.join(names)}. Without label maps the held-out score is {interval(tried['without_map'])}."
    said = sorted({one for f in folds for one in f["said"]})
    text += "".join(f" {sentence(one)}." for one in said)
    return Section("What is shipped, and what was tried", text, table=tuple(rows))


def _better(found: Mapping[str, Any]) -> str:
    return "larger is better" if found["larger_is_better"] else "smaller is better"


def learning_curve_section(page: KindPage) -> Section:
    """Scores over the number of training subjects."""
    found = page.run.found
    points = found["learning_curve"]["points"]
    names = list(dict.fromkeys(name for p in points for name in p["scores"]))
    word = score_name(found["primary"], page.spec.unit)
    rows = [("training subjects", *(NAMES.get(n, n) for n in names))]
    curves: dict[str, list[Any]] = {NAMES.get(n, n): [] for n in names}
    compared: list[tuple[str, ...]] = [("training subjects", "this model against", "difference", "95 % interval", "p")]
    for p in points:
        rows.append((f"{p['subjects']:g}", *(interval(p["scores"][n]) if n in p["scores"] else "-" for n in names)))
        for n in names:
            if n in p["scores"]:
                s = p["scores"][n]
                curves[NAMES.get(n, n)].append((p["subjects"], s["mean"], s["low"], s["high"]))
        for c in p["comparisons"]:
            between = f"{signed(c['low'])} to {signed(c['high'])}"
            name = NAMES.get(c["against"], c["against"])
            compared.append((f"{p['subjects']:g}", name, signed(c["difference"]), between, p_value(c["p"])))
    figure = charts.learning_curve_figure(curves, word)
    tried: list[tuple[str, ...]] = [("training subjects", "candidate", word, "shipped by")]
    for p in points:
        for name, c in ((p.get("candidates") or {}).get("table") or {}).items():
            shipped = f"{c['chosen']} of {len(p['candidates']['folds'])}" if c["chosen"] else "-"
            tried.append((f"{p['subjects']:g}", _CANDIDATES.get(name, name), interval(c["outer"]), shipped))
    good = "above" if found["larger_is_better"] else "below"
    return Section(
        "How many cases it takes",
        "The same folds, held-out cases and number of steps with fewer training subjects (the mean over folds is "
        "given); a smaller draw is part of the larger ones. Intervals and bands: 95 % bootstrap over the held-out "
        "subjects; they do not hold the luck of the draw.",
        figures=((f"{sentence(word)} over the number of training subjects, {_better(found)}", figure),),
        table=tuple(rows),
        tables=(
            *(((f"Paired differences in {word}: {good} 0 this model is better", tuple(compared)),)
              if len(compared) > 1 else ()),
            *((("Candidates on the held-out cases, and in how many runs each was chosen", tuple(tried)),)
              if len(tried) > 1 else ()),
        ),
        figures_first=True,
    )  # fmt: skip
