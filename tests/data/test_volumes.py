"""Volume tables of several programs: read alike, refused with a sentence, matched without guessing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from brainfm.data.volumes import VolumeTable, log_fractions, match, read_volumes, sparse_regions, standardise
from brainfm.errors import ManifestError

SYNTHSEG = """subject,total intracranial,left cerebral white matter,left hippocampus,csf
sub-01_T1w,1500000.0,230000.5,4000.0,300000.0
sub-02_T1w,1400000.0,210000.0,3500.0,310000.0
sub-03_T1w,1450000.0,215000.0,3600.0,305000.0
"""
ASEG = """# Title Segmentation Statistics
#
# subjectname {name}
# Measure BrainSeg, BrainSegVol, Brain Segmentation Volume, 1200000.0, mm^3
# Measure lhCortex, lhCortexVol, Left hemisphere cortical gray matter volume, 250000.5, mm^3
# Measure rhCortex, rhCortexVol, Right hemisphere cortical gray matter volume, 249000.0, mm^3
# Measure Cortex, CortexVol, Total cortical gray matter volume, 499000.5, mm^3
# Measure EstimatedTotalIntraCranialVol, eTIV, Estimated Total Intracranial Volume, {icv}, mm^3
# NRows 2
# ColHeaders  Index SegId NVoxels Volume_mm3 StructName normMean normStdDev normMin normMax normRange
  1   4     6562     7000.5  Left-Lateral-Ventricle            37.6     13.0     13.0     86.0     73.0
  2  17     4012     {hippocampus}  Left-Hippocampus           70.6      8.0     30.0    100.0     70.0
"""
ASEGSTATS = (
    "Measure:volume\tLeft-Lateral-Ventricle\tLeft-Hippocampus\tlhCortexVol\tCortexVol\tBrainSegVolNotVent\t"
    "BrainSegVol-to-eTIV\tlhSurfaceHoles\tEstimatedTotalIntraCranialVol\n"
    "sub-01\t7000.5\t4100\t250000\t499000\t1100000\t0.75\t12\t1500000\n"
    "/data/sub-02/stats/aseg.stats\t8000\t3900\t240000\t480000\t1050000\t0.74\t10\t1450000\n"
)
OWN = """dataset,subject,session,hippocampus_ml,ventricles_ml,icv_ml,flag
a,01,1,8.1,20,1500,
a,01,2,8.0,22,1500,
a,02,1,7.5,30,1400,
a,03,1,7.5,30,1400,low agreement
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def table_of(ids: list[str], kind: str = "synthseg") -> VolumeTable:
    return VolumeTable(Path("t.csv"), kind, ("a",), {i: {"a": 1.0} for i in ids}, dict.fromkeys(ids, 1500.0), [])


def test_synthseg(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "volumes.csv", SYNTHSEG))
    assert table.kind == "synthseg" and table.problems == []
    assert table.regions == ("left cerebral white matter", "left hippocampus", "csf")
    assert table.rows["sub-01_T1w"]["left cerebral white matter"] == pytest.approx(230.0005)
    assert table.icv_ml["sub-02_T1w"] == pytest.approx(1400)


def test_synthseg_of_one_scan_has_no_name_over_its_first_column(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "v.csv", ",total intracranial,csf\nsub-1_T1w,1500000.0,300000.0\n"))
    assert table.rows == {"sub-1_T1w": {"csf": 300.0}}


@pytest.mark.parametrize("name", ["qc.csv", "volumes_qc.csv"])
def test_synthseg_rows_of_low_quality_are_left_out(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "subject,general white matter,thalamus\nsub-01_T1w,0.9,0.8\nsub-02_T1w,0.9,0.5\n")
    table = read_volumes(write(tmp_path / "volumes.csv", SYNTHSEG))
    assert sorted(table.rows) == ["sub-01_T1w", "sub-03_T1w"]
    assert table.problems == [f"volumes.csv: sub-02_T1w left out, {name} gives thalamus 0.5, below 0.65"]


