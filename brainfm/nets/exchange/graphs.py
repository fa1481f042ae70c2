"""Networks as graphs that run without brainfm: ONNX, torch.export and TorchScript, for any number of cases at once."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.extras import demand
from brainfm.files import write_whole
from brainfm.nets.cpu import swap_out

KINDS = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".pt"}
_OPSET = 17  # the first whose instance norm and layer norm every runtime of today knows


@dataclass(frozen=True)
class Graph:
    """What is to be computed.

    Attributes:
        network: in eval mode, on the CPU; gives one tensor or several.
        inputs: name -> example [B, ...] with at least two cases, in the order in which the network takes them.
        outputs: names of what it gives.
        about: what the file says of itself, JSON-able: ONNX metadata, or a file ``brainfm.json`` inside.
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)


def write_graph(path: Path, kind: str, graph: Graph) -> None:
    """Writes what a network computes from its tensors.

    The first axis, the cases, may have any length afterwards; all others are those of the examples. The network keeps
    its values and gets its ordinary layers (nets/cpu.swap_out).

    Args:
        path: with the ending of the kind (KINDS).

    Raises:
        ConfigError: for an ending that is not the kind's, or where the package onnx is missing.
        FileError: where the file cannot be written.
    """
    if path.suffix != KINDS[kind]:
        raise ConfigError(f"out={path}: expected a file *{KINDS[kind]} for format={kind}")
    swap_out(graph.network)
    write = {"onnx": _onnx, "torch_export": _exported, "torchscript": _traced}[kind]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every check of a shape
        write_whole(path, write(graph, json.dumps(dict(graph.about))))


def _onnx(graph: Graph, about: str) -> bytes:
    demand("onnx", "export format=onnx")
    import onnx

    given, found = list(graph.inputs), list(graph.outputs)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        torch.onnx.export(
            graph.network, tuple(graph.inputs.values()), file, input_names=given, output_names=found,
            opset_version=_OPSET, dynamo=False, dynamic_axes={name: {0: "cases"} for name in [*given, *found]},
        )  # fmt: skip
        model = onnx.load(file)
    onnx.helper.set_model_props(model, {"brainfm": about})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _exported(graph: Graph, about: str) -> bytes:
    cases, examples = torch.export.Dim("cases", min=1, max=64), tuple(graph.inputs.values())
    shapes = tuple({0: cases} for _ in examples)
    program, held = torch.export.export(graph.network, examples, dynamic_shapes=shapes), io.BytesIO()
    torch.export.save(program, held, extra_files={"brainfm.json": about})
    return held.getvalue()


def _traced(graph: Graph, about: str) -> bytes:
    held = io.BytesIO()
    traced = torch.jit.trace(graph.network, tuple(graph.inputs.values()), check_trace=False)
    torch.jit.save(traced, held, _extra_files={"brainfm.json": about})
    return held.getvalue()
