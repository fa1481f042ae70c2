"""Every objective through the command line's pre-training: targets found, terms in the curves, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from brainfm.cli import main
from brainfm.curves import read_curves
from brainfm.data.store import Store
from brainfm.nets.backbone_file import load_backbone
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.pretrain import pretrain
from brainfm.verbs.compose import resolve

PARTS = {
    "anatomy_pathology": {"reconstruction", "regions", "patch", "cells"},
    "contrastive": {"contrast", "rank1"},
    "mae+contrastive": {"hidden", "contrast", "rank1"},
}


def words(store: Store, run: Path, objective: str, *more: str) -> list[str]:
    unit = ["objective.mask_unit_vox=4"] if objective == "anatomy_pathology" else []
    return [
        f"store={store.path}", f"run={run}", "backbone=unet_tiny", "trainer=cpu", "trainer.max_steps=6",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.log_every=1", "trainer.checkpoint_every=3",
        "trainer.evaluate_every=3", "trainer.threads=1", "trainer.precision=32-true", "data.patch_vox=[16,16,16]",
        "data.validation=0.3", "data.validation_batches=1", f"objective={objective}", *unit,
        "objective.latent_channels=20", "probe=null", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("objective", list(PARTS))
def test_trains_and_resumes_to_the_last_bit(people_store: Store, tmp_path: Path, objective: str) -> None:
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert pretrain(resolve("pretrain", words(people_store, whole, objective))).step == 6
    rows = read_curves(whole / "curves.csv")
    names = {name for _, name, _ in rows}
    assert PARTS[objective] <= names and {f"val_{name}" for name in PARTS[objective]} <= names
    loaded = load_backbone(whole / "backbone.safetensors")
    assert loaded.objective["name"] == objective

    from brainfm.training import loop

    def stop_after_three(run, optimizer, state, *rest, save=loop._save):
        save(run, optimizer, state, *rest)
        if state.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_save", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            pretrain(resolve("pretrain", words(people_store, halved, objective)))
    assert pretrain(resolve("pretrain", words(people_store, halved, objective))).step == 6
    assert read_curves(halved / "curves.csv") == rows
    ends = [read_checkpoint(run / CHECKPOINT)["module"] for run in (whole, halved)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])  # the queue among them


def test_sizes_of_the_targets_are_found_and_kept(
    people_store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "volumes.csv"
    rows = [f"d,p{n},1,x,{600 + n},{500 - 9 * n},{1300 + 12 * n}," for n in range(6)]
    table.write_text("\n".join(["dataset,subject,session,path,gm_ml,wm_ml,icv_ml,flag", *rows]) + "\n")
    more = [f"data.targets.volumes={table}", "trainer.max_steps=2", "objective.agreement_weight=0.1"]
    run = tmp_path / "run"
    given = [w for w in words(people_store, run, "anatomy_pathology") if "max_steps" not in w]
    assert main(["pretrain", *given, *more]) == 0
    said = capfd.readouterr().err
    assert "label maps for 5 of 7 sessions as tissues: tissue_labels (tissue)" in said
    assert "volumes of 2 regions (brainfm) for 6 subjects" in said and "shapes, procedural" in said
    config = load_backbone(run / "backbone.safetensors").objective["config"]
    assert (config["groups"], config["volumes"]) == (4, 2)
    assert json.dumps(config)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("objective.groups=7", "objective.groups=7: the data have 4; expected 4, 0 or null"),
        ("data.targets.labels={aseg_labels: auto}", "no label column 'aseg_labels', found tissue_labels"),
        ("data.targets.volumes=nowhere.csv", "nowhere.csv"),
        ("data.targets.level=lobes", "expected groups, tissues, regions or null"),
        ("objective.mask_unit_vox=16", "expected some, but not all"),
    ],
)
def test_refusals(
    people_store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str], word: str, sentence: str
) -> None:
    given = words(people_store, tmp_path / "run", "anatomy_pathology")
    given = [w for w in given if w.split("=")[0] != word.split("=")[0]]
    assert main(["pretrain", *given, word]) == 2
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-1].startswith("brainfm: ") and sentence in said[-1]
