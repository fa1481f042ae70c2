"""Planar networks: what a 3D network gives for an image that is constant along an axis."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.crossdomain.planar import Axis, Planar, flat
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in


def endless(backbone: Backbone, dim: int) -> Backbone:
    """The 3D network as it is in the midst of an image without end along one axis: its convolutions repeat the map's
    edge there in place of adding zeros."""
    network = copy.deepcopy(backbone)
    for part in network.modules():
        if isinstance(part, nn.Conv3d):
            more = [0] * 6
            more[2 * (2 - dim)] = more[2 * (2 - dim) + 1] = part.padding[dim]
            part.padding = tuple(0 if place == dim else p for place, p in enumerate(part.padding))
            part.register_forward_pre_hook(lambda _, given, more=more: F.pad(given[0], more, mode="replicate"))
    return network


def fresh(name: str, **settings: object) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(name, **settings)
    with torch.no_grad():
        for part in backbone.modules():
            if isinstance(part, nn.InstanceNorm3d):  # scale and shift that are not those of a fresh network
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.3, 0.3)
    return backbone.eval()


NETWORKS = [("unet_tiny", {}), ("resenc", {"widths": [4, 8, 8], "depths": [1, 2, 1]})]


@pytest.mark.parametrize(("name", "settings"), NETWORKS, ids=["unet", "resenc"])
@pytest.mark.parametrize(("axis", "dim"), [("x", 0), ("y", 1), ("z", 2)])
def test_a_planar_network_is_the_3d_network_on_a_constant_image(
    name: str, settings: dict[str, object], axis: Axis, dim: int
) -> None:
    backbone = fresh(name, **settings)
    planar = Planar(backbone, axis).eval()
    image = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps = planar(image)
        volumes = endless(backbone, dim).features(image.unsqueeze(2 + dim).repeat_interleave(8, 2 + dim))
    for flat_map, volume in zip(maps, volumes, strict=True):
        for place in range(volume.shape[2 + dim]):
            assert torch.allclose(volume.select(2 + dim, place), flat_map, atol=2e-5)


def test_one_convolution_with_zeros_around_it_agrees_in_the_midst() -> None:
    layer = nn.Conv3d(1, 3, 3, padding=1)
    image = torch.randn(1, 1, 8, 10)
    volume = layer(image.unsqueeze(-1).repeat_interleave(5, -1))
    plane = F.conv2d(image, flat(layer.weight, "z"), layer.bias, padding=1)
    assert torch.allclose(volume[..., 2], plane, atol=1e-5) and not torch.allclose(volume[..., 0], plane, atol=1e-2)


def test_the_mean_over_axes_favours_none() -> None:
    kernel = torch.randn(2, 1, 3, 3, 3)
    expected = (kernel.sum(2) + kernel.sum(3) + kernel.sum(4)) / 3
    assert torch.allclose(flat(kernel, "mean"), expected, atol=1e-6)
    with pytest.raises(ConfigError, match="expected a cube"):
        flat(torch.zeros(1, 1, 3, 3, 1), "mean")
    maps = Planar(fresh("unet_tiny"), "mean")(torch.randn(1, 1, 16, 16))
    assert [tuple(each.shape) for each in maps] == [(1, 8, 16, 16), (1, 16, 8, 8), (1, 32, 4, 4)]


def test_every_tensor_is_transferred_and_the_source_stays() -> None:
    backbone = swap_in(fresh("unet_tiny"))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    planar = Planar(backbone)
    assert set(planar.report.loaded) == set(before) and not planar.report.left_at_init and not planar.report.unused
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.features(torch.randn(1, 1, 8, 8, 8))[0].ndim == 5
    planar(torch.randn(1, 1, 16, 16))[-1].sum().backward()
    grads = [value.grad is not None for name, value in planar.named_parameters() if not name.endswith("_")]
    assert all(grads)


class Odd(Backbone):
    """A network with something that has no planar form."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.widths, self.strides, self.config, self.part = (1,), (1,), {"name": "odd"}, part

    def features(self, image: Tensor) -> list[Tensor]:
        return [self.part(image)]

    features_masked = blocks = None  # type: ignore[assignment]


class Calls(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return F.lp_pool3d(image, 2, 2)


def test_what_has_no_planar_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="part is a ConvTranspose3d, which has no planar form"):
        Planar(Odd(nn.ConvTranspose3d(1, 1, 2, 2)))
    with pytest.raises(ConfigError, match="lp_pool3d, which has no planar form"):
        Planar(Odd(Calls()))(torch.randn(1, 1, 8, 8))
    with pytest.raises(ConfigError, match="axis=w: expected one of x, y, z, mean"):
        Planar(fresh("unet_tiny"), "w")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected multiples of 4 pixels"):
        Planar(fresh("unet_tiny"))(torch.randn(1, 1, 10, 16))
