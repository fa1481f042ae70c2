"""Layers for a CPU: those of a network in float32 compute the same values up to rounding, in less time.

``swap_in`` puts them in the places of the ordinary layers, once; the networks themselves know nothing of it.

Measured on one AVX512 core (torch 2.13, oneDNN), shares of a training step of a U-Net at 48 voxels:
convolutions of up to 128 channels are 1.2 to 1.6 times faster with channels last, those of more channels on the small
maps below are up to twice slower; torch's instance norm copies such maps to the other layout and back; its 2x2x2
transposed convolution runs at a sixth of the processor's rate, which one matrix product reaches; the gradient of a
convolution of one channel takes seven times as long as matrix products over slabs of the image do; a batch of one with
a small map meets torch's own convolution instead of oneDNN's, and two of its halves as a batch of two take a seventh to
a half of the time. scripts/benchmark/cpu.py measures the layers together.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brainfm.nets.decoders import DenseHead, Pointwise, Upsample
from brainfm.nets.latents import Latents
from brainfm.nets.unet import ConvNormAct

_VOXELS = (2, 3, 4)
_MOST_CHANNELS_LAST = 128
_SLAB_VOXELS = 2**14
_SMALL_MAP = 20_480  # E X Y up to which torch keeps a batch of one from oneDNN (ConvParams::use_mkldnn)
_LEAST_HALF = 4  # planes: below, what two halves repeat costs what they gain
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of glibc's mallopt
_Network = TypeVar("_Network", bound=nn.Module)


def swap_in(network: _Network) -> _Network:
    """Gives every layer of a network that lies on a CPU its quick form, in place; returns the network.

    Parameters, their names, hooks and copies are those of the ordinary layers: a layer changes its class alone, as with
    torch's parametrizations. Where a quick form does not apply (autocast, another precision, a compiler) it computes as
    the ordinary layer does, and moved to another device the layer is an ordinary one again.
    """
    for part in network.modules():
        quick = _QUICK.get(type(part))
        if quick is not None and _on_cpu(part):
            part.__class__ = quick
    return network


def swap_out(network: _Network) -> _Network:
    """Gives every layer its ordinary form back, in place, e.g. to trace or export the network; returns the network."""
    for part in network.modules():
        if isinstance(part, _Quick):
            part.__class__ = part.ordinary  # type: ignore[assignment]
    return network


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed: maps as large as these are not faulted in again, page by page.

    It holds for the process and all of its threads. Changes nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_ARENA_MAX, 1)  # a thread's own arena would hold no block above 64 MB


def is_for(features: Tensor) -> bool:
    """Whether the functions of this module apply; elsewhere torch's own layers are as good or better."""
    return (
        features.device.type == "cpu"
        and features.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def laid_out(features: Tensor, channels_out: int) -> Tensor:
    """The map in the memory layout that suits a convolution to so many channels; [B, E, X, Y, Z] all the same."""
    if channels_out > _MOST_CHANNELS_LAST:
        return features.contiguous()
    if features.shape[1] == 1:  # torch takes one channel for any layout: strides that say channels last
        return features.contiguous()[:, 0, ..., None].movedim(-1, 1)
    return features.contiguous(memory_format=torch.channels_last_3d)


def first_convolution(image: Tensor, conv: nn.Conv3d) -> Tensor | None:
    """A convolution of one channel as matrix products over slabs of the image, channels last.

    None where it does not apply: more channels, a stride, other padding than half an odd kernel.
    """
    kernel, padding = conv.kernel_size, cast("tuple[int, ...]", conv.padding)
    same = all(k % 2 == 1 and p == k // 2 for k, p in zip(kernel, padding))
    if conv.in_channels != 1 or set(conv.stride) != {1} or not same:
        return None
    return cast(Tensor, _FirstConvolution.apply(image, conv.weight, conv.bias))


def convolution(features: Tensor, conv: nn.Conv3d) -> Tensor:
    """A convolution, in the memory layout that suits it; that of one scan's small map by halves along X."""
    features = laid_out(features, conv.out_channels)
    if not _by_halves(features, conv):
        convolved: Tensor = conv(features)
        return convolved
    kernel, (step, *_) = conv.kernel_size[0], conv.stride
    planes = features.shape[2] // 2
    seen = planes - step + kernel  # from half of the map's planes and those beside them
    padded = F.pad(features, [0, 0, 0, 0, kernel // 2, kernel // 2])
    halves = laid_out(torch.cat([padded[:, :, :seen], padded[:, :, planes : planes + seen]]), conv.out_channels)
    found = F.conv3d(halves, conv.weight, conv.bias, conv.stride, [0, *conv.padding[1:]])
    return torch.cat([found[:1], found[1:]], dim=2)


def _by_halves(features: Tensor, conv: nn.Conv3d) -> bool:
    batch, channels, x, y, _ = features.shape
    slow = batch == 1 and channels * x * y <= _SMALL_MAP and conv.out_channels <= _MOST_CHANNELS_LAST
    kernel, step = conv.kernel_size[0], conv.stride[0]
    same = kernel > 1 and kernel % 2 == 1 and conv.padding[0] == kernel // 2 and conv.dilation[0] == conv.groups == 1
    return slow and same and x >= 2 * _LEAST_HALF and x % (2 * step) == 0


def norm_act(features: Tensor, norm: nn.InstanceNorm3d, slope: float) -> Tensor:
    """Instance norm with scale and shift, then leaky ReLU (none where the slope is 1), in the layout of ``features``.

    Where no gradient is recorded it is computed in the memory of ``features``, which then hold the result.

    Source: Ulyanov et al. 2016 (arXiv 1607.08022), equation 2; the gradient is the one of Ioffe & Szegedy 2015
    (arXiv 1502.03167), section 3, per scan.
    """
    if not torch.is_grad_enabled():
        return _norm_act_(features, norm, slope)
    normed: Tensor = _NormAct.apply(features, norm.weight, norm.bias, norm.eps, slope)
    return normed


def upsampled(features: Tensor, conv: nn.ConvTranspose3d) -> Tensor:
    """A transposed convolution whose kernel is its stride: a matrix product, and the cells laid side by side."""
    scale_x, scale_y, scale_z = conv.stride
    weight = conv.weight.permute(2, 3, 4, 1, 0).reshape(-1, conv.in_channels)
    bias = None if conv.bias is None else conv.bias.repeat(scale_x * scale_y * scale_z)
    batch, _, x, y, z = features.shape
    # laid out first: torch would answer other layouts with a product for every row of voxels
    cells = F.linear(features.movedim(1, -1).reshape(-1, conv.in_channels), weight, bias)
    cells = cells.view(batch, x, y, z, scale_x, scale_y, scale_z, conv.out_channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return cells.reshape(batch, x * scale_x, y * scale_y, z * scale_z, conv.out_channels).movedim(-1, 1)


def pointwise(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1x1 convolution with weights [E', E, 1, 1, 1] as a matrix product."""
    return F.linear(features.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)


def block_means(features: Tensor, grid: Sequence[int]) -> Tensor:
    """[B, E, X, Y, Z] -> [B, E, *grid]: one axis after the other, in the order of memory."""
    channels_last = _format(features) == torch.channels_last_3d
    place = -1 if channels_last else 1
    features = features.movedim(1, place)
    for axis, cells in enumerate(grid, start=1 if channels_last else 2):
        features = features.unflatten(axis, (cells, -1)).mean(dim=axis + 1)
    return features.movedim(place, 1)


def _norm_act_(features: Tensor, norm: nn.InstanceNorm3d, slope: float) -> Tensor:
    """_NormAct's values to the bit; new memory for maps of this size costs as much time as the arithmetic."""
    centred = features.sub_(features.mean(_VOXELS, keepdim=True))
    inverse = torch.rsqrt(_inner(centred, centred) / features[0, 0].numel() + norm.eps)
    torch.addcmul(_broadcast(norm.bias), centred, inverse * _broadcast(norm.weight), out=centred)
    return F.leaky_relu_(centred, slope) if slope != 1 else centred


class _FirstConvolution(torch.autograd.Function):
    """Keeps the image for the gradient, not the neighbourhoods (27 times as much), which are gathered again."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, x, y, z = image.shape
        output = image.new_empty(batch, x, y * z, len(weight))
        columns = weight.flatten(1).t().contiguous()
        for scan, rows in zip(image[:, 0], output):
            for slab, near in _neighbourhoods(scan, weight.shape[2:]):
                target = rows[slab].view(-1, len(weight))
                if bias is None:
                    torch.mm(near.t(), columns, out=target)
                else:
                    torch.addmm(bias, near.t(), columns, out=target)
        ctx.save_for_backward(image, weight)
        ctx.biased = bias is not None
        return output.view(batch, x, y, z, -1).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        image, weight = ctx.saved_tensors
        pulls = grads[0].movedim(1, -1).flatten(2, 3).contiguous()  # [B, X, Y Z, E]
        for_image = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            padding = [k // 2 for k in weight.shape[2:]]
            for_image = F.conv_transpose3d(grads[0], weight, padding=padding)
        if ctx.needs_input_grad[1]:
            sums = weight.new_zeros(weight[0].numel(), len(weight))
            for scan, rows in zip(image[:, 0], pulls):
                for slab, near in _neighbourhoods(scan, weight.shape[2:]):
                    sums.addmm_(near, rows[slab].view(-1, len(weight)))
            for_weight = sums.t().reshape(weight.shape)
        if ctx.biased and ctx.needs_input_grad[2]:
            for_bias = pulls.sum((0, 1, 2))
        return for_image, for_weight, for_bias


def _neighbourhoods(scan: Tensor, kernel: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Slabs along the first axis of [X, Y, Z], and what the kernel sees from each voxel of one: [k, voxels].

    A slab is small enough to stay in a core's cache.
    """
    padded = F.pad(scan, [k // 2 for k in reversed(kernel) for _ in range(2)])
    views = padded.unfold(0, kernel[0], 1).unfold(1, kernel[1], 1).unfold(2, kernel[2], 1).permute(3, 4, 5, 0, 1, 2)
    depth = max(1, _SLAB_VOXELS // scan[0].numel())
    for begin in range(0, len(scan), depth):
        slab = slice(begin, begin + depth)
        yield slab, views[:, :, :, slab].reshape(math.prod(kernel), -1)


class _NormAct(torch.autograd.Function):
    """Keeps the centred map and the output for the gradient: as much memory as norm and activation of torch."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
        centred = features - features.mean(_VOXELS, keepdim=True)
        inverse = torch.rsqrt(_inner(centred, centred) / features[0, 0].numel() + eps)
        output = torch.addcmul(_broadcast(bias), centred, inverse * _broadcast(weight))
        if slope != 1:
            output = F.leaky_relu_(output, slope)
        ctx.save_for_backward(centred, inverse, weight, output if slope != 1 else None)
        ctx.slope = slope
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        centred, inverse, weight, output = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=_format(centred))
        if ctx.slope != 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, output, ctx.slope, True)
        for_bias = grad.sum(_VOXELS, keepdim=True)
        for_weight = _inner(grad, centred) * inverse
        scale = inverse * _broadcast(weight)
        share = -scale / centred[0, 0].numel()
        along = torch.addcmul(for_bias * share, centred, for_weight * inverse * share).addcmul_(grad, scale)
        return along, for_weight.sum(0).flatten(), for_bias.sum(0).flatten(), None, None


def _broadcast(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _format(features: Tensor) -> torch.memory_format:
    last = features.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if last else torch.contiguous_format


def _inner(one: Tensor, other: Tensor) -> Tensor:
    """Sums of products over the voxels: [B, E, X, Y, Z] twice -> [B, E, 1, 1, 1].

    Few channels: the diagonal of a matrix product, which spares writing the products down.
    """
    if one.shape[1] > _MOST_CHANNELS_LAST:
        return (one * other).sum(_VOXELS, keepdim=True)
    products = torch.bmm(one.flatten(2), other.flatten(2).transpose(1, 2))
    return products.diagonal(dim1=1, dim2=2)[..., None, None, None]


# ---- quick forms of layers -------------------------------------------------------------------------------------------


def _on_cpu(layer: nn.Module) -> bool:
    return all(value.device.type == "cpu" for value in (*layer.parameters(), *layer.buffers()))


class _Quick(nn.Module):
    """What the quick forms share: moved off the CPU, a layer is an ordinary one again."""

    ordinary: ClassVar[type[nn.Module]]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:  # what .to() and .cuda() go through
        super()._apply(fn, recurse)
        if not _on_cpu(self):
            self.__class__ = self.ordinary  # type: ignore[assignment]
        return self


class _ConvNormAct(_Quick, ConvNormAct):
    ordinary = ConvNormAct

    def forward(self, features: Tensor) -> Tensor:
        if not is_for(features):
            return super().forward(features)
        conv, norm = cast(nn.Conv3d, self[0]), cast(nn.InstanceNorm3d, self[1])
        convolved = first_convolution(features, conv)
        if convolved is None:
            convolved = convolution(features, conv)
        return norm_act(convolved, norm, self.slope)


class _Upsample(_Quick, Upsample):
    ordinary = Upsample

    def forward(self, features: Tensor, output_size: list[int] | None = None) -> Tensor:
        return upsampled(features, self) if is_for(features) else super().forward(features, output_size)


class _Pointwise(_Quick, Pointwise):
    ordinary: ClassVar[type[nn.Module]] = Pointwise

    def mapped(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return pointwise(features, weight, bias) if is_for(features) else super().mapped(features, weight, bias)


class _DenseHead(_Pointwise, DenseHead):
    ordinary = DenseHead


class _Latents(_Quick, Latents):
    ordinary = Latents

    def averaged(self, features: Tensor, grid: Sequence[int]) -> Tensor:
        if list(features.shape[2:]) == list(grid) or not is_for(features):
            return super().averaged(features, grid)
        return block_means(features, grid)


_QUICK: dict[type[nn.Module], type[_Quick]] = {
    quick.ordinary: quick for quick in (_ConvNormAct, _Upsample, _Pointwise, _DenseHead, _Latents)
}
