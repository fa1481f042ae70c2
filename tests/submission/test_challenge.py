"""The challenges as data: complete, legal, and their presets accepted by the verbs."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm.cli import main
from brainfm.data.manifest import CONTRASTS
from brainfm.errors import ConfigError
from brainfm.submission.challenge import ChallengeTask, challenges, names, read_challenge, task_of
from brainfm.verbs.compose import options, recipes, resolve, settings_of

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
def test_a_preset_asks_what_the_task_asks(task):
    settings = resolve("finetune", [f"experiment={task.id}", "root=DATA", "backbone_from=b.safetensors"])
    assert settings.challenge == task.id and settings.task.kind == task.kind and settings.task.target == task.target
    assert settings.run == Path(f"runs/{task.id}") and settings.store == settings.run / "store"
    assert settings.preprocess.spacing_mm in ("auto", 1)
    moved = resolve("finetune", [f"experiment={task.id}", "root=D", "backbone_from=none", "run=elsewhere", "folds=2"])
    assert moved.store == Path("elsewhere/store") and moved.folds == 2


def test_presets_answer_what_broke_submissions():
    """Thick slices and mirroring in task 2, resolution in task 4, few cases in tasks 1 and 5."""
    of = {n: resolve("finetune", [f"experiment=fomo26_task{n}", "root=D", "backbone_from=none"]) for n in range(1, 6)}
    assert of[2].preprocess.spacing_mm == of[4].preprocess.spacing_mm == "auto"
    assert of[2].mirror == () and of[4].mirror == (0,) and of[2].repair and not of[1].repair
    assert of[2].task.loss == "tversky" and of[2].data.foreground_share >= 0.7 and of[4].task.values == (0, 1, 2)
    assert of[1].repeats == of[5].repeats == 5 and of[3].task.unit == "years"


def test_a_recipe_is_an_option_of_the_verb_that_has_its_keys(capsys):
    of = [set(recipes(settings_of(verb))) for verb in ("pretrain", "finetune", "compare")]
    assert set().union(*of) == set(options("experiment")) and sum(map(len, of)) == len(options("experiment"))
    assert main(["finetune", "experiment=ssl3d", "store=s", "backbone_from=none"]) == 2
    assert "experiment=ssl3d: expected one of fomo25_task1" in capsys.readouterr().err
    assert main(["finetune", "root=D", "store=s", "run=r", "backbone_from=none", "task.target=x"]) == 2
    assert "expected experiment=fomo26_task2 or the like" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_a_task_survives_its_json(task, tmp_path):
    (tmp_path / "task.json").write_text(task.to_json())
    assert ChallengeTask.read(tmp_path / "task.json") == task


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="challenge=fomo24: expected one of fomo25, fomo26"):
        read_challenge("fomo24")
    with pytest.raises(ConfigError, match="task=task9: fomo25 has no such task, expected one of task1, task2, task3"):
        read_challenge("fomo25").task("task9")
    assert task_of("fomo26_task4").id == "fomo26_task4"
    with pytest.raises(ConfigError, match="challenge=fomo24_task1: expected fomo25_taskN or fomo26_taskN"):
        task_of("fomo24_task1")
    (tmp_path / "task.json").write_text("{}")
    with pytest.raises(ConfigError, match="incomplete"):
        ChallengeTask.read(tmp_path / "task.json")
    (tmp_path / "task.json").write_text('{"colour": 1}')
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        ChallengeTask.read(tmp_path / "task.json")
