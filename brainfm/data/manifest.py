"""The manifest: a CSV or TSV with one row a scan, and the words for what a scan shows.

``dataset,subject,session,contrast,path`` and any further columns. Columns that end in ``_mask`` or ``_labels`` are
paths to label volumes. Relative paths are relative to the manifest's folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from brainfm.data.derived import why_no_scan
from brainfm.errors import ManifestError
from brainfm.files import write_table, write_whole
from brainfm.imaging.endings import strip_ending

REQUIRED = ("dataset", "subject", "session", "contrast", "path")
LABEL_ENDINGS = ("_mask", "_labels")

CONTRASTS = (
    "t1", "t1c", "t2", "flair", "pd", "t2s", "swi", "minip", "qsm",
    "dwi", "adc", "fa", "md", "mra", "asl", "perfusion", "bold", "t1map", "t2map",
    "rendered",  # made from a label map: no scanner, no fixed contrast
    "unknown",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- what a scan shows


def _words(pattern: str) -> re.Pattern[str]:
    """The pattern as whole words of a name whose words are joined by ``_``."""
    return re.compile(f"(?:^|_)(?:{pattern})(?=_|$)")


_PLANE = "(?:inplane|in_plane|3d|2d|ax|axial|sag|sagittal|cor|coronal|tra|qt)?_?"
_WEIGHTED = "_?(?:w|wi|weighted)?_?(?:3d|2d|tse|fse|se|space|tfe|ffe|mprage)?"
_T1 = rf"{_PLANE}t1n?{_WEIGHTED}"
_T2 = rf"{_PLANE}t2{_WEIGHTED}"
_AGENT = _words("gd|gad|gado|gadolinium|gadovist|gbca|post|postgd|postcontrast|postcon|ce|c|km|contrast|enhanced")
_NO_AGENT = _words("pre|native|without|no|non")

# The first rule that fits decides: derived maps before the weighting they came from, FLAIR and T2* before T2.
_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("unknown", _words("(?:t2_?star|t2s|r1|r2|r2_?star|r2s|pd|m0|mt|mtr|mtv|b1|b0|tb1|rb1)_?map|mtsat|pdt2|pd_t2")),
    ("adc", _words("adc|adc_?map|apparent_diffusion_coefficient")),
    ("fa", _words("fa|fa_?map|fractional_anisotropy")),
    ("md", _words("md|md_?map|mean_diffusivity")),
    ("t1map", _words("t1_?map|qt1")),
    ("t2map", _words("t2_?map|qt2")),
    ("qsm", _words("qsm|chi_?map")),
    ("minip", _words("minip|min_ip|mip_?swi|swi_?mip")),
    ("swi", _words("swi|swan|swi3d|susceptibility")),
    ("t1", _words("t1w?_?flair")),  # T1 FLAIR is a T1-weighted sequence
    ("flair", re.compile(r"flair|(?:^|_)(?:t2_?f|dark_?fluid)(?=_|$)")),
    ("t2s", _words(r"t2_?(?:s|star|sstar|stern)_?w?|me_?gre|gre|t2_?(?:ffe|gre|hemo|fl2d)|hemo")),
    ("perfusion", _words("dsc|dce|pwi|perf|perfusion|r?cbv|mtt|tmax|ttp")),
    ("asl", _words("asl|p?casl|pasl|cbf")),
    ("mra", _words("mra|angio|angiography|tof|mrv")),
    ("t1c", _words("t1_?w?_?(?:ce|c|gd|gad|gado|km|post|postgd)|post_?t1|ct1w?")),
)
_WEIGHTINGS = re.compile(rf"(?:^|_)(?:(?P<t1>{_T1})|(?P<t2>{_T2}))(?=_|$)")
_LATE_RULES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("pd", _words(r"(?:ax_?)?pdw?|pdwi|dp|proton_density")),
    ("dwi", _words(r"dwi|dti|dki|diff|diffusion|trace|b_?\d{1,4}|isodwi|hardi")),
    ("bold", _words("bold|fmri|rsfmri")),
    ("rendered", _words("rendered")),
    ("t1", _words(r"mp2?_?rage|mpr|mprage\w*|mp2rage\w*|unit1|i?r?f?spgr|bravo|t1tfe|tfe|mdeft")),
)
# Entities of BIDS names. Only ce- (contrast agent) is evidence by itself; acq- is asked where the rest is silent.
_ACQUISITION = re.compile(r"(?:^|(?<=_))(?:acq|desc)-[a-z0-9+.]*(?=_|$)")
_SESSION_WORD = re.compile(r"(?:^|(?<=_))(?:ses[-_][a-z0-9]+|(?:session|visit|study|sub)[-_]?\d+)(?=_|$)")
_ENTITY = re.compile(
    "(?:^|(?<=_))(?:sub|ses|run|task|dir|rec|echo|flip|inv|mt|part|proc|space|res|den|label|split|recording|chunk|hemi"
    "|from|to|mode|tracksys|trc|stain|sample|atlas|seg|scale|mod|cohort|tpl)-[a-z0-9+.]*(?=_|$)"
)
# What acq- may add to what the suffix says: acq-FLAIR_T2w is a FLAIR.
_REFINES = {("t2", "flair"), ("t2", "t2s"), ("t1", "t1c"), ("t2s", "swi"), ("dwi", "adc"), ("dwi", "fa"), ("dwi", "md")}


def contrast_of(text: str) -> str:
    """What a file name, a BIDS suffix or a channel name says the scan shows.

    Args:
        text: e.g. ``sub-01_ses-t1_acq-MPRAGE_T1w.nii.gz``, ``T2starw``, ``t1_2``. Subject and session entities are no
            evidence: ``ses-t1`` is not a T1.

    Returns:
        A word of ``CONTRASTS``; ``unknown`` where the text says nothing.
    """
    name = strip_ending(text.replace("\\", "/").rsplit("/", 1)[-1]).replace("*", "star").replace("+", "_")
    name = re.sub(r"(?<=[a-z])(?=[A-Z][A-Z0-9])", "_", name)  # inplaneT2, sT2W, T1wCE
    name = re.sub(r"[^a-z0-9_-]+", "_", name.lower())
    name = _SESSION_WORD.sub("", _ENTITY.sub("", name))
    plain = _contrast_of_words(_ACQUISITION.sub("", name))
    if "acq-" in name or "desc-" in name:
        full = _contrast_of_words(re.sub(r"(?:^|(?<=_))(?:acq|desc)-", "", name))
        if plain == "unknown" or (plain, full) in _REFINES:
            return full
    return plain


@lru_cache(maxsize=65536)
def _contrast_of_words(name: str) -> str:
    words = re.sub(r"[^a-z0-9]+", "_", name).strip("_")
    for contrast, pattern in _RULES:
        if pattern.search(words):
            return contrast
    found = _WEIGHTINGS.search(words)
    if found:
        contrast = str(found.lastgroup)
    else:
        contrast = next((c for c, pattern in _LATE_RULES if pattern.search(words)), "unknown")
    if contrast == "t1" and _AGENT.search(words) and not _NO_AGENT.search(words):
        return "t1c"
    return contrast


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True, slots=True)
class Scan:
    """One row: a 3D image file.

    Attributes:
        dataset, subject: together they name a person; a person is never on two sides of a split.
        session: the visit; empty where there is only one.
        contrast: a word of ``CONTRASTS``.
        path: as written in the manifest; ``Manifest.resolve`` finds the file.
        columns: every further column, empty strings included.
    """

    dataset: str
    subject: str
    session: str
    contrast: str
    path: str
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dataset, self.subject, self.session

    @property
    def subject_key(self) -> str:
        return f"{self.dataset}/{self.subject}"


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and agrees with itself.

    Attributes:
        path: the file; its folder is where relative paths begin.
        scans: in the file's order.
        sha256: of the file's bytes, for the provenance of what is made from it.
    """

    path: Path
    scans: tuple[Scan, ...]
    sha256: str

    def sessions(self) -> dict[tuple[str, str, str], list[Scan]]:
        """The scans of each visit, by (dataset, subject, session), in the file's order."""
        found: dict[tuple[str, str, str], list[Scan]] = {}
        for scan in self.scans:
            found.setdefault(scan.key, []).append(scan)
        return found

    def resolve(self, text: str) -> Path:
        """Where a path of the manifest lies."""
        return self.path.parent / text


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads and checks a manifest; no image file is touched.

    Raises:
        ManifestError: where the file is missing, not UTF-8, has no rows, lacks a column, has a row of another length,
            an empty subject or path, a contrast outside the vocabulary, or the same scan twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(f"no manifest at {path}, expected a CSV or TSV file")
    raw = path.read_bytes()
    columns, rows = _table(raw, path)
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise ManifestError(f"{path} has no column {missing[0]!r}, expected {', '.join(REQUIRED)}")
    further = [name for name in columns if name not in REQUIRED]
    scans = []
    for line, values in rows:
        if len(values) != len(columns):
            raise ManifestError(f"line {line} of {path} has {len(values)} fields, expected {len(columns)}")
        row = dict(zip(columns, (value.strip() for value in values)))
        dataset, subject, session, contrast, file = (row[name] for name in REQUIRED)
        scans.append(Scan(dataset, subject, session, contrast, file, {name: row[name] for name in further}))
    if not scans:
        raise ManifestError(f"{path} has a header but no rows, expected one row a scan")
    _check(scans, path, [line for line, _ in rows])
    return Manifest(path=path.absolute(), scans=tuple(scans), sha256=hashlib.sha256(raw).hexdigest())


