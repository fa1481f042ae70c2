"""Named parts, noise that belongs to a sample, and the meeting of contrasts."""

import pytest
import torch
import torch.nn.functional as F

from brainfm.errors import ConfigError
from brainfm.nets.heads import Fusion
from brainfm.nets.latents import LOGVAR_RANGE, Code, Latents, draw_noise, part_channels


def _maps(batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, 4, 8, 8, 16), torch.randn(batch, 6, 4, 4, 8), torch.randn(batch, 8, 2, 2, 4)]


def test_part_channels__sum_whatever_the_rounding():
    assert part_channels({"anatomy": 0.5, "contrast": 0.5}, 512) == {"anatomy": 256, "contrast": 256}
    assert part_channels({"anatomy": 0.5, "pathology": 0.3, "free": 0.2}, 512) == {
        "anatomy": 256,
        "pathology": 154,
        "free": 102,
    }
    for channels in range(3, 40):
        assert sum(part_channels({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, channels).values()) == channels


@pytest.mark.parametrize(
    ("parts", "channels", "words"),
    [
        ({"a": 0.5, "b": 0.4}, 8, "sum to 1, found 0.9"),
        ({"a": 1.5, "b": -0.5}, 8, "above 0"),
        ({}, 8, "sum to 1"),
        ({"a": 0.9, "b": 0.1}, 2, "without a channel"),
        ({"a.b": 1.0}, 8, "letters"),
    ],
)
def test_part_channels__refusals(parts, channels, words):
    with pytest.raises(ConfigError, match=words):
        part_channels(parts, channels)


def test_latents__compare_to_torch_pooling():
    torch.manual_seed(0)
    latents = Latents((4, 6, 8), {"anatomy": 0.75, "free": 0.25}, 8)
    maps = _maps()
    pooled = torch.cat([F.adaptive_avg_pool3d(m, (2, 2, 4)) for m in maps], 1)
    codes = latents(maps)
    assert list(codes) == ["anatomy", "free"]
    for name, code in codes.items():
        torch.testing.assert_close(code.mean, latents.mean[name](pooled), atol=1e-5, rtol=1e-5)
        assert code.logvar is None
    assert codes["anatomy"].mean.shape == (2, 6, 2, 2, 4)


def test_latents__logvar_is_clamped_and_float32_under_autocast():
    latents = Latents((4, 6, 8), {"anatomy": 0.5, "free": 0.5}, 4, variational=True)
    with torch.no_grad():
        latents.logvar["anatomy"].bias.fill_(1e4)
    with torch.autocast("cpu", torch.bfloat16):
        codes = latents(_maps())
    assert codes["anatomy"].logvar is not None and codes["anatomy"].logvar.max() == LOGVAR_RANGE[1]
    assert all(code.mean.dtype == torch.float32 for code in codes.values())


def test_sample__is_mean_plus_deviation_times_noise():
    latents = Latents((4,), {"a": 0.5, "b": 0.5}, 4, variational=True)
    codes = {n: Code(torch.randn(2, 2, 1, 1, 2), torch.randn(2, 2, 1, 1, 2)) for n in ("a", "b")}
    noise = torch.randn(2, 4, 1, 1, 2)
    values = latents.sample(codes, noise)
    torch.testing.assert_close(values["b"], codes["b"].mean + codes["b"].logvar.exp().sqrt() * noise[:, 2:])
    assert torch.equal(latents.sample(codes, None)["a"], codes["a"].mean)


def test_draw_noise__belongs_to_the_sample():
    whole = draw_noise(torch.tensor([3, 9, 4]), (2, 2), 0, "latent_a")
    assert torch.equal(whole[1], draw_noise(torch.tensor([9]), (2, 2), 0, "latent_a")[0])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, draw_noise(torch.tensor([3, 9, 4]), (2, 2), 0, "latent_b"))
    assert not torch.equal(whole, draw_noise(torch.tensor([3, 9, 4]), (2, 2), 1, "latent_a"))
    assert draw_noise(torch.tensor([], dtype=torch.int64), (2, 2), 0, "x").shape == (0, 2, 2)


def _fusion(how: str) -> Fusion:
    fusion = Fusion((4, 6, 8), how)
    for score in fusion.scores:
        torch.nn.init.normal_(score.weight)
    return fusion


def test_fusion__starts_as_the_mean_of_what_is_present():
    maps, present = [_maps() for _ in range(3)], torch.tensor([[True, False, True], [True, True, True]])
    for how in ("mean", "attention"):
        fused = Fusion((4, 6, 8), how)(maps, present)
        for level in range(3):
            torch.testing.assert_close(fused[level][0], (maps[0][level][0] + maps[2][level][0]) / 2)
            torch.testing.assert_close(fused[level][1], sum(m[level][1] for m in maps) / 3)


def test_fusion__attention_compares_to_a_loop():
    torch.manual_seed(0)
    fusion, maps = _fusion("attention"), [_maps() for _ in range(3)]
    present = torch.tensor([[True, False, True], [False, True, False]])
    fused = fusion(maps, present)
    for b in range(2):
        there = [m for m in range(3) if present[b, m]]
        for level in range(3):
            scores = torch.stack([(fusion.scores[level].weight[0] * maps[m][level][b]).sum(0) for m in there])
            shares = scores.softmax(0)
            want = sum(shares[i] * maps[m][level][b] for i, m in enumerate(there))
            torch.testing.assert_close(fused[level][b], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["mean", "attention"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_fusion__absent_contrasts_have_no_influence(how, garbage):
    torch.manual_seed(0)
    fusion, maps, present = _fusion(how), [_maps() for _ in range(2)], torch.tensor([[True, False], [True, True]])
    spoilt = [[m.clone() for m in contrast] for contrast in maps]
    for level in spoilt[1]:
        level[0] = garbage
    for one, two in zip(fusion(maps, present), fusion(spoilt, present), strict=True):
        assert torch.equal(one, two)
    sum(m.sum() for m in fusion(spoilt, present)).backward() if how == "attention" else None
    assert all(torch.isfinite(p.grad).all() for p in fusion.parameters())


@pytest.mark.parametrize("how", ["mean", "attention"])
def test_fusion__order_does_not_matter_and_nothing_gives_zeros(how):
    torch.manual_seed(0)
    fusion, maps = _fusion(how), [_maps() for _ in range(3)]
    present = torch.tensor([[True, True, False], [False, False, False]])
    order = [2, 0, 1]
    for one, two in zip(fusion(maps, present), fusion([maps[i] for i in order], present[:, order]), strict=True):
        torch.testing.assert_close(one, two)
        assert not one[1].any()


def test_fusion__every_parameter_gets_a_gradient_from_its_start():
    fusion, maps = Fusion((4, 6, 8), "attention"), [_maps() for _ in range(2)]
    sum((m**2).sum() for m in fusion(maps, torch.ones(2, 2, dtype=torch.bool))).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in fusion.parameters())


def test_fusion__unknown():
    with pytest.raises(ConfigError, match="expected 'mean' or 'attention'"):
        Fusion((4,), "max")
