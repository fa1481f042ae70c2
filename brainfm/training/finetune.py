"""Fine-tuning: labelled cases and a backbone in; a bundle, honest scores against baselines, and their reasons out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save

from brainfm.data.augment import augment_spec
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import collate
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.files import write_table, write_whole
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.lengths import restore_lengths
from brainfm.nets.recompute import set_checkpointing
from brainfm.nets.transfer import transfer
from brainfm.progress import say
from brainfm.settings import plain
from brainfm.study import decoder_trial, results, transferred
from brainfm.study.splits import SplitSpec, split_cases, with_shots
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.registry import kind_of
from brainfm.tasks.study import Place, Row, Split, Study
from brainfm.tasks.task import Task
from brainfm.training.adapt import adapted_optimizer, learning_parts
from brainfm.training.loop import CHECKPOINT, LoopSpec, Run, State, train
from brainfm.training.memory import MemoryPlan, plan, settle
from brainfm.training.processes import make_fabric
from brainfm.training.run import identity_of, loop_spec, optim_values, provenance_of
from brainfm.training.settings import AdaptSpec, FinetuneSettings
from brainfm.training.speed import settled
from brainfm.training.supervised import Supervised

MEMBER = "member.safetensors"
SHIPPED = "shipped.safetensors"  # where the bundle gets other weights than those that were trained
START = "start.json"  # the score before the first step, where a checkpoint is chosen
IDENTITY = "identity.json"  # of a fold in which nothing is trained
HELD = "held.json"
_MOST_SAID = 20  # sessions that are left out, one by one
_MOST_VOXELS = {"cpu": 64**3, "cuda": 128**3}  # of a patch that is chosen; a CPU's time is the limit there


class _Interrupted(Exception):
    """A fold was broken off and saved; the text says where."""


@dataclass(frozen=True)
class _Tuning:
    """All that the folds of a run share."""

    settings: FinetuneSettings
    store: Store
    run: Path
    fabric: Fabric
    study: Study
    backbone: Backbone
    pretrained: LoadedBackbone | None
    plan: MemoryPlan
    adapt: AdaptSpec

    @property
    def parents(self) -> tuple[str, ...]:
        """Fingerprints of the weights that training begins with."""
        return () if self.pretrained is None else (self.pretrained.fingerprint,)

    @property
    def chief(self) -> bool:
        return bool(self.fabric.is_global_zero)

    @property
    def seed(self) -> int:
        return self.settings.seed

    def place(self) -> Place:
        return Place(self.fabric.device, torch.bfloat16 if self.plan.precision == "bf16-mixed" else None)


def finetune(settings: FinetuneSettings) -> Path | None:
    """Runs or resumes a fine-tuning.

    Leaves in ``run``: a folder per fold, ``cases.csv`` and ``scores.json`` (each case answered by the fold that did not
    train on it), ``results.json`` (all that a report needs) and ``bundle/`` with one member a fold of the first repeat.
    With ``protocol=fewshot`` it leaves ``shots/`` and ``learning_curve.csv`` besides.

    Returns:
        The bundle's folder, or None where the run was interrupted.

    Raises:
        BrainfmError: whatever the user can mend, in one sentence.
    """
    tuning, splits = _begin(settings)
    try:
        if settings.protocol == "fewshot":
            return _few_shot(tuning, splits)
        rows, states = _cross_validate(tuning, splits, tuning.run, tuning.backbone, tuning.adapt)
        return _conclude(tuning, splits, rows, states, None)
    except _Interrupted as interruption:
        if tuning.chief:
            say(f"stopped in {interruption} and saved; the same command goes on")
        return None


def answered(settings: FinetuneSettings, choose: Callable[[Study], Split]) -> list[Row] | None:
    """Runs or resumes one training on the cases that ``choose`` names, as a fold of a fine-tuning is trained.

    Leaves the fold's folder in ``run``.

    Returns:
        The answers to its held cases, as `Study.conclude` gives them; None where it was interrupted and has saved.

    Raises:
        BrainfmError: whatever the user can mend, in one sentence.
    """
    tuning, (split,) = _begin(settings, lambda study: [choose(study)])
    try:
        return _fold(tuning, split, tuning.run / split.name, tuning.backbone, tuning.adapt)[1]
    except _Interrupted as interruption:
        if tuning.chief:
            say(f"stopped in {tuning.run.name}/{interruption} and saved; the same command goes on")
        return None


def _begin(
    settings: FinetuneSettings, choose: Callable[[Study], list[Split]] | None = None
) -> tuple[_Tuning, list[Split]]:
    """Everything that can be refused is refused here, before any step. ``choose``: the splits, where they are not those
    of a cross-validation."""
    store, run = Store.open(settings.store), settings.run
    settings = replace(settings, trainer=settled(settings.trainer))
    if not settings.adapt.pretrained and settings.backbone_from != "none":  # the file's network without what it learned
        network = dict(load_backbone(settings.backbone_from).backbone.config)
        settings = replace(settings, backbone=network, backbone_from="none")
    study = kind_of(settings.task.kind).study(store, settings.task, mirror=settings.mirror, clean=settings.clean)
    adapt = _settled_adapt(settings, study)
    backbone, pretrained = _backbone(settings, store, adapt)
    counted = f"; {study.counted}" if study.counted else ""
    say(f"{len(study.cases)} sessions with {study.spec.target}, {len(study.left_out)} left out; "
        f"contrasts {', '.join(study.spec.contrasts)}{counted}")  # fmt: skip
    for sentence in study.left_out[:_MOST_SAID]:
        say(f"left out: {sentence}")
    if len(study.left_out) > _MOST_SAID:
        say(f"left out: {len(study.left_out) - _MOST_SAID} more; results.json will name them all")
    for sentence in study.notes:
        say(sentence)
    splits = _splits(settings, study) if choose is None else choose(study)
    fabric = make_fabric(settings.trainer)
    patch = study.patch(backbone, _MOST_VOXELS[fabric.device.type])
    backbone.check_patch(patch)
    planned = _planned(settings, study, backbone, patch, fabric)
    study.settle(planned.patch_vox)
    if pretrained is not None:
        seen = transferred.tested(pretrained, splits)
        for note in (*transferred.notes(pretrained, store, study.spec), *([str(seen)] if seen is not None else [])):
            say(f"note: {note}")
    run.mkdir(parents=True, exist_ok=True)  # what is refused leaves none
    return _Tuning(settings, store, run, fabric, study, backbone, pretrained, planned, adapt), splits


def _splits(settings: FinetuneSettings, study: Study) -> list[Split]:
    """Those of the cross-validation. Raises: ConfigError where there are too few people."""
    seed = settings.seed
    spec = SplitSpec(
        folds=settings.folds, repeats=settings.repeats, inner=settings.inner, sites_apart=settings.sites_apart,
        seed=seed,
    )  # fmt: skip
    strata = study.strata()
    splits = split_cases(study.cases, spec, strata, _sites(study, settings))
    if settings.protocol == "cv":
        splits = [study.arranged(split, seed, strata) for split in splits]
    if settings.protocol == "fewshot":  # too many shots are refused now, not after the first hour
        for shots in _shots(settings):
            for split in splits if shots is not None else []:
                with_shots(split, shots, seed, strata)  # type: ignore[arg-type]
    return splits


def _settled_adapt(settings: FinetuneSettings, study: Study) -> AdaptSpec:
    """As it applies to this start and study. Raises: ConfigError where a decoder is asked for that cannot be."""
    adapt, kind = settings.adapt, study.spec.kind
    if adapt.decoder is True and not study.takes_decoder:
        raise ConfigError(f"adapt.decoder=true: a {kind} answers without a decoder; expected auto or false")
    if settings.backbone_from != "none":
        return adapt if study.takes_decoder else replace(adapt, decoder=False)
    if adapt.decoder is True:
        raise ConfigError("adapt.decoder=true: backbone_from=none brings no decoder; expected a backbone file with one")
    scale = settings.scratch_lr_scale if adapt.pretrained else 1.0  # adapt=scratch brings its own
    return replace(adapt, decoder=False, layer_decay=1.0, lr_scale=adapt.lr_scale * scale)


def _backbone(settings: FinetuneSettings, store: Store, adapt: AdaptSpec) -> tuple[Backbone, LoadedBackbone | None]:
    """The encoder to start from, and the file it comes from."""
    if settings.backbone_from == "none":
        torch.manual_seed(settings.seed)
        return build_backbone(**settings.backbone), None
    loaded = load_backbone(settings.backbone_from, needs_decoder=adapt.decoder is True)
    say(f"{settings.backbone_from}: {loaded.report}")
    if loaded.preprocess != store.spec:
        say(
            f"note: the backbone was pre-trained on scans prepared as {loaded.preprocess.to_dict()}, "
            f"{store.path} was prepared as {store.spec.to_dict()}"
        )
    return loaded.backbone, loaded


def _sites(study: Study, settings: FinetuneSettings) -> dict[str, str] | None:
    """Subject key -> site; None where the manifest has no such column or one site only."""
    column = settings.site
    found = {c.session.subject_key: c.session.columns.get(column, "") for c in study.cases} if column else {}
    if len(set(found.values())) < 2:
        if settings.sites_apart:
            raise ConfigError(f"sites_apart=true: expected a manifest column {column!r} with two values or more")
        return None
    return found


def _shots(settings: FinetuneSettings) -> list[int | None]:
    """``task.shots``; None stands for all."""
    return [None if value == "all" else value for value in settings.task.shots]


def _planned(
    settings: FinetuneSettings,
    study: Study,
    backbone: Backbone,
    patch: tuple[int, int, int],
    fabric: Fabric,
) -> MemoryPlan:
    """The plan of this run, made once and kept in plan.json: resumed, it has the same whatever memory is free."""
    trainer, views = settings.trainer, study.views
    asked: dict[str, Any] = {
        "backbone": backbone.config, "kind": study.spec.kind, "contrasts": len(study.spec.contrasts),
        "classes": max(1, study.spec.classes), "patch_vox": list(patch), "batch_size": trainer.batch_size,
        "views": views, "trainer": {k: getattr(trainer, k) for k in ("accelerator", "precision", "memory_gb")},
    }  # fmt: skip
    file = settings.run / "plan.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    if there.get("asked") == asked:
        made = MemoryPlan.from_dict(there["plan"])
    else:
        made = plan(
            backbone,
            study.spec.kind,
            contrasts=asked["contrasts"],
            classes=asked["classes"],
            patch_vox=patch,
            batch_size=asked["batch_size"],
            trainer=trainer,
            views=views,
        )
        if fabric.device.type == "cuda":
            stride = backbone.strides[-1]
            made = settle(lambda tried: dry_step(settings, study, backbone, fabric, tried), made, stride)
        if fabric.is_global_zero:
            for note in made.notes:
                say(f"memory: {note}")
            write_whole(file, (json.dumps({"asked": asked, "plan": made.to_dict()}, indent=1) + "\n").encode())
    return MemoryPlan.from_dict(fabric.broadcast(made.to_dict()))  # each process finds another amount of memory free


def dry_step(settings: FinetuneSettings, study: Study, backbone: Backbone, fabric: Fabric, tried: MemoryPlan) -> None:
    """One training step of a plan on the device, on the first samples there are; leaves nothing behind.

    Raises:
        torch.OutOfMemoryError: where there is no room for it.
    """
    asked = study.spec
    try:
        study.settle(tried.patch_vox)
        patches = study.patches(study.cases, 0, settings.data)
        batch = collate([patches[i] for i in range(tried.micro_batch)]).to(fabric.device)
        task = study.task(build_backbone(**backbone.config), study.cases).to(fabric.device)
        set_checkpointing(task, tried.checkpointing)
        values = optim_values(settings.optim)
        # a decoder of the file costs no more memory than a fresh one (nets/decoders.chained)
        optimizer = adapted_optimizer(task, replace(settings.adapt, decoder=False), max_steps=10, **values)
        half = tried.precision == "bf16-mixed"
        with torch.autocast(fabric.device.type, dtype=torch.bfloat16, enabled=half):
            total = task.loss(task(batch.image, batch.present), batch).total
        total.backward()
        optimizer.step()
    finally:
        study.spec = asked


# ---- training --------------------------------------------------------------------------------------------------------


def _cross_validate(
    tuning: _Tuning, splits: Sequence[Split], folder: Path, backbone: Backbone | None, adapt: AdaptSpec
) -> tuple[list[Row], list[State]]:
    """Trains every split and answers its held-out cases. ``backbone`` None is the same network from fresh weights."""
    rows: list[Row] = []
    states: list[State] = []
    for number, split in enumerate(splits):
        if tuning.chief:
            kept = f", {len(split.inner)} to choose the checkpoint on" if split.inner else ""
            say(f"{folder.name}: training {number + 1} of {len(splits)}: {len(split.trained)} cases to train on{kept}, "
                f"{len(split.held)} held out")  # fmt: skip
        state, found = _fold(tuning, split, folder / split.name, backbone, adapt)
        rows += found
        states.append(state)
    return rows, states


def _fresh(
    tuning: _Tuning, split: Split, backbone: Backbone | None, begun: bool = False, decoder: bool = False
) -> Task:
    """A task whose encoder starts from the backbone, with ``decoder`` its decoder from the file as well, and whose head
    starts at random, the same for every resume; with ``begun`` its weights will come from a checkpoint, and nothing is
    spent on a good start."""
    torch.manual_seed(tuning.seed * 1000 + 100 * split.repeat + split.fold)
    encoder = build_backbone(**tuning.backbone.config)
    if backbone is not None and tuning.settings.backbone_from != "none":
        transfer(encoder, backbone.state_dict(), origin=tuning.settings.backbone_from)
    # a segmenter begins with the file's decoder where it takes it; an answer for a whole head reads its features
    taken = decoder or (backbone is not None and not tuning.study.takes_decoder)
    task = swap_in(tuning.study.task(encoder, split.trained, tuning.pretrained if taken else None))
    if tuning.pretrained is not None and backbone is not None and tuning.adapt.restore_lengths and not begun:
        for part in learning_parts(task, tuning.adapt, decoder):
            restore_lengths(part)
    if not begun:
        tuning.study.start(task, split.trained, tuning.fabric.device)
    set_checkpointing(task, tuning.plan.checkpointing)
    return task


def _fold(
    tuning: _Tuning, split: Split, folder: Path, backbone: Backbone | None, adapt: AdaptSpec
) -> tuple[State, list[Row]]:
    if not tuning.study.trains(split):
        return _untrained(tuning, split, folder, backbone)
    adapt = replace(adapt, decoder=backbone is not None and _takes_decoder(tuning, split, folder, backbone, adapt))
    max_steps = tuning.settings.trainer.max_steps
    run, module = _prepared(tuning, split, folder, backbone, adapt, max_steps)
    _score_start(tuning, module, split, folder)
    run = replace(run, evaluate=_watch(tuning, module, split, folder, run.spec))
    state = train(run)
    if state.step < max_steps:
        raise _Interrupted(f"{folder.parent.name}/{folder.name} after step {state.step}")
    return state, _held(tuning, module, split, folder, backbone)


def _prepared(
    tuning: _Tuning, split: Split, folder: Path, backbone: Backbone | None, adapt: AdaptSpec, max_steps: int
) -> tuple[Run, Supervised]:
    """A training of so many steps on ``split.trained``, ready to start or to go on."""
    fabric, study = tuning.fabric, tuning.study
    trainer = replace(tuning.settings.trainer, max_steps=max_steps)
    settings = replace(tuning.settings, trainer=trainer)
    begun = (folder / CHECKPOINT).exists()
    task = _fresh(tuning, split, backbone, begun, decoder=adapt.decoder is True)
    seed = _seed(tuning, split)
    if backbone is not None and tuning.pretrained is not None and tuning.chief and not begun:
        report = transferred.report_of(task, tuning.pretrained, adapt.decoder is True)
        transferred.write(folder, report, getattr(task, "began", ""))
    patches = study.patches(split.trained, seed, settings.data)
    loop = replace(loop_spec(trainer, settings.optim), accumulate=tuning.plan.accumulate)
    augment = augment_spec(settings.data.augment)
    module = Supervised(task, augment, tuning.seed, settings.average, loop.max_steps)
    optimizer = adapted_optimizer(task, adapt, max_steps=loop.max_steps, **optim_values(settings.optim))

    def loader_from(step: int) -> Any:
        steps = StepSampler(step, loop.max_steps, trainer.batch_size, fabric.global_rank, fabric.world_size)
        return make_loader(patches, steps, trainer.workers, pin_memory=fabric.device.type == "cuda")

    identity = _identity(replace(tuning, settings=settings), split, backbone)
    run = Run(
        fabric=fabric,
        folder=folder,
        identity=identity | ({"decoder": True} if adapt.decoder is True else {}),
        module=module,
        optimizer=optimizer,
        loader_from=loader_from,
        spec=loop,
        after_step=_after_step(module, optimizer, fabric),
        title=folder.name,
    )
    return run, module


def _identity(tuning: _Tuning, split: Split, backbone: Backbone | None) -> dict[str, Any]:
    """What must be equal for a fold to go on."""
    identity = identity_of(tuning.settings, tuning.store)
    identity |= {"parents": list(tuning.parents) if backbone is not None else [], "plan": tuning.plan.to_dict()}
    return identity | {"fold": split.name, "trained": ["/".join(case.session.key) for case in split.trained]}


def _takes_decoder(tuning: _Tuning, split: Split, folder: Path, backbone: Backbone, adapt: AdaptSpec) -> bool:
    """Whether this fold begins with the decoder of the file: as it was asked for, or as a trial says."""
    if adapt.decoder != "auto" or tuning.pretrained is None or tuning.pretrained.decoder is None:
        return adapt.decoder is True
    place = tuning.place()

    def trained(inner: Split, decoder: bool, own: Path, steps: int) -> tuple[list[float], State]:
        run, module = _prepared(tuning, inner, own, backbone, replace(adapt, decoder=decoder), steps)
        state = train(run)
        if state.step < steps:
            raise _Interrupted(f"the trial of {folder.parent.name}/{folder.name} after step {state.step}")
        with torch.no_grad():
            return tuning.study.each(module.answering.eval(), inner.held, place), state

    mark = hashlib.sha256(json.dumps(_identity(tuning, split, backbone), sort_keys=True).encode()).hexdigest()[:16]
    spec = decoder_trial.TrialSpec(
        max_steps=tuning.settings.trainer.max_steps,
        share=adapt.trial_share,
        least=adapt.trial_steps,
        larger_is_better=tuning.study.larger_is_better,
        seed=tuning.seed,
        mark=mark,
    )
    if tuning.chief and decoder_trial.read(folder, mark) is None:
        say(f"{folder.name}: {spec}")
    found = decoder_trial.tried(split, folder, spec, tuning.study.strata(), trained, tuning.chief)
    found = tuning.fabric.broadcast(found)  # last digits may differ between processes, the decision must not
    say(f"{folder.name}: {decoder_trial.words(found)}")
    return bool(found["taken"])


def _seed(tuning: _Tuning, split: Split) -> int:
    return tuning.seed * 1000 + 100 * split.repeat + split.fold


def _untrained(tuning: _Tuning, split: Split, folder: Path, backbone: Backbone | None) -> tuple[State, list[Row]]:
    """A fold whose answers are closed forms.

    Raises: ConfigError where the folder holds a fold of another configuration.
    """
    began = time.perf_counter()
    mine, file = _identity(tuning, split, backbone), folder / IDENTITY
    there = json.loads(file.read_text()) if file.exists() else None
    if there is None and tuning.chief:
        write_whole(file, (json.dumps(mine, indent=1) + "\n").encode())
    elif there is not None and there != json.loads(json.dumps(mine)):
        key = next(k for k in sorted(set(there) | set(mine)) if there.get(k) != json.loads(json.dumps(mine)).get(k))
        raise ConfigError(f"{folder} holds a run with another {key}: use another run= folder, or the same values")
    if backbone is not None and tuning.pretrained is not None and tuning.chief:
        task = _fresh(tuning, split, backbone, begun=True)
        transferred.write(folder, transferred.report_of(task, tuning.pretrained, False), "fresh")
    rows = _held(tuning, None, split, folder, backbone)
    return State(seconds=time.perf_counter() - began), rows


def _after_step(module: Supervised, optimizer: torch.optim.Optimizer, fabric: Fabric) -> Callable[[int, float], None]:
    def total(counts: torch.Tensor) -> torch.Tensor:
        return fabric.all_reduce(counts, reduce_op="sum") if fabric.world_size > 1 else counts  # type: ignore[return-value]

    def after(step: int, progress: float) -> None:
        if module.average is not None:
            module.average.update(step)
        if module.foreground is not None:
            said = module.foreground.look(module.task, optimizer, total, step)
            if said is not None:
                say(f"note: {said}")

    return after


def _watch(
    tuning: _Tuning, module: Supervised, split: Split, folder: Path, loop: LoopSpec
) -> Callable[[State], dict[str, float]] | None:
    """Scores for the curves; of the inner cases, where there are any, the best step's weights are kept as well."""
    if not split.inner and not 0 < loop.evaluate_every < loop.max_steps:
        return None
    cases, word = (split.inner, "inner") if split.inner else (split.held, "held")
    study = tuning.study

    started = json.loads((folder / START).read_text()) if (folder / START).exists() else {}

    def evaluate(state: State) -> dict[str, float]:
        score, member = _scored(tuning, module, split, cases)
        if split.inner:
            sign = 1 if study.larger_is_better else -1
            best = state.extra.get("best", started.get("best"))
            # A score that is undefined (of one class among the inner cases) chooses nothing: the last weights stay.
            if best is None or math.isnan(best) or sign * score > sign * best:
                state.extra |= {"best": score, "best_step": state.step}
                if tuning.chief:
                    write_whole(folder / MEMBER, member)
        return {f"{word}_{study.primary}": score}

    return evaluate