@pytest.mark.parametrize("pattern", ["", "*/stats/aseg.stats"])
def test_freesurfer_folders(tmp_path: Path, pattern: str) -> None:
    for name, icv, hippocampus in (("sub-01", 1500000.0, 4100.5), ("sub-02", 1.0, 4000.0), ("sub-03", 1.4e6, 3900)):
        write(tmp_path / name / "stats" / "aseg.stats", ASEG.format(name=name, icv=icv, hippocampus=hippocampus))
    table = read_volumes(tmp_path / pattern)
    assert table.kind == "freesurfer" and sorted(table.rows) == ["sub-01", "sub-03"]
    assert table.rows["sub-01"] == pytest.approx(
        {"lhCortexVol": 250.0005, "rhCortexVol": 249.0, "Left-Lateral-Ventricle": 7.0005, "Left-Hippocampus": 4.1005}
    )
    assert len(table.problems) == 1 and "sub-02 left out, its intracranial volume is 0.001 ml" in table.problems[0]


def test_one_stats_file_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "s7" / "stats" / "aseg.stats", ASEG.format(name="s7", icv=1.5e6, hippocampus=4000))
    assert list(read_volumes(path).rows) == ["s7"]


def test_asegstats2table_without_sums_and_ratios(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "aseg.tsv", ASEGSTATS))
    assert table.kind == "freesurfer" and list(table.rows) == ["sub-01", "sub-02"]
    assert table.regions == ("Left-Lateral-Ventricle", "Left-Hippocampus", "lhCortexVol")
    comma = read_volumes(write(tmp_path / "aseg.csv", ASEGSTATS.replace("\t", ",")))
    assert comma.rows == table.rows


def test_own_tables_leave_flagged_rows_out(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "volumes.csv", OWN))
    assert table.kind == "brainfm" and table.regions == ("hippocampus", "ventricles")
    assert table.rows["a/01/2"] == {"hippocampus": 8.0, "ventricles": 22.0}
    assert table.problems == ["volumes.csv: a/03/1 left out, flagged as 'low agreement'"]
    twice = read_volumes(write(tmp_path / "twice.csv", OWN + "a,02,1,9.9,30,1400,low agreement\n"))
    assert twice.rows["a/02/1"]["hippocampus"] == 7.5  # a flagged row contradicts nobody


def test_dlmuse_without_its_sums(tmp_path: Path) -> None:
    header = ["MRID", "702", "701", "601", "4", "11", "47", "48", "207", "301", "525"]
    cells = ["s1", "1450000.0", "1300000", "700000", "1500", "1400", "4000", "3900.5", "2500", "9000", "8000"]
    table = read_volumes(write(tmp_path / "muse.csv", ",".join(header) + "\n" + ",".join(cells) + "\n"))
    assert table.kind == "dlmuse" and table.icv_ml == {"s1": 1450.0}
    assert table.regions == ("muse_4", "muse_11", "muse_47", "muse_48", "muse_207")
    assert table.rows["s1"]["muse_48"] == pytest.approx(3.9005)


def test_real_dlmuse_table(data3d: Path) -> None:
    table = read_volumes(data3d / "ixi2mm" / "DLMUSE_Volumes.csv")
    subjects = sorted(p.name for p in (data3d / "ixi2mm").iterdir() if p.is_dir())
    assert table.kind == "dlmuse" and len(table.rows) == 110 and len(table.regions) == 145 and not table.problems
    assert all(1000 < icv < 2000 for icv in table.icv_ml.values())
    with (data3d / "ixi2mm" / "DLMUSE_Volumes.csv").open() as file:
        for row in csv.DictReader(file):  # 701 is the brain with its ventricles: the sum of the single regions
            assert sum(table.rows[row["MRID"]].values()) == pytest.approx(float(row["701"]) / 1000, abs=0.01)
    for length in (14, 6):  # the whole name, and the number alone
        found, missing = match(table, [f"ixi/{name[:length]}/1" for name in subjects])
        assert not missing and all(who.startswith(key.split("/")[1]) for key, who in found.items())
        assert len(set(found.values())) == len(subjects)
    values, regions = log_fractions(table, subjects)
    assert values.shape == (110, len(regions)) and np.isnan(values).mean() < 0.005


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ("x,1500000,-1,4000,3", "x left out, left cerebral white matter is '-1', expected a volume of 0 or more"),
        ("x,1500000,1,abc,3", "x left out, left hippocampus is 'abc'"),
        ("x,1500000,1,nan,3", "x left out, left hippocampus is 'nan'"),
        ("x,1500000,1,inf,3", "x left out, left hippocampus is 'inf'"),
        ("x,,1,2,3", "x left out, its intracranial volume is '', expected a number"),
        ("x,1500,1,2,3", "x left out, its intracranial volume is 1.5 ml, expected 500 to 3000 ml"),
        (",1500000,1,2,3", "a row without a name left out"),
        ("sub-01_T1w,1500000,1,2,3", "sub-01_T1w left out, it has 2 rows that differ"),
    ],
)
def test_bad_rows_are_left_out_and_named(tmp_path: Path, cells: str, says: str) -> None:
    table = read_volumes(write(tmp_path / "volumes.csv", f"{SYNTHSEG}{cells}\n"))
    assert len(table.problems) == 1 and table.problems[0].startswith(f"volumes.csv: {says}")
    assert cells.split(",")[0] not in table.rows and "sub-02_T1w" in table.rows


