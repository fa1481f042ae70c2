"""The template: what is missing is said, whatever the caller."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from brainfm.errors import ConfigError
from brainfm.imaging import atlas


def test_without_nilearn_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atlas, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"nilearn.*pip install 'brainfm-mri\[anatomy\]'"):
        atlas._template_file("gm")


def test_a_nilearn_without_the_maps_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(atlas, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))
    with pytest.raises(ConfigError, match="no ICBM152 wm map"):
        atlas._template_file("wm")


def test_grey_matter_of_the_template_is_as_much_left_as_right() -> None:
    pytest.importorskip("nilearn")
    maps, affine = atlas.tissue_maps(3.0)
    x = affine[0, 0] * np.arange(maps.shape[1]) + affine[0, 3]
    per_plane = maps[1].sum((1, 2))
    left, right = per_plane[x < 0].sum(), per_plane[x > 0].sum()
    assert abs(left - right) < 0.06 * (left + right)


def test_the_maps_are_made_once_and_cannot_be_changed() -> None:
    pytest.importorskip("nilearn")
    maps, _ = atlas.tissue_maps(3.0)
    assert atlas.tissue_maps(3.0)[0] is maps
    with pytest.raises(ValueError, match="read-only"):
        maps[0, 0, 0, 0] = 1
