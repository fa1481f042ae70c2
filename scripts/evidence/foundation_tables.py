"""The tables of scripts/evidence/foundation.py, from the records of its runs alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from foundation_runs import Job, best_rate, recorded, score_of

from brainfm.errors import ConfigError
from brainfm.scoring.intervals import Interval, crossed_bootstrap

TITLES = {
    "scratch": "scratch", "encoder": "encoder", "decoder": "encoder + decoder", "rendered": "scratch, rendered",
}  # fmt: skip
ABOUT = {
    "hippocampus": "anterior and posterior hippocampus, manual labels",
    "lesions": "lesions, manual or voted labels",
    "tissues": "CSF, grey and white matter, labels of DLMUSE (the source that the pre-training may have had)",
}
PARTS = {
    "t1": "T1", "t2": "T2, rendered by synthesis/contrast", "flair": "FLAIR, rendered by synthesis/contrast",
}  # fmt: skip
Records = Mapping[int, dict[str, Any]]  # seed -> record


def tables(trials: Mapping[tuple[str, str], Sequence[Job]], runs: Sequence[Job], out: Path) -> list[str]:
    """Markdown: the rates that were tried, then a table for each question, number of people and contrast."""
    lines = _rates(trials, out)
    groups: dict[tuple[str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for job in runs:
        record = recorded(job, out)
        if record is not None:
            groups.setdefault((job.family, len(job.trained)), {}).setdefault(job.start, {})[job.seed] = record
    for (family, shots), starts in groups.items():
        some = next(iter(next(iter(starts.values())).values()))
        for part in dict.fromkeys(word.split(" ")[0] for word in _asked(some)):
            lines += _question(family, shots, part, starts)
        if any("pairs" in read for read in some["reads"].values()):
            lines += _pairs(starts, out)
        lines += _notes(starts)
    return lines


# ---- numbers ---------------------------------------------------------------------------------------------------------


def scores(record: dict[str, Any], part: str, step: int) -> dict[str, float]:
    """subject -> Dice after so many steps; 0 for all where the run broke before that."""
    people = [word.split(" ", 1)[1] for word in _asked(record) if word.startswith(f"{part} ")]
    read = record["reads"].get(str(step))
    return {who: 0.0 if read is None else float(read[part][who]["dice"]) for who in people}


def _asked(record: Mapping[str, Any]) -> list[str]:
    return [*record["setting"]["tested"], *record["setting"]["others"]]


def matrix(records: Records, part: str, step: int) -> np.ndarray:
    """[R, S] Dice, rows in the order of the seeds, columns in that of the subjects.

    Raises: ConfigError where the runs were not tested on the same people.
    """
    rows = [scores(records[seed], part, step) for seed in sorted(records)]
    if any(list(row) != list(rows[0]) for row in rows):
        raise ConfigError(f"runs were tested on different people ({part}), expected the same in all of them")
    return np.array([list(row.values()) for row in rows])


def shared(one: Records, other: Records) -> tuple[Records, Records]:
    """The runs of the seeds that both have, which must be pairs.

    Raises: ConfigError where two runs of a seed did not learn from or were not tested on the same people.
    """
    seeds = sorted(set(one) & set(other))
    for seed in seeds:
        a, b = one[seed]["setting"], other[seed]["setting"]
        for key in ("trained", "tested", "others", "reads", "store"):
            if a[key] != b[key]:
                raise ConfigError(f"runs of seed {seed} differ in {key}: {a[key]} and {b[key]}; expected pairs")
    return {seed: one[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}


def compared(apart: np.ndarray, of_errors: bool = False) -> str:
    """A paired difference [R, S] of scores, or of errors, with its interval, and in how many runs it is better."""
    if not apart.size:
        return "no pair yet"
    i = crossed_bootstrap(apart, seed=0)
    won = int(((-apart if of_errors else apart).mean(axis=1) > 0).sum())
    return f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}] (better in {won} of {len(apart)})"


# ---- words -----------------------------------------------------------------------------------------------------------


def _rates(trials: Mapping[tuple[str, str], Sequence[Job]], out: Path) -> list[str]:
    lines = []
    for (family, start), jobs in trials.items():
        found: dict[float, list[float]] = {}
        for job in jobs:
            record = recorded(job, out)
            if record is not None:
                found.setdefault(job.rate, []).append(score_of(record))
        if all(recorded(job, out) is not None for job in jobs):
            best = best_rate(jobs, out)
            cells = [f"{rate:g}: {np.mean(of):.3f}{' (taken)' if rate == best else ''}" for rate, of in found.items()]
            lines.append(f"| {family} | {TITLES[start]} | {len(jobs)} | {', '.join(cells)} |")
    if not lines:
        return []
    head = ["### Rates, tried on people of the training side who do nothing else", "",
            "Mean Dice over reads, draws and people.", "", "| question | start | trials | rate: Dice |",
            "|---|---|---|---|"]  # fmt: skip
    return [*head, *lines, ""]


def _question(family: str, shots: int, part: str, starts: Mapping[str, Records]) -> list[str]:
    against = [(a, b) for b in ("scratch", "rendered") if b in starts for a in starts if a not in ("scratch", b)]
    what = PARTS.get(part, part) if family == "tissues" else ABOUT[family]
    title = f"### {family}, {shots} to learn from: {what}"
    names = [f"{TITLES[a]} − {TITLES[b]}" for a, b in against]
    some = next(iter(starts.values()))
    one = next(iter(some.values()))
    own = any(word.startswith(f"{part} ") for word in one["setting"]["tested"])
    steps = one["setting"]["reads" if own else "wide_reads"]
    people = sum(word.startswith(f"{part} ") for word in _asked(one))
    runs = min(len(of) for of in starts.values())
    lines = [title, "", f"{runs} runs of each start, {people} people.", "",
             "| steps | " + " | ".join([*(TITLES[s] for s in starts), *names]) + " |",
             "|" + "---|" * (1 + len(starts) + len(names))]  # fmt: skip
    for step in steps:
        cells = [cell(crossed_bootstrap(matrix(of, part, step), seed=0)) for of in starts.values()]
        for a, b in against:
            mine, theirs = shared(starts[a], starts[b])
            cells.append(compared(matrix(mine, part, step) - matrix(theirs, part, step)))
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    if family == "lesions":
        lines += _each(starts, part, steps)
    return [*lines, ""]


def _each(starts: Mapping[str, Records], part: str, reads: Sequence[int]) -> list[str]:
    """Person by person, intervals over runs alone."""
    lines = ["", "Person by person; intervals are over runs alone, one person is no sample of a set:", "",
             "| person | steps | " + " | ".join(TITLES[s] for s in starts) + " |",
             "|" + "---|" * (2 + len(starts))]  # fmt: skip
    people = list(scores(next(iter(next(iter(starts.values())).values())), part, reads[-1]))
    for place, who in enumerate(people):
        for step in reads:
            columns = [matrix(of, part, step)[:, place : place + 1] for of in starts.values()]
            cells = [cell(crossed_bootstrap(column, seed=0)) for column in columns]
            lines.append(f"| {who} | {step} | " + " | ".join(cells) + " |")
    return lines


def _pairs(starts: Mapping[str, Records], out: Path) -> list[str]:
    """Agreement of the answers to two contrasts of a person, beside accuracy and beside that of different people."""
    lines = ["### contrast: real scans of held people", "",
             "Agreement: Dice between a run's answers to this contrast and to the T1 of the same person, mean over "
             "classes and people. A constant agrees too, so different people are the floor: Dice between a run's "
             "answers to the T1s of two people whose middles are moved onto each other. Accuracy: Dice with the "
             "atlas's tissues of the T1 (`brainfm anatomy`), which is no manual label either.", "", *_registered(out),
             "| start | steps | contrast | people: agreement/accuracy | agreement | floor | accuracy "
             "| accuracy − scratch |",
             "|" + "---|" * 8]  # fmt: skip
    for name, of in starts.items():
        steps = [step for step, read in next(iter(of.values()))["reads"].items() if "pairs" in read]
        for step in steps:
            found = {seed: r["reads"][step]["pairs"] for seed, r in of.items() if step in r["reads"]}
            floor = cell(crossed_bootstrap(_grid(found, "floor", None), seed=0)) if _has(found, "floor") else ""
            for contrast in [word for word in ("t1", "t2", "flair", "t1c") if _has(found, "accuracy", word)
                             or _has(found, "agreement", word)]:  # fmt: skip
                cells = []
                for what in ("agreement", "accuracy"):
                    there = _has(found, what, contrast)
                    cells.append(cell(crossed_bootstrap(_grid(found, what, contrast), seed=0)) if there else "")
                some = next(iter(found.values()))
                count = "/".join(str(len(some[what].get(contrast, {}))) for what in ("agreement", "accuracy"))
                against = _against(starts, name, step, contrast)
                cells = [TITLES[name], step, contrast, count, cells[0], floor, cells[1], against]
                lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _registered(out: Path) -> list[str]:
    """How the scans of each person were moved onto the T1 (imaging/register.py)."""
    file = out / "data" / "pairs" / "store" / "alignment.csv"
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    words = [
        f"{row['subject']} {row['scan']} "
        + (f"moved {float(row['moved_mm']):.1f} mm, {float(row['turned_deg']):.1f}°" if row["kept"] == "1" else "as is")
        + ("" if row["trusted"] == "1" else " (not trusted)")
        for row in rows
    ]
    return [f"Registration onto the T1: {'; '.join(words)}.", ""]


def _against(starts: Mapping[str, Records], name: str, step: str, contrast: str) -> str:
    if name == "scratch" or "scratch" not in starts:
        return ""
    mine, theirs = shared(starts[name], starts["scratch"])
    both = [seed for seed in mine if step in mine[seed]["reads"] and step in theirs[seed]["reads"]]
    mine, theirs = ({seed: of[seed]["reads"][step]["pairs"] for seed in both} for of in (mine, theirs))
    if not _has(mine, "accuracy", contrast):
        return ""
    return compared(_grid(mine, "accuracy", contrast) - _grid(theirs, "accuracy", contrast))


def _grid(found: Mapping[int, dict[str, Any]], what: str, contrast: str | None) -> np.ndarray:
    rows = [found[seed][what] if contrast is None else found[seed][what][contrast] for seed in sorted(found)]
    return np.array([[row[key] for key in sorted(row)] for row in rows])


def _has(found: Mapping[int, dict[str, Any]], what: str, contrast: str | None = None) -> bool:
    one = next(iter(found.values()), {}).get(what, {})
    return bool(one if contrast is None else one.get(contrast))


def _notes(starts: Mapping[str, Records]) -> list[str]:
    runs = [(name, seed, of[seed]) for name, of in starts.items() for seed in sorted(of)]
    lines = [f"- {TITLES[name]}, seed {seed}: {note}" for name, seed, record in runs for note in record["notes"]]
    return ["What happened in runs:", "", *lines, ""] if lines else []


def cell(i: Interval) -> str:
    """A mean with its interval."""
    return f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]"
