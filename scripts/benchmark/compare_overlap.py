"""Overlap of windows: Dice of one bundle at several overlaps, case by case, and what each overlap costs.

    python scripts/benchmark/compare_overlap.py --bundle run/bundle --manifest test.csv
    python scripts/benchmark/compare_overlap.py --bundle run/bundle --manifest test.csv --overlaps 0.5 0.3 --json FILE

Every overlap answers every labelled case of the manifest; the table shows the mean Dice, the mean difference to the
first overlap with its 95 % interval (bootstrap over subjects of the paired differences), the largest difference of one
case, and processor time. An overlap serves as well as the first where the whole interval lies within the margin. The
cases must be ones that the bundle was not trained on: else Dice is near its ceiling, and so are the differences.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import read_manifest
from brainfm.inference.evaluate import evaluate
from brainfm.inference.predict import predict_manifest
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.tasks.bundle import load_engine
from brainfm.training.run import commit_of_code


def scored(bundle: Path, manifest: Path, out: Path, overlap: float, device: str) -> tuple[list[dict[str, Any]], float]:
    """The rows of brainfm evaluate, and the processor time that the prediction took."""
    engine = load_engine(bundle, device=device, overlap=overlap)
    table = read_manifest(manifest)
    began = time.process_time()
    report = predict_manifest(engine, table, out / "predictions")
    seconds = time.process_time() - began
    if report.failures:
        raise RuntimeError(f"overlap {overlap}: {len(report.failures)} cases failed: {report.failures}")
    return evaluate(table, out / "scores", predictions=out / "predictions").rows, seconds


def compared(found: dict[float, list[dict[str, Any]]], margin: float) -> list[dict[str, Any]]:
    """One row an overlap: its Dice against that of the first."""
    first = next(iter(found.values()))
    groups = [f"{row['dataset']}/{row['subject']}" for row in first]
    base = np.array([row["dice"] for row in first])
    rows = []
    for overlap, cases in found.items():
        values = np.array([row["dice"] for row in cases])
        differences = values - base
        interval = bootstrap(mean_score, differences, differences, groups=groups, seed=0)
        rows.append(
            {
                "overlap": overlap, "cases": len(cases), "dice": float(values.mean()),
                "difference": interval.mean, "low": interval.low, "high": interval.high,
                "largest": float(differences[np.abs(differences).argmax()]),
                "within": bool(interval.low >= -margin and interval.high <= margin),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--overlaps", nargs="+", type=float, default=[0.5, 0.25, 0.2, 0.1])
    parser.add_argument("--margin", type=float, default=0.01, help="of Dice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found, seconds = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for overlap in args.overlaps:
            out = Path(name) / str(overlap)
            found[overlap], seconds[overlap] = scored(args.bundle, args.manifest, out, overlap, args.device)
    rows = [row | {"processor_s": seconds[row["overlap"]]} for row in compared(found, args.margin)]
    task = load_engine(args.bundle, device="cpu").task
    about = {"commit": commit_of_code(), "patch_vox": list(task.patch_vox), "margin": args.margin}
    print(json.dumps(about))
    print(
        f"{'overlap':>8}{'cases':>7}{'dice':>8}{'difference':>12}{'95 % interval':>20}{'largest':>9}{'processor':>11}"
    )
    for row in rows:
        interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
        print(
            f"{row['overlap']:>8.2f}{row['cases']:>7}{row['dice']:>8.4f}{row['difference']:>+12.4f}{interval:>20}"
            f"{row['largest']:>+9.4f}{row['processor_s']:>9.1f} s"
            f"   {'within' if row['within'] else 'not within'} the margin of {args.margin:g}"
        )
    if args.json:
        args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
