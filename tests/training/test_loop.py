"""Parts of a batch one after the other are the batch; groups follow their schedules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from brainfm.batch import Batch, Terms
from brainfm.curves import read_curves
from brainfm.errors import ConfigError
from brainfm.training.loop import LoopSpec, Run, _split, train
from brainfm.training.processes import make_fabric
from tests.training.test_adapt import TRAINER

STEPS = 6


class Net(nn.Module):
    """A loss that is a mean over samples, and a part that only some batches have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 1, 1)
        self.seen: list[int] = []

    def forward(self, batch: Batch, progress: float) -> Terms:
        self.seen.append(len(batch))
        error: Tensor = (self.second(torch.tanh(self.first(batch.image))) - 1).square().flatten(1).mean(dim=1)
        parts = {"error": error.mean().detach()}
        odd = batch.sample % 2 == 1
        if odd.any():
            parts["odd"] = batch.sample[odd].float().mean()
        return Terms(error.mean(), parts)


class Asked(Net):
    """Keeps what a step is given."""

    def forward(self, batch: Batch, progress: float) -> Terms:
        self.given = batch
        self.half = self.first(batch.image).dtype
        return super().forward(batch, progress)


def test_mixed_precision_rounds_no_batch(tmp_path: Path) -> None:
    """Layers compute in bfloat16; answers, voxels and what is told of a sample come as they were made."""
    net, answer = Asked(), torch.tensor([[73.4], [20.1]])
    batch = Batch(torch.randn(2, 1, 6, 6, 6), torch.arange(2), answer=answer, voxel_mm=torch.tensor([1.3, 0.77]))
    optimizer, spec = torch.optim.SGD(net.parameters(), lr=0.1), LoopSpec(1, 0)
    fabric = make_fabric(replace(TRAINER, precision="bf16-mixed"))
    train(Run(fabric, tmp_path, {}, net, optimizer, lambda step: [batch], spec))
    assert net.half == torch.bfloat16
    for name in ("answer", "image", "voxel_mm"):
        assert torch.equal(getattr(net.given, name), getattr(batch, name))


def loader_from(step: int) -> Iterator[Batch]:
    for number in range(step, STEPS):
        generator = torch.Generator().manual_seed(number)
        yield Batch(torch.randn(5, 1, 6, 6, 6, generator=generator), torch.arange(5 * number, 5 * number + 5))


def run(folder: Path, accumulate: int, groups=None, break_at: int | None = None) -> Net:
    net = Net()

    def batches(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(loader_from(step), start=step):
            if number == break_at:
                raise RuntimeError("power cut")
            yield batch

    optimizer = torch.optim.SGD(groups(net) if groups else net.parameters(), lr=0.1, momentum=0.9)
    spec = LoopSpec(STEPS, 1, clip_norm=0.0, log_every=1, checkpoint_every=2, accumulate=accumulate)
    train(Run(make_fabric(TRAINER), folder, {}, net, optimizer, batches, spec))
    return net


@pytest.mark.parametrize("accumulate", [2, 3, 5, 8])  # 2 and 3 do not divide 5 samples, 8 is more than there are
def test_accumulated_steps_are_the_steps_of_the_whole_batch(accumulate: int, tmp_path: Path) -> None:
    whole, parts = run(tmp_path / "whole", 1), run(tmp_path / "parts", accumulate)
    assert whole.seen == [5] * STEPS and len(parts.seen) == STEPS * min(5, accumulate)
    assert sum(parts.seen) == 5 * STEPS and max(parts.seen) - min(parts.seen) <= 1
    for one, other in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    rows = [read_curves(tmp_path / folder / "curves.csv") for folder in ("whole", "parts")]
    assert len(rows[0]) == len(rows[1]) > 0
    for name in ("total", "error", "lr", "grad_norm"):
        values = [[value for _, key, value in table if key == name] for table in rows]
        assert len(values[0]) == STEPS and values[0] == pytest.approx(values[1], rel=1e-4)


def test_resuming_an_accumulated_run_is_exact(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", 2)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "broken", 2, break_at=3)
    resumed = run(tmp_path / "broken", 2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_a_split_batch_loses_nothing() -> None:
    batch = next(loader_from(0))
    parts = _split(batch, 3)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.image for part in parts]), batch.image)
    assert torch.equal(torch.cat([part.sample for part in parts]), batch.sample)
    assert _split(batch, 1)[0] is batch


def test_groups_follow_their_own_schedules(tmp_path: Path) -> None:
    def groups(net: Net) -> list[dict]:
        return [
            {"params": list(net.first.parameters()), "schedule": [[2, 4, 0]]},
            {"params": list(net.second.parameters()), "lr": 0.01},
        ]

    start = Net()
    net = run(tmp_path / "a", 1, groups)
    assert not torch.equal(net.first.weight, start.first.weight)
    rows = read_curves(tmp_path / "a" / "curves.csv")
    rates = [value for _, key, value in rows if key == "lr"]
    # the highest of the groups: only steps 3 and 4 (of the first group) exceed the second's 0.01
    assert rates[2] == pytest.approx(0.1) and rates[3] == pytest.approx(0.05) and max(rates[:2] + rates[4:]) <= 0.01
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "b", 1, groups, break_at=2)
    held = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["module"]
    assert torch.equal(held["first.weight"], start.first.weight)
    assert not torch.equal(held["second.weight"], start.second.weight)
    resumed = run(tmp_path / "b", 1, groups)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters()))


def test_impossible_accumulation() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accumulate=0"):
        LoopSpec(1, 0, accumulate=0)
