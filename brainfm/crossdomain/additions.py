"""Writes data sets in the MedIMeta layout: from a folder with a CSV, a MedMNIST file, or a CheXpert-style CSV.

Images become grey or RGB, are padded with zeros to a square (or cropped to the middle) and resized; they are written
one by one. A data set appears whole or not at all, and is read back before it does.

Source: preparation as Woerner et al. 2024 (arXiv 2404.16000) describe it; uncertain labels as Irvin et al. 2019
    (arXiv 1901.07031) and Pham et al. 2021 (arXiv 1911.06475, U[0.55, 0.85]).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brainfm.crossdomain.checks import check
from brainfm.crossdomain.layout import ANNOTATIONS, IMAGES, INFO, SPLITS, TaskTarget, check_file_name, read_info
from brainfm.errors import ConfigError, DatasetError
from brainfm.extras import missing
from brainfm.files import npy_bytes, read_arrays, write_table, write_text, write_whole, writing_folder
from brainfm.scoring.folds import side
from brainfm.seeds import stream

Progress = Callable[[int, int], None]
Uncertain = Literal["ones", "zeros", "ignore", "smooth"]
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # of people, where no split is given
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip
_SMOOTHED = (0.55, 0.85)
_TARGETS = {
    "multiclass": TaskTarget.MULTICLASS_CLASSIFICATION,
    "binary": TaskTarget.BINARY_CLASSIFICATION,
    "multilabel": TaskTarget.MULTILABEL_CLASSIFICATION,
    "ordinal": TaskTarget.ORDINAL_REGRESSION,
}


@dataclass(frozen=True)
class AddedTask:
    """A task that is written.

    Attributes:
        labels: int64 [N] or [N, L].
        classes: value or column -> name.
        soft: float32 [N, L], NaN where unknown; None where labels say all.
    """

    name: str
    target: TaskTarget
    labels: np.ndarray
    classes: Mapping[int, str]
    soft: np.ndarray | None = None


@dataclass(frozen=True)
class Addition:
    """What a source holds.

    Attributes:
        count: N images.
        image: number -> PIL image, or uint8 [H, W] or [H, W, 3].
        tasks: with a row an image.
        splits: [N] of train, val and test.
        original_splits: [N], the authors' own.
        origins: [N] where each image comes from.
        people: [N] or none.
    """

    count: int
    image: Callable[[int], Any]
    tasks: Sequence[AddedTask]
    splits: Sequence[str]
    original_splits: Sequence[str]
    origins: Sequence[str]
    people: Sequence[str] | None = None


@dataclass(frozen=True)
class About:
    """What is said of the new data set.

    Attributes:
        size: edge of its images in pixels; None: as they are, where all are of one size.
        channels: 1 or 3.
        fit: what becomes of images that are not square.
        tiff: whether single TIFF files are written beside images.hdf5.
    """

    id: str
    name: str
    domain: str
    license: str = "unknown"
    summary: str = ""
    domain_overlaps: tuple[str, ...] = ()
    subject_overlaps: tuple[str, ...] = ()
    size: int | None = 224
    channels: int = 1
    fit: Literal["pad", "crop"] = "pad"
    tiff: bool = True
    source: Mapping[str, str] = field(default_factory=dict)


# ---- sources ---------------------------------------------------------------------------------------------------------


def from_table(
    folder: Path, table: Path, tasks: Mapping[str, str], path_column: str = "path", split_column: str = "split",
    people_column: str = "patient_id", seed: int = 0,
) -> Addition:  # fmt: skip
    """A folder of images and a CSV with a line an image.

    Args:
        folder: that paths are relative to.
        tasks: column -> multiclass, binary, multilabel or ordinal. Classes are the column's words in alphabetical
            order, of a binary column ``0`` or ``negative`` first; names of several labels are joined by ``|``; ordinal
            values are whole numbers.
        split_column: with train, val and test; absent, people are dealt by the hash of their name.
        people_column: whose images stay together; absent, each image is a person.

    Raises: DatasetError, ConfigError.
    """
    rows = _rows(table, [path_column, *tasks])
    paths = [folder / row[path_column] for row in rows]
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise DatasetError(f"{table}: names {gone[0]}, which does not exist ({len(gone)} of {len(rows)} images)")
    people = [row[people_column] for row in rows] if people_column in rows[0] else None
    given = [row[split_column] for row in rows] if split_column in rows[0] else None
    made = [_task(table, name, kind, [row[name] for row in rows]) for name, kind in tasks.items()]
    splits = _splits(table, given, people or [row[path_column] for row in rows], seed)
    origins = [row[path_column] for row in rows]
    return Addition(len(rows), lambda i: _opened(paths[i]), made, splits, splits, origins, people)


_MOST_CLASSES = 10_000  # above which a label is a mistake


def from_medmnist(path: Path, task_name: str, names: Sequence[str] = ()) -> Addition:
    """A MedMNIST .npz with ``{train,val,test}_{images,labels}``; images become as large as is asked for.

    Args:
        names: of the classes or labels in their order; none: their numbers.

    Raises: DatasetError.
    """
    arrays = read_arrays(path, DatasetError, "a MedMNIST .npz")
    lacking = [f"{s}_{what}" for s in SPLITS for what in ("images", "labels") if f"{s}_{what}" not in arrays]
    if lacking:
        raise DatasetError(f"{path}: lacks {lacking[0]}, found {', '.join(arrays) or 'nothing'}")
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
            raise DatasetError(f"{path}: {split}_images are {images.dtype} {list(images.shape)}, expected 2D uint8")
        if min(images.shape) < 1:
            raise DatasetError(f"{path}: {split}_images are {list(images.shape)}, expected images with pixels")
        if len(images) != len(labels):
            raise DatasetError(f"{path}: {len(labels)} {split}_labels for {len(images)} images")
        whole = labels.dtype.kind in "iub" and labels.min() >= 0 and labels.max() < _MOST_CLASSES
        if not whole:
            raise DatasetError(
                f"{path}: {split}_labels are {labels.dtype}, expected whole numbers from 0 to {_MOST_CLASSES - 1}"
            )
    for what in ("images", "labels"):
        shapes = {split: list(arrays[f"{split}_{what}"].shape[1:]) for split in SPLITS}
        if len({str(shape) for shape in shapes.values()}) > 1:
            raise DatasetError(f"{path}: {what} are {shapes}, expected one shape in every split")
    images = np.concatenate([arrays[f"{split}_images"] for split in SPLITS])
    labels = np.concatenate([arrays[f"{split}_labels"].reshape(len(arrays[f"{split}_images"]), -1) for split in SPLITS])
    splits = [split for split in SPLITS for _ in arrays[f"{split}_images"]]
    counts = labels.shape[1] if labels.shape[1] > 1 else int(labels.max()) + 1
    if names and len(names) != counts:
        raise ConfigError(f"labels: found {len(names)} names for the {counts} labels of {path}")
    classes = {k: names[k] if names else str(k) for k in range(counts)}
    if labels.shape[1] > 1:
        target, labels = TaskTarget.MULTILABEL_CLASSIFICATION, labels.astype(np.int64)
    else:
        target = TaskTarget.BINARY_CLASSIFICATION if counts == 2 else TaskTarget.MULTICLASS_CLASSIFICATION
        labels = labels[:, 0].astype(np.int64)
    origins = [f"{path.name}:{i}" for i in range(len(images))]
    task = AddedTask(task_name, target, labels, classes)
    return Addition(len(images), lambda i: images[i], [task], splits, splits, origins)


def from_chexpert(
    folder: Path, table: Path, uncertain: Uncertain = "ones", views: Sequence[str] = ("AP", "PA"),
    findings: Sequence[str] = CHEXPERT, seed: int = 0,
) -> Addition:  # fmt: skip
    """Frontal radiographs of a CheXpert-style CSV: Path, Sex, Age, Frontal/Lateral, AP/PA, and a column a finding with
    1 present, 0 absent, -1 uncertain, blank not mentioned (taken for absent).

    Args:
        folder: that paths are relative to; the part of a path up to ``train/`` or ``valid/`` may be absent there.
        uncertain: ones, zeros; ignore: nobody knows; smooth: a random number from 0.55 to 0.85, by seed.
        views: of AP and PA; images of others are left out.

    Raises: DatasetError.
    """
    rows = _rows(table, ["Path", *findings])
    if "Frontal/Lateral" in rows[0]:
        rows = [row for row in rows if row["Frontal/Lateral"] == "Frontal"]
    if "AP/PA" in rows[0]:
        rows = [row for row in rows if row["AP/PA"] in views]
    if not rows:
        raise DatasetError(f"{table}: holds no frontal image of the views {', '.join(views)}")
    paths = [_below(folder, row["Path"]) for row in rows]
    gone = [path for path in paths if not path.is_file()]
    if gone:
        raise DatasetError(f"{table}: names {gone[0]}, which does not exist ({len(gone)} of {len(rows)} images)")
    values = np.array([[_mention(table, row[name], name) for name in findings] for row in rows])
    labels, soft = settled(values, uncertain, seed)
    people = [next((part for part in Path(row["Path"]).parts if part.startswith("patient")), row["Path"])
              for row in rows]  # fmt: skip
    task = AddedTask("findings", _TARGETS["multilabel"], labels, dict(enumerate(findings)), soft)
    made = [task]
    if "Sex" in rows[0]:
        sex = [row["Sex"] for row in rows]
        if set(sex) == {"Female", "Male"}:
            made.append(_task(table, "Sex", "binary", sex))
    originals = ["val" if "valid" in Path(row["Path"]).parts else "train" for row in rows]
    splits = _splits(table, None, people, seed)
    origins = [row["Path"] for row in rows]
    return Addition(len(rows), lambda i: _opened(paths[i]), made, splits, originals, origins, people)


def settled(values: np.ndarray, uncertain: Uncertain, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels int64 [N, L] of 0 and 1, and soft labels where these say more.

    Args:
        values: float [N, L] of 1, 0, -1 (uncertain) and NaN (not mentioned).
        uncertain: see `from_chexpert`.
    """
    doubt = values == -1
    labels = np.where(doubt, 0.0 if uncertain in ("zeros", "ignore") else 1.0, np.nan_to_num(values, nan=0.0))
    if uncertain in ("ones", "zeros"):
        return labels.astype(np.int64), None
    soft = labels.astype(np.float32)
    if uncertain == "ignore":
        soft[doubt] = np.nan
    else:
        soft[doubt] = stream(seed, "uncertain labels").uniform(*_SMOOTHED, size=int(doubt.sum()))
    return labels.astype(np.int64), soft


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_dataset(root: Path, about: About, addition: Addition, progress: Progress | None = None) -> Path:
    """Writes a data set; returns its folder.

    Raises:
        ConfigError: where there is one of this id.
        DatasetError: where an image cannot be read, or what was written contradicts itself.
    """
    target = root / about.id
    for task in addition.tasks:
        check_file_name(task.name, "task")
    check_file_name(about.id, "id")
    if target.exists():
        raise ConfigError(f"{target}: is there already, expected another id or an empty place")
    with writing_folder(target) as part:
        try:
            size = _write_images(part, about, addition, progress)
            _write_tables(part, about, addition, size)
            faults = [fault for fault in check(read_info(part)) if "has not" not in fault]
        except DatasetError as error:
            faults = [str(error)]
        if faults:
            raise DatasetError(faults[0].replace(str(part), str(target)))
    return target


