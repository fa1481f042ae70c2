"""The grid and the patch that data ask for."""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm import cli
from brainfm.data.fingerprint import Fingerprint, choose_patch, choose_spacing, fingerprint
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.specs import PreprocessSpec
from brainfm.tasks.segmentation.cases import find_cases


def found_of(median_vox, **values) -> Fingerprint:
    nothing = (math.nan,) * 3
    made = Fingerprint(
        3, 3, 0, (1.0,) * 3, (1.0,) * 3, median_vox, median_vox, median_vox, nothing, nothing, nothing, 1.0
    )  # fmt: skip
    return replace(made, **values)


# ---- the patch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("median", "stride", "most", "expected"),
    [
        ((160, 200, 160), 16, 96**3, (96, 112, 80)),  # a head: about 0.55 of each axis
        ((36, 50, 36), 16, 96**3, (32, 48, 32)),  # a crop smaller than the budget: as much of it as strides allow
        ((320, 368, 30), 16, 96**3, (224, 240, 16)),  # thick slices: flat
        ((512, 20, 512), 8, 64**3, (184, 8, 176)),  # coronal slices
        ((20, 12, 10), 16, 96**3, (32, 16, 16)),  # smaller than two strides: one axis is padded to them
    ],
)
def test_patches_follow_the_volume(median, stride, most, expected) -> None:
    assert choose_patch(found_of(median), stride, most) == expected


@pytest.mark.parametrize("median", [(160, 200, 160), (240, 240, 155), (320, 368, 30), (90, 33, 200), (9, 9, 9)])
@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("most", [2 * 32**3, 64**3, 96**3, 128**3])
def test_patches_keep_the_rules(median, stride, most) -> None:
    patch = choose_patch(found_of(median), stride, most)
    assert np.prod(patch) <= most and all(p % stride == 0 for p in patch) and max(patch) >= 2 * stride
    padded = [p > n for p, n in zip(patch, median)]
    assert sum(padded) <= sum(n < 2 * stride for n in median)
    for axis in range(3):  # no axis could be longer with the others as they are
        longer = [p + stride * (a == axis) for a, p in enumerate(patch)]
        assert np.prod(longer) > most or longer[axis] > median[axis]


def test_a_larger_budget_shows_at_least_as_much_of_the_worst_axis() -> None:
    median = (160, 200, 140)
    shown = [
        min(p / n for p, n in zip(choose_patch(found_of(median), 16, most), median))
        for most in range(2 * 16**3, 128**3, 50_000)
    ]
    assert shown == sorted(shown) and shown[0] < shown[-1]


def test_a_budget_below_the_smallest_patch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"most_voxels=8191: expected at least 8192"):
        choose_patch(found_of((64, 64, 64)), 16, 8191)
    assert sorted(choose_patch(found_of((64, 64, 64)), 16, 8192)) == [16, 16, 32]


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def part_volumes(mask: np.ndarray, voxel_ml: float) -> list[float]:
    """Sizes of connected parts by flood fill over 26 neighbours."""
    left, sizes = {tuple(v) for v in np.argwhere(mask)}, []
    while left:
        todo, size = [left.pop()], 0
        while todo:
            voxel = todo.pop()
            size += 1
            for step in itertools.product((-1, 0, 1), repeat=3):
                near = tuple(int(a + b) for a, b in zip(voxel, step))
                if near in left:
                    left.discard(near)
                    todo.append(near)
        sizes.append(size * voxel_ml)
    return sizes


