"""Backbone files: whole or refused.

A backbone file is safetensors: tensors ``backbone.*``, ``objective.*`` and, since format 2, ``decoder.*`` and
``heads.NAME.*`` of what was trained with the backbone, and one JSON text under the metadata key ``brainfm``. Nothing in
it is ever executed. Weights that ship (nets/shipped.py) are in half precision and bring a ``release``: what their card
says.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from brainfm.errors import ConfigError, WeightsError
from brainfm.files import write_whole
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import DenseDecoder, DenseHead, decoder_for
from brainfm.nets.shipped import located
from brainfm.nets.transfer import TransferReport, fingerprint, listed, misfits, transfer
from brainfm.seen import SeenSubjects
from brainfm.specs import PreprocessSpec, Provenance

FORMAT = 2
_KEY = "brainfm"
_ALMOST = 0.02  # by which a voxel may leave the range that was seen
_GROUPS = ("backbone", "decoder", "heads", "objective")
_Network = TypeVar("_Network", bound=nn.Module)


@dataclass(frozen=True)
class LoadedBackbone:
    """A backbone file, rebuilt; networks are in eval mode, on the CPU, with its layers (nets/cpu.swap_in).

    Attributes:
        backbone: the encoder.
        preprocess: how a scan must be prepared for it.
        patch_vox: edge lengths X, Y, Z of the patches it was trained on.
        provenance: where it comes from.
        report: what was loaded into the encoder.
        objective: ``{"name": ..., "config": {...}}`` of the question it was trained with.
        extra: the objective's own tensors (latents, decoder), names without the prefix.
        fingerprint: of all tensors of the file.
        decoder: the skip decoder that was trained with the encoder, or None.
        heads: what reads the decoder's parts, by name; maybe none.
        voxel_mm: smallest and largest edge length of a voxel that was trained on, or None where only that of
            ``preprocess`` was.
        subjects: whom it was trained on, or None where the file does not say.
        release: what weights that ship say of themselves (scripts/weights.py); empty of others.
    """

    backbone: Backbone
    preprocess: PreprocessSpec
    patch_vox: tuple[int, int, int]
    provenance: Provenance
    report: TransferReport
    objective: dict[str, Any]
    extra: dict[str, Tensor]
    fingerprint: str
    decoder: DenseDecoder | None = None
    heads: dict[str, DenseHead] = field(default_factory=dict)
    voxel_mm: tuple[float, float] | None = None
    subjects: SeenSubjects | None = None
    release: dict[str, Any] = field(default_factory=dict)


def save_backbone(
    path: str | os.PathLike[str],
    backbone: Backbone,
    *,
    objective: Mapping[str, Any],
    objective_state: Mapping[str, Tensor],
    preprocess: PreprocessSpec,
    patch_vox: tuple[int, int, int],
    provenance: Provenance,
    decoder: DenseDecoder | None = None,
    heads: nn.ModuleDict | Mapping[str, nn.Module] | None = None,
    voxel_mm: tuple[float, float] | None = None,
    subjects: SeenSubjects | None = None,
    half: bool = False,
    release: Mapping[str, Any] | None = None,
) -> str:
    """Write a backbone file in one step: the old file or the new one, never half of one. Returns its fingerprint.

    Args:
        objective: ``{"name": ..., "config": {...}}``, JSON-able.
        objective_state: the objective's tensors without the backbone's (Objective.state_for_file()).
        decoder, heads: what was trained with the backbone; each head a DenseHead on a part of the decoder.
        voxel_mm, subjects, release: see LoadedBackbone.
        half: whether the tensors are written in half precision; they are read into float32 networks all the same.

    Raises:
        ConfigError: heads that do not fit the decoder.
        WeightsError: a value that half precision cannot hold.
    """
    named: dict[str, Any] = dict(heads.items()) if heads is not None else {}
    tensors = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    tensors |= {f"objective.{name}": value for name, value in objective_state.items()}
    if decoder is not None:
        tensors |= {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    for key, head in named.items():
        tensors |= {f"heads.{key}.{name}": value for name, value in head.state_dict().items()}
    # clone: tied weights share storage, which safetensors refuses
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    if half:
        tensors = {name: _halved(name, value) for name, value in tensors.items()}
    mark = fingerprint(tensors)
    about = {
        "format": FORMAT,
        "backbone": backbone.config,
        "objective": dict(objective),
        "preprocess": preprocess.to_dict(),
        "patch_vox": list(patch_vox),
        "provenance": provenance.to_dict(),
        "fingerprint": mark,
        "decoder": decoder.config if decoder is not None else None,
        "heads": {key: head.config for key, head in named.items()},
        "voxel_mm": list(voxel_mm) if voxel_mm is not None else None,
        "subjects": subjects.to_dict() if subjects is not None else None,
    }
    if release is not None:
        about["release"] = dict(release)
    _check_heads(about["decoder"], about["heads"])
    # keys are not sorted: the order of a decoder's parts is that of its channels
    write_whole(path, save(tensors, metadata={_KEY: json.dumps(about)}))
    return mark


def load_backbone(path: str | os.PathLike[str], *, needs_decoder: bool = False) -> LoadedBackbone:
    """Rebuild a backbone, and what was trained with it, from its file alone.

    Args:
        path: a file, or the name of weights that ship.
        needs_decoder: whether a file without a decoder is refused.

    Raises: WeightsError where the file is missing, foreign, damaged, or its tensors do not fit the network it names.
    """
    path = located(path)
    tensors, about = _read(path)
    groups = _grouped(path, tensors)
    try:
        preprocess = PreprocessSpec.from_dict(about["preprocess"])
        provenance = Provenance.from_dict(about["provenance"])
        patch_x, patch_y, patch_z = (int(p) for p in about["patch_vox"])
        voxel_mm = _range_of(about.get("voxel_mm"))
        subjects = SeenSubjects.from_dict(about["subjects"]) if about.get("subjects") is not None else None
        _check_heads(about.get("decoder"), about.get("heads") or {})
        make = partial(build_backbone, **about["backbone"])
        backbone, report = _rebuilt(path, make, groups["backbone"], about["backbone"]["name"])
        decoder, heads = _rebuilt_beside(path, backbone, about, groups)
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its description cannot be used: {error}") from None
    if needs_decoder and decoder is None:
        raise WeightsError(f"{path}: holds no decoder, only an encoder; expected a file of a pre-training with one")
    return LoadedBackbone(
        backbone=backbone,
        preprocess=preprocess,
        patch_vox=(patch_x, patch_y, patch_z),
        provenance=provenance,
        report=report,
        objective=about["objective"],
        extra=groups["objective"],
        fingerprint=about["fingerprint"],
        decoder=decoder,
        heads=heads,
        voxel_mm=voxel_mm,
        subjects=subjects,
        release=about.get("release", {}),
    )


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a backbone file says of itself; its tensors are not read.

    Args:
        path: a file, or the name of weights that ship.

    Raises: WeightsError where it is missing, foreign or says too little.
    """
    path = located(path)
    with _opened(path) as file:
        return _description(path, file.metadata() or {})


