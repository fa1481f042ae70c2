"""Two processes see together what one sees alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from brainfm.data.store import Store
from brainfm.training.loop import CHECKPOINT, read_checkpoint


def run(store: Store, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    words = [
        f"store={store.path}", f"run={folder}", "backbone=unet_tiny", "objective=mae", "trainer=cpu",
        "trainer.max_steps=6", "trainer.workers=0", "trainer.precision=32-true", "trainer.threads=1",
        "trainer.evaluate_every=0", "data.patch_vox=[16,16,16]", "data.validation=0", "objective.latent_channels=16",
    ]  # fmt: skip
    command = [sys.executable, "-m", "brainfm.cli", "pretrain", *words, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return read_checkpoint(folder / CHECKPOINT)["module"]


def test_two_processes_equal_one(toy_store: Store, tmp_path: Path) -> None:
    """Each rank reads its half of every step: two ranks of one sample make the step of one rank with two."""
    alone = run(toy_store, tmp_path / "one", "trainer.batch_size=2")
    together = run(toy_store, tmp_path / "two", "trainer.batch_size=1", "trainer.devices=2", "trainer.strategy=ddp")
    assert list(alone) == list(together)
    for name, value in alone.items():
        if name.endswith("0.bias"):  # before an instance norm: its gradient is rounding noise, which Adam blows up
            continue
        assert torch.allclose(value, together[name], atol=2e-5), name
