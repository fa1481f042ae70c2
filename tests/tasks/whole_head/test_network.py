"""Views and contrasts that come and go, the losses against loops, and answers that can be read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import build_task
from brainfm.tasks.whole_head.network import WholeHeadOutput, WholeHeadTask, lesion_guidance

SPEC = TaskSpec(
    "classification", "disease", ("t1", "flair"), ("a", "b", "c"), (16, 8, 8), mode="exclusive", view_mm=4.0, crops=True
)
AGE = replace(SPEC, kind="regression", values=(), mode="", unit="years")
LABELS = replace(SPEC, mode="multilabel", values=("x", "y", "z"))
STAGES = replace(SPEC, mode="ordinal", values=("none", "mild", "moderate", "severe"))


def make_task(spec=SPEC, seed=0, **settings):
    torch.manual_seed(seed)
    task = build_task(spec, build_backbone("unet_tiny"), **settings)
    with torch.no_grad():  # attention starts equal; here it must tell tokens and contrasts apart
        torch.nn.init.normal_(task.pool.score.weight)
        for score in task.fusion.scores:
            torch.nn.init.normal_(score.weight)
        torch.nn.init.normal_(task.out.weight)
        if task.scale is not None:
            torch.nn.init.normal_(task.scale)
    return task.eval()


def views(cases=2, views=3, contrasts=2):
    return torch.randn(cases, views, contrasts, 16, 8, 8), torch.ones(cases, contrasts, dtype=torch.bool)


def batch_of(answer, lesion=None):
    answer = torch.tensor(answer, dtype=torch.float32)
    return Batch(torch.empty(len(answer), 1, 1, 1, 1, 1), torch.arange(len(answer)), answer=answer, lesion=lesion)


def output_of(logits):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    return WholeHeadOutput(logits, torch.ones(len(logits), 1, 1, 1, 1))


@pytest.mark.parametrize(("spec", "outputs"), [(SPEC, 3), (STAGES, 3), (LABELS, 3), (AGE, 1)])
def test_shapes(spec, outputs):
    task = make_task(spec)
    output = task(*views())
    assert output.logits.shape == (2, outputs)
    assert output.attention.shape == (2, 3, 4, 2, 2)
    assert torch.allclose(output.attention.flatten(1).sum(1), torch.ones(2), atol=1e-5)
    assert task.decode(output).shape == {"ordinal": (2, 4), "": (2,)}.get(spec.mode, (2, 3))


def test_attention_starts_equal_within_a_scale_and_between_scales():
    task = WholeHeadTask(SPEC, build_backbone("unet_tiny"))
    attention = task(*views(views=5))[1]
    assert torch.allclose(attention[:, 0].sum((1, 2, 3)), torch.tensor(0.5))
    assert torch.allclose(attention[:, 0], attention[:1, 0, :1, :1, :1]) and torch.allclose(
        attention[:, 1:], attention[:1, 1:2, :1, :1, :1]
    )


def test_equal_attention_gives_means_and_deviations_of_the_deepest_maps():
    task = WholeHeadTask(replace(SPEC, contrasts=("t1",)), build_backbone("unet", widths=[4, 6, 8, 10])).eval()
    image = torch.randn(1, 3, 1, 16, 16, 16)
    pooled = []
    task.norm.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    task(image, torch.ones(1, 1, dtype=torch.bool))
    means, deviations = [], []
    for level in (1, 2, 3):
        maps = task.backbone.features(image[0])[level].flatten(2)  # the whole head weighs as much as both windows
        mean = (maps[0].mean(1) + (maps[1].mean(1) + maps[2].mean(1)) / 2) / 2
        square = (maps[0] ** 2).mean(1) + ((maps[1] ** 2).mean(1) + (maps[2] ** 2).mean(1)) / 2
        means.append(mean)
        deviations.append((square / 2 - mean**2).sqrt())
    assert torch.allclose(pooled[0][0], torch.cat(means + deviations), atol=1e-4)


def test_more_of_the_same_windows_change_nothing():
    task = make_task()
    image, present = views()
    twice = torch.cat([image, image[:, 1:]], dim=1)
    assert torch.allclose(task(image, present).logits, task(twice, present).logits, atol=1e-4)


def test_the_whole_head_is_no_window():
    task = make_task()
    image, present = views(views=2)
    assert not torch.allclose(task(image, present).logits, task(image.flip(1), present).logits, atol=1e-2)


def test_the_order_of_windows_and_contrasts_does_not_matter():
    task = make_task()
    image, present = views(views=4)
    expected = task(image, present).logits
    assert torch.allclose(task(image[:, [0, 3, 1, 2]], present).logits, expected, atol=1e-4)
    assert torch.allclose(task(image.flip(2), present).logits, expected, atol=1e-4)


def test_a_case_alone_and_in_a_mixed_batch_get_the_same_answer():
    task = make_task()
    image, _ = views(cases=3)
    present = torch.tensor([[True, True], [False, True], [True, False]])
    together = task(image, present)
    for b in range(3):
        alone = task(image[b : b + 1], present[b : b + 1])
        assert torch.allclose(alone.logits, together.logits[b : b + 1], atol=1e-4)
        assert torch.allclose(alone.attention, together.attention[b : b + 1], atol=1e-5)


def test_views_one_by_one_answer_as_views_together():
    task = make_task()
    image, present = views()
    with torch.no_grad():
        alone = task(image, present)
    assert torch.allclose(alone.logits, task(image, present).logits, atol=1e-4)


def test_absent_contrasts_are_never_looked_at():
    task = make_task()
    image, _ = views()
    present = torch.tensor([[True, False], [False, True]])
    spoilt = image.masked_fill(~present[:, None, :, None, None, None], math.nan)
    assert torch.equal(task(image, present).logits, task(spoilt, present).logits)
    task(spoilt, present).logits.square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in task.parameters())


def test_any_number_of_contrasts_and_views_passes():
    task = make_task()
    assert task(*views(views=1, contrasts=4)).logits.shape == (2, 3)
    assert task(*views(views=7, contrasts=1)).logits.shape == (2, 3)


@pytest.mark.parametrize("spec", [SPEC, STAGES, LABELS, AGE, replace(AGE, crops=False)])
def test_every_parameter_gets_a_gradient(spec):
    task = make_task(spec).train()
    image, present = views(views=3 if spec.crops else 1)
    answer = {"multilabel": [[1.0] * 3, [0.0] * 3], "": [[100.0], [50.0]]}.get(spec.mode, [[1.0], [0.0]])
    lesion = torch.zeros(image.shape[:2] + image.shape[3:], dtype=torch.int8)
    lesion[0, 0, :4] = 1
    task.loss(task(image, present), batch_of(answer, lesion)).total.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert name.endswith(".0.bias") or parameter.grad.abs().max() > 0, name


# ---- losses ----------------------------------------------------------------------------------------------------------


def test_exclusive_loss_against_loops():
    task = make_task(label_smoothing=0.1)
    task.set_statistics(np.array([[0], [0], [0], [1], [2], [2]]))
    assert task.class_weights.tolist() == pytest.approx([6 / 9, 6 / 3, 6 / 6])
    logits, answers = torch.randn(4, 3), [0, 2, 1, math.nan]
    total = 0.0
    for row, y in zip(logits.tolist()[:3], [0, 2, 1]):
        z = sum(math.exp(v) for v in row)
        for k in range(3):
            target = 0.9 * (k == y) + 0.1 / 3
            total -= task.class_weights[y].item() * target * math.log(math.exp(row[k]) / z)
    terms = task.loss(output_of(logits), batch_of([[a] for a in answers]))
    assert terms.total.item() == pytest.approx(total / 3, rel=1e-5) and set(terms.parts) == {"answer"}


def test_ordinal_loss_against_loops():
    task = make_task(STAGES, label_smoothing=0.0, balanced=False)
    logits, answers = torch.randn(3, 3), [0, 3, 1]
    total = 0.0
    for row, y in zip(logits.tolist(), answers):
        for step, value in enumerate(row):
            p = 1 / (1 + math.exp(-value))
            total -= math.log(p if y > step else 1 - p)
    terms = task.loss(output_of(logits), batch_of([[a] for a in answers]))
    assert terms.total.item() == pytest.approx(total / 3, rel=1e-5)


def test_multilabel_loss_against_torch_and_leaves_the_unknown_out():
    task = make_task(LABELS, label_smoothing=0.0)
    task.set_statistics(np.array([[1, 0, np.nan], [0, 0, 1], [0, 1, 1], [0, 0, 1]]))
    assert task.class_weights.tolist() == pytest.approx([3, 3, 1])  # z: no negative case, so no weight
    logits = torch.randn(2, 3, requires_grad=True)
    answer = [[1, 0, math.nan], [0, 1, 1]]
    terms = task.loss(WholeHeadOutput(logits, torch.ones(2, 1, 1, 1, 1)), batch_of(answer))
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.tensor([[1.0, 0, 0], [0, 1, 1]]), pos_weight=task.class_weights, reduction="none"
    )
    assert terms.total.item() == pytest.approx((each.sum() - each[0, 2]).item() / 5, rel=1e-5)
    terms.total.backward()
    assert logits.grad[0, 2] == 0 and logits.grad[1, 2] != 0


def test_regression_is_standardised_inside_and_answers_in_its_unit():
    task = make_task(AGE)
    task.set_statistics(np.array([[20.0], [40.0], [60.0]]))
    assert task.decode(output_of([[0.0], [1.0]])).tolist() == pytest.approx([40, 40 + np.std([20, 40, 60])], rel=1e-5)
    right = (torch.tensor([[30.0]]) - task.mean) / task.std
    assert task.loss(output_of(right), batch_of([[30.0]])).total.item() == pytest.approx(0, abs=1e-6)
    reference = torch.nn.functional.smooth_l1_loss(torch.tensor([[2.0]]), right)
    assert task.loss(output_of([[2.0]]), batch_of([[30.0]])).total.item() == pytest.approx(reference.item())


def test_statistics_travel_with_the_weights():
    task, other = make_task(AGE), make_task(AGE, seed=1)
    task.set_statistics(np.array([[3.0], [5.0]]))
    other.load_state_dict(task.state_dict())
    image, present = views()
    assert torch.equal(other.decode(other(image, present)), task.decode(task(image, present)))
    assert other.mean == 4 and other.std == 1


def test_an_unknown_answer_alone_costs_nothing():
    for spec in (SPEC, AGE):
        logits = torch.randn(1, 3 if spec is SPEC else 1, requires_grad=True)
        terms = make_task(spec).loss(WholeHeadOutput(logits, torch.ones(1, 1, 1, 1, 1)), batch_of([[math.nan]]))
        terms.total.backward()
        assert terms.total.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_guidance_against_loops():
    attention = torch.rand(3, 2, 2, 2, 2)
    attention /= attention.flatten(1).sum(1)[:, None, None, None, None]
    lesion = torch.zeros(3, 2, 4, 4, 4, dtype=torch.int8)
    lesion[0, 0, 3, 1, 2] = 1  # in token (1, 0, 1) of view 0
    lesion[0, 1, 0, 0, 0] = 1
    lesion[1] = -1  # unknown; the third case has none
    expected = -math.log(attention[0, 0, 1, 0, 1] + attention[0, 1, 0, 0, 0])
    assert lesion_guidance(attention, lesion).item() == pytest.approx(expected, rel=1e-5)
    assert lesion_guidance(attention[1:], lesion[1:]) == 0


def test_guidance_draws_attention_to_the_lesion():
    task = make_task(guidance=1.0).train()
    image, present = views(cases=1, views=2)
    lesion = torch.zeros(1, 2, 16, 8, 8, dtype=torch.int8)
    lesion[:, 1, :4, :4, :4] = 1
    before = task(image, present).attention[0, 1, 0, 0, 0].item()
    optimizer = torch.optim.Adam(task.pool.parameters(), 1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        terms = task.loss(task(image, present), batch_of([[1.0]], lesion))
        terms.total.backward()
        optimizer.step()
    assert set(terms.parts) == {"answer", "guidance"}
    assert task(image, present).attention[0, 1, 0, 0, 0].item() > before + 0.1


def test_the_loss_is_float32_under_autocast():
    task = make_task()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = task(*views())
        terms = task.loss(output, batch_of([[0], [1]]))
    assert terms.total.dtype == torch.float32 and output.attention.dtype == torch.float32
    assert task.decode(output).dtype == torch.float32


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, STAGES])
def test_probabilities_are_probabilities_even_where_thresholds_cross(spec):
    logits = torch.tensor([[-3.0, 4.0, 1.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    probabilities = make_task(spec).decode(output_of(logits))
    assert (probabilities >= 0).all() and torch.allclose(probabilities.sum(1), torch.ones(3))


def test_ordinal_probabilities_are_differences_of_thresholds():
    decoded = make_task(STAGES).decode(output_of([[2.0, 0.5, -1.0]]))[0].tolist()
    a, b, c = (1 / (1 + math.exp(-v)) for v in (2.0, 0.5, -1.0))
    assert decoded == pytest.approx([1 - a, a - b, b - c, c], rel=1e-5)


def test_a_fresh_network_answers_the_training_mean():
    task = WholeHeadTask(AGE, build_backbone("unet_tiny")).eval()
    task.set_statistics(np.array([[40.0], [60.0]]))
    assert task.decode(task(*views())).tolist() == pytest.approx([50, 50], abs=5)


def test_it_learns_a_spot_in_one_window():
    """Two cases differ by a bright cube in one of three views; one view and the mean of a map do not show it."""
    torch.manual_seed(0)
    spec = replace(SPEC, values=("no", "yes"), contrasts=("t1",))
    task = WholeHeadTask(spec, build_backbone("unet_tiny"), dropout=0.0)
    image = torch.randn(1, 3, 1, 16, 8, 8).repeat(4, 1, 1, 1, 1, 1) + 0.1 * torch.randn(4, 3, 1, 16, 8, 8)
    image[2:, 2, 0, 4:10, 2:6, 2:6] += 4
    batch = batch_of([[0], [0], [1], [1]])
    present = torch.ones(4, 1, dtype=torch.bool)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(task(image, present), batch).total.backward()
        optimizer.step()
    probabilities = task.decode(task(image, present))
    assert (probabilities[:2, 0] > 0.8).all() and (probabilities[2:, 1] > 0.8).all()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"contrasts": ()}, "one or more contrasts"),
        ({"contrasts": ("t1", "t1")}, "each once"),
        ({"values": ("a",)}, "at least 2 classes"),
        ({"values": ("a", "a")}, "distinct"),
        ({"mode": ""}, "task.mode='': expected one of exclusive"),
        ({"mode": "multilabel", "values": ()}, "at least 1 columns"),
        ({"kind": "regression"}, "expected none for a regression"),
        ({"view_mm": 0.0, "crops": False}, "whole-head view"),
        ({"view_mm": -1.0}, "view_mm=-1"),
        ({"patch_vox": (10, 8, 8)}, "patch_vox"),
        ({"fusion": "sum"}, "fusion"),
    ],
)
def test_refused_specs(change, text):
    with pytest.raises(ConfigError, match=text):
        build_task(replace(SPEC, **change), build_backbone("unet_tiny"))


@pytest.mark.parametrize("settings", [{"dropout": 1.0}, {"label_smoothing": -0.1}, {"guidance": -1.0}])
def test_refused_settings(settings):
    with pytest.raises(ConfigError, match=f"task.{next(iter(settings))}"):
        build_task(SPEC, build_backbone("unet_tiny"), **settings)


def test_refused_images():
    task = make_task()
    image, present = views()
    with pytest.raises(ValueError, match="at least one contrast"):
        task(image, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(ValueError, match=r"expected \[B, V, M"):
        task(image[:, 0], present)
    with pytest.raises(ValueError, match=r"batch\.answer"):
        task.loss(output_of([[0.0, 0, 0]]), Batch(image, torch.arange(2)))


@pytest.mark.parametrize("mode", ["value", "exclusive", "three", "ordinal", "multilabel"])
def test_a_linear_start_tells_what_the_features_tell(mode: str) -> None:
    """The last layer answers as a linear model fitted to the features: here, one direction of them is the answer."""
    values = {"value": (), "exclusive": ("a", "b"), "three": ("a", "b", "c"), "ordinal": ("1", "2", "3"),
              "multilabel": ("u", "v")}[mode]  # fmt: skip
    spec = TaskSpec(
        "regression" if mode == "value" else "classification", "x", ("t1",), values, (16, 16, 16), view_mm=4.0,
        mode="" if mode == "value" else mode if mode in ("ordinal", "multilabel") else "exclusive",
    )  # fmt: skip
    task = WholeHeadTask(spec, build_backbone("unet_tiny"))
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=60)
    features = rng.normal(size=(60, task.out.in_features)) * 0.3 + 50.0  # much in common, little that differs
    features[:, ::2] += 0.5 * hidden[:, None]
    cut = np.searchsorted([-0.5, 0.5], hidden)
    answers = {
        "value": 40 + 10 * hidden[:, None], "exclusive": (hidden > 0)[:, None], "three": cut[:, None],
        "ordinal": cut[:, None], "multilabel": np.stack([hidden > 0, hidden < -0.5], axis=1),
    }[mode].astype(np.float32)  # fmt: skip
    task.set_statistics(answers[:40])
    task.start_linear(torch.from_numpy(features[:40]).float(), answers[:40])
    logits = task.out(task.norm(torch.from_numpy(features).float()))
    found = task.decode(WholeHeadOutput(logits, torch.zeros(60, 1, 1, 1, 1))).detach().numpy()[40:]
    true = answers[40:]
    if mode == "value":
        assert np.abs(found - true[:, 0]).mean() < 3 < np.abs(true[:, 0] - answers[:40].mean()).mean()
    elif mode == "multilabel":
        assert ((found > 0.5) == true).mean() > 0.9
    else:
        assert (found.argmax(axis=1) == true[:, 0]).mean() > (0.9 if mode == "exclusive" else 0.8)


def test_a_linear_start_with_a_single_case_of_a_class_or_one_class_only() -> None:
    spec = TaskSpec("classification", "x", ("t1",), ("u", "v"), (16, 16, 16), view_mm=4.0, mode="multilabel")
    task = WholeHeadTask(spec, build_backbone("unet_tiny"))
    features = torch.randn(4, task.out.in_features, generator=torch.Generator().manual_seed(0))
    answers = np.array([[1, 1], [0, 1], [0, 1], [0, np.nan]], np.float32)
    task.set_statistics(answers)
    task.start_linear(features, answers)
    found = task.decode(WholeHeadOutput(task.out(task.norm(features)), torch.zeros(4, 1, 1, 1, 1))).detach()
    assert torch.isfinite(found).all() and found[0, 0] > found[1:, 0].max()
    assert torch.allclose(found[:, 1], torch.full((4,), 7 / 8))  # three of three, and half a case more on either side


# ---- pooling ---------------------------------------------------------------------------------------------------------


def vit_task(pooling: str, **settings):
    torch.manual_seed(0)
    backbone = build_backbone("vit", width=12, depth=2, heads=2, patch_vox=8, grid_vox=[16, 16, 16], taps=2)
    return build_task(replace(SPEC, patch_vox=(16, 16, 8), pooling=pooling), backbone, **settings).eval()


def vit_views(cases=2, count=3):
    return torch.randn(cases, count, 2, 16, 16, 8)


def test_the_class_token_is_averaged_over_the_contrasts_that_are_there_and_half_of_it_is_the_whole_head():
    task, image = vit_task("token"), vit_views()
    present = torch.tensor([[True, True], [False, True]])
    image[1, :, 0] = torch.nan  # nobody looks there
    said = task.backbone.summarised
    with torch.no_grad():
        pooled, weights = task.pooled(image, present)
        for case, shown in enumerate(([0, 1], [1])):
            views = [torch.stack([said(image[case, v, m][None, None])[1][0] for m in shown]).mean(0) for v in range(3)]
            assert torch.allclose(pooled[case], views[0] / 2 + views[1] / 4 + views[2] / 4, atol=1e-5)
    assert pooled.shape == (2, 12) and torch.allclose(weights.flatten(1).sum(1), torch.ones(2))
    with pytest.raises(ValueError, match="at least one contrast"):
        task.pooled(image, torch.zeros(2, 2, dtype=torch.bool))


def test_mean_pooling_is_attention_before_anything_is_learned():
    image = vit_views()
    mean, attention = vit_task("mean"), vit_task("attention")
    attention.backbone.load_state_dict(mean.backbone.state_dict())
    with torch.no_grad():
        for one, other in zip(mean.pooled(image), attention.pooled(image), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert not any(name.startswith(("pool.", "scale")) for name in mean.state_dict())


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_every_parameter_gets_a_gradient_whatever_the_pooling(pooling):
    task = vit_task(pooling, dropout=0.0).train()
    output = task(vit_views(), torch.ones(2, 2, dtype=torch.bool))
    task.loss(output, batch_of([[0], [1]])).total.backward()
    assert all(p.grad is not None for p in task.parameters())


def test_a_network_without_a_class_token_is_not_asked_for_one():
    with pytest.raises(ConfigError, match=r"task\.pooling=token: unet_tiny has no class token; expected attention or"):
        build_task(replace(SPEC, pooling="token"), build_backbone("unet_tiny"))
    with pytest.raises(ConfigError, match=r"task\.pooling='max': expected one of attention, mean, token"):
        build_task(replace(SPEC, pooling="max"), build_backbone("unet_tiny"))
