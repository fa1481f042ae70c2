"""What a backbone file's own decoder says of one head in windows and in one pass: instance norm takes its mean and
deviation over whatever it is shown, so the two are not the same function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from foundation_people import box_around, sides
from torch import Tensor
from torch.nn import functional as F

from brainfm import seeds
from brainfm.data.regions import REGIONS, RENDERED_FAMILIES, TARGETS, renders_of, targets_of
from brainfm.errors import ScanError
from brainfm.files import write_whole
from brainfm.imaging import nifti
from brainfm.imaging.preprocess import prepare_session
from brainfm.nets.backbone_file import LoadedBackbone
from brainfm.scoring.masks import dice
from brainfm.specs import PreprocessSpec
from brainfm.synthesis.looks import draw_look
from brainfm.synthesis.render import paint
from brainfm.synthesis.settings import LookSpec
from brainfm.tasks.windows import gaussian_weight, window_slices

_MARGIN_VOX = 16  # around the brain
_OVERLAP = 0.5


def one_pass(loaded: LoadedBackbone, data: Path, out: Path, cached_only: bool = False) -> list[str]:
    """Lines of the report: a held whole head whose labels are known, rendered as a T1, and a held T1 of a patient.

    Args:
        cached_only: whether nothing is computed: what an earlier call has left, or nothing.
    """
    file = out / f"one_pass_{loaded.fingerprint[:8]}.json"
    if not file.exists():
        if cached_only:
            return []
        if loaded.decoder is None or "regions" not in loaded.heads:
            return ["### one_pass", "", "The file has no decoder with a head for regions: not asked.", ""]
        found = {name: compared(loaded, *make(data)) for name, make in HEADS.items()}
        write_whole(file, (json.dumps(found, indent=1) + "\n").encode())
    rows = json.loads(file.read_text())
    lines = ["### one_pass: a head at 1 mm in windows and in one pass", "",
             "Dice: mean over the region classes that occur. Cosine: of the decoder's features at a voxel of the "
             "brain, mean over voxels; centred: without the mean feature, which any two maps share.", "",
             "| head | windows and one pass, Dice | windows, Dice with the truth | one pass, Dice with the truth "
             "| cosine | centred cosine |", "|" + "---|" * 6]  # fmt: skip
    for name, row in rows.items():
        cells = [row["same"], row["windows"], row["whole"], row["cosine"], row["centred"]]
        lines.append(f"| {name} | " + " | ".join("" if v is None else f"{v:.3f}" for v in cells) + " |")
    return [*lines, ""]


def painted_head(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """The first held whole-head label map, cut to the brain, as a T1-like rendering, and its fine classes."""
    subject = min(who for (dataset, who), side in sides().items() if dataset == "synthseg_labels" and side == "held")
    labels, _ = nifti.read(data / "synthseg_labels" / f"{subject}.nii.gz", labels=True)
    targets = targets_of("synthseg_head")
    target = targets[np.where(labels.voxels < len(targets), labels.voxels, 0)]
    box = box_around(target > list(REGIONS).index("csf"), _MARGIN_VOX)
    tissue = torch.from_numpy(renders_of("synthseg_head")[labels.voxels[box]].astype(np.int64))
    rng, number = seeds.stream(0, "evidence one pass"), 0
    while (look := draw_look(rng, RENDERED_FAMILIES, LookSpec(free_share=0.0))).kind != "t1" and number < 100:
        number += 1
    image = paint(tissue, look, seeds.torch_stream(0, "evidence one pass")).numpy()
    inside = tissue.numpy() > 0
    return (image - image[inside].mean()) / image[inside].std(), target[box]


def patient_head(data: Path) -> tuple[np.ndarray, None]:
    """The T1 of the held open-MS patient at 1 mm, as preparing standardises it."""
    file = data / "openms_cross" / "patient19" / "patient19_T1w.nii.gz"
    found = prepare_session({"t1": file}, {}, PreprocessSpec())
    if "t1" not in found.scans:
        raise ScanError(f"{file}: {found.failures}")
    return found.scans["t1"], None


HEADS: dict[str, Callable[[Path], tuple[np.ndarray, np.ndarray | None]]] = {
    "synthseg_labels, held, rendered": painted_head, "openms_cross/patient19, T1": patient_head,
}  # fmt: skip


@torch.no_grad()
def compared(loaded: LoadedBackbone, image: np.ndarray, target: np.ndarray | None) -> dict[str, float | None]:
    """The decoder's features and the regions head of a scan, in windows of the file's patch and in one pass.

    Args:
        image: [X, Y, Z] standardised.
        target: [X, Y, Z] places in data/regions.TARGETS or -1, where they are known.

    Returns:
        ``same``: Dice between the answers, mean over the classes that either gives; ``windows``, ``whole``: Dice with
        the truth, or None; ``cosine``, ``centred``: of the features, mean over voxels of brain.
    """
    scan = torch.from_numpy(image.astype(np.float32))
    whole, windows = in_one_pass(loaded, scan), in_windows(loaded, scan)
    answers = {"whole": _classes(loaded, whole), "windows": _classes(loaded, windows)}
    names = loaded.heads["regions"].names
    brain = torch.from_numpy(answers["whole"] >= min(3, len(names) - 1))  # neither background, head nor outer fluid
    if target is not None:
        brain = torch.from_numpy(target > list(REGIONS).index("csf"))
    a, b = (features[:, brain] for features in (whole, windows))
    found: dict[str, float | None] = {
        "same": _mean_dice(answers["whole"], answers["windows"], range(1, len(names))),
        "windows": None, "whole": None,
        "cosine": _cosine(a, b), "centred": _cosine(a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)),
    }  # fmt: skip
    if target is not None:
        there = [k for k, name in enumerate(names) if k and name in TARGETS and (target == TARGETS.index(name)).any()]
        for how, answer in answers.items():
            each = [dice(answer == k, target == TARGETS.index(names[k])) for k in there]
            found[how] = float(np.mean(each)) if each else None
    return found


def in_one_pass(loaded: LoadedBackbone, scan: Tensor) -> Tensor:
    """[E, X, Y, Z] the decoder's map of a scan [X, Y, Z], padded to what the encoder takes."""
    stride = loaded.backbone.strides[-1]
    padding = [p for edge in reversed(scan.shape) for p in (0, -edge % stride)]
    padded = F.pad(scan[None, None], padding, value=float(scan.min()))
    dense = _dense(loaded, padded)[0]
    return dense[:, : scan.shape[0], : scan.shape[1], : scan.shape[2]]


