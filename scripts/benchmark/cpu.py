"""brainfm's layers for a CPU beside torch's own: training steps and answers of an encoder with a skip decoder.

    python scripts/benchmark/cpu.py                                        # minutes on one core
    python scripts/benchmark/cpu.py --backbones unet_b --edges 64 --batches 1 2 --rounds 9

Contestants take turns in every round on the same image: ``torch`` has the ordinary layers, ``whole`` the quick ones
without the halves in which a small map of a batch of one passes, ``brainfm`` the quick ones as they are. It shows
medians over the rounds: milliseconds of processor time, and how many times brainfm's the other's of the same round is.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from brainfm.nets import cpu
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.decoders import decoder_for


class Segmenter(nn.Module):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, decoder_for(backbone, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.backbone(image))


@dataclass(frozen=True)
class Contestant:
    name: str
    network: nn.Module
    small_map: int


def contestants(backbone: str) -> list[Contestant]:
    torch.manual_seed(0)
    plain = Segmenter(build_backbone(backbone))
    quick = cpu.swap_in(copy.deepcopy(plain))
    return [Contestant("torch", plain, 0), Contestant("whole", quick, 0), Contestant("brainfm", quick, cpu._SMALL_MAP)]


def step(network: nn.Module, image: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(image).square().mean().backward()


def answer(network: nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        network(image)


WORK: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {"step": step, "answer": answer}


def measure(backbone: str, edge: int, batch: int, rounds: int, work: str) -> dict[str, object]:
    image = torch.randn(batch, 1, edge, edge, edge, generator=torch.Generator().manual_seed(0))
    those, own = contestants(backbone), cpu._SMALL_MAP
    seconds: dict[str, list[float]] = {one.name: [] for one in those}
    for number in range(rounds + 1):
        for one in those[number % 3 :] + those[: number % 3]:
            cpu._SMALL_MAP = one.small_map
            began = time.process_time()
            WORK[work](one.network, image)
            seconds[one.name].append(time.process_time() - began)
    cpu._SMALL_MAP = own
    counted = {name: values[1:] for name, values in seconds.items()}
    row: dict[str, object] = {"backbone": backbone, "edge": edge, "batch": batch, "work": work}
    row |= {f"{name}_ms": round(1000 * statistics.median(values), 1) for name, values in counted.items()}
    for name in ("torch", "whole"):
        pairs = [a / b for a, b in zip(counted[name], counted["brainfm"], strict=True)]
        row[f"{name}_x"] = round(statistics.median(pairs), 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["unet_s", "resenc_s"])
    parser.add_argument("--edges", nargs="+", type=int, default=[32, 48])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--work", nargs="+", choices=tuple(WORK), default=list(WORK))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu.keep_freed_memory()
    rows = []
    print("backbone   edge batch work    torch ms  whole ms brainfm ms  torch x  whole x")
    for backbone in args.backbones:
        for edge in args.edges:
            for work in args.work:
                for batch in args.batches:
                    row = measure(backbone, edge, batch, args.rounds, work)
                    rows.append(row)
                    print(
                        f"{backbone:<10} {edge:>4} {batch:>5} {work:<6} {row['torch_ms']:>9} {row['whole_ms']:>9} "
                        f"{row['brainfm_ms']:>10} {row['torch_x']:>8} {row['whole_x']:>8}",
                        flush=True,
                    )
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": args.threads, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
