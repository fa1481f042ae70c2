"""Settings of a comparison of models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.settings import FREE, VERBATIM, shown


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Pre-train models alike, ask them alike, on people whom no pre-training has seen. Interrupted, the same command
    goes on; a model, a task or a seed more adds its own runs only.

    Attributes:
        command: what was typed, for the page; empty where Python called.

    Raises: ConfigError for impossible values.
    """

    store: Annotated[Path, "prepared scans", FREE]
    out: Annotated[Path, "folder of the comparison", FREE]
    models: Annotated[
        tuple[str, ...],
        "BACKBONE:OBJECTIVE, BACKBONE:untrained, untrained (one for each network among the others), volumes (linear on"
        " region volumes of a label column)",
    ]
    tasks: Annotated[tuple[str, ...], "columns of the manifest; NAME of a column NAME_labels or NAME_mask: a mask"]
    budget: Annotated[Literal["steps", "hours"], "what every pre-training has as much of"] = "steps"
    steps: Annotated[int | None, "of budget=steps"] = None
    hours: Annotated[
        float | None,
        "of budget=hours, for one pre-training: of a GPU by the clock, of a CPU core-hours; steps follow from a"
        " measured step",
    ] = None
    seeds: Annotated[int, "runs of every model: from fresh weights, with other shots"] = 3
    shots: Annotated[tuple[int, ...], "people to fine-tune on, drawn for each seed, the same for all models"] = (5,)
    contrasts: Annotated[tuple[str, ...] | None, "that tasks are answered from; null: all"] = None
    side_column: Annotated[
        str | None, "a column of the manifest with train and held; null: sides by hash of the person", VERBATIM
    ] = None
    held: Annotated[float, "share of the people held out, where there is no side_column"] = 0.34
    split_seed: Annotated[int, "another one holds others out"] = 0
    tested: Annotated[int, "held people at most that masks are tested on; 0: all"] = 0
    inner: Annotated[int, "people of the training side that rates are tried on, who do nothing else in fine-tuning"] = (
        12
    )
    rates: Annotated[tuple[float, ...], "of fine-tuning, that each model tries on the inner people; one: no trial"] = (
        3e-4,
        1e-3,
        3e-3,
    )
    draws: Annotated[int, "trials of each of these rates"] = 2
    pretrain_rates: Annotated[
        tuple[float, ...], "of pre-training, that each model tries in short; []: the rate that it has"
    ] = ()
    trial_share: Annotated[float, "of the budget, for each trial of a rate of pre-training"] = 0.25
    against: Annotated[str | None, "the model that the page compares with; null: the first"] = None
    device: Annotated[Literal["auto", "cpu", "cuda"], "of frozen features", FREE] = "auto"
    pretrain: Annotated[Mapping[str, Any], "keys of `brainfm pretrain`, for all: pretrain.trainer.batch_size=8"] = (
        field(default_factory=dict)
    )
    finetune: Annotated[Mapping[str, Any], "keys of `brainfm finetune`, for all: finetune.trainer.max_steps=200"] = (
        field(default_factory=dict)
    )
    of_model: Annotated[Mapping[str, Any], "model: {keys of `brainfm pretrain` for it alone}"] = field(
        default_factory=dict
    )
    of_task: Annotated[Mapping[str, Any], "task: {keys of `brainfm finetune` for it alone}"] = field(
        default_factory=dict
    )
    debug: Annotated[bool, "a traceback in place of the sentence", FREE] = False
    command: str = ""

    def __post_init__(self) -> None:
        amount = self.amount
        if amount is None:
            raise ConfigError(f"budget={self.budget} without {self.budget}=: expected how many, e.g. steps=2000")
        if not math.isfinite(amount) or amount <= 0:
            raise ConfigError(f"{self.budget}={amount}: expected more than 0")
        other = "hours" if self.budget == "steps" else "steps"
        if getattr(self, other) is not None:
            raise ConfigError(f"budget={self.budget} with {other}={getattr(self, other)}: expected {other}=null")
        for key in ("models", "tasks", "shots", "rates"):
            found = getattr(self, key)
            if not found or len(set(found)) != len(found):
                raise ConfigError(f"{key}={shown(found)}: expected one or more, each once")
        for key, least in (("seeds", 1), ("draws", 1), ("inner", 0), ("tested", 0), ("split_seed", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key}={getattr(self, key)}: expected {least} or more")
        if min(self.shots) < 1:
            raise ConfigError(f"shots={shown(self.shots)}: expected 1 person or more")
        for key in ("rates", "pretrain_rates"):
            if any(not math.isfinite(rate) or rate <= 0 for rate in getattr(self, key)):
                raise ConfigError(f"{key}={shown(getattr(self, key))}: expected rates above 0")
        if not 0 < self.held < 1 or not 0 < self.trial_share <= 1:
            raise ConfigError(
                f"held={self.held}, trial_share={self.trial_share}: expected shares above 0, held below 1"
            )
        if (len(self.rates) > 1 or self.pretrain_rates) and self.inner < 2:
            raise ConfigError(f"inner={self.inner}: expected 2 people or more to try rates on, or rates=[ONE]")

    @property
    def amount(self) -> float | None:
        """Of the budget."""
        return self.steps if self.budget == "steps" else self.hours
