"""Linear models against scikit-learn and loops, and what nesting promises: no subject teaches its own answer."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.scoring import linear
from brainfm.scoring.folds import folds_by_answer


def cohort(n: int = 60, features: int = 12, visits: int = 1) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(n * visits, features)), [f"s{i:03d}" for i in range(n) for _ in range(visits)]


def test_logistic_of_two_and_three_classes_equals_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression

    x, _ = cohort(80, 10)
    for k in (2, 3):
        y = np.random.default_rng(k).choice(k, 80, p=[0.6, 0.4] if k == 2 else [0.5, 0.3, 0.2])
        for balanced in (True, False):
            path = linear.logistic(x[:60], y[:60], x[60:], k, (0.01, 1.0, 100.0), balanced)
            for found, strength in zip(path, (0.01, 1.0, 100.0)):
                model = LogisticRegression(
                    C=strength, class_weight="balanced" if balanced else None, tol=1e-10, max_iter=5000
                )
                wanted = model.fit(x[:60], y[:60]).predict_proba(x[60:])
                np.testing.assert_allclose(found, wanted, atol=1e-5 if k == 2 else 5e-3)


@pytest.mark.parametrize("k", [2, 3])
def test_a_tolerance_lets_the_fit_stop_where_scikit_learn_would(k: int) -> None:
    from sklearn.linear_model import LogisticRegression

    x, _ = cohort(200, 10)
    y = np.random.default_rng(k).choice(k, 200)
    weight = linear.row_weights(y, k, balanced=True)
    (early,) = linear.fit_logistic(x, y, weight, tolerance=1e-2, steps=30)
    model = LogisticRegression(class_weight="balanced", tol=1e-2, max_iter=30).fit(x, y)
    np.testing.assert_allclose(early, np.column_stack([model.coef_, model.intercept_]), atol=1e-12)
    (best,) = linear.fit_logistic(x, y, weight)
    assert best.shape == early.shape and 1e-6 < np.abs(best - early).max() < 0.05


def test_separable_classes_do_not_run_away() -> None:
    x = np.array([[-2.0], [-1.0], [1.0], [2.0]])
    found = linear.logistic(x, np.array([0, 0, 1, 1]), np.array([[-1.5], [0.0], [1.5]]), 2, (1.0, 1e6))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 1], 0.5, atol=1e-6)
    assert found[1, 0, 0] > 0.99 and found[1, 2, 1] > 0.99


def test_a_class_nobody_shows_in_training_gets_nothing() -> None:
    x, _ = cohort(30, 4)
    y = np.random.default_rng(0).choice([0, 3], 30)
    found = linear.logistic(x, y, x, 5)
    assert found.shape == (1, 30, 5) and (found[..., [1, 2, 4]] == 0).all()
    np.testing.assert_allclose(found.sum(axis=2), 1)
    assert (linear.logistic(x, np.full(30, 3), x, 5)[..., 3] == 1).all()


def test_ridge_equals_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    for features in (5, 90):  # fewer and more than rows
        x, _ = cohort(40, features)
        y = x[:, 0] * 3 + 7 + np.random.default_rng(2).normal(size=40)
        found = linear.ridge(x[:30], y[:30], x[30:], (0.1, 10.0))
        for values, penalty in zip(found, (0.1, 10.0)):
            np.testing.assert_allclose(values, Ridge(alpha=penalty).fit(x[:30], y[:30]).predict(x[30:]), rtol=1e-6)


def test_neighbours_equal_a_loop() -> None:
    x, _ = cohort(30, 3)
    y, values = np.random.default_rng(3).integers(0, 3, 20), np.random.default_rng(4).normal(size=20)
    weight = 1 / np.bincount(y)
    shares = linear.neighbours(x[:20], y, x[20:], (1, 5, 99), 3)
    means = linear.neighbours(x[:20], values, x[20:], (1, 5, 99))
    for row, place in enumerate(x[20:]):
        order = sorted(range(20), key=lambda i: float(((x[i] - place) ** 2).sum()))
        for s, count in enumerate((1, 5, 20)):
            votes = np.zeros(3)
            for i in order[:count]:
                votes[y[i]] += weight[y[i]]
            np.testing.assert_allclose(shares[s, row], votes / votes.sum())
            assert means[s, row] == pytest.approx(np.mean([values[i] for i in order[:count]]))


@pytest.mark.parametrize("kind", linear.KINDS)
def test_units_change_nothing(kind: str) -> None:
    x, groups = cohort(40, 70)
    y = (x[:, 0] > 0).astype(int) if kind != "ridge" else x[:, 0]
    folds = folds_by_answer(groups, y, 4, 0)
    found = linear.nested(x, y, groups, folds, kind)
    np.testing.assert_allclose(linear.nested(x * 1000 + 3, y, groups, folds, kind), found, atol=1e-6)


def test_rotation_loses_nothing() -> None:
    x, _ = cohort(50, 60)
    y = np.random.default_rng(5).integers(0, 2, 20)
    short, other = linear.rotated(x[:20], x[20:])
    assert short.shape == (20, 20) and other.shape == (30, 20)
    np.testing.assert_allclose(linear.logistic(short, y, other, 2), linear.logistic(x[:20], y, x[20:], 2), atol=1e-6)
    wanted = linear.ridge(x[:20], y.astype(float), x[20:], (1.0,))
    np.testing.assert_allclose(linear.ridge(short, y.astype(float), other, (1.0,)), wanted, atol=1e-9)
    near = linear.neighbours(x[:20], y, x[20:], (3,), 2)
    np.testing.assert_array_equal(linear.neighbours(short, y, other, (3,), 2), near)


def test_what_is_in_the_features_is_found_and_noise_is_not() -> None:
    x, groups = cohort(80, 30, visits=2)
    person = np.repeat(np.random.default_rng(6).normal(size=80), 2)
    y = (person > 0).astype(int)
    folds = folds_by_answer(groups, y, 5, 0)
    told = np.hstack([x, 2 * person[:, None]])
    for kind in ("logistic", "knn"):
        knows, noise = (linear.nested(rows, y, groups, folds, kind).argmax(axis=1) == y for rows in (told, x))
        assert knows.mean() > (0.8 if kind == "logistic" else 0.6)
        assert 0.3 < noise.mean() < 0.7
    assert np.corrcoef(linear.nested(told, person, groups, folds, "ridge"), person)[0, 1] > 0.95
    noise = linear.nested(x, person, groups, folds, "ridge")
    assert np.abs(noise - person).mean() < 1.1 * np.abs(person - person.mean()).mean()  # tuned down to the mean


@pytest.mark.parametrize("kind", linear.KINDS)
def test_nothing_of_a_subject_teaches_its_own_answer(kind: str) -> None:
    """Changing one subject's answers, features of other rows being equal, leaves the answers for it as they were."""
    x, groups = cohort(30, 8, visits=2)
    y = np.random.default_rng(7).integers(0, 2, 60)
    values = y + np.random.default_rng(8).normal(size=60) if kind == "ridge" else y
    folds = folds_by_answer(groups, y, 5, 0)
    found = linear.nested(x, values, groups, folds, kind)
    own = np.array([g == "s007" for g in groups])
    other = values.copy()
    other[own] = 1 - other[own]
    mates = np.isin(groups, next(fold for fold in folds if "s007" in fold))
    again = linear.nested(x, other, groups, folds, kind)
    np.testing.assert_array_equal(again[mates], found[mates])
    assert (again[~mates] != found[~mates]).any()
    moved = x.copy()
    moved[own] += 5  # features of the held-out fold must not reach the scaling
    np.testing.assert_array_equal(linear.nested(moved, values, groups, folds, kind)[mates & ~own], found[mates & ~own])