def in_windows(loaded: LoadedBackbone, scan: Tensor) -> Tensor:
    """The same as the weighted mean over overlapping windows of the patch that the file was trained on."""
    patch = loaded.patch_vox
    grown = [max(edge, p) for edge, p in zip(scan.shape, patch)]
    padding = [p for edge, size in zip(reversed(scan.shape), reversed(grown)) for p in (0, size - edge)]
    padded, weight = F.pad(scan[None, None], padding, value=float(scan.min()))[0, 0], gaussian_weight(patch)
    assert loaded.decoder is not None
    total, mass = torch.zeros(sum(loaded.decoder.parts.values()), *grown), torch.zeros(grown)
    for window in window_slices(tuple(grown), patch, _OVERLAP):
        total[(slice(None), *window)] += weight * _dense(loaded, padded[window][None, None])[0]
        mass[window] += weight
    return (total / mass)[:, : scan.shape[0], : scan.shape[1], : scan.shape[2]]


def _dense(loaded: LoadedBackbone, image: Tensor) -> Tensor:
    assert loaded.decoder is not None
    dense: Tensor = loaded.decoder(loaded.backbone.features(image))
    return dense


def _classes(loaded: LoadedBackbone, dense: Tensor) -> np.ndarray:
    assert loaded.decoder is not None
    head = loaded.heads["regions"]
    part = loaded.decoder.split(dense[None])[head.part]
    return head(part)[0].argmax(dim=0).numpy().astype(np.uint8)


def _mean_dice(one: np.ndarray, other: np.ndarray, classes: range) -> float:
    """Over the classes that occur in either."""
    each = [dice(one == k, other == k) for k in classes if (one == k).any() or (other == k).any()]
    return float(np.mean(each)) if each else 1.0


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0).mean())
