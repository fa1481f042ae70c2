"""Every objective on another device than the host. The meta device computes no values, but it refuses any operation
that mixes devices and any question for a value, which on a GPU would make the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from brainfm.batch import ON_HOST, Batch
from brainfm.nets.backbone import build_backbone
from brainfm.objectives.objective import build_objective
from brainfm.objectives.settings import OBJECTIVES

PATCH = (16, 16, 16)


def _batch() -> Batch:
    return Batch(
        image=torch.randn(4, 1, *PATCH).half(),
        sample=torch.arange(4),
        partner=torch.randn(4, 1, *PATCH).half(),
        paired=torch.tensor([True, False, True, True]),
        same_contrast=torch.tensor([False, False, True, False]),
        interval_years=torch.zeros(4),
        subject=torch.arange(4),
        regions=torch.zeros(4, *PATCH, dtype=torch.int64),
        volumes=torch.zeros(4, 3),
        pathology=torch.zeros(4),
        lesion=torch.zeros(4, *PATCH, dtype=torch.int8),
        corners=torch.tensor([[[0, 2, 1], [1, 0, 1]]]).repeat(4, 1, 1),
        voxel_mm=torch.full((4,), 2.0),
        rendered=torch.zeros(4, 2, dtype=torch.bool),
        real=torch.ones(4, dtype=torch.bool),
        tissue_shares=torch.zeros(4, 5),
    )


def test_what_decides_about_the_work_stays_on_the_host() -> None:
    moved = _batch().to("meta")
    assert all(getattr(moved, name).device.type == "cpu" for name in ON_HOST)
    assert moved.image.device.type == "meta" and moved.image.dtype == torch.float32
    assert moved.subject.device.type == moved.lesion.device.type == "meta"


MORE: dict[str, dict[str, Any]] = {
    "anatomy_pathology": {"groups": 4, "volumes": 3, "agreement_weight": 0.1},
    "anatomy_pathology, mended": {
        "groups": 4, "volumes": 3, "agreement_weight": 0.1, "region_decoder": "skip", "regions_on": "visible",
        "centred": True,
    },
    "cross_contrast, mended": {"terms_on": "means", "centred": True, "logvar_start": -6.0},
}  # fmt: skip


@pytest.mark.parametrize("name", [*OBJECTIVES, *(n for n in MORE if "," in n)])
def test_no_value_is_asked_of_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    more = MORE.get(name, {})
    name = name.split(",")[0]
    if name == "dense_split":
        more = {"classes": ("a", "b", "c"), "merged": [[1, 2]], "volumes": 3, "stride": 2}
    elif name != "dino":
        more = more | {"latent_channels": 20}
    if name != "dino":
        more = more | {"mask_unit_vox": 4}
    objective = build_objective(name, build_backbone("unet_tiny"), patch_vox=PATCH, seed=0, **more)
    objective.to("meta")
    # generators do not exist there; where the noise lands is what matters
    real = torch.randn
    monkeypatch.setattr(
        "brainfm.nets.latents.torch.randn",
        lambda *shape, generator=None, device=None: real(*shape, device=device),
    )
    monkeypatch.setattr("brainfm.nets.latents.seeds.torch_stream", lambda *a, **k: None)
    terms = objective.train()(_batch().to("meta"), 0.5)
    assert terms.total.device.type == "meta"
    terms.total.backward()
