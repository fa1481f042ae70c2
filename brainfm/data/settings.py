"""What pre-training reads of a store beside its scans, and in which windows (``data.targets``, ``data.windows``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM

Augment = str | Mapping[str, Any] | None  # the name of a preset, or AugmentSpec's keys


@dataclass(frozen=True)
class TargetSpec:
    """Where targets come from.

    Raises: ConfigError for impossible values.
    """

    labels: Annotated[
        Mapping[str, str] | None,
        "label column: scheme (see data/schemes.py, or auto), best source first; null: every *_labels column",
    ] = None
    level: Annotated[
        Literal["groups", "tissues", "regions"] | None, "null: groups where every label map tells them, else tissues"
    ] = None
    volumes: Annotated[
        str | None,
        "table of region volumes: SynthSeg volumes.csv, aseg.stats, DLMUSE, or what `anatomy` wrote",
        VERBATIM,
    ] = None
    health: Annotated[str | None, "the column that tells health; null: healthy or health_status", VERBATIM] = None
    lesions: Annotated[tuple[str, ...] | None, "mask columns that show pathology; null: those whose name says so"] = (
        None
    )
    synthesise: Annotated[float, "share of the patches without known disease that get a lesion"] = 0.5
    lesion_shapes: Annotated[
        str | None, "folder of *_mask.nii.gz to cut their shapes from; null: procedural shapes", VERBATIM
    ] = None

    def __post_init__(self) -> None:
        if self.level not in (None, "groups", "tissues", "regions"):
            raise ConfigError(f"data.targets.level={self.level}: expected groups, tissues, regions or null")
        if not 0 <= self.synthesise <= 1:
            raise ConfigError(f"data.targets.synthesise={self.synthesise}: expected a share from 0 to 1")


@dataclass(frozen=True)
class WindowSpec:
    """How windows vary over a run: whole heads first, then ever finer ones.

    Attributes:
        whole_share: between coarse_steps and settle_steps the share of whole heads falls to it, and the finest voxel
            from high_mm to low_mm.
        source_cap: sets are drawn with the square root of their number of people.
        rendered: share of the views that are rendered, of heads with a label map (``data.rendered``).

    Raises: ConfigError for impossible values.
    """

    low_mm: Annotated[float, "edge of a voxel, log-uniform from low to high once settled"] = 0.8
    high_mm: Annotated[float, "see low_mm"] = 4.0
    whole_mm: Annotated[tuple[float, float], "edge of a voxel of a whole head, uniform"] = (3.5, 5.0)
    whole_share: Annotated[float, "of the samples that show a whole head, once settled"] = 0.1667
    coarse_steps: Annotated[int, "steps of whole heads only"] = 2000
    settle_steps: Annotated[int, "after which nothing changes any more"] = 6000
    rotate_deg: Annotated[float, "largest angle about each axis"] = 20
    stretch: Annotated[float, "largest relative change of an axis, on top of the voxel size"] = 0.12
    elastic: Annotated[float, "strength of a smooth displacement, as a part of what could fold"] = 0.5
    shift_vox: Annotated[int, "how far apart the corners of the two views lie at most, along each axis"] = 8
    mapped_share: Annotated[
        float | None,
        "of the samples show a head with a label map, where there are heads with and without; null: as the people are",
    ] = 0.75
    source_cap: Annotated[float, "largest share of the samples that one data set may have"] = 0.5
    rendered: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.low_mm <= self.high_mm or not 0 < self.whole_mm[0] <= self.whole_mm[1]:
            raise ConfigError(
                f"data.windows: low_mm={self.low_mm}, high_mm={self.high_mm}, whole_mm={list(self.whole_mm)}; "
                "expected lengths above 0, the smaller first"
            )
        for name in ("whole_share", "rendered", "mapped_share", "source_cap", "elastic", "stretch"):
            value = getattr(self, name)
            if value is not None and (not 0 <= value <= 1 or (name == "source_cap" and value == 0)):
                raise ConfigError(f"data.windows.{name}={value}: expected a share from 0 to 1")
        if not 0 <= self.coarse_steps <= self.settle_steps or self.shift_vox < 0:
            raise ConfigError(
                f"data.windows: coarse_steps={self.coarse_steps}, settle_steps={self.settle_steps}, "
                f"shift_vox={self.shift_vox}; expected 0 <= coarse_steps <= settle_steps and no negative shift"
            )

    def settled(self, step: int) -> float:
        """0 while there are whole heads only, 1 once nothing changes any more."""
        if step >= self.settle_steps:
            return 1.0
        return max(0.0, (step - self.coarse_steps) / max(1, self.settle_steps - self.coarse_steps))
