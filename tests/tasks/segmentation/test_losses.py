"""The losses against naive loops and a reference, and where their gradients would break."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from brainfm.errors import ConfigError
from brainfm.tasks.segmentation.losses import (
    LOSSES,
    SegmentationLoss,
    class_shares,
    deep_loss,
    focal_loss,
    segmentation_loss,
    soft_dice_loss,
    tversky_loss,
)


def drawn(classes=3, shape=(2, 4, 3, 2)):
    torch.manual_seed(0)
    return torch.randn(shape[0], classes, *shape[1:]), torch.randint(classes, shape)


def voxels(label):
    return itertools.product(*[range(n) for n in label.shape])


def sums(probabilities, label, k):
    """tp, fp, fn of a class by loops."""
    both = false = missed = 0.0
    for b, x, y, z in voxels(label):
        p, true = probabilities[b, k, x, y, z].item(), label[b, x, y, z].item() == k
        both, false, missed = both + p * true, false + p * (not true), missed + (1 - p) * true
    return both, false, missed


@pytest.mark.parametrize(("alpha", "beta", "power"), [(0.3, 0.7, 1.0), (0.3, 0.7, 0.75), (1.0, 0.2, 0.5)])
def test_tversky_against_loops(alpha, beta, power):
    logits, label = drawn()
    probabilities = torch.softmax(logits, dim=1)
    terms = []
    for k in (1, 2):
        both, false, missed = sums(probabilities, label, k)
        terms.append((1 - (both + 1e-5) / (both + alpha * false + beta * missed + 1e-5)) ** power)
    found = tversky_loss(probabilities, label, alpha, beta, power).item()
    assert found == pytest.approx(sum(terms) / 2, abs=1e-6)


def test_tversky_with_halves_is_soft_dice():
    logits, label = drawn()
    probabilities = torch.softmax(logits, dim=1)
    dice = soft_dice_loss(probabilities, label, smooth=2e-5)
    assert tversky_loss(probabilities, label, 0.5, 0.5).item() == pytest.approx(dice.item(), abs=1e-6)


def test_tversky_is_monais():
    losses = pytest.importorskip("monai.losses")
    reference = losses.TverskyLoss(
        include_background=False, to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7, batch=True,
        smooth_nr=1e-5, smooth_dr=1e-5,
    )  # fmt: skip
    logits, label = drawn()
    ours = tversky_loss(torch.softmax(logits, dim=1), label, 0.3, 0.7).item()
    assert ours == pytest.approx(reference(logits, label[:, None]).item(), abs=1e-6)


def test_a_missed_voxel_costs_more_than_a_false_one():
    label = torch.zeros(1, 4, 4, 4, dtype=torch.long)
    label[0, 1:3, 1:3, 1:3] = 1
    missing, too_many = label.clone(), label.clone()
    missing[0, 1, 1, 1], too_many[0, 0, 0, 0] = 0, 1
    cost = [tversky_loss(torch.stack([1 - m, m], 1).float(), label, 0.3, 0.7).item() for m in (missing, too_many)]
    assert cost[0] > cost[1] > 0


@pytest.mark.parametrize("gamma", [0.0, 2.0, 0.5])
def test_focal_against_loops(gamma):
    logits, label = drawn()
    probabilities = torch.softmax(logits, dim=1)
    total = 0.0
    for b, x, y, z in voxels(label):
        p = probabilities[b, label[b, x, y, z], x, y, z].item()
        total += (1 - p) ** gamma * -math.log(p)
    assert focal_loss(logits, label, gamma).item() == pytest.approx(total / label.numel(), abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_shares_that_are_whole_give_what_indices_give(name):
    logits, label = drawn()
    shares = torch.nn.functional.one_hot(label, 3).permute(0, 4, 1, 2, 3).float()
    spec = SegmentationLoss(name)
    by_index, by_share = segmentation_loss(logits, label, spec), segmentation_loss(logits, shares, spec)
    assert by_index.total.item() == pytest.approx(by_share.total.item(), abs=1e-6)
    assert by_index.total.item() == pytest.approx(sum(p.item() for p in by_index.parts.values()))
    assert not any(p.requires_grad for p in by_index.parts.values())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("certain", [0.0, 60.0])
def test_gradients_stay_finite_without_foreground_and_where_all_is_right(name, certain):
    label = torch.zeros(2, 4, 4, 4, dtype=torch.long)
    for foreground in (0, 8):
        label.view(-1)[:foreground] = 1
        logits = torch.zeros(2, 2, 4, 4, 4)
        logits.scatter_(1, label[:, None], certain)
        logits.requires_grad_()
        terms = segmentation_loss(logits, label, SegmentationLoss(name))
        terms.total.backward()
        assert torch.isfinite(terms.total) and torch.isfinite(logits.grad).all()
        if certain and foreground:
            assert terms.total.item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_give_a_float32_loss(name):
    logits, label = drawn()
    rounded = logits.bfloat16()
    terms = segmentation_loss(rounded, label, SegmentationLoss(name))
    assert terms.total.dtype == torch.float32
    assert terms.total.item() == segmentation_loss(rounded.float(), label, SegmentationLoss(name)).total.item()


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_finds_a_small_lesion(name):
    """Eight voxels of 4096, told by intensity alone: one weight and one bias have to be learned."""
    torch.manual_seed(1)
    label = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    label[0, 4:6, 4:6, 4:6] = 1
    image = torch.randn(1, 1, 16, 16, 16) * 0.2 + label[:, None] * 2.0
    weight, bias = torch.zeros(2, 1, 1, 1, 1, requires_grad=True), torch.tensor([4.6, 0.0], requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.2)
    for _ in range(60):
        optimizer.zero_grad()
        logits = torch.nn.functional.conv3d(image, weight, bias)
        segmentation_loss(logits, label, SegmentationLoss(name)).total.backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), label)


def test_class_shares_count_voxels_and_keep_what_is_small():
    _, label = drawn(3, (2, 4, 8, 4))
    shares = class_shares(label, 3, 2)
    assert shares.shape == (2, 3, 2, 4, 2)
    assert torch.allclose(shares.sum(1), torch.ones(2, 2, 4, 2))
    cube = label[1, 2:4, 4:6, 0:2]
    for k in range(3):
        assert shares[1, k, 1, 2, 0].item() == pytest.approx((cube == k).sum().item() / 8)
    speck = torch.zeros(1, 8, 8, 8, dtype=torch.long)
    speck[0, 3, 3, 3] = 1
    assert class_shares(speck, 2, 8)[0, 1].item() == pytest.approx(1 / 512)


def test_deep_loss_weighs_levels():
    logits, label = drawn(3, (2, 8, 8, 8))
    spec = SegmentationLoss(deep_supervision=True)
    coarser = [torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 2, 2, 2)]

    def loss(answer, target):
        return segmentation_loss(answer, target, spec)

    terms = deep_loss(logits, coarser, label, loss)
    levels = [loss(logits, label).total] + [
        loss(c, class_shares(label, 3, s)).total for c, s in zip(coarser, (2, 4), strict=True)
    ]
    expected = sum(weight * level.item() for weight, level in zip((4 / 7, 2 / 7, 1 / 7), levels, strict=True))
    assert terms.total.item() == pytest.approx(expected, abs=1e-6)
    assert terms.parts["coarser"].item() == pytest.approx(expected - 4 / 7 * levels[0].item(), abs=1e-6)
    assert deep_loss(logits, [], label, loss).total.item() == pytest.approx(levels[0].item())


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"name": "bce"}, "task.loss='bce': expected one of dice_ce"),
        ({"name": "tversky", "beta": 0.0}, "beta > 0"),
        ({"power": 0.0}, "0 < power <= 1"),
        ({"gamma": -1.0}, "gamma >= 0"),
    ],
)
def test_refusals(values, text):
    with pytest.raises(ConfigError, match=text):
        SegmentationLoss(**values)
