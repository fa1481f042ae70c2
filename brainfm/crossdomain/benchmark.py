"""The benchmark: methods on the tasks of data sets, one process a data set, each result on disk once it is there.

``OUT/answers/DATASET/TASK/METHOD.npz`` holds what a method answered in each episode; tables are made of these files
alone (`tables`), so that a stopped run goes on, and a method that is added later is answered on the same episodes.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from brainfm.crossdomain.adaptation import FineTune, SupervisedMethod, fine_tune, supervised
from brainfm.crossdomain.episode_scores import Answers
from brainfm.crossdomain.episodes import Episode, Shots, draw, save_episodes
from brainfm.crossdomain.features import CachedFeatures
from brainfm.crossdomain.heads import HEADS, columns
from brainfm.crossdomain.layout import INFO, SPLITS, DatasetInfo, absent, find, read_split
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.methods import FewShotMethod
from brainfm.crossdomain.networks import ImageNetwork, build_network, check_network, file_mark, load_kept
from brainfm.crossdomain.planar import Axis
from brainfm.crossdomain.pretraining import Maml, MultiTask, maml, multi_task, sources_for, tasks_of
from brainfm.crossdomain.twins import twins
from brainfm.data.workers import in_pool, in_this_process
from brainfm.errors import ConfigError, DatasetError
from brainfm.files import read_arrays, write_arrays, write_table, write_text, write_whole
from brainfm.progress import say
from brainfm.seeds import stream

FEW_SHOT, FIXED, RESPLIT = "few-shot", "fixed split", "re-split"


@dataclass(frozen=True)
class BenchmarkPlan:
    """What is run.

    Attributes:
        root, out: of the data sets, and of what is made.
        methods: with the floors among them.
        datasets: ids; none: all.
        all_tasks: whether every task is asked, or each data set's main one.
        learn_all_tasks: whether pre-training uses every task of the other data sets.
        pools: ``all``: episodes are drawn from whole data sets, as published; ``test``: support from training and
            validation, query from the test split.
        resplits: random splits of the same sizes beside the fixed one, for methods on the whole training split but
            end-to-end training.
        axis: of planar networks.
        tiff: whether single TIFF files are read in place of images.hdf5.
    """

    root: Path
    out: Path
    methods: tuple[FewShotMethod, ...]
    datasets: tuple[str, ...] = ()
    all_tasks: bool = False
    learn_all_tasks: bool = True
    shots: Shots = field(default_factory=Shots)
    pools: str = "all"
    resplits: int = 0
    seed: int = 0
    size: int = 224
    axis: Axis = "mean"
    tiff: bool = False
    device: str = "cpu"
    fine_tune: FineTune = field(default_factory=FineTune)
    supervised: SupervisedMethod = field(default_factory=SupervisedMethod)
    multi_task: MultiTask = field(default_factory=MultiTask)
    maml: Maml = field(default_factory=Maml)

    def identity(self) -> dict[str, object]:
        """What makes two runs comparable: all but where, what with, and on what."""
        plain = json.loads(json.dumps(asdict(self), default=str))
        return {key: value for key, value in plain.items() if key not in _NO_IDENTITY}

    def of_size(self) -> BenchmarkPlan:
        """With the size of images and the device handed on to all that trains."""
        shared: dict[str, Any] = {"size": self.size, "device": self.device}
        return replace(
            self, fine_tune=replace(self.fine_tune, **shared), supervised=replace(self.supervised, **shared),
            multi_task=replace(self.multi_task, **shared), maml=replace(self.maml, **shared),
        )  # fmt: skip


_NO_IDENTITY = ("root", "out", "methods", "datasets", "all_tasks", "tiff", "device")


@dataclass(frozen=True)
class BenchmarkJob:
    """A task of a data set that methods are run on."""

    dataset: str
    task: str

    def folder(self, out: Path) -> Path:
        return out / "answers" / self.dataset / self.task


def run(
    plan: BenchmarkPlan, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> tuple[list[BenchmarkJob], list[DatasetError]]:
    """Runs what is not there yet; returns the tasks, and why data sets among them were not finished.

    Args:
        workers: processes, each with one data set at a time.

    Raises:
        ConfigError: where ``out`` holds answers of another plan, or a network is unknown.
        DatasetError: where none of the data sets, or not one that is named, can be read.
    """
    for name in dict.fromkeys(method.network for method in plan.methods if not method.is_floor):
        check_network(name, plan.axis)
    found, faults = find(plan.root)
    for fault in faults if found else ():
        say(f"left out: {fault}")
    names = list(plan.datasets or found)
    if not names:
        raise (
            faults[0]
            if faults
            else DatasetError(f"{plan.root}: holds no data set, expected one or more folders ID/{INFO}")
        )
    for name in names:
        if name not in found:
            raise absent(plan.root, name, found, faults)
    _settle_identity(plan)
    plan = plan.of_size()
    jobs = [BenchmarkJob(name, task) for name in names for task in _tasks(found[name], plan.all_tasks)]
    size = {name: len(plan.methods) * len(_tasks(found[name], plan.all_tasks)) for name in names}
    total, done = sum(size.values()), 0

    def move(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    errors: list[DatasetError] = []
    if workers == 1 or len(names) == 1:
        results = in_this_process(partial(_or_its_error, plan, one_done=lambda: move(1)), names)
    else:
        results = in_pool(partial(_or_its_error, plan), names, workers, _KILLED)
    for number, error in results:
        if error is not None:
            errors.append(error)
        elif workers > 1 and len(names) > 1:
            move(size[names[number]])
    return jobs, errors


_KILLED = "a process of the benchmark was killed, perhaps for want of memory; the same command with workers=1 goes on"


def _or_its_error(plan: BenchmarkPlan, name: str, one_done: Callable[[], None] | None = None) -> DatasetError | None:
    try:
        run_dataset(plan, name, one_done)
    except DatasetError as error:
        return error
    return None


def run_dataset(plan: BenchmarkPlan, name: str, one_done: Callable[[], None] | None = None) -> None:
    """Every method on the tasks of one data set."""
    torch.set_num_threads(1)
    info = find(plan.root)[0][name]
    for task in _tasks(info, plan.all_tasks):
        job = BenchmarkJob(name, task)
        items = MedIMeta(plan.root, name, task, use_hdf5=not plan.tiff)
        _audit_twins(plan, job, items, anew=_settle_data(plan, job, items))
        episodes: list[Episode] | None = None
        for method in plan.methods:
            path = answers_path(plan.out, job, method)
            if not path.is_file():
                if not method.whole and episodes is None:
                    episodes = _episodes(plan, job, items)
                _answer(plan, job, items, method, episodes or [], path)
            if one_done is not None:
                one_done()


def answers_path(out: Path, job: BenchmarkJob, method: FewShotMethod) -> Path:
    """Its name says which method; behind it is a hash, of the network's file too, so that other weights under the same
    name are another method."""
    mark = _mark(str(method), method.network)
    short = FewShotMethod(method.how, method.network.rpartition("/")[2], method.pretraining)
    return job.folder(out) / f"{_file_name(str(short))[:60]}_{mark}.npz"


def _mark(text: str, network: str) -> str:
    return hashlib.sha256(f"{text}{file_mark(network)}".encode()).hexdigest()[:8]


def save_answers(path: Path, groups: dict[str, list[Answers]], about: dict[str, object]) -> None:
    """Answers by setting (few-shot, fixed split, re-split), without pickles."""
    arrays: dict[str, np.ndarray] = {"about": np.array(json.dumps(about, sort_keys=True))}
    for setting, answers in groups.items():
        arrays[f"{setting}/sizes"] = np.array([len(each.rows) for each in answers])
        arrays[f"{setting}/rows"] = np.concatenate([each.rows for each in answers])
        arrays[f"{setting}/truth"] = np.concatenate([each.truth for each in answers])
        arrays[f"{setting}/scores"] = np.concatenate([each.scores for each in answers]).astype(np.float32)
    write_arrays(path, arrays, compressed=True)


def load_answers(path: Path) -> tuple[dict[str, list[Answers]], dict[str, object]]:
    """Raises: DatasetError where the file is damaged."""
    arrays = read_arrays(path, DatasetError, "answers of a benchmark, which are made anew where the file is deleted")
    try:
        groups = {}
        for setting in {name.partition("/")[0] for name in arrays} - {"about"}:
            ends = np.cumsum(arrays[f"{setting}/sizes"])[:-1]
            cut = [np.split(arrays[f"{setting}/{what}"], ends) for what in ("rows", "truth", "scores")]
            groups[setting] = [Answers(*parts) for parts in zip(*cut)]
        return groups, json.loads(str(arrays["about"]))
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{path}: holds no answers of a benchmark ({error}); delete it and run again") from None


# ---- one method ------------------------------------------------------------------------------------------------------


def _answer(
    plan: BenchmarkPlan,
    job: BenchmarkJob,
    items: MedIMeta,
    method: FewShotMethod,
    episodes: Sequence[Episode],
    path: Path,
) -> None:
    began = time.process_time()
    network = None if method.is_floor else _network(plan, job, method)
    pretrained = time.process_time() - began
    groups: dict[str, list[Answers]]
    seconds = 0.0
    if method.how == "supervised":
        assert network is not None
        episode, validation = _fixed(items, split_of_validation=True)
        groups = {FIXED: [supervised(network, items, episode, validation, plan.supervised, plan.seed)[0]]}
    elif method.how == "finetune":
        assert network is not None
        groups = {FEW_SHOT: [fine_tune(network, items, episode, plan.fine_tune, _seed_of(plan, number))
                             for number, episode in enumerate(episodes)]}  # fmt: skip
    else:
        source = method.network if method.is_floor else network
        assert source is not None
        features = CachedFeatures(items, source, plan.size, plan.out / "features", device=plan.device)
        if method.whole:
            head = HEADS[method.how.removeprefix("full_")]
            groups = {FIXED: [_by_head(head, items, features, _fixed(items)[0], plan.seed)]}
            again = [_resplit(items, plan.seed, number) for number in range(plan.resplits)]
            if again:
                groups[RESPLIT] = [_by_head(head, items, features, episode, plan.seed) for episode in again]
        else:
            head = HEADS[method.how]
            groups = {FEW_SHOT: [_by_head(head, items, features, episode, _seed_of(plan, number))
                                 for number, episode in enumerate(episodes)]}  # fmt: skip
        seconds = features.seconds
    about = {
        "method": str(method), "dataset": job.dataset, "task": job.task, "domain": items.domain_identifier,
        "target": items.task_target.name, "images": len(items), "seconds": time.process_time() - began - pretrained,
        "feature_seconds": seconds, "pretraining_seconds": pretrained,
    }  # fmt: skip
    save_answers(path, groups, about)


def _by_head(head: object, items: MedIMeta, features: CachedFeatures, episode: Episode, seed: int) -> Answers:
    target, classes = items.task_target, len(episode.classes)
    truth = columns(episode.support_y, target, classes)
    scores = head(features.of(episode.support), truth, features.of(episode.query), seed)  # type: ignore[operator]
    return Answers(items.rows[episode.query], columns(episode.query_y, target, classes), scores)


def _network(plan: BenchmarkPlan, job: BenchmarkJob, method: FewShotMethod) -> ImageNetwork:
    """The method's network, pre-trained on the other data sets where it says so; such weights are kept."""
    network = build_network(method.network, plan.seed, plan.axis)
    if not method.pretraining:
        return network
    mark = _mark(method.network, method.network)
    path = plan.out / "pretrained" / f"{job.dataset}_{method.pretraining}_{mark}.safetensors"
    if not path.is_file():
        found = find(plan.root)[0]
        sources = tasks_of(str(plan.root), sources_for(job.dataset, found), found, plan.learn_all_tasks, plan.tiff)
        say(f"{method.pretraining} of {method.network} without {job.dataset}: {len(sources)} tasks")
        if method.pretraining == "mmpt":
            network = multi_task(network, sources, plan.multi_task, plan.seed)
        else:
            settings = replace(plan.maml, second_order=method.pretraining == "mmmaml")
            network = maml(network, sources, settings, plan.seed)
        write_whole(path, save({name: value.cpu().contiguous() for name, value in network.state_dict().items()}))
    load_kept(network, path)
    return network


