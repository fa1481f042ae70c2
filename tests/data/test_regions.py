"""The fine vocabulary agrees with the coarse one, and merged answers hold their classes."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.data import regions, schemes
from brainfm.errors import ManifestError
from brainfm.synthesis.looks import FAMILIES

GROUP_OF = {
    "csf": "background", "head": "background", "background": "background", "thalamus": "deep_grey",
    "caudate": "deep_grey", "putamen": "deep_grey", "pallidum": "deep_grey", "accumbens": "deep_grey",
    "ventral_dc": "deep_grey", "hippocampus": "medial_temporal", "amygdala": "medial_temporal",
    "brainstem": "brainstem", "cerebellar_cortex": "cerebellum", "cerebellar_white": "cerebellum",
    **dict.fromkeys(regions.VENTRICLES, "ventricles"), **dict.fromkeys(regions.CORTEX, "cortex"),
    **dict.fromkeys(regions.WHITE, "white"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["synthseg", "freesurfer", "synthseg_head", "dlmuse", "brainfm"])
def test_a_fine_class_lies_in_the_coarse_group_that_the_scheme_tells(scheme: str) -> None:
    table = schemes.lookup(scheme, "groups")
    for number, name in regions.SCHEMES[scheme].items():
        if number >= len(table) or table[number] < 0 or name in ("outside_or_csf", "any_outside"):
            continue
        group = schemes.GROUPS[table[number]]
        members = regions.MERGED.get(name, (name,))
        assert {GROUP_OF[member] for member in members} == {group}, (number, name, group)


def test_every_id_that_a_scheme_gives_a_group_has_a_fine_target_or_tells_nothing() -> None:
    table = regions.targets_of("dlmuse")
    told = [i for i in schemes.SCHEMES["dlmuse"] if i < len(table) and table[i] != regions.IGNORE]
    assert len(told) == len(schemes.SCHEMES["dlmuse"]) - 5  # fornix, basal forebrain, chiasm
    assert regions.TARGETS[table[47]] == regions.TARGETS[table[48]] == "hippocampus"


def test_47_classes_with_ids_of_their_own_and_merged_answers_made_of_them() -> None:
    assert len(regions.REGIONS) == len(set(regions.REGIONS.values())) == 47 and len(regions.CORTEX) == 25
    for of in regions.merged_members():
        assert of and max(of) < 47 and len(set(of)) == len(of)
    assert schemes.guess_scheme(regions.REGIONS.values()) == "brainfm"


def test_gyri_are_rendered_alike_and_the_outside_by_what_the_scan_shows() -> None:
    table = regions.renders_of("dlmuse")
    cortex = {int(table[i]) for i, name in regions.SCHEMES["dlmuse"].items() if name in regions.CORTEX}
    assert cortex == {regions.RENDERED.index("cortex")}
    assert table[0] == regions.BY_INTENSITY and regions.renders_of("synthseg_head")[0] == 0
    scan = np.array([-2.0, -1.95, -1.0, 0.0, 2.0]).reshape(5, 1, 1)
    tissue = np.full((5, 1, 1), regions.BY_INTENSITY, np.uint8)
    tissue[3] = 3
    drawn = [regions.RENDERED[i] for i in regions.outside_by_intensity(tissue, scan).ravel()]
    assert drawn == ["air", "air", "cluster0", "cortex", "cluster4"]
    assert len(regions.RENDERED_FAMILIES) == len(regions.RENDERED) and regions.RENDERED_FAMILIES.max() < len(FAMILIES)


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(ManifestError, match="scheme 'lobes' is not known, expected one of tissue"):
        regions.targets_of("lobes")
