"""dense_split: each term against a plain loop, no term met by a constant, every switch switches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.dense_split import (
    DenseSplit,
    lesion_errors,
    matching_errors,
    overlap,
    overlap_points,
    region_errors,
    thin,
)
from brainfm.objectives.objective import build_objective
from brainfm.objectives.settings import DenseSplitSettings
from brainfm.settings import keys_of

PATCH = (16, 16, 16)
CLASSES, MERGED = ("out", "in", "rim"), [[1, 2]]


def objective(**changes) -> DenseSplit:
    torch.manual_seed(0)
    changes = {"classes": CLASSES, "merged": MERGED, "volumes": 2, "points": 24, "mask_unit_vox": 4} | changes
    built = build_objective("dense_split", build_backbone("unet_tiny"), patch_vox=PATCH, seed=0, **changes)
    assert isinstance(built, DenseSplit)
    return built


def batch(count: int = 2, **changes) -> Batch:
    """Two pictures of one random map a sample, b cut two voxels further along X and one less along Z."""
    rng = torch.Generator().manual_seed(1)
    window = F.interpolate(torch.rand((count, 1, 5, 5, 5), generator=rng), size=20, mode="trilinear")
    label = (window[:, 0] * 3).long().clamp(max=2)
    corners = torch.tensor([[[0, 2, 3], [2, 2, 2]]]).repeat(count, 1, 1)

    def cut(values: torch.Tensor, view: int) -> torch.Tensor:
        x, y, z = corners[0, view].tolist()
        return values[..., x : x + 16, y : y + 16, z : z + 16].contiguous()

    values = {
        "image": cut(window, 0) * 2 - 1, "partner": 1 - cut(window, 1), "sample": torch.arange(count) + 3,
        "regions": cut(label, 0), "partner_regions": cut(label, 1), "corners": corners,
        "lesion": (cut(label, 0) == 2).to(torch.int8), "partner_lesion": (cut(label, 1) == 2).to(torch.int8),
        "voxel_mm": torch.full((count,), 2.0), "volumes": torch.randn((count, 2), generator=rng),
    }  # fmt: skip
    return Batch(**{**values, **changes})


def test_region_errors_equal_a_loop_over_voxels_with_merged_labels() -> None:
    logits = torch.randn(2, 3, 4, 3, 2, dtype=torch.float64)
    target = torch.randint(-1, 4, (2, 4, 3, 2))  # 3 is merged: class 1 or 2
    p = logits.softmax(dim=1).numpy()
    losses = []
    for v in range(2):
        entropy, known = 0.0, 0
        both, claimed, sizes = np.zeros(4), np.zeros(4), np.zeros(4)
        for place in np.ndindex(4, 3, 2):
            t = int(target[(v, *place)])
            if t < 0:
                continue
            probability = [*p[(v, slice(None), *place)], p[(v, 1, *place)] + p[(v, 2, *place)]]
            entropy -= np.log(probability[t])
            known += 1
            claimed += probability
            both[t] += probability[t]
            sizes[t] += 1
        dice = [(2 * both[t] + 1) / (sizes[t] + claimed[t] + 1) for t in range(4) if sizes[t]]
        losses.append(entropy / known + 1 - np.mean(dice))
    assert float(region_errors(logits, target, MERGED)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_views_without_any_known_voxel_count_nothing() -> None:
    logits, target = torch.randn(2, 3, 4, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4, 4))
    target[1] = -1
    one = region_errors(logits, target, MERGED)
    assert float(one.detach()) == pytest.approx(float(region_errors(logits[:1].detach(), target[:1], MERGED)))
    one.backward()
    assert logits.grad is not None and not logits.grad[1].any()


def test_matching_errors_equal_a_loop() -> None:
    rng = np.random.default_rng(0)
    n, width = 14, 30.0
    one, other = rng.normal(size=(2, n, 5))
    label, place = rng.integers(-1, 3, n), rng.uniform(0, width, (n, 3))
    centre = np.concatenate([one, other]).mean(axis=0)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one - centre, other - centre))
    losses, right = [], []
    for i in range(n):
        for from_a in (True, False):
            logits = {}
            for j in range(n):
                x, y, z = place[j]
                same = label[i] == label[j] and label[i] >= 0
                mirrored = np.linalg.norm(place[i] - [width - x, y, z])
                if j != i and (same or np.linalg.norm(place[i] - place[j]) < 8 or mirrored < 8):
                    continue
                logits[j] = (a[i] @ b[j] if from_a else b[i] @ a[j]) / 0.2
            losses.append(-logits[i] + np.log(sum(np.exp(v) for v in logits.values())))
            if from_a:
                right.append(logits[i] == max(logits.values()))
    loss, share = matching_errors(
        torch.from_numpy(one), torch.from_numpy(other), torch.from_numpy(label), torch.from_numpy(place).float(),
        temperature=0.2, apart_mm=8.0, width_mm=width,
    )  # fmt: skip
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(share) == pytest.approx(np.mean(right), abs=1e-6)


def test_a_constant_feature_matches_no_better_than_chance() -> None:
    n, place = 50, torch.rand(50, 3) * 1000
    constant = torch.ones(n, 4) * torch.tensor([3.0, 1.0, 2.0, 5.0])
    loss, right = matching_errors(
        constant, constant, torch.full((n,), -1), place, temperature=0.1, apart_mm=8.0, width_mm=1e6
    )
    assert float(loss) >= np.log(n) - 0.2 and float(right) < 2 / n + 0.02


def test_lesion_errors_weigh_lesion_and_the_rest_alike() -> None:
    logits, target = torch.randn(3, 4, 4, 4), torch.zeros(3, 4, 4, 4, dtype=torch.int8)
    target[0, 0, 0, :2], target[0, 3], target[2] = 1, -1, -1
    found = lesion_errors(logits, target)
    p = torch.sigmoid(logits[0])
    ill, well = -p[0, 0, :2].log().mean(), -(1 - p[(target[0] == 0)]).log().mean()
    seen = p[target[0] >= 0].sum()
    dice = (2 * p[0, 0, :2].sum() + 1) / (seen + 2 + 1)
    assert float(found[0]) == pytest.approx(float((ill + well) / 2 + 1 - dice), rel=1e-5)
    assert float(found[1]) == pytest.approx(float(-(1 - torch.sigmoid(logits[1])).log().mean()), rel=1e-5)
    assert float(found[2]) == 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_lattices_of_both_views_show_the_same_places(stride: int) -> None:
    """Along X the b begins two voxels later, along Z one earlier: whatever the phase, thinned overlaps agree."""
    asked = objective(stride=stride)
    place = torch.arange(20**3).reshape(1, 20, 20, 20).float()
    for number in range(8):
        one = batch(1, sample=torch.tensor([number]))
        x, y, z = one.corners[0].tolist()[0]
        u, v, w = one.corners[0].tolist()[1]
        views = asked._views(one)
        views = dataclasses.replace(
            views, image=torch.stack([place[:, x:, y:, z:][:, :16, :16, :16], place[:, u:, v:, w:][:, :16, :16, :16]])
        )
        some = asked._thinned(views, asked._phases(one, views))
        mine, its = overlap(some.corners[0], some.image.shape[2:])
        seen, other = some.image[0, 0][mine], some.image[1, 0][its]
        assert seen.numel() > 0.5 * some.image[0].numel() and torch.equal(seen, other)


def test_matched_points_are_one_place_in_both_views_and_never_air() -> None:
    one = batch(1)
    image = one.image[0, 0].clone()
    image[:8] = image.min() - 1  # air
    mine, other = overlap_points(image, one.regions[0], one.corners[0], 300, torch.Generator().manual_seed(0))
    assert (mine[:, 0] >= 8).all()
    for a, b in zip(mine[:50].tolist(), other[:50].tolist(), strict=True):
        assert one.image[0, 0][tuple(a)] == pytest.approx(-float(one.partner[0, 0][tuple(b)]) * 2 + 1, abs=1e-5)
    labels = one.regions[0][tuple(mine.t())].bincount(minlength=3)
    assert labels.min() > 60  # of three labels about a hundred each, whatever their sizes


def test_total_is_the_weighted_sum_and_every_parameter_learns() -> None:
    asked = objective(stride=2)
    terms = asked(batch(), 0.3)
    names = {"regions", "match", "self", "cross", "lesion", "volumes"}
    assert set(terms.parts) == names | {"match_right"}
    expected = sum(asked.weights[name] * float(terms.parts[name]) for name in names)
    assert float(terms.total.detach()) == pytest.approx(expected, rel=1e-5)
    terms.total.backward()
    assert all(p.grad is not None and p.grad.any() for p in asked.parameters())


@pytest.mark.parametrize("name", ["regions", "match", "cross", "lesion", "volumes"])
def test_a_term_of_weight_0_is_not_asked(name: str) -> None:
    terms = objective(**{f"{name}_weight": 0.0})(batch(), 0.0)
    assert name not in terms.parts or float(terms.parts[name]) == 0


def test_a_sample_gives_the_same_terms_in_any_batch() -> None:
    asked = objective(stride=2)
    both = batch(2)
    values = {f.name: v for f in dataclasses.fields(both) if (v := getattr(both, f.name)) is not None}
    alone = [asked(Batch(**{name: v[i : i + 1] for name, v in values.items()}), 0.0) for i in (0, 1)]
    together = asked(both, 0.0)
    for name in ("match", "self", "cross", "lesion", "regions"):
        mean = (alone[0].parts[name] + alone[1].parts[name]) / 2
        assert float(together.parts[name]) == pytest.approx(float(mean), rel=1e-4)


def test_the_code_is_global_and_the_anatomy_decides_where() -> None:
    """Recolouring is voxel by voxel: what is drawn at a place depends on that place's anatomy and the code alone."""
    asked = objective()
    anatomy, code = torch.randn(1, 32, 4, 4, 4), torch.randn(1, 12)
    drawn = asked.recolour(anatomy, code)
    changed = anatomy.clone()
    changed[..., 0, 0, 0] += 1
    difference = (asked.recolour(changed, code) - drawn).abs()[0, 0]
    assert difference[0, 0, 0] > 0 and difference.sum() == difference[0, 0, 0]
    dense, image = torch.randn(1, 48, 4, 4, 4), torch.randn(1, 1, 4, 4, 4)
    turned = asked.code(dense.flip(2), image.flip(2))
    assert torch.allclose(asked.code(dense, image), turned, atol=1e-5)  # a code knows no place


