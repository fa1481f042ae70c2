"""Windows of many voxel sizes out of a store: whole heads on coarse voxels first, then finer and finer ones.

A window is a cube of ``patch_vox + shift_vox`` voxels, turned, stretched and bent, in which two views of a place lie at
corners of their own. All that happens to a sample is drawn from its number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from brainfm import seeds
from brainfm.data import regions
from brainfm.data.patches import Sample
from brainfm.data.settings import WindowSpec
from brainfm.data.store import ScanEntry, SessionEntry, Store, Triple
from brainfm.data.targets import Targets
from brainfm.errors import ConfigError, StoreError
from brainfm.specs import ViewSpec
from brainfm.synthesis import lesions
from brainfm.synthesis.deform import INJECTIVE, random_coefficients, spline_bases, spline_field
from brainfm.volume import spacing_of

_Classes = TypeVar("_Classes", np.ndarray, torch.Tensor)
PLACEHOLDER = "rendered"  # contrast of an image that was made from its label map alone: never shown as a real scan
_FINER = 1.1  # a level is read where its voxels are at most this much larger than those wanted
_OWN = 0.8  # voxels down to this part of a scan's own are asked for
_BEND_CELLS = 4  # of the displacement's splines along a window's edge
_ROOM_MM = 10.0  # of a finer window's middle from the border of the head


@dataclass(frozen=True)
class Placed:
    """Where a window's voxels lie.

    Attributes:
        voxel_mm: edge of a voxel before stretching.
        whole: whether it shows a whole head.
        positions: [3, W, W, W] float32, in voxels of the session's own grid.
    """

    voxel_mm: float
    whole: bool
    positions: np.ndarray


@dataclass(frozen=True)
class Pose:
    """How a window lies in a head, in few numbers: all that is drawn of it.

    Attributes:
        voxel_mm, whole: as in Placed.
        edge_vox: W.
        matrix: [3, 3] float32, from voxels of the window, counted from its middle, to voxels of the session.
        middle: [3] of the window, in voxels of the session.
        bend: [3, k, k, k] float32 spline coefficients of a displacement in the window; None where nothing bends.
        reach_vox: what the coefficients are multiplied by, in voxels of the window.
    """

    voxel_mm: float
    whole: bool
    edge_vox: int
    matrix: np.ndarray
    middle: np.ndarray
    bend: np.ndarray | None
    reach_vox: float

    @property
    def bases(self) -> list[np.ndarray]:
        """Of the displacement's splines."""
        return bend_bases(self.edge_vox)

    def placed(self) -> Placed:
        offsets = np.arange(self.edge_vox, dtype=np.float32) - (self.edge_vox - 1) / 2
        grid = np.stack(np.meshgrid(offsets, offsets, offsets, indexing="ij"))
        if self.bend is not None:
            grid = grid + self.reach_vox * np.stack([spline_field(of_axis, self.bases) for of_axis in self.bend])
        positions = np.tensordot(self.matrix, grid, axes=1) + self.middle[:, None, None, None]
        return Placed(self.voxel_mm, self.whole, positions.astype(np.float32))


def bend_bases(edge_vox: int) -> list[np.ndarray]:
    """For each axis [W, k] splines with four knots to a window's edge."""
    return spline_bases((edge_vox,) * 3, 1.0, edge_vox / _BEND_CELLS)


def draw_voxel_mm(rng: np.random.Generator, spec: WindowSpec, step: int, own_mm: float) -> tuple[float, bool]:
    """The edge of a sample's voxels and whether it shows a whole head.

    Args:
        step: of the run: what is legal moves with it.
        own_mm: of the scan; much finer voxels would show nothing but interpolation.
    """
    settled = spec.settled(step)
    share = 1 + settled * (spec.whole_share - 1)
    lowest = math.exp(math.log(spec.high_mm) + settled * (math.log(spec.low_mm) - math.log(spec.high_mm)))
    lowest = min(max(lowest, _OWN * own_mm), spec.high_mm)
    whole, place = rng.random() < share, rng.random()
    if whole:
        return spec.whole_mm[0] + place * (spec.whole_mm[1] - spec.whole_mm[0]), True
    return math.exp(math.log(lowest) + place * (math.log(spec.high_mm) - math.log(lowest))), False


