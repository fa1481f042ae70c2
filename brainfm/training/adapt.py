"""Adaptation: how much of a pre-trained network a fine-tuning may move, how fast, and from when on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from brainfm.errors import ConfigError
from brainfm.tasks.task import Task
from brainfm.training.optim import check_rates
from brainfm.training.settings import AdaptSpec


def parameter_groups(
    task: Task, adapt: AdaptSpec, lr: float, weight_decay: float, max_steps: int
) -> list[dict[str, Any]]:
    """The optimiser's groups, and the task frozen where it shall not move: call it before DDP wraps the task.

    The head is every parameter outside ``task.backbone`` and, where ``adapt.decoder`` is true, ``task.decoder``, which
    then learns and sleeps as a block of the encoder does, but never freezes. Vectors (biases, norms, scores) are not
    decayed. A group has ``params``, ``lr`` (its peak), ``weight_decay`` and, where it does not follow the loop's own
    warm-up and cosine, ``schedule`` (training/optim.py). Frozen parameters are in no group, ask for no gradient (an
    encoder that is frozen as a whole keeps no activations: its images ask for none either), and their blocks stay in
    evaluation mode.

    Args:
        lr: peak of the head, > 0.
        weight_decay: decoupled, >= 0.
        max_steps: of the training; the shares of ``adapt`` become steps.

    Source: layer-wise decay: Clark et al. 2020 (ELECTRA, arXiv 2003.10555), appendix; the saw of two teeth: nnU-Net
        with pre-trained encoders (Wald et al. 2024, arXiv 2412.17041), trainer "sawtooth". Differs: AdamW and cosines
        instead of SGD and polynomials; the encoder sleeps in the first tooth.
    Raises:
        ConfigError: where more blocks are to learn than the backbone has, or the rates are impossible.
    """
    check_rates(lr, weight_decay)
    blocks = task.backbone.blocks()
    if adapt.last_blocks is not None and adapt.last_blocks > len(blocks):
        name = task.backbone.config["name"]
        raise ConfigError(f"adapt.last_blocks={adapt.last_blocks}: {name} has {len(blocks)} blocks, expected no more")
    learning = len(blocks) if adapt.last_blocks is None else adapt.last_blocks
    for block in blocks[: len(blocks) - learning]:
        _freeze(block)
    between = list(task.decoder.parameters()) if adapt.decoder is True else []  # type: ignore[union-attr]
    nearest = 2 if between else 1
    behind = {p: len(blocks) - 1 - n + nearest for n, block in enumerate(blocks) for p in block.parameters()}
    behind |= dict.fromkeys(between, 1)
    encoder, head = _schedules(adapt, max_steps)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for parameter in task.parameters():
        if not parameter.requires_grad:
            continue
        depth = behind.get(parameter, 0)
        rate = lr * adapt.lr_scale * adapt.layer_decay**depth
        schedule = encoder if depth else head
        apart = depth if adapt.layer_decay < 1 else int(depth > 0 and encoder != head)
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((apart, parameter.ndim <= 1), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        if schedule is not None:
            group["schedule"] = schedule
    return [groups[place] for place in sorted(groups)]  # of `full`: those of build_optimizer, in its order


def learning_parts(task: Task, adapt: AdaptSpec, decoder: bool) -> list[nn.Module]:
    """What came from a backbone file and learns: the encoder's blocks that do not freeze, and with ``decoder`` the
    decoder."""
    blocks = task.backbone.blocks()
    learning = blocks if adapt.last_blocks is None else blocks[len(blocks) - min(adapt.last_blocks, len(blocks)) :]
    return [*learning, task.decoder] if decoder else list(learning)  # type: ignore[list-item]


def adapted_optimizer(
    task: Task,
    adapt: AdaptSpec,
    *,
    lr: float,
    weight_decay: float,
    max_steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW over ``parameter_groups``. Raises: see there."""
    groups = parameter_groups(task, adapt, lr, weight_decay, max_steps)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _schedules(adapt: AdaptSpec, max_steps: int) -> tuple[list[list[int]] | None, list[list[int]] | None]:
    """Teeth of the encoder and of the head; None where the loop's own schedule holds."""
    head_steps = round(adapt.head_fraction * max_steps)
    if not head_steps and adapt.warmup_fraction is None:
        return None, None
    whole = [head_steps, max_steps, round((adapt.warmup_fraction or 0.0) * max_steps)]
    first = [[0, head_steps, head_steps // 2]] if head_steps else []
    return [whole], [*first, whole]


def _freeze(block: nn.Module) -> None:
    block.requires_grad_(False)
    block.register_forward_pre_hook(_stay_fixed)


def _stay_fixed(block: nn.Module, inputs: Any) -> None:
    """Before each forward: the loop puts the whole task into training mode, where dropout and batch statistics act."""
    if block.training:
        block.eval()
