"""Speed of the transformers beside the public ones of the same sizes, and what leaving hidden cubes out saves.

    python scripts/benchmark/rivals.py                              # ViT-S and Primus-S, patches of 96 voxels; minutes
    python scripts/benchmark/rivals.py --sizes small --rounds 5     # toy widths, seconds
    PYTHONPATH=. OTHER_ENVIRONMENT/bin/python scripts/benchmark/rivals.py   # one with dynamic_network_architectures

A round takes every contestant once, in turn, so that what else the machine does falls on all; a pair's ratio is the
median over the rounds of the ratio within a round. A step is the forward and the backward pass of one batch, the loss
the mean square of what comes out, on the CPU or, with --device cuda, on a GPU (under bfloat16 with --half).

    vit         brainfm's encoder, with its class token
    vit monai   monai.networks.nets.ViT with learned places, without a class token: one token less
    vit mae     brainfm's encoder, three quarters of the cubes hidden and left out
    primus      brainfm's encoder and its decoder of transposed convolutions
    primus dna  dynamic_network_architectures' Primus, the whole network

Contestants that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.nets.backbone import build_backbone
from brainfm.nets.primus import PatchDecoder
from brainfm.nets.vit import TokenEncoder

SIZES = {  # width, depth, heads of each family
    "small": {"vit": (96, 3, 3), "primus": (96, 3, 2)},
    "s": {"vit": (384, 12, 6), "primus": (396, 12, 6)},
    "b": {"vit": (768, 12, 12), "primus": (792, 12, 12)},
}
PAIRS = {"vit": "vit monai", "primus": "primus dna", "vit mae": "vit"}
Step = Callable[[], Tensor]


class Whole(nn.Module):
    """An encoder and a decoder: [B, 1, X, Y, Z] -> [B, 1, X, Y, Z]."""

    def __init__(self, encoder: TokenEncoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, PatchDecoder(encoder.widths[-1], 1)

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.decoder(self.encoder.features(image))
        return answer


def contestants(size: str, edge: int, batch: int, device: str) -> tuple[dict[str, tuple[nn.Module, Step]], list[str]]:
    """Name -> network and its step's forward pass; and who is left out."""
    torch.manual_seed(0)
    image = torch.randn(batch, 1, edge, edge, edge, device=device)
    grid = [edge] * 3
    width, depth, heads = SIZES[size]["vit"]
    vit = build_backbone("vit", width=width, depth=depth, heads=heads, grid_vox=grid).to(device)
    cubes = torch.zeros(batch, (edge // 16) ** 3, dtype=torch.bool, device=device)
    cubes[:, : round(0.75 * cubes.shape[1])] = True
    cubes = cubes[:, torch.randperm(cubes.shape[1])].view(batch, 1, *[edge // 16] * 3)
    for axis in (2, 3, 4):
        cubes = cubes.repeat_interleave(16, dim=axis)
    found: dict[str, tuple[nn.Module, Step]] = {
        "vit": (vit, lambda: vit.features(image)[-1]),
        "vit mae": (vit, lambda: vit.features_masked(image, cubes)[-1]),
    }
    absent = []
    try:
        from monai.networks.nets import ViT

        theirs = ViT(
            in_channels=1, img_size=grid, patch_size=[16] * 3, hidden_size=width, mlp_dim=4 * width, num_layers=depth,
            num_heads=heads, proj_type="conv", pos_embed_type="learnable",
        ).to(device)  # fmt: skip
        found["vit monai"] = theirs, lambda: theirs(image)[0]
    except ModuleNotFoundError:
        absent.append("vit monai")
    width, depth, heads = SIZES[size]["primus"]
    encoder = build_backbone("primus", width=width, depth=depth, heads=heads, grid_vox=grid)
    assert isinstance(encoder, TokenEncoder)
    primus = Whole(encoder).to(device)
    found["primus"] = primus, lambda: primus(image)
    try:
        from dynamic_network_architectures.architectures.primus import Primus

        public = Primus(
            1, width, (8, 8, 8), 1, eva_depth=depth, eva_numheads=heads, input_shape=tuple(grid), init_values=0.1,
            scale_attn_inner=True,
        ).to(device)  # fmt: skip
        found["primus dna"] = public, lambda: public(image)
    except ModuleNotFoundError:
        absent.append("primus dna")
    return found, absent


def seconds(network: nn.Module, forward: Step, device: str, half: bool) -> float:
    """Of a step."""
    network.zero_grad(set_to_none=True)
    _settled(device)
    began = time.perf_counter()
    with torch.autocast(device, torch.bfloat16, enabled=half):
        loss = forward().float().square().mean()
    loss.backward()
    _settled(device)
    return time.perf_counter() - began


def _settled(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(size: str, edge: int, batch: int, rounds: int, device: str, half: bool) -> dict[str, Any]:
    """Median seconds a step and parameters of each contestant, and the ratio of each pair."""
    found, absent = contestants(size, edge, batch, device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, (network, forward) in found.items():
            spent = seconds(network, forward, device, half)
            if number:  # the first round warms up
                times[name].append(spent)
    steps = {
        name: {
            "seconds": statistics.median(times[name]),
            "parameters": sum(p.numel() for p in network.parameters()),
        }
        for name, (network, _) in found.items()
    }
    ratios = {
        f"{ours} / {theirs}": statistics.median(a / b for a, b in zip(times[ours], times[theirs]))
        for ours, theirs in PAIRS.items()
        if theirs in times
    }
    return {"size": size, "edge_vox": edge, "batch": batch, "rounds": rounds, "device": device, "half": half,
            "steps": steps, "ratios": ratios, "absent": absent}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["s"])
    parser.add_argument("--edge", type=int, default=96, help="of the patch, in voxels: a multiple of 16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--half", action="store_true", help="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = []
    for size in asked.sizes:
        result = measured(size, asked.edge, asked.batch, asked.rounds, asked.device, asked.half)
        results.append(result)
        for name, step in result["steps"].items():
            print(f"{size:6} {name:11} {step['parameters'] / 1e6:7.1f} M  {1000 * step['seconds']:9.1f} ms a step")
        for pair, ratio in result["ratios"].items():
            print(f"{size:6} {pair}: {ratio:.2f} of the time")
        if result["absent"]:
            print(f"not installed: {', '.join(result['absent'])}")
    if asked.json is not None:
        asked.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
