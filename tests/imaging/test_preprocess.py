"""A session onto one grid and back onto the files' own: places, values, failures."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import geometry, nifti, preprocess
from brainfm.imaging.preprocess import Prepared, Recipe, prepare_session, restore_labels, restore_probabilities
from brainfm.specs import PreprocessSpec
from tests import phantoms

SPEC = PreprocessSpec(spacing_mm=(2, 2, 2))
GRIDS = ("lps", "oblique", "anisotropic", "thick_slices", "psr")


def write_scan(folder: Path, kind: str, seed: int = 0) -> Path:
    path = folder / f"{kind}.nii.gz"
    phantoms.READABLE[kind](path, np.random.default_rng(seed))
    return path


def write_marker(scan: Path, name: str = "lesion", value: int = 1) -> Path:
    """The marker as a label map on the grid of a scan."""
    path = scan.with_name(f"{scan.name.split('.')[0]}_{name}.nii.gz")
    grid = nifti.read_header(scan).grid
    truth = phantoms.marker(grid.ras_shape(), grid.ras_affine())
    nifti.write_labels(path, (truth * value).astype(np.uint8), scan)
    return path


def centre_mm(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0) @ affine[:3, :3].T + affine[:3, 3]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path], Prepared]:
    """Five scans, each on a grid of its own, with a marker on each grid."""
    folder = tmp_path_factory.mktemp("session")
    scans = {kind: write_scan(folder, kind) for kind in GRIDS}
    labels = {f"{kind}_mask": write_marker(path) for kind, path in scans.items()}
    return scans, labels, prepare_session(scans, labels, SPEC, reference="lps")


def test_scans_and_labels_of_a_session_lie_on_one_another(session: tuple) -> None:
    _, _, prepared = session
    assert not prepared.failures
    shape = prepared.scans["lps"].shape
    truth = phantoms.marker(shape, prepared.affine_mm)
    for kind in GRIDS:
        scan, labels = prepared.scans[kind], prepared.labels[f"{kind}_mask"]
        assert scan.shape == labels.shape == shape
        assert scan.dtype == np.float32 and scan.flags.c_contiguous and labels.dtype == np.uint8
        bright = scan > (scan.max() + np.median(scan[scan > scan.min()])) / 2
        np.testing.assert_allclose(centre_mm(bright, prepared.affine_mm), phantoms.MARKER_MM, atol=1)
        np.testing.assert_allclose(centre_mm(labels > 0, prepared.affine_mm), phantoms.MARKER_MM, atol=0.8)
        assert dice(labels > 0, truth) > 0.85
        assert np.argwhere(labels)[:, 0].mean() < shape[0] / 2 - 4, "left stays left"


def test_labels_come_back_onto_every_file(session: tuple) -> None:
    scans, labels, prepared = session
    truth = phantoms.marker(prepared.scans["lps"].shape, prepared.affine_mm)
    probabilities = np.stack([1 - truth, truth]).astype(np.float32)
    for kind, path in scans.items():
        recipe = Recipe.from_dict(json.loads(json.dumps(prepared.recipes[kind].to_dict())))
        assert recipe == prepared.recipes[kind]
        expected = np.asarray(nib.load(labels[f"{kind}_mask"]).dataobj) > 0
        for restored in (restore_probabilities(probabilities, recipe), restore_labels(truth.astype(np.uint8), recipe)):
            assert restored.shape == nib.load(path).shape and restored.dtype == np.uint8
            assert dice(restored > 0, expected) > (0.75 if kind == "thick_slices" else 0.85)


def test_a_scan_on_the_reference_grid_keeps_its_values(session: tuple) -> None:
    scans, _, prepared = session
    recipe = prepared.recipes["lps"]
    volume, grid = nifti.read(scans["lps"])
    assert recipe.session_shape[0] >= volume.shape[0]
    stats = recipe.stats
    assert stats is not None
    offset = np.rint(np.linalg.inv(volume.affine_mm) @ prepared.affine_mm)[:3, 3].astype(int)
    inside = tuple(slice(max(0, -o), n - o) for o, n in zip(offset, volume.shape, strict=True))
    source = tuple(slice(max(0, o), max(0, o) + s) for o, s in zip(offset, prepared.scans["lps"][inside].shape))
    expected = np.clip(volume.voxels[source], np.float32(stats.low), np.float32(stats.high))
    expected = (expected - np.float32(stats.mean)) / np.float32(stats.std)
    np.testing.assert_array_equal(prepared.scans["lps"][inside], expected)
    # and labels return without loss
    labels = np.random.default_rng(0).integers(0, 3, prepared.scans["lps"].shape).astype(np.uint8)
    back = grid.to_ras(restore_labels(labels, recipe))
    np.testing.assert_array_equal(back[source], labels[inside])
    back[source] = 0
    assert not back.any(), "outside the crop there is nothing"


def test_probabilities_choose_the_largest_and_class_0_outside(session: tuple) -> None:
    _, _, prepared = session
    recipe = prepared.recipes["lps"]
    rng = np.random.default_rng(0)
    logits = rng.normal(-50, 1, (4, *recipe.shape)).astype(np.float16)
    back = recipe.file.to_ras(restore_probabilities(logits, recipe))
    expected = recipe.file.to_ras(restore_labels(logits.argmax(axis=0).astype(np.uint8), recipe))
    assert (back == expected).mean() > 0.999  # float16 has ties
    with pytest.raises(ValueError, match="the recipe is for"):
        restore_probabilities(logits[:, 1:], recipe)


def test_shares_come_back_the_same_when_each_class_is_looked_at_where_it_can_win(session: tuple) -> None:
    """On every grid of the session: finer and coarser ones, oblique ones, slices thicker than the network's voxels."""
    scans, _, prepared = session
    rng = np.random.default_rng(2)
    shape = prepared.scans["lps"].shape
    cells = rng.integers(0, 12, (5, 5, 5))
    classes = np.kron(cells, np.ones([n // 5 + 1 for n in shape], int))[tuple(slice(0, n) for n in shape)]
    shares = np.stack([classes == k for k in range(13)]).astype(np.float32)  # the last is nowhere
    shares += rng.random(shares.shape, dtype=np.float32) * 0.3
    shares /= shares.sum(axis=0)
    for kind in scans:
        recipe = prepared.recipes[kind]
        everywhere = restore_probabilities(shares, recipe)
        np.testing.assert_array_equal(restore_probabilities(shares, recipe, shares=True), everywhere)
        assert len(np.unique(everywhere)) == 12


def test_foreground_points_lie_in_the_head(session: tuple) -> None:
    scans, labels, prepared = session
    points = prepared.foreground
    assert points.dtype == np.int16 and points.shape == (preprocess.FOREGROUND_POINTS, 3)
    where = points @ prepared.affine_mm[:3, :3].T + prepared.affine_mm[:3, 3]
    assert (np.square(where / (34, 40, 32)).sum(axis=-1) < 1.25).all()
    assert len(np.unique(points, axis=0)) == len(points)
    again = prepare_session(scans, labels, SPEC, reference="lps")
    np.testing.assert_array_equal(again.foreground, points)
    for name, scan in prepared.scans.items():
        np.testing.assert_array_equal(again.scans[name], scan)


def test_the_crop_is_the_union_of_the_heads_with_a_margin(session: tuple) -> None:
    _, _, prepared = session
    extent = np.array(prepared.scans["lps"].shape) * 2
    assert (extent >= 2 * np.array([34, 40, 32])).all() and (extent <= 2 * np.array([34, 40, 32]) + 16).all()


def test_scans_too_large_to_hold_are_read_twice(session: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, labels, prepared = session
    monkeypatch.setattr(preprocess, "_KEPT_BYTES", 0)
    again = prepare_session(scans, labels, SPEC, reference="lps")
    for name, scan in prepared.scans.items():
        np.testing.assert_array_equal(again.scans[name], scan)


def test_the_thinnest_slices_are_the_reference(tmp_path: Path) -> None:
    scans = {
        "flair": write_scan(tmp_path, "lps"),
        "t1": write_scan(tmp_path, "ras"),
        "t2": write_scan(tmp_path, "oblique"),
    }
    prepared = prepare_session(scans, {}, SPEC)
    np.testing.assert_allclose(prepared.affine_mm[:3, :3], np.diag([2, 2, 2]))
    scans = {"t1": write_scan(tmp_path, "thick_slices"), "t2": write_scan(tmp_path, "oblique")}
    prepared = prepare_session(scans, {}, SPEC)
    np.testing.assert_allclose(prepared.affine_mm[:3, :3], nifti.read(scans["t2"])[0].affine_mm[:3, :3], atol=1e-6)


def test_the_offset_is_counted_from_the_edge_of_the_reference(session: tuple) -> None:
    scans, _, prepared = session
    file = nifti.read_header(scans["lps"]).grid
    lattice = geometry.lattice(file.ras_affine(), SPEC.spacing_mm)
    np.testing.assert_allclose(geometry.cropped_affine(lattice, prepared.offset_vox), prepared.affine_mm)
    assert prepared.frame == ""


def test_a_recipe_of_before_registration_can_be_read(session: tuple) -> None:
    recipe = session[2].recipes["lps"]
    values = recipe.to_dict()
    del values["moved_mm"]
    assert Recipe.from_dict(values) == recipe


def test_bad_scans_are_left_out_by_name(tmp_path: Path) -> None:
    good = write_scan(tmp_path, "ras")
    scans = {"t1": good, "flair": write_scan(tmp_path, "constant")}
    for name, writer in phantoms.REFUSED.items():
        scans[name] = tmp_path / f"{name}.nii.gz"
        writer(scans[name], np.random.default_rng(0))
    prepared = prepare_session(scans, {}, SPEC, reference="flair")
    assert set(prepared.scans) == set(prepared.recipes) == {"t1"}
    assert set(prepared.failures) == set(scans) - {"t1"}
    for name, reason in prepared.failures.items():
        assert str(scans[name]) in reason
    with pytest.raises(ScanError, match=r"no scan of the session can be used.*constant\.nii\.gz"):
        prepare_session({"t1": tmp_path / "constant.nii.gz"}, {}, SPEC)
    with pytest.raises(ScanError, match="no scan was given"):
        prepare_session({}, {}, SPEC)


def test_a_scan_from_elsewhere_is_left_out(tmp_path: Path) -> None:
    near, far = write_scan(tmp_path, "ras"), tmp_path / "far.nii.gz"
    image = nib.load(near)
    affine = image.affine.copy()
    affine[0, 3] += 2000
    phantoms.write(far, image.get_fdata(), affine)
    prepared = prepare_session({"t1": near, "t2": far}, {}, SPEC)
    assert set(prepared.scans) == {"t1"} and "wholly outside" in prepared.failures["t2"]


def test_labels_must_lie_on_a_scan_of_the_session(tmp_path: Path) -> None:
    scans = {"t1": write_scan(tmp_path, "ras")}
    elsewhere = write_scan(tmp_path, "thick_slices")
    labels = {
        "far_mask": write_marker(elsewhere),
        "near_mask": write_marker(scans["t1"], "near", 3),
        "part_labels": write_marker(scans["t1"], "part", 3),
        "image_labels": scans["t1"],
    }
    prepared = prepare_session(scans, labels, SPEC)
    assert "lies on another grid than every scan of its session" in prepared.failures["far_mask"]
    assert "whole numbers" in prepared.failures["image_labels"]
    assert set(np.unique(prepared.labels["near_mask"])) == {0, 1}
    assert set(np.unique(prepared.labels["part_labels"])) == {0, 3}
    assert prepared.recipes["near_mask"].stats is None
    np.testing.assert_array_equal(prepared.labels["near_mask"] * 3, prepared.labels["part_labels"])


def test_labels_turned_another_way_lie_on_the_same_grid(tmp_path: Path) -> None:
    scan = write_scan(tmp_path, "lps")
    grid = nifti.read_header(scan).grid
    truth = phantoms.marker(grid.ras_shape(), grid.ras_affine())
    turned = tmp_path / "labels.nii.gz"
    phantoms.write(turned, truth, grid.ras_affine(), dtype=np.uint16)
    prepared = prepare_session({"t1": scan}, {"lesion_mask": turned, "direct_mask": write_marker(scan)}, SPEC)
    np.testing.assert_array_equal(prepared.labels["lesion_mask"], prepared.labels["direct_mask"])
    back = restore_labels(prepared.labels["lesion_mask"], prepared.recipes["lesion_mask"])
    np.testing.assert_array_equal(back, truth)


def test_many_labels_need_16_bits(tmp_path: Path) -> None:
    scan = write_scan(tmp_path, "ras")
    image = nib.load(scan)
    phantoms.write(tmp_path / "a.nii.gz", (image.get_fdata() > 200) * 1035, image.affine, dtype=np.int32)
    prepared = prepare_session({"t1": scan}, {"aseg_labels": tmp_path / "a.nii.gz"}, SPEC)
    assert prepared.labels["aseg_labels"].dtype == np.uint16 and prepared.labels["aseg_labels"].max() == 1035


# ---- registration ----------------------------------------------------------------------------------------------------

RIGID = PreprocessSpec(spacing_mm=(2, 2, 2), align="rigid")
MOVED = np.eye(4)
MOVED[:3, :3] = phantoms.rotation(6, -8)
MOVED[:3, 3] = 5, -7, 4


def lumpy(shape: tuple[int, ...], affine: np.ndarray, motion: np.ndarray, seed: int, flip: bool = False) -> np.ndarray:
    """The head of the phantoms with folds in it, after a motion in the scanner; `flip` is another contrast."""
    place = np.linalg.inv(motion) @ affine
    x, y, z = np.moveaxis(phantoms.world_mm(shape, place), -1, 0)
    folds = np.sin(x / 5) * np.cos(y / 7 + 1) + np.sin(z / 6 + y / 11)
    voxels = phantoms.head(shape, place, np.random.default_rng(seed))
    tissue = np.where(folds > 0.4, 60, np.where(folds < -0.5, 140, 100))
    tissue = 200 - tissue if flip else tissue
    return np.where((voxels > 50) & (voxels < 200), voxels + tissue - 100, voxels)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """A first visit with a t1; a second whose patient lies elsewhere, and moves once more between t1 and flair."""
    pytest.importorskip("SimpleITK")
    folder = tmp_path_factory.mktemp("moved")
    grids = {
        "first": (phantoms.centred(phantoms.axes("LPS"), (2, 2, 2), (44, 52, 44)), (44, 52, 44), np.eye(4)),
        "second": (phantoms.centred(phantoms.axes("RAS"), (2, 2, 2.5), (48, 54, 40)), (48, 54, 40), MOVED),
        "flair": (phantoms.centred(phantoms.rotation(4, 0), (1.5, 1.5, 3), (64, 72, 34)), (64, 72, 34), MOVED @ MOVED),
    }
    scans, labels = {}, {}
    for seed, (name, (affine, shape, motion)) in enumerate(grids.items()):
        scans[name], labels[name] = folder / f"{name}.nii.gz", folder / f"{name}_lesion.nii.gz"
        phantoms.write(scans[name], lumpy(shape, affine, motion, seed, flip=name == "flair"), affine)
        truth = phantoms.marker(shape, np.linalg.inv(motion) @ affine)
        phantoms.write(labels[name], truth, affine, dtype=np.uint8)
    return scans, labels


def test_visits_and_scans_that_moved_lie_on_one_another(moved: tuple) -> None:
    scans, labels = moved
    first = prepare_session({"t1": scans["first"]}, {"lesion_mask": labels["first"]}, RIGID)
    header = prepare_session({"t1": scans["first"]}, {"lesion_mask": labels["first"]}, SPEC)
    np.testing.assert_array_equal(first.scans["t1"], header.scans["t1"])
    assert first.frame == "" and first.recipes["t1"].moved_mm is None and not first.alignments
    second = prepare_session(
        {"t1": scans["second"], "flair": scans["flair"]},
        {"lesion_mask": labels["flair"], "other_mask": labels["second"]},
        RIGID,
        anchor=preprocess.Anchor("ds/a/1", scans["first"]),
    )
    assert not second.failures and second.frame == "ds/a/1" and second.reference == "t1"
    assert set(second.alignments) == {"t1", "flair"} and all(not a.refused for a in second.alignments.values())
    for name, label in {**first.labels, **second.labels}.items():
        where = first.affine_mm if label is first.labels.get(name) else second.affine_mm
        np.testing.assert_allclose(centre_mm(label > 0, where), phantoms.MARKER_MM, atol=0.8)
    # and voxel v of the second is voxel v + offset - offset of the first
    shift = np.array(second.offset_vox) - first.offset_vox
    np.testing.assert_allclose(geometry.cropped_affine(first.affine_mm, tuple(shift)), second.affine_mm, atol=1e-9)
    on_first = np.argwhere(second.labels["lesion_mask"]) + shift
    assert first.labels["lesion_mask"][tuple(on_first.T)].mean() > 0.75
    for name in ("t1", "flair"):  # by their headers they are a centimetre off
        recipe = Recipe.from_dict(json.loads(json.dumps(second.recipes[name].to_dict())))
        assert recipe == second.recipes[name] and recipe.moved_mm is not None


def test_answers_on_an_aligned_session_lie_on_the_files_that_came_in(moved: tuple) -> None:
    scans, labels = moved
    prepared = prepare_session({"t1": scans["second"], "flair": scans["flair"]}, {}, RIGID, reference="t1")
    assert not prepared.alignments["flair"].refused and prepared.recipes["t1"].moved_mm is None
    place = np.linalg.inv(MOVED) @ prepared.affine_mm
    truth = phantoms.marker(prepared.scans["t1"].shape, place)
    probabilities = np.stack([1 - truth, truth]).astype(np.float32)
    for name, file in (("t1", "second"), ("flair", "flair")):
        expected = np.asarray(nib.load(labels[file]).dataobj) > 0
        recipe = prepared.recipes[name]
        assert dice(restore_probabilities(probabilities, recipe) > 0, expected) > 0.85
        assert dice(restore_labels(truth.astype(np.uint8), recipe) > 0, expected) > 0.8
        grid = nib.load(scans[file])
        assert centre_mm(expected, grid.affine)[0] < -6, "left stays left"
    bright = (prepared.scans["flair"] > 2.2) & truth
    assert bright.sum() > 0.8 * truth.sum(), "the flair's marker lies on the t1's"


def test_labels_of_a_shared_grid_go_with_the_reference(moved: tuple, tmp_path: Path) -> None:
    scans, labels = moved
    grid = nib.load(scans["first"])
    other = tmp_path / "t2.nii.gz"
    phantoms.write(other, lumpy(grid.shape, grid.affine, MOVED, 5, flip=True), grid.affine)
    pair = {"a2": other, "t1": scans["first"]}
    prepared = prepare_session(pair, {"lesion_mask": labels["first"]}, RIGID, reference="t1")
    assert prepared.recipes["a2"].moved_mm is not None and prepared.recipes["lesion_mask"].moved_mm is None
    np.testing.assert_allclose(
        centre_mm(prepared.labels["lesion_mask"] > 0, prepared.affine_mm), phantoms.MARKER_MM, atol=0.8
    )


def test_registration_that_is_refused_leaves_the_header(moved: tuple, tmp_path: Path) -> None:
    scans, _ = moved
    rng = np.random.default_rng(0)
    near, far = (phantoms.centred(np.eye(3), (2, 2, 2), (44, 52, 44)) for _ in range(2))
    far[0, 3] += 900
    for name, affine in (("near", near), ("far", far)):
        phantoms.write(tmp_path / f"{name}.nii.gz", 100 * rng.random((44, 52, 44)), affine)
    files = {"t1": scans["first"], "t2": tmp_path / "near.nii.gz", "pd": tmp_path / "far.nii.gz"}
    prepared = prepare_session(files, {}, RIGID, reference="t1")
    assert set(prepared.scans) == {"t1", "t2"} and prepared.recipes["t2"].moved_mm is None
    assert prepared.alignments["t2"].refused and not prepared.alignments["t2"].trusted
    assert "wholly outside" in prepared.failures["pd"] and "registration was refused" in prepared.failures["pd"]


# ---- real scans ------------------------------------------------------------------------------------------------------


def test_a_real_stroke_session_with_a_flair_on_its_own_grid(data3d: Path) -> None:
    stem = data3d / "isles22/sub-strokecase0009/sub-strokecase0009_"
    scans = {name: Path(f"{stem}{name.upper()}.nii.gz") for name in ("dwi", "adc", "flair")}
    mask = Path(f"{stem}infarct_mask.nii.gz")
    prepared = prepare_session(scans, {"infarct_mask": mask}, SPEC)
    assert not prepared.failures and set(prepared.scans) == set(scans)
    lesion = prepared.labels["infarct_mask"] > 0
    brain = prepared.scans["dwi"] > prepared.scans["dwi"].min()
    assert prepared.scans["dwi"][lesion].mean() > 1, "the infarct is bright on diffusion"
    assert dice(brain, prepared.scans["flair"] > prepared.scans["flair"].min()) > 0.85
    truth = nib.load(mask)
    back = restore_labels(prepared.labels["infarct_mask"], prepared.recipes["dwi"])
    np.testing.assert_array_equal(back > 0, np.asarray(truth.dataobj) > 0)
    on_flair = restore_probabilities(np.stack([~lesion, lesion]).astype(np.float32), prepared.recipes["flair"])
    assert on_flair.shape == nib.load(scans["flair"]).shape and on_flair.any()


def test_a_real_session_of_thick_slices(data3d: Path) -> None:
    folder = data3d / "openms_long/patient01/study1"
    scans = {n.lower()[:2]: folder / f"patient01_study1_{n}.nii.gz" for n in ("T1w", "T2w", "FLAIR")}
    prepared = prepare_session(scans, {"brain_mask": folder.parent / "patient01_brainmask_common.nii.gz"}, SPEC)
    assert set(prepared.scans) == {"t1", "t2", "fl"}
    assert "another grid" in prepared.failures["brain_mask"]
    masks = [scan > scan.min() + 0.8 for scan in prepared.scans.values()]
    assert dice(masks[0], masks[1]) > 0.7 and dice(masks[1], masks[2]) > 0.7


def test_a_part_of_a_session_is_what_it_is_in_the_whole(tmp_path: Path) -> None:
    """And an answer about that part comes back onto the file as the whole answer does, background elsewhere."""
    scans = {kind: write_scan(tmp_path, kind) for kind in ("lps", "oblique")}
    whole = prepare_session(scans, {}, SPEC, reference="lps")
    box = tuple(slice(4, size - 5) for size in whole.scans["lps"].shape)
    asked = []
    part = prepare_session(scans, {}, SPEC, reference="lps", within=lambda shape: asked.append(shape) or box)
    assert asked == [whole.scans["lps"].shape]
    for kind in scans:
        np.testing.assert_allclose(part.scans[kind], whole.scans[kind][box], atol=1e-4)
    np.testing.assert_allclose(part.affine_mm, geometry.cropped_affine(whole.affine_mm, (4, 4, 4)))
    rng = np.random.default_rng(0)
    inner = np.zeros((3, *whole.scans["lps"].shape), np.float32)
    inner[0] = 1
    found = rng.dirichlet((1, 1, 1), tuple(s.stop - s.start - 8 for s in box)).transpose(3, 0, 1, 2)
    inner[(slice(None), *(slice(s.start + 4, s.stop - 4) for s in box))] = found
    expected = restore_probabilities(inner, whole.recipes["lps"])
    assert expected.any()
    cut = np.ascontiguousarray(inner[(slice(None), *box)])
    assert np.array_equal(restore_probabilities(cut, part.recipes["lps"], shares=True), expected)
    assert np.array_equal(restore_probabilities(inner, whole.recipes["lps"], shares=True), expected)
    assert prepare_session(scans, {}, SPEC, within=lambda shape: None).scans["lps"].shape == asked[0]
    nothing = np.stack([np.ones(part.scans["lps"].shape), np.zeros(part.scans["lps"].shape)])
    assert not restore_probabilities(nothing, part.recipes["lps"], shares=True).any()
