"""Each term against its definition, written out."""

import math

import pytest
import torch

from brainfm.nets.latents import Code
from brainfm.objectives.losses import cosine, kl_to_standard_normal, mean_of_valid, ramp, reconstruction


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 1, 3, 3, 3), torch.randn(2, 1, 3, 3, 3)


@pytest.mark.parametrize("kind", ["mse", "smooth_l1"])
@pytest.mark.parametrize("masked", [False, True])
def test_reconstruction__compare(kind, masked):
    prediction, target = _pair()
    target[0] = prediction[0] + 0.05  # the quadratic side of the smooth L1
    where = torch.rand(2, 1, 3, 3, 3) < 0.5 if masked else None
    got = reconstruction(prediction, target, kind, 0.1, where)
    for b in range(2):
        errors = []
        for i, (p, t) in enumerate(zip(prediction[b].flatten().tolist(), target[b].flatten().tolist(), strict=True)):
            if where is None or where[b].flatten()[i]:
                d = abs(p - t)
                errors.append(d * d if kind == "mse" else (d * d / 0.2 if d < 0.1 else d - 0.05))
        assert got[b].item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_reconstruction__is_float32_for_half_precision():
    prediction, target = _pair()
    assert reconstruction(prediction.bfloat16(), target.half(), "mse").dtype == torch.float32


def test_cosine__compare():
    one, other = _pair()
    for b in range(2):
        u, v = one[b].flatten().tolist(), other[b].flatten().tolist()
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        want = dot / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))
        assert cosine(one, other)[b].item() == pytest.approx(want, rel=1e-5)


def test_kl__compares_to_torch_distributions():
    mean, logvar = _pair()
    normal = torch.distributions.Normal
    want = torch.distributions.kl_divergence(normal(mean, (0.5 * logvar).exp()), normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl_to_standard_normal(Code(mean, logvar)), want)
    assert not kl_to_standard_normal(Code(mean)).any()


def test_mean_of_valid__nothing_is_an_exact_zero_with_a_gradient():
    source = torch.randn(3, requires_grad=True)
    nothing = mean_of_valid(source[:0])
    nothing.backward()
    assert nothing.item() == 0 and source.grad is not None and not source.grad.any()
    assert mean_of_valid(torch.tensor([1.0, 3.0])).item() == 2


def test_ramp():
    assert [ramp(p, 0.1) for p in (0.0, 0.05, 0.1, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0
