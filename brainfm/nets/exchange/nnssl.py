"""Names of a residual U-Net's tensors in nnssl and nnU-Net, whose networks dynamic-network-architectures makes."""

from __future__ import annotations

import re


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
