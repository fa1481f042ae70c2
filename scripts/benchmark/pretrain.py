"""Speed of the training step beside plain PyTorch and beside other packages' networks, in one run.

    python scripts/benchmark/pretrain.py --quick                                             # minutes on one core
    python scripts/benchmark/pretrain.py --device cuda --backbones unet_b resenc_l --patches 64 96 160 --steps 30

Each round takes every contestant once, in turn, and the table shows medians: what else the machine does falls on all.
A step is: batch from memory (or from --store), to the device, loss, gradient, clipping, AdamW. Contestants:

    brainfm           as `brainfm pretrain` computes it (trainer=auto)
    plain             the same network, objective and weights with torch's own layers: eager, float32, contiguous
    dna, yucca, monai dynamic-network-architectures' ResEnc-L, Yucca's and MONAI's U-Net at the backbone's widths, eager
                      float32, masked reconstruction of the same number of voxels; left out where not installed

MiB: on a GPU the most that was allocated, on a CPU what a step keeps between forward and backward.
unet_b answers cross_contrast (a sample is a pair), every other backbone mae. Times on a CPU are the process's own
seconds, not the clock's; that freed memory is kept helps every contestant there. Packages that lie elsewhere are found
with PYTHONPATH.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.batch import Batch
from brainfm.data.patches import PretrainPatches, collate
from brainfm.data.store import Store
from brainfm.nets import cpu
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import build_objective
from brainfm.training.optim import build_optimizer
from brainfm.training.run import commit_of_code
from brainfm.training.settings import TrainerSettings
from brainfm.training.speed import quicken, settled

PHASES = ("data", "to_device", "forward", "backward", "optimiser")


@dataclass
class Contestant:
    """Something that trains: ``loss`` of a batch on the device, and how it is computed."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Batch], Tensor]
    autocast: bool = False
    seconds: dict[str, list[float]] = field(default_factory=lambda: {p: [] for p in PHASES})
    peak_mib: float = 0.0


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def batches(args: argparse.Namespace, edge: int, pairs: bool, views: Any) -> Iterator[Batch]:
    """Without a store: noise that is there already, so that ``data`` is nothing."""
    if args.store is not None:
        store = Store.open(args.store)
        dataset = PretrainPatches(store, store.sessions, views, seed=0)
        number = 0
        while True:
            yield collate([dataset[number + i] for i in range(args.batch)])
            number += args.batch
    generator = torch.Generator().manual_seed(0)
    image, partner = (torch.randn(args.batch, 1, edge, edge, edge, generator=generator).half() for _ in range(2))
    while True:
        yield Batch(image=image, sample=torch.arange(args.batch), partner=partner if pairs else None)


