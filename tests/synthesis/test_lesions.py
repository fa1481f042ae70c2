"""Lesions inserted into patches: where they may be, what they do to each contrast, and that nothing else changes."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import scipy.ndimage

from brainfm.data.manifest import CONTRASTS
from brainfm.errors import ManifestError, ScanError
from brainfm.imaging import nifti
from brainfm.seeds import stream
from brainfm.synthesis.lesions import Insertion, _blurred, _neighbourhood, draw_insertion, insert
from brainfm.synthesis.shapes import FEWEST_VOXELS, Shapes, load_shapes, procedural_shapes, resized

SIZE = (40, 36, 32)


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    return procedural_shapes(0, 60, 2.0)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A ball with a hole: brain around a ventricle."""
    x, y, z = np.mgrid[: SIZE[0], : SIZE[1], : SIZE[2]]
    radius = np.sqrt((x - 20) ** 2 + (y - 18) ** 2 + (z - 16) ** 2)
    return (radius < 16) & (radius > 5)


@pytest.fixture(scope="module")
def image(tissue: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(SIZE)
    return np.where(tissue, 0.5 + 0.3 * noise, -1.5).astype(np.float32)


def drawn(shapes: Shapes, tissue: np.ndarray, number: int) -> Insertion:
    insertion = draw_insertion(stream(0, "lesions", number), shapes, tissue, SIZE, 2.0)
    assert insertion is not None
    return insertion


def shift(image: np.ndarray, contrast: str, insertion: Insertion, tissue: np.ndarray) -> float:
    """Mean change within the lesions."""
    mask = insertion.mask(SIZE)
    return float((insert(image, contrast, insertion, tissue) - image)[mask].mean())


def test_all_randomness_is_in_the_drawing(shapes: Shapes, tissue: np.ndarray, image: np.ndarray) -> None:
    one, two, other = (drawn(shapes, tissue, n) for n in (0, 0, 1))
    before = image.copy()
    assert np.array_equal(one.mask(SIZE), two.mask(SIZE)) and not np.array_equal(one.mask(SIZE), other.mask(SIZE))
    assert np.array_equal(insert(image, "t1", one, tissue), insert(image, "t1", two, tissue))
    assert np.array_equal(image, before), "the caller's patch was changed"
    assert np.array_equal(insert(image.astype(np.float16), "t1", one, tissue) != image.astype(np.float16),
                          insert(image, "t1", one, tissue) != image)  # fmt: skip


@pytest.mark.parametrize("number", range(25))
def test_lesions_stay_on_tissue_and_change_nothing_else(
    shapes: Shapes, tissue: np.ndarray, image: np.ndarray, number: int
) -> None:
    insertion = drawn(shapes, tissue, number)
    mask = insertion.mask(SIZE)
    assert 1 <= len(insertion.lesions) <= 3
    assert all(lesion.inside.sum() >= FEWEST_VOXELS for lesion in insertion.lesions)
    assert not (mask & ~tissue).any() and mask.sum() < 0.5 * tissue.sum()
    result = insert(image, "flair", insertion, tissue)
    changed = result.view(np.uint32) != image.view(np.uint32)
    reach = scipy.ndimage.distance_transform_edt(~mask, sampling=2.0)
    assert reach[changed].max() <= 2.5 * 1.6 * np.sqrt(3) + 0.01  # mm: the widest rim, along a diagonal
    assert not (changed & ~_neighbourhood(tissue)).any(), "a lesion in air or deep in the ventricle"
    assert changed[mask].mean() > 0.99 and np.isfinite(result).all()


@pytest.mark.parametrize(
    ("contrast", "sign"),
    [("t2", 1), ("flair", 1), ("dwi", 1), ("pd", 1), ("t2s", 1), ("t1", -1), ("swi", -1)],
)
def test_signs(shapes: Shapes, tissue: np.ndarray, image: np.ndarray, contrast: str, sign: int) -> None:
    shifts = np.array([shift(image, contrast, drawn(shapes, tissue, n), tissue) for n in range(20)])
    assert np.all(sign * shifts > 0.03)
    assert 0.1 < np.median(np.abs(shifts)) < 1.0  # tissue here varies by 0.3


def test_one_subject_has_one_kind_of_lesion(shapes: Shapes, tissue: np.ndarray, image: np.ndarray) -> None:
    acute = []
    for number in range(40):
        insertion = drawn(shapes, tissue, number)
        dwi, adc, md = (shift(image, c, insertion, tissue) for c in ("dwi", "adc", "md"))
        assert dwi > 0 and (adc < 0) == insertion.acute == (md < 0)
        unknown = [shift(image, c, insertion, tissue) for c in ("unknown", "asl", "qsm")]
        assert {np.sign(u) for u in unknown} == {insertion.unknown_sign}
        acute.append(insertion.acute)
    assert 0.5 < np.mean(acute) < 0.9
    assert {drawn(shapes, tissue, n).unknown_sign for n in range(40)} == {1, -1}


def test_enhancement_after_contrast_agent(shapes: Shapes, tissue: np.ndarray, image: np.ndarray) -> None:
    kinds = {}
    for number in range(40):
        insertion = drawn(shapes, tissue, number)
        kinds.setdefault(insertion.enhancing, []).append(insertion)
    assert set(kinds) == {"none", "solid", "ring"}
    assert all(shift(image, "t1c", i, tissue) < 0 for i in kinds["none"])
    assert all(shift(image, "t1c", i, tissue) > 0 for i in kinds["solid"])
    rings = 0
    for insertion in kinds["ring"]:
        change = insert(image, "t1c", insertion, tissue) - image
        depth = scipy.ndimage.distance_transform_edt(insertion.mask(SIZE))
        if depth.max() >= 3:  # voxels of 2 mm
            rings += 1
            assert change[depth == 1].mean() > 0.1 and change[depth >= 0.8 * depth.max()].mean() < 0
    assert rings > 2, "hardly a lesion was large enough to show a ring"


def test_every_contrast_of_the_manifest_shows_the_lesion(shapes: Shapes, tissue: np.ndarray, image: np.ndarray) -> None:
    insertion = drawn(shapes, tissue, 3)
    assert all(abs(shift(image, contrast, insertion, tissue)) > 0.02 for contrast in CONTRASTS)


def test_a_lesion_cut_by_the_patch_has_no_rim_at_the_cut() -> None:
    cube = np.ones((13, 13, 13), bool)
    shapes = Shapes(2.0, (cube.shape,), (np.packbits(cube),))
    tissue = np.ones((24, 24, 24), bool)
    flat, seen = np.zeros(tissue.shape, np.float32), 0
    for number in range(80):
        insertion = draw_insertion(stream(0, "cut", number), shapes, tissue, tissue.shape, 2.0, most=1)
        if insertion is None or insertion.enhancing != "ring":
            continue
        change = insert(flat, "t1c", insertion, tissue)[0]
        deep = scipy.ndimage.distance_transform_edt(np.pad(insertion.mask(tissue.shape)[0], 1))[1:-1, 1:-1]
        if deep.max() >= 4 and insertion.mask(tissue.shape)[:4].all(axis=0)[deep >= 4].all():
            seen += 1
            assert change[deep >= 4].max() < 0, "the cut enhances"
    assert seen


def test_flat_tissue_shows_lesions_too(shapes: Shapes, tissue: np.ndarray) -> None:
    assert shift(np.zeros(SIZE, np.float32), "flair", drawn(shapes, tissue, 0), tissue) > 0.05


def test_no_room_no_lesion(shapes: Shapes) -> None:
    rng = stream(0, "lesions", 0)
    assert draw_insertion(rng, shapes, np.zeros(SIZE, bool), SIZE, 2.0) is None
    small = np.zeros(SIZE, bool)
    small[:3, :3, :3] = True
    assert draw_insertion(rng, shapes, small, SIZE, 2.0) is None
    scattered = np.zeros(SIZE, bool)
    scattered[::3, ::3, ::3] = True
    assert draw_insertion(rng, shapes, scattered, SIZE, 2.0) is None
    with pytest.raises(ValueError, match="expected that of the patch"):
        draw_insertion(rng, shapes, small, (8, 8, 8), 2.0)


def test_few_voxels_of_tissue_are_found(shapes: Shapes) -> None:
    tissue = np.zeros((48, 48, 48), bool)
    tissue[40:47, 40:47, 40:47] = True  # 0.3 % of the patch: trying at random mostly fails
    found = [draw_insertion(stream(0, "few", n), shapes, tissue, (48, 48, 48), 2.0) for n in range(10)]
    assert any(i is not None and i.mask((48, 48, 48)).any() for i in found)


def test_volumes_spread_over_two_orders(shapes: Shapes) -> None:
    everywhere = np.ones((48, 48, 48), bool)
    volumes = []
    for number in range(60):
        insertion = draw_insertion(stream(1, "lesions", number), shapes, everywhere, everywhere.shape, 2.0, most=1)
        assert insertion is not None and len(insertion.lesions) == 1
        volumes.append(insertion.mask(everywhere.shape).sum() * 0.008)
    assert 0.5 < np.median(volumes) < 4 and np.log(volumes).std() > 0.8
    assert min(volumes) < 0.5 and 5 < max(volumes) <= 0.13 * everywhere.size * 0.008


def test_shapes_keep_their_size_in_mm_on_other_voxels() -> None:
    ball = np.linalg.norm(np.mgrid[-8:9, -8:9, -8:9], axis=0) <= 8
    shapes = Shapes(1.0, (ball.shape,), (np.packbits(ball),))  # 16 mm across
    tissue = np.ones((40, 40, 20), bool)
    ratios = []
    for number in range(20):
        insertion = draw_insertion(stream(0, "ball", number), shapes, tissue, tissue.shape, (1.0, 1.0, 2.5), most=1)
        assert insertion is not None
        inside = np.argwhere(insertion.mask(tissue.shape))
        if (inside.min(0) > 0).all() and (inside.max(0) < np.array(tissue.shape) - 1).all():
            ratios.append((np.ptp(inside, axis=0) + 1) * [1.0, 1.0, 2.5])
    assert len(ratios) >= 5
    assert np.allclose(np.mean(ratios, axis=0), np.mean(ratios), rtol=0.15)


def test_blur_equals_a_filter_and_neighbours_a_dilation() -> None:
    mask = np.random.default_rng(0).random((20, 14, 17)) > 0.7
    sigma = np.array([1.3, 0.6, 2.0])
    radius = [int(2.5 * s) for s in sigma]
    expected = scipy.ndimage.gaussian_filter(mask.astype(float), sigma, mode="nearest", radius=radius)
    assert np.allclose(_blurred(mask, sigma), expected, atol=1e-5)
    assert np.array_equal(_neighbourhood(mask), scipy.ndimage.binary_dilation(mask))


# ---- the library -----------------------------------------------------------------------------------------------------


def test_resizing_keeps_the_middle_and_the_volume() -> None:
    shape = np.random.default_rng(0).random((9, 6, 7)) > 0.5
    assert np.array_equal(resized(shape, (1, 1, 1)) > 0.5, shape)
    block = np.pad(np.ones((12, 10, 8), bool), 2)
    for steps in ((2, 2, 2), (0.5, 0.7, 1.5)):
        other = resized(block, steps)
        assert (other > 0.5).sum() * np.prod(steps) == pytest.approx(block.sum(), rel=0.1)
        middle = scipy.ndimage.center_of_mass(other)
        assert np.allclose(middle, (np.array(other.shape) - 1) / 2, atol=0.05)


@pytest.mark.parametrize("spacing_mm", [1.0, (3.0, 3.0, 3.0)])
def test_procedural_shapes(spacing_mm: float | tuple[float, ...]) -> None:
    shapes = procedural_shapes(7, 40, spacing_mm)
    again = procedural_shapes(7, 12, spacing_mm)
    assert all(np.array_equal(shapes[n], again[n]) for n in range(12))
    assert not np.array_equal(shapes[0], procedural_shapes(8, 1, spacing_mm)[0])
    for number in range(len(shapes)):
        shape = shapes[number]
        assert scipy.ndimage.label(shape)[1] == 1 and shape.sum() >= FEWEST_VOXELS
        assert all(shape.any(axis=others)[[0, -1]].all() for others in ((1, 2), (0, 2), (0, 1)))
    volumes = shapes.volumes_ml
    assert 0.4 < np.median(volumes) < 4 and volumes.max() > 6 * np.median(volumes)
    assert len(pickle.dumps(shapes)) < 200_000


def test_masks_become_one_shape_a_piece(tmp_path: Path) -> None:
    labels = np.zeros((30, 30, 20), np.uint8)
    labels[2:8, 2:8, 2:8] = 1  # 6 x 6 x 12 mm
    labels[20:28, 10:14, 10:12] = 3  # 8 x 4 x 4 mm
    labels[0, 29, 0] = 1  # a speck
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    (tmp_path / "a").mkdir()
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "a" / "sub-1_lesion_mask.nii.gz")
    nib.save(nib.Nifti1Image(labels[:10], affine), tmp_path / "b_mask.nii")
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "b_T1w.nii")
    nib.save(nib.Nifti1Image(0 * labels, affine), tmp_path / "healthy_mask.nii")
    shapes = load_shapes(tmp_path, (1.0, 1.0, 2.0))
    assert sorted(shapes.sizes) == [(6, 6, 12), (6, 6, 12), (8, 4, 4)] and shapes.spacing_mm == 1
    assert shapes.volumes_ml.sum() == pytest.approx(2 * 0.432 + 0.128, rel=0.02)
    coarse = load_shapes(tmp_path, 2.0)
    assert len(coarse) == 2 and coarse.spacing_mm == 2  # the third would have 16 voxels


