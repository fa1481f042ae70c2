"""Renderings beside real scans: a sheet to look at, how well they are told apart, and what rendering costs a step.

    python scripts/report/show_renderings.py --store STORE --out DIR [--samples 400]

DIR/sheet.png shows middle slices of held-out people: real T1, T2 and FLAIR on the left, twelve renderings of label
maps on the right, all as a network in training sees them, artefacts included. DIR/report.json and DIR/report.md hold

- the AUROC of two small classifiers, real against rendered, on windows of 40 voxels of .9-2 mm (a logistic regression
  and boosted trees on statistics of the window: moments, gradients, textures of several scales, spectrum, edges), over
  five folds of people, with a 95 % interval over people. Of all renderings, and of T1-like ones against the T1s of the
  same heads, where neither the contrast nor the data set can give a rendering away; with the statistics that tell most.
- processor seconds of reading, rendering, augmenting and a training step of `experiment=dense_split_s`.

.5 would mean that nobody can tell; renderings need not be that real, but what tells them apart should be meant.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.data.augment import AugmentSpec, apply, augment_spec, draw, render
from brainfm.data.patches import collate
from brainfm.data.regions import REGIONS, RENDERED_FAMILIES, merged_members
from brainfm.data.settings import TargetSpec, WindowSpec
from brainfm.data.store import SessionEntry, Store
from brainfm.data.targets import Targets, find_targets
from brainfm.data.windows import WindowPatches
from brainfm.errors import BrainfmError, StoreError
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.objective import make_objective
from brainfm.objectives.settings import DenseSplitSettings
from brainfm.scoring.answers import auroc
from brainfm.scoring.folds import holdout
from brainfm.scoring.intervals import bootstrap
from brainfm.specs import ViewSpec
from brainfm.synthesis.looks import draw_look
from brainfm.synthesis.settings import LookSpec
from brainfm.training.optim import build_optimizer
from brainfm.training.settings import PretrainSettings
from brainfm.verbs.compose import resolve

EDGE = 40  # voxels of a classifier's window
FOLDS = 5
SHEET_MM, SHEET_VOX = 1.5, 144
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)


# ---- what is shown ---------------------------------------------------------------------------------------------------


class Shown:
    """Windows of some sessions, all real or all rendered, as a network sees them."""

    def __init__(
        self, store: Store, targets: Targets, sessions: Sequence[SessionEntry], spec: WindowSpec, edge: int,
        settings: PretrainSettings, seed: int, artefacts: bool = True,
    ) -> None:  # fmt: skip
        self.views, self.seed = ViewSpec((edge,) * 3, pairs=True, windows=True), seed
        self.patches = WindowPatches(
            store, sessions, self.views, seed, spec, 1, targets=dataclasses.replace(targets, synthesise=0.0)
        )
        self.looks: LookSpec = settings.data.looks
        spec_of = augment_spec(settings.data.augment) if artefacts else None
        self.artefacts: AugmentSpec | None = spec_of and dataclasses.replace(spec_of, flip=0, affine=0, elastic=0)

    def batch(self, number: int) -> Batch:
        batch = render(collate([self.patches[number]]).to("cpu"), self.looks, self.views.patch_vox, self.seed)
        return batch if self.artefacts is None else apply(batch, draw(batch, self.artefacts, self.seed))

    def kind(self, number: int) -> str:
        """Of the rendering that the first view of a sample shows."""
        return draw_look(seeds.stream(self.seed, "look", number, 0), RENDERED_FAMILIES, self.looks).kind


def with_contrast(sessions: Sequence[SessionEntry], contrast: str) -> list[SessionEntry]:
    """Sessions that have such a scan, without their others."""
    found = []
    for session in sessions:
        scans = tuple(scan for scan in session.scans if scan.contrast == contrast)
        if scans:
            found.append(dataclasses.replace(session, scans=scans[:1]))
    return found


def sheet(asked: argparse.Namespace, store: Store, targets: Targets, settings: PretrainSettings) -> list[str]:
    """Draws the sheet; returns what its pictures show."""
    held = [s for s in store.sessions if s.columns.get("side") == "held"] or list(store.sessions)
    still = WindowSpec(
        whole_mm=(SHEET_MM, SHEET_MM), whole_share=1.0, coarse_steps=0, settle_steps=0, rotate_deg=0, stretch=0,
        elastic=0, shift_vox=0, rendered=0.0, mapped_share=None, source_cap=1.0,
    )  # fmt: skip
    pictures: list[tuple[str, np.ndarray]] = []
    for contrast in ("t1", "t2", "flair"):
        own = with_contrast(held, contrast) or with_contrast(store.sessions, contrast)
        shown = Shown(store, targets, own, still, SHEET_VOX, settings, asked.seed) if own else None
        for number in range(4 if shown else 0):
            assert shown is not None
            session = shown.patches.plan(number).session
            pictures.append((f"real {contrast}: {session.dataset}", _middle(shown.batch(number).image, number)))
    mapped = [s for s in held if s.key in targets.maps]
    drawn = Shown(store, targets, mapped, dataclasses.replace(still, rendered=1.0), SHEET_VOX, settings, asked.seed + 1)
    made = []
    for number in range(12):
        session = drawn.patches.plan(number).session
        made.append((f"{drawn.kind(number)}: {session.dataset}", _middle(drawn.batch(number).image, number)))
    _save_sheet(asked.out / "sheet.png", pictures, made)
    return [title for title, _ in (*pictures, *made)]


def _middle(image: torch.Tensor, number: int) -> np.ndarray:
    """[rows, columns]: an axial slice through the middle, a sagittal or coronal one of every third picture."""
    volume = image[0, 0].numpy()
    slices = (volume[:, :, SHEET_VOX // 2], volume[:, SHEET_VOX // 2], volume[SHEET_VOX // 2 + 6])
    return np.asarray(slices[number % 3].T[::-1])


def _save_sheet(path: Path, real: Sequence[tuple[str, np.ndarray]], made: Sequence[tuple[str, np.ndarray]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, columns = 4, 3
    figure, axes = pyplot.subplots(rows, 2 * columns, figsize=(15, 10.6), facecolor="white")
    for axis in axes.flat:
        axis.set_axis_off()
    for place, (title, picture) in enumerate(real):  # a column a contrast
        _picture(axes[place % rows, place // rows], title, picture)
    for place, (title, picture) in enumerate(made):
        _picture(axes[place // columns, columns + place % columns], title, picture)
    figure.suptitle("real scans of held-out people (left) and renderings of held-out label maps (right)", fontsize=11)
    figure.tight_layout(pad=0.4, h_pad=1.4, rect=(0, 0, 1, 0.975))
    figure.savefig(path, dpi=75)
    pyplot.close(figure)


def _picture(axis: Any, title: str, picture: np.ndarray) -> None:
    low, high = np.quantile(picture, [0.0, 0.995])
    axis.imshow(picture, cmap="gray", vmin=low, vmax=max(high, low + 1e-3), interpolation="nearest")
    axis.set_title(title, fontsize=8, pad=2)


# ---- real or rendered ------------------------------------------------------------------------------------------------


def statistics(image: np.ndarray) -> dict[str, float]:
    """Numbers of a window that say nothing of where it lies.

    Args:
        image: [X, Y, Z] float32, standardised.
    """
    found: dict[str, float] = {}
    inside = image > image.min() + 0.1
    values = image[inside] if inside.sum() > 500 else image.ravel()
    mean, std = float(values.mean()), max(float(values.std()), 1e-3)
    scaled = (values - mean) / std
    found |= {"inside": float(inside.mean()), "mean": mean, "log_std": float(np.log(std))}
    found |= {"skew": float((scaled**3).mean()), "kurtosis": float(np.log1p((scaled**4).mean()))}
    found |= {f"q{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(scaled, QUANTILES))}
    counts = np.histogram(scaled, bins=48, range=(-3, 3))[0] / len(scaled)
    found["entropy"] = float(-(counts * np.log(counts + 1e-9)).sum())
    found["peaks"] = float(np.abs(np.diff(counts)).sum())
    previous = image / std
    for scale in (1, 2, 4):  # bands of detail
        smooth = ndimage.gaussian_filter(image / std, scale)
        detail = np.abs(previous - smooth)
        found[f"detail{scale}"] = float(np.log(detail.mean() + 1e-4))
        found[f"detail{scale}_sparse"] = float(np.log(detail.std() / (detail.mean() + 1e-6) + 1e-3))
        found[f"detail{scale}_dark_bright"] = _together(detail[inside], image[inside])
        previous = smooth
    steps = [np.diff(image / std, axis=axis) for axis in range(3)]
    rough = np.array([float(np.log(np.abs(step).mean() + 1e-4)) for step in steps])
    found |= {"edge": float(rough.mean()), "edge_apart": float(np.ptp(rough))}
    flat = np.abs(steps[2]) < 0.05
    found["flat"] = float(flat.mean())
    found["neighbours"] = _together(steps[0][:-1].ravel(), steps[0][1:].ravel())
    spectrum = np.abs(np.fft.rfftn(image - image.mean())) ** 2
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*_frequencies(image.shape), indexing="ij")))
    whole = spectrum.sum() + 1e-9
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.9)):
        band = spectrum[(radius >= low) & (radius < high)].sum()
        found[f"power{low:g}"] = float(np.log(band / whole + 1e-7))
    return found


def _together(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's r; 0 where either does not vary."""
    varies = len(one) > 2 and one.std() > 1e-6 and other.std() > 1e-6
    return float(np.corrcoef(one, other)[0, 1]) if varies else 0.0


