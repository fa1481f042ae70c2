"""Shortcut audit: could the answers come from how a scan was made instead of from what it shows?

Three things are asked of every shortcut (site, scanner, contrast set, voxel size, place of the head, air around it,
outline of the mask, and any column one names): how well it tells the label by itself, how much of the model's answers
it explains, and what is left of the model's score among cases that are alike in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from brainfm.data.store import SessionEntry, Store
from brainfm.errors import ConfigError
from brainfm.scoring.answers import aurocs
from brainfm.scoring.intervals import Interval, ends, holm, permutation_p, resampled_counts, shuffles
from brainfm.scoring.linear import logistic
from brainfm.scoring.permuted_ridge import permuted_ridge
from brainfm.specs import TaskSpec
from brainfm.study.descriptors import Described, describe_all, table
from brainfm.tasks.registry import kind_of

ALPHA = 0.05
_BINS = 5  # strata of a shortcut made of numbers; five remove nine tenths of a bias (Cochran 1968, Biometrics 24:295)
_LEAST_PAIRS = 20  # of a case and a control alike in a shortcut, below which nothing is compared
_LEAST_CASES = 8
_COINCIDES = 0.98  # AUROC or skill from which a shortcut and the label are one and the same
_LOST = 0.5  # share of the effect that must be left to call it unharmed
_MUCH = 0.1  # share of the answers that is worth a word
_MISSING = frozenset({"", "n/a", "na", "nan", "none", "null", "unknown", "?"})
_COLUMNS = {
    "site": {"site", "siteid", "centre", "center", "hospital", "institution", "institutionname"},
    "scanner": {
        "scanner", "scannerid", "scannermodel", "manufacturer", "manufacturersmodelname", "vendor", "model", "device",
        "fieldstrength", "magneticfieldstrength", "tesla",
    },
}  # fmt: skip


class HasSession(Protocol):
    """What is asked of a case: those of every kind have it."""

    @property
    def session(self) -> SessionEntry: ...

    @property
    def scans(self) -> tuple[tuple[str, ...], ...]: ...


@dataclass(frozen=True)
class Evidence:
    """One shortcut as it stands for every case.

    Attributes:
        name: as it is told.
        values: [N, F] numbers; of words one column a word. F is 0 where all cases share one value.
        words: [N] where the shortcut is a word for each case; cases are alike where it is the same.
        anatomy: whether it is part of what an image rightly shows, e.g. the size of a head.
        absent: why there is nothing to ask, where nothing is known of it.
    """

    name: str
    values: np.ndarray
    words: tuple[str, ...] | None = None
    anatomy: bool = False
    absent: str = ""


@dataclass(frozen=True)
class Finding:
    """What one shortcut does. None or NaN where a number could not be had.

    Attributes:
        name, label: what was asked; the label is empty but of several labels.
        anatomy: see Evidence.
        cases: that were asked; ``kinds`` different words, 0 for numbers.
        score: how well the shortcut alone tells the label, cross-validated, with its 95 % interval by subject: AUROC of
            classes, else the share of the mean's absolute error that it takes away (skill).
        p: against chance, by permutation; ``p_family`` for all shortcuts together (Holm).
        noticed_from: the score above which p is below 5 %: what is weaker goes unnoticed in so few cases.
        explained: share of the variance of the model's answers that the shortcut tells, cross-validated.
        explained_beyond: the same of what is left of the answers when the true labels are taken out.
        equalised: the model's score among cases alike in the shortcut.
        equalised_p: that this score is chance, by permutation among alike cases.
        kept: of classes the share of AUROC - .5 that is left then; of values, of the slope of the answers on the truth,
            which unlike skill does not fall just because alike cases differ less.
        weighted: of two classes the model's AUROC with cases weighted so that the shortcut is balanced.
        pairs: of alike cases with different labels that the equalised AUROC compares; of values the cases.
        code: ``untestable``, ``harmless``, ``survives``, ``weakened``, ``lost``, ``undecided``, ``inseparable`` or
            ``nothing to lose``.
        verdict: the same in words.
    """

    name: str
    label: str
    anatomy: bool
    cases: int
    kinds: int = 0
    score: Interval | None = None
    p: float = np.nan
    p_family: float = np.nan
    noticed_from: float = np.nan
    explained: float = np.nan
    explained_beyond: float = np.nan
    equalised: Interval | None = None
    equalised_p: float = np.nan
    kept: float = np.nan
    weighted: float = np.nan
    pairs: int = 0
    code: str = "untestable"
    verdict: str = ""


@dataclass(frozen=True)
class Audit:
    """All findings about one model.

    Attributes:
        target: of the column.
        measure: ``auroc`` or ``skill``; ``chance`` is its value for guessing.
        cases, subjects: that have a label and an answer.
        model, model_p: the model's own score by label (one, unnamed, but of several labels) and its p against
            chance.
        shortcuts: a finding for each shortcut (and label).
        verdict: one or two plain sentences.
    """

    target: str
    measure: str
    chance: float
    cases: int
    subjects: int
    model: dict[str, Interval]
    model_p: dict[str, float]
    shortcuts: tuple[Finding, ...]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that could not be had are None."""
        text = json.dumps(asdict(self))
        return json.loads(text, parse_constant=lambda word: None)


