"""The manifest: what is written is read again, and what contradicts itself is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm.data.manifest import (
    CONTRASTS,
    Scan,
    check_files,
    contrast_of,
    read_manifest,
    scan_names,
    session_labels,
    write_manifest,
)
from brainfm.errors import ManifestError

HEADER = "dataset,subject,session,contrast,path"

NAMES = {
    "t1": "T1w T1 MPRAGE mprage.nii.gz t1_2.nii.gz sub-01_acq-MPRAGE_run-01_T1w.nii.gz sub-01_UNIT1 t1n "
    "sub-01_inplaneT1 IXI012-HH-1211-T1.nii.gz OAS1_0001_MR1_mpr_n4_anon 3DT1 T1_FLAIR t1_pre_contrast "
    "sub-01_ses-t2_T1w.nii.gz",
    "t1c": "T1ce T1c T1Gd T1_Gd Gd_T1 T1-post-contrast sub-01_ce-gadolinium_T1w.nii.gz sub-01_acq-postcontrast_T1w "
    "T1wCE",
    "t2": "T2w t2 inplaneT2 sub-01_inplaneT2.nii.gz AX_T2_TSE BraTS-GLI-00005-100-t2w.nii.gz T2_SPACE",
    "flair": "FLAIR T2_FLAIR t2flair FLAIR_T2 sub-01_acq-FLAIR_T2w sub-01_ses-t1_FLAIR.nii.gz "
    "BraTS-GLI-00005-100-t2f sT2W_FLAIR",
    "t2s": "T2star T2starw t2s T2* gre T2GRE sub-01_T2starw.nii.gz",
    "swi": "SWI swi_1",
    "minip": "minip",
    "dwi": "DWI b1000 dwi_b1000.nii.gz sub-01_dwi.nii.gz trace",
    "adc": "ADC adc_2 dwi_adc",
    "fa": "sub-01_dwi_FA",
    "md": "sub-01_dwi_MD",
    "pd": "PD PDw pd.nii.gz",
    "mra": "angio TOF IXI012-HH-1211-MRA.nii.gz",
    "asl": "asl CBF",
    "bold": "sub-01_task-rest_bold.nii.gz",
    "t1map": "T1map",
    "unknown": "scan.nii.gz sub-01_ses-t1_foo.nii.gz hippocampus_004.nii.gz PDT2 T2starmap sub-01_epi study1_foo",
}


@pytest.mark.parametrize(("contrast", "name"), [(c, name) for c, names in NAMES.items() for name in names.split()])
def test_names_say_what_a_scan_shows(contrast: str, name: str) -> None:
    assert contrast_of(name) == contrast


def test_every_word_of_the_vocabulary_means_itself() -> None:
    assert [contrast_of(word) for word in CONTRASTS] == list(CONTRASTS)


def _scan(**changes: object) -> Scan:
    values = {"dataset": "a", "subject": "s1", "session": "", "contrast": "t1", "path": "x.nii.gz", "columns": {}}
    return Scan(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_what_is_written_is_read_again(tmp_path: Path, ending: str) -> None:
    scans = [
        _scan(path="b, c.nii.gz", columns={"age": "31", "note": 'says "é",\nso'}),
        _scan(path=str(tmp_path / "in" / "a.nii.gz"), columns={"lesion_mask": str(tmp_path / "m.nii")}),
        _scan(subject="s0", path="/elsewhere/a.nii.gz"),
    ]
    write_manifest(tmp_path / f"m.{ending}", reversed(scans))
    found = read_manifest(tmp_path / f"m.{ending}")
    assert [scan.path for scan in found.scans] == ["/elsewhere/a.nii.gz", "b, c.nii.gz", "in/a.nii.gz"]
    assert found.scans[1].columns == {"age": "31", "note": 'says "é",\nso', "lesion_mask": ""}
    assert found.scans[2].columns["lesion_mask"] == "m.nii"
    assert found.resolve("in/a.nii.gz") == tmp_path / "in" / "a.nii.gz"
    assert found.resolve("/elsewhere/a.nii.gz") == Path("/elsewhere/a.nii.gz")
    write_manifest(tmp_path / f"again.{ending}", found.scans)
    assert read_manifest(tmp_path / f"again.{ending}").scans == found.scans
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"again.{ending}", f"m.{ending}"]


def test_the_fingerprint_and_order_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    scans = [_scan(path=f"{i}.nii.gz", subject=f"s{i % 3}") for i in range(6)]
    write_manifest(tmp_path / "a.csv", scans)
    write_manifest(tmp_path / "b.csv", scans[::-1])
    assert read_manifest(tmp_path / "a.csv").sha256 == read_manifest(tmp_path / "b.csv").sha256


REFUSED = {
    "no column 'path'": "dataset,subject,session,contrast\na,s,1,t1\n",
    "is empty": "",
    "no rows": HEADER + "\n",
    "line 3 .* has 4 fields, expected 5": f"{HEADER}\na,s,1,t1,x.nii\na,s,1,t1\n",
    "line 2 .* contrast 'T1w', expected perhaps 't1'": f"{HEADER}\na,s,1,T1w,x.nii\n",
    "line 3 .* repeats line 2": f"{HEADER}\na,s,1,t1,x.nii\na,s,1,t2,x.nii\n",
    "line 2 .* has no subject": f"{HEADER}\na,,1,t1,x.nii\n",
    "column 'age' twice": f"{HEADER},age,age\na,s,1,t1,x.nii,1,2\n",
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_manifest_that_cannot_be_right_is_refused(tmp_path: Path, message: str) -> None:
    (tmp_path / "m.csv").write_text(REFUSED[message], encoding="utf-8")
    with pytest.raises(ManifestError, match=message) as raised:
        read_manifest(tmp_path / "m.csv")
    assert "m.csv" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text_a_missing_file_and_a_strange_ending_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(HEADER.encode() + b"\na,s\xe9,1,t1,x.nii\n")
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="no manifest at"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(ManifestError, match=r"ends in \.csv or \.tsv"):
        write_manifest(tmp_path / "m.xlsx", [_scan()])
    with pytest.raises(ManifestError, match="repeats"):
        write_manifest(tmp_path / "n.csv", [_scan(), _scan()])
    assert not (tmp_path / "n.csv").exists()


def test_a_byte_order_mark_blank_lines_and_spaces_are_forgiven(tmp_path: Path) -> None:
    text = f"\ufeff{HEADER},age\n\na, s ,1,t1,x.nii, 30\n,,,,,\n"
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    (scan,) = read_manifest(tmp_path / "m.csv").scans
    assert (scan.key, scan.columns) == (("a", "s", "1"), {"age": "30"})


def test_missing_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").touch()
    write_manifest(tmp_path / "m.csv", [_scan(columns={"lesion_mask": "gone.nii.gz"})])
    with pytest.raises(ManifestError, match=r"1 of 2 files .* 'gone\.nii\.gz'"):
        check_files(read_manifest(tmp_path / "m.csv"))


def test_names_within_a_session_do_not_depend_on_the_order_of_the_rows() -> None:
    scans = [_scan(path="c"), _scan(contrast="flair", path="b"), _scan(path="a"), _scan(path="b")]
    assert scan_names(scans) == ["t1_3", "flair", "t1", "t1_2"]
    assert scan_names(scans[::-1]) == ["t1_2", "t1", "flair", "t1_3"]


def test_two_label_files_for_one_session_are_refused() -> None:
    one, other = _scan(columns={"lesion_mask": "m", "age": "3"}), _scan(path="y", columns={"lesion_mask": ""})
    assert session_labels([one, other]) == {"lesion_mask": "m"}
    with pytest.raises(ManifestError, match=r"a/s1.* lesion_mask"):
        session_labels([one, _scan(path="y", columns={"lesion_mask": "n"})])
