"""Sessions with an answer in the manifest, and what a network sees of them.

A session's answer holds for its whole head. It is never pinned on a window that may not show why: every sample has the
whole head on coarse voxels among its views, or windows that together cover the head.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from brainfm import seeds
from brainfm.data.columns import AGE, Unusable, cell, tidy, who
from brainfm.data.patches import Sample, Shuffled, draw_corner, drop_contrasts
from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.specs import TaskSpec
from brainfm.tasks.whole_head.sorts import read_session
from brainfm.tasks.whole_head.views import (
    covering_corners,
    covering_counts,
    views_of_volumes,
    whole_view,
    whole_view_mask,
)

Triple = tuple[int, int, int]

_MANY_CLASSES = 10


@dataclass(frozen=True, eq=False)
class SessionCase:
    """A session that can answer.

    Attributes:
        session: where it lies in the store.
        scans: for each contrast of the task the names of the scans that show it; empty where it is missing.
        answer: [T] float32: a class index, a 0 or 1 for each label, or a value; NaN where a label is unknown.
        lesion: the name of the mask that guides, None where the session has none.
    """

    session: SessionEntry
    scans: tuple[tuple[str, ...], ...]
    answer: np.ndarray
    lesion: str | None


@dataclass(frozen=True)
class FoundCases:
    """What a store has for a task.

    Attributes:
        spec: the task, but for ``patch_vox``, ``view_mm`` and ``crops``.
        cases: the sessions that can answer it.
        left_out: a sentence for each session that cannot.
    """

    spec: TaskSpec
    cases: tuple[SessionCase, ...]
    left_out: tuple[str, ...]


# ---- who can answer --------------------------------------------------------------------------------------------------


def find_session_cases(
    store: Store,
    kind: str,
    target: str,
    *,
    mode: str = "auto",
    values: Sequence[Any] | None = None,
    contrasts: Sequence[str] | None = None,
    unit: str = "",
    fusion: str = "attention",
    lesion: str | None = None,
) -> FoundCases:
    """The task with what was left to the data filled in, and the sessions that can answer it.

    Args:
        kind, target, ...: see tasks/settings.py.

    Raises:
        ManifestError: where no session has an answer (names the columns there are) or an age is impossible.
        ConfigError: where a setting does not suit the columns, or all answers are the same.
    """
    names = None if values is None else tuple(tidy(str(v)) for v in values)
    mode = _mode(store, kind, target, mode, names)
    columns = names if names is not None and mode == "multilabel" else (target,)
    filled = [s for s in store.sessions if any(cell(s, c) is not None for c in columns)]
    if not filled:
        there = sorted({column for session in store.sessions for column in session.columns})
        raise ManifestError(
            f"{store.path}: no session has a value in column {', '.join(columns)}; columns in the store: "
            f"{', '.join(there) or 'none'}"
        )
    if contrasts is None:
        contrasts = sorted({scan.contrast for session in filled for scan in session.scans})
    if kind == "regression":
        classes: tuple[str, ...] = ()
        unit = unit or ("years" if AGE.search(target.lower()) else "")
    else:
        classes = columns if mode == "multilabel" else names or _classes(store, filled, target)
    spec = TaskSpec(
        kind=kind,
        target=target,
        contrasts=tuple(contrasts),
        values=classes,
        patch_vox=(0, 0, 0),
        fusion=fusion,
        mode=mode,
        unit=unit,
    )
    lesions = _lesion_names(store, lesion)
    cases, left_out = [], []
    for session in store.sessions:
        scans = tuple(tuple(s.name for s in session.scans if s.contrast == contrast) for contrast in contrasts)
        try:
            answer = read_session(session, spec)
        except Unusable as reason:
            left_out.append(str(reason))
            continue
        if not any(scans):
            left_out.append(f"{who(session)}: none of the contrasts {', '.join(contrasts)}")
            continue
        lesion = next((entry.name for entry in session.labels if entry.name in lesions), None)
        cases.append(SessionCase(session, scans, answer, lesion))
    if not cases:
        raise ManifestError(
            f"{store.path}: no session has both a usable {', '.join(columns)} and one of the contrasts "
            f"{', '.join(contrasts)}; the first was left out because: {left_out[0]}"
        )
    _check_spread(store, spec, np.stack([case.answer for case in cases]))
    return FoundCases(spec, tuple(cases), tuple(left_out))


def _mode(store: Store, kind: str, target: str, asked: str, names: tuple[str, ...] | None) -> str:
    if kind == "regression":
        return ""
    if kind != "classification":
        raise ConfigError(f"task.kind={kind!r}: expected classification or regression")
    if asked not in ("auto", "exclusive", "ordinal", "multilabel"):
        raise ConfigError(f"task.mode={asked!r}: expected auto, exclusive, ordinal or multilabel")
    if asked in ("ordinal", "multilabel") and not names:
        what = "the classes in their order" if asked == "ordinal" else "the columns, each of 0 and 1"
        raise ConfigError(f"task.mode={asked} without task.values: expected {what}")
    if names is not None and len({n.casefold() for n in names}) != len(names):
        raise ConfigError(f"task.values={list(names)}: expected each once")
    if asked != "auto":
        return asked
    known = {column for session in store.sessions for column in session.columns}
    several = names is not None and target not in known and set(names) <= known
    return "multilabel" if several else "exclusive"


def _classes(store: Store, sessions: Sequence[SessionEntry], column: str) -> tuple[str, ...]:
    """The classes found, in the order of numbers or letters; capitals make no difference."""
    spellings: dict[str, Counter[str]] = {}
    for session in sessions:
        text = cell(session, column)
        if text is not None:
            spellings.setdefault(text.casefold(), Counter())[text] += 1
    found = [min(c, key=lambda text: (-c[text], text)) for c in spellings.values()]
    numbers = [name for name in found if name.isdigit()]
    if column.lower() in ("sex", "gender") and numbers and len(numbers) < len(found):
        raise ConfigError(
            f"{store.path}: column {column} is coded in two ways, {', '.join(sorted(found))}, expected one; mend it, "
            "or name the classes in task.values and leave the others out"
        )
    people = len({s.subject_key for s in sessions})
    if len(found) > max(_MANY_CLASSES, people // 2):
        raise ConfigError(
            f"{store.path}: column {column} has {len(found)} different values in {people} subjects, expected classes; "
            "use task=regression for a number, or name the classes in task.values"
        )
    try:
        return tuple(sorted(found, key=float))
    except ValueError:
        return tuple(sorted(found))


def _lesion_names(store: Store, lesion: str | None) -> set[str]:
    if not lesion:
        return set()
    wanted = {lesion, f"{lesion}_mask", f"{lesion}_labels"}
    there = sorted({entry.name for session in store.sessions for entry in session.labels})
    if not wanted & set(there):
        raise ConfigError(
            f"task.lesion={lesion}: {store.path} has no such mask; labels in the store: {', '.join(there) or 'none'}"
        )
    return wanted


def _check_spread(store: Store, spec: TaskSpec, answers: np.ndarray) -> None:
    """Raises: ConfigError where nothing can be learned because all answers, or all of a label, are one."""
    for place, column in enumerate(spec.values if spec.mode == "multilabel" else (spec.target,)):
        known = answers[:, place][np.isfinite(answers[:, place])]
        if len(np.unique(known)) > 1:
            continue
        if spec.kind == "regression":
            found, expected = f"is {known[0]:g} in all {len(known)} sessions", "values that differ"
        elif spec.mode == "multilabel":
            all_are = f"is {known[0]:g} in all {len(known)} sessions that know it" if len(known) else "is never known"
            found, expected = all_are, "both 0 and 1"
        else:
            found, expected = f"has one class only, {spec.values[int(known[0])]!r}", "at least two"
        raise ConfigError(f"{store.path}: column {column} {found}, expected {expected}")
    if spec.mode == "exclusive":
        empty = [name for k, name in enumerate(spec.values) if not (answers[:, 0] == k).any()]
        if empty:
            raise ConfigError(f"{store.path}: no session with {spec.target} {empty[0]!r}, expected some of every class")


# ---- how large the views are -----------------------------------------------------------------------------------------


def choose_view_mm(store: Store, cases: Sequence[SessionCase], patch_vox: Triple) -> float:
    """Edge length of a view's voxels with which the largest head fits into the patch, rounded up to 0.1 mm.

    Never finer than the store's finest axis: there is nothing more to see.
    """
    spacing = np.array(store.spec.spacing_mm)
    largest_mm = np.array([case.session.shape for case in cases]).max(axis=0) * spacing
    return max(math.ceil(float((largest_mm / patch_vox).max()) * 10 - 1e-6) / 10, float(spacing.min()))


def choose_view_patch(store: Store, cases: Sequence[SessionCase], stride: int, most_voxels: int) -> Triple:
    """The patch of at most this many voxels that shows the largest head in the finest voxels.

    Args:
        stride: of the backbone's coarsest map; every edge is a multiple of it.
    """
    spacing = np.array(store.spec.spacing_mm)
    largest_mm = np.array([case.session.shape for case in cases]).max(axis=0) * spacing
    view_mm = float(spacing.min())
    while True:
        edges = np.maximum(np.ceil(largest_mm / view_mm / stride - 1e-6), 1).astype(int)
        edges[edges.argmax()] = max(edges.max(), 2)  # instance norm cannot work on a map of one voxel
        if edges.prod() * stride**3 <= most_voxels or edges.prod() <= 2:
            x, y, z = (int(e) * stride for e in edges)
            return x, y, z
        view_mm += 0.1


# ---- what is seen ----------------------------------------------------------------------------------------------------


@dataclass
class HeadViews(Dataset):
    """Views of heads with their answers: an epoch shows every case once; scans of a repeated contrast are drawn.

    A sample has the whole head, if the spec has that view, then ``crops`` windows spread over the head, the first of
    them on the lesion where there is one. Without the whole head the windows are those that cover it.

    Args:
        store, cases: what to read.
        spec: complete, with patch and view.
        seed: of the run.
        crops: windows a sample, where the spec has crops.
        contrast_dropout: probability with which each present contrast is hidden; at least one stays.
        cache_mb: most memory for whole-head views that are kept, in each process that reads.

    Raises:
        ConfigError: where there is no case, or without a whole-head view the crops are too few to cover the head.
    """

    store: Store
    cases: Sequence[SessionCase]
    spec: TaskSpec
    seed: int
    crops: int = 4
    contrast_dropout: float = 0.0
    cache_mb: float = 1024.0
    _kept: dict[tuple[Any, ...], np.ndarray] = field(default_factory=dict, init=False, repr=False)
    _room: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.cases:
            raise ConfigError("no case to train on, expected at least one session with an answer on this side")
        self._shuffled = Shuffled(len(self.cases), self.seed)
        self._guided = any(case.lesion for case in self.cases)
        self._room = self.cache_mb * 2**20
        counts = [covering_counts(case.session.shape, self.spec.patch_vox) for case in self.cases]
        self._counts: Triple = tuple(max(c[axis] for c in counts) for axis in range(3))  # type: ignore[assignment]
        needed = math.prod(self._counts)
        if self.spec.crops and self.spec.view_mm == 0 and self.crops < needed:
            raise ConfigError(
                f"task.crops={self.crops} without a whole-head view: expected at least the {needed} windows of "
                f"{'x'.join(map(str, self.spec.patch_vox))} voxels that cover a head, or task.view_mm above 0"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": self.cache_mb * 2**20}

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Sample:
        rng = seeds.stream(self.seed, "views", i)
        case = self.cases[self._shuffled[i]]
        names = [scans[rng.integers(len(scans))] if scans else None for scans in case.scans]
        names = drop_contrasts(names, rng, self.contrast_dropout)
        corners = self._corners(case, rng)
        first = int(self.spec.view_mm > 0)
        shape = (first + len(corners), *self.spec.patch_vox)
        image = np.zeros((shape[0], len(names), *self.spec.patch_vox), np.float16)
        for m, name in enumerate(names):
            if name is None:
                continue
            if first:
                image[0, m] = self._whole(case.session, name)
            for v, corner in enumerate(corners, first):
                image[v, m] = self.store.block(case.session, name, corner, self.spec.patch_vox)
        lesion = self._lesion(case, corners, shape) if self._guided else None
        present = np.array([name is not None for name in names])
        return Sample(i, image, present=present, answer=case.answer, lesion=lesion)

    def _corners(self, case: SessionCase, rng: np.random.Generator) -> list[Triple]:
        if not self.spec.crops:
            return []
        shape, patch = case.session.shape, self.spec.patch_vox
        if self.spec.view_mm == 0:
            return covering_corners(shape, patch, self._counts)
        spread = covering_corners(shape, patch)
        corners: list[Triple] = []
        while len(corners) < self.crops:  # every region once before any comes twice
            for place in rng.permutation(len(spread)):
                corners.append(_shaken(rng, spread[place], shape, patch))
        points = self.store.label_points(case.session, case.lesion) if case.lesion else ()
        if len(points):
            corners[0] = draw_corner(rng, shape, patch, np.asarray(points), 1.0)
        return corners[: self.crops]

    def _whole(self, session: SessionEntry, name: str) -> np.ndarray:
        spec = self.spec

        def make() -> np.ndarray:
            volume = self.store.volume(session, name)
            return whole_view(volume, self.store.spec.spacing_mm, spec.view_mm, spec.patch_vox).astype(np.float16)

        return self._cached((session.key, name), make)

    def _lesion(self, case: SessionCase, corners: Sequence[Triple], shape: tuple[int, ...]) -> np.ndarray:
        """[V, x, y, z] int8, -1 where the session has no mask."""
        spec, name = self.spec, case.lesion
        lesion = np.full(shape, -1, np.int8)
        if name is None:
            return lesion
        if spec.view_mm > 0:
            lesion[0] = self._cached(
                (case.session.key, name),
                lambda: whole_view_mask(
                    self.store.volume(case.session, name) != 0,
                    self.store.spec.spacing_mm,
                    spec.view_mm,
                    spec.patch_vox,
                ),
            )
        for v, corner in enumerate(corners, int(spec.view_mm > 0)):
            lesion[v] = self.store.block(case.session, name, corner, spec.patch_vox) != 0
        return lesion

    def _cached(self, key: tuple[Any, ...], make: Callable[[], np.ndarray]) -> np.ndarray:
        """Kept as long as there is room: in a random order nothing is gained by throwing the oldest out."""
        if key in self._kept:
            return self._kept[key]
        view = make()
        if view.nbytes <= self._room:
            self._room -= view.nbytes
            self._kept[key] = view
        return view


def _shaken(rng: np.random.Generator, corner: Triple, shape: Triple, patch_vox: Triple) -> Triple:
    """The corner moved by up to a quarter of the patch, inside the volume."""
    moved = []
    for start, size, edge, shift in zip(corner, shape, patch_vox, rng.uniform(-0.25, 0.25, 3), strict=True):
        room = size - edge
        moved.append(start if room <= 0 else int(np.clip(start + round(shift * edge), 0, room)))
    return moved[0], moved[1], moved[2]


def views_of(store: Store, case: SessionCase, spec: TaskSpec) -> tuple[np.ndarray, np.ndarray]:
    """A case as it is answered: image [V, M, x, y, z] float32 (see views_of_volumes) and present [M] bool."""
    image = np.zeros((len(case.scans), *case.session.shape), np.float32)
    for m, scans in enumerate(case.scans):
        if scans:
            image[m] = store.volume(case.session, scans[0])
    return views_of_volumes(image, store.spec.spacing_mm, spec), np.array([bool(scans) for scans in case.scans])