# ---- episodes and splits ---------------------------------------------------------------------------------------------


def _episodes(plan: BenchmarkPlan, job: BenchmarkJob, items: MedIMeta) -> list[Episode]:
    pools = None
    if plan.pools == "test":
        sides = _sides(items)
        pools = (np.flatnonzero(np.isin(sides, ("train", "val"))), np.flatnonzero(sides == "test"))
        for side, rows in zip(("train", "test"), pools):
            _check_side(items, side, rows)
    name = f"{job.dataset}: {job.task}"
    episodes = draw(items.places, items.task_target, plan.shots, plan.seed, name, pools)
    path = job.folder(plan.out) / "episodes.npz"
    if not path.is_file():
        save_episodes(path, episodes, {"seed": plan.seed, "task": name, "pools": plan.pools})
    return episodes


def _sides(items: MedIMeta) -> np.ndarray:
    """[N] the split of each item; empty where it has none."""
    sides = np.full(len(items), "", dtype="<U5")
    for split in SPLITS:
        if (items.dataset.folder / "splits" / f"{split}.txt").is_file():
            sides[np.isin(items.rows, read_split(items.dataset, split))] = split
    return sides


def _fixed(items: MedIMeta, split_of_validation: bool = False) -> tuple[Episode, np.ndarray]:
    """Training (and validation) against test, and the validation split.

    Raises: DatasetError where a class is absent from a split.
    """
    return _of_sides(items, _sides(items), split_of_validation)


