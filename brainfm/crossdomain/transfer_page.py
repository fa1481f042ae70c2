"""The page of a transfer: AUROC of each way, ROC curves, Grad-CAM maps, overlap with regions, the shortcut audit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainfm.crossdomain.features import tensors
from brainfm.crossdomain.images import read_mask
from brainfm.crossdomain.saliency import RegionOverlap, agreeing, grad_cam, overlap
from brainfm.crossdomain.shortcut import MarkerAudit
from brainfm.crossdomain.transfer import Transferred, Way
from brainfm.files import write_table, write_whole
from brainfm.reports.charts import chart
from brainfm.reports.page import Section, write_page
from brainfm.reports.style import COLOURS, INK, LINE, SOFT, plain, png
from brainfm.reports.wording import number, signed
from brainfm.scoring.intervals import Interval

_SHOWN = 4  # images a finding
_MOST = 200  # images a finding whose maps are compared with regions of interest

Scored = tuple[Way, list[Interval], Interval, Interval]  # of each finding, their mean, and that less the source's


def write_transfer(out: Path, found: Transferred, audits: Sequence[tuple[str, MarkerAudit]], size: int, device: str,
                   command: str, seed: int = 0) -> Path:  # fmt: skip
    """OUT/table.csv, roc.png, maps.png and index.html; returns the page."""
    source = [way for way in found.ways if way.family == "source" and way.network != "entropy"][
        -1
    ]  # the mean, of several
    scored = [(way, *found.scores(way, seed), found.difference(way, source, seed)) for way in found.ways]
    head = ["way", "auroc", "low", "high", "minus_source", "minus_source_low", "minus_source_high", "images", "seconds"]
    for finding in found.findings:
        head += [finding, f"{finding} low", f"{finding} high"]
    rows = []
    for way, each, whole, less in scored:
        cells = [x for one in each for x in (one.mean, one.low, one.high)]
        numbers = [f"{x:.4f}" for one in (whole, less) for x in (one.mean, one.low, one.high)]
        rows.append([way.name, *numbers, whole.n, f"{way.seconds:.1f}", *(f"{x:.4f}" for x in cells)])
    write_table(out / "table.csv", head, rows)
    roc, (maps, overlaps) = roc_figure(found, _best(scored)), maps_figure(found, size, device)
    write_whole(out / "roc.png", roc)
    write_whole(out / "maps.png", maps)
    trained = ", ".join(f"`{name}` {number(spent)} s" for name, spent in found.source_seconds.items())
    sections = [
        Section("AUROC on the target's test split", f"Of each finding with DeLong's interval, of the mean with a "
                f"bootstrap's over images; differences are to `{source.name}`, on the same images. Processor time of "
                f"the source networks: {trained}.",
                figures=(("ROC of the best way of each family, by the mean", roc),), table=_table(found, scored)),
        Section("Grad-CAM", "Of the fine-tuned networks: the mean of the maps of those that decide as all do together.",
                figures=(("Images with the finding, and what speaks for it", maps),), table=_overlap_table(overlaps)),
    ]  # fmt: skip
    if audits:
        sections.append(_audit_section(audits))
    lead = f"{len(found.rows)} images of the test split, {len(found.findings)} findings."
    path = out / "index.html"
    write_page(path, "From one set of radiographs to another", lead, sections, command)
    return path


def _best(scored: Sequence[Scored]) -> list[Way]:
    """Of each family the way with the highest mean: chosen on the images that are shown, so the curves flatter."""
    families = dict.fromkeys(way.family for way, *_ in scored)
    return [max((s for s in scored if s[0].family == family), key=lambda s: s[2].mean)[0] for family in families]


def _table(found: Transferred, scored: Sequence[Scored]) -> tuple[tuple[str, ...], ...]:
    head = ("way", "mean", "to the source", *found.findings, "CPU s")
    return (head, *(
        (f"`{way.name}`", _shown(whole), f"{signed(less.mean)} [{signed(less.low)}, {signed(less.high)}]",
         *map(_shown, each), number(way.seconds))
        for way, each, whole, less in scored
    ))  # fmt: skip


def _overlap_table(overlaps: Sequence[tuple[str, RegionOverlap]]) -> tuple[tuple[str, ...], ...] | None:
    if not overlaps:
        return None
    head = (
        "finding",
        "images",
        "share of the map in the region",
        "region's share of the image",
        "IoU",
        "maximum inside",
    )
    rows = []
    for finding in dict.fromkeys(name for name, _ in overlaps):
        own = [each for name, each in overlaps if name == finding]
        means = [np.mean([getattr(each, key) for each in own]) for key in ("share", "chance", "iou", "hit")]
        rows.append((finding, str(len(own)), *(number(float(value)) for value in means)))
    return (head, *rows)


def _audit_section(audits: Sequence[tuple[str, MarkerAudit]]) -> Section:
    head = ("model", "AUROC", "marker on the ill", "marker on the well", "gap", "answer moved", "map on the marker",
            "blind map", "shortcut")  # fmt: skip
    rows = [
        (name, number(a.plain), number(a.with_it), number(a.against), _shown(a.gap), signed(a.moved),
         number(a.in_corner), number(a.blind), "exposed" if a.exposed else "none found")
        for name, a in audits
    ]  # fmt: skip
    text = (
        "A marker is put into the corner of test images: on those with the finding, and on those without. Of a model "
        "that does not look at it both AUROCs are alike. The second model was trained on images of which 90 % of those "
        "with the finding, and 10 % of the others, had the marker."
    )
    return Section("A planted shortcut", text, table=(head, *rows))


def _shown(found: Interval) -> str:
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"


def roc_figure(found: Transferred, ways: Sequence[Way]) -> bytes:
    """A panel a finding, a curve a way. Returns a PNG."""
    from matplotlib.figure import Figure

    shown = [k for k in range(len(found.findings)) if {0.0, 1.0} <= set(found.truth[:, k])][:6]
    across = min(3, max(1, len(shown)))
    down = -(-max(1, len(shown)) // across)
    figure = Figure(figsize=(3.4 * across, 3.4 * down + 0.9), facecolor="white", layout="constrained")
    for place, k in enumerate(shown):
        axes = figure.add_subplot(down, across, place + 1)
        for colour, way in zip(COLOURS, ways):
            known = np.isfinite(found.truth[:, k])
            x, y = roc(found.truth[known, k], way.answers[known, k])
            axes.plot(x, y, color=colour, linewidth=1.6, label=plain(way.name) if place == 0 else None)
        axes.plot([0, 1], [0, 1], color=LINE, linewidth=0.9)
        axes.set_title(plain(found.findings[k]), fontsize=10, color=INK)
        axes.set_xlabel("1 - specificity", fontsize=9, color=SOFT)
        axes.set_ylabel("sensitivity", fontsize=9, color=SOFT)
        axes.tick_params(labelsize=8, colors=SOFT)
        axes.set_aspect("equal")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=across)
    return png(figure)


def roc(truth: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1 - specificity and sensitivity at every threshold, from (0, 0) to (1, 1); ties are one step."""
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)
    yes = np.cumsum(truth[order] != 0)[last]
    no = last + 1 - yes
    return np.concatenate([[0.0], no / max(1, no[-1])]), np.concatenate([[0.0], yes / max(1, yes[-1])])


