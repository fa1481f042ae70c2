"""Foreign checkpoints: tensors and plain values; nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from brainfm.errors import WeightsError
from brainfm.nets.transfer import listed

# Under which key the tensors lie; a file may also be the mapping itself.
_STATE_KEYS = ("network_weights", "state_dict", "model_state_dict", "model", "net")
# What wrappers put before a name: data-parallel training, torch.compile, Lightning. A number behind it is the place in
# a sequence: `model.0.weight` stays.
_WRAPPERS = re.compile(r"(?:(?:module|_orig_mod|model|net|network)\.)+(?=[A-Za-z_])")
_REFUSED = re.compile(r"GLOBAL ([A-Za-z_][\w.]+)")


@dataclass(frozen=True)
class Checkpoint:
    """A file of another tool.

    Attributes:
        path: the file.
        tensors: by the names of the network, without what wrappers put before them; float32, on the CPU.
        about: what else the file holds, plain values alone.
        sha256: of the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Tensors and plain values of a ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors`` file.

    Of pickles only what holds data is rebuilt: tensors, containers, numbers, and NumPy's scalars and arrays.

    Raises: WeightsError where the file is missing, holds anything else, or has no tensors.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected a checkpoint (.pth, .pt, .ckpt or .safetensors)")
    held = _held(path)
    state, about = _parted(path, held)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        short = _WRAPPERS.sub("", name, count=1) if _WRAPPERS.match(name) else name
        if short in tensors:
            raise WeightsError(f"{path}: two of its tensors are called {short} without the wrappers' prefixes")
        tensors[short] = value.detach().float() if value.is_floating_point() else value.detach()
    return Checkpoint(path, tensors, about, _sha256(path))


def _held(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_numpy_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from None
    except (OSError, EOFError) as error:
        raise WeightsError(f"{path}: cannot be read ({error}), expected a checkpoint") from None
    except Exception as error:  # torch raises pickle's errors, RuntimeError, KeyError: whatever a damaged file leads to
        found = _REFUSED.search(str(error))
        if found is None:
            reason = (str(error).splitlines() or [""])[0]
            # torch's own words for a file that is no archive of its advise to load it unsafely
            said = f" ({reason})" if len(reason) > 3 and "Weights only load failed" not in reason else ""
            raise WeightsError(f"{path}: cannot be read as a checkpoint{said}, expected a file of tensors") from None
        raise WeightsError(
            f"{path}: holds a {found[1]}, which is more than data and is never built here; expected a file of tensors "
            "and plain values (where it was made: torch.save({'state_dict': checkpoint['state_dict']}, ...))"
        ) from None


def _numpy_types() -> list[Any]:
    """What NumPy's pickled numbers and arrays are made of; old files name the module as it was before NumPy 2."""
    scalar, rebuild = np._core.multiarray.scalar, np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    moved = [(f, f"numpy.{core}.multiarray.{f.__name__}") for f in (scalar, rebuild) for core in ("core", "_core")]
    numbers = [getattr(np, f"{kind}{bits}") for kind in ("float", "int", "uint") for bits in (16, 32, 64)]
    numbers += [np.bool_, np.int8, np.uint8]
    return [*moved, np.ndarray, np.dtype, *numbers, *(type(np.dtype(number)) for number in numbers)]


def _parted(path: Path, held: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by name, and the rest."""
    if not isinstance(held, Mapping):
        raise WeightsError(f"{path}: holds a {type(held).__name__}, expected tensors by name")
    for key in _STATE_KEYS:
        inner = held.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return _tensors(path, inner), {str(k): v for k, v in held.items() if k != key}
    if any(isinstance(value, Tensor) for value in held.values()):
        return _tensors(path, {k: v for k, v in held.items() if isinstance(v, Tensor)}), {
            str(k): v for k, v in held.items() if not isinstance(v, Tensor)
        }
    raise WeightsError(
        f"{path}: no tensors under {', '.join(_STATE_KEYS)} or by themselves, found {listed(map(str, held), ', ')}"
    )


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    strange = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise WeightsError(f"{path}: {listed(strange, ', ')} among its tensors is none")
    empty = [str(name) for name, value in state.items() if value.is_meta]
    if empty:
        raise WeightsError(f"{path}: {listed(empty, ', ')} has a shape and no values, expected trained weights")
    packed = [str(n) for n, value in state.items() if value.layout != torch.strided or value.is_quantized]
    if packed:
        raise WeightsError(
            f"{path}: {listed(packed, ', ')} is sparse or quantised, expected tensors as they are trained"
        )
    return {str(name): value for name, value in state.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
