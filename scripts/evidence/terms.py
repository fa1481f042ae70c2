"""Terms of dense_split, each by itself: what 300 steps of it alone teach, on people who were never trained on.

    python scripts/evidence/terms.py terms --store STORE --out DIR
    python scripts/evidence/terms.py checks --store STORE --out DIR --backbone BACKBONE.safetensors

`terms` trains one network after the other from equal weights, each by one term alone, and asks the same questions of
held-out people before and after: (a) Dice of the fine classes and of three tissues, (b) the share of matched voxels
that find their place, against chance, (c) the error of a view redrawn from the other view's anatomy, and of its own
hidden blocks, in parts of the error of a constant image, (d) AUROC and Dice of inserted lesions, (e) correlation of the
log volumes with those of the label maps. Intervals are over people. Interrupted, the same command goes on after the
last finished term. DIR holds terms.json and terms.md. About 15 minutes of one processor.

`checks` asks a trained backbone file what must not be: matching on constant images, where only padding could tell the
place, against chance; the subject from the contrast code, where several heads were rendered in several looks; how much
a view changes that is redrawn with the code of another head of the same look, and with that of another look.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.batch import Batch
from brainfm.data.augment import apply, augment_spec, draw, render
from brainfm.data.patches import collate
from brainfm.data.regions import MERGED, REGIONS, TARGETS, merged_members
from brainfm.data.settings import WindowSpec
from brainfm.data.store import SessionEntry, Store
from brainfm.data.targets import Targets, find_targets
from brainfm.data.windows import WindowPatches
from brainfm.errors import BrainfmError, ConfigError, StoreError, WeightsError
from brainfm.files import write_whole
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.objectives.dense_split import DenseSplit, overlap
from brainfm.objectives.objective import build_objective, make_objective
from brainfm.objectives.settings import DenseSplitSettings
from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import bootstrap, mean_score
from brainfm.synthesis.settings import LookSpec
from brainfm.training.optim import build_optimizer, lr_factor
from brainfm.training.pretrain import sides_of
from brainfm.training.region_dice import RegionDice
from brainfm.training.settings import PretrainSettings
from brainfm.verbs.compose import resolve

TERMS: dict[str, tuple[str, ...]] = {
    "a": ("regions",), "b": ("match",), "c": ("self", "cross"), "d": ("lesion",), "e": ("volumes",),
}  # fmt: skip
TISSUES = {"outside": "any_outside", "csf": "any_csf", "grey": "any_grey", "white": "any_white_matter"}
WEIGHTS = tuple(name for of in TERMS.values() for name in of)
TITLES = {
    "a": "fine classes, Dice", "a_tissues": "three tissues, Dice",
    "b": "matched voxels, right", "b_chance": "the same by chance",
    "c_cross": "other view redrawn, error", "c_hidden": "hidden blocks redrawn, error", "d_auroc": "lesions, AUROC",
    "d_dice": "lesions, Dice", "e": "log volumes, r",
}  # fmt: skip
ASKED_BY = {
    "a": ("a", "a_tissues"), "b": ("b", "b_chance"), "c": ("c_cross", "c_hidden"), "d": ("d_auroc", "d_dice"),
    "e": ("e",),
}  # fmt: skip
LATER = 10**7  # a step at which any schedule has settled
Answer = dict[str, float]  # value, low, high, and people


# ---- data and networks -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class World:
    """A store with what is known of it, and how windows are shown.

    Attributes:
        settings: of `experiment=dense_split_s`.
        trained, held: the sides.
    """

    store: Store
    targets: Targets
    settings: PretrainSettings
    trained: list[SessionEntry]
    held: list[SessionEntry]

    @classmethod
    def open(cls, asked: argparse.Namespace) -> World:
        """Raises: StoreError without label maps on both sides."""
        words = ["experiment=dense_split_s", f"store={asked.store}", "run=none", *asked.keys]
        shapes = asked.store.parent / "lesion_shapes"
        if shapes.is_dir():
            words.append(f"data.targets.lesion_shapes={shapes.resolve()}")
        settings, store = resolve("pretrain", words), Store.open(asked.store)
        trained, held = sides_of(store, dataclasses.replace(settings.data, side_column=asked.side_column))
        spec = dataclasses.replace(settings.data.targets, level="regions")
        targets = find_targets(store, spec, {session.subject_key for session in trained})
        for name, side in (("train", trained), ("held", held)):
            if not any(s.key in targets.maps for s in side):
                raise StoreError(f"{asked.store}: no label map on the side {name}, expected some on both sides")
        return cls(store, targets, settings, trained, held)

    @property
    def looks(self) -> LookSpec:
        return self.settings.data.looks

    def objective(self, widths: Sequence[int], edge: int, term: str | None, seed: int) -> DenseSplit:
        """A fresh network that learns one term alone, or all; equal weights for equal seeds."""
        asked = self.settings.objective
        assert isinstance(asked, DenseSplitSettings)
        merged = tuple(map(tuple, merged_members()))
        asked = dataclasses.replace(asked, classes=tuple(REGIONS), merged=merged, volumes=len(self.targets.regions))
        if term is not None:
            weights: dict[str, Any] = {f"{name}_weight": float(name in TERMS[term]) for name in WEIGHTS}
            asked = dataclasses.replace(asked, **weights)
        torch.manual_seed(seed)
        backbone = build_backbone("unet", widths=list(widths))
        objective = make_objective(asked, backbone, patch_vox=(edge, edge, edge), seed=seed)
        assert isinstance(objective, DenseSplit)
        return objective

    def windows(
        self, objective: DenseSplit, sessions: Sequence[SessionEntry], spec: WindowSpec, seed: int, lesions: float
    ) -> WindowPatches:
        """Settled windows; ``lesions``: in which share of them one is tried."""
        targets = dataclasses.replace(self.targets, synthesise=lesions)
        return WindowPatches(self.store, sessions, objective.views, seed, spec, 1, targets, from_step=LATER)

    def batches(self, windows: WindowPatches, numbers: Sequence[int], size: int, train: bool) -> list[Batch]:
        """Views of these samples, in training with artefacts."""
        found = []
        for start in range(0, len(numbers), size):
            batch = collate([windows[n] for n in numbers[start : start + size]]).to("cpu")
            batch = render(batch, self.looks, windows.views.patch_vox, windows.seed)
            artefacts = augment_spec(self.settings.data.augment) if train else None
            if artefacts is not None:
                still = dataclasses.replace(artefacts, flip=0.0, affine=0.0, elastic=0.0)
                batch = apply(batch, draw(batch, still, windows.seed))
            found.append(batch)
        return found


def spec_for(term: str) -> WindowSpec:
    """Whole heads, with which a run begins; for lesions, which are small there, windows of finer voxels."""
    if term == "d":
        return WindowSpec(low_mm=1.5, high_mm=2.5, whole_share=0.0, mapped_share=None)
    return WindowSpec(whole_share=1.0, mapped_share=None)


# ---- questions -------------------------------------------------------------------------------------------------------


def over_people(values: Sequence[float], people: Sequence[str], seed: int = 0) -> Answer:
    """Mean of the values that are there, with its 95 % interval over people."""
    kept = [(value, who) for value, who in zip(values, people, strict=True) if not math.isnan(value)]
    if not kept:
        return {"value": math.nan, "low": math.nan, "high": math.nan, "people": 0}
    numbers = np.array([value for value, _ in kept])
    found = bootstrap(mean_score, numbers, numbers, groups=[who for _, who in kept], seed=seed)
    return {"value": found.mean, "low": found.low, "high": found.high, "people": len({who for _, who in kept})}


@torch.no_grad()
def ask_regions(objective: DenseSplit, batches: Sequence[Batch], people: Sequence[str]) -> dict[str, Answer]:
    """Dice of the fine classes, and of the three tissues, whose probabilities are sums of those of their classes."""
    fine, coarse = [], []
    of_class, of_target = tissue_tables()
    for batch in batches:
        logits = objective.predict_regions(batch.image)
        by_tissue = torch.stack(
            [logits[:, of_class == tissue].logsumexp(dim=1) for tissue in range(len(TISSUES))], dim=1
        )
        assert batch.regions is not None
        for one, tissue, target in zip(logits.argmax(dim=1), by_tissue.argmax(dim=1), batch.regions, strict=True):
            dice = RegionDice(list(REGIONS), merged_members())
            dice.add(one, target)
            fine.append(dice.mean())
            dice = RegionDice(["background", *list(TISSUES)[1:]], [])
            dice.add(tissue, torch.where(target >= 0, of_target[target.long()], -1))
            coarse.append(dice.mean())
    return {"a": over_people(fine, people), "a_tissues": over_people(coarse, people)}


def tissue_tables() -> tuple[Tensor, Tensor]:
    """The place in TISSUES of each fine class, and of each target, -1 where it may be of several."""
    place = {name: number for number, of in enumerate(TISSUES.values()) for name in MERGED[of]}
    of_target = []
    for target in TARGETS:
        found = {place[name] for name in MERGED.get(target, (target,))}
        of_target.append(found.pop() if len(found) == 1 else -1)
    return torch.tensor([place[name] for name in REGIONS]), torch.tensor(of_target)


@torch.no_grad()
def ask_match(objective: DenseSplit, batches: Sequence[Batch], people: Sequence[str]) -> dict[str, Answer]:
    right, chance = [], []
    for batch in batches:
        for b in range(len(batch)):
            one = only(batch, b)
            right.append(match_right(objective, one))
            chance.append(match_chance(objective, one))
    return {"b": over_people(right, people), "b_chance": over_people(chance, people)}


@torch.no_grad()
def match_right(objective: DenseSplit, batch: Batch) -> float:
    """Share of the matched voxels of a batch that find their place."""
    views = objective._views(batch)
    features = objective.dense.climb(objective.backbone.features(views.image))[-1]
    return float(objective._match(features, views, batch)[1])


@torch.no_grad()
def match_chance(objective: DenseSplit, batch: Batch) -> float:
    """The same where all features are alike: one in as many as may be chosen from."""
    views = objective._views(batch)
    alike = torch.zeros(len(views.image), objective.dense.out.in_channels, *views.image.shape[2:])
    return float(objective._match(alike.to(views.image), views, batch)[1])


def constant(batch: Batch) -> Batch:
    """A batch of which both views are grey all over: only the padding at their borders can tell a place."""
    assert batch.partner is not None
    return dataclasses.replace(
        batch, image=torch.full_like(batch.image, 0.5), partner=torch.full_like(batch.partner, 0.5)
    )


@torch.no_grad()
def ask_recolour(objective: DenseSplit, batches: Sequence[Batch], people: Sequence[str]) -> dict[str, Answer]:
    """Squared errors in parts of those of the mean of the wanted voxels; without masks for the other view."""
    cross, hidden = [], []
    for batch in batches:
        for b in range(len(batch)):
            one = only(batch, b)
            views = objective._views(one)
            dense = objective.dense(objective.backbone.features(views.image))
            anatomy, codes = objective.dense.split(dense)["anatomy"], objective.code(dense, views.image)
            mine, its = overlap(views.corners[0], views.image.shape[2:])
            redrawn = objective.recolour(anatomy[:1][(slice(None), slice(None), *mine)].contiguous(), codes[1:])
            cross.append(relative_error(redrawn, views.image[1:][(slice(None), slice(None), *its)]))
            masked = objective.dense(objective.backbone.features_masked(views.image, views.hidden))
            own = objective.recolour(objective.dense.split(masked)["anatomy"], objective.code(masked, views.image))
            if bool(views.hidden.any()):
                hidden.append(relative_error(own[views.hidden], views.image[views.hidden]))
            else:
                hidden.append(math.nan)
    return {"c_cross": over_people(cross, people), "c_hidden": over_people(hidden, people)}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Mean squared error in parts of the variance: 1 is what the best constant leaves."""
    error = (found.float() - wanted.float()).square().mean()
    return float(error / wanted.float().var(correction=0).clamp(min=1e-6))


