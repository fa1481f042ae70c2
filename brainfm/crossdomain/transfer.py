"""From one hospital's images to another's: networks trained on a source set, and three ways to take them to a target.

source: as they are · stacking: a meta-learner on their answers · embeddings: a forest, boosted trees or a logistic
regression on their pooled features · finetune: trained on · each network alone, their mean, and their mean weighted by
certainty. What is learnt on the target is learnt on its training and validation splits, and scored on its test split.

Source: Gozzi et al. 2022 (Diagnostics 12:2084), with other networks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from brainfm.crossdomain.adaptation import SupervisedMethod, outputs_of, predicted, supervised
from brainfm.crossdomain.delong import delong
from brainfm.crossdomain.ensembles import entropy_weighted, mean_of, stacked
from brainfm.crossdomain.episodes import Episode
from brainfm.crossdomain.features import forward
from brainfm.crossdomain.layout import TaskTarget, open_dataset, read_split
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.networks import Classifier, build_network, check_network, file_mark, load_kept
from brainfm.crossdomain.planar import Axis
from brainfm.errors import ConfigError, DatasetError
from brainfm.files import check_writable, write_whole
from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import Interval, bootstrap
from brainfm.seeds import torch_stream

KINDS = ("forest", "boosted", "logistic")
_FINER = 0.1  # of the rate on the source set, for training on


@dataclass(frozen=True)
class Route:
    """What is taken where.

    Attributes:
        task: of both sets, or empty: the first of each.
        networks: see networks.py; at least one.
        training: on the source; on the target at a tenth of its rate.
        tiff: whether single TIFF files are read in place of images.hdf5.
    """

    root: Path
    out: Path
    source: str
    target: str
    task: str = ""
    networks: tuple[str, ...] = ("resnet18", "unet_s")
    training: SupervisedMethod = field(default_factory=SupervisedMethod)
    axis: Axis = "mean"
    tiff: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Way:
    """A way to answer, with what it answers for the target's test split.

    Attributes:
        family: source, stacking, embeddings, finetune.
        network: its name, or ``mean`` or ``entropy`` of all.
        kind: of the model on answers or embeddings, or empty.
        answers: [N, L].
        seconds: processor time of all that was trained for it, the source networks apart.
    """

    family: str
    network: str
    kind: str
    answers: np.ndarray
    seconds: float

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.family, self.kind, self.network) if part)


@dataclass(frozen=True)
class Transferred:
    """What came of a route.

    Attributes:
        findings: names of the labels.
        truth: [N, L] of the target's test split, 0 or 1, NaN where nobody knows.
        rows: numbers of its items.
        ways: every way.
        tuned: the fine-tuned models.
        source_seconds: processor time of the source networks, by name.
    """

    findings: tuple[str, ...]
    truth: np.ndarray
    rows: np.ndarray
    items: MedIMeta = field(repr=False)
    ways: tuple[Way, ...]
    tuned: dict[str, Classifier] = field(repr=False)
    source_seconds: dict[str, float]

    def scores(self, way: Way, seed: int = 0) -> tuple[list[Interval], Interval]:
        """AUROC of each finding with DeLong's interval, and their mean with a bootstrap's over images."""
        known = np.isfinite(self.truth)
        each = [delong(self.truth[known[:, k], k], way.answers[known[:, k], k]) for k in range(len(self.findings))]
        groups = [str(row) for row in self.rows]
        return each, bootstrap(_macro, self.truth, way.answers, groups=groups, seed=seed, resamples=1000)

    def difference(self, way: Way, other: Way, seed: int = 0) -> Interval:
        """Mean AUROC of a way less that of another, with a bootstrap's interval over the same images."""

        def less(truth: np.ndarray, own: np.ndarray, others: np.ndarray) -> float:
            return _macro(truth, own) - _macro(truth, others)

        groups = [str(row) for row in self.rows]
        return bootstrap(less, self.truth, way.answers, other.answers, groups=groups, seed=seed, resamples=1000)


