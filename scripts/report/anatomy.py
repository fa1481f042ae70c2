"""Accuracy of `anatomy` (CSF, grey and white matter): against phantoms' truth, and against DLMUSE on real scans.

    python scripts/report/anatomy.py --data FOLDER_WITH_ixi2mm --out report.md
    python scripts/report/anatomy.py --data FOLDER --backbone FILE [--look 4:whole --look 1.5:96] --out report.md

Phantoms are bent copies of the same ICBM152 template that the priors come from, already brain-extracted and without a
neck: what is measured on them is intensities, bias field and deformation, not how well the atlas fits a stranger.
The real scans are whole heads at 2 mm; the reference is DLMUSE, itself automatic, on the same grid. Its regions are
counted as follows: 1 (sulcal CSF) and the ventricles 4, 11, 46, 49-52 are CSF; lobar white matter 81-95, cerebellar
white matter 40, 41, brain stem 35, ventral DC 61, 62 and optic chiasm 69 are white matter; all others, deep nuclei
included, are grey matter. Dice inside its mask counts only voxels that DLMUSE labels. Subjects used while the method
was made are left out (TUNED).

With --backbone it is method=network that is measured, on people of the side `held` of foundation/split.csv alone: Dice
against DLMUSE on T1s of ixi2mm, by the groups of data/schemes and as a mean over the fine regions that DLMUSE tells;
and the Dice between the answers to a patient's T1 and to the same patient's other contrasts. The second says nothing
about who is right: an answer that is always the same would agree too, so the number of regions found and the volume
within the skull stand beside it. A look is the edge of the voxels that the network sees, in mm, and that of its
windows (`whole`: the head in one pass).
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import time
from pathlib import Path

import numpy as np

from brainfm import seeds
from brainfm.data import regions, schemes
from brainfm.imaging import anatomy, nifti
from brainfm.inference.anatomy import Labeller
from brainfm.nets.backbone_file import load_backbone
from brainfm.synthesis import phantom
from brainfm.training.warm_start import so_far
from brainfm.volume import Volume

TUNED = (
    "IXI012", "IXI034", "IXI079", "IXI136", "IXI146", "IXI205", "IXI256", "IXI258",
    "IXI302", "IXI362", "IXI385", "IXI483", "IXI524", "IXI544", "IXI586", "IXI605",
)  # fmt: skip
VENTRICLES = (4, 11, 46, 49, 50, 51, 52)
WHITE = (35, 40, 41, 61, 62, 69, *range(81, 96))
NAMES = ("csf", "gm", "wm")


def reference(regions: np.ndarray) -> np.ndarray:
    """uint8 tissues of a DLMUSE parcellation."""
    found = np.where(regions > 0, 2, 0).astype(np.uint8)
    found[np.isin(regions, (1, *VENTRICLES))] = 1
    found[np.isin(regions, WHITE)] = 3
    return found


def dice(a: np.ndarray, b: np.ndarray) -> float:
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else float("nan")


def scored(volume: Volume, truth: np.ndarray) -> tuple[dict[str, float | str], anatomy.Tissues]:
    """Dice of each tissue, of all together, and what it took."""
    start = time.perf_counter(), time.process_time()
    found = anatomy.segment(volume)
    row: dict[str, float | str] = {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
        "quality": found.quality,
        "flag": found.reason,
    }
    for label, name in enumerate(NAMES, start=1):
        row[name] = dice(found.labels == label, truth == label)
    row["icv"] = dice(found.labels > 0, truth > 0)
    return row, found


def on_phantoms(count: int, spacing_mm: float, seed: int) -> dict[str, list[dict[str, float | str]]]:
    rows: dict[str, list[dict[str, float | str]]] = {}
    for index in range(count):
        person = phantom.subject(seed, index, spacing_mm)
        for contrast, volume in person.scans.items():
            if volume.shape != person.tissue.shape:
                continue  # thick slices have a grid of their own, the truth has not
            row, _ = scored(volume, person.tissue.voxels)
            rows.setdefault(f"phantom {contrast}", []).append(row)
            print(f"phantom {index} {contrast}", line(row), flush=True)
    return rows


def on_ixi(root: Path, count: int) -> list[dict[str, float | str]]:
    with open(root / "participants_age_sex.csv", encoding="utf-8") as file:
        ages = {row["MRID"]: float(row["Age"]) for row in csv.DictReader(file) if row["Age"]}
    with open(root / "DLMUSE_Volumes.csv", encoding="utf-8") as file:
        volumes = {row["MRID"]: row for row in csv.DictReader(file)}
    people = [
        f for f in sorted(root.glob("IXI*"), key=lambda f: ages.get(f.name, 0))
        if f.name in ages and not f.name.startswith(TUNED)
    ]  # fmt: skip
    rows = []
    for place in np.linspace(0, len(people) - 1, count).round().astype(int):  # spread over age
        folder = people[place]
        volume, _ = nifti.read(next(folder.glob("*_T1w.nii.gz")))
        regions, _ = nifti.read(next(folder.glob("*dseg.nii.gz")), labels=True)
        truth = reference(regions.voxels)
        row, found = scored(volume, truth)
        inside = np.where(truth > 0, found.labels, 0)
        row |= {f"{name} in mask": dice(inside == k, truth == k) for k, name in enumerate(NAMES, start=1)}
        ventricles = np.isin(regions.voxels, VENTRICLES)
        row["ventricles found"] = float((found.labels[ventricles] == 1).mean())
        row |= {f"{name}_ml": value for name, value in found.volumes_ml.items()}
        row |= {f"{name}_ref_ml": float((truth == k).sum()) * 8e-3 for k, name in enumerate(NAMES, start=1)}
        row["icv_ref_ml"] = float(volumes[folder.name]["702"]) / 1000
        row |= {"subject": folder.name, "age": ages[folder.name]}
        rows.append(row)
        print(folder.name, f"age {ages[folder.name]:.0f}", line(row), flush=True)
    return rows


# ---- by a network ----------------------------------------------------------------------------------------------------

PATIENTS = ("openms_cross/patient19", "upenn_gbm/UPENN-GBM-00006_11", "tcga_lgg/TCGA-DU-7294")
CONTRASTS = {"T1w": "t1", "T1c": "t1c", "T2w": "t2", "FLAIR": "flair"}
FINE = [name for name in regions.REGIONS if name in regions.SCHEMES["dlmuse"].values()]
SPLIT = Path(__file__).resolve().parents[2] / "foundation" / "split.csv"


def held_people() -> set[tuple[str, str]]:
    """(data set, person) on the side that no pre-training sees."""
    with SPLIT.open(newline="", encoding="utf-8") as file:
        return {(row["dataset"], row["subject"]) for row in csv.DictReader(file) if row["side"] == "held"}


def labeller(backbone: Path, look: str) -> Labeller:
    spacing, patch = look.split(":")
    return Labeller.load(backbone, spacing_mm=float(spacing), patch_vox=None if patch == "whole" else int(patch))


def group_dice(found: np.ndarray, other: np.ndarray, scheme: str) -> dict[str, float]:
    """By the groups of data/schemes: of a map in the scheme brainfm and another one, where that tells them."""
    a = schemes.to_groups(found, "brainfm", "the network's labels", unknown="ignore")
    b = schemes.to_groups(other, scheme, "the other labels", unknown="ignore")
    known = b != schemes.IGNORE
    return {
        name: dice((a == k) & known, b == k) for k, name in enumerate(schemes.GROUPS) if k and (b == k).any()
    }  # fmt: skip


def fine_dice(found: np.ndarray, muse: np.ndarray) -> float:
    """Mean over the fine regions that DLMUSE tells, 0 for one that was not found; a voxel of which DLMUSE does not tell
    whether it belongs to a region is not counted there."""
    table = regions.targets_of("dlmuse")
    target = np.where(muse < len(table), table[np.minimum(muse, len(table) - 1)], regions.IGNORE)
    scores = []
    for name in FINE:
        open_to_it = [regions.TARGETS.index(merged) for merged, of in regions.MERGED.items() if name in of]
        unknown = np.isin(target, [regions.IGNORE, *open_to_it])
        true = target == regions.TARGETS.index(name)
        if true.any():
            scores.append(dice((found == regions.REGIONS[name]) & ~unknown, true))
    return float(np.mean(scores))


def tissues_of(labels: np.ndarray) -> np.ndarray:
    """uint8 tissues of a map in the scheme brainfm, numbered as the atlas's."""
    table = np.zeros(max(regions.REGIONS.values()) + 1, np.uint8)
    for name, tissue in regions.TISSUE_OF.items():
        table[regions.REGIONS[name]] = regions.TISSUES[tissue]
    return table[labels]


