"""A challenge's task made of real heads: from the organisers' layout to a bundle, beside what volumes tell.

    python scripts/evidence/challenge_task.py OUT --data DATA3D --question sex|age [--people held|train|all]

The people are those of ixi2mm whose sex and age are known, the sides those of foundation/split.csv: the pre-training of
brainfm_s has seen no scan of ``held``. Their T1s are laid out as the organisers of FOMO26 hand theirs out: sex as task
5 (``t1.nii.gz``, a class), age as task 3 (``t1w.nii.gz``, years). `finetune experiment=` converts, prepares and learns
by the task's own preset; the one key that the script adds are the volumes, as a table: shown, and never shipped, for in
a container nobody measures them. The note about people who were in the pre-training goes by names, which are new here.

Printed, with intervals: what `finetune` says of the shipped choice, every candidate and the baselines; what the inner
folds chose; then, person by person on the same folds, what is shipped and every candidate against two sets of volumes
that come with the data: of tissues and groups of structures, and of each region of a parcellation. With ``--people
train`` then the bundle on ``held`` as the organisers would score it, beside volumes learned from the same people.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison_data import DATASET
from foundation_people import sides

from brainfm.cli import main as brainfm
from brainfm.data.schemes import GROUPS, TISSUES, to_groups
from brainfm.data.volumes import log_fractions, read_volumes
from brainfm.files import write_table
from brainfm.imaging import nifti
from brainfm.scoring.intervals import bootstrap, paired_bootstrap, paired_permutation
from brainfm.specs import TaskSpec
from brainfm.submission.challenge import ChallengeTask, task_of
from brainfm.submission.convert import LABELS, SCANS
from brainfm.tasks.study import subjects_of
from brainfm.tasks.whole_head.baselines import linear_answers
from brainfm.tasks.whole_head.scores import answer_score

QUESTIONS = {"sex": "fomo26_task5", "age": "fomo26_task3"}
PEOPLE = {"held": ("held",), "train": ("train",), "all": ("train", "held")}
FEW, MANY = "volumes", "regions"
TABLES = {FEW: "volumes of tissues and groups", MANY: "volumes of each region"}
KEY = ("dataset", "subject", "session")
CAVITY, REGIONS = "702", 300  # of DLMUSE's table: what is inside the skull; ids below are no sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--question", choices=list(QUESTIONS), default="sex")
    parser.add_argument("--people", choices=list(PEOPLE), default="held")
    parser.add_argument("--backbone", default="brainfm_s")
    parser.add_argument("--set", nargs="*", default=[], help="further keys of finetune")
    asked = parser.parse_args()
    task, data = task_of(QUESTIONS[asked.question]), asked.data / DATASET
    out = asked.out / f"{asked.question}_{asked.people}"
    people = people_of(data, asked.question, PEOPLE[asked.people])
    laid_out(task, people, out / "data")
    write_tables(task, people, data, out)
    words = [f"experiment={task.id}", f"backbone_from={asked.backbone}", f"root={out / 'data'}"]
    run("finetune", *words, f"run={out / 'run'}", f"task.volumes={out / FEW}.csv", *asked.set)
    print("\n".join(chosen(out / "run") + against_volumes(out)))
    if asked.people == "train":
        tested = people_of(data, asked.question, PEOPLE["held"])
        print("\n".join(on_held(task, people, tested, data, out)))


def run(*words: str) -> None:
    code = brainfm(list(words))
    if code:
        raise SystemExit(f"brainfm {' '.join(words)} ended with {code}")


# ---- the organisers' layout ------------------------------------------------------------------------------------------


def people_of(data: Path, question: str, chosen: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """subject -> T1 and answer, of the people of these sides of whom it is known."""
    with (data / "participants_n181.csv").open(newline="", encoding="utf-8") as table:
        rows = {row["MRID"]: row for row in csv.DictReader(table)}
    found = {}
    for (dataset, subject), side in sorted(sides().items()):
        text = rows.get(subject, {}).get(question.title(), "") if dataset == DATASET and side in chosen else ""
        if text:
            t1 = data / subject / f"{subject}_T1w.nii.gz"
            found[subject] = (t1, str(int(text == "M")) if question == "sex" else text)
    return found


def laid_out(task: ChallengeTask, people: Mapping[str, tuple[Path, str]], root: Path) -> None:
    """The scans, as links, and the answers below ``root`` as the organisers hand them out."""
    for number, (t1, answer) in enumerate(people.values(), start=1):
        folder = root / task.folders[0] / task.folders[0]
        scans, labels = (folder / kind / f"sub_{number}" / "ses_1" for kind in (SCANS, LABELS))
        scans.mkdir(parents=True, exist_ok=True)
        labels.mkdir(parents=True, exist_ok=True)
        file = scans / f"{task.inputs[0].file}.nii.gz"
        if not file.exists():
            file.symlink_to(t1.absolute())
        (labels / task.answers[0]).write_text(f"{answer}\n")


# ---- volumes ---------------------------------------------------------------------------------------------------------


def write_tables(task: ChallengeTask, people: Mapping[str, Any], data: Path, out: Path) -> None:
    """The people's volumes in ml as tables of brainfm: tissues and groups of structures, and single regions."""
    with (data / "DLMUSE_Volumes.csv").open(newline="", encoding="utf-8") as table:
        rows = {row["MRID"]: row for row in csv.DictReader(table)}
    found: dict[str, list[dict[str, Any]]] = {FEW: [], MANY: []}
    for number, subject in enumerate(people, start=1):
        row, who = rows[subject], {"dataset": task.id, "subject": f"sub_{number}", "session": "ses_1"}
        who["icv_ml"] = str(float(row[CAVITY]) / 1000)
        found[FEW].append(who | grouped(data / subject / f"{subject}_DLMUSE_dseg.nii.gz"))
        single = {f"muse_{name}_ml": float(row[name]) / 1000 for name in row if name.isdigit() and int(name) < REGIONS}
        found[MANY].append(who | single)
    for name, lines in found.items():
        write_table(out / f"{name}.csv", list(lines[0]), [list(line.values()) for line in lines])


