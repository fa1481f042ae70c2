"""Memory of a training step, for the planner of fine-tuning (brainfm/training/memory_table.json).

    python scripts/benchmark/memory.py --out brainfm/training/memory_table.json         # minutes on one core, no GPU
    python scripts/benchmark/memory.py --device cuda --out ...                          # where a GPU is at hand
    python scripts/benchmark/memory.py --show                                           # plans for 8 to 80 GB

Three ways of measuring, and every row of the table says which one it comes from:

    trace   The step (forward, backward; weights, two moments, average) runs on tensors without data, and every
            allocation and release of a storage is counted: the peak of what is alive at once. Exact for the tensors
            that PyTorch makes, blind to workspaces inside kernels and to fragmentation. As a GPU computes it: torch's
            own layers, bfloat16 autocast (the operators' rules of autocast are those of the CPU).
    rss     A real step in a fresh process on this CPU, in float32: the process's peak resident set less what it held
            before the step. Few points: they tell how far the trace is from what the process really takes.
    cuda    A real step on a GPU: torch.cuda.max_memory_allocated.

A row is fitted to its points: peak = fixed + voxels x (voxel + contrasts x contrast + classes x class_). Points beyond
those that determine a row are checks: what the fit says there beside what was measured. With few classes the peak lies
in the decoder, with many in the loss: what a class takes beyond the eighth is measured once, on the smallest network.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets import cpu
from brainfm.nets.backbone import BACKBONES, build_backbone
from brainfm.nets.recompute import set_checkpointing
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import build_task
from brainfm.tasks.task import Task
from brainfm.training.memory import MemoryTable, level_weight, parameters_of, plan
from brainfm.training.receipt import peak_memory_bytes
from brainfm.training.settings import TrainerSettings

# backbone -> the two edges that determine a row, and one more to check it on
EDGES = {"unet_tiny": (32, 64, 96), "unet_b": (64, 96, 128), "unet_l": (64, 96, 128), "resenc_s": (64, 96, 128),
         "resenc_l": (96, 128, 160)}  # fmt: skip
ON_CPU = ("unet_tiny", "unet_b", "resenc_s")


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, and answers what the step asks its data: every contrast is there
    (``whole``: and may be taken as it is, as on a CPU; else it is masked, as on a GPU)."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole, self.sizes, self.now, self.peak = whole, dict[int, int](), 0, 0
        self.summaries: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.whole or not any(args[0] is summary for summary in self.summaries)
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.all.default:
            self.summaries.append(output)
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        return output

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def question(point: dict[str, Any]) -> Task:
    contrasts = tuple(f"c{number}" for number in range(point["contrasts"]))
    patch = (point["edge"],) * 3
    torch.manual_seed(0)
    backbone = build_backbone(point["backbone"])
    if point["kind"] == "segmentation":
        spec = TaskSpec("segmentation", "lesion", contrasts, tuple(range(point["classes"])), patch)
    else:
        spec = TaskSpec("classification", "sex", contrasts, ("f", "m"), patch, mode="exclusive", view_mm=2.0)
    task = build_task(spec, backbone)
    set_checkpointing(task, point["checkpointing"])
    return task


def step(point: dict[str, Any], task: nn.Module, device: str = "cpu") -> None:
    """Forward and backward of one sample. Of a whole-head task the loss is left out: it looks at a few numbers."""
    edge, contrasts = point["edge"], point["contrasts"]
    present = torch.ones(1, contrasts, dtype=torch.bool, device=device)
    mixed = torch.autocast(device, torch.bfloat16) if point["precision"] == "bf16-mixed" else nullcontext()
    with mixed:
        if point["kind"] == "segmentation":
            image = torch.randn(1, contrasts, edge, edge, edge, device=device)
            label = torch.zeros(1, edge, edge, edge, dtype=torch.int64, device=device)
            batch = Batch(image, torch.arange(1), present=present, label=label)
            loss = task.loss(task(image, present), batch).total
        else:
            image = torch.randn(1, 1, contrasts, edge, edge, edge, device=device)
            loss = task(image, present).logits.float().square().sum()
    loss.backward()


def states(task: nn.Module) -> list[Tensor]:
    """What AdamW and the average of the weights hold for each parameter."""
    return [torch.zeros_like(p) for p in task.parameters() for _ in range(3)]


def traced(point: dict[str, Any]) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    alive = Alive(whole=point["device"] == "cpu")
    with FakeTensorMode(), alive:
        task = question(point)
        if point["device"] == "gpu":
            cpu.swap_out(task)
        held = states(task)
        step(point, task)
        del held
    return alive.peak


def rss_of(point: dict[str, Any]) -> int:
    """In a fresh process, alone: this one's peak is of no use."""
    command = [sys.executable, __file__, "--child", json.dumps(point)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["bytes"])


def child(point: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    small = point | {"edge": 2 * 16, "backbone": "unet_tiny", "contrasts": 1}
    step(small, question(small))  # code and thread pools that any step needs are not the step's
    before = peak_memory_bytes()
    task = question(point)
    held = states(task)
    step(point, task)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.0)
    optimizer.step()
    print(json.dumps({"bytes": peak_memory_bytes() - before, "states": len(held)}))


