"""Random patches out of a store.

Sample *i* is a function of (store, settings, seed, i) and of nothing else, so it is the same for any number of workers,
on any rank and after resuming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.data.store import SessionEntry, Store
from brainfm.specs import ConfigError, ManifestError, StoreError, ViewSpec

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Sample:
    """One item of a Batch as numpy arrays; see Batch for what the fields mean (here without the B axis)."""

    number: int
    image: np.ndarray  # [C, X, Y, Z] float16; C is 1, or M contrasts for a task
    partner: np.ndarray | None = None
    paired: bool = False
    same_contrast: bool = False
    present: np.ndarray | None = None
    label: np.ndarray | None = None


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one kind to a Batch. Voxels stay float16 until they are on the device: half the bytes to move."""
    first = samples[0]

    def stack(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(arrays))

    batch = {"sample": torch.tensor([s.number for s in samples]), "image": stack([s.image for s in samples])}
    if first.partner is not None:
        batch["partner"] = stack([s.partner for s in samples if s.partner is not None])
        batch["paired"] = torch.tensor([s.paired for s in samples])
        batch["same_contrast"] = torch.tensor([s.same_contrast for s in samples])
    if first.present is not None:
        batch["present"] = stack([s.present for s in samples if s.present is not None])
    if first.label is not None:
        batch["label"] = stack([s.label for s in samples if s.label is not None])
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


class _Shuffled:
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
    """

    store: Store
    sessions: Sequence[SessionEntry]
    views: ViewSpec
    seed: int
    foreground_share: float = 0.9
    subjects: list[list[SessionEntry]] = field(init=False)

    def __post_init__(self) -> None:
        grouped: dict[str, list[SessionEntry]] = {}
        for session in self.sessions:
            if session.scans:
                grouped.setdefault(session.subject_key, []).append(session)
        self.subjects = [grouped[key] for key in sorted(grouped)]
        if not self.subjects:
            raise StoreError(f"{self.store.path}: no scan to train on, expected at least one prepared session")
        self._shuffled = _Shuffled(len(self.subjects), self.seed)

    def __len__(self) -> int:
        """Samples in an epoch; any larger index is legal and belongs to a later epoch."""
        return len(self.subjects)

    def __getitem__(self, i: int) -> Sample:
        rng = seeds.stream(self.seed, "patch", i)
        sessions = self.subjects[self._shuffled[i]]
        session = sessions[rng.integers(len(sessions))]
        first = int(rng.integers(len(session.scans)))
        second = int(rng.integers(len(session.scans) - 1)) if len(session.scans) > 1 else first
        if len(session.scans) > 1:
            second += second >= first
        corner = draw_corner(
            rng, session.shape, self.views.patch_vox, self.store.foreground(session), self.foreground_share
        )
        a, b = session.scans[first], session.scans[second]
        image = self.store.block(session, a.name, corner, self.views.patch_vox)[None]
        if not self.views.pairs:
            return Sample(i, image)
        paired = first != second
        partner = self.store.block(session, b.name, corner, self.views.patch_vox)[None] if paired else image
        same = paired and a.contrast == b.contrast and a.contrast != "unknown"
        return Sample(i, image, partner, paired=paired, same_contrast=same)


@dataclass(frozen=True)
class Case:
    """One labelled session as a task sees it.

    Attributes:
        session: where it lies in the store.
        scans: for each contrast of the task the names of the scans that show it; empty where it is missing.
        label: the name of the label volume.
    """

    session: SessionEntry
    scans: tuple[tuple[str, ...], ...]
    label: str


def find_cases(store: Store, contrasts: Sequence[str], target: str) -> tuple[list[Case], list[str]]:
    """The sessions that carry the target and at least one of the contrasts, and a sentence for each one left out.

    Raises:
        ManifestError: where no session carries the target at all; names the label columns there are.
    """
    names = (f"{target}_mask", f"{target}_labels")
    cases, left_out = [], []
    for session in store.sessions:
        who = "/".join(session.key)
        label = next((entry.name for entry in session.labels if entry.name in names), None)
        scans = tuple(tuple(s.name for s in session.scans if s.contrast == contrast) for contrast in contrasts)
        if label is None:
            left_out.append(f"{who}: no {target} label")
        elif not any(scans):
            left_out.append(f"{who}: none of the contrasts {', '.join(contrasts)}")
        else:
            cases.append(Case(session, scans, label))
    if not cases:
        there = sorted({entry.name for session in store.sessions for entry in session.labels})
        raise ManifestError(
            f"{store.path}: no session has both a label {names[0]} or {names[1]} and one of the contrasts "
            f"{', '.join(contrasts)}; labels in the store: {', '.join(there) or 'none'}"
        )
    return cases, left_out


def class_indices(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Label values to class indices, int64; raises ManifestError for a value the task does not know."""
    table = np.full(max(int(label.max(initial=0)), *values) + 1, -1, np.int64)
    table[list(values)] = np.arange(len(values))
    indices = table[label]
    if indices.min(initial=0) < 0:
        found = sorted(set(np.unique(label).tolist()) - set(values))
        raise ManifestError(f"label value {found[0]} found, expected one of {', '.join(map(str, values))}")
    return indices