def _resplit(items: MedIMeta, seed: int, number: int) -> Episode:
    """Random splits of the same sizes, class by class."""
    sides = _sides(items)
    kinds = np.unique(items.places, axis=0, return_inverse=True)[1].ravel()
    rng = stream(seed, f"re-split of {items.dataset.id}", number)
    for kind in np.unique(kinds):
        rows = np.flatnonzero(kinds == kind)
        sides[rows] = sides[rng.permutation(rows)]
    return _of_sides(items, sides, False)[0]


def _of_sides(items: MedIMeta, sides: np.ndarray, apart: bool) -> tuple[Episode, np.ndarray]:
    learnt = np.flatnonzero(np.isin(sides, ("train",) if apart else ("train", "val")))
    query, validation = np.flatnonzero(sides == "test"), np.flatnonzero(sides == "val")
    for name, rows in (("train", learnt), ("test", query), *([("val", validation)] if apart else [])):
        _check_side(items, name, rows)
    places = items.places
    classes = tuple(range(len(items.classes)))
    return Episode(learnt, query, places[learnt], places[query], classes), validation


def _check_side(items: MedIMeta, name: str, rows: np.ndarray) -> None:
    """Raises: DatasetError where a split is empty, lacks a class, or of every label one of the two answers."""
    path = items.dataset.folder / "splits" / f"{name}.txt"
    if not len(rows):
        raise DatasetError(f"{path}: no such split, or no image in it, expected some of every class")
    names = [items.classes[value] for value in sorted(items.classes)]
    if items.places.ndim == 1:
        lacking = [names[place] for place in range(len(names)) if not (items.places[rows] == place).any()]
        if lacking:
            raise DatasetError(f"{path}: task {items.task_name!r} has no image of {lacking[0]!r} there")
        return
    truth = items.places[rows]
    if (truth.min(axis=0) == truth.max(axis=0)).all():
        raise DatasetError(f"{path}: task {items.task_name!r} has no label there that some images have and some not")


