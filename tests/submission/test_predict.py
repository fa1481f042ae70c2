"""The container's script: the library's answers, the organiser's flags, and what happens to strange scans."""

from __future__ import annotations

import gzip
import math

import nibabel as nib
import numpy as np
import pytest

from brainfm.errors import BundleError
from brainfm.imaging import nifti
from brainfm.inference.predict import predict
from brainfm.probing.features import embed
from brainfm.submission.challenge import read_challenge
from brainfm.submission.predict import BACKBONE, in_range, main
from brainfm.volume import Volume
from tests.submission.fomo_data import head

TASKS = [read_challenge("fomo26").task(f"task{n}") for n in range(1, 7)]


def scans(folder, task, axes="RAS", shape=(32, 36, 28), spacing=(4.0,) * 3, call=0):
    """Contrast -> file of one session."""
    files = {}
    for order, one in enumerate(task.calls()[call]):
        volume, _ = head(order, shape, spacing, lesion=60)
        files[one.contrast] = folder / f"{one.file}_{axes}.nii.gz"
        nifti.write(files[one.contrast], volume, axes)
    return files


def words(task, files, output):
    flags = {one.contrast: one.flag for one in task.inputs}
    return [word for contrast, file in files.items() for word in (f"--{flags[contrast]}", str(file))] + [
        "--output", str(output),
    ]  # fmt: skip


def answered(app, task, files, tmp_path, name="answer"):
    output = tmp_path / f"{name}{task.ending}"
    assert main(app, words(task, files, output)) == 0
    return output


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_the_container_answers_as_the_library(app_of, task, tmp_path):
    app, files = app_of("fomo26", task.name), scans(tmp_path, task)
    output = answered(app, task, files, tmp_path)
    if task.kind == "embedding":
        found = np.load(output, allow_pickle=False)
        assert found.ndim == 1 and found.dtype == np.float32
        assert np.array_equal(found, embed(app / BACKBONE, files["unknown"], device="cpu").matrix[0])
        return
    beside = tmp_path / f"library{task.ending}"
    predict(app / "bundle", files, beside)
    assert output.read_bytes() == beside.read_bytes()


def test_text_is_one_finite_token(app_of, tmp_path):
    for name in ("task1", "task3", "task5"):
        task = read_challenge("fomo26").task(name)
        text = answered(app_of("fomo26", name), task, scans(tmp_path, task), tmp_path).read_text()
        assert len(text.split()) == 1 and task.low <= float(text) <= task.high


@pytest.mark.parametrize("axes", ["LPS", "PIR", "SAL"])
def test_any_orientation_comes_back_on_its_own_grid(app_of, tmp_path, axes):
    """Scans of the test set of task 4 come as the scanner left them."""
    task = read_challenge("fomo26").task("task4")
    app = app_of("fomo26", "task4")
    straight = nib.load(answered(app, task, scans(tmp_path, task), tmp_path, "a"))
    files = scans(tmp_path, task, axes)
    turned, source = nib.load(answered(app, task, files, tmp_path, "b")), nib.load(files["t2"])
    assert turned.shape == source.shape and np.array_equal(turned.affine, source.affine)
    assert turned.get_data_dtype() == np.uint8 and set(np.unique(turned.dataobj)) <= {0, 1, 2}
    same = np.asarray(nib.as_closest_canonical(turned).dataobj) == np.asarray(straight.dataobj)
    assert same.all() and np.asarray(straight.dataobj).any()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
@pytest.mark.parametrize(
    ("shape", "spacing"), [((32, 32, 16), (1, 1, 1)), ((48, 48, 9), (3.0, 3.0, 14.0))], ids=["small", "thick"]
)
def test_small_and_thick_volumes(app_of, tmp_path, task, shape, spacing):
    output = answered(app_of("fomo26", task.name), task, scans(tmp_path, task, shape=shape, spacing=spacing), tmp_path)
    if task.ending == ".nii.gz":
        assert nib.load(output).shape == shape


def test_either_alternative_and_none_of_them(app_of, tmp_path):
    task = read_challenge("fomo26").task("task1")
    app = app_of("fomo26", "task1")
    for call in (0, 1):
        assert answered(app, task, scans(tmp_path, task, call=call), tmp_path, str(call)).is_file()
    few = {k: v for k, v in scans(tmp_path, task).items() if k not in ("t2s", "swi")}
    assert math.isfinite(float(answered(app, task, few, tmp_path, "few").read_text()))


def test_names_of_the_fine_tuning_data_are_understood(app_of, tmp_path):
    task = read_challenge("fomo26").task("task4")
    file = scans(tmp_path, task)["t2"]
    assert main(app_of("fomo26", "task4"), ["--t2w", str(file), "--output", str(tmp_path / "m.nii.gz")]) == 0


