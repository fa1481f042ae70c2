"""Primus in and out: checkpoints of nnssl and nnU-Net against a network that is computed here, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from brainfm.cli import main
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, save_backbone
from brainfm.nets.primus import Primus
from brainfm.specs import PreprocessSpec, Provenance

WIDTH, HEADS, DEPTH = 36, 3, 2
HEAD = WIDTH // HEADS
ORDERS = {"whd": (0, 1, 2), "hwd": (1, 0, 2)}
WIDE = {"eva.pos_embed": torch.zeros(1, 8, 700)}
PLAN_KEYS = {
    "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
    "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
}  # fmt: skip


def naive(state: dict[str, Tensor], array: Tensor, order: str) -> Tensor:
    """[A, B, C] array as their reader gives it -> [E, a, b, c] features of the tensors in a file.

    Tokens are read one after another in an order of the axes; the position in that sequence, unravelled on the grid as
    the sequence lays it out, is all that decides about learnt positions and angles.
    """
    axes = ORDERS[order]
    grid = [edge // 8 for edge in array.shape]
    laid = [grid[axis] for axis in axes]
    places = [(i, j, k) for i in range(laid[0]) for j in range(laid[1]) for k in range(laid[2])]
    rates = [1e-4 ** (n / (HEAD // 6)) for n in range(HEAD // 6)]
    angle = torch.tensor([[p * rate for p in place for rate in rates for _ in "ab"] for place in places])
    kernel = state["down_projection.proj.weight"]
    tokens = []
    for place in places:
        at = [0, 0, 0]
        for number, axis in zip(place, axes, strict=True):
            at[axis] = 8 * number
        cube = array[at[0] : at[0] + 8, at[1] : at[1] + 8, at[2] : at[2] + 8]
        tokens.append((kernel[:, 0] * cube).sum((1, 2, 3)) + state["down_projection.proj.bias"])
    x = torch.stack(tokens) + state["eva.pos_embed"][0]
    for block in range(DEPTH):
        x = _block({n.split(".", 3)[3]: v for n, v in state.items() if n.startswith(f"eva.blocks.{block}.")}, x, angle)
    x = F.layer_norm(x, (WIDTH,), state["eva.norm.weight"], state["eva.norm.bias"])
    map_ = torch.empty(WIDTH, *grid)
    for token, place in zip(x, places, strict=True):
        at = [0, 0, 0]
        for number, axis in zip(place, axes, strict=True):
            at[axis] = number
        map_[:, at[0], at[1], at[2]] = token
    return map_


def _block(part: dict[str, Tensor], x: Tensor, angle: Tensor) -> Tensor:
    def norm(value: Tensor, name: str) -> Tensor:
        return F.layer_norm(value, value.shape[-1:], part[f"{name}.weight"], part[f"{name}.bias"])

    def linear(value: Tensor, name: str) -> Tensor:
        return F.linear(value, part[f"{name}.weight"], part.get(f"{name}.bias"))

    def turn(value: Tensor) -> Tensor:
        other = torch.empty_like(value)
        other[:, ::2], other[:, 1::2] = -value[:, 1::2], value[:, ::2]
        return value * angle.cos() + other * angle.sin()

    seen = norm(x, "norm1")
    parts = {name: linear(seen, f"attn.{name}_proj") for name in "qkv"}
    mixed = []
    for head in range(HEADS):
        q, k, v = (parts[name][:, head * HEAD : (head + 1) * HEAD] for name in "qkv")
        mixed.append((turn(q) @ turn(k).T / HEAD**0.5).softmax(-1) @ v)
    x = x + part["gamma_1"] * linear(norm(torch.cat(mixed, 1), "attn.norm"), "attn.proj")
    seen = norm(x, "norm2")
    inside = norm(F.silu(linear(seen, "mlp.fc1_g")) * linear(seen, "mlp.fc1_x"), "mlp.norm")
    return x + part["gamma_2"] * linear(inside, "mlp.fc2")


def trained(grid_vox: tuple[int, int, int]) -> Primus:
    """A network whose every tensor matters: biases and gains begin at 0 and 1."""
    torch.manual_seed(0)
    net = Primus(WIDTH, DEPTH, HEADS, grid_vox=grid_vox).eval()
    with torch.no_grad():
        for value in net.parameters():
            value += 0.2 * torch.randn_like(value)
    return net


def exported(tmp_path: Path, net: Primus, *words: str) -> dict[str, Any]:
    path = tmp_path / "a.safetensors"
    save_backbone(
        path, net, objective={"name": "mae", "config": {}}, objective_state={}, preprocess=PreprocessSpec(),
        patch_vox=(16, 24, 24), provenance=Provenance("0", "", ""),
    )  # fmt: skip
    assert main(["export", "format=nnssl", f"backbone={path}", f"out={tmp_path / 'a.pth'}", *words]) == 0
    held: dict[str, Any] = torch.load(tmp_path / "a.pth", weights_only=True)
    return held


def fetched(tmp_path: Path, held: dict[str, Any], *words: str) -> LoadedBackbone:
    torch.save(held, tmp_path / "c.pth")
    words = ("import", f"checkpoint={tmp_path / 'c.pth'}", f"out={tmp_path / 'b.safetensors'}", *words)
    assert main(list(words)) == 0
    return load_backbone(tmp_path / "b.safetensors")


def refused(tmp_path: Path, held: dict[str, Any], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    torch.save(held, tmp_path / "c.pth")
    capsys.readouterr()
    out = tmp_path / "r.safetensors"
    assert main(["import", f"checkpoint={tmp_path / 'c.pth'}", f"out={out}", *words]) == 2
    assert not out.exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("axes", "grid_vox"), [("zyx", (8, 16, 16)), ("xyz", (16, 16, 8))])
@torch.no_grad()
def test_what_goes_out_gives_our_features_in_their_network(
    tmp_path: Path, axes: str, grid_vox: tuple[int, int, int], order: str
) -> None:
    """And what comes back gives them again."""
    net, image = trained(grid_vox), torch.randn(1, 1, *grid_vox)
    held = exported(tmp_path, net, f"axes={axes}", f"order={order}")
    want = net.features(image)[-1][0]
    turned = axes == "zyx"
    theirs = naive(held["network_weights"], image[0, 0].permute(2, 1, 0) if turned else image[0, 0], order)
    torch.testing.assert_close(theirs.permute(0, 3, 2, 1) if turned else theirs, want, atol=1e-4, rtol=1e-4)
    back = fetched(tmp_path, held, f"axes={axes}")  # the file says its order
    torch.testing.assert_close(back.backbone.features(image)[-1][0], want, atol=1e-5, rtol=1e-5)
    assert back.patch_vox == grid_vox and back.backbone.config["grid_vox"] == list(grid_vox)


@pytest.mark.parametrize(
    ("trainer", "order"), [("BaseEvaMAETrainer_BS8", "hwd"), ("SimMIMEvaTrainer", "whd"), ("simCLREvaTrainer", "hwd")]
)
@torch.no_grad()
def test_a_file_of_nnssl_gives_the_features_that_it_was_trained_to_give(
    tmp_path: Path, trainer: str, order: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of arrays read as Z, Y, X, with its tokens in its trainer's order, beside what its question leaves."""
    held = as_released(exported(tmp_path, trained((16, 16, 16)))["network_weights"], trainer)
    plain = dict(held["network_weights"])
    inner = "encoder." if trainer.startswith("simCLR") else ""
    image = torch.randn(16, 16, 16)
    theirs = naive({name.removeprefix(inner): v for name, v in plain.items()}, image.permute(2, 1, 0), order)
    loaded = fetched(tmp_path, held)
    torch.testing.assert_close(
        loaded.backbone.features(image[None, None])[-1][0], theirs.permute(0, 3, 2, 1), atol=1e-4, rtol=1e-4
    )
    assert f"order={order}" in capsys.readouterr().out
    assert loaded.patch_vox == (16, 16, 16)  # as the positions say; the plan's 160 were never seen
    other = fetched(tmp_path, held, "order=" + {"hwd": "whd", "whd": "hwd"}[order])
    assert not torch.allclose(other.backbone.features(image[None, None])[-1][0], theirs.permute(0, 3, 2, 1), atol=0.1)


