"""Tables of region volumes, as segmentation programs leave them."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.errors import ManifestError

ICV_ML = (500.0, 3000.0)  # an intracranial volume outside is none
_MOST_ZEROS = 0.05  # of the subjects; a region that is empty more often is no measure of size
_LEAST_QUALITY = 0.65  # SynthSeg's authors reject a segmentation with a lower score for any structure
_FS_ICV = ("EstimatedTotalIntraCranialVol", "eTIV", "IntraCranialVol")
_FS_HEMISPHERES = re.compile(r"[lr]h(?:Cortex|CerebralWhiteMatter|CorticalWhiteMatter)Vol")
_FS_DERIVED = re.compile(r"Vol$|-to-eTIV$|SurfaceHoles$|Vol-No|VolNo|^BrainSeg")


@dataclass(frozen=True)
class VolumeTable:
    """Region volumes of many subjects or sessions.

    Attributes:
        path: what was read.
        kind: ``synthseg``, ``freesurfer``, ``dlmuse`` or ``brainfm``.
        regions: names in the order of the file.
        rows: id -> region -> ml; a region may be absent from a row.
        icv_ml: id -> intracranial volume.
        problems: one sentence for each row that was left out.
    """

    path: Path
    kind: str
    regions: tuple[str, ...]
    rows: dict[str, dict[str, float]]
    icv_ml: dict[str, float]
    problems: list[str]


# id, region -> text as it stands in the file, text of the intracranial volume, reason to leave the row out or ""
_Raw = tuple[str, dict[str, str], str, str]


def read_volumes(path: Path) -> VolumeTable:
    """Volumes of regions and of the intracranial cavity, in ml.

    Known are SynthSeg's ``volumes.csv`` (with a ``qc.csv`` beside it, rows of low quality are left out), a folder or
    glob of FreeSurfer's ``aseg.stats``, a table of ``asegstats2table``, a table of DLMUSE, and brainfm's own.

    Args:
        path: a file, a folder that is searched for ``aseg.stats``, or a pattern with ``*``.

    Raises:
        ManifestError: none of these, or no row that can be used.
    """
    path = Path(path)
    kind, ml, raw = _raw_rows(path)
    return _checked(path, kind, ml, raw)


def _raw_rows(path: Path) -> tuple[str, float, list[_Raw]]:
    """Kind, the file's unit in ml, and the rows as text."""
    if path.is_dir() or "*" in str(path) or path.suffix == ".stats":
        return "freesurfer", 1e-3, [_stats_row(file) for file in _stats_files(path)]
    header, cells = _table(path)
    first, lower = header[0], [name.lower() for name in header]
    fs_icv = next((name for name in _FS_ICV if name in header), None)
    if fs_icv is not None and (first.startswith("Measure:") or "Left-Hippocampus" in header):
        return "freesurfer", 1e-3, _plain_rows(header, cells, header.index(fs_icv), _fs_region, _fs_subject)
    if "total intracranial" in lower:
        failed = _failed_quality(path)
        raw = _plain_rows(header, cells, lower.index("total intracranial"), lambda name: name, lambda text: text)
        return "synthseg", 1e-3, [(who, values, icv, failed.get(who, "")) for who, values, icv, _ in raw]
    if "702" in header and sum(name.isdigit() for name in header) >= 10:
        return "dlmuse", 1e-3, _plain_rows(header, cells, header.index("702"), _muse_region, lambda text: text)
    if {"dataset", "subject", "icv_ml"} <= set(header):
        return "brainfm", 1.0, _own_rows(header, cells)
    raise ManifestError(
        f"{path}: the columns are {', '.join(header[:6])}{', ...' if len(header) > 6 else ''}, expected a table of "
        "SynthSeg ('total intracranial'), asegstats2table ('EstimatedTotalIntraCranialVol'), DLMUSE ('702') or brainfm "
        "('dataset', 'subject', 'icv_ml')"
    )


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV or TSV; every row has as many cells as the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as a table ({error})") from None
    first = text.split("\n", 1)[0]
    delimiter = max("\t,;", key=first.count)
    lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text), delimiter=delimiter)]
    lines = [line for line in lines if any(line)]
    if len(lines) < 2:
        raise ManifestError(f"{path}: found {len(lines)} lines, expected a header and at least one row of volumes")
    header = lines[0]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ManifestError(f"{path}: column {twice[0]!r} appears more than once")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise ManifestError(f"{path}: row {number} has {len(line)} cells, expected {len(header)}")
    return header, lines[1:]