# ---------------------------------------------------------------------------------------------------------- evidence


def gather(
    store: Store,
    cases: Sequence[HasSession],
    spec: TaskSpec,
    columns: Sequence[str] = (),
    described: Sequence[Described] | None = None,
) -> list[Evidence]:
    """The shortcuts that can be read off a store.

    Args:
        columns: further columns of the manifest to ask, e.g. sex for a task about age.
        described: what `describe_all` says of the cases, where it is known already.

    Raises:
        ConfigError: where a column is the target itself, or no case has it.
    """
    sessions = [case.session for case in cases]
    rows = described or describe_all(store, sessions, spec.contrasts, [case.scans for case in cases])
    named = {name for session in sessions for name in session.columns}
    found = [words("data set", [session.dataset for session in sessions])]
    for kind, known in _COLUMNS.items():
        there = sorted(n for n in named if "".join(c for c in n.lower() if c.isalnum()) in known and n not in columns)
        if not there:
            found.append(Evidence(kind, np.zeros((len(cases), 0)), absent=f"the manifest has no column for the {kind}"))
        for name in there:
            label = kind if name.lower() == kind else f"{kind} ({name})"
            found.append(words(label, [session.columns.get(name, "") for session in sessions]))
    found.append(words("contrast set", [row.contrasts for row in rows]))
    for group, label in (("grid", "voxel size"), ("position", "position"), ("background", "background")):
        found.append(Evidence(label, table([row.numbers[group] for row in rows])[0]))
    found.append(Evidence("mask outline", table([row.numbers["mask"] for row in rows])[0], anatomy=True))
    asked = set(kind_of(spec.kind).answer_columns(spec))
    for name in columns:
        if name in asked:
            raise ConfigError(f"audit.columns has {name}, which is the target itself: expected another column")
        if name not in named:
            legal = ", ".join(sorted(named)) or "none, for the store has no columns"
            raise ConfigError(f"audit.columns has {name}, which no case has: expected some of {legal}")
        found.append(_column(name, [session.columns.get(name, "") for session in sessions]))
    return found


def words(name: str, values: Sequence[str], anatomy: bool = False) -> Evidence:
    """A shortcut that is a word for each case; a missing one is a word too, ``unknown``."""
    clean = tuple("unknown" if v.strip().lower() in _MISSING else v.strip() for v in values)
    kinds = sorted(set(clean))
    one_hot = np.array([[word == kind for kind in kinds] for word in clean], np.float64)
    return Evidence(name, one_hot if len(kinds) > 1 else one_hot[:, :0], clean, anatomy)


