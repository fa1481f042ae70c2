"""A head's tissues: found on coarse phantoms whatever the contrast and grid, and not trusted where there is no head."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest

from brainfm.errors import ConfigError, ScanError
from brainfm.imaging import anatomy
from brainfm.imaging.anatomy import Tissues, segment
from brainfm.volume import Volume

pytest.importorskip("SimpleITK")
pytest.importorskip("nilearn")
from brainfm.synthesis.phantom import SyntheticSubject, subject

OBLIQUE = 2  # the phantom whose scans are tilted


@pytest.fixture(scope="module")
def person() -> SyntheticSubject:
    return subject(3, OBLIQUE, 4.0)


@pytest.fixture(scope="module", autouse=True)
def coarse() -> Iterator[None]:
    """4 mm throughout and half the turns: a tenth of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy, "_WORK_MM", 4.0)
        patch.setattr(anatomy, "_WARP_MM", 4.0)
        patch.setattr(anatomy, "_FIRST_TURNS", 5)
        patch.setattr(anatomy, "_STEPS", (4, 3))
        yield


@pytest.fixture(scope="module")
def found(person: SyntheticSubject) -> dict[str, Tissues]:
    return {contrast: segment(person.scans[contrast]) for contrast in ("t1", "t2")}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("contrast", ["t1", "t2"])
def test_tissues_of_a_tilted_phantom(person: SyntheticSubject, found: dict[str, Tissues], contrast: str) -> None:
    truth = person.tissue.voxels
    assert found[contrast].labels.shape == truth.shape and found[contrast].labels.dtype == np.uint8
    assert found[contrast].reason == ""
    for label, least in ((1, 0.7), (2, 0.8), (3, 0.8)):
        assert dice(found[contrast].labels == label, truth == label) > least


def test_left_stays_left(person: SyntheticSubject, found: dict[str, Tissues]) -> None:
    """People differ from their own mirror image by more than the labels may differ from the truth."""
    truth = person.tissue.voxels
    labels = found["t1"].labels
    assert (labels == truth).mean() > (labels[::-1] == truth).mean() + 0.05


def test_volumes_are_those_of_the_labels(person: SyntheticSubject, found: dict[str, Tissues]) -> None:
    volumes, labels = found["t1"].volumes_ml, found["t1"].labels
    assert volumes["gm"] == pytest.approx((labels == 2).sum() * 64 / 1000, rel=1e-6)
    assert volumes["icv"] == pytest.approx(volumes["csf"] + volumes["brain"])
    assert volumes["icv"] == pytest.approx((person.tissue.voxels > 0).sum() * 0.064, rel=0.1)


def test_noise_is_not_trusted() -> None:
    rng = np.random.default_rng(0)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    try:
        noise = segment(Volume(rng.gamma(2, 50, (44, 50, 44)).astype(np.float32), affine))
    except ScanError as error:  # a flag as well
        assert "no brain" in str(error)
    else:
        assert noise.reason


@pytest.mark.parametrize("shape", [(64, 64, 1), (20, 20, 20), (40, 40, 8)])
def test_flat_and_tiny_scans_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ScanError, match="expected a 3D scan of a whole brain"):
        segment(Volume(np.ones(shape, dtype=np.float32), np.diag([4.0, 4.0, 4.0, 1.0])))


GOOD = ({"csf": 250.0, "gm": 700.0, "wm": 500.0, "icv": 1450.0},
        {"information": 0.5, "contrast": 3.0, "confidence": 0.9, "agreement": 0.65, "folded": 0.0})  # fmt: skip


def test_a_plausible_head_is_trusted() -> None:
    quality, reason = anatomy._judged(*GOOD)
    assert reason == "" and quality > 0.7


@pytest.mark.parametrize(
    ("volumes", "checks", "says"),
    [
        ({"icv": 400.0}, {}, "intracranial volume of 400 ml"),
        ({"csf": 5.0}, {}, "csf fills 0%"),
        ({}, {"information": 0.05}, "mutual information"),
        ({}, {"contrast": 0.2}, "contrast of grey to white"),
        ({}, {"confidence": 0.5}, "mean posterior"),
        ({}, {"agreement": 0.3}, "agree by 0.30"),
        ({}, {"folded": 0.1}, "folds 10.0%"),
    ],
)
def test_each_check_has_its_reason(volumes: dict[str, float], checks: dict[str, float], says: str) -> None:
    _, reason = anatomy._judged(GOOD[0] | volumes, GOOD[1] | checks)
    assert says in reason


def test_without_simpleitk_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ConfigError, match=r"SimpleITK.*pip install 'brainfm-mri\[anatomy\]'"):
        anatomy.check_packages()
