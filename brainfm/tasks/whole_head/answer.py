"""One answer for a session: class probabilities or a value with its interval, as JSON, as text, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.errors import ConfigError, ScanError
from brainfm.files import write_text
from brainfm.imaging.preprocess import prepare_session
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.answers import SessionAnswer
from brainfm.tasks.engine import Engine, in_order
from brainfm.tasks.whole_head.label_maps import decisions_for, volumes_of
from brainfm.tasks.whole_head.measured import measurements_of
from brainfm.tasks.whole_head.sorts import sort_of
from brainfm.tasks.whole_head.views import views_of_volumes

ENDINGS = (".json", ".txt")


def answer_session(
    engine: Engine, files: Mapping[str, Path], reference: str, labels: Mapping[str, Path] | None = None
) -> SessionAnswer:
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
    measured = measurements_of(engine.networks, prepared.scans, engine.preprocess.spacing_mm)
    decisions = decisions_for(engine.networks, engine.decisions, volumes is not None)
    return decided(replace(engine, decisions=decisions), raw_answers(engine, views, volumes, measured), tuple(files))


@torch.no_grad()
def raw_answers(
    engine: Engine, views: torch.Tensor, volumes: torch.Tensor | None = None, measured: torch.Tensor | None = None
) -> np.ndarray:
    """[members, K] probabilities or [members, 1] values, of views [V, M, x, y, z] of contrasts that are all there, of
    the volumes [1, F] of a label map, where there is one, and of measurements [1, F], where members ask for them."""
    present = torch.ones(1, views.shape[1], dtype=torch.bool, device=engine.device)
    found = []
    asked = {"volumes": volumes, "measured": measured}
    given = {name: value.to(engine.device) for name, value in asked.items() if value is not None}
    network: Any
    for network in engine.networks:
        with torch.autocast(engine.device.type, dtype=engine.autocast, enabled=engine.autocast is not None):
            output = network(views[None].to(engine.device), present, **given)
        found.append(network.decode(output)[0].float().cpu().numpy().reshape(-1))
    return np.stack(found).astype(np.float64)


def joined(raw: np.ndarray, task: TaskSpec, decisions: Decisions) -> np.ndarray:
    """The members' answers [members, K] as one [K], after what cross-validation decided: calibrated probabilities, or a
    corrected value."""
    return sort_of(task).joined(raw, task, decisions)


def decided(engine: Engine, raw: np.ndarray, contrasts: tuple[str, ...]) -> SessionAnswer:
    """The answer of `joined` with its words, and an interval where there is one."""
    task, decisions = engine.task, engine.decisions
    return sort_of(task).answered(joined(raw, task, decisions), task, decisions, contrasts)


def check_answer_file(path: Path) -> Path:
    """Raises: ConfigError where the file is neither JSON nor text."""
    if path.suffix not in ENDINGS or path.is_dir():
        raise ConfigError(f"out={path}: expected a file that ends in {' or '.join(ENDINGS)}")
    return path


def write_answer(path: Path, answer: SessionAnswer) -> None:
    """JSON with all that is known, or, where the name ends in .txt, the bare numbers."""
    write_text(path, answer.to_text() if path.suffix == ".txt" else answer.to_json())