@dataclass
class TaskPatches(Dataset):
    """Labelled patches: an epoch shows every case once; scans of a repeated contrast are drawn.

    Args:
        store, cases: what to read.
        values: label values of the classes, background first.
        patch_vox: patch size.
        seed: of the run.
        foreground_share: share of patches with a labelled voxel in their middle (where the case has one); of the
            others nine in ten lie about some voxel of the head.
        contrast_dropout: probability with which each present contrast is hidden; at least one stays.
    """

    store: Store
    cases: Sequence[Case]
    values: Sequence[int]
    patch_vox: Triple
    seed: int
    foreground_share: float = 0.5
    contrast_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.cases:
            raise ConfigError("no case to train on, expected at least one labelled session on this side of the split")
        self._shuffled = _Shuffled(len(self.cases), self.seed)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Sample:
        rng = seeds.stream(self.seed, "patch", i)
        case = self.cases[self._shuffled[i]]
        names = [scans[rng.integers(len(scans))] if scans else None for scans in case.scans]
        names = drop_contrasts(names, rng, self.contrast_dropout)
        labelled = self.store.label_points(case.session, case.label)
        if len(labelled) and rng.random() < self.foreground_share:
            points, share = labelled, 1.0
        else:
            points, share = self.store.foreground(case.session), 0.9
        corner = draw_corner(rng, case.session.shape, self.patch_vox, points, share)
        image = np.zeros((len(names), *self.patch_vox), np.float16)
        for m, name in enumerate(names):
            if name is not None:
                image[m] = self.store.block(case.session, name, corner, self.patch_vox)
        label = self.store.block(case.session, case.label, corner, self.patch_vox)
        present = np.array([name is not None for name in names])
        return Sample(i, image, present=present, label=class_indices(label, self.values))


def drop_contrasts(names: list[str | None], rng: np.random.Generator, probability: float) -> list[str | None]:
    """Hides each present contrast with this probability; where all would go, one of them stays."""
    there = [m for m, name in enumerate(names) if name is not None]
    hidden = {m for m in there if rng.random() < probability}
    if len(hidden) == len(there):
        hidden.discard(there[rng.integers(len(there))])
    return [None if m in hidden else name for m, name in enumerate(names)]


def whole_case(store: Store, case: Case, values: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A case in full, for validation: image [M, X, Y, Z] float32, present [M] bool, label [X, Y, Z] class indices."""
    image = np.zeros((len(case.scans), *case.session.shape), np.float32)
    for m, scans in enumerate(case.scans):
        if scans:
            image[m] = store.volume(case.session, scans[0])
    label = class_indices(store.volume(case.session, case.label), values)
    return image, np.array([bool(scans) for scans in case.scans]), label
