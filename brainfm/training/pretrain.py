"""Pre-training: a store and an objective in, a backbone file out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from brainfm.batch import Batch, Terms
from brainfm.data.augment import AugmentSpec, apply, augment_spec, draw, render
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import PretrainPatches
from brainfm.data.regions import REGIONS, merged_members
from brainfm.data.settings import TargetSpec
from brainfm.data.store import SessionEntry, Store
from brainfm.data.targets import Targets, find_targets
from brainfm.data.torchio_transforms import check_still
from brainfm.data.windows import WindowPatches
from brainfm.errors import ConfigError, ManifestError
from brainfm.files import write_whole
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, save_backbone
from brainfm.nets.branches import draw_branches
from brainfm.nets.transfer import TransferReport
from brainfm.nets.untrained import random_backbone
from brainfm.objectives.objective import Objective, make_objective
from brainfm.objectives.settings import AnatomyPathologySettings, DenseSplitSettings, ObjectiveSettings
from brainfm.probing.levels import LevelProbe
from brainfm.probing.online import OnlineProbe, with_whole
from brainfm.probing.settings import OnlineProbeSpec
from brainfm.progress import say
from brainfm.scoring.folds import holdout
from brainfm.seen import SeenSubjects
from brainfm.settings import plain
from brainfm.specs import PreprocessSpec, Provenance, ViewSpec
from brainfm.synthesis.settings import LookSpec
from brainfm.training import receipt
from brainfm.training.average import WeightAverage
from brainfm.training.finish import Finish, branch
from brainfm.training.loop import LoopSpec, Run, State, train
from brainfm.training.optim import build_optimizer
from brainfm.training.pictures import save_pictures
from brainfm.training.processes import make_fabric
from brainfm.training.run import identity_of, loop_spec, optim_values, provenance_of
from brainfm.training.settings import PretrainData, PretrainSettings, WsdSettings
from brainfm.training.speed import quicken, settled
from brainfm.training.warm_start import so_far, take_weights, voxels_seen

LOOKS = LookSpec()
BACKBONE_FILE = "backbone.safetensors"


class Augmented(torch.nn.Module):
    """Augments a batch on the device, then asks; outside training mode it only asks. Carries the weights' average.

    Args:
        decay: of the average of the whole objective; None: none.
        looks: how renderings vary, of an objective that wants windows (``data.looks``).
    """

    def __init__(
        self,
        question: Objective,
        spec: AugmentSpec | None,
        seed: int,
        decay: float | None = None,
        looks: LookSpec = LOOKS,
    ) -> None:
        super().__init__()
        # `question` by name: checkpoints of runs that are to go on hold their weights under it
        self.question, self.spec, self.seed, self.looks = question, spec, seed, looks
        self.average = None if decay is None else WeightAverage(question, decay)

    def begin_with(self, loaded: LoadedBackbone, origin: str) -> TransferReport:
        """Takes a backbone file's weights, the average too. Raises: WeightsError where the encoder does not fit."""
        report = take_weights(self.question, loaded, origin)
        if self.average is not None:
            self.average.network.load_state_dict(self.question.state_dict())
        return report

    def forward(self, batch: Batch, progress: float) -> Terms:
        with torch.autocast(batch.image.device.type, enabled=False):  # pictures are made in float32 and then looked at
            batch = self.shown(batch)
            if self.training and self.spec is not None:
                batch = apply(batch, draw(batch, self.spec, self.seed))
        if self.training:
            draw_branches(self.question, self.seed, batch.sample)
        return self.question(batch, progress)

    def shown(self, batch: Batch) -> Batch:
        """Windows cut into views, and rendered where they are to be; patches as they are."""
        return render(batch, self.looks, self.question.views.patch_vox, self.seed)

    @property
    def answering(self) -> Objective:
        """What is probed, validated, shown and saved: the averaged objective, where there is an average."""
        return self.question if self.average is None else self.average.network  # type: ignore[return-value]

    def after_step(self, step: int, progress: float) -> None:
        """A teacher moves, then the average takes its share of all."""
        self.question.after_step(progress)
        if self.average is not None:
            self.average.update(step)


