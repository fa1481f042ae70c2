"""The training loop that pre-training and fine-tuning share: steps, checkpoints, interruption, exact resumption.

Lightning Fabric brings devices, precision and processes; the loop itself is here to be read. Nothing in it draws
random numbers: samples, masks and augmentation are functions of (seed, number), so the step is the whole stream state.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.curves import Curves
from brainfm.errors import BrainfmWarning, ConfigError, TrainingError
from brainfm.files import writing
from brainfm.progress import Progress
from brainfm.training.guards import FiniteWatch, Guards, first_not_finite
from brainfm.training.optim import Rates, Wsd, lr_factor
from brainfm.training.receipt import Meter
from brainfm.training.settings import GuardSpec

CHECKPOINT = "last.ckpt"
GOOD = "good.ckpt"  # the last checkpoint whose probe was passed
# How a batch system announces that it will take the machine away: SLURM's --signal, submitit.
ANNOUNCED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))


@dataclass(frozen=True)
class LoopSpec:
    """How long and how often, in steps.

    Attributes:
        max_steps: steps in all.
        warmup_steps: of the learning rate, before a cosine to 0 at ``max_steps``.
        wsd: the schedule instead of these two, where ``max_steps`` is only how far to go for now.
        clip_norm: largest norm of the gradient of all parameters; 0 does not clip.
        log_every, checkpoint_every, evaluate_every, probe_every: intervals; 0 is never. Evaluation and probe also
            follow the last step.
        accumulate: into how many parts a batch is split, one after the other through the network; their gradients add
            up to the batch's, in the memory of one part. For a loss that is a mean over samples that is the same step;
            a loss that looks across the batch (Dice over all its voxels, contrastive pairs) sees a part at a time.
    """

    max_steps: int
    warmup_steps: int
    clip_norm: float = 1.0
    log_every: int = 10
    checkpoint_every: int = 500
    evaluate_every: int = 0
    probe_every: int = 0
    accumulate: int = 1
    wsd: Wsd | None = None

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not (self.wsd is not None or 0 <= self.warmup_steps <= self.max_steps):
            raise ConfigError(
                f"trainer.max_steps={self.max_steps} with {self.warmup_steps} warm-up steps: "
                "expected at least one step and no more warm-up than steps"
            )
        if self.accumulate < 1:
            raise ConfigError(f"trainer.accumulate={self.accumulate}: expected 1 or more")

    def factor(self, step: int) -> float:
        """The share of the peak learning rate at a step (0-based)."""
        return self.wsd.factor(step) if self.wsd else lr_factor(step, self.max_steps, self.warmup_steps)

    @property
    def warmup(self) -> int:
        """Steps until the rate is at its peak."""
        return self.wsd.warmup_steps if self.wsd else self.warmup_steps

    def progress(self, step: int) -> float:
        """How far the objective's own schedules are after ``step`` steps, in [0, 1]."""
        return self.wsd.progress(step) if self.wsd else step / self.max_steps


@dataclass
class State:
    """Where a run stands.

    Attributes:
        step: steps done.
        seconds: of training so far, over all sessions of the run.
        waited: seconds of these spent waiting for data.
        extra: what the caller wants kept, JSON-able (e.g. the best validation score).
        guard: what the guards remember.
        receipt: what the run has cost up to its last checkpoint (receipt.py).
        saved: step of the last checkpoint; 0 before the first.
    """

    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] = field(default_factory=dict)
    saved: int = 0


