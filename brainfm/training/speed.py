"""Speed: precision, compiler, memory layout of a network. Settled once, before anything is built."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import SkipDecoder
from brainfm.training.settings import TrainerSettings


def settled(trainer: TrainerSettings) -> TrainerSettings:
    """``trainer`` with each ``auto`` of precision, compile and channels_last replaced by what it means on this machine.

    A GPU: bf16-mixed, compile=default, channels last. A CPU: float32 (bf16-mixed where it has matrix units, AMX:
    without them bfloat16 convolutions are slower than float32), not compiled, the layout left to each layer.
    """
    gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    precision, compile_mode, channels_last = trainer.precision, trainer.compile, trainer.channels_last
    if precision == "auto":
        precision = "bf16-mixed" if gpu or _has_matrix_units() else "32-true"
    if compile_mode == "auto":
        compile_mode = "default" if gpu else None
    if channels_last == "auto":
        channels_last = gpu
    return replace(trainer, precision=precision, compile=compile_mode, channels_last=channels_last)


def quicken(module: nn.Module, trainer: TrainerSettings) -> None:
    """Lays out and compiles in place what settled() says; names and values of the weights stay as they are.

    The networks are compiled, not the question around them: masks and noise are drawn on the host.

    Args:
        module: holds a backbone among its children, as an objective does.
        trainer: settled.
    """
    if trainer.channels_last:
        for weights in module.parameters():
            if weights.ndim == 5:
                weights.data = weights.data.contiguous(memory_format=torch.channels_last_3d)
    if trainer.compile is None:
        return
    for child in module.children():
        if isinstance(child, Backbone):
            child.features = torch.compile(child.features, mode=trainer.compile)  # type: ignore[method-assign]
        elif isinstance(child, SkipDecoder):  # objectives climb it without calling it
            child.climb = torch.compile(child.climb, mode=trainer.compile)  # type: ignore[method-assign]
        else:
            child.compile(mode=trainer.compile)


def _has_matrix_units() -> bool:
    """Whether the CPU multiplies bfloat16 tiles (AMX)."""
    ask = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(ask is not None and ask())
