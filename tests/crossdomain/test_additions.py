"""Own images in the MedIMeta layout: from a table, a MedMNIST file, a CheXpert-style table."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("h5py")
from PIL import Image

from brainfm.crossdomain.additions import (
    About,
    fitted,
    from_chexpert,
    from_medmnist,
    from_table,
    settled,
    write_dataset,
)
from brainfm.crossdomain.checks import check
from brainfm.crossdomain.layout import open_dataset, read_split
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.errors import BrainfmError, ConfigError, DatasetError, FileError

ABOUT = About(id="own", name="Own", domain="Toys", size=16)


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (20, 12)) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(count):
        Image.new("RGB", size, (10 * number, 0, 0)).save(folder / f"{number}.png")
        names.append(f"{number}.png")
    return names


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def table_of(folder: Path, **changes: object) -> Path:
    rows = [
        {"path": name, "patient_id": f"p{n // 2}", "kind": "ab"[n % 2],
         "signs": ["", "x", "x|y"][n % 3], "grade": n % 3}
        for n, name in enumerate(write_pictures(folder, 24))
    ]  # fmt: skip
    rows[3] |= changes
    return write_csv(folder / "labels.csv", rows)


TASKS = {"kind": "binary", "signs": "multilabel", "grade": "ordinal"}


def test_a_folder_with_a_table(tmp_path: Path) -> None:
    addition = from_table(tmp_path / "in", table_of(tmp_path / "in"), TASKS)
    folder = write_dataset(tmp_path / "sets", ABOUT, addition)
    assert check(open_dataset(tmp_path / "sets", "own")) == [] or len(addition.splits) < 60
    signs = MedIMeta(tmp_path / "sets", "own", "signs")
    assert signs.classes == {0: "x", 1: "y"} and signs.labels[:3].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert MedIMeta(tmp_path / "sets", "own", "grade").classes == {0: "0", 1: "1", 2: "2"}
    assert signs.pixels([0]).shape == (1, 1, 16, 16) and not signs.pixels([5])[0, 0, 0].any(), "padded above"
    sides = {
        split: set(read_split(open_dataset(tmp_path / "sets", "own"), split).tolist()) for split in set(addition.splits)
    }
    assert sum(map(len, sides.values())) == 24
    for n in range(0, 24, 2):
        assert addition.splits[n] == addition.splits[n + 1], "one person is on one side"
    with open(folder / "annotations.csv") as file:
        first = next(csv.DictReader(file))
    assert first["filepath"] == "images/000000.tiff" and first["patient_id"] == "p0" and first["kind"] == "a"
    assert np.array_equal(MedIMeta(tmp_path / "sets", "own", "kind", use_hdf5=False).pixels([4]), signs.pixels([4]))


@pytest.mark.parametrize(
    ("changes", "tasks", "said"),
    [
        ({"path": "none.png"}, TASKS, "names"),
        ({"kind": ""}, TASKS, "line 5 has no 'kind'"),
        ({"kind": "c"}, TASKS, "has 3 answers, expected the two"),
        ({"grade": "high"}, TASKS, "'grade' is 'high', expected whole numbers"),
        ({}, {"shade": "binary"}, "has no column 'shade'"),
        ({}, {"kind": "fancy"}, "tasks.kind=fancy: expected one of multiclass"),
    ],
)
def test_a_wrong_table_is_one_sentence(
    changes: dict[str, object], tasks: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(BrainfmError) as refused:
        from_table(tmp_path / "in", table_of(tmp_path / "in", **changes), tasks)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_medmnist_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(count) % 2)[:, None].astype(np.uint8)
    np.savez(tmp_path / "m.npz", **arrays)
    addition = from_medmnist(tmp_path / "m.npz", "disease", ("malignant", "benign"))
    write_dataset(tmp_path, About(id="own", name="Own", domain="Toys", size=28), addition)
    test = MedIMeta(tmp_path, "own", "disease", split="test")
    assert test.task_target.name == "BINARY_CLASSIFICATION" and test.classes[0] == "malignant" and len(test) == 6
    assert np.array_equal(test.pixels(range(6))[:, 0], arrays["test_images"])
    with pytest.raises(ConfigError, match="found 3 names for the 2 labels"):
        from_medmnist(tmp_path / "m.npz", "disease", ("a", "b", "c"))
    for wrong, words in (
        (arrays["val_labels"] + 0.5, "val_labels are float64, expected whole numbers"),
        (arrays["val_labels"].astype(np.int64) * 1_000_000_000, "expected whole numbers from 0 to 9999"),
        (np.array(["ill"] * 6)[:, None], "expected whole numbers"),
    ):
        np.savez(tmp_path / "w.npz", **arrays | {"val_labels": wrong})
        with pytest.raises(DatasetError, match=words):
            from_medmnist(tmp_path / "w.npz", "disease")
    np.savez(tmp_path / "w.npz", **arrays | {"val_images": arrays["val_images"][:, :14]})
    with pytest.raises(DatasetError, match=r"images are .*\[14, 28\].* expected one shape in every split"):
        from_medmnist(tmp_path / "w.npz", "disease")
    (tmp_path / "w.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:200])
    with pytest.raises(DatasetError, match="cannot be read as"):
        from_medmnist(tmp_path / "w.npz", "disease")
    with pytest.raises(DatasetError, match="expected the name of a file"):
        write_dataset(
            tmp_path, About(id="x", name="X", domain="Toys", size=28), from_medmnist(tmp_path / "m.npz", "../x")
        )
    del arrays["val_labels"]
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(DatasetError, match="lacks val_labels"):
        from_medmnist(tmp_path / "m.npz", "disease")


def chexpert(folder: Path, **changes: object) -> Path:
    rows = []
    for number in range(8):
        patient = f"patient{number // 2:05d}"
        write_pictures(folder / "train" / patient / "study1", 2)
        rows.append({"Path": f"CheXpert-v1.0/train/{patient}/study1/{number % 2}.png",
                     "Sex": ("Male", "Female")[number % 2], "Age": 60,
                     "Frontal/Lateral": "Lateral" if number == 7 else "Frontal",
                     "AP/PA": "LL" if number == 6 else "AP",
                     "Edema": [1.0, 0.0, -1.0, ""][number % 4], "Pneumonia": 1.0})  # fmt: skip
    rows[0] |= changes
    return write_csv(folder / "train.csv", rows)


def test_a_chexpert_table(tmp_path: Path) -> None:
    table = chexpert(tmp_path / "in")
    findings = ("Edema", "Pneumonia")
    addition = from_chexpert(tmp_path / "in", table, "ignore", findings=findings)
    assert addition.count == 6, "without the lateral image and the one that is neither AP nor PA"
    write_dataset(tmp_path, ABOUT, addition)
    items = MedIMeta(tmp_path, "own", "findings")
    assert items.labels[:4].tolist() == [[1, 1], [0, 1], [0, 1], [0, 1]]
    assert np.isnan(items.targets[2, 0]) and items.targets[0, 0] == 1
    assert MedIMeta(tmp_path, "own", "Sex").labels[:2].ravel().tolist() == [1, 0]
    assert from_chexpert(tmp_path / "in", table, "ones", ("PA", "AP"), findings).count == 6
    with pytest.raises(DatasetError, match="'Edema' is '2', expected 1, 0, -1 or nothing"):
        from_chexpert(tmp_path / "in", chexpert(tmp_path / "in", Edema=2), findings=findings)


def test_uncertain_labels() -> None:
    values = np.array([[1.0, -1.0], [np.nan, 0.0]])
    assert settled(values, "ones")[0].tolist() == [[1, 1], [0, 0]]
    assert settled(values, "zeros")[0].tolist() == [[1, 0], [0, 0]]
    labels, soft = settled(values, "smooth", 3)
    assert labels.tolist() == [[1, 1], [0, 0]] and soft is not None and 0.55 <= soft[0, 1] <= 0.85
    assert np.array_equal(soft, settled(values, "smooth", 3)[1]) and soft[1].tolist() == [0, 0]


def test_pictures_are_fitted() -> None:
    wide = Image.fromarray(np.full((10, 20), 255, np.uint8))
    padded = fitted(wide, About(id="a", name="a", domain="a", size=20))
    assert padded.shape == (20, 20) and padded[10].all() and not padded[0].any() and not padded[19].any()
    assert fitted(wide, About(id="a", name="a", domain="a", size=20, fit="crop")).all()
    deep = Image.fromarray((np.arange(100).reshape(10, 10) * 600).astype(np.uint16))
    assert fitted(deep, About(id="a", name="a", domain="a", size=None)).max() == 255
    assert fitted(wide, About(id="a", name="a", domain="a", size=None, channels=3)).shape == (10, 20, 3)


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden"])
def test_an_id_is_a_folder(name: str, tmp_path: Path) -> None:
    addition = from_table(tmp_path / "in", table_of(tmp_path / "in"), TASKS)
    with pytest.raises(DatasetError, match="expected the name of a file or folder"):
        write_dataset(tmp_path / "sets", About(id=name, name="x", domain="y"), addition)


def test_nothing_half_written_remains(tmp_path: Path) -> None:
    addition = from_table(tmp_path / "in", table_of(tmp_path / "in"), TASKS)
    (tmp_path / "in" / "9.png").write_bytes(b"no")
    with pytest.raises(DatasetError, match=r"9\.png: cannot be read as an image"):
        write_dataset(tmp_path / "sets", ABOUT, addition)
    assert not list((tmp_path / "sets").iterdir())


def test_a_fault_names_the_data_set_and_no_hidden_folder(tmp_path: Path) -> None:
    addition = from_table(tmp_path / "in", table_of(tmp_path / "in"), TASKS)
    about = replace(ABOUT, name="")
    with pytest.raises(DatasetError) as refused:
        write_dataset(tmp_path / "sets", about, addition)
    assert str(refused.value) == f"{tmp_path / 'sets' / 'own' / 'info.yaml'}: name='', expected text"
    (tmp_path / "full").write_text("x")
    with pytest.raises(FileError, match=f"{tmp_path / 'full' / 'own'}: cannot be written"):
        write_dataset(tmp_path / "full", ABOUT, addition)
