"""Settings of renderings: how they vary (``data.looks`` of pre-training)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from brainfm.errors import ConfigError
from brainfm.settings import LATER


@dataclass(frozen=True)
class LookSpec:
    """How renderings vary.

    Raises: ConfigError for a share or strength out of 0..1 (``blur_vox``: 0..3).
    """

    free_share: Annotated[float, "with any intensities; the others are T1-, T2-, FLAIR- or PD-like"] = 0.4
    family_std: Annotated[float, "of a family of tissues' intensity about its kind's"] = 0.08
    class_std: Annotated[float, "of the logarithm of a structure's intensity about its tissue's"] = 0.08
    least_contrast: Annotated[
        float, "between the tissues of a T1-, T2-, FLAIR- or PD-like one, part of the usual; uniform up to 1", LATER
    ] = 1.0
    noise: Annotated[float, "largest standard deviation within a structure, of the brightest tissue"] = 0.10
    texture: Annotated[float, "largest share of the real scan's own structure, where one is beside"] = 0.5
    blur_vox: Annotated[float, "largest standard deviation of the partial volume's blur"] = 0.9
    strip: Annotated[float, "share of the heads that are cut down to the brain"] = 0.3

    def __post_init__(self) -> None:
        for name in ("free_share", "family_std", "class_std", "least_contrast", "noise", "texture", "strip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.looks.{name}={getattr(self, name)}: expected a number from 0 to 1")
        if not 0 <= self.blur_vox <= 3:
            raise ConfigError(f"data.looks.blur_vox={self.blur_vox}: expected 0 to 3 voxels")
