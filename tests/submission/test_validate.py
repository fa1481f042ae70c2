"""The validator: a good submission passes, and a broken one of each kind is rejected with the right sentence."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from brainfm.errors import ConfigError
from brainfm.submission import sandbox
from brainfm.submission import validate as module
from brainfm.submission.cases import Case, given, made
from brainfm.submission.challenge import read_challenge
from brainfm.submission.sandbox import run
from brainfm.submission.validate import REPORT, Launcher, describe, validate
from tests.submission.fomo_data import write_task

FAST = ("plain", "turned")


def task_of(name, challenge="fomo26"):
    return read_challenge(challenge).task(name)


def script(folder, body):
    """A submission in a few lines; nibabel and numpy are there, the flags are read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predict.py").write_text(
        "import argparse, sys\nsys.modules['pydicom'] = None\n"  # nibabel would import it, and it requests
        "import numpy as np, nibabel as nib\n"
        "parser = argparse.ArgumentParser()\n"
        "for flag in 'flair adc dwi t2s swi t1 t2 input output dwi_b1000'.split(): parser.add_argument('--' + flag)\n"
        "args = vars(parser.parse_args()); output = args.pop('output')\n"
        "files = [v for v in args.values() if v]\n" + body
    )
    return Launcher("command", f"{sys.executable} {folder / 'predict.py'}")


def tried(tmp_path, name, body, kinds=("plain",), challenge="fomo26", **how):
    task = task_of(name, challenge)
    cases = made(task, tmp_path / "cases", kinds)
    return validate(task, script(tmp_path / "app", body), cases, tmp_path / "out", **how)


TEXT = "np.asarray(nib.load(files[0]).dataobj); open(output, 'w').write({!r})\n"
MASK = (
    "image = nib.load(files[0]); data = np.zeros(image.shape, {dtype!r}); data[2:5, 2:5, 2:5] = {value}\n"
    "nib.save(nib.Nifti1Image({array}, {affine}), output)\n"
)
ARRAY = "np.save(output, {})\n"


# The three rows of the sform, which nibabel itself would refuse to write.
NO_AFFINE = (
    "import gzip\nraw = bytearray(gzip.open(output).read()); raw[280:328] = np.full(12, np.nan, '<f4').tobytes()\n"
    "gzip.open(output, 'wb').write(bytes(raw))\n"
)


def mask(dtype="uint8", value="1", array="data", affine="image.affine"):
    return MASK.format(dtype=dtype, value=value, array=array, affine=affine)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("task1", TEXT.format("0.25\n")),
        ("task3", TEXT.format("41.5")),
        ("task2", mask()),
        ("task6", ARRAY.format("np.ones(320, np.float32)")),
    ],
)
def test_a_plain_submission_is_accepted(tmp_path, name, body):
    verdict = tried(tmp_path, name, body, ("plain", "again", "small", "thick"))
    assert verdict.accepted and verdict.passed, describe(verdict)
    assert describe(verdict)[-1] == "passed: the organisers would accept it, and so would we"
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["accepted"] and set(report["seconds"]) == {"plain", "again", "small", "thick"}


