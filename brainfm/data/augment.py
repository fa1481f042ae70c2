"""Augmentation in the batch, on the device. What happens to a sample is drawn from its number; applying draws none.

`draw` decides on the CPU which samples move and which scans get which artefact, so that `apply` knows all shapes
without asking the device: it touches those rows alone, each with a few kernels, and never waits.

**Background.** Preparing clips a scan at a low percentile of its foreground, so air and padding have one exact value,
the scan's minimum. Artefacts therefore act on the height above the patch's minimum (its *floor*): a bias field, gamma
or inversion cannot lift the background, and ghosts and noise are left out where a voxel lies on the floor, as if they
had come before the scan was stripped and clipped. Only blur and low resolution carry signal over the edge of the head,
as a resampled scan shows it. In a patch without background the floor is its darkest voxel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.data.regions import RENDERED_FAMILIES
from brainfm.data.torchio_transforms import LABELS, SCANS, TorchIODraw, torchio_draw, transformed, transforms_of
from brainfm.errors import ConfigError
from brainfm.synthesis.deform import INJECTIVE
from brainfm.synthesis.render import render_views
from brainfm.synthesis.settings import LookSpec

ARTEFACTS = ("invert", "gamma", "bias", "blur", "low_res", "ghost", "noise", "gain", "offset")  # in order of appearance

_ELASTIC_CELLS = 4  # cells of the displacement's splines along each axis of the patch
_BIAS_CELLS = 2  # the same for bias fields, which are smoother
_ON_FLOOR = 1e-3  # of the patch's range; interpolation leaves the background this near its value


@dataclass(frozen=True)
class AugmentSpec:
    """How often and how strongly. Spatial probabilities are a sample's, all others a scan's.

    Attributes:
        flip: probability of mirroring left-right. Use 0 where labels name a side.
        affine: probability of a rotation and scaling.
        rotate_deg: largest angle about each axis, in degrees.
        scale: largest relative change of size along each axis.
        elastic: probability of a smooth displacement.
        elastic_strength: its largest coefficient as a part of what could fold.
        intensity: probability of each of gain, offset, gamma and noise.
        gain_factor: largest factor on the standardised values, and its inverse the smallest.
        offset_std: largest shift, in standard deviations of the foreground.
        gamma_power: largest exponent over the patch's own range; the smallest is its inverse.
        noise_std: largest standard deviation of either channel of the Rician noise, in those of the foreground.
        bias: probability of a smooth multiplicative field.
        bias_log: largest absolute logarithm of it.
        blur: probability of a Gaussian blur.
        blur_vox: largest standard deviation of it.
        low_res: probability of sampling coarsely and back: thick slices along one axis, or (half as often) all axes.
        low_res_factor: largest thickness of slices in voxels; along all axes it is the square root of that.
        ghost: probability of shifted copies along one axis, as periodic motion leaves them.
        ghost_share: largest part of the signal that goes into them.
        invert: probability of inverted contrast.
        torchio: TorchIO's transforms (data/torchio_transforms.py), which act after all of the above, on the host.

    Raises:
        ConfigError: where a probability is not in 0..1 or a strength is out of its range.
    """

    flip: float = 0.5
    affine: float = 0.3
    rotate_deg: float = 15.0
    scale: float = 0.15
    elastic: float = 0.0
    elastic_strength: float = 0.5
    intensity: float = 0.3
    gain_factor: float = 1.25
    offset_std: float = 0.2
    gamma_power: float = 1.5
    noise_std: float = 0.15
    bias: float = 0.0
    bias_log: float = 0.4
    blur: float = 0.0
    blur_vox: float = 1.0
    low_res: float = 0.0
    low_res_factor: float = 4.0
    ghost: float = 0.0
    ghost_share: float = 0.3
    invert: float = 0.0
    torchio: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"augment.{name}={value}: expected a number from {low:g} to {high:g}")

    def probability(self, artefact: str) -> float:
        """Of one of ARTEFACTS."""
        return float(getattr(self, "intensity" if artefact in ("gain", "offset", "gamma", "noise") else artefact))


_PROBABILITIES = ("flip", "affine", "elastic", "intensity", "bias", "blur", "low_res", "ghost", "invert")
_RANGES: dict[str, tuple[float, float]] = {
    **{name: (0, 1) for name in _PROBABILITIES},
    "rotate_deg": (0, 180),
    "scale": (0, 0.9),
    "elastic_strength": (0, 1),
    "gain_factor": (1, 10),
    "offset_std": (0, 10),
    "gamma_power": (1, 10),
    "noise_std": (0, 10),
    "bias_log": (0, 3),
    "blur_vox": (0, 10),
    "low_res_factor": (1, 16),
    "ghost_share": (0, 1),
}

# Probabilities of "full" are near those of nnU-Net (Isensee et al. 2021) where it has the transform, per scan: it blurs
# and coarsens half the channels of a chosen sample. Elastic, bias and ghosts are as rare as its rare ones.
PRESETS: dict[str, AugmentSpec | None] = {
    "none": None,
    "light": AugmentSpec(affine=0.2, intensity=0.15),
    "full": AugmentSpec(affine=0.3, elastic=0.2, intensity=0.2, bias=0.2, blur=0.1, low_res=0.125, ghost=0.1),
}


def augment_spec(value: str | Mapping[str, Any] | None) -> AugmentSpec | None:
    """What ``data.augment`` of a configuration says; None: no augmentation.

    Args:
        value: None, the name of a preset, or a mapping of AugmentSpec's names. In a mapping ``preset`` names what the
            other keys change; without it they change the defaults of AugmentSpec, which has no artefact but
            gain, offset, gamma and noise. ``torchio`` maps names of transforms to their arguments.

    Raises:
        ConfigError: for an unknown preset or key, or a value out of range.
    """
    if value is None or (not isinstance(value, str) and not value):
        return None
    values = {"preset": value} if isinstance(value, str) else dict(value)
    start: AugmentSpec | None = AugmentSpec()
    if "preset" in values:
        preset = values.pop("preset")
        if preset not in PRESETS:
            raise ConfigError(f"augment={preset!r}: expected one of {', '.join(PRESETS)}, or a mapping")
        start = PRESETS[preset]
        if start is None and values:
            raise ConfigError("augment.preset='none' beside other keys: expected none of them, or another preset")
    known = [f.name for f in fields(AugmentSpec)]
    unknown = sorted(str(key) for key in set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown augment key {unknown[0]!r}, expected one of preset, {', '.join(known)}")
    if "torchio" in values:
        values |= {"torchio": transforms_of(values["torchio"])}  # type: ignore[arg-type]
    return None if start is None else replace(start, **values)


def render(batch: Batch, looks: LookSpec, patch_vox: Sequence[int], seed: int) -> Batch:
    """Windows (data/windows.py) cut into two views, and rendered where they are to be; other batches as they are."""
    return batch if batch.tissue is None else render_views(batch, RENDERED_FAMILIES, looks, patch_vox, seed)


# ---- what will happen ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hits:
    """The rows an artefact strikes and a value for each of them."""

    rows: tuple[int, ...]
    values: Any


@dataclass(frozen=True)
class Draw:
    """What will happen to a batch; on the CPU.

    Attributes:
        flipped: samples that are mirrored and nothing else, which needs no interpolation.
        warped: samples that are resampled.
        theta: [W, 3, 4] their sampling matrices in grid_sample's coordinates, mirroring included.
        elastic: [W, 3, c, c, c] spline coefficients of their displacements in those coordinates; None if none bends.
        scans: rows of the scans that get artefacts, of all images (sample by sample, channel by channel), then all
            partners.
        hits: for each of ARTEFACTS that occurs the rows it strikes, counted within ``scans``.
        torchio: what TorchIO does after that; None: nothing.
    """

    flipped: tuple[int, ...] = ()
    warped: tuple[int, ...] = ()
    theta: Tensor | None = None
    elastic: Tensor | None = None
    scans: tuple[int, ...] = ()
    hits: Mapping[str, Hits] | None = None
    torchio: TorchIODraw | None = None


def draw(batch: Batch, spec: AugmentSpec, seed: int) -> Draw:
    """The decisions for a batch, on the CPU, a function of (seed, sample number, spec).

    The same uniform numbers are drawn whatever the spec says, so that changing one artefact leaves the others as they
    were. Reads the sample numbers from the batch's device: do it first in a step, when nothing is queued there.
    """
    numbers = batch.sample.tolist()
    channels = batch.image.shape[1]
    partners = 0 if batch.partner is None else batch.partner.shape[1]
    shape_vox = tuple(batch.image.shape[2:])
    flipped, warped, thetas, bends = [], [], [], []
    struck: dict[int, dict[str, Any]] = {}
    for b, number in enumerate(numbers):
        flip, theta, bend = _draw_space(seeds.stream(seed, "augment.space", number), spec, shape_vox)
        if theta is not None:
            warped.append(b)
            thetas.append(theta)
            bends.append(bend)
        elif flip:
            flipped.append(b)
        uniform = seeds.stream(seed, "augment.scan", number).random((channels + partners, len(ARTEFACTS), 4))
        for scan in range(channels + partners):
            row = b * channels + scan
            if scan >= channels:
                row = len(numbers) * channels + b * partners + scan - channels
            found = {
                name: _draw_value(name, u[1:], spec, shape_vox, (seed, number, scan))
                for name, u in zip(ARTEFACTS, uniform[scan], strict=True)
                if u[0] < spec.probability(name)
            }
            if found:
                struck[row] = found
    scans = tuple(sorted(struck))
    hits = {}
    for name in ARTEFACTS:
        local = tuple(i for i, row in enumerate(scans) if name in struck[row])
        if local:
            hits[name] = Hits(local, _stacked([struck[scans[i]][name] for i in local]))
    return Draw(
        flipped=tuple(flipped),
        warped=tuple(warped),
        theta=torch.from_numpy(np.stack(thetas).astype(np.float32)) if thetas else None,
        elastic=torch.from_numpy(np.stack(bends).astype(np.float32)) if any(b.any() for b in bends) else None,
        scans=scans,
        hits=hits,
        torchio=torchio_draw(spec.torchio, numbers, seed),
    )


def _stacked(values: list[Any]) -> Any:
    numeric = isinstance(values[0], (float, np.ndarray))
    return torch.from_numpy(np.stack(values).astype(np.float32)) if numeric else values


def _draw_space(
    rng: np.random.Generator, spec: AugmentSpec, shape_vox: tuple[int, ...]
) -> tuple[bool, np.ndarray | None, np.ndarray]:
    """Whether to mirror; the matrix [3, 4] if anything must be interpolated; spline coefficients [3, c, c, c].

    The matrix is in grid_sample's order (Z, Y, X of our axes), rotation and scale being the same in voxels of all axes.
    """
    use_flip, use_affine, use_elastic = rng.random(3) < (spec.flip, spec.affine, spec.elastic)
    angles = rng.uniform(-1, 1, 3) * math.radians(spec.rotate_deg)
    scales = 1 + rng.uniform(-1, 1, 3) * spec.scale
    # In grid_sample's coordinates a cell is 2 / _ELASTIC_CELLS long on every axis.
    largest = spec.elastic_strength * INJECTIVE * 2 / _ELASTIC_CELLS * use_elastic
    bend = largest * rng.uniform(-1, 1, (3, *[_ELASTIC_CELLS + 3] * 3))
    matrix = np.eye(3)
    if use_affine:
        for axis, angle in enumerate(angles):
            i, j = [a for a in range(3) if a != axis]
            turn = np.eye(3)
            turn[i, i] = turn[j, j] = math.cos(angle)
            turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        matrix = matrix @ np.diag(scales)
    if not bend.any() and np.array_equal(matrix, np.eye(3)):
        return bool(use_flip), None, bend
    if use_flip:
        matrix = matrix @ np.diag([-1.0, 1.0, 1.0])
    half = np.array(shape_vox, float) / 2  # grid_sample counts in half edges, which differ where the patch is no cube
    matrix = matrix * half[None, :] / half[:, None]
    return bool(use_flip), np.concatenate([matrix[::-1, ::-1], np.zeros((3, 1))], axis=1), bend


def _draw_value(
    artefact: str, u: np.ndarray, spec: AugmentSpec, shape_vox: tuple[int, ...], key: tuple[int, int, int]
) -> Any:
    """What a scan gets: a number, an array, or something for the artefact's function to read.

    Args:
        u: three uniform numbers.
        key: seed, sample number and scan, for artefacts that need more numbers than three.
    """
    seed, number, scan = key
    if artefact == "gain":
        return float(spec.gain_factor ** (2 * u[0] - 1))
    if artefact == "offset":
        return float(spec.offset_std * (2 * u[0] - 1))
    if artefact == "gamma":
        return float(spec.gamma_power ** (2 * u[0] - 1))
    if artefact == "noise":
        return float(spec.noise_std * u[0]), int(seeds.stream(seed, "augment.noise", number, scan).integers(2**62))
    if artefact == "bias":
        normal = seeds.stream(seed, "augment.bias", number, scan).standard_normal([_BIAS_CELLS + 3] * 3)
        return spec.bias_log * np.clip(0.5 * normal, -1, 1)
    if artefact == "blur":
        return float(spec.blur_vox * u[0])
    if artefact == "low_res":
        if u[0] < 1 / 3:
            return (math.sqrt(spec.low_res_factor) ** float(u[1]),) * 3
        thick = int(3 * u[2])
        return tuple(spec.low_res_factor ** float(u[1]) if axis == thick else 1.0 for axis in range(3))
    if artefact == "ghost":
        axis = int(3 * u[0])
        copies = 2 + int(3 * u[1])
        return float(spec.ghost_share * u[2]), axis, max(1, round(shape_vox[axis] / copies))
    return 0.0  # inversion has no strength


# ---- doing it --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def apply(batch: Batch, drawn: Draw) -> Batch:
    """The batch as drawn: one resampling for all that belongs to a sample, then the artefacts of each scan, then what
    TorchIO does.

    Samples and scans that are not struck come back bit by bit as they were, and the batch itself where none is.
    Voxels keep their dtype; the arithmetic is float32, under autocast too. Absent contrasts stay 0.
    """
    batch = _applied(batch, drawn)
    return batch if drawn.torchio is None else transformed(batch, drawn.torchio)


def _applied(batch: Batch, drawn: Draw) -> Batch:
    if not (drawn.flipped or drawn.warped or drawn.scans):
        return batch
    with torch.autocast(batch.image.device.type, enabled=False):
        changed = _moved(batch, drawn) if drawn.flipped or drawn.warped else {}
        if drawn.scans:
            parts = [changed.get(name, getattr(batch, name)) for name in SCANS]
            there = [part for part in parts if part is not None]
            rows = _with_artefacts(torch.cat([part.flatten(0, 1) for part in there]), drawn)
            counts = [part.shape[0] * part.shape[1] for part in there]
            for name, part, new in zip(SCANS, there, rows.split(counts)):
                changed[name] = new.view(part.shape)
            if batch.present is not None:
                absent = ~batch.present.to(batch.image.device)
                changed["image"] = changed["image"].masked_fill(absent[:, :, None, None, None], 0)
    return replace(batch, **changed)


def _rows(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers).to(device, non_blocking=True)


def _moved(batch: Batch, drawn: Draw) -> dict[str, Tensor]:
    """The spatial fields that are there, mirrored or resampled where their sample is."""
    device = batch.image.device
    values = {name: getattr(batch, name).clone() for name in (*SCANS, *LABELS) if getattr(batch, name) is not None}
    if drawn.flipped:
        rows = _rows(drawn.flipped, device)
        for value in values.values():
            value.index_copy_(0, rows, value.index_select(0, rows).flip(-3))
    if drawn.theta is not None:
        rows = _rows(drawn.warped, device)
        grid = _grid(drawn.theta.to(device, non_blocking=True), drawn.elastic, tuple(batch.image.shape[2:]))
        old = {name: value.index_select(0, rows) for name, value in values.items()}
        scans = [name for name in SCANS if name in values]
        stacked = torch.cat([old[name].float() for name in scans], dim=1)
        new = F.grid_sample(stacked, grid, padding_mode="border", align_corners=False)
        for name, part in zip(scans, new.split([old[name].shape[1] for name in scans], dim=1)):
            values[name].index_copy_(0, rows, part.to(values[name].dtype))
        for name, fill in LABELS.items():
            if name in values:  # float32 holds whole numbers up to 2^24; outside the patch grid_sample gives 0
                above = old[name][:, None].float() - fill
                nearest = F.grid_sample(above, grid, mode="nearest", align_corners=False)[:, 0] + fill
                values[name].index_copy_(0, rows, nearest.round().to(values[name].dtype))
    return values


def _grid(theta: Tensor, elastic: Tensor | None, shape_vox: tuple[int, ...]) -> Tensor:
    """[W, X, Y, Z, 3] where each voxel is sampled: first bent, then turned, scaled and mirrored.

    A sum over the axes: affine_grid takes a matrix product, which a GPU may round to three digits.
    """
    places = [(2 * torch.arange(n, device=theta.device) + 1) / n - 1 for n in shape_vox]
    x, y, z = (place[None, :, None] * theta[:, None, :, 2 - axis] for axis, place in enumerate(places))
    grid = (x + theta[:, None, :, 3])[:, :, None, None] + y[:, None, :, None] + z[:, None, None]
    if elastic is None:
        return grid
    bent = _spline_field(elastic.to(theta.device, non_blocking=True), shape_vox)
    return grid + torch.einsum("wij,wjxyz->wxyzi", theta[:, :, :3], bent)


@lru_cache(maxsize=64)
def _splines(length: int, cells: int) -> Tensor:
    """[length, cells + 3] float32 values of the cubic B-splines at the voxels' centres; every row sums to 1."""
    position = (np.arange(length) + 0.5) / length * cells
    cell = position.astype(int)
    t = position - cell
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    basis = np.zeros((length, cells + 3), dtype=np.float32)
    for offset in range(4):
        basis[np.arange(length), cell + offset] = weights[offset]
    return torch.from_numpy(basis)


