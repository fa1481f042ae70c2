"""Probes of levels: what each tells of anatomy, and how many directions it uses, on people it was never trained on.

A segmenter reads every level through its skips, so every level is asked by itself: a linear model is fitted to a map's
features at some voxels of two labelled heads and names the regions of others. The same numbers of a network with
fresh weights stand beside: a level that tells less than those was made poorer by its training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brainfm import seeds
from brainfm.data import regions
from brainfm.data.store import ScanEntry, SessionEntry, Store
from brainfm.data.targets import Targets
from brainfm.data.windows import PLACEHOLDER
from brainfm.files import write_whole
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in
from brainfm.nets.decoders import DenseDecoder, DenseHead, Pointwise, SkipDecoder, decoder_for
from brainfm.nets.lengths import restore_lengths
from brainfm.objectives.objective import Objective

Maps = Callable[[Tensor], dict[str, Tensor]]  # [1, 1, X, Y, Z] -> name -> [1, E, X/s, Y/s, Z/s]
Predict = Callable[[Tensor], Tensor]  # [1, 1, X, Y, Z] -> logits of classes [1, K, X, Y, Z]
Table = dict[str, dict[str, float]]

RANDOM_FILE = "levels_random.json"
_FITTED, _TESTED = 2, 4  # heads
_NEAR_MM = 2.0  # voxels of the crops
_WHOLE = 4  # a whole head is looked at where it has at most this many times the voxels of a crop
_PER_CLASS = 100  # voxels of a crop that the linear model is fitted to
_PER_CLASS_JOINED = 400  # the same where all maps are read together, which have ten times as many features
_PLACES = 1 << 14  # of a map at most, for its rank
_SHRINK = 1e-2  # of the covariance towards equal variances
_STEPS, _EDGE, _RATE = 60, 48, 1e-3  # of the few-shot question
_DRAWS = 3  # fresh networks; one alone is off by up to .05 Dice
_OUTSIDE = ("background", "head", "any_outside", "outside_or_csf")


@dataclass(frozen=True)
class Crop:
    """A part of a head, as it is shown.

    Attributes:
        head: its number among the heads.
        whole: whether it shows all of the head, on coarse voxels.
        image: [1, 1, X, Y, Z] float32.
        labels: [X, Y, Z] as the label map has them; None without one.
        truth: [X, Y, Z] int64, groups; -1 where unknown.
        scheme: of the labels.
    """

    head: int
    whole: bool
    image: Tensor
    labels: np.ndarray | None = None
    truth: Tensor | None = None
    scheme: str = ""


# ------------------------------------------------------------------------------------------------------------ the heads


def choose_heads(
    held: Sequence[SessionEntry], targets: Targets, count: int = _FITTED + _TESTED
) -> list[tuple[SessionEntry, ScanEntry]]:
    """One session of up to ``count`` subjects, in the order of a hash that no run changes, those with a label map of
    their own first; of a session the t1, or else the first scan."""
    found: dict[str, tuple[SessionEntry, ScanEntry]] = {}
    for session in sorted(held, key=lambda s: (s.key not in _mapped(targets), s.key)):
        scans = [scan for scan in session.scans if scan.contrast != PLACEHOLDER]
        if scans:
            chosen = next((scan for scan in scans if scan.contrast == "t1"), scans[0])
            found.setdefault(session.subject_key, (session, chosen))
    labelled = {key for key, (session, _) in found.items() if session.key in _mapped(targets)}
    if len(labelled) >= 2:  # one to fit, one to test
        found = {key: found[key] for key in labelled}
    order = sorted(found, key=lambda key: (seeds.unit_hash(key, "level probe"), key))
    return [found[key] for key in order[:count]]


def _mapped(targets: Targets) -> set[tuple[str, str, str]]:
    """Sessions whose own label map shows their anatomy."""
    return {key for key, chosen in targets.maps.items() if chosen.session.key == key}


def read_crops(
    store: Store,
    heads: Sequence[tuple[SessionEntry, ScanEntry]],
    targets: Targets,
    patch_vox: Sequence[int],
    stride: int,
) -> list[Crop]:
    """Of each head its middle, at the store's level nearest to 2 mm, and all of it at the coarsest level where it fits.

    Args:
        patch_vox: X, Y, Z of a middle.
        stride: edges of a whole head are multiples of it.
    """
    crops = []
    for number, (session, scan) in enumerate(heads):
        near, coarsest = near_level(store, session), store.levels(session)
        boxes = [(False, near, tuple(patch_vox))]
        whole = tuple(max(2 * stride, -(-n // stride) * stride) for n in store.shape(session, coarsest))
        if math.prod(whole) <= _WHOLE * math.prod(patch_vox):
            boxes.append((True, coarsest, whole))
        for is_whole, level, size in boxes:
            shape = store.shape(session, level)
            corner = tuple((n - s) // 2 for n, s in zip(shape, size))
            image = torch.from_numpy(store.block(session, scan.name, corner, size, level=level).astype(np.float32))
            crop = Crop(number, is_whole, image[None, None])
            if session.key in _mapped(targets):
                chosen = targets.maps[session.key]
                labels = store.block(session, chosen.name, corner, size, level=level)
                truth = torch.from_numpy(_looked_up(labels, targets.tables[chosen.scheme]))
                crop = Crop(number, is_whole, crop.image, labels, truth, chosen.scheme)
            crops.append(crop)
    return crops


def near_level(store: Store, session: SessionEntry) -> int:
    """The level whose voxels are nearest to 2 mm."""
    spacing = math.prod(store.spec.spacing_mm) ** (1 / 3)
    return min(range(store.levels(session) + 1), key=lambda n: abs(math.log2(spacing * 2**n / _NEAR_MM)))


def _looked_up(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[X, Y, Z] int64; ids beyond the table are unknown."""
    inside = labels < len(table)
    return np.where(inside, table[np.where(inside, labels, 0)], -1).astype(np.int64)


