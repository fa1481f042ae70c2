"""What every level is asked: linear Dice and rank where the answer is known, unseen maps, few shots, and in a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brainfm.curves import read_curves
from brainfm.data import regions
from brainfm.data.schemes import GROUPS, TISSUES
from brainfm.data.settings import TargetSpec
from brainfm.data.store import Store
from brainfm.data.targets import Targets, find_targets
from brainfm.errors import BrainfmWarning, ConfigError, TrainingError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.decoders import DenseDecoder
from brainfm.probing import levels as lp
from brainfm.probing.settings import OnlineProbeSpec
from brainfm.training.guards import Guards
from brainfm.training.pretrain import pretrain, split_sessions
from brainfm.training.settings import GuardSpec
from brainfm.verbs.compose import resolve
from tests.training.test_pretrain import config, words

CPU = torch.device("cpu")
EDGE, K = 32, 4


def head(number: int, whole: int = EDGE) -> lp.Crop:
    """Nested boxes of other sizes in each head; the image shows nothing of them."""
    rng = np.random.default_rng(number)
    truth = torch.zeros(whole, whole, whole, dtype=torch.int64)
    for value, edge in zip((1, 2, 3), (3 * whole // 4, whole // 2, whole // 4)):
        low = (whole - edge) // 2 + int(rng.integers(-whole // 16, whole // 16 + 1))
        truth[low : low + edge, low : low + edge, low : low + edge] = value
    return lp.Crop(number, False, truth[None, None].float(), truth.numpy(), truth)


CROPS = [head(number) for number in range(4)]
SMALL = [head(number, 16) for number in range(4)]


def constructed(image: Tensor) -> dict[str, Tensor]:
    """Of an image that is its own truth: level 0 holds the answer in a rotated basis, level 1 is constant, level 2
    holds it on voxels of 4."""
    answer = F.one_hot(image[:, 0].long(), K).movedim(-1, 1).float()
    turn = torch.linalg.qr(torch.randn(K, K, generator=torch.Generator().manual_seed(0)))[0]
    return {
        "level0": torch.einsum("ij,bjxyz->bixyz", turn, answer) + 3,
        "level1": torch.full((1, 8, EDGE // 2, EDGE // 2, EDGE // 2), 7.0),
        "level2": F.avg_pool3d(answer, 4),
    }


# ----------------------------------------------------------------------------------------------- answers that are known


def test_dice_and_rank_are_high_where_the_answer_is_and_zero_where_nothing_is() -> None:
    dice = lp.linear_dice(constructed, CROPS, K, 2, CPU)
    assert dice["level0"] > 0.999 and dice["level1"] == 0.0
    assert 0.6 < dice["level2"] < 0.98  # coarse voxels, read between them
    ranks = lp.level_ranks(constructed, CROPS, CPU)
    assert ranks["level1"] == 0.0 and 2 < ranks["level0"] <= 3  # four classes about their mean: three directions


def test_noise_knows_nothing() -> None:
    def noise(image: Tensor) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(int(image.sum()))
        return {"level0": torch.randn(1, 16, EDGE, EDGE, EDGE, generator=generator)}

    assert lp.linear_dice(noise, CROPS, K, 2, CPU)["level0"] < 0.2
    assert lp.level_ranks(noise, CROPS, CPU)["level0"] > 15.9


def test_the_tested_heads_do_not_teach() -> None:
    """A map that is right on the fitted heads and shuffled on the others is worth nothing."""

    def shifted(image: Tensor) -> dict[str, Tensor]:
        unseen = any(torch.equal(image, crop.image) for crop in CROPS[2:])
        return {"level0": F.one_hot((image[:, 0].long() + unseen) % K, K).movedim(-1, 1).float()}

    assert lp.linear_dice(shifted, CROPS, K, 2, CPU)["level0"] < 0.05


def test_linear_model_against_the_textbook() -> None:
    """Two Gaussian classes of one covariance: the direction is that of Fisher, the border lies where priors put it."""
    generator = torch.Generator().manual_seed(1)
    mixing, apart = torch.randn(3, 3, generator=generator), torch.tensor([1.0, -2.0, 0.5])
    x = torch.randn(20_000, 3, generator=generator) @ mixing.t()
    y = (torch.arange(20_000) % 2).long()
    x += y[:, None] * apart
    weight, bias = lp.fit_linear(x, y, torch.tensor([0.9, 0.1]))
    found = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
    fisher = torch.linalg.solve((mixing @ mixing.t()).double(), apart.double())
    assert float(found @ (fisher / fisher.norm())) > 0.99
    middle = (x[y == 0].mean(0) + x[y == 1].mean(0)).double() / 2
    assert float((weight @ middle + bias).diff()) == pytest.approx(0.5 * math.log(0.1 / 0.9), abs=0.02)


def test_a_class_without_rows_is_never_answered() -> None:
    weight, bias = lp.fit_linear(torch.randn(50, 3), torch.arange(50) % 2, torch.tensor([0.5, 0.3, 0.2]))
    assert int((torch.randn(100, 3).double() @ weight.t() + bias).argmax(dim=1).max()) <= 1


def test_features_are_read_between_coarse_voxels_as_they_are_upsampled() -> None:
    values = torch.randn(1, 5, 4, 3, 2, generator=torch.Generator().manual_seed(0))
    size = (16, 12, 8)
    whole = F.interpolate(values, size, mode="trilinear", align_corners=False)[0]
    points = torch.tensor([[0, 0, 0], [15, 11, 7], [7, 2, 5], [9, 6, 1]])
    expected = whole[:, points[:, 0], points[:, 1], points[:, 2]].t()
    assert torch.allclose(lp.read_at(values, points, size), expected, atol=1e-5)


def test_overlap_against_a_naive_loop() -> None:
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, K, (2, 6, 6, 6)), rng.integers(-1, K - 1, (2, 6, 6, 6))
    overlap = lp.GroupOverlap(K)
    for p, t in zip(predicted, truth):
        overlap.add(torch.from_numpy(p), torch.from_numpy(t))
    known = truth >= 0
    dice = []
    for value in (1, 2):  # 3 does not occur
        a, b = (predicted == value) & known, (truth == value) & known
        dice.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert overlap.mean() == pytest.approx(np.mean(dice))
    assert math.isnan(lp.GroupOverlap(K).mean())


def test_rank_of_known_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(400, 4, generator=generator) - 0.0)[0]
    basis = torch.linalg.qr(basis - basis.mean(0))[0]
    even, line = basis @ torch.eye(4), basis[:, :1] @ torch.ones(1, 4)
    assert lp.spatial_rank(even + 100) == pytest.approx(4, abs=1e-3)  # a common offset is no direction
    assert lp.spatial_rank(line) == pytest.approx(1, abs=1e-6)
    shares = torch.tensor([9.0, 1.0]) / 10
    two = basis[:, :2] * torch.tensor([3.0, 1.0])
    assert lp.spatial_rank(two) == pytest.approx(float((-(shares * shares.log()).sum()).exp()), abs=1e-4)
    assert lp.spatial_rank(torch.full((50, 4), 3.3)) == 0.0


# ---------------------------------------------------------------------------------------------------- the real networks


def test_levels_and_decoder_have_names_and_places() -> None:
    backbone = build_backbone("unet_tiny")
    dense = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 5, "free": 2})
    maps = lp.level_maps(backbone, dense)(torch.randn(1, 1, 32, 32, 32))
    deepest = len(backbone.widths) - 1
    for level, (width, stride) in enumerate(zip(backbone.widths, backbone.strides)):
        for name in (f"level{level}", *([f"decoder{level}"] if level < deepest else [])):
            assert maps[name].shape == (1, width, *[32 // stride] * 3)
    assert maps["dense"].shape == (1, 7, 32, 32, 32) and len(maps) == 2 * deepest + 2


def test_fresh_networks_are_fixed_and_leave_the_ambient_stream_alone() -> None:
    backbone = build_backbone("unet_tiny")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, _ = lp.fresh_networks(backbone, None)
    other, _ = lp.fresh_networks(backbone, None)
    assert torch.equal(torch.rand(1), expected)
    for mine, its, old in zip(one.parameters(), other.parameters(), backbone.parameters()):
        assert torch.equal(mine, its) and (mine.ndim == 1 or not torch.equal(mine, old))


def test_few_shots_learn_and_leave_the_network_as_it_was() -> None:
    backbone = build_backbone("unet_tiny")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    untaught, taught = (lp.few_shot_dice(backbone, None, SMALL, K, 2, steps) for steps in (0, 40))
    assert torch.equal(torch.rand(1), expected)
    assert taught > 0.6 > 0.4 > untaught > 0.2  # at first a linear model of fresh features
    assert taught == lp.few_shot_dice(backbone, None, SMALL, K, 2, 40)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_few_shots_begin_at_a_dense_decoder() -> None:
    backbone = build_backbone("unet_tiny")
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        dense = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 5})
        scores.append(lp.few_shot_dice(backbone, dense, SMALL, K, 2, 3))
    assert scores[0] != scores[1]


# ---------------------------------------------------------------------------------------------------------- unseen maps


def labelled(ids: list[int], scheme: str) -> lp.Crop:
    labels = np.array(ids).reshape(1, 1, -1)
    return lp.Crop(0, False, torch.zeros(1, 1, 1, 1, len(ids)), labels, None, scheme)


def answering(*names: str):
    """Says these classes, voxel by voxel."""
    classes = list(regions.REGIONS)
    said = torch.tensor([classes.index(name) for name in names])
    return (lambda image: F.one_hot(said, len(classes)).t()[None, :, None, None]), classes


def test_map_dice_counts_merged_labels_as_met_by_any_member() -> None:
    # synthseg: 3 any_cortex (no gyrus is told without parcellation ids being there? 1028 is), 17 hippocampus, 0 outside
    predict, names = answering("hippocampus", "hippocampus", "insula", "thalamus", "background")
    found = lp.map_dice(predict, names, [labelled([17, 10, 10, 10, 0], "synthseg")], False, CPU)
    assert found == pytest.approx((2 * 1 / 3 + 2 * 1 / 4) / 2)  # hippocampus, thalamus; outside does not count
    # the tissue scheme tells no grey class apart: any of them is right
    predict, names = answering("insula", "thalamus", "frontal_white", "csf")
    assert lp.map_dice(predict, names, [labelled([2, 2, 3, 1], "tissue")], False, CPU) == 1.0
    predict, names = answering("insula", "frontal_white", "frontal_white", "csf")
    assert lp.map_dice(predict, names, [labelled([2, 2, 3, 1], "tissue")], False, CPU) < 1.0


def test_map_dice_blames_no_member_for_a_merged_voxel() -> None:
    """synthseg's cortex (3) beside a gyrus (1028): a voxel of cortex is neither right nor wrong for the gyrus."""
    predict, names = answering("superior_frontal", "superior_frontal", "hippocampus")
    assert lp.map_dice(predict, names, [labelled([1028, 3, 17], "synthseg")], False, CPU) == 1.0
    predict, names = answering("superior_frontal", "superior_frontal", "hippocampus")
    worse = lp.map_dice(predict, names, [labelled([1028, 10, 17], "synthseg")], False, CPU)
    assert worse == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert math.isnan(lp.map_dice(predict, names, [labelled([0, 0, 0], "synthseg")], False, CPU))
    assert math.isnan(lp.map_dice(predict, names, [labelled([17, 17, 17], "synthseg")], True, CPU))  # no whole head


