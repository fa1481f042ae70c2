"""The figure of README.md: Dice against steps and against labelled people, from a backbone file and from fresh weights.

    python scripts/evidence/foundation_figure.py --records DIR --mark FINGERPRINT --out docs/efficiency.png

DIR is --out of scripts/evidence/foundation.py, MARK the first digits of the file's fingerprint. Lines are means over
runs and held people, bands 95 % intervals over both (scoring/intervals.crossed_bootstrap).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foundation_tables import matrix

from brainfm.errors import ConfigError
from brainfm.files import write_whole
from brainfm.reports.style import COLOURS, INK, LINE, SOFT, png
from brainfm.scoring.intervals import Interval, crossed_bootstrap

NAME = re.compile(r"(?P<family>[a-z_]+?)_(?P<start>scratch|decoder)_(?P<mark>[0-9a-f]{8})_(?P<shots>\d+)shots_seed\d+")
STARTS = {"decoder": ("from brainfm_s", COLOURS[0]), "scratch": ("from scratch", COLOURS[1])}
Key = tuple[str, int, str]  # family, people learned from, start


def records_of(folder: Path, mark: str) -> dict[Key, dict[int, dict[str, Any]]]:
    """Seed -> record of the runs of this file and of fresh weights. Raises: ConfigError where there are none."""
    found: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
    for file in sorted((folder / "runs").glob("*.json")):
        named, record = NAME.fullmatch(file.stem), json.loads(file.read_text())
        if named and (named["start"] == "scratch" or named["mark"].startswith(mark)):
            found[named["family"], int(named["shots"]), named["start"]][record["setting"]["seed"]] = record
    if not any(start == "decoder" for _, _, start in found):
        raise ConfigError(f"{folder}: has no run of a file {mark}, expected --out of scripts/evidence/foundation.py")
    return found


def by_steps(records: Mapping[int, dict[str, Any]], part: str, wide: bool = False) -> dict[int, Interval]:
    """Steps -> Dice of all runs of a start."""
    some = next(iter(records.values()))["setting"]
    return {
        step: crossed_bootstrap(matrix(records, part, step), seed=0) for step in some["wide_reads" if wide else "reads"]
    }


def drawn(axes: Any, title: str, curves: Mapping[str, Mapping[int, Interval]], label: str) -> None:
    """A line and its band for each start, over equal distances: reads and shots grow by factors."""
    for start, (name, colour) in STARTS.items():
        points = curves.get(start, {})
        places, found = range(len(points)), list(points.values())
        axes.plot(places, [i.mean for i in found], color=colour, marker="o", linewidth=2, markersize=4, label=name)
        axes.fill_between(
            places, [i.low for i in found], [i.high for i in found], color=colour, alpha=0.15, linewidth=0
        )
        axes.set_xticks(places, [str(x) for x in points])
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(label, fontsize=9, color=SOFT)
    axes.grid(axis="y", color=LINE)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def figure(folder: Path, mark: str, read: int) -> bytes:
    """The figure as PNG."""
    from matplotlib.figure import Figure

    records = records_of(folder, mark)

    def of(family: str, shots: int, part: str, wide: bool = False) -> dict[str, dict[int, Interval]]:
        return {s: by_steps(records[family, shots, s], part, wide) for s in STARTS if records.get((family, shots, s))}

    shots = sorted({n for family, n, _ in records if family == "tissues"})
    labels = {
        s: {n: by_steps(records["tissues", n, s], "t1")[read] for n in shots if records.get(("tissues", n, s))}
        for s in STARTS
    }
    panels = [
        ("Tissues, 5 labelled T1s", of("tissues", 5, "t1"), "steps"),
        (f"Tissues after {read} steps", labels, "labelled people"),
        ("Hippocampus, 5 labelled", of("hippocampus", 5, "t1"), "steps"),
    ]
    whole = Figure(figsize=(9.0, 2.6), facecolor="white", layout="constrained")
    for axes, (title, curves, label) in zip(whole.subplots(1, len(panels)), panels, strict=True):
        drawn(axes, title, curves, label)
    whole.axes[0].set_ylabel("Dice, held people", fontsize=9, color=SOFT)
    whole.axes[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")
    return png(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--mark", required=True)
    parser.add_argument("--read", type=int, default=60, help="steps of the curve over people")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    write_whole(asked.out, figure(asked.records, asked.mark, asked.read))


if __name__ == "__main__":
    main()
