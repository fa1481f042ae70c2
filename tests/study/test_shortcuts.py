"""The audit finds a planted shortcut, accuses no clean cohort, and says plainly what it cannot test."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from brainfm.data.store import Store
from brainfm.errors import ConfigError
from brainfm.specs import TaskSpec
from brainfm.study.shortcuts import Audit, Evidence, audit, examine, gather, words
from brainfm.tasks.segmentation.cases import find_cases

ILL = TaskSpec("classification", "ill", ("t1",), ("no", "yes"), (32, 32, 32), mode="exclusive")
AGE = TaskSpec("regression", "age", ("t1",), (), (32, 32, 32), unit="years")


def people(n: int) -> list[str]:
    return [f"d/p{i}" for i in range(n)]


def cohort(
    seed: int, n: int, confounded: float, honest: bool
) -> tuple[list[Evidence], np.ndarray, np.ndarray, np.ndarray]:
    """Evidence, labels, probabilities and sites; the site is the label in a share of the cases, and the model reads
    the site alone or the disease alone."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    site = np.where(rng.random(n) < confounded, y, rng.integers(0, 2, n))
    seen = 1.3 * (2 * y - 1) if honest else 2.5 * (2 * site - 1)
    p = 1 / (1 + np.exp(-(seen + rng.normal(0, 1, n))))
    evidence = [
        words("site", [f"s{s}" for s in site]),
        words("scanner", [f"m{m}" for m in rng.integers(0, 3, n)]),
        Evidence("position", rng.normal(size=(n, 9))),
        Evidence("background", rng.normal(size=(n, 20))),
        Evidence("mask outline", rng.normal(size=(n, 60)), anatomy=True),
        words("data set", ["d"] * n),
    ]
    return evidence, y, np.stack([1 - p, p], axis=1), site


def run(seed: int, n: int, confounded: float, honest: bool, rounds: int = 199) -> Audit:
    evidence, y, p, _ = cohort(seed, n, confounded, honest)
    return examine(evidence, y, p, people(n), ILL, seed, rounds)


def named(found: Audit, name: str):
    return next(s for s in found.shortcuts if s.name == name)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_site_is_found_and_what_is_left_is_chance(seed: int) -> None:
    found = run(seed, 120, 0.8, honest=False)
    site = named(found, "site")
    assert found.model[""].mean > 0.8 and site.score.mean > 0.75 and site.p_family < 0.05
    assert site.code == "lost" and site.equalised.low < 0.5 < site.equalised.high
    assert abs(site.equalised.mean - 0.5) < 0.16 and abs(site.weighted - 0.5) < 0.16
    assert site.explained > 0.5 and site.explained_beyond > 0.1
    assert found.verdict.startswith("Do not trust this score yet") and "site" in found.verdict
    assert all(s.code in ("harmless", "untestable") for s in found.shortcuts if s.name != "site")


@pytest.mark.parametrize("seed", range(4))
def test_a_model_that_reads_the_disease_survives_the_same_cohort(seed: int) -> None:
    found = run(seed, 120, 0.8, honest=True)
    site = named(found, "site")
    assert site.p_family < 0.05 and site.code == "survives" and site.equalised.low > 0.5
    assert abs(site.equalised.mean - found.model[""].mean) < 0.1
    assert site.explained_beyond < 0.1
    assert "holds up" in found.verdict and "Do not trust" not in found.verdict


def test_clean_cohorts_are_rarely_accused() -> None:
    """One family of five shortcuts a cohort: Holm promises at most 5 % of cohorts with any alarm."""
    alarms = sum(
        any(s.code not in ("harmless", "untestable") for s in run(1000 + seed, 40, 0, True, rounds=99).shortcuts)
        for seed in range(20)
    )
    assert alarms <= 4  # the 99th percentile of 20 coins of 5 % is 4


def test_few_rounds_cannot_hide_a_shortcut_in_a_large_family() -> None:
    """With 19 rounds p is never below .05: the family's smallest p must be able to fall below it all the same."""
    assert named(run(0, 120, 0.8, honest=False, rounds=19), "site").code == "lost"


def test_equalised_area_is_that_of_pairs_within_a_site() -> None:
    evidence, y, p, site = cohort(7, 60, 0.7, honest=True)
    found = named(examine(evidence, y, p, people(60), ILL, 0, 99), "site")
    pairs = [
        float(p[i, 1] > p[j, 1])
        for i in range(60) for j in range(60) if y[i] == 1 and y[j] == 0 and site[i] == site[j]
    ]  # fmt: skip
    assert found.pairs == len(pairs) and found.equalised.mean == pytest.approx(np.mean(pairs))


