"""Names of Primus' tensors in dynamic-network-architectures and nnssl, and the places of tokens there."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

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
