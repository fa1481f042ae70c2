"""Settings of every objective, and which class asks with them. To add one: its settings and a line in OBJECTIVES.

Defaults are what files without a key were trained with, so that these can be made again; where something else is
recommended it stands in configs/objective/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.settings import build, plain

Reconstruction = Literal["mse", "smooth_l1"]
_VISITS = "whether the second scan may come from another visit (preprocess.align=rigid)"


@dataclass(frozen=True)
class ObjectiveSettings:
    """Of any objective: the one key that all have."""

    name: Annotated[str, "which objective"]

    @property
    def config(self) -> dict[str, Any]:
        """As a backbone file holds them, without the name."""
        return {key: value for key, value in plain(self).items() if key != "name"}


@dataclass(frozen=True)
class MAESettings(ObjectiveSettings):
    """Masked autoencoder: reconstruct the hidden voxels, and only they count.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "mae"
    mask_unit_vox: Annotated[int, "edge of a hidden block"] = 4
    mask_ratio: Annotated[float, "share of the blocks that is hidden, exact in every sample"] = 0.6
    loss: Annotated[Reconstruction, "of hidden voxels"] = "mse"
    beta: Annotated[float, "of smooth_l1, in units of the standardised intensity"] = 0.1
    latent_channels: Annotated[int, "between backbone and decoder"] = 512

    def __post_init__(self) -> None:
        _check_beta(self.beta)


