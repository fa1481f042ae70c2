"""The planner: what is given up, in which order, and that its predictions are those of the measured table."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from brainfm.errors import ConfigError
from brainfm.nets.backbone import BACKBONES, Backbone, build_backbone
from brainfm.training import memory
from brainfm.training.memory import MemoryPlan, MemoryTable, budget_gb, lower, patches_down, plan, settle
from brainfm.training.settings import TrainerSettings
from brainfm.verbs.compose import resolve

GB = 2**30


def meta(name: str, **settings: Any) -> Backbone:
    with torch.device("meta"):
        return build_backbone(name, **settings)


def gpu(memory_gb: float) -> TrainerSettings:
    return TrainerSettings(accelerator="gpu", precision="bf16-mixed", memory_gb=memory_gb)


def ask(name: str, edge: int, memory_gb: float, **changed: Any) -> MemoryPlan:
    asked: dict[str, Any] = {"contrasts": 1, "classes": 2, "patch_vox": (edge,) * 3, "batch_size": 2}
    kind = changed.pop("kind", "segmentation")
    return plan(meta(name), kind, **(asked | {"trainer": gpu(memory_gb)} | changed))


# A table with round numbers: a voxel of a sample takes 1000 bytes, half of that with recomputation.
ROUND = MemoryTable(
    {
        "excess": {},
        "many": {"gpu": 10.0},
        "rows": [
            {"backbone": "unet_tiny", "device": "gpu", "how": "cuda", "precision": "bf16-mixed", "kind": kind,
             "checkpointing": checkpointing, "encoder": 1, "level_weight": 1.0, "fixed": 0, "voxel": 0.0,
             "contrast": 500.0 if checkpointing else 1000.0, "class_": 0.0}
            for kind in ("segmentation", "scan") for checkpointing in (False, True)
        ],
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("share", "expected"),  # of what four samples of 64 voxels take
    [
        (1.01, ((64, 64, 64), 1, False)),
        (0.51, ((64, 64, 64), 1, True)),
        (0.26, ((64, 64, 64), 2, True)),
        (0.13, ((64, 64, 64), 4, True)),
        (0.12, ((60, 60, 60), 4, True)),
        (0.02, ((32, 32, 32), 4, True)),
    ],
)
def test_gives_up_recomputation_then_parts_then_the_patch(share: float, expected: tuple) -> None:
    whole = 4 * 64**3 * 1000 / GB
    found = ask("unet_tiny", 64, (share * whole + 0.6) / 0.9, batch_size=4, table=ROUND)
    assert (found.patch_vox, found.accumulate, found.checkpointing) == expected
    assert found.batch_size == 4  # the optimiser's step sees as many samples as asked, always
    assert found.predicted_gb <= found.budget_gb + 0.01
    assert len(found.notes) == 1 + found.checkpointing + (found.accumulate > 1) + (found.patch_vox != (64, 64, 64))


def test_refuses_below_the_floor_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"unet_tiny needs for one patch of 32x32x32 voxels with recomputation"):
        ask("unet_tiny", 64, 0.6 / 0.9, batch_size=4, table=ROUND)


def test_many_classes_count() -> None:
    few, many = (ask("unet_tiny", 64, 80, classes=k, table=ROUND).predicted_gb for k in (8, 108))
    assert many - few == pytest.approx(2 * 64**3 * 100 * 10 / GB, abs=0.011)
    assert all(value > 10 for value in MemoryTable.shipped().many.values())


@pytest.mark.parametrize("contrasts", [1, 4])
@pytest.mark.parametrize("views", [1, 3])
def test_the_prediction_is_the_table_s(contrasts: int, views: int) -> None:
    found = ask("unet_tiny", 64, 80, contrasts=contrasts, views=views, kind="regression", table=ROUND)
    assert found.predicted_gb == pytest.approx(2 * views * contrasts * 64**3 * 1000 / GB, abs=0.006)


def test_the_promise_unet_b_at_96_in_8_gb_and_resenc_l_at_128_in_16_gb() -> None:
    """With one contrast and with four, two samples a step, the patch whole."""
    for contrasts in (1, 4):
        small, large = ask("unet_b", 96, 8, contrasts=contrasts), ask("resenc_l", 128, 16, contrasts=contrasts)
        assert small.patch_vox == (96, 96, 96) and large.patch_vox == (128, 128, 128)
        assert 0 < small.predicted_gb <= small.budget_gb < 8 and 0 < large.predicted_gb <= large.budget_gb < 16


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 80])
def test_one_trainer_serves_every_card(gigabytes: int) -> None:
    words = ["store=s", "run=r", "backbone_from=none", "task.target=lesion"]
    trainer = resolve("finetune", [*words, "trainer=gpu", f"trainer.memory_gb={gigabytes}"]).trainer
    with pytest.raises(ConfigError, match=f"expected trainer=gpu trainer.memory_gb={gigabytes}"):
        resolve("finetune", [*words, f"trainer=gpu{gigabytes}"])
    found = plan(
        meta("resenc_l"), "segmentation", contrasts=4, classes=2, patch_vox=(128,) * 3, batch_size=2, trainer=trainer
    )
    assert found.precision == "bf16-mixed" and found.budget_gb < gigabytes


def test_more_memory_never_gives_less() -> None:
    found = [ask("resenc_l", 160, gigabytes, contrasts=4) for gigabytes in (12, 16, 24, 80)]
    worth = [(math.prod(p.patch_vox), -p.accumulate, -p.checkpointing) for p in found]
    assert worth == sorted(worth) and worth[0] < worth[-1]


MEASURED = sorted(name for name in BACKBONES if name.split("_")[0] in ("unet", "resenc"))


def test_a_family_that_was_not_measured_is_said_to_be_so() -> None:
    spec = TrainerSettings(accelerator="cpu", precision="32-true", memory_gb=4.0)
    made = plan(
        meta("vit_s"), "segmentation", contrasts=1, classes=2, patch_vox=(96, 96, 96), batch_size=2, trainer=spec
    )
    assert made.patch_vox == (96, 96, 96) and "nothing was measured for backbone vit_s" in " ".join(made.notes)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_every_backbone_has_a_prediction_that_grows(name: str, device: str) -> None:
    settings = {"unet": {"widths": [16, 32, 64]}, "resenc": {"widths": [16, 32], "depths": [1, 2]}}.get(name, {})
    table = MemoryTable.shipped()
    precision = "bf16-mixed" if device == "gpu" else "32-true"

    def peak(**changed: Any) -> float:
        asked: dict[str, Any] = {"checkpointing": False, "contrasts": 1, "classes": 2, "voxels": 96**3}
        return table.peak(
            meta(name, **settings), "segmentation", device=device, precision=precision, **(asked | changed)
        )[0]

    assert 0 < peak(checkpointing=True) < peak() < peak(contrasts=2) < peak(contrasts=2, voxels=128**3)
    weights = 16 * sum(p.numel() for p in meta(name, **settings).parameters())
    assert peak() > weights  # weights, two moments and the average, at least


def test_widths_that_were_not_measured_are_scaled_and_it_says_so() -> None:
    asked: dict[str, Any] = {"contrasts": 1, "classes": 2, "patch_vox": (96,) * 3, "batch_size": 2, "trainer": gpu(8)}
    free = plan(meta("unet", widths=[32, 64, 128, 256, 512]), "segmentation", **asked)
    own = plan(meta("unet_b"), "segmentation", **asked)
    assert "scaled from unet_b" in free.notes[0] and "scaled" not in own.notes[0]
    assert free.predicted_gb == pytest.approx(own.predicted_gb, rel=0.02)
    half = plan(meta("unet", widths=[16, 32, 64, 128, 256]), "segmentation", **asked)
    assert 0.3 < half.predicted_gb / own.predicted_gb < 0.6


def test_an_unknown_family_is_planned_as_asked_with_a_note() -> None:
    net = meta("unet_tiny")
    net.config = {"name": "vit_x"}
    found = plan(
        net, "segmentation", contrasts=1, classes=2, patch_vox=(16, 16, 16), batch_size=2, trainer=gpu(8), table=ROUND
    )
    assert found.accumulate == 1 and "nothing was measured for backbone vit_x" in found.notes[0]


def test_the_table_says_how_it_was_measured_and_its_rows_hold_at_points_they_were_not_fitted_to() -> None:
    content = json.loads(memory.TABLE.read_text())
    assert {"device", "torch", "batch"} <= set(content["about"])
    assert content["rss"] and all(point["rss"] > 0 for point in content["rss"])
    assert content["excess"]["cpu"] == pytest.approx(max(p["rss"] / p["trace"] for p in content["rss"]), abs=1e-3)
    for row in content["rows"]:
        assert row["how"] in ("trace", "cuda"), row
        assert 0.9 < row["check"] < 1.1, row
    names = {row["backbone"] for row in content["rows"] if row["device"] == "gpu"}
    assert {"unet_b", "unet_l", "unet_tiny", "resenc_s", "resenc_l"} <= names


def test_the_budget_of_this_machine() -> None:
    free = memory.free_ram_bytes() / GB
    assert 0 < budget_gb("cpu", None) < free * 1.05
    assert budget_gb("cpu", 10) == 8.0 and budget_gb("gpu", 8) == 6.6
    for wrong in (0, -1, True, math.inf):
        with pytest.raises(ConfigError, match=r"trainer\.memory_gb"):
            budget_gb("cpu", wrong)


def test_a_plan_survives_json() -> None:
    made = ask("unet_tiny", 64, 2, batch_size=4, table=ROUND)
    assert MemoryPlan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert dataclasses.replace(made, batch_size=5, accumulate=2).micro_batch == 3


def test_settle_goes_down_until_the_step_passes() -> None:
    start = ask("unet_tiny", 64, 80, batch_size=3, table=ROUND)
    tried: list[MemoryPlan] = []

    def step(made: MemoryPlan) -> None:
        tried.append(made)
        if math.prod(made.patch_vox) * made.micro_batch * (1 if made.checkpointing else 2) > 50**3:
            raise torch.OutOfMemoryError("full")

    found = settle(step, start, stride=4)
    assert [(p.patch_vox[0], p.accumulate, p.checkpointing) for p in tried] == [
        (64, 1, False), (64, 1, True), (64, 2, True), (64, 3, True), (60, 3, True), (56, 3, True), (52, 3, True),
        (48, 3, True),
    ]  # fmt: skip
    assert found is tried[-1] and len(found.notes) == len(start.notes) + 7

    def never(made: MemoryPlan) -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(ConfigError, match="32x32x32"):
        settle(never, start, stride=4)
    assert lower(dataclasses.replace(found, patch_vox=(32, 32, 32)), 4) is None


def test_patches_go_down_by_strides_and_keep_their_shape() -> None:
    assert patches_down((96, 96, 96), 32) == [(96, 96, 96), (64, 64, 64)]
    assert patches_down((64, 96, 48), 16) == [(64, 96, 48), (64, 80, 48), (64, 64, 48), (48, 48, 48), (32, 32, 32)]
    assert patches_down((16, 16, 16), 4) == [(16, 16, 16)]
    assert patches_down((128, 128, 32), 32)[-1] == (64, 64, 32)
