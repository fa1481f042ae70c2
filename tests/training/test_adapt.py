"""Modes of adaptation: what moves, how fast, from when on; what is frozen stays to the bit; resuming is exact."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from brainfm.batch import Batch, Terms
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.settings import build
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.training.adapt import adapted_optimizer, parameter_groups
from brainfm.training.loop import CHECKPOINT, LoopSpec, Run, State, read_checkpoint, train
from brainfm.training.optim import build_optimizer, schedule_factor
from brainfm.training.processes import make_fabric
from brainfm.training.settings import AdaptSpec, TrainerSettings
from brainfm.verbs.compose import options, resolve
from tests.training.test_ddp import _context, by_torchrun

MODES = options("adapt")
WORDS = ["store=s", "run=r", "backbone_from=none", "task.target=lesion"]
STEPS = 12


def mode(name: str) -> AdaptSpec:
    return resolve("finetune", [*WORDS, f"adapt={name}"]).adapt


def new_task(name: str = "unet_tiny", dense_channels: int = 0, **settings: Any) -> SegmentationTask:
    torch.manual_seed(0)
    backbone = build_backbone(name, **settings)
    edge = 2 * backbone.strides[-1]
    spec = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 1), (edge,) * 3)  # type: ignore[arg-type]
    return SegmentationTask(spec, backbone, dense_channels=dense_channels)


class Supervised(nn.Module):
    def __init__(self, task: SegmentationTask) -> None:
        super().__init__()
        self.task = task
        self.modes: list[bool] = []

    def forward(self, batch: Batch, progress: float) -> Terms:
        terms = self.task.loss(self.task(batch.image, batch.present), batch)
        self.modes.append(self.task.backbone.blocks()[0].training)
        return terms


def loader_from(step: int) -> Iterator[Batch]:
    for number in range(step, STEPS):
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(2, 2, 8, 8, 8, generator=generator)
        yield Batch(image, torch.arange(2), present=torch.ones(2, 2, dtype=torch.bool), label=(image[:, 0] > 1).long())


TRAINER = TrainerSettings(accelerator="cpu", precision="32-true", threads=1)


def run(folder: Path, adapt: AdaptSpec, stop_after: int | None = None) -> tuple[SegmentationTask, State, Supervised]:
    """Trains; ``stop_after``: breaks off in the step after it, as a crash would."""
    task = new_task()

    def broken(step: int) -> Iterator[Batch]:
        for number, batch in enumerate(loader_from(step), start=step):
            if number == stop_after:
                raise RuntimeError("power cut")
            yield batch

    module = Supervised(task)
    state = train(
        Run(
            fabric=make_fabric(TRAINER),
            folder=folder,
            identity={},
            module=module,
            optimizer=adapted_optimizer(task, adapt, lr=1e-2, weight_decay=0.1, max_steps=STEPS),
            loader_from=broken if stop_after else loader_from,
            spec=LoopSpec(STEPS, warmup_steps=2, log_every=1, checkpoint_every=1),
        )
    )
    return task, state, module


def test_there_is_a_file_for_every_mode() -> None:
    assert set(MODES) == {"full", "frozen", "last_blocks", "layer_decay", "sawtooth", "scratch"}
    assert all(mode(name).name == name for name in MODES)
    assert [name for name in MODES if not mode(name).pretrained] == ["scratch"]


@pytest.mark.parametrize("name", MODES)
def test_frozen_weights_stay_to_the_bit_and_all_others_learn(name: str, tmp_path: Path) -> None:
    before = new_task().state_dict()
    task, state, module = run(tmp_path, mode(name))
    assert state.step == STEPS
    learning = {"frozen": 0, "last_blocks": 2}.get(name, 3)
    still = {key for key, value in task.named_parameters() if torch.equal(value, before[key])}
    frozen = {f"backbone.levels.{n}" for n in range(3 - learning)}
    expected = {key for key, _ in task.named_parameters() if any(key.startswith(f"{level}.") for level in frozen)}
    assert still == expected
    assert set(module.modes) == {not frozen}  # frozen blocks are computed in evaluation mode
    assert all(p.requires_grad == (key not in expected) for key, p in task.named_parameters())


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("stop_after", [1, 6])  # of sawtooth: in the head's tooth, and after it
def test_resuming_is_exact(name: str, stop_after: int, tmp_path: Path) -> None:
    straight, _, _ = run(tmp_path / "straight", mode(name))
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "broken", mode(name), stop_after)
    resumed, _, _ = run(tmp_path / "broken", mode(name))
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in straight.state_dict().items())
    curves = [(tmp_path / folder / "curves.csv").read_bytes() for folder in ("straight", "broken")]
    assert curves[0] == curves[1]


def test_full_is_the_plain_optimiser() -> None:
    task = new_task()
    groups = parameter_groups(task, AdaptSpec(), 1e-3, 0.1, 100)
    plain = build_optimizer(task, lr=1e-3, weight_decay=0.1).param_groups
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(p) for p in g["params"]] for g in plain]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(g["lr"], g["weight_decay"]) for g in plain]
    assert not any("schedule" in g for g in groups)


@pytest.mark.parametrize("name", ["unet_tiny", "resenc"])
def test_layer_decay_gives_each_block_its_rate(name: str) -> None:
    settings = {"widths": [4, 8, 8], "depths": [1, 2, 1]} if name == "resenc" else {}
    task = new_task(name, **settings)
    groups = parameter_groups(task, AdaptSpec(layer_decay=0.5), 1.0, 0.1, 100)
    rate = {p: g["lr"] for g in groups for p in g["params"]}
    blocks = task.backbone.blocks()
    for number, block in enumerate(blocks):
        assert {rate[p] for p in block.parameters()} == {0.5 ** (len(blocks) - number)}
    assert {rate[p] for p in (*task.decoder.parameters(), *task.fusion.parameters())} == {1.0}
    assert len(rate) == len(list(task.parameters()))  # every parameter in exactly one group
    assert sum(len(g["params"]) for g in groups) == len(rate)
    assert all(g["weight_decay"] == (0.1 if p.ndim > 1 else 0.0) for g in groups for p in g["params"])


def test_a_decoder_that_was_taken_learns_between_head_and_encoder() -> None:
    task = new_task(dense_channels=6)
    groups = parameter_groups(task, AdaptSpec(layer_decay=0.5, decoder=True), 1.0, 0.1, 100)
    rate = {p: g["lr"] for g in groups for p in g["params"]}
    assert task.head is not None
    assert {rate[p] for p in (*task.head.parameters(), *task.fusion.parameters())} == {1.0}
    assert {rate[p] for p in task.decoder.parameters()} == {0.5}
    for number, block in enumerate(task.backbone.blocks()):
        assert {rate[p] for p in block.parameters()} == {0.5 ** (4 - number)}
    assert sum(len(g["params"]) for g in groups) == len(rate) == len(list(task.parameters()))
    fresh = parameter_groups(new_task(), AdaptSpec(layer_decay=0.5, decoder="auto"), 1.0, 0.1, 100)
    assert max(g["lr"] for g in fresh) == 1.0 and min(g["lr"] for g in fresh) == 0.125


def test_a_decoder_that_was_taken_sleeps_with_the_encoder_and_never_freezes() -> None:
    task = new_task(dense_channels=6)
    saw = AdaptSpec(head_fraction=0.1, decoder=True)
    teeth = {p: g["schedule"] for g in parameter_groups(task, saw, 1.0, 0.1, 100) for p in g["params"]}
    assert task.head is not None
    assert all(len(teeth[p]) == 2 for p in task.head.parameters())
    assert all(len(teeth[p]) == 1 for p in (*task.decoder.parameters(), *task.backbone.parameters()))
    frozen = AdaptSpec(last_blocks=0, decoder=True)
    moving = {p for g in parameter_groups(task, frozen, 1.0, 0.1, 100) for p in g["params"]}
    assert moving == {*task.decoder.parameters(), *task.head.parameters(), *task.fusion.parameters()}


def test_the_saw_has_two_teeth() -> None:
    task = new_task()
    spec = AdaptSpec(head_fraction=0.1, warmup_fraction=0.2)
    groups = parameter_groups(task, spec, 1e-3, 0.1, 100)
    inside = {id(p) for p in task.backbone.parameters()}
    teeth = {id(p) in inside: g["schedule"] for g in groups for p in g["params"]}
    assert teeth == {True: [[10, 100, 20]], False: [[0, 10, 5], [10, 100, 20]]}
    head, encoder = ([schedule_factor(step, teeth[side]) for step in range(101)] for side in (False, True))
    assert encoder[:10] == [0.0] * 10 and encoder[10:] == head[10:] and min(encoder[10:100]) > 0
    assert head[5] == 1.0 == head[30] and head[9] < 0.1 and head[10] == pytest.approx(1e-3) and head[100] == 0
    assert len(groups) == 4


def test_the_encoder_sleeps_in_the_first_tooth(tmp_path: Path) -> None:
    """It does not move, keeps no activations, and leaves no moments behind; then it learns like the head."""
    spec = AdaptSpec(head_fraction=0.5, warmup_fraction=0.1)
    before = new_task().backbone.state_dict()
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, spec, stop_after=6)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    encoder = {k.removeprefix("task.backbone."): v for k, v in content["module"].items() if ".backbone." in k}
    assert encoder and all(torch.equal(value, before[name]) for name, value in encoder.items())
    head = sum(1 for key, _ in new_task().named_parameters() if not key.startswith("backbone."))
    assert len(content["optimizer"]["state"]) == head
    task, _, _ = run(tmp_path, spec)
    assert not any(torch.equal(value, before[name]) for name, value in task.backbone.named_parameters())


def test_a_frozen_encoder_keeps_no_activations() -> None:
    def kept(name: str) -> int:
        task = new_task()
        parameter_groups(task, mode(name), 1e-3, 0.0, 100)
        found: dict[int, torch.Tensor] = {}

        def note(value: torch.Tensor) -> torch.Tensor:
            return found.setdefault(value.untyped_storage().data_ptr(), value)

        batch = next(loader_from(0))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            maps = task.backbone.features(batch.image[:, :1])
        assert maps[-1].requires_grad == (name != "frozen")
        return sum(value.untyped_storage().nbytes() for value in found.values())

    assert kept("frozen") == 0 < kept("last_blocks") < kept("full")


def test_refusals() -> None:
    task = new_task()
    for values, said in (
        ({"last_blocks": 4}, "unet_tiny has 3 blocks"),
        ({"last_blocks": -1}, r"adapt\.last_blocks=-1"),
        ({"layer_decay": 0.0}, r"adapt\.layer_decay=0\.0"),
        ({"layer_decay": 1.5}, r"adapt\.layer_decay=1\.5"),
        ({"lr_scale": 0.0}, r"adapt\.lr_scale=0\.0"),
        ({"head_fraction": 0.6, "warmup_fraction": 0.5}, r"adapt\.head_fraction=0\.6"),
        ({"decoder": "perhaps"}, r"adapt\.decoder=perhaps: expected true, false or auto"),
        ({"decoder": 1}, r"adapt\.decoder=1"),
        ({"trial_share": 0.0}, r"adapt\.trial_share=0\.0"),
        ({"trial_steps": 0}, r"adapt\.trial_steps=0"),
        ({"layers": 3}, r"no key 'adapt\.layers'"),
    ):
        with pytest.raises(ConfigError, match=said):
            parameter_groups(task, build(AdaptSpec, values, "adapt."), 1e-3, 0.1, 100)
    with pytest.raises(ConfigError, match=r"optim\.lr=0"):
        parameter_groups(task, AdaptSpec(), 0, 0.1, 100)


class VoxelByVoxel(nn.Module):
    """A loss that is a mean over samples, so that processes and parts of a batch can share it out."""

    def __init__(self, task: SegmentationTask) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, progress: float) -> Terms:
        return Terms(nn.functional.cross_entropy(self.task(batch.image, batch.present), batch.label), {})


def _one_of(rank: int, world: int, port: int, folder: Path, accumulate: int) -> None:
    """One process of a run on four samples a step: a block is frozen, two sleep at first."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= by_torchrun(rank, world, port)
    task = new_task()
    each = 4 // world
    adapt = AdaptSpec(last_blocks=2, head_fraction=0.3, warmup_fraction=0.1)
    groups = parameter_groups(task, adapt, 1e-2, 0.0, STEPS)

    def batches(step: int) -> Iterator[Batch]:
        for number in range(step, STEPS):
            generator = torch.Generator().manual_seed(number)
            image = torch.randn(4, 2, 8, 8, 8, generator=generator)[rank * each : (rank + 1) * each]
            present = torch.ones(each, 2, dtype=torch.bool)
            yield Batch(image, torch.arange(each), present=present, label=(image[:, 0] > 1).long())

    train(
        Run(
            fabric=make_fabric(replace(TRAINER, devices=world, strategy="ddp" if world > 1 else "auto")),
            folder=folder,
            identity={},
            module=VoxelByVoxel(task),
            optimizer=torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
            loader_from=batches,
            spec=LoopSpec(STEPS, warmup_steps=2, accumulate=accumulate),
        )
    )


def test_two_processes_in_parts_are_one_process(tmp_path: Path) -> None:
    """DDP waits for the gradient of every parameter it knows: frozen ones it never knows, sleeping ones deliver."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_context.Process(target=_one_of, args=(rank, 2, port, tmp_path / "two", 2)) for rank in range(2)]
    for process in processes:
        process.start()
    _one_of(0, 1, 0, tmp_path / "one", 1)
    for process in processes:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    one, two = (read_checkpoint(tmp_path / folder / CHECKPOINT)["module"] for folder in ("one", "two"))
    before = new_task().state_dict()
    for key, value in one.items():
        assert torch.allclose(value, two[key], rtol=1e-4, atol=1e-6), key
        fixed = torch.equal(two[key], before[key.removeprefix("task.")])
        frozen = key.startswith("task.backbone.levels.0.")
        assert fixed == frozen or (fixed and key.endswith("0.bias")), key  # a bias before a norm has no gradient