def test_a_folder_is_a_session_in_a_hospital(app_of, tmp_path, capsys):
    """Scans are told apart by what their names say; what the task does not read is passed over."""
    task = read_challenge("fomo26").task("task2")
    app, files = app_of("fomo26", "task2"), scans(tmp_path, task)
    straight = answered(app, task, {k: files[k] for k in ("flair", "dwi")}, tmp_path, "straight").read_bytes()
    visit = tmp_path / "visit" / "anat"
    visit.mkdir(parents=True)
    for name, contrast in (("p7_FLAIR.nii.gz", "flair"), ("p7_dwi_b1000.nii.gz", "dwi"), ("p7_T1w.nii.gz", "t2s")):
        (visit / name).write_bytes(files[contrast].read_bytes())
    output = tmp_path / "session.nii.gz"
    assert main(app, ["--session", str(visit.parent), "--output", str(output)]) == 0
    assert output.read_bytes() == straight
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    said = refused(app, ["--session", str(tmp_path / "none"), "--output", str(output)], capsys)
    assert "no scan whose name says flair, dwi, t2s, swi" in said


def blank(path, like):
    volume, _ = nifti.read(like)
    nifti.write(path, Volume(np.zeros_like(volume.voxels), volume.affine_mm))
    return path


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_all_background_is_answered(app_of, tmp_path, task, capsys):
    files = scans(tmp_path, task)
    files = {contrast: blank(tmp_path / f"blank_{contrast}.nii.gz", file) for contrast, file in files.items()}
    output = answered(app_of("fomo26", task.name), task, files, tmp_path)
    assert "nothing is to be seen" in capsys.readouterr().err
    if task.kind == "embedding":
        assert np.isfinite(np.load(output)).all()
    elif task.kind == "segmentation":
        assert not np.asarray(nib.load(output).dataobj).any() and nib.load(output).shape == (32, 36, 28)
    else:
        assert float(output.read_text()) == task.blank


def test_one_blank_contrast_counts_as_not_given(app_of, tmp_path, capsys):
    task = read_challenge("fomo26").task("task2")
    app, files = app_of("fomo26", "task2"), scans(tmp_path, task)
    without = answered(app, task, {k: v for k, v in files.items() if k != "dwi"}, tmp_path, "without")
    files["dwi"] = blank(tmp_path / "blank.nii.gz", files["dwi"])
    assert answered(app, task, files, tmp_path, "partly").read_bytes() == without.read_bytes()
    assert "nothing is to be seen in dwi" in capsys.readouterr().err


def test_one_file_for_two_contrasts_counts_as_the_first(app_of, tmp_path, capsys):
    task = read_challenge("fomo26").task("task2")
    app, files = app_of("fomo26", "task2"), scans(tmp_path, task)
    without = answered(app, task, {k: v for k, v in files.items() if k != "dwi"}, tmp_path, "without")
    files["dwi"] = files["flair"]
    assert answered(app, task, files, tmp_path, "twice").read_bytes() == without.read_bytes()
    assert "note: dwi is the file of flair again, and counts as not given" in capsys.readouterr().err


def test_the_mask_that_must_not_be_empty_is_not(app_of, tmp_path):
    """FOMO25's validator expects the values 0 and 1 to be there."""
    task = read_challenge("fomo25").task("task2")
    files = scans(tmp_path, task)
    files = {contrast: blank(tmp_path / f"blank_{contrast}.nii.gz", file) for contrast, file in files.items()}
    output = answered(app_of("fomo25", "task2"), task, files, tmp_path)
    assert np.unique(nib.load(output).dataobj).tolist() == [0, 1]


def refused(app, arguments, capsys):
    code = main(app, arguments)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and said[0].startswith("predict.py: ")
    return said[0]


@pytest.mark.parametrize("damage", ["truncated", "text", "nothing"])
@pytest.mark.parametrize("name", ["task1", "task2", "task6"])
def test_a_corrupt_file_is_refused_with_one_sentence(app_of, tmp_path, name, damage, capsys):
    task = read_challenge("fomo26").task(name)
    files = scans(tmp_path, task)
    broken = next(iter(files.values()))
    content = {"truncated": broken.read_bytes()[:3000], "text": gzip.compress(b"not an image"), "nothing": b""}
    broken.write_bytes(content[damage])
    output = tmp_path / f"answer{task.ending}"
    assert str(broken) in refused(app_of("fomo26", name), words(task, files, output), capsys)
    assert not output.exists()


def test_refusals(app_of, tmp_path, capsys):
    app = app_of("fomo26", "task3")
    file = scans(tmp_path, read_challenge("fomo26").task("task3"))["t1"]
    assert "--output" in refused(app, ["--t1", str(file)], capsys)
    assert "no scan was given, expected one or more of --t1" in refused(app, ["--output", "a.txt"], capsys)
    assert "unrecognized arguments: --t3" in refused(app, ["--t1", "x", "--t3", "y", "--output", "a.txt"], capsys)
    assert "ends in .txt" in refused(app, ["--t1", str(file), "--output", str(tmp_path / "a.nii.gz")], capsys)
    assert "no such file" in refused(app, ["--t1", "nowhere.nii.gz", "--output", str(tmp_path / "a.txt")], capsys)
    assert "task.json: cannot be read" in refused(tmp_path, ["--t1", str(file), "--output", "a.txt"], capsys)


def test_values_stay_in_range():
    """Within the range the library's digits stay as they are."""
    task = read_challenge("fomo26").task("task3")
    assert in_range("41.23456789\n", task) == "41.23456789\n"
    assert in_range("-3.5\n", task) == "0.0\n" and in_range("130\n", task) == "120.0\n"
    for text, said in (("nan", "a finite number"), ("0.1\n0.2\n", "one number")):
        with pytest.raises(BundleError, match=said):
            in_range(text, task)
