"""Vision transformers for volumes: ViT-S, B and L, and the decoder of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.branches import BranchStream
from brainfm.nets.recompute import recomputed
from brainfm.nets.transformer import TransformerBlock, Turns, started, turns

_CHANNELS_A_HEAD = 48  # of a decoder; eight rates of rotary places on each of three axes, two channels each


class Cubes(nn.Module):
    """Cubes of a scan become tokens, with what else a transformer begins with.

    Args:
        width: E.
        patch_vox: edge of a cube.
        grid: tokens along X, Y, Z for which places are learned; None: places are not learned.
        loose: learned tokens of no place, laid before the others: a class token, then registers.
    """

    def __init__(self, width: int, patch_vox: int, grid: Sequence[int] | None, loose: int) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, width, patch_vox, stride=patch_vox)
        self.places = None if grid is None else nn.Parameter(torch.empty(1, width, *grid))
        self.loose = nn.Parameter(torch.empty(1, loose, width)) if loose else None
        for learned in (self.places, self.loose):
            if learned is not None:
                nn.init.trunc_normal_(learned, std=0.02)

    def forward(self, image: Tensor, gone: Tensor | None = None) -> Tensor:
        """[B, 1, X, Y, Z] -> [B, E, x, y, z]; where ``gone`` (bool [B, 1, x, y, z]), a token is its place alone."""
        tokens: Tensor = self.patches(image)
        if gone is not None:
            tokens = tokens.masked_fill(gone, 0)
        if self.places is None:
            return tokens
        places: Tensor = self.places
        if places.shape[2:] != tokens.shape[2:]:
            places = F.interpolate(places, tokens.shape[2:], mode="trilinear", align_corners=False)
        return tokens + places


class TokenEncoder(Backbone):
    """A transformer over the cubes of a scan.

    Its maps all have one stride: what the blocks of ``taps`` depths, spread evenly, give for the cubes, shallow to
    deep, after one LayerNorm. Cubes that are hidden as a whole are not computed (``features_masked``): in the maps
    they are 0.

    Args:
        config: what build_backbone needs to make this network again.
        patch_vox: edge of a cube, the stride of every map.
        width: E of a token.
        blocks: shallow to deep.
        heads: of each block, which rotary positions need; None: no rotary positions.
        grid, loose: see Cubes. The first loose token is the class token.
        taps: maps.

    Attributes:
        branches: what dropped branches are drawn from in training; whoever trains sets it before each step
            (branches.draw_branches).

    Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); cubes that are left out: He et al. 2022 (arXiv 2111.06377);
    registers: Darcet et al. 2023 (arXiv 2309.16588).
    """

    def __init__(
        self,
        config: dict[str, Any],
        patch_vox: int,
        width: int,
        blocks: Sequence[TransformerBlock],
        *,
        heads: int | None,
        grid: Sequence[int] | None,
        loose: int,
        taps: int,
    ) -> None:
        super().__init__()
        if not 1 <= taps <= len(blocks):
            raise ConfigError(f"backbone.taps={taps}: expected 1 to {len(blocks)}, the depth of {config['name']}")
        self.config, self.widths, self.strides = config, (width,) * taps, (patch_vox,) * taps
        self.embed = Cubes(width, patch_vox, grid, loose)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self._channels_a_head = None if heads is None else width // heads
        self.branches = BranchStream(0, [0])
        self._drops = [block.drop for block in blocks]
        self._loose = loose
        self.cube_vox = patch_vox
        self.class_token, self.usual_pooling = loose > 0, "token" if loose else "mean"
        self._tapped = [len(blocks) * (tap + 1) // taps - 1 for tap in range(taps)]
        started(self)

    def features(self, image: Tensor) -> list[Tensor]:
        """Raises: ConfigError where the image does not fit (see check_patch); ValueError for other than one channel."""
        return self._read(image, None, leave_out=False)[0]

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        """Cubes that are hidden as a whole are left out and 0 in the maps; in the others hidden voxels are 0."""
        return self._read(image, hidden, leave_out=True)[0]

    def summarised(self, image: Tensor, hidden: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Maps and class token, or the mean of the last map without one; hidden cubes are their place alone."""
        maps, loose = self._read(image, hidden, leave_out=False)
        return maps, loose[:, 0] if self._loose else maps[-1].mean((2, 3, 4))

    def blocks(self) -> list[nn.Module]:
        return [self.embed, *self.layers[:-1], nn.ModuleList([self.layers[-1], self.norm])]

    def latents_decoder(self, latent_channels: int, out_channels: int, narrower: int) -> TokenDecoder:
        """Half as wide as the encoder, and of two blocks."""
        heads = max(1, self.widths[0] // (2 * narrower * _CHANNELS_A_HEAD))
        return TokenDecoder(latent_channels, heads * _CHANNELS_A_HEAD, heads, 2, self.strides[0], out_channels)

    def _read(self, image: Tensor, hidden: Tensor | None, leave_out: bool) -> tuple[list[Tensor], Tensor]:
        """The maps, and the loose tokens [B, L, E]."""
        self.check_image(image)
        gone = None
        if hidden is not None:
            image = image.masked_fill(hidden, 0)
            gone = -F.max_pool3d(-hidden.to(torch.float32), self.strides[0]) == 1
        embedded = self.embed(image, None if leave_out else gone)
        grid = embedded.shape[2:]
        tokens = embedded.flatten(2).transpose(1, 2)
        places = self._places(grid, tokens.device)
        chosen = seen = None
        if leave_out and gone is not None:
            chosen, seen = _kept(gone.flatten(1))
            tokens = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
            places = None if places is None else (places[0][chosen][:, None], places[1][chosen][:, None])
        if self.embed.loose is not None:
            tokens = torch.cat([self.embed.loose.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
            seen = None if seen is None else F.pad(seen, (self._loose, 0), value=True)
        kept = None
        if self.training and any(self._drops):
            kept = self.branches.draw(len(tokens), self._drops).to(tokens.device, non_blocking=True)
        tapped = []
        for depth, layer in enumerate(self.layers):
            own = None if kept is None else kept[depth]
            tokens = recomputed(self.checkpointing, layer, tokens, places, seen, own)
            if depth in self._tapped:
                tapped.append(self.norm(tokens))
        maps = [_laid_out(taken[:, self._loose :], chosen, seen, grid, self._loose) for taken in tapped]
        return maps, tapped[-1][:, : self._loose]

    def _places(self, grid: Sequence[int], device: torch.device) -> Turns | None:
        return None if self._channels_a_head is None else turns(grid, self._channels_a_head, device)


def _kept(gone: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of bool [B, N]: the numbers of the tokens that stay, in order [B, N'], and which of these places are real ones
    [B, N'], None where all are."""
    counts = (~gone).sum(1)
    most, least = int(counts.max()), int(counts.min())
    order = gone.to(torch.uint8).sort(dim=1, stable=True).indices[:, : max(1, most)]
    if most == least > 0:
        return order, None
    return order, torch.arange(max(1, most), device=gone.device) < counts.clamp(min=1)[:, None]


def _laid_out(tokens: Tensor, chosen: Tensor | None, seen: Tensor | None, grid: Sequence[int], loose: int) -> Tensor:
    """Tokens [B, N', E] at their places of a map [B, E, x, y, z] that is 0 elsewhere."""
    if chosen is not None:
        if seen is not None:
            tokens = tokens * seen[:, loose:, None]
        whole = tokens.new_zeros(len(tokens), grid[0] * grid[1] * grid[2], tokens.shape[2])
        tokens = whole.scatter(1, chosen[..., None].expand_as(tokens), tokens)
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


class TokenDecoder(nn.Module):
    """Latents of a transformer's tokens to voxels, by a few blocks of attention over all places.

    What a hidden cube's latents lack, the others have to tell. Places are rotary.

    Args:
        latent_channels: of a token.
        width: of a token inside.
        heads: of each block.
        depth: blocks.
        patch_vox: edge of a cube.
        out_channels: C, 1 for an image.

    Source: the light decoder of He et al. 2022 (arXiv 2111.06377).
    """

    def __init__(
        self, latent_channels: int, width: int, heads: int, depth: int, patch_vox: int, out_channels: int = 1
    ) -> None:
        super().__init__()
        self.enter = nn.Linear(latent_channels, width)
        self.layers = nn.ModuleList(TransformerBlock(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels * patch_vox**3)
        self.patch_vox, self.channels_a_head = patch_vox, width // heads
        started(self)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, E, x, y, z] -> [B, C, X, Y, Z]."""
        x, y, z = latents.shape[2:]
        tokens = self.enter(latents.flatten(2).transpose(1, 2))
        places = turns((x, y, z), self.channels_a_head, tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, places)
        p = self.patch_vox
        cubes = self.out(self.norm(tokens)).view(len(latents), x, y, z, -1, p, p, p)
        return cubes.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(latents), -1, x * p, y * p, z * p)


class ViT(TokenEncoder):
    """The vision transformer of Dosovitskiy et al., for cubes, with a class token.

    Args:
        width: channels of a token, a multiple of ``heads``.
        depth: blocks.
        heads: of each block.
        patch_vox: edge of a cube.
        positions: ``learned`` for the grid of ``grid_vox`` and interpolated to others, or ``rotary``.
        grid_vox: edges of the patch that learned places are made for.
        registers: further tokens of no place.
        layer_scale: see TransformerBlock.scale.
        drop_path: share of dropped branches in the last block; it rises from 0 in the first.
        taps: maps, from as many depths.
        name: what build_backbone calls this size; ``vit`` where all is free.

    Raises: ConfigError for impossible values.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_vox: int = 16,
        positions: Literal["learned", "rotary"] = "learned",
        grid_vox: Sequence[int] = (96, 96, 96),
        registers: int = 0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        taps: int = 1,
        name: str = "vit",
    ) -> None:
        options: dict[str, Any] = {
            "patch_vox": patch_vox, "positions": positions, "grid_vox": list(grid_vox), "registers": registers,
            "layer_scale": layer_scale, "drop_path": drop_path, "taps": taps,
        }  # fmt: skip
        sizes = {"width": width, "depth": depth, "heads": heads} if name == "vit" else {}
        check_sizes(width, depth, heads, patch_vox)
        if positions not in ("learned", "rotary"):
            raise ConfigError(f"backbone.positions={positions}: expected learned or rotary")
        if len(grid_vox) != 3 or any(edge < patch_vox or edge % patch_vox for edge in grid_vox):
            raise ConfigError(f"backbone.grid_vox={list(grid_vox)}: expected three multiples of {patch_vox} voxels")
        if registers < 0 or not 0 <= drop_path < 1:
            raise ConfigError(
                f"backbone.registers={registers}, backbone.drop_path={drop_path:g}: expected registers >= 0 and "
                "0 <= drop_path < 1"
            )
        drops = [drop_path * n / max(1, depth - 1) for n in range(depth)]
        super().__init__(
            {"name": name, **sizes, **options},
            patch_vox,
            width,
            [TransformerBlock(width, heads, 4 * width, scale=layer_scale, drop=drop) for drop in drops],
            heads=heads if positions == "rotary" else None,
            grid=[edge // patch_vox for edge in grid_vox] if positions == "learned" else None,
            loose=1 + registers,
            taps=taps,
        )


def check_sizes(width: int, depth: int, heads: int, patch_vox: int) -> None:
    """Raises: ConfigError for a transformer that cannot be."""
    if min(width, depth, heads, patch_vox) < 1 or width % heads or (width // heads) % 2:
        raise ConfigError(
            f"backbone.width={width}, depth={depth}, heads={heads}, patch_vox={patch_vox}: expected whole numbers from "
            "1, and an even number of channels for each head"
        )


vit = ViT  # free sizes, e.g. for a test
vit_s = partial(ViT, 384, 12, 6, name="vit_s")  # 22.9 M parameters with cubes of 16 voxels
vit_b = partial(ViT, 768, 12, 12, name="vit_b")  # 88.4 M
vit_l = partial(ViT, 1024, 24, 16, name="vit_l")  # 306.7 M
