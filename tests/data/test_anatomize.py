"""Labels for a manifest: of which scan, where, on which grid; nothing is made twice, nothing flagged gets labels."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data import anatomize as module
from brainfm.data import labelling
from brainfm.data.anatomize import anatomize
from brainfm.data.labelling import pick
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.imaging import nifti
from brainfm.imaging.anatomy import VOLUMES, Tissues
from brainfm.specs import PreprocessSpec
from brainfm.volume import Volume
from tests import phantoms

TILTED = phantoms.centred(phantoms.rotation(12, 20), (2.5, 2.5, 2.5), (36, 40, 34))


def _fake(volume: Volume) -> Tissues:
    """The marker, on the left of every head, is white matter; dark scans are flagged, and one is refused."""
    if volume.voxels.max() < 10:
        raise ScanError("too dark")
    labels = np.where(volume.voxels > 200, 3, np.where(volume.voxels > 50, 2, 0)).astype(np.uint8)
    reason = "icv of 3 ml" if volume.voxels.max() < 100 else ""
    return Tissues(labels, dict.fromkeys(VOLUMES, 1.5), {"contrast": 2.0}, 0.9, reason)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    monkeypatch.setattr(module.anatomy, "check_packages", lambda: None)
    monkeypatch.setattr(module.anatomy, "segment", lambda volume: seen.append(1) or _fake(volume))
    return seen


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """a: an LPS T1 and a FLAIR; b: an oblique T2; c: flagged; d: refused; e: a DWI alone."""
    root = tmp_path / "in"
    root.mkdir()
    rng = np.random.default_rng(0)
    plain = phantoms.centred(np.eye(3), (2.5, 2.5, 2.5), (36, 40, 34))
    scans = []
    for subject, contrast, affine, axes, gain in (
        ("a", "t1", plain, "LPS", 1), ("a", "flair", plain, "RAS", 1), ("b", "t2", TILTED, "PIR", 1),
        ("c", "t1", plain, "RAS", 0.2), ("d", "t1", plain, "RAS", 0.01), ("e", "dwi", plain, "RAS", 1),
    ):  # fmt: skip
        path = root / f"{subject}_{contrast}.nii.gz"
        voxels = phantoms.head((36, 40, 34), affine, rng) * np.float32(gain)
        nifti.write(path, Volume(voxels, affine), axes)
        scans.append(Scan("toy", subject, "1", contrast, path.name, {"age": "40"}))
    write_manifest(root / "manifest.csv", scans)
    return read_manifest(root / "manifest.csv")


def scan(contrast: str, path: str = "x") -> Scan:
    return Scan("d", "s", "1", contrast, path)


def test_one_scan_of_a_session_by_priority() -> None:
    session = [scan("flair"), scan("dwi"), scan("t2", "b"), scan("t2", "a")]
    assert pick(session, labelling.PRIORITY) == session[3]
    assert pick(session, ["flair", "t2"]) == session[0]
    assert pick(session, ["t1", "others"]) == session[1]
    assert pick(session, ["t1", "pd"]) is None


def test_labels_lie_on_the_grid_of_the_scan_and_left_stays_left(
    manifest: Manifest, calls: list[int], tmp_path: Path
) -> None:
    report = anatomize(manifest, tmp_path / "out", ["t1", "t2"])
    assert (report.done, report.skipped, report.without, len(calls)) == (4, 0, 1, 4)
    for subject, name in (("a", "t1"), ("b", "t2")):
        like = nib.load(manifest.path.parent / f"{subject}_{name}.nii.gz")
        made = nib.load(tmp_path / "out" / "labels" / "toy" / subject / "1" / f"{name}_tissue.nii.gz")
        assert made.shape == like.shape and made.get_data_dtype() == np.uint8
        assert np.allclose(made.affine, like.affine, atol=1e-5)
        place = phantoms.world_mm(made.shape, made.affine)[np.asarray(made.dataobj) == 3].mean(0)
        assert np.allclose(place, phantoms.MARKER_MM, atol=1.5)


def test_flagged_scans_are_named_and_have_no_labels(manifest: Manifest, calls: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = anatomize(manifest, out, ["t1", "t2"])
    assert {(Path(f.path).name, f.reason) for f in report.flagged} == {
        ("c_t1.nii.gz", "icv of 3 ml"), ("d_t1.nii.gz", "too dark"),
    }  # fmt: skip
    with open(out / "volumes.csv", encoding="utf-8") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert rows["a"]["gm_ml"] == "1.50" and rows["a"]["flag"] == "" and rows["a"]["quality"] == "0.900"
    assert rows["c"]["flag"] == "icv of 3 ml" and rows["d"]["gm_ml"] == ""
    assert {p.name for p in out.rglob("*.nii.gz")} == {"t1_tissue.nii.gz", "t2_tissue.nii.gz"}
    made = read_manifest(out / "manifest.csv")
    assert {s.subject for s in made.scans if s.columns["tissue_labels"]} == {"a", "b"}
    assert all(s.columns["age"] == "40" for s in made.scans) and len(made.scans) == len(manifest.scans)
    assert not any(Path(s.columns["tissue_labels"]).is_absolute() for s in made.scans)


def test_the_new_manifest_brings_the_labels_into_a_store(manifest: Manifest, calls: list[int], tmp_path: Path) -> None:
    anatomize(manifest, tmp_path / "out", ["t1", "t2"])
    made = read_manifest(tmp_path / "out" / "manifest.csv")
    prepare(made, tmp_path / "store", PreprocessSpec(spacing_mm=(3, 3, 3)), 0)
    sessions = Store.open(tmp_path / "store").sessions
    assert {s.subject for s in sessions if "tissue_labels" in {label.name for label in s.labels}} == {"a", "b"}


def test_only_what_is_missing_or_changed_is_made_again(manifest: Manifest, calls: list[int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    anatomize(manifest, out, ["t1", "t2"])
    first = (out / "manifest.csv").read_bytes(), (out / "volumes.csv").read_bytes()
    again = anatomize(manifest, out, ["t1", "t2"])
    assert (again.done, again.skipped, len(calls)) == (0, 4, 4)
    labels = out / "labels" / "toy"
    (labels / "a" / "1" / "t1_tissue.nii.gz").write_bytes(b"cut short")
    (labels / "b" / "1" / "t2_tissue.json").unlink()
    with open(manifest.path.parent / "c_t1.nii.gz", "ab") as file:
        file.write(b"\0")
    assert anatomize(manifest, out, ["t1", "t2"]).done == 3
    assert ((out / "manifest.csv").read_bytes(), (out / "volumes.csv").read_bytes())[0] == first[0]
    assert not [p for p in out.rglob("*") if p.name.endswith((".part", ".tmp"))]


def test_a_scan_corrected_in_place_is_made_again_and_a_copy_is_not(
    manifest: Manifest, calls: list[int], tmp_path: Path
) -> None:
    anatomize(manifest, tmp_path / "out", ["t1", "t2"])
    path = manifest.path.parent / "c_t1.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, (1, 1))
    assert anatomize(manifest, tmp_path / "out", ["t1", "t2"]).done == 0
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # the same size
    assert anatomize(manifest, tmp_path / "out", ["t1", "t2"]).done == 1


def test_an_error_that_nobody_foresaw_is_that_of_its_scan(
    manifest: Manifest, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.anatomy.segment

    def unforeseen(volume: Volume) -> Tissues:
        if not calls:
            calls.append(1)
            raise ZeroDivisionError("nobody thought of this")
        return real(volume)

    monkeypatch.setattr(module.anatomy, "segment", unforeseen)
    report = anatomize(manifest, tmp_path / "out", ["t1", "t2"])
    assert report.done == 4 and any("ZeroDivisionError: nobody thought" in flagged.reason for flagged in report.flagged)


def test_another_version_makes_everything_again(
    manifest: Manifest, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anatomize(manifest, tmp_path / "out", ["t1"])
    monkeypatch.setattr(module.anatomy, "VERSION", -1)
    assert anatomize(manifest, tmp_path / "out", ["t1"]).skipped == 0


def test_an_interrupted_run_goes_on(
    manifest: Manifest, calls: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        anatomize(manifest, tmp_path / "out", ["t1", "t2"], progress=stop)
    assert len(calls) == 2
    report = anatomize(manifest, tmp_path / "out", ["t1", "t2"])
    assert (report.done, report.skipped) == (2, 2)


def test_workers_refuse_small_scans_and_leave_the_environment_alone(tmp_path: Path) -> None:
    """Real workers and the real segmentation, which refuses these before any registration."""
    pytest.importorskip("SimpleITK")
    pytest.importorskip("nilearn")
    scans = []
    for name in ("a", "b"):
        nifti.write(tmp_path / f"{name}.nii.gz", Volume(np.ones((9, 9, 9), np.float32), np.eye(4)))
        scans.append(Scan("toy", name, "", "t1", f"{name}.nii.gz"))
    write_manifest(tmp_path / "manifest.csv", scans)
    before = dict(os.environ)
    report = anatomize(read_manifest(tmp_path / "manifest.csv"), tmp_path / "out", workers=2)
    assert len(report.flagged) == 2 and "whole brain" in report.flagged[0].reason
    assert dict(os.environ) == before


def test_refusals(manifest: Manifest, calls: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="contrasts: found 't9'"):
        anatomize(manifest, tmp_path / "out", ["t9"])
    with pytest.raises(ManifestError, match="would be replaced"):
        anatomize(manifest, manifest.path.parent, ["t1"])
    anatomize(manifest, tmp_path / "out", ["t1"])
    with pytest.raises(ManifestError, match="label maps in the column tissue_labels already"):
        anatomize(read_manifest(tmp_path / "out" / "manifest.csv"), tmp_path / "other", ["t1"])
    (manifest.path.parent / "a_t1.nii.gz").unlink()
    with pytest.raises(ManifestError, match="1 of 6 files"):
        anatomize(manifest, tmp_path / "out", ["t1"])


@pytest.mark.parametrize("name", ["..", "", "a/b", "ä b"])
def test_no_key_leaves_its_folder(name: str) -> None:
    assert "/" not in labelling._as_folder(name) and labelling._as_folder(name) not in ("", ".", "..")
    assert labelling._as_folder(name) != labelling._as_folder(name + "'")
