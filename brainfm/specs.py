"""Specs: frozen values that are hashed and shipped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from brainfm.errors import ConfigError


class _Frozen:
    """JSON in and out, and the fingerprint, for the frozen dataclasses below."""

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises: ConfigError where a name is unknown or missing."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown {cls.__name__} key {unknown[0]!r}, expected one of {', '.join(sorted(known))}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ConfigError(f"incomplete {cls.__name__}: {error}") from None

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when any value changes."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PreprocessSpec(_Frozen):
    """What is done to every scan before a network sees it.

    Attributes:
        spacing_mm: edge lengths of the voxels of the common grid along X, Y, Z.
        align: ``header`` trusts the affines of a session's scans; ``rigid`` moves each onto the session's reference,
            and that onto the reference of the subject's first visit.
        clip_percentiles: of the foreground; voxels outside are clipped before standardising.
        margin_mm: kept around the union of the foregrounds.
        labels: how label volumes reach the grid: ``nearest``, or ``linear`` (each class apart, then the largest).
        version: raised when the same values would give other voxels.
    """

    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    align: str = "header"
    clip_percentiles: tuple[float, float] = (0.5, 99.5)
    margin_mm: float = 2.0
    labels: str = "linear"
    version: int = 1

    def __post_init__(self) -> None:
        if len(self.spacing_mm) != 3 or not all(0.1 <= s <= 20 for s in self.spacing_mm):
            raise ConfigError(f"preprocess.spacing_mm={self.spacing_mm}: expected three lengths from 0.1 to 20 mm")
        if self.align not in ("header", "rigid"):
            raise ConfigError(f"preprocess.align={self.align!r}: expected 'header' or 'rigid'")
        low, high = self.clip_percentiles
        if not 0 <= low < high <= 100:
            raise ConfigError(f"preprocess.clip_percentiles={self.clip_percentiles}: expected 0 <= low < high <= 100")
        if self.margin_mm < 0:
            raise ConfigError(f"preprocess.margin_mm={self.margin_mm}: expected 0 or more")
        if self.labels not in ("nearest", "linear"):
            raise ConfigError(f"preprocess.labels={self.labels!r}: expected 'nearest' or 'linear'")
        object.__setattr__(self, "spacing_mm", tuple(float(s) for s in self.spacing_mm))
        object.__setattr__(self, "clip_percentiles", (float(low), float(high)))
        object.__setattr__(self, "margin_mm", float(self.margin_mm))


@dataclass(frozen=True)
class ViewSpec(_Frozen):
    """What the loader must supply to an objective.

    Attributes:
        patch_vox: edge lengths of the patch along X, Y, Z.
        pairs: whether a second scan of the same subject is read at the same place.
        visits: whether that scan may come from another visit, where the visits share a space.
        shift: how far the second patch may lie from the first along each axis, as a share of the patch's edges; above
            0, the only scan of a subject is paired with another patch of itself.
        regions: whether the subject's anatomical label map is read at the same place.
        volumes: whether the subject's region volumes are given.
        lesions: whether pathology is given: known, masked, or synthesised.
        windows: whether patches are windows of many voxel sizes in which two views lie at corners of their own
            (data/windows.py); they bring pairs, regions, volumes and lesions.
    """

    patch_vox: tuple[int, int, int]
    pairs: bool = False
    visits: bool = False
    shift: float = 0.0
    regions: bool = False
    volumes: bool = False
    lesions: bool = False
    windows: bool = False

    def __post_init__(self) -> None:
        if len(self.patch_vox) != 3 or any(int(p) != p or p < 1 for p in self.patch_vox):
            raise ConfigError(f"patch_vox={self.patch_vox}: expected three whole numbers of voxels")
        if not 0 <= self.shift < 1:
            raise ConfigError(f"objective.shift={self.shift}: expected 0 <= shift < 1")
        object.__setattr__(self, "patch_vox", tuple(int(p) for p in self.patch_vox))


@dataclass(frozen=True)
class TaskSpec(_Frozen):
    """A task, as a bundle ships it.

    Attributes:
        kind: ``segmentation``, ``classification`` or ``regression``; the last two answer for the whole session.
        target: of a segmentation the label volume's name: column ``<target>_mask`` (anything but 0 is 1) or
            ``<target>_labels``; else the manifest's column (of several labels a name of its own).
        contrasts: those the task was trained on, in no particular order; any may be missing.
        values: of a segmentation the label values of the classes, background first; of a classification the classes as
            the column writes them (``ordinal``: in their order; ``multilabel``: the columns); of a regression none.
        patch_vox: the window the network was trained on.
        fusion: how contrasts meet: ``mean`` or ``attention`` over those that are present.
        mode: of a classification ``exclusive`` (two or more classes), ``ordinal`` or ``multilabel``; else empty.
        unit: of a regression, for people to read.
        view_mm: edge length of a voxel of the whole-head view that an answer for a whole head begins with, in
            ``patch_vox`` voxels; 0: no such view.
        crops: of an answer for a whole head, whether windows at the store's own resolution that cover the head are
            looked at as well.
        pooling: of an answer for a whole head, how what was seen becomes one vector: ``attention``, ``mean`` or
            ``token``, the class token of a transformer.
    """

    kind: str
    target: str
    contrasts: tuple[str, ...]
    values: tuple[Any, ...]
    patch_vox: tuple[int, int, int]
    fusion: str = "attention"
    mode: str = ""
    unit: str = ""
    view_mm: float = 0.0
    crops: bool = False
    pooling: str = "attention"

    @property
    def classes(self) -> int:
        """K, background included."""
        return len(self.values)


@dataclass(frozen=True)
class Decisions(_Frozen):
    """What cross-validation decided about the answers of a bundle: kept only where it helped on cases held out.

    Attributes:
        mirror: axes (0 is X) along which a volume is also predicted mirrored, and the probabilities averaged over all
            combinations.
        largest_component: whether only the largest connected part of each class is kept.
        min_ml: smallest connected part of a class that is kept, in ml.
        temperature: by which the logits of a classification are divided.
        bias: (a, b) of a regression whose answer x becomes (x - a) / b.
        residuals: sorted absolute errors of a regression on held-out cases, after that correction, in its unit: what
            prediction intervals are made of.
        region: where in a head a structure lies (tasks/place.py), outside of which nothing is looked at; empty:
            anywhere.
    """

    mirror: tuple[int, ...] = ()
    largest_component: bool = False
    min_ml: float = 0.0
    temperature: float = 1.0
    bias: tuple[float, float] = (0.0, 1.0)
    residuals: tuple[float, ...] = ()
    region: tuple[float, ...] = ()


@dataclass(frozen=True)
class Provenance(_Frozen):
    """Where weights come from: enough to run the same command again.

    Attributes:
        version: of brainfm.
        commit: of the code, where it is known.
        data: fingerprint of the index of the store that was trained on.
        config: the resolved configuration.
        seed, steps, samples: of the run.
        hours: of wall time, and ``device`` the device they were spent on.
        parents: fingerprints of the weights that this run started from.
        receipt: what the run has cost (training/receipt.py); empty where nobody counted.
    """

    version: str
    commit: str
    data: str
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 0
    samples: int = 0
    hours: float = 0.0
    device: str = "cpu"
    parents: tuple[str, ...] = ()
    receipt: dict[str, Any] = field(default_factory=dict)
