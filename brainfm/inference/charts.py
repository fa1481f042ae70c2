"""Charts about a model's answers: scatter, reliability, learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from brainfm.inference.report import COLOURS, INK, LINE, SOFT, chart, png

_SQUARE = (4.6, 5.6)  # height, width in inches


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
    axes.set_xlim(*line)
    axes.set_ylim(*line)
    axes.set_aspect("equal")
    axes.grid(color=LINE, linewidth=0.9)
    suffix = f" ({unit})" if unit else ""
    axes.set_xlabel(f"true{suffix}", color=SOFT, fontsize=10.5)
    axes.set_ylabel(f"answered on held-out cases{suffix}", color=SOFT, fontsize=10.5)
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
    axes.set_xlim(-0.04, 1.04)
    axes.set_ylim(-0.04, 1.04)
    axes.set_aspect("equal")
    axes.grid(color=LINE, linewidth=0.9)
    axes.set_xlabel(x_label, color=SOFT, fontsize=10.5)
    axes.set_ylabel(y_label, color=SOFT, fontsize=10.5)
    return png(figure)


def learning_curve_figure(
    conditions: Mapping[str, Sequence[tuple[float, float | None, float | None, float | None]]], y_label: str
) -> bytes:
    """Scores over the number of training subjects, with bands.

    Args:
        conditions: name -> (subjects, mean, low, high); a mean that is None is left out.
        y_label: of the score.

    Returns:
        A PNG.
    """
    figure, axes = chart(3.9)
    ticks: set[float] = set()
    for number, (name, points) in enumerate(conditions.items()):
        colour = COLOURS[number % len(COLOURS)]
        known = [p for p in points if p[1] is not None]
        x = [p[0] for p in known]
        ticks.update(x)
        band = [p for p in known if p[2] is not None and p[3] is not None]
        axes.fill_between(
            [p[0] for p in band],
            [float(p[2]) for p in band if p[2] is not None],
            [float(p[3]) for p in band if p[3] is not None],
            color=colour, alpha=0.12 if number == 0 else 0.06, linewidth=0,
        )  # fmt: skip
        axes.plot(x, [p[1] for p in known], color=colour, linewidth=2, marker="o", markersize=5, label=name)
    axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axes.minorticks_off()
    axes.grid(axis="y", color=LINE, linewidth=0.9)
    axes.set_xlabel("training subjects", color=SOFT, fontsize=10.5)
    axes.set_ylabel(y_label, color=SOFT, fontsize=10.5)
    figure.legend(loc="outside right upper", frameon=False, fontsize=10.5, labelcolor=INK, handlelength=1.4)
    return png(figure)
