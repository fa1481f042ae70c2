"""Runs without a fixed length: rates, identity, finished copies; and the average of the weights in pre-training."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from brainfm.cli import main
from brainfm.curves import read_curves
from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.patches import PretrainPatches
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.objectives.objective import Objective, make_objective
from brainfm.settings import build
from brainfm.training.average import WeightAverage
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.optim import Wsd, build_optimizer
from brainfm.training.pretrain import pretrain, split_sessions
from brainfm.training.run import loop_spec
from brainfm.training.settings import OptimSettings, PretrainSettings, TrainerSettings, WsdSettings
from tests.training.test_pretrain import config, flat, words

WSD = (
    "optim=wsd", "optim.warmup_steps=3", "optim.horizon_steps=10", "trainer.max_steps=8", "trainer.evaluate_every=0",
    "trainer.precision=32-true", "probe=null", "objective=mae", "objective.mask_unit_vox=4",
)  # fmt: skip
LR = 3e-4


def finish(source: Path, *more: str) -> tuple[str, ...]:
    return (f"finish.from={source}", "finish.steps=4", *more)


@pytest.fixture(scope="module")
def source(toy_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps."""
    run = tmp_path_factory.mktemp("wsd") / "source"
    assert pretrain(config(toy_store, run, *WSD)).step == 8
    return run


@pytest.fixture(scope="module")
def finished(source: Path, toy_store: Store) -> Path:
    """Its copy, decayed over 4 steps more."""
    run = source.with_name("finished")
    assert pretrain(config(toy_store, run, *WSD, *finish(source))).step == 12
    return run


# -------------------------------------------------------------------------------------------------------- the formulas


def test_rates_against_the_formulas() -> None:
    wsd = Wsd(warmup_steps=4, horizon_steps=10)
    warming = [1e-3 + (1 - 1e-3) * step / 4 for step in range(4)]
    assert [wsd.factor(step) for step in range(4)] == pytest.approx(warming)
    assert {wsd.factor(step) for step in (4, 5, 1000, 10**9)} == {1.0} and Wsd(0).factor(0) == 1.0
    linear, cosine = Wsd(4, 10, (20, 5)), Wsd(4, 10, (20, 5), "cosine")
    for step in range(20, 25):
        assert linear.factor(step) == pytest.approx(1 - (step - 20) / 5)
        assert cosine.factor(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * (step - 20) / 5)))
    assert linear.factor(19) == cosine.factor(19) == 1.0
    assert linear.factor(25) == linear.factor(30) == 0.0 and cosine.factor(30) == pytest.approx(0.0)
    # branched off within the warm-up: both count
    assert Wsd(4, 10, (2, 4)).factor(3) == pytest.approx(warming[3] * 0.75)
    assert [wsd.progress(step) for step in (0, 5, 10, 11)] == [0.0, 0.5, 1.0, 1.0]


