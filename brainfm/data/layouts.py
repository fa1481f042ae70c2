"""Layouts of data sets: which dataset, subject, session and contrast each file of a folder is, from names alone.

No image is opened. The tree is walked once; everything else works on the list of paths. A folder that is called like an
image (``flair.nii/0001.nii``, as unpacking leaves it) stands for the one image in it.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from brainfm.data.derived import is_label_word, why_no_scan
from brainfm.data.manifest import CONTRASTS, Scan, contrast_of, plain_first
from brainfm.data.participants import (
    Participants,
    join,
    one_age_notes,
    read_participants,
    read_sessions,
    without_doubles,
)
from brainfm.data.tables import decoded
from brainfm.data.tree import Tree, walk
from brainfm.errors import ConfigError, ManifestError
from brainfm.imaging.endings import READ, ending_of, strip_ending


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        scans: with absolute paths, sorted.
        notes: what was guessed, left out and why, matched or missing; one line each, to be printed.
        layout: the one that was used; ``several`` where datasets lie side by side.
        left_out: every image file that is no row, and why; paths below the folder.
    """

    scans: list[Scan]
    notes: list[str]
    layout: str
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _Place:
    """Where a file belongs. ``left_out`` is the reason why it is no scan, ``owner`` the scan that it describes."""

    dataset: str
    subject: str
    session: str
    contrast: str = "unknown"
    left_out: str = ""
    owner: str = ""
    columns: dict[str, str] = field(default_factory=dict)


_Reader = Callable[[Tree], tuple[list[_Place], list[str]]]


