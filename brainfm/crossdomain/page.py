"""The page of a benchmark: a table and a chart for each setting, differences, near-duplicates, cautions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from brainfm.crossdomain.tables import ALL, Pair, TableRow, read_twins
from brainfm.reports.charts import chart
from brainfm.reports.page import Section, write_page
from brainfm.reports.style import COLOURS, INK, LINE, SOFT, plain, png
from brainfm.reports.wording import count, number, signed
from brainfm.scoring.intervals import Interval

_CAUTION = (
    "Intervals (95 %) draw episodes and query images again; the published ones, over episodes alone, stand beside them "
    "as ±. Floors stand in every table: a method that is not above them has learnt nothing that statistics of the "
    "image do not say. On small data sets a fixed test split is one draw: look at the re-splits. Numbers are "
    "comparable with "
    "published ones only on the same data sets, splits, networks and weights."
)
_SETTINGS = {
    "few-shot": "Few-shot episodes",
    "fixed split": "The whole training split, the fixed test split",
    "re-split": "The whole training split, random splits of the same sizes",
}


def write_benchmark(out: Path, rows: Sequence[TableRow], pairs: Sequence[Pair], command: str) -> Path:
    """OUT/index.html."""
    datasets = [name for name in dict.fromkeys(row.dataset for row in rows) if name != ALL]
    methods = list(dict.fromkeys(row.method for row in rows))
    sections = []
    for setting in dict.fromkeys(row.setting for row in rows):
        here = [row for row in rows if row.setting == setting]
        tables = tuple(
            (f"{dataset}: {task}", _table([row for row in here if (row.dataset, row.task) == (dataset, task)]))
            for dataset, task in dict.fromkeys((row.dataset, row.task) for row in here)
        )
        figures = (("AUROC with 95 % intervals", auroc_figure(here)),)
        text = "AUROC, one class against the rest, mean over classes."
        sections.append(Section(_SETTINGS.get(setting, setting), text, figures=figures, tables=tables))
    trained = [pair for pair in pairs if "+" in pair.method and pair.method.rpartition("+")[0] == pair.other]
    if trained:
        head = ("setting", "data set", "method", "other", "difference")
        cells = [(p.setting, p.dataset, p.method, p.other, _signed(p.found)) for p in trained]
        title = "Pre-trained on the other data sets, against the same weights without"
        sections.append(Section(title, _verdict(trained), table=(head, *cells)))
    alike = [(name, *map(str, read_twins(out, name))) for name in datasets]
    text = "Test images with a correlation above .98 to an image that is learnt from, at 32 x 32 pixels."
    sections.append(Section("Near-duplicates", text, table=(("data set", "with one", "test images"), *alike)))
    lead = f"{count(len(methods), 'method')} on {count(len(datasets), 'data set')}.\n\n{_CAUTION}"
    path = out / "index.html"
    write_page(path, "2D images across domains", lead, sections, command)
    return path


def _verdict(pairs: Sequence[Pair]) -> str:
    better = [pair for pair in pairs if pair.found.low > 0]
    worse = [pair for pair in pairs if pair.found.high < 0]
    return (
        f"Better beyond the interval in {len(better)} of {len(pairs)} comparisons, worse in {len(worse)}; in the "
        "others the interval holds 0."
    )


def _table(rows: Sequence[TableRow]) -> tuple[tuple[str, ...], ...]:
    head = ("method", "AUROC", "± episodes", "episodes", "query images", "to the floor", "CPU s an episode")
    return (head, *((
        f"`{row.method}`", _shown(row.found), number(row.half) if math.isfinite(row.half) else "-", str(row.found.n),
        str(row.images), _signed(row.floor) if row.floor else "-",
        number(row.seconds) if math.isfinite(row.seconds) else "-",
    ) for row in rows))  # fmt: skip


def _shown(found: Interval) -> str:
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"


def _signed(found: Interval) -> str:
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def auroc_figure(rows: Sequence[TableRow]) -> bytes:
    """A line a method and data set, grouped by data set. Returns a PNG."""
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = chart(0.6 + 0.22 * (len(rows) + len({(r.dataset, r.task) for r in rows})))
    ticks, names, y, last = [], [], 0.0, None
    for row in rows:
        if last not in (None, (row.dataset, row.task)):
            y += 1
        last = (row.dataset, row.task)
        colour = COLOURS[methods.index(row.method) % len(COLOURS)]
        axes.plot([row.found.low, row.found.high], [y, y], color=colour, linewidth=1.6)
        axes.plot([row.found.mean], [y], "o", color=colour, markersize=5)
        ticks.append(y)
        names.append(plain(f"{row.dataset}  {_short(row.method)}"))
        y += 1
    axes.axvline(0.5, color=SOFT, linewidth=0.9, linestyle=":")
    axes.set_yticks(ticks, names, color=INK, fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.9)
    axes.set_xlabel("AUROC", color=SOFT)
    return png(figure)


def _short(method: str) -> str:
    how, _, network = method.partition("@")
    return f"{how}@{network.rpartition('/')[2]}"
