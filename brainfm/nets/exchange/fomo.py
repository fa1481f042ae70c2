"""The FOMO challenges' baselines, and the winner of FOMO25, as networks of ours.

Three kinds of file, told by their names: FOMO25's plain U-Net (AMAES, Lightning), FOMO2JOMO's U-Net with its latents
and its decoder, and FOMO26's residual U-Net. Their arrays' axes are X, Y, Z, as ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from brainfm.errors import ConfigError, WeightsError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.decoders import LightDecoder, decoder_for
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.imported import Imported, filled, on_meta, spec_of
from brainfm.nets.exchange.matching import Matching, match, with_channels
from brainfm.nets.exchange.nnssl import encoder_of, reference_names
from brainfm.nets.latents import Latents
from brainfm.nets.resenc import ResEncEncoder
from brainfm.nets.transfer import listed
from brainfm.nets.unet import UNetEncoder

_AMAES_PATCH, _JOMO_PATCH = (96, 96, 96), (64, 64, 64)
_CLIP = (0.0, 99.0)  # yucca clips at the 99th percentile of what is not background
_LEVEL = re.compile(r"levels\.(\d+)\.(\d+)\.([01])\.(weight|bias)")
_RANGE = (
    "its scans lay between 0 and 1, background at 0; brainfm standardises over the head, so features of one scan differ"
)


def is_plain(names: Mapping[str, Any]) -> bool:
    """Whether these are tensors of FOMO25's U-Net, or of FOMO2JOMO's."""
    return "encoder.in_conv.conv1.conv.weight" in names


def is_jomo(names: Mapping[str, Any]) -> bool:
    return is_plain(names) and "conv_mu_shared.weight" in names


def is_residual(names: Mapping[str, Any]) -> bool:
    """Whether these are tensors of FOMO26's residual U-Net."""
    return "encoder.stem.conv1.conv.weight" in names or "encoder.stem.conv1.all_modules.0.weight" in names


def imported(checkpoint: Checkpoint) -> Imported:
    """Raises: WeightsError where the file is none of the three, or its encoder does not fit completely."""
    tensors = checkpoint.tensors
    if is_residual(tensors):
        return _residual(checkpoint)
    if not is_plain(tensors):
        raise WeightsError(
            f"{checkpoint.path}: no U-Net of FOMO's baselines (encoder.in_conv.conv1.conv.weight and so on), found "
            f"{listed(list(tensors)[:3], ', ')} ...; format=auto tells other kinds"
        )
    return _jomo(checkpoint) if is_jomo(tensors) else _plain(checkpoint)


# ---- FOMO25 ----------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Where FOMO25's U-Net keeps a tensor of UNetEncoder. Raises: KeyError where the name is not one of ours."""
    found = _LEVEL.fullmatch(name)
    if not found:
        raise KeyError(name)
    level, layer, what, kind = found.groups()
    block = "in_conv" if level == "0" else f"encoder_conv{level}"
    return f"encoder.{block}.conv{int(layer) + 1}.{('conv', 'norm')[int(what)]}.{kind}"


def _unet_of(checkpoint: Checkpoint) -> UNetEncoder:
    filters = checkpoint.tensors["encoder.in_conv.conv1.conv.weight"].shape[0]
    widths = [filters * 2**level for level in range(5)]
    named = {32: "unet_b", 16: "unet_s"}.get(filters)
    try:
        found = build_backbone(named) if named else build_backbone("unet", widths=widths)
    except ConfigError as error:
        raise WeightsError(f"{checkpoint.path}: {error}") from None
    assert isinstance(found, UNetEncoder)
    return found


def _encoder(checkpoint: Checkpoint, backbone: UNetEncoder) -> tuple[Matching, int]:
    """The encoder's tensors, and how many channels its first convolution had."""
    stem = plain_name("levels.0.0.0.weight")
    tensors = dict(checkpoint.tensors)
    channels = tensors[stem].shape[1]
    tensors[stem] = with_channels(tensors[stem], 1)
    others = [name for name in tensors if not name.startswith("encoder.")]
    found = match(on_meta(backbone), lambda name: (plain_name(name),), tensors, others)
    found.check(str(checkpoint.path), str(backbone.config["name"]))
    filled(backbone, found.tensors, checkpoint)
    return found, channels


def _plain(checkpoint: Checkpoint) -> Imported:
    backbone = _unet_of(checkpoint)
    found, channels = _encoder(checkpoint, backbone)
    return Imported(
        backbone.eval(), spec_of(None, _CLIP), _AMAES_PATCH, found.rows, objective={"name": "amaes", "config": {}},
        notes=(_RANGE, *_channel_note(channels), *_left_out(found)),
    )  # fmt: skip


def _channel_note(channels: int) -> tuple[str, ...]:
    said = f"the first convolution read {channels} channels; it now reads one, as if all were that one"
    return (said,) if channels > 1 else ()


