"""What a fine-tuning takes from a backbone's file: encoder, decoder, lesion row; who was seen; what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfm.batch import Batch
from brainfm.cli import main
from brainfm.data.manifest import read_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.inference.predict import predict
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.seen import SeenSubjects
from brainfm.specs import PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import read_bundle
from brainfm.tasks.registry import build_task
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.segmentation.study import SegmentationStudy
from brainfm.training.finetune import MEMBER, _begin, _fresh, finetune
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from tests.training.test_finetune_contracts import CLASSIFICATION, SEGMENTATION, config, small_store

PARTS = {"anatomy": 6, "pathology": 3, "free": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


def backbone_file(path: Path, store: Store, dense: bool = True, **more: Any) -> Path:
    torch.manual_seed(7)
    backbone = build_backbone("unet_tiny")
    if dense:
        decoder = DenseDecoder(backbone.widths, backbone.strides, PARTS)
        heads = {"lesion": DenseHead("pathology", 3, ("lesion",)), "regions": DenseHead("anatomy", 6, ("a", "b", "c"))}
        more = {"decoder": decoder, "heads": heads} | more
    save_backbone(
        path, backbone, objective={"name": "none", "config": {}}, objective_state={"code.weight": torch.zeros(2)},
        preprocess=store.spec, patch_vox=(16, 16, 16), provenance=Provenance("0", "", ""), **more,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def backbone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With decoder and heads; three of the eight people of the store, and one of another data set, were seen."""
    seen = SeenSubjects.of(["toy/1", "toy/4", "toy/6", "other/2"], 0)
    path = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    return backbone_file(path, store, subjects=seen, voxel_mm=(1.0, 4.0))


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


def scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "scores.json").read_text())


# ---- the decoder -----------------------------------------------------------------------------------------------------


def test_a_decoder_that_is_asked_for_is_copied_to_the_bit_and_learns(
    store: Store, backbone: Path, tmp_path: Path
) -> None:
    more = ("adapt.decoder=true", "adapt.restore_lengths=false", *SEGMENTATION)
    values = config(store, tmp_path / "run", backbone, *more)
    study, splits = _begin(values)
    start, loaded = _fresh(study, splits[0], study.backbone, decoder=True), load_backbone(backbone)
    assert isinstance(start, SegmentationTask) and loaded.decoder is not None
    for ours, theirs in ((start.backbone, loaded.backbone), (start.decoder, loaded.decoder)):
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert finetune(values) == tmp_path / "run" / "bundle"
    end = load_file(tmp_path / "run" / "fold0" / MEMBER)
    still = [name for name, value in start.state_dict().items() if torch.equal(end[name], value)]
    assert not still
    found = results(tmp_path / "run")["transfer"]
    assert found["file_has_decoder"] and found["asked"] is True and found["folds"]["fold0"]["decoder"]
    report = json.loads((tmp_path / "run" / "fold0" / "transfer.json").read_text())
    there = {f"backbone.{n}" for n in loaded.backbone.state_dict()} | {
        f"decoder.{n}" for n in start.decoder.state_dict()
    }
    assert set(report["loaded"]) == there and set(report["left_at_init"]) == set(start.state_dict()) - there
    assert report["unused"] == ["objective.code.weight", "heads.lesion.weight", "heads.lesion.bias",
                                "heads.regions.weight", "heads.regions.bias"]  # fmt: skip
    assert scores(tmp_path / "run")["decoder"]["taken"] == 1


def test_a_decoder_that_is_not_asked_for_is_not_taken(store: Store, backbone: Path, tmp_path: Path) -> None:
    finetune(config(store, tmp_path / "run", backbone, "adapt.decoder=false", *SEGMENTATION))
    assert not any(name.startswith("head.") for name in load_file(tmp_path / "run" / "fold0" / MEMBER))
    assert scores(tmp_path / "run")["decoder"] == {
        "asked": False, "taken": 0, "of": 1, "gain_in_trials": None, "trial_steps": 0,
    }  # fmt: skip
    report = json.loads((tmp_path / "run" / "fold0" / "transfer.json").read_text())
    assert any(name.startswith("decoder.") for name in report["unused"])


