"""Each term against its definition, written out."""

import math

import pytest
import torch

from brainfm.nets.latents import Code
from brainfm.objectives.losses import (
    centred,
    cosine,
    kl_to_standard_normal,
    mean_of_valid,
    mean_where,
    ramp,
    reconstruction,
    spread_floor,
)


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


def test_mean_where__compare():
    values = torch.tensor([1.0, float("nan"), 5.0], requires_grad=True)
    found = mean_where(values, torch.tensor([True, False, True]))
    found.backward()
    assert found.item() == 3 and values.grad.tolist() == [0.5, 0.0, 0.5]
    assert mean_where(values.detach(), torch.zeros(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("pairs", [1, 3])
def test_centred_and_floor__compare_to_loops(pairs):
    torch.manual_seed(0)
    one, other = 0.4 * torch.randn(pairs, 3, 2, 1, 2) + 5, 0.4 * torch.randn(pairs, 3, 2, 1, 2) + 5
    other[:, 2] *= 20
    got = centred(one, other)
    floors = []
    for e in range(3):
        squares = []
        for x in range(2):
            for z in range(2):
                here = [code[b, e, x, 0, z].item() for code in (one, other) for b in range(pairs)]
                if pairs == 1:
                    here = [v for code in (one, other) for v in code[0, e].flatten().tolist()]
                mean = sum(here) / len(here)
                for code, found in zip((one, other), got, strict=True):
                    for b in range(pairs):
                        want = code[b, e, x, 0, z].item() - mean
                        assert found[b, e, x, 0, z].item() == pytest.approx(want, abs=1e-4)
                        squares.append(want * want)
        floors.append(max(0.0, 1 - math.sqrt(sum(squares) / len(squares) + 1e-4)))
    assert floors[0] > 0.3 and floors[2] == 0
    assert spread_floor(*got).item() == pytest.approx(sum(floors) / 3, rel=1e-4)


def test_a_code_of_the_place_in_the_patch_alone_meets_no_centred_term():
    """Padding tells a network which cell it looks at; two pairs are enough to see that nothing else is told."""
    torch.manual_seed(0)
    place = torch.randn(1, 4, 2, 2, 2).expand(2, -1, -1, -1, -1)
    one, other = place + 0.01 * torch.randn(2, 2, 4, 2, 2, 2)
    assert cosine(one, other).min() > 0.99
    assert cosine(*centred(one, other)).max() < 0.7 and spread_floor(*centred(one, other)) > 0.95
    assert cosine(*centred(one[:1], other[:1])).min() > 0.99, "one pair cannot tell"


@pytest.mark.parametrize("pairs", [1, 2, 0])
def test_a_common_vector_meets_no_centred_term(pairs):
    """One pair is enough, the mean being over cells too; without a pair there is no term and no trouble."""
    torch.manual_seed(0)
    common = torch.full((pairs, 4, 2, 2, 2), 7.0).requires_grad_()
    one, other = common + 0.01 * torch.randn(2, pairs, 4, 2, 2, 2)
    if pairs:
        assert cosine(one, other).min() > 0.999
        assert cosine(*centred(one, other)).max() < 0.7 and spread_floor(*centred(one, other)) > 0.95
        same = torch.full_like(one, 3.0)
        assert cosine(*centred(same, same)).abs().max() == 0
    terms = mean_of_valid(1 - cosine(*centred(one, other))) + spread_floor(*centred(one, other))
    terms.backward()
    assert common.grad.isfinite().all() and (pairs > 0 or terms.item() == 0)


def test_ramp():
    assert [ramp(p, 0.1) for p in (0.0, 0.05, 0.1, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert ramp(0.0, 0.0) == 1.0
