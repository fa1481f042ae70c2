"""Transformer blocks for volumes: attention with rotary positions in three axes, and two feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, E] -> [B, N, E]. No matrix of N x N numbers is kept.

    Keys have no bias: it would add one number to all scores of a query, which softmax ignores.

    Args:
        width: E.
        heads: into which E is split.
        norm: whether a LayerNorm stands between the heads and the last layer.

    Source: Vaswani et al. 2017 (arXiv 1706.03762); rotary positions: Su et al. 2021 (arXiv 2104.09864).
    """

    def __init__(self, width: int, heads: int, norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.norm: nn.Module = nn.LayerNorm(width) if norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, turns: Turns | None = None, seen: Tensor | None = None) -> Tensor:
        """``turns``: see ``turns``; of the last tokens only, where there are fewer. ``seen``: bool [B, N], which tokens
        may be looked at; None: all."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        mixed = F.linear(tokens, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4)
        if turns is not None:
            queries, keys = turned(queries, turns), turned(keys, turns)
        mask = None if seen is None else seen[:, None, None]
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        joined: Tensor = self.out(self.norm(found.transpose(1, 2).flatten(2)))
        return joined


class FeedForward(nn.Sequential):
    """Two linear layers with GELU between: [B, N, E] -> [B, N, E]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class GatedFeedForward(nn.Module):
    """Three linear layers, one of them gating another: [B, N, E] -> [B, N, E].

    Source: SwiGLU of Shazeer 2020 (arXiv 2002.05202), with the LayerNorm of EVA-02 (arXiv 2303.11331).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        answer: Tensor = self.out(self.norm(F.silu(self.gate(tokens)) * self.value(tokens)))
        return answer


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward layer, each on a LayerNorm and beside a shortcut: [B, N, E] -> [B, N, E].

    Args:
        width: E.
        heads: of the attention.
        hidden: of the feed-forward layer.
        gated: SwiGLU, and a LayerNorm inside the attention, as EVA-02 has them.
        scale: what each branch is multiplied by at first, a number a channel that is learned; None: nothing is learned.
        drop: share of the samples whose branch is left out in training, where the caller says which (``kept``).

    Source: Dosovitskiy et al. 2020 (arXiv 2010.11929); layer scale: Touvron et al. 2021 (arXiv 2103.17239); dropped
    branches: Huang et al. 2016 (arXiv 1603.09382).
    """

    def __init__(
        self, width: int, heads: int, hidden: int, gated: bool = False, scale: float | None = None, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.norm_attend, self.norm_think = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = Attention(width, heads, norm=gated)
        self.think: nn.Module = GatedFeedForward(width, hidden) if gated else FeedForward(width, hidden)
        self.scale_attend = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.scale_think = None if scale is None else nn.Parameter(torch.full((width,), float(scale)))
        self.drop = drop

    def forward(
        self, tokens: Tensor, turns: Turns | None = None, seen: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """See Attention. ``kept``: bool [2, B], which samples' branches stay (BranchStream.draw); None: all."""
        attend, think = (None, None) if kept is None else kept
        attended = self.attend(self.norm_attend(tokens), turns, seen)
        tokens = tokens + self._weighed(attended, self.scale_attend, attend)
        return tokens + self._weighed(self.think(self.norm_think(tokens)), self.scale_think, think)

    def _weighed(self, branch: Tensor, scale: Tensor | None, kept: Tensor | None) -> Tensor:
        branch = branch if scale is None else branch * scale
        return branch if kept is None else branch * kept[:, None, None] / (1 - self.drop)


Turns = tuple[Tensor, Tensor]  # sine and cosine [N, C] of the angle by which each pair of a head's channels is turned


def turns(grid: Sequence[int], channels: int, device: torch.device, least: float = 1e-4) -> Turns:
    """Rotary positions of the tokens of a grid, the last axis fastest: sine and cosine [N, C], float32.

    The first third of a head's channels turns with the first axis, and so on; pairs of neighbouring channels share an
    angle of the position times a rate from 1 down to nearly ``least``. Channels that three axes cannot share evenly
    stay as they are.

    Args:
        grid: tokens along X, Y, Z.
        channels: of one head, C in all that is given back.

    Source: Su et al. 2021 (arXiv 2104.09864), an axis at a time as in EVA-02 (arXiv 2303.11331).
    """
    rates = channels // 6
    steps = torch.arange(rates, dtype=torch.float32, device=device) / max(1, rates)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float32, device=device) for n in grid), indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * least**steps for place in places], dim=1)
    angles = F.pad(angles.repeat_interleave(2, dim=1), (0, channels - 6 * rates))
    return angles.sin(), angles.cos()


def turned(heads: Tensor, by: Turns) -> Tensor:
    """Turns each pair of channels of [B, H, N, C]; of the last N' tokens where ``by`` has N' < N: a class token and
    registers have no place. ``by`` may differ by sample: [B, 1, N', C]."""
    sine, cosine = (turn.to(heads.dtype) for turn in by)
    placeless, placed = heads.split([heads.shape[2] - sine.shape[-2], sine.shape[-2]], dim=2)
    across = torch.stack([-placed[..., 1::2], placed[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([placeless, placed * cosine + across * sine], dim=2)


def started(network: nn.Module, deviation: float = 0.02) -> None:
    """Linear layers of a transformer begin with small normal weights and no bias, LayerNorms as torch makes them."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
