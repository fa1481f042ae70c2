"""The demo: a cohort whose truth is known, taken through every verb, and a page about it.

It calls the same verbs a user types; each of them skips what is already there, so an interrupted demo goes on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.batch import Batch
from brainfm.curves import read_curves
from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.data.store import Store
from brainfm.errors import TrainingError
from brainfm.imaging.preprocess import prepare_session
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.transfer import transfer
from brainfm.objectives.objective import build_objective
from brainfm.reports.demo import Demo, cases_of, scans_of, write_demo_page
from brainfm.scoring.folds import folds
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.synthesis.phantom import write_cohort

ARMS = {"pretrained": "pre-trained", "scratch": "from scratch"}


def demo(
    out: Path,
    run_verb: Callable[[list[str]], int],
    *,
    seed: int,
    subjects: int,
    labelled: int,
    cohort_mm: float,
    spacing_mm: float,
    patch_vox: tuple[int, int, int],
    pretrain_steps: int,
    finetune_steps: int,
    workers: int,
) -> dict[str, Any]:
    """Runs the demo and returns what it writes to ``summary.json``.

    Args:
        out: folder of all that is made.
        run_verb: runs one command line and returns its exit code.
        seed, ...: see verbs/demo.py.

    Raises:
        TrainingError: where a verb failed (it has said why) or the run was interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    commands: list[str] = []
    seconds: dict[str, float] = {}

    def run(name: str, *words: str) -> None:
        print(f"\n$ brainfm {' '.join(words)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        code = run_verb(list(words))
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        commands.append("brainfm " + " ".join(words))
        if code != 0:
            raise TrainingError(f"the demo stopped: `brainfm {' '.join(words)}` ended with {code}")

    began = time.perf_counter()
    cohort = out / "cohort"
    if not (cohort / "dataset_description.json").exists():  # written last
        write_cohort(cohort, subjects, seed, float(cohort_mm))
    seconds["cohort"] = time.perf_counter() - began
    processes = f"workers={workers}"
    run("manifest", "manifest", f"root={cohort}", f"out={out / 'all.csv'}", "masks.lesion=*lesion_mask*")
    run("doctor", "doctor", f"manifest={out / 'all.csv'}", processes)
    _split(read_manifest(out / "all.csv"), out, labelled, seed)
    run("prepare", "prepare", f"manifest={out / 'train.csv'}", f"store={out / 'store'}",
        f"preprocess.spacing_mm={spacing_mm}", processes)  # fmt: skip
    patch = f"[{','.join(map(str, patch_vox))}]"
    run("pretrain", "pretrain", f"store={out / 'store'}", f"run={out / 'pretrain'}", "backbone=unet_b",
        "objective=cross_contrast", f"trainer.max_steps={pretrain_steps}", f"data.patch_vox={patch}",
        "optim.lr=3e-4", "trainer.evaluate_every=25", "trainer.batch_size=2", "trainer.log_every=2",
        "trainer.checkpoint_every=25",
        f"seed={seed}")  # fmt: skip
    for arm in ARMS:
        source = out / "pretrain" / "backbone.safetensors" if arm == "pretrained" else "none"
        run(f"finetune {arm}", "finetune", "task=segmentation", "task.target=lesion", f"store={out / 'store'}",
            f"run={out / arm}", f"backbone_from={source}", "backbone=unet_b", f"task.patch_vox={patch}", "folds=1",
            f"trainer.max_steps={finetune_steps}", "trainer.batch_size=1", "optim.lr=1e-3",
            "data.foreground_share=0.9", "trainer.evaluate_every=40", "trainer.checkpoint_every=40",
            "trainer.log_every=2", "baselines=[]", "mirror=[]", "clean=false", "audit=false", "report=false",
            f"seed={seed}")  # fmt: skip
        run(f"predict {arm}", "predict", f"bundle={out / arm / 'bundle'}", f"manifest={out / 'test.csv'}",
            f"out={out / arm / 'predictions'}")  # fmt: skip
        run(f"evaluate {arm}", "evaluate", f"predictions={out / arm / 'predictions'}",
            f"manifest={out / 'test.csv'}", f"out={out / arm / 'scores'}")  # fmt: skip
    seconds["in all"] = time.perf_counter() - began
    summary = _summary(out, labelled, seconds)
    columns, rows = _reconstructions(out)
    write_demo_page(Demo(out, ARMS, subjects, summary, commands, _curves(out), columns, rows))
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _split(manifest: Manifest, out: Path, labelled: int, seed: int) -> None:
    """``train.csv`` and ``test.csv``, by subject; in train.csv only ``labelled`` subjects keep their masks."""
    subjects = sorted({f"{s.dataset}/{s.subject}" for s in manifest.scans})
    fifths = folds(subjects, 5, seed)
    test = {subject for fifth in fifths[:2] for subject in fifth}
    outlined = set([subject for fifth in fifths[2:] for subject in sorted(fifth)][:labelled])
    sides: dict[str, list[Scan]] = {"train": [], "test": []}
    for scan in manifest.scans:
        key = f"{scan.dataset}/{scan.subject}"
        if key not in test and key not in outlined:
            scan = replace(scan, columns={**scan.columns, "lesion_mask": ""})
        sides["test" if key in test else "train"].append(scan)
    for name, scans in sides.items():
        write_manifest(out / f"{name}.csv", scans)


def _summary(out: Path, labelled: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    scores = {arm: json.loads((out / arm / "scores" / "summary.json").read_text())["metrics"] for arm in ARMS}
    rows = {arm: {row["subject"]: float(row["dice"]) for row in cases_of(out / arm)} for arm in ARMS}
    pairs = np.array([rows["pretrained"][s] - rows["scratch"][s] for s in rows["scratch"]])
    difference = bootstrap(mean_score, pairs, pairs, groups=list(rows["scratch"]), seed=0)
    loaded = load_backbone(out / "pretrain" / "backbone.safetensors")
    in_objective = sum(value.numel() for value in loaded.extra.values())
    return {
        "pretrain_parameters": sum(p.numel() for p in loaded.backbone.parameters()) + in_objective,
        "dice_pretrained": scores["pretrained"]["dice"]["mean"],
        "dice_scratch": scores["scratch"]["dice"]["mean"],
        "n_cases": len(rows["scratch"]),
        "scores": scores,
        "difference": vars(difference),
        "labelled_subjects": labelled,
        "pretrain_steps": loaded.provenance.steps,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def _curves(out: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Chart -> curve -> (step, value) pairs."""

    def of(run: Path, *names: str) -> dict[str, list[tuple[float, float]]]:
        rows = read_curves(run / "curves.csv")
        return {name: [(step, value) for step, found, value in rows if found == name] for name in names}

    return {
        "pretrain": of(out / "pretrain", "self", "cross", "val_self", "val_cross"),
        "tuned": {label: of(out / arm / "fold0", "total")["total"] for arm, label in ARMS.items()},
        "dice": {label: of(out / arm / "fold0", "held_dice")["held_dice"] for arm, label in ARMS.items()},
    }


def _reconstructions(out: Path) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """What the pre-trained network makes of test subjects it never saw: column -> axial slices, and their names."""
    loaded = load_backbone(out / "pretrain" / "backbone.safetensors")
    store, manifest = Store.open(out / "store"), read_manifest(out / "test.csv")
    question = loaded.objective
    stride = loaded.backbone.strides[-1]
    columns: dict[str, list[np.ndarray]] = {}
    shown = (("t1", "flair"), ("flair", "t1"), ("t2", "t1"))
    for number, subject in enumerate(sorted({s.subject for s in manifest.scans})[: len(shown)]):
        prepared = prepare_session(scans_of(manifest, subject)[0], {}, store.spec)
        a, b = (prepared.scans[name] for name in shown[number])
        inner = tuple(slice((n % stride) // 2, (n % stride) // 2 + n - n % stride) for n in a.shape)
        image, partner = (torch.from_numpy(np.ascontiguousarray(v[inner]))[None, None] for v in (a, b))
        x, y, z = image.shape[2:]
        objective = build_objective(
            question["name"], loaded.backbone, patch_vox=(x, y, z), seed=0, **question["config"]
        ).eval()
        transfer(objective, {**loaded.extra, **{f"backbone.{k}": v for k, v in loaded.backbone.state_dict().items()}})
        pictures = objective.pictures(Batch(image, torch.tensor([number]), partner, torch.tensor([True])))
        axial = {name: volume[0, 0, :, :, int(z * 0.55)].float().numpy() for name, volume in pictures.items()}
        axial["masked"] = np.where(axial["masked"] == 0, np.nan, axial["masked"])
        titles = {"input": "Scan", "masked": "Hidden blocks", "self": "Reconstruction", "partner": "Other scan",
                  "cross": "Other's anatomy"}  # fmt: skip
        for name, title in titles.items():
            columns.setdefault(title, []).append(axial[name])
    return columns, [" | ".join(name.upper() for name in pair) for pair in shown]
