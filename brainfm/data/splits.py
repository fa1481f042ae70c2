"""Which subjects are held out: decided by hashing a subject's key, so that a growing cohort moves nobody."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from brainfm.seeds import unit_hash
from brainfm.specs import ConfigError


def side(dataset: str, subject: str, salt: str, fractions: Mapping[str, float]) -> str:
    """The side of one person, from the key alone: all sessions and scans follow.

    Args:
        dataset, subject: as in the manifest.
        salt: another salt gives another, independent split.
        fractions: of [0, 1) for each side, in order, summing to 1, e.g. ``{"val": 0.1, "train": 0.9}``. Enlarging the
            first side at the cost of the last keeps everybody who was already in the first.

    Raises:
        ConfigError: where the fractions are negative or do not sum to 1.
    """
    if not fractions or any(f < 0 for f in fractions.values()) or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ConfigError(f"fractions {dict(fractions)}: expected shares of 0 or more that sum to 1")
    position = unit_hash(f"{dataset}/{subject}", salt)
    edge = 0.0
    for name, fraction in fractions.items():
        edge += fraction
        if position < edge:
            return name
    return [name for name, fraction in fractions.items() if fraction > 0][-1]  # the sum fell short of 1 by rounding


def holdout(subjects: Iterable[str], fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Subject keys on two sides, each in sorted order.

    A subject's side does not depend on the others, so the held share of a small cohort is only roughly ``fraction``,
    and may be none.

    Returns:
        (train, held).

    Raises:
        ConfigError: where the fraction is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"a held-out fraction of {fraction}: expected 0 or more and less than 1")
    train: list[str] = []
    held: list[str] = []
    for subject in sorted(set(subjects)):
        (held if unit_hash(subject, f"holdout {seed}") < fraction else train).append(subject)
    return train, held


def folds(subjects: Iterable[str], k: int, seed: int) -> list[list[str]]:
    """Subject keys in ``k`` folds whose sizes differ by at most one: ordered by hash, dealt in turn.

    Unlike ``side`` and ``holdout``, balance costs stability: a new subject may move others to another fold.

    Raises:
        ConfigError: where there are fewer subjects than folds, or fewer than two folds.
    """
    unique = sorted(set(subjects), key=lambda s: (unit_hash(s, f"folds {seed}"), s))
    if not 2 <= k <= len(unique):
        raise ConfigError(f"{k} folds of {len(unique)} subjects: expected from 2 folds to one for each subject")
    return [sorted(unique[i::k]) for i in range(k)]
