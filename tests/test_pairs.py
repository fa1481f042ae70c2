"""Every objective with every family of backbones: a step, bfloat16, a file and back, both tasks, a bundle, features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, save_backbone
from brainfm.objectives.objective import Objective, build_objective
from brainfm.objectives.settings import OBJECTIVES
from brainfm.probing.features import WHOLE_HEADS, Encoder, pool
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import read_bundle, write_bundle
from brainfm.tasks.explained import ExplainedCase
from brainfm.tasks.registry import build_task
from brainfm.tasks.whole_head.explain import ExplainedHead

PATCH = (16, 16, 16)
BACKBONES: dict[str, dict[str, Any]] = {
    "unet": {"name": "unet_tiny"},
    "resenc": {"name": "resenc", "widths": [4, 8, 12], "depths": [1, 1, 1]},
    "vit": {"name": "vit", "width": 24, "depth": 2, "heads": 2, "patch_vox": 4, "grid_vox": [16, 16, 16], "taps": 2,
            "registers": 1, "layer_scale": 0.1, "drop_path": 0.1},
    "vit, rotary": {"name": "vit", "width": 24, "depth": 1, "heads": 2, "patch_vox": 8, "positions": "rotary"},
    "primus": {"name": "primus", "width": 24, "depth": 1, "heads": 2, "patch_vox": 8, "grid_vox": [16, 16, 16]},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {
    "mae": {"latent_channels": 12, "mask_unit_vox": 8},
    "cross_contrast": {"latent_channels": 20, "mask_unit_vox": 8},
    "anatomy_pathology": {"latent_channels": 20, "mask_unit_vox": 8, "groups": 4, "volumes": 3},
    "contrastive": {"latent_channels": 12, "hidden_channels": 12, "projected_channels": 8, "queue": 4},
    "mae+contrastive": {"latent_channels": 12, "hidden_channels": 12, "projected_channels": 8, "queue": 4},
    "dense_split": {"classes": ("a", "b", "c"), "merged": [[1, 2]], "volumes": 3, "stride": 2, "points": 16},
    "dino": {"prototypes": 32, "hidden_channels": 16, "bottleneck": 8, "local_crops": 2},
}
SEGMENTATION = TaskSpec("segmentation", "lesion", ("t1",), (0, 1), PATCH)
WHOLE_HEAD = TaskSpec("classification", "ill", ("t1",), ("no", "yes"), PATCH, mode="exclusive", view_mm=4.0)


def batch() -> Batch:
    torch.manual_seed(1)
    return Batch(
        image=torch.randn(2, 1, *PATCH),
        sample=torch.arange(2),
        partner=torch.randn(2, 1, *PATCH),
        paired=torch.tensor([True, False]),
        same_contrast=torch.tensor([False, False]),
        interval_years=torch.zeros(2),
        subject=torch.arange(2),
        regions=torch.randint(0, 3, (2, *PATCH)),
        volumes=torch.randn(2, 3),
        pathology=torch.tensor([0.0, 1.0]),
        lesion=torch.zeros(2, *PATCH, dtype=torch.int8),
        corners=torch.tensor([[[0, 2, 1], [1, 0, 1]]]).repeat(2, 1, 1),
        voxel_mm=torch.full((2,), 2.0),
        rendered=torch.zeros(2, 2, dtype=torch.bool),
        real=torch.ones(2, dtype=torch.bool),
        tissue_shares=torch.rand(2, 5),
    )


def pair(objective: str, backbone: str) -> Objective:
    torch.manual_seed(0)
    return build_objective(
        objective, build_backbone(**BACKBONES[backbone]), patch_vox=PATCH, seed=0, **SIZES[objective]
    )


def stepped(objective: Objective, half: bool) -> float:
    """The loss of one step of the optimiser."""
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        total = objective.train()(batch(), 0.5).total
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())
    silent = [name for name, p in objective.backbone.named_parameters() if p.grad is None]
    assert not silent, silent
    optimizer.step()
    objective.after_step(0.5)
    return float(total.detach())


def saved(objective: Objective, path: Path) -> LoadedBackbone:
    save_backbone(
        path, objective.backbone, objective={"name": objective.name, "config": objective.config},
        objective_state=objective.state_for_file(), preprocess=PreprocessSpec(), patch_vox=PATCH,
        provenance=Provenance("0", "", ""), decoder=objective.dense, heads=objective.heads,
    )  # fmt: skip
    return load_backbone(path)


def tuned_and_asked(backbone: Backbone, spec: TaskSpec, folder: Path) -> None:
    """A step of the task, a bundle and back, and the same answer from both."""
    task = build_task(spec, backbone)
    image = batch().image[:, None] if spec.view_mm else batch().image
    asked = Batch(image, torch.arange(2), label=torch.randint(0, 2, (2, *PATCH)), answer=torch.tensor([[0.0], [1.0]]))
    optimizer = torch.optim.AdamW(task.parameters(), 1e-3)
    task.loss(task.train()(image), asked).total.backward()
    optimizer.step()
    write_bundle(
        folder, task=spec, backbone_config=backbone.config, members=[task.bundle_state()], preprocess=PreprocessSpec(),
        provenance=Provenance("0", "", ""),
    )  # fmt: skip
    network = read_bundle(folder).networks[0]
    with torch.no_grad():
        one, other = (each.decode(each(image)) for each in (task.eval(), network))
    assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize("backbone", list(BACKBONES))
@pytest.mark.parametrize("objective", list(SIZES))
def test_a_pair_goes_all_the_way(objective: str, backbone: str, tmp_path: Path) -> None:
    trained = pair(objective, backbone)
    whole, half = stepped(trained, half=False), stepped(pair(objective, backbone), half=True)
    assert half == pytest.approx(whole, rel=0.05, abs=0.05)
    loaded = saved(trained, tmp_path / "backbone.safetensors")
    for name, value in trained.backbone.state_dict().items():
        assert torch.equal(loaded.backbone.state_dict()[name], value)
    tuned_and_asked(loaded.backbone, SEGMENTATION, tmp_path / "segmentation")
    usual = loaded.backbone.usual_pooling
    for pooling in {usual, "mean"}:
        spec = TaskSpec(**{**WHOLE_HEAD.__dict__, "pooling": pooling})
        tuned_and_asked(load_backbone(tmp_path / "backbone.safetensors").backbone, spec, tmp_path / pooling)
    encoder = Encoder.load(tmp_path / "backbone.safetensors")
    points = np.argwhere(np.ones(PATCH))[::7]
    found = pool(encoder, batch().image[0, 0].numpy(), points, WHOLE_HEADS)
    assert ("token" in found) == backbone.startswith("vit") and all(np.isfinite(v).all() for v in found.values())


@pytest.mark.parametrize(
    ("objective", "backbone", "more", "sentence"),
    [
        ("mae", "primus", {"mask_unit_vox": 4}, "primus leaves out whole cubes of 8 voxels.*expected a multiple of 8"),
        ("dino", "primus", {"global_vox": (12, 12, 12)}, "primus needs three multiples of 8 voxels"),
        ("dino", "primus", {"local_vox": (8, 8, 8)}, "at least one of them 16 or more"),
    ],
)
def test_pairs_without_sense_are_refused(objective: str, backbone: str, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_objective(
            objective, build_backbone(**BACKBONES[backbone]), patch_vox=PATCH, seed=0, **SIZES[objective] | more
        )


def test_a_batch_of_one_is_spread_from_nobody() -> None:
    alone = Batch(batch().image[:1], torch.arange(1))
    with pytest.raises(ConfigError, match=r"found one; expected trainer\.batch_size=2 or more"):
        pair("dino", "vit")(alone, 0.5)


def test_what_only_some_networks_have_is_refused_of_the_others() -> None:
    spec = TaskSpec(**{**WHOLE_HEAD.__dict__, "pooling": "token"})
    for name in ("unet", "resenc", "primus"):
        with pytest.raises(ConfigError, match="has no class token; expected attention or mean"):
            build_task(spec, build_backbone(**BACKBONES[name]))
    task = build_task(spec, build_backbone(**BACKBONES["vit"]))
    shown, mm = torch.ones(1, dtype=torch.bool), (8.0, 8.0, 8.0)
    case = ExplainedCase(torch.randn(1, 8, 8, 8), shown, spec, mm, torch.device("cpu"), 0.5)
    with pytest.raises(ConfigError, match="from a class token, which no map leads to"):
        ExplainedHead([task], case, 0, Decisions()).cam(task, "encoder", "hirescam")


def test_all_objectives_are_here() -> None:
    assert set(SIZES) == set(OBJECTIVES)