def find(
    root: str | os.PathLike[str],
    layout: str = "auto",
    masks: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    participants: str | os.PathLike[str] | None = None,
    own_tables: bool = True,
) -> Found:
    """Finds all scans below a folder.

    Args:
        root: a dataset, or (``auto``) a folder with several datasets side by side, each then read in its own layout
            and called by its folder's name.
        layout: ``auto`` or a key of ``LAYOUTS``.
        masks, labels: name -> glob; fill the columns ``NAME_mask`` and ``NAME_labels``. A glob is matched against a
            file's name and against its path from any folder above it; ``|`` separates alternatives. A file that lies
            in a session belongs to that session, one that lies beside the sessions to all of them.
        participants: a CSV or TSV to join by subject; a dataset's own ``participants.tsv`` and ``sessions.tsv`` are
            joined anyway, and noted where they cannot be read. A table inside the folder of one of several datasets is
            joined to that one alone.
        own_tables: whether those are joined.

    Raises:
        ManifestError: where there is no scan, a glob matches nothing, or two files of one session match one glob.
        ConfigError: for an unknown layout or an unfit name.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}: expected auto or one of {', '.join(LAYOUTS)}")
    globs = _globs(masks or {}, labels or {})
    tree = walk(Path(root))
    table = Path(participants).absolute() if participants is not None else None
    parts = [(tree, layout)] if layout != "auto" else _datasets(tree)
    folders = {dataset.root for dataset, _ in parts} - {tree.root}
    given = read_participants(table) if table is not None else None
    scans: list[Scan] = []
    notes: list[str] = []
    left_out = list(tree.aside)
    matched: Counter[str] = Counter()
    found = [(dataset, _read(dataset, its_layout, globs, matched)) for dataset, its_layout in parts]
    doubles: list[str] = []
    if given is not None and table is not None and not any(table.is_relative_to(folder) for folder in folders):
        given, doubles = without_doubles(given, _people(read.scans for _, read in found))
    for dataset, read in found:
        inside = table is not None and table.is_relative_to(dataset.root)
        elsewhere = table is not None and not inside and any(table.is_relative_to(folder) for folder in folders)
        tables, troubles = _own_tables(dataset, table) if own_tables and read.scans else ([], [])
        joined = _joined(read.scans, [*tables, *([given] if given is not None and not elsewhere else [])])
        scans.extend(joined[0])
        notes.extend(f"{dataset.name}: {note}" for note in (*read.notes, *troubles, *joined[1]))
        below = os.path.relpath(dataset.root, tree.root)
        left_out += [(os.path.normpath(os.path.join(below, path)), why) for path, why in read.left_out]
    notes += [*doubles, *_aside_notes(tree.aside)]
    if not scans:
        raise _no_scan(root, tree, left_out)
    for column, patterns in globs.items():
        if not matched[column]:
            raise ManifestError(f"no file in {root} matches {'|'.join(patterns)!r} for {column}, expected at least one")
    scans.sort(key=lambda s: (s.dataset, s.subject, s.session, s.contrast, s.path))
    notes += _sex_notes(scans)
    return Found(scans, notes, parts[0][1] if len(parts) == 1 else "several", left_out)


def _people(several: Iterable[Sequence[Scan]]) -> dict[str, set[str]]:
    """Dataset -> subjects."""
    people: dict[str, set[str]] = defaultdict(set)
    for scans in several:
        for scan in scans:
            people[scan.dataset].add(scan.subject)
    return people


def _no_scan(root: str | os.PathLike[str], tree: Tree, left_out: Sequence[tuple[str, str]]) -> ManifestError:
    """What there was instead of a scan."""
    reasons = Counter(why for _, why in left_out)
    why = "".join(f"; {count} left out: {reason}" for reason, count in reasons.most_common(3))
    endings = ", ".join(READ[:3])
    return ManifestError(f"no scan found in {root} ({len(tree.files)} image files{why}), expected {endings} files")


def _aside_notes(aside: Sequence[tuple[str, str]]) -> list[str]:
    notes = []
    for why in dict.fromkeys(reason for _, reason in aside):
        files = [path for path, reason in aside if reason == why]
        notes.append(f"left out {len(files)} files ({why}), e.g. {files[0]}")
    return notes


def _sex_notes(scans: Sequence[Scan]) -> list[str]:
    """Whether the datasets put together code sex in several ways."""
    ways = {scan.columns["sex"].isdigit(): scan for scan in scans if scan.columns.get("sex")}
    if len(ways) < 2:
        return []
    shown = " and ".join(f"{scan.columns['sex']} in {scan.dataset}" for scan in ways.values())
    return [f"warning: sex is coded in two ways, {shown}; make it one before it is trained on"]


# ------------------------------------------------------------------------------------------------- recognising


def _datasets(tree: Tree) -> list[tuple[Tree, str]]:
    """The dataset with its layout, or, where at least one first-level folder is a dataset in itself, all of them."""
    layout = _recognise(tree)
    if layout != "folder":
        return [(tree, layout)]
    inside = [_datasets(folder) for folder in tree.folders()]
    if not any(layout != "folder" for found in inside for _, layout in found):
        return [(tree, "folder")]
    loose = tuple(parts for parts in tree.files if len(parts) == 1)
    alone = [(Tree(tree.name, tree.root, loose, frozenset(), tree.real), "folder")] if loose else []
    return [part for found in inside for part in found] + alone


def _recognise(tree: Tree) -> str:
    """The layout in which at least half of the files make sense."""
    files = tree.files
    if not files:
        return "folder"
    if any(parts[0] == "imagesTr" and len(parts) == 2 for parts in files):
        return "nnunet"

    def share(fits: Callable[[tuple[str, ...]], object]) -> bool:
        return 2 * sum(bool(fits(parts)) for parts in files) >= len(files)

    if share(lambda p: re.match(r"PT\d{3}", p[0])) or (re.match(r"PT\d{3}_", tree.name) and share(_index_of_subject)):
        return "fomo300k"
    if any(part.endswith("__Data") for parts in files for part in parts[:-1]) or any(
        side[-1] == "openneuro_metadata.csv" for side in tree.sides
    ):
        return "openmind"
    if share(lambda p: any(_FOMO_SUBJECT.fullmatch(a) and _FOMO_SESSION.fullmatch(b) for a, b in pairwise(p[:5]))):
        return "fomo60k"
    if ("dataset_description.json",) in tree.sides and any(p[0].startswith("sub-") for p in files):
        return "bids"
    if share(lambda p: p[0].startswith("sub-") or p[0] in _BIDS_ASIDE) and share(lambda p: p[-1].startswith("sub-")):
        return "bids"
    return "folder"


def _index_of_subject(parts: Sequence[str]) -> int:
    """The place of the first ``sub-…`` folder, counted from 1; 0 where there is none."""
    return next((i + 1 for i, part in enumerate(parts[:-1]) if re.match(r"sub[-_]\w", part)), 0)


# ------------------------------------------------------------------------------------------------- one dataset


@dataclass(frozen=True)
class _Dataset:
    """What one dataset holds: its scans, what was noted, and its image files that are no scan, with the reasons."""

    scans: list[Scan]
    notes: list[str]
    left_out: list[tuple[str, str]]


def _read(tree: Tree, layout: str, globs: Mapping[str, Sequence[str]], matched: Counter[str]) -> _Dataset:
    places, notes = LAYOUTS[layout](tree)
    claims: dict[str, list[tuple[str, _Place]]] = {column: [] for column in globs}
    scans: list[Scan] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    beside = _stems(tree.files)
    for parts, place in zip(tree.files, places):
        full = tree.path(parts)
        given = "imagesTr" in parts  # scans by definition, whatever they are called
        its = [] if given else [c for c, any_of in globs.items() if _matches(parts, full, tree, any_of)]
        for column in its:
            claims[column].append((full, place))
        if its:
            matched.update(its)
            continue
        why = place.left_out or ("" if given else why_no_scan(parts, beside[parts[:-1]])) or _twin(parts, beside)
        if why:
            left_out[why].append(os.path.relpath(full, tree.root))
        else:
            shown = place.contrast
            if shown == "unknown" and os.path.basename(full) != parts[-1]:
                shown = contrast_of(full)  # the folder's name told nothing, that of its file may
            scans.append(Scan(place.dataset, place.subject, place.session, shown, full, dict(place.columns)))
    if layout == "nnunet" and not any(claims.values()):
        claims["seg_labels"] = [(full, p) for full, p in _default_labels(tree, places)]
        left_out = {reason: paths for reason, paths in left_out.items() if reason != _LABELS_TR}
    kinds = Counter(scan.contrast for scan in scans)
    found = ", ".join(f"{kinds[c]} {c}" for c in CONTRASTS if kinds[c])
    people, visits = {scan.subject_key for scan in scans}, {scan.key for scan in scans}
    summary = f"layout {layout}: {len(scans)} scans, {len(people)} subjects, {len(visits)} sessions"
    silent = [scan.path for scan in scans if scan.contrast == "unknown"]
    if silent:
        notes.append(f"{len(silent)} scans are of unknown contrast, e.g. {os.path.relpath(silent[0], tree.root)}")
    notes += _several_notes(scans, tree.root)
    scans, claim_notes = _with_labels(scans, claims)
    reasons = [f"left out {len(p)} files ({why}), e.g. {p[0]}" for why, p in sorted(left_out.items())]
    return _Dataset(
        scans,
        [f"{summary}; {found}" if found else summary, *notes, *claim_notes, *reasons],
        [(path, why) for why, paths in left_out.items() for path in paths],
    )


def _stems(files: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Folder -> stem in small letters -> the names that have it."""
    found: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(dict)
    for parts in files:
        found[parts[:-1]].setdefault(strip_ending(parts[-1]).lower(), []).append(parts[-1])
    return found


