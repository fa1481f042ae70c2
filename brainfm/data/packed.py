"""Packed heads: some of a store in one small file, for a machine that is there for minutes and reads no store.

The file is a zip archive of arrays (LZMA, so numpy.load opens it) and one JSON text, ``about``. A scan is uint8, in
steps above its smallest value; a label map holds places in one table of (target, render class) for all schemes. Of a
head that was taken on coarse voxels only the store's coarser level is kept. What a window's plan asks for (places in
the brain, shares of the tissues, volumes) lies beside the voxels: windows are planned as `WindowPatches` plans them.
"""

from __future__ import annotations

import json
import lzma
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data import regions
from brainfm.data.levels import coarse_image, coarse_labels, kept_levels
from brainfm.data.store import Key, ScanEntry, SessionEntry, Store
from brainfm.data.targets import LabelMap, Targets
from brainfm.data.windows import PLACEHOLDER, WindowPatches
from brainfm.errors import StoreError
from brainfm.files import writing
from brainfm.specs import PreprocessSpec
from brainfm.synthesis.shapes import Shapes

FORMAT = 1
STEP = 1 / 28  # standard deviations; 255 of them are 9, more than clipped scans reach
_COARSE = 1.2  # scans of voxels so much larger than the store's lose little at its level 1
_POINTS = 1024  # places in a head's brain
_SCHEME = "packed"


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_packed(
    file: Path, patches: WindowPatches, held: Iterable[Key], config: Mapping[str, Any], step: float = STEP
) -> None:
    """Writes the heads that ``patches`` shows, those of both sides; which are held is noted.

    Args:
        held: keys of the sessions that nobody may learn from.
        config: a resolved configuration that is to travel with them.
        step: of the scans, in standard deviations.
    """
    store, targets, away = patches.store, patches.targets, set(held)
    groups = [group for of in patches.people.values() for group in of]
    sessions = sorted((session for group in groups for session in group), key=lambda session: session.key)
    pairs = _Pairs(targets)
    arrays: dict[str, np.ndarray] = {}
    heads = []
    for number, session in enumerate(sessions):
        level = int(patches.own_mm(session) >= _COARSE * store.spec.spacing_mm[0] and store.levels(session) > 0)
        owner = targets.maps.get(session.key)
        outside = 0 if owner is None else pairs.outside(owner.scheme)
        names = {scan.name for scan in session.scans if scan.contrast != PLACEHOLDER}
        lows: dict[str, float] = {}
        for name in sorted(names):
            arrays[f"{number}/{name}"], lows[name] = _quantised(_volume(store, session, name, level), step)
        for name in targets.lesions.get(session.key, ()):
            arrays[f"{number}/{name}"] = (_volume(store, session, name, level) != 0).astype(np.uint8)
        if owner is not None and owner.session.key == session.key:
            arrays[f"{number}/{owner.name}"] = pairs.places(_volume(store, session, owner.name, level), owner.scheme)
        arrays[f"{number}/points"] = _some_points(patches.middles(session))
        arrays[f"{number}/shares"] = patches.tissue_shares(session)
        heads.append(
            {
                "key": list(session.key), "shape": list(session.shape), "frame": session.frame,
                "offset_vox": list(session.offset_vox), "held": session.key in away, "level": level, "lows": lows,
                "outside": outside, "own_mm": patches.own_mm(session),
                "scans": [[scan.name, scan.contrast] for scan in session.scans],
                "map": None if owner is None else [list(owner.session.key), owner.name],
                "masks": list(targets.lesions.get(session.key, ())), "health": targets.health.get(session.key),
            }
        )  # fmt: skip
    arrays |= _beside(targets, sessions) | {"pairs": pairs.table()}
    about = {
        "format": FORMAT, "preprocess": store.spec.to_dict(), "fingerprint": store.fingerprint(), "step": step,
        "targets": list(regions.TARGETS), "rendered": list(regions.RENDERED), "regions": list(targets.regions),
        "synthesise": targets.synthesise, "shapes_mm": targets.shapes.spacing_mm if targets.shapes else None,
        "config": dict(config), "heads": heads,
    }  # fmt: skip
    _write(file, arrays, about)


class _Pairs:
    """Ids of any scheme as places in one growing table of (target, render class)."""

    def __init__(self, targets: Targets) -> None:
        self.targets = targets
        self.known: dict[tuple[int, int], int] = {}

    def places(self, ids: np.ndarray, scheme: str) -> np.ndarray:
        target, render = self.targets.tables[scheme], self.targets.renders[scheme]
        own, inverse = np.unique(np.where(ids < len(target), ids, 0), return_inverse=True)
        pairs = zip(target[own].tolist(), render[own].tolist(), strict=True)
        table = np.array([self.known.setdefault(pair, len(self.known)) for pair in pairs])
        if len(self.known) > 256:
            raise StoreError(f"{len(self.known)} pairs of target and render class found, expected at most 256")
        return table[inverse].reshape(ids.shape).astype(np.uint8)

    def outside(self, scheme: str) -> int:
        """What stands for the id 0, which a map has beyond its border."""
        return int(self.places(np.zeros(1, np.int64), scheme)[0])

    def table(self) -> np.ndarray:
        """[C, 2] int16."""
        return np.array(list(self.known), np.int16).reshape(-1, 2)