def _scored(tuning: _Tuning, module: Supervised, split: Split, cases: Sequence[Any]) -> tuple[float, bytes]:
    """The primary score of some cases as the task stands, and the weights that it is the score of."""
    network, study = module.answering.eval(), tuning.study
    with torch.no_grad(), study.refitted(network, split.trained, tuning.place()):
        return study.watch(network, cases, tuning.place()), module.member()


def _score_start(tuning: _Tuning, module: Supervised, split: Split, folder: Path) -> None:
    """The task as it is before its first step is the first checkpoint that may be chosen."""
    if not (split.inner and tuning.study.starts_well) or (folder / CHECKPOINT).exists():
        return
    if tuning.chief:
        module.answering.to(tuning.fabric.device)
        score, member = _scored(tuning, module, split, split.inner)
        write_whole(folder / MEMBER, member)
        text = json.dumps({"best": score if math.isfinite(score) else None}) + "\n"
        write_whole(folder / START, text.encode())
    tuning.fabric.barrier()


def _held(
    tuning: _Tuning, module: Supervised | None, split: Split, folder: Path, backbone: Backbone | None
) -> list[Row]:
    """The answers to the held-out cases, made once, by the weights that go into the bundle."""
    if module is not None and not split.inner and tuning.chief and not (folder / MEMBER).exists():
        with torch.no_grad(), tuning.study.refitted(module.answering, split.trained, tuning.place()):
            write_whole(folder / MEMBER, module.member())
    tuning.fabric.barrier()
    if not (folder / HELD).exists() and tuning.chief:
        network = None
        if module is not None:
            network = module.answering
            network.load_state_dict(network.state_dict() | load_file(folder / MEMBER))
            network.eval()
        with torch.no_grad():
            rows, shipped = tuning.study.conclude(
                network, lambda: _fresh(tuning, split, backbone, begun=True), split, tuning.place(), folder,
                _seed(tuning, split),
            )  # fmt: skip
        if shipped is not None:
            tensors = {name: value.detach().cpu().clone().contiguous() for name, value in shipped.items()}
            write_whole(folder / SHIPPED, save(tensors))
        write_whole(folder / HELD, (json.dumps(rows) + "\n").encode())
    tuning.fabric.barrier()
    return json.loads((folder / HELD).read_text())


