"""The report of a fine-tuning: one HTML file for a clinician and a reviewer, made from what the run left on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError, ScanError
from brainfm.imaging.descriptors import head_mask
from brainfm.inference import charts, report
from brainfm.inference.explain import explain_volume, share_inside
from brainfm.inference.label_maps import reads_of
from brainfm.inference.report import Section
from brainfm.seen import Overlap
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks import postprocess
from brainfm.tasks.bundle import Bundle, read_bundle

RESULTS = "results.json"
FILE = "report.html"
_NAMES = {
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
    "features": "linear on features of the frozen network",
    "stacked": "mixture of the linear ones",
    "tuned": "tuned network",
}
_EXPLAINED_VOXELS = {"features": "a logistic regression, voxel by voxel, on intensities and position"}
_SHOWN_FIRST = ("flair", "dwi", "t2", "t1c", "t1")  # the contrast a case is shown on, where it has it
_MOST_ROWS = 25  # of the table of cases
_MOST_NAMES = 8  # of sessions in a line
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
_FOUND = {  # what training/audit.py calls its findings
    "untestable": "cannot be tested",
    "harmless": "does not tell the label",
    "survives": "tells the label; the score holds up without it",
    "weakened": "tells the label; less than half of the effect is left without it",
    "lost": "tells the label; nothing above chance is left without it",
    "undecided": "tells the label; too few cases to say what is left without it",
    "inseparable": "tells the label; too few alike cases differ in it to compare",
    "nothing to lose": "tells the label; the model itself is no better than chance",
}


def write_study_report(run: str | Path, out: Path | None = None, store: str | Path | None = None) -> Path:
    """Writes ``report.html`` into the run's folder, or to ``out``; nothing in it is loaded from elsewhere.

    Args:
        run: the folder of a finished fine-tuning.
        out: where else to write it.
        store: where the scans are now; None: where they were then.

    Returns:
        The file.

    Raises:
        ConfigError: where the folder holds no finished fine-tuning.
    """
    run = Path(run)
    found = _read(run / RESULTS)
    opened = Store.open(store or found["store"])
    bundle = read_bundle(run / "bundle") if (run / "bundle").is_dir() else None
    spec = TaskSpec.from_dict(found["task"])
    sections = [_cohort(found), _splits(found)]
    if "scores" in found:
        sections.append(_scores(found, spec))
    if found.get("candidates"):
        sections.append(_tried(found, spec))
    if found.get("learning_curve"):
        sections.append(_learning_curve(found, spec))
    if found.get("cases"):
        sections += [_cases(run, found, opened, spec), *_calibration(found, spec)]
        if bundle is not None:
            sections += _saliency(found, opened, spec, bundle)
    if found.get("audit"):
        sections.append(_audit(found, spec))
    if found.get("decided"):
        sections.append(_decisions(found))
    if (found.get("transfer") or {}).get("file_has_decoder"):
        sections.append(_transfer(found))
    if found.get("curves"):
        sections.append(_curves(found, spec))
    sections.append(_reproduce(found))
    path = out or run / FILE
    report.write_report(
        path, title=_title(spec), lead=_lead(found, spec), sections=sections, command=f"brainfm report run={run}",
        numbers=_numbers(found, spec),
    )  # fmt: skip
    return path


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected the folder of a finished brainfm finetune") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); expected what brainfm finetune wrote") from None
    if not isinstance(found, dict) or found.get("format") != 2:
        raise ConfigError(f"{file} is not a result that this brainfm reads")
    return found


def _title(spec: TaskSpec) -> str:
    return f"{spec.kind.capitalize()} of {spec.target}"


def _word(name: str, spec: TaskSpec) -> str:
    """A score as it is told."""
    if name.startswith("dice_"):
        return f"Dice of label {name.removeprefix('dice_')}"
    score, _, label = name.partition("/")
    word = _WORDS.get(score, score.replace("_", " "))
    if score in _IN_UNIT and spec.unit:
        word += f" ({spec.unit})"
    return f"{word} of {label}" if label else word


# ---- what was found --------------------------------------------------------------------------------------------------


def _lead(found: Mapping[str, Any], spec: TaskSpec) -> str:
    cohort = found["cohort"]
    text = (
        f"{_count(cohort['sessions'], 'session')} of {_count(cohort['subjects'], 'subject')}, {_begun(found)}. Every "
        "score below comes from cases that the network answering them was not trained on, and nothing was chosen on "
        "the cases that are scored."
    )
    if "scores" not in found:
        return text
    primary = found["primary"]
    own = found["scores"]["model"][primary]
    word = _word(primary, spec)
    text += f"\n\n{word[0].upper() + word[1:]} {_interval(own)}, with its 95 % interval by subject. "
    text += "Larger is better." if found["larger_is_better"] else "Smaller is better."
    for c in found["comparisons"]:
        text += f" {_verdict(c, found['larger_is_better'])}"
    seen = found.get("seen_in_pretraining")
    if isinstance(seen, Mapping):
        text += f"\n\nNote: {Overlap(**seen)}."
    if found.get("audit"):
        text += f"\n\nShortcuts: {found['audit']['verdict']}"
    return text


def _begun(found: Mapping[str, Any]) -> str:
    """From which weights training began."""
    config = found["config"]
    given = config.get("backbone_from", "none")
    if given == "none" or not config.get("adapt", {}).get("pretrained", True):
        return "trained from fresh weights"
    return f"fine-tuned from pre-trained weights ({Path(str(given)).name})"


def _verdict(c: Mapping[str, Any], larger_is_better: bool) -> str:
    name = _NAMES.get(c["against"], c["against"])
    if c["difference"] is None or c["low"] is None or c["high"] is None:
        return f"Against {name}: these cases cannot tell."
    better, worse = (c["low"] > 0, c["high"] < 0) if larger_is_better else (c["high"] < 0, c["low"] > 0)
    said = "Better than" if better else "Worse than" if worse else "No clear difference to"
    return f"{said} {name}: {_signed(c['difference'])} [{_signed(c['low'])}, {_signed(c['high'])}]."


def _numbers(found: Mapping[str, Any], spec: TaskSpec) -> list[tuple[str, str]]:
    cards = [(str(found["cohort"]["subjects"]), "subjects")]
    if "scores" in found:
        own = found["scores"]["model"][found["primary"]]
        cards.insert(0, (_number(own["mean"]), f"{_word(found['primary'], spec)}, held-out cases"))
        cards.insert(1, (f"{_number(own['low'])} to {_number(own['high'])}", "95 % interval"))
    cards.append((str(len(found["splits"])), "folds, each answered by its own network"))
    return cards


def _cohort(found: Mapping[str, Any]) -> Section:
    cohort = found["cohort"]
    rows: list[tuple[str, ...]] = [("", "sessions", "")]
    for contrast, count in cohort["contrasts"].items():
        share = "all" if count == cohort["sessions"] else f"{count / cohort['sessions']:.0%} of them"
        unused = "" if contrast in found["task"]["contrasts"] else "; the model is not shown it"
        rows.append((f"contrast {contrast}", str(count), share + unused))
    for name, column in cohort["columns"].items():
        if "counts" in column:
            values = ", ".join(f"{value}: {count}" for value, count in column["counts"].items())
        else:
            values = f"median {column['median']:g}, from {column['smallest']:g} to {column['largest']:g}"
        rows.append((name, str(column["n"]), values))
    spacing = " x ".join(f"{s:g}" for s in found["preprocess"]["spacing_mm"])
    shape = " x ".join(f"{s:.0f}" for s in cohort["shape_vox"]["median"])
    text = f"Scans prepared at {spacing} mm; the median volume has {shape} voxels."
    left = cohort["left_out"]
    if not left:
        text += " No session was left out."
        return Section("The cohort", text, table=tuple(rows))
    reasons: dict[str, list[str]] = {}
    for sentence in left:
        session, _, reason = sentence.partition(": ")
        reasons.setdefault(reason, []).append(session)
    lost: list[tuple[str, ...]] = [("why", "sessions", "")]
    lost += [(reason, str(len(sessions)), _names(sessions)) for reason, sessions in reasons.items()]
    caption = f"{_count(len(left), 'session')} could not answer and {'were' if len(left) > 1 else 'was'} left out"
    return Section("The cohort", text, table=tuple(rows), tables=((caption, tuple(lost)),))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name for name in names[:_MOST_NAMES] if name) + more


def _splits(found: Mapping[str, Any]) -> Section:
    config, splits = found["config"], found["splits"]
    chosen = any(s["inner"] for s in splits)
    extra = ("checkpoint chosen on",) if chosen else ()
    rows: list[tuple[str, ...]] = [("run", "trained on", *extra, "held out", "held-out sessions")]
    for s in splits:
        names = [key.split("/", 1)[1].rstrip("/") for key in s["held"]]
        inner = (str(s["inner"]),) if chosen else ()
        cells = (s["folder"], str(s["trained"]), *inner, str(len(names)))
        rows.append((*cells, _names(names)))
    sites = found["cohort"]["columns"].get(config["site"] or "", {}).get("counts", {})
    balanced = [] if found["task"]["kind"] == "segmentation" else ["the answer"]
    balanced += ["site"] if len(sites) > 1 and not config["sites_apart"] else []
    text = "Cases are split by subject" + (f", balanced in {' and '.join(balanced)}" if balanced else "")
    text += f" (seed {config['seed']}); each case is held out once" + (
        f" in each of {config['repeats']} repeats." if config["repeats"] > 1 else "." if config["folds"] > 1 else
        ", but for those of the other four fifths, which are trained on only."
    )  # fmt: skip
    text += " No site is on both sides." if config["sites_apart"] else ""
    if found.get("candidates"):
        text += " What a run ships was chosen among candidates in inner folds of its training side, see below."
    elif chosen:
        text += " A run's weights are those of the step that was best on its inner cases, which are neither trained on "
        text += "nor scored."
    else:
        text += " No checkpoint was chosen: a run's weights are those of its last step"
        text += ", averaged over the steps before it." if config["average"] else "."
    return Section("Splits", text, table=tuple(rows))


def _scores(found: Mapping[str, Any], spec: TaskSpec) -> Section:
    primary, others = found["primary"], [name for name in found["scores"] if name != "model"]
    word = _word(primary, spec)
    metrics = [primary, *(name for name in found["scores"]["model"] if name != primary)]
    rows = [("", *(_NAMES.get(name, name) for name in found["scores"]))]
    for metric in metrics:
        rows.append(
            (_word(metric, spec), *(_interval(s[metric]) if metric in s else "-" for s in found["scores"].values()))
        )
    bars = [
        (_NAMES.get(name, name), s[primary]["mean"], s[primary]["low"], s[primary]["high"], s[primary]["n"])
        for name, s in found["scores"].items() if s[primary]["mean"] is not None and s[primary]["low"] is not None
    ]  # fmt: skip
    tables = []
    if found["comparisons"]:
        compared: list[tuple[str, ...]] = [("this model against", "difference", "95 % interval", "p", "cases")]
        for c in found["comparisons"]:
            between = f"{_signed(c['low'])} to {_signed(c['high'])}"
            cells = (_NAMES.get(c["against"], c["against"]), _signed(c["difference"]), between, _p(c["p"]))
            compared.append((*cells, str(c["n"])))
        good = "above" if found["larger_is_better"] else "below"
        tables.append((f"Paired differences in {word}: {good} 0 this model is better", tuple(compared)))
    text = f"{_MEANING.get(primary, '')} Intervals: 95 %, bootstrap over subjects."
    if others:
        words = _EXPLAINED | (_EXPLAINED_VOXELS if spec.kind == "segmentation" else {})
        named = "; ".join(f"“{_NAMES.get(name, name)}” is {words.get(name, name)}" for name in others)
        text += f" Baselines answer the same held-out cases in the same folds: {named}. p: two-sided, by permuting the "
        text += "two methods' answers by subject."
    if "scratch" in found["config"]["baselines"] and "scratch" not in others:
        text += " There is no baseline from fresh weights, for this model began from these itself."
    whole = found["larger_is_better"] and all(b[2] >= 0 and b[3] <= 1 for b in bars)
    figure = report.interval_figure(bars, f"{word} and 95 % interval", (0.0, 1.0) if whole else None, _NAMES["model"])
    return Section(
        "Scores against baselines" if others else "Scores",
        text,
        figures=((f"{word[0].upper() + word[1:]} on held-out cases, {_better(found)}", figure),) if bars else (),
        table=tuple(rows),
        tables=tuple(tables),
        figures_first=True,
    )


def _tried(found: Mapping[str, Any], spec: TaskSpec) -> Section:
    """What each run chose among, and how every candidate does on the cases that are scored."""
    tried = found["candidates"]
    folds = tried["folds"].values()
    word = _word(found["primary"], spec)
    loss = f"mean absolute error{f' ({spec.unit})' if spec.unit else ''}" if spec.kind == "regression" else "log loss"
    rows = [("candidate, simplest first", f"inner folds: {loss}", f"held-out cases: {word}", "shipped by")]
    for name, c in tried["table"].items():
        shipped = f"{c['chosen']} of {len(folds)}" if c["chosen"] else "-"
        rows.append((_CANDIDATES.get(name, name), _number(c["inner"]), _interval(c["outer"]), shipped))
    text = (
        "Each run fits these candidates to its training side and ships the simplest that is within one standard error "
        "of the best there, in inner folds by subject, and none that does worse than the mean. The held-out cases are "
        "scored for all of them afterwards and choose nothing."
    )
    instead = [f for f in folds if f["fallback"] != f["chosen"]]
    if instead:
        names = sorted({_CANDIDATES.get(f["fallback"], f["fallback"]) for f in instead})
        text += f" Where a new case has no label map, {_count(len(instead), 'run')} ship another for it: "
        text += f"{'; '.join(names)}. Without label maps the held-out score is {_interval(tried['without_map'])}."
    said = sorted({sentence for f in folds for sentence in f["said"]})
    text += "".join(f" {sentence[0].upper()}{sentence[1:]}." for sentence in said)
    return Section("What is shipped, and what was tried", text, table=tuple(rows))


def _better(found: Mapping[str, Any]) -> str:
    return "larger is better" if found["larger_is_better"] else "smaller is better"


def _learning_curve(found: Mapping[str, Any], spec: TaskSpec) -> Section:
    points = found["learning_curve"]["points"]
    names = list(dict.fromkeys(name for p in points for name in p["scores"]))
    word = _word(found["primary"], spec)
    rows = [("training subjects", *(_NAMES.get(n, n) for n in names))]
    curves: dict[str, list[Any]] = {_NAMES.get(n, n): [] for n in names}
    compared: list[tuple[str, ...]] = [("training subjects", "this model against", "difference", "95 % interval", "p")]
    for p in points:
        rows.append((f"{p['subjects']:g}", *(_interval(p["scores"][n]) if n in p["scores"] else "-" for n in names)))
        for n in names:
            if n in p["scores"]:
                s = p["scores"][n]
                curves[_NAMES.get(n, n)].append((p["subjects"], s["mean"], s["low"], s["high"]))
        for c in p["comparisons"]:
            between = f"{_signed(c['low'])} to {_signed(c['high'])}"
            name = _NAMES.get(c["against"], c["against"])
            compared.append((f"{p['subjects']:g}", name, _signed(c["difference"]), between, _p(c["p"])))
    figure = charts.learning_curve_figure(curves, word)
    tried: list[tuple[str, ...]] = [("training subjects", "candidate", word, "shipped by")]
    for p in points:
        for name, c in ((p.get("candidates") or {}).get("table") or {}).items():
            shipped = f"{c['chosen']} of {len(p['candidates']['folds'])}" if c["chosen"] else "-"
            tried.append((f"{p['subjects']:g}", _CANDIDATES.get(name, name), _interval(c["outer"]), shipped))
    good = "above" if found["larger_is_better"] else "below"
    return Section(
        "How many cases it takes",
        "The same folds, held-out cases and number of steps with fewer training subjects (the mean over folds is "
        "given); a smaller draw is part of the larger ones. Intervals and bands: 95 % bootstrap over the held-out "
        "subjects; they do not hold the luck of the draw.",
        figures=((f"{word[0].upper() + word[1:]} over the number of training subjects, {_better(found)}", figure),),
        table=tuple(rows),
        tables=(
            *(((f"Paired differences in {word}: {good} 0 this model is better", tuple(compared)),)
              if len(compared) > 1 else ()),
            *((("Candidates on the held-out cases, and in how many runs each was chosen", tuple(tried)),)
              if len(tried) > 1 else ()),
        ),
        figures_first=True,
    )  # fmt: skip


def _curves(found: Mapping[str, Any], spec: TaskSpec) -> Section:
    def known(points: Sequence[Sequence[float | None]]) -> list[tuple[float, float]]:
        return [(step, value) for step, value in points if step is not None and value is not None]

    curves = {run: {name: known(points) for name, points in each.items()} for run, each in found["curves"].items()}
    losses = {run: each["total"] for run, each in curves.items() if each.get("total")}
    figures = [("Loss on training cases, one curve a run", report.curves_figure(losses))] if losses else []
    watched = {
        run: points for run, each in curves.items() for name, points in each.items()
        if name.startswith(("held_", "inner_")) and points
    }  # fmt: skip
    text = f"{found['provenance']['steps']} steps in all." if "provenance" in found else ""
    if watched:
        chosen = any(name.startswith("inner_") for each in curves.values() for name in each)
        where = "inner cases, by which the step is chosen" if chosen else "held-out cases, only to look at"
        word = _word(found["primary"], spec)
        figures.append((f"{word} while training, on {where}", report.curves_figure(watched, y_label=word)))
    return Section("How training went", text, figures=tuple(figures))


def _transfer(found: Mapping[str, Any]) -> Section:
    """What came from the backbone's file: encoder, decoder, and why."""
    transfer = found["transfer"]
    rows = [("run", "decoder", "last layer", "with it", "without it", "gain", "standard error", "steps of the trial")]
    for name, fold in transfer["folds"].items():
        trial = fold["trial"]
        numbers: tuple[str, ...] = ("", "", "", "", "")
        if trial and trial["subjects"]:
            scores = (_number(trial["scores"][c]) for c in ("decoder", "encoder"))
            steps = f"{trial['steps']} beside {trial['of_steps']}"
            numbers = (*scores, _signed(trial["gain"]), _number(trial["standard_error"]), steps)
        rows.append((name, "taken" if fold["decoder"] else "fresh", fold["last_layer"], *numbers))
    text = "The encoder's weights always come from the backbone's file. "
    if transfer["asked"] == "auto":
        text += (
            "Its decoder was taken where short trainings on inner folds of the training side were better with it by "
            "more than one standard error; no held-out case was looked at for that."
        )
    else:
        text += f"Its decoder was {'' if transfer['asked'] else 'not '}asked for (`adapt.decoder`)."
    return Section("What came from pre-training", text, table=tuple(rows))


