"""The fine vocabulary of anatomy: 47 classes of a whole head, left and right merged, and what coarser maps say of them.

A label map tells some classes apart and merges others: SynthSeg's cortex is any of 25 gyri here. Such a merged answer
is a *target* of its own, which any of its classes meets. Every class carries the FreeSurfer id of its left side, so
a map in this vocabulary (scheme ``brainfm``) opens in the usual viewers.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from brainfm.errors import ManifestError
from brainfm.synthesis.looks import FAMILIES

# class: FreeSurfer id (FreeSurferColorLUT; 32xx are lobes of white matter, 10xx gyri of aparc, 11104 of aparc.a2009s)
REGIONS: dict[str, int] = {
    "background": 0, "head": 258, "csf": 24, "lateral_ventricle": 4, "third_ventricle": 14, "fourth_ventricle": 15,
    "thalamus": 10, "caudate": 11, "putamen": 12, "pallidum": 13, "accumbens": 26, "hippocampus": 17, "amygdala": 18,
    "ventral_dc": 28, "brainstem": 16, "cerebellar_cortex": 8, "cerebellar_white": 7, "corpus_callosum": 192,
    "frontal_white": 3201, "occipital_white": 3204, "temporal_white": 3205, "parietal_white": 3206,
    "superior_frontal": 1028, "middle_frontal": 1027, "inferior_frontal": 1020, "lateral_orbitofrontal": 1012,
    "medial_orbitofrontal": 1014, "frontal_pole": 1032, "precentral": 1024, "postcentral": 1022, "opercula": 11104,
    "supramarginal": 1031, "inferior_parietal": 1008, "superior_parietal": 1029, "precuneus": 1025,
    "anterior_cingulate": 1026, "posterior_cingulate": 1023, "insula": 1035, "superior_temporal": 1030,
    "middle_temporal": 1015, "inferior_temporal": 1009, "temporal_pole": 1033, "fusiform": 1007,
    "parahippocampal": 1016, "lateral_occipital": 1011, "cuneus": 1005, "lingual": 1013,
}  # fmt: skip
CORTEX = tuple(REGIONS)[22:]
TISSUES = {"csf": 1, "grey": 2, "white": 3}  # as `anatomy method=atlas` numbers them
WHITE = ("corpus_callosum", "frontal_white", "occipital_white", "temporal_white", "parietal_white")
VENTRICLES = ("lateral_ventricle", "third_ventricle", "fourth_ventricle")
DEEP = ("thalamus", "caudate", "putamen", "pallidum", "accumbens", "hippocampus", "amygdala")
# merged answers, each met by any of its classes
MERGED: dict[str, tuple[str, ...]] = {
    "any_outside": ("background", "head"),
    "outside_or_csf": ("background", "head", "csf"),
    "any_cortex": CORTEX,
    "any_white": WHITE,
    "any_csf": ("csf", *VENTRICLES),
    "any_grey": (*CORTEX, *DEEP, "cerebellar_cortex"),
    "any_white_matter": (*WHITE, "cerebellar_white", "brainstem", "ventral_dc"),
}
_TISSUE_OF = {"any_csf": "csf", "any_grey": "grey", "any_white_matter": "white"}
TISSUE_OF: dict[str, str] = {name: _TISSUE_OF[merged] for merged in _TISSUE_OF for name in MERGED[merged]}
TARGETS = (*REGIONS, *MERGED)
IGNORE = -1

_AGREED: dict[int, str] = {  # ids that FreeSurfer, FastSurfer and SynthSeg share
    0: "any_outside", 2: "any_white", 41: "any_white", 3: "any_cortex", 42: "any_cortex", 4: "lateral_ventricle",
    5: "lateral_ventricle", 43: "lateral_ventricle", 44: "lateral_ventricle", 31: "lateral_ventricle",
    63: "lateral_ventricle", 7: "cerebellar_white", 46: "cerebellar_white", 8: "cerebellar_cortex",
    47: "cerebellar_cortex", 9: "thalamus", 48: "thalamus", 10: "thalamus", 49: "thalamus", 11: "caudate",
    50: "caudate", 12: "putamen", 51: "putamen", 13: "pallidum", 52: "pallidum", 14: "third_ventricle",
    72: "third_ventricle", 15: "fourth_ventricle", 16: "brainstem", 17: "hippocampus", 53: "hippocampus",
    18: "amygdala", 54: "amygdala", 24: "csf", 26: "accumbens", 58: "accumbens", 28: "ventral_dc", 60: "ventral_dc",
    77: "any_white", 192: "corpus_callosum", 250: "any_white", **dict.fromkeys(range(251, 256), "corpus_callosum"),
    5001: "any_white", 5002: "any_white",
}  # fmt: skip
_APARC: dict[int, str] = {
    0: "any_cortex", 1: "superior_temporal", 2: "anterior_cingulate", 3: "middle_frontal", 5: "cuneus",
    6: "parahippocampal", 7: "fusiform", 8: "inferior_parietal", 9: "inferior_temporal", 10: "posterior_cingulate",
    11: "lateral_occipital", 12: "lateral_orbitofrontal", 13: "lingual", 14: "medial_orbitofrontal",
    15: "middle_temporal", 16: "parahippocampal", 17: "superior_frontal", 18: "inferior_frontal",
    19: "inferior_frontal", 20: "inferior_frontal", 21: "cuneus", 22: "postcentral", 23: "posterior_cingulate",
    24: "precentral", 25: "precuneus", 26: "anterior_cingulate", 27: "middle_frontal", 28: "superior_frontal",
    29: "superior_parietal", 30: "superior_temporal", 31: "supramarginal", 32: "frontal_pole", 33: "temporal_pole",
    34: "superior_temporal", 35: "insula",
}  # fmt: skip
_FREESURFER = (
    _AGREED
    | {0: "outside_or_csf"}  # the fluid around the brain is not labelled
    | {side + place: name for side in (1000, 2000) for place, name in _APARC.items()}
    | {side + place: "any_white" for side in (3000, 4000) for place in range(36)}
    | dict.fromkeys([*range(11100, 11176), *range(12100, 12176)], "any_cortex")
)
# SynthSeg's training maps: 5xx are tissues outside the brain, 136, 137, 163, 164 ventricles of other programs
_HEAD = (
    _AGREED
    | {0: "background", 165: "head", **dict.fromkeys(range(501, 531), "head")}
    | dict.fromkeys([136, 137, 163, 164], "lateral_ventricle")
)
_MUSE_GYRI: dict[str, tuple[int, ...]] = {  # the right side's even ids; the left side's are one more
    "superior_frontal": (152, 190, 192, 140), "middle_frontal": (142,), "inferior_frontal": (118, 162, 164, 204),
    "lateral_orbitofrontal": (104, 136, 178), "medial_orbitofrontal": (146, 124, 186), "frontal_pole": (120,),
    "precentral": (182, 150), "postcentral": (176, 148), "opercula": (112, 174), "supramarginal": (194,),
    "inferior_parietal": (106,), "superior_parietal": (198,), "precuneus": (168,), "anterior_cingulate": (100,),
    "posterior_cingulate": (138, 166), "insula": (102, 172), "superior_temporal": (200, 180, 184, 206),
    "middle_temporal": (154,), "inferior_temporal": (132,), "temporal_pole": (202,), "fusiform": (122, 160),
    "parahippocampal": (170, 116), "lateral_occipital": (128, 144, 196, 156), "cuneus": (114, 108), "lingual": (134,),
}  # fmt: skip
_DLMUSE = {
    0: "any_outside", 1: "csf", 46: "csf", 4: "third_ventricle", 11: "fourth_ventricle",
    **dict.fromkeys([49, 50, 51, 52], "lateral_ventricle"), 23: "accumbens", 30: "accumbens", 31: "amygdala",
    32: "amygdala", 35: "brainstem", 36: "caudate", 37: "caudate", 38: "cerebellar_cortex", 39: "cerebellar_cortex",
    71: "cerebellar_cortex", 72: "cerebellar_cortex", 73: "cerebellar_cortex", 40: "cerebellar_white",
    41: "cerebellar_white", 47: "hippocampus", 48: "hippocampus", 55: "pallidum", 56: "pallidum", 57: "putamen",
    58: "putamen", 59: "thalamus", 60: "thalamus", 61: "ventral_dc", 62: "ventral_dc", 81: "frontal_white",
    82: "frontal_white", 83: "occipital_white", 84: "occipital_white", 85: "parietal_white", 86: "parietal_white",
    87: "temporal_white", 88: "temporal_white", **dict.fromkeys(range(91, 95), "any_white"), 95: "corpus_callosum",
    **{number + side: name for name, numbers in _MUSE_GYRI.items() for number in numbers for side in (0, 1)},
}  # fmt: skip

SCHEMES: dict[str, Mapping[int, str]] = {
    "tissue": {0: "any_outside", 1: "any_csf", 2: "any_grey", 3: "any_white_matter"},
    "synthseg": _AGREED | {side + place: name for side in (1000, 2000) for place, name in _APARC.items()},
    "freesurfer": _FREESURFER,
    "fastsurfer": _FREESURFER,
    "synthseg_head": _HEAD,
    "dlmuse": _DLMUSE,
    "brainfm": {number: name for name, number in REGIONS.items()},
}
"""id -> target. Ids that a scheme of data/schemes.py knows and that are not here tell nothing (fornix, vessels)."""


def targets_of(scheme: str) -> np.ndarray:
    """Table [largest id + 1] int16 for np.take: index into TARGETS, or IGNORE.

    Raises: ManifestError: no such scheme.
    """
    if scheme not in SCHEMES:
        raise ManifestError(f"scheme {scheme!r} is not known, expected one of {', '.join(SCHEMES)}")
    table = np.full(max(SCHEMES[scheme]) + 1, IGNORE, np.int16)
    for number, name in SCHEMES[scheme].items():
        table[number] = TARGETS.index(name)
    return table


def merged_members() -> list[list[int]]:
    """For each of MERGED the indices of its classes in REGIONS."""
    names = list(REGIONS)
    return [[names.index(member) for member in members] for members in MERGED.values()]


# ---- what renderings are made of -------------------------------------------------------------------------------------

BY_INTENSITY = 255  # in a table of renders_of: outside the brain, where only the scan tells air from tissue
_CLUSTERS = 5  # of tissue outside the brain, by intensity
CLUSTER_EDGES = (-0.9, -0.3, 0.3, 1.0)  # of a standardised scan
AIR_MARGIN = 0.15  # standard deviations above a scan's smallest value that still count as air
_HEAD_IDS = (165, 502, 506, 507, 508, 509, 511, 512, 514, 515, 516, 530)  # tissues outside the brain of synthseg_head
# render class: its family of looks.FAMILIES. Gyri are one class: they must not be told by their intensity.
_RENDERED: dict[str, str] = {
    "air": "air", "csf": "fluid", "ventricles": "fluid", "cortex": "cortex", "white": "white",
    "thalamus": "deep_grey", "caudate": "deep_grey", "putamen": "deep_grey", "pallidum": "deep_grey",
    "accumbens": "deep_grey", "hippocampus": "deep_grey", "amygdala": "deep_grey", "ventral_dc": "brainstem",
    "brainstem": "brainstem", "cerebellar_cortex": "cerebellar_grey", "cerebellar_white": "white",
    "other": "deep_grey", **{f"cluster{n}": "outside" for n in range(_CLUSTERS)},
    **{f"head{number}": "outside" for number in _HEAD_IDS},
}  # fmt: skip
RENDERED = tuple(_RENDERED)
RENDERED_FAMILIES = np.array([FAMILIES.index(family) for family in _RENDERED.values()])
_RENDERED_AS = (
    {name: "cortex" for name in (*CORTEX, "any_cortex", "any_grey")}
    | {name: "white" for name in (*WHITE, "any_white", "any_white_matter")}
    | {name: "ventricles" for name in VENTRICLES}
    | {"any_csf": "csf", "background": "air", "head": "cluster2"}
)


def renders_of(scheme: str) -> np.ndarray:
    """Table [largest id + 1] uint8: place in RENDERED, or BY_INTENSITY; ``other`` for ids that tell nothing.

    Raises: ManifestError: no such scheme.
    """
    targets = targets_of(scheme)
    table = np.full(len(targets), RENDERED.index("other"), np.uint8)
    for number, target in enumerate(targets):
        name = TARGETS[target] if target != IGNORE else "other"
        if name in ("any_outside", "outside_or_csf"):
            table[number] = BY_INTENSITY
        else:
            table[number] = RENDERED.index(_RENDERED_AS.get(name, name))
    if scheme == "synthseg_head":
        for number in _HEAD_IDS:
            table[number] = RENDERED.index(f"head{number}")
    return table


def outside_by_intensity(tissue: np.ndarray, scan: np.ndarray) -> np.ndarray:
    """Render classes where the map stops at the brain: air where the scan is at its smallest value, else one of five
    clusters by intensity.

    Args:
        tissue: [X, Y, Z] uint8 as a table of renders_of gives it.
        scan: the same shape, standardised, of the same head.

    Returns:
        uint8, without BY_INTENSITY.
    """
    unknown = tissue == BY_INTENSITY
    if not unknown.any():
        return tissue
    cluster = np.digitize(scan, CLUSTER_EDGES).astype(np.uint8) + RENDERED.index("cluster0")
    air = scan <= float(scan.min()) + AIR_MARGIN
    return np.where(unknown, np.where(air, RENDERED.index("air"), cluster), tissue).astype(np.uint8)
