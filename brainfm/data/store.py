"""The store: prepared scans on disk, ready for random reads of small blocks.

::

    store/spec.json                          what was done to every scan; one store, one spec
    store/index.csv                          one row a scan or label; all that `Store.open` reads
    store/failures.csv                       what could not be prepared, and why
    store/alignment.csv                      with align=rigid: how scans and visits were moved, and how well they fit
    store/sessions/<readable>-<8 hex>/       a session: session.json, NAME.b2nd, foreground.npy, LABEL.points.npy,
                                             and NAME@level1.b2nd, ...: coarser copies of each volume

A session's folder is written under a temporary name and renamed when it is complete and on the disk, so whatever is
found under its final name is whole. Nothing in a store depends on the clock, the process or the order of the work:
two runs over the same files leave the same bytes.

The coarser copies (`brainfm.data.levels`) follow from the volumes bit by bit, so the index and the fingerprint are
silent about them: a store from before there were any has the same identity, and gives the same voxels more slowly.

The layout of a scan was measured by ``scripts/benchmark/store.py --sweep`` on seven real scans at 1 mm, whole heads and
tightly cropped brains: float16, LZ4, random 96^3 patches, one core; sizes are of the cropped float32 volume.

======================  ==========  =====  ======  =========  ====================
filter, chunk/block     rounded to  level  size %  at most %  patches/processor s
======================  ==========  =====  ======  =========  ====================
shuffle, 96/32          -           1      21.8    24.0       460
shuffle, 64/16          -           1      21.6    23.3       735
shuffle, 64/16          2^-7        5      21.2    23.1       650
bitshuffle, 96/32       2^-7        5      19.0    21.9       250
bitshuffle, 64/16       -           5      22.1    24.6       400
bitshuffle, 64/16       2^-7        1      17.8    20.4       460
**bitshuffle, 64/16**   **2^-7**    **5**  17.5    20.0       410 (510 when quiet)
bitshuffle, 48/12       2^-7        5      17.3    19.5       510 (slow to write)
======================  ==========  =====  ======  =========  ====================

Rates swung by a quarter between runs. Rounding to steps of 2^-7 moves no voxel by more than 0.004 standard deviations,
far below the noise of any scan; it pays with bitshuffle, which lines up the bits that have become 0.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm import seeds
from brainfm.data.levels import coarse_image, coarse_labels, coarse_shape, kept_levels
from brainfm.data.manifest import LABEL_ENDINGS, Scan, scan_names, session_labels
from brainfm.data.sources import SourceFile
from brainfm.errors import ConfigError, StoreError
from brainfm.files import sync, write_synced, write_whole
from brainfm.imaging.intensity import half_precision
from brainfm.specs import PreprocessSpec

if TYPE_CHECKING:
    import blosc2  # imported when used: windows of a packed file (data/packed) are read where there is none

    from brainfm.imaging.preprocess import Prepared, Recipe

FORMAT = 1
_CHUNK, _BLOCK = 64, 16
_HANDLES = 256  # open files a process keeps; a mapped file costs address space, not memory
_POINTS = 4096
_HASHES = 1 << 32
# As it was before sessions had frames:
_OLD_INDEX = ("dataset", "subject", "session", "name", "kind", "contrast", "file", "x", "y", "z", "sha256")
_INDEX = (*_OLD_INDEX, "frame", "offset_x", "offset_y", "offset_z")
_ALIGNMENT = (
    "dataset", "subject", "session", "scan", "to", "score_before", "score_after", "moved_mm", "turned_deg", "kept",
    "trusted", "reason",
)  # fmt: skip
_FAILURES = ("dataset", "subject", "session", "contrast", "path", "reason")

Key = tuple[str, str, str]
Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class ScanEntry:
    """A scan or label volume of the store; ``file`` lies in the session's folder, a label's contrast is empty."""

    name: str
    contrast: str
    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class SessionEntry:
    """A session of the store: all its volumes share one grid of ``shape`` voxels.

    Attributes:
        columns: the manifest's further columns; of several rows the first that is filled in, empty ones left out.
        frame: equal for two sessions exactly when their voxels lie in one common space.
        offset_vox: where the session's box begins on the lattice of its frame. Voxel v of session a, and voxel
            v + a.offset_vox - b.offset_vox of a session b of the same frame, show the same place.
    """

    dataset: str
    subject: str
    session: str
    folder: str
    shape: Triple
    scans: tuple[ScanEntry, ...]
    labels: tuple[ScanEntry, ...]
    columns: dict[str, str]
    frame: str
    offset_vox: Triple

    @property
    def key(self) -> Key:
        return self.dataset, self.subject, self.session

    @property
    def subject_key(self) -> str:
        return f"{self.dataset}/{self.subject}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A scan or label that is not in the store, and why. A label's contrast is empty."""

    dataset: str
    subject: str
    session: str
    contrast: str
    path: str
    reason: str


