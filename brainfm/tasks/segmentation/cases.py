"""Labelled sessions as a segmenter sees them, and random patches of them.

Sample *i* is a function of (store, settings, seed, i) and of nothing else, so it is the same for any number of workers,
on any rank and after resuming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from brainfm import seeds
from brainfm.data.patches import Sample, Shuffled, draw_corner, drop_contrasts
from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class LabelledCase:
    """One labelled session as a task sees it.

    Attributes:
        session: where it lies in the store.
        scans: for each contrast of the task the names of the scans that show it; empty where it is missing.
        label: the name of the label volume.
    """

    session: SessionEntry
    scans: tuple[tuple[str, ...], ...]
    label: str


def find_cases(store: Store, contrasts: Sequence[str], target: str) -> tuple[list[LabelledCase], list[str]]:
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
            cases.append(LabelledCase(session, scans, label))
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
        foreground_share: share of patches with a labelled voxel in their middle (where the case has one): first one of
            the classes that the case shows is drawn, then a voxel of it, so that small structures are met as often as
            large ones; of the others nine in ten lie about some voxel of the head.
        contrast_dropout: probability with which each present contrast is hidden; at least one stays.
    """

    store: Store
    cases: Sequence[LabelledCase]
    values: Sequence[int]
    patch_vox: Triple
    seed: int
    foreground_share: float = 0.5
    contrast_dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.cases:
            raise ConfigError("no case to train on, expected at least one labelled session on this side of the split")
        self._shuffled = Shuffled(len(self.cases), self.seed)
        self._points: dict[int, list[np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Sample:
        case, names, corner = self._drawn(i)
        image = np.zeros((len(names), *self.patch_vox), np.float16)
        for m, name in enumerate(names):
            if name is not None:
                image[m] = self.store.block(case.session, name, corner, self.patch_vox)
        present = np.array([name is not None for name in names])
        return Sample(i, image, present=present, label=self._label(case, corner))

    def label(self, i: int) -> np.ndarray:
        """[X, Y, Z] the class indices of a sample, without its scans."""
        case, _, corner = self._drawn(i)
        return self._label(case, corner)

    def _drawn(self, i: int) -> tuple[LabelledCase, list[str | None], Triple]:
        """The case of a sample, its scan of each contrast, and the corner of its patch."""
        rng = seeds.stream(self.seed, "patch", i)
        place = self._shuffled[i]
        case = self.cases[place]
        names = [scans[rng.integers(len(scans))] if scans else None for scans in case.scans]
        names = drop_contrasts(names, rng, self.contrast_dropout)
        classes = self._labelled(place)
        if classes and rng.random() < self.foreground_share:
            points, share = classes[rng.integers(len(classes)) if len(classes) > 1 else 0], 1.0
        else:
            points, share = self.store.foreground(case.session), 0.9
        return case, names, draw_corner(rng, case.session.shape, self.patch_vox, points, share)

    def _label(self, case: LabelledCase, corner: Triple) -> np.ndarray:
        return class_indices(self.store.block(case.session, case.label, corner, self.patch_vox), self.values)

    def _labelled(self, place: int) -> list[np.ndarray]:
        """Random labelled voxels of a case, [N, 3] for each class that it shows. A label is read once for it."""
        if place not in self._points:
            case = self.cases[place]
            points = self.store.label_points(case.session, case.label)
            if len(self.values) == 2 or not len(points):
                self._points[place] = [points] if len(points) else []
            else:
                found = self.store.volume(case.session, case.label)[tuple(points.T)]
                self._points[place] = [points[found == value] for value in np.unique(found)]
        return self._points[place]


def class_shares(
    store: Store, cases: Sequence[LabelledCase], values: Sequence[int], patch_vox: Triple, draws: int = 32
) -> list[float]:
    """The shares of the voxels of a training patch that belong to each class: of patches drawn as TaskPatches does with
    its own settings, always the same ones."""
    patches = TaskPatches(store, cases, values, patch_vox, seed=0)
    counts = np.zeros(len(values))
    for i in range(draws):
        counts += np.bincount(patches.label(i).ravel(), minlength=len(values))
    return (counts / counts.sum()).tolist()


def whole_case(store: Store, case: LabelledCase, values: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A case in full, for validation: image [M, X, Y, Z] float32, present [M] bool, label [X, Y, Z] class indices."""
    image = np.zeros((len(case.scans), *case.session.shape), np.float32)
    for m, scans in enumerate(case.scans):
        if scans:
            image[m] = store.volume(case.session, scans[0])
    label = class_indices(store.volume(case.session, case.label), values)
    return image, np.array([bool(scans) for scans in case.scans]), label
