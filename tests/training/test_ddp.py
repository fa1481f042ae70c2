"""Several processes see together what one sees alone; they stop, fail and go on together."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from brainfm.data.store import Store
from brainfm.training.loop import CHECKPOINT, read_checkpoint

STEPS, EVERY, SUBJECTS = 10, 4, 6
# Children of one clean server that has imported everything: a rank costs no interpreter start.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["brainfm.training.processes", "brainfm.training.pretrain", "brainfm.cli", __name__])


def words(store: Path, folder: Path, *more: str) -> list[str]:
    default = [
        f"store={store}", f"run={folder}", "backbone=unet_tiny", "objective=mae", "trainer=cpu",
        f"trainer.max_steps={STEPS}", f"trainer.checkpoint_every={EVERY}", "trainer.workers=0",
        "trainer.precision=32-true", "trainer.threads=1", "trainer.evaluate_every=0", "data.patch_vox=[16,16,16]",
        "data.validation=0", "objective.latent_channels=16",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return [f"{key}={value}" for key, value in given.items()]


def by_torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def by_srun_on_two_nodes(rank: int, world: int, port: int) -> dict[str, str]:
    """One task on each of ``world`` nodes, as far as the environment can tell."""
    return {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_NTASKS": str(world),
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": str(world), "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "test",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def by_hand(rank: int, world: int, port: int) -> dict[str, str]:
    return {}


def nothing(rank: int, sample: int) -> None:
    """No mischief."""


def kill_all_in_step_7(rank: int, sample: int) -> None:
    if sample == 12 + rank:
        os.kill(os.getpid(), signal.SIGKILL)


def ask_rank_1_to_stop_in_step_6(rank: int, sample: int) -> None:
    if rank == 1 and sample == 11:
        os.kill(os.getpid(), signal.SIGTERM)


def announce_the_end_to_rank_1_in_step_6(rank: int, sample: int) -> None:
    """As a batch script's ``#SBATCH --signal=USR2`` does, where nobody else listens."""
    if rank == 1 and sample == 11:
        os.kill(os.getpid(), signal.SIGUSR2)


def break_rank_1_in_step_6(rank: int, sample: int) -> None:
    if rank == 1 and sample == 11:
        from brainfm.errors import StoreError

        raise StoreError("sample 11 cannot be read")


def kill_rank_0_in_step_6(rank: int, sample: int) -> None:
    if rank == 0 and sample == 10:
        os.kill(os.getpid(), signal.SIGKILL)


def _rank(environment: dict[str, str], arguments: list[str], rank: int, out: Path, mischief: Callable) -> None:
    """One process of a run; writes the sample numbers and subjects that it reads, and what it says, into ``out``."""
    os.environ |= environment
    said = os.open(out / f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    os.dup2(said, 1)
    from brainfm.cli import command
    from brainfm.data.patches import PretrainPatches

    one, block = PretrainPatches.__getitem__, Store.block
    subjects: set[str] = set()

    def watched_block(self: Store, session, *rest, **named):
        subjects.add(session.subject_key)
        return block(self, session, *rest, **named)

    def watched(self: PretrainPatches, i: int):
        if self.foreground_share == 1.0:  # the pictures after the last step
            return one(self, i)
        mischief(rank, i)
        subjects.clear()
        sample = one(self, i)
        (subject,) = subjects
        with (out / f"seen{rank}").open("a") as file:
            file.write(f"{i} {subject}\n")
        return sample

    Store.block, PretrainPatches.__getitem__ = watched_block, watched  # type: ignore[method-assign]
    command(["pretrain", *arguments])


class Ranks:
    """A run of several processes: how they ended, what each read and said."""

    def __init__(
        self, arguments: list[str], out: Path, world: int = 2, by: Callable = by_torchrun, mischief: Callable = nothing
    ) -> None:
        out.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        began = time.monotonic()
        processes = [
            _context.Process(target=_rank, args=(by(rank, world, port), arguments, rank, out, mischief))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.1, 120 - (time.monotonic() - began)))
        hanging = [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for process in processes:
            process.kill()
        self.said = [(out / f"said{rank}").read_text() for rank in range(world)]
        assert not hanging, (hanging, self.said)
        self.codes = [process.exitcode for process in processes]
        self.seen = [
            [(int(line.split()[0]), line.split()[1]) for line in (out / f"seen{rank}").read_text().splitlines()]
            if (out / f"seen{rank}").exists() else []
            for rank in range(world)
        ]  # fmt: skip


TWO = ("trainer.batch_size=1", "trainer.devices=2", "trainer.strategy=ddp")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / CHECKPOINT)["module"]


