"""Runs of a comparison: every model pre-trained and asked, seed by seed; what is there already stays.

OUT/pretrained/MODEL/seed0/   a pre-training, as `brainfm pretrain` leaves it, and cost.json
OUT/frozen/                   answers of linear models of frozen maps, a file a model, task and seed
OUT/tuned/                    fine-tunings, a folder each with answers.json
OUT/trials/                   the same of rates that were tried, on people of the training side alone
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.comparison import cost
from brainfm.comparison.contenders import Contender
from brainfm.comparison.people import drawn
from brainfm.comparison.questions import Question, record, score_of
from brainfm.comparison.settings import CompareSettings
from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.files import write_whole
from brainfm.nets.backbone import build_backbone
from brainfm.progress import say
from brainfm.settings import plain
from brainfm.tasks.study import Row
from brainfm.training import receipt
from brainfm.training.loop import State, first_difference
from brainfm.training.pretrain import BACKBONE_FILE, assembled, pretrain, sides_of
from brainfm.training.settings import PretrainSettings

PROTOCOL, COST, ANSWERS = "protocol.json", "cost.json", "answers.json"
FIXED = ("budget", "steps", "hours", "side_column", "held", "split_seed", "inner", "tested", "contrasts")
_TRIAL_SEED = 1000  # of trials, so that no run has one


class Stopped(Exception):
    """A run was interrupted and has saved."""


@dataclass(frozen=True)
class Comparison:
    """All that the runs share.

    Attributes:
        questions: in the order of the tasks; the first decides about rates of pre-training.
        train: how a pre-training is run, other than in this process (tests).
    """

    settings: CompareSettings
    store: Store
    contenders: tuple[Contender, ...]
    questions: tuple[Question, ...]
    train: Callable[[PretrainSettings], State] = field(default=pretrain)

    @property
    def out(self) -> Path:
        return self.settings.out

    def begin(self) -> None:
        """Refuses what cannot be, before any step. Raises: ConfigError."""
        for question in self.questions:
            if max(self.settings.shots) > len(question.people.pool):
                raise ConfigError(
                    f"shots={max(self.settings.shots)}: {question.target} is known of {len(question.people.pool)} "
                    "people that may be learned from, expected no more"
                )
        self._check_networks()
        mine = {"store": self.store.fingerprint(), **{key: getattr(self.settings, key) for key in FIXED}}
        mine = json.loads(json.dumps(mine))
        file = self.out / PROTOCOL
        there = json.loads(file.read_text()) if file.exists() else None
        differing = first_difference(there, mine) if there is not None else None
        if differing is not None:
            key, old, new = differing
            raise ConfigError(f"{self.out} holds a comparison with {key}={old}, found {key}={new}: use another out=")
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps(mine, indent=1) + "\n").encode())

    def _check_networks(self) -> None:
        for contender in self.contenders:
            if contender.network is None:
                continue
            backbone = build_backbone(**contender.network)
            for question in self.questions:
                patch: Any = getattr(question.finetune.task, "patch_vox", "auto")
                if patch != "auto":
                    backbone.check_patch(patch)
            if contender.pretrain is not None and self.costs(contender, 0) is None:
                assembled(contender.pretrain, self.store)

    def do(self) -> bool:
        """Whether all is done; else it was interrupted, and what was begun is saved."""
        try:
            for seed in range(self.settings.seeds):
                for contender in self.contenders:
                    say(f"{contender.name}, seed {seed}")
                    self._ask(contender, seed)
        except Stopped as stopped:
            say(f"stopped in {stopped} and saved; the same command goes on")
            return False
        return True

    # ---- pre-training ------------------------------------------------------------------------------------------------

    def file(self, contender: Contender, seed: int) -> Path | None:
        """The backbone file of a run; None of what is not pre-trained."""
        return None if contender.pretrain is None else contender.folder(self.out) / f"seed{seed}" / BACKBONE_FILE

    def costs(self, contender: Contender, seed: int) -> dict[str, Any] | None:
        """Of a finished pre-training."""
        file = contender.folder(self.out) / f"seed{seed}" / COST
        return json.loads(file.read_text())["cost"] if file.exists() else None

    def weights(self, contender: Contender, seed: int) -> Path | None:
        """The backbone file, made, resumed or found. Raises: Stopped."""
        if contender.pretrain is None:
            return None
        steps = self.steps(contender)
        rate = self.pretrain_rate(contender)
        return self._pretrained(contender, seed, rate, steps, contender.folder(self.out) / f"seed{seed}")

    def steps(self, contender: Contender) -> int:
        """Of each pre-training: as many as were asked for, or as fit into the hours, measured once. Raises: Stopped."""
        if self.settings.steps is not None:
            return self.settings.steps
        assert contender.pretrain is not None and self.settings.hours is not None
        folder = contender.folder(self.out)
        file = folder / "speed.json"
        if not file.exists():
            found = cost.seconds_a_step(self._quiet(contender.pretrain), self.train, folder)
            if found is None:
                raise Stopped(f"the timing of {contender.name}")
            write_whole(file, (json.dumps({"seconds_a_step": found}) + "\n").encode())
            for left in folder.glob("speed[0-9]*"):
                shutil.rmtree(left)
        return max(1, math.floor(3600 * self.settings.hours / json.loads(file.read_text())["seconds_a_step"]))

    def pretrain_rate(self, contender: Contender) -> float:
        """That trials choose by the first task's frozen answers; what the settings have where none are made."""
        assert contender.pretrain is not None
        tried = self.pretrain_trials(contender)
        return _best(tried) if tried else contender.pretrain.optim.lr

    def pretrain_trials(self, contender: Contender) -> dict[float, list[float]]:
        """rate -> score, larger is better. Raises: Stopped."""
        question, found = self.questions[0], dict[float, list[float]]()
        if contender.pretrain is None:
            return found
        for rate in self.settings.pretrain_rates:
            steps = max(1, round(self.settings.trial_share * self.steps(contender)))
            folder = self.out / "trials" / "pretrained" / f"{contender.slug}_rate{rate:g}"
            weights = self._pretrained(contender, _TRIAL_SEED, rate, steps, folder)
            people = (question.people.pool, question.people.trial)
            rows = self._frozen(
                contender, weights, _TRIAL_SEED, question, people, folder / "frozen", folder / "features.npz"
            )
            found[rate] = [self._good(question, rows)]
        return found

    def _pretrained(self, contender: Contender, seed: int, rate: float, steps: int, folder: Path) -> Path:
        assert contender.pretrain is not None
        settings = contender.pretrain
        settings = replace(
            self._quiet(settings),
            run=folder,
            seed=seed,
            optim=replace(settings.optim, lr=rate),
            trainer=replace(settings.trainer, max_steps=steps),
        )
        asked = {"settings": plain(settings, free=False)}
        if record(folder / COST, asked) is None:
            fresh = receipt.forget_peaks()
            state = self.train(settings)
            if state.step < steps:
                raise Stopped(f"the pre-training of {folder.relative_to(self.out)} after step {state.step}")
            found = cost.arithmetic(settings, self.store) | cost.spent(settings, state)
            if not fresh and found["device"] == "cpu":
                found["peak_memory_gib"] = None  # of this process, which has done other things before
            write_whole(folder / COST, (json.dumps({"asked": asked, "cost": found}, indent=1) + "\n").encode())
        return folder / BACKBONE_FILE

    def _quiet(self, settings: PretrainSettings) -> PretrainSettings:
        return replace(settings, probe=None)

    # ---- questions ---------------------------------------------------------------------------------------------------

    def _ask(self, contender: Contender, seed: int) -> None:
        """Everything of one run. Raises: Stopped."""
        weights = self.weights(contender, seed)
        for question in self.questions:
            self.frozen(contender, weights, seed, question)
        for question in self.questions:
            for shots in self.settings.shots:
                self.tuned(contender, weights, seed, question, shots)

    def frozen(self, contender: Contender, weights: Path | None, seed: int, question: Question) -> list[Row] | None:
        """Held people, by linear models fitted on the training side: of masks on as many as the most shots."""
        fitted = [*question.people.trial, *question.people.pool]
        if question.is_mask:
            fitted = drawn(question.people.pool, max(self.settings.shots), seed)
        people = (fitted, question.people.held)
        name = f"{contender.slug}_{question.target}_seed{seed}"
        shown = "+".join(question.study.spec.contrasts)
        kept = self.out / "frozen" / f"{contender.slug}_seed{seed}_{shown}.npz"  # tasks share it
        return self._frozen(contender, weights, seed, question, people, self.out / "frozen" / name, kept)

    def _frozen(
        self,
        contender: Contender,
        weights: Path | None,
        seed: int,
        question: Question,
        people: tuple[Sequence[str], Sequence[str]],
        stem: Path,
        kept: Path,
    ) -> list[Row] | None:
        file = stem.with_name(f"{stem.name}.json")
        asked = {"fitted": sorted(people[0]), "asked": sorted(people[1]), "network": _network(contender)}
        found = record(file, asked)
        if found is None:
            rows = question.frozen(contender, weights, seed, people, kept, self.settings.device)
            found = {"asked": asked, "rows": rows}
            write_whole(_made(file), (json.dumps(found) + "\n").encode())
        return found["rows"]

    def tuned(
        self, contender: Contender, weights: Path | None, seed: int, question: Question, shots: int
    ) -> list[Row] | None:
        """Held people, by the model fine-tuned on so many; None where this model is not. Raises: Stopped."""
        if contender.network is None and question.is_mask:
            return None
        trained = drawn(question.people.pool, shots, seed)
        rate = self.rate(contender, question)
        name = f"{contender.slug}_{question.target}_{shots}shots_seed{seed}_rate{rate:g}"
        return self._tuned(
            contender, weights, seed, rate, question, (trained, question.people.held), self.out / "tuned" / name
        )

    def rate(self, contender: Contender, question: Question) -> float:
        """Of fine-tuning: that trials choose, the one there is, or where nothing is trained the settings'. Raises:
        Stopped."""
        if not self._trains(question):
            return question.finetune.optim.lr
        tried = self.trials(contender, question)
        return _best(tried) if tried else self.settings.rates[0]

    def _trains(self, question: Question) -> bool:
        return any(question.trains(question.people.pool[:shots]) for shots in self.settings.shots)

    def trials(self, contender: Contender, question: Question) -> dict[float, list[float]]:
        """rate -> the score of each draw, larger is better: on people of the training side that do nothing else, of the
        weights of the first seed. Empty where there is nothing to choose. Raises: Stopped."""
        inner, found = question.people.trial, dict[float, list[float]]()
        shots = max(1, min(self.settings.shots[0], len(inner) // 2))
        if len(self.settings.rates) < 2 or contender.network is None or not self._trains(question):
            return found
        weights = self.weights(contender, 0)
        for rate in self.settings.rates:
            for draw in range(self.settings.draws):
                seed = _TRIAL_SEED + draw
                trained = drawn(inner, shots, seed)
                name = f"{contender.slug}_{question.target}_rate{rate:g}_draw{draw}"
                people = (trained, [key for key in inner if key not in trained])
                rows = self._tuned(contender, weights, seed, rate, question, people, self.out / "trials" / name)
                found.setdefault(rate, []).append(self._good(question, rows))
        return found

    def _tuned(
        self,
        contender: Contender,
        weights: Path | None,
        seed: int,
        rate: float,
        question: Question,
        people: tuple[Sequence[str], Sequence[str]],
        folder: Path,
    ) -> list[Row] | None:
        free = {"optim", "backbone"}  # the rate is told beside, the network with the model
        values = {key: value for key, value in plain(question.finetune, free=False).items() if key not in free}
        asked = {
            "trained": sorted(people[0]), "asked": sorted(people[1]), "network": _network(contender),
            "finetune": values | {"rate": rate, "seed": seed},
        }  # fmt: skip
        found = record(folder / ANSWERS, asked)
        if found is None:
            rows = question.tuned(contender, weights, seed, rate, people, folder)
            if rows is None:
                raise Stopped(str(folder.relative_to(self.out)))
            found = {"asked": asked, "rows": rows}
            write_whole(folder / ANSWERS, (json.dumps(found) + "\n").encode())
        return found["rows"]

    def _good(self, question: Question, rows: list[Row] | None) -> float:
        """The score with the sign that makes a larger one better; -inf where there is none."""
        score = math.nan if rows is None else score_of(question, rows)
        return (score if question.primary[1] else -score) if math.isfinite(score) else -math.inf


def sides_by_person(store: Store, settings: PretrainSettings) -> dict[str, str]:
    """key of a person -> train or held, as every pre-training splits. Raises: ConfigError."""
    found: dict[str, str] = {}
    for name, side in zip(("train", "held"), sides_of(store, settings.data)):
        found |= {session.subject_key: name for session in side}
    return found


def _best(tried: Mapping[float, Sequence[float]]) -> float:
    """The rate whose trials score best, the smaller one where two do."""
    return max(sorted(tried), key=lambda rate: float(np.mean(tried[rate])))


def _network(contender: Contender) -> dict[str, Any] | None:
    return None if contender.network is None else dict(contender.network)


def _made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
