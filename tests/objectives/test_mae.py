"""Masked autoencoding: only what is hidden counts."""

from dataclasses import replace

import pytest
import torch

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.mae import MAE
from brainfm.objectives.masking import draw_mask
from brainfm.objectives.objective import Objective, build_objective
from brainfm.objectives.settings import OBJECTIVES
from brainfm.settings import keys_of

PATCH = (16, 16, 16)


def _objective(**config) -> Objective:
    torch.manual_seed(0)
    return build_objective(
        "mae", build_backbone("unet_tiny"), patch_vox=PATCH, seed=3, **({"latent_channels": 16} | config)
    )


def _batch() -> Batch:
    return Batch(image=torch.randn(2, 1, *PATCH), sample=torch.tensor([5, 9]))


@pytest.mark.parametrize("loss", ["mse", "smooth_l1"])
def test_loss_is_the_mean_over_hidden_voxels(loss):
    objective, batch = _objective(loss=loss), _batch()
    hidden = draw_mask(batch.sample, PATCH, 4, 0.6, 3, "mask")
    terms = objective(batch, 0.0)
    output = objective.decoder(objective.latents(objective.backbone(batch.image.masked_fill(hidden, 0)))["all"].mean)
    difference = (output - batch.image)[hidden]
    want = (
        difference**2
        if loss == "mse"
        else torch.where(difference.abs() < 0.1, difference**2 / 0.2, difference.abs() - 0.05)
    )
    torch.testing.assert_close(terms.total, want.mean())
    assert list(terms.parts) == ["hidden"] and not terms.parts["hidden"].requires_grad


def test_visible_targets_do_not_count(monkeypatch):
    """The network is made to ignore its input; then changing what is visible must change nothing."""
    objective, batch = _objective(), _batch()
    fixed = torch.randn(2, 1, *PATCH)
    monkeypatch.setattr(MAE, "_reconstruct", lambda self, image, hidden: fixed)
    hidden = draw_mask(batch.sample, PATCH, 4, 0.6, 3, "mask")
    other = replace(batch, image=torch.where(hidden, batch.image, batch.image + 100))
    assert torch.equal(objective(batch, 0.0).total, objective(other, 0.0).total)
    moved = replace(batch, image=torch.where(hidden, batch.image + 100, batch.image))
    assert objective(moved, 0.0).total > objective(batch, 0.0).total


def test_hidden_voxels_are_not_seen():
    objective, batch = _objective(), _batch()
    hidden = draw_mask(batch.sample, PATCH, 4, 0.6, 3, "mask")
    other = replace(batch, image=torch.where(hidden, batch.image + 100, batch.image))
    assert torch.equal(objective.pictures(batch)["self"], objective.pictures(other)["self"])


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_gets_a_gradient(autocast):
    objective = _objective()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = objective(_batch(), 0.5).total
    assert total.dtype == torch.float32
    total.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_pictures():
    objective, batch = _objective(), _batch()
    pictures = objective.pictures(batch)
    assert list(pictures) == ["input", "masked", "self"]
    assert all(p.shape == (2, 1, *PATCH) and not p.requires_grad for p in pictures.values())
    assert (pictures["masked"] == 0).float().mean() == pytest.approx(38 / 64)


def test_it_learns():
    objective, batch = _objective(), _batch()
    optimiser = torch.optim.Adam(objective.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        total = objective(batch, 0.0).total
        total.backward()
        optimiser.step()
        losses.append(total.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"loss": "l3"}, "expected mse or smooth_l1"),
        ({"beta": 0.0}, "beta"),
        ({"mask_unit_vox": 5}, "divisor"),
        ({"mask_ratio": 1.0}, "some, but not all"),
        ({"latent_channels": 0}, "without a channel"),
        (
            {"ratio": 0.5, "colour": 1},
            r"no key 'objective\.ratio'; did you mean objective\.mask_ratio",
        ),
    ],
)
def test_refusals(config, words):
    with pytest.raises(ConfigError, match=words):
        _objective(**config)


def test_build_objective__refusals():
    with pytest.raises(ConfigError, match=r"unknown objective 'simclr', expected one of anatomy_pathology, .*, mae"):
        build_objective("simclr", build_backbone("unet_tiny"), patch_vox=PATCH, seed=0)
    with pytest.raises(ConfigError, match="multiples of 4 voxels"):
        build_objective("mae", build_backbone("unet_tiny"), patch_vox=(16, 16, 18), seed=0)


def test_config_is_complete_and_makes_the_same_objective():
    for name in OBJECTIVES:
        small = (
            {} if name == "dino" else {"mask_unit_vox": 4} | ({} if name == "dense_split" else {"latent_channels": 16})
        )
        objective = build_objective(name, build_backbone("unet_tiny"), patch_vox=PATCH, seed=0, **small)
        assert objective.name == name and set(objective.config) == set(keys_of(OBJECTIVES[name][0])) - {"name"}
        again = build_objective(name, build_backbone("unet_tiny"), patch_vox=PATCH, seed=0, **objective.config)
        assert again.config == objective.config and list(again.state_dict()) == list(objective.state_dict())


def test_state_for_file__has_everything_but_the_backbone():
    objective = _objective()
    backbone = {f"backbone.{name}" for name in objective.backbone.state_dict()}
    assert set(objective.state_for_file()) == set(objective.state_dict()) - backbone
