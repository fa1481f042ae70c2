"""The organisers' scores against scikit-learn, scipy and naive loops, and the ranks against the published table."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, roc_auc_score

from brainfm.submission.challenge import challenges, read_challenge
from brainfm.submission.metrics import (
    auroc,
    correlation,
    dice,
    fairness,
    mae,
    nsd,
    overall_ranks,
    ovr_auroc,
    ovr_f1,
    score,
    task_ranks,
)


@pytest.fixture
def cases():
    """Forty cases of three classes with soft scores."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, 40)
    rows = rng.random((40, 3)) + np.eye(3)[true] * 0.4
    return true.tolist(), (rows / rows.sum(1, keepdims=True)).tolist()


def test_auroc(cases):
    true, rows = cases
    binary, score = [int(t == 1) for t in true], [row[1] for row in rows]
    assert auroc(binary, score) == pytest.approx(roc_auc_score(binary, score))
    holed = [None, math.nan, *score[2:]]
    filled = [1.0 - binary[0], 1.0 - binary[1], *score[2:]]
    assert auroc(binary, holed) == pytest.approx(roc_auc_score(binary, filled))
    assert auroc(binary, holed) < auroc(binary, score)
    assert math.isnan(auroc([1, 1], [0.2, 0.3]))


def test_ovr_scores(cases):
    true, rows = cases
    assert ovr_auroc(true, rows) == pytest.approx(roc_auc_score(true, rows, multi_class="ovr"))
    assert ovr_f1(true, rows) == pytest.approx(f1_score(true, np.argmax(rows, 1), average="macro"))


def test_missing_rows_are_the_worst_answer(cases):
    true, rows = cases
    holed = [None, *rows[1:4], [math.nan, 0.5, 0.5], *rows[5:]]
    filled = [list(row) for row in rows]
    for i in (0, 4):
        filled[i] = [0.0 if k == true[i] else 0.5 for k in range(3)]
    assert ovr_auroc(true, holed) == pytest.approx(roc_auc_score(true, filled, multi_class="ovr"))
    answers = np.argmax(rows, 1)
    answers[[0, 4]] = [(true[0] + 1) % 3, (true[4] + 1) % 3]
    assert ovr_f1(true, holed) == pytest.approx(f1_score(true, answers, average="macro"))
    assert math.isnan(ovr_auroc(true, [None] * 40)) and math.isnan(ovr_f1(true, [None] * 40))


def test_an_absent_class_is_left_out(cases):
    true, rows = cases
    some = [i for i, t in enumerate(true) if t != 2]
    t, r = [true[i] for i in some], [rows[i] for i in some]
    by_hand = [roc_auc_score([x == k for x in t], [row[k] for row in r]) for k in (0, 1)]
    assert ovr_auroc(t, r) == pytest.approx(np.mean(by_hand))
    two = [[1 - row[1], row[1]] for row in r]
    assert ovr_auroc(t, two) == pytest.approx(roc_auc_score(t, [row[1] for row in two]))


def test_fairness(cases):
    true, rows = cases
    sex = ["m" if i % 2 else "f" for i in range(40)]
    age = [None if i < 5 else i % 3 for i in range(40)]
    by_hand = []
    for groups in (sex, age):
        values = []
        for g in {g for g in groups if g is not None}:
            inside = [i for i in range(40) if groups[i] == g]
            answers = [int(np.argmax(rows[i])) for i in inside]
            values.append(f1_score([true[i] for i in inside], answers, average="macro"))
        by_hand.append(1 - (max(values) - min(values)))
    assert fairness(ovr_f1, true, rows, {"sex": sex, "age": age}) == pytest.approx(np.mean(by_hand))
    assert math.isnan(fairness(ovr_f1, true, rows, {"site": ["a"] * 40}))


def test_a_worthless_embedding_is_perfectly_fair(cases):
    """Why fairness says nothing without the probe's own score."""
    true, _ = cases
    constant = [[0.4, 0.3, 0.3]] * 40
    sex = ["m" if i % 2 else "f" for i in range(40)]
    assert ovr_auroc(true, constant) == 0.5 and fairness(ovr_auroc, true, constant, {"sex": sex}) == 1


def ball(centre, shape=(14, 12, 10), radius=3.2):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return (np.linalg.norm(grid - np.array(centre), axis=-1) < radius).astype(np.uint8)


def test_empty_masks():
    """Both empty: Dice 1 and surface Dice 0, as their code has it."""
    empty, full = np.zeros((8, 8, 8), np.uint8), np.ones((8, 8, 8), np.uint8)
    assert dice(empty, empty) == 1 and nsd(empty, empty, (1, 1, 1)) == 0
    assert dice(full, empty) == dice(empty, full) == nsd(full, empty, (1, 1, 1)) == 0
    assert dice(None, full) == dice(full[:4], full) == nsd(None, full, (1, 1, 1)) == 0


def test_dice_is_the_mean_over_labels():
    true, predicted = ball((5, 6, 5)) + ball((9, 6, 5), radius=2), ball((5, 6, 5)) + ball((8, 6, 5), radius=2)
    by_hand = []
    for label in (1, 2):
        p, t = predicted == label, true == label
        by_hand.append(2 * (p & t).sum() / (p.sum() + t.sum()))
    assert dice(predicted, true, (1, 2)) == pytest.approx(np.mean(by_hand)) and np.mean(by_hand) < 1
    assert dice(true, true, (1, 2)) == 1


