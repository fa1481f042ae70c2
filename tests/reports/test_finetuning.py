"""The report of a fine-tuning, from hand-made results: nothing from elsewhere, every number where it belongs."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfm.cli import main
from brainfm.data.manifest import read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.reports import charts, finetuning, pictures
from brainfm.reports.finetuning import write_finetuning_page
from brainfm.reports.run import FinishedRun
from brainfm.reports.style import png
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.registry import build_task
from brainfm.tasks.segmentation.page import SegmentationPage
from tests.conftest import write_subjects
from tests.reports.pages import EVIL, is_harmless, words_of

PATCH = (16, 16, 16)
LESION = TaskSpec("segmentation", "lesion", ("t1", "flair"), (0, 1), (32, 32, 32))
TISSUE = TaskSpec("segmentation", "tissue", ("t1",), (0, 1, 3), (32, 32, 32))
ILL = TaskSpec("classification", "ill", ("t1",), ("no", "yes"), PATCH, mode="exclusive", view_mm=3.0)
SIGNS = TaskSpec("classification", "signs", ("t1", "t2"), ("bleed", "edema"), PATCH, mode="multilabel", view_mm=3.0)
AGE = TaskSpec("regression", "age", ("t1", "t2"), (), PATCH, unit="years", view_mm=3.0)
PRIMARY = {"segmentation": ("dice", True), "classification": ("auroc", True), "regression": ("mae", False)}


def interval(mean: float | None, half: float = 0.05, n: int = 6) -> dict[str, Any]:
    if mean is None:
        return {"mean": None, "low": None, "high": None, "n": n}
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def shortcut(name: str, code: str, **numbers: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("score", "p", "p_family", "noticed_from", "explained", "equalised", "equalised_p", "kept"))
    return {"name": name, "label": "", "anatomy": False, "code": code, "verdict": "", **unknown, **numbers}


def audit(measure: str = "auroc") -> dict[str, Any]:
    lost = {
        "score": interval(0.93), "p": 0.001, "p_family": 0.0004, "noticed_from": 0.71, "explained": 0.83,
        "equalised": interval(0.52), "equalised_p": 0.4, "kept": 0.04,
    }  # fmt: skip
    return {
        "target": "x", "measure": measure, "chance": 0.5, "cases": 6, "subjects": 6, "model": {"": interval(0.9)},
        "model_p": {"": 0.001}, "verdict": "Do not trust this score yet: see the site.",
        "shortcuts": [
            shortcut("site", "lost", **lost), shortcut("mask outline", "harmless", anatomy=True, **lost),
            shortcut("scanner", "untestable", verdict="cannot be tested: the manifest has no column for the scanner"),
        ],
    }  # fmt: skip


def make_run(folder: Path, store: Store, spec: TaskSpec, rows: list[dict[str, Any]], **more: Any) -> Path:
    """A finished run with an untrained network a fold."""
    primary, larger = PRIMARY[spec.kind]
    config = {
        "site": "site", "sites_apart": False, "seed": 3, "repeats": 1, "folds": 2, "average": 0.99, "baselines": [],
        "backbone_from": "none", "adapt": {"pretrained": True}, "task": {"lesion": None},
    }  # fmt: skip
    sessions = [s for s in store.sessions if any(scan.contrast in spec.contrasts for scan in s.scans)]
    found = {
        "format": 2, "task": spec.to_dict(), "preprocess": store.spec.to_dict(), "store": str(store.path),
        "config": config, "command": "brainfm finetune task=x", "primary": primary, "larger_is_better": larger,
        "cohort": {
            "sessions": 6, "subjects": 6, "contrasts": {"t1": 6, "flair": 1}, "left_out": [],
            "columns": {"age": {"n": 6, "median": 42.5, "smallest": 40, "largest": 45}},
            "shape_vox": {"median": [30, 30.5, 31], "largest": [32, 32, 32]},
        },
        "plan": {"precision": "32-true", "batch_size": 2, "accumulate": 1},
        "splits": [
            {"repeat": 0, "fold": k, "folder": f"fold{k}", "trained": 3, "inner": 0,
             "held": ["/".join(s.key) for s in sessions[k::2]]} for k in range(2)
        ],
        "scores": {"model": {primary: interval(0.7), "accuracy": interval(None)}, "features": {primary: interval(0.6)}},
        "comparisons": [{"against": "features", "difference": 0.1, "low": 0.04, "high": 0.16, "p": 0.0002, "n": 6}],
        "decisions": {"mirror": [], "largest_component": False, "min_ml": 0.0, "temperature": 1.0, "bias": [0.0, 1.0]},
        "decided": [], "calibration": None, "cases": rows, "audit": None, "learning_curve": None,
        "curves": {"fold0": {"total": [[1, 2.0], [2, None], [3, 1.0]], "held_x": [[3, 0.5]]}, "fold1": {}},
        "provenance": Provenance("0.1.0", "abc", "data", steps=20, hours=0.5).to_dict(),
    }  # fmt: skip
    found |= more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, allow_nan=False))
    members = []
    for fold in range(2):
        torch.manual_seed(fold)
        members.append(build_task(spec, build_backbone("unet_tiny")).state_dict())
    write_bundle(
        folder / "bundle", task=spec, backbone_config={"name": "unet_tiny"}, members=members, preprocess=store.spec,
        provenance=Provenance("0.1.0", "abc", "data"),
    )  # fmt: skip
    return folder


def rows_of(store: Store, **answers: list[Any]) -> list[dict[str, Any]]:
    keys = ("dataset", "subject", "session")
    rows = [dict(zip(keys, s.key)) | {"repeat": 0, "fold": n % 2} for n, s in enumerate(store.sessions)]
    return [row | {name: values[n % len(values)] for name, values in answers.items()} for n, row in enumerate(rows)]


def masks(folder: Path, store: Store, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Gives every row a predicted mask, Dice and volumes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (row, session) in enumerate(zip(rows, store.sessions)):
        indices = np.zeros(session.shape, np.uint8)
        indices[8:14, 8:14, 8 : 10 + number] = 1
        np.savez_compressed(folder / f"{number}.npz", indices=indices[None])
        row |= {"file": f"{number}.npz", "decisions": Decisions().to_dict()}
        row |= {"dice": 0.1 * number, "true_ml": 2.0, "predicted_ml": 1.0 + number}
    return rows


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are arranged and not drawn, which takes most of the time."""
    pixel = png(charts.chart(1, 1)[0])
    for module in (pictures, charts):
        monkeypatch.setattr(module, "png", lambda figure: pixel)


