"""The choice among candidates: it never sees scored cases, prefers the simple, and never ships less than the mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from brainfm.nets.heads import LinearHead
from brainfm.specs import TaskSpec
from brainfm.tasks.whole_head import candidates
from brainfm.tasks.whole_head.candidates import (
    CANDIDATES,
    Side,
    TunedAnswers,
    case_losses,
    choose,
    fit,
    inner_folds,
    simplest,
)
from brainfm.tasks.whole_head.reads import PARTS

AGE = TaskSpec("regression", "age", ("t1",), (), (16, 16, 16), view_mm=4.0)
ILL = TaskSpec("classification", "ill", ("t1",), ("no", "yes"), (16, 16, 16), mode="exclusive", view_mm=4.0)
NAMES = ("tissue/csf", "tissue/grey", "tissue/white", "group/ventricles", "total")


def side(n: int = 40, seed: int = 0, spec: TaskSpec = AGE, told: float = 1.0, seen: float = 0.5) -> Side:
    """Volumes and features that tell of the age, as much as ``told`` and ``seen`` say."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=n)
    volumes = 3 + rng.normal(size=(n, 5)) * 0.1
    volumes[:, 0] += told * 0.3 * hidden
    features = 20 + rng.normal(size=(n, 60))
    features[:, :10] += seen * hidden[:, None]
    y = 50 + 15 * hidden if spec.kind == "regression" else (hidden + rng.normal(size=n) * 0.3 > 0).astype(float)
    mean, std = (float(y.mean()), float(y.std())) if spec.kind == "regression" else (0.0, 1.0)
    return Side(
        spec, y[:, None], tuple(f"p{i:03d}" for i in range(n)), {"volumes": volumes, "features": features},
        {"volumes": NAMES}, mean, std, True, seed,
    )  # fmt: skip


def chosen_of(given: Side, asked=CANDIDATES[:-1], mapped: bool = True, tuned: TunedAnswers | None = None, first=()):
    return choose(given, asked, inner_folds(given, first), mapped, tuned)


def test_the_better_one_is_chosen_and_the_simpler_where_nothing_tells_them_apart() -> None:
    assert chosen_of(side(told=3.0, seen=0.2)).name == "volumes"
    assert chosen_of(side(n=80, told=0.0, seen=1.5)).name == "features"
    alike = side(told=2.0, seen=2.0)
    found = chosen_of(alike)
    assert found.name == "volumes" and found.losses["features"] > found.losses["stacked"]
    both = chosen_of(side(n=200, told=0.2, seen=0.3))
    assert both.name == "stacked" and 0 < both.mixes["stacked"][PARTS.index("volumes")] < 1
    assert both.losses["stacked"] < min(both.losses["volumes"], both.losses["features"])


def test_simplest_is_within_one_standard_error_of_the_paired_difference() -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(1, 9, 30)
    noise = rng.normal(size=30)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # a standard error of 1 / sqrt(30)
    groups = [str(i) for i in range(30)]
    error = 1 / np.sqrt(30)
    assert candidates.standard_error(noise, groups) == pytest.approx(error)
    losses = {"volumes": base + noise + 0.9 * error, "stacked": base}
    assert simplest(losses, groups) == "volumes"
    assert simplest(losses | {"volumes": base + noise + 1.1 * error}, groups) == "stacked"
    assert simplest({"volumes": base + 1e-9, "stacked": base}, groups) == "stacked", "always worse is worse"
    twice = np.concatenate([noise, noise])
    by_subject = candidates.standard_error(twice, groups + groups)
    assert by_subject == pytest.approx(error, rel=0.02), "by subject, not by case"
    assert candidates.standard_error(noise[:4], groups[:4]) == np.inf


