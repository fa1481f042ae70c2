"""Speed of a fine-tuning step, from cases to new weights, beside MONAI's and nnU-Net's ordinary pipelines in one run.

    python scripts/benchmark/finetune.py                                    # unet_b, 64 voxels, 2 patches; minutes
    python scripts/benchmark/finetune.py --contrasts t1 t2 flair --peers monai
    PYTHONPATH=. OTHER_ENVIRONMENT/bin/python scripts/benchmark/finetune.py # one where nnunetv2 is installed as well

Each round takes every contestant once, in turn: what else the machine does falls on all. A step is: patches of labelled
phantoms, augmentation, forward, loss, gradient, clipping, optimiser; all in one process, so that nothing runs beside it
unseen. Contestants, all with the backbone's widths and in float32:

    brainfm     as `brainfm finetune` computes it: blosc2 store, augmentation of the batch, Dice and cross-entropy,
                AdamW
    monai       CacheDataset in memory, RandCropByPosNegLabel, flip, affine and intensities as often and as strong as
                brainfm's, DiceCELoss, AdamW, DynUNet
    monai-same  the same pipeline with brainfm's own network in torch's own layers: equal to the last parameter
    nnunet      PlainConvUNet with deep supervision, nnUNetTrainer's training transforms, loss, clipping and SGD; its
                patches are cut out of memory, which is less work than its own loader's

A network of M contrasts sees them one by one in brainfm, as channels in the peers': with more than one contrast brainfm
computes more (column TFLOP), which is the price of a network that takes any set of them. Contestants that are not
installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.batch import Batch
from brainfm.data.augment import apply, augment_spec, draw
from brainfm.data.layouts import find
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.manifest import read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.nets import cpu
from brainfm.nets.backbone import build_backbone
from brainfm.specs import PreprocessSpec, TaskSpec
from brainfm.synthesis.phantom import write_cohort
from brainfm.tasks.segmentation.cases import LabelledCase, TaskPatches, find_cases, whole_case
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.training.optim import build_optimizer
from brainfm.training.run import commit_of_code
from brainfm.verbs.compose import resolve

PHASES = ("data", "network", "optimiser")  # network: forward, loss and gradient
VALUES = (0, 1)


@dataclass
class Contestant:
    """``batch`` gives what ``loss`` takes; the loss is differentiated with respect to ``module``."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Callable[[], Any]
    loss: Callable[[Any], Tensor]
    clip: float = 1.0
    seconds: list[list[float]] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def phantoms(folder: Path, subjects: int) -> Store:
    write_cohort(folder / "cohort", subjects, seed=0, spacing_mm=1.0)
    scans = find(folder / "cohort", masks={"lesion": "*lesion_mask*"}).scans
    write_manifest(folder / "manifest.csv", scans)
    prepare(read_manifest(folder / "manifest.csv"), folder / "store", PreprocessSpec(), 2)
    return Store.open(folder / "store")


def brainfm(args: argparse.Namespace, store: Store, cases: list[LabelledCase]) -> Contestant:
    settings = resolve("finetune", ["store=none", "run=none", "backbone_from=none", "task.target=lesion"])
    patches = TaskPatches(store, cases, VALUES, (args.patch,) * 3, 0, settings.data.foreground_share)
    augment = augment_spec(settings.data.augment)
    assert augment is not None
    batches = iter(make_loader(patches, StepSampler(0, 10**6, args.batch), workers=0))
    task = cpu.swap_in(network(args))
    optimizer = build_optimizer(task, lr=5e-4, weight_decay=3e-5)

    def batch() -> Batch:
        plain = next(batches).to(torch.device("cpu"))
        return apply(plain, draw(plain, augment, 0))

    def loss(batch: Batch) -> Tensor:
        return task.loss(task(batch.image, batch.present), batch).total

    return Contestant("brainfm", task, optimizer, batch, loss)


def network(args: argparse.Namespace) -> SegmentationTask:
    torch.manual_seed(0)
    spec = TaskSpec("segmentation", "lesion", tuple(args.contrasts), VALUES, (args.patch,) * 3)
    return SegmentationTask(spec, build_backbone(args.backbone)).train()


