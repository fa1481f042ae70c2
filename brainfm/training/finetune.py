"""Fine-tuning: labelled cases and a backbone in; a bundle, honest scores against baselines, and their reasons out."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import time
from collections import Counter
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
from brainfm.files import write_whole
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.recompute import set_checkpointing
from brainfm.nets.transfer import transfer
from brainfm.progress import say
from brainfm.settings import plain
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.settings import SegmentationSettings, WholeHeadSettings
from brainfm.tasks.task import Task
from brainfm.training import decoder_trial, results, transferred
from brainfm.training.adapt import adapted_optimizer
from brainfm.training.crossval import Split, SplitSpec, split_cases, with_shots
from brainfm.training.loop import CHECKPOINT, LoopSpec, Run, State, train
from brainfm.training.memory import MemoryPlan, plan, settle
from brainfm.training.processes import make_fabric
from brainfm.training.questions import Engine, Question, Row
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
class _Study:
    """All that the folds of a run share."""

    settings: FinetuneSettings
    store: Store
    run: Path
    fabric: Fabric
    question: Question
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

    def engine(self) -> Engine:
        return Engine(self.fabric.device, torch.bfloat16 if self.plan.precision == "bf16-mixed" else None)


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
    study, splits = _begin(settings)
    try:
        if settings.protocol == "fewshot":
            return _few_shot(study, splits)
        rows, states = _cross_validate(study, splits, study.run, study.backbone, study.adapt)
        return _conclude(study, splits, rows, states, None)
    except _Interrupted as interruption:
        if study.chief:
            say(f"stopped in {interruption} and saved; the same command goes on")
        return None


def _begin(settings: FinetuneSettings) -> tuple[_Study, list[Split]]:
    """Everything that can be refused is refused here, before any step."""
    store, run, seed = Store.open(settings.store), settings.run, settings.seed
    settings = replace(settings, trainer=settled(settings.trainer))
    if not settings.adapt.pretrained and settings.backbone_from != "none":  # the file's network without what it learned
        network = dict(load_backbone(settings.backbone_from).backbone.config)
        settings = replace(settings, backbone=network, backbone_from="none")
    question = build_question(settings, store)
    adapt = _settled_adapt(settings, question)
    backbone, pretrained = _backbone(settings, store, adapt)
    say(f"{len(question.cases)} sessions with {question.spec.target}, {len(question.left_out)} left out; "
        f"contrasts {', '.join(question.spec.contrasts)}{_classes_said(question)}")  # fmt: skip
    for sentence in question.left_out[:_MOST_SAID]:
        say(f"left out: {sentence}")
    if len(question.left_out) > _MOST_SAID:
        say(f"left out: {len(question.left_out) - _MOST_SAID} more; results.json will name them all")
    for sentence in question.notes:
        say(sentence)
    spec = SplitSpec(
        folds=settings.folds, repeats=settings.repeats, inner=settings.inner, sites_apart=settings.sites_apart,
        seed=seed,
    )  # fmt: skip
    strata = question.strata()
    splits = split_cases(question.cases, spec, strata, _sites(question, settings))
    if settings.protocol == "cv":
        splits = [question.arranged(split, seed, strata) for split in splits]
    if settings.protocol == "fewshot":  # too many shots are refused now, not after the first hour
        for shots in _shots(settings):
            for split in splits if shots is not None else []:
                with_shots(split, shots, seed, strata)  # type: ignore[arg-type]
    run.mkdir(parents=True, exist_ok=True)
    fabric = make_fabric(settings.trainer)
    patch = question.patch(backbone, _MOST_VOXELS[fabric.device.type])
    backbone.check_patch(patch)
    planned = _planned(settings, question, backbone, patch, fabric)
    question.settle(planned.patch_vox)
    if pretrained is not None:
        seen = transferred.tested(pretrained, splits)
        for note in (*transferred.notes(pretrained, store, question.spec), *([str(seen)] if seen is not None else [])):
            say(f"note: {note}")
    return _Study(settings, store, run, fabric, question, backbone, pretrained, planned, adapt), splits


def _settled_adapt(settings: FinetuneSettings, question: Question) -> AdaptSpec:
    """As it applies to this start and question. Raises: ConfigError where a decoder is asked for that cannot be."""
    adapt, kind = settings.adapt, question.spec.kind
    if adapt.decoder is True and not question.takes_decoder:
        raise ConfigError(f"adapt.decoder=true: a {kind} answers without a decoder; expected auto or false")
    if settings.backbone_from != "none":
        return adapt if question.takes_decoder else replace(adapt, decoder=False)
    if adapt.decoder is True:
        raise ConfigError("adapt.decoder=true: backbone_from=none brings no decoder; expected a backbone file with one")
    scale = settings.scratch_lr_scale if adapt.pretrained else 1.0  # adapt=scratch brings its own
    return replace(adapt, decoder=False, layer_decay=1.0, lr_scale=adapt.lr_scale * scale)


def _classes_said(question: Question) -> str:
    """The classes of a question whose answer is one of them, with their sessions: a stray spelling is seen here."""
    if question.spec.kind != "classification" or question.spec.mode == "multilabel":
        return ""
    counts = Counter(question.spec.values[int(case.answer[0])] for case in question.cases)
    return f"; classes {', '.join(f'{name} ({counts[name]})' for name in question.spec.values)}"


def build_question(settings: FinetuneSettings, store: Store) -> Question:
    """The question that the task is, with the cases that can answer it."""
    task = settings.task
    if isinstance(task, SegmentationSettings):
        from brainfm.training.segmenting import Segmenting

        return Segmenting(store, task, settings.mirror, settings.clean)
    if isinstance(task, WholeHeadSettings):
        from brainfm.training.scanning import Scanning

        return Scanning(store, task)
    raise ConfigError(f"task.kind={task.kind}: expected segmentation, classification or regression")


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


def _sites(question: Question, settings: FinetuneSettings) -> dict[str, str] | None:
    """Subject key -> site; None where the manifest has no such column or one site only."""
    column = settings.site
    found = {c.session.subject_key: c.session.columns.get(column, "") for c in question.cases} if column else {}
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
    question: Question,
    backbone: Backbone,
    patch: tuple[int, int, int],
    fabric: Fabric,
) -> MemoryPlan:
    """The plan of this run, made once and kept in plan.json: resumed, it has the same whatever memory is free."""
    trainer, views = settings.trainer, question.views
    asked: dict[str, Any] = {
        "backbone": backbone.config, "kind": question.spec.kind, "contrasts": len(question.spec.contrasts),
        "classes": max(1, question.spec.classes), "patch_vox": list(patch), "batch_size": trainer.batch_size,
        "views": views, "trainer": {k: getattr(trainer, k) for k in ("accelerator", "precision", "memory_gb")},
    }  # fmt: skip
    file = settings.run / "plan.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    if there.get("asked") == asked:
        made = MemoryPlan.from_dict(there["plan"])
    else:
        made = plan(
            backbone,
            question.spec.kind,
            contrasts=asked["contrasts"],
            classes=asked["classes"],
            patch_vox=patch,
            batch_size=asked["batch_size"],
            trainer=trainer,
            views=views,
        )
        if fabric.device.type == "cuda":
            stride = backbone.strides[-1]
            made = settle(lambda tried: dry_step(settings, question, backbone, fabric, tried), made, stride)
        if fabric.is_global_zero:
            for note in made.notes:
                say(f"memory: {note}")
            write_whole(file, (json.dumps({"asked": asked, "plan": made.to_dict()}, indent=1) + "\n").encode())
    return MemoryPlan.from_dict(fabric.broadcast(made.to_dict()))  # each process finds another amount of memory free


def dry_step(
    settings: FinetuneSettings, question: Question, backbone: Backbone, fabric: Fabric, tried: MemoryPlan
) -> None:
    """One training step of a plan on the device, on the first samples there are; leaves nothing behind.

    Raises:
        torch.OutOfMemoryError: where there is no room for it.
    """
    asked = question.spec
    try:
        question.settle(tried.patch_vox)
        patches = question.patches(question.cases, 0, settings.data)
        batch = collate([patches[i] for i in range(tried.micro_batch)]).to(fabric.device)
        task = question.task(build_backbone(**backbone.config), question.cases).to(fabric.device)
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
        question.spec = asked


# ---- training --------------------------------------------------------------------------------------------------------


def _cross_validate(
    study: _Study, splits: Sequence[Split], folder: Path, backbone: Backbone | None, adapt: AdaptSpec
) -> tuple[list[Row], list[State]]:
    """Trains every split and answers its held-out cases. ``backbone`` None is the same network from fresh weights."""
    rows: list[Row] = []
    states: list[State] = []
    for number, split in enumerate(splits):
        if study.chief:
            kept = f", {len(split.inner)} to choose the checkpoint on" if split.inner else ""
            say(f"{folder.name}: training {number + 1} of {len(splits)}: {len(split.trained)} cases to train on{kept}, "
                f"{len(split.held)} held out")  # fmt: skip
        state, found = _fold(study, split, folder / split.name, backbone, adapt)
        rows += found
        states.append(state)
    return rows, states


def _fresh(study: _Study, split: Split, backbone: Backbone | None, begun: bool = False, decoder: bool = False) -> Task:
    """A task whose encoder starts from the backbone, with ``decoder`` its decoder from the file as well, and whose head
    starts at random, the same for every resume; with ``begun`` its weights will come from a checkpoint, and nothing is
    spent on a good start."""
    torch.manual_seed(study.seed * 1000 + 100 * split.repeat + split.fold)
    encoder = build_backbone(**study.backbone.config)
    if backbone is not None and study.settings.backbone_from != "none":
        transfer(encoder, backbone.state_dict(), origin=study.settings.backbone_from)
    # a segmenter begins with the file's decoder where it takes it; an answer for a whole head reads its features
    taken = decoder or (backbone is not None and not study.question.takes_decoder)
    task = swap_in(study.question.task(encoder, split.trained, study.pretrained if taken else None))
    if not begun:
        study.question.start(task, split.trained, study.fabric.device)
    set_checkpointing(task, study.plan.checkpointing)
    return task


def _fold(
    study: _Study, split: Split, folder: Path, backbone: Backbone | None, adapt: AdaptSpec
) -> tuple[State, list[Row]]:
    if not study.question.trains(split):
        return _untrained(study, split, folder, backbone)
    adapt = replace(adapt, decoder=backbone is not None and _takes_decoder(study, split, folder, backbone, adapt))
    max_steps = study.settings.trainer.max_steps
    run, module = _prepared(study, split, folder, backbone, adapt, max_steps)
    _score_start(study, module, split, folder)
    run = replace(run, evaluate=_watch(study, module, split, folder, run.spec))
    state = train(run)
    if state.step < max_steps:
        raise _Interrupted(f"{folder.parent.name}/{folder.name} after step {state.step}")
    return state, _held(study, module, split, folder, backbone)


def _prepared(
    study: _Study, split: Split, folder: Path, backbone: Backbone | None, adapt: AdaptSpec, max_steps: int
) -> tuple[Run, Supervised]:
    """A training of so many steps on ``split.trained``, ready to start or to go on."""
    fabric, question = study.fabric, study.question
    trainer = replace(study.settings.trainer, max_steps=max_steps)
    settings = replace(study.settings, trainer=trainer)
    begun = (folder / CHECKPOINT).exists()
    task = _fresh(study, split, backbone, begun, decoder=adapt.decoder is True)
    seed = _seed(study, split)
    if backbone is not None and study.pretrained is not None and study.chief and not begun:
        report = transferred.report_of(task, study.pretrained, adapt.decoder is True)
        transferred.write(folder, report, getattr(task, "began", ""))
    patches = question.patches(split.trained, seed, settings.data)
    loop = replace(loop_spec(trainer, settings.optim), accumulate=study.plan.accumulate)
    augment = augment_spec(settings.data.augment)
    module = Supervised(task, augment, study.seed, settings.average, loop.max_steps)
    optimizer = adapted_optimizer(task, adapt, max_steps=loop.max_steps, **optim_values(settings.optim))

    def loader_from(step: int) -> Any:
        steps = StepSampler(step, loop.max_steps, trainer.batch_size, fabric.global_rank, fabric.world_size)
        return make_loader(patches, steps, trainer.workers, pin_memory=fabric.device.type == "cuda")

    identity = _identity(replace(study, settings=settings), split, backbone)
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


def _identity(study: _Study, split: Split, backbone: Backbone | None) -> dict[str, Any]:
    """What must be equal for a fold to go on."""
    identity = identity_of(study.settings, study.store)
    identity |= {"parents": list(study.parents) if backbone is not None else [], "plan": study.plan.to_dict()}
    return identity | {"fold": split.name, "trained": ["/".join(case.session.key) for case in split.trained]}


def _takes_decoder(study: _Study, split: Split, folder: Path, backbone: Backbone, adapt: AdaptSpec) -> bool:
    """Whether this fold begins with the decoder of the file: as it was asked for, or as a trial says."""
    if adapt.decoder != "auto" or study.pretrained is None or study.pretrained.decoder is None:
        return adapt.decoder is True
    engine = study.engine()

    def trained(inner: Split, decoder: bool, place: Path, steps: int) -> tuple[list[float], State]:
        run, module = _prepared(study, inner, place, backbone, replace(adapt, decoder=decoder), steps)
        state = train(run)
        if state.step < steps:
            raise _Interrupted(f"the trial of {folder.parent.name}/{folder.name} after step {state.step}")
        with torch.no_grad():
            return study.question.each(module.answering.eval(), inner.held, engine), state

    mark = hashlib.sha256(json.dumps(_identity(study, split, backbone), sort_keys=True).encode()).hexdigest()[:16]
    spec = decoder_trial.TrialSpec(
        max_steps=study.settings.trainer.max_steps,
        share=adapt.trial_share,
        least=adapt.trial_steps,
        larger_is_better=study.question.larger_is_better,
        seed=study.seed,
        mark=mark,
    )
    if study.chief and decoder_trial.read(folder, mark) is None:
        say(f"{folder.name}: {spec}")
    found = decoder_trial.tried(split, folder, spec, study.question.strata(), trained, study.chief)
    found = study.fabric.broadcast(found)  # last digits may differ between processes, the decision must not
    say(f"{folder.name}: {decoder_trial.words(found)}")
    return bool(found["taken"])


def _seed(study: _Study, split: Split) -> int:
    return study.seed * 1000 + 100 * split.repeat + split.fold


def _untrained(study: _Study, split: Split, folder: Path, backbone: Backbone | None) -> tuple[State, list[Row]]:
    """A fold whose answers are closed forms.

    Raises: ConfigError where the folder holds a fold of another configuration.
    """
    began = time.perf_counter()
    mine, file = _identity(study, split, backbone), folder / IDENTITY
    there = json.loads(file.read_text()) if file.exists() else None
    if there is None and study.chief:
        write_whole(file, (json.dumps(mine, indent=1) + "\n").encode())
    elif there is not None and there != json.loads(json.dumps(mine)):
        key = next(k for k in sorted(set(there) | set(mine)) if there.get(k) != json.loads(json.dumps(mine)).get(k))
        raise ConfigError(f"{folder} holds a run with another {key}: use another run= folder, or the same values")
    if backbone is not None and study.pretrained is not None and study.chief:
        task = _fresh(study, split, backbone, begun=True)
        transferred.write(folder, transferred.report_of(task, study.pretrained, False), "fresh")
    rows = _held(study, None, split, folder, backbone)
    return State(seconds=time.perf_counter() - began), rows


def _after_step(module: Supervised, optimizer: torch.optim.Optimizer, fabric: Fabric) -> Callable[[int, float], None]:
    def after(step: int, progress: float) -> None:
        if module.average is not None:
            module.average.update(step)
        if module.foreground is not None:
            said = module.foreground.look(module.task, optimizer, fabric, step)  # type: ignore[arg-type]
            if said is not None:
                say(f"note: {said}")

    return after


def _watch(
    study: _Study, module: Supervised, split: Split, folder: Path, loop: LoopSpec
) -> Callable[[State], dict[str, float]] | None:
    """Scores for the curves; of the inner cases, where there are any, the best step's weights are kept as well."""
    if not split.inner and not 0 < loop.evaluate_every < loop.max_steps:
        return None
    cases, word = (split.inner, "inner") if split.inner else (split.held, "held")
    question = study.question

    started = json.loads((folder / START).read_text()) if (folder / START).exists() else {}

    def evaluate(state: State) -> dict[str, float]:
        score, member = _scored(study, module, split, cases)
        if split.inner:
            sign = 1 if question.larger_is_better else -1
            best = state.extra.get("best", started.get("best"))
            # A score that is undefined (of one class among the inner cases) chooses nothing: the last weights stay.
            if best is None or math.isnan(best) or sign * score > sign * best:
                state.extra |= {"best": score, "best_step": state.step}
                if study.chief:
                    write_whole(folder / MEMBER, member)
        return {f"{word}_{question.primary}": score}

    return evaluate


