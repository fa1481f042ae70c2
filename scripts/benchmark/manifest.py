"""Speed of a manifest of 60,000 scans: files are empty, so that any image read would fail.

python scripts/benchmark/manifest.py [--scans 60000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from brainfm.data.layouts import find
from brainfm.data.manifest import read_manifest, write_manifest

CONTRASTS = ("t1", "t2", "flair", "dwi")


def fomo60k(root: Path, number: int) -> None:
    folder = root / f"sub_{number // 4 + 1}" / "ses_1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{CONTRASTS[number % 4]}.nii.gz").touch()


def bids(root: Path, number: int) -> None:
    folder = root / f"sub-{number // 4:05d}" / "ses-01" / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    ending = ("T1w", "T2w", "FLAIR", "PDw")[number % 4]
    (folder / f"sub-{number // 4:05d}_ses-01_{ending}.nii.gz").touch()


def plain(root: Path, number: int) -> None:
    folder = root / f"patient{number // 4:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"patient{number // 4:05d}_{CONTRASTS[number % 4]}.nii.gz").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=60_000)
    count = parser.parse_args().scans
    for name, layout in (("fomo60k", fomo60k), ("bids", bids), ("folder", plain)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            for number in range(count):
                layout(root, number)
            began = time.perf_counter()
            found = find(root)
            indexed = time.perf_counter()
            write_manifest(Path(folder) / "manifest.csv", found.scans)
            written = time.perf_counter()
            read_manifest(Path(folder) / "manifest.csv")
            read = time.perf_counter()
        print(f"{name:<9}{len(found.scans)} scans found in {indexed - began:.1f} s, "
              f"written in {written - indexed:.1f} s, read in {read - written:.1f} s")  # fmt: skip


if __name__ == "__main__":
    main()
