"""Where a training runs: in this process and its fellows, or as a job of a SLURM queue.

`submit` puts the very same run into the queue through submitit: when SLURM announces the end of the allotted time (or
takes the nodes away), the loop saves at the end of its step and then lets submitit put the job back into the queue,
where the same command goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from brainfm.errors import ConfigError
from brainfm.extras import missing
from brainfm.training.settings import FinetuneSettings, PretrainSettings, TrainerSettings


@dataclass(frozen=True)
class LaunchSettings:
    """Runs here and now, or puts the run into a queue."""

    cluster: Annotated[Literal["slurm", "local"] | None, "local: a job on this machine, to try it out"] = None
    name: Annotated[str | None, "of the job; null: brainfm-VERB"] = None
    partition: Annotated[str | None, "of the cluster"] = None
    account: Annotated[str | None, "of the cluster"] = None
    qos: Annotated[str | None, "of the cluster"] = None
    constraint: Annotated[str | None, "of the cluster"] = None
    nodes: Annotated[int, "sets trainer.num_nodes"] = 1
    gpus_per_node: Annotated[int, "sets trainer.devices"] = 1
    tasks_per_node: Annotated[int | None, "processes; null: one a GPU"] = None
    cpus_per_task: Annotated[int | None, "null: trainer.workers + 2"] = None
    mem_gb: Annotated[float | None, "a node; null: what the partition gives"] = None
    hours: Annotated[float, "then saved and queued again"] = 24
    signal_delay_s: Annotated[int, "how long before the end the run is told to save"] = 300
    max_num_timeout: Annotated[int, "times it is queued again after running out of time"] = 100
    setup: Annotated[tuple[str, ...], 'shell lines before the run, e.g. ["module load cuda"]'] = ()
    additional_parameters: Annotated[Mapping[str, Any] | None, "of sbatch, e.g. {mail-type: END}"] = None


@dataclass(frozen=True)
class Job:
    """A run as submitit carries it to a node: called on every rank, and called again each time it leaves the queue.

    Attributes:
        work: a function of a module, which trains with the settings.
    """

    work: Callable[[Any], Any]
    settings: PretrainSettings | FinetuneSettings

    def __call__(self) -> None:
        from submitit import JobEnvironment

        place = JobEnvironment()
        if place.cluster == "local" and place.num_tasks > 1:
            os.environ |= {  # what srun would have told Fabric
                "LOCAL_RANK": str(place.local_rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + int(place.job_id) % 40000),
            }
        self.work(self.settings)

    def checkpoint(self) -> Any:
        """What goes back into the queue: the same run. All that has to be kept is in the run's folder."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(
    verb: str, work: Callable[[Any], Any], settings: PretrainSettings | FinetuneSettings, launch: LaunchSettings
) -> Any:
    """Hands a run to SLURM.

    Returns:
        submitit's job; pickles and logs lie in ``RUN/slurm``.

    Raises:
        ConfigError: where submitit or SLURM is missing, or devices are asked for twice.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise missing("submitit", "launch=slurm") from None
    if launch.cluster == "slurm" and shutil.which("srun") is None:
        raise ConfigError(
            "launch=slurm: no srun was found on this machine, expected a login node of a cluster "
            "(launch.cluster=local tries the job here)"
        )
    from brainfm.data.store import Store

    trainer, nodes, tasks = place(settings.trainer, launch)
    Store.open(settings.store)  # a wrong path is told now, not after hours in the queue
    folder = settings.run / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder, cluster=launch.cluster, slurm_max_num_timeout=launch.max_num_timeout)
    shared = {
        "name": launch.name or f"brainfm-{verb}",
        "timeout_min": max(1, round(60 * launch.hours)),
        "nodes": nodes,
        "tasks_per_node": tasks,
        "gpus_per_node": launch.gpus_per_node,
        "cpus_per_task": launch.cpus_per_task or trainer.workers + 2,
        "mem_gb": None if launch.mem_gb is None else float(launch.mem_gb),
    }
    own = {name: getattr(launch, name) for name in ("partition", "account", "qos", "constraint", "signal_delay_s")}
    own |= {
        "setup": list(launch.setup) or None,
        "srun_args": ["--kill-on-bad-exit=1"],  # an error on one rank ends all
        "additional_parameters": {"requeue": True, **(launch.additional_parameters or {})},
    }
    executor.update_parameters(**shared, **{f"slurm_{name}": value for name, value in own.items()})
    return executor.submit(Job(work, replace(settings, trainer=trainer)))


def place(trainer: TrainerSettings, launch: LaunchSettings) -> tuple[TrainerSettings, int, int]:
    """The trainer with the devices that ``launch`` asks for, the nodes, and the processes on each.

    Raises:
        ConfigError: where the trainer asks for others.
    """
    from brainfm.training.processes import from_one

    nodes = from_one("launch.nodes", launch.nodes)
    given = launch.tasks_per_node
    tasks = max(1, launch.gpus_per_node) if given is None else from_one("launch.tasks_per_node", given)
    for key, wanted, source in (("devices", tasks, "gpus_per_node"), ("num_nodes", nodes, "nodes")):
        if getattr(trainer, key) not in (1, "auto", wanted):
            raise ConfigError(
                f"trainer.{key}={getattr(trainer, key)} with launch.{source}={getattr(launch, source)}: expected "
                f"launch.{source} alone, which sets trainer.{key}"
            )
    return replace(trainer, devices=tasks, num_nodes=nodes), nodes, tasks
