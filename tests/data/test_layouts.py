"""Layouts: every kind of folder gives the right dataset, subject, session and contrast, without opening an image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brainfm.data.layouts import Found, find
from brainfm.data.manifest import read_manifest, session_labels, write_manifest
from brainfm.data.participants import match_ids
from brainfm.errors import ConfigError, ManifestError


def _make(root: Path, *paths: str) -> Path:
    """Empty files: nothing that opens them as images would get far."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def _rows(found: Found) -> list[tuple[str, str, str, str]]:
    return [(*scan.key, scan.contrast) for scan in found.scans]


def _note(found: Found, text: str) -> str:
    """The one note that holds the text."""
    (note,) = [note for note in found.notes if text in note]
    return note


def test_bids(tmp_path: Path) -> None:
    root = _make(
        tmp_path / "ds1",
        "dataset_description.json",
        "sub-01/ses-t1/anat/sub-01_ses-t1_acq-MPRAGE_T1w.nii.gz",
        "sub-01/ses-t1/anat/sub-01_ses-t1_FLAIR.nii",
        "sub-01/ses-t1/anat/sub-01_ses-t1_FLAIR.json",
        "sub-01/ses-t1/func/sub-01_ses-t1_task-rest_bold.nii.gz",
        "sub-01/ses-t1/fmap/sub-01_ses-t1_magnitude1.nii.gz",
        "sub-01/ses-t1/dwi/sub-01_ses-t1_dwi.nii.gz",
        "sub-01/ses-t1/dwi/sub-01_ses-t1_dwi.bval",
        "sub-02/anat/sub-02_inplaneT2.nii.gz",
        "sub-02/anat/sub-02_desc-brain_mask.nii.gz",
        "sub-02/anat/._sub-02_T1w.nii.gz",
        "derivatives/lesions/sub-02/anat/sub-02_label-lesion_roi.nii.gz",
        "derivatives/x/sub-02/anat/sub-02_T1w.nii.gz",
    )
    (root / "participants.tsv").write_text("participant_id\tAge\tgender\nsub-01\t30\tfemale\nsub-02\t89+\tn/a\n")
    found = find(root, masks={"lesion": "*_label-lesion_roi.nii.gz"})
    assert found.layout == "bids"
    assert _rows(found) == [
        ("ds1", "sub-01", "ses-t1", "flair"),
        ("ds1", "sub-01", "ses-t1", "t1"),
        ("ds1", "sub-02", "", "t2"),
    ]
    assert found.scans[0].columns == {"age": "30", "sex": "F"}
    assert found.scans[2].columns["sex"] == ""
    assert found.scans[2].columns["lesion_mask"].endswith("lesions/sub-02/anat/sub-02_label-lesion_roi.nii.gz")
    assert "left out 2 files" in _note(found, "time series")
    assert ".bval" in _note(found, "many volumes")
    assert "'89+'" in _note(found, "age is not a number")
    assert os.path.isabs(found.scans[0].path)


def test_fomo60k(tmp_path: Path) -> None:
    root = _make(
        tmp_path / "FOMO60K",
        *(f"sub_1/ses_1/{name}.nii.gz" for name in ("t1", "t1_1", "t2s", "gre", "mprage", "dwi_b1000")),
        "sub_1/ses_2/flair.nii.gz",
        "sub_10/ses_1/t1.nii.gz",
    )
    found = find(root)
    assert found.layout == "fomo60k"
    assert _rows(found)[-2:] == [("FOMO60K", "sub_1", "ses_2", "flair"), ("FOMO60K", "sub_10", "ses_1", "t1")]
    assert [row[3] for row in _rows(found)[:6]] == ["dwi", "t1", "t1", "t1", "t2s", "t2s"]


def test_fomo_finetuning_sets_keep_answers_apart(tmp_path: Path) -> None:
    root = _make(
        tmp_path / "tasks",
        *(f"Task_2/Task_2/preprocessed/sub_{i}/ses_1/{c}.nii.gz" for i in (1, 2) for c in ("flair", "dwi_b1000")),
        *(f"Task_2/Task_2/labels/sub_{i}/ses_1/seg.nii.gz" for i in (1, 2)),
        "Task_3/Task_3/preprocessed/sub_1/ses_1/t1w.nii.gz",
        "Task_3/Task_3/labels/sub_1/ses_1/labels.txt",
    )
    (root / "Task_3/Task_3/labels/sub_1/ses_1/labels.txt").write_text("42.5\n")
    found = find(root, masks={"meningioma": "seg.nii.gz"})
    assert [(scan.dataset, scan.subject, scan.contrast) for scan in found.scans] == [
        *(("Task_2", subject, contrast) for subject in ("sub_1", "sub_2") for contrast in ("dwi", "flair")),
        ("Task_3", "sub_1", "t1"),
    ]
    assert found.scans[2].columns["meningioma_mask"].endswith("labels/sub_2/ses_1/seg.nii.gz")
    assert found.scans[4].columns["label"] == "42.5"