def _member(folder: Path) -> dict[str, torch.Tensor]:
    """What a fold gives to the bundle."""
    return load_file(folder / (SHIPPED if (folder / SHIPPED).exists() else MEMBER))


# ---- what came of it -------------------------------------------------------------------------------------------------


def _baseline_rows(tuning: _Tuning, splits: Sequence[Split], folder: Path) -> dict[str, list[Row]]:
    """Decided rows of each baseline that was asked for; made once and kept."""
    found: dict[str, list[Row]] = {}
    for name in tuning.settings.baselines:
        if name == "volumes" and not tuning.study.has_volumes:
            continue
        if name == "scratch":
            if tuning.settings.backbone_from == "none":
                continue  # the model itself is that
            adapt = AdaptSpec("scratch", lr_scale=tuning.settings.scratch_lr_scale, decoder=False)
            rows, _ = _cross_validate(tuning, splits, folder / "scratch", None, adapt)
            found[name] = tuning.study.decide(rows).rows
            continue
        file = folder / f"{name}.json"
        if not file.exists() and tuning.chief:
            say(f"baseline {name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(tuning.seed)
            fresh = swap_in(build_backbone(**tuning.backbone.config)).eval()
            made = tuning.study.baseline(name, fresh, splits, tuning.seed)
            write_whole(file, (json.dumps(made) + "\n").encode())
        tuning.fabric.barrier()
        found[name] = json.loads(file.read_text())
    return found


def _conclude(
    tuning: _Tuning,
    splits: Sequence[Split],
    rows: list[Row],
    states: Sequence[State],
    curve: dict[str, Any] | None,
) -> Path:
    """Baselines, decisions, scores, audit and the bundle."""
    others = _baseline_rows(tuning, splits, tuning.run / "baselines")
    if not tuning.chief:
        return tuning.run / "bundle"
    decided = tuning.study.decide(rows)
    tried = results.candidates(tuning.study, tuning.run, splits, rows, tuning.seed)
    came = transferred.of_run(tuning.run, splits, tuning.pretrained, tuning.adapt.decoder)
    document = came | results.collect(
        tuning.study, tuning.settings, splits, decided, others, tuning.plan.to_dict(), tuning.seed, curve,
        results.training_curves(tuning.run, splits), tried,
    )  # fmt: skip
    scores = results.headline(document)
    _write_cases(tuning.run / "cases.csv", decided.rows)
    _write_json(tuning.run / "scores.json", scores)
    trials = transferred.trials(tuning.run, splits)
    total = State(
        step=sum(s.step for s in states),
        seconds=sum(s.seconds for s in states) + sum(trial["seconds"] for trial in trials),
        receipt=_summed([*(s.receipt for s in states), *(r for trial in trials for r in trial["receipts"])]),
    )
    samples = total.step * tuning.settings.trainer.batch_size * tuning.fabric.world_size
    config = plain(tuning.settings) | ({"command": tuning.settings.command} if tuning.settings.command else {})
    provenance = provenance_of(config, tuning.seed, tuning.store, total, samples, tuning.fabric, tuning.parents)
    first = [tuning.run / split.name for split in splits if split.repeat == 0]
    began = tuning.study.takes_decoder  # else a decoder of the file is read, and no part of a member's start
    channels = [transferred.dense_channels(folder, tuning.pretrained) if began else 0 for folder in first]
    write_bundle(
        tuning.run / "bundle",
        task=tuning.study.spec,
        backbone_config=tuning.backbone.config,
        members=[_member(folder) for folder in first],
        settings=[{"dense_channels": e} if e else {} for e in channels],
        reads=tuning.study.bundle_reads(tuning.pretrained),
        preprocess=tuning.store.spec,
        provenance=provenance,
        decisions=decided.decisions,
        scores=scores,
        seen=tuning.pretrained.subjects if tuning.pretrained is not None else None,
    )
    _write_json(tuning.run / results.FILE, document | {"provenance": provenance.to_dict()})
    for line in results.describe(document):
        say(line)
    return tuning.run / "bundle"


def _few_shot(tuning: _Tuning, splits: list[Split]) -> Path | None:
    """A learning curve: the same folds and schedule with ever more training subjects, with and without pre-training."""
    points: list[dict[str, Any]] = []
    strata, last = tuning.study.strata(), None
    for shots in _shots(tuning.settings):
        name = "all" if shots is None else str(shots)
        drawn = splits if shots is None else [with_shots(s, shots, tuning.seed, strata) for s in splits]
        drawn = [tuning.study.arranged(split, tuning.seed, strata) for split in drawn]
        folder = tuning.run if shots is None else tuning.run / "shots" / name
        rows, states = _cross_validate(tuning, drawn, folder, tuning.backbone, tuning.adapt)
        others = _baseline_rows(tuning, drawn, folder / "baselines")
        if tuning.chief:
            tried = results.candidates(tuning.study, folder, drawn, rows, tuning.seed)
            came = transferred.of_run(folder, drawn, tuning.pretrained, tuning.adapt.decoder)
            point = results.point(tuning.study, shots, drawn, rows, others, tuning.seed, tried)
            points.append(point | results.finite(came))
            results.write_curve(tuning.run / "learning_curve.csv", points)
        last = (drawn, rows, states, folder) if shots is None else last
    curve = {"points": points, "primary": tuning.study.primary}
    if last is None:
        if tuning.chief:
            document = results.collect_curve(tuning.study, tuning.settings, splits, tuning.plan.to_dict(), curve)
            _write_json(tuning.run / results.FILE, document)
            for line in results.describe(document):
                say(line)
        return tuning.run
    return _conclude(tuning, last[0], last[1], last[2], curve)


def _summed(receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost of all folds: numbers added up, peaks the highest, words as they are."""
    total: dict[str, Any] = {}
    for receipt in receipts:
        for name, value in receipt.items():
            known = total.get(name)
            if known is None or value is None or isinstance(value, str):
                total[name] = value if known is None else known
            else:
                total[name] = max(known, value) if name.startswith("peak_") else known + value
    return total


def _write_cases(file: Path, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("file", "decisions", "candidates")))
    write_table(file, names, [[_cell(row.get(name)) for name in names] for row in rows])


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join("" if v is None else f"{v:.6g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    write_whole(file, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
