"""Heads, floors, and AUROC over episodes with its intervals."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.crossdomain.episode_scores import (
    Answers,
    episode_auroc,
    harmonic_mean,
    interval,
    over_episodes,
    replicates,
)
from brainfm.crossdomain.heads import HEADS, _folds, centred, columns, forest, logistic, prototypes
from brainfm.crossdomain.layout import TaskTarget
from brainfm.crossdomain.statistics import image_statistics, raw_pixels, shrunk

MULTI = TaskTarget.MULTICLASS_CLASSIFICATION


def clouds(count: int, seed: int, features: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 3
    centres = 2 * np.random.default_rng(99).standard_normal((3, features))
    return centres[y] + rng.standard_normal((count, features)) + 50, y


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_answers_every_kind_of_task(name: str) -> None:
    (x, y), (other, truth) = clouds(15, 0), clouds(60, 1)
    exclusive = columns(y, MULTI, 3)
    answers = HEADS[name](x, exclusive, other, 0)
    assert answers.shape == (60, 3)
    assert episode_auroc(Answers(np.arange(60), columns(truth, MULTI, 3), answers)) > (
        0.6 if name == "linear" else 0.95
    )
    for labels in (exclusive[:, :1], np.stack([y > 0, y == 1], axis=1)):
        wanted = (truth == 0)[:, None] if labels.shape[1] == 1 else np.stack([truth > 0, truth == 1], axis=1)
        answers = HEADS[name](x, labels, other, 0)
        assert answers.shape == wanted.shape
        assert episode_auroc(Answers(np.arange(60), wanted, answers)) > (0.5 if name == "linear" else 0.9)


def test_a_logistic_head_is_the_regression_of_centred_features() -> None:
    from sklearn.linear_model import LogisticRegression

    from brainfm.scoring.linear import LOGISTIC

    (x, y), (other, _) = clouds(20, 0), clouds(10, 1)
    ours = logistic(x, (y == 0)[:, None], other)[:, 0]
    train, rest = centred(x, other)
    theirs = [
        LogisticRegression(C=c, class_weight="balanced", tol=1e-10, max_iter=9999).fit(train, y == 0)
        for c in LOGISTIC
    ]  # fmt: skip
    gaps = [float(np.abs(model.decision_function(rest) - ours).max()) for model in theirs]
    assert min(gaps) < 1e-3, "of one of the strengths"


def test_prototypes_are_the_nearest_mean() -> None:
    (x, y), (other, _) = clouds(15, 0), clouds(9, 1)
    train, rest = centred(x, other)
    means = np.stack([train[y == k].mean(0) for k in range(3)])
    distances = ((rest[:, None] - means) ** 2).sum(2)
    assert np.allclose(prototypes(x, columns(y, MULTI, 3), other), -distances)


def test_one_image_of_a_kind_or_none_is_no_error() -> None:
    (x, y), (other, _) = clouds(7, 0), clouds(9, 1)
    for head in (logistic, prototypes, forest):
        labels = np.stack([np.zeros(7, bool), y == 1, np.arange(7) == 0], axis=1)
        assert np.isfinite(head(x, labels, other, 0)).all()


# ---- intervals -------------------------------------------------------------------------------------------------------


def drawn_answers(count: int, episodes: int, seed: int, shift: float = 1.0) -> list[Answers]:
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.5
    score = truth * shift + rng.standard_normal(count)
    found = []
    for _ in range(episodes):
        rows = rng.permutation(count)[: min(20, count)]
        noisy = score[rows] + 0.3 * rng.standard_normal(len(rows))
        found.append(Answers(rows, truth[rows, None], noisy[:, None]))
    return found


def test_replicates_are_aurocs_of_images_that_count_more_than_once() -> None:
    answers = drawn_answers(30, 1, 0)
    from brainfm.seeds import stream

    rng = stream(0, "bootstrap of episodes of toy")
    images = rng.multinomial(30, np.full(30, 1 / 30), size=50)
    (episode,) = answers
    expected = []
    for counts in images:
        again = np.repeat(np.arange(len(episode.rows)), counts[episode.rows])
        expected.append(episode_auroc(Answers(again, episode.truth[again], episode.scores[again])))
    assert np.allclose(replicates(answers, 30, 0, "toy", 50), expected, atol=1e-6, equal_nan=True)


def test_an_interval_over_images_too_is_wider_where_images_are_few() -> None:
    """Many episodes of 40 images: the draw's own interval shrinks to nothing, the data's does not."""
    answers = drawn_answers(40, 200, 1)
    values = [episode_auroc(each) for each in answers]
    found = interval(values, replicates(answers, 40, 0, "toy", 300))
    assert found.low < np.mean(values) < found.high and found.n == 200
    assert (found.high - found.low) / 2 > 3 * over_episodes(values)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    truth = 0.7602  # P(N(1, 2) > 0) of two normal scores with the noise of an episode, d' = 1 / sqrt(1.09)
    inside = []
    for seed in range(60):
        answers = drawn_answers(60, 20, seed)
        values = [episode_auroc(each) for each in answers]
        found = interval(values, replicates(answers, 60, seed, "toy", 200))
        inside.append(found.low <= truth <= found.high)
    assert np.mean(inside) >= 0.85


def test_differences_are_paired() -> None:
    a = drawn_answers(40, 20, 1)
    b = [Answers(each.rows, each.truth, each.scores + 1e-9) for each in a]
    gap = replicates(a, 40, 0, "toy", 100) - replicates(b, 40, 0, "toy", 100)
    assert np.abs(gap).max() < 1e-9


def test_harmonic_means() -> None:
    assert np.isclose(harmonic_mean(np.array([0.5, 1.0])), 2 / 3)
    assert np.isnan(over_episodes([0.5])) and np.isnan(interval([], np.array([])).mean)


# ---- floors ----------------------------------------------------------------------------------------------------------


def test_floors_have_one_width_a_data_set_and_see_what_differs() -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (4, 1, 30, 45), dtype=np.uint8)
    assert image_statistics(grey).shape == (4, 61) and raw_pixels(grey).shape == (4, 784)
    colour = rng.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    assert image_statistics(colour).shape == (2, 67) and raw_pixels(colour).shape == (2, 3 * 784)
    assert np.isfinite(image_statistics(np.zeros((1, 1, 28, 28), np.uint8))).all()
    assert np.array_equal(image_statistics(grey)[2:3], image_statistics(grey[2:3])), "of the image alone"


def test_shrinking_keeps_the_mean() -> None:
    images = np.random.default_rng(0).random((2, 30, 45)).astype(np.float32)
    for edge in (4, 28, 60):
        small = shrunk(images, edge)
        assert small.shape == (2, edge, edge)
        assert np.allclose(small.mean((1, 2)), images.mean((1, 2)), atol=1e-5)
    assert np.allclose(shrunk(images[:, :, :30], 15)[0, 0, 0], images[0, :2, :2].mean(), atol=1e-6)


def test_folds_inside_the_support_have_their_share_of_every_kind() -> None:
    y = np.repeat(np.eye(3, dtype=bool), 7, axis=0)
    fold = _folds(y, 0)
    assert fold is not None and fold.max() == 4
    counts = np.array([[(y[fold == k].sum(axis=0))] for k in range(5)]).reshape(5, 3)
    assert counts.min() >= 1 and counts.max() <= 2 and np.ptp(counts.sum(axis=1)) <= 1
    assert _folds(np.eye(3, dtype=bool), 0) is None
