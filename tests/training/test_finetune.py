"""Fine-tuning: transfer that is real, folds by subject, a bundle that predicts, resumption, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfm.cli import main, resolve
from brainfm.data.patches import find_cases
from brainfm.data.store import Store
from brainfm.nets.weights import load_backbone
from brainfm.specs import ConfigError
from brainfm.tasks.bundle import read_bundle
from brainfm.training.finetune import _fresh, finetune, split_cases
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.pretrain import pretrain


def words(store: Store, run: Path, backbone: Path | str, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", f"backbone_from={backbone}", "backbone=unet_tiny", "trainer=cpu",
        "task=segmentation", "task.target=lesion", "task.patch_vox=[16,16,16]", "folds=2", "trainer.max_steps=8",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.checkpoint_every=2", "trainer.evaluate_every=4",
        "trainer.threads=1", "trainer.log_every=1",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def backbone(toy_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("pretrain") / "run"
    pretrain(resolve("pretrain", [
        f"store={toy_store.path}", f"run={run}", "backbone=unet_tiny", "trainer=cpu", "trainer.max_steps=3",
        "trainer.batch_size=1", "trainer.workers=0", "data.patch_vox=[16,16,16]", "objective.latent_channels=16",
    ]))  # fmt: skip
    return run / "backbone.safetensors"


@pytest.fixture(scope="module")
def tuned(toy_store: Store, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finetune") / "run"
    assert finetune(resolve("finetune", words(toy_store, run, backbone))) == run / "bundle"
    return run


def test_scores_cover_every_case_once(tuned: Path) -> None:
    with (tuned / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["subject"] for row in rows) == [f"{n:02d}" for n in range(6)]
    assert {row["fold"] for row in rows} == {"0", "1"}
    scores = json.loads((tuned / "scores.json").read_text())
    assert scores["n_cases"] == 6 and scores["low"] <= scores["dice"] <= scores["high"]
    assert scores["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))


def test_bundle_holds_the_best_weights_of_each_fold(tuned: Path, backbone: Path) -> None:
    bundle = read_bundle(tuned / "bundle")
    assert len(bundle.networks) == 2
    assert bundle.provenance.parents == (load_backbone(backbone).fingerprint,)
    assert set(bundle.task.contrasts) == {"t1", "flair"} and bundle.task.values == (0, 1)
    for fold, network in enumerate(bundle.networks):
        best = load_file(tuned / f"fold{fold}" / "best.safetensors")
        assert all(torch.equal(value, best[name]) for name, value in network.state_dict().items())


def test_encoder_starts_from_the_file_and_scratch_does_not(toy_store: Store, backbone: Path, tuned: Path) -> None:
    spec = read_bundle(tuned / "bundle").task
    loaded = load_backbone(backbone).backbone
    config = resolve("finetune", words(toy_store, Path("x"), backbone))
    pretrained = _fresh(config, loaded, spec, fold=0)
    scratch = _fresh(config | {"backbone_from": "none"}, loaded, spec, fold=0)
    for name, value in loaded.state_dict().items():
        assert torch.equal(pretrained.backbone.state_dict()[name], value)
    assert not torch.equal(scratch.backbone.blocks()[0][0][0].weight, loaded.blocks()[0][0][0].weight)
    # same decoder at the start: the comparison is about the encoder alone
    assert all(torch.equal(a, b) for a, b in zip(pretrained.decoder.parameters(), scratch.decoder.parameters()))


def test_every_parameter_learns(toy_store: Store, backbone: Path, tuned: Path) -> None:
    config = resolve("finetune", words(toy_store, Path("x"), backbone))
    start = _fresh(config, load_backbone(backbone).backbone, read_bundle(tuned / "bundle").task, fold=0)
    trained = read_checkpoint(tuned / "fold0" / CHECKPOINT)["module"]
    still = [name for name, value in start.state_dict().items() if torch.equal(trained[f"task.{name}"], value)]
    assert not still


def test_interrupted_and_resumed_equals_uninterrupted(
    toy_store: Store, backbone: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks off in the second fold between two checkpoints, as a crash would."""
    import brainfm.training.finetune as module

    run, config = tmp_path / "run", resolve("finetune", words(toy_store, tmp_path / "run", backbone))
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8 + 6:  # one draw a step: in step 6 of fold 1, checkpoints follow steps 4 and 6
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    original = module.draw
    monkeypatch.setattr(module, "draw", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config)
    monkeypatch.undo()
    finetune(config)
    assert (run / "cases.csv").read_bytes() == (tuned / "cases.csv").read_bytes()
    for fold in range(2):
        one, other = (load_file(r / f"fold{fold}" / "best.safetensors") for r in (run, tuned))
        assert all(torch.equal(one[name], other[name]) for name in one)
        curves = [(r / f"fold{fold}" / "curves.csv").read_bytes() for r in (run, tuned)]
        assert curves[0] == curves[1]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_no_subject_on_two_sides(toy_store: Store, k: int) -> None:
    cases, _ = find_cases(toy_store, ["t1", "flair"], "lesion")
    splits = split_cases(cases, k, seed=0)
    assert len(splits) == k
    for trained, held in splits:
        assert trained and held
        assert not {c.session.subject_key for c in trained} & {c.session.subject_key for c in held}
    if k > 1:
        assert sorted(c.session.subject for _, held in splits for c in held) == [f"{n:02d}" for n in range(6)]


def test_refusals(toy_store: Store, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str, backbone_from: Path | str = backbone) -> str:
        assert main(["finetune", *words(toy_store, tmp_path / "run", backbone_from, *more)]) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text
        assert not (tmp_path / "run" / "bundle").exists()
        return text

    assert "folds=7" in said("folds=7")
    assert "tumour_mask" in said("task.target=tumour")
    assert "16" in said("task.patch_vox=[10,16,16]")
    assert "nowhere.safetensors" in said(backbone_from=tmp_path / "nowhere.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(backbone.read_bytes()[:-100])
    assert "damaged.safetensors" in said(backbone_from=damaged)
    assert "fusion" in said("task.fusion=sum")


def test_a_held_case_is_never_trained_on(tuned: Path, toy_store: Store) -> None:
    """The rows of a fold name the subjects it held out; the splits say the same."""
    cases, _ = find_cases(toy_store, ["flair", "t1"], "lesion")
    splits = split_cases(cases, 2, seed=0)
    with (tuned / "cases.csv").open() as file:
        for row in csv.DictReader(file):
            held = {c.session.subject for c in splits[int(row["fold"])][1]}
            assert row["subject"] in held


def test_unknown_kind(toy_store: Store, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.kind"):
        finetune(resolve("finetune", words(toy_store, tmp_path / "run", backbone, "task.kind=guess")))
