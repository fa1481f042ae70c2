"""Restored lengths: the same answers, steps that move the weights as much as at the start."""

import pytest
import torch
from torch import nn

from brainfm.nets.backbone import build_backbone
from brainfm.nets.decoders import decoder_for
from brainfm.nets.lengths import restore_lengths


def network(name: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    backbone = build_backbone(name, **({"widths": [4, 8], "depths": [1, 2]} if name == "resenc" else {}))
    return nn.ModuleDict({"backbone": backbone, "decoder": decoder_for(backbone, 3)})


def answer(net: nn.ModuleDict) -> torch.Tensor:
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    return net["decoder"](net["backbone"](image))


@pytest.mark.parametrize("name", ["unet_tiny", "resenc"])
def test_a_fresh_network_has_the_usual_lengths(name: str) -> None:
    assert restore_lengths(network(name)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ["unet_tiny", "resenc"])
def test_a_grown_network_answers_as_before_and_learns_as_fast_as_at_first(name: str) -> None:
    net = network(name)
    grown = [m[0] for m in net.modules() if type(m).__name__.endswith("ConvNormAct")]
    assert len(grown) > 4
    with torch.no_grad():
        for number, convolution in enumerate(grown):
            for value in convolution.parameters():
                value.mul_(4.0 + number % 3)
    before, moved = answer(net), []
    assert 3.5 < restore_lengths(net) < 6.5
    torch.testing.assert_close(answer(net), before, atol=2e-3, rtol=2e-3)
    for scale in (1.0, 8.0):  # of the weights when the step is taken
        with torch.no_grad():
            for convolution in grown:
                convolution.weight.mul_(scale)
        start = [c.weight.detach().clone() for c in grown]
        optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0)
        optimiser.zero_grad()
        answer(net).square().mean().backward()
        optimiser.step()
        moved.append(sum(float((c.weight.detach() - s).norm() / s.norm()) for c, s in zip(grown, start)))
    assert moved[0] > 5 * moved[1]  # what the lengths are restored for


def test_a_layer_of_zeros_and_a_network_without_such_layers_stay() -> None:
    net = network("unet_tiny")
    first = next(m for m in net.modules() if type(m).__name__.endswith("ConvNormAct"))[0]
    with torch.no_grad():
        first.weight.zero_()
    restore_lengths(net)
    assert not first.weight.any() and torch.isfinite(answer(net)).all()
    assert restore_lengths(nn.Linear(2, 2)) == 1.0