def test_neither_rate_nor_progress_depends_on_the_number_of_steps(toy_store: Store, tmp_path: Path) -> None:
    specs = []
    for steps in (2, 8, 80):  # 2 are fewer than the warm-up
        values = config(toy_store, tmp_path, *WSD, f"trainer.max_steps={steps}")
        specs.append(loop_spec(values.trainer, values.optim))
    for step in range(9):
        assert len({(spec.factor(step), spec.progress(step)) for spec in specs}) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"warmup_steps": -1}, r"optim\.warmup_steps=-1"),
        ({"horizon_steps": 0}, r"optim\.horizon_steps=0"),
        ({"decay": (3, 0)}, r"finish\.steps=0"),
        ({"decay": (3, 1), "shape": "square"}, r"finish\.shape=square: expected linear or cosine"),
    ],
)
def test_impossible_schedules(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Wsd(**wrong)


def test_schedules_of_the_configuration() -> None:
    trainer = TrainerSettings(max_steps=50)
    assert loop_spec(trainer, OptimSettings(warmup_fraction=0.1)).warmup_steps == 5
    cosine = loop_spec(trainer, WsdSettings(schedule="cosine", warmup_steps=7, warmup_fraction=0.1))
    assert (cosine.warmup_steps, cosine.wsd) == (7, None)
    assert loop_spec(trainer, WsdSettings(warmup_steps=7, horizon_steps=9)).wsd == Wsd(7, 9)
    with pytest.raises(ConfigError, match=r"optim\.schedule=saw: expected cosine or wsd"):
        build(WsdSettings, {"schedule": "saw", "warmup_steps": 7}, "optim.")
    with pytest.raises(ConfigError, match=r"optim\.warmup_steps=null: expected a number"):
        WsdSettings(warmup_steps=None, horizon_steps=9)


# ------------------------------------------------------------------------------------------------------------ the runs


def naive(store: Store, settings: PretrainSettings, rates: list[float]) -> tuple[Objective, dict[str, torch.Tensor]]:
    """The run step by step, without loop, checkpoint or classes: the objective and the average of its weights."""
    torch.manual_seed(0)
    sides = split_sessions(store.sessions, 0.3, 0)
    objective = make_objective(settings.objective, build_backbone(**settings.backbone), patch_vox=(16, 16, 16), seed=0)
    average = {name: value.detach().clone() for name, value in objective.named_parameters()}
    optimizer = build_optimizer(objective, lr=LR, weight_decay=0.01)
    patches = PretrainPatches(store, sides[0], objective.views, 0, 0.9)
    for step, batch in enumerate(make_loader(patches, StepSampler(0, len(rates), 2), workers=0)):
        for group in optimizer.param_groups:
            group["lr"] = LR * rates[step]
        optimizer.zero_grad()
        objective(batch, min(1.0, step / 10)).total.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        keep = min(0.999, (2 + step) / (11 + step))
        for name, value in objective.named_parameters():
            average[name] = keep * average[name] + (1 - keep) * value.detach()
    return objective, average


def test_a_finished_copy_is_the_naive_continuation_and_ships_the_naive_average(
    finished: Path, toy_store: Store
) -> None:
    rates = [1e-3 + (1 - 1e-3) * step / 3 for step in range(3)] + [1.0] * 5 + [1.0, 0.75, 0.5, 0.25]
    objective, average = naive(toy_store, config(toy_store, finished, *WSD), rates)
    module = read_checkpoint(finished / CHECKPOINT)["module"]
    for name, value in objective.state_dict().items():
        assert torch.allclose(module[f"question.{name}"], value, rtol=1e-4, atol=1e-6), name
    loaded = load_backbone(finished / "backbone.safetensors")
    shipped = {f"backbone.{name}": value for name, value in loaded.backbone.state_dict().items()} | loaded.extra
    assert set(shipped) == set(average)
    far = 0.0
    for name, value in average.items():
        assert torch.equal(shipped[name], module[f"average.network.{name}"])
        assert torch.allclose(shipped[name], value, rtol=1e-4, atol=1e-6), name
        far = max(far, float((shipped[name] - module[f"question.{name}"]).abs().max()))
    assert far > 1e-4  # the average is not the last weights
    shown = [value for _, name, value in read_curves(finished / "curves.csv") if name == "lr"]
    assert shown == pytest.approx([LR * rate for rate in rates])


def test_a_finished_copy_says_where_it_comes_from(source: Path, finished: Path) -> None:
    provenance = load_backbone(finished / "backbone.safetensors").provenance
    assert provenance.steps == 12 and provenance.samples == 24
    assert provenance.config["finish"] == {"from": str(source), "steps": 4, "shape": "linear", "from_step": 8}
    assert len(provenance.parents) == 1 and len(provenance.parents[0]) == 64
    assert load_backbone(source / "backbone.safetensors").provenance.parents == ()


def test_more_steps_of_the_same_run_equal_one_run(source: Path, toy_store: Store, tmp_path: Path) -> None:
    """In two sittings, the first of them shorter than the warm-up."""
    for steps in (2, 8):
        pretrain(config(toy_store, tmp_path / "run", *WSD, f"trainer.max_steps={steps}"))
    one, other = (flat(read_checkpoint(run / CHECKPOINT)) for run in (source, tmp_path / "run"))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    # asked for less than is there: nothing happens
    assert pretrain(config(toy_store, tmp_path / "run", *WSD, "trainer.max_steps=3")).step == 8
    assert load_backbone(tmp_path / "run" / "backbone.safetensors").provenance.steps == 8


def test_a_cosine_run_has_a_fixed_length(toy_store: Store, tmp_path: Path) -> None:
    cosine = tuple(word for word in WSD if not word.startswith("optim"))
    pretrain(config(toy_store, tmp_path / "run", *cosine, "trainer.max_steps=2"))
    with pytest.raises(ConfigError, match=r"trainer\.max_steps=2, found trainer\.max_steps=4"):
        pretrain(config(toy_store, tmp_path / "run", *cosine, "trainer.max_steps=4"))


def cut_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The power fails in this step."""
    update = WeightAverage.update

    def failing(self: WeightAverage, done: int) -> None:
        if done == step:
            raise RuntimeError("power cut")
        update(self, done)

    monkeypatch.setattr(WeightAverage, "update", failing)


def marks(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {f"{path} {path.stat().st_mtime_ns}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_finishing_leaves_the_run_untouched(source: Path, toy_store: Store, tmp_path: Path) -> None:
    before = marks(source)
    pretrain(config(toy_store, tmp_path / "copy", *WSD, *finish(source, "finish.shape=cosine")))
    assert marks(source) == before


def test_an_interrupted_copy_goes_on_from_where_it_branched_off_though_the_run_has_moved(
    source: Path, finished: Path, toy_store: Store, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    pretrain(config(toy_store, run, *WSD))
    command = config(toy_store, copy, *WSD, *finish(run), "trainer.checkpoint_every=1")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        cut_at(patch, 11)
        pretrain(command)
    assert not (copy / "backbone.safetensors").exists()  # it is not finished
    pretrain(config(toy_store, run, *WSD, "trainer.max_steps=10"))
    with pytest.raises(ConfigError, match=r"finish\.steps=4, found finish\.steps=5"):
        pretrain(config(toy_store, copy, *WSD, *finish(run)[:1], "finish.steps=5"))
    assert pretrain(command).step == 12
    one, other = (flat(read_checkpoint(folder / CHECKPOINT)) for folder in (finished, copy))
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert (copy / "curves.csv").read_bytes() == (finished / "curves.csv").read_bytes()


def test_an_unfinished_run_always_has_a_file_of_its_last_checkpoint(toy_store: Store, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        cut_at(patch, 7)
        pretrain(config(toy_store, tmp_path / "run", *WSD))  # a checkpoint every 4 steps
    loaded = load_backbone(tmp_path / "run" / "backbone.safetensors")
    content = read_checkpoint(tmp_path / "run" / CHECKPOINT)
    assert loaded.provenance.steps == json.loads(content["state"])["step"] == 4
    for name, value in loaded.backbone.state_dict().items():
        assert torch.equal(value, content["module"][f"average.network.backbone.{name}"])


def test_what_cannot_be_finished_is_said_in_a_sentence(
    source: Path, finished: Path, toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(run: Path, *more: str) -> str:
        assert main(["pretrain", *words(toy_store, run, *WSD, *more)]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said.splitlines()[-1]

    copy = tmp_path / "copy"
    assert "is run= itself" in fails(source, *finish(source))
    assert f"found no {CHECKPOINT}" in fails(copy, *finish(tmp_path))
    other = fails(copy, *finish(source), "objective.mask_ratio=0.3")
    assert "holds a run with objective.mask_ratio=0.6, found objective.mask_ratio=0.3" in other
    assert "a cosine has its own end" in fails(copy, *finish(source), "optim.schedule=cosine")
    assert "finish.steps=0" in fails(copy, f"finish.from={source}", "finish.steps=0")
    assert not (copy / CHECKPOINT).exists()
    assert "holds a run that is no finished copy" in fails(source, *finish(finished))
    assert "holds a run with finish=" in fails(finished)


# --------------------------------------------------------------------------------------------------------- the average


def test_what_is_validated_and_probed_is_the_average(toy_store: Store, tmp_path: Path) -> None:
    """A decay of 0 is the last weights; any other changes what is seen of the run, but not the run."""
    more = (*(word for word in WSD if word != "probe=null"), "trainer.evaluate_every=4")
    curves = {}
    for decay in ("null", "0", "0.999"):
        pretrain(config(toy_store, tmp_path / decay, *more, f"average={decay}"))
        curves[decay] = read_curves(tmp_path / decay / "curves.csv")
    assert curves["0"] == curves["null"] and any(name == "probe_backbone_rank" for _, name, _ in curves["null"])
    seen = {name for (_, name, old), (_, _, new) in zip(curves["null"], curves["0.999"]) if old != new}
    assert {"val_total", "probe_backbone_std"} <= seen
    assert all(name.startswith(("val_", "probe_")) for name in seen)


def test_a_queue_of_codes_follows_and_stays_out_of_the_file(toy_store: Store, tmp_path: Path) -> None:
    more = ("objective=contrastive", "objective.latent_channels=16", "objective.queue=6", "objective.hidden_channels=8")
    kept = [word for word in WSD if not word.startswith("objective")]
    pretrain(config(toy_store, tmp_path / "run", *kept, *more))
    module = read_checkpoint(tmp_path / "run" / CHECKPOINT)["module"]
    assert bool((module["question.queue_subjects"] >= 0).all())
    for name in ("queue_codes", "queue_subjects", "queue_next"):
        assert torch.equal(module[f"average.network.{name}"], module[f"question.{name}"])
    assert not any("queue" in name for name in load_backbone(tmp_path / "run" / "backbone.safetensors").extra)


def test_a_checkpoint_from_before_the_average_goes_on_without_one(
    toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    kept = (*(word for word in WSD if not word.startswith("optim")), "trainer.max_steps=6", "average=null")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):

        def fail(*_: object) -> None:
            raise RuntimeError("power cut")

        patch.setattr("brainfm.training.pretrain.Augmented.after_step", lambda self, step, _: step == 5 and fail())
        pretrain(config(toy_store, run, *kept))
    content = read_checkpoint(run / CHECKPOINT)
    assert not any(name.startswith("average") for name in content["module"])
    identity = json.loads(content["identity"])
    assert identity.pop("average") is None  # as a version without the key wrote it
    torch.save(content | {"identity": json.dumps(identity)}, run / CHECKPOINT)
    assert main(["pretrain", *words(toy_store, run, *kept, "average=0.999")]) == 2
    assert "holds a run with average=None, found average=0.999" in capsys.readouterr().err
    assert pretrain(config(toy_store, run, *kept)).step == 6
