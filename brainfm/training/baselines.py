"""What a fine-tuned network has to beat: simple models on simple numbers, and a frozen encoder that was never trained.

Each learns from the training side of a split alone, the strength of its penalty and the threshold of its classes
included. Only the imputation of numbers that some cases lack looks at all cases; it looks at no label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm.data.descriptors import Described, describe_all, table
from brainfm.data.patches import Case, TaskPatches, class_indices
from brainfm.data.store import SessionEntry, Store
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.cpu import swap_in
from brainfm.scoring.linear import fit_logistic, row_weights, standardised, tuned
from brainfm.seeds import stream
from brainfm.specs import TaskSpec
from brainfm.tasks.windows import predict_windows

Split = tuple[Sequence[int], Sequence[int]]  # places of the cases that are learned from, and of those held out

_FARTHEST = 4.0  # deviations from the mean; what lies beyond is put there
_SMOOTHED_MM = (2.0, 6.0)
_PER_CASE = 4000  # voxels of a case that are looked at, half of them labelled
_MOST = 40_000  # voxels in all
_MOST_WORK = 2e9  # voxels x numbers x classes of one step of a fit
_SLAB = 1 << 20  # voxels whose numbers are held at a time
_OFFSETS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from equal classes to those of whole volumes
_TUNED_ON = 4  # cases whose whole volumes choose among them


class ScanLike(Protocol):
    """What is asked of a case of a scan-level question."""

    @property
    def session(self) -> SessionEntry: ...

    @property
    def scans(self) -> tuple[tuple[str, ...], ...]: ...


# ----------------------------------------------------------------------------------------------- questions about a scan


def feature_baseline(
    store: Store,
    cases: Sequence[ScanLike],
    truth: np.ndarray,
    splits: Sequence[Split],
    spec: TaskSpec,
    seed: int,
    *,
    described: Sequence[Described] | None = None,
    regions: Sequence[str] | None = None,
) -> np.ndarray:
    """Answers of ridge (values) or logistic regression (classes) on intensities, outline and region volumes.

    Args:
        truth: [N] class indices or values, or [N, T] of a multi-label question with NaN where unknown.
        splits: places in ``cases``; no subject on both sides of one.
        described: what `describe_all` says of the cases, with the regions wanted, where it is known already.
        regions: names of label volumes whose structures' volumes are looked at; None: `region_labels`.

    Returns:
        [N, K] or [N, T] probabilities, or [N] values, from the split that holds a case out; NaN where none does.
    """
    if described is None:
        chosen = region_labels(cases, spec) if regions is None else regions
        scans = [case.scans for case in cases]
        described = describe_all(store, [case.session for case in cases], spec.contrasts, scans, chosen)
    x = table([row.numbers["content"] for row in described])[0]
    return linear_answers(x, truth, [case.session.subject_key for case in cases], splits, spec, seed)


def region_labels(cases: Sequence[ScanLike], spec: TaskSpec) -> tuple[str, ...]:
    """The anatomical label maps (``*_labels``) that every case has, but for what is itself asked for."""
    shared = set.intersection(*({label.name for label in case.session.labels} for case in cases))
    return tuple(sorted(name for name in shared if name.endswith("_labels") and name != f"{spec.target}_labels"))


def random_linear_scans(
    store: Store,
    cases: Sequence[ScanLike],
    truth: np.ndarray,
    splits: Sequence[Split],
    spec: TaskSpec,
    seed: int,
    *,
    backbone_config: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """The same on the features of an encoder whose weights are as they were drawn; see `feature_baseline`."""
    backbone = random_backbone(backbone_config, seed).to(device)
    x = pooled_features(backbone, store, cases, spec)
    return linear_answers(x, truth, [case.session.subject_key for case in cases], splits, spec, seed)


def linear_answers(
    x: np.ndarray, truth: np.ndarray, groups: Sequence[str], splits: Sequence[Split], spec: TaskSpec, seed: int
) -> np.ndarray:
    """Answers to held-out rows of features ``x`` [N, F]; see `feature_baseline`.

    The penalty is chosen by subject inside the training side. A label that is unknown for all of that side is NaN.
    """
    truth = np.asarray(truth, np.float64)
    if not x.shape[1]:
        x = np.zeros((len(truth), 1))  # nothing varies: the answer is the training side's share or mean
    multilabel = spec.mode == "multilabel"
    columns = truth if multilabel else truth[:, None]
    width = truth.shape[1] if multilabel else spec.classes if spec.kind == "classification" else 1
    answers = np.full((len(truth), width), np.nan)
    for trained, held in splits:
        for t in range(columns.shape[1]):
            rows = [r for r in trained if np.isfinite(columns[r, t])]
            if not rows or not len(held):
                continue
            who = [groups[r] for r in rows]
            # A number that hardly varies among the training rows would throw a held-out row any distance away.
            near, other = (np.clip(z, -_FARTHEST, _FARTHEST) for z in standardised(x[rows], x[list(held)]))
            y = columns[rows, t]
            if spec.kind == "regression":
                answers[list(held), 0] = tuned(near, y, who, other, "ridge", seed).answers
                continue
            classes = 2 if multilabel else spec.classes
            given = tuned(near, y.astype(np.int64), who, other, "logistic", seed, classes=classes).answers
            if multilabel:
                answers[list(held), t] = given[:, 1]
            else:
                answers[list(held)] = given
    return answers[:, 0] if spec.kind == "regression" else answers


def random_backbone(config: Mapping[str, Any], seed: int) -> Backbone:
    """A backbone as it is before any training, frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(**config)
    return swap_in(backbone).eval().requires_grad_(False)