def _settle_data(plan: BenchmarkPlan, job: BenchmarkJob, items: MedIMeta) -> bool:
    """Answers of other images under the same id are not gone on from. Returns whether the data are new here.

    Raises: DatasetError.
    """
    path, mark = job.folder(plan.out) / "data.json", items.fingerprint()
    if path.is_file() and mark in path.read_text(encoding="utf-8", errors="replace"):
        return False
    if path.is_file() and any(path.parent.glob("*@*.npz")):
        raise DatasetError(
            f"{path}: {items.task_identifier} had other images, labels or splits when the answers there were made; "
            "give another out="
        )
    (path.parent / "episodes.npz").unlink(missing_ok=True)
    write_text(path, json.dumps({"images_and_labels": mark}) + "\n")
    return True


def _audit_twins(plan: BenchmarkPlan, job: BenchmarkJob, items: MedIMeta, anew: bool) -> None:
    path = plan.out / "answers" / job.dataset / "twins.csv"
    if path.is_file() and not anew:
        return
    sides = _sides(items)
    test, learnt = np.flatnonzero(sides == "test"), np.flatnonzero(np.isin(sides, ("train", "val")))
    found = twins(items, test, learnt) if len(test) and len(learnt) else []
    rows = [(f"images/{t.image:06d}.tiff", f"images/{t.other:06d}.tiff", f"{t.r:.4f}", len(test)) for t in found]
    write_table(path, ("test_image", "learnt_image", "r", "test_images"), rows or [("", "", "", len(test))])


def _settle_identity(plan: BenchmarkPlan) -> None:
    path = plan.out / "plan.json"
    identity = plan.identity()
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in identity if before.get(key) != identity[key]]
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path}: cannot be read as the plan of a benchmark ({error}); give another out="
            ) from None
        if other:
            raise ConfigError(
                f"{path}: was made with {other[0]}={before.get(other[0])}, found {identity[other[0]]}; "
                "give another out="
            )
        return
    write_text(path, json.dumps(identity, indent=1, sort_keys=True) + "\n")


def _seed_of(plan: BenchmarkPlan, number: int) -> int:
    return int(stream(plan.seed, "seed of an episode", number).integers(2**31))


def _tasks(info: DatasetInfo, all_tasks: bool) -> list[str]:
    return list(info.tasks) if all_tasks else [info.main_task]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w@+.-]+", "_", text)
