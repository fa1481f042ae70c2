"""Guards: what is wrong stops in one sentence and leaves a state to go on from; what is healthy is let alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from brainfm.cli import main
from brainfm.curves import read_curves
from brainfm.data.store import Store
from brainfm.errors import ConfigError, TrainingError
from brainfm.objectives.mae import MAE
from brainfm.training.guards import FiniteWatch, Guards, first_not_finite
from brainfm.training.loop import CHECKPOINT, GOOD, read_checkpoint
from brainfm.training.pretrain import pretrain
from brainfm.training.settings import GuardSpec
from tests.training.test_pretrain import config, words

SHORT = (
    "objective=mae", "trainer.max_steps=12", "trainer.log_every=100", "trainer.evaluate_every=0", "probe=null",
)  # fmt: skip


def all_finite(path: Path) -> bool:
    content = read_checkpoint(path)
    moments = [v for state in content["optimizer"]["state"].values() for v in state.values()]
    return all(bool(torch.isfinite(v).all()) for v in (*content["module"].values(), *moments))


def step_of(path: Path) -> int:
    return json.loads(read_checkpoint(path)["state"])["step"]


def test_loss_far_above_its_median_for_long_stops_and_a_spike_does_not() -> None:
    def first_fault(losses: list[float], **settings) -> int | None:
        kept: dict = {}
        for number, loss in enumerate(losses):
            guards = Guards(GuardSpec(explode_logs=5, **settings), kept)  # made anew: all it knows is in `kept`
            kept = json.loads(json.dumps(kept))
            guards.kept = kept
            if guards.see_loss(number, loss) is not None:
                return number
        return None

    falling = [10 / (1 + n / 10) for n in range(60)]
    assert first_fault(falling) is None
    assert first_fault([*falling, *[900.0] * 4, *falling]) is None
    assert first_fault([*falling, *[900.0] * 5]) == 64
    assert first_fault([*falling, *[900.0] * 5], explode=None) is None
    assert first_fault([*falling, *[900.0] * 5], explode=500.0) is None
    assert first_fault([1.0] * 10 + [900.0] * 9) is None  # too early to know what is usual
    assert first_fault([-2.0] * 40 + [50.0] * 20) is None  # times a median below 0 means nothing


def test_collapse_is_seen_in_probes_in_a_row() -> None:
    spec = GuardSpec(min_std=0.1, min_rank=2.0, probes=2)
    healthy = {"anatomy_std": 0.5, "anatomy_rank": 7.0, "contrast_rank": 1.0, "contrast_std": 0.3, "age_mae": 0.0}
    guards = Guards(spec, {})
    for step in range(5):
        assert guards.see_probe(step, healthy) is None and not guards.is_low()
    assert guards.see_probe(5, healthy | {"anatomy_std": 0.01}) is None and guards.is_low()
    assert guards.see_probe(6, healthy) is None and not guards.is_low()
    assert guards.see_probe(7, healthy | {"anatomy_std": 0.01}) is None
    said = guards.see_probe(8, healthy | {"anatomy_std": 0.01})
    assert said is not None and "the features of anatomy have collapsed" in said and "after step 8" in said
    assert "guard.min_std=0.1 for 2 probes in a row" in said
    guards = Guards(spec, {})
    assert guards.see_probe(1, healthy | {"contrast_rank": float("nan"), "anatomy_rank": float("nan")}) is None
    said = guards.see_probe(2, healthy | {"anatomy_rank": 1.5})
    assert said is not None and "effective rank over the probed scans is 1.5" in said
    off = Guards(GuardSpec(min_std=None, min_rank=None, probes=1), {})
    assert off.see_probe(1, {"anatomy_std": 0.0, "anatomy_rank": 0.0}) is None


def test_impossible_settings_are_refused() -> None:
    for key, value in (("probes", 0), ("min_std", 0.0), ("min_rank", -1.0), ("explode", 1.0), ("explode_logs", 51)):
        with pytest.raises(ConfigError, match=rf"guard\.{key}={value}: expected"):
            GuardSpec(**{key: value})


def test_watch_remembers_the_first_step() -> None:
    watch = FiniteWatch(torch.device("cpu"))
    fine, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    watch.see(1, (fine, fine))
    assert watch.first() is None
    for step, values in ((2, (fine, bad)), (3, (fine, fine)), (4, (bad * 0, fine))):
        watch.see(step, values)
    assert watch.first() == 2


def test_weights_moments_and_buffers_are_looked_at() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert first_not_finite(net, optimizer) is None  # an infinite mask is meant
    optimizer.state[net[0].weight]["exp_avg_sq"][0, 0] = float("inf")
    assert first_not_finite(net, optimizer) == "the optimiser's exp_avg_sq of 0.weight"
    optimizer.state[net[0].weight]["exp_avg_sq"][0, 0] = 0
    net[1].running_mean[1] = float("nan")
    assert first_not_finite(net, optimizer) == "1.running_mean"
    net[1].running_mean[1] = 0
    net[1].bias.data[0] = float("nan")
    assert first_not_finite(net, optimizer) == "1.bias"


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
def test_fault_between_log_steps_leaves_a_finite_checkpoint_to_go_on_from(
    where: str, toy_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in the sixth step, nothing is logged; checkpoints are due after 4, 8 and 12."""
    run, calls, usual = tmp_path / "run", [0], MAE.forward
    infinite = float("inf")

    def broken(self, batch, progress):
        terms = usual(self, batch, progress)
        calls[0] += 1
        if calls[0] == 6 and where == "loss":  # of no consequence for the weights
            terms = type(terms)(terms.total + infinite, terms.parts)
        if calls[0] == 6 and where == "gradient":
            terms.total.register_hook(lambda gradient: gradient * float("nan"))
        if calls[0] == 8 and where == "weight":
            self.get_parameter("decoder_for_test").data.fill_(infinite)
        return terms

    made = MAE.__init__

    def with_spare(self, *arguments, **settings):
        made(self, *arguments, **settings)
        self.decoder_for_test = nn.Parameter(torch.zeros(1))

    monkeypatch.setattr(MAE, "__init__", with_spare)
    monkeypatch.setattr(MAE, "forward", broken)
    with pytest.raises(TrainingError) as stopped:
        pretrain(config(toy_store, run, *SHORT))
    said = str(stopped.value)
    assert ("decoder_for_test is not finite after step 8" if where == "weight" else "after step 6;") in said
    assert said.startswith(f"{run}: ") and said.endswith("; last.ckpt holds step 4") and "\n" not in said
    assert step_of(run / CHECKPOINT) == 4 and all_finite(run / CHECKPOINT)
    assert not (run / "backbone.safetensors").exists()
    calls[0] = 100
    assert pretrain(config(toy_store, run, *SHORT)).step == 12
    assert all_finite(run / CHECKPOINT)