def test_nothing_worse_than_the_mean_is_shipped() -> None:
    for seed in range(6):
        found = chosen_of(side(n=12, seed=seed, told=0.0, seen=0.0))
        worse = [name for name in found.losses if found.losses[name] > found.losses["mean"]]
        assert found.name not in worse and found.losses[found.name] <= found.losses["mean"]
    # the answers are permuted, so that what was learned is wrong
    given = side(n=30, told=3.0)
    folds = inner_folds(given)
    wrong = given.answers.copy()
    for away in folds:
        wrong[away] = 100 - wrong[away]
    upside = replace(given, blocks={"volumes": given.blocks["volumes"]})
    parts = candidates.out_of_fold(upside, folds)
    losses = {name: case_losses(replace(upside, answers=wrong), z) for name, z in parts.items()}
    assert losses["volumes"].mean() > losses["mean"].mean()
    assert candidates._best(losses, ["mean", "volumes"], given.groups) == "mean"


def test_every_out_of_fold_answer_is_blind_to_its_own_subject() -> None:
    given = side()
    folds = inner_folds(given)
    assert np.sum(folds, axis=0).tolist() == [1] * 40
    before = candidates.out_of_fold(given, folds)
    poisoned = given.answers.copy()
    poisoned[folds[0]] += 1000.0
    after = candidates.out_of_fold(replace(given, answers=poisoned), folds)
    for name in before:
        assert np.array_equal(before[name][folds[0]], after[name][folds[0]]), name
        assert not np.allclose(before[name][~folds[0]], after[name][~folds[0]]), name
    own = [before["volumes"], before["features"]]
    mixed = candidates._stacked_out_of_fold(given, own, folds)
    again = candidates._stacked_out_of_fold(replace(given, answers=poisoned), own, folds)
    assert np.array_equal(mixed[folds[0]], again[folds[0]]), "shares are those that the other folds choose"


def test_subjects_are_never_on_two_sides_of_an_inner_fold() -> None:
    given = side()
    given = replace(given, groups=tuple(f"p{i // 2:03d}" for i in range(40)))
    for first in ((), ("p003", "p004")):
        folds = inner_folds(given, first)
        assert np.sum(folds, axis=0).tolist() == [1] * 40 and len(folds) == 5
        for away in folds:
            inside = {g for g, out in zip(given.groups, away) if out}
            assert not inside & {g for g, out in zip(given.groups, away) if not out}
        if first:
            assert {g for g, out in zip(given.groups, folds[0]) if out} == set(first)


@pytest.mark.parametrize("spec", [AGE, ILL])
def test_a_fitted_model_answers_as_its_layers_do(spec: TaskSpec) -> None:
    given = side(spec=spec)
    model = fit(given, "features", np.arange(40))
    head = LinearHead(60, model.weight.shape[0])
    head.norm.set(torch.from_numpy(model.mean), torch.from_numpy(model.scale))
    with torch.no_grad():
        head.out.weight.copy_(torch.from_numpy(model.weight))
        head.out.bias.copy_(torch.from_numpy(model.bias))
        x = given.blocks["features"][:7] * 1.1
        found = head(torch.from_numpy(x).float()).numpy()
    assert np.allclose(found, model.logits(x), atol=1e-3)


def test_with_few_subjects_volumes_are_those_of_tissues() -> None:
    few, many = side(n=19), side(n=20)
    kept = [bool(w) for w in np.abs(fit(few, "volumes", np.arange(19)).weight[0])]
    assert kept == [True, True, True, False, True]
    assert np.abs(fit(many, "volumes", np.arange(20)).weight[0]).min() > 0
    assert np.abs(fit(few, "features", np.arange(19)).weight[0]).min() > 0, "features have no names"


def test_volumes_of_a_table_are_shown_and_not_shipped() -> None:
    given = side(told=3.0, seen=1.0)
    found = chosen_of(given, mapped=False)
    assert found.losses["volumes"] < found.losses["features"] and found.name == "features"
    assert "volumes" in found.mixes and "stacked" not in found.mixes and "table" in found.said[0]


