"""Where in the head an answer comes from: Grad-CAM and its relative HiResCAM on the input's grid, and occlusion, which
asks for no gradient.

Both ask about one answer of a bundle, say one class, and give a map of the head. A map shows what the networks
reacted to. It does not show that they were right, and not that the same place would matter in another head.
"""

from __future__ import annotations

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm.data.region_volumes import voxel_effects
from brainfm.errors import BrainfmWarning, BundleError, ConfigError, ScanError
from brainfm.imaging import nifti
from brainfm.imaging.preprocess import Recipe, prepare_session, restore_map
from brainfm.imaging.views import covering_corners, views_of_volumes, whole_view_to_volume
from brainfm.inference.engine import Engine, PathLike
from brainfm.inference.label_maps import check_labels, decisions_for, note_missing, reads_of, volumes_of
from brainfm.inference.predict import check_inputs, check_output
from brainfm.inference.scan_answers import joined
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.bundle import Bundle
from brainfm.tasks.windows import gaussian_weight, predict_windows, window_slices

METHODS = ("hirescam", "gradcam", "occlusion")
Triple = tuple[int, int, int]
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Explanation:
    """A map of the head and what it is about.

    Attributes:
        heat: [X, Y, Z] float32 on the prepared grid; 0 to 1 for a class, -1 to 1 for a regression, where above 0 means
            that the place raises the answer. 0 is nothing; the largest absolute value is 1 unless all is 0.
        peak: what 1 stands for: of occlusion the change of the answer, as a probability or in the regression's unit;
            of the other methods a number without a unit.
        target: the class, label or column that is explained.
        answer: what a bundle answers for it: a probability or a value in the unit, calibrated; of a segmentation the
            volume in ml before mirroring and clean-up. Of bare networks, what they answer.
        method: one of METHODS.
        layer: whose maps were used; empty for occlusion.
        scan: [X, Y, Z] the standardised voxels of the file that is answered for, to draw the map on; None where bare
            volumes were explained.
    """

    heat: np.ndarray
    peak: float
    target: str
    answer: float
    method: str
    layer: str
    scan: np.ndarray | None = None


