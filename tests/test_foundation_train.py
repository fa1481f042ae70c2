"""The script of the long pre-training, as it is called from a shell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "foundation_train.py"


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    shell = f"({sys.executable} {SCRIPT} status --run {tmp_path / 'r'}; echo $? >&2) | true"
    run = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert run.stderr == "0\n"
