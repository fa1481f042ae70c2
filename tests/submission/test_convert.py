"""The organisers' folders become manifests, and everything that is missing or strange is said."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from brainfm.cli import main
from brainfm.data.manifest import read_left_out, read_manifest, session_labels
from brainfm.data.store import Store
from brainfm.errors import FileError, ManifestError
from brainfm.imaging import nifti
from brainfm.submission.challenge import names, read_challenge
from brainfm.submission.convert import convert
from brainfm.volume import Volume
from tests.submission.fomo_data import write_task

TASKS = [task for name in names() for task in read_challenge(name).tasks if task.kind != "embedding"]


def task_of(challenge, name):
    return read_challenge(challenge).task(name)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_every_task(task, tmp_path):
    """Under the organisers' own folder names, twice where FOMO26 has them twice."""
    inner = tmp_path / "data" / task.folders[0] / (task.folders[0] if task.name < "task4" else "")
    write_task(task, inner, 4)
    found = convert(task, tmp_path / "data", tmp_path / "manifest.csv")
    assert (found.sessions, found.answered) == (4, 4) and not found.left_out
    assert found.notes == (f"4 sessions, {task.cases} were given out",)
    manifest = read_manifest(found.manifest)
    sessions = manifest.sessions()
    assert list(sessions) == [(task.id, f"sub_{n}", "ses_1") for n in (1, 2, 3, 4)]
    for number, (_, scans) in enumerate(sessions.items()):
        assert {scan.contrast for scan in scans} == {one.contrast for one in task.calls()[number % len(task.calls())]}
        assert all(manifest.resolve(scan.path).is_file() for scan in scans)
        column = scans[0].columns
        if task.kind == "classification":
            assert column[task.target] == str(number % 2)
        elif task.kind == "regression":
            assert float(column["age"]) == 30 + 7.25 * number
        else:
            assert list(session_labels(scans)) == [f"{task.target}_{'labels' if task.high > 1 else 'mask'}"]


def test_prepare_takes_the_manifest(tmp_path):
    task = task_of("fomo26", "task4")
    convert(task, write_task(task, tmp_path / "d", 2), tmp_path / "m.csv")
    words = [f"manifest={tmp_path / 'm.csv'}", f"store={tmp_path / 's'}", "preprocess.spacing_mm=4", "workers=1"]
    assert main(["prepare", *words]) == 0
    session = Store.open(tmp_path / "s").sessions[0]
    assert [label.name for label in session.labels] == ["trigeminal_labels"]


def test_an_age_is_not_cut(tmp_path):
    task = task_of("fomo25", "task3")
    root = write_task(task, tmp_path / "d", 3)
    for number, text in ((1, "61\n"), (2, " 61.90 "), (3, "62.0")):
        (root / "labels" / f"sub_{number}" / "ses_1" / "label.txt").write_text(text)
    rows = read_manifest(convert(task, root, tmp_path / "m.csv").manifest).scans
    assert [scan.columns["age"] for scan in rows[::2]] == ["61", "61.90", "62"]


@pytest.mark.parametrize("text", ["old", "", "300", "-1", "nan", "1 2"])
def test_an_answer_that_is_none_is_said(tmp_path, text):
    task = task_of("fomo26", "task3")
    root = write_task(task, tmp_path / "d", 2)
    (root / "labels" / "sub_2" / "ses_1" / "labels.txt").write_text(text)
    found = convert(task, root, tmp_path / "m.csv")
    assert found.answered == 1 and "sub_2/ses_1: its answer cannot be used" in found.notes
    assert "expected" in found.left_out[0][1] and read_left_out(tmp_path / "m.csv")


def test_missing_files_are_said(tmp_path):
    """The baseline drops such a subject and counts it as done; here the rest of the session stays."""
    task = task_of("fomo26", "task1")
    root = write_task(task, tmp_path / "d", 3)
    scans = root / "preprocessed"
    (scans / "sub_1" / "ses_1" / "adc.nii.gz").unlink()
    (scans / "sub_1" / "ses_1" / "t2s.nii.gz").unlink()
    for path in (scans / "sub_2" / "ses_1").iterdir():
        path.unlink()
    (scans / "sub_3" / "ses_1" / "extra.nii.gz").write_bytes(b"")
    (root / "labels" / "sub_3" / "ses_1" / "label.txt").unlink()
    found = convert(task, root, tmp_path / "m.csv")
    assert found.notes[:4] == (
        "sub_1/ses_1: no adc.nii.gz",
        "sub_1/ses_1: no t2s or swi.nii.gz",
        "sub_3/ses_1: no answer",
        "2 sessions, 21 were given out",
    )
    reasons = {reason for _, reason in found.left_out}
    assert reasons == {"no scan of the task in this session", "no scan of fomo26_task1"}


