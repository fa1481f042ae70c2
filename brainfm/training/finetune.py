"""Fine-tuning: labelled cases and a backbone in, cross-validated scores and a bundle out."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save

from brainfm.batch import Batch, Terms
from brainfm.data.augment import AugmentSpec, apply, augment_spec, draw
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import Case, TaskPatches, find_cases, whole_case
from brainfm.data.splits import folds
from brainfm.data.store import Store
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.weights import load_backbone, write_atomically
from brainfm.specs import ConfigError, TaskSpec
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.metrics import bootstrap_interval, dice, volume_ml
from brainfm.tasks.segmentation import SegmentationTask
from brainfm.tasks.windows import predict_windows
from brainfm.training.loop import Run, State, train
from brainfm.training.optim import build_optimizer
from brainfm.training.pretrain import identity_of, loop_spec, make_fabric, optim_values, provenance_of, say
from brainfm.training.speed import settled

BEST = "best.safetensors"


class _Supervised(torch.nn.Module):
    """(Batch, progress) -> Terms, augmented on the device in training mode."""

    def __init__(self, task: SegmentationTask, augment: AugmentSpec | None, seed: int) -> None:
        super().__init__()
        self.task, self.augment, self.seed = task, augment, seed

    def forward(self, batch: Batch, progress: float) -> Terms:
        if self.training and self.augment is not None:
            batch = apply(batch, draw(batch, self.augment, self.seed))
        return self.task.loss(self.task(batch.image, batch.present), batch)


def finetune(config: dict[str, Any]) -> Path | None:
    """Runs or resumes the fine-tuning that the resolved configuration describes (configs/finetune.yaml).

    Leaves in ``run``: a folder per fold, ``cases.csv`` and ``scores.json`` (each case scored by the fold that did not
    train on it), and ``bundle/`` with one member a fold.

    Returns:
        The bundle's folder, or None where the run was interrupted.

    Raises:
        BrainfmError: whatever the user can mend, in one sentence.
    """
    store, run = Store.open(Path(config["store"])), Path(config["run"])
    config = config | {"trainer": settled(config["trainer"])}
    backbone, parents = _backbone(config, store)
    task_spec, cases = _task(config["task"], store)
    backbone.check_patch(task_spec.patch_vox)
    run.mkdir(parents=True, exist_ok=True)
    fabric = make_fabric(config["trainer"])
    splits = split_cases(cases, int(config["folds"]), int(config["seed"]))
    identity = identity_of(config, store) | {"parents": list(parents)}
    rows: list[dict[str, Any]] = []
    states: list[State] = []
    for fold, (trained, held) in enumerate(splits):
        folder = run / f"fold{fold}"
        if fabric.is_global_zero:
            say(f"fold {fold + 1} of {len(splits)}: {len(trained)} cases to train on, {len(held)} held out")
        state, scores = _fold(
            fabric,
            config,
            identity | {"fold": fold},
            folder,
            store,
            _fresh(config, backbone, task_spec, fold),
            trained,
            held,
            fold,
        )
        if scores is None:
            if fabric.is_global_zero:
                say(f"stopped in fold {fold + 1} after step {state.step} and saved; the same command goes on")
            return None
        rows += scores
        states.append(state)
    if not fabric.is_global_zero:
        return run / "bundle"
    return _conclude(run, rows, states, config, store, backbone, task_spec, fabric, parents)


def _backbone(config: dict[str, Any], store: Store) -> tuple[Backbone, tuple[str, ...]]:
    """The encoder to start from and the fingerprints of its file."""
    if config["backbone_from"] == "none":
        torch.manual_seed(int(config["seed"]))
        return build_backbone(**config["backbone"]), ()
    loaded = load_backbone(config["backbone_from"])
    say(f"{config['backbone_from']}: {loaded.report}")
    if loaded.preprocess != store.spec:
        say(
            f"note: the backbone was pre-trained on scans prepared as {loaded.preprocess.to_dict()}, "
            f"{store.path} was prepared as {store.spec.to_dict()}"
        )
    return loaded.backbone, (loaded.fingerprint,)


def _task(values: dict[str, Any], store: Store) -> tuple[TaskSpec, list[Case]]:
    """The question with what was left to the data filled in, and the cases that can answer it."""
    if values["kind"] != "segmentation":
        raise ConfigError(f"task.kind={values['kind']}: expected segmentation")
    contrasts = values["contrasts"]
    if contrasts is None:
        names = {f"{values['target']}_mask", f"{values['target']}_labels"}
        labelled = [s for s in store.sessions if any(entry.name in names for entry in s.labels)]
        contrasts = sorted({scan.contrast for session in labelled for scan in session.scans})
    cases, left_out = find_cases(store, contrasts, values["target"])
    say(f"{len(cases)} sessions with {values['target']} labels, {len(left_out)} without; {', '.join(contrasts)}")
    label_values = values["values"] or _values_of(store, cases)
    patch_x, patch_y, patch_z = (int(p) for p in values["patch_vox"])
    spec = TaskSpec(
        kind="segmentation",
        target=values["target"],
        contrasts=tuple(contrasts),
        values=tuple(label_values),
        patch_vox=(patch_x, patch_y, patch_z),
        fusion=values["fusion"],
    )
    return spec, cases


def _values_of(store: Store, cases: Sequence[Case]) -> list[int]:
    if all(case.label.endswith("_mask") for case in cases):
        return [0, 1]
    found: set[int] = {0}
    for case in cases:
        found.update(np.unique(store.volume(case.session, case.label)).tolist())
    return sorted(found)


def split_cases(cases: Sequence[Case], k: int, seed: int) -> list[tuple[list[Case], list[Case]]]:
    """(train, held out) for each fold, by subject.

    Raises:
        ConfigError: where there are fewer subjects than folds.
    """
    subjects = sorted({case.session.subject_key for case in cases})
    if len(subjects) < max(2, k) or k < 1:
        raise ConfigError(f"folds={k}: expected at least one and at most the {len(subjects)} labelled subjects")
    if k > 1:
        held_sets = [set(fold) for fold in folds(subjects, k, seed)]
    else:
        held_sets = [set(folds(subjects, min(5, len(subjects)), seed)[0])]
    return [
        ([c for c in cases if c.session.subject_key not in held], [c for c in cases if c.session.subject_key in held])
        for held in held_sets
    ]


def _fresh(config: dict[str, Any], backbone: Backbone, spec: TaskSpec, fold: int) -> SegmentationTask:
    """A task whose encoder starts from the backbone and whose decoder starts at random, the same for every resume."""
    torch.manual_seed(int(config["seed"]) * 1000 + fold)
    encoder = build_backbone(**backbone.config)
    if config["backbone_from"] != "none":
        encoder.load_state_dict(backbone.state_dict())
    return SegmentationTask(spec, encoder)


def _fold(
    fabric: Fabric,
    config: dict[str, Any],
    identity: dict[str, Any],
    folder: Path,
    store: Store,
    task: SegmentationTask,
    trained: Sequence[Case],
    held: Sequence[Case],
    fold: int,
) -> tuple[State, list[dict[str, Any]] | None]:
    """Trains one fold to its end. Returns its state and the rows of its held-out cases; None if interrupted."""
    data, trainer, spec = config["data"], config["trainer"], task.spec
    patches = TaskPatches(
        store,
        trained,
        spec.values,
        spec.patch_vox,
        int(config["seed"]) * 1000 + fold,
        float(data["foreground_share"]),
        float(data["contrast_dropout"]),
    )
    augment = augment_spec(data["augment"])
    loop = loop_spec(trainer, config["optim"])

    def loader_from(step: int) -> Any:
        steps = StepSampler(step, loop.max_steps, int(trainer["batch_size"]), fabric.global_rank, fabric.world_size)
        return make_loader(patches, steps, int(trainer["workers"]), pin_memory=fabric.device.type == "cuda")

    validate = _Validation(fabric, task, store, held, folder, fold, str(trainer["precision"]))
    state = train(
        Run(
            fabric=fabric,
            folder=folder,
            identity=identity,
            module=_Supervised(task, augment, int(config["seed"])),
            optimizer=build_optimizer(task, **optim_values(config["optim"])),
            loader_from=loader_from,
            spec=loop,
            evaluate=validate,
            title=f"fold {fold}",
        )
    )
    return state, state.extra["cases"] if state.step == loop.max_steps else None


class _Validation:
    """Dice of the held-out cases over their whole volumes; keeps the weights of the best mean."""

    def __init__(
        self,
        fabric: Fabric,
        task: SegmentationTask,
        store: Store,
        held: Sequence[Case],
        folder: Path,
        fold: int,
        precision: str,
    ) -> None:
        self.autocast = torch.bfloat16 if precision == "bf16-mixed" else None
        self.fabric, self.task, self.store, self.held, self.folder, self.fold = fabric, task, store, held, folder, fold

    @torch.no_grad()
    def __call__(self, state: State) -> dict[str, float]:
        rows = [self._score(case) for case in self.held]
        mean = float(np.mean([row["dice"] for row in rows]))
        if mean > state.extra.get("best_dice", -1.0):
            state.extra |= {"best_dice": mean, "best_step": state.step, "cases": rows}
            if self.fabric.is_global_zero:
                weights = {k: v.detach().cpu().contiguous() for k, v in self.task.state_dict().items()}
                write_atomically(self.folder / BEST, save(weights))
        return {"val_dice": mean, "best_dice": state.extra["best_dice"]}

    def _score(self, case: Case) -> dict[str, Any]:
        spec = self.task.spec
        image, present, label = whole_case(self.store, case, spec.values)
        probabilities = predict_windows(
            self.task,
            torch.from_numpy(image),
            torch.from_numpy(present),
            spec.patch_vox,
            device=self.fabric.device,
            autocast=self.autocast,
        )
        predicted = probabilities.argmax(dim=0).numpy()
        scores = {spec.values[k]: dice(predicted == k, label == k) for k in range(1, spec.classes)}
        spacing = self.store.spec.spacing_mm
        dataset, subject, session = case.session.key
        return {
            "dataset": dataset,
            "subject": subject,
            "session": session,
            "fold": self.fold,
            "dice": float(np.mean(list(scores.values()))),
            **({f"dice_{value}": score for value, score in scores.items()} if len(scores) > 1 else {}),
            "true_ml": volume_ml(label > 0, spacing),
            "predicted_ml": volume_ml(predicted > 0, spacing),
        }


def _conclude(
    run: Path,
    rows: list[dict[str, Any]],
    states: list[State],
    config: dict[str, Any],
    store: Store,
    backbone: Backbone,
    spec: TaskSpec,
    fabric: Fabric,
    parents: tuple[str, ...],
) -> Path:
    """Scores of all folds and the bundle of their best members."""
    with (run / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    interval = bootstrap_interval([row["dice"] for row in rows], seed=int(config["seed"]))
    scores = {
        "dice": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "n_cases": len(rows),
        "n_subjects": len({(row["dataset"], row["subject"]) for row in rows}),
        "folds": len(states),
        "best_steps": [state.extra["best_step"] for state in states],
        "note": "each case is scored by the fold that did not train on it, but its checkpoint is chosen on the same "
        "cases: expect less on new ones",
    }
    (run / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    total = State(step=sum(s.step for s in states), seconds=sum(s.seconds for s in states))
    samples = total.step * int(config["trainer"]["batch_size"]) * fabric.world_size
    members = [load_file(run / f"fold{fold}" / BEST) for fold in range(len(states))]
    write_bundle(
        run / "bundle",
        task=spec,
        backbone_config=backbone.config,
        members=members,
        preprocess=store.spec,
        provenance=provenance_of(config, store, total, samples, fabric, parents),
        scores=scores,
    )
    say(
        f"{run / 'bundle'}: cross-validated Dice {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}], "
        f"{len(rows)} cases, {len(states)} folds"
    )
    return run / "bundle"
