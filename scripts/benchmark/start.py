"""How long `brainfm --help` and `import brainfm` take: medians of fresh processes.

python scripts/benchmark/start.py [--repeats 11]
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(repeats):
        for name, words in CASES.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        print(f"{name:<34}{statistics.median(values):.3f} s (median of {repeats})")


if __name__ == "__main__":
    main()
