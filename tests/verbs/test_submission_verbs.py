"""convert, container, validate and evaluate challenge=: exit codes, what is printed, and what is refused."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest

from brainfm.cli import main
from brainfm.probing.features import Embedding, write
from brainfm.submission.challenge import task_of
from tests.submission.conftest import backbone_file, bundle_for
from tests.submission.fomo_data import write_task

TASK5 = ["challenge=fomo26", "task=task5"]


def fails(capsys, *words):
    assert main(list(words)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("brainfm: ") and len(said.splitlines()) == 1
    return said


def answering(folder, body):
    """``command=`` of a submission that answers so."""
    folder.mkdir(exist_ok=True)
    (folder / "predict.py").write_text("import sys\noutput = sys.argv[sys.argv.index('--output') + 1]\n" + body)
    return f"command={sys.executable} {folder / 'predict.py'}"


def test_convert_says_what_is_missing(tmp_path, capsys):
    task = task_of("fomo26_task1")
    root = write_task(task, tmp_path / "Task_1", 3)
    (root / "preprocessed" / "sub_2" / "ses_1" / "adc.nii.gz").unlink()
    (root / "labels" / "sub_3" / "ses_1" / "label.txt").write_text("perhaps")
    words = ["challenge=fomo26", "task=task1", f"root={tmp_path}", f"out={tmp_path / 'm.csv'}"]
    assert main(["convert", *words]) == 0
    said = capsys.readouterr().out
    assert "note: sub_2/ses_1: no adc.nii.gz" in said and "holds 'perhaps', expected one number" in said
    assert said.splitlines()[-1].endswith("m.csv: 3 sessions of fomo26_task1, 2 with an answer")
    assert "no folder preprocessed" in fails(capsys, "convert", *words[:2], f"root={tmp_path / 'x'}", words[3])
    assert "expected one of fomo25, fomo26" in fails(capsys, "convert", "challenge=fomo24", *words[1:])


def test_validate_tells_with_its_exit_code(tmp_path, capsys):
    good = answering(tmp_path / "good", "open(output, 'w').write('0.25')\n")
    assert main(["validate", *TASK5, good, f"out={tmp_path / 'v'}", "cases=[plain]"]) == 0
    assert "passed" in capsys.readouterr().out.splitlines()[-1]
    bad = answering(tmp_path / "bad", "open(output, 'w').write('1.2')\n")
    assert main(["validate", *TASK5, bad, f"out={tmp_path / 'w'}", "cases=[plain]"]) == 1
    assert "1.2, expected a probability from 0 to 1" in capsys.readouterr().out
    with (tmp_path / "w" / "validation.csv").open() as file:
        failed = [row for row in csv.DictReader(file) if row["passed"] == "0"]
    assert [row["check"] for row in failed] == ["range"] and float(failed[0]["case_seconds"]) > 0


def test_what_only_the_stricter_checks_see_decides_where_one_wants(tmp_path, capsys):
    careless = answering(tmp_path / "a", "open(output, 'w').write('0.5'); open(output + '.log', 'w')\n")
    words = ["validate", *TASK5, careless, f"out={tmp_path / 'v'}", "cases=[plain]"]
    assert main(words) == 1 and main([*words, "strict=false"]) == 0


def test_validate_refuses_what_it_cannot_try(tmp_path, capsys):
    out = f"out={tmp_path}"
    assert "expected one of command=, sif= and image=" in fails(capsys, "validate", *TASK5, out)
    assert "expected one of command=" in fails(capsys, "validate", *TASK5, out, "command=x", "image=y")
    assert "nowhere is no program here" in fails(capsys, "validate", *TASK5, out, "command=nowhere")
    assert "cases=huge" in fails(capsys, "validate", *TASK5, out, f"command={sys.executable}", "cases=[huge]")
    assert "expected some, or given=" in fails(capsys, "validate", *TASK5, out, "command=x", "cases=[]")
    assert "expected 1 or more" in fails(capsys, "validate", *TASK5, out, "command=x", "most=0")


def test_validate_refuses_before_it_makes_anything(tmp_path, capsys, monkeypatch):
    out = tmp_path / "v"
    words = ["validate", *TASK5, f"out={out}", "cases=[plain]"]
    command = f"command={sys.executable}"
    assert "cannot be split into words (no closing quotation)" in fails(capsys, *words, "command=python 'unbalanced")
    for limit in ("nan", "-3", "0", "inf"):
        assert "expected seconds above 0" in fails(capsys, *words, command, f"limit_s={limit}")
    assert "nowhere is no program" in fails(capsys, *words, "command=nowhere")
    monkeypatch.setattr("brainfm.submission.validate.shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("brainfm.submission.sandbox.succeeds", lambda words: False)
    assert "its daemon does not answer" in fails(capsys, *words, "image=team/x")
    monkeypatch.setattr("brainfm.submission.sandbox.succeeds", lambda words: words[1] == "info")
    assert "docker has no such image" in fails(capsys, *words, "image=team/x")
    assert not out.exists(), "no cases were made"
    (out / "plain").mkdir(parents=True)
    (out / "plain" / "mine.txt").write_text("notes")
    assert "holds something else" in fails(capsys, *words, command)
    assert not (out / "cases").exists()


def test_container_refuses_settings_that_no_container_could_use(tmp_path, capsys):
    """Before anything is staged: the fault would show at the organisers'."""
    bundle, backbone = bundle_for(task_of("fomo26_task5"), tmp_path / "b"), backbone_file(tmp_path / "b.safetensors")
    six = ["container", "challenge=fomo26", "task=task6", f"backbone={backbone}", f"out={tmp_path / 's'}", "build=none"]
    five = ["container", *TASK5, f"bundle={bundle}", f"out={tmp_path / 's'}", "build=none"]
    assert "unknown part 'zz', expected one or more of backbone" in fails(capsys, *six, "parts=[zz]")
    assert "parts=[]: expected one or more" in fails(capsys, *six, "parts=[]")
    assert "is a classification, expected none" in fails(capsys, *five, "parts=[backbone]")
    for words in (five, six):
        assert "device=warp: expected auto, cpu, cuda or cuda:N" in fails(capsys, *words, "device=warp")
    for spread in ("-1", "0", "nan", "inf"):
        assert "expected a standard deviation above 0" in fails(capsys, *six, f"spread={spread}")
    assert f"{tmp_path / 'no.npz'}: no such file" in fails(capsys, *six, f"scale={tmp_path / 'no.npz'}")
    assert "expected backbone= and no bundle=" in fails(capsys, *six[:3], f"bundle={bundle}", six[4])
    assert not (tmp_path / "s").exists()
    assert main([*six, "parts=[backbone]", "device=cuda:1"]) == 0, "the machine that it will run on may have two"


