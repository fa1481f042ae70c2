"""A finished fine-tuning as its page reads it: what results.json says, and the scans it is about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError
from brainfm.specs import TaskSpec
from brainfm.tasks.bundle import Bundle, read_bundle
from brainfm.tasks.registry import kind_of

RESULTS = "results.json"
_SHOWN_FIRST = ("flair", "dwi", "t2", "t1c", "t1")  # the contrast a case is shown on, where it has it


@dataclass(frozen=True)
class FinishedRun:
    """A finished fine-tuning.

    Attributes:
        folder: of the run.
        found: what results.json holds.
        spec: the task.
        store: the prepared scans.
        bundle: what the run ships; None where it left none.
    """

    folder: Path
    found: Mapping[str, Any]
    spec: TaskSpec
    store: Store
    bundle: Bundle | None

    @classmethod
    def read(cls, folder: Path, store: str | Path | None = None) -> FinishedRun:
        """The run in a folder; ``store`` says where the scans are now, None: where they were then.

        Raises:
            ConfigError: where the folder holds no finished fine-tuning.
        """
        found = _results(folder / RESULTS)
        opened = Store.open(store or found["store"])
        bundle = read_bundle(folder / "bundle") if (folder / "bundle").is_dir() else None
        return cls(folder, found, TaskSpec.from_dict(found["task"]), opened, bundle)

    def entry(self, row: Mapping[str, Any]) -> SessionEntry:
        """The session that a case is of. Raises: ConfigError where the store has none."""
        key = (row["dataset"], row["subject"], row["session"])
        entry = next((s for s in self.store.sessions if s.key == key), None)
        if entry is None:
            raise ConfigError(
                f"{self.store.path} has no session {'/'.join(key)}; expected the store that the run was made from"
            )
        return entry

    def shown(self, entry: SessionEntry) -> tuple[np.ndarray, str]:
        """The scan that a case is shown on, [X, Y, Z] float32, and its contrast."""
        legal = [scan for scan in entry.scans if scan.contrast in self.spec.contrasts]
        order = {contrast: place for place, contrast in enumerate(_SHOWN_FIRST)}
        scan = min(legal, key=lambda s: order.get(s.contrast, len(order)))
        return self.store.volume(entry, scan.name).astype(np.float32), scan.contrast

    def image(self, entry: SessionEntry) -> tuple[torch.Tensor, torch.Tensor]:
        """What a network is given of a session: image [M, X, Y, Z] and present [M]."""
        image = torch.zeros(len(self.spec.contrasts), *entry.shape)
        present = torch.zeros(len(self.spec.contrasts), dtype=torch.bool)
        for m, contrast in enumerate(self.spec.contrasts):
            name = next((scan.name for scan in entry.scans if scan.contrast == contrast), None)
            if name is not None:
                image[m], present[m] = torch.from_numpy(self.store.volume(entry, name).astype(np.float32)), True
        return image, present

    def label_map(self, entry: SessionEntry, network: Any) -> np.ndarray | None:
        """The label map [X, Y, Z] that a network's answer may be made of."""
        column = kind_of(self.spec.kind).label_column([network])
        there = column is not None and any(label.name == column for label in entry.labels)
        return self.store.volume(entry, column) if there and column is not None else None

    def mask(self, entry: SessionEntry, name: str) -> np.ndarray | None:
        """The label volume [X, Y, Z] of this name, not 0; None where the session has none."""
        return self.store.volume(entry, name) != 0 if any(e.name == name for e in entry.labels) else None


def who(row: Mapping[str, Any]) -> str:
    """Subject and session of a case."""
    return "/".join(p for p in (row["subject"], row["session"]) if p)


def _results(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; expected the folder of a finished brainfm finetune") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); expected what brainfm finetune wrote") from None
    if not isinstance(found, dict) or found.get("format") != 2:
        raise ConfigError(f"{file} is not a result that this brainfm reads")
    return found
