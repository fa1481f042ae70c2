"""Evidence of fine-tuning: whether pre-training helps; learning curves on real scans, from scratch and from backbones.

Every start sees the same subjects, patches, steps and held-out cases; scores are those of held-out cases, with 95 %
intervals by subject, and starts are compared pairwise with the same network from fresh weights.

    python scripts/evidence/finetuning.py --ixi manifest.csv --hippocampus msd_hippocampus --out evidence \\
        --start cross_contrast=runs/cross/backbone.safetensors --start anatomy=runs/anatomy/backbone.safetensors

Questions (choose some with --questions):
    age, sex       one answer a head, IXI T1 at 2 mm
    tissues        CSF, grey and white matter, IXI T1 at 2 mm, of --tissue-subjects people
    hippocampus    MSD task 4, at 1 mm
--ixi is a manifest with T1 scans, columns age, sex and dseg_labels (a DLMUSE parcellation). With --only the scores are
those of the subjects named in a file, e.g. those that pre-training never saw. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm.data.manifest import Scan, write_manifest
from brainfm.data.schemes import guess_scheme, to_groups
from brainfm.scoring.intervals import bootstrap, mean_score, paired_bootstrap, paired_permutation
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import kind_of
from brainfm.tasks.whole_head.scores import answer_score

QUESTIONS: dict[str, dict[str, Any]] = {
    "age": {"store": "ixi", "words": ["task=regression", "task.target=age"], "shots": "[10,20,50,all]", "folds": 3},
    "sex": {"store": "ixi", "words": ["task=classification", "task.target=sex"], "shots": "[10,20,50]", "folds": 2},
    "tissues": {"store": "tissues", "words": ["task=segmentation", "task.target=tissues"], "shots": "[1,5,10]",
                "folds": 2},
    "hippocampus": {"store": "hippocampus", "words": ["task=segmentation", "task.target=hippocampus"],
                    "shots": "[5,10,40]", "folds": 3},
}  # fmt: skip
PATCH = {"ixi": "[32,48,48]", "tissues": "[48,48,48]", "hippocampus": "[32,48,32]"}
SCRATCH = "scratch"


def run_verb(*words: str, log: Path | None = None) -> None:
    with open(log, "a") if log else open("/dev/null", "w") as file:
        done = subprocess.run([sys.executable, "-m", "brainfm.cli", *words], stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"brainfm {' '.join(words)} ended with {done.returncode}; see {log}")


# ---- stores ----------------------------------------------------------------------------------------------------------


def make_stores(args: argparse.Namespace) -> None:
    out = args.out / "manifests"
    out.mkdir(parents=True, exist_ok=True)
    if {"age", "sex"} & set(args.questions):
        ixi(args.ixi, out / "ixi.csv", None, out)
    if "tissues" in args.questions:
        ixi(args.ixi, out / "tissues.csv", args.tissue_subjects, out)
    if "hippocampus" in args.questions:
        hippocampus(args.hippocampus, out / "hippocampus.csv", out)
    for question in args.questions:
        name = QUESTIONS[question]["store"]
        spacing = 1 if name == "hippocampus" else 2
        run_verb("prepare", f"manifest={out / f'{name}.csv'}", f"store={args.out / name}",
                 f"preprocess.spacing_mm={spacing}", "preprocess.labels=nearest",
                 log=args.out / "prepare.log")  # fmt: skip


def ixi(manifest: Path, to: Path, most: int | None, out: Path) -> None:
    """T1 scans of a manifest with age, sex and a DLMUSE map; with ``most``, the first so many, with their tissues."""
    with manifest.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["contrast"] == "t1" and r["age"]]
    scans = []
    for row in rows[:most]:
        columns = {"age": row["age"], "sex": row["sex"]}
        if most is not None:
            columns = {"tissues_labels": str(tissues_of(manifest.parent / row["dseg_labels"], row["subject"], out))}
        scans.append(Scan("ixi", row["subject"], "", "t1", str((manifest.parent / row["path"]).resolve()), columns))
    write_manifest(to, scans)


def tissues_of(labels: Path, subject: str, out: Path) -> Path:
    """The parcellation as the tissues of data/schemes.py."""
    path = out.resolve() / "tissues" / f"{subject}.nii.gz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        image = nib.load(labels)
        ids = np.asarray(image.dataobj).astype(np.int64)
        tissues = to_groups(ids, guess_scheme(np.unique(ids)), str(labels), level="tissues")
        nib.save(nib.Nifti1Image(np.maximum(tissues, 0).astype(np.uint8), image.affine), path)
    return path


def hippocampus(folder: Path, to: Path, out: Path) -> None:
    scans = []
    for image in sorted((folder / "imagesTr").glob("*.nii.gz")):
        columns = {"hippocampus_labels": str((folder / "labelsTr" / image.name).resolve())}
        scans.append(Scan("msd", image.name.split(".")[0], "", "t1", str(image.resolve()), columns))
    write_manifest(to, scans)


# ---- runs ------------------------------------------------------------------------------------------------------------


def finetune(args: argparse.Namespace, question: str, start: str, source: str) -> Path:
    asked = QUESTIONS[question]
    run = args.out / "runs" / f"{question}_{start}"
    run.parent.mkdir(exist_ok=True)
    steps = args.steps if asked["store"] == "ixi" else args.dense_steps
    baselines = "[random_linear,features]" if start == SCRATCH and asked["store"] == "ixi" else "[]"
    batch = 4 if asked["store"] == "ixi" else 2
    lr = args.scan_lr if asked["store"] == "ixi" else args.lr
    run_verb(
        "finetune", *asked["words"], f"store={args.out / asked['store']}", f"run={run}", f"backbone_from={source}",
        f"backbone={args.backbone}", "protocol=fewshot", f"task.shots={asked['shots']}", f"folds={asked['folds']}",
        f"task.patch_vox={PATCH[asked['store']]}", f"trainer.max_steps={steps}", f"trainer.batch_size={batch}",
        "trainer=cpu", f"trainer.threads={args.threads}", "trainer.workers=0", "trainer.checkpoint_every=0",
        f"optim.lr={lr}", f"baselines={baselines}", "audit=false", "report=false", "mirror=[]", "clean=false",
        "data.augment={flip: 0, affine: 0.3, rotate_deg: 10, scale: 0.0, intensity: 0.3}", f"seed={args.seed}",
        log=args.out / "runs" / f"{question}_{start}.log",
    )  # fmt: skip
    return run


def rows_of(run: Path, shots: str, only: set[str] | None) -> list[dict[str, Any]]:
    """The held-out rows of one point of a learning curve."""
    folder = run if shots == "all" else run / "shots" / shots
    rows = [row for file in sorted(folder.glob("fold*/held.json")) for row in json.loads(file.read_text())]
    return sorted((r for r in rows if only is None or r["subject"] in only), key=lambda row: row["subject"])


def scored(spec: TaskSpec, rows: Sequence[dict[str, Any]]) -> tuple[Any, np.ndarray, np.ndarray]:
    """(metric, truth, answers) of rows; of a segmentation the cases' Dice."""
    if spec.kind == "segmentation":
        values = np.array([row["variants"][0]["dice"] for row in rows])
        return mean_score, values, values
    truth = np.array([row["truth"][0] for row in rows])
    raw = np.array([row["raw"] for row in rows])
    return (
        answer_score(spec, kind_of(spec.kind).primary(spec)[0]),
        truth,
        raw[:, 0] if spec.kind == "regression" else raw,
    )