def lesion_manifest(root: Path) -> Path:
    """Four heads of unlike size; case n has n separate lesions of unlike size, of a label file with 1 x 1 x 4 mm."""
    scans = []
    for number in range(4):
        shape = 30 + 4 * number, 40, 12
        rng = np.random.default_rng(number)
        voxels = rng.normal(100, 5, shape).astype(np.float32)
        label = np.zeros(shape, np.uint8)
        for lesion in range(number):
            label[4 + 8 * lesion : 6 + 8 * lesion + lesion, 10:14, 4:7] = 1
        affine = np.diag([1.0, 1.0, 4.0, 1.0])
        for name, array in ((f"{number}_t1", voxels), (f"{number}_lesion", label)):
            nib.save(nib.Nifti1Image(array, affine), root / f"{name}.nii.gz")
        scans.append(Scan("d", str(number), "", "t1", f"{number}_t1.nii.gz", {"x_mask": f"{number}_lesion.nii.gz"}))
    write_manifest(root / "m.csv", scans)
    return root / "m.csv"


def test_fingerprint_against_loops(tmp_path: Path) -> None:
    spec = PreprocessSpec(spacing_mm=(1, 1, 4), labels="nearest", margin_mm=0)
    prepare(read_manifest(lesion_manifest(tmp_path)), tmp_path / "store", spec, workers=1)
    store = Store.open(tmp_path / "store")
    cases, _ = find_cases(store, ["t1"], "x")
    found = fingerprint(store, cases)
    masks = [store.volume(case.session, case.label) != 0 for case in cases]
    parts = [part_volumes(mask, 0.004) for mask in masks]
    assert [len(p) for p in parts] == [0, 1, 2, 3]
    assert (found.cases, found.read, found.empty) == (4, 4, 1)
    assert found.spacing_mm == (1.0, 1.0, 4.0) and found.file_spacing_mm == pytest.approx((1, 1, 4))
    assert found.anisotropy == pytest.approx(4)
    assert found.smallest_vox == (30, 40, 12) and found.median_vox == (36, 40, 12) and found.largest_vox == (42, 40, 12)
    volumes = [sum(p) for p in parts[1:]]
    assert found.foreground_ml == pytest.approx(np.percentile(volumes, [5, 50, 95]))
    assert found.foreground_share[1] == pytest.approx(np.median([m.mean() for m in masks[1:]]))
    assert found.part_ml == pytest.approx(np.percentile(list(itertools.chain(*parts)), [5, 50, 95]))
    assert found.parts == 2
    assert json.loads(json.dumps(found.to_dict()))["anisotropy"] == pytest.approx(4)
    empty = fingerprint(store, cases[:1])
    assert empty.empty == 1 and math.isnan(empty.part_ml[0]) and math.isnan(empty.parts)
    assert choose_patch(empty, 8, 64**3) == (24, 40, 8)
    with pytest.raises(ConfigError, match="no case"):
        fingerprint(store, [])


# ---- the grid --------------------------------------------------------------------------------------------------------


def manifest_of(root: Path, spacings, axes: str = "RAS") -> Manifest:
    scans = []
    for number, spacing in enumerate(spacings):
        path = root / f"{number}.nii"
        affine = np.diag([*spacing, 1.0])
        image = nib.Nifti1Image(np.zeros((12, 13, 14), np.uint8), affine)
        turned = nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(axes)
        )
        nib.save(image.as_reoriented(turned), path)
        scans.append(Scan("d", str(number), "", "t1", str(path)))
    write_manifest(root / "m.csv", scans)
    return read_manifest(root / "m.csv")


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SRA", "PIR"])
def test_spacing_is_the_median_along_ras_axes_however_files_are_stored(tmp_path: Path, axes: str) -> None:
    manifest = manifest_of(tmp_path, [(1, 1.2, 2), (0.9, 1.1, 1.5), (1.1, 1.3, 2.5)], axes)
    assert choose_spacing(manifest) == (1.0, 1.2, 2.0)


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_a_thick_axis_gets_its_tenth_percentile_but_stays_the_coarsest(tmp_path: Path, thick: int) -> None:
    def turned(spacing):
        return tuple(np.roll(spacing, thick - 2))

    coarse = [*[(0.5, 0.7, 5.0)] * 8, *[(0.5, 0.7, 3.0)] * 3]
    assert choose_spacing(manifest_of(tmp_path, map(turned, coarse))) == turned((0.5, 0.7, 3.0))
    some_fine = [*[(0.5, 0.7, 5.0)] * 8, *[(0.5, 0.7, 0.4)] * 3]
    assert choose_spacing(manifest_of(tmp_path, map(turned, some_fine))) == turned((0.5, 0.7, 0.7))
    mild = [*[(0.9, 1.0, 3.0)] * 8, *[(0.9, 1.0, 1.0)] * 3]  # three times as coarse is not more than three times
    assert choose_spacing(manifest_of(tmp_path, map(turned, mild))) == turned((0.9, 1.0, 3.0))