def test_identical_rows_are_one(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "volumes.csv", SYNTHSEG + SYNTHSEG.splitlines()[1] + "\n"))
    assert len(table.rows) == 3 and not table.problems


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("subject,age\n1,20\n", "the columns are subject, age, expected a table of SynthSeg"),
        ("Measure:volume\tLeft-Hippocampus\ns\t4000\n", "the columns are Measure:volume, Left-Hippocampus, expected"),
        ("subject,total intracranial,csf\n", "found 1 lines, expected a header and at least one row"),
        ("subject,total intracranial,csf\na,1500000\n", "row 2 has 2 cells, expected 3"),
        ("subject,total intracranial,csf,csf\na,1500000,1,1\n", "column 'csf' appears more than once"),
        ("subject,total intracranial,csf\na,15,1\n", "none of 1 rows can be used, e.g. v.csv: a left out"),
    ],
)
def test_files_that_are_no_table_are_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ManifestError) as error:
        read_volumes(write(tmp_path / "v.csv", text))
    assert f"{tmp_path / 'v.csv'}: {says}" in str(error.value)


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.csv: cannot be read as a table"):
        read_volumes(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ManifestError, match=r"x\.csv: cannot be read as a table"):
        read_volumes(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match=r"found no aseg\.stats, expected SUBJECT/stats/aseg\.stats"):
        read_volumes(tmp_path / "empty")
    with pytest.raises(ManifestError, match="found no '# ColHeaders'"):
        read_volumes(write(tmp_path / "lh.aparc.stats", "# Table of something\n"))


@pytest.mark.parametrize(
    ("ids", "key", "who"),
    [
        (["01", "02"], "a/01", "01"),
        (["a/01", "b/01"], "b/01", "b/01"),
        (["sub-01_T1w.nii.gz", "sub-02_T1w.nii.gz"], "a/01", "sub-01_T1w.nii.gz"),
        (["01.mgz", "02.mgz"], "a/sub-02", "02.mgz"),
        (["SUB-AB12", "SUB-AB13"], "a/ab12/1", "SUB-AB12"),
        (["IXI012-HH-1211", "IXI013-HH-1212"], "ixi/IXI012", "IXI012-HH-1211"),
        (["IXI012", "IXI013"], "ixi/IXI013-HH-1212-T1", "IXI013"),
        (["oasis_sub-07_ses-1_T1w", "oasis_sub-08_ses-1_T1w"], "oasis/07", "oasis_sub-07_ses-1_T1w"),
        (["sub-01_ses-1_T1w", "sub-01_ses-2_T1w"], "a/01/2", "sub-01_ses-2_T1w"),
        (["sub-01", "sub-01_ses-1.long.sub-01", "sub-01_ses-2.long.sub-01"], "a/01/2", "sub-01_ses-2.long.sub-01"),
        (["sub-01", "sub-01_ses-2.long.sub-01"], "a/01/1", "sub-01"),
        (["sub-01_ses-m12_T1w", "sub-01_ses-bl_T1w"], "a/sub-01/ses-bl", "sub-01_ses-bl_T1w"),
    ],
)
def test_ids_match(ids: list[str], key: str, who: str) -> None:
    assert match(table_of(ids), [key]) == ({key: who}, [])


@pytest.mark.parametrize(
    ("ids", "keys", "says"),
    [
        (["sub-01_ses-1", "sub-01_ses-2"], ["a/01"], "a/01: 2 rows of t.csv fit (sub-01_ses-1, sub-01_ses-2)"),
        (["sub-01_ses-1"], ["a/01/2"], "a/01/2: no row of t.csv"),
        (["10", "110"], ["a/1"], "a/1: no row of t.csv"),
        (["2001-05-07"], ["a/05"], "a/05: no row of t.csv"),
        (["ab-1"], ["a/ab", "b/ab"], "a/ab: the row ab-1 of t.csv fits b/ab as well"),
        (["01"], ["a/01/1", "a/01/2"], "a/01/2: the row 01 of t.csv fits a/01/1 as well"),
    ],
)
def test_what_is_ambiguous_is_named_and_not_guessed(ids: list[str], keys: list[str], says: str) -> None:
    found, missing = match(table_of(ids), keys)
    assert found == {} and says in missing and len(missing) == len(keys)


