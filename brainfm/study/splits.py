"""Cross-validation: who is trained on and who is held out, in repeated folds by subject, balanced in answer, sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from brainfm.data.store import SessionEntry
from brainfm.errors import ConfigError
from brainfm.scoring.folds import draw_shots, stratified_folds
from brainfm.tasks.study import Split


class Labelled(Protocol):
    """A session with its answer, as a kind's room finds them."""

    @property
    def session(self) -> SessionEntry: ...


@dataclass(frozen=True)
class SplitSpec:
    """How cases are split.

    Attributes:
        folds: 1 is one split with a fifth held out.
        repeats: of the whole cross-validation, each with other folds.
        inner: share of the training subjects that is kept to choose the checkpoint on.
        sites_apart: whether a site is never on both sides.
        seed: of the folds.
    """

    folds: int
    repeats: int = 1
    inner: float = 0.0
    sites_apart: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.folds < 1 or self.repeats < 1:
            raise ConfigError(f"folds={self.folds}, repeats={self.repeats}: expected 1 or more of each")
        if not 0 <= self.inner < 0.5:
            raise ConfigError(f"inner={self.inner}: expected a share from 0 to below 0.5 of the training subjects")


def split_cases(
    cases: Sequence[Labelled],
    spec: SplitSpec,
    strata: Mapping[str, str] | None = None,
    sites: Mapping[str, str] | None = None,
) -> list[Split]:
    """Every split of the cross-validation, by subject.

    Args:
        strata: subject key -> class, or quantile of the value, that the folds are balanced in.
        sites: subject key -> site.

    Raises:
        ConfigError: where there are fewer subjects (or sites, where these are kept apart) than folds.
    """
    subjects = sorted({case.session.subject_key for case in cases})
    if len(subjects) < max(2, spec.folds):
        raise ConfigError(
            f"folds={spec.folds}: expected at least one and at most the {len(subjects)} labelled subjects"
        )
    count = spec.folds if spec.folds > 1 else min(5, len(subjects))
    splits = []
    for repeat in range(spec.repeats):
        seed = spec.seed + 7919 * repeat
        parts = stratified_folds(subjects, count, seed, strata=strata, sites=sites, apart=spec.sites_apart)
        for fold, held in enumerate(parts if spec.folds > 1 else parts[:1]):
            rest = [s for s in subjects if s not in set(held)]
            inner = _inner(rest, spec, seed + 1 + fold, strata)
            sides = [set(rest) - set(inner), set(inner), set(held)]
            trained, chosen, away = (tuple(c for c in cases if c.session.subject_key in side) for side in sides)
            splits.append(Split(repeat, fold, trained, chosen, away))
    return splits


def with_shots(split: Split, shots: int, seed: int, strata: Mapping[str, str] | None) -> Split:
    """The split with the cases of that many of its training subjects, of whom as large a share chooses the checkpoint
    as did before. Raises: ConfigError where there are fewer."""
    cases = (*split.trained, *split.inner)
    subjects = sorted({case.session.subject_key for case in cases})
    drawn = set(draw_shots(subjects, shots, seed + 104729 * split.repeat + split.fold, strata))
    few = replace(split, trained=tuple(c for c in cases if c.session.subject_key in drawn), inner=())
    kept = {case.session.subject_key for case in split.inner}
    return with_inner(few, len(kept) / len(subjects), seed, strata) if kept else few


def with_inner(split: Split, share: float, seed: int, strata: Mapping[str, str] | None) -> Split:
    """The split with that share of its training subjects kept to choose on; none where that is not even one."""
    cases = (*split.trained, *split.inner)
    subjects = sorted({case.session.subject_key for case in cases})
    if round(share * len(subjects)) < 1 or len(subjects) < 2:
        return replace(split, trained=cases, inner=())
    parts = min(len(subjects), max(2, round(1 / share)))
    kept = set(stratified_folds(subjects, parts, seed + 1 + split.fold, strata=strata)[0])
    trained, inner = (tuple(c for c in cases if (c.session.subject_key in kept) == side) for side in (False, True))
    return replace(split, trained=trained, inner=inner)


def _inner(subjects: Sequence[str], spec: SplitSpec, seed: int, strata: Mapping[str, str] | None) -> list[str]:
    wanted = round(spec.inner * len(subjects))
    if spec.inner == 0:
        return []
    if wanted < 1 or len(subjects) - wanted < 1:
        raise ConfigError(f"inner={spec.inner}: {len(subjects)} training subjects leave none on one side")
    parts = min(len(subjects), max(2, round(1 / spec.inner)))
    return stratified_folds(subjects, parts, seed, strata=strata)[0]
