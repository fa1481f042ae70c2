"""Settings of the probe that watches a pre-training (``probe.``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from brainfm.errors import ConfigError


@dataclass(frozen=True)
class OnlineProbeSpec:
    """How much is asked of the frozen features.

    Raises: ConfigError for impossible values.
    """

    every: Annotated[int, "steps; 0: only at the end"] = 1000
    subjects: Annotated[int, "at most, those with two contrasts first; of all where fewer than 8 are held out"] = 32
    scans: Annotated[int, "of a session at most"] = 4
    patches: Annotated[int, "places in each head, the same for all scans of a subject"] = 2
    levels: Annotated[
        bool, "of every level's map a linear Dice of regions and its rank, on held-out heads (probing/levels.py)"
    ] = True
    untrained: Annotated[bool, "the same questions to the network as it was before any training, as one more part"] = (
        False
    )
    fewshot_every: Annotated[int, "every how many-th probe fine-tunes a copy on two heads, 60 steps; 0: none"] = 5

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"probe.every={self.every}: expected 0 or more steps")
        for key in ("subjects", "scans", "patches"):
            if getattr(self, key) < 1:
                raise ConfigError(f"probe.{key}={getattr(self, key)}: expected 1 or more")
        if self.fewshot_every < 0:
            raise ConfigError(f"probe.fewshot_every={self.fewshot_every}: expected 0 or more probes")