def _spline_field(coefficients: Tensor, shape_vox: tuple[int, ...]) -> Tensor:
    """[..., c, c, c] spline coefficients to [..., X, Y, Z]."""
    cells = coefficients.shape[-1] - 3
    x, y, z = (_splines(n, cells).to(coefficients.device, non_blocking=True) for n in shape_vox)
    return torch.einsum("...abc,xa,yb,zc->...xyz", coefficients, x, y, z)


def _with_artefacts(scans: Tensor, drawn: Draw) -> Tensor:
    """[N, X, Y, Z] scans, of which those that have artefacts are replaced in place."""
    everything = len(drawn.scans) == len(scans)
    rows = None if everything else _rows(drawn.scans, scans.device)
    struck = (scans if rows is None else scans.index_select(0, rows)).float()
    floor = struck.amin(dim=(1, 2, 3), keepdim=True)
    height = struck - floor
    near = _ON_FLOOR * height.amax(dim=(1, 2, 3), keepdim=True)
    gain, offset = torch.ones_like(floor), torch.zeros_like(floor)
    for name, hits in (drawn.hits or {}).items():
        index = _rows(hits.rows, scans.device)
        values = hits.values
        if isinstance(values, Tensor):
            values = values.to(scans.device, non_blocking=True)
        if name == "gain":
            gain.view(-1).index_copy_(0, index, values)
        elif name == "offset":
            offset.view(-1).index_copy_(0, index, values)
        else:
            new = _FUNCTIONS[name](height.index_select(0, index), values, near.index_select(0, index))
            height.index_copy_(0, index, new)
    result = (height + floor).mul_(gain).add_(offset).to(scans.dtype)
    return result if rows is None else scans.index_copy_(0, rows, result)


