"""The published encoder, part by part."""

import pytest
import torch
import torch.nn.functional as F

from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import LightDecoder, Pointwise, SkipDecoder, chained
from brainfm.nets.latents import Latents
from brainfm.nets.unet import ConvNormAct


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_unet_b_has_the_published_parameter_counts():
    with torch.device("meta"):
        backbone = build_backbone("unet_b")
        latents = Latents(backbone.widths, {"anatomy": 0.5, "contrast": 0.5}, 512, variational=True)
        decoder = LightDecoder(512, backbone.widths, backbone.strides)
    assert (_count(backbone), _count(latents), _count(decoder)) == (14_134_944, 1_016_832, 3_744_673)
    assert [len(m.state_dict()) for m in (backbone, latents, decoder)] == [40, 8, 26]


def test_features_compare_to_a_flat_rewriting():
    torch.manual_seed(0)
    backbone = build_backbone("unet", widths=[3, 5])
    image = torch.randn(2, 1, 8, 8, 8)
    state = backbone.state_dict()
    x, expected = image, []
    for level in range(2):
        for index in range(2):
            prefix = f"levels.{level}.{index}"
            x = F.conv3d(x, state[f"{prefix}.0.weight"], state[f"{prefix}.0.bias"], padding=1)
            x = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x * state[f"{prefix}.1.weight"][:, None, None, None] + state[f"{prefix}.1.bias"][:, None, None, None]
            x = torch.where(x > 0, x, 0.01 * x)
        expected.append(x)
        x = x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2).amax((5, 6, 7))
    for got, want in zip(backbone(image), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("patch", [(4, 4, 4), (16, 16, 10), (0, 16, 16), (16, 16)])
def test_check_patch__impossible(patch):
    with pytest.raises(ConfigError, match="multiples of 4 voxels"):
        build_backbone("unet_tiny").check_patch(patch)


def test_smallest_patch_trains():
    backbone = build_backbone("unet_tiny").train()
    backbone.check_patch((4, 4, 8))
    backbone(torch.randn(1, 1, 4, 4, 8))
    with pytest.raises(ConfigError):
        backbone(torch.randn(1, 1, 4, 4, 4))


def test_build_backbone__refusals():
    with pytest.raises(ConfigError, match=r"unknown backbone 'unet_x', expected one of adapted, .*unet_tiny, vit"):
        build_backbone("unet_x")
    with pytest.raises(ConfigError, match="unknown key depth for backbone unet_tiny, expected none"):
        build_backbone("unet_tiny", depth=3)
    with pytest.raises(ConfigError, match="needs the key widths"):
        build_backbone("unet")
    with pytest.raises(ConfigError, match=r"backbone\.widths"):
        build_backbone("unet", widths=[4, -1])


def test_skip_decoder__shape_and_gradient_to_every_parameter():
    backbone = build_backbone("unet_tiny")
    decoder = SkipDecoder(backbone.widths, backbone.strides, out_channels=3)
    logits = decoder(backbone(torch.randn(2, 1, 8, 16, 12)))
    assert logits.shape == (2, 3, 8, 16, 12)
    (logits**2).mean().backward()
    assert all(p.grad is not None for p in [*backbone.parameters(), *decoder.parameters()])


def test_skip_decoder__uses_every_map():
    backbone = build_backbone("unet_tiny")
    decoder = SkipDecoder(backbone.widths, backbone.strides, out_channels=2)
    maps = [m.detach().requires_grad_() for m in backbone(torch.randn(1, 1, 8, 8, 8))]
    (decoder(maps) ** 2).mean().backward()
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in maps)


@pytest.mark.parametrize("fast", [True, False])
def test_chained__is_one_layer_after_the_other(fast):
    torch.manual_seed(0)
    first, second = Pointwise(4, 12), Pointwise(12, 3)
    if fast:
        swap_in(torch.nn.ModuleList([first, second]))
    image = torch.randn(2, 4, 3, 5, 2)
    found, grads = [], []
    for answer in (lambda x: second(first(x)), lambda x: chained(x, first, second)):
        x = image.clone().requires_grad_()
        value = answer(x)
        assert value.shape == (2, 3, 3, 5, 2)
        parameters = [x, *first.parameters(), *second.parameters()]
        found.append(value.detach())
        grads.append(torch.autograd.grad(value.square().sum(), parameters))
    torch.testing.assert_close(found[1], found[0])
    for one, other in zip(*grads):
        torch.testing.assert_close(other, one)


def test_chained__keeps_no_wide_map():
    first, second = Pointwise(4, 64), Pointwise(64, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        chained(torch.randn(1, 4, 8, 8, 8, requires_grad=True), first, second)
    assert max(kept) == 4 * 8**3


def test_chained__under_autocast_the_product_of_weights_stays_exact():
    torch.manual_seed(0)
    first, second = Pointwise(4, 12), Pointwise(12, 3)
    image = torch.randn(1, 4, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = chained(image, first, second)
        found.float().mean().backward()
    torch.testing.assert_close(found.float(), second(first(image)), atol=0.03, rtol=0.03)
    assert first.weight.grad is not None and first.weight.grad.dtype == torch.float32


def test_left_stays_left():
    """A bright corner of the image is found in the same corner of every map and of the decoder's output grid."""
    torch.manual_seed(0)
    backbone = build_backbone("unet_tiny").eval()
    quiet = torch.randn(1, 1, 32, 32, 32) * 0.01
    bright = quiet.clone()
    bright[..., 0:2, 28:32, 12:16] += 5
    change = (backbone.levels[0][0][0](bright) - backbone.levels[0][0][0](quiet)).abs().sum(1)[0]
    corner = change.nonzero().float().mean(0)
    assert corner[0] < 3 and corner[1] > 26 and 11 < corner[2] < 16


@pytest.mark.parametrize("edge", [1, 2, 3, 4])
def test_bfloat16_weight_gradients_are_right_on_every_map(edge: int) -> None:
    """oneDNN leaves the gradient of a map 2 voxels deep uninitialised; the block must not pass that on."""
    torch.manual_seed(0)
    block = ConvNormAct(64, 64)
    image = torch.randn(2, 64, edge, 4, 4)
    gradients = []
    for enabled in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            block(image).float().square().mean().backward()
        gradients.append(block[0].weight.grad.clone())
    scale = gradients[0].abs().max()
    assert (gradients[1] - gradients[0]).abs().max() < 0.2 * scale
