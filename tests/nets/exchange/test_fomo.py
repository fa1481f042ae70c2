"""Weights of the FOMO challenges: FOMO25's plain U-Net, its winner's whole network, FOMO26's residual U-Net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from brainfm.cli import main
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.exchange.fomo import jomo_name, plain_name, residual_names
from brainfm.objectives.objective import build_objective
from tests.nets.test_resenc import formula


def small(filters: int = 4) -> torch.nn.Module:
    return build_backbone("unet", widths=[filters * 2**level for level in range(5)])


def lightning(tensors: dict[str, Tensor], prefix: str = "model.") -> dict[str, Any]:
    """What Lightning leaves around a state."""
    state = {prefix + name: value for name, value in tensors.items()}
    return {"state_dict": state, "epoch": 99, "global_step": 3, "hyper_parameters": {"lr": 1e-4}, "loops": {}}


def fetch(tmp_path: Path, held: Any, *words: str) -> Any:
    torch.save(held, tmp_path / "last.ckpt")
    assert main(["import", f"checkpoint={tmp_path / 'last.ckpt'}", f"out={tmp_path / 'b.safetensors'}", *words]) == 0
    return load_backbone(tmp_path / "b.safetensors")


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", ""])
@torch.no_grad()
def test_the_baseline_of_fomo25(tmp_path: Path, prefix: str) -> None:
    there = swap_in(small())
    theirs = {plain_name(name): value for name, value in there.state_dict().items()}
    assert {"encoder.in_conv.conv2.norm.bias", "encoder.encoder_conv4.conv1.conv.weight"} < set(theirs)
    decoder = {"decoder.upsample1.weight": torch.zeros(64, 32, 2, 2, 2), "decoder.out_conv.bias": torch.zeros(1)}
    loaded = fetch(tmp_path, lightning(theirs | decoder, prefix))
    image = torch.randn(1, 1, 32, 32, 32)
    for ours, other in zip(loaded.backbone(image), there(image), strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-5)
    assert loaded.decoder is None and loaded.objective["name"] == "amaes"


def test_its_two_sizes_are_known(tmp_path: Path) -> None:
    with torch.device("meta"):
        medium = build_backbone("unet_b")
    assert sum(p.numel() for p in medium.parameters()) == 14_134_944  # as published
    theirs = {plain_name(name): torch.zeros(value.shape) for name, value in medium.state_dict().items()}
    assert fetch(tmp_path, lightning(theirs)).backbone.config == {"name": "unet_b"}


@torch.no_grad()
def test_the_winner_of_fomo25_comes_with_its_latents_and_decoder(tmp_path: Path) -> None:
    objective = build_objective("cross_contrast", small(), latent_channels=64, patch_vox=(32, 32, 32), seed=0)  # type: ignore[arg-type]
    theirs = {jomo_name(name): value for name, value in objective.state_dict().items()}
    assert len(theirs) == 74
    assert {"conv_mu_shared.weight", "conv_logvar_modality.bias", "decoder.decoder_conv4.conv1.norm.bias"} < set(theirs)
    head = {"decoder_task.fc.weight": torch.zeros(2, 3)}  # of a fine-tuned file
    loaded = fetch(tmp_path, lightning(theirs | head))
    assert loaded.objective["name"] == "cross_contrast"
    again = build_objective("cross_contrast", loaded.backbone, **{
        **loaded.objective["config"], "swap": "standard"}, patch_vox=(32, 32, 32), seed=0)  # fmt: skip
    again.load_state_dict({f"backbone.{n}": v for n, v in loaded.backbone.state_dict().items()} | loaded.extra)
    image = torch.randn(1, 1, 32, 32, 32)
    for part in ("anatomy", "contrast"):
        mine = objective.latents(objective.backbone(image))[part].mean  # type: ignore[misc]
        torch.testing.assert_close(again.latents(again.backbone(image))[part].mean, mine, atol=1e-5, rtol=1e-5)  # type: ignore[misc]


def test_its_published_size() -> None:
    with torch.device("meta"):
        objective = build_objective("cross_contrast", build_backbone("unet_b"), patch_vox=(32, 32, 32), seed=0)
    assert len(objective.state_dict()) == 74
    assert sum(p.numel() for p in objective.parameters()) == 18_896_449


@torch.no_grad()
def test_the_baseline_of_fomo26_gives_the_features_of_its_own_network(tmp_path: Path) -> None:
    """``fomo26_reference.json``: names, shapes and features of gardening_tools 0.3.5, its weights by ``formula``."""
    reference = json.loads((Path(__file__).parent / "fomo26_reference.json").read_text())
    theirs = {}
    for name, shape in reference["names"].items():
        plain = name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm_op.")
        theirs[name] = formula(plain, shape) + (1.0 if "norm_op.weight" in plain else 0.0)
    loaded = fetch(tmp_path, lightning(theirs))
    maps = loaded.backbone.double()(formula("image", (1, 1, 16, 8, 12)).double())  # float32 rounds by the processor
    deepest, finest = (torch.tensor(reference[name], dtype=torch.float64) for name in ("deepest", "finest"))
    torch.testing.assert_close(maps[-1][0, :, 1, 1, 2], deepest, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(maps[0][0, :, 5, 3, 7], finest, atol=1e-5, rtol=0)
    wanted = {n for name in loaded.backbone.state_dict() for n in residual_names(name, 3)}
    assert wanted == {name for name in reference["names"] if name.startswith("encoder.")}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"conv1.weight": (64, 1, 7, 7, 7), "layer1.0.conv1.weight": (64, 64, 3, 3, 3)}, "a ResNet as MONAI"),
        ({"model.0.weight": (16, 1, 3, 3, 3), "model.1.running_mean": (16,)}, "as anatomix is"),
        ({"swinViT.patch_embed.proj.weight": (48, 1, 2, 2, 2)}, "Swin transformer"),
        ({"encoder.eva.blocks.0.norm1.weight": (864,), "encoder.eva.pos_embed": (1, 8, 864)}, "does not fit primus"),
        ({"fc.weight": (2, 3)}, "tensors of no known format, e.g. fc.weight"),
    ],
)
def test_what_no_backbone_can_hold_is_refused_in_one_sentence(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {n: torch.zeros(s) for n, s in tensors.items()}}, tmp_path / "c.pth")
    assert main(["import", f"checkpoint={tmp_path / 'c.pth'}", f"out={tmp_path / 'b.safetensors'}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "b.safetensors").exists()