def test_a_task_is_called_with_its_article(tmp_path, capsys):
    bundle = bundle_for(task_of("fomo26_task5"), tmp_path / "b")
    said = fails(capsys, "container", "challenge=fomo26", "task=task6", f"bundle={bundle}", f"out={tmp_path / 's'}")
    assert "fomo26_task6 is an embedding: expected backbone=" in said


def test_container_wants_the_weights_that_a_task_needs(tmp_path, capsys):
    bundle, backbone = bundle_for(task_of("fomo26_task5"), tmp_path / "b"), backbone_file(tmp_path / "b.safetensors")
    out, six = f"out={tmp_path / 's'}", ["challenge=fomo26", "task=task6"]
    assert "expected bundle= and no backbone=" in fails(capsys, "container", *TASK5, f"backbone={backbone}", out)
    assert "expected backbone= and no bundle=" in fails(capsys, "container", *six, f"bundle={bundle}", out)
    assert "expected a segmentation" in fails(capsys, "container", *six[:1], "task=task2", f"bundle={bundle}", out)
    assert "is no embedding" in fails(capsys, "container", *TASK5, f"bundle={bundle}", out, "scale=x.npz")
    assert main(["container", *TASK5, f"bundle={bundle}", out, "build=none", "overlap=0.25"]) == 0
    assert "MB  weights" in capsys.readouterr().out
    app = tmp_path / "s" / "app"
    assert json.loads((app / "settings.json").read_text())["overlap"] == 0.25
    assert not (app / "brainfm" / "verbs").exists(), "an image holds what prediction reaches and no command line"


def test_an_embedding_is_scaled_by_features_of_any_heads(tmp_path, capsys):
    backbone = backbone_file(tmp_path / "b.safetensors")
    words = [
        "container",
        "challenge=fomo26",
        "task=task6",
        f"backbone={backbone}",
        f"out={tmp_path / 's'}",
        "build=none",
    ]
    assert main(words) == 0 and "reads it raw" in capsys.readouterr().out
    count = np.load(tmp_path / "s" / "app" / "scale.npy").shape[1]
    matrix = np.random.default_rng(0).normal(5, 2, (12, count)).astype(np.float32)
    rows = tuple(("d", str(n), "", "t1", "t1") for n in range(12))
    write(Embedding(rows, {"features": matrix}, {}), tmp_path / "heads.npz")
    assert main([*words, f"scale={tmp_path / 'heads.npz'}", "spread=2"]) == 0
    found = np.load(tmp_path / "s" / "app" / "scale.npy")
    assert np.allclose(found[0], matrix.mean(0), atol=1e-4) and np.allclose(found[1] * matrix.std(0), 2, rtol=1e-3)


# ---- evaluate --------------------------------------------------------------------------------------------------------


def converted(tmp_path, name, subjects=8):
    task = task_of(name)
    root = write_task(task, tmp_path / task.folders[0], subjects)
    out = tmp_path / "m.csv"
    assert main(["convert", f"challenge={task.challenge}", f"task={task.name}", f"root={root}", f"out={out}"]) == 0
    return task, root, [f"challenge={task.challenge}", f"task={task.name}", f"manifest={out}", f"out={tmp_path / 's'}"]