def as_released(weights: dict[str, Tensor], trainer: str) -> dict[str, Any]:
    """With what MAE or a contrastive question leaves beside the network, and heads that no tensor tells."""
    weights = dict(weights)
    kwargs = {"eva_numheads": HEADS} if weights["eva.pos_embed"].shape[2] == WIDTH else None
    if trainer.startswith("simCLR"):
        del weights["mask_token"]
        weights = {f"encoder.{n}": v for n, v in weights.items()} | {"project.0.weight": torch.randn(4, 3)}
    elif "MAE" in trainer:
        weights |= {"decoder.blocks.0.norm1.weight": torch.randn(3), "decoder.pos_embed": torch.randn(1, 8, 3)}
    plan = {
        "architecture_plans": {"arch_class_name": "PrimusM", "arch_kwargs": kwargs},
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1.0, 1.0, 1.0], "patch_size": [160] * 3}}},
        "recommended_downstream_patchsize": [160, 160, 160],
    }
    return {"network_weights": weights, "nnssl_adaptation_plan": plan, "trainer_name": trainer, "init_args": {}}


def small_s(tokens: int = 8, depth: int = 2) -> dict[str, Tensor]:
    """Primus-S by the published names and shapes; one number fills a tensor, and no storage is as large as it."""
    width, hidden = 396, 1056
    shapes: dict[str, tuple[int, ...]] = {"eva.pos_embed": (1, tokens, 396), "mask_token": (1, 1, 396)}
    shapes |= {"down_projection.proj.weight": (width, 1, 8, 8, 8), "down_projection.proj.bias": (width,)}
    shapes |= {f"eva.norm.{kind}": (width,) for kind in ("weight", "bias")}
    for block in range(depth):
        at = f"eva.blocks.{block}"
        vectors = ["gamma_1", "gamma_2", "attn.q_proj.bias", "attn.v_proj.bias", "attn.proj.bias", "mlp.fc2.bias"]
        vectors += [f"{norm}.{kind}" for norm in ("norm1", "norm2", "attn.norm") for kind in ("weight", "bias")]
        shapes |= {f"{at}.{name}": (width,) for name in vectors}
        shapes |= {f"{at}.attn.{part}.weight": (width, width) for part in ("q_proj", "k_proj", "v_proj", "proj")}
        shapes |= {f"{at}.mlp.{part}.weight": (hidden, width) for part in ("fc1_g", "fc1_x")}
        shapes |= {f"{at}.mlp.{part}.bias": (hidden,) for part in ("fc1_g", "fc1_x")}
        shapes |= {f"{at}.mlp.norm.{kind}": (hidden,) for kind in ("weight", "bias")}
        shapes[f"{at}.mlp.fc2.weight"] = (width, hidden)
    return {name: torch.tensor(0.01).expand(shape) for name, shape in shapes.items()}