def test_without_a_label_map_the_best_of_the_others_answers() -> None:
    found = chosen_of(side(n=80, told=3.0, seen=0.6))
    assert (found.name, found.fallback) == ("volumes", "features")
    blind = chosen_of(side(n=12, told=3.0, seen=0.0, seed=1))
    assert blind.name == "volumes" and blind.fallback == ("features" if blind.losses["features"] <= blind.losses["mean"]
                                                          else "mean")  # fmt: skip


def tuned_answers(given: Side, first: int, error: float) -> TunedAnswers:
    rng = np.random.default_rng(5)
    places = np.arange(first, len(given.answers))
    z = (given.answers[places, 0] - given.mean) / given.std
    return TunedAnswers(places, (z + error * rng.normal(size=len(z)))[:, None])


def test_the_tuned_network_must_be_better_where_it_was_not_trained() -> None:
    given = side(n=120, told=1.0, seen=0.5)
    first = [group for group in given.groups[90:]]
    good = chosen_of(given, CANDIDATES, tuned=tuned_answers(given, 90, 0.05), first=first)
    assert (good.name, good.fallback) == ("tuned", "tuned") and good.mixes["tuned"][PARTS.index("network")] == 1
    bad = chosen_of(given, CANDIDATES, tuned=tuned_answers(given, 90, 3.0), first=first)
    assert bad.name != "tuned" and bad.inner["tuned"] > bad.inner["mean"] and bad.losses["tuned"] == bad.inner["tuned"]
    none = chosen_of(given, CANDIDATES)
    assert none.name == bad.name and "too few training subjects" in none.said[0]
    # the map-free fallback may be the tuned network only where the choice needs no frozen one
    middle = chosen_of(side(n=120, told=4.0, seen=0.1), CANDIDATES,
                       tuned=tuned_answers(side(n=120, told=4.0, seen=0.1), 90, 0.5), first=first)  # fmt: skip
    assert (middle.name, middle.fallback) == ("volumes", "tuned")


def test_balanced_losses_against_loops_and_the_floor_of_classes() -> None:
    given = side(spec=ILL, n=30)
    given = replace(given, answers=(np.arange(30)[:, None] < 6).astype(float))
    logits = np.random.default_rng(0).normal(size=(30, 2))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = [-np.log(p[i, int(i < 6)]) * 30 / 2 / (6 if i < 6 else 24) for i in range(30)]
    assert case_losses(given, logits) == pytest.approx(expected)
    rows = np.arange(30)
    assert case_losses(given, np.tile(candidates.prior(given, rows), (30, 1))).mean() == pytest.approx(np.log(2))
    plain = replace(given, balanced=False)
    share = (6.5 / 31, 24.5 / 31)
    own = case_losses(plain, np.tile(candidates.prior(plain, rows), (30, 1))).mean()
    assert own == pytest.approx(-(6 * np.log(share[0]) + 24 * np.log(share[1])) / 30)


@pytest.mark.parametrize("mode", ["ordinal", "multilabel", "three"])
def test_other_questions_are_chosen_among_too(mode: str) -> None:
    values = {"ordinal": ("1", "2", "3"), "multilabel": ("u", "v"), "three": ("a", "b", "c")}[mode]
    spec = replace(ILL, values=values, mode="exclusive" if mode == "three" else mode)
    given = side(spec=ILL, n=60, told=3.0)
    hidden = given.blocks["volumes"][:, 0]
    cut = np.searchsorted(np.quantile(hidden, [0.33, 0.66]), hidden).astype(float)[:, None]
    answers = np.hstack([cut > 0, cut > 1]).astype(float) if mode == "multilabel" else cut
    if mode == "multilabel":
        answers[::7, 1] = np.nan
    found = chosen_of(replace(given, spec=spec, answers=answers))
    assert found.name == "volumes" and found.losses["volumes"] < found.losses["mean"]
    assert found.prior.shape == (2,) if mode != "three" else (3,)


def test_one_subject_ships_the_mean() -> None:
    given = side(n=2)
    given = replace(given, groups=("p", "p"))
    found = choose(given, CANDIDATES, inner_folds(given), True)
    assert found.name == "mean" and "one training subject" in found.said[0]
