"""What restored lengths of filters and a linear start of the last layer are worth to a few-shot fine-tuning.

    python scripts/evidence/lengths.py --backbone FILE --store runs/foundation_data/store --out DIR

The question is that of the level probe (probing/levels.py): two held-out heads to learn from, four to test on, groups
of regions, windows of 48 voxels, one a step. Networks: the file's encoder and decoder as they are, with restored
lengths (nets/lengths.py), and fresh; each with a fresh last layer and with one that begins as a linear model of the
features before it. Dice of middles at about 2 mm and of whole heads at the store's coarsest level. One seed: a gap of
less than .05 says nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from brainfm import seeds
from brainfm.data.store import Store
from brainfm.data.targets import TargetSpec, find_targets
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import decoder_for
from brainfm.nets.lengths import restore_lengths
from brainfm.probing import levels

SETTINGS = (
    ("restored", True),
    ("as it is", True),
    ("fresh", True),
    ("restored", False),
    ("as it is", False),
    ("fresh", False),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 20, 60, 150])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    store = Store.open(asked.store)
    held = [session for session in store.sessions if session.columns.get("side") == "held"]
    targets = find_targets(store, TargetSpec(), set(), pathology=False)
    heads = levels.choose_heads(held, targets)
    loaded = load_backbone(asked.backbone, needs_decoder=True)
    assert loaded.decoder is not None
    stride = loaded.backbone.strides[-1]
    crops = [c for c in levels.read_crops(store, heads, targets, loaded.patch_vox, stride) if c.truth is not None]
    networks = {
        "as it is": (loaded.backbone, loaded.decoder),
        "restored": copy.deepcopy((loaded.backbone, loaded.decoder)),
        "fresh": levels.fresh_networks(loaded.backbone, loaded.decoder),
    }
    grown = [restore_lengths(network) for network in networks["restored"]]
    said = f"filters {grown[0]:.1f} (encoder) and {grown[1]:.1f} times (decoder) as long as fresh ones"
    print(f"{len(heads)} heads, {len(targets.groups)} groups; {said}")
    asked.out.mkdir(parents=True, exist_ok=True)
    with (asked.out / "lengths.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["network", "last_layer", "rate", "step", "dice_middles", "dice_whole"])
        for rate in asked.rates:
            for name, linear in SETTINGS:
                for step, scores in tuned(
                    *networks[name], crops, len(targets.groups), asked.steps, rate, linear
                ).items():
                    row = [name, "linear" if linear else "fresh", rate, step, *(round(score, 3) for score in scores)]
                    table.writerow(row)
                    print(*row, flush=True)
                file.flush()


def tuned(
    backbone: Backbone,
    dense: nn.Module,
    crops: Sequence[levels.Crop],
    groups: int,
    steps: Sequence[int],
    rate: float,
    linear: bool,
) -> dict[int, tuple[float, float]]:
    """Step -> Dice of middles and of whole heads, of one fine-tuning."""
    torch.manual_seed(0)
    encoder, _ = levels.fresh_networks(backbone, None)
    net = swap_in(levels._Segmenter(encoder, decoder_for(backbone, 1), groups))
    net.backbone.load_state_dict(backbone.state_dict())
    own = {name: value for name, value in net.decoder.state_dict().items() if name.startswith("out.")}  # of no use
    net.decoder.load_state_dict(dict(dense.state_dict()) | own)
    learnt, tested = ([c for c in crops if (c.head < levels._FITTED) == side] for side in (True, False))
    if linear:
        levels._begin_linear(net, learnt, groups, torch.device("cpu"))
    optimizer = torch.optim.AdamW((p for n, p in net.named_parameters() if not n.startswith("decoder.out.")), lr=rate)
    found = {}
    for step in range(max(steps) + 1):
        if step in steps:
            found[step] = scored(net.eval(), tested, groups)
        image, truth = levels._window(learnt[step % len(learnt)], 16, seeds.stream(0, "few-shot window", step))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5)
        loss = levels._region_loss(net.train()(image), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return found


@torch.no_grad()
def scored(net: nn.Module, crops: Sequence[levels.Crop], groups: int) -> tuple[float, float]:
    overlaps = levels.GroupOverlap(groups), levels.GroupOverlap(groups)
    for crop in crops:
        assert crop.truth is not None
        overlaps[crop.whole].add(net(crop.image)[0].argmax(dim=0), crop.truth)
    return overlaps[0].mean(), overlaps[1].mean()


if __name__ == "__main__":
    main()
