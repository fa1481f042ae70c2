"""The store of the comparison of models on ixi2mm (configs/experiment/compare_ixi2mm.yaml): 110 T1s at 2 mm.

    python scripts/evidence/comparison_data.py --data DATA3D --out DIR

Leaves DIR/store: ``age`` and ``sex`` of those of whom they are known, ``dlmuse_labels`` (parcellation),
``tissues_labels`` (its CSF, grey and white matter), ``groups_labels`` (its groups of structures: data/schemes.GROUPS)
and ``side``, which is that of foundation/split.csv. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from foundation_people import prepared, sides, tissue_scans

from brainfm.comparison.people import People
from brainfm.data import layouts
from brainfm.data.manifest import Scan
from brainfm.data.schemes import to_groups
from brainfm.imaging import nifti
from brainfm.volume import Volume

DATASET, SPACING_MM = "ixi2mm", 2.0


def with_groups(scan: Scan, out: Path) -> dict[str, str]:
    """A label volume of the groups that the parcellation tells; what it does not tell is background."""
    parcels = Path(scan.columns["dlmuse_labels"])
    file = (out / "made" / f"{scan.subject}_groups.nii.gz").absolute()
    if not file.exists():
        labels, _ = nifti.read(parcels, labels=True)
        found = to_groups(labels.voxels, "dlmuse", str(parcels), level="groups", unknown="ignore")
        file.parent.mkdir(parents=True, exist_ok=True)
        nifti.write(file, Volume(np.maximum(found, 0).astype(np.uint8), labels.affine_mm))
    return {"groups_labels": str(file)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    side = {f"{dataset}/{subject}": word for (dataset, subject), word in sides().items() if dataset == DATASET}
    participants = args.data / DATASET / "participants_n181.csv"
    told = {scan.subject: scan.columns for scan in layouts.find(args.data / DATASET, participants=participants).scans}
    scans = []
    for scan in tissue_scans(args.data, args.out, sorted(side), People((), (), ())):
        more = {name: told[scan.subject][name] for name in ("age", "sex") if name in told.get(scan.subject, {})}
        more |= with_groups(scan, args.out) | {"side": side[f"{DATASET}/{scan.subject}"]}
        scans.append(replace(scan, columns={**scan.columns, **more}))
    store = prepared(args.out, scans, SPACING_MM, "header")
    print(f"{store.path}: {len(store.sessions)} people")


if __name__ == "__main__":
    main()