def _twin(parts: tuple[str, ...], beside: Mapping[tuple[str, ...], Mapping[str, list[str]]]) -> str:
    """The reason for a file of which another packing or format lies beside it; the one named first in READ is taken."""
    names = beside[parts[:-1]][strip_ending(parts[-1]).lower()]
    best = min(names, key=lambda name: (READ.index(ending_of(name).lower()), name))
    same = strip_ending(best) == strip_ending(parts[-1])
    return "the same name with another ending beside it" if same and best != parts[-1] else ""


def _several_notes(scans: Sequence[Scan], root: str) -> list[str]:
    """Where a session has several scans of one contrast: which of them is read where one is wanted."""
    groups: dict[tuple[tuple[str, str, str], str], list[Scan]] = defaultdict(list)
    for scan in scans:
        groups[scan.key, scan.contrast].append(scan)
    several = [sorted(found, key=plain_first) for (_, c), found in groups.items() if len(found) > 1 and c != "unknown"]
    if not several:
        return []
    first, *others = (os.path.relpath(scan.path, root) for scan in several[0])
    sessions = len({found[0].key for found in several})
    return [
        f"{sessions} sessions have several scans of one contrast; where one is wanted the plainest name is taken, "
        f"e.g. {first} and not {', '.join(others[:3])}"
    ]


def _own_tables(tree: Tree, given: Path | None) -> tuple[list[Participants], list[str]]:
    """The dataset's tables of people and of their visits, and notes of those that cannot be read."""
    tables, notes = [], []
    own = Path(tree.root, "participants.tsv")
    if ("participants.tsv",) in tree.sides and own != given:
        try:
            tables.append(read_participants(own))
        except ManifestError as error:
            notes.append(f"not joined: {error}")
    visits = {
        Path(tree.root, *side): _entity(side, "sub") for side in sorted(tree.sides) if side[-1].endswith("sessions.tsv")
    }
    whole = Path(tree.root, "sessions.tsv")
    if visits.pop(whole, None) is not None:
        try:
            tables.append(read_participants(whole))
        except ManifestError as error:
            notes.append(f"not joined: {error}")
    found, troubles = read_sessions({path: who for path, who in visits.items() if who and path != given})
    return [*tables, *([found] if found else [])], [*notes, *troubles]


def _joined(scans: list[Scan], tables: Sequence[Participants]) -> tuple[list[Scan], list[str]]:
    notes: list[str] = []
    for table in tables if scans else ():
        scans, its_notes = join(scans, table)
        notes.extend(its_notes)
    return scans, notes + one_age_notes(scans, tables)


def _globs(masks: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, list[str]]:
    """Column -> alternatives."""
    found = {}
    for ending, named in (("mask", masks), ("labels", labels)):
        for name, glob in named.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ConfigError(f"{ending} name {name!r}: expected letters, digits, - and _")
            found[f"{name}_{ending}"] = [part for part in str(glob).split("|") if part]
            if not found[f"{name}_{ending}"]:
                raise ConfigError(f"the glob for {name}_{ending} is empty, expected e.g. '*_seg.nii.gz'")
    return found


def _matches(parts: tuple[str, ...], full: str, tree: Tree, patterns: Sequence[str]) -> bool:
    tails = ["/".join(parts[i:]) for i in range(len(parts))] + ["/".join((tree.name, *parts))]
    if os.path.basename(full) != parts[-1]:  # in a folder that is called like an image: by its own name as well
        tails += [os.path.basename(full), f"{'/'.join(parts)}/{os.path.basename(full)}"]
    return any(fnmatch.fnmatchcase(tail, pattern) for pattern in patterns for tail in tails)