def _frequencies(shape: tuple[int, ...]) -> list[np.ndarray]:
    return [np.fft.fftfreq(shape[0]), np.fft.fftfreq(shape[1]), np.fft.rfftfreq(shape[2])]


def told_apart(features: np.ndarray, rendered: np.ndarray, people: Sequence[str], seed: int) -> dict[str, Any]:
    """AUROC of two classifiers over folds of people, with 95 % intervals over people.

    Args:
        features: [N, F].
        rendered: [N] 0 or 1.
        people: whose head a window shows; a person is on one side of a fold.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = sorted(set(people), key=lambda who: seeds.unit_hash(who, f"fold {seed}"))
    fold = np.array([order.index(who) % FOLDS for who in people])
    makers = {
        "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=2000)),
        "trees": lambda: HistGradientBoostingClassifier(max_iter=120, learning_rate=0.08, random_state=seed),
    }
    answers: dict[str, Any] = {"windows": len(rendered), "people": len(order), "rendered": int(rendered.sum())}
    for name, make in makers.items():
        scores = np.zeros(len(rendered))
        for held in range(FOLDS):
            mine = fold == held
            if mine.any() and 0 < rendered[~mine].sum() < (~mine).sum():
                scores[mine] = make().fit(features[~mine], rendered[~mine]).predict_proba(features[mine])[:, 1]
        found = bootstrap(auroc, rendered.astype(float), scores, groups=list(people), seed=seed)
        answers[name] = {"auroc": found.mean, "low": found.low, "high": found.high}
    return answers


def telling(features: np.ndarray, rendered: np.ndarray, names: Sequence[str]) -> list[dict[str, float | str]]:
    """The ten statistics that differ most, each by itself: AUROC, and its middle for real and for rendered windows."""
    rows: list[dict[str, float | str]] = []
    for place, name in enumerate(names):
        column = features[:, place]
        alone = auroc(rendered.astype(float), column)
        middles = [float(np.median(column[rendered == side])) for side in (0, 1)]
        rows.append({"statistic": name, "auroc": alone, "real": middles[0], "rendered": middles[1]})
    return sorted(rows, key=lambda row: -abs(float(row["auroc"]) - 0.5))[:10]


def gather(shown: Shown, count: int, kind: str | None = None) -> tuple[list[dict[str, float]], list[str]]:
    """Statistics of so many windows, and whose head each shows; of renderings those of one kind alone."""
    rows, people, number = [], [], 0
    while len(rows) < count and number < 50 * count:
        if kind is None or shown.kind(number) == kind:
            rows.append(statistics(shown.batch(number).image[0, 0].numpy()))
            people.append(shown.patches.plan(number).session.subject_key)
        number += 1
    return rows, people


def compare(real: Shown, made: Shown, asked: argparse.Namespace, kind: str | None) -> dict[str, Any]:
    """Both classifiers, and what tells most."""
    count = asked.samples if kind is None else asked.samples // 2
    (rows, people), (others, their) = gather(real, count), gather(made, count, kind)
    names = sorted(rows[0])
    features = np.array([[row[name] for name in names] for row in (*rows, *others)])
    rendered = np.repeat([0, 1], [len(rows), len(others)])
    answers = told_apart(features, rendered, [*people, *their], asked.seed)
    return answers | {"telling": telling(features, rendered, names)}


def real_or_rendered(
    asked: argparse.Namespace, store: Store, targets: Targets, settings: PretrainSettings
) -> dict[str, dict[str, Any]]:
    """All renderings against all real scans, and T1-like ones against the T1s of the same heads; see the module."""
    spec = WindowSpec(
        low_mm=0.9, high_mm=2.0, whole_share=0.0, coarse_steps=0, settle_steps=0, elastic=0.3, shift_vox=0,
        rendered=0.0, mapped_share=None, source_cap=0.6,
    )  # fmt: skip
    only_made = dataclasses.replace(spec, rendered=1.0)
    mapped = [s for s in store.sessions if s.key in targets.maps]
    t1 = with_contrast(mapped, "t1")
    found: dict[str, dict[str, Any]] = {}
    for state in ("as trained", "without artefacts"):
        if state == "without artefacts" and asked.quick:
            continue

        def shown(
            sessions: Sequence[SessionEntry], how: WindowSpec, seed: int, artefacts: bool = state == "as trained"
        ) -> Shown:
            return Shown(store, targets, sessions, how, EDGE, settings, seed, artefacts)

        found[state] = {}
        if not asked.quick:
            real = shown([s for s in store.sessions if _has_scan(s)], spec, asked.seed)
            found[state]["all"] = compare(real, shown(mapped, only_made, asked.seed + 1), asked, None)
        if t1:
            made = shown(t1, only_made, asked.seed + 1)
            found[state]["t1"] = compare(shown(t1, spec, asked.seed), made, asked, "t1")
    return found


def _has_scan(session: SessionEntry) -> bool:
    return any(scan.contrast != "rendered" for scan in session.scans)


# ---- what it costs ---------------------------------------------------------------------------------------------------


def costs(
    steps: int, store: Store, targets: Targets, settings: PretrainSettings, trained: Sequence[SessionEntry]
) -> dict[str, float]:
    """Processor seconds of the parts of a training step, and which share of it is rendering."""
    data = settings.data
    assert isinstance(settings.objective, DenseSplitSettings)
    merged = tuple(map(tuple, merged_members()))
    asked = dataclasses.replace(settings.objective, classes=tuple(REGIONS), merged=merged, volumes=len(targets.regions))
    objective = make_objective(asked, build_backbone(**settings.backbone), patch_vox=data.patch_vox, seed=0)
    optimizer = build_optimizer(objective, lr=1e-6, weight_decay=0.0)
    spec = dataclasses.replace(data.windows, rendered=data.rendered)
    patches = WindowPatches(store, trained, objective.views, 0, spec, 1, targets, from_step=spec.settle_steps)
    looks, artefacts = data.looks, augment_spec(data.augment)
    assert artefacts is not None
    artefacts = dataclasses.replace(artefacts, flip=0.0, affine=0.0, elastic=0.0)
    spent = dict.fromkeys(("reading", "rendering", "augmenting", "learning"), 0.0)
    for number in range(steps + 2):
        marks = [time.process_time()]
        batch = collate([patches[number]]).to("cpu")
        marks.append(time.process_time())
        batch = render(batch, looks, objective.views.patch_vox, 0)
        marks.append(time.process_time())
        batch = apply(batch, draw(batch, artefacts, 0))
        marks.append(time.process_time())
        optimizer.zero_grad(set_to_none=True)
        objective(batch, 1.0).total.backward()
        optimizer.step()
        marks.append(time.process_time())
        if number >= 2:
            for name, before, after in zip(spent, marks, marks[1:]):
                spent[name] += (after - before) / steps
    whole = sum(spent.values())
    return {f"{name}_s": value for name, value in spent.items()} | {"rendering_share": spent["rendering"] / whole}


# ---- all of it -------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    lines = ["| windows | renderings | logistic regression | boosted trees | windows, people |", "|" + "---|" * 5]
    for state, of_state in report["auroc"].items():
        for title, answers in of_state.items():
            cells = [
                f"{one['auroc']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
                for one in (answers["logistic"], answers["trees"])
            ]
            of = "all against all real" if title == "all" else "T1-like against T1s of the same heads"
            lines.append(f"| {state} | {of} | {cells[0]} | {cells[1]} | {answers['windows']}, {answers['people']} |")
    if "t1" in report["auroc"]["as trained"]:
        lines += ["", "What tells T1-like renderings of the same heads (as trained), each statistic alone:", ""]
        lines += ["| statistic | AUROC | real | rendered |", "|---|---|---|---|"]
        for row in report["auroc"]["as trained"]["t1"]["telling"]:
            lines.append(f"| {row['statistic']} | {row['auroc']:.2f} | {row['real']:.3f} | {row['rendered']:.3f} |")
    if "cost" in report:
        cost = report["cost"]
        parts = ", ".join(f"{name.removesuffix('_s')} {cost[name]:.3f} s" for name in cost if name.endswith("_s"))
        share = 100 * cost["rendering_share"]
        lines += ["", f"A step of dense_split_s (one processor): {parts}; rendering is {share:.1f} %."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=400, help="windows of each kind")
    parser.add_argument("--steps", type=int, default=12, help="steps that are timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only T1-like renderings against T1s, as trained")
    parser.add_argument("--keys", nargs="*", default=[], help="keys of `brainfm pretrain`, e.g. data.looks.noise=.2")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        words = ["experiment=dense_split_s", f"store={asked.store}", "run=none", *asked.keys]
        settings = resolve("pretrain", words)
        store = Store.open(asked.store)
        targets = find_targets(store, TargetSpec(level="regions"), {s.subject_key for s in store.sessions})
        if not targets.maps:
            raise StoreError(f"{asked.store}: no label map, so nothing can be rendered; expected a *_labels column")
        report: dict[str, Any] = {"keys": asked.keys, "auroc": real_or_rendered(asked, store, targets, settings)}
        if not asked.quick:
            report["shown"] = sheet(asked, store, targets, settings)
            report["cost"] = costs(asked.steps, store, targets, settings, _trained(store))
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2
    (asked.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    text = markdown(report)
    (asked.out / "report.md").write_text(text)
    print(text)
    return 0


def _trained(store: Store) -> list[SessionEntry]:
    """The training side, by the column ``side`` or by hash."""
    if any("side" in s.columns for s in store.sessions):
        return [s for s in store.sessions if s.columns.get("side") == "train"]
    kept, _ = holdout(sorted({s.subject_key for s in store.sessions}), 0.2, 0)
    return [s for s in store.sessions if s.subject_key in set(kept)]


if __name__ == "__main__":
    sys.exit(main())