def _decisions(found: Mapping[str, Any]) -> Section:
    rows = [("tried", "on held-out cases")]
    for said in found["decided"]:
        what, _, came = said.partition(": ")
        rows.append((what, came.removesuffix(" on held-out cases")))
    d = found["decisions"]
    kept = []
    if d["mirror"]:
        kept.append("the mean over mirrored volumes (" + ", ".join("XYZ"[axis] for axis in d["mirror"]) + ")")
    if d["largest_component"]:
        kept.append("only the largest connected part of each label")
    if d["min_ml"]:
        kept.append(f"no connected part below {d['min_ml']:g} ml")
    if d["temperature"] != 1:
        kept.append(f"a temperature of {d['temperature']:.2f}")
    if list(d["bias"]) != [0, 1]:
        shift = f"{'−' if d['bias'][0] >= 0 else '+'} {_number(abs(d['bias'][0]))}"
        kept.append(f"the correction (answer {shift}) / {d['bias'][1]:.3f}")
    text = "A change of the answers is kept only where it helps on held-out cases; a case is scored under what the "
    text += f"other folds chose. The bundle ships {' and '.join(kept) or 'the answers as the networks give them'}."
    return Section("What is done to the answers", text, table=tuple(rows) if any(r[1] for r in rows[1:]) else None)