def _scored(study: _Study, module: Supervised, split: Split, cases: Sequence[Any]) -> tuple[float, bytes]:
    """The primary score of some cases as the task stands, and the weights that it is the score of."""
    network, question = module.answering.eval(), study.question
    with torch.no_grad(), question.refitted(network, split.trained, study.engine()):
        return question.watch(network, cases, study.engine()), module.member()


def _score_start(study: _Study, module: Supervised, split: Split, folder: Path) -> None:
    """The task as it is before its first step is the first checkpoint that may be chosen."""
    if not (split.inner and study.question.starts_well) or (folder / CHECKPOINT).exists():
        return
    if study.chief:
        module.answering.to(study.fabric.device)
        score, member = _scored(study, module, split, split.inner)
        write_whole(folder / MEMBER, member)
        text = json.dumps({"best": score if math.isfinite(score) else None}) + "\n"
        write_whole(folder / START, text.encode())
    study.fabric.barrier()


def _held(study: _Study, module: Supervised | None, split: Split, folder: Path, backbone: Backbone | None) -> list[Row]:
    """The answers to the held-out cases, made once, by the weights that go into the bundle."""
    if module is not None and not split.inner and study.chief and not (folder / MEMBER).exists():
        with torch.no_grad(), study.question.refitted(module.answering, split.trained, study.engine()):
            write_whole(folder / MEMBER, module.member())
    study.fabric.barrier()
    if not (folder / HELD).exists() and study.chief:
        network = None
        if module is not None:
            network = module.answering
            network.load_state_dict(network.state_dict() | load_file(folder / MEMBER))
            network.eval()
        with torch.no_grad():
            rows, shipped = study.question.conclude(
                network, lambda: _fresh(study, split, backbone, begun=True), split, study.engine(), folder,
                _seed(study, split),
            )  # fmt: skip
        if shipped is not None:
            tensors = {name: value.detach().cpu().clone().contiguous() for name, value in shipped.items()}
            write_whole(folder / SHIPPED, save(tensors))
        write_whole(folder / HELD, (json.dumps(rows) + "\n").encode())
    study.fabric.barrier()
    return json.loads((folder / HELD).read_text())


