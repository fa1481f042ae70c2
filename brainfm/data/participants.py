"""The participants' table of a dataset, joined to its scans by subject and, where it has them, by session."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from brainfm.data.manifest import LABEL_ENDINGS, REQUIRED, Scan
from brainfm.specs import ManifestError

_SUBJECT_COLUMNS = ("participant_id", "subject_id", "patient_id", "subject", "participant", "patient", "mrid", "ptid",
                    "case_id", "sub", "id", "ixi_id")  # fmt: skip
_SESSION_COLUMNS = ("session_id", "session", "ses", "visit", "timepoint")
_DATASET_COLUMNS = ("dataset", "cohort")
_EMPTY = frozenset(("", "n/a", "na", "nan", "null", "#n/a"))
_SEX = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F"}
_RENAMED = {"gender": "sex"}
_Key = Callable[[str], str | None]


@dataclass(frozen=True)
class Participants:
    """A table that was read.

    Attributes:
        path: the file.
        rows: (dataset or "", subject, session or "", further columns); ``n/a`` has become the empty string.
        notes: what was odd about it.
    """

    path: Path
    rows: tuple[tuple[str, str, str, dict[str, str]], ...]
    notes: tuple[str, ...]


def read_participants(path: Path) -> Participants:
    """Reads a CSV (comma or semicolon) or TSV. ``gender`` becomes ``sex`` (M, F), ``Age`` becomes ``age``.

    Raises:
        ManifestError: where the file is missing, not text, or has no column of subject ids.
    """
    if not path.is_file():
        raise ManifestError(f"no participants' table at {path}, expected a CSV or TSV file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 (byte {error.start}), expected text saved as UTF-8") from None
    first = text.partition("\n")[0]
    delimiter = max("\t;,", key=first.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    header = [name or "" for name in reader.fieldnames or ()]
    subject = _column(header, _SUBJECT_COLUMNS)
    if subject is None:
        raise ManifestError(f"{path} has no column of subject ids, expected one of {', '.join(_SUBJECT_COLUMNS)}")
    session, dataset = _column(header, _SESSION_COLUMNS), _column(header, _DATASET_COLUMNS)
    names, notes = _names([name for name in header if name not in (subject, session, dataset)], path)
    rows = []
    for row in reader:
        values = {new: _value(new, row[old]) for old, new in names.items()}
        of, who, visit = (_value("", row[column]) if column else "" for column in (dataset, subject, session))
        if who:
            rows.append((of, who, visit, values))
    return Participants(path, tuple(rows), (*notes, *_age_notes(rows, path)))


def _column(header: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted names that the header has, whatever its case and separators."""
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(header)}
    return next((plain[name] for name in wanted if name in plain), None)


def _names(header: Sequence[str], path: Path) -> tuple[dict[str, str], list[str]]:
    """Old name -> name in the manifest."""
    names: dict[str, str] = {}
    notes = []
    for old in header:
        new = old.strip()
        if new.lower() in ("age", "sex", "gender"):
            new = _RENAMED.get(new.lower(), new.lower())
        if new in REQUIRED or new.endswith(LABEL_ENDINGS):
            # In a manifest these would be taken for something else.
            new = f"participant_{new}_value"
            notes.append(f"{path.name}: column {old!r} is called {new!r} in the manifest")
        if not new or new in names.values():
            notes.append(f"{path.name}: column {old!r} has no name or the name of another and is left out")
            continue
        names[old] = new
    return names, notes


def _value(column: str, cell: str | None) -> str:
    text = (cell or "").strip()
    if text.lower() in _EMPTY:
        return ""
    return _SEX.get(text.lower(), text) if column == "sex" else text


def _age_notes(rows: Iterable[tuple[str, str, str, dict[str, str]]], path: Path) -> list[str]:
    strange = [row[3]["age"] for row in rows if row[3].get("age") and not _is_number(row[3]["age"])]
    return [f"warning: {path.name}: age is not a number in {len(strange)} rows, e.g. {strange[0]!r}"] if strange else []


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?|\.\d+", text) is not None


def match_ids(subjects: Iterable[str], listed: Iterable[str]) -> dict[str, str]:
    """Which id of a table means which subject.

    Four ways are tried, each among those still unmatched and only where one subject meets one id: the same text; the
    same but for case and a ``sub-``; the same word and number (``sub-01`` and ``1``); the same number where one side
    has no word (``patient07`` and ``7``).
    """
    left, right = sorted(set(subjects)), sorted(set(listed))
    found: dict[str, str] = {}
    for way in (_as_is, _bare, _word_and_number):
        found.update(_pairs(left, right, way, way))
        left, right = [s for s in left if s not in found], [i for i in right if i not in set(found.values())]
    forward = _pairs(left, right, _number, _lone_number)
    backward = _pairs(left, right, _lone_number, _number)
    used = Counter([*forward.values(), *(i for s, i in backward.items() if s not in forward)])
    found.update({s: i for s, i in {**backward, **forward}.items() if used[i] == 1})
    return found


