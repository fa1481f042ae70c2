"""The backbone: what every pre-trained network offers, whatever it is made of."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.recompute import set_checkpointing
from brainfm.settings import one_of, shown, words

# name -> the module that holds a function of that name; imported when it is built, so an unused family costs nothing
BACKBONES: dict[str, str] = {
    "adapted": "brainfm.nets.adapter",
    "resenc": "brainfm.nets.resenc",
    "resenc_l": "brainfm.nets.resenc",
    "resenc_s": "brainfm.nets.resenc",
    "primus": "brainfm.nets.primus",
    "primus_b": "brainfm.nets.primus",
    "primus_l": "brainfm.nets.primus",
    "primus_m": "brainfm.nets.primus",
    "primus_s": "brainfm.nets.primus",
    "unet": "brainfm.nets.unet",
    "unet_b": "brainfm.nets.unet",
    "unet_l": "brainfm.nets.unet",
    "unet_s": "brainfm.nets.unet",
    "unet_tiny": "brainfm.nets.unet",
    "vit": "brainfm.nets.vit",
    "vit_b": "brainfm.nets.vit",
    "vit_l": "brainfm.nets.vit",
    "vit_s": "brainfm.nets.vit",
}


class Backbone(nn.Module, ABC):
    """A network that reads one channel and gives feature maps, fine to coarse.

    Attributes:
        widths: channels E of each map.
        strides: voxels of the image per voxel of each map, each a multiple of the one before; a transformer's maps may
            all have one stride. The first need not be 1: decoders lead on to the voxels (nets/decoders.decoder_for).
        cube_vox: edge of the cubes that must be hidden as a whole to be left out of the computation; 1: any voxels may.
        class_token: whether ``summarised`` gives a vector of the network's own, beside the maps.
        usual_pooling: how one vector is made of a head where nobody says (``task.pooling``).
        config: ``{"name": ..., ...}``; ``build_backbone(**config)`` makes the same network with fresh weights.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]
    config: dict[str, Any]
    cube_vox: int = 1
    class_token: bool = False
    usual_pooling: str = "attention"

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed a second time in the backward pass instead of keeping their maps. Off at first;
        a switch of the training, no part of ``config``."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        for child in self.children():
            set_checkpointing(child, on)

    _checkpointing: bool = False

    @abstractmethod
    def features(self, image: Tensor) -> list[Tensor]:
        """[B, 1, X, Y, Z] -> one map [B, E, X/s, Y/s, Z/s] per width E and stride s."""

    @abstractmethod
    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        """The same without the information of the voxels where ``hidden`` (bool [B, 1, X, Y, Z]) is True."""

    def summarised(self, image: Tensor, hidden: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The maps of what ``hidden`` leaves, and one vector [B, E] for the whole image: the mean of the last map.

        Where a map can answer for hidden places, it has an answer there, unlike with ``features_masked``.
        """
        maps = self.features(image) if hidden is None else self.features_masked(image, hidden)
        return maps, maps[-1].mean((2, 3, 4))

    def latents_decoder(self, latent_channels: int, out_channels: int, narrower: int) -> nn.Module | None:
        """A fresh decoder [B, E, x, y, z] -> [B, C, X, Y, Z] of latents on the coarsest grid, where the usual one of
        convolutions (nets/decoders.LightDecoder) does not suit this network; None: it does."""
        return None

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Every parameter in exactly one block, the one nearest to the image first: for freezing and rate decay."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.features(image)

    def check_image(self, image: Tensor) -> None:
        """Raises: ConfigError where the image does not fit (see check_patch); ValueError for other than one channel."""
        if image.ndim != 5 or image.shape[1] != 1:
            raise ValueError(f"a backbone reads [B, 1, X, Y, Z], not {tuple(image.shape)}; pass contrasts one by one")
        self.check_patch(image.shape[2:])

    def check_patch(self, patch_vox: Sequence[int]) -> None:
        """Raises: ConfigError where a patch of this size (X, Y, Z) cannot pass the network."""
        stride = self.strides[-1]
        edges = tuple(int(p) for p in patch_vox)
        if len(edges) != 3 or any(p < stride or p % stride for p in edges) or max(edges) < 2 * stride:
            raise ConfigError(
                f"patch_vox={edges}: {self.config['name']} needs three multiples of {stride} voxels, "
                f"at least one of them {2 * stride} or more (instance norm cannot work on a map of one voxel)"
            )


def build_backbone(name: str, **settings: Any) -> Backbone:
    """The backbone of this name with fresh weights.

    Raises: ConfigError where the name or a setting is unknown, or a value of another kind or impossible.
    """
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}, expected one of {', '.join(sorted(BACKBONES))}")
    build = getattr(importlib.import_module(BACKBONES[name]), name)
    legal = {key: value for key, value in inspect.signature(build, eval_str=True).parameters.items() if key != "name"}
    unknown = sorted(set(settings) - set(legal))
    if unknown:
        raise ConfigError(
            f"unknown key {', '.join(unknown)} for backbone {name}, expected {', '.join(legal) if legal else 'none'}"
        )
    missing = [k for k, p in legal.items() if p.default is p.empty and k not in settings]
    if missing:
        raise ConfigError(f"backbone {name} needs the key {', '.join(missing)}")
    wrong = [key for key, value in settings.items() if not _fits(legal[key].annotation, value)]
    if wrong:
        expected = one_of(words(legal[wrong[0]].annotation))
        raise ConfigError(f"backbone.{wrong[0]}={shown(settings[wrong[0]])}: expected {expected}")
    return build(**settings)


def _fits(hint: Any, value: Any) -> bool:
    """Whether a plain value is of the kind that a builder's annotation names."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(each, value) for each in inner)
    if kind is Literal:
        return value in inner
    if kind in (tuple, Sequence):
        alike = kind is Sequence or Ellipsis in inner
        hints = [inner[0]] * len(value) if alike and isinstance(value, (list, tuple)) else inner
        fitting = isinstance(value, (list, tuple)) and len(value) == len(hints)
        return fitting and all(_fits(each, one) for each, one in zip(hints, value))
    if kind is Mapping:
        return isinstance(value, Mapping)
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return hint in (Any, inspect.Parameter.empty) or not isinstance(hint, type) or isinstance(value, hint)