def step(one: Contestant, source: Iterator[Batch], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    marks = [clock(device)]
    batch = next(source)
    marks.append(clock(device))
    batch = batch.to(device)
    marks.append(clock(device))
    with torch.autocast(device.type, torch.bfloat16) if one.autocast else nullcontext():
        loss = one.loss(batch)
    marks.append(clock(device))
    loss.backward()
    marks.append(clock(device))
    nn.utils.clip_grad_norm_(one.module.parameters(), 1.0)
    one.optimizer.step()
    one.optimizer.zero_grad(set_to_none=True)
    marks.append(clock(device))
    for phase, begin, end in zip(PHASES, marks[:-1], marks[1:]):
        one.seconds[phase].append(end - begin)
    if device.type == "cuda":
        one.peak_mib = max(one.peak_mib, torch.cuda.max_memory_allocated() / 2**20)


def ours(args: argparse.Namespace, name: str, edge: int, device: torch.device) -> list[Contestant]:
    torch.manual_seed(0)
    question = "cross_contrast" if name == "unet_b" else "mae"
    objective = build_objective(question, build_backbone(name), patch_vox=(edge,) * 3, seed=0)
    found = []
    for label in ("brainfm", "plain"):
        module = copy.deepcopy(objective).to(device).train()
        accelerator = "gpu" if device.type == "cuda" else "cpu"
        trainer = settled(TrainerSettings(accelerator=accelerator, compile=args.compile))
        if label == "brainfm":
            quicken(module, trainer)
            optimizer: torch.optim.Optimizer = build_optimizer(module, lr=1e-4, weight_decay=0.01)
        else:
            optimizer = torch.optim.AdamW(cpu.swap_out(module).parameters(), lr=1e-4)
        autocast = label == "brainfm" and trainer.precision == "bf16-mixed"
        found.append(Contestant(label, module, optimizer, loss_of(module), autocast))
    return found


def loss_of(module: nn.Module) -> Callable[[Batch], Tensor]:
    return lambda batch: module(batch, 0.5).total


def peers(name: str, edge: int, device: torch.device, absent: list[str]) -> list[Contestant]:
    widths = list(build_backbone(name).widths)
    found = []
    for label, module_name, build in PEERS:
        if label == "dna" and name != "resenc_l":
            continue
        try:
            net = build(importlib.import_module(module_name), widths)
        except (ImportError, AttributeError, TypeError) as error:
            absent.append(f"{label}: {type(error).__name__}: {error}")
            continue
        net = net.to(device).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
        found.append(Contestant(label, net, optimizer, masked_reconstruction(net, edge)))
    return found


def masked_reconstruction(net: nn.Module, edge: int) -> Callable[[Batch], Tensor]:
    """The mean square error of the hidden voxels; the scans of a pair are two scans."""

    def loss(batch: Batch) -> Tensor:
        image = batch.image if batch.partner is None else torch.cat([batch.image, batch.partner])
        sample = torch.arange(len(image), device=image.device)
        hidden = draw_mask(sample, (edge,) * 3, 4, 0.6, 0, "mask")
        output = net(image.masked_fill(hidden, 0))
        return F.mse_loss(output[hidden], image[hidden])

    return loss


def _dna(module: Any, widths: list[int]) -> nn.Module:
    return module.ResidualEncoderUNet(
        1, 6, widths, nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], [1, 3, 4, 6, 6, 6], 1, [1] * 5, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def _yucca(module: Any, widths: list[int]) -> nn.Module:
    return module.UNet(input_channels=1, num_classes=1, starting_filters=widths[0])


def _monai(module: Any, widths: list[int]) -> nn.Module:
    levels = len(widths)
    return module.DynUNet(
        3, 1, 1, kernel_size=[3] * levels, strides=[1] + [2] * (levels - 1), upsample_kernel_size=[2] * (levels - 1),
        filters=widths,
    )  # fmt: skip


PEERS: tuple[tuple[str, str, Callable[[Any, list[int]], nn.Module]], ...] = (
    ("dna", "dynamic_network_architectures.architectures.unet", _dna),
    ("yucca", "yucca.modules.networks.networks", _yucca),
    ("monai", "monai.networks.nets", _monai),
)


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reaches: matrix products in TFLOP/s, copying in GB/s."""
    found = {}
    edge = 8192 if device.type == "cuda" else 1024
    for kind in (torch.float32, torch.bfloat16):
        one = torch.randn(edge, edge, device=device).to(kind)
        found[f"matmul_tflops_{str(kind)[6:]}"] = 2e-12 * edge**3 / fastest(lambda one=one: one @ one, device)
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 8e-9 * source.numel() / fastest(lambda: target.copy_(source), device)
    return found


def fastest(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        began = clock(device)
        work()
        times.append(clock(device) - began)
    return min(times[1:])


def flops_of(one: Contestant, batch: Batch) -> float:
    """Of forward and backward of one step, counted with torch's own layers."""
    from torch.utils.flop_counter import FlopCounterMode

    cpu.swap_out(one.module)
    with FlopCounterMode(display=False) as counter:
        one.loss(batch).backward()
    if one.name == "brainfm":
        cpu.swap_in(one.module)
    one.optimizer.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def kept_mib(one: Contestant, batch: Batch, device: torch.device) -> float:
    """What a step keeps between forward and backward, weights aside; a process's peak cannot be split by contestant."""
    own = {p.untyped_storage().data_ptr() for p in one.module.parameters()}
    kept: dict[int, Tensor] = {}

    def note(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    mixed = torch.autocast(device.type, torch.bfloat16) if one.autocast else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value), mixed:
        one.loss(batch)
    return sum(value.untyped_storage().nbytes() for value in kept.values()) / 2**20


def compete(args: argparse.Namespace, name: str, edge: int, device: torch.device, most: dict[str, float]) -> list[dict]:
    absent: list[str] = []
    contestants = ours(args, name, edge, device) + (peers(name, edge, device, absent) if args.peers else [])
    if absent:
        print(json.dumps({"absent": absent}), flush=True)
    pairs = name == "unet_b"
    source = batches(args, edge, pairs, contestants[0].module.views)
    first = next(source).to(device)
    sample = Batch(**{f.name: v[:1] for f in fields(first) if (v := getattr(first, f.name)) is not None})
    flops = {one.name: len(first) * flops_of(one, sample) for one in contestants if one.name != "brainfm"}
    flops["brainfm"] = flops["plain"]
    kept = {one.name: kept_mib(one, first, device) for one in contestants} if device.type == "cpu" else {}
    for number in range(args.warmup + args.steps):
        for one in list(contestants):
            try:
                step(one, source, device)
            except torch.OutOfMemoryError:
                contestants.remove(one)
                print(json.dumps({"out_of_memory": one.name, "backbone": name, "patch": edge}), flush=True)
        if number < args.warmup:
            for one in contestants:
                one.seconds = {p: [] for p in PHASES}
    rows = []
    for one in contestants:
        split = {phase: statistics.median(values) for phase, values in one.seconds.items()}
        whole = statistics.median([sum(values) for values in zip(*one.seconds.values())])
        kind = "bfloat16" if one.autocast else "float32"
        rows.append({
            "backbone": name, "patch": edge, "batch": args.batch, "contestant": one.name, "precision": kind,
            "steps_per_s": 1 / whole, "patches_per_s": args.batch * (2 if pairs else 1) / whole,
            "tflop_a_step": flops[one.name] / 1e12, "share_of_matmul": flops[one.name] / 1e12 / whole
            / most[f"matmul_tflops_{kind}"], "seconds": split,
            "peak_mib": one.peak_mib if device.type == "cuda" else None, "kept_mib": kept.get(one.name),
            "parameters": sum(p.numel() for p in one.module.parameters()),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbones", nargs="+", default=["unet_b"])
    parser.add_argument("--patches", nargs="+", type=int, default=[64])
    parser.add_argument("--batch", type=int, default=4, help="samples a step; of cross_contrast: pairs")
    parser.add_argument("--steps", type=int, default=10, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--compile", default="auto", help="trainer.compile")
    parser.add_argument("--store", type=Path, help="read the patches from here")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    parser.add_argument("--quick", action="store_true", help="unet_b, 32 voxels, 2 pairs, 5 rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.backbones, args.patches, args.batch, args.steps, args.warmup = ["unet_b"], [32], 2, 5, 1
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
        cpu.keep_freed_memory()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    most = ceilings(device)
    about = {"device": name, "torch": torch.__version__, "commit": commit_of_code(), "threads": args.threads, **most}
    print(json.dumps(about), flush=True)
    rows = []
    for backbone in args.backbones:
        for edge in args.patches:
            rows += compete(args, backbone, edge, device, most)
            print(f"{backbone} {edge} done", flush=True)
    about["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    show(rows)
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def processor() -> str:
    """The CPU's name where Linux tells it."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def show(rows: list[dict]) -> None:
    titles = f"{'backbone':<10}{'edge':>5} {'contestant':<11}{'patches/s':>10}{'brainfm x':>10}{'matmul':>8}{'MiB':>8} "
    print(titles, *(f"{p:>9}" for p in PHASES))
    own = {(row["backbone"], row["patch"]): row["patches_per_s"] for row in rows if row["contestant"] == "brainfm"}
    for row in rows:
        ahead = own.get((row["backbone"], row["patch"]), float("nan")) / row["patches_per_s"]
        print(
            f"{row['backbone']:<10}{row['patch']:>5} {row['contestant']:<11}{row['patches_per_s']:>10.3f}{ahead:>10.2f}"
            f"{100 * row['share_of_matmul']:>7.0f}%{row['peak_mib'] or row['kept_mib']:>8.0f}  "
            + " ".join(f"{row['seconds'][p]:>9.4f}" for p in PHASES)
        )


if __name__ == "__main__":
    main()
