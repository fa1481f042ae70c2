"""Folders as people really have them: what programs left there, other formats, strange names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brainfm.data.layouts import Found, find
from brainfm.data.manifest import (
    Scan,
    left_out_file,
    plain_first,
    read_left_out,
    read_manifest,
    scan_names,
    write_left_out,
    write_manifest,
)
from brainfm.errors import ManifestError


def make(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def names(found: Found) -> list[str]:
    return [os.path.basename(scan.path) for scan in found.scans]


def reasons(found: Found) -> dict[str, str]:
    return {os.path.basename(path): why for path, why in found.left_out}


# ---- what programs leave ---------------------------------------------------------------------------------------------


def test_what_programs_left_beside_the_scans_is_left_out_with_the_reason(tmp_path: Path) -> None:
    added = ("c1sub-00_T1w", "sub-00_T1w_segm-graymatter_probability", "sub-00_T1w_pve_1", "sub-00_T1w_synthseg",
             "wmsub-00_T1w", "y_sub-00_T1w", "sub-00_part-phase_T1w")  # fmt: skip
    files = ("sub-00_T1w", "sub-00_FLAIR", "sub-00_lesion_mask", *added)
    root = make(tmp_path / "ds", *(f"sub-00/anat/{name}.nii.gz" for name in files))
    found = find(root, masks={"lesion": "*lesion_mask*"})
    assert names(found) == ["sub-00_FLAIR.nii.gz", "sub-00_T1w.nii.gz"]
    assert set(reasons(found)) == {f"{name}.nii.gz" for name in added}, "what a mask was claimed for is not left out"
    assert "probabilities" in reasons(found)["c1sub-00_T1w.nii.gz"] and "phase" in reasons(found)[added[-1] + ".nii.gz"]
    assert any("left out 2 files (map of" in note for note in found.notes)


def test_a_freesurfer_subject_is_one_scan(tmp_path: Path) -> None:
    files = ("T1", "orig", "nu", "norm", "brain", "aseg", "aparc+aseg", "wm", "brainmask", "rawavg")
    found = find(make(tmp_path / "subjects", *(f"{who}/mri/{n}.mgz" for who in ("bert", "ernie") for n in files)))
    assert [(scan.subject, os.path.basename(scan.path)) for scan in found.scans] == [
        ("bert", "T1.mgz"), ("ernie", "T1.mgz")
    ]  # fmt: skip


def test_several_scans_of_one_contrast_are_told_and_the_plainest_comes_first(tmp_path: Path) -> None:
    root = make(tmp_path / "ds", *(f"sub-1/anat/sub-1_{n}T1w.nii.gz" for n in ("acq-fast_", "", "rec-norm_run-2_")))
    found = find(root)
    (note,) = [note for note in found.notes if "several scans of one contrast" in note]
    assert "e.g. sub-1/anat/sub-1_T1w.nii.gz and not sub-1/anat/sub-1_acq-fast_T1w.nii.gz" in note


@pytest.mark.parametrize(
    "paths",
    [
        ("b/sub-01_T1w.nii.gz", "a/c1sub-01_T1w.nii.gz"),
        ("sub-01_T1w.nii.gz", "sub-01_acq-a_T1w.nii.gz"),
        ("sub-01_T1w.nii.gz", "a/sub-01_T1w_synthseg.nii.gz"),
        ("z/T1.nii.gz", "a/T1_brain.nii.gz"),
        ("sub-01_run-1_T1w.nii.gz", "sub-01_run-2_T1w.nii.gz"),
        ("t1.nii.gz", "t1_1.nii.gz"),
    ],
)
def test_the_plain_name_is_preferred(paths: tuple[str, str]) -> None:
    scans = [Scan("d", "sub-01", "", "t1", path) for path in paths]
    assert sorted(scans, key=plain_first) == scans
    assert scan_names(scans) == ["t1", "t1_2"] and scan_names(scans[::-1]) == ["t1_2", "t1"]


def test_two_runs_with_a_mask_each_do_not_refuse_the_whole(tmp_path: Path) -> None:
    root = make(
        tmp_path / "ds",
        *(f"sub-1/anat/sub-1_run-{run}_{kind}.nii.gz" for run in (1, 2) for kind in ("T1w", "lesion_mask")),
        *(f"sub-2/anat/sub-2_{kind}.nii.gz" for kind in ("T1w", "lesion_mask")),
        *(f"sub-3/anat/sub-3_{kind}.nii.gz" for kind in ("T1w", "a_lesion_mask", "b_lesion_mask")),
        *(f"sub-4/anat/sub-4_{kind}.nii.gz" for kind in ("T1w", "FLAIR", "FLAIR_lesion_mask", "T1w_lesion_mask")),
    )
    found = find(root, masks={"lesion": "*lesion_mask*"})
    of = {scan.subject: os.path.basename(scan.columns.get("lesion_mask", "")) for scan in found.scans}
    assert of == {
        "sub-1": "sub-1_run-1_lesion_mask.nii.gz",
        "sub-2": "sub-2_lesion_mask.nii.gz",
        "sub-3": "",
        "sub-4": "sub-4_T1w_lesion_mask.nii.gz",
    }
    assert any("left empty in 1 sessions where it is not clear" in note for note in found.notes)


# ---- formats and names -----------------------------------------------------------------------------------------------


def test_other_endings_are_scans_and_other_formats_are_named(tmp_path: Path) -> None:
    scans = ("a/T1.NII", "b/T1.nii.GZ", "c/T1.img", "d/T1.mgz", "e/T1.nii.bz2", "f/T1.IMG", "g/T1.img.gz")
    others = ("h/T1.nrrd", "i/T1.mha", "j/T1.img", "k/T1.hdr", "l/1.dcm", "l/2.dcm", "m/T1.nii.xz")
    root = make(tmp_path / "c", *scans, *others, "c/T1.hdr", "f/T1.HDR", "g/T1.hdr.gz", "n/readme.txt")
    found = find(root)
    assert sorted(os.path.relpath(scan.path, root) for scan in found.scans) == sorted(scans)
    assert {scan.contrast for scan in found.scans} == {"t1"}
    aside = dict(found.left_out)
    assert set(aside) == {"h/T1.nrrd", "i/T1.mha", "j/T1.img", "k/T1.hdr", "l/*.dcm", "m/T1.nii.xz"}
    assert "half of a pair" in aside["j/T1.img"] and "convert" in aside["h/T1.nrrd"]
    assert any("format that is not read; convert it to .nii.gz" in note for note in found.notes)


def test_the_same_name_in_two_packings_is_one_scan(tmp_path: Path) -> None:
    found = find(make(tmp_path / "c", "p1/T1.nii", "p1/T1.nii.gz", "p2/T1.mgz", "p2/T1.img", "p2/T1.hdr"))
    assert sorted(names(found)) == ["T1.img", "T1.nii.gz"]
    assert "the same name with another ending" in reasons(found)["T1.nii"]


def test_folders_that_are_called_like_images_are_walked_into(tmp_path: Path) -> None:
    root = make(
        tmp_path / "brats",
        *(f"Case_{k}/Case_{k}_flair.nii/0000{k}_brain_flair.nii" for k in range(3)),
        *(f"Case_{k}/Case_{k}_seg.nii/0000{k}_final_seg.nii" for k in range(3)),
    )
    for glob in ("*_seg.nii", "*_final_seg.nii", "Case_?_seg.nii"):
        found = find(root, masks={"tumour": glob})
        assert [(scan.subject, scan.contrast) for scan in found.scans] == [(f"Case_{k}", "flair") for k in range(3)]
        assert all(Path(scan.path).is_file() for scan in found.scans)
        assert all(Path(scan.columns["tumour_mask"]).is_file() for scan in found.scans)
        assert found.scans[0].columns["tumour_mask"].endswith("00000_final_seg.nii")
    assert len(find(root).scans) == 3, "the folder's name says that what is in it is a mask"


def test_folders_like_images_in_bids_and_with_several_files_in_them(tmp_path: Path) -> None:
    root = make(tmp_path / "ds", "sub-01/anat/sub-01_T1w.nii.gz/sub-01_T1w.nii", "sub-02/anat/sub-02_T1w.nii/x.nii")
    assert [(scan.subject, scan.contrast) for scan in find(root).scans] == [("sub-01", "t1"), ("sub-02", "t1")]
    several = find(make(tmp_path / "c", "p1/all.nii/T1.nii", "p1/all.nii/FLAIR.nii", "p2/scan.nii/T2.nii"))
    assert [(scan.subject, scan.contrast) for scan in several.scans] == [("p1", "flair"), ("p1", "t1"), ("p2", "t2")]


def test_folders_that_are_called_as_the_image_in_them_are_no_visits(tmp_path: Path) -> None:
    kinds = ("T1", "FLAIR", "seg")
    nested = make(tmp_path / "a", *(f"P0{i}/P0{i}_{k}/P0{i}_{k}.nii.gz" for i in (1, 2) for k in kinds))
    flat = make(tmp_path / "b", *(f"P0{i}_{k}/P0{i}_{k}.nii.gz" for i in (1, 2) for k in kinds))
    for root in (nested, flat):
        found = find(root, masks={"lesion": "*_seg.nii.gz"})
        assert [scan.key[1:] for scan in found.scans] == [("P01", ""), ("P01", ""), ("P02", ""), ("P02", "")]
        assert [scan.contrast for scan in found.scans] == ["flair", "t1"] * 2
        assert all(scan.columns["lesion_mask"].endswith(f"{scan.subject}_seg.nii.gz") for scan in found.scans)
    ids = make(tmp_path / "c", *(f"site/P0{i}/P0{i}.nii.gz" for i in range(9)))
    assert len({scan.subject for scan in find(ids).scans}) == 9, "a name that shows nothing is an id"


def test_a_folder_with_one_contrast_of_many_people_is_no_person(tmp_path: Path) -> None:
    files = (f"IXI-{c}/IXI{i:03d}-Guys-0{i}8-{c}.nii.gz" for c in ("T1", "T2") for i in (2, 12))
    shelves = make(tmp_path / "a", *files)
    found = find(shelves)
    assert [(scan.subject, scan.contrast) for scan in found.scans] == [
        ("IXI002-Guys-028", "t1"), ("IXI002-Guys-028", "t2"), ("IXI012-Guys-0128", "t1"), ("IXI012-Guys-0128", "t2")
    ]  # fmt: skip
    people = make(tmp_path / "b", *(f"P0{i}_T1/scan{k}_T1.nii.gz" for i in (1, 2) for k in (1, 2)))
    assert {scan.subject for scan in find(people).scans} == {"P01_T1", "P02_T1"}, "a folder with a number is a person"


def test_a_folder_that_may_be_a_crowd_is_told(tmp_path: Path) -> None:
    found = find(make(tmp_path / "a", *(f"Dataset1/x_{i:03d}_{c}.nii.gz" for i in range(3) for c in ("T1", "FLAIR"))))
    assert {scan.subject for scan in found.scans} == {"Dataset1"}, "in doubt nobody is torn apart"
    assert any("Dataset1 is taken for one person" in n and "called x_000, x_001, x_002" in n for n in found.notes)
    assert len({scan.subject for scan in find(tmp_path / "a" / "Dataset1").scans}) == 3, "what the note advises"
    people = make(tmp_path / "b", *(f"P{i}/{n}.nii" for i in (1, 2) for n in ("ax_T1", "sag_T1", "T2")))
    assert not any("taken for one person" in note for note in find(people).notes)


@pytest.mark.parametrize("file", ["sub-01_ses-{}/anat/sub-01_ses-{}_T1w.nii.gz", "fs/sub-01_ses-{}/mri/T1.mgz"])
def test_a_folder_of_subject_and_visit_tears_no_person_apart(file: str, tmp_path: Path) -> None:
    found = find(make(tmp_path / "ds", *(file.replace("{}", visit) for visit in ("1", "2"))))
    assert [scan.key[1:] for scan in found.scans] == [("sub-01", "ses-1"), ("sub-01", "ses-2")]


def test_names_that_are_not_utf_8_are_left_out_and_told(tmp_path: Path) -> None:
    root = make(tmp_path / "c", "ok/T1.nii.gz")
    for odd in (b"M\xfcller/T1.nii.gz", b"p2/T1_\xe9.nii.gz", b"p3/\xff/T2.nrrd"):
        path = os.path.join(os.fsencode(root), odd)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "wb").close()
    found = find(root)
    assert names(found) == ["T1.nii.gz"]
    aside = sorted(path for path, _ in found.left_out)
    assert aside == ["M\\udcfcller/T1.nii.gz", "p2/T1_\\udce9.nii.gz", "p3/\\udcff/T2.nrrd"]
    write_manifest(tmp_path / "m.csv", found.scans)
    write_left_out(tmp_path / "m.csv", found.left_out)
    assert len(read_left_out(tmp_path / "m.csv")["name that is not UTF-8; rename it"]) == 2
    with pytest.raises(ManifestError, match="expected names in UTF-8"):
        write_manifest(tmp_path / "n.csv", [Scan("d", "M\udcfcller", "", "t1", "x.nii")])
    odd_root = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xfc")))
    with pytest.raises(ManifestError, match="no scan found"):
        find(make(odd_root, "p1/readme.txt"))


def test_names_with_blanks_commas_quotes_and_line_ends_come_back(tmp_path: Path) -> None:
    strange = (" leading/T1.nii", 'a "quoted", one/T1.nii.gz', "two\nlines/T1.nii.gz", "tab\there/T1.nii", "é/T1.nii")
    found = find(make(tmp_path / "c", *strange))
    write_manifest(tmp_path / "m.csv", found.scans)
    manifest = read_manifest(tmp_path / "m.csv")
    assert len(manifest.scans) == 5 and all(manifest.resolve(scan.path).is_file() for scan in manifest.scans)


def test_a_folder_that_cannot_be_read_and_a_link_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "c", "p1/T1.nii.gz", "p2/T1.nii.gz")
    (root / "p1" / "loop.nii.gz").symlink_to(root / "p1" / "loop.nii.gz")
    real = os.scandir

    def scandir(folder: str):  # type: ignore[no-untyped-def]
        if folder.endswith("p2"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find(root)
    assert {scan.subject for scan in found.scans} == {"p1"}
    assert ("p2", "folder that cannot be read: Permission denied") in found.left_out


# ---- ids that contain words of labels --------------------------------------------------------------------------------


def test_bids_subjects_may_be_called_anything(tmp_path: Path) -> None:
    who = ("sub-mask01", "sub-GT", "sub-seg02", "sub-01", "sub-label", "sub-roi")
    found = find(make(tmp_path / "ds", *(f"{w}/ses-mask/anat/{w}_ses-mask_T1w.nii.gz" for w in who)))
    assert [scan.subject for scan in found.scans] == sorted(who)


def test_nnunet_cases_may_be_called_anything(tmp_path: Path) -> None:
    ids = ("ms_lesion_seg_000", "mask_0001", "label", "gt_0000")
    root = make(
        tmp_path / "Dataset501_X",
        *(f"imagesTr/{case}_{channel:04d}.nii.gz" for case in ids for channel in (0, 1)),
        *(f"labelsTr/{case}.nii.gz" for case in ids),
    )
    (root / "dataset.json").write_text('{"channel_names": {"0": "FLAIR", "1": "T1"}}')
    found = find(root)
    assert sorted({scan.subject for scan in found.scans}) == sorted(ids) and len(found.scans) == 8
    assert all(Path(scan.columns["seg_labels"]).name == f"{scan.subject}.nii.gz" for scan in found.scans)


def test_an_id_that_ends_in_four_digits_is_no_channel(tmp_path: Path) -> None:
    root = make(tmp_path / "Task01", *(f"imagesTr/case_{i:04d}.nii.gz" for i in (1, 2, 37)))
    (root / "dataset.json").write_text('{"modality": {"0": "T1"}}')
    assert [scan.subject for scan in find(root).scans] == ["case_0001", "case_0002", "case_0037"]


def test_channels_of_nnunet_cases_outside_images_tr_are_one_person(tmp_path: Path) -> None:
    cases = make(tmp_path / "imagesTs", *(f"case_{i}_{c:04d}.nii.gz" for i in (1, 2) for c in (0, 1)))
    assert sorted(scan.subject for scan in find(cases).scans) == ["case_1", "case_1", "case_2", "case_2"]
    for others in (("scan_0000", "scan_0001", "scan_0002"), ("a_0001", "a_0002", "b_0001", "b_0002")):
        found = find(make(tmp_path / others[0], *(f"{name}.nii.gz" for name in others)))
        assert sorted(scan.subject for scan in found.scans) == sorted(others), "numbers of people"


def test_ids_with_label_words_in_any_other_folder(tmp_path: Path) -> None:
    folders = make(tmp_path / "a", "seg01/seg01_T1.nii.gz", "seg02/seg02_T1.nii.gz", "mask/mask_FLAIR.nii.gz")
    assert len(find(folders).scans) == 3 - 1, "a folder called mask holds masks"
    flat = find(make(tmp_path / "b", *(f"label{i:02d}_{c}.nii.gz" for i in (1, 2) for c in ("T1", "FLAIR", "T1_seg"))))
    assert [(scan.subject, scan.contrast) for scan in flat.scans] == [
        ("label01", "flair"), ("label01", "t1"), ("label02", "flair"), ("label02", "t1")
    ]  # fmt: skip


# ---- what was left out -----------------------------------------------------------------------------------------------


def test_nothing_to_find_is_told_with_what_there_was(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no scan found in .* \(1 image files; 1 left out: label or mask by name"):
        find(make(tmp_path / "a", "p1/p1_seg.nii.gz"))
    with pytest.raises(ManifestError, match="1 left out: format that is not read; convert it"):
        find(make(tmp_path / "b", "p1/p1_T1.nrrd"))


def test_the_list_of_what_was_left_out(tmp_path: Path) -> None:
    assert read_left_out(tmp_path / "m.csv") == {}
    write_left_out(tmp_path / "m.csv", [("b", "one"), ("a", "one"), ("c, d", "two")])
    assert left_out_file(tmp_path / "m.csv").name == "m.left_out.csv"
    assert read_left_out(tmp_path / "m.csv") == {"one": ["a", "b"], "two": ["c, d"]}
    write_left_out(tmp_path / "m.csv", [])
    assert not left_out_file(tmp_path / "m.csv").exists(), "a list of before would lie"
    left_out_file(tmp_path / "m.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ManifestError, match="expected path and reason"):
        read_left_out(tmp_path / "m.csv")
