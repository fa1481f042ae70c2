"""The evaluator: answers held against what a manifest says, whatever their kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import Any

from brainfm.tasks.answers import Key


class Evaluator(ABC):
    """Scores the answers for the sessions of a manifest.

    Attributes:
        sessions: those whose answers can be scored.
    """

    sessions: Collection[Key]

    @abstractmethod
    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """A row a session, from the folder that `predict_manifest` wrote: the key, what is true, the answer or its
        scores, and ``note`` where it has none.

        Raises: ManifestError where no session was predicted; ScanError, ConfigError for files that cannot be used.
        """

    @abstractmethod
    def summary(self, rows: list[dict[str, Any]], bundle: str, seed: int) -> dict[str, Any]:
        """Scores with their uncertainty, JSON-able: ``target``, ``cases``, ``subjects``, ``without_prediction``,
        ``sessions_without_label`` and ``metrics``, name -> ``mean``, ``low`` and ``high``; and what else is known.

        Args:
            rows: of `rows`.
            bundle: its fingerprint.
            seed: of the bootstrap.
        """