def write_manifest(path: str | os.PathLike[str], scans: Iterable[Scan]) -> None:
    """Writes a manifest in an order that depends on its content alone; the file appears whole or not at all.

    Absolute paths of files below the manifest's folder are written relative to it, so that the folder can be moved.

    Raises:
        ManifestError: for rows that ``read_manifest`` would refuse, or an ending other than .csv or .tsv.
    """
    path = Path(path).absolute()
    delimiter = delimiter_of(path)
    prefix = f"{path.parent}{os.sep}"
    ordered = sorted(
        (_written(scan, prefix) for scan in scans), key=lambda s: (s.dataset, s.subject, s.session, s.contrast, s.path)
    )
    if not ordered:
        raise ManifestError(f"no scan to write to {path}, expected at least one")
    _check(ordered, path, None)
    further = list(dict.fromkeys(name for scan in ordered for name in scan.columns))
    clash = [name for name in further if name in REQUIRED or not name]
    if clash:
        raise ManifestError(f"the further column {clash[0]!r} has the name of a required one, writing {path}")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow([*REQUIRED, *further])
    for scan in ordered:
        writer.writerow([*scan.key, scan.contrast, scan.path, *(scan.columns.get(name, "") for name in further)])
    try:
        content = text.getvalue().encode()
    except UnicodeEncodeError as error:
        strange = error.object[max(0, error.start - 60) : error.end + 60]
        raise ManifestError(f"{path}: {strange!r} is no text that UTF-8 can hold, expected names in UTF-8") from None
    write_whole(path, content)