def _volume(store: Store, session: SessionEntry, name: str, level: int) -> np.ndarray:
    return store.block(session, name, (0, 0, 0), store.shape(session, level), level=level)


def _quantised(voxels: np.ndarray, step: float) -> tuple[np.ndarray, float]:
    """uint8 and the value of 0, the scan's smallest."""
    low = float(voxels.min())
    return np.clip(np.rint((voxels.astype(np.float32) - low) / step), 0, 255).astype(np.uint8), low


def _some_points(points: np.ndarray) -> np.ndarray:
    """[N, 3] int16: evenly chosen, those at the six ends among them."""
    if not len(points):
        return np.zeros((0, 3), np.int16)
    chosen = np.linspace(0, len(points) - 1, min(_POINTS, len(points))).round().astype(int)
    ends = np.concatenate([points.argmin(axis=0), points.argmax(axis=0)])
    return points[np.unique(np.concatenate([chosen, ends]))].astype(np.int16)


def _beside(targets: Targets, sessions: Sequence[SessionEntry]) -> dict[str, np.ndarray]:
    """Region volumes by session, and lesion shapes."""
    unknown = np.full(len(targets.regions), np.nan, np.float32)
    found = {"volumes": np.stack([targets.volumes.get(s.subject_key, unknown) for s in sessions])}
    if targets.shapes is not None:
        found["shape_sizes"] = np.array(targets.shapes.sizes, np.int32)
        found["shape_bits"] = np.concatenate(targets.shapes.bits)
    return found


def _write(file: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    with writing(file) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(_member("about.json"), json.dumps(about))
        for name, values in arrays.items():
            with archive.open(_member(f"{name}.npy"), "w") as out:
                np.lib.format.write_array(out, np.ascontiguousarray(values), allow_pickle=False)


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)  # with the same date at each writing: equal heads make equal files
    member.compress_type = zipfile.ZIP_LZMA
    return member


# ---- reading ---------------------------------------------------------------------------------------------------------


