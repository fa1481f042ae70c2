"""What is asked of labelled cases (``task=segmentation|classification|regression``), and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.settings import FREE, VERBATIM


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Of any task."""

    kind: Annotated[str, "segmentation | classification | regression"]
    target: Annotated[str, "what is asked for", VERBATIM]
    contrasts: Annotated[
        tuple[str, ...] | None, "those the network may see; null: all that sessions with an answer have"
    ] = None
    fusion: Annotated[Literal["attention", "mean"], "how contrasts meet"] = "attention"
    shots: Annotated[tuple[int | Literal["all"], ...], "training subjects of each point of protocol=fewshot", FREE] = (
        1,
        5,
        10,
        20,
        "all",
    )

    def __post_init__(self) -> None:
        if not self.shots or any(value != "all" and value < 1 for value in self.shots):
            raise ConfigError(f"task.shots={list(self.shots)}: expected whole numbers from 1 on, or all")


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
        Literal["linear", "fresh"], "how the last layer begins behind a pre-trained decoder; linear: as a linear probe"
    ] = "linear"
    deep_supervision: Annotated[bool, "the decoder's coarser levels answer as well while training"] = False
    augment_scale: Annotated[float, "share by which heads are scaled in training"] = 0.15


@dataclass(frozen=True, kw_only=True)
class WholeHeadSettings(TaskSettings):
    """One answer for a visit."""

    target: Annotated[str, "a column of the manifest; of a multilabel question a name for it", VERBATIM]
    patch_vox: Annotated[
        Literal["auto"] | tuple[int, int, int],
        "of every view; auto: the finest that shows the largest head and fits the device; or [x, y, z]",
    ] = "auto"
    view_mm: Annotated[
        float | None, "edge of a voxel of the whole-head view; null: the largest head just fits; 0: no such view"
    ] = None
    crops: Annotated[
        int, "windows at the store's own resolution beside it; answering takes all that cover the head"
    ] = 0
    lesion: Annotated[str | None, "column NAME_mask, without the ending: where attention should lie", VERBATIM] = None
    guidance: Annotated[float, "weight of that"] = 0.1
    dropout: Annotated[float, "of the pooled features"] = 0.2
    head_start: Annotated[
        Literal["linear", "fresh"],
        "linear: the last layer begins as a linear probe of the encoder as it is, and is refitted so after training",
    ] = "linear"
    candidates: Annotated[
        Literal["auto"] | tuple[str, ...],
        "of [mean, volumes, regions, features, stacked, tuned]: inner folds choose, the simpler where they cannot tell;"
        " auto: all there are, tuned from tune_from on",
    ] = "auto"
    tune_from: Annotated[int, "training subjects from which auto also tunes the encoder"] = 100
    volumes: Annotated[
        str, "label column or table that region volumes come from | none; auto: the first column that fits", VERBATIM
    ] = "auto"
    augment_scale: Annotated[
        float, "share by which heads are scaled in training: 0, for the size of a head can be an answer"
    ] = 0


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(WholeHeadSettings):
    """Is it there, or which is it: one answer for the whole head."""

    kind: Annotated[str, "segmentation | classification | regression"] = "classification"
    mode: Annotated[
        Literal["auto", "exclusive", "ordinal", "multilabel"],
        "ordinal: values in their order; multilabel: values are columns of 0 and 1",
    ] = "auto"
    values: Annotated[tuple[Any, ...] | None, "classes as the column writes them; null: those found, sorted"] = None
    class_weights: Annotated[bool, "rare classes count more in the loss"] = True
    label_smoothing: Annotated[float, "of the loss"] = 0.05


@dataclass(frozen=True, kw_only=True)
class RegressionSettings(WholeHeadSettings):
    """How much is it: one value for the whole head, such as an age."""

    kind: Annotated[str, "segmentation | classification | regression"] = "regression"
    unit: Annotated[str, "for people to read; of a column called age: years", VERBATIM] = ""


TASKS: dict[str, type[TaskSettings]] = {
    "segmentation": SegmentationSettings,
    "classification": ClassificationSettings,
    "regression": RegressionSettings,
}


def task_settings_class(values: Mapping[str, Any]) -> type[TaskSettings]:
    """Of the kind that ``values`` name. Raises: ConfigError where there is none of this name."""
    kind = values.get("kind")
    if kind not in TASKS:
        raise ConfigError(f"task.kind={kind}: expected segmentation, classification or regression")
    return TASKS[kind]