def _with_labels(
    scans: Sequence[Scan], claims: Mapping[str, Sequence[tuple[str, _Place]]]
) -> tuple[list[Scan], list[str]]:
    """The scans with the label columns filled, session by session."""
    sessions: dict[tuple[str, str, str], list[Scan]] = defaultdict(list)
    visits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scan in scans:
        sessions[scan.key].append(scan)
        visits[scan.dataset, scan.subject].add(scan.session)
    notes = []
    for column, files in claims.items():
        if not files:
            continue
        by_session: dict[tuple[str, str, str], list[tuple[str, str]]] = defaultdict(list)
        without = []
        for path, place in files:
            subject = _subject_of_label(path, place, visits)
            known = visits.get((place.dataset, subject), set())
            if place.session in known:
                whose = {place.session}
            elif not place.session or len(known) == 1:
                whose = known
            else:
                whose = set()
            if not whose:
                without.append(path)
            for session in whose:
                by_session[place.dataset, subject, session].append((path, place.owner))
        several = 0
        unclear: list[str] = []
        for key, candidates in by_session.items():
            chosen = _choose(candidates, sessions[key])
            if not chosen:
                first, second = sorted(path for path, _ in candidates)[:2]
                unclear.append(
                    f"{len(candidates)} files match {column} in session {'/'.join(key)}, {first} and {second}"
                )
                continue
            several += len(candidates) > 1
            for scan in sessions[key]:
                scan.columns[column] = chosen
        if unclear and len(unclear) == len(by_session):
            raise ManifestError(f"{unclear[0]}, expected one or one for each scan")
        notes.append(f"{column}: {len(by_session) - len(unclear)} of {len(sessions)} sessions have one")
        if unclear:
            notes.append(f"{column}: left empty in {len(unclear)} sessions where it is not clear: {unclear[0]}")
        if several:
            notes.append(f"{column}: in {several} sessions each scan has its own; that of the first was taken")
        if without:
            notes.append(f"{column}: {len(without)} files belong to no scan, e.g. {without[0]}")
    return list(scans), notes


def _subject_of_label(path: str, place: _Place, visits: Mapping[tuple[str, str], set[str]]) -> str:
    """The subject of a label file; where all files lie together, the longest subject id that its name begins with."""
    if (place.dataset, place.subject) in visits:
        return place.subject
    name = os.path.basename(path)
    ends = [m.start() for m in re.finditer(r"[^A-Za-z0-9]", name)]
    return next((name[:end] for end in reversed(ends) if (place.dataset, name[:end]) in visits), place.subject)


def _choose(candidates: Sequence[tuple[str, str]], scans: Sequence[Scan]) -> str:
    """The one label file of a session: that of its first scan that has one; empty where two may be meant.

    The first scan is that of the first contrast and the plainest name. A label belongs to the scan with which its name
    shares the most words (``run-2``, ``FLAIR``), where no other scan shares as many.
    """
    if len(candidates) == 1:
        return candidates[0][0]
    ordered = sorted(scans, key=lambda s: (CONTRASTS.index(s.contrast), plain_first(s)))
    by_owner: dict[str, list[str]] = defaultdict(list)
    for path, owner in candidates:
        by_owner[owner or _owner_by_name(path, ordered)].append(path)
    if "" in by_owner:
        return ""
    owned = next((by_owner[stem] for stem in (strip_ending(s.path) for s in ordered) if stem in by_owner), [])
    return owned[0] if len(owned) == 1 else ""


def _owner_by_name(label: str, scans: Sequence[Scan]) -> str:
    """The stem of the scan that a label is named after; empty where several or none may be."""
    words = _name_words(label)
    shared = [len(words & _name_words(scan.path)) for scan in scans]
    best = [scan for scan, count in zip(scans, shared) if count == max(shared)]
    return strip_ending(best[0].path) if len(best) == 1 and max(shared) else ""


def _name_words(path: str) -> set[str]:
    return set(re.findall(r"[a-z0-9-]+", strip_ending(os.path.basename(path)).lower()))


# ------------------------------------------------------------------------------------------------- BIDS and its kin

_BIDS_ASIDE = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
_BIDS_SERIES = frozenset(("func", "fmap", "eeg", "meg", "ieeg", "beh", "nirs", "pet", "motion", "mrs", "micr"))
_BIDS_SERIES_SUFFIX = re.compile(r"_(?:bold|sbref|epi|phasediff|phase[12]|magnitude[12]?|fieldmap|m0scan)$")


def _entity(parts: Sequence[str], key: str) -> str:
    """``sub-01`` from a folder or, failing that, from the file's name; empty where there is none."""
    for part in parts[:-1]:
        if re.fullmatch(rf"{key}[-_][\w.+-]+", part) and not ending_of(part):
            return re.sub(r"(?<=.)_ses-[A-Za-z0-9+.]+$", "", part)  # sub-01_ses-1, a folder of both
    names = (strip_ending(parts[-1]), *parts[-2::-1])
    found = next(filter(None, (re.search(rf"(?:^|_)({key}-[A-Za-z0-9+.]+)(?=_|$)", name) for name in names)), None)
    return found[1] if found else ""


