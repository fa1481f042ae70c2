"""The wheel, built and tried in a clean environment: what a user of `pip install` gets.

    python scripts/wheel.py [--extras train]

Builds the wheel, makes an environment that has never seen the checkout, installs the wheel there with its dependencies
from the index, and runs from an empty folder: the version, the help of every verb, the options that travel as data, the
weights that ship, whose features are compared with those in the checkout, and a bundle of an earlier version, whose
answer is compared with the one it gave then.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "fixtures" / "format_9328027"
OLD_ANSWER = 49.42461  # of the age bundle on the head below, as tests/test_old_files.py has it
HEAD = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import numpy as np
from tests import phantoms
shape = (26, 30, 24)
affine = phantoms.centred(np.eye(3), (4, 4, 4), shape)
phantoms.write(Path("t1.nii.gz"), phantoms.head(shape, affine, np.random.default_rng(0), noise=0.0), affine)
"""

WEIGHTS = ROOT / "brainfm" / "weights"
FEATURES = """
import torch
import brainfm
from brainfm.nets.shipped import names
for name in names():
    torch.manual_seed(0)
    with torch.no_grad():
        maps = brainfm.load(name).eval().features(torch.rand(1, 1, 32, 32, 32))
    print(name, *(f"{float(found.abs().mean()):.4f}" for found in maps))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="e.g. train,anatomy")
    parser.add_argument("--torch-index", help="of pip, for a build of torch, e.g. https://download.pytorch.org/whl/cpu")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        began = time.perf_counter()
        _run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work / "dist", ROOT)
        (wheel,) = (work / "dist").glob("*.whl")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, built in {time.perf_counter() - began:.0f} s")
        brainfm, python = _installed(work, wheel, given.extras, given.torch_index)
        empty = work / "empty"
        empty.mkdir()
        version = _run(brainfm, "--version", at=empty).strip()
        verbs = [line.split()[0] for line in _run(brainfm, at=empty).splitlines() if line.startswith("  ")]
        for verb in verbs:
            _run(brainfm, verb, "--help", at=empty)
        print(f"version {version}; help of {len(verbs)} verbs")
        listed = _run(python, "-c", "from brainfm.submission.challenge import names; print(*names())", at=empty).split()
        print(f"challenges that travel as data: {', '.join(listed)}")
        _check_weights(wheel, python, empty)
        _run(sys.executable, "-c", HEAD, at=empty)
        _run(
            brainfm,
            "predict",
            f"bundle={OLD / 'age_bundle'}",
            "input.t1=t1.nii.gz",
            "out=age.json",
            "device=cpu",
            at=empty,
        )
        found = json.loads((empty / "age.json").read_text())["answer"]
        assert abs(found - OLD_ANSWER) < 1e-4 * OLD_ANSWER, f"{found}, expected {OLD_ANSWER}"
        words = [f"bundle={OLD / 'lesion_bundle'}", "input.t1=t1.nii.gz", "out=mask.nii.gz", "device=cpu"]
        _run(brainfm, "predict", *words, at=empty)
        print(f"bundles of an earlier version answer: {found:.5f} years as before, and a mask")


def _check_weights(wheel: Path, python: Path, empty: Path) -> None:
    """Every file of the weights is in the wheel, each backbone loads by its name and sees what it sees here."""
    with zipfile.ZipFile(wheel) as parts:
        there = {Path(name).name for name in parts.namelist() if name.startswith("brainfm/weights/")}
    lacking = sorted(path.name for path in WEIGHTS.iterdir() if path.is_file() and path.name not in there)
    if lacking:
        sys.exit(f"{wheel.name}: brainfm/weights/{lacking[0]} is not in it")
    found, here = _run(python, "-c", FEATURES, at=empty), _run(sys.executable, "-c", FEATURES, at=ROOT)
    if found != here or len(found.splitlines()) != len(list(WEIGHTS.glob("*.safetensors"))):
        sys.exit(f"weights that ship see otherwise when installed:\n{found}expected\n{here}")
    print(f"weights that ship, loaded by name: {', '.join(line.split()[0] for line in found.splitlines())}")


def _installed(work: Path, wheel: Path, extras: str, torch_index: str | None) -> tuple[Path, Path]:
    """The command line and the Python of a clean environment with the wheel."""
    began = time.perf_counter()
    venv.create(work / "clean", with_pip=True)
    python = work / "clean" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if torch_index:
        _run(*pip, "torch", "--index-url", torch_index)
    _run(*pip, f"{wheel}[{extras}]" if extras else wheel)
    packages = _run(python, "-m", "pip", "list", "--format", "freeze").split()
    print(f"installed with {len(packages)} packages in {time.perf_counter() - began:.0f} s")
    return work / "clean" / "bin" / "brainfm", python


def _run(*words: object, at: Path | None = None) -> str:
    """What a command says; it has to end with 0. A PYTHONPATH of the caller would let it see the checkout."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=at, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
