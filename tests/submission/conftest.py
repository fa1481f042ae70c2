"""Tiny bundles, a tiny backbone and staged submissions, with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from brainfm.imaging.descriptors import content_names
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import save_backbone
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.submission.challenge import ChallengeTask, read_challenge
from brainfm.submission.container import stage
from brainfm.tasks.bundle import write_bundle
from brainfm.tasks.segmentation.network import SegmentationTask
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.tasks.whole_head.reads import PARTS, Reads

SPACING = PreprocessSpec(spacing_mm=(6.0, 6.0, 6.0))


def bundle_for(task: ChallengeTask, path: Path, measured: bool = False) -> Path:
    """A bundle that answers a task's question, wrongly. ``measured``: from simple measurements of the scans alone."""
    contrasts = tuple(one.contrast for one in task.inputs)
    torch.manual_seed(0)
    backbone, reads = build_backbone("unet_tiny"), None
    if task.kind == "segmentation":
        spec = TaskSpec("segmentation", task.target, contrasts, tuple(range(int(task.high) + 1)), (16, 16, 16))
        network = SegmentationTask(spec, backbone)
        torch.nn.init.zeros_(network.decoder.out.bias)  # else a fresh network says background everywhere
    else:
        values = ("0", "1") if task.kind == "classification" else ()
        mode = "exclusive" if values else ""
        spec = TaskSpec(task.kind, task.target, contrasts, values, (16, 16, 16), mode=mode, view_mm=6.0)
        reads = Reads(measurements=content_names(contrasts)) if measured else None
        network = WholeHeadTask(spec, backbone, reads=reads)
        torch.nn.init.normal_(network.out.weight, std=0.1)
        if network.measure_head is not None:
            torch.nn.init.normal_(network.measure_head.out.weight, std=1e-3)
            network.mix.copy_(torch.tensor([float(part == "measurements") for part in PARTS]))
    decisions = Decisions(bias=(-50.0, 1.0)) if task.kind == "regression" else None  # an age and not about 0
    write_bundle(
        path, task=spec, backbone_config={"name": "unet_tiny"}, members=[network.state_dict()], preprocess=SPACING,
        provenance=Provenance("0", "", ""), decisions=decisions, reads=None if reads is None else reads.to_dict(),
    )  # fmt: skip
    return path


def backbone_file(path: Path) -> Path:
    torch.manual_seed(0)
    save_backbone(
        path, build_backbone("unet_tiny"), objective={"name": "toy", "config": {}}, objective_state={},
        preprocess=SPACING, patch_vox=(16, 16, 16), provenance=Provenance("0", "", ""),
    )  # fmt: skip
    return path


def staged(task: ChallengeTask, folder: Path) -> Path:
    """``app/`` of a task in a folder."""
    made = backbone_file(folder / "b.safetensors") if task.kind == "embedding" else bundle_for(task, folder / "bundle")
    return stage(task, made, folder / "app")


_STAGED: dict[str, Path] = {}


@pytest.fixture
def app_of(tmp_path_factory):
    """(challenge, task) -> its staged folder, made once a session and never written to."""

    def of(challenge: str, name: str) -> Path:
        task = read_challenge(challenge).task(name)
        if task.id not in _STAGED:
            _STAGED[task.id] = staged(task, tmp_path_factory.mktemp(task.id))
        return _STAGED[task.id]

    return of