def grouped(parcels: Path) -> dict[str, float]:
    """Volumes in ml of tissues and of groups of structures."""
    volume, _ = nifti.read(parcels, labels=True)
    ml = float(np.prod(volume.spacing_mm)) / 1000
    found = {}
    for level, words in (("tissues", TISSUES), ("groups", GROUPS)):
        labels = to_groups(volume.voxels, "dlmuse", str(parcels), level=level, unknown="ignore")
        found |= {
            f"{level}_{word}_ml": float((labels == place).sum()) * ml for place, word in enumerate(words) if place
        }
    return found


def volumes_of(parts: Sequence[tuple[Path, Sequence[str]]]) -> np.ndarray:
    """[N, F] of rows of several tables: log shares of the cavity inside the skull that all rows have, and its log."""
    found = []
    for table, ids in parts:
        read = read_volumes(table)
        shares, regions = log_fractions(read, ids)
        cavity = np.log([read.icv_ml[who] for who in ids])
        found.append({"cavity": cavity} | {name: shares[:, place] for place, name in enumerate(regions)})
    names = [name for name in found[0] if all(name in part and np.isfinite(part[name]).all() for part in found)]
    return np.concatenate([np.column_stack([part[name] for name in names]) for part in found]).astype(np.float64)


# ---- scores ----------------------------------------------------------------------------------------------------------


def chosen(run: Path) -> list[str]:
    """What the inner folds chose in each fold, and the mean loss there of every candidate."""
    tried = json.loads((run / "results.json").read_text())["candidates"]
    ships = Counter(found["chosen"] for found in tried["folds"].values())
    inner = ", ".join(f"{name} {row['inner']:.3f}" for name, row in tried["table"].items() if row["inner"] is not None)
    return [f"shipped: {', '.join(f'{name} by {n} folds' for name, n in ships.most_common())}", f"inner loss: {inner}"]


def against_volumes(out: Path) -> list[str]:
    """What is shipped, and every candidate alone, against both volume baselines on the same folds; none of these
    answers is corrected afterwards."""
    document = json.loads((out / "run" / "results.json").read_text())
    spec, primary = TaskSpec.from_dict(document["task"]), document["primary"]
    folders = [out / "run" / split["folder"] for split in document["splits"]]
    rows = [row for folder in folders for row in json.loads((folder / "held.json").read_text())]
    truth = np.array([row["truth"][0] for row in rows], dtype=np.float64)
    lines = []
    for table, title in TABLES.items():
        other = of_volumes(document, rows, spec, out / f"{table}.csv")
        for name in ("shipped", *rows[0]["candidates"]):
            own = given(spec, [row["raw"] if name == "shipped" else row["candidates"][name] for row in rows])
            lines += compared(spec, primary, (truth, own, other), subjects_of(rows), (name, title))
    return lines


