import csv
import errno
import hashlib
import json
import os
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path

import blosc2
import numpy as np
import pytest

from brainfm.data import store as store_module
from brainfm.data.levels import coarse_image, coarse_labels
from brainfm.data.manifest import Scan
from brainfm.data.sources import SourceFile
from brainfm.data.store import Store
from brainfm.errors import FileError, StoreError
from brainfm.imaging.intensity import STEP
from brainfm.specs import PreprocessSpec

SPEC = PreprocessSpec()
KEY = ("ds", "sub/01", "")


@dataclass
class FakeRecipe:
    values: dict

    def to_dict(self):
        return self.values


@dataclass
class FakePrepared:
    scans: dict
    labels: dict
    recipes: dict = field(default_factory=dict)
    failures: dict = field(default_factory=dict)
    affine_mm: np.ndarray = field(default_factory=lambda: np.eye(4))
    foreground: np.ndarray = field(default_factory=lambda: np.array([[1, 2, 3]], np.int16))
    frame: str = ""
    offset_vox: tuple = (0, 0, 0)
    reference: str = "t1"
    alignments: dict = field(default_factory=dict)


def rows(key=KEY, contrasts=("t1", "flair"), **columns) -> list[Scan]:
    return [Scan(*key, contrast, f"{contrast}.nii.gz", dict(columns)) for contrast in contrasts]


def fake(shape=(70, 50, 37), seed=0, contrasts=("t1", "flair"), **more) -> FakePrepared:
    rng = np.random.default_rng(seed)
    scans = {name: rng.standard_normal(shape).astype(np.float32).clip(-2, 3) for name in contrasts}
    label = np.zeros(shape, np.uint8)
    label[10:20, 5:9, 30:] = 1
    return FakePrepared(scans, {"lesion_mask": label}, {"t1": FakeRecipe({"a": 1})}, **more)


def make(path: Path, n: int = 1, **kwargs) -> Store:
    store = Store.create(path, SPEC)
    for i in range(n):
        key = ("ds", f"sub/{i:02}", "")
        store.write_session(key, rows(key, age="40", lesion_mask="m.nii.gz"), fake(seed=i, **kwargs))
    store.finish()
    return Store.open(path)


def tree(path: Path) -> dict[str, str]:
    return {
        str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()
    }


def test_round_trip(tmp_path):
    prepared = fake()
    store = make(tmp_path / "store")
    (entry,) = store.sessions
    assert entry.key == ("ds", "sub/00", "") and entry.subject_key == "ds/sub/00" and entry.shape == (70, 50, 37)
    assert [(s.name, s.contrast) for s in entry.scans] == [("flair", "flair"), ("t1", "t1")]
    assert [(s.name, s.contrast) for s in entry.labels] == [("lesion_mask", "")]
    assert entry.columns == {"age": "40"}
    volume = store.volume(entry, "t1")
    assert volume.dtype == np.float16
    assert np.abs(volume.astype(np.float32) - prepared.scans["t1"]).max() <= STEP / 2 + 1e-6
    label = store.volume(entry, "lesion_mask")
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, prepared.labels["lesion_mask"])
    np.testing.assert_array_equal(store.foreground(entry), [[1, 2, 3]])
    store.verify(entry)
    assert store.spec == SPEC


def test_block__any_corner_and_size_equals_padded_volume(tmp_path):
    store = make(tmp_path / "store")
    (entry,) = store.sessions
    rng = np.random.default_rng(1)
    for name in ("t1", "lesion_mask"):
        volume = store.volume(entry, name)
        padded = np.pad(volume, 100, constant_values=volume.min() if name == "t1" else 0)
        for _ in range(40):
            corner = rng.integers(-60, 90, 3)
            size = rng.integers(1, 60, 3)
            begin = corner + 100
            want = padded[tuple(slice(b, b + s) for b, s in zip(begin, size))]
            if want.shape != tuple(size):
                continue
            got = store.block(entry, name, corner.tolist(), size.tolist())
            assert got.dtype == volume.dtype
            np.testing.assert_array_equal(got, want)
    assert (store.block(entry, "t1", (-500, 0, 0), (4, 4, 4)) == volume_min(store, entry)).all()


