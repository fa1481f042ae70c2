"""Where the processes of a run come from, and how a run is handed to a queue."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.errors import ConfigError, TrainingError
from brainfm.settings import narrowed
from brainfm.training.loop import CHECKPOINT
from brainfm.training.processes import check_processes
from brainfm.training.settings import PretrainSettings, TrainerSettings
from brainfm.verbs.compose import options, resolve
from brainfm.verbs.launch import place, submit
from brainfm.verbs.pretrain import train
from tests.training.test_ddp import TWO, Ranks, equal, saved_step, weights, words

TRAINER = TrainerSettings(accelerator="cpu", precision="32-true")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had started this process."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)


def refused(**values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check_processes(replace(TRAINER, **values))
    return str(error.value)


def test_devices_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "trainer.devices=4: found 1 GPU here" in refused(accelerator="gpu", devices=4)
    assert check_processes(replace(TRAINER, accelerator="auto", devices="auto")) == (1, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert check_processes(replace(TRAINER, accelerator="auto", devices="auto")) == (8, 1)
    assert check_processes(replace(TRAINER, devices=3)) == (3, 1), "processes on a CPU are not counted"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"devices": 0}, "trainer.devices=0: expected a whole number from 1"),
        ({"num_nodes": 0}, "trainer.num_nodes=0: expected"),
        ({"num_nodes": 2}, "nobody started the processes of the other nodes"),
    ],
)
def test_values_that_cannot_be(values: dict, said: str) -> None:
    assert said in refused(**values)


def test_started_processes_and_trainer_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    with monkeypatch.context() as torchrun:
        for name, value in environment.items():
            torchrun.setenv(name, value)
        assert "torchrun started 8 processes, 4 a node" in refused()
        assert "expected trainer.devices=4 trainer.num_nodes=2" in refused(devices=8)
        assert check_processes(replace(TRAINER, devices=4, num_nodes=2)) == (4, 2)
    monkeypatch.setenv("SLURM_NTASKS", "6")
    assert "--ntasks=6: expected --nodes and --ntasks-per-node" in refused(devices=6)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
    assert "SLURM started 6 processes, 3 a node" in refused(devices=6)
    assert check_processes(replace(TRAINER, devices=3, num_nodes=2)) == (3, 2)
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert check_processes(TRAINER) == (1, 1), "a shell on a node, not a task"


def test_lost_process_is_a_sentence_and_other_errors_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from brainfm.training import pretrain

    settings = resolve("pretrain", ["store=s", "run=r"])
    for text, kind, said in (
        ("[gloo/pair.cc:534] Connection closed by peer [::1]:1", TrainingError, "another process of this run has end"),
        ("CUDA out of memory", RuntimeError, "CUDA out of memory"),
    ):
        monkeypatch.setattr(pretrain, "pretrain", Mock(side_effect=RuntimeError(text)))
        with pytest.raises(kind, match=said):
            train(settings)


def test_place_gives_the_trainer_what_the_queue_gives() -> None:
    slurm = resolve("pretrain", ["store=s", "run=r", "launch=slurm"]).launch
    trainer, nodes, tasks = place(TRAINER, replace(slurm, nodes=2, gpus_per_node=4))
    assert (trainer.devices, trainer.num_nodes, nodes, tasks) == (4, 2, 2, 4)
    assert place(TRAINER, replace(slurm, gpus_per_node=0, tasks_per_node=3))[2] == 3
    with pytest.raises(ConfigError, match=r"trainer\.devices=2 with launch\.gpus_per_node=4"):
        place(replace(TRAINER, devices=2), replace(slurm, gpus_per_node=4))


def test_every_launch_composes_and_changes_no_run(toy_store: Store) -> None:
    from brainfm.training.run import identity_of

    made = []
    for option in options("launch"):
        for verb, more in (("pretrain", []), ("finetune", ["backbone_from=none", "task.target=lesion"])):
            settings = resolve(verb, ["store=s", "run=r", f"launch={option}", *more])
            assert (settings.launch.cluster is None) == (option == "local")
            if verb == "pretrain":
                made.append(identity_of(settings, toy_store))
    assert len(made) == 2 and made[0] == made[1], "a run begun here may go on in a queue"


def test_missing_submitit_or_slurm_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", *words(toy_store.path, tmp_path / "run"), "launch=slurm", "launch.gpus_per_node=0"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert said == "brainfm: launch=slurm needs submitit, which is not installed: pip install 'brainfm-mri[train]'"
    monkeypatch.undo()
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 2
    assert "no srun was found on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_sbatch_script_says_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster of two shell scripts: what reaches sbatch, and what the command says."""
    pytest.importorskip("submitit")
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/script\necho Submitted batch job 4711\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    more = ["launch=slurm", "launch.partition=gpu", "launch.nodes=2", "launch.gpus_per_node=4", "launch.hours=1.5",
            "launch.account=brains", "launch.mem_gb=200", "launch.setup=['module load cuda/12']",
            "launch.additional_parameters={mail-type: END}"]  # fmt: skip
    run = tmp_path / "run"
    assert main(["pretrain", *words(toy_store.path, run), *more]) == 0
    said = capsys.readouterr().out
    assert "job 4711" in said and str(run / "slurm") in said
    script = (tmp_path / "script").read_text()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "time=90", "partition=gpu", "account=brains",
                 "mem=200GB", "cpus-per-task=2", "signal=USR2@300", "requeue", "mail-type=END",
                 "open-mode=append"):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script, line
    assert "module load cuda/12\n" in script and "--kill-on-bad-exit=1" in script
    import submitit

    job = submitit.core.utils.DelayedSubmission.load(next((run / "slurm").glob("4711_submitted.pkl"))).function
    expected = resolve("pretrain", words(toy_store.path, run, "trainer.devices=4", "trainer.num_nodes=2"))
    assert job.work is import_module("brainfm.verbs.pretrain").train
    assert job.settings == narrowed(PretrainSettings, expected)