BROKEN = {
    "wrong shape": ("task2", mask(array="data[:-1]"), r"the shape \(71, 84, 64\), expected \(72, 84, 64\)"),
    "four axes": ("task2", mask(array="data[..., None, None]"), "expected three axes"),
    "probability 1.2": ("task1", TEXT.format("1.2"), "1.2, expected a probability from 0 to 1"),
    "NaN": ("task3", TEXT.format("nan"), "nan, expected a finite number"),
    "two numbers": ("task5", TEXT.format("0.1 0.9"), r"2 words \(0.1 0.9\), expected one number"),
    "a list": ("task3", TEXT.format("['41']"), "is no number"),
    "no text": ("task3", TEXT.format(""), "plain.txt is empty"),
    "float mask": ("task2", mask("float32", "0.7"), "float32 with values between whole numbers, expected labels"),
    "NaN mask": ("task2", mask("float32", "np.nan"), "the mask holds NaN or infinite values"),
    "label 3": ("task4", mask(value="3"), "values from 0 to 3, expected 0 to 2"),
    "no affine": ("task2", mask() + NO_AFFINE, "the affine has NaN or is zero"),
    "no NIfTI": ("task2", "open(output, 'w').write('mask')\n", "plain.nii.gz cannot be read"),
    "3-D npy": ("task6", ARRAY.format("np.ones((2, 3, 4), np.float32)"), r"the shape \(2, 3, 4\), expected one axis"),
    "pickled npy": (
        "task6",
        ARRAY.format("np.array({'a': 1})"),
        "cannot be read as one array without pickle .no arrays of numbers",
    ),
    "whole npy": ("task6", ARRAY.format("np.ones(8, np.int64)"), "int64, expected a floating type"),
    "inf npy": ("task7", ARRAY.format("np.full(8, np.inf, np.float32)"), "the embedding holds NaN or infinite"),
    "no file": ("task1", "pass\n", "nothing was written, expected plain.txt"),
    "another name": ("task1", "open(output + '.txt', 'w').write('1')\n", "only plain.txt.txt was written"),
    "crash": ("task1", "raise AttributeError('t2w')\n", "exit code 1: AttributeError: t2w"),
    "network": (
        "task1",
        "import urllib.request\ntry: urllib.request.urlopen('http://example.org', timeout=2)\n"
        "except OSError: pass\n" + TEXT.format("0.5"),
        "tried to reach the network .*example.org",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_submission_is_rejected_with_the_right_sentence(tmp_path, kind):
    name, body, sentence = BROKEN[kind]
    verdict = tried(tmp_path, name, body)
    assert not verdict.accepted
    said = [check.sentence for check in verdict.failures if check.whose == "organisers"]
    assert any(re.search(sentence, one) for one in said), said
    assert "NOT accepted" in describe(verdict)[-1]


STRICTER = {
    "wrong place": ("task2", mask(affine="np.eye(4)"), "mm off flair.nii.gz, expected its affine"),
    "whole numbers as float": ("task2", mask("float32"), "stored as float32, expected an integer type"),
    "double precision": ("task6", ARRAY.format("np.ones((1, 8))"), r"float64 of shape \(1, 8\), expected float32"),
    "a second file": ("task1", TEXT.format("0.5") + "open(output + '.log', 'w')\n", "plain.txt.log lies beside"),
    "changes its input": ("task1", TEXT.format("0.5") + "open(files[0], 'ab').write(b'x')\n", "input files were"),
    "an age of 300": ("task3", TEXT.format("300"), "300, expected a value from 0 to 120"),
    "a local socket": (
        "task1",
        "import multiprocessing\nif __name__ == '__main__':\n    multiprocessing.Manager()\n    " + TEXT.format("0.5"),
        "marked invalid",
    ),
    "another answer each time": (
        "task1",
        "import random\nopen(output, 'w').write(str(random.random()))\n",
        "another answer to the same files",
    ),
    "orientation ignored": (
        "task3",
        "open(output, 'w').write(str(nib.load(files[0]).shape[0]))\n",
        "where the scan is stored in another axis order",
    ),
    "takes a corrupt file": ("task1", "open(output, 'w').write('0.5')\n", "exit code 0, expected not 0"),
    "a traceback": ("task1", TEXT.format("0.5"), "with a traceback, expected one sentence"),
}


@pytest.mark.parametrize("kind", STRICTER)
def test_what_only_the_stricter_checks_see(tmp_path, kind):
    name, body, sentence = STRICTER[kind]
    kinds = {"another answer each time": ("plain", "again"), "orientation ignored": FAST}.get(kind, ("plain",))
    verdict = tried(tmp_path, name, body, ("corrupt",) if kind in ("takes a corrupt file", "a traceback") else kinds)
    assert verdict.accepted and not verdict.passed, describe(verdict)
    assert any(re.search(sentence, check.sentence) for check in verdict.failures), describe(verdict)
    assert "the organisers would accept it" in describe(verdict)[-1]


def test_a_file_written_elsewhere_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "_WRITABLE", ("/dev",))
    cache = tmp_path / "home" / "cache"
    body = f"import os\nos.makedirs({str(cache.parent)!r})\nopen({str(cache)!r}, 'w')\n" + TEXT.format("0.5")
    verdict = tried(tmp_path, "task1", body)
    assert [check.sentence for check in verdict.failures] == [
        f"wrote {cache}, expected writes to /output and /tmp alone: the image is read-only"
    ]


def test_embeddings_of_two_lengths(tmp_path):
    body = "np.save(output, np.ones(nib.load(files[0]).shape[0], np.float32))\n"
    verdict = tried(tmp_path, "task6", body, ("plain", "small"))
    assert "embeddings of 32, 72 numbers, expected one length" in {check.sentence for check in verdict.failures}


def test_the_limit_stops_a_case(tmp_path):
    verdict = tried(tmp_path, "task1", "import time\ntime.sleep(60)\n", limit_s=2.0)
    said = {check.sentence for check in verdict.failures}
    assert "took longer than 2 s and was stopped" in said and verdict.seconds["plain"] < 20


def test_an_empty_mask_is_refused_in_2025_only(tmp_path):
    for year, accepted in (("fomo25", False), ("fomo26", True)):
        verdict = tried(tmp_path / year, "task2", mask(value="0"), challenge=year)
        assert verdict.accepted == accepted, describe(verdict)


def test_without_a_namespace_the_hook_refuses(tmp_path, monkeypatch):
    """It says which of the two it is."""
    monkeypatch.setattr(sandbox, "network_is_cut", lambda: False)
    assert "refuses connections" in sandbox.isolation()
    words = [sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9), 2)"]
    ran = run(words, tmp_path, limit_s=30)
    assert "Network is unreachable" in ran.err and "to 127.0.0.1" in ran.sockets


