"""The page of the demo: its cohort, how training went, lesions found and missed, and what pre-training did for it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import Manifest, read_manifest
from brainfm.data.store import Store
from brainfm.imaging import nifti
from brainfm.imaging.geometry import resample
from brainfm.imaging.preprocess import prepare_session
from brainfm.reports import charts, pictures
from brainfm.reports.page import Section, write_page
from brainfm.tasks.answers import LISTING


@dataclass(frozen=True)
class Demo:
    """A finished demo.

    Attributes:
        out: its folder, with the manifest of the test subjects, the store, and a folder for each arm.
        arms: folder -> its name for readers; the arm that was pre-trained is the first.
        subjects: of the cohort.
        summary: what summary.json holds.
        commands: that were run, in order.
        curves: chart -> curve -> points: of ``pretrain`` (step, value), empty where weights were given; of ``tuned``
            and ``dice`` (step, mean, lowest, highest) over the runs.
        reconstructions: column -> a slice [X, Y] for each of `reconstruction_rows`.
        anatomy: contrast -> scan of the first test subject and its label map; empty for weights without a head for
            regions.
    """

    out: Path
    arms: Mapping[str, str]
    subjects: int
    summary: Mapping[str, Any]
    commands: Sequence[str]
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, ...]]]]
    reconstructions: Mapping[str, Sequence[np.ndarray]]
    reconstruction_rows: Sequence[str]
    anatomy: Mapping[str, tuple[Path, Path]]

    @property
    def first_run(self) -> Path:
        """Of the arm that was pre-trained."""
        return self.out / next(iter(self.arms)) / "run0"


def write_demo_page(demo: Demo) -> Path:
    """Writes ``report.html`` into the demo's folder and returns it. Raises: OSError where it cannot be written."""
    summary, commands = demo.summary, "\n\n".join(f"`{command}`" for command in demo.commands)
    store, manifest = Store.open(demo.out / "store"), read_manifest(demo.out / "test.csv")
    path = demo.out / "report.html"
    write_page(
        path,
        title="brainfm demo",
        lead=f"{demo.subjects} synthetic people with T1, T2 and FLAIR scans, most of them with lesions, taken "
        "from NIfTI files to a network that knows heads, a fine-tuned lesion segmenter, and masks on the original "
        "scans.",
        sections=[
            _cohort(demo, store, manifest),
            _reconstructions(demo, store.spec.spacing_mm),
            *([_anatomy(demo)] if demo.anatomy else []),
            _learning(demo),
            _lesions(demo.first_run, manifest),
            _comparison(demo),
            Section("How it was made", f"Each line is a command that any user can type.\n\n{commands}"),
        ],
        command=f"brainfm demo out={demo.out}",
        numbers=[
            (f"{summary['pretrain_parameters'] / 1e6:.1f} M", "parameters in pre-training"),
            (f"{summary['dice_pretrained']:.3f}", "Dice, pre-trained"),
            (f"{summary['dice_scratch']:.3f}", "Dice, from scratch"),
            (f"{summary['n_cases']}", "test subjects"),
            (f"{summary['seconds']['in all'] / 60:.1f} min", f"on {summary['threads']} CPU threads"),
        ],
    )
    return path


def scans_of(manifest: Manifest, subject: str) -> tuple[dict[str, Path], Path]:
    """A subject's file by contrast, and the file of its lesion mask."""
    scans = [s for s in manifest.scans if s.subject == subject]
    return {s.contrast: manifest.resolve(s.path) for s in scans}, manifest.resolve(scans[0].columns["lesion_mask"])