def _write_images(part: Path, about: About, addition: Addition, progress: Progress | None) -> tuple[int, int]:
    """Returns height and width."""
    try:
        import h5py
    except ModuleNotFoundError:
        raise missing("h5py", f"adding {about.id}") from None
    (part / "images").mkdir()
    first = fitted(addition.image(0), about)
    size = first.shape[:2]
    with h5py.File(part / IMAGES, "w") as file:
        array = file.create_dataset("images", (addition.count, *first.shape), np.uint8)
        for number in range(addition.count):
            pixels = first if number == 0 else fitted(addition.image(number), about)
            if pixels.shape != first.shape:
                raise DatasetError(
                    f"{addition.origins[number]}: is {list(pixels.shape)}, expected {list(first.shape)} as the first "
                    "image; give a size in pixels"
                )
            array[number] = pixels
            if about.tiff:
                _picture(pixels).save(part / "images" / f"{number:06d}.tiff")
            if progress is not None:
                progress(number + 1, addition.count)
    return int(size[0]), int(size[1])


def fitted(image: Any, about: About) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] as ``about`` wants it, of a PIL image or an array."""
    from PIL import Image

    picture = _picture(image) if isinstance(image, np.ndarray) else image
    mode = "L" if about.channels == 1 else "RGB"
    if picture.mode in ("I;16", "I", "F"):  # scanners' depths: the range that occurs becomes 0..255
        values = np.asarray(picture, dtype=np.float64)
        span = float(np.ptp(values)) or 1.0
        picture = Image.fromarray(np.round((values - values.min()) / span * 255).astype(np.uint8))
    if picture.mode != mode:
        picture = picture.convert(mode)
    width, height = picture.size
    if about.size is not None:
        if width != height:
            picture = _square(picture, about.fit)
        if picture.size != (about.size, about.size):
            picture = picture.resize((about.size, about.size), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _square(picture: Any, fit: str) -> Any:
    from PIL import Image

    width, height = picture.size
    if fit == "crop":
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        return picture.crop((left, top, left + edge, top + edge))
    edge = max(width, height)
    wide = Image.new(picture.mode, (edge, edge))
    wide.paste(picture, ((edge - width) // 2, (edge - height) // 2))
    return wide


def _write_tables(part: Path, about: About, addition: Addition, size: tuple[int, int]) -> None:
    import yaml

    names = [f"images/{number:06d}.tiff" for number in range(addition.count)]
    for folder, sides in (("splits", addition.splits), ("original_splits", addition.original_splits)):
        for each in dict.fromkeys(sides):
            listed = [name for name, its in zip(names, sides) if its == each]
            write_text(part / folder / f"{each}.txt", "\n".join(listed))
    for task in addition.tasks:
        for place, array in (("task_labels", task.labels), ("soft_labels", task.soft)):
            if array is not None:
                write_whole(part / place / f"{task.name}.npy", npy_bytes(array))
    info: dict[str, Any] = {
        "id": about.id, "name": about.name, "summary": about.summary, "domain": about.domain,
        "tasks": [{"task_name": task.name, "task_target": task.target.name, "labels": dict(task.classes)}
                  for task in addition.tasks],
        "input_size": [about.channels, *size], "total_num_samples": addition.count,
        "splits_num_samples": _counted(addition.splits),
        "original_splits_num_samples": _counted(addition.original_splits),
        "domain_overlaps": list(about.domain_overlaps), "subject_overlaps": list(about.subject_overlaps),
        "license": about.license, "original_data": [dict(about.source)] if about.source else [],
    }  # fmt: skip
    write_text(part / INFO, yaml.safe_dump(info, sort_keys=False, allow_unicode=True))
    write_text(part / "LICENSE", about.license + "\n")
    people = [] if addition.people is None else ["patient_id"]
    columns = ["filepath", "split", *(f"tasks/{task.name}" for task in addition.tasks), "original_filepath",
               "original_split", *people, *(task.name for task in addition.tasks)]  # fmt: skip
    rows = zip(
        names, addition.splits, *(_numbers(task) for task in addition.tasks), addition.origins,
        addition.original_splits, *([addition.people] if addition.people is not None else []),
        *(_words(task) for task in addition.tasks),
    )  # fmt: skip
    write_table(part / ANNOTATIONS, columns, rows)


def _counted(sides: Sequence[str]) -> dict[str, int]:
    return {split: sum(side == split for side in sides) for split in SPLITS}


def _numbers(task: AddedTask) -> Iterator[str]:
    for label in task.labels.tolist():
        yield "|".join(map(str, label)) if isinstance(label, list) else str(label)


def _words(task: AddedTask) -> Iterator[str]:
    for label in task.labels.tolist():
        if isinstance(label, list):
            yield "|".join(task.classes[k] for k, present in enumerate(label) if present)
        else:
            yield task.classes[label]


def _picture(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(pixels))


def _opened(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{path}: cannot be read as an image ({error})") from None


# ---- tables ----------------------------------------------------------------------------------------------------------


def _rows(table: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DatasetError(f"{table}: no such file, expected a CSV with a line an image") from None
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DatasetError(f"{table}: cannot be read as CSV ({error})") from None
    if not rows:
        raise DatasetError(f"{table}: holds no line, expected one an image")
    lacking = [name for name in needed if name not in rows[0]]
    if lacking:
        raise DatasetError(f"{table}: has no column {lacking[0]!r}, found {', '.join(map(str, rows[0]))}")
    short = next((i for i, row in enumerate(rows) if None in row.values() or None in row), None)
    if short is not None:
        raise DatasetError(f"{table}: line {short + 2} has another number of cells than the head, {len(rows[0])}")
    return rows


def _task(table: Path, name: str, kind: str, cells: Sequence[str]) -> AddedTask:
    """Raises: DatasetError for a cell that is no answer."""
    if kind not in _TARGETS:
        raise ConfigError(f"tasks.{name}={kind}: expected one of {', '.join(_TARGETS)}")
    target = _TARGETS[kind]
    blank = next((i for i, cell in enumerate(cells) if not cell.strip()), None)
    if blank is not None and kind != "multilabel":
        raise DatasetError(f"{table}: line {blank + 2} has no {name!r}, expected an answer for every image")
    if kind == "multilabel":
        named = [[word.strip() for word in cell.split("|") if word.strip()] for cell in cells]
        classes = sorted({word for words in named for word in words})
        labels = np.array([[word in words for word in classes] for words in named], dtype=np.int64)
        return AddedTask(name, target, labels, dict(enumerate(classes)))
    if kind == "ordinal":
        try:
            values = [int(cell) for cell in cells]
        except ValueError:
            wrong = next(cell for cell in cells if not cell.strip().lstrip("+-").isdigit())
            raise DatasetError(f"{table}: {name!r} is {wrong!r}, expected whole numbers") from None
        return AddedTask(name, target, np.array(values), {value: str(value) for value in sorted(set(values))})
    classes = sorted(set(cells), key=lambda word: (word.lower() not in ("0", "no", "negative", "false"), word))
    if kind == "binary" and len(classes) != 2:
        raise DatasetError(f"{table}: {name!r} has {len(classes)} answers, expected the two of a binary task")
    return AddedTask(name, target, np.array([classes.index(cell) for cell in cells]), dict(enumerate(classes)))


def _splits(table: Path, given: Sequence[str] | None, people: Sequence[str], seed: int) -> list[str]:
    """Given splits, checked; else each person's by a hash, so that growth moves nobody."""
    if given is not None:
        strange = [each for each in given if each not in SPLITS]
        if strange:
            raise DatasetError(f"{table}: split {strange[0]!r}, expected one of {', '.join(SPLITS)}")
        return list(given)
    return [side("", who, f"split {seed}", SHARES) for who in people]


def _below(folder: Path, path: str) -> Path:
    """The file, also where the data set's own first folders are left out."""
    parts = Path(path).parts
    tails = (Path(*parts[start:]) for start in range(len(parts)))
    return next((folder / tail for tail in tails if (folder / tail).is_file()), folder / path)


def _mention(table: Path, cell: str, finding: str) -> float:
    if not cell.strip():
        return float("nan")
    try:
        value = float(cell)
    except ValueError:
        value = 2.0
    if value not in (1, 0, -1):
        raise DatasetError(f"{table}: {finding!r} is {cell!r}, expected 1, 0, -1 or nothing")
    return value
