"""Accuracy of registration: real pairs with a published transform, and phantoms moved on purpose.

    python scripts/report/alignment.py --data DIR --out DIR

DIR holds ``openms_long``, ``ds000011`` and ``isles22``; what is absent is left out. Written are ``alignment.csv`` (one
row a pair: target registration error in mm over points of the head, for the header's position, for ours, and for the
best rigid approximation of a truth that is affine), ``synthetic.csv`` and a checkerboard before and after for each real
pair. The transforms beside openms_long take points of the fixed image to the moving one, in LPS coordinates; they are
another program's answer, right to perhaps half a millimetre, and those within a visit were found without moving far.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from brainfm import seeds
from brainfm.imaging import geometry, nifti, register
from brainfm.imaging.register import Alignment, Head
from brainfm.synthesis import phantom
from brainfm.volume import Volume

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
COLUMNS = ("pair", "score_before", "score_after", "moved_mm", "turned_deg", "kept", "header_mm", "rigid_mm",
           "header_p95_mm", "rigid_p95_mm", "floor_mm", "seconds", "reason")  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Two scans of one head, and where the moving one belongs, [4, 4] moving to fixed, where that is known."""

    name: str
    fixed: Path
    moving: Path
    truth: np.ndarray | None = None
    farthest_mm: float = register.FARTHEST_MM


def read_itk(path: Path) -> np.ndarray:
    """A MatrixOffsetTransformBase as [4, 4], fixed to moving, in RAS coordinates."""
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if line.count(":") == 1)
    numbers = np.array(fields["Parameters"].split(), dtype=float)
    centre = np.array(fields["FixedParameters"].split(), dtype=float)
    matrix = np.eye(4)
    matrix[:3, :3] = numbers[:9].reshape(3, 3)
    matrix[:3, 3] = numbers[9:] + centre - matrix[:3, :3] @ centre
    return LPS @ matrix @ LPS


def pairs(data: Path) -> Iterator[Pair]:
    for patient in sorted((data / "openms_long").glob("patient*")):
        scans = {
            (visit, contrast): patient / f"study{visit}" / f"{patient.name}_study{visit}_{contrast}.nii.gz"
            for visit in (1, 2)
            for contrast in ("FLAIR", "T1w", "T2w")
        }
        for visit in (1, 2):
            for contrast in ("T1w", "T2w"):
                itk = patient / f"study{visit}_{contrast.upper()}_intrastudy_to_FLAIR.txt"
                if itk.is_file():
                    truth = np.linalg.inv(read_itk(itk))
                    name = f"{patient.name} visit {visit} {contrast} to FLAIR"
                    yield Pair(name, scans[visit, "FLAIR"], scans[visit, contrast], truth)
        common = [patient / f"study{visit}_FLAIR_to_common_space.txt" for visit in (1, 2)]
        between = None
        if all(path.is_file() for path in common):
            first, second = (read_itk(path) for path in common)  # from the common space to each visit
            between = first @ np.linalg.inv(second)
        yield Pair(f"{patient.name} visit 2 to 1, FLAIR", scans[1, "FLAIR"], scans[2, "FLAIR"], between, 150.0)
    for folder in sorted((data / "ds000011").glob("sub-*/anat")):
        name = folder.parent.name
        yield Pair(f"ds000011 {name} T2 to T1", folder / f"{name}_T1w.nii.gz", folder / f"{name}_inplaneT2.nii.gz")
    for folder in sorted((data / "isles22").glob("sub-*")):
        stem = str(folder / folder.name)
        for contrast in ("FLAIR", "ADC"):
            moving = Path(f"{stem}_{contrast}.nii.gz")
            truth = np.eye(4) if contrast == "ADC" else None  # computed from the DWI
            yield Pair(f"isles22 {folder.name} {contrast} to DWI", Path(f"{stem}_DWI.nii.gz"), moving, truth)


