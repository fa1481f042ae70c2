"""Charts as PNG, in one style: curves, intervals, scatter, reliability, learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brainfm.reports.style import COLOURS, INK, LINE, SOFT, TEXT_POINTS, WIDTH_INCH, plain, png
from brainfm.reports.wording import number

_SQUARE = (4.6, 5.6)  # height, width in inches
_MARKS = ("o", "s", "^", "D")  # of models beyond the colours


def chart(height_inch: float, width_inch: float = WIDTH_INCH) -> tuple[Any, Any]:
    """A figure with one quiet pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inch, height_inch), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#98a2b3")
    axes.tick_params(colors=SOFT, labelsize=10, length=0, pad=6)
    axes.set_axisbelow(True)
    return figure, axes


def _named(axes: Any, x_label: str, y_label: str = "", grid: str = "both") -> None:
    """Puts names to the axes and lines behind the chart: of both axes, or of one."""
    axes.grid(axis=grid, color=LINE, linewidth=0.9)
    axes.set_xlabel(plain(x_label), color=SOFT, fontsize=TEXT_POINTS)
    if y_label:
        axes.set_ylabel(plain(y_label), color=SOFT, fontsize=TEXT_POINTS)


def _squared(axes: Any, low: float, high: float) -> None:
    """One scale for both axes."""
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")


def _legend(figure: Any) -> None:
    figure.legend(loc="outside right upper", frameon=False, fontsize=TEXT_POINTS, labelcolor=INK, handlelength=1.4)


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving mean over a twentieth of the curve; shorter at its ends, so that nothing is invented."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    y_label: str = "loss",
    x_label: str = "step",
    logarithmic: bool = False,
) -> bytes:
    """Curves over steps; those with more than 60 points are drawn faintly with their moving mean on top.

    Args:
        curves: name -> (step, value) pairs; values that are not finite are left out.
        y_label, x_label: of the axes.
        logarithmic: of the values.

    Returns:
        A PNG.
    """
    figure, axes = chart(3.7)
    for place, (name, points) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        values = np.array([p for p in points if np.isfinite(p[1])], dtype=np.float64).reshape(-1, 2)
        if len(values) > 60:
            axes.plot(values[:, 0], values[:, 1], color=colour, alpha=0.2, linewidth=0.9)
            values[:, 1] = _smooth(values[:, 1])
        axes.plot(values[:, 0], values[:, 1], color=colour, linewidth=2, label=plain(name), solid_capstyle="round",
                  marker="o" if len(values) < 15 else None, markersize=4)  # fmt: skip
    if logarithmic:
        axes.set_yscale("log")
    axes.margins(x=0.01)
    _named(axes, x_label, y_label, grid="y")
    if curves:
        _legend(figure)
    return png(figure)


def interval_figure(
    rows: Sequence[tuple[str, float, float, float, int]],
    x_label: str = "Dice, mean and 95 % interval",
    limits: tuple[float, float] | None = (0.0, 1.0),
    emphasised: str | None = None,
) -> bytes:
    """Means with their intervals, one below the other, the numbers beside them.

    Args:
        rows: (name, mean, low, high, n).
        x_label: what the numbers are.
        limits: of the axis; None fits it to the intervals.
        emphasised: the name drawn in colour; None colours all.

    Returns:
        A PNG.
    """
    figure, axes = chart(0.95 + 0.5 * len(rows))
    for place, (name, mean, low, high, n) in enumerate(rows):
        colour = COLOURS[0] if emphasised in (None, name) else SOFT
        axes.plot([low, high], [place, place], color=colour, linewidth=3.2, solid_capstyle="round", alpha=0.45)
        axes.plot([mean], [place], marker="o", markersize=9, color=colour, markeredgecolor="white")
        numbers = f"{number(mean)}   [{number(low)}, {number(high)}]   n = {n}"
        axes.text(1.02, place, numbers, transform=axes.get_yaxis_transform(), va="center", color=INK,
                  fontsize=TEXT_POINTS)  # fmt: skip
    axes.set_yticks(range(len(rows)), [plain(row[0]) for row in rows], color=INK, fontsize=TEXT_POINTS)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if limits is not None:
        axes.set_xlim(*limits)
    _named(axes, x_label, grid="x")
    return png(figure)


def scatter_figure(
    truth: Sequence[float], answers: Sequence[float], unit: str = "", half_width: float | None = None
) -> bytes:
    """Answers over true values with the line of equality, and a band of prediction intervals around it.

    Args:
        truth, answers: in one unit.
        half_width: of the prediction interval; None draws none.

    Returns:
        A PNG.
    """
    figure, axes = chart(*_SQUARE)
    low, high = float(min(*truth, *answers)), float(max(*truth, *answers))
    room = 0.05 * (high - low or 1.0)
    line = np.array([low - room, high + room])
    if half_width is not None:
        axes.fill_between(line, line - half_width, line + half_width, color=COLOURS[0], alpha=0.12, linewidth=0)
    axes.plot(line, line, color=SOFT, linewidth=1.2)
    axes.scatter(truth, answers, s=26, color=COLOURS[0], alpha=0.75, edgecolor="white", linewidth=0.6)
    _squared(axes, *line)
    suffix = f" ({unit})" if unit else ""
    _named(axes, f"true{suffix}", f"answered on held-out cases{suffix}")
    return png(figure)


