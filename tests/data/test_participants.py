"""Who is who in a table: exactly, or not at all; and what belongs to a visit stays with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm.data.layouts import Found, find
from brainfm.data.manifest import Scan
from brainfm.data.participants import join, match_ids, read_participants
from brainfm.errors import ManifestError


def people(root: Path, *subjects: str, sessions: tuple[str, ...] = ("",)) -> Path:
    """Empty T1s in BIDS' layout."""
    for subject in subjects:
        for session in sessions:
            folder = root / subject / session / "anat"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{'_'.join(filter(None, (subject, session)))}_T1w.nii.gz").touch()
    return root


def column(found: Found, name: str) -> list[str]:
    return [scan.columns.get(name, "") for scan in found.scans]


def joined(tmp_path: Path, text: str, *scans: Scan) -> tuple[list[Scan], str]:
    (tmp_path / "t.tsv").write_text(text)
    found, notes = join(scans, read_participants(tmp_path / "t.tsv"))
    return found, " | ".join(notes)


def scan(subject: str, session: str = "", dataset: str = "d", **columns: str) -> Scan:
    return Scan(dataset, subject, session, "t1", f"{dataset}/{subject}/{session}/t1.nii.gz", dict(columns))


# ---- ids -------------------------------------------------------------------------------------------------------------


