"""The sorts of answer for a whole head: a value, one class of several, ordered classes, several labels.

All that tells them apart lies here, one object each: what a column says, the head's outputs and their loss, what the
outputs mean, scores, closed forms, and how an ensemble's answers become one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm.data.columns import HasColumns, read_class, read_labels, read_number
from brainfm.errors import ConfigError
from brainfm.nets.saliency import log_odds
from brainfm.scoring.answers import Score, class_scores, label_scores, value_scores
from brainfm.scoring.calibration import apply_bias, apply_temperature, conformal_quantile
from brainfm.scoring.folds import strata_of
from brainfm.scoring.linear import event_head, value_head
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.answers import SessionAnswer

LEVEL = 0.9  # of prediction intervals
MODES = ("exclusive", "ordinal", "multilabel")
_QUANTILES = 4  # strata of a value
_MOST_WEIGHT = 100.0  # of a class or label against the others: one case must not decide a run
_LEAST = 1e-6  # a probability, where its logarithm is taken

Event = Callable[[np.ndarray], tuple[np.ndarray, float]]  # whether something is so [N] -> weight [F], bias


class Sort(ABC):
    """One sort of answer.

    Attributes:
        primary: the score that models are compared by, and whether larger is better.
        probable: whether answers are probabilities; else they are values in a unit.
        several: whether there are several answers at once, each of which may be unknown.
    """

    primary: ClassVar[tuple[str, bool]]
    probable: ClassVar[bool] = True
    several: ClassVar[bool] = False

    # ---- what is true ------------------------------------------------------------------------------------------------

    @abstractmethod
    def read(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        """[T] float32 of what a manifest says. Raises: Unusable, ManifestError."""

    @abstractmethod
    def shown(self, truth: np.ndarray, spec: TaskSpec) -> str:
        """The same in a table."""

    def right(self, truth: np.ndarray) -> np.ndarray:
        """Truths [N, T] as scores want them, [N] where T is 1."""
        return truth[:, 0]

    def given(self, answers: np.ndarray) -> np.ndarray:
        """Answers [N, K] as scores want them."""
        return answers

    def strata(self, right: np.ndarray) -> list[Any] | None:
        """[N] what a bootstrap keeps the shares of."""
        return right.tolist()

    def fold_strata(self, answers: dict[str, np.ndarray]) -> dict[str, str]:
        """Subject -> what folds are balanced in, of the subjects' answers [T]."""
        return {subject: ",".join(f"{v:g}" for v in answer) for subject, answer in answers.items()}

    def counted(self, answers: Sequence[np.ndarray], spec: TaskSpec) -> list[tuple[str, int]]:
        """The classes with their cases, where an answer is one of them: a stray spelling is seen here."""
        places = [int(answer[0]) for answer in answers]
        return [(str(name), places.count(place)) for place, name in enumerate(spec.values)]

    @abstractmethod
    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        """Name -> the score as a function of `right` truth and `given` answers."""

    @abstractmethod
    def good(self, right: float | np.ndarray, given: np.ndarray) -> float:
        """How good one answer is, in the direction of the primary score."""

    # ---- the head ----------------------------------------------------------------------------------------------------

    def outputs(self, spec: TaskSpec) -> int:
        """T' logits."""
        return spec.classes

    def check(self, spec: TaskSpec) -> None:
        """Raises: ConfigError where the classes do not suit the sort."""
        if spec.classes < 2 or len(set(spec.values)) != spec.classes:
            raise ConfigError(f"task.values={list(spec.values)}: expected at least 2 classes, all distinct")

    def weights(self, values: np.ndarray, spec: TaskSpec) -> np.ndarray:
        """[K] of answers [N, T] that are known: classes weigh N / (K n), so that their total weights are equal."""
        known = values[np.isfinite(values)].astype(int)
        counts = np.bincount(known, minlength=spec.classes)
        weights = np.where(counts > 0, len(known) / (spec.classes * np.maximum(counts, 1)), 1.0)
        return np.clip(weights, 1 / _MOST_WEIGHT, _MOST_WEIGHT)

    @abstractmethod
    def errors(self, task: Any, logits: Tensor, answer: Tensor) -> Tensor:
        """[B, T] of logits [B, T'] and answers [B, T], 0 where unknown; ``task`` has statistics and smoothing."""

    @abstractmethod
    def decode(self, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        """Logits [B, T'] -> probabilities [B, K] or values [B] in the unit."""

    @abstractmethod
    def asked(self, logits: Tensor, index: int) -> Tensor:
        """The scalar whose gradient explains answer ``index``, of one case's logits [T']."""

    # ---- closed forms ------------------------------------------------------------------------------------------------

    @abstractmethod
    def heads(
        self, x: np.ndarray, y: np.ndarray, spec: TaskSpec, event: Event, value: Event
    ) -> list[tuple[np.ndarray, float]]:
        """Weight [F] and bias of each logit, of answers ``y`` [N, T]; see `linear_head`."""

    @abstractmethod
    def prior(self, y: np.ndarray, spec: TaskSpec, balanced: bool, mean: float, std: float) -> np.ndarray:
        """[T'] logits that know nothing but the answers [N, T]: their mean, or the shares, equal if balanced."""

    @abstractmethod
    def losses(self, y: np.ndarray, answer: np.ndarray, spec: TaskSpec, balanced: bool) -> np.ndarray:
        """[N]: the absolute error, or minus the log of the probability of what is so."""

    def recentre(self, tuned: Any, task: Any) -> None:
        """The last layer of ``tuned`` henceforth counts from the mean of ``task``, in its deviations."""
        return None

    # ---- one answer --------------------------------------------------------------------------------------------------

    def joined(self, raw: np.ndarray, spec: TaskSpec, decisions: Decisions) -> np.ndarray:
        """The members' answers [members, K] as one [K], after what cross-validation decided."""
        return apply_temperature(raw, decisions.temperature, spec.mode).mean(axis=0)

    def answered(
        self, found: np.ndarray, spec: TaskSpec, decisions: Decisions, contrasts: tuple[str, ...]
    ) -> SessionAnswer:
        """The answer of `joined` with its words."""
        named = {str(name): float(p) for name, p in zip(spec.values, found, strict=True)}
        return SessionAnswer(spec.target, self.chosen(named), named, "", None, None, contrasts)

    def chosen(self, named: dict[str, float]) -> str | list[str]:
        """What probabilities by name amount to."""
        return max(named, key=lambda name: named[name])

    def columns(self, spec: TaskSpec) -> list[str]:
        """Of SessionAnswer.cells."""
        return ["answer", *(f"p_{name}" for name in spec.values)]

    def most(self, answers: np.ndarray) -> int:
        """Which answer is explained where nobody says."""
        return int(answers.argmax())

    def name(self, spec: TaskSpec, index: int) -> str:
        """Of an answer that is explained."""
        return str(spec.values[index])

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        """What was explained, in a few words."""
        return f"{spec.target} {target}, probability {answer:.2f}"

    @abstractmethod
    def promise(self, spec: TaskSpec) -> str:
        """What a bundle answers, for its card."""

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        """See Kind.shortcut_columns."""
        known = np.isfinite(truth)
        hot = np.where(known[:, None], truth[:, None] == np.arange(spec.classes), np.nan)
        return True, [("", hot[:, 1:], answers[:, 1:]) if spec.classes == 2 else ("", hot, answers)]


class Value(Sort):
    """A number with a unit."""

    primary, probable = ("mae", False), False

    def read(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        return np.array([read_number(session, spec.target, spec.unit)], np.float32)

    def shown(self, truth: np.ndarray, spec: TaskSpec) -> str:
        return " ".join("" if not math.isfinite(t) else f"{t:g}" for t in truth)

    def given(self, answers: np.ndarray) -> np.ndarray:
        return answers[:, 0]

    def strata(self, right: np.ndarray) -> list[Any] | None:
        return None

    def fold_strata(self, answers: dict[str, np.ndarray]) -> dict[str, str]:
        return dict(strata_of({subject: float(answer[0]) for subject, answer in answers.items()}, _QUANTILES))

    def counted(self, answers: Sequence[np.ndarray], spec: TaskSpec) -> list[tuple[str, int]]:
        return []

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        return value_scores()

    def good(self, right: float | np.ndarray, given: np.ndarray) -> float:
        return float(abs(np.ravel(given)[0] - right))

    def outputs(self, spec: TaskSpec) -> int:
        return 1

    def check(self, spec: TaskSpec) -> None:
        if spec.values:
            raise ConfigError(f"task.values={list(spec.values)}: expected none for a regression")

    def errors(self, task: Any, logits: Tensor, answer: Tensor) -> Tensor:
        return F.smooth_l1_loss(logits, (answer - task.mean) / task.std, reduction="none")

    def decode(self, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        return mean + std * logits[:, 0]

    def asked(self, logits: Tensor, index: int) -> Tensor:
        return logits[0]

    def heads(
        self, x: np.ndarray, y: np.ndarray, spec: TaskSpec, event: Event, value: Event
    ) -> list[tuple[np.ndarray, float]]:
        return [value(y[:, 0])]

    def prior(self, y: np.ndarray, spec: TaskSpec, balanced: bool, mean: float, std: float) -> np.ndarray:
        return np.array([(y[:, 0].mean() - mean) / std])

    def losses(self, y: np.ndarray, answer: np.ndarray, spec: TaskSpec, balanced: bool) -> np.ndarray:
        return np.abs(answer - y[:, 0])

    def recentre(self, tuned: Any, task: Any) -> None:
        tuned.out.weight.mul_(tuned.std / task.std)
        tuned.out.bias.copy_((tuned.out.bias * tuned.std + tuned.mean - task.mean) / task.std)
        tuned.mean.copy_(task.mean)
        tuned.std.copy_(task.std)

    def joined(self, raw: np.ndarray, spec: TaskSpec, decisions: Decisions) -> np.ndarray:
        return np.atleast_1d(apply_bias(raw.mean(axis=0), decisions.bias))

    def answered(
        self, found: np.ndarray, spec: TaskSpec, decisions: Decisions, contrasts: tuple[str, ...]
    ) -> SessionAnswer:
        value = float(found[0])
        half = conformal_quantile(np.asarray(decisions.residuals), LEVEL) if decisions.residuals else math.inf
        low, high = (value - half, value + half) if math.isfinite(half) else (None, None)
        return SessionAnswer(spec.target, value, None, spec.unit, low, high, contrasts)

    def columns(self, spec: TaskSpec) -> list[str]:
        return ["answer", "low", "high"]

    def most(self, answers: np.ndarray) -> int:
        return 0

    def name(self, spec: TaskSpec, index: int) -> str:
        return spec.target

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        return f"{spec.target} {answer:.3g} {spec.unit}".rstrip()

    def promise(self, spec: TaskSpec) -> str:
        unit = f" in {spec.unit}" if spec.unit else ""
        return f"`{spec.target}`{unit}, one value for the session, with a prediction interval where enough cases allow"

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        return False, [("", truth, answers)]


class OneClass(Sort):
    """One class of two or more."""

    primary = ("auroc", True)

    def read(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        return np.array([read_class(session, spec.target, spec.values)], np.float32)

    def shown(self, truth: np.ndarray, spec: TaskSpec) -> str:
        return str(spec.values[int(truth[0])])

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        return class_scores(spec.classes)

    def good(self, right: float | np.ndarray, given: np.ndarray) -> float:
        return float(given[int(right)])

    def errors(self, task: Any, logits: Tensor, answer: Tensor) -> Tensor:
        classes = answer[:, 0].long()
        return (task.class_weights[classes] * self._each(task, logits, classes))[:, None]

    def _each(self, task: Any, logits: Tensor, classes: Tensor) -> Tensor:
        target = task.smoothed(F.one_hot(classes, task.spec.classes).float(), task.spec.classes)
        return -(target * F.log_softmax(logits, dim=1)).sum(dim=1)

    def decode(self, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        return torch.softmax(logits, dim=1)

    def asked(self, logits: Tensor, index: int) -> Tensor:
        return log_odds(logits[None], index)[0]

    def heads(
        self, x: np.ndarray, y: np.ndarray, spec: TaskSpec, event: Event, value: Event
    ) -> list[tuple[np.ndarray, float]]:
        if spec.classes == 2:
            weight, bias = event(y[:, 0])
            return [(-weight / 2, -bias / 2), (weight / 2, bias / 2)]
        return [event((y[:, 0] == k).astype(np.float64)) for k in range(spec.classes)]

    def prior(self, y: np.ndarray, spec: TaskSpec, balanced: bool, mean: float, std: float) -> np.ndarray:
        return np.log(self._shares(y, spec, balanced))

    def _shares(self, y: np.ndarray, spec: TaskSpec, balanced: bool) -> np.ndarray:
        share = np.bincount(y[:, 0].astype(int), minlength=spec.classes) + 0.5
        return np.ones(spec.classes) / spec.classes if balanced else share / share.sum()

    def losses(self, y: np.ndarray, answer: np.ndarray, spec: TaskSpec, balanced: bool) -> np.ndarray:
        classes = y[:, 0].astype(int)
        counts = np.bincount(classes, minlength=spec.classes)
        weight = len(y) / ((counts > 0).sum() * counts[classes]) if balanced else np.ones(len(y))
        return -weight * np.log(np.maximum(answer[np.arange(len(y)), classes], _LEAST))

    def promise(self, spec: TaskSpec) -> str:
        values = ", ".join(str(v) for v in spec.values)
        return f"`{spec.target}`, one of {values} for the session, with a probability for each"


class OrderedClass(OneClass):
    """One class of several in an order: the head tells for each threshold whether it is passed.

    Thresholds are learned apart and may cross: each is taken to be no more likely passed than those before it, so that
    no class gets a negative probability.
    """

    primary = ("quadratic_kappa", True)

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        return class_scores(spec.classes, ordered=True)

    def outputs(self, spec: TaskSpec) -> int:
        return spec.classes - 1

    def _each(self, task: Any, logits: Tensor, classes: Tensor) -> Tensor:
        steps = torch.arange(logits.shape[1], device=logits.device)
        target = task.smoothed((classes[:, None] > steps).float(), 2)
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)

    def decode(self, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        p = torch.sigmoid(logits)
        steps = [p[:, k : k + 1] for k in range(int(p.shape[1]))]
        for k in range(1, len(steps)):  # a cumulated minimum, which ONNX does not know
            steps[k] = torch.minimum(steps[k - 1], steps[k])
        beyond = torch.cat(steps, dim=1)
        ones, zeros = torch.ones_like(beyond[:, :1]), torch.zeros_like(beyond[:, :1])
        return torch.cat([ones, beyond], dim=1) - torch.cat([beyond, zeros], dim=1)

    def asked(self, logits: Tensor, index: int) -> Tensor:
        # the steps up to the class count for it and those beyond it against it
        return logits[:index].sum() - logits[index:].sum()

    def heads(
        self, x: np.ndarray, y: np.ndarray, spec: TaskSpec, event: Event, value: Event
    ) -> list[tuple[np.ndarray, float]]:
        return [event((y[:, 0] > k).astype(np.float64)) for k in range(spec.classes - 1)]

    def prior(self, y: np.ndarray, spec: TaskSpec, balanced: bool, mean: float, std: float) -> np.ndarray:
        beyond = self._shares(y, spec, balanced)[::-1].cumsum()[::-1][1:]
        return np.log(beyond / (1 - beyond))

    def promise(self, spec: TaskSpec) -> str:
        values = ", ".join(str(v) for v in spec.values)
        return f"`{spec.target}`, one of {values} (in this order) for the session, with a probability for each"

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        if answers.ndim == 2:  # the expected step
            answers = answers @ np.arange(answers.shape[1])
        return False, [("", truth, answers)]


class Labels(Sort):
    """Several labels, each of which is there or not, or unknown."""

    primary, several = ("auroc", True), True

    def read(self, session: HasColumns, spec: TaskSpec) -> np.ndarray:
        return read_labels(session, spec.values)

    def shown(self, truth: np.ndarray, spec: TaskSpec) -> str:
        return " ".join("" if not math.isfinite(t) else f"{t:g}" for t in truth)

    def right(self, truth: np.ndarray) -> np.ndarray:
        return truth

    def strata(self, right: np.ndarray) -> list[Any] | None:
        return None

    def counted(self, answers: Sequence[np.ndarray], spec: TaskSpec) -> list[tuple[str, int]]:
        return []

    def scores(self, spec: TaskSpec) -> dict[str, Score]:
        return label_scores([str(value) for value in spec.values])

    def good(self, right: float | np.ndarray, given: np.ndarray) -> float:
        known = np.isfinite(right)
        return float(1 - np.abs(given[known] - np.asarray(right)[known]).mean())

    def check(self, spec: TaskSpec) -> None:
        if spec.classes < 1 or len(set(spec.values)) != spec.classes:
            raise ConfigError(f"task.values={list(spec.values)}: expected at least 1 columns, all distinct")

    def weights(self, values: np.ndarray, spec: TaskSpec) -> np.ndarray:
        """A label's positive cases weigh what there are negatives for each of them."""
        positive, negative = (values == 1).sum(axis=0), (values == 0).sum(axis=0)
        weights = np.where((positive > 0) & (negative > 0), negative / np.maximum(positive, 1), 1.0)
        return np.clip(weights, 1 / _MOST_WEIGHT, _MOST_WEIGHT)

    def errors(self, task: Any, logits: Tensor, answer: Tensor) -> Tensor:
        weight = 1 + (task.class_weights - 1) * answer
        return weight * F.binary_cross_entropy_with_logits(logits, task.smoothed(answer, 2), reduction="none")

    def decode(self, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        return torch.sigmoid(logits)

    def asked(self, logits: Tensor, index: int) -> Tensor:
        return logits[index]

    def heads(
        self, x: np.ndarray, y: np.ndarray, spec: TaskSpec, event: Event, value: Event
    ) -> list[tuple[np.ndarray, float]]:
        return [event(y[:, t]) for t in range(y.shape[1])]

    def prior(self, y: np.ndarray, spec: TaskSpec, balanced: bool, mean: float, std: float) -> np.ndarray:
        yes, known = np.nansum(y, axis=0) + 0.5, np.isfinite(y).sum(axis=0) + 1
        return np.zeros(y.shape[1]) if balanced else np.log(yes / (known - yes))

    def losses(self, y: np.ndarray, answer: np.ndarray, spec: TaskSpec, balanced: bool) -> np.ndarray:
        known = np.isfinite(y)
        right = np.where(y > 0.5, answer, 1 - answer)
        weight = _label_weights(y) if balanced else known.astype(float)
        return -(weight * np.log(np.maximum(right, _LEAST)) * known).sum(axis=1) / y.shape[1]

    def chosen(self, named: dict[str, float]) -> str | list[str]:
        return [name for name, p in named.items() if p > 0.5]

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        return f"{target}, probability {answer:.2f}"

    def promise(self, spec: TaskSpec) -> str:
        values = ", ".join(str(v) for v in spec.values)
        return f"which of {values} the session shows, with a probability for each (`{spec.target}`)"

    def shortcut_columns(
        self, truth: np.ndarray, answers: np.ndarray, spec: TaskSpec
    ) -> tuple[bool, list[tuple[str, np.ndarray, np.ndarray]]]:
        return True, [(str(name), truth[:, [t]], answers[:, [t]]) for t, name in enumerate(spec.values)]


_VALUE, _ONE_CLASS = Value(), OneClass()
_BY_MODE: dict[str, Sort] = {"exclusive": _ONE_CLASS, "ordinal": OrderedClass(), "multilabel": Labels()}


def sort_of(spec: TaskSpec) -> Sort:
    """Raises: ValueError where the task does not answer for whole heads."""
    if spec.kind == "regression":
        return _VALUE
    if spec.kind == "classification":
        return _BY_MODE.get(spec.mode, _ONE_CLASS)
    raise ValueError(f"a task of kind {spec.kind} has no scan-level scores")


def read_session(session: HasColumns, spec: TaskSpec) -> np.ndarray:
    """[T] float32: a class index, a 0 or 1 for each label (NaN where unknown), or a value.

    Raises:
        Unusable: where the session has no answer, or none that suits the task.
        ManifestError: for an age that nobody has.
    """
    return sort_of(spec).read(session, spec)


def decode_logits(spec: TaskSpec, logits: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Logits [B, T'] as ``WholeHeadTask.decode`` gives them."""
    return sort_of(spec).decode(logits, mean, std)


def _label_weights(y: np.ndarray) -> np.ndarray:
    """[N, T]: of each label, those that have it and those that have not count alike."""
    known, yes = np.isfinite(y), (y > 0.5).sum(axis=0)
    no = known.sum(axis=0) - yes
    each = np.where(y > 0.5, np.maximum(yes, 1), np.maximum(no, 1))
    return np.where(known, known.sum(axis=0) / (((yes > 0).astype(int) + (no > 0)) * each), 0.0)


def linear_head(
    x: np.ndarray,
    answers: np.ndarray,
    spec: TaskSpec,
    mean: float = 0.0,
    std: float = 1.0,
    balanced: bool = True,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights [T', F] and biases [T'] of a last layer whose logits are those of a regularised linear model.

    A ridge regression of the standardised value; a logistic regression of the classes, of each threshold between
    ordered classes, or of each label. The penalty is chosen by cross-validation by subject, and is strong where there
    are too few cases to choose.

    Args:
        x: [N, F] standardised features.
        answers: [N, T], NaN where unknown.
        spec: of an answer for a whole head.
        mean, std: of a regression's values.
        balanced: whether every class counts alike.
        groups: [N] the subject of each row; None: each row is a subject's only one.
        seed: of the folds that choose the penalty.
    """
    from threadpoolctl import threadpool_limits  # sums must not depend on the number of cores

    x, y = np.asarray(x, dtype=np.float64), np.asarray(answers, dtype=np.float64)
    who = [str(row) for row in range(len(y))] if groups is None else list(groups)
    with threadpool_limits(1):
        heads = sort_of(spec).heads(
            x, y, spec, lambda so: event_head(x, so, who, seed, balanced),
            lambda values: value_head(x, (values - mean) / std, who, seed),
        )  # fmt: skip
    return np.stack([weight for weight, _ in heads]), np.array([bias for _, bias in heads])
