"""Files onto RAS+ axes and back: left stays left, and the grid of the file returns exactly."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import nifti
from brainfm.imaging.nifti import FileGrid
from brainfm.volume import is_ras
from tests import phantoms

GEOMETRY_FIELDS = ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d")
GEOMETRY_FIELDS += ("qoffset_x", "qoffset_y", "qoffset_z", "xyzt_units")
SHOW_MARKER = sorted(set(phantoms.READABLE) - {"constant"})


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", SHOW_MARKER)
def test_left_stays_left(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "scan.nii.gz"
    phantoms.READABLE[kind](path, rng)
    volume, grid = nifti.read(path)
    assert volume.voxels.dtype == np.float32 and is_ras(volume.affine_mm)
    where = np.argwhere(volume.voxels > 200)
    np.testing.assert_allclose(
        where.mean(axis=0) @ volume.affine_mm[:3, :3].T + volume.affine_mm[:3, 3], phantoms.MARKER_MM, atol=0.8
    )
    assert where[:, 0].mean() < (volume.shape[0] - 1) / 2, "the marker is in the left half of the array"
    header = nifti.read_header(path)
    assert header.grid == grid


@pytest.mark.parametrize("kind", sorted(phantoms.READABLE))
def test_compact_voxels_are_the_same_numbers(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "scan.nii"
    phantoms.READABLE[kind](path, rng)
    compact, _ = nifti.read(path, compact=True)
    plain, _ = nifti.read(path)
    np.testing.assert_array_equal(compact.voxels.astype(np.float32), plain.voxels)
    assert compact.voxels.dtype.isnative


def test_values_agree_with_nibabel(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "scan.nii.gz"
    phantoms.scaled(path, rng)
    expected = nib.as_closest_canonical(nib.load(path))
    volume, _ = nifti.read(path)
    np.testing.assert_allclose(volume.voxels, expected.get_fdata(), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(volume.affine_mm, expected.affine, atol=1e-6)


def test_every_orientation_agrees_with_nibabel_and_comes_back() -> None:
    array = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            directions = np.zeros((3, 3))
            for file_axis, (ras_axis, flip) in enumerate(zip(order, flips, strict=True)):
                directions[ras_axis, file_axis] = flip
            affine = phantoms.centred(directions, (1, 2, 3), array.shape)
            grid = FileGrid(array.shape, tuple(map(tuple, affine.tolist())), tuple(zip(order, flips, strict=True)))
            expected = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int16), affine))
            np.testing.assert_array_equal(grid.to_ras(array), np.asarray(expected.dataobj))
            np.testing.assert_allclose(grid.ras_affine(), expected.affine, atol=1e-6)
            np.testing.assert_array_equal(grid.from_ras(grid.to_ras(array)), array)
            assert grid.to_ras(array).shape == grid.ras_shape()
            leading = np.stack([array, -array])
            np.testing.assert_array_equal(grid.from_ras(grid.to_ras(leading)), leading)
            assert FileGrid.from_dict(grid.to_dict()) == grid


@pytest.mark.parametrize("kind", sorted(phantoms.READABLE))
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_labels_are_written_on_the_very_grid(kind: str, ending: str, tmp_path: Path, rng: np.random.Generator) -> None:
    like, out = tmp_path / f"scan.{ending}", tmp_path / f"labels.{ending}"
    phantoms.READABLE[kind](like, rng)
    volume, grid = nifti.read(like)
    labels = rng.integers(0, 256, volume.shape).astype(np.uint8)
    nifti.write_labels(out, labels, like)
    source, written = nib.load(like), nib.load(out)
    assert written.shape == source.shape[:3]
    assert written.get_data_dtype() == np.uint8
    for name in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(written.header[name], source.header[name])
    np.testing.assert_array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])
    np.testing.assert_array_equal(np.asarray(written.dataobj), grid.from_ras(labels))
    back, back_grid = nifti.read(out, labels=True)
    np.testing.assert_array_equal(back.voxels, labels)
    assert back.voxels.dtype == np.int32 and back_grid == grid
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([like.name, out.name])


@pytest.mark.parametrize("kind", ["big_endian", "lps"])
def test_ids_above_255_and_maps_come_back_whatever_the_order_of_bytes(
    kind: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    like, out = tmp_path / "scan.nii", tmp_path / "out.nii.gz"
    phantoms.READABLE[kind](like, rng)
    volume, _ = nifti.read(like)
    ids = rng.choice([0, 17, 258, 3201, 11104], volume.shape)
    nifti.write_labels(out, ids, like)
    assert nib.load(out).get_data_dtype().itemsize == 2
    np.testing.assert_array_equal(nifti.read(out, labels=True)[0].voxels, ids)
    values = rng.standard_normal(volume.shape).astype(np.float32)
    nifti.write_map(out, values, like)
    np.testing.assert_array_equal(nifti.read(out)[0].voxels, values)


def test_written_labels_carry_no_text_of_the_patient(tmp_path: Path, rng: np.random.Generator) -> None:
    like = tmp_path / "scan.nii"
    image = phantoms.write(like, np.ones((4, 5, 6)), np.eye(4))
    image.header["descrip"] = b"NAME OF PATIENT"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"NAME OF PATIENT"))
    nib.save(image, like)
    nifti.write_labels(tmp_path / "out.nii", np.ones((4, 5, 6), dtype=np.uint8), like)
    assert b"PATIENT" in like.read_bytes()
    assert b"PATIENT" not in (tmp_path / "out.nii").read_bytes()


def test_labels_that_do_not_fit_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    like = tmp_path / "scan.nii"
    phantoms.READABLE["ras"](like, rng)
    shape = nifti.read_header(like).grid.shape_vox
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        nifti.write_labels(tmp_path / "out.nii", np.full(shape, 65536), like)
    with pytest.raises(ValueError, match="expected whole numbers"):
        nifti.write_labels(tmp_path / "out.nii", np.full(shape, 0.5), like)
    with pytest.raises(ValueError, match="expected"):
        nifti.write_labels(tmp_path / "out.nii", np.zeros((*shape[:2], 1), dtype=np.uint8), like)
    assert not (tmp_path / "out.nii").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("many_nan", "NaN or infinite"),
        ("four_d", "found a 4D image"),
        ("rgb", "RGB"),
        ("complex", "complex"),
        ("truncated", "cut short"),
        ("no_geometry", "usable affine"),
    ],
)
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_refusals_name_file_and_reason(
    kind: str, message: str, ending: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / f"scan.{ending}"
    phantoms.REFUSED[kind](path, rng)
    with pytest.raises(ScanError, match=message) as caught:
        nifti.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    faults = nifti.header_faults(path) + nifti.voxel_faults(path)
    assert len(faults) == 1 and message in faults[0] and str(path) not in faults[0]


def test_damage_in_the_middle_is_noticed(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "scan.nii.gz"
    phantoms.READABLE["ras"](path, rng)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum
    path.write_bytes(content)
    with pytest.raises(ScanError, match="damaged"):
        nifti.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in {"a.nii": b"", "b.nii": b"hello" * 100, "c.nii.gz": gzip.compress(b"hello" * 100)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ScanError, match="not a single-file NIfTI"):
            nifti.read(tmp_path / name)
    with pytest.raises(ScanError, match="no such file"):
        nifti.read(tmp_path / "absent.nii")


def test_a_wrong_ending_does_not_matter(tmp_path: Path, rng: np.random.Generator) -> None:
    phantoms.READABLE["ras"](tmp_path / "a.nii", rng)
    (tmp_path / "a.nii").rename(tmp_path / "a.nii.gz")
    assert nifti.read(tmp_path / "a.nii.gz")[0].shape == (40, 48, 36)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("disagreeing", "sform and qform disagree by 10 mm"),
        ("singular_sform", "the sform is singular"),
        ("zero_pixdim", "voxel size of 0 x 0 x 0 mm"),
        ("negative_pixdim", "x -1.5 x"),
        ("few_nan", "3 of 69120 voxels are NaN"),
        ("constant", "all voxels have the value 7"),
        ("ras", None),
        ("oblique", None),
        ("psr", None),
    ],
)
def test_doctor_sees(kind: str, fault: str | None, tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "scan.nii.gz"
    phantoms.READABLE[kind](path, rng)
    faults = nifti.header_faults(path) + nifti.voxel_faults(path)
    if fault is None:
        assert faults == []
    else:
        assert len(faults) == 1 and fault in faults[0]


def test_doctor_sees_flat_and_unplaced_scans(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    phantoms.write(path, np.arange(20 * 20 * 3).reshape(20, 20, 3), np.diag([1, 1, 30, 1.0]), codes=(0, 0))
    text = " ".join(nifti.header_faults(path))
    assert "only 3 slices" in text and "1 x 1 x 30 mm" in text and "left and right are a guess" in text


def test_labels_must_be_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii"
    phantoms.write(path, np.array([0, 1, 2.5, 3] * 16).reshape(4, 4, 4), np.eye(4))
    with pytest.raises(ScanError, match="fractions"):
        nifti.read(path, labels=True)
    phantoms.write(path, np.array([0, 1, 2.0, 3] * 16).reshape(4, 4, 4), np.eye(4))
    assert set(np.unique(nifti.read(path, labels=True)[0].voxels)) == {0, 1, 2, 3}
