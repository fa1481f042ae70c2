"""Folds and sides: which subjects are held out, decided by hashing a subject's key and never by a manifest's order.

`side` and `holdout` look at one subject at a time: a growing cohort moves nobody. Folds and few-shot draws of a small
cohort are balanced instead, and then every subject's place depends on the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from brainfm.errors import ConfigError
from brainfm.seeds import unit_hash

_Key = TypeVar("_Key", str, int)
_BINS = 5  # kinds of values that a fold gets its share of


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


def folds(subjects: Iterable[str], k: int, seed: int, fewer: bool = False) -> list[list[str]]:
    """Subject keys in ``k`` folds whose sizes differ by at most one: ordered by hash, dealt in turn.

    Unlike ``side`` and ``holdout``, balance costs stability: a new subject may move others to another fold.

    Args:
        fewer: one fold for each subject, where there are fewer subjects than folds.

    Raises:
        ConfigError: where there are fewer subjects than folds, or fewer than two folds.
    """
    unique = _by_hash(subjects, f"folds {seed}")
    k = min(k, len(unique)) if fewer else k
    if not 2 <= k <= len(unique):
        raise ConfigError(f"{k} folds of {len(unique)} subjects: expected from 2 folds to one for each subject")
    return deal(unique, k)


def deal(ordered: Sequence[_Key], k: int) -> list[list[_Key]]:
    """Subjects, or rows, to ``k`` folds in turn, each fold in sorted order: where their order tells how alike
    they are, each fold gets its share of every kind."""
    return [sorted(ordered[i::k]) for i in range(k)]


def folds_by_answer(groups: Iterable[str], y: Sequence[float] | np.ndarray, k: int, seed: int) -> list[list[str]]:
    """Subjects in ``k`` folds, or as many as there are subjects: each with its share of every class, or of low and high
    values, where a subject counts by the first of its rows.

    Args:
        groups: [N] the subject of each row.
        y: [N] classes, or values.
    """
    first: dict[str, float] = {}
    for group, value in zip(groups, np.asarray(y).tolist()):
        first.setdefault(group, value)
    values = np.array(list(first.values()))
    if len(np.unique(values)) > 2 * _BINS:
        edges = np.quantile(values, np.linspace(0, 1, _BINS + 1)[1:-1])
        values = np.searchsorted(edges, values)
    stratum = dict(zip(first, values.tolist()))
    ordered = sorted(first, key=lambda s: (stratum[s], unit_hash(s, f"linear {seed}"), s))
    return deal(ordered, min(k, len(ordered)))


def fold_of(groups: Sequence[_Key], dealt: Sequence[Sequence[_Key]]) -> np.ndarray:
    """[N]: the number of the fold that each row's subject is in."""
    number = {subject: place for place, fold in enumerate(dealt) for subject in fold}
    return np.array([number[group] for group in groups])


def stratified_folds(
    subjects: Sequence[str],
    k: int,
    seed: int,
    strata: Mapping[str, str] | None = None,
    sites: Mapping[str, str] | None = None,
    apart: bool = False,
) -> list[list[str]]:
    """Subject keys in ``k`` folds, each with its share of every stratum and, as well as that allows, of every site.

    Subjects are dealt stratum by stratum and within it site by site: the folds' numbers of any one stratum differ by
    at most one, and so do their sizes. A stratum with fewer subjects than folds is absent from some of them.

    Args:
        strata: subject key -> class, or bin of the value (see `strata_of`); a subject without one is in a stratum of
            those without.
        sites: subject key -> site; a subject without one belongs to a site of those without.
        apart: keep each site whole in one fold: the largest sites are placed first, each where the fewest subjects
            are, so that sizes are as even as the sites let them be; strata decide between equals only.

    Returns:
        Each fold in sorted order.

    Raises:
        ConfigError: where there are fewer subjects than folds, fewer than two folds, or, with ``apart``, no sites or
            fewer of them than folds.
    """
    unique = _by_hash(subjects, f"stratified folds {seed}")
    if not 2 <= k <= len(unique):
        raise ConfigError(f"{k} folds of {len(unique)} subjects: expected from 2 folds to one for each subject")
    stratum = {s: (strata or {}).get(s, "") for s in unique}
    site = {s: (sites or {}).get(s, "") for s in unique}
    if apart:
        if not sites:
            raise ConfigError("sites that stay on one side need a site for each subject, found none")
        number = len(set(site.values()))
        if number < k:
            raise ConfigError(f"{k} folds of {number} sites that stay on one side: expected at most {number} folds")
        parts = _deal_sites(unique, k, stratum, site)
    else:
        parts = _deal_subjects(unique, k, stratum, site)
    return [sorted(part) for part in parts]


