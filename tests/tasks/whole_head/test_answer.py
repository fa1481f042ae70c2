"""Answers for a whole session: what the members say, what was decided, and the files that carry it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, softmax

from brainfm.errors import ConfigError, ScanError
from brainfm.nets.backbone import build_backbone
from brainfm.scoring.calibration import conformal_quantile
from brainfm.specs import Decisions, PreprocessSpec, TaskSpec
from brainfm.tasks.answers import SessionAnswer
from brainfm.tasks.engine import Engine
from brainfm.tasks.registry import kind_of
from brainfm.tasks.whole_head.answer import (
    answer_session,
    check_answer_file,
    decided,
    raw_answers,
    read_answer,
    write_answer,
)
from brainfm.tasks.whole_head.network import WholeHeadTask


def spec(kind: str, mode: str = "", values: tuple = (), **more: Any) -> TaskSpec:
    return TaskSpec(kind, "x", ("t1", "flair"), values, (16, 16, 16), mode=mode, view_mm=5.0, **more)


ILL = spec("classification", "exclusive", ("no", "yes"))
GRADE = spec("classification", "ordinal", (1, 2, 3))
FINDINGS = spec("classification", "multilabel", ("bleed", "mass"))
AGE = spec("regression", unit="years")


def engine(task: TaskSpec, decisions: Decisions | None = None, members: int = 0) -> Engine:
    networks = []
    for seed in range(members):
        torch.manual_seed(seed)
        network = WholeHeadTask(task, build_backbone("unet_tiny")).eval()
        torch.nn.init.normal_(network.out.weight, std=0.01)
        networks.append(network)
    spacing = PreprocessSpec(spacing_mm=(2, 2, 2))
    return Engine(tuple(networks), task, spacing, torch.device("cpu"), None, "", 0.5, decisions or Decisions())


def test_probabilities_are_scaled_member_by_member_and_averaged() -> None:
    raw = np.array([[0.9, 0.1], [0.4, 0.6]])
    found = decided(engine(ILL), raw, ("t1",))
    assert found.answer == "no" and found.probabilities == pytest.approx({"no": 0.65, "yes": 0.35})
    found = decided(engine(ILL, Decisions(temperature=2.0)), raw, ("t1",))
    by_hand = np.mean([softmax(np.log(row) / 2) for row in raw], axis=0)
    assert list(found.probabilities.values()) == pytest.approx(by_hand.tolist())
    assert sum(found.probabilities.values()) == pytest.approx(1) and found.low is found.high is None


def test_of_ordered_classes_the_most_probable_answers() -> None:
    found = decided(engine(GRADE), np.array([[0.2, 0.5, 0.3]]), ("t1",))
    assert found.answer == "2" and list(found.probabilities) == ["1", "2", "3"]


def test_labels_are_answered_apart() -> None:
    raw = np.array([[0.9, 0.8], [0.7, 0.1]])
    found = decided(engine(FINDINGS, Decisions(temperature=0.5)), raw, ("t1",))
    by_hand = expit(logit(raw) / 0.5).mean(axis=0)
    assert list(found.probabilities.values()) == pytest.approx(by_hand.tolist())
    assert found.answer == [name for name, p in zip(("bleed", "mass"), by_hand) if p > 0.5]
    assert decided(engine(FINDINGS), raw, ("t1",)).answer == ["bleed"], "0.45 is not more likely than not"
    assert decided(engine(FINDINGS), np.array([[0.2, 0.4]]), ("t1",)).answer == []


def test_a_value_is_corrected_and_gets_its_interval() -> None:
    residuals = tuple(float(r) for r in range(1, 31))
    decisions = Decisions(bias=(10.0, 0.5), residuals=residuals)
    found = decided(engine(AGE, decisions), np.array([[30.0], [34.0]]), ("t1",))
    assert found.answer == pytest.approx((32 - 10) / 0.5) and found.unit == "years"
    half = conformal_quantile(np.array(residuals), 0.9)
    assert (found.low, found.high) == pytest.approx((found.answer - half, found.answer + half))
    few = decided(engine(AGE, Decisions(residuals=(1.0, 2.0))), np.array([[30.0]]), ("t1",))
    assert few.answer == 30 and few.low is few.high is None, "two cases promise nothing"


def test_every_member_is_asked_and_views_of_any_number_of_contrasts_pass() -> None:
    asked = engine(ILL, members=3)
    views = torch.randn(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    raw = raw_answers(asked, views)
    assert raw.shape == (3, 2) and np.allclose(raw.sum(axis=1), 1) and len(np.unique(raw[:, 0])) == 3
    assert np.allclose(raw_answers(asked, views.flip(1)), raw, atol=1e-6), "the order of contrasts does not matter"
    assert raw_answers(asked, views[:, :1]).shape == (3, 2)
    assert raw_answers(engine(AGE, members=2), views).shape == (2, 1)


def test_files_are_answered(toy_manifest: Path) -> None:
    root = toy_manifest.parent
    files = {c: root / "sub-01" / f"{c}.nii.gz" for c in ("flair", "t1")}
    asked = engine(ILL, members=2)
    found = answer_session(asked, files, "t1")
    assert found.contrasts == ("flair", "t1") and set(found.probabilities) == {"no", "yes"}
    again = answer_session(asked, dict(reversed(files.items())), "t1")
    assert again.probabilities == found.probabilities and again.contrasts == ("t1", "flair")
    one = answer_session(asked, {"t1": files["t1"]}, "t1")
    assert one.probabilities != found.probabilities
    with pytest.raises(ScanError, match="lesion_mask"):
        answer_session(asked, {"t1": root / "sub-01" / "lesion_mask.nii.gz", "flair": root / "nowhere.nii"}, "t1")


@pytest.mark.parametrize(
    "answer",
    [
        SessionAnswer("x", "yes", {"no": 0.25, "yes": 0.75}, "", None, None, ("t1", "flair")),
        SessionAnswer("x", ["bleed"], {"bleed": 0.75, "mass": 0.2}, "", None, None, ("t1",)),
        SessionAnswer("age", 41.5, None, "years", 30.0, 53.0, ("t1",)),
        SessionAnswer("age", 41.5, None, "years", None, None, ("t1",)),
    ],
)
def test_an_answer_survives_its_file(answer: SessionAnswer, tmp_path: Path) -> None:
    write_answer(tmp_path / "a.json", answer)
    assert read_answer(tmp_path / "a.json") == answer
    write_answer(tmp_path / "a.txt", answer)
    numbers = [float(line) for line in (tmp_path / "a.txt").read_text().splitlines()]
    values = list((answer.probabilities or {"": answer.answer}).values())
    assert numbers == (values[1:] if "no" in (answer.probabilities or {}) else values)


def test_table_columns_are_those_of_the_cells() -> None:
    assert kind_of(AGE.kind).columns(AGE) == list(decided(engine(AGE), np.array([[30.0]]), ()).cells())
    for task, raw in ((ILL, [[0.3, 0.7]]), (GRADE, [[0.2, 0.5, 0.3]]), (FINDINGS, [[0.6, 0.7]])):
        assert kind_of(task.kind).columns(task) == list(decided(engine(task), np.array(raw), ()).cells())
    assert decided(engine(FINDINGS), np.array([[0.6, 0.7]]), ()).cells()["answer"] == "bleed mass"


def test_refusals(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.csv", "a"):
        with pytest.raises(ConfigError, match=r"\.json or \.txt"):
            check_answer_file(tmp_path / name)
    assert check_answer_file(tmp_path / "a.json") == tmp_path / "a.json"
    for text in ("", "[]", "{}", json.dumps({"target": "x"})):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.json is not an answer"):
            read_answer(tmp_path / "bad.json")
