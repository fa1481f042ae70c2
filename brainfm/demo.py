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
from brainfm.imaging import nifti
from brainfm.imaging.geometry import resample
from brainfm.imaging.preprocess import prepare_session
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.nets.transfer import transfer
from brainfm.objectives.objective import Objective, build_objective
from brainfm.reports.demo import Demo, cases_of, scans_of, write_demo_page
from brainfm.scoring.folds import folds
from brainfm.scoring.intervals import crossed_bootstrap
from brainfm.scoring.masks import dice
from brainfm.synthesis.phantom import write_cohort

ARMS = {"pretrained": "pre-trained", "scratch": "from scratch"}
# What an objective's pictures are called; True: of one that decodes through skips, and draws the scan in another look.
TITLES = {
    False: {"input": "Scan", "masked": "Hidden blocks", "self": "Reconstruction", "partner": "Other scan",
            "cross": "Other's anatomy"},
    True: {"input": "Scan", "masked": "Hidden blocks", "self": "Reconstruction", "partner": "Other scan",
           "cross": "In the other's contrast"},
}  # fmt: skip


def demo(
    out: Path,
    run_verb: Callable[[list[str]], int],
    *,
    backbone: Path | None,
    seed: int,
    subjects: int,
    labelled: int,
    runs: int,
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
        backbone: file of the weights to begin with; None: some are pre-trained on the cohort itself.
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
    if backbone is None:
        run("pretrain", "pretrain", f"store={out / 'store'}", f"run={out / 'pretrain'}", "backbone=unet_s",
            "objective=cross_contrast", f"trainer.max_steps={pretrain_steps}", f"data.patch_vox={patch}",
            "optim.lr=3e-4", "trainer.evaluate_every=25", "trainer.batch_size=2", "trainer.log_every=2",
            "trainer.checkpoint_every=25", f"seed={seed}")  # fmt: skip
    weights = out / "pretrain" / "backbone.safetensors" if backbone is None else backbone
    anatomy = _anatomy(out, weights, cohort_mm, run)
    for number in range(runs):
        for arm in ARMS:
            place, source = out / arm / f"run{number}", weights if arm == "pretrained" else "none"
            run(f"finetune {arm}", "finetune", "task=segmentation", "task.target=lesion", f"store={out / 'store'}",
                f"run={place}", f"backbone_from={source}", "backbone=unet_s", f"task.patch_vox={patch}", "folds=1",
                f"trainer.max_steps={finetune_steps}", "trainer.batch_size=1", "optim.lr=1e-3",
                "adapt.decoder=false", "data.foreground_share=0.9", "trainer.evaluate_every=20",
                "trainer.checkpoint_every=40", "trainer.log_every=2", "baselines=[]", "mirror=[]",
                "clean=false", "audit=false", "report=false", f"seed={seed + number}")  # fmt: skip
            run(f"predict {arm}", "predict", f"bundle={place / 'bundle'}", f"manifest={out / 'test.csv'}",
                f"out={place / 'predictions'}")  # fmt: skip
            run(f"evaluate {arm}", "evaluate", f"predictions={place / 'predictions'}",
                f"manifest={out / 'test.csv'}", f"out={place / 'scores'}")  # fmt: skip
    seconds["in all"] = time.perf_counter() - began
    summary = _summary(out, weights, labelled, runs, seconds)
    summary["weights"] = "of the cohort itself" if backbone is None else str(backbone)
    summary["agreement"] = _agreement(anatomy)
    columns, rows = _reconstructions(out, weights)
    write_demo_page(Demo(out, ARMS, subjects, summary, commands, _curves(out, runs, backbone is None), columns, rows,
                         anatomy))  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _anatomy(out: Path, weights: Path, cohort_mm: float, run: Callable[..., None]) -> dict[str, tuple[Path, Path]]:
    """Contrast -> scan and label map of one subject, where the weights tell regions; else nothing."""
    found: dict[str, tuple[Path, Path]] = {}
    if "regions" not in load_backbone(weights).heads:
        return found
    subject, files = _shown(out)
    for contrast, file in files.items():
        labels = out / "anatomy" / contrast / f"{subject}_dseg.nii.gz"
        found[contrast] = file, labels
        run("anatomy", "anatomy", f"input.{contrast}={file}", f"out={labels}", f"backbone={weights}",
            f"spacing_mm={cohort_mm}")  # fmt: skip
    return found


def _agreement(anatomy: Mapping[str, tuple[Path, Path]]) -> dict[str, float]:
    """Contrast -> Dice, the mean over regions, of its labels with those of the first contrast, on that one's grid."""
    found: dict[str, float] = {}
    first: np.ndarray | None = None
    for contrast, (_, file) in anatomy.items():
        labels = nifti.read(file, labels=True)[0]
        if first is None:
            first, grid = labels.voxels, labels
            continue
        here = resample(labels.voxels, labels.affine_mm, grid.shape, grid.affine_mm, order="nearest", fill=0)
        found[contrast] = float(np.mean([dice(first == v, here == v) for v in np.unique(first) if v]))
    return found


def _shown(out: Path) -> tuple[str, dict[str, Path]]:
    """The first test subject and its scans."""
    manifest = read_manifest(out / "test.csv")
    subject = min(s.subject for s in manifest.scans)
    return subject, scans_of(manifest, subject)[0]


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


def _summary(out: Path, weights: Path, labelled: int, runs: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Scores over runs and test subjects together: another time both would be others."""
    scores: dict[str, dict[str, Any]] = {}
    by_run: dict[str, np.ndarray] = {}
    for arm in ARMS:
        tables = [{row["subject"]: row for row in cases_of(out / arm / f"run{n}")} for n in range(runs)]
        people = sorted(tables[0])
        for name in ("dice", "surface_dice_1mm"):
            values = np.array([[float(table[subject][name]) for subject in people] for table in tables])
            scores.setdefault(arm, {})[name] = vars(crossed_bootstrap(values, 0))
            if name == "dice":
                by_run[arm] = values
    difference = crossed_bootstrap(by_run["pretrained"] - by_run["scratch"], 0)
    loaded = load_backbone(weights)
    in_objective = sum(value.numel() for value in loaded.extra.values())
    decoder = sum(p.numel() for p in loaded.decoder.parameters()) if loaded.decoder is not None else 0
    return {
        "pretrain_parameters": sum(p.numel() for p in loaded.backbone.parameters()) + decoder + in_objective,
        "dice_pretrained": scores["pretrained"]["dice"]["mean"],
        "dice_scratch": scores["scratch"]["dice"]["mean"],
        "n_cases": by_run["scratch"].shape[1],
        "runs": runs,
        "scores": scores,
        "difference": vars(difference),
        "labelled_subjects": labelled,
        "pretrain_steps": loaded.provenance.steps,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def _curves(out: Path, runs: int, pretrained_here: bool) -> dict[str, dict[str, list[tuple[float, ...]]]]:
    """Chart -> curve -> (step, value), for charts with bands (step, mean, lowest, highest) over the runs."""
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {"pretrain": {}}
    if pretrained_here:
        rows = read_curves(out / "pretrain" / "curves.csv")
        for name in ("self", "cross", "val_self", "val_cross"):
            found["pretrain"][name] = [(step, value) for step, curve, value in rows if curve == name]
    for chart, name in (("tuned", "total"), ("dice", "held_dice")):
        found[chart] = {}
        for arm, label in ARMS.items():
            values: dict[int, list[float]] = {}
            for number in range(runs):
                for step, curve, value in read_curves(out / arm / f"run{number}" / "fold0" / "curves.csv"):
                    if curve == name:
                        values.setdefault(step, []).append(value)
            found[chart][label] = [(s, sum(v) / len(v), min(v), max(v)) for s, v in sorted(values.items())]
    return found


def _reconstructions(out: Path, weights: Path) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """What the pre-trained network makes of test subjects it never saw: column -> axial slices, and their names."""
    loaded = load_backbone(weights)
    store, manifest = Store.open(out / "store"), read_manifest(out / "test.csv")
    columns: dict[str, list[np.ndarray]] = {}
    shown = (("t1", "flair"), ("flair", "t1"), ("t2", "t1"))
    for number, subject in enumerate(sorted({s.subject for s in manifest.scans})[: len(shown)]):
        prepared = prepare_session(scans_of(manifest, subject)[0], {}, store.spec)
        a, b = (_to_whole(prepared.scans[name], loaded.backbone.strides[-1]) for name in shown[number])
        x, y, z = a.shape
        objective = _objective(loaded, (x, y, z))
        image, partner = (torch.from_numpy(volume)[None, None] for volume in (a, b))
        pictures = objective.pictures(Batch(image, torch.tensor([number]), partner, torch.tensor([True])))
        axial = {name: volume[0, 0, :, :, int(z * 0.55)].float().numpy() for name, volume in pictures.items()}
        axial["masked"] = np.where(axial["masked"] == 0, np.nan, axial["masked"])
        for name, title in TITLES[loaded.decoder is not None].items():
            if name in axial:  # not every objective reads a second scan
                columns.setdefault(title, []).append(axial[name])
    return columns, [" | ".join(name.upper() for name in pair) for pair in shown]


def _to_whole(volume: np.ndarray, edge: int) -> np.ndarray:
    """A volume with air around it up to the next multiple of an edge length."""
    missing = [-n % edge for n in volume.shape]
    return np.pad(volume, [(n // 2, n - n // 2) for n in missing], constant_values=float(volume.min()))


def _objective(loaded: LoadedBackbone, patch_vox: tuple[int, int, int]) -> Objective:
    """The question that the weights were trained with, with all that the file holds of it."""
    question = loaded.objective
    objective = build_objective(question["name"], loaded.backbone, patch_vox=patch_vox, seed=0, **question["config"])
    state = dict(loaded.extra) | {f"backbone.{name}": v for name, v in loaded.backbone.state_dict().items()}
    if loaded.decoder is not None:
        state |= {f"dense.{name}": value for name, value in loaded.decoder.state_dict().items()}
    for head, network in loaded.heads.items():
        state |= {f"heads.{head}.{name}": value for name, value in network.state_dict().items()}
    transfer(objective, state)
    return objective.eval()