@dataclass(frozen=True)
class CrossContrastSettings(ObjectiveSettings):
    """Two scans of a session: what they share (anatomy) and what tells them apart (contrast).

    Defaults are the published values, but for logvar_start, terms_on and centred of configs/objective/
    cross_contrast.yaml; experiment=fomo25 has them all as published.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "cross_contrast"
    parts: Annotated[Mapping[str, float], "shares of the latent channels, anatomy and contrast among them"] = field(
        default_factory=lambda: {"anatomy": 0.5, "contrast": 0.5}
    )
    latent_channels: Annotated[int, "of all parts"] = 512
    variational: Annotated[bool, "samples the latents while training, with the KL term"] = True
    logvar_start: Annotated[
        float | None, "where the log variances begin; null (published): about 0, noise that drowns the contrast"
    ] = None
    terms_on: Annotated[Literal["means", "samples"], "which codes agree and are pushed apart; samples: published"] = (
        "samples"
    )
    centred: Annotated[bool, "less what all samples share, with a floor under their spread; false: published"] = False
    mask_unit_vox: Annotated[int, "edge of a hidden block"] = 4
    mask_ratio: Annotated[float, "share of the blocks that is hidden, exact"] = 0.2
    loss_on: Annotated[Literal["all", "hidden"], "which voxels of a target count"] = "all"
    beta: Annotated[float, "of smooth L1, in units of the standardised intensity"] = 0.1
    swap: Annotated[
        Literal["standard", "published"], "published: the published code gives a target the OTHER scan's contrast"
    ] = "standard"
    anatomy_from: Annotated[
        Literal["other", "mean"] | None, "of the cross terms; null: other, or mean with swap=published"
    ] = None
    self_weight: Annotated[float, "of the self terms"] = 3.0
    cross_weight: Annotated[float, "of the cross terms"] = 1.0
    agreement_weight: Annotated[float, "of 1 - cosine of the anatomy codes"] = 0.5
    separation_weight: Annotated[float, "of the cosine of the contrast codes, where the contrasts differ"] = 0.5
    separation_floor: Annotated[float, "cosine below which contrast codes are far enough apart; -1: published"] = -1.0
    kl_weight: Annotated[float, "of the KL term"] = 0.001
    kl_ramp: Annotated[float, "share of the run over which the KL weight grows from 0"] = 0.1
    visits: Annotated[bool, _VISITS] = False

    def __post_init__(self) -> None:
        if not {"anatomy", "contrast"} <= set(self.parts):
            raise ConfigError(f"objective.parts={', '.join(self.parts)}: cross_contrast needs 'anatomy' and 'contrast'")
        _check_beta(self.beta)
        if self.swap == "published" and self.anatomy_from == "other":
            raise ConfigError(
                "objective.anatomy_from=other: with swap=published a cross term would be the other scan's own code "
                "asked for this scan; expected 'mean'"
            )


@dataclass(frozen=True)
class AnatomyPathologySettings(ObjectiveSettings):
    """The anatomy part shows the subject's anatomy, the pathology part disease, the rest is free; together they
    reconstruct. Targets come from the data (data.targets); what is missing drops its term.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "anatomy_pathology"
    parts: Annotated[Mapping[str, float], "shares of the latent channels (published)"] = field(
        default_factory=lambda: {"anatomy": 0.5, "pathology": 0.3, "free": 0.2}
    )
    latent_channels: Annotated[int, "of all parts"] = 512
    groups: Annotated[int | None, "classes of the label maps; null: as the data have them, 0: none"] = None
    volumes: Annotated[int | None, "regions of the volume table; null: as the data have them, 0: none"] = None
    mask_unit_vox: Annotated[int, "edge of a hidden block"] = 16
    mask_ratio: Annotated[float, "share of the blocks that is hidden, exact in every sample"] = 0.75
    region_decoder: Annotated[
        Literal["skip", "light"], "skip: label maps from every level; light: from the anatomy part alone"
    ] = "light"
    regions_on: Annotated[
        Literal["visible", "all"], "voxels in which the label map is asked for; the hidden ones can be guessed only"
    ] = "all"
    loss: Annotated[Reconstruction, "of hidden voxels"] = "mse"
    beta: Annotated[float, "of smooth_l1"] = 0.1
    reconstruction_weight: Annotated[float, "of the error on hidden voxels"] = 0.7
    anatomy_weight: Annotated[float, "of label map or region volumes"] = 0.15
    pathology_weight: Annotated[float, "of lesions and health"] = 0.15
    agreement_weight: Annotated[
        float, "of 1 - cosine between the anatomy parts of two scans of a subject; above 0 reads pairs"
    ] = 0.0
    centred: Annotated[
        bool, "codes less what all samples share, with a floor under their spread; false: as they are"
    ] = False
    visits: Annotated[bool, _VISITS] = False

    def __post_init__(self) -> None:
        if not {"anatomy", "pathology"} <= set(self.parts):
            raise ConfigError(
                f"objective.parts={', '.join(self.parts)}: anatomy_pathology needs 'anatomy' and 'pathology'"
            )
        _check_beta(self.beta)
        groups, volumes = self.groups or 0, self.volumes or 0
        if groups < 0 or groups == 1 or volumes < 0:
            raise ConfigError(
                f"objective.groups={groups}, volumes={volumes}: expected 0, or two groups and one volume on"
            )
        _check_weights(self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms, by name."""
        return {
            "reconstruction": self.reconstruction_weight,
            "anatomy": self.anatomy_weight,
            "pathology": self.pathology_weight,
            "agreement": self.agreement_weight,
        }


@dataclass(frozen=True)
class MAEContrastiveSettings(ObjectiveSettings):
    """Masked reconstruction of two views, and their codes drawn together against those of other people.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "mae+contrastive"
    mask_unit_vox: Annotated[int, "edge of a hidden block"] = 4
    mask_ratio: Annotated[float, "share of the blocks that is hidden in each view, exact; 0: none"] = 0.6
    loss: Annotated[Reconstruction, "of the reconstruction, where it has a weight"] = "mse"
    beta: Annotated[float, "of smooth_l1"] = 0.1
    reconstruction_weight: Annotated[float, "0 leaves the term and its network out"] = 1.0
    contrastive_weight: Annotated[float, "more than 0"] = 0.1
    latent_channels: Annotated[int, "between backbone, decoder and projector"] = 512
    parts: Annotated[Mapping[str, float], "the first part is drawn together, all are decoded"] = field(
        default_factory=lambda: {"all": 1.0}
    )
    temperature: Annotated[float, "of the contrast"] = 0.1
    hidden_channels: Annotated[int, "of the projector"] = 512
    projected_channels: Annotated[int, "of the projector's answer"] = 128
    shift: Annotated[float, "how far the second patch may lie from the first, as a share of its edge"] = 0.25
    visits: Annotated[bool, _VISITS] = False
    interval_tau_years: Annotated[float | None, "a pair t years apart weighs exp(-t / tau); null: all alike"] = None
    queue: Annotated[int, "codes of earlier steps that serve as further wrong answers"] = 1024

    def __post_init__(self) -> None:
        if not self.mask_ratio and self.reconstruction_weight:
            raise ConfigError("objective.mask_ratio=0: nothing is hidden, so there is nothing to reconstruct")
        tau = self.interval_tau_years
        if self.temperature <= 0 or self.queue < 0 or (tau is not None and tau <= 0):
            raise ConfigError(
                f"objective.temperature={self.temperature}, queue={self.queue}, interval_tau_years={tau}: "
                "expected temperature > 0, queue >= 0 and null or more than 0 years"
            )
        if min(self.reconstruction_weight, self.contrastive_weight) < 0 or self.contrastive_weight == 0:
            raise ConfigError("objective.contrastive_weight: expected more than 0, and reconstruction_weight 0 or more")


@dataclass(frozen=True)
class ContrastiveSettings(MAEContrastiveSettings):
    """Two views of one person are alike, other people are not.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "contrastive"
    mask_ratio: Annotated[float, "share of the blocks that is hidden in each view, exact; 0: none"] = 0.3
    reconstruction_weight: Annotated[float, "0 leaves the term and its network out"] = 0.0
    contrastive_weight: Annotated[float, "more than 0"] = 1.0


@dataclass(frozen=True)
class DenseSplitSettings(ObjectiveSettings):
    """Encoder and skip decoder together: anatomy at every voxel, one small code for the contrast, two views of a head.
    Label maps come from the data (data.targets); without any, the terms of real scans go on alone.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "dense_split"
    parts: Annotated[Mapping[str, int], "channels of the decoder's last map"] = field(
        default_factory=lambda: {"anatomy": 32, "pathology": 8, "free": 8}
    )
    code: Annotated[int, "numbers of a contrast code, at most 16"] = 12
    classes: Annotated[tuple[str, ...] | None, "names of the classes; null: as the data have them"] = None
    merged: Annotated[
        tuple[tuple[int, ...], ...] | None, "labels that stand for several classes; null: as the data have them"
    ] = None
    volumes: Annotated[int | None, "regions of the volume vector; null: as the data have them"] = None
    mask_unit_vox: Annotated[int, "edge of a hidden block"] = 8
    mask_ratio: Annotated[float, "share of the blocks that is hidden, exact"] = 0.3
    mask_share: Annotated[float, "share of the views in which anything is hidden"] = 0.5
    stride: Annotated[
        int, "voxels along each axis between those that most terms look at; 2 saves a CPU half a step"
    ] = 1
    points: Annotated[int, "voxels of a pair that are matched; 0: none"] = 256
    temperature: Annotated[float, "of the match"] = 0.1
    apart_mm: Annotated[float, "nearer voxels are no wrong answers"] = 8.0
    regions_weight: Annotated[float, "anatomy -> label map"] = 1.0
    match_weight: Annotated[float, "anatomy of one voxel in both views"] = 0.2
    self_weight: Annotated[float, "anatomy and own contrast -> the view"] = 0.5
    cross_weight: Annotated[float, "anatomy and the other view's contrast -> that view"] = 0.5
    lesion_weight: Annotated[float, "pathology -> lesions"] = 0.3
    volumes_weight: Annotated[float, "whole heads: log shares of regions"] = 0.1

    def __post_init__(self) -> None:
        parts = self.parts
        if not {"anatomy", "pathology"} <= set(parts) or sum(parts.values()) < 48 or parts["anatomy"] < 32:
            raise ConfigError(
                f"objective.parts={dict(parts)}: expected anatomy with 32 channels or more, pathology, and 48 in all"
            )
        if not 1 <= self.code <= 16:
            raise ConfigError(f"objective.code={self.code}: expected 1 to 16 numbers for a contrast")
        if self.points < 0 or self.temperature <= 0 or not 0 <= self.mask_share <= 1:
            raise ConfigError(
                f"objective.points={self.points}, temperature={self.temperature}, mask_share={self.mask_share}: "
                "expected points from 0, a temperature above 0 and a share from 0 to 1"
            )
        _check_weights(self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms, by name."""
        return {
            "regions": self.regions_weight, "match": self.match_weight, "self": self.self_weight,
            "cross": self.cross_weight, "lesion": self.lesion_weight, "volumes": self.volumes_weight,
        }  # fmt: skip


@dataclass(frozen=True)
class DINOSettings(ObjectiveSettings):
    """A teacher's answer for a large crop is asked for from other and smaller crops, and for hidden cubes.

    Raises: ConfigError for impossible values.
    """

    name: Annotated[str, "which objective"] = "dino"
    prototypes: Annotated[int, "that answers are shares of; 65536: published, for batches of hundreds"] = 8192
    hidden_channels: Annotated[int, "of the head"] = 2048
    bottleneck: Annotated[int, "of the head"] = 256
    global_vox: Annotated[tuple[int, int, int] | None, "edges of the two large crops; null: those of the patch"] = None
    local_vox: Annotated[tuple[int, int, int] | None, "edges of the small crops; null: about half of the large"] = None
    local_crops: Annotated[int, "small crops of a patch"] = 8
    global_scale: Annotated[tuple[float, float], "share of the patch's volume in a large crop"] = (0.32, 1.0)
    local_scale: Annotated[tuple[float, float], "share of the patch's volume in a small crop"] = (0.05, 0.32)
    mask_share: Annotated[float, "share of the large crops in which cubes are hidden from the student"] = 0.5
    mask_ratio: Annotated[tuple[float, float], "share of the cubes that is hidden there"] = (0.2, 0.75)
    ibot_weight: Annotated[float, "of the hidden cubes; 0 leaves term and head out"] = 1.0
    koleo_weight: Annotated[float, "of the even spread of descriptors"] = 0.1
    centring: Annotated[Literal["sinkhorn", "mean"], "what keeps the teacher's answers apart"] = "sinkhorn"
    student_temperature: Annotated[float, "of the student's answers"] = 0.1
    teacher_temperature_start: Annotated[float, "of the teacher's answers at first"] = 0.04
    teacher_temperature: Annotated[float, "and later"] = 0.07
    warm: Annotated[float, "share of the run over which the temperature rises"] = 0.1
    momentum: Annotated[float, "of the teacher at first; it rises to 1"] = 0.992

    def __post_init__(self) -> None:
        if min(self.prototypes, self.hidden_channels, self.bottleneck) < 2 or self.local_crops < 0:
            raise ConfigError(
                f"objective.prototypes={self.prototypes}, hidden_channels={self.hidden_channels}, "
                f"bottleneck={self.bottleneck}, local_crops={self.local_crops}: expected 2 or more, and crops from 0"
            )
        for key in ("global_scale", "local_scale", "mask_ratio"):
            low, high = getattr(self, key)
            if not 0 < low <= high <= 1:
                raise ConfigError(f"objective.{key}=[{low:g}, {high:g}]: expected 0 < from <= to <= 1")
        for key in ("student_temperature", "teacher_temperature_start", "teacher_temperature"):
            if not getattr(self, key) > 0:  # also of what is not a number
                raise ConfigError(f"objective.{key}={getattr(self, key):g}: expected more than 0")
        for key in ("momentum", "warm", "mask_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"objective.{key}={getattr(self, key):g}: expected 0 to 1")
        if min(self.ibot_weight, self.koleo_weight) < 0:
            raise ConfigError("objective.ibot_weight, koleo_weight: expected 0 or more")


# name: its settings, and the class that asks, which is imported when it is built
OBJECTIVES: dict[str, tuple[type[ObjectiveSettings], str]] = {
    "mae": (MAESettings, "brainfm.objectives.mae:MAE"),
    "cross_contrast": (CrossContrastSettings, "brainfm.objectives.cross_contrast:CrossContrast"),
    "anatomy_pathology": (AnatomyPathologySettings, "brainfm.objectives.anatomy_pathology:AnatomyPathology"),
    "contrastive": (ContrastiveSettings, "brainfm.objectives.contrastive:Contrastive"),
    "dino": (DINOSettings, "brainfm.objectives.dino:DINO"),
    "dense_split": (DenseSplitSettings, "brainfm.objectives.dense_split:DenseSplit"),
    "mae+contrastive": (MAEContrastiveSettings, "brainfm.objectives.contrastive:MAEContrastive"),
}


def settings_class(values: Mapping[str, Any]) -> type[ObjectiveSettings]:
    """Of the objective that ``values`` name. Raises: ConfigError where there is none of this name."""
    name = values.get("name")
    if name not in OBJECTIVES:
        raise ConfigError(f"unknown objective {name!r}, expected one of {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name][0]


def settings_of(name: str, config: Mapping[str, Any]) -> ObjectiveSettings:
    """As a backbone file holds them. Raises: ConfigError for an unknown name or key, or an impossible value."""
    values = {"name": name, **config}
    return build(settings_class(values), values, "objective.")


def _check_beta(beta: float) -> None:
    if beta <= 0:
        raise ConfigError(f"objective.beta={beta}: expected more than 0")


def _check_weights(weights: Mapping[str, float]) -> None:
    bad = [name for name, weight in weights.items() if weight < 0]
    if bad or sum(weights.values()) == 0:
        key = bad[0] if bad else next(iter(weights))
        raise ConfigError(f"objective.{key}_weight={weights[key]}: expected weights of 0 or more, not all of them 0")
