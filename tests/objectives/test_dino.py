"""dino: crops, teacher and balance against plain loops; what is hidden; what a run keeps and a file does not."""

import math

import pytest
import torch
from torch import nn

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.crops import draw_crops
from brainfm.objectives.dino import DINO
from brainfm.objectives.objective import build_objective
from brainfm.objectives.teacher import Centre, PrototypeHead, Teacher, balanced, cosine_ramp, entropy_share, koleo

PATCH = (16, 16, 16)
SMALL = {"prototypes": 12, "hidden_channels": 16, "bottleneck": 8, "local_crops": 3}
VIT = {"width": 24, "depth": 2, "heads": 2, "patch_vox": 4, "grid_vox": [16, 16, 16]}


def objective(backbone: str = "vit", **config) -> DINO:
    torch.manual_seed(0)
    network = build_backbone(backbone, **(VIT if backbone == "vit" else {}))
    made = build_objective("dino", network, patch_vox=PATCH, seed=3, **(SMALL | config))
    assert isinstance(made, DINO)
    return made


def batch(numbers: tuple[int, ...] = (5, 9, 2, 7)) -> Batch:
    images = [torch.randn(1, *PATCH, generator=torch.Generator().manual_seed(n)) for n in numbers]
    return Batch(image=torch.stack(images), sample=torch.tensor(numbers))


# ---- crops -----------------------------------------------------------------------------------------------------------


def ramps() -> torch.Tensor:
    """[3, 1, 32, 32, 32]: one patch an axis, whose values are the voxels' places along it."""
    places = torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij")
    return torch.stack(places)[:, None]


def test_crops_are_boxes_of_the_wanted_volume_inside_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_GAIN", "_OFFSET", "_NOISE", "_BLUR_VOX"):
        monkeypatch.setattr(f"brainfm.objectives.crops.{name}", 0.0)
    mirrored = 0
    for number in range(40):
        crops = draw_crops(ramps(), torch.full((3,), number), 1, (0.1, 0.3), (8, 10, 12), 0, "x")[:, 0]
        assert crops.shape == (3, 8, 10, 12)
        edges = []
        for axis in range(3):
            along = crops[axis].movedim(axis, 0).flatten(1)
            assert torch.allclose(along, along[:, :1].expand_as(along), atol=1e-3)  # a box is not turned
            steps = along[:, 0].diff()
            assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-3)
            edges.append(float(steps[0].abs()) * crops.shape[axis + 1] / 32)
            assert axis == 0 or steps[0] > 0
            mirrored += int(axis == 0 and steps[0] < 0)
            assert along.min() >= -0.5 and along.max() <= 31.5
        assert 0.1 / 2.4 < math.prod(edges) < 0.3 * 2.4  # the aspect of each axis varies by 4/3 either way
    assert 10 < mirrored < 30


def test_a_crop_depends_on_its_own_sample_alone() -> None:
    image = ramps()
    together = draw_crops(image, torch.tensor([4, 5, 6]), 2, (0.3, 1.0), PATCH, 1, "x").unflatten(0, (2, 3))
    alone = draw_crops(image[1:2], torch.tensor([5]), 2, (0.3, 1.0), PATCH, 1, "x")
    assert torch.allclose(together[:, 1], alone, atol=1e-5)
    others = [
        draw_crops(image[1:2], torch.tensor([5]), 2, (0.3, 1.0), PATCH, seed, name)
        for seed, name in ((2, "x"), (1, "y"))
    ]
    assert not torch.allclose(alone[0], alone[1]) and not any(torch.allclose(alone, o) for o in others)


def test_noise_is_noise() -> None:
    flat = torch.zeros(64, 1, 8, 8, 8)
    crops = draw_crops(flat, torch.arange(64), 1, (0.5, 1.0), (16, 16, 16), 0, "x").flatten(1)
    noise = crops - crops.mean(1, keepdim=True)
    deviations = noise.std(1)
    assert deviations.min() >= 0 and 0.08 < deviations.max() < 0.11  # even from 0 to 0.1
    loud = noise[deviations > 0.03] / deviations[deviations > 0.03, None]
    along = (loud[:, 1:] * loud[:, :-1]).mean()
    across = (loud @ loud.T / loud.shape[1]).fill_diagonal_(0)
    assert abs(along) < 0.01 and across.abs().max() < 0.08


# ---- teacher and balance ---------------------------------------------------------------------------------------------