def _invert(height: Tensor, _: Tensor, near: Tensor) -> Tensor:
    return torch.where(height > near, height.amax(dim=(1, 2, 3), keepdim=True) - height, 0)


def _gamma(height: Tensor, power: Tensor, _: Tensor) -> Tensor:
    """Over the patch's range, whose ends stay."""
    width = height.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-5)
    return (height / width) ** power.view(-1, 1, 1, 1) * width


def _bias(height: Tensor, coefficients: Tensor, _: Tensor) -> Tensor:
    return height * torch.exp(_spline_field(coefficients, tuple(height.shape[1:])))


def _blur(height: Tensor, sigma_vox: Tensor, _: Tensor) -> Tensor:
    """Gaussian, each row with its own width, one matrix product an axis; at borders the weights inside count."""
    for axis in range(3):
        place = torch.arange(height.shape[1 + axis], device=height.device, dtype=torch.float32)
        apart = (place[:, None] - place) / sigma_vox.clamp_min(1e-3).view(-1, 1, 1)
        weights = torch.softmax(-0.5 * apart**2, dim=-1)
        weights = torch.where(weights < 1e-7, 0, weights)  # denormal tails would slow a CPU down several times
        height = _along(height, weights, axis)
    return height


def _low_res(height: Tensor, factors: Sequence[tuple[float, float, float]], _: Tensor) -> Tensor:
    for axis in range(3):
        rows = [r for r, factor in enumerate(factors) if factor[axis] > 1]
        if rows:
            length = height.shape[1 + axis]
            matrices = torch.stack([_coarse_matrix(length, max(1, round(length / factors[r][axis]))) for r in rows])
            index = _rows(rows, height.device)
            part = height.index_select(0, index)
            height.index_copy_(0, index, _along(part, matrices.to(height.device, non_blocking=True), axis))
    return height