def monai(args: argparse.Namespace, store: Store, cases: list[LabelledCase]) -> list[Contestant]:
    from monai.data import CacheDataset, DataLoader
    from monai.losses import DiceCELoss
    from monai.networks.nets import DynUNet
    from monai.transforms import (
        Compose,
        EnsureTyped,
        RandAdjustContrastd,
        RandAffined,
        RandCropByPosNegLabeld,
        RandFlipd,
        RandGaussianNoised,
        RandScaleIntensityd,
        RandShiftIntensityd,
    )

    names, edge = ["image", "label"], (args.patch,) * 3
    turn = (np.pi / 12,) * 3
    steps = Compose([
        EnsureTyped(names),
        RandCropByPosNegLabeld(names, "label", edge, pos=1, neg=1, num_samples=1),
        RandFlipd(names, prob=0.5, spatial_axis=0),
        RandAffined(names, prob=0.3, rotate_range=turn, scale_range=(0.15,) * 3, mode=("bilinear", "nearest"),
                    padding_mode="border"),
        RandScaleIntensityd("image", factors=0.25, prob=0.3),
        RandShiftIntensityd("image", offsets=0.2, prob=0.3),
        RandAdjustContrastd("image", prob=0.3, gamma=(1 / 1.5, 1.5)),
        RandGaussianNoised("image", prob=0.3, std=0.15),
    ])  # fmt: skip
    items = [{"image": image, "label": label[None]} for image, label in volumes(store, cases)]
    dataset = CacheDataset(items, steps, progress=False)

    def endless() -> Iterator[Any]:
        while True:
            yield from DataLoader(dataset, batch_size=args.batch, shuffle=True, num_workers=0, drop_last=True)

    batches, criterion = endless(), DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    widths = build_backbone(args.backbone).widths
    levels = len(widths)
    theirs = DynUNet(
        3, len(args.contrasts), len(VALUES), kernel_size=[3] * levels, strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1), filters=widths,
    ).train()  # fmt: skip
    same = network(args)
    there = torch.ones(args.batch, len(args.contrasts), dtype=torch.bool)
    found = []
    for name, module in (("monai", theirs), ("monai-same", same)):

        def loss(batch: Any, module: nn.Module = module) -> Tensor:
            image = batch["image"].as_tensor()
            output = module(image) if module is theirs else module(image, there)
            return criterion(output, batch["label"].as_tensor())

        optimizer = torch.optim.AdamW(module.parameters(), lr=5e-4, weight_decay=3e-5)
        found.append(Contestant(name, module, optimizer, lambda: next(batches), loss))
    return found


