"""From one set of radiographs to another: the three ways, ensembles, intervals, maps, and the planted shortcut."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")

from brainfm.cli import main
from brainfm.crossdomain.adaptation import SupervisedMethod
from brainfm.crossdomain.delong import delong, delong_difference
from brainfm.crossdomain.ensembles import entropy_weighted, stacked
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.networks import Classifier, build_network
from brainfm.crossdomain.saliency import agreeing, grad_cam, overlap
from brainfm.crossdomain.shortcut import Marked, corner_audit, planted, trained_on_markers
from brainfm.crossdomain.transfer import Transferred, Way
from brainfm.crossdomain.transfer_page import roc
from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import bootstrap
from tests.crossdomain.sets import write_set


def test_every_way_from_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    for number, name in enumerate(("far", "near")):
        write_set(tmp_path, name, 60, 16, 1, number)
    words = ["medimeta", "action=transfer", f"root={tmp_path}", f"out={tmp_path / 'out'}", "source=far", "target=near",
             "task=signs", "networks=[unet_tiny,unet_s]", "size=32", "max_epochs=1", "lr=3e-3", "batch=16",
             "device=cpu"]  # fmt: skip
    assert main(words) == 0
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert {"source unet_tiny", "stacking forest all", "embeddings boosted mean", "embeddings forest entropy",
            "finetune unet_s", "finetune mean"} < set(rows)  # fmt: skip
    for row in rows.values():
        assert 0 <= float(row["low"]) <= float(row["auroc"]) <= float(row["high"]) <= 1
        assert float(row["edge low"]) <= float(row["edge"])
        assert float(row["minus_source_low"]) <= float(row["minus_source"]) <= float(row["minus_source_high"])
    assert float(rows["source mean"]["minus_source"]) == float(rows["source mean"]["minus_source_high"]) == 0
    less = float(rows["finetune mean"]["auroc"]) - float(rows["source mean"]["auroc"])
    assert float(rows["finetune mean"]["minus_source"]) == pytest.approx(less, abs=2e-4)
    assert (tmp_path / "out" / "roc.png").stat().st_size > 1000 and (tmp_path / "out" / "maps.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "networks").iterdir()}
    capsys.readouterr()
    assert main([*words[:6], "task=kind", *words[7:]]) == 2
    assert "is MULTICLASS_CLASSIFICATION, expected a binary task or findings" in capsys.readouterr().err
    assert len(before) == 4
    assert main([*words[:6], "task=sick", *words[7:]]) == 0, "weights of one task are not another's"
    assert len(list((tmp_path / "out" / "networks").iterdir())) == 8


def test_a_place_that_cannot_be_written_is_said_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for number, name in enumerate(("far", "near")):
        write_set(tmp_path, name, 60, 16, 1, number)
    (tmp_path / "file").write_text("x")
    trained: list[str] = []
    monkeypatch.setattr("brainfm.crossdomain.transfer.supervised", lambda *a, **k: trained.append("yes"))
    words = ["medimeta", "action=transfer", f"root={tmp_path}", "source=far", "target=near", "task=signs",
             "device=cpu"]  # fmt: skip
    assert main([*words, f"out={tmp_path / 'file' / 'out'}"]) == 2
    assert "nothing can be written there" in capsys.readouterr().err and not trained
    for networks in ("[]", "[unet_tiny,unet_tiny]"):
        assert main([*words, f"out={tmp_path / 'out'}", f"networks={networks}"]) == 2
        assert "expected one or more, each once" in capsys.readouterr().err


def test_unknown_labels_are_not_scored() -> None:
    truth = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [np.nan, 0], [0, np.nan]])
    answers = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.6], [0.1, 0.2], [0.0, 0.3], [0.3, 0.0]])
    way = Way("source", "a", "", answers, 0.0)
    found = Transferred(("a", "b"), truth, np.arange(6), None, (way,), {}, {})  # type: ignore[arg-type]
    each, whole = found.scores(way)
    assert [one.mean for one in each] == [1.0, 1.0] and [one.n for one in each] == [5, 5] and whole.mean == 1.0
    other = replace(way, answers=1 - answers)
    assert found.difference(other, way).mean == -1.0


# ---- intervals -------------------------------------------------------------------------------------------------------


def naive_variance(truth: np.ndarray, score: np.ndarray) -> float:
    """DeLong's, by its definition over all pairs."""
    yes, no = score[truth], score[~truth]
    wins = (yes[:, None] > no) + 0.5 * (yes[:, None] == no)
    return float(np.var(wins.mean(1), ddof=1) / len(yes) + np.var(wins.mean(0), ddof=1) / len(no))


def test_delong_is_its_definition_and_near_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(120) < 0.4
    score = np.round(truth + rng.standard_normal(120), 1)
    found = delong(truth, score)
    value = auroc(truth, score)
    half = 1.959964 * np.sqrt(naive_variance(truth, score)) / (value * (1 - value))
    ends = 1 / (1 + np.exp(-(np.log(value / (1 - value)) + np.array([-half, half]))))
    assert np.allclose([found.low, found.high], ends) and found.mean == value
    drawn = bootstrap(auroc, truth, score, groups=[str(n) for n in range(120)], seed=0)
    assert abs(found.low - drawn.low) < 0.02 and abs(found.high - drawn.high) < 0.02
    assert np.isnan(delong(np.ones(4, bool), np.arange(4.0)).mean)
    assert delong(np.array([0, 0, 1, 1]), np.arange(4.0)).low == 1