@dataclass(frozen=True)
class Share:
    """The part of all subjects that one of several machines works on: those whose hash lies in a range.

    The bytes of the lock file stand for the hashes, so two runs exclude one another exactly where they could meet.
    """

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From ``i/n``. Raises: ConfigError."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(text))
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ConfigError(f"shard={text}: expected i/n with i from 1 to n, e.g. shard=1/4")
        return cls(int(found[1]), int(found[2]))

    @property
    def start(self) -> int:
        return (self.number - 1) * _HASHES // self.count

    @property
    def stop(self) -> int:
        return self.number * _HASHES // self.count

    def holds(self, dataset: str, subject: str) -> bool:
        return self.start <= int(seeds.unit_hash(f"{dataset}/{subject}", "shard") * _HASHES) < self.stop


class Store:
    """Reads and writes one store. Make it with `open` (to read) or `create` (to write).

    Reads are meant for one thread; processes, forked or spawned, may share the object.

    Attributes:
        path: the folder.
        spec: what was done to every scan.
        share: of the subjects, which this object writes.
        sessions: sorted by key; empty after `create` until `finish`.
    """

    def __init__(self, path: Path, spec: PreprocessSpec, share: Share | None = None) -> None:
        self.path = path
        self.spec = spec
        self.share = share or Share()
        self.sessions: tuple[SessionEntry, ...] = ()
        self._fingerprint = ""
        self._cache: OrderedDict[Path, Any] = OrderedDict()
        self._cache_pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict()}

    # ---------------------------------------------------------------------------------------------------- opening

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """A store to read from.

        Raises: StoreError where the folder is no store, was never finished, or its index is damaged.
        """
        path = Path(path)
        store = cls(path, read_spec(path))
        store._load_index()
        return store

    @classmethod
    def create(cls, path: str | Path, spec: PreprocessSpec, share: Share | None = None) -> Store:
        """A store to write to, new or begun earlier with the same spec; `share` is the part that is written.

        Raises: StoreError where the folder is something else, cannot be written, or was made with another spec.
        """
        path = Path(path)
        foreign = path.exists() and (not path.is_dir() or any(not _is_scratch(p.name) for p in path.iterdir()))
        if (path / "spec.json").exists():  # asked second: another machine may be making the store
            _refuse_other_spec(path, read_spec(path), spec)
            return cls(path, spec, share)
        if foreign:
            raise StoreError(f"{path}: found something that is no store, expected a store, an empty or a new folder")
        document = {"format": FORMAT, "fingerprint": spec.fingerprint(), "preprocess": spec.to_dict()}
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            _write_atomic(path, "spec.json", _json_bytes(document))
        return cls(path, spec, share)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the share for one writing run, and clears away what killed runs of it left behind.

        Raises: StoreError where another run holds any of it.
        """
        with _writing(self.path):
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                _lock(handle, self.share.start, self.share.stop, wait=False)  # the system lets go when the process dies
            except BlockingIOError:
                message = f"{self.path}: another prepare is writing to this store; wait until it has ended"
                raise StoreError(message) from None
            self.sweep()
            yield
        finally:
            os.close(handle)

    @contextmanager
    def _index_held(self) -> Iterator[None]:
        """One run at a time, of all shares, writes the index or takes away what it promises."""
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(handle, _HASHES, _HASHES + 1, wait=True)
            yield
        finally:
            os.close(handle)

    def sweep(self) -> None:
        """Removes temporary folders and files; only for whoever holds the share."""
        with _writing(self.path):
            for left in self.path.glob(f"{self._scratch}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()

    @property
    def _scratch(self) -> str:
        """How the names of this share's temporary folders begin; those of the whole begin all of them."""
        return "tmp-" if self.share.count == 1 else f"tmp-{self.share.number}of{self.share.count}-"

    # ---------------------------------------------------------------------------------------------------- writing

    def is_current(self, key: Key, scans: Sequence[Scan], sources: Mapping[str, SourceFile]) -> bool:
        """Whether the session lies here, whole, made from the same rows and from files of the same content."""
        return self.why_not_current(key, scans, sources) is None

    def why_not_current(self, key: Key, scans: Sequence[Scan], sources: Mapping[str, SourceFile]) -> str | None:
        """None for a session that is current; else what has changed, empty where it is not here, or not whole.

        A source is another one where its size differs, or its time of change and its content. A session from before
        contents were kept is judged by sizes alone.
        """
        folder = self._folder(key)
        try:
            document = json.loads((folder / "session.json").read_bytes())
        except (FileNotFoundError, json.JSONDecodeError):
            return ""
        files = document["files"]
        if not all((folder / f).is_file() and (folder / f).stat().st_size == files[f]["bytes"] for f in files):
            return ""
        made_from, now = document["sources"], _sources(scans, sources)
        if made_from["rows"] != now["rows"] or set(made_from["bytes"]) != set(now["bytes"]):
            return "what the manifest says of it"
        stamps = made_from.get("stamps", {})
        for path, source in sorted(sources.items()):
            if source.bytes != made_from["bytes"][path] or not source.is_as(stamps.get(path)):
                return path
        return None

    def write_session(
        self,
        key: Key,
        scans: Sequence[Scan],
        prepared: Prepared,
        sources: Mapping[str, SourceFile] | None = None,
        stamps: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds a session, or replaces the one of the same key; complete or not at all.

        Args:
            key: dataset, subject, session.
            scans: its rows of the manifest.
            prepared: its volumes; scans are named as ``scan_names`` names the rows.
            sources: the source files by their path as written, so that a later run can tell what has changed.
            stamps: of these, taken before they were read; by default taken now.

        Raises: StoreError where the disk is full or cannot be written.
        """
        names = _scan_rows(scans)
        files: dict[str, bytes] = {"foreground.npy": _npy(np.asarray(prepared.foreground, np.int16).reshape(-1, 3))}
        volumes, kept = [], kept_levels(self.spec.spacing_mm)
        for name, voxels in sorted(prepared.scans.items()):
            contrast = names[name].contrast
            volumes.append({"name": name, "kind": "scan", "contrast": contrast, "file": f"{_slug(name)}.b2nd"})
            half = half_precision(voxels)
            files |= _packed(f"{_slug(name)}.b2nd", half, float(half.min()), kept)
        for name, voxels in sorted(prepared.labels.items()):
            volumes.append({"name": name, "kind": "label", "contrast": "", "file": f"{_slug(name)}.b2nd"})
            files |= _packed(f"{_slug(name)}.b2nd", voxels, 0.0, kept)
            files[f"{_slug(name)}.points.npy"] = _npy(_label_points(voxels, "/".join((*key, name))))
        arrays = [*prepared.scans.values(), *prepared.labels.values()]
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1 or not prepared.scans:
            raise ValueError(f"a session has one or more scans, all of one shape, found {sorted(shapes)}")
        document = {
            "shape": list(shapes.pop()),
            "affine_mm": np.asarray(prepared.affine_mm, np.float64).tolist(),
            "frame": prepared.frame or "/".join(key),
            "offset_vox": list(prepared.offset_vox),
            "reference": prepared.reference,
            "alignments": {name: found.to_dict() for name, found in prepared.alignments.items()},
            "volumes": volumes,
            "recipes": {name: recipe.to_dict() for name, recipe in prepared.recipes.items()},
        }
        self._write_folder(key, scans, _made_from(scans, sources or {}, stamps), prepared.failures, document, files)

    def write_failure(
        self,
        key: Key,
        scans: Sequence[Scan],
        failures: Mapping[str, str],
        sources: Mapping[str, SourceFile] | None = None,
        stamps: Mapping[str, Any] | None = None,
    ) -> None:
        """Records that nothing of a session could be prepared: it is not tried again until its rows or files change.

        Args:
            failures: reason by scan or label name.
            sources, stamps: as in `write_session`.
        """
        made_from = _made_from(scans, sources or {}, stamps)
        self._write_folder(key, scans, made_from, failures, {"shape": [], "volumes": [], "recipes": {}}, {})

    def _write_folder(
        self,
        key: Key,
        scans: Sequence[Scan],
        made_from: Mapping[str, Any],
        failures: Mapping[str, str],
        document: dict[str, Any],
        files: Mapping[str, bytes],
    ) -> None:
        rows = _scan_rows(scans)
        labels = session_labels(scans)
        failed = [
            {
                "name": name,
                "contrast": rows[name].contrast if name in rows else "",
                "path": rows[name].path if name in rows else labels.get(name, ""),
                "reason": reason,
            }
            for name, reason in sorted(failures.items())
        ]
        document = document | {
            "key": list(key),
            "preprocess": self.spec.fingerprint(),
            "sources": made_from,
            "columns": _columns(rows.values()),
            "failures": failed,
            "files": {f: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for f, b in files.items()},
        }
        final = self._folder(key)
        scratch = self.path / f"{self._scratch}{secrets.token_hex(4)}-{final.name[-8:]}"
        with _writing(self.path):
            try:
                scratch.mkdir()
                for name, content in {**files, "session.json": _json_bytes(document)}.items():
                    write_synced(scratch / name, content)
                sync(scratch)
                final.parent.mkdir(exist_ok=True)
                self._move_in(scratch, final)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)  # gone after the rename; else the error is on its way out

    def _move_in(self, scratch: Path, final: Path) -> None:
        try:
            os.rename(scratch, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            old = scratch.with_name(f"{scratch.name}-old")
            with self._index_held():
                # The index would promise voxels that are no longer there if we were killed before `finish`.
                (self.path / "index.csv").unlink(missing_ok=True)
                os.rename(final, old)
                os.rename(scratch, final)
            shutil.rmtree(old)
        sync(final.parent)

    def reference(self, key: Key) -> str | None:
        """The path, as its row has it, of the scan that settled a session's grid; None where nothing was prepared."""
        document = _read_session(self._folder(key))
        paths = {row["name"]: row["path"] for row in document["sources"]["rows"]}
        return paths.get(document.get("reference", ""))

    def finish(self) -> list[Failure]:
        """Writes index.csv and its companions from the sessions that are there, and reads it; returns the failures.

        Where shares are written at the same time, the last to finish leaves the whole.

        Raises: StoreError where a session's folder is damaged, or the disk is full.
        """
        with _writing(self.path), self._index_held():
            failures = self._write_tables()
        self._cache.clear()
        self._load_index()
        return failures

    def _write_tables(self) -> list[Failure]:
        sessions, failures = [], []
        root = self.path / "sessions"
        for folder in sorted(root.iterdir()) if root.is_dir() else []:
            document = _read_session(folder)
            dataset, subject, session = document["key"]
            key = (dataset, subject, session)
            failures += [Failure(*key, f["contrast"], f["path"], f["reason"]) for f in document["failures"]]
            if document["volumes"]:
                sessions.append((key, folder.name, document))
        sessions.sort(key=lambda s: s[0])
        failures.sort(key=lambda f: (f.dataset, f.subject, f.session, f.contrast, f.path))
        columns = sorted({c for _, _, document in sessions for c in document["columns"]})
        rows: list[Sequence[Any]] = [(*_INDEX, *columns)]
        for key, folder_name, document in sessions:
            further = [document["columns"].get(c, "") for c in columns]
            # Sessions written before there were frames name neither.
            place = [document.get("frame", "/".join(key)), *document.get("offset_vox", (0, 0, 0))]
            for v in document["volumes"]:
                sha256 = document["files"][v["file"]]["sha256"]
                file = f"{folder_name}/{v['file']}"
                volume = [*key, v["name"], v["kind"], v["contrast"], file, *document["shape"], sha256]
                rows.append([*volume, *place, *further])
        failed = [(f.dataset, f.subject, f.session, f.contrast, f.path, f.reason) for f in failures]
        _write_atomic(self.path, "failures.csv", _csv_bytes([_FAILURES, *failed]))
        if self.spec.align == "rigid":
            moves = [row for key, _, document in sessions for row in _alignment_rows(key, document)]
            _write_atomic(self.path, "alignment.csv", _csv_bytes([_ALIGNMENT, *moves]))
        _write_atomic(self.path, "index.csv", _csv_bytes(rows))
        return failures

    # ---------------------------------------------------------------------------------------------------- reading

    def levels(self, entry: SessionEntry) -> int:
        """How many levels a session has beside its own: they follow from the spec, whether copies are kept or not."""
        return kept_levels(self.spec.spacing_mm)

    def finest(self, entry: SessionEntry) -> int:
        """The first level that shows more than the one after it."""
        return 0

    def shape(self, entry: SessionEntry, level: int = 0) -> Triple:
        """The shape of a session's volumes at a level: ``entry.shape`` / 2^level, rounded up."""
        return coarse_shape(entry.shape, level)

    def block(
        self, entry: SessionEntry, name: str, corner: Sequence[int], size: Sequence[int], level: int = 0
    ) -> np.ndarray:
        """A box of a scan or label, decompressing only the 16^3 blocks that it touches.

        Args:
            corner: first voxel along X, Y, Z; may be negative or beyond the end.
            size: edge lengths in voxels; may exceed the volume.
            level: at level n all is counted in voxels of 2^n times the store's spacing. A level of which no copy is
                kept is made from the volume: the same voxels, 8^n times the reading.

        Returns:
            [size] float16, or the label's integer dtype. What lies outside the volume holds the scan's background (at
            every level the smallest voxel of level 0), or 0 in a label.

        Raises: StoreError where the file is missing or damaged.
        """
        if level < 0:
            raise ValueError(f"level={level}: expected 0 or more")
        file = self._file(entry, name)
        if level and self._cached(_level_file(file, level), _open_kept):
            file, level = _level_file(file, level), 0
        array, background = self._cached(file, _open_array)
        shape = coarse_shape(array.shape, level)
        inside = tuple(slice(max(c, 0), max(min(c + s, n), 0)) for c, s, n in zip(corner, size, shape))
        extent = tuple(max(part.stop - part.start, 0) for part in inside)
        if extent == tuple(size):
            return _read(file, array, inside, level)
        out = np.full(tuple(size), background, array.dtype)
        if all(extent):
            target = tuple(slice(part.start - c, part.stop - c) for part, c in zip(inside, corner))
            out[target] = _read(file, array, inside, level)
        return out

    def volume(self, entry: SessionEntry, name: str) -> np.ndarray:
        """A whole scan (float16) or label, [X, Y, Z]."""
        return self.block(entry, name, (0, 0, 0), entry.shape)

    def foreground(self, entry: SessionEntry) -> np.ndarray:
        """[N, 3] int16: random voxels of the head, where patches may be centred."""
        return self._cached(self._path(entry.folder) / "foreground.npy", _open_npy)

    def label_points(self, entry: SessionEntry, name: str) -> np.ndarray:
        """[M, 3] int16: random voxels where the label is not 0, as equally many of each value as there are."""
        return self._cached(self._file(entry, name).with_suffix(".points.npy"), _open_npy)

    def recipe(self, entry: SessionEntry, name: str) -> Recipe:
        """What was done to the grid and the intensities of a scan or label."""
        from brainfm.imaging.preprocess import Recipe

        recipes = _read_session(self._path(entry.folder))["recipes"]
        if name not in recipes:
            raise self._unknown(entry, name)
        return Recipe.from_dict(recipes[name])

    def verify(self, entry: SessionEntry) -> None:
        """Compares every file of a session with its checksum.

        Raises: StoreError naming the first file that differs.
        """
        folder = self._path(entry.folder)
        wanted = {f: v["sha256"] for f, v in _read_session(folder)["files"].items()}
        wanted |= {v.file: v.sha256 for v in (*entry.scans, *entry.labels)}
        for file, sha256 in wanted.items():
            try:
                with open(folder / file, "rb") as handle:
                    found = hashlib.file_digest(handle, "sha256").hexdigest()
            except OSError as error:
                raise _damaged(folder / file, error.strerror or "unreadable") from error
            if found != sha256:
                raise _damaged(folder / file, "its checksum differs")

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any voxel, label or column of the index changes."""
        if not self._fingerprint:
            raise StoreError(f"{self.path}: the store is not finished, expected index.csv; run prepare again")
        return self._fingerprint

    def _path(self, folder: str) -> Path:
        return self.path / "sessions" / folder

    def _folder(self, key: Key) -> Path:
        readable = "-".join(re.sub(r"[^A-Za-z0-9_.-]+", "_", part) for part in key)[:80]
        return self._path(f"{readable}-{hashlib.sha256(chr(0).join(key).encode()).hexdigest()[:8]}")

    def _file(self, entry: SessionEntry, name: str) -> Path:
        for volume in (*entry.scans, *entry.labels):
            if volume.name == name:
                return self._path(entry.folder) / volume.file
        raise self._unknown(entry, name)

    def _unknown(self, entry: SessionEntry, name: str) -> StoreError:
        there = ", ".join(volume.name for volume in (*entry.scans, *entry.labels))
        return StoreError(f"{self.path}: session {'/'.join(entry.key)} has no volume {name!r}, expected one of {there}")

    def _cached(self, file: Path, load: Callable[[Path], Any]) -> Any:
        """What ``load`` made of a file; the last few hundred are kept, for this process only."""
        if self._cache_pid != os.getpid():  # after a fork the parent's handles must not be used
            self._cache, self._cache_pid = OrderedDict(), os.getpid()
        if file in self._cache:
            self._cache.move_to_end(file)
            return self._cache[file]
        value = self._cache[file] = load(file)
        if len(self._cache) > _HANDLES:
            self._cache.popitem(last=False)
        return value

    def _load_index(self) -> None:
        file = self.path / "index.csv"
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            message = f"{self.path}: the store has no index.csv because prepare was interrupted; run prepare again"
            raise StoreError(message) from None
        try:
            self.sessions = _parse_index(content)
        except (ValueError, IndexError, csv.Error) as error:
            raise StoreError(f"{file}: the index is damaged ({error}); run prepare again") from error
        self._fingerprint = hashlib.sha256(content).hexdigest()[:16]


# -------------------------------------------------------------------------------------------------------------- files


def read_spec(path: Path) -> PreprocessSpec:
    """The spec of a store, finished or not. Raises: StoreError where there is none, or it is damaged."""
    try:
        document = json.loads((path / "spec.json").read_bytes())
        found, spec = document["format"], document["preprocess"]
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{path}: no store was found here, expected a folder made by `brainfm prepare`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path / 'spec.json'}: the file is damaged ({error}), expected a store's spec") from error
    if found != FORMAT:
        raise StoreError(f"{path}: the store has format {found}, expected {FORMAT}; prepare it anew in another folder")
    try:
        return PreprocessSpec.from_dict(spec)
    except ConfigError as error:
        raise StoreError(f"{path / 'spec.json'}: {error}") from error


def _refuse_other_spec(path: Path, found: PreprocessSpec, wanted: PreprocessSpec) -> None:
    theirs, ours = found.to_dict(), wanted.to_dict()
    for name in ours:
        if theirs[name] != ours[name]:
            raise StoreError(
                f"{path}: the store was made with preprocess.{name}={theirs[name]}, now preprocess.{name}={ours[name]} "
                "is asked for; expected the same value, or another store"
            )


def _read_session(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "session.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _damaged(folder / "session.json", str(error)) from error


def _alignment_rows(key: Key, document: Mapping[str, Any]) -> Iterator[list[Any]]:
    """How the scans of a session were moved; its reference, onto that of the first visit."""
    for name, found in sorted(document.get("alignments", {}).items()):
        to = document["reference"] if name != document["reference"] else "first visit"
        measured = [f"{found[column]:.4f}" for column in ("score_before", "score_after", "moved_mm", "turned_deg")]
        yield [*key, name, to, *measured, int(not found["refused"]), int(found["trusted"]), found["refused"]]


def _parse_index(content: bytes) -> tuple[SessionEntry, ...]:
    # Decoded as it is read: a StringIO would hold four bytes a character.
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8", newline=""))
    header = next(reader, [])
    ours = _INDEX if tuple(header[: len(_INDEX)]) == _INDEX else _OLD_INDEX
    if tuple(header[: len(ours)]) != ours:
        raise ValueError(f"columns {', '.join(header[:3])}... found, {', '.join(_INDEX[:3])}... expected")
    # By place, since a manifest's column may have the name of one of ours.
    columns = [sys.intern(name) for name in header[len(ours) :]]
    sessions = []
    for folder, group in itertools.groupby(reader, key=lambda row: row[6].partition("/")[0]):
        rows = list(group)
        first = rows[0]
        scans = tuple(_entry(row) for row in rows if row[4] == "scan")
        labels = tuple(_entry(row) for row in rows if row[4] == "label")
        further = {name: sys.intern(value) for name, value in zip(columns, first[len(ours) :]) if value}
        shape = int(first[7]), int(first[8]), int(first[9])
        frame, offset = "/".join(first[:3]), (0, 0, 0)
        if ours is _INDEX:
            frame, offset = sys.intern(first[11]), (int(first[12]), int(first[13]), int(first[14]))
        key = sys.intern(first[0]), first[1], sys.intern(first[2])
        sessions.append(SessionEntry(*key, folder, shape, scans, labels, further, frame, offset))
    return tuple(sessions)


def _entry(row: Sequence[str]) -> ScanEntry:
    return ScanEntry(sys.intern(row[3]), sys.intern(row[5]), sys.intern(row[6].partition("/")[2]), row[10])


def _open_array(file: Path) -> tuple[blosc2.NDArray, float]:
    import blosc2

    try:
        array = blosc2.open(str(file), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        if not isinstance(array, blosc2.NDArray):
            raise ValueError("it holds no array")
        return array, float(array.schunk.meta["background"])
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise _damaged(file, "it cannot be opened") from error


def _level_file(file: Path, level: int) -> Path:
    """Where the copy of a volume lies; no volume's own file has an @ in its name."""
    return file.with_name(f"{file.stem}@level{level}.b2nd")


def _open_kept(file: Path) -> tuple[blosc2.NDArray, float] | None:
    return _open_array(file) if file.exists() else None


def _read(file: Path, array: blosc2.NDArray, box: tuple[slice, ...], level: int) -> np.ndarray:
    """A box of a level that is made from the array; of the array itself where the level is 0."""
    box = tuple(slice(part.start << level, min(part.stop << level, n)) for part, n in zip(box, array.shape))
    try:
        voxels = array[box]
    except (RuntimeError, ValueError, OSError) as error:
        raise _damaged(file, "a block cannot be decompressed") from error
    return _coarse(voxels, level) if level else voxels


def _open_npy(file: Path) -> np.ndarray:
    try:
        array = np.load(file, allow_pickle=False)
        array.setflags(write=False)  # it is shared by all who ask
        return array
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(file, "it cannot be read") from error


def _damaged(file: Path, why: str) -> StoreError:
    return StoreError(f"{file}: the file is damaged ({why}); delete its folder and run prepare again")


def _coarse(voxels: np.ndarray, level: int) -> np.ndarray:
    """A level of a volume as it is stored; scans are told from labels by their dtype."""
    return half_precision(coarse_image(voxels, level)) if voxels.dtype.kind == "f" else coarse_labels(voxels, level)


def _packed(file: str, voxels: np.ndarray, background: float, levels: int) -> dict[str, bytes]:
    """A volume and its coarser copies, by file name."""
    files = {file: _pack(voxels, background)}
    for level in range(1, levels + 1):
        files[_level_file(Path(file), level).name] = _pack(_coarse(voxels, level), background)
    return files


def _pack(voxels: np.ndarray, background: float) -> bytes:
    import blosc2

    chunks = tuple(min(_CHUNK, -(-n // _BLOCK) * _BLOCK) for n in voxels.shape)
    cparams = {
        "codec": blosc2.Codec.LZ4,
        "clevel": 5,
        "nthreads": 1,
        "typesize": voxels.dtype.itemsize,
        "filters": [blosc2.Filter.BITSHUFFLE],
        "filters_meta": [0],
    }
    # Not blosc2.asarray: that notes in the file how many threads the environment asks for.
    array = blosc2.empty(
        voxels.shape,
        dtype=voxels.dtype,
        chunks=chunks,
        blocks=(_BLOCK,) * 3,
        contiguous=True,
        cparams=cparams,
        dparams={"nthreads": 1},
        meta={"background": background},
    )
    array[...] = np.ascontiguousarray(voxels)
    return array.to_cframe()


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _label_points(labels: np.ndarray, word: str) -> np.ndarray:
    """[M, 3] int16: up to 4096 voxels that are not 0; small structures get their share, large ones what is left."""
    places = np.flatnonzero(labels)
    values = labels.ravel()[places]
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-1)) if len(order) else np.zeros(0, int)
    groups = np.split(places[order], starts[1:])
    rng = seeds.stream(0, f"label points {word}")
    chosen, room = [np.zeros(0, np.int64)], _POINTS
    for done, group in enumerate(sorted(groups, key=len)):
        count = min(len(group), room // (len(groups) - done))
        chosen.append(np.sort(rng.choice(group, count, replace=False)))
        room -= count
    return np.stack(np.unravel_index(np.concatenate(chosen), labels.shape), axis=1).astype(np.int16)


def _scan_rows(scans: Sequence[Scan]) -> dict[str, Scan]:
    """The rows of a session by scan name, in the order of the names."""
    ordered = sorted(scans, key=lambda s: (s.contrast, s.path))
    return dict(zip(scan_names(ordered), ordered))


def _sources(scans: Sequence[Scan], sources: Mapping[str, SourceFile]) -> dict[str, Any]:
    rows = _scan_rows(scans)
    return {
        "rows": [
            {"name": name, "contrast": s.contrast, "path": s.path, "columns": dict(sorted(s.columns.items()))}
            for name, s in rows.items()
        ],
        "bytes": {path: source.bytes for path, source in sorted(sources.items())},
    }


def _made_from(
    scans: Sequence[Scan], sources: Mapping[str, SourceFile], stamps: Mapping[str, Any] | None
) -> dict[str, Any]:
    if stamps is None:
        stamps = {path: source.stamp() for path, source in sorted(sources.items())}
    return _sources(scans, sources) | {"stamps": dict(stamps)}


def _columns(rows: Iterable[Scan]) -> dict[str, str]:
    merged: dict[str, str] = {}
    for row in rows:
        for name, value in row.columns.items():
            if value and not name.endswith(LABEL_ENDINGS):
                merged.setdefault(name, value)
    return dict(sorted(merged.items()))


def _slug(name: str) -> str:
    """A file name for a volume's name: itself where that is harmless."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[:80]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _lock(handle: int, start: int, stop: int, wait: bool) -> None:
    """Locks a range of a file's bytes, which need not exist; raises BlockingIOError where another holds any of it."""
    import fcntl  # not on every system where a store can be read

    if hasattr(fcntl, "F_OFD_SETLK"):
        request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, start, stop - start, 0)
        fcntl.fcntl(handle, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, request)
    elif stop <= _HASHES:  # no locks of parts here: shares work one after the other
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_scratch(name: str) -> bool:
    return name == ".lock" or name.startswith("tmp-")


def _json_bytes(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _csv_bytes(rows: Sequence[Sequence[Any]]) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def _write_atomic(folder: Path, name: str, content: bytes) -> None:
    write_whole(folder / name, content, mark="tmp-")
    sync(folder)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns what the operating system says while the store is written into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path}: no space is left on the disk; what was prepared stays, make room and run prepare again"
            ) from error
        raise StoreError(f"{path}: the store cannot be written ({error.strerror}: {error.filename})") from error
