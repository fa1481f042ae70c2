"""The whole path through the command line, on phantoms and on real scans: files in, masks on the same grids out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm.cli import main
from tests.conftest import write_subjects


def run(*words: str) -> None:
    assert main(list(words)) == 0


def walk(root: Path, out: Path, masks: str, spacing_mm: int, contrasts: dict[str, Path], *finetune: str) -> Path:
    """manifest, doctor, prepare, pretrain, finetune, predict, evaluate. Returns the mask of ``contrasts``."""
    manifest, store, bundle = out / "m.csv", out / "store", out / "finetune" / "bundle"
    run("manifest", f"root={root}", f"out={manifest}", f"masks.lesion={masks}")
    run("doctor", f"manifest={manifest}", "workers=1")
    run("prepare", f"manifest={manifest}", f"store={store}", f"preprocess.spacing_mm={spacing_mm}", "workers=1")
    tiny = ("backbone=unet_tiny", "trainer=cpu", "trainer.workers=0", "trainer.batch_size=2", "trainer.threads=1")
    run("pretrain", f"store={store}", f"run={out / 'pretrain'}", *tiny, "trainer.max_steps=3",
        "data.patch_vox=[16,16,16]", "objective.latent_channels=16")  # fmt: skip
    backbone = out / "pretrain" / "backbone.safetensors"
    run("finetune", f"store={store}", f"run={out / 'finetune'}", "task.target=lesion", *tiny,
        f"backbone_from={backbone}", "task.patch_vox=[16,16,16]", "audit=false", *finetune)  # fmt: skip
    assert (out / "finetune" / "report.html").is_file()
    inputs = [f"input.{contrast}={path}" for contrast, path in contrasts.items()]
    run("predict", f"bundle={bundle}", *inputs, f"out={out / 'mask.nii.gz'}")
    run("evaluate", f"bundle={bundle}", f"manifest={manifest}", f"out={out / 'scores'}")
    return out / "mask.nii.gz"


def same_grid(mask: Path, scan: Path) -> bool:
    one, other = nib.load(mask), nib.load(scan)
    return one.shape == other.shape and np.array_equal(one.affine, other.affine) and one.get_data_dtype() == np.uint8


def test_from_files_to_scores_on_phantoms(tmp_path: Path) -> None:
    """The lesion is bright and on the left: a few dozen steps must find it there, which a flip anywhere would undo."""
    pytest.importorskip("monai")
    root = tmp_path / "cohort"
    (root / write_subjects(root, 6, contrasts=("t1", "flair")).name).unlink()
    contrasts = {"flair": root / "sub-03" / "flair.nii.gz", "t1": root / "sub-03" / "t1.nii.gz"}
    mask = walk(root, tmp_path, "lesion_mask*", 2, contrasts, "trainer.max_steps=60", "folds=2", "optim.lr=5e-3",
                "data.contrast_dropout=0", "data.augment=null", "baselines=[]", "mirror=[]")  # fmt: skip
    assert same_grid(mask, contrasts["flair"])
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert summary["cases"] == 6 and summary["metrics"]["dice"]["n"] == 6
    found = np.asarray(nib.load(mask).dataobj) > 0
    true = np.asarray(nib.load(root / "sub-03" / "lesion_mask.nii.gz").dataobj) > 0
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.5
    assert found[: true.shape[0] // 2].sum() > 0.9 * found.sum(), "on the left, where the lesion is"


def test_from_files_to_scores_on_real_scans(data3d: Path, tmp_path: Path) -> None:
    pytest.importorskip("monai")
    root = tmp_path / "real"
    for folder in ("openms_cross", "upenn_gbm", "tcga_lgg"):
        shutil.copytree(data3d / folder, root / folder)
    flair = data3d / "openms_cross" / "patient19" / "patient19_FLAIR.nii.gz"
    mask = walk(root, tmp_path, "*lesion_mask*|*seg-tumour*", 4, {"flair": flair}, "trainer.max_steps=4", "folds=1",
                "baselines=[features]", "clean=false")  # fmt: skip
    assert same_grid(mask, flair)
    with (tmp_path / "scores" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(row["note"] == "" and float(row["volume_ml_true"]) > 0 for row in rows)
