"""Contenders of a comparison: a network with what it is pre-trained by, the network untrained, or region volumes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainfm.errors import ConfigError
from brainfm.settings import shown
from brainfm.training.settings import PretrainSettings

UNTRAINED, VOLUMES = "untrained", "volumes"


@dataclass(frozen=True)
class ModelName:
    """A model as it is asked for; of volumes both are empty.

    Attributes:
        backbone: an option of ``backbone=``.
        objective: an option of ``objective=``, or untrained.
    """

    backbone: str
    objective: str

    @property
    def name(self) -> str:
        return f"{self.backbone}:{self.objective}" if self.backbone else VOLUMES


@dataclass(frozen=True)
class Contender:
    """A model of the comparison.

    Attributes:
        network: configuration of the encoder; None of volumes.
        pretrain: with the seed and the folder of no run yet; None where nothing is pre-trained.
    """

    name: str
    network: Mapping[str, Any] | None = None
    pretrain: PretrainSettings | None = None

    @property
    def slug(self) -> str:
        """In names of files."""
        return self.name.replace(":", "-")

    def folder(self, out: Path) -> Path:
        """Of its pre-trainings."""
        return out / "pretrained" / self.slug


def pairs_of(models: Sequence[str], backbones: Collection[str], objectives: Collection[str]) -> list[ModelName]:
    """The models in their order, ``untrained`` as one for each network of the others.

    Raises: ConfigError for a name that is none, or is there twice.
    """
    found: list[ModelName] = []
    for name in models:
        backbone, colon, objective = name.partition(":")
        if name in (UNTRAINED, VOLUMES):
            found.append(ModelName("", name))
        elif not colon or backbone not in backbones or objective not in {*objectives, UNTRAINED}:
            raise ConfigError(
                f"models={shown(models)}: found {name!r}, expected BACKBONE:OBJECTIVE, BACKBONE:{UNTRAINED}, "
                f"{UNTRAINED} or {VOLUMES}, with a backbone of {', '.join(sorted(backbones))} and an objective of "
                f"{', '.join(sorted(objectives))}"
            )
        else:
            found.append(ModelName(backbone, objective))
    networks = list(dict.fromkeys(pair.backbone for pair in found if pair.backbone))
    if ModelName("", UNTRAINED) in found and not networks:
        raise ConfigError(f"models={shown(models)}: untrained alone names no network, expected e.g. unet_s:untrained")
    twins = [ModelName(backbone, UNTRAINED) for backbone in networks]
    whole = [pair for one in found for pair in (twins if one == ModelName("", UNTRAINED) else [one])]
    return list(dict.fromkeys(whole))
