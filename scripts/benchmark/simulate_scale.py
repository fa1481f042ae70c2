"""Simulation of scale: FOMO60K, OpenMind, FOMO300K in disk, memory, cores, hours; and the sampler, run at that scale.

    python scripts/benchmark/simulate_scale.py                   # from the figures of CHANGELOG.md, named below
    python scripts/benchmark/simulate_scale.py --store STORE     # bytes a scan, reads a core, measured on the spot
    python scripts/benchmark/simulate_scale.py --reads-per-s-64 900 --prepare-scans-per-s 1.2 --json FILE

The first part is arithmetic on measured figures; every figure says where it comes from. **Steps a second on a GPU are
assumed, not measured**: GPU-hours are given for several assumed rates. The second part runs the sampler itself
(`StepSampler` and the order of `PretrainPatches`: the code that training uses) for 34,191 subjects on 64 ranks with a
batch of 4, interrupted twice and resumed, and counts who was seen. Indexes are written and opened at full size.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from brainfm.data.loader import StepSampler
from brainfm.data.patches import PretrainPatches
from brainfm.data.store import _INDEX, Store
from brainfm.specs import PreprocessSpec, ViewSpec


@dataclass(frozen=True)
class Cohort:
    """Scans and subjects, as published."""

    name: str
    subjects: int
    scans: int
    source: str


@dataclass(frozen=True)
class Recipe:
    """What a run reads: ``reads`` blocks of ``edge`` voxels a sample, ``batch`` samples a step."""

    name: str
    edge: int
    reads: int
    batch: int
    steps: int
    source: str


@dataclass(frozen=True)
class Figure:
    """A number that the arithmetic starts from, and where it comes from."""

    value: float
    source: str


COHORTS = (
    Cohort("FOMO60K", 11_187, 60_529, "published"),
    Cohort("OpenMind", 34_191, 114_570, "published"),
    # 306,207 scans are published, subjects are not in the facts at hand: sessions' archives bound them from above.
    Cohort("FOMO300K", 81_190, 306_207, "scans published; subjects at most the 81,190 session archives"),
)
RECIPES = (
    Recipe("fomo25", 64, 2, 4, 252_000, "configs/experiment/fomo25.yaml"),
    Recipe("ssl3d, batch 2", 160, 1, 2, 250_000, "250 steps x 1000 epochs"),
    Recipe("ssl3d, batch 8", 160, 1, 8, 250_000, "250 steps x 1000 epochs"),
)
STEPS_PER_S = (1.0, 3.0, 10.0, 35.0)  # assumed
SHARDS, CORES = (1, 10, 100), 16
_CHANGELOG = "CHANGELOG.md, Measured (two cores of a virtual machine)"


def defaults() -> dict[str, Figure]:
    """The measured figures. Bytes: 17.8 % of a float32 volume, taken as a box of 182 x 218 x 182 voxels; a whole head
    with its neck may have twice as many, so measure with --store before buying disks."""
    return {
        "bytes_a_scan": Figure(0.178 * 4 * 182 * 218 * 182, f"{_CHANGELOG}: 17.8 % of float32 at 182 x 218 x 182"),
        "reads_per_s_64": Figure(2 * 435, f"{_CHANGELOG}: 435 pairs of 64^3 a second and core"),
        "reads_per_s_160": Figure(2 * 108 * (96 / 160) ** 3, f"{_CHANGELOG}: 108 pairs of 96^3, scaled by voxels"),
        "prepare_scans_per_s": Figure(3.64 / 2, f"{_CHANGELOG}: 3.64 scans/s with 2 workers"),
        "worker_bytes": Figure(0.25e9, f"{_CHANGELOG}: .25 GB a prepare worker"),
    }


def measure(store: Store, seconds: float) -> dict[str, Figure]:
    """Bytes a scan and reads a core of a store at hand. Voxels come from the page cache when they fit into it."""
    source = f"measured now on a store of {sum(len(s.scans) for s in store.sessions)} scans, from the page cache"
    files = [store.path / "sessions" / s.folder / scan.file for s in store.sessions for scan in s.scans]
    found = {"bytes_a_scan": Figure(float(np.mean([f.stat().st_size for f in files])), source)}
    for edge in (64, 160):
        patches = PretrainPatches(store, store.sessions, ViewSpec((edge,) * 3), seed=0)
        began, count = time.process_time(), 0
        while time.process_time() - began < seconds:
            patches[count]
            count += 1
        found[f"reads_per_s_{edge}"] = Figure(count / (time.process_time() - began), source)
    return found


def arithmetic(figures: dict[str, Figure], indexes: dict[str, dict[str, float]]) -> dict[str, list[dict]]:
    """The tables, as rows. ``indexes``: what opening each cohort's index took."""
    size, per_s = figures["bytes_a_scan"].value, figures["prepare_scans_per_s"].value
    cohorts = [
        {
            "cohort": c.name,
            "subjects": c.subjects,
            "scans": c.scans,
            "store_TB": c.scans * size / 1e12,
            "index_MB_a_process": indexes[c.name]["bytes"] / 1e6,
            "open_s": indexes[c.name]["seconds"],
            "prepare_GB_a_shard": CORES * figures["worker_bytes"].value / 1e9,
            **{f"prepare_h_{shards}x{CORES}_cores": c.scans / (per_s * CORES * shards) / 3600 for shards in SHARDS},
        }
        for c in COHORTS
    ]
    recipes = [
        {
            "recipe": r.name,
            "steps_per_s": rate,
            "gpu_hours": r.steps / rate / 3600,
            "reads_per_s": r.reads * r.batch * rate,
            "cores_a_gpu": r.reads * r.batch * rate / figures[f"reads_per_s_{r.edge}"].value,
            # Uncached: a read touches about its voxels' share of the compressed bytes.
            "disk_MB_per_s": r.reads * r.batch * rate * size * min(1.0, r.edge**3 / (182 * 218 * 182)) / 1e6,
            "samples": r.steps * r.batch,
            **{f"epochs_{c.name}": r.steps * r.batch / c.subjects for c in COHORTS},
        }
        for r in RECIPES
        for rate in STEPS_PER_S
    ]
    return {"cohorts": cohorts, "recipes": recipes}