def test_a_mask_on_another_grid_is_left_out_or_repaired(tmp_path):
    """Of a header that lost its geometry the voxels are right and the place is not."""
    task = task_of("fomo26", "task2")
    root = write_task(task, tmp_path / "d", 2)
    path = root / "labels" / "sub_2" / "ses_1" / "seg.nii.gz"
    volume, _ = nifti.read(path, labels=True)
    nifti.write(path, Volume(volume.voxels, np.eye(4)))
    found = convert(task, root, tmp_path / "m.csv")
    assert found.answered == 1
    assert "sub_2/ses_1: seg.nii.gz lies on another grid than every scan" in found.notes[0]
    repaired = convert(task, root, tmp_path / "m.csv", repair=True)
    assert repaired.answered == 2 and "taken as those of" in " ".join(repaired.notes)
    row = next(scan for scan in read_manifest(tmp_path / "m.csv").scans if scan.subject == "sub_2")
    again, grid = nifti.read(tmp_path / row.columns["meningioma_mask"], labels=True)
    assert np.array_equal(again.voxels, volume.voxels)
    assert grid.same_place(nifti.read_header(tmp_path / row.path).grid)


def test_strange_masks_are_said(tmp_path):
    task = task_of("fomo26", "task4")
    root = write_task(task, tmp_path / "d", 3)
    empty, high, broken = (root / "labels" / f"sub_{n}" / "ses_1" / "seg.nii.gz" for n in (1, 2, 3))
    volume, _ = nifti.read(empty, labels=True)
    nifti.write(empty, Volume(volume.voxels * 0, volume.affine_mm))
    nifti.write(high, Volume(volume.voxels * 3, volume.affine_mm))
    broken.write_bytes(gzip.compress(b"no image"))
    notes = " | ".join(convert(task, root, tmp_path / "m.csv").notes)
    assert "sub_1/ses_1: seg.nii.gz is empty" in notes
    assert "sub_2/ses_1: seg.nii.gz holds the label 6, expected 0 to 2" in notes
    assert "sub_3/ses_1: seg.nii.gz cannot be read" in notes


def test_refusals(tmp_path):
    task = task_of("fomo25", "task2")
    with pytest.raises(ManifestError, match=r"no folder preprocessed in .*fomo-task2"):
        convert(task, tmp_path, tmp_path / "m.csv")
    root = write_task(task, tmp_path / "d", 1)
    (root / "labels" / "sub_1" / "ses_1" / "seg.nii.gz").unlink()
    with pytest.raises(ManifestError, match=r"no answer for any of 1 sessions, expected seg.nii.gz in each"):
        convert(task, root, tmp_path / "m.csv")


def test_nothing_that_is_left_is_said_with_its_reason(tmp_path):
    task = task_of("fomo25", "task3")
    root = write_task(task, tmp_path / "d", 2)
    for number in (1, 2):
        (root / "labels" / f"sub_{number}" / "ses_1" / "label.txt").write_text("old")
    with pytest.raises(ManifestError, match=r"no answer .* \(2 left out, first .*label.txt: holds 'old', expected one"):
        convert(task, root, tmp_path / "m.csv")
    for path in (root / "preprocessed").rglob("*.nii.gz"):
        path.rename(path.with_name("strange.nii.gz"))
    with pytest.raises(ManifestError, match=r"no scan of fomo25_task3 .*left out, first .*strange.nii.gz: no scan of"):
        convert(task, root, tmp_path / "m.csv")


def test_nothing_is_left_behind_where_no_manifest_can_be_written(tmp_path):
    task = task_of("fomo26", "task2")
    root = write_task(task, tmp_path / "d", 1)
    path = root / "labels" / "sub_1" / "ses_1" / "seg.nii.gz"
    nifti.write(path, Volume(nifti.read(path, labels=True)[0].voxels, np.eye(4)))
    with pytest.raises(ManifestError, match=r"ends in .csv or .tsv, found .*nan.xlsx"):
        convert(task, root, tmp_path / "nan.xlsx", repair=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="nothing can be written there"):
        convert(task, root, tmp_path / "file" / "m.csv", repair=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "file"]


def test_labels_may_lie_beside_the_sessions(tmp_path):
    """As the validator of FOMO25 has them."""
    task = task_of("fomo25", "task1")
    root = write_task(task, tmp_path / "d", 2)
    for number in (1, 2):
        inner = root / "labels" / f"sub_{number}" / "ses_1"
        (inner / "label.txt").rename(inner.parent / "label.txt")
    assert convert(task, root, tmp_path / "m.csv").answered == 2
