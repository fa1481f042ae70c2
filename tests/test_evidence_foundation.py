"""The protocol of scripts/evidence/foundation.py: pairs, rates, resumption, tables, refusals; on toy heads."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from brainfm.comparison.people import drawn
from brainfm.data.patches import collate
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.nets.lengths import restore_lengths
from brainfm.scoring.intervals import crossed_bootstrap
from brainfm.specs import PreprocessSpec, Provenance
from brainfm.tasks.segmentation.settings import SegmentationSettings
from brainfm.tasks.segmentation.study import SegmentationStudy
from brainfm.tasks.whole_head.study import WholeHeadStudy
from brainfm.verbs.compose import resolve

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "evidence"))
import foundation_one_pass
import foundation_people as data
import foundation_runs as runs
import foundation_tables
import foundation_whole_head as whole_head

import foundation as script

NAMES = ("csf", "grey", "white")
TOY = data.Setting("tissue", (0, 1, 2, 3), NAMES, "t1", 2.0, ("d",), (1, 1), "toy", 2, patch_vox=(16, 16, 16))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    backbone = build_backbone("unet_tiny")
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 6, "pathology": 2})
    heads = {"regions": DenseHead("anatomy", 6, ("background", "head", "csf", "thalamus"))}
    path = tmp_path_factory.mktemp("file") / "backbone.safetensors"
    save_backbone(
        path, backbone, objective={"name": "dense_split", "config": {}}, objective_state={},
        preprocess=PreprocessSpec(), patch_vox=(16, 16, 16), provenance=Provenance("0", "", "", steps=3),
        decoder=decoder, heads=heads,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def loaded(file: Path) -> LoadedBackbone:
    return load_backbone(file)


@pytest.fixture(scope="module")
def family(people_store: Store) -> runs.Family:
    asked = SegmentationSettings(target="tissue", contrasts=("t1",), values=(0, 1, 2, 3), patch_vox=(16, 16, 16))
    question = SegmentationStudy(people_store, asked, clean=False)
    question.settle(TOY.patch_vox)
    tests = data.tests_of(people_store, question.cases, ["d/p2", "d/p3"], "t1", TOY)
    trials = data.tests_of(people_store, question.cases, ["d/p0", "d/p1"], "trial", TOY)
    return runs.Family("toy", TOY, people_store, question, tuple(tests), tuple(trials))


def job(start: runs.Start, **changes: Any) -> runs.Job:
    return runs.Job("toy", start.name, start.mark, **{"seed": 3, "trained": ("d/p1",), "reads": (2, 4), "rate": 1e-2}
                    | changes)  # fmt: skip


# ---- who -------------------------------------------------------------------------------------------------------------


def test_nobody_has_two_parts_and_only_held_people_are_tested() -> None:
    sides = data.sides()
    for name, setting in data.SETTINGS.items():
        people = data.people_of(sides, setting)
        side = {key: sides[tuple(key.split("/"))] for key in (*people.trial, *people.pool, *people.held)}
        assert {side[key] for key in people.held} == {"held"}
        assert {side[key] for key in (*people.trial, *people.pool)} == {"train"}
        assert not set(people.trial) & set(people.pool)
        assert len(people.pool) >= max(max(script.SHOTS[q]) for q, f in script.FAMILY.items() if f == name)
    lesions = data.people_of(sides, data.SETTINGS["lesions"])
    assert lesions.pool == ("openms_cross/patient07",) and lesions.trial == () and len(lesions.held) == 4
    assert all(sides[tuple(key.split("/"))] == "held" for key in data.REAL)


def test_fewer_shots_are_among_more_and_another_seed_draws_others() -> None:
    pool = [f"d/{n}" for n in range(20)]
    ten = drawn(pool, 10, seed=1)
    assert drawn(pool[::-1], 5, seed=1) == ten[:5] and set(ten) != set(drawn(pool, 10, seed=2))
    with pytest.raises(ManifestError, match="21 people to train on are asked for, 20 are there"):
        drawn(pool, 21, seed=1)


def test_a_trial_is_not_tested_on_whom_it_learned_from(family: runs.Family, loaded: LoadedBackbone) -> None:
    start = runs.starts_of(loaded)["scratch"]
    tried = job(start, trained=("d/p0",), trial=True)
    assert {test.subject for test in runs.tests_for(tried, family)} == {"d/p1"}
    assert {test.subject for test in runs.tests_for(job(start), family)} == {"d/p2", "d/p3"}


def test_other_contrasts_are_asked_of_wide_runs_after_every_second_read(
    family: runs.Family, loaded: LoadedBackbone
) -> None:
    start = runs.starts_of(loaded)["scratch"]
    others = [replace(test, part="t2") for test in family.tests]
    pairs = [*family.tests, *others]
    wide = replace(family, others=tuple(others), pairs=tuple(pairs))
    one = job(start, wide=True)
    network = runs.prepared(one, wide, start).module.answering
    found = {step: runs.read(network, one, wide, step, torch.device("cpu")) for step in one.reads}
    assert list(found[2]) == ["t1"] and list(found[4]) == ["t1", "t2", "pairs"]
    assert found[4]["t2"] == found[4]["t1"]  # the same scans here
    assert set(found[4]["pairs"]["agreement"]["t2"].values()) == {1.0}
    narrow = runs.read(network, job(start), wide, 4, torch.device("cpu"))
    assert narrow == {"t1": found[4]["t1"]}


# ---- pairs -----------------------------------------------------------------------------------------------------------


def test_starts_share_patches_and_fresh_weights_and_differ_in_what_the_file_gives(
    family: runs.Family, loaded: LoadedBackbone
) -> None:
    starts = runs.starts_of(loaded)
    made = {name: runs.prepared(job(start), family, start) for name, start in starts.items() if name != "rendered"}
    for other in ("encoder", "decoder"):
        for i in range(5):
            a, b = made["scratch"].patches[i], made[other].patches[i]
            assert np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)
    fresh, encoder, decoder = (made[name].module.task.state_dict() for name in ("scratch", "encoder", "decoder"))
    given, own = copy.deepcopy((loaded.backbone, loaded.decoder))
    assert own is not None and restore_lengths(given) > 0 and restore_lengths(own) > 0  # as fine-tuning begins
    for name, value in given.state_dict().items():
        assert torch.equal(encoder[f"backbone.{name}"], value) and torch.equal(decoder[f"backbone.{name}"], value)
    last = {name for name in fresh if name.startswith("decoder.out.")}
    for name in fresh.keys() - last:
        if not name.startswith("backbone."):
            assert torch.equal(fresh[name], encoder[name]), name
    assert last and not any(torch.equal(fresh[name], encoder[name]) for name in last), "a linear probe of each start"
    assert any(not torch.equal(fresh[f"backbone.{n}"], encoder[f"backbone.{n}"]) for n in loaded.backbone.state_dict())
    for name, value in own.state_dict().items():
        assert torch.equal(decoder[f"decoder.{name}"], value)
    for start in ("scratch", "encoder"):
        assert {group["lr"] for group in made[start].optimizer.param_groups} == {1e-2}


def test_a_run_from_scratch_serves_every_file_of_its_network(loaded: LoadedBackbone) -> None:
    other = replace(loaded, fingerprint="f" * 64)
    mine, theirs = runs.starts_of(loaded), runs.starts_of(other)
    assert mine["scratch"].mark == theirs["scratch"].mark and mine["rendered"].mark == theirs["rendered"].mark
    assert mine["encoder"].mark != theirs["encoder"].mark
    assert "decoder" not in runs.starts_of(replace(loaded, decoder=None))


def test_rendered_patches_are_those_of_scratch_with_a_share_painted_anew(
    family: runs.Family, loaded: LoadedBackbone
) -> None:
    starts = runs.starts_of(loaded)
    plain = runs.prepared(job(starts["scratch"]), family, starts["scratch"]).patches
    made = runs.prepared(job(starts["rendered"]), family, starts["rendered"])
    made.patches.parcels = "tissue_labels"
    painted = 0
    for i in range(12):
        a, b = plain[i], made.patches[i]
        assert np.array_equal(a.image, b.image) and np.array_equal(a.label, b.label)
        assert b.tissue.shape == TOY.patch_vox and b.tissue_shares[0] == 0 and b.tissue_shares.sum() == pytest.approx(1)
        painted += bool(b.rendered[0])
        # ids 1 of the toy's map are fluid to DLMUSE: the render classes lie where the label does
        assert np.array_equal(b.tissue == runs.RENDERED.index("csf"), b.label == 1)
    assert 3 <= painted <= 11
    made.module.train()
    assert torch.isfinite(made.module(collate([made.patches[i] for i in range(2)]), 0.0).total)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_reads(
    family: runs.Family, loaded: LoadedBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, fabric = runs.starts_of(loaded)["decoder"], Fabric(accelerator="cpu", devices=1)
    whole = runs.perform(job(start), family, start, tmp_path / "whole", fabric)
    assert whole is not None and list(whole["reads"]) == ["2", "4"]
    assert set(whole["reads"]["4"]["t1"]) == {"d/p2", "d/p3"} and whole["core_seconds"] > 0

    real = runs.read

    def and_stop(network: Any, one: Any, of: Any, step: int, device: Any) -> dict[str, Any]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(network, one, of, step, device)

    monkeypatch.setattr(runs, "read", and_stop)
    assert runs.perform(job(start), family, start, tmp_path / "parts", fabric) is None
    assert not job(start).file(tmp_path / "parts").exists()
    monkeypatch.setattr(runs, "read", real)
    parts = runs.perform(job(start), family, start, tmp_path / "parts", fabric)
    assert parts is not None and parts["reads"] == whole["reads"]
    assert not list((tmp_path / "parts" / "unfinished").iterdir())
    assert runs.is_done(job(start), family, tmp_path / "parts")


def test_a_record_of_another_setting_is_refused(family: runs.Family, loaded: LoadedBackbone, tmp_path: Path) -> None:
    start = runs.starts_of(loaded)["scratch"]
    one = job(start)
    assert not runs.is_done(one, family, tmp_path)
    _record(one, tmp_path, runs.setting_of(one, family))
    assert runs.is_done(one, family, tmp_path)
    with pytest.raises(ConfigError, match=r"was made with rate=0.01, now rate=0.02; expected the same, or another"):
        runs.is_done(replace(one, rate=2e-2), family, tmp_path)


def _record(one: runs.Job, out: Path, setting: dict[str, Any], reads: dict[str, Any] | None = None) -> None:
    file = one.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"setting": setting, "reads": reads or {}, "notes": [], "core_seconds": 36.0}))


def test_the_best_rate_is_that_of_the_mean_over_trials_and_a_broken_trial_counts_as_0(tmp_path: Path) -> None:
    scores = {1e-4: (0.5, 0.5), 1e-3: (0.9, 0.3), 3e-3: (0.6, 0.6)}
    jobs = []
    for rate, of in scores.items():
        for draw, score in enumerate(of):
            one = runs.Job("toy", "scratch", "m", draw, ("a",), (1, 2), rate, trial=True)
            reads = {str(step): {"trial": {"b": {"dice": score}}} for step in (1, 2)}
            _record(one, tmp_path, {"reads": [1, 2], "tested": ["trial b"]}, reads)
            jobs.append(one)
    assert runs.best_rate(jobs, tmp_path) == 1e-3  # .6 as 3e-3, and smaller
    _record(jobs[2], tmp_path, {"reads": [1, 2], "tested": ["trial b"]}, {"1": {"trial": {"b": {"dice": 0.9}}}})
    assert runs.best_rate(jobs, tmp_path) == 3e-3
    jobs[0].file(tmp_path).unlink()
    with pytest.raises(ConfigError, match="expected the trials of the rates to be run first"):
        runs.best_rate(jobs, tmp_path)


# ---- real pairs ------------------------------------------------------------------------------------------------------


def test_a_constant_agrees_with_itself_and_with_everybody_and_is_not_accurate() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (6, 6, 6)).astype(np.uint8)
    pairs = [data.Test(part, who, truth, truth) for who in ("a", "b") for part in ("t1", "t2")]
    constant = {(t.subject, t.part): np.repeat(np.arange(4, dtype=np.uint8), 54).reshape(6, 6, 6) for t in pairs}
    found = runs.read_pairs(pairs, constant, NAMES)
    assert found["agreement"]["t2"] == {"a": 1.0, "b": 1.0} and found["floor"] == {"a & b": 1.0}
    assert max(found["accuracy"]["t2"].values()) < 0.5
    right = runs.read_pairs(pairs, {key: truth for key in constant}, NAMES)
    assert right["accuracy"] == {"t1": {"a": 1.0, "b": 1.0}, "t2": {"a": 1.0, "b": 1.0}}
    # two classes of three right, the third nowhere
    part = {key: np.where(truth == 3, 0, truth) for key in constant}
    assert runs.read_pairs(pairs, part, NAMES)["accuracy"]["t1"]["a"] == pytest.approx(2 / 3)


def test_a_label_map_is_moved_onto_another_by_its_middle_and_cut_at_the_border() -> None:
    fixed, moving = np.zeros((8, 7, 6), np.uint8), np.zeros((6, 9, 6), np.uint8)
    fixed[4:7, 2:4, 1:3] = 1
    moving[1:4, 6:8, 3:5] = 2
    assert np.array_equal(runs.moved_onto(moving, fixed), 2 * fixed)
    assert not runs.moved_onto(np.zeros_like(moving), fixed).any()
    large = np.full((12, 12, 12), 3, np.uint8)
    assert runs.moved_onto(large, fixed).shape == fixed.shape


# ---- tables ----------------------------------------------------------------------------------------------------------


def _runs_of(start: str, table: np.ndarray, trained: str = "p{}") -> dict[int, dict[str, Any]]:
    """Records of R runs [R, S]; S people."""
    people = [f"d/{n}" for n in range(table.shape[1])]
    return {
        seed: {
            "setting": {"tested": [f"t1 {who}" for who in people], "trained": [trained.format(seed)], "reads": [7, 9],
                        "others": [], "wide_reads": [], "store": "s"},
            "reads": {"7": {"t1": {who: {"dice": float(v)} for who, v in zip(people, row)}}},
            "notes": [],
        }
        for seed, row in enumerate(table)
    }  # fmt: skip


def test_differences_are_paired_run_by_run_and_person_by_person() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random((4, 5)), rng.random((5, 5))
    mine, theirs = foundation_tables.shared(_runs_of("encoder", a), _runs_of("scratch", b))
    assert list(mine) == list(theirs) == [0, 1, 2, 3]
    apart = foundation_tables.matrix(mine, "t1", 7) - foundation_tables.matrix(theirs, "t1", 7)
    assert np.allclose(apart, a - b[:4])
    i, won = crossed_bootstrap(a - b[:4], seed=0), int((a.mean(1) > b[:4].mean(1)).sum())
    said = foundation_tables.compared(apart)
    assert said == f"{i.mean:+.3f} [{i.low:+.3f}, {i.high:+.3f}] (better in {won} of 4)"
    assert foundation_tables.compared(apart, of_errors=True).endswith(f"(better in {4 - won} of 4)")
    assert not foundation_tables.matrix(mine, "t1", 9).any()  # a run that broke before that read


def test_runs_that_learned_from_others_are_no_pairs() -> None:
    table = np.ones((2, 3))
    with pytest.raises(ConfigError, match=r"runs of seed 0 differ in trained: \['p0'\] and \['x'\]; expected pairs"):
        foundation_tables.shared(_runs_of("encoder", table), _runs_of("scratch", table, "x"))
    mixed = {**_runs_of("scratch", table), 5: _runs_of("scratch", np.ones((1, 2)))[0]}
    with pytest.raises(ConfigError, match="tested on different people"):
        foundation_tables.matrix(mixed, "t1", 7)


def _words(file: Path, out: Path, *more: str) -> list[str]:
    return ["--backbone", str(file), "--data", str(out / "no such folder"), "--out", str(out), *more]


def test_tables_come_from_the_records_alone(
    file: Path, loaded: LoadedBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = _words(file, tmp_path, "--questions", "hippocampus", "--seeds", "2", "--reads", "7", "9", "--tables-only")
    people = data.people_of(data.sides(), data.SETTINGS["hippocampus"])
    for start, score in (("scratch", 0.5), ("encoder", 0.6), ("decoder", 0.75)):
        for seed in range(2):
            trained = tuple(drawn(people.pool, 5, seed))
            one = runs.Job("hippocampus", start, runs.starts_of(loaded)[start].mark, seed, trained, (7, 9))
            tested = [f"t1 {who}" for who in people.held]
            setting = {"tested": tested, "trained": sorted(trained), "reads": [7, 9], "store": "s"}
            setting |= {"others": [], "wide_reads": []}
            read = {"t1": {who: {"dice": score} for who in people.held}}
            _record(one, tmp_path, setting, {"7": read, "9": read})
    assert script.main(words) == 0
    said = capsys.readouterr().out
    assert "| 9 | 0.500 [0.500, 0.500] | 0.600 [0.600, 0.600] | 0.750 [0.750, 0.750] | " in said
    assert "+0.100 [+0.100, +0.100] (better in 2 of 2) | +0.250 [+0.250, +0.250] (better in 2 of 2) |" in said
    assert "6 runs and trials lie in the folder, 0.06 core-hours." in said
    assert next(tmp_path.glob("tables_*.md")).read_text().strip() == said.strip()


def test_more_hours_than_the_budget_are_refused_before_the_first_run(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.Work, "projected", lambda self: (["  all: 12 h"], 12.34))
    assert script.main(_words(file, tmp_path, "--questions", "lesions")) == 2
    assert "--budget-hours 10: the runs would take 12.3 core-hours" in capsys.readouterr().err
    assert script.main(_words(file, tmp_path, "--seeds", "0")) == 2
    assert "expected 1 seed or more" in capsys.readouterr().err


def test_every_start_has_as_many_trials_and_runs(file: Path, loaded: LoadedBackbone, tmp_path: Path) -> None:
    args = script.arguments(_words(file, tmp_path, "--questions", "tissues", "contrast", "lesions"))
    work = script.Work(args, loaded)
    counts = {key: len(jobs) for key, jobs in work.trials.items()}
    assert set(counts.values()) == {len(args.rates) * args.draws}
    assert set(counts) == {("tissues", s) for s in ("scratch", "encoder", "decoder", "rendered")} | {
        ("hippocampus", s) for s in ("scratch", "encoder", "decoder")
    }
    for shots, starts in ((1, 3), (5, 4), (10, 3)):
        some = [j for j in work.runs if j.family == "tissues" and len(j.trained) == shots]
        assert len(some) == starts * args.seeds == len({j.name for j in some})
        for seed in range(args.seeds):
            assert len({j.trained for j in some if j.seed == seed}) == 1
        assert {j.reads[-1] for j in some} == {2000 if shots == 5 else 200}
        assert {j.wide_reads for j in some} == {(200, 2000) if shots == 5 else ()}


# ---- one pass --------------------------------------------------------------------------------------------------------


def test_one_window_is_one_pass_and_more_are_not(loaded: LoadedBackbone) -> None:
    rng = np.random.default_rng(0)
    small = foundation_one_pass.compared(loaded, rng.standard_normal((16, 16, 16)), None)
    assert small["same"] == 1.0 and small["cosine"] == pytest.approx(1, abs=1e-5) and small["windows"] is None
    image = rng.standard_normal((24, 20, 17)) + np.arange(24)[:, None, None] / 4
    target = np.full(image.shape, 6, np.int16)  # thalamus
    large = foundation_one_pass.compared(loaded, image, target)
    assert large["cosine"] < 0.9999 and large["centred"] < large["cosine"]
    assert 0 <= large["windows"] <= 1 and 0 <= large["whole"] <= 1
    scan = torch.from_numpy(image.astype(np.float32))
    answer = foundation_one_pass._classes(loaded, foundation_one_pass.in_one_pass(loaded, scan))
    assert large["whole"] == pytest.approx(2 * (answer == 3).sum() / ((answer == 3).sum() + answer.size))


# ---- whole heads -----------------------------------------------------------------------------------------------------


def test_starts_are_asked_of_the_same_people_and_all_of_them_at_last(loaded: LoadedBackbone) -> None:
    starts = [start for name, start in runs.starts_of(loaded).items() if name != "rendered"]
    asked = whole_head.asks(starts, seeds=2, tested=0)
    sides = data.sides()
    for dataset, most in (("ds002748_2mm", 24), ("ixi2mm", 73)):
        some = [ask for ask in asked if ask.dataset == dataset]
        assert max(len(ask.trained) for ask in some) == most
        assert {sides[tuple(key.split("/"))] for ask in some for key in ask.trained} == {"train"}
        assert {sides[tuple(key.split("/"))] for ask in some for key in ask.held} == {"held"}
        by_start = [[(a.target, a.seed, a.trained, a.held) for a in some if a.start == start.name] for start in starts]
        assert by_start[0] == by_start[1] == by_start[2]


def test_a_whole_head_record_holds_every_candidate_and_its_errors(
    people_store: Store, loaded: LoadedBackbone, tmp_path: Path
) -> None:
    words = ["task=regression", "task.target=age", "store=-", "run=-", "backbone_from=none"]
    question = WholeHeadStudy(people_store, resolve("finetune", words).task)
    question.settle((16, 16, 16))
    start = runs.starts_of(loaded)["decoder"]
    trained, held = ("d/p1", "d/p2", "d/p3", "d/p5"), ("d/p4",)
    ask = whole_head.Ask("d", "age", "decoder", start.mark, 0, trained, held)
    record = whole_head._answered(ask, question, start, tmp_path, torch.device("cpu"))
    assert set(record["answers"]) == {"p4"} and record["chosen"] in record["answers"]["p4"]
    assert {"mean", "regions", "features", "stacked"} <= set(record["answers"]["p4"])
    assert whole_head.errors(record, "mean", "age")["p4"] == pytest.approx(abs(44 - (41 + 42 + 43 + 45) / 4), abs=1e-4)
    ask.file(tmp_path).parent.mkdir()
    ask.file(tmp_path).write_text(json.dumps(record | {"core_seconds": 1.0}))
    assert ask.is_done(tmp_path)
    with pytest.raises(ConfigError, match="was asked of other people"):
        replace(ask, held=("d/p0",)).is_done(tmp_path)
    said = "\n".join(whole_head.tables([ask], tmp_path))
    assert "### whole_head: age of d, mean error in years" in said and "| 4 | encoder + decoder | " in said


def test_a_sex_is_told_right_or_wrong() -> None:
    record = {"chosen": "features", "answers": {
        "a": {"truth": [0], "features": [0.7, 0.3]}, "b": {"truth": [1], "features": [0.6, 0.4]},
    }}  # fmt: skip
    assert whole_head.errors(record, "features", "sex") == {"a": 0.0, "b": 1.0}
    assert whole_head._auroc(record) == 1.0
