"""Headers, numbers and formats as scanners, converters and people leave them: each gives the voxels that were meant.

Every input is the head of tests/phantoms.py, spoilt in one way; the reference is the same head unspoilt, or nibabel.
"""

from __future__ import annotations

import bz2
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import intensity, nifti
from brainfm.imaging.endings import companions, ending_of, header_names, is_other, strip_ending
from brainfm.imaging.preprocess import prepare_session
from brainfm.specs import PreprocessSpec
from tests import phantoms

SHAPE = (40, 48, 36)
AFFINE = phantoms.centred(phantoms.axes("LPS"), (2, 2, 2), SHAPE)
SPEC = PreprocessSpec(spacing_mm=(2, 2, 2))


def head() -> np.ndarray:
    return phantoms.head(SHAPE, AFFINE, np.random.default_rng(0), noise=8)


def prepared(path: Path) -> np.ndarray:
    return prepare_session({"t1": path}, {}, SPEC).scans["t1"]


def edit(path: Path, *changes: tuple[str, int, float]) -> None:
    """Overwrites header fields of an uncompressed file, which nibabel would mend."""
    raw = bytearray(path.read_bytes())
    for form, at, value in changes:
        struct.pack_into(form, raw, at, value)
    path.write_bytes(bytes(raw))


def marker_mm(path: Path) -> np.ndarray:
    volume, _ = nifti.read(path)
    where = np.argwhere(volume.voxels > 200).mean(axis=0)
    return where @ volume.affine_mm[:3, :3].T + volume.affine_mm[:3, 3]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e17, 1e34, 1e-30, 1e-17])
def test_a_picture_in_other_units_is_the_same_picture(factor: float, tmp_path: Path) -> None:
    phantoms.write(tmp_path / "plain.nii", head(), AFFINE)
    phantoms.write(tmp_path / "other.nii", head().astype(np.float64) * factor, AFFINE)
    np.testing.assert_allclose(prepared(tmp_path / "other.nii"), prepared(tmp_path / "plain.nii"), atol=1e-4)


def test_numbers_beyond_float32_are_read_from_float64_and_from_a_slope(tmp_path: Path) -> None:
    phantoms.write(tmp_path / "plain.nii", head(), AFFINE)
    want = prepared(tmp_path / "plain.nii")
    phantoms.write(tmp_path / "double.nii", head().astype(np.float64) * 1e200, AFFINE, dtype=np.float64)
    np.testing.assert_allclose(prepared(tmp_path / "double.nii"), want, atol=1e-4)
    phantoms.write(tmp_path / "scaled.nii", np.rint(head() * 100), AFFINE, dtype=np.int16)
    edit(tmp_path / "scaled.nii", ("<f", 112, 1e37))
    np.testing.assert_allclose(prepared(tmp_path / "scaled.nii"), want, atol=2e-3)


@pytest.mark.parametrize(
    ("mark", "dtype"), [(np.finfo(np.float32).max, np.float32), (-np.finfo(np.float32).max, np.float32),
                        (np.finfo(np.float64).max, np.float64), (65535, np.uint16), (1e10, np.float32)],
)  # fmt: skip
@pytest.mark.parametrize("crop", [0, 8])
def test_a_background_of_the_largest_number_is_background(mark: float, dtype: type, crop: int, tmp_path: Path) -> None:
    """The tighter crop leaves more head than background, where the foreground is told in another way."""
    inside = np.s_[crop : SHAPE[0] - crop, crop : SHAPE[1] - crop, crop : SHAPE[2] - crop]
    voxels = head()[inside].astype(np.float64)
    affine = phantoms.centred(phantoms.axes("LPS"), (2, 2, 2), voxels.shape)
    if crop:
        voxels[0] = voxels[-1] = 0
        voxels[:, 0] = voxels[:, -1] = 0
        voxels[:, :, 0] = voxels[:, :, -1] = 0
    phantoms.write(tmp_path / "zero.nii", np.rint(voxels), affine)
    phantoms.write(tmp_path / "mark.nii", np.where(voxels == 0, mark, np.rint(voxels)), affine, dtype=dtype)
    want, got = prepared(tmp_path / "zero.nii"), prepared(tmp_path / "mark.nii")
    assert got.shape == want.shape and got.min() == got[0, 0, 0]
    inner = want > want.min() + 0.5
    np.testing.assert_allclose(got[inner], want[inner], atol=0.15)


