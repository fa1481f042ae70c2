"""Evidence for a backbone file: whether it is a better start than fresh weights; one protocol for any, one command.

    python scripts/evidence/foundation.py --backbone FILE --data DATA3D --out DIR [--questions ...] [--seeds 5]
        [--budget-hours 10] [--tables-only]

A run is the unit. Each is one training at a constant rate whose moving average is tested after 60, 200, 600 and 2,000
steps; every start has as many runs, from the same seeds: the same people to learn from, the same patches in the same
order. Starts are fresh weights of the file's own network (scratch), the file's encoder, and its encoder and decoder,
each as fine-tuning begins: lengths of filters restored, the last layer of all of them a linear model of the features.
Each has its own rate, the best of as many trials, on people of the training side who are neither trained on nor tested
afterwards. Tests are of people of the side ``held`` of foundation/split.csv alone. Intervals are 95 %, over runs and
people together (scoring/intervals.crossed_bootstrap).

Questions:
    hippocampus  MSD task 4 at 1 mm, manual labels, 5 people to learn from
    lesions      FLAIR at 1.5 mm: learned from the only patient of the training side (open MS 07), tested on one patient
                 each of four sets; the rates are those of the hippocampus, for there is nobody to try them on
    tissues      CSF, grey and white matter at 2 mm from 1, 5 and 10 T1s (1 and 10: the first half of the steps). The
                 labels are DLMUSE's, which the pre-training may have had of other people and of those learned from: the
                 same source of labels
    contrast     the runs of tissues with 5 people, tested on T2 and FLAIR as well: rendered by synthesis/contrast from
                 the T1s of held people, and real ones; beside them fresh weights that see renderings of their own five
                 label maps, painted as in pre-training (rendered; its rate is tried on T1s like all others)
    whole_head   age and sex of IXI and of ds002748 at 2 mm, 10 and more people to learn from: what fine-tuning would
                 ship, beside every candidate. The encoder is frozen, so there are no steps and no rates
    one_pass     no training: one head at 1 mm in windows and in one pass

Every run leaves a small JSON in DIR, so the same command goes on where it was interrupted, and --tables-only makes the
tables of what is there. Runs from scratch serve every file of one network. Before the first run the hours are
projected; more than --budget-hours core-hours are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import foundation_people as data
import foundation_whole_head as whole_head
import torch
from foundation_one_pass import one_pass
from foundation_runs import Family, Job, Start, best_rate, cost, is_done, measured, perform, recorded, starts_of
from foundation_tables import tables
from lightning.fabric import Fabric

from brainfm.comparison.people import People, drawn
from brainfm.errors import BrainfmError, ConfigError
from brainfm.files import write_whole
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, spacing_note
from brainfm.seen import overlap
from brainfm.tasks.segmentation.cases import find_cases
from brainfm.tasks.segmentation.settings import SegmentationSettings
from brainfm.tasks.segmentation.study import SegmentationStudy
from brainfm.training.warm_start import so_far

QUESTIONS = ("hippocampus", "lesions", "tissues", "contrast", "whole_head", "one_pass")
STARTS = ("scratch", "encoder", "decoder", "rendered")
FAMILY = {"hippocampus": "hippocampus", "lesions": "lesions", "tissues": "tissues", "contrast": "tissues"}
SHOTS = {"hippocampus": (5,), "lesions": (1,), "tissues": (1, 5, 10), "contrast": (5,)}
HEADLINE = {"hippocampus": 5, "lesions": 1, "tissues": 5}  # shots whose runs go all the way, others the first half
_TRIAL_SEED = 1000


# ---- what is asked ---------------------------------------------------------------------------------------------------


def setting_of(name: str, args: argparse.Namespace) -> data.Setting:
    """As it stands, or smaller to try the command out."""
    setting = data.SETTINGS[name]
    return replace(setting, tested=min(setting.tested, args.tested)) if args.tested else setting


def family_of(name: str, setting: data.Setting, people: People, args: argparse.Namespace) -> Family:
    """A family with its store, which is made where it is not there."""
    store = data.store_of(name, setting, args.data, args.out / "data", people)
    asked = SegmentationSettings(
        target=setting.target, contrasts=(setting.contrast,), values=tuple(setting.values), patch_vox=setting.patch_vox
    )
    question = SegmentationStudy(store, asked, clean=False)
    question.settle(setting.patch_vox)
    tests = data.tests_of(store, question.cases, people.held, setting.contrast, setting)
    trials = data.tests_of(store, question.cases, people.trial, "trial", setting)
    if name != "tissues":
        return Family(name, setting, store, question, tuple(tests), tuple(trials))
    others: list[data.Test] = []
    for word in data.RENDERED:
        others += data.tests_of(store, find_cases(store, [word], setting.target)[0], people.held, word, setting)
    pairs = data.pair_tests(data.pairs_store(args.data, args.out / "data"))
    pairs = [test for test in pairs if test.subject in real_of(args)]
    return Family(name, setting, store, question, tuple(tests), tuple(trials), tuple(others), tuple(pairs))


def real_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Held people with real scans of several contrasts."""
    return data.REAL[: args.tested] if args.tested else data.REAL


