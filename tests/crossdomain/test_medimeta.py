"""Reading MedIMeta data sets: what comes out is what the medimeta package gives, in any process."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("h5py")

from brainfm.crossdomain.checks import check
from brainfm.crossdomain.images import with_channels
from brainfm.crossdomain.layout import TaskTarget, find, open_dataset
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.errors import DatasetError
from tests.crossdomain.sets import write_set

HASHES = json.loads((Path(__file__).parent / "medimeta_hashes.json").read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medimeta")
    write_set(folder, "grey", 24, 16, 1, 1)
    write_set(folder, "colour", 24, 16, 3, 2)
    return folder


def digest(items: MedIMeta) -> str:
    found = hashlib.sha256()
    for number in range(len(items)):
        image, label = items[number]
        found.update(image.numpy().tobytes() + str(tuple(image.shape)).encode())
        found.update(label.numpy().tobytes() + f"{label.dtype}{tuple(label.shape)}".encode())
    return found.hexdigest()[:32]


def to_unit(picture: object) -> torch.Tensor:
    pixels = np.array(picture)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32).div(255)


def opened(folder: Path, key: str, use_hdf5: bool) -> MedIMeta:
    dataset, task, what = key.split("|")
    if what.endswith("channels"):
        items = MedIMeta(folder, dataset, task, split="val", transform=to_unit, use_hdf5=use_hdf5)
        items.num_channels = int(what.split()[0])
        return items
    if what == "original train":
        return MedIMeta(folder, dataset, task, original_split="train", use_hdf5=use_hdf5)
    return MedIMeta(folder, dataset, task, split=None if what == "None" else what.split("+"), use_hdf5=use_hdf5)


@pytest.mark.parametrize("key", sorted(HASHES["generated"]))
def test_items_are_those_of_the_medimeta_package(key: str, root: Path) -> None:
    for use_hdf5 in (True, False):
        assert digest(opened(root, key, use_hdf5)) == HASHES["generated"][key]


def test_items_of_real_images_are_those_of_the_medimeta_package() -> None:
    named = os.environ.get("BRAINFM_DATA2D")
    folder = Path(named) if named else Path(__file__).parents[3] / "shared" / "data2d" / "medimeta_mini"
    if not folder.is_dir():
        pytest.skip("no real images here (BRAINFM_DATA2D)")
    for key, expected in HASHES["medimeta_mini"].items():
        assert digest(opened(folder, key, True)) == expected, key


def test_names_that_users_of_the_package_know(root: Path) -> None:
    items = MedIMeta(str(root), "grey", "grade", split=["train", "val"])
    assert items.classes == {0: "0", 1: "1", 4: "4"} and items.task_target is TaskTarget.ORDINAL_REGRESSION
    assert items.domain_identifier == "Toys of grey" and items.task_identifier == "Grey: grade"
    assert items.task_description.task_target.name == "ORDINAL_REGRESSION" and items.input_size == [1, 16, 16]
    assert set(items.labels) == {0, 1, 4} and set(items.places) == {0, 1, 2}
    assert items.split_indices == sorted(items.split_indices) and len(items) == 18
    assert MedIMeta.get_available_datasets(root) == ["colour", "grey"]
    assert MedIMeta.get_available_tasks(root)["grey"] == ["kind", "sick", "signs", "grade"]
    assert MedIMeta.get_info_dict(root, "grey")["id"] == "grey"
    assert MedIMeta(root, "grey", "sick")[0][1].shape == (1,)
    with pytest.raises(IndexError):
        items[18]
    with pytest.raises(ValueError, match="both"):
        MedIMeta(root, "grey", "kind", split="train", original_split="train")


def test_batches_are_items_in_any_order(root: Path) -> None:
    for use_hdf5 in (True, False):
        items = MedIMeta(root, "colour", "kind", split="train", use_hdf5=use_hdf5)
        wanted = [7, 0, 3, 3]
        assert torch.equal(items.batch(wanted), torch.stack([items[n][0] for n in wanted]))
        assert items.pixels(np.array([], dtype=np.int64)).shape == (0, 3, 16, 16)


def test_an_array_in_pieces_is_read_through_its_library(root: Path, tmp_path: Path) -> None:
    import h5py

    folder = write_set(tmp_path, "grey", 24, 16, 1, 1)
    with h5py.File(folder / "images.hdf5") as file:
        pixels = file["images"][:]
    with h5py.File(folder / "images.hdf5", "w") as file:
        file.create_dataset("images", data=pixels, chunks=(5, 16, 16), compression="gzip")
    ours, plain = MedIMeta(tmp_path, "grey", "kind"), MedIMeta(root, "grey", "kind")
    wanted = [20, 3, 4, 5, 5, 0]
    assert np.array_equal(ours.pixels(wanted), plain.pixels(wanted))
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again[3][0], plain[3][0])


def _read(items: MedIMeta, number: int, answer: multiprocessing.Queue) -> None:
    answer.put(items[number][0].numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(method: str, root: Path) -> None:
    items = MedIMeta(root, "grey", "kind")
    assert items.images.read([0]).any()  # the file is open before the process is made
    context = multiprocessing.get_context(method)
    answer = context.Queue()
    process = context.Process(target=_read, args=(items, 5, answer))
    process.start()
    assert np.array_equal(answer.get(timeout=60), items[5][0].numpy())
    process.join()


def test_a_loader_with_workers_gives_every_item_once(root: Path) -> None:
    items = MedIMeta(root, "grey", "kind", split="train")
    found = torch.cat([image for image, _ in DataLoader(items, batch_size=5, num_workers=2)])
    assert torch.equal(found, items.batch(range(len(items))))


def test_luminance_is_that_of_pillow() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    grey = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in pixels])
    assert np.array_equal(with_channels(pixels, 1)[:, 0], grey)
    assert np.array_equal(with_channels(grey, 3)[:, 2], grey)


# ---- refusals --------------------------------------------------------------------------------------------------------


def edited(old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "info.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return edit


def labels(values: object) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "task_labels" / "kind.npy", np.asarray(values))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "images.hdf5").unlink(), "images.hdf5: no such file"),
        (lambda f: (f / "images.hdf5").write_bytes(b"no"), "cannot be read as HDF5"),
        (lambda f: (f / "splits" / "train.txt").write_text("images/000099.tiff"), "names images/000099.tiff"),
        (lambda f: (f / "splits" / "train.txt").write_text("000001.png"), "expected a line like images/000000.tiff"),
        (lambda f: (f / "splits" / "train.txt").write_text("images/000001.tiff\nimages/000001.tiff"), "more than once"),
        (lambda f: (f / "splits" / "train.txt").unlink(), "no such split, expected one of test, val"),
        (labels(np.zeros(20, int)), "has the shape [20], expected [24]"),
        (labels(np.full(24, 7)), "holds the label 7, expected one of 0, 1, 2"),
        (labels(np.zeros(24)), "holds float64, expected whole numbers"),
        (lambda f: (f / "task_labels" / "kind.npy").write_bytes(b"no"), "labels of a task (no arrays of numbers"),
        (edited("domain:", "domian:"), "key 'domain' is missing (found 'domian')"),
        (edited("license:", "licence:"), "unknown key 'licence'"),
        (edited("MULTICLASS_CLASSIFICATION", "MULTI_CLASS"), "task_target 'MULTI_CLASS'"),
        (edited("    2: none\n", "    5: none\n"), "are [0, 1, 5], expected 0 to 2"),
        (edited("total_num_samples: 24", "total_num_samples: 30"), "has the shape [24], expected [30]"),
        (edited("- 16\n- 16", "- 8\n- 16"), "images are uint8 [24, 16, 16], expected uint8 [24, 8, 16]"),
        (edited("total_num_samples: 24", "total_num_samples: [24"), "cannot be read as YAML"),
        (edited("id: grey", "id: null"), "id=null, expected text"),
        (edited("name: Grey", "name: []"), "name=[], expected text"),
        (edited("domain: Toys of grey", "domain: 2020-13-45"), "cannot be read as YAML"),
        (edited("task_name: kind", "task_name: [kind]"), "task_name=['kind'], expected text"),
        (edited("task_target: MULTICLASS_CLASSIFICATION", "task_target: [a]"), "task_target ['a'] of task 'kind'"),
        (edited("    2: none\n", "    2: null\n"), "2: None}, expected a name for each whole number"),
        (edited("domain_overlaps: []", "domain_overlaps: [null]"), "domain_overlaps=[None], expected a list of ids"),
        (lambda f: (f / "splits" / "train.txt").write_bytes(b"images/\xff.tiff"), "cannot be read as text in UTF-8"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_one_sentence(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, "grey", 24, 16, 1, 1)
    damage(folder)
    with pytest.raises(DatasetError) as refused:
        MedIMeta(tmp_path, "grey", "kind", split="train")
    assert said in str(refused.value) and str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_broken_data_set_does_not_hide_the_others(tmp_path: Path) -> None:
    write_set(tmp_path, "good", 24, 16)
    write_set(tmp_path, "bad", 24, 16)
    (tmp_path / "bad" / "info.yaml").write_text("id: [")
    found, faults = find(tmp_path)
    assert list(found) == ["good"] and len(faults) == 1 and "bad" in str(faults[0])
    assert len(MedIMeta(tmp_path, "good", "kind")) == 24
    with pytest.raises(DatasetError, match=r"bad.*YAML"):
        MedIMeta(tmp_path, "bad", "kind")
    with pytest.raises(DatasetError, match="holds no data set 'none', expected one of good"):
        MedIMeta(tmp_path, "none", "kind")


def test_checking_names_every_fault(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "grey", 24, 16)
    assert check(open_dataset(tmp_path, "grey")) == []
    (folder / "splits" / "val.txt").write_text("images/000000.tiff")
    (folder / "task_labels" / "sick.npy").unlink()
    said = check(open_dataset(tmp_path, "grey"))
    assert any("is also in train" in line for line in said) and any("sick.npy" in line for line in said)
    assert any("has not an image of class 'flat'" in line for line in said)


def test_other_images_labels_or_splits_are_told_apart(tmp_path: Path) -> None:
    folder = write_set(tmp_path, "grey", 24, 16, 1, 1)
    found = [MedIMeta(tmp_path, "grey", "kind").fingerprint()]
    assert MedIMeta(tmp_path, "grey", "kind", use_hdf5=False).fingerprint() == found[0]
    for damage in (
        labels(np.arange(24)[::-1] % 3),
        lambda f: (f / "splits" / "test.txt").write_text("images/000003.tiff"),
        lambda f: write_set(f.parent / "new", "grey", 24, 16, 1, 2) and None,
    ):
        damage(folder)
        place = tmp_path / "new" if (tmp_path / "new").exists() else tmp_path
        found.append(MedIMeta(place, "grey", "kind").fingerprint())
    assert len(set(found)) == 4


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden"])
@pytest.mark.parametrize("key", ["id: grey", "task_name: kind"])
def test_a_name_that_leads_elsewhere_is_refused(key: str, name: str, tmp_path: Path) -> None:
    folder = write_set(tmp_path, "grey", 24, 16, 1, 1)
    edited(key, f"{key.partition(':')[0]}: {name}")(folder)
    faults = find(tmp_path)[1]
    assert [f"{folder / 'info.yaml'}: " in str(fault) and f"{name!r}" in str(fault) for fault in faults] == [True]