def tasks_of(controller: int) -> list[int]:
    """The processes that a local job's controller has started."""
    return [int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()]


@pytest.mark.parametrize(("number", "heard"), [(signal.SIGUSR2, 1), (signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_queue_hears_of_its_signal_when_all_is_saved(
    number: int, heard: int, toy_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's listener queues a job again; it must find the checkpoint, and not hear of a cancelled job."""
    from brainfm.data.patches import PretrainPatches
    from brainfm.training.pretrain import pretrain

    run, found, one = tmp_path / "run", [], PretrainPatches.__getitem__

    def signalled(self: PretrainPatches, i: int):
        if i == 5:
            os.kill(os.getpid(), number)
        return one(self, i)

    monkeypatch.setattr(PretrainPatches, "__getitem__", signalled)
    before = signal.signal(number, lambda number, frame: found.append(saved_step(run)))
    try:
        state = pretrain(resolve("pretrain", words(toy_store.path, run, "trainer.batch_size=2")))
    finally:
        signal.signal(number, before)
    assert state.step == saved_step(run) == 3
    assert found == [3] * heard


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the job's processes in /proc")
def test_preempted_job_is_queued_again_and_equals_an_uninterrupted_run(toy_store: Store, tmp_path: Path) -> None:
    """Two tasks on this machine; one gets submitit's signal in the middle, both save, the job comes back and ends."""
    pytest.importorskip("submitit")
    more = ("trainer.batch_size=1", "trainer.max_steps=60", "trainer.checkpoint_every=0")
    run = tmp_path / "run"
    settings = resolve("pretrain", [*words(toy_store.path, run, *more), "launch=slurm", "launch.cluster=local",
                                  "launch.gpus_per_node=0", "launch.tasks_per_node=2"])  # fmt: skip
    job = submit("pretrain", train, narrowed(PretrainSettings, settings), settings.launch)
    deadline = time.time() + 200
    curves = run / "curves.csv"
    while not (curves.exists() and "\n10,total" in curves.read_text()) and not job.done() and time.time() < deadline:
        time.sleep(0.01)
    tasks = tasks_of(job._process.pid)
    assert len(tasks) == 2
    os.kill(tasks[1], signal.SIGUSR2)  # not to the one that puts the job back
    while not (run / CHECKPOINT).exists() and time.time() < deadline:
        time.sleep(0.01)
    stopped_at = saved_step(run)
    while not job.done() and time.time() < deadline:
        time.sleep(0.05)
    log = job.paths.stdout.read_text() + job.paths.stderr.read_text()
    assert 10 <= stopped_at < 60 and "Requeued job" in log, log
    assert job.state == "FINISHED" and job.exception() is None
    assert saved_step(run) == 60 and (run / "backbone.safetensors").exists()
    whole = Ranks(words(toy_store.path, tmp_path / "whole", *more, *TWO[1:]), tmp_path / "out")
    assert whole.codes == [0, 0], whole.said
    assert equal(weights(run), weights(tmp_path / "whole"))
