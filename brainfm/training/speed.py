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

    A GPU: bf16-mixed, compile=default, channels last. A CPU: float32, not compiled, the layout left to each layer.
    bf16-mixed has to be asked for there: it pays with matrix units (AMX) alone, answers on a CPU are float32, and the
    same command should give the same on any of them.
    """
    gpu = trainer.accelerator != "cpu" and torch.cuda.is_available()
    precision, compile_mode, channels_last = trainer.precision, trainer.compile, trainer.channels_last
    if precision == "auto":
        precision = "bf16-mixed" if gpu else "32-true"
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
