"""Pictures of volumes as PNG: slices in three planes, outlines, maps of heat.

They follow the radiological convention: the patient's left is on the right side of axial and coronal pictures and
marked L; sagittal pictures look from the left, so that the face is on the left side, marked A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from brainfm.reports.style import INK, SOFT, TEXT_POINTS, WIDTH_INCH, plain, png

PLANES = ("axial", "coronal", "sagittal")
TRUTH_COLOUR, PREDICTION_COLOUR = "#19d3c5", "#ff9a1f"  # told apart on grey, and by colour-blind eyes

_AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # to the side, upwards, through the plane
_MARKS = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}  # at the left and right edge
_HIDDEN = (0.16, 0.36, 0.46)


@dataclass(frozen=True)
class _Tile:
    """A picture in a grid of pictures.

    Attributes:
        pixels: [across, up]; NaN is shown in a colour of its own.
        pixel_mm: edge lengths.
        window: the values shown black and white.
        outlines: (mask [across, up], colour) pairs.
        marks: letters at the left and right edge.
        heat: [across, up] values from -1 to 1 laid over the picture, clearer the smaller they are; None: nothing.
    """

    pixels: np.ndarray
    pixel_mm: tuple[float, float]
    window: tuple[float, float]
    outlines: tuple[tuple[np.ndarray, str], ...] = ()
    marks: tuple[str, str] = ("", "")
    heat: np.ndarray | None = None

    @property
    def size_mm(self) -> tuple[float, float]:
        return self.pixels.shape[0] * self.pixel_mm[0], self.pixels.shape[1] * self.pixel_mm[1]


def _window(array: np.ndarray) -> tuple[float, float]:
    """From the lowest value, which is the background, to the 99.9th percentile of what is above it."""
    values = array[np.isfinite(array)]
    low = float(values.min()) if values.size else 0.0
    above = values[values > low]
    high = float(np.percentile(above, 99.9)) if above.size else low + 1
    return low, high if high > low else low + 1


def _section_of(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """[across, up] as it is shown: the patient's left, or the back of the head, on the right side."""
    picture = np.take(volume, index, axis=_AXES[plane][2])
    return picture[::-1]


