"""Label schemes: label maps of several segmentation programs, in words they share.

An id of a scheme names a structure; a structure belongs to a group and to a tissue, or to neither (ignored). Groups are
chosen so that every parcellation of the brain tells them apart alike: cerebrospinal fluid around the brain, which
FreeSurfer does not label, is background; the ventricles are a group. Tissue maps tell no groups, only tissues.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from brainfm.data import regions
from brainfm.errors import ManifestError

GROUPS = (
    "background", "ventricles", "cortex", "white", "deep_grey", "medial_temporal", "cerebellum", "brainstem",
)  # fmt: skip
TISSUES = ("background", "csf", "grey", "white")
IGNORE = -1
UNKNOWN = -2  # in a table of lookup(unknown="refuse"): the scheme has no such id

# structure: its group and its tissue. None: ignored there, as programs differ about it or do not tell.
STRUCTURES: dict[str, tuple[str | None, str | None]] = {
    "outside": ("background", "background"),
    "outside_or_csf": ("background", None),  # the 0 of programs that leave out the fluid around the brain
    "outer_csf": ("background", "csf"),
    "ventricle": ("ventricles", "csf"),
    "cortex": ("cortex", "grey"),
    "white": ("white", "white"),
    "deep_grey": ("deep_grey", "grey"),
    "ventral_dc": ("deep_grey", None),  # grey to FreeSurfer, white to MUSE
    "medial_temporal": ("medial_temporal", "grey"),
    "cerebellar_grey": ("cerebellum", "grey"),
    "cerebellar_white": ("cerebellum", "white"),
    "brainstem": ("brainstem", None),  # neither to MUSE, and a mixture
    "csf": (None, "csf"),
    "grey": (None, "grey"),
    "any_white": (None, "white"),
    "unclear": (None, None),  # vessels, lesions, optic chiasm, hypointensities outside white matter
}


def _scheme(**ids: Iterable[int]) -> dict[int, str]:
    return dict(sorted((number, structure) for structure, numbers in ids.items() for number in numbers))


_SYNTHSEG = _scheme(
    outside=[0],
    outer_csf=[24],
    ventricle=[4, 5, 14, 15, 43, 44],
    cortex=[3, 42, *range(1001, 1036), *range(2001, 2036)],
    white=[2, 41],
    deep_grey=[10, 11, 12, 13, 26, 49, 50, 51, 52, 58],
    ventral_dc=[28, 60],
    medial_temporal=[17, 18, 53, 54],
    cerebellar_grey=[8, 47],
    cerebellar_white=[7, 46],
    brainstem=[16],
)
_FREESURFER = _SYNTHSEG | _scheme(
    outside_or_csf=[0],
    ventricle=[31, 63, 72],  # choroid plexus, and the fifth ventricle
    cortex=[1000, 2000, *range(11100, 11176), *range(12100, 12176)],
    white=[77, 78, 79, 192, *range(250, 256), *range(3000, 3036), *range(4000, 4036), 5001, 5002],
    deep_grey=[9, 48],
    unclear=[25, 29, 30, 57, 61, 62, 80, 81, 82, 85, 1004, 2004],
)
_HEAD = _SYNTHSEG | _scheme(
    outside=[165, *range(501, 531)],  # skull, eyes, soft tissue
    ventricle=[136, 137, 163, 164],
    white=[25, 57],
    unclear=[30, 62, 72, 85],
)
_DLMUSE = _scheme(
    outside=[0],
    outer_csf=[1, 46],
    ventricle=[4, 11, 49, 50, 51, 52],
    cortex=[
        *range(100, 110), *range(112, 126), 128, 129, *range(132, 158), *range(160, 188), *range(190, 208),
    ],
    white=range(81, 96),
    deep_grey=[23, 30, 36, 37, 55, 56, 57, 58, 59, 60, 75, 76],
    ventral_dc=[61, 62],
    medial_temporal=[31, 32, 47, 48],
    cerebellar_grey=[38, 39, 71, 72, 73],
    cerebellar_white=[40, 41],
    brainstem=[35],
    unclear=[69],
)  # fmt: skip

# What `brainfm anatomy method=network` writes: regions.REGIONS, left and right merged to the left side's ids.
_BRAINFM = {
    number: structure
    for name, number in regions.REGIONS.items()
    if (structure := {"background": "outside", "head": "outside", "csf": "outer_csf", "ventral_dc": "ventral_dc",
                      "brainstem": "brainstem", "cerebellar_cortex": "cerebellar_grey",
                      "cerebellar_white": "cerebellar_white", "hippocampus": "medial_temporal",
                      "amygdala": "medial_temporal",
                      **dict.fromkeys(regions.VENTRICLES, "ventricle"),
                      **dict.fromkeys(regions.DEEP[:5], "deep_grey"),
                      **dict.fromkeys(regions.WHITE, "white"),
                      **dict.fromkeys(regions.CORTEX, "cortex")}[name])
}  # fmt: skip

SCHEMES: dict[str, dict[int, str]] = {
    "tissue": _scheme(outside=[0], csf=[1], grey=[2], any_white=[3]),
    "synthseg": _SYNTHSEG,
    "freesurfer": _FREESURFER,
    "fastsurfer": _FREESURFER,
    "synthseg_head": _HEAD,
    "dlmuse": _DLMUSE,
    "brainfm": dict(sorted(_BRAINFM.items())),
}
"""id -> structure. ``fastsurfer`` numbers as ``freesurfer`` does; ``synthseg_head`` is a whole head, with ids 5xx."""

# Ids that are in every whole map of a scheme. They tell it from schemes that share the other ids, and from a lesion or
# hippocampus map that happens to use the same numbers.
_ALWAYS = {
    "tissue": {1, 2, 3},
    "synthseg": {2, 41, 24},
    "freesurfer": {2, 41},
    "fastsurfer": {2, 41},
    "synthseg_head": {2, 41, 507},
    "dlmuse": {35, 59, 60},
    "brainfm": {3201, 1028, 10},
}


def guess_scheme(ids: Iterable[int], where: str = "the label map") -> str:
    """The scheme that knows all of these ids.

    Where the ids fit a scheme and a larger one that contains it, the smaller is meant.

    Args:
        ids: those that occur in a whole label map, 0 included.
        where: the file, for the sentence.

    Raises:
        ManifestError: none fits, or several that would read the ids differently.
    """
    found = {int(i) for i in ids}
    fit = [name for name, scheme in SCHEMES.items() if _ALWAYS[name] <= found <= set(scheme)]
    smallest = [name for name in fit if all(set(SCHEMES[name]) <= set(SCHEMES[other]) for other in fit)]
    if smallest:
        return smallest[0]
    if fit:
        raise ManifestError(f"{where}: labels {_shown(found)} fit {' and '.join(fit)}, expected a scheme to be named")
    misfit = {name: (found - set(SCHEMES[name])) or (_ALWAYS[name] - found) for name in SCHEMES}
    nearest = min(SCHEMES, key=lambda name: (len(found - set(SCHEMES[name])), len(misfit[name])))
    says = "does not know" if found - set(SCHEMES[nearest]) else "always has"
    raise ManifestError(
        f"{where}: labels {_shown(found)} fit none of the schemes {', '.join(SCHEMES)}; the nearest, {nearest}, "
        f"{says} {_shown(misfit[nearest])}"
    )


def lookup(scheme: str, level: str = "groups", unknown: str = "refuse") -> np.ndarray:
    """Table [largest id + 1] int16 for np.take: index into GROUPS or TISSUES, IGNORE, or UNKNOWN.

    Args:
        scheme: a key of SCHEMES.
        level: ``groups`` or ``tissues``.
        unknown: ids that the scheme does not know become UNKNOWN (``refuse``) or IGNORE (``ignore``).

    Raises:
        ManifestError: no such scheme, or it does not tell groups.
    """
    if scheme not in SCHEMES:
        raise ManifestError(f"scheme {scheme!r} is not known, expected one of {', '.join(SCHEMES)}")
    if level not in ("groups", "tissues") or unknown not in ("refuse", "ignore"):
        raise ValueError(f"level={level!r}, unknown={unknown!r}")
    place, names = (0, GROUPS) if level == "groups" else (1, TISSUES)
    table = np.full(max(SCHEMES[scheme]) + 1, UNKNOWN if unknown == "refuse" else IGNORE, np.int16)
    for number, structure in SCHEMES[scheme].items():
        name = STRUCTURES[structure][place]
        table[number] = IGNORE if name is None else names.index(name)
    if table.max() <= 0:
        raise ManifestError(f"scheme {scheme!r} tells tissues only, expected a parcellation for {', '.join(names)}")
    return table


def to_groups(
    labels: np.ndarray, scheme: str, where: str, level: str = "groups", unknown: str = "refuse"
) -> np.ndarray:
    """A label map in the shared words: int16 of the same shape, an index into GROUPS or TISSUES, or IGNORE.

    Args:
        labels: whole numbers, any shape.
        scheme, level, unknown: as for lookup.
        where: the file, for the sentence.

    Raises:
        ManifestError: an id that the scheme does not know, where unknown ids are refused.
    """
    table = lookup(scheme, level, unknown)
    outside = (labels < 0) | (labels >= len(table))
    groups = np.take(table, np.where(outside, 0, labels))
    groups[outside] = UNKNOWN if unknown == "refuse" else IGNORE
    if (groups == UNKNOWN).any():
        strange = np.unique(labels[groups == UNKNOWN]).tolist()
        raise ManifestError(f"{where}: labels {_shown(strange)} found, expected those of the scheme {scheme}")
    return groups


def _shown(ids: Iterable[int]) -> str:
    numbers = sorted(ids)
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
