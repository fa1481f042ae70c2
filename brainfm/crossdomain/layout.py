"""The MedIMeta layout on disk: what info.yaml, splits and label arrays say, checked against each other.

``ROOT/ID/{info.yaml, images.hdf5, images/NNNNNN.tiff, splits/SPLIT.txt, original_splits/SPLIT.txt,
task_labels/TASK.npy, annotations.csv}``; a row of a label array and of images.hdf5 is the image of that number. Beside
the published layout, ``soft_labels/TASK.npy`` may hold what labels cannot: float32, NaN where nobody knows.

Source: Woerner et al. 2024 (arXiv 2404.16000) and the data sets of doi 10.5281/zenodo.7884735.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.errors import DatasetError
from brainfm.files import read_array

INFO, IMAGES, ANNOTATIONS = "info.yaml", "images.hdf5", "annotations.csv"
SPLITS = ("train", "val", "test")
_KEYS = ("id", "name", "domain", "tasks", "input_size", "total_num_samples")
_OPTIONAL = (
    "summary", "splits_num_samples", "original_splits_num_samples", "domain_overlaps", "subject_overlaps", "license",
    "project_website", "download_url", "DOI", "original_data",
)  # fmt: skip
_TASK_KEYS = ("task_name", "task_target", "labels")
_IMAGE = re.compile(r"images/(\d{6,})\.tiff")


class TaskTarget(Enum):
    """What a task asks for, by the names that info.yaml has for it."""

    MULTICLASS_CLASSIFICATION = auto()
    BINARY_CLASSIFICATION = auto()
    MULTILABEL_CLASSIFICATION = auto()
    ORDINAL_REGRESSION = auto()


@dataclass(frozen=True)
class TaskInfo:
    """A task of a data set.

    Attributes:
        name: also of its label file.
        target: what it asks for.
        classes: value -> name, in the order of the file; of several labels the column -> name. Ordinal values need
            not be contiguous.
    """

    name: str
    target: TaskTarget
    classes: Mapping[int, str]

    @property
    def outputs(self) -> int:
        """Columns of an answer: classes, labels, or 1 for a binary task."""
        return 1 if self.target is TaskTarget.BINARY_CLASSIFICATION else len(self.classes)

    def places(self, labels: np.ndarray) -> np.ndarray:
        """Labels [N] as places 0..K-1 of their values in ascending order; labels [N, L] as they are."""
        return labels if labels.ndim == 2 else np.searchsorted(sorted(self.classes), labels)


@dataclass(frozen=True)
class DatasetInfo:
    """What info.yaml says of a data set.

    Attributes:
        folder: of the data set.
        raw: the file's own words.
        tasks: by name; the first is the main one.
        channels, height, width: of its images.
        total: number of images.
        overlaps: ids of data sets of the same domain or of the same people.
    """

    folder: Path
    raw: Mapping[str, Any]
    tasks: Mapping[str, TaskInfo]
    channels: int
    height: int
    width: int
    total: int
    overlaps: frozenset[str]

    @property
    def id(self) -> str:
        return str(self.raw["id"])

    @property
    def name(self) -> str:
        return str(self.raw["name"])

    @property
    def domain(self) -> str:
        return str(self.raw["domain"])

    @property
    def main_task(self) -> str:
        return next(iter(self.tasks))


def find(root: str | Path) -> tuple[dict[str, DatasetInfo], list[DatasetError]]:
    """The data sets below a folder, by id in alphabetical order, and the faults of those that cannot be read: one
    broken file does not hide the others.

    Raises: DatasetError where there is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder, expected data sets in the MedIMeta layout")
    found: dict[str, DatasetInfo] = {}
    faults: list[DatasetError] = []
    for path in sorted(root.glob(f"[!.]*/{INFO}")):  # a hidden folder is one that was left half written
        try:
            info = read_info(path.parent)
            if info.id in found:
                raise DatasetError(f"{path}: id {info.id!r} is also that of {found[info.id].folder}, expected its own")
            found[info.id] = info
        except DatasetError as error:
            faults.append(error)
    return found, faults


def open_dataset(root: str | Path, dataset_id: str) -> DatasetInfo:
    """One data set by its id. Raises: DatasetError, of this data set alone."""
    beside = Path(root) / dataset_id
    if (beside / INFO).is_file():
        info = read_info(beside)
        if info.id == dataset_id:
            return info
    found, faults = find(root)
    if dataset_id not in found:
        raise absent(root, dataset_id, found, faults)
    return found[dataset_id]