def test_outputs_are_scored_as_the_organisers_score(tmp_path, capsys):
    """A missing probability is the worst there could be; one missing age costs the task."""
    _, _, words = converted(tmp_path, "fomo26_task5")
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for number in range(1, 9):
        (outputs / f"sub_{number}_ses_1.txt").write_text(f"{0.1 * number * ((number - 1) % 2):g}")
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    assert "auroc: 1.000" in capsys.readouterr().out
    (outputs / "sub_2_ses_1.txt").unlink()  # of one of four with the malformation
    (outputs / "sub_3_ses_1.txt").write_text("1.7")
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    said = capsys.readouterr().out
    assert "8 cases, 2 without a usable output" in said
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    # Worst answers: the missing one 0, the refused one 1. Of 16 pairs 3 x 3 are right; (0, three zeros) are ties.
    assert summary["metrics"]["auroc"]["mean"] == pytest.approx((9 + 1.5) / 16)
    with (tmp_path / "s" / "cases.csv").open() as file:
        notes = [row["note"] for row in csv.DictReader(file)]
    assert notes[1] == "no output" and "expected a probability" in notes[2]


def test_masks_are_scored_by_label_in_the_files_own_voxels(tmp_path, capsys):
    task, root, words = converted(tmp_path, "fomo26_task4", 4)
    outputs = tmp_path / "outputs"
    for number in range(1, 5):
        place = outputs / f"sub_{number}" / "output"
        place.mkdir(parents=True)
        source = root / "labels" / f"sub_{number}" / "ses_1" / task.mask
        (place / f"sub_{number}_ses_1.nii.gz").write_bytes(source.read_bytes())
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    said = capsys.readouterr().out
    assert "dice: 1.000 [1.000, 1.000], 4 cases" in said and "nsd: 1.000" in said
    for path in list(outputs.rglob("sub_1_*.nii.gz")):
        path.unlink()
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    assert "dice: 0.750" in capsys.readouterr().out


def test_an_age_that_is_missing_costs_the_task(tmp_path, capsys):
    _, _, words = converted(tmp_path, "fomo26_task3", 6)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    for number in range(1, 7):
        (outputs / f"sub_{number}_ses_1.txt").write_text(str(31 + 7.25 * (number - 1)))
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    assert "mae: 1.000 [1.000, 1.000], 6 cases" in capsys.readouterr().out
    (outputs / "sub_4_ses_1.txt").unlink()
    assert main(["evaluate", *words, f"predictions={outputs}"]) == 0
    said = capsys.readouterr().out
    assert "mae: 100.000" in said and "correlation: -100.000" in said


def test_embeddings_go_through_the_linear_probe(tmp_path, capsys):
    """Task 6 by class, task 7 between groups; an age is cut into decades."""
    rng = np.random.default_rng(1)
    lines = ["dataset,subject,session,contrast,path,cohort,age,sex"]
    outputs = tmp_path / "npy"
    outputs.mkdir()
    for number in range(60):
        lines.append(f"d,s{number},,t1,{number}.nii.gz,{'abc'[number % 3]},{20 + number},{'FM'[number % 2]}")
        features = rng.normal(0, 1, 8) + 3 * np.eye(8)[number % 3]
        np.save(outputs / f"s{number}.npy", features.astype(np.float32))
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    words = ["evaluate", "challenge=fomo26", f"manifest={tmp_path / 'm.csv'}", f"predictions={outputs}",
             f"out={tmp_path / 's'}", "target=cohort"]  # fmt: skip
    assert main([*words, "task=task6"]) == 0
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert summary["metrics"]["ovr_auroc"]["mean"] > 0.9 and summary["metrics"]["ovr_auroc"]["n"] == 30
    assert "expected groups=" in fails(capsys, *words, "task=task7")
    assert main([*words, "task=task7", "groups=[sex,age]"]) == 0
    assert "fairness_auroc: 0." in capsys.readouterr().out
    (outputs / "s3.npy").unlink()
    assert "1 of 60 cases have no embedding, first d/s3" in fails(capsys, *words, "task=task6")


def test_evaluate_refuses_halves(tmp_path, capsys):
    _, _, words = converted(tmp_path, "fomo26_task5", 4)
    assert "either bundle= or predictions=" in fails(capsys, "evaluate", *words)
    assert "challenge= and task= together" in fails(capsys, "evaluate", words[0], *words[2:], "predictions=x")
    (tmp_path / "none").mkdir()
    said = fails(capsys, "evaluate", *words, f"predictions={tmp_path / 'none'}")
    assert "holds no output of the 4 cases, expected sub_1_ses_1.txt" in said
    bundle = bundle_for(task_of("fomo26_task3"), tmp_path / "b")
    assert "is a regression, expected a classification" in fails(capsys, "evaluate", *words, f"bundle={bundle}")