def _bids(tree: Tree) -> tuple[list[_Place], list[str]]:
    bvals = {(*side[:-1], side[-1][: -len(".bval")]) for side in tree.sides if side[-1].endswith(".bval")}
    places = []
    for parts in tree.files:
        place = _Place(tree.name, _entity(parts, "sub"), _entity(parts, "ses"), contrast_of(parts[-1]))
        if parts[0] in _BIDS_ASIDE:
            place.left_out = f"in {parts[0]}/"
        elif not place.subject:
            place.left_out = "no sub- in folder or name"
        elif _BIDS_SERIES.intersection(parts[:-1]) or _BIDS_SERIES_SUFFIX.search(strip_ending(parts[-1])):
            place.left_out = "time series, field map or no MRI"
        elif (*parts[:-1], strip_ending(parts[-1])) in bvals:
            place.left_out = "diffusion series of many volumes: a .bval file lies beside it"
        places.append(place)
    return places, []


_FOMO_SUBJECT = re.compile(r"sub_\w+")
_FOMO_SESSION = re.compile(r"ses_\w+")


def _fomo60k(tree: Tree) -> tuple[list[_Place], list[str]]:
    """``sub_N/ses_M/<contrast>[_k].nii.gz``; the fine-tuning sets have it twice, in ``preprocessed`` and ``labels``."""
    answers: dict[tuple[str, str, str], str] = {}
    places = []
    for parts in sorted(side for side in tree.sides if side[-1] in ("label.txt", "labels.txt")):
        place = _fomo_place(tree, parts)
        text = decoded(Path(tree.root, *parts).read_bytes())[0].split()
        answers[place.dataset, place.subject, place.session] = text[0] if text else ""
    for parts in tree.files:
        place = _fomo_place(tree, parts)
        place.contrast = contrast_of(parts[-1])
        if not place.subject:
            place.left_out = "outside sub_N/ses_M"
        elif "labels" in parts[:-1]:
            place.left_out = "in labels/; claim with masks.NAME= or labels.NAME="
        elif answers:
            place.columns["label"] = answers.get((place.dataset, place.subject, place.session), "")
        places.append(place)
    return places, [f"column label: {len(answers)} text files beside the sessions"] if answers else []


def _fomo_place(tree: Tree, parts: Sequence[str]) -> _Place:
    at = next((i for i, part in enumerate(parts[:-1]) if _FOMO_SUBJECT.fullmatch(part)), None)
    if at is None:
        return _Place(tree.name, "", "")
    above = [part for part in parts[:at] if part.lower() not in ("preprocessed", "labels", "data", "images")]
    session = parts[at + 1] if at + 2 < len(parts) and _FOMO_SESSION.fullmatch(parts[at + 1]) else ""
    return _Place(above[0] if above else tree.name, parts[at], session)


def _fomo300k(tree: Tree) -> tuple[list[_Place], list[str]]:
    """Cohort folders ``PT…``, some with a level of ``ds…`` folders; ids repeat, so a dataset is cohort and ds."""
    places = []
    for parts in tree.files:
        at = _index_of_subject(parts) - 1
        above = list(parts[: max(at, 0)])
        if not above or not re.match(r"PT\d{3}", above[0]):
            above.insert(0, tree.name)
        subject = parts[at] if at >= 0 else ""
        session = next((part for part in parts[at + 1 : -1] if re.match(r"ses[-_]\w", part)), "")
        place = _Place("_".join(above), subject, session, contrast_of(parts[-1]))
        place.left_out = "" if subject else "no sub- folder above"
        places.append(place)
    return places, []


def _openmind(tree: Tree) -> tuple[list[_Place], list[str]]:
    """``ds…/sub-*/[ses-*]/…/<name>.nii.gz`` with masks of the scan in ``<name>__Data/``."""
    metadata, notes = _openmind_metadata(tree)
    places = []
    for parts in tree.files:
        dataset = next((part for part in parts[:-1] if re.fullmatch(r"ds\d+\w*", part)), "")
        place = _Place(dataset or tree.name, _entity(parts, "sub"), _entity(parts, "ses"), contrast_of(parts[-1]))
        beside = next((i for i, part in enumerate(parts[:-1]) if part.endswith("__Data")), None)
        if beside is not None:
            place.left_out = "anonymisation and anatomy masks in __Data folders; claim with masks.NAME="
            place.owner = os.path.join(tree.root, *parts[:beside], strip_ending(parts[beside].removesuffix("__Data")))
        elif not place.subject:
            place.left_out = "no sub- in folder or name"
        elif metadata:
            place.columns = metadata.get("/".join(parts[parts.index(dataset) :] if dataset else parts), {})
            if place.contrast == "unknown":
                place.contrast = contrast_of(place.columns.get("modality", ""))
        places.append(place)
    return places, notes


