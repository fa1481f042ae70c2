"""Charts show the points they are given, for any number of them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from brainfm.reports import charts
from brainfm.reports.style import COLOURS


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of every chart."""
    seen: list[Any] = []
    chart = charts.chart

    def kept(*size: float) -> tuple[Any, Any]:
        figure, axes = chart(*size)
        seen.append(axes)
        return figure, axes

    monkeypatch.setattr(charts, "chart", kept)
    return seen


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))[..., :3]


def coloured(png: bytes, colour: str) -> int:
    return int((np.abs(pixels(png) - to_rgb(colour)).max(-1) < 0.3).sum())


def test_a_scatter_has_one_scale_and_the_band_of_its_interval(drawn: list[Any]) -> None:
    truth, answers = [20.0, 40.0, 80.0], [25.0, 35.0, 60.0]
    png = charts.scatter_figure(truth, answers, unit="years", half_width=10.0)
    (axes,) = drawn
    assert axes.get_xlim() == axes.get_ylim() and axes.get_xlim()[0] < 20 < 80 < axes.get_xlim()[1]
    assert axes.get_xlabel() == "true (years)"
    band, points = axes.collections
    assert np.array_equal(points.get_offsets(), np.stack([truth, answers], axis=1))
    at_left = band.get_paths()[0].vertices
    left = at_left[np.isclose(at_left[:, 0], axes.get_xlim()[0])][:, 1]
    assert left.max() - left.min() == pytest.approx(20)
    assert coloured(png, COLOURS[0]) > 30


def test_a_scatter_of_one_answer_without_an_interval(drawn: list[Any]) -> None:
    assert pixels(charts.scatter_figure([5.0], [5.0])).size
    assert len(drawn[0].collections) == 1 and drawn[0].get_xlabel() == "true"


def test_reliability_leaves_empty_bins_out_and_names_the_counts(drawn: list[Any]) -> None:
    rows = [(0.1, 0.0, 4), (None, None, 0), (0.9, 1.0, 16)]
    assert pixels(charts.reliability_figure(rows, "probability of M", "share that is M")).size
    (axes,) = drawn
    (points,) = axes.collections
    assert np.allclose(points.get_offsets(), [[0.1, 0.0], [0.9, 1.0]])
    few, many = points.get_sizes()
    assert few < many and [text.get_text() for text in axes.texts] == ["4", "16"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("probability of M", "share that is M")
    assert pixels(charts.reliability_figure([])).size


def test_a_learning_curve_has_a_tick_for_each_size_and_skips_what_is_undefined(drawn: list[Any]) -> None:
    conditions = {
        "this model": [(1.0, 0.4, 0.3, 0.5), (5.0, None, None, None), (20.0, 0.7, 0.6, 0.8)],
        "from scratch": [(1.0, 0.3, None, None), (20.0, 0.6, 0.5, 0.7)],
    }
    png = charts.learning_curve_figure(conditions, "Dice")
    (axes,) = drawn
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["1", "20"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.4, 0.7], [0.3, 0.6]]
    assert coloured(png, COLOURS[0]) > 30 and coloured(png, COLOURS[1]) > 30


def test_a_name_with_dollars_is_no_formula(drawn: list[Any]) -> None:
    name = r"$x_{$ \$5$"
    charts.learning_curve_figure({name: [(1.0, 0.4, 0.3, 0.5)]}, name)
    charts.curves_figure({name: [(0.0, 1.0)]}, y_label=name, x_label=name)
    charts.interval_figure([(name, 0.5, 0.4, 0.6, 3)], name)
    charts.scatter_figure([1.0], [2.0], unit=name)
    charts.reliability_figure([(0.5, 0.5, 3)], name, name)
    assert [axes.get_legend_handles_labels()[1] for axes in drawn[:2]] == [[name.replace("$", r"\$")]] * 2


def test_curves_are_smoothed_without_moving_them() -> None:
    line = np.linspace(3, 1, 200)
    assert np.allclose(charts._smooth(line)[10:-10], line[10:-10])
    assert np.array_equal(charts._smooth(np.array([1.0, 5.0, 2.0])), [1, 5, 2])
    points = [(float(step), value) for step, value in enumerate(line)]
    curves = {"long": points, "short": [(0, 1.0), (200, float("nan"))], "none": []}
    assert pixels(charts.curves_figure(curves, logarithmic=True)).size


def test_intervals_are_drawn_for_any_number_of_rows() -> None:
    rows = [("pre-trained", 0.62, 0.5, 0.7, 8), ("scratch", 0.5, 0.4, 0.6, 8)]
    few, many = (pixels(charts.interval_figure(r, emphasised="scratch")) for r in (rows, rows * 3))
    assert few.shape[1] == many.shape[1] and few.shape[0] < many.shape[0]
    assert pixels(charts.interval_figure(rows, limits=None)).size
