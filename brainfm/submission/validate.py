"""Validation of a submission: what the organisers would say, and more; run on cases in a sandbox, a sentence a check.

The organisers' checks are those of their published validators; ``stricter`` ones are ours, each for something that has
cost a participant a submission or a score (shared facts in the README of each challenge).
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from brainfm.errors import ConfigError
from brainfm.files import check_writable, write_table, write_whole
from brainfm.submission import sandbox
from brainfm.submission.cases import Case
from brainfm.submission.challenge import ChallengeTask
from brainfm.submission.outputs import ORGANISERS, STRICTER, Check, check_output, in_ras, value_of
from brainfm.submission.sandbox import Ran

REPORT, TABLE = "validation.json", "validation.csv"
_APP = "/app/predict.py"
_TEMPORARY = "tmp"  # below the folder of a run: what a container has as /tmp
_MOST_SAID = 160  # characters of what a program printed


@dataclass(frozen=True)
class Launcher:
    """How a submission is started.

    Attributes:
        kind: ``command`` (a program on this machine), ``sif`` (Apptainer) or ``image`` (Docker).
        what: the program's words, the file, or the tag.
        gpu: whether the container gets the GPU.
    """

    kind: str
    what: str
    gpu: bool = False

    def words(self, case: Case, output: Path, folder: Path) -> list[str]:
        """The command line that answers one case.

        In a container ``/input``, ``/output`` and ``/tmp`` are bound, and ``/watch`` with the hook of `sandbox.run`.

        Args:
            folder: of the run.
        """
        if self.kind == "command":
            inputs = [word for flag, file in case.files.items() for word in (f"--{flag}", str(file))]
            return [*shlex.split(self.what), *inputs, "--output", str(output)]
        inputs = [word for flag, file in case.files.items() for word in (f"--{flag}", f"/input/{file.name}")]
        call = ["python", _APP, *inputs, "--output", f"/output/{output.name}"]
        places = {
            "/input": (case.folder, "ro"), "/output": (output.parent, "rw"), "/tmp": (folder / _TEMPORARY, "rw"),
            "/watch": (folder / sandbox.HOOK, "rw"),
        }  # fmt: skip
        watch = ["PYTHONPATH=/watch", f"BRAINFM_WATCH=/watch/{sandbox.LOG}", "BRAINFM_WATCH_CUT=0"]
        bind, env = ("--bind", "--env") if self.kind == "sif" else ("-v", "-e")
        flags = [word for to, (source, how) in places.items() for word in (bind, f"{source.absolute()}:{to}:{how}")]
        flags += [word for one in watch for word in (env, one)]
        if self.kind == "sif":
            return ["apptainer", "exec", *(["--nv"] if self.gpu else []), *flags, self.what, *call]
        shut = ["--rm", "--network", "none", "--read-only", "--entrypoint", ""]
        return ["docker", "run", *shut, *(["--gpus", "all"] if self.gpu else []), *flags, self.what, *call]


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        task: id of the challenge's task.
        checks: all that were made.
        seconds: case -> time it took.
        isolation: how the network was kept away.
    """

    task: str
    checks: tuple[Check, ...]
    seconds: dict[str, float]
    isolation: str

    @property
    def accepted(self) -> bool:
        """Whether the organisers would have nothing to say."""
        return all(check.passed for check in self.checks if check.whose == ORGANISERS)

    @property
    def passed(self) -> bool:
        """Whether nobody has anything to say."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


def validate(
    task: ChallengeTask,
    launcher: Launcher,
    cases: Sequence[Case],
    out: Path,
    *,
    limit_s: float = 120.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdict:
    """Runs a submission on every case and writes ``validation.json`` and, a line a check, ``validation.csv``.

    Args:
        cases: `cases.made`, `cases.given`, or both.
        out: a folder for outputs and the report; outputs of before are replaced.
        limit_s: how long a case may take.
        progress: called with (cases done, cases in all).

    Raises: as check_start.
    """
    check_start(task, launcher, out, [case.name for case in cases], cases, limit_s)
    checks = structure(launcher)
    answers: dict[str, Path] = {}
    seconds: dict[str, float] = {}
    for number, case in enumerate(cases):
        progress(number, len(cases))
        output = out / case.name / "output" / f"{case.name}{task.ending}"
        shutil.rmtree(out / case.name, ignore_errors=True)  # see _check_free
        for place in (output.parent, out / case.name / _TEMPORARY):
            place.mkdir(parents=True)
        before = _digests(case)
        ran = sandbox.run(
            launcher.words(case, output, out / case.name), out / case.name, limit_s=limit_s, writable=[output.parent],
            cut=launcher.kind == "command",
        )  # fmt: skip
        seconds[case.name] = ran.seconds
        found = _behaved(case, ran, launcher, limit_s)
        found += _refusal(case, ran, output) if case.refused else _answer(task, case, ran, output)
        changed = _digests(case) != before
        found.append(Check.of("inputs", case.name, not changed, "the input files were changed", STRICTER))
        if not case.refused and all(check.passed for check in found if check.whose == ORGANISERS):
            answers[case.name] = output
        checks += found
    progress(len(cases), len(cases))
    checks += _compared(task, cases, answers)
    verdict = Verdict(task.id, tuple(checks), seconds, _isolation(launcher))
    report = {**asdict(verdict), "accepted": verdict.accepted, "passed": verdict.passed}
    write_whole(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    columns = ["case", "check", "whose", "passed", "sentence", "case_seconds"]
    rows = [[c.case, c.name, c.whose, int(c.passed), c.sentence, _seconds(seconds.get(c.case))] for c in checks]
    write_table(out / TABLE, columns, rows)
    return verdict


def check_start(
    task: ChallengeTask, launcher: Launcher, out: Path, names: Sequence[str], cases: Sequence[Case], limit_s: float
) -> None:
    """For callers who want to know before they make cases.

    Args:
        names: of all cases.
        cases: those that are there already; their files must not lie where outputs go.

    Raises:
        ConfigError: where the submission cannot even be started, there is no case, a case gets no time, or a folder of
            outputs holds what was not made here.
        FileError: where nothing can be written into ``out``.
    """
    if not 0 < limit_s < math.inf:
        raise ConfigError(f"limit_s={limit_s:g}: expected seconds above 0 that a case may take")
    check_launcher(launcher)
    if not names:
        raise ConfigError(f"no case to run {task.id} on: expected cases=[plain,...] that the task has, or given=FOLDER")
    for name in names:
        _check_free(out / name, cases)
    check_writable(out)


def _check_free(folder: Path, cases: Sequence[Case]) -> None:
    """Raises: ConfigError where a folder of outputs, which is emptied, holds an input or anything else of a user."""
    where = folder.resolve()
    within = [file for case in cases for file in case.files.values() if where in file.resolve().parents]
    own = not folder.exists() or (folder / sandbox.HOOK).is_dir() or (folder.is_dir() and not any(folder.iterdir()))
    if within or not own:
        raise ConfigError(
            f"{folder}: outputs of a case are written there, and it holds {within[0] if within else 'something else'}, "
            "expected another out="
        )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def check_launcher(launcher: Launcher) -> None:
    """Raises: ConfigError where nothing could be run: no such program, engine, daemon or image."""
    if launcher.kind == "command":
        try:
            words = shlex.split(launcher.what)
        except ValueError as error:
            raise ConfigError(
                f"command={launcher.what}: cannot be split into words ({str(error).lower()}), expected closed quotes"
            ) from None
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"command={launcher.what}: {words[0] if words else 'nothing'} is no program here")
        scripts = [word for word in words[1:] if word.endswith(".py")]
        missing = [word for word in scripts if not Path(word).is_file()]
        if missing:
            raise ConfigError(f"command={launcher.what}: {missing[0]} is no file")
        return
    engine = "apptainer" if launcher.kind == "sif" else "docker"
    if shutil.which(engine) is None:
        raise ConfigError(f"{launcher.kind}={launcher.what}: {engine} is not installed, expected command= instead")
    if launcher.kind == "sif":
        path = Path(launcher.what)
        if not path.is_file() or path.suffix != ".sif":
            raise ConfigError(f"sif={path}: expected an Apptainer image, a file that ends in .sif")
    elif not sandbox.succeeds(["docker", "info"]):
        raise ConfigError(f"image={launcher.what}: docker is installed but its daemon does not answer, expected one")
    elif not sandbox.succeeds(["docker", "image", "inspect", launcher.what]):
        raise ConfigError(f"image={launcher.what}: docker has no such image, expected one that is built or loaded")


def structure(launcher: Launcher) -> list[Check]:
    """Whether what the organisers look for is in a container; nothing of a program on this machine."""
    return [] if launcher.kind == "command" else [_inside(launcher, name, words) for name, words in _STRUCTURE]


_STRUCTURE = [
    *((place, ["test", "-e", place]) for place in (_APP, "/app", "/input", "/output")),
    ("python", ["python", "--version"]),
]


def _inside(launcher: Launcher, name: str, words: Sequence[str]) -> Check:
    """Whether a word of the shell succeeds in the container."""
    start = ["apptainer", "exec"] if launcher.kind == "sif" else ["docker", "run", "--rm", "--entrypoint", ""]
    with tempfile.TemporaryDirectory(prefix="brainfm") as folder:
        ran = sandbox.run([*start, launcher.what, *words], Path(folder), limit_s=120, cut=False)
    return Check.of("structure", "", ran.code == 0, f"{name} is not there; {_last(ran.err)}")


# ---- one case --------------------------------------------------------------------------------------------------------


def _behaved(case: Case, ran: Ran, launcher: Launcher, limit_s: float) -> list[Check]:
    """Time, network and files, whatever the answer."""
    late = ran.code is None
    checks = [Check.of("time", case.name, not late, f"took longer than {limit_s:g} s and was stopped")]
    if not ran.watched:
        if launcher.kind == "command":
            said = "the audit hook was not loaded (not Python, or started with -S, -I or -E): sockets are unknown"
            checks.append(Check.of("watched", case.name, False, said, STRICTER))
        return checks
    internet = [what for what in ran.sockets if "local" not in what and not what.startswith(("to /", "to b'"))]
    said = f"tried to reach the network ({'; '.join(internet[:3])}); there is none"
    checks.append(Check.of("no network", case.name, not internet, said))
    local = [what for what in ran.sockets if what not in internet]
    said = f"opened {'; '.join(local[:2])}: a submission was marked invalid for that"
    checks.append(Check.of("no local socket", case.name, not local, said, STRICTER))
    said = f"wrote {', '.join(ran.writes[:3])}, expected writes to /output and /tmp alone: the image is read-only"
    checks.append(Check.of("writes", case.name, not ran.writes, said, STRICTER))
    return checks


def _answer(task: ChallengeTask, case: Case, ran: Ran, output: Path) -> list[Check]:
    checks = [Check.of("exit code", case.name, ran.code == 0, f"exit code {ran.code}: {_last(ran.err or ran.out)}")]
    if ran.code != 0:
        return checks
    checks += check_output(task, case.name, output, list(case.files.values()))
    extra = sorted(p.name for p in output.parent.iterdir() if p != output)
    said = f"{', '.join(extra[:3])} lies beside the output, expected one file"
    checks.append(Check.of("one file", case.name, not extra or not output.is_file(), said, STRICTER))
    return checks


def _refusal(case: Case, ran: Ran, output: Path) -> list[Check]:
    """A file that cannot be read: an exit code, one sentence, no output that looks like a result."""
    lines = [line for line in ran.err.splitlines() if line.strip()]
    traced = "Traceback (most recent call last)" in ran.err
    said = f"{len(lines)} lines on stderr{' with a traceback' if traced else ''}, expected one sentence"
    return [
        Check.of("refused", case.name, ran.code not in (0, None), f"exit code {ran.code}, expected not 0", STRICTER),
        Check.of("one sentence", case.name, len(lines) == 1 and not traced, said, STRICTER),
        Check.of("no output", case.name, not output.is_file(), f"{output.name} was written all the same", STRICTER),
    ]


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:_MOST_SAID] if lines else "nothing was printed"


def _digests(case: Case) -> list[str]:
    return [hashlib.blake2b(path.read_bytes()).hexdigest() for path in case.files.values()]


def _isolation(launcher: Launcher) -> str:
    if launcher.kind == "command":
        return sandbox.isolation()
    if launcher.kind == "image":
        return "no network: docker run --network none, with a read-only root"
    return "the network is NOT cut: apptainer exec as the organisers call it; try the staged folder with command= too"


# ---- between cases ---------------------------------------------------------------------------------------------------


def _compared(task: ChallengeTask, cases: Sequence[Case], answers: dict[str, Path]) -> list[Check]:
    checks = []
    for case in cases:
        if case.like in answers and case.name in answers:
            checks.append(_same(task, case, answers[case.like], answers[case.name]))
    if task.kind == "embedding" and answers:
        sizes = {len(value_of(task, path).ravel()) for path in answers.values()}
        said = f"embeddings of {', '.join(map(str, sorted(sizes)))} numbers, expected one length"
        checks.append(Check.of("one length", "", len(sizes) == 1, said))
    return checks


def _same(task: ChallengeTask, case: Case, first: Path, second: Path) -> Check:
    if case.name == "again":
        same = first.read_bytes() == second.read_bytes()
        return Check.of("repeats", case.name, same, "another answer to the same files", STRICTER)
    same, said = _alike(task, first, second)
    return Check.of("orientation", case.name, same, f"{said} where the scan is stored in another axis order", STRICTER)


def _alike(task: ChallengeTask, first: Path, second: Path) -> tuple[bool, str]:
    if task.kind == "segmentation":
        a, b = in_ras(first), in_ras(second)
        if a.shape != b.shape:
            return False, "another shape"
        share = float((a == b).mean())
        return share >= 0.999, f"{1 - share:.2%} of the voxels change"
    a, b = (np.atleast_1d(value_of(task, path)).astype(np.float64).ravel() for path in (first, second))
    if a.shape != b.shape:
        return False, "another length"
    apart = float(np.abs(a - b).max() / max(1e-6, float(np.abs(a).max())))
    return apart <= 0.01, f"the answer changes by {apart:.1%}"


# ---- words -----------------------------------------------------------------------------------------------------------


def describe(verdict: Verdict) -> list[str]:
    """A table for people: one line a check that holds everywhere, one line a failure."""
    lines = [f"{verdict.task}: {verdict.isolation}"]
    names = dict.fromkeys((check.name, check.whose) for check in verdict.checks)
    for name, whose in names:
        made = [check for check in verdict.checks if (check.name, check.whose) == (name, whose)]
        failed = [check for check in made if not check.passed]
        for check in failed:
            lines.append(f"FAILED  {whose:<10}  {name:<15}  {f'{check.case}: ' if check.case else ''}{check.sentence}")
        if not failed:
            lines.append(f"ok      {whose:<10}  {name:<15}  {_covered(made)}")
    if verdict.seconds:
        slowest = max(verdict.seconds, key=lambda case: verdict.seconds[case])
        lines.append(f"slowest case: {slowest}, {verdict.seconds[slowest]:.1f} s")
    lines.append(_judged(verdict))
    return lines


def _covered(made: Sequence[Check]) -> str:
    cases = [check.case for check in made if check.case]
    return f"{len(cases)} case{'s' if len(cases) != 1 else ''}" if cases else ""


def _judged(verdict: Verdict) -> str:
    if verdict.passed:
        return "passed: the organisers would accept it, and so would we"
    wrong = len(verdict.failures)
    if verdict.accepted:
        return f"the organisers would accept it; {wrong} stricter check{'s' if wrong > 1 else ''} failed"
    return f"NOT accepted: {wrong} check{'s' if wrong > 1 else ''} failed"
