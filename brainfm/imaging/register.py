"""Rigid registration of two scans of one head, whatever their contrasts, and a judgement of the result.

Scans of a visit lie where their headers say, and patients move between them; visits of a subject share no coordinates
at all but by chance. The optimiser is SimpleITK's (Mattes mutual information, coarse to fine, one thread, fixed
samples), so the same two scans give the same answer. Whether the answer is taken is decided by a score of our own.

The last steps and the score look at the inside of the head alone, 16 mm below its surface: scalp, neck and the edge of
the head differ between contrasts and pull the whole head, on real T1, T2 and FLAIR, 1 to 2 mm off the brain's position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import scipy.ndimage

from brainfm import seeds
from brainfm.extras import missing
from brainfm.imaging import geometry, intensity
from brainfm.imaging.intensity import Stats
from brainfm.volume import Volume

FARTHEST_MM, MOST_TURNED_DEG = 60.0, 45.0
_NEVER_MIND_MM = 0.2  # a shorter motion is within the error of the method: better no motion at all
_WORK_MM = 2.0  # both scans are brought to this spacing, thin slices and thick ones alike
_SCORE_POINTS, _BINS = 40_000, 32
_SEARCH_POINTS = 6_000
_APART_MM = 10.0  # heads whose centres are further apart are tried on top of each other as well
_TURNS_DEG = (-15.0, 15.0)
# Levels of the optimiser: the grid thinned by, smoothed by (mm), points looked at.
_COARSE = ((4, 4.0, 10_000),)
# Twice over: the steps shorten at every turn of the way, at times before a slow turn of a round head is done.
_FINE = ((2, 2.0, 20_000), (1, 0.0, 40_000), (2, 2.0, 20_000), (1, 0.0, 40_000))
_DEPTH_MM = 16.0  # below the surface of the head begins its inside
_LEAST_INSIDE = 0.25  # of the head, however small it is
_BELOW_TOP_MM = 150.0  # and there it ends: what follows is neck
_STARTS = 3  # of those looked at, as many are followed
_LEAST_GAIN = 0.02  # of the score above 1: less is noise, and no reason to move a scan
_LEAST_OVERLAP = 0.4  # of the smaller head
_PEAK_MM = 16.0  # a position is one if the score falls when the head is shifted by this much
_LEAST_PEAK = 0.012  # and by this much at least


@dataclass(frozen=True)
class Alignment:
    """Where one scan belongs on another, and how sure that is.

    Attributes:
        matrix_mm: [4, 4], takes the moving scan's scanner coordinates to the fixed one's; the identity where refused.
        score_before: normalised mutual information, 1 (nothing in common) to 2, at the header's position; 0 where
            the scans do not overlap there.
        score_after: the same at the position found, whether it was taken or not.
        moved_mm: how far the position found moves the centre of the head.
        turned_deg: and by which angle it turns it.
        refused: why the position found was not taken; empty where it was.
        trusted: whether at the final position the scans show the same head in the same place, as far as the score
            can tell.
    """

    matrix_mm: tuple[tuple[float, ...], ...]
    score_before: float
    score_after: float
    moved_mm: float
    turned_deg: float
    refused: str
    trusted: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "matrix_mm": [list(row) for row in self.matrix_mm]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**{**values, "matrix_mm": tuple(tuple(float(v) for v in row) for row in values["matrix_mm"])})


@dataclass(frozen=True)
class Head:
    """A scan made ready for registration, once for all the scans that are compared with it.

    Attributes:
        voxels: float32 [X, Y, Z] in 0..1, on axes parallel to the scan's, 2 mm apart.
        affine_mm: [4, 4].
        mask: bool [X, Y, Z], the patient.
        inside: bool [X, Y, Z], the part of it that is judged.
        centre_mm: [3], of the mask.
    """

    voxels: np.ndarray
    affine_mm: np.ndarray
    mask: np.ndarray
    inside: np.ndarray
    centre_mm: np.ndarray

    @classmethod
    def of(cls, volume: Volume, mask: np.ndarray | None = None, stats: Stats | None = None) -> Self:
        """Args: mask, stats: where they are known already. Raises: ScanError as `foreground` and `statistics`."""
        mask = intensity.foreground(volume) if mask is None else mask
        stats = intensity.statistics(volume.voxels, mask, (0.5, 99.5)) if stats is None else stats
        grid = geometry.lattice(volume.affine_mm, (_WORK_MM,) * 3)
        shape, affine, _ = geometry.session_grid({"scan": volume}, grid)
        voxels = geometry.resample(volume.voxels, volume.affine_mm, shape, affine, order="cubic", fill=stats.low)
        # Where the background is dark the lowest percentile of the head lies above it: keep the outline.
        low = min(stats.low, float(np.percentile(voxels, 1)))
        voxels = np.clip((voxels - low) / (stats.high - low), 0, 1).astype(np.float32)
        share = geometry.resample(mask.astype(np.float32), volume.affine_mm, shape, affine, order="linear", fill=0)
        head = share > min(0.5, float(share.max()) / 2)
        centre = affine[:3, :3] @ np.argwhere(head).mean(axis=0) + affine[:3, 3]
        return cls(voxels, affine, head, _inside(head), centre)


def _inside(mask: np.ndarray) -> np.ndarray:
    """The part of a head that lies deep below its surface and the edges of the field of view."""
    solid = scipy.ndimage.binary_closing(np.pad(mask, 3, mode="edge"), iterations=2)[3:-3, 3:-3, 3:-3]
    for axis in range(3):  # dark ventricles, also in a slab that is open above and below
        planes = [scipy.ndimage.binary_fill_holes(plane) for plane in np.moveaxis(solid, axis, 0)]
        solid = np.moveaxis(np.stack(planes), 0, axis)
    depth = scipy.ndimage.distance_transform_edt(np.pad(solid, 1), sampling=_WORK_MM)[1:-1, 1:-1, 1:-1]
    top = int(np.flatnonzero(solid.any(axis=(0, 1)))[-1])
    depth[:, :, : max(0, top - int(_BELOW_TOP_MM / _WORK_MM))] = 0
    return depth > min(_DEPTH_MM, float(np.quantile(depth[depth > 0], 1 - _LEAST_INSIDE)) * 0.999)


def rigid(fixed: Head, moving: Head, farthest_mm: float = FARTHEST_MM) -> Alignment:
    """Where the moving scan belongs on the fixed one.

    The search starts at the header's position, also with the centres of both heads on top of each other where these
    are far apart, each also turned a little; the best starts are followed to their end and the best end is judged.
    It is refused where it scores no better, but for noise, than the header's position, where the heads hardly overlap,
    or where it is implausibly far: more than 45 degrees or `farthest_mm`, unless the headers' positions have nothing in
    common.

    Args:
        fixed, moving: of one person; another person's head may be found to fit as well.
        farthest_mm: for the centre of the head.

    Raises:
        ConfigError: SimpleITK is not installed.
    """
    simpleitk = require()
    points = _points(fixed, _SEARCH_POINTS)
    apart = _overlap(fixed, moving, np.eye(4)) == 0
    starts = _starts(fixed, moving, apart)
    ranked = sorted(starts, key=lambda start: -_score(fixed, moving, start, points))
    chosen = [start for start in starts[:1] if not apart]
    chosen += [start for start in ranked if not any(start is other for other in chosen)][: _STARTS - len(chosen)]
    images = _image(simpleitk, fixed, fixed.voxels), _image(simpleitk, moving, moving.voxels)
    ends = [_optimise(simpleitk, *images, None, fixed, start, _COARSE) for start in chosen]
    end = max(ends, key=lambda end: _score(fixed, moving, end, points))
    inside = _image(simpleitk, fixed, fixed.inside.astype(np.uint8))
    end = _optimise(simpleitk, *images, inside, fixed, end, _FINE)
    return _judged(fixed, moving, end, apart, farthest_mm)


def score(fixed: Head, moving: Head, matrix_mm: np.ndarray) -> float:
    """Normalised mutual information of two scans, the moving one placed by `matrix_mm`.

    Source: Studholme et al. 1999, An overlap invariant entropy measure of 3D medical image alignment, eq. 7.

    Returns:
        (H(A) + H(B)) / H(A, B) over 40,000 points inside the fixed head, those of them that lie in both fields of view,
        with 32 bins each: 1 to 2, or 0 where fewer than a twentieth do.
    """
    return _score(fixed, moving, matrix_mm, _points(fixed, _SCORE_POINTS))


# ---- judgement -------------------------------------------------------------------------------------------------------


def _judged(fixed: Head, moving: Head, end: np.ndarray, apart: bool, farthest_mm: float) -> Alignment:
    before, after = score(fixed, moving, np.eye(4)), score(fixed, moving, end)
    centre = moving.centre_mm
    moved = float(np.linalg.norm(end[:3, :3] @ centre + end[:3, 3] - centre))
    turned = float(np.rad2deg(np.arccos(np.clip((np.trace(end[:3, :3]) - 1) / 2, -1, 1))))
    overlap = _overlap(fixed, moving, end)
    corners = np.argwhere(moving.mask)[:: max(1, moving.mask.sum() // 500)] @ moving.affine_mm[:3, :3].T
    corners += moving.affine_mm[:3, 3]
    most = float(np.linalg.norm(corners @ end[:3, :3].T + end[:3, 3] - corners, axis=1).max())
    refused = ""
    if overlap < min(_LEAST_OVERLAP, 0.5 * _overlap(fixed, moving, np.eye(4)) if not apart else 1.0):
        refused = f"only {overlap:.0%} of the smaller head would lie in the other scan"
    elif after - before <= _LEAST_GAIN * max(before - 1, 0):
        refused = f"the position found scores {after:.4f}, not above the header's {before:.4f} by more than noise"
    elif turned > MOST_TURNED_DEG or (moved > farthest_mm and not apart):
        refused = f"it would move the head by {moved:.0f} mm and turn it by {turned:.0f} degrees"
    elif most < _NEVER_MIND_MM:
        refused = f"no part of the head would move by more than {most:.2f} mm"
    elif not _is_peak(fixed, moving, end, after):
        refused = f"the score {after:.4f} is hardly better there than {_PEAK_MM:.0f} mm beside"
    matrix = np.eye(4) if refused else end
    trusted = not refused or (not apart and before > 0 and _is_peak(fixed, moving, np.eye(4), before))
    return Alignment(tuple(map(tuple, matrix.tolist())), before, after, moved, turned, refused, trusted)


def _is_peak(fixed: Head, moving: Head, matrix: np.ndarray, here: float) -> bool:
    return peak(fixed, moving, matrix, here) >= _LEAST_PEAK


def peak(fixed: Head, moving: Head, matrix: np.ndarray, here: float) -> float:
    """By how much the score falls, at least, when the head is shifted along any axis."""
    shifts = [sign * _PEAK_MM * np.eye(3)[axis] for axis in range(3) for sign in (-1, 1)]
    points = _points(fixed, _SCORE_POINTS)
    return min(here - _score(fixed, moving, _shifted(matrix, shift), points) for shift in shifts)


def _overlap(fixed: Head, moving: Head, matrix: np.ndarray) -> float:
    """Share of the smaller head that lies in the other scan's field of view."""

    def inside(one: Head, other: Head, placed: np.ndarray) -> float:
        places = np.argwhere(one.mask)[:: max(1, one.mask.sum() // 4000)]
        transform = np.linalg.inv(other.affine_mm) @ placed @ one.affine_mm
        index = places @ transform[:3, :3].T + transform[:3, 3]
        return float(((index > -0.5) & (index < np.array(other.mask.shape) - 0.5)).all(axis=1).mean())

    back = np.linalg.inv(matrix)
    volume = fixed.mask.sum(), moving.mask.sum()
    shared = max(inside(fixed, moving, back) * volume[0], inside(moving, fixed, matrix) * volume[1])
    return float(min(1.0, shared / min(volume)))


# ---- score -----------------------------------------------------------------------------------------------------------


def _points(fixed: Head, count: int) -> np.ndarray:
    """[N, 3] voxels inside the fixed head, the same at every call."""
    places = np.flatnonzero(fixed.inside)
    chosen = seeds.stream(0, "registration score").choice(places, count)
    return np.stack(np.unravel_index(chosen, fixed.inside.shape), axis=1)


def _score(fixed: Head, moving: Head, matrix: np.ndarray, points: np.ndarray) -> float:
    transform = np.linalg.inv(moving.affine_mm) @ np.linalg.inv(matrix) @ fixed.affine_mm
    index = points @ transform[:3, :3].T + transform[:3, 3]
    inside = ((index > -0.5) & (index < np.array(moving.voxels.shape) - 0.5)).all(axis=1)
    if inside.sum() < len(points) / 20:
        return 0.0
    ours = fixed.voxels[tuple(points[inside].T)]
    theirs = scipy.ndimage.map_coordinates(moving.voxels, index[inside].T, order=1, mode="nearest")
    pair = np.minimum((ours * _BINS).astype(int), _BINS - 1) * _BINS
    pair += np.minimum((theirs * _BINS).astype(int), _BINS - 1)
    joint = np.bincount(pair, minlength=_BINS**2).reshape(_BINS, _BINS) / len(pair)
    together = _entropy(joint.ravel())
    return (_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1))) / together if together > 0 else 0.0


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