def test_a_name_in_the_features_does_not_help() -> None:
    """Features that tell who it is, and nothing else: inner folds by subject must see through them."""
    names = np.repeat(np.eye(40), 3, axis=0)
    groups = [f"s{i}" for i in range(40) for _ in range(3)]
    value = np.repeat(np.random.default_rng(9).normal(size=40), 3)
    found = linear.nested(names, value, groups, folds_by_answer(groups, value, 5, 0), "ridge")
    assert np.abs(found - value).mean() > 0.95 * np.abs(value - value.mean()).mean()
    chosen = linear.tuned(names[:90], value[:90], groups[:90], names[90:], "ridge").strength
    assert chosen == max(linear._RIDGE)


def test_the_strength_is_the_one_with_the_least_inner_loss() -> None:
    x, groups = cohort(50, 6)
    y = 3 * x[:, 0] + np.random.default_rng(10).normal(size=50)
    found = linear.tuned(x, y, groups, x[:5], "ridge", 3)
    losses = []
    for penalty in linear._RIDGE:
        loss = 0.0
        for fold in folds_by_answer(groups, y, 5, 3):
            away = np.isin(groups, fold)
            train, other = linear.standardised(x[~away], x[away])
            scale = np.sqrt(6)
            loss += ((linear.ridge(train / scale, y[~away], other / scale, (penalty,))[0] - y[away]) ** 2).sum()
        losses.append(loss)
    assert found.strength == linear._RIDGE[int(np.argmin(losses))]


def test_the_same_rows_give_the_same_answers_in_any_order() -> None:
    x, groups = cohort(40, 50)
    y = (x[:, 1] > 0).astype(int)
    folds = folds_by_answer(groups, y, 4, 0)
    found = linear.nested(x, y, groups, folds)
    np.testing.assert_array_equal(linear.nested(x, y, groups, folds), found)
    order = np.random.default_rng(11).permutation(40)
    again = linear.nested(x[order], y[order], [groups[i] for i in order], folds[::-1])
    np.testing.assert_allclose(again, found[order], atol=1e-7)


def test_too_few_for_tuning_still_answers() -> None:
    x = np.random.default_rng(12).normal(size=(3, 4))
    found = linear.nested(x, np.array([0, 1, 1]), ["a", "b", "c"], [["a"], ["b"], ["c"]], classes=2)
    assert np.isfinite(found).all() and found.shape == (3, 2)
    assert linear.tuned(x[:1], np.array([5.0]), ["a"], x, "ridge").answers.tolist() == [5.0] * 3


def test_refusals() -> None:
    x, groups = cohort(10, 3)
    y = np.arange(10) % 2
    folds = [groups[:5], groups[5:]]
    with pytest.raises(ValueError, match="kind='svm': expected one of logistic, ridge, knn"):
        linear.nested(x, y, groups, folds, "svm")
    with pytest.raises(ValueError, match=r"2 subjects are not in exactly one fold, e.g. s003"):
        linear.nested(x, y, groups, [groups[:5], [*groups[5:9], "s003"]])
    with pytest.raises(ValueError, match="nothing is left to learn from"):
        linear.nested(x, y, groups, [groups])
    with pytest.raises(ValueError, match="classes are whole numbers"):
        linear.nested(x, y + 0.5, groups, folds)
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 3 features are not always finite"):
        linear.nested(x, y, groups, folds)
    with pytest.raises(ValueError, match=r"expected features \[10, F\], found shape \(9, 3\)"):
        linear.nested(x[:9], y, groups, folds)
