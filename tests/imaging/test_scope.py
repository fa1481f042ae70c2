"""Scope of a scan: an ordinary head passes, what is none is told by name."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from brainfm.errors import ScanError
from brainfm.imaging.scope import ORDINARY, beyond, measures, strange, widened
from brainfm.volume import Volume
from tests import phantoms

SHAPE = (48, 60, 56)
AFFINE = phantoms.centred(np.eye(3), (4, 4, 4), SHAPE)
HEAD = np.square(phantoms.world_mm(SHAPE, AFFINE) / (76, 96, 88)).sum(axis=-1) < 1
INNER = ndimage.binary_erosion(HEAD, iterations=4)


def scan(voxels: np.ndarray) -> Volume:
    return Volume(voxels.astype(np.float32), AFFINE)


@pytest.fixture(scope="module")
def ordinary() -> np.ndarray:
    """Grey that varies over a centimetre or two, within an ellipsoid."""
    rough = np.random.default_rng(0).standard_normal(SHAPE)
    smooth = ndimage.gaussian_filter(rough, 2)
    return np.where(HEAD, 300 + 60 * smooth / smooth.std(), 0)


def test_an_ordinary_head_passes_with_and_without_skull_in_any_unit(ordinary: np.ndarray) -> None:
    assert strange(scan(ordinary)) == []
    assert strange(scan(ordinary * 1e-3 + 5)) == []
    found = measures(scan(ordinary))
    assert found["width_mm"] == pytest.approx(152, abs=8) and found["depth_mm"] == pytest.approx(192, abs=8)
    assert found["head_ml"] == pytest.approx(HEAD.sum() * 0.064, rel=0.05) and found["cut"] == 0
    assert found["smooth"] > 0.7


def test_a_finer_grid_measures_the_same(ordinary: np.ndarray) -> None:
    fine = np.repeat(np.repeat(np.repeat(ordinary, 2, 0), 2, 1), 2, 2)
    affine = phantoms.centred(np.eye(3), (2, 2, 2), fine.shape)
    found, coarse = measures(Volume(fine.astype(np.float32), affine)), measures(scan(ordinary))
    loose = {"head_ml": 0.25}  # averaging takes half a voxel more of the rim in
    assert {k: pytest.approx(v, rel=loose.get(k, 0.1)) for k, v in found.items()} == coarse


def test_what_is_no_ordinary_head_is_told(ordinary: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    x, y, z = (n // 2 for n in SHAPE)
    ct = np.where(HEAD, 900.0, -1000.0)
    ct[INNER] = 35 + 5 * rng.standard_normal(INNER.sum())
    left, upper = ordinary.copy(), ordinary.copy()
    left[x:], upper[:, :, :z] = 0, 0
    for voxels, said in (
        (np.where(INNER, 5, ordinary), "values within the head spread"),  # a skull with nothing in it
        (ct, "Hounsfield units"),
        (ct + 1000, "values within the head spread"),
        (left, "the head is wide, in mm, 7"),
        (upper, "the head is high, in mm, 8"),
        (np.where(HEAD, rng.rayleigh(1, SHAPE), 0), "neighbouring voxels correlate by"),
        (rng.rayleigh(1, SHAPE), "neighbouring voxels correlate by"),
        (np.zeros(SHAPE), "all voxels have the value 0"),
    ):
        assert any(said in phrase for phrase in strange(scan(voxels))), (said, strange(scan(voxels)))
    for part in (ordinary[:x], ordinary[:, y:], ordinary[:, :, :z]):
        cut = Volume(np.ascontiguousarray(part.astype(np.float32)), AFFINE)
        assert any("field of view cuts off" in phrase for phrase in strange(cut))
    below = Volume(np.ascontiguousarray(ordinary[:, :, 12:].astype(np.float32)), AFFINE)
    assert strange(below) == []  # the neck may be cut


def test_voxels_beyond_those_of_training_are_told(ordinary: np.ndarray) -> None:
    thick = phantoms.centred(np.eye(3), (4, 4, 8), (48, 60, 28))
    assert "voxels of 4 x 4 x 8 mm" in strange(Volume(ordinary[:, :, ::2].astype(np.float32), thick))[0]


def test_a_scan_without_a_head_is_refused() -> None:
    lonely = np.zeros(SHAPE)
    lonely[3, 3, 3] = 1
    with pytest.raises(ScanError, match="there is no head"):
        measures(scan(lonely))


def test_ranges_are_widened_but_not_to_nothing() -> None:
    assert widened(100, 200) == (80, 225) and widened(180, 200) == (175, 205) and widened(-1, 1) == (-1.5, 1.5)
    assert beyond({"a": 1.0, "b": 5.0}, {"a": ("a of", 0, 2), "b": ("b of", 0, 2)}) == [
        "b of 5, ordinary heads have 0 to 2"
    ]
    assert all(low < high for _, low, high in ORDINARY.values())