def test_folders_without_lesions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"found no file \*_mask\.nii or \*_mask\.nii\.gz, expected a folder"):
        load_shapes(tmp_path, 1.0)
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), tmp_path / "x_mask.nii")
    with pytest.raises(ManifestError, match="none of 1 masks holds a lesion of 20 voxels of 1 mm"):
        load_shapes(tmp_path, 1.0)
    (tmp_path / "y_mask.nii").write_text("no image")
    with pytest.raises(ScanError, match=r"y_mask\.nii"):
        load_shapes(tmp_path, 1.0)


def test_real_stroke_masks(data3d: Path) -> None:
    folder = data3d / "soop_lesions"
    shapes = load_shapes(folder, 2.0)
    assert 50 < len(shapes) <= 400 and len(pickle.dumps(shapes)) < 1_000_000
    assert max(max(size) for size in shapes.sizes) <= 64
    masks = sorted(folder.glob("*_mask.nii.gz"))[:10]
    true_ml = [np.prod((v := nifti.read(p, labels=True)[0]).spacing_mm) * (v.voxels > 0).sum() / 1000 for p in masks]
    few = sum(true_ml)
    assert 0.1 < np.median(shapes.volumes_ml) < 10 and shapes.volumes_ml.max() > 30
    assert few < shapes.volumes_ml.sum() < 40 * few
