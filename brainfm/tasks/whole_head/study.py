"""A study of answers for whole heads: out-of-fold probabilities or values, calibrated by what the other folds teach."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from brainfm.data import regions
from brainfm.data.region_volumes import find_volumes
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.imaging.descriptors import content_names
from brainfm.nets.backbone import Backbone
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.nets.transfer import transfer
from brainfm.scoring import calibration
from brainfm.scoring.folds import deal, fold_of
from brainfm.scoring.intervals import bootstrap, paired_bootstrap, paired_permutation
from brainfm.specs import Decisions
from brainfm.study.shortcuts import audit
from brainfm.study.splits import with_inner
from brainfm.tasks.settings import FinetuneData
from brainfm.tasks.study import Decided, Place, Row, Scored, Split, Study, cases_of, fold_key, identity, subjects_of
from brainfm.tasks.task import Task
from brainfm.tasks.whole_head import baselines
from brainfm.tasks.whole_head.candidates import CANDIDATES
from brainfm.tasks.whole_head.cases import (
    HeadViews,
    choose_view_mm,
    choose_view_patch,
    find_session_cases,
    views_of,
)
from brainfm.tasks.whole_head.members import Members, pooled
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.tasks.whole_head.reads import Reads
from brainfm.tasks.whole_head.scores import answer_score, answer_scores
from brainfm.tasks.whole_head.settings import ClassificationSettings, RegressionSettings, WholeHeadSettings
from brainfm.tasks.whole_head.sorts import LEVEL, Sort, sort_of

_INNER = 0.2  # share of the training subjects that choose where nobody said so
_LEAST_SLOPE = 0.3  # of answers on the truth; stretching those below would stretch little else than noise


class WholeHeadStudy(Study):
    """See Study.

    Args:
        store: prepared scans whose manifest has the target's column.
        settings: of the task.
    """

    settings: WholeHeadSettings
    measurements: tuple[str, ...] = ()  # names of those that are a candidate's

    def __init__(self, store: Store, settings: WholeHeadSettings) -> None:
        self.store, self.settings = store, settings
        self.views = 1 + settings.crops
        ways: dict[str, Any] = {}
        if isinstance(settings, ClassificationSettings):
            ways = {"mode": settings.mode, "values": settings.values}
        elif isinstance(settings, RegressionSettings):
            ways = {"unit": settings.unit}
        found = find_session_cases(
            store, settings.kind, settings.target,
            contrasts=settings.contrasts, fusion=settings.fusion, lesion=settings.lesion, **ways,
        )  # fmt: skip
        self.cases, self.left_out = tuple(found.cases), tuple(found.left_out)
        self.spec = found.spec
        self.primary, self.larger_is_better = self.sort.primary
        self.volumes, self.notes = find_volumes(
            store, [case.session for case in self.cases], self.spec.target, settings.volumes
        )
        if settings.lesion is not None and settings.pooling in ("mean", "token"):
            raise ConfigError(
                f"task.lesion={settings.lesion}: no attention is learned with task.pooling={settings.pooling}; "
                "expected task.pooling=attention or auto"
            )
        asked = settings.candidates
        strange = [] if asked == "auto" else [name for name in asked if name not in CANDIDATES]
        if strange or not asked:
            what = strange[0] if strange else "none"
            raise ConfigError(f"task.candidates: found {what}, expected auto or some of {', '.join(CANDIDATES)}")
        if "volumes" in (CANDIDATES if asked == "auto" else asked) and self.volumes is None:
            self.notes.append("no region volumes of every session: they are no candidate")
        if asked == "auto" or {"measurements", "stacked"} & set(asked):
            self.measurements = content_names(self.spec.contrasts)
        self.members = Members(store, self.volumes)

    @property
    def sort(self) -> Sort:
        """Of the answers."""
        return sort_of(self.spec)

    @property
    def counted(self) -> str:
        counts = self.sort.counted([case.answer for case in self.cases], self.spec)
        return f"classes {', '.join(f'{name} ({n})' for name, n in counts)}" if counts else ""

    def patch(self, backbone: Backbone, most_voxels: int) -> tuple[int, int, int]:
        usual = "attention" if self.settings.lesion is not None else backbone.usual_pooling
        pooling = usual if self.settings.pooling == "auto" else self.settings.pooling
        self.spec = replace(self.spec, pooling=pooling)
        if self.settings.patch_vox != "auto":
            return self.settings.patch_vox
        return choose_view_patch(self.store, self.cases, backbone.strides[-1], most_voxels)

    def settle(self, patch_vox: tuple[int, int, int]) -> None:
        view_mm = self.settings.view_mm
        if view_mm is None:
            view_mm = choose_view_mm(self.store, self.cases, patch_vox)
        self.spec = replace(self.spec, patch_vox=patch_vox, view_mm=float(view_mm), crops=self.settings.crops > 0)

    def task(self, backbone: Backbone, trained: Sequence[Any], pretrained: LoadedBackbone | None = None) -> Task:
        settings = self.settings
        ways: dict[str, Any] = {}
        if isinstance(settings, ClassificationSettings):
            ways = {"label_smoothing": settings.label_smoothing, "balanced": settings.class_weights}
        task = WholeHeadTask(
            self.spec,
            backbone,
            guidance=settings.guidance,
            dropout=settings.dropout,
            reads=self.reads(pretrained),
            **ways,
        )
        for own, read in ((task.dense, "decoder"), (task.regions, "regions")):
            if own is not None and pretrained is not None:
                source = pretrained.decoder if read == "decoder" else pretrained.heads[read]
                transfer(own, source.state_dict(), origin=f"the {read} of the backbone's file")  # type: ignore[union-attr]
        task.set_statistics(torch.from_numpy(np.stack([case.answer for case in trained])))
        return task

    @torch.no_grad()
    def start(self, task: Task, trained: Sequence[Any], device: torch.device) -> None:
        """The last layer begins as a linear probe of the encoder as it is."""
        if self.settings.head_start == "fresh":
            return
        assert isinstance(task, WholeHeadTask)
        self._refit(task.to(device), trained, Place(device, None))

    def reads(self, loaded: LoadedBackbone | None) -> Reads:
        """What answers are made of beside the encoder's maps: what the store and the backbone's file have."""
        made = Reads(measurements=self.measurements)
        if self.volumes is not None and self.volumes.of_labels:
            made = replace(made, labels=self.volumes.source, scheme=self.volumes.scheme, volumes=self.volumes.names)
        if loaded is None or loaded.decoder is None or not self.spec.view_mm:
            return made
        head = loaded.heads.get("regions")
        if head is None:
            return replace(made, decoder=loaded.decoder.config)
        outside = tuple(name for name in head.names if name in regions.MERGED["any_outside"]) or head.names[:1]
        tissues = {
            word: tuple(name for name in regions.MERGED[merged] if name in head.names)
            for word, merged in (("csf", "any_csf"), ("grey", "any_grey"), ("white", "any_white_matter"))
        }
        known = {word: members for word, members in tissues.items() if members}
        return replace(made, decoder=loaded.decoder.config, regions=head.config, outside=outside, tissues=known)

    def bundle_reads(self, loaded: LoadedBackbone | None) -> dict[str, Any] | None:
        return self.reads(loaded).to_dict()

    def patches(self, trained: Sequence[Any], seed: int, data: FinetuneData) -> Dataset:
        return HeadViews(
            self.store,
            trained,
            self.spec,
            seed,
            crops=self.settings.crops,
            contrast_dropout=data.contrast_dropout,
        )

    def watch(self, task: Task, cases: Sequence[Any], place: Place) -> float:
        outputs = np.stack([self._output(task, case, place) for case in cases])
        found = answer_scores(self.spec, self._truth(cases), outputs)
        return found[self.primary]

    def each(self, task: Task, cases: Sequence[Any], place: Place) -> list[float]:
        truth = self._truth(cases)
        return [self.sort.good(t, self._output(task, case, place)) for t, case in zip(truth, cases)]

    def answer(self, task: Task, split: Split, place: Place, folder: Path) -> list[Row]:
        rows = []
        for case in split.held:
            raw = _listed(np.atleast_1d(self._output(task, case, place)))
            row = identity(case.session, split) | {"truth": _listed(case.answer), "raw": raw}
            rows.append(row | {"chosen": "tuned", "fallback": "tuned", "candidates": {"tuned": raw}})
        return rows

    # ---- the choice among candidates (candidates.py) -----------------------------------------------------------------

    def candidates(self, split: Split) -> tuple[str, ...]:
        """What is asked of this split, simplest first: the network is tuned where there are enough subjects."""
        asked = self.settings.candidates
        if asked != "auto":
            return tuple(name for name in CANDIDATES if name in asked)
        people = len({case.session.subject_key for case in (*split.trained, *split.inner)})
        return CANDIDATES if people >= self.settings.tune_from else CANDIDATES[:-1]

    def trains(self, split: Split) -> bool:
        return "tuned" in self.candidates(split)

    def arranged(self, split: Split, seed: int, strata: Mapping[str, str] | None) -> Split:
        """Where nothing is tuned all training cases are inner cases in turn; a tuned network always gets some."""
        if not self.trains(split):
            return replace(split, trained=(*split.trained, *split.inner), inner=())
        if split.inner or self.candidates(split) == ("tuned",):
            return split
        return with_inner(split, _INNER, seed, strata)

    @contextmanager
    def refitted(self, task: Task, trained: Sequence[Any], place: Place) -> Iterator[None]:
        """While open, the last layer is the linear model of the features as they are now."""
        if self.settings.head_start == "fresh":
            yield
            return
        assert isinstance(task, WholeHeadTask)
        layers = (task.norm, task.out)
        before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
        self._refit(task, trained, place)
        try:
            yield
        finally:
            for layer, state in zip(layers, before):
                layer.load_state_dict(state)

    @property
    def starts_well(self) -> bool:  # type: ignore[override]
        return self.settings.head_start != "fresh"

    @property
    def has_volumes(self) -> bool:
        return self.volumes is not None

    @torch.no_grad()
    def conclude(
        self,
        tuned: Task | None,
        fresh: Callable[[], Task],
        split: Split,
        place: Place,
        folder: Path,
        seed: int,
    ) -> tuple[list[Row], dict[str, torch.Tensor] | None]:
        names = self.candidates(split)
        if names == ("tuned",):
            assert tuned is not None
            return self.answer(tuned, split, place, folder), None
        task = fresh()
        assert isinstance(task, WholeHeadTask) and (tuned is None or isinstance(tuned, WholeHeadTask))
        return self.members.conclude(task, tuned, split, names, place, folder, seed)

    @torch.no_grad()
    def _refit(self, task: WholeHeadTask, trained: Sequence[Any], place: Place) -> None:
        task.eval()
        features = torch.cat([pooled(self.store, task, case, place) for case in trained])
        groups = [case.session.subject_key for case in trained]
        task.start_linear(features, np.stack([case.answer for case in trained]), groups)

    # ---- what is made of the answers ---------------------------------------------------------------------------------

    def decide(self, rows: Sequence[Row]) -> Decided:
        truth, raw = _arrays(rows)
        fold = np.array([fold_key(row) for row in rows])
        several = len(set(fold)) > 1
        if not self.sort.probable:
            return self._decide_value(rows, truth[:, 0], raw[:, 0], fold, several)
        mode = self.spec.mode

        right = self._squeezed(truth)

        def fit(t: np.ndarray, p: np.ndarray) -> float:
            return calibration.fit_temperature(calibration.logits_of(p, mode), t, mode)

        def fix(p: np.ndarray, temperature: float) -> np.ndarray:
            return calibration.apply_temperature(p, temperature, mode)

        answers, said = raw, ["nothing is decided on one fold"]
        kept, temperature = False, 1.0
        if several:
            scaled = calibration.cross_fitted(fit, fix, right, raw, fold, groups=subjects_of(rows))
            # By the likelihood of what happened: the calibration error itself is too noisy in small cohorts.
            score = answer_score(self.spec, "log_loss")
            before, after = score(right, raw), score(right, scaled)
            kept = after < before
            temperature = fit(right, raw)
            said = [f"temperature {temperature:.2f}: log loss {before:.3f} before, {after:.3f} after "
                    f"({'kept' if kept else 'not kept'})"]  # fmt: skip
            temperature = temperature if kept else 1.0
            answers = _as_others_choose(fit, fix, score, right, raw, fold, subjects_of(rows))
        confidence, correct = _confidence(answers, right, mode)
        return Decided(
            Decisions(temperature=temperature),
            [row | {"answer": _listed(a)} for row, a in zip(rows, answers)],
            tuple(said),
            {
                "ece_before": _ece(raw, right, mode), "ece_after": _ece(answers, right, mode), "kept": kept,
                "temperature": temperature,
                "reliability": [list(row) for row in calibration.reliability(confidence, correct, 10)],
            },
        )  # fmt: skip

    def _decide_value(
        self, rows: Sequence[Row], truth: np.ndarray, raw: np.ndarray, fold: np.ndarray, several: bool
    ) -> Decided:
        groups = subjects_of(rows)
        answers = raw
        if several:
            answers = calibration.cross_fitted(_line, calibration.apply_bias, truth, raw, fold, groups=groups)
        before, after = (_mean_error(truth, x) for x in (raw, answers))
        kept = several and after < before
        if several:
            answers = _as_others_choose(_line, calibration.apply_bias, _mean_error, truth, raw, fold, groups)
        bias = _line(truth, raw) if kept else (0.0, 1.0)
        residuals, covered = np.abs(answers - truth), None
        if several:  # each fold's intervals come from the others' errors
            half = calibration.cross_fitted(_quantile, _everywhere, truth, answers, fold, groups=groups)
            covered = float(np.mean(residuals <= half)) if np.isfinite(half).all() else None
        numbers = {
            "mae_before": before, "mae_after": after if several else before, "bias": list(bias), "kept": kept,
            "level": LEVEL, "half_width": float(calibration.conformal_quantile(residuals, LEVEL)),
            "coverage": covered,
        }  # fmt: skip
        said = (
            f"bias correction: mean absolute error {before:.3f} before, {after:.3f} after "
            f"({'kept' if kept else 'not kept'})" if several else "nothing is decided on one fold"
        )  # fmt: skip
        decisions = Decisions(bias=bias, residuals=tuple(float(r) for r in np.sort(residuals)))
        return Decided(decisions, [row | {"answer": [float(a)]} for row, a in zip(rows, answers)], (said,), numbers)

    def score(self, rows: Sequence[Row], seed: int) -> Scored:
        truth, answers = _arrays(rows, "answer")
        right = self._squeezed(truth)
        given = self.sort.given(answers)
        strata = self.sort.strata(right)
        groups, metrics = subjects_of(rows), {}
        for name in answer_scores(self.spec, right, given):
            metrics[name] = bootstrap(
                answer_score(self.spec, name), right, given, groups=groups, seed=seed, strata=strata,
            )  # fmt: skip
        return Scored(metrics, list(rows))

    def baseline(self, name: str, backbone: Backbone, splits: Sequence[Split], seed: int) -> list[Row]:
        rows = []
        for repeat in sorted({split.repeat for split in splits}):
            of_repeat = [split for split in splits if split.repeat == repeat]
            parts = [(self._places(s.trained + s.inner), self._places(s.held)) for s in of_repeat]
            truth = self._truth(self.cases)
            if name == "volumes":
                assert self.volumes is not None
                x = np.stack([self.volumes.values[case.session.key] for case in self.cases])
                who = [case.session.subject_key for case in self.cases]
                found = baselines.linear_answers(x, truth, who, parts, self.spec, seed + repeat)
            elif name == "features":
                found = baselines.feature_baseline(self.store, self.cases, truth, parts, self.spec, seed + repeat)
            else:
                found = baselines.random_linear_heads(
                    self.store, self.cases, truth, parts, self.spec, seed + repeat, backbone_config=backbone.config
                )
            for split in of_repeat:
                for place, case in zip(self._places(split.held), split.held):
                    given = _listed(np.atleast_1d(found[place]))
                    rows.append(
                        identity(case.session, split) | {"truth": _listed(case.answer), "raw": given, "answer": given}
                    )
        return rows

    def audit(self, rows: Sequence[Row], columns: Sequence[str], seed: int) -> dict[str, Any] | None:
        first = [row for row in rows if row["repeat"] == 0]
        truth, answers = _arrays(first, "answer")
        given = self.sort.given(answers)
        of_rows = cases_of(first, self.cases)
        return audit(self.store, of_rows, self._squeezed(truth), given, self.spec, seed, columns=columns).to_dict()

    def strata(self) -> dict[str, str] | None:
        of_subject: dict[str, np.ndarray] = {}
        for case in self.cases:
            of_subject.setdefault(case.session.subject_key, case.answer)
        return self.sort.fold_strata(of_subject)

    def _compare(self, mine: Sequence[Row], theirs: Sequence[Row], seed: int) -> dict[str, Any]:
        truth, a = _arrays(mine, "answer")
        b = _arrays(theirs, "answer")[1]
        right, groups = self._squeezed(truth), subjects_of(mine)
        a, b = self.sort.given(a), self.sort.given(b)
        strata = self.sort.strata(right)

        metric = answer_score(self.spec, self.primary)
        difference = paired_bootstrap(metric, right, a, b, groups=groups, seed=seed, strata=strata)
        p = paired_permutation(metric, right, a, b, groups=groups, seed=seed)
        return {
            "metric": self.primary, "difference": difference.mean, "low": difference.low, "high": difference.high,
            "p": p, "n": len(mine),
        }  # fmt: skip

    # ---- pieces ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _output(self, task: Task, case: Any, place: Place) -> np.ndarray:
        """Probabilities [K], or the value []."""
        image, present = views_of(self.store, case, self.spec)
        views = torch.from_numpy(image)[None].to(place.device)
        shown = torch.from_numpy(present)[None].to(place.device)
        with torch.autocast(place.device.type, dtype=place.autocast, enabled=place.autocast is not None):
            output = task(views, shown)
        return task.decode(output)[0].float().cpu().numpy()

    def _truth(self, cases: Sequence[Any]) -> np.ndarray:
        return self._squeezed(np.stack([case.answer for case in cases]).astype(np.float64))

    def _squeezed(self, truth: np.ndarray) -> np.ndarray:
        return self.sort.right(truth)

    def _places(self, cases: Sequence[Any]) -> list[int]:
        there = {case.session.key: place for place, case in enumerate(self.cases)}
        return [there[case.session.key] for case in cases]


def _as_others_choose(
    fit: Callable[[np.ndarray, np.ndarray], Any],
    apply: Callable[[np.ndarray, Any], np.ndarray],
    loss: Callable[[np.ndarray, np.ndarray], float],
    truth: np.ndarray,
    answers: np.ndarray,
    fold: np.ndarray,
    groups: Sequence[str],
) -> np.ndarray:
    """The answers of each fold, corrected or left alone as the subjects outside it would have it: neither the
    correction nor the choice to make one knows the cases that it is scored on.

    Args:
        loss: (truth, answers) -> what a correction must lower on subjects held out among those that choose.
    """
    subject, found = np.asarray(groups), answers.copy()
    for name in np.unique(fold):
        held = fold == name
        others = ~np.isin(subject, subject[held])
        t, raw, part = truth[others], answers[others], _parts(truth[others], subject[others])
        if len(np.unique(part)) < 2:
            continue
        if loss(t, calibration.cross_fitted(fit, apply, t, raw, part)) < loss(t, raw):
            found[held] = apply(answers[held], fit(t, raw))
    return found


def _parts(truth: np.ndarray, subject: np.ndarray) -> np.ndarray:
    """A part for each case: at most five parts of whole subjects, balanced in the truth."""
    first = {s: tuple(np.nan_to_num(np.atleast_1d(truth[np.argmax(subject == s)]), nan=-1.0)) for s in set(subject)}
    return fold_of(subject.tolist(), deal(sorted(first, key=lambda s: (first[s], s)), 5))


def _mean_error(truth: np.ndarray, answers: np.ndarray) -> float:
    return float(np.abs(answers - truth).mean())


def _line(truth: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """The correction, or none where it would stretch the answers too much."""
    line = calibration.fit_bias(truth, answers)
    return line if line[1] >= _LEAST_SLOPE else (0.0, 1.0)


def _quantile(truth: np.ndarray, answers: np.ndarray) -> float:
    return calibration.conformal_quantile(np.abs(truth - answers), LEVEL)


def _everywhere(answers: np.ndarray, value: float) -> np.ndarray:
    return np.full(len(answers), value)


def _arrays(rows: Sequence[Row], name: str = "raw") -> tuple[np.ndarray, np.ndarray]:
    """[N, T] truth (NaN where unknown) and [N, K] answers."""
    truth = np.array([[np.nan if v is None else v for v in row["truth"]] for row in rows], dtype=np.float64)
    return truth, np.array([row[name] for row in rows], dtype=np.float64)


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=np.float64)]


def _confidence(probabilities: np.ndarray, right: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each answer how sure it is, and whether it is right: of class 1 where there are two, else of the top class."""
    if mode == "multilabel":
        known = np.isfinite(right)
        return probabilities[known], right[known]
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], right
    top = probabilities.argmax(axis=1)
    return probabilities.max(axis=1), (top == right).astype(np.float64)


def _ece(probabilities: np.ndarray, right: np.ndarray, mode: str) -> float:
    return calibration.expected_calibration_error(*_confidence(probabilities, right, mode))
