"""The challenges as data: complete, legal, and their presets accepted by the verbs."""

from __future__ import annotations

import pytest

from brainfm.data.manifest import CONTRASTS
from brainfm.errors import ConfigError
from brainfm.submission.challenge import ChallengeTask, challenges, names, read_challenge
from brainfm.verbs.compose import resolve

TASKS = [task for name in names() for task in read_challenge(name).tasks]


def test_both_years_are_there():
    assert names() == ["fomo25", "fomo26"]
    assert [task.name for task in read_challenge("fomo25").tasks] == ["task1", "task2", "task3"]
    assert [task.name for task in read_challenge("fomo26").tasks] == [f"task{n}" for n in range(1, 8)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_a_task_is_complete(task):
    assert all(one.contrast in CONTRASTS for one in task.inputs)
    assert task.kind == "embedding" or (task.folders and task.high > task.low)
    assert (task.blank is not None) == (task.kind in ("classification", "regression"))
    assert task.blank is None or task.low <= task.blank <= task.high
    assert (challenges() / task.challenge / "README.md").is_file()


def test_weights_of_fomo26_are_the_published_ones():
    weights = {task.name: task.weight for task in read_challenge("fomo26").tasks}
    assert weights["task2"] == weights["task4"] == 0.25 and sum(weights.values()) == pytest.approx(1)


def test_flags_are_those_of_the_organisers():
    """FOMO25 calls with --dwi_b1000, FOMO26 with --dwi; of t2s and swi exactly one is passed."""
    old, new = read_challenge("fomo25").task("task2"), read_challenge("fomo26").task("task2")
    assert [one.flag for one in old.inputs] == ["flair", "dwi_b1000", "t2s", "swi"]
    assert [[one.flag for one in call] for call in new.calls()] == [["flair", "dwi", "t2s"], ["flair", "dwi", "swi"]]
    assert [one.file for one in read_challenge("fomo26").task("task3").inputs] == ["t1w"]
    assert read_challenge("fomo26").task("task6").calls()[0][0].flag == "input"


@pytest.mark.parametrize("task", [t for t in TASKS if t.kind != "embedding"], ids=lambda task: task.id)
def test_presets_are_accepted_by_the_verbs(task):
    prepared = resolve("prepare", ["manifest=m.csv", "store=s", *task.overrides("prepare")])
    assert prepared.preprocess.spacing_mm in ("auto", 1, [1, 1, 1])
    tuned = resolve("finetune", ["store=s", "run=r", "backbone_from=b.safetensors", *task.overrides("finetune")])
    assert tuned.task.kind == task.kind and tuned.task.target == task.target


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_a_task_survives_its_json(task, tmp_path):
    (tmp_path / "task.json").write_text(task.to_json())
    assert ChallengeTask.read(tmp_path / "task.json") == task


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="challenge=fomo24: expected one of fomo25, fomo26"):
        read_challenge("fomo24")
    with pytest.raises(ConfigError, match="task=task9: fomo25 has no such task, expected one of task1, task2, task3"):
        read_challenge("fomo25").task("task9")
    with pytest.raises(ConfigError, match="no preset for pretrain"):
        TASKS[0].overrides("pretrain")
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(ConfigError, match="incomplete"):
        ChallengeTask.read(tmp_path / "task.json")
    (tmp_path / "task.json").write_text('{"colour": 1}')
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        ChallengeTask.read(tmp_path / "task.json")
