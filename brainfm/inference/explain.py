"""Where in the head an answer comes from: Grad-CAM and its relative HiResCAM on the input's grid, and occlusion, which
asks for no gradient.

Both ask about one answer of a bundle, say one class, and give a map of the head. A map shows what the networks
reacted to. It does not show that they were right, and not that the same place would matter in another head.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from brainfm.errors import BrainfmWarning, BundleError, ConfigError, ScanError
from brainfm.imaging import nifti
from brainfm.imaging.preprocess import Recipe, prepare_session, restore_map
from brainfm.inference.predict import check_inputs
from brainfm.nets.saliency import layers_of
from brainfm.specs import Decisions, TaskSpec
from brainfm.tasks.answers import check_volume
from brainfm.tasks.bundle import Bundle, load_engine
from brainfm.tasks.engine import Engine, PathLike
from brainfm.tasks.explained import ExplainedAnswer, ExplainedCase, Spacing, Triple
from brainfm.tasks.registry import kind_of

METHODS = ("hirescam", "gradcam", "occlusion")


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
        target: the class as the bundle writes it, or one of several labels; by default the answer given:
            the most probable class, or of a segmentation the class that takes the largest volume.
        on: the contrast whose file's grid the map lies on; by default the first of the inputs.
        labels: the label map that a bundle may answer from, by its name, as for predict.
        others: see `explain_volume`.

    Raises:
        BundleError, ScanError: the bundle or a file cannot be used.
        ConfigError: an unknown contrast, class, method or layer.
        FileError: the output cannot be written.
    """
    engine = bundle if isinstance(bundle, Engine) else load_engine(bundle, device, "32-true", overlap)
    files = check_inputs(inputs, engine.task)
    on = next(iter(files)) if on is None else on
    if on not in files:
        raise ConfigError(f"no input {on} to answer on, expected one of the inputs {', '.join(files)}")
    place = None if out is None else check_volume(Path(out), files.values())
    _check(engine.networks, engine.task, target, method, layer, cube_mm, step_mm)  # before any time is spent
    kind = kind_of(engine.task.kind)
    maps = kind.check_labels(labels or {}, engine.networks)
    if not maps:
        kind.note_missing(engine.networks, str(files[on]))
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
    and gradients voxel by voxel: needed where a head weighs places before it pools them, as tasks for a whole head do,
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
            the head, or of a segmentation ``decoder.0`` (coarsest) and on; by default ``encoder`` of a whole-head
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
    kind = kind_of(spec.kind)
    members = cast(Sequence[nn.Module], networks.networks if isinstance(networks, Engine) else networks)
    _check(members, spec, target, method, layer, cube_mm, step_mm)
    device = engine.device if engine else next(members[0].parameters()).device
    overlap = engine.overlap if engine else 0.5
    case = ExplainedCase(
        torch.as_tensor(image).float(), torch.as_tensor(present).bool(), spec, spacing_mm, device, overlap, labels
    )
    decisions = engine.decisions if engine else Decisions()
    answered = kind.explained(members, case, kind.class_index(spec, target), decisions)
    if method == "occlusion":
        raw = _occluded(answered, case, cube_mm, step_mm, progress)
        name = ""
    else:
        name = layer or kind.usual_layer(list(layers_of(members[0])))
        total = np.zeros(case.shape, dtype=np.float32)
        for number, member in enumerate(members):
            progress(number, len(members))
            total += answered.cam(member, name, method)
        raw = total / len(members)
        progress(len(members), len(members))
    if not np.isfinite(raw).all() or not np.isfinite(answered.answer):
        raise BundleError("the networks give values that are not finite for this case, so there is nothing to explain")
    heat, peak = _normalised(raw, signed=kind.signed)
    return Explanation(heat, peak, answered.name, answered.answer, method, name)


def _normalised(raw: np.ndarray, signed: bool) -> tuple[np.ndarray, float]:
    """(the map divided by its largest absolute value, that value); 0 stays 0 and, of a class, so does all below it."""
    kept = raw if signed else np.maximum(raw, 0)
    peak = float(np.abs(kept).max(initial=0.0))
    return (kept / peak if peak > 0 else np.zeros_like(kept)).astype(np.float32), peak


# ---- occlusion -------------------------------------------------------------------------------------------------------


def _occluded(
    answered: ExplainedAnswer,
    case: ExplainedCase,
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
        if head[x : stop[0], y : stop[1], z : stop[2]].any() and answered.places((x, y, z), stop):
            cubes.append(((x, y, z), stop))
    total, count = np.zeros(case.shape), np.zeros(case.shape)
    for number, (start, stop) in enumerate(cubes):
        progress(number, len(cubes))
        window = tuple(slice(a, b) for a, b in zip(start, stop))
        total[window] += answered.without(start, stop)
        count[window] += 1
    progress(len(cubes), len(cubes))
    return (total / np.maximum(count, 1)).astype(np.float32)


# ---- files and refusals ----------------------------------------------------------------------------------------------


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
    kind_of(spec.kind).class_index(spec, target)
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
    unseen = []
    if any(getattr(network, "asks_measurements", False) for network in networks):
        unseen.append("not the simple measurements that the answer is also made of")
    if reads.decoder is not None:
        unseen.append("not what the decoder sees")
    if method == "occlusion" and mapped:
        text = "occlusion covers the scans, not the label map: what its volumes add to the answer is not shown"
    elif method != "occlusion" and unseen:
        text = f"method={method} shows the encoder's maps, {' and '.join(unseen)}; method=occlusion shows both"
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
    return f"{how}{where}: {kind_of(spec.kind).about(spec, found.target, found.answer)}"
