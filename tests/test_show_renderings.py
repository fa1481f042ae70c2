"""The sheet of renderings, and how well they are told from real scans."""

from __future__ import annotations

import json
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainfm.data.store import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = util.spec_from_file_location("show_renderings", ROOT / "scripts" / "report" / "show_renderings.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["show_renderings"] = module
    spec.loader.exec_module(module)
    return module


def test_statistics_tell_detail_and_not_the_scale_of_intensities(script: Any) -> None:
    rng = np.random.default_rng(0)
    grey = rng.normal(size=(24, 24, 24)).astype(np.float32)
    smooth = script.ndimage.gaussian_filter(grey, 2)
    smooth /= smooth.std()
    rough, fine = script.statistics(grey), script.statistics(smooth)
    assert rough["edge"] > fine["edge"] + 0.5 and rough["power0.5"] > fine["power0.5"] + 1
    assert fine["neighbours"] > 0.5 > rough["neighbours"]
    twice = script.statistics(2 * smooth + 3)
    scaled = ("skew", "kurtosis", "entropy", "edge", "power0.1", "q0.5")
    assert all(twice[name] == pytest.approx(fine[name], abs=0.05) for name in scaled)
    assert twice["log_std"] == pytest.approx(fine["log_std"] + np.log(2), abs=0.05)
    flat = script.statistics(np.zeros((24, 24, 24), np.float32))
    assert set(flat) == set(fine) and all(np.isfinite(value) for value in flat.values())


def test_what_differs_is_told_and_what_does_not_is_not(script: Any) -> None:
    rng = np.random.default_rng(0)
    rendered, people = np.repeat([0, 1], 100), [f"p{n % 20}" for n in range(200)]
    features = rng.normal(size=(200, 6))
    same = script.told_apart(features, rendered, people, 0)
    assert same["people"] == 20 and abs(same["logistic"]["auroc"] - 0.5) < 0.15 and same["trees"]["low"] < 0.6
    features[:, 2] += 4 * rendered
    other = script.told_apart(features, rendered, people, 0)
    assert other["logistic"]["low"] > 0.95 and other["trees"]["auroc"] > 0.95
    first = script.telling(features, rendered, list("abcdef"))[0]
    assert first["statistic"] == "c" and first["auroc"] > 0.95 and first["rendered"] - first["real"] > 3


def test_a_person_is_on_one_side_of_a_fold(script: Any) -> None:
    """What only a person's own mark tells is not told of a person who was not seen."""
    rng = np.random.default_rng(0)
    mark = rng.normal(size=(30, 4))
    rendered = np.array([n % 2 for n in range(30) for _ in range(6)])  # a person is all real or all rendered
    features = np.repeat(mark, 6, axis=0) + 0.01 * rng.normal(size=(180, 4))
    found = script.told_apart(features, rendered, [f"p{n}" for n in range(30) for _ in range(6)], 0)
    assert found["trees"]["auroc"] < 0.8


def test_the_whole_report(script: Any, people_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHEET_VOX", 24)
    monkeypatch.setattr(script, "SHEET_MM", 2.5)
    monkeypatch.setattr(script, "EDGE", 16)
    words = ["show_renderings.py", "--store", str(people_store.path), "--out", str(tmp_path), "--samples", "24"]
    monkeypatch.setattr(sys, "argv", [*words, "--steps", "1", "--keys", "data.looks.free_share=0"])
    assert script.main() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["shown"]) == 8 + 12 and (tmp_path / "sheet.png").stat().st_size > 10_000  # t1, t2; no flair
    assert not any(title.startswith("free") for title in report["shown"])
    assert 0 < report["cost"]["rendering_share"] < 1
    assert "| as trained | T1-like against T1s of the same heads |" in (tmp_path / "report.md").read_text()


def test_a_store_without_label_maps_is_refused(
    script: Any, toy_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--store", str(toy_store.path), "--out", str(tmp_path)])
    assert script.main() == 2
    assert "no label map, so nothing can be rendered" in capsys.readouterr().err
