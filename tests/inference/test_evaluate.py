"""Scores on disk: what is counted, what is refused, and the numbers themselves."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm.data.manifest import Scan, write_manifest
from brainfm.errors import ConfigError, ManifestError, ScanError
from brainfm.inference.evaluate import describe, evaluate
from brainfm.inference.predict import predict_manifest
from brainfm.seen import SeenSubjects
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import Bundle
from tests.inference.test_predict_geometry import Threshold, marker_of, write

pytest.importorskip("monai")

ROWS = [("a", "lps"), ("b", "thick_slices"), ("c", "ras"), ("e", "oblique")]


def write_label(path, like, value):
    nib.save(nib.Nifti1Image(marker_of(like)[0].astype(np.uint8) * np.uint8(value), nib.load(like).affine), path)


def make_bundle(tmp_path, values=(0, 1), network=None):
    task = TaskSpec("segmentation", "marker", ("t1",), values, (32, 32, 32))
    spec = PreprocessSpec(spacing_mm=(2.0, 2.0, 2.0))
    return Bundle(tmp_path, task, spec, Provenance("0", "", ""), (network or Threshold(),), "stub", Decisions())


@pytest.fixture
def cohort(tmp_path):
    """Three labelled sessions, the label of one with the value 5, and one session without a label."""
    scans = []
    for subject, grid in ROWS:
        scan = write(tmp_path / f"{subject}.nii.gz", grid)
        write_label(tmp_path / f"{subject}_marker.nii.gz", scan, 5 if subject == "b" else 1)
        label = "" if subject == "e" else f"{subject}_marker.nii.gz"
        scans.append(Scan("d", subject, "1", "t1", f"{subject}.nii.gz", {"marker_mask": label}))
    write_manifest(tmp_path / "manifest.csv", scans)
    return tmp_path / "manifest.csv"


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_bundle_is_scored(cohort, tmp_path):
    found = evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path), device="cpu")
    rows = table(tmp_path / "out" / "cases.csv")
    assert [row["subject"] for row in rows] == ["a", "b", "c"] and len(rows) == len(found.rows)
    for row in rows:
        assert float(row["dice"]) > 0.8 and float(row["surface_dice_1mm"]) > 0.6
        assert float(row["volume_ml_true"]) == pytest.approx(2.14, rel=0.1)  # 4/3 pi 0.8^3 cm^3
        assert row["note"] == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(found.summary))
    assert (summary["cases"], summary["sessions_without_label"], summary["without_prediction"]) == (3, 1, 0)
    metric = summary["metrics"]["dice"]
    assert metric["n"] == 3 and metric["low"] <= metric["mean"] <= metric["high"]
    assert metric["mean"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]), abs=1e-5)
    assert not (tmp_path / "out" / "predictions" / "d__e__1_marker.nii.gz").exists()  # nothing to compare it with
    assert "3 cases of 3 subjects, 1 sessions" in describe(summary)[0]


def test_people_of_the_pre_training_are_counted(cohort, tmp_path):
    bundle = replace(make_bundle(tmp_path), seen=SeenSubjects.of(["d/b", "d/e", "other/a"], seed=0))
    found = evaluate(cohort, tmp_path / "out", bundle=bundle, device="cpu")
    assert found.summary["seen_in_pretraining"] == {"seen": 1, "of": 3}, "e has no label and is not tested"
    said = "note: 1 of the 3 people tested here was in the pre-training of the backbone, as data set and name tell"
    assert said in describe(found.summary)
    silent = evaluate(cohort, tmp_path / "earlier", predictions=tmp_path / "out" / "predictions")
    assert silent.summary["seen_in_pretraining"] == "unknown" and not any("note" in n for n in describe(silent.summary))


def test_masks_made_earlier_score_the_same(cohort, tmp_path):
    bundle = make_bundle(tmp_path)
    predict_manifest(bundle, cohort, tmp_path / "masks", device="cpu")
    earlier = evaluate(cohort, tmp_path / "one", predictions=tmp_path / "masks")
    assert earlier.summary == evaluate(cohort, tmp_path / "two", bundle=bundle, device="cpu").summary


@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_failed_prediction_scores_zero_and_says_so(cohort, tmp_path, kept):
    whole = (tmp_path / "b.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole[: int(kept * len(whole))])
    found = evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path), device="cpu")
    row = table(tmp_path / "out" / "cases.csv")[1]
    assert (row["dice"], row["surface_dice_1mm"], row["volume_ml_predicted"]) == ("0", "0", "")
    assert row["note"] == "no prediction" and found.summary["without_prediction"] == 1
    assert found.summary["metrics"]["dice"]["n"] == 3 and found.summary["metrics"]["volume_ml_predicted"]["n"] == 2


def test_classes_apart(cohort, tmp_path):
    class Two(torch.nn.Module):
        def forward(self, image, present):
            logits = Threshold()(image, present)
            return torch.cat([logits, torch.full_like(logits[:, :1], -100.0)], dim=1)

    text = cohort.read_text().replace("marker_mask", "marker_labels")
    cohort.write_text(text)
    found = evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path, (0, 1, 5), Two()), device="cpu")
    by_subject = {row["subject"]: row for row in found.rows}
    # class 5 is empty on both sides for a and c, and missed in b
    assert by_subject["a"]["dice_5"] == by_subject["a"]["surface_dice_1mm_5"] == 1
    assert by_subject["a"]["dice"] == pytest.approx((by_subject["a"]["dice_1"] + 1) / 2)
    assert by_subject["b"]["dice_5"] == 0 and by_subject["b"]["dice_1"] == 0
    assert by_subject["b"]["volume_ml_true"] == by_subject["b"]["volume_ml_true_5"] > 0
    assert found.summary["metrics"]["dice_5"]["mean"] == pytest.approx(2 / 3)


def test_empty_on_both_sides_is_counted(cohort, tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, image, present):
            return torch.cat([torch.ones_like(image[:, :1]), torch.zeros_like(image[:, :1])], dim=1)

    write_label(tmp_path / "a_marker.nii.gz", tmp_path / "a.nii.gz", 0)
    found = evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path, network=Nothing()), device="cpu")
    assert found.summary["both_empty"] == 1
    assert [(r["dice"], r["surface_dice_1mm"]) for r in found.rows] == [(1, 1), (0, 0), (0, 0)]


def test_a_label_on_another_grid(cohort, tmp_path):
    bundle = make_bundle(tmp_path)
    predict_manifest(bundle, cohort, tmp_path / "masks", device="cpu")
    write_label(tmp_path / "c_marker.nii.gz", write(tmp_path / "other.nii.gz", "anisotropic"), 1)
    with pytest.raises(ScanError, match=r"c_marker\.nii\.gz: lies on another grid than its prediction"):
        evaluate(cohort, tmp_path / "out", predictions=tmp_path / "masks")
    with pytest.raises(ScanError, match=r"c_marker\.nii\.gz: lies on another grid than every scan"):
        evaluate(cohort, tmp_path / "out", bundle=bundle, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_label_that_cannot_be_read(cohort, tmp_path):
    (tmp_path / "b_marker.nii.gz").write_bytes(b"")
    with pytest.raises(ScanError, match=r"b_marker\.nii\.gz"):
        evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path), device="cpu")


def test_no_label_at_all(cohort, tmp_path):
    cohort.write_text(cohort.read_text().replace("marker_mask", "other_mask"))
    with pytest.raises(ManifestError, match="no session with a path in marker_mask or marker_labels"):
        evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path), device="cpu")


def test_refusals(cohort, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="both or neither"):
        evaluate(cohort, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has no predictions\.json"):
        evaluate(cohort, tmp_path / "out", predictions=tmp_path)
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    with pytest.raises(ConfigError, match=r"brainfm-mri\[report\]"):
        evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path))
    assert not (tmp_path / "out").exists()


def test_what_both_masks_leave_empty_is_counted_as_asked(cohort, tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, image, present):
            return torch.cat([torch.ones_like(image[:, :1]), torch.zeros_like(image[:, :1])], dim=1)

    write_label(tmp_path / "a_marker.nii.gz", tmp_path / "a.nii.gz", 0)
    bundle = make_bundle(tmp_path, network=Nothing())
    one = evaluate(cohort, tmp_path / "one", bundle=bundle, device="cpu")
    means = {name: one.summary["metrics"][name]["mean"] for name in ("dice", "surface_dice_1mm")}
    assert means == {"dice": pytest.approx(1 / 3), "surface_dice_1mm": pytest.approx(1 / 3)}, "both agree by default"
    assert "both masks empty in 1 cases; both masks empty: dice 1, surface dice 1" in "\n".join(describe(one.summary))
    fomo = evaluate(cohort, tmp_path / "fomo", bundle=bundle, device="cpu", empty="fomo")
    assert fomo.summary["metrics"]["dice"]["mean"] == pytest.approx(1 / 3)
    assert fomo.summary["metrics"]["surface_dice_1mm"]["mean"] == 0
    assert "dice 1, surface dice 0 (as FOMO26 counts)" in "\n".join(describe(fomo.summary))
    skip = evaluate(cohort, tmp_path / "skip", predictions=tmp_path / "fomo" / "predictions", empty="skip")
    assert skip.summary["metrics"]["dice"]["mean"] == skip.summary["metrics"]["surface_dice_1mm"]["mean"] == 0
    assert skip.summary["metrics"]["dice"]["n"] == 2 and skip.summary["both_empty"] == 1
    assert table(tmp_path / "skip" / "cases.csv")[0]["dice"] == ""
    assert "left out of dice and surface dice" in "\n".join(describe(skip.summary))
    with pytest.raises(ConfigError, match="empty=zero: expected one, fomo, skip"):
        evaluate(cohort, tmp_path / "out", bundle=bundle, empty="zero")


def test_all_empty_and_skipped_leaves_no_number(cohort, tmp_path):
    for subject in "abc":
        write_label(tmp_path / f"{subject}_marker.nii.gz", tmp_path / f"{subject}.nii.gz", 0)

    class Nothing(torch.nn.Module):
        def forward(self, image, present):
            return torch.cat([torch.ones_like(image[:, :1]), torch.zeros_like(image[:, :1])], dim=1)

    bundle = make_bundle(tmp_path, network=Nothing())
    found = evaluate(cohort, tmp_path / "out", bundle=bundle, device="cpu", empty="skip")
    assert found.summary["metrics"]["dice"] is None
    assert "dice: undefined, no case counts" in describe(found.summary)


def test_a_label_below_zero_is_no_truth(cohort, tmp_path):
    image = nib.load(tmp_path / "a_marker.nii.gz")
    voxels = np.asarray(image.dataobj).astype(np.int16) - 1
    nib.save(nib.Nifti1Image(voxels, image.affine), tmp_path / "a_marker.nii.gz")
    with pytest.raises(ScanError, match=r"a_marker\.nii\.gz: labels from -1 to 0, expected whole numbers from 0 on"):
        evaluate(cohort, tmp_path / "out", bundle=make_bundle(tmp_path), device="cpu")
