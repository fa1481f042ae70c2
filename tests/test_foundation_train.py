"""The script of the long pre-training, as it is called from a shell."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "foundation_train.py"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("foundation_train", SCRIPT)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    shell = f"({sys.executable} {SCRIPT} status --run {tmp_path / 'r'}; echo $? >&2) | true"
    run = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert run.stderr == "0\n"


def test_a_run_goes_on_with_the_recipe_and_keys_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, commands = module(), []
    monkeypatch.setattr(script, "freeze", lambda code, commit: (code.mkdir(), (code / "COMMIT").write_text("c0ffee")))
    monkeypatch.setattr(script, "running", lambda run: None)

    def started(command: list[str], **how: object) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(pid=7)

    monkeypatch.setattr(script.subprocess, "Popen", started)
    run = tmp_path / "run"
    run.mkdir()
    script.start(run, tmp_path / "store", 19, "dense_split_s_wide", ["backbone_from=brainfm_s"])
    script.start(run, tmp_path / "store", 19, "dense_split_s", [])
    assert commands[0] == commands[1]
    assert {"experiment=dense_split_s_wide", "backbone_from=brainfm_s"} < set(commands[0])
