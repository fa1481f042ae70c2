"""Test networks on 2D medical images: few-shot across domains, and chest X-ray style transfer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from brainfm.errors import ConfigError, DatasetError
from brainfm.settings import VERBATIM
from brainfm.verbs.running import bar

if TYPE_CHECKING:
    from brainfm.crossdomain.additions import Addition
    from brainfm.crossdomain.benchmark import BenchmarkPlan
    from brainfm.crossdomain.shortcut import MarkerAudit
    from brainfm.crossdomain.transfer import Route, Transferred

PLACE = 14
_LEAST = {
    "shots": 1, "queries": 0, "episodes": 1, "size": 8, "workers": 1, "steps": 1, "batch": 2, "resplits": 0, "seed": 0,
    "max_epochs": 1, "patience": 0, "meta_episodes": 1, "meta_validation": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Data sets in the MedIMeta layout (19 public ones, and own ones), and methods on them. Interrupted, the same
    command goes on. Needs brainfm-mri[crossdomain].
    action=add: a data set of own images, of a folder with a CSV, a MedMNIST .npz, or a CheXpert-style CSV.

      brainfm medimeta action=add root=sets id=breast domain='Breast ultrasound' medmnist=breastmnist.npz size=28
      brainfm medimeta action=add root=sets id=own domain=Skin table=labels.csv folder=images tasks.kind=multiclass
      brainfm medimeta action=add root=sets id=chexpert domain='Chest X-ray' chexpert=train.csv folder=CheXpert

    action=check: every fault of the data sets; exit 1 if any.

      brainfm medimeta action=check root=sets

    action=benchmark: methods HOW@NETWORK[+PRETRAINING]. HOW: logistic, prototypes, forest, linear, finetune (few-shot),
    supervised, full_logistic, full_forest (the whole training split). NETWORK: resnet18, resnet50, resnet18:FILE,
    unet_s and other backbones made planar, planar:FILE (a backbone file), efficientnet_lite0 (brainfm-mri[imagenet]),
    and the floors statistics and pixels. PRETRAINING: mmpt, mmmaml, mmmaml1, on the other data sets. Leaves table.csv,
    differences.csv and index.html.

      brainfm medimeta action=benchmark root=sets out=table methods=[logistic@resnet18,'finetune@resnet18+mmpt']

    action=transfer: networks trained on source= and taken to target= by stacking, embeddings and fine-tuning. Leaves
    table.csv, roc.png, maps and index.html.

      brainfm medimeta action=transfer root=sets out=cxr source=chexpert target=hospital networks=[resnet18,unet_s]
    """

    action: Annotated[Literal["add", "check", "benchmark", "transfer"], "what to do"]
    root: Annotated[Path, "folder of the data sets"]
    out: Annotated[Path | None, "benchmark, transfer: folder of what is made"] = None
    # add
    id: Annotated[str, "add: of the new data set, a folder's name", VERBATIM] = ""
    name: Annotated[str, "add: of the new data set; empty: its id", VERBATIM] = ""
    domain: Annotated[str, "add: e.g. Chest X-ray", VERBATIM] = ""
    license: Annotated[str, "add: of the images", VERBATIM] = "unknown"
    table: Annotated[Path | None, "add: CSV with the columns path, those of tasks, split and patient_id"] = None
    medmnist: Annotated[Path | None, "add: or a MedMNIST .npz"] = None
    chexpert: Annotated[Path | None, "add: or a CheXpert-style CSV"] = None
    folder: Annotated[Path | None, "add: what paths in the CSV are relative to; null: the CSV's folder"] = None
    tasks: Annotated[Mapping[str, str], "add: tasks.COLUMN=multiclass|binary|multilabel|ordinal, of table"] = field(
        default_factory=dict
    )
    task: Annotated[
        str, "add: name of the task of medmnist; transfer: of both data sets, empty: the first", VERBATIM
    ] = ""
    labels: Annotated[tuple[str, ...], "add: names of the labels of medmnist"] = ()
    uncertain: Annotated[Literal["ones", "zeros", "ignore", "smooth"], "add: what -1 means in chexpert"] = "ones"
    views: Annotated[tuple[str, ...], "add: of chexpert"] = ("AP", "PA")
    channels: Annotated[Literal[1, 3], "add: grey or RGB"] = 1
    fit: Annotated[Literal["pad", "crop"], "add: how images become square"] = "pad"
    domain_overlaps: Annotated[tuple[str, ...], "add: ids of data sets of the same domain"] = ()
    subject_overlaps: Annotated[tuple[str, ...], "add: ids of data sets of the same people"] = ()
    # benchmark
    methods: Annotated[tuple[str, ...], "benchmark"] = ("logistic@resnet18", "prototypes@resnet18")
    datasets: Annotated[tuple[str, ...], "benchmark: ids; []: all"] = ()
    all_tasks: Annotated[bool, "benchmark: every task in place of each data set's first"] = False
    shots: Annotated[int, "benchmark: support images a class"] = 5
    queries: Annotated[int, "benchmark: query images a class; 0: all that are left"] = 10
    ways: Annotated[int | None, "benchmark: classes of an episode; null: all"] = None
    episodes: Annotated[int, "benchmark"] = 100
    pools: Annotated[
        Literal["all", "test"], "benchmark: episodes from all images, or queries from the test split alone"
    ] = "all"
    resplits: Annotated[int, "benchmark: random splits beside the fixed one, for full_logistic and full_forest"] = 0
    size: Annotated[int, "edge in pixels: of images that are added, and that networks read"] = 224
    axis: Annotated[Literal["x", "y", "z", "mean"], "over which a 3D network's kernels are summed"] = "mean"
    lr: Annotated[float, "of Adam: fine-tuning, supervised, pre-training (published: 1e-4 for ResNet-50)"] = 1e-3
    steps: Annotated[int, "of an episode's fine-tuning"] = 50
    batch: Annotated[int, "supervised, mmpt, transfer"] = 64
    max_epochs: Annotated[int, "cap where the publication has none: supervised, mmpt, mmmaml, transfer"] = 50
    patience: Annotated[int, "supervised, mmpt, transfer: epochs without a better AUROC; mmmaml: half of it"] = 10
    augment: Annotated[bool, "supervised, mmpt, transfer"] = True
    learn_all_tasks: Annotated[bool, "mmpt, mmmaml: every task of the other data sets, or each one's first"] = True
    meta_episodes: Annotated[int, "mmmaml: of each task, an epoch"] = 1000
    meta_validation: Annotated[int, "mmmaml: of each task"] = 100
    # transfer
    source: Annotated[str, "transfer: id of the data set that networks are trained on", VERBATIM] = ""
    target: Annotated[str, "transfer: id of the data set that they are taken to", VERBATIM] = ""
    networks: Annotated[tuple[str, ...], "transfer"] = ("resnet18", "unet_s")
    shortcut: Annotated[bool, "transfer: also train with a planted marker, and audit whether it is exposed"] = False
    tiff: Annotated[bool, "check, benchmark, transfer: read images/NNNNNN.tiff in place of images.hdf5"] = False
    device: Annotated[str, "auto | cpu | cuda"] = "auto"
    workers: Annotated[int, "benchmark: processes, a data set each"] = 1
    seed: Annotated[int, "of episodes, splits and fresh weights"] = 0
    command: str = ""
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if self.action in ("benchmark", "transfer") and self.out is None:
            raise ConfigError(f"brainfm medimeta action={self.action}: out must be given, e.g. out=DIR")
        if self.action == "transfer" and not (self.source and self.target):
            raise ConfigError("brainfm medimeta action=transfer: source and target must be given, ids of data sets")
        sources = [name for name in ("table", "medmnist", "chexpert") if getattr(self, name)]
        if self.action == "add" and (len(sources) != 1 or not self.id or not self.domain):
            raise ConfigError("brainfm medimeta action=add: expected id, domain, and one of table, medmnist, chexpert")
        if self.table and not self.tasks:
            raise ConfigError("brainfm medimeta action=add table=...: expected tasks.COLUMN=multiclass or another kind")
        for key, value in _LEAST.items():
            if getattr(self, key) < value:
                raise ConfigError(f"{key}={getattr(self, key)}: expected at least {value}")
        if self.ways is not None and self.ways < 1:
            raise ConfigError(f"ways={self.ways}: expected 1 or more classes, or null for all")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr:g}: expected a rate above 0")
        for key, action in (("methods", "benchmark"), ("networks", "transfer")):
            given = getattr(self, key)
            if self.action == action and (not given or len(set(given)) < len(given)):
                raise ConfigError(f"{key}=[{', '.join(given)}]: expected one or more, each once")

    def addition(self) -> Addition:
        from brainfm.crossdomain import additions

        if self.medmnist is not None:
            return additions.from_medmnist(self.medmnist, self.task or "class", self.labels)
        if self.chexpert is not None:
            folder = self.folder or self.chexpert.parent
            return additions.from_chexpert(folder, self.chexpert, self.uncertain, self.views, seed=self.seed)
        assert self.table is not None
        return additions.from_table(self.folder or self.table.parent, self.table, self.tasks, seed=self.seed)

    def plan(self) -> BenchmarkPlan:
        from brainfm.crossdomain.adaptation import FineTune, SupervisedMethod
        from brainfm.crossdomain.benchmark import BenchmarkPlan
        from brainfm.crossdomain.episodes import Shots
        from brainfm.crossdomain.methods import with_floors
        from brainfm.crossdomain.pretraining import Maml, MultiTask

        assert self.out is not None
        trained: dict[str, Any] = {"lr": self.lr, "max_epochs": self.max_epochs}
        splits: dict[str, Any] = {**trained, "batch": self.batch, "patience": self.patience, "augment": self.augment}
        return BenchmarkPlan(
            root=self.root, out=self.out, methods=tuple(with_floors(self.methods)), datasets=self.datasets,
            all_tasks=self.all_tasks, learn_all_tasks=self.learn_all_tasks,
            shots=Shots(self.shots, self.queries, self.ways, self.episodes), pools=self.pools, resplits=self.resplits,
            seed=self.seed, size=self.size, axis=self.axis, tiff=self.tiff, device=_device(self.device),
            fine_tune=FineTune(lr=self.lr, steps=self.steps), supervised=SupervisedMethod(**splits),
            multi_task=MultiTask(**splits),
            maml=Maml(**trained, episodes=self.meta_episodes, validation=self.meta_validation,
                      patience=max(1, self.patience // 2)),
        )  # fmt: skip


def run(settings: Settings) -> int:
    from brainfm.extras import demand

    demand("h5py", f"brainfm medimeta action={settings.action}")
    if settings.action in ("benchmark", "transfer"):
        demand("matplotlib", f"brainfm medimeta action={settings.action}")
    return {"add": _add, "check": _check, "benchmark": _benchmark, "transfer": _transfer}[settings.action](settings)


def _add(settings: Settings) -> int:
    from brainfm.crossdomain.additions import About, write_dataset

    about = About(
        settings.id, settings.name or settings.id, settings.domain, settings.license, size=settings.size,
        channels=settings.channels, fit=settings.fit, domain_overlaps=settings.domain_overlaps,
        subject_overlaps=settings.subject_overlaps,
    )  # fmt: skip
    addition = settings.addition()
    with bar("add", addition.count) as move:
        folder = write_dataset(settings.root, about, addition, move)
    print(f"{folder}: {addition.count} images, tasks {', '.join(task.name for task in addition.tasks)}")
    return 0


def _check(settings: Settings) -> int:
    from brainfm.crossdomain.checks import check
    from brainfm.crossdomain.layout import find

    found, broken = find(settings.root)
    faults = [str(error) for error in broken]
    for info in found.values():
        own = check(info, settings.tiff)
        faults += own
        print(f"{info.id}: {info.total} images, {len(info.tasks)} tasks, {len(own) or 'no'} faults")
    print("\n".join(faults) if faults else f"{settings.root}: {len(found)} data sets, no faults")
    return 1 if faults else 0


def _benchmark(settings: Settings) -> int:
    from brainfm.crossdomain.benchmark import run
    from brainfm.crossdomain.page import write_benchmark
    from brainfm.crossdomain.tables import tables, write_tables

    plan = settings.plan()
    with bar("benchmark") as move:
        jobs, errors = run(plan, settings.workers, move)
    rows, pairs = tables(plan.out, jobs, plan.methods, plan.seed)
    if errors and not rows:
        raise errors[0]
    write_tables(plan.out, rows, pairs)
    page = write_benchmark(plan.out, rows, pairs, settings.command)
    for row in rows:
        print(f"{row.setting:<12} {row.dataset:<14} {row.method:<40} {row.found.mean:.3f} "
              f"[{row.found.low:.3f}, {row.found.high:.3f}]")  # fmt: skip
    print(f"{page}: {len(rows)} rows")
    if errors:
        rest = f" (and {len(errors) - 1} more data sets)" if len(errors) > 1 else ""
        raise DatasetError(f"{errors[0]}{rest}; the table holds what was answered")
    return 0


def _transfer(settings: Settings) -> int:
    from brainfm.crossdomain.adaptation import SupervisedMethod
    from brainfm.crossdomain.transfer import Route, run
    from brainfm.crossdomain.transfer_page import write_transfer

    assert settings.out is not None
    training = SupervisedMethod(
        settings.lr, settings.batch, settings.patience, settings.max_epochs, settings.augment, settings.size,
        _device(settings.device),
    )  # fmt: skip
    route = Route(
        settings.root, settings.out, settings.source, settings.target, settings.task, settings.networks, training,
        settings.axis, settings.tiff, settings.seed,
    )  # fmt: skip
    with bar("transfer") as move:
        found = run(route, move)
    audits = _audits(route, found) if settings.shortcut else []
    page = write_transfer(
        settings.out, found, audits, training.size, training.device, settings.command, settings.seed
    )  # fmt: skip
    for way in found.ways:
        whole = found.scores(way, settings.seed)[1]
        print(f"{way.name:<40} {whole.mean:.3f} [{whole.low:.3f}, {whole.high:.3f}]")
    print(f"{page}: {len(found.ways)} ways on {len(found.rows)} images")
    return 0


def _audits(route: Route, found: Transferred) -> list[tuple[str, MarkerAudit]]:
    """The first fine-tuned network, and one trained with a marker that goes with the first finding."""
    from brainfm.crossdomain.networks import build_network
    from brainfm.crossdomain.shortcut import corner_audit, trained_on_markers

    name, training = route.networks[0], route.training
    network = build_network(name, route.seed, route.axis)
    fooled = trained_on_markers(network, found.items, training, 0, route.seed)
    models = {f"{name}, fine-tuned": found.tuned[name], f"{name}, trained with the marker": fooled}
    return [
        (words, corner_audit(model, found.items, found.rows, 0, training.size, training.device, route.seed))
        for words, model in models.items()
    ]


def _device(name: str) -> str:
    from brainfm.tasks.engine import settle_device

    return str(settle_device(name))
