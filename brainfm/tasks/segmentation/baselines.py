"""Baselines of a segmentation: a model of each voxel's intensities and place, and an encoder never trained.

Each learns from the training side of a split alone, the offset between its classes included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm.data.store import Store
from brainfm.nets.backbone import Backbone
from brainfm.nets.untrained import random_backbone
from brainfm.scoring.linear import fit_logistic, row_weights
from brainfm.seeds import stream
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation.cases import LabelledCase, TaskPatches, class_indices
from brainfm.tasks.windows import predict_windows

_SMOOTHED_MM = (2.0, 6.0)
_PER_CASE = 4000  # voxels of a case that are looked at, half of them labelled
_MOST = 40_000  # voxels in all
_MOST_WORK = 2e9  # voxels x numbers x classes of one step of a fit
_SLAB = 1 << 20  # voxels whose numbers are held at a time
_OFFSETS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the way from equal classes to those of whole volumes
_TUNED_ON = 4  # cases whose whole volumes choose among them


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
    store: Store, train_cases: Sequence[LabelledCase], spec: TaskSpec, seed: int
) -> Callable[[LabelledCase], np.ndarray]:
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


def _image(store: Store, case: LabelledCase) -> tuple[np.ndarray, np.ndarray]:
    """[M, X, Y, Z] float32 with the first scan of each contrast, 0 where it is missing, and present [M]."""
    image = np.zeros((len(case.scans), *case.session.shape), np.float32)
    for m, names in enumerate(case.scans):
        if names:
            image[m] = store.volume(case.session, names[0])
    return image, np.array([bool(names) for names in case.scans])


def _draw_voxels(
    store: Store, case: LabelledCase, label: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
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


def _maps(store: Store, case: LabelledCase, spec: TaskSpec) -> Iterator[np.ndarray]:
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


def _class_logits(
    store: Store, case: LabelledCase, spec: TaskSpec, model: VoxelModel
) -> Callable[[], Iterator[np.ndarray]]:
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
    pairs: Sequence[tuple[Callable[[], Iterator[np.ndarray]], LabelledCase]],
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
    train_cases: Sequence[LabelledCase],
    spec: TaskSpec,
    backbone_config: Mapping[str, Any],
    seed: int,
    *,
    patches: int = 16,
    device: torch.device | str = "cpu",
) -> Callable[[LabelledCase], np.ndarray]:
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

    def logits(case: LabelledCase) -> Callable[[], Iterator[np.ndarray]]:
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