def _openmind_metadata(tree: Tree) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Path from ``ds…`` on -> the row of openneuro_metadata.csv, less its paths."""
    table = next((side for side in tree.sides if side[-1] == "openneuro_metadata.csv"), None)
    if table is None:
        return {}, []
    found = {}
    text = decoded(Path(tree.root, *table).read_bytes())[0]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "image_path" not in (reader.fieldnames or ()):
        return {}, ["openneuro_metadata.csv has no column image_path and was not joined"]
    kept = [name for name in reader.fieldnames or () if name and not name.endswith("_path")]
    for row in reader:
        path = re.search(r"ds\d+.*", row["image_path"] or "")
        if path:
            empty = ("", "nan", "n/a", "None")
            found[path[0]] = {name: "" if (row[name] or "") in empty else row[name] for name in kept}
    return found, [f"openneuro_metadata.csv: {len(found)} rows"]


# ------------------------------------------------------------------------------------------------- nnU-Net

_LABELS_TR = "in labelsTr/; claim with masks.NAME= or labels.NAME="


def _nnunet(tree: Tree) -> tuple[list[_Place], list[str]]:
    """``imagesTr/case_0000.nii.gz`` with the channels' names in dataset.json, ``labelsTr/case.nii.gz``.

    The Medical Segmentation Decathlon's form, without the channel number, is understood as well.
    """
    channels, notes = _channels(tree)
    labelled = {strip_ending(parts[-1]) for parts in tree.files if parts[0] == "labelsTr"}
    places = []
    for parts in tree.files:
        stem = strip_ending(parts[-1])
        number = re.fullmatch(r"(.+)_(\d{4})", stem)
        if number and channels and int(number[2]) not in channels:
            number = None  # an id that ends in four digits
        if parts[0] == "imagesTr" and number and stem not in labelled:
            name = channels.get(int(number[2]), "")
            places.append(_Place(tree.name, number[1], "", contrast_of(name)))
        elif parts[0] == "imagesTr":
            name = channels.get(0, "") if len(channels) == 1 else ""
            places.append(_Place(tree.name, stem, "", contrast_of(name)))
        elif parts[0] == "labelsTr":
            places.append(_Place(tree.name, stem, "", left_out=_LABELS_TR))
        else:
            places.append(_Place(tree.name, stem, "", left_out="not in imagesTr/ (imagesTs/ is the test set)"))
    return places, notes


def _channels(tree: Tree) -> tuple[dict[int, str], list[str]]:
    """Channel number -> name, of nnU-Net's ``channel_names`` or the older ``modality``."""
    if ("dataset.json",) not in tree.sides:
        return {}, ["no dataset.json: every contrast is unknown"]
    path = os.path.join(tree.root, "dataset.json")
    try:
        with open(path, encoding="utf-8") as file:
            described = json.load(file)
        named = described.get("channel_names") or described.get("modality") or {}
        channels = {int(number): str(name) for number, name in named.items()}
    except (ValueError, AttributeError) as error:
        raise ManifestError(f"{path} cannot be understood ({error}), expected nnU-Net's dataset.json") from None
    return channels, [f"channels: {', '.join(f'{n} {name} -> {contrast_of(name)}' for n, name in channels.items())}"]


def _default_labels(tree: Tree, places: Iterable[_Place]) -> list[tuple[str, _Place]]:
    return [(os.path.join(tree.root, *p), place) for p, place in zip(tree.files, places) if p[0] == "labelsTr"]


# ------------------------------------------------------------------------------------------------- any other folder

_CONTRAST_FOLDER = re.compile(
    "(?:t1|t2|t1w|t2w|t1ce|t1c|t1gd|flair|t2_?flair|pd|pdw|dwi|adc|swi|t2star|t2s|mra|mprage|bold|asl|dti)",
    re.IGNORECASE,
)
_PLAIN_FOLDER = re.compile(
    "(?:anat|dwi|func|perf|swi|fmap|raw|rawdata|data|nifti|nii|niftis|images?|imgs?|mri|scans?|train(?:ing)?|val(?:idation)?|"
    "test(?:ing)?|processed|preprocessed|registered|derivatives|masks?|labels?|segs?|segmentations?|brain|skullstripped|"
    "reg|orig|original)",
    re.IGNORECASE,
)
_SUBJECT_FOLDER = re.compile(
    r"(?:sub|subj|subject|patient|pat|case|participant)[-_ ]?\w*\d\w*(?:(?<=\w)_ses-\w+)?", re.IGNORECASE
)
_SESSION_FOLDER = re.compile(
    r"(?:session|ses|visit|study|tp|time|timepoint|scan|exam|month|year|week|wk|day|fu|follow[-_ ]?up)[-_ ]?\d+\w*"
    r"|[mvyt][-_]?\d{1,2}"
    r"|ses[-_]\w+|baseline|bl|pre(?:[-_]?op)?|post(?:[-_]?op)?|follow[-_ ]?up|\d{4}[-_]?\d{2}[-_]?\d{2}(?:[-_T]\w*)?",
    re.IGNORECASE,
)
_SESSION_IN_NAME = re.compile(
    r"(?:^|_)((?:ses|session|visit|study|tp|timepoint)[-_]?\d+|ses-[a-z0-9]+|baseline|follow-?up\d*)(?=_|$)",
    re.IGNORECASE,
)
# Ids in which the visit is part of the name; taken for subjects they would put one person on two sides.
_KNOWN_IDS = (
    re.compile(r"(?P<subject>UPENN-GBM-\d{5})_(?P<session>\d{2})"),
    re.compile(r"(?P<subject>BraTS-[A-Za-z]+-\d{5})-(?P<session>\d{3})"),
    re.compile(r"(?P<subject>OAS[12]_\d{4})_(?P<session>MR\d+)"),
    re.compile(r"(?P<subject>OAS3\d{4})_(?:MR_)?(?P<session>d\d{4})"),
    re.compile(r"(?:ADNI_)?(?P<subject>\d{3}_S_\d{4})(?:_(?P<session>m\d+|bl|sc))?"),
    re.compile(r"(?P<subject>sub-[A-Za-z0-9]+)_(?P<session>ses-[A-Za-z0-9]+)"),  # a folder of FreeSurfer or FastSurfer
)