def network_on_ixi(root: Path, asked: Labeller, people: list[str], atlas: bool) -> list[dict[str, float | str]]:
    """``atlas``: whether the same heads are segmented by method=atlas, too."""
    rows = []
    for name in people:
        muse, _ = nifti.read(next((root / name).glob("*dseg.nii.gz")), labels=True)
        start = time.perf_counter(), time.process_time()
        found = asked.find({"t1": next((root / name).glob("*_T1w.nii.gz"))})
        row: dict[str, float | str] = {
            "seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1],
            "fine": fine_dice(found.labels, muse.voxels), **group_dice(found.labels, muse.voxels, "dlmuse"),
            "within skull": dice(found.mask, muse.voxels > 0), "icv_ml": found.volumes_ml["icv"],
            "icv_ref_ml": float((muse.voxels > 0).sum()) * 8e-3, "flag": found.reason, "subject": name,
        }  # fmt: skip
        answers = {"": tissues_of(found.labels)}
        if atlas:
            volume, _ = nifti.read(next((root / name).glob("*_T1w.nii.gz")))
            answers["atlas "] = anatomy.segment(volume).labels
        for way, tissues in answers.items():
            truth = reference(muse.voxels)
            row |= {f"{way}{tissue}": dice(tissues == k, truth == k) for k, tissue in enumerate(NAMES, start=1)}
        rows.append(row)
        print(name, line(row), found.reason, flush=True)
    return rows


