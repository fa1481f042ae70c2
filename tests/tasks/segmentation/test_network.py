"""Contrasts that come and go, and the loss against a reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.decoders import DenseHead
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation.collapse import foreground_shares
from brainfm.tasks.segmentation.losses import LOSSES, SegmentationLoss, soft_dice_loss
from brainfm.tasks.segmentation.network import DeepLogits, SegmentationTask

SPEC = TaskSpec("segmentation", "lesion", ("t1", "flair", "dwi"), (0, 4, 2), (16, 8, 8))


def make_task(fusion="attention", seed=0):
    torch.manual_seed(seed)
    task = SegmentationTask(replace(SPEC, fusion=fusion), build_backbone("unet_tiny"))
    with torch.no_grad():  # attention starts as the mean; here it must tell contrasts apart
        for score in task.fusion.scores:
            torch.nn.init.normal_(score.weight)
    return task.eval()


@pytest.mark.parametrize("fusion", ["mean", "attention"])
def test_a_case_alone_and_in_a_mixed_batch_get_the_same_answer(fusion):
    task = make_task(fusion)
    image = torch.randn(4, 3, 16, 8, 8)
    present = torch.tensor([[1, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    together = task(image, present)
    assert together.shape == (4, 3, 16, 8, 8)
    for b in range(4):
        assert torch.allclose(task(image[b : b + 1], present[b : b + 1]), together[b : b + 1], atol=1e-5)


def test_absent_contrasts_are_never_looked_at():
    task = make_task()
    image = torch.randn(2, 3, 16, 8, 8)
    present = torch.tensor([[True, False, True], [True, False, False]])
    spoilt = image.masked_fill(~present[:, :, None, None, None], math.nan)
    assert torch.equal(task(image, present), task(spoilt, present))
    task(spoilt, present).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


def test_absent_contrasts_cost_nothing(monkeypatch):
    task = make_task()
    encoded = []
    real = task.backbone.features
    monkeypatch.setattr(task.backbone, "features", lambda scans: encoded.append(len(scans)) or real(scans))
    task(torch.randn(3, 3, 16, 8, 8), torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 0]], dtype=torch.bool))
    assert sum(encoded) == 4


def test_the_order_of_contrasts_does_not_matter():
    task = make_task()
    image, present = torch.randn(1, 3, 16, 8, 8), torch.tensor([[True, True, False]])
    swapped = task(image[:, [1, 0, 2]], present[:, [1, 0, 2]])
    assert torch.allclose(task(image, present), swapped, atol=1e-5)


def test_any_number_of_contrasts_passes():
    task = make_task()
    image, present = torch.randn(2, 5, 16, 8, 8), torch.ones(2, 5, dtype=torch.bool)
    assert task(image, present).shape == (2, 3, 16, 8, 8)
    alone = task(image[:, :1], present[:, :1])
    only_first = torch.tensor([[True, False, False, False, False]] * 2)
    assert torch.allclose(task(image, only_first), alone, atol=1e-5)


def test_every_parameter_gets_a_gradient():
    task = make_task().train()
    batch = Batch(
        torch.randn(2, 3, 16, 8, 8),
        torch.arange(2),
        present=torch.tensor([[True, True, False], [False, True, True]]),
        label=torch.randint(3, (2, 16, 8, 8)),
    )
    task.loss(task(batch.image, batch.present), batch).total.backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        # A bias in front of instance norm is subtracted again: its gradient is 0 up to rounding.
        assert name.endswith(".0.bias") or parameter.grad.abs().max() > 0, name


def test_the_loss_is_monais():
    losses = pytest.importorskip("monai.losses")
    reference = losses.DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5
    )
    logits, label = torch.randn(3, 3, 6, 5, 4), torch.randint(3, (3, 6, 5, 4))
    terms = make_task().loss(logits, Batch(torch.empty(3, 3, 1, 1, 1), torch.arange(3), label=label))
    # monai weighs the cross-entropy over all classes, the Dice over the foreground: as we do
    assert terms.total.item() == pytest.approx(reference(logits, label[:, None]).item(), abs=1e-5)
    assert terms.total.item() == pytest.approx(sum(p.item() for p in terms.parts.values()))
    assert not any(p.requires_grad for p in terms.parts.values())


def test_soft_dice_against_loops():
    probabilities = torch.softmax(torch.randn(2, 3, 4, 3, 2), dim=1)
    label = torch.randint(3, (2, 4, 3, 2))
    scores = []
    for k in (1, 2):
        both = predicted = true = 0.0
        for b in range(2):
            for x in range(4):
                for y in range(3):
                    for z in range(2):
                        p, t = probabilities[b, k, x, y, z].item(), float(label[b, x, y, z] == k)
                        both, predicted, true = both + p * t, predicted + p, true + t
        scores.append((2 * both + 1e-5) / (predicted + true + 1e-5))
    assert soft_dice_loss(probabilities, label).item() == pytest.approx(1 - sum(scores) / 2, abs=1e-6)


def test_a_batch_without_foreground_stays_finite():
    logits = torch.full((2, 3, 4, 4, 4), -50.0)
    logits[:, 0] = 50.0
    logits.requires_grad_()
    terms = make_task().loss(logits, Batch(logits, torch.arange(2), label=torch.zeros(2, 4, 4, 4, dtype=torch.long)))
    terms.total.backward()
    assert terms.total.item() == pytest.approx(0.0, abs=1e-4) and torch.isfinite(logits.grad).all()


def test_the_loss_is_float32_under_autocast():
    task = make_task()
    label = torch.randint(3, (1, 16, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = task(torch.randn(1, 3, 16, 8, 8), torch.ones(1, 3, dtype=torch.bool))
        terms = task.loss(logits, Batch(logits, torch.arange(1), label=label))
    assert logits.dtype == torch.bfloat16 and terms.total.dtype == torch.float32


def test_it_learns_a_bright_cube():
    torch.manual_seed(0)
    task = make_task().train()
    image = torch.randn(1, 3, 16, 8, 8) * 0.1
    label = torch.zeros(1, 16, 8, 8, dtype=torch.long)
    label[:, 4:9, 2:6, 2:6] = 1
    image[:, 1][label > 0] += 3
    batch = Batch(image, torch.arange(1), present=torch.tensor([[True, True, False]]), label=label)
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(task(batch.image, batch.present), batch).total.backward()
        optimizer.step()
    decoded = task.decode(task(batch.image, batch.present))
    assert decoded.dtype == torch.uint8 and decoded.shape == (1, 16, 8, 8)
    assert ((decoded == 4) == (label == 1)).float().mean() > 0.98


def test_decode_gives_label_values():
    logits = torch.zeros(1, 3, 1, 1, 3)
    for z, k in enumerate((2, 0, 1)):
        logits[0, k, 0, 0, z] = 1
    assert make_task().decode(logits).flatten().tolist() == [2, 0, 4]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "regression"}, "task.kind='regression'"),
        ({"contrasts": ()}, "one or more contrasts"),
        ({"contrasts": ("t1", "t1")}, "each once"),
        ({"values": (0,)}, "at least one other value"),
        ({"values": (1, 0)}, "0 for the background"),
        ({"values": (0, 2035)}, "uint8"),
        ({"values": (0, 1, 1)}, "distinct"),
        ({"patch_vox": (10, 8, 8)}, "patch_vox"),
        ({"fusion": "sum"}, "fusion"),
    ],
)
def test_refused_specs(change, text):
    with pytest.raises(ConfigError, match=text):
        SegmentationTask(replace(SPEC, **change), build_backbone("unet_tiny"))


def test_refused_images():
    task = make_task()
    with pytest.raises(ValueError, match="at least one contrast"):
        task(torch.zeros(2, 3, 16, 8, 8), torch.tensor([[True, True, True], [False, False, False]]))
    with pytest.raises(ValueError, match="expected"):
        task(torch.zeros(2, 2, 16, 8, 8), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"batch\.label"):
        task.loss(torch.zeros(1, 3, 2, 2, 2), Batch(torch.zeros(1, 3, 2, 2, 2), torch.arange(1)))


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 2, 4)])
def test_a_fresh_network_begins_near_one_percent_of_foreground(values):
    torch.manual_seed(0)
    spec = TaskSpec("segmentation", "lesion", ("t1",), values, (16, 16, 16))
    task = SegmentationTask(spec, build_backbone("unet_tiny"))
    torch.nn.init.zeros_(task.decoder.out.weight)
    logits = task(torch.randn(1, 1, 16, 16, 16), torch.ones(1, 1, dtype=torch.bool))
    assert float(torch.softmax(logits.detach(), 1)[:, 1:].sum(1).mean()) == pytest.approx(0.01, rel=1e-3)


# ---- deep supervision, and what leaves it behind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "answered"),
    [
        ([0.4, 0.1, 0.5], [0.4, 0.1, 0.5]),
        ([0.2, 0.8, 0.0], [0.199, 0.796, 0.005]),  # what is lifted is taken from the others
        ([1.0, 0.0, 0.0], [0.99, 0.005, 0.005]),
        ([0.0, 0.5, 0.5], [0.01, 0.495, 0.495]),
    ],
)
def test_a_fresh_network_answers_the_shares_of_the_classes(shares, answered):
    task = make_deep(shares=shares)
    for head in task.heads():
        torch.nn.init.zeros_(head.weight)
    logits = task(torch.randn(1, 3, 16, 8, 8), torch.ones(1, 3, dtype=torch.bool))
    for level in (logits.finest, *logits.coarser):
        assert torch.softmax(level.detach(), 1).mean((0, 2, 3, 4)).tolist() == pytest.approx(answered, abs=2e-3)


# ---- behind a pre-trained decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_a_fresh_last_layer_answers_the_shares_whatever_the_scale_of_the_widened_map(scale):
    """As a decoder of its own does: the shares, give or take what random weights say of features of unit size."""
    torch.manual_seed(0)
    shares = [0.4, 0.1, 0.5]
    task = SegmentationTask(SPEC, build_backbone("unet_tiny"), shares=shares, dense_channels=20).eval()
    with torch.no_grad():
        for parameter in task.decoder.out.parameters():
            parameter.mul_(scale).add_(scale)
    task.begin_fresh()
    own = SegmentationTask(SPEC, build_backbone("unet_tiny"), shares=shares).eval()
    image, present = torch.randn(1, 3, 16, 8, 8), torch.ones(1, 3, dtype=torch.bool)
    with torch.no_grad():
        logits, usual = task(image, present), own(image, present)
    for found in (logits, usual):
        answered = torch.softmax(found, 1).mean((0, 2, 3, 4))
        assert answered.tolist() == pytest.approx(shares, abs=0.25)
        assert 0.1 < float(found.std((0, 2, 3, 4)).mean()) < 1


def test_a_pre_trained_decoder_keeps_its_names_and_adds_a_last_layer():
    task = SegmentationTask(SPEC, build_backbone("unet_tiny"), dense_channels=20)
    plain = SegmentationTask(SPEC, build_backbone("unet_tiny"))
    assert set(task.state_dict()) - set(plain.state_dict()) == {"head.weight", "head.bias"}
    assert task.settings() == {"dense_channels": 20} and plain.settings() == {}
    assert task.heads() == [task.head] and plain.heads() == [plain.decoder.out]
    logits = task(torch.randn(1, 3, 16, 8, 8), torch.ones(1, 3, dtype=torch.bool))
    logits.square().mean().backward()
    assert logits.shape == (1, 3, 16, 8, 8) and all(p.grad is not None for p in task.parameters())
    task.lift_foreground()
    assert not task.head.weight.any() and task.decoder.out.weight.any(), "what was pre-trained stays"
    with pytest.raises(ConfigError, match="dense_channels=-1"):
        SegmentationTask(SPEC, build_backbone("unet_tiny"), dense_channels=-1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_linear_start_hears_what_the_decoder_knows(scale):
    """Classes that are a linear function of the decoder's features are told at once, whatever the widened map's scale
    and offset; those that are not keep their shares."""
    torch.manual_seed(1)
    task = SegmentationTask(SPEC, build_backbone("unet_tiny"), dense_channels=20).eval()
    with torch.no_grad():
        for parameter in task.decoder.out.parameters():
            parameter.mul_(scale).add_(scale)
    image, present = torch.randn(2, 3, 16, 16, 16), torch.ones(2, 3, dtype=torch.bool)
    with torch.no_grad():
        features = task.climb(image, present)[-1].movedim(1, -1)
        told = (features @ torch.randn(features.shape[-1], 3)).argmax(-1)
    task.begin_linear(features[0].flatten(0, 2), told[0].flatten())
    with torch.no_grad():
        assert (task(image, present).argmax(1)[1] == told[1]).float().mean() > 0.93
    assert task.began == "a linear probe of the decoder's features"
    nothing = torch.multinomial(torch.tensor([0.5, 0.2, 0.3]), 4096, replacement=True)
    task.begin_linear(features[0].flatten(0, 2), nothing)
    with torch.no_grad():
        answered = torch.softmax(task(image, present), 1).mean((0, 2, 3, 4))
    assert answered.tolist() == pytest.approx([0.5, 0.2, 0.3], abs=0.04)


def test_a_linear_start_is_that_of_a_reference():
    """scikit-learn's logistic regression with the same penalty, on the same features in units of their deviation."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(2)
    task = SegmentationTask(SPEC, build_backbone("unet_tiny"), dense_channels=20).eval()
    edge = task.decoder.out.in_channels
    features = 3 + 2 * torch.randn(500, edge)
    classes = (features @ torch.randn(edge, 3) + torch.randn(500, 3)).argmax(1)
    task.begin_linear(features, classes)
    with torch.no_grad():
        found = torch.softmax(task._logits(features.t()[None, :, :, None, None])[0, :, :, 0, 0].t(), 1)
    z = ((features - features.mean(0)) / features.std(0)).double().numpy()
    reference = linear_model.LogisticRegression(C=1 / (2 * 1e-3 * 500), tol=1e-10, max_iter=10_000).fit(z, classes)
    assert found.numpy() == pytest.approx(reference.predict_proba(z), abs=2e-3)