def cases_of(arm: Path) -> list[dict[str, str]]:
    """The rows of cases.csv of an arm's folder."""
    with (arm / "scores" / "cases.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _cohort(demo: Demo, store: Store, manifest: Manifest) -> Section:
    shown = []
    for subject in sorted({s.subject for s in manifest.scans})[:5]:
        files, mask = scans_of(manifest, subject)
        prepared = prepare_session(files, {"lesion_mask": mask}, store.spec)
        shown.append((f"subject {subject}", prepared.scans, prepared.labels["lesion_mask"]))
    spacing_mm = store.spec.spacing_mm
    return Section(
        "The cohort",
        f"{demo.subjects} subjects: smooth random deformations of the ICBM152 tissue maps, tissue contrasts, "
        "lesions, noise, bias field and slice thickness drawn per subject; files in several orientations. Below are "
        "prepared scans of test subjects, all contrasts of a subject on one grid, with the true lesions outlined.",
        figures=((f"Test subjects at {spacing_mm[0]:g} mm", pictures.cohort_figure(shown, spacing_mm)),),
    )


def _reconstructions(demo: Demo, spacing_mm: tuple[float, float, float]) -> Section:
    """What the pre-trained network makes of test subjects it never saw."""
    figure = pictures.reconstruction_figure(
        demo.reconstructions, demo.reconstruction_rows, (spacing_mm[0], spacing_mm[1])
    )
    steps = demo.summary["pretrain_steps"]
    if demo.curves["pretrain"]:
        return Section(
            "What the network understood",
            f"Pre-trained here, for {steps} steps and without a label. Test subjects, never seen: the reconstruction "
            "is made from the scan's own codes; the last column joins the anatomy code of the other scan with the "
            "contrast code of the scan. After a run this short the answer is little more than the mean of the head; "
            "runs that are worth their name take hours.",
            figures=(
                ("Axial slices through whole heads", figure),
                ("Self and cross-reconstruction, smooth L1", charts.curves_figure(_pairs(demo.curves["pretrain"]))),
            ),
        )
    return Section(
        "What the weights know before any label",
        f"The weights, {demo.summary['weights']}, were pre-trained for {steps} steps on other heads: nothing of this "
        "cohort was shown to them. The reconstruction is made with blocks hidden; the last column is the scan's own "
        "anatomy in the contrast of the other scan, of which the network got no more than a dozen numbers.",
        figures=(("Axial slices through whole heads", figure),),
    )


def _pairs(curves: Mapping[str, Sequence[tuple[float, ...]]]) -> dict[str, list[tuple[float, float]]]:
    return {name: [(point[0], point[1]) for point in points] for name, points in curves.items()}


def _anatomy(demo: Demo) -> Section:
    """Regions of one person from each contrast by itself, and how far the answers agree."""
    contrasts = list(demo.anatomy)
    grid = nifti.read(demo.anatomy[contrasts[0]][0])[0]
    rows, labels = [], []
    for name, (file, answer) in demo.anatomy.items():
        scan, found = nifti.read(file)[0], nifti.read(answer, labels=True)[0]
        to = (grid.shape, grid.affine_mm)
        rows.append((name.upper(), resample(scan.voxels, scan.affine_mm, *to, order="linear", fill=0.0)))
        labels.append(resample(found.voxels, found.affine_mm, *to, order="nearest", fill=0))
    table = [("", *(name.upper() for name in contrasts[1:]))]
    agreement = demo.summary["agreement"]
    table.append((f"agreement with the {contrasts[0].upper()}, Dice", *(f"{agreement[n]:.3f}" for n in contrasts[1:])))
    return Section(
        "Anatomy in every contrast",
        "The scans of one test subject, each labelled by itself with `brainfm anatomy`, without a label from this "
        "cohort. The table says how far the regions agree with those from the "
        f"{contrasts[0].upper()}, their mean; that is no proof that they are right.",
        figures=(("Regions, outlined", pictures.slices_figure(rows, contours=labels, spacing_mm=grid.spacing_mm)),),
        table=tuple(table),
    )


def _learning(demo: Demo) -> Section:
    runs = demo.summary["runs"]
    return Section(
        "Learning from few labels",
        f"{demo.summary['labelled_subjects']} labelled subjects, {runs} runs of each arm; both see the same cases in "
        "the same order. Lines are means over the runs, bands reach from the lowest to the highest.",
        figures=(
            ("Dice + cross-entropy on training patches",
             charts.learning_curve_figure(demo.curves["tuned"], "loss", "step")),
            ("Dice of the held-out labelled subjects",
             charts.learning_curve_figure(demo.curves["dice"], "Dice", "step")),
        ),
    )  # fmt: skip


def _lesions(arm: Path, manifest: Manifest) -> Section:
    """Outlines of the worst, a median and the best case of an arm."""
    rows = sorted((float(r["dice"]), r["subject"]) for r in cases_of(arm) if float(r["volume_ml_true"]) > 0)
    with (arm / "predictions" / LISTING).open(newline="") as file:
        masks = {row["subject"]: row["file"] for row in csv.DictReader(file)}
    figures = []
    for name, (score, subject) in (("Worst", rows[0]), ("Median", rows[len(rows) // 2]), ("Best", rows[-1])):
        files, mask = scans_of(manifest, subject)
        flair, truth = nifti.read(files["flair"])[0], nifti.read(mask, labels=True)[0]
        image = resample(flair.voxels, flair.affine_mm, truth.shape, truth.affine_mm, order="linear", fill=0.0)
        answer = nifti.read(arm / "predictions" / masks[subject], labels=True)[0]
        figures.append((
            f"{name} of {len(rows)} test subjects with lesions: subject {subject}, Dice {score:.3f}, on the FLAIR",
            pictures.overlay_figure(image, truth.voxels, answer.voxels, spacing_mm=truth.spacing_mm),
        ))  # fmt: skip
    return Section(
        "Lesions",
        "Outlines on the grid of the file that came in, as `brainfm predict` wrote them.",
        figures=tuple(figures),
    )


def _comparison(demo: Demo) -> Section:
    summary = demo.summary
    table = [("", "Dice", "95 % interval", "Surface Dice at 1 mm", "95 % interval", "n")]
    bars = []
    for arm, label in demo.arms.items():
        dice, surface = (summary["scores"][arm][name] for name in ("dice", "surface_dice_1mm"))
        table.append((label, f"{dice['mean']:.3f}", f"{dice['low']:.3f} to {dice['high']:.3f}",
                      f"{surface['mean']:.3f}", f"{surface['low']:.3f} to {surface['high']:.3f}",
                      str(dice["n"])))  # fmt: skip
        bars.append((label, dice["mean"], dice["low"], dice["high"], dice["n"]))
    d = summary["difference"]
    verdict = (
        "The interval of the paired difference lies above 0: pre-training helped here." if d["low"] > 0
        else "The interval of the paired difference lies below 0: pre-training hurt here." if d["high"] < 0
        else "The interval of the paired difference holds 0: runs this short do not show a difference either way."
    )  # fmt: skip
    table.append(
        ("difference, paired", f"{d['mean']:+.3f}", f"{d['low']:+.3f} to {d['high']:+.3f}", "", "", str(d["n"]))
    )
    return Section(
        "Pre-trained against scratch",
        f"Both arms: {summary['labelled_subjects']} labelled subjects, the same patches, steps and schedule; the "
        f"network pre-trained for {summary['pretrain_steps']} steps or fresh. {verdict} Intervals are over "
        f"{summary['runs']} runs and {summary['n_cases']} test subjects together, n counts both; synthetic lesions say "
        "nothing about any clinical task.",
        figures=(("Test subjects, mean and interval", charts.interval_figure(bars)),),
        table=tuple(table),
    )