# ------------------------------------------------------------------------------------------------------------ the heads


def maps_of(store: Store) -> Targets:
    return find_targets(store, TargetSpec(), {s.subject_key for s in store.sessions}, pathology=False)


def test_heads_are_held_out_labelled_and_fixed(people_store: Store) -> None:
    targets = maps_of(people_store)
    assert targets.groups == TISSUES != GROUPS
    heads = lp.choose_heads(people_store.sessions, targets)
    assert {s.subject_key for s, _ in heads} == {f"d/p{n}" for n in range(4)}
    assert {scan.contrast for _, scan in heads} == {"t1"}
    assert lp.choose_heads(people_store.sessions[::-1], targets) == heads
    fewer = [s for s in people_store.sessions if s.subject_key != heads[0][0].subject_key]
    assert lp.choose_heads(fewer, targets) == heads[1:]
    # without two maps everybody may be looked at, for the ranks
    assert len(lp.choose_heads(people_store.sessions, Targets())) == 6


def test_crops_show_scan_and_labels_of_one_place(people_store: Store) -> None:
    targets = maps_of(people_store)
    heads = lp.choose_heads(people_store.sessions, targets)[:2]
    crops = lp.read_crops(people_store, heads, targets, (16, 16, 16), 8)
    assert [(crop.head, crop.whole) for crop in crops] == [(0, False), (0, True), (1, False), (1, True)]
    for crop in crops:
        assert crop.truth is not None and crop.image.shape[2:] == crop.truth.shape
        tissue = [float(crop.image[0, 0][crop.truth == value].mean()) for value in (1, 2, 3)]
        assert tissue == sorted(tissue) and tissue[0] < tissue[1] - 0.1 < tissue[2] - 0.2  # the t1 is ordered so
    session = heads[0][0]
    assert lp.near_level(people_store, session) == 0  # 2 mm
    middle = people_store.block(session, "t1", [(n - 16) // 2 for n in session.shape], (16, 16, 16))
    assert np.array_equal(crops[0].image[0, 0].numpy(), middle.astype(np.float32))


# ------------------------------------------------------------------------------------------------------------- in a run


RUN = (
    "objective=mae", "objective.mask_unit_vox=4", "trainer.max_steps=4", "trainer.evaluate_every=0", "probe.every=2",
    "data.validation=0.6", "data.split_seed=1", "probe.fewshot_every=0",
)  # fmt: skip


def test_a_run_writes_curves_and_a_table_and_asks_held_out_people_only(people_store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(config(people_store, run, *RUN, "probe.fewshot_every=2"))
    curves: dict[str, list[int]] = {}
    for step, name, _ in read_curves(run / "curves.csv"):
        curves.setdefault(name, []).append(step)
    for what in ("dice", "rank", "random_dice", "random_rank", "random_low_dice"):
        assert curves[f"probe_level0_{what}"] == curves[f"probe_level2_{what}"] == [2, 4]
    assert curves["probe_fewshot_dice"] == curves["probe_random_fewshot_dice"] == [4]
    table = json.loads((run / "probes.json").read_text())["levels"]
    last = {name: value for step, name, value in read_curves(run / "curves.csv") if step == 4}
    assert table["level1"]["dice"] == last["probe_level1_dice"]
    assert table["network"]["fewshot_dice"] == last["probe_fewshot_dice"]
    kept = json.loads((run / "levels_random.json").read_text())
    assert kept["answers"]["level0"]["dice"] == table["level0"]["random_dice"]
    held = {tuple(key.split("/")[:2]) for key in kept["question"]["heads"]}
    away = split_sessions(list(people_store.sessions), 0.6, 1)[1]
    assert held <= {(s.dataset, s.subject) for s in away} and len(held) >= 2


def test_a_resumed_run_reads_what_fresh_networks_answered(
    people_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = tmp_path / "run", (*RUN, "optim=wsd", "optim.warmup_steps=1")
    pretrain(config(people_store, run, *kept, "trainer.max_steps=2"))
    monkeypatch.setattr(lp, "fresh_networks", lambda *_: pytest.fail("asked again"))
    assert pretrain(config(people_store, run, *kept)).step == 4
    whole = tmp_path / "whole"
    monkeypatch.undo()
    pretrain(config(people_store, whole, *kept))
    probed = [[row for row in read_curves(f / "curves.csv") if row[1].startswith("probe")] for f in (run, whole)]
    assert probed[0] == probed[1] and len(probed[0]) > 20


def test_an_objective_with_a_decoder_is_asked_of_it_too(people_store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = words(people_store, run, "objective=dense_split", *RUN[2:], "data.windows.shift_vox=4")
    pretrain(resolve("pretrain", [word for word in given if "latent_channels" not in word]))
    names = {name for _, name, _ in read_curves(run / "curves.csv")}
    assert {"probe_decoder0_dice", "probe_dense_rank", "probe_unseen_map_dice"} <= names


def test_without_label_maps_ranks_remain(toy_store: Store, tmp_path: Path) -> None:
    pretrain(config(toy_store, tmp_path / "run", *RUN))
    names = {name for _, name, _ in read_curves(tmp_path / "run" / "curves.csv")}
    assert "probe_level0_rank" in names and not any("dice" in name for name in names)


def test_levels_may_be_left_out(people_store: Store, tmp_path: Path) -> None:
    pretrain(config(people_store, tmp_path / "run", *RUN, "probe.levels=false"))
    assert not any("level" in name for _, name, _ in read_curves(tmp_path / "run" / "curves.csv"))
    with pytest.raises(ConfigError, match=r"probe\.fewshot_every=-1"):
        OnlineProbeSpec(fewshot_every=-1)


# --------------------------------------------------------------------------------------------------------------- guards


def values(dice: float = 0.3, rank: float = 9.0) -> dict[str, float]:
    low = {"level1_dice": dice, "level1_random_low_dice": 0.25, "level1_rank": rank, "level1_random_rank": 20.0}
    return {"level0_dice": 0.4, "level0_random_low_dice": 0.2, "level0_rank": 5.0, **low, "unseen_map_dice": 0.0}


def test_a_level_below_fresh_weights_is_said_after_the_warm_up() -> None:
    guards = Guards(GuardSpec(), {}, warmup_steps=100)
    assert guards.see_levels(99, values(0.1)) == (None, False)
    said, stops = guards.see_levels(100, values(0.1))
    assert said is not None and not stops and not guards.is_low() and "\n" not in said
    assert "after step 100: level1 has a linear Dice of 0.100 (fresh weights 0.250); try" in said
    assert guards.see_levels(200, values()) == (None, False)
    said, _ = guards.see_levels(300, values(rank=2.2))
    assert said is not None and "level1 has an effective rank of 2.20 (guard.min_level_rank=3)" in said
    said, _ = guards.see_levels(400, values(math.nan, math.nan))
    assert said is not None and "Dice of nan" in said and "rank of nan" in said
    assert Guards(GuardSpec(level_dice=None), {}).see_levels(1, values(0.0, 0.0)) == (None, False)
    assert Guards(GuardSpec(min_level_rank=None), {}).see_levels(1, values(rank=0.0)) == (None, False)


def test_a_level_stops_a_run_where_asked_after_probes_in_a_row() -> None:
    kept: dict = {}
    guards = Guards(GuardSpec(level_dice="stop", probes=2), kept)
    assert [guards.see_levels(1, values(0.1))[1], guards.see_levels(2, values())[1]] == [False, False]
    assert not guards.see_levels(3, values(0.1))[1] and guards.is_low()
    resumed = Guards(GuardSpec(level_dice="stop", probes=2), json.loads(json.dumps(kept)))
    assert resumed.see_levels(4, values(0.1))[1]


def test_ranks_of_levels_are_no_ranks_of_parts() -> None:
    assert Guards(GuardSpec(probes=1), {}).see_probe(5, {"level0_rank": 1.0, "dense_rank": 0.5}) is None
    assert Guards(GuardSpec(probes=1), {}).see_probe(5, {"anatomy_rank": 1.0}) is not None


def test_a_run_says_it_or_stops(people_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lp, "spatial_rank", lambda values: 2.0)
    with pytest.warns(BrainfmWarning, match=r"after step 2: level0 has an effective rank of 2\.00"):
        pretrain(config(people_store, tmp_path / "a", *RUN))
    with pytest.raises(TrainingError, match=r"levels that a segmenter reads tell little after step 4: .*level0"):
        pretrain(config(people_store, tmp_path / "b", *RUN, "guard.level_dice=stop", "guard.probes=2"))
    assert not (tmp_path / "b" / "good.ckpt").exists()


@pytest.mark.parametrize(
    ("wrong", "said"), [({"level_dice": "shout"}, "warn, stop or null"), ({"min_level_rank": 0}, "more than 0")]
)
def test_impossible_guards(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GuardSpec(**wrong)


def test_one_linear_model_reads_all_maps_together() -> None:
    """Two maps of which neither tells the three classes apart by itself."""
    heads = [head(number) for number in range(4)]

    def maps(image: Tensor) -> dict[str, Tensor]:
        coarse = F.avg_pool3d((image == 3).float(), 2)
        return {"fine": torch.cat([image == 1, image >= 2], dim=1).float(), "coarse": coarse}

    said = list(lp.joined_answers(maps, heads[:2], iter(heads[2:]), K, CPU))
    assert [answer.shape for answer in said] == [(EDGE,) * 3] * 2 and said[0].dtype == np.uint8
    right = [np.mean(answer == crop.truth.numpy()) for answer, crop in zip(said, heads[2:]) if crop.truth is not None]
    alone = list(lp.joined_answers(lambda image: {"fine": maps(image)["fine"]}, heads[:2], heads[2:], K, CPU))
    assert min(right) > 0.98
    assert all((answer != 3).all() or (answer != 2).all() for answer in alone)