def maps_figure(found: Transferred, size: int, device: str) -> tuple[bytes, list[tuple[str, RegionOverlap]]]:
    """A row a finding: images with it beneath their maps. Returns a PNG, and the overlap with ``masks/NNNNNN.tiff`` of
    the data set, for images that have one."""
    figure, axes = chart(2.6 * min(3, len(found.findings)))
    axes.remove()
    overlaps: list[tuple[str, RegionOverlap]] = []
    down = min(3, len(found.findings))
    for k, finding in enumerate(found.findings):
        ill = np.flatnonzero(found.truth[:, k] == 1)
        regions = {int(row): _region(found, int(found.rows[row]), size) for row in ill[:_MOST]}
        for place, row in enumerate(ill[:_MOST]):
            region = regions[int(row)]
            if place >= _SHOWN and region is None:
                continue
            heat = _joined(found, found.rows[[row]], k, size, device)
            if heat is not None and region is not None:
                overlaps.append((finding, overlap(heat, region)))
            if k < down and place < _SHOWN:
                panel = figure.add_subplot(down, _SHOWN, k * _SHOWN + place + 1)
                image = found.items.pixels(found.rows[[row]])[0].mean(0)
                extent = (0, 1, 0, 1)
                panel.imshow(image, cmap="gray", extent=extent)
                if heat is not None:
                    panel.imshow(heat, cmap="inferno", alpha=0.45, extent=extent, vmin=0, vmax=1)
                panel.set_axis_off()
                if place == 0:
                    panel.set_title(plain(finding), fontsize=9, loc="left", color=INK)
    return png(figure), overlaps


def _joined(found: Transferred, rows: np.ndarray, column: int, size: int, device: str) -> np.ndarray | None:
    heats, sure = [], []
    for model in found.tuned.values():
        images = tensors(model.network, found.items, rows, size, device)
        heats.append(grad_cam(model, images, column)[0])
        sure.append(float(model(images)[0, column].detach().sigmoid()))
    return agreeing(heats, sure)


def _region(found: Transferred, row: int, size: int) -> np.ndarray | None:
    return read_mask(found.items.dataset, int(found.items.rows[row]), size)
