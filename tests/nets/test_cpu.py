"""The quick layers of the CPU against torch's own."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.nets import cpu
from brainfm.nets.backbone import build_backbone
from brainfm.nets.decoders import Pointwise, SkipDecoder, Upsample
from brainfm.nets.unet import ConvNormAct


def both_layouts(*shape: int) -> list[Tensor]:
    image = 3 + 2 * torch.randn(*shape)
    return [image, image.contiguous(memory_format=torch.channels_last_3d)]


@pytest.mark.parametrize("slope", [0.01, 1.0])
@pytest.mark.parametrize("channels", [5, 160])
@pytest.mark.parametrize("layout", [0, 1])
def test_norm_act_is_instance_norm_and_leaky_relu(layout: int, channels: int, slope: float) -> None:
    torch.manual_seed(0)
    image = both_layouts(2, channels, 6, 5, 4)[layout].requires_grad_()
    norm = nn.InstanceNorm3d(channels, affine=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    got, want = cpu.norm_act(image, norm, slope), F.leaky_relu(norm(image), slope)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert got.stride() == image.stride()
    pull = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * pull).sum(), (image, norm.weight, norm.bias)) for y in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_norm_act__gradients_of_every_argument_by_finite_differences() -> None:
    torch.manual_seed(0)
    image, weight, bias = (torch.randn(n, dtype=torch.double, requires_grad=True) for n in ((2, 3, 2, 3, 2), 3, 3))
    assert torch.autograd.gradcheck(lambda x, w, b: cpu._NormAct.apply(x, w, b, 1e-5, 0.2), (image, weight, bias))


def test_norm_act__a_constant_map_and_a_large_offset_stay_finite_and_exact() -> None:
    norm = nn.InstanceNorm3d(2, affine=True)
    assert torch.equal(cpu.norm_act(torch.full((1, 2, 4, 4, 4), 7.0), norm, 0.01), torch.zeros(1, 2, 4, 4, 4))
    far = 1000 + torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = F.leaky_relu(F.instance_norm(far.double()), 0.01).float()
    torch.testing.assert_close(cpu.norm_act(far, norm, 0.01), exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("layout", [0, 1])
def test_upsample_is_the_transposed_convolution(layout: int, scale: int) -> None:
    torch.manual_seed(0)
    layer = Upsample(6, 4, scale)
    image = both_layouts(2, 6, 3, 4, 5)[layout].requires_grad_()
    compare(layer, image, F.conv_transpose3d(image, layer.weight, layer.bias, stride=scale))


@pytest.mark.parametrize("layout", [0, 1])
def test_pointwise_is_the_convolution(layout: int) -> None:
    torch.manual_seed(0)
    layer = Pointwise(6, 4)
    image = both_layouts(2, 6, 3, 4, 5)[layout].requires_grad_()
    compare(layer, image, F.conv3d(image, layer.weight, layer.bias))


def compare(layer: nn.Module, image: Tensor, want: Tensor) -> None:
    got = layer(image)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * pull).sum(), (image, *layer.parameters())) for y in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [0, 1])
def test_block_means_are_means_of_blocks(layout: int) -> None:
    image = both_layouts(2, 3, 4, 6, 8)[layout]
    want = F.avg_pool3d(image, (2, 3, 4))
    torch.testing.assert_close(cpu.block_means(image, (2, 2, 2)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["unet", "resenc"])
def test_whole_network_is_the_same_with_torchs_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of encoder and decoder; 160 channels lie on the other side of the change of layout."""
    torch.manual_seed(0)
    depths = {"depths": [1, 2]} if name == "resenc" else {}
    backbone = build_backbone(name, widths=[8, 160], **depths)
    decoder = SkipDecoder(backbone.widths, backbone.strides, 2)
    image = torch.randn(2, 1, 8, 8, 12)
    parameters = [*backbone.parameters(), *decoder.parameters()]
    found = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr(cpu, "is_for", lambda features: False)
        logits = decoder(backbone(image))
        found.append((logits, *torch.autograd.grad((logits**2).mean(), parameters)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3)


def test_same_result_every_time() -> None:
    torch.manual_seed(0)
    block, image = ConvNormAct(8, 16), torch.randn(2, 8, 12, 12, 12)
    runs = []
    for _ in range(3):
        block.zero_grad()
        block(image).square().sum().backward()
        runs.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("edges", [(7, 6, 5), (40, 24, 24)])
def test_first_convolution_is_the_convolution(kernel: int, edges: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(1, 6, kernel, padding=kernel // 2).double()
    image = torch.randn(2, 1, *edges, dtype=torch.double, requires_grad=True)
    got, want = cpu.first_convolution(image, conv), conv(image)
    assert got is not None and got.stride() == want.contiguous(memory_format=torch.channels_last_3d).stride()
    torch.testing.assert_close(got, want)
    pull = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * pull).sum(), (image, *conv.parameters())) for y in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_first_convolution__gradients_by_finite_differences_and_without_bias() -> None:
    torch.manual_seed(0)
    image, weight = (
        torch.randn(*n, dtype=torch.double, requires_grad=True) for n in ((2, 1, 3, 2, 3), (2, 1, 3, 3, 3))
    )
    assert torch.autograd.gradcheck(lambda x, w: cpu._FirstConvolution.apply(x, w, None), (image, weight))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(1, 4, 3, stride=2, padding=1), nn.Conv3d(1, 4, 2), nn.Conv3d(1, 4, 3)],
)
def test_first_convolution_declines_what_it_is_not_for(conv: nn.Conv3d) -> None:
    assert cpu.first_convolution(torch.zeros(1, conv.in_channels, 4, 4, 4), conv) is None


@pytest.mark.parametrize("slope", [0.01, 1.0])
@pytest.mark.parametrize("channels", [5, 160])
@pytest.mark.parametrize("layout", [0, 1])
def test_norm_act_without_gradients_takes_no_new_memory_and_gives_the_same_bits(
    layout: int, channels: int, slope: float
) -> None:
    torch.manual_seed(0)
    image = both_layouts(2, channels, 6, 5, 4)[layout]
    norm = nn.InstanceNorm3d(channels, affine=True)
    want = cpu.norm_act(image.clone(), norm, slope).detach()
    with torch.no_grad():
        got = cpu.norm_act(image, norm, slope)
    assert torch.equal(got, want) and got.stride() == want.stride() and got.data_ptr() == image.data_ptr()


@pytest.mark.parametrize("name", ["unet_tiny", "resenc_s"])
def test_a_backbone_without_gradients_leaves_its_image_and_answers_the_same(name: str) -> None:
    torch.manual_seed(0)
    net = build_backbone(name)
    image = torch.randn(1, 1, 32, 32, 32)
    before = image.clone()
    want = [m.detach() for m in net.features(image)]
    with torch.no_grad():
        got = net.features(image)
    assert torch.equal(image, before)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_not_faulted_in_again_by_any_thread() -> None:
    code = """
import ctypes, resource, threading
from brainfm.nets.cpu import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block = c.malloc(80_000_000)
        ctypes.memset(block, 1, 80_000_000)
        c.free(block)
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
faults()
keep_freed_memory()
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
print(*found)
"""
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    before, after, in_thread = map(int, words)
    assert after < before / 3 and in_thread < before / 3