def test_few_spikes_are_clipped_and_many_are_refused(tmp_path: Path) -> None:
    voxels = head()
    inside = np.argwhere(voxels > 0)
    rng = np.random.default_rng(1)
    for share, name in ((0.003, "few"), (0.02, "many")):
        chosen = tuple(inside[rng.choice(len(inside), int(share * len(inside)), replace=False)].T)
        for value, kind in ((3e38, "spikes"), (5000, "bright")):
            spiked = voxels.copy()
            spiked[chosen] = value
            phantoms.write(tmp_path / f"{name}_{kind}.nii", spiked, AFFINE)
    np.testing.assert_allclose(prepared(tmp_path / "few_spikes.nii"), prepared(tmp_path / "few_bright.nii"), atol=1e-4)
    assert np.isfinite(prepared(tmp_path / "many_bright.nii")).all()
    with pytest.raises(ScanError, match=r"many_spikes\.nii: outliers from .* where 90 % of the foreground lie within"):
        prepared(tmp_path / "many_spikes.nii")
    assert "numbers of up to 3e+38" in nifti.voxel_faults(tmp_path / "few_spikes.nii")[0]


def test_ordinary_numbers_are_left_as_they_are(tmp_path: Path) -> None:
    voxels = head() * 1e6
    phantoms.write(tmp_path / "large.nii", voxels, AFFINE)
    np.testing.assert_array_equal(nifti.read(tmp_path / "large.nii")[0].voxels, nib.as_closest_canonical(
        nib.load(tmp_path / "large.nii")).get_fdata(dtype=np.float32))  # fmt: skip
    phantoms.write(tmp_path / "zero.nii", np.zeros(SHAPE), AFFINE)
    assert not nifti.read(tmp_path / "zero.nii")[0].voxels.any()


# ---- headers ---------------------------------------------------------------------------------------------------------

_QFORM_ONLY = ("<h", 254, 0)


@pytest.mark.parametrize(
    "changes",
    {
        "qfac of 0": [("<f", 76, 0.0)],
        "qfac of -0": [("<f", 76, -0.0)],
        "qfac of 2": [("<f", 76, 2.0)],
        "a negative voxel size": [("<f", 80, -2.0)],
        "all negative, qfac 0": [("<f", 76, 0.0), ("<f", 80, -2.0), ("<f", 84, -2.0), ("<f", 88, -2.0)],
    }.items(),
    ids=lambda item: item[0],
)
def test_a_qform_is_read_as_nibabel_reads_it(changes: tuple, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    phantoms.write(path, head(), AFFINE)
    edit(path, _QFORM_ONLY, *changes[1])
    np.testing.assert_allclose(nifti.read_header(path).grid.affine_mm, nib.load(path).affine, atol=1e-4)
    np.testing.assert_allclose(marker_mm(path), phantoms.MARKER_MM, atol=0.8)
    assert not any("singular" in fault or "guess" in fault for fault in nifti.header_faults(path))


def test_a_qfac_of_minus_one_and_one_that_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "las.nii"
    affine = phantoms.centred(phantoms.axes("LAS"), (2, 2, 2), SHAPE)
    phantoms.write(path, phantoms.head(SHAPE, affine, np.random.default_rng(0)), affine)
    edit(path, _QFORM_ONLY, ("<f", 76, -3.0))  # niftilib asks for the sign alone
    np.testing.assert_allclose(marker_mm(path), phantoms.MARKER_MM, atol=0.8)
    phantoms.write(tmp_path / "nan.nii", head(), AFFINE)
    edit(tmp_path / "nan.nii", _QFORM_ONLY, ("<f", 76, np.nan))
    np.testing.assert_allclose(marker_mm(tmp_path / "nan.nii"), phantoms.MARKER_MM, atol=0.8)


@pytest.mark.parametrize("longer", [1e-5, 5e-4, 0.5])
def test_a_quaternion_longer_than_one_is_shortened(longer: float, tmp_path: Path) -> None:
    """As niftilib does; nibabel refuses it. The first number of the whole quaternion is 0 here."""
    path = tmp_path / "scan.nii"
    phantoms.write(path, head(), AFFINE)
    b, c, d = (float(nib.load(path).header[f"quatern_{x}"]) for x in "bcd")
    edit(path, _QFORM_ONLY, *(("<f", 256 + 4 * i, value * (1 + longer)) for i, value in enumerate((b, c, d))))
    np.testing.assert_allclose(nifti.read_header(path).grid.affine_mm, AFFINE, atol=1e-3)
    assert any("quaternion" in fault for fault in nifti.header_faults(path)) == (longer > 1e-3)
    nifti.write_labels(tmp_path / "mask.nii", np.ones(nifti.read(path)[0].shape, np.uint8), path)
    np.testing.assert_allclose(nib.load(tmp_path / "mask.nii").affine, AFFINE, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 17.0, -352.0, np.nan])
