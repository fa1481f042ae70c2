"""What comes out of another tool's checkpoint: networks of ours, and how they want their scans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm import __version__
from brainfm.errors import ConfigError, WeightsError
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import save_backbone
from brainfm.nets.decoders import DenseDecoder
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.matching import Row
from brainfm.nets.transfer import transfer
from brainfm.specs import PreprocessSpec, Provenance

DEFAULT_PATCH = (96, 96, 96)


@dataclass(frozen=True)
class Imported:
    """A checkpoint as networks of ours.

    Attributes:
        backbone: the encoder.
        preprocess: how its scans were prepared, as nearly as we can say it.
        patch_vox: X, Y, Z it was trained on.
        rows: what became of every tensor.
        decoder: the skip decoder that was trained with it, or None.
        objective: name and config of the question it was trained with.
        objective_state: the question's own tensors.
        notes: sentences that a user should read.
    """

    backbone: Backbone
    preprocess: PreprocessSpec
    patch_vox: tuple[int, int, int]
    rows: tuple[Row, ...]
    decoder: DenseDecoder | None = None
    objective: Mapping[str, Any] = field(default_factory=lambda: {"name": "unknown", "config": {}})
    objective_state: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def save_imported(path: Path, checkpoint: Checkpoint, found: Imported) -> str:
    """Writes the backbone file; returns its fingerprint. Raises: FileError."""
    origin = {
        "file": checkpoint.path.name,
        "sha256": checkpoint.sha256,
        "objective": dict(found.objective),
        "tensors": sum(row.state == "matched" for row in found.rows),
        "notes": list(found.notes),
    }
    return save_backbone(
        path,
        found.backbone,
        objective=found.objective,
        objective_state=found.objective_state,
        preprocess=found.preprocess,
        patch_vox=found.patch_vox,
        provenance=Provenance(version=__version__, commit="", data="", config={"imported": origin}),
        decoder=found.decoder,
    )


def filled(network: nn.Module, tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Copies a matching's tensors into the network they were matched for. Raises: WeightsError: one is not finite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(f"{checkpoint.path}: what becomes {name} is not finite, expected trained weights")
    transfer(network, tensors, origin=str(checkpoint.path))


def triple(value: Any, otherwise: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """Three numbers of a file, or what stands in for them."""
    if isinstance(value, Sequence) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value):
        return value[0], value[1], value[2]
    return otherwise


def spec_of(spacing_mm: Any, clip_percentiles: tuple[float, float]) -> PreprocessSpec:
    """The spec for scans of a spacing that a file names; 1 mm where it names none.

    Raises: WeightsError for an impossible one.
    """
    try:
        return PreprocessSpec(spacing_mm=triple(spacing_mm, (1.0, 1.0, 1.0)), clip_percentiles=clip_percentiles)
    except ConfigError as error:
        raise WeightsError(f"the file's own plan cannot be used: {error}") from None


def patch_of(backbone: Backbone, wanted: Any) -> tuple[int, int, int]:
    """The patch that a file names, or one that the network takes."""
    edges = triple(wanted, DEFAULT_PATCH)
    patch = (int(edges[0]), int(edges[1]), int(edges[2]))
    try:
        backbone.check_patch(patch)
    except ConfigError:
        patch = DEFAULT_PATCH
    return patch


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Names and shapes of a network without its values."""
    return {name: torch.empty_like(value, device="meta") for name, value in module.state_dict().items()}
