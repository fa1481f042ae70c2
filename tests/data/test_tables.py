"""Tables as people and programs save them."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm.data.tables import decoded, read_table
from brainfm.errors import ManifestError


def rows(path: Path, raw: bytes) -> list[list[str]]:
    path.write_bytes(raw)
    table = read_table(path)
    return [list(table.columns), *map(list, table.rows)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_separators_and_line_ends(encoding: str, separator: str, end: str, tmp_path: Path) -> None:
    lines = [separator.join(cells) for cells in (["participant_id", "city"], ["sub-01", "Zürich"], ["sub-02", ""])]
    found = rows(tmp_path / "t.tsv", (end.join(lines) + end).encode(encoding))
    assert found == [["participant_id", "city"], ["sub-01", "Zürich"], ["sub-02", ""]]
    assert bool(read_table(tmp_path / "t.tsv").notes) == (not encoding.startswith("utf-8"))


def test_a_quote_in_a_tsv_is_a_letter(tmp_path: Path) -> None:
    raw = b'id\tnote\tage\n1\t"left\t28\n2\tok\t33\n3\t"both ""ends"""\t40\n'
    assert rows(tmp_path / "t.tsv", raw)[1:] == [["1", '"left', "28"], ["2", "ok", "33"], ["3", 'both "ends"', "40"]]


@pytest.mark.parametrize("note", ['"left', 'le"ft', '"left,1'])
def test_a_stray_quote_in_a_csv_swallows_no_row(note: str, tmp_path: Path) -> None:
    raw = f'id,age,note\n1,28,{note}\n2,33,ok\n3,40,"again\n4,41,end\n'.encode()
    found = rows(tmp_path / "t.csv", raw)
    first = [] if "," in note else [["1", "28"]]  # which of its cells is the age, nobody knows
    assert [row[:2] for row in found[1:]] == [*first, ["2", "33"], ["3", "40"], ["4", "41"]]
    assert "quote" in read_table(tmp_path / "t.csv").notes[0]


def test_a_stray_quote_in_a_csv_shifts_no_cell_of_another_row(tmp_path: Path) -> None:
    raw = b'id,name,age\n1,"Smith, J",28\n2,5" disc,33\n3,"Doe, 44, K",40\n'
    found = rows(tmp_path / "t.csv", raw)
    assert found[1:] == [["1", "Smith, J", "28"], ["2", '5" disc', "33"], ["3", "Doe, 44, K", "40"]]


def test_quotes_of_a_csv_that_are_closed_are_kept_to(tmp_path: Path) -> None:
    raw = b'id,note,age\n1,"tall, ""very""",28\n2,"two\nlines",33\n'
    assert rows(tmp_path / "t.csv", raw)[1:] == [["1", 'tall, "very"', "28"], ["2", "two\nlines", "33"]]


def test_short_long_and_blank_rows_and_blanks_for_tabs(tmp_path: Path) -> None:
    found = rows(tmp_path / "t.tsv", b"id\tage\tsex\n1\t30\n\n  \n2\t31\tF\textra\n")
    assert found[1:] == [["1", "30", ""]], "which cell of the long row is the age, nobody can tell"
    (note,) = read_table(tmp_path / "t.tsv").notes
    assert "1 rows have more cells than the header and are left out, e.g. 2 | 31 | F | extra" in note
    assert rows(tmp_path / "e.tsv", b"id\tage\n1\t30\t\t\n")[1:] == [["1", "30"]], "empty cells are no cells"
    blanks = rows(tmp_path / "b.tsv", b"participant_id  age score\nsub-01   30 7\nsub-02 8\nsub-03 31 9 1\n")
    assert blanks[1:] == [["sub-01", "30", "7"]], "8 may be the age or the score"
    assert "2 rows have another number of cells" in read_table(tmp_path / "b.tsv").notes[0]
    assert rows(tmp_path / "one.csv", b"participant_id\nsub-01\n")[1:] == [["sub-01"]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b"PK\x03\x04\0\0\0\x08", "is no text"), (b"\xef\xbb\xbf", "is empty")],
)
def test_what_is_no_table_is_refused(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(raw)
    with pytest.raises(ManifestError, match=message):
        read_table(tmp_path / "t.tsv")
    with pytest.raises(ManifestError, match="no such table"):
        read_table(tmp_path / "absent.tsv")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_table(tmp_path)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="zero bytes"):
        decoded(bytes(range(256)))
