"""The demo: a cohort whose truth is known, taken through every verb, and a report about it.

It calls the same verbs a user types; each of them skips what is already there, so an interrupted demo goes on.
"""

from __future__ import annotations

import csv
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
from brainfm.inference import report
from brainfm.inference.predict import LISTING
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.transfer import transfer
from brainfm.objectives.objective import build_objective
from brainfm.scoring.folds import folds
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.synthesis.phantom import write_cohort

ARMS = {"pretrained": "pre-trained", "scratch": "from scratch"}


def demo(config: Mapping[str, Any], run_verb: Callable[[list[str]], int]) -> dict[str, Any]:
    """Runs the demo and returns what it writes to ``summary.json``.

    Args:
        config: configs/demo.yaml.
        run_verb: runs one command line and returns its exit code.

    Raises:
        TrainingError: where a verb failed (it has said why) or the run was interrupted.
    """
    out = Path(config["out"])
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
        write_cohort(cohort, int(config["subjects"]), int(config["seed"]), float(config["cohort_mm"]))
    seconds["cohort"] = time.perf_counter() - began
    workers = f"workers={config['workers']}"
    run("manifest", "manifest", f"root={cohort}", f"out={out / 'all.csv'}", "masks.lesion=*lesion_mask*")
    run("doctor", "doctor", f"manifest={out / 'all.csv'}", workers)
    _split(read_manifest(out / "all.csv"), out, int(config["labelled"]), int(config["seed"]))
    run("prepare", "prepare", f"manifest={out / 'train.csv'}", f"store={out / 'store'}",
        f"preprocess.spacing_mm={config['spacing_mm']}", workers)  # fmt: skip
    patch = f"[{','.join(map(str, config['patch_vox']))}]"
    run("pretrain", "pretrain", f"store={out / 'store'}", f"run={out / 'pretrain'}", "backbone=unet_b",
        "objective=cross_contrast", f"trainer.max_steps={config['pretrain_steps']}", f"data.patch_vox={patch}",
        "optim.lr=3e-4", "trainer.evaluate_every=25", "trainer.batch_size=2", "trainer.log_every=2",
        "trainer.checkpoint_every=25",
        f"seed={config['seed']}")  # fmt: skip
    for arm in ARMS:
        source = out / "pretrain" / "backbone.safetensors" if arm == "pretrained" else "none"
        run(f"finetune {arm}", "finetune", "task=segmentation", "task.target=lesion", f"store={out / 'store'}",
            f"run={out / arm}", f"backbone_from={source}", "backbone=unet_b", f"task.patch_vox={patch}", "folds=1",
            f"trainer.max_steps={config['finetune_steps']}", "trainer.batch_size=1", "optim.lr=1e-3",
            "data.foreground_share=0.9", "trainer.evaluate_every=40", "trainer.checkpoint_every=40",
            "trainer.log_every=2", "baselines=[]", "mirror=[]", "clean=false", "audit=false", "report=false",
            f"seed={config['seed']}")  # fmt: skip
        run(f"predict {arm}", "predict", f"bundle={out / arm / 'bundle'}", f"manifest={out / 'test.csv'}",
            f"out={out / arm / 'predictions'}")  # fmt: skip
        run(f"evaluate {arm}", "evaluate", f"predictions={out / arm / 'predictions'}",
            f"manifest={out / 'test.csv'}", f"out={out / arm / 'scores'}")  # fmt: skip
    seconds["in all"] = time.perf_counter() - began
    summary = _summary(out, config, seconds)
    _report(out, config, summary, commands)
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