class PackedStore(Store):
    """The heads of a packed file, in memory; reads like a store whose finest level some heads lack.

    Attributes:
        about: the file's description.
        heads: what it says of each session.
        held: keys of the sessions that nobody may learn from.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(path, PreprocessSpec.from_dict(about["preprocess"]))
        self.about, self.step = about, float(about["step"])
        self._fingerprint = str(about["fingerprint"])
        self.heads = {_key(head): head for head in about["heads"]}
        self.held = {key for key, head in self.heads.items() if head["held"]}
        self.sessions = tuple(_session(head) for head in about["heads"])
        self._beside = arrays
        kept = {(key, name): arrays[f"{n}/{name}"] for n, key in enumerate(self.heads) for name in self.names(key)}
        with ThreadPoolExecutor() as pool:
            self._levels = dict(zip(kept, pool.map(self._with_levels, kept, kept.values())))

    def _with_levels(self, which: tuple[Key, str], voxels: np.ndarray) -> list[np.ndarray]:
        key, name = which
        more = range(1, kept_levels(self.spec.spacing_mm) - int(self.heads[key]["level"]) + 1)
        if name in self.heads[key]["lows"]:
            return [voxels, *(np.rint(coarse_image(voxels, level)).astype(np.uint8) for level in more)]
        return [voxels, *(coarse_labels(voxels, level) for level in more)]

    @classmethod
    def open(cls, path: str | Path) -> PackedStore:
        """Raises: StoreError where the file is missing, damaged, or of another version."""
        path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                about = json.loads(archive.read("about.json"))
                names = [name for name in archive.namelist() if name.endswith(".npy")]
                with ThreadPoolExecutor() as pool:
                    arrays = dict(zip(names, pool.map(lambda name: _array(archive, name), names)))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, lzma.LZMAError) as error:
            raise StoreError(f"{path}: cannot be read ({error}), expected a file of packed heads") from None
        ours = (FORMAT, list(regions.TARGETS), list(regions.RENDERED))
        if (about.get("format"), about.get("targets"), about.get("rendered")) != ours:
            raise StoreError(f"{path}: was packed by another version with other classes, expected it packed anew")
        return cls(path, about, {name.removesuffix(".npy"): values for name, values in arrays.items()})

    def names(self, key: Key) -> list[str]:
        """Of the volumes whose voxels are here."""
        head = self.heads[key]
        own = [head["map"][1]] if head["map"] is not None and tuple(head["map"][0]) == key else []
        return [*head["lows"], *head["masks"], *own]

    def finest(self, entry: SessionEntry) -> int:
        return int(self.heads[entry.key]["level"])

    def quantised(self, entry: SessionEntry, name: str) -> list[np.ndarray]:
        """A volume as uint8 at its finest level and all coarser ones."""
        if (entry.key, name) not in self._levels:
            raise self._unknown(entry, name)
        return self._levels[entry.key, name]

    def beside(self, entry: SessionEntry, what: str) -> np.ndarray:
        """``points`` [N, 3] int16 of the brain, or ``shares`` [R] float32 of the render classes."""
        return self._beside[f"{list(self.heads).index(entry.key)}/{what}"]

    def own_mm(self, entry: SessionEntry) -> float:
        return float(self.heads[entry.key]["own_mm"])

    def low(self, entry: SessionEntry, name: str) -> float | None:
        """Value of a scan's 0; None for labels, whose numbers are what they are."""
        low: float | None = self.heads[entry.key]["lows"].get(name)
        return low

    def outside(self, entry: SessionEntry, name: str) -> int:
        """The number that stands beyond a volume's border."""
        head = self.heads[entry.key]
        return int(head["outside"]) if head["map"] is not None and name == head["map"][1] else 0

    def block(
        self, entry: SessionEntry, name: str, corner: Sequence[int], size: Sequence[int], level: int = 0
    ) -> np.ndarray:
        """As of any store, from the session's finest level on; label maps hold places in the table of pairs."""
        levels, finest = self.quantised(entry, name), self.finest(entry)
        if not finest <= level < finest + len(levels):
            raise ValueError(f"level={level} of {'/'.join(entry.key)}: expected {finest} to {finest + len(levels) - 1}")
        array, low = levels[level - finest], self.low(entry, name)
        out = np.full(tuple(size), self.outside(entry, name), np.uint8)
        inside = tuple(slice(max(c, 0), max(min(c + s, n), 0)) for c, s, n in zip(corner, size, array.shape))
        if all(part.stop > part.start for part in inside):
            out[tuple(slice(p.start - c, p.stop - c) for p, c in zip(inside, corner))] = array[inside]
        return out if low is None else (out * np.float32(self.step) + np.float32(low)).astype(np.float16)

    def targets(self) -> Targets:
        """What is known of the heads, as `find_targets` gives it for the store they come from."""
        by_key = {session.key: session for session in self.sessions}
        table, arrays = self._beside["pairs"], self._beside
        maps = {
            key: LabelMap(by_key[tuple(head["map"][0])], head["map"][1], _SCHEME)
            for key, head in self.heads.items()
            if head["map"] is not None
        }
        volumes = {s.subject_key: row for s, row in zip(self.sessions, arrays["volumes"]) if np.isfinite(row).any()}
        return Targets(
            groups=regions.TARGETS if maps else (), tables={_SCHEME: table[:, 0]},
            renders={_SCHEME: table[:, 1].astype(np.uint8)}, maps=maps, regions=tuple(self.about["regions"]),
            volumes=volumes, health={k: h["health"] for k, h in self.heads.items() if h["health"] is not None},
            lesions={k: tuple(h["masks"]) for k, h in self.heads.items() if h["masks"]},
            synthesise=float(self.about["synthesise"]), shapes=_shapes(self.about["shapes_mm"], arrays),
        )  # fmt: skip


class PackedWindows(WindowPatches):
    """The windows of packed heads: what a plan asks for was settled when they were packed."""

    store: PackedStore

    def middles(self, session: SessionEntry) -> np.ndarray:
        return self.store.beside(session, "points")

    def own_mm(self, session: SessionEntry) -> float:
        return self.store.own_mm(session)

    def tissue_shares(self, session: SessionEntry) -> np.ndarray:
        return self.store.beside(session, "shares")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        values: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
    return values


def _key(head: Mapping[str, Any]) -> Key:
    dataset, subject, session = head["key"]
    return dataset, subject, session


def _session(head: Mapping[str, Any]) -> SessionEntry:
    x, y, z = head["shape"]
    dx, dy, dz = head["offset_vox"]
    scans = tuple(ScanEntry(name, contrast, "", "") for name, contrast in head["scans"])
    return SessionEntry(*_key(head), "", (x, y, z), scans, (), {}, head["frame"], (dx, dy, dz))


def _shapes(spacing_mm: float | None, arrays: Mapping[str, np.ndarray]) -> Shapes | None:
    if spacing_mm is None:
        return None
    sizes = tuple((int(x), int(y), int(z)) for x, y, z in arrays["shape_sizes"])
    ends = np.cumsum([-(-x * y * z // 8) for x, y, z in sizes])
    return Shapes(float(spacing_mm), sizes, tuple(np.split(arrays["shape_bits"], ends[:-1])))