def explain(
    bundle: PathLike | Bundle | Engine,
    inputs: Mapping[str, PathLike],
    out: PathLike | None = None,
    target: str | int | None = None,
    *,
    on: str | None = None,
    labels: Mapping[str, PathLike] | None = None,
    method: str = "hirescam",
    layer: str | None = None,
    device: str = "auto",
    overlap: float = 0.5,
    cube_mm: float = 30.0,
    step_mm: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Explanation:
    """Explains one answer for one session, and writes the map.

    Args:
        bundle: a bundle's folder.
        inputs: file by contrast, as for predict.
        out: ``.nii`` or ``.nii.gz``: float32 on the grid of the file that is answered for, its largest absolute value
            1.
        target: the class as the bundle writes it, or the label of a multi-label question; by default the answer given:
            the most probable class, or of a segmentation the class that takes the largest volume.
        on: the contrast whose file's grid the map lies on; by default the first of the inputs.
        labels: the label map that a bundle may answer from, by its name, as for predict.
        others: see `explain_volume`.

    Raises:
        BundleError, ScanError: the bundle or a file cannot be used.
        ConfigError: an unknown contrast, class, method or layer.
        FileError: the output cannot be written.
    """
    engine = bundle if isinstance(bundle, Engine) else Engine.load(bundle, device, "32-true", overlap)
    files = check_inputs(inputs, engine.task)
    on = next(iter(files)) if on is None else on
    if on not in files:
        raise ConfigError(f"no input {on} to answer on, expected one of the inputs {', '.join(files)}")
    place = None if out is None else check_output(out, files.values())
    _check(engine.networks, engine.task, target, method, layer, cube_mm, step_mm)  # before any time is spent
    maps = check_labels(labels or {}, engine.networks)
    if not maps:
        note_missing(engine.networks, str(files[on]))
    image, present, recipe, shown, label_map = _prepared(engine, files, on, maps)
    _note_unseen(engine.networks, method, label_map is not None)
    found = explain_volume(
        engine, engine.task, image, present, target,
        labels=label_map, method=method, layer=layer, spacing_mm=engine.preprocess.spacing_mm, cube_mm=cube_mm,
        step_mm=step_mm, progress=progress,
    )  # fmt: skip
    if place is not None:
        _write(place, files[on], found, recipe)
    return replace(found, scan=image[shown].numpy())


def saliency(
    networks: Engine | Sequence[nn.Module],
    spec: TaskSpec,
    image: np.ndarray | Tensor,
    present: np.ndarray | Tensor,
    target: str | int | None = None,
    **how: Any,
) -> np.ndarray:
    """`explain_volume` without what it says about the map: [X, Y, Z] float32."""
    return explain_volume(networks, spec, image, present, target, **how).heat


def explain_volume(
    networks: Engine | Sequence[nn.Module],
    spec: TaskSpec,
    image: np.ndarray | Tensor,
    present: np.ndarray | Tensor,
    target: str | int | None = None,
    *,
    labels: np.ndarray | None = None,
    method: str = "hirescam",
    layer: str | None = None,
    spacing_mm: Spacing = (1.0, 1.0, 1.0),
    cube_mm: float = 30.0,
    step_mm: float | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Explanation:
    """The map of one prepared case, the mean over the members of the ensemble.

    ``gradcam`` weighs the maps of a layer by the mean of their gradients over the voxels. ``hirescam`` multiplies maps
    and gradients voxel by voxel: needed where a head weighs places before it pools them, as the scan-level tasks do,
    for the mean forgets these weights, and the gradient of a pooled standard deviation has the mean 0. ``occlusion``
    covers a cube with background and sees how far the answer falls. What is explained is a class's log odds (its logit
    against those of the others: a softmax does not see a shift of all logits), of a segmentation summed over the voxels
    that are predicted as the class, of a regression the value.

    Args:
        networks: an engine, or the members in evaluation mode on one device.
        image: [M, X, Y, Z] standardised voxels on the prepared grid.
        present: [M] bool.
        target: see `explain`.
        labels: [X, Y, Z] the prepared label map that a whole-head answer may be made of. A voxel's part in that is by
            how much, counted to its region, it raises the answer, to first order.
        layer: ``encoder.0`` (finest) and on, where the contrasts have met, ``encoder`` for the sum of all that reach
            the head, or of a segmentation ``decoder.0`` (coarsest) and on; by default ``encoder`` of a scan-level
            task, and of a segmentation the deepest of the encoder.
        spacing_mm: of the grid.
        cube_mm: edge of the cube that occlusion moves over the head.
        step_mm: by which it moves; by default half its edge.
        progress: called with (passes done, passes in all).

    Source: Selvaraju et al. 2017 (Grad-CAM, arXiv:1610.02391), equations 1 and 2; for segmentations Vinogradova et al.
        2020 (Seg-Grad-CAM, arXiv:2002.11434); Draelos & Carin 2020 (HiResCAM, arXiv:2011.08891); Zeiler & Fergus 2014
        (arXiv:1311.2901), section 4.2, for occlusion.
        Differs: log odds instead of a logit; no ReLU for a regression; windows and views are put together.

    Raises:
        ConfigError: an unknown class, method or layer.
        BundleError: the networks' answer is not finite.
    """
    engine = networks if isinstance(networks, Engine) else None
    members = cast(Sequence[nn.Module], networks.networks if isinstance(networks, Engine) else networks)
    _check(members, spec, target, method, layer, cube_mm, step_mm)
    device = engine.device if engine else next(members[0].parameters()).device
    overlap = engine.overlap if engine else 0.5
    case = _Case(
        torch.as_tensor(image).float(), torch.as_tensor(present).bool(), spec, spacing_mm, device, overlap, labels
    )
    asked = _index(spec, target)
    question: _Question
    if spec.kind == "segmentation":
        question = _Voxels(members, case, asked)
    else:
        question = _Whole(members, case, asked, engine.decisions if engine else Decisions())
    if method == "occlusion":
        raw = _occluded(question, case, cube_mm, step_mm, progress)
        name = ""
    else:
        name = layer or _usual(members[0], spec.kind)
        total = np.zeros(case.shape, dtype=np.float32)
        for number, member in enumerate(members):
            progress(number, len(members))
            total += question.cam(member, name, method)
        raw = total / len(members)
        progress(len(members), len(members))
    if not np.isfinite(raw).all() or not np.isfinite(question.answer):
        raise BundleError("the networks give values that are not finite for this case, so there is nothing to explain")
    heat, peak = _normalised(raw, signed=spec.kind == "regression")
    return Explanation(heat, peak, question.name, question.answer, method, name)


def share_inside(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of a map's mass, sum of |heat|, that lies in a mask [X, Y, Z]; NaN where the map is 0 everywhere."""
    mass = np.abs(heat, dtype=np.float64)
    total = float(mass.sum())
    return float(mass[np.asarray(mask, dtype=bool)].sum()) / total if total > 0 else float("nan")


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One prepared session: image [M, X, Y, Z] and present [M] on the CPU, and how it passes a network."""

    image: Tensor
    present: Tensor
    spec: TaskSpec
    spacing_mm: Spacing
    device: torch.device
    overlap: float
    labels: np.ndarray | None = None

    @property
    def shape(self) -> Triple:
        x, y, z = self.image.shape[1:]
        return x, y, z

    @property
    def background(self) -> Tensor:
        """[M, 1, 1, 1]: what stands outside the head."""
        return self.image.amin(dim=(1, 2, 3), keepdim=True)

    def grown(self, image: Tensor) -> tuple[Tensor, Triple]:
        """An image of this case with background on both sides to at least a patch, and where the case begins in it."""
        before = [max(0, p - s) // 2 for s, p in zip(self.shape, self.spec.patch_vox)]
        after = [max(0, p - s) - b for s, p, b in zip(self.shape, self.spec.patch_vox, before)]
        widths = [w for b, a in zip(reversed(before), reversed(after)) for w in (b, a)]  # torch counts from the last
        values = self.background.flatten().tolist()
        grown = torch.stack([functional.pad(c, widths, value=v) for c, v in zip(image, values)])
        return grown, (before[0], before[1], before[2])


class _Question(ABC):
    """One answer of an ensemble for one case.

    Attributes:
        name: of what is explained.
        answer: before anything is covered.
    """

    name: str
    answer: float

    @abstractmethod
    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        """[X, Y, Z], one member's map before it is normalised."""

    @abstractmethod
    def places(self, start: Triple, stop: Triple) -> bool:
        """Whether covering these voxels can change the answer."""

    @abstractmethod
    def without(self, start: Triple, stop: Triple) -> float:
        """By how much the answer falls when these voxels are background."""


class _Voxels(_Question):
    """A class of a segmentation: its log odds, or its probability, over the voxels that are predicted as it."""

    def __init__(self, members: Sequence[nn.Module], case: _Case, index: int | None) -> None:
        self.members, self.case, patch = members, case, case.spec.patch_vox
        total: Tensor | None = None
        for member in members:
            found = predict_windows(
                member, case.image, case.present, patch, overlap=case.overlap, batch=1, device=case.device
            )
            total = found if total is None else total.add_(found)
        assert total is not None
        labels = total.argmax(dim=0)
        if index is None:
            counts = torch.bincount(labels.flatten(), minlength=case.spec.classes)[1:]
            index = int(counts.argmax()) + 1
        self.index, self.name = index, str(case.spec.values[index])
        self.mask = labels == index
        self.answer = float(self.mask.sum()) * float(np.prod(case.spacing_mm)) / 1000
        self.image, self.origin = case.grown(case.image)
        self.grown_mask = torch.zeros(self.image.shape[1:], dtype=torch.bool)
        self.grown_mask[self.inner] = self.mask
        # Few windows do for occlusion: the same ones before and after.
        self.bases: list[tuple[tuple[slice, slice, slice], list[float]]] = []

    @property
    def inner(self) -> tuple[slice, slice, slice]:
        x, y, z = (slice(o, o + s) for o, s in zip(self.origin, self.case.shape))
        return x, y, z

    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        patch = self.case.spec.patch_vox
        weight = gaussian_weight(patch)
        total, mass = torch.zeros(self.image.shape[1:]), torch.zeros(self.image.shape[1:])
        for window in window_slices(tuple(self.image.shape[1:]), patch, self.case.overlap):
            mass[window] += weight
            inside = self.grown_mask[window]
            if not inside.any():  # nothing is asked there, so the gradient is 0
                continue
            with _watched(network, layer) as leaves:
                logits = self._logits(network, self.image[(slice(None), *window)])
                score = _log_odds(logits, self.index)[0][inside.to(logits.device)].sum()
                maps = _cams(leaves, _gradients(score, leaves), how, signed=False)
            total[window] += _upsampled(maps, patch)[0] * weight
        return (total / mass)[self.inner].numpy()

    def places(self, start: Triple, stop: Triple) -> bool:
        if not self.bases:
            self._base()
        return any(self._meets(window, start, stop) for window, _ in self.bases)

    def without(self, start: Triple, stop: Triple) -> float:
        covered = self.image.clone()
        x, y, z = (slice(a + o, b + o) for a, b, o in zip(start, stop, self.origin))
        covered[:, x, y, z] = self.case.background
        drop = 0.0
        for window, base in self.bases:
            if self._meets(window, start, stop):
                drop += sum(base) - sum(self._mean_probability(covered, window))
        return drop / (len(self.members) * max(int(self.mask.sum()), 1))

    def _base(self) -> None:
        seen = torch.zeros_like(self.grown_mask)
        for window in window_slices(tuple(self.image.shape[1:]), self.case.spec.patch_vox, 0.0):
            if (self.grown_mask[window] & ~seen[window]).any():
                self.bases.append((window, self._mean_probability(self.image, window)))
                seen[window] = True

    def _mean_probability(self, image: Tensor, window: tuple[slice, slice, slice]) -> list[float]:
        """For each member the sum of the class's probability over the voxels of a window predicted as it."""
        inside = self.grown_mask[window].to(self.case.device)
        sums = []
        with torch.no_grad():
            for member in self.members:
                logits = self._logits(member, image[(slice(None), *window)])
                sums.append(float(torch.softmax(logits, dim=1)[0, self.index][inside].double().sum()))
        return sums

    def _meets(self, window: tuple[slice, slice, slice], start: Triple, stop: Triple) -> bool:
        return all(a + o < w.stop and w.start < b + o for w, a, b, o in zip(window, start, stop, self.origin))

    def _logits(self, network: nn.Module, patch: Tensor) -> Tensor:
        image, present = patch[None].to(self.case.device), self.case.present[None].to(self.case.device)
        return network(image, present).float()


class _Whole(_Question):
    """A class's log odds or probability, or a regression's value, for the whole session."""

    def __init__(self, members: Sequence[nn.Module], case: _Case, index: int | None, decisions: Decisions) -> None:
        self.members, self.case = members, case
        self.volumes = volumes_of(members, case.labels, case.spacing_mm, "the label map")
        self.decisions = decisions_for(members, decisions, self.volumes is not None)
        spec = case.spec
        answers = self._answers(case.image)
        if index is None:
            index = 0 if spec.kind == "regression" else int(answers.argmax())
        self.index = index
        self.name = spec.target if spec.kind == "regression" else str(spec.values[index])
        self.answer = float(answers[index])

    def cam(self, network: nn.Module, layer: str, how: str) -> np.ndarray:
        case, spec = self.case, self.case.spec
        signed = spec.kind == "regression"
        with _watched(network, layer) as leaves:
            volumes = None if self.volumes is None else self.volumes.to(case.device).requires_grad_(True)
            logits = self._output(network, self._views(case.image), volumes).logits.float()[0]
            score = _scan_score(logits, spec, self.index)
            *slopes, slope = _gradients(score, [*leaves, torch.zeros(1) if volumes is None else volumes])
            heats = _upsampled(_cams(leaves, slopes, how, signed), spec.patch_vox).numpy()
        total = self._of_volumes(slope, signed)
        if spec.view_mm > 0:
            whole = whole_view_to_volume(heats[0], case.spacing_mm, spec.view_mm, spec.patch_vox, case.shape)
            total += whole * float(
                np.prod(case.spacing_mm) / spec.view_mm**3
            )  # its voxels are larger: the same in less
            heats = heats[1:]
        if spec.crops:
            added, count = np.zeros(case.shape, dtype=np.float32), np.zeros(case.shape, dtype=np.float32)
            corners = covering_corners(case.shape, spec.patch_vox)
            for corner, heat in zip(corners, heats, strict=True):
                # a corner lies before the volume where that is thinner than the window
                inside = tuple(slice(max(c, 0), c + p) for c, p in zip(corner, spec.patch_vox))
                x, y, z = (slice(max(-c, 0), n - c) for c, n in zip(corner, case.shape))
                added[inside] += heat[x, y, z]
                count[inside] += 1
            total += added / count
        return total

    def _of_volumes(self, slope: Tensor, signed: bool) -> np.ndarray:
        """[X, Y, Z] what the label map's voxels have to do with the answer; 0 without one."""
        reads = reads_of(self.members)
        if self.volumes is None or reads is None or self.case.labels is None:
            return np.zeros(self.case.shape, dtype=np.float32)
        found = voxel_effects(
            self.case.labels, self.case.spacing_mm, reads.scheme, reads.volumes, slope[0].double().cpu().numpy()
        )
        return found if signed else np.maximum(found, 0)

    def places(self, start: Triple, stop: Triple) -> bool:
        return True

    def without(self, start: Triple, stop: Triple) -> float:
        covered = self.case.image.clone()
        x, y, z = (slice(a, b) for a, b in zip(start, stop))
        covered[:, x, y, z] = self.case.background
        return self.answer - float(self._answers(covered)[self.index])

    def _answers(self, image: Tensor) -> np.ndarray:
        """[K] probabilities, or [1] value: of all members."""
        views = self._views(image)
        with torch.no_grad():
            volumes = None if self.volumes is None else self.volumes.to(self.case.device)
            found = [member.decode(self._output(member, views, volumes)).float().cpu()[0] for member in self.members]  # type: ignore[operator]
        raw = torch.stack(found).reshape(len(found), -1).numpy().astype(np.float64)
        return joined(raw, self.case.spec, self.decisions)

    def _views(self, image: Tensor) -> Tensor:
        return torch.from_numpy(views_of_volumes(image.numpy(), self.case.spacing_mm, self.case.spec))

    def _output(self, network: nn.Module, views: Tensor, volumes: Tensor | None) -> Any:
        given = () if volumes is None else (volumes,)
        return network(views[None].to(self.case.device), self.case.present[None].to(self.case.device), *given)


def _log_odds(logits: Tensor, index: int) -> Tensor:
    """[B, K, ...] -> [B, ...]: log p - log(1 - p) of a softmax's class, exact however sure the network is."""
    others = [k for k in range(logits.shape[1]) if k != index]
    return logits[:, index] - torch.logsumexp(logits[:, others], dim=1)


def _scan_score(logits: Tensor, spec: TaskSpec, index: int) -> Tensor:
    """The scalar whose gradient is taken, of one case's raw output.

    Of an ordinal question the steps up to the class count for it and those beyond it against it.
    """
    if spec.kind == "regression":
        return logits[0]
    if spec.mode == "multilabel":
        return logits[index]
    if spec.mode == "ordinal":
        return logits[:index].sum() - logits[index:].sum()
    return _log_odds(logits[None], index)[0]


# ---- Grad-CAM --------------------------------------------------------------------------------------------------------


def layers_of(network: nn.Module) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Name -> (module, which of its outputs; none of them: it has one) of the maps that can be looked at.

    An encoder's maps are taken where the contrasts have met: one map stands for the case, however many it has.
    """
    fusion = network.get_submodule("fusion")
    levels = int(fusion.levels)  # type: ignore[arg-type]
    finest = len(network.backbone.widths) - levels  # type: ignore[union-attr,arg-type]
    found: dict[str, tuple[nn.Module, tuple[int, ...]]] = {"encoder": (fusion, tuple(range(levels)))}
    found |= {f"encoder.{finest + i}": (fusion, (i,)) for i in range(levels)}
    decoder = getattr(network, "decoder", None)
    if decoder is not None:
        found |= {f"decoder.{i}": (merge, ()) for i, merge in enumerate(decoder.merges)}
    return found


def _usual(network: nn.Module, kind: str) -> str:
    """All maps that a scan-level head pools; of a segmentation the deepest, as finer ones say little but the mask."""
    if kind != "segmentation":
        return "encoder"
    return [name for name in layers_of(network) if name.startswith("encoder.")][-1]


@contextmanager
def _watched(network: nn.Module, layer: str) -> Iterator[list[Tensor]]:
    """While open, each output of the layer starts the gradient graph, and is listed.

    Nothing before the layer keeps anything for a backward pass, so that the encoder costs as little as in prediction.
    """
    module, places = layers_of(network)[layer]
    leaves: list[Tensor] = []

    def restart(_: nn.Module, __: Any, output: Any) -> Any:
        fresh = [o.detach() for o in (output if places else [output])]
        watched = [fresh[i].requires_grad_(True) for i in places or (0,)]
        leaves.extend(watched)
        return fresh if places else fresh[0]

    learning = [p for p in network.parameters() if p.requires_grad]
    handle = module.register_forward_hook(restart)
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield leaves
    finally:
        handle.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def _gradients(score: Tensor, of: Sequence[Tensor]) -> list[Tensor]:
    """Of a score; zeros for what it does not depend on."""
    if not score.requires_grad:
        return [torch.zeros_like(one) for one in of]
    known = [one for one in of if one.requires_grad]
    found = dict(zip(map(id, known), torch.autograd.grad(score, known, allow_unused=True)))
    return [torch.zeros_like(one) if (g := found.get(id(one))) is None else g for one in of]


def _cams(leaves: Sequence[Tensor], gradients: Sequence[Tensor], how: str, signed: bool) -> list[Tensor]:
    """[B, x, y, z] for each layer on its own grid, on the CPU."""
    found = []
    for leaf, gradient in zip(leaves, gradients):
        weight = gradient.mean(dim=(2, 3, 4), keepdim=True) if how == "gradcam" else gradient
        cam = (weight * leaf.detach()).sum(dim=1).float().cpu()
        found.append(cam if signed else functional.relu(cam))
    return found


def _upsampled(maps: Sequence[Tensor], patch_vox: Triple) -> Tensor:
    """[B, x, y, z] for each layer -> their sum [B, X, Y, Z], linear between the centres of the cells.

    A cell of a coarse layer stands for more voxels: its share is spread over them, so that layers can be added.
    """
    total = torch.zeros(())
    for cam in maps:
        spread = cam[0].numel() / maps[-1][0].numel()
        fine = functional.interpolate(cam[:, None], size=patch_vox, mode="trilinear", align_corners=False)[:, 0]
        total = total + spread * fine
    return total


def _normalised(raw: np.ndarray, signed: bool) -> tuple[np.ndarray, float]:
    """(the map divided by its largest absolute value, that value); 0 stays 0 and, of a class, so does all below it."""
    kept = raw if signed else np.maximum(raw, 0)
    peak = float(np.abs(kept).max(initial=0.0))
    return (kept / peak if peak > 0 else np.zeros_like(kept)).astype(np.float32), peak


# ---- occlusion -------------------------------------------------------------------------------------------------------


def _occluded(
    question: _Question,
    case: _Case,
    cube_mm: float,
    step_mm: float | None,
    progress: Callable[[int, int], None],
) -> np.ndarray:
    """[X, Y, Z]: by how much the answer falls, the mean over the cubes that cover a voxel."""
    head = (case.image > case.background).any(dim=0).numpy()
    edge = [min(max(1, round(cube_mm / s)), n) for s, n in zip(case.spacing_mm, case.shape)]
    step = [max(1, round((cube_mm / 2 if step_mm is None else step_mm) / s)) for s in case.spacing_mm]
    starts = [sorted({min(i, n - e) for i in range(0, n - e + d, d)}) for n, e, d in zip(case.shape, edge, step)]
    cubes: list[tuple[Triple, Triple]] = []
    for x, y, z in itertools.product(*starts):
        stop = (x + edge[0], y + edge[1], z + edge[2])
        if head[x : stop[0], y : stop[1], z : stop[2]].any() and question.places((x, y, z), stop):
            cubes.append(((x, y, z), stop))
    total, count = np.zeros(case.shape), np.zeros(case.shape)
    for number, (start, stop) in enumerate(cubes):
        progress(number, len(cubes))
        window = tuple(slice(a, b) for a, b in zip(start, stop))
        total[window] += question.without(start, stop)
        count[window] += 1
    progress(len(cubes), len(cubes))
    return (total / np.maximum(count, 1)).astype(np.float32)


# ---- files and refusals ----------------------------------------------------------------------------------------------


def _index(spec: TaskSpec, target: str | int | None) -> int | None:
    """Which of the answers is meant; None: whichever is given. Raises: ConfigError where there is no such answer."""
    if target is None:
        return None
    if spec.kind == "regression":
        raise ConfigError(f"class={target}: the bundle answers with a value of {spec.target}, expected no class")
    legal = [str(value) for value in spec.values]
    if str(target) not in legal or (spec.kind == "segmentation" and str(target) == legal[0]):
        expected = legal[1:] if spec.kind == "segmentation" else legal
        raise ConfigError(f"class={target}: the bundle of {spec.target} has no such class, expected {_or(expected)}")
    return legal.index(str(target))


def _check(
    members: Sequence[Any],
    spec: TaskSpec,
    target: str | int | None,
    method: str,
    layer: str | None,
    cube_mm: float,
    step_mm: float | None,
) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={method}: expected {_or(METHODS)}")
    if not cube_mm > 0 or (step_mm is not None and not 0 < step_mm <= cube_mm):
        raise ConfigError(f"cube_mm={cube_mm}, step_mm={step_mm}: expected an edge above 0 and a step up to the edge")
    _index(spec, target)
    if not members:
        raise BundleError("the bundle has no networks, expected at least one")
    if layer is not None and method == "occlusion":
        raise ConfigError(f"layer={layer}: occlusion looks at no layer, expected none")
    if layer is not None and layer not in layers_of(members[0]):
        raise ConfigError(f"layer={layer}: the network has no such layer, expected {_or(layers_of(members[0]))}")


def _or(words: Any) -> str:
    *most, last = [str(word) for word in words]
    return f"one of {', '.join(most)} or {last}" if most else last


def _note_unseen(networks: Sequence[Any], method: str, mapped: bool) -> None:
    """A BrainfmWarning where the method cannot show all that the answer is made of."""
    reads = getattr(networks[0], "reads", None)
    if reads is None:
        return
    if method == "occlusion" and mapped:
        text = "occlusion covers the scans, not the label map: what its volumes add to the answer is not shown"
    elif method != "occlusion" and reads.decoder is not None:
        text = f"method={method} shows the encoder's maps, not what the decoder sees; method=occlusion shows both"
    else:
        return
    warnings.warn(text, BrainfmWarning, stacklevel=3)


def _prepared(
    engine: Engine, files: Mapping[str, Path], on: str, maps: Mapping[str, Path]
) -> tuple[Tensor, Tensor, Recipe, int, np.ndarray | None]:
    """image [M, X, Y, Z], present [M], the recipe of the file answered for, which contrast that is, and the label
    map."""
    prepared = prepare_session(files, maps, engine.preprocess, reference=on)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))
    names = [*engine.task.contrasts, *(name for name in files if name not in engine.task.contrasts)]
    image = torch.zeros(len(names), *prepared.scans[on].shape)
    for name, scan in prepared.scans.items():
        image[names.index(name)] = torch.from_numpy(scan)
    present = torch.tensor([name in files for name in names])
    return image, present, prepared.recipes[on], names.index(on), next(iter(prepared.labels.values()), None)


def _write(path: Path, like: Path, found: Explanation, recipe: Recipe) -> None:
    """Raises: FileError."""
    on_file = recipe.file.to_ras(restore_map(found.heat, recipe))
    on_file, _ = _normalised(on_file, signed=bool((found.heat < 0).any()))
    nifti.write_map(path, on_file, like)


def describe(found: Explanation, spec: TaskSpec) -> str:
    """What the map is about, in one line."""
    how = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM", "occlusion": "Occlusion"}[found.method]
    where = f" at {found.layer}" if found.layer else ""
    if spec.kind == "regression":
        about = f"{spec.target} {found.answer:.3g} {spec.unit}".rstrip()
    elif spec.kind == "classification":
        about = f"{spec.target} {found.target}, probability {found.answer:.2f}"
        if spec.mode == "multilabel":
            about = about.removeprefix(f"{spec.target} ")
    else:
        label = spec.target if len(spec.values) == 2 else f"{spec.target} {found.target}"
        about = f"{label}, {found.answer:.3g} ml predicted"
    return f"{how}{where}: {about}"
