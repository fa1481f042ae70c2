"""Memory plan: patch, parts of a batch, precision and recomputation for the memory that a device has.

Nothing here is guessed: the peaks come from memory_table.json, which scripts/benchmark/memory.py measures and says how
(rows of a real GPU where there was one; else a count of every tensor alive during the step). The table has no rows for
free widths: these are scaled from the nearest family, and the plan says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.tasks.registry import kind_of
from brainfm.training.settings import TrainerSettings
from brainfm.training.speed import settled

TABLE = Path(__file__).with_name("memory_table.json")
GB = 2**30
# Of a GPU's memory: the driver's context, and the share that the allocator loses to gaps and kernels to workspaces.
_CONTEXT_GB, _GPU_SHARE = 0.6, 0.9
_RAM_SHARE = 0.8  # of what is free now: loader workers and whole volumes need some as well
_FEW_CLASSES = 8  # up to here the table's rows know what a class takes
_LEAST_EDGE = 32  # voxels; a smaller patch shows too little of a head to be worth training on
_FAMILIES = {"unet": ("unet_b",), "resenc": ("resenc_s", "resenc_l")}  # sizes to scale the others from


@dataclass(frozen=True)
class MemoryPlan:
    """How a training step is computed.

    Attributes:
        patch_vox: edges along X, Y, Z.
        batch_size: samples a step on each device, whatever the parts.
        accumulate: in how many parts they pass the network (LoopSpec.accumulate).
        precision: ``bf16-mixed`` or ``32-true``.
        checkpointing: whether blocks are recomputed in the backward pass (nets.recompute.set_checkpointing).
        predicted_gb: the expected peak of a step.
        budget_gb: what it may be.
        notes: what was given up and how sure the prediction is, a sentence each.
    """

    patch_vox: tuple[int, int, int]
    batch_size: int
    accumulate: int
    precision: str
    checkpointing: bool
    predicted_gb: float
    budget_gb: float
    notes: tuple[str, ...] = ()

    @property
    def micro_batch(self) -> int:
        """Samples of the largest part."""
        return math.ceil(self.batch_size / self.accumulate)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        return values | {"patch_vox": list(self.patch_vox), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MemoryPlan:
        patch_x, patch_y, patch_z = values["patch_vox"]
        return cls(**{**values, "patch_vox": (patch_x, patch_y, patch_z), "notes": tuple(values["notes"])})


class MemoryTable:
    """The measured peaks.

    Args:
        content: of the file: ``rows`` with ``fixed`` bytes and bytes per ``voxel``, ``contrast`` (per voxel and
            contrast) and ``class_`` (per voxel and class); ``excess``: what a process really takes over what was
            counted, by device; ``many``: bytes per voxel of every class beyond the eighth, by device.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.rows: list[dict[str, Any]] = list(content["rows"])
        self.excess: dict[str, float] = dict(content["excess"])
        self.many: dict[str, float] = dict(content["many"])

    @classmethod
    @cache
    def shipped(cls) -> MemoryTable:
        return cls(json.loads(TABLE.read_text()))

    @staticmethod
    def write(path: str | Path, content: Mapping[str, Any]) -> None:
        """Rows that ``content`` does not replace stay; one row a line, so that changes can be read."""
        path = Path(path)
        old = json.loads(path.read_text()) if path.exists() else {"rows": [], "rss": [], "excess": {}}

        def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
            return tuple(row[k] for k in ("backbone", "device", "how", "precision", "kind", "checkpointing"))

        new = {key(row) for row in content["rows"]}
        rows = sorted([*content["rows"], *(row for row in old["rows"] if key(row) not in new)], key=key)
        rss = content["rss"] or old["rss"]
        excess = content["excess"] if content["rss"] else old["excess"] or content["excess"]
        lines = [f'"about": {json.dumps(content["about"])}', f'"excess": {json.dumps(excess)}']
        lines += [f'"many": {json.dumps(content["many"])}']
        for name, values in (("rows", rows), ("rss", rss)):
            inner = ",\n  ".join(json.dumps(value) for value in values)
            lines.append(f'"{name}": [\n  {inner}\n ]' if values else f'"{name}": []')
        path.write_text("{\n " + ",\n ".join(lines) + "\n}\n")

    def peak(
        self,
        backbone: Backbone,
        kind: str,
        *,
        device: str,
        precision: str,
        checkpointing: bool,
        contrasts: int,
        classes: int,
        voxels: int,
    ) -> tuple[float, str]:
        """(bytes at the peak of a step, how that is known).

        Args:
            kind: ``segmentation`` or ``scan``.
            device: ``gpu`` or ``cpu``.
            voxels: of all patches that pass the network together.
        """
        name = str(backbone.config["name"])
        rows = [r for r in self.rows if r["kind"] == kind and r["checkpointing"] == checkpointing]
        row, scale, said = _on([r for r in rows if r["backbone"] == name], device, precision), 1.0, ""
        if row is None or (device == "cpu" and row["device"] != device):
            family = _FAMILIES.get(name.split("_")[0], ())
            near = _on([r for r in rows if r["backbone"] in family], device, precision)
            if near is not None and near["backbone"] != name:
                row, said = near, f", scaled from {near['backbone']} by its widths"
                scale = level_weight(backbone) / near["level_weight"]
        if row is None:
            raise LookupError(name)
        fixed = row["fixed"] * (parameters_of(backbone) / row["encoder"] if said else 1.0)
        each = row["voxel"] + contrasts * row["contrast"]
        if precision == "32-true" and row["precision"] != precision:
            each, said = 2 * each, said + ", doubled for float32"
        if row["device"] != device:
            said += f", as a {row['device'].upper()} takes it"
        classes_bytes = classes * row["class_"] + max(0, classes - _FEW_CLASSES) * self.many.get(row["device"], 0.0)
        excess = self.excess.get(row["device"], 1.0) if row["how"] == "trace" else 1.0
        how = "tensors counted in a step" if row["how"] == "trace" else "a step measured on a GPU"
        return (fixed + voxels * (each * scale + classes_bytes)) * excess, how + said


