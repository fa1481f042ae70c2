"""Near-duplicates between the test split and what is learnt from: a leak that no label shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.statistics import shrunk

_EDGE = 32


@dataclass(frozen=True)
class Twin:
    """An image of the test split, the image most like it among the others, and their correlation at 32 x 32 pixels."""

    image: int
    other: int
    r: float


def twins(items: MedIMeta, test: np.ndarray, learnt: np.ndarray, least_r: float = 0.98) -> list[Twin]:
    """Images of the test split with a near-duplicate among those that are learnt from, the most alike first.

    Args:
        items: of the whole data set.
        test, learnt: numbers of items.
        least_r: correlation from which on two images count as one.
    """
    grey = np.concatenate([
        shrunk(items.pixels(np.arange(start, min(start + 64, len(items)))).mean(1, dtype=np.float32), _EDGE)
        for start in range(0, len(items), 64)
    ]).reshape(len(items), -1)  # fmt: skip
    grey -= grey.mean(axis=1, keepdims=True)
    grey /= np.maximum(np.linalg.norm(grey, axis=1, keepdims=True), 1e-6)
    found = []
    for image in test:
        r = grey[learnt] @ grey[image]
        best = int(np.argmax(r))
        if r[best] >= least_r:
            found.append(Twin(int(items.rows[image]), int(items.rows[learnt[best]]), float(r[best])))
    return sorted(found, key=lambda twin: -twin.r)
