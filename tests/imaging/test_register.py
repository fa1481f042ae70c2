"""Registration: known motions are found, positions that are none are refused, the same input gives the same answer."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from brainfm.errors import ConfigError
from brainfm.imaging import nifti, register
from brainfm.imaging.register import Alignment, Head
from brainfm.volume import Volume
from tests.phantoms import centred

pytest.importorskip("SimpleITK")

SIZE_MM = np.array([64.0, 78.0, 60.0])


def tissue(points_mm: np.ndarray) -> np.ndarray:
    """Which of four tissues lies at points [..., 3]: a head without any symmetry."""
    x, y, z = np.moveaxis(points_mm, -1, 0)
    folds = 7 * np.sin(x / 7) * np.cos(y / 9 + 1) * np.sin(z / 8)
    radius = np.sqrt((points_mm / (SIZE_MM + 0)) ** 2 @ np.ones(3)) * 66 + folds
    label = np.select([radius < 34, radius < 50, radius < 62], [3, 2, 1], 0)
    for centre, size, value in (((-14, 12, 4), 9, 1), ((10, -20, 12), 12, 2), ((6, 30, -16), 7, 1)):
        label[((points_mm - centre) ** 2).sum(axis=-1) < size**2] = value
    return label


def scan(
    spacing: tuple, contrast: tuple, motion: np.ndarray | None = None, seed: int = 0, size=(150, 180, 140)
) -> Volume:
    """The head after a motion [4, 4], around the scanner's origin; thick slices are averages."""
    shape = tuple(round(side / step) for side, step in zip(size, spacing))
    affine = centred(np.eye(3), spacing, shape)
    back = np.linalg.inv(np.eye(4) if motion is None else motion)
    voxels = np.zeros(shape)
    within = 2 if spacing[2] > 3 else 1
    for part in range(within):
        index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1).astype(float)
        index[..., 2] += (part + 0.5) / within - 0.5
        points = index @ affine[:3, :3].T + affine[:3, 3]
        voxels += np.array(contrast)[tissue(points @ back[:3, :3].T + back[:3, 3])] / within
    noise = np.random.default_rng(seed).normal(0, 2, shape)
    return Volume(np.abs(voxels + noise).astype(np.float32), affine)


def motion(turn_deg: tuple, shift_mm: tuple) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", turn_deg, degrees=True).as_matrix()
    matrix[:3, 3] = shift_mm
    return matrix


def error_mm(found: Alignment, truth: np.ndarray, head: Head) -> float:
    points = np.argwhere(head.mask)[::97] @ head.affine_mm[:3, :3].T + head.affine_mm[:3, 3]
    off = np.array(found.matrix_mm) - truth
    return float(np.linalg.norm(points @ off[:3, :3].T + off[:3, 3], axis=1).mean())


T1, T2, DWI = (0, 40, 70, 100), (0, 100, 62, 45), (0, 10, 60, 55)


@pytest.fixture(scope="module")
def fixed() -> Head:
    return Head.of(scan((2, 2, 2), T1))


@pytest.mark.parametrize(
    ("contrast", "spacing", "turn", "shift", "size"),
    [
        (DWI, (2, 2, 5), (-12, 3, 4), (-6, 14, 3), (150, 180, 140)),
        (T2, (2, 2, 4), (2, 5, -6), (3, 2, -4), (150, 180, 64)),
    ],
    ids=["thick slices", "a slab"],
)
def test_known_motions_are_found(
    fixed: Head, contrast: tuple, spacing: tuple, turn: tuple, shift: tuple, size: tuple
) -> None:
    truth = np.linalg.inv(motion(turn, shift))
    moving = Head.of(scan(spacing, contrast, motion(turn, shift), seed=1, size=size))
    found = register.rigid(fixed, moving)
    assert not found.refused and found.trusted and found.score_after > found.score_before
    assert error_mm(found, truth, moving) < 0.7
    expected = np.linalg.norm(truth[:3, :3] @ moving.centre_mm + truth[:3, 3] - moving.centre_mm)
    assert abs(found.moved_mm - expected) < 1
    assert abs(found.turned_deg - np.rad2deg(Rotation.from_matrix(truth[:3, :3]).magnitude())) < 1
    rotation = np.array(found.matrix_mm)[:3, :3]
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
    if size[2] < 100:  # once is enough
        assert register.rigid(fixed, moving) == found, "the same scans, the same answer"
        assert Alignment.from_dict(found.to_dict()) == found


def test_scans_that_lie_well_are_left_where_they_are(fixed: Head) -> None:
    found = register.rigid(fixed, Head.of(scan((2, 2, 2), T2, seed=1)))
    assert found.refused and found.trusted and found.matrix_mm == tuple(map(tuple, np.eye(4).tolist()))


