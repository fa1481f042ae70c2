"""Held-out cases of a fine-tuning, one by one: worst, median and best in pictures, a table, maps of what mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brainfm.inference.explain import explain_volume
from brainfm.reports import pictures
from brainfm.reports.kind_page import KindPage, Row
from brainfm.reports.page import Section
from brainfm.reports.run import who
from brainfm.tasks.explained import share_inside

_MOST_ROWS = 25  # of the table


def cases_section(page: KindPage) -> Section:
    """The cases in pictures and in a table."""
    ranked = _ranked(page)
    figures = []
    for word, row in _picked(ranked):
        entry = page.run.entry(row)
        _, contrast = page.run.shown(entry)
        caption = f"{word} of {len(ranked)} held-out cases: {who(row)}, {page.said(row)}; on {contrast}"
        figures.append((caption, page.picture(row, entry)))
    rows: list[tuple[str, ...]] = [("case", "fold", *page.columns)]
    rows += [(who(row), str(row["fold"]), *page.cells(row)) for row in ranked[:_MOST_ROWS]]
    repeats = " of the first repeat" if len({row["repeat"] for row in page.run.found["cases"]}) > 1 else ""
    text = f"Each case{repeats} is answered by the network that did not train on it. Radiological convention: the "
    text += f"patient's left is on the right side of axial and coronal pictures.{page.conventions()}"
    more = f"The {_MOST_ROWS} worst of {len(ranked)}; `cases.csv` in the run's folder holds them all"
    caption = more if len(ranked) > _MOST_ROWS else "All cases, worst first"
    return Section("Case by case", text, tuple(figures), tables=((caption, tuple(rows)),), figures_first=True)


def maps_section(page: KindPage) -> Section | None:
    """Maps of what the networks reacted to; None without a bundle or a network for these cases."""
    networks = page.run.bundle.networks if page.run.bundle is not None else ()
    picked = [(word, row) for word, row in _picked(_ranked(page)) if row["fold"] < len(networks)]
    figures = tuple(_map(page, word, row, networks[row["fold"]]) for word, row in picked)
    if not figures:
        return None
    text = (
        f"Gradient maps ({page.method_name}) of the network that did not train on the case, each scaled to its own "
        "maximum. They show what the answer reacted to, not that it was right to. `brainfm explain method=occlusion` "
        "checks a map without gradients."
    )
    return Section("What it looks at", text + page.map_note(), figures=figures)


def _map(page: KindPage, word: str, row: Row, network: Any) -> tuple[str, bytes]:
    """Caption and PNG of the map of a case."""
    run, spacing_mm = page.run, page.run.store.spec.spacing_mm
    entry = run.entry(row)
    image, present = run.image(entry)
    found = explain_volume([network], run.spec, image, present, labels=run.label_map(entry, network),
                           method=page.method, spacing_mm=spacing_mm)  # fmt: skip
    volume, contrast = run.shown(entry)
    caption = f"{word} case: {who(row)}, {page.said(row)}; {page.about(found.target)}, on {contrast}"
    outline = page.outline(entry, found.target)
    place = None
    if not found.heat.any():
        caption += f"; the map is empty, for {page.nothing}"
    else:
        if outline is not None and outline.any():
            part = outline.sum() / (volume > volume.min()).sum()
            caption += f"; {share_inside(found.heat, outline):.0%} of the map lies inside the outline, which takes "
            caption += f"{part:.1%} of the volume shown"
        said, place = page.cut(volume, found.heat)
        caption += said
    figure = pictures.heat_figure(volume, found.heat, spacing_mm=spacing_mm, at_vox=place, outline=outline,
                                  outline_name="True")  # fmt: skip
    return caption, figure


def _ranked(page: KindPage) -> list[Mapping[str, Any]]:
    """The cases of the first repeat, worst first."""
    return sorted((row for row in page.run.found["cases"] if row["repeat"] == 0), key=lambda row: -page.miss(row))


def _picked(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    named = [("Worst", rows[0]), ("Median", rows[len(rows) // 2]), ("Best", rows[-1])]
    return named if len(rows) >= 3 else named[: len(rows)]