def test_a_decoder_that_cannot_be_is_refused_in_one_sentence(
    store: Store, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(origin: Path | str, *more: str) -> str:
        values = [
            f"store={store.path}", f"run={tmp_path / 'run'}", f"backbone_from={origin}", "adapt.decoder=true", *more
        ]  # fmt: skip
        assert main(["finetune", *values]) == 2
        text = capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "run").exists()
        return text

    plain = backbone_file(tmp_path / "plain.safetensors", store, dense=False)
    assert said(plain, *SEGMENTATION).endswith(
        "plain.safetensors: holds no decoder, only an encoder; expected a file of a pre-training with one"
    )
    assert "backbone_from=none brings no decoder" in said("none", *SEGMENTATION)
    assert "a classification answers without a decoder" in said(backbone, *CLASSIFICATION)


def test_a_file_without_decoder_costs_no_trial(store: Store, tmp_path: Path) -> None:
    plain = backbone_file(tmp_path / "plain.safetensors", store, dense=False)
    finetune(config(store, tmp_path / "run", plain, *SEGMENTATION))
    assert not (tmp_path / "run" / "fold0" / "decoder.json").exists() and "decoder" not in scores(tmp_path / "run")


AUTO = ("folds=2", "trainer.max_steps=8", "adapt.trial_share=0.5", "adapt.trial_steps=1", *SEGMENTATION)


def scripted(monkeypatch: pytest.MonkeyPatch, gain: float) -> list[set[str]]:
    """The trial's scores as if the decoder gained so much; returns who was asked."""
    asked: list[set[str]] = []

    def each(self: SegmentationStudy, task: SegmentationTask, cases: Any, engine: Any) -> list[float]:
        asked.append({case.session.subject for case in cases})
        return [0.5 + gain * (task.head is not None) + 0.01 * n for n, _ in enumerate(cases)]

    monkeypatch.setattr(SegmentationStudy, "each", each)
    return asked


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_auto_takes_it_where_inner_folds_say_so(
    gain: float, store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, gain)
    finetune(config(store, tmp_path / "run", backbone, *AUTO))
    found = results(tmp_path / "run")
    for place, split in enumerate(found["splits"]):
        held = {key.split("/")[1] for key in split["held"]}
        mine = asked[4 * place : 4 * place + 4]
        assert len(mine) == 4 and not held & set().union(*mine)
        fold = found["transfer"]["folds"][split["folder"]]
        assert (
            fold["decoder"] == (gain > 0) == ("head.weight" in load_file(tmp_path / "run" / split["folder"] / MEMBER))
        )
        assert fold["trial"]["gain"] == pytest.approx(gain) and fold["trial"]["steps"] == 4 == 0.5 * 8
    assert scores(tmp_path / "run")["decoder"] == {
        "asked": "auto", "taken": 2 * (gain > 0), "of": 2, "gain_in_trials": pytest.approx(gain), "trial_steps": 8,
    }  # fmt: skip
    receipt = read_bundle(tmp_path / "run" / "bundle").provenance.receipt
    assert receipt["samples"] == 2 * (8 + 4) * 2, "what the trials cost is counted"
    finetune(config(store, tmp_path / "run", backbone, *AUTO))
    assert len(asked) == 8, "nothing is tried twice"


def moved_lesions(root: Path, store: Store, held: set[str]) -> Store:
    """The same store, but the labels of some people lie elsewhere."""
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[3:6, 9:12, 9:12] = 1
    manifest = read_manifest(store.path.parent / "m.csv")
    text = manifest.path.read_text().replace(",lesion.nii.gz", f",{manifest.path.parent / 'lesion.nii.gz'}")
    header, *lines = text.splitlines()
    nib.save(nib.Nifti1Image(mask, np.diag([8.0, 8.0, 8.0, 1.0])), root / "elsewhere.nii.gz")
    made = [header]
    for line in lines:
        cells = line.split(",")
        cells[header.split(",").index("path")] = str(manifest.path.parent / cells[header.split(",").index("path")])
        if cells[1] in held:
            cells[header.split(",").index("lesion_mask")] = str(root / "elsewhere.nii.gz")
        made.append(",".join(cells))
    (root / "m.csv").write_text("\n".join(made) + "\n")
    prepare(read_manifest(root / "m.csv"), root / "store", PreprocessSpec(spacing_mm=(8, 8, 8)), 1)
    return Store.open(root / "store")