def pretrain(settings: PretrainSettings) -> State:
    """Runs or resumes a pre-training.

    Leaves ``backbone.safetensors``, ``last.ckpt``, ``curves.csv``, ``tensorboard/``, ``pictures/``, ``probes.json`` and
    ``receipt.json`` in ``run``. With ``finish.from`` the run is a copy of another one, with a decay (finish.py).

    Raises:
        BrainfmError: whatever the user can mend, in one sentence.
    """
    before = None if settings.backbone_from == "none" else load_backbone(settings.backbone_from)
    if before is not None:
        settings = replace(settings, backbone=dict(before.backbone.config))
    build_backbone(**settings.backbone)  # what cannot be built is refused before a store is looked for
    store, folder = Store.open(settings.store), settings.run
    settings = replace(settings, trainer=settled(settings.trainer))
    trainer = settings.trainer
    fabric = make_fabric(trainer)
    made = assembled(settings, store, fabric.world_size)
    module, train_set, sides, targets = made.module, made.train_set, made.sides, made.targets
    objective, backbone, batch_size = module.question, module.question.backbone, trainer.batch_size
    taken = None if before is None else module.begin_with(before, settings.backbone_from)
    quicken(objective, trainer)  # after the average was copied: a compiled network cannot be
    optimizer = build_optimizer(objective, **optim_values(settings.optim))
    if fabric.is_global_zero:
        say(
            f"{sum(p.numel() for p in objective.parameters()):,} parameters in pre-training "
            f"({sum(p.numel() for p in backbone.parameters()):,} in the encoder); "
            f"{len(train_set)} subjects to train on, {len({s.subject_key for s in sides[1]})} held out"
        )
        for note in (*targets.notes, *([] if taken is None else [f"{settings.backbone_from}: {taken}"])):
            say(note)
    spec, identity, finish = _schedule(settings, pretrain_identity(settings, store, before), fabric)
    probe = _online_probe(settings, module, store, sides, fabric)
    if probe is not None:
        spec = replace(spec, probe_every=probe.spec.every)
        if fabric.is_global_zero:
            say("\n".join(probe.plan()))
    folder.mkdir(parents=True, exist_ok=True)  # what is refused leaves none

    def loader_from(step: int) -> Any:
        steps = StepSampler(step, spec.max_steps, batch_size, fabric.global_rank, fabric.world_size)
        return make_loader(train_set, steps, trainer.workers, pin_memory=fabric.device.type == "cuda")

    file = _BackboneFile(module, store, train_set, settings, fabric, finish, before)
    state = train(
        Run(
            fabric=fabric,
            folder=folder,
            identity=identity,
            module=module,
            optimizer=optimizer,
            loader_from=loader_from,
            spec=spec,
            evaluate=_Validation(fabric, module, store, sides[1], sides[0], targets, settings),
            after_step=module.after_step,
            saved=file.write if spec.wsd is not None and finish is None else None,
            probe=probe,
            guard=settings.guard,
            title="pretrain",
        )
    )
    if fabric.is_global_zero:
        write_whole(folder / receipt.FILE, (json.dumps(state.receipt, indent=1) + "\n").encode())
        if state.step >= spec.max_steps:
            say(file.write(state))
            say(receipt.describe(state.receipt))
            if probe is not None and probe.table:
                say("\n".join(probe.describe()))
        else:
            say(f"stopped after step {state.step} of {spec.max_steps} and saved; the same command goes on from there")
    return state


@dataclass(frozen=True)
class Assembled:
    """A pre-training before its first step.

    Attributes:
        sides: sessions to train on, and held out.
        targets: of the data, for whoever is trained on.
    """

    module: Augmented
    train_set: PretrainPatches | WindowPatches
    sides: tuple[list[SessionEntry], list[SessionEntry]]
    targets: Targets


def assembled(settings: PretrainSettings, store: Store, processes: int = 1) -> Assembled:
    """What the settings describe, with fresh weights, on the CPU. Raises: BrainfmError for what cannot be."""
    data, seed = settings.data, settings.seed
    torch.manual_seed(seed)  # the initial weights; nothing later draws from the ambient stream
    backbone = build_backbone(**settings.backbone)
    sides = sides_of(store, data)
    asked, targets = _with_targets(settings, store, sides[0])
    objective = make_objective(asked, backbone, patch_vox=data.patch_vox, seed=seed)
    module = Augmented(objective, _artefacts(data.augment, objective.views), seed, settings.average, data.looks)
    samples = settings.trainer.batch_size * processes
    return Assembled(
        module, make_patches(data, seed, store, sides[0], objective.views, targets, samples), sides, targets
    )


