"""Where in a head a structure lies: learned from labelled cases, so that a network is asked there alone.

A nerve fills a ten-thousandth of a head at half a millimetre, and the windows that cover the rest cost minutes and can
only be wrong. Places are told from the middle between left and right, the back and the top of a head; not from neck and
face, of which a field of view or a defacing takes more or less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Box = tuple[slice, slice, slice]

MARGIN_MM = 10.0  # around all that was ever seen
_CASES = 20  # people with the structure, below whom nobody knows where it can be
_MOST = 0.25  # of a head: a larger region saves too little
_ALIKE = 0.15  # by how much of its size a head may differ from those that were learned from


def learned(
    shapes_vox: Sequence[Sequence[int]],
    boxes: Sequence[Box | None],
    people: Sequence[str],
    spacing_mm: Sequence[float],
) -> tuple[float, ...]:
    """The region of a structure, as `Decisions.region` keeps it; empty where it has none of its own.

    The region holds every case, and a margin of 10 mm, or of twice what one person's structure reaches out of the
    others' where that is more. A lesion, which may be anywhere, fills most of a head and gets no region.

    Measured on 107 heads of IXI, five structures of a parcellation: the region of 20 people cuts something off in .8 to
    1.7 % of the other heads, that of 40 in .1 to .9 %; it is 4 to 13 % of a head.

    Args:
        shapes_vox: of the prepared heads, cropped to what is not air.
        boxes: around the structure in each, None where it is absent.
        people: subject of each.

    Returns: ``(x, y, z)`` of the lower and the upper corner in mm, x from the middle of the head, y from its back, z
        from its top; then the smallest and the largest width and the smallest height of the heads.
    """
    there = [n for n, box in enumerate(boxes) if box is not None]
    if len({people[n] for n in there}) < _CASES:
        return ()
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    corners = np.array([_in_head(boxes[n], shapes_vox[n], spacing) for n in there])  # type: ignore[arg-type]
    lows, highs = corners[:, 0], corners[:, 1]
    out = 0.0
    for n, place in enumerate(there):
        others = np.array([people[m] != people[place] for m in there])
        out = max(out, float((lows[others].min(0) - lows[n]).max()), float((highs[n] - highs[others].max(0)).max()))
    margin = max(MARGIN_MM, 2 * out)
    low, high = lows.min(0) - margin, highs.max(0) + margin
    sizes = np.array([shapes_vox[n] for n in range(len(boxes))]) * spacing
    if float(np.prod(high - low)) > _MOST * float(np.median(np.prod(sizes, axis=1))):
        return ()
    widths = float(sizes[:, 0].min()), float(sizes[:, 0].max()), float(sizes[:, 2].min())
    return tuple(round(float(v), 2) for v in (*low, *high, *widths))


def box_of(
    region: Sequence[float], shape_vox: Sequence[int], spacing_mm: Sequence[float], patch_vox: Sequence[int]
) -> Box | None:
    """The region in a prepared head, at least a window wide; None: the whole head is looked at.

    That is so where there is no region, and where the head has not the size of those that were learned from, as of a
    child or a slab: then nobody knows where its top is.
    """
    if not region:
        return None
    spacing, shape = np.asarray(spacing_mm, dtype=np.float64), np.asarray(shape_vox)
    narrowest, widest, lowest = region[6:]
    size = shape * spacing
    if not narrowest * (1 - _ALIKE) <= size[0] <= widest * (1 + _ALIKE) or size[2] < lowest * (1 - _ALIKE):
        return None
    origin = _origin(shape, spacing)
    low = np.floor((np.asarray(region[:3]) + origin) / spacing).astype(int)
    high = np.ceil((np.asarray(region[3:6]) + origin) / spacing).astype(int) + 1
    low, high = np.clip(low, 0, shape), np.clip(high, 0, shape)
    if (high <= low).any():  # it lies outside of the field of view
        return None
    width = np.minimum(np.maximum(high - low, patch_vox), shape)
    low = np.clip(low - (width - (high - low)) // 2, 0, shape - width)
    high = low + width
    x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return x, y, z


def words(region: Sequence[float]) -> str:
    """For people; empty without a region."""
    if not region:
        return ""
    size = " x ".join(f"{b - a:.0f}" for a, b in zip(region[:3], region[3:6], strict=True))
    return f"looked for in a region of {size} mm alone, in which it lay in every case"


def _in_head(box: Box, shape_vox: Sequence[int], spacing: np.ndarray) -> np.ndarray:
    """[2, 3] corners in mm."""
    origin = _origin(np.asarray(shape_vox), spacing)
    return np.array([[s.start for s in box], [s.stop - 1 for s in box]]) * spacing - origin


def _origin(shape: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """[3] mm from the first voxel to the point that places are told from: middle, back, top."""
    return np.array([(shape[0] - 1) / 2, 0, shape[2] - 1]) * spacing
