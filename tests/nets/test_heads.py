"""What stands before a last layer: every feature keeps a gradient, and files of before are read as they were."""

from __future__ import annotations

import math

import pytest
import torch

from brainfm.nets.heads import LinearHead, Standardise


def fitted(count: int = 40, features: int = 3) -> tuple[Standardise, torch.Tensor]:
    values = torch.randn(count, features, generator=torch.Generator().manual_seed(0)) * 0.2 + 7
    norm = Standardise(features)
    norm.fit(values)
    return norm, values


def test_fresh_it_changes_nothing() -> None:
    values = torch.tensor([[-3e3, 0.0, 0.1, 5.0, 4e5]])
    assert torch.allclose(Standardise(5)(values), values, rtol=1e-3)


def test_it_bends_and_never_cuts() -> None:
    norm, values = fitted()
    found = norm(values)
    z = (values - values.mean(0)) / values.std(0, correction=0)
    assert torch.allclose(found, 5 * torch.asinh(z / 5), atol=1e-4)
    far = (norm.mean + norm.scale * torch.tensor([[5.0, 50.0, -1e4]])).requires_grad_()
    out = norm(far)
    assert out[0].tolist() == pytest.approx([5 * math.asinh(1), 5 * math.asinh(10), -5 * math.asinh(2e3)], rel=1e-3)
    out.sum().backward()
    assert far.grad is not None and (far.grad > 0).all(), "a drift of many deviations can be learned away"


def test_a_bound_of_before_still_cuts() -> None:
    norm, _values = fitted()
    norm.load_state_dict(norm.state_dict() | {"bound": torch.tensor(5.0)})
    far = norm.mean + norm.scale * torch.tensor([[4.0, 6.0, -60.0]])
    assert torch.allclose(norm(far), torch.tensor([[4.0, 5.0, -5.0]]), atol=1e-3)


def test_a_deviation_far_below_the_others_is_not_believed() -> None:
    norm = Standardise(3)
    norm.fit(torch.tensor([[0.0, 0.0, 1e-6], [1.0, 2.0, 0.0], [2.0, 4.0, 1e-6]]))
    assert float(norm.scale[2]) == pytest.approx(0.1 * float(norm.scale[0]))


def test_a_linear_head_is_float32_under_autocast() -> None:
    head = LinearHead(2, 1)
    head.norm.set(torch.tensor([7.0, 0.0]), torch.tensor([0.01, 1.0]))
    torch.nn.init.ones_(head.out.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, high = head(torch.tensor([[7.004, 0.0], [7.005, 0.0]]))[:, 0].tolist()
    assert high - low == pytest.approx(0.1, rel=0.02), "bfloat16 knows no 7.004"
