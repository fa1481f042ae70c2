"""Every task of FOMO25 and FOMO26 from data to a validated submission, and how long a case takes.

python scripts/evidence/submissions.py OUT --backbone FILE [--tasks fomo26_task2 ...] [--what times]

For each task: heads in the organisers' layout, `convert`, `finetune experiment=` with the task's preset (few steps, two
folds), `container build=none`, `validate` on made cases of every kind and on given ones, in the sandbox. Tasks 6 and 7:
`embed` of such heads, `container backbone= scale=`, `validate`. OUT/submissions.csv has a line a task; the same command
goes on after the last of them.

Times are those of fresh networks of the sizes unet_s and unet_b in bundles as a GPU would train them (96^3 voxels), on
a session of the task's typical size: processor seconds and wall seconds of one process with two threads, cold. The
region of task 4 is that of the fourth ventricle in 107 heads of IXI (tasks/place.py), beside which the nerve leaves the
pons.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from brainfm.cli import main as brainfm
from brainfm.imaging import nifti
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import save_backbone
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.submission.cases import KINDS, made
from brainfm.submission.challenge import ChallengeTask, names, read_challenge, task_of
from brainfm.submission.container import stage
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.volume import Volume

PEOPLE = 10
SIZES = ("unet_s", "unet_b")
# Of the fourth ventricle: mm from the middle, the back and the top of a head; widths and height of the heads.
REGION = (-38.0, 42.0, -206.0, 34.0, 126.0, -66.0, 152.0, 180.0, 206.0)
# The preset made small: few steps, and whole-head questions on a coarse grid; masks keep that of their scans.
FEW = ["folds=2", "repeats=1", "trainer.max_steps=4", "baselines=[]", "report=false", "audit=false", "trainer=cpu",
       "adapt.trial_steps=1"]  # fmt: skip
COARSE, FLAT = ["preprocess.spacing_mm=4", "task.patch_vox=[32,32,32]"], ["task.patch_vox=[32,32,16]"]
THICK, PLAIN = ((64, 80, 16), (2.8, 2.8, 7.0)), ((48, 56, 48), (3.5, 3.5, 3.5))  # shapes and spacings of the heads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", type=Path, help="a pre-trained one; without it a fresh unet_s")
    parser.add_argument("--tasks", "--task", nargs="*", help="e.g. fomo26_task2; all where none is named")
    parser.add_argument("--what", choices=["all", "submissions", "times"], default="all")
    parser.add_argument("--cases", nargs="*", default=[kind for kind in KINDS if kind != "typical"])
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    tasks = [task for name in names() for task in read_challenge(name).tasks]
    tasks = [task_of(name) for name in asked.tasks] if asked.tasks else tasks
    if asked.what != "times":
        backbone = asked.backbone or fresh(asked.out / "fresh.safetensors", "unet_s")
        for task in tasks:
            if (task.id,) not in told(asked.out / "submissions.csv", "task"):
                tell(asked.out / "submissions.csv", submission(task, asked.out / task.id, backbone, asked.cases))
    if asked.what != "submissions":
        for task, size in [(task, size) for task in tasks for size in SIZES if task.name != "task7"]:
            if (task.id, size) not in told(asked.out / "times.csv", "task", "network"):
                tell(asked.out / "times.csv", timed(task, asked.out / "times", size))


def told(file: Path, *columns: str) -> set[tuple[str, ...]]:
    """What the rows of a table hold in these columns."""
    if not file.is_file():
        return set()
    with file.open(newline="", encoding="utf-8") as handle:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(handle)}


def tell(file: Path, row: dict[str, object]) -> None:
    """One more row."""
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


# ---- submissions -----------------------------------------------------------------------------------------------------


def submission(task: ChallengeTask, folder: Path, backbone: Path, kinds: Sequence[str]) -> dict[str, object]:
    """One task from data to the validator's verdict."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    named = [f"challenge={task.challenge}", f"task={task.name}"]
    data, out = folder / "data", folder / "submission"
    given: list[str] = []
    if task.kind == "embedding":
        manifest = heads_alone(folder / "heads")
        run("prepare", f"manifest={manifest}", f"store={folder / 'store'}", "preprocess.spacing_mm=4", "workers=1")
        run("embed", f"backbone={backbone}", f"store={folder / 'store'}", f"out={folder / 'heads.npz'}", "device=cpu")
        weights = [f"backbone={backbone}", f"scale={folder / 'heads.npz'}"]
    else:
        write_data(task, data / task.folders[0] / task.folders[0])
        manifest = folder / "convert.csv"
        run("convert", *named, f"root={data}", f"out={manifest}")
        run(
            "finetune", f"experiment={task.id}", f"root={data}", f"backbone_from={backbone}", f"run={folder / 'run'}",
            *FEW, *(FLAT if task.kind == "segmentation" else COARSE),
        )  # fmt: skip
        weights = [f"bundle={folder / 'run' / 'bundle'}"]
        given = [f"given={data / task.folders[0] / task.folders[0]}", "most=2"]
    run("container", *named, *weights, f"out={out}", "build=none")
    learned = time.monotonic() - began
    code = brainfm(
        ["validate", *named, f"command={sys.executable} {out / 'app' / 'predict.py'}", f"out={folder / 'validation'}",
         f"cases=[{','.join(kinds)}]", *given, "limit_s=600"]
    )  # fmt: skip
    report = json.loads((folder / "validation" / "validation.json").read_text())
    return {
        "task": task.id, "validate": code, "passed": report["passed"], "checks": len(report["checks"]),
        "cases": len(report["seconds"]), "slowest_case_s": round(max(report["seconds"].values()), 1),
        "data_to_container_s": round(learned), "all_s": round(time.monotonic() - began),
    }  # fmt: skip