@torch.no_grad()
def ask_lesions(objective: DenseSplit, batches: Sequence[Batch], people: Sequence[str]) -> dict[str, Answer]:
    aurocs, dices = [], []
    for batch in batches:
        dense = objective.dense(objective.backbone.features(batch.image))
        logits = objective.heads["lesion"](objective.dense.split(dense)["pathology"])[:, 0]
        assert batch.lesion is not None
        for one, lesion in zip(logits, batch.lesion, strict=True):
            true = (lesion == 1).numpy().ravel()
            if not true.any() or true.all():
                aurocs.append(math.nan)
                dices.append(math.nan)
                continue
            score, claimed = one.numpy().ravel(), (one > 0).numpy().ravel()
            aurocs.append(auroc(true.astype(float), score.astype(float)))
            dices.append(2 * float((claimed & true).sum()) / float(claimed.sum() + true.sum()))
    return {"d_auroc": over_people(aurocs, people), "d_dice": over_people(dices, people)}


@torch.no_grad()
def ask_volumes(objective: DenseSplit, batches: Sequence[Batch], people: Sequence[str]) -> dict[str, Answer]:
    assert objective.volume_head is not None
    found, wanted = [], []
    for batch in batches:
        flat = objective.backbone.features(batch.image)[-1].float().flatten(2)
        moments = torch.cat([flat.mean(dim=2), flat.var(dim=2, correction=0).clamp(min=1e-6).sqrt()], dim=1)
        assert batch.volumes is not None
        found.append(objective.volume_head(moments).float().numpy())
        wanted.append(batch.volumes.numpy())
    known = ~np.isnan(np.concatenate(wanted)).any(axis=1)
    groups = [who for who, is_known in zip(people, known, strict=True) if is_known]
    score = bootstrap(mean_r, np.concatenate(wanted)[known], np.concatenate(found)[known], groups=groups, seed=0)
    return {"e": {"value": score.mean, "low": score.low, "high": score.high, "people": len(set(groups))}}


