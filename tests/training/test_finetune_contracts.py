"""What every way of fine-tuning promises: each adaptation, loss and option through `finetune` on the smallest data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfm.curves import read_curves
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.specs import PreprocessSpec, Provenance
from brainfm.tasks.bundle import read_bundle
from brainfm.tasks.segmentation.losses import LOSSES
from brainfm.tasks.whole_head.study import WholeHeadStudy
from brainfm.training import finetune as module
from brainfm.training.average import WeightAverage
from brainfm.training.finetune import MEMBER, _begin, finetune
from brainfm.training.loop import CHECKPOINT, read_checkpoint
from brainfm.training.memory import MemoryPlan, plan
from brainfm.training.settings import FinetuneSettings
from brainfm.verbs.compose import options, resolve

SEGMENTATION = ("task=segmentation", "task.target=lesion")
CLASSIFICATION = ("task=classification", "task.target=ill", "task.candidates=[tuned]")


def small_store(root: Path) -> Store:
    """Eight heads of 16 voxels an edge in two contrasts, all with a lesion, every second one ill, from four sites."""
    edge, scans = 16, []
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))
    head = (grid**2).sum(0) < 0.9
    lesion = ((grid - np.array([0.4, 0, 0])[:, None, None, None]) ** 2).sum(0) < 0.1
    nib.save(nib.Nifti1Image(lesion.astype(np.uint8), np.diag([8.0, 8.0, 8.0, 1.0])), root / "lesion.nii.gz")
    for number in range(8):
        rng = np.random.default_rng(number)
        for place, contrast in enumerate(("t1", "flair")):
            voxels = head * (100 + 20 * grid[place] + rng.normal(0, 3, head.shape)) + lesion * (40 + 60 * (number % 2))
            path = root / f"{number}_{contrast}.nii.gz"
            nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([8.0, 8.0, 8.0, 1.0])), path)
            columns = {"lesion_mask": "lesion.nii.gz", "ill": ["no", "yes"][number % 2], "site": "ABCD"[number // 2]}
            scans.append(Scan("toy", f"{number}", "", contrast, path.name, columns))
    write_manifest(root / "m.csv", scans)
    prepare(read_manifest(root / "m.csv"), root / "store", PreprocessSpec(spacing_mm=(8, 8, 8)), 1)
    return Store.open(root / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return small_store(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def backbone(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("backbone") / "backbone.safetensors"
    save_backbone(
        file, build_backbone("unet_tiny"), objective={"name": "none", "config": {}}, objective_state={},
        preprocess=store.spec, patch_vox=(16, 16, 16), provenance=Provenance("0", "", ""),
    )  # fmt: skip
    return file


def config(store: Store, run: Path, backbone: Path | str, *more: str) -> FinetuneSettings:
    default = [
        f"store={store.path}", f"run={run}", f"backbone_from={backbone}", "backbone=unet_tiny", "trainer=cpu",
        "task.patch_vox=[16,16,16]", "folds=1", "trainer.max_steps=5", "trainer.batch_size=2", "trainer.workers=0",
        "trainer.checkpoint_every=2", "trainer.threads=1", "baselines=[]", "audit=false", "mirror=[]", "clean=false",
        "optim.lr=1e-2", "data.augment=null",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return resolve("finetune", [f"{key}={value}" for key, value in given.items()])


def member(run: Path, fold: str = "fold0") -> dict[str, torch.Tensor]:
    return load_file(run / fold / MEMBER)


def moved(run: Path, backbone: Path) -> set[str]:
    """The encoder's weights in the bundle that are not those of the file, to the bit."""
    start, end = load_backbone(backbone).backbone.state_dict(), member(run)
    return {name for name, value in start.items() if not torch.equal(value, end[f"backbone.{name}"])}