def spacing_note(spacing_mm: Sequence[float], voxel_mm: Sequence[float] | None) -> str | None:
    """A sentence where voxels are of a size that a backbone was not trained on; None where they are, or nobody knows.

    Args:
        spacing_mm: edge lengths of a voxel.
        voxel_mm: LoadedBackbone.voxel_mm.
    """
    if voxel_mm is None:
        return None
    low, high = voxel_mm
    if all(low * (1 - _ALMOST) <= edge <= high * (1 + _ALMOST) for edge in spacing_mm):
        return None
    found = " x ".join(f"{edge:g}" for edge in spacing_mm)
    return f"voxels of {found} mm; the backbone was trained on voxels of {low:g} to {high:g} mm, expect less of it here"


def load(path: str | os.PathLike[str]) -> Backbone:
    """The pre-trained network of a backbone file, in eval mode: [B, 1, X, Y, Z] -> feature maps, fine to coarse.

    Args:
        path: a file, or the name of weights that ship: ``load("brainfm_s")``.

    Raises: WeightsError (see load_backbone).
    """
    return load_backbone(path).backbone


def _grouped(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group -> the tensors of a file that belong to it, names without the prefix."""
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    strangers = []
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        if group in groups and rest:
            groups[group][rest] = value
        else:
            strangers.append(f"{name} is neither {'.*, '.join(_GROUPS[:-1])}.* nor {_GROUPS[-1]}.*")
    if strangers:
        raise WeightsError(f"{path}: {listed(strangers)}")
    return groups


def _rebuilt(
    path: Path, make: Callable[[], _Network], state: Mapping[str, Tensor], name: str
) -> tuple[_Network, TransferReport]:
    """What ``make`` makes, with the weights of a file."""
    with torch.device("meta"):  # a file that lies about its sizes is refused before memory is spent on it
        wrong = misfits(make().state_dict(), state)
    if wrong:
        raise WeightsError(f"{path}: does not fit {name}: {listed(wrong)}")
    network = make()
    report = transfer(network, state, origin=str(path))
    return swap_in(network).eval(), report


def _rebuilt_beside(
    path: Path, backbone: Backbone, about: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]
) -> tuple[DenseDecoder | None, dict[str, DenseHead]]:
    """The decoder and the heads that lie beside a backbone in its file."""
    config, named = about.get("decoder"), about.get("heads") or {}
    homeless = [f"decoder.{name}" for name in groups["decoder"] if config is None]
    homeless += [f"heads.{name}" for name in groups["heads"] if name.partition(".")[0] not in named]
    if homeless:
        raise WeightsError(f"{path}: {listed(f'{name} has no place' for name in homeless)}")
    if config is None:
        return None, {}
    decoder, _ = _rebuilt(path, lambda: decoder_for(backbone, config["parts"]), groups["decoder"], "the decoder")
    heads = {}
    for key, settings in named.items():
        own = {n.removeprefix(f"{key}."): v for n, v in groups["heads"].items() if n.startswith(f"{key}.")}
        heads[key], _ = _rebuilt(path, partial(DenseHead, **settings), own, f"the head {key}")
    return decoder, heads


def _check_heads(decoder: Any, heads: Any) -> None:
    """Raises: ConfigError where the descriptions of a decoder and of the heads on its parts contradict each other."""
    parts = decoder.get("parts") if isinstance(decoder, dict) and set(decoder) == {"parts"} else None
    if decoder is not None and not (isinstance(parts, dict) and all(_is_count(size) for size in parts.values())):
        raise ConfigError(f"decoder={decoder}: expected parts with their channels")
    if not isinstance(heads, dict):
        raise ConfigError(f"heads={heads}: expected names with their settings")
    for key, head in heads.items():
        if not isinstance(head, dict) or not isinstance(head.get("names"), list) or "." in key:
            raise ConfigError(f"head {key}={head}: expected a name without dots, part, channels and names")
        if head.get("channels") != (parts or {}).get(head.get("part")):
            read = f"{head.get('channels')} channels of part {head.get('part')!r}"
            raise ConfigError(f"head {key} reads {read}, the decoder has {parts}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _range_of(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (float(edge) for edge in value)
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"voxel_mm={value}: expected the smallest and the largest edge of a voxel in mm")
    return low, high


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a backbone file, checked against its fingerprint."""
    with _opened(path) as file:
        about = _description(path, file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if fingerprint(tensors) != about["fingerprint"]:
        raise WeightsError(f"{path}: its tensors do not match their checksum; the file is damaged or was edited")
    return tensors, about


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Raises: WeightsError for a file that is missing or no safetensors, on opening or on reading from it."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file, expected a backbone file (*.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(
            f"{path}: cannot be read as safetensors ({error}); expected a backbone file that brainfm wrote{_hint(path)}"
        ) from None


def _description(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _KEY not in metadata:
        raise WeightsError(f"{path}: holds tensors but no description under {_KEY!r}; expected a file brainfm wrote")
    try:
        about: dict[str, Any] = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its description is not JSON ({error})") from None
    _check_description(path, about)
    return about


def _halved(name: str, value: Tensor) -> Tensor:
    half = value.half() if value.is_floating_point() else value
    if value.is_floating_point() and not half.isfinite().all():
        raise WeightsError(f"{name} holds {float(value.abs().max()):g}, more than half precision can")
    return half


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
    if not isinstance(about.get("release", {}), dict):
        raise WeightsError(f"{path}: its description has a release that is no table")
    if not isinstance(about["backbone"].get("name"), str):
        raise WeightsError(f"{path}: its description does not name a backbone")
