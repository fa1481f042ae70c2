"""Baselines of an answer for a whole head: simple models on simple numbers, and an encoder never trained.

Each learns from the training side of a split alone, the strength of its penalty and the threshold of its classes
included. Only the imputation of numbers that some cases lack looks at all cases; it looks at no label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from brainfm.data.store import SessionEntry, Store
from brainfm.nets.backbone import Backbone
from brainfm.nets.untrained import random_backbone
from brainfm.scoring.linear import standardised, tuned
from brainfm.specs import TaskSpec
from brainfm.study.descriptors import Described, describe_all, table
from brainfm.tasks.whole_head.cases import views_of
from brainfm.tasks.whole_head.sorts import sort_of

Split = tuple[Sequence[int], Sequence[int]]  # places of the cases that are learned from, and of those held out

_FARTHEST = 4.0  # deviations from the mean; what lies beyond is put there


class HeadLike(Protocol):
    """What is asked of a case."""

    @property
    def session(self) -> SessionEntry: ...

    @property
    def scans(self) -> tuple[tuple[str, ...], ...]: ...


def feature_baseline(
    store: Store,
    cases: Sequence[HeadLike],
    truth: np.ndarray,
    splits: Sequence[Split],
    spec: TaskSpec,
    seed: int,
    *,
    described: Sequence[Described] | None = None,
    regions: Sequence[str] | None = None,
) -> np.ndarray:
    """Answers of ridge (values) or logistic regression (classes) on intensities, outline and region volumes.

    Args:
        truth: [N] class indices or values, or [N, T] of several labels with NaN where unknown.
        splits: places in ``cases``; no subject on both sides of one.
        described: what `describe_all` says of the cases, with the regions wanted, where it is known already.
        regions: names of label volumes whose structures' volumes are looked at; None: `region_labels`.

    Returns:
        [N, K] or [N, T] probabilities, or [N] values, from the split that holds a case out; NaN where none does.
    """
    if described is None:
        chosen = region_labels(cases, spec) if regions is None else regions
        scans = [case.scans for case in cases]
        described = describe_all(store, [case.session for case in cases], spec.contrasts, scans, chosen)
    x = table([row.numbers["content"] for row in described])[0]
    return linear_answers(x, truth, [case.session.subject_key for case in cases], splits, spec, seed)


def region_labels(cases: Sequence[HeadLike], spec: TaskSpec) -> tuple[str, ...]:
    """The anatomical label maps (``*_labels``) that every case has, but for what is itself asked for."""
    shared = set.intersection(*({label.name for label in case.session.labels} for case in cases))
    return tuple(sorted(name for name in shared if name.endswith("_labels") and name != f"{spec.target}_labels"))


def random_linear_heads(
    store: Store,
    cases: Sequence[HeadLike],
    truth: np.ndarray,
    splits: Sequence[Split],
    spec: TaskSpec,
    seed: int,
    *,
    backbone_config: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The same on the features of an encoder whose weights are as they were drawn; see `feature_baseline`."""
    backbone = random_backbone(backbone_config, seed).to(device)
    x = pooled_features(backbone, store, cases, spec)
    return linear_answers(x, truth, [case.session.subject_key for case in cases], splits, spec, seed)


def linear_answers(
    x: np.ndarray, truth: np.ndarray, groups: Sequence[str], splits: Sequence[Split], spec: TaskSpec, seed: int
) -> np.ndarray:
    """Answers to held-out rows of features ``x`` [N, F]; see `feature_baseline`.

    The penalty is chosen by subject inside the training side. A label that is unknown for all of that side is NaN.
    """
    truth = np.asarray(truth, np.float64)
    if not x.shape[1]:
        x = np.zeros((len(truth), 1))  # nothing varies: the answer is the training side's share or mean
    sort = sort_of(spec)
    columns = truth if sort.several else truth[:, None]
    width = truth.shape[1] if sort.several else max(1, spec.classes)
    answers = np.full((len(truth), width), np.nan)
    for trained, held in splits:
        for t in range(columns.shape[1]):
            rows = [r for r in trained if np.isfinite(columns[r, t])]
            if not rows or not len(held):
                continue
            who = [groups[r] for r in rows]
            # A number that hardly varies among the training rows would throw a held-out row any distance away.
            near, other = (np.clip(z, -_FARTHEST, _FARTHEST) for z in standardised(x[rows], x[list(held)]))
            y = columns[rows, t]
            if not sort.probable:
                answers[list(held), 0] = tuned(near, y, who, other, "ridge", seed).answers
                continue
            classes = 2 if sort.several else spec.classes
            given = tuned(near, y.astype(np.int64), who, other, "logistic", seed, classes=classes).answers
            if sort.several:
                answers[list(held), t] = given[:, 1]
            else:
                answers[list(held)] = given
    return sort.given(answers)


@torch.no_grad()
def pooled_features(backbone: Backbone, store: Store, cases: Sequence[HeadLike], spec: TaskSpec) -> np.ndarray:
    """What a frozen encoder says of each case: mean and deviation of its deepest map, or its class token where the spec
    pools that, for each contrast.

    Of the whole-head view and, where the spec has them, of the covering windows, averaged. A contrast that a case lacks
    has the mean of the cases that have it, and a column that says so.

    Returns:
        [N, F] float64; columns that never vary are left out.
    """
    device = next(backbone.parameters()).device
    rows = []
    for case in cases:
        image, present = views_of(store, case, spec)  # type: ignore[arg-type]  # it reads what HeadLike has
        whole = int(spec.view_mm > 0)
        numbers: dict[str, float] = {}
        for m in np.flatnonzero(present):
            pooled = []
            for view in image[:, m]:  # one at a time: memory is that of one view
                maps, said = backbone.summarised(torch.from_numpy(view)[None, None].float().to(device))
                flat = maps[-1].double()[0].flatten(1)
                both = torch.cat([flat.mean(dim=1), flat.std(dim=1, correction=0)])
                pooled.append((said[0].double() if spec.pooling == "token" else both).cpu().numpy())
            parts = {"whole": pooled[:whole], "crops": pooled[whole:]}
            for part, values in parts.items():
                if values:
                    mean = np.mean(values, axis=0)
                    numbers |= {f"{spec.contrasts[m]}/{part}{e:04d}": float(v) for e, v in enumerate(mean)}
        rows.append(numbers)
    return table(rows)[0]
