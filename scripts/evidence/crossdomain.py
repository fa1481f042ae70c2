"""Networks across 2D domains: frozen, trained on other data sets, and the floors, with intervals.

    python scripts/evidence/crossdomain.py frozen --data DATA2D --work WORK --planar FILE
    python scripts/evidence/crossdomain.py frozen --pools test --episodes 20 --data DATA2D --work WORK --planar FILE
    python scripts/evidence/crossdomain.py frozen --networks unet_s,planar:brainfm_s --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py tuned --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py tuned --networks efficientnet_lite0 --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py supervised --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py kinds --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py trained --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py whole --data DATA2D --work WORK --planar FILE
    python scripts/evidence/crossdomain.py transfer --data DATA2D --work WORK
    python scripts/evidence/crossdomain.py phantoms --data DATA2D --work WORK

DATA2D holds ``medimeta_mini`` and MedMNIST files (``breastmnist*.npz``, ``pneumoniamnist*.npz``); FILE is a backbone
file of ours. Each part is a `brainfm medimeta action=benchmark`, goes on where it stopped, and prints its command.
``frozen``: 100 episodes of 5 support and 10 query images a class; with ``--pools test`` the queries come from the test
splits alone; ``tuned``: fine-tuning at the published length, 50 steps, of 12 episodes of ``pneumonia``; ``trained``:
pre-training on the other data sets, of which the table shows whether it helps; ``whole``: the training split, the fixed
test split and 3 re-splits;
``supervised``: networks trained end to end on the training split; ``kinds``: every protocol on drawn images of each
kind of task, ordered values with gaps among them;
``transfer``: from 900 images of PneumoniaMNIST, without those of the small set, to the small set ``pneumonia``; both
are of one hospital: the machinery is shown, not a change of hospital; ``phantoms``: the same from drawn chests to drawn
chests of another contrast, with two findings whose places are known.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import numpy as np
from PIL import Image

from brainfm.cli import main as brainfm
from brainfm.crossdomain.additions import About, AddedTask, Addition, write_dataset
from brainfm.crossdomain.layout import TaskTarget
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.seeds import stream

ADDED = {
    "breast": ("breastmnist*.npz", "Breast ultrasound (BreastMNIST)", "malignant,normal or benign", "bus"),
    "pneumoniamnist": ("pneumoniamnist*.npz", "Chest X-ray (PneumoniaMNIST)", "normal,pneumonia", "pneumonia"),
}
SMALL = ("bccd", "bus", "mednist", "pneumonia")


def sets_of(data: Path, work: Path, small: bool) -> Path:
    """WORK/sets: the small data sets, linked, and the MedMNIST files in the same layout; or WORK/small, without these,
    because pre-training learns from every data set that it finds."""
    root = work / ("small" if small else "sets")
    root.mkdir(parents=True, exist_ok=True)
    for name in SMALL:
        if not (root / name).exists():
            (root / name).symlink_to((data / "medimeta_mini" / name).resolve(), target_is_directory=True)
    for name, (pattern, domain, labels, twin) in ({} if small else ADDED).items():
        files = sorted(data.glob(pattern))
        if files and not (root / name).exists():
            brainfm(["medimeta", "action=add", f"root={root}", f"id={name}", f"domain={domain}", f"medmnist={files[0]}",
                     f"labels=[{labels}]", "task=disease", "size=28", f"domain_overlaps=[{twin}]"])  # fmt: skip
    return root


def source_of(data: Path, work: Path, root: Path) -> None:
    """WORK/sets/radiographs: PneumoniaMNIST without the images that the small set has; 600 to train, 300 to check."""
    if (root / "radiographs").exists():
        return
    with np.load(sorted(data.glob("pneumoniamnist*.npz"))[0]) as file:
        images = np.concatenate([file[f"{split}_images"] for split in ("train", "val", "test")])
        labels = np.concatenate([file[f"{split}_labels"] for split in ("train", "val", "test")])
    small = MedIMeta(root, "pneumonia", "pneumonia presence")
    there = {image.tobytes() for image in small.images.read(small.rows)}
    free = np.array([n for n, image in enumerate(images) if image.tobytes() not in there])
    rows = stream(0, "source").permutation(free)[:900]
    print(f"{len(images) - len(free)} of {len(images)} images are in the small set and left out")
    sides = {"train": rows[:600], "val": rows[600:750], "test": rows[750:]}
    np.savez(work / "rest.npz", **{f"{s}_images": images[r] for s, r in sides.items()},
             **{f"{s}_labels": labels[r] for s, r in sides.items()})  # fmt: skip
    brainfm(["medimeta", "action=add", f"root={root}", "id=radiographs", "domain=Chest X-ray",
             "labels=[NORMAL,PNEUMONIA]",
             f"medmnist={work / 'rest.npz'}", "task=pneumonia presence", "size=28"])  # fmt: skip


def drawn_chests(root: Path, name: str, count: int, seed: int, gamma: float) -> None:
    """ROOT/NAME: drawn chests with a nodule, an effusion, both or none, and masks of what was put in."""
    if (root / name).exists():
        return
    rng = stream(seed, f"drawn chests {name}")
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    labels = rng.random((count, 2)) < 0.4
    images, masks = np.zeros((count, 96, 96), np.uint8), np.zeros((count, 96, 96), bool)
    for number, (nodule, effusion) in enumerate(labels):
        sides = [((x - side * 0.42) / 0.33) ** 2 + (y / rng.uniform(0.62, 0.74)) ** 2 < 1 for side in (-1, 1)]
        body = 0.72 - 0.45 * (sides[0] | sides[1]) + 0.08 * np.sin(9 * y + rng.uniform(0, 6)) * (np.abs(x) < 0.85)
        side = int(rng.integers(2))
        if nodule:
            at = rng.uniform(-0.4, 0.2), (side * 2 - 1) * rng.uniform(0.3, 0.5)
            spot = (y - at[0]) ** 2 + (x - at[1]) ** 2 < rng.uniform(0.008, 0.018)
            body, masks[number] = body + 0.3 * spot, masks[number] | spot
        if effusion:
            fluid = sides[int(rng.integers(2))] & (y > rng.uniform(0.3, 0.45))
            body, masks[number] = body + 0.35 * fluid, masks[number] | fluid
        noisy = np.clip(body + rng.normal(0, 0.05, body.shape), 0, 1) ** gamma
        images[number] = (255 * noisy).astype(np.uint8)
    ends = (int(0.6 * count), int(0.8 * count))
    sides = ["train" if n < ends[0] else "val" if n < ends[1] else "test" for n in range(count)]
    task = AddedTask(
        "findings", TaskTarget.MULTILABEL_CLASSIFICATION, labels.astype(np.int64), {0: "nodule", 1: "effusion"}
    )
    addition = Addition(count, images.__getitem__, [task], sides, sides, [str(n) for n in range(count)])
    about = About(name, name, f"Drawn chests, gamma {gamma}", "none", size=None, tiff=False)
    folder = write_dataset(root, about, addition)
    (folder / "masks").mkdir()
    for number in np.flatnonzero(labels.any(axis=1)):
        Image.fromarray((255 * masks[number]).astype(np.uint8)).save(folder / "masks" / f"{number:06d}.tiff")


def drawn_kinds(root: Path) -> None:
    """ROOT/{classes,two,findings,grades}: drawn stripes and spots that are answers of each kind of task."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    grades = (0, 1, 4, 6, 8, 10)
    kinds: dict[str, tuple[TaskTarget, tuple[int, ...]]] = {
        "classes": (TaskTarget.MULTICLASS_CLASSIFICATION, (0, 1, 2)),
        "two": (TaskTarget.BINARY_CLASSIFICATION, (0, 1)),
        "findings": (TaskTarget.MULTILABEL_CLASSIFICATION, (0, 1, 2)),
        "grades": (TaskTarget.ORDINAL_REGRESSION, grades),
    }
    for name, (target, values) in kinds.items():
        if (root / name).exists():
            continue
        rng = stream(0, f"drawn {name}")
        several = target is TaskTarget.MULTILABEL_CLASSIFICATION
        labels = rng.random((200, 3)) < 0.4 if several else rng.permutation(np.resize(values, 200))
        images = np.zeros((200, 32, 32), np.uint8)
        for number, label in enumerate(labels):
            if several:
                spots = [np.hypot(x - 0.5 * (k - 1), y + 0.4 * (k - 1)) < 0.25 for k in np.flatnonzero(label)]
                body = 0.3 + 0.25 * np.sum(spots, axis=0)
            else:
                body = 0.4 + 0.15 * np.sin((3 + values.index(label)) * x + rng.uniform(0, 6))
            noisy = np.clip(body + rng.normal(0, 0.25, x.shape), 0, 1)
            images[number] = (255 * noisy).astype(np.uint8)
        sides = [("train", "train", "train", "val", "test")[number % 5] for number in range(200)]
        task = AddedTask("answer", target, labels.astype(np.int64), {value: f"is {value}" for value in values})
        addition = Addition(200, images.__getitem__, [task], sides, sides, [str(n) for n in range(200)])
        about = About(name, name, f"Drawn {name}", "none", size=None, tiff=False)
        write_dataset(root, about, addition)


