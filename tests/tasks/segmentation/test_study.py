"""What cross-validation decides about segmentations, and that what is reported did not choose itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainfm.data.manifest import read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.settings import build
from brainfm.specs import Decisions, PreprocessSpec
from brainfm.study.splits import SplitSpec, split_cases
from brainfm.tasks.segmentation.cases import class_shares
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.segmentation.settings import SegmentationSettings
from brainfm.tasks.segmentation.study import SegmentationStudy, _file_name
from brainfm.tasks.study import Place, Row
from tests.conftest import write_subjects

TRIED = [Decisions(), Decisions(mirror=(0,)), Decisions(min_ml=0.1)]
DECIDER = object.__new__(SegmentationStudy)  # deciding looks at rows alone


def row(subject: str, fold: int, *dices: float, repeat: int = 0) -> Row:
    variants = [{"decisions": d.to_dict(), "dice": dice} for d, dice in zip(TRIED, dices, strict=True)]
    return {
        "dataset": "d", "subject": subject, "session": "", "repeat": repeat, "fold": fold, "variants": variants,
    }  # fmt: skip


def test_what_gains_on_held_out_cases_is_kept() -> None:
    rows = [row(f"{n}", n % 2, 0.5, 0.6, 0.4) for n in range(8)]
    decided = DECIDER.decide(rows)
    assert decided.decisions == Decisions(mirror=(0,))
    assert [r["dice"] for r in decided.rows] == [0.6] * 8
    assert "mirroring along X: +0.1000 Dice on held-out cases (kept)" in decided.said
    assert "components below 0.1 ml removed: -0.1000 Dice on held-out cases" in decided.said
    assert all(r["decisions"] == Decisions(mirror=(0,)).to_dict() and "variants" not in r for r in decided.rows)


@pytest.mark.parametrize("gain", [-0.1, 0.0, 0.0019])
def test_what_does_not_gain_is_not_kept(gain: float) -> None:
    rows = [row(f"{n}", n % 2, 0.5, 0.5 + gain, 0.5) for n in range(8)]
    decided = DECIDER.decide(rows)
    assert decided.decisions == Decisions() and not any("kept" in said for said in decided.said)
    assert [r["dice"] for r in decided.rows] == [0.5] * 8


def test_a_case_is_reported_under_what_the_other_folds_chose() -> None:
    """Clean-up helps fold 0 alone, and so much that it is kept; fold 0 itself is scored without it, for nobody else
    would have chosen it."""
    rows = [row(f"{n}", 0, 0.2, 0.2, 0.9) for n in range(4)] + [row(f"{n}", 1, 0.6, 0.6, 0.5) for n in range(4, 8)]
    decided = DECIDER.decide(rows)
    assert decided.decisions == Decisions(min_ml=0.1)
    assert [r["dice"] for r in decided.rows] == [0.2] * 4 + [0.5] * 4
    assert np.mean([r["dice"] for r in decided.rows]) < np.mean([0.9] * 4 + [0.5] * 4), "honest, not the best in sight"


def test_a_subject_does_not_choose_for_itself_in_another_repeat() -> None:
    """Subject 0 alone gains. In the second repeat it lies in another fold, whose rows must not speak for it."""
    rows = [row("0", 0, 0.1, 0.1, 1.0), *(row(f"{n}", n % 2, 0.5, 0.5, 0.45) for n in range(1, 6))]
    rows += [row("0", 1, 0.1, 0.1, 1.0, repeat=1)]
    rows += [row(f"{n}", n % 2, 0.5, 0.5, 0.45, repeat=1) for n in range(1, 6)]
    decided = DECIDER.decide(rows)
    assert [r["dice"] for r in decided.rows if r["subject"] == "0"] == [0.1, 0.1]


def test_one_fold_decides_nothing() -> None:
    decided = DECIDER.decide([row(f"{n}", 0, 0.1, 0.9, 0.9) for n in range(4)])
    assert decided.decisions == Decisions() and decided.said[-1] == "nothing is decided on one fold"
    assert [r["dice"] for r in decided.rows] == [0.1] * 4


def test_scores_leave_out_what_is_undefined_and_resample_subjects() -> None:
    rows: list[Row] = [
        {"dataset": "d", "subject": f"{n // 2}", "dice": n / 10, "dice_1": None if n == 0 else 0.5, "dice_2": None}
        for n in range(8)
    ]
    scored = DECIDER.score(rows, 0)
    assert scored.metrics["dice"].mean == pytest.approx(0.35) and scored.metrics["dice"].n == 8
    assert scored.metrics["dice"].low < 0.35 < scored.metrics["dice"].high
    assert scored.metrics["dice_1"].n == 7 and "dice_2" not in scored.metrics


def test_models_are_compared_case_by_case() -> None:
    identity = [{"dataset": "d", "subject": f"{n}", "session": "", "repeat": 0} for n in range(12)]
    mine = [i | {"dice": 0.6 + 0.01 * n} for n, i in enumerate(identity)]
    theirs = [i | {"dice": 0.5 + 0.01 * n} for n, i in enumerate(identity)]
    found = DECIDER.compare(mine, theirs[::-1], 0)
    assert found["difference"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1) and found["p"] < 0.01
    assert DECIDER.compare(mine, mine, 0)["p"] == 1
    assert DECIDER.compare(mine, theirs[3:], 0)["n"] == 9, "only cases that both have"


class Bright(nn.Module):
    """Calls everything lesion that is brighter than the head, and a corner of every volume."""

    def __init__(self, speck: bool) -> None:
        super().__init__()
        self.speck = speck

    def forward(self, image: Tensor, present: Tensor) -> Tensor:
        brightest = image.masked_fill(~present[:, :, None, None, None], -9).amax(dim=1)
        score = (brightest - 2.2) * 20
        if self.speck:
            score[:, :1, :1, :1] = 9
        return torch.stack([-score, score], dim=1)


def question(store: Store, **changed: Any) -> SegmentationStudy:
    mirror, clean = changed.pop("mirror", ()), changed.pop("clean", True)
    values = {"target": "lesion", "patch_vox": [32, 32, 32], **changed}
    found = SegmentationStudy(store, build(SegmentationSettings, values, "task."), mirror, clean)
    found.settle((32, 32, 32))
    return found


def test_held_out_cases_are_answered_in_every_way_that_is_tried(toy_store: Store, tmp_path: Path) -> None:
    engine = Place(torch.device("cpu"), None)
    asked = question(toy_store, mirror=(0,))
    split = split_cases(asked.cases, SplitSpec(folds=6))[0]
    (plain,) = asked.answer(Bright(False), split, engine, tmp_path)  # type: ignore[arg-type]
    (specked,) = asked.answer(Bright(True), split, engine, tmp_path)  # type: ignore[arg-type]
    ways = [v["decisions"] for v in plain["variants"]]
    assert len(ways) == 12 and [tuple(w["mirror"]) for w in ways] == [()] * 6 + [(0,)] * 6
    assert plain["variants"][0]["dice"] > 0.5, "the lesion is the brightest"
    assert json.loads(json.dumps(plain)) == plain
    first, largest = specked["variants"][0], specked["variants"][1]
    assert first["false_positives"] >= 1 and largest["decisions"]["largest_component"]
    assert largest["false_positives"] == 0 and largest["dice"] > first["dice"]
    assert specked["file"].startswith(f"{tmp_path.name}/held/")
    kept = np.load(tmp_path.parent / specked["file"])["indices"]
    assert kept.dtype == np.uint8 and kept.shape == (2, *split.held[0].session.shape)
    assert kept[0, 0, 0, 0] == 1 and kept[1, 0, 0, 0] == 0, "as it stands, and the mean with the mirrored volume"
    bare = question(toy_store, clean=False).answer(Bright(False), split, engine, tmp_path)  # type: ignore[arg-type]
    assert len(bare[0]["variants"]) == 1


def test_a_fresh_task_knows_how_frequent_the_classes_are(toy_store: Store) -> None:
    asked = question(toy_store)
    task = asked.task(build_backbone("unet_tiny"), asked.cases[:3])
    assert isinstance(task, SegmentationTask)
    shares = class_shares(toy_store, asked.cases[:3], (0, 1), (32, 32, 32))
    assert task.prior.tolist() == pytest.approx(shares, abs=0.01)


def test_folds_are_balanced_in_who_has_a_lesion(toy_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = question(toy_store)
    assert asked.strata() is None, "all have one"
    original = Store.label_points

    def only_of_even_subjects(self: Store, session: Any, label: str) -> np.ndarray:
        return original(self, session, label)[: None if int(session.subject) % 2 == 0 else 0]

    monkeypatch.setattr(Store, "label_points", only_of_even_subjects)
    strata = asked.strata()
    assert strata is not None and strata["toy/00"] == "lesion" and strata["toy/01"] == "none" and len(strata) == 6
    for split in split_cases(asked.cases, SplitSpec(folds=3), strata):
        assert sorted(int(case.session.subject) % 2 for case in split.held) == [0, 1]


def test_refusals(toy_store: Store) -> None:
    with pytest.raises(ConfigError, match="dice_ce"):
        question(toy_store, loss="luck")
    with pytest.raises(ConfigError, match=r"task\.patch_vox"):
        question(toy_store, patch_vox=[32, 32]).patch(None, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "message"), [(0, "none of the 6 sessions has a voxel"), (1, "lesion fills all of")])
@pytest.mark.parametrize("ending", ["_mask", "_labels"])
def test_labels_of_one_value_are_refused_before_any_step(value: int, message: str, ending: str, tmp_path: Path) -> None:
    scans = read_manifest(write_subjects(tmp_path, 6)).scans
    for path in tmp_path.rglob("lesion_mask.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.full(image.shape, value, np.uint8), image.affine), path)
    rows = [replace(scan, columns={f"lesion{ending}": scan.columns["lesion_mask"]}) for scan in scans]
    write_manifest(tmp_path / "m.csv", rows)
    prepare(read_manifest(tmp_path / "m.csv"), tmp_path / "store", PreprocessSpec(spacing_mm=(4, 4, 4)), 1)
    with pytest.raises(ConfigError, match=message):
        question(Store.open(tmp_path / "store"))


def test_one_case_with_a_voxel_is_enough(toy_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Store.label_points

    def only_of_the_last(self: Store, session: Any, label: str) -> np.ndarray:
        return original(self, session, label)[: None if session.subject == "05" else 0]

    monkeypatch.setattr(Store, "label_points", only_of_the_last)
    assert len(question(toy_store).cases) == 6


def test_held_out_answers_have_names_of_their_own_however_long_the_ids() -> None:
    keys = [("d", "A" * 240, ""), ("d", "A" * 239 + "B", ""), ("d", "ä" * 200, "1"), ("d", "s", "1")]
    names = [_file_name(key) for key in keys]
    assert names[3] == "d__s__1.npz" and len(set(names)) == 4 and all(len(name.encode()) < 255 for name in names)