def network_on_patients(data: Path, asked: Labeller) -> list[dict[str, float | str]]:
    """Agreement of the answers to a patient's contrasts with that to the T1, all of which lie on one grid."""
    rows = []
    for place in PATIENTS:
        files = {
            contrast: path for word, contrast in CONTRASTS.items() for path in (data / place).glob(f"*_{word}.nii.gz")
        }
        grid = nifti.read_header(files["t1"]).grid
        first = asked.find({"t1": files["t1"]})
        for contrast, path in files.items():
            if not nifti.read_header(path).grid.same_place(grid):
                raise SystemExit(f"{path} lies on another grid than its T1")
            found = first if contrast == "t1" else asked.find({contrast: path})
            scores = group_dice(found.labels, first.labels, "brainfm")
            row: dict[str, float | str] = {
                **scores, "mean": float(np.mean(list(scores.values()))), "regions": found.checks["regions"],
                "icv_ml": found.volumes_ml["icv"], "flag": found.reason, "subject": place, "contrast": contrast,
            }  # fmt: skip
            rows.append(row)
            print(place, contrast, line(row), found.reason, flush=True)
    return rows


def network_report(given: argparse.Namespace) -> tuple[list[str], dict[str, object]]:
    """Lines of the report, and the figures behind them."""
    held, loaded = held_people(), load_backbone(given.backbone)
    root = given.data / "ixi2mm"
    people = sorted(name for dataset, name in held if dataset == "ixi2mm" and (root / name).is_dir())
    people = [people[k] for k in np.linspace(0, len(people) - 1, given.subjects).round().astype(int)]
    keys = [f"ixi2mm/{name}" for name in people] + [place.removesuffix("_11") for place in PATIENTS]
    strangers = [key for key in keys if tuple(key.split("/")) not in held]
    if strangers or (loaded.subjects and loaded.subjects.among(keys)):
        raise SystemExit(f"{strangers or loaded.subjects.among(keys)}: expected people that no pre-training saw")
    told = so_far(loaded)
    lines = [f"{told['steps']} steps, {told['hours']:.1f} h of {loaded.provenance.device}.", ""]
    columns = ["fine", *schemes.GROUPS[1:], "within skull", *NAMES, "seconds", "cpu_seconds"]
    columns[-2:-2] = [f"atlas {name}" for name in NAMES] if given.atlas else []
    lines += ["| look | flagged | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    figures: dict[str, object] = {}
    for look in given.look:
        rows = network_on_ixi(root, labeller(given.backbone, look), people, given.atlas)
        cells = [interval(np.array([float(row[column]) for row in rows]), given.seed) for column in columns]
        flagged = sum(bool(row["flag"]) for row in rows)
        lines.append(f"| {look} | {flagged} of {len(rows)} | " + " | ".join(cells) + " |")
        figures[look] = rows
    rows = network_on_patients(given.data, labeller(given.backbone, given.look[0]))
    columns = [*schemes.GROUPS[1:], "mean", "regions", "icv_ml"]
    lines += ["", f"Agreement with the answer to the T1 ({given.look[0]}):", ""]
    lines += ["| patient | contrast | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for row in rows:
        cells = [f"{row.get(name, float('nan')):.{0 if name in columns[-2:] else 3}f}" for name in columns]
        lines.append(f"| {row['subject']} | {row['contrast']} | " + " | ".join(cells) + " |")
    return lines, figures | {"agreement": rows}


def line(row: dict[str, float | str]) -> str:
    return " ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "age")


def interval(values: np.ndarray, seed: int) -> str:
    """Mean and 95 % bootstrap interval."""
    rng = seeds.stream(seed, "report.bootstrap", 0)
    means = rng.choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def table(groups: dict[str, list[dict[str, float | str]]], seed: int) -> list[str]:
    columns = ["csf", "gm", "wm", "icv", "gm in mask", "wm in mask", "ventricles found", "seconds", "cpu_seconds"]
    lines = ["| scans | n | flagged | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 3)]
    for name, rows in groups.items():
        cells = [interval(np.array([float(r[c]) for r in rows]), seed) if c in rows[0] else "" for c in columns]
        flagged = sum(bool(r["flag"]) for r in rows)
        lines.append(f"| {name} | {len(rows)} | {flagged} | " + " | ".join(cells) + " |")
    return lines


def correlations(rows: list[dict[str, float | str]]) -> list[str]:
    lines = ["", "| volume against DLMUSE | r | mean ml | reference ml |", "|---|---|---|---|"]
    for name in (*NAMES, "icv"):
        found, truth = (np.array([float(r[f"{name}{end}"]) for r in rows]) for end in ("_ml", "_ref_ml"))
        lines.append(f"| {name} | {np.corrcoef(found, truth)[0, 1]:.3f} | {found.mean():.0f} | {truth.mean():.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds ixi2mm; without it phantoms alone")
    parser.add_argument("--out", type=Path, default=Path("report_anatomy.md"))
    parser.add_argument("--phantoms", type=int, default=6)
    parser.add_argument("--subjects", type=int, default=12)
    parser.add_argument("--spacing-mm", type=float, default=2.0, help="of the phantoms")
    parser.add_argument("--seed", type=int, default=23)
    parser.add_argument("--backbone", type=Path, help="measures method=network with this file instead")
    parser.add_argument("--atlas", action="store_true", help="with --backbone: tissues of the same heads by the atlas")
    parser.add_argument("--look", action="append", help="EDGE_MM:WINDOW_VOX of the network, or EDGE_MM:whole")
    given = parser.parse_args()
    if given.backbone:
        given.look = given.look or ["1.5:whole"]
        lines, figures = network_report(given)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines = ["Dice: mean [95 % bootstrap interval].", *lines, "", f"Peak memory {memory:.2f} GB."]
        write(given.out, lines, figures)
        return
    groups = on_phantoms(given.phantoms, given.spacing_mm, given.seed)
    real = on_ixi(given.data / "ixi2mm", given.subjects) if given.data else []
    if real:
        groups["IXI T1 (2 mm)"] = real
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        "Dice: mean [95 % bootstrap interval]. " + " ".join((__doc__ or "").split("\n\n")[2].split()), "",
        *table(groups, given.seed), *(correlations(real) if real else []), "", f"Peak memory {memory:.2f} GB.",
    ]  # fmt: skip
    write(given.out, lines, groups)


def write(out: Path, lines: list[str], figures: object) -> None:
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
