"""Augmentation: one spatial change for all that belongs together, artefacts as naive code makes them, all by number."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from brainfm.batch import Batch
from brainfm.data import augment
from brainfm.data.augment import ARTEFACTS, PRESETS, AugmentSpec, Draw, apply, augment_spec, draw
from brainfm.errors import ConfigError

OFF = AugmentSpec(flip=0, affine=0, intensity=0)
STRONG = AugmentSpec(flip=0.5, affine=1, rotate_deg=30, scale=0.2, elastic=1, intensity=1, bias=1, blur=1, low_res=1,
                     ghost=1, invert=0.5)  # fmt: skip
SPACE = replace(OFF, flip=0.5, affine=0.5, elastic=0.5, rotate_deg=30, scale=0.2)


def blob_batch(numbers: list[int], shape: tuple[int, int, int] = (24, 20, 16)) -> Batch:
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    blob = sum((a - c) ** 2 for a, c in zip(axes, (8, 10, 9))) < 16
    image = torch.from_numpy(blob.astype(np.float32))[None, None].repeat(len(numbers), 1, 1, 1, 1)
    label = torch.from_numpy(blob.astype(np.int64))[None].repeat(len(numbers), 1, 1, 1)
    return Batch(image=image, sample=torch.tensor(numbers), partner=2 * image, label=label)


def textured(numbers: list[int], contrasts: int = 1, shape: tuple[int, int, int] = (16, 14, 12)) -> Batch:
    """Smooth random heads in a background that is exactly constant; a partner of another texture."""
    rng = np.random.default_rng(0)
    scans = ndimage.gaussian_filter(rng.standard_normal((len(numbers), contrasts + 1, *shape)), (0, 0, 1, 1, 1)) * 4
    scans[..., :3, :, :] = scans[..., :, :, :2] = -9
    image = torch.from_numpy(scans.astype(np.float32))
    return Batch(image[:, :contrasts].clone(), torch.tensor(numbers), partner=image[:, contrasts:].clone())


def only(artefact: str, **strengths: float) -> AugmentSpec:
    """A spec with nothing but this artefact; of those that share a probability the others get no strength."""
    if artefact in ("gain", "offset", "gamma", "noise"):
        still = {"gain_factor": 1.0, "offset_std": 0.0, "gamma_power": 1.0, "noise_std": 0.0}
        del still[next(name for name in still if name.startswith(artefact))]
        return replace(OFF, intensity=1.0, **still, **strengths)
    return replace(OFF, **{artefact: 1.0}, **strengths)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_the_number_alone() -> None:
    batch = textured([5, 9, 2])
    together = apply(batch, draw(batch, STRONG, seed=1))
    for row, number in enumerate((5, 9, 2)):
        one = Batch(batch.image[row : row + 1], torch.tensor([number]), partner=batch.partner[row : row + 1])
        alone = apply(one, draw(one, STRONG, seed=1))
        assert torch.allclose(together.image[row], alone.image[0], atol=1e-4)
        assert torch.allclose(together.partner[row], alone.partner[0], atol=1e-4)
    assert not torch.allclose(together.image[0], together.image[1])
    again = apply(batch, draw(batch, STRONG, seed=2))
    assert not torch.allclose(together.image, again.image)


def test_an_image_is_changed_alike_with_and_without_a_partner() -> None:
    batch = textured([5, 9])
    without = replace(batch, partner=None)
    with_partner = apply(batch, draw(batch, STRONG, 1))
    assert torch.allclose(with_partner.image, apply(without, draw(without, STRONG, 1)).image, atol=1e-4)


def test_one_artefact_more_leaves_the_draws_of_the_others() -> None:
    batch = textured(list(range(20)))
    few = draw(batch, replace(OFF, blur=0.4, affine=0.3), 0)
    more = draw(batch, replace(OFF, blur=0.4, affine=0.3, bias=0.5, intensity=0.5), 0)
    assert [few.scans[i] for i in few.hits["blur"].rows] == [more.scans[i] for i in more.hits["blur"].rows]
    assert torch.equal(few.hits["blur"].values, more.hits["blur"].values)
    assert few.warped == more.warped and torch.equal(few.theta, more.theta)


def test_artefacts_strike_as_often_as_they_should() -> None:
    batch = Batch(torch.zeros(600, 1, 2, 2, 2), torch.arange(600), partner=torch.zeros(600, 1, 2, 2, 2))
    spec = PRESETS["full"]
    drawn = draw(batch, spec, 0)
    for name in ARTEFACTS:
        share = len(drawn.hits[name].rows) / 1200 if name in drawn.hits else 0.0
        assert abs(share - spec.probability(name)) < 0.04, name
    assert abs(len(drawn.warped) / 600 - (1 - 0.7 * 0.8)) < 0.06
    assert abs(len(drawn.flipped) / 600 - 0.5 * 0.7 * 0.8) < 0.06


# ---- space -----------------------------------------------------------------------------------------------------------


def test_partner_and_labels_move_with_the_image() -> None:
    batch = blob_batch(list(range(12)))
    batch = replace(batch, regions=batch.label + 4, lesion=batch.label.to(torch.int8))
    drawn = draw(batch, SPACE, seed=0)
    assert drawn.flipped and drawn.warped and len(drawn.flipped) + len(drawn.warped) < 12, "the seed shows all cases"
    moved = apply(batch, drawn)
    assert torch.allclose(moved.partner, 2 * moved.image, atol=1e-5)
    assert ((moved.image[:, 0] > 0.5) == (moved.label == 1)).float().mean() > 0.99
    inside = moved.regions != -1
    assert torch.equal(moved.regions[inside], moved.label[inside] + 4)
    assert torch.equal(moved.lesion[inside].long(), moved.label[inside])
    assert (moved.lesion[~inside] == -1).all() and (moved.label[~inside] == 0).all() and (~inside).any()
    assert (moved.label != batch.label).any()
    assert (moved.regions.dtype, moved.lesion.dtype) == (torch.int64, torch.int8)


def test_samples_that_stay_are_not_touched() -> None:
    batch = textured(list(range(30)))
    drawn = draw(batch, replace(OFF, affine=0.3, flip=0.3, blur=0.2), 0)
    changed = apply(batch, drawn)
    moved = {*drawn.flipped, *drawn.warped}
    still = [b for b in range(30) if b not in moved]
    images = {row for row in drawn.scans if row < 30}
    partners = {row - 30 for row in drawn.scans if row >= 30}
    assert 0 < len(images) < len(still) and any(b in partners and b not in images for b in still)
    for b in still:
        assert torch.equal(changed.image[b], batch.image[b]) == (b not in images)
        assert torch.equal(changed.partner[b], batch.partner[b]) == (b not in partners)


def test_flip_is_left_right_and_exact() -> None:
    batch = replace(textured([0, 1, 2, 3]), label=torch.randint(0, 5, (4, 16, 14, 12)))
    flipped = apply(batch, draw(batch, replace(OFF, flip=1.0), seed=0))
    assert torch.equal(flipped.image, batch.image.flip(2)) and torch.equal(flipped.partner, batch.partner.flip(2))
    assert torch.equal(flipped.label, batch.label.flip(1))


def coordinates(drawn: Draw, row: int, shape: tuple[int, int, int]) -> np.ndarray:
    """[3, X, Y, Z] voxel coordinates that a sample is read at, from the definition of the draw, voxel by voxel."""
    theta = drawn.theta[row].double().numpy()[::-1][:, [2, 1, 0, 3]]  # to the order X, Y, Z
    found = np.zeros((3, *shape))
    for voxel in np.ndindex(*shape):
        place = np.array([(2 * v + 1) / n - 1 for v, n in zip(voxel, shape)])
        if drawn.elastic is not None:
            weights = []
            for v, n in zip(voxel, shape):
                at = (v + 0.5) / n * (drawn.elastic.shape[-1] - 3)
                knots = np.abs(np.arange(drawn.elastic.shape[-1]) - 1 - at)
                near = knots < 1
                weights.append(np.where(near, (4 - 6 * knots**2 + 3 * knots**3) / 6, np.clip(2 - knots, 0, 2) ** 3 / 6))
            bend = np.einsum("iabc,a,b,c->i", drawn.elastic[row].double().numpy(), *weights)
            place = place + bend[::-1]
        place = theta[:, :3] @ place + theta[:, 3]
        found[(slice(None), *voxel)] = [((p + 1) * n - 1) / 2 for p, n in zip(place, shape)]
    return found


@pytest.mark.parametrize("spec", [
    replace(OFF, affine=1.0, rotate_deg=25, scale=0.2, flip=0.5),
    replace(OFF, elastic=1.0, elastic_strength=0.9),
    replace(OFF, affine=1.0, elastic=1.0, flip=1.0),
])  # fmt: skip
def test_warp_is_what_scipy_makes_of_the_same_coordinates(spec: AugmentSpec) -> None:
    shape = (12, 10, 14)
    rng = np.random.default_rng(1)
    image = ndimage.gaussian_filter(rng.standard_normal(shape), 1).astype(np.float32)
    label = ndimage.zoom(rng.integers(0, 6, (6, 5, 7)), 2, order=0)
    batch = Batch(torch.from_numpy(image)[None, None].repeat(2, 1, 1, 1, 1), torch.tensor([3, 8]),
                  label=torch.from_numpy(label)[None].repeat(2, 1, 1, 1))  # fmt: skip
    drawn = draw(batch, spec, 0)
    moved = apply(batch, drawn)
    for row in range(2):
        at = coordinates(drawn, row, shape)
        expected = ndimage.map_coordinates(image, at, order=1, mode="nearest")
        assert np.allclose(moved.image[row, 0], expected, atol=2e-5)
        nearest = ndimage.map_coordinates(label, np.rint(at), order=0, mode="constant", cval=0)
        clear = (np.abs(at - np.floor(at) - 0.5) > 1e-4).all(0)  # halves may round either way
        assert np.array_equal(moved.label[row].numpy()[clear], nearest[clear]) and clear.mean() > 0.99
        assert not np.allclose(expected, image, atol=0.1)


def test_displacements_do_not_fold() -> None:
    batch = Batch(torch.zeros(6, 1, 20, 20, 20), torch.arange(6))
    drawn = draw(batch, replace(OFF, elastic=1.0, elastic_strength=1.0), 0)
    grid = augment._grid(drawn.theta, drawn.elastic, (20, 20, 20)).flip(-1).double().numpy() * 10
    slopes = np.stack([np.stack(np.gradient(grid[..., i], axis=(1, 2, 3))) for i in range(3)])
    determinant = np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1)))
    assert determinant.min() > 0 and determinant.max() > 1.2


def test_rotation_keeps_volume_and_scale_changes_it() -> None:
    batch = blob_batch(list(range(20)), (24, 24, 24))
    turned = apply(batch, draw(batch, replace(OFF, affine=1, rotate_deg=20, scale=0), seed=0))
    volumes = turned.label.flatten(1).sum(1) / batch.label.flatten(1).sum(1)
    assert ((volumes - 1).abs() < 0.12).all()


# ---- artefacts -------------------------------------------------------------------------------------------------------


def naive(artefact: str, scan: np.ndarray, value: Any) -> np.ndarray:
    """One artefact on one scan [X, Y, Z], as one would write it first."""
    floor = scan.min()
    height = scan - floor
    head = height > 1e-3 * height.max()
    if artefact == "gain":
        return scan * value
    if artefact == "offset":
        return scan + value
    if artefact == "invert":
        return np.where(head, scan.max() - height, floor)
    if artefact == "gamma":
        return (height / height.max()) ** value * height.max() + floor
    if artefact == "bias":
        shape, n = scan.shape, value.shape[-1]
        field = np.zeros(shape)
        for voxel in np.ndindex(*shape):
            at = [(v + 0.5) / length * (n - 3) for v, length in zip(voxel, shape)]
            far = [np.abs(np.arange(n) - 1 - a) for a in at]
            w = [np.where(d < 1, (4 - 6 * d**2 + 3 * d**3) / 6, np.clip(2 - d, 0, 2) ** 3 / 6) for d in far]
            field[voxel] = np.einsum("abc,a,b,c", value, *w)
        return height * np.exp(field) + floor
    if artefact == "blur":
        inside = ndimage.gaussian_filter(np.ones(scan.shape), value, mode="constant", truncate=9)
        return ndimage.gaussian_filter(height, value, mode="constant", truncate=9) / inside + floor
    if artefact == "low_res":
        for axis, factor in enumerate(value):
            scan = np.moveaxis(thick(np.moveaxis(scan, axis, 0), factor), 0, axis)
        return scan
    if artefact == "ghost":
        share, axis, shift = value
        ghosted = (1 - share) * height + share / 2 * (np.roll(height, shift, axis) + np.roll(height, -shift, axis))
        return np.where(head, ghosted, height) + floor
    raise AssertionError(artefact)


def thick(scan: np.ndarray, factor: float) -> np.ndarray:
    """Slices along the first axis: each the mean of 1000 thin ones, read back by np.interp."""
    length = len(scan)
    count = max(1, round(length / factor))
    fine = np.repeat(scan, count, axis=0).reshape(count, length, *scan.shape[1:]).mean(1)
    middles = (np.arange(count) + 0.5) * length / count - 0.5
    flat = fine.reshape(count, -1)
    read = [np.interp(np.arange(length), middles, flat[:, i]) for i in range(flat.shape[1])]
    return np.stack(read, axis=1).reshape(scan.shape)


STRENGTHS = {"gain": {"gain_factor": 2.0}, "offset": {"offset_std": 1.0}, "gamma": {"gamma_power": 2.0},
             "blur": {"blur_vox": 2.0}, "low_res": {"low_res_factor": 5.0}}  # fmt: skip


@pytest.mark.parametrize("artefact", [a for a in ARTEFACTS if a != "noise"])
def test_artefact_is_what_naive_code_makes(artefact: str) -> None:
    batch = textured(list(range(4)))
    drawn = draw(batch, only(artefact, **STRENGTHS.get(artefact, {})), 0)
    assert drawn.scans == tuple(range(8)) and drawn.theta is None and not drawn.flipped
    changed = apply(batch, drawn)
    before, after = (torch.cat([b.image, b.partner]).flatten(0, 1).double().numpy() for b in (batch, changed))
    values = drawn.hits[artefact].values
    for i in range(8):
        value = values[i].double().numpy() if isinstance(values, torch.Tensor) else values[i]
        expected = naive(artefact, before[i], value)
        assert np.allclose(after[i], expected, atol=1e-4), (i, np.abs(after[i] - expected).max())
    assert np.abs(after - before).max() > 0.1
    assert not torch.allclose(changed.image[0], batch.image[0]) and not torch.allclose(changed.image, changed.partner)


def test_noise_is_rician() -> None:
    from scipy import stats

    scan = torch.full((1, 24, 24, 24), 5.0)
    near = torch.zeros(1, 1, 1, 1)
    for level, std in ((5.0, 1.0), (0.5, 1.0)):
        noisy = augment._noise(scan / 5 * level, [(std, 7)], near)
        assert stats.kstest(noisy.flatten().numpy(), stats.rice(level / std, scale=std).cdf).pvalue > 0.01
    assert torch.equal(augment._noise(scan, [(1.0, 7)], near), augment._noise(scan, [(1.0, 7)], near))
    assert not torch.allclose(augment._noise(scan, [(1.0, 7)], near), augment._noise(scan, [(1.0, 8)], near))


@pytest.mark.parametrize("artefact", ["bias", "gamma", "invert", "ghost", "noise"])
def test_the_background_stays_flat(artefact: str) -> None:
    batch = textured([1, 2, 3])
    changed = apply(batch, draw(batch, only(artefact), 0))
    air = batch.image == -9
    assert torch.allclose(changed.image[air], torch.tensor(-9.0), atol=1e-5)
    assert (changed.image[~air] != batch.image[~air]).float().mean() > 0.9


def test_intensity_is_independent_for_the_scans_of_a_pair_and_leaves_labels() -> None:
    batch = blob_batch(list(range(4)))
    changed = apply(batch, draw(batch, replace(OFF, intensity=1.0), seed=0))
    assert changed.label is batch.label
    assert not torch.allclose(changed.partner, 2 * changed.image, atol=0.05)


# ---- what must not happen --------------------------------------------------------------------------------------------


def test_nothing_drawn_nothing_changed() -> None:
    batch = blob_batch([1, 2])
    before = batch.image.clone()
    assert apply(batch, draw(batch, OFF, seed=0)) is batch and torch.equal(batch.image, before)


def test_the_batch_that_came_is_not_written_to() -> None:
    batch = replace(textured(list(range(6))), regions=torch.ones(6, 16, 14, 12, dtype=torch.int64))
    kept = {f.name: getattr(batch, f.name).clone() for f in fields(batch) if getattr(batch, f.name) is not None}
    apply(batch, draw(batch, STRONG, 0))
    assert all(torch.equal(getattr(batch, name), value) for name, value in kept.items())


def test_absent_contrasts_stay_zero_and_absent_fields_none() -> None:
    batch = textured(list(range(6)), contrasts=3)
    present = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    present[:, 0] = True
    batch = replace(batch, image=batch.image * present[:, :, None, None, None], present=present, partner=None)
    changed = apply(batch, draw(batch, STRONG, 0))
    assert (changed.image[~present] == 0).all() and (~present).any()
    assert all((changed.image[b, m] != 0).any() for b, m in present.nonzero().tolist())
    assert changed.label is None and changed.regions is None and changed.partner is None and changed.lesion is None
    assert torch.equal(changed.present, present)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stays_finite_and_keeps_its_dtype_also_under_autocast(dtype: torch.dtype) -> None:
    batch = textured(list(range(12)))
    low = replace(batch, image=batch.image.to(dtype), partner=batch.partner.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        changed = apply(low, draw(low, STRONG, 0))
    assert changed.image.dtype == changed.partner.dtype == dtype
    assert torch.isfinite(changed.image).all() and torch.isfinite(changed.partner).all()
    full = apply(batch, draw(batch, STRONG, 0))
    tolerance = {torch.float16: 0.02, torch.bfloat16: 0.15, torch.float32: 1e-5}[dtype]  # of the input's rounding
    assert (changed.image.float() - full.image).abs().mean() < tolerance


def test_a_flat_patch_stays_finite() -> None:
    batch = Batch(torch.full((4, 1, 8, 8, 8), -1.5), torch.arange(4))
    assert torch.isfinite(apply(batch, draw(batch, STRONG, 0)).image).all()


# ---- configuration ---------------------------------------------------------------------------------------------------


def test_what_a_configuration_may_say() -> None:
    assert augment_spec(None) is None and augment_spec("none") is None and augment_spec({}) is None
    assert augment_spec("full") == PRESETS["full"] and augment_spec("light") == PRESETS["light"]
    assert augment_spec({"flip": 0.1}) == AugmentSpec(flip=0.1)
    assert augment_spec({"preset": "full", "ghost": 0}) == replace(PRESETS["full"], ghost=0)


@pytest.mark.parametrize("value, sentence", [
    ("strong", "augment='strong': expected one of none, light, full, or a mapping"),
    ({"preset": "none", "flip": 1}, "augment.preset='none' beside other keys"),
    ({"ghosts": 0.1}, "unknown augment key 'ghosts', expected one of preset, flip"),
    ({"flip": -0.1}, "augment.flip=-0.1: expected a number from 0 to 1"),
    ({"bias": 1.5}, "augment.bias=1.5: expected a number from 0 to 1"),
    ({"gain_factor": 0.5}, "augment.gain_factor=0.5: expected a number from 1 to 10"),
    ({"noise_std": "much"}, "augment.noise_std=much: expected a number from 0 to 10"),
    ({"flip": float("nan")}, "augment.flip=nan"),
    ({"flip": True}, "augment.flip=True"),
])  # fmt: skip
def test_refusals(value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        augment_spec(value)
    assert sentence in str(refused.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits() -> None:
    batch = replace(textured(list(range(8))), label=torch.ones(8, 16, 14, 12, dtype=torch.int64))
    drawn, moved = draw(batch, STRONG, 0), batch.to("cuda")
    apply(moved, drawn)  # the first call sets up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = apply(moved, drawn)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    without_noise = replace(STRONG, noise_std=0.0)  # each device has random numbers of its own
    here, there = (apply(b, draw(b, without_noise, 0)) for b in (batch, moved))
    assert (here.image - there.image.cpu()).abs().mean() < 0.02
    assert (here.label != there.label.cpu()).float().mean() < 0.001