def test_a_teacher_follows_and_shares_nothing() -> None:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = Teacher(net=student).train()
    before = [p.clone() for p in teacher.parameters()]
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
        student[1].running_mean.fill_(5.0)
    assert all(torch.equal(p, b) for p, b in zip(teacher.parameters(), before))
    teacher.follow(0.75, net=student)
    assert all(torch.allclose(p, b + 0.25) for p, b in zip(teacher.parameters(), before))
    assert teacher["net"][1].running_mean.eq(5.0).all()
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher["net"].training


def test_momentum_rises_to_one() -> None:
    values = [cosine_ramp(0.9, 1.0, p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)]
    assert values == pytest.approx([0.9, 0.9, 0.95, 1.0, 1.0])


def test_balanced_answers_use_every_prototype_alike() -> None:
    scores = torch.randn(40, 6) + torch.tensor([3.0, 0, 0, 0, 0, 0])  # nearly all rows like the first best
    found = balanced(scores, 0.5, rounds=50)
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(found.sum(0), torch.full((6,), 40 / 6), atol=1e-3, rtol=0)
    assert entropy_share(found) > 0.999
    shares = torch.exp(scores / 0.5)
    for _ in range(3):  # rows and columns in turn, as it is usually written
        shares = shares / shares.sum(0, keepdim=True)
        shares = shares / shares.sum(1, keepdim=True)
    torch.testing.assert_close(balanced(scores, 0.5), shares, atol=1e-5, rtol=1e-4)


def test_a_centre_takes_off_what_all_rows_share() -> None:
    centre, scores = Centre(4, momentum=0.5), torch.randn(8, 4) + torch.tensor([2.0, 0, 0, 0])
    torch.testing.assert_close(centre.shares(scores, 0.1, learn=True), torch.softmax(scores / 0.1, 1))
    torch.testing.assert_close(centre.mean, scores.mean(0) / 2)
    again = centre.shares(scores, 0.1, learn=False)
    torch.testing.assert_close(again, torch.softmax((scores - scores.mean(0) / 2) / 0.1, 1))
    torch.testing.assert_close(centre.mean, scores.mean(0) / 2)


def test_koleo__compare() -> None:
    descriptors = torch.randn(6, 5)
    codes = descriptors / descriptors.norm(dim=1, keepdim=True)
    nearest = [min(float((codes[i] - codes[j]).norm()) for j in range(6) if j != i) for i in range(6)]
    expected = -sum(math.log(d) for d in nearest) / 6
    assert float(koleo(descriptors)) == pytest.approx(expected, abs=1e-5)


def test_scores_of_prototypes_are_cosines() -> None:
    head = PrototypeHead(5, 8, 4, 7)
    scores = head(torch.randn(3, 2, 5))
    assert scores.shape == (3, 2, 7) and scores.abs().max() <= 1
    with torch.no_grad():
        head.directions.mul_(10)
    torch.manual_seed(0)
    one = torch.randn(1, 5)
    before = head(one)
    with torch.no_grad():
        head.directions.div_(3)
    torch.testing.assert_close(head(one), before)


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["vit", "unet_tiny"])
def test_every_parameter_of_the_student_learns_and_none_of_the_teacher(backbone: str) -> None:
    asked = objective(backbone)
    terms = asked(batch(), 0.5)
    assert set(terms.parts) == {"dino", "ibot", "koleo", "used", "sure", "entropy"}
    expected = terms.parts["dino"] + terms.parts["ibot"] + 0.1 * terms.parts["koleo"]
    torch.testing.assert_close(terms.total.detach(), expected)
    terms.total.backward()
    for name, parameter in asked.named_parameters():
        assert (parameter.grad is None) == name.startswith("teacher."), name


def test_entropy_falls_where_the_teacher_has_one_answer_for_all_though_they_are_balanced() -> None:
    asked = objective()
    spread = asked(batch(), 0.5).parts
    with torch.no_grad():
        asked.teacher["head"].layers[-1].weight.zero_()
        asked.teacher["head"].layers[-1].bias.copy_(100 * asked.teacher["head"].directions[3])
    collapsed = asked(batch(), 0.5).parts
    assert float(collapsed["entropy"]) < 0.5 * float(spread["entropy"])
    assert float(collapsed["used"]) > 0.9  # which balancing makes, whatever the teacher knows


def test_agreement__compare() -> None:
    asked = objective()
    taught = tuple(torch.softmax(torch.randn(4, 12), 1) for _ in range(2))
    said = [torch.randn(4, 12) for _ in range(5)]
    losses = []
    for view in range(2):
        for crop in range(5):
            if crop != view:
                answer = torch.log_softmax(said[crop] / 0.1, 1)
                losses += [-(taught[view][row] * answer[row]).sum() for row in range(4)]
    torch.testing.assert_close(asked._agreement(taught, said), torch.stack(losses).mean())