def _macro(truth: np.ndarray, answers: np.ndarray) -> float:
    """The mean AUROC over findings that have both answers; unknown labels are left out."""
    values = []
    for label, answer in zip(truth.T, answers.T):
        known = np.isfinite(label)
        values.append(auroc(label[known], answer[known]))
    defined = [value for value in values if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")


def run(route: Route, progress: Callable[[int, int], None] | None = None) -> Transferred:
    """Trains what is not there yet (OUT/networks), and answers in every way.

    Raises: ConfigError where the two sets do not ask the same, DatasetError where a split is empty, FileError where
        nothing can be written into ``out``.
    """
    check_writable(route.out)
    for name in route.networks:
        check_network(name, route.axis)
    source, target = _items(route, route.source), _items(route, route.target)
    if list(source.classes.values()) != list(target.classes.values()) or source.task_target is not target.task_target:
        raise ConfigError(
            f"{route.source} asks {source.task_name!r} with {', '.join(source.classes.values())}, {route.target} asks "
            f"{target.task_name!r} with {', '.join(target.classes.values())}; expected the same"
        )
    steps, done = 2 * len(route.networks) + 1, 0

    def move() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    data = f"{source.fingerprint()} {target.fingerprint()}"
    learnt, test = _rows(target, "train", "val"), _rows(target, "test")
    size, device = route.training.size, route.training.device
    first: dict[str, Classifier] = {}
    tuned: dict[str, Classifier] = {}
    seconds: dict[str, float] = {}
    tuned_seconds: dict[str, float] = {}
    for name in route.networks:
        first[name], seconds[name] = _trained(route, name, source, None, data)
        move()
    for name in route.networks:
        tuned[name], tuned_seconds[name] = _trained(route, name, target, first[name], data)
        move()
    y = _truth(target, learnt)
    here = {name: predicted(model, target, learnt, size, device) for name, model in first.items()}
    there = {name: predicted(model, target, test, size, device) for name, model in first.items()}
    ways = [Way("source", name, "", answers, 0.0) for name, answers in there.items()]
    began = time.process_time()
    beside, beside_test = (np.concatenate(list(part.values()), axis=1) for part in (here, there))
    for kind in ("forest", "logistic"):
        found = stacked(beside, y, beside_test, kind, route.seed)
        ways.append(Way("stacking", "all", kind, found, time.process_time() - began))
        began = time.process_time()
    for name, model in first.items():
        inner, outer = (_embedded(model, target, rows, size, device) for rows in (learnt, test))
        for kind in KINDS:
            began = time.process_time()
            found = stacked(inner, y, outer, kind, route.seed)
            ways.append(Way("embeddings", name, kind, found, time.process_time() - began))
    for name, model in tuned.items():
        answers = predicted(model, target, test, size, device)
        ways.append(Way("finetune", name, "", answers, tuned_seconds[name]))
    ways += _ensembles(ways)
    move()
    truth = _truth(target, test, hard=True)
    findings = tuple(target.classes.values()) if target.places.ndim == 2 else (list(target.classes.values())[-1],)
    return Transferred(findings, truth, test, target, tuple(ways), tuned, seconds)


def _ensembles(ways: Sequence[Way]) -> list[Way]:
    found = []
    for family, kind in dict.fromkeys((way.family, way.kind) for way in ways if way.family != "stacking"):
        own = [way for way in ways if (way.family, way.kind) == (family, kind)]
        if len(own) > 1:
            spent = sum(way.seconds for way in own)
            for name, joined in (("mean", mean_of), ("entropy", entropy_weighted)):
                found.append(Way(family, name, kind, joined([way.answers for way in own]), spent))
    return found


def _items(route: Route, dataset: str) -> MedIMeta:
    info = open_dataset(route.root, dataset)
    items = MedIMeta(route.root, dataset, route.task or info.main_task, use_hdf5=not route.tiff)
    if items.task_target not in (TaskTarget.BINARY_CLASSIFICATION, TaskTarget.MULTILABEL_CLASSIFICATION):
        raise ConfigError(f"{items.task_identifier}: is {items.task_target.name}, expected a binary task or findings")
    return items


def _rows(items: MedIMeta, *splits: str) -> np.ndarray:
    rows = np.flatnonzero(np.isin(items.rows, read_split(items.dataset, splits)))
    if not len(rows):
        raise DatasetError(f"{items.dataset.folder / 'splits'}: {' and '.join(splits)} hold no image, expected some")
    return rows


def _truth(items: MedIMeta, rows: np.ndarray, hard: bool = False) -> np.ndarray:
    """float [N, L]; of soft labels these, or hard ones; NaN where unknown."""
    places = items.places[rows].astype(np.float64)
    if items.targets is None:
        return places if places.ndim == 2 else places[:, None]
    soft = items.targets[rows].astype(np.float64)
    return np.where(np.isfinite(soft), places, np.nan) if hard else soft


def _embedded(model: Classifier, items: MedIMeta, rows: np.ndarray, size: int, device: str) -> np.ndarray:
    parts = [forward(model.network, items, rows[start : start + 64], size, device) for start in range(0, len(rows), 64)]
    return np.concatenate(parts)


def _trained(route: Route, name: str, items: MedIMeta, start: Classifier | None, data: str) -> tuple[Classifier, float]:
    """A classifier of the items' task, from disk or trained, with the processor time that it took; ``data`` tells what
    it is learnt on from other data under the same ids."""
    about = (name, file_mark(name), route.seed, route.training, route.axis, route.source, route.task, data)
    mark = hashlib.sha256(repr(about).encode()).hexdigest()[:10]
    step = "source" if start is None else f"{route.source}_to"
    path = route.out / "networks" / f"{step}_{items.dataset.id}_{mark}.safetensors"
    network = build_network(name, route.seed, route.axis)
    outputs = outputs_of(items.task_target, len(items.classes))
    if path.is_file():
        model = Classifier(network, outputs, torch_stream(route.seed, "head of a split")).to(route.training.device)
        rest = load_kept(model, path, apart=("seconds",))
        return model.eval(), float(rest["seconds"])
    began = time.process_time()
    learnt, check = _rows(items, "train"), _rows(items, "val")
    episode = Episode(learnt, check, items.places[learnt], items.places[check], tuple(range(len(items.classes))))
    training = route.training if start is None else replace(route.training, lr=route.training.lr * _FINER)
    _, model = supervised(network, items, episode, check, training, route.seed, start=start)
    seconds = time.process_time() - began
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_whole(path, save({**state, "seconds": torch.tensor(seconds, dtype=torch.float64)}))
    return model.eval(), seconds
