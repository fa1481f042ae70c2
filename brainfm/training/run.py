"""A run: what the two trainings share of its identity and provenance, its steps and rates, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from brainfm import __version__
from brainfm.data.store import Store
from brainfm.settings import plain
from brainfm.specs import Provenance
from brainfm.training.loop import LoopSpec, State
from brainfm.training.optim import Wsd
from brainfm.training.settings import (
    FinetuneSettings,
    OptimSettings,
    PretrainSettings,
    SteppedSettings,
    TrainerSettings,
    WsdSettings,
)


def identity_of(settings: PretrainSettings | FinetuneSettings, store: Store) -> dict[str, Any]:
    """What must be equal for a run to go on: all of the settings that can change a number, and the data."""
    return {**plain(settings, free=False), "store": store.fingerprint()}


def loop_spec(trainer: TrainerSettings, optim: OptimSettings) -> LoopSpec:
    """The steps of a run, and the rate of each."""
    warmup = optim.warmup_steps if isinstance(optim, SteppedSettings) else None
    if warmup is None:
        warmup = round(optim.warmup_fraction * trainer.max_steps)
    constant = isinstance(optim, WsdSettings) and optim.schedule == "wsd"
    return LoopSpec(
        max_steps=trainer.max_steps,
        warmup_steps=warmup,
        wsd=Wsd(warmup, optim.horizon_steps) if isinstance(optim, WsdSettings) and constant else None,
        clip_norm=trainer.clip_norm,
        log_every=trainer.log_every,
        checkpoint_every=trainer.checkpoint_every,
        evaluate_every=trainer.evaluate_every,
    )


def optim_values(optim: OptimSettings) -> dict[str, Any]:
    """What an optimiser is built with."""
    return {"lr": optim.lr, "weight_decay": optim.weight_decay, "betas": optim.betas}


def provenance_of(
    config: dict[str, Any],
    seed: int,
    store: Store,
    state: State,
    samples: int,
    fabric: Fabric,
    parents: tuple[str, ...] = (),
) -> Provenance:
    """Where the weights of a run come from; ``config`` is its settings as plain values."""
    device = torch.cuda.get_device_name(fabric.device) if fabric.device.type == "cuda" else "cpu"
    return Provenance(
        version=__version__,
        commit=commit_of_code(),
        data=store.fingerprint(),
        config=config,
        seed=seed,
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