def _plain_rows(
    header: Sequence[str],
    cells: Iterable[Sequence[str]],
    icv: int,
    region: Callable[[str], str | None],
    subject: Callable[[str], str],
) -> list[_Raw]:
    """Rows of a table whose first column is the subject; region says what a column is called, None to leave it out."""
    columns = [(n, region(name)) for n, name in enumerate(header) if n not in (0, icv) and name]
    kept = [(n, name) for n, name in columns if name is not None]
    return [(subject(line[0]), {name: line[n] for n, name in kept}, line[icv], "") for line in cells]


def _muse_region(name: str) -> str | None:
    """Single regions alone: 300 and above are sums of them."""
    return f"muse_{name}" if name.isdigit() and int(name) < 300 else None


def _fs_region(name: str) -> str | None:
    """Structures and the cortex and white matter of each hemisphere; no sums, ratios or counts."""
    return name if _FS_HEMISPHERES.fullmatch(name) or not _FS_DERIVED.search(name) else None


def _fs_subject(text: str) -> str:
    path = Path(text)
    return path.parent.parent.name if path.suffix == ".stats" else path.name


def _stats_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.rglob("aseg.stats"))
    elif "*" in str(path):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        files = sorted(anchor.glob(str(path.relative_to(path.anchor) if path.is_absolute() else path)))
    else:
        files = [path]
    if not files:
        raise ManifestError(f"{path}: found no aseg.stats, expected SUBJECT/stats/aseg.stats")
    return files