def _online_probe(
    settings: PretrainSettings,
    module: Augmented,
    store: Store,
    sides: tuple[list[SessionEntry], list[SessionEntry]],
    fabric: Fabric,
) -> OnlineProbe | None:
    """What watches the features of what is saved, where that is asked for."""
    if settings.probe is None:
        return None
    untrained = None
    if settings.probe.untrained:
        untrained = random_backbone(settings.backbone, settings.seed).to(fabric.device)
    return OnlineProbe(
        with_whole(module.answering.encode, module.answering.backbone, untrained),
        store,
        held=sides[1],
        trained=sides[0],
        spec=settings.probe,
        patch_vox=module.question.views.patch_vox,
        seed=settings.seed,
        device=fabric.device,
        batch_size=settings.trainer.batch_size,
        folder=settings.run,
        levels=_level_probe(settings, settings.probe, module.answering, store, sides, fabric),
    )


def _level_probe(
    settings: PretrainSettings,
    spec: OnlineProbeSpec,
    objective: Objective,
    store: Store,
    sides: tuple[list[SessionEntry], list[SessionEntry]],
    fabric: Fabric,
) -> LevelProbe | None:
    """What is asked of every level, on held-out people alone; their label maps are read in the words all maps share."""
    if not spec.levels:
        return None
    wanted = replace(settings.data.targets, level=None, volumes=None)
    try:
        targets = find_targets(store, wanted, {s.subject_key for s in sides[0]}, pathology=False)
    except ManifestError as error:
        say(f"levels: {error}; no Dice of regions is asked")
        targets = Targets()
    every = spec.every * spec.fewshot_every if spec.fewshot_every else None
    return LevelProbe(objective, store, sides[1], targets, fabric.device, settings.run, every)


def _schedule(
    settings: PretrainSettings, identity: dict[str, Any], fabric: Fabric
) -> tuple[LoopSpec, dict[str, Any], Finish | None]:
    """How long and at which rates, the run's identity, and of a finished copy where it comes from."""
    spec, wanted = loop_spec(settings.trainer, settings.optim), settings.finish
    if wanted.from_ is None:
        return spec, identity, None
    if spec.wsd is None:
        raise ConfigError(f"finish.from={wanted.from_}: a cosine has its own end, expected a run with optim=wsd")
    steps, shape = wanted.steps, wanted.shape
    replace(spec.wsd, decay=(0, steps), shape=shape)  # refuses values before anything is copied
    finish, identity = branch(fabric, wanted.from_, settings.run, identity, steps, shape)
    wsd = replace(spec.wsd, decay=(finish.from_step, steps), shape=shape)
    return replace(spec, max_steps=finish.from_step + steps, wsd=wsd), identity, finish


@dataclass(frozen=True)
class _BackboneFile:
    """The backbone file of a run as it stands: at its end, and under wsd beside each checkpoint."""

    module: Augmented
    store: Store
    train_set: PretrainPatches | WindowPatches
    settings: PretrainSettings
    fabric: Fabric
    finish: Finish | None
    before: LoadedBackbone | None

    def write(self, state: State) -> str:
        """Writes it. Returns a sentence about it."""
        settings, answering, path = self.settings, self.module.answering, self.settings.run / BACKBONE_FILE
        samples = state.step * settings.trainer.batch_size * self.fabric.world_size
        config: dict[str, Any] = plain(settings)
        parents: tuple[str, ...] = ()
        if self.finish is not None:
            config["finish"]["from_step"] = self.finish.from_step
            parents = (self.finish.parent,)
        if self.before is not None:
            config["before"] = so_far(self.before)
            parents = (self.before.fingerprint, *parents)
        provenance = provenance_of(config, settings.seed, self.store, state, samples, self.fabric, parents)
        write_backbone(path, answering, self.store.spec, self.train_set, settings.seed, provenance, self.before)
        branched = f" (decayed from step {self.finish.from_step} on)" if self.finish is not None else ""
        return (
            f"{path}: {state.step} steps{branched}, {samples:,} samples, {provenance.hours:.2f} h on "
            f"{provenance.device}, {100 * state.waited / max(state.seconds, 1e-9):.1f} % of it waiting for data"
        )


