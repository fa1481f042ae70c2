"""A challenge case gets an answer even where training would refuse the scan; what was done is said, on stderr."""

from __future__ import annotations

import math

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import ScanError
from brainfm.imaging import nifti
from brainfm.imaging.preprocess import prepare_session
from brainfm.specs import PreprocessSpec
from brainfm.submission.challenge import task_of
from brainfm.submission.mend import mended
from brainfm.volume import Volume
from tests.submission.test_predict import answered, blank, scans

SPEC = PreprocessSpec(spacing_mm=(6.0, 6.0, 6.0))


def changed(path, how):
    """A scan with some of its voxels replaced."""
    volume, _ = nifti.read(path)
    voxels = volume.voxels.astype(np.float64)
    how(voxels, np.random.default_rng(0).random(voxels.shape), voxels != voxels[0, 0, 0])
    data = voxels.astype(np.float32) if np.abs(voxels[np.isfinite(voxels)]).max() < 1e38 else voxels
    nib.save(nib.Nifti1Image(data, volume.affine_mm), path)
    return path


def hot(voxels, dice, head):
    voxels[(dice < 0.02) & head] = 1e9


def hotter(voxels, dice, head):
    voxels[(dice < 0.03) & head] = -1e300


def many_hot(voxels, dice, head):
    voxels[(dice < 0.2) & head] = 1e12


def lost(voxels, dice, head):
    voxels[dice < 0.1] = np.nan


HARM = {"hot": hot, "hotter": hotter, "many_hot": many_hot, "lost": lost}


@pytest.mark.parametrize("harm", HARM)
def test_a_mended_scan_is_the_scan_but_for_what_was_wrong(tmp_path, harm):
    file = next(iter(scans(tmp_path, task_of("fomo26_task3")).values()))
    before = nifti.read(file)[0].voxels.copy()
    assert mended(file, tmp_path / "copy.nii") == "" and not (tmp_path / "copy.nii").exists(), "nothing to mend"
    changed(file, HARM[harm])
    with pytest.raises(ScanError, match=r"outliers|NaN|nearly all"):
        prepare_session({"t1": file}, {}, SPEC)
    said = mended(file, tmp_path / "copy.nii")
    assert ("filled in" if harm == "lost" else "outliers clipped") in said
    after = nifti.read(tmp_path / "copy.nii")
    kept = np.abs(nib.load(file).get_fdata()) < 1e6
    assert np.corrcoef(after[0].voxels[kept], before[kept])[0, 1] > 0.999
    assert after[1].same_place(nifti.read_header(file).grid)
    assert np.isfinite(prepare_session({"t1": tmp_path / "copy.nii"}, {}, SPEC).scans["t1"]).all()


@pytest.mark.parametrize("harm", ["hot", "lost"])
@pytest.mark.parametrize("name", ["fomo26_task1", "fomo26_task2", "fomo26_task3", "fomo26_task6"])
def test_every_kind_of_task_answers_such_a_case(app_of, tmp_path, name, harm, capsys):
    task = task_of(name)
    app, files = app_of("fomo26", task.name), scans(tmp_path, task)
    straight = answered(app, task, files, tmp_path, "straight")
    changed(next(iter(files.values())), HARM[harm])
    found = answered(app, task, files, tmp_path, "found")
    assert ("outliers clipped" if harm == "hot" else "filled in") in capsys.readouterr().err
    if task.kind == "segmentation":
        a, b = (np.asarray(nib.load(path).dataobj) for path in (straight, found))
        assert (a == b).mean() > 0.9 and np.array_equal(nib.load(found).affine, nib.load(straight).affine)
    elif task.kind == "embedding":
        assert np.isfinite(np.load(found)).all()
    else:
        assert math.isfinite(float(found.read_text()))


def test_a_blank_first_scan_costs_the_others_nothing(app_of, tmp_path, capsys):
    """The mask still lies on the grid of the first."""
    task = task_of("fomo26_task2")
    app, files = app_of("fomo26", "task2"), scans(tmp_path, task)
    files["flair"] = blank(tmp_path / "blank.nii.gz", files["flair"])
    found = nib.load(answered(app, task, files, tmp_path))
    assert "nothing is to be seen in flair" in capsys.readouterr().err
    assert found.shape == nib.load(files["flair"]).shape and np.asarray(found.dataobj).any()


def test_scans_that_do_not_fit_together_are_answered_from_the_first(app_of, tmp_path, capsys):
    task = task_of("fomo26_task2")
    app, files = app_of("fomo26", "task2"), scans(tmp_path, task)
    alone = answered(app, task, {"flair": files["flair"]}, tmp_path, "alone").read_bytes()
    volume, _ = nifti.read(files["dwi"])
    away = volume.affine_mm.copy()
    away[:3, 3] += 5000
    nifti.write(files["dwi"], Volume(volume.voxels, away))
    assert answered(app, task, files, tmp_path).read_bytes() == alone
    said = capsys.readouterr().err
    assert "lies wholly outside" in said and "answered from flair alone" in said


def test_nearly_one_value_everywhere_is_answered_as_a_blank(app_of, tmp_path, capsys):
    task = task_of("fomo26_task5")
    file = next(iter(scans(tmp_path, task).values()))
    volume, _ = nifti.read(file)
    voxels = np.zeros(volume.shape, np.int16)
    voxels[3:20, 3:20, 3:20] = 7
    voxels[5, 5, 5] = 8
    nifti.write(file, Volume(voxels, volume.affine_mm))
    text = answered(app_of("fomo26", "task5"), task, {"t1": file}, tmp_path).read_text()
    assert float(text) == task.blank and "nearly all of the foreground" in capsys.readouterr().err