def test_fomo300k_keeps_subjects_of_different_ds_folders_apart(tmp_path: Path) -> None:
    root = _make(
        tmp_path / "FOMO300K",
        "PT001_OASIS1/sub-01/ses-01/t1.nii.gz",
        "PT030_OpenNeuro/ds000001/sub-01/ses-01/sub-01_T1w.nii.gz",
        "PT030_OpenNeuro/ds000002/sub-01/ses-01/sub-01_T1w.nii.gz",
        "PT030_OpenNeuro/ds000002/sub-01/ses-02.zip",
    )
    found = find(root)
    assert found.layout == "fomo300k"
    assert _rows(found) == [
        ("PT001_OASIS1", "sub-01", "ses-01", "t1"),
        ("PT030_OpenNeuro_ds000001", "sub-01", "ses-01", "t1"),
        ("PT030_OpenNeuro_ds000002", "sub-01", "ses-01", "t1"),
    ]
    assert "left out 1 files" in _note(found, ".zip")


def test_openmind_with_masks_of_each_scan(tmp_path: Path) -> None:
    scans = ["ds000001/sub-01/ses-1/anat/sub-01_ses-1_T2w", "ds000001/sub-01/ses-1/anat/sub-01_ses-1_T1w"]
    root = _make(
        tmp_path / "OpenMind",
        *(f"{scan}.nii.gz" for scan in scans),
        *(f"{scan}__Data/{mask}.nii.gz" for scan in scans for mask in ("deface_mask", "fb_mask")),
        "ds000002/sub-01/dwi/sub-01_x.nii.gz",
    )
    (root / "openneuro_metadata.csv").write_text(
        "image_path,anon_mask_path,modality,age\nOpenMind/ds000002/sub-01/dwi/sub-01_x.nii.gz,a,MD,31\n"
    )
    found = find(root, masks={"anatomy": "fb_mask.nii.gz"})
    assert found.layout == "openmind"
    assert _rows(found) == [
        ("ds000001", "sub-01", "ses-1", "t1"), ("ds000001", "sub-01", "ses-1", "t2"), ("ds000002", "sub-01", "", "md")
    ]  # fmt: skip
    assert found.scans[2].columns == {"modality": "MD", "age": "31"}
    assert session_labels(found.scans[:2])["anatomy_mask"].endswith("sub-01_ses-1_T1w__Data/fb_mask.nii.gz")
    assert "1 sessions" in _note(found, "each scan has its own")
    assert "left out 2 files" in _note(found, "__Data")


@pytest.mark.parametrize("numbered", [True, False])
def test_nnunet_and_decathlon(tmp_path: Path, numbered: bool) -> None:
    channels = ("_0000", "_0001") if numbered else ("",)
    root = _make(
        tmp_path / "Dataset001_X",
        *(f"imagesTr/case_{i:03d}{c}.nii.gz" for i in (1, 2) for c in channels),
        *(f"labelsTr/case_{i:03d}.nii.gz" for i in (1, 2)),
        f"imagesTs/case_003{channels[0]}.nii.gz",
    )
    names = '{"0": "T1", "1": "FLAIR"}' if numbered else '{"0": "MRI"}'
    (root / "dataset.json").write_text(f'{{"{"channel_names" if numbered else "modality"}": {names}}}')
    found = find(root)
    assert found.layout == "nnunet"
    expected = ["flair", "t1"] if numbered else ["unknown"]
    assert _rows(found) == [("Dataset001_X", f"case_{i:03d}", "", c) for i in (1, 2) for c in expected]
    assert found.scans[0].columns["seg_labels"].endswith("labelsTr/case_001.nii.gz")
    assert find(root, labels={"tumour": "labelsTr/*"}).scans[0].columns.keys() == {"tumour_labels"}
    assert "test set" in _note(found, "left out 1 files")


