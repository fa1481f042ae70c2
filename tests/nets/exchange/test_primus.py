"""Primus: its token grid, and the exact change of weights where the order of the grid's axes changed.

A block of its attention stands in the test, with learnt positions, rotary angles and
the axis-major order of a head's channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from brainfm.errors import WeightsError
from brainfm.nets.exchange.primus import head_channels, is_primus, resized, token_grid, with_axes_swapped

WIDTH, HEADS, GRID = 36, 3, (2, 3, 4)
HEAD = WIDTH // HEADS


def weights(blocks: int = 3) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {"eva.pos_embed": torch.randn(1, 24, WIDTH)}
    for block in range(blocks):
        for name in ("q_proj", "k_proj", "v_proj", "proj"):
            found[f"eva.blocks.{block}.attn.{name}.weight"] = torch.randn(WIDTH, WIDTH) / WIDTH**0.5
            if name != "k_proj":
                found[f"eva.blocks.{block}.attn.{name}.bias"] = torch.randn(WIDTH)
    return found


def angles(grid: tuple[int, int, int]) -> Tensor:
    """[N, HEAD]: a third of the channels for each axis, pairs of channels at falling frequencies."""
    bands = torch.pi * torch.linspace(1, 5, HEAD // 6)
    places = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij"), -1).reshape(-1, 3)
    return (places[:, :, None] * bands).repeat_interleave(2, -1).reshape(len(places), HEAD)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * angle.cos() + other * angle.sin()


def answer(state: dict[str, Tensor], map_: Tensor, order: tuple[int, int, int]) -> Tensor:
    """[E, X, Y, Z] -> the same, with tokens laid out in this order of the axes; positions and angles go by the place in
    the sequence, as a network has it that was given the wrong order."""
    laid = map_.permute(0, *(1 + axis for axis in order))
    x = laid.flatten(1).T + state["eva.pos_embed"][0]
    angle = angles(tuple(laid.shape[1:]))  # type: ignore[arg-type]
    for block in range(3):
        parts = {}
        for name in ("q_proj", "k_proj", "v_proj"):
            at = f"eva.blocks.{block}.attn.{name}"
            value = x @ state[f"{at}.weight"].T + state.get(f"{at}.bias", torch.zeros(WIDTH))
            parts[name] = value.reshape(-1, HEADS, HEAD).transpose(0, 1)
        q, k = turned(parts["q_proj"], angle), turned(parts["k_proj"], angle)
        mixed = (q @ k.transpose(1, 2) / HEAD**0.5).softmax(-1) @ parts["v_proj"]
        at = f"eva.blocks.{block}.attn.proj"
        x = x + mixed.transpose(0, 1).reshape(-1, WIDTH) @ state[f"{at}.weight"].T + state[f"{at}.bias"]
    back = x.T.reshape(WIDTH, *laid.shape[1:])
    return back.permute(0, *(1 + order.index(axis) for axis in range(3)))


@torch.no_grad()
def test_the_same_answer_after_the_order_of_the_axes_changed() -> None:
    state, map_ = weights(), torch.randn(WIDTH, 3, 2, 4)
    trained = answer(state, map_, (1, 0, 2))  # the grid in the file: second axis, first, third
    changed = with_axes_swapped(state, GRID, HEAD)
    torch.testing.assert_close(answer(changed, map_, (0, 1, 2)), trained, atol=1e-4, rtol=0)
    position_alone = state | {"eva.pos_embed": changed["eva.pos_embed"]}
    assert (answer(position_alone, map_, (0, 1, 2)) - trained).abs().max() > 0.1
    assert (answer(state, map_, (0, 1, 2)) - trained).abs().max() > 0.1
    again = with_axes_swapped(changed, (3, 2, 4), HEAD)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_only_positions_queries_and_keys_change() -> None:
    state = {f"encoder.{name}": value for name, value in weights().items()}
    changed = with_axes_swapped(state, GRID, HEAD)
    moved = {name for name in state if not torch.equal(state[name], changed[name])}
    asked = ("pos_embed", "q_proj.weight", "q_proj.bias", "k_proj.weight")
    assert moved == {name for name in state if name.endswith(asked)}
    with pytest.raises(WeightsError, match="three equal groups"):
        with_axes_swapped(state, GRID, 16)


def test_the_grid_is_told_by_the_positions_and_not_by_the_plan() -> None:
    assert token_grid(torch.zeros(1, 8000, 864), (160, 160, 160)) == (20, 20, 20)
    assert token_grid(torch.zeros(1, 512, 864), (192, 192, 64)) == (8, 8, 8)  # SimCLR's plan names what it never saw
    assert token_grid(torch.zeros(1, 96, 864), (32, 64, 24)) == (4, 8, 3)
    with pytest.raises(WeightsError, match="96 tokens, which is no cube"):
        token_grid(torch.zeros(1, 96, 864))


def test_heads_and_kind() -> None:
    assert [head_channels(torch.zeros(1, 8, width)) for width in (396, 864, 1056)] == [66, 72, 66]
    with pytest.raises(WeightsError, match="700 channels"):
        head_channels(torch.zeros(1, 8, 700))
    assert is_primus(["encoder.eva.blocks.0.norm1.weight"]) and not is_primus(["encoder.stages.0.weight"])


def test_positions_for_another_grid() -> None:
    ramp = torch.linspace(0, 1, 4)[:, None, None].expand(4, 4, 4).reshape(1, 64, 1)
    assert resized(ramp, (4, 4, 4), (4, 4, 4)) is ramp
    larger = resized(ramp, (4, 4, 4), (8, 6, 4)).reshape(8, 6, 4)
    assert torch.allclose(larger, larger[:, :1, :1].expand(8, 6, 4)) and (larger[1:, 0, 0] >= larger[:-1, 0, 0]).all()
