"""A backbone whose only map has 16 voxels a token, through the whole of brainfm: one file and a line in a registry."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.nets.backbone import BACKBONES, build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.tasks.bundle import read_bundle
from tests.training.test_finetune_contracts import small_store

SEGMENTATION = ("task=segmentation", "task.target=lesion", "task.deep_supervision=true")
CLASSIFICATION = ("task=classification", "task.target=ill", "task.candidates=[tuned,regions,features]")


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKBONES, "toy_vit", "tests.nets.toy_vit")
        yield


@pytest.fixture(scope="module")
def pretrained(people_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Objective -> the file of a run of one step."""
    found = {}
    for objective, more in (("mae", ["objective.latent_channels=12"]), ("dense_split", ["objective.stride=4"])):
        run = tmp_path_factory.mktemp("run") / objective
        words = [
            f"store={people_store.path}", f"run={run}", "backbone=unet_tiny", "backbone.name=toy_vit", "trainer=cpu",
            "trainer.max_steps=1", "trainer.batch_size=1", "trainer.workers=0", "trainer.log_every=1",
            "trainer.evaluate_every=1", "trainer.threads=1", "data.patch_vox=[32,32,32]", "data.validation=0.4",
            "data.validation_batches=1", f"objective={objective}", "guard=null", "probe.fewshot_every=1",
            *more,
        ]  # fmt: skip
        assert main(["pretrain", *words]) == 0
        found[objective] = run / "backbone.safetensors"
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


def test_it_is_pre_trained(pretrained: dict[str, Path]) -> None:
    torch.manual_seed(0)
    start = build_backbone("toy_vit").state_dict()
    for objective, file in pretrained.items():
        loaded = load_backbone(file)
        assert (loaded.backbone.strides, loaded.objective["name"]) == ((16,), objective)
        assert loaded.report.loaded == tuple(start) and not loaded.report.left_at_init
        assert sum(p.numel() for p in loaded.backbone.parameters()) == sum(v.numel() for v in start.values())
    assert loaded.decoder is not None and loaded.decoder.widths == (8, 8, 8, 12) and list(loaded.heads)


@pytest.mark.parametrize(
    ("objective", "task"),
    [("mae", SEGMENTATION), ("dense_split", (*SEGMENTATION, "adapt.decoder=true")), ("mae", CLASSIFICATION),
     ("dense_split", CLASSIFICATION)],
)  # fmt: skip
def test_it_is_fine_tuned_predicts_and_explains(
    pretrained: dict[str, Path], objective: str, task: tuple[str, ...], store: Store, tmp_path: Path
) -> None:
    run, scan = tmp_path / "run", store.path.parent / "1_t1.nii.gz"
    words = [
        f"store={store.path}", f"run={run}", f"backbone_from={pretrained[objective]}", "trainer=cpu",
        "task.patch_vox=[32,32,32]", "folds=2", "trainer.max_steps=2", "trainer.batch_size=2", "trainer.workers=0",
        "trainer.checkpoint_every=2", "trainer.threads=1", "baselines=[]", "audit=false", "mirror=[]", "clean=false",
        "report=false", "data.augment=null", *task,
    ]  # fmt: skip
    assert main(["finetune", *words]) == 0
    bundle = read_bundle(run / "bundle")
    assert len(bundle.networks) == 2 and bundle.networks[0].backbone.config == {"name": "toy_vit", "width": 24}
    ending = "nii.gz" if task[0] == "task=segmentation" else "json"
    out, why = tmp_path / f"answer.{ending}", tmp_path / "why.nii.gz"
    assert main(["predict", f"bundle={run / 'bundle'}", f"input.t1={scan}", f"out={out}"]) == 0
    assert out.stat().st_size > 0
    layer = ["layer=decoder.1"] if ending == "nii.gz" else []
    assert main(["explain", f"bundle={run / 'bundle'}", f"input.t1={scan}", f"out={why}", *layer]) == 0
    heat = np.asarray(nib.load(why).dataobj)
    assert heat.shape == nib.load(scan).shape and np.isfinite(heat).all()
