"""Speed of a staged submission from a cold start, and what the time goes into: fresh processes on one core.

python scripts/benchmark_container.py APP [--repeats 3]     (APP: the folder that `container` staged)

Processor seconds do not depend on what else the machine does, wall seconds do; both are shown.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from brainfm.submission.cases import made
from brainfm.submission.challenge import ChallengeTask
from brainfm.submission.predict import BACKBONE, BUNDLE, TASK

IMPORTS = {
    "torch": "import torch",
    "nibabel": "import nibabel",
    "scipy.ndimage": "import scipy.ndimage",
    "the library": "{path}",
    "and the weights": "{path}; {weights}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("app", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=["plain"], help="also typical: the size of the task's scans")
    asked = parser.parse_args()
    task = ChallengeTask.read(asked.app / TASK)
    if task.kind == "embedding":
        path = "from brainfm.probing.features import Encoder"
        weights = f"Encoder.load({str(asked.app / BACKBONE)!r})"
    else:
        path = "from brainfm.inference.predict import predict; from brainfm.tasks.bundle import load_engine"
        weights = f"load_engine({str(asked.app / BUNDLE)!r}, 'cpu')"
    print(f"{task.id}, one core: processor seconds (wall seconds), medians of {asked.repeats}")
    for name, code in IMPORTS.items():
        words = ["-c", code.format(path=path, weights=weights)]
        print(f"  import {name:<18}{shown([timed(asked.app, words) for _ in range(asked.repeats)])}")
    with tempfile.TemporaryDirectory() as folder:
        for case in made(task, Path(folder), asked.cases):
            inputs = [word for flag, file in case.files.items() for word in (f"--{flag}", str(file))]
            words = [str(asked.app / "predict.py"), *inputs, "--output", f"{folder}/answer{task.ending}"]
            print(f"  case {case.name:<20}{shown([timed(asked.app, words) for _ in range(asked.repeats)])}")
    print("the slowest imports, each with what it brings along:")
    for line in slowest(asked.app, path):
        print(f"  {line}")


def timed(app: Path, words: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of a fresh process."""
    env = {**os.environ, "PYTHONPATH": str(app), "OMP_NUM_THREADS": "1"}
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=env)
    wall, after = time.perf_counter() - began, os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system, wall


def shown(times: list[tuple[float, float]]) -> str:
    cpu, wall = (statistics.median(values) for values in zip(*times))
    return f"{cpu:6.2f} s  ({wall:.2f})"


def slowest(app: Path, path: str, most: int = 8) -> list[str]:
    """Of packages at their first level, by the time that `-X importtime` tells."""
    env = {**os.environ, "PYTHONPATH": str(app), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-X", "importtime", "-c", path], capture_output=True, text=True, env=env)
    found = []
    for line in ran.stderr.splitlines():
        match = re.match(r"import time:\s+\d+ \|\s+(\d+) \| +(\S+)$", line)
        if match and match[2].count(".") <= 1:
            found.append((int(match[1]) / 1e6, match[2]))
    return [f"{seconds:6.2f} s  {name}" for seconds, name in sorted(found, reverse=True)[:most]]


if __name__ == "__main__":
    main()
