"""The one call on a lent GPU: all of it with a tiny network on the CPU, where packages are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfm.data.store import Store
from brainfm.errors import WeightsError
from brainfm.nets.backbone_file import load_backbone

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu_foundation.py"
MISSING = ("nibabel", "blosc2", "hydra", "omegaconf", "SimpleITK", "monai", "torchio", "nilearn")
WITHOUT = f"""
import importlib.abc, runpy, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SMALL = [
    "--backbone", "unet_tiny", "--patch", "16", "--batch", "1", "--ways", "eager", "--trial-steps", "1", "--steps", "4",
    "--held-windows", "2", "--device", "cpu", "--log-every", "2", "--minutes", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> Any:
    spec = util.spec_from_file_location("gpu_foundation", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["gpu_foundation"] = module
    spec.loader.exec_module(module)
    return module


def call(script: Any, *words: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_foundation.py", *map(str, words)])
        return int(script.main())


@pytest.fixture(scope="module")
def trained(script: Any, people_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """heads.zip, and in ``out`` what training on it left: in an interpreter that has no reader of scans or stores."""
    folder = tmp_path_factory.mktemp("gpu")
    words = ["pack", "--store", people_store.path, "--out", folder / "heads.zip", "--side-column", "", "--held", "2"]
    keys = ["data.validation=0.4", "objective.points=16", "objective.stride=2"]
    assert call(script, *words, "--keys", *keys) == 0
    command = [sys.executable, "-c", WITHOUT, SCRIPT, "train", "--data", folder / "heads.zip", "--out", folder / "out"]
    paths = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command), *SMALL], env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eager, batch 1:" in done.stdout and "held-out Dice: windows_real" in done.stdout
    return folder


def test_pieces_join_to_a_backbone_file_that_knows_whom_it_saw(script: Any, trained: Path, people_store: Store) -> None:
    assert call(script, "join", "--pieces", trained / "out", "--out", trained / "b.safetensors") == 0
    loaded = load_backbone(trained / "b.safetensors", needs_decoder=True)
    about = json.loads((trained / "out" / "run.json").read_text())
    assert loaded.provenance.steps == about["steps"] == 4 and loaded.provenance.samples == 4
    assert loaded.provenance.data == people_store.fingerprint() and loaded.provenance.parents == ()
    assert set(loaded.heads) == {"lesion", "regions"} and loaded.voxel_mm == (0.8, 5.0)
    assert loaded.subjects is not None
    seen = loaded.subjects.among(s.subject_key for s in people_store.sessions)
    assert 0 < len(seen) < len({s.subject_key for s in people_store.sessions})
    with np.load(trained / "out" / "piece0.npz") as arrays:
        half = arrays["backbone.levels.0.0.0.weight"]
    assert half.dtype == np.float16
    assert torch.equal(loaded.backbone.levels[0][0][0].weight.detach(), torch.from_numpy(half).float())
    assert {"windows_real", "whole_real", "windows_rendered", "whole_rendered"} == set(about["dice"])


def test_a_later_call_starts_from_the_pieces_and_says_so(script: Any, trained: Path) -> None:
    words = ["train", "--data", trained / "heads.zip", "--out", trained / "second", "--warm", trained / "out"]
    assert call(script, *words, *SMALL, "--steps", "1") == 0
    assert call(script, "join", "--pieces", trained / "out", "--out", trained / "b.safetensors") == 0
    assert call(script, "join", "--pieces", trained / "second", "--out", trained / "c.safetensors") == 0
    first, second = (load_backbone(trained / name) for name in ("b.safetensors", "c.safetensors"))
    assert second.provenance.parents == (first.fingerprint,)
    assert second.provenance.config["before"]["steps"] == 4
    apart = [
        float((one - other).detach().abs().max())
        for one, other in zip(first.backbone.parameters(), second.backbone.parameters(), strict=True)
    ]
    assert 0 < max(apart) < 0.01  # one step of the warm-up from where the first call ended


def test_a_way_that_fails_does_not_cost_the_call(
    script: Any, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(course: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(script.Session, "timed", lambda self, course, size, steps: broken(course))
    with pytest.raises(RuntimeError):  # where nothing works there is nothing to train
        call(script, "train", "--data", trained / "heads.zip", "--out", tmp_path, *SMALL)
    assert "eager fails: no compiler here" in capsys.readouterr().out


def test_pieces_are_small_and_a_mixture_of_two_saves_is_refused(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PIECE_BYTES", 5000)
    weights = {f"w{n}": torch.randn(1000) for n in range(5)}
    sizes = script.write_pieces(tmp_path, weights, {"steps": 1})
    assert len(sizes) == 3 and max(sizes) < 5000 + 1000
    found, about = script.read_pieces(tmp_path)
    assert about["steps"] == 1 and all(torch.equal(found[n], weights[n].half().float()) for n in weights)
    old = (tmp_path / "piece1.npz").read_bytes()
    script.write_pieces(tmp_path, {n: v + 1 for n, v in weights.items()}, {"steps": 2})
    (tmp_path / "piece1.npz").write_bytes(old)
    with pytest.raises(WeightsError, match=r"piece1.npz: missing or not what run.json names"):
        script.read_pieces(tmp_path)
    with pytest.raises(WeightsError, match="weights w: 12000 bytes in half precision"):
        script.write_pieces(tmp_path, {"w": torch.zeros(6000)}, {})


def test_held_heads_are_taken_from_each_set_in_turn(script: Any, people_store: Store) -> None:
    chosen = script.few(people_store.sessions, 3)
    assert len(chosen) == 3 and chosen == script.few(tuple(reversed(people_store.sessions)), 3)


def test_refusals(script: Any, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", trained / "heads.zip", "--out", trained / "x", *SMALL]
    assert call(script, *words, "--ways", "fast") == 2
    assert "--ways fast: expected some of eager, channels_last, compiled" in capsys.readouterr().err
    assert call(script, *words, "--warm", trained) == 2
    assert "run.json: cannot be read" in capsys.readouterr().err
    assert call(script, *words, "--backbone", "unet_s", "--patch", "32", "--warm", trained / "out") == 2
    assert "does not fit DenseSplit: backbone.levels" in capsys.readouterr().err
