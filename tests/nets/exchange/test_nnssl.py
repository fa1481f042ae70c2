"""Weights to and from nnssl and nnU-Net; that all 956 names of ResEnc-L are met: see tests/nets/test_resenc.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainfm.cli import main
from brainfm.errors import WeightsError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.exchange.checkpoint import read_checkpoint
from brainfm.nets.exchange.nnssl import adaptation_plan, network_weights, reference_names
from brainfm.nets.resenc import ResEncDecoder, ResEncEncoder
from brainfm.specs import PreprocessSpec, Provenance
from tests.nets.test_resenc import SMALL, formula, leaves, small_by_formula

LEVELS = 3
REFERENCE = json.loads((Path(__file__).parents[1] / "resenc_reference.json").read_text())
PLAN_KEYS = {
    "architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize",
    "key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe",
}  # fmt: skip


def released(**changes: Any) -> dict[str, Any]:
    """A checkpoint with the names, the aliases and the wrappings of a released one, of the small network whose output
    is stored."""
    net = small_by_formula()
    weights = {t: v.clone() for n, v in net.state_dict().items() for t in reference_names(n, LEVELS)}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1.0, 1.0, 1.0], "patch_size": [160] * 3}}},
        "recommended_downstream_patchsize": [160, 160, 160],
    }
    held = {"network_weights": weights, "nnssl_adaptation_plan": plan, "trainer_name": "BaseMAETrainer_BS8"}
    return held | {"_best_ema": np.float64(0.25), "init_args": {"fold": "all"}} | changes


def fetch(tmp_path: Path, held: Mapping[str, Any], *words: str) -> Any:
    torch.save(dict(held), tmp_path / "checkpoint_final.pth")
    words = ("import", f"checkpoint={tmp_path / 'checkpoint_final.pth'}", f"out={tmp_path / 'b.safetensors'}", *words)
    assert main(list(words)) == 0
    return load_backbone(tmp_path / "b.safetensors")


def saved(path: Path, encoder: ResEncEncoder, decoder: Any = None) -> Path:
    save_backbone(
        path, encoder, objective={"name": "mae", "config": {}}, objective_state={}, preprocess=PreprocessSpec(),
        patch_vox=(16, 8, 24), provenance=Provenance("0", "", ""), decoder=decoder,
    )  # fmt: skip
    return path


def rows(tmp_path: Path) -> list[list[str]]:
    return [line.split(",") for line in (tmp_path / "b.transfer.csv").read_text().splitlines()[1:]]


def test_trained_values_of_sparse_pre_training_come_first() -> None:
    assert reference_names("encoder.stages.1.0.first.0.weight", 6) == (
        "encoder.stages.1.blocks.0.conv1.all_modules.0.weight",
        "encoder.stages.1.blocks.0.conv1.conv.weight",
        "decoder.encoder.stages.1.blocks.0.conv1.all_modules.0.weight",
        "decoder.encoder.stages.1.blocks.0.conv1.conv.weight",
    )
    with pytest.raises(KeyError):
        reference_names("encoder.stages.1.0.third.0.weight", 6)


@torch.no_grad()
def test_imported_features_are_those_that_the_published_network_gave(tmp_path: Path) -> None:
    loaded = fetch(tmp_path, released(), "axes=xyz")
    image = formula("image", (1, 1, 16, 8, 12))
    deepest = loaded.backbone.features(image)[-1][0, :, 1, 1, 2]
    torch.testing.assert_close(deepest, torch.tensor(REFERENCE["deepest"]), atol=1e-5, rtol=0)
    assert loaded.backbone.config == {"name": "resenc", "widths": [4, 8, 8], "depths": [1, 2, 1]}
    assert loaded.provenance.config["imported"]["objective"]["name"] == "BaseMAETrainer_BS8"
    assert loaded.patch_vox == (160, 160, 160) and loaded.preprocess.spacing_mm == (1, 1, 1)


@torch.no_grad()
def test_arrays_that_were_read_as_zyx_give_the_same_features_turned(tmp_path: Path) -> None:
    held = released()
    held["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] = [48, 32, 64]
    loaded = fetch(tmp_path, held)
    torch.manual_seed(0)
    there, image = small_by_formula(), torch.randn(1, 1, 12, 8, 16)
    for ours, theirs in zip(
        loaded.backbone.features(image), there["encoder"](image.permute(0, 1, 4, 3, 2)), strict=True
    ):
        torch.testing.assert_close(ours, theirs.permute(0, 1, 4, 3, 2), atol=2e-5, rtol=1e-5)
    assert loaded.patch_vox == (64, 32, 48)


@torch.no_grad()
def test_a_decoder_with_skip_connections_comes_along(tmp_path: Path) -> None:
    one = ResEncDecoder((4, 8, 8), (1, 2, 4), 1)
    weights = released()["network_weights"]
    weights |= {t: v for n, v in one.state_dict().items() for t in reference_names(f"decoder.{n}", LEVELS)}
    loaded = fetch(tmp_path, released(network_weights=weights), "axes=xyz")
    assert loaded.decoder is not None and loaded.decoder.parts == {"image": 1}
    maps = loaded.backbone.features(torch.randn(1, 1, 8, 8, 8))
    torch.testing.assert_close(loaded.decoder(maps), one(maps), atol=1e-6, rtol=1e-6)
    # of two classes it is none of ours
    assert fetch(tmp_path, released()).decoder is None


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_prefixes_are_stripped(tmp_path: Path, prefix: str) -> None:
    plain = fetch(tmp_path, released())
    wrapped = {prefix + name: value for name, value in released()["network_weights"].items()}
    assert fetch(tmp_path, released(network_weights=wrapped)).fingerprint == plain.fingerprint


def test_sparse_checkpoints_give_the_values_of_all_modules(tmp_path: Path) -> None:
    plain, held = fetch(tmp_path, released()), released()
    for name in held["network_weights"]:
        if ".conv." in name or ".norm." in name:
            held["network_weights"][name] = torch.zeros_like(held["network_weights"][name])
    del held["nnssl_adaptation_plan"]  # which these trainers leave out
    sparse = fetch(tmp_path, held)
    mine, its = plain.backbone.state_dict(), sparse.backbone.state_dict()
    assert all(torch.equal(mine[name], its[name]) for name in mine)


def test_the_copy_inside_the_decoder_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = released()
    for name in list(held["network_weights"]):
        if name.startswith("decoder.encoder."):
            held["network_weights"][name] = torch.full_like(held["network_weights"][name], torch.nan)
    loaded = fetch(tmp_path, held)
    assert all(value.isfinite().all() for value in loaded.backbone.state_dict().values())
    assert "unused: decoder.encoder.* (" in capsys.readouterr().out
    found = rows(tmp_path)
    assert {row[0] for row in found} == {"matched", "copy", "unused"}
    assert len(found) == len(held["network_weights"])


@torch.no_grad()
def test_several_input_channels_become_one(tmp_path: Path) -> None:
    held = released()
    three = torch.randn(4, 3, 3, 3, 3)
    stems = [n for n in held["network_weights"] if ".stem.convs.0." in n and held["network_weights"][n].ndim == 5]
    held["network_weights"] |= {name: three for name in stems}
    loaded = fetch(tmp_path, held, "axes=xyz")
    image = torch.randn(1, 1, 8, 8, 8)
    stem = loaded.backbone.stem[0]  # type: ignore[index]
    bias = held["network_weights"]["encoder.stem.convs.0.conv.bias"]
    want = nn.functional.conv3d(image.expand(-1, 3, -1, -1, -1), three, bias, padding=1)
    torch.testing.assert_close(stem(image), want, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused_by_name_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = released()
    weights = held["network_weights"]
    for name in [n for n in weights if n.endswith("encoder.stages.1.blocks.1.conv1.conv.bias")]:
        del weights[name], weights[name.replace("conv.bias", "all_modules.0.bias")]
    weights["encoder.stages.0.blocks.0.gate"] = torch.zeros(3)
    torch.save(held, tmp_path / "c.pth")
    assert main(["import", f"checkpoint={tmp_path / 'c.pth'}", f"out={tmp_path / 'b.safetensors'}"]) == 2
    said = capsys.readouterr().err
    assert "encoder.stages.1.1.first.0.bias" in said and "encoder.stages.0.blocks.0.gate is unknown" in said
    assert not (tmp_path / "b.safetensors").exists()
    assert {row[0] for row in rows(tmp_path)} == {"matched", "copy", "unused", "missing", "unexpected"}


class Payload:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(released(init_args=Payload()), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="more than data"):
        read_checkpoint(tmp_path / "c.pth")
    assert "executed" not in capsys.readouterr().out


def test_numbers_and_arrays_of_numpy_are_data(tmp_path: Path) -> None:
    logging = {"lrs": [np.float64(1e-2)], "times": np.arange(3.0), "best": np.int64(4), "dtype": np.dtype("float32")}
    torch.save(released(logging=logging), tmp_path / "c.pth")
    about = read_checkpoint(tmp_path / "c.pth").about
    assert about["logging"]["best"] == 4 and about["logging"]["times"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("axes", ["xyz", "zyx"])
@torch.no_grad()
def test_there_and_back(tmp_path: Path, axes: str) -> None:
    encoder = ResEncEncoder(**SMALL)  # type: ignore[arg-type]
    decoder = decoder_for(encoder, {"anatomy": 3, "free": 2})
    path = saved(tmp_path / "a.safetensors", encoder, decoder)
    out = tmp_path / "a.pth"
    assert main(["export", "format=nnssl", f"backbone={path}", f"out={out}", f"axes={axes}"]) == 0
    held = torch.load(out, weights_only=True)
    assert set(held["nnssl_adaptation_plan"]) >= PLAN_KEYS
    patch = held["nnssl_adaptation_plan"]["recommended_downstream_patchsize"]
    assert patch == ([16, 8, 24] if axes == "xyz" else [24, 8, 16])
    assert main(["import", f"checkpoint={out}", f"out={tmp_path / 'b.safetensors'}", f"axes={axes}"]) == 0
    back = load_backbone(tmp_path / "b.safetensors")
    assert all(torch.equal(v, back.backbone.state_dict()[n]) for n, v in encoder.state_dict().items())
    assert back.decoder is not None
    image = torch.randn(1, 1, 8, 8, 8)
    levels = [net.climb(encoder(image)) for net in (decoder, back.decoder)]
    for one, other in zip(*levels, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_an_untrained_decoder_is_not_taken_back(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", ResEncEncoder(**SMALL))  # type: ignore[arg-type]
    assert main(["export", "format=nnssl", f"backbone={path}", f"out={tmp_path / 'a.pth'}"]) == 0
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    assert fetch(tmp_path, held).decoder is None


def test_a_plan_names_the_network_and_where_its_weights_lie() -> None:
    with torch.device("meta"):
        large = build_backbone("resenc_l")
    assert isinstance(large, ResEncEncoder)
    plan = adaptation_plan(large, PreprocessSpec(), (160, 160, 160))
    assert plan["architecture_plans"]["arch_class_name"] == "ResEncL"
    assert list(plan["pretrain_plan"]["configurations"]) == ["onemmiso"]
    names = {theirs for name in large.state_dict() for theirs in reference_names(f"encoder.{name}", 6)}
    for key in ("key_to_encoder", "key_to_stem"):
        assert any(name.startswith(plan[key] + ".") for name in names)
    assert all(f"{key}.weight" in names for key in plan["keys_to_in_proj"])
    json.dumps(plan)  # plain values alone


def test_resenc_l_goes_out_under_the_956_names_and_shapes_of_the_published_network() -> None:
    with torch.device("meta"):
        large = build_backbone("resenc_l")
    assert isinstance(large, ResEncEncoder)
    weights = network_weights(large.to_empty(device="cpu"))
    assert {name: tuple(value.shape) for name, value in weights.items()} == dict(leaves(REFERENCE["names"]))
    assert len({value.data_ptr() for value in weights.values()}) == 256 + 8  # a storage a tensor, four coarser answers


def test_every_alias_shares_its_tensor(tmp_path: Path) -> None:
    weights: dict[str, Tensor] = network_weights(ResEncEncoder(**SMALL), channels=2)  # type: ignore[arg-type]
    assert weights["encoder.stem.convs.0.conv.weight"].shape == (4, 2, 3, 3, 3)
    places = {value.data_ptr() for value in weights.values()}
    assert len(places) < len(weights) / 2
    assert set(weights) == {t for n in small_by_formula().state_dict() for t in reference_names(n, LEVELS)}


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = build_backbone("unet_tiny")
    path = saved(tmp_path / "a.safetensors", plain)  # type: ignore[arg-type]
    assert main(["export", "format=nnssl", f"backbone={path}", f"out={tmp_path / 'a.pth'}"]) == 2
    assert "holds unet_tiny, which no network of nnssl" in capsys.readouterr().err
    (tmp_path / "c.pth").write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match="cannot be read"):
        read_checkpoint(tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="no such file"):
        read_checkpoint(tmp_path / "d.pth")
    torch.save({"epoch": 3}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="no tensors under"):
        read_checkpoint(tmp_path / "c.pth")


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = released()
    for name in reference_names("encoder.stem.0.weight", LEVELS):
        held["network_weights"][name].view(-1)[0] = torch.nan
    torch.save(held, tmp_path / "c.pth")
    assert main(["import", f"checkpoint={tmp_path / 'c.pth'}", f"out={tmp_path / 'b.safetensors'}"]) == 2
    assert "what becomes stem.0.weight is not finite" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()
