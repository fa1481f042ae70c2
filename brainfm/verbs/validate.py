"""Say what a challenge's organisers would say to a submission."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from brainfm.errors import ConfigError
from brainfm.settings import VERBATIM
from brainfm.verbs.running import bar

PLACE = 22


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Run a submission on made and on given cases, in a sandbox without network, and look at what it leaves as the
    organisers do, and closer. Exit code 0: passed; 1: rejected; 2: it could not be tried.

      brainfm validate challenge=fomo26 task=task2 command="python submission/task2/app/predict.py" out=validation
      brainfm validate challenge=fomo26 task=task2 sif=fomo26_task2.sif given=FOMO26/Task_2/Task_2 out=validation
    """

    challenge: Annotated[str, "fomo25 | fomo26"]
    task: Annotated[str, "task1, task2, ..."]
    command: Annotated[str | None, "what is started, e.g. python APP/predict.py; flags and files follow", VERBATIM] = (
        None
    )
    sif: Annotated[Path | None, "or an Apptainer image"] = None
    image: Annotated[str | None, "or the tag of a Docker image", VERBATIM] = None
    out: Annotated[Path, "folder for cases, outputs, validation.json and validation.csv"]
    cases: Annotated[
        tuple[str, ...] | None,
        "made ones, of plain, again, alternative, turned, oblique, thick, small, hot, blank, one_blank, few, corrupt, "
        "typical; null: all; []: none",
    ] = None
    given: Annotated[Path | None, "a folder with sessions; those beside which labels/ lies are scored as well"] = None
    most: Annotated[int, "of the given ones, the first in alphabetical order"] = 3
    limit_s: Annotated[float | None, "how long a case may take; null: as the challenge has it"] = None
    gpu: Annotated[bool, "whether a container gets the GPU"] = False
    strict: Annotated[bool, "false: only what the organisers look at decides"] = True
    debug: Annotated[bool, "a traceback in place of the sentence"] = False

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.command, self.sif, self.image)) != 1:
            raise ConfigError("brainfm validate: expected one of command=, sif= and image=")
        if self.most < 1:
            raise ConfigError(f"most={self.most}: expected 1 or more cases")
        if self.cases == () and self.given is None:
            raise ConfigError("cases=[]: expected some, or given=FOLDER")


def run(settings: Settings) -> int:
    from brainfm.submission.cases import KINDS, calls_of, given, made
    from brainfm.submission.challenge import read_challenge
    from brainfm.submission.scores import describe_given, score_given
    from brainfm.submission.validate import Launcher, check_start, describe, validate

    challenge = read_challenge(settings.challenge)
    task = challenge.task(settings.task)
    kind = "command" if settings.command is not None else "sif" if settings.sif is not None else "image"
    launcher = Launcher(kind, str(getattr(settings, kind)), settings.gpu)
    limit_s = challenge.limit_s if settings.limit_s is None else settings.limit_s
    kinds = KINDS if settings.cases is None else settings.cases
    cases = given(task, settings.given, settings.most) if settings.given is not None else []
    check_start(task, launcher, settings.out, [*(case.name for case in cases), *calls_of(task, kinds)], cases, limit_s)
    cases += made(task, settings.out / "cases", kinds)
    with bar("validate", len(cases)) as move:
        verdict = validate(task, launcher, cases, settings.out, limit_s=limit_s, progress=move)
    print("\n".join(describe(verdict)))
    if settings.given is not None:
        print("\n".join(describe_given(task, score_given(task, settings.given, settings.out))))
    return 0 if verdict.passed or (verdict.accepted and not settings.strict) else 1
