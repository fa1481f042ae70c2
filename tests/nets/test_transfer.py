"""Weights from one network to another: all that fit, or none."""

import pytest
import torch

from brainfm.errors import BrainfmError, WeightsError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.transfer import fingerprint, transfer


def test_transfer__changes_nothing_when_it_refuses():
    module = build_backbone("unet", widths=[2, 3])
    before = {n: v.clone() for n, v in module.state_dict().items()}
    state = {n: torch.ones_like(v) for n, v in before.items()} | {"levels.1.1.1.bias": torch.ones(7)}
    with pytest.raises(WeightsError, match=r"levels\.1\.1\.1\.bias is 7, expected 3"):
        transfer(module, state, allow_missing=["*"], allow_unused=["*"])
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_transfer__lists_are_honoured_and_reported():
    module = build_backbone("unet", widths=[2, 3])
    state = {n: torch.ones_like(v) for n, v in module.state_dict().items() if not n.startswith("levels.1")}
    state["head.weight"] = torch.zeros(1)
    for listed in ({}, {"allow_missing": ["levels.1.*"]}, {"allow_unused": ["head.*"]}):
        with pytest.raises(BrainfmError, match="does not fit"):
            transfer(module, state, **listed)
    report = transfer(module, state, allow_missing=["levels.1.*"], allow_unused=["head.weight"])
    assert len(report.loaded) == 8 and len(report.left_at_init) == 8 and report.unused == ("head.weight",)
    assert str(report).startswith("8 tensors loaded, 8 left at their initial values (levels.1.0.0.weight, ")
    assert str(report).endswith("1 of the file unused (head.weight)")
    assert all((p == 1).all() for p in module.levels[0].parameters())


def test_transfer__whole_numbers_do_not_become_weights():
    module = torch.nn.Linear(2, 2)
    state = {"weight": torch.zeros(2, 2, dtype=torch.int64), "bias": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(WeightsError, match=r"weight is torch\.int64"):
        transfer(module, state)


def test_fingerprint__sees_values_names_shapes_types_but_not_order():
    a, b = torch.arange(4.0), torch.ones(2, dtype=torch.bfloat16)
    mark = fingerprint({"a": a, "b": b})
    assert mark == fingerprint({"b": b, "a": a}) and len(mark) == 64
    others = [{"a": a + 1, "b": b}, {"c": a, "b": b}, {"a": a.reshape(2, 2), "b": b}, {"a": a, "b": b.half()}]
    assert len({mark, *(fingerprint(o) for o in others)}) == 5