@lru_cache(maxsize=512)
def _coarse_matrix(length: int, coarse: int) -> Tensor:
    """[L, L] float32: means over ``coarse`` slices of equal thickness, then linear between the middles of slices."""
    thickness = length / coarse
    low, high = np.arange(coarse)[:, None] * thickness, np.arange(1, coarse + 1)[:, None] * thickness
    voxel = np.arange(length)[None, :]
    mean = np.clip(np.minimum(high, voxel + 1) - np.maximum(low, voxel), 0, None) / thickness
    place = np.clip((np.arange(length) + 0.5) / thickness - 0.5, 0, coarse - 1)
    before = np.minimum(place.astype(int), max(coarse - 2, 0))
    back = np.zeros((length, coarse))
    back[np.arange(length), np.minimum(before + 1, coarse - 1)] = place - before
    back[np.arange(length), before] += 1 - (place - before)
    return torch.from_numpy((back @ mean).astype(np.float32))


def _along(scans: Tensor, matrices: Tensor, axis: int) -> Tensor:
    """[R, X, Y, Z] scans, each multiplied by its own [L, L] matrix along an axis."""
    r, x, y, z = scans.shape
    if axis == 0:
        return torch.bmm(matrices, scans.reshape(r, x, y * z)).view(r, x, y, z)
    if axis == 1:
        each = matrices[:, None].expand(r, x, y, y).reshape(r * x, y, y)
        return torch.bmm(each, scans.reshape(r * x, y, z)).view(r, x, y, z)
    return torch.bmm(scans.reshape(r, x * y, z), matrices.mT).view(r, x, y, z)


