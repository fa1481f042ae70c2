"""`brainfm compare` on toy networks: who is held out, what is resumed and added, what is refused, what is told."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.comparison.contenders import pairs_of
from brainfm.comparison.cost import forward
from brainfm.comparison.runs import Comparison
from brainfm.comparison.scores import DOCUMENT, TABLE, TESTS, document
from brainfm.comparison.settings import CompareSettings
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import BrainfmError, ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.progress import Progress
from brainfm.reports.models import FIGURE, PAGE
from brainfm.seen import overlap
from brainfm.settings import narrowed
from brainfm.specs import PreprocessSpec
from brainfm.training.loop import State
from brainfm.training.settings import PretrainSettings
from brainfm.verbs import compare as compare_verb
from brainfm.verbs.compare import prepared
from brainfm.verbs.compose import resolve


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
    """Of the smallest comparison; ``more`` replaces."""
    given = {
        "models": "[unet_tiny:mae,untrained,volumes]", "store": str(store.path), "out": str(out),
        "tasks": "[sex,tissues]", "steps": "2", "seeds": "1", "shots": "[3]", "side_column": "side", "inner": "4",
        "rates": "[1e-3,1e-2]", "draws": "1", "device": "cpu", "pretrain.trainer.batch_size": "2",
        "pretrain.data.patch_vox": "[16,16,16]", "pretrain.objective.latent_channels": "8",
        "finetune.trainer.max_steps": "1", "finetune.data.augment": "null", "finetune.task.patch_vox": "[16,16,16]",
    }  # fmt: skip
    for verb in ("pretrain", "finetune"):
        small = {"accelerator": "cpu", "workers": "0", "threads": "1", "checkpoint_every": "1", "compile": "null"}
        given |= {f"{verb}.trainer.{key}": value for key, value in small.items()}
    given |= dict(word.split("=", 1) for word in more)
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def base(store: Store) -> CompareSettings:
    """What the words mean."""
    return narrowed(CompareSettings, resolve("compare", words(store, Path("-"))))


@pytest.fixture(autouse=True, scope="module")
def _resolved_once() -> Iterator[None]:
    """The same words mean the same in every test, and hydra takes its time."""
    known = cache(lambda verb, *words: resolve(verb, words))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_verb, "resolve", lambda name, words: known(name, *words))
        yield


def made(base: CompareSettings, out: Path, **values: Any) -> Comparison:
    """Prepared, and nothing done yet."""
    comparison: Comparison = prepared(replace(base, out=out, **values))
    comparison.begin()
    return comparison


@pytest.fixture(scope="module")
def finished(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of a comparison with two runs of each model, made by the command line; never written to."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["compare", *words(store, out, "seeds=2", "tasks=[age,tissues]")]) == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.json")}


# ---- what comes of it ------------------------------------------------------------------------------------------------


def test_every_model_is_in_the_table_with_its_cost_and_its_scores(finished: Path) -> None:
    found = json.loads((finished / DOCUMENT).read_text())
    assert [model["name"] for model in found["models"]] == ["unet_tiny:mae", "unet_tiny:untrained", "volumes"]
    assert {m["name"]: list(m["scores"]) for m in found["measures"]} == {
        "age frozen": ["unet_tiny:mae", "unet_tiny:untrained", "volumes"],
        "age 3 shots": ["unet_tiny:mae", "unet_tiny:untrained", "volumes"],
        "tissues frozen": ["unet_tiny:mae", "unet_tiny:untrained"],  # volumes know no voxel
        "tissues 3 shots": ["unet_tiny:mae", "unet_tiny:untrained"],
    }
    trained, fresh, _ = found["models"]
    assert trained["samples"] == 4 and trained["training_flops"] == 4 * trained["flops_a_sample"] > 0
    assert trained["flops_a_sample"] > 3 * trained["encoder_flops"] > 0  # backward is two forwards, and a decoder
    assert trained["parameters"] == fresh["parameters"] < trained["trained_parameters"]
    assert len(trained["each_device_hours"]) == 2 and fresh.get("device_hours") is None
    for measure in found["measures"]:
        for score in measure["scores"].values():
            assert score["mean"] == pytest.approx(np.mean(score["runs"])) and len(score["runs"]) == 2
            assert score["low"] <= score["mean"] <= score["high"]
    dice = next(m for m in found["measures"] if m["name"] == "tissues frozen")["scores"]["unet_tiny:untrained"]
    assert 0.5 < dice["mean"] <= 1  # tissues that differ in brightness alone
    with (finished / TABLE).open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert float(rows[0]["tissues frozen dice"]) == pytest.approx(
        found["measures"][2]["scores"]["unet_tiny:mae"]["mean"], rel=1e-5
    )
    assert rows[2]["tissues frozen dice"] == "" and rows[2]["parameters"] == ""


def test_tests_are_between_all_pairs_and_corrected_over_them(finished: Path) -> None:
    found = json.loads((finished / DOCUMENT).read_text())
    age = [test for test in found["tests"] if test["measure"] == "age frozen"]
    assert len(age) == 3 and all(test["p_holm"] >= test["p"] > 0 for test in age)
    scores = found["measures"][0]["scores"]
    for test in age:
        apart = scores[test["model"]]["mean"] - scores[test["other"]]["mean"]
        assert test["difference"] == pytest.approx(apart) and test["runs"] == 2
    with (finished / TESTS).open(newline="") as table:
        assert len(list(csv.DictReader(table))) == len(found["tests"])


def test_the_page_shows_scores_costs_and_what_was_tried(finished: Path) -> None:
    text = (finished / PAGE).read_text()
    for said in ("Accuracy against compute", "tissues, 3 shots: Dice", "too few to say which is better", "unet_tiny",
                 "GFLOP", "Settings that were tried"):  # fmt: skip
        assert said in text
    assert (finished / FIGURE).read_bytes()[:4] == b"\x89PNG"
    tried = json.loads((finished / DOCUMENT).read_text())["models"]
    assert [[(one["of"], one["trials"]) for one in model["tried"]] for model in tried] == [
        [("pre-training", 0), ("tissues", 2)], [("tissues", 2)], [],
    ]  # fmt: skip


def test_who_is_tested_was_never_learned_from(finished: Path, store: Store) -> None:
    side = {session.subject_key: session.columns["side"] for session in store.sessions}
    loaded = load_backbone(finished / "pretrained" / "unet_tiny-mae" / "seed0" / "backbone.safetensors")
    seen = overlap(loaded.subjects, [key for key, word in side.items() if word == "held"])
    assert seen is not None and seen.seen == 0
    records = [json.loads(path.read_text())["asked"] for path in (finished / "tuned").glob("*/answers.json")]
    assert len(records) == 10 and all({side[key] for key in one["trained"]} == {"train"} for one in records)
    assert all({side[key] for key in one["asked"]} == {"held"} for one in records)
    trials = [json.loads(path.read_text())["asked"] for path in (finished / "trials").glob("*/answers.json")]
    inner = {key for one in trials for key in (*one["trained"], *one["asked"])}
    assert len(trials) == 4 and {side[key] for key in inner} == {"train"}
    assert not inner & {key for one in records for key in one["trained"]}
    assert not any(set(one["trained"]) & set(one["asked"]) for one in trials)


# ---- going on --------------------------------------------------------------------------------------------------------


def test_interrupted_it_goes_on_and_tells_the_same(
    base: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {"models": ("unet_tiny:mae",), "tasks": ("tissues",), "rates": (1e-3,)}
    whole = made(base, tmp_path / "whole", **few)
    assert whole.do()
    parts, advanced = made(base, tmp_path / "parts", **few), Progress.advance

    def interrupt(progress: Progress) -> None:
        advanced(progress)
        signal.raise_signal(signal.SIGTERM)  # after the first of two steps

    monkeypatch.setattr(Progress, "advance", interrupt)
    assert not parts.do()
    said = capsys.readouterr().err
    assert "stopped in the pre-training of pretrained/unet_tiny-mae/seed0 after step 1 and saved" in said
    assert not (tmp_path / "parts" / "frozen").exists()
    monkeypatch.undo()
    assert parts.do()
    assert document(whole)["measures"] == document(parts)["measures"]


def test_what_is_done_stays_and_a_model_more_adds_its_own(base: CompareSettings, tmp_path: Path) -> None:
    few: dict[str, Any] = {"models": ("unet_tiny:mae",), "tasks": ("sex",)}
    assert made(base, tmp_path, **few).do()
    before = files_of(tmp_path)
    more = made(base, tmp_path, **few | {"models": ("unet_tiny:mae", "volumes")})
    assert replace(more, train=lambda settings: pytest.fail("what is there is trained again")).do()
    added = set(files_of(tmp_path)) - set(before)
    assert before.items() <= files_of(tmp_path).items() and added and all("volumes" in name for name in added)
    # another protocol, or other settings, would not be comparable
    with pytest.raises(ConfigError, match="holds a comparison with steps=2, found steps=3: use another out="):
        made(base, tmp_path, **few, steps=3)
    other = made(base, tmp_path, **few, of_model={"unet_tiny:mae": {"objective": {"mask_ratio": 0.5}}})
    with pytest.raises(ConfigError, match=r"objective\.mask_ratio=0\.6, found settings\.objective\.mask_ratio=0\.5"):
        other.do()


def test_hours_become_steps_of_a_measured_step(base: CompareSettings, tmp_path: Path) -> None:
    asked = []

    def train(settings: PretrainSettings) -> State:  # .5 s of a core a step, and 3 s to begin
        steps = settings.trainer.max_steps
        asked.append(steps)
        settings.run.mkdir(parents=True)
        told = {"gpu_hours": 0.0, "cpu_hours": (3 + 0.5 * steps) / 3600, "processes": 1}
        (settings.run / "receipt.json").write_text(json.dumps(told))
        return State(step=steps, seconds=1000.0)  # the machine did other things meanwhile

    comparison = replace(
        made(base, tmp_path, models=("unet_tiny:mae",), budget="hours", steps=None, hours=0.01), train=train
    )
    assert comparison.steps(comparison.contenders[0]) == 72 and comparison.steps(comparison.contenders[0]) == 72
    assert asked == [4, 16]  # measured once


def test_a_rate_of_pre_training_is_tried_on_inner_people(base: CompareSettings, tmp_path: Path) -> None:
    comparison = made(base, tmp_path, models=("unet_tiny:mae",), tasks=("tissues",), pretrain_rates=(1e-9, 1e-2))
    rate = comparison.pretrain_rate(comparison.contenders[0])
    tried = comparison.pretrain_trials(comparison.contenders[0])
    assert set(tried) == {1e-9, 1e-2} and tried[rate] == max(tried.values())
    people = json.loads(next((tmp_path / "trials").rglob("frozen.json")).read_text())["asked"]
    assert set(people["asked"]) == set(comparison.questions[0].people.trial)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps=0: expected more than 0"),
        ({"steps": None, "budget": "hours", "hours": float("nan")}, "hours=nan: expected more than 0"),
        ({"steps": None}, "budget=steps without steps=: expected how many"),
        ({"hours": 1.0}, "budget=steps with hours=1.0: expected hours=null"),
        ({"seeds": 0}, "seeds=0: expected 1 or more"),
        ({"models": ("volumes", "volumes")}, "expected one or more, each once"),
        ({"rates": (1e-3, float("nan"))}, "rates=[0.001, nan]: expected rates above 0"),
        ({"inner": 1}, "inner=1: expected 2 people or more to try rates on"),
        ({"models": ("unet_q:mae",)}, "found 'unet_q:mae', expected BACKBONE:OBJECTIVE"),
        ({"models": ("unet_tiny:nothing",)}, "found 'unet_tiny:nothing', expected BACKBONE:OBJECTIVE"),
        ({"models": ("untrained",)}, "untrained alone names no network"),
        ({"of_model": {"unet_q:mae": {}}}, "found 'unet_q:mae'"),
        ({"of_task": {"height": {}}}, "of_task: found 'height', expected one of sex, tissues"),
        ({"against": "unet_b:mae"}, "against=unet_b:mae: expected one of unet_tiny:mae"),
        ({"pretrain": {"seed": 3}}, "pretrain.seed=3: a comparison decides seed"),
        ({"finetune": {"optim": {"lr": 3}}}, "finetune.optim.lr=3: a comparison decides optim.lr"),
        ({"pretrain": {"objective": {"mask": 3}}}, "brainfm pretrain has no key 'objective.mask'"),
        ({"tasks": ("height",)}, "has no column height, height_labels or height_mask; expected one of age, sex, side"),
        ({"shots": (9,)}, "shots=9: sex is known of 6 people that may be learned from"),
        ({"inner": 12}, "sex is known of 10 people of the training side, of whom inner=12"),
        ({"side_column": "sex"}, "in column 'sex' (data.side_column), expected 'train' or 'held'"),
        ({"contrasts": ("flair",)}, "has no flair, expected some of t1"),
        ({"pretrain": {"data": {"patch_vox": [15, 16, 16]}}}, "15"),
        ({"finetune": {"task": {"patch_vox": [15, 16, 16]}}}, "15"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    values: dict[str, Any], sentence: str, base: CompareSettings, tmp_path: Path
) -> None:
    with pytest.raises(BrainfmError) as refused:
        prepared(replace(base, out=tmp_path / "out", **values)).begin()
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_mistake_is_one_sentence_and_exit_code_2(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *words(store, tmp_path / "out"), "budget=nan"]) == 2
    said = capsys.readouterr().err
    assert "budget=nan: expected steps or hours" in said and said.count("\n") == 1


def test_untrained_stands_for_one_of_each_network() -> None:
    known = (("unet_s", "vit_s"), ("mae", "dino"))
    found = pairs_of(["unet_s:mae", "vit_s:mae", "vit_s:dino", "untrained", "volumes"], *known)
    assert [pair.name for pair in found] == [
        "unet_s:mae", "vit_s:mae", "vit_s:dino", "unet_s:untrained", "vit_s:untrained", "volumes",
    ]  # fmt: skip
    twice = pairs_of(["unet_s:untrained", "unet_s:mae", "untrained"], *known)
    assert [pair.name for pair in twice] == ["unet_s:untrained", "unet_s:mae"]


def test_arithmetic_is_that_of_the_layers() -> None:
    """Of every convolution two operations a weight and voxel that it gives, counted from its shapes."""
    counted = []

    def count(layer: torch.nn.Conv3d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        counted.append(2 * layer.weight.numel() * output[0, 0].numel())

    network = build_backbone("unet_tiny")
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.register_forward_hook(count)
    network.features(torch.zeros(1, 1, 16, 16, 16))
    found = forward({"name": "unet_tiny"}, (16, 16, 16))
    assert found["encoder_flops"] == sum(counted) > 0
    assert found["parameters"] == sum(weight.numel() for weight in network.parameters())