@torch.no_grad()
def pooled_features(backbone: Backbone, store: Store, cases: Sequence[ScanLike], spec: TaskSpec) -> np.ndarray:
    """What a frozen encoder says of each case: mean and deviation of its deepest map, for each contrast.

    Of the whole-head view and, where the spec has them, of the covering windows, averaged. A contrast that a case lacks
    has the mean of the cases that have it, and a column that says so.

    Returns:
        [N, F] float64; columns that never vary are left out.
    """
    from brainfm.data.scan_cases import views_of

    device = next(backbone.parameters()).device
    rows = []
    for case in cases:
        image, present = views_of(store, case, spec)  # type: ignore[arg-type]  # it reads what ScanLike has
        whole = int(spec.view_mm > 0)
        numbers: dict[str, float] = {}
        for m in np.flatnonzero(present):
            pooled = []
            for view in image[:, m]:  # one at a time: memory is that of one view
                deepest = backbone.features(torch.from_numpy(view)[None, None].float().to(device))[-1].double()
                flat = deepest[0].flatten(1)
                pooled.append(torch.cat([flat.mean(dim=1), flat.std(dim=1, correction=0)]).cpu().numpy())
            parts = {"whole": pooled[:whole], "crops": pooled[whole:]}
            for part, values in parts.items():
                if values:
                    mean = np.mean(values, axis=0)
                    numbers |= {f"{spec.contrasts[m]}/{part}{e:04d}": float(v) for e, v in enumerate(mean)}
        rows.append(numbers)
    return table(rows)[0]


# ------------------------------------------------------------------------------------------- questions about each voxel


@dataclass(frozen=True)
class VoxelModel:
    """Multinomial logistic regression on numbers of a voxel, fitted to classes drawn equally often.

    Attributes:
        weight: [K, F] of the numbers as they are; the standardisation is folded in.
        bias: [K].
        prior: [K] log of how much commoner each class is in whole volumes than it was among the voxels drawn.
        offset: the share of ``prior`` that is added: 1 gives the most probable class, 0 finds small classes too often.
            It is what gives the best Dice on training cases.
    """

    weight: np.ndarray
    bias: np.ndarray
    prior: np.ndarray
    offset: float = 0.0


