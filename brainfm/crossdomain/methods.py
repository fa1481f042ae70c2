"""What a benchmark's methods are called: ``HOW@NETWORK`` or ``HOW@NETWORK+PRETRAINING``.

HOW           few-shot: logistic, prototypes, forest, linear (the published probe), finetune
              whole training split: supervised (end to end), full_logistic, full_forest
NETWORK       see networks.py; statistics and pixels are floors
PRETRAINING   mmpt, mmmaml, mmmaml1 (first order): on the other data sets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from brainfm.crossdomain.features import FLOORS
from brainfm.crossdomain.heads import HEADS
from brainfm.errors import ConfigError

FEW_SHOT = (*HEADS, "finetune")
WHOLE = ("supervised", "full_logistic", "full_forest")
PRETRAININGS = ("mmpt", "mmmaml", "mmmaml1")
FLOOR_METHODS = ("logistic@statistics", "forest@pixels")
WHOLE_FLOORS = ("full_logistic@statistics", "full_forest@pixels")


@dataclass(frozen=True)
class FewShotMethod:
    """A way to answer a task.

    Attributes:
        how: see the module.
        network: a network or a floor.
        pretraining: on the other data sets, or empty.
    """

    how: str
    network: str
    pretraining: str = ""

    def __str__(self) -> str:
        return f"{self.how}@{self.network}" + (f"+{self.pretraining}" if self.pretraining else "")

    @property
    def is_floor(self) -> bool:
        return self.network in FLOORS

    @property
    def whole(self) -> bool:
        """Whether it learns from the whole training split, not from a few images."""
        return self.how in WHOLE


def parse(text: str) -> FewShotMethod:
    """Raises: ConfigError."""
    how, _, rest = text.partition("@")
    network, _, last = rest.rpartition("+")
    if last not in PRETRAININGS or not network:
        network, last = rest, ""
    if how not in (*FEW_SHOT, *WHOLE):
        raise ConfigError(f"methods: {text!r} begins with {how!r}, expected one of {', '.join((*FEW_SHOT, *WHOLE))}")
    if not network:
        raise ConfigError(f"methods: {text!r} names no network, expected e.g. {how}@resnet18")
    method = FewShotMethod(how, network, last)
    if method.is_floor and (how in ("finetune", "supervised") or last):
        raise ConfigError(f"methods: {text!r}: {network} cannot be trained")
    return method


def with_floors(texts: Sequence[str]) -> list[FewShotMethod]:
    """The methods, each once: in front the floors that belong into every table, and before each method that is
    pre-trained on the other data sets the same without."""
    given = [parse(text) for text in texts]
    asked = [
        each
        for method in given
        for each in (FewShotMethod(method.how, method.network), method)[not method.pretraining :]
    ]
    floors = [parse(text) for text in FLOOR_METHODS if not all(method.whole for method in asked)]
    floors += [parse(text) for text in WHOLE_FLOORS if any(method.whole for method in asked)]
    return list(dict.fromkeys([*floors, *asked]))