def _column(name: str, texts: Sequence[str]) -> Evidence:
    """Numbers where a column holds many different ones, else words."""
    numbers = []
    for text in texts:
        try:
            numbers.append(float(text))
        except ValueError:
            numbers.append(np.nan)
    told = [text.strip().lower() not in _MISSING for text in texts]
    known = np.isfinite(numbers)
    if (known == np.array(told)).all() and len({n for n, k in zip(numbers, known) if k}) > _BINS:
        rows = [{f"{name}/value": n} if k else {} for n, k in zip(numbers, known)]
        return Evidence(name, table(rows)[0])
    return words(name, texts)


# ------------------------------------------------------------------------------------------------------------ asking


def audit(
    store: Store,
    cases: Sequence[HasSession],
    truth: np.ndarray,
    answers: np.ndarray,
    spec: TaskSpec,
    seed: int,
    evidence: Sequence[Evidence] | None = None,
    *,
    columns: Sequence[str] = (),
    described: Sequence[Described] | None = None,
    rounds: int = 999,
) -> Audit:
    """`examine` with what `gather` finds in the store, or the ``evidence`` that is given."""
    found = gather(store, cases, spec, columns, described) if evidence is None else evidence
    return examine(found, truth, answers, [case.session.subject_key for case in cases], spec, seed, rounds)


def examine(
    evidence: Sequence[Evidence],
    truth: np.ndarray,
    answers: np.ndarray,
    groups: Sequence[str],
    spec: TaskSpec,
    seed: int,
    rounds: int = 999,
) -> Audit:
    """Asks every shortcut about the labels and about a model's answers to cases that it was not trained on.

    Memory grows with the square of the number of cases: 2000 cases need some 200 MB.

    Args:
        evidence: rows in the order of the cases.
        truth: [N] class indices or values (of a segmentation the true volumes in ml), or [N, T] of a multi-label
            answer; NaN is unknown and left out.
        answers: out of fold: probabilities [N, K] or [N, T], values [N], or predicted volumes [N].
        groups: [N] the subject of each case.
        rounds: of every permutation test, and of the bootstrap; more where the family is so large that its smallest p
            could not fall below 5 %.

    Raises:
        ValueError: where lengths differ.

    Source: for answers among alike cases the stratified Mann-Whitney statistic of van Elteren 1960, each pair counted
        alike; for the weights Li, Morgan & Zaslavsky 2018 (JASA 113:390); for values the residuals of Freedman & Lane
        1983 (J. Bus. Econ. Stat. 1:292).
        Differs: the residuals come from cross-validated regressions.
    """
    from threadpoolctl import threadpool_limits

    truth, answers = np.asarray(truth, np.float64), np.asarray(answers, np.float64)
    if len({len(truth), len(answers), len(groups), *(len(e.values) for e in evidence)}) != 1:
        raise ValueError(f"{len(truth)} labels, {len(answers)} answers, {len(groups)} subjects and the evidence differ")
    columns = _columns(truth, answers, spec)
    classes = columns[0].classes
    rounds = max(rounds, math.ceil(2 * len(evidence) * len(columns) / ALPHA))
    findings: list[Finding] = []
    models: dict[str, Interval] = {}
    chances: dict[str, float] = {}
    with threadpool_limits(1):  # sums must not depend on the number of cores
        for column in columns:
            who = [group for group, known in zip(groups, column.rows) if known]
            asked: _Classes | _Values = (_Classes if classes else _Values)(column, who, seed, rounds)
            models[column.label], chances[column.label] = asked.model, asked.model_p
            findings += [_asked(_part(one, column.rows), column, asked, who, seed) for one in evidence]
    told = tuple(_told(findings, models, chances, "AUROC" if classes else "skill"))
    known = np.any([column.rows for column in columns], axis=0)
    return Audit(
        target=spec.target,
        measure="auroc" if classes else "skill",
        chance=0.5 if classes else 0.0,
        cases=int(known.sum()),
        subjects=len({g for g, k in zip(groups, known) if k}),
        model=models,
        model_p=chances,
        shortcuts=told,
        verdict=_verdict(told),
    )