def of_volumes(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], spec: TaskSpec, table: Path) -> Any:
    """The answers of a table's volumes to the held-out rows of a run, learned from the others of each fold."""
    known = {"/".join(row[name] for name in KEY): row["truth"][0] for row in rows}
    ids, right = list(known), np.array(list(known.values()), dtype=np.float64)
    x, found = volumes_of([(table, ids)]), {}
    for split in document["splits"]:
        held = [place for place, who in enumerate(ids) if who in split["held"]]
        trained = [place for place in range(len(ids)) if place not in held]
        answers = linear_answers(x, right, ids, [(trained, held)], spec, split["repeat"])
        found |= {(split["repeat"], ids[place]): answers[place] for place in held}
    return np.array([found[row["repeat"], "/".join(row[name] for name in KEY)] for row in rows])


def on_held(
    task: ChallengeTask, people: Mapping[str, Any], tested: Mapping[str, tuple[Path, str]], data: Path, out: Path
) -> list[str]:
    """The bundle on people whom neither pre-training nor fine-tuning has seen, beside volumes of the same people."""
    where = out / "held"
    laid_out(task, tested, where / "data")
    write_tables(task, tested, data, where)
    named = [f"challenge={task.challenge}", f"task={task.name}"]
    run("convert", *named, f"root={where / 'data'}", f"out={where / 'manifest.csv'}")
    words = [f"bundle={out / 'run' / 'bundle'}", f"manifest={where / 'manifest.csv'}", f"out={where / 'scores'}"]
    run("evaluate", *named, *words)
    document = json.loads((out / "run" / "results.json").read_text())
    spec, primary = TaskSpec.from_dict(document["task"]), document["primary"]
    with (where / "scores" / "cases.csv").open(newline="", encoding="utf-8") as table:
        cases = {"/".join(row[name] for name in KEY): row for row in csv.DictReader(table)}
    ids = [f"{task.id}/sub_{number}/ses_1" for number in range(1, len(tested) + 1)]
    truth, answers = (np.array([float(cases[who][name]) for who in ids]) for name in ("truth", "answer"))
    learned = [f"{task.id}/sub_{number}/ses_1" for number in range(1, len(people) + 1)]
    right = np.array([float(answer) for _, answer in people.values()])
    lines = []
    for name, title in TABLES.items():
        x = volumes_of([(out / f"{name}.csv", learned), (where / f"{name}.csv", ids)])
        parts = [(range(len(learned)), range(len(learned), len(x)))]
        who = [f"learned {one}" for one in learned] + ids
        found = linear_answers(x, np.concatenate([right, truth]), who, parts, spec, 0)[len(learned) :]
        rows = np.column_stack([1 - answers, answers]) if spec.classes else answers
        told = [truth, rows, found]
        lines += ["held people: " + line for line in compared(spec, primary, told, ids, ("the bundle", title))]
    return lines


def given(spec: TaskSpec, answers: Sequence[Sequence[float]]) -> np.ndarray:
    """[N, K] as scores take them: [N] of values."""
    array = np.array(answers, dtype=np.float64)
    return array if spec.classes else array[:, 0]


def compared(
    spec: TaskSpec, primary: str, told: Sequence[np.ndarray], subjects: Sequence[str], names: tuple[str, str]
) -> list[str]:
    """A line: both scores and their difference. ``told``: truth, the one's answers, the other's."""
    metric, (truth, mine, other) = answer_score(spec, primary), told
    strata = [str(t) for t in truth] if spec.classes else None
    own, alone = (bootstrap(metric, truth, x, groups=subjects, seed=0, strata=strata) for x in (mine, other))
    apart = paired_bootstrap(metric, truth, mine, other, groups=subjects, seed=0, strata=strata)
    p = paired_permutation(metric, truth, mine, other, groups=subjects, seed=0)
    first, second = (f"{name} {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for name, one in zip(names, (own, alone)))
    return [
        f"{primary}: {first}, {second}: {apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}], p {p:.3g}, "
        f"{len(truth)} answers about {len(set(subjects))} people"
    ]


if __name__ == "__main__":
    main()