def _written(scan: Scan, prefix: str) -> Scan:
    """The scan with its paths relative to the manifest's folder where they lie below it."""
    labels = {name: _relative(cell, prefix) for name, cell in label_paths(scan).items()}
    return replace(scan, path=_relative(scan.path, prefix), columns={**scan.columns, **labels})


def _relative(path: str, prefix: str) -> str:
    short = path.removeprefix(prefix)
    # Blanks around a cell are forgiven when it is read, so those of a name must not stand at its end.
    return f".{os.sep}{short}" if short != short.strip() else short


# ------------------------------------------------------------------------------------------------- what was left out


def left_out_file(path: str | os.PathLike[str]) -> Path:
    """Where the files that a manifest left out are listed: beside it, ``NAME.left_out.csv``."""
    return Path(path).with_suffix(".left_out.csv")


def write_left_out(path: str | os.PathLike[str], left_out: Iterable[tuple[str, str]]) -> None:
    """Writes (file, reason) beside a manifest, by reason and name; without any, a list of before is taken away.

    Raises: FileError where it cannot be written.
    """
    file, rows = left_out_file(path), sorted(set(left_out), key=lambda row: (row[1], row[0]))
    if not rows:
        file.unlink(missing_ok=True)
        return
    write_table(file, ["path", "reason"], rows)