def test_what_half_of_the_scans_have_is_taken_exactly(tmp_path: Path) -> None:
    """Rounded to .49 mm, every scan of .48828 mm would be resampled, half a voxel off at the end of its axis."""
    exact = (0.5, 0.48828125, 0.48828125)
    assert choose_spacing(manifest_of(tmp_path, [exact] * 3 + [(1.0, 0.7, 0.7)] * 2)) == (0.5, 0.488281, 0.488281)
    mixed = [(0.5, 0.48, 0.488), (0.5, 0.4912, 0.488), (0.5, 0.5, 0.488)]
    assert choose_spacing(manifest_of(tmp_path, mixed)) == (0.5, 0.49, 0.488)


def test_unreadable_headers_are_left_to_the_doctor(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [(1, 1, 1), (1, 1, 1), (2, 2, 2)])
    (tmp_path / "2.nii").write_bytes(b"no image")
    assert choose_spacing(manifest) == (1.0, 1.0, 1.0)
    (tmp_path / "0.nii").write_bytes(b"no image")
    (tmp_path / "1.nii").unlink()
    with pytest.raises(ManifestError, match=r"m\.csv: no scan has a header that can be read"):
        choose_spacing(manifest)


def test_prepare_auto_writes_numbers_and_goes_on_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = lesion_manifest(tmp_path)
    words = ["prepare", f"manifest={first}", f"store={tmp_path / 'store'}", "preprocess.spacing_mm=auto", "workers=1"]
    assert cli.main(words) == 0
    assert "preprocess.spacing_mm=[1.0, 1.0, 4.0]" in capsys.readouterr().out
    spec = json.loads((tmp_path / "store" / "spec.json").read_text())["preprocess"]
    assert spec["spacing_mm"] == [1.0, 1.0, 4.0]
    rows = list(csv.reader(first.open()))
    for number in range(10, 20):  # the manifest grows: alone, its new scans would ask for another grid
        nib.save(
            nib.Nifti1Image(np.ones((20, 20, 20), np.float32), np.diag([2.0, 2, 2, 1])), tmp_path / f"{number}.nii"
        )
        rows.append(["d", str(number), "", "t1", f"{number}.nii", ""])
    with first.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    assert choose_spacing(read_manifest(first)) == (2.0, 2.0, 2.0)
    assert cli.main(words) == 0
    assert "preprocess.spacing_mm=[1.0, 1.0, 4.0]" in capsys.readouterr().out


# ---- real scans ------------------------------------------------------------------------------------------------------


def test_real_headers(data3d: Path, tmp_path: Path) -> None:
    def chosen(paths) -> tuple[float, float, float]:
        write_manifest(tmp_path / "m.csv", [Scan("d", str(n), "", "t1", str(p)) for n, p in enumerate(paths)])
        return choose_spacing(read_manifest(tmp_path / "m.csv"))

    stroke = sorted((data3d / "isles22").glob("*/*_[ADF][DWL][CIA]*.nii.gz"))
    assert len(stroke) == 3 and chosen(stroke) == (2.0, 2.0, 2.0)
    x, y, z = chosen(sorted((data3d / "openms_long").glob("patient*/study*/*.nii.gz")))
    assert x == y and 0.5 < x < 1 and 3 <= z <= 4
    assert chosen(sorted((data3d / "msd_hippocampus" / "imagesTr").glob("*.nii.gz"))) == (1.0, 1.0, 1.0)