def _on(rows: list[dict[str, Any]], device: str, precision: str) -> dict[str, Any] | None:
    """The row that says most about a device and a precision: measured before counted, the same before another one."""

    def rank(row: Mapping[str, Any]) -> tuple[bool, bool, bool]:
        return row["device"] == device, row["precision"] == precision, row["how"] == "cuda"

    return max(rows, key=rank, default=None)


def level_weight(backbone: Backbone) -> float:
    """Channels that the encoder's convolutions write per voxel of the image: what its maps take, but for a factor."""
    levels = backbone.blocks()[-len(backbone.widths) :]
    return sum(
        width / stride**3 * sum(isinstance(part, torch.nn.Conv3d) for part in level.modules())
        for level, width, stride in zip(levels, backbone.widths, backbone.strides, strict=True)
    )


def parameters_of(backbone: Backbone) -> int:
    return sum(p.numel() for p in backbone.parameters())


def plan(
    backbone: Backbone,
    task_kind: str,
    *,
    contrasts: int,
    classes: int,
    patch_vox: tuple[int, int, int],
    batch_size: int,
    trainer: TrainerSettings,
    views: int = 1,
    table: MemoryTable | None = None,
) -> MemoryPlan:
    """The plan that gives up least: first recomputation, then the batch in parts, then a smaller patch.

    Args:
        task_kind: as in TaskSpec.
        contrasts: M at most; contrast dropout is not counted on.
        classes: K of a segmentation.
        patch_vox: as wished; each edge a multiple of the backbone's coarsest stride.
        batch_size: samples a step on each device; it is kept, in parts where needed.
        trainer: ``accelerator``, ``precision`` (``auto`` is settled here) and ``memory_gb``: null is what the device
            has.
        views: patches that a sample of a whole-head task shows.

    Raises:
        ConfigError: where not even the smallest patch of one sample fits, or a number is impossible.
    """
    backbone.check_patch(patch_vox)
    if min(contrasts, classes, batch_size, views) < 1:
        raise ConfigError(f"trainer.batch_size={batch_size}: expected at least one sample, contrast, class and view")
    trainer = settled(trainer)
    device = "gpu" if trainer.accelerator == "gpu" or _has_gpu(trainer) else "cpu"
    budget = budget_gb(device, trainer.memory_gb)
    kind = kind_of(task_kind)
    table = table or MemoryTable.shipped()

    def predicted(patch: tuple[int, int, int], micro: int, checkpointing: bool) -> tuple[float, str]:
        found, how = table.peak(
            backbone,
            kind.measured,
            device=device,
            precision=trainer.precision,
            checkpointing=checkpointing,
            contrasts=contrasts,
            classes=classes if kind.voxelwise else 1,
            voxels=math.prod(patch) * micro * views,
        )
        return found / GB, how

    patches = patches_down(patch_vox, backbone.strides[-1])
    try:
        least = 0.0
        for patch in patches:
            for parts in _parts(batch_size):
                for checkpointing in (False, True):
                    least, how = predicted(patch, math.ceil(batch_size / parts), checkpointing)
                    if least <= budget:
                        made = MemoryPlan(
                            patch, batch_size, parts, trainer.precision, checkpointing, round(least, 2), budget
                        )
                        return dataclasses.replace(made, notes=_notes(made, patch_vox, how))
    except LookupError as error:
        note = f"nothing was measured for backbone {error}: the plan is what was asked for"
        return MemoryPlan(patches[0], batch_size, 1, trainer.precision, False, 0.0, budget, (note,))
    raise ConfigError(
        f"trainer.memory_gb: {budget:.1f} GB to use, expected {least:.1f} GB or more, which {backbone.config['name']} "
        f"needs for one patch of {_by(patches[-1])} voxels with recomputation; use a smaller backbone"
    )


