"""Any network as a backbone: another package's, or one's own module, by the names of the parts whose maps are read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone


class _Enough(Exception):  # no error: the last map is there, what follows is not computed
    pass


class Adapted(Backbone):
    """A network of somebody else that gives the maps of some of its parts.

    It is run once when it is built, on a small image, to see which maps come out; parts that no map needs (a decoder,
    a classifier) are dropped, and nothing behind the last map is computed.

    Args:
        network: ``package.module:Class``, a class of torch modules that reads [B, 1, X, Y, Z].
        maps: names of its parts, as in ``named_modules()``, fine to coarse; each answers [B, E, x, y, z], or tokens
            [B, N, E] of a grid whose axes are the image's, the last axis fastest, which ``tokens_vox`` tells apart.
        settings: keyword arguments of the class.
        tokens_vox: edge of the cube that a token stands for, where a map is one of tokens; other tokens (a class token)
            come first and are left out.
        probe_vox: edges of the image it is tried on: multiples of all strides.

    Source: none; for MONAI's networks see docs/pretraining.md.
    Raises: ConfigError where there is no such class, part or map.
    """

    def __init__(
        self,
        network: str,
        maps: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        tokens_vox: int | None = None,
        probe_vox: Sequence[int] = (64, 64, 64),
    ) -> None:
        super().__init__()
        self.config = {
            "name": "adapted", "network": network, "maps": list(maps), "settings": dict(settings or {}),
            "tokens_vox": tokens_vox, "probe_vox": list(probe_vox),
        }  # fmt: skip
        self.network = _built(network, dict(settings or {}))
        self._names, self._tokens_vox = tuple(maps), tokens_vox
        parts = dict(self.network.named_modules())
        missing = [name for name in maps if name not in parts]
        if missing or not maps or len(set(maps)) < len(maps):
            near = sorted(name for name in parts if name and name.count(".") <= 1)
            raise ConfigError(
                f"backbone.maps={', '.join(maps)}: expected names of different parts of {network}, "
                f"such as {', '.join(near[:12])}"
            )
        self._parts = _Held(parts[name] for name in maps)
        self.widths, self.strides = self._tried(tuple(probe_vox))

    def features(self, image: Tensor) -> list[Tensor]:
        """Raises: ConfigError where the image does not fit (see check_patch); ValueError for other than one channel."""
        self.check_image(image)
        return self._read(image)

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        """Hidden voxels become 0, the mean of a standardised scan's foreground."""
        return self.features(image.masked_fill(hidden, 0))

    def blocks(self) -> list[nn.Module]:
        """What the first map needs, what the second needs beside it, and so on."""
        by_name = dict(self.network.named_parameters())
        return [nn.ParameterList([by_name[name] for name in names]) for names in self._of_block]

    def _read(self, image: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def keep(place: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(part: nn.Module, inputs: Any, output: Any) -> None:
                found[place] = _first_tensor(output)
                if len(found) == len(self._names):
                    raise _Enough

            return hook

        hooks = [part.register_forward_hook(keep(place)) for place, part in enumerate(self._parts)]
        try:
            self.network(image)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        if len(found) < len(self._names):
            silent = [name for place, name in enumerate(self._names) if place not in found]
            raise ConfigError(f"backbone.maps: {', '.join(silent)} is not run in a forward pass of the network")
        return [self._laid_out(found[place], image.shape[2:]) for place in range(len(self._names))]

    def _laid_out(self, output: Tensor, size: Sequence[int]) -> Tensor:
        if output.ndim == 3 and self._tokens_vox:
            grid = [edge // self._tokens_vox for edge in size]
            return output[:, -grid[0] * grid[1] * grid[2] :].transpose(1, 2).unflatten(2, grid)
        return output

    def _tried(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths and strides; the parts that no map needs are dropped."""
        if len(size) != 3 or min(size) < 1 or (self._tokens_vox is not None and self._tokens_vox < 1):
            raise ConfigError(
                f"backbone.probe_vox={list(size)}, tokens_vox={self._tokens_vox}: expected three edges and one from 1"
            )
        try:
            maps = self._read(torch.zeros(1, 1, *size))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ConfigError(
                f"backbone.network: it does not read [1, 1, {', '.join(map(str, size))}]: {str(error).splitlines()[0]}"
            ) from None
        widths, strides = [], []
        for name, found in zip(self._names, maps):
            stride = size[0] // found.shape[2] if found.ndim == 5 else 0
            if found.ndim != 5 or [n * stride for n in found.shape[2:]] != list(size):
                raise ConfigError(
                    f"backbone.maps: {name} answers {list(found.shape)} for an image of {list(size)} voxels, expected "
                    "[B, E, x, y, z] on a grid that divides it, or tokens and tokens_vox"
                )
            widths.append(found.shape[1])
            strides.append(stride)
        if any(coarse % fine for fine, coarse in pairwise(strides)):
            raise ConfigError(f"backbone.maps: strides {strides}, expected fine to coarse, each dividing the next")
        self._of_block = self._needed(maps)
        _drop(self.network, {id(p) for block in self.blocks() for p in block.parameters()})
        return tuple(widths), tuple(strides)

    def _needed(self, maps: list[Tensor]) -> list[list[str]]:
        """Names of the parameters that each map needs and none before it does."""
        named, seen, found = dict(self.network.named_parameters()), set(), []
        for one in maps:
            grads = torch.autograd.grad(one.sum(), list(named.values()), retain_graph=True, allow_unused=True)
            names = [name for name, grad in zip(named, grads) if grad is not None and name not in seen]
            seen |= set(names)
            found.append(names)
        return [names for names in found if names]


class _Held(tuple):
    """Modules that are not this module's children a second time."""


def adapted(
    network: str,
    maps: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    tokens_vox: int | None = None,
    probe_vox: Sequence[int] = (64, 64, 64),
) -> Adapted:
    """See Adapted."""
    return Adapted(network, maps, settings, tokens_vox, probe_vox)


def _built(network: str, settings: dict[str, Any]) -> nn.Module:
    module, _, name = network.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"backbone.network={network}: expected package.module:Class that is installed ({error})"
        ) from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):  # nothing else is ever called
        raise ConfigError(f"backbone.network={network}: expected a class of torch modules")
    try:
        return found(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"backbone.settings of {network}: {str(error).splitlines()[0]}") from None


def _first_tensor(output: Any) -> Tensor:
    while isinstance(output, (list, tuple)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ConfigError(f"backbone.maps: a part answers {type(output).__name__}, expected a tensor")
    return output


def _drop(module: nn.Module, needed: set[int]) -> None:
    """Puts nothing in the place of every part whose parameters are all superfluous; a part may have several places."""
    for name, child in list(module.named_children()):
        own = {id(p) for p in child.parameters()}
        if own and not needed & own:
            setattr(module, name, nn.Identity())
        elif own:
            _drop(child, needed)