@pytest.fixture(scope="module")
def pages(toy_store: Store, people_store: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report of each kind."""
    root = tmp_path_factory.mktemp("runs")
    lesions = masks(root / "lesion", toy_store, rows_of(toy_store))
    chosen = {"mirror": [0], "largest_component": True, "min_ml": 0.0, "temperature": 1.0, "bias": [0, 1]}
    make_run(root / "lesion", toy_store, LESION, lesions, audit=audit("skill"), decided=["mirroring: +0.1 Dice"],
             decisions=chosen)  # fmt: skip
    ill = rows_of(people_store, truth=[[0.0], [1.0]], answer=[[0.9, 0.1], [0.7, 0.3], [0.6, 0.4]])
    scaled = {"ece_before": 0.2, "ece_after": 0.1, "kept": True, "temperature": 0.5,
              "reliability": [[0.1, 0.0, 3], [None, None, 0], [0.9, 1.0, 3]]}  # fmt: skip
    make_run(root / "ill", people_store, ILL, ill, audit=audit(), calibration=scaled)
    ages = rows_of(people_store, truth=[[40.0], [50.0], [60.0]], answer=[[41.0], [70.0], [60.25]])
    bands = {"mae_before": 9.0, "mae_after": 7.5, "bias": [2.0, 0.5], "kept": True, "level": 0.9, "half_width": 12.5,
             "coverage": 0.86}  # fmt: skip
    make_run(root / "age", people_store, AGE, ages, calibration=bands)
    return {name: write_finetuning_page(root / name) for name in ("lesion", "ill", "age")}


def test_a_mask_is_shown_as_it_was_scored(toy_store: Store, tmp_path: Path) -> None:
    indices = np.zeros((2, 12, 12, 12), np.uint8)
    indices[0, 2:4, 2, 2] = indices[1, 5:9, 5, 5] = indices[1, 11, 11, 11] = 1
    np.savez_compressed(tmp_path / "m.npz", indices=indices)
    spec = replace(LESION, values=(0, 7))
    chosen = [Decisions(), Decisions(mirror=(0,)), Decisions(mirror=(0,), largest_component=True)]
    page = SegmentationPage(FinishedRun(tmp_path, {}, spec, toy_store, None))
    shown = [page.predicted({"file": "m.npz", "decisions": d.to_dict()}) for d in chosen]
    assert [int((s == 7).sum()) for s in shown] == [2, 5, 4] and set(np.unique(shown)) == {0, 7}


def test_no_report_loads_anything_from_elsewhere(pages: dict[str, Path]) -> None:
    for page in pages.values():
        assert "img" in is_harmless(page).tags


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lesion", ["Segmentation of lesion", "Dice 0.700 [0.650, 0.750]", "what speaks for lesion",
                    "Worst of 6 held-out cases: 00/1, Dice 0.000", "Best of 6 held-out cases: 05/1, Dice 0.500",
                    "the logarithm of the volume of lesion in ml",
                    "ships the mean over mirrored volumes (X) and only the largest connected part"]),
        ("ill", ["Classification of ill", "AUROC 0.700", "Expected calibration error: 0.200",
                 "0.100 after a temperature", "divides its logits by 0.50", "true yes, answered no (0.90)",
                 "lies outside the head", "(of AUROC − .5)", "17% of them; the model is not shown it"]),
        ("age", ["Regression of age", "mean absolute error (years)", "answer ± 12.5 years",
                 "in 86% of the held-out", "from 9 to 7.5 years and was kept", "true 50.0 years, answered 70.0 years",
                 "red raises the answer (age)"]),
    ],
)  # fmt: skip
def test_a_report_says_what_was_found(pages: dict[str, Path], name: str, said: list[str]) -> None:
    words = words_of(pages[name])
    everywhere = ["+0.100 +0.040 to +0.160 < 0.001 6", "trained from fresh weights", "Not a medical device",
                  "brainfm finetune task=x", "accuracy - -", "median volume has 30 x 30 x 31 voxels"]  # fmt: skip
    for sentence in (*said, *everywhere):
        assert sentence in words, sentence
    assert not re.search(r"\bNone\b|\bnan\b|\{|\}", words)
    sections = re.findall(r'<section id="s\d+"', pages[name].read_text(encoding="utf-8"))
    assert len(sections) >= 7


def test_smaller_errors_are_better(pages: dict[str, Path]) -> None:
    words = words_of(pages["age"])
    assert "Smaller is better. Worse than simple measurements + linear: +0.100" in words
    assert "below 0 this model is better" in words and "above 0 this model is better" in words_of(pages["ill"])


def test_the_audit_is_told_in_numbers_and_words(pages: dict[str, Path]) -> None:
    words = words_of(pages["ill"])
    for sentence in ("Do not trust this score yet", "folds of the audit's own", "0.93 [0.88, 0.98] < 0.001 0.71 83%",
                     "0.52 [0.47, 0.57] 0.400 4%", "nothing above chance is left without it", "mask outline*",
                     "Could not be tested scanner the manifest has no column for the scanner"):  # fmt: skip
        assert sentence in words
    assert "Shortcuts" not in words_of(pages["age"])  # it was not asked


@pytest.mark.usefixtures("quick")
def test_a_map_is_held_against_the_lesion_that_is_known(
    people_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outlines = []

    def draw(*arrays: np.ndarray, outline: np.ndarray | None = None, **how: Any) -> bytes:
        outlines.append(outline)
        return pictures.png(None)

    monkeypatch.setattr(pictures, "heat_figure", draw)
    rows = rows_of(people_store, truth=[[0.0], [1.0]], answer=[[0.9, 0.1], [0.3, 0.7]])
    mine = [row for row in rows if row["subject"] == "p1"]
    config = {"site": None, "sites_apart": False, "seed": 0, "repeats": 1, "folds": 2, "average": 0, "baselines": [],
              "task": {"lesion": "lesion"}}  # fmt: skip
    page = write_finetuning_page(make_run(tmp_path / "run", people_store, ILL, mine, config=config))
    (outline,) = outlines
    entry = next(s for s in people_store.sessions if s.subject == "p1")
    assert np.array_equal(outline, people_store.volume(entry, "lesion_mask") != 0)
    said = r"\d+% of the map lies inside the outline, which takes \d+\.\d% of the volume shown"
    assert re.search(said, words_of(page))


@pytest.mark.usefixtures("quick")
def test_every_label_that_the_task_knows_is_outlined(
    people_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(pictures, "overlay_figure", lambda i, t, p, **k: drawn.append((t, p)) or pictures.png(None))
    run = tmp_path / "run"
    rows = [row for row in masks(run, people_store, rows_of(people_store)) if row["subject"] in ("p0", "p1", "p2")]
    for row in rows:
        row |= {"dice_1": 0.5, "dice_3": 0.25}
    scores = {"model": {"dice": interval(0.4), "dice_1": interval(0.5), "dice_3": interval(0.25)}}
    page = write_finetuning_page(make_run(run, people_store, TISSUE, rows, scores=scores, comparisons=[]))
    assert len(drawn) == 3
    for truth, answer in drawn:
        assert set(np.unique(truth)) == {0, 1, 3}  # 2 is in the file and not in the task
        assert set(np.unique(answer)) == {0, 1}
    words = words_of(page)
    assert "Dice of label 3" in words and "Every label is outlined" in words
    assert "Scores against baselines" not in words


@pytest.mark.usefixtures("quick")
def test_several_labels_a_session_with_unknown_ones(people_store: Store, tmp_path: Path) -> None:
    rows = rows_of(people_store, truth=[[1.0, None], [0.0, 0.0]], answer=[[0.2, 0.5], [0.1, 0.2]])
    scores = {"model": {"auroc": interval(0.7), "auroc/edema": interval(None)}}
    words = words_of(write_finetuning_page(make_run(tmp_path / "run", people_store, SIGNS, rows, scores=scores)))
    assert "AUROC of edema -" in words and "true bleed, answered bleed 0.20, edema 0.50" in words


@pytest.mark.usefixtures("quick")
def test_a_learning_curve_without_all_cases_is_a_report_too(people_store: Store, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", people_store, AGE, [])
    found = json.loads((run / "results.json").read_text())
    points = [
        {"shots": n, "subjects": float(n), "scores": {"model": interval(9.0 - n), "scratch": interval(9.5)},
         "comparisons": [{"against": "scratch", "difference": -0.5 - n, "low": None, "high": None, "p": None, "n": 6}]}
        for n in (1, 4)
    ]  # fmt: skip
    found = {k: v for k, v in found.items() if k not in ("scores", "comparisons", "cases", "provenance", "curves")}
    found |= {"learning_curve": {"points": points, "primary": "mae"}}
    (run / "results.json").write_text(json.dumps(found))
    shutil.rmtree(run / "bundle")
    words = words_of(write_finetuning_page(run))
    assert "How many cases it takes" in words and "4 same schedule from scratch −4.500 - to -" in words
    assert "4 5.000 [4.950, 5.050] 9.500" in words
    assert "Case by case" not in words


@pytest.mark.usefixtures("quick")
def test_who_was_left_out_and_where_weights_came_from(people_store: Store, tmp_path: Path) -> None:
    rows = rows_of(people_store, truth=[[40.0]], answer=[[41.0]])
    run = make_run(tmp_path / "run", people_store, AGE, rows)
    found = json.loads((run / "results.json").read_text())
    left = [f"d/s{n}: no age" for n in range(10)] + ["d/s10: age 400 lies outside 0 to 130"]
    found["cohort"]["left_out"] = left
    found["config"] |= {"backbone_from": "some/where/backbone.safetensors"}
    trial = {
        "taken": True, "subjects": 8, "scores": {"encoder": 0.4, "decoder": 0.46}, "gain": 0.06, "standard_error": 0.02,
        "steps": 500, "of_steps": 2000, "seconds": 90.0,
    }  # fmt: skip
    folds = {
        "fold0": {"decoder": True, "last_layer": "fresh", "report": "", "trial": trial},
        "fold1": {"decoder": False, "last_layer": "fresh", "report": "", "trial": {"taken": False, "subjects": 0}},
    }
    found["transfer"] = {"backbone": "ab", "file_has_decoder": True, "asked": "auto", "folds": folds}
    found["seen_in_pretraining"] = {"seen": 2, "of": 6}
    (run / "results.json").write_text(json.dumps(found))
    words = words_of(write_finetuning_page(run))
    assert "11 sessions could not answer and were left out" in words
    assert "no age 10 d/s0, d/s1, d/s2, d/s3, d/s4, d/s5, d/s6, d/s7 and 2 more" in words
    assert "fine-tuned from pre-trained weights (backbone.safetensors)" in words and "some/where" not in words
    assert "2 of the 6 people tested here were in the pre-training of the backbone" in words
    assert "What came from pre-training" in words and "no held-out case was looked at for that" in words
    assert "fold0 taken fresh 0.460 0.400 +0.060 0.020 500 beside 2000 fold1 fresh fresh" in words


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is missing; expected the folder"), ("{", "is not JSON"), ('{"format": 9}', "not a result")],
)
def test_a_run_that_is_not_finished_is_one_sentence(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=said):
        write_finetuning_page(tmp_path)
    assert main(["report", f"run={tmp_path}"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.usefixtures("quick")
def test_a_store_that_moved_is_named(
    pages: dict[str, Path], toy_store: Store, people_store: Store, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pages["age"].parent, run)
    found = json.loads((run / "results.json").read_text()) | {"store": str(tmp_path / "gone")}
    (run / "results.json").write_text(json.dumps(found))
    assert main(["report", f"run={run}", f"store={people_store.path}"]) == 0
    assert main(["report", f"run={run}"]) == 2
    with pytest.raises(ConfigError, match="expected the store that the run was made from"):
        write_finetuning_page(run, store=toy_store.path)


def test_the_kind_of_a_task_is_asked_once() -> None:
    """Comparing it sentence by sentence is what made a new kind of task expensive."""
    compared = []
    for path in Path(finetuning.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
                words |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                compared += [f"{path.name}:{node.lineno}"] if words & {"kind", "mode", "segmentation"} else []
    assert not compared


# ---- names that would like to be more than names ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def evil_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three people whose names are markup, on a 2 mm grid, with lesion masks."""
    root = tmp_path_factory.mktemp("evil")
    manifest = write_subjects(root, 3, ("t1",), edge=20)
    scans = [replace(scan, subject=f"{EVIL} {scan.subject}", session=EVIL) for scan in read_manifest(manifest).scans]
    write_manifest(manifest, scans)
    report = prepare(read_manifest(manifest), root / "store", PreprocessSpec(spacing_mm=(2, 2, 2)), workers=1)
    assert not report.failed
    return Store.open(root / "store")


def evil_run(folder: Path, store: Store, kind: str) -> Path:
    """A run in which every name that a user, a table or a folder brings in is markup."""
    rows, values = rows_of(store), [EVIL, f"{EVIL} 2"]
    if kind == "segmentation":
        spec = replace(LESION, contrasts=("t1",))
        rows = masks(folder, store, rows)
    else:
        spec = replace(ILL, kind=kind, target=EVIL, values=values, mode="exclusive")
        if kind == "regression":
            spec = replace(AGE, contrasts=("t1",), target=EVIL, unit=EVIL)
        rows = [row | {"truth": [1.0], "answer": [0.9, 0.1][: max(len(spec.values), 1)]} for row in rows]
    primary = PRIMARY[spec.kind][0]
    run = make_run(folder, store, spec, rows, audit=audit(), decided=[f"{EVIL}: {EVIL}"], command=EVIL)
    found = json.loads((run / "results.json").read_text())
    found["cohort"] |= {
        "left_out": [f"{EVIL}: {EVIL}"], "contrasts": {EVIL: 6},
        "columns": {EVIL: {"n": 6, "counts": {EVIL: 6}}, "site": {"n": 6, "counts": {EVIL: 3, "b": 3}}},
    }  # fmt: skip
    found["scores"] = {name: {primary: interval(0.7), f"{primary}/{EVIL}": interval(0.5)} for name in ("model", EVIL)}
    found["comparisons"][0]["against"] = EVIL
    found["config"] |= {"backbone_from": EVIL.replace("/", "")}
    found["audit"] |= {"verdict": EVIL, "model": {EVIL: interval(0.9)}, "model_p": {EVIL: 0.1}}
    found["audit"]["shortcuts"] = [
        shortcut(EVIL, "untestable", verdict=EVIL), shortcut(EVIL, EVIL, label=EVIL, score=interval(0.5))
    ]  # fmt: skip
    found["curves"] = {EVIL: {"total": [[1, 2.0], [3, 1.0]], "held_x": [[3, 0.5]]}}
    candidate = {"inner": 0.5, "outer": interval(0.5), "chosen": 1}
    folds = {"f": {"chosen": EVIL, "fallback": "mean", "said": [EVIL]}}
    found["candidates"] = {"folds": folds, "table": {EVIL: candidate}, "without_map": interval(0.5)}
    trial = {"taken": True, "subjects": 0}
    found["transfer"] = {"file_has_decoder": True, "asked": "auto",
                         "folds": {EVIL: {"decoder": True, "last_layer": EVIL, "trial": trial}}}  # fmt: skip
    points = [{"subjects": 2.0, "scores": {EVIL: interval(0.5)}, "comparisons": found["comparisons"],
               "candidates": found["candidates"]}]  # fmt: skip
    found["learning_curve"] = {"points": points}
    if kind == "classification":
        found["calibration"] = {"ece_before": 0.2, "kept": False, "reliability": [[0.9, 1.0, 3]]}
    if kind == "regression":
        found["calibration"] = {"mae_before": 9.0, "mae_after": 7.5, "kept": True, "level": 0.9, "half_width": 12.5,
                                "coverage": 0.86}  # fmt: skip
    found["provenance"] |= {"device": EVIL, "parents": [EVIL], "commit": EVIL, "data": EVIL}
    (run / "results.json").write_text(json.dumps(found))
    return run


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["segmentation", "classification", "regression"])
def test_names_stay_names(evil_store: Store, tmp_path: Path, kind: str) -> None:
    page = is_harmless(write_finetuning_page(evil_run(tmp_path / "run", evil_store, kind)))
    words = re.sub(r"\s+", " ", " ".join(page.text))
    assert words.count(EVIL) > 40, "as they were given"
    for said in (f"{EVIL} 01/{EVIL}", f"1 session could not answer and was left out why sessions {EVIL} 1 {EVIL}",
                 f" than {EVIL}: +0.100", f"Shortcuts: {EVIL}"):  # fmt: skip
        assert said in re.sub(r" +", " ", words), said
    if kind != "segmentation":
        assert f"{kind.capitalize()} of {EVIL}" in words