def on_cuda(point: dict[str, Any]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    task = question(point).to("cuda")
    held = states(task)
    step(point, task, "cuda")
    del held
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def points_of(backbone: str, device: str, precision: str, kind: str, checkpointing: bool) -> list[dict[str, Any]]:
    """Those that determine the row first, then the check."""
    near, far, beyond = EDGES[backbone]
    with_classes = [(far, 1, 8)] if kind == "segmentation" else []
    wanted = [(near, 1, 2), (far, 1, 2), (far, 4, 2), *with_classes, (beyond, 2, 2)]
    about = {"backbone": backbone, "device": device, "precision": precision, "kind": kind}
    return [
        about | {"checkpointing": checkpointing, "edge": edge, "contrasts": contrasts, "classes": classes}
        for edge, contrasts, classes in wanted
    ]


def fitted(points: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: the plane through all points but the last, which checks it."""
    with_classes = points[0]["kind"] == "segmentation"

    def terms(point: dict[str, Any]) -> list[float]:
        voxels = point["edge"] ** 3
        return [1.0, voxels, voxels * point["contrasts"], *([voxels * point["classes"]] if with_classes else [])]

    matrix = np.array([terms(point) for point in points[:-1]])
    scale = np.abs(matrix).max(axis=0)
    solved = np.linalg.solve(matrix / scale, np.array([float(point["bytes"]) for point in points[:-1]])) / scale
    check = points[-1]
    kept = {k: points[0][k] for k in ("backbone", "device", "how", "precision", "kind", "checkpointing")}
    return kept | {
        "encoder": parameters_of(build_backbone(points[0]["backbone"])),
        "level_weight": round(level_weight(build_backbone(points[0]["backbone"])), 3),
        "fixed": round(float(solved[0])),
        "voxel": round(float(solved[1]), 2),
        "contrast": round(float(solved[2]), 2),
        "class_": round(float(solved[3]), 2) if with_classes else 0.0,
        "check": round(float(np.dot(terms(check), solved)) / check["bytes"], 4),
        "points": [[point["edge"], point["contrasts"], point["classes"], point["bytes"]] for point in points],
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    rows, rss = [], []
    wanted = [(name, "gpu", "bf16-mixed") for name in args.backbones]
    if args.device == "cpu":
        wanted += [(name, "cpu", "32-true") for name in args.backbones if name in ON_CPU]
    for name, device, precision in wanted:
        for kind in ("segmentation", "scan"):
            for checkpointing in (False, True):
                points = points_of(name, device, precision, kind, checkpointing)
                for point in points:
                    point |= {"how": "cuda" if args.device == "cuda" else "trace"}
                    point |= {"bytes": on_cuda(point) if args.device == "cuda" else traced(point)}
                rows.append(fitted(points))
                print(json.dumps(rows[-1]), flush=True)
    for point in rss_points() if args.device == "cpu" and not args.no_rss else []:
        found = point | {"rss": rss_of(point), "trace": traced(point)}
        rss.append(found)
        print(json.dumps(found), flush=True)
    about = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "batch": 1,
    }
    many = {
        device: round((_with_classes(device, precision, 64) - _with_classes(device, precision, 32)) / (32 * 64**3), 2)
        for device, precision in (("gpu", "bf16-mixed"), ("cpu", "32-true"))
    }
    excess = max((point["rss"] / point["trace"] for point in rss), default=1.0)
    return {"about": about, "excess": {"cpu": round(excess, 3)}, "many": many, "rows": rows, "rss": rss}


def _with_classes(device: str, precision: str, classes: int) -> int:
    point = {"backbone": "unet_tiny", "device": device, "precision": precision, "kind": "segmentation"}
    return traced(point | {"checkpointing": False, "edge": 64, "contrasts": 1, "classes": classes})


def rss_points() -> list[dict[str, Any]]:
    about = {"backbone": "unet_b", "device": "cpu", "precision": "32-true", "kind": "segmentation", "classes": 2}
    return [
        about | {"edge": 48, "contrasts": 1, "checkpointing": False},
        about | {"edge": 64, "contrasts": 1, "checkpointing": False},
        about | {"edge": 64, "contrasts": 2, "checkpointing": True},
    ]


def show() -> None:
    """Plans of the usual questions, one line each."""
    print(f"{'backbone':<9}{'patch':>6}{'contrasts':>10}{'memory_gb':>10}  plan")
    for backbone, edge in (("unet_b", 96), ("unet_b", 128), ("resenc_l", 128), ("resenc_l", 160), ("unet_l", 96)):
        for contrasts in (1, 4):
            for gigabytes in (8, 12, 16, 24, 80):
                trainer = TrainerSettings(accelerator="gpu", precision="bf16-mixed", memory_gb=gigabytes)
                try:
                    found = plan(
                        build_backbone(backbone), "segmentation", contrasts=contrasts, classes=2,
                        patch_vox=(edge,) * 3, batch_size=2, trainer=trainer,
                    )  # fmt: skip
                    patch = "x".join(map(str, found.patch_vox))
                    line = (
                        f"{patch}, {found.batch_size} samples in {found.accumulate} part(s), "
                        f"{'recomputed' if found.checkpointing else 'kept'}, {found.predicted_gb:.1f} GB"
                    )
                except ConfigError as error:
                    line = str(error)
                print(f"{backbone:<9}{edge:>6}{contrasts:>10}{gigabytes:>10}  {line}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backbones", nargs="+", default=list(EDGES), choices=sorted(set(EDGES) & set(BACKBONES)))
    parser.add_argument("--no-rss", action="store_true", help="no real steps on the CPU")
    parser.add_argument("--show", action="store_true", help="measure nothing, print plans from the table that is there")
    parser.add_argument("--out", help="the table; rows of other backbones in it stay")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(json.loads(args.child))
    elif args.show:
        show()
    else:
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
        table = measure(args)
        if args.out:
            MemoryTable.write(args.out, table)


if __name__ == "__main__":
    main()