def mean_r(wanted: np.ndarray, found: np.ndarray) -> float:
    """Pearson's r of each column of [N, R], averaged; a column that does not vary counts 0."""
    rs = []
    for one, other in zip(wanted.T, found.T, strict=True):
        flat = one.std() < 1e-6 or other.std() < 1e-6
        rs.append(0.0 if flat else float(np.corrcoef(one, other)[0, 1]))
    return float(np.mean(rs))


QUESTIONS = {"a": ask_regions, "b": ask_match, "c": ask_recolour, "d": ask_lesions, "e": ask_volumes}


def only(batch: Batch, b: int) -> Batch:
    """One sample of a batch."""
    return dataclasses.replace(batch, **{
        f.name: getattr(batch, f.name)[b : b + 1]
        for f in dataclasses.fields(batch)
        if getattr(batch, f.name) is not None
    })  # fmt: skip


# ---- terms -----------------------------------------------------------------------------------------------------------


def train(world: World, objective: DenseSplit, windows: WindowPatches, asked: argparse.Namespace) -> list[float]:
    """So many steps of AdamW; the losses."""
    optimizer = build_optimizer(objective, lr=asked.lr, weight_decay=0.01)
    losses = []
    for step in range(asked.steps):
        numbers = range(step * asked.batch, (step + 1) * asked.batch)
        (batch,) = world.batches(windows, numbers, asked.batch, train=True)
        for group in optimizer.param_groups:
            group["lr"] = asked.lr * lr_factor(min(step, asked.steps // 10), asked.steps, asked.steps // 10)
        optimizer.zero_grad(set_to_none=True)
        loss = objective(batch, 1.0).total
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 50 == 49:
            print(f"  step {step + 1}: loss {np.mean(losses[-50:]):.3f}", flush=True)
    return losses


def one_term(world: World, term: str, asked: argparse.Namespace) -> dict[str, Any]:
    """A term's scores before and after, and what it took."""
    began = time.process_time()
    objective = world.objective(asked.widths, asked.edge, term, asked.seed)
    spec, lesions = spec_for(term), 1.0 if term == "d" else 0.0
    mapped = [s for s in world.held if s.key in world.targets.maps]
    if term == "e":
        mapped = [s for s in mapped if s.subject_key in world.targets.volumes]
    asking = world.windows(objective, mapped, spec, asked.seed + 1, lesions)
    people = [asking.plan(n).session.subject_key for n in range(asked.questions)]
    batches = world.batches(asking, range(asked.questions), 2, train=False)
    before = QUESTIONS[term](objective.eval(), batches, people)
    print(f"({term}) before: {shown(before)}", flush=True)
    # heads without a label map teach these two nothing
    pupils = [s for s in world.trained if s.key in world.targets.maps] if term in "ae" else world.trained
    windows = world.windows(objective, pupils, spec, asked.seed, 0.5 if term == "d" else 0.0)
    losses = train(world, objective.train(), windows, asked)
    after = QUESTIONS[term](objective.eval(), batches, people)
    print(f"({term}) after: {shown(after)}", flush=True)
    edge = max(1, asked.steps // 10)
    return {
        "before": before, "after": after, "first_loss": float(np.mean(losses[:edge])),
        "last_loss": float(np.mean(losses[-edge:])), "cpu_minutes": (time.process_time() - began) / 60,
    }  # fmt: skip


def shown(answers: Mapping[str, Answer]) -> str:
    return ", ".join(f"{TITLES[name]} {cell(answer)}" for name, answer in answers.items())


def cell(answer: Answer) -> str:
    return f"{answer['value']:.3f} [{answer['low']:.3f}, {answer['high']:.3f}]"


def terms(asked: argparse.Namespace) -> None:
    """Raises: ConfigError where what lies in the folder was made otherwise."""
    world = World.open(asked)
    file = asked.out / "terms.json"
    how = {name: getattr(asked, name) for name in ("steps", "batch", "lr", "edge", "widths", "seed", "questions")}
    how |= {"store": world.store.fingerprint()}
    report: dict[str, Any] = {"how": how, "terms": {}}
    if file.exists():
        report = json.loads(file.read_text())
        if report["how"] != how:
            raise ConfigError(f"{file}: was made with {report['how']}, now {how} is asked for; expected the same")
    for term in TERMS:
        if term in report["terms"]:
            continue
        if term == "e" and not world.targets.regions:
            print("(e) left out: no region volumes, since the label maps tell no groups")
            continue
        report["terms"][term] = one_term(world, term, asked)
        write_whole(file, (json.dumps(report, indent=1) + "\n").encode())
    text = terms_table(report)
    write_whole(asked.out / "terms.md", text.encode())
    print(text)


def terms_table(report: Mapping[str, Any]) -> str:
    how = report["how"]
    lines = [f"| term, alone for {how['steps']} steps | question | before | after | people |", "|---|---|---|---|---|"]
    for term, found in report["terms"].items():
        for name in ASKED_BY[term]:
            one, two = found["before"][name], found["after"][name]
            what = f"({term}) {', '.join(TERMS[term])} | {TITLES[name]}"
            lines.append(f"| {what} | {cell(one)} | {cell(two)} | {two['people']} |")
    minutes = sum(found["cpu_minutes"] for found in report["terms"].values())
    return "\n".join(lines) + f"\n\n{minutes:.1f} minutes of one processor.\n"


# ---- checks ----------------------------------------------------------------------------------------------------------


def objective_of(loaded: LoadedBackbone, edge: int, seed: int = 0) -> DenseSplit:
    """The whole objective of a backbone file. Raises: WeightsError where it is another one."""
    if loaded.objective["name"] != "dense_split" or loaded.decoder is None:
        raise WeightsError(f"a backbone of {loaded.objective['name']} found, expected one of dense_split")
    objective = build_objective(
        "dense_split", loaded.backbone, patch_vox=(edge,) * 3, seed=seed, **loaded.objective["config"]
    )
    assert isinstance(objective, DenseSplit)
    objective.dense.load_state_dict(loaded.decoder.state_dict())
    for key, head in loaded.heads.items():
        objective.heads[key].load_state_dict(head.state_dict())
    missing, unused = objective.load_state_dict(loaded.extra, strict=False)
    missing = [name for name in missing if not name.startswith(("backbone.", "dense.", "heads."))]
    if missing or unused:
        raise WeightsError(f"the file's objective does not fit: {[*missing, *unused][0]}")
    return objective.eval()


def told_by(codes: np.ndarray) -> dict[str, float]:
    """Which subject and which look a code shows, by the nearest other code; a tie with n others is right once in n.

    Of the subject: among the codes of all subjects in one other look. Of the look: among those of one other subject.

    Args:
        codes: [S, L, E], of S subjects each in L looks.
    """
    subjects, looks, _ = codes.shape
    scale = codes.reshape(-1, codes.shape[2]).std(axis=0)
    codes = codes / np.where(scale > 1e-6, scale, 1.0)
    apart = np.linalg.norm(codes[:, :, None, None] - codes[None, None], axis=-1)  # [S, L, S', L']
    of_subject = [
        _right(apart[s, look, :, other], s) for s in range(subjects) for look in range(looks)
        for other in range(looks) if other != look
    ]  # fmt: skip
    of_look = [
        _right(apart[s, look, other], look) for s in range(subjects) for look in range(looks)
        for other in range(subjects) if other != s
    ]  # fmt: skip
    return {
        "subject": float(np.mean(of_subject)), "subject_chance": 1 / subjects,
        "look": float(np.mean(of_look)), "look_chance": 1 / looks,
    }  # fmt: skip


def _right(distances: np.ndarray, wanted: int) -> float:
    nearest = np.flatnonzero(distances <= distances.min() + 1e-9)
    return float(wanted in nearest) / len(nearest)


@torch.no_grad()
def swapped(recolour: nn.Module, anatomy: Tensor, codes: Tensor) -> dict[str, float]:
    """How much views change that are redrawn with another code, in parts of their own deviation; means over all.

    Args:
        anatomy: [S, L, E, X, Y, Z], of S subjects each in L looks.
        codes: [S, L, C].
    """
    subjects, looks = codes.shape[:2]
    same, other = [], []
    for s in range(subjects):
        stranger = (s + 1) % subjects
        for look in range(looks):
            another = (look + 1) % looks
            drawn = torch.cat([codes[s, look][None], codes[stranger, look][None], codes[stranger, another][None]])
            own, by_same, by_other = recolour(anatomy[s, look][None].expand(3, -1, -1, -1, -1).contiguous(), drawn)
            spread = float(own.std().clamp(min=1e-6))
            same.append(float((by_same - own).square().mean().sqrt()) / spread)
            other.append(float((by_other - own).square().mean().sqrt()) / spread)
    return {"same_look": float(np.mean(same)), "other_look": float(np.mean(other))}


@torch.no_grad()
def crossed(
    world: World, objective: DenseSplit, subjects: Sequence[SessionEntry], looks: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Whole heads, each rendered in each of ``looks`` looks without any texture of its scan: anatomy [S, L, E, X, Y, Z]
    and codes [S, L, C]. A look belongs to the number of a sample, so all heads of one look get one number."""
    spec = WindowSpec(whole_share=1.0, rendered=1.0, rotate_deg=5.0, elastic=0.0, stretch=0.0, mapped_share=None)
    anatomy, codes = [], []
    edge = objective.views.patch_vox
    for place, session in enumerate(subjects):
        sample = collate([world.windows(objective, [session], spec, seed, 0.0)[place]]).to("cpu")
        for look in range(looks):
            plain = dataclasses.replace(sample, sample=torch.tensor([10**6 + look]), real=torch.tensor([False]))
            image = render(plain, dataclasses.replace(world.looks, strip=0.0), edge, seed).image
            dense = objective.dense(objective.backbone.features(image))
            anatomy.append(objective.dense.split(dense)["anatomy"][0])
            codes.append(objective.code(dense, image)[0])
    shape = (len(subjects), looks)
    return torch.stack(anatomy).unflatten(0, shape), torch.stack(codes).unflatten(0, shape)


@torch.no_grad()
def constants_told(world: World, objective: DenseSplit, asked: argparse.Namespace) -> dict[str, dict[str, Answer]]:
    """Matching on constant images and on the real ones, against chance, by size of the voxels."""
    found = {}
    for name, spec in (
        ("whole heads", WindowSpec(whole_share=1.0, mapped_share=None)),
        ("1.5-3 mm", WindowSpec(low_mm=1.5, high_mm=3.0, whole_share=0.0, mapped_share=None)),
        ("0.8-1.2 mm", WindowSpec(low_mm=0.8, high_mm=1.2, whole_share=0.0, mapped_share=None)),
    ):
        mapped = [s for s in world.held if s.key in world.targets.maps]
        windows = world.windows(objective, mapped, spec, asked.seed + 1, 0.0)
        people = [windows.plan(n).session.subject_key for n in range(asked.questions)]
        batches = world.batches(windows, range(asked.questions), 1, train=False)
        right = [match_right(objective, batch) for batch in batches]
        grey = [match_right(objective, constant(batch)) for batch in batches]
        chance = [match_chance(objective, constant(batch)) for batch in batches]
        found[name] = {
            "images": over_people(right, people), "constant": over_people(grey, people),
            "chance": over_people(chance, people),
        }  # fmt: skip
    return found


def checks(asked: argparse.Namespace) -> None:
    world = World.open(asked)
    loaded = load_backbone(asked.backbone, needs_decoder=True)
    objective = objective_of(loaded, asked.edge)
    fresh = world.objective(asked.widths, asked.edge, None, asked.seed).eval()
    mapped = [s for s in world.held if s.key in world.targets.maps][: asked.subjects]
    report: dict[str, Any] = {"backbone": loaded.fingerprint, "steps": loaded.provenance.steps}
    for name, network in (("trained", objective), ("fresh", fresh)):
        anatomy, codes = crossed(world, network, mapped, asked.looks, asked.seed)
        report[name] = {
            "told": told_by(codes.numpy()), "swapped": swapped(network.recolour, anatomy, codes),
            "matching": constants_told(world, network, asked),
        }  # fmt: skip
    text = checks_table(report)
    write_whole(asked.out / "checks.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(asked.out / "checks.md", text.encode())
    print(text)


def checks_table(report: Mapping[str, Any]) -> str:
    lines = [f"| check ({report['steps']} steps) | trained | fresh weights | chance |", "|---|---|---|---|"]
    one, two = report["trained"], report["fresh"]
    for what in ("subject", "look"):
        cells = [f"{network['told'][what]:.3f}" for network in (one, two)]
        lines.append(f"| {what} from the contrast code | {' | '.join(cells)} | {one['told'][f'{what}_chance']:.3f} |")
    for what in ("same_look", "other_look"):
        title = f"view redrawn with a stranger's code, {what.replace('_', ' ')}: change in parts of its deviation"
        lines.append(f"| {title} | {one['swapped'][what]:.3f} | {two['swapped'][what]:.3f} | |")
    for size, answers in one["matching"].items():
        for what in ("images", "constant"):
            cells = [cell(network["matching"][size][what]) for network in (one, two)]
            lines.append(f"| matching on {what}, {size} | {' | '.join(cells)} | {answers['chance']['value']:.4f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("terms", "checks"):
        own = verbs.add_parser(verb)
        own.add_argument("--store", type=Path, required=True)
        own.add_argument("--out", type=Path, required=True)
        own.add_argument("--side-column", default="side", help="says train or held; empty: by hash")
        own.add_argument("--keys", nargs="*", default=[], help="further keys of `brainfm pretrain`")
        own.add_argument("--edge", type=int, default=48, help="of a view, voxels")
        own.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="of a fresh network")
        own.add_argument("--questions", type=int, default=48, help="held-out windows that are asked about")
        own.add_argument("--seed", type=int, default=0)
        if verb == "terms":
            own.add_argument("--steps", type=int, default=300)
            own.add_argument("--batch", type=int, default=1, help="pairs a step")
            own.add_argument("--lr", type=float, default=1e-3)
        else:
            own.add_argument("--backbone", type=Path, required=True)
            own.add_argument("--subjects", type=int, default=10)
            own.add_argument("--looks", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        terms(asked) if asked.verb == "terms" else checks(asked)
    except BrainfmError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