def words_of(given: argparse.Namespace, root: Path) -> list[str]:
    """The command line of a part."""
    part, work, planar, lite = given.part, given.work, given.planar, given.lite
    networks = ["unet_s", "resnet18", *([f"planar:{planar}"] if planar else []), *(["efficientnet_lite0"] * lite)]
    named = given.networks.split(",") if given.networks else []
    if part == "transfer":
        return ["medimeta", "action=transfer", f"root={root}", f"out={work / part}", "source=radiographs",
                "target=pneumonia", "networks=[resnet18,unet_s]", "size=64", "max_epochs=5", "shortcut=true",
                "device=cpu"]  # fmt: skip
    if part == "phantoms":
        return ["medimeta", "action=transfer", f"root={root}", f"out={work / part}", "source=far", "target=near",
                "networks=[unet_tiny,resnet18]", "size=96", "max_epochs=6", "batch=32", "lr=2e-3", "shortcut=true",
                "device=cpu"]  # fmt: skip
    if part == "tuned":
        methods = [f"{how}@{network}" for network in named or ["resnet18"] for how in ("finetune", "logistic")]
        more = ["size=224", "steps=50", f"episodes={given.episodes or 12}", "datasets=[pneumonia]"]
    elif part == "frozen":
        methods = [f"{how}@{network}" for network in named or networks for how in ("logistic", "prototypes")]
        methods += [] if named else ["linear@resnet18"]
        sets = given.datasets or ",".join((*SMALL, *ADDED))
        more = ["size=128", f"episodes={given.episodes or 100}", f"pools={given.pools}", f"datasets=[{sets}]"]
    elif part == "trained":
        methods = [f"logistic@unet_tiny+{learnt}" for learnt in ("mmpt", "mmmaml", "mmmaml1")]
        more = ["size=64", "episodes=50", "max_epochs=6", "meta_episodes=2", "meta_validation=2", "lr=3e-3",
                "learn_all_tasks=false"]  # fmt: skip
    elif part == "supervised":
        methods = [f"supervised@{network}" for network in named or ["unet_s", "resnet18"]]
        more = ["size=64", "max_epochs=20", "patience=5", "batch=32"]
    elif part == "kinds":
        methods = ["logistic@unet_tiny", "prototypes@unet_tiny", "linear@unet_tiny", "finetune@unet_tiny",
                   "finetune@unet_tiny+mmpt", "finetune@unet_tiny+mmmaml", "supervised@unet_tiny",
                   "full_logistic@unet_tiny"]  # fmt: skip
        more = ["size=32", "episodes=20", "steps=20", "lr=3e-3", "max_epochs=6", "meta_episodes=2",
                "meta_validation=2"]  # fmt: skip
    else:
        methods = [f"full_logistic@{network}" for network in networks]
        more = ["size=128", "resplits=3", f"datasets=[{','.join((*SMALL, 'breast'))}]"]
    listed = ",".join(f"'{method}'" for method in methods)
    place = work / "_".join([part, *(["test"] * (given.pools == "test")), *(name.replace(":", "_") for name in named)])
    return ["medimeta", "action=benchmark", f"root={root}", f"out={place}", f"methods=[{listed}]", "device=cpu",
            *more]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=("frozen", "tuned", "trained", "whole", "supervised", "kinds", "transfer", "phantoms")
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--planar", type=Path, help="a backbone file of a 3D network")
    parser.add_argument("--lite", action="store_true", help="with efficientnet_lite0, of brainfm-mri[imagenet]")
    parser.add_argument("--networks", help="of frozen, tuned and supervised: other ones, joined by commas")
    parser.add_argument("--pools", choices=("all", "test"), default="all", help="of frozen: where queries come from")
    parser.add_argument("--episodes", type=int, help="of frozen and tuned")
    parser.add_argument("--datasets", help="of frozen: ids, joined by commas; else all")
    given = parser.parse_args()
    root = sets_of(given.data, given.work, given.part in ("trained", "supervised"))
    if given.part == "transfer":
        source_of(given.data, given.work, root)
    if given.part == "kinds":
        root = given.work / "kinds_sets"
        root.mkdir(parents=True, exist_ok=True)
        drawn_kinds(root)
    if given.part == "phantoms":
        root = given.work / "drawn"
        drawn_chests(root, "far", 300, 0, 1.0)
        drawn_chests(root, "near", 250, 1, 1.8)
    words = words_of(given, root)
    print(shlex.join(["brainfm", *words]))
    return brainfm(words)


if __name__ == "__main__":
    raise SystemExit(main())
