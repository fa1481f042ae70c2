"""Levels of a frozen encoder: what each knows of regions, by a linear classifier on voxels; Dice on people held out.

    python scripts/evidence/levels.py --store store --backbones runs/*/backbone.safetensors

A few labelled people of those that were trained on fit the classifier, those held out (as `brainfm pretrain` holds them
out, by --held and --split-seed) are scored: mean Dice of the groups, background left out. The first row is a network of
the same kind that learned nothing. A segmenter reads every level through its skip connections: a level below the first
row is one that pre-training has made worse. With one seed and a few people, differences of a few hundredths are noise.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from pretraining import Heads, at_voxels, dice_of_groups, labelled, maps_of
from sklearn.exceptions import ConvergenceWarning

from brainfm.data.store import Store
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.probing.online import effective_rank
from brainfm.training.pretrain import split_sessions


def row(backbone: Backbone, heads: Heads, few: list[int], away: list[int]) -> list[float]:
    """Dice of each level alone, fine to coarse, then of all; then the effective rank of each level."""
    backbone.eval()
    features: list[dict[int, np.ndarray]] = [{} for _ in backbone.widths]
    groups: dict[int, np.ndarray] = {}
    for number in (*few, *away):
        session = heads.sessions[number]
        scan = heads.scan(session)
        maps = maps_of(backbone, scan)
        places, groups[number] = heads.sampled(session, scan)
        for level, values in enumerate(maps):
            features[level][number] = at_voxels([values], [backbone.strides[level]], places)
    everything = {n: np.concatenate([level[n] for level in features], axis=1) for n in groups}
    dices = [
        float(dice_of_groups({"features": some, "groups": groups}, few, away).mean())
        for some in (*features, everything)
    ]
    ranks = [effective_rank(np.concatenate([level[n] for n in away])) for level in features]
    return dices + ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--backbones", type=Path, nargs="+", required=True)
    parser.add_argument("--held", type=float, default=0.34)
    parser.add_argument("--split-seed", type=int, default=2)
    parser.add_argument("--labelled", type=int, default=2)
    parser.add_argument("--voxels", type=int, default=4000, help="sampled of each head")
    parser.add_argument("--label", default="dseg_labels")
    parser.add_argument("--scheme", default="dlmuse")
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations for every row, as in pretraining
    store = Store.open(args.store)
    held = {s.subject_key for s in split_sessions(store, args.held, args.split_seed)[1]}
    heads = Heads(store, store.sessions, args.label, args.scheme, args.voxels)
    few, away = labelled(heads, held)
    loaded = [(file, load_backbone(file).backbone) for file in args.backbones]
    torch.manual_seed(0)
    fresh = swap_in(build_backbone(**loaded[0][1].config))
    asked = [("no training", fresh), *((str(file.parent), b) for file, b in loaded)]
    levels = len(loaded[0][1].widths)
    titles = [*(f"Dice {n}" for n in range(levels)), "all", *(f"rank {n}" for n in range(levels))]
    print("| | " + " | ".join(titles) + " |")
    print("|" + "---|" * (2 * levels + 2))
    for name, backbone in asked:
        found = row(backbone, heads, few[: args.labelled], away)
        text = [f"{v:.3f}" for v in found[: levels + 1]] + [f"{v:.1f}" for v in found[levels + 1 :]]
        print(f"| {name} | " + " | ".join(text) + " |", flush=True)


if __name__ == "__main__":
    main()