def nnunet(args: argparse.Namespace, store: Store, cases: list[LabelledCase]) -> list[Contestant]:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    widths = list(build_backbone(args.backbone).widths)
    levels, edge = len(widths), (args.patch,) * 3
    module = PlainConvUNet(
        len(args.contrasts), levels, widths, nn.Conv3d, 3, [1] + [2] * (levels - 1), 2, len(VALUES), 2, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True}, deep_supervision=True,
    ).train()  # fmt: skip
    scales = [[1 / 2**level] * 3 for level in range(levels - 1)]
    turn = (-np.pi / 6, np.pi / 6)
    transforms = nnUNetTrainer.get_training_transforms(
        np.array(edge), turn, scales, (0, 1, 2), False, use_mask_for_norm=[False] * len(args.contrasts)
    )
    larger = np.array([int(n) for n in get_patch_size(edge, turn, turn, turn, (0.85, 1.25))])
    weights = np.array([1 / 2**level for level in range(levels - 1)])
    weights[-1] = 0
    plain = DC_and_CE_loss(
        {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, weight_ce=1, weight_dice=1,
        dice_class=MemoryEfficientSoftDiceLoss,
    )  # fmt: skip
    criterion = DeepSupervisionWrapper(plain, weights / weights.sum())
    rng = np.random.default_rng(0)
    grown = []
    for image, label in volumes(store, cases):
        room = [(max(0, n - s + 1) // 2,) * 2 for n, s in zip(larger, label.shape)]
        grown.append((np.pad(image, [(0, 0), *room]), np.pad(label, room)[None].astype(np.int16)))

    def batch() -> tuple[Tensor, list[Tensor]]:
        images, targets = [], []
        for number in range(args.batch):
            image, label = grown[rng.integers(len(grown))]
            lesion = np.argwhere(label[0] > 0)
            centred = number >= round(args.batch * (1 - 0.33)) and len(lesion)  # as its loader oversamples
            middle = lesion[rng.integers(len(lesion))] if centred else rng.integers(0, label.shape[1:])
            corner = np.clip(middle - larger // 2, 0, np.array(label.shape[1:]) - larger)
            cut = (slice(None), *(slice(c, c + n) for c, n in zip(corner, larger)))
            done = transforms(
                image=torch.from_numpy(image[cut].copy()), segmentation=torch.from_numpy(label[cut].copy())
            )
            images.append(done["image"])
            targets.append(done["segmentation"])
        return torch.stack(images), [torch.stack([t[level] for t in targets]) for level in range(levels - 1)]

    optimizer = torch.optim.SGD(module.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)

    def loss(batch: tuple[Tensor, list[Tensor]]) -> Tensor:
        return criterion(module(batch[0]), batch[1])

    return [Contestant("nnunet", module, optimizer, batch, loss, clip=12.0)]


def volumes(store: Store, cases: list[LabelledCase]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for case in cases:
        image, _, label = whole_case(store, case, VALUES)
        yield image, label.astype(np.uint8)


def step(one: Contestant) -> None:
    used = time.process_time()
    marks = [time.perf_counter()]
    batch = one.batch()
    marks.append(time.perf_counter())
    one.optimizer.zero_grad(set_to_none=True)
    one.loss(batch).backward()
    marks.append(time.perf_counter())
    nn.utils.clip_grad_norm_(one.module.parameters(), one.clip)
    one.optimizer.step()
    marks.append(time.perf_counter())
    one.processor.append(time.process_time() - used)
    one.seconds.append([end - begin for begin, end in pairwise(marks)])


def tflop(one: Contestant) -> float:
    """Of forward and gradient of one step, counted with torch's own layers."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = one.batch()
    cpu.swap_out(one.module)
    with FlopCounterMode(display=False) as counter:
        one.loss(batch).backward()
    if one.name == "brainfm":
        cpu.swap_in(one.module)
    return counter.get_total_flops() / 1e12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="of labelled cases (target lesion); default: phantoms at 1 mm")
    parser.add_argument("--backbone", default="unet_b")
    parser.add_argument("--contrasts", nargs="+", default=["t1"])
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="rounds that count")
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", nargs="*", default=["monai", "nnunet"], choices=("monai", "nnunet"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        store = Store.open(args.store) if args.store else phantoms(Path(name), 4)
        cases = find_cases(store, args.contrasts, "lesion")[0]
        contestants, absent = [brainfm(args, store, cases)], []
        for peer, build in (("monai", monai), ("nnunet", nnunet)):
            if peer in args.peers:
                try:
                    contestants += build(args, store, cases)
                except ImportError as error:
                    absent.append(f"{peer}: {error}")
        work = {one.name: tflop(one) for one in contestants}
        for number in range(args.warmup + args.steps):
            for one in contestants:
                step(one)
                if number < args.warmup:
                    one.seconds.clear()
                    one.processor.clear()
    about = {
        "backbone": args.backbone, "contrasts": args.contrasts, "patch": args.patch, "batch": args.batch,
        "threads": args.threads, "rounds": args.steps, "torch": torch.__version__, "commit": commit_of_code(),
        "absent": absent, "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    print(json.dumps(about))
    rows = []
    for one in contestants:
        pairs = zip(one.seconds, contestants[0].seconds)
        rows.append({
            "contestant": one.name, "seconds": statistics.median(map(sum, one.seconds)),
            "processor_s": statistics.median(one.processor),
            "of_brainfm": statistics.median(sum(theirs) / sum(ours) for theirs, ours in pairs),
            "of_brainfm_processor": statistics.median(
                theirs / ours for theirs, ours in zip(one.processor, contestants[0].processor)
            ),
            "phases": {p: statistics.median(split) for p, split in zip(PHASES, zip(*one.seconds))},
            "tflop": work[one.name], "parameters": sum(p.numel() for p in one.module.parameters()),
        })  # fmt: skip
    print(f"{'':<12}{'s a step':>9}{'times':>7}{'proc. s':>9}{'times':>7}", *(f"{p:>10}" for p in PHASES), end="")
    print(f"{'TFLOP':>8}{'parameters':>13}")
    for row in rows:
        print(
            f"{row['contestant']:<12}{row['seconds']:>9.2f}{row['of_brainfm']:>7.2f}{row['processor_s']:>9.2f}"
            f"{row['of_brainfm_processor']:>7.2f}",
            *(f"{row['phases'][p]:>10.3f}" for p in PHASES),
            f"{row['tflop']:>7.2f}{row['parameters']:>13,}",
        )
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