def _pairs(left: Sequence[str], right: Sequence[str], of_left: _Key, of_right: _Key) -> dict[str, str]:
    """Subject -> id where both have the same key and nobody else on either side has."""
    by_key: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for place, ids, key_of in ((0, left, of_left), (1, right, of_right)):
        for text in ids:
            key = key_of(text)
            if key is not None:
                by_key[key][place].append(text)
    return {a[0]: b[0] for a, b in by_key.values() if len(a) == 1 and len(b) == 1}


def _as_is(text: str) -> str:
    return text


def _bare(text: str) -> str:
    return re.sub(r"^(?:sub|subject|subj|participant)[-_ ]?(?=\w)", "", text.lower())


def _word_and_number(text: str) -> str | None:
    found = re.fullmatch(r"([a-z]*)[-_ ]?0*(\d+)(?:\.0)?", _bare(text))
    return f"{found[1]} {found[2]}" if found else None


def _number(text: str) -> str | None:
    key = _word_and_number(text)
    return key.split(" ")[1] if key else None


def _lone_number(text: str) -> str | None:
    key = _word_and_number(text)
    return key.split(" ")[1] if key and key.startswith(" ") else None


def join(scans: Sequence[Scan], table: Participants) -> tuple[list[Scan], list[str]]:
    """The scans with the table's columns, and what was matched with what.

    A subject's rows for the scan's session are used, else all rows of the subject; where they contradict one another
    the cell stays empty. Columns that a scan already has are kept where the table is silent.
    """
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for number, scan in enumerate(scans):
        by_dataset[scan.dataset].append(number)
    columns = list(dict.fromkeys(name for row in table.rows for name in row[3]))
    joined = list(scans)
    notes = list(table.notes)
    matched: dict[str, str] = {}
    unmatched: list[str] = []
    torn: Counter[str] = Counter()
    named = any(_means(row[0], dataset) for row in table.rows for dataset in by_dataset)
    for dataset, numbers in by_dataset.items():
        listed: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
        for of, subject, session, values in table.rows:
            if not of or not named or _means(of, dataset):
                listed[subject].append((session, values))
        ids = match_ids((scans[n].subject for n in numbers), listed)
        for n in numbers:
            scan = scans[n]
            rows = listed.get(ids.get(scan.subject, ""), [])
            joined[n] = replace(scan, columns={**scan.columns, **_cells(scan, rows, columns, torn)})
        subjects = sorted({scans[n].subject for n in numbers})
        unmatched.extend(f"{dataset}/{subject}" for subject in subjects if subject not in ids)
        matched.update({s: ids[s] for s in subjects if s in ids})
    return joined, notes + _join_notes(table, matched, unmatched, torn)


def _means(text: str, dataset: str) -> bool:
    """Whether a cell of the table's dataset column means this dataset: its name, its cohort or its ds number."""
    return text != "" and (dataset.lower().startswith(text.lower()) or dataset.lower().endswith(f"_{text.lower()}"))


def _cells(
    scan: Scan, rows: Sequence[tuple[str, dict[str, str]]], columns: Sequence[str], torn: Counter[str]
) -> dict[str, str]:
    same = [values for session, values in rows if session and _session_key(session) == _session_key(scan.session)]
    cells = {}
    for name in columns:
        found = {values[name] for values in (same or [values for _, values in rows]) if values[name]}
        if len(found) > 1:
            torn[name] += 1
        cells[name] = found.pop() if len(found) == 1 else scan.columns.get(name, "")
    return cells


def _session_key(text: str) -> str:
    return re.sub(r"^(?:ses|session|visit)?[-_ ]?0*(?=\w)", "", text.lower())


def _join_notes(
    table: Participants, matched: Mapping[str, str], unmatched: Sequence[str], torn: Mapping[str, int]
) -> list[str]:
    name = table.path.name
    loose = [f"{s} = {i}" for s, i in matched.items() if s != i]
    notes = [f"{name}: {len(matched)} subjects matched" + (f", e.g. {', '.join(loose[:3])}" if loose else "")]
    if unmatched:
        notes.append(f"{name}: {len(unmatched)} subjects have no row, e.g. {unmatched[0]}")
    if torn:
        shown = ", ".join(f"{column} ({count} scans)" for column, count in list(torn.items())[:5])
        notes.append(f"{name}: rows of one subject contradict one another, left empty: {shown}")
    return notes
