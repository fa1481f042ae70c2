"""Primus, nnssl's transformer, from and to its checkpoints: names of tensors, the token grid, the order of its axes.

Primus cuts a scan into tokens of 8 x 8 x 8 voxels, adds a learnt position to each (``eva.pos_embed``) and turns queries
and keys by three fixed rotary angles, one for each axis of the grid, in three equal groups of a head's channels.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.errors import WeightsError
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.exchange import plans
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.imported import Imported, filled
from brainfm.nets.exchange.matching import Matching, Row, axes_reversed, match, with_channels
from brainfm.nets.primus import PatchDecoder, Primus
from brainfm.specs import PreprocessSpec

TOKEN_VOX = 8
# order of an array's axes in which tokens follow each other: as they come, or the first two exchanged
ORDERS = ("whd", "hwd")
PLACES = plans.Places("eva", "down_projection", ("down_projection.proj",), "eva.pos_embed")
# width -> channels of a head, for the published sizes S, B, M and L
HEAD_CHANNELS = {396: 66, 792: 66, 864: 72, 1056: 66}
# what stands before the names in files of contrastive questions
_INNER = "encoder."
_TURNED = re.compile(r"(?:encoder\.)?eva\.blocks\.\d+\.attn\.(?:q_proj\.(?:weight|bias)|k_proj\.weight)")


def is_primus(names: Iterable[str]) -> bool:
    """Whether these are tensors of a Primus."""
    return any(name.removeprefix(_INNER).startswith("eva.blocks.") for name in names)


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


# ---- out -------------------------------------------------------------------------------------------------------------

_SIZES = {"primus_s": "PrimusS", "primus_b": "PrimusB", "primus_m": "PrimusM", "primus_l": "PrimusL"}


def network_weights(
    encoder: Primus, *, channels: int = 1, axes: str = "zyx", order: str = "whd", seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor of the reference network with ours in it; the way up to one output channel is fresh.

    Args:
        channels: of the first layer (matching.with_channels).
        axes: order in which their reader gives an array's axes: ``zyx`` of SimpleITK, ``xyz`` of nibabel.
        order: of ORDERS; dynamic-network-architectures has ``whd`` since June 2025, nnssl's own networks ``hwd``.
        seed: of what is fresh.

    Raises: WeightsError for cubes other than of 8 voxels, and a grid that ``hwd`` cannot hold.
    """
    edge, width = encoder.strides[-1], encoder.widths[-1]
    if edge != TOKEN_VOX:
        raise WeightsError(f"backbone.patch_vox={edge}: nnssl's Primus has cubes of {TOKEN_VOX} voxels")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = PatchDecoder(width, 1)
    grid = _grid_of(encoder)
    both = nn.ModuleDict({"encoder": encoder, "decoder": fresh}).state_dict()
    theirs = to_reference({name: value.detach().cpu().float() for name, value in both.items()})
    if axes == "zyx":
        theirs = axes_reversed(with_axes_swapped(theirs, grid, _head_of(encoder), (0, 2)))
        grid = grid[::-1]
    if order == "hwd":
        _check_order(grid)
        theirs = with_axes_swapped(theirs, grid, _head_of(encoder))
    stem = f"{PLACES.projections[0]}.weight"
    theirs[stem] = with_channels(theirs[stem], channels)
    return {name: value.clone().contiguous() for name, value in theirs.items()}


def adaptation_plan(
    encoder: Primus, preprocess: PreprocessSpec, patch_vox: Sequence[int], *, channels: int = 1, axes: str = "zyx"
) -> dict[str, Any]:
    """See plans.adaptation_plan; the patch that the learnt positions are for is told beside the recommended one."""
    trained = [TOKEN_VOX * n for n in _grid_of(encoder)]
    trained = trained[::-1] if axes == "zyx" else trained
    plan = plans.adaptation_plan(
        _architecture(encoder, trained), PLACES, preprocess, patch_vox, channels=channels, axes=axes
    )
    return plan | {"pretrain_patch_size": trained}