def _stats_row(path: Path) -> _Raw:
    """One aseg.stats: its table, and of its measures the hemispheres and the intracranial volume."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read as FreeSurfer statistics ({error})") from None
    columns: list[str] = []
    values: dict[str, str] = {}
    icv = ""
    for line in lines:
        words = line.split()
        if line.startswith("# Measure"):
            fields = [field.strip() for field in line.removeprefix("# Measure").split(",")]
            if len(fields) >= 4 and fields[0] in _FS_ICV:
                icv = fields[3]
            elif len(fields) >= 4 and _FS_HEMISPHERES.fullmatch(fields[1]):
                values[fields[1]] = fields[3]
        elif line.startswith("# ColHeaders"):
            columns = words[2:]
        elif words and not line.startswith("#") and "StructName" in columns and len(words) == len(columns):
            row = dict(zip(columns, words))
            values[row["StructName"]] = row["Volume_mm3"]
    if "Volume_mm3" not in columns:
        raise ManifestError(f"{path}: found no '# ColHeaders' with StructName and Volume_mm3, expected aseg.stats")
    return _fs_subject(str(path.absolute())), values, icv, ""


def _own_rows(header: Sequence[str], cells: Iterable[Sequence[str]]) -> list[_Raw]:
    raw = []
    for line in cells:
        row = dict(zip(header, line))
        who = "/".join(row[name] for name in ("dataset", "subject", "session") if name in row)
        values = {name.removesuffix("_ml"): row[name] for name in header if name.endswith("_ml") and name != "icv_ml"}
        flag = row["flag"] if "flag" in row else row.get("quality", "")  # quality is a number where there are flags
        raw.append((who, values, row["icv_ml"], f"flagged as {flag!r}" if flag else ""))
    return raw


def _failed_quality(path: Path) -> dict[str, str]:
    """Subjects whose SynthSeg quality scores, in a table beside the volumes, are too low."""
    beside = [path.with_name(name) for name in ("qc.csv", f"{path.stem}_qc.csv", path.name.replace("volumes", "qc"))]
    for candidate in beside:
        if candidate != path and candidate.is_file():
            header, cells = _table(candidate)
            failed = {}
            for line in cells:
                scores = {name: _number(text) for name, text in zip(header[1:], line[1:])}
                low = [name for name, score in scores.items() if score is not None and score < _LEAST_QUALITY]
                if low:
                    failed[line[0]] = f"{candidate.name} gives {low[0]} {scores[low[0]]:g}, below {_LEAST_QUALITY}"
            return failed
    return {}


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _checked(path: Path, kind: str, ml: float, raw: Sequence[_Raw]) -> VolumeTable:
    rows: dict[str, dict[str, float]] = {}
    icv_ml: dict[str, float] = {}
    problems = []
    by_id: dict[str, list[_Raw]] = {}
    for row in raw:
        reason = _fault(row, ml)
        if reason:
            problems.append(f"{path.name}: {row[0] or 'a row without a name'} left out, {reason}")
        else:
            by_id.setdefault(row[0], []).append(row)
    for who, same in by_id.items():
        if any(row != same[0] for row in same):
            problems.append(f"{path.name}: {who} left out, it has {len(same)} rows that differ")
            continue
        _, values, icv, _ = same[0]
        rows[who] = {name: float(text) * ml for name, text in values.items()}
        icv_ml[who] = float(icv) * ml
    if not rows:
        raise ManifestError(f"{path}: none of {len(raw)} rows can be used, e.g. {problems[0]}")
    regions = tuple(dict.fromkeys(name for values in rows.values() for name in values))
    return VolumeTable(path, kind, regions, rows, icv_ml, problems)


def _fault(row: _Raw, ml: float) -> str:
    who, values, icv_text, reason = row
    icv = _number(icv_text)
    low, high = ICV_ML
    if reason:
        return reason
    if not who:
        return "expected a subject"
    if icv is None:
        return f"its intracranial volume is {icv_text!r}, expected a number"
    if not low <= icv * ml <= high:
        return f"its intracranial volume is {icv * ml:.4g} ml, expected {low:g} to {high:g} ml"
    for name, text in values.items():
        value = _number(text)
        if value is None or value < 0:
            return f"{name} is {text!r}, expected a volume of 0 or more"
    return ""


def match(table: VolumeTable, keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Which row belongs to which subject or session.

    A row fits where its id is the key or its subject; else where it is so but for case, ``sub-`` and a file ending;
    else where the words of one are a run of words of the other (``IXI012`` and ``IXI012-HH-1211_T1``). A run that is
    short or a mere number must be at the beginning or follow ``sub-``. Rows of another session never fit. The rows of
    brainfm's own tables fit by dataset, subject and session alone.

    Args:
        table: of volumes.
        keys: ``dataset/subject`` or ``dataset/subject/session``.

    Returns:
        key -> id of the row, and a sentence for each key that no row fits, or rows that cannot be told apart, or a row
        that another key fits as well.
    """
    index = _Ids(table)
    fits = {key: index.fitting(key) for key in dict.fromkeys(keys)}
    claims: dict[str, list[tuple[int, str]]] = {}
    for key, (way, ids) in fits.items():
        if len(ids) == 1:
            claims.setdefault(ids[0], []).append((way, key))
    found, missing = {}, []
    for key, (way, ids) in fits.items():
        rivals = [other for rank, other in claims.get(ids[0], []) if other != key and rank <= way] if ids else []
        if not ids:
            missing.append(f"{key}: no row of {table.path.name}")
        elif len(ids) > 1:
            missing.append(f"{key}: {len(ids)} rows of {table.path.name} fit ({', '.join(ids[:3])})")
        elif rivals:
            missing.append(f"{key}: the row {ids[0]} of {table.path.name} fits {rivals[0]} as well")
        else:
            found[key] = ids[0]
    return found, missing


class _Ids:
    """The ids of a table, ready for look-ups: n keys and m ids cost n + m steps."""

    def __init__(self, table: VolumeTable) -> None:
        self.own = table.kind == "brainfm"
        self.ids = list(table.rows)
        self.known = set(self.ids)
        self.whole: dict[str, list[str]] = {}
        self.runs: dict[str, list[str]] = {}
        self.by_start: dict[str, list[str]] = {}
        for who in self.ids:
            parts = who.split("/")
            for length in range(1, len(parts)):
                self.by_start.setdefault("/".join(parts[:length]), []).append(who)
            words = _words(who)
            self.whole.setdefault(" ".join(words), []).append(who)
            for run in _runs(words):
                self.runs.setdefault(run, []).append(who)

    def fitting(self, key: str) -> tuple[int, list[str]]:
        """The way that leads to a row, smaller is closer, and the ids it leads to."""
        subject, session = ([*key.split("/"), "", ""][1:3]) if "/" in key else (key, "")
        if key in self.known:
            return 0, [key]
        if self.own:
            above = f"{key.rsplit('/', 1)[0]}" if session else ""
            return 1, self.by_start.get(key, []) or [who for who in (above,) if who in self.known]
        words = _words(subject)
        plain = " ".join(words)
        ways: tuple[Callable[[], Iterable[str]], ...] = (
            lambda: [subject] if subject in self.known else [],
            lambda: self.whole.get(plain, []),
            lambda: [*self.runs.get(plain, []), *self.runs.get(f"sub {plain}", [])],
            lambda: [who for run in _runs(words) for who in self.whole.get(run, [])],
        )
        found = [_of_session(list(dict.fromkeys(candidates())), session) for candidates in ways]
        if session:  # a row that names the session is closer than one that names the subject alone
            for way, ids in enumerate(found, start=1):
                naming = [who for who in ids if _session_word(session) in _words(who)[1:]]
                if naming:
                    return way, naming
        return next(((way, ids) for way, ids in enumerate(found, start=1) if ids), (len(ways), []))


