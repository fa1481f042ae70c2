"""The processes of a run: started by this command, by torchrun, or by SLURM; and what is said where one is lost.

Started by hand, the first process starts one more for every further device. Under ``torchrun`` and ``srun`` they are
all there already, and Fabric reads rank and address from the environment.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.plugins.environments import LightningEnvironment

from brainfm.errors import ConfigError, TrainingError
from brainfm.nets.cpu import keep_freed_memory
from brainfm.progress import speak
from brainfm.training.settings import TrainerSettings

_LOST = ("closed by peer", "Connection reset", "Broken pipe", "remote process has exited", "Timed out waiting")
_WATCH_S = 2.0  # how often a process looks whether the one that started it is still there


class _Mixed(MixedPrecision):
    """bfloat16 under autocast, and batches as they came.

    Fabric's own rounds every floating-point tensor that goes into the step, targets too: an age of 73.4 years would be
    learnt as 73.5, and what the host is told of a sample (voxel sizes, shares) could not become numpy any more.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def make_fabric(trainer: TrainerSettings) -> Fabric:
    """Fabric as ``trainer`` says, whose ``auto`` is settled (training/speed.py); starts or joins the processes.

    Raises:
        ConfigError: where the devices are not there, or torchrun or SLURM started another number of processes.
    """
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU was found; use trainer=cpu or trainer=auto")
    devices, nodes = check_processes(trainer)
    torch.set_float32_matmul_precision("high")
    half = trainer.precision == "bf16-mixed"
    autocast_on = "cpu" if trainer.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"
    try:
        fabric = Fabric(
            accelerator=trainer.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else trainer.strategy,
            precision=None if half else trainer.precision,  # type: ignore[arg-type]
            plugins=_Mixed("bf16-mixed", autocast_on) if half else None,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"trainer: {str(error).strip().splitlines()[0]}") from None
    by_fabric = isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment)
    if by_fabric and os.environ.get("LOCAL_RANK", "0") != "0":
        _end_with_parent()
    fabric.launch()
    speak(fabric.is_global_zero)
    if trainer.threads:  # after the launch, which shares out the cores as it sees fit
        torch.set_num_threads(trainer.threads)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def check_processes(trainer: TrainerSettings) -> tuple[int, int]:
    """(devices a node, nodes), found to agree with the machine and with who started this process.

    Raises:
        ConfigError: saying what was found, and what to write.
    """
    gpus = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu") and torch.cuda.is_available() else 0
    devices = from_one("trainer.devices", gpus or 1 if trainer.devices == "auto" else trainer.devices)
    nodes = from_one("trainer.num_nodes", trainer.num_nodes)
    if gpus and devices > gpus:
        raise ConfigError(f"trainer.devices={devices}: found {gpus} GPU{'s' * (gpus > 1)} here, expected no more")
    there = _started()
    if there is not None and (there.processes != devices * nodes or there.a_node not in (None, devices)):
        per_node = there.a_node or max(1, there.processes // nodes)
        raise ConfigError(
            f"{there.by} started {there.processes} processes, {per_node} a node, found trainer.devices={devices} "
            f"trainer.num_nodes={nodes}: expected trainer.devices={per_node} "
            f"trainer.num_nodes={max(1, there.processes // per_node)}"
        )
    if there is None and nodes > 1 and "LOCAL_RANK" not in os.environ and "MASTER_ADDR" not in os.environ:
        raise ConfigError(
            f"trainer.num_nodes={nodes}: nobody started the processes of the other nodes; "
            "use torchrun on every node, srun, or launch=slurm"
        )
    return devices, nodes


@dataclass(frozen=True)
class _Started:
    """Who started the processes of this run, how many, and how many on each node (None: not known)."""

    by: str
    processes: int
    a_node: int | None


def _started() -> _Started | None:
    seen = os.environ
    if "TORCHELASTIC_RUN_ID" in seen:
        local = seen.get("LOCAL_WORLD_SIZE")
        return _Started("torchrun", int(seen["WORLD_SIZE"]), int(local) if local else None)
    if "SLURM_NTASKS" in seen and seen.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks, a_node = int(seen["SLURM_NTASKS"]), seen.get("SLURM_NTASKS_PER_NODE")
        if a_node is None and tasks > 1:
            raise ConfigError(f"SLURM was asked for --ntasks={tasks}: expected --nodes and --ntasks-per-node instead")
        return _Started("SLURM", tasks, int(a_node) if a_node else None)
    return None


def from_one(key: str, value: int) -> int:
    """Raises: ConfigError for a number below 1."""
    if value < 1:
        raise ConfigError(f"{key}={value}: expected a whole number from 1")
    return value


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: it may hang in a collective and would keep its GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


@contextmanager
def fellows(run: Path) -> Iterator[None]:
    """While open, an error that says that another process of the run is gone becomes one sentence.

    Raises:
        TrainingError: then; that process's own message says why it ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise TrainingError(
            f"{run}: another process of this run has ended or does not answer, so this one stops; the last checkpoint "
            "is kept"
        ) from None
