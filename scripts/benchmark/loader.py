"""Speed of the loader: pairs of patches one core reads, what one H100 would need, and how long training waits.

    python scripts/benchmark/loader.py [--store STORE] [--steps 30] [--json FILE]
    python scripts/benchmark/loader.py --trainer gpu --patch 64 --batch 4 --steps 500      # the fomo25 step on a GPU

Without a store, synthetic 1 mm heads are prepared first (extra `demo`). Medians over repetitions; the two patch
sizes are interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from brainfm.data.layouts import find
from brainfm.data.manifest import read_manifest, write_manifest
from brainfm.data.patches import PretrainPatches, collate
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.specs import PreprocessSpec, ViewSpec
from brainfm.synthesis.phantom import write_cohort
from brainfm.training.pretrain import pretrain
from brainfm.verbs.compose import resolve

# The goal for one H100: the fomo25 recipe, 252,000 steps of 4 pairs of 64^3, in 2 hours.
WANTED_PAIRS_PER_S = 252_000 * 4 / 7200


def phantom_store(folder: Path) -> Store:
    write_cohort(folder / "cohort", 4, seed=0, spacing_mm=1.0)
    write_manifest(folder / "manifest.csv", find(folder / "cohort").scans)
    prepare(read_manifest(folder / "manifest.csv"), folder / "store", PreprocessSpec(), 2)
    return Store.open(folder / "store")


def pairs_per_s(store: Store, edge: int, seconds: float, first: int) -> float:
    dataset = PretrainPatches(store, store.sessions, ViewSpec((edge,) * 3, pairs=True), seed=0)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        collate([dataset[first + count * 2], dataset[first + count * 2 + 1]])
        count += 1
    return 2 * count / (time.perf_counter() - began)


def waited_share(store: Store, args: argparse.Namespace) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as run:
        settings = resolve("pretrain", [
            f"store={store.path}", f"run={run}", "experiment=fomo25", f"trainer={args.trainer}",
            f"data.patch_vox=[{args.patch},{args.patch},{args.patch}]", f"trainer.batch_size={args.batch}",
            f"trainer.max_steps={args.steps}", "trainer.evaluate_every=0", "data.validation=0",
        ])  # fmt: skip
        state = pretrain(settings)
    return state.waited / state.seconds, state.step / state.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--trainer", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--patch", type=int, default=32, help="edge of the training patch in voxels")
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(args.store) if args.store else phantom_store(Path(folder))
        rates: dict[int, list[float]] = {64: [], 96: []}
        for repeat in range(args.repeats):
            for edge in rates:
                rates[edge].append(pairs_per_s(store, edge, args.seconds, first=100_000 * repeat))
        found = {f"pairs_per_s_core_{edge}": statistics.median(values) for edge, values in rates.items()}
        found["cores_for_one_h100"] = WANTED_PAIRS_PER_S / found["pairs_per_s_core_64"]
        torch.set_num_threads(2)
        found["waited_share"], found["steps_per_s"] = waited_share(store, args)
    print(f"pairs/s/core: 64^3 {found['pairs_per_s_core_64']:.0f}, 96^3 {found['pairs_per_s_core_96']:.0f}")
    print(f"{WANTED_PAIRS_PER_S:.0f} pairs of 64^3 a second (fomo25 in 2 h): {found['cores_for_one_h100']:.1f} cores")
    print(
        f"training waited {100 * found['waited_share']:.2f} % of step time "
        f"({found['steps_per_s']:.2f} steps/s, {args.trainer})"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
