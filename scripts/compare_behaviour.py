"""Comparison of two versions of the code: one small cohort through every verb, and what came out side by side.

    python scripts/compare_behaviour.py make BEFORE --data ../shared/data3d     (at one commit)
    python scripts/compare_behaviour.py make AFTER --data ../shared/data3d      (at another)
    python scripts/compare_behaviour.py compare BEFORE AFTER

``make`` writes a generated cohort and, with --data, takes a few real scans; it runs ``python -m brainfm.cli VERB`` of
the checkout it lies in on one thread, and keeps in DIR/found.json what came out: every table and number as it stands,
every volume, store entry and weight as shape, sum, sum of magnitudes, a weighted sum and sha256. DIR/work may go
afterwards. ``compare`` lists what differs: above a relative 1e-5 it fails (exit 1); below, or where only the bits of a
volume have changed, it says so. What depends on the clock, the machine, the commit or the folder is left out, and so
are HTML pages.
The script imports nothing of brainfm, so that it runs before and after names and modules have moved.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
_SHOWN = 150  # characters of a value
FLOOR = 1e-6  # of what a difference is relative to: numbers that are nothing but rounding are not compared by ratio
# Keys of JSON files and columns of tables that the clock, the machine or the commit decide.
PASSING = re.compile(
    r"^(provenance|parents|command|commit|version|host|device|versions|software|created|date|started|finished"
    r"|receipt|stamps|.*_ns|.*(hours|seconds|minutes|kwh|memory|_gb|_mb|per_second|speed|time).*)$"
)
HASHED = ("weights", "backbone", "bundle")  # of a file that holds its provenance, in which the commit is named
SKIPPED = re.compile(
    r"(\.html|\.ckpt|\.log|\.png|\.md|\.lock|checksums\.json|provenance\.json|receipt\.json|tfevents.*)$"
)
GREYS = {"T1w": (0, 30, 70, 110, 40, 80, 60, 75), "FLAIR": (0, 25, 95, 80, 20, 85, 75, 80)}  # by tissue, see _tissues
OBJECTIVES = {
    "mae": ("objective=mae", "objective.latent_channels=16"),
    "contrastive": ("objective=contrastive", "objective.latent_channels=16", "objective.hidden_channels=16",
                    "objective.projected_channels=8", "objective.queue=32", "objective.reconstruction_weight=0.5"),
    "cross_contrast": ("objective=cross_contrast", "objective.latent_channels=16", "data.augment=light"),
    "anatomy_pathology": ("objective=anatomy_pathology", "objective.latent_channels=20", "objective.mask_unit_vox=8",
                          "objective.agreement_weight=0.1"),
    "dense_split": ("objective=dense_split", "optim=wsd", "optim.warmup_steps=5", "data.windows.coarse_steps=5",
                    "data.windows.settle_steps=15", "objective.points=64", "data.augment=light"),
}  # fmt: skip
TINY = ("backbone=unet_tiny", "trainer=cpu", "trainer.workers=0", "trainer.threads=1", "trainer.batch_size=2",
        "trainer.log_every=5")  # fmt: skip


# ---- the cohort ------------------------------------------------------------------------------------------------------


def _tissues(ids: np.ndarray) -> np.ndarray:
    """0 outside, 1 fluid, 2 cortex, 3 white, 4 ventricle, 5 deep grey, 6 cerebellum and medial temporal, 7 stem."""
    table = np.zeros(2036, np.int64)
    groups = ((24,), (1028, 2028), (2, 41, 7, 46), (4, 43), (10, 49), (17, 53, 8, 47), (16,))
    for tissue, numbers in enumerate(groups, 1):
        table[list(numbers)] = tissue
    return table[ids]


def _label_map(x: np.ndarray, y: np.ndarray, z: np.ndarray, ventricle: float) -> np.ndarray:
    """SynthSeg ids of a head; coordinates run from -1 to 1, left to right, back to front, down to up."""
    radius, right = np.sqrt(x**2 + y**2 + z**2), x > 0
    ids = np.zeros(x.shape, np.int64)
    for limit, (left_id, right_id) in ((0.9, (24, 24)), (0.84, (1028, 2028)), (0.7, (2, 41))):
        ids = np.where(radius < limit, np.where(right, right_id, left_id), ids)
    for place, size, (left_id, right_id) in (
        ((0.15, 0.1, 0.1), ventricle, (4, 43)),
        ((0.25, 0.0, -0.1), 0.13, (10, 49)),
        ((0.4, -0.1, -0.3), 0.12, (17, 53)),
        ((0.25, -0.45, -0.45), 0.22, (8, 47)),
        ((0.25, -0.45, -0.45), 0.12, (7, 46)),
        ((0.0, -0.2, -0.55), 0.14, (16, 16)),
    ):
        near = (np.abs(x) - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2 < size**2
        ids = np.where(near, np.where(right, right_id, left_id), ids)
    return ids


def write_cohort(root: Path, people: int = 14, edge: int = 36) -> None:
    """A BIDS folder: T1w and FLAIR of each person, one with two visits and one without a FLAIR, label maps of most,
    lesion masks, and a table with age, sex, site and health; age shows in the ventricles, sex in the size."""
    import nibabel as nib

    affine = np.diag([2.5, 2.5, 2.5, 1.0])
    affine[:3, 3] = -2.5 * (edge - 1) / 2
    table = ["participant_id\tage\tsex\tsite\thealthy"]
    for number in range(people):
        rng = np.random.default_rng(number)
        age, sex, ill = round(float(rng.uniform(20, 80)), 1), "FM"[number % 2], number % 3 != 0
        table.append(f"sub-{number:02d}\t{age}\t{sex}\t{'AB'[number // 2 % 2]}\t{int(not ill)}")
        for visit in (1, 2) if number == 1 else (1,):
            size = 1.0 if sex == "F" else 1.06
            x, y, z = np.meshgrid(*[np.linspace(-1, 1, edge) / size * (1 + rng.uniform(0, 0.04)) for _ in range(3)],
                                  indexing="ij")  # fmt: skip
            ids = _label_map(x, y, z, 0.10 + age / 800)
            near = (x + 0.35) ** 2 + y**2 + (z - rng.uniform(-0.2, 0.2)) ** 2 < rng.uniform(0.02, 0.06)
            lesion = ill & near & (ids > 0)
            folder = root / f"sub-{number:02d}" / f"ses-{visit}" / "anat"
            folder.mkdir(parents=True)
            stem = f"sub-{number:02d}_ses-{visit}"
            nib.save(nib.Nifti1Image(lesion.astype(np.uint8), affine), folder / f"{stem}_lesion_mask.nii")
            if number < people - 3:
                nib.save(nib.Nifti1Image(ids.astype(np.int16), affine), folder / f"{stem}_dseg.nii")
            for contrast, greys in GREYS.items():
                noise = rng.normal(0, 4, ids.shape)
                voxels = np.array(greys, float)[_tissues(ids)] * (1 + 0.1 * y) + noise * (ids > 0)
                voxels += lesion * (60 if contrast == "FLAIR" else -30)
                if not (number == 2 and contrast == "FLAIR"):
                    path = folder / f"{stem}_{contrast}.nii"
                    nib.save(nib.Nifti1Image(voxels.clip(0).astype(np.float32), affine), path)
    (root / "participants.tsv").write_text("\n".join(table) + "\n")
    (root / "dataset_description.json").write_text('{"Name": "generated", "BIDSVersion": "1.8.0"}\n')


# ---- the verbs -------------------------------------------------------------------------------------------------------


def run(work: Path, verb: str, *words: str) -> None:
    """``brainfm VERB`` in a process of its own; what it printed is kept in work/log.

    Raises: SystemExit where it failed.
    """
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {"PYTHONPATH": str(ROOT)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "brainfm.cli", verb, *words],
        cwd=ROOT,
        env={**os.environ, **one},
        capture_output=True,
        text=True,
    )
    text = f"$ brainfm {verb} {' '.join(words)}\n{done.stdout}{done.stderr}\n"
    with (work / "verbs.log").open("a") as log:
        log.write(text)
    if done.returncode:
        raise SystemExit(f"{text[-3000:]}\nbrainfm {verb} ended with {done.returncode}")
    print(f"{time.monotonic() - began:6.1f} s  brainfm {verb} {words[0]}", flush=True)


def generated(work: Path) -> None:
    """Every verb on the generated cohort."""
    write_cohort(work / "cohort")
    manifest, store = work / "manifest.csv", work / "store"
    run(work, "manifest", f"root={work / 'cohort'}", f"out={manifest}", "masks.lesion=*lesion_mask*",
        "labels.dseg=*dseg*")  # fmt: skip
    run(work, "doctor", f"manifest={manifest}", "workers=1")
    run(work, "prepare", f"manifest={manifest}", f"store={store}", "preprocess.spacing_mm=3", "workers=1")
    for name, words in OBJECTIVES.items():
        probed = () if name in ("cross_contrast", "dense_split") else ("probe=null", "guard=null")
        run(work, "pretrain", f"run={work / 'pretrain' / name}", f"store={store}", *TINY, "trainer.max_steps=20",
            "trainer.evaluate_every=10", "data.patch_vox=[16,16,16]", "data.validation_batches=2", *words,
            *probed)  # fmt: skip
    source = f"backbone_from={work / 'pretrain' / 'mae' / 'backbone.safetensors'}"
    dense = f"backbone_from={work / 'pretrain' / 'dense_split' / 'backbone.safetensors'}"
    tune = (f"store={store}", *TINY, "report=false", "task.patch_vox=[16,16,16]", "trainer.max_steps=10")
    run(work, "finetune", f"run={work / 'lesion'}", "task=segmentation", "task.target=lesion", source, *tune,
        "optim.lr=3e-3", "data.foreground_share=0.9", "folds=2")  # fmt: skip
    run(work, "finetune", f"run={work / 'sex'}", "task=classification", "task.target=sex", dense, *tune,
        "task.candidates=[mean,volumes,features,tuned]", "audit_columns=[age]", "folds=3")  # fmt: skip
    run(work, "finetune", f"run={work / 'age'}", "task=regression", "task.target=age", source, *tune,
        "baselines=[features,volumes]", "adapt=frozen", "folds=3")  # fmt: skip
    anat = work / "cohort" / "sub-04" / "ses-1" / "anat" / "sub-04_ses-1"
    inputs = (f"input.flair={anat}_FLAIR.nii", f"input.t1={anat}_T1w.nii")
    run(work, "predict", f"bundle={work / 'lesion' / 'bundle'}", *inputs, f"out={work / 'predicted' / 'mask.nii.gz'}")
    run(work, "predict", f"bundle={work / 'sex' / 'bundle'}", *inputs,
        f"out={work / 'predicted' / 'sex.json'}")  # fmt: skip
    run(work, "evaluate", f"bundle={work / 'lesion' / 'bundle'}", f"manifest={manifest}", f"out={work / 'scores'}")
    run(work, "explain", f"bundle={work / 'age' / 'bundle'}", *inputs, f"out={work / 'predicted' / 'why.nii.gz'}")
    run(work, "anatomy", f"backbone={work / 'pretrain' / 'dense_split' / 'backbone.safetensors'}", inputs[1],
        f"out={work / 'anatomy'}", "spacing_mm=3")  # fmt: skip
    backbone = f"backbone={work / 'pretrain' / 'cross_contrast' / 'backbone.safetensors'}"
    run(work, "embed", f"out={work / 'features' / 'features.csv'}", backbone, f"store={store}")
    for target in ("sex", "age"):
        run(work, "probe", f"target={target}", backbone, f"store={store}", f"out={work / f'probe_{target}'}",
            "repeats=2", "folds=3")  # fmt: skip


def real(work: Path, data: Path) -> None:
    """Real scans of two layouts through a store, a few steps and a segmentation."""
    work.mkdir(parents=True)
    for name in ("openms_cross/patient19", "tcga_lgg"):
        shutil.copytree(data / name, work / "data" / name)
    manifest, store = work / "manifest.csv", work / "store"
    run(work, "manifest", f"root={work / 'data'}", f"out={manifest}", "masks.lesion=*lesion_mask*|*seg-tumour*")
    run(work, "prepare", f"manifest={manifest}", f"store={store}", "preprocess.spacing_mm=4", "workers=1")
    tiny = (f"store={store}", *TINY, "trainer.max_steps=5")
    run(work, "finetune", f"run={work / 'lesion'}", "task.target=lesion", "backbone_from=none", *tiny, "folds=2",
        "task.patch_vox=[24,24,24]", "baselines=[features]", "audit=false", "report=false", "mirror=[]",
        "clean=false")  # fmt: skip


# ---- what came out ---------------------------------------------------------------------------------------------------


def fingerprint(array: np.ndarray) -> Any:
    """Shape, sums that tell a small change from a large one, and the bits; of text the text."""
    content = np.ascontiguousarray(array)
    if content.dtype.kind not in "biuf":
        return content.tolist()
    values = np.nan_to_num(content.astype(np.float64).ravel())
    ramp = np.cos(np.arange(values.size) * 0.7)
    return {
        "shape": list(content.shape), "dtype": str(content.dtype), "sum": float(values.sum()),
        "abs_sum": float(np.abs(values).sum()), "ramp_sum": float(values @ ramp),
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
    }  # fmt: skip


def arrays_of(path: Path) -> dict[str, np.ndarray] | None:
    """What a file of arrays holds; None for other files."""
    name = path.name
    if name.endswith(".safetensors"):
        from safetensors.numpy import load_file

        return dict(sorted(load_file(path).items()))
    if name.endswith(".b2nd"):
        import blosc2

        return {"": blosc2.open(str(path), mode="r")[:]}
    if name.endswith((".nii", ".nii.gz")):
        import nibabel as nib

        image = nib.load(path)
        return {"voxels": np.asarray(image.dataobj), "affine_mm": np.asarray(image.affine)}
    if name.endswith((".npy", ".npz")):
        loaded = np.load(path, allow_pickle=False)
        return dict(loaded) if name.endswith(".npz") else {"": loaded}
    return None


def metadata_of(path: Path) -> dict[str, str]:
    """The text beside the tensors of a safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {key: _decoded(text) for key, text in header.get("__metadata__", {}).items()}


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _kept(tree: Any, work: Path) -> Any:
    """A JSON tree without what passes, its folder replaced."""
    if isinstance(tree, dict):
        lasting = {key: value for key, value in tree.items() if not PASSING.match(str(key).lower())}
        hashed = {key for key in HASHED if re.fullmatch("[0-9a-f]{16,}", str(lasting.get(key)))}
        return {_kept(key, work): "{HASH}" if key in hashed else _kept(value, work) for key, value in lasting.items()}
    if isinstance(tree, list):
        return [_kept(value, work) for value in tree]
    if not isinstance(tree, str):
        return tree
    return re.sub(r"\d+(\.\d+)? GB", "{memory}", tree.replace(str(work), "{DIR}"))


