"""The objective: what every self-supervised question offers to the trainer."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.nets.backbone import Backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import DenseDecoder
from brainfm.nets.latents import Latents
from brainfm.objectives.settings import OBJECTIVES, ObjectiveSettings, settings_of
from brainfm.specs import ViewSpec


class Objective(nn.Module, ABC):
    """A question put to a backbone, with whatever networks it needs beside it.

    Attributes:
        name: what build_objective calls it.
        views: what the loader must supply.
        config: its settings as a file holds them; with the name they make the same objective again.
        seed: of the draws; each is a function of (seed, purpose, the sample's number).
        latents: between backbone and whatever answers; None where nothing lies between.
        dense: a skip decoder that is trained with the backbone and travels in its file; None for most.
        heads: what reads the dense decoder's parts and travels with it, by name; None for most.
    """

    name: ClassVar[str]
    latents: Latents | None
    dense: DenseDecoder | None
    heads: nn.ModuleDict | None

    def __init__(self, backbone: Backbone, views: ViewSpec, seed: int, settings: ObjectiveSettings) -> None:
        super().__init__()
        backbone.check_patch(views.patch_vox)
        self.backbone = backbone
        self.views = views
        self.seed = seed
        self.config = settings.config
        self.latents = self.dense = self.heads = None  # not on the class, where None would hide a module of that name

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> Terms:
        """The loss of a batch; ``progress`` in [0, 1] through the run drives every schedule."""

    @abstractmethod
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Images [B, 1, X, Y, Z] float32 for the monitor, without gradients and without noise."""

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        """The latent of whole, unmasked scans without noise: [B, 1, X, Y, Z] -> part -> [B, E, x, y, z] float32.

        What probes and the embedding read; parts are named as in the objective's configuration. Empty without latents.
        """
        if self.latents is None:
            return {}
        return {name: code.mean for name, code in self.latents(self.backbone.features(image)).items()}

    def after_step(self, progress: float) -> None:
        """Called after each step of the optimiser: a teacher moves here; most objectives have none."""

    def state_for_file(self) -> dict[str, Tensor]:
        """The tensors that are neither the backbone's nor of what travels beside it, for the backbone file."""
        apart = ("backbone.", "dense.", "heads.")
        return {name: value for name, value in self.state_dict().items() if not name.startswith(apart)}


def build_objective(
    name: str, backbone: Backbone, *, patch_vox: tuple[int, int, int], seed: int, **config: Any
) -> Objective:
    """The objective of this name, with these settings as a file holds them.

    Raises: ConfigError where the name or a key is unknown, a value impossible, or the patch does not fit.
    """
    return make_objective(settings_of(name, config), backbone, patch_vox=patch_vox, seed=seed)


def make_objective(
    settings: ObjectiveSettings, backbone: Backbone, *, patch_vox: tuple[int, int, int], seed: int
) -> Objective:
    """The objective around ``backbone``, which it owns from then on, with the layers of a CPU.

    Raises: ConfigError where the patch does not fit.
    """
    module, kind = OBJECTIVES[settings.name][1].split(":")
    find = getattr(importlib.import_module(module), kind)
    made: Objective = swap_in(find(backbone, settings, patch_vox=patch_vox, seed=seed))
    return made
