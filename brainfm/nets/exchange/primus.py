"""Weights of Primus, nnssl's transformer: names of its tensors there, their token grid, and the order of its axes.

Primus cuts a scan into tokens of 8 x 8 x 8 voxels, adds a learnt position to each (``eva.pos_embed``) and turns queries
and keys by three fixed rotary angles, one for each axis of the grid, in three equal groups of a head's channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.errors import WeightsError

TOKEN_VOX = 8
# width -> channels of a head, for the published sizes S, B, M and L
HEAD_CHANNELS = {396: 66, 792: 66, 864: 72, 1056: 66}
# what stands before the names in files of contrastive questions
_INNER = "encoder."
_TURNED = re.compile(r"(?:encoder\.)?eva\.blocks\.\d+\.attn\.(?:q_proj\.(?:weight|bias)|k_proj\.weight)")


def is_primus(names: Iterable[str]) -> bool:
    """Whether these are tensors of a Primus."""
    return any(name.removeprefix(_INNER).startswith("eva.blocks.") for name in names)


def refusal(tensors: Mapping[str, Tensor]) -> str:
    """The sentence for a Primus, which has no network here yet, with what its tensors say of it."""
    blocks = {found[1] for name in tensors if (found := re.search(r"eva\.blocks\.(\d+)\.", name))}
    position = tensors.get("eva.pos_embed", tensors.get("encoder.eva.pos_embed"))
    seen = f" of {position.shape[2]} channels, {position.shape[1]} tokens" if position is not None else ""
    return (
        f"a Primus{seen} and {len(blocks)} blocks; this brainfm has no network of that kind, expected a residual U-Net"
    )


def token_grid(
    position: Tensor, patch_vox: Sequence[int] | None = None, token_vox: int = TOKEN_VOX
) -> tuple[int, int, int]:
    """Tokens along each axis of the grid that learnt positions [1, N, E] were learnt on.

    The positions decide: a plan may name a patch that the network never saw. It counts where its tokens are N, else the
    grid is the cube of N tokens.

    Raises: WeightsError where N is no cube and no patch explains it.
    """
    count = int(position.shape[1])
    if patch_vox is not None and len(patch_vox) == 3:
        x, y, z = (int(edge) // token_vox for edge in patch_vox)
        if x * y * z == count:
            return x, y, z
    edge = round(count ** (1 / 3))
    if edge**3 != count:
        of_plan = f" nor the grid of a patch of {list(patch_vox)} voxels" if patch_vox is not None else ""
        raise WeightsError(f"pos_embed holds {count} tokens, which is no cube{of_plan}; expected the grid's patch")
    return edge, edge, edge


def head_channels(position: Tensor) -> int:
    """Channels of an attention head, which no tensor's shape tells. Raises: WeightsError for an unpublished width."""
    width = int(position.shape[2])
    if width not in HEAD_CHANNELS:
        known = ", ".join(map(str, HEAD_CHANNELS))
        raise WeightsError(f"pos_embed has {width} channels, expected one of {known}; heads are not told by shapes")
    return HEAD_CHANNELS[width]


