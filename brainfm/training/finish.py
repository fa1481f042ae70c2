"""The finished copy of a run under `optim=wsd`: branched off at its last checkpoint, decayed to 0 in its own folder.

The run itself is only read, and may go on meanwhile.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from brainfm.errors import ConfigError
from brainfm.nets.transfer import fingerprint
from brainfm.training.loop import CHECKPOINT, first_difference, read_checkpoint, write_checkpoint

_CURVES = "curves.csv"


@dataclass(frozen=True)
class Finish:
    """A decay, as the identity of the finished copy holds it.

    Attributes:
        steps, shape: of the decay (`optim.Wsd`).
        from_step: of the run, where the copy begins.
        parent: fingerprint of all that was being trained, at that step.
    """

    steps: int
    shape: str
    from_step: int
    parent: str


def branch(
    fabric: Fabric, source: Path, folder: Path, identity: Mapping[str, Any], steps: int, shape: str
) -> tuple[Finish, dict[str, Any]]:
    """The decay of the copy in ``folder``, which begins as a copy of ``source``'s last checkpoint, or goes on.

    Args:
        source: folder of the run; once the copy has begun it is not read any more.
        identity: of the run; the copy's is returned.
        steps, shape: of the decay; those of a copy that was begun must be the same.

    Raises:
        ConfigError: where the run has no checkpoint, was started with other values, or ``folder`` holds another run.
    """
    if source.resolve() == folder.resolve():
        raise ConfigError(f"finish.from={source} is run= itself: give the finished copy another folder")
    if not (folder / CHECKPOINT).exists():
        _begin(fabric, source, folder, identity, steps, shape)
        fabric.barrier()
    there = json.loads(read_checkpoint(folder / CHECKPOINT)["identity"]).get("finish")
    if there is None:
        raise ConfigError(f"{folder} holds a run that is no finished copy: finish.from={source} needs another run=")
    finish = Finish(steps, shape, int(there["from_step"]), str(there["parent"]))
    return finish, _identity(identity, finish)


def _begin(fabric: Fabric, source: Path, folder: Path, identity: Mapping[str, Any], steps: int, shape: str) -> None:
    if not (source / CHECKPOINT).exists():
        raise ConfigError(f"finish.from={source}: found no {CHECKPOINT} there, expected the folder of a run")
    content = read_checkpoint(source / CHECKPOINT)
    differing = first_difference(json.loads(content["identity"]), dict(identity))
    if differing is not None:
        key, old, new = differing
        raise ConfigError(
            f"finish.from={source} holds a run with {key}={old}, found {key}={new}: repeat the run's own command, "
            "with another run= and with finish.from"
        )
    finish = Finish(steps, shape, int(json.loads(content["state"])["step"]), fingerprint(content["module"]))
    if not fabric.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (source / _CURVES).exists():  # rows after the checkpoint are dropped when the copy opens them
        shutil.copyfile(source / _CURVES, folder / _CURVES)
    content["identity"] = json.dumps(_identity(identity, finish), sort_keys=True)
    write_checkpoint(folder / CHECKPOINT, content)


def _identity(identity: Mapping[str, Any], finish: Finish) -> dict[str, Any]:
    return {**identity, "finish": vars(finish)}
