"""Evidence of pre-training: what each objective teaches a backbone; one table, equal budgets, people split by subject.

    python scripts/evidence/render_contrasts.py --data IXI2MM --out cohort   # T2 and FLAIR for every T1 (label maps)
    brainfm manifest root=cohort out=cohort.csv labels.dseg='*dseg*'
    brainfm prepare manifest=cohort.csv store=store preprocess=iso2mm preprocess.labels=nearest
    python scripts/evidence/pretraining.py --store store --out evidence --steps 400

A third of the subjects is held out of everything: pre-training, anatomical targets, and the fitting of every probe.
Each condition sees as many patches in as many steps, with the same learning rate, backbone and seed. Then, frozen:

- age and sex from the T1: features of the upper head (mean and deviation of every map over a box of 160 x 192 x 160 mm
  that holds the brain), ridge and logistic regression fitted on the T1s of the subjects that were trained on, scored on
  those held out;
- regions: a linear classifier of the maps' values at single voxels, fitted on few labelled subjects, Dice of the groups
  over sampled voxels of the held-out heads;
- the split: the probes of brainfm.probing.online on the held-out subjects' scans of all contrasts.

Intervals are percentile bootstraps over held-out subjects. Interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from brainfm.cli import main as brainfm
from brainfm.data import schemes
from brainfm.data.store import SessionEntry, Store
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_in
from brainfm.objectives.objective import build_objective
from brainfm.probing.online import ages_of, probe, sexes_of
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.training.pretrain import split_sessions
from brainfm.training.run import commit_of_code

HELD = 0.34
BOX_MM = (160, 192, 160)
COARSE, RANDOM = "the scan on 8x8x8 cells, no network", "none (random weights)"
SMALL = ["objective.mask_unit_vox=8", "objective.mask_ratio=0.75"]
AP = ["objective=anatomy_pathology", *SMALL]
# name: overrides; `pairs` encode two scans a sample and get half the samples a step
CONDITIONS: dict[str, tuple[bool, list[str]]] = {
    "mae": (False, ["objective=mae"]),
    "cross_contrast standard": (True, ["objective=cross_contrast"]),
    "cross_contrast published": (True, ["objective=cross_contrast", "objective.swap=published"]),
    "anatomy_pathology": (False, AP),
    "  anatomy off": (False, [*AP, "objective.anatomy_weight=0"]),
    "  pathology off": (False, [*AP, "objective.pathology_weight=0"]),
    "  both off (mae, 8-voxel blocks)": (
        False, [*AP, "objective.anatomy_weight=0", "objective.pathology_weight=0"],
    ),
    "  with agreement": (True, [*AP, "objective.agreement_weight=0.15"]),
    "mae+contrastive": (True, ["objective=mae+contrastive"]),
}  # fmt: skip


def train(name: str, args: argparse.Namespace, seed: int) -> Path:
    """The backbone file of a condition; made, resumed or found."""
    pairs, words = CONDITIONS[name]
    run = args.out / "runs" / f"{_slug(name)}_{seed}"
    file = run / "backbone.safetensors"
    if not file.exists():
        latent = [] if any("latent" in w for w in words) else [f"objective.latent_channels={args.latent}"]
        code = brainfm([
            "pretrain", f"store={args.store}", f"run={run}", f"backbone={args.backbone}", *words, *latent,
            f"data.patch_vox=[{args.patch},{args.patch},{args.patch}]", f"data.validation={HELD}",
            f"seed={seed}", f"trainer.max_steps={args.steps}", f"trainer.batch_size={args.batch // (1 + pairs)}",
            "trainer=cpu" if not torch.cuda.is_available() else "trainer=gpu", f"trainer.precision={args.precision}",
            f"optim.lr={args.lr}", "trainer.evaluate_every=0", "trainer.checkpoint_every=100", "probe=null",
            f"trainer.threads={args.threads}",
        ])  # fmt: skip
        if code or not file.exists():
            raise SystemExit(f"{name}: pre-training ended with {code}")
    return file


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9+]+", "_", name.lower()).strip("_")


# ---- frozen features -------------------------------------------------------------------------------------------------


@torch.no_grad()
def maps_of(backbone: Backbone, voxels: np.ndarray) -> list[Tensor]:
    """Feature maps of a whole scan, padded with its background to a multiple of the coarsest stride."""
    image = torch.from_numpy(voxels.astype(np.float32))[None, None]
    stride = backbone.strides[-1]
    padding = [p for edge in reversed(voxels.shape) for p in (0, -edge % stride)]
    return backbone.features(F.pad(image, padding, value=float(image.min())))


def summary(maps: Sequence[Tensor], head: Tensor) -> np.ndarray:
    """Mean and deviation of every channel of every map over the head."""
    found = []
    for values in maps:
        weight = F.interpolate(head, values.shape[2:], mode="area")[0, 0].flatten()
        flat, total = values[0].flatten(1), weight.sum()
        mean = flat @ weight / total
        found += [mean, ((flat - mean[:, None]).square_() @ weight / total).sqrt()]
    return torch.cat(found).numpy()


def at_voxels(maps: Sequence[Tensor], strides: Sequence[int], voxels: np.ndarray) -> np.ndarray:
    """The maps' values [N, E of all maps] at voxels [N, 3], linear between the centres of their cells."""
    found = []
    for values, stride in zip(maps, strides):
        place = (torch.from_numpy(voxels).float() + 0.5) / stride
        edges = torch.tensor(values.shape[2:])
        grid = (2 * place / edges - 1).flip(1)[None, :, None, None]
        found.append(F.grid_sample(values, grid, padding_mode="border", align_corners=False)[0, :, :, 0, 0].T)
    return torch.cat(found, dim=1).numpy()


