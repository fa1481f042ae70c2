"""Faults of a data set in the MedIMeta layout, all of them at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from brainfm.crossdomain.images import Images
from brainfm.crossdomain.layout import INFO, SPLITS, DatasetInfo, TaskInfo, read_labels, read_split
from brainfm.errors import DatasetError


def check(info: DatasetInfo, tiff: bool = False) -> list[str]:
    """Every fault of a data set, a sentence each: labels, splits, images, classes that a split lacks.

    Args:
        tiff: whether its TIFF files are looked at in place of images.hdf5.
    """
    faults: list[str] = []

    def tried(read: Any, *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except DatasetError as error:
            faults.append(str(error))
            return None

    labels = {name: tried(read_labels, info, task) for name, task in info.tasks.items()}
    seen: dict[int, str] = {}
    for split in SPLITS:
        path = info.folder / "splits" / f"{split}.txt"
        rows = tried(read_split, info, split) if path.is_file() else None
        if rows is None:
            continue
        counts = info.raw.get("splits_num_samples")
        if isinstance(counts, dict) and counts.get(split, len(rows)) != len(rows):
            faults.append(f"{path}: names {len(rows)} images, expected {counts[split]} as {INFO} says")
        shared = [row for row in rows.tolist() if row in seen]
        if shared:
            faults.append(f"{path}: image {shared[0]} is also in {seen[shared[0]]}, expected one split an image")
        seen |= dict.fromkeys(rows.tolist(), split)
        for name, values in labels.items():
            if values is not None:
                faults += [f"{path}: {words}" for words in _absent(info.tasks[name], values[rows])]
    if not seen:
        faults.append(f"{info.folder / 'splits'}: holds no split, expected train.txt, val.txt and test.txt")
    images = tried(Images, info, not tiff)
    if images is not None:
        images.close()
    return faults


def _absent(task: TaskInfo, labels: np.ndarray) -> list[str]:
    """What a split lacks of a task."""
    if labels.ndim == 2:
        lacking = [name for column, name in task.classes.items() if len(np.unique(labels[:, column])) < 2]
    else:
        lacking = [name for value, name in task.classes.items() if not (labels == value).any()]
    missing = "both answers of the label" if labels.ndim == 2 else "an image of class"
    return [f"task {task.name!r} has not {missing} {lacking[0]!r}, expected every class"] if lacking else []