def voxel_baseline(
    store: Store, train_cases: Sequence[Case], spec: TaskSpec, seed: int
) -> Callable[[Case], np.ndarray]:
    """A segmenter that sees each voxel's intensities, as they are and smoothed at two scales, and its place.

    A contrast that is missing is 0, with a column that says so.

    Returns:
        case -> class indices [X, Y, Z] uint8.
    """
    x, y, share = [], [], np.zeros(spec.classes)
    per_case = max(64, min(_PER_CASE, _MOST // len(train_cases)))
    for number, case in enumerate(train_cases):
        label = class_indices(store.volume(case.session, case.label), spec.values)
        counts = np.bincount(label.ravel(), minlength=spec.classes)
        share += counts / counts.sum() / len(train_cases)
        places = _draw_voxels(store, case, label, per_case, stream(seed, "baseline voxels", number))
        x.append(np.stack([m[tuple(places.T)] for m in _maps(store, case, spec)], axis=1))
        y.append(label[tuple(places.T)])
    model = _fitted(np.concatenate(x), np.concatenate(y), share)
    pairs = [(_class_logits(store, case, spec, model), case) for case in train_cases[:_TUNED_ON]]
    model = _with_offset(model, pairs, store, spec)
    return lambda case: _labelled(_class_logits(store, case, spec, model), model, case.session.shape)


def _image(store: Store, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """[M, X, Y, Z] float32 with the first scan of each contrast, 0 where it is missing, and present [M]."""
    image = np.zeros((len(case.scans), *case.session.shape), np.float32)
    for m, names in enumerate(case.scans):
        if names:
            image[m] = store.volume(case.session, names[0])
    return image, np.array([bool(names) for names in case.scans])


def _draw_voxels(store: Store, case: Case, label: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3]: half of them labelled, as equally many of each class as there are, the others in the head or anywhere."""
    labelled = store.label_points(case.session, case.label).astype(np.int64)
    classes = label[tuple(labelled.T)]
    kinds = np.unique(classes)
    chosen = []
    for kind in kinds:
        own = labelled[classes == kind]
        chosen.append(own[rng.permutation(len(own))[: max(1, count // (2 * len(kinds)))]])
    head = store.foreground(case.session).astype(np.int64)
    chosen.append(head[rng.permutation(len(head))[: count // 3]])
    chosen.append(np.stack([rng.integers(n, size=count // 6) for n in label.shape], axis=1))
    return np.concatenate(chosen)


def _maps(store: Store, case: Case, spec: TaskSpec) -> Iterator[np.ndarray]:
    """The numbers of every voxel, [X, Y, Z] float32 one after the other."""
    image, present = _image(store, case)
    shape = case.session.shape
    for scan, there in zip(image, present):
        yield scan
        yield scan * scan
        for mm in _SMOOTHED_MM:
            sigma = [mm / s for s in store.spec.spacing_mm]
            yield scipy.ndimage.gaussian_filter(scan, sigma) if there else scan
        yield np.broadcast_to(np.float32(not there), shape)
    lines = [(np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1 for n in shape]
    places = np.broadcast_arrays(*np.ix_(*lines))  # from -1 to 1 across the prepared box, which is that of the head
    for i, place in enumerate(places):
        yield place
        for other in places[i:]:
            yield place * other


def _fitted(x: np.ndarray, y: np.ndarray, share: np.ndarray) -> VoxelModel:
    from threadpoolctl import threadpool_limits

    classes = len(share)
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    scale = np.where(std > 1e-9, std, np.inf)
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -50.0)  # a class that is never seen is never told
    seen = np.unique(y)
    if len(seen) > 1:
        place = np.searchsorted(seen, y)
        with threadpool_limits(1):
            (theta,) = fit_logistic(
                ((x - mean) / scale).astype(np.float32), place, row_weights(place, len(seen), True), tolerance=1e-3,
                steps=200,
            )  # fmt: skip
        if len(seen) == 2:
            theta = np.stack([np.zeros(theta.shape[1]), theta[0]])
        weight[seen], bias[seen] = theta[:, :-1], theta[:, -1]
    else:
        bias[seen] = 0.0
    folded = weight / scale
    prior = np.log(np.maximum(share, 1e-12) * len(seen))  # of classes that weigh alike
    return VoxelModel(folded, bias - folded @ mean, prior)


def _class_logits(store: Store, case: Case, spec: TaskSpec, model: VoxelModel) -> Callable[[], Iterator[np.ndarray]]:
    """Slabs of [K, n] logits along X that together make up the volume; computed anew whenever asked."""

    def slabs() -> Iterator[np.ndarray]:
        maps = list(_maps(store, case, spec))
        x, y, z = case.session.shape
        step = max(1, _SLAB // (y * z * max(1, model.weight.shape[0] // 8)))
        for start in range(0, x, step):
            part = np.stack([m[start : start + step].ravel() for m in maps])
            yield model.weight.astype(np.float32) @ part + model.bias.astype(np.float32)[:, None]

    return slabs


def _with_offset(
    model: VoxelModel,
    pairs: Sequence[tuple[Callable[[], Iterator[np.ndarray]], Case]],
    store: Store,
    spec: TaskSpec,
) -> VoxelModel:
    """The model with the offset of the best mean Dice over classes and cases."""
    scores = np.zeros(len(_OFFSETS))
    for logits, case in pairs:
        true = class_indices(store.volume(case.session, case.label), spec.values).ravel()
        there = np.bincount(true, minlength=spec.classes)
        counts = np.zeros((len(_OFFSETS), 2, spec.classes))  # predicted, and predicted rightly
        at = 0
        for slab in logits():
            label = true[at : at + slab.shape[1]]
            at += slab.shape[1]
            for i, offset in enumerate(_OFFSETS):
                found = (slab + np.float32(offset) * model.prior.astype(np.float32)[:, None]).argmax(axis=0)
                counts[i, 0] += np.bincount(found, minlength=spec.classes)
                counts[i, 1] += np.bincount(found[found == label], minlength=spec.classes)
        total = counts[:, 0] + there
        each = np.divide(2 * counts[:, 1], total, out=np.ones_like(total), where=total > 0)
        scores += each[:, 1:].mean(axis=1)
    return VoxelModel(model.weight, model.bias, model.prior, _OFFSETS[int(scores.argmax())])


def _labelled(logits: Callable[[], Iterator[np.ndarray]], model: VoxelModel, shape: tuple[int, int, int]) -> np.ndarray:
    shift = (model.offset * model.prior).astype(np.float32)[:, None]
    return np.concatenate([(slab + shift).argmax(axis=0).astype(np.uint8) for slab in logits()]).reshape(shape)


# ------------------------------------------------------------------------------------------ a random encoder, per voxel


class RandomVoxels(nn.Module):
    """Logits that are linear in the upsampled feature maps of a frozen encoder, contrast by contrast.

    Upsampling and weighting are exchanged, which changes nothing and spares the memory of upsampled maps.

    Args:
        backbone: frozen.
        weight: [M, K, sum of widths] for each contrast of the task.
        mean: [M, sum of widths] features that add nothing, as an absent contrast does.
        bias: [K].
    """

    weight: Tensor
    offset: Tensor
    bias: Tensor

    def __init__(self, backbone: Backbone, weight: np.ndarray, mean: np.ndarray, bias: np.ndarray) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("weight", torch.from_numpy(weight.astype(np.float32)))
        self.register_buffer("offset", torch.from_numpy(np.einsum("mke,me->mk", weight, mean).astype(np.float32)))
        self.register_buffer("bias", torch.from_numpy(bias.astype(np.float32)))

    @torch.no_grad()
    def forward(self, image: Tensor, present: Tensor) -> Tensor:
        """image [B, M, X, Y, Z], present [B, M] -> logits [B, K, X, Y, Z]."""
        total = self.bias.view(1, -1, 1, 1, 1).expand(len(image), -1, *image.shape[2:]).clone()
        for m in range(image.shape[1]):
            there = present[:, m]
            if not bool(there.any()):
                continue
            maps = self.backbone.features(image[there, m : m + 1])
            for one, weight in zip(maps, self.weight[m].split(self.backbone.widths, dim=1)):
                logits = torch.einsum("ke,bexyz->bkxyz", weight, one)
                total[there] += functional.interpolate(logits, image.shape[2:], mode="trilinear", align_corners=False)
            total[there] -= self.offset[m].view(1, -1, 1, 1, 1)
        return total


@torch.no_grad()
def features_at(maps: Sequence[Tensor], places: Tensor, shape: Sequence[int]) -> Tensor:
    """[n, sum of widths]: maps [1, E, X/s, Y/s, Z/s] upsampled trilinearly, at voxels [n, 3] of the image."""
    size = torch.tensor(shape, dtype=torch.float32, device=places.device)
    grid = ((places.float() + 0.5) / size * 2 - 1).flip(1).view(1, -1, 1, 1, 3)  # grid_sample counts from the last axis
    found = [
        functional.grid_sample(one.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        for one in maps
    ]
    return torch.cat([one[0, :, :, 0, 0].T for one in found], dim=1)


def random_linear_voxels(
    store: Store,
    train_cases: Sequence[Case],
    spec: TaskSpec,
    backbone_config: Mapping[str, Any],
    seed: int,
    *,
    patches: int = 16,
    device: torch.device | str = "cpu",
) -> Callable[[Case], np.ndarray]:
    """A segmenter that is linear in the features of an encoder whose weights are as they were drawn.

    Args:
        patches: that are drawn from the training cases; some hundred voxels of each are learned from.

    Returns:
        case -> class indices [X, Y, Z] uint8.
    """
    backbone = random_backbone(backbone_config, seed).to(device)
    dataset = TaskPatches(store, train_cases, spec.values, spec.patch_vox, seed)
    contrasts, width = len(spec.contrasts), sum(backbone.widths)
    most = int(np.clip(_MOST_WORK / (spec.classes * contrasts * width), _MOST // 20, _MOST // 2))
    rows, labels = [], []
    for i in range(patches):
        sample = dataset[i]
        assert sample.present is not None and sample.label is not None
        places = _draw_patch_voxels(sample.label, most // patches, stream(seed, "baseline patch", i))
        at = torch.from_numpy(places).to(device)
        row = np.full((len(places), contrasts, width), np.nan, np.float32)
        for m in np.flatnonzero(sample.present):
            image = torch.from_numpy(sample.image[m]).float()[None, None].to(device)
            with torch.no_grad():
                row[:, m] = features_at(backbone.features(image), at, spec.patch_vox).cpu().numpy()
        rows.append(row)
        labels.append(sample.label[tuple(places.T)])
    x, y = np.concatenate(rows), np.concatenate(labels)
    known = np.isfinite(x)
    mean = np.where(known, x, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, x - mean, 0).astype(np.float32)  # an absent contrast says nothing
    share = np.zeros(spec.classes)
    for case in train_cases:
        counts = np.bincount(class_indices(store.volume(case.session, case.label), spec.values).ravel())
        share[: len(counts)] += counts / counts.sum() / len(train_cases)
    model = _fitted(centred.reshape(len(x), -1), y, share)
    weight = model.weight.reshape(spec.classes, contrasts, width).swapaxes(0, 1)
    network = RandomVoxels(backbone, weight, mean, model.bias).to(device).eval()

    def logits(case: Case) -> Callable[[], Iterator[np.ndarray]]:
        def slabs() -> Iterator[np.ndarray]:
            image, present = _image(store, case)
            found = predict_windows(
                network, torch.from_numpy(image), torch.from_numpy(present), spec.patch_vox, overlap=0.25, device=device
            )
            yield found.clamp_min(1e-12).log().flatten(1).numpy()

        return slabs

    model = _with_offset(model, [(logits(case), case) for case in train_cases[: _TUNED_ON // 2]], store, spec)
    return lambda case: _labelled(logits(case), model, case.session.shape)


def _draw_patch_voxels(label: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[n, 3] voxels of a patch, as equally many of each class as there are."""
    kinds = np.unique(label)
    chosen = []
    for kind in kinds:
        own = np.flatnonzero(label == kind)
        chosen.append(rng.choice(own, min(len(own), max(1, count // len(kinds))), replace=False))
    return np.stack(np.unravel_index(np.concatenate(chosen), label.shape), axis=1)