# ---- search ----------------------------------------------------------------------------------------------------------


def _starts(fixed: Head, moving: Head, apart: bool) -> list[np.ndarray]:
    """Positions to begin at, the header's first."""
    away = fixed.centre_mm - moving.centre_mm
    shifts = [np.zeros(3)]
    if apart:
        shifts = [away]
    elif np.linalg.norm(away) > _APART_MM:
        shifts.append(away)
    turns = [np.zeros(3), *(turn * np.eye(3)[axis] for axis, turn in itertools.product(range(3), _TURNS_DEG))]
    return [_placed(moving.centre_mm, turn, shift) for shift, turn in itertools.product(shifts, turns)]


def _placed(centre_mm: np.ndarray, turn_deg: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    """[4, 4]: turned about a point, then shifted."""
    from scipy.spatial.transform import Rotation

    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()
    matrix[:3, 3] = centre_mm - matrix[:3, :3] @ centre_mm + shift_mm
    return matrix


def _shifted(matrix: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    moved = matrix.copy()
    moved[:3, 3] += shift_mm
    return moved


def _optimise(
    simpleitk: Any,
    fixed: Any,
    moving: Any,
    inside: Any | None,
    head: Head,
    start: np.ndarray,
    levels: tuple[tuple[int, float, int], ...],
) -> np.ndarray:
    """The nearest best position, [4, 4] moving to fixed; the images lie in RAS+ coordinates.

    Args:
        inside: the fixed image's voxels that count; None: all.
        head: the fixed image.
        levels: as _COARSE, coarse to fine.
    """
    # SimpleITK's transforms take points of the fixed image to the moving one.
    inverse = np.linalg.inv(start)
    transform = simpleitk.Euler3DTransform()
    centre = head.centre_mm
    transform.SetCenter(centre.tolist())
    transform.SetMatrix(_orthogonal(inverse[:3, :3]).ravel().tolist(), 1e-6)
    transform.SetTranslation((inverse[:3, :3] @ centre + inverse[:3, 3] - centre).tolist())
    method = simpleitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(_BINS)
    method.SetMetricSamplingStrategy(method.REGULAR)
    if inside is not None:
        method.SetMetricFixedMask(inside)
    counted = head.voxels.size if inside is None else np.count_nonzero(head.inside)
    shares = [min(1.0, points * shrink**3 / counted) for shrink, _, points in levels]
    method.SetMetricSamplingPercentagePerLevel(shares, 1)
    method.SetInterpolator(simpleitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.01, numberOfIterations=80, relaxationFactor=0.6, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([shrink for shrink, _, _ in levels])
    method.SetSmoothingSigmasPerLevel([sigma for _, sigma, _ in levels])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(transform, inPlace=True)
    try:
        with _one_thread(simpleitk):
            method.Execute(fixed, moving)
    except RuntimeError:  # "all samples map outside the moving image": this start leads nowhere
        return start
    rotation = np.array(transform.GetMatrix()).reshape(3, 3)
    found = np.eye(4)
    found[:3, :3] = rotation
    found[:3, 3] = np.array(transform.GetTranslation()) + centre - rotation @ centre
    return np.linalg.inv(found)


def _orthogonal(matrix: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(matrix)
    return u @ vt


def _image(simpleitk: Any, head: Head, voxels: np.ndarray) -> Any:
    """An image whose physical space is ours, RAS+: SimpleITK need not know what its axes are called."""
    image = simpleitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    spacing = np.linalg.norm(head.affine_mm[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(head.affine_mm[:3, 3].tolist())
    image.SetDirection((head.affine_mm[:3, :3] / spacing).ravel().tolist())
    return image


def require() -> Any:
    """SimpleITK. Raises: ConfigError where it is not installed."""
    try:
        import SimpleITK
    except ImportError:
        raise missing("SimpleITK", "preprocess.align=rigid") from None
    return SimpleITK


@contextmanager
def _one_thread(simpleitk: Any) -> Iterator[None]:
    """The filters inside a registration ask for threads of their own, and sums depend on how work is divided."""
    before = simpleitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    simpleitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        simpleitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)
