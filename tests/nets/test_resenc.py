"""The residual U-Net against the published one: parameters, names, shapes, values, gradients."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.exchange.nnssl import reference_names
from brainfm.nets.resenc import ResEncDecoder, ResEncEncoder, ResidualBlock

SMALL = {"widths": (4, 8, 8), "depths": (1, 2, 1)}  # a shortcut of every kind: none, pooled, pooled and projected


@pytest.fixture(scope="module")
def reference() -> dict:
    """What dynamic-network-architectures 0.4.4 gives: ``names``, a tree of the 956 tensors' shapes for ResEnc-L; and
    for SMALL with two classes, weights and image by ``formula``, ``output[0, 1, 5, 3, :]`` and the encoder's
    ``deepest[0, :, 1, 1, 2]``."""
    return json.loads((Path(__file__).parent / "resenc_reference.json").read_text())


def formula(name: str, shape: Sequence[int]) -> Tensor:
    """Values that depend on the name alone and need no generator."""
    count = torch.Size(shape).numel()
    step = torch.arange(count, dtype=torch.float64) + zlib.crc32(name.encode()) % 1000
    wave = torch.sin(0.7137 * step**2)
    wave = wave / (count / shape[0]) ** 0.5 + (1.0 if "norm.weight" in name else 0.0)
    return wave.float().reshape(*shape)


def network(encoder: ResEncEncoder, classes: int) -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": encoder, "decoder": ResEncDecoder(encoder.widths, encoder.strides, classes)})


def leaves(tree: dict, path: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, tuple(value)


def small_by_formula() -> nn.ModuleDict:
    net = network(ResEncEncoder(**SMALL), 2)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            theirs = next(n for n in reference_names(name, 3) if ".all_modules." not in n)
            value.copy_(formula(theirs, value.shape))
    return net


def test_resenc_l_is_the_published_network_tensor_by_tensor(reference: dict) -> None:
    with torch.device("meta"):
        net = network(build_backbone("resenc_l"), 1)
    assert sum(p.numel() for p in net["encoder"].parameters()) == 90_296_576
    assert sum(p.numel() for p in net.parameters()) == 102_348_965
    ours = {theirs: tuple(v.shape) for name, v in net.state_dict().items() for theirs in reference_names(name, 6)}
    theirs = dict(leaves(reference["names"]))
    assert len(theirs) == 956 and ours == theirs
    assert sum(len(reference_names(name, 6)) for name in net.state_dict()) == 956  # no name is claimed twice


def test_values_are_those_of_the_published_network(reference: dict) -> None:
    net, image = small_by_formula(), formula("image", (1, 1, 16, 8, 12))
    maps = net["encoder"](image)
    torch.testing.assert_close(maps[-1][0, :, 1, 1, 2], torch.tensor(reference["deepest"]), atol=1e-5, rtol=1e-4)
    output = net["decoder"](maps)
    torch.testing.assert_close(output[0, 1, 5, 3], torch.tensor(reference["output"]), atol=1e-5, rtol=1e-4)


def test_values_beside_the_installed_package() -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    theirs = unet.ResidualEncoderUNet(
        1, 6, (4, 6, 8, 8, 10, 10), nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], (1, 3, 4, 2, 1, 2), 3, [1] * 5, conv_bias=True,
        norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    ours = network(ResEncEncoder((4, 6, 8, 8, 10, 10), (1, 3, 4, 2, 1, 2)), 3)
    state = theirs.state_dict()
    with torch.no_grad():
        for name, value in ours.state_dict().items():
            value.copy_(state[reference_names(name, 6)[0]])
    image = torch.randn(2, 1, 64, 32, 64)
    torch.testing.assert_close(ours["decoder"](ours["encoder"](image)), theirs(image), atol=1e-4, rtol=1e-4)


def test_deep_supervision_ends_in_the_same_logits_and_reaches_every_parameter() -> None:
    net = network(ResEncEncoder(**SMALL), 3)
    maps = net["encoder"](torch.randn(2, 1, 8, 8, 16))
    pyramid = net["decoder"].pyramid(maps)
    assert [tuple(p.shape) for p in pyramid] == [(2, 3, 8, 8, 16), (2, 3, 4, 4, 8)]
    assert torch.equal(pyramid[0], net["decoder"](maps))
    sum((p**2).mean() for p in pyramid).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("edge", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_weight_gradients_are_right_on_every_map(edge: int, stride: int) -> None:
    """As for the plain block (test_unet.py); the edge is that of the map after the stride."""
    torch.manual_seed(0)
    block = ResidualBlock(48, 64, stride)
    image = torch.randn(2, 48, edge * stride, 4 * stride, 4 * stride)
    pull = torch.randn(2, 64, edge, 4, 4)
    gradients = []
    for enabled in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (block(image).float() * pull).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in block.named_parameters() if p.ndim > 1})
    for name, exact in gradients[0].items():
        assert (gradients[1][name] - exact).norm() < 0.2 * exact.norm(), name  # .13 at most was found


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.depths=\[1\]: expected two to eight"):
        build_backbone("resenc", widths=[4, 8], depths=[1])
    with pytest.raises(ConfigError, match=r"backbone\.widths=\[4, 0\]"):
        build_backbone("resenc", widths=[4, 0], depths=[1, 1])
    with pytest.raises(ConfigError, match="as many of both"):
        build_backbone("resenc", widths=[4, 8, 8], depths=[1, 1])
    with pytest.raises(ConfigError, match="multiples of 32 voxels, at least one of them 64"), torch.device("meta"):
        build_backbone("resenc_l").check_patch((32, 32, 32))
