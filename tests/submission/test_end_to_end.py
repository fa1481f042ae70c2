"""From the organisers' archive to a validated submission: convert, prepare, fine-tune, stage, validate."""

from __future__ import annotations

import sys

import pytest

from brainfm.cli import main
from brainfm.submission.cases import made
from brainfm.submission.challenge import names, read_challenge
from brainfm.submission.container import stage
from brainfm.submission.convert import convert
from brainfm.submission.validate import Launcher, describe, validate
from tests.submission.conftest import backbone_file
from tests.submission.fomo_data import write_task

TASKS = [task for name in names() for task in read_challenge(name).tasks if task.kind != "embedding"]
SMALL = {
    "classification": ["task.patch_vox=[16,16,16]", "task.candidates=[mean,features]"],
    "regression": ["task.patch_vox=[16,16,16]", "task.candidates=[mean,features]"],
    "segmentation": ["task.patch_vox=[16,16,16]"],
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_data_become_a_submission_that_passes(tmp_path, task):
    """With the task's own preset, made small; the weights are fine-tuned from a backbone file."""
    root = write_task(task, tmp_path / "data" / task.folders[0] / task.folders[0], 10)
    manifest = convert(task, tmp_path / "data", tmp_path / "manifest.csv").manifest
    store, run, backbone = tmp_path / "store", tmp_path / "run", backbone_file(tmp_path / "backbone.safetensors")
    assert root.is_dir()
    prepared = [f"manifest={manifest}", f"store={store}", "workers=1", "preprocess.spacing_mm=6"]
    assert main(["prepare", *prepared]) == 0
    small = ["folds=2", "trainer.max_steps=3", "baselines=[]", "report=false", *SMALL[task.kind]]
    preset = [word for word in task.overrides("finetune") if not word.startswith(("folds=", "repeats="))]
    words = [f"store={store}", f"run={run}", f"backbone_from={backbone}", *preset, *small]
    assert main(["finetune", *words]) == 0
    app = stage(task, run / "bundle", tmp_path / "submission" / "app")
    launcher = Launcher("command", f"{sys.executable} {app / 'predict.py'}")
    verdict = validate(task, launcher, made(task, tmp_path / "cases", ("plain", "again", "corrupt")), tmp_path / "out")
    assert verdict.passed, "\n".join(describe(verdict))