def test_a_published_size_is_told_by_names_and_shapes(tmp_path: Path) -> None:
    whole = small_s(tokens=512, depth=12)
    loaded = fetched(tmp_path, as_released(whole, "VolumeFusionEvaTrainer"))
    assert loaded.backbone.config["name"] == "primus_s" and loaded.patch_vox == (64, 64, 64)
    rows = [line.split(",") for line in (tmp_path / "b.transfer.csv").read_text().splitlines()[1:]]
    assert {row[0] for row in rows} == {"matched", "unused"} and len(rows) == len(whole)
    assert ["matched", "encoder.layers.3.attend.qkv.weight", "eva.blocks.3.attn.k_proj.weight", "396x396"] in rows
    assert [row[2] for row in rows if row[0] == "unused"] == ["mask_token"]


@torch.no_grad()
def test_without_a_plan_it_is_a_file_of_nnunet(tmp_path: Path) -> None:
    """Whose tokens come in the order of the axes; wrappers and several channels are taken off."""
    held = as_released(small_s(), "nnUNet_Primus_S_Trainer")
    del held["nnssl_adaptation_plan"]
    three = torch.randn(396, 3, 8, 8, 8)
    held["network_weights"] = {f"module.{n}": v for n, v in held["network_weights"].items()}
    held["network_weights"]["module.down_projection.proj.weight"] = three
    loaded = fetched(tmp_path, held, "axes=xyz")
    torch.testing.assert_close(loaded.backbone.state_dict()["embed.patches.weight"], three.sum(1, keepdim=True))
    assert any("order=whd" in note for note in loaded.provenance.config["imported"]["notes"])


def test_the_plan_of_a_primus(tmp_path: Path) -> None:
    held = exported(tmp_path, trained((8, 16, 16)), "channels=2")
    plan, weights = held["nnssl_adaptation_plan"], held["network_weights"]
    assert set(plan) >= PLAN_KEYS
    assert plan["recommended_downstream_patchsize"] == [24, 24, 16] and plan["pretrain_patch_size"] == [16, 16, 8]
    for key in ("key_to_encoder", "key_to_stem"):
        assert any(name.startswith(f"{plan[key]}.") for name in weights)
    assert plan["key_to_lpe"] in weights and all(f"{key}.weight" in weights for key in plan["keys_to_in_proj"])
    assert weights["down_projection.proj.weight"].shape == (WIDTH, 2, 8, 8, 8)
    assert plan["architecture_plans"]["arch_kwargs"]["eva_numheads"] == HEADS
    json.dumps(plan)  # plain values alone


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o.pth"
    exported(tmp_path, trained((8, 16, 24)))  # on a grid that only the order of the axes can hold
    words = [f"backbone={tmp_path / 'a.safetensors'}", f"out={out}", "order=hwd"]
    assert main(["export", "format=nnssl", *words]) == 2
    assert "on a grid of 3 x 2 x 1 tokens" in capsys.readouterr().err and not out.exists()
    strange = as_released(small_s(tokens=500), "SimMIMEvaTrainer")
    assert "500 tokens, which is no cube" in refused(tmp_path, strange, capsys)
    lacking = small_s()
    del lacking["eva.blocks.1.attn.k_proj.weight"]
    said = refused(tmp_path, as_released(lacking | {"eva.gate": torch.zeros(2)}, "SimMIMEvaTrainer"), capsys)
    assert "eva.blocks.1.attn.k_proj.weight) is missing" in said and "eva.gate is unknown" in said
    lost = as_released(small_s(), "BaseEvaMAETrainer")
    del lost["network_weights"]["eva.pos_embed"]
    assert "without eva.pos_embed" in refused(tmp_path, lost, capsys)
    wide = as_released({n: v for n, v in small_s().items() if n != "eva.pos_embed"} | WIDE, "BaseEvaMAETrainer")
    assert "700 channels" in refused(tmp_path, wide, capsys)
