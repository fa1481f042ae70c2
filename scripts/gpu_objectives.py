"""Step time, memory and projected hours of whole experiments on the GPU at hand, in one call.

    python scripts/gpu_objectives.py --json gpu.json                        # fomo25, ssl3d, dense_split: minutes
    python scripts/gpu_objectives.py --experiments fomo25 --ways eager      # one of them, one way

Experiments are read from configs/experiment/ (absent ones are named and skipped) and composed as `brainfm pretrain
experiment=NAME trainer=gpu` does, but without hydra; batches are noise from memory, so that no store, nibabel or blosc2
is needed. A step is: batch to the device, augmentation where the experiment has one, loss with masks and noise drawn
for new sample numbers, gradient, clipping, AdamW. Reading patches is not in it: see scripts/benchmark/loader.py. Ways:

    gpu         compiled, weights in channels-last order: what trainer=gpu asks for
    contiguous  compiled, contiguous weights
    eager       neither

A step that does not fit is tried with half of the batch. Without a GPU the same is done with a network and patches for
tests, on the CPU: the figures then mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from brainfm.batch import Batch
from brainfm.data.augment import apply, augment_spec, draw
from brainfm.errors import BrainfmError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.objective import Objective, make_objective
from brainfm.settings import build, plain
from brainfm.specs import ViewSpec
from brainfm.training.optim import build_optimizer
from brainfm.training.run import optim_values
from brainfm.training.settings import PretrainSettings
from brainfm.training.speed import quicken, settled
from brainfm.verbs.compose import chosen, configs, start

WAYS: dict[str, dict[str, Any]] = {
    "gpu": {},
    "contiguous": {"channels_last": False},
    "eager": {"channels_last": False, "compile": None},
    "cpu": {},
}
# What the data would fill in: the groups and regions of a DLMUSE map.
FROM_DATA = {"groups": 8, "volumes": 101}
TINY = {
    "objective": {"latent_channels": 20},
    "data": {"patch_vox": [32, 32, 32]},
    "trainer": {"batch_size": 2, "precision": "32-true"},
}


class _Yaml(yaml.SafeLoader):
    """PyYAML takes 1e-4 for a word; hydra, and experiments, mean a number."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def composed(experiment: str, trainer: str) -> PretrainSettings:
    """The settings of ``brainfm pretrain experiment=...``: the options of groups, then the experiment's own values."""
    own = yaml.load((configs() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8"), _Yaml)
    named = {key.split("/")[-1]: value for entry in own.pop("defaults", []) for key, value in entry.items()}
    values = start(PretrainSettings, chosen(PretrainSettings, named | {"trainer": trainer}))
    return build(PretrainSettings, merged(values, own) | {"store": "-", "run": "-"})


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def tiny(settings: PretrainSettings) -> PretrainSettings:
    """Of the changes those that the experiment has a key for."""
    config = plain(settings)
    fitting = {group: {k: v for k, v in values.items() if k in config[group]} for group, values in TINY.items()}
    return build(PretrainSettings, merged(config, fitting) | {"backbone": {"name": "unet_tiny"}})


def batches(views: ViewSpec, size: int, pinned: bool) -> Iterator[Batch]:
    """Noise with all that an objective may ask for; the sample numbers go on, so that masks are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    shape = views.patch_vox

    def scan() -> torch.Tensor:
        return torch.randn(size, 1, *shape, generator=generator).half()

    groups = FROM_DATA["groups"]
    lesion = torch.zeros(size, *shape, dtype=torch.int8)
    lesion[: size // 2, : shape[0] // 4] = 1
    start = 0
    fixed = Batch(
        image=scan(),
        sample=torch.arange(size),
        partner=scan() if views.pairs else None,
        paired=torch.ones(size, dtype=torch.bool) if views.pairs else None,
        same_contrast=torch.zeros(size, dtype=torch.bool) if views.pairs else None,
        subject=torch.arange(size),
        regions=torch.randint(0, groups, (size, *shape), generator=generator) if views.regions else None,
        volumes=torch.randn(size, FROM_DATA["volumes"], generator=generator) if views.volumes else None,
        pathology=(torch.arange(size) % 2).float() if views.lesions else None,
        lesion=lesion if views.lesions else None,
    )
    if pinned:
        fixed = fixed.pin_memory()
    while True:
        fixed.sample.copy_(torch.arange(start, start + size))
        yield fixed
        start += size


class Trial:
    """One experiment computed in one way."""

    def __init__(self, settings: PretrainSettings, way: str, batch_size: int, device: torch.device) -> None:
        trainer = settled(replace(settings.trainer, **WAYS[way]))
        question: Any = settings.objective
        question = replace(question, **{k: count for k, count in FROM_DATA.items() if getattr(question, k, 0) is None})
        torch.manual_seed(0)
        backbone = build_backbone(**settings.backbone)
        self.objective: Objective = make_objective(question, backbone, patch_vox=settings.data.patch_vox, seed=0)
        self.objective.to(device).train()
        quicken(self.objective, trainer)
        self.optimizer = build_optimizer(self.objective, **optim_values(settings.optim))
        self.augment = augment_spec(settings.data.augment)
        self.precision, self.clip_norm = trainer.precision, trainer.clip_norm
        self.device = device
        self.source = batches(self.objective.views, batch_size, pinned=device.type == "cuda")
        self.parameters = sum(p.numel() for p in self.objective.parameters())

    def step(self) -> None:
        batch = next(self.source).to(self.device)
        if self.augment is not None:
            batch = apply(batch, draw(batch, self.augment, 0))
        mixed = self.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else nullcontext():
            loss = self.objective(batch, 0.5).total
        loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), self.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()


def finish(device: torch.device) -> float:
    """The time when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(trial: Trial, seconds: float, device: torch.device) -> dict[str, Any]:
    """Rounds of steps, as many as fit into ``seconds``, three at least."""
    began = finish(device)
    trial.step()
    first = finish(device) - began
    trial.step()
    trial.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, rounds, size = finish(device), [], 5 if device.type == "cuda" else 1
    while len(rounds) < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        for _ in range(size):
            trial.step()
        rounds.append((finish(device) - began) / size)
    if not torch.isfinite(trial.loss):
        raise FloatingPointError(f"the loss is {float(trial.loss)} after {3 + size * len(rounds)} steps")
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 1024 * _most_kib()
    return {
        "seconds_a_step": statistics.median(rounds), "slowest": max(rounds), "steps": size * len(rounds),
        "first_step_s": first, "peak_gib": peak / 2**30,
    }  # fmt: skip


def _most_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tried(settings: PretrainSettings, name: str, way: str, seconds: float, device: torch.device) -> dict[str, Any]:
    """A row of the table; the batch is halved until a step fits."""
    size, max_steps = settings.trainer.batch_size, settings.trainer.max_steps
    row: dict[str, Any] = {"experiment": name, "way": way, "backbone": settings.backbone["name"],
                           "patch_vox": list(settings.data.patch_vox), "max_steps": max_steps}  # fmt: skip
    while True:
        trial = None
        try:
            trial = Trial(settings, way, size, device)
            found = measured(trial, seconds, device)
            hours = found["seconds_a_step"] * max_steps / 3600
            return row | {"batch": size, "parameters": trial.parameters, "precision": trial.precision, "hours": hours,
                          "samples_a_s": size / found["seconds_a_step"]} | found  # fmt: skip
        except torch.OutOfMemoryError:
            row["out_of_memory_at"] = size
            if size == 1:
                return row | {"fault": "one sample does not fit"}
            size //= 2
        except (BrainfmError, FloatingPointError, RuntimeError, AttributeError, TypeError) as error:
            return row | {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        finally:
            del trial
            gc.collect()
            if device.type == "cuda":
                torch._dynamo.reset()
                torch.cuda.empty_cache()


def show(row: Mapping[str, Any]) -> str:
    head = f"{row['experiment']:<14}{row['way']:<12}"
    if "fault" in row:
        return head + row["fault"]
    fit = f"  (batch {row['out_of_memory_at']} did not fit)" if "out_of_memory_at" in row else ""
    return head + (
        f"{row['batch']:>5}{1000 * row['seconds_a_step']:>11.1f}{row['samples_a_s']:>10.2f}{row['peak_gib']:>8.2f}"
        f"{row['first_step_s']:>9.1f}{row['max_steps']:>9}{row['hours']:>8.1f}{fit}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", default=["fomo25", "dense_split", "ssl3d"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS)[:3], default=list(WAYS)[:3])
    parser.add_argument("--seconds", type=float, default=15.0, help="of measuring, a row")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no further row is begun")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device, began = torch.device(args.device), time.perf_counter()
    gpu = device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU, tiny",
        "torch": torch.__version__,
        "memory_gib": torch.cuda.mem_get_info()[1] / 2**30 if gpu else None,
    }
    print(json.dumps(about), flush=True)
    print(f"{'experiment':<14}{'way':<12}batch ms a step samples/s     GiB  first s    steps   hours", flush=True)
    rows = []
    for way in args.ways if gpu else ["cpu"]:  # every experiment in the first way, before any in the second
        for name in args.experiments:
            if not (configs() / "experiment" / f"{name}.yaml").is_file():
                row = {"experiment": name, "way": way, "fault": "skipped: no such file in configs/experiment"}
            elif time.perf_counter() - began > args.limit:
                row = {"experiment": name, "way": way, "fault": f"skipped: {args.limit:g} s are over"}
            else:
                settings = composed(name, "gpu" if gpu else "cpu")
                row = tried(settings if gpu else tiny(settings), name, way, args.seconds if gpu else 0.0, device)
            rows.append(row)
            print(show(row), flush=True)
            if args.json:
                args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 1 if any("fault" in row and "skipped" not in row["fault"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