def _architecture(encoder: Primus, patch: Sequence[int]) -> dict[str, Any]:
    named = _SIZES.get(str(encoder.config["name"]))
    if named is not None:
        return {"arch_class_name": named, "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": "dynamic_network_architectures.architectures.primus.Primus",
        "arch_kwargs": {
            "embed_dim": encoder.widths[-1],
            "patch_embed_size": [TOKEN_VOX] * 3,
            "eva_depth": len(encoder.layers),
            "eva_numheads": encoder.config["heads"],
            "input_shape": list(patch),
            "init_values": encoder.config["layer_scale"],
            "scale_attn_inner": True,
        },
        "arch_kwargs_requiring_import": [],
    }


def _grid_of(encoder: Primus) -> tuple[int, int, int]:
    places = encoder.embed.places
    assert places is not None  # a Primus always learns them
    x, y, z = places.shape[2:]
    return x, y, z


def _head_of(encoder: Primus) -> int:
    return encoder.widths[-1] // int(encoder.layers[0].attend.heads)  # type: ignore[union-attr, arg-type]


def _check_order(grid: tuple[int, int, int]) -> None:
    """Raises: WeightsError where a sequence with two axes exchanged was turned as if they were not."""
    if grid[0] != grid[1]:
        raise WeightsError(
            f"order=hwd: on a grid of {grid[0]} x {grid[1]} x {grid[2]} tokens that order gives each token the angles "
            "of another; expected as many along the first axis as along the second, or order=whd"
        )


# ---- in --------------------------------------------------------------------------------------------------------------


def imported(checkpoint: Checkpoint, axes: str = "zyx", order: str = "auto") -> Imported:
    """The encoder of a Primus of nnssl or nnU-Net as ours; the grid of its tokens is told by its positions.

    Args:
        axes: see ``network_weights``.
        order: of ORDERS, or ``auto``: see ``order_of``.

    Raises: WeightsError where it does not fit completely.
    """
    tensors = checkpoint.tensors
    inner = _INNER if any(name.startswith(f"{_INNER}eva.") for name in tensors) else ""
    position = tensors.get(f"{inner}eva.pos_embed")
    if position is None or position.ndim != 3:
        raise WeightsError(f"{checkpoint.path}: a Primus without {inner}eva.pos_embed [1, tokens, channels]")
    order = order_of(checkpoint) if order == "auto" else order
    spec, patch = plans.prepared(checkpoint, "xyz")  # as the array's axes are
    grid = _laid_out(checkpoint, position, patch, order)
    head = _head_in(checkpoint, position)
    own = {name.removeprefix(inner): value for name, value in tensors.items() if name.startswith(inner)}
    if order == "hwd":
        own = with_axes_swapped(own, grid, head)
    if axes == "zyx":
        own = axes_reversed(with_axes_swapped(own, grid, head, (0, 2)))
        grid, spec = grid[::-1], plans.prepared(checkpoint, axes)[0]
    stem = f"{PLACES.projections[0]}.weight"
    channels = own[stem].shape[1] if stem in own else 1
    if channels > 1:
        own[stem] = with_channels(own[stem], 1)
    encoder = _encoder_like(own, head, grid)
    rows = _fill(encoder, own | {n: v for n, v in tensors.items() if not n.startswith(inner)}, inner, grid, checkpoint)
    x, y, z = (TOKEN_VOX * n for n in grid)
    return Imported(
        encoder.eval(), spec, (x, y, z), rows, None,
        {"name": str(checkpoint.about.get("trainer_name", "unknown")), "config": {}},
        notes=tuple(_notes(channels, order, inner)),
    )  # fmt: skip


def order_of(checkpoint: Checkpoint) -> str:
    """The order in which a file's tokens follow each other, as far as the file tells its maker.

    What nnssl pre-trained has ``hwd``, but SimMIM ``whd``; so have files of nnU-Net (they hold no plan), whose network
    is dynamic-network-architectures', and what brainfm wrote unless it says otherwise.
    """
    ours = plans.said_of_ours(checkpoint)
    if ours:
        return str(ours.get("order", "whd"))
    simmim = "simmim" in str(checkpoint.about.get("trainer_name", "")).lower()
    return "whd" if simmim or not plans.plan_of(checkpoint) else "hwd"


