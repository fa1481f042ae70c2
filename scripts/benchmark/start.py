"""Speed of `brainfm --help` and `import brainfm`: medians of fresh processes.

    python scripts/benchmark/start.py [--repeats 11] [--modules 12]

The last lines are about `import brainfm; brainfm.predict` alone: what it takes beyond `import torch`, as processor time
and as seconds, and the packages beside torch's that take longest, by `python -X importtime`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

CASES = {
    "brainfm --help": ["-m", "brainfm.cli", "--help"],
    "brainfm pretrain --help": ["-m", "brainfm.cli", "pretrain", "--help"],
    "import brainfm": ["-c", "import brainfm"],
    "import brainfm; brainfm.predict": ["-c", "import brainfm; brainfm.predict"],
}
BEYOND = """
import json, time, torch
began, used = time.perf_counter(), time.process_time()
import brainfm
brainfm.predict
print(json.dumps([time.perf_counter() - began, time.process_time() - used]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--modules", type=int, default=8)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, words in CASES.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:<34}{statistics.median(values):.3f} s (median of {repeats})")
    beyond = [json.loads(subprocess.check_output([sys.executable, "-c", BEYOND])) for _ in range(repeats)]
    for name, values in zip(("seconds", "processor time"), zip(*beyond)):
        print(f"predict beyond torch, {name:<15}{statistics.median(values):.3f} s (median of {repeats})")
    for name, took in slowest(arguments.modules):
        print(f"    {name:<30}{took:.3f} s")


def slowest(count: int) -> list[tuple[str, float]]:
    """Packages that ``predict`` imports after torch, with what is in them: the longest."""
    code = "import torch\nimport brainfm\nbrainfm.predict"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    names = [line[2].strip() for line in lines]
    took: dict[str, float] = {}
    for own, _, name in lines[names.index("torch") + 1 :]:
        package = ".".join(name.strip().split(".")[:2])
        took[package] = took.get(package, 0.0) + float(own) / 1e6
    return sorted(took.items(), key=lambda item: -item[1])[:count]


if __name__ == "__main__":
    main()
