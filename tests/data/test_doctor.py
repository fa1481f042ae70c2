"""The doctor: each fault named once, in the row where it belongs, and no file takes another down with it."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data import doctor
from brainfm.data.doctor import Fault, examine, write_faults
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_left_out, write_manifest

SHAPE = (9, 10, 11)


def _save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> str:
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path.name


def _noise(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)


def _manifest(folder: Path, scans: dict[str, str], **labels: dict[str, str]) -> Manifest:
    """One session a scan; name -> file."""
    rows = [
        Scan("d", name, "", "t1", path, {column: files[name] for column, files in labels.items() if name in files})
        for name, path in scans.items()
    ]
    write_manifest(folder / "m.csv", rows)
    return read_manifest(folder / "m.csv")


def _by_subject(faults: list[Fault]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for fault in faults:
        found.setdefault(fault.subject, []).append(fault.fault)
    return found


def _bad_files(folder: Path) -> dict[str, tuple[str, str]]:
    """Subject -> (file, what the doctor must say)."""
    whole = folder / "whole.nii.gz"
    _save(whole, _noise(99))
    packed = whole.read_bytes()
    (folder / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"not an image"))
    nan = _noise(1).astype(np.float32)
    nan[0, 0, 0] = np.nan
    colour = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    askew = nib.Nifti1Image(_noise(2), np.eye(4))
    askew.set_sform(np.diag([1, 1, 1.5, 1]), code=1)
    askew.set_qform(np.eye(4), code=1)
    nib.save(askew, folder / "askew.nii.gz")
    return {
        "gone": ("gone.nii.gz", "no such file"),
        "cut": ("cut.nii.gz", "cut short or damaged"),
        "text": ("text.nii.gz", "not a single-file NIfTI"),
        "nan": (_save(folder / "nan.nii.gz", nan), "1 of 990 voxels are NaN"),
        "flat": (_save(folder / "flat.nii.gz", np.zeros(SHAPE, np.int16)), "all voxels have the value 0"),
        "series": (_save(folder / "series.nii.gz", _noise(3, (*SHAPE, 2))), "4D"),
        "complex": (_save(folder / "complex.nii.gz", _noise(4).astype(np.complex64)), "complex"),
        "colour": (_save(folder / "colour.nii.gz", colour), "RGB"),
        "thin": (_save(folder / "thin.nii.gz", _noise(5, (10, 10, 4))), "only 4 slices"),
        "askew": ("askew.nii.gz", "sform and qform disagree"),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_each_kind_of_fault_is_named_once_and_good_scans_are_not(tmp_path: Path, workers: int) -> None:
    bad = _bad_files(tmp_path)
    good = {f"good{i}": _save(tmp_path / f"good{i}.nii.gz", _noise(10 + i)) for i in range(3)}
    manifest = _manifest(tmp_path, {**{name: file for name, (file, _) in bad.items()}, **good})
    steps: list[tuple[int, int]] = []
    found = _by_subject(examine(manifest, workers, lambda done, total: steps.append((done, total))).faults)
    assert set(found) == set(bad)
    for name, (_, text) in bad.items():
        assert len(found[name]) == 1, found[name]
        assert text in found[name][0]
    assert steps == [(i + 1, len(bad) + 3) for i in range(len(bad) + 3)]


def test_the_same_content_is_found_however_it_is_stored(tmp_path: Path) -> None:
    voxels = _noise(1)
    flipped = nib.Nifti1Image(voxels[::-1].astype(np.float32), np.diag([-1.0, 1, 1, 1]))
    nib.save(flipped, tmp_path / "c.nii")
    scans = {
        "a": _save(tmp_path / "a.nii.gz", voxels),
        "b": _save(tmp_path / "b.nii", voxels, np.diag([2.0, 2, 2, 1])),
        "c": "c.nii",
        "d": _save(tmp_path / "d.nii.gz", _noise(2)),
        "e": "d.nii.gz",
    }
    found = _by_subject(examine(_manifest(tmp_path, scans)).faults)
    assert set(found) == {"b", "c", "e"}
    assert found["b"] == found["c"] == ["the same voxels as a.nii.gz of d/a"]
    assert found["e"] == ["the same voxels as d.nii.gz of d/d"]


def test_label_volumes(tmp_path: Path) -> None:
    names = ("ok", "moved", "part", "gone")
    scans = {name: _save(tmp_path / f"{name}.nii.gz", _noise(i)) for i, name in enumerate(names)}
    shifted = np.eye(4)
    shifted[0, 3] = 5
    empty = np.zeros(SHAPE, np.uint8)
    half = np.full(SHAPE, 0.5, np.float32)
    masks = {
        "ok": _save(tmp_path / "ok_m.nii.gz", empty),  # nothing was found in this patient: no fault
        "moved": _save(tmp_path / "moved_m.nii.gz", empty, shifted),
        "part": _save(tmp_path / "part_m.nii.gz", half),
        "gone": "gone_m.nii.gz",
    }
    faults = examine(_manifest(tmp_path, scans, lesion_mask=masks)).faults
    assert [(f.subject, f.contrast, f.path) for f in faults] == [
        (name, "lesion_mask", masks[name]) for name in ("gone", "moved", "part")
    ]
    assert [f.fault for f in faults][:2] == ["no such file", "lies on another grid than every scan of its session"]
    assert "whole numbers" in faults[2].fault


def test_a_label_volume_may_lie_on_any_scan_of_its_session_and_is_listed_once(tmp_path: Path) -> None:
    _save(tmp_path / "t1.nii.gz", _noise(1))
    _save(tmp_path / "t2.nii.gz", _noise(2), np.diag([2.0, 2, 2, 1]))
    _save(tmp_path / "m.nii.gz", np.ones(SHAPE, np.uint8), np.diag([2.0, 2, 2, 1]))
    rows = [Scan("d", "s", "", c, f"{c}.nii.gz", {"x_mask": "m.nii.gz", "y_mask": "n.nii.gz"}) for c in ("t1", "t2")]
    write_manifest(tmp_path / "m.csv", rows)
    faults = examine(read_manifest(tmp_path / "m.csv")).faults
    assert [(f.contrast, f.fault) for f in faults] == [("y_mask", "no such file")]


def _inspect_or_die(path: Path, kind: str) -> object:
    """Stands for a file whose reading ends the process, as the kernel does when memory runs out."""
    if path.name.startswith("killer"):
        os._exit(9)
    return _INSPECT(path, kind)


_INSPECT = doctor.inspect


def test_a_worker_that_dies_takes_only_its_own_file_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "inspect", _inspect_or_die)
    scans = {f"s{i}": _save(tmp_path / f"s{i}.nii.gz", _noise(i)) for i in range(6)}
    scans["k"] = _save(tmp_path / "killer.nii.gz", _noise(7))
    scans["z"] = "gone.nii.gz"
    found = _by_subject(examine(_manifest(tmp_path, scans), workers=2).faults)
    assert set(found) == {"k", "z"}
    assert "died" in found["k"][0]


def test_the_list_of_faults(tmp_path: Path) -> None:
    faults = [Fault("d", "s", "", "t1", "a,b.nii.gz", 'a "fault"')]
    write_faults(tmp_path / "out" / "faults.csv", faults)
    with open(tmp_path / "out" / "faults.csv", encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["dataset", "subject", "session", "contrast", "path", "fault"],
            ["d", "s", "", "t1", "a,b.nii.gz", 'a "fault"'],
        ]
    write_faults(tmp_path / "none.csv", [])
    assert len((tmp_path / "none.csv").read_text().splitlines()) == 1


# ---- what looks like no scan, and what is no fault but should be known -----------------------------------------------


def test_content_that_is_no_scan_is_a_fault(tmp_path: Path) -> None:
    shape = (24, 24, 24)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))
    ball = (grid**2).sum(0)
    rng = np.random.default_rng(0)
    scan = np.where(ball < 0.8, 100 + 40 * grid[0] + rng.normal(0, 5, shape), 0)
    spiked = scan.copy()
    spiked[ball < 0.1] = 3e38
    scans = {
        "labels": np.select([ball < 0.2, ball < 0.5, ball < 0.8], [17, 3, 2], 0).astype(np.int16),
        "probability": np.clip((0.9 - ball) * 3, 0, 1).astype(np.float32),
        "spiked": spiked.astype(np.float32),
        "scan": scan.astype(np.float32),
        "normalised": (scan / scan.max() * 0.999).astype(np.float32),
        "bytes": np.rint(scan).astype(np.uint8),
    }
    manifest = _manifest(tmp_path, {name: _save(tmp_path / f"{name}.nii.gz", v) for name, v in scans.items()})
    found = _by_subject(examine(manifest).faults)
    assert set(found) == {"labels", "probability", "spiked"}
    assert found["labels"] == ["does not look like a scan: it holds patches of 3 whole numbers, as a label map does"]
    assert "in a map of probabilities" in found["probability"][0]
    assert "numbers of up to 3e+38" in found["spiked"][0]


def test_empty_masks_masks_of_several_values_and_doubles_are_noted(tmp_path: Path) -> None:
    one, two, none = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    one[2, 2, 2] = two[3, 3, 3] = 1
    two[2, 2, 2] = 2
    scans = {name: _save(tmp_path / f"{name}.nii.gz", _noise(i)) for i, name in enumerate("abcd")}
    masks = {name: _save(tmp_path / f"{name}_m.nii.gz", m) for name, m in zip("abcd", (one, two, none, none))}
    manifest = _manifest(tmp_path, scans, lesion_mask=masks, tissue_labels={"b": masks["b"]})
    found = examine(manifest)
    assert found.faults == []
    assert found.notes == [
        "lesion_mask: 2 of 4 are empty: c_m.nii.gz, d_m.nii.gz",
        "lesion_mask: 1 of 4 hold several values (1, 2), which all count as lesion; labels.lesion= keeps them apart: "
        "b_m.nii.gz",
    ]
    full = _save(tmp_path / "full.nii.gz", one * 0 + 1)
    filled = examine(_manifest(tmp_path, {"a": scans["a"]}, lesion_mask={"a": full}, tissue_labels={"a": full}))
    assert filled.notes == ["lesion_mask: 1 of 1 fill the whole image: full.nii.gz"]
    minus = _save(tmp_path / "minus.nii.gz", one.astype(np.int16) - 1)
    wrong = examine(_manifest(tmp_path, {"a": scans["a"]}, lesion_mask={"a": minus}))
    assert "labels from -1 to 0, expected whole numbers from 0 on" in wrong.faults[0].fault and not wrong.notes
    rows = [Scan("d", "s", "", "t1", scans[n], {}) for n in "ba"]
    write_manifest(tmp_path / "m.csv", rows)
    (note,) = examine(read_manifest(tmp_path / "m.csv")).notes
    assert note == "several scans of one contrast in a session, 1 times: d/s has 2 of t1, a.nii.gz comes first"


def test_the_doctor_names_what_the_manifest_left_out_and_why(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, {"a": _save(tmp_path / "a.nii.gz", _noise(1))})
    many = [(f"p{i}_seg.nii.gz", "label or mask by name") for i in range(9)]
    write_left_out(manifest.path, [*many, ("x.nrrd", "format that is not read")])
    assert examine(manifest).notes == [
        "manifest left out 1 files (format that is not read): x.nrrd",
        "manifest left out 9 files (label or mask by name): p0_seg.nii.gz, p1_seg.nii.gz, p2_seg.nii.gz, "
        "p3_seg.nii.gz, p4_seg.nii.gz and 4 more",
    ]


def test_a_mask_that_is_off_by_rounding_is_no_fault(tmp_path: Path) -> None:
    near, far = np.eye(4), np.eye(4)
    near[:3, 3], far[0, 3] = 5e-3, 0.2
    scans = {name: _save(tmp_path / f"{name}.nii.gz", _noise(i)) for i, name in enumerate(("near", "far"))}
    one = np.ones(SHAPE, np.uint8)
    one[0] = 0
    masks = {"near": _save(tmp_path / "n.nii.gz", one, near), "far": _save(tmp_path / "f.nii.gz", one, far)}
    assert [f.subject for f in examine(_manifest(tmp_path, scans, lesion_mask=masks)).faults] == ["far"]