@pytest.mark.parametrize("extension", [True, False])
def test_a_header_that_does_not_say_where_the_numbers_begin(offset: float, extension: bool, tmp_path: Path) -> None:
    """The four bytes before the numbers are no voxel, whether the header counts them or not."""
    path = tmp_path / "scan.nii"
    phantoms.write(path, head(), AFFINE)
    edit(path, ("<f", 108, offset))
    if not extension:
        raw = path.read_bytes()
        path.write_bytes(raw[:348] + raw[352:])
    phantoms.write(tmp_path / "plain.nii", head(), AFFINE)
    np.testing.assert_array_equal(nifti.read(path)[0].voxels, nifti.read(tmp_path / "plain.nii")[0].voxels)


@pytest.mark.parametrize(("code", "factor"), [(1, 1e-3), (3, 1e3)])
@pytest.mark.parametrize("forms", [(1, 1), (0, 1), (0, 0)])
def test_metres_and_micrometres_become_mm(code: int, factor: float, forms: tuple[int, int], tmp_path: Path) -> None:
    scaled = AFFINE.copy()
    scaled[:3] *= factor
    phantoms.write(tmp_path / "mm.nii", head(), AFFINE, codes=forms)
    phantoms.write(tmp_path / "other.nii", head(), scaled, codes=forms)
    edit(tmp_path / "other.nii", ("<B", 123, code))
    grids = [nifti.read_header(tmp_path / f"{name}.nii").grid for name in ("mm", "other")]
    assert grids[0].same_place(grids[1])
    nifti.write_labels(tmp_path / "mask.nii", np.ones(grids[1].ras_shape(), np.uint8), tmp_path / "other.nii")
    assert nifti.read_header(tmp_path / "mask.nii").grid == grids[1], "what is written says it in the file's own unit"


def test_a_unit_that_nobody_meant_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    phantoms.write(path, head(), AFFINE)
    edit(path, ("<B", 123, 1))
    assert nifti.read_header(path).spacing_mm == pytest.approx((2, 2, 2))
    assert nifti.header_faults(path) == ["the header gives voxels of 2 x 2 x 2 in metres; they are taken for mm"]


