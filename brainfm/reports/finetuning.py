"""The page of a fine-tuning for a clinician and a reviewer, made from what the run left on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm.reports import charts
from brainfm.reports.cases import cases_section, maps_section
from brainfm.reports.comparison import NAMES, candidates_section, learning_curve_section, score_name, scores_section
from brainfm.reports.kind_page import KindPage
from brainfm.reports.page import Section, write_page
from brainfm.reports.run import FinishedRun
from brainfm.reports.shortcuts import shortcuts_section
from brainfm.reports.wording import count, interval, number, sentence, signed
from brainfm.seen import Overlap
from brainfm.tasks.registry import kind_of

FILE = "report.html"
_MOST_NAMES = 8  # of sessions in a line


def write_finetuning_page(run: str | Path, out: Path | None = None, store: str | Path | None = None) -> Path:
    """Writes ``report.html`` into the run's folder, or to ``out``; nothing in it is loaded from elsewhere.

    Args:
        run: the folder of a finished fine-tuning.
        out: where else to write it.
        store: where the scans are now; None: where they were then.

    Returns:
        The file.

    Raises:
        ConfigError: where the folder holds no finished fine-tuning.
        OSError: where the page cannot be written.
    """
    read = FinishedRun.read(Path(run), store)
    page: KindPage = kind_of(read.spec.kind).page(read)
    path = out or read.folder / FILE
    write_page(
        path, title=f"{read.spec.kind.capitalize()} of {read.spec.target}", lead=_lead(read), sections=_sections(page),
        command=f"brainfm report run={run}", numbers=_numbers(read),
    )  # fmt: skip
    return path


def _sections(page: KindPage) -> list[Section]:
    """What there is to tell, in order."""
    run, found = page.run, page.run.found
    sections: list[Section | None] = [_cohort(found), _splits(page)]
    if "scores" in found:
        sections.append(scores_section(page))
    if found.get("candidates"):
        sections.append(candidates_section(page))
    if found.get("learning_curve"):
        sections.append(learning_curve_section(page))
    if found.get("cases"):
        sections.append(cases_section(page))
        if found.get("calibration"):
            sections.append(page.calibration(found["calibration"], found["cases"]))
        sections.append(maps_section(page))
    if found.get("audit"):
        sections.append(shortcuts_section(page))
    if found.get("decided"):
        sections.append(_decisions(found))
    if (found.get("transfer") or {}).get("file_has_decoder"):
        sections.append(_transfer(found))
    if found.get("curves"):
        sections.append(_curves(run))
    sections.append(_reproduce(found))
    return [section for section in sections if section is not None]


def _lead(run: FinishedRun) -> str:
    found, cohort = run.found, run.found["cohort"]
    text = (
        f"{count(cohort['sessions'], 'session')} of {count(cohort['subjects'], 'subject')}, {_begun(found)}. Every "
        "score below comes from cases that the network answering them was not trained on, and nothing was chosen on "
        "the cases that are scored."
    )
    if "scores" not in found:
        return text
    primary = found["primary"]
    own = found["scores"]["model"][primary]
    word = score_name(primary, run.spec.unit)
    text += f"\n\n{sentence(word)} {interval(own)}, with its 95 % interval by subject. "
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
    name = NAMES.get(c["against"], c["against"])
    if c["difference"] is None or c["low"] is None or c["high"] is None:
        return f"Against {name}: these cases cannot tell."
    better, worse = (c["low"] > 0, c["high"] < 0) if larger_is_better else (c["high"] < 0, c["low"] > 0)
    said = "Better than" if better else "Worse than" if worse else "No clear difference to"
    return f"{said} {name}: {signed(c['difference'])} [{signed(c['low'])}, {signed(c['high'])}]."


def _numbers(run: FinishedRun) -> list[tuple[str, str]]:
    found = run.found
    cards = [(str(found["cohort"]["subjects"]), "subjects")]
    if "scores" in found:
        own = found["scores"]["model"][found["primary"]]
        cards.insert(0, (number(own["mean"]), f"{score_name(found['primary'], run.spec.unit)}, held-out cases"))
        cards.insert(1, (f"{number(own['low'])} to {number(own['high'])}", "95 % interval"))
    cards.append((str(len(found["splits"])), "folds, each answered by its own network"))
    return cards


def _cohort(found: Mapping[str, Any]) -> Section:
    cohort = found["cohort"]
    rows: list[tuple[str, ...]] = [("", "sessions", "")]
    for contrast, scans in cohort["contrasts"].items():
        share = "all" if scans == cohort["sessions"] else f"{scans / cohort['sessions']:.0%} of them"
        unused = "" if contrast in found["task"]["contrasts"] else "; the model is not shown it"
        rows.append((f"contrast {contrast}", str(scans), share + unused))
    for name, column in cohort["columns"].items():
        if "counts" in column:
            values = ", ".join(f"{value}: {n}" for value, n in column["counts"].items())
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
    for line in left:
        session, _, reason = line.partition(": ")
        reasons.setdefault(reason, []).append(session)
    lost: list[tuple[str, ...]] = [("why", "sessions", "")]
    lost += [(reason, str(len(sessions)), _names(sessions)) for reason, sessions in reasons.items()]
    caption = f"{count(len(left), 'session')} could not answer and {'were' if len(left) > 1 else 'was'} left out"
    return Section("The cohort", text, table=tuple(rows), tables=((caption, tuple(lost)),))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(name for name in names[:_MOST_NAMES] if name) + more


def _splits(page: KindPage) -> Section:
    found = page.run.found
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
    balanced = list(page.balanced)
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


def _curves(run: FinishedRun) -> Section:
    found = run.found

    def known(points: Sequence[Sequence[float | None]]) -> list[tuple[float, float]]:
        return [(step, value) for step, value in points if step is not None and value is not None]

    curves = {fold: {name: known(points) for name, points in each.items()} for fold, each in found["curves"].items()}
    losses = {fold: each["total"] for fold, each in curves.items() if each.get("total")}
    figures = [("Loss on training cases, one curve a run", charts.curves_figure(losses))] if losses else []
    watched = {
        fold: points for fold, each in curves.items() for name, points in each.items()
        if name.startswith(("held_", "inner_")) and points
    }  # fmt: skip
    text = f"{found['provenance']['steps']} steps in all." if "provenance" in found else ""
    if watched:
        chosen = any(name.startswith("inner_") for each in curves.values() for name in each)
        where = "inner cases, by which the step is chosen" if chosen else "held-out cases, only to look at"
        word = score_name(found["primary"], run.spec.unit)
        figures.append((f"{word} while training, on {where}", charts.curves_figure(watched, y_label=word)))
    return Section("How training went", text, figures=tuple(figures))


def _transfer(found: Mapping[str, Any]) -> Section:
    """What came from the backbone's file: encoder, decoder, and why."""
    transfer = found["transfer"]
    rows = [("run", "decoder", "last layer", "with it", "without it", "gain", "standard error", "steps of the trial")]
    for name, fold in transfer["folds"].items():
        trial = fold["trial"]
        numbers: tuple[str, ...] = ("", "", "", "", "")
        if trial and trial["subjects"]:
            scores = (number(trial["scores"][c]) for c in ("decoder", "encoder"))
            steps = f"{trial['steps']} beside {trial['of_steps']}"
            numbers = (*scores, signed(trial["gain"]), number(trial["standard_error"]), steps)
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
        shift = f"{'−' if d['bias'][0] >= 0 else '+'} {number(abs(d['bias'][0]))}"
        kept.append(f"the correction (answer {shift}) / {d['bias'][1]:.3f}")
    text = "A change of the answers is kept only where it helps on held-out cases; a case is scored under what the "
    text += f"other folds chose. The bundle ships {' and '.join(kept) or 'the answers as the networks give them'}."
    return Section("What is done to the answers", text, table=tuple(rows) if any(r[1] for r in rows[1:]) else None)


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
