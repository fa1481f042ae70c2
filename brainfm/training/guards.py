"""Guards stop a run that has gone wrong: numbers that are not finite, features that collapse, a loss that explodes.

A guard says nothing, or one sentence: what was seen, after which step, what to try. What it remembers between looks
is plain JSON in the run's state, so that an interrupted run is judged like an uninterrupted one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.training.settings import GUARD_MEMORY, GuardSpec

_ENOUGH = 20  # of them, before anything is called unusual
_OF_A_LEVEL = re.compile(r"(level\d+|decoder\d+|dense)_(dice|rank|random_(dice|rank|low_dice))")  # probing/levels.py


class Guards:
    """The guards of one run.

    Args:
        kept: what they remember; changed in place, JSON-able, kept with the checkpoint.
        warmup_steps: of the rate: until then no level is judged.
    """

    def __init__(self, spec: GuardSpec, kept: dict[str, Any], warmup_steps: int = 0) -> None:
        self.spec, self.kept, self.warmup_steps = spec, kept, warmup_steps

    def see_loss(self, step: int, loss: float) -> str | None:
        """Looks at a logged loss. A sentence where it has been far above its median for long."""
        spec, losses = self.spec, self.kept.setdefault("losses", [])
        usual = median(losses) if len(losses) >= _ENOUGH else 0.0
        losses.append(loss)
        del losses[:-GUARD_MEMORY]
        if spec.explode is None:
            return None
        above = usual > 0 and loss > spec.explode * usual
        self.kept["above"] = self.kept.get("above", 0) + 1 if above else 0
        if self.kept["above"] < spec.explode_logs:
            return None
        return (
            f"the loss is {loss:.4g} after step {step}, more than {spec.explode:g} times its median {usual:.4g} for "
            f"{spec.explode_logs} logged steps; try a smaller optim.lr or trainer.clip_norm, or guard.explode=null"
        )

    def see_probe(self, step: int, values: Mapping[str, float]) -> str | None:
        """Looks at a probe's values (``<part>_std``, ``<part>_rank``). A sentence where a part has collapsed."""
        spec, low = self.spec, self.kept.setdefault("low", {})
        for what, words, least in (
            ("std", "standard deviation", spec.min_std),
            ("rank", "effective rank", spec.min_rank),
        ):
            for name, value in values.items():
                part, _, last = name.rpartition("_")
                exempt = what == "rank" and (part in spec.rank_exempt or _OF_A_LEVEL.fullmatch(name))
                if least is None or last != what or exempt:
                    continue
                # Written so that a value that is no number counts as low.
                low[name] = 0 if value >= least else low.get(name, 0) + 1
                if low[name] >= spec.probes:
                    return (
                        f"the features of {part} have collapsed: their {words} over the probed scans is {value:.3g} "
                        f"after step {step}, below guard.min_{what}={least:g} for {spec.probes} probes in a row; try "
                        f"a smaller optim.lr or other weights of the objective's terms, or guard.min_{what}=null"
                    )
        return None

    def see_levels(self, step: int, values: Mapping[str, float]) -> tuple[str | None, bool]:
        """Looks at what every level tells: ``<level>_dice`` and ``_rank``, of fresh networks ``_random_low_dice``.

        Returns:
            A sentence about the levels that are too low, and whether the run shall stop for it.
        """
        spec = self.spec
        if spec.level_dice is None or step < self.warmup_steps:
            return None, False
        before, low, said = self.kept.get("low_levels", {}), {}, []
        for name, value in values.items():
            found = _OF_A_LEVEL.fullmatch(name)
            level, what = found.groups()[:2] if found else ("", "")
            fresh = values.get(f"{level}_random_low_dice")
            least, word = {
                "dice": (fresh, "a linear Dice of {:.3f} (fresh weights {:.3f})"),
                "rank": (spec.min_level_rank, "an effective rank of {:.2f} (guard.min_level_rank={:g})"),
            }.get(what, (None, ""))
            if least is None or value >= least:  # what is no number is below
                continue
            low[name] = before.get(name, 0) + 1
            said.append(f"{level} has {word.format(value, least)}")
        self.kept["low_levels"] = low
        if not said:
            return None, False
        sentence = (
            f"levels that a segmenter reads tell little after step {step}: {', '.join(said)}; try a smaller optim.lr, "
            "an objective with a skip decoder, or guard.level_dice=null"
        )
        return sentence, spec.level_dice == "stop" and max(low.values()) >= spec.probes

    def is_low(self) -> bool:
        """Whether some part, or with level_dice=stop some level, was below its threshold at the last probe."""
        levels = self.kept.get("low_levels", {}) if self.spec.level_dice == "stop" else {}
        return any(self.kept.get("low", {}).values()) or any(levels.values())


class FiniteWatch:
    """Remembers the first step at which a watched value was not finite, on the device: no step waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.tensor(math.inf, device=device)

    def see(self, step: int, values: Iterable[Tensor]) -> None:
        """Looks at scalars of the step that made ``step`` steps complete."""
        fine = torch.stack([torch.isfinite(value.detach()).all() for value in values]).all()
        self._first = torch.where(fine, self._first, self._first.clamp(max=step))

    def first(self) -> int | None:
        """The first such step; waits for the device."""
        step = float(self._first)
        return None if math.isinf(step) else int(step)


@torch.no_grad()
def first_not_finite(module: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """The name of a parameter, buffer or optimiser state with numbers that are not finite; one wait for the device.

    A buffer may hold infinities on purpose (a mask added to logits), but nothing that is no number.
    """
    names: list[str] = []
    fine: list[Tensor] = []
    for name, parameter in module.named_parameters():
        names.append(name)
        fine.append(torch.isfinite(parameter).all())
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                names.append(f"the optimiser's {key} of {name}")
                fine.append(torch.isfinite(value).all())
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point():
            names.append(name)
            fine.append(~torch.isnan(buffer).any())
    if not names:
        return None
    device = next(iter(fine)).device
    flags = torch.stack([flag.to(device, non_blocking=True) for flag in fine]).tolist()
    return next((name for name, flag in zip(names, flags) if not flag), None)
