"""Pre-training: a store and an objective in, a backbone file out."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from brainfm import __version__
from brainfm.batch import Batch, Terms
from brainfm.data.augment import AugmentSpec, apply, augment_spec, draw
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import PretrainPatches
from brainfm.data.splits import holdout
from brainfm.data.store import SessionEntry, Store
from brainfm.data.targets import Targets, TargetSpec, find_targets
from brainfm.nets.backbone import build_backbone
from brainfm.nets.weights import save_backbone, write_atomically
from brainfm.objectives.objective import Objective, build_objective
from brainfm.seen import SeenSubjects
from brainfm.specs import ConfigError, PreprocessSpec, Provenance
from brainfm.training import receipt
from brainfm.training.guards import GuardSpec
from brainfm.training.launch import make_fabric
from brainfm.training.loop import LoopSpec, Run, State, train
from brainfm.training.monitor import save_pictures
from brainfm.training.optim import build_optimizer
from brainfm.training.probes import OnlineProbe, ProbeSpec, describe, with_whole
from brainfm.training.speed import quicken, settled

BACKBONE_FILE = "backbone.safetensors"
# Of the configuration: what moves no weight. A run may go on with other guards, or be asked more or less.
_NOT_IDENTITY = ("run", "store", "debug", "experiment", "launch", "probe", "guard")


class Augmented(torch.nn.Module):
    """Augments a batch on the device, then asks; outside training mode it only asks."""

    def __init__(self, question: Objective, spec: AugmentSpec | None, seed: int) -> None:
        super().__init__()
        self.question, self.spec, self.seed = question, spec, seed

    def forward(self, batch: Batch, progress: float) -> Terms:
        if self.training and self.spec is not None:
            batch = apply(batch, draw(batch, self.spec, self.seed))
        return self.question(batch, progress)


def loop_spec(trainer: Mapping[str, Any], optim: Mapping[str, Any]) -> LoopSpec:
    max_steps = int(trainer["max_steps"])
    return LoopSpec(
        max_steps=max_steps,
        warmup_steps=round(float(optim["warmup_fraction"]) * max_steps),
        clip_norm=float(trainer["clip_norm"]),
        log_every=int(trainer["log_every"]),
        checkpoint_every=int(trainer["checkpoint_every"]),
        evaluate_every=int(trainer["evaluate_every"]),
    )


def pretrain(config: dict[str, Any]) -> State:
    """Runs or resumes the pre-training that the resolved configuration describes (configs/pretrain.yaml).

    Leaves ``backbone.safetensors``, ``last.ckpt``, ``curves.csv``, ``tensorboard/``, ``pictures/``, ``probes.json`` and
    ``receipt.json`` in ``run``.

    Raises:
        BrainfmError: whatever the user can mend, in one sentence.
    """
    store, folder, seed = Store.open(Path(config["store"])), Path(config["run"]), int(config["seed"])
    config = config | {"trainer": settled(config["trainer"])}
    trainer, data = config["trainer"], config["data"]
    folder.mkdir(parents=True, exist_ok=True)
    fabric = make_fabric(trainer)
    torch.manual_seed(seed)  # the initial weights; nothing later draws from the ambient stream
    backbone = build_backbone(**config["backbone"])
    sides = split_sessions(store, float(data["validation"]), int(data["split_seed"]))
    question, targets = _with_targets(config, store, sides[0])
    objective = build_objective(**question, backbone=backbone, patch_vox=tuple(data["patch_vox"]), seed=seed)
    quicken(objective, trainer)
    train_set = PretrainPatches(store, sides[0], objective.views, seed, float(data["foreground_share"]), targets)
    if fabric.is_global_zero:
        say(
            f"{sum(p.numel() for p in objective.parameters()):,} parameters in pre-training "
            f"({sum(p.numel() for p in backbone.parameters()):,} in the encoder); "
            f"{len(train_set)} subjects to train on, {len({s.subject_key for s in sides[1]})} held out"
        )
        for note in targets.notes:
            say(note)
    augment = augment_spec(data["augment"])
    batch_size, workers = int(trainer["batch_size"]), int(trainer["workers"])
    spec = loop_spec(trainer, config["optim"])
    probe = None
    if config["probe"] is not None:
        probe = OnlineProbe(
            with_whole(objective.encode, backbone),
            store,
            held=sides[1],
            trained=sides[0],
            spec=ProbeSpec(**config["probe"]),
            patch_vox=objective.views.patch_vox,
            seed=seed,
            device=fabric.device,
            batch_size=batch_size,
            folder=folder,
        )
        spec = dataclasses.replace(spec, probe_every=probe.spec.every)
        if fabric.is_global_zero:
            say("\n".join(probe.plan()))

    def loader_from(step: int) -> Any:
        steps = StepSampler(step, spec.max_steps, batch_size, fabric.global_rank, fabric.world_size)
        return make_loader(train_set, steps, workers, pin_memory=fabric.device.type == "cuda")

    validate = _Validation(fabric, objective, store, sides[1], sides[0], targets, batch_size, folder, config)
    state = train(
        Run(
            fabric=fabric,
            folder=folder,
            identity=identity_of(config, store),
            module=Augmented(objective, augment, seed),
            optimizer=build_optimizer(objective, **optim_values(config["optim"])),
            loader_from=loader_from,
            spec=spec,
            evaluate=validate,
            after_step=objective.after_step,
            probe=probe,
            guard=GuardSpec(**config["guard"]) if config["guard"] is not None else None,
            title="pretrain",
        )
    )
    if fabric.is_global_zero:
        write_atomically(folder / receipt.FILE, (json.dumps(state.receipt, indent=1) + "\n").encode())
    if state.step == spec.max_steps and fabric.is_global_zero:
        samples = state.step * batch_size * fabric.world_size
        provenance = provenance_of(config, store, state, samples, fabric)
        write_backbone(folder / BACKBONE_FILE, objective, store.spec, sides[0], seed, provenance)
        say(
            f"{folder / BACKBONE_FILE}: {state.step} steps, {samples:,} samples, {provenance.hours:.2f} h on "
            f"{provenance.device}, {100 * state.waited / max(state.seconds, 1e-9):.1f} % of it waiting for data"
        )
        say(receipt.describe(state.receipt))
        if probe is not None and probe.table:
            say("\n".join(describe(probe.table)))
    elif fabric.is_global_zero:
        say(f"stopped after step {state.step} of {spec.max_steps} and saved; the same command goes on from there")
    return state


def write_backbone(
    path: Path,
    objective: Objective,
    preprocess: PreprocessSpec,
    trained: Sequence[SessionEntry],
    seed: int,
    provenance: Provenance,
) -> str:
    """The backbone file of an objective, with all that is trained beside it and the people it was trained on, by hash.
    Returns its fingerprint."""
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
        voxel_mm=getattr(objective.views, "voxel_mm", None),
        subjects=SeenSubjects.of((session.subject_key for session in trained), seed),
    )


def _with_targets(
    config: Mapping[str, Any], store: Store, trained: list[SessionEntry]
) -> tuple[dict[str, Any], Targets]:
    """The objective's settings, with the sizes of the anatomical targets as the data have them, and the targets."""
    question = dict(config["objective"])
    if not {"groups", "volumes"} <= set(question):
        return question, Targets()
    targets = find_targets(
        store,
        TargetSpec(**config["data"]["targets"]),
        {session.subject_key for session in trained},
        anatomy=float(question["anatomy_weight"]) > 0,
        pathology=float(question["pathology_weight"]) > 0,
    )
    for key, there in (("groups", len(targets.groups)), ("volumes", len(targets.regions))):
        if question[key] is None:
            question[key] = there
        elif question[key] not in (0, there):
            raise ConfigError(f"objective.{key}={question[key]}: the data have {there}; expected {there}, 0 or null")
    if float(question["anatomy_weight"]) > 0 and not (question["groups"] or question["volumes"]):
        note = "no anatomical target at all: reconstruction alone trains the anatomy part (see `brainfm anatomy`)"
        targets = dataclasses.replace(targets, notes=(*targets.notes, note))
    return question, targets


