"""The script that measures experiments on a GPU: its configurations are hydra's, and it needs torch and PyYAML."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_objectives.py"
ABSENT = ("nibabel", "hydra", "omegaconf", "blosc2", "monai", "torchio", "SimpleITK", "nilearn")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_objectives", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# recipes of other verbs
_OF_OTHERS = ("fomo25_", "fomo26_", "ssl3d_segmentation", "ssl3d_classification", "compare_")
EXPERIMENTS = sorted(
    path.stem
    for path in (SCRIPT.parents[1] / "configs" / "experiment").glob("*.yaml")
    if not path.stem.startswith(_OF_OTHERS)
)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_are_composed_as_hydra_composes_them(script: ModuleType, experiment: str) -> None:
    from brainfm.verbs.compose import resolve

    wanted = resolve("pretrain", ["store=x", "run=x", f"experiment={experiment}", "trainer=gpu"])
    found = script.composed(experiment, "gpu")
    # on the command line the group comes last: what an experiment says about the trainer wins in both
    for group in ("backbone", "objective", "optim", "data", "trainer", "average"):
        assert getattr(found, group) == getattr(wanted, group), group


def test_runs_where_only_torch_and_yaml_are(tmp_path: Path) -> None:
    """Absent experiments are named and skipped, the others measured, here with a tiny network on the CPU."""
    code = (
        f"import sys, runpy; sys.modules |= dict.fromkeys({ABSENT}); sys.argv = ['gpu', '--device', 'cpu', "
        f"'--experiments', 'fomo25', 'no_such', 'ssl3d', '--json', {str(tmp_path / 'gpu.json')!r}]; "
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=False, cwd=SCRIPT.parents[1]
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "tiny" in found["device"] and [row["experiment"] for row in found["rows"]] == ["fomo25", "no_such", "ssl3d"]
    assert "no such file in configs/experiment" in found["rows"][1]["fault"]
    for row, steps in ((found["rows"][0], 252_000), (found["rows"][2], 250_000)):
        assert row["seconds_a_step"] > 0 and row["steps"] == 3 and row["peak_gib"] > 0
        assert row["hours"] == pytest.approx(row["seconds_a_step"] * steps / 3600)


def test_a_fault_costs_one_row(script: ModuleType) -> None:
    import torch

    settings = script.tiny(script.composed("fomo25", "cpu"))
    settings = replace(settings, data=replace(settings.data, patch_vox=(32, 32, 33)))
    row = script.tried(settings, "fomo25", "cpu", 0.0, torch.device("cpu"))
    assert row["fault"].startswith("ConfigError: patch_vox=(32, 32, 33)")
