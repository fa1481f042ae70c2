"""Speed of augmentation for a batch of 4 pairs, artefact by artefact, beside TorchIO and MONAI.

    python scripts/benchmark/augment.py [--device cpu|cuda] [--edges 64 96] [--repeats 5] [--json FILE]

In the rows of single artefacts every scan gets it; `full` has the probabilities of the preset. brainfm works on the
batch on the device; the peers, where they are installed, on one sample after the other on the CPU, as in a worker of a
loader, with one thread. The methods take turns and the medians are printed, in ms a batch: of the processor, which
other work on the machine disturbs less, and of the clock with --device cuda. Strengths are alike but not equal, and an
artefact that a peer lacks is left out of its `full`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from brainfm.batch import Batch
from brainfm.data.augment import PRESETS, AugmentSpec, apply, draw

PAIRS = 4
OFF = AugmentSpec(flip=0, affine=0, intensity=0)
STILL = {"gain_factor": 1.0, "offset_std": 0.0, "gamma_power": 1.0, "noise_std": 0.0}
FULL = PRESETS["full"]
SPECS = {
    "flip": replace(OFF, flip=1),
    "affine": replace(OFF, affine=1),
    "elastic": replace(OFF, elastic=1),
    "bias": replace(OFF, bias=1),
    "blur": replace(OFF, blur=1),
    "low_res": replace(OFF, low_res=1),
    "ghost": replace(OFF, ghost=1),
    "gain+gamma+noise": replace(OFF, intensity=1),
    "full": FULL,
}
Step = Callable[[int], None]


def heads(edge: int) -> torch.Tensor:
    """[2 * PAIRS, 1, X, Y, Z] smooth random patches."""
    coarse = torch.randn(2 * PAIRS, 1, edge // 8, edge // 8, edge // 8, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(edge,) * 3, mode="trilinear")


def ours(scans: torch.Tensor, device: str) -> dict[str, Step]:
    scans = scans.to(device)

    def step_of(spec: AugmentSpec) -> Step:
        def step(repeat: int) -> None:
            numbers = torch.arange(repeat * PAIRS, (repeat + 1) * PAIRS)  # the loader's, read before they are moved
            batch = Batch(scans[:PAIRS], numbers, partner=scans[PAIRS:])
            apply(batch, draw(batch, spec, 0))
            if device == "cuda":
                torch.cuda.synchronize()

        return step

    return {name: step_of(spec) for name, spec in SPECS.items()}


def torchio(scans: torch.Tensor) -> dict[str, Step]:
    import torchio as tio

    def of(p: dict[str, float]) -> list:
        made = {
            "flip": lambda q: tio.RandomFlip(axes=0, flip_probability=q),
            "affine": lambda q: tio.RandomAffine(scales=0.15, degrees=15, default_pad_value="minimum", p=q),
            "elastic": lambda q: tio.RandomElasticDeformation(7, 4, p=q),
            "bias": lambda q: tio.RandomBiasField(p=q),
            "blur": lambda q: tio.RandomBlur((0, 1), p=q),
            "low_res": lambda q: tio.RandomAnisotropy(downsampling=(1.5, 4), p=q),
            "ghost": lambda q: tio.RandomGhosting((2, 4), p=q),
            "gamma": lambda q: tio.RandomGamma(p=q),
            "noise": lambda q: tio.RandomNoise(std=(0, 0.15), p=q),
        }
        return [made[name](q) for name, q in p.items()]

    def step_of(p: dict[str, float]) -> Step:
        space = tio.Compose(of({k: q for k, q in p.items() if k in ("flip", "affine", "elastic")}))
        intensity = tio.Compose(of({k: q for k, q in p.items() if k not in ("flip", "affine", "elastic")}))

        def step(_: int) -> None:
            for a, b in zip(scans[:PAIRS], scans[PAIRS:]):
                pair = tio.Subject(a=tio.ScalarImage(tensor=a), b=tio.ScalarImage(tensor=b))
                pair = space(pair) if len(space.transforms) else pair
                for name in ("a", "b"):  # drawn for each scan
                    if len(intensity.transforms):
                        intensity(pair[name])

        return step

    return {name: step_of(p) for name, p in probabilities(("gamma", "noise")).items()}


def probabilities(intensity: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """row -> transform -> probability, for the peers."""
    single = ("flip", "affine", "elastic", "bias", "blur", "low_res", "ghost")
    full = {name: getattr(FULL, name) for name in single} | dict.fromkeys(intensity, FULL.intensity)
    rows = {name: {name: 1.0} for name in single}
    return rows | {"gain+gamma+noise": dict.fromkeys(intensity, 1.0), "full": full}


def monai(scans: torch.Tensor) -> dict[str, Step]:
    from monai import transforms as mt

    def of(name: str, q: float) -> list:
        turn = (0.26,) * 3
        both, each = ["a", "b"], (["a"], ["b"])
        if name == "ghost":  # MONAI has none
            return []
        if name == "flip":
            return [mt.RandFlipd(both, q, 0)]
        if name == "affine":
            return [mt.RandAffined(both, prob=q, rotate_range=turn, scale_range=(0.15,) * 3, padding_mode="border")]
        if name == "elastic":
            return [mt.Rand3DElasticd(both, (5, 7), (50, 150), prob=q, padding_mode="border")]
        made = {
            "bias": lambda keys: mt.RandBiasFieldd(keys, coeff_range=(0, 0.3), prob=q),
            "blur": lambda keys: mt.RandGaussianSmoothd(keys, (0, 1), (0, 1), (0, 1), prob=q),
            "low_res": lambda keys: mt.RandSimulateLowResolutiond(keys, prob=q, zoom_range=(0.5, 1)),
            "gain": lambda keys: mt.RandScaleIntensityd(keys, 0.25, prob=q),
            "gamma": lambda keys: mt.RandAdjustContrastd(keys, q, (0.7, 1.5)),
            "noise": lambda keys: mt.RandRicianNoised(keys, q, std=0.15),
        }
        return [made[name](keys) for keys in each]

    def step_of(p: dict[str, float]) -> Step:
        transform = mt.Compose([t for name, q in p.items() for t in of(name, q)])

        def step(_: int) -> None:
            for a, b in zip(scans[:PAIRS], scans[PAIRS:]):
                transform({"a": a.clone(), "b": b.clone()})

        return step

    rows = probabilities(("gain", "gamma", "noise"))
    return {name: step_of(p) for name, p in rows.items() if name != "ghost"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--edges", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # TorchIO resamples with SimpleITK
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    found: dict[str, dict[str, dict[str, float]]] = {}
    for edge in args.edges:
        scans = heads(edge)
        methods = {f"brainfm ({args.device})": ours(scans, args.device)}
        methods |= {
            name: build(scans)
            for name, build in (("torchio", torchio), ("monai", monai))
            if importlib.util.find_spec(name) is not None
        }
        print(f"4 pairs of {edge}^3, ms a batch\n{'':18}" + "".join(f"{name:>16}" for name in methods), flush=True)
        for row in SPECS:
            times: dict[str, list[float]] = {name: [] for name, rows in methods.items() if row in rows}
            for repeat in range(-1, args.repeats * (3 if row == "full" else 1)):  # the first is to warm up
                for name, kept in times.items():
                    began = clock()
                    methods[name][row](repeat + 1)
                    if repeat >= 0:
                        kept.append(1000 * (clock() - began))
            # The time of `full` depends on what is drawn, so its mean counts.
            middle = statistics.mean if row == "full" else statistics.median
            found.setdefault(str(edge), {})[row] = {name: middle(kept) for name, kept in times.items()}
            cells = (f"{found[str(edge)][row][name]:16.1f}" if name in times else f"{'-':>16}" for name in methods)
            print(f"{row:18}" + "".join(cells), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