def settle(step: Callable[[MemoryPlan], None], made: MemoryPlan, stride: int = 32) -> MemoryPlan:
    """Tries a step, and goes down one rung at a time where the device says that it is out of memory.

    Args:
        step: computes one training step of a plan and leaves nothing behind.
        stride: the backbone's coarsest.

    Returns:
        The plan whose step passed; its notes say what the device refused.

    Raises:
        ConfigError: where the last rung does not fit either.
    """
    while True:
        try:
            step(made)
            return made
        except torch.OutOfMemoryError:
            refused = made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        below = lower(refused, stride)
        if below is None:
            raise ConfigError(
                f"trainer.memory_gb: the device has no room for one patch of {_by(refused.patch_vox)} voxels with "
                "recomputation; use a smaller backbone"
            ) from None
        made = below


def lower(made: MemoryPlan, stride: int = 32) -> MemoryPlan | None:
    """The next rung below a plan; None below the last."""
    if not made.checkpointing:
        changed: dict[str, Any] = {"checkpointing": True}
        said = "recomputation"
    elif made.accumulate < made.batch_size:
        parts = next(p for p in _parts(made.batch_size) if p > made.accumulate)
        changed, said = {"accumulate": parts}, f"{parts} parts of a batch"
    else:
        patches = patches_down(made.patch_vox, stride)
        if len(patches) < 2:
            return None
        changed, said = {"patch_vox": patches[1]}, f"patches of {_by(patches[1])} voxels"
    note = f"the device had no room for the step as planned: {said} instead"
    return dataclasses.replace(made, notes=(*made.notes, note), **changed)


def budget_gb(device: str, memory_gb: float | None) -> float:
    """What a step may take, in GB (2^30 bytes): the memory less what the step cannot use.

    Args:
        device: ``gpu`` or ``cpu``.
        memory_gb: of the whole device; None asks the machine.

    Raises:
        ConfigError: for a number that is none, or a GPU that is not there to be asked.
    """
    if memory_gb is not None:
        if isinstance(memory_gb, bool) or not 0 < float(memory_gb) < math.inf:
            raise ConfigError(f"trainer.memory_gb={memory_gb}: expected a number of GB, or null for what there is")
        whole = float(memory_gb)
    elif device == "cpu":
        whole = free_ram_bytes() / GB
    elif torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / GB
    else:
        raise ConfigError("trainer.accelerator=gpu: no GPU was found; use trainer=cpu or give trainer.memory_gb")
    usable = _RAM_SHARE * whole if device == "cpu" else _GPU_SHARE * whole - _CONTEXT_GB
    return round(max(usable, 0.0), 2)


def free_ram_bytes() -> float:
    """What this process may still take: of the machine, and of its control group where that has a limit."""
    free = math.inf
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        free = min(free, int(limit[0]) - int(used[0]))
    if math.isinf(free):
        raise ConfigError("trainer.memory_gb=null: this system does not say how much memory is free; give a number")
    return free


def patches_down(patch_vox: tuple[int, int, int], stride: int) -> list[tuple[int, int, int]]:
    """The patch and ever smaller ones: the longest edges lose a stride at a time, none goes below 32 voxels (or below
    what was asked for, where that is less)."""
    floor = stride * math.ceil(max(_LEAST_EDGE, 2 * stride) / stride)
    found = [(int(patch_vox[0]), int(patch_vox[1]), int(patch_vox[2]))]
    while max(found[-1]) > floor:
        longest = max(found[-1])
        x, y, z = (edge - stride if edge == longest else edge for edge in found[-1])
        found.append((x, y, z))
    return found


def _parts(batch_size: int) -> list[int]:
    """Numbers of parts worth trying: each has a smaller largest part than the one before."""
    found = [1]
    for parts in range(2, batch_size + 1):
        if math.ceil(batch_size / parts) < math.ceil(batch_size / found[-1]):
            found.append(parts)
    return found


def _notes(made: MemoryPlan, asked: tuple[int, int, int], how: str) -> tuple[str, ...]:
    notes = [f"a step takes about {made.predicted_gb:.1f} of the {made.budget_gb:.1f} GB it may use ({how})"]
    if made.checkpointing:
        notes.append("blocks are recomputed in the backward pass: a step costs one forward pass more")
    if made.accumulate > 1:
        notes.append(
            f"{made.batch_size} samples pass in {made.accumulate} parts: a loss over the whole batch sees a part"
        )
    if made.patch_vox != tuple(asked):
        notes.append(f"patches of {_by(made.patch_vox)} instead of {_by(asked)} voxels")
    return tuple(notes)


def _by(patch_vox: tuple[int, ...]) -> str:
    return "x".join(str(edge) for edge in patch_vox)


def _has_gpu(trainer: TrainerSettings) -> bool:
    return trainer.accelerator == "auto" and torch.cuda.is_available()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except OSError:
        return []
