"""The settings of a training: of the machine and the optimiser, of what watches it, of pre-training and fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from brainfm.data.settings import Augment, TargetSpec, WindowSpec
from brainfm.errors import ConfigError
from brainfm.objectives.settings import OBJECTIVES, ObjectiveSettings, settings_class
from brainfm.probing.settings import OnlineProbeSpec
from brainfm.settings import FREE, LATER, VERBATIM, Group
from brainfm.synthesis.settings import LookSpec
from brainfm.tasks.registry import TaskOptions, task_settings_class
from brainfm.tasks.settings import FinetuneData, TaskSettings

Compile = Literal["auto", "default", "reduce-overhead", "max-autotune-no-cudagraphs"]

# ---- machine and optimiser -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainerSettings:
    """Where and how long. What is read, logged and saved beside it changes no result."""

    accelerator: Annotated[Literal["auto", "cpu", "gpu"], "auto: the GPU if there is one, else the CPU"] = "auto"
    devices: Annotated[int | Literal["auto"], "processes, one a device"] = 1
    num_nodes: Annotated[int, "machines"] = 1
    strategy: Annotated[Literal["auto", "ddp"], "of several processes"] = "auto"
    precision: Annotated[Literal["auto", "bf16-mixed", "32-true"], "auto: bf16-mixed on a GPU, 32-true on a CPU"] = (
        "auto"
    )
    compile: Annotated[Compile | None, "of pretrain; auto: default on a GPU, null elsewhere"] = "auto"
    channels_last: Annotated[bool | Literal["auto"], "memory layout of the weights, of pretrain; auto: on a GPU"] = (
        "auto"
    )
    max_steps: Annotated[int, "steps of the optimiser; of finetune: a fold"] = 10000
    batch_size: Annotated[int, "samples a step on each device; of finetune in parts where memory wants it"] = 4
    clip_norm: Annotated[float, "largest norm of the gradient; 0: no clipping"] = 1.0
    evaluate_every: Annotated[int, "steps between looks at held-out cases; 0: only at the end, of finetune none"] = 1000
    memory_gb: Annotated[
        float | None, "of the GPU, for the planner of finetune; null: what it has in all, or what is free of the RAM"
    ] = None
    threads: Annotated[int | None, "of the CPU; null: torch decides"] = None
    workers: Annotated[int, "processes that read patches ahead", FREE] = 1
    log_every: Annotated[int, "steps", FREE] = 10
    checkpoint_every: Annotated[int, "steps", FREE] = 500


TRAINERS_GONE = {f"gpu{size}": f"trainer=gpu trainer.memory_gb={size}" for size in (8, 12, 16, 24, 80)}


@dataclass(frozen=True)
class OptimSettings:
    """AdamW, linear warm-up from lr/1000, cosine per step to 0."""

    lr: Annotated[float, "peak learning rate"] = 1e-4
    weight_decay: Annotated[float, "of matrices; biases and norms are not decayed"] = 0.01
    betas: Annotated[tuple[float, float], "of the moments"] = (0.9, 0.999)
    warmup_fraction: Annotated[float, "of max_steps"] = 0.05


@dataclass(frozen=True)
class SteppedSettings(OptimSettings):
    """The same, with a warm-up of so many steps."""

    warmup_steps: Annotated[
        int | None, "of a short run a tenth, e.g. 200 of 2000; of a cosine null: warmup_fraction of max_steps"
    ] = None


@dataclass(frozen=True)
class WsdSettings(SteppedSettings):
    """AdamW, linear warm-up from lr/1000, then constant: for runs whose length is not known. trainer.max_steps is only
    how far to go for now; finish.from=RUN makes a finished copy whose rate decays to 0.

    Raises: ConfigError where the schedule lacks a number.
    """

    schedule: Annotated[Literal["cosine", "wsd"], "cosine: as optim=adamw, with warmup_steps"] = "wsd"
    warmup_steps: Annotated[
        int | None, "of a short run a tenth, e.g. 200 of 2000; of a cosine null: warmup_fraction of max_steps"
    ] = 1000
    horizon_steps: Annotated[int, "the objective's progress goes from 0 to 1 over these steps, and stays there"] = 10000

    def __post_init__(self) -> None:
        if self.schedule == "wsd" and self.warmup_steps is None:
            raise ConfigError("optim.schedule=wsd with optim.warmup_steps=null: expected a number of steps, e.g. 1000")


def optim_class(values: Mapping[str, Any]) -> type[OptimSettings]:
    """Of the schedule that ``values`` have: an experiment with optim=wsd may be tried with another optimiser."""
    if "schedule" in values:
        return WsdSettings
    return SteppedSettings if "warmup_steps" in values else OptimSettings


# ---- what watches a pre-training -------------------------------------------------------------------------------------


GUARD_MEMORY = 100  # logged losses whose median counts as usual


@dataclass(frozen=True)
class GuardSpec:
    """When a run is stopped; null switches a guard off.

    Attributes:
        min_rank: 1 is a line, and a healthy code that is mostly about the contrast can come near it.
        rank_exempt: a contrast code of two contrasts needs one direction.

    Raises: ConfigError for impossible values.
    """

    min_std: Annotated[float | None, "smallest mean deviation of a part's features over the probed scans"] = 1e-4
    min_rank: Annotated[float | None, "smallest effective rank of a part's features"] = 1.05
    rank_exempt: Annotated[tuple[str, ...], "parts that may have few directions"] = ("contrast", "pathology")
    probes: Annotated[int, "in a row below one of these"] = 3
    level_dice: Annotated[
        Literal["warn", "stop"] | None,
        "a level whose linear Dice is below fresh weights' after the warm-up; stop: after `probes` in a row",
    ] = "warn"
    min_level_rank: Annotated[float | None, "the same of a level's effective rank"] = 3
    explode: Annotated[float | None, "times the median of the last 100 logged losses is too much"] = 10
    explode_logs: Annotated[int, "logged losses in a row above"] = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_exempt", tuple(self.rank_exempt))
        for key in ("probes", "explode_logs"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guard.{key}={getattr(self, key)}: expected 1 or more")
        for key, least in (("min_std", 0.0), ("min_rank", 0.0), ("min_level_rank", 0.0), ("explode", 1.0)):
            value = getattr(self, key)
            if value is not None and value <= least:
                raise ConfigError(f"guard.{key}={value}: expected more than {least:g}, or null for no guard")
        if self.level_dice not in (None, "warn", "stop"):
            raise ConfigError(f"guard.level_dice={self.level_dice}: expected warn, stop or null")
        if self.explode_logs > GUARD_MEMORY // 2:
            raise ConfigError(f"guard.explode_logs={self.explode_logs}: expected at most {GUARD_MEMORY // 2}")


@dataclass(frozen=True)
class FinishSettings:
    """A finished copy of a run with optim=wsd: its own command, with another run= and these."""

    from_: Annotated[Path | None, "folder of the run, which is only read and may go on"] = None
    steps: Annotated[int, "over which the rate decays to 0, from the run's last checkpoint on"] = 2000
    shape: Annotated[Literal["linear", "cosine"], "of the decay"] = "linear"


# ---- pre-training ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainData:
    """Who is trained on, and what is read of them."""

    patch_vox: Annotated[tuple[int, int, int], "X, Y, Z"] = (64, 64, 64)
    foreground_share: Annotated[float, "of the patches have a voxel of the head in their middle"] = 0.9
    validation: Annotated[float, "share of the subjects held out, by hash of their key"] = 0.1
    side_column: Annotated[
        str | None, "a column of the manifest with train and held, instead of the hash", VERBATIM
    ] = None
    only: Annotated[
        Mapping[str, Any] | None, "sessions whose columns have these values, e.g. {variant: permissive}; null: all"
    ] = None
    validation_batches: Annotated[int, "of held-out patches"] = 8
    split_seed: Annotated[int, "another one holds others out; runs that differ in seed alone hold out the same"] = 0
    augment: Annotated[
        Augment,
        "null: none (published); light; full; or a mapping of AugmentSpec's keys: {preset: full, ghost: 0},"
        " torchio: transforms by name, {RandomMotion: {p: 0.1}}",
    ] = None
    rendered: Annotated[float, "of dense_split: share of the views that are rendered, of heads with a label map"] = 0.6
    windows: Annotated[WindowSpec, "of dense_split: windows of many voxel sizes, whole heads first"] = field(
        default_factory=WindowSpec
    )
    looks: Annotated[LookSpec, "of dense_split: how renderings vary"] = field(default_factory=LookSpec)
    targets: Annotated[TargetSpec, "of anatomy_pathology and dense_split"] = field(default_factory=TargetSpec)


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """Pre-train a backbone on a store without labels. Interrupted, the same command goes on."""

    store: Annotated[Path, "prepared scans", FREE]
    run: Annotated[Path, "folder of this run", FREE]
    seed: Annotated[int, "of weights, samples and masks"] = 0
    backbone_from: Annotated[
        str,
        "a backbone file, or the name of weights that ship, to go on from, with a fresh optimiser; none: fresh weights",
        LATER,
        VERBATIM,
    ] = "none"
    average: Annotated[
        float | None, "of the weights: what is probed, validated, shown and saved; null: the last weights (published)"
    ] = 0.999
    data: Annotated[PretrainData, "who is trained on, and what is read of them"] = PretrainData()
    probe: Annotated[
        OnlineProbeSpec | None, "what the frozen features know: curves probe_*, RUN/probes.json; null: never", FREE
    ] = field(default_factory=OnlineProbeSpec)
    guard: Annotated[
        GuardSpec | None, "stops a run that has gone wrong and keeps its last good state; null: off", FREE
    ] = GuardSpec()
    finish: Annotated[
        FinishSettings, "a finished copy of a run with optim=wsd: its own command, with another run=", FREE
    ] = FinishSettings()
    backbone: Annotated[Mapping[str, Any], "the network, only with backbone_from=none", Group("unet_b")]
    objective: Annotated[
        ObjectiveSettings,
        "the question",
        Group("cross_contrast", kinds=settings_class, named={name: {"name": name} for name in OBJECTIVES}),
    ]
    optim: Annotated[OptimSettings, "the optimiser", Group("adamw", kinds=optim_class)] = OptimSettings()
    trainer: Annotated[TrainerSettings, "the machine", Group("auto", gone=TRAINERS_GONE)] = TrainerSettings()
    debug: Annotated[bool, "a traceback in place of the sentence", FREE] = False


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdaptSpec:
    """How much of a pre-trained network a fine-tuning may move; the options name the usual ways, any mixture is legal.

    Attributes:
        last_blocks: frozen weights stay equal to the bit.
        layer_decay: the head has the full rate; a decoder that was taken from the file counts as one block between the
            head and the deepest one.
        head_fraction: the head is warmed up over the first half of these steps and then falls to 0, before the whole
            network warms up (the second tooth of the saw).
        warmup_fraction: null: the optimiser's own, where the head has no tooth of its own.
        trial_share: of the steps of a training that the four short trainings of a trial (study/decoder_trial.py)
            cost together.

    Raises: ConfigError for values outside their ranges.
    """

    name: Annotated[str, "for people; nothing depends on it"] = "full"
    pretrained: Annotated[bool, "false: the encoder starts fresh"] = True
    last_blocks: Annotated[int | None, "blocks that learn, from the deepest; 0: the encoder is frozen; null: all"] = (
        None
    )
    layer_decay: Annotated[float, "a block's rate is this times that of the block behind it"] = 1.0
    lr_scale: Annotated[float, "times optim.lr"] = 1.0
    head_fraction: Annotated[float, "share of the steps at the start in which the head alone learns"] = 0.0
    warmup_fraction: Annotated[
        float | None, "share of the steps in which the whole network warms up; null: optim.warmup_fraction"
    ] = None
    restore_lengths: Annotated[
        bool, "filters before a norm get the length of fresh ones: the same answers, but steps move them as much"
    ] = True
    decoder: Annotated[bool | Literal["auto"], "of the backbone file; auto: where a trial on inner folds says so"] = (
        "auto"
    )
    trial_share: Annotated[float, "of a training's steps that the four trainings of such a trial cost together"] = 0.25
    trial_steps: Annotated[int, "but never less than this each: too short a training tells nothing"] = 25

    def __post_init__(self) -> None:
        if not isinstance(self.decoder, bool) and self.decoder != "auto":
            raise ConfigError(f"adapt.decoder={self.decoder}: expected auto, true or false")
        if not 0 < self.trial_share <= 1:
            raise ConfigError(f"adapt.trial_share={self.trial_share}: expected more than 0 and at most 1")
        if self.trial_steps < 1:
            raise ConfigError(f"adapt.trial_steps={self.trial_steps}: expected 1 or more")
        if self.last_blocks is not None and (isinstance(self.last_blocks, bool) or self.last_blocks < 0):
            raise ConfigError(f"adapt.last_blocks={self.last_blocks}: expected 0 or more blocks, or null for all")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"adapt.layer_decay={self.layer_decay}: expected more than 0 and at most 1")
        if not 0 < self.lr_scale < math.inf:
            raise ConfigError(f"adapt.lr_scale={self.lr_scale}: expected more than 0")
        whole = self.warmup_fraction or 0.0
        if not 0 <= self.head_fraction < 1 or whole < 0 or self.head_fraction + whole >= 1:
            raise ConfigError(
                f"adapt.head_fraction={self.head_fraction}, adapt.warmup_fraction={self.warmup_fraction}: "
                "expected shares of the steps that leave some of them"
            )


Baseline = Literal["scratch", "random_linear", "features", "volumes"]
_OVER = {"max_steps": 2000, "batch_size": 2, "evaluate_every": 0}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Fine-tune a backbone on labelled cases, cross-validated by subject, against baselines; leaves a bundle and a
    report. Interrupted, the same command goes on.

    Attributes:
        command: what was typed, for the report; empty where Python called.
    """

    store: Annotated[Path, "prepared scans", FREE]
    run: Annotated[Path, "folder of this run", FREE]
    backbone_from: Annotated[
        str, "a backbone file, the name of weights that ship, or none: the same schedule from scratch", VERBATIM
    ]
    seed: Annotated[int, "of weights, folds and samples"] = 0
    protocol: Annotated[
        Literal["cv", "fewshot"], "fewshot: a learning curve over task.shots training subjects", FREE
    ] = "cv"
    folds: Annotated[int, "by subject, balanced in the answer; 1: one split with a fifth held out"] = 5
    repeats: Annotated[int, "of the cross-validation, with other folds; the bundle is made of the first one's"] = 1
    site: Annotated[
        str | None, "the manifest's column that folds are balanced in as well, where there is one; null: none", VERBATIM
    ] = "site"
    sites_apart: Annotated[bool, "true: no site is on both sides of a fold"] = False
    inner: Annotated[
        float,
        "share of the training subjects kept to choose the checkpoint on; 0: the last weights, or of a tuned network "
        "that answers for whole heads a fifth",
    ] = 0
    average: Annotated[
        float, "decay of the moving average of the weights that is scored and shipped; 0: no average"
    ] = 0.999
    scratch_lr_scale: Annotated[
        float, "times optim.lr, for fresh weights: backbone_from=none and the baseline scratch"
    ] = 1.0
    baselines: Annotated[
        tuple[Baseline, ...], "trained and scored on the same folds, those there can be; []: none", FREE
    ] = ("scratch", "random_linear", "features", "volumes")
    mirror: Annotated[
        tuple[int, ...], "axes (0: left-right) along which averaging over mirrored volumes is tried; []: none"
    ] = (0,)
    clean: Annotated[
        bool, "whether removing small components is tried; both are kept only where held-out cases gain"
    ] = True
    audit: Annotated[
        bool, "whether site, scanner, position and the like are tried as predictors of the answer", FREE
    ] = True
    audit_columns: Annotated[tuple[str, ...], "further columns of the manifest to try so, e.g. [age, sex]", FREE] = ()
    report: Annotated[bool, "whether report.html is written", FREE] = True
    data: Annotated[FinetuneData, "what is read of the cases, and how it is varied"] = field(
        default_factory=FinetuneData
    )
    task: Annotated[
        TaskSettings,
        "what is asked",
        Group("segmentation", kinds=task_settings_class, named=TaskOptions()),
    ]
    backbone: Annotated[Mapping[str, Any], "the network, only with backbone_from=none", Group("unet_b")]
    adapt: Annotated[AdaptSpec, "without a backbone file: all layers at one rate", Group("full")] = AdaptSpec()
    optim: Annotated[OptimSettings, "the optimiser", Group("finetune", kinds=optim_class)] = OptimSettings(5e-4, 3e-5)
    trainer: Annotated[TrainerSettings, "the machine", Group("auto", over=_OVER, gone=TRAINERS_GONE)] = TrainerSettings(
        **_OVER  # type: ignore[arg-type]
    )
    debug: Annotated[bool, "a traceback in place of the sentence", FREE] = False
    command: str = ""

    def __post_init__(self) -> None:
        augment = self.data.augment
        if isinstance(augment, Mapping) and "scale" not in augment and augment:
            completed = {**augment, "scale": self.task.augment_scale}
            object.__setattr__(self, "data", replace(self.data, augment=completed))