def _cases(out: Path, arm: str) -> list[dict[str, str]]:
    with (out / arm / "scores" / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _summary(out: Path, config: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    scores = {arm: json.loads((out / arm / "scores" / "summary.json").read_text())["metrics"] for arm in ARMS}
    rows = {arm: {row["subject"]: float(row["dice"]) for row in _cases(out, arm)} for arm in ARMS}
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
        "labelled_subjects": int(config["labelled"]),
        "pretrain_steps": loaded.provenance.steps,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def _report(out: Path, config: Mapping[str, Any], summary: Mapping[str, Any], commands: list[str]) -> None:
    better, worse = summary["difference"]["low"] > 0, summary["difference"]["high"] < 0
    verdict = (
        "The interval of the paired difference lies above 0: pre-training helped here." if better
        else "The interval of the paired difference lies below 0: pre-training hurt here." if worse
        else "The interval of the paired difference holds 0: a run this short does not show a difference either way."
    )  # fmt: skip
    report.write_report(
        out / "report.html",
        title="brainfm demo",
        lead=f"{config['subjects']} synthetic people with T1, T2 and FLAIR scans, most of them with lesions, taken "
        "from NIfTI files to a pre-trained network, a fine-tuned lesion segmenter, and masks on the original scans.",
        sections=[
            _cohort_section(out, config),
            _curves_section(out),
            _reconstruction_section(out),
            _lesion_section(out),
            _comparison_section(summary, verdict),
            report.Section(
                "How it was made",
                "Each line is a command that any user can type.\n\n"
                + "\n\n".join(f"`{command}`" for command in commands),
            ),
        ],
        command=f"brainfm demo out={config['out']}",
        numbers=[
            (f"{summary['pretrain_parameters'] / 1e6:.1f} M", "parameters in pre-training"),
            (f"{summary['dice_pretrained']:.3f}", "Dice, pre-trained"),
            (f"{summary['dice_scratch']:.3f}", "Dice, from scratch"),
            (f"{summary['n_cases']}", "test subjects"),
            (f"{summary['seconds']['in all'] / 60:.1f} min", f"on {summary['threads']} CPU threads"),
        ],
    )


def _scans_of(manifest: Manifest, subject: str) -> tuple[dict[str, Path], Path]:
    scans = [s for s in manifest.scans if s.subject == subject]
    return {s.contrast: manifest.resolve(s.path) for s in scans}, manifest.resolve(scans[0].columns["lesion_mask"])


def _cohort_section(out: Path, config: Mapping[str, Any]) -> report.Section:
    manifest = read_manifest(out / "test.csv")
    store = Store.open(out / "store")
    shown = []
    for subject in sorted({s.subject for s in manifest.scans})[:5]:
        files, mask = _scans_of(manifest, subject)
        prepared = prepare_session(files, {"lesion_mask": mask}, store.spec)
        shown.append((f"subject {subject}", prepared.scans, prepared.labels["lesion_mask"]))
    return report.Section(
        "The cohort",
        f"{config['subjects']} subjects: smooth random deformations of the ICBM152 tissue maps, tissue contrasts, "
        "lesions, noise, bias field and slice thickness drawn per subject; files in several orientations. Below are "
        "prepared scans of test subjects, all contrasts of a subject on one grid, with the true lesions outlined.",
        figures=((f"Test subjects at {config['spacing_mm']} mm", report.cohort_figure(shown, store.spec.spacing_mm)),),
    )


def _curves_section(out: Path) -> report.Section:
    def of(run: Path, *names: str) -> dict[str, list[tuple[float, float]]]:
        rows = read_curves(run / "curves.csv")
        return {name: [(step, value) for step, found, value in rows if found == name] for name in names}

    tuned = {label: of(out / arm / "fold0", "total")["total"] for arm, label in ARMS.items()}
    dice = {label: of(out / arm / "fold0", "held_dice")["held_dice"] for arm, label in ARMS.items()}
    return report.Section(
        "Learning",
        "Pre-training never sees a label. Fine-tuning sees the same cases in the same order with and without it.",
        figures=(
            ("Pre-training: self and cross-reconstruction, smooth L1",
             report.curves_figure(of(out / "pretrain", "self", "cross", "val_self", "val_cross"))),
            ("Fine-tuning: Dice + cross-entropy on training patches", report.curves_figure(tuned)),
            ("Fine-tuning: Dice of the held-out labelled subjects", report.curves_figure(dice, y_label="Dice")),
        ),
    )  # fmt: skip


def _reconstruction_section(out: Path) -> report.Section:
    """What the pre-trained network makes of test subjects it never saw."""
    loaded = load_backbone(out / "pretrain" / "backbone.safetensors")
    store, manifest = Store.open(out / "store"), read_manifest(out / "test.csv")
    question = loaded.objective
    stride = loaded.backbone.strides[-1]
    columns: dict[str, list[np.ndarray]] = {}
    for number, subject in enumerate(sorted({s.subject for s in manifest.scans})[:3]):
        prepared = prepare_session(_scans_of(manifest, subject)[0], {}, store.spec)
        a, b = (prepared.scans[name] for name in (("t1", "flair"), ("flair", "t1"), ("t2", "t1"))[number])
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
    spacing = store.spec.spacing_mm
    figure = report.reconstruction_figure(columns, ("T1 | FLAIR", "FLAIR | T1", "T2 | T1"), (spacing[0], spacing[1]))
    return report.Section(
        "What the network understood",
        "Test subjects, never seen in pre-training. The reconstruction is made from the scan's own codes; the last "
        "column joins the anatomy code of the other scan with the contrast code of the scan. There are no skip "
        "connections: all passes one voxel of code for 16 x 16 x 16 voxels of scan, and after a run this "
        "short the answer is little more than the mean of the head; runs that are worth their name take hours.",
        figures=(("Axial slices through whole heads", figure),),
    )


def _lesion_section(out: Path) -> report.Section:
    manifest = read_manifest(out / "test.csv")
    rows = sorted((float(r["dice"]), r["subject"]) for r in _cases(out, "pretrained") if float(r["volume_ml_true"]) > 0)
    with (out / "pretrained" / "predictions" / LISTING).open(newline="") as file:
        masks = {row["subject"]: row["file"] for row in csv.DictReader(file)}
    figures = []
    for name, (score, subject) in (("Worst", rows[0]), ("Median", rows[len(rows) // 2]), ("Best", rows[-1])):
        files, mask = _scans_of(manifest, subject)
        flair, truth = nifti.read(files["flair"])[0], nifti.read(mask, labels=True)[0]
        image = resample(flair.voxels, flair.affine_mm, truth.shape, truth.affine_mm, order="linear", fill=0.0)
        answer = nifti.read(out / "pretrained" / "predictions" / masks[subject], labels=True)[0]
        figures.append((
            f"{name} of {len(rows)} test subjects with lesions: subject {subject}, Dice {score:.3f}, on the FLAIR",
            report.overlay_figure(image, truth.voxels, answer.voxels, spacing_mm=truth.spacing_mm),
        ))  # fmt: skip
    return report.Section(
        "Lesions",
        "Outlines on the grid of the file that came in, as `brainfm predict` wrote them.",
        figures=tuple(figures),
    )


def _comparison_section(summary: Mapping[str, Any], verdict: str) -> report.Section:
    table = [("", "Dice", "95 % interval", "Surface Dice at 1 mm", "95 % interval", "n")]
    bars = []
    for arm, label in ARMS.items():
        dice, surface = (summary["scores"][arm][name] for name in ("dice", "surface_dice_1mm"))
        table.append((label, f"{dice['mean']:.3f}", f"{dice['low']:.3f} to {dice['high']:.3f}",
                      f"{surface['mean']:.3f}", f"{surface['low']:.3f} to {surface['high']:.3f}",
                      str(dice["n"])))  # fmt: skip
        bars.append((label, dice["mean"], dice["low"], dice["high"], dice["n"]))
    d = summary["difference"]
    table.append(
        ("difference, paired", f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}", "", "", str(d["n"]))
    )
    return report.Section(
        "Pre-trained against scratch",
        f"Both arms: {summary['labelled_subjects']} labelled subjects, the same patches, steps and schedule; the "
        f"network pre-trained for {summary['pretrain_steps']} steps or fresh. {verdict} One run "
        "with one seed; synthetic lesions say nothing about any clinical task.",
        figures=(("Test subjects, mean and bootstrap interval", report.interval_figure(bars)),),
        table=tuple(table),
    )
