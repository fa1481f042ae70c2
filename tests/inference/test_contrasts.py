"""A bundle and whatever contrasts come: any order, one missing, one that training never saw."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.data.manifest import read_manifest
from brainfm.data.prepare import prepare
from brainfm.errors import BrainfmWarning
from brainfm.inference.predict import predict
from brainfm.scoring.masks import dice
from brainfm.specs import PreprocessSpec
from brainfm.training.finetune import finetune
from brainfm.verbs.compose import resolve
from tests.conftest import write_subjects

CONTRASTS = ("t1", "t2", "flair")
CASES = ("sub-01", "sub-02", "sub-03")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads whose lesion is bright in every contrast, so that each shows it alone."""
    folder = tmp_path_factory.mktemp("contrasts")
    write_subjects(folder, 6, contrasts=CONTRASTS, edge=20)
    return folder


@pytest.fixture(scope="module")
def bundle(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    prepare(read_manifest(root / "manifest.csv"), out / "store", PreprocessSpec(spacing_mm=(2, 2, 2)), 1)
    made = finetune(resolve("finetune", [
        f"store={out / 'store'}", f"run={out / 'run'}", "backbone_from=none", "backbone=unet_tiny", "trainer=cpu",
        "task=segmentation", "task.target=lesion", "task.patch_vox=[16,16,16]", "folds=1", "trainer.max_steps=70",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.threads=1", "optim.lr=5e-3", "average=0.9",
        "data.contrast_dropout=0.3", "data.augment=null", "baselines=[]", "audit=false", "mirror=[]", "clean=false",
    ]))  # fmt: skip
    assert made is not None
    return made


def answer(bundle: Path, folder: Path, contrasts: Sequence[str]) -> np.ndarray:
    return predict(bundle, {c: folder / f"{c}.nii.gz" for c in contrasts}, on=contrasts[0], device="cpu")


def score(bundle: Path, root: Path, contrasts: Sequence[str]) -> float:
    """Mean Dice of three cases."""
    found = []
    for name in CASES:
        true = np.asarray(nib.load(root / name / "lesion_mask.nii.gz").dataobj) > 0
        found.append(dice(answer(bundle, root / name, contrasts) > 0, true))
    return float(np.mean(found))


def test_one_missing_contrast_costs_a_part_of_the_score(bundle: Path, root: Path) -> None:
    whole = score(bundle, root, CONTRASTS)
    assert whole > 0.6, "with all contrasts the lesion is found"
    for missing in CONTRASTS:
        assert score(bundle, root, [c for c in CONTRASTS if c != missing]) >= whole / 2, missing
    for alone in CONTRASTS:  # two of three gone: worse, but an answer
        assert score(bundle, root, [alone]) > 0.1, alone


def test_the_order_of_contrasts_does_not_matter(bundle: Path, root: Path) -> None:
    first = answer(bundle, root / CASES[0], ("t1", "t2", "flair"))
    inputs = {c: root / CASES[0] / f"{c}.nii.gz" for c in ("flair", "t1", "t2")}
    assert np.array_equal(first, predict(bundle, inputs, on="t1", device="cpu")) and first.any()


def test_a_contrast_never_seen_is_looked_at_with_a_warning(bundle: Path, root: Path, tmp_path: Path) -> None:
    shutil.copy(root / CASES[0] / "t2.nii.gz", tmp_path / "dwi.nii.gz")
    inputs = {"t1": root / CASES[0] / "t1.nii.gz", "dwi": tmp_path / "dwi.nii.gz"}
    with pytest.warns(BrainfmWarning, match=r"input\.dwi: the bundle was trained on .*never on dwi"):
        found = predict(bundle, inputs, on="t1", device="cpu")
    same = answer(bundle, root / CASES[0], ("t1", "t2"))
    assert dice(found > 0, same > 0) > 0.99, "taken for what it shows: the voxels of the t2 under another name"
    with pytest.warns(BrainfmWarning):
        alone = predict(bundle, {"dwi": tmp_path / "dwi.nii.gz"}, device="cpu")
    assert alone.any() and np.array_equal(alone, answer(bundle, root / CASES[0], ["t2"])), "and alone it is enough"