def with_axes_swapped(
    tensors: Mapping[str, Tensor], grid: tuple[int, int, int], head: int, axes: tuple[int, int] = (0, 1)
) -> dict[str, Tensor]:
    """The same network for a token sequence that runs through the grid with two axes exchanged.

    nnssl lays tokens out as (second, first, third) axis, and so did dynamic-network-architectures until June 2025;
    since then it lays them out in the order of the axes. Released weights of MAE, Volume Fusion, Models Genesis and of
    the contrastive questions need this once to work in today's network; SimMIM's do not.

    Learnt positions are exchanged on the grid, and queries and keys exchange the channels that the two axes turn, so
    that every token meets every other at the angles it was trained at. Values are copied, none is computed.

    Args:
        tensors: names as in the file, with or without ``encoder.``.
        grid: tokens along the axes of the grid as the file has it (token_grid).
        head: channels of a head (head_channels).
        axes: which two.

    Raises: WeightsError where a head's channels are no three equal groups.
    """
    if head % 6:
        raise WeightsError(f"heads of {head} channels: expected three equal groups of pairs, one for each axis")
    changed = dict(tensors)
    for name, value in tensors.items():
        if name.removeprefix(_INNER) == "eva.pos_embed":
            map_ = value.reshape(value.shape[0], *grid, value.shape[2])
            changed[name] = map_.transpose(1 + axes[0], 1 + axes[1]).reshape(value.shape).contiguous()
        elif _TURNED.fullmatch(name):
            groups = value.reshape(-1, 3, head // 3, *value.shape[1:])
            order = [0, 1, 2]
            order[axes[0]], order[axes[1]] = axes[1], axes[0]
            changed[name] = groups[:, order].reshape(value.shape).contiguous()
    return changed


def resized(position: Tensor, grid: tuple[int, int, int], wanted: tuple[int, int, int]) -> Tensor:
    """Learnt positions [1, N, E] for another grid, trilinear: what fine-tuning on another patch begins with.

    Source: TaWald and MIC-DKFZ's nnU-Net resize them so when a patch differs from the pre-training's.
    """
    if grid == wanted:
        return position
    map_ = position.reshape(1, *grid, -1).permute(0, 4, 1, 2, 3)
    map_ = F.interpolate(map_, wanted, mode="trilinear", align_corners=False)
    return map_.flatten(2).transpose(1, 2).contiguous()


# ---- names ----------------------------------------------------------------------------------------------------------

# ours -> theirs; the braces take the block's number
_PLACES = (
    (r"encoder\.embed\.patches\.(weight|bias)", "down_projection.proj.{}"),
    (r"encoder\.layers\.(\d+)\.norm_attend\.(weight|bias)", "eva.blocks.{}.norm1.{}"),
    (r"encoder\.layers\.(\d+)\.norm_think\.(weight|bias)", "eva.blocks.{}.norm2.{}"),
    (r"encoder\.layers\.(\d+)\.scale_attend", "eva.blocks.{}.gamma_1"),
    (r"encoder\.layers\.(\d+)\.scale_think", "eva.blocks.{}.gamma_2"),
    (r"encoder\.layers\.(\d+)\.attend\.q_bias", "eva.blocks.{}.attn.q_proj.bias"),
    (r"encoder\.layers\.(\d+)\.attend\.v_bias", "eva.blocks.{}.attn.v_proj.bias"),
    (r"encoder\.layers\.(\d+)\.attend\.norm\.(weight|bias)", "eva.blocks.{}.attn.norm.{}"),
    (r"encoder\.layers\.(\d+)\.attend\.out\.(weight|bias)", "eva.blocks.{}.attn.proj.{}"),
    (r"encoder\.layers\.(\d+)\.think\.gate\.(weight|bias)", "eva.blocks.{}.mlp.fc1_g.{}"),
    (r"encoder\.layers\.(\d+)\.think\.value\.(weight|bias)", "eva.blocks.{}.mlp.fc1_x.{}"),
    (r"encoder\.layers\.(\d+)\.think\.norm\.(weight|bias)", "eva.blocks.{}.mlp.norm.{}"),
    (r"encoder\.layers\.(\d+)\.think\.out\.(weight|bias)", "eva.blocks.{}.mlp.fc2.{}"),
    (r"encoder\.norm\.(weight|bias)", "eva.norm.{}"),
    (r"decoder\.ups\.(\d+)\.(weight|bias)", "up_projection.decode.{}.0.{}"),
    (r"decoder\.norms\.(\d+)\.(weight|bias)", "up_projection.decode.{}.1.{}"),
    (r"decoder\.out\.(weight|bias)", "up_projection.decode.2.{}"),
)
_QKV = re.compile(r"encoder\.layers\.(\d+)\.attend\.qkv\.weight")
_POSITIONS, _MASK = "encoder.embed.places", "mask_token"


def to_reference(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``nn.ModuleDict({"encoder": Primus, "decoder": PatchDecoder})`` as the reference network names
    and shapes them; a part that is absent stays so.

    Raises: KeyError where a name is not one of ours.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if block := _QKV.fullmatch(name):
            parts = dict(zip(("q", "k", "v"), value.chunk(3), strict=True))
            found |= {f"eva.blocks.{block[1]}.attn.{p}_proj.weight": part.contiguous() for p, part in parts.items()}
        elif name == _POSITIONS:
            found["eva.pos_embed"] = value.flatten(2).transpose(1, 2).contiguous()
            found[_MASK] = value.new_zeros(1, 1, value.shape[1])
        else:
            found[_renamed(name)] = value
    return found


def from_reference(state: Mapping[str, Tensor], grid: tuple[int, int, int]) -> dict[str, Tensor]:
    """The way back; tensors of theirs without a place here (the mask token, MAE's decoder) are left out.

    Args:
        grid: tokens along the axes of the learned places, which their file holds in one row.

    Raises: KeyError where a block lacks a tensor.
    """
    found: dict[str, Tensor] = {}
    for ours in _names(state):
        if block := _QKV.fullmatch(ours):
            rows = [state[f"eva.blocks.{block[1]}.attn.{part}_proj.weight"] for part in ("q", "k", "v")]
            found[ours] = torch.cat(rows)
        elif ours == _POSITIONS:
            found[ours] = state["eva.pos_embed"].transpose(1, 2).unflatten(2, grid).contiguous()
        else:
            found[ours] = state[_renamed(ours)]
    return found


def _renamed(name: str) -> str:
    for pattern, place in _PLACES:
        match = re.fullmatch(pattern, name)
        if match:
            return place.format(*match.groups())
    raise KeyError(name)


def _names(state: Mapping[str, Tensor]) -> list[str]:
    """Ours that a state of theirs can fill."""
    found = [_POSITIONS] if "eva.pos_embed" in state else []
    depth = 1 + max((int(n.split(".")[2]) for n in state if n.startswith("eva.blocks.")), default=-1)
    for pattern, _ in _PLACES:
        kinds = ["weight", "bias"] if "(weight|bias)" in pattern else [""]
        for number in range(depth) if r"(\d+)" in pattern else [0]:
            for kind in kinds:
                name = pattern.replace(r"(\d+)", str(number)).replace("(weight|bias)", kind).replace("\\", "")
                if _renamed(name) in state:
                    found.append(name)
    return [*found, *(f"encoder.layers.{n}.attend.qkv.weight" for n in range(depth))]