def test_a_site_that_is_the_label_cannot_be_told_from_it() -> None:
    site = named(run(0, 60, 1.0, honest=False), "site")
    assert site.code == "inseparable" and site.equalised is None and site.pairs == 0


def test_a_few_alike_cases_are_called_too_few() -> None:
    """Two of twenty are on the other site on either side, and the model ranks these four well but not surely."""
    y = np.repeat([0, 1], 20)
    site = y.copy()
    site[[0, 1, 20, 21]] = [1, 1, 0, 0]
    score = 2.0 * site
    score[site == 0] += np.linspace(-1, 1, 20)
    score[site == 1] += np.linspace(-1, 1, 20)
    own = {s: np.flatnonzero(site == s) for s in (0, 1)}
    for s, places in ((0, (12, 15)), (1, (4, 7))):  # of 20, from the lowest
        few = np.flatnonzero((site == s) & (y != s))
        order = [i for i in own[s] if i not in few]
        for place, i in zip(places, few):
            order.insert(place, i)
        score[order] = 2.0 * s + np.linspace(-1, 1, 20)
    p = 1 / (1 + np.exp(-score))
    evidence = [words("site", [str(s) for s in site])]
    found = named(examine(evidence, y, np.stack([1 - p, p], axis=1), people(40), ILL, 0), "site")
    assert found.code == "undecided" and found.pairs == 72 and found.equalised.mean > 0.6 and found.equalised_p > 0.05
    assert "too few to tell it from chance" in found.verdict


def ages(seed: int, honest: bool, n: int = 120) -> Audit:
    rng = np.random.default_rng(seed)
    y = rng.normal(50, 15, n)
    site = np.where(rng.random(n) < 0.8, y > 50, rng.random(n) < 0.5)
    answers = y + rng.normal(0, 8, n) if honest else 40 + 20 * site + rng.normal(0, 5, n)
    evidence = [words("site", [str(s) for s in site]), Evidence("position", rng.normal(size=(n, 9)))]
    return examine(evidence, y, answers, people(n), AGE, seed, 199)


@pytest.mark.parametrize("seed", range(3))
def test_values_are_treated_alike(seed: int) -> None:
    planted, clean = ages(seed, False), ages(seed, True)
    site = named(planted, "site")
    assert planted.measure == "skill" and site.p_family < 0.05 and site.equalised.mean < 0.05
    assert site.code in ("lost", "weakened") and site.kept < 0.3 and "Do not trust" in planted.verdict
    site = named(clean, "site")
    assert site.code == "survives" and site.kept == pytest.approx(1, abs=0.25) and site.equalised.mean > 0.05


def test_skill_is_the_share_of_the_error_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(50, 10, 40)
    answers = y + rng.normal(0, 4, 40)
    found = examine([], y, answers, people(40), AGE, 0, 99)
    assert found.model[""].mean == pytest.approx(1 - np.abs(y - answers).mean() / np.abs(y - y.mean()).mean())
    assert found.verdict == "No shortcut could be tested."


def test_volumes_of_a_segmentation_are_compared_on_a_logarithmic_scale() -> None:
    rng = np.random.default_rng(4)
    true = np.exp(rng.normal(1, 1.5, 50))
    found = examine([], true, true * 1.2, people(50), replace(AGE, kind="segmentation"), 0, 99)
    error = np.log1p(true * 1.2) - np.log1p(true)
    spread = np.log1p(true) - np.log1p(true).mean()
    assert found.model[""].mean == pytest.approx(1 - np.abs(error).mean() / np.abs(spread).mean())


def test_unknown_labels_are_left_out_and_labels_asked_one_by_one() -> None:
    rng = np.random.default_rng(1)
    n = 80
    spec = TaskSpec("classification", "findings", ("t1",), ("a", "b", "c"), (32, 32, 32), mode="multilabel")
    truth = (rng.random((n, 3)) < 0.5).astype(float)
    truth[:20, 1] = np.nan
    truth[:, 2] = 1
    site = np.where(rng.random(n) < 0.9, truth[:, 0], 1 - truth[:, 0])
    answers = rng.random((n, 3))
    found = examine([words("site", [str(s) for s in site])], truth, answers, people(n), spec, 0, 199)
    by_label = {s.label: s for s in found.shortcuts}
    assert [by_label[k].cases for k in "abc"] == [80, 60, 80]
    assert by_label["a"].p_family < 0.05 and by_label["a"].code == "nothing to lose"
    assert by_label["b"].code == "harmless" and by_label["c"].code == "untestable"
    assert "site (a)" in found.verdict and set(found.model) == {"a", "b", "c"}


