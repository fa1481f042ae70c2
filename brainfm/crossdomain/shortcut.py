"""A planted shortcut: a corner marker that goes with the finding in training alone, and the audit that finds it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from brainfm.crossdomain.adaptation import SupervisedMethod, predicted, supervised
from brainfm.crossdomain.episodes import Episode
from brainfm.crossdomain.features import tensors
from brainfm.crossdomain.layout import read_split
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.networks import Classifier, ImageNetwork
from brainfm.crossdomain.saliency import grad_cam
from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import Interval, bootstrap
from brainfm.seeds import stream

EDGE = 8  # the marker is an eighth of the image wide, in the upper left corner


class Marked(MedIMeta):
    """A data set of whose images some have the marker.

    Attributes:
        marks: bool [N].
    """

    marks: np.ndarray

    @classmethod
    def of(cls, items: MedIMeta, marks: np.ndarray) -> Marked:
        found = copy.copy(items)
        found.__class__ = cls
        assert isinstance(found, Marked)
        found.marks = np.asarray(marks, dtype=bool)
        return found

    def pixels(self, indices: object) -> np.ndarray:
        rows = np.asarray(indices, dtype=np.int64)
        pixels = super().pixels(rows)
        edge = max(2, pixels.shape[-1] // EDGE)
        pixels[np.flatnonzero(self.marks[rows]), :, :edge, :edge] = 255
        return pixels


def planted(truth: np.ndarray, seed: int, share: float = 0.9) -> np.ndarray:
    """bool [N]: the marker for this share of those with the finding, and the rest's share of those without."""
    draws = stream(seed, "planted marker").random(len(truth))
    return np.where(truth, draws < share, draws < 1 - share)


@dataclass(frozen=True)
class MarkerAudit:
    """What a marker does to a model's answers on images that it has not seen.

    Attributes:
        plain: AUROC without any marker.
        with_it, against: AUROC where those with the finding have the marker, and where those without have.
        gap: with_it - against, with its 95 % interval over images; above 0 the marker is read as the finding.
        moved: by how much the marker raises the answer, a mean over images.
        in_corner: share of the Grad-CAM maps of marked images that lies on the marker; a blind map has ``blind``.
    """

    plain: float
    with_it: float
    against: float
    gap: Interval
    moved: float
    in_corner: float
    blind: float

    @property
    def exposed(self) -> bool:
        """Whether the marker is a shortcut of this model: the gap is beyond the interval and a tenth of an AUROC or
        more, and answers move by .02 or more (those of an untrained network are so alike that anything reorders
        them)."""
        return bool(self.gap.low > 0 and self.gap.mean >= 0.1 and self.moved >= 0.02)


def corner_audit(
    model: Classifier, items: MedIMeta, rows: np.ndarray, column: int, size: int, device: str = "cpu", seed: int = 0,
    looked_at: int = 16,
) -> MarkerAudit:  # fmt: skip
    """Puts the marker on images and looks at how the answers change; needs no labels but those of these images.

    Args:
        rows: numbers of items that the model has not learnt from.
        column: of the answers and labels.
        looked_at: images whose maps are made.
    """
    truth = items.places[rows] if items.places.ndim == 1 else items.places[rows, column]
    truth = truth != 0
    everywhere = np.ones(len(items), dtype=bool)
    with_mark = Marked.of(items, everywhere)
    plain = predicted(model, items, rows, size, device)[:, column]
    marked = predicted(model, with_mark, rows, size, device)[:, column]
    helping, hindering = np.where(truth, marked, plain), np.where(truth, plain, marked)

    def gap(t: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
        return auroc(t, a) - auroc(t, b)

    found = bootstrap(gap, truth, helping, hindering, groups=[str(row) for row in rows], seed=seed, resamples=500)
    maps = grad_cam(model, tensors(model.network, with_mark, rows[:looked_at], size, device), column)
    edge = max(2, size // EDGE)
    total = maps.sum((1, 2))
    shares = maps[:, :edge, :edge].sum((1, 2))[total > 0] / total[total > 0]
    return MarkerAudit(
        auroc(truth, plain), auroc(truth, helping), auroc(truth, hindering), found, float((marked - plain).mean()),
        float(shares.mean()) if shares.size else 0.0, (edge / size) ** 2,
    )  # fmt: skip


def trained_on_markers(
    network: ImageNetwork, items: MedIMeta, training: SupervisedMethod, column: int, seed: int
) -> Classifier:
    """A classifier of a training split in which the marker goes with the finding, and of the validation split, too.

    Raises: DatasetError where a split is missing.
    """
    truth = items.places if items.places.ndim == 1 else items.places[:, column]
    marked = Marked.of(items, planted(truth != 0, seed))
    learnt, check = (np.flatnonzero(np.isin(items.rows, read_split(items.dataset, side))) for side in ("train", "val"))
    episode = Episode(learnt, check, items.places[learnt], items.places[check], tuple(range(len(items.classes))))
    return supervised(network, marked, episode, check, training, seed)[1]