def _folder(tree: Tree) -> tuple[list[_Place], list[str]]:
    """Guesses from names: which level of folders is the subject, what the file's name adds."""
    shelves = _shelves(tree.files)
    kinds = [_kinds(parts, shelves) for parts in tree.files]
    groups = _group_folders(tree.files, kinds)
    files = _without_channels(tree.files)
    guesses = [_guess(parts, kind, groups, tree.name) for parts, kind in zip(files, kinds)]
    above: dict[str, set[str]] = defaultdict(set)
    for subject, _, group, _ in guesses:
        above[subject].add(group)
    places = []
    contrasts: dict[str, str] = {}
    subjects: dict[str, str] = {}
    sessions: dict[str, str] = {}
    for parts, (subject, session, group, rest) in zip(tree.files, guesses):
        who = f"{group}_{subject}" if group and len(above[subject]) > 1 else subject
        contrast = contrast_of(rest)
        if contrast == "unknown":
            contrast = next((contrast_of(p) for p in parts[-2::-1] if _CONTRAST_FOLDER.fullmatch(p)), "unknown")
        places.append(_Place(tree.name, who, session, contrast))
        if not why_no_scan(parts):
            contrasts.setdefault(contrast, parts[-1])
            subjects.setdefault(who, "/".join(parts))
            sessions.setdefault(session, "/".join(parts))
    return places, [*_guess_notes(contrasts, subjects, sessions), *_crowd_notes(tree.files, kinds, places)]


def _crowd_notes(
    files: Sequence[tuple[str, ...]], kinds: Sequence[tuple[str, str, list[str]]], places: Sequence[_Place]
) -> list[str]:
    """Whether a folder that was taken for a person holds scans of one contrast under several numbered names."""
    groups: dict[tuple[tuple[str, ...], str], list[tuple[str, ...]]] = defaultdict(list)
    for parts, (explicit, _, others), place in zip(files, kinds, places):
        if not explicit and others and place.subject == parts[-2]:
            groups[parts[:-1], place.contrast].append(parts)
    crowds = {}
    for (folder, _), alike in groups.items():
        names = [_subject_in_name(strip_ending(p[-1])) for p in alike if len(alike) > 1 and not why_no_scan(p)]
        numbered = {name for name in names if re.search(r"\d", name)}
        if len(numbered) > 1:
            crowds[folder] = numbered
    if not crowds:
        return []
    folder, found = min(crowds.items(), key=lambda item: item[0])
    more = f", and so are {len(crowds) - 1} more folders" if len(crowds) > 1 else ""
    return [
        f"warning: {'/'.join(folder)} is taken for one person though its files are called "
        f"{', '.join(sorted(found)[:3])}{more}; if these are people, give that folder as root="
    ]