def place_window(
    rng: np.random.Generator,
    spec: WindowSpec,
    *,
    edge_vox: int,
    voxel_mm: float,
    whole: bool,
    shape: Triple,
    spacing_mm: float,
    points: np.ndarray,
) -> Pose:
    """Turns, mirrors, stretches and bends a cube of ``edge_vox`` voxels and puts it into a head.

    Args:
        shape, spacing_mm: of the session's grid.
        points: [N, 3] voxels of the head or brain: a whole one lies about their middle, else one of them is the
            window's.
    """
    angles = np.deg2rad(rng.uniform(-spec.rotate_deg, spec.rotate_deg, 3))
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = math.cos(angle)
        turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ turn
    scale = voxel_mm * (1 + rng.uniform(-spec.stretch, spec.stretch, 3)) / spacing_mm
    matrix = matrix @ np.diag(scale)
    if rng.random() < 0.5:
        matrix = matrix @ np.diag([-1.0, 1.0, 1.0])
    middle = (np.array(shape, float) - 1) / 2
    jitter = rng.uniform(-1, 1, 3)
    if not len(points):
        middle = middle + jitter * spec.shift_vox / 2 * scale
    elif whole:  # a head's box holds the neck, too: its middle is not the brain's
        middle = (points.min(axis=0) + points.max(axis=0)) / 2 + jitter * spec.shift_vox / 2 * scale
    else:
        room = np.minimum(_ROOM_MM / spacing_mm, middle)
        middle = np.clip(points[rng.integers(len(points))], room, 2 * middle - room)
    bend, reach_vox = None, 0.0
    if spec.elastic:
        reach_vox = spec.elastic * float(rng.random()) * INJECTIVE * edge_vox / _BEND_CELLS
        bases = bend_bases(edge_vox)
        bend = np.stack([random_coefficients(rng, bases) for _ in range(3)])
    return Pose(voxel_mm, whole, edge_vox, matrix.astype(np.float32), middle, bend, reach_vox)


def read_window(store: Store, session: SessionEntry, name: str, placed: Placed, *, labels: bool = False) -> np.ndarray:
    """A scan (float32, between voxels linear) or label map (its integers, nearest) at the window's positions.

    The level of the store is read whose voxels are as large as they may be without losing detail.
    """
    level = level_for(store, session, placed.voxel_mm)
    positions = (placed.positions + 0.5) / 2**level - 0.5
    low = np.floor(positions.reshape(3, -1).min(axis=1)).astype(int)
    high = np.ceil(positions.reshape(3, -1).max(axis=1)).astype(int)
    # what lies far outside the head is background, however far a turned window reaches
    shape = np.array(store.shape(session, level))
    low, high = np.clip(low, -1, shape), np.clip(high, -1, shape)
    size = np.maximum(high - low + 1, 2)
    block = store.block(session, name, tuple(int(c) for c in low), tuple(int(s) for s in size), level=level)
    start, step = (value.astype(np.float32).reshape(3, 1, 1, 1) for value in (low, 2 / (size - 1)))
    relative = (positions - start) * step - 1
    grid = torch.from_numpy(np.ascontiguousarray(np.moveaxis(relative[::-1], 0, -1)))[None]
    values = torch.from_numpy(block.astype(np.float32))[None, None]
    mode = "nearest" if labels else "bilinear"
    found = F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=True)[0, 0].numpy()
    return np.rint(found).astype(block.dtype) if labels else found


def level_for(store: Store, session: SessionEntry, voxel_mm: float) -> int:
    """The level of a store that a window with voxels of this edge is read from."""
    spacing, level = store.spec.spacing_mm[0], store.finest(session)
    while level < store.levels(session) and spacing * 2 ** (level + 1) <= _FINER * voxel_mm:
        level += 1
    return level


@dataclass(frozen=True)
class Plan:
    """What a sample will show, settled before anything is read.

    Attributes:
        number: of the sample.
        session: whose head.
        pose: of the window.
        corners: [2, 3] where the two views begin in it.
        scans: of the two views; of a head without any the placeholder, which is never shown.
        rendered: [2] bool, whether a view is a rendering.
        real: whether there are scans.
    """

    number: int
    session: SessionEntry
    pose: Pose
    corners: np.ndarray
    scans: tuple[ScanEntry, ScanEntry]
    rendered: np.ndarray
    real: bool


