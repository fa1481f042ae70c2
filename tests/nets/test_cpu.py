"""The quick layers of the CPU against torch's own."""

import copy
import ctypes
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from brainfm.nets import cpu
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead, Pointwise, SkipDecoder, Upsample
from brainfm.nets.latents import Latents
from brainfm.nets.unet import ConvNormAct
from brainfm.objectives.objective import build_objective
from brainfm.specs import PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.registry import build_task
from brainfm.tasks.segmentation.network import SegmentationTask


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
    layer = cpu.swap_in(Upsample(6, 4, scale))
    image = both_layouts(2, 6, 3, 4, 5)[layout].requires_grad_()
    compare(layer, image, F.conv_transpose3d(image, layer.weight, layer.bias, stride=scale))


@pytest.mark.parametrize("layout", [0, 1])
def test_pointwise_is_the_convolution(layout: int) -> None:
    torch.manual_seed(0)
    layer = cpu.swap_in(Pointwise(6, 4))
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
def test_whole_network_is_the_same_with_torchs_layers(name: str) -> None:
    """Values and gradients of encoder and decoder; 160 channels lie on the other side of the change of layout."""
    torch.manual_seed(0)
    depths = {"depths": [1, 2]} if name == "resenc" else {}
    backbone = build_backbone(name, widths=[8, 160], **depths)
    decoder = SkipDecoder(backbone.widths, backbone.strides, 2)
    image = torch.randn(2, 1, 8, 8, 12)
    parameters = [*backbone.parameters(), *decoder.parameters()]
    found = []
    for swap in (cpu.swap_in, cpu.swap_out):
        for network in (backbone, decoder):
            swap(network)
        logits = decoder(backbone(image))
        found.append((logits, *torch.autograd.grad((logits**2).mean(), parameters)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-3)


def test_same_result_every_time() -> None:
    torch.manual_seed(0)
    block, image = cpu.swap_in(ConvNormAct(8, 16)), torch.randn(2, 8, 12, 12, 12)
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


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("layout", [0, 1])
def test_a_small_map_of_one_scan_by_halves_is_the_convolution(layout: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv3d(5, 6, kernel, stride, padding=kernel // 2).double()
    image = both_layouts(1, 5, 16, 8, 4)[layout].double().requires_grad_()
    assert cpu._by_halves(image, conv)
    got, want = cpu.convolution(image, conv), conv(image)
    torch.testing.assert_close(got, want)
    pull = torch.randn_like(want)
    gradients = [torch.autograd.grad((y * pull).sum(), (image, *conv.parameters())) for y in (got, want)]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("shape", "conv"),
    [
        ((2, 5, 16, 8, 4), nn.Conv3d(5, 6, 3, padding=1)),  # oneDNN takes a batch of two
        ((1, 5, 64, 65, 4), nn.Conv3d(5, 6, 3, padding=1)),  # and a large map
        ((1, 5, 6, 8, 4), nn.Conv3d(5, 6, 3, padding=1)),  # too thin
        ((1, 5, 14, 8, 4), nn.Conv3d(5, 6, 3, 4, padding=1)),  # no halves of one size
        ((1, 5, 16, 8, 4), nn.Conv3d(5, 6, 1)),
        ((1, 5, 16, 8, 4), nn.Conv3d(5, 160, 3, padding=1)),
        ((1, 6, 16, 8, 4), nn.Conv3d(6, 6, 3, padding=1, groups=2)),
    ],
)
def test_other_convolutions_are_torchs(shape: tuple[int, ...], conv: nn.Conv3d) -> None:
    image = torch.randn(*shape)
    assert not cpu._by_halves(image, conv)
    assert torch.equal(cpu.convolution(image, conv), conv(cpu.laid_out(image, conv.out_channels)))


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
    net = cpu.swap_in(build_backbone(name))
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


# ---- swapped in and out ----------------------------------------------------------------------------------------------


def answering() -> SegmentationTask:
    """Every kind of layer that has a quick form, but for latents."""
    torch.manual_seed(0)
    spec = TaskSpec("segmentation", "lesion", ("t1", "t2"), (0, 1), (8, 8, 12), fusion="attention")
    task = SegmentationTask(spec, build_backbone("unet", widths=[4, 8]), dense_channels=6)
    for score in task.fusion.scores:
        nn.init.normal_(score.weight)
    return task.eval()


def quick_layers(network: nn.Module) -> int:
    return sum(isinstance(part, cpu._Quick) for part in network.modules())


def test_swapping_changes_classes_and_nothing_else() -> None:
    task = answering()
    image, present = torch.randn(2, 2, 8, 8, 12), torch.tensor([[True, True], [True, False]])
    names, parameters, modules = list(task.state_dict()), list(task.parameters()), list(task.modules())
    plain = task(image, present)
    assert cpu.swap_in(task) is task and quick_layers(task) == 10
    assert list(task.state_dict()) == names and list(task.modules()) == modules
    assert all(one is two for one, two in zip(task.parameters(), parameters, strict=True))
    torch.testing.assert_close(task(image, present), plain, atol=2e-5, rtol=1e-4)
    assert cpu.swap_out(cpu.swap_in(task)) is task and quick_layers(task) == 0
    assert torch.equal(task(image, present), plain)


def test_deep_copies_pickles_and_files_of_a_swapped_network(tmp_path: Path) -> None:
    task = cpu.swap_in(answering())
    image, present = torch.randn(1, 2, 8, 8, 12), torch.ones(1, 2, dtype=torch.bool)
    want = task(image, present)
    for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert quick_layers(other) == quick_layers(task)
        assert torch.equal(other(image, present), want)
        assert all(one is not two for one, two in zip(other.parameters(), task.parameters(), strict=True))
    save_file(task.state_dict(), tmp_path / "w.safetensors")
    plain = answering()
    nn.init.zeros_(plain.decoder.out.weight)
    plain.load_state_dict(load_file(tmp_path / "w.safetensors"))
    assert torch.equal(cpu.swap_in(plain)(image, present), want)


def test_moved_off_the_cpu_a_network_has_its_ordinary_layers() -> None:
    """A device without memory stands for a GPU."""
    latents = Latents((4, 8), {"a": 0.5, "b": 0.5}, 6)
    head = DenseHead("a", 3, ("x",))
    for network in (answering(), latents, head):
        ordinary = [type(part) for part in network.modules()]
        assert quick_layers(cpu.swap_in(network)) and [type(p) for p in network.modules()] != ordinary
        assert [type(part) for part in network.to("meta").modules()] == ordinary
        assert quick_layers(cpu.swap_in(network)) == 0, "not on a CPU"


def test_a_swapped_network_under_autocast_computes_as_an_ordinary_one() -> None:
    task = answering()
    image, present = torch.randn(1, 2, 8, 8, 12), torch.ones(1, 2, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        plain = task(image, present)
        assert torch.equal(cpu.swap_in(task)(image, present), plain) and plain.dtype == torch.bfloat16
    task.double()
    assert torch.equal(task(image.double(), present), cpu.swap_out(task)(image.double(), present))


def test_latents_average_blocks_alike_in_both_forms() -> None:
    latents, maps = Latents((3, 4), {"all": 1.0}, 5), [torch.randn(2, 3, 8, 4, 6), torch.randn(2, 4, 2, 2, 3)]
    plain = latents(maps)["all"].mean
    torch.testing.assert_close(cpu.swap_in(latents)(maps)["all"].mean, plain, atol=1e-5, rtol=1e-5)


def test_networks_built_by_name_have_the_layers_of_a_cpu(tmp_path: Path) -> None:
    backbone = build_backbone("unet_tiny")
    objective = build_objective("mae", backbone, patch_vox=(16, 16, 16), seed=0, latent_channels=8)
    assert quick_layers(objective) == 6 + 1 + 5  # encoder, latents, decoder
    task = build_task(TaskSpec("segmentation", "lesion", ("t1",), (0, 1), (16,) * 3), build_backbone("unet_tiny"))
    assert quick_layers(task) == 6 + 3 + 5  # the scores of the fusion between
    file = tmp_path / "backbone.safetensors"
    save_backbone(
        file, backbone, objective={"name": "none", "config": {}}, objective_state={},
        provenance=Provenance("0", "", ""), preprocess=PreprocessSpec(spacing_mm=(1, 1, 1)), patch_vox=(16, 16, 16),
        decoder=DenseDecoder(backbone.widths, backbone.strides, {"a": 4}), heads={"x": DenseHead("a", 4, ("y",))},
    )  # fmt: skip
    loaded = load_backbone(file)
    assert quick_layers(loaded.backbone) == 6 and quick_layers(loaded.decoder) == 5 and quick_layers(loaded.heads["x"])
