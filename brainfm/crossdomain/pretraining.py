"""Pre-training on the tasks of other data sets: multi-domain multi-task (mm-PT) and multi-domain MAML (mm-MAML).

Source: Woerner et al. 2024 (arXiv 2404.16000); MAML Finn et al. 2017 (arXiv 1703.03400); learnt inner rates Li et al.
    2017, Meta-SGD (arXiv 1707.09835).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from brainfm.crossdomain.adaptation import answers_of, batches, descend, keep_best, loss_of, outputs_of, predicted
from brainfm.crossdomain.augmentation import augmented
from brainfm.crossdomain.episode_scores import Answers, episode_auroc
from brainfm.crossdomain.episodes import Episode, Shots, draw
from brainfm.crossdomain.features import tensors
from brainfm.crossdomain.heads import columns
from brainfm.crossdomain.layout import DatasetInfo
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.networks import Classifier, ImageNetwork
from brainfm.errors import DatasetError
from brainfm.nets.cpu import keep_freed_memory
from brainfm.seeds import stream, torch_stream

Progress = Callable[[int, int], None]
_LONGEST = 10.0  # gradient of all weights and rates of mm-MAML together


@dataclass(frozen=True)
class MultiTask:
    """Of mm-PT; the published values, but for the cap on epochs, where there is none.

    Attributes:
        lr: of Adam; the publication has 1e-4 for ResNet-50.
        scale_losses: whether a task's loss counts as many times as the largest task has more batches.
        patience: epochs without a better mean AUROC of the validation splits.
    """

    lr: float = 1e-3
    batch: int = 64
    patience: int = 10
    max_epochs: int = 50
    augment: bool = True
    scale_losses: bool = True
    size: int = 224
    device: str = "cpu"


@dataclass(frozen=True)
class Maml:
    """Of mm-MAML; the published values, but for the cap on epochs and the number of episodes.

    Attributes:
        lr: of the outer Adam; the publication has 1e-4 for ResNet-50.
        inner_lr: at which the learnt rates of the inner steps begin.
        inner_steps: gradient steps on an episode's support.
        second_order: whether gradients go through the inner steps; without, they are those at their end.
        support: images a class, drawn for each episode.
        episodes: of each task, an epoch; the publication has 1000.
        validation: episodes of each task, of the validation splits.
        patience: epochs without a better AUROC of these.
    """

    lr: float = 1e-3
    inner_lr: float = 0.1
    inner_steps: int = 4
    second_order: bool = True
    support: tuple[int, int] = (1, 10)
    query: int = 10
    episodes: int = 1000
    validation: int = 100
    patience: int = 5
    max_epochs: int = 10
    size: int = 224
    device: str = "cpu"


def sources_for(target: str, found: Mapping[str, DatasetInfo]) -> list[str]:
    """Ids of the data sets that may be learnt from where ``target`` is held out: neither it, nor one of its domain, nor
    one that shares domain or people by what either of the two says."""
    info = found[target]
    return [
        name
        for name, other in found.items()
        if name != target and other.domain != info.domain and name not in info.overlaps and target not in other.overlaps
    ]


def tasks_of(
    root: str, names: Sequence[str], found: Mapping[str, DatasetInfo], all_tasks: bool, tiff: bool = False
) -> list[MedIMeta]:
    """Every task of the data sets, or each one's main task; ``tiff``: of their TIFF files.

    Raises: DatasetError where there is none.
    """
    if not names:
        raise DatasetError(
            f"{root}: no data set is left to learn from, expected one of another domain and other people"
        )
    return [
        MedIMeta(root, name, task, use_hdf5=not tiff)
        for name in names
        for task in (found[name].tasks if all_tasks else [found[name].main_task])
    ]


def _split(items: MedIMeta, name: str) -> np.ndarray:
    """Numbers of the items of a split."""
    from brainfm.crossdomain.layout import read_split

    return np.flatnonzero(np.isin(items.rows, read_split(items.dataset, name)))


# ---- mm-PT -----------------------------------------------------------------------------------------------------------


def multi_task(
    network: ImageNetwork, sources: Sequence[MedIMeta], settings: MultiTask, seed: int, progress: Progress | None = None
) -> ImageNetwork:
    """A copy of the network, trained on all tasks with a head for each, a batch being of one task; of its epochs the
    one with the best mean AUROC on the validation splits."""
    keep_freed_memory()
    network = network.fresh_copy().to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch_stream(seed, "heads of tasks")
    models = [  # of one network, each with a head of its own
        Classifier(network, outputs_of(items.task_target, len(items.classes)), generator, "zero").to(settings.device)
        for items in sources
    ]
    heads = [parameter for model in models for parameter in model.head.parameters()]
    optimiser = torch.optim.Adam([*network.parameters(), *heads], lr=settings.lr, fused=True)
    train, held = ([_split(items, side) for items in sources] for side in ("train", "val"))

    def learn(epoch: int) -> None:
        network.train()
        for number, (place, part) in enumerate(_dealt(train, settings.batch, seed, epoch)):
            items, rows = sources[place], train[place][part]
            images = tensors(network, items, rows, settings.size, settings.device)
            if settings.augment:
                images = augmented(images, torch_stream(seed, "augmentation of tasks", epoch, number))
            y = torch.from_numpy(items.places[rows]).to(settings.device)
            loss = loss_of(models[place](images), y, items.task_target)
            where = f"{items.task_identifier}, pre-training, epoch {epoch + 1}"
            descend(optimiser, loss, where, _weight(place, train, settings))

    def check() -> float:
        return float(np.mean([_auroc(*each, settings) for each in zip(models, sources, held)]))

    keep_best(network, learn, check, settings.max_epochs, settings.patience, progress)
    return network.eval()


def _dealt(train: Sequence[np.ndarray], size: int, seed: int, epoch: int) -> list[tuple[int, np.ndarray]]:
    """Batches of an epoch, each of one task; the next task is drawn by the batches that each has left, which is a
    random order of all batches."""
    dealt = [
        (place, part)
        for place, rows in enumerate(train)
        for part in batches(len(rows), size, seed, epoch * len(train) + place)
    ]
    return [dealt[number] for number in stream(seed, "order of tasks", epoch).permutation(len(dealt))]


def _weight(place: int, train: Sequence[np.ndarray], settings: MultiTask) -> float:
    if not settings.scale_losses:
        return 1.0
    counts = [math.ceil(len(rows) / settings.batch) for rows in train]
    return max(counts) / counts[place]


def _auroc(model: Classifier, items: MedIMeta, rows: np.ndarray, settings: MultiTask) -> float:
    scores = predicted(model, items, rows, settings.size, settings.device)
    truth = columns(items.places[rows], items.task_target, len(items.classes))
    value = episode_auroc(Answers(rows, truth, scores))
    return value if math.isfinite(value) else 0.5


# ---- mm-MAML ---------------------------------------------------------------------------------------------------------


def maml(
    network: ImageNetwork, sources: Sequence[MedIMeta], settings: Maml, seed: int, progress: Progress | None = None
) -> ImageNetwork:
    """A copy of the network whose few gradient steps on a new episode shall help most: an episode of one task at a
    time, a head from zero for each, batch statistics in every norm.

    Its norms' running statistics are counted anew on the sources afterwards: episodes move none.
    """
    keep_freed_memory()
    network = network.fresh_copy().to(settings.device)
    moments = {part: part.momentum for part in network.modules() if isinstance(part, nn.BatchNorm2d)}
    for part in moments:
        part.momentum = 0.0
    weights = dict(network.named_parameters())
    rates = {name: torch.full_like(value, settings.inner_lr).requires_grad_() for name, value in weights.items()}
    rates |= {name: torch.tensor(settings.inner_lr, requires_grad=True) for name in ("head.weight", "head.bias")}
    optimiser = torch.optim.Adam([*weights.values(), *rates.values()], lr=settings.lr)
    train, rest = ([_split(items, side) for items in sources] for side in ("train", "val"))

    def drawn(sides: Sequence[np.ndarray], count: int, what: str) -> list[tuple[MedIMeta, Episode]]:
        return [
            (items, episode)
            for items, rows in zip(sources, sides)
            for episode in _drawn(items, rows, settings, count, seed, what)
        ]

    held = drawn(rest, settings.validation, "validation")

    def learn(epoch: int) -> None:
        network.train()
        dealt = drawn(train, settings.episodes, f"epoch {epoch}")
        for number in stream(seed, "order of episodes", epoch).permutation(len(dealt)):
            items, episode = dealt[number]
            logits = _adapted(network, weights, rates, items, episode, settings, settings.second_order)
            loss = loss_of(logits, torch.from_numpy(episode.query_y).to(settings.device), items.task_target)
            descend(optimiser, loss, f"{items.task_identifier}, pre-training, epoch {epoch + 1}", clip=_LONGEST)

    def check() -> float:
        return float(np.nanmean([_meta_auroc(network, weights, rates, *each, settings) for each in held]))

    keep_best(network, learn, check, settings.max_epochs, settings.patience, progress)
    for part, momentum in moments.items():
        part.momentum = momentum
    _count_statistics(network, sources, train, settings)
    return network.eval()


def _adapted(
    network: ImageNetwork, weights: Mapping[str, Tensor], rates: Mapping[str, Tensor], items: MedIMeta,
    episode: Episode, settings: Maml, second_order: bool,
) -> Tensor:  # fmt: skip
    """Logits of the query after the inner steps."""
    outputs = outputs_of(items.task_target, len(episode.classes))
    fast = dict(weights)
    fast["head.weight"] = torch.zeros(outputs, network.width, device=settings.device, requires_grad=True)
    fast["head.bias"] = torch.zeros(outputs, device=settings.device, requires_grad=True)
    support, query = (tensors(network, items, rows, settings.size, settings.device)
                      for rows in (episode.support, episode.query))  # fmt: skip
    y = torch.from_numpy(episode.support_y).to(settings.device)
    for _ in range(settings.inner_steps):
        loss = loss_of(_called(network, fast, support), y, items.task_target)
        slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=second_order, allow_unused=True)
        fast = {
            name: value if slope is None else value - rates[name] * slope
            for (name, value), slope in zip(fast.items(), slopes)
        }
    return _called(network, fast, query)


def _called(network: ImageNetwork, fast: Mapping[str, Tensor], images: Tensor) -> Tensor:
    own = {name: value for name, value in fast.items() if not name.startswith("head.")}
    features: Tensor = functional_call(network, own, (images,))
    return nn.functional.linear(features, fast["head.weight"], fast["head.bias"])


def _meta_auroc(
    network: ImageNetwork, weights: Mapping[str, Tensor], rates: Mapping[str, Tensor], items: MedIMeta,
    episode: Episode, settings: Maml,
) -> float:  # fmt: skip
    network.train()  # batch statistics, as in training
    with torch.enable_grad():
        logits = _adapted(network, weights, rates, items, episode, settings, second_order=False).detach()
    truth = columns(episode.query_y, items.task_target, len(episode.classes))
    return episode_auroc(Answers(episode.query, truth, answers_of(logits, items.task_target)))


def _drawn(items: MedIMeta, rows: np.ndarray, settings: Maml, count: int, seed: int, what: str) -> list[Episode]:
    """Episodes of a split, with fewer images where it holds few."""
    places = items.places[rows]
    sides = [places[:, k] for k in range(places.shape[1])] if places.ndim == 2 else [places]
    least = min(int(np.unique(side, return_counts=True)[1].min()) for side in sides)
    if places.ndim == 1 and len(np.unique(places)) < len(items.classes):
        least = 0
    query = min(settings.query, least // 2)
    most = min(settings.support[1], least - query)
    if query < 1 or most < 1:
        raise DatasetError(f"{items.task_identifier}: a class has {least} images in a split, expected 2 for an episode")
    shots = Shots((min(settings.support[0], most), most), query, None, count)
    pools = (rows, rows)
    return draw(items.places, items.task_target, shots, seed, f"{items.task_identifier}, {what}", pools)


@torch.no_grad()
def _count_statistics(
    network: ImageNetwork, sources: Sequence[MedIMeta], train: Sequence[np.ndarray], settings: Maml
) -> None:
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    if not norms:
        return
    kept = [part.momentum for part in norms]
    for part in norms:
        part.reset_running_stats()
        part.momentum = None  # the plain mean over batches
    network.train()
    for items, rows in zip(sources, train):
        network(tensors(network, items, rows[:64], settings.size, settings.device))
    for part, momentum in zip(norms, kept):
        part.momentum = momentum