def _left_out(found: Matching) -> tuple[str, ...]:
    rest = [row.theirs for row in found.rows if row.state == "unused" and "decoder" in row.theirs]
    return ("the decoder, of a shape that nothing here has, was left out",) if rest else ()


# ---- FOMO2JOMO -------------------------------------------------------------------------------------------------------

_NUMBERS = {"mean": "mu", "logvar": "logvar"}
_HALVES = {"anatomy": "shared", "contrast": "modality"}


def jomo_name(name: str) -> str:
    """Where FOMO2JOMO keeps a tensor of our cross_contrast: encoder, latents and decoder, 74 in all.

    Raises: KeyError where the name is not one of ours.
    """
    if name.startswith("backbone."):
        return plain_name(name.removeprefix("backbone."))
    if found := re.fullmatch(r"latents\.(mean|logvar)\.(anatomy|contrast)\.(weight|bias)", name):
        return f"conv_{_NUMBERS[found[1]]}_{_HALVES[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"decoder\.levels\.(\d+)\.0\.(weight|bias)", name):
        return f"decoder.upsample{int(found[1]) + 1}.{found[2]}"
    if found := re.fullmatch(r"decoder\.levels\.(\d+)\.1\.([01])\.(weight|bias)", name):
        return f"decoder.decoder_conv{int(found[1]) + 1}.conv1.{('conv', 'norm')[int(found[2])]}.{found[3]}"
    if found := re.fullmatch(r"decoder\.out\.(weight|bias)", name):
        return f"decoder.out_conv.{found[1]}"
    raise KeyError(name)


def _jomo(checkpoint: Checkpoint) -> Imported:
    """The whole of it, as a pre-training with objective=cross_contrast would have left it."""
    backbone = _unet_of(checkpoint)
    width = backbone.widths[-1]
    latents = Latents(backbone.widths, {"anatomy": 0.5, "contrast": 0.5}, width, variational=True)
    decoder = decoder_for(backbone, 1, latent_channels=width)
    assert isinstance(decoder, LightDecoder)
    parts = {"backbone": backbone, "latents": latents, "decoder": decoder}
    own = {f"{part}.{name}": value for part, net in parts.items() for name, value in on_meta(net).items()}
    others = [name for name in checkpoint.tensors if name.startswith(("decoder_task.", "fusion_layer."))]
    found = match(own, lambda name: (jomo_name(name),), checkpoint.tensors, others)
    found.check(str(checkpoint.path), "FOMO2JOMO's network")
    for part, net in parts.items():
        filled(net, _of(found.tensors, part), checkpoint)
    state = {name: value for name, value in found.tensors.items() if not name.startswith("backbone.")}
    config = {"latent_channels": width, "swap": "published", "parts": {"anatomy": 0.5, "contrast": 0.5}}
    return Imported(
        backbone.eval(), spec_of(None, _CLIP), _JOMO_PATCH, found.rows,
        objective={"name": "cross_contrast", "config": config}, objective_state=state, notes=(_RANGE,),
    )  # fmt: skip


def _of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{part}."): v for n, v in tensors.items() if n.startswith(f"{part}.")}


# ---- FOMO26 ----------------------------------------------------------------------------------------------------------


def residual_names(name: str, levels: int) -> tuple[str, ...]:
    """Where FOMO26's residual U-Net keeps a tensor of ResEncEncoder, the most trustworthy name first."""
    there = [n for n in reference_names(f"encoder.{name}", levels) if not n.startswith("decoder.")]
    return tuple(n.replace("stem.convs.0.", "stem.conv1.").replace(".norm.", ".norm_op.") for n in there)


def _residual(checkpoint: Checkpoint) -> Imported:
    encoder: ResEncEncoder = encoder_of(checkpoint)
    levels = len(encoder.widths)
    tensors = dict(checkpoint.tensors)
    stems = [name for name in residual_names("stem.0.weight", levels) if name in tensors]
    channels = tensors[stems[0]].shape[1]
    tensors |= {name: with_channels(tensors[name], 1) for name in stems}
    others = [name for name in tensors if not name.startswith("encoder.")]
    found = match(on_meta(encoder), lambda name: residual_names(name, levels), tensors, others)
    found.check(str(checkpoint.path), str(encoder.config["name"]))
    filled(encoder, found.tensors, checkpoint)
    note = (
        "FOMO26's baseline prepared no spacing and standardised over the whole volume; brainfm resamples to 1 mm and "
        "standardises over the head, so features of one scan differ"
    )
    return Imported(
        encoder.eval(), spec_of(None, (0.0, 100.0)), (160, 160, 160), found.rows,
        objective={"name": "amaes", "config": {}}, notes=(note, *_channel_note(channels), *_left_out(found)),
    )  # fmt: skip
