"""A page loads nothing from elsewhere, shows whatever text it is given as text, and has a look for every paper."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from brainfm.reports import charts
from brainfm.reports import page as module
from brainfm.reports.page import Section, write_page
from tests.reports.pages import EVIL, is_harmless, read

PNG = charts.curves_figure({"a": [(0, 1.0), (1, 0.5)]})


def test_a_report_is_one_closed_page_that_loads_nothing(tmp_path: Path) -> None:
    sections = [
        Section("First", "One.\n\nTwo with `code`.", (("A caption", PNG), ("Another", PNG))),
        Section("Second", "Text", table=(("Name", "Dice", "95 %"), ("a", "0.5", "[0.4, 0.6]"), ("b", "−1", "–"))),
    ]
    write_page(tmp_path / "report.html", "Title", "Lead", sections, "brainfm demo", [("24", "subjects")])
    page = read(tmp_path / "report.html")
    sources = [value for tag, name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in sources)
    is_harmless(tmp_path / "report.html")
    pictures = [base64.b64decode(value.split(",")[1]) for value in sources if value.startswith("data:")]
    assert len(pictures) == 2 and all(imread(io.BytesIO(png)).ndim == 3 for png in pictures)
    assert {"Title", "Lead", "First", "Two with ", "code", "brainfm demo", "24", "[0.4, 0.6]"} <= set(page.text)
    anchors = {value for tag, name, value in page.attributes if name == "id"}
    assert {value[1:] for value in sources if value.startswith("#")} <= anchors
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_whatever_text_comes_is_shown_as_text(tmp_path: Path) -> None:
    table = ((EVIL, EVIL), (EVIL, "1"))
    section = Section(EVIL, f"{EVIL} `{EVIL}`\n\n`{EVIL}`", ((EVIL, PNG),), table, ((EVIL, table),))
    write_page(tmp_path / "r.html", EVIL, EVIL, [section, section], EVIL, [(EVIL, EVIL)])
    page = is_harmless(tmp_path / "r.html")
    of_a_section = 1 + 1 + 2 + 1 + 3 + 4  # its link, heading, code, caption, and cells; caption and cells again
    assert page.text.count(EVIL) == 6 + 2 * of_a_section
    assert {value for _, name, value in page.attributes if name == "alt"} == {EVIL}
    table = (("e", "f"), ("g", "1"))
    section = Section("s", "a `b`\n\n`c`", (("d", PNG),), table, (("h", table),))
    write_page(tmp_path / "plain.html", "t", "l", [section, section], "c", [("n", "m")])
    assert page.tags == read(tmp_path / "plain.html").tags


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", "old", "", [], "c")
    with pytest.raises(AttributeError):
        write_page(tmp_path / "r.html", "new", "", [None], "c")  # type: ignore[list-item]
    assert "old" in read(tmp_path / "r.html").text
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_columns_of_numbers_are_aligned_as_numbers(tmp_path: Path) -> None:
    rows = (("Name", "Dice", "95 %", "Mixed"), ("a", "0.5", "[0.4, 0.6]", "1"), ("b", "−1", "–", "x"))
    write_page(tmp_path / "r.html", "T", "L", [Section("S", "", table=rows)], "c")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.count('<td class="number">') == 4 and text.count('<th class="number">') == 2
    assert "<th>Mixed</th>" in text and '<td class="number">[0.4, 0.6]</td>' in text


def test_what_begins_with_a_number_is_not_always_one() -> None:
    for cell in ("", "-", "−0.1", "< 0.001", "0.5 [0.4, 0.6]", "−0.268 to −0.152", "12 ml", "47%", "±3"):
        assert module._is_number(cell), cell
    for cell in ("x", "17% of them; not shown", "F: 54, M: 53", "107 cases share one", "3 hours"):
        assert not module._is_number(cell), cell


def test_tables_without_heads_and_blocks_of_code(tmp_path: Path) -> None:
    table = (("", ""), ("commit", "abc"))
    for first in (False, True):
        section = Section("S", "`brainfm finetune a=1`\n\nNot `only` code.", (("F", PNG),), table, figures_first=first)
        write_page(tmp_path / "r.html", "T", "L", [section], "c")
        raw = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert "<thead>" not in raw and "<pre><code>brainfm finetune a=1</code></pre>" in raw
        assert "<p>Not <code>only</code> code.</p>" in raw
        assert (raw.index("<figure>") < raw.index("<table>")) == first


def test_a_page_is_laid_out_for_the_dark_a_phone_and_paper(tmp_path: Path) -> None:
    write_page(tmp_path / "r.html", "T", "L", [Section("S", "", (("F", PNG),))], "c")
    raw = (tmp_path / "r.html").read_text(encoding="utf-8")
    style = raw[raw.index("<style>") : raw.index("</style>")]
    rules = {at: style[style.index(at) :] for at in ("(prefers-color-scheme: dark)", "@media print")}
    used, light = set(re.findall(r"var\((--[\w-]+)\)", style)), style[: style.index("@media")]
    assert used - {"--width"} == set(re.findall(r"(--[\w-]+):", light)), "each colour has a value, each value a use"
    dark = rules["(prefers-color-scheme: dark)"].split("* {")[0]
    assert {"--page", "--ink", "--quiet", "--line", "--mark"} <= set(re.findall(r"(--[\w-]+):", dark))
    assert "@media screen and (prefers-color-scheme: dark)" in style, "paper stays white"
    assert ".frame { background: #fff" in dark, "pictures are drawn on white"
    assert "(max-width: 640px)" in style
    assert "overflow: visible" in rules["@media print"] and "break-inside: avoid" in rules["@media print"]
    assert '<meta name="viewport"' in raw and '<div class="frame"><img ' in raw
    assert len(raw) - len(base64.b64encode(PNG)) < 12_000, "the page itself stays small"


def test_a_folder_that_is_not_there_is_made_and_one_that_cannot_be_is_named(tmp_path: Path) -> None:
    write_page(tmp_path / "new" / "r.html", "T", "L", [], "c")
    assert (tmp_path / "new" / "r.html").is_file()
    with pytest.raises(OSError) as caught:
        write_page(tmp_path / "new" / "r.html" / "r.html", "T", "L", [], "c")
    assert str(tmp_path) in str(caught.value)
