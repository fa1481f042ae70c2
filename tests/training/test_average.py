"""The average of the weights: its values, its independence, and that a checkpoint carries it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from brainfm.errors import ConfigError
from brainfm.training.average import WeightAverage


def net() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    found[0].bias.requires_grad_(False)
    return found


def wander(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_values_against_the_formula(decay: float) -> None:
    module = net()
    average = WeightAverage(module, decay)
    expected = module[0].weight.detach().clone().double()
    for step in range(1, 30):
        wander(module, step)
        average.update(step)
        keep = min(decay, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * module[0].weight.detach().double()
    assert torch.allclose(average.weights()["0.weight"].double(), expected, atol=1e-6)


def test_shares_no_storage_and_asks_for_no_gradient() -> None:
    module = net()
    average = WeightAverage(module)
    tensors = [*module.state_dict().values(), *average.network.state_dict().values(), *average.weights().values()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert not any(p.requires_grad for p in average.parameters())
    before = average.weights()
    wander(module, 1)
    after = average.weights()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_frozen_weights_stay_and_buffers_follow() -> None:
    module = net()
    average = WeightAverage(module)
    module[1].running_mean += 2
    for step in range(1, 5):
        wander(module, step)
        average.update(step)
    assert torch.equal(average.weights()["0.bias"], module[0].bias)
    assert torch.equal(average.weights()["1.running_mean"], module[1].running_mean)


def test_a_network_in_half_precision_is_averaged_in_float32() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    average = WeightAverage(module, 0.999)
    wander(module, 1)
    average.update(1)
    assert {value.dtype for value in average.weights().values()} == {torch.float32}


def test_checkpoint_carries_it_once_and_resuming_is_exact() -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = net()
            self.average = WeightAverage(self.task, 0.9)

    def advance(trained: Trained, steps: range) -> None:
        for step in steps:
            wander(trained.task, step)
            trained.average.update(step)

    one, other = Trained(), Trained()
    advance(one, range(1, 6))
    saved = copy.deepcopy(one.state_dict())
    assert len(saved) == 2 * len(one.task.state_dict())
    advance(one, range(6, 10))
    other.load_state_dict(saved)
    advance(other, range(6, 10))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_stays_in_evaluation_mode() -> None:
    outer = nn.ModuleDict({"average": WeightAverage(net())})
    outer.train()
    assert not any(module.training for module in outer["average"].network.modules())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decay(decay: float) -> None:
    with pytest.raises(ConfigError, match=f"average={decay}"):
        WeightAverage(net(), decay)
