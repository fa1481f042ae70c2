"""Resampling between grids, exact in scanner coordinates.

Where the axes of source and target are parallel (nearly always: two grids of one scanner session, or a file and its
own resampled copy) a volume is resampled by three products with 1-D weight matrices, which BLAS does at once. Axes
that already agree to a thousandth of a voxel are only sliced, so such values stay bit-identical. Oblique pairs are
first averaged to the target's spacing in the same way, then read by spline (scipy.ndimage).

A voxel is a box around its centre. Target voxels whose centre lies outside every source box get the fill value; in
the half voxel between the outermost centres and the edge the outermost value goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import scipy.ndimage

from brainfm.volume import spacing_of

Order = Literal["cubic", "linear", "nearest"]
Shape = tuple[int, int, int]

SAME_VOX = 1e-3  # positions nearer than this to a source centre are that centre
_PARALLEL_VOX = 1e-2  # axes are parallel where no voxel is further off its row than this
_TIE = 1e-5  # two class weights nearer than this are equal but for rounding


class Grid(Protocol):
    """Anything with a shape and an affine, such as a Volume."""

    @property
    def shape(self) -> Shape: ...
    @property
    def affine_mm(self) -> np.ndarray: ...


# ---- public ----------------------------------------------------------------------------------------------------------


def resample(
    array: np.ndarray,
    affine_mm: np.ndarray,
    target_shape: Shape,
    target_affine_mm: np.ndarray,
    *,
    order: Order,
    fill: float,
) -> np.ndarray:
    """The same image on another grid.

    Going to larger voxels, the cubic and linear kernels are stretched so that finer detail is averaged, not aliased.

    Args:
        array: [X, Y, Z] real; not changed.
        affine_mm: [4, 4] of `array`.
        target_shape: of the result.
        target_affine_mm: [4, 4] of the result.
        order: ``cubic`` (kept within the range of the source), ``linear`` or ``nearest``.
        fill: value outside the source.

    Returns:
        [X, Y, Z] of `target_shape`: float32, or for ``nearest`` the dtype of `array`.
    """
    transform = np.linalg.inv(affine_mm) @ target_affine_mm
    dtype = array.dtype if order == "nearest" else np.dtype(np.float32)
    permutation = _parallel_axes(transform, target_shape)
    if permutation is None:
        return _resample_oblique(array, transform, target_shape, order, fill, dtype)
    rows = [
        _place(transform[source_axis, axis], transform[source_axis, 3], array.shape[source_axis], size, order)
        for axis, (source_axis, size) in enumerate(zip(permutation, target_shape, strict=True))
    ]
    return _resample_parallel(array.transpose(permutation), rows, target_shape, order, fill, dtype)


def resample_labels(
    labels: np.ndarray,
    affine_mm: np.ndarray,
    target_shape: Shape,
    target_affine_mm: np.ndarray,
    *,
    how: Literal["nearest", "linear"],
) -> np.ndarray:
    """A label map on another grid; 0 outside.

    Args:
        labels: [X, Y, Z] whole numbers, 0 is background.
        how: ``nearest``, or ``linear``: each class is interpolated apart and the largest share wins. Against background
            a class wins a tie, and the lower label wins one against the higher.

    Returns:
        [X, Y, Z] of `target_shape`, dtype of `labels`.
    """
    transform = np.linalg.inv(affine_mm) @ target_affine_mm
    if how == "nearest" or _is_same_lattice(transform, target_shape):
        return resample(labels, affine_mm, target_shape, target_affine_mm, order="nearest", fill=0)
    result = np.zeros(target_shape, dtype=labels.dtype)
    best = np.zeros(target_shape, dtype=np.float32)
    total = np.zeros(target_shape, dtype=np.float32)
    for value, source_box in _class_boxes(labels):
        share, box = _class_share(labels, value, source_box, transform, target_shape)
        total[box] += share
        wins = share > best[box] + _TIE
        best[box][wins] = share[wins]
        result[box][wins] = value
    result[best < 1 - total - _TIE] = 0
    return result


def lattice(affine_mm: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """The affine [4, 4] of an endless grid with the directions of a scan, oblique ones too.

    Voxel 0 begins at the edge of the scan's field of view, so a scan that already has `spacing_mm` keeps its voxels
    where they are.

    Args:
        affine_mm: [4, 4] of the scan.
        spacing_mm: of the grid, along X, Y, Z.
    """
    anchor = np.array(affine_mm, dtype=np.float64)
    affine = anchor.copy()
    affine[:3, :3] = anchor[:3, :3] / np.array(spacing_of(anchor)) * np.array(spacing_mm, dtype=np.float64)
    edge = anchor[:3, :3] @ np.full(3, -0.5) + anchor[:3, 3]
    affine[:3, 3] = edge + affine[:3, :3] @ np.full(3, 0.5)
    return affine


def session_grid(volumes: Mapping[str, Grid], lattice_affine_mm: np.ndarray) -> tuple[Shape, np.ndarray, Shape]:
    """One grid for all scans of a session: the voxels of a lattice that hold every field of view.

    Args:
        volumes: RAS+ grids by scan name.
        lattice_affine_mm: [4, 4], as `lattice` makes it.

    Returns:
        Shape, affine [4, 4], and the lattice's voxel at which the grid begins.
    """
    affine = np.array(lattice_affine_mm, dtype=np.float64)
    boxes = [box_between(np.zeros(3), np.array(v.shape), v.affine_mm, affine) for v in volumes.values()]
    low = np.floor(np.min([b[0] for b in boxes], axis=0) + 0.5 + SAME_VOX).astype(int)
    high = np.ceil(np.max([b[1] for b in boxes], axis=0) + 0.5 - SAME_VOX).astype(int)
    affine[:3, 3] += affine[:3, :3] @ low
    x, y, z = (int(n) for n in np.maximum(high - low, 1))
    a, b, c = (int(n) for n in low)
    return (x, y, z), affine, (a, b, c)


def box_between(
    start_vox: np.ndarray, stop_vox: np.ndarray, affine_mm: np.ndarray, other_affine_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extent, on another grid, of the box of voxels start <= i < stop.

    Returns:
        Lowest and highest continuous index [3] on the other grid; voxel i covers i - 0.5 to i + 0.5.
    """
    sides = zip(np.asarray(start_vox) - 0.5, np.asarray(stop_vox) - 0.5, strict=True)
    corners = np.array(np.meshgrid(*sides, indexing="ij")).reshape(3, -1)
    transform = np.linalg.inv(other_affine_mm) @ affine_mm
    moved = transform[:3, :3] @ corners + transform[:3, 3:]
    return moved.min(axis=1), moved.max(axis=1)


