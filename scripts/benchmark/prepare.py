"""Speed of `prepare`: scans a second into a store, beside yucca's preprocessing of the same files.

    python scripts/benchmark/prepare.py --data FOLDER_WITH_NIFTI --workers 2 --repeats 3

Both read the files, turn them to RAS, crop, standardise, resample with cubic kernels to 1 mm and write what they made:
brainfm a store (float16, compressed, synced, with checksums and recipes), yucca one .npy a scan as its users do. Runs
alternate, each in a process of its own with so many workers of one thread each. brainfm's times, by the clock and of
the processor, include the start of its workers; yucca's begin when its workers have loaded everything and prepared a
scan. Where other work disturbs the clock, compare the seconds of the processor. A peer that is not installed is left
out. Without --data, phantoms of the size of a head are made.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

from brainfm.data.manifest import Scan, contrast_of, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.specs import PreprocessSpec

METHODS = ("brainfm", "yucca")


def write_phantoms(folder: Path, count: int) -> None:
    """Noisy heads, half of them at 1 mm and half of 0.94 x 0.94 x 1.2 mm, as int16 .nii.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        spacing = np.array([1.0, 1.0, 1.0] if i % 2 == 0 else [0.9375, 0.9375, 1.2])
        shape = np.round(np.array([182, 218, 182]) / spacing).astype(int)
        x, y, z = np.meshgrid(*(np.linspace(-1.1, 1.1, n, dtype=np.float32) for n in shape), indexing="ij")
        radius = x**2 / 0.6 + y**2 / 0.9 + z**2 / 0.7
        voxels = (radius < 1) * (600 + 200 * np.sin(9 * x + i) * np.cos(7 * y) * np.cos(8 * z) - 300 * (radius > 0.85))
        voxels += np.abs(rng.normal(0, 25, shape))
        name = f"sub-{i // 2:02}_{'T1w' if i % 2 == 0 else 'FLAIR'}.nii.gz"
        nib.save(
            nib.Nifti1Image(voxels.astype(np.int16), np.diag([-1, 1, 1, 1]) @ np.diag([*spacing, 1])), folder / name
        )


def find_scans(folder: Path, limit: int) -> list[Scan]:
    """Every image below a folder; label maps are told by their names. Files of one folder and subject are a session."""
    words = ("mask", "seg", "dlmuse", "label")
    files = [f for f in sorted(folder.rglob("*.nii.gz")) if not any(word in f.name.lower() for word in words)]
    return [
        Scan("benchmark", str(f.parent.relative_to(folder)), f.name.split("_")[0], contrast_of(f.name), str(f))
        for f in files[:limit]
    ]


def processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def run_brainfm(manifest: Path, out: Path, workers: int) -> tuple[float, float, int]:
    start, processor = time.perf_counter(), processor_seconds()
    report = prepare(read_manifest(manifest), out / "store", PreprocessSpec(), workers=workers)
    return time.perf_counter() - start, processor_seconds() - processor, len(report.failed)


def _yucca_one(job: tuple[str, str]) -> tuple[bool, float]:
    """The call of yucca's and FOMO25's own scripts for a scan without a label: whether it failed, processor seconds."""
    from yucca.functional.preprocessing import preprocess_case_for_training_without_label

    source, target = job
    start = time.process_time()
    try:
        images, _ = preprocess_case_for_training_without_label(
            images=[nib.load(source)],
            normalization_operation=["volume_wise_znorm"],
            crop_to_nonzero=True,
            target_orientation="RAS",
            target_spacing=[1.0, 1.0, 1.0],
            image_properties={},
            strict=False,
        )
    except (AssertionError, ValueError) as error:
        print(f"yucca refuses {source}: {error}", file=sys.stderr)
        return True, time.process_time() - start
    np.save(target, np.asarray(images[0], dtype=np.float32))
    return False, time.process_time() - start


def run_yucca(manifest: Path, out: Path, workers: int) -> tuple[float, float, int]:
    table = read_manifest(manifest)
    jobs = [(str(table.resolve(scan.path)), str(out / f"{i}.npy")) for i, scan in enumerate(table.scans)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_yucca_one, jobs[:1] * workers, chunksize=1)
        start = time.perf_counter()
        done = pool.map(_yucca_one, jobs, chunksize=1)
        seconds = time.perf_counter() - start
        pool.close()
        pool.join()
    return seconds, sum(processor for _, processor in done), sum(failed for failed, _ in done)


def measure_here(method: str, manifest: Path, workers: int) -> None:
    """One run in this process; a line of JSON with its figures."""
    with tempfile.TemporaryDirectory() as out:
        run = {"brainfm": run_brainfm, "yucca": run_yucca}[method]
        seconds, processor, failed = run(manifest, Path(out), workers)
        size = sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if workers < 2:
        peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    figures = {"seconds": seconds, "processor_s": processor, "failed": failed}
    print(json.dumps(figures | {"worker_gb": peak / 2**20, "written_mb": size / 1e6}))


def measure(method: str, manifest: Path, workers: int) -> dict[str, float]:
    """One run in a process of its own, so that nothing is warm and the peak of memory is this run's."""
    command = [sys.executable, __file__, "--one", method, "--manifest", str(manifest), "--workers", str(workers)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, env={**os.environ, **one_thread}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with .nii.gz files at any depth")
    parser.add_argument("--scans", type=int, default=12, help="how many at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure_here(args.one, args.manifest, args.workers)
        return
    methods = [m for m in METHODS if importlib.util.find_spec(m)]
    for missing in sorted(set(METHODS) - set(methods)):
        print(f"{missing} is not installed here and is left out")
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder) / "phantoms"
        if not args.data:
            write_phantoms(data, args.scans)
        scans = find_scans(data.absolute(), args.scans)
        manifest = Path(folder) / "manifest.csv"
        write_manifest(manifest, scans)
        runs: dict[str, list[dict[str, float]]] = {m: [] for m in methods}
        for _ in range(args.repeats):
            for method in methods:
                runs[method].append(measure(method, manifest, args.workers))
    print(f"{len(scans)} scans, {args.workers} workers, median of {args.repeats}")
    print(f"{'':10}{'scans/s':>10}{'processor s/scan':>18}{'failed':>8}{'GB a worker':>13}{'MB written':>12}")
    result = {}
    for method, found in runs.items():
        rate = statistics.median(len(scans) / run["seconds"] for run in found)
        peak = max(run["worker_gb"] for run in found)
        processor = statistics.median(run["processor_s"] / len(scans) for run in found)
        result[method] = {"scans_per_s": rate, "processor_s_a_scan": processor, "worker_gb": peak, "runs": found}
        print(
            f"{method:10}{rate:10.2f}{processor:18.2f}{found[0]['failed']:8.0f}{peak:13.2f}{found[0]['written_mb']:12.0f}"
        )
    if len(methods) == 2:
        pairs = [b["seconds"] / a["seconds"] for a, b in zip(*runs.values())]
        result["times_faster"] = statistics.median(pairs)
        print(f"brainfm is {result['times_faster']:.2f} times as fast (pairs: {', '.join(f'{p:.2f}' for p in pairs)})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