def run(*words: str) -> None:
    code = brainfm(list(words))
    if code:
        raise SystemExit(f"brainfm {' '.join(words)} ended with {code}")


def head(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...], bright: float):
    """(volume, mask): a head of two tissues and a ball on its left; how bright that is differs by answer."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in shape], indexing="ij", sparse=True)
    radius = x**2 + y**2 + z**2
    ball = (x + 0.4) ** 2 + (y - 0.1) ** 2 + (z - rng.uniform(-0.1, 0.1)) ** 2 < 0.06
    voxels = np.where(radius < 0.4, 320, 520) + 30 * np.sin(4 * x + bright) + bright * ball + rng.normal(0, 12, shape)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(shape) * np.array(spacing) / 2
    return Volume(np.where(radius < 0.8, np.clip(voxels, 1, 4000), 0).astype(np.int16), affine), ball & (radius < 0.8)


def write_data(task: ChallengeTask, root: Path) -> None:
    """``preprocessed/`` and ``labels/`` as the organisers hand them out."""
    shape, spacing = THICK if task.name in ("task1", "task2") else PLAIN
    calls = task.calls()
    for number in range(PEOPLE):
        rng = np.random.default_rng(number)
        place, labels = (root / kind / f"sub_{number + 1}" / "ses_1" for kind in ("preprocessed", "labels"))
        place.mkdir(parents=True)
        labels.mkdir(parents=True)
        positive = number % 2
        for one in calls[number % len(calls)]:
            volume, ball = head(rng, shape, spacing, 150.0 + 150 * positive)
            nifti.write(place / f"{one.file}.nii.gz", volume)
        if task.mask:
            values = ball.astype(np.uint8)
            values[:, : shape[1] // 2] *= 2 if task.high > 1 else 1
            nifti.write(labels / task.mask, Volume(values, volume.affine_mm))
        if task.answers:
            answer = positive if task.kind == "classification" else 24 + 5.75 * number
            (labels / task.answers[0]).write_text(f"{answer}\n")


def heads_alone(folder: Path) -> Path:
    """A manifest of unlabelled heads."""
    lines = ["dataset,subject,session,contrast,path"]
    for number in range(PEOPLE):
        volume, _ = head(np.random.default_rng(number), *PLAIN, 20.0 * number)
        folder.mkdir(parents=True, exist_ok=True)
        nifti.write(folder / f"{number}.nii.gz", volume)
        lines.append(f"heads,s{number},,t1,{number}.nii.gz")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


# ---- times -----------------------------------------------------------------------------------------------------------


def timed(task: ChallengeTask, folder: Path, size: str) -> dict[str, object]:
    """Import and weights, and a case of the task's typical size, of a fresh process with two threads."""
    app = folder / f"{task.id}_{size}"
    shutil.rmtree(app, ignore_errors=True)
    weights = fresh(folder / f"{size}.safetensors", size) if task.kind == "embedding" else bundle(task, folder, size)
    stage(task, weights, app)
    case = made(task, folder / "cases" / task.id, ["typical"])[0]
    inputs = [word for flag, file in case.files.items() for word in (f"--{flag}", str(file))]
    if task.kind == "embedding":
        load = f"from brainfm.probing.features import Encoder; Encoder.load({str(app / 'backbone.safetensors')!r})"
    else:
        load = f"from brainfm.tasks.bundle import load_engine; load_engine({str(app / 'bundle')!r}, 'cpu')"
    imports = "from brainfm.submission.predict import main; import brainfm.inference.predict"
    cold = seconds(app, ["-c", f"{imports}; {load}"])
    whole = seconds(app, [str(app / "predict.py"), *inputs, "--output", str(folder / f"{app.name}{task.ending}")])
    shape = "x".join(map(str, task.shape_vox))
    return {
        "task": task.id, "network": size, "scans": len(inputs) // 2, "shape": shape,
        "cold_processor_s": cold[0], "cold_wall_s": cold[1], "case_processor_s": whole[0], "case_wall_s": whole[1],
    }  # fmt: skip


