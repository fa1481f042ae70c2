"""Finds the scans of a folder: which dataset, subject, session and contrast each file is, from names alone.

No image is opened. The tree is walked once; everything else works on the list of paths.
"""

from __future__ import annotations

import csv
import fnmatch
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from brainfm.data.manifest import CONTRASTS, Scan, contrast_of, strip_ending
from brainfm.data.participants import join, read_participants
from brainfm.specs import ConfigError, ManifestError

_IMAGE = (".nii.gz", ".nii")
_SIDE = (".bval", ".zip", "participants.tsv", "dataset.json", "label.txt", "labels.txt", "openneuro_metadata.csv",
         "dataset_description.json")  # fmt: skip
_DERIVED = re.compile(
    r"(?:^|[^a-z0-9])(?:[a-z]*(?:mask|masked_out|dseg|probseg|labelmap|pveseg)s?\d*|seg(?:mentation)?s?\d*|label|labels|"
    r"roi|rois|msk|gt|aseg|aparc|wmparc|parc|parcellation|lesions?\d*$|warp|xfm|jacobian|les)(?=$|[^a-z0-9])"
)
_DERIVED_FOLDER = re.compile(r"labels?(?:tr|ts)?|masks?|segs?|segmentations?|derivatives|rois?", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        scans: with absolute paths, sorted.
        notes: what was guessed, left out and why, matched or missing; one line each, to be printed.
        layout: the one that was used; ``several`` where datasets lie side by side.
    """

    scans: list[Scan]
    notes: list[str]
    layout: str


@dataclass(frozen=True, slots=True)
class _Tree:
    """A dataset's folder: its image files and side files, as tuples of path parts below ``root``."""

    name: str
    root: str
    files: tuple[tuple[str, ...], ...]
    sides: frozenset[tuple[str, ...]]

    def folders(self) -> list[_Tree]:
        """The first-level folders that hold images, in the order of their names."""
        files: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        sides: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for paths, found in ((self.files, files), (self.sides, sides)):
            for parts in paths:
                if len(parts) > 1:
                    found[parts[0]].append(parts[1:])
        return [
            _Tree(name, os.path.join(self.root, name), tuple(inside), frozenset(sides[name]))
            for name, inside in sorted(files.items())
        ]


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


_Reader = Callable[[_Tree], tuple[list[_Place], list[str]]]


def find(
    root: str | os.PathLike[str],
    layout: str = "auto",
    masks: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    participants: str | os.PathLike[str] | None = None,
) -> Found:
    """Finds all scans below a folder.

    Args:
        root: a dataset, or (``auto``) a folder with several datasets side by side, each then read in its own layout
            and called by its folder's name.
        layout: ``auto`` or a key of ``LAYOUTS``.
        masks, labels: name -> glob; fill the columns ``NAME_mask`` and ``NAME_labels``. A glob is matched against a
            file's name and against its path from any folder above it; ``|`` separates alternatives. A file that lies
            in a session belongs to that session, one that lies beside the sessions to all of them.
        participants: a CSV or TSV to join by subject; a dataset's own ``participants.tsv`` is joined anyway. A table
            inside the folder of one of several datasets is joined to that one alone.

    Raises:
        ManifestError: where there is no scan, a glob matches nothing, or two files of one session match one glob.
        ConfigError: for an unknown layout or an unfit name.
    """
    if layout != "auto" and layout not in LAYOUTS:
        raise ConfigError(f"layout={layout!r}: expected auto or one of {', '.join(LAYOUTS)}")
    globs = _globs(masks or {}, labels or {})
    tree = _walk(Path(root))
    table = Path(participants).absolute() if participants is not None else None
    parts = [(tree, layout)] if layout != "auto" else _datasets(tree)
    folders = {dataset.root for dataset, _ in parts} - {tree.root}
    scans: list[Scan] = []
    notes: list[str] = []
    matched: Counter[str] = Counter()
    for dataset, its_layout in parts:
        inside = table is not None and table.is_relative_to(dataset.root)
        elsewhere = table is not None and not inside and any(table.is_relative_to(folder) for folder in folders)
        its_scans, its_notes = _read(dataset, its_layout, globs, matched, None if elsewhere else table)
        scans.extend(its_scans)
        notes.extend(f"{dataset.name}: {note}" for note in its_notes)
    zips = sum(side[-1].endswith(".zip") for side in tree.sides)
    if zips:
        notes.append(f"{zips} .zip files were not looked into; unpack them where they are")
    if not scans:
        raise ManifestError(f"no scan found in {root} ({len(tree.files)} image files), expected .nii or .nii.gz files")
    for column, patterns in globs.items():
        if not matched[column]:
            raise ManifestError(f"no file in {root} matches {'|'.join(patterns)!r} for {column}, expected at least one")
    scans.sort(key=lambda s: (s.dataset, s.subject, s.session, s.contrast, s.path))
    return Found(scans, notes, parts[0][1] if len(parts) == 1 else "several")


# ------------------------------------------------------------------------------------------------- walk and recognise


def _walk(root: Path) -> _Tree:
    """All image files and the few side files that matter; hidden ones are passed over, linked folders entered once."""
    if not root.is_dir():
        raise ManifestError(f"no folder at {root}, expected the folder of a dataset")
    top = os.path.abspath(root)
    files: list[tuple[str, ...]] = []
    sides: list[tuple[str, ...]] = []
    linked = {os.path.realpath(top)}
    pending: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    while pending:
        folder, parts = pending.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.endswith(_IMAGE):
                    files.append((*parts, name))
                elif name.endswith(_SIDE):
                    sides.append((*parts, name))
                elif entry.is_dir():
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        if target in linked:
                            continue
                        linked.add(target)
                    pending.append((entry.path, (*parts, name)))
    return _Tree(os.path.basename(top) or "dataset", top, tuple(sorted(files)), frozenset(sides))


def _datasets(tree: _Tree) -> list[tuple[_Tree, str]]:
    """The dataset with its layout, or, where at least one first-level folder is a dataset in itself, all of them."""
    layout = _recognise(tree)
    if layout != "folder":
        return [(tree, layout)]
    inside = [_datasets(folder) for folder in tree.folders()]
    if not any(layout != "folder" for found in inside for _, layout in found):
        return [(tree, "folder")]
    loose = tuple(parts for parts in tree.files if len(parts) == 1)
    alone = [(_Tree(tree.name, tree.root, loose, frozenset()), "folder")] if loose else []
    return [part for found in inside for part in found] + alone


def _recognise(tree: _Tree) -> str:
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


def _read(
    tree: _Tree, layout: str, globs: Mapping[str, Sequence[str]], matched: Counter[str], table: Path | None
) -> tuple[list[Scan], list[str]]:
    places, notes = LAYOUTS[layout](tree)
    claims: dict[str, list[tuple[str, _Place]]] = {column: [] for column in globs}
    found: list[tuple[Scan, _Place]] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for parts, place in zip(tree.files, places):
        path = "/".join(parts)
        full = os.path.join(tree.root, *parts)
        its = [] if "imagesTr" in parts else [c for c, any_of in globs.items() if _matches(parts, tree.name, any_of)]
        for column in its:
            claims[column].append((full, place))
        if its:
            matched.update(its)
        elif place.left_out or _is_derived(parts):
            left_out[place.left_out or "label or mask by name; claim with masks.NAME= or labels.NAME="].append(path)
        else:
            scan = Scan(place.dataset, place.subject, place.session, place.contrast, full, dict(place.columns))
            found.append((scan, place))
    scans = [scan for scan, _ in found]
    if layout == "nnunet" and not any(claims.values()):
        claims["seg_labels"] = [(full, p) for full, p in _default_labels(tree, places)]
        left_out = {reason: paths for reason, paths in left_out.items() if reason != _LABELS_TR}
    kinds = Counter(scan.contrast for scan in scans)
    shown = ", ".join(f"{kinds[c]} {c}" for c in CONTRASTS if kinds[c])
    people, visits = {scan.subject_key for scan in scans}, {scan.key for scan in scans}
    summary = f"layout {layout}: {len(scans)} scans, {len(people)} subjects, {len(visits)} sessions"
    silent = [scan.path for scan in scans if scan.contrast == "unknown"]
    if silent:
        notes.append(f"{len(silent)} scans are of unknown contrast, e.g. {os.path.relpath(silent[0], tree.root)}")
    reasons = [f"left out {len(p)} files ({why}), e.g. {p[0]}" for why, p in sorted(left_out.items())]
    scans, claim_notes = _with_labels(scans, claims)
    own = Path(tree.root, "participants.tsv")
    tables = [own] if ("participants.tsv",) in tree.sides and own != table else []
    table_notes: list[str] = []
    for each in [*tables, *([table] if table else [])] if scans else []:
        scans, its_notes = join(scans, read_participants(each))
        table_notes.extend(its_notes)
    return scans, [f"{summary}; {shown}" if shown else summary, *notes, *claim_notes, *reasons, *table_notes]


def _is_derived(parts: Sequence[str]) -> bool:
    """Whether a file is a label volume, a mask or a transform by its name or its folder's."""
    return _DERIVED.search(strip_ending(parts[-1]).lower()) is not None or any(
        _DERIVED_FOLDER.fullmatch(part) for part in parts[:-1]
    )


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


def _matches(parts: tuple[str, ...], dataset: str, patterns: Sequence[str]) -> bool:
    tails = ["/".join(parts[i:]) for i in range(len(parts))] + ["/".join((dataset, *parts))]
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
        for key, candidates in by_session.items():
            chosen, was_choice = _choose(column, key, candidates, sessions[key])
            several += was_choice
            for scan in sessions[key]:
                scan.columns[column] = chosen
        notes.append(f"{column}: {len(by_session)} of {len(sessions)} sessions have one")
        if several:
            notes.append(f"{column}: in {several} sessions each scan has its own; that of the first contrast was taken")
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


def _choose(
    column: str, key: tuple[str, str, str], candidates: Sequence[tuple[str, str]], scans: Sequence[Scan]
) -> tuple[str, bool]:
    """The one label file of a session, and whether there was a choice.

    Raises: ManifestError where several files match and do not belong to one scan each.
    """
    if len(candidates) == 1:
        return candidates[0][0], False
    by_owner = {owner: path for path, owner in candidates if owner}
    ordered = sorted(scans, key=lambda s: (CONTRASTS.index(s.contrast), s.path))
    owned = [by_owner[stem] for stem in (strip_ending(s.path) for s in ordered) if stem in by_owner]
    if len(by_owner) < len(candidates) or not owned:
        first, second = sorted(path for path, _ in candidates)[:2]
        raise ManifestError(
            f"{len(candidates)} files match {column} in session {'/'.join(key)}, {first} and {second}, expected one"
        )
    return owned[0], True


# ------------------------------------------------------------------------------------------------- BIDS and its kin

_BIDS_ASIDE = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")
_BIDS_SERIES = frozenset(("func", "fmap", "eeg", "meg", "ieeg", "beh", "nirs", "pet", "motion", "mrs", "micr"))
_BIDS_SERIES_SUFFIX = re.compile(
    r"_(?:bold|sbref|epi|phasediff|phase[12]?|magnitude[12]?|fieldmap|m0scan)\.nii(?:\.gz)?$"
)


def _entity(parts: Sequence[str], key: str) -> str:
    """``sub-01`` from a folder or, failing that, from the file's name; empty where there is none."""
    for part in parts[:-1]:
        if re.fullmatch(rf"{key}[-_][\w.+-]+", part):
            return part
    found = re.search(rf"(?:^|_)({key}-[A-Za-z0-9+.]+)(?=_|\.nii)", parts[-1])
    return found[1].removesuffix(".nii") if found else ""


def _bids(tree: _Tree) -> tuple[list[_Place], list[str]]:
    bvals = {(*side[:-1], side[-1][: -len(".bval")]) for side in tree.sides if side[-1].endswith(".bval")}
    places = []
    for parts in tree.files:
        place = _Place(tree.name, _entity(parts, "sub"), _entity(parts, "ses"), contrast_of(parts[-1]))
        if parts[0] in _BIDS_ASIDE:
            place.left_out = f"in {parts[0]}/"
        elif not place.subject:
            place.left_out = "no sub- in folder or name"
        elif _BIDS_SERIES.intersection(parts[:-1]) or _BIDS_SERIES_SUFFIX.search(parts[-1]):
            place.left_out = "time series, field map or no MRI"
        elif (*parts[:-1], strip_ending(parts[-1])) in bvals:
            place.left_out = "diffusion series of many volumes: a .bval file lies beside it"
        places.append(place)
    return places, []


_FOMO_SUBJECT = re.compile(r"sub_\w+")
_FOMO_SESSION = re.compile(r"ses_\w+")


def _fomo60k(tree: _Tree) -> tuple[list[_Place], list[str]]:
    """``sub_N/ses_M/<contrast>[_k].nii.gz``; the fine-tuning sets have it twice, in ``preprocessed`` and ``labels``."""
    answers: dict[tuple[str, str, str], str] = {}
    places = []
    for parts in sorted(side for side in tree.sides if side[-1] in ("label.txt", "labels.txt")):
        place = _fomo_place(tree, parts)
        text = Path(tree.root, *parts).read_text(encoding="utf-8").split()
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


def _fomo_place(tree: _Tree, parts: Sequence[str]) -> _Place:
    at = next((i for i, part in enumerate(parts[:-1]) if _FOMO_SUBJECT.fullmatch(part)), None)
    if at is None:
        return _Place(tree.name, "", "")
    above = [part for part in parts[:at] if part.lower() not in ("preprocessed", "labels", "data", "images")]
    session = parts[at + 1] if at + 2 < len(parts) and _FOMO_SESSION.fullmatch(parts[at + 1]) else ""
    return _Place(above[0] if above else tree.name, parts[at], session)


def _fomo300k(tree: _Tree) -> tuple[list[_Place], list[str]]:
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


def _openmind(tree: _Tree) -> tuple[list[_Place], list[str]]:
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


def _openmind_metadata(tree: _Tree) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Path from ``ds…`` on -> the row of openneuro_metadata.csv, less its paths."""
    table = next((side for side in tree.sides if side[-1] == "openneuro_metadata.csv"), None)
    if table is None:
        return {}, []
    found = {}
    with open(os.path.join(tree.root, *table), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if "image_path" not in (reader.fieldnames or ()):
            return {}, ["openneuro_metadata.csv has no column image_path and was not joined"]
        kept = [name for name in reader.fieldnames or () if name and not name.endswith("_path")]
        for row in reader:
            path = re.search(r"ds\d+.*", row["image_path"])
            if path:
                empty = ("", "nan", "n/a", "None")
                found[path[0]] = {name: "" if (row[name] or "") in empty else row[name] for name in kept}
    return found, [f"openneuro_metadata.csv: {len(found)} rows"]


# ------------------------------------------------------------------------------------------------- nnU-Net

_LABELS_TR = "in labelsTr/; claim with masks.NAME= or labels.NAME="


def _nnunet(tree: _Tree) -> tuple[list[_Place], list[str]]:
    """``imagesTr/case_0000.nii.gz`` with the channels' names in dataset.json, ``labelsTr/case.nii.gz``.

    The Medical Segmentation Decathlon's form, without the channel number, is understood as well.
    """
    channels, notes = _channels(tree)
    labelled = {strip_ending(parts[-1]) for parts in tree.files if parts[0] == "labelsTr"}
    places = []
    for parts in tree.files:
        stem = strip_ending(parts[-1])
        number = re.fullmatch(r"(.+)_(\d{4})", stem)
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


def _channels(tree: _Tree) -> tuple[dict[int, str], list[str]]:
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


def _default_labels(tree: _Tree, places: Iterable[_Place]) -> list[tuple[str, _Place]]:
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
_SUBJECT_FOLDER = re.compile(r"(?:sub|subj|subject|patient|pat|case|participant)[-_ ]?\w*\d\w*", re.IGNORECASE)
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
)


def _folder(tree: _Tree) -> tuple[list[_Place], list[str]]:
    """Guesses from names: which level of folders is the subject, what the file's name adds."""
    kinds = [_kinds(parts) for parts in tree.files]
    groups = _group_folders(tree.files, kinds)
    guesses = [_guess(parts, kind, groups, tree.name) for parts, kind in zip(tree.files, kinds)]
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
        if not _is_derived(parts):
            contrasts.setdefault(contrast, parts[-1])
            subjects.setdefault(who, "/".join(parts))
            sessions.setdefault(session, "/".join(parts))
    return places, _guess_notes(contrasts, subjects, sessions)


def _guess_notes(contrasts: Mapping[str, str], subjects: Mapping[str, str], sessions: Mapping[str, str]) -> list[str]:
    def shown(found: Mapping[str, str]) -> str:
        return ", ".join(f"{key or 'none'} <- {path}" for key, path in list(found.items())[:8])

    if not subjects:
        return []
    notes = [f"guessed contrasts: {shown(contrasts)}", f"guessed subjects: {shown(dict(list(subjects.items())[:3]))}"]
    if set(sessions) != {""}:
        notes.append(f"guessed sessions: {shown(dict(list(sessions.items())[:4]))}")
    return notes


def _kinds(parts: Sequence[str]) -> tuple[str, str, list[str]]:
    """The explicit subject folder, the explicit session folder, and the folders that may be either."""
    subject = session = ""
    others: list[str] = []
    shown = contrast_of(parts[-1])
    for part in parts[:-1]:
        if not subject and _SUBJECT_FOLDER.fullmatch(part):
            subject = part
        elif _CONTRAST_FOLDER.fullmatch(part):
            # T1/flair.nii.gz: a folder that contradicts the file's name is a time point.
            if shown not in ("unknown", contrast_of(part)) and part.lower() in ("t1", "t2"):
                session = session or part
        elif _SESSION_FOLDER.fullmatch(part) and (subject or others):
            session = session or part
        elif not _PLAIN_FOLDER.fullmatch(part):
            others.append(part)
    return subject, session, others


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
        if contrast_of(word) != "unknown" or _DERIVED.fullmatch(word.lower()) or word.lower() == "lesion"
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
