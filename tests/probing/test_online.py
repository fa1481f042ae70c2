"""Probes against codes whose content is known, naive loops, and their promise to be repeatable."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from brainfm.data.store import ScanEntry, SessionEntry, Store
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.untrained import random_backbone
from brainfm.probing import online as probes
from brainfm.probing.online import Features
from brainfm.probing.settings import OnlineProbeSpec

CONTRASTS = ("t1", "t2", "flair")


def session(subject: int, visit: int = 1, contrasts: tuple[str, ...] = CONTRASTS, **columns: str) -> SessionEntry:
    scans = tuple(ScanEntry(f"{contrast}{n}", contrast, "", "") for n, contrast in enumerate(contrasts))
    place = (20, 20, 20), scans, (), columns, f"toy/{subject}", (0, 0, 0)
    return SessionEntry("toy", f"{subject:02d}", str(visit), f"{subject}-{visit}", *place)


def features(sessions: list[SessionEntry], **parts: np.ndarray) -> Features:
    """Codes [R, E] as the means at one place; the deviations are 0."""
    rows = tuple((s, scan) for s in sessions for scan in s.scans)
    pooled = {name: np.hstack([v, np.zeros_like(v)])[:, None].astype(np.float32) for name, v in parts.items()}
    return Features(rows, pooled)


def one_hot(values: list, width: int) -> np.ndarray:
    return np.eye(width)[[sorted(set(values)).index(v) for v in values]]


@pytest.fixture(scope="module")
def cohort() -> list[SessionEntry]:
    sexes = np.random.default_rng(0).choice(["F", "male"], 20)
    return [
        session(n, visit, age=f"{30 + 2 * n + 0.1 * visit:.1f}", sex=sexes[n]) for n in range(20) for visit in (1, 2)
    ]


def test_perfectly_split_codes_score_one_and_swapped_ones_minus_one(cohort: list[SessionEntry]) -> None:
    rows = [(s, scan) for s in cohort for scan in s.scans]
    rng = np.random.default_rng(1)
    person = one_hot([s.subject for s, _ in rows], 20) @ rng.normal(size=(20, 12))
    looks = one_hot([scan.contrast for _, scan in rows], 3) @ rng.normal(size=(3, 12))
    both = person + 3 * looks
    table = probes.ask(features(cohort, anatomy=person, contrast=looks, whole=both), 0)
    anatomy, contrast = table["anatomy"], table["contrast"]
    assert anatomy["subject"] == 1 and anatomy["contrast"] < 0.55
    assert contrast["contrast"] == 1 and contrast["contrast_knn"] == 1
    assert contrast["subject"] == pytest.approx(contrast["subject_chance"], abs=0.02)
    assert anatomy["contrast_chance"] == pytest.approx(1 / 3)
    assert anatomy["subject_chance"] == pytest.approx(4 / 80)  # two visits, two other contrasts, of twenty people
    assert anatomy["visit"] == 1 and anatomy["visit_chance"] == pytest.approx(3 / 117)
    assert anatomy["split"] > 0.6 and contrast["split"] > 0.9 and "split" not in table["whole"]
    assert table["whole"]["contrast"] == 1
    swapped = probes.ask(features(cohort, anatomy=looks, contrast=person), 0)
    assert swapped["anatomy"]["split"] < -0.9 and swapped["contrast"]["split"] < -0.6
    mixed = probes.ask(features(cohort, anatomy=np.hstack([person, looks]), contrast=looks), 0)
    assert mixed["anatomy"]["contrast"] == 1 and mixed["anatomy"]["split"] < anatomy["split"]


def test_age_and_sex_are_found_where_they_are_and_only_there(cohort: list[SessionEntry]) -> None:
    rows = [s for s in cohort for _ in s.scans]
    rng = np.random.default_rng(2)
    ages = np.array([float(s.columns["age"]) for s in rows])
    male = np.array([s.columns["sex"] == "male" for s in rows], float)
    knows = np.stack([ages, 2 * male - 1, *rng.normal(size=(4, len(rows)))], axis=1)
    table = probes.ask(features(cohort, knows=knows, noise=rng.normal(size=(len(rows), 6))), 0)
    assert table["knows"]["age_mae"] < 1 and table["knows"]["age_r"] > 0.98
    assert table["knows"]["sex_auroc"] == 1
    assert table["noise"]["age_mae"] > 0.8 * table["noise"]["age_mean_mae"] > 5
    assert 0.15 < table["noise"]["sex_auroc"] < 0.85


def test_nothing_of_a_person_is_learnt_from_that_person(cohort: list[SessionEntry]) -> None:
    """A code that is a name, and nothing else: whoever had the other visit in training would know the age."""
    names = one_hot([s.subject for s in cohort for _ in s.scans], 20)
    answers = probes.ask(features(cohort, name=names), 0)["name"]
    assert answers["age_mae"] > 0.9 * answers["age_mean_mae"]
    assert answers["sex_auroc"] < 0.9


def test_questions_that_the_scans_do_not_allow_are_left_out() -> None:
    alone = [session(n, contrasts=("t1",)) for n in range(6)]
    answers = probes.ask(features(alone, code=np.random.default_rng(0).normal(size=(6, 4))), 0)["code"]
    assert set(answers) == {"std"}  # one contrast, one visit, no columns, too few crops for a rank
    few = [session(n, contrasts=("unknown", "unknown"), age="40") for n in range(12)]
    answers = probes.ask(features(few, code=np.random.default_rng(0).normal(size=(24, 4))), 0)["code"]
    assert set(answers) == {"std", "rank"}  # an unknown contrast is none; everybody is as old


def test_ages_that_are_no_number_are_counted_and_named_once() -> None:
    cohort = [session(0, age="40-45"), session(1, age="51"), session(2, age="n/a"), session(3, age="-4"), session(4)]
    ages, note = probes.ages_of([*cohort, *cohort])
    assert ages == {("toy", "01", "1"): 51.0}
    assert note == "age is no number of years in 2 sessions, e.g. '40-45'"
    assert probes.ages_of(cohort[1:2])[1] is None


def test_sexes_are_two_words_whatever_their_spelling() -> None:
    cohort = [session(n, sex=word) for n, word in enumerate(("M", "male", "f", "Female", "unknown"))]
    assert list(probes.sexes_of(cohort).values()) == [1, 1, 0, 0]
    assert probes.sexes_of([*cohort, session(9, sex="x")]) == {}


def test_effective_rank_by_hand() -> None:
    rng = np.random.default_rng(0)
    line = np.outer(rng.normal(size=30), rng.normal(size=7)) + 100.0
    assert probes.effective_rank(line) == pytest.approx(1, abs=1e-6)
    assert probes.effective_rank(np.full((9, 4), 3.0)) == 0
    even = np.vstack([np.eye(5), -np.eye(5)])
    assert probes.effective_rank(even) == pytest.approx(5)
    values = rng.normal(size=(12, 4))
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(values.T) * 11), 0))
    entropy = -sum(p * np.log(p) for p in root / root.sum())
    assert probes.effective_rank(values) == pytest.approx(np.exp(entropy))


def test_retrieval_equals_a_loop_and_ties_are_chance() -> None:
    rng = np.random.default_rng(3)
    values, people = rng.normal(size=(14, 5)), rng.integers(0, 4, 14)
    same = people[:, None] == people[None]
    candidates = (rng.random((14, 14)) < 0.7) & ~np.eye(14, dtype=bool)
    hits, chances = [], []
    scaled = (values - values.mean(axis=0)) / values.std(axis=0)
    for r in range(14):
        others = np.flatnonzero(candidates[r])
        right = people[others] == people[r]
        if right.any() and not right.all():
            near = [scaled[r] @ scaled[c] / np.linalg.norm(scaled[c]) for c in others]
            hits.append(right[int(np.argmax(near))])
            chances.append(right.mean())
    assert probes.retrieve(values, candidates, same) == pytest.approx((np.mean(hits), np.mean(chances), len(hits)))
    accuracy, chance, _ = probes.retrieve(np.full((14, 5), 7.0), candidates, same)
    assert accuracy == pytest.approx(chance)
    assert probes.retrieve(values, np.zeros((14, 14), bool), same) is None


def test_features_are_pooled_crops_of_one_place(toy_store: Store) -> None:
    def encode(image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"raw": image, "twice": torch.cat([image, 2 * image], dim=1)}

    patch = (12, 10, 8)
    found = probes.extract(encode, toy_store, toy_store.sessions, patch, 5, patches=3, batch_size=4)
    assert len(found.rows) == 11 and found.parts["raw"].shape == (11, 3, 2)
    assert found.parts["twice"].shape == (11, 3, 4)
    for row, (entry, scan) in enumerate(found.rows):
        for place, corner in enumerate(probes.corners(entry, patch, 3, 5)):
            block = toy_store.block(entry, scan.name, corner, patch).astype(np.float32)
            pooled = found.parts["raw"][row, place]
            np.testing.assert_allclose(pooled, [block.mean(), block.std()], rtol=1e-4, atol=1e-5)
    again = probes.extract(encode, toy_store, toy_store.sessions, patch, 5, patches=3, batch_size=7)
    np.testing.assert_allclose(again.parts["raw"], found.parts["raw"], rtol=1e-5, atol=1e-6)
    answers = probes.probe(encode, toy_store, toy_store.sessions, patch, 5, patches=3)
    assert answers == probes.flat(probes.ask(found, 5))


def test_places_are_inside_and_about_the_middle() -> None:
    entry = dataclasses.replace(session(0), shape=(60, 40, 10))
    boxes = probes.corners(entry, (16, 16, 16), 9, 0)
    assert boxes[0] == (22, 12, -3) and len(set(boxes)) == 9
    for x, y, z in boxes:
        assert abs(x - 22) <= 8 and abs(y - 12) <= 5 and z == -3
    other = dataclasses.replace(session(1), shape=(120, 80, 20))
    for one, two in zip(boxes, probes.corners(other, (16, 16, 16), 9, 0)):
        assert abs((two[0] + 8) - 2 * (one[0] + 8)) <= 2  # the same share of the head


def test_visits_of_one_frame_are_read_at_one_place() -> None:
    class Blocks:
        def __init__(self) -> None:
            self.asked: list[tuple[int, ...]] = []

        def block(self, entry: SessionEntry, name: str, corner: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
            self.asked.append(tuple(c + o for c, o in zip(corner, entry.offset_vox)))
            return np.zeros(size, np.float16)

    first = dataclasses.replace(session(0, 1, ("t1",)), offset_vox=(3, -2, 5))
    second = dataclasses.replace(session(0, 2, ("t1",)), offset_vox=(-4, 6, 1), shape=(26, 24, 30))
    blocks = Blocks()
    probes.extract(lambda image: {"raw": image}, blocks, [first, second], (8, 8, 8), 0)  # type: ignore[arg-type]
    assert blocks.asked[:2] == blocks.asked[2:] and len(blocks.asked) == 4


def test_chosen_are_those_who_can_answer_and_the_order_does_not_matter() -> None:
    cohort = [session(n, contrasts=("t1",)) for n in range(10)] + [
        session(n, visit) for n in range(10, 15) for visit in (1, 2, 3)
    ]
    chosen = probes.choose(cohort, OnlineProbeSpec(subjects=7), 0)
    people = {s.subject for s in chosen}
    assert len(people) == 7 and {f"{n}" for n in range(10, 15)} <= people
    assert sum(s.subject == "12" for s in chosen) == 2  # visits
    assert {s.subject for s in probes.choose(cohort[::-1], OnlineProbeSpec(subjects=7), 0)} == people
    repeats = session(0, contrasts=("t1", "t1", "flair", "t1"))
    assert [scan.name for scan in probes.choose_scans(repeats, 3)] == ["t10", "flair2", "t11"]


def test_few_held_out_means_everybody_and_it_is_said(toy_store: Store, tmp_path) -> None:
    def online(held: list[SessionEntry], trained: list[SessionEntry]) -> probes.OnlineProbe:
        device = torch.device("cpu")
        return probes.OnlineProbe(dict, toy_store, held, trained, OnlineProbeSpec(), (8,) * 3, 0, device, 2, tmp_path)  # type: ignore[arg-type]

    some = [session(n) for n in range(12)]
    assert "12 subjects of all (fewer than 8 are held out)" in online(some[:7], some[7:]).plan()[0]
    assert "8 subjects held-out" in online(some[:8], some[8:]).plan()[0]
    strange = [*some, session(20, age="old")]
    assert online(strange, []).plan()[1] == "probes: age is no number of years in 1 sessions, e.g. 'old'; left out"


def test_lines_are_plain_words() -> None:
    table = {"anatomy": {"contrast": 0.414, "contrast_chance": 1 / 3, "subject": 1.0, "subject_chance": 0.05,
                         "std": 0.5, "rank": 12.34, "split": -0.2}}  # fmt: skip
    assert probes.describe(table) == [
        "anatomy: contrast .41 (chance .33), subject 1.00 (chance .05), 12.3 effective directions, deviation 0.5, "
        "split -.20 (1 clean, 0 mixed)"
    ]


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"probe.patches=0: expected 1 or more"):
        OnlineProbeSpec(patches=0)
    with pytest.raises(ConfigError, match=r"probe.every=-1: expected 0 or more"):
        OnlineProbeSpec(every=-1)


def test_the_network_before_training_is_a_part_of_its_own() -> None:
    config = {"name": "vit", "width": 12, "depth": 1, "heads": 2, "patch_vox": 8}
    torch.manual_seed(5)
    begun = build_backbone(**config)
    image = torch.randn(1, 1, 16, 16, 16)
    untrained = random_backbone(config, 5)
    with torch.no_grad():
        found = probes.with_whole(lambda image: {}, begun, untrained)(image)
        assert set(found) == {"backbone", "token", "untrained", "untrained_token"}
        assert torch.allclose(found["untrained"], found["backbone"], atol=1e-6)  # as the run began
        begun.norm.weight.mul_(2)
        again = probes.with_whole(lambda image: {}, begun, untrained)(image)
    assert torch.equal(again["untrained_token"], found["untrained_token"])
    assert not torch.allclose(again["token"], found["token"])