def strata_of(values: Mapping[str, float], bins: int = 5) -> dict[str, str]:
    """The quantile bin of each value, as text, for `stratified_folds` of a regression.

    Args:
        values: subject key -> value; equal values share a bin.
        bins: of equal size where no values are equal; 5 gives quintiles ``q1`` to ``q5``.

    Raises:
        ValueError: where a value is not finite or there is no bin.
    """
    numbers = np.array(list(values.values()), dtype=np.float64)
    if bins < 1 or not np.isfinite(numbers).all():
        raise ValueError(f"expected finite values and one or more bins, found {list(values.values())} and {bins}")
    if numbers.size == 0:
        return {}
    edges = np.quantile(numbers, np.arange(1, bins) / bins)
    return {key: f"q{1 + int(np.searchsorted(edges, value))}" for key, value in values.items()}


def draw_shots(subjects: Sequence[str], shots: int, seed: int, strata: Mapping[str, str] | None = None) -> list[str]:
    """The few subjects that a few-shot run learns from, in sorted order.

    One of each stratum comes first, the strata in random order; then whichever stratum is furthest below its share of
    the cohort. A smaller number of shots therefore draws a subset of what a larger number draws with the same seed.

    Args:
        shots: number of subjects, at least 1.
        strata: as in `stratified_folds`.

    Raises:
        ConfigError: where there are fewer subjects than shots.

    Source: filling up in the order of the largest n / (2 drawn + 1) is the method of Webster / Sainte-Lague.
    """
    purpose = f"shots {seed}"
    waiting: dict[str, list[str]] = defaultdict(list)
    unique = _by_hash(subjects, purpose)
    if not 1 <= shots <= len(unique):
        limit = f"at most the {len(unique)} training subjects" if shots > len(unique) else "1 or more"
        raise ConfigError(f"task.shots={shots}: expected {limit}")
    for subject in unique:
        waiting[(strata or {}).get(subject, "")].append(subject)
    order = _by_hash(waiting, purpose)
    size = {name: len(members) for name, members in waiting.items()}
    drawn = [waiting[name].pop(0) for name in order]
    while len(drawn) < shots:
        left = [name for name in order if waiting[name]]
        name = max(left, key=lambda n: size[n] / (2 * (size[n] - len(waiting[n])) + 1))
        drawn.append(waiting[name].pop(0))
    return sorted(drawn[:shots])


def _by_hash(keys: Iterable[str], salt: str) -> list[str]:
    return sorted(set(keys), key=lambda key: (unit_hash(key, salt), key))


def _deal_subjects(
    subjects: Sequence[str], k: int, stratum: Mapping[str, str], site: Mapping[str, str]
) -> list[list[str]]:
    """One subject after the other, each to the fold that has the fewest like it."""
    parts: list[list[str]] = [[] for _ in range(k)]
    of_site: list[Counter[str]] = [Counter() for _ in range(k)]
    for name in sorted(set(stratum.values())):
        members = [s for s in subjects if stratum[s] == name]
        members.sort(key=lambda s: site[s])  # stable: by hash within a site
        of_stratum, of_cell = [0] * k, [Counter[str]() for _ in range(k)]
        uneven = len(members) - len(members) % k  # from here on not every fold gets one more
        for position, subject in enumerate(members):
            place = site[subject]
            fold = min(
                range(k),
                key=lambda f: (
                    of_stratum[f],
                    len(parts[f]) if position >= uneven else 0,
                    of_site[f][place],
                    of_cell[f][place],
                ),
            )
            parts[fold].append(subject)
            of_stratum[fold] += 1
            of_site[fold][place] += 1
            of_cell[fold][place] += 1
    return parts


def _deal_sites(
    subjects: Sequence[str], k: int, stratum: Mapping[str, str], site: Mapping[str, str]
) -> list[list[str]]:
    """One site after the other, from the largest."""
    members: dict[str, list[str]] = defaultdict(list)
    for subject in subjects:
        members[site[subject]].append(subject)
    parts: list[list[str]] = [[] for _ in range(k)]
    of_stratum: list[Counter[str]] = [Counter() for _ in range(k)]
    for name in sorted(members, key=lambda s: -len(members[s])):  # stable: sites of one size by their first subject
        own = Counter(stratum[s] for s in members[name])
        fold = min(range(k), key=lambda f: (len(parts[f]), sum(own[c] * of_stratum[f][c] for c in own)))
        parts[fold] += members[name]
        of_stratum[fold] += own
    return parts
