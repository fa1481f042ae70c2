"""Windows of packed heads, read on the device: what `WindowPatches` reads on the host, from voxels that lie there.

A batch takes two calls. `begin` queues all reading; `finish` puts lesions in, which the host draws, and gives the
batch. Between the two a training step is queued: then the host draws lesions while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm.batch import Batch
from brainfm.data import regions
from brainfm.data.packed import PackedWindows
from brainfm.data.store import Key, SessionEntry
from brainfm.data.windows import Plan, Pose, is_brain, level_for


@dataclass(frozen=True)
class _Begun:
    """A sample whose voxels are being read.

    Attributes:
        images: [2, W, W, W] float32, the scans of both views.
        target, tissue: [W, W, W] int16 targets and uint8 render classes.
        lesion: [W, W, W] int8.
        on_host: scans [2, W, W, W] and brain [W, W, W], on their way to the host, where a lesion is wanted.
    """

    plan: Plan
    images: Tensor
    target: Tensor
    tissue: Tensor
    lesion: Tensor
    on_host: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Begun:
    """The samples of a batch, and what tells that they have reached the host."""

    samples: tuple[_Begun, ...]
    arrived: torch.cuda.Event | None


class DeviceWindows:
    """All voxels of a packed file, on the device.

    Args:
        windows: plans the samples; others of the same file may take its place.
        device: where the voxels are to lie.
    """

    def __init__(self, windows: PackedWindows, device: torch.device) -> None:
        self.windows, self.device, self.store = windows, device, windows.store
        self._volumes: dict[tuple[Key, str], list[Tensor]] = {}
        for session in self.store.sessions:
            for name in self.store.names(session.key):
                outside = self.store.outside(session, name)
                levels = [np.pad(v, 1, constant_values=outside) for v in self.store.quantised(session, name)]
                self._volumes[session.key, name] = [torch.from_numpy(level).to(device) for level in levels]
        self._tables = {name: _up(table, device).long() for name, table in windows.targets.tables.items()}
        self._renders = {name: _up(table, device) for name, table in windows.targets.renders.items()}
        self._bases: dict[int, list[Tensor]] = {}

    @property
    def gigabytes(self) -> float:
        return sum(level.nbytes for levels in self._volumes.values() for level in levels) / 1e9

    @torch.no_grad()
    def begin(self, numbers: Sequence[int]) -> Begun:
        """Queues the reading of these samples."""
        samples = tuple(self._begin(self.windows.plan(number)) for number in numbers)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        return Begun(samples, arrived)

    @torch.no_grad()
    def finish(self, begun: Begun) -> Batch:
        """The batch, of windows that are still to be rendered."""
        if begun.arrived is not None:
            begun.arrived.synchronize()
        images, weights, lesions = [], [], []
        for one in begun.samples:
            image, lesion = one.images, one.lesion
            weight = torch.zeros(lesion.shape, dtype=torch.float16, device=self.device)
            if one.on_host is not None:
                scans, brain = (value.numpy() for value in one.on_host)
                found = self.windows.inserted(one.plan, list(scans), brain)
                if found is not None:
                    weight, lesion = _up(found[0], self.device), _up(found[1], self.device)
                    image = _up(np.stack(found[2]), self.device)
            images.append(image)
            weights.append(weight)
            lesions.append(lesion)
        stacked = torch.stack(images)
        facts = [self.windows.facts(one.plan) for one in begun.samples]
        told = {}
        for name in ("paired", "same_contrast", "corners", "rendered", "real", "tissue_shares", "voxel_mm"):
            told[name] = torch.from_numpy(np.stack([np.asarray(of[name]) for of in facts]))
        told["voxel_mm"] = told["voxel_mm"].float()
        if facts[0]["volumes"] is not None:
            told["volumes"] = _up(np.stack([of["volumes"] for of in facts]), self.device)
        return Batch(
            image=stacked[:, :1], partner=stacked[:, 1:], sample=torch.tensor([o.plan.number for o in begun.samples]),
            regions=torch.stack([one.target for one in begun.samples]), lesion=torch.stack(lesions),
            tissue=torch.stack([one.tissue for one in begun.samples]), lesion_weight=torch.stack(weights).float(),
            **told,
        )  # fmt: skip

    def _begin(self, plan: Plan) -> _Begun:
        windows, session = self.windows, plan.session
        positions = self.positions(plan.pose)
        if plan.real:
            one, other = plan.scans
            image = self.read(session, one.name, positions, plan.pose.voxel_mm)
            partner = image if other is one else self.read(session, other.name, positions, plan.pose.voxel_mm)
        else:
            image = partner = torch.zeros(positions.shape[1:], device=self.device)
        target, tissue = self._anatomy(plan, positions, image)
        images = torch.stack([image, partner])
        lesion = torch.full(image.shape, windows.without_insertion(session), dtype=torch.int8, device=self.device)
        masks, on_host = windows.targets.lesions.get(session.key, ()), None
        if masks:
            read = [self.read(session, name, positions, plan.pose.voxel_mm, labels=True) for name in masks]
            lesion = (torch.stack(read) != 0).any(dim=0).to(torch.int8)
        elif windows.may_insert(session):
            lesion = torch.zeros_like(lesion)
            if windows.wants_lesion(plan.number):
                bright = image > (image.amin() + 0.25).clamp(min=-1.0)
                brain = torch.where((tissue > 0).any(), is_brain(tissue), bright)
                on_host = (images.to("cpu", non_blocking=True), brain.to("cpu", non_blocking=True))
        return _Begun(plan, images, target, tissue, lesion, on_host)

    def _anatomy(self, plan: Plan, positions: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        session, chosen = plan.session, self.windows.targets.maps.get(plan.session.key)
        if chosen is None or chosen.session.frame != session.frame:
            unknown = torch.full(image.shape, regions.IGNORE, dtype=torch.int16, device=self.device)
            return unknown, torch.zeros(image.shape, dtype=torch.uint8, device=self.device)
        moved = [mine - its for mine, its in zip(session.offset_vox, chosen.session.offset_vox, strict=True)]
        if any(moved):
            positions = positions + _up(np.array(moved, np.float32).reshape(3, 1, 1, 1), self.device)
        ids = self.read(chosen.session, chosen.name, positions, plan.pose.voxel_mm, labels=True).long()
        drawn = self._renders[chosen.scheme][ids]
        target = self._tables[chosen.scheme][ids].to(torch.int16)
        if plan.real:
            return target, outside_by_intensity(drawn, image)
        return target, drawn.masked_fill(drawn == regions.BY_INTENSITY, 0)

    def positions(self, pose: Pose) -> Tensor:
        """[3, W, W, W] of a window's voxels, as Pose.placed gives them."""
        edge = pose.edge_vox
        matrix, middle = _up(pose.matrix, self.device), _up(pose.middle.astype(np.float32), self.device)
        offsets = torch.arange(edge, dtype=torch.float32, device=self.device) - (edge - 1) / 2
        grid = torch.stack(torch.meshgrid(offsets, offsets, offsets, indexing="ij"))
        if pose.bend is not None:
            if edge not in self._bases:
                self._bases[edge] = [_up(basis, self.device) for basis in pose.bases]
            bend = _up(pose.bend, self.device)
            grid = grid + pose.reach_vox * torch.einsum("cijk,xi,yj,zk->cxyz", bend, *self._bases[edge])
        x, y, z = (matrix[:, axis, None, None, None] * grid[axis] for axis in range(3))
        return x + y + z + middle[:, None, None, None]  # no matrix product, which a GPU may round to three digits

    def read(
        self, session: SessionEntry, name: str, positions: Tensor, voxel_mm: float, *, labels: bool = False
    ) -> Tensor:
        """[W, W, W] float32: a scan, or the numbers of a label map, at [3, W, W, W] positions."""
        level = level_for(self.store, session, voxel_mm)
        volume = self._volumes[session.key, name][level - self.store.finest(session)]  # with a border of one voxel
        # grid_sample counts from -1 to 1, the last axis first; the border moves everything by one voxel
        steps = [(positions[axis] + 0.5) / 2**level + 0.5 for axis in (2, 1, 0)]
        edges = [volume.shape[axis] - 1 for axis in (2, 1, 0)]
        grid = torch.stack([step * (2 / edge) - 1 for step, edge in zip(steps, edges)], dim=-1)[None]
        mode = "nearest" if labels else "bilinear"
        values = volume[None, None].float()
        found: Tensor = F.grid_sample(values, grid, mode=mode, padding_mode="border", align_corners=True)[0, 0]
        low = self.store.low(session, name)
        return found if low is None else found * self.store.step + low


def outside_by_intensity(tissue: Tensor, scan: Tensor) -> Tensor:
    """regions.outside_by_intensity on tensors; the two are compared in a test."""
    edges = torch.tensor(regions.CLUSTER_EDGES, device=scan.device)
    cluster = torch.bucketize(scan, edges, right=True) + regions.RENDERED.index("cluster0")
    found = cluster.masked_fill(scan <= scan.amin() + regions.AIR_MARGIN, regions.RENDERED.index("air"))
    return torch.where(tissue == regions.BY_INTENSITY, found.to(torch.uint8), tissue)


def _up(values: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting for what it has still to do."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