def test_collapsing_objective_stops_with_exit_2_and_keeps_the_last_good_state(
    toy_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, usual, calls, healthy = tmp_path / "run", MAE.encode, [0], [True]

    def encode(self, image):  # of the average, which is what is probed
        codes = usual(self, image)
        return codes if healthy[0] else {name: torch.ones_like(code) for name, code in codes.items()}

    def after_step(self, progress):
        healthy[0] = progress < 0.4
        calls[0] += 1

    monkeypatch.setattr(MAE, "encode", encode)
    monkeypatch.setattr(MAE, "after_step", after_step)
    more = ("objective=mae", "trainer.max_steps=20", "probe.every=3", "guard.probes=2", "trainer.checkpoint_every=4")
    assert main(["pretrain", *words(toy_store, run, *more)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    # Healthy probes after steps 3 and 6, low ones after 9 and 12.
    assert said.startswith(f"brainfm: {run}: the features of all have collapsed") and "after step 12" in said
    assert "last.ckpt holds step 8, good.ckpt step 6" in said
    assert calls[0] == 12 and step_of(run / CHECKPOINT) == 8 and step_of(run / GOOD) == 6
    assert {step for step, name, _ in read_curves(run / "curves.csv") if name == "probe_all_std"} == {3, 6, 9, 12}
    # As the sentence says: go on from the good state, here with a network that is well again.
    monkeypatch.setattr(MAE, "encode", usual)
    (run / CHECKPOINT).write_bytes((run / GOOD).read_bytes())
    assert main(["pretrain", *words(toy_store, run, *more)]) == 0
    assert calls[0] == 12 + 14 and step_of(run / GOOD) == step_of(run / CHECKPOINT) == 20


def test_two_processes_stop_together_and_one_speaks(toy_store: Store, tmp_path: Path) -> None:
    """The second process alone meets a loss that is not finite."""
    script = (
        "import sys\nfrom brainfm.cli import command\nfrom brainfm.objectives.mae import MAE\n"
        "from torch import distributed\nusual = MAE.forward\n"
        "def broken(self, batch, progress):\n"
        "    terms = usual(self, batch, progress)\n"
        "    late = distributed.get_rank() == 1 and progress >= 0.5\n"
        "    return type(terms)(terms.total + float('inf'), terms.parts) if late else terms\n"
        "MAE.forward = broken\ncommand(['pretrain', *sys.argv[1:]])\n"
    )
    run, file = tmp_path / "run", tmp_path / "broken.py"
    file.write_text(script)
    more = (*SHORT, "trainer.devices=2", "trainer.strategy=ddp", "trainer.batch_size=1", "trainer.checkpoint_every=2")
    command = [sys.executable, str(file), *words(toy_store, run, *more)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    told = [line for line in ended.stderr.splitlines() if "not finite" in line]
    assert ended.returncode == 2 and len(told) == 1, ended.stderr
    assert "total is not finite after step 7;" in told[0] and "last.ckpt holds step 6" in told[0]
    assert step_of(run / CHECKPOINT) == 6


def test_guards_may_be_loosened_to_go_on(toy_store: Store, tmp_path: Path) -> None:
    """What is set too sharply stops a healthy run; loosened, the same run goes on where it was."""
    run = tmp_path / "run"
    more = ("objective=mae", "trainer.max_steps=8", "probe.every=3", "trainer.checkpoint_every=2")
    with pytest.raises(TrainingError, match=r"below guard\.min_rank=1000"):
        pretrain(config(toy_store, run, *more, "guard.min_rank=1000", "guard.probes=1"))
    assert step_of(run / CHECKPOINT) == 2 and not (run / GOOD).exists()
    assert pretrain(config(toy_store, run, *more, "guard=null", "probe.patches=1")).step == 8
