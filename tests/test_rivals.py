"""Transformers and dino through the command line: pre-trained, fine-tuned, asked; as any other backbone."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.nets.backbone_file import load_backbone
from brainfm.probing.features import read
from brainfm.probing.table import ProbeTableSpec, probe
from brainfm.tasks.bundle import read_bundle
from tests.training.test_finetune_contracts import small_store

SEGMENTATION = ("task=segmentation", "task.target=lesion")
CLASSIFICATION = ("task=classification", "task.target=ill", "task.candidates=[tuned,features]")
VIT = ("backbone=vit_s", "backbone.name=vit", "backbone.width=24", "backbone.depth=2", "backbone.heads=2",
       "backbone.patch_vox=8", "backbone.grid_vox=[32,32,32]", "backbone.taps=2")  # fmt: skip
PRIMUS = ("backbone=primus_s", "backbone.name=primus", "backbone.width=24", "backbone.depth=2", "backbone.heads=2",
          "backbone.grid_vox=[32,32,32]")  # fmt: skip
DINO = ("objective=dino", "objective.prototypes=32", "objective.hidden_channels=16", "objective.bottleneck=8",
        "objective.local_crops=2")  # fmt: skip
MAE = ("objective=mae", "objective.mask_unit_vox=8", "objective.latent_channels=12")
RUNS = {
    "vit dino": (*VIT, *DINO),
    "vit mae": (*VIT, *MAE),
    "vit dense_split": (*VIT, "objective=dense_split", "objective.stride=4"),
    "primus mae": (*PRIMUS, *MAE),
    "unet dino": ("backbone=unet_tiny", *DINO),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


def pretrain(store: Store, run: Path, words: tuple[str, ...], steps: int) -> int:
    return main([
        "pretrain", f"store={store.path}", f"run={run}", "trainer=cpu", f"trainer.max_steps={steps}",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.log_every=1", "trainer.evaluate_every=1",
        "trainer.checkpoint_every=1", "trainer.threads=1", "data.patch_vox=[32,32,32]", "data.validation=0.4",
        "data.validation_batches=1", "guard=null", "probe=null", *words,
    ])  # fmt: skip


QUICK = ("vit dino", "primus mae")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_it_is_pre_trained_fine_tuned_and_asked(name: str, people_store: Store, store: Store, tmp_path: Path) -> None:
    assert pretrain(people_store, tmp_path / "pre", RUNS[name], 1) == 0
    file = tmp_path / "pre" / "backbone.safetensors"
    loaded = load_backbone(file)
    assert loaded.objective["name"] == name.split()[1] and not any("teacher" in key for key in loaded.extra)
    scan = store.path.parent / "1_t1.nii.gz"
    for task, ending in ((SEGMENTATION, "nii.gz"), (CLASSIFICATION, "json")):
        run = tmp_path / ending
        words = [
            f"store={store.path}", f"run={run}", f"backbone_from={file}", "trainer=cpu", "task.patch_vox=[32,32,32]",
            "folds=2", "trainer.max_steps=1", "trainer.batch_size=2", "trainer.workers=0", "trainer.threads=1",
            "baselines=[]", "audit=false", "mirror=[]", "clean=false", "report=false", "data.augment=null",
            "adapt.decoder=false", *task,
        ]  # fmt: skip
        assert main(["finetune", *words]) == 0
        bundle = read_bundle(run / "bundle")
        assert bundle.networks[0].backbone.config["name"] == loaded.backbone.config["name"]
        if task is CLASSIFICATION:
            assert bundle.task.pooling == {"vit": "token", "primus": "mean"}.get(name.split()[0], "attention")
        out = tmp_path / f"answer.{ending}"
        assert main(["predict", f"bundle={run / 'bundle'}", f"input.t1={scan}", f"out={out}"]) == 0
        if ending == "nii.gz":
            assert np.asarray(nib.load(out).dataobj).shape == nib.load(scan).shape
    out = tmp_path / "f.npz"
    assert main(["embed", f"backbone={file}", f"store={store.path}", f"out={out}", "device=cpu"]) == 0
    assert ("token" in read(out).parts) == name.startswith("vit")
    asked = ProbeTableSpec("ill", folds=2, repeats=1, resamples=10)
    rows = {(row.features, row.model): row for row in probe(store, tmp_path / "probe", asked, features=out).rows}
    assert (("token", "knn") in rows) == (("random network, token", "knn") in rows) == name.startswith("vit")
    assert all(row.minus_random is not None for (part, _), row in rows.items() if part in ("token", "backbone"))


def test_dino_interrupted_ends_with_the_same_weights(people_store: Store, tmp_path: Path) -> None:
    """Teacher and centres are in the checkpoint, and dropped branches belong to the samples."""
    words = (*RUNS["vit dino"], "backbone.drop_path=0.5")
    assert pretrain(people_store, tmp_path / "parts", (*words, "optim=wsd"), 1) == 0
    assert pretrain(people_store, tmp_path / "at_once", (*words, "optim=wsd"), 3) == 0
    assert pretrain(people_store, tmp_path / "parts", (*words, "optim=wsd"), 3) == 0
    states = [
        load_backbone(tmp_path / run / "backbone.safetensors").backbone.state_dict() for run in ("parts", "at_once")
    ]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
