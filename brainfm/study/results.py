"""Results of a fine-tuning as one JSON document: cohort, splits, scores against baselines, decisions, audit."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from brainfm.curves import read_curves
from brainfm.files import write_table
from brainfm.scoring.intervals import Interval
from brainfm.settings import plain
from brainfm.study import transferred
from brainfm.tasks.study import CHOICE, Decided, Row, Split, Study, subjects_of

FILE = "results.json"
FORMAT = 2
_MOST_VALUES = 12  # of a column that is shown value by value
_MOST_POINTS = 200  # of a curve that is drawn


class RunSettings(Protocol):
    """What is told of a run's settings beside all their values."""

    @property
    def audit(self) -> bool: ...

    @property
    def audit_columns(self) -> tuple[str, ...]: ...

    @property
    def command(self) -> str: ...


def collect(
    study: Study,
    settings: RunSettings,
    splits: Sequence[Split],
    decided: Decided,
    baselines: Mapping[str, Sequence[Row]],
    plan: Mapping[str, Any],
    seed: int,
    curve: Mapping[str, Any] | None = None,
    curves: Mapping[str, Any] | None = None,
    tried: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The document; numbers that are not finite become null.

    Args:
        decided: of the model's held-out rows.
        baselines: decided rows by name.
        curve: of the few-shot protocol.
        curves: see `training_curves`.
        tried: see `candidates`.
    """
    scored = study.score(decided.rows, seed)
    scores = {"model": _intervals(scored.metrics)}
    comparisons = []
    for name, rows in baselines.items():
        scores[name] = _intervals(study.score(rows, seed).metrics)
        comparisons.append({"against": name, **study.compare(decided.rows, rows, seed)})
    audited = study.audit(decided.rows, list(settings.audit_columns), seed) if settings.audit else None
    document = _header(study, settings, splits, plan) | {
        "scores": scores,
        "comparisons": comparisons,
        "decisions": decided.decisions.to_dict(),
        "decided": list(decided.said),
        "calibration": decided.calibration,
        "cases": [{k: v for k, v in row.items() if k != "candidates"} for row in scored.rows],
        "candidates": tried,
        "audit": audited,
        "learning_curve": curve,
        "curves": curves,
    }
    return finite(document)


def candidates(
    study: Study, folder: Path, splits: Sequence[Split], rows: Sequence[Row], seed: int
) -> dict[str, Any] | None:
    """What was chosen among in each fold, by what, and how every candidate does on the cases that are scored.

    Args:
        folder: holds a folder for each split.
        rows: held-out rows as `Study.conclude` gives them.

    Returns:
        ``table``: name -> ``outer`` (the primary score of that candidate alone, decided as the model's answers are,
        with its interval), ``inner`` (mean loss in the inner folds) and ``chosen`` (in how many folds);
        ``folds``: run -> what was written about its choice; ``without_map``: the primary score where cases came without
        a label map, None where that makes no difference. None in all where nothing was to be chosen.
    """
    told = {s.name: json.loads((folder / s.name / CHOICE).read_text()) for s in splits
            if (folder / s.name / CHOICE).exists()}  # fmt: skip
    names = list(dict.fromkeys(name for row in rows for name in row.get("candidates", ())))
    if not told:
        return None

    def outer_of(own: Sequence[Row]) -> dict[str, Any]:
        return vars(study.score(study.decide(own).rows, seed).metrics[study.primary])

    table: dict[str, Any] = {}
    for name in names:
        outer = outer_of([row | {"raw": row["candidates"][name]} for row in rows if name in row["candidates"]])
        inner = [found["losses"][name] for found in told.values() if name in found["losses"]]
        chosen = sum(found["chosen"] == name for found in told.values())
        table[name] = {"outer": outer, "inner": float(np.mean(inner)) if inner else None, "chosen": chosen}
    without = [row | {"raw": row["candidates"][row["fallback"]]} for row in rows]
    differs = any(row["fallback"] != row["chosen"] for row in rows)
    return finite({"table": table, "folds": told, "without_map": outer_of(without) if differs else None})


def training_curves(folder: Path, splits: Sequence[Split]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Losses and scores while training: run -> name -> (step, value) pairs, at most 200 a curve.

    Longer curves are thinned to the means of neighbouring steps.

    Args:
        folder: holds a folder for each split.
    """
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for split in splits:
        points: dict[str, list[tuple[float, float]]] = {}
        for step, name, value in read_curves(folder / split.name / "curves.csv"):
            if name not in ("lr", "grad_norm"):
                points.setdefault(name, []).append((float(step), value))
        found[split.name] = {name: _thinned(values) for name, values in points.items()}
    return found


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    parts = np.array_split(np.array(points, dtype=np.float64), min(len(points), _MOST_POINTS))
    return [(float(step), float(value)) for step, value in (part.mean(axis=0) for part in parts)]


def collect_curve(
    study: Study, settings: RunSettings, splits: Sequence[Split], plan: Mapping[str, Any], curve: Any
) -> dict[str, Any]:
    """The document of a learning curve that has no point with all cases, and so no bundle."""
    return finite(_header(study, settings, splits, plan) | {"learning_curve": curve})


def _header(study: Study, settings: RunSettings, splits: Sequence[Split], plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "task": study.spec.to_dict(),
        "preprocess": study.store.spec.to_dict(),
        "store": str(study.store.path.resolve()),
        "config": plain(settings),
        "command": settings.command or "brainfm finetune, called from Python",
        "primary": study.primary,
        "larger_is_better": study.larger_is_better,
        "cohort": cohort(study),
        "plan": dict(plan),
        "splits": [
            {
                "repeat": s.repeat, "fold": s.fold, "folder": s.name, "trained": len(s.trained), "inner": len(s.inner),
                "held": ["/".join(case.session.key) for case in s.held],
            } for s in splits
        ],
    }  # fmt: skip


def cohort(study: Study) -> dict[str, Any]:
    """Who was there: counts, contrasts, the manifest's columns, who was left out and why."""
    sessions = [case.session for case in study.cases]
    contrasts = Counter(contrast for s in sessions for contrast in {scan.contrast for scan in s.scans})
    columns: dict[str, Any] = {}
    for name in sorted({column for s in sessions for column in s.columns}):
        values = [s.columns[name] for s in sessions if s.columns.get(name)]
        numbers = _numbers(values)
        if numbers is not None and len(set(values)) > _MOST_VALUES:
            low, middle, high = np.percentile(numbers, [0, 50, 100])
            columns[name] = {"n": len(values), "median": float(middle), "smallest": float(low), "largest": float(high)}
        elif len(set(values)) <= _MOST_VALUES:
            columns[name] = {"n": len(values), "counts": dict(sorted(Counter(values).items()))}
    shapes = np.array([s.shape for s in sessions])
    return {
        "sessions": len(sessions),
        "subjects": len({s.subject_key for s in sessions}),
        "contrasts": dict(sorted(contrasts.items())),
        "columns": columns,
        "shape_vox": {"median": np.median(shapes, axis=0).tolist(), "largest": shapes.max(axis=0).tolist()},
        "left_out": list(study.left_out),
    }


def point(
    study: Study,
    shots: int | None,
    splits: Sequence[Split],
    rows: Sequence[Row],
    baselines: Mapping[str, Sequence[Row]],
    seed: int,
    tried: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One point of a learning curve: the primary score of each condition with its interval.

    Args:
        tried: see `candidates`.
    """
    decided = study.decide(rows).rows
    conditions = {"model": decided, **baselines}
    trained = [len({case.session.subject_key for case in (*s.trained, *s.inner)}) for s in splits]
    return finite({
        "shots": shots,
        "subjects": float(np.mean(trained)),
        "scores": {
            name: _intervals({study.primary: study.score(found, seed).metrics[study.primary]})[
                study.primary
            ]
            for name, found in conditions.items()
        },
        "comparisons": [{"against": n, **study.compare(decided, found, seed)} for n, found in baselines.items()],
        "candidates": tried,
    })  # fmt: skip


def write_curve(file: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """learning_curve.csv: a row for each number of shots and condition."""
    rows: list[list[object]] = []
    for found in points:
        tried = {f"candidate {n}": c["outer"] for n, c in ((found.get("candidates") or {}).get("table") or {}).items()}
        for name, score in (found["scores"] | tried).items():
            shots = "all" if found["shots"] is None else found["shots"]
            numbers = ["" if score[k] is None else f"{score[k]:.6g}" for k in ("mean", "low", "high")]
            rows.append([shots, f"{found['subjects']:g}", name, *numbers, score["n"]])
    write_table(file, ["shots", "training_subjects", "condition", "score", "low", "high", "cases"], rows)


def headline(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the model card and scores.json say."""
    primary = document["primary"]
    own = document["scores"]["model"]
    found = {name: value["mean"] for name, value in own.items()}
    rows = document["cases"]
    return found | {
        "low": own[primary]["low"],
        "high": own[primary]["high"],
        "n_cases": len(rows),
        "n_subjects": len(set(subjects_of(rows))),
        "folds": len(document["splits"]),
        "baselines": {n: s[primary]["mean"] for n, s in document["scores"].items() if n != "model"},
        **transferred.headline(document),
        **(_candidates_told(document["candidates"]) if document.get("candidates") else {}),
        "note": "each case is answered by the fold that did not train on it; nothing was chosen on the cases that are "
        f"scored; interval of {primary}: bootstrap by subject, 95 %",
    }


def _candidates_told(tried: Mapping[str, Any]) -> dict[str, Any]:
    table = {
        name: {"outer": c["outer"]["mean"], "inner_loss": c["inner"], "folds_that_ship_it": c["chosen"]}
        for name, c in tried["table"].items()
    }
    without = tried.get("without_map")
    return {"candidates": table, **({"without_label_map": without["mean"]} if without else {})}


def describe(document: Mapping[str, Any]) -> list[str]:
    """The scores in a few lines."""
    lines = []
    primary = document["primary"]
    for name, found in document.get("scores", {}).items():
        lines.append(f"{name}: {primary} {_interval_words(found[primary])}, {found[primary]['n']} cases")
    for c in document.get("comparisons", []):
        lines.append(f"against {c['against']}: {_signed(c['difference'])} [{_signed(c['low'])}, {_signed(c['high'])}], "
                     f"p {'below 0.001' if (c['p'] or 1) < 0.001 else _number(c['p'])}")  # fmt: skip
    for name, c in ((document.get("candidates") or {}).get("table") or {}).items():
        lines.append(f"candidate {name}: {primary} {_interval_words(c['outer'])}, shipped by {c['chosen']} of "
                     f"{len(document['candidates']['folds'])} folds")  # fmt: skip
    lines += document.get("decided", [])
    lines += transferred.describe(document["transfer"]) if document.get("transfer") else []
    for found in (document.get("learning_curve") or {}).get("points", []):
        shots = "all" if found["shots"] is None else found["shots"]
        said = ", ".join(f"{name} {_interval_words(score)}" for name, score in found["scores"].items())
        lines.append(f"{shots} shots: {said}")
        tried = (found.get("candidates") or {}).get("table") or {}
        if tried:
            each = ", ".join(f"{n} {_number(c['outer']['mean'])} ({c['chosen']})" for n, c in tried.items())
            lines.append(f"{shots} shots: candidates (folds that ship them): {each}")
    audit = document.get("audit")
    if audit:
        lines.append(f"shortcuts: {audit['verdict']}")
    return lines


def finite(value: Any) -> Any:
    """The same with plain numbers, and None for those that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, (np.floating, float)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value


def _intervals(metrics: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: vars(found) for name, found in metrics.items()}


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        return [float(v) for v in values]
    except ValueError:
        return None


def _interval_words(found: Mapping[str, Any]) -> str:
    return f"{_number(found['mean'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"