def test_a_paired_difference_is_tighter_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random(200) < 0.5
    a = truth + rng.standard_normal(200)
    b = a + 0.3 * rng.standard_normal(200)
    found, p = delong_difference(truth, a, b)
    assert found.low < found.mean < found.high and 0 < p <= 1
    assert (found.high - found.low) < (delong(truth, a).high - delong(truth, a).low)
    assert delong_difference(truth, a, a)[1] == 1.0


def test_roc_curves_hold_the_area() -> None:
    rng = np.random.default_rng(2)
    truth = (rng.random(80) < 0.5).astype(float)
    score = np.round(truth + rng.standard_normal(80), 1)
    x, y = roc(truth, score)
    assert np.isclose(np.trapezoid(y, x), auroc(truth, score)) and (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


# ---- ensembles -------------------------------------------------------------------------------------------------------


def test_the_certain_network_counts_more() -> None:
    sure, unsure = np.array([[0.99, 0.5]]), np.array([[0.4, 0.5]])
    joined = entropy_weighted([sure, unsure])
    assert joined[0, 0] > 0.9 and np.isclose(joined[0, 1], 0.5)
    p, q = 0.9, 0.3
    weights = [1 + v * np.log2(v) + (1 - v) * np.log2(1 - v) for v in (p, q)]
    expected = (weights[0] * p + weights[1] * q) / sum(weights)
    assert np.isclose(entropy_weighted([np.array([[p]]), np.array([[q]])])[0, 0], expected)


@pytest.mark.parametrize("kind", ["forest", "boosted", "logistic"])
def test_models_on_embeddings_leave_unknown_labels_out(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 6))
    y = np.stack([x[:, 0] > 0, x[:, 1] > 0, np.ones(80)], axis=1).astype(float)
    hidden = y.copy()
    hidden[::3, 0] = np.nan
    found = stacked(x, hidden, x, kind)
    assert auroc(y[:, 0], found[:, 0]) > 0.9 and auroc(y[:, 1], found[:, 1]) > 0.9 and (found[:, 2] == 1).all()


# ---- maps and shortcuts ----------------------------------------------------------------------------------------------


def test_grad_cam_is_its_formula() -> None:
    model = Classifier(build_network("resnet18"), 3, torch.Generator().manual_seed(0)).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = grad_cam(model, images, 1)
    maps = model.network.maps(images)[-1]
    weights = model.head.weight[1] / (maps.shape[2] * maps.shape[3])  # of a pooled mean and a linear layer
    expected = (maps * weights[None, :, None, None]).sum(1).relu()
    large = torch.nn.functional.interpolate(expected[:, None], (64, 64), mode="bilinear", align_corners=False)[:, 0]
    large = large / large.amax((1, 2), keepdim=True).clamp_min(1e-12)
    assert np.allclose(found, large.detach().numpy(), atol=1e-4)


def test_only_agreeing_models_are_mixed() -> None:
    maps = [np.full((2, 2), value) for value in (1.0, 2.0, 9.0)]
    joined = agreeing(maps, [0.9, 0.8, 0.1])
    assert joined is not None and (joined == 1.5).all()
    assert agreeing(maps, [0.1, 0.2, 0.9])[0, 0] == 1.5  # type: ignore[index]


def test_overlap_with_a_region() -> None:
    heat = np.zeros((10, 10))
    heat[2:4, 2:4] = 1
    region = np.zeros((10, 10))
    region[2:4, 2:6] = 1
    found = overlap(heat, region)
    assert (found.share, found.iou, found.hit, found.chance) == (1.0, 0.5, True, 0.08)
    assert overlap(np.zeros((10, 10)), region).share == 0


def test_markers_are_put_where_they_belong(tmp_path: Path) -> None:
    write_set(tmp_path, "toy", 24, 16)
    items = MedIMeta(tmp_path, "toy", "sick")
    marked = Marked.of(items, np.arange(24) % 2 == 0)
    plain, found = items.pixels([0, 1]), marked.pixels([0, 1])
    assert (found[0, :, :2, :2] == 255).all() and np.array_equal(found[1], plain[1])
    assert np.array_equal(found[0, :, 2:], plain[0, :, 2:]) and not isinstance(items, Marked)
    truth = np.arange(4000) % 2 == 0
    marks = planted(truth, 0)
    assert 0.87 < marks[truth].mean() < 0.93 and 0.07 < marks[~truth].mean() < 0.13


def test_the_audit_exposes_a_planted_marker_and_no_other(tmp_path: Path) -> None:
    """Labels that the image does not show: all that can be learnt is the marker."""
    folder = write_set(tmp_path, "toy", 96, 32)
    rng = np.random.default_rng(0)
    np.save(folder / "task_labels" / "sick.npy", rng.permutation(np.arange(96) % 2))
    items = MedIMeta(tmp_path, "toy", "sick")
    rows = np.flatnonzero(np.isin(items.rows, np.arange(96)[np.arange(96) // 3 % 6 >= 4]))
    network, training = build_network("unet_tiny"), SupervisedMethod(3e-3, 16, 10, 12, False, 32)
    fooled = trained_on_markers(network, items, training, 0, 0)
    found = corner_audit(fooled, items, rows, 0, 32)
    assert found.exposed and found.with_it > 0.8 > 0.3 > found.against and found.moved > 0.1
    fresh = Classifier(network, 1, torch.Generator().manual_seed(3))
    assert not corner_audit(fresh, items, rows, 0, 32).exposed
