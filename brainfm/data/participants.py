"""The participants' and sessions' tables of a dataset, joined to its scans by subject and visit, never by guess."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from brainfm.data.manifest import LABEL_ENDINGS, REQUIRED, Scan
from brainfm.data.tables import Table, read_table
from brainfm.errors import ManifestError

_SUBJECT_COLUMNS = ("participant_id", "subject_id", "patient_id", "subject", "participant", "patient", "mrid", "ptid",
                    "case_id", "sub", "id", "ixi_id")  # fmt: skip
_SESSION_COLUMNS = ("session_id", "session", "ses", "visit", "timepoint")
_DATASET_COLUMNS = ("dataset", "cohort")
_EMPTY = frozenset(("", "n/a", "na", "nan", "null", "#n/a"))
_SEX = {"m": "M", "male": "M", "man": "M", "f": "F", "female": "F", "woman": "F"}
_RENAMED = {"gender": "sex"}
_AGE = re.compile(r"(?:^|_)age(?:$|_)")  # of the columns that belong to a visit the one that everybody has
# Words before a number that say no more than "a person": another word may be that of another numbering.
_PERSON = frozenset(("sub", "subject", "subj", "participant", "patient", "pat", "pt", "case", "p", "s", "id"))
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

    def columns(self) -> list[str]:
        """The further columns, in the table's order."""
        return list(dict.fromkeys(name for row in self.rows for name in row[3]))

    def of_a_visit(self) -> set[str]:
        """The columns that belong to a visit and not to the person: those that differ between visits, and ages."""
        seen: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        for of, subject, session, values in self.rows:
            for name, value in values.items():
                if session and value:
                    seen[of, subject, name].add(value)
        visited = any(session for _, _, session, _ in self.rows)
        ages = {name for name in self.columns() if visited and _AGE.search(name.lower())}
        return ages | {name for (_, _, name), values in seen.items() if len(values) > 1}


def read_participants(path: Path) -> Participants:
    """Reads a table of people, or of their visits. ``gender`` becomes ``sex`` (M, F), ``Age`` becomes ``age``.

    Raises:
        ManifestError: where the file is missing, no text, or has no column of subject ids.
    """
    table = read_table(path)
    subject = _column(table.columns, _SUBJECT_COLUMNS)
    if subject is None:
        shown = ", ".join(table.columns[:4])
        raise ManifestError(
            f"{path} has no column of subject ids, found {shown}, expected one of {', '.join(_SUBJECT_COLUMNS)}"
        )
    return _participants(table, subject, "")


def read_sessions(files: Mapping[Path, str]) -> tuple[Participants | None, list[str]]:
    """The ``sessions.tsv`` of several people as one table; None where none can be read.

    Args:
        files: the file of each person -> the subject.

    Returns:
        The table, and a note for what could not be read.
    """
    rows: list[tuple[str, str, str, dict[str, str]]] = []
    notes: list[str] = []
    for path, subject in files.items():
        try:
            table = read_table(path)
            if _column(table.columns, _SESSION_COLUMNS) is None:
                raise ManifestError(f"{path} has no column session_id")
        except ManifestError as error:
            notes.append(f"not joined: {error}")
            continue
        found = _participants(table, None, subject)
        rows.extend(found.rows)
        notes.extend(found.notes)
    if not rows:
        return None, notes
    return Participants(next(iter(files)).with_name("sessions.tsv"), tuple(rows), ()), notes


def _participants(table: Table, subject: int | None, who: str) -> Participants:
    """The rows by what their columns mean; ``subject`` None: all rows are of one person."""
    session, dataset = (_column(table.columns, names) for names in (_SESSION_COLUMNS, _DATASET_COLUMNS))
    keys = {place for place in (subject, session, dataset) if place is not None}
    names, notes = _names(table, keys)
    rows = []
    for cells in table.rows:
        values = {name: _value(name, cells[place]) for place, name in names.items()}
        of, visit = (_value("", cells[place]) if place is not None else "" for place in (dataset, session))
        person = who if subject is None else _value("", cells[subject])
        if person:
            rows.append((of, person, visit, values))
    notes += _mixed_sex(rows, table.path)
    return Participants(table.path, tuple(rows), (*table.notes, *notes, *_age_notes(rows, table.path)))