def read(path: Path, work: Path) -> Any:
    """What a file says, as a JSON tree."""
    arrays = arrays_of(path)
    if arrays is not None:
        found: dict[str, Any] = {name: fingerprint(array) for name, array in arrays.items()}
        return found | ({"metadata": _kept(metadata_of(path), work)} if path.suffix == ".safetensors" else {})
    text = path.read_text(errors="replace")
    if path.suffix in (".csv", ".tsv"):
        rows = list(csv.DictReader(text.splitlines(), delimiter="," if path.suffix == ".csv" else "\t"))
        return _kept(rows, work)
    if path.suffix == ".jsonl":
        return _kept([json.loads(line) for line in text.splitlines()], work)
    return _kept(_decoded(text), work)


def collect(work: Path) -> dict[str, Any]:
    """By path below the folder: what every file that is compared says."""
    files = sorted(p for p in work.rglob("*") if p.is_file() and not SKIPPED.search(p.name))
    inside = [p.relative_to(work).parts for p in files]
    return {
        re.sub(r"-[0-9a-f]{8}\.", ".", "/".join(parts)): read(path, work)
        for path, parts in zip(files, inside)
        if not {"cohort", "data"} & set(parts[:2])
    }  # fmt: skip


def make(folder: Path, data: Path | None) -> None:
    """Runs everything and writes folder/found.json."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder}: found files there, expected a new or an empty folder")
    work = folder.resolve() / "work"
    work.mkdir(parents=True)
    began = time.monotonic()
    generated(work)
    if data is not None:
        real(work / "real", data.resolve())
    found = collect(work)
    (folder / "found.json").write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    print(f"{folder / 'found.json'}: {len(found)} files, {time.monotonic() - began:.0f} s")


# ---- side by side ----------------------------------------------------------------------------------------------------


def leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its place."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{where} > {key}" if where else str(key))
    elif isinstance(tree, list):
        yield f"{where} > length", len(tree)
        for number, value in enumerate(tree):
            yield from leaves(value, f"{where} > {number}")
    else:
        yield where, tree


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def distance(one: Any, other: Any, scale: float) -> float:
    """Relative difference of two values; infinite where they are not numbers and differ."""
    a, b = _number(one), _number(other)
    if a is None or b is None:
        return float("inf")
    if a == b or (np.isnan(a) and np.isnan(b)):
        return 0.0
    gap = abs(a - b) / max(abs(a), abs(b), scale, FLOOR)
    return gap if np.isfinite(gap) else float("inf")


def compare(before: dict[str, Any], after: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences about what fails and about what is small."""
    one, other = dict(leaves(before)), dict(leaves(after))
    failed = [f"only before: {place} = {one[place]}" for place in one.keys() - other.keys()]
    failed += [f"only after: {place} = {other[place]}" for place in other.keys() - one.keys()]
    small = []
    for place in one.keys() & other.keys():
        if one[place] == other[place]:
            continue
        beside, _, last = place.rpartition(" > ")
        if last == "sha256" and f"{beside} > abs_sum" in one:
            small.append(f"bits differ: {beside}")
            continue
        scale = float(one.get(f"{beside} > abs_sum", 0.0)) if last in ("sum", "ramp_sum") else 0.0
        gap = distance(one[place], other[place], scale)
        if gap > 0:
            sentence = f"{gap:.1e}  {place}: {str(one[place])[:_SHOWN]} | {str(other[place])[:_SHOWN]}"
            (failed if gap > TOLERANCE else small).append(sentence)
    return sorted(failed), sorted(small)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--data", type=Path, help="the folder of real scans")
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    asked = parser.parse_args()
    if asked.verb == "make":
        make(asked.folder, asked.data)
        return 0
    found = [json.loads((folder / "found.json").read_text()) for folder in (asked.before, asked.after)]
    failed, small = compare(*found)
    for title, sentences in (("differs", failed), ("differs by at most 1e-5", small)):
        print(*(f"{title}: {sentence}" for sentence in sentences), sep="\n", end="\n" if sentences else "")
    values = sum(1 for _ in leaves(found[0]))
    print(f"{len(found[0])} files, {values} values: {len(failed)} differ, {len(small)} by at most {TOLERANCE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
