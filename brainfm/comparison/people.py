"""People of a comparison: who rates are tried on, who is learned from, who is tested; nobody does two of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from brainfm import seeds
from brainfm.errors import ManifestError


@dataclass(frozen=True)
class People:
    """Keys ``dataset/subject``: for trials of rates, to draw shots from, and to test on."""

    trial: tuple[str, ...]
    pool: tuple[str, ...]
    held: tuple[str, ...]


def dealt(
    sides: Mapping[str, str], salt: str, *, trial: int, pool: int | None = None, held: int | None = None
) -> People:
    """Who does what, by hash: nobody twice.

    Args:
        sides: key -> ``train`` or ``held``; those of trials and of the pool are of the first, the tested of the second.
        salt: of the hash.
        trial: how many rates are tried on.
        pool, held: at most; None: all.
    """
    ordered = sorted(sides, key=lambda key: (seeds.unit_hash(key, salt), key))
    train = [key for key in ordered if sides[key] == "train"]
    away = [key for key in ordered if sides[key] == "held"]
    last = None if pool is None else trial + pool
    return People(tuple(train[:trial]), tuple(train[trial:last]), tuple(away[:held]))


def drawn(pool: Sequence[str], shots: int, seed: int) -> list[str]:
    """The people that a run learns from: those of fewer shots are among those of more."""
    if shots > len(pool):
        raise ManifestError(f"{shots} people to train on are asked for, {len(pool)} are there")
    order = seeds.stream(seed, "evidence shots").permutation(len(pool))
    return [sorted(pool)[place] for place in order[:shots]]