@dataclass
class WindowPatches(Dataset):
    """Windows of a store's heads, two views in each; see the module.

    Args:
        store: isotropic.
        sessions: those of this side of the split.
        views: patch_vox (a cube); see ViewSpec.windows.
        seed: of the run.
        spec: how windows vary.
        steps_of: samples a step over all processes, which turns a sample's number into a step.
        targets: what is known of the people: label maps, lesions, volumes.
        from_step: step at which the schedule begins; a large one shows settled windows from the first sample on.
    """

    store: Store
    sessions: Sequence[SessionEntry]
    views: ViewSpec
    seed: int
    spec: WindowSpec
    steps_of: int
    targets: Targets = field(default_factory=Targets)
    from_step: int = 0

    def __post_init__(self) -> None:
        spacing = self.store.spec.spacing_mm
        if max(spacing) - min(spacing) > 1e-6:
            raise ConfigError(f"{self.store.path}: windows need a store of equal voxel edges, found {list(spacing)} mm")
        if len(set(self.views.patch_vox)) != 1:
            raise ConfigError(f"data.patch_vox={list(self.views.patch_vox)}: windows need a cube")
        share = self.spec.mapped_share
        people: dict[tuple[bool, str], dict[str, list[SessionEntry]]] = {}
        for session in self.sessions:
            mapped = session.key in self.targets.maps
            if any(scan.contrast != PLACEHOLDER for scan in session.scans) or mapped:
                source = (mapped and share is not None, session.dataset)
                people.setdefault(source, {}).setdefault(session.subject_key, []).append(session)
        if not people:
            raise StoreError(f"{self.store.path}: no scan to train on, expected at least one prepared session")
        self.people = {source: [of[key] for key in sorted(of)] for source, of in sorted(people.items())}
        self.shares = self._source_shares()
        self.subjects = sorted({key for of in people.values() for key in of})
        self._own_mm: dict[str, float] = {}
        self._middles: dict[str, np.ndarray] = {}
        self._shares: dict[str, np.ndarray] = {}

    def _source_shares(self) -> np.ndarray:
        """Of the samples, for each source of ``people``."""
        sizes, cap, share = [len(of) for of in self.people.values()], self.spec.source_cap, self.spec.mapped_share
        mapped = [is_mapped for is_mapped, _ in self.people]
        if share is None or all(mapped) or not any(mapped):
            return source_shares(sizes, cap)
        shares = np.zeros(len(sizes))
        for side, part in ((True, share), (False, 1 - share)):
            own = [place for place, is_mapped in enumerate(mapped) if is_mapped == side]
            shares[own] = part * source_shares([sizes[place] for place in own], min(1.0, cap / max(part, 1e-9)))
        return shares

    @property
    def voxel_mm(self) -> tuple[float, float]:
        """The smallest and largest edge of a voxel that a settled run shows."""
        return min(self.spec.low_mm, self.spec.whole_mm[0]), max(self.spec.high_mm, self.spec.whole_mm[1])

    def __len__(self) -> int:
        """People; any sample number is legal."""
        return len(self.subjects)

    def __getitem__(self, i: int) -> Sample:
        return self._sample(self.plan(i))

    def plan(self, i: int) -> Plan:
        """What sample number ``i`` will show."""
        rng = seeds.stream(self.seed, "window", i)
        of = list(self.people.values())[int(rng.choice(len(self.shares), p=self.shares))]
        sessions = of[int(rng.integers(len(of)))]
        session = sessions[int(rng.integers(len(sessions)))]
        step = self.from_step + i // self.steps_of
        voxel_mm, whole = draw_voxel_mm(rng, self.spec, step, self.own_mm(session))
        pose = place_window(
            rng, self.spec, edge_vox=self.views.patch_vox[0] + self.spec.shift_vox, voxel_mm=voxel_mm, whole=whole,
            shape=session.shape, spacing_mm=self.store.spec.spacing_mm[0], points=self.middles(session),
        )  # fmt: skip
        corners = rng.integers(0, self.spec.shift_vox + 1, (2, 3))
        real = [scan for scan in session.scans if scan.contrast != PLACEHOLDER]
        rendered = rng.random(2) < (self.spec.rendered if session.key in self.targets.maps else 0.0)
        if not real:
            rendered[:] = True
        order = rng.permutation(len(real))
        scans = [real[order[min(n, len(order) - 1)]] for n in (0, 1)] if real else [session.scans[0]] * 2
        return Plan(i, session, pose, corners, (scans[0], scans[1]), rendered, bool(real))

    def facts(self, plan: Plan) -> dict[str, Any]:
        """What a Sample says of a plan beside its voxels."""
        unknown = np.full(len(self.targets.regions), np.nan, np.float32)
        volumes = self.targets.volumes.get(plan.session.subject_key, unknown) if plan.pose.whole else unknown
        one, other = plan.scans
        return {
            "paired": other is not one, "same_contrast": same_look(plan.scans, plan.rendered), "corners": plan.corners,
            "rendered": plan.rendered, "real": plan.real, "tissue_shares": self.tissue_shares(plan.session),
            "voxel_mm": plan.pose.voxel_mm, "volumes": volumes if len(volumes) else None,
        }  # fmt: skip

    def middles(self, session: SessionEntry) -> np.ndarray:
        """[N, 3] voxels that may be a window's middle: of the brain, as many of each structure as there are, where a
        map tells it from the rest of the head."""
        key = "/".join(session.key)
        if key not in self._middles:
            chosen, points = self.targets.maps.get(session.key), self.store.foreground(session)
            if chosen is not None and chosen.session.key == session.key:
                labelled = self.store.label_points(session, chosen.name)
                ids = self.store.volume(session, chosen.name)[tuple(labelled.T)]
                table = self.targets.renders[chosen.scheme]
                inside = labelled[is_brain(np.take(table, ids, mode="clip"))]
                points = inside if len(inside) else points
            self._middles[key] = points
        return self._middles[key]

    def own_mm(self, session: SessionEntry) -> float:
        """Middle edge of the voxels that the first scan of a session was taken with: what a window can show of it."""
        key = "/".join(session.key)
        if key not in self._own_mm:
            grid = self.store.recipe(session, session.scans[0].name).file
            self._own_mm[key] = float(np.median(spacing_of(grid.ras_affine())))
        return self._own_mm[key]

    def tissue_shares(self, session: SessionEntry) -> np.ndarray:
        """[R] float32: which part of the voxels of the whole head, air excepted, each render class takes: what a
        rendering is standardised by. Zeros where there is no map."""
        key = "/".join(session.key)
        if key not in self._shares:
            chosen, counts = self.targets.maps.get(session.key), np.zeros(len(regions.RENDERED), np.int64)
            if chosen is not None:
                level = self.store.levels(session)
                size = self.store.shape(session, level)
                at = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in size], indexing="ij"))
                coarse = Placed(self.store.spec.spacing_mm[0] * 2**level, True, (at + 0.5) * 2**level - 0.5)
                image = read_window(self.store, session, session.scans[0].name, coarse)
                real = session.scans[0].contrast != PLACEHOLDER
                counts = np.bincount(self._anatomy(session, coarse, image, real)[1].ravel(), minlength=len(counts))
            counts[0] = 0
            self._shares[key] = (counts / max(counts.sum(), 1)).astype(np.float32)
        return self._shares[key]

    def _sample(self, plan: Plan) -> Sample:
        placed, (one, other) = plan.pose.placed(), plan.scans
        if plan.real:
            image = read_window(self.store, plan.session, one.name, placed)
        else:  # a placeholder is never shown
            image = np.zeros(placed.positions.shape[1:], np.float32)
        partner = image if other is one else read_window(self.store, plan.session, other.name, placed)
        target, tissue = self._anatomy(plan.session, placed, image, plan.real)
        weight, lesion, images = self._lesions(plan, placed, [image, partner], tissue)
        return Sample(
            plan.number, images[0][None].astype(np.float16), partner=images[1][None].astype(np.float16),
            regions=target, tissue=tissue, lesion=lesion, lesion_weight=weight, **self.facts(plan),
        )  # fmt: skip

    def _anatomy(
        self, session: SessionEntry, placed: Placed, image: np.ndarray, real: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Targets (int16, -1 unknown) and render classes (uint8; 0 all over where nothing is known)."""
        chosen = self.targets.maps.get(session.key)
        if chosen is None or chosen.session.frame != session.frame:
            return np.full(image.shape, regions.IGNORE, np.int16), np.zeros(image.shape, np.uint8)
        moved = [mine - its for mine, its in zip(session.offset_vox, chosen.session.offset_vox, strict=True)]
        shift = np.array(moved, np.float32).reshape(3, 1, 1, 1)
        there = Placed(placed.voxel_mm, placed.whole, placed.positions + shift)
        ids = read_window(self.store, chosen.session, chosen.name, there, labels=True)
        target, tissue = self.targets.tables[chosen.scheme], self.targets.renders[chosen.scheme]
        ids = np.where(ids < len(target), ids, 0)
        drawn = tissue[ids]
        if real:
            return target[ids].astype(np.int16), regions.outside_by_intensity(drawn, image)
        return target[ids].astype(np.int16), np.where(drawn == regions.BY_INTENSITY, 0, drawn).astype(np.uint8)

    def _lesions(
        self, plan: Plan, placed: Placed, images: list[np.ndarray], tissue: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """([X, Y, Z] float16 weight of an inserted lesion, int8 lesion or -1 unknown, the scans with it)."""
        none, session = np.zeros(images[0].shape, np.float16), plan.session
        masks = self.targets.lesions.get(session.key, ())
        if masks:
            lesion = np.zeros(images[0].shape, np.int8)
            for name in masks:
                lesion |= (read_window(self.store, session, name, placed, labels=True) != 0).astype(np.int8)
            return none, lesion, images
        if not self.may_insert(session):
            return none, np.full(images[0].shape, self.without_insertion(session), np.int8), images
        brain = is_brain(tissue) if tissue.any() else images[0] > max(-1.0, float(images[0].min()) + 0.25)
        found = self.inserted(plan, images, brain)
        return (none, np.zeros(images[0].shape, np.int8), images) if found is None else found

    def may_insert(self, session: SessionEntry) -> bool:
        """Whether lesions may be put into a head: one that no mask and no diagnosis calls ill."""
        ill = bool(self.targets.lesions.get(session.key)) or self.targets.health.get(session.key) == 1
        return self.targets.shapes is not None and not ill

    def without_insertion(self, session: SessionEntry) -> int:
        """Of every voxel of a head that neither has masks nor gets lesions: 0 where it is healthy, else -1, unknown."""
        return 0 if self.targets.health.get(session.key) == 0 else -1

    def wants_lesion(self, number: int) -> bool:
        """Whether a lesion is tried in a sample whose head may get one."""
        return bool(seeds.stream(self.seed, "lesion", number).random() < self.targets.synthesise)

    def inserted(
        self, plan: Plan, images: Sequence[np.ndarray], brain: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]] | None:
        """As `_lesions` of a head that may get one; None where none is wanted or none fits."""
        if not self.wants_lesion(plan.number) or self.targets.shapes is None:
            return None
        rng = seeds.stream(self.seed, "lesion", plan.number)
        rng.random()  # has decided that one is wanted
        insertion = lesions.draw_insertion(rng, self.targets.shapes, brain, brain.shape, plan.pose.voxel_mm)
        if insertion is None:
            return None
        weight = np.zeros(brain.shape, np.float32)
        for one in insertion.lesions:
            weight[one.box] = np.maximum(weight[one.box], one.weight * (1 + 0.5 * one.texture))
        changed = [lesions.insert(image, scan.contrast, insertion, brain) for image, scan in zip(images, plan.scans)]
        return weight.astype(np.float16), insertion.mask(brain.shape).astype(np.int8), changed


def same_look(scans: Sequence[ScanEntry], rendered: np.ndarray) -> bool:
    """Whether both views are known to show one contrast: the same real scan, or two of one kind."""
    if rendered.any():
        return False
    return scans[0] is scans[1] or (scans[0].contrast == scans[1].contrast and scans[0].contrast != "unknown")


def is_brain(tissue: _Classes) -> _Classes:
    """Brain tissue, neither fluid nor anything outside, by render class."""
    inside: _Classes = (tissue >= regions.RENDERED.index("cortex")) & (tissue <= regions.RENDERED.index("other"))
    return inside


def source_shares(people: Sequence[int], cap: float) -> np.ndarray:
    """The share of the samples that each data set gets: by the square root of its people, none above ``cap`` where
    there are sets enough to take the rest."""
    shares = np.sqrt(np.array(people, float))
    shares /= shares.sum()
    for _ in people:
        above = shares > cap
        if not above.any() or above.all():
            break
        shares[~above] *= (1 - cap * above.sum()) / max(shares[~above].sum(), 1e-12)
        shares[above] = cap
        if cap * above.sum() >= 1:
            shares = np.full(len(shares), 1 / len(shares))
    return shares / shares.sum()