@dataclass(frozen=True)
class _Column:
    """Labels and answers as columns: of two classes one, of K classes K, of values one.

    Attributes:
        rows: [all cases] bool, those with a label.
        truth, answers: [N, Q]; answers of classes as log odds.
        possible: whether the labels vary enough to ask anything.
    """

    label: str
    rows: np.ndarray
    truth: np.ndarray
    answers: np.ndarray
    classes: bool
    possible: bool


def _columns(truth: np.ndarray, answers: np.ndarray, spec: TaskSpec) -> list[_Column]:
    classes, columns = kind_of(spec.kind).shortcut_columns(truth, answers, spec)
    if not classes:
        return [_of_values(label, true, answer) for label, true, answer in columns]
    return [_of_classes(label, true, answer) for label, true, answer in columns]


def _of_classes(label: str, true: np.ndarray, answer: np.ndarray) -> _Column:
    rows = np.isfinite(true).all(axis=1) & np.isfinite(answer).all(axis=1)
    clipped = np.clip(answer[rows], 1e-6, 1 - 1e-6)
    true = true[rows]
    kept = (true.sum(axis=0) >= 2) & ((1 - true).sum(axis=0) >= 2)  # a class of one case cannot be asked for
    odds = np.log(clipped / (1 - clipped))
    return _Column(label, rows, true[:, kept], odds[:, kept], True, bool(kept.any()))


def _of_values(label: str, true: np.ndarray, answer: np.ndarray) -> _Column:
    rows = np.isfinite(true) & np.isfinite(answer)
    varies = bool(rows.any()) and bool(np.ptp(true[rows]) > 0)
    return _Column(label, rows, true[rows][:, None], answer[rows][:, None], False, varies)


def _part(evidence: Evidence, rows: np.ndarray) -> Evidence:
    kinds = None if evidence.words is None else tuple(w for w, known in zip(evidence.words, rows) if known)
    return replace(evidence, values=evidence.values[rows], words=kinds)


def _asked(evidence: Evidence, column: _Column, asked: _Classes | _Values, groups: Sequence[str], seed: int) -> Finding:
    """All numbers of one finding; the words come when the whole family is known."""
    kinds = 0 if evidence.words is None else len(set(evidence.words))
    finding = Finding(evidence.name, column.label, evidence.anatomy, len(groups), kinds)
    why = ""
    if evidence.absent:
        why = evidence.absent
    elif not column.possible or len(set(groups)) < _LEAST_CASES:
        why = f"too few cases ({len(groups)}) or no two kinds of label among them"
    elif not evidence.values.shape[1] or not np.ptp(evidence.values, axis=0).any():
        why = f"all {len(groups)} cases share one"
    elif kinds and 2 * kinds > len(groups):
        why = f"{kinds} different values in {len(groups)} cases"
    if why:
        return replace(finding, verdict=f"cannot be tested: {why}")
    values = evidence.values
    return replace(finding, **asked.scores(values, evidence.words, permuted_ridge(values, groups, seed)))


