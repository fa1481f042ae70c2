"""The linear probe of FOMO26 tasks 6 and 7, to know beforehand how an embedding will fare in it.

Thirteen linear layers on raw embeddings, one a learning rate, 20 epochs of SGD: 80 steps with the 240 training heads of
the published example. Nothing is standardised, so that the scale of an embedding decides how far a layer gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from brainfm.submission.metrics import ovr_auroc


@dataclass(frozen=True)
class ProbeSpec:
    """How the layers are trained.

    Attributes:
        rates: one layer each.
        epochs, batch: the last batch of an epoch may be smaller.
        momentum: of SGD; there is no weight decay.
        init: standard deviation of the first weights; biases begin at 0.
        seed: of weights and order.
    """

    rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    epochs: int = 20
    batch: int = 64
    momentum: float = 0.9
    init: float = 0.01
    seed: int = 42


@dataclass(frozen=True)
class Probed:
    """The layer that was chosen.

    Attributes:
        rate: its learning rate.
        validation: its macro AUROC on the validation heads, and ``every`` that of all layers.
        scores: [N, C] softmax of the test heads.
        loss: mean cross-entropy of the training heads after training.
    """

    rate: float
    validation: float
    every: tuple[float, ...]
    scores: np.ndarray
    loss: float


SPEC = ProbeSpec()


def probe(
    train: np.ndarray,
    labels: Sequence[int],
    validation: np.ndarray,
    validation_labels: Sequence[int],
    test: np.ndarray,
    spec: ProbeSpec = SPEC,
) -> Probed:
    """Trains all layers and answers for the test heads with the one whose validation AUROC is largest at the end.

    Args:
        train, validation, test: [N, F] embeddings as they would be submitted.
        labels, validation_labels: class numbers from 0.

    Raises: ValueError where there are fewer than two classes.
    Source: fomo-lp (lp_fomo.py) and the linear probe of asparagus 338450b. A layer that diverged counts as 0 here.
    """
    classes = max(labels) + 1
    if classes < 2:
        raise ValueError(f"a probe tells two classes or more apart, found {classes}")
    torch_rng = torch.Generator().manual_seed(spec.seed)
    layers = [_layer(train.shape[1], classes, spec, torch_rng) for _ in spec.rates]
    x, y = torch.from_numpy(train.astype(np.float32)), torch.tensor(labels)
    _train(layers, x, y, spec, torch_rng)
    every = [_auroc(layer, validation, validation_labels) for layer in layers]
    best = int(np.argmax(every))
    with torch.no_grad():
        loss = float(functional.cross_entropy(layers[best](x), y))
    return Probed(spec.rates[best], every[best], tuple(every), _scores(layers[best], test), loss)


def _layer(features: int, classes: int, spec: ProbeSpec, rng: torch.Generator) -> nn.Linear:
    layer = nn.Linear(features, classes)
    nn.init.normal_(layer.weight, 0.0, spec.init, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def _train(
    layers: Sequence[nn.Linear], x: torch.Tensor, y: torch.Tensor, spec: ProbeSpec, rng: torch.Generator
) -> None:
    optimizer = torch.optim.SGD(
        [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(layers, spec.rates)], momentum=spec.momentum
    )
    steps = spec.epochs * -(-len(x) // spec.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for _ in range(spec.epochs):
        for chosen in torch.randperm(len(x), generator=rng).split(spec.batch):
            loss = torch.stack([functional.cross_entropy(layer(x[chosen]), y[chosen]) for layer in layers]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _scores(layer: nn.Linear, embeddings: np.ndarray) -> np.ndarray:
    return torch.softmax(layer(torch.from_numpy(embeddings.astype(np.float32))), dim=1).numpy().astype(np.float64)


def _auroc(layer: nn.Linear, embeddings: np.ndarray, labels: Sequence[int]) -> float:
    scores = _scores(layer, embeddings)
    return ovr_auroc(labels, scores.tolist()) if np.isfinite(scores).all() else 0.0


SPREAD = 3.0


def scale_of(embeddings: np.ndarray, spread: float = SPREAD) -> np.ndarray:
    """Centre and factor that give each feature the same spread over a reference, any unlabelled heads: for `container`.

    At this spread most of the probe's rates are good ones, so that choosing among them on 20 heads a class costs
    little; it may be wrong by three either way (scripts/evidence/probe_embeddings.py). What hardly varies is not blown
    up beyond ten times the typical factor.

    Args:
        embeddings: [N, F] of `brainfm embed`, two heads or more.
        spread: standard deviation of a feature afterwards.

    Returns: [2, F] float32.

    Raises: ValueError where there are fewer than two heads, or none differs from the others.
    """
    values = np.asarray(embeddings, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"a scale is measured on [N, F] features of two heads or more, found {values.shape}")
    found = values.std(axis=0)
    typical = float(np.median(found[found > 0])) if (found > 0).any() else 0.0
    if not typical:
        raise ValueError(f"all {len(values)} heads have the same features, expected heads that differ")
    return np.stack([values.mean(axis=0), spread / np.maximum(found, 0.1 * typical)]).astype(np.float32)


def split(
    labels: Sequence[int], seed: int = 42, shares: tuple[float, float, float] = (0.4, 0.1, 0.5)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the training, validation and test heads: these shares of every class.

    Source: fomo-lp, which gives 80, 20 and 100 of each class. Differs: not also stratified by decade of age.
    """
    rng = np.random.default_rng(seed)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for k in sorted(set(labels)):
        members = rng.permutation([i for i, label in enumerate(labels) if label == k])
        first, second = (round(len(members) * share) for share in (shares[0], shares[0] + shares[1]))
        for part, chosen in zip(parts, (members[:first], members[first:second], members[second:])):
            part.extend(int(i) for i in chosen)
    train, validation, test = (np.array(part) for part in parts)
    return train, validation, test
