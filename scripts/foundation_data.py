"""The data that the shipped weights learn from: who is held out, what each file is for, and one store.

    python scripts/foundation_data.py --data DATA3D --out DIR [--workers N] [--lists]

Reads a folder of public data sets with its INDEX.tsv (path, licence, ...). Leaves

- foundation/split.csv: dataset, subject, side (train | held). Of each set a third of the people, those whose hashes are
  smallest, at least one; a person of two sets is on one side. Sets of one person, and those that are kept for questions
  only, are told in foundation/sources.csv. An existing split is the authority: a person who would change sides is an
  error.
- foundation/sources.csv: every file, its licence, whether that is share-alike, what the file is used for, and in which
  variant of the weights: ``everything``, ``permissive+everything`` or ``none``.
- DIR/manifest.csv: both sides of the sets for pre-training, with the columns ``side``, ``variant``, ``age``, ``sex``,
  ``healthy``, ``dlmuse_labels``, ``head_labels`` and ``lesion_mask``.
- DIR/lesion_shapes: lesion masks of the training side, to cut shapes from.
- DIR/store: that manifest at 1 mm. Interrupted, the same command goes on.

A head of which there is a label map only gets a picture of its own (contrast ``rendered``), painted with one grey value
a label, so that the store can crop it; training renders such a head anew each time. The T2 of ds000011 lies elsewhere
than its T1: its header is moved by rigid registration (DIR/aligned), its voxels stay as they are.

How coarse a scan was before it came to 1 mm: ``spacing_of(store.recipe(entry, name).file.ras_affine())``.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from brainfm.cli import main as brainfm
from brainfm.data import layouts
from brainfm.data.manifest import Scan, write_manifest
from brainfm.data.store import Store
from brainfm.errors import BrainfmError, ManifestError
from brainfm.imaging import nifti, register
from brainfm.imaging.endings import strip_ending
from brainfm.imaging.register import Head
from brainfm.seeds import stream, unit_hash
from brainfm.volume import Volume

LISTS = Path(__file__).resolve().parents[1] / "foundation"
SALT = "foundation 1"
HELD = 1 / 3
# Further people of one study: one key for a person of both.
STUDY = {"ds002748_2mm": "ds002748"}
# Questions for tests. openms_long may hold people of openms_cross, so both of its people are held.
ASKED_ONLY = {"msd_hippocampus", "openms_long", "upenn_gbm", "tcga_lgg", "isles22"}
ALL_HELD = {"openms_long"}
PERMISSIVE = re.compile(r"^(CC0|PDDL|Apache|CC BY(?!-))")
SHARE_ALIKE = re.compile(r"BY-SA")

CSF = [14, 15, 24, 72, 4, 5, 43, 44, 136, 137, 163, 164]
# Column of prior_means_t1.npy by label. The list of classes that belongs to the priors is not among the data; this one
# is by what the values look like, good enough for a picture that only settles where the head is.
GREY_CLASSES: dict[int, list[int]] = {
    1: CSF, 2: [2, 41], 3: [3, 42], 4: [7, 46], 5: [8, 47], 6: [10, 49], 7: [11, 12, 26, 50, 51, 58], 8: [13, 52],
    9: [16], 10: [17, 18, 53, 54], 11: [25, 57], 12: [30, 62], 13: [28, 60, 85], 14: [502], 15: [506], 16: [507],
    17: [508], 18: [509], 19: [511], 20: [512], 21: [514], 22: [515], 23: [516], 24: [530],
}  # fmt: skip


@dataclass(frozen=True)
class File:
    """One row of INDEX.tsv: ``path`` below the folder of data sets; subjects as a manifest names them."""

    path: str
    dataset: str
    subject: str
    licence: str


# ---- who is held out -------------------------------------------------------------------------------------------------


def read_index(data: Path) -> list[File]:
    """Raises: ManifestError where the folder has no index."""
    index = data / "INDEX.tsv"
    if not index.is_file():
        raise ManifestError(f"no INDEX.tsv in {data}, expected the folder of data sets with its list of files")
    with index.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    return [File(r["path"], r["path"].split("/")[0], subject_of(r["path"]), r["licence"]) for r in rows]


def subject_of(path: str) -> str:
    """The person of a file below the folder of data sets, as `brainfm manifest` names them."""
    parts = path.split("/")
    if len(parts) > 2 and parts[0] != "msd_hippocampus":
        return re.sub(r"^(UPENN-GBM-\d+)_\d+$", r"\1", parts[1])
    return strip_ending(parts[-1]).removesuffix("_lesion_mask")


def person(dataset: str, subject: str) -> str:
    """The key of a person in all sets."""
    return f"{STUDY.get(dataset, dataset)}/{subject}"


def split_people(people: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """(dataset, subject) -> ``train`` or ``held``.

    Of each set those with the smallest hashes are held, a third and at least one; who is held in one set is so in all.
    """
    sets: dict[str, set[str]] = defaultdict(set)
    for dataset, subject in people:
        sets[dataset].add(subject)
    held = set()
    for dataset, subjects in sets.items():
        keys = sorted((person(dataset, s) for s in subjects), key=lambda key: (unit_hash(key, SALT), key))
        held |= set(keys if dataset in ALL_HELD else keys[: max(1, round(len(keys) * HELD))])
    everyone = sorted((dataset, subject) for dataset, subjects in sets.items() for subject in subjects)
    return {who: "held" if person(*who) in held else "train" for who in everyone}


def read_split(file: Path) -> dict[tuple[str, str], str]:
    with file.open(newline="", encoding="utf-8") as table:
        return {(row["dataset"], row["subject"]): row["side"] for row in csv.DictReader(table)}


def write_split(file: Path, sides: Mapping[tuple[str, str], str]) -> None:
    """Raises: ManifestError where an existing file has a person on another side."""
    known = read_split(file) if file.exists() else {}
    for who, side in known.items():
        if sides.get(who, side) != side:
            raise ManifestError(
                f"{file} has {'/'.join(who)} on the side {side}, now {sides[who]} is found; expected the same, since "
                "backbones may have been trained by that split"
            )
    merged = dict(sorted({**known, **sides}.items()))
    _write_csv(file, ("dataset", "subject", "side"), [(*who, side) for who, side in merged.items()])


# ---- what each file is for -------------------------------------------------------------------------------------------


def use_of(file: File, side: str) -> str:
    """What a file is used for: parts joined by ``; ``, or ``test only``, or ``not used``."""
    name = file.path.rsplit("/", 1)[-1]
    if "probseg" in name:
        return "not used"
    if side == "held" or file.dataset in ASKED_ONLY:
        return "test only"
    if file.dataset == "soop_lesions":
        return "lesion shapes"
    if name.endswith("lesion_mask.nii.gz"):
        return "label target; lesion shapes"
    if name.endswith("_dseg.nii.gz") or file.dataset == "synthseg_labels":
        return "label target; rendering map"
    return "image"


def variant_of(licence: str) -> str:
    """``permissive+everything`` where the licence lets weights go under a permissive one, else ``everything``."""
    return "permissive+everything" if PERMISSIVE.match(licence) else "everything"


# Files beside the images, which the index does not list, and what they are used for.
SIDE_FILES = {
    "ds000011/participants.tsv": "age and sex",
    "ds002748/participants.tsv": "age and sex",
    "ds002748_2mm/participants.tsv": "age and sex",
    "ixi2mm/DLMUSE_Volumes.csv": "test only",
    "ixi2mm/participants_n181.csv": "age and sex",
    "synthseg_labels/prior_means_t1.npy": "grey values of the pictures that stand for label maps",
}


def source_rows(files: Iterable[File], sides: Mapping[tuple[str, str], str]) -> list[tuple[str, ...]]:
    """Rows of sources.csv: dataset, file, subject, side, licence, share_alike, used_for, variant."""
    files = list(files)
    rows = []
    for file in files:
        side = sides[file.dataset, file.subject]
        used = use_of(file, side)
        licence = file.licence
        if file.path.endswith("_DLMUSE_dseg.nii.gz"):
            licence = "SBIA 1.1 (derivatives allowed, its text must travel, research purpose); of CC BY-SA 3.0 images"
        variant = "none" if used in ("test only", "not used") else variant_of(licence)
        rows.append((file.dataset, file.path, file.subject, side, licence, _share_alike(licence), used, variant))
    licences = {file.dataset: file.licence for file in files}
    for path, used in SIDE_FILES.items():
        dataset = path.split("/")[0]
        if dataset in licences:
            licence = licences[dataset]
            variant = "none" if used == "test only" else variant_of(licence)
            rows.append((dataset, path, "", "", licence, _share_alike(licence), used, variant))
    return sorted(rows)


def _share_alike(licence: str) -> str:
    return "yes" if SHARE_ALIKE.search(licence) else "no"


def _write_csv(file: Path, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    part.replace(file)


# ---- the manifest ----------------------------------------------------------------------------------------------------


def paint(labels: np.ndarray, means: np.ndarray, number: int) -> np.ndarray:
    """A picture of a label map: int16 of its shape, one grey value a label with a spread of a tenth, 0 outside.

    Args:
        labels: whole numbers, any shape.
        means: [25], grey values in the order of GREY_CLASSES.
        number: of the map; gives the noise.

    Raises:
        ManifestError: for a label without a grey value.
    """
    table = np.full(1 + max(max(ids) for ids in GREY_CLASSES.values()), np.nan, np.float32)
    table[0] = 0
    for place, ids in GREY_CLASSES.items():
        table[ids] = means[place]
    grey = np.take(table, np.minimum(labels, len(table) - 1))
    if np.isnan(grey).any() or labels.max() >= len(table):
        raise ManifestError(f"labels {sorted({int(v) for v in labels[np.isnan(grey)]})[:8]} have no grey value")
    noise = stream(0, "foundation picture", number).standard_normal(grey.shape, dtype=np.float32)
    return np.rint(grey * (1 + 0.1 * noise)).clip(0, 32767).astype(np.int16)


def rendered_heads(folder: Path, out: Path) -> list[Scan]:
    """A scan for each whole-head label map, its picture painted where it is not there yet."""
    means = np.load(folder / "prior_means_t1.npy", allow_pickle=False)[0]
    scans = []
    for number, file in enumerate(sorted(folder.glob("*.nii.gz"))):
        name = strip_ending(file.name)
        picture = out / "rendered" / f"{name}_rendered.nii.gz"
        if not picture.exists():
            picture.parent.mkdir(parents=True, exist_ok=True)
            labels, _ = nifti.read(file, labels=True)
            nifti.write(picture, Volume(paint(labels.voxels, means, number), labels.affine_mm))
        columns = {"head_labels": os.path.abspath(file)}
        scans.append(Scan("synthseg_labels", name, "", "rendered", str(picture.absolute()), columns))
    return scans


def with_aligned_t2(scans: Iterable[Scan], out: Path) -> list[Scan]:
    """The scans of a set with each T2's header moved onto the session's T1; a T2 that cannot be is left out, aloud."""
    scans = list(scans)
    t1_of = {scan.key: Path(scan.path) for scan in scans if scan.contrast == "t1"}
    kept = []
    for scan in scans:
        if scan.contrast == "t2":
            moved = out / "aligned" / f"{scan.subject}_T2w.nii.gz"
            if not moved.exists() and not _align(t1_of[scan.key], Path(scan.path), moved):
                continue
            scan = replace(scan, path=str(moved.absolute()))
        kept.append(scan)
    return kept


def _align(fixed: Path, moving: Path, out: Path) -> bool:
    one, two = (nifti.read(file)[0] for file in (fixed, moving))
    found = register.rigid(Head.of(one), Head.of(two))
    said = f"moved {found.moved_mm:.1f} mm, {found.turned_deg:.1f} degrees, "
    said += f"score {found.score_before:.3f} to {found.score_after:.3f}"
    if not found.trusted:
        print(f"{moving}: left out, registration is not to be trusted ({found.refused or said})")
        return False
    print(f"{moving.name} of {moving.parents[1].name}: {said}")
    out.parent.mkdir(parents=True, exist_ok=True)
    nifti.write(out, Volume(two.voxels, np.array(found.matrix_mm) @ two.affine_mm))
    return True


def scans_for_training(data: Path, out: Path) -> list[Scan]:
    """The scans of all sets for pre-training, both sides, with the columns that say what is known of them."""
    lesions = {"lesion": "*_lesion_mask.nii.gz"}
    ixi = layouts.find(
        data / "ixi2mm", labels={"dlmuse": "*_DLMUSE_dseg.nii.gz"}, participants=data / "ixi2mm/participants_n181.csv"
    ).scans
    scans = [*ixi, *rendered_heads(data / "synthseg_labels", out)]
    scans += with_aligned_t2(layouts.find(data / "ds000011").scans, out)
    for name in ("ds002748", "ds002748_2mm"):
        scans += layouts.find(data / name).scans
    for name in ("openms_cross", "niimath_bitmap"):
        scans += layouts.find(data / name, masks=lesions).scans
    return scans


def healthy(scan: Scan) -> str:
    """1, 0, or nothing where the set does not tell: the depressed of ds002748, and heads that are label maps."""
    if scan.dataset in ("ixi2mm", "ds000011") or scan.subject == "healthy01" or scan.columns.get("group") == "control":
        return "1"
    return "0" if scan.columns.get("lesion_mask") else ""


def described(scan: Scan, sides: Mapping[tuple[str, str], str], licences: Mapping[str, str]) -> Scan:
    """The scan with its side, its variant and no more of its set's own columns than age and sex.

    Raises: ManifestError where the split does not know the person.
    """
    who = (scan.dataset, scan.subject)
    if who not in sides:
        raise ManifestError(f"{scan.path}: person {'/'.join(who)} is not in the split, expected everyone of INDEX.tsv")
    labels = ("dlmuse_labels", "head_labels", "lesion_mask")
    columns = {name: scan.columns.get(name, "") for name in ("age", "sex", *labels)}
    columns |= {"side": sides[who], "variant": variant_of(licences[scan.dataset]), "healthy": healthy(scan)}
    return replace(scan, columns=columns)


def gather_shapes(data: Path, out: Path, rows: Iterable[tuple[str, ...]]) -> int:
    """Copies the lesion masks that shapes may be cut from; returns their number. Others that lie there are removed."""
    folder = out / "lesion_shapes"
    wanted = {row[1].replace("/", "-"): data / row[1] for row in rows if "lesion shapes" in row[6]}
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.name not in wanted:
            file.unlink()
    for name, source in wanted.items():
        if not (folder / name).exists():
            shutil.copyfile(source, folder / name)
    return len(wanted)


# ---- all of it -------------------------------------------------------------------------------------------------------


def write_lists(data: Path, lists: Path) -> tuple[dict[tuple[str, str], str], list[tuple[str, ...]], dict[str, str]]:
    """The split and the sources, written; with the licence of each set."""
    files = read_index(data)
    write_split(lists / "split.csv", split_people((file.dataset, file.subject) for file in files))
    sides = read_split(lists / "split.csv")
    rows = source_rows(files, sides)
    header = ("dataset", "file", "subject", "side", "licence", "share_alike", "used_for", "variant")
    _write_csv(lists / "sources.csv", header, rows)
    return sides, rows, {file.dataset: file.licence for file in files}


def summary(store: Store) -> list[str]:
    """One line a set: sessions and scans on each side."""
    sessions: Counter[tuple[str, str]] = Counter()
    scans: Counter[tuple[str, str]] = Counter()
    for entry in store.sessions:
        sessions[entry.dataset, entry.columns["side"]] += 1
        scans[entry.dataset, entry.columns["side"]] += len(entry.scans)
    return [
        f"{name}: train {sessions[name, 'train']} sessions ({scans[name, 'train']} scans), "
        f"held {sessions[name, 'held']} ({scans[name, 'held']})"
        for name in sorted({name for name, _ in sessions})
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets, with INDEX.tsv")
    parser.add_argument("--out", type=Path, help="where manifest, shapes and store go; needed without --lists")
    parser.add_argument("--workers", type=int, default=1, help="processes of prepare")
    parser.add_argument("--lists", action="store_true", help="write split.csv and sources.csv only")
    args = parser.parse_args()
    if not args.lists and args.out is None:
        parser.error("--out is needed")
    began = time.perf_counter()
    # Rows of the manifest are part of what makes a prepared session current: one spelling from wherever it is run.
    args.data = Path(os.path.abspath(args.data))
    try:
        sides, rows, licences = write_lists(args.data, LISTS)
        if args.lists:
            return 0
        scans = [described(scan, sides, licences) for scan in scans_for_training(args.data, args.out)]
        write_manifest(args.out / "manifest.csv", scans)
        shapes = gather_shapes(args.data, args.out, rows)
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(scans)} scans, {shapes} lesion masks, {time.perf_counter() - began:.0f} s")
    words = [f"manifest={args.out / 'manifest.csv'}", f"store={args.out / 'store'}", "preprocess=iso1mm"]
    code = brainfm(["prepare", *words, f"workers={args.workers}"])
    if code:
        return code
    print(*summary(Store.open(args.out / "store")), sep="\n")
    size = sum(file.stat().st_size for file in (args.out / "store").rglob("*") if file.is_file())
    print(f"store {size / 1e6:.0f} MB, {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