def volume_min(store, entry):
    return store.volume(entry, "t1").min()


def test_block__reads_only_the_blocks_it_touches(tmp_path):
    """Every other block of the file is overwritten with rubbish: a read that needs none of them still succeeds."""
    store = make(tmp_path / "store", shape=(64, 64, 64))
    (entry,) = store.sessions
    want = store.volume(entry, "t1")
    file = tmp_path / "store" / "sessions" / entry.folder / "t1.b2nd"
    array = blosc2.open(str(file))
    chunk = array.schunk.get_chunk(0)  # the whole volume is one chunk of 4^3 blocks
    content = bytearray(file.read_bytes())
    begin = bytes(content).index(chunk)
    starts = np.frombuffer(chunk[32 : 32 + 4 * 64], "<i4")
    touched = {(x * 4 + y) * 4 + z for x in (0, 1) for y in (2,) for z in (1, 2, 3)}
    for block, start in enumerate(starts):
        if block not in touched:
            content[begin + start : begin + start + 40] = b"\x7f" * 40
    file.write_bytes(content)
    store = Store.open(tmp_path / "store")
    box = (3, 32, 20), (20, 16, 40)
    np.testing.assert_array_equal(store.block(entry, "t1", *box), want[3:23, 32:48, 20:60])
    with pytest.raises(StoreError, match=r"t1\.b2nd: the file is damaged"):
        store.block(entry, "t1", (3, 31, 20), (20, 16, 40))


def make_old(path: Path, **kwargs) -> Store:
    """As a store was before there were levels."""
    make(path, **kwargs)
    for file in path.rglob("*@level*"):
        file.unlink()
    for file in path.rglob("session.json"):
        document = json.loads(file.read_bytes())
        document["files"] = {f: v for f, v in document["files"].items() if "@level" not in f}
        file.write_bytes(store_module._json_bytes(document))
    Store.create(path, SPEC).finish()
    return Store.open(path)


