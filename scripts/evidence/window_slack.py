"""Windows that may lie 5 % farther apart (tasks/windows.py, ``slack``), where that saves a row: Dice side by side.

    python scripts/evidence/window_slack.py --data DATA3D [--backbone FILE] [--people 12] [--patch 48 32]

A bundle that looks at a region of the head alone lets its windows lie farther apart by that much. Here the regions head
of a pre-trained file answers T1s of held people of ixi2mm (foundation/split.csv) at their own 2 mm, in a box about the
middle of the parcellation that is one voxel longer along each axis than so many windows at an overlap of .5: without
slack there is one window more along each axis, with it there is none. Dice is with DLMUSE's labels, mean over the
classes that occur; the interval is of the paired difference, by people.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from foundation_people import sides
from torch import Tensor

from brainfm.data.regions import TARGETS, targets_of
from brainfm.imaging.preprocess import prepare_session
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.scoring.masks import dice
from brainfm.specs import PreprocessSpec
from brainfm.tasks.windows import predict_windows, window_slices

DATASET, OVERLAP = "ixi2mm", 0.5
SLACKS = (0.0, 0.05)
GAPS = {48: 1, 32: 2}  # between windows with slack: the fewest of which 5 % are more than the voxel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--backbone", default="brainfm_s")
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--patch", type=int, nargs="+", choices=list(GAPS), default=list(GAPS))
    asked = parser.parse_args()
    loaded = load_backbone(asked.backbone)
    loaded.backbone.eval()
    held = sorted(who for (dataset, who), side in sides().items() if dataset == DATASET and side == "held")
    for edge in asked.patch:
        rows = [compared(loaded, asked.data / DATASET / who, edge) for who in held[: asked.people]]
        tell(edge, rows)


@torch.no_grad()
def compared(loaded: LoadedBackbone, folder: Path, edge: int) -> dict[float, tuple[np.ndarray, float, float]]:
    """slack -> the answer in the box, its Dice, and the processor seconds."""
    size = edge + GAPS[edge] * (edge // 2) + 1
    scan, truth = boxed(folder, size)
    there = [k for k, name in enumerate(loaded.heads["regions"].names) if k and (truth == TARGETS.index(name)).any()]
    found = {}
    for slack in SLACKS:
        began = time.process_time()
        shares = predict_windows(
            lambda image, present: answered(loaded, image), scan[None], torch.ones(1, dtype=torch.bool), (edge,) * 3,
            overlap=OVERLAP, batch=1, slack=slack,
        )  # fmt: skip
        answer = shares.argmax(dim=0).numpy()
        names = loaded.heads["regions"].names
        each = [dice(answer == k, truth == TARGETS.index(names[k])) for k in there]
        found[slack] = answer, float(np.mean(each)), time.process_time() - began
    return found


def boxed(folder: Path, size: int) -> tuple[Tensor, np.ndarray]:
    """[X, Y, Z] of the T1, standardised, and places in data/regions.TARGETS, in a cube about the labels' middle."""
    t1, parcels = (folder / f"{folder.name}_{ending}.nii.gz" for ending in ("T1w", "DLMUSE_dseg"))
    session = prepare_session({"t1": t1}, {"dlmuse_labels": parcels}, PreprocessSpec(spacing_mm=(2.0,) * 3))
    image, labels = session.scans["t1"], session.labels["dlmuse_labels"]
    middle = [int(np.mean(places)) for places in np.nonzero(labels)]
    starts = [min(max(0, m - size // 2), edge - size) for m, edge in zip(middle, image.shape)]
    box = tuple(slice(start, start + size) for start in starts)
    table = targets_of("dlmuse")
    return torch.from_numpy(image[box].astype(np.float32)), table[np.where(labels[box] < len(table), labels[box], 0)]


def answered(loaded: LoadedBackbone, image: Tensor) -> Tensor:
    """[B, K, X, Y, Z] logits of the regions head."""
    assert loaded.decoder is not None
    head = loaded.heads["regions"]
    logits: Tensor = head(loaded.decoder.split(loaded.decoder(loaded.backbone.features(image)))[head.part])
    return logits


def tell(edge: int, rows: list[dict[float, tuple[np.ndarray, float, float]]]) -> None:
    """A line a slack, and one of their difference."""
    size = edge + GAPS[edge] * (edge // 2) + 1
    for slack in SLACKS:
        windows = sum(1 for _ in window_slices((size,) * 3, (edge,) * 3, OVERLAP, slack))
        values = np.array([row[slack][1] for row in rows])
        seconds = float(np.mean([row[slack][2] for row in rows]))
        print(f"patch {edge}, box {size}, slack {slack:.2f}: {windows} windows, Dice {values.mean():.4f}, "
              f"{seconds:.1f} processor s a head")  # fmt: skip
    apart = np.array([row[SLACKS[1]][1] - row[SLACKS[0]][1] for row in rows])
    told = bootstrap(mean_score, apart, apart, groups=[str(n) for n in range(len(rows))], seed=0)
    other = float(np.mean([(row[SLACKS[1]][0] != row[SLACKS[0]][0]).mean() for row in rows]))
    span = f"[{told.low:+.4f}, {told.high:+.4f}]"
    print(f"patch {edge}: difference {told.mean:+.4f} {span}, largest {apart[np.abs(apart).argmax()]:+.4f}, "
          f"n {len(rows)}; {100 * other:.2f} % of voxels get another class")  # fmt: skip


if __name__ == "__main__":
    main()
