"""Independent random streams.

Every random decision of brainfm is a function of (seed, purpose, index): nothing depends on how many numbers were
drawn before, on the number of workers, or on where a run was interrupted.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _sequence(seed: int, purpose: str, index: tuple[int, ...]) -> np.random.SeedSequence:
    word = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    return np.random.SeedSequence(entropy=seed, spawn_key=(word, *index))


def stream(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A numpy generator that belongs to this purpose and index alone.

    Args:
        seed: the run's seed, >= 0.
        purpose: a word, e.g. ``"corner"``; other purposes give independent streams.
        index: any number of integers >= 0, e.g. the sample's number.
    """
    return np.random.Generator(np.random.PCG64(_sequence(seed, purpose, index)))


def torch_stream(seed: int, purpose: str, *index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The same for torch, on the device where the numbers are needed."""
    import torch

    word = int(_sequence(seed, purpose, index).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(word)


def unit_hash(key: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on the key alone: how a subject is given a side."""
    digest = hashlib.blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
