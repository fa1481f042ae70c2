"""Files appear whole or not at all, whatever they are called and wherever they shall lie."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from brainfm.files import check_writable, write_whole


def test_a_name_as_long_as_the_system_allows(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / "new" / ("m" * longest)
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second" and [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(OSError) as caught:
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
    with pytest.raises(OSError) as caught:
        write_whole(path, b"new")
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
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
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(PermissionError) as caught:
        check_writable(tmp_path / "new")
    assert caught.value.filename == str(tmp_path / "new")
