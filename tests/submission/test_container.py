"""What is staged runs alone, holds nothing that inference does not need, and fits its task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from brainfm.errors import BundleError, ConfigError
from brainfm.imaging import nifti
from brainfm.inference.predict import predict
from brainfm.submission import container as module
from brainfm.submission.challenge import Input, read_challenge
from brainfm.submission.container import container, describe, reached, requirements, stage
from brainfm.submission.predict import AppSettings, main
from brainfm.volume import Volume
from tests.submission.conftest import backbone_file, bundle_for
from tests.submission.test_predict import answered, scans, words

HEAVY = {
    "lightning", "pytorch_lightning", "hydra", "omegaconf", "yaml", "wandb", "tensorboard", "matplotlib", "sklearn",
    "monai", "rich", "SimpleITK", "pandas",
}  # fmt: skip


def task_of(name, challenge="fomo26"):
    return read_challenge(challenge).task(name)


@pytest.mark.parametrize("name", ["task1", "task2", "task6"])
def test_a_staged_submission_runs_alone(app_of, tmp_path, name):
    """A fresh process that sees neither this checkout nor a home; its modules are those of the folder."""
    task, app = task_of(name), app_of("fomo26", name)
    output = tmp_path / f"answer{task.ending}"
    tell = (
        "import runpy, sys, json; sys.argv[0] = sys.argv[1]; del sys.argv[1]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "import brainfm; print(json.dumps([code, brainfm.__file__, sorted({m.split('.')[0] for m in sys.modules})]))"
    )
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(app)}
    ran = subprocess.run(
        [sys.executable, "-c", tell, str(app / "predict.py"), *words(task, scans(tmp_path, task), output)],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert output.is_file(), ran.stderr
    code, where, loaded = json.loads(ran.stdout.splitlines()[-1])
    assert code == 0 and where == str(app / "brainfm" / "__init__.py")
    assert not HEAVY & set(loaded), HEAVY & set(loaded)
    assert not (app / "brainfm" / "__pycache__").exists(), "nothing is written into the image"


@pytest.mark.parametrize("name", ["task1", "task3", "task5"])
def test_what_is_measured_of_a_head_is_measured_in_a_container(app_of, tmp_path, name):
    """Most bundles of few cases ship that candidate: with every scan, with some, and where nothing is to be seen."""
    task = task_of(name)
    bundle, output = bundle_for(task, tmp_path / "bundle", measured=True), tmp_path / "answer.txt"
    app = stage(task, bundle, tmp_path / "app")
    files = scans(tmp_path, task)
    for number, some in enumerate((files, dict(list(files.items())[:1]))):
        env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
        called = [sys.executable, str(app / "predict.py"), *words(task, some, output)]
        ran = subprocess.run(called, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        predict(bundle, some, tmp_path / f"library{number}.txt", device="cpu")
        assert output.read_bytes() == (tmp_path / f"library{number}.txt").read_bytes()
        assert np.isfinite(float(output.read_text())) and float(output.read_text()) not in (task.low, task.high)
    plain = answered(app_of("fomo26", name), task, files, tmp_path, "features")
    assert plain.read_text() != (tmp_path / "library0.txt").read_text(), "another part of the answer was asked"
    volume, _ = nifti.read(next(iter(files.values())))
    empty = tmp_path / "empty.nii.gz"
    nifti.write(empty, Volume(np.zeros_like(volume.voxels), volume.affine_mm))
    assert main(app, words(task, dict.fromkeys(files, empty), output)) == 0
    assert float(output.read_text()) == task.blank


def test_only_what_prediction_reaches_is_staged(app_of):
    names = {str(path.relative_to(module._PACKAGE)) for path in reached("brainfm.submission.predict")}
    assert {"tasks/segmentation/network.py", "tasks/whole_head/network.py", "nets/unet.py", "nets/resenc.py"} <= names
    assert not any(name.startswith(("training", "objectives", "cli", "demo")) for name in names)
    app = app_of("fomo26", "task2")
    assert {str(p.relative_to(app / "brainfm")) for p in (app / "brainfm").rglob("*.py")} == names
    assert sorted(p.name for p in app.iterdir()) == ["brainfm", "bundle", "predict.py", "settings.json", "task.json"]


def test_recipes_are_pinned_and_for_amd64(tmp_path):
    task = task_of("task2")
    made = container(task, bundle_for(task, tmp_path / "b"), tmp_path / "out", torch="cu126", build="none")
    definition, dockerfile = ((made.folder / name).read_text() for name in ("Apptainer.def", "Dockerfile"))
    pinned = (made.folder / "requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in pinned] == ["torch", "numpy", "scipy", "nibabel", "safetensors"]
    assert pinned[0].endswith("+cu126") and all("==" in line for line in pinned)
    for text in (definition, dockerfile):
        assert "whl/cu126" in text and "amd64" in text and "mkdir -p /input /output" in text
        assert f"python:{sys.version_info.major}.{sys.version_info.minor}-slim-bookworm" in text
        assert "{" not in text.replace("${", "")
    assert "app /app" in definition and "COPY app /app" in dockerfile
    assert "--flair FILE --dwi FILE --t2s FILE --swi FILE --output FILE.nii.gz" in definition
    assert made.image == "" and "no image was asked for" in describe(made)[-1]
    assert {layer.name.split(" ")[0] for layer in made.layers} >= {"brainfm,", "weights", "torch", "numpy"}
    assert "blosc2" in requirements(task_of("task6"))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("", "neither apptainer nor docker is installed"),
        ("docker", "its daemon does not answer"),
    ],
)
def test_without_an_engine_it_says_so(tmp_path, monkeypatch, found, said):
    monkeypatch.setattr(module.shutil, "which", lambda name: name if name == found else None)
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "", ""))
    task = task_of("task3")
    assert said in container(task, bundle_for(task, tmp_path / "b"), tmp_path / "out").said


def test_an_engine_is_called_and_its_failure_is_a_sentence(tmp_path, monkeypatch):
    called = []

    def run(words, **how):
        called.append(words)
        return subprocess.CompletedProcess(words, int(len(called) > 1), "", "boom\nno space left")

    monkeypatch.setattr(module.shutil, "which", lambda name: name if name == "apptainer" else None)
    monkeypatch.setattr(module.subprocess, "run", run)
    task = task_of("task3")
    weights = bundle_for(task, tmp_path / "b")
    made = container(task, weights, tmp_path / "out")
    assert made.image.endswith("fomo26_task3.sif") and called[0][:2] == ["apptainer", "build"]
    assert "--arch" in called[0]
    with pytest.raises(ConfigError, match=r"apptainer build .* ended with 1: no space left"):
        container(task, weights, tmp_path / "out")


def test_weights_that_answer_another_question_are_refused(tmp_path):
    mask, age, probe = task_of("task2"), task_of("task3"), task_of("task6")
    bundle = bundle_for(mask, tmp_path / "mask")
    with pytest.raises(ConfigError, match="does not fit fomo26_task3: it is a segmentation, expected a regression"):
        stage(age, bundle, tmp_path / "app")
    with pytest.raises(ConfigError, match="it marks 0, 1, 2, expected values from 0 to 1"):
        stage(mask, bundle_for(replace(mask, high=2.0), tmp_path / "three"), tmp_path / "app")
    with pytest.raises(ConfigError, match="it was trained on t1, expected one of t2"):
        other = replace(task_of("task4"), inputs=(Input("t1", "t1", "t1"),))
        stage(task_of("task4"), bundle_for(other, tmp_path / "other"), tmp_path / "app")
    with pytest.raises(BundleError, match="task3 needs the bundle of a regression"):
        stage(age, backbone_file(tmp_path / "b.safetensors"), tmp_path / "app")
    with pytest.raises(ConfigError, match=r"shape \(2, 3\), expected \(2, 64\)"):
        stage(probe, tmp_path / "b.safetensors", tmp_path / "app", scale=np.ones((2, 3)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="something else than a staged submission"):
        stage(mask, bundle, tmp_path / "full")
    for key in ("torch", "build"):
        with pytest.raises(ConfigError, match=f"{key}=podman: expected one of"):
            container(mask, bundle, tmp_path / "out", **{key: "podman"})


def test_an_embedding_is_scaled(tmp_path):
    task = task_of("task6")
    weights, file = backbone_file(tmp_path / "b.safetensors"), scans(tmp_path, task)["unknown"]
    answers = []
    for name, scale in (("plain", None), ("scaled", np.stack([np.full(64, 0.5), np.full(64, 4.0)]))):
        app = stage(task, weights, tmp_path / name, scale=scale)
        assert main(app, ["--input", str(file), "--output", str(tmp_path / f"{name}.npy")]) == 0
        answers.append(np.load(tmp_path / f"{name}.npy"))
    assert answers[1] == pytest.approx((answers[0] - 0.5) * 4, abs=1e-5) and answers[1].dtype == np.float32


def test_settings_survive_and_unknown_ones_are_refused(tmp_path):
    settings = AppSettings(device="cpu", parts=("backbone",))
    (tmp_path / "s.json").write_text(settings.to_json())
    assert AppSettings.read(tmp_path / "s.json") == settings
    (tmp_path / "s.json").write_text('{"colour": 1}')
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        AppSettings.read(tmp_path / "s.json")


def test_no_package_of_the_machine_is_drawn_in_that_opens_sockets(app_of, tmp_path):
    """nibabel imports pydicom where there is one, which imports requests, which binds an IPv6 socket."""
    app = app_of("fomo26", "task5")
    (tmp_path / "pydicom.py").write_text("raise SystemExit('pydicom was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, app / "predict.py"], env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and "required: --output" in ran.stderr
