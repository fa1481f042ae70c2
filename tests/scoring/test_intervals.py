"""Intervals and tests by subject: against naive loops, closed forms and simulated cohorts."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from brainfm.scoring.answers import auroc
from brainfm.scoring.intervals import (
    bootstrap,
    crossed_bootstrap,
    crossed_scores,
    ends,
    mean_score,
    paired_bootstrap,
    paired_permutation,
)
from brainfm.seeds import stream


def names(n: int) -> list[str]:
    return [f"sub-{i:03d}" for i in range(n)]


def shifted(values: np.ndarray) -> float:
    """A metric of one array that is no mean."""
    return float(np.median(values))


def test_the_bootstrap_of_a_mean_is_the_closed_form() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 200)
    found = bootstrap(np.mean, values, groups=names(200), seed=1)
    half = 1.96 * values.std() / math.sqrt(200)
    assert found.mean == pytest.approx(values.mean()) and found.n == 200
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap(np.mean, values, groups=names(200), seed=1) == found
    assert bootstrap(np.mean, values, groups=names(200), seed=2) != found


def test_the_bootstrap_against_a_loop_that_draws_subject_by_subject() -> None:
    """Same stream, rows gathered one after the other; the subjects have one, two and three sessions."""
    rng = np.random.default_rng(1)
    groups = [f"s{i}" for i in range(9) for _ in range(1 + i % 3)]
    groups = [groups[i] for i in rng.permutation(len(groups))]
    values, weights = rng.random(len(groups)), rng.random(len(groups))

    def metric(v: np.ndarray, w: np.ndarray) -> float:
        return float((v * w).sum() / w.sum())

    found = bootstrap(metric, values, weights, groups=groups, seed=5, resamples=300)
    generator, subjects, results = stream(5, "bootstrap by subject"), sorted(set(groups)), []
    for _ in range(300):
        v, w = [], []
        for number in generator.integers(len(subjects), size=len(subjects)):
            for row, name in enumerate(groups):
                if name == subjects[number]:
                    v.append(values[row])
                    w.append(weights[row])
        results.append(metric(np.array(v), np.array(w)))
    tail = norm.cdf(student.ppf(0.025, 8) * math.sqrt(9 / 8))  # 0.7 % of each side for nine subjects
    low, high = np.percentile(results, [100 * tail, 100 - 100 * tail])
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_sessions_of_a_subject_are_not_counted_as_subjects() -> None:
    """Ten sessions that say the same are worth one: the interval must not shrink."""
    values = np.random.default_rng(2).normal(size=30)
    once = bootstrap(np.mean, values, groups=names(30), seed=0)
    tenfold = bootstrap(np.mean, np.repeat(values, 10), groups=[n for n in names(30) for _ in range(10)], seed=0)
    assert (tenfold.low, tenfold.high) == pytest.approx((once.low, once.high))
    naive = bootstrap(np.mean, np.repeat(values, 10), groups=names(300), seed=0)
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_strata_keep_their_sizes() -> None:
    truth = np.array([1] * 4 + [0] * 26)
    strata = [str(t) for t in truth]
    sizes: set[int] = set()

    def count(t: np.ndarray) -> float:
        sizes.add(int(t.sum()))
        return float(t.mean())

    found = bootstrap(count, truth, groups=names(30), seed=0, strata=strata, resamples=100)
    assert sizes == {4} and found.low == found.high == pytest.approx(4 / 30)
    by_subject = dict(zip(names(30), strata))
    values = np.random.default_rng(3).random(30)
    first, second = (
        bootstrap(np.mean, values, groups=names(30), seed=0, strata=given) for given in (strata, by_subject)
    )
    assert first == second
    bootstrap(count, truth, groups=names(30), seed=0, resamples=100)
    assert len(sizes) > 3


def test_a_subject_of_two_strata_is_drawn_whole() -> None:
    groups, truth = ["a", "a", "b", "c", "d", "e"], np.array([0, 1, 0, 0, 1, 1])

    def metric(t: np.ndarray) -> float:
        assert t.sum() == 3 and len(t) == 6
        return 0.0

    bootstrap(metric, truth, groups=groups, seed=0, strata=[str(t) for t in truth], resamples=50)


def test_undefined_resamples_are_left_out_and_too_many_make_the_ends_nan() -> None:
    rng = np.random.default_rng(4)
    truth, score = np.array([1, 1, 1] + [0] * 27), rng.random(30)
    found = bootstrap(auroc, truth, score, groups=names(30), seed=0)  # about 4 % draw no positive
    assert 0 <= found.low < found.mean < found.high <= 1
    lonely = bootstrap(lambda t: 1.0 if t.sum() > 4 else math.nan, truth, groups=names(30), seed=0)
    assert math.isnan(lonely.low) and math.isnan(lonely.high) and math.isnan(lonely.mean) and lonely.n == 30


def test_the_interval_of_a_small_cohort_holds_the_truth_about_as_often_as_it_says() -> None:
    """Cohorts of 10 subjects, whose plain percentiles hold the truth in fewer than 91 of 100."""
    rng, inside, plain = np.random.default_rng(6), 0, 0
    for seed in range(250):
        values = rng.normal(size=10)
        found = bootstrap(np.mean, values, groups=names(10), seed=seed, resamples=200)
        inside += found.low <= 0 <= found.high
        low, high = np.percentile(values[rng.integers(10, size=(200, 10))].mean(axis=1), [2.5, 97.5])
        plain += low <= 0 <= high
    assert 0.91 <= inside / 250 <= 0.98
    assert plain < inside


def test_auroc_of_200_cases_is_resampled_2000_times_within_two_seconds() -> None:
    rng = np.random.default_rng(7)
    truth = rng.integers(0, 2, 200)
    score = truth + rng.normal(0, 1.5, 200)
    began = time.process_time()
    found = bootstrap(auroc, truth, score, groups=names(200), seed=0, resamples=2000)
    assert time.process_time() - began < 2
    share = found.mean  # Hanley & McNeil 1982: the standard error of an AUROC
    q1, q2 = share / (2 - share), 2 * share**2 / (1 + share)
    n, m = truth.sum(), 200 - truth.sum()
    error = math.sqrt((share * (1 - share) + (n - 1) * (q1 - share**2) + (m - 1) * (q2 - share**2)) / (n * m))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_paired_differences_are_surer_than_the_models_alone() -> None:
    rng = np.random.default_rng(8)
    hardness = rng.normal(0.6, 0.2, 60)
    a, b = hardness + 0.03 + rng.normal(0, 0.02, 60), hardness + rng.normal(0, 0.02, 60)
    none = np.zeros(60)
    found = paired_bootstrap(mean_score, none, a, b, names(60), seed=0)
    assert found.mean == pytest.approx((a - b).mean()) and found.low > 0
    alone = bootstrap(np.mean, a, groups=names(60), seed=0)
    assert found.high - found.low < 0.3 * (alone.high - alone.low)
    same = paired_bootstrap(mean_score, none, a, a, names(60), seed=0)
    assert same.low == same.high == same.mean == 0


def test_paired_permutation_against_all_exchanges_by_hand() -> None:
    """Six subjects, two of them with two sessions: 64 exchanges."""
    rng = np.random.default_rng(9)
    groups = ["a", "b", "b", "c", "d", "d", "e", "f"]
    truth = np.array([0, 1, 1, 0, 1, 0, 0, 1])
    a, b = rng.random(8), rng.random(8)
    observed = abs(auroc(truth, a) - auroc(truth, b))
    count = 0
    for exchange in itertools.product((False, True), repeat=6):
        swap = dict(zip("abcdef", exchange))
        x = np.array([b[i] if swap[g] else a[i] for i, g in enumerate(groups)])
        y = np.array([a[i] if swap[g] else b[i] for i, g in enumerate(groups)])
        count += abs(auroc(truth, x) - auroc(truth, y)) >= observed - 1e-12
    assert paired_permutation(auroc, truth, a, b, groups, seed=0) == pytest.approx(count / 64)
    drawn = paired_permutation(auroc, truth, a, b, groups, seed=0, rounds=63)
    assert drawn == pytest.approx(count / 64, abs=0.2)


def test_a_clear_difference_of_every_subject_has_the_smallest_p() -> None:
    a, b = np.full(8, 0.9) + np.arange(8) / 100, np.full(8, 0.5)
    assert paired_permutation(mean_score, np.zeros(8), a, b, names(8), seed=0) == pytest.approx(2 / 2**8)
    assert paired_permutation(mean_score, np.zeros(8), a, a, names(8), seed=0) == 1
    many = names(40)
    p = paired_permutation(mean_score, np.zeros(40), np.linspace(0.8, 0.9, 40), np.full(40, 0.5), many, 0, rounds=500)
    assert p == pytest.approx(1 / 501)


def test_answers_with_several_columns_change_places_whole() -> None:
    a, b = np.eye(3)[[0, 1, 2, 0]], np.full((4, 3), 1 / 3)

    def metric(_truth: np.ndarray, p: np.ndarray) -> float:
        assert set(np.round(p.max(axis=1), 6)) <= {1.0, round(1 / 3, 6)}
        return float(p.max(axis=1).mean())

    assert paired_permutation(metric, np.zeros(4), a, b, names(4), seed=0) == pytest.approx(2 / 16)


def test_false_alarms_of_the_permutation_test_are_as_rare_as_it_says() -> None:
    rng = np.random.default_rng(10)
    truth = np.array([0, 1] * 15)
    alarms = 0
    for seed in range(120):
        hardness = truth + rng.normal(0, 1, 30)
        a, b = hardness + rng.normal(0, 0.5, 30), hardness + rng.normal(0, 0.5, 30)
        alarms += paired_permutation(auroc, truth, a, b, names(30), seed, rounds=99) <= 0.05
    assert alarms / 120 <= 0.11  # 0.05 and three standard errors


def test_an_undefined_difference_has_no_p() -> None:
    ones = np.ones(6)
    assert math.isnan(paired_permutation(auroc, ones, np.arange(6.0), ones, names(6), seed=0))


def test_rows_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found \[3, 3\] rows and 2 subjects"):
        bootstrap(auroc, np.zeros(3), np.zeros(3), groups=["a", "b"], seed=0)
    with pytest.raises(ValueError, match="found \\[0\\] rows and 0 subjects"):
        bootstrap(np.mean, np.zeros(0), groups=[], seed=0)
    with pytest.raises(ValueError, match="found 1 for 2 cases"):
        bootstrap(np.mean, np.zeros(2), groups=["a", "b"], seed=0, strata=["x"])
    with pytest.raises(ValueError, match="one shape can change places"):
        paired_permutation(mean_score, np.zeros(2), np.zeros(2), np.zeros((2, 1)), ["a", "b"], 0)


def test_one_subject_alone_has_an_interval_without_width() -> None:
    found = bootstrap(shifted, np.array([0.2, 0.6, 0.7]), groups=["a"] * 3, seed=0)
    assert found.low == found.high == found.mean == pytest.approx(0.6)


def test_the_crossed_bootstrap_against_a_loop_over_the_drawn_runs_and_subjects() -> None:
    scores = np.random.default_rng(2).random((3, 4))
    found = crossed_bootstrap(scores, seed=4, resamples=400)
    generator = stream(4, "crossed bootstrap")
    rows = generator.multinomial(3, [1 / 3] * 3, size=400)
    columns = generator.multinomial(4, [1 / 4] * 4, size=400)
    means = []
    for of_run, of_subject in zip(rows, columns):
        picked = [np.repeat(np.arange(n), of) for n, of in ((3, of_run), (4, of_subject))]
        drawn = [scores[r, s] for r in picked[0] for s in picked[1]]
        assert len(drawn) == 12
        means.append(np.mean(drawn))
    tail = norm.cdf(student.ppf(0.025, 2) * math.sqrt(3 / 2))  # as for three
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])))
    assert found.mean == pytest.approx(scores.mean()) and found.n == 12


def test_the_crossed_bootstrap_of_one_subject_is_over_runs_and_of_one_score_has_no_width() -> None:
    column = np.array([[0.2], [0.4], [0.9]])
    alone = crossed_bootstrap(column, seed=0)
    repeated = crossed_bootstrap(np.repeat(column, 30, axis=1), seed=0)  # subjects who do not differ add nothing
    assert 0.2 <= alone.low < alone.mean < alone.high <= 0.9
    assert (repeated.low, repeated.high) == pytest.approx((alone.low, alone.high), abs=0.02)
    one = crossed_bootstrap(np.array([[0.3]]), seed=0)
    assert (one.low, one.mean, one.high) == (0.3, 0.3, 0.3)
    with pytest.raises(ValueError, match="expected finite scores of trainings by subjects"):
        crossed_bootstrap(np.array([[0.1, np.nan]]), seed=0)
    with pytest.raises(ValueError, match="expected finite scores"):
        crossed_bootstrap(np.zeros((0, 3)), seed=0)


def test_the_crossed_interval_holds_the_truth_where_subjects_alone_do_not() -> None:
    """Five runs that differ by .05, ten subjects that differ by .03."""
    rng, crossed, subjects = np.random.default_rng(0), 0, 0
    for _ in range(300):
        noise = 0.03 * rng.standard_normal((5, 10))
        scores = 0.05 * rng.standard_normal((5, 1)) + 0.03 * rng.standard_normal((1, 10)) + noise
        found = crossed_bootstrap(scores, seed=0, resamples=3000)
        crossed += found.low <= 0 <= found.high
        means = scores.mean(axis=0)
        half = student.ppf(0.975, 9) * means.std(ddof=1) / math.sqrt(10)
        subjects += abs(means.mean()) <= half
    assert crossed >= 0.92 * 300 and subjects <= 0.75 * 300


def test_ends_move_outwards_for_few_subjects_and_leave_undefined_resamples_out() -> None:
    drawn = np.random.default_rng(0).normal(size=20_000)
    plain = np.quantile(drawn, [0.025, 0.975])
    few, many = ends(drawn, 6), ends(drawn, 2000)
    assert few[0] < plain[0] - 0.3 and few[1] > plain[1] + 0.3
    assert np.allclose(many, plain, atol=0.02)
    assert ends(np.concatenate([drawn, np.full(1000, np.nan)]), 6) == few
    assert np.isnan(ends(np.array([1.0, np.nan, np.nan]), 6)).all() and np.isnan(ends(np.full(3, np.nan), 6)).all()


# ---- several models, in the same cohorts -----------------------------------------------------------------------------


def test_crossed_scores_of_means_are_the_crossed_bootstrap() -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.normal(0.7, 0.1, (4, 1)) + rng.normal(0, 0.1, (1, 15)) + rng.normal(0, 0.02, (4, 15)) for _ in "ab")
    people = names(15)
    found = crossed_scores(mean_score, np.zeros(15), [a, b], people, seed=0)
    for mine, theirs in (
        (found.interval(0), crossed_bootstrap(a, 0)),
        (found.interval(0, 1), crossed_bootstrap(a - b, 0)),
    ):
        width = theirs.high - theirs.low
        assert mine.mean == pytest.approx(theirs.mean) and mine.n == 60
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.12 * width)
    # a person with two sessions is drawn with both
    twice = crossed_scores(
        mean_score, np.zeros(30), [np.repeat(a, 2, axis=1)], [n for n in people for _ in "ab"], seed=0
    )
    assert twice.interval(0).high - twice.interval(0).low == pytest.approx(
        found.interval(0).high - found.interval(0).low, rel=0.1
    )


def test_crossed_scores_of_an_auroc_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(5)
    truth = np.arange(12) % 2
    answers = truth + rng.normal(0, 1, (3, 12))

    def metric(right: np.ndarray, given: np.ndarray) -> float:
        return auroc(right, given)

    found = crossed_scores(metric, truth, [answers, answers[::-1]], names(12), seed=0, resamples=400)
    assert found.interval(0).mean == pytest.approx(np.mean([auroc(truth, row) for row in answers]))
    assert found.interval(0).low < found.interval(0).mean < found.interval(0).high <= 1
    assert found.interval(0, 1).mean == pytest.approx(0)
    alone = crossed_scores(metric, np.array([0, 1]), [answers[:, :2]], names(2), seed=0, resamples=200)
    assert math.isnan(alone.interval(0).low)  # half of the cohorts have one class alone
    with pytest.raises(ValueError, match="expected answers of models by trainings by cases"):
        crossed_scores(metric, truth, [answers], names(11), seed=0)