@pytest.mark.parametrize("task", [SEGMENTATION, CLASSIFICATION], ids=["segmentation", "classification"])
@pytest.mark.parametrize("adapt", options("adapt"))
def test_every_adaptation_moves_what_it_may(
    adapt: str, task: tuple[str, ...], store: Store, backbone: Path, tmp_path: Path
) -> None:
    values = config(store, tmp_path / "run", backbone, f"adapt={adapt}", *task)
    assert finetune(values) == tmp_path / "run" / "bundle"
    loaded = load_backbone(backbone).backbone
    learning = loaded.blocks()[len(loaded.blocks()) - (values.adapt.last_blocks or 0) :]
    if values.adapt.last_blocks is None:
        learning = loaded.blocks()
    own = {id(p) for block in learning for p in block.parameters()}
    may = {name for name, parameter in loaded.named_parameters() if id(parameter) in own}
    changed = moved(tmp_path / "run", backbone)
    assert changed == may
    assert bool(may) == (adapt != "frozen")
    bundle = read_bundle(tmp_path / "run" / "bundle")
    fresh = build_backbone("unet_tiny")
    assert bundle.networks[0].backbone.config == fresh.config
    parents = () if adapt == "scratch" else (load_backbone(backbone).fingerprint,)
    assert bundle.provenance.parents == parents


@pytest.mark.parametrize("task", [SEGMENTATION, CLASSIFICATION], ids=["segmentation", "classification"])
@pytest.mark.parametrize("adapt", ["sawtooth", pytest.param("last_blocks", marks=pytest.mark.slow)])
def test_every_adaptation_resumes_exactly(
    adapt: str, task: tuple[str, ...], store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (f"adapt={adapt}", "adapt.head_fraction=0.4", "trainer.max_steps=8", *task)
    finetune(config(store, tmp_path / "whole", backbone, *more))
    original = WeightAverage.update

    def failing(self: Any, step: int) -> None:
        if step == 6:  # the last checkpoint is of step 4, in the second tooth of the saw
            raise RuntimeError("power cut")
        original(self, step)

    monkeypatch.setattr(WeightAverage, "update", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config(store, tmp_path / "broken", backbone, *more))
    monkeypatch.undo()
    finetune(config(store, tmp_path / "broken", backbone, *more))
    one, other = member(tmp_path / "whole"), member(tmp_path / "broken")
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "whole" / "cases.csv").read_bytes() == (tmp_path / "broken" / "cases.csv").read_bytes()


def test_scratch_takes_the_network_of_the_file_and_not_its_weights(
    store: Store, backbone: Path, tmp_path: Path
) -> None:
    finetune(config(store, tmp_path / "a", backbone, "adapt=scratch", "backbone=unet_b", *CLASSIFICATION))
    finetune(config(store, tmp_path / "b", "none", "adapt=scratch", *CLASSIFICATION))
    one, other = member(tmp_path / "a"), member(tmp_path / "b")
    assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(loss: str, store: Store, backbone: Path, tmp_path: Path) -> None:
    finetune(config(store, tmp_path / "run", backbone, f"task.loss={loss}", *SEGMENTATION))
    curves = read_curves(tmp_path / "run" / "fold0" / "curves.csv")
    assert all(np.isfinite(value) for _, _, value in curves) and any(name == "total" for _, name, _ in curves)
    assert moved(tmp_path / "run", backbone)


def test_deep_supervision_leaves_no_trace_in_the_bundle(store: Store, backbone: Path, tmp_path: Path) -> None:
    more = ("task.deep_supervision=true", *SEGMENTATION)
    finetune(config(store, tmp_path / "deep", backbone, *more))
    finetune(config(store, tmp_path / "plain", backbone, *SEGMENTATION))
    assert set(member(tmp_path / "deep")) == set(member(tmp_path / "plain"))
    assert not any("auxiliary" in name for name in member(tmp_path / "deep"))
    checkpoint = read_checkpoint(tmp_path / "deep" / "fold0" / CHECKPOINT)["module"]
    assert any("auxiliary" in name for name in checkpoint), "it was there while training"
    one, other = (member(tmp_path / name)["decoder.out.weight"] for name in ("deep", "plain"))
    assert not torch.equal(one, other), "it taught something else"
    assert read_bundle(tmp_path / "deep" / "bundle").networks