class _Values:
    """Questions about a value: skill is the share of the mean's absolute error that an answer takes away."""

    def __init__(self, column: _Column, groups: Sequence[str], seed: int, rounds: int) -> None:
        self.truth, self.answers = column.truth[:, 0], column.answers[:, 0]
        self.order = shuffles(groups, rounds, seed)
        self.counts, self.subjects = resampled_counts(groups, rounds, seed), len(set(groups))
        self.model, self.model_p, self.slope = Interval(np.nan, np.nan, np.nan, len(groups)), 1.0, np.nan
        if column.possible:
            reference = self.truth - self.truth.mean()
            self.model = _skill_interval(self.truth - self.answers, reference, self.counts, self.subjects)
            observed = _correlations(self.truth[:, None], self.answers)[0]
            self.model_p = permutation_p(observed, _correlations(self.truth[self.order].T, self.answers))
            self.slope = _slope(self.truth, self.answers)

    def scores(self, values: np.ndarray, kinds: Sequence[str] | None, fit: Any) -> dict[str, Any]:
        permuted = np.stack([self.truth, *self.truth[self.order]], axis=1)
        error = permuted - fit.answers(permuted)
        plain = permuted - fit.baseline(permuted)
        skills = 1 - np.abs(error).mean(axis=0) / np.abs(plain).mean(axis=0)
        alone = _skill_interval(error[:, 0], plain[:, 0], self.counts, self.subjects)
        found: dict[str, Any] = {"score": alone}
        found |= {"p": permutation_p(skills[0], skills[1:]), "noticed_from": float(np.quantile(skills[1:], 1 - ALPHA))}
        found |= _explained(self.truth[:, None], self.answers[:, None], fit)
        if alone.mean >= _COINCIDES:
            return found
        # What the shortcut tells is taken out of both.
        true, answer = error[:, 0], self.answers - fit.answers(self.answers[:, None])[:, 0]
        left = _skill_interval(true - answer, true, self.counts, self.subjects)
        same = _correlations(true[:, None], answer)[0]
        null = _correlations(true[self.order].T, answer)
        return found | {
            "equalised": left,
            "equalised_p": permutation_p(same, null),
            "kept": _slope(true, answer) / self.slope if self.slope > 0 else np.nan,
            "pairs": len(true),
        }


def _slope(truth: np.ndarray, answers: np.ndarray) -> float:
    """Of the answers on the truth, by least squares."""
    centred = truth - truth.mean()
    return float((centred * answers).sum() / (centred**2).sum())


def _skill_interval(error: np.ndarray, reference: np.ndarray, counts: np.ndarray, subjects: int) -> Interval:
    drawn = 1 - _ratio(counts @ np.abs(error), counts @ np.abs(reference))
    low, high = ends(drawn, subjects)
    return Interval(float(1 - np.abs(error).sum() / np.abs(reference).sum()), low, high, len(error))


