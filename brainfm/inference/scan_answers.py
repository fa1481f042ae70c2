"""One answer for a session: class probabilities or a value with its interval, as JSON, as text, as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.errors import ConfigError, ScanError
from brainfm.files import write_text
from brainfm.imaging.preprocess import prepare_session
from brainfm.imaging.views import views_of_volumes
from brainfm.inference.engine import Engine, in_order
from brainfm.inference.label_maps import decisions_for, volumes_of
from brainfm.scoring.calibration import apply_bias, apply_temperature, conformal_quantile
from brainfm.specs import Decisions, TaskSpec

LEVEL = 0.9  # of prediction intervals
ENDINGS = (".json", ".txt")


@dataclass(frozen=True)
class ScanAnswer:
    """What a bundle answers for a session.

    Attributes:
        target: of the task.
        answer: the most probable class, the labels that are more likely than not, or the value.
        probabilities: of each class or label; None for a value.
        unit: of a value.
        low, high: prediction interval of a value, at 90 %; None where the bundle saw too few cases to give one.
        contrasts: that were looked at.
    """

    target: str
    answer: str | list[str] | float
    probabilities: dict[str, float] | None
    unit: str
    low: float | None
    high: float | None
    contrasts: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def to_text(self) -> str:
        """One number a line: the value; the probability of the second of two classes; else of each class or label."""
        if self.probabilities is None:
            return f"{self.answer}\n"
        values = list(self.probabilities.values())
        two_classes = len(values) == 2 and not isinstance(self.answer, list)  # two labels are two answers
        return "".join(f"{value}\n" for value in (values[1:] if two_classes else values))

    def cells(self) -> dict[str, Any]:
        """A row of a table."""
        if self.probabilities is None:
            return {"answer": self.answer, "low": self.low, "high": self.high}
        answer = " ".join(self.answer) if isinstance(self.answer, list) else self.answer
        return {"answer": answer, **{f"p_{name}": value for name, value in self.probabilities.items()}}


def answer_scan(
    engine: Engine, files: Mapping[str, Path], reference: str, labels: Mapping[str, Path] | None = None
) -> ScanAnswer:
    """The answer for one session.

    Args:
        engine: of a classification or regression.
        files: file by contrast; contrasts that the task was not trained on are looked at as well.
        reference: the contrast whose directions the network's grid takes.
        labels: the label map that the bundle reads, by its column, where there is one (label_maps.check_labels).

    Raises:
        ScanError: where any file cannot be used.
    """
    prepared = prepare_session(files, labels or {}, engine.preprocess, reference=reference)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))
    image = np.stack([prepared.scans[contrast] for contrast in in_order(files, engine.task)])
    views = torch.from_numpy(views_of_volumes(image, engine.preprocess.spacing_mm, engine.task))
    name, path = next(iter((labels or {}).items()), ("", Path()))
    volumes = volumes_of(engine.networks, prepared.labels.get(name), engine.preprocess.spacing_mm, str(path))
    decisions = decisions_for(engine.networks, engine.decisions, volumes is not None)
    return decided(replace(engine, decisions=decisions), raw_answers(engine, views, volumes), tuple(files))


@torch.no_grad()
def raw_answers(engine: Engine, views: torch.Tensor, volumes: torch.Tensor | None = None) -> np.ndarray:
    """[members, K] probabilities or [members, 1] values, of views [V, M, x, y, z] of contrasts that are all there, and
    of the volumes [1, F] of a label map, where there is one."""
    present = torch.ones(1, views.shape[1], dtype=torch.bool, device=engine.device)
    found = []
    given = () if volumes is None else (volumes.to(engine.device),)
    network: Any
    for network in engine.networks:
        with torch.autocast(engine.device.type, dtype=engine.autocast, enabled=engine.autocast is not None):
            output = network(views[None].to(engine.device), present, *given)
        found.append(network.decode(output)[0].float().cpu().numpy().reshape(-1))
    return np.stack(found).astype(np.float64)


def joined(raw: np.ndarray, task: TaskSpec, decisions: Decisions) -> np.ndarray:
    """The members' answers [members, K] as one [K], after what cross-validation decided: calibrated probabilities, or a
    corrected value."""
    if task.kind == "regression":
        return np.atleast_1d(apply_bias(raw.mean(axis=0), decisions.bias))
    return apply_temperature(raw, decisions.temperature, task.mode).mean(axis=0)


def decided(engine: Engine, raw: np.ndarray, contrasts: tuple[str, ...]) -> ScanAnswer:
    """The answer of `joined` with its words, and an interval where there is one."""
    task, decisions = engine.task, engine.decisions
    found = joined(raw, task, decisions)
    if task.kind == "regression":
        value = float(found[0])
        half = conformal_quantile(np.asarray(decisions.residuals), LEVEL) if decisions.residuals else math.inf
        low, high = (value - half, value + half) if math.isfinite(half) else (None, None)
        return ScanAnswer(task.target, value, None, task.unit, low, high, contrasts)
    named = {str(name): float(p) for name, p in zip(task.values, found, strict=True)}
    answer: str | list[str] = max(named, key=lambda name: named[name])
    if task.mode == "multilabel":
        answer = [name for name, p in named.items() if p > 0.5]
    return ScanAnswer(task.target, answer, named, "", None, None, contrasts)


def check_answer_file(path: Path) -> Path:
    """Raises: ConfigError where the file is neither JSON nor text."""
    if path.suffix not in ENDINGS or path.is_dir():
        raise ConfigError(f"out={path}: expected a file that ends in {' or '.join(ENDINGS)}")
    return path


def write_answer(path: Path, answer: ScanAnswer) -> None:
    """JSON with all that is known, or, where the name ends in .txt, the bare numbers."""
    write_text(path, answer.to_text() if path.suffix == ".txt" else answer.to_json())


def read_answer(path: Path) -> ScanAnswer:
    """Raises: ConfigError where the file is not as write_answer wrote it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return replace(ScanAnswer(**values), contrasts=tuple(values["contrasts"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not an answer that brainfm predict wrote ({error})") from None


def table_columns(task: TaskSpec) -> Sequence[str]:
    """Of ScanAnswer.cells."""
    if task.kind == "regression":
        return ["answer", "low", "high"]
    return ["answer", *(f"p_{name}" for name in task.values)]
