"""Fine-tuning: transfer that is real, folds by subject, a bundle that predicts, resumption, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfm.cli import main
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone_file import load_backbone
from brainfm.study.splits import SplitSpec, split_cases
from brainfm.tasks.bundle import read_bundle
from brainfm.tasks.segmentation.cases import find_cases
from brainfm.training.finetune import MEMBER, _begin, _fresh, dry_step, finetune
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.memory import MemoryPlan, settle
from brainfm.training.pretrain import pretrain
from brainfm.verbs.compose import resolve


def words(store: Store, run: Path, backbone: Path | str, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", f"backbone_from={backbone}", "backbone=unet_tiny", "trainer=cpu",
        "task=segmentation", "task.target=lesion", "task.patch_vox=[16,16,16]", "folds=2", "trainer.max_steps=8",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.checkpoint_every=2", "trainer.evaluate_every=4",
        "trainer.threads=1", "trainer.log_every=1", "baselines=[]", "audit=false", "report=false",
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
    assert scores["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)


def test_bundle_holds_the_averaged_weights_of_each_fold(tuned: Path, backbone: Path) -> None:
    bundle = read_bundle(tuned / "bundle")
    assert len(bundle.networks) == 2
    assert bundle.provenance.parents == (load_backbone(backbone).fingerprint,)
    assert set(bundle.task.contrasts) == {"t1", "flair"} and bundle.task.values == (0, 1)
    assert bundle.provenance.receipt["samples"] == 2 * 8 * 2  # folds, steps, samples a step
    for fold, network in enumerate(bundle.networks):
        member = load_file(tuned / f"fold{fold}" / MEMBER)
        module = read_checkpoint(tuned / f"fold{fold}" / CHECKPOINT)["module"]
        for name, value in network.state_dict().items():
            assert torch.equal(value, member[name]) and torch.equal(value, module[f"average.network.{name}"])
        weight = "decoder.out.weight"
        assert not torch.equal(member[weight], module[f"task.{weight}"])  # the average is not the last step


def test_encoder_starts_from_the_file_and_scratch_does_not(toy_store: Store, backbone: Path, tmp_path: Path) -> None:
    loaded = load_backbone(backbone).backbone
    given = words(toy_store, tmp_path / "run", backbone)
    tuning, splits = _begin(resolve("finetune", [*given, "adapt.restore_lengths=false"]))
    pretrained, scratch = _fresh(tuning, splits[0], tuning.backbone), _fresh(tuning, splits[0], None)
    for name, value in loaded.state_dict().items():
        assert torch.equal(pretrained.backbone.state_dict()[name], value)
    assert not torch.equal(scratch.backbone.blocks()[0][0][0].weight, loaded.blocks()[0][0][0].weight)
    # same decoder at the start, but for the last layer, a linear probe of each: the comparison is about the encoder
    assert all(
        torch.equal(value, scratch.decoder.get_parameter(name)) != name.startswith("out.")
        for name, value in pretrained.decoder.named_parameters()
    )


def test_filters_from_the_file_get_the_length_of_fresh_ones(toy_store: Store, backbone: Path, tmp_path: Path) -> None:
    """And the encoder says the same; blocks that are frozen stay equal to the bit."""
    loaded = load_backbone(backbone).backbone
    with torch.no_grad():
        for value in (p for p in loaded.parameters() if p.ndim == 5):
            value.mul_(6)
    given = words(toy_store, tmp_path / "run", backbone)
    for last, moved in ((None, [True, True]), (1, [False, True])):
        setting = f"adapt.last_blocks={'null' if last is None else last}"
        tuning, splits = _begin(resolve("finetune", [*given, setting]))
        task = _fresh(tuning, splits[0], loaded)
        blocks, own = loaded.blocks(), task.backbone.blocks()
        lengths = [[float(p.detach().norm()) for p in one.parameters() if p.ndim == 5] for one in (own[0], own[-1])]
        before = [
            [float(p.detach().norm()) for p in one.parameters() if p.ndim == 5] for one in (blocks[0], blocks[-1])
        ]
        assert [mine[0] < 0.5 * theirs[0] for mine, theirs in zip(lengths, before)] == moved
        image = torch.randn(1, 1, *tuning.study.spec.patch_vox)
        for one, two in zip(task.backbone(image), loaded(image), strict=True):
            torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


def test_every_parameter_learns(toy_store: Store, backbone: Path, tuned: Path, tmp_path: Path) -> None:
    tuning, splits = _begin(resolve("finetune", words(toy_store, tmp_path / "run", backbone)))
    start = _fresh(tuning, splits[0], tuning.backbone)
    trained = read_checkpoint(tuned / "fold0" / CHECKPOINT)["module"]
    still = [name for name, value in start.state_dict().items() if torch.equal(trained[f"task.{name}"], value)]
    assert not still


def test_interrupted_and_resumed_equals_uninterrupted(
    toy_store: Store, backbone: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks off in the second fold between two checkpoints, as a crash would."""
    import brainfm.training.supervised as module

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
        one, other = (load_file(r / f"fold{fold}" / MEMBER) for r in (run, tuned))
        assert all(torch.equal(one[name], other[name]) for name in one)
        curves = [(r / f"fold{fold}" / "curves.csv").read_bytes() for r in (run, tuned)]
        assert curves[0] == curves[1]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_no_subject_on_two_sides(toy_store: Store, k: int) -> None:
    cases, _ = find_cases(toy_store, ["t1", "flair"], "lesion")
    splits = split_cases(cases, SplitSpec(folds=k, repeats=2, inner=0.2 if k > 1 else 0.0))
    assert len(splits) == 2 * k
    for split in splits:
        sides = [{c.session.subject_key for c in side} for side in (split.trained, split.inner, split.held)]
        assert sides[0] and sides[2] and bool(sides[1]) == (k > 1)
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    if k > 1:
        held = [c.session.subject for s in splits if s.repeat == 0 for c in s.held]
        assert sorted(held) == [f"{n:02d}" for n in range(6)]
        assert k == 6 or [s.held for s in splits[:k]] != [s.held for s in splits[k:]]


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


