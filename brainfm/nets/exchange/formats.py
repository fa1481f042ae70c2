"""Other tools' formats of weights: which one a file is in, and what we make of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from brainfm.errors import WeightsError
from brainfm.nets.exchange import fomo, nnssl, primus
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.imported import Imported
from brainfm.nets.transfer import listed

FORMATS = ("nnssl", "fomo")


def imported(checkpoint: Checkpoint, format: str = "auto", axes: str = "zyx", order: str = "auto") -> Imported:
    """A checkpoint as networks of ours.

    Args:
        format: one of FORMATS, or ``auto``: told by the names in the file.
        axes: order of the axes of the arrays that nnssl read, see nnssl.network_weights; the other tools have ours.
        order: in which the tokens of a Primus follow each other, see primus.imported.

    Raises: WeightsError in one sentence for what cannot become a backbone of ours, with what is missing.
    """
    named = format_of(checkpoint) if format == "auto" else format
    if named == "fomo":
        return fomo.imported(checkpoint)
    if primus.is_primus(checkpoint.tensors):
        return primus.imported(checkpoint, axes, order)
    return nnssl.imported(checkpoint, axes)


def format_of(checkpoint: Checkpoint) -> str:
    """Raises: WeightsError for a kind of file that no backbone of ours can hold."""
    tensors = checkpoint.tensors
    if fomo.is_plain(tensors) or fomo.is_residual(tensors):
        return "fomo"
    if primus.is_primus(tensors) or any(name.startswith("encoder.stages.") for name in tensors):
        return "nnssl"
    raise WeightsError(f"{checkpoint.path}: {_why_not(tensors)}")


def _why_not(tensors: Mapping[str, Tensor]) -> str:
    """What a file of no known format seems to be, and what brainfm lacks for it."""
    names = set(tensors)
    if any(name.startswith("layer1.0.conv1.") for name in names):
        stem = tensors.get("conv1.weight")
        seen = f" with a first convolution of {'x'.join(map(str, stem.shape))}" if stem is not None else ""
        return (
            f"a ResNet as MONAI and MedicalNet have it{seen}; brainfm has no backbone of that kind (batch norm, stride "
            "before the first block), and no other can hold its weights"
        )
    if "model.0.weight" in names and any(name.endswith(".running_mean") for name in names):
        return (
            "a U-Net with batch norm in one sequence, as anatomix is; brainfm's have instance norm, biases and zero "
            "padding where it has batch norm, none and reflection, and would give other features"
        )
    if any("swinViT" in name for name in names):
        return "a Swin transformer as MONAI's SwinUNETR; brainfm has no backbone of that kind"
    if any(name.startswith("vit.") or ".attn." in name or "patch_embed" in name for name in names):
        return "a transformer that no backbone of brainfm is like"
    return f"tensors of no known format, e.g. {listed(sorted(names)[:3], ', ')}; expected of {', '.join(FORMATS)}"