@pytest.mark.skipif(not sandbox.network_is_cut(), reason="no network namespaces here")
def test_in_a_namespace_there_is_only_a_loopback_that_is_down(tmp_path):
    words = [sys.executable, "-S", "-c", "print(open('/proc/net/dev').read().count(':'))"]
    ran = run(words, tmp_path, limit_s=30)
    assert ran.out.strip() == "1" and not ran.watched and "namespace" in sandbox.isolation()


def test_a_sandbox_has_nothing_of_the_caller(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    ran = run([sys.executable, "-c", "import os; print(sorted(os.environ))"], tmp_path, limit_s=30)
    assert "SECRET" not in ran.out and "HOME" in ran.out


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_made_cases(tmp_path):
    two, four, six = (replace(task_of(name), shape_vox=(8, 8, 8)) for name in ("task2", "task4", "task6"))
    found = {case.name: case for case in made(two, tmp_path / "two")}
    assert set(found) == {"plain", "again", "alternative", "turned", "oblique", "thick", "small", "hot", "blank",
                          "one_blank", "few", "corrupt", "typical"}  # fmt: skip
    assert list(found["plain"].files) == ["flair", "dwi", "t2s"] and list(found["few"].files) == ["flair", "dwi"]
    assert list(found["alternative"].files) == ["flair", "dwi", "swi"]
    assert found["corrupt"].refused and found["turned"].like == "plain"
    assert {case.name for case in made(four, tmp_path / "four")}.isdisjoint({"alternative", "few", "one_blank"})
    assert [case.name for case in made(six, tmp_path / "six", FAST)] == ["plain", "turned"]
    with pytest.raises(ConfigError, match="cases=huge: expected of plain"):
        made(two, tmp_path, ("huge",))


def test_given_cases(tmp_path):
    task = task_of("task1")
    root = write_task(task, tmp_path / "data", 3)
    (root / "preprocessed" / "sub_3" / "ses_1" / "adc.nii.gz").unlink()
    found = given(task, root / "preprocessed")
    assert [case.name for case in found] == ["sub_1_ses_1", "sub_2_ses_1"]
    assert list(found[0].files) == ["flair", "dwi", "adc", "t2s"] and list(found[1].files)[-1] == "swi"
    assert found[0].files["dwi"].name == "dwi_b1000.nii.gz"
    assert len(given(task, root / "preprocessed", most=1)) == 1
    assert len(given(task_of("task6"), root / "preprocessed")) == 11, "of an embedding every file is a case"
    with pytest.raises(ConfigError, match="no folder holds all scans of a case of fomo26_task3, expected t1w"):
        given(task_of("task3"), root)


# ---- launchers -------------------------------------------------------------------------------------------------------


def test_containers_are_called_as_the_organisers_call_them(tmp_path):
    case = Case("plain", tmp_path / "in", {"flair": tmp_path / "in" / "flair.nii.gz"})
    output = tmp_path / "out" / "plain.txt"
    words = Launcher("sif", "x.sif", gpu=True).words(case, output, tmp_path)
    text = " ".join(words)
    assert words[:3] == ["apptainer", "exec", "--nv"] and f"{tmp_path / 'in'}:/input:ro" in words
    assert text.endswith("x.sif python /app/predict.py --flair /input/flair.nii.gz --output /output/plain.txt")
    text = " ".join(Launcher("image", "team/x").words(case, output, tmp_path))
    assert "docker run --rm --network none --read-only" in text and "team/x python /app/predict.py" in text


def test_refusals(tmp_path, monkeypatch):
    task = task_of("task1")
    for command, said in (("", "nothing is no program"), ("nowhere x.py", "nowhere is no program"),
                          (f"{sys.executable} gone.py", "gone.py is no file")):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            validate(task, Launcher("command", command), [], tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="apptainer is not installed, expected command= instead"):
        validate(task, Launcher("sif", "x.sif"), [], tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    with pytest.raises(ConfigError, match="expected an Apptainer image"):
        validate(task, Launcher("sif", "x.sif"), [], tmp_path)


# ---- our own container -----------------------------------------------------------------------------------------------


# Between them all kinds of answers, both years, and every case but the large one.
OWN = [
    ("fomo25", "task2", ("plain", "blank", "thick")),
    ("fomo26", "task1", ("plain", "alternative", "few", "one_blank", "small")),
    ("fomo26", "task3", ("plain", "again", "oblique", "blank")),
    ("fomo26", "task4", ("plain", "turned", "thick", "small", "corrupt")),
    ("fomo26", "task6", ("plain", "again", "turned", "blank", "small", "corrupt")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("challenge", "name", "kinds"), OWN)
def test_our_own_submissions_pass(app_of, tmp_path, challenge, name, kinds):
    task, app = task_of(name, challenge), app_of(challenge, name)
    launcher = Launcher("command", f"{sys.executable} {app / 'predict.py'}")
    verdict = validate(task, launcher, made(task, tmp_path / "cases", kinds), tmp_path / "out")
    assert verdict.passed, "\n".join(describe(verdict))


def test_our_own_submission_passes_in_short(app_of, tmp_path):
    task, app = task_of("task2"), app_of("fomo26", "task2")
    launcher = Launcher("command", f"{sys.executable} {app / 'predict.py'}")
    verdict = validate(task, launcher, made(task, tmp_path / "cases", ("plain", "corrupt")), tmp_path / "out")
    assert verdict.passed, "\n".join(describe(verdict))


def test_what_lies_where_outputs_go_is_never_removed(tmp_path: Path) -> None:
    """An input, or a file of the user's: the folder of a case is emptied before it is run."""
    task = read_challenge("fomo26").task("task3")
    scan = tmp_path / "sub_1" / "t1w.nii.gz"
    scan.parent.mkdir()
    scan.write_bytes(b"of a person")
    case = Case("sub_1", scan.parent, {"t1": scan})
    with pytest.raises(ConfigError, match="expected another out="):
        validate(task, Launcher("command", "/bin/true"), [case], tmp_path)
    (tmp_path / "out" / "sub_1").mkdir(parents=True)
    (tmp_path / "out" / "sub_1" / "mine.txt").write_text("notes")
    with pytest.raises(ConfigError, match="holds something else"):
        validate(task, Launcher("command", "/bin/true"), [case], tmp_path / "out")
    assert scan.read_bytes() == b"of a person" and (tmp_path / "out" / "sub_1" / "mine.txt").exists()


def test_no_case_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no case to run"):
        validate(read_challenge("fomo26").task("task3"), Launcher("command", "/bin/true"), [], tmp_path)
