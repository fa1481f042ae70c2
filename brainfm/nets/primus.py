"""Primus, the transformer of the SSL3D challenge: encoder and light decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.decoders import Upsample
from brainfm.nets.transformer import TransformerBlock
from brainfm.nets.vit import TokenEncoder, check_sizes

_DECODER_LEVELS = 3  # of 2, so cubes of 8 voxels


class Primus(TokenEncoder):
    """A transformer with rotary and learned places, gated feed-forward layers and no class token.

    Args:
        width: channels of a token, a multiple of ``heads``.
        depth: blocks.
        heads: of each block.
        patch_vox: edge of a cube.
        grid_vox: edges of the patch that learned places are made for; they are interpolated to others.
        layer_scale: see TransformerBlock.scale.
        drop_path: share of dropped branches in every block.
        taps: maps, from as many depths.
        name: what build_backbone calls this size; ``primus`` where all is free.

    Source: Wald et al. 2025 (arXiv 2503.01835); blocks of EVA-02, Fang et al. 2023 (arXiv 2303.11331).
    Raises: ConfigError for impossible values.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        patch_vox: int = 8,
        grid_vox: Sequence[int] = (96, 96, 96),
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
        taps: int = 1,
        name: str = "primus",
    ) -> None:
        sizes = {"width": width, "depth": depth, "heads": heads} if name == "primus" else {}
        check_sizes(width, depth, heads, patch_vox)
        if len(grid_vox) != 3 or any(edge < patch_vox or edge % patch_vox for edge in grid_vox):
            raise ConfigError(f"backbone.grid_vox={list(grid_vox)}: expected three multiples of {patch_vox} voxels")
        if not 0 <= drop_path < 1:
            raise ConfigError(f"backbone.drop_path={drop_path:g}: expected 0 <= drop_path < 1")
        hidden = int(width * 8 / 3)
        options = {
            "patch_vox": patch_vox, "grid_vox": list(grid_vox), "layer_scale": layer_scale, "drop_path": drop_path,
            "taps": taps,
        }  # fmt: skip
        super().__init__(
            {"name": name, **sizes, **options},
            patch_vox,
            width,
            [TransformerBlock(width, heads, hidden, True, layer_scale, drop_path) for _ in range(depth)],
            heads=heads,
            grid=[edge // patch_vox for edge in grid_vox],
            loose=0,
            taps=taps,
        )


class PatchDecoder(nn.Module):
    """Primus' own way back to the voxels: transposed convolutions, each but the last with LayerNorm and GELU.

    For weights that travel (nets/exchange); tasks of brainfm use SkipDecoder, whose convolutions look at neighbours.

    Args:
        width: E of the tokens, whose cubes have 8 voxels along an edge.
        out_channels: K.

    Source: Wald et al. 2025 (arXiv 2503.01835).
    """

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        shrink = (width / (2 * out_channels)) ** (1 / _DECODER_LEVELS)
        inside = [max(8, round(width / shrink**level / 8) * 8) for level in range(1, _DECODER_LEVELS)]
        self.ups = nn.ModuleList(Upsample(*pair, 2) for pair in pairwise([width, *inside]))
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=1e-6) for channels in inside)
        self.out = Upsample(inside[-1], out_channels, 2)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The last of the maps, [B, E, x, y, z] -> [B, K, 8 x, 8 y, 8 z]."""
        features = maps[-1]
        for up, norm in zip(self.ups, self.norms, strict=True):
            features = F.gelu(norm(up(features).movedim(1, -1)).movedim(-1, 1))
        answer: Tensor = self.out(features)
        return answer


primus = Primus  # free sizes, e.g. for a test
primus_s = partial(Primus, 396, 12, 6, name="primus_s")  # 21.7 M parameters for patches of 96 voxels
primus_b = partial(Primus, 792, 12, 12, name="primus_b")
primus_m = partial(Primus, 864, 16, 12, name="primus_m")
primus_l = partial(Primus, 1056, 24, 16, name="primus_l")