def opened(cohort: Cohort) -> dict[str, float]:
    """Opens the index of a store of this size (its voxels do not exist) in a process of its own; bytes and seconds."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_open_index, (cohort.subjects, cohort.scans))


def _open_index(subjects: int, scans: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_index(Path(folder) / "store", subjects, scans)
        before, began = _resident(), time.perf_counter()
        store = Store.open(path)
        patches = PretrainPatches(store, store.sessions, ViewSpec((64, 64, 64)), seed=0)
        assert len(patches) == subjects and sum(len(s.scans) for s in store.sessions) == scans
        return {"bytes": float(_resident() - before), "seconds": time.perf_counter() - began}


def write_index(path: Path, subjects: int, scans: int) -> Path:
    """A store whose index names this many scans, dealt evenly, one session a subject, and whose voxels do not exist."""
    Store.create(path, PreprocessSpec())
    with (path / "index.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_INDEX)
        for number in range(subjects):
            who = (f"ds{number * 800 // subjects:06}", f"sub-{number:06}", "ses-1")
            folder = f"{'-'.join(who)}-{number:08x}"
            for scan in range(scans * number // subjects, scans * (number + 1) // subjects):
                name = f"scan{scan}"
                digest = hashlib.sha256(name.encode()).hexdigest()
                where = (f"{folder}/{name}.b2nd", 182, 218, 182, digest, "/".join(who), 0, 0, 0)
                writer.writerow((*who, name, "scan", "t1", *where))
    return path


def _resident() -> int:
    """Bytes this process holds now, where the system tells; else the most it ever held."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sampling(subjects: int, ranks: int, batch: int, epochs: int, stops: tuple[float, ...]) -> dict[str, float | int]:
    """Runs the sampler of every rank through several epochs with interruptions; counts who was seen how often.

    Args:
        subjects, ranks, batch, epochs: of the run.
        stops: where it is interrupted, as shares of the run; each time every rank begins anew from the step alone.

    Raises:
        AssertionError: where a sample came twice or not at all, or a subject did not come once an epoch.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(write_index(Path(folder) / "store", subjects, subjects))
        per_step = ranks * batch
        steps = -(-epochs * subjects // per_step)
        edges = [0, *(int(steps * share) for share in stops), steps]
        samples = np.zeros(steps * per_step, np.int8)
        seen = np.zeros((epochs + 1, subjects), np.int16)
        drawn, begun, before, seconds, starting = 0, 0, _resident(), 0.0, 0.0
        for first, last in itertools.pairwise(edges):
            for rank in range(ranks):
                began = time.perf_counter()
                order = PretrainPatches(store, store.sessions, ViewSpec((64, 64, 64)), seed=0)._shuffled
                begun, starting = begun + 1, starting + time.perf_counter() - began
                began = time.perf_counter()
                for numbers in StepSampler(first, last, batch, rank, ranks):
                    for i in numbers:
                        samples[i] += 1
                        seen[i // subjects, order[i]] += 1
                        drawn += 1
                seconds += time.perf_counter() - began
        assert samples.min() == samples.max() == 1, "each sample belongs to one rank and one step"
        assert (seen[:epochs] == 1).all(), "each subject comes once an epoch, over all ranks together"
        return {
            "subjects": subjects,
            "ranks": ranks,
            "batch": batch,
            "steps": steps,
            "interruptions": len(stops),
            "epochs": epochs,
            "samples": drawn,
            "subjects_seen_twice_in_an_epoch": int((seen[:epochs] > 1).sum()),
            "subjects_missed_in_an_epoch": int((seen[:epochs] == 0).sum()),
            "microseconds_a_sample": 1e6 * seconds / drawn,
            "seconds_to_resume_a_rank": starting / begun,
            "sampler_MB_a_process": 8 * subjects / 1e6,
            "grown_MB": (_resident() - before) / 1e6,
        }


def markdown(rows: list[dict]) -> str:
    """A table; numbers in as many digits as say something."""

    def text(value: object) -> str:
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return f"{value:,}" if isinstance(value, int) else str(value)

    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join(lines + ["| " + " | ".join(text(row[name]) for name in names) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="measure bytes and reads here instead")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement with --store")
    for name in defaults():
        parser.add_argument("--" + name.replace("_", "-"), type=float, help="a figure of your own")
    parser.add_argument("--subjects", type=int, default=34_191)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = defaults()
    if args.store:
        figures |= measure(Store.open(args.store), args.seconds)
    figures |= {name: Figure(getattr(args, name), "given") for name in figures if getattr(args, name) is not None}
    tables = arithmetic(figures, {cohort.name: opened(cohort) for cohort in COHORTS})
    ran = sampling(args.subjects, args.ranks, args.batch, args.epochs, stops=(0.37, 0.81))
    print("Measured figures\n")
    print(markdown([{"figure": name, "value": f.value, "source": f.source} for name, f in figures.items()]))
    print(f"\nCohorts ({CORES} cores a shard)\n")
    print(markdown(tables["cohorts"]))
    print("\nRecipes, one GPU. **Steps a second are ASSUMED, none was measured on a GPU**\n")
    print(markdown(tables["recipes"]))
    print("\nThe sampler, run: every subject once an epoch, no sample on two ranks, through two interruptions\n")
    print(markdown([ran]))
    if args.json:
        document = {
            "figures": {name: asdict(figure) for name, figure in figures.items()},
            "cohort_sources": {c.name: c.source for c in COHORTS},
            **tables,
            "steps_per_s_is": "assumed",
            "sampling": ran,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
