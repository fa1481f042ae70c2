"""Files that earlier versions wrote are read as they were: backbones, bundles and a store of commit 9328027.

`tests/fixtures/format_9328027` was written by `prepare`, `pretrain` and `finetune` at that commit from six small
generated heads; the numbers below are what that commit answered. They are never written anew: a new format gets a
folder of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import brainfm
from brainfm.cli import main
from tests import phantoms

OLD = Path(__file__).parent / "fixtures" / "format_9328027"
SHAPE = (26, 30, 24)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A head at 4 mm, without noise."""
    affine = phantoms.centred(np.eye(3), (4, 4, 4), SHAPE)
    phantoms.write(tmp_path / "t1.nii.gz", phantoms.head(SHAPE, affine, np.random.default_rng(0), noise=0.0), affine)
    return tmp_path / "t1.nii.gz"


def test_no_file_of_the_fixtures_grows_unnoticed() -> None:
    assert sum(path.stat().st_size for path in OLD.rglob("*") if path.is_file()) < 1_500_000


@pytest.mark.parametrize("name, expected", [("cross_contrast", 1.15563), ("dense_split", 1.15728)])
@torch.no_grad()
def test_backbones(name: str, expected: float) -> None:
    backbone = brainfm.load(OLD / f"{name}.safetensors").eval()
    image = torch.linspace(-1, 1, 16**3).reshape(1, 1, 16, 16, 16)
    found = sum(float(level.abs().mean()) for level in backbone.features(image))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_bundle_that_answers_for_whole_heads(scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "age.json"
    assert main(["predict", f"bundle={OLD / 'age_bundle'}", f"input.t1={scan}", f"out={out}", "device=cpu"]) == 0
    assert json.loads(out.read_text())["answer"] == pytest.approx(49.42461, rel=1e-4)


def test_a_bundle_that_segments(scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "mask.nii.gz"
    assert main(["predict", f"bundle={OLD / 'lesion_bundle'}", f"input.t1={scan}", f"out={out}", "device=cpu"]) == 0
    mask = nib.load(out)
    assert mask.shape == SHAPE and np.asarray(mask.dataobj).sum() == pytest.approx(0, abs=3)


def test_the_heads_beside_a_backbone(scan: Path, tmp_path: Path) -> None:
    words = [f"backbone={OLD / 'dense_split.safetensors'}", f"input.t1={scan}", "spacing_mm=4", "device=cpu"]
    assert main(["anatomy", *words, f"out={tmp_path / 'labels.nii.gz'}"]) == 0
    labels = np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj)
    assert len(np.unique(labels)) == 19 and (labels > 0).sum() == pytest.approx(7095, rel=1e-2)


def test_a_store(tmp_path: Path) -> None:
    words = [f"backbone={OLD / 'cross_contrast.safetensors'}", f"store={OLD / 'store'}", "device=cpu"]
    assert main(["embed", *words, f"out={tmp_path / 'features.npy'}"]) == 0
    features = np.load(tmp_path / "features.npy")
    assert len(features) == 13 and np.abs(features).mean() == pytest.approx(0.451432, rel=1e-4)
