"""Where the processes of a run come from: this command, torchrun, or SLURM; and how a run is handed to SLURM.

Started by hand, the first process starts one more for every further device. Under ``torchrun`` and ``srun`` they are
all there already, and Fabric reads rank and address from the environment. ``submit`` puts the very same run into a
SLURM queue through submitit: when SLURM announces the end of the allotted time (or takes the nodes away), the loop
saves at the end of its step and then lets submitit put the job back into the queue, where the same command goes on.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import LightningEnvironment

from brainfm.data.store import Store
from brainfm.errors import ConfigError, TrainingError
from brainfm.extras import missing
from brainfm.nets.cpu import keep_freed_memory
from brainfm.progress import speak

_STRATEGIES = ("auto", "ddp")
_LOST = ("closed by peer", "Connection reset", "Broken pipe", "remote process has exited", "Timed out waiting")
_WATCH_S = 2.0  # how often a process looks whether the one that started it is still there


# ----------------------------------------------------------------------------------------------------------- processes


def make_fabric(trainer: Mapping[str, Any]) -> Fabric:
    """Fabric as ``trainer`` says: accelerator, devices, num_nodes, strategy, precision; starts or joins the processes.

    Raises:
        ConfigError: where the devices are not there, or torchrun or SLURM started another number of processes.
    """
    precision = str(trainer["precision"])
    if precision not in ("bf16-mixed", "32-true"):
        raise ConfigError(f"trainer.precision={precision}: expected bf16-mixed or 32-true")
    if trainer["accelerator"] == "gpu" and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu: no GPU was found; use trainer=cpu or trainer=auto")
    devices, nodes = check_processes(trainer)
    torch.set_float32_matmul_precision("high")
    try:
        fabric = Fabric(
            accelerator=trainer["accelerator"],
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else str(trainer["strategy"]),
            precision=precision,  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"trainer: {str(error).strip().splitlines()[0]}") from None
    by_fabric = isinstance(getattr(fabric.strategy, "cluster_environment", None), LightningEnvironment)
    if by_fabric and os.environ.get("LOCAL_RANK", "0") != "0":
        _end_with_parent()
    fabric.launch()
    speak(fabric.is_global_zero)
    if trainer.get("threads"):  # after the launch, which shares out the cores as it sees fit
        torch.set_num_threads(int(trainer["threads"]))
    if fabric.device.type == "cpu":
        keep_freed_memory()
    return fabric


def check_processes(trainer: Mapping[str, Any]) -> tuple[int, int]:
    """(devices a node, nodes), found to agree with the machine and with who started this process.

    Raises:
        ConfigError: saying what was found, and what to write.
    """
    strategy = str(trainer["strategy"])
    if strategy not in _STRATEGIES:
        raise ConfigError(f"trainer.strategy={strategy}: expected one of {', '.join(_STRATEGIES)}")
    gpus = torch.cuda.device_count() if trainer["accelerator"] in ("auto", "gpu") and torch.cuda.is_available() else 0
    devices = _whole("trainer.devices", gpus or 1 if trainer["devices"] == "auto" else trainer["devices"])
    nodes = _whole("trainer.num_nodes", trainer["num_nodes"])
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


def _whole(key: str, value: Any) -> int:
    if isinstance(value, bool) or not str(value).isdigit() or int(value) < 1:
        raise ConfigError(f"{key}={value}: expected a whole number from 1")
    return int(value)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone: it may hang in a collective and would keep its GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


# ---------------------------------------------------------------------------------------------------------------- runs


def run(verb: str, config: dict[str, Any]) -> Path | None:
    """Pre-trains or fine-tunes in this process and its fellows.

    Returns:
        What a finished fine-tuning left; else None.

    Raises:
        TrainingError: where another process of the run is gone; its own message says why.
        BrainfmError: whatever the user can mend, in one sentence.
    """
    try:
        if verb == "pretrain":
            from brainfm.training.pretrain import pretrain

            pretrain(config)
            return None
        from brainfm.training.finetune import finetune

        return finetune(config)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _LOST):
            raise
        raise TrainingError(
            f"{config['run']}: another process of this run has ended or does not answer, so this one stops; the last "
            "checkpoint is kept"
        ) from None


@dataclass(frozen=True)
class Job:
    """A run as submitit carries it to a node: called on every rank, and called again each time it leaves the queue."""

    verb: str
    config: dict[str, Any]

    def __call__(self) -> None:
        from submitit import JobEnvironment

        place = JobEnvironment()
        if place.cluster == "local" and place.num_tasks > 1:
            os.environ |= {  # what srun would have told Fabric
                "LOCAL_RANK": str(place.local_rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + int(place.job_id) % 40000),
            }
        run(self.verb, self.config)

    def checkpoint(self) -> Any:
        """What goes back into the queue: the same run. All that has to be kept is in the run's folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(verb: str, config: Mapping[str, Any], launch: Mapping[str, Any]) -> Any:
    """Hands a run to SLURM.

    Args:
        verb: ``pretrain`` or ``finetune``.
        config: the resolved configuration, without ``launch``.
        launch: configs/launch/slurm.yaml.

    Returns:
        submitit's job; pickles and logs lie in ``RUN/slurm``.

    Raises:
        ConfigError: where submitit or SLURM is missing, or devices are asked for twice.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise missing("submitit", "launch=slurm") from None
    cluster = launch["cluster"]
    if cluster not in ("slurm", "local"):
        raise ConfigError(f"launch.cluster={cluster}: expected slurm or local")
    if cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "launch=slurm: no srun was found on this machine, expected a login node of a cluster "
            "(launch.cluster=local tries the job here)"
        )
    trainer, nodes, tasks = place(config["trainer"], launch)
    Store.open(Path(config["store"]))  # a wrong path is told now, not after hours in the queue
    folder = Path(config["run"]) / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=int(launch["max_num_timeout"]))
    shared = {
        "name": launch["name"] or f"brainfm-{verb}",
        "timeout_min": max(1, round(60 * float(launch["hours"]))),
        "nodes": nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": int(launch["gpus_per_node"]),
        "cpus_per_task": int(launch["cpus_per_task"] or int(trainer["workers"]) + 2),
        "mem_gb": None if launch["mem_gb"] is None else float(launch["mem_gb"]),
    }
    own = {name: launch[name] for name in ("partition", "account", "qos", "constraint", "signal_delay_s")}
    own |= {
        "setup": list(launch["setup"]) or None,
        "srun_args": ["--kill-on-bad-exit=1"],  # an error on one rank ends all
        "additional_parameters": {"requeue": True, **(launch["additional_parameters"] or {})},
    }
    executor.update_parameters(**shared, **{f"slurm_{name}": value for name, value in own.items()})
    return executor.submit(Job(verb, {**config, "trainer": trainer}))


def place(trainer: Mapping[str, Any], launch: Mapping[str, Any]) -> tuple[dict[str, Any], int, int]:
    """The trainer with the devices that ``launch`` asks for, the nodes, and the processes on each.

    Raises:
        ConfigError: where the trainer asks for others.
    """
    nodes = _whole("launch.nodes", launch["nodes"])
    given = launch["tasks_per_node"]
    tasks = max(1, int(launch["gpus_per_node"])) if given is None else _whole("launch.tasks_per_node", given)
    for key, wanted, source in (("devices", tasks, "gpus_per_node"), ("num_nodes", nodes, "nodes")):
        if trainer[key] not in (1, "auto", wanted):
            raise ConfigError(
                f"trainer.{key}={trainer[key]} with launch.{source}={launch[source]}: expected launch.{source} alone, "
                f"which sets trainer.{key}"
            )
    return {**trainer, "devices": tasks, "num_nodes": nodes}, nodes, tasks
