"""Baselines: no look at held-out labels, linear maps of a random encoder are exact, what can be learnt is learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from brainfm.data.store import Store
from brainfm.nets.untrained import random_backbone
from brainfm.scoring.masks import dice
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation import baselines as voxels
from brainfm.tasks.segmentation.cases import find_cases, whole_case
from brainfm.tasks.whole_head import baselines as heads
from brainfm.tasks.whole_head.cases import SessionCase

VALUE = TaskSpec("regression", "score", ("flair", "t1"), (), (16, 16, 16), view_mm=6.0)
CLASS = replace(VALUE, kind="classification", target="ill", values=("no", "yes"), mode="exclusive")
LESION = TaskSpec("segmentation", "lesion", ("flair", "t1"), (0, 1), (16, 16, 16))
TINY = {"name": "unet_tiny"}


def scan_cases(store: Store) -> list[SessionCase]:
    return [
        SessionCase(case.session, case.scans, np.zeros(1, np.float32), None)
        for case in find_cases(store, ("flair", "t1"), "lesion")[0]
    ]


def splits(n: int, k: int) -> list[tuple[list[int], list[int]]]:
    return [([i for i in range(n) if i % k != f], [i for i in range(n) if i % k == f]) for f in range(k)]


def cohort(seed: int = 0, n: int = 40) -> tuple[np.ndarray, list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6)), [f"p{i}" for i in range(n)], rng.normal(0, 0.3, n)


def test_linear_answers_learn_values_classes_and_labels() -> None:
    x, groups, noise = cohort()
    values = 50 + 10 * (x[:, 0] - x[:, 1] + noise)
    found = heads.linear_answers(x, values, groups, splits(40, 2), VALUE, 0)
    assert found.shape == (40,) and np.corrcoef(found, values)[0, 1] > 0.8
    classes = (x[:, 2] + noise > 0).astype(float)
    p = heads.linear_answers(x, classes, groups, splits(40, 2), CLASS, 0)
    assert p.shape == (40, 2) and p.sum(axis=1) == pytest.approx(1)
    assert ((p[:, 1] > 0.5) == classes).mean() > 0.75
    three = np.digitize(x[:, 3], (-0.5, 0.5)).astype(float)
    spec = replace(CLASS, values=("a", "b", "c"), mode="ordinal")
    assert heads.linear_answers(x, three, groups, splits(40, 2), spec, 0).shape == (40, 3)
    labels = np.stack([classes, 1 - classes], axis=1)
    labels[:8, 1] = np.nan
    both = replace(spec, mode="multilabel", values=("u", "v"))
    many = heads.linear_answers(x, labels, groups, splits(40, 2), both, 0)
    assert many.shape == (40, 2) and np.isfinite(many).all()
    assert many[:, 0] == pytest.approx(p[:, 1]) and np.corrcoef(many[:, 0], many[:, 1])[0, 1] < -0.5


def test_a_held_out_answer_depends_on_training_labels_alone() -> None:
    x, groups, _ = cohort(1)
    y = np.random.default_rng(2).normal(size=40)
    split = [(list(range(10, 30)), list(range(10)))]
    found = heads.linear_answers(x, y, groups, split, VALUE, 0)
    changed = y.copy()
    changed[:10] += 100
    changed[30:] += 100
    assert np.isnan(found[10:]).all()
    assert (heads.linear_answers(x, changed, groups, split, VALUE, 0)[:10] == found[:10]).all()
    changed[15] += 100
    assert (heads.linear_answers(x, changed, groups, split, VALUE, 0)[:10] != found[:10]).any()


def test_a_rare_number_throws_nobody_far_away() -> None:
    x, groups, noise = cohort(3)
    y = 50 + 10 * x[:, 0] + noise
    x[:, 5] *= 1e-6
    x[7, 5] = 1.0  # held out, it lies a million deviations from the training rows
    found = heads.linear_answers(x, y, groups, splits(40, 4), VALUE, 0)
    assert abs(found[7] - y[7]) < 15


def test_without_any_number_the_answer_is_that_of_the_training_side() -> None:
    y = np.arange(8.0)
    found = heads.linear_answers(np.zeros((8, 0)), y, [f"p{i}" for i in range(8)], splits(8, 2), VALUE, 0)
    assert found.tolist() == pytest.approx([4, 3] * 4)


def test_features_of_a_store_answer_what_they_hold(toy_store: Store) -> None:
    cases = scan_cases(toy_store)
    truth = np.arange(6.0)
    found = heads.feature_baseline(toy_store, cases, truth, splits(6, 3), VALUE, 0)
    assert found.shape == (6,) and np.isfinite(found).all()
    assert (heads.feature_baseline(toy_store, cases, truth, splits(6, 3), VALUE, 0) == found).all()


def test_region_labels_are_shared_and_never_the_target(people_store: Store, toy_store: Store) -> None:
    cases = find_cases(people_store, ("t1", "t2"), "tissue")[0]
    spec = TaskSpec("regression", "age", ("t1", "t2"), (), (16, 16, 16))
    assert heads.region_labels(cases, spec) == ("tissue_labels",)
    assert heads.region_labels(cases, replace(spec, target="tissue")) == ()
    assert heads.region_labels(scan_cases(toy_store), VALUE) == ()  # a lesion mask is an annotation, not anatomy


def test_a_random_encoder_is_the_seed_s_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = random_backbone(TINY, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = random_backbone(TINY, 3), random_backbone(TINY, 4)
    same = [torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values())]
    assert all(same) and not one.training and not any(p.requires_grad for p in one.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_pooled_features_are_means_and_deviations_of_the_deepest_map(toy_store: Store) -> None:
    from brainfm.study.descriptors import table
    from brainfm.tasks.whole_head.cases import views_of

    backbone, cases = random_backbone(TINY, 0), scan_cases(toy_store)
    found = heads.pooled_features(backbone, toy_store, cases, VALUE)
    rows = []
    for case in cases:
        image, present = views_of(toy_store, case, VALUE)
        row = {}
        for m, contrast in enumerate(VALUE.contrasts):
            if present[m]:
                with torch.no_grad():
                    deepest = backbone.features(torch.from_numpy(image[0, m])[None, None])[-1][0].flatten(1).double()
                pooled = [*deepest.mean(1).tolist(), *deepest.std(1, correction=0).tolist()]
                row |= {f"{contrast}/whole{e:04d}": v for e, v in enumerate(pooled)}
        rows.append(row)
    assert found == pytest.approx(table(rows)[0], abs=1e-6)
    answers = heads.random_linear_heads(toy_store, cases, np.arange(6.0), splits(6, 3), VALUE, 0, backbone_config=TINY)
    assert answers.shape == (6,) and np.isfinite(answers).all()


def test_features_at_voxels_are_those_of_upsampled_maps() -> None:
    rng = np.random.default_rng(0)
    sizes = [(1, e, 16 // s, 8 // s, 24 // s) for e, s in ((2, 1), (3, 4))]
    maps = [torch.from_numpy(rng.normal(size=size).astype(np.float32)) for size in sizes]
    places = torch.from_numpy(np.stack([rng.integers(n, size=50) for n in (16, 8, 24)], axis=1))
    found = voxels.features_at(maps, places, (16, 8, 24))
    up = [functional.interpolate(m, (16, 8, 24), mode="trilinear", align_corners=False)[0] for m in maps]
    expected = torch.cat([u[:, places[:, 0], places[:, 1], places[:, 2]].T for u in up], dim=1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_random_voxels_weigh_upsampled_features_and_ignore_what_is_absent() -> None:
    rng = np.random.default_rng(1)
    backbone = random_backbone(TINY, 0)
    width = sum(backbone.widths)
    weight, mean, bias = rng.normal(size=(2, 3, width)), rng.normal(size=(2, width)), rng.normal(size=3)
    network = voxels.RandomVoxels(backbone, weight, mean, bias).eval()
    image = torch.from_numpy(rng.normal(size=(2, 2, 16, 16, 16)).astype(np.float32))
    present = torch.tensor([[True, True], [False, True]])
    found = network(image, present)
    every = torch.stack(torch.meshgrid(*[torch.arange(16)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    for b, shown in enumerate(([0, 1], [1])):
        total = torch.from_numpy(bias).float().expand(16**3, 3).clone()
        for m in shown:
            with torch.no_grad():
                rows = voxels.features_at(backbone.features(image[b : b + 1, m : m + 1]), every, (16,) * 3)
            total += (rows - torch.from_numpy(mean[m]).float()) @ torch.from_numpy(weight[m]).float().T
        assert torch.allclose(found[b].flatten(1).T, total, atol=1e-3)
    other = image.clone()
    other[1, 0] = 99
    assert torch.equal(network(other, present), found)


@pytest.mark.parametrize("how", ["features", "random"])
def test_segmenters_find_the_bright_lesion_of_heads_they_have_not_seen(toy_store: Store, how: str) -> None:
    cases = find_cases(toy_store, LESION.contrasts, "lesion")[0]
    trained, held = cases[1:5], [cases[0], cases[5]]  # the first lacks a contrast
    if how == "features":
        predict = voxels.voxel_baseline(toy_store, trained, LESION, 0)
    else:
        predict = voxels.random_linear_voxels(toy_store, trained, LESION, TINY, 0, patches=8)
    scores = []
    for case in held:
        found, true = predict(case), whole_case(toy_store, case, LESION.values)[2]
        assert found.shape == true.shape and found.dtype == np.uint8
        scores.append(dice(found, true))
    assert scores[1] > (0.8 if how == "features" else 0.5)
    again = (
        voxels.voxel_baseline(toy_store, trained, LESION, 0)
        if how == "features"
        else voxels.random_linear_voxels(toy_store, trained, LESION, TINY, 0, patches=8)
    )
    assert (again(held[1]) == predict(held[1])).all()


def test_the_offset_is_the_one_of_the_best_dice_on_training_cases(toy_store: Store) -> None:
    """A model that tells every voxel's class but for a shift gets the share of the shift that mends it."""
    case = find_cases(toy_store, LESION.contrasts, "lesion")[0][1]
    true = whole_case(toy_store, case, LESION.values)[2].ravel()
    shift = np.array([0.0, 8.0])  # between 1.5 and 5.5 of it mend the logits
    logits = np.stack([np.where(true == 0, 4.5, 2.5), np.where(true == 1, 1.0, -1.0)])
    model = voxels.VoxelModel(np.zeros((2, 1)), np.zeros(2), shift)
    slabs = [logits[:, :100], logits[:, 100:]]
    chosen = voxels._with_offset(model, [(lambda: iter(slabs), case)], toy_store, LESION)
    scores = [dice((logits + o * shift[:, None]).argmax(0), true) for o in voxels._OFFSETS]
    assert chosen.offset == 0.25 and scores[0] == 0 and scores[1] == 1 and scores[3] < 1


def test_a_class_that_is_never_seen_is_never_told() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 2)).astype(np.float32)
    y = np.where(x[:, 0] > 0, 2, 0)
    model = voxels._fitted(x, y, np.array([0.7, 0.0, 0.3]))
    logits = model.weight @ x.T + model.bias[:, None] + model.prior[:, None]
    assert set(logits.argmax(axis=0)) == {0, 2} and (logits.argmax(axis=0) == y).mean() > 0.9
