"""The report loads nothing from elsewhere, escapes what it is given, and shows left where it says left."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from brainfm.inference import report
from brainfm.inference.report import Section, write_report

VOID = {"meta", "img", "br", "link", "hr", "input"}


class _Page(HTMLParser):
    """Collects text, attributes and pictures, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def _read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def _pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png))


@pytest.fixture(scope="module")
def head() -> np.ndarray:
    """[X, Y, Z] an ellipsoid of 10 with noise, 0 outside."""
    x, y, z = np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in (24, 30, 26)), indexing="ij")
    noise = np.random.default_rng(0).normal(10, 1, x.shape)
    return np.where(x**2 + y**2 + z**2 < 1, noise, 0).astype(np.float32)


@pytest.fixture(scope="module")
def lesion(head: np.ndarray) -> np.ndarray:
    mask = np.zeros(head.shape, dtype=np.uint8)
    mask[6:10, 12:17, 11:15] = 1
    return mask


def test_a_report_is_one_closed_page_that_loads_nothing(tmp_path: Path, head: np.ndarray) -> None:
    figure = report.slices_figure([("t1", head)])
    sections = [
        Section("First", "One.\n\nTwo with `code`.", (("A caption", figure), ("Another", figure))),
        Section("Second", "Text", table=(("Name", "Dice", "95 %"), ("a", "0.5", "[0.4, 0.6]"), ("b", "−1", "–"))),
    ]
    write_report(tmp_path / "report.html", "Title", "Lead", sections, "brainfm demo", [("24", "subjects")])
    page = _read(tmp_path / "report.html")
    sources = [value for tag, name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not any(word in raw for word in ("http:", "https:", "<script", "@import", "url("))
    pictures = [base64.b64decode(value.split(",")[1]) for value in sources if value.startswith("data:")]
    assert len(pictures) == 2 and all(_pixels(png).ndim == 3 for png in pictures)
    assert {"Title", "Lead", "First", "Two with ", "code", "brainfm demo", "24", "[0.4, 0.6]"} <= set(page.text)
    anchors = {value for tag, name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value.startswith("#")} <= anchors
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_whatever_text_comes_is_shown_as_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script> & "quotes" <b>'
    png = report.curves_figure({"a": [(0, 1.0), (1, 0.5)]})
    section = Section(evil, f"{evil} `{evil}`", ((evil, png),), ((evil, evil), (evil, "1")))
    write_report(tmp_path / "r.html", evil, evil, [section, section], evil, [(evil, evil)])
    page = _read(tmp_path / "r.html")
    assert not {tag for tag, _, _ in page.attributes} & {"script", "b"}
    assert "<script>" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.text.count(evil) >= 10


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", "old", "", [], "c")
    with pytest.raises(AttributeError):
        write_report(tmp_path / "r.html", "new", "", [None], "c")  # type: ignore[list-item]
    assert "old" in _read(tmp_path / "r.html").text
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_columns_of_numbers_are_aligned_as_numbers() -> None:
    text = report._table((("Name", "Dice", "95 %", "Mixed"), ("a", "0.5", "[0.4, 0.6]", "1"), ("b", "−1", "–", "x")))
    assert text.count('<td class="number">') == 4 and '<th class="number">Mixed' not in text


def test_what_begins_with_a_number_is_not_always_one() -> None:
    for cell in ("", "-", "−0.1", "< 0.001", "0.5 [0.4, 0.6]", "−0.268 to −0.152", "12 ml", "47%", "±3"):
        assert report._is_number(cell), cell
    for cell in ("x", "17% of them; not shown", "F: 54, M: 53", "107 cases share one", "3 hours"):
        assert not report._is_number(cell), cell


def test_tables_without_heads_and_blocks_of_code(tmp_path: Path) -> None:
    png = report.curves_figure({"a": [(0, 1.0), (1, 0.5)]})
    table = (("", ""), ("commit", "abc"))
    for first in (False, True):
        section = Section("S", "`brainfm finetune a=1`\n\nNot `only` code.", (("F", png),), table, figures_first=first)
        write_report(tmp_path / "r.html", "T", "L", [section], "c")
        raw = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert "<thead>" not in raw and "<pre><code>brainfm finetune a=1</code></pre>" in raw
        assert "<p>Not <code>only</code> code.</p>" in raw
        assert (raw.index("<figure>") < raw.index("<table>")) == first


def test_numbers_have_three_decimals_and_a_minus_of_their_width() -> None:
    given = (0.5, -0.5, -0.0001, 9.9996, 12.346, 123.46, -1234.6)
    assert [report.number(v) for v in given] == ["0.500", "−0.500", "0.000", "10.000", "12.35", "123.5", "−1235"]


@pytest.mark.parametrize("plane", report.PLANES)
def test_sides_are_where_the_marks_say(plane: str) -> None:
    volume = np.zeros((5, 6, 7))
    volume[-1, -1, -1] = 1  # right, anterior, superior
    index = volume.shape[report._AXES[plane][2]] - 1
    picture = report._section_of(volume, plane, index)
    assert picture[0, -1] == 1 and picture.sum() == 1  # at the left, on top
    assert report._MARKS[plane][0] == ("A" if plane == "sagittal" else "R")


def test_the_picture_itself_shows_the_right_on_the_left(head: np.ndarray) -> None:
    bright = head.copy()
    bright[bright > 0] = 1
    bright[12:][bright[12:] > 0] = 10  # the patient's right half
    seen = _pixels(report.slices_figure([("", bright)], planes=("axial",)))[..., 0]
    middle = seen.shape[1] // 2
    inner = slice(seen.shape[0] // 3, 2 * seen.shape[0] // 3)
    assert seen[inner, : middle - 5].mean() > seen[inner, middle + 5 :].mean() + 0.3


def test_an_overlay_shows_both_outlines_where_the_lesion_is(head: np.ndarray, lesion: np.ndarray) -> None:
    assert report._largest(lesion, "axial") in range(11, 15) and report._largest(lesion, "sagittal") in range(6, 10)
    pixels = _pixels(report.overlay_figure(head, lesion, np.roll(lesion, 2, axis=1), spacing_mm=(2, 2, 3)))
    upper = pixels[: int(0.85 * pixels.shape[0])]
    for colour in (report.TRUTH_COLOUR, report.PREDICTION_COLOUR):
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(upper[..., :3] - wanted).max(-1) < 0.05).sum() > 50


@pytest.mark.parametrize("empty", ["truth", "prediction", "both"])
def test_an_overlay_without_a_lesion_is_drawn_too(head: np.ndarray, lesion: np.ndarray, empty: str) -> None:
    nothing = np.zeros_like(lesion)
    truth = lesion if empty == "prediction" else nothing
    prediction = lesion if empty == "truth" else nothing
    assert _pixels(report.overlay_figure(head, truth, prediction)).size


def test_every_label_of_a_map_is_outlined(head: np.ndarray) -> None:
    labels = np.zeros(head.shape, np.uint8)
    labels[6:18, 8:22, 8:18] = 1
    labels[12:18, 8:22, 8:18] = 7
    nothing = np.zeros_like(labels)

    def drawn(truth: np.ndarray) -> int:
        pixels = _pixels(report.overlay_figure(head, truth, nothing))
        wanted = [int(report.TRUTH_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return int((np.abs(pixels[: int(0.85 * len(pixels)), :, :3] - wanted).max(-1) < 0.1).sum())

    border = drawn(labels) - drawn(labels > 0)
    assert border > 200  # the line between the two


def test_a_map_is_cut_where_it_is_strongest_or_where_one_says(
    head: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []
    tile = report._tile
    monkeypatch.setattr(report, "_tile", lambda v, plane, index, *a: cuts.append(index) or tile(v, plane, index, *a))
    heat = np.zeros_like(head)
    heat[7, 14, 12] = 1
    report.heat_figure(head, heat)
    corner = [side.start for side in report._box(head)]
    assert [c + corner[a] for c, a in zip(cuts, (2, 1, 0))] == [12, 14, 7]
    cuts.clear()
    report.heat_figure(head, heat, at_vox=(10, 11, 13))
    assert [c + corner[a] for c, a in zip(cuts, (2, 1, 0))] == [13, 11, 10]
    cuts.clear()
    report.heat_figure(head, heat, at_vox=(-5, 99, 0))  # within the picture all the same
    assert cuts == [0, report._box(head)[1].stop - 1 - corner[1], 0]


def test_slices_cut_where_they_are_told(head: np.ndarray, lesion: np.ndarray) -> None:
    named = report.slices_figure([("t1", head), ("flair", head)], contours=[None, lesion], at_vox=(7, 14, 12))
    assert _pixels(named).shape[1] > 300
    assert report.slices_figure([("a", head)], at_vox=(7, 14, 12)) != report.slices_figure([("a", head)])
    assert _pixels(report.slices_figure([("constant", np.zeros((9, 9, 9)))])).size


def test_a_cohort_may_lack_a_contrast(head: np.ndarray, lesion: np.ndarray) -> None:
    subjects = [("sub-1", {"t1": head, "flair": head}, lesion), ("sub-2", {"t1": head}, None)]
    assert _pixels(report.cohort_figure(subjects, (2.0, 2.0, 2.0))).size


def test_hidden_voxels_are_shown_as_hidden(head: np.ndarray) -> None:
    whole = head[:, :, 13]
    hidden = whole.copy()
    hidden[4:14, 6:20] = np.nan
    pixels = _pixels(report.reconstruction_figure({"input": [whole], "masked": [hidden]}, ["t1"]))
    blue = np.abs(pixels[..., :3] - np.array(report._HIDDEN)).max(-1) < 0.02
    assert blue[:, pixels.shape[1] // 2 :].sum() > 500 and blue[:, : pixels.shape[1] // 2].sum() == 0
    with pytest.raises(ValueError):
        report.reconstruction_figure({"input": [whole], "masked": []})


def test_curves_are_smoothed_without_moving_them() -> None:
    line = np.linspace(3, 1, 200)
    assert np.allclose(report._smooth(line)[10:-10], line[10:-10])
    assert np.array_equal(report._smooth(np.array([1.0, 5.0, 2.0])), [1, 5, 2])
    points = [(float(step), value) for step, value in enumerate(line)]
    curves = {"long": points, "short": [(0, 1.0), (200, float("nan"))], "none": []}
    assert _pixels(report.curves_figure(curves, logarithmic=True)).size


def test_intervals_are_drawn_for_any_number_of_rows() -> None:
    rows = [("pre-trained", 0.62, 0.5, 0.7, 8), ("scratch", 0.5, 0.4, 0.6, 8)]
    few, many = (_pixels(report.interval_figure(r, emphasised="scratch")) for r in (rows, rows * 3))
    assert few.shape[1] == many.shape[1] and few.shape[0] < many.shape[0]
    assert _pixels(report.interval_figure(rows, limits=None)).size
