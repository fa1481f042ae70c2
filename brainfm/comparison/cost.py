"""Cost of a model: parameters and arithmetic, counted before it is trained; time, memory, energy from its receipt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from brainfm.data.patches import collate
from brainfm.data.store import Store
from brainfm.nets.backbone import build_backbone
from brainfm.nets.cpu import swap_out
from brainfm.training import receipt
from brainfm.training.loop import State
from brainfm.training.pretrain import assembled
from brainfm.training.settings import PretrainSettings, SteppedSettings

_STEPS = (4, 16)  # of the two trainings that a step is timed with


def arithmetic(settings: PretrainSettings, store: Store) -> dict[str, float]:
    """What a sample of a pre-training costs on any device.

    Returns:
        ``parameters`` of the encoder, ``trained_parameters`` of all that its steps move, ``flops_a_sample`` of forward
        and backward, ``encoder_flops`` of one forward pass of a patch.

    Multiplications and additions both count (`torch.utils.flop_counter`): convolutions, matrix products and attention,
    with the layers as they are written, not those of a CPU.
    """
    batch_size = settings.trainer.batch_size
    made = assembled(settings, store)
    objective = swap_out(made.module.question).train()
    batch = made.module.shown(collate([made.train_set[number] for number in range(batch_size)]))
    flops = _counted(lambda: objective(batch, 0.5).total.backward())
    trained = sum(weight.numel() for weight in objective.parameters() if weight.requires_grad)
    found = forward(settings.backbone, settings.data.patch_vox)
    return found | {"trained_parameters": trained, "flops_a_sample": flops / batch_size}


def forward(network: Mapping[str, Any], patch_vox: tuple[int, int, int]) -> dict[str, float]:
    """``parameters`` and ``encoder_flops`` of a network that is not trained."""
    backbone = build_backbone(**network).eval()
    with torch.no_grad():
        flops = _counted(lambda: backbone.features(torch.zeros(1, 1, *patch_vox)))
    return {"parameters": sum(weight.numel() for weight in backbone.parameters()), "encoder_flops": flops}


def _counted(work: Callable[[], object]) -> float:
    # the fused kernels of attention are not all known to the counter; products of matrices are
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


def spent(settings: PretrainSettings, state: State) -> dict[str, Any]:
    """Of a finished pre-training. ``device_hours``: see `device_seconds`; ``core_hours``: processor time.
    ``energy_kwh``: of the devices, or of the processor's packages; None where nobody tells."""
    told = json.loads((settings.run / receipt.FILE).read_text())
    on_gpu, seconds = bool(told["gpu_hours"]), max(device_seconds(settings, state), 1e-6)
    memory = told["peak_gpu_memory_gib" if on_gpu else "peak_memory_gib"]
    return {
        "steps": state.step,
        "samples": told["samples"],
        "samples_a_second": told["samples"] / seconds,
        "device_hours": seconds / 3600,
        "core_hours": told["cpu_hours"],
        "peak_memory_gib": memory,
        "energy_kwh": told["gpu_energy_kwh"] if on_gpu else told.get("cpu_energy_kwh"),
        "device": told["device"],
        "sessions": told["sessions"],
    }


def device_seconds(settings: PretrainSettings, state: State) -> float:
    """What a training has taken of its devices: of GPUs seconds of training by the clock, times their number; of a CPU
    the processor time of all cores, which does not depend on what else the machine is doing."""
    told = json.loads((settings.run / receipt.FILE).read_text())
    return state.seconds * told["processes"] if told["gpu_hours"] else told["cpu_hours"] * 3600


def seconds_a_step(settings: PretrainSettings, run: Callable[[PretrainSettings], State], folder: Path) -> float | None:
    """Of the device, measured with two short trainings, so that what a beginning costs drops out; None where it was
    interrupted."""
    times, optim = [], settings.optim
    if isinstance(optim, SteppedSettings):
        optim = replace(optim, warmup_steps=0)  # of more steps than these
    for steps in _STEPS:
        trainer = replace(settings.trainer, max_steps=steps)
        short = replace(settings, trainer=trainer, optim=optim, run=folder / f"speed{steps}")
        state = run(short)
        if state.step < steps:
            return None
        times.append(device_seconds(short, state))
    return max((times[1] - times[0]) / (_STEPS[1] - _STEPS[0]), 1e-6)