def table(args: argparse.Namespace, question: str, starts: Sequence[str]) -> list[str]:
    runs = {start: args.out / "runs" / f"{question}_{start}" for start in starts}
    document = json.loads((runs[SCRATCH] / "results.json").read_text())
    spec = TaskSpec.from_dict(document["task"])
    name, larger = kind_of(spec.kind).primary(spec)
    lines = [f"### {question}: {name}, {'larger' if larger else 'smaller'} is better", "",
             "| training subjects | " + " | ".join(starts) + " | " + " | ".join(
                 f"{s} - {SCRATCH} (p)" for s in starts if s != SCRATCH) + " | n |",
             "|" + "---|" * (2 * len(starts) + 1)]  # fmt: skip
    shots = QUESTIONS[question]["shots"].strip("[]").split(",")
    only = None if args.only is None else set(args.only.read_text().split())
    for number in shots:
        found = {start: rows_of(run, number, only) for start, run in runs.items()}
        groups = [row["subject"] for row in found[SCRATCH]]
        cells, differences = [], []
        base = scored(spec, found[SCRATCH])
        for start in starts:
            metric, truth, given = scored(spec, found[start])
            if [row["subject"] for row in found[start]] != groups:
                raise SystemExit(f"{question}: {start} and {SCRATCH} were not scored on the same cases")
            i = bootstrap(metric, truth, given, groups=groups, seed=0)
            cells.append(f"{i.mean:.3f} [{i.low:.3f}, {i.high:.3f}]")
            if start != SCRATCH:
                d = paired_bootstrap(metric, truth, given, base[2], groups=groups, seed=0)
                p = paired_permutation(metric, truth, given, base[2], groups=groups, seed=0)
                differences.append(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] ({p:.3f})")
        lines.append(f"| {number} | " + " | ".join(cells + differences) + f" | {len(groups)} |")
    for point in document["learning_curve"]["points"]:
        others = {n: s for n, s in point["scores"].items() if n != "model"}
        if others and only is None:
            said = ", ".join(f"{n} {s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for n, s in others.items())
            lines.append(f"\nwith {point['shots'] or 'all'}: {said}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ixi", type=Path, help="a manifest")
    parser.add_argument("--hippocampus", type=Path, help="the folder of MSD task 4")
    parser.add_argument("--only", type=Path, help="a file with a subject a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=list(QUESTIONS))
    parser.add_argument("--backbone", default="unet")
    parser.add_argument("--steps", type=int, default=30, help="of age and sex")
    parser.add_argument("--scan-lr", type=float, default=3e-4, help="of age and sex")
    parser.add_argument("--dense-steps", type=int, default=120, help="of the segmentations")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--tissue-subjects", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    starts = {SCRATCH: "none"} | dict(word.split("=", 1) for word in args.start)
    if not args.tables_only:
        make_stores(args)
        for question in args.questions:
            for start, source in starts.items():
                finetune(args, question, start, source)
    for question in args.questions:
        print("\n".join(table(args, question, list(starts))) + "\n", flush=True)


if __name__ == "__main__":
    main()