def _box(volume: np.ndarray, margin: int = 3) -> tuple[slice, slice, slice]:
    """Around everything above the lowest value."""
    inside = np.isfinite(volume) & (volume > np.nanmin(volume))
    sides = []
    for axis in range(3):
        used = np.flatnonzero(inside.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (used[0], used[-1]) if used.size else (0, volume.shape[axis] - 1)
        sides.append(slice(max(int(first) - margin, 0), int(last) + margin + 1))
    return sides[0], sides[1], sides[2]


def _largest(mask: np.ndarray, plane: str) -> int:
    """The slice where a mask is largest; the middle one where it is empty."""
    through = _AXES[plane][2]
    areas = np.asarray(mask, dtype=bool).sum(axis=tuple(a for a in range(3) if a != through))
    return int(areas.argmax()) if areas.any() else mask.shape[through] // 2


def _tile(
    volume: np.ndarray,
    plane: str,
    index: int,
    spacing_mm: tuple[float, float, float],
    outlines: Sequence[tuple[np.ndarray, str]] = (),
) -> _Tile:
    across, up, _ = _AXES[plane]
    cuts = [(_section_of(np.asarray(mask), plane, index), colour) for mask, colour in outlines]
    lines = tuple((cut == value, colour) for cut, colour in cuts for value in np.unique(cut) if value)
    pixel_mm = (spacing_mm[across], spacing_mm[up])
    return _Tile(_section_of(volume, plane, index), pixel_mm, _window(volume), lines, _MARKS[plane])


def _draw_tile(axes: Any, tile: _Tile) -> None:
    """Fill an axes with a tile: the picture, its hidden part, outlines, marks."""
    from matplotlib.patheffects import withStroke

    width, height = tile.size_mm
    extent = (0, width, 0, height)
    low, high = tile.window
    shown = np.nan_to_num(tile.pixels.astype(np.float32), nan=low).T
    axes.imshow(shown, origin="lower", cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bicubic")
    hidden = np.isnan(tile.pixels).T
    if hidden.any():
        cover = np.zeros((*hidden.shape, 4))
        cover[hidden] = (*_HIDDEN, 1)
        axes.imshow(cover, origin="lower", extent=extent, interpolation="nearest")
    if tile.heat is not None:
        shades = _heat_colours(np.clip(tile.heat.astype(np.float32), -1, 1))
        axes.imshow(shades.transpose(1, 0, 2), origin="lower", extent=extent, interpolation="bilinear")
    for mask, colour in tile.outlines:
        if mask.any():
            axes.contour(
                (np.arange(mask.shape[0]) + 0.5) * tile.pixel_mm[0],
                (np.arange(mask.shape[1]) + 0.5) * tile.pixel_mm[1],
                mask.T.astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.25,
            )  # fmt: skip
    for mark, place, side in ((tile.marks[0], 0.025, "left"), (tile.marks[1], 0.975, "right")):
        axes.text(place, 0.975, mark, transform=axes.transAxes, ha=side, va="top", color="#e7ecef", fontsize=8.5,
                  path_effects=[withStroke(linewidth=1.8, foreground="#10161f")])  # fmt: skip
    axes.set_aspect("equal")


def _grid(
    tiles: Sequence[Sequence[_Tile]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    legend: Sequence[tuple[str, str]] = (),
    largest_inch: float = 3.9,
    heat: tuple[float, float] | None = None,
    note: str = "",
) -> bytes:
    """A PNG of tiles at one scale in mm, labels at the left and above; below it (name, colour) pairs, or a bar with the
    colours of the tiles' heat from one value to another, and a note."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in tiles)
    widths = [max(row[c].size_mm[0] for row in tiles if c < len(row)) for c in range(columns)]
    heights = [max(tile.size_mm[1] for tile in row) for row in tiles]
    left = 0.22 + 0.085 * max((len(line) for label in row_labels for line in label.split("\n")), default=0)
    left = left if any(row_labels) else 0.0
    gap, top, below = 0.07, 0.32 if column_labels else 0.0, 0.42 if legend else 0.0
    below += 0.55 if heat or note else 0.0
    room = WIDTH_INCH - left - gap * (columns - 1)
    scale = min(room / sum(widths), largest_inch / max(heights))  # inches a mm
    full_width = left + scale * sum(widths) + gap * (columns - 1)
    full_height = top + scale * sum(heights) + gap * (len(tiles) - 1) + below
    figure = Figure(figsize=(full_width, full_height), facecolor="white")
    y = full_height - top
    for r, row in enumerate(tiles):
        x = left
        y -= scale * heights[r]
        for c, tile in enumerate(row):
            box = (x / full_width, y / full_height, scale * widths[c] / full_width, scale * heights[r] / full_height)
            axes = figure.add_axes(box, facecolor="black", xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            _draw_tile(axes, tile)
            spare = (widths[c] - tile.size_mm[0]) / 2, (heights[r] - tile.size_mm[1]) / 2
            axes.set_xlim(-spare[0], widths[c] - spare[0])
            axes.set_ylim(-spare[1], heights[r] - spare[1])
            if r == 0 and c < len(column_labels):
                middle = (x + scale * widths[c] / 2) / full_width
                figure.text(middle, 1 - 0.21 / full_height, plain(column_labels[c]), ha="center", color=INK,
                            fontsize=TEXT_POINTS)  # fmt: skip
            x += scale * widths[c] + gap
        if r < len(row_labels):
            middle = (y + scale * heights[r] / 2) / full_height
            figure.text((left - 0.14) / full_width, middle, plain(row_labels[r]), ha="right", va="center", color=INK,
                        fontsize=TEXT_POINTS)  # fmt: skip
        y -= gap
    _draw_legend(figure, legend, left / full_width)
    if heat:
        _draw_bar(figure, heat, (full_width - 2.6, 0.3), full_width, full_height)
    if note:
        figure.text(left / full_width, 0.33 / full_height, plain(note), color=INK, fontsize=TEXT_POINTS, va="center")
    return png(figure)


def _draw_bar(
    figure: Any, limits: tuple[float, float], place_inch: tuple[float, float], width: float, height: float
) -> None:
    """The colours of `_heat_colours` on black, as they lie on a picture."""
    axes = figure.add_axes((place_inch[0] / width, place_inch[1] / height, 2.4 / width, 0.12 / height), yticks=[])
    axes.set_facecolor("black")
    axes.imshow(_heat_colours(np.linspace(*limits, 256))[None], extent=(*limits, 0, 1), aspect="auto")
    axes.set_xticks(sorted({limits[0], 0.0, limits[1]}), [f"{v:g}" for v in sorted({limits[0], 0.0, limits[1]})])
    axes.tick_params(colors=SOFT, labelsize=9.5, length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: Any, entries: Sequence[tuple[str, str]], left: float) -> None:
    from matplotlib.lines import Line2D

    if entries:
        lines = [Line2D([], [], color=colour, linewidth=2.2) for _, colour in entries]
        names = [plain(name) for name, _ in entries]
        figure.legend(
            lines, names, loc="lower left", bbox_to_anchor=(left, 0), ncols=len(entries), frameon=False,
            fontsize=TEXT_POINTS, labelcolor=INK, borderaxespad=0, handlelength=1.6, columnspacing=2.2,
        )  # fmt: skip


def slices_figure(
    rows: Sequence[tuple[str, np.ndarray]],
    planes: Sequence[str] = PLANES,
    contours: Sequence[np.ndarray | None] = (),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    at_vox: tuple[int, int, int] | None = None,
) -> bytes:
    """Volumes of one grid, a row each, cut in up to three planes.

    Args:
        rows: (label, [X, Y, Z] volume) pairs on RAS+ axes.
        planes: of ``axial``, ``coronal``, ``sagittal``.
        contours: for every row a mask [X, Y, Z] to outline, or None.
        spacing_mm: of the voxels.
        at_vox: where to cut; else where the first mask is largest, or through the middle of the first volume's head.

    Returns:
        A PNG.
    """
    box = _box(rows[0][1])
    masks = [*contours, *[None] * (len(rows) - len(contours))]
    first = next((mask[box] for mask in masks if mask is not None and mask.any()), None)
    tiles = []
    for (_, volume), mask in zip(rows, masks):
        row = []
        for plane in planes:
            axis = _AXES[plane][2]
            middle = volume[box].shape[axis] // 2
            index = (
                at_vox[axis] - box[axis].start if at_vox else _largest(first, plane) if first is not None else middle
            )
            index = min(max(index, 0), volume[box].shape[axis] - 1)
            lines = [(mask[box], TRUTH_COLOUR)] if mask is not None else []
            row.append(_tile(volume[box], plane, index, spacing_mm, lines))
        tiles.append(row)
    return _grid(tiles, [label for label, _ in rows], [plane.capitalize() for plane in planes], largest_inch=2.7)


def cohort_figure(
    subjects: Sequence[tuple[str, Mapping[str, np.ndarray], np.ndarray | None]],
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> bytes:
    """One axial slice of several subjects, a column each, a row for every contrast.

    Args:
        subjects: (label, contrast -> [X, Y, Z] volume, mask or None); a subject's volumes share a grid. The slice is
            where the mask is largest, and the mask is outlined on the last contrast.
        spacing_mm: of the voxels.

    Returns:
        A PNG. A subject without one of the contrasts has an empty tile there.
    """
    contrasts = list(dict.fromkeys(name for _, volumes, _ in subjects for name in volumes))
    tiles: list[list[_Tile]] = [[] for _ in contrasts]
    for _, volumes, mask in subjects:
        box = _box(next(iter(volumes.values())))
        seen = mask[box] if mask is not None else np.zeros([side.stop - side.start for side in box], dtype=bool)
        index = _largest(seen, "axial") if seen.any() else int(0.55 * next(iter(volumes.values()))[box].shape[2])
        for place, name in enumerate(contrasts):
            volume = volumes.get(name, np.zeros_like(next(iter(volumes.values()))))
            lines = [(seen, TRUTH_COLOUR)] if name == contrasts[-1] and name in volumes and seen.any() else []
            tiles[place].append(_tile(volume[box], "axial", index, spacing_mm, lines))
    return _grid(tiles, contrasts, [label for label, _, _ in subjects], largest_inch=2.4)


def overlay_figure(
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    titles: Sequence[str] = ("True lesion", "Predicted"),
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> bytes:
    """What is true and what was predicted, outlined in three planes, where the true lesion is largest.

    Args:
        image: [X, Y, Z] on RAS+ axes.
        truth, prediction: [X, Y, Z] masks or label maps, of which every label is outlined. Where truth is empty, the
            predicted mask chooses the planes.
        titles: their names in the legend.
        spacing_mm: of the voxels.

    Returns:
        A PNG.
    """
    box = _box(image)
    true, predicted = np.asarray(truth[box]), np.asarray(prediction[box])
    guide = true if true.any() else predicted
    outlines = [(true, TRUTH_COLOUR), (predicted, PREDICTION_COLOUR)]
    row = [_tile(image[box], plane, _largest(guide, plane), spacing_mm, outlines) for plane in PLANES]
    legend = [(titles[0], TRUTH_COLOUR), (titles[1], PREDICTION_COLOUR)]
    return _grid([row], column_labels=[plane.capitalize() for plane in PLANES], legend=legend)


def _heat_colours(values: np.ndarray) -> np.ndarray:
    """[..., 4]: from nothing over red to yellow above 0, over blue to a light green below it."""
    from matplotlib import colormaps

    shades = np.where(
        (values < 0)[..., None],
        colormaps["winter"](np.abs(values)),
        colormaps["autumn"](np.abs(values)),
    )
    shades[..., 3] = 0.75 * np.minimum(np.abs(values) / 0.6, 1)
    return shades


def heat_figure(
    image: np.ndarray,
    heat: np.ndarray,
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    label: str = "",
    outline: np.ndarray | None = None,
    outline_name: str = "Lesion",
    at_vox: tuple[int, int, int] | None = None,
) -> bytes:
    """A map of what mattered over the head, in three planes, the head alone above it.

    Args:
        image: [X, Y, Z] on RAS+ axes.
        heat: [X, Y, Z] from 0 to 1, or from -1 to 1.
        spacing_mm: of the voxels.
        label: one line below the pictures.
        outline: mask or label map [X, Y, Z] drawn as lines, such as a known lesion.
        outline_name: its name in the legend.
        at_vox: where to cut; else where the map is strongest.

    Returns:
        A PNG.
    """
    box = _box(image)
    strength = np.abs(heat[box])
    cut = [int(place) for place in np.unravel_index(int(strength.argmax()), strength.shape)]
    if at_vox is not None:
        cut = [min(max(at - side.start, 0), n - 1) for at, side, n in zip(at_vox, box, strength.shape)]
    lines = [] if outline is None else [(outline[box], TRUTH_COLOUR)]
    plain, covered = [], []
    for plane in PLANES:
        axis = _AXES[plane][2]
        index = cut[axis] if strength.any() or at_vox else strength.shape[axis] // 2
        tile = _tile(image[box], plane, index, spacing_mm, lines)
        plain.append(replace(tile, outlines=()))
        covered.append(replace(tile, heat=_section_of(heat[box], plane, index)))
    legend = [] if outline is None else [(outline_name, TRUTH_COLOUR)]
    columns = [plane.capitalize() for plane in PLANES]
    limits = (-1.0 if (heat < 0).any() else 0.0, 1.0)
    return _grid([plain, covered], ["scan", "map"], columns, legend, largest_inch=2.9, heat=limits, note=label)


def reconstruction_figure(
    columns: Mapping[str, Sequence[np.ndarray]],
    row_labels: Sequence[str] = (),
    pixel_mm: tuple[float, float] = (1.0, 1.0),
) -> bytes:
    """What went in, what was hidden, what came out: a column each, a row a patch.

    Args:
        columns: name -> axial slices [X, Y]; NaN marks hidden voxels. A row has the window of its first slice.
        row_labels: one a row.
        pixel_mm: of the slices.

    Returns:
        A PNG.
    """
    rows = list(zip(*columns.values(), strict=True))
    tiles = [
        [_Tile(picture[::-1], pixel_mm, _window(row[0]), marks=_MARKS["axial"]) for picture in row] for row in rows
    ]
    return _grid(tiles, row_labels, list(columns), largest_inch=2.4)
