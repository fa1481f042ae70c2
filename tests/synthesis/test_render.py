"""Renderings: what a label map looks like, in any contrast, and where a view is cut out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.synthesis.looks import FAMILIES, KINDS, Look, draw_look
from brainfm.synthesis.render import blurred, paint, render_views
from brainfm.synthesis.settings import LookSpec

NAMES = ["air", "fluid", "cortex", "white", "outside", "outside"]
CLASSES = np.array([FAMILIES.index(name) for name in NAMES])
WINDOW, PATCH = 10, (8, 8, 8)


def batch(rendered=((True, True), (False, True)), real=(True, True), numbers=(4, 9)) -> Batch:
    rng = np.random.default_rng(0)
    tissue = torch.from_numpy(rng.integers(0, 6, (2, WINDOW, WINDOW, WINDOW)).astype(np.uint8))
    shares = np.stack([np.bincount(t.flatten().numpy(), minlength=6) for t in tissue]).astype(np.float32)
    shares[:, 0] = 0
    place = torch.arange(WINDOW**3).reshape(WINDOW, WINDOW, WINDOW)
    return Batch(
        image=torch.from_numpy(rng.normal(size=(2, 1, WINDOW, WINDOW, WINDOW)).astype(np.float32)),
        partner=torch.from_numpy(rng.normal(size=(2, 1, WINDOW, WINDOW, WINDOW)).astype(np.float32)),
        sample=torch.tensor(numbers),
        regions=torch.stack([place, place]),
        lesion=torch.zeros(2, WINDOW, WINDOW, WINDOW, dtype=torch.int8),
        tissue=tissue,
        tissue_shares=torch.from_numpy(shares / shares.sum(axis=1, keepdims=True)),
        rendered=torch.tensor(rendered),
        real=torch.tensor(real),
        corners=torch.tensor([[[0, 1, 2], [2, 0, 1]], [[1, 1, 1], [0, 2, 0]]]),
        lesion_weight=torch.zeros(2, WINDOW, WINDOW, WINDOW),
    )


def render(one: Batch, **spec) -> Batch:
    return render_views(one, CLASSES, LookSpec(**{"strip": 0.0} | spec), PATCH, seed=1)


def test_views_are_cut_at_their_corners_and_a_real_view_keeps_every_bit() -> None:
    one = batch()
    views = render(one)
    assert torch.equal(views.image[1, 0], one.image[1, 0, 1:9, 1:9, 1:9])  # not rendered
    assert torch.equal(views.regions[0], one.regions[0, 0:8, 1:9, 2:10])
    assert torch.equal(views.partner_regions[0], one.regions[0, 2:10, 0:8, 1:9])
    shift = one.corners[0, 0] - one.corners[0, 1]
    v = torch.tensor([5, 3, 2])  # a voxel of image, and where partner shows it
    assert views.regions[0][tuple(v)] == views.partner_regions[0][tuple(v + shift)]
    assert views.tissue is None and views.lesion_weight is None


def test_a_rendering_is_a_function_of_the_sample_alone() -> None:
    both, turned = render(batch()), batch()
    swapped = Batch(**{
        name: value.flip(0) if (value := getattr(turned, name)) is not None else None
        for name in ("image", "partner", "sample", "regions", "lesion", "tissue", "tissue_shares", "rendered", "real",
                     "corners", "lesion_weight")
    })  # fmt: skip
    assert torch.equal(render(swapped).image.flip(0), both.image)
    assert not torch.equal(render(batch(numbers=(5, 9))).image[0], both.image[0])
    assert not torch.equal(both.image[0], both.partner[0])  # two looks


def test_paint_is_means_plus_grain_plus_texture_plus_lesion() -> None:
    tissue = torch.randint(0, 6, (6, 6, 6))
    means = np.array([0, 0.2, 0.5, 0.9, 0.3, 0.7], np.float32)
    look = Look("free", means, np.zeros(6, np.float32), 0.5, 0.0)
    scan, lesion = torch.randn(6, 6, 6), torch.zeros(6, 6, 6)
    lesion[2, 3, 4] = 1
    found = paint(tissue, look, torch.Generator(), texture_of=scan, lesion=lesion, shift=0.4)
    height = (scan - scan.min()) / (scan.max() - scan.min())
    level = height[tissue > 0].sum() / (tissue > 0).sum()
    for x, y, z in np.ndindex(6, 6, 6):
        expected = means[tissue[x, y, z]]
        if tissue[x, y, z] > 0:
            expected += 0.5 * float(height[x, y, z] - level) + 0.4 * float(lesion[x, y, z])
        assert float(found[x, y, z]) == pytest.approx(max(0, expected), abs=1e-5)


def test_a_rendering_is_standardised_by_the_whole_head_and_not_by_its_window() -> None:
    one = batch(rendered=((True, True), (True, True)))
    views = render(one, texture=0.0, noise=0.0, blur_vox=0.0)
    look = draw_look(seeds.stream(1, "look", 4, 0), CLASSES, LookSpec(strip=0.0, texture=0.0, noise=0.0, blur_vox=0.0))
    shares = one.tissue_shares[0].numpy()
    mean = (shares * look.means).sum()
    std = np.sqrt((shares * look.means**2).sum() - mean**2)
    painted = torch.from_numpy(look.means)[one.tissue[0, 0:8, 1:9, 2:10].long()]
    assert torch.allclose(views.image[0, 0], (painted - mean) / std, atol=1e-4)


def test_a_stripped_head_is_air_outside_the_brain_in_both_views() -> None:
    one = batch(rendered=((True, False), (True, False)))
    views = render(one, strip=1.0, blur_vox=0.0)
    for b, corners in enumerate(one.corners):
        for view, image in enumerate((views.image, views.partner)):
            box = tuple(slice(c, c + 8) for c in corners[view])
            away = one.tissue[b][box] >= 4
            assert len(image[b, 0][away].unique()) == 1
            assert image[b, 0][away].max() <= image[b, 0].min() + 1e-6


def test_blur_is_gaussian_and_keeps_a_constant() -> None:
    from scipy.ndimage import gaussian_filter

    image = torch.randn(9, 9, 9)
    expected = gaussian_filter(image.numpy(), 1.2, mode="nearest", radius=3)
    assert np.allclose(blurred(image, 1.2).numpy(), expected, atol=1e-4)
    assert torch.allclose(blurred(torch.full((5, 5, 5), 3.0), 0.7), torch.full((5, 5, 5), 3.0), atol=1e-5)


def test_looks_lie_about_their_kind_and_air_is_nothing() -> None:
    rng = np.random.default_rng(0)
    looks = [draw_look(rng, CLASSES, LookSpec()) for _ in range(300)]
    assert {look.kind for look in looks} == set(KINDS)
    for kind, sign in (("t1", 1), ("t2", -1)):
        of = [look.means for look in looks if look.kind == kind]
        assert np.mean([sign * (m[3] - m[1]) > 0 for m in of]) > 0.95  # white above fluid on T1, below on T2
    free = np.array([look.means for look in looks if look.kind == "free"])
    assert 0.3 < np.mean(free[:, 3] > free[:, 1]) < 0.7
    assert all(look.means[0] == look.stds[0] == 0 for look in looks)


def test_tissues_of_a_kind_may_be_told_apart_less_and_fluid_stays() -> None:
    """The spread between cortex and white matter falls; without the key every number is as it was."""
    plain, flat = LookSpec(free_share=0.0, family_std=0.0, class_std=0.0), {}
    looks = {least: [draw_look(seeds.stream(0, "look", n), CLASSES, replace(plain, least_contrast=least))
                     for n in range(80)] for least in (1.0, 0.0)}  # fmt: skip
    for least, of in looks.items():
        t2 = [look.means for look in of if look.kind == "t2"]
        assert len(t2) > 5 and all(abs(m[1] - 1) < 1e-6 for m in t2)  # fluid
        flat[least] = np.array([m[2] / m[3] for m in t2])  # cortex to white
    assert np.allclose(flat[1.0], 0.60 / 0.38)
    assert flat[0.0].min() >= 1 and flat[0.0].max() <= 0.60 / 0.38 + 1e-6 and np.ptp(flat[0.0]) > 0.3


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"data\.looks\.strip=2: expected a number from 0 to 1"):
        LookSpec(strip=2)
    with pytest.raises(ConfigError, match=r"data\.looks\.blur_vox=9: expected 0 to 3 voxels"):
        LookSpec(blur_vox=9)