def test_several_classes_and_ordered_ones() -> None:
    rng = np.random.default_rng(2)
    n = 90
    y = rng.integers(0, 3, n)
    p = np.eye(3)[y] + rng.random((n, 3))
    p /= p.sum(axis=1, keepdims=True)
    evidence = [words("site", [f"s{v}" for v in np.where(rng.random(n) < 0.7, y, 0)])]
    three = replace(ILL, values=("a", "b", "c"))
    found = examine(evidence, y, p, people(n), three, 0, 199)
    assert found.measure == "auroc" and named(found, "site").code == "survives"
    ordered = examine(evidence, y, p, people(n), replace(three, mode="ordinal"), 0, 199)
    assert ordered.measure == "skill" and named(ordered, "site").p_family < 0.05


def test_what_cannot_be_tested_is_said() -> None:
    evidence, y, p, _ = cohort(0, 30, 0, True)
    evidence += [words("serial", [f"n{i}" for i in range(30)])]
    evidence += [Evidence("vendor", np.zeros((30, 0)), absent="nobody knows")]
    found = examine(evidence, y, p, people(30), ILL, 0, 99)
    said = {s.name: s.verdict for s in found.shortcuts if s.code == "untestable"}
    assert said == {
        "data set": "cannot be tested: all 30 cases share one",
        "serial": "cannot be tested: 30 different values in 30 cases",
        "vendor": "cannot be tested: nobody knows",
    }
    assert "Could not be tested: data set, serial, vendor." in found.verdict
    constant = examine(evidence[:1], np.zeros(30), p, people(30), ILL, 0, 99)
    assert "no two kinds of label" in constant.shortcuts[0].verdict


def test_the_same_seed_says_the_same_and_the_document_is_plain_json() -> None:
    one, other = (run(3, 50, 0.5, True, 99) for _ in range(2))
    assert one.to_dict() == other.to_dict()
    document = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    site = document["shortcuts"][0]
    assert site["name"] == "site" and site["score"].keys() == {"mean", "low", "high", "n"} and site["verdict"]
    assert document["shortcuts"][-1]["score"] is None and document["shortcuts"][-1]["p"] is None


def test_sessions_of_a_subject_are_not_independent() -> None:
    """Each case four times over: p and interval must not shrink as if there were more people."""
    evidence, y, p, _ = cohort(11, 40, 0.25, True)
    groups = people(40)
    once = named(examine(evidence[:1], y, p, groups, ILL, 0, 199), "site")
    four = [Evidence("site", np.repeat(evidence[0].values, 4, 0), tuple(np.repeat(evidence[0].words, 4)))]
    more = named(examine(four, np.repeat(y, 4), np.repeat(p, 4, 0), list(np.repeat(groups, 4)), ILL, 0, 199), "site")
    assert more.score.high - more.score.low > 0.8 * (once.score.high - once.score.low)
    assert more.p > 0.3 * once.p


def test_evidence_of_a_store(toy_store: Store) -> None:
    cases, _ = find_cases(toy_store, ("flair", "t1"), "lesion")
    spec = TaskSpec("regression", "age", ("flair", "t1"), (), (16, 16, 16))
    found = {e.name: e for e in gather(toy_store, cases, spec)}
    assert list(found) == [
        "data set", "site", "scanner", "contrast set", "voxel size", "position", "background", "mask outline",
    ]  # fmt: skip
    assert found["site"].absent == "the manifest has no column for the site"
    assert found["contrast set"].words == ("t1", *5 * ("flair+t1",))
    assert found["mask outline"].anatomy and not found["background"].anatomy
    made = audit(toy_store, cases, np.arange(6.0), np.arange(6.0), spec, 0, rounds=19)
    assert made.cases == 6 and all("too few cases (6)" in s.verdict or "no column" in s.verdict for s in made.shortcuts)
    with pytest.raises(ConfigError, match=re.escape("audit.columns has age, which is the target itself")):
        gather(toy_store, cases, spec, ["age"])
    with pytest.raises(ConfigError, match="which no case has"):
        gather(toy_store, cases, spec, ["height"])


def test_columns_are_numbers_or_words(people_store: Store) -> None:
    cases, _ = find_cases(people_store, ("t1", "t2"), "tissue")
    spec = TaskSpec("regression", "score", ("t1", "t2"), (), (16, 16, 16))
    found = {e.name: e for e in gather(people_store, cases, spec, ["healthy"])}
    assert found["healthy"].words is not None and "unknown" in found["healthy"].words
