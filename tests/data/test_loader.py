"""Batches reach the trainer whatever shared memory a container has."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import brainfm
from brainfm.batch import Batch
from brainfm.data import loader as loader_module
from brainfm.data.loader import Collate, StepSampler, make_loader, shared_room
from brainfm.data.patches import Sample, collate
from brainfm.errors import BrainfmWarning, StoreError, TrainingError

EDGE = 32


class Cubes(Dataset):
    """A sample is a cube of 128 kB that holds its number."""

    def __getitem__(self, number: int) -> Sample:
        return Sample(number=number, image=np.full((1, EDGE, EDGE, EDGE), number, np.float32))


class Deadly(Cubes):
    def __getitem__(self, number: int) -> Sample:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class Damaged(Cubes):
    def __getitem__(self, number: int) -> Sample:
        if number == 5:
            raise StoreError("store/t1.b2nd: the file is damaged")
        return super().__getitem__(number)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.sample, b.sample) and a.label is b.label is None


@pytest.mark.parametrize("room", [0, 10 * EDGE**3, float("inf")])
def test_a_batch_without_room_travels_by_value_and_arrives_the_same(room: float) -> None:
    samples = [Cubes()[0], Cubes()[1]]
    sent = Collate(under_way=4, room=lambda: room)(samples)
    assert isinstance(sent, Batch) == (room == float("inf")), "with room it goes through shared memory as ever"
    assert same(ForkingPickler.loads(ForkingPickler.dumps(sent)), collate(samples))


def test_the_room_is_asked_for_at_each_batch() -> None:
    rooms = iter([float("inf"), 0, float("inf")])
    gather = Collate(under_way=1, room=lambda: next(rooms))
    assert [isinstance(gather([Cubes()[0]]), Batch) for _ in range(3)] == [True, False, True]


def test_shared_room_is_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_room() > 0
    monkeypatch.setattr(loader_module, "_SHARED", "/nowhere/at/all")
    assert shared_room() == float("inf"), "a system that keeps it elsewhere"


@pytest.mark.parametrize("trouble", [OSError(errno.EROFS, os.strerror(errno.EROFS)), ImportError("no sem_open")])
def test_without_locks_between_processes_this_one_reads(trouble: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    from brainfm.data import workers

    class NoLocks:
        def Lock(self) -> None:
            raise trouble

    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda kind=None: NoLocks())
    with pytest.warns(BrainfmWarning, match="so the work is done in one process; a container needs a /dev/shm"):
        loader = make_loader(Cubes(), StepSampler(0, 3, 2), workers=2)
    assert loader.num_workers == 0 and len(list(loader)) == 3


def test_a_worker_that_dies_is_told_in_one_sentence() -> None:
    with pytest.raises(TrainingError, match=r"has died \(DataLoader worker .*trainer\.workers=0") as caught:
        list(make_loader(Deadly(), StepSampler(0, 8, 2), workers=1))
    assert "\n" not in str(caught.value)


def test_an_error_of_a_worker_keeps_its_own_sentence() -> None:
    with pytest.raises(StoreError) as caught:
        list(make_loader(Damaged(), StepSampler(0, 8, 2), workers=1))
    assert str(caught.value) == "store/t1.b2nd: the file is damaged"


RUN = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
from tests.data.test_loader import Cubes
from brainfm.data.loader import StepSampler, make_loader
if __name__ == "__main__":
    batches = list(make_loader(Cubes(), StepSampler(0, 12, 8), workers=2))
    print([int(batch.image.sum() / batch.image[0].numel()) for batch in batches])
"""


@pytest.mark.parametrize("mount", ["size=1m", "size=8m", "ro,size=64m"])
def test_small_and_read_only_shared_memory(mount: str, tmp_path: Path) -> None:
    """Batches of 1 MB, two workers: with 1 MB of shared memory there is room for none, with 8 MB for some."""
    (tmp_path / "run.py").write_text(RUN)
    root = Path(brainfm.__file__).parents[1]
    inside = f'mount -t tmpfs -o {mount} tmpfs /dev/shm && exec "$0" "$1" "$2"'
    command = ["unshare", "-rm", "bash", "-c", inside, sys.executable, str(tmp_path / "run.py"), str(root)]
    try:
        probe = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if probe.returncode:
        pytest.skip("no name spaces for mounts here")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str([sum(range(8 * step, 8 * step + 8)) for step in range(12)])
    assert "Traceback" not in run.stderr
    assert ("done in one process" in run.stderr) == mount.startswith("ro")
