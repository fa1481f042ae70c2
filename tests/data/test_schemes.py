"""Label maps in shared words: every id has one meaning, both sides of the brain the same, and real maps are covered."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from brainfm.data.schemes import (
    GROUPS,
    IGNORE,
    SCHEMES,
    STRUCTURES,
    TISSUES,
    UNKNOWN,
    guess_scheme,
    lookup,
    to_groups,
)
from brainfm.errors import ManifestError
from brainfm.imaging import nifti

ASEG = {
    0, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 24, 26, 28, 30, 31, 41, 42, 43, 44, 46, 47, 49, 50, 51,
    52, 53, 54, 58, 60, 62, 63, 77, 85, 251, 252, 253, 254, 255,
}  # fmt: skip
LEFT_RIGHT = {2: 41, 3: 42, 4: 43, 5: 44, 7: 46, 8: 47, 10: 49, 11: 50, 12: 51, 13: 52, 17: 53, 18: 54, 26: 58, 28: 60}


def test_every_structure_is_a_group_or_a_tissue_that_exists() -> None:
    assert {s for scheme in SCHEMES.values() for s in scheme.values()} == set(STRUCTURES)
    assert all(group is None or group in GROUPS for group, _ in STRUCTURES.values())
    assert all(tissue is None or tissue in TISSUES for _, tissue in STRUCTURES.values())


@pytest.mark.parametrize("name", ["synthseg", "freesurfer", "fastsurfer", "synthseg_head"])
def test_both_hemispheres_mean_the_same(name: str) -> None:
    scheme = SCHEMES[name]
    assert all(scheme[left] == scheme[right] for left, right in LEFT_RIGHT.items())
    assert all(scheme[1000 + n] == scheme[2000 + n] == "cortex" for n in range(1, 36) if n != 4)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "tissue"])
def test_parcellations_reach_every_group_and_tissue(name: str) -> None:
    assert set(range(len(GROUPS))) <= set(lookup(name).tolist())
    assert {TISSUES.index(t) for t in ("csf", "grey", "white")} <= set(lookup(name, "tissues").tolist())


def test_a_tissue_map_tells_no_groups() -> None:
    assert lookup("tissue", "tissues").tolist() == [0, 1, 2, 3]
    with pytest.raises(ManifestError, match="'tissue' tells tissues only"):
        lookup("tissue")


def test_zero_is_ignored_as_a_tissue_where_outer_fluid_has_no_label() -> None:
    assert lookup("freesurfer", "tissues")[0] == IGNORE and lookup("freesurfer")[0] == 0
    assert lookup("synthseg", "tissues")[0] == 0 and lookup("dlmuse", "tissues")[0] == 0


@pytest.mark.parametrize("level", ["groups", "tissues"])
def test_applying_a_table_equals_a_loop(level: str) -> None:
    names, place = (GROUPS, 0) if level == "groups" else (TISSUES, 1)
    ids = np.array([*SCHEMES["freesurfer"]])
    labels = np.random.default_rng(0).choice(ids, (5, 6, 7)).astype(np.uint16)
    found = to_groups(labels, "freesurfer", "a.nii", level)
    for index in np.ndindex(labels.shape):
        name = STRUCTURES[SCHEMES["freesurfer"][int(labels[index])]][place]
        assert found[index] == (IGNORE if name is None else names.index(name))
    assert found.dtype == np.int16


def test_unknown_ids_are_refused_by_name_or_ignored() -> None:
    labels = np.array([[[0, 47, 99, 3000, -4]]])
    with pytest.raises(ManifestError, match=r"a\.nii: labels -4, 99, 3000 found, expected those of the scheme dlmuse"):
        to_groups(labels, "dlmuse", "a.nii")
    groups = to_groups(labels, "dlmuse", "a.nii", unknown="ignore")
    assert groups.ravel().tolist() == [0, GROUPS.index("medial_temporal"), IGNORE, IGNORE, IGNORE]
    assert UNKNOWN in lookup("dlmuse") and UNKNOWN not in lookup("dlmuse", unknown="ignore")
    with pytest.raises(ManifestError, match="scheme 'brodmann' is not known"):
        lookup("brodmann")


@pytest.mark.parametrize(
    ("ids", "scheme"),
    [
        ({0, 1, 2, 3}, "tissue"),
        (set(SCHEMES["synthseg"]) - set(range(1001, 2036)), "synthseg"),
        (set(SCHEMES["synthseg"]), "synthseg"),
        (ASEG, "freesurfer"),
        (ASEG - {3, 42} | {1000 + n for n in range(1, 36)} | {2000 + n for n in range(1, 36)}, "freesurfer"),
        (set(SCHEMES["dlmuse"]), "dlmuse"),
        (set(SCHEMES["synthseg_head"]), "synthseg_head"),
    ],
)
def test_whole_maps_are_recognised(ids: set[int], scheme: str) -> None:
    assert guess_scheme(ids) == scheme


@pytest.mark.parametrize("ids", [{0, 1}, {0, 1, 2}, {0, 1, 2, 4}, {0, 47}, {0}])
def test_lesion_and_hippocampus_maps_are_no_parcellation(ids: set[int]) -> None:
    with pytest.raises(ManifestError, match=r"x\.nii: labels .* fit none of the schemes .* (always has|does not know)"):
        guess_scheme(ids, "x.nii")


def test_ids_of_no_scheme_are_named() -> None:
    with pytest.raises(ManifestError, match="the nearest, dlmuse, does not know 301, 999"):
        guess_scheme({*SCHEMES["dlmuse"], 301, 999})


def test_real_dlmuse_maps_are_covered(data3d: Path) -> None:
    files = sorted(data3d.glob("ixi2mm/*/*_dseg.nii.gz"))[::10]
    assert files
    for path in files:
        labels = nifti.read(path, labels=True)[0].voxels
        assert guess_scheme(np.unique(labels), path.name) == "dlmuse"
        groups = to_groups(labels, "dlmuse", path.name)
        share = np.bincount(groups[groups > 0], minlength=len(GROUPS)) / (groups > 1).sum()
        assert 0.3 < share[GROUPS.index("cortex")] < 0.55 and 0.25 < share[GROUPS.index("white")] < 0.5
        assert 0.002 < share[GROUPS.index("medial_temporal")] < 0.02 < share[GROUPS.index("cerebellum")] < 0.2


def test_tissues_of_dlmuse_are_its_own_sums(data3d: Path) -> None:
    """The program's sums 601 (grey) and 604 (white, with the ventral diencephalon) are those of our tissues."""
    scheme = SCHEMES["dlmuse"]
    with (data3d / "ixi2mm" / "DLMUSE_Volumes.csv").open() as file:
        for row in csv.DictReader(file):
            of = {name: 0.0 for name in STRUCTURES}
            for number, structure in scheme.items():
                of[structure] += float(row.get(str(number), 0))
            grey = sum(of[s] for s, (_, tissue) in STRUCTURES.items() if tissue == "grey")
            white = sum(of[s] for s, (_, tissue) in STRUCTURES.items() if tissue == "white")
            assert grey == pytest.approx(float(row["601"]), abs=1)
            assert white + of["ventral_dc"] == pytest.approx(float(row["604"]), abs=1)