def split_sessions(store: Store, held_fraction: float, seed: int) -> tuple[list[SessionEntry], list[SessionEntry]]:
    """Sessions to train on and sessions held out; a subject is on one side."""
    _, held = holdout(sorted({s.subject_key for s in store.sessions}), held_fraction, seed)
    away = set(held)
    return (
        [s for s in store.sessions if s.subject_key not in away],
        [s for s in store.sessions if s.subject_key in away],
    )


class _Validation:
    """The objective's terms on fixed samples of held-out subjects, and pictures of the first batch."""

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        store: Store,
        held: list[SessionEntry],
        trained: list[SessionEntry],
        targets: Targets,
        batch_size: int,
        folder: Path,
        config: dict[str, Any],
    ) -> None:
        self.fabric, self.objective, self.folder = fabric, objective, folder
        self.batches = int(config["data"]["validation_batches"]) if any(s.scans for s in held) else 0
        # With nobody held out the pictures still show something: subjects that were trained on.
        shown = held if self.batches else trained
        self.loader = make_loader(
            PretrainPatches(store, shown, objective.views, int(config["seed"]) + 1, 1.0, targets),
            StepSampler(0, max(1, self.batches), batch_size),
            workers=0,
        )

    @torch.no_grad()
    def __call__(self, state: State) -> dict[str, float]:
        sums: dict[str, float] = {}
        for number, batch in enumerate(self.loader):
            batch = batch.to(self.fabric.device)
            with self.fabric.autocast():
                if self.batches:
                    terms = self.objective(batch, 1.0)
                    for name, value in {"total": terms.total, **terms.parts}.items():
                        sums[f"val_{name}"] = sums.get(f"val_{name}", 0.0) + float(value) / self.batches
                if number == 0 and self.fabric.is_global_zero:
                    pictures: dict[str, Tensor] = self.objective.pictures(batch)
                    save_pictures(self.folder / "pictures", state.step, pictures)
        return sums


