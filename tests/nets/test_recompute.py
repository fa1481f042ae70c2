"""Recomputed blocks: the same values and gradients to the bit, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brainfm.nets.backbone import BACKBONES, Backbone, build_backbone
from brainfm.nets.decoders import SkipDecoder
from brainfm.nets.recompute import Blocks, set_checkpointing
from brainfm.nets.vit import TokenEncoder

SETTINGS: dict[str, dict[str, Any]] = {
    "unet": {"widths": [4, 8, 16]},
    "resenc": {"widths": [4, 8, 16], "depths": [1, 2, 2]},
    "vit": {"width": 24, "depth": 3, "heads": 2, "patch_vox": 4, "grid_vox": [8, 8, 8]},
    "primus": {"width": 24, "depth": 3, "heads": 2, "grid_vox": [16, 16, 16]},
}


class Whole(nn.Module):
    """A network of encoder and decoder, as a segmentation has them."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone, self.decoder = backbone, SkipDecoder(backbone.widths, backbone.strides, 2)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.backbone.features(image))


def whole(name: str) -> Whole:
    torch.manual_seed(0)
    return Whole(build_backbone(name, **SETTINGS.get(name, {})))


def image_for(backbone: Backbone) -> Tensor:
    stride = backbone.strides[-1]
    return torch.randn(1, 1, 2 * stride, stride, stride, generator=torch.Generator().manual_seed(1))


def gradients(net: nn.Module, image: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """Output, gradients of every parameter, bytes kept between the passes (weights aside)."""
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Tensor] = {}

    def note(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    net.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        output = net(image)
    size = sum(value.untyped_storage().nbytes() for value in kept.values())
    kept.clear()
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None], size


def test_every_backbone_belongs_to_a_family_tested_here() -> None:
    """The large ones are the same classes; on the meta device they cost nothing."""
    tested = {type(build_backbone(name, **settings)) for name, settings in SETTINGS.items()}
    for name in BACKBONES.keys() - {"adapted"}:  # whose parts are somebody else's
        with torch.device("meta"):
            net = build_backbone(name, **SETTINGS.get(name, {}))
        assert type(net) in tested
        set_checkpointing(net, True)
        if isinstance(net, TokenEncoder):  # each block of attention is recomputed; cubes are embedded once
            continue
        inside = {c for m in net.modules() if isinstance(m, Blocks) and m.checkpointing for c in m.modules()}
        loose = [m for m in net.modules() if isinstance(m, nn.Conv3d) and m not in inside]
        assert loose == ([net.stem[0]] if hasattr(net, "stem") else [])  # which is recomputed on its own


@pytest.mark.parametrize("name", [*SETTINGS, "unet_tiny"])
def test_gradients_are_equal_to_the_bit(name: str) -> None:
    net = whole(name)
    image = image_for(net.backbone)
    output, plain, _ = gradients(net, image)
    set_checkpointing(net, True)
    assert net.backbone.checkpointing and net.decoder.checkpointing
    again, recomputed, _ = gradients(net, image)
    assert torch.equal(output, again)
    assert len(plain) == len(recomputed) == len(list(net.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, recomputed))


@pytest.mark.parametrize("name", ["unet", "resenc"])
def test_less_is_kept(name: str) -> None:
    net = whole(name)
    image = torch.randn(1, 1, 32, 32, 32)
    sizes = []
    for encoder, decoder in ((False, False), (True, False), (False, True), (True, True)):
        net.backbone.checkpointing = encoder
        net.decoder.checkpointing = decoder
        sizes.append(gradients(net, image)[2])
    none, encoder_only, decoder_only, both = sizes
    assert both < encoder_only < none and both < decoder_only < none
    assert both < 0.5 * none


def test_the_switch_is_no_part_of_the_network() -> None:
    net = build_backbone("unet", widths=[4, 8])
    names = list(net.state_dict())
    net.checkpointing = True
    assert list(net.state_dict()) == names and net.config == {"name": "unet", "widths": [4, 8]}
    assert not build_backbone(**net.config).checkpointing
    with torch.no_grad():
        assert not net.features(torch.randn(1, 1, 4, 4, 4))[-1].requires_grad


def test_a_frozen_encoder_needs_no_second_pass() -> None:
    net = whole("unet")
    set_checkpointing(net, True)
    net.backbone.requires_grad_(False)
    calls: list[int] = []
    net.backbone.blocks()[0].register_forward_hook(lambda *_: calls.append(1))
    _, found, _ = gradients(net, image_for(net.backbone))
    assert len(found) == len(list(net.decoder.parameters())) and len(calls) == 1


def test_in_mixed_precision_the_second_pass_is_the_first() -> None:
    net = whole("resenc")
    image = image_for(net.backbone)
    found = []
    for on in (False, True):
        set_checkpointing(net, on)
        net.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(image).float().square().mean()
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
