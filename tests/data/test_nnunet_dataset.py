"""A manifest as a data set of nnU-Net, and back."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.nnunet_dataset import write_dataset
from brainfm.errors import ConfigError, FileError, ManifestError
from tests import phantoms

SHAPE = (10, 12, 8)


def cohort(root: Path, column: str = "lesion_labels") -> Path:
    """Two sessions in other axis orders with labels 3 and 7, one without FLAIR, one whose label lies elsewhere."""
    rng, rows = np.random.default_rng(0), []
    for number, codes in enumerate(("RAS", "LPS", "RAS", "RAS")):
        shape = SHAPE
        affine = phantoms.centred(phantoms.axes(codes), (2, 2, 3), shape)
        labels = np.zeros(shape, np.uint8)
        labels[2:5, 3:5, 2] = 3
        labels[6, 7, 4:6] = 7
        at = affine.copy()
        at[0, 3] += 40 * (number == 3)
        nib.save(nib.Nifti1Image(labels, at), root / f"{number}_labels.nii.gz")
        for contrast in ("t1", "flair")[: 1 if number == 2 else 2]:
            phantoms.write(root / f"{number}_{contrast}.nii.gz", phantoms.head(shape, affine, rng), affine)
            rows.append(
                Scan(
                    "d", f"p{number}", "", contrast, f"{number}_{contrast}.nii.gz", {column: f"{number}_labels.nii.gz"}
                )
            )
    write_manifest(root / "manifest.csv", rows)
    return root / "manifest.csv"


def test_sessions_become_cases_whose_arrays_are_ours_turned(tmp_path: Path) -> None:
    manifest = read_manifest(cohort(tmp_path))
    out = tmp_path / "Dataset501_lesion"
    written = write_dataset(manifest, out, "lesion", ("flair", "t1"))
    assert written.cases == ("p0", "p1") and dict(written.labels) == {"background": 0, "lesion_3": 1, "lesion_7": 2}
    assert dict(written.left_out)["p2"] == "has no flair" and "another grid" in dict(written.left_out)["p3"]
    about = json.loads((out / "dataset.json").read_text())
    assert about["channel_names"] == {"0": "flair", "1": "t1"} and about["numTraining"] == 2
    for name in written.cases:
        image, labels = (nib.load(out / place) for place in (f"imagesTr/{name}_0001.nii.gz", f"labelsTr/{name}.nii.gz"))
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert np.allclose(image.affine, labels.affine) and image.shape == labels.shape
        assert set(np.unique(labels.dataobj)) == {0, 1, 2}
    there = nib.as_closest_canonical(nib.load(tmp_path / "1_labels.nii.gz"))
    assert np.array_equal(np.asarray(labels.dataobj) == 2, np.asarray(there.dataobj) == 7)


def test_the_manifest_of_what_was_written_has_the_same_sessions(tmp_path: Path) -> None:
    from brainfm.cli import main

    out = tmp_path / "Dataset501_lesion"
    words = [f"manifest={cohort(tmp_path)}", f"out={out}", "target=lesion", "contrasts=[flair,t1]"]
    assert main(["export", "format=nnunet", *words]) == 0
    words = [f"root={out}", "labels.lesion=labelsTr/*.nii.gz", "layout=nnunet", f"out={tmp_path / 'again.csv'}"]
    assert main(["manifest", *words]) == 0
    again = read_manifest(tmp_path / "again.csv")
    assert {(scan.subject, scan.contrast) for scan in again.scans} == {
        (p, c) for p in ("p0", "p1") for c in ("flair", "t1")
    }
    assert all(scan.columns["lesion_labels"] for scan in again.scans)


def test_a_mask_is_one_class(tmp_path: Path) -> None:
    manifest = read_manifest(cohort(tmp_path, "lesion_mask"))
    written = write_dataset(manifest, tmp_path / "Dataset001_x", "lesion", ("t1",))
    assert written.cases == ("p0", "p1", "p2") and dict(written.labels) == {"background": 0, "lesion": 1}


def test_refusals(tmp_path: Path) -> None:
    manifest = read_manifest(cohort(tmp_path))
    with pytest.raises(ConfigError, match="DatasetNNN_Name"):
        write_dataset(manifest, tmp_path / "lesions", "lesion", ("t1",))
    with pytest.raises(ManifestError, match=r"tumour_mask or tumour_labels, found lesion_labels"):
        write_dataset(manifest, tmp_path / "Dataset001_x", "tumour", ("t1",))
    with pytest.raises(ManifestError, match="none of 4 sessions"):
        write_dataset(manifest, tmp_path / "Dataset001_x", "lesion", ("swi",))
    for contrasts in ((), ("flair", "flair")):
        with pytest.raises(ConfigError, match="expected one or more channels, each once"):
            write_dataset(manifest, tmp_path / "Dataset001_x", "lesion", contrasts)
    with pytest.raises(FileError, match="nothing can be written there"):
        write_dataset(manifest, tmp_path / "manifest.csv" / "Dataset001_x", "lesion", ("t1",))
    assert not (tmp_path / "Dataset001_x").exists()
    (tmp_path / "Dataset002_x" / "labelsTr").mkdir(parents=True)
    with pytest.raises(ConfigError, match="cases of two data sets would mix; expected a free place"):
        write_dataset(manifest, tmp_path / "Dataset002_x", "lesion", ("t1",))