def test_of_two_columns_of_ids_the_first_counts(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", "sub-02", "sub-03")
    (root / "participants.tsv").write_text(
        "participant_id\tparticipant_id\tsex\tage\nsub-01\tCQ2\tF\t18\nsub-02\tBT4\tF\t28\nsub-03\tCQ1\tF\t30\n"
    )
    found = find(root)
    assert column(found, "age") == ["18", "28", "30"]
    assert any("column 'participant_id'" in note for note in found.notes)


def test_ids_of_another_numbering_match_nobody(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", "sub-02", "sub-03")
    (root / "participants.tsv").write_text("participant_id\tage\nCQ2\t18\nBT4\t28\nCQ1\t30\n")
    found = find(root)
    assert column(found, "age") == ["", "", ""]
    assert any("0 subjects matched" in note for note in found.notes)


@pytest.mark.parametrize(
    ("subjects", "listed", "expected"),
    [
        (["sub-01", "sub-02"], ["CQ1", "CQ2"], {}),  # one word, but of what numbering?
        (["sub-01", "sub-02"], ["sub-01", "control2"], {"sub-01": "sub-01"}),  # what is left over has another word
        (["sub-01", "sub-02"], ["patient1", "control2"], {}),
        (["sub-01", "sub-02"], ["patient1", "patient2"], {"sub-01": "patient1", "sub-02": "patient2"}),
        (["IXI002", "IXI012"], ["2", "12", "13"], {"IXI002": "2", "IXI012": "12"}),
        (["IXI002", "IXI012"], ["2", "13"], {}),  # neither side is explained
        (["patient07", "patient08"], ["7.0", "8.0"], {"patient07": "7.0", "patient08": "8.0"}),
        (["p1", "p2"], ["1", "x"], {}),
        (["a1b", "a2b"], ["1", "2"], {}),
    ],
)
def test_a_lone_number_means_a_person_only_where_it_explains_all(
    subjects: list[str], listed: list[str], expected: dict[str, str]
) -> None:
    assert match_ids(subjects, listed) == expected


def test_a_column_that_stands_there_twice_is_left_out_where_it_differs(tmp_path: Path) -> None:
    found, notes = joined(tmp_path, "participant_id\tage\tAge\tsite\tsite\ns1\t30\t40\tA\tA\n", scan("s1"))
    assert found[0].columns == {"site": "A"} and "age stands there twice" in notes


def test_rows_of_another_dataset_are_not_joined(tmp_path: Path) -> None:
    text = "dataset\tparticipant_id\tage\nB\tsub-01\t30\nABIDE\tsub-01\t40\nC\tsub-01\t50\n"
    found, _ = joined(tmp_path, text, scan("sub-01", dataset="A"), scan("sub-01", dataset="ABIDE_KKI"))
    assert [s.columns["age"] for s in found] == ["", "40"]
    found, notes = joined(tmp_path, text, scan("sub-01", dataset="elsewhere"))
    assert found[0].columns["age"] == "" and "none of the datasets found" in notes
    one = "dataset\tparticipant_id\tage\nADNI\tsub-01\t30\n"  # a table of one dataset, in a folder called data
    assert joined(tmp_path, one, scan("sub-01", dataset="data"))[0][0].columns["age"] == "30"


def test_numbers_in_a_column_of_letters_for_sex_are_emptied(tmp_path: Path) -> None:
    text = "participant_id\tsex\n" + "".join(f"s{i}\t{code}\n" for i, code in enumerate(("M", "F", "1", "2", "O")))
    found, notes = joined(tmp_path, text, *(scan(f"s{i}") for i in range(5)))
    assert [s.columns["sex"] for s in found] == ["M", "F", "", "", "O"]
    assert "sex is coded in two ways, 1, 2 beside letters; 2 rows left empty" in notes
    found, notes = joined(tmp_path, "participant_id\tgender\ns0\t1\ns1\t2\n", scan("s0"), scan("s1"))
    assert [s.columns["sex"] for s in found] == ["1", "2"] and "coded" not in notes


def test_further_words_for_sex_are_told(tmp_path: Path) -> None:
    found, notes = joined(
        tmp_path, "participant_id\tsex\ns0\tfemale\ns1\tM\ns2\tO\ns3\tweiblich\n", *(scan(f"s{i}") for i in range(4))
    )
    assert [s.columns["sex"] for s in found] == ["F", "M", "O", "weiblich"]
    assert "sex is O, weiblich in 2 rows, which count as classes beside M and F" in notes


def test_a_row_is_given_to_nobody_where_two_datasets_have_its_id(tmp_path: Path) -> None:
    for name, who in (("a", ("sub-01", "sub-02")), ("b", ("sub-02", "sub-3"))):
        people(tmp_path / "all" / name, *who)
    (tmp_path / "all" / "b" / "participants.tsv").write_text("participant_id\tage\nsub-02\t70\n")
    table = tmp_path / "given.tsv"
    table.write_text("participant_id\tage\nsub-01\t30\nsub-02\t40\nsub-03\t50\n")
    found = find(tmp_path / "all", participants=table)
    assert column(found, "age") == ["30", "", "70", "50"], "what a dataset's own table says is kept"
    assert any("1 ids are people of several datasets, e.g. sub-02 of a and b, left empty" in n for n in found.notes)
    table.write_text("dataset\tparticipant_id\tage\na\tsub-02\t40\nb\tsub-02\t41\na\tsub-01\t30\n")
    assert column(find(tmp_path / "all", participants=table), "age") == ["30", "40", "41", ""]


def test_two_datasets_with_two_codings_of_sex_are_told(tmp_path: Path) -> None:
    for name, code in (("a", "M"), ("b", "1")):
        root = people(tmp_path / name, "sub-01")
        (root / "participants.tsv").write_text(f"participant_id\tsex\nsub-01\t{code}\n")
    assert any("sex is coded in two ways, M in a and 1 in b" in note for note in find(tmp_path).notes)


# ---- visits ----------------------------------------------------------------------------------------------------------


def test_ages_of_visits_come_from_their_own_table(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", "sub-02", sessions=("ses-1", "ses-2"))
    (root / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t30\tF\nsub-02\t50\tM\n")
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\nses-1\t30\nses-2\t35\n")
    found = find(root)
    assert column(found, "age") == ["30", "35", "50", "50"]
    assert column(found, "sex") == ["F", "F", "M", "M"]


def test_one_table_of_all_visits(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", sessions=("ses-1", "ses-2", "ses-3"))
    (root / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t30\tF\n")
    (root / "sessions.tsv").write_text(
        "participant_id\tsession_id\tage\tmmse\nsub-01\tses-1\t30\t29\nsub-01\tses-2\t35\t25\n"
    )
    found = find(root)
    assert column(found, "age") == ["30", "35", ""], "the third visit's age is not known, and not that of another"
    assert column(found, "mmse") == ["29", "25", ""] and column(found, "sex") == ["F"] * 3
    assert any("age (1 scans)" in note and "another visit" in note for note in found.notes)


def test_a_visit_whose_age_is_not_given_has_none(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", sessions=("ses-1", "ses-2"))
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    (root / "sub-01" / "sub-01_sessions.tsv").write_text("session_id\tage\tscanner\nses-1\tn/a\tA\nses-2\t35\tA\n")
    assert column(find(root), "age") == ["", "35"] and column(find(root), "scanner") == ["A", "A"]


def test_one_age_for_several_visits_is_told(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", sessions=("ses-1", "ses-2"))
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    found = find(root)
    assert column(found, "age") == ["30", "30"]
    said = "age is one a person and was given to every visit of 1 people"
    assert any(said in note for note in found.notes)
    visits = root / "sub-01" / "sub-01_sessions.tsv"
    visits.write_text("session_id\tacq_time\nses-1\t2001\nses-2\t2006\n")
    assert any(said in note for note in find(root).notes), "a table of visits that does not tell the age"
    visits.write_text("session_id\tage\nses-1\t30\nses-2\t30\n")
    assert not any(said in note for note in find(root).notes)


# ---- tables that cannot be read --------------------------------------------------------------------------------------

BROKEN = {
    "no header": b"sub-01\tM\t18\nsub-02\tF\t23\n",
    "empty": b"",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_table_of_the_dataset_that_cannot_be_read_is_noted_and_not_in_the_way(kind: str, tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01", "sub-02")
    (root / "participants.tsv").write_bytes(BROKEN[kind])
    (root / "sub-01" / "sub-01_sessions.tsv").write_bytes(BROKEN[kind])
    found = find(root)
    assert len(found.scans) == 2 and sum("not joined" in note for note in found.notes) == 2
    (tmp_path / "good.tsv").write_text("participant_id\tage\nsub-01\t18\nsub-02\t23\n")
    assert column(find(root, participants=tmp_path / "good.tsv"), "age") == ["18", "23"]
    with pytest.raises(ManifestError):  # what the user names is used or refused
        find(root, participants=root / "participants.tsv")


def test_encodings_and_a_stray_quote(tmp_path: Path) -> None:
    for name, raw in {
        "utf16": "participant_id\tage\nsub-01\t30\nsub-02\t31\n".encode("utf-16"),
        "latin1": "participant_id\tage\tcity\nsub-01\t30\tZürich\nsub-02\t31\t\n".encode("latin-1"),
        "quote": b'participant_id\tnote\tage\nsub-01\t"left\t30\nsub-02\tok\t31\n',
    }.items():
        root = people(tmp_path / name, "sub-01", "sub-02")
        (root / "participants.tsv").write_bytes(raw)
        assert column(find(root), "age") == ["30", "31"], name


def test_no_table_at_all(tmp_path: Path) -> None:
    root = people(tmp_path / "ds", "sub-01")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    assert find(root, own_tables=False).scans[0].columns == {}
