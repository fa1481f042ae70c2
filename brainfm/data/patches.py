"""Random patches out of a store.

Sample *i* is a function of (store, settings, seed, i) and of nothing else, so it is the same for any number of workers,
on any rank and after resuming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.data.store import ScanEntry, SessionEntry, Store
from brainfm.data.targets import Targets, interval_years
from brainfm.errors import StoreError
from brainfm.specs import ViewSpec
from brainfm.synthesis import lesions

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """One item of a Batch as numpy arrays; see Batch for what the fields mean (here without the B axis)."""

    number: int
    image: np.ndarray  # [C, X, Y, Z] float16; C is 1, or M contrasts for a task
    partner: np.ndarray | None = None
    paired: bool | None = None
    same_contrast: bool | None = None
    interval_years: float | None = None
    subject: int | None = None
    present: np.ndarray | None = None
    label: np.ndarray | None = None
    regions: np.ndarray | None = None
    volumes: np.ndarray | None = None
    pathology: float | None = None
    lesion: np.ndarray | None = None
    corners: np.ndarray | None = None
    voxel_mm: float | None = None
    tissue: np.ndarray | None = None
    tissue_shares: np.ndarray | None = None
    rendered: np.ndarray | None = None
    real: bool | None = None
    lesion_weight: np.ndarray | None = None
    answer: np.ndarray | None = None


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one kind to a Batch. Voxels stay float16 until they are on the device: half the bytes to move."""
    batch = {"sample": torch.tensor([s.number for s in samples])}
    for name in (f.name for f in dataclasses.fields(Sample) if f.name != "number"):
        values = [getattr(s, name) for s in samples]
        if isinstance(values[0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        elif values[0] is not None:
            batch[name] = torch.tensor(values)
    return Batch(**batch)


def draw_corner(
    rng: np.random.Generator, shape: Triple, patch_vox: Triple, points: np.ndarray, centred_share: float
) -> Triple:
    """Where a patch begins.

    With probability ``centred_share`` a random one of ``points`` ([N, 3] voxels, e.g. of the foreground) lies in its
    middle half, else the corner is uniform. The patch stays inside; along an axis where the volume is thinner than
    the patch it is centred, so that the corner is negative and the store pads on both sides.
    """
    centred = len(points) > 0 and rng.random() < centred_share
    uniform = rng.random(3)
    jitter = rng.random(3) - 0.5
    centre = points[rng.integers(len(points))].astype(int) if centred else np.zeros(3, int)
    corner = []
    for axis in range(3):
        room = shape[axis] - patch_vox[axis]
        if room <= 0:
            corner.append(room // 2)
        elif centred:
            wanted = centre[axis] - patch_vox[axis] // 2 + round(jitter[axis] * patch_vox[axis] / 2)
            corner.append(int(np.clip(wanted, 0, room)))
        else:
            corner.append(int(uniform[axis] * (room + 1)))
    return corner[0], corner[1], corner[2]


class Shuffled:
    """Which of n things sample i is about: every thing once an epoch, in an order of the epoch's own."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._epoch, self._order = -1, np.zeros(0, int)

    def __getitem__(self, i: int) -> int:
        epoch, place = divmod(i, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, seeds.stream(self.seed, "order", epoch).permutation(self.n)
        return int(self._order[place])


@dataclass
class PretrainPatches(Dataset):
    """Patches without labels: an epoch shows every subject once; session and scans are drawn.

    Args:
        store: where the scans are.
        sessions: those of this side of the split.
        views: patch and whether pairs are wanted.
        seed: of the run.
        foreground_share: share of patches with a foreground voxel in their middle.
        targets: what is known of the subjects, for the views that ask for it.
    """

    store: Store
    sessions: Sequence[SessionEntry]
    views: ViewSpec
    seed: int
    foreground_share: float = 0.9
    targets: Targets = field(default_factory=Targets)
    subjects: list[list[SessionEntry]] = field(init=False)

    def __post_init__(self) -> None:
        grouped: dict[str, list[SessionEntry]] = {}
        for session in self.sessions:
            if session.scans:
                grouped.setdefault(session.subject_key, []).append(session)
        self.subjects = [grouped[key] for key in sorted(grouped)]
        if not self.subjects:
            raise StoreError(f"{self.store.path}: no scan to train on, expected at least one prepared session")
        self._shuffled = Shuffled(len(self.subjects), self.seed)

    @property
    def voxel_mm(self) -> tuple[float, float]:
        """The smallest and largest edge of a voxel: those of the store."""
        return min(self.store.spec.spacing_mm), max(self.store.spec.spacing_mm)

    def __len__(self) -> int:
        """Samples in an epoch; any larger index is legal and belongs to a later epoch."""
        return len(self.subjects)

    def __getitem__(self, i: int) -> Sample:
        rng = seeds.stream(self.seed, "patch", i)
        place = self._shuffled[i]
        sessions, patch_vox = self.subjects[place], self.views.patch_vox
        session = sessions[rng.integers(len(sessions))]
        first = int(rng.integers(len(session.scans)))
        second = int(rng.integers(len(session.scans) - 1)) if len(session.scans) > 1 else first
        if len(session.scans) > 1:
            second += second >= first
        corner = draw_corner(rng, session.shape, patch_vox, self.store.foreground(session), self.foreground_share)
        a = _View(session, session.scans[first], corner)
        image = self._read(a)
        fields: dict[str, Any] = {}
        partner = None
        if self.views.pairs:
            b = self._second(i, a, session.scans[second], sessions)
            # The same scan at the same place is no second view: it is not read again.
            partner = image if b == a else self._read(b)
            paired = (b.session.key, b.scan.name) != (a.session.key, a.scan.name)
            fields |= {
                "paired": paired,
                "same_contrast": paired and a.scan.contrast == b.scan.contrast and a.scan.contrast != "unknown",
                "interval_years": interval_years(a.session, b.session),
                "subject": place,
            }
        if self.views.regions or self.views.volumes:
            fields |= self._anatomy(a)
        if self.views.lesions:
            contrasts = (a.scan.contrast,) if partner is None else (a.scan.contrast, b.scan.contrast)
            scans: tuple[np.ndarray, ...] = (image,) if partner is None else (image, partner)
            scans, pathology = self._pathology(i, a, scans, contrasts, fields.get("regions"))
            image, partner = scans[0], scans[1] if len(scans) == 2 else None
            fields |= pathology
        return Sample(i, image[None], None if partner is None else partner[None], **fields)

    def _read(self, view: _View) -> np.ndarray:
        return self.store.block(view.session, view.scan.name, view.corner, self.views.patch_vox)

    def _second(self, i: int, a: _View, same_visit: ScanEntry, sessions: Sequence[SessionEntry]) -> _View:
        """Where the second view lies: ``same_visit`` at the same corner, or as ``visits`` and ``shift`` have it."""
        other, corner = _View(a.session, same_visit, a.corner), a.corner
        if self.views.visits:
            others = [(s, scan) for s in sessions if s.frame == a.session.frame for scan in s.scans]
            others = [o for o in others if (o[0].key, o[1].name) != (a.session.key, a.scan.name)]
            if others:
                session, scan = others[seeds.stream(self.seed, "visit", i).integers(len(others))]
                offset = zip(corner, a.session.offset_vox, session.offset_vox, strict=True)
                x, y, z = (int(c + mine - its) for c, mine, its in offset)
                other = _View(session, scan, (x, y, z))
        if self.views.shift:
            rng, moved = seeds.stream(self.seed, "shift", i), []
            for at, edge, length in zip(other.corner, self.views.patch_vox, other.session.shape, strict=True):
                most = int(self.views.shift * edge)
                step, room = int(rng.integers(-most, most + 1)), length - edge
                moved.append(int(np.clip(at + step, 0, room)) if room > 0 else at)
            other = dataclasses.replace(other, corner=(moved[0], moved[1], moved[2]))
        return other

    def _anatomy(self, a: _View) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.views.regions:
            chosen = self.targets.maps.get(a.session.key)
            fields["regions"] = np.full(self.views.patch_vox, -1, np.int64)
            if chosen is not None:
                offset = zip(a.corner, a.session.offset_vox, chosen.session.offset_vox, strict=True)
                corner = tuple(int(c + mine - its) for c, mine, its in offset)
                ids = self.store.block(chosen.session, chosen.name, corner, self.views.patch_vox)
                table = self.targets.tables[chosen.scheme]
                found = np.where(ids < len(table), np.take(table, ids, mode="clip"), -1)
                fields["regions"] = found.astype(np.int64)
        if self.views.volumes:
            unknown = np.full(len(self.targets.regions), np.nan, np.float32)
            fields["volumes"] = self.targets.volumes.get(a.session.subject_key, unknown)
        return fields

    def _pathology(
        self, i: int, a: _View, scans: tuple[np.ndarray, ...], contrasts: tuple[str, ...], regions: np.ndarray | None
    ) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
        """The scans, in some patches with a lesion put in, and what is to be found in them.

        Masks decide where there are any, then the session's health. A lesion may be put in where neither tells of
        disease; the others of these patches then stand for health.
        """
        masks, health = self.targets.lesions.get(a.session.key, ()), self.targets.health.get(a.session.key)
        patch_vox = self.views.patch_vox
        if masks:
            lesion = np.zeros(patch_vox, np.int8)
            for name in masks:
                lesion |= (self.store.block(a.session, name, a.corner, patch_vox) != 0).astype(np.int8)
            return scans, {"pathology": float(lesion.any()), "lesion": lesion}
        shapes = self.targets.shapes
        if health == 1 or shapes is None or not self.targets.synthesise:
            healthy = health == 0
            lesion = np.full(patch_vox, 0 if healthy else -1, np.int8)
            return scans, {"pathology": np.nan if health is None else health, "lesion": lesion}
        rng = seeds.stream(self.seed, "lesion", i)
        insertion = None
        if rng.random() < self.targets.synthesise:
            tissue = _tissue(scans[0], regions)
            insertion = lesions.draw_insertion(rng, shapes, tissue, patch_vox, self.store.spec.spacing_mm)
        if insertion is None:
            return scans, {"pathology": 0.0, "lesion": np.zeros(patch_vox, np.int8)}
        changed = tuple(
            lesions.insert(scan, contrast, insertion, tissue).astype(np.float16)
            for scan, contrast in zip(scans, contrasts, strict=True)
        )
        return changed, {"pathology": 1.0, "lesion": insertion.mask(patch_vox).astype(np.int8)}


@dataclass(frozen=True)
class _View:
    """A patch to read: a scan of a session from a corner on."""

    session: SessionEntry
    scan: ScanEntry
    corner: Triple


def _tissue(image: np.ndarray, regions: np.ndarray | None) -> np.ndarray:
    """Where a lesion may lie: in the brain where the anatomy is known, else wherever the scan is not dark."""
    if regions is not None and (regions >= 0).any():
        return regions > 1  # neither background nor fluid, in either vocabulary
    return image > max(-1.0, float(image.min()) + 0.25)


def drop_contrasts(names: list[str | None], rng: np.random.Generator, probability: float) -> list[str | None]:
    """Hides each present contrast with this probability; where all would go, one of them stays."""
    there = [m for m, name in enumerate(names) if name is not None]
    hidden = {m for m in there if rng.random() < probability}
    if len(hidden) == len(there):
        hidden.discard(there[rng.integers(len(there))])
    return [None if m in hidden else name for m, name in enumerate(names)]
