"""The training loop that pre-training and fine-tuning share: steps, checkpoints, interruption, exact resumption.

Lightning Fabric brings devices, precision and processes; the loop itself is here to be read. Nothing in it draws
random numbers: samples, masks and augmentation are functions of (seed, number), so the step is the whole stream state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.specs import ConfigError, TrainingError
from brainfm.training.monitor import Curves, Progress
from brainfm.training.optim import lr_factor

CHECKPOINT = "last.ckpt"


@dataclass(frozen=True)
class LoopSpec:
    """How long and how often, in steps.

    Attributes:
        max_steps: steps in all.
        warmup_steps: of the learning rate.
        clip_norm: largest norm of the gradient of all parameters; 0 does not clip.
        log_every, checkpoint_every, evaluate_every: intervals; 0 is never. Evaluation also follows the last step.
    """

    max_steps: int
    warmup_steps: int
    clip_norm: float = 1.0
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not 0 <= self.warmup_steps <= self.max_steps:
            raise ConfigError(
                f"trainer.max_steps={self.max_steps} with {self.warmup_steps} warm-up steps: "
                "expected at least one step and no more warm-up than steps"
            )


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step: steps done.
        seconds: of training so far, over all sessions of the run.
        waited: seconds of these spent waiting for data.
        extra: what the caller wants kept, JSON-able (e.g. the best validation score).
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One training run: what is trained, from which loader, into which folder.

    Attributes:
        folder: gets ``last.ckpt``, ``curves.csv``, ``tensorboard/``.
        identity: the resolved configuration; a checkpoint of another configuration is refused.
        module: what is trained; called with (Batch, progress in [0, 1]) it returns Terms.
        loader_from: gives the batches from a step on.
        evaluate: called with (state) every ``evaluate_every`` steps; returns values for the curves.
        after_step: called with progress after each optimiser step (a teacher moves here).
        title: for the progress bar.
    """

    fabric: Fabric
    folder: Path
    identity: dict[str, Any]
    module: nn.Module
    optimizer: torch.optim.Optimizer
    loader_from: Callable[[int], Iterable[Batch]]
    spec: LoopSpec
    evaluate: Callable[[State], dict[str, float]] | None = None
    after_step: Callable[[float], None] | None = None
    title: str = "train"


