"""A skip decoder that is pre-trained with its encoder: a last map in named parts, and heads that read one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from brainfm.errors import ConfigError
from brainfm.nets.decoders import Pointwise, SkipDecoder


class DenseDecoder(SkipDecoder):
    """Feature maps to voxels; the last map is widened by a 1x1x1 convolution and split into named parts.

    Args:
        widths: channels of the backbone's maps, fine to coarse.
        strides: of the same maps, starting at 1.
        parts: name -> channels, in the order of the channels.

    Attributes:
        config: ``{"parts": ...}``; with a backbone's widths and strides it makes the same decoder.

    Source: SkipDecoder for the climb; the widened last map as in anatomix (Dey et al. 2024, arXiv 2411.02372).
    Raises: ConfigError for a part without a channel.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[int], parts: Mapping[str, int]) -> None:
        if not parts or any(int(size) < 1 for size in parts.values()):
            raise ConfigError(f"parts of a dense decoder {dict(parts)}: expected names with one channel or more each")
        super().__init__(widths, strides, sum(parts.values()))
        self.parts = {name: int(size) for name, size in parts.items()}
        self.config: dict[str, Any] = {"parts": dict(self.parts)}

    def split(self, dense: Tensor) -> dict[str, Tensor]:
        """[B, E, X, Y, Z] as forward gives it -> part -> [B, E_part, X, Y, Z]."""
        return dict(zip(self.parts, dense.split(list(self.parts.values()), dim=1), strict=True))


class DenseHead(Pointwise):
    """A 1x1x1 convolution on one part of a dense decoder's map: [B, E_part, X, Y, Z] -> [B, K, X, Y, Z].

    Args:
        part: the part it reads.
        channels: E_part.
        names: of the K outputs, e.g. the classes of a label map.

    Attributes:
        config: ``{"part": ..., "channels": ..., "names": [...]}``; ``DenseHead(**config)`` makes the same head.
    """

    def __init__(self, part: str, channels: int, names: Sequence[str]) -> None:
        super().__init__(channels, len(names))
        self.part, self.names = part, tuple(names)
        self.config: dict[str, Any] = {"part": part, "channels": channels, "names": list(self.names)}
