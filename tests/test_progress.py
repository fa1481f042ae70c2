"""What is said while something long runs: by one process, and in a log as plain lines."""

from __future__ import annotations

import pytest

from brainfm import progress
from brainfm.progress import Progress, say, speak


@pytest.fixture(autouse=True)
def _unsettled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_speaks", None)
    for name in progress._RANKS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "ranks, heard",
    [({}, True), ({"LOCAL_RANK": "0"}, True), ({"LOCAL_RANK": "1"}, False), ({"RANK": "2", "LOCAL_RANK": "0"}, False)],
)
def test_one_process_speaks(
    ranks: dict[str, str], heard: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, rank in ranks.items():
        monkeypatch.setenv(name, rank)
    say("found")
    assert capsys.readouterr().err == ("found\n" if heard else "")
    speak(not heard)
    say("settled")
    assert capsys.readouterr().err == ("" if heard else "settled\n")


def test_a_log_gets_plain_lines(capsys: pytest.CaptureFixture) -> None:
    with Progress("read", 3, every_s=3600) as bar:
        for _ in range(3):
            bar.advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("read 3/3")
    with Progress("read", 1, enabled=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == "" and bar.done == 1
