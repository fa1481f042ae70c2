"""A kind of task that brainfm does not have: how many millilitres a mask holds, told from one window of the head."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from brainfm.batch import Batch, Terms
from brainfm.data.patches import Sample
from brainfm.data.store import Store
from brainfm.imaging import nifti
from brainfm.imaging.preprocess import prepare_session
from brainfm.scoring.intervals import bootstrap, paired_bootstrap
from brainfm.settings import VERBATIM
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.answers import label_of
from brainfm.tasks.engine import in_order
from brainfm.tasks.evaluator import Evaluator
from brainfm.tasks.kind import Kind
from brainfm.tasks.registry import answer_name
from brainfm.tasks.settings import TaskSettings
from brainfm.tasks.study import Decided, Scored, Study, identity, subjects_of
from brainfm.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class LoadSettings(TaskSettings):
    """How much of the head is ill."""

    kind: Annotated[str, "which kind"] = "load"
    target: Annotated[str, "column NAME_mask of the manifest, without the ending", VERBATIM]
    edge_vox: Annotated[int, "of the window"] = 16


@dataclass(frozen=True)
class LoadCase:
    session: Any
    ml: float


class LoadTask(Task):
    """The mean of the deepest map over window and contrasts, and one linear layer."""

    def __init__(self, spec: TaskSpec, backbone: Any) -> None:
        super().__init__()
        self.spec, self.backbone, self.out = spec, backbone, nn.Linear(backbone.widths[-1], 1)

    def forward(self, image: Tensor, present: Tensor | None = None) -> Tensor:
        shown = torch.ones(image.shape[:2], device=image.device) if present is None else present.float()
        maps = self.backbone.features(image.flatten(0, 1)[:, None])[-1].float()
        pooled = maps.mean(dim=(2, 3, 4)).unflatten(0, image.shape[:2])
        return self.out((pooled * shown[..., None]).sum(1) / shown.sum(1, keepdim=True))

    def loss(self, output: Tensor, batch: Batch) -> Terms:
        assert batch.answer is not None
        error = (output - batch.answer).square().mean()
        return Terms(error, {"error": error.detach()})

    def decode(self, output: Tensor) -> Tensor:
        return output[:, 0]


def window(volume: np.ndarray, patch: tuple[int, int, int]) -> np.ndarray:
    """The middle of a volume, with its minimum around where it is smaller."""
    found = np.full(patch, volume.min(), np.float32)
    here, there = [], []
    for n, p in zip(volume.shape, patch):
        size = min(n, p)
        here.append(slice((p - size) // 2, (p - size) // 2 + size))
        there.append(slice((n - size) // 2, (n - size) // 2 + size))
    found[tuple(here)] = volume[tuple(there)]
    return found


class LoadWindows(Dataset):
    def __init__(self, study: LoadStudy, cases: Sequence[LoadCase]) -> None:
        self.study, self.cases = study, cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Sample:
        case = self.cases[i % len(self.cases)]
        image, present = self.study.shown(case)
        return Sample(i, image.astype(np.float16), present=present, answer=np.array([case.ml], np.float32))


class LoadStudy(Study):
    primary, larger_is_better = "mae", False

    def __init__(self, store: Store, settings: LoadSettings) -> None:
        self.store, self.settings = store, settings
        name, ml = f"{settings.target}_mask", float(np.prod(store.spec.spacing_mm)) / 1000
        there = [s for s in store.sessions if any(label.name == name for label in s.labels)]
        self.cases = tuple(LoadCase(s, float((store.volume(s, name) > 0).sum() * ml)) for s in there)
        contrasts = settings.contrasts or tuple(sorted({scan.contrast for s in there for scan in s.scans}))
        self.left_out = tuple(f"{s.subject_key}: no {name}" for s in store.sessions if s not in there)
        self.spec = TaskSpec("load", settings.target, contrasts, (), (0, 0, 0), unit="ml")

    def shown(self, case: LoadCase) -> tuple[np.ndarray, np.ndarray]:
        names = [next((s.name for s in case.session.scans if s.contrast == c), None) for c in self.spec.contrasts]
        image = np.zeros((len(names), *self.spec.patch_vox), np.float32)
        for m, name in enumerate(names):
            if name is not None:
                image[m] = window(self.store.volume(case.session, name), self.spec.patch_vox)
        return image, np.array([name is not None for name in names])

    def patch(self, backbone: Any, most_voxels: int) -> tuple[int, int, int]:
        return (self.settings.edge_vox,) * 3  # type: ignore[attr-defined]

    def settle(self, patch_vox: tuple[int, int, int]) -> None:
        self.spec = replace(self.spec, patch_vox=patch_vox)

    def task(self, backbone: Any, trained: Sequence[Any], pretrained: Any = None) -> Task:
        task = LoadTask(self.spec, backbone)
        nn.init.constant_(task.out.bias, float(np.mean([case.ml for case in trained])))
        return task

    def start(self, task: Task, trained: Sequence[Any], device: torch.device) -> None:
        return None

    def patches(self, trained: Sequence[Any], seed: int, data: Any) -> Dataset:
        return LoadWindows(self, trained)

    def told(self, task: Task, case: LoadCase, place: Any) -> float:
        image, present = (torch.from_numpy(array)[None].to(place.device) for array in self.shown(case))
        return float(task.decode(task(image, present))[0])

    def each(self, task: Task, cases: Sequence[Any], place: Any) -> list[float]:
        return [abs(self.told(task, case, place) - case.ml) for case in cases]

    def watch(self, task: Task, cases: Sequence[Any], place: Any) -> float:
        return float(np.mean(self.each(task, cases, place)))

    def answer(self, task: Task, split: Any, place: Any, folder: Path) -> list[dict[str, Any]]:
        return [
            identity(case.session, split) | {"truth": case.ml, "answer": self.told(task, case, place)}
            for case in split.held
        ]

    def decide(self, rows: Sequence[dict[str, Any]]) -> Decided:
        return Decided(Decisions(), list(rows))

    def score(self, rows: Sequence[dict[str, Any]], seed: int) -> Scored:
        error = np.array([abs(row["answer"] - row["truth"]) for row in rows])
        return Scored({"mae": bootstrap(np.mean, error, groups=subjects_of(rows), seed=seed)}, list(rows))

    def baseline(self, name: str, backbone: Any, splits: Sequence[Any], seed: int) -> list[dict[str, Any]]:
        """The mean of the training side."""
        return [
            identity(case.session, s) | {"truth": case.ml, "answer": float(np.mean([c.ml for c in s.trained]))}
            for s in splits
            for case in s.held
        ]

    def audit(self, rows: Sequence[dict[str, Any]], columns: Sequence[str], seed: int) -> None:
        return None

    def strata(self) -> None:
        return None

    def _compare(self, mine: Sequence[Any], theirs: Sequence[Any], seed: int) -> dict[str, Any]:
        a, b = (np.array([abs(row["answer"] - row["truth"]) for row in rows]) for rows in (mine, theirs))
        found = paired_bootstrap(lambda t, x: float(x.mean()), a, a, b, groups=subjects_of(mine), seed=seed)
        return {"metric": "mae", "difference": found.mean, "low": found.low, "high": found.high, "p": 1.0, "n": len(a)}


class LoadEvaluator(Evaluator):
    def __init__(self, manifest: Any, spec: TaskSpec) -> None:
        self.spec, self.labels = spec, {}
        for key, scans in manifest.sessions().items():
            label = label_of(scans, spec.target)
            if label is not None:
                volume, _ = nifti.read(manifest.resolve(label.path), labels=True)
                self.labels[key] = float((volume.voxels > 0).sum() * np.prod(volume.spacing_mm) / 1000)
        self.sessions = self.labels.keys()

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        rows = []
        for key, ml in self.labels.items():
            told = json.loads((folder / answer_name(key, self.spec)).read_text())["ml"]
            rows.append(dict(zip(("dataset", "subject", "session"), key)) | {"truth": ml, "answer": told, "note": ""})
        return rows

    def summary(self, rows: list[dict[str, Any]], bundle: str, seed: int) -> dict[str, Any]:
        mae = float(np.mean([abs(row["truth"] - row["answer"]) for row in rows]))
        known = {"target": self.spec.target, "cases": len(rows), "subjects": len(rows), "bundle": bundle}
        none = {"without_prediction": 0, "sessions_without_label": 0}
        return known | none | {"metrics": {"mae": {"mean": mae, "low": None, "high": None}}}


class Load(Kind):
    name, settings, ending, measured = "load", LoadSettings, ".json", "scan"

    def network(self, spec: TaskSpec, backbone: Any, **settings: Any) -> Task:
        return LoadTask(spec, backbone, **settings)

    def study(self, store: Any, settings: Any, *, mirror: Sequence[int], clean: bool) -> Study:
        return LoadStudy(store, settings)

    def primary(self, spec: TaskSpec) -> tuple[str, bool]:
        return "mae", False

    def shortcut_columns(self, truth: Any, answers: Any, spec: TaskSpec) -> Any:
        return False, [("", truth, answers)]

    def check_output(self, out: Path, inputs: Any) -> Path:
        return out

    def answer(self, engine: Any, files: Any, reference: str, labels: Any = None, like: Path | None = None) -> float:
        prepared = prepare_session(files, {}, engine.preprocess, reference=reference)
        image = np.stack([window(prepared.scans[c], engine.task.patch_vox) for c in in_order(files, engine.task)])
        with torch.no_grad():
            given = torch.from_numpy(image)[None].to(engine.device)
            told = [float(network.decode(network(given))[0]) for network in engine.networks]
        return float(np.mean(told))

    def write(self, path: Path, found: float, like: Path) -> None:
        path.write_text(json.dumps({"ml": found}) + "\n")

    def columns(self, spec: TaskSpec) -> list[str]:
        return ["ml"]

    def cells(self, found: float, spec: TaskSpec, like: Path) -> list[object]:
        return [found]

    def kept_cells(self, path: Path, spec: TaskSpec, like: Path) -> list[object]:
        return [json.loads(path.read_text())["ml"]]

    def evaluator(self, manifest: Any, spec: TaskSpec, *, fresh: bool, empty: str) -> Evaluator:
        return LoadEvaluator(manifest, spec)

    def usual_layer(self, layers: Sequence[str]) -> str:
        raise AssertionError("nobody explains a load")

    def explained(self, members: Any, case: Any, index: int | None, decisions: Decisions) -> Any:
        raise AssertionError("nobody explains a load")

    def about(self, spec: TaskSpec, target: str, answer: float) -> str:
        return f"{answer:.3g} ml"

    def promise(self, spec: TaskSpec) -> str:
        return f"how many ml of `{spec.target}` there are"

    def page(self, run: Any) -> Any:
        raise AssertionError("nobody prints a load")


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))
