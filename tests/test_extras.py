"""A light core: prediction needs few packages, and each of the others is named with the extra that brings it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from brainfm.extras import DISTRIBUTION, EXTRA_OF, translated
from tests import phantoms

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "fixtures" / "format_9328027"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# as they are imported
CORE = {"torch", "numpy", "scipy", "nibabel", "safetensors", "blosc2", "hydra", "omegaconf", "yaml"}
SHAPE = (26, 30, 24)
SILENT = {"pynvml"}  # without it a receipt lacks a number
BLOCK = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(EXTRA_OF)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def named(requirement: str) -> str:
    found = re.match(r"[\w-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-")


def brought_by(extra: str) -> set[str]:
    """Distributions of an extra, and of the extras that it names."""
    found: set[str] = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.fullmatch(rf"{DISTRIBUTION}\[(.+)\]", requirement)
        found |= set().union(*map(brought_by, inner[1].split(","))) if inner else {named(requirement)}
    return found


def modules_of(code: str) -> set[str]:
    """Packages that are no part of Python, in a fresh process that has run this."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*(n for n, m in sys.modules.items() if m))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in printed.stdout.split()} - set(sys.stdlib_module_names)


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command line where no optional package can be imported."""
    code = f"{BLOCK}from brainfm.cli import main\nsys.exit(main({words!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )


def write_head(path: Path, number: int) -> None:
    affine = phantoms.centred(np.eye(3), (4, 4, 4), SHAPE)
    phantoms.write(path, phantoms.head(SHAPE, affine, np.random.default_rng(number)), affine)


def test_every_optional_package_comes_with_its_extra() -> None:
    assert PROJECT["name"] == DISTRIBUTION and PROJECT["scripts"] == {"brainfm": "brainfm.cli:command"}
    homes = packages_distributions()
    for package, extra in EXTRA_OF.items():
        names = {named(name) for name in homes.get(package, [package])}
        assert names & brought_by(extra), f"{package} ({names}) is not in {extra}"
    for extra in {*EXTRA_OF.values(), "submit"} - {"augment", "dask", "imagenet", "slices"}:
        assert brought_by(extra) <= brought_by("all") <= brought_by("dev")
    core = {named(requirement) for requirement in PROJECT["dependencies"]}
    assert core == {"torch", "numpy", "scipy", "nibabel", "safetensors", "blosc2", "hydra-core", "pyyaml"}
    assert not core & brought_by("all")


def test_every_import_is_of_the_core_or_of_an_extra() -> None:
    for path in (ROOT / "brainfm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            roots = {(name or "").partition(".")[0] for name in names} - {"brainfm"} - set(sys.stdlib_module_names)
            assert roots <= CORE | SILENT | set(EXTRA_OF), f"{path}: {roots}"


def test_what_prediction_imports() -> None:
    # nibabel brings pydicom and what belongs to it, where that is installed
    alone = "import sys; sys.modules['pydicom'] = None; import brainfm; brainfm.predict"
    found = modules_of(alone) - modules_of("import torch")
    assert not found & (set(EXTRA_OF) | {"hydra", "omegaconf", "pandas", "torchio", "blosc2"})
    assert {"brainfm", "nibabel", "safetensors", "scipy"} <= found
    assert not modules_of("import brainfm") & CORE, "names are imported when they are asked for"


def test_without_any_extra_a_bundle_answers(tmp_path: Path) -> None:
    write_head(tmp_path / "t1.nii.gz", 0)
    for bundle, out in (("lesion_bundle", "mask.nii.gz"), ("age_bundle", "age.json")):
        done = run(["predict", f"bundle={OLD / bundle}", "input.t1=t1.nii.gz", f"out={out}", "device=cpu"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out).stat().st_size > 0


def test_without_any_extra_scans_are_found_prepared_and_embedded(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for number in (1, 2):
        write_head(tmp_path / "scans" / f"sub-{number}_T1w.nii.gz", number)
    for words in (
        ["manifest", "root=scans", "out=m.csv", "layout=folder"],
        ["doctor", "manifest=m.csv", "workers=1"],
        ["prepare", "manifest=m.csv", "store=store", "preprocess.spacing_mm=4", "workers=1"],
        ["embed", f"backbone={OLD / 'dense_split.safetensors'}", "store=store", "out=f.npz", "device=cpu"],
    ):
        done = run(words, tmp_path)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "store=s", "run=r"], "brainfm pretrain needs lightning, which is not installed: pip install "
                                           "'brainfm-mri[train]'"),
        (["finetune", "store=s", "run=r", "backbone_from=none", "task.target=x"],
         "brainfm finetune needs lightning, which is not installed: pip install 'brainfm-mri[train]'"),
        (["evaluate", f"bundle={OLD / 'lesion_bundle'}", f"manifest={OLD / 'manifest.csv'}", "out=o"],
         "surface Dice needs monai, which is not installed: pip install 'brainfm-mri[report]'"),
        (["explain", f"bundle={OLD / 'lesion_bundle'}", "input.t1=t1.nii.gz", "out=why.nii.gz", "device=cpu"],
         "brainfm explain needs matplotlib, which is not installed: pip install 'brainfm-mri[report]'"),
        (["medimeta", "action=check", "root=."],
         "brainfm medimeta action=check needs h5py, which is not installed: pip install 'brainfm-mri[crossdomain]'"),
        (["anatomy", "method=atlas", f"manifest={OLD / 'manifest.csv'}", "out=o"],
         "which is not installed: pip install 'brainfm-mri[anatomy]'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_missing_extra_is_one_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    write_head(tmp_path / "t1.nii.gz", 0)
    done = run(words, tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, "it is said at the start"
    assert lines[0].startswith("brainfm: ") and lines[0].endswith(said)


def test_an_import_that_no_extra_helps_stays_an_error() -> None:
    assert translated(ModuleNotFoundError("No module named 'x'", name="x"), "this") is None
    assert translated(ModuleNotFoundError("no name"), "this") is None
    found = translated(ModuleNotFoundError("No module named 'sklearn.svm'", name="sklearn.svm"), "this")
    assert str(found) == "this needs sklearn, which is not installed: pip install 'brainfm-mri[train]'"