def absent(
    root: str | Path, dataset_id: str, found: Mapping[str, DatasetInfo], faults: Sequence[DatasetError]
) -> DatasetError:
    """Why a data set is not among those that `find` gives: its own fault, or that it is not there."""
    beside = str(Path(root) / dataset_id / INFO)
    own = [fault for fault in faults if str(fault).startswith(beside)]
    there = f"expected one of {', '.join(found)}" if found else "nor any other"
    return own[0] if own else DatasetError(f"{root}: holds no data set {dataset_id!r}, {there}")


def read_info(folder: Path) -> DatasetInfo:
    """Raises: DatasetError naming the key that is missing, unknown or of another type."""
    import yaml

    path = folder / INFO
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file, expected the description of a data set") from None
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:  # ValueError: no UTF-8, a date that is none
        raise DatasetError(f"{path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise DatasetError(f"{path}: holds {type(raw).__name__}, expected keys like id, name, domain and tasks")
    _check_keys(path, raw, _KEYS, _OPTIONAL)
    for key in ("id", "name", "domain"):
        if not _is_word(raw[key]):
            raise DatasetError(f"{path}: {key}={_shown(raw[key])}, expected text")
    check_file_name(str(raw["id"]), f"{path}: id")
    size = raw["input_size"]
    if not (isinstance(size, list) and len(size) == 3 and all(_is_count(n) for n in size) and size[0] in (1, 3)):
        raise DatasetError(f"{path}: input_size={size}, expected [1 or 3, height, width]")
    if not _is_count(raw["total_num_samples"]):
        raise DatasetError(f"{path}: total_num_samples={raw['total_num_samples']}, expected a number of images above 0")
    if not isinstance(raw["tasks"], list) or not raw["tasks"]:
        raise DatasetError(f"{path}: tasks={raw['tasks']}, expected a list of at least one task")
    tasks = [_task(path, task) for task in raw["tasks"]]
    if len({task.name for task in tasks}) < len(tasks):
        raise DatasetError(f"{path}: two tasks have one name, expected each task_name once")
    overlaps: set[str] = set()
    for key in ("domain_overlaps", "subject_overlaps"):
        named = raw.get(key) or []
        if not isinstance(named, list) or not all(map(_is_word, named)):
            raise DatasetError(f"{path}: {key}={_shown(named)}, expected a list of ids of data sets")
        overlaps |= {str(name) for name in named}
    return DatasetInfo(
        folder,
        raw,
        {task.name: task for task in tasks},
        size[0],
        size[1],
        size[2],
        raw["total_num_samples"],
        frozenset(overlaps),
    )


def check_file_name(name: str, what: str) -> None:
    """Raises: DatasetError for a name that would lead out of the folder in which what is called so is kept."""
    if not name or Path(name).name != name or name.startswith(".") or not name.isprintable():
        raise DatasetError(f"{what} {name!r}: expected the name of a file or folder, without folders before it")


def _task(path: Path, raw: Any) -> TaskInfo:
    if not isinstance(raw, dict):
        raise DatasetError(f"{path}: a task is {raw!r}, expected the keys {', '.join(_TASK_KEYS)}")
    _check_keys(path, raw, _TASK_KEYS, ())
    name, target, labels = (raw[key] for key in _TASK_KEYS)
    if not _is_word(name):
        raise DatasetError(f"{path}: task_name={_shown(name)}, expected text")
    check_file_name(str(name), f"{path}: task")
    if not isinstance(target, str) or target not in TaskTarget.__members__:
        legal = ", ".join(TaskTarget.__members__)
        raise DatasetError(f"{path}: task_target {target!r} of task {name!r}, expected one of {legal}")
    whole = isinstance(labels, dict) and all(
        isinstance(k, int) and not isinstance(k, bool) and isinstance(v, (str, int, float)) for k, v in labels.items()
    )
    if not whole or len(labels) < (1 if target == TaskTarget.MULTILABEL_CLASSIFICATION.name else 2):
        raise DatasetError(f"{path}: labels of task {name!r} are {labels}, expected a name for each whole number")
    numbers = sorted(labels)
    if target != TaskTarget.ORDINAL_REGRESSION.name and numbers != list(range(len(numbers))):
        raise DatasetError(f"{path}: labels of task {name!r} are {numbers}, expected 0 to {len(numbers) - 1}")
    if target == TaskTarget.BINARY_CLASSIFICATION.name and len(labels) != 2:
        raise DatasetError(f"{path}: binary task {name!r} has {len(labels)} labels, expected 2")
    return TaskInfo(str(name), TaskTarget[target], {k: str(v) for k, v in labels.items()})


def _check_keys(path: Path, raw: Mapping[str, Any], needed: Sequence[str], optional: Sequence[str]) -> None:
    missing = [key for key in needed if key not in raw]
    unknown = [str(key) for key in raw if key not in needed and key not in optional]
    if missing:
        raise DatasetError(
            f"{path}: key {missing[0]!r} is missing{f' (found {unknown[0]!r})' if unknown else ''}, "
            f"expected {', '.join(needed)}"
        )
    if unknown:
        raise DatasetError(f"{path}: unknown key {unknown[0]!r}, expected one of {', '.join((*needed, *optional))}")


def _is_word(value: Any) -> bool:
    """Whether it is text, or a number that YAML made of it."""
    return (isinstance(value, (str, int, float)) and not isinstance(value, bool)) and str(value).strip() != ""


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


# ---- arrays beside it ------------------------------------------------------------------------------------------------


def task_of(info: DatasetInfo, name: str) -> TaskInfo:
    """Raises: DatasetError where the data set has no such task."""
    if name not in info.tasks:
        raise DatasetError(f"{info.folder / INFO}: has no task {name!r}, expected one of {', '.join(info.tasks)}")
    return info.tasks[name]


def read_labels(info: DatasetInfo, task: TaskInfo) -> np.ndarray:
    """Labels of all images: int64 [N], or [N, L] of 0 and 1.

    Raises: DatasetError for a missing file, another shape, or a value that info.yaml does not name.
    """
    path = info.folder / "task_labels" / f"{task.name}.npy"
    labels = _array(path)
    multilabel = task.target is TaskTarget.MULTILABEL_CLASSIFICATION
    expected = (info.total, len(task.classes)) if multilabel else (info.total,)
    if not multilabel and labels.shape == (info.total, 1):
        labels = labels[:, 0]
    if labels.shape != expected:
        raise DatasetError(f"{path}: has the shape {list(labels.shape)}, expected {list(expected)} as {INFO} says")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DatasetError(f"{path}: holds {labels.dtype}, expected whole numbers")
    legal = [0, 1] if multilabel else list(task.classes)
    strange = np.setdiff1d(labels, legal)
    if strange.size:
        raise DatasetError(f"{path}: holds the label {strange[0]}, expected one of {', '.join(map(str, legal))}")
    return labels.astype(np.int64)


def read_soft_labels(info: DatasetInfo, task: TaskInfo) -> np.ndarray | None:
    """float32 of the labels' shape, in [0, 1] or NaN where nobody knows; None where there are none."""
    path = info.folder / "soft_labels" / f"{task.name}.npy"
    if not path.is_file():
        return None
    soft, expected = _array(path), (info.total, len(task.classes))
    if soft.shape != expected or not np.issubdtype(soft.dtype, np.floating):
        raise DatasetError(f"{path}: holds {soft.dtype} {list(soft.shape)}, expected float {list(expected)}")
    return soft.astype(np.float32)


def _array(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DatasetError(f"{path}: no such file, expected the labels of a task")
    return read_array(path, DatasetError, "the labels of a task")


def read_split(info: DatasetInfo, names: str | Sequence[str], original: bool = False) -> np.ndarray:
    """Numbers of the images of these splits, in ascending order.

    Raises: DatasetError for a split that is not there, or that names an image that is not.
    """
    found: list[int] = []
    for name in [names] if isinstance(names, str) else names:
        folder = info.folder / ("original_splits" if original else "splits")
        path = folder / f"{name}.txt"
        if not path.is_file():
            there = sorted(file.stem for file in folder.glob("*.txt"))
            raise DatasetError(f"{path}: no such split, expected one of {', '.join(there) or 'none'}")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path}: cannot be read as text in UTF-8 ({error})") from None
        for line in lines:
            if line.strip():
                found.append(_number(path, line.strip(), info.total))
    twice = len(found) - len(set(found))
    if twice:
        raise DatasetError(f"{path}: names {twice} images more than once, expected each once")
    return np.array(sorted(found), dtype=np.int64)


def _number(path: Path, line: str, total: int) -> int:
    match = _IMAGE.fullmatch(line)
    if match is None:
        raise DatasetError(f"{path}: names {line!r}, expected a line like images/000000.tiff")
    if int(match[1]) >= total:
        raise DatasetError(f"{path}: names {line}, which does not exist; expected numbers below {total}")
    return int(match[1])
