"""Scope: what ordinary heads of the training side measure, and which scans of the held side and which impossible ones
are flagged.

    python scripts/evidence/scope.py --manifest MANIFEST [--held N]

MANIFEST is that of scripts/foundation_data.py. Prints the ranges for imaging/scope.py (least and largest of all real
scans of the side `train`, widened), the held scans that they flag, and what becomes of an
empty head, a CT, half a head and noise made of a held scan.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from brainfm.data.manifest import Scan, read_manifest
from brainfm.errors import ScanError
from brainfm.imaging import nifti, scope
from brainfm.imaging.intensity import foreground
from brainfm.volume import Volume

SKULL_MM = 16.0  # from the outside of a head to where made ones change


def impossible(volume: Volume) -> Iterator[tuple[str, Volume]]:
    """An ordinary scan made into what is none."""
    voxels, affine = volume.voxels.astype(np.float32), volume.affine_mm
    rng = np.random.default_rng(0)
    yield "nothing", Volume(np.zeros_like(voxels), affine)
    head = scope.filled(ndimage.binary_closing(foreground(volume), iterations=3))
    inner = ndimage.binary_erosion(head, iterations=round(SKULL_MM / volume.spacing_mm[0]))
    hollow = np.where(inner, voxels.min() + 0.02 * np.ptp(voxels), voxels)
    yield "empty head", Volume(hollow, affine)
    ct = np.where(head, 900.0, -1000.0)
    ct[inner] = 35 + 5 * rng.standard_normal(int(inner.sum()))
    yield "CT", Volume(ct.astype(np.float32), affine)
    yield "CT from 0 on", Volume((ct + 1000).astype(np.float32), affine)
    x, y, z = (np.nonzero(head.any(axis=tuple(k for k in range(3) if k != a)))[0] for a in range(3))
    mid = [int((side[0] + side[-1]) / 2) for side in (x, y, z)]
    for axis, name in enumerate(("left half", "back half", "lower half")):
        half, some = voxels.copy(), [slice(None)] * 3
        some[axis] = slice(mid[axis], None)
        half[tuple(some)] = voxels.min()
        yield f"{name}, rest dark", Volume(half, affine)
        some[axis] = slice(None, mid[axis])
        yield f"{name}, rest cut off", Volume(np.ascontiguousarray(voxels[tuple(some)]), affine)
    upper = voxels.copy()
    upper[:, :, : mid[2]] = voxels.min()
    yield "upper half, rest dark", Volume(upper, affine)
    yield "noise", Volume(rng.rayleigh(1, voxels.shape).astype(np.float32), affine)
    yield "noise in a head", Volume(np.where(head, rng.rayleigh(1, voxels.shape), 0).astype(np.float32), affine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--held", type=int, default=1000, help="held scans at most")
    given = parser.parse_args()
    manifest = read_manifest(given.manifest)
    real = [scan for scan in manifest.scans if scan.contrast != "rendered"]

    def read(scan: Scan) -> Volume:
        return nifti.read(manifest.resolve(scan.path))[0]

    train = [scope.measures(read(scan)) for scan in real if scan.columns["side"] == "train"]
    print(f"{len(train)} scans of the training side")
    for name in train[0]:
        values = [row[name] for row in train]
        low, high = min(values), max(values)
        low_end, high_end = scope.widened(low, high)
        print(f"{name}: {low:.4g} to {high:.4g}, wider {low_end:.4g} to {high_end:.4g}")
    held = [scan for scan in real if scan.columns["side"] == "held"][: given.held]
    flagged = {scan.path: said for scan in held if (said := scope.strange(read(scan)))}
    print(f"{len(flagged)} of {len(held)} held scans flagged:", *flagged.items(), sep="\n  ")
    for name, volume in impossible(read(held[0])):
        try:
            found = {k: round(v, 3) for k, v in scope.measures(volume).items()}
        except ScanError as error:
            found = {}
            print(f"{name}: {error}")
        print(f"{name}: {scope.strange(volume)} {found}")


if __name__ == "__main__":
    main()