def test_a_closer_match_takes_the_row() -> None:
    found, missing = match(table_of(["ab-1"]), ["a/ab-1", "a/ab"])
    assert found == {"a/ab-1": "ab-1"} and missing == ["a/ab: the row ab-1 of t.csv fits a/ab-1 as well"]


def test_quality_beside_an_empty_flag_is_no_reason_to_leave_a_row_out(tmp_path: Path) -> None:
    """The tables of `brainfm anatomy` have both; a table with quality alone tells by it what is bad."""
    text = "dataset,subject,session,csf_ml,icv_ml,quality,flag\na,01,1,250,1500,0.91,\na,02,1,250,1500,0.31,dark\n"
    assert list(read_volumes(write(tmp_path / "volumes.csv", text)).rows) == ["a/01/1"]
    alone = "dataset,subject,session,csf_ml,icv_ml,quality\na,01,1,250,1500,\na,02,1,250,1500,bad\n"
    assert list(read_volumes(write(tmp_path / "alone.csv", alone)).rows) == ["a/01/1"]


def test_own_rows_match_by_session_or_by_their_only_one(tmp_path: Path) -> None:
    table = read_volumes(write(tmp_path / "volumes.csv", OWN))
    found, missing = match(table, ["a/01/2", "a/02", "a/01", "b/02", "a/02/9"])
    assert found == {"a/01/2": "a/01/2", "a/02": "a/02/1"}
    assert [line.split(":")[0] for line in missing] == ["a/01", "b/02", "a/02/9"]


def test_log_fractions_equal_a_loop_and_drop_sparse_regions() -> None:
    rng = np.random.default_rng(0)
    ids = [f"s{n}" for n in range(40)]
    rows = {who: {"a": rng.uniform(1, 9), "b": rng.uniform(1, 9), "c": rng.uniform(1, 9)} for who in ids}
    rows["s3"]["a"] = 0.0
    rows["s4"]["a"] = 0.0  # 2 of 40: kept
    for who in ids[:3]:
        rows[who]["b"] = 0.0  # 3 of 40: dropped
    del rows["s9"]["c"]
    table = VolumeTable(Path("t"), "synthseg", ("a", "b", "c"), rows, {w: 1000.0 + n for n, w in enumerate(ids)}, [])
    values, regions = log_fractions(table, ids)
    assert regions == ("a", "c") and sparse_regions(table, ids) == ["b"] and values.dtype == np.float32
    for n, who in enumerate(ids):
        for m, region in enumerate(regions):
            volume = rows[who].get(region, 0.0)
            expected = np.log(volume / table.icv_ml[who]) if volume else np.nan
            assert values[n, m] == pytest.approx(expected, abs=1e-5, nan_ok=True)
    assert np.isnan(values).sum() == 3
    assert log_fractions(table, ids[:2])[1] == ("a", "c") and log_fractions(table, ids[5:8])[1] == ("a", "b", "c")


def test_standardise_uses_the_rows_named_and_is_safe_of_nan() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 3, (30, 4)).astype(np.float32)
    values[2, 0] = values[20, 0] = np.nan
    values[:, 2] = 7
    values[:, 3] = np.nan
    values[0, 3] = 2
    z, mean, std = standardise(values, range(10))
    assert mean[0] == pytest.approx(np.nanmean(values[:10, 0]), abs=1e-5)
    assert std[1] == pytest.approx(values[:10, 1].std(), abs=1e-5)
    assert np.array_equal(np.isnan(z), np.isnan(values)) and z.dtype == np.float32
    assert z[:10, 1].mean() == pytest.approx(0, abs=1e-5) and z[:10, 1].std() == pytest.approx(1, abs=1e-5)
    assert np.all(z[:, 2] == 0) and std[2] == std[3] == 1 and z[0, 3] == 0
    values[25:] += 100
    assert np.array_equal(standardise(values, range(10))[1], mean)
