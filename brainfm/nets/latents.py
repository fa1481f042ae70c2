"""Latent codes with named parts: what the scan shows of the person, what it shows of the scanner, and the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brainfm import seeds
from brainfm.errors import ConfigError

# exp(+-5) is as far from the prior's deviation of 1 as is of any use; beyond it bfloat16 training can overflow
LOGVAR_RANGE = (-10.0, 10.0)


@dataclass(frozen=True)
class Code:
    """One named part of a latent, float32.

    Attributes:
        mean: [B, E, X, Y, Z] on the coarsest grid.
        logvar: the same shape, or None where the part is not variational.
    """

    mean: Tensor
    logvar: Tensor | None = None


def part_channels(parts: Mapping[str, float], channels: int) -> dict[str, int]:
    """Channels of each part; they sum to ``channels`` whatever the fractions round to.

    Raises: ConfigError where fractions do not sum to 1 or leave a part without a channel.
    """
    total = sum(parts.values())
    if not parts or abs(total - 1) > 1e-6 or any(f <= 0 for f in parts.values()):
        raise ConfigError(f"latent parts {dict(parts)}: expected fractions above 0 that sum to 1, found {total:g}")
    if not all(name.isidentifier() for name in parts):
        raise ConfigError(f"latent parts {', '.join(parts)}: expected names of letters, digits and underscores")
    edges, reached = [0], 0.0
    for fraction in parts.values():
        reached += fraction
        edges.append(round(reached * channels))
    sizes = {name: stop - start for name, start, stop in zip(parts, edges[:-1], edges[1:], strict=True)}
    if min(sizes.values()) < 1:
        raise ConfigError(f"latent parts {dict(parts)} of {channels} channels: one part is left without a channel")
    return sizes


class Latents(nn.Module):
    """The maps of all levels, averaged onto the coarsest grid, seen through one 1x1x1 convolution per part.

    Args:
        widths: channels of the maps, fine to coarse.
        parts: name -> fraction of the latent channels.
        channels: of all parts together.
        variational: whether each part also has a log variance, clamped to LOGVAR_RANGE.
        logvar_start: where the log variances begin; None leaves them to the layers' own start, about 0: noise of a
            deviation of 1 beside means that at first deviate by a quarter of that.

    Source: github.com/jbanusco/fomo25 at de35782, src/models/networks/mmunetvae.py (two halves of 256 channels).
    Differs: any number of named parts; the log variance is clamped (there it is not).
    """

    def __init__(
        self,
        widths: Sequence[int],
        parts: Mapping[str, float],
        channels: int = 512,
        variational: bool = False,
        logvar_start: float | None = None,
    ) -> None:
        super().__init__()
        self.sizes = part_channels(parts, channels)
        self.channels = channels
        self.variational = variational
        self.mean = nn.ModuleDict({name: nn.Conv3d(sum(widths), size, 1) for name, size in self.sizes.items()})
        logvar = {name: nn.Conv3d(sum(widths), size, 1) for name, size in self.sizes.items()} if variational else {}
        self.logvar = nn.ModuleDict(logvar)
        if logvar_start is not None:
            if not LOGVAR_RANGE[0] <= logvar_start <= LOGVAR_RANGE[1]:
                low, high = LOGVAR_RANGE
                raise ConfigError(f"objective.logvar_start={logvar_start}: expected {low:g} to {high:g}, or null")
            for conv in logvar.values():
                nn.init.constant_(conv.bias, logvar_start)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Code]:
        """Maps [B, E, X/s, Y/s, Z/s] -> name -> Code on the coarsest grid."""
        grid = maps[-1].shape[2:]
        pooled = torch.cat([self.averaged(m, grid) for m in maps], dim=1)
        codes = {}
        for name in self.sizes:
            logvar = self.logvar[name](pooled).float().clamp(*LOGVAR_RANGE) if self.variational else None
            codes[name] = Code(self.mean[name](pooled).float(), logvar)
        return codes

    def averaged(self, features: Tensor, grid: Sequence[int]) -> Tensor:
        """[B, E, X, Y, Z] -> [B, E, *grid] by block means; unlike torch's pooling their gradient repeats on a GPU."""
        batch, channels, *shape = features.shape
        if list(shape) == list(grid):
            return features
        x, y, z = (edge // cells for edge, cells in zip(shape, grid, strict=True))
        blocks = features.reshape(batch, channels, grid[0], x, grid[1], y, grid[2], z)
        return blocks.mean(dim=(3, 5, 7))

    def sample(self, codes: Mapping[str, Code], noise: Tensor | None) -> dict[str, Tensor]:
        """A value of each part; the mean where there is no noise or nothing is variational.

        Args:
            codes: as forward gives them.
            noise: standard normal [B, channels, X, Y, Z] on the coarsest grid, e.g. from draw_noise.

        Source: Kingma & Welling 2014 (arXiv 1312.6114), section 2.4.
        """
        if noise is None:
            return {name: code.mean for name, code in codes.items()}
        values = {}
        for (name, code), draw in zip(codes.items(), noise.split(list(self.sizes.values()), dim=1), strict=True):
            values[name] = code.mean if code.logvar is None else code.mean + torch.exp(0.5 * code.logvar) * draw
        return values


def draw_noise(
    samples: Tensor, shape: Sequence[int], seed: int, purpose: str, device: torch.device | None = None
) -> Tensor:
    """Standard normal float32 [B, *shape].

    Row i is a function of (seed, purpose, samples[i]) and of the kind of device alone: a sample meets the same noise
    in any batch. The numbers are drawn on the device, because a GPU would have to wait for a CPU's.

    Args:
        samples: [B] int64, the samples' numbers.
        device: where the noise is wanted; by default where the samples are.
    """
    device = device or samples.device
    rows = [
        torch.randn(tuple(shape), generator=seeds.torch_stream(seed, purpose, number, device=device), device=device)
        for number in samples.tolist()
    ]
    return torch.stack(rows) if rows else torch.empty((0, *shape), device=device)