def reliability_figure(
    rows: Sequence[Sequence[float | None]], x_label: str = "confidence", y_label: str = "share that is right"
) -> bytes:
    """How often what is said with some confidence is right.

    Args:
        rows: (mean confidence, share right, number of answers) of each bin; empty bins are left out.
        x_label, y_label: of what, in words.

    Returns:
        A PNG; the area of a point is the number of answers.
    """
    figure, axes = chart(*_SQUARE)
    there = np.array([[r[0], r[1], r[2]] for r in rows if r[2]], dtype=np.float64).reshape(-1, 3)
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2)
    axes.plot(there[:, 0], there[:, 1], color=COLOURS[0], linewidth=1.2, alpha=0.5)
    size = 30 + 300 * there[:, 2] / max(1.0, float(there[:, 2].max(initial=1.0)))
    axes.scatter(there[:, 0], there[:, 1], s=size, color=COLOURS[0], alpha=0.75, edgecolor="white")
    for x, y, n in there:
        axes.annotate(f"{n:.0f}", (x, y), textcoords="offset points", xytext=(9, -11), color=INK, fontsize=9)
    _squared(axes, -0.04, 1.04)
    _named(axes, x_label, y_label)
    return png(figure)


def learning_curve_figure(
    conditions: Mapping[str, Sequence[tuple[float, ...] | tuple[float, float | None, float | None, float | None]]],
    y_label: str,
    x_label: str = "training subjects",
) -> bytes:
    """Scores over the number of training subjects, with bands.

    Args:
        conditions: name -> (subjects, mean, low, high); a mean that is None is left out.
        y_label: of the score.
        x_label: of what is counted instead of subjects, on an even scale: steps.

    Returns:
        A PNG.
    """
    figure, axes = chart(3.9)
    ticks: set[float] = set()
    for place, (name, points) in enumerate(conditions.items()):
        colour = COLOURS[place % len(COLOURS)]
        known = [p for p in points if p[1] is not None]
        x = [p[0] for p in known]
        ticks.update(x)
        band = [p for p in known if p[2] is not None and p[3] is not None]
        axes.fill_between(
            [p[0] for p in band],
            [float(p[2]) for p in band if p[2] is not None],
            [float(p[3]) for p in band if p[3] is not None],
            color=colour, alpha=0.12 if place == 0 else 0.06, linewidth=0,
        )  # fmt: skip
        axes.plot(x, [p[1] for p in known], color=colour, linewidth=2, marker="o", markersize=5, label=plain(name))
    if x_label == "training subjects":
        axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    _named(axes, x_label, y_label, grid="y")
    _legend(figure)
    return png(figure)


def compute_figure(
    panels: Sequence[tuple[str, Sequence[tuple[str, float | None, float, float | None, float | None]]]], x_label: str
) -> bytes:
    """Scores over what a model cost, a panel a score; what cost nothing is a dashed line across.

    Args:
        panels: (name of the score, (model, cost, mean, low, high) of each); a model has one colour in all panels.
        x_label: of the cost, which is shown as a logarithm.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH_INCH, 0.7 + 2.9 * rows), facecolor="white", layout="constrained")
    names = list(dict.fromkeys(model for _, points in panels for model, *_ in points))
    shown: dict[str, Any] = {}
    for place, (title, points) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, place + 1)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=9, length=0)
        axes.set_axisbelow(True)
        axes.grid(color=LINE, linewidth=0.9)
        for model, cost, mean, low, high in points:
            colour, mark = COLOURS[names.index(model) % len(COLOURS)], _MARKS[names.index(model) // len(COLOURS) % 4]
            if not cost:
                shown[model] = axes.axhline(mean, color=colour, linewidth=1.4, linestyle="--")
                continue
            if low is not None and high is not None:
                axes.plot([cost, cost], [low, high], color=colour, linewidth=2.4, alpha=0.4, solid_capstyle="round")
            shown[model] = axes.plot([cost], [mean], mark, color=colour, markersize=7, markeredgecolor="white")[0]
        if any(cost for _, cost, *_ in points):
            axes.set_xscale("log")
            axes.margins(x=0.15)
        else:
            axes.set_xticks([])
        axes.set_title(plain(title), color=INK, fontsize=TEXT_POINTS, loc="left")
    figure.supxlabel(plain(x_label), color=SOFT, fontsize=TEXT_POINTS)
    figure.legend([shown[name] for name in names], [plain(name) for name in names], loc="outside lower left",
                  ncols=4, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4)  # fmt: skip
    return png(figure)