def test_a_head_that_does_not_fit_is_no_beginning():
    two = replace(SPEC, values=(0, 1))
    lesion = DenseHead("pathology", 4, ("lesion",))
    for spec, channels, head, start in (
        (SPEC, 20, lesion, 0), (two, 0, lesion, 0), (two, 20, DenseHead("pathology", 4, ("a", "b")), 0),
        (two, 20, lesion, 17),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot begin as a head"):
            SegmentationTask(spec, build_backbone("unet_tiny"), dense_channels=channels).begin_as(head, start)
    task = SegmentationTask(two, build_backbone("unet_tiny"), dense_channels=20)
    task.begin_as(lesion, 16)
    assert torch.equal(task.head.weight[1, 16:], lesion.weight[0])


def test_shares_are_one_a_class():
    with pytest.raises(ValueError, match="a share for each of 3 classes"):
        make_deep(shares=[0.5, 0.5])


def make_deep(**kwargs):
    torch.manual_seed(0)
    return SegmentationTask(SPEC, build_backbone("unet_tiny"), deep_supervision=True, **kwargs)


def drawn_batch():
    torch.manual_seed(3)
    return Batch(
        torch.randn(2, 3, 16, 8, 8),
        torch.arange(2),
        present=torch.ones(2, 3, dtype=torch.bool),
        label=torch.randint(3, (2, 16, 8, 8)),
    )


def test_coarser_levels_answer_in_training_only():
    task, batch = make_deep(), drawn_batch()
    output = task(batch.image, batch.present)
    strides = task.backbone.strides[1:-1]
    assert isinstance(output, DeepLogits) and strides
    assert [tuple(c.shape) for c in output.coarser] == [(2, 3, 16 // s, 8 // s, 8 // s) for s in strides]
    alone = task.eval()(batch.image, batch.present)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, output.finest)


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_gets_a_gradient_from_every_loss_of_every_level(name):
    task, batch = make_deep(loss=SegmentationLoss(name)).train(), drawn_batch()
    terms = task.loss(task(batch.image, batch.present), batch)
    terms.total.backward()
    assert terms.parts["coarser"] > 0
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
        zero_by_nature = parameter_name.endswith(".0.bias")  # a bias in front of instance norm
        assert zero_by_nature or parameter.grad.abs().max() > 0, parameter_name


def test_the_loss_spec_alone_asks_for_levels():
    task = SegmentationTask(SPEC, build_backbone("unet_tiny"), loss=SegmentationLoss(deep_supervision=True))
    assert len(task.auxiliary) == len(make_deep().auxiliary) > 0


def test_a_bundle_knows_no_coarser_heads():
    deep = make_deep().eval()
    torch.manual_seed(0)
    plain = SegmentationTask(SPEC, build_backbone("unet_tiny")).eval()
    assert set(deep.bundle_state()) == set(plain.state_dict()) == set(plain.bundle_state())
    assert set(deep.state_dict()) - set(deep.bundle_state()) == {
        f"auxiliary.{n}.{what}" for n in range(len(deep.auxiliary)) for what in ("weight", "bias")
    }
    # the heads come last, so that they shift no draw of the others
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in deep.bundle_state().items())
    with torch.no_grad():
        deep.decoder.out.weight.add_(1)
    plain.load_state_dict(deep.bundle_state())
    image, present = torch.randn(1, 3, 16, 8, 8), torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(plain(image, present), deep(image, present))


def test_deep_supervision_learns_a_bright_cube():
    task = make_deep(loss=SegmentationLoss("focal_tversky")).train()
    image = torch.randn(1, 3, 16, 8, 8) * 0.1
    label = torch.zeros(1, 16, 8, 8, dtype=torch.long)
    label[:, 4:9, 2:6, 2:6] = 1
    image[:, 1][label > 0] += 3
    batch = Batch(image, torch.arange(1), present=torch.tensor([[True, True, False]]), label=label)
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(task(batch.image, batch.present), batch).total.backward()
        optimizer.step()
    decoded = task.eval().decode(task(batch.image, batch.present))
    assert ((decoded == 4) == (label == 1)).float().mean() > 0.98


def test_foreground_shares_count_voxels():
    logits = torch.zeros(1, 3, 2, 2, 2)
    logits[0, 2, 0, 0, 0] = 1.0
    logits[0, 1, 1, 1, :] = 1.0
    label = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    label[0, 0, 0, 0] = 2
    assert foreground_shares(logits, label).tolist() == [3 / 8, 1 / 8]
    assert foreground_shares(DeepLogits(logits, ()), label).tolist() == [3 / 8, 1 / 8]


def test_lifting_brings_a_collapsed_network_back():
    task, batch = make_deep(shares=[0.7, 0.2, 0.1]), drawn_batch()
    with torch.no_grad():
        task.decoder.out.bias[0] += 50
        before = {name: value.clone() for name, value in task.named_parameters()}
    assert foreground_shares(task(batch.image, batch.present), batch.label)[0] == 0
    task.lift_foreground()
    logits = task(batch.image, batch.present)
    for level in (logits.finest, *logits.coarser):
        shares = torch.softmax(level, 1).movedim(1, -1)
        assert torch.allclose(shares, torch.tensor([0.7, 0.2, 0.1]).expand_as(shares), atol=1e-3)
    changed = {name for name, value in task.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("decoder.out.", "auxiliary.")) for name in changed)
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        task.loss(task(batch.image, batch.present), batch).total.backward()
        optimizer.step()
    assert foreground_shares(task(batch.image, batch.present), batch.label)[0] > 0.1