# ---- in a real browser -----------------------------------------------------------------------------------------------


def _checker() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "report" / "check_report.py"
    spec = util.spec_from_file_location("check_report", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["check_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checker() -> Any:
    module = _checker()
    if module.browser_path() is None:
        pytest.skip("no chromium or chrome on the PATH")
    return module


@pytest.mark.parametrize("name", ["lesion", "ill", "age"])
def test_a_browser_has_nothing_to_complain_about(checker: Any, pages: dict[str, Path], name: str) -> None:
    found = checker.check(pages[name])
    assert found.problems == ()
    assert found.counts["images"] >= 7 and found.counts["sections"] >= 7 and found.counts["height"] > 3000
    on_a_phone = checker.check(pages[name], 390)
    assert all("must be scrolled sideways" in said for said in on_a_phone.problems), "wide tables alone, not the page"


def test_a_browser_finds_what_is_wrong(checker: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><section><h2>Bad</h2><img src="x.png" alt="pic"><a href="#q">l</a>'
        '<div style="overflow-x:auto"><div style="width:3000px">a</div></div></section>'
        '<div style="width:1500px">wide</div><script>console.warn("hm")</script>'
    )
    said = " | ".join(checker.check(page).problems)
    for words in ("console: hm", "asks for file://", "x.png", "pixels wide in a window of 1280", "in “Bad” must be",
                  "a picture does not show: pic", "leads nowhere within the page: #q"):  # fmt: skip
        assert words in said


def test_without_a_browser_there_is_one_sentence(
    pages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _checker()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", ["check_report.py", str(pages["age"])])
    assert module.main() == 2
    assert "no browser on the PATH, expected one of chromium" in capsys.readouterr().err