def test_what_was_tried_on_held_out_cases_cannot_change_on_the_way(
    toy_store: Store, backbone: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers of a fold hold every variant that was tried: those of another setting must not be mixed in."""
    for changed in ("mirror=[1]", "clean=false"):
        assert main(["finetune", *words(toy_store, tuned, backbone, changed)]) == 2
        assert f"found {changed.split('=')[0]}=" in capsys.readouterr().err


def test_a_held_case_is_never_trained_on(tuned: Path, toy_store: Store) -> None:
    """The rows of a fold name the subjects it held out; results.json says the same, and so does the checkpoint."""
    results = json.loads((tuned / "results.json").read_text())
    held = {split["fold"]: {key.split("/")[1] for key in split["held"]} for split in results["splits"]}
    with (tuned / "cases.csv").open() as file:
        for row in csv.DictReader(file):
            assert row["subject"] in held[int(row["fold"])]
    for fold, subjects in held.items():
        trained = json.loads(read_checkpoint(tuned / f"fold{fold}" / CHECKPOINT)["identity"])["trained"]
        assert not {key.split("/")[1] for key in trained} & subjects


def test_a_label_that_is_no_class_is_told_before_any_step(
    people_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    more = ("task.target=tissue", "task.values=[0,1,2]")
    assert main(["finetune", *words(people_store, run, "none", *more)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(
        "brainfm: session d/p0/1: tissue_labels has the value 3, expected one of task.values=0, 1, 2"
    )
    assert not run.exists()


def test_unknown_kind(toy_store: Store, backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.kind"):
        finetune(resolve("finetune", words(toy_store, tmp_path / "run", backbone, "task.kind=guess")))


def test_a_plan_that_the_device_refuses_is_lowered(
    toy_store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU every plan is tried; here the step itself runs on the CPU, and the device's refusal is played."""
    import dataclasses

    tuning, _ = _begin(resolve("finetune", words(toy_store, tmp_path / "run", backbone)))
    spec = tuning.study.spec
    tried = []

    def step(made: MemoryPlan) -> None:
        tried.append((made.checkpointing, made.accumulate))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("no room")
        dry_step(tuning.settings, tuning.study, tuning.backbone, tuning.fabric, made)

    settled = settle(step, dataclasses.replace(tuning.plan, checkpointing=False, accumulate=1), stride=8)
    assert tried == [(False, 1), (True, 1), (True, 2)] and settled.micro_batch == 1
    assert len(settled.notes) == len(tuning.plan.notes) + 2
    assert tuning.study.spec == spec and not (tmp_path / "run" / "fold0").exists()