# ---- cases -----------------------------------------------------------------------------------------------------------


def _ranked(found: Mapping[str, Any], spec: TaskSpec) -> list[Mapping[str, Any]]:
    """The cases of the first repeat, worst first."""
    rows = [row for row in found["cases"] if row["repeat"] == 0]
    if spec.kind == "segmentation":
        return sorted(rows, key=lambda row: row["dice"])
    return sorted(rows, key=lambda row: -_error(row, spec))


def _error(row: Mapping[str, Any], spec: TaskSpec) -> float:
    if spec.kind == "regression":
        return abs(row["answer"][0] - row["truth"][0])
    if spec.mode == "multilabel":
        return float(np.mean([abs(a - t) for a, t in zip(row["answer"], row["truth"]) if t is not None] or [0.0]))
    return 1 - row["answer"][int(row["truth"][0])]


def _picked(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    named = [("Worst", rows[0]), ("Median", rows[len(rows) // 2]), ("Best", rows[-1])]
    return named if len(rows) >= 3 else named[: len(rows)]


def _cases(run: Path, found: Mapping[str, Any], store: Store, spec: TaskSpec) -> Section:
    ranked = _ranked(found, spec)
    figures = []
    for word, row in _picked(ranked):
        entry = _entry(store, row)
        volume, contrast = _shown(store, entry, spec)
        caption = f"{word} of {len(ranked)} held-out cases: {_who(row)}, {_said(row, spec)}; on {contrast}"
        if spec.kind == "segmentation":
            truth, answer = _true(store, entry, spec), _predicted(run, row, store, spec)
            assert truth is not None
            figures.append((caption, report.overlay_figure(volume, truth, answer, spacing_mm=store.spec.spacing_mm,
                                                           titles=("True", "Predicted"))))  # fmt: skip
        else:
            outline = _guide(found, store, entry)
            figures.append((caption, report.slices_figure([("", volume)], contours=[outline],
                                                          spacing_mm=store.spec.spacing_mm)))  # fmt: skip
    unit = f", {spec.unit}" if spec.unit else ""
    head = {
        "segmentation": ("case", "fold", "true, ml", "predicted, ml", "Dice"),
        "regression": ("case", "fold", f"true{unit}", f"answered{unit}", f"error{unit}"),
        "classification": ("case", "fold", "true", "answered (probability)", "probability missed"),
    }[spec.kind]
    rows: list[tuple[str, ...]] = [head]
    for row in ranked[:_MOST_ROWS]:
        rows.append((_who(row), str(row["fold"]), *_cells(row, spec)))
    repeats = " of the first repeat" if len({row["repeat"] for row in found["cases"]}) > 1 else ""
    text = f"Each case{repeats} is answered by the network that did not train on it. Radiological convention: the "
    text += "patient's left is on the right side of axial and coronal pictures."
    if spec.kind == "segmentation" and len(spec.values) > 2:
        text += " Every label is outlined; Dice is the mean over labels, volumes are of all labels together."
    if spec.kind == "classification":
        text += " Probability missed: 1 less the probability of the true class" + (
            ", the mean over labels." if spec.mode == "multilabel" else "."
        )
    more = f"The {_MOST_ROWS} worst of {len(ranked)}; `cases.csv` in the run's folder holds them all"
    caption = more if len(ranked) > _MOST_ROWS else "All cases, worst first"
    return Section("Case by case", text, tuple(figures), tables=((caption, tuple(rows)),), figures_first=True)


def _entry(store: Store, row: Mapping[str, Any]) -> SessionEntry:
    key = (row["dataset"], row["subject"], row["session"])
    entry = next((s for s in store.sessions if s.key == key), None)
    if entry is None:
        raise ConfigError(f"{store.path} has no session {'/'.join(key)}; expected the store that the run was made from")
    return entry


def _shown(store: Store, entry: SessionEntry, spec: TaskSpec) -> tuple[np.ndarray, str]:
    legal = [scan for scan in entry.scans if scan.contrast in spec.contrasts]
    order = {contrast: place for place, contrast in enumerate(_SHOWN_FIRST)}
    scan = min(legal, key=lambda s: order.get(s.contrast, len(order)))
    return store.volume(entry, scan.name).astype(np.float32), scan.contrast


def _true(store: Store, entry: SessionEntry, spec: TaskSpec) -> np.ndarray | None:
    """[X, Y, Z] label values of a segmentation's target; what the task does not know is 0."""
    label = next((e.name for e in entry.labels if e.name in (f"{spec.target}_mask", f"{spec.target}_labels")), None)
    if label is None:
        return None
    volume = store.volume(entry, label)
    return (volume != 0) if label.endswith("_mask") else np.where(np.isin(volume, spec.values), volume, 0)


def _predicted(run: Path, row: Mapping[str, Any], store: Store, spec: TaskSpec) -> np.ndarray:
    """What the row's scores are of."""
    decisions = Decisions.from_dict(row["decisions"])
    with np.load(run / row["file"], allow_pickle=False) as saved:
        indices = saved["indices"][1 if decisions.mirror else 0]
    return np.asarray(spec.values)[postprocess.apply(indices, decisions, store.spec.spacing_mm)]


def _guide(found: Mapping[str, Any], store: Store, entry: SessionEntry) -> np.ndarray | None:
    """The mask that guided a scan-level task, where the session has one."""
    name = f"{found['config']['task'].get('lesion')}_mask"
    return store.volume(entry, name) != 0 if any(e.name == name for e in entry.labels) else None


def _who(row: Mapping[str, Any]) -> str:
    return "/".join(p for p in (row["subject"], row["session"]) if p)


def _said(row: Mapping[str, Any], spec: TaskSpec) -> str:
    if spec.kind == "segmentation":
        return f"Dice {row['dice']:.3f}, {row['true_ml']:.1f} ml true, {row['predicted_ml']:.1f} ml predicted"
    true, answered, _ = _cells(row, spec)
    unit = f" {spec.unit}" if spec.unit else ""
    return f"true {true}{unit}, answered {answered}{unit}"


def _cells(row: Mapping[str, Any], spec: TaskSpec) -> tuple[str, str, str]:
    if spec.kind == "segmentation":
        return f"{row['true_ml']:.2f}", f"{row['predicted_ml']:.2f}", f"{row['dice']:.3f}"
    error = _error(row, spec)
    if spec.kind == "regression":
        decimals = 1 if max(abs(row["truth"][0]), abs(row["answer"][0])) >= 10 else 3
        return f"{row['truth'][0]:.{decimals}f}", f"{row['answer'][0]:.{decimals}f}", f"{error:.{decimals}f}"
    if spec.mode == "multilabel":
        true = ", ".join(v for v, t in zip(spec.values, row["truth"]) if t) or "none"
        answered = ", ".join(f"{v} {a:.2f}" for v, a in zip(spec.values, row["answer"]))
        return true, answered, f"{error:.2f}"
    top = int(np.argmax(row["answer"]))
    return str(spec.values[int(row["truth"][0])]), f"{spec.values[top]} ({row['answer'][top]:.2f})", f"{error:.2f}"


# ---- calibration, saliency, shortcuts --------------------------------------------------------------------------------


def _calibration(found: Mapping[str, Any], spec: TaskSpec) -> list[Section]:
    c = found.get("calibration")
    if not c:
        return []
    if spec.kind == "regression":
        unit = f" {spec.unit}" if spec.unit else ""
        pairs = [(row["truth"][0], row["answer"][0]) for row in found["cases"]]
        coverage = (
            "there are too few cases to check how often it holds the truth" if c["coverage"] is None else
            f"intervals made from the other folds' errors held the truth in {c['coverage']:.0%} of the held-out cases"
        )  # fmt: skip
        text = (
            f"Too few cases for a prediction interval of {c['level']:.0%}." if c["half_width"] is None else
            f"The {c['level']:.0%} prediction interval is the answer ± {c['half_width']:.3g}{unit} (conformal); "
            f"{coverage}."
        )  # fmt: skip
        if len({row["fold"] for row in found["cases"]}) > 1:
            did = "was kept" if c["kept"] else "was not kept"
            text += (
                "\n\nAnswers of a regression are pulled towards the mean of its training cases. Undoing that (answer = "
                f"a + b · truth, fitted on the other folds) moved the mean absolute error from {c['mae_before']:.3g} "
                f"to {c['mae_after']:.3g}{unit} and {did}."
            )
        truth, answers = [t for t, _ in pairs], [a for _, a in pairs]
        figure = charts.scatter_figure(truth, answers, unit=spec.unit, half_width=c["half_width"])
        return [Section("How far off", text, figures=(("Held-out cases; line: equality, band: prediction interval",
                                                       figure),))]  # fmt: skip
    text = (
        "On the diagonal of the plot, what is said with a probability of 70 % is right 7 times in 10. Expected "
        f"calibration error: {_number(c['ece_before'])} as the networks answer"
    )
    text += (
        f", {_number(c['ece_after'])} after a temperature fitted on the other folds, which was kept (the bundle "
        f"divides its logits by {c['temperature']:.2f})." if c["kept"] else "; scaling with a temperature was not kept."
    )  # fmt: skip
    two = spec.mode != "multilabel" and len(spec.values) == 2
    said = (
        f"probability of {spec.values[1]}" if two else
        "probability of a label" if spec.mode == "multilabel" else "probability of the class that is answered"
    )  # fmt: skip
    right = f"share that is {spec.values[1]}" if two else "share that has it" if spec.mode == "multilabel" else (
        "share that is right"
    )  # fmt: skip
    figure = charts.reliability_figure(c["reliability"], said, right)
    return [Section("How sure it is", text, figures=(("Held-out answers in bins; beside a point: how many", figure),))]


def _saliency(found: Mapping[str, Any], store: Store, spec: TaskSpec, bundle: Bundle) -> list[Section]:
    figures = []
    for word, row in _picked(_ranked(found, spec)):
        if row["fold"] >= len(bundle.networks):
            continue
        entry = _entry(store, row)
        image, present = _contrasts(store, entry, spec)
        method = "gradcam" if spec.kind == "segmentation" else "hirescam"
        network = bundle.networks[row["fold"]]
        heat = explain_volume([network], spec, image, present, labels=_label_map(store, entry, network),
                              method=method, spacing_mm=store.spec.spacing_mm)  # fmt: skip
        volume, contrast = _shown(store, entry, spec)
        caption = f"{word} case: {_who(row)}, {_said(row, spec)}; {_about(heat.target, spec)}, on {contrast}"
        if spec.kind == "segmentation":
            outline = _true(store, entry, spec)
            if outline is not None and outline.dtype != bool:
                outline = outline == int(heat.target)
        else:
            outline = _guide(found, store, entry)
        if outline is not None and outline.any() and heat.heat.any():
            part = outline.sum() / (volume > volume.min()).sum()
            caption += f"; {share_inside(heat.heat, outline):.0%} of the map lies inside the outline, which takes "
            caption += f"{part:.1%} of the volume shown"
        if not heat.heat.any():
            caption += "; the map is empty, for nothing speaks for it" + (
                " where nothing is predicted" if spec.kind == "segmentation" else ""
            )
        place = None
        if spec.kind != "segmentation" and heat.heat.any():
            head = _head(volume)
            caption += f"; {1 - share_inside(heat.heat, head):.0%} of the map lies outside the head"
            x, y, z = np.unravel_index(int((np.abs(heat.heat) * head).argmax()), head.shape)
            place = int(x), int(y), int(z)  # where the head has nothing to show there is nothing to see
        figures.append((caption, report.heat_figure(volume, heat.heat, spacing_mm=store.spec.spacing_mm, at_vox=place,
                                                    outline=outline, outline_name="True")))  # fmt: skip
    name = "Grad-CAM" if spec.kind == "segmentation" else "HiResCAM"
    text = (
        f"Gradient maps ({name}) of the network that did not train on the case, each scaled to its own maximum. They "
        "show what the answer reacted to, not that it was right to. `brainfm explain method=occlusion` checks a map "
        "without gradients."
    )
    if spec.kind != "segmentation":
        text += " The planes cut the head where the map is strongest. What lies outside the head is no anatomy: "
        text += f"compare it with {'the shortcuts' if found.get('audit') else 'what else could tell the answer'}."
    return [Section("What it looks at", text, figures=tuple(figures))] if figures else []


def _label_map(store: Store, entry: SessionEntry, network: Any) -> np.ndarray | None:
    """The label map that the answer may be made of."""
    reads = reads_of([network])
    there = reads is not None and any(label.name == reads.labels for label in entry.labels)
    return store.volume(entry, reads.labels) if there and reads is not None else None


def _contrasts(store: Store, entry: SessionEntry, spec: TaskSpec) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.zeros(len(spec.contrasts), *entry.shape)
    present = torch.zeros(len(spec.contrasts), dtype=torch.bool)
    for m, contrast in enumerate(spec.contrasts):
        name = next((scan.name for scan in entry.scans if scan.contrast == contrast), None)
        if name is not None:
            image[m], present[m] = torch.from_numpy(store.volume(entry, name).astype(np.float32)), True
    return image, present


def _head(volume: np.ndarray) -> np.ndarray:
    try:
        return head_mask({"": volume})
    except ScanError:  # one value everywhere
        return np.ones(volume.shape, dtype=bool)


def _about(target: str, spec: TaskSpec) -> str:
    """What the map of a target shows."""
    if spec.kind == "regression":
        return f"red raises the answer ({target}), blue lowers it"
    if spec.kind == "segmentation":
        return f"what speaks for {spec.target}" + (f" label {target}" if len(spec.values) > 2 else "")
    return f"what speaks for {spec.target} {target}"


def _audit(found: Mapping[str, Any], spec: TaskSpec) -> Section:
    audit = found["audit"]
    auroc = audit["measure"] == "auroc"
    voxels = spec.kind == "segmentation"
    asked = "A map of voxels cannot be asked for, so the label here is the logarithm of the volume of "
    asked = f"{asked}{spec.target} in ml. " if voxels else ""
    word = "AUROC" if auroc else "skill"
    head = ("from this alone", word, "p", "noticed from", "answers explained", f"model's {word} without it",
            "p without it", "effect left", "verdict")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    untested = []
    for s in audit["shortcuts"]:
        name = (f"{s['name']} ({s['label']})" if s["label"] else s["name"]) + ("*" if s["anatomy"] else "")
        if s["code"] == "untestable":
            untested.append((name, s["verdict"].removeprefix("cannot be tested: ")))
            continue
        verdict = _FOUND.get(s["code"], s["code"])
        cells = (_short(s["score"]), _p(s["p_family"]), _short(s["noticed_from"]), _percent(s["explained"]))
        rows.append((name, *cells, _short(s["equalised"]), _p(s["equalised_p"]), _percent(s["kept"]), verdict))
    own = "; ".join(
        (f"{label}: " if label else "") + f"{_short(score)}, p {_p(audit['model_p'][label])}"
        for label, score in audit["model"].items()
    )
    measure = (
        "AUROC: .5 is a guess" if auroc else
        "skill: the share of the error of always answering the mean that it takes away; 0 is a guess, 1 no error"
    )  # fmt: skip
    text = (
        f"{audit['verdict']}\n\nCan the {'volume' if voxels else 'answer'} be guessed without looking at the brain? "
        f"{asked}Each line lets a linear model tell the label from one kind of side information, cross-validated by "
        f"subject in folds of the audit's own (not those of the training), and measures it by {measure}. The model's "
        f"own, by the same measure: {own}, {_count(audit['cases'], 'case')} of "
        f"{_count(audit['subjects'], 'subject')}.\n\n"
        "p: by permutation, for all lines together (Holm). Noticed from: in so few cases a weaker shortcut stays below "
        "the line of chance, so no line is a proof of absence. Explains: share of the variance of the model's answers. "
        "Without it: the model's score among cases that are alike in it, p against chance there, and how much of the "
        "model's effect is left"
    )
    text += (
        " (of AUROC − .5)." if auroc else
        " (of the slope of the answers on the truth, which decides: skill falls already because alike cases differ "
        "less)."
    )  # fmt: skip
    if any(s["anatomy"] and s["code"] != "untestable" for s in audit["shortcuts"]):
        text += " * size and shape of a head are anatomy too: by themselves no proof of a shortcut."
    tables = (("Could not be tested", (("", ""), *untested)),) if untested else ()
    return Section("Shortcuts", text, table=tuple(rows) if len(rows) > 1 else None, tables=tables)


def _short(value: Any) -> str:
    """A number or an interval with two decimals."""

    def two(number: float | None) -> str:
        return "-" if number is None else f"{number:.2f}".replace("-", "−")

    if not isinstance(value, Mapping):
        return two(value)
    return f"{two(value['mean'])} [{two(value['low'])}, {two(value['high'])}]"


def _reproduce(found: Mapping[str, Any]) -> Section:
    provenance = found.get("provenance", {})
    plan = found["plan"]
    patch = " x ".join(str(p) for p in found["task"]["patch_vox"])
    parts = f" in {plan['accumulate']} parts" if plan.get("accumulate", 1) > 1 else ""
    hours = provenance.get("hours", 0)
    rows = [
        ("", ""),
        ("brainfm", f"{provenance.get('version', '')}, commit {provenance.get('commit') or 'unknown'}"),
        ("data", f"fingerprint {provenance.get('data') or 'unknown'}"),
        ("pre-trained weights", ", ".join(provenance.get("parents", [])) or "none"),
        ("training", f"{provenance.get('steps', 0)} steps in all, "
                     f"{f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.0f} min'} on "
                     f"{provenance.get('device', 'unknown')}"),
        ("window", f"{patch} voxels, {plan.get('precision', '')}, {plan.get('batch_size', '')} a step{parts}"),
    ]  # fmt: skip
    if not provenance:
        rows = [rows[0], rows[-1]]
    return Section(
        "To make it again",
        f"`{found['command']}`\n\nFor research. Not a medical device: no diagnosis or treatment may rest on it.",
        table=tuple(rows),
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _number(value: float | None) -> str:
    return "-" if value is None else report.number(value)


def _signed(value: float | None) -> str:
    shown = _number(value)
    return shown if value is None or shown.startswith("−") or not float(shown) else f"+{shown}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}".replace("-", "−")


def _p(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None or found["high"] is None:
        return _number(found["mean"])
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"
