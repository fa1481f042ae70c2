"""results.json: what it says is what the rows say, and it is plain JSON."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from brainfm.curves import Curves
from brainfm.specs import Decisions, PreprocessSpec, TaskSpec
from brainfm.study import results
from brainfm.tasks.segmentation.study import SegmentationStudy
from brainfm.tasks.study import Decided, Split
from brainfm.verbs.compose import resolve


@dataclass(frozen=True)
class Session:
    subject_key: str
    key: tuple[str, str, str]
    columns: dict[str, str]
    scans: tuple[Any, ...]
    shape: tuple[int, int, int]


def case(number: int) -> Any:
    columns = {"age": str(20 + number), "sex": "FM"[number % 2], "site": "A" if number else ""}
    columns["note"] = f"n{number}"
    scans = tuple(SimpleNamespace(contrast=c) for c in ("t1", "flair")[: 1 + number % 2])
    shape = (10 + number, 20, 30)
    return SimpleNamespace(session=Session(f"d/{number:02d}", ("d", f"{number:02d}", ""), columns, scans, shape))


CASES = tuple(case(n) for n in range(16))
SPLITS = [Split(0, fold, CASES[:8], (), CASES[8 * fold : 8 * fold + 8]) for fold in (0, 1)]
WORDS = ["store=s", "run=r", "backbone_from=none", "task.target=lesion", "audit=false"]
SETTINGS = replace(resolve("finetune", WORDS), command="brainfm finetune x=1")


def question() -> SegmentationStudy:
    found = object.__new__(SegmentationStudy)
    found._region = ()  # type: ignore[misc]  # of a lesion, which may be anywhere
    found.cases, found.left_out = CASES, ("d/99: no lesion",)
    found.spec = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 1), (16, 16, 16))
    found.store = SimpleNamespace(spec=PreprocessSpec(), path=Path("store"))  # type: ignore[assignment]
    return found


def rows(shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"dataset": "d", "subject": f"{n:02d}", "session": "", "repeat": 0, "fold": n // 8,
         "dice": 0.3 + shift + n / 50, "dice_1": np.float64(math.nan) if n == 3 else 0.5} for n in range(16)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    decided = Decided(Decisions(min_ml=0.1), rows(), ("components below 0.1 ml removed: +0.0100",))
    return results.collect(
        question(), SETTINGS, SPLITS, decided, {"scratch": rows(-0.1), "features": rows()}, {"accumulate": 1}, 0
    )


def test_it_is_plain_json_without_numbers_that_are_none(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["cases"][3]["dice_1"] is None


def test_scores_and_comparisons_are_those_of_the_rows(document: dict[str, Any]) -> None:
    mean = float(np.mean([r["dice"] for r in rows()]))
    assert document["scores"]["model"]["dice"]["mean"] == pytest.approx(mean)
    assert document["scores"]["scratch"]["dice"]["mean"] == pytest.approx(mean - 0.1)
    against = {c["against"]: c for c in document["comparisons"]}
    assert against["scratch"]["difference"] == pytest.approx(0.1) and against["scratch"]["p"] < 0.01
    assert against["features"]["difference"] == 0 and against["features"]["p"] == 1
    assert document["decisions"]["min_ml"] == 0.1 and document["primary"] == "dice" and document["larger_is_better"]
    found = results.headline(document)
    assert found["dice"] == pytest.approx(mean) and found["n_cases"] == found["n_subjects"] == 16
    assert found["low"] < found["dice"] < found["high"] and found["baselines"]["scratch"] == pytest.approx(mean - 0.1)


def test_splits_name_the_held_out(document: dict[str, Any]) -> None:
    assert [s["folder"] for s in document["splits"]] == ["fold0", "fold1"]
    assert document["splits"][1]["held"] == [f"d/{n:02d}/" for n in range(8, 16)]
    assert document["command"] == "brainfm finetune x=1" and "command" not in document["config"]


def test_the_cohort_is_counted(document: dict[str, Any]) -> None:
    cohort = document["cohort"]
    assert (cohort["sessions"], cohort["subjects"]) == (16, 16) and cohort["left_out"] == ["d/99: no lesion"]
    assert cohort["contrasts"] == {"flair": 8, "t1": 16}
    assert cohort["columns"]["age"] == {"n": 16, "median": 27.5, "smallest": 20.0, "largest": 35.0}
    assert cohort["columns"]["sex"] == {"n": 16, "counts": {"F": 8, "M": 8}}
    assert cohort["columns"]["site"] == {"n": 15, "counts": {"A": 15}}
    assert "note" not in cohort["columns"], "free text tells nothing in a table"
    assert cohort["shape_vox"] == {"median": [17.5, 20.0, 30.0], "largest": [25, 20, 30]}


def test_it_is_told_in_words(document: dict[str, Any]) -> None:
    said = results.describe(document)
    assert said[0].startswith("model: dice 0.450 [") and said[0].endswith("16 cases")
    assert any(line.startswith("against scratch: +0.100 [+0.100, +0.100], p below 0.001") for line in said)
    assert "components below 0.1 ml removed: +0.0100" in said


def test_a_learning_curve_has_a_row_for_each_point_and_condition(tmp_path: Path) -> None:
    asked = question()
    scanned = [r | {"variants": [{"decisions": Decisions().to_dict(), "dice": r["dice"]}]} for r in rows()]
    points = []
    for shots in (2, None):
        drawn = [replace(s, trained=s.trained[: shots or 8]) for s in SPLITS]
        points.append(results.point(asked, shots, drawn, scanned, {"features": rows(-0.1)}, 0))
    assert [p["subjects"] for p in points] == [2, 8] and points[0]["comparisons"][0]["difference"] == pytest.approx(0.1)
    results.write_curve(tmp_path / "curve.csv", points)
    with (tmp_path / "curve.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["shots"], r["condition"]) for r in table] == [
        ("2", "model"), ("2", "features"), ("all", "model"), ("all", "features"),
    ]  # fmt: skip
    assert float(table[0]["low"]) < float(table[0]["score"]) == pytest.approx(0.45) and table[0]["cases"] == "16"
    document = results.collect_curve(asked, SETTINGS, SPLITS, {}, {"points": points, "primary": "dice"})
    assert "scores" not in document and results.describe(document)[0].startswith("2 shots: model 0.450 [")


def test_an_undefined_score_is_empty_in_the_table(tmp_path: Path) -> None:
    score = {"mean": None, "low": None, "high": None, "n": 4}
    results.write_curve(tmp_path / "curve.csv", [{"shots": 1, "subjects": 1.0, "scores": {"model": score}}])
    assert (tmp_path / "curve.csv").read_text().splitlines()[1] == "1,1,model,,,,4"


def test_finite() -> None:
    value = {"a": math.inf, 1: (np.float32(0.5), np.int64(3), [math.nan, "x", None, True])}
    assert results.finite(value) == {"a": None, "1": [0.5, 3, [None, "x", None, True]]}


def test_training_curves_are_thinned_to_means(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "fold0", 0)
    for step in range(1, 1001):
        curves.add(step, {"total": 1000.0 - step, "lr": 0.1, "grad_norm": 2.0})
    curves.add(1000, {"held_dice": 0.5})
    curves.close()
    found = results.training_curves(tmp_path, SPLITS)
    assert set(found) == {"fold0", "fold1"} and found["fold1"] == {}  # one that left no curves
    assert set(found["fold0"]) == {"total", "held_dice"} and found["fold0"]["held_dice"] == [(1000.0, 0.5)]
    total = found["fold0"]["total"]
    assert len(total) == 200 and total[0] == (3.0, 997.0) and total[-1] == (998.0, 2.0)
    assert all(value == 1000 - step for step, value in total)
