"""The task that scripts/evidence/challenge_task.py makes of real heads: its people, layout, volumes and folds."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from brainfm.imaging import nifti
from brainfm.specs import TaskSpec
from brainfm.submission.challenge import task_of
from brainfm.submission.convert import convert
from brainfm.volume import Volume

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "evidence"))
import challenge_task as module

PEOPLE = [f"P{number:03}" for number in range(12)]
SPEC = TaskSpec("classification", "polymicrogyria", ("t1",), ("0", "1"), (16,) * 3, mode="exclusive", view_mm=8.0)
PARCELS = {47: "a hippocampus", 51: "ventricle", 87: "white"}  # some of DLMUSE's


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve heads; the last three are of the training side, and of the first no sex is known."""
    monkeypatch.setattr(
        module, "sides", lambda: {(module.DATASET, who): "held" if who < "P009" else "train" for who in PEOPLE}
    )
    folder, rng = tmp_path / "ixi2mm", np.random.default_rng(0)
    tables = {
        "participants_n181.csv": [["MRID", "Age", "Sex"]],
        "DLMUSE_Volumes.csv": [["MRID", "702", "301", "47", "51"]],
    }
    for number, who in enumerate(PEOPLE):
        labels = rng.choice([0, *PARCELS], (8, 8, 8)).astype(np.uint8)
        for ending, voxels in (("T1w", rng.normal(100, 9, (8, 8, 8)).astype(np.int16)), ("DLMUSE_dseg", labels)):
            (folder / who).mkdir(parents=True, exist_ok=True)
            nifti.write(folder / who / f"{who}_{ending}.nii.gz", Volume(voxels, np.diag([2.0, 2.0, 2.0, 1.0])))
        tables["participants_n181.csv"].append([who, str(30 + number), "MF"[number % 2] if number else ""])
        tables["DLMUSE_Volumes.csv"].append([who, "1400000", "9", *(str(v) for v in rng.integers(4000, 9000, 2))])
    for name, rows in tables.items():
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def test_the_people_of_a_side_come_in_the_organisers_layout(data: Path, tmp_path: Path) -> None:
    task = task_of("fomo26_task5")
    people = module.people_of(data, "sex", ("held",))
    assert list(people) == PEOPLE[1:9], "of a known sex, and of no other side"
    assert list(module.people_of(data, "age", ("train", "held"))) == PEOPLE
    module.laid_out(task, people, tmp_path / "data")
    found = convert(task, tmp_path / "data", tmp_path / "m.csv")
    assert found.sessions == found.answered == 8
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = {row["subject"]: row for row in csv.DictReader(file)}
    assert [rows[f"sub_{n}"]["polymicrogyria"] for n in range(1, 9)] == ["0", "1"] * 4
    assert (tmp_path / rows["sub_1"]["path"]).resolve() == (data / "P001" / "P001_T1w.nii.gz").resolve()


def test_volumes_answer_for_people_whom_they_have_not_learned_from(data: Path, tmp_path: Path) -> None:
    task = task_of("fomo26_task5")
    people = module.people_of(data, "sex", ("held",))
    module.write_tables(task, people, data, tmp_path)
    ids = [f"{task.id}/sub_{n}/ses_1" for n in range(1, 9)]
    few, many = (module.volumes_of([(tmp_path / f"{name}.csv", ids)]) for name in (module.FEW, module.MANY))
    assert many.shape == (8, 3) and np.allclose(many[:, 0], np.log(1400)), "sums of regions (300 and above) are none"
    assert few.shape[0] == 8 and np.isfinite(few).all()
    halves = [ids[:4], ids[4:]]
    document = {"splits": [{"repeat": 0, "held": half} for half in halves]}

    def answers(truth: list[float]) -> np.ndarray:
        rows = [dict(zip(module.KEY, who.split("/")), repeat=0, truth=[t]) for who, t in zip(ids, truth)]
        return module.of_volumes(document, rows, SPEC, tmp_path / f"{module.MANY}.csv")

    plain, other = answers([0, 1, 0, 1, 0, 1, 0, 1]), answers([1, 0, 0, 1, 0, 1, 0, 1])
    assert np.array_equal(plain[:4], other[:4]), "their own sex says nothing about them"
    assert not np.array_equal(plain[4:], other[4:])


def test_a_comparison_is_paired_by_person() -> None:
    truth, own = np.array([0.0, 1.0, 0.0, 1.0, 1.0, 0.0]), np.array([0.1, 0.9, 0.2, 0.8, 0.7, 0.3])
    told = [truth, np.column_stack([1 - own, own]), np.column_stack([own, 1 - own])]
    (line,) = module.compared(SPEC, "auroc", told, list("abcdef"), ("it", "the other"))
    assert "it 1.000" in line and "the other 0.000" in line and "+1.000" in line and "6 answers about 6 people" in line
