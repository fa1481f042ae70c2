"""Fine-tuning of scan-level questions: what is written, baselines, learning curves, resumption, refusals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.inference.evaluate import evaluate
from brainfm.inference.predict import predict
from brainfm.specs import PreprocessSpec
from brainfm.tasks.bundle import read_bundle
from brainfm.training.finetune import finetune
from brainfm.verbs.compose import resolve


def write_heads(root: Path, count: int, **columns: list[str]) -> Path:
    """Heads whose brightness inside grows with their number, every second one with a bright lesion; their manifest.

    The last head has no answer in any column."""
    import nibabel as nib

    scans = []
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 28)] * 3, indexing="ij"))
    for number in range(count):
        rng = np.random.default_rng(number)
        head = (grid**2).sum(0) < 0.8
        core = (grid**2).sum(0) < 0.3
        lesion = ((grid - np.array([0.5, 0, 0])[:, None, None, None]) ** 2).sum(0) < 0.08
        voxels = head * (100 + rng.normal(0, 3, head.shape)) + core * (-40 + 6 * number)
        voxels = voxels + lesion * 120 * (number % 2)
        path = root / f"s{number:02d}.nii.gz"
        root.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.diag([4.0, 4.0, 4.0, 1.0])), path)
        cells = {"age": str(20 + 5 * number), "lesion": "yes" if number % 2 else "no", "site": "AB"[number // 2 % 2]}
        cells |= {name: values[number] for name, values in columns.items()}
        if number == count - 1:
            cells = dict.fromkeys(cells, "")
        scans.append(Scan("toy", f"{number:02d}", "", "t1", path.name, cells))
    write_manifest(root / "manifest.csv", scans)
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heads(tmp_path_factory.mktemp("heads"), 13)


@pytest.fixture(scope="module")
def store(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "store"
    prepare(read_manifest(manifest), path, PreprocessSpec(spacing_mm=(4, 4, 4)), 1, lambda done, total: None)
    return Store.open(path)


def words(store: Store, run: Path, task: str, target: str, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", "backbone_from=none", "backbone=unet_tiny", "trainer=cpu",
        f"task={task}", f"task.target={target}", "task.patch_vox=[32,32,32]", "folds=2", "trainer.max_steps=6",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.checkpoint_every=3", "trainer.threads=1",
        "trainer.log_every=2", "baselines=[]", "audit=false", "report=false", "data.augment=null",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def tuned(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    more = ["baselines=[random_linear,features]", "audit=true", "optim.lr=3e-3", "trainer.max_steps=25", "repeats=2"]
    assert main(["finetune", *words(store, run, "classification", "lesion", *more)]) == 0
    return run


def test_every_labelled_case_is_answered_once_a_repeat(tuned: Path) -> None:
    with (tuned / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    for repeat in "01":
        assert sorted(r["subject"] for r in rows if r["repeat"] == repeat) == [f"{n:02d}" for n in range(12)]
    results = json.loads((tuned / "results.json").read_text())
    assert results["cohort"]["left_out"] == ["toy/12: no lesion"]
    assert results["scores"]["model"]["auroc"]["n"] == 24
    held = [set(s["held"]) for s in results["splits"] if s["repeat"] == 0]
    assert not held[0] & held[1]
    for side in held:  # balanced in the answer
        assert sorted(int(key.split("/")[1]) % 2 for key in side) == [0, 0, 0, 1, 1, 1]


def test_a_plain_lesion_is_learned_and_compared_with_baselines(tuned: Path) -> None:
    results = json.loads((tuned / "results.json").read_text())
    assert results["scores"]["model"]["auroc"]["mean"] > 0.8
    assert {c["against"] for c in results["comparisons"]} == {"random_linear", "features"}
    for c in results["comparisons"]:
        model, other = (results["scores"][n]["auroc"]["mean"] for n in ("model", c["against"]))
        assert c["difference"] == pytest.approx(model - other) and 0 < c["p"] <= 1
    assert results["audit"]["verdict"] and {s["name"] for s in results["audit"]["shortcuts"]} >= {"site", "background"}
    assert results["command"].startswith("brainfm finetune")


def test_the_bundle_answers_files_and_manifests(tuned: Path, manifest: Path, tmp_path: Path) -> None:
    bundle = read_bundle(tuned / "bundle")
    assert len(bundle.networks) == 2  # the first repeat's
    answers = {}
    for number in (0, 1):
        found = predict(
            tuned / "bundle", {"t1": manifest.parent / f"s{number:02d}.nii.gz"}, tmp_path / f"{number}.json"
        )
        answers[number] = found.probabilities["yes"]
        written = json.loads((tmp_path / f"{number}.json").read_text())
        assert written["probabilities"] == found.probabilities and sum(found.probabilities.values()) == pytest.approx(1)
    assert answers[1] > answers[0]
    scored = evaluate(manifest, tmp_path / "out", bundle=tuned / "bundle")
    assert scored.summary["cases"] == 12 and scored.summary["sessions_without_label"] == 1
    assert scored.summary["metrics"]["auroc"]["mean"] > 0.8
    again = evaluate(manifest, tmp_path / "again", predictions=tmp_path / "out" / "predictions")
    assert again.summary["metrics"] == scored.summary["metrics"]


def test_a_regression_ends_with_values_in_its_unit(store: Store, manifest: Path, tmp_path: Path) -> None:
    assert finetune(resolve("finetune", words(store, tmp_path / "run", "regression", "age")))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["task"]["unit"] == "years" and results["primary"] == "mae" and not results["larger_is_better"]
    assert 15 < np.mean([row["answer"][0] for row in results["cases"]]) < 80  # fresh, it answers the training mean
    found = predict(tmp_path / "run" / "bundle", {"t1": manifest.parent / "s00.nii.gz"}, tmp_path / "a.txt")
    assert float((tmp_path / "a.txt").read_text()) == pytest.approx(found.answer)
    assert found.low < found.answer < found.high
    inside = [abs(row["answer"][0] - row["truth"][0]) <= found.high - found.answer for row in results["cases"]]
    assert np.mean(inside) >= 0.9


@pytest.mark.parametrize("cut", [2, 5, 12])  # before the first step, at the first checkpoint, in the second fold
def test_resumed_equals_uninterrupted(cut: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import brainfm.tasks.whole_head.study as module

    more = ("inner=0.3", "trainer.evaluate_every=2", "task.candidates=[mean,features,tuned]")
    whole = words(store, tmp_path / "whole", "classification", "lesion", *more)
    assert main(["finetune", *whole]) == 0
    broken = words(store, tmp_path / "broken", "classification", "lesion", *more)
    original, calls = module.views_of, []

    def failing(*args):
        calls.append(1)
        if len(calls) == cut:
            raise RuntimeError("power cut")
        return original(*args)

    monkeypatch.setattr(module, "views_of", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["finetune", *broken])
    monkeypatch.undo()
    assert main(["finetune", *broken]) == 0
    for name in ("cases.csv", "scores.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_training_broken_off_between_checkpoints_is_resumed_exactly(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and augmentation, which draw from streams of the samples."""
    import brainfm.training.supervised as module

    more = ("folds=1", "trainer.max_steps=7", "data.augment=light", "task.dropout=0.5", "task.candidates=[tuned]")
    assert main(["finetune", *words(store, tmp_path / "whole", "classification", "lesion", *more)]) == 0
    original, calls = module.draw, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:  # checkpoints follow every third step
            raise RuntimeError("power cut")
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "draw", failing)
    broken = words(store, tmp_path / "broken", "classification", "lesion", *more)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["finetune", *broken])
    monkeypatch.undo()
    torch.manual_seed(12345)  # whatever another part of the program has drawn
    assert main(["finetune", *broken]) == 0
    for name in ("cases.csv", "fold0/member.safetensors", "fold0/curves.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()


def test_a_learning_curve_has_nested_draws(store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["protocol=fewshot", "task.shots=[2,4,all]", "trainer.max_steps=2", "trainer.checkpoint_every=0"]
    assert main(["finetune", *words(store, run, "classification", "lesion", "baselines=[features]", *more)]) == 0
    candidates = [f"candidate {name}" for name in ("mean", "measurements", "features", "stacked")]
    with (run / "learning_curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["shots"], r["condition"]) for r in rows] == [
        (s, c) for s in ("2", "4", "all") for c in ("model", "features", *candidates)
    ]
    assert [float(r["training_subjects"]) for r in rows[::6]] == [2, 4, 6] and {r["cases"] for r in rows} == {"12"}
    assert (run / "bundle").is_dir()


def _said(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["finetune", *words(store, tmp_path / "run", *arguments)]) == 2
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert text.startswith("brainfm: ") and not (tmp_path / "run" / "bundle").exists()
    return text


def test_refusals(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "folds=13: expected" in _said(store, tmp_path, capsys, "classification", "lesion", "folds=13")
    assert "task.shots=20: expected at most the 6 training subjects" in _said(
        store, tmp_path, capsys, "classification", "lesion", "protocol=fewshot", "task.shots=[20]"
    )
    assert "task.shots" in _said(
        store, tmp_path, capsys, "classification", "lesion", "protocol=fewshot", "task.shots=[0]"
    )
    assert "no session has a value in column weight" in _said(store, tmp_path, capsys, "regression", "weight")
    assert "baselines=[luck]: expected a list of scratch, random_linear, features" in _said(
        store, tmp_path, capsys, "classification", "lesion", "baselines=[luck]"
    )
    assert "sites_apart" in _said(
        store, tmp_path, capsys, "classification", "lesion", "sites_apart=true", "site=nowhere"
    )


def test_one_class_a_constant_and_an_impossible_age(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same, old = ["x"] * 5, ["30", "40", "400", "50", ""]
    manifest = write_heads(tmp_path / "heads", 5, kind=same, score=["7"] * 5, age=old)
    prepare(read_manifest(manifest), tmp_path / "store", PreprocessSpec(spacing_mm=(8, 8, 8)), 1)
    store = Store.open(tmp_path / "store")
    assert "has one class only, 'x'" in _said(store, tmp_path, capsys, "classification", "kind")
    assert "is 7 in all 4 sessions" in _said(store, tmp_path, capsys, "regression", "score")
    assert "session toy/02 has age 400, expected an age from 0 to 130 years" in _said(
        store, tmp_path, capsys, "regression", "age"
    )
