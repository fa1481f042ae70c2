"""A task of the MedIMeta data sets as a torch dataset, under the names that users of the medimeta package know.

    from brainfm.crossdomain.medimeta import MedIMeta
    train = MedIMeta("data", "bus", "case category", split="train")
    image, label = train[0]

Items equal those of the package on the same files. Beside it, whole batches are read at once (`MedIMeta.batch`, and a
DataLoader's batches), objects go to spawned workers, and what contradicts itself is refused when it is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfm.crossdomain.images import Images, with_channels
from brainfm.crossdomain.layout import (
    SPLITS,
    DatasetInfo,
    TaskTarget,
    find,
    open_dataset,
    read_labels,
    read_soft_labels,
    read_split,
    task_of,
)

AT_ONCE = 16  # images that are converted together: more leave the processor's cache


@dataclass(frozen=True)
class TaskDescription:
    """What is asked, and of what: as the torchcross package names it."""

    task_target: TaskTarget
    classes: dict[int, str] | None = None
    task_identifier: str | None = None
    domain_identifier: str | None = None


class MedIMeta(Dataset):
    """Pairs of an image and a label.

    Args:
        data_path: folder of the data sets.
        dataset_id: as in info.yaml.
        task_name: as in info.yaml.
        split: of train, val and test, one or several; None: every image.
        original_split: the same of the splits that the images' authors made.
        transform: PIL image -> anything; None: float32 [C, H, W] from -1 to 1.
        use_hdf5: whether to read images.hdf5, else the TIFF files.

    Attributes:
        labels: int64 [N], [N, 1] (binary) or [N, L] (multi-label).
        places: int64 [N] the class's place from 0 on, ascending by value; or [N, L] labels.
        targets: float32 [N, L] labels in [0, 1], NaN where unknown, of a data set that has soft labels; else None.
        rows: numbers of the images in the data set, ascending.
        num_channels: of the images that come out, 1 or 3; may be set.

    Raises:
        DatasetError: where anything of the data set that is asked for is missing or contradicts the rest.
        ValueError: for a split and an original split at once.
    """

    def __init__(
        self,
        data_path: str | Path,
        dataset_id: str,
        task_name: str,
        split: str | Sequence[str] | None = None,
        original_split: str | Sequence[str] | None = None,
        transform: Callable[[Any], Any] | None = None,
        use_hdf5: bool = True,
    ) -> None:
        if split is not None and original_split is not None:
            raise ValueError("expected split or original_split, found both")
        self.data_path, self.dataset_id, self.task_name = data_path, dataset_id, task_name
        self.split, self.original_split, self.transform, self.use_hdf5 = split, original_split, transform, use_hdf5
        self.dataset: DatasetInfo = open_dataset(data_path, dataset_id)
        self.task = task_of(self.dataset, task_name)
        self.num_channels = self.dataset.channels
        labels = read_labels(self.dataset, self.task)
        soft = read_soft_labels(self.dataset, self.task) if labels.ndim == 2 else None
        wanted = split if split is not None else original_split
        self.rows = np.arange(len(labels)) if wanted is None else read_split(self.dataset, wanted, split is None)
        self.places = self.task.places(labels)[self.rows]
        self.targets = None if soft is None else soft[self.rows]
        binary = self.task_target is TaskTarget.BINARY_CLASSIFICATION
        self.labels = labels[self.rows, None] if binary else labels[self.rows]
        self.images = Images(self.dataset, use_hdf5)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        row = range(len(self))[index]
        label = torch.as_tensor(self.labels[row])
        if self.transform is None:
            return self.batch([row])[0], label
        return self.transform(_picture(self.images.read(self.rows[[row]])[0], self.num_channels)), label

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Tensor]]:
        """What a DataLoader asks for: a batch in one read."""
        if self.transform is not None:
            return [self[index] for index in indices]
        return list(zip(self.batch(indices), torch.as_tensor(self.labels[list(indices)])))

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [B, num_channels, H, W] of items."""
        return with_channels(self.images.read(self.rows[np.asarray(indices, dtype=np.int64)]), self.num_channels)

    def batch(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """float32 [B, num_channels, H, W] of items, from -1 to 1."""
        indices = np.asarray(indices, dtype=np.int64)
        found = torch.empty(len(indices), self.num_channels, self.dataset.height, self.dataset.width)
        for start in range(0, len(indices), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            found[part].copy_(torch.from_numpy(self.pixels(indices[part]))).div_(255).sub_(0.5).div_(0.5)
        return found

    def fingerprint(self) -> str:
        """Of the labels, the splits and the images: what tells a data set from another of its name."""
        found = hashlib.sha256(self.places.tobytes() + repr((self.task.classes, self.input_size)).encode())
        for split in SPLITS:
            if (self.dataset.folder / "splits" / f"{split}.txt").is_file():
                found.update(read_split(self.dataset, split).tobytes())
        found.update(self.images.fingerprint().encode())
        return found.hexdigest()[:16]

    @property
    def task_target(self) -> TaskTarget:
        return self.task.target

    @property
    def classes(self) -> dict[int, str]:
        """Value, or column of several labels -> name."""
        return dict(self.task.classes)

    @property
    def info(self) -> dict[str, Any]:
        """info.yaml as it stands."""
        return dict(self.dataset.raw)

    @property
    def dataset_name(self) -> str:
        return self.dataset.name

    @property
    def domain_identifier(self) -> str:
        return self.dataset.domain

    @property
    def task_identifier(self) -> str:
        return f"{self.dataset.name}: {self.task_name}"

    @property
    def task_description(self) -> TaskDescription:
        return TaskDescription(self.task_target, self.classes, self.task_identifier, self.domain_identifier)

    @property
    def input_size(self) -> list[int]:
        """Channels, height, width on disk."""
        return [self.dataset.channels, self.dataset.height, self.dataset.width]

    @property
    def split_indices(self) -> list[int]:
        return [int(row) for row in self.rows]

    @staticmethod
    def get_available_datasets(data_path: str | Path) -> list[str]:
        """Ids, alphabetical."""
        return list(find(data_path)[0])

    @staticmethod
    def get_available_tasks(data_path: str | Path) -> dict[str, list[str]]:
        """Id -> names of its tasks, the main one first."""
        return {name: list(info.tasks) for name, info in find(data_path)[0].items()}

    @staticmethod
    def get_info_dict(data_path: str | Path, dataset_id: str) -> dict[str, Any]:
        return dict(open_dataset(data_path, dataset_id).raw)


def _picture(pixels: np.ndarray, channels: int) -> Any:
    """A PIL image with so many channels."""
    from PIL import Image

    image = Image.fromarray(pixels)
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)
