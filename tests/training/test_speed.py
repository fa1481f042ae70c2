"""What is settled once: precision, compiler, layout."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from brainfm.batch import Batch
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.objective import Objective, build_objective
from brainfm.training import speed
from brainfm.training.settings import TrainerSettings

AUTO = TrainerSettings(max_steps=7)


@pytest.mark.parametrize(
    ("gpu", "accelerator", "precision", "mode", "channels_last"),
    [
        (True, "auto", "bf16-mixed", "default", True),
        (True, "cpu", "32-true", None, False),
        (False, "auto", "32-true", None, False),
    ],
)
def test_auto_is_settled_by_the_machine(
    gpu: bool,
    accelerator: Any,
    precision: str,
    mode: str | None,
    channels_last: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = speed.settled(replace(AUTO, accelerator=accelerator))
    assert (found.precision, found.compile, found.channels_last) == (precision, mode, channels_last)
    assert found.max_steps == 7 and speed.settled(found) == found


def test_what_the_user_says_stays() -> None:
    given = replace(AUTO, precision="32-true", compile="reduce-overhead", channels_last=True)
    assert speed.settled(given) == given


def objective() -> Objective:
    torch.manual_seed(0)
    return build_objective("mae", build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0, latent_channels=8)


def gradients(question: Objective) -> list[torch.Tensor]:
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    question(Batch(image=image, sample=torch.arange(2)), 0.0).total.backward()
    return [p.grad for p in question.parameters() if p.grad is not None]


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    plain = objective()
    other = copy.deepcopy(plain)
    speed.quicken(other, TrainerSettings(channels_last=True, compile=None))
    weight = other.backbone.levels[1][0][0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), other.state_dict().values(), strict=True))
    for one, two in zip(gradients(plain), gradients(other), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-3)


def test_a_skip_decoder_is_compiled_where_objectives_enter_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, mode: (mode, function))
    question = build_objective("dense_split", build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0)
    climb = question.dense.climb
    speed.quicken(question, TrainerSettings(channels_last=False, compile="default"))
    assert question.dense.climb == ("default", climb) and question.backbone.features[0] == "default"


@pytest.mark.slow
def test_compiled_step_is_the_same_step_and_keeps_the_names() -> None:
    plain = objective()
    other = copy.deepcopy(plain)
    speed.quicken(other, TrainerSettings(channels_last=False, compile="default"))
    assert list(other.state_dict()) == list(plain.state_dict())
    for one, two in zip(gradients(plain), gradients(other), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
