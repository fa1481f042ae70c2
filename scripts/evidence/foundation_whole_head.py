"""Age and sex from whole heads, few to learn from: what fine-tuning would ship for the starts
of scripts/evidence/foundation.py. Below a hundred people nothing is trained: answers are linear in what the frozen
network sees, in volumes of the regions that the file's decoder tells, and in those of label maps where there are any.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from foundation_people import Setting, people_of, prepared, sides
from foundation_runs import Start, encoder_of
from foundation_tables import TITLES, cell, compared

from brainfm.comparison.people import drawn
from brainfm.data import layouts
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.files import write_whole
from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import crossed_bootstrap
from brainfm.tasks.study import Place, Split
from brainfm.tasks.task import Task
from brainfm.tasks.whole_head.candidates import CANDIDATES
from brainfm.tasks.whole_head.study import WholeHeadStudy
from brainfm.verbs.compose import resolve

SHOTS: dict[str, tuple[int | None, ...]] = {"ds002748_2mm": (10, None), "ixi2mm": (10, 20, 50, None)}  # None: all
TARGETS = {"age": "regression", "sex": "classification"}
SPACING_MM = 2.0
MOST_VOXELS = 64**3  # of the view, as fine-tuning has it on a CPU


@dataclass(frozen=True)
class Ask:
    """One answer to a target of held people, from so many shots."""

    dataset: str
    target: str
    start: str
    mark: str
    seed: int
    trained: tuple[str, ...]
    held: tuple[str, ...]

    def file(self, out: Path) -> Path:
        words = (self.dataset, self.target, self.start, self.mark, f"{len(self.trained)}shots", f"seed{self.seed}")
        return out / "whole_head" / f"{'_'.join(words)}.json"

    def is_done(self, out: Path) -> bool:
        """Raises: ConfigError where it was asked of other people."""
        if not self.file(out).exists():
            return False
        there = json.loads(self.file(out).read_text())["asked"]
        if there != [sorted(self.trained), sorted(self.held)]:
            raise ConfigError(f"{self.file(out)}: was asked of other people; expected the same, or another folder")
        return True


def asks(starts: Sequence[Start], seeds: int, tested: int) -> list[Ask]:
    """Of one network after the other.

    Args:
        tested: held people at most, and the fewest shots alone, to try it out; 0: all.
    """
    found, split = [], sides()
    for dataset, shots in SHOTS.items():
        setting = Setting("", (), (), "t1", SPACING_MM, (dataset,), (0, 0), "", tested or 1000, pool=1000)
        people = people_of(split, setting)
        for target in TARGETS:
            for start in starts:
                for seed in range(seeds):
                    for number in shots[:1] if tested else shots:
                        trained = tuple(drawn(people.pool, number or len(people.pool), seed))
                        found.append(Ask(dataset, target, start.name, start.mark, seed, trained, people.held))
    return found


def store_of(dataset: str, data: Path, out: Path) -> Store:
    """All T1s of a data set, with age and sex, and the parcellation of those that have one."""
    more: dict[str, Any] = {}
    if dataset == "ixi2mm":
        more = {
            "labels": {"dlmuse": "*_DLMUSE_dseg.nii.gz"}, "participants": data / dataset / "participants_n181.csv",
        }  # fmt: skip
    return prepared(out / f"heads_{dataset}", layouts.find(data / dataset, **more).scans, SPACING_MM, "header")


@torch.no_grad()
def projected(todo: Sequence[Ask], starts: dict[str, Start]) -> float:
    """Core-hours: the passes of heads through networks, each timed once. A network sees a person once a question."""
    passes: dict[str, set[tuple[str, ...]]] = {}
    for ask in todo:
        network = str(ask.seed) if starts[ask.start].file is None else ""
        seen = {(ask.dataset, ask.target, network, who) for who in (*ask.trained, *ask.held)}
        passes.setdefault(ask.start, set()).update(seen)
    seconds, image = 0.0, torch.zeros(1, 1, *(round(MOST_VOXELS ** (1 / 3)),) * 3)
    for name, seen in passes.items():
        network, file, began = encoder_of(starts[name], 0).eval(), starts[name].file, time.process_time()
        maps = network.features(image)
        if name == "decoder" and file is not None and file.decoder is not None:
            file.decoder(maps)
        seconds += len(seen) * (time.process_time() - began)
    return seconds / 3600


def answer(todo: Sequence[Ask], starts: dict[str, Start], data: Path, out: Path, device: torch.device) -> None:
    """Leaves a record of each."""
    for (dataset, target), some in _grouped(todo):
        store = store_of(dataset, data, out / "data")
        asked = resolve("finetune", [f"task={TARGETS[target]}", f"task.target={target}", "store=-", "run=-",
                                      "backbone_from=none"])  # fmt: skip
        question = WholeHeadStudy(store, asked.task)
        network = encoder_of(starts[some[0].start], 0)
        question.settle(question.patch(network, MOST_VOXELS))
        for ask in some:
            began = time.process_time()
            record = _answered(ask, question, starts[ask.start], out, device)
            record["core_seconds"] = time.process_time() - began
            write_whole(ask.file(out), (json.dumps(record, indent=1) + "\n").encode())
            print(f"{ask.file(out).stem}: {record['chosen']}, {record['core_seconds']:.0f} s", flush=True)


def _grouped(todo: Sequence[Ask]) -> Iterator[tuple[tuple[str, str], list[Ask]]]:
    for key in dict.fromkeys((ask.dataset, ask.target) for ask in todo):
        yield key, [ask for ask in todo if (ask.dataset, ask.target) == key]


def _answered(ask: Ask, question: WholeHeadStudy, start: Start, out: Path, device: torch.device) -> dict[str, Any]:
    cases = {case.session.subject_key: case for case in question.cases}
    trained, held = ([cases[key] for key in sorted(keys) if key in cases] for keys in (ask.trained, ask.held))
    split = Split(0, 0, tuple(trained), (), tuple(held))

    def fresh() -> Task:
        return question.task(encoder_of(start, ask.seed), trained, start.file if start.name == "decoder" else None)

    folder = out / "unfinished" / ask.file(out).stem
    rows, _ = question.conclude(None, fresh, split, Place(device, None), folder, ask.seed)
    said = {row["subject"]: {"truth": row["truth"], **row["candidates"]} for row in rows}
    return {"asked": [sorted(ask.trained), sorted(ask.held)], "chosen": rows[0]["chosen"], "answers": said}


# ---- tables ----------------------------------------------------------------------------------------------------------


def errors(record: dict[str, Any], candidate: str, target: str) -> dict[str, float]:
    """subject -> years off, or 0 where the sex was told right and 1 where not."""
    found = {}
    for who, row in record["answers"].items():
        truth, given = row["truth"][0], row[candidate]
        found[who] = abs(given[0] - truth) if target == "age" else float(int(np.argmax(given)) != int(truth))
    return found


def _matrix(records: Sequence[dict[str, Any]], candidates: Sequence[str], target: str) -> np.ndarray:
    """[R, S]; ``candidates``: of each record."""
    rows = [errors(record, name, target) for record, name in zip(records, candidates)]
    return np.array([[row[who] for who in sorted(row)] for row in rows])


def tables(asked: Sequence[Ask], out: Path) -> list[str]:
    """Markdown: what is shipped beside every candidate."""
    lines: list[str] = []
    groups: dict[tuple[str, str], dict[int, dict[str, list[dict[str, Any]]]]] = {}
    for ask in asked:
        if ask.file(out).exists():
            record = json.loads(ask.file(out).read_text())
            of = groups.setdefault((ask.dataset, ask.target), {}).setdefault(len(ask.trained), {})
            of.setdefault(ask.start, []).append(record)
    for (dataset, target), shots in groups.items():
        unit = "mean error in years" if target == "age" else "share told wrong (and AUROC of what is shipped)"
        lines += [f"### whole_head: {target} of {dataset}, {unit}", "",
                  "Below a hundred people the encoder is frozen. Shipped: chosen on inner folds of the people learned "
                  "from. Runs that learned from all of them differ in fresh weights and inner folds alone.", "",
                  "| to learn from | start | shipped | " + " | ".join(CANDIDATES[:-1])
                  + " | shipped − scratch's | people | runs |", "|" + "---|" * (len(CANDIDATES) + 5)]  # fmt: skip
        for number, starts in shots.items():
            lines += [_line(number, name, starts, target) for name in starts]
        lines.append("")
    return lines


def _line(number: int, name: str, starts: dict[str, list[dict[str, Any]]], target: str) -> str:
    records = starts[name]
    shipped = _matrix(records, [record["chosen"] for record in records], target)
    cells = [cell(crossed_bootstrap(shipped, seed=0))]
    if target == "sex":
        cells[0] += f" ({np.mean([_auroc(record) for record in records]):.3f})"
    for candidate in CANDIDATES[:-1]:
        there = all(candidate in row for record in records for row in record["answers"].values())
        cells.append(f"{_matrix(records, [candidate] * len(records), target).mean():.3f}" if there else "")
    against = ""
    if name != "scratch" and len(starts.get("scratch", ())) == len(records):
        base = starts["scratch"]
        against = compared(shipped - _matrix(base, [record["chosen"] for record in base], target), of_errors=True)
    count = f"{shipped.shape[1]} | {len(records)}"
    return f"| {number} | {TITLES[name]} | " + " | ".join(cells) + f" | {against} | {count} |"


def _auroc(record: dict[str, Any]) -> float:
    """Of the answers that are shipped; NaN where all who are tested are of one sex."""
    rows = list(record["answers"].values())
    truth, given = (np.array([row[key][place] for row in rows]) for key, place in (("truth", 0), (record["chosen"], 1)))
    return float(auroc(truth, given))
