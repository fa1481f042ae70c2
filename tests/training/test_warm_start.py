"""A pre-training that goes on from a backbone file: what is taken, what is said of it, and what resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.objectives.objective import Objective, build_objective
from brainfm.specs import PreprocessSpec, Provenance
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.pretrain import pretrain
from brainfm.training.warm_start import take_weights
from brainfm.verbs.compose import resolve


def words(store: Store, run: Path, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", "backbone=unet_tiny", "trainer=cpu", "trainer.max_steps=4",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.evaluate_every=0", "trainer.checkpoint_every=2",
        "trainer.threads=1", "trainer.precision=32-true", "data.patch_vox=[16,16,16]", "data.validation=0.3",
        "objective.latent_channels=16", "probe=null",
    ]  # fmt: skip
    return [f"{key}={value}" for key, value in dict(word.split("=", 1) for word in (*default, *more)).items()]


@pytest.fixture(scope="module")
def first(toy_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("first")
    pretrain(resolve("pretrain", words(toy_store, run)))
    return run / "backbone.safetensors"


def test_goes_on_from_the_files_weights(first: Path, toy_store: Store, tmp_path: Path) -> None:
    """Rates of a warm-up's first steps move weights by less than 1e-5: what is left is the file's."""
    more = [f"backbone_from={first}", "backbone=unet_s", "optim.lr=1e-6", "average=null"]  # the network is the file's
    pretrain(resolve("pretrain", words(toy_store, tmp_path / "on", *more)))
    before, after = load_backbone(first), load_backbone(tmp_path / "on" / "backbone.safetensors")
    assert after.backbone.config == before.backbone.config
    weights, old = after.backbone.state_dict(), before.backbone.state_dict()
    apart = max(float((weights[name] - old[name]).abs().max()) for name in old)
    assert 0 < apart < 1e-4
    assert all(torch.allclose(after.extra[name], before.extra[name], atol=1e-4) for name in before.extra)
    assert after.provenance.parents == (before.fingerprint,)
    told = after.provenance.config["before"]
    assert (told["steps"], told["samples"]) == (4, 8)
    assert after.subjects is not None and before.subjects is not None
    assert after.subjects == before.subjects  # the same people, the same salt


def test_people_of_both_trainings_are_told(first: Path, toy_store: Store, tmp_path: Path) -> None:
    more = [f"backbone_from={first}", "data.split_seed=5", "trainer.max_steps=1"]
    pretrain(resolve("pretrain", words(toy_store, tmp_path / "on", *more)))
    before, after = load_backbone(first).subjects, load_backbone(tmp_path / "on" / "backbone.safetensors").subjects
    assert before is not None and after is not None and before.salt == after.salt
    assert set(before.hashes) < set(after.hashes)  # other people are held out now


def test_average_begins_at_the_files_weights(first: Path, toy_store: Store, tmp_path: Path) -> None:
    more = [f"backbone_from={first}", "optim.lr=1e-6", "trainer.max_steps=1"]
    pretrain(resolve("pretrain", words(toy_store, tmp_path / "on", *more)))
    module = read_checkpoint(tmp_path / "on" / CHECKPOINT)["module"]
    old = load_backbone(first).backbone.state_dict()
    for name, value in old.items():
        assert torch.allclose(module[f"average.network.backbone.{name}"], value, atol=1e-5)


def test_resumes_and_refuses_another_file(first: Path, toy_store: Store, tmp_path: Path) -> None:
    """The file may have moved: what counts is what is in it."""
    start = [f"backbone_from={first}"]
    pretrain(resolve("pretrain", words(toy_store, tmp_path / "whole", *start)))
    pretrain(resolve("pretrain", words(toy_store, tmp_path / "on", *start)))
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(first.read_bytes())
    run = tmp_path / "on"
    assert pretrain(resolve("pretrain", words(toy_store, run, f"backbone_from={moved}"))).step == 4
    other = tmp_path / "whole" / "backbone.safetensors"
    with pytest.raises(ConfigError, match="holds a run with backbone_from="):
        pretrain(resolve("pretrain", words(toy_store, run, f"backbone_from={other}")))
    with pytest.raises(ConfigError, match="holds a run with backbone_from="):
        pretrain(resolve("pretrain", words(toy_store, run)))


def test_another_objective_takes_the_encoder_alone(first: Path) -> None:
    """cross_contrast's latents and decoder have no place in mae, or another shape; each group is whole or absent."""
    loaded = load_backbone(first)
    mae = build_objective("mae", build_backbone(**loaded.backbone.config), patch_vox=(16, 16, 16), seed=0)
    fresh = {name: value.clone() for name, value in mae.state_dict().items()}
    report = take_weights(mae, loaded, "first")
    assert set(report.loaded) == {name for name in fresh if name.startswith("backbone.")}
    assert set(report.unused) == set(loaded.extra) and set(report.left_at_init) == set(fresh) - set(report.loaded)
    for name, value in mae.state_dict().items():
        wanted = loaded.backbone.state_dict()[name[9:]] if name.startswith("backbone.") else fresh[name]
        assert torch.equal(value, wanted)


def test_unknown_file_is_one_sentence(toy_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", *words(toy_store, run, "backbone_from=brainfm_z")]) == 2
    assert "brainfm_z: no such file, and no weights of this name ship" in capsys.readouterr().err
    assert not run.exists()


def test_a_head_of_the_same_classes_in_another_order_is_not_taken(tmp_path: Path) -> None:
    def made(*classes: str) -> Objective:
        torch.manual_seed(len(classes[0]))
        network = build_backbone("unet_tiny")
        return build_objective("dense_split", network, patch_vox=(16, 16, 16), seed=0, classes=classes)

    one, other = made("background", "head", "csf"), made("csf", "head", "background")
    file = tmp_path / "one.safetensors"
    save_backbone(
        file, one.backbone, objective={"name": "dense_split", "config": one.config}, decoder=one.dense, heads=one.heads,
        objective_state=one.state_for_file(), preprocess=PreprocessSpec(), patch_vox=(16, 16, 16),
        provenance=Provenance("0", "", ""),
    )  # fmt: skip
    report = take_weights(other, load_backbone(file), "one")
    assert not any(name.startswith("heads.regions") for name in report.loaded)
    assert any(name.startswith("dense.") for name in report.loaded)
    assert any(name.startswith("heads.regions") for name in take_weights(one, load_backbone(file), "one").loaded)