def _column(header: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Where the first of the wanted names stands, whatever its case and separators; of equal names the first counts."""
    plain = [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in header]
    return next((plain.index(name) for name in wanted if name in plain), None)


def _names(table: Table, keys: Collection[int]) -> tuple[dict[int, str], list[str]]:
    """Place of a column -> its name in the manifest."""
    names: dict[int, str] = {}
    notes = []
    torn = set()
    for place, old in enumerate(table.columns):
        if place in keys:
            continue
        new = old
        if new.lower() in ("age", "sex", "gender"):
            new = _RENAMED.get(new.lower(), new.lower())
        if new in REQUIRED or new.endswith(LABEL_ENDINGS):
            # In a manifest these would be taken for something else.
            new = f"participant_{new}_value"
            notes.append(f"{table.path.name}: column {old!r} is called {new!r} in the manifest")
        twin = next((other for other, name in names.items() if name == new), None)
        if twin is not None and any(row[twin] != row[place] for row in table.rows):
            torn.add(new)
        if not new or twin is not None or old in (table.columns[key] for key in keys):
            notes.append(f"{table.path.name}: column {old!r} has no name or the name of another and is left out")
            continue
        names[place] = new
    if torn:
        notes.append(f"{table.path.name}: {', '.join(sorted(torn))} stands there twice with other values, left out")
    return {place: name for place, name in names.items() if name not in torn}, notes


def _value(column: str, cell: str) -> str:
    text = cell.strip()
    if text.lower() in _EMPTY:
        return ""
    return _SEX.get(text.lower(), text) if column == "sex" else text


def _mixed_sex(rows: Iterable[tuple[str, str, str, dict[str, str]]], path: Path) -> list[str]:
    """Empties numbers in a column of M and F: 1 may be either. Returns notes of them and of further words."""
    coded = [values for *_, values in rows if values.get("sex")]
    numbers = [values for values in coded if _is_number(values["sex"])]
    others = [values["sex"] for values in coded if values["sex"] not in "MF" and not _is_number(values["sex"])]
    notes = []
    if others:
        shown = ", ".join(sorted(set(others))[:4])
        text = f"sex is {shown} in {len(others)} rows, which count as classes beside M and F"
        notes.append(f"warning: {path.name}: {text}")
    if not numbers or len(numbers) == len(coded):
        return notes
    shown = ", ".join(sorted({values["sex"] for values in numbers})[:4])
    for values in numbers:
        values["sex"] = ""
    text = f"sex is coded in two ways, {shown} beside letters; {len(numbers)} rows left empty"
    return [*notes, f"warning: {path.name}: {text}"]


def _age_notes(rows: Iterable[tuple[str, str, str, dict[str, str]]], path: Path) -> list[str]:
    strange = [row[3]["age"] for row in rows if row[3].get("age") and not _is_number(row[3]["age"])]
    return [f"warning: {path.name}: age is not a number in {len(strange)} rows, e.g. {strange[0]!r}"] if strange else []


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?|\.\d+", text) is not None


# ---- who is who ------------------------------------------------------------------------------------------------------


def match_ids(subjects: Iterable[str], listed: Iterable[str]) -> dict[str, str]:
    """Which id of a table means which subject.

    Four ways are tried, each among those still unmatched and only where one subject meets one id: the same text; the
    same but for case and a ``sub-``; the same word and number (``sub-01`` and ``1``); and the same number, where one
    side has nothing but numbers and the other one word before all of its numbers, which is a word for people or, where
    the table has the numbers, any (``patient07`` or ``IXI007`` and ``7``). The last way counts only if it explains
    every subject or every id: with one left over, the numbers may be of another numbering.
    """
    everyone, all_ids = sorted(set(subjects)), sorted(set(listed))
    left, right = everyone, all_ids
    found: dict[str, str] = {}
    for way in (_as_is, _bare, _word_and_number):
        found.update(_pairs(left, right, way, way))
        left, right = [s for s in left if s not in found], [i for i in right if i not in set(found.values())]
    if left and right and _numbers_tell(everyone, all_ids):
        by_number = _pairs(everyone, all_ids, _number, _number)
        if len(by_number) in (len(everyone), len(all_ids)):
            found.update({s: i for s, i in by_number.items() if s in left and i in right})
    return found


def _numbers_tell(subjects: Sequence[str], listed: Sequence[str]) -> bool:
    """Whether one side has bare numbers and the other one word before each number."""
    words = []
    for ids in (subjects, listed):
        keys = [_word_and_number(text) for text in ids]
        words.append({None if key is None else key.split(" ")[0] for key in keys})
    ours, theirs = words
    if len(ours) != 1 or len(theirs) != 1 or None in ours | theirs:
        return False
    (our_word,), (their_word,) = ours, theirs
    return (our_word != "" and their_word == "") or (our_word == "" and their_word in _PERSON)


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


def _person_key(text: str) -> str:
    return _word_and_number(text) or _bare(text)


def _number(text: str) -> str | None:
    key = _word_and_number(text)
    return key.split(" ")[1] if key else None


# ---- joining ---------------------------------------------------------------------------------------------------------


def join(scans: Sequence[Scan], table: Participants) -> tuple[list[Scan], list[str]]:
    """The scans with the table's columns, and what was matched with what.

    A subject's row for the scan's session is used; what that leaves open comes from the subject's other rows, where
    they agree, unless the column belongs to a visit (`Participants.of_a_visit`): another visit's age is worse than
    none. Columns that a scan already has are kept where the table is silent, those of a visit only where the table does
    not know the subject.
    """
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for number, scan in enumerate(scans):
        by_dataset[scan.dataset].append(number)
    columns, of_visit = table.columns(), table.of_a_visit()
    joined = list(scans)
    notes = list(table.notes)
    matched: dict[str, str] = {}
    unmatched: list[str] = []
    torn: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    named = {row[0] for row in table.rows if row[0]}
    known = any(_means(of, dataset) for of in named for dataset in by_dataset)
    for dataset, numbers in by_dataset.items():
        listed: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
        for of, subject, session, values in table.rows:
            # A table of one dataset may call it by another name than its folder; one of several must name it.
            if not of or _means(of, dataset) or (not known and len(named) == 1):
                listed[subject].append((session, values))
        ids = match_ids((scans[n].subject for n in numbers), listed)
        for n in numbers:
            scan = scans[n]
            rows = listed.get(ids.get(scan.subject, ""), [])
            cells = _cells(scan, rows, columns, of_visit, torn, elsewhere)
            joined[n] = replace(scan, columns={**scan.columns, **cells})
        subjects = sorted({scans[n].subject for n in numbers})
        unmatched.extend(f"{dataset}/{subject}" for subject in subjects if subject not in ids)
        matched.update({s: ids[s] for s in subjects if s in ids})
    if named and not known and len(named) > 1:
        notes.append(f"{table.path.name}: names {', '.join(sorted(named)[:4])}, none of the datasets found")
    return joined, notes + _join_notes(table, matched, unmatched, torn, +elsewhere)


def without_doubles(table: Participants, people: Mapping[str, Collection[str]]) -> tuple[Participants, list[str]]:
    """The table with nothing said of ids that are people of several datasets, and a note of them.

    Args:
        people: dataset -> its subjects. Rows that name their dataset are left alone.
    """
    ids = {subject for of, subject, _, _ in table.rows if not of}
    whose: dict[str, list[str]] = defaultdict(list)
    for dataset, subjects in people.items():
        for found in match_ids(subjects, ids).values():
            whose[found].append(dataset)
    shared = {subject: of for subject, of in whose.items() if len(of) > 1}
    if not shared:
        return table, []
    rows = tuple(
        (of, subject, session, dict.fromkeys(values, "") if subject in shared and not of else values)
        for of, subject, session, values in table.rows
    )
    first = min(shared)
    return replace(table, rows=rows), [
        f"warning: {table.path.name}: {len(shared)} ids are people of several datasets, e.g. {first} of "
        f"{' and '.join(shared[first][:2])}, left empty; a column dataset tells them apart"
    ]


def one_age_notes(scans: Sequence[Scan], tables: Sequence[Participants]) -> list[str]:
    """Whether people who came more than once have one age for all visits, because no table tells theirs apart."""
    told = {
        (_person_key(subject), column)
        for table in tables
        for _, subject, session, values in table.rows
        for column, value in values.items()
        if session and value
    }
    visits: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for scan in scans:
        for column, value in scan.columns.items():
            if value and _AGE.search(column.lower()) and (_person_key(scan.subject), column) not in told:
                visits[scan.subject_key, column][scan.session] = value
    several = [column for (_, column), ages in visits.items() if len(ages) > 1 and len(set(ages.values())) == 1]
    return [f"{several[0]} is one a person and was given to every visit of {len(several)} people"] if several else []


def _means(text: str, dataset: str) -> bool:
    """Whether a cell of the table's dataset column means this dataset: its name, its cohort or its ds number."""
    name, part = dataset.lower(), text.lower()
    return part != "" and (name == part or name.startswith(f"{part}_") or name.endswith(f"_{part}"))


def _cells(
    scan: Scan,
    rows: Sequence[tuple[str, dict[str, str]]],
    columns: Sequence[str],
    of_visit: Collection[str],
    torn: Counter[str],
    elsewhere: Counter[str],
) -> dict[str, str]:
    """The columns of one scan; counts those that its rows contradict and those that only other visits have."""
    visits = {_session_key(session) for session, _ in rows if session}
    mine = {_session_key(scan.session)} if scan.session else visits if len(visits) == 1 else set()
    same = [values for session, values in rows if session and _session_key(session) in mine]
    plain = [values for session, values in rows if not session]
    cells = {}
    for name in columns:
        found = {values[name] for values in same if values[name]}
        if not found and name in of_visit:
            found = {values[name] for values in plain if values[name]}
            if not found and visits:
                elsewhere[name] += any(values[name] for _, values in rows)
                cells[name] = ""
                continue
        elif not found:
            found = {values[name] for _, values in rows if values[name]}
        if len(found) > 1:
            torn[name] += 1
        cells[name] = found.pop() if len(found) == 1 else "" if found else scan.columns.get(name, "")
    return cells


def _session_key(text: str) -> str:
    return re.sub(r"^(?:ses|session|visit)?[-_ ]?0*(?=\w)", "", text.lower())


def _join_notes(
    table: Participants,
    matched: Mapping[str, str],
    unmatched: Sequence[str],
    torn: Mapping[str, int],
    elsewhere: Mapping[str, int],
) -> list[str]:
    name = table.path.name
    loose = [f"{s} = {i}" for s, i in matched.items() if s != i]
    notes = [f"{name}: {len(matched)} subjects matched" + (f", e.g. {', '.join(loose[:3])}" if loose else "")]
    if unmatched:
        notes.append(f"{name}: {len(unmatched)} subjects have no row, e.g. {unmatched[0]}")
    for counted, said in ((torn, "rows of one subject contradict one another"), (elsewhere, "of another visit only")):
        shown = ", ".join(f"{column} ({count} scans)" for column, count in list(counted.items())[:5])
        if shown:
            notes.append(f"{name}: {said}, left empty: {shown}")
    return notes
