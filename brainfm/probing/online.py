"""Online probes: what frozen features know, part by part (contrast, person, age, sex), and how many directions used.

Disentanglement is measured here, not claimed: from an anatomy code the contrast should be hard to tell and the person
easy, from a contrast code the reverse. `split_scores` says what is made of that. Everything is a function of the
weights, the scans and a seed, so that a resumed run writes the same curves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainfm import seeds
from brainfm.data.store import ScanEntry, SessionEntry, Store
from brainfm.files import write_whole
from brainfm.nets.backbone import Backbone
from brainfm.probing.levels import LevelProbe
from brainfm.probing.levels import describe as describe_levels
from brainfm.probing.settings import OnlineProbeSpec
from brainfm.scoring import linear
from brainfm.scoring.answers import auroc
from brainfm.scoring.folds import folds

Encode = Callable[[Tensor], Mapping[str, Tensor]]
Table = dict[str, dict[str, float]]

FILE = "probes.json"
WHOLE = "backbone"  # the part that stands for all of the backbone
TOKEN = "token"  # its class token, where it has one
ENOUGH_HELD = 8  # subjects; with fewer held out, everybody is probed
_FOLDS = 5
_NEIGHBOURS = 5
_VISITS = 2  # sessions of a subject
_PER_CONTRAST = 3  # subjects who must show a contrast before it is asked for
_PER_SEX = 5
_WITH_AGE = 10
_FOR_RANK = 8  # crops, before a rank means anything
_MISSING = frozenset({"", "n/a", "na", "nan", "none", "null", "unknown", "u", "other", "o", "?"})
_SEX = {"male": "m", "man": "m", "female": "f", "woman": "f"}


@dataclass(frozen=True)
class Features:
    """Pooled features of R scans at P places.

    Attributes:
        rows: (session, scan) of each of the R rows.
        parts: name -> [R, P, 2E] float32: E spatial means, then E spatial standard deviations.
    """

    rows: tuple[tuple[SessionEntry, ScanEntry], ...]
    parts: dict[str, np.ndarray]


def with_whole(encode: Encode, backbone: Backbone, untrained: Backbone | None = None) -> Encode:
    """``encode`` and the backbone's deepest map as one more part, ``backbone``, its class token as ``token``; of a
    network as it was before any training ``untrained`` and ``untrained_token``."""

    def parts(image: Tensor) -> Mapping[str, Tensor]:
        found = {**encode(image), **_of(backbone, image, "")}
        return found if untrained is None else found | _of(untrained, image, "untrained")

    return parts


def _of(backbone: Backbone, image: Tensor, name: str) -> dict[str, Tensor]:
    if not backbone.class_token:
        return {name or WHOLE: backbone.features(image)[-1]}
    maps, said = backbone.summarised(image)
    return {name or WHOLE: maps[-1], f"{name}_{TOKEN}" if name else TOKEN: said[:, :, None]}


# ------------------------------------------------------------------------------------------------------- features


def choose(sessions: Iterable[SessionEntry], spec: OnlineProbeSpec, seed: int) -> list[SessionEntry]:
    """Up to ``spec.subjects`` subjects in the order of a hash, those with two known contrasts first; at most two
    sessions of each."""
    of_subject: dict[str, list[SessionEntry]] = {}
    for session in sessions:
        if session.scans:
            of_subject.setdefault(session.subject_key, []).append(session)

    def place(subject: str) -> tuple[bool, float, str]:
        contrasts = {scan.contrast for session in of_subject[subject] for scan in session.scans} - {"unknown"}
        return len(contrasts) < 2, seeds.unit_hash(subject, f"probe {seed}"), subject

    chosen = sorted(of_subject, key=place)[: spec.subjects]
    return [session for subject in sorted(chosen) for session in of_subject[subject][:_VISITS]]


def choose_scans(session: SessionEntry, most: int) -> list[ScanEntry]:
    """The first scan of each contrast, then the repeats, ``most`` in all."""
    first = {scan.contrast: scan for scan in reversed(session.scans)}
    ranked = sorted(session.scans, key=lambda scan: first[scan.contrast] is not scan)  # a stable sort
    return ranked[:most]


def corners(session: SessionEntry, patch_vox: Sequence[int], patches: int, seed: int) -> list[tuple[int, int, int]]:
    """Where the crops of a session begin: the first in the middle, the others up to an eighth of the head from it,
    by the same share of the head in every subject."""
    found = []
    for number in range(patches):
        shift = seeds.stream(seed, "probe place", number).uniform(-0.125, 0.125, 3) if number else np.zeros(3)
        corner = []
        for axis in range(3):
            room = session.shape[axis] - patch_vox[axis]
            wanted = round(room / 2 + float(shift[axis]) * session.shape[axis])
            corner.append(min(max(wanted, 0), room) if room > 0 else room // 2)
        found.append((corner[0], corner[1], corner[2]))
    return found


@torch.no_grad()
def extract(
    encode: Encode,
    store: Store,
    sessions: Sequence[SessionEntry],
    patch_vox: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
    *,
    patches: int = 2,
    scans: int = 4,
    batch_size: int = 4,
) -> Features:
    """Features of the scans of ``sessions``, pooled over each crop.

    Args:
        encode: image [B, 1, X, Y, Z] float32 on ``device`` -> part -> [B, E, ...]; put networks in eval mode before.
        patch_vox: X, Y, Z of a crop.
        seed: of the places.
        patches: places in each head.
        scans: of a session at most.
        batch_size: crops at once.
    """
    rows: list[tuple[SessionEntry, ScanEntry]] = []
    boxes: list[tuple[SessionEntry, str, tuple[int, int, int]]] = []
    first_in_frame: dict[tuple[str, str], SessionEntry] = {}
    for session in sessions:
        # Visits in one frame are read where the first of them is.
        leader = first_in_frame.setdefault((session.subject_key, session.frame), session)
        move = [theirs - ours for theirs, ours in zip(leader.offset_vox, session.offset_vox)]
        places = [(x + move[0], y + move[1], z + move[2]) for x, y, z in corners(leader, patch_vox, patches, seed)]
        for scan in choose_scans(session, scans):
            rows.append((session, scan))
            boxes += [(session, scan.name, place) for place in places]
    pooled: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(boxes), batch_size):
        some = boxes[start : start + batch_size]
        crops = np.stack([store.block(session, name, place, patch_vox) for session, name, place in some])
        image = torch.from_numpy(crops[:, None]).to(device).float()
        for part, value in encode(image).items():
            flat = value.float().reshape(*value.shape[:2], -1)
            both = torch.cat([flat.mean(dim=2), flat.std(dim=2, correction=0)], dim=1)
            pooled.setdefault(part, []).append(both.cpu().numpy())
    shape = (len(rows), patches)
    return Features(tuple(rows), {part: np.concatenate(v).reshape(*shape, -1) for part, v in pooled.items()})


# ------------------------------------------------------------------------------------------------------ questions


def ask(features: Features, seed: int) -> Table:
    """Every question that the scans allow, for every part; what they do not allow is left out.

    - ``contrast``: balanced accuracy of a logistic regression cross-validated by subject, ``contrast_knn`` of the five
      nearest neighbours, ``contrast_chance`` of guessing. Contrasts that three subjects or more show.
    - ``subject``: how often the nearest of all scans of ANOTHER contrast, at the same place, is of the same person;
      ``visit``: the same among all scans of other sessions; each with ``_chance``.
    - ``age_mae`` and ``age_r`` (years; ridge regression, tuned and tested by subject), ``age_mean_mae`` of the training
      mean; ``sex_auroc`` (logistic regression): where enough subjects have the columns ``age`` and ``sex``. With
      ``_knn`` the same of nearest neighbours, as many as inner folds choose (age) or five (sex).
    - ``std``: mean standard deviation of the pooled features over the crops; ``rank``: their effective rank.
    - ``split``, of ``anatomy`` and ``contrast``: see `split_scores`.
    """
    from threadpoolctl import threadpool_limits  # sums must not depend on the number of cores

    table: Table = {}
    with threadpool_limits(1):
        for part, values in features.parts.items():
            means = values[..., : values.shape[-1] // 2].reshape(-1, values.shape[-1] // 2).astype(np.float64)
            answers = _contrast(features, values, seed) | _subject(features, values)
            answers |= _age(features, values, seed) | _sex(features, values, seed)
            answers["std"] = float(means.std(axis=0).mean())
            if len(means) >= _FOR_RANK:
                answers["rank"] = effective_rank(means)
            table[part] = answers
    for part, score in split_scores(table).items():
        table[part]["split"] = score
    return table


def probe(
    encode: Encode,
    store: Store,
    sessions: Sequence[SessionEntry],
    patch_vox: Sequence[int],
    seed: int,
    device: torch.device | str = "cpu",
    *,
    patches: int = 2,
    scans: int = 4,
    batch_size: int = 4,
) -> dict[str, float]:
    """`extract`, then `ask`: the answers as ``<part>_<what>``."""
    found = extract(
        encode, store, sessions, patch_vox, seed, device, patches=patches, scans=scans, batch_size=batch_size
    )
    return flat(ask(found, seed))


def flat(table: Table) -> dict[str, float]:
    return {f"{part}_{what}": value for part, answers in table.items() for what, value in answers.items()}


def split_scores(table: Table) -> dict[str, float]:
    """How far the two codes are apart, for ``anatomy`` and ``contrast`` where both questions were asked.

    With gain(q) = (accuracy - chance) / (1 - chance), 0 at chance or below and 1 where every answer is right:
    anatomy scores gain(subject) - gain(contrast), contrast scores gain(contrast) - gain(subject). Each is 1 for a code
    that holds all of its own and nothing of the other's, 0 for a code that holds as much of both, and negative where
    the codes are swapped. `ask`'s accuracies with their chances are the four numbers they are made of.
    """
    scores = {}
    for part, own, other in (("anatomy", "subject", "contrast"), ("contrast", "contrast", "subject")):
        answers = table.get(part, {})
        if own in answers and other in answers:
            gains = [
                max(0.0, (answers[q] - answers[f"{q}_chance"]) / (1 - answers[f"{q}_chance"])) for q in (own, other)
            ]
            scores[part] = gains[0] - gains[1]
    return scores


def effective_rank(values: np.ndarray) -> float:
    """Of [N, E] features about their mean: 1 where all lie on a line, min(N - 1, E) where they spread evenly, 0 where
    nothing varies.

    Source: Roy & Vetterli 2007 (EUSIPCO), the exponential of the entropy of the normalised singular values.
    Differs: the mean is removed, else one large common offset would look like a collapse.
    """
    centred = values - values.mean(axis=0)
    singular = np.linalg.svd(centred, compute_uv=False)
    total = singular.sum()
    if not total > 0:
        return 0.0
    shares = singular[singular > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def retrieve(values: np.ndarray, candidates: np.ndarray, same: np.ndarray) -> tuple[float, float, int] | None:
    """How often a row's nearest candidate (cosine of standardised features) is of the same person.

    Args:
        values: [R, F].
        candidates: [R, R] bool; column c may answer row r.
        same: [R, R] bool; rows are of one person. Rows that have no right or no wrong candidate are not asked.

    Returns:
        accuracy (ties count in part), chance (mean share of right candidates), number of rows asked; None for no row.
    """
    asked = (candidates & same).any(axis=1) & (candidates & ~same).any(axis=1)
    if not asked.any():
        return None
    unit = linear.standardised(values, values)[0]
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    closeness = np.where(candidates, unit @ unit.T, -np.inf)[asked]
    nearest = closeness >= closeness.max(axis=1, keepdims=True)
    right, chosen, possible = same[asked], nearest.sum(axis=1), candidates[asked]
    accuracy = ((nearest & right).sum(axis=1) / chosen).mean()
    chance = ((possible & right).sum(axis=1) / possible.sum(axis=1)).mean()
    return float(accuracy), float(chance), int(asked.sum())


def _contrast(features: Features, values: np.ndarray, seed: int) -> dict[str, float]:
    shown: dict[str, set[str]] = {}
    for session, scan in features.rows:
        shown.setdefault(scan.contrast, set()).add(session.subject_key)
    legal = sorted(c for c, who in shown.items() if c != "unknown" and len(who) >= _PER_CONTRAST)
    rows = [r for r, (_, scan) in enumerate(features.rows) if scan.contrast in legal]
    if len(legal) < 2:
        return {}
    x = values[rows].mean(axis=1)
    y = np.array([legal.index(features.rows[r][1].contrast) for r in rows])
    who = [features.rows[r][0].subject_key for r in rows]
    by_subject = folds(who, _FOLDS, seed, fewer=True)
    return {
        "contrast": _balanced_accuracy(y, linear.crossed(x, y, who, by_subject, _logistic)),
        "contrast_knn": _balanced_accuracy(y, linear.crossed(x, y, who, by_subject, _neighbours)),
        "contrast_chance": 1 / len(legal),
    }


def _subject(features: Features, values: np.ndarray) -> dict[str, float]:
    subject = np.array([session.subject_key for session, _ in features.rows])
    visit = np.array(["/".join(session.key) for session, _ in features.rows])
    contrast = np.array([scan.contrast for _, scan in features.rows])
    known = contrast != "unknown"
    same = subject[:, None] == subject[None]
    other_contrast = (contrast[:, None] != contrast[None]) & known[:, None] & known[None]
    other_visit = visit[:, None] != visit[None]
    answers = {}
    for name, candidates in (("subject", other_contrast), ("visit", other_visit)):
        found = [retrieve(values[:, place], candidates, same) for place in range(values.shape[1])]
        asked = [answer for answer in found if answer is not None]
        if asked:
            answers[name] = float(np.mean([accuracy for accuracy, _, _ in asked]))
            answers[f"{name}_chance"] = asked[0][1]
    return answers


def _age(features: Features, values: np.ndarray, seed: int) -> dict[str, float]:
    ages, _ = ages_of(session for session, _ in features.rows)
    x, who, y = _of_sessions(features, values, ages)
    if len(set(who)) < _WITH_AGE or np.ptp(y) == 0:
        return {}
    by_subject = folds(who, _FOLDS, seed, fewer=True)
    guess = linear.nested(x, y, who, by_subject, "ridge", seed)
    mean = linear.crossed(x, y, who, by_subject, lambda train, target, test: np.full(len(test), target.mean()))
    spread = guess.std() * y.std()
    r = float(((guess - guess.mean()) * (y - y.mean())).mean() / spread) if spread > 0 else 0.0
    near = linear.nested(x, y, who, by_subject, "knn", seed)
    return {
        "age_mae": float(np.abs(guess - y).mean()),
        "age_knn_mae": float(np.abs(near - y).mean()),
        "age_mean_mae": float(np.abs(mean - y).mean()),
        "age_r": r,
    }


def _sex(features: Features, values: np.ndarray, seed: int) -> dict[str, float]:
    sexes = sexes_of(session for session, _ in features.rows)
    x, who, y = _of_sessions(features, values, sexes)
    groups = [sorted({w for w, value in zip(who, y) if value == sex}) for sex in (0.0, 1.0)]
    if min(map(len, groups)) < _PER_SEX:
        return {}
    # Each fold holds its share of both; a fold's scores are compared among themselves only.
    dealt = [folds(group, _FOLDS, seed) for group in groups]
    by_subject = [[*one, *other] for one, other in zip(*dealt)]
    held = [np.isin(who, fold) for fold in by_subject]
    found = {}
    for name, model in (("sex_auroc", _logistic_score), ("sex_knn_auroc", _neighbour_score)):
        score = linear.crossed(x, y, who, by_subject, model)
        found[name] = float(np.mean([auroc(y[rows], score[rows]) for rows in held]))
    return found


def _of_sessions(
    features: Features, values: np.ndarray, target: Mapping[tuple[str, str, str], float]
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Mean features of the scans of each session that has a target, whose they are, and the target."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for r, (session, _) in enumerate(features.rows):
        if session.key in target:
            rows.setdefault(session.key, []).append(r)
    x = np.array([values[r].mean(axis=(0, 1)) for r in rows.values()])
    who = [f"{dataset}/{subject}" for dataset, subject, _ in rows]
    return x, who, np.array([target[key] for key in rows])


# --------------------------------------------------------------------------------------------------------- labels


def ages_of(sessions: Iterable[SessionEntry]) -> tuple[dict[tuple[str, str, str], float], str | None]:
    """Ages in years by session, and a note where some are no number of years."""
    ages, strange = {}, []
    for key, session in {session.key: session for session in sessions}.items():
        text = session.columns.get("age", "").strip()
        if text.lower() in _MISSING:
            continue
        try:
            age = float(text)
        except ValueError:
            age = math.nan
        if 0 <= age <= 130:
            ages[key] = age
        else:
            strange.append(text)
    note = f"age is no number of years in {len(strange)} sessions, e.g. {strange[0]!r}" if strange else None
    return ages, note


def sexes_of(sessions: Iterable[SessionEntry]) -> dict[tuple[str, str, str], float]:
    """0 or 1 by session, the first word of each subject; empty where there are not exactly two words."""
    words: dict[str, str] = {}
    keys = {session.key: session for session in sessions}
    for session in keys.values():
        text = session.columns.get("sex", "").strip().lower()
        if text not in _MISSING:
            words.setdefault(session.subject_key, _SEX.get(text, text))
    legal = sorted(set(words.values()))
    if len(legal) != 2:
        return {}
    return {
        key: float(legal.index(words[session.subject_key]))
        for key, session in keys.items()
        if session.subject_key in words
    }


# ------------------------------------------------------------------------------------------------ cross-validation


def _logistic(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    return linear.logistic(x, y, other, int(y.max()) + 1)[0].argmax(axis=1)


def _logistic_score(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    return linear.logistic(x, y.astype(np.int64), other, 2)[0, :, 1]


def _neighbours(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    classes = int(y.max()) + 1
    return linear.neighbours(x, y, other, (_NEIGHBOURS,), classes, balanced=False)[0].argmax(axis=1)


def _neighbour_score(x: np.ndarray, y: np.ndarray, other: np.ndarray) -> np.ndarray:
    return linear.neighbours(x, y.astype(np.int64), other, (_NEIGHBOURS,), 2, balanced=False)[0, :, 1]


def _balanced_accuracy(y: np.ndarray, guess: np.ndarray) -> float:
    return float(np.mean([(guess[y == value] == value).mean() for value in np.unique(y)]))


# ----------------------------------------------------------------------------------------------------- during a run


class OnlineProbe:
    """The questions put to an objective while it is trained: to held-out subjects, or to all where they are few.

    Args:
        encode: of the network as it stands when this is called.
        held, trained: sessions of the two sides of the split.
        folder: of the run; gets ``probes.json``, the last answers.
        levels: what is asked of every level.
    """

    def __init__(
        self,
        encode: Encode,
        store: Store,
        held: Sequence[SessionEntry],
        trained: Sequence[SessionEntry],
        spec: OnlineProbeSpec,
        patch_vox: Sequence[int],
        seed: int,
        device: torch.device,
        batch_size: int,
        folder: Path,
        levels: LevelProbe | None = None,
    ) -> None:
        self.encode, self.store, self.spec, self.folder = encode, store, spec, folder
        self.patch_vox, self.seed, self.device, self.batch_size = tuple(patch_vox), seed, device, batch_size
        self.held_out = len({s.subject_key for s in held if s.scans}) >= ENOUGH_HELD
        self.sessions = choose(held if self.held_out else [*held, *trained], spec, seed)
        self.levels = levels
        self.table: Table = {}

    def plan(self) -> list[str]:
        """What will be asked of whom, in sentences."""
        subjects = len({session.subject_key for session in self.sessions})
        scans = sum(len(choose_scans(session, self.spec.scans)) for session in self.sessions)
        whom = "held-out" if self.held_out else f"of all (fewer than {ENOUGH_HELD} are held out)"
        said = [
            f"probes: {scans} scans of {subjects} subjects {whom}, {self.spec.patches} places each, "
            "cross-validated by subject"
        ]
        note = ages_of(self.sessions)[1]
        said += [f"probes: {note}; left out"] if note else []
        return [*said, self.levels.plan()] if self.levels else said

    def __call__(self, step: int) -> dict[str, float]:
        """The answers after ``step`` steps, as ``<part>_<what>``; the network must be in eval mode."""
        features = extract(
            self.encode,
            self.store,
            self.sessions,
            self.patch_vox,
            self.seed,
            self.device,
            patches=self.spec.patches,
            scans=self.spec.scans,
            batch_size=self.batch_size,
        )
        self.table = ask(features, self.seed)
        document = {
            "step": step,
            "held_out": self.held_out,
            "subjects": len({session.subject_key for session in self.sessions}),
            "scans": len(features.rows),
            "parts": self.table,
        }
        answers = flat(self.table)
        if self.levels is not None:
            answers |= self.levels(step)
            document["levels"] = self.levels.table
        write_whole(self.folder / FILE, (json.dumps(document, indent=1) + "\n").encode())
        return answers

    def describe(self) -> list[str]:
        """The last answers in plain words; nothing before the first."""
        return [*describe(self.table), *(describe_levels(self.levels.table) if self.levels else [])]


def describe(table: Table) -> list[str]:
    """A line for each part in plain words."""
    lines = []
    for part, a in table.items():
        said = [
            f"{name} {_short(a[name])} (chance {_short(a[f'{name}_chance'])})"
            for name in ("contrast", "subject", "visit")
            if name in a
        ]
        if "age_mae" in a:
            said.append(f"age {a['age_mae']:.1f} years off (mean age {a['age_mean_mae']:.1f}), r {_short(a['age_r'])}")
        if "sex_auroc" in a:
            said.append(f"sex AUROC {_short(a['sex_auroc'])} (chance .50)")
        if "rank" in a:
            said.append(f"{a['rank']:.1f} effective directions")
        said.append(f"deviation {a['std']:.3g}")
        if "split" in a:
            said.append(f"split {_short(a['split'])} (1 clean, 0 mixed)")
        lines.append(f"{part}: " + ", ".join(said))
    return lines


def _short(value: float) -> str:
    """.41, 1.00, -.20"""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.2f}"
