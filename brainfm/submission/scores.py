"""A submission's outputs against the answers, as the organisers score them, with intervals: evaluate and validate.

An output is the file that a container wrote. It is looked for by the name of its case, ``<subject>`` or
``<subject>_<session>``, anywhere below a folder; what the validator left is such a folder.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brainfm.data.manifest import Manifest, Scan, read_manifest
from brainfm.errors import ConfigError, ManifestError
from brainfm.files import write_table, write_text
from brainfm.scoring.intervals import bootstrap
from brainfm.submission import linear_probe, metrics
from brainfm.submission.challenge import ChallengeTask, with_article
from brainfm.submission.convert import LABELS, SCANS, convert
from brainfm.submission.outputs import check_output, labels_of, value_of

CASES, SUMMARY = "cases.csv", "summary.json"
_DECADE = 10.0  # a group column with more different numbers than this is cut into decades
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Truth:
    """A case with its answer.

    Attributes:
        key: dataset, subject, session.
        value: a class or an age; of a segmentation None.
        mask: its label volume, else None.
        columns: of the manifest.
    """

    key: Key
    value: float | None
    mask: Path | None
    columns: Mapping[str, str]


@dataclass(frozen=True)
class ChallengeScores:
    """What came out.

    Attributes:
        rows: a mapping a case, as in cases.csv.
        values: metric -> mean, low, high (95 %, by subject; None where there is no interval) and n.
        missing: cases without a usable output.
    """

    rows: tuple[Mapping[str, Any], ...]
    values: Mapping[str, Mapping[str, Any]]
    missing: int


# ---- what is true ----------------------------------------------------------------------------------------------------


def truths(task: ChallengeTask, manifest: Manifest, target: str = "") -> list[Truth]:
    """The cases of a manifest that have an answer.

    Args:
        target: the column, where it is not the task's own.

    Raises: ManifestError where none has, or one is no number that the task allows.
    """
    found = []
    column = target or task.target
    for key, scans in manifest.sessions().items():
        columns = _columns(scans)
        if task.kind == "segmentation":
            path = columns.get(f"{column}_labels") or columns.get(f"{column}_mask")
            if path:
                found.append(Truth(key, None, manifest.resolve(path), columns))
        elif columns.get(column):
            found.append(Truth(key, _number(columns[column], task, manifest, column), None, columns))
    if not found:
        expected = f"{column}_mask or {column}_labels" if task.kind == "segmentation" else column
        raise ManifestError(f"{manifest.path}: no session has {expected}, expected the answers of {task.id}")
    return found


def _columns(scans: Sequence[Scan]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for scan in scans:
        columns |= {name: text for name, text in scan.columns.items() if text and name not in columns}
    return columns


def _number(text: str, task: ChallengeTask, manifest: Manifest, column: str) -> float:
    if task.kind == "embedding":
        return math.nan  # classes are numbered when all are known
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not task.low <= value <= task.high:
        raise ManifestError(f"{manifest.path}: {column} holds {text!r}, expected {task.low:g} to {task.high:g}")
    return value


# ---- what was answered -----------------------------------------------------------------------------------------------


def outputs_below(task: ChallengeTask, folder: Path, cases: Sequence[Truth]) -> dict[Key, Path]:
    """The output of each case that has one. Raises: ConfigError where no case has."""
    there: dict[str, Path] = {}
    for path in sorted(folder.rglob(f"*{task.ending}")):
        there.setdefault(path.name.removesuffix(task.ending), path)
    found = {}
    for case in cases:
        _, subject, session = case.key
        output = there.get(f"{subject}_{session}") or there.get(subject)
        if output is not None:
            found[case.key] = output
    if not found:
        _, subject, session = cases[0].key
        name = f"{subject}_{session}" if session else subject
        raise ConfigError(
            f"{folder}: holds no output of the {len(cases)} cases, expected {name}{task.ending} and so on"
        )
    return found


def predicted(
    task: ChallengeTask,
    bundle: Path,
    manifest: Manifest,
    cases: Sequence[Truth],
    out: Path,
    how: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> dict[Key, Path]:
    """Lets a bundle answer, and gives what a container would have written. Raises: as predict_manifest."""
    from brainfm.inference.predict import predict_manifest
    from brainfm.submission.predict import in_range
    from brainfm.tasks.answers import read_answer
    from brainfm.tasks.bundle import load_engine
    from brainfm.tasks.registry import answer_name

    engine = load_engine(bundle, **how)
    if engine.task.kind != task.kind:
        its, wanted = with_article(engine.task.kind), with_article(task.kind)
        raise ConfigError(f"{bundle} is {its}, expected {wanted} for {task.id}")
    predict_manifest(engine, manifest, out, sessions=[case.key for case in cases], progress=progress)
    found = {}
    for case in cases:
        file = out / answer_name(case.key, engine.task)
        if not file.is_file():
            continue
        if task.kind != "segmentation":
            text = out / "outputs" / f"{'_'.join(part for part in case.key[1:] if part)}.txt"
            write_text(text, in_range(read_answer(file).to_text(), task))
            file = text
        found[case.key] = file
    return found


# ---- scores ----------------------------------------------------------------------------------------------------------


def score(task: ChallengeTask, cases: Sequence[Truth], outputs: Mapping[Key, Path], seed: int = 0) -> ChallengeScores:
    """Scores of outputs, one that is missing or refused by the organisers' checks counted as they count it.

    Args:
        seed: of the bootstrap.

    Raises: ConfigError where a label volume cannot be read, or monai is missing for a surface Dice.
    """
    rows, answers, usable = [], [], 0
    for case in cases:
        value, note = _answer(task, case, outputs.get(case.key))
        row: dict[str, Any] = dict(zip(("dataset", "subject", "session"), case.key, strict=True))
        if task.kind == "segmentation":
            row |= _of_mask(task, case, value)
        else:
            row |= {"truth": case.value, "answer": value}
        usable += not note
        answers.append(value)
        rows.append(row | {"note": note})
    groups = [f"{case.key[0]}/{case.key[1]}" for case in cases]
    values = {name: _interval(task, name, cases, answers, rows, groups, seed) for name in task.metrics}
    return ChallengeScores(tuple(rows), values, len(cases) - usable)


def _answer(task: ChallengeTask, case: Truth, output: Path | None) -> tuple[Any, str]:
    if output is None:
        return None, "no output"
    like = [case.mask] if case.mask is not None else []
    failed = [check for check in check_output(task, "", output, like) if not check.passed and check.whose != "stricter"]
    return (None, failed[0].sentence) if failed else (value_of(task, output), "")


def _of_mask(task: ChallengeTask, case: Truth, mask: np.ndarray | None) -> dict[str, float]:
    assert case.mask is not None
    true, spacing = labels_of(case.mask)
    labels = range(1, int(task.high) + 1)
    true = (true != 0).astype(np.int32) if task.high == 1 else true
    known = None if mask is None else np.asarray(mask)
    return {"dice": metrics.dice(known, true, labels), "nsd": metrics.nsd(known, true, spacing, labels)}


def _interval(
    task: ChallengeTask,
    name: str,
    cases: Sequence[Truth],
    answers: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    strata = None
    if task.kind == "segmentation":
        columns = (np.array([row[name] for row in rows]),)

        def metric(*arrays: np.ndarray) -> float:
            return float(np.mean(arrays[0]))
    else:
        columns = (  # type: ignore[assignment]
            np.array([case.value for case in cases], dtype=np.float64),
            np.array([math.nan if a is None else a for a in answers], dtype=np.float64),
        )
        strata = [str(case.value) for case in cases] if task.kind == "classification" else None
        one = {"auroc": _auroc, "mae": metrics.mae, "correlation": metrics.correlation}[name]

        def metric(*arrays: np.ndarray) -> float:
            return one(arrays[0].tolist(), arrays[1].tolist())

    found = bootstrap(metric, *columns, groups=groups, seed=seed, strata=strata)
    return _finite({"mean": found.mean, "low": found.low, "high": found.high, "n": found.n})


def _auroc(true: Sequence[float], answers: Sequence[float | None]) -> float:
    return metrics.auroc([int(t) for t in true], answers)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def score_embeddings(
    task: ChallengeTask, cases: Sequence[Truth], outputs: Mapping[Key, Path], target: str, groups: Sequence[str]
) -> ChallengeScores:
    """The linear probe on embeddings, half of the people of every class told: tasks 6 and 7.

    Args:
        target: column with the classes.
        groups: columns between which fairness is told; an age is cut into decades.

    Raises: ConfigError where an embedding is missing or a class has too few people, or groups are lacking.
    """
    if any(name.startswith("fairness") for name in task.metrics) and not groups:
        raise ConfigError(f"{task.id} is scored between groups: expected groups=[COLUMN,...]")
    lacking = [case for case in cases if case.key not in outputs]
    if lacking:
        raise ConfigError(f"{len(lacking)} of {len(cases)} cases have no embedding, first {'/'.join(lacking[0].key)}")
    classes = sorted({case.columns[target] for case in cases})
    labels = [classes.index(case.columns[target]) for case in cases]
    if len(classes) < 2 or min(labels.count(k) for k in range(len(classes))) < 5:
        raise ConfigError(f"{target}: {len(classes)} classes, expected two or more with five people or more each")
    features = np.stack([value_of(task, outputs[case.key]).ravel() for case in cases])
    train, validation, test = linear_probe.split(labels)

    def of(places: np.ndarray) -> list[int]:
        return [labels[int(i)] for i in places]

    found = linear_probe.probe(features[train], of(train), features[validation], of(validation), features[test])
    told = [cases[int(i)] for i in test]
    between = {name: _groups([case.columns.get(name) for case in told]) for name in groups}
    values = metrics.score(task, of(test), found.scores.tolist(), groups=between)
    rows = [
        dict(zip(("dataset", "subject", "session"), case.key, strict=True))
        | {"truth": case.columns[target], "answer": classes[int(np.argmax(row))], "note": ""}
        for case, row in zip(told, found.scores, strict=True)
    ]
    one = {name: _finite({"mean": v, "low": None, "high": None, "n": len(told)}) for name, v in values.items()}
    return ChallengeScores(tuple(rows), one, 0)


def _groups(texts: Sequence[str | None]) -> list[str | None]:
    """Numbers of many kinds by decade, anything else as it is."""
    try:
        numbers = [None if text is None else float(text) for text in texts]
    except ValueError:
        return list(texts)
    if len(set(numbers)) <= _DECADE:
        return list(texts)
    return [None if number is None else f"{int(number // _DECADE) * 10}s" for number in numbers]


# ---- what the verbs call ---------------------------------------------------------------------------------------------


def evaluate(
    task: ChallengeTask,
    manifest_file: Path,
    out: Path,
    *,
    bundle: Path | None = None,
    predictions: Path | None = None,
    target: str = "",
    groups: Sequence[str] = (),
    seed: int = 0,
    how: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ChallengeScores:
    """Scores a bundle, or outputs that are there, and writes cases.csv and summary.json.

    Args:
        bundle, predictions: one of them; of an embedding ``predictions``, a folder of .npy.
        how: device, precision and overlap of a bundle.

    Raises: BrainfmError for whatever cannot be used.
    """
    if (bundle is None) == (predictions is None):
        raise ConfigError("evaluate needs either bundle= or predictions=, found both or neither")
    manifest = read_manifest(manifest_file)
    if task.kind == "embedding" and (predictions is None or not target):
        raise ConfigError(f"{task.id}: expected predictions= with embeddings and target= with the column of classes")
    cases = truths(task, manifest, target)
    if predictions is not None:
        outputs = outputs_below(task, predictions, cases)
    else:
        assert bundle is not None
        outputs = predicted(task, bundle, manifest, cases, out / "predictions", how or {}, progress)
    if task.kind == "embedding":
        found = score_embeddings(task, cases, outputs, target, groups)
    else:
        found = score(task, cases, outputs, seed)
    names = list(found.rows[0])
    write_table(out / CASES, names, [[_cell(row[name]) for name in names] for row in found.rows])
    summary = {"task": task.id, "cases": len(cases), "missing": found.missing, "seed": seed, "metrics": found.values}
    write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return found


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def describe(task: ChallengeTask, found: ChallengeScores) -> list[str]:
    """Lines for people."""
    lines = [f"{task.id}: {len(found.rows)} cases, {found.missing} without a usable output, as the organisers score it"]
    for name, value in found.values.items():
        if value["mean"] is None:
            lines.append(f"{name}: undefined")
        elif value["low"] is None:
            lines.append(f"{name}: {value['mean']:.3f}, {value['n']} cases")
        else:
            lines.append(f"{name}: {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}], {value['n']} cases")
    return lines


def score_given(task: ChallengeTask, root: Path, out: Path) -> ChallengeScores | None:
    """Scores of the outputs in a validator's folder, where ``labels/`` lies beside the scans that were given.

    Returns: None where there are no answers, or the task has none.
    """
    folder = root.parent if root.name == SCANS else root
    if task.kind == "embedding" or not (folder / LABELS).is_dir() or not (folder / SCANS).is_dir():
        return None
    with tempfile.TemporaryDirectory(prefix="brainfm") as place:
        found = convert(task, folder, Path(place) / "manifest.csv")
        cases = truths(task, read_manifest(found.manifest))
        outputs = outputs_below(task, out, cases)
        return score(task, [case for case in cases if case.key in outputs], outputs)


def describe_given(task: ChallengeTask, found: ChallengeScores | None) -> list[str]:
    """Lines for people; a score on a handful of cases that may have been trained on is no forecast."""
    if found is None:
        return []
    return [*describe(task, found), "note: of these few cases; where they were trained on, this is no forecast"]