def write_backbone(
    path: Path,
    objective: Objective,
    preprocess: PreprocessSpec,
    train_set: PretrainPatches | WindowPatches,
    seed: int,
    provenance: Provenance,
    before: LoadedBackbone | None = None,
) -> str:
    """The backbone file of an objective, with all that is trained beside it and the people it was trained on, by hash:
    those of the file ``before``, that it went on from, as well. Returns its fingerprint."""
    earlier = None if before is None else before.subjects
    people = [session.subject_key for session in train_set.sessions]
    return save_backbone(
        path,
        objective.backbone,
        objective={"name": objective.name, "config": objective.config},
        objective_state=objective.state_for_file(),
        preprocess=preprocess,
        patch_vox=objective.views.patch_vox,
        provenance=provenance,
        decoder=objective.dense,
        heads=objective.heads,
        voxel_mm=voxels_seen(before, train_set.voxel_mm),
        subjects=SeenSubjects.of(people, seed) if earlier is None else earlier.with_more(people),
    )


def _with_targets(
    settings: PretrainSettings, store: Store, trained: list[SessionEntry]
) -> tuple[ObjectiveSettings, Targets]:
    """The objective's settings, with the sizes of the anatomical targets as the data have them, and the targets."""
    asked, people = settings.objective, {session.subject_key for session in trained}
    if isinstance(asked, DenseSplitSettings):
        return _with_regions(asked, settings.data.targets, store, people)
    if not isinstance(asked, AnatomyPathologySettings):
        return asked, Targets()
    targets = find_targets(
        store,
        settings.data.targets,
        people,
        anatomy=asked.anatomy_weight > 0,
        pathology=asked.pathology_weight > 0,
    )
    groups = _size("groups", asked.groups, len(targets.groups))
    volumes = _size("volumes", asked.volumes, len(targets.regions))
    if asked.anatomy_weight > 0 and not (groups or volumes):
        note = "no anatomical target at all: reconstruction alone trains the anatomy part (see `brainfm anatomy`)"
        targets = replace(targets, notes=(*targets.notes, note))
    return replace(asked, groups=groups, volumes=volumes), targets


def _size(key: str, asked: int | None, there: int) -> int:
    if asked not in (None, 0, there):
        raise ConfigError(f"objective.{key}={asked}: the data have {there}; expected {there}, 0 or null")
    return there if asked is None else asked


def _with_regions(
    asked: DenseSplitSettings, wanted: TargetSpec, store: Store, people: set[str]
) -> tuple[ObjectiveSettings, Targets]:
    """The same for an objective that asks for the fine classes of data/regions.py."""
    targets = find_targets(store, replace(wanted, level="regions"), people, pathology=asked.lesion_weight > 0)
    if not targets.maps:
        note = "no label map: nothing is rendered, and the terms of real scans go on alone (see `brainfm anatomy`)"
        targets = replace(targets, notes=(*targets.notes, note))
    classes = tuple(REGIONS) if targets.maps else ()
    merged = tuple(tuple(members) for members in merged_members()) if targets.maps else ()
    return replace(asked, classes=classes, merged=merged, volumes=len(targets.regions)), targets


def make_patches(
    data: PretrainData,
    seed: int,
    store: Store,
    sessions: list[SessionEntry],
    views: ViewSpec,
    targets: Targets,
    samples_a_step: int = 1,
    *,
    validation: bool = False,
) -> PretrainPatches | WindowPatches:
    """The patches of one side, as the objective wants them; ``validation``: of a stream of their own, centred on heads,
    and of windows as they are once the schedule has settled."""
    seed = seed + validation
    if not views.windows:
        share = 1.0 if validation else float(data.foreground_share)
        return PretrainPatches(store, sessions, views, seed, share, targets)
    spec = replace(data.windows, rendered=data.rendered)
    settled = spec.settle_steps if validation else 0
    return WindowPatches(store, sessions, views, seed, spec, samples_a_step, targets, from_step=settled)


