"""Masks: the exact ratio, whole blocks, and draws that belong to a sample."""

import pytest
import torch

from brainfm.errors import ConfigError
from brainfm.objectives.masking import draw_mask


@pytest.mark.parametrize(
    ("patch", "unit", "ratio"), [((16, 16, 16), 4, 0.2), ((8, 16, 24), 4, 0.6), ((6, 6, 6), 2, 0.75)]
)
def test_ratio_is_exact_in_every_sample(patch, unit, ratio):
    hidden = draw_mask(torch.arange(5), patch, unit, ratio, 0, "mask")
    assert hidden.shape == (5, 1, *patch) and hidden.dtype == torch.bool
    blocks = patch[0] * patch[1] * patch[2] // unit**3
    assert (hidden.flatten(1).sum(1) == round(ratio * blocks) * unit**3).all()
    for cut in hidden.unfold(2, unit, unit).unfold(3, unit, unit).unfold(4, unit, unit).reshape(-1, unit**3):
        assert cut.all() or not cut.any()


def test_draws_belong_to_the_sample():
    samples = torch.tensor([7, 3, 11])
    whole = draw_mask(samples, (16, 16, 16), 4, 0.5, 0, "mask_a")
    assert torch.equal(whole[2:], draw_mask(samples[2:], (16, 16, 16), 4, 0.5, 0, "mask_a"))
    assert len({whole[i].numpy().tobytes() for i in range(3)}) == 3
    assert not torch.equal(whole, draw_mask(samples, (16, 16, 16), 4, 0.5, 0, "mask_b"))
    assert not torch.equal(whole, draw_mask(samples, (16, 16, 16), 4, 0.5, 1, "mask_a"))
    assert draw_mask(samples[:0], (16, 16, 16), 4, 0.5, 0, "m").shape == (0, 1, 16, 16, 16)


def test_every_block_is_hidden_equally_often():
    hidden = draw_mask(torch.arange(2000), (4, 4, 4), 2, 0.25, 0, "mask")[:, 0, ::2, ::2, ::2].flatten(1)
    share = hidden.float().mean(0)
    assert (share - 0.25).abs().max() < 0.05


@pytest.mark.parametrize(
    ("unit", "ratio", "words"), [(5, 0.5, "divisor"), (0, 0.5, "divisor"), (4, 0.0, "some"), (4, 1.0, "some")]
)
def test_refusals(unit, ratio, words):
    with pytest.raises(ConfigError, match=words):
        draw_mask(torch.arange(2), (16, 16, 16), unit, ratio, 0, "mask")
