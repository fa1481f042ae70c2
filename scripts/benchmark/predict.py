"""Speed of `brainfm predict` of a 1 mm case with four contrasts, from NIfTI files to the mask, in its own process.

    python scripts/benchmark/predict.py                                     # a phantom; minutes on two cores
    python scripts/benchmark/predict.py --case t1=T1.nii.gz t1c=T1C.nii.gz t2=T2.nii.gz flair=FLAIR.nii.gz
    python scripts/benchmark/predict.py --overlaps 0.5 0.25 --patches 64 96 --repeats 3

The network has its real size; its weights were never trained, because time and memory do not depend on them. Each round
takes every setting once, in turn: the table shows the fastest and the median. Memory is the largest resident set of the
process, processor time that of all its threads. For POSIX systems.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from brainfm.imaging import nifti
from brainfm.nets.backbone import build_backbone
from brainfm.specs import PreprocessSpec, Provenance, TaskSpec
from brainfm.synthesis.phantom import write_cohort
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.training.run import commit_of_code
from brainfm.volume import Volume

GOAL_S, GOAL_GB = 60, 3


@dataclass(frozen=True)
class Cost:
    seconds: float
    processor_s: float
    peak_gb: float


def phantom(folder: Path) -> dict[str, Path]:
    """T1, T2 and FLAIR of a synthetic head, and a fourth contrast mixed from the first two."""
    write_cohort(folder, 1, seed=0, spacing_mm=1.0)
    found = {name: next(folder.rglob(f"*_{end}.nii.gz")) for name, end in (("t1", "T1w"), ("t2", "T2w"))}
    t1, t2 = (nifti.read(path)[0] for path in found.values())
    mixed = np.clip(t1.voxels * 0.7 + t2.voxels * 0.3, 0, 32767).astype(np.int16)
    nifti.write(folder / "mixed.nii.gz", Volume(mixed, t1.affine_mm), "RAS")
    return {**found, "flair": next(folder.rglob("*_FLAIR.nii.gz")), "t1c": folder / "mixed.nii.gz"}


def untrained_bundle(folder: Path, backbone: str, contrasts: tuple[str, ...], patch: int, members: int) -> Path:
    task = TaskSpec("segmentation", "lesion", contrasts, (0, 1), (patch,) * 3)
    states = []
    for seed in range(members):
        torch.manual_seed(seed)
        network = SegmentationTask(task, build_backbone(backbone))
        torch.nn.init.zeros_(network.decoder.out.bias)  # else it says background everywhere: nothing to write
        states.append(network.state_dict())
    write_bundle(
        folder, task=task, backbone_config={"name": backbone}, members=states, preprocess=PreprocessSpec(),
        provenance=Provenance("benchmark", "", ""),
    )  # fmt: skip
    return folder


def predict(bundle: Path, files: dict[str, Path], out: Path, overlap: float, threads: int) -> Cost:
    """Runs the command and waits for it. Raises: RuntimeError where it fails."""
    inputs = [f"input.{contrast}={path}" for contrast, path in files.items()]
    command = [
        sys.executable, "-m", "brainfm.cli", "predict", f"bundle={bundle}", *inputs, f"out={out}", "device=cpu",
        f"overlap={overlap}",
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"predict ended with {process.returncode}")
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return Cost(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", metavar="CONTRAST=FILE", help="files in place of a phantom")
    parser.add_argument("--backbone", default="unet_b")
    parser.add_argument("--patches", nargs="+", type=int, default=[96])
    parser.add_argument("--overlaps", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--members", type=int, default=1, help="networks of the bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = {contrast: Path(path) for contrast, path in (pair.split("=", 1) for pair in args.case or [])}
        files = given or phantom(folder / "case")
        shapes = {contrast: list(nifti.read_header(path).grid.ras_shape()) for contrast, path in files.items()}
        bundles = {
            patch: untrained_bundle(folder / f"bundle{patch}", args.backbone, tuple(files), patch, args.members)
            for patch in args.patches
        }
        settings = [(patch, overlap) for patch in args.patches for overlap in args.overlaps]
        costs: dict[tuple[int, float], list[Cost]] = {setting: [] for setting in settings}
        for _ in range(args.repeats):
            for patch, overlap in settings:
                out = folder / "mask.nii.gz"
                costs[patch, overlap].append(predict(bundles[patch], files, out, overlap, args.threads))
    rows = [
        {
            "patch": patch, "overlap": overlap, "fastest_s": min(c.seconds for c in found),
            "median_s": statistics.median(c.seconds for c in found),
            "processor_s": statistics.median(c.processor_s for c in found), "peak_gb": max(c.peak_gb for c in found),
        }
        for (patch, overlap), found in costs.items()
    ]  # fmt: skip
    about = {
        "backbone": args.backbone, "members": args.members, "threads": args.threads, "torch": torch.__version__,
        "commit": commit_of_code(), "shapes": shapes,
    }  # fmt: skip
    print(json.dumps(about))
    print(f"{'patch':>6}{'overlap':>9}{'fastest':>10}{'median':>9}{'processor':>11}{'peak':>9}")
    for row in rows:
        print(
            f"{row['patch']:>6}{row['overlap']:>9.2f}{row['fastest_s']:>8.1f} s{row['median_s']:>7.1f} s"
            f"{row['processor_s']:>9.1f} s{row['peak_gb']:>6.2f} GB"
            f"   {'meets' if row['median_s'] <= GOAL_S and row['peak_gb'] <= GOAL_GB else 'misses'} "
            f"the goal of {GOAL_S} s and {GOAL_GB} GB"
        )
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
