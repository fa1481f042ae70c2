"""Answers against the manifest's columns: truths, failures, intervals by subject."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainfm.data.manifest import Manifest, Scan, read_manifest, write_manifest
from brainfm.errors import ConfigError, ManifestError
from brainfm.inference.evaluate import evaluate
from brainfm.inference.predict import CLAIM
from brainfm.scoring.answers import auroc
from brainfm.specs import TaskSpec
from brainfm.tasks.answers import SessionAnswer
from brainfm.tasks.registry import answer_name
from brainfm.tasks.whole_head.answer import write_answer
from brainfm.tasks.whole_head.evaluate import truths

ILL = TaskSpec("classification", "ill", ("t1",), ("no", "yes"), (16, 16, 16), mode="exclusive", view_mm=5.0)
AGE = TaskSpec("regression", "age", ("t1",), (), (16, 16, 16), unit="years", view_mm=5.0)
FINDINGS = TaskSpec("classification", "f", ("t1",), ("bleed", "mass"), (16, 16, 16), mode="multilabel", view_mm=5.0)


def manifest_of(root: Path, cells: list[dict[str, str]], visits: int = 1) -> Manifest:
    names = sorted({name for row in cells for name in row})
    scans = []
    for number, row in enumerate(cells):
        columns = {name: row.get(name, "") for name in names}
        key = (f"{number // visits:02d}", str(number % visits) if visits > 1 else "")
        scans.append(Scan("d", *key, "t1", f"{number}.nii.gz", columns))
    write_manifest(root / "m.csv", scans)
    return read_manifest(root / "m.csv")


def answered(folder: Path, manifest: Manifest, task: TaskSpec, values: list[Any]) -> Path:
    """A folder as predict_manifest leaves it; None is a prediction that failed."""
    folder.mkdir()
    (folder / CLAIM).write_text(json.dumps({"bundle": "abc", "task": task.to_dict()}))
    for key, value in zip(manifest.sessions(), values, strict=True):
        if value is None:
            continue
        found = SessionAnswer(task.target, value, None, task.unit, None, None, ("t1",))
        if task.kind == "classification":
            probabilities = dict(zip(task.values, value, strict=True))
            most = max(probabilities, key=lambda name: probabilities[name])
            found = SessionAnswer(task.target, most, probabilities, "", None, None, ("t1",))
        write_answer(folder / answer_name(key, task), found)
    return folder


def table(out: Path) -> list[dict[str, str]]:
    with (out / "cases.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_classification_is_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ill = np.arange(30) % 2
    p = np.clip(0.3 * ill + rng.uniform(0, 0.7, 30), 0.01, 0.99)
    cells = [{"ill": "yes" if i else "no"} for i in ill] + [{"ill": ""}]
    manifest = manifest_of(tmp_path, cells)
    masks = answered(tmp_path / "p", manifest, ILL, [*([1 - x, x] for x in p), [0.5, 0.5]])
    summary = evaluate(manifest, tmp_path / "out", predictions=masks).summary
    assert summary["metrics"]["auroc"]["mean"] == pytest.approx(auroc(ill, p))
    assert summary["metrics"]["auroc"]["low"] < auroc(ill, p) < summary["metrics"]["auroc"]["high"]
    assert summary["metrics"]["log_loss"]["mean"] == pytest.approx(-np.log(np.where(ill, p, 1 - p)).mean())
    assert (summary["cases"], summary["sessions_without_label"], summary["bundle"]) == (30, 1, "abc")
    assert summary["left_out"] == ["d/30: no ill"]
    rows = table(tmp_path / "out")
    assert len(rows) == 30 and rows[1]["truth"] == "yes" and float(rows[1]["p_yes"]) == pytest.approx(p[1], abs=1e-5)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["seen_in_pretraining"] == "unknown"


def test_a_failed_prediction_is_counted_and_not_scored(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [{"age": str(a)} for a in (30, 40, 50, 60)])
    masks = answered(tmp_path / "p", manifest, AGE, [32.0, 39.0, None, 60.0])
    summary = evaluate(manifest, tmp_path / "out", predictions=masks).summary
    assert summary["cases"] == 4 and summary["without_prediction"] == 1
    assert summary["metrics"]["mae"]["mean"] == pytest.approx(1.0) and summary["metrics"]["mae"]["n"] == 3
    rows = table(tmp_path / "out")
    assert [row["note"] for row in rows] == ["", "", "no prediction", ""] and rows[2]["answer"] == ""


def test_sessions_of_a_subject_are_one_draw(tmp_path: Path) -> None:
    """Twenty sessions of two people say little more than two people: the interval is as wide."""
    ages = [{"age": str(30 + n % 3)} for n in range(20)]
    errors = [5.0 if n < 10 else 1.0 for n in range(20)]
    widths = {}
    for name, visits in (("two", 10), ("twenty", 1)):
        folder = tmp_path / name
        folder.mkdir()
        manifest = manifest_of(folder, ages, visits)
        values = [float(row["age"]) + e for row, e in zip(ages, errors)]
        masks = answered(folder / "p", manifest, AGE, values)
        summary = evaluate(manifest, folder / "out", predictions=masks).summary
        assert summary["subjects"] == 20 // visits
        widths[name] = summary["metrics"]["mae"]["high"] - summary["metrics"]["mae"]["low"]
    assert widths["two"] >= 4 > 1.5 * widths["twenty"]


def test_labels_that_nobody_knows_are_left_out_of_their_score(tmp_path: Path) -> None:
    cells = [{"bleed": "1", "mass": ""}, {"bleed": "0", "mass": "1"}, {"bleed": "1", "mass": "0"}, {}]
    manifest = manifest_of(tmp_path, cells)
    masks = answered(tmp_path / "p", manifest, FINDINGS, [[0.9, 0.5], [0.1, 0.8], [0.7, 0.3], [0.5, 0.5]])
    summary = evaluate(manifest, tmp_path / "out", predictions=masks).summary
    assert summary["metrics"]["brier/mass"]["mean"] == pytest.approx((0.2**2 + 0.3**2) / 2)
    assert summary["metrics"]["brier/bleed"]["mean"] == pytest.approx((0.1**2 + 0.1**2 + 0.3**2) / 3)
    assert summary["left_out"] == ["d/03: none of bleed, mass"]
    assert table(tmp_path / "out")[0]["truth"].strip() == "1"


def test_one_class_alone_has_no_auroc(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [{"ill": "no"}] * 4)
    masks = answered(tmp_path / "p", manifest, ILL, [[0.9, 0.1]] * 4)
    summary = evaluate(manifest, tmp_path / "out", predictions=masks).summary
    assert summary["metrics"]["auroc"]["mean"] is None and summary["metrics"]["accuracy"]["mean"] == 1


def test_truths_name_those_without(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [{"ill": "yes"}, {"ill": "maybe"}, {"ill": "n/a"}, {"ill": "NO"}])
    found, left_out = truths(manifest, ILL)
    assert [int(v[0]) for v in found.values()] == [1, 0]
    assert left_out == ["d/01: ill is 'maybe', expected one of no, yes", "d/02: no ill"]
    with pytest.raises(ManifestError, match="no session has an answer to age"):
        truths(manifest, AGE)
    with pytest.raises(ManifestError, match="age 400"):
        truths(manifest_of(tmp_path, [{"age": "400"}]), AGE)


def test_refusals(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, [{"ill": "yes"}, {"ill": "no"}])
    masks = answered(tmp_path / "p", manifest, ILL, [None, None])
    with pytest.raises(ManifestError, match="no session with an answer"):
        evaluate(manifest, tmp_path / "out", predictions=masks)
    with pytest.raises(ConfigError, match="either bundle= or predictions="):
        evaluate(manifest, tmp_path / "out")
    with pytest.raises(ConfigError, match=CLAIM):
        evaluate(manifest, tmp_path / "out", predictions=tmp_path)
    (masks / answer_name(next(iter(manifest.sessions())), ILL)).write_text("{}")
    with pytest.raises(ConfigError, match="is not an answer"):
        evaluate(manifest, tmp_path / "out", predictions=masks)
