"""Fine-tuning in two processes equals one, and both ranks plan, score and end alike."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from brainfm.data.store import Store
from brainfm.training.finetune import MEMBER
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from tests.study.test_transferred import backbone_file
from tests.training.test_ddp import by_hand, by_torchrun
from tests.training.test_finetune_contracts import small_store

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["brainfm.training.processes", "brainfm.training.finetune", "brainfm.cli", __name__])


def words(store: Store, run: Path, task: str, *more: str, candidates: str = "[tuned]") -> list[str]:
    # Dropout is drawn for the samples that pass the network together: those of one process or half of them.
    asked = {
        "classification": ["task.target=ill", "task.dropout=0", f"task.candidates={candidates}"],
        "segmentation": ["task.target=lesion"],
    }[task]
    return [
        f"store={store.path}", f"run={run}", f"task={task}", *asked, "backbone_from=none", "backbone=unet_tiny",
        "trainer=cpu", "task.patch_vox=[16,16,16]", "folds=2", "trainer.max_steps=4", "trainer.workers=0",
        "trainer.precision=32-true", "trainer.threads=1", "baselines=[]", "audit=false", "report=false", "mirror=[]",
        "clean=false", "data.augment=null", *more,
    ]  # fmt: skip


def _rank(environment: dict[str, str], arguments: list[str], rank: int, out: Path) -> None:
    os.environ |= environment
    said = os.open(out / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    os.dup2(said, 1)
    from brainfm.cli import command
    from brainfm.training import finetune, memory

    begin = finetune._begin

    def watched(config: dict[str, Any]) -> Any:
        study, splits = begin(config)
        (out / f"plan{rank}").write_text(json.dumps(study.plan.to_dict()))
        return study, splits

    finetune._begin = watched
    # As on two machines, or a moment apart: each process finds another amount of memory free.
    memory.free_ram_bytes = lambda: (20.0 - 15.0 * rank) * 2**30
    command(["finetune", *arguments])


def go(arguments: list[str], out: Path, world: int) -> list[str]:
    """Runs the processes to their end. Returns what each said."""
    out.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    by = by_torchrun if world > 1 else by_hand
    ranks = [_context.Process(target=_rank, args=(by(r, world, port), arguments, r, out)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(150)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    said = [(out / f"said{r}").read_text() for r in range(world)]
    assert codes == [0] * world, said
    return said


TWO = ("trainer.batch_size=1", "trainer.devices=2", "trainer.strategy=ddp")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


def test_two_processes_choose_as_one(store: Store, tmp_path: Path) -> None:
    """Where nothing is trained the first process answers, and the other waits for it."""
    asked = {"candidates": "auto"}
    go(words(store, tmp_path / "two", "classification", *TWO, **asked), tmp_path / "out2", 2)
    go(words(store, tmp_path / "one", "classification", "trainer.batch_size=2", **asked), tmp_path / "out1", 1)
    one, two = ((tmp_path / name / "fold1" / "choice.json").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("task", ["classification", pytest.param("segmentation", marks=pytest.mark.slow)])
def test_two_processes_equal_one(task: str, store: Store, tmp_path: Path) -> None:
    said = go(words(store, tmp_path / "two", task, *TWO), tmp_path / "out2", 2)
    go(words(store, tmp_path / "one", task, "trainer.batch_size=2"), tmp_path / "out1", 1)
    for fold in ("fold0", "fold1"):
        one, two = (load_file(tmp_path / name / fold / MEMBER) for name in ("one", "two"))
        assert list(one) == list(two)
        for name, value in one.items():
            if name.endswith("0.bias"):  # before an instance norm: its gradient is rounding noise, which Adam blows up
                continue
            # Single weights whose gradient is next to nothing go the other way: a step of Adam knows its sign only.
            assert (value - two[name]).abs().mean() < 3e-5, name
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    key = "dice" if task == "segmentation" else "answer"
    for one, two in zip(found[0]["cases"], found[1]["cases"], strict=True):
        assert one["subject"] == two["subject"] and one[key] == pytest.approx(two[key], abs=0.01)
    plans = [json.loads((tmp_path / "out2" / f"plan{rank}").read_text()) for rank in (0, 1)]
    assert plans[0] == plans[1] and plans[0]["budget_gb"] == 16.0, "the first process plans for all"
    assert [f["provenance"]["samples"] for f in found] == [16, 16], "two folds of four steps of two samples"
    assert json.loads(read_checkpoint(tmp_path / "two" / "fold0" / CHECKPOINT)["state"])["step"] == 4
    assert "training 1 of 2" in said[0] and "model: " in said[0], "the first process speaks, the other does not"
    assert "training 1 of 2" not in said[1] and "model: " not in said[1] and "Traceback" not in said[1]


@pytest.mark.slow
def test_two_processes_try_a_decoder_and_decide_alike(store: Store, tmp_path: Path) -> None:
    origin = backbone_file(tmp_path / "backbone.safetensors", store)
    given = dict(word.split("=", 1) for word in words(store, tmp_path / "run", "segmentation", *TWO))
    given |= {"backbone_from": str(origin), "adapt.trial_steps": "2"}
    said = go([f"{key}={value}" for key, value in given.items()], tmp_path / "out", 2)
    for fold in ("fold0", "fold1"):
        trial = json.loads((tmp_path / "run" / fold / "decoder.json").read_text())
        taken = "head.weight" in load_file(tmp_path / "run" / fold / MEMBER)
        assert trial["taken"] == taken and trial["subjects"] == 4 and trial["steps"] == 8
        assert not (tmp_path / "run" / fold / "trial").exists()
    assert said[0].count("trial of the decoder on inner folds") == 2 and "trial of the decoder" not in said[1]
