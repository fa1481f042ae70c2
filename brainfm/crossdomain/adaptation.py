"""Networks that are trained on: an episode's support as one batch, or a training split with early stopping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.crossdomain.augmentation import augmented
from brainfm.crossdomain.episode_scores import Answers, episode_auroc
from brainfm.crossdomain.episodes import Episode
from brainfm.crossdomain.features import tensors
from brainfm.crossdomain.heads import columns
from brainfm.crossdomain.layout import TaskTarget
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.networks import Classifier, ImageNetwork
from brainfm.errors import TrainingError
from brainfm.nets.cpu import keep_freed_memory
from brainfm.seeds import stream, torch_stream


@dataclass(frozen=True)
class FineTune:
    """Of an episode. The defaults are those of the published tables.

    Source: Woerner et al. 2024 (arXiv 2404.16000): Adam, 1e-3, 50 steps on the whole support, a fresh head.
    """

    lr: float = 1e-3
    steps: int = 50
    size: int = 224
    device: str = "cpu"


@dataclass(frozen=True)
class SupervisedMethod:
    """Of a training split. The defaults are the published ones, but for the cap on epochs, where there is none.

    Attributes:
        lr: of Adam; the publication has 1e-4 for ResNet-50.
        patience: epochs without a better AUROC of the validation split.
    """

    lr: float = 1e-3
    batch: int = 64
    patience: int = 10
    max_epochs: int = 100
    augment: bool = True
    size: int = 224
    device: str = "cpu"


def loss_of(logits: Tensor, y: Tensor, target: TaskTarget) -> Tensor:
    """Cross-entropy of classes, ordered ones too; of a binary task and of labels their binary one, NaN left out."""
    if target in (TaskTarget.MULTICLASS_CLASSIFICATION, TaskTarget.ORDINAL_REGRESSION):
        return F.cross_entropy(logits, y)
    wanted = y.reshape(len(y), -1).to(logits.dtype)
    known = torch.isfinite(wanted)
    each = F.binary_cross_entropy_with_logits(logits, torch.where(known, wanted, 0.0), reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)


def answers_of(logits: Tensor, target: TaskTarget) -> np.ndarray:
    """[N, C] for `columns`."""
    exclusive = target in (TaskTarget.MULTICLASS_CLASSIFICATION, TaskTarget.ORDINAL_REGRESSION)
    found: np.ndarray = (logits.softmax(1) if exclusive else logits.sigmoid()).double().cpu().numpy()
    return found


def outputs_of(target: TaskTarget, classes: int) -> int:
    return 1 if target is TaskTarget.BINARY_CLASSIFICATION else classes


def fine_tune(network: ImageNetwork, items: MedIMeta, episode: Episode, settings: FineTune, seed: int) -> Answers:
    """A copy of the network with a fresh head, trained on the support; what it answers for the query.

    Raises: TrainingError where the loss is not finite.
    """
    keep_freed_memory()
    target, classes = items.task_target, len(episode.classes)
    generator = torch_stream(seed, "head of an episode")
    model = Classifier(network.fresh_copy(), outputs_of(target, classes), generator)
    model = model.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = tensors(network, items, episode.support, settings.size, settings.device)
    y = torch.from_numpy(episode.support_y).to(settings.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    model.train()
    for step in range(settings.steps):
        descend(optimiser, loss_of(model(images), y, target), f"{items.task_identifier}, step {step + 1}")
    scores = predicted(model, items, episode.query, settings.size, settings.device)
    return Answers(items.rows[episode.query], columns(episode.query_y, target, classes), scores)


@torch.no_grad()
def predicted(
    model: Classifier, items: MedIMeta, rows: np.ndarray, size: int, device: str, batch: int = 64
) -> np.ndarray:
    """[N, C] of a classifier, in eval mode, batch by batch."""
    model.eval()
    parts = [
        answers_of(model(tensors(model.network, items, rows[start : start + batch], size, device)), items.task_target)
        for start in range(0, len(rows), batch)
    ]
    return np.concatenate(parts)


def supervised(
    network: ImageNetwork, items: MedIMeta, episode: Episode, validation: np.ndarray, settings: SupervisedMethod,
    seed: int,
    progress: Callable[[int, int], None] | None = None, start: Classifier | None = None,
) -> tuple[Answers, Classifier]:  # fmt: skip
    """Trained end to end on the support, stopped by the AUROC of ``validation``; answers for the query, and the model.

    Args:
        episode: the training and the test split.
        validation: numbers of the items that decide when to stop; no part of the support.
        start: a classifier of the same task that is trained on, in place of a fresh head on the network.
    """
    keep_freed_memory()
    target, classes = items.task_target, len(episode.classes)
    model = copy.deepcopy(start)
    if model is None:
        model = Classifier(network.fresh_copy(), outputs_of(target, classes), torch_stream(seed, "head of a split"))
    model = model.to(settings.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    truth = columns(items.places[validation], target, classes)
    y = torch.from_numpy(_targets(items, episode))

    def learn(epoch: int) -> None:
        model.train()
        for part in batches(len(episode.support), settings.batch, seed, epoch):
            images = tensors(network, items, episode.support[part], settings.size, settings.device)
            if settings.augment:
                images = augmented(images, torch_stream(seed, "augmentation", epoch, int(part[0])))
            loss = loss_of(model(images), y[part].to(settings.device), target)
            descend(optimiser, loss, f"{items.task_identifier}, epoch {epoch + 1}")

    def check() -> float:
        scores = predicted(model, items, validation, settings.size, settings.device)
        return episode_auroc(Answers(validation, truth, scores))

    keep_best(model, learn, check, settings.max_epochs, settings.patience, progress)
    scores = predicted(model, items, episode.query, settings.size, settings.device)
    return Answers(items.rows[episode.query], columns(episode.query_y, target, classes), scores), model


def descend(
    optimiser: torch.optim.Optimizer, loss: Tensor, where: str, weight: float = 1.0, clip: float | None = None
) -> None:
    """One step down a loss.

    Args:
        where: for the sentence, where the loss is not finite.
        weight: that the loss counts with.
        clip: longest gradient of all parameters together.

    Raises: TrainingError where the loss is not finite.
    """
    if not math.isfinite(loss.item()):
        raise TrainingError(f"{where}: the loss is {loss.item()}")
    optimiser.zero_grad(set_to_none=True)
    (loss if weight == 1 else loss * weight).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
    optimiser.step()


def keep_best(
    module: nn.Module, learn: Callable[[int], None], check: Callable[[], float], epochs: int, patience: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Trains with early stopping; afterwards the module has the weights of its best epoch.

    Args:
        learn: trains the module for the epoch of this number.
        check: the score, larger is better; NaN is never the best.
        patience: epochs without a better score.
    """
    best, state, since = -math.inf, copy.deepcopy(module.state_dict()), 0
    for epoch in range(epochs):
        learn(epoch)
        score = check()
        since += 1
        if score > best:
            best, state, since = score, copy.deepcopy(module.state_dict()), 0
        if progress is not None:
            progress(epoch + 1, epochs)
        if since >= patience:
            break
    module.load_state_dict(state)


def _targets(items: MedIMeta, episode: Episode) -> np.ndarray:
    """Soft labels where there are some."""
    return episode.support_y if items.targets is None else items.targets[episode.support]


def batches(count: int, size: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Numbers in the order of an epoch; a last batch of one image joins the one before (batch norm needs two)."""
    order = stream(seed, "order of an epoch", epoch).permutation(count)
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] < 2:
        starts.pop()
    for place, start in enumerate(starts):
        yield order[start : starts[place + 1] if place + 1 < len(starts) else count]