def test_hidden_cubes_are_asked_for_and_others_are_not() -> None:
    asked = objective(mask_share=0.6)
    rows = asked._hidden(batch((1, 2, 3, 4, 5, 6)))
    assert rows.shape == (12, 64) and 0 < (rows.sum(1) > 0).sum() < 12
    shares = rows.float().mean(1)[rows.any(1)]
    assert shares.min() >= 0.19 and shares.max() <= 0.76
    voxels = asked._voxels(rows, torch.device("cpu"))
    assert torch.equal(voxels[:, 0, ::4, ::4, ::4].flatten(1), rows) and voxels.sum() == 64 * rows.sum()
    own, theirs = torch.randn(12, 24, 4, 4, 4, requires_grad=True), torch.randn(12, 24, 4, 4, 4)
    asked._cubes(own, theirs, rows, 0.07).backward()
    touched = own.grad.abs().sum(1).flatten(1) > 0
    assert torch.equal(touched, rows)


def test_a_large_crop_without_anything_hidden_adds_no_cubes() -> None:
    terms = objective(mask_share=0.0)(batch(), 0.0)
    assert terms.parts["ibot"] == 0 and torch.isfinite(terms.total)
    assert objective(ibot_weight=0.0)(batch(), 0.0).parts.keys() == {"dino", "koleo", "used", "sure", "entropy"}
    assert torch.isfinite(objective(local_crops=0)(batch(), 0.0).total)


def test_the_temperature_of_the_teacher_rises() -> None:
    asked = objective(warm=0.2)
    found = [asked._temperature(p) for p in (0.0, 0.1, 0.2, 1.0)]
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_a_file_holds_no_teacher_and_a_checkpoint_does() -> None:
    asked = objective()
    assert {name.split(".")[0] for name in asked.state_for_file()} == {"head", "cube_head"}
    assert any(name.startswith("teacher.") for name in asked.state_dict())
    assert asked.encode(torch.randn(1, 1, *PATCH)) == {}


def test_a_run_from_its_state_goes_on_to_the_bit() -> None:
    def steps(asked: DINO, optimiser: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            optimiser.zero_grad()
            asked(batch((step, step + 10)), step / 4).total.backward()
            optimiser.step()
            asked.after_step(step / 4)

    whole = objective(centring="mean")
    optimiser = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], 0.1)
    steps(whole, optimiser, 0, 2)
    saved = {name: value.clone() for name, value in whole.state_dict().items()}
    steps(whole, optimiser, 2, 4)
    again = objective(centring="mean")
    again.load_state_dict(saved)
    steps(again, torch.optim.SGD([p for p in again.parameters() if p.requires_grad], 0.1), 2, 4)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    assert not torch.equal(whole.head.directions, whole.teacher["head"].directions)


@pytest.mark.parametrize("backbone", ["vit", "unet_tiny"])
def test_it_learns_and_does_not_collapse(backbone: str) -> None:
    """After 30 steps crops of one scan are nearer to one another than to another scan's, more than at first."""
    asked = objective(backbone, local_crops=2)
    # four scans, each a pattern of its own, as different as scans are and alike in every part
    waves = torch.stack([torch.sin(torch.arange(16.0) * f) for f in (0.4, 0.9, 1.6, 2.4)])
    images = (waves[:, :, None, None] + waves[:, None, :, None] + waves[:, None, None, :])[:, None]
    optimiser = torch.optim.AdamW([p for p in asked.parameters() if p.requires_grad], 2e-3)
    for step in range(30):
        optimiser.zero_grad()
        terms = asked(Batch(image=images, sample=torch.arange(4) + 4 * step), step / 30)
        terms.total.backward()
        optimiser.step()
        asked.after_step(step / 30)
        first = terms if step == 0 else first  # noqa: F821
    assert terms.parts["dino"] < 0.95 * first.parts["dino"]
    assert terms.parts["used"] > 0.9


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"prototypes": 1}, "expected 2 or more"),
        ({"global_scale": (0.5, 0.2)}, "objective.global_scale"),
        ({"mask_ratio": (0.0, 0.5)}, "objective.mask_ratio"),
        ({"teacher_temperature": 0.0}, "teacher_temperature=0: expected more than 0"),
        ({"momentum": 1.5}, "momentum=1.5: expected 0 to 1"),
        ({"koleo_weight": -1.0}, "koleo_weight"),
        ({"local_vox": (6, 8, 8)}, "multiples of 4 voxels"),
    ],
)
def test_refusals(config: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        objective(**config)
