"""Weights on disk and between networks: they fit completely, or nothing is changed and every misfit is named.

A backbone file is safetensors: tensors ``backbone.*`` and ``objective.*``, and one JSON text under the metadata key
``brainfm``. Nothing in it is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.specs import ConfigError, PreprocessSpec, Provenance, WeightsError

FORMAT = 1
_KEY = "brainfm"
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
            text += f", {len(names)} {words}" + (f" ({_listed(names, ', ')})" if names else "")
        return text


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone file, rebuilt.

    Attributes:
        backbone: in eval mode, on the CPU.
        preprocess: how a scan must be prepared for it.
        patch_vox: edge lengths X, Y, Z of the patches it was trained on.
        provenance: where it comes from.
        report: what was loaded.
        objective: ``{"name": ..., "config": {...}}`` of the question it was trained with.
        extra: the objective's own tensors (latents, decoder), names without the prefix.
        fingerprint: of all tensors of the file.
    """

    backbone: Backbone
    preprocess: PreprocessSpec
    patch_vox: tuple[int, int, int]
    provenance: Provenance
    report: TransferReport
    objective: dict[str, Any]
    extra: dict[str, Tensor]
    fingerprint: str


def save_backbone(
    path: str | os.PathLike[str],
    backbone: Backbone,
    *,
    objective: Mapping[str, Any],
    objective_state: Mapping[str, Tensor],
    preprocess: PreprocessSpec,
    patch_vox: tuple[int, int, int],
    provenance: Provenance,
) -> str:
    """Write a backbone file in one step: the old file or the new one, never half of one. Returns its fingerprint.

    Args:
        objective: ``{"name": ..., "config": {...}}``, JSON-able.
        objective_state: the objective's tensors without the backbone's (Objective.state_for_file()).
    """
    tensors = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    tensors |= {f"objective.{name}": value for name, value in objective_state.items()}
    # clone: tied weights share storage, which safetensors refuses
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    mark = fingerprint(tensors)
    about = {
        "format": FORMAT,
        "backbone": backbone.config,
        "objective": dict(objective),
        "preprocess": preprocess.to_dict(),
        "patch_vox": list(patch_vox),
        "provenance": provenance.to_dict(),
        "fingerprint": mark,
    }
    write_atomically(Path(path), save(tensors, metadata={_KEY: json.dumps(about, sort_keys=True)}))
    return mark


def load_backbone(path: str | os.PathLike[str]) -> LoadedBackbone:
    """Rebuild a backbone from its file alone.

    Raises: WeightsError where the file is missing, foreign, damaged, or its tensors do not fit the network it names.
    """
    path = Path(path)
    tensors, about = _read(path)
    groups: dict[str, dict[str, Tensor]] = {"backbone": {}, "objective": {}}
    strangers = []
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if group in groups and rest:
            groups[group][rest] = value
        else:
            strangers.append(f"{name} is neither backbone.* nor objective.*")
    if strangers:
        raise WeightsError(f"{path}: {_listed(strangers)}")
    try:
        preprocess = PreprocessSpec.from_dict(about["preprocess"])
        provenance = Provenance.from_dict(about["provenance"])
        patch_x, patch_y, patch_z = (int(p) for p in about["patch_vox"])
        with torch.device("meta"):  # a file that lies about its sizes is refused before memory is spent on it
            misfits = _misfits(build_backbone(**about["backbone"]).state_dict(), groups["backbone"], (), ())
        if misfits:
            raise WeightsError(f"{path}: does not fit {about['backbone']['name']}: {_listed(misfits)}")
        backbone = build_backbone(**about["backbone"])
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its description cannot be used: {error}") from None
    report = transfer(backbone, groups["backbone"], origin=str(path))
    return LoadedBackbone(
        backbone=backbone.eval(),
        preprocess=preprocess,
        patch_vox=(patch_x, patch_y, patch_z),
        provenance=provenance,
        report=report,
        objective=about["objective"],
        extra=groups["objective"],
        fingerprint=about["fingerprint"],
    )


def load(path: str | os.PathLike[str]) -> Backbone:
    """The pre-trained network of a backbone file, in eval mode: [B, 1, X, Y, Z] -> feature maps, fine to coarse.

    Raises: WeightsError (see load_backbone).
    """
    return load_backbone(path).backbone


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
    misfits = _misfits(own, state, tuple(allow_missing), tuple(allow_unused))
    if misfits:
        raise WeightsError(f"{origin}: does not fit {type(module).__name__}: {_listed(misfits)}")
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


def _misfits(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    allow_missing: tuple[str, ...],
    allow_unused: tuple[str, ...],
) -> list[str]:
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


def _listed(items: Iterable[str], comma: str = "; ") -> str:
    items = list(items)
    more = f"{comma}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return comma.join(items[:_LISTED]) + more


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a backbone file, checked against its fingerprint."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected a backbone file (*.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot be read as safetensors ({error}); expected a backbone file that brainfm wrote{_hint(path)}"
        ) from None
    if _KEY not in metadata:
        raise WeightsError(f"{path}: holds tensors but no description under {_KEY!r}; expected a file brainfm wrote")
    try:
        about = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its description is not JSON ({error})") from None
    _check_description(path, about)
    if fingerprint(tensors) != about["fingerprint"]:
        raise WeightsError(f"{path}: its tensors do not match their checksum; the file is damaged or was edited")
    return tensors, about


def _hint(path: Path) -> str:
    """What a file that is not safetensors probably is; its first bytes are looked at, never run."""
    with path.open("rb") as file:
        start = file.read(2)
    pickled = start == b"PK" or start[:1] == b"\x80"
    return ", and a PyTorch checkpoint or pickle is never opened here" if pickled else ""


def _check_description(path: Path, about: Any) -> None:
    kinds = {"format": int, "backbone": dict, "objective": dict, "preprocess": dict, "patch_vox": list}
    kinds |= {"provenance": dict, "fingerprint": str}
    if isinstance(about, dict) and isinstance(about.get("format"), int) and about["format"] > FORMAT:
        raise WeightsError(f"{path}: has format {about['format']}, this brainfm reads up to {FORMAT}; update brainfm")
    wrong = [k for k, kind in kinds.items() if not (isinstance(about, dict) and isinstance(about.get(k), kind))]
    if wrong:
        raise WeightsError(f"{path}: its description lacks a usable {', '.join(wrong)}")
    if not isinstance(about["backbone"].get("name"), str):
        raise WeightsError(f"{path}: its description does not name a backbone")


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none of it. Raises: OSError that names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes private files; a weights file gets the usual rights
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