class Heads:
    """The T1s of the cohort: voxels, head, region groups at sampled voxels."""

    def __init__(self, store: Store, sessions: Sequence[SessionEntry], label: str, scheme: str, voxels: int) -> None:
        self.store, self.label, self.voxels = store, label, voxels
        self.box_vox = tuple(round(mm / s / 16) * 16 for mm, s in zip(BOX_MM, store.spec.spacing_mm))
        self.table = schemes.lookup(scheme, "groups", unknown="ignore")
        self.sessions = [
            s for s in sessions
            if any(x.name == "t1" for x in s.scans) and any(x.name == label for x in s.labels)
        ]  # fmt: skip

    def scan(self, session: SessionEntry) -> np.ndarray:
        return self._upper(session, "t1")

    def _upper(self, session: SessionEntry, name: str) -> np.ndarray:
        """The part of the head that holds the brain: in the middle of X and Y, at the upper end of Z."""
        x, y, z = (edge - size for edge, size in zip(session.shape, self.box_vox))
        return self.store.block(session, name, (x // 2, y // 2, max(z, 0)), self.box_vox)

    def sampled(self, session: SessionEntry, scan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[N, 3] voxels of the head and their groups [N]."""
        ids = self._upper(session, self.label)
        groups = np.where(ids < len(self.table), self.table[np.minimum(ids, len(self.table) - 1)], -1)
        places = np.argwhere((scan > scan.min()) & (groups >= 0))
        chosen = np.random.default_rng(0).choice(len(places), min(self.voxels, len(places)), replace=False)
        return places[chosen], groups[tuple(places[chosen].T)]


def extract(backbone: Backbone, heads: Heads, dense: set[int]) -> dict[str, Any]:
    """Summaries of every head, and the sampled voxels' features of those that are to be labelled."""
    rows: dict[str, Any] = {"summary": [], "features": {}, "groups": {}}
    for number, session in enumerate(heads.sessions):
        scan = heads.scan(session)
        maps = maps_of(backbone, scan)
        shape = [edge * backbone.strides[0] for edge in maps[0].shape[2:]]
        head = torch.zeros(1, 1, *shape)
        head[0, 0, : scan.shape[0], : scan.shape[1], : scan.shape[2]] = torch.from_numpy(scan > scan.min())
        rows["summary"].append(summary(maps, head))
        if number in dense:
            places, rows["groups"][number] = heads.sampled(session, scan)
            rows["features"][number] = at_voxels(maps, backbone.strides, places)
    rows["summary"] = np.stack(rows["summary"])
    return rows


# ---- questions -------------------------------------------------------------------------------------------------------


def ridge_age(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 16))).fit(x, y).predict(other)


def logistic_sex(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    model = LogisticRegression(C=0.01, max_iter=2000)
    return make_pipeline(StandardScaler(), model).fit(x, y).decision_function(other)


def dice_of_groups(found: dict[str, Any], few: Sequence[int], test: Sequence[int]) -> np.ndarray:
    """Mean Dice over the groups that occur (background left out), a number a test head."""
    rng = np.random.default_rng(0)
    x, y = [], []
    for i in few:
        for group in np.unique(found["groups"][i]):
            places = np.flatnonzero(found["groups"][i] == group)
            places = rng.choice(places, min(len(places), 400), replace=False)
            x.append(found["features"][i][places])
            y.append(found["groups"][i][places])
    scaler = StandardScaler().fit(np.concatenate(x).astype(np.float64))
    model = LogisticRegression(C=0.1, max_iter=300)
    model.fit(scaler.transform(np.concatenate(x).astype(np.float64)), np.concatenate(y))
    scores = []
    for i in test:
        truth = found["groups"][i]
        guess = model.predict(scaler.transform(found["features"][i].astype(np.float64)))
        dices = [
            2 * np.sum((guess == g) & (truth == g)) / (np.sum(guess == g) + np.sum(truth == g))
            for g in np.unique(truth) if g > 0
        ]  # fmt: skip
        scores.append(float(np.mean(dices)))
    return np.array(scores)


def auroc_interval(y: np.ndarray, scores: np.ndarray) -> list[float]:
    rng, drawn = np.random.default_rng(0), []
    while len(drawn) < 2000:
        rows = rng.integers(len(y), size=len(y))
        if 0 < y[rows].sum() < len(rows):
            drawn.append(roc_auc_score(y[rows], scores[rows]))
    return [float(roc_auc_score(y, scores)), *(float(v) for v in np.percentile(drawn, [2.5, 97.5]))]


def interval(values: np.ndarray) -> list[float]:
    found = bootstrap(mean_score, values, values, groups=[str(n) for n in range(len(values))], seed=0)
    return [found.mean, found.low, found.high]


def ask(found: dict[str, Any], heads: Heads, held: set[str], shots: Sequence[int]) -> dict[str, Any]:
    """Errors, scores and Dices of the held-out subjects."""
    ages, _ = ages_of(heads.sessions)
    sexes = sexes_of(heads.sessions)
    test = [s.subject_key in held for s in heads.sessions]
    answers: dict[str, Any] = {}
    for name, values, fit in (("age", ages, ridge_age), ("sex", sexes, logistic_sex)):
        rows = [i for i, s in enumerate(heads.sessions) if s.key in values]
        y = np.array([float(values[heads.sessions[i].key]) for i in rows])
        away = np.array([test[i] for i in rows])
        x = found["summary"][rows]
        guess = fit(x[~away], y[~away], x[away])
        if name == "age":
            answers["age_errors"] = np.abs(guess - y[away]).tolist()
            answers["age_mean_errors"] = np.abs(y[~away].mean() - y[away]).tolist()
        else:
            answers["sex_scores"], answers["sex_truth"] = guess.tolist(), y[away].tolist()
    if "features" in found:
        fitted, away = labelled(heads, held)
        for few in shots:
            answers[f"dice_{few}"] = dice_of_groups(found, fitted[:few], away).tolist()
    return answers


def labelled(heads: Heads, held: set[str]) -> tuple[list[int], list[int]]:
    """The heads that may serve as labelled ones, in the order in which they are taken, and those that are scored."""
    away = [i for i, s in enumerate(heads.sessions) if s.subject_key in held]
    fitted = sorted(set(range(len(heads.sessions))) - set(away))
    return [fitted[k] for k in np.random.default_rng(1).permutation(len(fitted))], away


def small_scans(heads: Heads, cells: int = 8) -> dict[str, Any]:
    """A baseline without a network: the scan itself on a coarse grid."""
    rows = [
        F.adaptive_avg_pool3d(torch.from_numpy(heads.scan(s).astype(np.float32))[None, None], cells).flatten().numpy()
        for s in heads.sessions
    ]
    return {"summary": np.stack(rows)}


# ---- table -----------------------------------------------------------------------------------------------------------


def table(answers: dict[str, dict[str, Any]], shots: Sequence[int]) -> str:
    """Markdown: a row a condition, means over seeds of each subject's score, then the interval over subjects."""
    head = ["pre-training", "age MAE, years", "sex AUROC", *(f"region Dice, {n} labelled" for n in shots)]
    head += ["subject from anatomy", "contrast from anatomy", "subject from contrast", "contrast from contrast"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in answers.items():
        cells = [name.replace("  ", "– ")]
        cells.append(_cell(np.mean(row["age_errors"], axis=0), 1))
        cells.append(_triple(auroc_interval(np.array(row["sex_truth"][0]), np.mean(row["sex_scores"], axis=0)), 2))
        cells += [_cell(np.mean(row[f"dice_{n}"], axis=0), 3) if row.get(f"dice_{n}") else "" for n in shots]
        parts = ("anatomy", "anatomy", "contrast", "contrast")
        for part, what in zip(parts, ("subject", "contrast", "subject", "contrast")):
            values = [p[f"{part}_{what}"] for p in row.get("probes", []) if f"{part}_{what}" in p]
            cells.append(f"{np.mean(values):.2f}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: np.ndarray, digits: int) -> str:
    return _triple(interval(np.asarray(values)), digits)


def _triple(values: Sequence[float], digits: int) -> str:
    mean, low, high = (f"{v:.{digits}f}" for v in values)
    return f"{mean} [{low}, {high}]"


def differences(answers: dict[str, dict[str, Any]], base: str, shots: Sequence[int]) -> str:
    """Paired with the base condition, subject by subject."""
    head = [f"against {base}", "age MAE", *(f"Dice, {n}" for n in shots)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in answers.items():
        if name == base:
            continue
        cells = []
        for key, digits in (("age_errors", 1), *((f"dice_{n}", 3) for n in shots)):
            if row.get(key):
                cells.append(_cell(np.mean(row[key], axis=0) - np.mean(answers[base][key], axis=0), digits))
            else:
                cells.append("")
        lines.append(f"| {name.replace('  ', '– ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training; the split stays")
    parser.add_argument("--batch", type=int, default=8, help="patches encoded a step")
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--backbone", default="unet")
    parser.add_argument("--latent", type=int, default=256)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--voxels", type=int, default=8000, help="sampled of each head")
    parser.add_argument("--label", default="dseg_labels")
    parser.add_argument("--scheme", default="dlmuse")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS))
    parser.add_argument("--train-only", action="store_true", help="for a second process on a machine with more cores")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = Store.open(args.store)
    held = {s.subject_key for s in split_sessions(store.sessions, HELD, 0)[1]}
    heads = Heads(store, store.sessions, args.label, args.scheme, args.voxels)
    tested = [s for s in heads.sessions if s.subject_key in held]
    print(f"{len(heads.sessions) - len(tested)} subjects to train and fit on, {len(tested)} held out", flush=True)
    if args.train_only:
        for seed in args.seeds:
            for name in args.conditions:
                train(name, args, seed)
        return
    answers: dict[str, dict[str, Any]] = {}

    def keep(name: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        file = args.out / "answers" / f"{_slug(name)}_{seed}.json"
        if not file.exists():
            found = json.dumps(make())
            file.parent.mkdir(exist_ok=True)
            file.write_text(found)
        for key, value in json.loads(file.read_text()).items():
            answers.setdefault(name, {}).setdefault(key, []).append(value)

    def of_backbone(backbone: Backbone, encode: Any, seed: int) -> dict[str, Any]:
        few, away = labelled(heads, held)
        found = ask(extract(backbone, heads, {*few[: max(args.shots)], *away}), heads, held, args.shots)
        if encode is not None:
            found["probes"] = probe(encode, store, tested, (args.patch,) * 3, seed)
        return found

    def untrained(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        backbone = swap_in(build_backbone(args.backbone, **_widths(args.backbone)))
        return of_backbone(backbone.eval(), None, seed)

    def trained(name: str, seed: int) -> dict[str, Any]:
        began = time.time()
        loaded = load_backbone(train(name, args, seed))
        objective = build_objective(
            loaded.objective["name"], loaded.backbone, patch_vox=loaded.patch_vox, seed=seed,
            **loaded.objective["config"],
        ).eval()  # fmt: skip
        state = {f"backbone.{k}": v for k, v in loaded.backbone.state_dict().items()} | loaded.extra
        objective.load_state_dict(objective.state_dict() | state)
        with torch.no_grad():
            row = of_backbone(loaded.backbone, torch.no_grad()(objective.encode), seed)
        print(f"{name}, seed {seed}: {time.time() - began:.0f} s", flush=True)
        return row

    keep(COARSE, 0, lambda: ask(small_scans(heads), heads, held, ()))
    for seed in args.seeds:
        keep(RANDOM, seed, lambda seed=seed: untrained(seed))
        for name in args.conditions:
            keep(name, seed, lambda name=name, seed=seed: trained(name, seed))
    ordered = {name: answers[name] for name in (COARSE, RANDOM, *CONDITIONS) if name in answers}
    guess = interval(np.array(answers[RANDOM]["age_mean_errors"][0]))
    text = "\n\n".join([
        table(ordered, args.shots),
        differences(ordered, RANDOM, args.shots),
        f"Saying the mean age to everybody: {guess[0]:.1f} [{guess[1]:.1f}, {guess[2]:.1f}] years. "
        f"{len(tested)} held-out subjects, {len(heads.sessions) - len(tested)} to train and fit on; {args.steps} steps "
        f"of {args.batch} patches of {args.patch}^3, seeds {', '.join(map(str, args.seeds))}; "
        f"commit {commit_of_code()[:9]}.",
    ])  # fmt: skip
    (args.out / "table.md").write_text(text + "\n")
    print(text)


def _widths(backbone: str) -> dict[str, Any]:
    from brainfm.verbs.compose import resolve

    config = resolve("pretrain", ["store=x", "run=x", f"backbone={backbone}"]).backbone
    return {k: v for k, v in config.items() if k != "name"}


if __name__ == "__main__":
    main()