def _artefacts(value: Any, views: ViewSpec) -> AugmentSpec | None:
    """``data.augment``; of windows, which are moved already, what changes intensities alone."""
    spec = augment_spec(value)
    if spec is None or not views.windows:
        return spec
    if spec.torchio:
        check_still(spec.torchio)
    return replace(spec, flip=0.0, affine=0.0, elastic=0.0)


def sides_of(store: Store, data: PretrainData) -> tuple[list[SessionEntry], list[SessionEntry]]:
    """Sessions to train on and held out, by a column of the manifest (``data.side_column``: ``train`` or ``held``)
    or by hash.

    Raises: ConfigError where the column is missing, says something else, or puts a person on both sides.
    """
    column, only = data.side_column, dict(data.only or {})
    sessions = [s for s in store.sessions if all(s.columns.get(key, "") == str(value) for key, value in only.items())]
    if not sessions:
        raise ConfigError(f"{store.path}: no session has {only} (data.only), expected some")
    if not column:
        return split_sessions(sessions, data.validation, data.split_seed)
    sides: dict[str, list[SessionEntry]] = {"train": [], "held": []}
    for session in sessions:
        word = session.columns.get(column, "")
        if word not in sides:
            raise ConfigError(
                f"{store.path}: session {'/'.join(session.key)} has {word!r} in column {column!r} (data.side_column), "
                "expected 'train' or 'held'"
            )
        sides[word].append(session)
    both = {s.subject_key for s in sides["train"]} & {s.subject_key for s in sides["held"]}
    if both:
        raise ConfigError(f"{store.path}: {min(both)} is on both sides of column {column!r}, expected one side")
    return sides["train"], sides["held"]


def split_sessions(
    sessions: Sequence[SessionEntry], held_fraction: float, seed: int
) -> tuple[list[SessionEntry], list[SessionEntry]]:
    """Sessions to train on and sessions held out; a subject is on one side."""
    _, held = holdout(sorted({s.subject_key for s in sessions}), held_fraction, seed)
    away = set(held)
    return [s for s in sessions if s.subject_key not in away], [s for s in sessions if s.subject_key in away]


class _Validation:
    """The objective's terms on fixed samples of held-out subjects, and pictures of the first batch."""

    def __init__(
        self,
        fabric: Fabric,
        module: Augmented,
        store: Store,
        held: list[SessionEntry],
        trained: list[SessionEntry],
        targets: Targets,
        settings: PretrainSettings,
    ) -> None:
        self.fabric, self.module, self.objective, self.folder = fabric, module, module.answering, settings.run
        self.batches = settings.data.validation_batches if any(s.scans for s in held) else 0
        # With nobody held out the pictures still show something: subjects that were trained on.
        shown = held if self.batches else trained
        self.loader = make_loader(
            make_patches(settings.data, settings.seed, store, shown, self.objective.views, targets, validation=True),
            StepSampler(0, max(1, self.batches), settings.trainer.batch_size),
            workers=0,
        )

    @torch.no_grad()
    def __call__(self, state: State) -> dict[str, float]:
        sums: dict[str, float] = {}
        for number, batch in enumerate(self.loader):
            batch = self.module.shown(batch.to(self.fabric.device))
            with self.fabric.autocast():
                if self.batches:
                    terms = self.objective(batch, 1.0)
                    for name, value in {"total": terms.total, **terms.parts}.items():
                        sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / self.batches
                if number == 0 and self.fabric.is_global_zero:
                    pictures: dict[str, Tensor] = self.objective.pictures(batch)
                    save_pictures(self.folder / "pictures", state.step, pictures)
        return sums


def pretrain_identity(settings: PretrainSettings, store: Store, before: LoadedBackbone | None = None) -> dict[str, Any]:
    """`identity_of`; where no step depends on how many follow, the number of steps is no part of it, and of the file
    that it goes on from only what is in it."""
    identity = identity_of(settings, store)
    if before is not None:
        identity["backbone_from"] = before.fingerprint
    if isinstance(settings.optim, WsdSettings) and settings.optim.schedule == "wsd":
        del identity["trainer"]["max_steps"]
    return identity