# ------------------------------------------------------------------------------------------------------------- the maps


def level_maps(backbone: Backbone, dense: DenseDecoder | None) -> Maps:
    """The backbone's maps as ``level0`` (finest) and so on, those of a dense decoder as ``decoder0`` and so on, and its
    last, widened one as ``dense``."""

    def maps(image: Tensor) -> dict[str, Tensor]:
        levels = backbone.features(image)
        found = {f"level{n}": values for n, values in enumerate(levels)}
        if dense is not None:
            climbed = dense.climb(levels)
            found |= {f"decoder{len(climbed) - 1 - n}": values for n, values in enumerate(climbed)}
            found["dense"] = dense.out(climbed[-1])
        return found

    return maps


def fresh_networks(
    backbone: Backbone, dense: DenseDecoder | None, seed: int = 0
) -> tuple[Backbone, DenseDecoder | None]:
    """The same networks with other weights, as they were before any training; torch's own stream stays as it was."""
    device = next(backbone.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_backbone(**backbone.config)
        decoder = None if dense is None else decoder_for(backbone, dense.parts)
    return swap_in(encoder).to(device).eval(), None if decoder is None else swap_in(decoder).to(device).eval()


# ------------------------------------------------------------------------------------------------------- linear regions


def draw_voxels(truth: Tensor, per_class: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Up to ``per_class`` voxels of each class: places [N, 3] and their classes [N], int64."""
    flat, places = truth.flatten().numpy(), []
    for value in np.unique(flat[flat >= 0]):
        there = np.flatnonzero(flat == value)
        places.append(rng.choice(there, min(per_class, len(there)), replace=False))
    chosen = np.concatenate(places) if places else np.zeros(0, np.int64)
    points = np.stack(np.unravel_index(chosen, tuple(truth.shape)), axis=1)
    return torch.from_numpy(points), torch.from_numpy(flat[chosen])


def read_at(values: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """A map [1, E, x, y, z] of an image of ``size`` voxels, at voxels [N, 3] of the image -> [N, E], trilinear."""
    edges = torch.tensor(list(size), dtype=torch.float32)
    place = ((2 * points.float() + 1) / edges - 1).flip(1)[None, None, None].to(values.device)  # grid_sample: Z, Y, X
    found = F.grid_sample(values.float(), place, mode="bilinear", padding_mode="border", align_corners=False)
    return found[0, :, 0, 0].t()


def fit_linear(x: Tensor, y: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """A linear discriminant of K classes: weight [K, E] and bias [K], float64.

    Args:
        x: [N, E].
        y: [N] classes below K.
        shares: [K] the classes' shares of all voxels, their square roots being the prior: between what is right most
            often and what is fair to small regions. A class without rows is never answered.

    Source: Fisher 1936; one covariance within classes, shrunk towards equal variances.
    """
    x, classes = x.double().cpu(), len(shares)
    mean, spread = x.mean(dim=0), x.std(dim=0, correction=0)
    spread = torch.where(spread > 1e-6 * mean.abs().clamp(min=1e-6), spread, torch.inf)
    x = (x - mean) / spread
    member = F.one_hot(y.cpu(), classes).double()
    counts = member.sum(dim=0)
    means = member.t() @ x / counts.clamp(min=1)[:, None]
    apart = x - means[y.cpu()]
    within = apart.t() @ apart / len(x)
    within += (_SHRINK * within.diagonal().mean() + 1e-9) * torch.eye(len(within), dtype=torch.float64)
    weight = torch.linalg.solve(within, means.t()).t()
    bias = -0.5 * (weight * means).sum(dim=1) + 0.5 * shares.double().clamp(min=1e-9).log()
    bias = bias.masked_fill(counts == 0, -1e9)
    weight = weight / spread
    return weight, bias - weight @ mean


class GroupOverlap:
    """Counts of K classes over many volumes, and their Dice."""

    def __init__(self, classes: int) -> None:
        self.both = torch.zeros(classes, dtype=torch.float64)
        self.either = torch.zeros(classes, dtype=torch.float64)
        self.true = torch.zeros(classes, dtype=torch.float64)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Two maps of classes; where the truth is below 0 nothing counts."""
        known, classes = truth >= 0, len(self.both)
        p, t = predicted[known], truth[known]
        counts = torch.bincount(p, minlength=classes).double(), torch.bincount(t, minlength=classes).double()
        self.both += torch.bincount(t[p == t], minlength=classes).double()
        self.either += counts[0] + counts[1]
        self.true += counts[1]

    def mean(self, first: int = 1) -> float:
        """The mean Dice of the classes from ``first`` on that occur; nan where none does."""
        there = self.true[first:] > 0
        return float((2 * self.both / self.either.clamp(min=1))[first:][there].mean()) if there.any() else math.nan


@torch.no_grad()
def linear_dice(maps: Maps, crops: Sequence[Crop], groups: int, fitted: int, device: torch.device) -> dict[str, float]:
    """For every map the Dice of the groups but the first (background), on heads from number ``fitted`` on, of a linear
    model of the heads before."""
    rows: dict[str, list[Tensor]] = {}
    answers, shares = [], torch.zeros(groups, dtype=torch.float64)
    for number, crop in enumerate(crops):
        if crop.truth is None or crop.head >= fitted:
            continue
        points, classes = draw_voxels(crop.truth, _PER_CLASS, seeds.stream(0, "level probe voxels", number))
        answers.append(classes)
        shares += torch.bincount(crop.truth[crop.truth >= 0], minlength=groups)
        for name, values in maps(crop.image.to(device)).items():
            rows.setdefault(name, []).append(read_at(values, points, crop.truth.shape).cpu())
    y, shares = torch.cat(answers), shares / shares.sum()
    models = {name: fit_linear(torch.cat(x), y, shares) for name, x in rows.items()}
    overlaps = {name: GroupOverlap(groups) for name in models}
    for crop in crops:
        if crop.truth is None or crop.head < fitted:
            continue
        for name, values in maps(crop.image.to(device)).items():
            weight, bias = (part.to(device, torch.float32) for part in models[name])
            # a linear model of interpolated features is the interpolation of its answers
            scores = torch.einsum("ke,bexyz->bkxyz", weight, values.float()) + bias[:, None, None, None]
            scores = F.interpolate(scores, tuple(crop.truth.shape), mode="trilinear", align_corners=False)
            overlaps[name].add(scores[0].argmax(dim=0).cpu(), crop.truth)
    return {name: overlap.mean() for name, overlap in overlaps.items()}


@torch.no_grad()
def joined_answers(
    maps: Maps, fitted: Sequence[Crop], tested: Iterable[Crop], classes: int, device: torch.device
) -> Iterator[np.ndarray]:
    """Of each tested crop the classes [X, Y, Z] uint8 that one linear model of all maps together tells, fitted to the
    crops whose truth is known.

    Args:
        tested: taken one by one, so that they need not be held in memory together.
    """
    rows: dict[str, list[Tensor]] = {}
    answers, shares = [], torch.zeros(classes, dtype=torch.float64)
    for number, crop in enumerate(fitted):
        assert crop.truth is not None
        points, found = draw_voxels(crop.truth, _PER_CLASS_JOINED, seeds.stream(0, "joined probe voxels", number))
        answers.append(found)
        shares += torch.bincount(crop.truth[crop.truth >= 0], minlength=classes)
        for name, values in maps(crop.image.to(device)).items():
            rows.setdefault(name, []).append(read_at(values, points, crop.truth.shape).cpu())
    widths = [of[0].shape[1] for of in rows.values()]
    weight, bias = fit_linear(
        torch.cat([torch.cat(of) for of in rows.values()], dim=1), torch.cat(answers), shares / shares.sum()
    )
    weights = dict(zip(rows, weight.to(device, torch.float32).split(widths, dim=1)))
    for crop in tested:
        total = bias.to(device, torch.float32)[None, :, None, None, None]
        for name, values in maps(crop.image.to(device)).items():
            # each map's share is interpolated by itself: the sum of interpolations is that of the sum
            scores = torch.einsum("ke,bexyz->bkxyz", weights[name], values.float())
            total = total + F.interpolate(scores, tuple(crop.image.shape[2:]), mode="trilinear", align_corners=False)
        yield total[0].argmax(dim=0).to(torch.uint8).cpu().numpy()


# --------------------------------------------------------------------------------------------------------------- ranks


def spatial_rank(values: Tensor) -> float:
    """Of [N, E] features at N places about their mean: how many directions they use, 0 where nothing varies.

    Source: Roy & Vetterli 2007 (EUSIPCO), the exponential of the entropy of the normalised singular values.
    Differs: of their squares, the variances, so that many faint directions do not make up for two strong ones.
    """
    values = values.double().cpu()
    centred = values - values.mean(dim=0)
    variances = torch.linalg.eigvalsh(centred.t() @ centred / len(values)).clamp(min=0)
    if not variances.sum() > 1e-10 * values.square().mean():
        return 0.0
    shares = variances[variances > 0] / variances.sum()
    return float((-(shares * shares.log()).sum()).exp())


@torch.no_grad()
def level_ranks(maps: Maps, crops: Sequence[Crop], device: torch.device) -> dict[str, float]:
    """The rank of every map over places of the middles of all heads."""
    rows: dict[str, list[Tensor]] = {}
    for crop in crops:
        if not crop.whole:
            for name, values in maps(crop.image.to(device)).items():
                every = -(-math.prod(values.shape[2:]) // _PLACES)
                rows.setdefault(name, []).append(values[0].flatten(1)[:, ::every].t().float().cpu())
    return {name: spatial_rank(torch.cat(of)) for name, of in rows.items()}


# ---------------------------------------------------------------------------------------------------------- unseen maps


@torch.no_grad()
def map_dice(predict: Predict, names: Sequence[str], crops: Sequence[Crop], whole: bool, device: torch.device) -> float:
    """Mean Dice of the fine classes, as the network's own head tells them, on whole heads or on middles; nan without
    label maps. What lies outside the brain is not among them.

    Where a map merges classes, any of them is right: the merged answer counts as one class where the map tells none of
    its members apart, and else its voxels are neither right nor wrong for the members.

    Args:
        names: of the K classes, among data.regions.REGIONS.
    """
    members = {name: (name,) for name in regions.REGIONS} | regions.MERGED
    sums: dict[str, list[float]] = {}
    for crop in crops:
        if crop.labels is None or crop.whole != whole:
            continue
        truth = _looked_up(crop.labels, regions.targets_of(crop.scheme))
        predicted = predict(crop.image.to(device))[0].argmax(dim=0).cpu().numpy()
        told = {regions.TARGETS[value] for value in np.unique(regions.targets_of(crop.scheme)) if value >= 0}
        for target in told - set(_OUTSIDE):
            of = members[target]
            if len(of) > 1 and set(of) & told:
                continue
            merged = [regions.TARGETS.index(m) for m in regions.MERGED if m != target and set(of) <= set(members[m])]
            known = (truth >= 0) & ~np.isin(truth, merged)
            there = np.isin(predicted, [names.index(name) for name in of if name in names]) & known
            true = (truth == regions.TARGETS.index(target)) & known
            entry = sums.setdefault(target, [0.0, 0.0, 0.0])
            for place, value in enumerate(((there & true).sum(), there.sum() + true.sum(), true.sum())):
                entry[place] += float(value)
    found = [2 * both / either for both, either, true in sums.values() if true > 0]
    return float(np.mean(found)) if found else math.nan


# ------------------------------------------------------------------------------------------------------------ few shots


class _Segmenter(nn.Module):
    """An encoder, a skip decoder without its last layer, and a fresh one."""

    def __init__(self, backbone: Backbone, decoder: SkipDecoder, classes: int) -> None:
        super().__init__()
        self.backbone, self.decoder, self.out = backbone, decoder, Pointwise(decoder.widths[0], classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.out(self.decoder.climb(self.backbone.features(image))[-1])
        return logits


def few_shot_dice(
    backbone: Backbone, dense: DenseDecoder | None, crops: Sequence[Crop], groups: int, fitted: int, steps: int = _STEPS
) -> float:
    """Dice of the groups on unseen heads after ``steps`` steps of fine-tuning on the ``fitted`` ones.

    The encoder, and a dense decoder's climb where there is one, are copied, their filters brought to the length of
    fresh ones (nets/lengths.py); the rest is fresh and the same for every network of these sizes, but the last layer
    begins as a linear model of the features before it. Windows of up to 48 voxels a side are cut from the crops around
    a voxel of a random group.
    """
    device = next(backbone.parameters()).device
    encoder, _ = fresh_networks(backbone, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = decoder_for(backbone, 1)
        net = swap_in(_Segmenter(encoder, decoder, groups)).to(device)
    encoder.load_state_dict(backbone.state_dict())
    if dense is not None:
        own = {name: value for name, value in decoder.state_dict().items() if name.startswith("out.")}  # of no use
        decoder.load_state_dict(dict(dense.state_dict()) | own)
    restore_lengths(net)
    stride, shown = backbone.strides[-1], [crop for crop in crops if crop.truth is not None]
    learnt = [crop for crop in shown if crop.head < fitted]
    _begin_linear(net, learnt, groups, device)
    optimizer = torch.optim.AdamW((p for n, p in net.named_parameters() if not n.startswith("decoder.out.")), lr=_RATE)
    net.train()
    for step in range(steps):
        image, truth = _window(learnt[step % len(learnt)], stride, seeds.stream(0, "few-shot window", step))
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 5)
        loss = _region_loss(net(image.to(device)), truth.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    overlap = GroupOverlap(groups)
    with torch.no_grad():
        net.eval()
        for crop in shown:
            if crop.head >= fitted and crop.truth is not None:
                overlap.add(net(crop.image.to(device))[0].argmax(dim=0).cpu(), crop.truth)
    return overlap.mean()


@torch.no_grad()
def _begin_linear(net: _Segmenter, crops: Sequence[Crop], groups: int, device: torch.device) -> None:
    """The last layer as a linear model of the decoder's last features in these crops."""
    rows, classes, shares = [], [], torch.zeros(groups, dtype=torch.float64)
    for number, crop in enumerate(crops):
        assert crop.truth is not None
        points, chosen = draw_voxels(crop.truth, _PER_CLASS, seeds.stream(0, "few-shot voxels", number))
        features = net.decoder.climb(net.backbone.features(crop.image.to(device)))[-1]
        rows.append(read_at(features, points, crop.truth.shape).cpu())
        classes.append(chosen)
        shares += torch.bincount(crop.truth[crop.truth >= 0], minlength=groups)
    weight, bias = fit_linear(torch.cat(rows), torch.cat(classes), shares / shares.sum())
    net.out.weight.copy_(weight[..., None, None, None])
    cast(Tensor, net.out.bias).copy_(bias.clamp(min=-20))  # of a class that is not there: else its gradient overflows


def _window(crop: Crop, stride: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    assert crop.truth is not None
    there = np.unique(crop.truth.numpy())
    points, _ = draw_voxels(torch.where(crop.truth == int(rng.choice(there)), 0, -1), 1, rng)
    box = []
    for n, centre in zip(crop.truth.shape, points[0].tolist() if len(points) else [0, 0, 0]):
        edge = min(n, max(2, _EDGE // stride) * stride)
        start = min(max(centre - edge // 2, 0), n - edge)
        box.append(slice(start, start + edge))
    return crop.image[:, :, box[0], box[1], box[2]], crop.truth[None, box[0], box[1], box[2]]


def _region_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy and Dice of the classes that are there; where the truth is -1 nothing counts."""
    known = truth >= 0
    shares = torch.softmax(logits.float(), dim=1) * known[:, None]
    member = F.one_hot(truth.clamp(min=0), logits.shape[1]).movedim(-1, 1) * known[:, None]
    axes = (0, 2, 3, 4)
    dice = 2 * (shares * member).sum(axes) / (shares.sum(axes) + member.sum(axes)).clamp(min=1)
    missed = 1 - dice[member.sum(axes) > 0].mean()
    return F.cross_entropy(logits.float(), truth, ignore_index=-1) + missed


# ------------------------------------------------------------------------------------------------------------ in a run


class LevelProbe:
    """The questions put to every level of an objective's networks while they are trained.

    Args:
        objective: as it stands when this is called.
        held: sessions that are not trained on, scans and labels; of others nothing is asked.
        targets: their label maps, at the level ``groups`` or ``tissues``; without any the ranks alone are asked.
        folder: of the run; keeps the fresh networks' answers in ``levels_random.json``.
        fewshot_every: steps; the few-shot question is put after multiples of them; 0: after every call; None: never.

    Attributes:
        table: the last answers: map -> ``dice``, ``rank`` and of fresh networks ``random_dice``, ``random_rank``
            (means) and ``random_low_dice`` (the lowest);
            ``network`` -> ``unseen_map_dice`` (middles at about 2 mm), ``unseen_whole_map_dice`` (whole heads),
            ``fewshot_dice``, ``random_fewshot_dice``.
    """

    def __init__(
        self,
        objective: Objective,
        store: Store,
        held: Sequence[SessionEntry],
        targets: Targets,
        device: torch.device,
        folder: Path,
        fewshot_every: int | None,
    ) -> None:
        self.objective, self.device, self.folder, self.fewshot_every = objective, device, folder, fewshot_every
        self.groups = len(targets.groups)
        heads = choose_heads(held, targets)
        strides = objective.backbone.strides
        self.crops = read_crops(store, heads, targets, objective.views.patch_vox, strides[-1])
        labelled = sum(session.key in _mapped(targets) for session, _ in heads)
        self.fitted = min(_FITTED, labelled - 1) if labelled >= 2 else 0
        self.heads = [session.key for session, _ in heads]
        self.table: Table = {}

    def plan(self) -> str:
        """What will be asked, in a sentence."""
        if not self.heads:
            return "levels: nobody is held out, so nothing is asked of them"
        if not self.fitted:
            return f"levels: ranks on {len(self.heads)} held-out heads; fewer than two have label maps, so no Dice"
        return (
            f"levels: a linear model of {self.fitted} held-out heads names {self.groups - 1} regions of "
            f"{len(self.heads) - self.fitted} others, for every map by itself"
        )

    def __call__(self, step: int) -> dict[str, float]:
        """The answers after ``step`` steps as ``<map>_<what>`` (of ``network``: ``<what>``)."""
        if not self.heads:
            return {}
        backbone, dense, every = self.objective.backbone, self.objective.dense, self.fewshot_every
        few = self.fitted > 0 and every is not None and (every == 0 or step % every == 0)
        random = self._random(backbone, dense, few)
        table = self._ask(backbone, dense)
        if few:
            score = few_shot_dice(backbone, dense, self.crops, self.groups, self.fitted)
            table["network"] = {"fewshot_dice": score, "random_fewshot_dice": random["network"]["fewshot_dice"]}
        for name in table.keys() - {"network"}:
            table[name] |= {f"random_{what}": value for what, value in random[name].items()}
        for what, whole in (("unseen_map_dice", False), ("unseen_whole_map_dice", True)):
            score = self._map_dice(whole)
            if not math.isnan(score):
                table.setdefault("network", {})[what] = score
        self.table = table
        return {
            what if name == "network" else f"{name}_{what}": value
            for name, answers in table.items()
            for what, value in answers.items()
        }

    def _map_dice(self, whole: bool) -> float:
        """Of the objective's own answer in fine classes; nan where it gives none."""
        heads, predict = self.objective.heads, getattr(self.objective, "predict_regions", None)
        if predict is None or heads is None or "regions" not in heads:
            return math.nan
        names = cast(DenseHead, heads["regions"]).names
        return map_dice(predict, names, self.crops, whole, self.device)

    def _ask(self, backbone: Backbone, dense: DenseDecoder | None) -> Table:
        maps = level_maps(backbone, dense)
        table: Table = {name: {"rank": rank} for name, rank in level_ranks(maps, self.crops, self.device).items()}
        if self.fitted:
            for name, score in linear_dice(maps, self.crops, self.groups, self.fitted, self.device).items():
                if not math.isnan(score):
                    table[name]["dice"] = score
        return table

    def _random(self, backbone: Backbone, dense: DenseDecoder | None, few: bool) -> Table:
        """The answers of fresh networks, from the run's folder where the same was asked already.

        Args:
            few: whether that of the few-shot question is needed.
        """
        question: dict[str, Any] = {
            "backbone": backbone.config,
            "decoder": None if dense is None else dense.config,
            "heads": ["/".join(key) for key in self.heads],
            "shapes": [list(crop.image.shape[2:]) for crop in self.crops],
        }
        path, table = self.folder / RANDOM_FILE, {}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["question"] == json.loads(json.dumps(question)):
                table = kept["answers"]
        there = len(table)
        table = table or self._of_fresh(backbone, dense)
        if few and "network" not in table:
            score = few_shot_dice(*fresh_networks(backbone, dense), self.crops, self.groups, self.fitted)
            table["network"] = {"fewshot_dice": score}
        if len(table) > there:
            write_whole(path, (json.dumps({"question": question, "answers": table}, indent=1) + "\n").encode())
        return table

    def _of_fresh(self, backbone: Backbone, dense: DenseDecoder | None) -> Table:
        """Means over several fresh networks, and the lowest Dice."""
        drawn = [self._ask(*fresh_networks(backbone, dense, seed)) for seed in range(_DRAWS)]
        table: Table = {
            name: {what: float(np.mean([one[name][what] for one in drawn])) for what in answers}
            for name, answers in drawn[0].items()
        }
        for name, answers in table.items():
            if "dice" in answers:
                answers["low_dice"] = min(one[name]["dice"] for one in drawn)
        return table


def describe(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for the levels' Dice, their ranks, and the network as a whole, in plain words."""
    levels = {name: answers for name, answers in table.items() if name != "network"}
    lines = []
    for what, words in (("dice", "linear Dice of regions"), ("rank", "effective rank")):
        said = [
            f"{name} {answers[what]:.3g} ({answers[f'random_{what}']:.3g})"
            for name, answers in levels.items()
            if what in answers
        ]
        if said:
            lines.append(f"levels, {words} (of fresh weights): " + ", ".join(said))
    whole = table.get("network", {})
    if whole:
        lines.append("network: " + ", ".join(f"{what} {value:.3g}" for what, value in whole.items()))
    return lines