def test_nsd_against_naive_surface_distances():
    """The surface as the corners of voxels with both kinds of voxels around them, all of one area: the share within
    1 mm of the other one. Areas differ with direction, so the two agree to some hundredths; exactly they are held in
    tests/scoring/test_masks.py against stored values of google-deepmind/surface-distance 0.1."""
    pytest.importorskip("monai")
    spacing = np.array([1.0, 0.7, 1.5])
    for shift in (0.0, 1.0, 2.0, 4.0):
        true, predicted = ball((5, 6, 5)), ball((5 + shift, 6, 5))
        surfaces = []
        for mask in (true, predicted):
            around = np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (2, 2, 2)).sum((3, 4, 5))
            surfaces.append(np.argwhere((around > 0) & (around < 8)) * spacing)
        near = [
            sum(np.linalg.norm(other - point, axis=1).min() <= 1.0 for point in one)
            for one, other in (surfaces, surfaces[::-1])
        ]
        by_hand = sum(near) / sum(map(len, surfaces))
        assert nsd(predicted, true, spacing) == pytest.approx(by_hand, abs=0.08)


def test_nsd_counts_millimetres():
    pytest.importorskip("monai")
    true, predicted = ball((5, 6, 5)), ball((5, 6, 6))
    assert nsd(predicted, true, (1, 1, 0.8)) > nsd(predicted, true, (1, 1, 6.0))


def test_ages():
    rng = np.random.default_rng(1)
    true = rng.uniform(20, 80, 30)
    answers = true + rng.normal(3, 8, 30)
    assert mae(list(true), list(answers)) == pytest.approx(np.abs(true - answers).mean())
    assert correlation(list(true), list(answers)) == pytest.approx(pearsonr(true, answers).statistic)


@pytest.mark.parametrize("answers", [[None, 40.0, 50.0], [math.nan, 40.0, 50.0], [40.0, 50.0], []])
def test_a_missing_age_costs_the_task(answers):
    assert mae([30, 40, 50], answers) == 100 and correlation([30, 40, 50], answers) == -100


@pytest.mark.parametrize("constant", [0.0, 45.0, 0.1 + 0.2])
def test_a_constant_has_no_correlation(constant):
    assert correlation([30, 40, 50], [constant] * 3) == -100
    assert mae([30, 40, 50], [constant] * 3) < 100


def test_every_task_is_scored(cases):
    """One missing answer each; perfect answers elsewhere."""
    pytest.importorskip("monai")
    true, rows = cases
    seg = [ball((5, 6, 5)), ball((8, 6, 5)), np.zeros((14, 12, 10), np.uint8)]
    asked = {
        "task1": ([0, 1, 1, 0], [0.1, 0.9, 0.8, None], {}),
        "task2": (seg, [seg[0], None, seg[2]], {"spacings_mm": [(1, 1, 1)] * 3}),
        "task3": ([30.0, 50.0, 70.0], [30.0, 50.0, None], {}),
        "task6": (true, rows, {}),
        "task7": (true, rows, {"groups": {"sex": ["m" if i % 2 else "f" for i in range(40)]}}),
    }
    found = {name: score(read_challenge("fomo26").task(name), t, a, **more) for name, (t, a, more) in asked.items()}
    assert found["task1"] == {"auroc": 0.5}, "the missing negative ranks above every positive"
    assert found["task2"] == {"dice": pytest.approx(2 / 3), "nsd": pytest.approx(1 / 3)}, "of two empty masks 1 and 0"
    assert found["task3"] == {"mae": 100, "correlation": -100}
    assert set(found["task6"]) == {"ovr_f1", "ovr_auroc"} and found["task6"]["ovr_f1"] == ovr_f1(true, rows)
    assert set(found["task7"]) == {"fairness_f1", "fairness_auroc"} and 0 < found["task7"]["fairness_f1"] <= 1
    for name, more in (("task2", {}), ("task7", {})):
        with pytest.raises(ValueError, match="expected"):
            score(read_challenge("fomo26").task(name), *asked[name][:2], **more)


def test_ranks():
    """A missing submission stands behind every valid one; of an error less is better; ties share their ranks."""
    assert task_ranks({"dice": [0.3, 0.1, math.nan, 0.2], "nsd": [0.1, 0.2, math.nan, 0.3]}) == [2, 2.5, 4, 1.5]
    assert task_ranks({"mae": [10, 8, math.nan, math.nan]}) == [2, 1, 3, 3]
    assert task_ranks({"auroc": [0.7, 0.7, 0.9]}) == [2.5, 2.5, 1]


def published(track):
    with (challenges() / "fomo26" / "results.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["track"] == track]


@pytest.mark.parametrize("track", ["methods", "open"])
def test_ranks_are_those_that_were_published(track):
    """From values of three digits, so that neighbours may tie: all teams within .3 of the published weighted rank."""
    rows = published(track)
    challenge = read_challenge("fomo26")
    values = {
        task.name: {m: [float(row[f"{task.name}_{m}"] or "nan") for row in rows] for m in task.metrics}
        for task in challenge.tasks
    }
    found = overall_ranks(challenge, values)
    known = [(rank, float(row["weighted_rank"])) for rank, row in zip(found, rows) if row["weighted_rank"]]
    assert len(known) == {"methods": 32, "open": 15}[track]
    off = [abs(a - b) for a, b in known]
    assert max(off) < 0.3 and np.median(off) < 0.1