def _ghost(height: Tensor, values: Sequence[tuple[float, int, int]], near: Tensor) -> Tensor:
    """Part of the signal appears moved along an axis by a fraction of the patch, either way and round its end."""
    ghosted = []
    for row, (share, axis, shift_vox) in zip(height, values):
        copies = torch.roll(row, shift_vox, axis) + torch.roll(row, -shift_vox, axis)
        ghosted.append((1 - share) * row + share / 2 * copies)
    return torch.where(height > near, torch.stack(ghosted), height)


def _noise(height: Tensor, values: Sequence[tuple[float, int]], near: Tensor) -> Tensor:
    """Rician: the magnitude of the signal with normal noise in both channels."""
    noisy = []
    for row, (std, seed) in zip(height, values):
        generator = torch.Generator(device=height.device).manual_seed(seed)
        real, imaginary = std * torch.randn((2, *row.shape), generator=generator, device=height.device)
        noisy.append(torch.hypot(row + real, imaginary))
    return torch.where(height > near, torch.stack(noisy), height)


# (height above the floor [R, X, Y, Z], values, height below which a voxel lies on the floor [R, 1, 1, 1]) -> height
_FUNCTIONS: dict[str, Callable[[Tensor, Any, Tensor], Tensor]] = {
    "invert": _invert,
    "gamma": _gamma,
    "bias": _bias,
    "blur": _blur,
    "low_res": _low_res,
    "ghost": _ghost,
    "noise": _noise,
}