# ---- where a label lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off_mm", "kept"), [(2e-3, True), (0.09, True), (0.15, False), (2.0, False)])
def test_a_mask_within_a_tenth_of_a_mm_lies_on_its_scan(off_mm: float, kept: bool, tmp_path: Path) -> None:
    phantoms.write(tmp_path / "t1.nii", head(), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += off_mm
    truth = phantoms.marker(SHAPE, AFFINE)
    for name, affine in (("exact", AFFINE), ("off", moved)):
        phantoms.write(tmp_path / f"{name}.nii", truth, affine, dtype=np.uint8)
    labels = {"exact_mask": tmp_path / "exact.nii", "off_mask": tmp_path / "off.nii"}
    found = prepare_session({"t1": tmp_path / "t1.nii"}, labels, SPEC)
    assert ("off_mask" in found.labels) == kept
    if kept:  # it takes the scan's grid: not a voxel moves
        np.testing.assert_array_equal(found.labels["off_mask"], found.labels["exact_mask"])
    else:
        assert "another grid" in found.failures["off_mask"]


def test_a_mask_that_does_not_say_where_it_lies_is_not_guessed_onto_a_scan(tmp_path: Path) -> None:
    """The guess is radiological: on a scan of +x in the middle of its field it would be the mirror image."""
    ras = phantoms.centred(np.eye(3), (2, 2, 2), SHAPE)
    t1, mask = tmp_path / "t1.nii", tmp_path / "mask.nii"
    phantoms.write(t1, phantoms.head(SHAPE, ras, np.random.default_rng(0)), ras)
    phantoms.write(mask, phantoms.marker(SHAPE, ras), ras, dtype=np.uint8, codes=(0, 0))
    found = prepare_session({"t1": t1}, {"lesion_mask": mask}, SPEC)
    assert not found.labels and "neither sform nor qform" in found.failures["lesion_mask"]
    phantoms.write(t1, phantoms.head(SHAPE, ras, np.random.default_rng(0)), ras, codes=(0, 0))
    both = prepare_session({"t1": t1}, {"lesion_mask": mask}, SPEC)
    assert both.labels["lesion_mask"].any(), "where both say nothing they are one guess"


def test_a_hundredth_of_a_degree_and_a_tenth_of_a_small_voxel(tmp_path: Path) -> None:
    turned = np.eye(4)
    angle = np.radians(0.01)
    turned[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    phantoms.write(tmp_path / "a.nii", head(), turned @ AFFINE)
    phantoms.write(tmp_path / "b.nii", head(), turned @ AFFINE)
    edit(tmp_path / "b.nii", _QFORM_ONLY)  # the quaternion's first number is lost in float32
    a, b = (nifti.read_header(tmp_path / f"{name}.nii").grid for name in "ab")
    assert a.same_place(b) and 0 < a.apart_mm(b) < 0.1
    fine = np.diag([0.2, 0.2, 0.2, 1])
    near = fine.copy()
    near[0, 3] = 0.08  # within 0.1 mm, but nearly half a voxel
    for name, affine in (("c", fine), ("d", near)):
        phantoms.write(tmp_path / f"{name}.nii", np.ones((9, 9, 9)), affine)
    c, d = (nifti.read_header(tmp_path / f"{name}.nii").grid for name in "cd")
    assert not c.same_place(d)


@pytest.mark.parametrize(
    ("values", "dtype"), [((-1, 1), np.int16), ((-1, 0), np.int8), ((-3, 2), np.float32), ((255, 255), np.int8)]
)
def test_labels_below_zero_are_refused(values: tuple[int, int], dtype: type, tmp_path: Path) -> None:
    """-1 outside the head would be lesion everywhere; 255 in a signed byte reads as -1."""
    truth = phantoms.marker(SHAPE, AFFINE)
    phantoms.write(tmp_path / "t1.nii", head(), AFFINE)
    phantoms.write(tmp_path / "m.nii", np.where(truth, values[1], values[0]).astype(np.int64).astype(dtype), AFFINE,
                   dtype=dtype)  # fmt: skip
    with pytest.raises(ScanError, match=r"m\.nii: labels from -\d to -?\d, expected whole numbers from 0 on"):
        nifti.read(tmp_path / "m.nii", labels=True)
    found = prepare_session({"t1": tmp_path / "t1.nii"}, {"lesion_mask": tmp_path / "m.nii"}, SPEC)
    assert not found.labels and "labels from" in found.failures["lesion_mask"]


# ---- formats ---------------------------------------------------------------------------------------------------------


def upper(folder: Path) -> Path:
    phantoms.write(folder / "x.nii", head(), AFFINE)
    return (folder / "x.nii").rename(folder / "x.NII")


def packed_upper(folder: Path) -> Path:
    phantoms.write(folder / "x.nii.gz", head(), AFFINE)
    return (folder / "x.nii.gz").rename(folder / "x.nii.GZ")


def bzipped(folder: Path) -> Path:
    phantoms.write(folder / "x.nii", head(), AFFINE)
    (folder / "x.nii.bz2").write_bytes(bz2.compress((folder / "x.nii").read_bytes()))
    return folder / "x.nii.bz2"


def pair(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(head(), AFFINE), folder / "x.img")
    return folder / "x.img"


def packed_pair(folder: Path) -> Path:
    nib.save(nib.Nifti1Pair(head(), AFFINE), folder / "x.img.gz")
    return folder / "x.img.gz"


def header_of_a_pair(folder: Path) -> Path:
    pair(folder)
    return folder / "x.hdr"


def pair_of_nifti2(folder: Path) -> Path:
    nib.save(nib.Nifti2Pair(head(), AFFINE), folder / "x.img")
    return folder / "x.img"


def shouted_pair(folder: Path) -> Path:
    pair(folder)
    (folder / "x.hdr").rename(folder / "X.HDR")
    return (folder / "x.img").rename(folder / "X.IMG")


def spm(folder: Path) -> Path:
    """ANALYZE with the .mat file in which SPM keeps the affine."""
    nib.save(nib.Spm99AnalyzeImage(head(), AFFINE), folder / "x.img")
    return folder / "x.img"


def mgz(folder: Path) -> Path:
    nib.save(nib.MGHImage(head(), AFFINE), folder / "x.mgz")
    return folder / "x.mgz"


def mgh(folder: Path) -> Path:
    nib.save(nib.MGHImage(head(), AFFINE), folder / "x.mgh")
    return folder / "x.mgh"


def minc(folder: Path) -> Path:
    """MINC 1, axes z y x, as `rawtominc` writes a float volume."""
    from scipy.io import netcdf_file

    affine = phantoms.centred(np.eye(3), (2, 2, 2), SHAPE)
    voxels = phantoms.head(SHAPE, affine, np.random.default_rng(0))
    with netcdf_file(folder / "x.mnc", "w") as file:
        names = ("zspace", "yspace", "xspace")
        for name, axis in zip(names, (2, 1, 0)):
            file.createDimension(name, SHAPE[axis])
            variable = file.createVariable(name, "i4", ())
            variable.start, variable.step = affine[axis, 3], 2.0
            variable.direction_cosines = np.eye(3)[axis]
            variable.spacing = b"regular__"
        image = file.createVariable("image", "f4", names)
        image[:] = voxels.transpose(2, 1, 0)
        for name, value in (("image-max", voxels.max()), ("image-min", voxels.min())):
            file.createVariable(name, "f8", ())[...] = value
    return folder / "x.mnc"


FORMATS = (upper, packed_upper, bzipped, pair, packed_pair, header_of_a_pair, pair_of_nifti2, shouted_pair, spm, mgz,
           mgh, minc)  # fmt: skip


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_every_format_gives_the_head_at_its_place(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path)
    np.testing.assert_allclose(marker_mm(path), phantoms.MARKER_MM, atol=0.8)
    volume, grid = nifti.read(path)
    assert nifti.read_header(path).grid == grid and nifti.header_faults(path) == []
    nifti.write_labels(tmp_path / "mask.nii.gz", (volume.voxels > 200).astype(np.uint8), path)
    mask = nib.load(tmp_path / "mask.nii.gz")
    np.testing.assert_allclose(mask.affine, grid.affine_mm, atol=1e-5)
    assert mask.shape == grid.shape_vox and nifti.read_header(tmp_path / "mask.nii.gz").grid.same_place(grid)


def test_labels_come_from_any_format_too(tmp_path: Path) -> None:
    truth = phantoms.marker(SHAPE, AFFINE).astype(np.uint8)
    nib.save(nib.MGHImage(truth, AFFINE), tmp_path / "m.mgz")
    nib.save(nib.Nifti1Pair(truth, AFFINE), tmp_path / "m.img")
    phantoms.write(tmp_path / "t1.nii", head(), AFFINE)
    labels = {"a_mask": tmp_path / "m.mgz", "b_mask": tmp_path / "m.img"}
    found = prepare_session({"t1": tmp_path / "t1.nii"}, labels, SPEC)
    assert found.labels["a_mask"].any()
    np.testing.assert_array_equal(found.labels["a_mask"], found.labels["b_mask"])


def test_analyze_without_a_mat_says_that_sides_are_a_guess(tmp_path: Path) -> None:
    nib.save(nib.AnalyzeImage(head().astype(np.int16), np.diag([2.0, 2, 2, 1])), tmp_path / "x.img")
    assert "left and right" in nifti.header_faults(tmp_path / "x.img")[0]
    np.testing.assert_allclose(nifti.read_header(tmp_path / "x.img").spacing_mm, (2, 2, 2))


def test_half_a_pair_and_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    pair(tmp_path)
    (tmp_path / "x.hdr").rename(tmp_path / "y.hdr")
    bzipped(tmp_path)
    (tmp_path / "cut.nii.bz2").write_bytes((tmp_path / "x.nii.bz2").read_bytes()[:-4000])
    mgz(tmp_path)
    (tmp_path / "cut.mgz").write_bytes((tmp_path / "x.mgz").read_bytes()[:-4000])
    (tmp_path / "text.mgz").write_bytes(b"hello" * 100)
    nib.save(nib.MGHImage(np.zeros((9, 9, 9, 4), np.float32), AFFINE), tmp_path / "series.mgz")
    for name, message in {
        "x.img": "has no header file beside it, expected x.hdr",
        "y.hdr": "a header without its numbers",
        "absent.mgz": "no such file",
        "absent.img": "no such file",
        "cut.nii.bz2": "cut short or damaged",
        "cut.mgz": "cut short or damaged|cannot be read",
        "text.mgz": "cannot be read",
        "series.mgz": "found a 4D image",
    }.items():
        with pytest.raises(ScanError, match=message) as caught:
            nifti.read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_endings_and_the_files_that_belong_together(tmp_path: Path) -> None:
    assert [strip_ending(name) for name in ("a.NII", "a.nii.GZ", "a.b.mgz", "a.img.gz", "a.txt", ".nii")] == [
        "a", "a", "a.b", "a", "a.txt", ".nii"
    ]  # fmt: skip
    assert ending_of("T1.Nii.Gz") == ".Nii.Gz" and not ending_of("sub-01_T1w.json")
    assert is_other("a.NRRD") and is_other("a.dcm") and not is_other("a.nii")
    assert header_names("x.img")[0] == "x.hdr" and header_names("X.IMG")[0] == "X.HDR" and not header_names("x.nii")
    spm(tmp_path)
    assert [path.name for path in companions(tmp_path / "x.img")] == ["x.hdr", "x.mat"]


# ---- what looks like no scan -----------------------------------------------------------------------------------------


def test_label_maps_and_probabilities_look_like_no_scan() -> None:
    voxels = head()
    labels = np.select([voxels > 200, voxels > 0], [7, 2], 0)
    for dtype in (np.int16, np.float32, np.uint8):
        assert "patches of 2 whole numbers, as a label map" in intensity.no_scan(labels.astype(dtype))
    assert "label map" in intensity.no_scan((labels > 2).astype(np.uint8)), "a mask is one as well"
    soft = np.clip((voxels - 60) / 45, 0, 1).astype(np.float32)  # much of the head near 1
    assert "near its largest value, 1, as in a map of probabilities" in intensity.no_scan(soft)
    assert intensity.no_scan(np.rint(soft * 255).astype(np.uint8)) != "", "in eight bits"


def test_scans_look_like_scans() -> None:
    voxels = head()
    assert intensity.no_scan(voxels) == ""
    assert intensity.no_scan(voxels / voxels.max()) == "", "scaled to 0 to 1 it is a scan still"
    assert intensity.no_scan(np.rint(voxels / 300 * 255).astype(np.uint8)) == "", "and so it is in eight bits"
    assert intensity.no_scan(np.rint(voxels).astype(np.int16)) == ""