def _words(text: str) -> list[str]:
    """Lower-case words and numbers of an id, without folders, file ending, contrast and a leading ``sub-``."""
    name = text.lower().rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"\.(?:nii|nii\.gz|mgz|mgh)$", "", name)
    name = re.sub(r"_(?:t1w?|synthseg|seg)$", "", name)
    return re.findall("[a-z0-9]+", re.sub(r"^(?:sub|subject)[-_](?=.)", "", name))


def _runs(words: Sequence[str]) -> list[str]:
    """Runs of neighbouring words that are shorter than the whole and tell a person."""
    runs = []
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            run = words[start:stop]
            telling = len("".join(run)) >= 4 and any(not word.isdigit() for word in run)
            if len(run) < len(words) and (start == 0 or telling or (run[0] == "sub" and len(run) > 1)):
                runs.append(" ".join(run))
    return list(dict.fromkeys(runs))


def _session_word(session: str) -> str:
    return re.sub(r"^ses[-_]?", "", session.lower())


def _of_session(ids: list[str], session: str) -> list[str]:
    """Those that name no other session."""
    wanted = _session_word(session).lstrip("0")
    named = {who: re.search(r"(?:^|_)ses[-_]?([a-z0-9]+)", who.lower()) for who in ids}
    return [who for who in ids if not session or (entity := named[who]) is None or entity[1].lstrip("0") == wanted]


def sparse_regions(table: VolumeTable, ids: Sequence[str]) -> list[str]:
    """The regions that are 0 or absent in more than 5 % of these rows."""
    bad = {region: sum(not table.rows[who].get(region) for who in ids) for region in table.regions}
    return [region for region, count in bad.items() if count > _MOST_ZEROS * len(ids)]


def log_fractions(table: VolumeTable, ids: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Natural logarithm of each region's share of the intracranial volume.

    Args:
        table: of volumes.
        ids: its rows, in the order wanted.

    Returns:
        [N, R] float32, NaN where a volume is 0 or absent, and the R regions: all but the sparse ones.
    """
    away = set(sparse_regions(table, ids))
    regions = tuple(region for region in table.regions if region not in away)
    volumes = np.array([[table.rows[who].get(region, 0.0) for region in regions] for who in ids], dtype=np.float64)
    icv = np.array([table.icv_ml[who] for who in ids])
    with np.errstate(divide="ignore"):
        values = np.log(volumes.reshape(len(ids), len(regions)) / icv[:, None])
    values[~np.isfinite(values)] = np.nan
    return values.astype(np.float32), regions


def standardise(values: np.ndarray, on: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard scores by the mean and standard deviation of some rows.

    Args:
        values: [N, R], NaN where not known.
        on: indices of the rows that define mean and deviation: those of the training side.

    Returns:
        [N, R] float32, NaN where it was, and mean and standard deviation [R]. Where a region has fewer than two values
        in those rows or does not vary its deviation is 1.
    """
    chosen = np.asarray(values, dtype=np.float64)[np.asarray(on, dtype=int)]
    known = np.isfinite(chosen)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, chosen, 0).sum(0) / count
    std = np.sqrt(np.where(known, (chosen - mean) ** 2, 0).sum(0) / count)
    std[(std < 1e-6) | (known.sum(0) < 2)] = 1
    return ((values - mean) / std).astype(np.float32), mean.astype(np.float32), std.astype(np.float32)
