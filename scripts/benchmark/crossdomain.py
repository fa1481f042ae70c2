"""Episodes and images a second across 2D domains: ours, and the medimeta and torchcross packages on the same files.

    python scripts/benchmark/crossdomain.py ours --data MEDIMETA_MINI
    python scripts/benchmark/crossdomain.py peer --data MEDIMETA_MINI      (where medimeta and torchcross are installed)

Processor time of one thread, so that the machine's other work counts little; run both in turn. ResNet-18 with fresh
weights at 224 pixels, 5 support and 10 query images a class. Frozen: an episode of the published route (decode,
features of its images, 150 steps of a linear layer) against 100 of ours with everything that they need, the features
of each image once. Fine-tuning: steps of Adam on the support, a few of them. The packages' own trainer is left out in
favour of a plain loop, which is quicker. Memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from brainfm.crossdomain.networks import build_network, fresh_head

SET, TASK = "bus", "case category"
STEPS = 5  # of fine-tuning that are timed
BATCH = 64  # images are read in batches of so many
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timed(act: Callable[[], object], repeats: int) -> float:
    """Processor seconds of one call, the least of several."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        act()
        found.append(time.process_time() - began)
    return min(found)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(data: Path, repeats: int) -> dict[str, float]:
    from brainfm.crossdomain.adaptation import FineTune, fine_tune
    from brainfm.crossdomain.episodes import Episode, Shots, draw
    from brainfm.crossdomain.features import CachedFeatures, tensors
    from brainfm.crossdomain.heads import columns, linear, logistic
    from brainfm.crossdomain.medimeta import MedIMeta

    items = MedIMeta(data, SET, TASK)
    network = build_network("resnet18")
    parts = np.split(np.arange(len(items)), range(BATCH, len(items), BATCH))

    def rate(read: Callable[[np.ndarray], object]) -> float:
        return len(items) / timed(lambda: [read(part) for part in parts], repeats)

    found = {"images/s raw": rate(items.images.read), "images/s default": rate(items.batch),
             "images/s 224 RGB": rate(lambda part: tensors(network, items, part, 224))}  # fmt: skip
    shots = Shots(5, 10, None, 100)
    found["episodes/s drawn"] = 100 / timed(lambda: draw(items.places, items.task_target, shots, 0, SET), repeats)
    episodes = draw(items.places, items.task_target, shots, 0, SET)

    def hundred(head: Callable[..., np.ndarray]) -> None:
        features = CachedFeatures(items, network, 224)
        for episode in episodes:
            truth = columns(episode.support_y, items.task_target, 3)
            head(features.of(episode.support), truth, features.of(episode.query), 0)

    found["frozen, s an episode"] = timed(lambda: hundred(logistic), 1) / 100
    found["frozen, published head, s an episode"] = timed(lambda: hundred(linear), 1) / 100
    support = episodes[0].support
    short = Episode(support, support[:1], episodes[0].support_y, episodes[0].support_y[:1], (0, 1, 2))

    def tune(steps: int) -> Callable[[], object]:
        return lambda: fine_tune(network, items, short, FineTune(steps=steps), 0)

    tune(1)()
    before, floor = peak_mib(), timed(tune(1), repeats)
    found["fine-tuning, s a step"] = (timed(tune(1 + STEPS), repeats) - floor) / STEPS
    found["MiB grown over fine-tunings"] = peak_mib() - before
    return found | {"peak MiB": peak_mib()}


def peer(data: Path, repeats: int) -> dict[str, float]:
    import medimeta
    from torchcross.data.metadataset import FewShotMetaDataset
    from torchvision import transforms

    plain = medimeta.MedIMeta(str(data), SET, TASK)
    as_read = medimeta.MedIMeta(str(data), SET, TASK, transform=lambda image: image)
    steps = [transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    items = medimeta.MedIMeta(str(data), SET, TASK, transform=transforms.Compose(steps))
    items.num_channels = 3

    count = len(plain)
    parts = np.split(np.arange(count), range(BATCH, count, BATCH))

    def rate(dataset: Any, join: Callable[[list[Any]], object]) -> float:
        return count / timed(lambda: [join([dataset[int(n)][0] for n in part]) for part in parts], repeats)

    found = {"images/s raw": rate(as_read, list), "images/s default": rate(plain, torch.stack),
             "images/s 224 RGB": rate(items, torch.stack)}  # fmt: skip
    indices = FewShotMetaDataset(plain, None, 5, 10, length=100, output_indices=True)
    found["episodes/s drawn"] = 100 / timed(lambda: list(indices), repeats)
    network = build_network("resnet18").encoder

    def features(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network.eval()(images)[-1].mean((2, 3))  # type: ignore[no-any-return]

    def frozen() -> None:
        episode = next(iter(FewShotMetaDataset(items, torch.utils.data.default_collate, 5, 10, length=1)))
        (x, y), (other, _) = episode.support, episode.query
        x, other = features(x), features(other)
        head = torch.nn.Linear(512, 3)
        optimiser = torch.optim.Adam(head.parameters(), lr=1e-4)
        for _ in range(150):
            optimiser.zero_grad()
            F.cross_entropy(head(x), y).backward()
            optimiser.step()
        head(other)

    found["frozen, s an episode"] = timed(frozen, repeats)
    episode = next(iter(FewShotMetaDataset(items, torch.utils.data.default_collate, 5, 10, length=1)))
    x, y = episode.support
    head = fresh_head(512, 3, torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-3)
    network.train()

    def step() -> None:
        optimiser.zero_grad()
        F.cross_entropy(head(network(x)[-1].mean((2, 3))), y).backward()
        optimiser.step()

    step()
    found["fine-tuning, s a step"] = timed(lambda: [step() for _ in range(STEPS)], repeats) / STEPS
    return found | {"peak MiB": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=("ours", "peer"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the data set bus")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {"ours": ours, "peer": peer}[given.side](given.data, given.repeats)
    for name, value in found.items():
        print(f"{given.side:<5} {name:<40} {value:12.4f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