def trials_of(name: str, setting: data.Setting, people: People, start: Start, args: argparse.Namespace) -> list[Job]:
    """As many for every start: each rate, each draw of people."""
    jobs = []
    for rate in args.rates:
        for seed in range(_TRIAL_SEED, _TRIAL_SEED + args.draws):
            trained = tuple(drawn(people.trial, setting.trial[1], seed))
            jobs.append(Job(name, start.name, start.mark, seed, trained, tuple(args.trial_reads), rate, trial=True))
    return jobs


def runs_of(question: str, starts: Iterable[Start], people: People, args: argparse.Namespace) -> list[Job]:
    """The runs of a question, without their rates: seed by seed, so that what is there can always be compared."""
    family, jobs = FAMILY[question], []
    for seed in range(args.seeds):
        for shots in SHOTS[question]:
            headline = shots == HEADLINE[family]
            reads = tuple(args.reads if headline else args.reads[: max(1, len(args.reads) // 2)])
            wide = headline and family == "tissues"
            for start in starts:
                if start.name == "rendered" and question != "contrast":
                    continue
                trained = tuple(drawn(people.pool, shots, seed))
                jobs.append(Job(family, start.name, start.mark, seed, trained, reads, wide=wide))
    return jobs


# ---- doing it --------------------------------------------------------------------------------------------------------


class Work:
    """What is to be done for some questions, and what it costs. No scan is read before one is needed."""

    def __init__(self, args: argparse.Namespace, loaded: LoadedBackbone) -> None:
        self.args, self.out, self.starts = args, args.out, starts_of(loaded)
        sides, self._families = data.sides(), dict[str, Family]()
        self.settings = {name: setting_of(name, args) for name in data.SETTINGS}
        self.people = {name: data.people_of(sides, setting) for name, setting in self.settings.items()}
        self.trials: dict[tuple[str, str], list[Job]] = {}
        self.runs: list[Job] = []
        for question in (question for question in args.questions if question in FAMILY):
            name = FAMILY[question]
            asked = args.starts or list(self.starts)
            starts = [self.starts[start] for start in asked if start != "rendered" or question == "contrast"]
            tried = self.settings[name].rates_of
            for start in starts:
                self.trials[tried, start.name] = trials_of(tried, self.settings[tried], self.people[tried], start, args)
            self.runs += [job for job in runs_of(question, starts, self.people[name], args) if job not in self.runs]
        self.runs.sort(key=lambda job: job.seed)

    def family(self, name: str) -> Family:
        if name not in self._families:
            self._families[name] = family_of(name, self.settings[name], self.people[name], self.args)
        return self._families[name]

    def left(self) -> tuple[list[Job], list[Job]]:
        """Trials and runs that are not done. Raises: ConfigError where one was made with another setting."""
        trials = [job for jobs in self.trials.values() for job in jobs]
        trials = [job for job in trials if not is_done(job, self.family(job.family), self.out)]
        if trials:
            return trials, [job for job in self.runs if recorded(job, self.out) is None]
        return [], [job for job in self.rated() if not is_done(job, self.family(job.family), self.out)]

    def rated(self) -> list[Job]:
        """The runs with the rates that the trials have chosen."""
        found = []
        for job in self.runs:
            tried = self.settings[job.family].rates_of
            found.append(replace(job, rate=best_rate(self.trials[tried, job.start], self.out)))
        return found

    def projected(self) -> tuple[list[str], float]:
        """A line for each kind of run that is left, and core-hours in all."""
        speeds: dict[tuple[str, str], tuple[float, float]] = {}
        sums: dict[tuple[str, str, str], list[float]] = {}
        trials, runs = self.left()
        for job in (*trials, *runs):
            family, people = self.family(job.family), self.people[job.family]
            kind = "rendered" if job.start == "rendered" else "scratch"
            if (job.family, kind) not in speeds:
                someone = people.pool[: min(2, len(people.pool))]
                speeds[job.family, kind] = measured(family, self.starts[kind], someone)
            seconds = cost(job, family, *speeds[job.family, kind])
            key = (job.family, "trials" if job.trial else f"{len(job.trained)} shots", job.start)
            sums.setdefault(key, []).append(seconds / 3600)
        lines = [f"  {' '.join(key)}: {len(found)} runs, {sum(found):.2f} h" for key, found in sorted(sums.items())]
        lines += [f"  {name} ({kind}): {1000 * a:.0f} ms a step, {1000 * b:.0f} ms a window"
                  for (name, kind), (a, b) in sorted(speeds.items())]  # fmt: skip
        return lines, sum(sum(found) for found in sums.values())

    def do(self, fabric: Fabric) -> bool:
        """Whether all is done; else it was interrupted, and what was begun is saved."""
        for jobs in (self.left()[0], None):
            for job in self.left()[1] if jobs is None else jobs:
                family = self.family(job.family)
                record = perform(job, family, self.starts[job.start], self.out, fabric)
                if record is None:
                    print(f"stopped in {job.name} and saved; the same command goes on", flush=True)
                    return False
                last = record["reads"].get(str(job.reads[-1]), {})
                parts = ", ".join(f"{part} {_mean(values):.3f}" for part, values in last.items() if part != "pairs")
                print(f"{job.name}: {parts} after {job.reads[-1]} steps, {record['core_seconds']:.0f} s", flush=True)
        return True


def _mean(values: dict[str, dict[str, float]]) -> float:
    return sum(v["dice"] for v in values.values()) / len(values)


def run(args: argparse.Namespace, loaded: LoadedBackbone) -> int:
    """Raises: ConfigError where it would take more than the budget."""
    work = Work(args, loaded)
    starts = [work.starts[name] for name in args.starts or work.starts if name != "rendered"]
    heads = whole_head.asks(starts, args.seeds, args.tested) if "whole_head" in args.questions else []
    todo = [ask for ask in heads if not args.tables_only and not ask.is_done(args.out)]
    if not args.tables_only and (work.runs or todo):
        lines, hours = work.projected()
        heads_hours = whole_head.projected(todo, work.starts)
        lines += [f"  whole_head: {len(todo)} answers, {heads_hours:.2f} h"] * bool(todo)
        hours += heads_hours
        begun = any((args.out / "runs").glob("*.json"))
        print(f"projected: {hours:.1f} core-hours", *lines, sep="\n", flush=True)
        if hours > args.budget_hours and not begun:
            raise ConfigError(
                f"--budget-hours {args.budget_hours:g}: the runs would take {hours:.1f} core-hours on this machine; "
                "expected fewer --seeds, --questions or --reads, or a larger budget"
            )
        fabric = Fabric(accelerator=args.accelerator, devices=1, precision="32-true")
        if not work.do(fabric):
            return 0
    whole_head.answer(todo, work.starts, args.data, args.out, torch.device("cpu"))
    text = heading(args, loaded, work, {key for ask in heads for key in ask.held})
    text += tables(work.trials, work.runs, args.out) + whole_head.tables(heads, args.out)
    if "one_pass" in args.questions:
        text += one_pass(loaded, args.data, args.out, cached_only=args.tables_only)
    write_whole(args.out / f"tables_{loaded.fingerprint[:8]}.md", ("\n".join(text) + "\n").encode())
    print("\n".join(text))
    return 0


def heading(args: argparse.Namespace, loaded: LoadedBackbone, work: Work, held: set[str]) -> list[str]:
    """What is tested, and whether its pre-training saw those who are tested."""
    names = dict.fromkeys(job.family for job in work.runs)
    held |= {key for name in names for key in work.people[name].held}
    held |= set(real_of(args)) if "tissues" in names else set()
    seen = overlap(loaded.subjects, held) if held else None
    lines = [f"## Backbone {loaded.fingerprint[:8]}: {so_far(loaded)['steps']} steps of {loaded.objective['name']}", ""]
    if loaded.subjects is None:
        lines.append("The file does not say whom it has seen.")
    lines += [f"{str(seen)[:1].upper()}{str(seen)[1:]}."] if seen else []
    for name in names:
        learned = overlap(loaded.subjects, {key for job in work.runs if job.family == name for key in job.trained})
        lines += [f"{name}: of {learned.of} people learned from it has seen {learned.seen}."] if learned else []
        note = spacing_note((work.settings[name].spacing_mm,) * 3, loaded.voxel_mm)
        lines += [f"{name}: {note}."] if note else []
    files = [file for folder in ("runs", "trials", "whole_head") for file in (args.out / folder).glob("*.json")]
    spent = sum(json.loads(file.read_text())["core_seconds"] for file in files)
    return [*lines, f"{len(files)} runs and trials lie in the folder, {spent / 3600:.2f} core-hours.", ""]


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True, help="a backbone file")
    parser.add_argument("--data", type=Path, required=True, help="the folder of data sets")
    parser.add_argument("--out", type=Path, required=True, help="records, stores and tables")
    parser.add_argument("--questions", nargs="+", default=list(QUESTIONS), choices=QUESTIONS)
    parser.add_argument("--starts", nargs="+", choices=STARTS, help="not all that the file offers; scratch serves any")
    parser.add_argument("--seeds", type=int, default=5, help="runs of every start")
    parser.add_argument("--budget-hours", type=float, default=10, help="core-hours for all of it")
    parser.add_argument("--reads", type=int, nargs="+", default=[60, 200, 600, 2000], help="steps")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="that each start tries")
    parser.add_argument("--draws", type=int, default=2, help="trials of each rate")
    parser.add_argument("--trial-reads", type=int, nargs="+", default=[60, 200], help="steps")
    parser.add_argument("--tested", type=int, default=0, help="held people of a question at most; 0: as it has them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", default="cpu", help="cpu | gpu | auto")
    parser.add_argument("--tables-only", action="store_true", help="no run: the tables of what is there")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    args.data, args.out = (Path(os.path.abspath(folder)) for folder in (args.data, args.out))
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.seeds < 1 or sorted(set(args.reads)) != args.reads or sorted(set(args.trial_reads)) != args.trial_reads:
            raise ConfigError(f"--seeds {args.seeds} --reads {args.reads}: expected 1 seed or more, and rising steps")
        return run(args, load_backbone(args.backbone))
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
