"""Settings of a segmentation (``task=segmentation``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from brainfm.settings import VERBATIM
from brainfm.tasks.settings import TaskSettings


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(TaskSettings):
    """Which voxels belong to the target."""

    kind: Annotated[str, "segmentation | classification | regression"] = "segmentation"
    target: Annotated[str, "column NAME_mask or NAME_labels of the manifest, without the ending", VERBATIM]
    values: Annotated[
        tuple[Any, ...] | None, "label values, 0 first; null: 0 and 1 for a mask, those found for labels"
    ] = None
    patch_vox: Annotated[
        Literal["auto"] | tuple[int, int, int],
        "auto: follows the shape of the volumes, as large as memory allows; or [x, y, z]",
    ] = "auto"
    loss: Annotated[
        Literal["dice_ce", "dice_focal", "focal_tversky", "tversky"], "the last three are for small lesions"
    ] = "dice_ce"
    head_start: Annotated[
        Literal["linear", "fresh"],
        "how the last layer begins; linear: as a linear probe of the features before it, or as a head of the file",
    ] = "linear"
    deep_supervision: Annotated[bool, "the decoder's coarser levels answer as well while training"] = False
    augment_scale: Annotated[float, "share by which heads are scaled in training"] = 0.15
