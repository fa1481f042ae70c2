"""Residual U-Nets from and to nnssl and nnU-Net, whose networks dynamic-network-architectures makes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from brainfm.errors import ConfigError, WeightsError
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.decoders import SkipDecoder, decoder_for
from brainfm.nets.exchange import plans
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.imported import Imported, filled, on_meta, patch_of
from brainfm.nets.exchange.matching import axes_reversed, match, with_channels
from brainfm.nets.resenc import ResEncDecoder, ResEncEncoder
from brainfm.nets.transfer import listed
from brainfm.specs import PreprocessSpec


def reference_names(name: str, levels: int) -> tuple[str, ...]:
    """Under which names dynamic-network-architectures' ResidualEncoderUNet keeps a tensor of ours.

    Each convolution and norm of a block is there twice, and the encoder once more inside the decoder. They are equal,
    except in checkpoints of sparse pre-training (SparK, S3D), where the trained values are under ``all_modules``: these
    come first.

    Args:
        name: as in ``nn.ModuleDict({"encoder": ResEncEncoder, "decoder": ResEncDecoder}).state_dict()``.
        levels: stages of the encoder.

    Raises: KeyError where the name is not one of ours.
    """
    for pattern, place in _PLACES:
        found = re.fullmatch(rf"{pattern}\.(weight|bias)", name)
        if found:
            *numbers, kind = found.groups()
            return _with_aliases(place.format(*numbers, last=levels - 2), kind)
    raise KeyError(name)


# ours -> theirs; the braces take the numbers in their order
_PLACES = (
    (r"encoder\.stem\.0", "encoder.stem.convs.0.conv"),
    (r"encoder\.stem\.1", "encoder.stem.convs.0.norm"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.first\.0", "encoder.stages.{}.blocks.{}.conv1.conv"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.first\.1", "encoder.stages.{}.blocks.{}.conv1.norm"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.second\.0", "encoder.stages.{}.blocks.{}.conv2.conv"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.second\.1", "encoder.stages.{}.blocks.{}.conv2.norm"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.shortcut\.0", "encoder.stages.{}.blocks.{}.skip.1.conv"),
    (r"encoder\.stages\.(\d+)\.(\d+)\.shortcut\.1", "encoder.stages.{}.blocks.{}.skip.1.norm"),
    (r"decoder\.merges\.(\d+)\.0", "decoder.stages.{}.convs.0.conv"),
    (r"decoder\.merges\.(\d+)\.1", "decoder.stages.{}.convs.0.norm"),
    (r"decoder\.ups\.(\d+)", "decoder.transpconvs.{}"),
    (r"decoder\.coarse\.(\d+)", "decoder.seg_layers.{}"),
    (r"decoder\.out", "decoder.seg_layers.{last}"),
)


def _with_aliases(place: str, kind: str) -> tuple[str, ...]:
    """Every name of one of their tensors, the most trustworthy first."""
    parent, _, last = place.rpartition(".")
    index = {"conv": "0", "norm": "1"}.get(last)
    own = (f"{place}.{kind}",) if index is None else (f"{parent}.all_modules.{index}.{kind}", f"{place}.{kind}")
    return (*own, *(f"decoder.{n}" for n in own)) if place.startswith("encoder.") else own


# ---- out -------------------------------------------------------------------------------------------------------------

PLACES = plans.Places(
    "encoder.stages", "encoder.stem", ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0")
)


def residual(backbone: Backbone, origin: str) -> ResEncEncoder:
    """The backbone, where their networks can hold it. Raises: WeightsError."""
    if not isinstance(backbone, ResEncEncoder):
        raise WeightsError(
            f"{origin}: holds {backbone.config['name']}, which no network of nnssl or nnU-Net is like (theirs halve a "
            "map by strides where ours pools); expected a residual U-Net (resenc_l, resenc_s, resenc) or a Primus"
        )
    return backbone


def network_weights(
    encoder: ResEncEncoder, decoder: SkipDecoder | None = None, *, channels: int = 1, axes: str = "zyx", seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor of their network with ours in it, aliases included; one output channel.

    Args:
        encoder: what was pre-trained.
        decoder: what was trained with it; its climb is taken, and its answer where that is one channel. The rest, and
            without a decoder all of it, is fresh: fine-tuning replaces the answer, and nnU-Net's schedules for
            pre-trained weights the whole decoder.
        channels: of the first convolution (matching.with_channels).
        axes: order in which their reader gives an array's axes: ``zyx`` of SimpleITK, ``xyz`` of nibabel.
        seed: of what is fresh.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = ResEncDecoder(encoder.widths, encoder.strides, 1)
    own = fresh.state_dict()
    if decoder is not None:
        climb = {n: v for n, v in decoder.state_dict().items() if n in own and v.shape == own[n].shape}
        own |= climb
    ours = {f"encoder.{n}": v for n, v in encoder.state_dict().items()} | {f"decoder.{n}": v for n, v in own.items()}
    ours = {name: value.detach().cpu().float() for name, value in ours.items()}
    ours = axes_reversed(ours) if axes == "zyx" else ours
    ours["encoder.stem.0.weight"] = with_channels(ours["encoder.stem.0.weight"], channels)
    levels = len(encoder.widths)
    # contiguous, and one storage for all names of a tensor: torch.save writes it once
    whole = {name: value.clone().contiguous() for name, value in ours.items()}
    return {theirs: whole[name] for name in whole for theirs in reference_names(name, levels)}


def adaptation_plan(
    encoder: ResEncEncoder,
    preprocess: PreprocessSpec,
    patch_vox: Sequence[int],
    *,
    channels: int = 1,
    axes: str = "zyx",
) -> dict[str, Any]:
    """See plans.adaptation_plan."""
    architecture = _architecture(encoder)
    return plans.adaptation_plan(architecture, PLACES, preprocess, patch_vox, channels=channels, axes=axes)


def _architecture(encoder: ResEncEncoder) -> dict[str, Any]:
    if encoder.config["name"] == "resenc_l":
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    levels = len(encoder.widths)
    return {
        "arch_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": {
            "n_stages": levels,
            "features_per_stage": list(encoder.widths),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * levels,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (levels - 1),
            "n_blocks_per_stage": _depths(encoder),
            "n_conv_per_stage_decoder": [1] * (levels - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _depths(encoder: ResEncEncoder) -> list[int]:
    return [sum(1 for _ in stage.children()) for stage in encoder.stages]


# ---- in --------------------------------------------------------------------------------------------------------------


def imported(checkpoint: Checkpoint, axes: str = "zyx") -> Imported:
    """A residual U-Net of nnssl or nnU-Net as ours; its decoder comes along where it has skip connections like ours.

    Args:
        axes: see ``network_weights``.

    Raises: WeightsError where its encoder does not fit completely.
    """
    tensors = checkpoint.tensors
    encoder = encoder_of(checkpoint)
    levels = len(encoder.widths)
    stems = [name for name in reference_names("encoder.stem.0.weight", levels) if name in tensors]
    channels = tensors[stems[0]].shape[1] if stems else 1
    turned = axes_reversed(tensors) if axes == "zyx" else dict(tensors)
    turned |= {name: with_channels(turned[name], 1) for name in stems}
    decoder = decoder_for(encoder, {"image": 1})

    def names(name: str) -> tuple[str, ...]:  # the copy of the encoder inside the decoder is no place to read from
        return tuple(n for n in reference_names(name, levels) if not n.startswith("decoder.encoder."))

    own = {f"encoder.{name}": value for name, value in on_meta(encoder).items()}
    both = own | {f"decoder.{name}": value for name, value in on_meta(decoder).items()}
    taken = match(both, names, turned, _unused(turned))
    wrong = [row for row in taken.rows if row.state in ("missing", "misfit") and row.ours.startswith("decoder.")]
    apart = bool(wrong) or plans.said_of_ours(checkpoint).get("decoder") is False  # then it was never trained
    if apart:
        taken = match(own, names, turned, [name for name in turned if not name.startswith("encoder.")])
    taken.check(str(checkpoint.path), str(encoder.config["name"]))
    filled(encoder, _part(taken.tensors, "encoder."), checkpoint)
    if not apart:
        filled(decoder, _part(taken.tensors, "decoder."), checkpoint)
    spec, patch = plans.prepared(checkpoint, axes)
    return Imported(
        encoder.eval(), spec, patch_of(encoder, patch), taken.rows, None if apart else decoder.eval(),
        {"name": str(checkpoint.about.get("trainer_name", "unknown")), "config": {}},
        notes=tuple(_notes(channels, apart)),
    )  # fmt: skip


def encoder_of(checkpoint: Checkpoint) -> ResEncEncoder:
    """An encoder with as many stages, blocks and channels as the names and shapes in a file say."""
    pattern = re.compile(r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv2\.(?:conv|all_modules\.0)\.weight")
    depths: dict[int, int] = {}
    widths: dict[int, int] = {}
    for name, value in checkpoint.tensors.items():
        found = pattern.fullmatch(name)
        if found and value.ndim == 5:
            stage, block = int(found[1]), int(found[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            widths[stage] = value.shape[0]
    if sorted(depths) != list(range(len(depths))) or len(depths) < 2:
        found_names = listed(list(checkpoint.tensors)[:3], ", ")
        raise WeightsError(
            f"{checkpoint.path}: no residual U-Net of nnssl or nnU-Net (encoder.stages.0.blocks.0.conv2.conv.weight "
            f"and so on), found {found_names} ...; format=auto tells other kinds"
        )
    shape = [widths[stage] for stage in sorted(widths)], [depths[stage] for stage in sorted(depths)]
    for name in ("resenc_l", "resenc_s"):
        with torch.device("meta"):
            known = build_backbone(name)
        if isinstance(known, ResEncEncoder) and (list(known.widths), _depths(known)) == shape:
            return build_backbone(name)  # type: ignore[return-value]
    try:
        return ResEncEncoder(*shape)
    except ConfigError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None


def _unused(tensors: Iterable[str]) -> list[str]:
    """What other questions leave beside the network, the copy of the encoder, and coarser answers."""
    apart = ("encoder.", "decoder.stages.", "decoder.transpconvs.")
    return [name for name in tensors if not name.startswith(apart)]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _notes(channels: int, without_decoder: bool) -> Iterator[str]:
    yield plans.INTENSITIES
    if channels > 1:
        yield f"the first convolution read {channels} channels; it now reads one, as if all were that one"
    if without_decoder:
        yield "the decoder is untrained, or has no skip connections and blocks like ours, and was left out"
