"""Each term alone, and the checks of a trained dense_split, on cases whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from brainfm.batch import Batch
from brainfm.data.store import Store
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import save_backbone
from brainfm.objectives.dense_split import DenseSplit
from brainfm.objectives.objective import build_objective
from brainfm.specs import PreprocessSpec, Provenance

ROOT = Path(__file__).parents[1]
SMALL = ["--side-column", "", "--edge", "16", "--widths", "4", "8", "--questions", "3"]
KEYS = ["--keys", "data.validation=0.5", "data.split_seed=5", "objective.points=24"]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = util.spec_from_file_location("evidence_terms", ROOT / "scripts" / "evidence" / "terms.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["evidence_terms"] = module
    spec.loader.exec_module(module)
    return module


def call(script: Any, *words: Any) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["terms.py", *map(str, words)])
        return int(script.main())


def objective(points: int = 64) -> DenseSplit:
    torch.manual_seed(0)
    built = build_objective(
        "dense_split", build_backbone("unet_tiny"), patch_vox=(16, 16, 16), seed=0, points=points, mask_share=0.0
    )
    assert isinstance(built, DenseSplit)
    return built.eval()


def pair(corners: list[list[int]], voxel_mm: float, number: int = 3) -> Batch:
    rng = torch.Generator().manual_seed(number)
    image = torch.randn((1, 1, 16, 16, 16), generator=rng)
    return Batch(
        image=image, partner=image.clone(), sample=torch.tensor([number]), corners=torch.tensor([corners]),
        voxel_mm=torch.tensor([voxel_mm]), regions=torch.full((1, 16, 16, 16), -1),
    )  # fmt: skip


def test_codes_of_looks_tell_no_subject_and_codes_of_subjects_no_look(script: Any) -> None:
    rng = np.random.default_rng(0)
    looks = np.broadcast_to(rng.normal(size=(1, 5, 3)), (4, 5, 3))
    found = script.told_by(looks)
    assert found["look"] == 1.0 and found["subject"] == pytest.approx(1 / 4) == found["subject_chance"]
    subjects = np.broadcast_to(rng.normal(size=(4, 1, 3)), (4, 5, 3))
    found = script.told_by(subjects)
    assert found["subject"] == 1.0 and found["look"] == pytest.approx(1 / 5) == found["look_chance"]
    both = script.told_by(rng.normal(size=(12, 12, 3)))
    assert abs(both["subject"] - 1 / 12) < 0.06 and abs(both["look"] - 1 / 12) < 0.06


class Scaled(nn.Module):
    """A view is the anatomy times the code."""

    def forward(self, anatomy: Tensor, codes: Tensor) -> Tensor:
        return anatomy[:, :1] * codes[:, 0].view(-1, 1, 1, 1, 1)


def test_a_strangers_code_changes_as_much_as_it_differs(script: Any) -> None:
    anatomy = torch.randn(3, 4, 2, 6, 6, 6, generator=torch.Generator().manual_seed(0))
    anatomy = anatomy - anatomy.mean(dim=(3, 4, 5), keepdim=True)
    of_look = torch.tensor([1.0, 2.0, 1.0, 2.0]).view(1, 4, 1).expand(3, 4, 1)
    found = script.swapped(Scaled(), anatomy, of_look)
    assert found["same_look"] == 0.0
    assert found["other_look"] == pytest.approx((1 + 0.5) / 2, rel=0.01)  # 1 becomes 2, 2 becomes 1
    of_subject = torch.tensor([1.0, 1.1, 1.2]).view(3, 1, 1).expand(3, 4, 1)
    found = script.swapped(Scaled(), anatomy, of_subject)
    assert found["same_look"] == pytest.approx(found["other_look"]) and found["same_look"] > 0.05


def test_matching_on_constant_images(script: Any) -> None:
    """Where both views lie at one corner the padding tells every place; at corners of their own it does not."""
    network = objective()
    apart = [[[0, 4, 4], [4, 0, 0]], [[4, 0, 0], [0, 4, 4]], [[4, 4, 0], [0, 0, 4]]]
    shifted = [script.constant(pair(corners, 4.0, n)) for n, corners in enumerate(apart)]
    still = [script.constant(pair([[2, 2, 2], [2, 2, 2]], 4.0, n)) for n in range(3)]
    chance = np.mean([script.match_chance(network, batch) for batch in shifted])
    assert 1 / 64 <= chance < 0.05
    assert np.mean([script.match_right(network, batch) for batch in still]) > 0.5
    assert np.mean([script.match_right(network, batch) for batch in shifted]) < 0.25
    assert script.match_right(network, pair([[2, 2, 2], [2, 2, 2]], 4.0)) == 1.0  # one picture twice


def test_chance_is_one_in_the_answers_that_are_left(script: Any) -> None:
    network, batch = objective(points=30), pair([[0, 0, 0], [0, 0, 0]], 100.0)
    assert script.match_chance(network, batch) == pytest.approx(1 / 30, rel=0.1)  # some voxels are drawn twice
    labelled = dataclasses.replace(batch, regions=torch.zeros(1, 16, 16, 16, dtype=torch.int64))
    assert script.match_chance(network, labelled) == 1.0  # one label: no wrong answer is left


def test_scores(script: Any) -> None:
    wanted = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    assert script.relative_error(wanted.mean().expand(1, 1, 8, 8, 8), wanted) == pytest.approx(1.0)
    assert script.relative_error(wanted, wanted) == 0.0
    truth = np.random.default_rng(0).normal(size=(20, 3))
    flat = np.stack([2 * truth[:, 0] + 1, -truth[:, 1], np.ones(20)], axis=1)
    assert script.mean_r(truth, flat) == pytest.approx((1 - 1 + 0) / 3)
    mean = script.over_people([1.0, float("nan"), 3.0], ["a", "a", "b"])
    assert (mean["value"], mean["people"]) == (2.0, 2) and mean["low"] <= 2 <= mean["high"]


def test_tissues_are_sums_of_their_classes(script: Any) -> None:
    of_class, of_target = script.tissue_tables()
    names, targets = list(script.REGIONS), list(script.TARGETS)
    assert of_class[names.index("cuneus")] == of_class[names.index("thalamus")] == 2
    assert of_target[targets.index("any_white")] == 3 and of_target[targets.index("outside_or_csf")] == -1
    assert (of_target[: len(names)] == of_class).all() and set(of_class.tolist()) == {0, 1, 2, 3}

    class Torn:
        """Every voxel is one of two gyri with .3 each, or white with .4: grey matter, and white as a fine class."""

        def predict_regions(self, image: Tensor) -> Tensor:
            logits = torch.full((1, len(names), 4, 4, 4), -20.0)
            for name, p in (("cuneus", 0.3), ("lingual", 0.3), ("frontal_white", 0.4)):
                logits[:, names.index(name)] = float(np.log(p))
            return logits

    target = torch.full((1, 4, 4, 4), names.index("cuneus"))
    found = script.ask_regions(Torn(), [Batch(torch.zeros(1, 1, 4, 4, 4), torch.tensor([0]), regions=target)], ["p"])
    assert found["a"]["value"] == 0.0 and found["a_tissues"]["value"] == 1.0


def test_terms_are_trained_one_by_one_from_equal_weights_and_not_twice(
    script: Any, people_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["terms", "--store", people_store.path, "--out", tmp_path, *SMALL, "--steps", "2"]
    assert call(script, *words, *KEYS) == 0
    told = capsys.readouterr().out
    assert "(e) left out: no region volumes" in told and "| (a) regions | fine classes, Dice |" in told
    report = json.loads((tmp_path / "terms.json").read_text())
    assert set(report["terms"]) == {"a", "b", "c", "d"}
    first = (tmp_path / "terms.json").stat().st_mtime_ns
    assert call(script, *words, *KEYS) == 0 and (tmp_path / "terms.json").stat().st_mtime_ns == first
    assert call(script, *words, *KEYS, "--lr", "0.5") == 2
    assert "was made with" in capsys.readouterr().err
    world = script.World.open(type("Asked", (), {"store": people_store.path, "side_column": "", "keys": KEYS[1:]}))
    one, other = (world.objective((4, 8), 16, term, 0) for term in ("a", "d"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.weights["regions"] == 1.0 and sum(one.weights.values()) == 1.0


def test_checks_of_a_backbone_file(script: Any, people_store: Store, tmp_path: Path) -> None:
    world = script.World.open(type("Asked", (), {"store": people_store.path, "side_column": "", "keys": KEYS[1:]}))
    network, file = world.objective((4, 8), 16, None, 5), tmp_path / "b.safetensors"
    save_backbone(
        file, network.backbone, objective={"name": network.name, "config": network.config},
        objective_state=network.state_for_file(), preprocess=PreprocessSpec(), patch_vox=(16, 16, 16),
        provenance=Provenance("0", "", "", steps=7), decoder=network.dense, heads=network.heads,
    )  # fmt: skip
    rebuilt = script.objective_of(script.load_backbone(file), 16)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), rebuilt.parameters(), strict=True))
    words = ["checks", "--store", people_store.path, "--out", tmp_path, "--backbone", file, *SMALL]
    assert call(script, *words, "--subjects", "2", "--looks", "3", *KEYS) == 0
    report = json.loads((tmp_path / "checks.json").read_text())
    assert report["steps"] == 7 and report["trained"]["told"]["subject_chance"] == 0.5
    assert "| subject from the contrast code |" in (tmp_path / "checks.md").read_text()


def test_a_look_is_one_whatever_the_head(script: Any, people_store: Store) -> None:
    world = script.World.open(type("Asked", (), {"store": people_store.path, "side_column": "", "keys": KEYS[1:]}))
    network = world.objective((4, 8), 16, None, 0).eval()
    mapped = [s for s in world.held if s.key in world.targets.maps][:1]
    anatomy, codes = script.crossed(world, network, [*mapped, *mapped], 2, 0)
    assert anatomy.shape[:3] == (2, 2, 32) and codes.shape[:2] == (2, 2)
    with pytest.MonkeyPatch.context() as patch:  # the same head in the same window: only the look is left
        patch.setattr(script.World, "windows", _first_window(script.World.windows))
        anatomy, codes = script.crossed(world, network, [*mapped, *mapped], 2, 0)
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0, 0], codes[0, 1])


def _first_window(windows: Any) -> Any:
    class First:
        def __init__(self, patches: Any) -> None:
            self.patches = patches

        def __getitem__(self, _: int) -> Any:
            return self.patches[0]

    return lambda *words: First(windows(*words))
