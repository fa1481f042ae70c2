"""Cross-validated ridge in closed form against a plain loop, and permutation tests that keep their promise."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.scoring import permuted_ridge as module
from brainfm.scoring.answers import aurocs
from brainfm.scoring.folds import folds
from brainfm.scoring.intervals import holm, permutation_p, resampled_counts, shuffles
from brainfm.scoring.linear import ridge, standardised
from brainfm.scoring.permuted_ridge import permuted_ridge


def people(n: int) -> list[str]:
    return [f"d/p{i}" for i in range(n)]


def test_closed_form_is_the_loop_over_folds_penalties_and_left_out_rows() -> None:
    rng = np.random.default_rng(0)
    n = 24
    x = rng.normal(size=(n, 5))
    y = np.stack([x[:, 0] + rng.normal(0, 0.5, n), rng.normal(size=n)], axis=1)
    groups = people(n)
    found = permuted_ridge(x, groups, seed=3, repeats=1).answers(y)
    expected = np.zeros_like(y)
    for fold in folds(groups, 5, 3000):
        away = np.isin(groups, fold)
        train, held = (np.clip(rows, -4, 4) / np.sqrt(5) for rows in standardised(x[~away], x[away]))
        for column in range(2):
            known, errors = y[~away, column], []
            for penalty in module._PENALTIES:
                left = [
                    known[i] - ridge(np.delete(train, i, 0), np.delete(known, i), train[[i]], [penalty])[0, 0]
                    for i in range(len(known))
                ]
                errors.append(np.square(left).sum())
            chosen = module._PENALTIES[int(np.argmin(errors))]
            expected[away, column] = ridge(train, known, held, [chosen])[0]
    assert found == pytest.approx(expected)


def test_an_answer_never_depends_on_the_own_label() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 1))
    groups = [f"p{i // 2}" for i in range(30)]
    fit = permuted_ridge(x, groups, 0, repeats=1)
    changed = y.copy()
    changed[[6, 7]] += 100  # both rows of one subject
    assert fit.answers(changed)[[6, 7]] == pytest.approx(fit.answers(y)[[6, 7]])
    assert not np.allclose(fit.answers(changed), fit.answers(y))


def test_a_rare_number_throws_nobody_far_away() -> None:
    """A column that varies by a millionth among the training rows and by 1 in a held-out one."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 2)), rng.normal(size=(30, 1))
    x[:, 1] = 1e-6 * rng.normal(size=30)
    plain = permuted_ridge(x, people(30), 0).answers(y)
    x[4, 1] = 1.0
    assert abs(permuted_ridge(x, people(30), 0).answers(y)[4, 0] - plain[4, 0]) < 5 * y.std()


def test_areas_agree_with_counting_pairs_and_know_when_there_are_none() -> None:
    rng = np.random.default_rng(2)
    truth = (rng.random((20, 3)) < 0.4).astype(float)
    score = rng.integers(0, 5, (20, 3)).astype(float)
    truth[:, 2] = 1
    found = aurocs(truth, score)
    for p in range(2):
        pairs = [(a > b) + 0.5 * (a == b) for a in score[truth[:, p] == 1, p] for b in score[truth[:, p] == 0, p]]
        assert found[p] == pytest.approx(np.mean(pairs))
    assert np.isnan(found[2])


def test_shuffles_move_whole_subjects_and_stay_within_strata() -> None:
    groups = ["a", "a", "b", "b", "c", "d", "e"]
    strata = np.array([0, 1, 0, 1, 0, 0, 1])
    seen = set()
    for order in shuffles(groups, 200, 0, strata):
        assert sorted(order) == list(range(7))
        assert (strata[order] == strata).all()
        assert tuple(order[:2]) in ((0, 1), (2, 3)) and order[6] == 6
        seen.add(tuple(order))
    assert len(seen) == 4
    free = shuffles(groups, 200, 0)
    assert {int(order[6]) for order in free} == {4, 5, 6}


def test_bootstrap_draws_subjects() -> None:
    counts = resampled_counts(["a", "a", "b", "c"], 500, 0)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 3] == 3).all()
    assert counts.mean(axis=0) == pytest.approx([1, 1, 1, 1], abs=0.15)


def test_p_counts_the_observed_in_and_holm_follows_its_table() -> None:
    assert permutation_p(3.0, np.array([1.0, 2.0, 3.0, 4.0, np.nan])) == pytest.approx(3 / 5)
    assert permutation_p(np.nan, np.array([1.0])) == 1
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


def test_p_is_uniform_where_there_is_nothing() -> None:
    """Of 100 cohorts with numbers that mean nothing, about 5 % may fall below .05."""
    below = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n = 40
        fit = permuted_ridge(rng.normal(size=(n, 6)), people(n), seed, repeats=1)
        truth = (rng.random(n) < 0.3).astype(float)
        columns = np.stack([truth, *truth[shuffles(people(n), 99, seed)]], axis=1)
        areas = aurocs(columns, fit.answers(columns, centred=True))
        below += permutation_p(areas[0], areas[1:]) <= 0.05
    assert below <= 11  # the 99th percentile of 100 coins of 5 % is 11


def test_one_subject_cannot_be_held_out() -> None:
    with pytest.raises(ValueError, match="at least two"):
        permuted_ridge(np.zeros((3, 2)), ["a", "a", "a"], 0)