def test_headers_that_have_nothing_in_common(fixed: Head) -> None:
    volume = scan((2, 2, 2), T2, motion((3, 0, 5), (0, 0, 0)), seed=1)
    away = np.eye(4)
    away[:3, 3] = 900, -40, 20
    moving = Head.of(Volume(volume.voxels, away @ volume.affine_mm))
    found = register.rigid(fixed, moving)
    assert found.score_before == 0 and found.trusted and not found.refused and found.moved_mm > 800
    assert error_mm(found, np.linalg.inv(away @ motion((3, 0, 5), (0, 0, 0))), moving) < 1


def test_implausible_motions_are_refused(fixed: Head) -> None:
    moving = Head.of(scan((2, 2, 2), T2, motion((0, 0, 0), (0, 30, 0)), seed=1))
    end = motion((0, 0, 0), (0, -30, 0))
    assert not register._judged(fixed, moving, end, False, 60).refused
    found = register._judged(fixed, moving, end, False, 20)
    assert "would move the head by 30 mm" in found.refused and np.array_equal(found.matrix_mm, np.eye(4))
    moving = Head.of(scan((2, 2, 2), T2, motion((0, 0, 50), (0, 0, 0)), seed=1))
    turned = register._judged(fixed, moving, motion((0, 0, -50), (0, 0, 0)), False, 60)
    assert "turn it by 50 degrees" in turned.refused


def test_judgement_refuses_what_got_worse_and_what_hardly_overlaps(fixed: Head) -> None:
    moving = Head.of(scan((2, 2, 2), T2, seed=1))
    worse = register._judged(fixed, moving, motion((0, 0, 0), (12, 0, 0)), False, 60)
    assert "the header's" in worse.refused and worse.trusted and worse.score_after < worse.score_before
    near = register._judged(fixed, moving, motion((0, 0, 0), (0.3, 0, 0)), False, 60)
    assert "by more than noise" in near.refused and near.trusted
    gone = register._judged(fixed, moving, motion((0, 0, 0), (0, 130, 0)), False, 60)
    assert "of the smaller head" in gone.refused and gone.matrix_mm == worse.matrix_mm


def test_the_score_is_normalised_mutual_information(fixed: Head) -> None:
    points = register._points(fixed, register._SCORE_POINTS)
    assert fixed.inside[tuple(points.T)].all()
    counts = np.zeros((32, 32))
    for value in fixed.voxels[tuple(points[:3000].T)]:  # a scan with itself: every entropy is the same one
        counts[min(int(value * 32), 31), min(int(value * 32), 31)] += 1
    assert register.score(fixed, fixed, np.eye(4)) == pytest.approx(2, abs=1e-6)
    other = replace(
        fixed, voxels=np.random.default_rng(0).permutation(fixed.voxels.ravel()).reshape(fixed.voxels.shape)
    )
    got = register._score(fixed, other, np.eye(4), points[:3000])
    ours, theirs = (head.voxels[tuple(points[:3000].T)] for head in (fixed, other))
    joint = {}
    for a, b in zip(ours, theirs):
        pair = min(int(a * 32), 31), min(int(b * 32), 31)
        joint[pair] = joint.get(pair, 0) + 1 / 3000
    entropy = [0.0, 0.0, -sum(p * np.log(p) for p in joint.values())]
    for side in (0, 1):
        for k in range(32):
            p = sum(share for pair, share in joint.items() if pair[side] == k)
            entropy[side] -= p * np.log(p) if p else 0
    assert got == pytest.approx((entropy[0] + entropy[1]) / entropy[2], abs=1e-4)
    assert counts.trace() == counts.sum() and register.score(fixed, fixed, motion((0, 0, 0), (900, 0, 0))) == 0


def test_without_simpleitk_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "SimpleITK":
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"align=rigid needs SimpleITK.*pip install 'brainfm-mri\[anatomy\]'$"):
        register.require()


def test_two_real_visits(data3d: Path) -> None:
    """Against the published transforms to the common space, composed: visit 2 to visit 1."""
    folder = data3d / "openms_long/patient01"
    to_common = []
    for visit in (1, 2):
        lines = (folder / f"study{visit}_FLAIR_to_common_space.txt").read_text().splitlines()
        numbers, centre = (np.array(line.split()[1:], dtype=float) for line in lines[3:5])
        matrix = np.eye(4)
        matrix[:3, :3] = numbers[:9].reshape(3, 3)
        matrix[:3, 3] = numbers[9:] + centre - matrix[:3, :3] @ centre
        flip = np.diag([-1.0, -1, 1, 1])
        to_common.append(flip @ matrix @ flip)  # points of the common space to the visit
    truth = to_common[0] @ np.linalg.inv(to_common[1])
    paths = [folder / f"study{visit}/patient01_study{visit}_FLAIR.nii.gz" for visit in (1, 2)]
    first, second = (Head.of(nifti.read(path)[0]) for path in paths)
    found = register.rigid(first, second, 150)
    identity = replace(found, matrix_mm=tuple(map(tuple, np.eye(4).tolist())))
    assert error_mm(identity, truth, second) > 5
    assert error_mm(found, truth, second) < 0.6
