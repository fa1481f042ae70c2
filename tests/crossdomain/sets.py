"""Small data sets in the MedIMeta layout with a task of every kind, drawn from numbers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brainfm.crossdomain.additions import About, AddedTask, Addition, write_dataset
from brainfm.crossdomain.layout import TaskTarget

SIDES = ("train", "train", "train", "val", "test", "test")


def images_of(classes: np.ndarray, edge: int, channels: int, seed: int) -> np.ndarray:
    """uint8 noise with a bright square whose place is the class's."""
    rng = np.random.default_rng(seed)
    shape = (len(classes), edge, edge) if channels == 1 else (len(classes), edge, edge, channels)
    pixels = rng.integers(0, 120, shape)
    for number, place in enumerate(classes):
        at = 2 + int(place) * (edge // 4)
        pixels[number, at : at + edge // 4, 2 : 2 + edge // 2] += 110
    return pixels.astype(np.uint8)


def write_set(root: Path, dataset_id: str = "toy", count: int = 60, edge: int = 32, channels: int = 1, seed: int = 0,
              **about: object) -> Path:  # fmt: skip
    """Tasks: kind (3 classes), sick (binary), signs (2 labels), grade (ordinal 0, 1, 4)."""
    rng = np.random.default_rng(seed)
    kind = np.arange(count) % 3
    images = images_of(kind, edge, channels, seed)
    signs = np.stack([kind == 1, rng.random(count) < 0.5], axis=1).astype(np.int64)
    tasks = [
        AddedTask("kind", TaskTarget.MULTICLASS_CLASSIFICATION, kind, {0: "round", 1: "flat", 2: "none"}),
        AddedTask("sick", TaskTarget.BINARY_CLASSIFICATION, (kind > 0).astype(np.int64), {0: "no", 1: "yes"}),
        AddedTask("signs", TaskTarget.MULTILABEL_CLASSIFICATION, signs, {0: "edge", 1: "haze"}),
        AddedTask("grade", TaskTarget.ORDINAL_REGRESSION, np.array([0, 1, 4])[kind], {0: "0", 1: "1", 4: "4"}),
    ]
    splits = [SIDES[(number // 3) % 6] for number in range(count)]
    addition = Addition(count, images.__getitem__, tasks, splits, ["train"] * count, [str(n) for n in range(count)])
    words = {"name": dataset_id.title(), "domain": f"Toys of {dataset_id}", "size": None, "channels": channels} | about
    return write_dataset(root, About(id=dataset_id, **words), addition)  # type: ignore[arg-type]