def test_auto_is_the_same_each_time_and_never_looks_at_scored_labels(
    store: Store, backbone: Path, tmp_path: Path
) -> None:
    """With the labels of the held-out people moved, the trial of their fold finds the same to the last digit."""
    for name in ("one", "again"):
        finetune(config(store, tmp_path / name, backbone, *AUTO))
    found = [results(tmp_path / name) for name in ("one", "again")]
    held = {key.split("/")[1] for key in found[0]["splits"][0]["held"]}
    poisoned = moved_lesions(tmp_path, store, held)
    finetune(config(poisoned, tmp_path / "poisoned", backbone, *AUTO))
    found.append(results(tmp_path / "poisoned"))
    assert {key.split("/")[1] for key in found[2]["splits"][0]["held"]} == held, "the folds are the same"
    trials = [f["transfer"]["folds"]["fold0"]["trial"] | {"seconds": 0} for f in found]
    assert trials[0] == trials[1] == trials[2] and trials[0]["subjects"] == 4
    other = [f["transfer"]["folds"]["fold1"]["trial"]["scores"] for f in found]
    assert other[0] == other[1] != other[2], "of the other fold these people are the training side"


def test_a_trial_that_was_broken_off_goes_on(
    store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from brainfm.training.average import WeightAverage

    values = [
        config(store, tmp_path / name, backbone, "trainer.checkpoint_every=1", "adapt.trial_steps=2", *AUTO[:2],
               *SEGMENTATION) for name in ("whole", "broken")
    ]  # fmt: skip
    finetune(values[0])
    original, calls = WeightAverage.update, []

    def failing(self: Any, step: int) -> None:
        calls.append(step)
        if len(calls) == 4:  # the second step of the second of four trainings
            raise RuntimeError("power cut")
        original(self, step)

    monkeypatch.setattr(WeightAverage, "update", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(values[1])
    assert (tmp_path / "broken" / "fold0" / "trial" / "decoder0" / CHECKPOINT).exists()
    finetune(values[1])
    monkeypatch.undo()
    whole, broken = (json.loads((tmp_path / n / "fold0" / "decoder.json").read_text()) for n in ("whole", "broken"))
    assert {k: whole[k] for k in ("taken", "scores", "gain")} == {k: broken[k] for k in ("taken", "scores", "gain")}
    assert sum(r["samples"] for r in whole["receipts"]) == sum(r["samples"] for r in broken["receipts"]) == 2 * 8


def test_members_of_either_build_answer_the_same_after_reloading_without_the_backbone_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fold takes the decoder, the other does not; the bundle needs nothing but itself."""
    origin = backbone_file(tmp_path / "b.safetensors", store)
    calls: list[int] = []

    def each(self: SegmentationStudy, task: SegmentationTask, cases: Any, engine: Any) -> list[float]:
        calls.append(1)
        return [0.5 + (0.1 if len(calls) <= 4 else -0.1) * (task.head is not None)] * len(cases)

    monkeypatch.setattr(SegmentationStudy, "each", each)
    finetune(config(store, tmp_path / "run", origin, *AUTO))
    origin.unlink()
    bundle = read_bundle(tmp_path / "run" / "bundle")
    assert [network.settings() for network in bundle.networks] == [{"dense_channels": 11}, {}]
    image, present = torch.randn(1, 2, 16, 16, 16), torch.ones(1, 2, dtype=torch.bool)
    for fold, network in enumerate(bundle.networks):
        module = read_checkpoint(tmp_path / "run" / f"fold{fold}" / CHECKPOINT)["module"]
        trained = build_task(bundle.task, build_backbone("unet_tiny"), **network.settings()).eval()
        trained.load_state_dict({n: module[f"average.network.{n}"] for n in trained.state_dict()})
        with torch.no_grad():
            assert torch.equal(network(image, present), trained(image, present))
    root = store.path.parent
    made = predict(tmp_path / "run" / "bundle", {"t1": root / "0_t1.nii.gz"}, tmp_path / "mask.nii.gz", device="cpu")
    assert made is not None and (tmp_path / "mask.nii.gz").exists()


def test_deep_supervision_goes_with_a_decoder(store: Store, backbone: Path, tmp_path: Path) -> None:
    more = ("adapt.decoder=true", "task.deep_supervision=true", *SEGMENTATION)
    finetune(config(store, tmp_path / "run", backbone, *more))
    assert not any("auxiliary" in name for name in load_file(tmp_path / "run" / "fold0" / MEMBER))
    assert read_bundle(tmp_path / "run" / "bundle").networks[0].settings() == {"dense_channels": 11}


@pytest.mark.parametrize("adapt", ["frozen", "last_blocks", "sawtooth", "full"])
def test_every_adaptation_takes_a_decoder(adapt: str, store: Store, backbone: Path, tmp_path: Path) -> None:
    finetune(config(store, tmp_path / "run", backbone, f"adapt={adapt}", "adapt.decoder=true", *SEGMENTATION))
    loaded, end = load_backbone(backbone), load_file(tmp_path / "run" / "fold0" / MEMBER)
    assert loaded.decoder is not None
    assert not any(torch.equal(end[f"decoder.{n}"], v) for n, v in loaded.decoder.state_dict().items())
    same = [torch.equal(end[f"backbone.{n}"], v) for n, v in loaded.backbone.state_dict().items()]
    assert all(same) if adapt == "frozen" else not all(same)


# ---- the last layer --------------------------------------------------------------------------------------------------


def test_a_lesion_question_begins_as_the_pathology_row(store: Store, backbone: Path, tmp_path: Path) -> None:
    words = ("adapt.decoder=true", "task.head_start=fresh", *SEGMENTATION)
    study, splits = _begin(config(store, tmp_path / "run", backbone, *words))
    task, loaded = _fresh(study, splits[0], study.backbone, decoder=True).eval(), load_backbone(backbone)
    assert isinstance(task, SegmentationTask) and task.head is not None and loaded.decoder is not None
    row = loaded.heads["lesion"]
    assert torch.equal(task.head.weight[1, 6:9], row.weight[0]) and torch.equal(task.head.bias[1:], row.bias)
    rest = task.head.weight.clone()
    rest[1, 6:9] = 0
    assert not rest.any() and not task.head.bias[0]
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        answered = torch.softmax(task(image, torch.ones(2, 1, dtype=torch.bool)), dim=1)[:, 1:]
        dense = loaded.decoder(loaded.backbone.features(image))
        torch.testing.assert_close(answered, torch.sigmoid(row(loaded.decoder.split(dense)["pathology"])))
    assert task.began == "a pre-trained head on part pathology"


@pytest.mark.parametrize(("losses", "began"), [((0.4, 0.5), "pre-trained head on"), ((0.5, 0.4), "linear probe of")])
def test_the_pathology_row_stays_where_a_linear_probe_tells_less(
    losses: tuple[float, float],
    began: str,
    store: Store,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study, splits = _begin(config(store, tmp_path / "run", backbone, "adapt.decoder=true", *SEGMENTATION))
    of_row_and_probe = iter(losses)
    monkeypatch.setattr(SegmentationTask, "loss_of", lambda *_: next(of_row_and_probe))
    task = _fresh(study, splits[0], study.backbone, decoder=True)
    assert isinstance(task, SegmentationTask) and began in task.began


def test_the_loss_of_voxels_is_that_of_their_image(store: Store, backbone: Path, tmp_path: Path) -> None:
    study, splits = _begin(config(store, tmp_path / "run", backbone, "adapt.decoder=true", *SEGMENTATION))
    task = _fresh(study, splits[0], study.backbone, decoder=True).eval()
    assert isinstance(task, SegmentationTask)
    image, there = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 1, dtype=torch.bool)
    label = (torch.rand(1, 16, 16, 16) > 0.7).long()
    with torch.no_grad():
        found = task.loss_of(task.climb(image, there)[-1][0].flatten(1).t(), label.flatten())
        whole = task.loss(task(image, there), Batch(image, torch.tensor([0]), present=there, label=label)).total
    assert found == pytest.approx(float(whole), rel=1e-4)


def test_an_anatomical_question_begins_as_a_linear_probe_of_the_decoder(people_store: Store, tmp_path: Path) -> None:
    """The probe is of the training side, the same each time; of a fresh decoder's features, too; with head_start=fresh
    there is none."""
    origin = backbone_file(tmp_path / "b.safetensors", people_store)
    more = ("task=segmentation", "task.target=tissue", "adapt.decoder=true", "folds=2")
    study, splits = _begin(config(people_store, tmp_path / "a", origin, *more))
    one, again, other = (_fresh(study, s, study.backbone, decoder=True) for s in (splits[0], splits[0], splits[1]))
    for task in (one, again, other):
        assert isinstance(task, SegmentationTask) and task.began == "a linear probe of the decoder's features"
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in one.state_dict().items())
    assert not torch.equal(one.state_dict()["head.weight"], other.state_dict()["head.weight"])
    case = splits[0].held[0]
    place = study.place()
    fresh_study, _ = _begin(config(people_store, tmp_path / "f", origin, "task.head_start=fresh", *more))
    fresh = _fresh(fresh_study, splits[0], study.backbone, decoder=True)
    assert isinstance(fresh, SegmentationTask) and fresh.began == "fresh"
    with torch.no_grad():
        linear, chance = (study.study.watch(task.eval(), [case], place) for task in (one, fresh))
    assert linear > chance + 0.1, "even features that nothing was learnt with tell something"
    assert getattr(_fresh(study, splits[0], study.backbone), "began", "") == one.began
    with pytest.raises(ConfigError, match=r"task\.head_start=warm: expected linear or fresh"):
        _begin(config(people_store, tmp_path / "w", origin, "task.head_start=warm", *more))


def test_only_a_question_about_one_lesion_begins_as_the_row(store: Store, backbone: Path) -> None:
    loaded = load_backbone(backbone)
    asked = object.__new__(SegmentationStudy)
    study = {"kind": "segmentation", "contrasts": ("t1",), "patch_vox": (16, 16, 16)}
    for target, values, row in (
        ("tumour", (0, 1), True), ("WMH", (0, 1), True), ("hippocampus", (0, 1), False), ("lesion", (0, 1, 2), False),
    ):  # fmt: skip
        asked.spec = TaskSpec(target=target, values=values, **study)  # type: ignore[arg-type]
        assert (asked.row_of(loaded) is not None) == row, target
    loaded.heads.pop("lesion")
    asked.spec = TaskSpec(target="lesion", values=(0, 1), **study)  # type: ignore[arg-type]
    assert asked.row_of(loaded) is None


# ---- who was seen, and at what size of voxels ------------------------------------------------------------------------


def test_people_of_the_pre_training_among_the_tested_are_counted(
    store: Store, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(config(store, tmp_path / "run", backbone, "folds=2", "adapt.decoder=false", *SEGMENTATION))
    said = capsys.readouterr().err
    assert "note: 3 of the 8 people tested here were in the pre-training of the backbone" in said
    assert scores(tmp_path / "run")["seen_in_pretraining"] == {"seen": 3, "of": 8}
    assert results(tmp_path / "run")["seen_in_pretraining"] == {"seen": 3, "of": 8}
    assert read_bundle(tmp_path / "run" / "bundle").seen == load_backbone(backbone).subjects
    assert "voxels of 8 x 8 x 8 mm; the backbone was trained on voxels of 1 to 4 mm" in said
    (split,) = _begin(config(store, tmp_path / "one", backbone, *SEGMENTATION))[1]
    held = {case.session.subject for case in split.held}
    assert f"{len(held & {'1', '4', '6'}) or 'none'} of the {len(held)} people" in capsys.readouterr().err


def test_nothing_is_said_where_the_file_does_not_know(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = backbone_file(tmp_path / "plain.safetensors", store, dense=False)
    finetune(config(store, tmp_path / "run", plain, *SEGMENTATION))
    said = capsys.readouterr().err
    assert "people tested here" not in said and "voxels of" not in said
    assert scores(tmp_path / "run")["seen_in_pretraining"] == "unknown"
    finetune(config(store, tmp_path / "scratch", "none", *SEGMENTATION))
    assert "seen_in_pretraining" not in scores(tmp_path / "scratch")


def test_fresh_weights_learn_at_one_rate_of_their_own(store: Store, backbone: Path, tmp_path: Path) -> None:
    study, _ = _begin(config(store, tmp_path / "a", "none", "scratch_lr_scale=2", *SEGMENTATION))
    assert (study.adapt.layer_decay, study.adapt.lr_scale, study.adapt.decoder) == (1.0, 2.0, False)
    study, _ = _begin(config(store, tmp_path / "b", backbone, "scratch_lr_scale=2", *SEGMENTATION))
    assert (study.adapt.layer_decay, study.adapt.lr_scale, study.adapt.decoder) == (1.0, 1.0, "auto")
    study, _ = _begin(config(store, tmp_path / "d", backbone, "adapt=layer_decay", *SEGMENTATION))
    assert study.adapt.layer_decay == 0.75
    study, _ = _begin(config(store, tmp_path / "c", backbone, "adapt=scratch", "scratch_lr_scale=2", *SEGMENTATION))
    assert (study.adapt.lr_scale, study.pretrained) == (3.0, None)
