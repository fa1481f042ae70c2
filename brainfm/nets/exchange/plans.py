"""nnssl's checkpoints: the weights, and beside them the plan that fine-tuning reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm.files import writing
from brainfm.nets.exchange.checkpoint import Checkpoint
from brainfm.nets.exchange.imported import spec_of
from brainfm.specs import PreprocessSpec

AXES = ("zyx", "xyz")
_SPACING_STYLES = {(1.0, 1.0, 1.0): "onemmiso"}
# what every import from nnssl or nnU-Net leaves behind
INTENSITIES = (
    "nnU-Net standardises over all voxels of a scan cropped to what is not 0, brainfm over the head: features of one "
    "scan differ by that"
)


@dataclass(frozen=True)
class Places:
    """Under which names a network's parts lie.

    Attributes:
        encoder, stem: prefixes of what fine-tuning loads.
        projections: layers that read the input's channels.
        positions: the learnt positions, or None.
    """

    encoder: str
    stem: str
    projections: tuple[str, ...]
    positions: str | None = None


def adaptation_plan(
    architecture: Mapping[str, Any],
    places: Places,
    preprocess: PreprocessSpec,
    patch_vox: Sequence[int],
    *,
    channels: int = 1,
    axes: str = "zyx",
) -> dict[str, Any]:
    """What their fine-tuning reads beside the weights: the network, how scans were prepared, where the weights lie.

    Args:
        architecture: class and arguments, as the plan has them.
        patch_vox: X, Y, Z.
        channels: of the input.
        axes: of AXES, the order of an array's axes there.
    """
    turned = slice(None, None, -1 if axes == "zyx" else 1)
    spacing, patch = list(preprocess.spacing_mm)[turned], [int(edge) for edge in patch_vox][turned]
    style = _SPACING_STYLES.get(preprocess.spacing_mm, "brainfm")
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": f"brainfm_{style}",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": style,
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": resampling | {"is_seg": True, "order": 1},
        "spacing": spacing,
        "patch_size": patch,
    }
    return {
        "architecture_plans": dict(architecture),
        "pretrain_plan": {
            "dataset_name": "brainfm",
            "plans_name": "brainfm",
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "SimpleITKIO" if axes == "zyx" else "NibabelIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "configurations": {style: configuration},
            "experiment_planner_used": "brainfm",
        },
        "pretrain_num_input_channels": channels,
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": places.encoder,
        "key_to_stem": places.stem,
        "keys_to_in_proj": list(places.projections),
        "key_to_lpe": places.positions,
    }


def write_checkpoint(
    path: Path, weights: Mapping[str, Tensor], plan: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """A ``.pth`` as their tools expect it, of tensors and plain values alone. Raises: FileError."""
    held = {
        "network_weights": dict(weights),
        "nnssl_adaptation_plan": dict(plan),
        "trainer_name": "brainfm",
        "init_args": {},
        "citations": [],
        "brainfm": dict(about),
    }
    with writing(path) as file:
        torch.save(held, file)


def plan_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The plan in a file; S3D's and nnU-Net's files have none: then it is empty."""
    plan = checkpoint.about.get("nnssl_adaptation_plan")
    return plan if isinstance(plan, Mapping) else {}


def said_of_ours(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """What ``write_checkpoint`` was given as ``about``; empty for files of others."""
    ours = checkpoint.about.get("brainfm")
    return ours if isinstance(ours, Mapping) else {}


def prepared(checkpoint: Checkpoint, axes: str) -> tuple[PreprocessSpec, Any]:
    """Spacing and patch of the plan in a file, in our order."""
    plan = plan_of(checkpoint)
    inner = plan.get("pretrain_plan")
    named = inner.get("configurations") if isinstance(inner, Mapping) else None
    configuration: Mapping[str, Any] = next(iter(named.values()), {}) if isinstance(named, Mapping) else {}
    spacing, patch = configuration.get("spacing"), plan.get("recommended_downstream_patchsize")
    if axes == "zyx":
        spacing, patch = (v[::-1] if isinstance(v, (list, tuple)) else v for v in (spacing, patch))
    return spec_of(spacing, (0.0, 100.0)), patch