def test_without_label_maps_and_partners_the_other_terms_go_on() -> None:
    asked = objective(classes=None, merged=None, volumes=None)
    terms = asked(batch(regions=None, partner_regions=None, volumes=None), 0.0)
    assert {"match", "self", "cross", "lesion"} <= set(terms.parts) and "regions" not in terms.parts
    with pytest.raises(ConfigError, match="without label maps"):
        asked.predict_regions(batch().image)
    alone = objective()(batch(partner=None, corners=None, partner_regions=None, partner_lesion=None), 0.0)
    assert float(alone.parts["match"]) == float(alone.parts["cross"]) == 0 and torch.isfinite(alone.total)


def test_regions_and_codes_of_a_whole_image() -> None:
    asked = objective().eval()
    image = batch().image
    assert asked.predict_regions(image).shape == (2, 3, *PATCH)
    codes = asked.encode(image)
    assert codes["anatomy"].shape == (2, 32, *PATCH) and codes["contrast"].shape == (2, 12, 1, 1, 1)
    assert set(asked.pictures(batch())) >= {"input", "masked", "partner", "self", "cross", "regions", "predicted"}


def test_thinning_keeps_every_nth_voxel_from_each_rows_phase() -> None:
    values = torch.arange(2 * 64).reshape(2, 4, 4, 4)
    assert torch.equal(thin(values, [(0, 1, 0), (1, 1, 1)], 2)[1], values[1, 1::2, 1::2, 1::2])
    assert thin(values, [(0, 0, 0)] * 2, 1) is values


def test_settings_make_the_same_objective_again_and_refusals_are_sentences() -> None:
    asked = objective()
    assert set(asked.config) == set(keys_of(DenseSplitSettings)) - {"name"}
    again = objective(**asked.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in asked.state_dict().items()}
    for changes, words in (
        ({"parts": {"anatomy": 16, "pathology": 8, "free": 8}}, "expected anatomy with 32 channels or more"),
        ({"code": 20}, "expected 1 to 16 numbers for a contrast"),
        ({"stride": 3}, "expected a divisor of every edge"),
        ({"regions_weight": -1.0}, "expected weights of 0 or more"),
    ):
        with pytest.raises(ConfigError, match=words):
            objective(**changes)