def test_little_memory_is_planned_for(
    store: Store, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch passes in parts, the run ends, and what was given up is said and written."""

    trainer, network = config(store, tmp_path, backbone, *SEGMENTATION).trainer, build_backbone("unet_tiny")

    def planned(memory_gb: float) -> MemoryPlan:
        return plan(
            network, "segmentation", contrasts=2, classes=2, patch_vox=(16, 16, 16), batch_size=4,
            trainer=replace(trainer, memory_gb=memory_gb),
        )  # fmt: skip

    memory_gb = next(gb for gb in np.arange(1, 0, -0.01).round(2) if planned(gb).accumulate > 1)
    more = ("trainer.batch_size=4", *SEGMENTATION)
    finetune(config(store, tmp_path / "large", backbone, *more, "trainer.memory_gb=64"))
    capsys.readouterr()
    original, parts = module.train, []
    monkeypatch.setattr(module, "train", lambda run: parts.append(run.spec.accumulate) or original(run))
    finetune(config(store, tmp_path / "small", backbone, *more, f"trainer.memory_gb={memory_gb}"))
    said = capsys.readouterr().err
    written = json.loads((tmp_path / "small" / "plan.json").read_text())["plan"]
    assert parts == [written["accumulate"]] and parts[0] > 1, "as it was planned, so it was done"
    assert written["batch_size"] == 4 and written["predicted_gb"] <= written["budget_gb"]
    assert json.loads((tmp_path / "large" / "plan.json").read_text())["plan"]["accumulate"] == 1
    assert any("4 samples pass in" in note for note in written["notes"])
    assert all(f"memory: {note}" in said for note in written["notes"])
    assert json.loads((tmp_path / "small" / "results.json").read_text())["plan"] == written
    assert moved(tmp_path / "small", backbone)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.0, 0.1, 0.9, 0.2, 0.3], 2),
        ([0.9, 0.1, 0.8, 0.9, 0.3], 0),
        ([np.nan, np.nan, 0.2, np.nan, 0.2], 2),
        ([np.nan] * 5, 4),
    ],
)
def test_inner_cases_choose_the_step(
    scores: list[float], best: int, store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the best step, the start included, are answered with and shipped; held-out cases are not asked
    before the end."""
    seen: list[dict[str, torch.Tensor]] = []
    asked: list[set[str]] = []

    def scripted(self: WholeHeadStudy, task: Any, cases: Any, engine: Any) -> float:
        seen.append({name: value.clone() for name, value in task.state_dict().items()})
        asked.append({case.session.subject for case in cases})
        return scores[len(seen) - 1]

    monkeypatch.setattr(WholeHeadStudy, "watch", scripted)
    more = ("inner=0.3", "trainer.max_steps=4", "trainer.evaluate_every=1", "average=0", *CLASSIFICATION)
    finetune(config(store, tmp_path / "run", backbone, *more))
    shipped = member(tmp_path / "run")
    assert len(seen) == 5 and all(torch.equal(value, seen[best][name]) for name, value in shipped.items())
    (split,) = json.loads((tmp_path / "run" / "results.json").read_text())["splits"]
    held = {key.split("/")[1] for key in split["held"]}
    assert split["inner"] == len(asked[0]) > 0 and not held & asked[0]
    curves = read_curves(tmp_path / "run" / "fold0" / "curves.csv")
    curve = [value for _, name, value in curves if name == "inner_auroc"]
    assert np.array_equal(curve, scores[1:], equal_nan=True)


def test_without_inner_cases_the_last_step_is_taken(store: Store, backbone: Path, tmp_path: Path) -> None:
    """Held-out scores are drawn as a curve, and choose nothing."""
    with_curve = ("trainer.evaluate_every=2", "average=0", *CLASSIFICATION)
    finetune(config(store, tmp_path / "curve", backbone, *with_curve))
    finetune(config(store, tmp_path / "plain", backbone, "average=0", *CLASSIFICATION))
    one, other = member(tmp_path / "curve"), member(tmp_path / "plain")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sites_are_kept_apart(store: Store, backbone: Path, tmp_path: Path) -> None:
    _, splits = _begin(config(store, tmp_path / "run", backbone, "sites_apart=true", "folds=2", "repeats=2",
                              *CLASSIFICATION))  # fmt: skip
    assert len(splits) == 4
    for split in splits:
        held, trained = ({c.session.columns["site"] for c in side} for side in (split.held, split.trained))
        assert held and trained and not held & trained


def test_a_plan_is_kept_whatever_memory_is_free_later(
    store: Store, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = _begin(config(store, tmp_path / "run", backbone, *SEGMENTATION))
    monkeypatch.setattr("brainfm.training.memory.free_ram_bytes", lambda: 0.7e9)
    again, _ = _begin(config(store, tmp_path / "run", backbone, *SEGMENTATION))
    assert again.plan == first.plan
    other, _ = _begin(config(store, tmp_path / "other", backbone, *SEGMENTATION))
    assert other.plan.budget_gb != first.plan.budget_gb