class _Step(nn.Module):
    """Lets a Batch and Terms through the wrappers of Fabric and DDP, which know tensors and dicts only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tensors: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        terms: Terms = self.module(Batch(**tensors), progress)
        return {"total": terms.total, **terms.parts}


def train(run: Run) -> State:
    """Runs to ``max_steps`` or until interrupted (SIGTERM, SIGINT), when it saves and returns.

    Returns:
        The state; ``state.step < max_steps`` means interrupted.

    Raises:
        ConfigError: where the folder holds a run with another configuration.
        TrainingError: at a loss that is not finite; the last checkpoint stays as it was.
    """
    fabric, spec = run.fabric, run.spec
    peak_lr = [group["lr"] for group in run.optimizer.param_groups]
    step_module, optimizer = fabric.setup(_Step(run.module), run.optimizer)
    state = _restore(run, optimizer) if (run.folder / CHECKPOINT).exists() else State()
    if state.step >= spec.max_steps:
        return state
    chief = fabric.is_global_zero
    curves = Curves(run.folder, state.step) if chief else None
    batches = iter(run.loader_from(state.step))
    run.module.train()
    with (
        _closing(batches),
        _interruptible() as interrupted,
        Progress(run.title, spec.max_steps, state.step, chief) as progress_bar,
    ):
        while state.step < spec.max_steps:
            began = time.perf_counter()
            batch = next(batches)
            state.waited += time.perf_counter() - began
            factor = lr_factor(state.step, spec.max_steps, spec.warmup_steps)
            for group, peak in zip(optimizer.param_groups, peak_lr):
                group["lr"] = peak * factor
            values = step_module(_tensors(batch.to(fabric.device)), state.step / spec.max_steps)
            fabric.backward(values["total"])
            values["grad_norm"] = _clip(run.module, spec.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            if run.after_step is not None:
                run.after_step(state.step / spec.max_steps)
            if _due(state.step, spec.log_every, spec) or state.step == 1:
                shown = _finite(values, run, state) | {"lr": peak_lr[0] * factor}
                progress_bar.note = f"loss {shown['total']:.4f}"
                if curves is not None:
                    curves.add(state.step, shown)
            state.seconds += time.perf_counter() - began
            progress_bar.advance()
            if run.evaluate is not None and _due(state.step, spec.evaluate_every, spec):
                scores = _evaluate(run, state)
                if curves is not None:
                    curves.add(state.step, scores)
            stop = _any_rank(fabric, interrupted())
            if stop or _due(state.step, spec.checkpoint_every, spec):
                _finite(values, run, state)
                _save(run, optimizer, state)
                if curves is not None:
                    curves.add_speed(state.step, _speed(state))
            if stop:
                break
    if curves is not None:
        curves.close()
    return state


def _due(step: int, every: int, spec: LoopSpec) -> bool:
    return step == spec.max_steps or (every > 0 and step % every == 0)


def _evaluate(run: Run, state: State) -> dict[str, float]:
    assert run.evaluate is not None
    run.module.eval()
    try:
        return run.evaluate(state)
    finally:
        run.module.train()


def _speed(state: State) -> dict[str, float]:
    seconds = max(state.seconds, 1e-9)
    return {"steps_per_s": state.step / seconds, "waited_share": state.waited / seconds}


def _tensors(batch: Batch) -> dict[str, Tensor]:
    values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return {name: value for name, value in values.items() if value is not None}


def _clip(module: nn.Module, clip_norm: float) -> Tensor:
    """Clips the gradients in place; returns their norm before."""
    largest = clip_norm if clip_norm > 0 else float("inf")
    return torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], largest)


def _finite(values: dict[str, Tensor], run: Run, state: State) -> dict[str, float]:
    """The values as numbers. Raises TrainingError at the first that is not finite."""
    numbers = {name: float(value.detach()) for name, value in values.items()}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        raise TrainingError(
            f"{run.folder}: {bad[0]} is not finite after step {state.step}; the last checkpoint is kept, "
            "try a smaller optim.lr or trainer.precision=32-true"
        )
    return numbers


def _any_rank(fabric: Fabric, flag: bool) -> bool:
    """Whether any process was asked to stop: all must leave at the same step."""
    if fabric.world_size == 1:
        return flag
    asked = fabric.all_reduce(torch.tensor(float(flag), device=fabric.device), reduce_op="sum")
    return isinstance(asked, Tensor) and bool(asked > 0)


def _save(run: Run, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Writes the checkpoint whole or not at all."""
    if run.fabric.is_global_zero:
        content = {
            "format": 1,
            "identity": json.dumps(run.identity, sort_keys=True),
            "state": json.dumps(dataclasses.asdict(state)),
            "module": run.module.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        path = run.folder / CHECKPOINT
        partial = path.with_suffix(".tmp")
        try:
            with partial.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:
            # A full disk reaches torch as an OSError, and leaves it as a RuntimeError about positions in a file.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        finally:
            partial.unlink(missing_ok=True)
    run.fabric.barrier()


def _restore(run: Run, optimizer: torch.optim.Optimizer) -> State:
    path = run.folder / CHECKPOINT
    content = read_checkpoint(path)
    there = json.loads(content["identity"])
    differing = _first_difference(there, run.identity)
    if differing is not None:
        key, old, new = differing
        raise ConfigError(
            f"{run.folder} holds a run with {key}={old}, found {key}={new}: "
            "use another run= folder, or the same values to go on"
        )
    run.module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    return State(**json.loads(content["state"]))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this loop; nothing in it is executed. Raises ConfigError where it cannot be read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"{path} is no readable checkpoint ({type(error).__name__}); remove it to begin anew"
        ) from None
    if not isinstance(content, dict) or content.get("format") != 1:
        raise ConfigError(f"{path} is not a checkpoint of brainfm; remove it to begin anew")
    return content


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            found = _first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    normal_old, normal_new = json.dumps(old, sort_keys=True), json.dumps(new, sort_keys=True)
    return None if normal_old == normal_new else (key, old, new)


@contextmanager
def _closing(batches: Iterator[Batch]) -> Iterator[None]:
    """Ends the loader's workers on every way out. They ignore SIGTERM (see data/loader.py), so an error that kept the
    iterator alive in its traceback would let the interpreter wait for them for ever."""
    try:
        yield
    finally:
        end = getattr(batches, "_shutdown_workers", None)  # private, but what Lightning itself calls
        if end is not None:
            end()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM and the first SIGINT set a flag instead of ending the process; the step is finished first."""
    asked = [False]

    def ask(number: int, frame: Any) -> None:
        if asked[0] and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked[0] = True

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: the caller's handlers stay
            break
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
