"""A folder in the manner of BIDS with T2 and FLAIR rendered from T1s and their DLMUSE label maps.

    python scripts/evidence/render_contrasts.py --data ixi2mm --out DIR [--contrasts t2 flair] [--subjects N] [--seed S]
    brainfm manifest root=DIR out=DIR/manifest.csv layout=bids labels.muse='*_dseg.nii.gz'

Reads ID/ID_T1w.nii.gz and ID/ID_DLMUSE_dseg.nii.gz, and participants_age_sex.csv (MRID, Age, Sex) beside them. The
T1s and label maps are copied. A subject whose T1 or labels cannot be used is named and left out. The rendered scans are
for trying questions about several contrasts; they hold nothing that the T1 and the labels do not hold.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
import time
from pathlib import Path

from brainfm import seeds
from brainfm.errors import BrainfmError
from brainfm.imaging import nifti
from brainfm.synthesis.contrast import SIGNALS, draw, render
from brainfm.volume import Volume

# Tissues of the MUSE regions: https://github.com/CBICA/NiChart_DLMUSE, dictionary of single ROIs.
MUSE: dict[int, str] = {
    **dict.fromkeys((1, 4, 11, 46, 49, 50, 51, 52), "csf"),
    **dict.fromkeys((35, 61, 62, 69), "brainstem"),
    **dict.fromkeys((23, 30, 36, 37, 57, 58, 59, 60, 75, 76), "deep_grey"),
    **dict.fromkeys((55, 56), "pallidum"),
    **dict.fromkeys((31, 32, 38, 39, 47, 48, 71, 72, 73, *range(100, 208)), "grey"),
    **dict.fromkeys((40, 41, *range(81, 96)), "white"),
}
ENDINGS = {"t2": "T2w", "flair": "FLAIR", "pd": "PDw"}


def participants(file: Path) -> dict[str, tuple[str, str]]:
    """MRID -> (age, sex)."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as table:
        return {row["MRID"]: (row["Age"] or "n/a", row["Sex"] or "n/a") for row in csv.DictReader(table)}


def convert(folder: Path, out: Path, name: str, contrasts: list[str], seed: int, index: int) -> None:
    t1_file, labels_file = (folder / f"{folder.name}_{ending}.nii.gz" for ending in ("T1w", "DLMUSE_dseg"))
    t1, _ = nifti.read(t1_file)
    labels, _ = nifti.read(labels_file, labels=True)
    rendered = {}
    for contrast in contrasts:
        look = draw(seeds.stream(seed, f"contrast.{contrast}", index), contrast, MUSE)
        rendered[contrast] = render(t1, labels, MUSE, look)
    anat = out / name / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(t1_file, anat / f"{name}_T1w.nii.gz")
    shutil.copyfile(labels_file, anat / f"{name}_dseg.nii.gz")
    for contrast, volume in rendered.items():  # as a scanner stores it
        whole = Volume(volume.voxels.round().clip(0, 32767).astype("int16"), volume.affine_mm)
        nifti.write(anat / f"{name}_{ENDINGS[contrast]}.nii.gz", whole)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contrasts", nargs="+", choices=sorted(SIGNALS), default=["t2", "flair"])
    parser.add_argument("--subjects", type=int, help="the first so many; default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folders = sorted(file.parent for file in args.data.glob("*/*_DLMUSE_dseg.nii.gz"))
    if not folders:
        print(f"{args.data}: no */*_DLMUSE_dseg.nii.gz, expected the folder that holds the subjects", file=sys.stderr)
        return 2
    people = participants(args.data / "participants_age_sex.csv")
    began, rows, left_out = time.perf_counter(), [], 0
    for index, folder in enumerate(folders[: args.subjects]):
        name = f"sub-{folder.name.split('-')[0]}"
        try:
            convert(folder, args.out, name, args.contrasts, args.seed, index)
        except BrainfmError as error:
            print(f"left out: {folder.name}: {error}")
            left_out += 1
            continue
        rows.append((name, *people.get(folder.name, ("n/a", "n/a"))))
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "participants.tsv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerows([("participant_id", "age", "sex"), *rows])
    description = {
        "Name": "T1 with rendered contrasts",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{
            "Name": "brainfm scripts/evidence/render_contrasts.py",
            "Description": f"{', '.join(args.contrasts)} rendered from T1 and DLMUSE labels, seed {args.seed}; "
                           "no scanner made them. The licence of the source data applies.",
        }],
    }  # fmt: skip
    (args.out / "dataset_description.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    seconds = time.perf_counter() - began
    print(f"{len(rows)} subjects in {seconds:.0f} s, {left_out} left out; {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