def points_of(head: Head) -> np.ndarray:
    """[N, 3] mm: points of the head, without the neck and the scalp where the scan is large enough to tell."""
    places = np.argwhere(head.inside)
    return places[:: max(1, len(places) // 5000)] @ head.affine_mm[:3, :3].T + head.affine_mm[:3, 3]


def errors_mm(points: np.ndarray, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points @ (found - truth)[:3, :3].T + (found - truth)[:3, 3], axis=1)


def best_rigid(points: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The rigid motion nearest to an affine one at these points (Kabsch)."""
    there = points @ truth[:3, :3].T + truth[:3, 3]
    u, _, vt = np.linalg.svd((points - points.mean(0)).T @ (there - there.mean(0)))
    matrix = np.eye(4)
    matrix[:3, :3] = (u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt).T
    matrix[:3, 3] = there.mean(0) - matrix[:3, :3] @ points.mean(0)
    return matrix


def measure(pair: Pair, fixed: Head, moving: Head) -> tuple[Alignment, dict[str, object]]:
    begin = time.process_time()
    found = register.rigid(fixed, moving, pair.farthest_mm)
    seconds = time.process_time() - begin
    row: dict[str, object] = {
        "pair": pair.name, "score_before": f"{found.score_before:.4f}", "score_after": f"{found.score_after:.4f}",
        "moved_mm": f"{found.moved_mm:.2f}", "turned_deg": f"{found.turned_deg:.2f}", "kept": not found.refused,
        "seconds": f"{seconds:.1f}", "reason": found.refused,
    }  # fmt: skip
    if pair.truth is not None:
        points = points_of(moving)
        header = errors_mm(points, np.eye(4), pair.truth)
        ours = errors_mm(points, np.array(found.matrix_mm), pair.truth)
        row["header_mm"], row["header_p95_mm"] = f"{header.mean():.2f}", f"{np.percentile(header, 95):.2f}"
        row["rigid_mm"], row["rigid_p95_mm"] = f"{ours.mean():.2f}", f"{np.percentile(ours, 95):.2f}"
        row["floor_mm"] = f"{errors_mm(points, best_rigid(points, pair.truth), pair.truth).mean():.2f}"
    return found, row


def draw(path: Path, title: str, fixed: Head, moving: Head, found: Alignment) -> None:
    """Checkerboards of both scans in three planes, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 8), facecolor="black")
    middle = np.argwhere(fixed.inside).mean(axis=0).astype(int)
    for row, (word, matrix) in enumerate((("before", np.eye(4)), ("after", np.array(found.matrix_mm)))):
        shape = fixed.voxels.shape
        other = geometry.resample(
            moving.voxels, matrix @ moving.affine_mm, shape, fixed.affine_mm, order="linear", fill=0
        )
        squares = (np.indices(shape) // 10).sum(axis=0) % 2 == 0
        board = np.where(squares, fixed.voxels, other)
        for axis in range(3):
            axes[row, axis].imshow(np.take(board, middle[axis], axis=axis).T, cmap="gray", origin="lower")
            axes[row, axis].set_axis_off()
        axes[row, 0].set_title(word, color="white")
    figure.suptitle(f"{title}\n{found.refused or 'kept'}", color="white")
    figure.tight_layout()
    figure.savefig(path, dpi=60)
    plt.close(figure)


def synthetic(subjects: int, seed: int) -> list[dict[str, object]]:
    """Phantoms whose T2 and FLAIR were moved by up to 25 mm and 20 degrees after the T1."""
    rows = []
    for index in range(subjects):
        person = phantom.subject(seed, index, 2.0)
        fixed = Head.of(person.scans["t1"])
        for contrast in ("t2", "flair"):
            rng = seeds.stream(seed, f"report alignment {contrast}", index)
            scan = person.scans[contrast]
            axis = rng.standard_normal(3)
            turn = np.deg2rad(rng.uniform(0, 20)) * axis / np.linalg.norm(axis)
            offset = np.eye(4)
            offset[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
            way = rng.standard_normal(3)
            offset[:3, 3] = rng.uniform(0, 25) * way / np.linalg.norm(way)
            around = np.eye(4)
            around[:3, 3] = fixed.centre_mm
            offset = around @ offset @ np.linalg.inv(around)
            thick = " 4 mm slices" if max(scan.spacing_mm) > 3 else ""
            # A turn of 20 degrees stays nearer to RAS+ than to any other order of axes.
            moving = Head.of(Volume(scan.voxels, offset @ scan.affine_mm))
            pair = Pair(f"phantom {index} {contrast} to t1{thick}", Path(), Path(), np.linalg.inv(offset))
            rows.append(measure(pair, fixed, moving)[1])
            print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict[str, object]) -> str:
    truth = (
        f"TRE header {row['header_mm']} rigid {row['rigid_mm']} floor {row['floor_mm']} mm, "
        if "rigid_mm" in row
        else ""
    )
    score = f"score {row['score_before']} to {row['score_after']}, moved {row['moved_mm']} mm, {row['turned_deg']} deg"
    return f"{row['pair']}: {truth}{score}, {row['seconds']} s{', ' if row['reason'] else ''}{row['reason']}"


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        table = csv.DictWriter(handle, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--subjects", type=int, default=8, help="phantoms, two contrasts each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for pair in pairs(arguments.data):
        if not (pair.fixed.is_file() and pair.moving.is_file()):
            continue
        fixed, moving = (Head.of(nifti.read(path, compact=True)[0]) for path in (pair.fixed, pair.moving))
        found, row = measure(pair, fixed, moving)
        rows.append(row)
        print(describe(row), flush=True)
        draw(arguments.out / f"{pair.name.replace(' ', '_').replace(',', '')}.png", pair.name, fixed, moving, found)
    write(arguments.out / "alignment.csv", rows)
    made = synthetic(arguments.subjects, arguments.seed)
    if made:
        write(arguments.out / "synthetic.csv", made)
        errors = np.array([float(str(row["rigid_mm"])) for row in made])
        quantiles = np.quantile(errors, [0.5, 0.9, 1.0])
        print(f"phantoms, n = {len(errors)}: TRE median {quantiles[0]:.2f}, 90 % {quantiles[1]:.2f}, largest "
              f"{quantiles[2]:.2f} mm; refused {sum(not row['kept'] for row in made)}")  # fmt: skip


if __name__ == "__main__":
    main()
