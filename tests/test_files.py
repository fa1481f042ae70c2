"""Files and folders appear whole or not at all, whatever they are called and wherever they shall lie."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from brainfm.errors import DatasetError, FileError
from brainfm.files import (
    check_writable,
    npy_bytes,
    npz_bytes,
    read_array,
    read_arrays,
    write_arrays,
    write_folder,
    write_table,
    write_whole,
    writing,
)


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / "new" / ("m" * longest)
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileError) as caught:
        write_whole(tmp_path / ("m" * (longest + 1)), b"")
    assert caught.value.errno == errno.ENAMETOOLONG and caught.value.filename.endswith("m" * longest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written_leaves_what_was_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"old")

    def refuse(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError) as caught:
        write_whole(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert str(path) in str(caught.value) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.csv"]


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "m.csv", b"new")
    assert not list(tmp_path.iterdir())


def test_where_something_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "to" / "be" / "made")
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="nothing can be written there \\(not a directory\\), expected a folder"):
        check_writable(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(FileError, match="permission denied") as caught:
        check_writable(tmp_path / "new")
    assert caught.value.errno == errno.EACCES and caught.value.filename == str(tmp_path / "new")


def test_a_stream_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="of the caller"), writing(path, mark="tmp-") as file:
        file.write(b"new")
        assert [p.name[:4] for p in tmp_path.iterdir() if p != path] == ["tmp-"]
        raise ValueError("of the caller")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["m.csv"]


def test_text_and_tables(tmp_path: Path) -> None:
    write_table(tmp_path / "t.tsv", ["a", "b"], [[1, "x\ty"], ["\udcff", ""]], delimiter="\t")
    assert (tmp_path / "t.tsv").read_bytes() == b'a\tb\n1\t"x\ty"\n\\udcff\t\n'


def test_folders_are_swapped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "to" / "bundle"
    write_folder(folder, {"a": b"1", "b": b"2"})
    write_folder(folder, {"a": b"3"})
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {"a": b"3"}

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError, match=f"no space left on the disk for {folder}"):
        write_folder(folder, {"a": b"4"})
    assert (folder / "a").read_bytes() == b"3" and [p.name for p in folder.parent.iterdir()] == ["bundle"]


# ---- arrays ----------------------------------------------------------------------------------------------------------


def test_arrays_come_back_and_equal_ones_give_equal_files(tmp_path: Path) -> None:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "words": np.array(["a", "é"])}
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.npz"
        write_arrays(path, arrays, compressed)
        back = read_arrays(path, DatasetError, "numbers")
        assert set(back) == set(arrays) and all(np.array_equal(back[n], arrays[n]) for n in arrays)
        assert path.read_bytes() == npz_bytes(arrays, compressed)
    (tmp_path / "one.npy").write_bytes(npy_bytes(arrays["x"]))
    assert np.array_equal(read_array(tmp_path / "one.npy", DatasetError, "a number"), arrays["x"])
    with pytest.raises(ValueError, match="Python objects"):
        npz_bytes({"x": np.array([{}])})


def test_what_is_no_array_is_refused_without_advice_to_load_pickles(tmp_path: Path) -> None:
    whole = npz_bytes({"x": np.arange(1000)}, compressed=True)
    np.save(tmp_path / "pickled", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "pickled", x=np.array([{}]))
    files = {"text.npz": b"not arrays", "short.npz": whole[:-30], "empty.npz": b"", "one.npz": npy_bytes(np.ones(2)),
             "torn.npz": whole[:60] + bytes(40) + whole[100:]}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.npy").write_bytes(npy_bytes(np.ones(100))[:-50])
    (tmp_path / "several.npy").write_bytes(whole)
    for name in (*files, "pickled.npz", "gone.npz"):
        with pytest.raises(DatasetError, match=f"{name}: cannot be read as episodes \\(") as refusal:
            read_arrays(tmp_path / name, DatasetError, "episodes")
        assert "pickle=" not in str(refusal.value) and "\n" not in str(refusal.value)
    for name in ("cut.npy", "several.npy", "pickled.npy", "text.npz", "gone.npy"):
        with pytest.raises(DatasetError, match=f"{name}: cannot be read as labels \\(") as refusal:
            read_array(tmp_path / name, DatasetError, "labels")
        assert "allow_pickle" not in str(refusal.value)