def test_real_head_maps_agree_with_the_names_of_their_authors(data3d: Path) -> None:
    folder = data3d / "synthseg_labels"
    words = {
        "cortex": "cerebral cortex", "ventricle": "ventricle", "cerebellar_grey": "cerebellum cortex",
        "cerebellar_white": "cerebellum white matter", "white": "cerebral white matter", "brainstem": "brain-stem",
        "ventral_dc": "ventral DC",
    }  # fmt: skip
    generation, target = np.load(folder / "generation_labels.npy"), np.load(folder / "synthseg_segmentation_labels.npy")
    for number, segmented, name in zip(generation, target, np.load(folder / "synthseg_segmentation_names.npy")):
        structure = SCHEMES["synthseg_head"][int(number)]
        if segmented:
            assert structure == SCHEMES["synthseg"][int(segmented)]
            assert words.get(structure, "") in name
        else:
            assert name == "background" and structure in ("outside", "outer_csf", "unclear")
    labels = nifti.read(next(iter(sorted(folder.glob("*.nii.gz")))), labels=True)[0].voxels[::2, ::2, ::2]
    assert guess_scheme(np.unique(labels)) == "synthseg_head"
    assert set(np.unique(to_groups(labels, "synthseg_head", "head"))) == set(range(-1, len(GROUPS)))
