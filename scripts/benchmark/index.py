"""Speed and memory of `Store.open` on a large index, made up for the purpose.

    python scripts/benchmark/index.py --rows 300000

The index has two visits a subject, three scans and a label a visit, and four further columns, as the large public
collections have them. It is opened in a process of its own, so that the peak is that of the index and not of making it.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from brainfm.data import store as store_module
from brainfm.data.store import Store
from brainfm.specs import PreprocessSpec

OPEN = """
import json, resource, sys, time
from brainfm.data.store import Store
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin, worked = time.perf_counter(), time.process_time()
store = Store.open(sys.argv[1])
seconds = time.perf_counter() - begin
processor = time.process_time() - worked
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
volumes = sum(len(s.scans) + len(s.labels) for s in store.sessions)
print(json.dumps([seconds, processor, after / 1024, before / 1024, volumes]))
"""
VOLUMES = (("flair", "scan"), ("t1", "scan"), ("t2", "scan"), ("lesion_mask", "label"))


def write_index(path: Path, rows: int) -> None:
    """A store's folder with an index of so many volumes and nothing behind it."""
    Store.create(path, PreprocessSpec())
    with open(path / "index.csv", "w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow([*store_module._INDEX, "age", "healthy", "scanner", "sex"])
        for number in range(rows // len(VOLUMES)):
            subject, visit = f"sub-{number // 2:06}", f"ses-{number % 2 + 1}"
            folder = f"collection-{subject}-{visit}-{hashlib.sha256(f'{subject}{visit}'.encode()).hexdigest()[:8]}"
            place = [f"collection/{subject}/ses-1", number % 7 - 3, 0, number % 11]
            further = [f"{20 + number % 7000 / 100:.2f}", number % 2, f"Vendor {number % 13} 3T", "FM"[number % 2]]
            for name, kind in VOLUMES:
                checksum = hashlib.sha256(f"{number}{name}".encode()).hexdigest()
                contrast = name if kind == "scan" else ""
                file = f"{folder}/{name}.b2nd"
                size = [180 + number % 9, 218, 180]
                row = ["collection", subject, visit, name, kind, contrast, file, *size, checksum, *place, *further]
                table.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_index(Path(folder) / "store", arguments.rows)
        size = (Path(folder) / "store" / "index.csv").stat().st_size / 2**20
        print(f"index of {arguments.rows} rows, {size:.0f} MB")
        for _ in range(arguments.repeats):
            command = [sys.executable, "-c", OPEN, str(Path(folder) / "store")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, processor, peak, imports, volumes = json.loads(done.stdout)
            assert volumes == arguments.rows // len(VOLUMES) * len(VOLUMES)
            print(f"open {seconds:.2f} s (processor {processor:.2f} s), peak {peak:.0f} MB ({imports:.0f} MB imports)")


if __name__ == "__main__":
    main()