def extent_between(
    mask: np.ndarray, affine_mm: np.ndarray, other_affine_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The extent, on another grid, of the voxels of a mask; exact for oblique grids too.

    Args:
        mask: bool [X, Y, Z] with at least one voxel set.

    Returns:
        As box_between.
    """
    plane = np.logical_or.reduce(mask, axis=2)
    spans = [np.flatnonzero(hit) for hit in (plane.any(axis=1), plane.any(axis=0), mask.any(axis=(0, 1)))]
    start, stop = np.array([span[0] for span in spans]), np.array([span[-1] + 1 for span in spans])
    transform = np.linalg.inv(other_affine_mm) @ affine_mm
    if _parallel_axes(transform, tuple(stop - start)) is not None:
        return box_between(start, stop, affine_mm, other_affine_mm)
    # The extremes lie at the ends of the rows of voxels along any axis.
    rows = mask[tuple(slice(*ends) for ends in zip(start, stop, strict=True))]
    x, y = np.nonzero(plane[start[0] : stop[0], start[1] : stop[1]])
    first, last = rows.argmax(axis=2)[x, y], rows.shape[2] - 1 - rows[:, :, ::-1].argmax(axis=2)[x, y]
    points = np.concatenate([np.stack([x, y, z]) for z in (first, last)], axis=1) + start[:, None]
    moved = transform[:3, :3] @ points + transform[:3, 3:]
    half = np.abs(transform[:3, :3]).sum(axis=1) / 2  # of a voxel
    return moved.min(axis=1) - half, moved.max(axis=1) + half


def cropped_affine(affine_mm: np.ndarray, start_vox: tuple[int, int, int]) -> np.ndarray:
    """The affine of array[start:...], [4, 4]."""
    affine = np.array(affine_mm, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ np.array(start_vox, dtype=np.float64)
    return affine


# ---- one axis --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """How one target axis reads one source axis.

    Attributes:
        start, stop: target indices that lie inside the source.
        take: source index per target index of that range, where no weights are needed.
        weights: [stop - start, n] float32 over source indices first .. first + n, else None.
        first: see weights.
    """

    start: int
    stop: int
    take: np.ndarray | None
    weights: np.ndarray | None
    first: int = 0


def _place(step: float, offset: float, source_size: int, target_size: int, order: Order) -> _Axis:
    """Position of target index i on the source axis: offset + step * i."""
    position = offset + step * np.arange(target_size)
    inside = np.flatnonzero((position > -0.5 - SAME_VOX) & (position < source_size - 0.5 + SAME_VOX))
    if inside.size == 0:
        return _Axis(0, 0, np.zeros(0, dtype=np.intp), None)
    start, stop = int(inside[0]), int(inside[-1]) + 1
    position = position[start:stop]
    nearest = np.clip(np.floor(position + 0.5), 0, source_size - 1).astype(np.intp)
    same_size = abs(step) <= 1 + SAME_VOX  # larger target voxels hold several centres and are averages of them
    if order == "nearest" or (same_size and np.abs(position - nearest).max() <= SAME_VOX):
        return _Axis(start, stop, nearest, None)
    weights = _weights(position, source_size, max(1.0, abs(step)), order)
    used = np.flatnonzero(weights.any(axis=0))
    first, last = int(used[0]), int(used[-1]) + 1
    return _Axis(start, stop, None, np.ascontiguousarray(weights[:, first:last], dtype=np.float32), first)


def _weights(position: np.ndarray, source_size: int, stretch: float, order: Order) -> np.ndarray:
    """[positions, source_size] float64; each row sums to one and has its centre of gravity at its position."""
    reach = (2 if order == "cubic" else 1) * stretch
    first = np.ceil(position - reach - 1e-9).astype(int)
    taps = first[:, None] + np.arange(int(np.floor(2 * reach)) + 2)
    distance = taps - position[:, None]
    hat = np.maximum(0, 1 - np.abs(distance) / reach)
    kernel = _keys(distance / stretch) if order == "cubic" else hat.copy()
    # A stretched kernel, sampled, neither sums to one nor is balanced: mend both, so that ramps stay ramps.
    moments = np.stack([(hat * distance**k).sum(axis=1) for k in range(3)])
    lack = np.stack([1 - kernel.sum(axis=1), -(kernel * distance).sum(axis=1)])
    determinant = moments[0] * moments[2] - moments[1] ** 2
    alone = determinant == 0  # the linear kernel on a source voxel's centre: one tap, which is balanced as it is
    determinant[alone] = 1
    level = np.where(alone, lack[0], (moments[2] * lack[0] - moments[1] * lack[1]) / determinant)
    slope = np.where(alone, 0, (moments[0] * lack[1] - moments[1] * lack[0]) / determinant)
    kernel += hat * (level[:, None] + slope[:, None] * distance)
    weights = np.zeros((len(position), source_size))
    np.add.at(weights, (np.arange(len(position))[:, None], np.clip(taps, 0, source_size - 1)), kernel)
    return weights


def _keys(x: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5 (Keys 1981), which reproduces quadratics."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# ---- parallel axes ---------------------------------------------------------------------------------------------------


def _parallel_axes(transform: np.ndarray, target_shape: Shape) -> tuple[int, int, int] | None:
    """The source axis of each target axis, or None where the grids are oblique to each other."""
    linear = np.abs(transform[:3, :3])
    x, y, z = (int(axis) for axis in linear.argmax(axis=0))
    if len({x, y, z}) != 3:
        return None
    off = linear.copy()
    off[[x, y, z], [0, 1, 2]] = 0
    if (off @ (np.array(target_shape) - 1)).max() > _PARALLEL_VOX:
        return None
    return x, y, z


def _is_same_lattice(transform: np.ndarray, target_shape: Shape) -> bool:
    """Whether the voxels of both grids are the same boxes, but for whole steps, flips and the order of axes."""
    whole = np.rint(transform[:3])
    if (np.abs(whole[:, :3]).sum(axis=0) != 1).any():
        return False
    off = np.abs(transform[:3] - whole)
    return bool((off @ np.array([*target_shape, 1])).max() <= SAME_VOX)


def _resample_parallel(
    array: np.ndarray, axes: list[_Axis], target_shape: Shape, order: Order, fill: float, dtype: np.dtype
) -> np.ndarray:
    """`array` has its axes in the target's order."""
    inside = tuple(slice(axis.start, axis.stop) for axis in axes)
    whole = all(axis.stop - axis.start == size for axis, size in zip(axes, target_shape, strict=True))
    if any(axis.stop == axis.start for axis in axes):
        return np.full(target_shape, fill, dtype=dtype)
    weighted = [i for i, axis in enumerate(axes) if axis.weights is not None]
    limits = (array.min(), array.max()) if weighted and order == "cubic" else None
    for i, axis in enumerate(axes):  # slices first: they make the products smaller
        array = _slice_along(array, axis, i)
    if weighted and array.dtype != np.float32:
        array = array.astype(np.float32, order="K")
    for i in sorted(weighted, key=lambda i: axes[i].weights.shape[0] / axes[i].weights.shape[1]):  # type: ignore[union-attr]
        array = _multiply_along(array, axes[i].weights, i)  # type: ignore[arg-type]
    if limits is not None:
        np.clip(array, *limits, out=array)
    if whole and weighted and array.flags.c_contiguous:
        return array
    result = np.empty(target_shape, dtype=dtype) if whole else np.full(target_shape, fill, dtype=dtype)
    destination = result[inside]
    for j in range(array.shape[1]):  # plane by plane: from Fortran to C order this stays within the processor's cache
        destination[:, j] = array[:, j]
    return result


def _slice_along(array: np.ndarray, axis: _Axis, number: int) -> np.ndarray:
    index: list[slice | np.ndarray] = [slice(None)] * 3
    if axis.weights is not None:
        index[number] = slice(axis.first, axis.first + axis.weights.shape[1])
    else:
        take = axis.take
        assert take is not None
        steps = np.diff(take)
        if (steps == 1).all():
            index[number] = slice(int(take[0]), int(take[-1]) + 1)  # a view
        else:
            index[number] = take
    return array[tuple(index)]


def _multiply_along(array: np.ndarray, weights: np.ndarray, number: int) -> np.ndarray:
    """weights [m, n] applied along one axis of length n; keeps C or Fortran order, so that BLAS sees no copies."""
    if array.flags.f_contiguous and not array.flags.c_contiguous:
        return _multiply_along(array.T, weights, 2 - number).T
    array = np.ascontiguousarray(array)
    x, y, z = array.shape
    if number == 0:
        return (weights @ array.reshape(x, y * z)).reshape(-1, y, z)
    if number == 2:
        return (array.reshape(x * y, z) @ weights.T).reshape(x, y, -1)
    return np.matmul(weights, array)


# ---- oblique ---------------------------------------------------------------------------------------------------------


def _resample_oblique(
    array: np.ndarray, transform: np.ndarray, target_shape: Shape, order: Order, fill: float, dtype: np.dtype
) -> np.ndarray:
    size = np.array(array.shape)
    result = np.full(target_shape, fill, dtype=dtype)
    box = _inside_box(transform, size, target_shape)
    if any(side.stop <= side.start for side in box):
        return result
    linear, offset = transform[:3, :3], transform[:3, 3] + transform[:3, :3] @ np.array([side.start for side in box])
    shape = tuple(side.stop - side.start for side in box)
    outside = _outside(linear, offset, size, shape)
    limits = array.min(), array.max()
    if order != "nearest":
        array, scale, shift = _averaged(array.astype(np.float32, order="K"), linear)
        linear, offset = linear * scale[:, None], offset * scale + shift
    part = scipy.ndimage.affine_transform(
        array,
        linear,
        offset,
        output_shape=shape,
        output=dtype,
        order={"cubic": 3, "linear": 1, "nearest": 0}[order],
        mode="nearest",
    )
    if order == "cubic":
        np.clip(part, *limits, out=part)
    part[outside] = fill
    result[box] = part
    return result


def _averaged(array: np.ndarray, linear: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The source brought to the target's spacing along those of its axes that are finer.

    Returns:
        The array, and scale [3] and shift [3]: new index = scale * old index + shift.
    """
    # Along source axis i, target voxels lie this many source voxels apart.
    stretch = np.sqrt((linear**2).sum(axis=1))
    scale, shift = np.ones(3), np.zeros(3)
    for axis in range(3):
        if stretch[axis] < 1.05:
            continue
        new_size = max(1, round(array.shape[axis] / stretch[axis]))
        step = array.shape[axis] / new_size
        placed = _place(step, (step - 1) / 2, array.shape[axis], new_size, "cubic")
        if placed.weights is None:
            continue
        array = _multiply_along(_slice_along(array, placed, axis), placed.weights, axis)
        scale[axis], shift[axis] = 1 / step, -(step - 1) / (2 * step)
    return array, scale, shift


def _inside_box(transform: np.ndarray, source_size: np.ndarray, target_shape: Shape) -> tuple[slice, slice, slice]:
    """The part of the target that can lie inside the source."""
    low, high = box_between(np.zeros(3), source_size, np.linalg.inv(transform), np.eye(4))
    start = np.clip(np.floor(low), 0, target_shape).astype(int)
    stop = np.clip(np.ceil(high) + 1, 0, target_shape).astype(int)
    x, y, z = (slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    return x, y, z


def _outside(linear: np.ndarray, offset: np.ndarray, source_size: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """bool of `shape`: the centre lies in no source voxel."""
    outside = np.zeros(shape, dtype=bool)
    i, j, k = (np.arange(size, dtype=np.float32) for size in shape)
    for axis in range(3):
        a, b, c = linear[axis].astype(np.float32)
        position = (a * i + np.float32(offset[axis]))[:, None, None] + (b * j)[:, None] + c * k
        outside |= (position < -0.5 - SAME_VOX) | (position > source_size[axis] - 0.5 + SAME_VOX)
    return outside


# ---- classes ---------------------------------------------------------------------------------------------------------


def _class_boxes(labels: np.ndarray) -> list[tuple[int, tuple[slice, slice, slice]]]:
    """The label values except 0, rising, each with the box of source voxels that holds it."""
    values = np.unique(labels)
    values = values[values != 0]
    if values.size == 0:
        return []
    # find_objects wants small positive numbers.
    compact = np.zeros(labels.shape, dtype=np.int32)
    occupied = labels != 0
    compact[occupied] = np.searchsorted(values, labels[occupied]) + 1
    boxes = scipy.ndimage.find_objects(compact)
    return [(int(value), box) for value, box in zip(values, boxes, strict=True)]


def _class_share(
    labels: np.ndarray,
    value: int,
    source_box: tuple[slice, slice, slice],
    transform: np.ndarray,
    target_shape: Shape,
) -> tuple[np.ndarray, tuple[slice, slice, slice]]:
    """How much of each target voxel one class fills, computed only where it can be more than nothing.

    Returns:
        float32 array, and the box of the target that it belongs to.
    """
    # Beside its box the class is absent, but an edge of the array must stay one: widen the box by what the kernel sees.
    reach = np.ceil(np.maximum(1, np.sqrt((transform[:3, :3] ** 2).sum(axis=1)))).astype(int) * 2 + 1
    start = np.maximum([side.start for side in source_box] - reach, 0)
    stop = np.minimum([side.stop for side in source_box] + reach, labels.shape)
    part = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
    indicator = (labels[part] == value).astype(np.float32)
    local = transform.copy()
    local[:3, 3] -= start
    box = _inside_box(local, stop - start, target_shape)
    local[:3, 3] += local[:3, :3] @ np.array([side.start for side in box])
    shape = tuple(max(0, side.stop - side.start) for side in box)
    if 0 in shape:
        return np.zeros(shape, dtype=np.float32), box
    share = resample(indicator, np.eye(4), shape, local, order="linear", fill=0)
    return share, box