def _correlations(columns: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[P] Pearson's r of each column [N, P] with ``other`` [N]; 0 where one does not vary."""
    a, b = columns - columns.mean(axis=0), other - other.mean()
    spread = np.sqrt((a**2).sum(axis=0) * (b**2).sum())
    return np.divide(a.T @ b, spread, out=np.zeros(a.shape[1]), where=spread > 1e-12)


class _Classes:
    """Questions about classes: AUROC, of more than two the mean over each against all others."""

    def __init__(self, column: _Column, groups: Sequence[str], seed: int, rounds: int) -> None:
        self.truth, self.answers, self.groups, self.seed, self.rounds = (
            column.truth, column.answers, groups, seed, rounds,
        )  # fmt: skip
        self.counts, self.subjects = resampled_counts(groups, rounds, seed), len(set(groups))
        self.order = shuffles(groups, rounds, seed)
        self.above = [_wins(self.answers[:, q]) for q in range(self.answers.shape[1])]
        everywhere = np.zeros(len(groups), int)
        columns = len(self.above)
        self.model = self._interval(self.above, [everywhere] * columns, [np.ones(len(groups))] * columns)
        self.model_p = 1.0
        if columns:
            null = [self._among_alike(q, self.truth[:, q][self.order], everywhere) for q in range(columns)]
            self.model_p = permutation_p(self.model.mean, np.mean(null, axis=0))

    def scores(self, values: np.ndarray, kinds: Sequence[str] | None, fit: Any) -> dict[str, Any]:
        columns = self.truth.shape[1]
        null, alone = np.zeros(self.rounds), np.zeros_like(self.truth)
        observed = 0.0
        for q in range(columns):
            permuted = np.stack([self.truth[:, q], *self.truth[:, q][self.order]], axis=1)
            guess = fit.answers(permuted, centred=True)
            areas = aurocs(permuted, guess)
            alone[:, q] = guess[:, 0]
            observed += areas[0] / columns
            null += areas[1:] / columns
        ones = [np.ones(len(self.groups))] * columns
        everywhere = [np.zeros(len(self.groups), int)] * columns
        own = self._interval([_wins(alone[:, q]) for q in range(columns)], everywhere, ones)
        found: dict[str, Any] = {"score": own}
        found |= {"p": permutation_p(observed, null), "noticed_from": float(np.quantile(null, 1 - ALPHA))}
        found |= _explained(self.truth, self.answers, fit)
        if kinds is None:
            strata = [_quantile_bins(alone[:, q]) for q in range(columns)]
        else:
            strata = [np.unique(np.asarray(kinds), return_inverse=True)[1]] * columns
        pairs = int(sum(_pairs(self.truth[:, q], strata[q]) for q in range(columns)))
        found["pairs"] = pairs
        if pairs < _LEAST_PAIRS or own.mean >= _COINCIDES:
            return found
        left = self._interval(self.above, strata, ones)
        nulls = [
            self._among_alike(q, self.truth[:, q][shuffles(self.groups, self.rounds, self.seed, strata[q])], strata[q])
            for q in range(columns)
        ]
        found |= {"equalised": left, "equalised_p": permutation_p(left.mean, np.nanmean(nulls, axis=0))}
        found["kept"] = (left.mean - 0.5) / (self.model.mean - 0.5) if self.model.mean > 0.5 else np.nan
        if columns == 1:
            weights = _overlap_weights(self.truth[:, 0], alone[:, 0])
            found["weighted"] = self._interval(self.above, everywhere, [weights]).mean
        return found

    def _among_alike(self, q: int, truths: np.ndarray, strata: np.ndarray) -> np.ndarray:
        """[rounds] AUROC of the answers among alike cases for other truths [rounds, N]."""
        same = strata[:, None] == strata[None]
        won = ((truths @ (self.above[q] * same)) * (1 - truths)).sum(axis=1)
        return _ratio(won, ((truths @ same) * (1 - truths)).sum(axis=1))

    def _interval(
        self, wins: Sequence[np.ndarray], strata: Sequence[np.ndarray], weights: Sequence[np.ndarray]
    ) -> Interval:
        """The mean over columns of the weighted AUROC among alike cases, with its interval by subject."""
        if not wins:
            return Interval(np.nan, np.nan, np.nan, len(self.groups))
        points, drawn = [], []
        for q, above in enumerate(wins):
            true = self.truth[:, q]
            compared = (strata[q][:, None] == strata[q][None]) * np.outer(true * weights[q], (1 - true) * weights[q])
            won = compared * above
            points.append(_ratio(won.sum(), compared.sum()))
            c = self.counts
            drawn.append(_ratio(((c @ won) * c).sum(axis=1), ((c @ compared) * c).sum(axis=1)))
        low, high = ends(np.mean(drawn, axis=0), self.subjects)
        return Interval(float(np.mean(points)), low, high, len(self.groups))


def _ratio(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b > 0)


def _wins(score: np.ndarray) -> np.ndarray:
    """[N, N]: 1 where the row's score is above the column's, half where they are equal."""
    return (score[:, None] > score[None]) + 0.5 * (score[:, None] == score[None])


def _pairs(truth: np.ndarray, strata: np.ndarray) -> float:
    return float(sum(truth[strata == s].sum() * (1 - truth[strata == s]).sum() for s in np.unique(strata)))


def _quantile_bins(score: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(score, np.linspace(0, 1, _BINS + 1)[1:-1]), score)


def _overlap_weights(truth: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Of each case the probability of the other class as the shortcut has it: both classes then look alike in it."""
    x = ((score - score.mean()) / (score.std() + 1e-12))[:, None]
    p = logistic(x, truth.astype(np.int64), x, 2, balanced=False)[0, :, 1]
    return np.where(truth == 1, 1 - p, p)


def _explained(truth: np.ndarray, answers: np.ndarray, fit: Any) -> dict[str, float]:
    """Shares of the answers' variance [N, Q] that the shortcut tells; of all of it, and beyond the true labels."""
    design = np.column_stack([np.ones(len(truth)), truth])
    beyond = answers - design @ np.linalg.lstsq(design, answers, rcond=None)[0]
    shares = {}
    for name, target in (("explained", answers), ("explained_beyond", beyond)):
        error = ((target - fit.answers(target)) ** 2).sum()
        total = ((target - fit.baseline(target)) ** 2).sum()
        shares[name] = float(max(0.0, 1 - error / total)) if total > 1e-12 else 0.0
    return shares


# ----------------------------------------------------------------------------------------------------------- telling


def _told(
    findings: Sequence[Finding], models: Mapping[str, Interval], chances: Mapping[str, float], measure: str
) -> list[Finding]:
    """The findings with their family's p values, codes and sentences."""
    tested = [i for i, finding in enumerate(findings) if finding.score is not None]
    family = dict(zip(tested, holm([findings[i].p for i in tested])))
    told = []
    for i, finding in enumerate(findings):
        if finding.score is None:
            told.append(finding)
            continue
        model, p = models[finding.label], family[i]
        own = f"({measure} {finding.score.mean:.2f}, p {_p(p)})"
        left = finding.equalised
        if p >= ALPHA:
            code, said = "harmless", f"alone it does not tell the label {own}"
            if finding.explained_beyond > _MUCH:
                said += f"; but it explains {finding.explained_beyond:.0%} of what the labels leave of the answers"
        elif chances[finding.label] >= ALPHA:
            code = "nothing to lose"
            said = f"alone it tells the label {own}; the model's own {measure} {model.mean:.2f} is not above chance"
        elif left is None:
            code = "inseparable"
            said = f"alone it tells the label {own}; too few cases are alike in it and differ in the label to compare"
        else:
            said = (
                f"alone it tells the label {own}; among cases alike in it the model's {measure} is {left.mean:.2f} "
                f"[{left.low:.2f}, {left.high:.2f}], {model.mean:.2f} among all"
            )
            if finding.equalised_p < ALPHA:
                code = "survives" if finding.kept >= _LOST else "weakened"
                said += ": it holds up" if code == "survives" else ": less than half of the effect is left"
            else:
                code = "undecided" if finding.kept >= _LOST else "lost"
                said += ": too few to tell it from chance" if code == "undecided" else ": no better than chance"
        if finding.anatomy and code not in ("harmless", "survives"):
            said += " (size and shape of a head are anatomy too: by itself no proof of a shortcut)"
        told.append(replace(finding, p_family=p, code=code, verdict=said))
    return told


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _verdict(findings: Sequence[Finding]) -> str:
    by_code: dict[str, list[str]] = {}
    for finding in findings:
        name = f"{finding.name} ({finding.label})" if finding.label else finding.name
        by_code.setdefault(f"{finding.code}{' anatomy' if finding.anatomy else ''}", []).append(name)

    def those(*codes: str) -> str:
        return ", ".join(name for code in codes for name in by_code.get(code, []))

    untested = those("untestable", "untestable anatomy")
    tail = f" Could not be tested: {untested}." if untested else ""
    tested = sum(finding.code != "untestable" for finding in findings)
    idle = those("nothing to lose", "nothing to lose anatomy")
    said = []
    if harmful := those("lost", "inseparable", "weakened"):
        said.append(f"Do not trust this score yet: it does not hold up among cases alike in {harmful}.")
    if idle:
        said.append(f"The model itself is not above chance, while this alone tells the label: {idle}.")
    if doubtful := those("undecided", "undecided anatomy"):
        said.append(f"There are too few cases alike in {doubtful} to tell whether the score rests on it.")
    if outlines := those("lost anatomy", "inseparable anatomy", "weakened anatomy"):
        said.append(
            f"The score does not hold up among cases alike in {outlines}: the answers may rest on the size and shape "
            "of the head, which is anatomy, or on how it was cut out."
        )
    if surviving := those("survives", "survives anatomy"):
        said.append(f"Alone these tell the label, but the score holds up among cases alike in them: {surviving}.")
    if not said:
        said.append(
            f"None of the {tested} shortcuts that were tested tells the label better than chance."
            if tested else "No shortcut could be tested."
        )  # fmt: skip
    return " ".join(said) + tail