def seconds(app: Path, words: Sequence[str]) -> tuple[float, float]:
    """Processor and wall seconds."""
    env = {**os.environ, "PYTHONPATH": str(app), "OMP_NUM_THREADS": "2"}
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=env)
    wall, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return round(used, 1), round(wall, 1)


def fresh(file: Path, size: str) -> Path:
    """A backbone file with fresh weights, on the grid of 1 mm."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    save_backbone(
        file, build_backbone(size), objective={"name": "none", "config": {}}, objective_state={},
        preprocess=PreprocessSpec(), patch_vox=(96, 96, 96), provenance=Provenance("0", "", ""),
    )  # fmt: skip
    return file


def bundle(task: ChallengeTask, folder: Path, size: str) -> Path:
    """A bundle with fresh weights on the grid that the preset asks for: of masks the scans' own, else 1 mm."""
    torch.manual_seed(0)
    contrasts = tuple(one.contrast for one in task.inputs)
    backbone, place = build_backbone(size), folder / f"{task.id}_{size}_bundle"
    decisions, grid = Decisions(), PreprocessSpec()
    network: torch.nn.Module
    if task.kind == "segmentation":
        grid = PreprocessSpec(spacing_mm=task.spacing_mm)
        patch = (96, 96, 96) if min(task.shape_vox) >= 96 else (192, 192, 16)
        spec = TaskSpec("segmentation", task.target, contrasts, tuple(range(int(task.high) + 1)), patch)
        network = SegmentationTask(spec, backbone)
        decisions = Decisions(region=REGION if task.name == "task4" else ())
    else:
        values = ("0", "1") if task.kind == "classification" else ()
        spec = TaskSpec(
            task.kind, task.target, contrasts, values, (96, 96, 96), mode="exclusive" if values else "", view_mm=2.0
        )
        network = WholeHeadTask(spec, backbone)
        decisions = Decisions(bias=(-50.0, 1.0)) if task.kind == "regression" else decisions
    shutil.rmtree(place, ignore_errors=True)
    write_bundle(
        place, task=spec, backbone_config={"name": size}, members=[network.state_dict()], preprocess=grid,
        provenance=Provenance("0", "", ""), decisions=decisions,
    )  # fmt: skip
    return place


if __name__ == "__main__":
    main()
