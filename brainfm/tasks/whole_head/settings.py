"""Settings of an answer for a whole head (``task=classification|regression``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from brainfm.settings import LATER, VERBATIM
from brainfm.tasks.settings import TaskSettings


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
    pooling: Annotated[
        Literal["auto", "attention", "mean", "token"],
        "how one vector is made of a head: learned weights, all places alike, or a transformer's class token; "
        "auto: the class token where there is one, the mean of other transformers, else attention",
        LATER,
    ] = "auto"
    head_start: Annotated[
        Literal["linear", "fresh"],
        "linear: the last layer begins as a linear probe of the encoder as it is, and is refitted so after training",
    ] = "linear"
    candidates: Annotated[
        Literal["auto"] | tuple[str, ...],
        "of [mean, volumes, regions, measurements, features, stacked, tuned]: inner folds choose, the simpler where "
        "they cannot tell; auto: all there are, tuned from tune_from on",
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
