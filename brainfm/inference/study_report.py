"""The report of a fine-tuning: one HTML file for a clinician and a reviewer, made from what the run left on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.store import SessionEntry, Store
from brainfm.inference import charts, report
from brainfm.inference.explain import explain_volume
from brainfm.inference.report import Section
from brainfm.specs import ConfigError, TaskSpec
from brainfm.tasks.bundle import Bundle, read_bundle

RESULTS = "results.json"
FILE = "report.html"
_NAMES = {
    "model": "this model",
    "scratch": "same schedule from scratch",
    "random_linear": "random frozen encoder + linear",
    "features": "intensities and volumes + linear",
}
_SHOWN_FIRST = ("flair", "dwi", "t2", "t1c", "t1")  # the contrast a case is shown on, where it has it
_MOST_ROWS = 60  # of the table of cases
_MOST_LEFT_OUT = 20
_WORDS = {
    "dice": "Dice",
    "auroc": "AUROC",
    "mae": "mean absolute error",
    "balanced_accuracy": "balanced accuracy",
    "qwk": "quadratic weighted kappa",
}


def write_study_report(run: str | Path, out: Path | None = None) -> Path:
    """Writes ``report.html`` into the run's folder, or to ``out``; nothing in it is loaded from elsewhere.

    Args:
        run: the folder of a finished fine-tuning.

    Returns:
        The file.

    Raises:
        ConfigError: where the folder holds no finished fine-tuning.
    """
    run = Path(run)
    found = _read(run / RESULTS)
    store = Store.open(found["store"])
    bundle = read_bundle(run / "bundle") if (run / "bundle").is_dir() else None
    spec = TaskSpec.from_dict(found["task"])
    sections = [_cohort(found), _splits(found)]
    if "scores" in found:
        sections.append(_scores(found))
    if found.get("learning_curve"):
        sections.append(_learning_curve(found))
    if found.get("curves"):
        sections.append(_curves(found))
    if "cases" in found:
        sections += [_cases(run, found, store, spec), *_calibration(found, spec)]
        if bundle is not None:
            sections.append(_saliency(found, store, spec, bundle))
    if found.get("audit"):
        sections.append(_audit(found))
    sections.append(_reproduce(found))
    path = out or run / FILE
    report.write_report(
        path, title=_title(spec), lead=_lead(found, spec), sections=sections, command=found["command"],
        numbers=_numbers(found),
    )  # fmt: skip
    return path


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected the folder of a finished brainfm finetune") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); expected what brainfm finetune wrote") from None
    if not isinstance(found, dict) or found.get("format") != 1:
        raise ConfigError(f"{file} is not a result that this brainfm reads")
    return found


def _title(spec: TaskSpec) -> str:
    return f"{spec.kind.capitalize()} of {spec.target}"


def _word(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


# ---- what was found --------------------------------------------------------------------------------------------------


def _lead(found: Mapping[str, Any], spec: TaskSpec) -> str:
    cohort = found["cohort"]
    text = (
        f"{cohort['sessions']} sessions of {cohort['subjects']} subjects. Every number below comes from cases that the "
        "network answering them was not trained on, and nothing was chosen on the cases that are scored."
    )
    if "scores" not in found:
        return text
    primary = found["primary"]
    own = found["scores"]["model"][primary]
    text += f"\n\n{_word(primary)[0].upper() + _word(primary)[1:]}: {_interval(own)} (95 % bootstrap by subject)."
    for c in found["comparisons"]:
        text += f" {_verdict(c, found['larger_is_better'])}"
    if found.get("audit"):
        text += f"\n\nShortcuts: {found['audit']['verdict']}"
    return text


def _verdict(c: Mapping[str, Any], larger_is_better: bool) -> str:
    name = _NAMES.get(c["against"], c["against"])
    if c["difference"] is None or c["low"] is None or c["high"] is None:
        return f"Against {name}: not to be decided on these cases."
    better, worse = (c["low"] > 0, c["high"] < 0) if larger_is_better else (c["high"] < 0, c["low"] > 0)
    said = "better" if better else "worse" if worse else "no clear difference"
    return f"Against {name}: {said} ({c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}])."


def _numbers(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    cards = [(str(found["cohort"]["subjects"]), "subjects")]
    if "scores" in found:
        own = found["scores"]["model"][found["primary"]]
        cards.insert(0, (_number(own["mean"]), f"{_word(found['primary'])}, held-out cases"))
        cards.insert(1, (f"{_number(own['low'])} to {_number(own['high'])}", "95 % interval"))
    cards.append((str(len(found["splits"])), "training runs"))
    return cards


def _cohort(found: Mapping[str, Any]) -> Section:
    cohort = found["cohort"]
    rows: list[tuple[str, ...]] = [("", "sessions", "")]
    for contrast, count in cohort["contrasts"].items():
        rows.append((f"contrast {contrast}", str(count), f"{count / cohort['sessions']:.0%} of the sessions"))
    for name, column in cohort["columns"].items():
        if "counts" in column:
            values = ", ".join(f"{value}: {count}" for value, count in column["counts"].items())
        else:
            values = f"median {column['median']:g}, {column['smallest']:g} to {column['largest']:g}"
        rows.append((name, str(column["n"]), values))
    spacing = " x ".join(f"{s:g}" for s in found["preprocess"]["spacing_mm"])
    shape = " x ".join(f"{s:g}" for s in cohort["shape_vox"]["median"])
    text = f"Scans prepared at {spacing} mm; the median head takes {shape} voxels."
    left = cohort["left_out"]
    if left:
        shown = "\n\n".join(left[:_MOST_LEFT_OUT])
        more = f"\n\nand {len(left) - _MOST_LEFT_OUT} more." if len(left) > _MOST_LEFT_OUT else ""
        text += f"\n\n{len(left)} sessions could not answer and were left out:\n\n{shown}{more}"
    return Section("The cohort", text, table=tuple(rows))


def _splits(found: Mapping[str, Any]) -> Section:
    config = found["config"]
    rows: list[tuple[str, ...]] = [("run", "trained on", "checkpoint chosen on", "held out", "held-out sessions")]
    for s in found["splits"]:
        names = ", ".join(key.split("/", 1)[1].rstrip("/") for key in s["held"])
        shown = names if len(names) < 90 else names[:87] + "..."
        rows.append((s["folder"], str(s["trained"]), str(s["inner"] or "-"), str(len(s["held"])), shown))
    apart = " No site is on both sides." if config["sites_apart"] else ""
    text = (
        f"Cases are split by subject, balanced in the answer (seed {config['seed']}).{apart} A fold's weights are "
        + (
            "those of the step that was best on its inner cases." if config["inner"]
            else "the moving average at the last step: no checkpoint was chosen."
        )
    )  # fmt: skip
    return Section("Splits", text, table=tuple(rows))


def _scores(found: Mapping[str, Any]) -> Section:
    metrics = list(found["scores"]["model"])
    rows = [("", *(_NAMES.get(name, name) for name in found["scores"]))]
    for metric in metrics:
        rows.append((_word(metric), *(_interval(s[metric]) if metric in s else "-" for s in found["scores"].values())))
    primary = found["primary"]
    bars = [
        (_NAMES.get(name, name), s[primary]["mean"], s[primary]["low"], s[primary]["high"], s[primary]["n"])
        for name, s in found["scores"].items() if s[primary]["mean"] is not None and s[primary]["low"] is not None
    ]  # fmt: skip
    tables = []
    if found["comparisons"]:
        compared: list[tuple[str, ...]] = [("against", "difference", "95 % interval", "p", "cases")]
        for c in found["comparisons"]:
            between = f"{_signed(c['low'])} to {_signed(c['high'])}"
            cells = (_NAMES.get(c["against"], c["against"]), _signed(c["difference"]), between, _number(c["p"]))
            compared.append((*cells, str(c["n"])))
        tables.append((f"Paired differences in {_word(primary)}", tuple(compared)))
    if found["decided"]:
        tables.append(("What was tried on held-out cases", (("",), *((said,) for said in found["decided"]))))
    limits = (0.0, 1.0) if found["larger_is_better"] and all(b[2] >= 0 for b in bars) else None
    figure = report.interval_figure(bars, f"{_word(primary)}, mean and 95 % interval", limits, _NAMES["model"])
    return Section(
        "Scores against baselines",
        "Intervals: bootstrap over subjects. p: permutation of the two methods' answers by subject, two-sided. "
        "Baselines have the same folds: the same network and schedule from fresh weights, a linear model on a network "
        "that never learned anything, and a linear model on simple measurements.",
        table=tuple(rows),
        tables=tuple(tables),
        figures=((f"{_word(primary)} on held-out cases", figure),) if bars else (),
    )


def _learning_curve(found: Mapping[str, Any]) -> Section:
    points = found["learning_curve"]["points"]
    names = list(dict.fromkeys(name for p in points for name in p["scores"]))
    rows = [("training subjects", *(_NAMES.get(n, n) for n in names))]
    curves: dict[str, list[Any]] = {_NAMES.get(n, n): [] for n in names}
    for p in points:
        rows.append((f"{p['subjects']:g}", *(_interval(p["scores"][n]) if n in p["scores"] else "-" for n in names)))
        for n in names:
            if n in p["scores"]:
                s = p["scores"][n]
                curves[_NAMES.get(n, n)].append((p["subjects"], s["mean"], s["low"], s["high"]))
    figure = charts.learning_curve_figure(curves, _word(found["primary"]))
    return Section(
        "How many cases it takes",
        "The same folds, held-out cases and steps with fewer training subjects; a smaller draw is part of the larger "
        "ones. Bands: 95 % bootstrap over the held-out subjects; they do not hold the luck of the draw.",
        table=tuple(rows),
        figures=(("Score over the number of training subjects", figure),),
    )


def _curves(found: Mapping[str, Any]) -> Section:
    losses = {run: curves["total"] for run, curves in found["curves"].items() if curves.get("total")}
    figures = [("Loss on training patches, one curve a training run", report.curves_figure(losses))]
    watched = {
        f"{run}: {name.replace('_', ' ')}": values
        for run, curves in found["curves"].items() for name, values in curves.items()
        if name.startswith(("held_", "inner_"))
    }  # fmt: skip
    if watched:
        figures.append(("Scores while training, for the eye only", report.curves_figure(watched, y_label="score")))
    return Section("Learning", "", figures=tuple(figures))


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
        caption = f"{word} of {len(ranked)} held-out cases: {_who(row)}, {_said(row, spec)}, on {contrast}"
        if spec.kind == "segmentation":
            truth, answer = _masks(run, store, entry, row, spec)
            figures.append((caption, report.overlay_figure(volume, truth, answer, spacing_mm=store.spec.spacing_mm,
                                                           titles=("True", "Predicted"))))  # fmt: skip
        else:
            figures.append((caption, report.slices_figure([("", volume)], spacing_mm=store.spec.spacing_mm)))
    head = ("case", "fold", "true", "answered", "error" if spec.kind != "segmentation" else "Dice")
    if spec.kind == "segmentation":
        head = ("case", "fold", "true, ml", "predicted, ml", "Dice")
    rows: list[tuple[str, ...]] = [head]
    for row in ranked[:_MOST_ROWS]:
        rows.append((_who(row), str(row["fold"]), *_cells(row, spec)))
    more = f" The table holds the {_MOST_ROWS} worst." if len(ranked) > _MOST_ROWS else ""
    text = f"Each by the network that did not train on it, worst first.{more} Radiological convention: the patient's "
    text += "left is on the right side of axial and coronal pictures."
    return Section("Case by case", text, figures=tuple(figures), table=tuple(rows))


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


def _masks(
    run: Path, store: Store, entry: SessionEntry, row: Mapping[str, Any], spec: TaskSpec
) -> tuple[np.ndarray, np.ndarray]:
    label = next(e.name for e in entry.labels if e.name in (f"{spec.target}_mask", f"{spec.target}_labels"))
    with np.load(run / row["file"], allow_pickle=False) as saved:
        answer = saved["indices"]
    return store.volume(entry, label) != 0, answer != 0


def _who(row: Mapping[str, Any]) -> str:
    return "/".join(p for p in (row["subject"], row["session"]) if p)


def _said(row: Mapping[str, Any], spec: TaskSpec) -> str:
    if spec.kind == "segmentation":
        return f"Dice {row['dice']:.3f}, {row['true_ml']:.1f} ml true, {row['predicted_ml']:.1f} ml predicted"
    true, answered, _ = _cells(row, spec)
    return f"true {true}, answered {answered}"


def _cells(row: Mapping[str, Any], spec: TaskSpec) -> tuple[str, str, str]:
    if spec.kind == "segmentation":
        return f"{row['true_ml']:.2f}", f"{row['predicted_ml']:.2f}", f"{row['dice']:.3f}"
    error = _error(row, spec)
    if spec.kind == "regression":
        return f"{row['truth'][0]:.4g}", f"{row['answer'][0]:.4g}", f"{error:.3g}"
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
        pairs = [(row["truth"][0], row["answer"][0]) for row in found["cases"]]
        coverage = "too few cases to check" if c["coverage"] is None else f"{c['coverage']:.0%} of held-out cases"
        half = "unknown" if c["half_width"] is None else f"{c['half_width']:.3g} {spec.unit}".strip()
        kept = "kept" if c["kept"] else "not kept"
        text = (
            f"A prediction interval of {c['level']:.0%} is the answer ± {half}; with intervals made from the other "
            f"folds it held the truth in {coverage}. Correcting the pull towards the mean (answer = a + b · truth, "
            f"fitted on the other folds) moved the mean absolute error from {c['mae_before']:.3g} to "
            f"{c['mae_after']:.3g} and was {kept}."
        )
        truth, answers = [t for t, _ in pairs], [a for _, a in pairs]
        figure = charts.scatter_figure(truth, answers, unit=spec.unit, half_width=c["half_width"])
        return [Section("How far off", text, figures=(("Held-out answers; band: prediction interval", figure),))]
    text = (
        f"Expected calibration error {c['ece_before']:.3f} before and {c['ece_after']:.3f} after scaling with a "
        f"temperature fitted on the other folds; the bundle ships {c['temperature']:.2f}. On the diagonal, what is "
        "said with 70 % is right 7 times in 10."
    )
    figure = charts.reliability_figure(c["reliability"])
    return [Section("How sure it is", text, figures=(("Reliability of held-out answers; numbers: answers", figure),))]


def _saliency(found: Mapping[str, Any], store: Store, spec: TaskSpec, bundle: Bundle) -> Section:
    figures = []
    for word, row in _picked(_ranked(found, spec)):
        if row["fold"] >= len(bundle.networks):
            continue
        entry = _entry(store, row)
        image, present = _contrasts(store, entry, spec)
        method = "gradcam" if spec.kind == "segmentation" else "hirescam"
        heat = explain_volume([bundle.networks[row["fold"]]], spec, image, present, method=method,
                              spacing_mm=store.spec.spacing_mm)  # fmt: skip
        volume, contrast = _shown(store, entry, spec)
        caption = f"{word} case: {_who(row)}, {_said(row, spec)}; what speaks for {heat.target}, on {contrast}"
        figures.append((caption, report.heat_figure(volume, heat.heat, spacing_mm=store.spec.spacing_mm)))
    return Section(
        "What it looks at",
        "Gradient maps of the network that did not train on the case. They show what the answer reacted to, not that "
        "it was right to. `brainfm explain method=occlusion` checks a map without gradients.",
        figures=tuple(figures),
    )


def _contrasts(store: Store, entry: SessionEntry, spec: TaskSpec) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.zeros(len(spec.contrasts), *entry.shape)
    present = torch.zeros(len(spec.contrasts), dtype=torch.bool)
    for m, contrast in enumerate(spec.contrasts):
        name = next((scan.name for scan in entry.scans if scan.contrast == contrast), None)
        if name is not None:
            image[m], present[m] = torch.from_numpy(store.volume(entry, name).astype(np.float32)), True
    return image, present


def _audit(found: Mapping[str, Any]) -> Section:
    audit = found["audit"]
    head = ("from this alone", "predicts the answer", "p", "model's score when equalised", "verdict")
    rows: list[tuple[str, ...]] = [head]
    for s in audit["shortcuts"]:
        name = f"{s['name']} ({s['label']})" if s["label"] else s["name"]
        rows.append((name, _maybe(s["score"]), _number(s["p"]), _maybe(s["equalised"]), s["verdict"]))
    measure = "AUROC" if audit["measure"] == "auroc" else "skill: the share of the mean's error that it takes away"
    text = (
        f"{audit['verdict']}\n\nCan the answer be guessed without looking at the brain? Each line gives a linear model "
        f"one kind of side information, cross-validated by subject, and measures it by {measure}. Equalised: the "
        "model's score among cases that the side information cannot tell apart."
    )
    return Section("Shortcuts", text, table=tuple(rows))


def _maybe(value: Any) -> str:
    return _interval(value) if isinstance(value, Mapping) else _number(value)


def _reproduce(found: Mapping[str, Any]) -> Section:
    provenance = found.get("provenance", {})
    plan = found["plan"]
    patch = " x ".join(str(p) for p in found["task"]["patch_vox"])
    rows = [
        ("", ""),
        ("brainfm", f"{provenance.get('version', '')}, commit {provenance.get('commit') or 'unknown'}"),
        ("data", f"fingerprint {provenance.get('data', 'unknown')}"),
        ("pre-trained weights", ", ".join(provenance.get("parents", [])) or "none"),
        ("training", f"{provenance.get('steps', 0)} steps in all, {provenance.get('hours', 0):.2f} h on "
                     f"{provenance.get('device', 'unknown')}"),
        ("patch", f"{patch} voxels, {plan.get('precision', '')}, batch {plan.get('batch_size', '')} in "
                  f"{plan.get('accumulate', 1)} part(s)"),
    ]  # fmt: skip
    return Section(
        "To make it again",
        f"`{found['command']}`\n\nFor research. Not a medical device: no diagnosis or treatment may rest on it.",
        table=tuple(rows),
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _interval(found: Mapping[str, Any]) -> str:
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"
