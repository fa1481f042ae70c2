"""Planar backbones: a 3D network turned into a 2D one by an exact rule.

Each kernel is summed over one axis. On an image that does not change along that axis, and goes on without end along
it, the 3D network gives the same maps at every place of the axis, and the planar network gives these maps: a
convolution of a constant is a product with the kernel's sum, pooling and norms leave a constant alone. The layers'
zero padding along the axis is therefore left out; along the other two it stays. Averaged over the three axes
(``axis=mean``) a kernel is no network's on any image, but favours none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.cpu import swap_out
from brainfm.nets.transfer import TransferReport, transfer
from brainfm.nets.transformer import Attention

Axis = Literal["x", "y", "z", "mean"]
AXES: tuple[Axis, ...] = ("x", "y", "z", "mean")
_Layer = TypeVar("_Layer", bound=nn.Module)


class Planar(nn.Module):
    """A 2D network that lies in the layers of a 3D backbone: [B, 1, H, W] -> maps [B, E, H/s, W/s], fine to coarse.

    Args:
        backbone: whose weights it begins with; stays as it is.
        axis: over which kernels are summed (the image's H and W are the other two, in their order), or ``mean``.

    Attributes:
        network: the backbone's own modules with 2D layers in place of 3D ones; names of tensors are the same.
        report: what was transferred.
        widths, strides: of the maps.

    Raises: ConfigError for a layer that has no planar form, as those of transformers, which know places in a volume.
    """

    def __init__(self, backbone: Backbone, axis: Axis = "z") -> None:
        super().__init__()
        if axis not in AXES:
            raise ConfigError(f"axis={axis}: expected one of {', '.join(AXES)}")
        self.axis, self.widths, self.strides = axis, backbone.widths, backbone.strides
        if any(isinstance(part, Attention) for part in backbone.modules()):
            raise ConfigError(f"{type(backbone).__name__} is a transformer, which has no planar form; expected a CNN")
        source = swap_out(copy.deepcopy(backbone))
        kernels = {
            f"{name}.weight" if name else "weight"
            for name, part in source.named_modules()
            if isinstance(part, nn.modules.conv._ConvNd)
        }
        state = {name: flat(value, axis) if name in kernels else value for name, value in source.state_dict().items()}
        self.network: Any = _flattened(source, axis)
        setattr(self.network, "check_image", _anything)  # noqa: B010 (a method of the class stays as it is)
        self.report: TransferReport = transfer(self.network, state, origin="the 3D network")

    def forward(self, image: Tensor) -> list[Tensor]:
        """Raises: ConfigError where H or W is no multiple of the coarsest stride."""
        stride = self.strides[-1]
        if image.ndim != 4 or image.shape[1] != 1:
            raise ValueError(f"a planar network reads [B, 1, H, W], not {tuple(image.shape)}")
        if any(edge % stride or edge < stride for edge in image.shape[2:]) or max(image.shape[2:]) < 2 * stride:
            raise ConfigError(f"images of {tuple(image.shape[2:])}: expected multiples of {stride} pixels, one of them "
                              f"{2 * stride} or more")  # fmt: skip
        with _Flat():
            maps: list[Tensor] = self.network.features(image)
        return maps


def flat(kernel: Tensor, axis: Axis) -> Tensor:
    """[E', E, kx, ky, kz] summed over one of the last three axes, or the mean of these sums.

    Raises: ConfigError where a mean is asked for of a kernel that is no cube.
    """
    if axis != "mean":
        return kernel.sum(dim=2 + "xyz".index(axis))
    if len(set(kernel.shape[2:])) > 1:
        raise ConfigError(f"axis=mean: a kernel is {tuple(kernel.shape[2:])}, expected a cube")
    return torch.stack([kernel.sum(dim=dim) for dim in (2, 3, 4)]).mean(dim=0)


def _anything(image: Tensor) -> None:
    """In place of a 3D network's own check; `Planar.forward` has looked."""


# ---- layers ----------------------------------------------------------------------------------------------------------


def _others(values: Any, axis: Axis) -> Any:
    """Of three values those of the two axes that stay; one value, or a word, stands for all."""
    if not isinstance(values, tuple) or len(values) != 3:
        return values
    if axis == "mean":
        if len(set(values)) > 1:
            raise ConfigError(f"axis=mean: a layer has the sizes {values}, expected equal ones")
        return values[:2]
    return tuple(value for place, value in enumerate(values) if place != "xyz".index(axis))


def _convolution(layer: nn.Conv3d, axis: Axis) -> nn.Conv2d:
    sizes = {key: _others(getattr(layer, key), axis) for key in ("kernel_size", "stride", "padding", "dilation")}
    return nn.Conv2d(layer.in_channels, layer.out_channels, groups=layer.groups, bias=layer.bias is not None,
                     padding_mode=layer.padding_mode, **sizes)  # fmt: skip


def _instance_norm(layer: nn.InstanceNorm3d, axis: Axis) -> nn.InstanceNorm2d:
    return nn.InstanceNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)  # type: ignore[arg-type]


def _batch_norm(layer: nn.BatchNorm3d, axis: Axis) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)


def _max_pool(layer: nn.MaxPool3d, axis: Axis) -> nn.MaxPool2d:
    sizes = {key: _others(getattr(layer, key), axis) for key in ("kernel_size", "stride", "padding", "dilation")}
    return nn.MaxPool2d(ceil_mode=layer.ceil_mode, **sizes)


def _mean_pool(layer: nn.AvgPool3d, axis: Axis) -> nn.AvgPool2d:
    sizes = {key: _others(getattr(layer, key), axis) for key in ("kernel_size", "stride", "padding")}
    return nn.AvgPool2d(ceil_mode=layer.ceil_mode, count_include_pad=layer.count_include_pad, **sizes)


_LAYERS: dict[type[nn.Module], Callable[[Any, Axis], nn.Module]] = {
    nn.Conv3d: _convolution,
    nn.InstanceNorm3d: _instance_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.MaxPool3d: _max_pool,
    nn.AvgPool3d: _mean_pool,
    nn.Dropout3d: lambda layer, axis: nn.Dropout2d(layer.p),
}


def _flattened(network: _Layer, axis: Axis) -> _Layer:
    """The network with its 3D layers replaced, in place."""
    for name, child in list(network.named_children()):
        made = _LAYERS.get(type(child))
        if made is not None:
            network.add_module(name, made(child, axis).train(child.training))
        elif type(child).__name__.endswith("3d"):
            raise ConfigError(f"{name} is a {type(child).__name__}, which has no planar form")
        else:
            _flattened(child, axis)
    return network


class _Flat(TorchFunctionMode):
    """While open, functions on volumes that a network calls are those on images; an unknown one is refused."""

    _FUNCTIONS: Mapping[str, Any] = {
        "max_pool3d": F.max_pool2d,
        "avg_pool3d": F.avg_pool2d,
        "adaptive_avg_pool3d": F.adaptive_avg_pool2d,
        "adaptive_max_pool3d": F.adaptive_max_pool2d,
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name.endswith("3d"):
            plain = self._FUNCTIONS.get(name.lstrip("_"))
            if plain is None:
                raise ConfigError(f"the network calls {name}, which has no planar form")
            function = plain
        return function(*args, **(kwargs or {}))
