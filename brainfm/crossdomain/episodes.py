"""Few-shot episodes: a few images of each class to learn from, a few to answer for.

Each episode is a function of (seed, task, number): it depends neither on other episodes nor on a process. Support and
query never share an image.

Source: Woerner & Baumgartner 2024 (arXiv 2408.08058): 5 support and 10 query images a class, 100 episodes, drawn from
    the whole data set; here also with the support from training and validation and the query from the test split.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from brainfm.crossdomain.layout import TaskTarget
from brainfm.errors import ConfigError, DatasetError
from brainfm.files import read_arrays, write_arrays
from brainfm.seeds import stream

_FORMAT = 1


@dataclass(frozen=True)
class Episode:
    """Numbers of images, and what they show.

    Attributes:
        support, query: [S] and [Q] numbers of items.
        support_y, query_y: int64 [S] and [Q] places of classes from 0 on, or [S, L] and [Q, L] labels.
        classes: the places in the task of the classes that take part, ascending; of several labels their columns.
    """

    support: np.ndarray
    query: np.ndarray
    support_y: np.ndarray
    query_y: np.ndarray
    classes: tuple[int, ...]


@dataclass(frozen=True)
class Shots:
    """How episodes are drawn.

    Attributes:
        support: images a class (of several labels at least so many with and without each); or a range, drawn anew for
            each episode.
        query: images a class; 0: every image of the query's pool that is not in the support.
        ways: classes of an episode; None: all.
        count: number of episodes.
    """

    support: int | tuple[int, int] = 5
    query: int = 10
    ways: int | None = None
    count: int = 100


def draw(
    places: np.ndarray, target: TaskTarget, shots: Shots, seed: int, name: str,
    pools: tuple[np.ndarray, np.ndarray] | None = None,
) -> list[Episode]:  # fmt: skip
    """Episodes of a task.

    Args:
        places: [N] places of classes or [N, L] labels, of every item.
        name: of the task, in streams and sentences.
        pools: numbers of the items that support and query are drawn from; None: all, for both.

    Raises:
        DatasetError: where a class has too few images.
        ConfigError: for more ways than classes, or of several labels other than all.
    """
    everything = np.arange(len(places))
    support_pool, query_pool = pools if pools is not None else (everything, everything)
    classes = places.shape[1] if target is TaskTarget.MULTILABEL_CLASSIFICATION else int(places.max()) + 1
    ways = classes if shots.ways is None else shots.ways
    if ways > classes or ways < 2 - (places.ndim == 2) or (ways < classes and places.ndim == 2):
        raise ConfigError(f"ways={ways}: {name} has {classes} classes, expected 2 to {classes}")
    most = shots.support if isinstance(shots.support, int) else shots.support[1]
    _check_pools(places, target, most, shots.query, name, support_pool, query_pool)
    found = []
    for number in range(shots.count):
        rng = stream(seed, f"episode of {name}", number)
        support = shots.support if isinstance(shots.support, int) else int(rng.integers(*shots.support, endpoint=True))
        if places.ndim == 2:
            found.append(_multilabel(rng, places, support, shots.query, support_pool, query_pool, name))
        else:
            taking = np.sort(rng.permutation(classes)[:ways])
            found.append(_exclusive(rng, places, taking, support, shots.query, support_pool, query_pool))
    return found


def _check_pools(
    places: np.ndarray, target: TaskTarget, support: int, query: int, name: str, pool: np.ndarray, other: np.ndarray
) -> None:
    shared = len(np.intersect1d(pool, other)) > 0
    columns = range(places.shape[1]) if places.ndim == 2 else range(int(places.max()) + 1)
    for k in columns:
        for present in (1, 0) if places.ndim == 2 else (1,):
            is_so = (places[:, k] if places.ndim == 2 else places == k) == present
            for rows, needed, side in ((pool, support + query * shared, "support"), (other, max(query, 1), "query")):
                there = int(is_so[rows].sum())
                if there < needed:
                    what = f"{'with' if present else 'without'} label {k}" if places.ndim == 2 else f"of class {k}"
                    raise DatasetError(
                        f"{name}: {there} images {what} for the {side}, expected at least {needed} for {support}-shot "
                        f"episodes with {query} queries"
                    )


def _exclusive(
    rng: np.random.Generator, places: np.ndarray, classes: np.ndarray, support: int, query: int, pool: np.ndarray,
    other: np.ndarray,
) -> Episode:  # fmt: skip
    learnt, asked = [], []
    for place in classes:
        taken = rng.permutation(pool[places[pool] == place])[:support]
        rest = np.setdiff1d(other[places[other] == place], taken, assume_unique=True)
        learnt.append(taken)
        asked.append(np.sort(rng.permutation(rest)[:query]) if query else rest)
    own, theirs = (np.repeat(np.arange(len(classes)), [len(part) for part in side]) for side in (learnt, asked))
    return Episode(np.concatenate(learnt), np.concatenate(asked), own, theirs, tuple(map(int, classes)))


def _multilabel(
    rng: np.random.Generator, places: np.ndarray, support: int, query: int, pool: np.ndarray, other: np.ndarray,
    name: str,
) -> Episode:  # fmt: skip
    learnt = _covering(rng, places, pool, support, name)
    rest = np.setdiff1d(other, learnt)
    asked = _covering(rng, places, rest, query, name) if query else rest
    return Episode(learnt, asked, places[learnt], places[asked], tuple(range(places.shape[1])))


def _covering(rng: np.random.Generator, places: np.ndarray, pool: np.ndarray, least: int, name: str) -> np.ndarray:
    """Few images with at least ``least`` that have each label and as many that have not: taken in a random order while
    they are needed, then given up in another while they are not."""
    order = rng.permutation(pool)
    having = np.stack([places[order], 1 - places[order]], axis=2)  # [N, L, 2]
    short, taken = np.full(having.shape[1:], least), []
    for number, has in enumerate(having):
        if ((has > 0) & (short > 0)).any():
            taken.append(number)
            short = short - has
        if (short <= 0).all():
            break
    if (short > 0).any():
        raise DatasetError(f"{name}: too few images with and without each label for {least} of both")
    for number in rng.permutation(taken):
        if (short + having[number] <= 0).all():
            taken.remove(number)
            short = short + having[number]
    return np.sort(order[taken])


# ---- on disk ---------------------------------------------------------------------------------------------------------


def save_episodes(path: Path, episodes: Sequence[Episode], about: dict[str, object]) -> None:
    """Writes episodes as arrays (.npz without pickles), with a few words about them."""
    arrays: dict[str, np.ndarray] = {"about": np.array(json.dumps({"format": _FORMAT, **about}, sort_keys=True))}
    for name in ("support", "query", "support_y", "query_y"):
        parts = [getattr(episode, name) for episode in episodes]
        arrays[name] = np.concatenate(parts).astype(np.int64)
        arrays[f"{name}_sizes"] = np.array([len(part) for part in parts])
    arrays["classes"] = np.array([episode.classes for episode in episodes])
    write_arrays(path, arrays, compressed=True)


def load_episodes(path: Path) -> tuple[list[Episode], dict[str, object]]:
    """Raises: DatasetError where the file cannot be read."""
    arrays = read_arrays(path, DatasetError, "episodes")
    try:
        about = json.loads(str(arrays["about"]))
        cut = {
            name: np.split(arrays[name], np.cumsum(arrays[f"{name}_sizes"])[:-1])
            for name in ("support", "query", "support_y", "query_y")
        }
        classes = [tuple(map(int, row)) for row in arrays["classes"]]
    except (ValueError, KeyError) as error:
        raise DatasetError(f"{path}: holds no episodes ({error})") from None
    parts = zip(cut["support"], cut["query"], cut["support_y"], cut["query_y"], classes)
    return [Episode(*each) for each in parts], about
