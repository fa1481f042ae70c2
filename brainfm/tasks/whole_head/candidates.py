"""Candidates for an answer for a whole head: closed-form models against each other and against the tuned network.

Every candidate answers subjects that it was not fitted on, in inner folds of the training side; these answers alone
choose, and the cases that are scored are never seen here. Where one candidate is not better than a simpler one by more
than a standard error of their paired difference, the simpler one is taken. None is taken that does worse than the mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from brainfm.scoring.folds import folds_by_answer
from brainfm.specs import TaskSpec
from brainfm.tasks.whole_head.reads import PARTS
from brainfm.tasks.whole_head.sorts import decode_logits, linear_head, sort_of

CANDIDATES = ("mean", "volumes", "regions", "measurements", "features", "stacked", "tuned")
"""Simplest first: the training mean or class shares; linear on volumes of a label map; linear on volumes of the regions
that the backbone's own decoder sees; linear on simple measurements of intensities and outline; linear on features of
the frozen network; the best mixture of these; the network with the encoder tuned."""

BLOCKS = ("volumes", "regions", "measurements", "features")  # what is linear, and stacked
_PART = {name: name for name in ("mean", *BLOCKS)} | {"features": "network", "tuned": "network"}
_FOLDS = 5
_TELLING = 5  # subjects, before a difference between candidates is believed
_STEP = 0.1  # of the shares of a mixture
_FEW = 20  # subjects below which volumes are those of tissues alone: more numbers cost more than they tell
_FLOOR = 0.1  # of the median deviation of features: the least that one is divided by


@dataclass(frozen=True)
class Fitted:
    """A linear model of numbers as they are: logits [N, T'] of x [N, F]; an unknown number counts as the mean."""

    mean: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    bias: np.ndarray

    def logits(self, x: np.ndarray) -> np.ndarray:
        return bent(np.nan_to_num((x - self.mean) / self.scale)) @ self.weight.T + self.bias


@dataclass(frozen=True)
class Side:
    """The training side of a fold.

    Attributes:
        spec: a classification or regression.
        answers: [N, T], NaN where unknown.
        groups: [N] subjects.
        blocks: name (of BLOCKS) -> [N, F] numbers, NaN where one is unknown.
        names: of the numbers of a block, where they have names.
        mean, std: of a regression's values; logits are standardised values.
        balanced: whether every class counts alike.
        seed: of the folds.
    """

    spec: TaskSpec
    answers: np.ndarray
    groups: tuple[str, ...]
    blocks: Mapping[str, np.ndarray]
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    mean: float = 0.0
    std: float = 1.0
    balanced: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Chosen:
    """What inner folds say.

    Attributes:
        name: of the candidate that is shipped.
        fallback: of the one that answers where a case has no label map; needs none.
        mixes: candidate -> share of each of PARTS.
        losses: candidate -> mean inner loss: absolute error in the unit, or balanced log loss. Of ``tuned`` over the
            inner cases that it was not trained on, of the others over the whole training side.
        inner: the same over these inner cases alone; empty without a tuned network.
        models: block -> the model fitted to the whole side.
        prior: [T'] logits of the mean.
        said: sentences about the choice.
    """

    name: str
    fallback: str
    mixes: Mapping[str, np.ndarray]
    losses: Mapping[str, float]
    inner: Mapping[str, float]
    models: Mapping[str, Fitted]
    prior: np.ndarray
    said: tuple[str, ...] = ()


@dataclass(frozen=True)
class TunedAnswers:
    """What a tuned network answers for the inner cases: places [n] in the side, logits [n, T']."""

    places: np.ndarray
    logits: np.ndarray


def bent(z: np.ndarray) -> np.ndarray:
    """As nets.heads.Standardise bends what lies far off."""
    return 5.0 * np.arcsinh(z / 5.0)


def fit(side: Side, block: str, rows: np.ndarray) -> Fitted:
    """A linear model of a block, on these rows [n] of the side; its penalty is chosen among their subjects."""
    x, groups = side.blocks[block][rows], [side.groups[r] for r in rows]
    kept = _kept(side, block)
    x = x[:, kept]
    mean = _mean_of_known(x)
    x = np.where(np.isfinite(x), x, mean)
    std = x.std(axis=0)
    floor = np.maximum(1e-3 * np.abs(mean), 1e-6) if block == "measurements" else _FLOOR * float(np.median(std))
    scale = np.maximum(std, np.maximum(floor, 1e-6))
    weight, bias = linear_head(
        bent((x - mean) / scale), side.answers[rows], side.spec, side.mean, side.std, side.balanced, groups, side.seed
    )
    return _on_all(Fitted(mean, scale, weight, bias), kept)


def _mean_of_known(x: np.ndarray) -> np.ndarray:
    """[F] means of what is known; 0 of what is never known."""
    known = np.isfinite(x)
    if known.all():
        return x.mean(axis=0)
    return np.where(known, x, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)


def _kept(side: Side, block: str) -> np.ndarray:
    """[F] bool: with few subjects, of named volumes the tissues and the total alone."""
    width, names = side.blocks[block].shape[1], side.names.get(block, ())
    few = np.array([name.startswith("tissue/") or name == "total" for name in names], dtype=bool)
    if len(set(side.groups)) >= _FEW or few.sum() < 2:
        return np.ones(width, dtype=bool)
    return few


def _on_all(model: Fitted, kept: np.ndarray) -> Fitted:
    """The model with weight 0 for the numbers that were not looked at."""
    mean, scale = np.zeros(len(kept)), np.ones(len(kept))
    weight = np.zeros((len(model.weight), len(kept)))
    mean[kept], scale[kept], weight[:, kept] = model.mean, model.scale, model.weight
    return Fitted(mean, scale, weight, model.bias)


def prior(side: Side, rows: np.ndarray) -> np.ndarray:
    """[T'] logits that know nothing but these rows' answers: their mean, or the classes' shares, equal if balanced."""
    return sort_of(side.spec).prior(side.answers[rows], side.spec, side.balanced, side.mean, side.std)


def inner_folds(side: Side, first: Sequence[str] = ()) -> list[np.ndarray]:
    """[N] bool for each inner fold: the rows that it holds out, by subject; together all rows.

    Args:
        first: subjects that are a fold of their own, because a network was trained on the others.
    """
    y = np.nan_to_num(side.answers[:, 0], nan=-1.0)
    rest = [row for row, group in enumerate(side.groups) if group not in set(first)]
    count = min(_FOLDS - bool(first), len({side.groups[row] for row in rest}))
    dealt = folds_by_answer([side.groups[row] for row in rest], y[rest], count, side.seed) if rest else []
    return [np.isin(side.groups, fold) for fold in ([list(first)] if first else []) + dealt]


def case_losses(side: Side, logits: np.ndarray) -> np.ndarray:
    """[N]: the absolute error, or minus the log of the probability of what is so; balanced where the side is."""
    spec, y = side.spec, side.answers
    answer = decode_logits(spec, torch.from_numpy(logits), side.mean, side.std).numpy()
    return sort_of(spec).losses(y, answer, spec, side.balanced)


def out_of_fold(side: Side, folds: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """``mean`` and each block -> [N, T'] logits from models that have seen none of a row's subject."""
    found = {name: np.zeros((len(side.answers), len(prior(side, _rows(~folds[0]))))) for name in ("mean", *side.blocks)}
    for away in folds:
        rows = _rows(~away)
        found["mean"][away] = prior(side, rows)
        for block in side.blocks:
            found[block][away] = fit(side, block, rows).logits(side.blocks[block][away])
    return found


def shares(side: Side, logits: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Shares of the blocks in the mixture of least loss over these rows: not negative, of sum 1, on a grid.

    Args:
        logits: [N, T'] of each block, out of fold.

    Source: Breiman 1996 (Machine Learning 24:49): stacked regressions are worth it where no weight is negative; van der
        Laan et al. 2007 (Super Learner) for stacking answers out of fold.
    """
    steps = round(1 / _STEP)
    grid = [g for g in itertools.product(range(steps + 1), repeat=len(logits)) if sum(g) == steps]
    losses = [case_losses(side, sum(s / steps * z for s, z in zip(g, logits)))[rows].mean() for g in grid]  # type: ignore[arg-type]
    return np.array(grid[int(np.argmin(losses))]) / steps


def simplest(losses: Mapping[str, np.ndarray], groups: Sequence[str]) -> str:
    """The first of the candidates, in the order of CANDIDATES, that is within one standard error of the best.

    Args:
        losses: candidate -> [N] of the same cases.
        groups: [N] subjects: the standard error is that of the mean over subjects of the paired difference.
    """
    best = min(losses, key=lambda name: (losses[name].mean(), CANDIDATES.index(name)))
    for name in sorted(losses, key=CANDIDATES.index):
        difference = losses[name] - losses[best]
        if name == best or difference.mean() <= standard_error(difference, groups):
            return name
    return best


def standard_error(values: np.ndarray, groups: Sequence[str]) -> float:
    """Of the mean of values [N], whose subjects are independent; infinite where these are too few to tell."""
    if len(set(groups)) < _TELLING:
        return np.inf
    _, place = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(place, weights=values - values.mean())
    count = len(sums)
    return float(np.sqrt(count / max(count - 1, 1) * (sums**2).sum()) / len(values))


def choose(
    side: Side, asked: Sequence[str], folds: Sequence[np.ndarray], mapped: bool, tuned: TunedAnswers | None = None
) -> Chosen:
    """Fits every candidate and chooses among those that may be shipped.

    Args:
        asked: candidates, of CANDIDATES.
        folds: of `inner_folds`.
        mapped: whether volumes can be had of a new case, from its label map; else they are not chosen.
        tuned: of the tuned network, None where it is not asked.
    """
    rows = np.arange(len(side.answers))
    if len(folds) < 2:
        return _unchosen(side)
    parts = out_of_fold(side, folds)
    mixable = [block for block in side.blocks if mapped or block != "volumes"]
    logits, mixes = {"mean": parts["mean"]}, {"mean": _mix(mean=1.0)}
    for block in side.blocks:
        if block in asked:
            logits[block], mixes[block] = parts[block], _mix(**{_PART[block]: 1.0})
    if "stacked" in asked and len(mixable) > 1:
        own = [parts[block] for block in mixable]
        logits["stacked"] = _stacked_out_of_fold(side, own, folds)
        whole = shares(side, own, rows)
        mixes["stacked"] = _mix(**{_PART[block]: float(share) for block, share in zip(mixable, whole)})
    losses = {name: case_losses(side, z) for name, z in logits.items()}
    legal = [name for name in losses if _legal(name, mapped)]
    name, said = _best(losses, legal, side.groups), []
    map_free = [n for n in legal if not _reads_map(mixes[n])]
    fallback = _best(losses, map_free, side.groups) if _reads_map(mixes[name]) else name
    if "volumes" in losses and not mapped:
        said.append("volumes come from a table that has no row of a new case: shown, and not chosen")
    inner: dict[str, float] = {}
    if "tuned" in asked and tuned is None:
        said.append("too few training subjects to keep some to choose on: the tuned network is no candidate")
    if tuned is not None:
        mixes["tuned"] = _mix(network=1.0)
        name, fallback, inner = _against_tuned(side, losses, name, fallback, mixes, tuned)
    return Chosen(
        name, fallback, mixes, {n: float(v.mean()) for n, v in losses.items()} | _only(inner, "tuned"), inner,
        {block: fit(side, block, rows) for block in side.blocks}, prior(side, rows), tuple(said),
    )  # fmt: skip


def _against_tuned(
    side: Side,
    losses: Mapping[str, np.ndarray],
    name: str,
    fallback: str,
    mixes: Mapping[str, np.ndarray],
    tuned: TunedAnswers,
) -> tuple[str, str, dict[str, float]]:
    """Choice, fallback and inner losses once the tuned network is a candidate, on the cases it was not trained on."""
    logits = np.zeros((len(side.answers), tuned.logits.shape[1]))
    logits[tuned.places] = tuned.logits
    own = {n: v[tuned.places] for n, v in losses.items()}
    own["tuned"] = case_losses(side, logits)[tuned.places]
    groups = [side.groups[place] for place in tuned.places]
    frozen = bool(mixes[name][PARTS.index("network")] or mixes[name][PARTS.index("regions")])

    def beats(other: str) -> bool:
        pair = {other: own[other], "tuned": own["tuned"], "mean": own["mean"]}
        return _best(pair, list(pair), groups) == "tuned"

    if beats(name):
        name = fallback = "tuned"
    elif _reads_map(mixes[name]) and not frozen and beats(fallback):
        fallback = "tuned"  # else the member would need two encoders
    return name, fallback, {n: float(v.mean()) for n, v in own.items()}


def _best(losses: Mapping[str, np.ndarray], names: Sequence[str], groups: Sequence[str]) -> str:
    """The simplest of those that are good enough, and of those not worse than the mean; else the mean."""
    floor = losses["mean"].mean()
    fit_to_ship = {name: losses[name] for name in names if name != "mean" and losses[name].mean() <= floor}
    return simplest(fit_to_ship, groups) if fit_to_ship else "mean"


def _stacked_out_of_fold(side: Side, logits: Sequence[np.ndarray], folds: Sequence[np.ndarray]) -> np.ndarray:
    """[N, T']: each fold mixed by the shares that the other folds choose."""
    found = np.zeros_like(logits[0])
    for away in folds:
        chosen = shares(side, logits, _rows(~away))
        found[away] = sum(s * z[away] for s, z in zip(chosen, logits))
    return found


def _unchosen(side: Side) -> Chosen:
    """With one subject nothing can be held out."""
    rows = np.arange(len(side.answers))
    said = ("one training subject: nothing can be held out among the training cases, the mean is shipped",)
    return Chosen("mean", "mean", {"mean": _mix(mean=1.0)}, {}, {}, {}, prior(side, rows), said)


def _legal(name: str, mapped: bool) -> bool:
    return name != "volumes" or mapped


def _reads_map(mix: np.ndarray) -> bool:
    return bool(mix[PARTS.index("volumes")])


def _mix(**parts: float) -> np.ndarray:
    return np.array([parts.get(name, 0.0) for name in PARTS])


def _only(values: Mapping[str, float], name: str) -> dict[str, float]:
    return {name: values[name]} if name in values else {}


def _rows(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(mask)