@pytest.mark.parametrize("old", [False, True])
def test_block__levels_equal_the_reduced_volume(tmp_path, old):
    store = (make_old if old else make)(tmp_path / "store")
    (entry,) = store.sessions
    assert store.levels(entry) == 2 and bool(list(tmp_path.rglob("*@level*"))) != old
    rng = np.random.default_rng(1)
    for name, reduce in (("t1", coarse_image), ("lesion_mask", coarse_labels)):
        volume = store.volume(entry, name)
        background = volume.min() if name == "t1" else 0
        for level in (1, 2, 3):  # 3 is kept by none
            shape = store.shape(entry, level)
            assert shape == tuple(-(-n // 2**level) for n in entry.shape)
            want = reduce(volume, level)
            got = store.block(entry, name, (0, 0, 0), shape, level)
            assert got.dtype == volume.dtype
            np.testing.assert_allclose(got, want, atol=STEP / 2, rtol=0)
            padded = np.pad(got, 60, constant_values=background)
            for _ in range(10):
                corner, size = rng.integers(-20, 30, 3), rng.integers(1, 30, 3)
                box = tuple(slice(c + 60, c + 60 + s) for c, s in zip(corner, size))
                np.testing.assert_array_equal(store.block(entry, name, corner, size, level), padded[box])
    with pytest.raises(ValueError, match="level=-1"):
        store.block(entry, "t1", (0, 0, 0), (1, 1, 1), -1)


def test_levels__a_store_without_has_the_same_identity_and_the_same_voxels(tmp_path):
    old, new = make_old(tmp_path / "old"), make(tmp_path / "new")
    assert old.fingerprint() == new.fingerprint() and old.sessions == new.sessions
    index = [(tmp_path / place / "index.csv").read_bytes() for place in ("old", "new")]
    assert index[0] == index[1] and b"@level" not in index[0]
    (entry,) = new.sessions
    assert [v.name for v in (*entry.scans, *entry.labels)] == ["flair", "t1", "lesion_mask"]
    for name in ("flair", "t1", "lesion_mask"):
        for level in range(3):
            box = entry, name, (-3, 2, 1), (19, 23, 17), level
            np.testing.assert_array_equal(old.block(*box), new.block(*box))
    columns = rows(entry.key, age="40", lesion_mask="m.nii.gz")
    assert old.is_current(entry.key, columns, {})  # prepare leaves it alone
    old.verify(entry)


def test_levels__as_many_as_the_spacing_admits(tmp_path):
    for number, (spacing, count) in enumerate((((2, 2, 2), 1), ((1, 1, 5), 0), ((0.5, 0.5, 0.5), 3))):
        store = Store.create(tmp_path / str(number), PreprocessSpec(spacing_mm=spacing))
        store.write_session(KEY, rows(), fake())
        store.finish()
        assert store.levels(store.sessions[0]) == count
        found = {f.name for f in (tmp_path / str(number)).rglob("*@level*")}
        names = ("flair", "t1", "lesion_mask")
        assert found == {f"{name}@level{level}.b2nd" for name in names for level in range(1, count + 1)}


def test_levels__damage_is_noticed(tmp_path):
    store = make(tmp_path / "s")
    (entry,) = store.sessions
    columns = rows(entry.key, age="40", lesion_mask="m.nii.gz")
    assert store.is_current(entry.key, columns, {})
    (file,) = (tmp_path / "s").rglob("t1@level1.b2nd")
    content = file.read_bytes()
    want = store.block(entry, "t1", (0, 0, 0), (9, 9, 9), 1)
    file.write_bytes(content[: len(content) // 2])
    store = Store.open(tmp_path / "s")
    assert not store.is_current(entry.key, columns, {})
    message = r"t1@level1\.b2nd: the file is damaged .*delete its folder and run prepare again"
    for read in (lambda: store.block(entry, "t1", (0, 0, 0), (9, 9, 9), 1), lambda: store.verify(entry)):
        with pytest.raises(StoreError, match=message):
            read()
    file.unlink()  # lost altogether: the volume has it all
    store = Store.open(tmp_path / "s")
    assert not store.is_current(entry.key, columns, {})
    np.testing.assert_array_equal(store.block(entry, "t1", (0, 0, 0), (9, 9, 9), 1), want)


def test_label_points__small_structures_get_their_share(tmp_path):
    labels = np.zeros((40, 40, 40), np.uint16)
    labels[:20] = 500
    labels[30:32, 3, 3:6] = 7
    prepared = FakePrepared(
        {"t1": np.ones((40, 40, 40), np.float32)}, {"aseg_labels": labels, "empty_mask": labels * 0}
    )
    store = Store.create(tmp_path / "s", SPEC)
    store.write_session(KEY, rows(contrasts=("t1",)), prepared)
    store.finish()
    (entry,) = store.sessions
    points = store.label_points(entry, "aseg_labels")
    assert points.dtype == np.int16 and len(points) == 4096
    values = labels[tuple(points.T)]
    assert (values == 7).sum() == 6 and (values == 500).sum() == 4090
    assert store.label_points(entry, "empty_mask").shape == (0, 3)
    assert store.volume(entry, "aseg_labels").dtype == np.uint16


def test_same_bytes__in_any_order(tmp_path):
    keys = [("ds", "a", "1"), ("ds", "b", "1"), ("ds", "a", "2")]
    for place, order in (("one", keys), ("two", keys[::-1])):
        store = Store.create(tmp_path / place, SPEC)
        for key in order:
            store.write_session(key, rows(key), fake(seed=keys.index(key)))
        store.finish()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert Store.open(tmp_path / "one").fingerprint() == Store.open(tmp_path / "two").fingerprint()


def test_fingerprint__changes_with_a_voxel(tmp_path):
    first = make(tmp_path / "one")
    changed = fake(seed=0)
    changed.scans["t1"][3, 3, 3] += 1
    store = Store.create(tmp_path / "two", SPEC)
    key = ("ds", "sub/00", "")
    store.write_session(key, rows(key, age="40", lesion_mask="m.nii.gz"), changed)
    with pytest.raises(StoreError, match="not finished"):
        store.fingerprint()
    store.finish()
    assert store.fingerprint() != first.fingerprint()


def test_is_current(tmp_path):
    store = Store.create(tmp_path / "s", SPEC)
    for name, content in {"t1.nii.gz": b"right", "flair.nii.gz": b"second"}.items():
        (tmp_path / name).write_bytes(content)

    def now() -> dict[str, SourceFile]:
        return {name: SourceFile.of(tmp_path / name) for name in ("t1.nii.gz", "flair.nii.gz")}

    assert store.why_not_current(KEY, rows(), now()) == ""
    store.write_session(KEY, rows(), fake(), now())
    assert store.is_current(KEY, rows()[::-1], now())
    assert store.why_not_current(KEY, rows(age="3"), now()) == "what the manifest says of it"
    assert not store.is_current(KEY, rows(contrasts=("t1",)), now())
    (tmp_path / "t1.nii.gz").write_bytes(b"wrong")  # of the same size
    os.utime(tmp_path / "t1.nii.gz", ns=(now()["t1.nii.gz"].changed_ns[0],) * 2)
    assert store.why_not_current(KEY, rows(), now()) == "t1.nii.gz"
    (tmp_path / "t1.nii.gz").write_bytes(b"right")  # a copy of the same content, as of a folder that was moved
    assert store.is_current(KEY, rows(), now())
    (tmp_path / "t1.nii.gz").write_bytes(b"right, and more")
    assert store.why_not_current(KEY, rows(), now()) == "t1.nii.gz"
    (tmp_path / "t1.nii.gz").write_bytes(b"right")
    (file,) = (tmp_path / "s").rglob("t1.b2nd")
    file.write_bytes(file.read_bytes()[:-1])
    assert store.why_not_current(KEY, rows(), now()) == ""


def test_a_session_of_before_contents_were_kept_is_judged_by_sizes(tmp_path):
    store = Store.create(tmp_path / "s", SPEC)
    (tmp_path / "t1.nii.gz").write_bytes(b"right")
    store.write_session(KEY, rows(), fake(), {"t1.nii.gz": SourceFile.of(tmp_path / "t1.nii.gz")})
    (document,) = (tmp_path / "s").rglob("session.json")
    old = json.loads(document.read_bytes())
    del old["sources"]["stamps"]
    document.write_text(json.dumps(old))
    (tmp_path / "t1.nii.gz").write_bytes(b"wrong")
    assert store.is_current(KEY, rows(), {"t1.nii.gz": SourceFile.of(tmp_path / "t1.nii.gz")})
    (tmp_path / "t1.nii.gz").write_bytes(b"longer")
    assert not store.is_current(KEY, rows(), {"t1.nii.gz": SourceFile.of(tmp_path / "t1.nii.gz")})


def test_replacing_a_session(tmp_path):
    store = make(tmp_path / "s", n=2)
    key = store.sessions[0].key
    writer = Store.create(tmp_path / "s", SPEC)
    writer.write_session(key, rows(key), fake(shape=(20, 21, 22), seed=9))
    with pytest.raises(StoreError, match=r"no index\.csv because prepare was interrupted; run prepare again"):
        Store.open(tmp_path / "s")
    writer.finish()
    assert [s.shape for s in Store.open(tmp_path / "s").sessions] == [(20, 21, 22), (70, 50, 37)]
    assert not list((tmp_path / "s").glob("tmp-*"))


def test_adding_a_session_leaves_the_index_valid(tmp_path):
    store = make(tmp_path / "s")
    Store.create(tmp_path / "s", SPEC).write_session(KEY, rows(), fake())
    assert Store.open(tmp_path / "s").sessions == store.sessions


def test_failures(tmp_path):
    store = Store.create(tmp_path / "s", SPEC)
    store.write_failure(KEY, rows(), {"t1": "cannot be read", "flair": "is 2D"})
    other = ("ds", "sub/02", "")
    partly = fake(failures={"flair": "is empty", "lesion_mask": "lies elsewhere"}, contrasts=("t1",))
    partly.labels.clear()
    store.write_session(other, rows(other, lesion_mask="m.nii.gz"), partly)
    store.finish()
    with open(tmp_path / "s" / "failures.csv", newline="") as handle:
        found = list(csv.reader(handle))
    assert found == [
        ["dataset", "subject", "session", "contrast", "path", "reason"],
        ["ds", "sub/01", "", "flair", "flair.nii.gz", "is 2D"],
        ["ds", "sub/01", "", "t1", "t1.nii.gz", "cannot be read"],
        ["ds", "sub/02", "", "", "m.nii.gz", "lies elsewhere"],
        ["ds", "sub/02", "", "flair", "flair.nii.gz", "is empty"],
    ]
    assert [s.key for s in Store.open(tmp_path / "s").sessions] == [other]
    assert store.is_current(KEY, rows(), {})


def test_frames(tmp_path):
    store = Store.create(tmp_path / "s", SPEC)
    keys = [("ds", "a", "1"), ("ds", "a", "2"), ("ds", "b", "1")]
    for key, place in zip(keys, ({"frame": "ds/a/1", "offset_vox": (1, 2, 3)},) * 2 + ({"offset_vox": (-4, 0, 7)},)):
        store.write_session(key, rows(key, age="3"), fake(shape=(9, 8, 7), **place))
    store.finish()
    sessions = Store.open(tmp_path / "s").sessions
    assert [s.frame for s in sessions] == ["ds/a/1", "ds/a/1", "ds/b/1"]
    assert [s.offset_vox for s in sessions] == [(1, 2, 3), (1, 2, 3), (-4, 0, 7)]
    assert all(s.columns == {"age": "3"} for s in sessions)

    with open(tmp_path / "s" / "index.csv", newline="") as handle:  # as it was before there were frames
        table = [line[:11] + line[15:] for line in csv.reader(handle)]
    with open(tmp_path / "s" / "index.csv", "w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows(table)
    old = Store.open(tmp_path / "s").sessions
    assert [s.frame for s in old] == ["ds/a/1", "ds/a/2", "ds/b/1"] and {s.offset_vox for s in old} == {(0, 0, 0)}
    assert [(s.key, s.shape, s.scans, s.columns) for s in old] == [
        (s.key, s.shape, s.scans, s.columns) for s in sessions
    ]


def test_index__columns_with_the_names_of_ours_and_awkward_values(tmp_path):
    store = Store.create(tmp_path / "s", SPEC)
    columns = {"file": 'a "quoted", value', "x": "line\nbreak", "name": "ö", "empty": ""}
    store.write_session(KEY, rows(**columns), fake())
    store.finish()
    (entry,) = Store.open(tmp_path / "s").sessions
    assert entry.columns == {k: v for k, v in columns.items() if v}
    store.verify(entry)


def test_refusals(tmp_path):
    with pytest.raises(StoreError, match="no store was found here"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(StoreError, match="something that is no store"):
        Store.create(tmp_path / "other", SPEC)
    with pytest.raises(StoreError, match="no store was found"):
        Store.open(tmp_path / "other")
    store = make(tmp_path / "s")
    with pytest.raises(StoreError, match=r"preprocess.spacing_mm=\[1.0, 1.0, 1.0\], now .*=\[2.0, 2.0, 2.0\]"):
        Store.create(tmp_path / "s", PreprocessSpec(spacing_mm=(2, 2, 2)))
    with pytest.raises(StoreError, match="has no volume 't2', expected one of flair, t1, lesion_mask"):
        store.block(store.sessions[0], "t2", (0, 0, 0), (1, 1, 1))
    (tmp_path / "s" / "index.csv").write_text("nonsense\n1,2\n")
    with pytest.raises(StoreError, match="the index is damaged"):
        Store.open(tmp_path / "s")
    (tmp_path / "s" / "index.csv").unlink()
    with pytest.raises(StoreError, match="run prepare again"):
        Store.open(tmp_path / "s")
    (tmp_path / "s" / "spec.json").write_text("{")
    with pytest.raises(StoreError, match=r"spec\.json: the file is damaged"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize("harm", ["missing", "truncated", "rubbish"])
def test_damaged_file(tmp_path, harm):
    make(tmp_path / "s")
    (file,) = (tmp_path / "s").rglob("t1.b2nd")
    content = file.read_bytes()
    file.unlink()
    if harm != "missing":
        file.write_bytes(content[: len(content) // 2] if harm == "truncated" else b"rubbish" * 100)
    store = Store.open(tmp_path / "s")
    for read in (lambda: store.volume(store.sessions[0], "t1"), lambda: store.verify(store.sessions[0])):
        with pytest.raises(
            StoreError, match=r"t1\.b2nd: the file is damaged .*delete its folder and run prepare again"
        ):
            read()


def test_verify__one_bit(tmp_path):
    store = make(tmp_path / "s")
    (file,) = (tmp_path / "s").rglob("foreground.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"foreground\.npy.*checksum"):
        store.verify(store.sessions[0])


@pytest.mark.parametrize("where", ["t1.b2nd", "t1@level1.b2nd", "session.json", "index.csv"])
def test_disk_full(tmp_path, monkeypatch, where):
    store = make(tmp_path / "s")
    before = tree(tmp_path / "s")

    write, whole = store_module.write_synced, store_module.write_whole

    def full(file, content):
        if file.name.endswith(where):
            file.write_bytes(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, content)

    def full_as_well(file, content, mark):
        if file.name.endswith(where):
            raise FileError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        whole(file, content, mark)

    monkeypatch.setattr(store_module, "write_synced", full)
    monkeypatch.setattr(store_module, "write_whole", full_as_well)
    with pytest.raises(StoreError, match="no space is left on the disk; what was prepared stays") as caught:
        store.write_session(KEY, rows(), fake())
        store.finish()
    assert "\n" not in str(caught.value)
    after = tree(tmp_path / "s")
    assert not list((tmp_path / "s").glob("tmp-*"))
    if where != "index.csv":
        assert after == before
    assert {k: v for k, v in after.items() if k in before} == before
    monkeypatch.undo()
    store.write_session(KEY, rows(), fake())
    store.finish()
    assert len(Store.open(tmp_path / "s").sessions) == 2


def test_lock_and_sweep(tmp_path):
    store = make(tmp_path / "s")
    (tmp_path / "s" / "tmp-1-abc").mkdir()
    (tmp_path / "s" / "tmp-1-abc" / "half.b2nd").write_bytes(b"x")
    (tmp_path / "s" / "tmp-1-index.csv").write_bytes(b"x")
    with store.locked():
        assert not list((tmp_path / "s").glob("tmp-*"))
        with pytest.raises(StoreError, match="another prepare is writing to this store"), store.locked():
            raise AssertionError
    with store.locked():
        pass


def test_handles__survive_fork_and_pickle(tmp_path):
    store = make(tmp_path / "s", n=2)
    want = store.block(store.sessions[1], "t1", (1, 1, 1), (30, 30, 30))
    read, write = os.pipe()
    if os.fork() == 0:  # the child reads through handles of its own
        got = store.block(store.sessions[1], "t1", (1, 1, 1), (30, 30, 30))
        os.write(write, hashlib.sha256(got.tobytes()).digest())
        os._exit(0)
    os.wait()
    assert os.read(read, 32) == hashlib.sha256(want.tobytes()).digest()
    os.close(read)
    os.close(write)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.block(copy.sessions[1], "t1", (1, 1, 1), (30, 30, 30)), want)


def test_handles__are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_HANDLES", 3)
    store = make(tmp_path / "s", n=4, shape=(17, 16, 5))
    for entry in store.sessions * 2:
        for volume in entry.scans:
            store.block(entry, volume.name, (0, 0, 0), (4, 4, 4))
    assert len(store._cache) == 3


def test_open__100_000_rows_in_seconds(tmp_path):
    make(tmp_path / "s")
    lines = [(tmp_path / "s" / "index.csv").read_text().splitlines()[0]]
    for i in range(50_000):
        start = f"ds,sub-{i:06},ses-1"
        end = f"182,218,182,{'a' * 64},ds/sub-{i:06}/ses-1,0,-3,5,40"
        lines += [f"{start},{c},scan,{c},sub-{i:06}/{c}.b2nd,{end}" for c in ("flair", "t1")]
    (tmp_path / "s" / "index.csv").write_text("\n".join(lines) + "\n")
    begin = time.perf_counter()
    store = Store.open(tmp_path / "s")
    assert len(store.sessions) == 50_000 and sum(len(s.scans) for s in store.sessions) == 100_000
    assert time.perf_counter() - begin < 10
