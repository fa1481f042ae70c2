"""`brainfm compare` on toy networks: who is held out, what is resumed and added, what is refused, what is told."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.comparison import runs
from brainfm.comparison.contenders import pairs_of
from brainfm.comparison.scores import document
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone_file import load_backbone
from brainfm.specs import PreprocessSpec
from brainfm.training.pretrain import pretrain
from brainfm.verbs.compare import Settings, prepared
from brainfm.verbs.compose import resolve

MODELS = "models=[unet_tiny:mae,unet_tiny:contrastive,untrained,volumes]"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Fourteen small heads with tissues; the older the larger the fluid, women's heads brighter; five are held."""
    import nibabel as nib

    root, edge, scans = tmp_path_factory.mktemp("people"), 20, []
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))
    radius = np.sqrt((grid**2).sum(0))
    for number in range(14):
        rng = np.random.default_rng(number)
        inner = 0.25 + 0.02 * number
        tissue = np.select([radius < inner, radius < 0.6, radius < 0.85], [1, 3, 2], 0).astype(np.uint8)
        voxels = np.choose(tissue, [0, 20, 60, 100]) * (1.2 if number % 2 else 1.0) + rng.normal(0, 3, tissue.shape)
        voxels[tissue == 0] = 0
        for name, values in (("t1", voxels.astype(np.float32)), ("tissue", tissue)):
            nib.save(nib.Nifti1Image(values, np.diag([4.0, 4.0, 4.0, 1.0])), root / f"{number}_{name}.nii.gz")
        columns = {
            "age": str(30 + 3 * number), "sex": "MF"[number % 2], "side": "held" if number % 3 == 2 else "train",
            "tissues_labels": f"{number}_tissue.nii.gz",
        }  # fmt: skip
        scans.append(Scan("toy", f"p{number:02d}", "", "t1", f"{number}_t1.nii.gz", columns))
    write_manifest(root / "m.csv", scans)
    spec = PreprocessSpec(spacing_mm=(4, 4, 4), labels="nearest")
    assert not prepare(read_manifest(root / "m.csv"), root / "store", spec, 1).failed
    return Store.open(root / "store")


def words(store: Store, out: Path, *more: str) -> list[str]:
    given = {
        "models": MODELS.partition("=")[2], "store": str(store.path), "out": str(out), "tasks": "[age,sex,tissues]",
        "steps": "2", "seeds": "2", "shots": "[3]", "side_column": "side", "inner": "4", "rates": "[1e-3,1e-2]",
        "draws": "1", "device": "cpu", "pretrain.trainer.batch_size": "2", "pretrain.data.patch_vox": "[16,16,16]",
        "finetune.trainer.max_steps": "2", "finetune.data.augment": "null",
        "of_task.tissues.task.patch_vox": "[16,16,16]", "of_task.age.task.patch_vox": "[16,16,16]",
        "of_task.sex.task.patch_vox": "[16,16,16]", "pretrain.objective.latent_channels": "8",
    }  # fmt: skip
    for verb in ("pretrain", "finetune"):
        small = {"accelerator": "cpu", "workers": "0", "threads": "1", "checkpoint_every": "1", "compile": "null"}
        given |= {f"{verb}.trainer.{key}": value for key, value in small.items()}
    given |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in given.items()]


def test_it_runs(store, tmp_path):
    assert main(["compare", *words(store, tmp_path / "out")]) == 0