@dataclass
class Run:
    """One training run: what is trained, from which loader, into which folder.

    Attributes:
        folder: gets ``last.ckpt``, ``curves.csv``, ``tensorboard/``.
        identity: the resolved configuration; a checkpoint of another configuration is refused.
        module: what is trained; called with (Batch, progress in [0, 1]) it returns Terms.
        optimizer: its groups' ``lr`` are the peaks; a group may bring its own ``schedule`` (optim.schedule_factor), the
            others follow the loop's warm-up and cosine.
        loader_from: gives the batches from a step on.
        evaluate: called with (state) every ``evaluate_every`` steps; returns values for the curves.
        after_step: called with (steps done, progress) after each optimiser step: a teacher moves here, an average too.
        saved: called with (state) on the first process after each checkpoint was written.
        probe: called with (steps done) every ``probe_every`` steps on the first process, while the others wait; returns
            values for the curves, which get ``probe_`` before their names.
        guard: when to stop; None looks only for numbers that are not finite.
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
    after_step: Callable[[int, float], None] | None = None
    saved: Callable[[State], object] | None = None
    probe: Callable[[int], dict[str, float]] | None = None
    guard: GuardSpec | None = None
    title: str = "train"


class _TrainingStep(nn.Module):
    """Lets a Batch and Terms through the wrappers of Fabric and DDP, which know tensors and dicts only."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tensors: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        terms: Terms = self.module(Batch(**tensors), progress)
        return {"total": terms.total, **terms.parts}


