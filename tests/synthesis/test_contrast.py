"""Rendered contrasts: tissues in their order, borders where they were, left on the left, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from brainfm import seeds
from brainfm.errors import ConfigError, ScanError
from brainfm.imaging import nifti
from brainfm.synthesis.contrast import SIGNALS, Appearance, draw, render
from brainfm.volume import Volume

TISSUE_OF = {1: "csf", 2: "grey", 3: "grey", 4: "white", 5: "white", 6: "deep_grey"}
LEVEL = {0: 0.0, 1: 300.0, 2: 700.0, 3: 740.0, 4: 1000.0, 5: 1040.0, 6: 860.0}
EDGE = 48


def head(seed: int = 0) -> tuple[Volume, Volume]:
    """A T1 and labels: shells of CSF, grey and white matter, odd ids on the right; a skull of bone and bright skin."""
    axes = np.meshgrid(*[np.arange(EDGE) - (EDGE - 1) / 2] * 3, indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    right = axes[0] > 0
    labels = np.zeros((EDGE,) * 3, np.int32)
    labels[radius < 17] = 1
    labels[radius < 15] = 2
    labels[(radius < 15) & right] = 3
    labels[radius < 11] = 4
    labels[(radius < 11) & right] = 5
    labels[(np.abs(axes[0] + 6) < 3) & (np.abs(axes[1]) < 3) & (np.abs(axes[2]) < 3)] = 6  # on the left
    t1 = np.vectorize(LEVEL.get)(labels).astype(float)
    t1[(radius >= 17) & (radius < 19)] = 60
    t1[(radius >= 19) & (radius < 21)] = 1200
    rng = np.random.default_rng(seed)
    t1 = np.where(t1 > 0, t1 + 25 * rng.standard_normal(t1.shape), 0).clip(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    return Volume(t1.astype(np.float32), affine), Volume(labels, affine)


def plain(contrast: str, seed: int = 0, **changes: float) -> Appearance:
    """Without what a scanner adds."""
    look = draw(seeds.stream(seed, "contrast"), contrast, TISSUE_OF)
    return replace(look, bias_log=0.0, noise=0.0, blur_vox=0.0, gain=1.0, **changes)


@pytest.mark.parametrize("contrast", SIGNALS)
def test_a_draw_keeps_the_order_of_tissues_and_is_different_every_time(contrast: str) -> None:
    order = sorted(SIGNALS[contrast], key=SIGNALS[contrast].__getitem__)
    looks = [draw(seeds.stream(seed, "contrast"), contrast, TISSUE_OF) for seed in range(20)]
    for look in looks:
        assert sorted(look.tissues, key=look.tissues.__getitem__) == order
        for label, tissue in TISSUE_OF.items():
            assert look.regions[label] == pytest.approx(look.tissues[tissue], rel=0.04)
    assert len({look.tissues["grey"] for look in looks}) == len({look.regions[2] for look in looks}) == 20
    assert looks[0].regions[2] != looks[0].regions[3]
    assert draw(seeds.stream(3, "contrast"), contrast, TISSUE_OF) == looks[3]


def test_what_is_known_of_the_contrasts() -> None:
    t2, flair, pd = (SIGNALS[name] for name in ("t2", "flair", "pd"))
    assert t2["csf"] > t2["grey"] > t2["white"] and flair["grey"] > flair["white"] > flair["csf"]
    assert pd["grey"] > pd["csf"] > pd["white"]
    for signals in (t2, flair, pd):
        assert signals["grey"] > signals["deep_grey"] > signals["pallidum"]  # iron


@pytest.mark.parametrize("contrast", SIGNALS)
def test_regions_get_the_means_that_were_drawn(contrast: str) -> None:
    t1, labels = head()
    look = plain(contrast)
    image = render(t1, labels, TISSUE_OF, look)
    assert image.voxels.dtype == np.float32 and np.array_equal(image.affine_mm, t1.affine_mm)
    for label in (2, 3, 4, 5, 6):
        inner = ndimage.binary_erosion(labels.voxels == label)
        assert np.median(image.voxels[inner]) == pytest.approx(look.regions[label], rel=0.04), label
    csf = np.median(image.voxels[labels.voxels == 1])
    assert csf == pytest.approx(look.tissues["csf"], rel=0.15)  # two voxels thin, beside bone


def test_borders_stay_where_they_were() -> None:
    t1, labels = head()
    look = plain("t2")
    image = render(t1, labels, TISSUE_OF, look).voxels
    middle = (look.tissues["grey"] + look.tissues["white"]) / 2
    grey, white = np.isin(labels.voxels, (2, 3)), np.isin(labels.voxels, (4, 5))
    assert (image[grey] > middle).mean() > 0.97 and (image[white] < middle).mean() > 0.97
    shifted = np.roll(white, 1, axis=1) & grey  # the outermost layer of grey, where a shift by a voxel would show
    assert shifted.any() and (image[shifted] > middle).mean() > 0.9


def test_texture_follows_the_t1_with_the_sign_of_the_contrast() -> None:
    t1, labels = head()
    for contrast, sign in (("t2", -1), ("flair", -1), ("pd", -1)):  # all of them invert grey and white matter
        image = render(t1, labels, TISSUE_OF, plain(contrast)).voxels
        inner = ndimage.binary_erosion(labels.voxels == 4, iterations=2)
        assert np.sign(np.corrcoef(t1.voxels[inner], image[inner])[0, 1]) == sign


def test_left_stays_left() -> None:
    t1, labels = head()
    image = render(t1, labels, TISSUE_OF, plain("t2")).voxels
    there = labels.voxels == 6
    assert np.abs(image[there] - image[::-1][there]).mean() > 0.03, "the deep nucleus has no counterpart on the right"
    mirrored = render(Volume(t1.voxels[::-1], t1.affine_mm), Volume(labels.voxels[::-1], t1.affine_mm), TISSUE_OF,
                      plain("t2"))  # fmt: skip
    assert np.allclose(mirrored.voxels[::-1], image, atol=1e-5)


def test_background_is_zero_and_the_head_outside_the_brain_is_not() -> None:
    t1, labels = head()
    for contrast in SIGNALS:
        look = draw(seeds.stream(1, "contrast"), contrast, TISSUE_OF)
        image = render(t1, labels, TISSUE_OF, look).voxels / look.gain
        assert (image[ndimage.binary_erosion(t1.voxels == 0)] == 0).all()
        skin = t1.voxels > 1100
        skin[labels.voxels > 0] = False
        bone = (t1.voxels < 150) & (t1.voxels > 0) & (labels.voxels == 0)
        assert image[skin].mean() > 0.25 and image[skin].mean() > 1.5 * image[bone].mean()


def test_csf_that_the_labels_left_out_is_csf() -> None:
    t1, labels = head()
    fewer = labels.voxels.copy()
    upper = np.arange(EDGE)[None, None, :] > EDGE // 2
    fewer[(fewer == 1) & upper] = 0
    lost = (labels.voxels == 1) & (fewer == 0) & ndimage.binary_dilation(fewer > 0)
    beyond = (labels.voxels == 0) & ndimage.binary_dilation(labels.voxels > 0)  # bone, no CSF
    for contrast, bright in (("t2", True), ("flair", False)):
        look = plain(contrast)
        image = render(t1, Volume(fewer, t1.affine_mm), TISSUE_OF, look).voxels
        middle = (look.tissues["csf"] + look.tissues["grey"]) / 2
        share = (image[lost] > middle).mean()
        assert share > 0.85 if bright else share < 0.15
        assert np.median(image[beyond]) < 0.5 * max(look.tissues["csf"], look.tissues["grey"])


def test_deterministic_by_seed() -> None:
    t1, labels = head()
    images = [
        render(t1, labels, TISSUE_OF, draw(seeds.stream(seed, "contrast"), "flair", TISSUE_OF)).voxels
        for seed in (4, 4, 5)
    ]
    assert np.array_equal(images[0], images[1]) and not np.allclose(images[0], images[2], rtol=0.02)


def test_refusals() -> None:
    t1, labels = head()
    rng = seeds.stream(0, "contrast")
    with pytest.raises(ConfigError, match="contrast 't3' cannot be rendered, expected one of t2, flair, pd"):
        draw(rng, "t3", TISSUE_OF)
    with pytest.raises(ConfigError, match="unknown tissue 'bone', expected one of csf"):
        draw(rng, "t2", {1: "bone"})
    look = plain("t2")
    with pytest.raises(ScanError, match="expected both on one grid"):
        render(t1, Volume(labels.voxels[1:], labels.affine_mm), TISSUE_OF, look)
    with pytest.raises(ScanError, match="expected csf < grey < white"):
        render(Volume(1300 - t1.voxels, t1.affine_mm), labels, TISSUE_OF, look)
    with pytest.raises(ScanError, match="no voxel is labelled csf"):
        render(t1, Volume(np.where(labels.voxels == 1, 0, labels.voxels), t1.affine_mm), TISSUE_OF, look)
    with pytest.raises(ScanError, match="no voxel is labelled csf"):
        render(t1, Volume(np.zeros_like(labels.voxels), t1.affine_mm), TISSUE_OF, look)


def test_a_real_subject(data3d: Path) -> None:
    """Grey matter, white matter and CSF of a real T1 come out in the order of the contrast."""
    folder = data3d / "ixi2mm" / "IXI012-HH-1211"
    if not folder.is_dir():
        pytest.skip("no ixi2mm here")
    t1, _ = nifti.read(folder / f"{folder.name}_T1w.nii.gz")
    labels, _ = nifti.read(folder / f"{folder.name}_DLMUSE_dseg.nii.gz", labels=True)
    tissue_of = {1: "csf", **dict.fromkeys((49, 50, 51, 52), "csf"), **dict.fromkeys(range(81, 96), "white"),
                 **dict.fromkeys(range(100, 208), "grey")}  # fmt: skip
    for contrast, order in (("t2", ["white", "grey", "csf"]), ("flair", ["csf", "white", "grey"])):
        image = render(t1, labels, tissue_of, draw(seeds.stream(0, "contrast"), contrast, tissue_of)).voxels
        medians = {
            tissue: np.median(image[np.isin(labels.voxels, [i for i in tissue_of if tissue_of[i] == tissue])])
            for tissue in order
        }
        assert sorted(medians, key=medians.__getitem__) == order
