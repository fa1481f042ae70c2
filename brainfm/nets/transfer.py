"""Transfer of weights from network to network: they fit completely, or nothing is changed and every misfit is named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from brainfm.errors import WeightsError

_LISTED = 10  # misfits named in one message; the others are counted


@dataclass(frozen=True)
class TransferReport:
    """What happened to every tensor, by name: of the network (loaded, left_at_init) and of the source (unused)."""

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        for names, words in ((self.left_at_init, "left at their initial values"), (self.unused, "of the file unused")):
            text += f", {len(names)} {words}" + (f" ({listed(names, ', ')})" if names else "")
        return text


def transfer(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unused: Iterable[str] = (),
    origin: str = "the given weights",
) -> TransferReport:
    """Copy weights into a network, all of them or none.

    Args:
        module: its parameters and buffers are overwritten in place, on their device and in their precision.
        state: name -> tensor.
        allow_missing: names, or patterns like ``decoder.*``, of the network that may keep their initial values.
        allow_unused: names or patterns of ``state`` that may find no place.
        origin: the file, for messages.

    Raises: WeightsError naming every misfit; the network is then unchanged. A tensor that is on both sides with another
        shape is never allowed: leave it out of ``state`` to keep the initial values.
    """
    own = module.state_dict()
    wrong = misfits(own, state, tuple(allow_missing), tuple(allow_unused))
    if wrong:
        raise WeightsError(f"{origin}: does not fit {type(module).__name__}: {listed(wrong)}")
    loaded = tuple(name for name in own if name in state)
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state[name])
    left = tuple(name for name in own if name not in state)
    return TransferReport(loaded, left, tuple(name for name in state if name not in own))


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (64 hexadecimal digits) of names, types, shapes and values, whatever the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def misfits(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    allow_missing: tuple[str, ...] = (),
    allow_unused: tuple[str, ...] = (),
) -> list[str]:
    """What does not fit, a phrase a tensor; ``own`` may lie on the meta device."""
    found = []
    for name, value in own.items():
        if name not in state:
            if not _matches(name, allow_missing):
                found.append(f"{name} is missing")
        elif tuple(state[name].shape) != tuple(value.shape):
            found.append(f"{name} is {_shape(state[name])}, expected {_shape(value)}")
        elif state[name].is_floating_point() != value.is_floating_point():
            found.append(f"{name} is {state[name].dtype}, expected {value.dtype}")
    return found + [f"{n} has no place" for n in state if n not in own and not _matches(n, allow_unused)]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape(value: Tensor) -> str:
    return "x".join(str(n) for n in value.shape) or "a scalar"


def listed(items: Iterable[str], comma: str = "; ") -> str:
    """The first ten, and how many more there are."""
    items = list(items)
    more = f"{comma}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return comma.join(items[:_LISTED]) + more