def saved_step(folder: Path) -> int:
    return json.loads(read_checkpoint(folder / CHECKPOINT)["state"])["step"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def pair(toy_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ranks]:
    """Two processes, never interrupted: the run's folder, and what they read."""
    folder = tmp_path_factory.mktemp("pair")
    ranks = Ranks(words(toy_store.path, folder / "run", *TWO), folder / "out")
    assert ranks.codes == [0, 0], ranks.said
    return folder / "run", ranks


def test_ranks_share_each_epoch_without_overlap(pair: tuple[Path, Ranks]) -> None:
    _, ranks = pair
    assert [i for i, _ in ranks.seen[0]] == list(range(0, 2 * STEPS, 2))
    assert [i for i, _ in ranks.seen[1]] == list(range(1, 2 * STEPS, 2))
    together = sorted(ranks.seen[0] + ranks.seen[1])
    for epoch in range(2 * STEPS // SUBJECTS):
        subjects = Counter(subject for i, subject in together if i // SUBJECTS == epoch)
        assert len(subjects) == SUBJECTS and set(subjects.values()) == {1}


def test_two_processes_equal_one(pair: tuple[Path, Ranks], toy_store: Store, tmp_path: Path) -> None:
    """Each rank reads its half of every step: two ranks of one sample make the step of one rank with two."""
    folder, ranks = pair
    run = tmp_path / "run"
    alone = Ranks(words(toy_store.path, run, "trainer.batch_size=2"), tmp_path / "out", world=1, by=by_hand)
    assert alone.codes == [0], alone.said
    assert alone.seen[0] == sorted(ranks.seen[0] + ranks.seen[1])
    one, two = weights(run), weights(folder)
    assert list(one) == list(two)
    for name, value in one.items():
        if name.endswith("0.bias"):  # before an instance norm: its gradient is rounding noise, which Adam blows up
            continue
        assert torch.allclose(value, two[name], atol=5e-5), name  # steps move weights by 6e-4; Adam magnifies rounding


def test_killed_and_resumed_together_equals_uninterrupted(
    pair: tuple[Path, Ranks], toy_store: Store, tmp_path: Path
) -> None:
    """SIGKILL of both ranks in the third epoch, the last checkpoint being in the middle of the second."""
    folder, whole = pair
    arguments = words(toy_store.path, tmp_path / "run", *TWO)
    killed = Ranks(arguments, tmp_path / "killed", mischief=kill_all_in_step_7)
    assert killed.codes == [-signal.SIGKILL] * 2 and saved_step(tmp_path / "run") == EVERY
    resumed = Ranks(arguments, tmp_path / "resumed")
    assert resumed.codes == [0, 0], resumed.said
    for rank in (0, 1):
        assert killed.seen[rank] == whole.seen[rank][:6]
        assert resumed.seen[rank] == whole.seen[rank][EVERY:], "goes on in the middle of the epoch"
    assert equal(weights(tmp_path / "run"), weights(folder))
    assert (tmp_path / "run" / "curves.csv").read_bytes() == (folder / "curves.csv").read_bytes()


@pytest.mark.parametrize("mischief", [ask_rank_1_to_stop_in_step_6, announce_the_end_to_rank_1_in_step_6])
def test_one_rank_asked_to_stop_stops_all_at_one_step(
    mischief: Callable, pair: tuple[Path, Ranks], toy_store: Store, tmp_path: Path
) -> None:
    folder, _ = pair
    arguments = words(toy_store.path, tmp_path / "run", *TWO)
    stopped = Ranks(arguments, tmp_path / "stopped", mischief=mischief)
    assert stopped.codes == [0, 0], stopped.said
    assert saved_step(tmp_path / "run") == 6 and [len(seen) for seen in stopped.seen] == [6, 6]
    assert "stopped after step 6" in stopped.said[0]
    assert Ranks(arguments, tmp_path / "resumed").codes == [0, 0]
    assert equal(weights(tmp_path / "run"), weights(folder))


@pytest.mark.parametrize(
    ("mischief", "codes", "survivor"), [(break_rank_1_in_step_6, [2, 2], 0), (kill_rank_0_in_step_6, [-9, 2], 1)]
)
def test_error_on_one_rank_ends_all(
    mischief: Callable, codes: list[int], survivor: int, toy_store: Store, tmp_path: Path
) -> None:
    ranks = Ranks(words(toy_store.path, tmp_path / "run", *TWO), tmp_path / "out", mischief=mischief)
    assert ranks.codes == codes, ranks.said
    if codes[1 - survivor] == 2:
        assert "brainfm: sample 11 cannot be read" in ranks.said[1 - survivor]
    last = ranks.said[survivor].strip().splitlines()[-1]
    assert last.startswith("brainfm: ") and "another process of this run has ended" in last
    assert "Traceback" not in "".join(ranks.said)
    assert saved_step(tmp_path / "run") == EVERY, "the last checkpoint stays"


def test_only_the_first_rank_speaks(pair: tuple[Path, Ranks]) -> None:
    _, ranks = pair
    assert "parameters in pre-training" in ranks.said[0] and f"{STEPS} steps" in ranks.said[0]
    assert not [line for line in ranks.said[1].splitlines() if "Initializing distributed" not in line and line.strip()]


def test_slurm_on_two_nodes(pair: tuple[Path, Ranks], toy_store: Store, tmp_path: Path) -> None:
    more = ("trainer.batch_size=1", "trainer.num_nodes=2")
    ranks = Ranks(words(toy_store.path, tmp_path / "run", *more), tmp_path / "out", by=by_srun_on_two_nodes)
    assert ranks.codes == [0, 0], ranks.said
    assert ranks.seen == pair[1].seen and equal(weights(tmp_path / "run"), weights(pair[0]))


@pytest.mark.parametrize("start", [pytest.param("torchrun", marks=pytest.mark.slow), "the command itself"])
def test_real_starters(start: str, pair: tuple[Path, Ranks], toy_store: Store, tmp_path: Path) -> None:
    """torchrun, and the processes that the first one starts, through the command line."""
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if start == "torchrun" else []
    command = [sys.executable, *before, "-m", "brainfm.cli", "pretrain", *words(toy_store.path, tmp_path / "run", *TWO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert equal(weights(tmp_path / "run"), weights(pair[0]))


def test_torchrun_and_trainer_must_agree(toy_store: Store, tmp_path: Path) -> None:
    ranks = Ranks(words(toy_store.path, tmp_path / "run"), tmp_path / "out")
    assert ranks.codes == [2, 2]
    assert "torchrun started 2 processes" in ranks.said[0] and "expected trainer.devices=2" in ranks.said[0]