def _member(folder: Path) -> dict[str, torch.Tensor]:
    """What a fold gives to the bundle."""
    return load_file(folder / (SHIPPED if (folder / SHIPPED).exists() else MEMBER))


# ---- what came of it -------------------------------------------------------------------------------------------------


def _baseline_rows(study: _Study, splits: Sequence[Split], folder: Path) -> dict[str, list[Row]]:
    """Decided rows of each baseline that was asked for; made once and kept."""
    found: dict[str, list[Row]] = {}
    for name in study.settings.baselines:
        if name == "volumes" and not study.question.has_volumes:
            continue
        if name == "scratch":
            if study.settings.backbone_from == "none":
                continue  # the model itself is that
            adapt = AdaptSpec("scratch", lr_scale=study.settings.scratch_lr_scale, decoder=False)
            rows, _ = _cross_validate(study, splits, folder / "scratch", None, adapt)
            found[name] = study.question.decide(rows).rows
            continue
        file = folder / f"{name}.json"
        if not file.exists() and study.chief:
            say(f"baseline {name}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(study.seed)
            fresh = swap_in(build_backbone(**study.backbone.config)).eval()
            made = study.question.baseline(name, fresh, splits, study.seed)
            write_whole(file, (json.dumps(made) + "\n").encode())
        study.fabric.barrier()
        found[name] = json.loads(file.read_text())
    return found


def _conclude(
    study: _Study,
    splits: Sequence[Split],
    rows: list[Row],
    states: Sequence[State],
    curve: dict[str, Any] | None,
) -> Path:
    """Baselines, decisions, scores, audit and the bundle."""
    others = _baseline_rows(study, splits, study.run / "baselines")
    if not study.chief:
        return study.run / "bundle"
    decided = study.question.decide(rows)
    tried = results.candidates(study.question, study.run, splits, rows, study.seed)
    came = transferred.of_run(study.run, splits, study.pretrained, study.adapt.decoder)
    document = came | results.collect(
        study.question, study.settings, splits, decided, others, study.plan.to_dict(), study.seed, curve,
        results.training_curves(study.run, splits), tried,
    )  # fmt: skip
    scores = results.headline(document)
    _write_cases(study.run / "cases.csv", decided.rows)
    _write_json(study.run / "scores.json", scores)
    trials = transferred.trials(study.run, splits)
    total = State(
        step=sum(s.step for s in states),
        seconds=sum(s.seconds for s in states) + sum(trial["seconds"] for trial in trials),
        receipt=_summed([*(s.receipt for s in states), *(r for trial in trials for r in trial["receipts"])]),
    )
    samples = total.step * study.settings.trainer.batch_size * study.fabric.world_size
    config = plain(study.settings) | ({"command": study.settings.command} if study.settings.command else {})
    provenance = provenance_of(config, study.seed, study.store, total, samples, study.fabric, study.parents)
    first = [study.run / split.name for split in splits if split.repeat == 0]
    began = study.question.takes_decoder  # else a decoder of the file is read, and no part of a member's start
    channels = [transferred.dense_channels(folder, study.pretrained) if began else 0 for folder in first]
    write_bundle(
        study.run / "bundle",
        task=study.question.spec,
        backbone_config=study.backbone.config,
        members=[_member(folder) for folder in first],
        settings=[{"dense_channels": e} if e else {} for e in channels],
        reads=study.question.bundle_reads(study.pretrained),
        preprocess=study.store.spec,
        provenance=provenance,
        decisions=decided.decisions,
        scores=scores,
        seen=study.pretrained.subjects if study.pretrained is not None else None,
    )
    _write_json(study.run / results.FILE, document | {"provenance": provenance.to_dict()})
    for line in results.describe(document):
        say(line)
    return study.run / "bundle"


def _few_shot(study: _Study, splits: list[Split]) -> Path | None:
    """A learning curve: the same folds and schedule with ever more training subjects, with and without pre-training."""
    points: list[dict[str, Any]] = []
    strata, last = study.question.strata(), None
    for shots in _shots(study.settings):
        name = "all" if shots is None else str(shots)
        drawn = splits if shots is None else [with_shots(s, shots, study.seed, strata) for s in splits]
        drawn = [study.question.arranged(split, study.seed, strata) for split in drawn]
        folder = study.run if shots is None else study.run / "shots" / name
        rows, states = _cross_validate(study, drawn, folder, study.backbone, study.adapt)
        others = _baseline_rows(study, drawn, folder / "baselines")
        if study.chief:
            tried = results.candidates(study.question, folder, drawn, rows, study.seed)
            came = transferred.of_run(folder, drawn, study.pretrained, study.adapt.decoder)
            point = results.point(study.question, shots, drawn, rows, others, study.seed, tried)
            points.append(point | results.finite(came))
            results.write_curve(study.run / "learning_curve.csv", points)
        last = (drawn, rows, states, folder) if shots is None else last
    curve = {"points": points, "primary": study.question.primary}
    if last is None:
        if study.chief:
            document = results.collect_curve(study.question, study.settings, splits, study.plan.to_dict(), curve)
            _write_json(study.run / results.FILE, document)
            for line in results.describe(document):
                say(line)
        return study.run
    return _conclude(study, last[0], last[1], last[2], curve)


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
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("file", "decisions", "candidates")))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[_cell(row.get(name)) for name in names] for row in rows])
    write_whole(file, text.getvalue().encode())


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return " ".join("" if v is None else f"{v:.6g}" for v in value)
    return f"{value:.6g}" if isinstance(value, float) else value


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    write_whole(file, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())
