"""The page of the demo, from a finished demo made by hand: every part is there, and names stay names."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainfm.data.manifest import read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.reports.demo import Demo, write_demo_page
from brainfm.specs import PreprocessSpec
from brainfm.tasks.answers import LISTING
from tests.conftest import write_subjects
from tests.reports.pages import EVIL, is_harmless, words_of

SCORE = {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 3}
ARMS = {"pretrained": "pre-trained", "scratch": "from scratch"}


def finished(out: Path, of: str = "", given: bool = False, **difference: float) -> Demo:
    """A demo of three test subjects, whose masks are those of the truth; ``of`` is part of every name; ``given``: with
    weights that tell regions, not with some that were pre-trained here."""
    manifest = read_manifest(write_subjects(out / "cohort", 3, ("flair", "t1"), edge=20))
    scans = [
        replace(s, subject=f"{of}{s.subject}", path=f"cohort/{s.path}",
                columns={"lesion_mask": f"cohort/{s.columns['lesion_mask']}"}) for s in manifest.scans
    ]  # fmt: skip
    write_manifest(out / "test.csv", scans)
    prepare(read_manifest(out / "test.csv"), out / "store", PreprocessSpec(spacing_mm=(3, 3, 3)), workers=1)
    masks = {s.subject: out / s.columns["lesion_mask"] for s in scans}
    for arm in ARMS:
        for folder in ("scores", "predictions"):
            (out / arm / "run0" / folder).mkdir(parents=True)
        with (out / arm / "run0" / "scores" / "cases.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("subject", "dice", "volume_ml_true"))
            table.writerows((subject, 0.1 * n, 2.0) for n, subject in enumerate(masks))
        with (out / arm / "run0" / "predictions" / LISTING).open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("subject", "file"))
            table.writerows((subject, mask) for subject, mask in masks.items())
    summary: dict[str, Any] = {
        "pretrain_parameters": 12_300_000, "dice_pretrained": 0.25, "dice_scratch": 0.2, "n_cases": 3,
        "scores": {arm: {"dice": SCORE, "surface_dice_1mm": SCORE} for arm in ARMS},
        "difference": {"mean": 0.05, "low": -0.1, "high": 0.2, "n": 3} | difference,
        "labelled_subjects": 4, "pretrain_steps": 75, "runs": 2, "weights": "w.safetensors", "agreement": {"t1": 0.625},
        "seconds": {"in all": 90.0}, "threads": 2,
    }  # fmt: skip
    points: dict[str, list[tuple[float, ...]]] = {f"{of}curve": [(0.0, 1.0, 0.9, 1.1), (20.0, 0.5, 0.4, 0.7)]}
    curves = {"pretrain": {} if given else points, "tuned": points, "dice": points}
    pair = out / "cohort" / "sub-00" / "flair.nii.gz", next(iter(masks.values()))
    anatomy = {"flair": pair, "t1": pair} if given else {}
    slices = {f"{of}Scan": [np.eye(8), np.eye(8)]}
    return Demo(out, ARMS, 33, summary, [f"brainfm doctor manifest={of}all.csv"], curves, slices, [f"{of}T1", of],
                anatomy)  # fmt: skip


def test_the_page_tells_the_whole_demo(tmp_path: Path) -> None:
    words = words_of(write_demo_page(finished(tmp_path)))
    for said in ("33 synthetic people", "12.3 M parameters in pre-training", "1.5 min on 2 CPU threads",
                 "Test subjects at 3 mm", "Worst of 3 test subjects with lesions: subject 00, Dice 0.000, on the FLAIR",
                 "Best of 3 test subjects with lesions: subject 02, Dice 0.200", "brainfm doctor manifest=all.csv",
                 "from scratch 0.250 0.200 to 0.300 0.250 0.200 to 0.300 3",
                 "difference, paired +0.050 -0.100 to +0.200 3", f"brainfm demo out={tmp_path}"):  # fmt: skip
        assert said in words, said
    sections = re.findall(r"<h2><i>\d</i>([^<]+)</h2>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert sections == ["The cohort", "What the network understood", "Learning from few labels", "Lesions",
                        "Pre-trained against scratch", "How it was made"]  # fmt: skip


def test_given_weights_show_what_they_know_before_any_label(tmp_path: Path) -> None:
    words = words_of(write_demo_page(finished(tmp_path, given=True)))
    for said in ("What the weights know before any label", "The weights, w.safetensors, were pre-trained for 75 steps",
                 "Anatomy in every contrast", "agreement with the FLAIR, Dice 0.625"):  # fmt: skip
        assert said in words, said
    assert "Pre-trained here" not in words


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.1, "pre-training helped here"), (-0.2, -0.1, "pre-training hurt here"), (-0.1, 0.1, "either way")],
)
def test_the_verdict_follows_the_interval(tmp_path: Path, low: float, high: float, said: str) -> None:
    assert said in words_of(write_demo_page(finished(tmp_path, low=low, high=high)))


def test_names_stay_names(tmp_path: Path) -> None:
    page = is_harmless(write_demo_page(finished(tmp_path, of=EVIL)))
    assert " ".join(page.text).count(EVIL) >= 4, "subjects of three captions, and a command"
