"""How well `anatomy` finds CSF, grey and white matter: against the truth of phantoms, and against DLMUSE on real scans.

    python scripts/report_anatomy.py --data FOLDER_WITH_ixi2mm --out report.md

Phantoms are bent copies of the same ICBM152 template that the priors come from, already brain-extracted and without a
neck: what is measured on them is intensities, bias field and deformation, not how well the atlas fits a stranger.
The real scans are whole heads at 2 mm; the reference is DLMUSE, itself automatic, on the same grid. Its regions are
counted as follows: 1 (sulcal CSF) and the ventricles 4, 11, 46, 49-52 are CSF; lobar white matter 81-95, cerebellar
white matter 40, 41, brain stem 35, ventral DC 61, 62 and optic chiasm 69 are white matter; all others, deep nuclei
included, are grey matter. Dice inside its mask counts only voxels that DLMUSE labels. Subjects used while the method
was made are left out (TUNED).
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
from brainfm.imaging import anatomy, nifti
from brainfm.synthesis import phantom
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
        cells = [
            interval(np.array([float(r[c]) for r in rows]), seed) if c in rows[0] else "" for c in columns
        ]
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
    given = parser.parse_args()
    groups = on_phantoms(given.phantoms, given.spacing_mm, given.seed)
    real = on_ixi(given.data / "ixi2mm", given.subjects) if given.data else []
    if real:
        groups["IXI T1 (2 mm)"] = real
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        "Dice: mean [95 % bootstrap interval]. " + " ".join((__doc__ or "").split("\n\n")[2].split()), "",
        *table(groups, given.seed), *(correlations(real) if real else []), "", f"Peak memory {memory:.2f} GB.",
    ]  # fmt: skip
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    given.out.with_suffix(".json").write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