def _without_channels(files: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The files without nnU-Net's channel numbers, where these are what their names end in: several cases, each with
    the same numbers from 0000 on. Taken for ids they would tear a person apart."""
    named = [re.fullmatch(r"(.+)_(\d{4})", strip_ending(parts[-1])) for parts in files]
    numbers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for parts, name in zip(files, named):
        if name is None:
            return files
        numbers[(*parts[:-1], name[1])].add(name[2])
    sets = set(map(frozenset, numbers.values()))
    if len(numbers) < 2 or len(sets) != 1 or next(iter(sets)) != {f"{n:04d}" for n in range(len(next(iter(sets))))}:
        return files
    return [(*parts[:-1], name[1] + ending_of(parts[-1])) for parts, name in zip(files, named) if name]


def _guess_notes(contrasts: Mapping[str, str], subjects: Mapping[str, str], sessions: Mapping[str, str]) -> list[str]:
    def shown(found: Mapping[str, str]) -> str:
        return ", ".join(f"{key or 'none'} <- {path}" for key, path in list(found.items())[:8])

    if not subjects:
        return []
    notes = [f"guessed contrasts: {shown(contrasts)}", f"guessed subjects: {shown(dict(list(subjects.items())[:3]))}"]
    if set(sessions) != {""}:
        notes.append(f"guessed sessions: {shown(dict(list(sessions.items())[:4]))}")
    return notes


def _shelves(files: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Folders with one contrast of many people, as ``IXI-T1/IXI002-Guys-0828-T1.nii.gz``: their names show the contrast
    of every scan in them and hold no number else, and the files are of several ids."""
    inside: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for parts in files:
        if len(parts) > 1:
            inside[parts[:-1]].append(parts)
    found = set()
    for folder, its_files in inside.items():
        shown = contrast_of(folder[-1])
        words = re.findall(r"[A-Za-z0-9]+", folder[-1])
        numbered = any(contrast_of(word) == "unknown" and re.search(r"\d", word) for word in words)
        if shown == "unknown" or numbered:
            continue
        stems = [strip_ending(parts[-1]) for parts in its_files if not why_no_scan(parts)]
        if {contrast_of(stem) for stem in stems} == {shown} and len(set(map(_subject_in_name, stems))) > 1:
            found.add(folder)
    return found


def _kinds(parts: Sequence[str], shelves: Collection[tuple[str, ...]]) -> tuple[str, str, list[str]]:
    """The explicit subject folder, the explicit session folder, and the folders that may be either."""
    subject = session = ""
    others: list[str] = []
    shown = contrast_of(parts[-1])
    for at, part in enumerate(parts[:-1]):
        if _is_of_one_image(part, parts) or parts[: at + 1] in shelves:
            continue
        if not subject and _SUBJECT_FOLDER.fullmatch(part):
            subject = part
        elif _CONTRAST_FOLDER.fullmatch(part):
            # T1/flair.nii.gz: a folder that contradicts the file's name is a time point.
            if shown not in ("unknown", contrast_of(part)) and part.lower() in ("t1", "t2"):
                session = session or part
        elif _SESSION_FOLDER.fullmatch(part) and (subject or others):
            session = session or part
        elif not _PLAIN_FOLDER.fullmatch(part) and not ending_of(part):
            others.append(part)
    return subject, session, others


def _is_of_one_image(folder: str, parts: Sequence[str]) -> bool:
    """Whether a folder is called as the image in it, by what that shows: ``P01/P01_T1/P01_T1.nii.gz`` is of P01."""
    if folder != parts[-2] or not parts[-1].startswith(folder) or _CONTRAST_FOLDER.fullmatch(folder):
        return False
    stem = strip_ending(parts[-1])
    if folder != stem:
        return False
    return contrast_of(stem) != "unknown" or any(map(is_label_word, re.findall(r"[A-Za-z0-9]+", stem)))


def _group_folders(files: Sequence[tuple[str, ...]], kinds: Sequence[tuple[str, str, list[str]]]) -> bool:
    """Whether the first level of undecided folders are groups (sites, diagnoses) and the second the subjects.

    Names decide where files begin with a folder's name. Else groups are few, have many folders in them and share
    hardly any of their names. In doubt the first level is the subject: no person is then torn apart.
    """
    children: dict[str, set[str]] = defaultdict(set)
    first = second = 0
    for parts, (subject, _, others) in zip(files, kinds):
        if subject or len(others) < 2:
            continue
        children[others[0]].add(others[1])
        if parts[-1].startswith(others[0]):
            first += 1
        elif parts[-1].startswith(others[1]):
            second += 1
    if first or second:
        return second > first
    if not children or len(children) > 8:
        return False
    sizes = sorted(len(names) for names in children.values())
    names = Counter(name for inside in children.values() for name in inside)
    return sizes[len(sizes) // 2] >= 8 and sum(n > 1 for n in names.values()) <= 0.1 * len(names)


def _guess(
    parts: tuple[str, ...], kind: tuple[str, str, list[str]], groups: bool, dataset: str
) -> tuple[str, str, str, str]:
    """(subject, session, group, what is left of the file's name)."""
    subject, session, others = kind
    stem = strip_ending(parts[-1])
    group = ""
    if subject:
        session = session or next((o for o in others if parts.index(o) > parts.index(subject)), "")
        group = next((o for o in others if parts.index(o) < parts.index(subject)), "")
    elif len(others) >= 2 and groups:
        group, subject, session = others[0], others[1], session or (others[2] if len(others) > 2 else "")
    elif others:
        subject, session = others[0], session or (others[1] if len(others) > 1 else "")
    in_folder = bool(subject)
    named = _SESSION_IN_NAME.search(stem)
    if not session and named:
        session = named[1]
    if not in_folder:
        subject = _subject_in_name(stem) or dataset
    rest = stem[len(subject) :] if stem.startswith(subject) else stem
    for pattern in _KNOWN_IDS:
        known = pattern.match(subject)
        if known:
            subject = known["subject"]
            session = session or known["session"] or ""
            break
    return subject, session, group, rest


def _subject_in_name(stem: str) -> str:
    """What stands before the word that says what the file shows, or after it where it comes first."""
    bare = _SESSION_IN_NAME.sub("", stem)
    words = [(m.start(), m.group()) for m in re.finditer(r"[^_\-. ]+", bare)]
    telling = [
        i
        for i, (_, word) in enumerate(words)
        if contrast_of(word) != "unknown" or is_label_word(word) or word.lower() == "lesion"
    ]
    cut = next((i for i in telling if i > 0), None)
    if cut is not None and (telling[0] > 0 or len(telling) > 1):
        return bare[: words[cut][0]].strip("_-. ")
    if telling:  # T1_case07
        after = [start for start, _ in words[1:2]]
        return bare[after[0] :].strip("_-. ") if after else ""
    return bare.strip("_-. ")


LAYOUTS: dict[str, _Reader] = {
    "bids": _bids,
    "fomo60k": _fomo60k,
    "fomo300k": _fomo300k,
    "openmind": _openmind,
    "nnunet": _nnunet,
    "folder": _folder,
}