FOLDERS = {
    "subjects": (["p07/p07_T1c.nii.gz", "p07/p07_FLAIR.nii.gz"], [("p07", "", "flair"), ("p07", "", "t1c")]),
    "subjects and visits": (
        ["patient01/study1/patient01_study1_T1w.nii.gz", "patient01/study2/patient01_study2_T1w.nii.gz"],
        [("patient01", "study1", "t1"), ("patient01", "study2", "t1")],
    ),
    "all files together": (
        ["IXI012-HH-1211-T1.nii.gz", "sub7_visit2_T2_FLAIR.nii.gz", "T1_case9.nii.gz"],
        [("IXI012-HH-1211", "", "t1"), ("case9", "", "t1"), ("sub7", "visit2", "flair")],
    ),
    "contrasts are folders": (["T1/a1.nii.gz", "FLAIR/a1.nii.gz"], [("a1", "", "flair"), ("a1", "", "t1")]),
    "time points called T1 and T2": (
        ["A/T1/flair.nii.gz", "A/T2/flair.nii.gz"],
        [("A", "T1", "flair"), ("A", "T2", "flair")],
    ),
    "groups of subjects": (
        ["HGG/B18_a/B18_a_t1ce.nii.gz", "LGG/B18_b/B18_b_t2.nii.gz"],
        [("B18_a", "", "t1c"), ("B18_b", "", "t2")],
    ),
    "the same id in two groups": (
        ["north/sub-01/t1.nii.gz", "south/sub-01/t1.nii.gz"],
        [("north_sub-01", "", "t1"), ("south_sub-01", "", "t1")],
    ),
    "a visit inside the id": (
        ["BraTS-GLI-00005-100/BraTS-GLI-00005-100-t1n.nii.gz", "BraTS-GLI-00005-101/BraTS-GLI-00005-101-t2f.nii.gz"],
        [("BraTS-GLI-00005", "100", "t1"), ("BraTS-GLI-00005", "101", "flair")],
    ),
    "folders within a subject": (["s1/anat/scan_t2w.nii.gz", "s1/dwi/ADC.nii"], [("s1", "", "adc"), ("s1", "", "t2")]),
    "one person": (["T1.nii.gz", "FLAIR.nii.gz"], [("cohort", "", "flair"), ("cohort", "", "t1")]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_any_other_folder_is_guessed_and_the_guess_is_told(tmp_path: Path, name: str) -> None:
    paths, rows = FOLDERS[name]
    found = find(_make(tmp_path / "cohort", *paths))
    assert found.layout == "folder"
    assert [(scan.subject, scan.session, scan.contrast) for scan in found.scans] == rows
    assert rows[0][2] in _note(found, "guessed contrasts")
    assert rows[0][0].split("_")[-1] in _note(found, "guessed subjects")


def test_many_folders_in_few_are_subjects_in_groups(tmp_path: Path) -> None:
    root = _make(tmp_path / "c", *(f"{g}/{g[0]}{i}/t1.nii.gz" for g in ("controls", "patients") for i in range(10, 20)))
    assert len({scan.subject for scan in find(root).scans}) == 20
    few = _make(tmp_path / "d", *(f"p{i}/{day}x/t1.nii.gz" for i in range(10) for day in "ab"))
    assert {scan.key[1:] for scan in find(few).scans} == {(f"p{i}", f"{day}x") for i in range(10) for day in "ab"}


def test_datasets_side_by_side_are_read_each_in_its_own_layout(tmp_path: Path) -> None:
    _make(
        tmp_path,
        "ds1/sub-01/anat/sub-01_T1w.nii.gz",
        "ds2/sub-01/anat/sub-01_T1w.nii.gz",
        "mine/patient07/patient07_T1w.nii.gz",
        "mine/patient07/patient07_lesion_mask.nii.gz",
        "nn/imagesTr/c_0000.nii.gz",
        "only_labels/sub-3_lesion_mask.nii.gz",
    )
    (tmp_path / "mine" / "info.csv").write_text("patient_id,age,session_note\n7,53,x\n1,20,y\n")
    masks = {"lesion": "mine/*_lesion_mask.nii.gz|no*such"}
    found = find(tmp_path, masks=masks, participants=tmp_path / "mine" / "info.csv")
    assert found.layout == "several"
    assert _rows(found) == [
        ("ds1", "sub-01", "", "t1"),
        ("ds2", "sub-01", "", "t1"),
        ("mine", "patient07", "", "t1"),
        ("nn", "c", "", "unknown"),
    ]
    assert found.scans[2].columns["age"] == "53"
    assert all("age" not in scan.columns for scan in found.scans if scan.dataset != "mine"), "another dataset's table"
    assert "patient07 = 7" in _note(found, "subjects matched")
    write_manifest(tmp_path / "m.csv", found.scans)
    assert read_manifest(tmp_path / "m.csv").scans[0].path == "ds1/sub-01/anat/sub-01_T1w.nii.gz"


def test_label_files_reach_the_right_sessions(tmp_path: Path) -> None:
    root = _make(
        tmp_path / "long",
        *(f"p1/study{i}/p1_study{i}_T1w.nii.gz" for i in (1, 2)),
        "p1/study1/p1_study1_wm_labels.nii.gz",
        "p1/p1_gt.nii.gz",
        "p9/p9_gt.nii.gz",
    )
    found = find(root, masks={"change": "*_gt.nii.gz"}, labels={"tissue": "study?/*_wm_labels.nii.gz"})
    assert [Path(scan.columns["change_mask"]).name for scan in found.scans] == ["p1_gt.nii.gz"] * 2
    assert ["tissue_labels" in scan.columns for scan in found.scans] == [True, False]
    assert "p9_gt" in _note(found, "belong to no scan")
    flat = _make(tmp_path / "flat", "a_1_T1.nii.gz", "a_10_T1.nii.gz", "a_1_wmh.nii.gz")
    assert ["wmh_mask" in scan.columns for scan in find(flat, masks={"wmh": "*_wmh.nii.gz"}).scans] == [True, False]


def test_refusals(tmp_path: Path) -> None:
    root = _make(tmp_path / "c", "p1/p1_T1w.nii.gz", "p1/p1_a_mask.nii.gz", "p1/p1_b_mask.nii.gz")
    with pytest.raises(ManifestError, match=r"2 files match lesion_mask in session c/p1/, .*_a_mask.*_b_mask"):
        find(root, masks={"lesion": "*_mask.nii.gz"})
    with pytest.raises(ManifestError, match="for lesion_mask, expected at least one"):
        find(root, masks={"lesion": "nothing*"})
    with pytest.raises(ManifestError, match="no scan found"):
        find(_make(tmp_path / "d", "readme.txt"))
    with pytest.raises(ManifestError, match="no folder at"):
        find(tmp_path / "none")
    with pytest.raises(ConfigError, match="layout='dicom'"):
        find(root, layout="dicom")
    (tmp_path / "p.csv").write_text("name,age\nx,1\n")
    with pytest.raises(ManifestError, match="no column of subject ids"):
        find(root, participants=tmp_path / "p.csv")


def test_ids_are_matched_only_where_nothing_else_could_be_meant() -> None:
    assert match_ids(["sub-01", "sub-02"], ["01", "2"]) == {"sub-01": "01", "sub-02": "2"}
    assert match_ids(["patient07"], ["7"]) == {"patient07": "7"}
    assert match_ids(["patient07", "control07"], ["7"]) == {}
    assert match_ids(["patient07"], ["control7"]) == {}
    assert match_ids(["IXI012-HH-1211"], ["ixi012-hh-1211"]) == {"IXI012-HH-1211": "ixi012-hh-1211"}
    assert match_ids(["sub-1", "sub-01"], ["1"]) == {"sub-1": "1"}


def test_a_table_with_sessions_is_joined_by_session(tmp_path: Path) -> None:
    root = _make(tmp_path / "c", *(f"sub_1/ses_{i}/t1.nii.gz" for i in (1, 2, 3)))
    (root / "participants.tsv").write_text(
        "participant_id\tsession_id\tage\tsex\tbrain_mask\n1\t1\t30\tM\tyes\n1\tses-02\t31\tM\tno\n"
    )
    found = find(root)
    assert [scan.columns["age"] for scan in found.scans] == ["30", "31", ""]
    assert [scan.columns["sex"] for scan in found.scans] == ["M"] * 3
    assert "brain_mask" not in found.scans[0].columns
    assert "age (1 scans)" in _note(found, "of another visit")


def test_linked_folders_are_entered_once_and_links_to_missing_files_are_rows(tmp_path: Path) -> None:
    root = _make(tmp_path / "c", "p1/p1_T1w.nii.gz")
    (root / "p1" / "loop").symlink_to(root, target_is_directory=True)
    (root / "p1" / "p1_FLAIR.nii.gz").symlink_to(tmp_path / "annexed")
    assert [scan.contrast for scan in find(root).scans] == ["flair", "t1"]


def test_the_real_datasets(data3d: Path) -> None:
    found = find(data3d, masks={"lesion": "openms_cross/*_lesion_mask.nii.gz"})
    kinds = {(scan.dataset, scan.subject, scan.session): set() for scan in found.scans}  # type: ignore[var-annotated]
    for scan in found.scans:
        kinds[scan.key].add(scan.contrast)
    assert kinds["openms_cross", "patient07", ""] == {"t1", "t1c", "t2", "flair"}
    assert kinds["openms_long", "patient01", "study2"] == {"t1", "t2", "flair"}
    assert kinds["ds000011", "sub-01", ""] == {"t1", "t2"}
    assert kinds["isles22", "sub-strokecase0009", ""] == {"dwi", "adc", "flair"}
    assert kinds["upenn_gbm", "UPENN-GBM-00006", "11"] == {"t1", "t1c", "t2", "flair"}
    assert sum(scan.dataset == "ixi2mm" for scan in found.scans) == 110
    assert {scan.dataset for scan in found.scans if scan.contrast == "unknown"} == {"msd_hippocampus"}