def read_left_out(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reason -> files that a manifest left out; empty where nothing is known of any."""
    file = left_out_file(path)
    if not file.is_file():
        return {}
    columns, rows = _table(file.read_bytes(), file)
    if columns != ["path", "reason"] or any(len(values) != 2 for _, values in rows):
        raise ManifestError(f"{file} has the columns {', '.join(columns)}, expected path and reason alone")
    found: dict[str, list[str]] = {}
    for _, (name, reason) in rows:
        found.setdefault(reason, []).append(name)
    return found


def check_files(manifest: Manifest) -> None:
    """Looks whether every scan and label volume is there.

    Raises:
        ManifestError: naming the first missing file and the number of them.
    """
    wanted = dict.fromkeys(path for scan in manifest.scans for path in (scan.path, *label_paths(scan).values()))
    missing = [path for path in wanted if not manifest.resolve(path).is_file()]
    if missing:
        raise ManifestError(
            f"{len(missing)} of {len(wanted)} files named in {manifest.path} are missing, first {missing[0]!r}"
        )


def label_paths(scan: Scan) -> dict[str, str]:
    """The label volumes that a row names, by column; empty cells left out."""
    return {name: path for name, path in scan.columns.items() if path and name.endswith(LABEL_ENDINGS)}


def plain_first(scan: Scan) -> tuple[bool, bool, int, str]:
    """Orders the scans of one contrast: what no program made, a name in BIDS' form, few words, then by path.

    ``sub-01_T1w`` comes before ``sub-01_acq-fast_T1w`` and ``c1sub-01_T1w``.
    """
    name = scan.path.replace("\\", "/").rsplit("/", 1)[-1]
    words = re.findall(r"[^_. ]+", strip_ending(name))
    return bool(why_no_scan((name,))), not name.startswith("sub-") and "sub-" in name, len(words), scan.path


def scan_names(scans: Sequence[Scan]) -> list[str]:
    """A name for each scan of one session, in the order given: ``t1``, ``t1_2``, numbered with the plainest first.

    The order of the rows does not matter: the same files get the same names.
    """
    order = sorted(range(len(scans)), key=lambda i: (scans[i].contrast, *plain_first(scans[i])))
    seen: Counter[str] = Counter()
    names = [""] * len(scans)
    for i in order:
        contrast = scans[i].contrast
        seen[contrast] += 1
        names[i] = contrast if seen[contrast] == 1 else f"{contrast}_{seen[contrast]}"
    return names


def session_labels(scans: Sequence[Scan]) -> dict[str, str]:
    """The label volumes of one session: column name to path, as written.

    Raises:
        ManifestError: where two rows of the session name different files for one column.
    """
    found: dict[str, str] = {}
    for scan in scans:
        for name, path in label_paths(scan).items():
            if found.setdefault(name, path) != path:
                raise ManifestError(
                    f"session {'/'.join(scan.key)} names two files in column {name}, {found[name]!r} and {path!r}, "
                    "expected one a session"
                )
    return found


def delimiter_of(path: Path) -> str:
    """Of a manifest by its ending. Raises: ManifestError for another one; asked before long work is done."""
    found = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    if found is None:
        raise ManifestError(f"a manifest ends in .csv or .tsv, found {path}")
    return found


def _table(raw: bytes, path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows with their line numbers; blank lines are skipped."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path} is not UTF-8 (byte {error.start}), expected text saved as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(path))
    rows: list[tuple[int, list[str]]] = []
    try:
        rows.extend((reader.line_num, values) for values in reader if any(value.strip() for value in values))
    except csv.Error as error:
        raise ManifestError(f"line {reader.line_num} of {path} cannot be read: {error}") from None
    if not rows:
        raise ManifestError(f"{path} is empty, expected a header and one row a scan")
    columns = [name.strip() for name in rows[0][1]]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise ManifestError(f"{path} has the column {twice[0]!r} twice, expected each once")
    return columns, rows[1:]


def _check(scans: Sequence[Scan], path: Path, lines: Sequence[int] | None) -> None:
    """Raises: ManifestError for the first row that is incomplete, misspelt or there twice."""
    vocabulary = frozenset(CONTRASTS)
    seen: dict[tuple[str, str, str, str], int] = {}
    for number, scan in enumerate(scans):
        where = f"line {lines[number]} of {path}" if lines else f"{'/'.join(scan.key)} in {path}"
        empty = [name for name in ("dataset", "subject", "path") if not getattr(scan, name)]
        if empty:
            raise ManifestError(f"{where} has no {empty[0]}, expected one")
        if scan.contrast not in vocabulary:
            meant = contrast_of(scan.contrast)
            hint = f"perhaps {meant!r}; " if meant != "unknown" else ""
            raise ManifestError(f"{where} has contrast {scan.contrast!r}, expected {hint}one of {', '.join(CONTRASTS)}")
        key = (*scan.key, scan.path)
        if key in seen:
            first = f"line {lines[seen[key]]}" if lines else "an earlier row"
            raise ManifestError(f"{where} repeats {first}: {scan.path!r} of {'/'.join(scan.key)}, expected once")
        seen[key] = number