def _laid_out(checkpoint: Checkpoint, position: Tensor, patch: Any, order: str) -> tuple[int, int, int]:
    """Tokens along the axes of the array. Raises: WeightsError."""
    told = plans.plan_of(checkpoint).get("pretrain_patch_size", patch)
    edges = [int(edge) for edge in told] if isinstance(told, Sequence) and len(told) == 3 else None
    try:
        grid = token_grid(position, edges)
        if order == "hwd":
            _check_order(grid)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None
    return grid


def _head_in(checkpoint: Checkpoint, position: Tensor) -> int:
    """Channels of a head: as the plan has it, else by the published widths. Raises: WeightsError."""
    architecture = plans.plan_of(checkpoint).get("architecture_plans")
    kwargs = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
    heads = kwargs.get("eva_numheads") if isinstance(kwargs, Mapping) else None
    width = int(position.shape[2])
    if isinstance(heads, int) and heads > 0 and width % heads == 0:
        return width // heads
    try:
        return head_channels(position)
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None


def _encoder_like(tensors: Mapping[str, Tensor], head: int, grid: tuple[int, int, int]) -> Backbone:
    """A network of the size that names and shapes tell, its tensors yet without values."""
    width = int(tensors["eva.pos_embed"].shape[2])
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"eva\.blocks\.(\d+)\.", name))}
    depth = max(numbers) + 1
    options: dict[str, Any] = {"grid_vox": [TOKEN_VOX * n for n in grid]}
    if not any(name.endswith(".gamma_1") for name in tensors):
        options["layer_scale"] = None
    with torch.device("meta"):
        for name in _SIZES:
            known = build_backbone(name, **options)
            assert isinstance(known, Primus)
            if (known.widths[-1], len(known.layers), _head_of(known)) == (width, depth, head):
                return known.to_empty(device="cpu")
        return build_backbone("primus", width=width, depth=depth, heads=width // head, **options).to_empty(device="cpu")


def _fill(
    encoder: Backbone,
    tensors: Mapping[str, Tensor],
    inner: str,
    grid: tuple[int, int, int],
    checkpoint: Checkpoint,
) -> tuple[Row, ...]:
    """Copies the file's tensors into the network; what became of each, by its name in the file. Raises: MisfitError."""
    ours: dict[str, str] = {}
    expected: dict[str, Tensor] = {}
    for name, value in encoder.state_dict().items():
        part = to_reference({f"encoder.{name}": value.to("meta")})
        part.pop(_MASK, None)
        expected |= part
        ours |= dict.fromkeys(part, f"encoder.{name}")
    apart = ("up_projection.*", "decoder.*", _MASK) if not inner else ("up_projection.*", _MASK)
    beside = [name for name in tensors if name in checkpoint.tensors and not name.startswith(inner)] if inner else []
    taken = match(expected, lambda name: (name,), tensors, [*apart, *beside])
    rows = tuple(
        Row(row.state, ours.get(row.ours, ""), row.theirs if row.theirs in beside else inner + row.theirs, row.shape)
        for row in taken.rows
    )
    Matching(taken.tensors, rows).check(str(checkpoint.path), str(encoder.config["name"]))
    whole = from_reference(taken.tensors, grid)
    filled(encoder, {name.removeprefix("encoder."): value for name, value in whole.items()}, checkpoint)
    return rows


def _notes(channels: int, order: str, inner: str) -> Iterator[str]:
    yield plans.INTENSITIES
    exchanged = "with the first two axes of the array exchanged" if order == "hwd" else "in the order of its axes"
    yield f"tokens were taken to follow each other {exchanged} (order={order})"
    if channels > 1:
        yield f"the first layer read {channels} channels; it now reads one, as if all were that one"
    yield "the way up to voxels is Primus' own and untrained in most files: it was left out"
