"""Primus: equal to the network of dynamic-network-architectures, tensor by tensor and value by value."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.exchange.primus import from_reference, to_reference
from brainfm.nets.primus import PatchDecoder, Primus
from tests.nets.test_resenc import formula

GRID_VOX = (16, 32, 24)


@pytest.fixture(scope="module")
def reference() -> dict:
    """What dynamic-network-architectures 0.4.4 with timm 1.0.22 gives: for Primus-M at 160 voxels the ``shapes`` of all
    tensors but those of the first 15 blocks, and the numbers of ``tensors`` and ``parameters``; and for two blocks of
    24 channels with two heads and two classes, weights and image by ``formula`` (layer scales a tenth of it),
    ``output[0, 1, 5, 3, :]`` and the ``deepest[0, :, 1, 2, 1]`` map."""
    return json.loads((Path(__file__).parent / "primus_reference.json").read_text())


def network(encoder: nn.Module, classes: int) -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": encoder, "decoder": PatchDecoder(encoder.widths[-1], classes)})


def test_primus_m_is_the_published_network_tensor_by_tensor(reference: dict) -> None:
    with torch.device("meta"):
        net = network(build_backbone("primus_m", grid_vox=[160, 160, 160]), 2)
    assert sum(p.numel() for p in net.parameters()) == reference["parameters"]
    theirs = to_reference(net.state_dict())
    last = {n: list(v.shape) for n, v in theirs.items() if not n.startswith("eva.blocks.") or ".15." in n}
    assert (last, len(theirs)) == (reference["shapes"], reference["tensors"])


@pytest.mark.parametrize(("size", "millions"), [("s", 23.9), ("b", 93.2), ("m", 146.6), ("l", 325.6)])
def test_sizes_are_the_published_ones(size: str, millions: float) -> None:
    """With the decoder for two classes, at 96 voxels."""
    with torch.device("meta"):
        net = network(build_backbone(f"primus_{size}"), 2)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == millions


def test_values_are_those_of_the_published_network(reference: dict) -> None:
    net = network(Primus(24, 2, 2, grid_vox=GRID_VOX), 2).eval()
    theirs = {n: formula(n, v.shape) * (0.1 if "gamma" in n else 1) for n, v in to_reference(net.state_dict()).items()}
    net.load_state_dict(from_reference(theirs, (2, 4, 3)), strict=True)
    with torch.no_grad():
        maps = net["encoder"](formula("image", (1, 1, *GRID_VOX)))
        output = net["decoder"](maps)
    torch.testing.assert_close(maps[-1][0, :, 1, 2, 1], torch.tensor(reference["deepest"]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output[0, 1, 5, 3], torch.tensor(reference["output"]), atol=1e-5, rtol=1e-4)


def test_names_go_there_and_back() -> None:
    net = network(Primus(24, 2, 2, grid_vox=GRID_VOX), 2)
    state = net.state_dict()
    again = from_reference(to_reference(state), (2, 4, 3))
    assert set(again) == set(state) and all(torch.equal(again[name], value) for name, value in state.items())
    with pytest.raises(KeyError):
        to_reference({"encoder.something": torch.zeros(1)})


def test_learned_places_are_stretched_to_another_grid() -> None:
    """Places that vary evenly along an axis still do on a grid of twice as many tokens."""
    net = Primus(24, 1, 2, grid_vox=(32, 16, 16))
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(1, 24, 4, 2, 2)
    with torch.no_grad():
        net.embed.places.copy_(ramp)
        net.embed.patches.weight.zero_()
        net.embed.patches.bias.zero_()
        there = net.embed(torch.zeros(1, 1, 64, 32, 16))[0, 0, :, 0, 0]
    assert there.shape == (8,) and torch.all(there.diff() >= 0)
    torch.testing.assert_close(there[2:6], torch.tensor([0.25, 0.4167, 0.5833, 0.75]), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"width": 25, "depth": 1, "heads": 2}, "even number of channels"),
        ({"width": 24, "depth": 1, "heads": 2, "grid_vox": [12, 16, 16]}, "three multiples of 8"),
        ({"width": 24, "depth": 1, "heads": 2, "drop_path": 1.0}, "drop_path < 1"),
        ({"width": 24, "depth": 1, "heads": 2, "taps": 2}, "expected 1 to 1"),
    ],
)
def test_refusals(config: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_backbone("primus", **config)