def train(run: Run) -> State:
    """Runs to ``max_steps`` or until interrupted (SIGTERM, SIGINT, SIGUSR1, SIGUSR2), when it saves and returns.

    Returns:
        The state; ``state.step < max_steps`` means interrupted.

    Raises:
        ConfigError: where the folder holds a run with another configuration.
        TrainingError: at a loss, gradient or weight that is not finite, or where a guard says so; the last checkpoint
            stays as it was.
    """
    fabric, spec = run.fabric, run.spec
    rates = Rates(run.optimizer, spec.factor, alone=fabric.world_size == 1)
    step_module, optimizer = fabric.setup(_TrainingStep(run.module), run.optimizer)
    state = _restore(run, optimizer) if (run.folder / CHECKPOINT).exists() else State()
    if state.step >= spec.max_steps:
        return state
    chief = fabric.is_global_zero
    meter, watch = Meter(fabric.device, state.receipt), FiniteWatch(fabric.device)
    guards = Guards(run.guard, state.guard, spec.warmup) if run.guard is not None else None
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
            meter.saw(batch)
            lr = rates.set(optimizer, state.step)
            values = _gradients(run, step_module, batch, spec.progress(state.step))
            rates.drop_unwanted(optimizer)
            values["grad_norm"] = _clip(run.module, spec.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            watch.see(state.step, (values["total"], values["grad_norm"]))
            if run.after_step is not None:
                run.after_step(state.step, spec.progress(state.step))
            if _due(state.step, spec.log_every, spec) or state.step == 1:
                shown = _finite(values, watch, run, state) | {"lr": lr}
                _stop_at(run, state, guards.see_loss(state.step, shown["total"]) if guards and chief else None)
                progress_bar.note = f"loss {shown['total']:.4f}"
                if curves is not None:
                    curves.add(state.step, shown)
            state.seconds += time.perf_counter() - began
            progress_bar.advance()
            if run.evaluate is not None and _due(state.step, spec.evaluate_every, spec):
                scores = _evaluate(run, state)
                if curves is not None:
                    curves.add(state.step, scores)
            due = run.probe is not None and _due(state.step, spec.probe_every, spec)
            passed = due and _passes_probe(run, state, meter, guards, curves)
            stop = _of_any_rank(fabric, interrupted())
            if stop or passed or _due(state.step, spec.checkpoint_every, spec):
                _finite(values, watch, run, state)
                _stop_at(run, state, _weights_fault(run, state))
                state.receipt, state.saved = meter.read(fabric), state.step
                _save(run, optimizer, state)
                if run.saved is not None and chief:
                    run.saved(state)
                if passed and chief:
                    _keep(run.folder / CHECKPOINT, run.folder / GOOD)
                if curves is not None:
                    curves.add_speed(state.step, _speed(state))
            if stop:
                break
    rates.wake(optimizer)
    if curves is not None:
        curves.close()
    _pass_on(stop)
    return state


def _passes_probe(run: Run, state: State, meter: Meter, guards: Guards | None, curves: Curves | None) -> bool:
    """Probes the features. Whether guards looked at them and found nothing low.

    Raises: TrainingError where a guard says so.
    """
    with meter.probing():
        scores = _probe(run, state)
    if curves is not None:
        curves.add(state.step, {f"probe_{name}": value for name, value in scores.items()})
    if guards is None:
        return False
    _stop_at(run, state, guards.see_probe(state.step, scores))
    _judge_levels(run, state, guards, scores)
    return not guards.is_low()


def _gradients(run: Run, step_module: Any, batch: Batch, progress: float) -> dict[str, Tensor]:
    """Adds the gradients of the batch's loss to the weights, a part of the batch after the other. Returns the values:
    of each the mean over the samples."""
    parts = _split(batch, run.spec.accumulate)
    if len(parts) == 1:
        values = step_module(_tensors(batch.to(run.fabric.device)), progress)
        run.fabric.backward(values["total"])
        return values
    sums: dict[str, Tensor] = {}
    shares: dict[str, float] = {}
    for number, part in enumerate(parts):
        share = len(part) / len(batch)
        last = number == len(parts) - 1
        with nullcontext() if last else run.fabric.no_backward_sync(step_module):  # processes meet once a step
            found = step_module(_tensors(part.to(run.fabric.device)), progress)
            run.fabric.backward(found["total"] * share)
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + share * value.detach()
            shares[name] = shares.get(name, 0.0) + share  # a term that a part lacks does not count there
    return {name: total / shares[name] for name, total in sums.items()}


def _split(batch: Batch, parts: int) -> list[Batch]:
    """The samples in their order, in this many parts of equal size (the first ones hold one more where it does not
    divide), fewer where there are fewer samples."""
    parts = min(parts, len(batch))
    if parts == 1:
        return [batch]
    pieces = {name: value.tensor_split(parts) for name, value in _tensors(batch).items()}
    return [Batch(**{name: piece[number] for name, piece in pieces.items()}) for number in range(parts)]


def _due(step: int, every: int, spec: LoopSpec) -> bool:
    return step == spec.max_steps or (every > 0 and step % every == 0)


def _evaluate(run: Run, state: State) -> dict[str, float]:
    assert run.evaluate is not None
    run.module.eval()
    try:
        return run.evaluate(state)
    finally:
        run.module.train()


def _probe(run: Run, state: State) -> dict[str, float]:
    """The first process asks; all learn the answer, and none runs ahead."""
    assert run.probe is not None
    scores: dict[str, float] = {}
    if run.fabric.is_global_zero:
        run.module.eval()
        try:
            scores = run.probe(state.step)
        finally:
            run.module.train()
    return run.fabric.broadcast(scores)


def _judge_levels(run: Run, state: State, guards: Guards, scores: dict[str, float]) -> None:
    said, stops = guards.see_levels(state.step, scores)
    _stop_at(run, state, said if stops else None)
    if said is not None and run.fabric.is_global_zero:
        warnings.warn(said, BrainfmWarning, stacklevel=3)


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


def _finite(values: dict[str, Tensor], watch: FiniteWatch, run: Run, state: State) -> dict[str, float]:
    """The values as numbers. Raises TrainingError where one is not finite, or was not at a step since the start."""
    numbers = {name: float(value.detach()) for name, value in values.items()}
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    first = watch.first()
    fault = None
    if bad or first is not None:
        fault = (
            f"{bad[0] if bad else 'the loss or its gradient'} is not finite after step {first or state.step}; "
            "try a smaller optim.lr or trainer.precision=32-true"
        )
    _stop_at(run, state, fault)
    return numbers


def _weights_fault(run: Run, state: State) -> str | None:
    name = first_not_finite(run.module, run.optimizer)
    if name is None:
        return None
    return f"{name} is not finite after step {state.step}; try a smaller optim.lr or trainer.precision=32-true"


def _stop_at(run: Run, state: State, fault: str | None) -> None:
    """Stops all processes where one of them has a fault: TrainingError on the first, in one sentence that says what is
    kept; the others leave with the same exit code and say nothing."""
    faulty = _of_any_rank(run.fabric, run.fabric.global_rank + 1 if fault is not None else 0)
    if not faulty:
        return
    fault = run.fabric.broadcast(fault, src=faulty - 1)
    if not run.fabric.is_global_zero:
        raise SystemExit(2)
    kept = f"{CHECKPOINT} holds step {state.saved}" if state.saved else "no checkpoint was written before"
    if (run.folder / GOOD).exists():
        good = json.loads(read_checkpoint(run.folder / GOOD)["state"])["step"]
        kept += f", {GOOD} step {good}, the last whose probe was passed (copy it over {CHECKPOINT} to go on from there)"
    raise TrainingError(f"{run.folder}: {fault}; {kept}")


def _of_any_rank(fabric: Fabric, number: int) -> int:
    """The largest number of all processes, 0 for none: all must leave at the same step, for the same reason."""
    if fabric.world_size == 1:
        return number
    asked = fabric.all_reduce(torch.tensor(number, device=fabric.device), reduce_op="max")
    return int(asked) if isinstance(asked, Tensor) else number


def _save(run: Run, optimizer: torch.optim.Optimizer, state: State) -> None:
    if run.fabric.is_global_zero:
        content = {
            "format": 1,
            "identity": json.dumps(run.identity, sort_keys=True),
            "state": json.dumps(dataclasses.asdict(state)),
            "module": run.module.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        write_checkpoint(run.folder / CHECKPOINT, content)
    run.fabric.barrier()


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all. Raises: FileError, e.g. where the disk is full."""
    with writing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # A full disk reaches torch as an OSError, and leaves it as a RuntimeError about positions in a file.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _keep(checkpoint: Path, name: Path) -> None:
    """A second name for a checkpoint: a link costs no space, and the next checkpoint replaces the other name only."""
    partial = name.with_suffix(".tmp")
    partial.unlink(missing_ok=True)
    try:
        os.link(checkpoint, partial)
    except OSError:  # a file system without links
        shutil.copyfile(checkpoint, partial)
    os.replace(partial, name)


def _restore(run: Run, optimizer: torch.optim.Optimizer) -> State:
    path = run.folder / CHECKPOINT
    content = read_checkpoint(path)
    there = json.loads(content["identity"])
    differing = first_difference(there, run.identity)
    if differing is not None:
        key, old, new = differing
        raise ConfigError(
            f"{run.folder} holds a run with {key}={old}, found {key}={new}: "
            "use another run= folder, or the same values to go on"
        )
    run.module.load_state_dict(content["module"])
    optimizer.load_state_dict(content["optimizer"])
    state = State(**json.loads(content["state"]))
    state.saved = state.step
    return state


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


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(set(old) | set(new)):
            found = first_difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
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
def _interruptible() -> Iterator[Callable[[], int]]:
    """Within, the first signal is only noted instead of ending the process; the step is finished first."""
    asked = [0]

    def ask(number: int, frame: Any) -> None:
        if asked[0] and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked[0] = asked[0] or number

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, *ANNOUNCED):
        try:
            before[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: the caller's handlers stay
            break
    try:
        yield lambda: asked[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pass_on(number: int) -> None:
    """Hands a batch system's signal to whoever was listening before the loop, now that all is saved.

    submitit's listener puts the job back into its queue. SIGTERM is not passed on: a cancelled job stays cancelled.
    """
    if number in ANNOUNCED and callable(signal.getsignal(number)):
        signal.raise_signal(number)
