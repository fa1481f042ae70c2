"""Scope of an answer: measured against ranges, contrasts and ages of the release; carried by what is written."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from brainfm.data.labelling import FoundLabels
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.regions import REGIONS
from brainfm.errors import BrainfmWarning
from brainfm.inference.anatomy import label_files, label_regions
from brainfm.inference.scope import answer_measures, of_answer
from brainfm.tasks.answers import SessionAnswer, read_answer
from tests.inference.test_anatomy import by_hand, labeller_of, write_scan

RELEASE = {
    "people": [
        {"contrasts": {"t1": 3, "rendered": 2}, "ages": [20.0, 40.0, 60.0]}, {"contrasts": {"t2": 1}, "ages": None},
    ],
    "ordinary": {"heads": 3, "ranges": {"share of ventricles": [0.01, 0.06], "asymmetry of cortex": [0, 0.1]}},
}  # fmt: skip


def found_labels(right: int = 4, ventricles_ml: float = 30.0) -> FoundLabels:
    """Cortex four columns wide on the left, ``right`` on the right side, of a head of ten columns."""
    labels = np.zeros((12, 4, 4), np.uint16)
    labels[1:11] = REGIONS["lateral_ventricle"]
    labels[1:5] = labels[11 - right : 11] = REGIONS["insula"]
    volumes = {"insula": 600.0, "lateral_ventricle": ventricles_ml, "icv": 1000.0}
    return FoundLabels(labels, volumes, 0.9, {}, "", labels > 0)


def test_an_answer_is_measured() -> None:
    measured = answer_measures(found_labels())
    assert measured["share of ventricles"] == 0.03 and measured["share of cortex"] == 0.6
    assert measured["asymmetry of cortex"] == 0 and measured["mean probability"] == 0.9
    assert answer_measures(found_labels(right=2))["asymmetry of cortex"] == pytest.approx(1 / 3)
    empty = FoundLabels(np.zeros((4, 4, 4), np.uint16), {"icv": 0.0}, 0.0, {}, "", np.zeros((4, 4, 4), bool))
    assert answer_measures(empty)["asymmetry of cortex"] == 1


def test_what_the_release_does_not_know_is_told() -> None:
    assert of_answer(found_labels(), RELEASE, ["t1"], "30") == [] == of_answer(found_labels(), {}, ["swi"], "99")
    said = of_answer(found_labels(2, 90), RELEASE, ["swi"], "81")
    assert said == [
        "contrast swi, of real scans the weights saw t1, t2",
        "age 81, the weights saw people of 20 to 60 years",
        "share of ventricles 0.09, ordinary heads have 0.01 to 0.06",
        "asymmetry of cortex 0.333, ordinary heads have 0 to 0.1",
    ]
    assert of_answer(found_labels(), RELEASE, ["unknown"], "old") == []


def test_the_flag_is_written_and_said(tmp_path: Path) -> None:
    scan = write_scan(tmp_path / "a_t1.nii.gz", "RAS")
    labeller = replace(labeller_of(by_hand(tmp_path / "b.safetensors", scan)), release=RELEASE)
    with pytest.warns(BrainfmWarning, match=r"a_t1.nii.gz: out of scope: .*asymmetry of cortex"):
        label_files(labeller, {"t1": scan}, tmp_path / "one")
    write_manifest(tmp_path / "m.csv", [Scan("d", "a", "", "t1", str(scan), {"age": "99"})])
    report = label_regions(labeller, read_manifest(tmp_path / "m.csv"), tmp_path / "out")
    assert report.flagged == () and "age 99" in report.strange[0].reason
    for table in (tmp_path / "one" / "volumes.csv", tmp_path / "out" / "volumes.csv"):
        with table.open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert row["flag"] == "" and "asymmetry of cortex" in row["out_of_scope"]
    assert list((tmp_path / "out").rglob("*_dseg.nii.gz"))  # answered all the same
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = label_regions(labeller, read_manifest(tmp_path / "m.csv"), tmp_path / "out")
    assert (again.done, again.strange) == (0, report.strange)


def test_an_answer_for_a_session_carries_it(tmp_path: Path) -> None:
    plain = SessionAnswer("age", 40.0, None, "years", 30.0, 50.0, ("t1",))
    assert "out_of_scope" not in plain.to_json()  # as before
    flagged = replace(plain, out_of_scope=("t1: there is no head in it",))
    (tmp_path / "a.json").write_text(flagged.to_json())
    assert read_answer(tmp_path / "a.json") == flagged
    (tmp_path / "a.json").write_text(plain.to_json())
    assert read_answer(tmp_path / "a.json") == plain
