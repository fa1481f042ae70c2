"""From the organisers' archive to a validated submission, by the commands that a team types."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from brainfm.cli import main
from brainfm.submission.challenge import names, read_challenge, task_of
from tests.submission.conftest import backbone_file
from tests.submission.fomo_data import write_task

TASKS = [task for name in names() for task in read_challenge(name).tasks]
SMALL = ["folds=2", "repeats=1", "trainer.max_steps=3", "baselines=[]", "report=false", "audit=false",
         "preprocess.spacing_mm=6", "task.patch_vox=[16,16,16]"]  # fmt: skip
CASES = "[plain,again,hot,corrupt]"


def submitted(task, folder):
    """Words for `validate`, after convert, finetune and container; of an embedding after embed and container."""
    backbone, out = backbone_file(folder / "backbone.safetensors"), folder / "submission"
    named = [f"challenge={task.challenge}", f"task={task.name}"]
    if task.kind == "embedding":
        weights = [f"backbone={backbone}"]
    else:
        write_task(task, folder / "data" / task.folders[0] / task.folders[0], 10)
        assert main(["convert", *named, f"root={folder / 'data'}", f"out={folder / 'm.csv'}"]) == 0
        tuned = [
            f"experiment={task.id}",
            f"root={folder / 'data'}",
            f"backbone_from={backbone}",
            f"run={folder / 'run'}",
        ]
        assert main(["finetune", *tuned, *SMALL, *(["task.candidates=[mean,features]"] * (task.ending == ".txt"))]) == 0
        weights = [f"bundle={folder / 'run' / 'bundle'}"]
    assert main(["container", *named, *weights, f"out={out}", "build=none"]) == 0
    return [*named, f"command={sys.executable} {out / 'app' / 'predict.py'}", f"out={folder / 'validation'}"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_every_task_becomes_a_submission_that_passes(tmp_path, task, capsys):
    """With the task's own preset, made small; the weights are fine-tuned from a backbone file."""
    words = submitted(task, tmp_path)
    given = (
        [] if task.kind == "embedding" else [f"given={tmp_path / 'data' / task.folders[0] / task.folders[0]}", "most=2"]
    )
    assert main(["validate", *words, f"cases={CASES}", *given]) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "validation" / "validation.json").read_text())
    assert report["passed"] and "hot" in report["seconds"]


def test_one_task_in_short(tmp_path, capsys):
    """And again, as one does after an interruption: nothing is prepared or trained anew."""
    task = task_of("fomo26_task2")
    words = submitted(task, tmp_path)
    data = tmp_path / "data" / "Task_2" / "Task_2"
    capsys.readouterr()
    assert main(["validate", *words, "cases=[plain]", f"given={data}", "most=1"]) == 0
    said = capsys.readouterr().out
    assert "passed: the organisers would accept it" in said and "nsd: " in said and "no forecast" in said
    with (tmp_path / "validation" / "validation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} >= {"plain", "sub_1_ses_1"} and all(row["passed"] == "1" for row in rows)
    tuned = [f"experiment={task.id}", f"root={tmp_path / 'data'}", f"run={tmp_path / 'run'}", *SMALL]
    assert main(["finetune", *tuned, f"backbone_from={tmp_path / 'backbone.safetensors'}"]) == 0
    again = capsys.readouterr().out
    assert "0 sessions prepared, 10 were there" in again
    scored = [f"manifest={tmp_path / 'm.csv'}", "challenge=fomo26", "task=task2"]
    assert main(["evaluate", *scored, f"bundle={tmp_path / 'run' / 'bundle'}", f"out={tmp_path / 's'}"]) == 0
    assert "fomo26_task2: 10 cases, 0 without a usable output" in capsys.readouterr().out