def identity_of(config: Mapping[str, Any], store: Store) -> dict[str, Any]:
    """What must be equal for a run to go on: all of the configuration that can change a number, and the data."""
    kept = {k: v for k, v in config.items() if k not in _NOT_IDENTITY}
    kept["trainer"] = {
        k: v for k, v in config["trainer"].items() if k not in ("workers", "log_every", "checkpoint_every")
    }
    return kept | {"store": store.fingerprint()}


def provenance_of(
    config: dict[str, Any], store: Store, state: State, samples: int, fabric: Fabric, parents: tuple[str, ...] = ()
) -> Provenance:
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "cpu"
    return Provenance(
        version=__version__,
        commit=commit_of_code(),
        data=store.fingerprint(),
        config=config,
        seed=int(config["seed"]),
        steps=state.step,
        samples=samples,
        hours=round(state.seconds * fabric.world_size / 3600, 4),
        device=f"{fabric.world_size} x {device}",
        parents=parents,
        receipt=state.receipt,
    )


def commit_of_code() -> str:
    """The git commit of the checkout that the code runs from; empty when it was installed."""
    head = Path(__file__).resolve().parents[2] / ".git" / "HEAD"
    if not head.is_file():
        return ""
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text
    reference = head.parent / text.removeprefix("ref: ")
    return reference.read_text().strip() if reference.is_file() else ""


def optim_values(optim: Mapping[str, Any]) -> dict[str, Any]:
    return {"lr": float(optim["lr"]), "weight_decay": float(optim["weight_decay"]), "betas": tuple(optim["betas"])}


def say(text: str) -> None:
    """To the log, once however many processes the run has."""
    if getattr(rank_zero_only, "rank", 0) == 0:  # Lightning hangs it onto the function
        print(text, file=sys.stderr, flush=True)
