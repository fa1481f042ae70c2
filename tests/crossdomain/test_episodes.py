"""Episodes: their own streams, support and query apart, refusals where a class is small."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainfm.crossdomain.episodes import Shots, draw, load_episodes, save_episodes
from brainfm.crossdomain.layout import TaskTarget
from brainfm.errors import ConfigError, DatasetError

MULTI, BINARY, LABELS = (
    TaskTarget.MULTICLASS_CLASSIFICATION,
    TaskTarget.BINARY_CLASSIFICATION,
    TaskTarget.MULTILABEL_CLASSIFICATION,
)
PLACES = np.arange(90) % 3


def test_each_class_has_its_shots_and_no_image_is_in_both() -> None:
    for episode in draw(PLACES, MULTI, Shots(5, 10, None, 20), 0, "toy"):
        assert np.bincount(episode.support_y).tolist() == [5] * 3 and np.bincount(episode.query_y).tolist() == [10] * 3
        assert not set(episode.support) & set(episode.query) and len(set(episode.query)) == 30
        assert (PLACES[episode.support] == episode.support_y).all() and episode.classes == (0, 1, 2)


def test_an_episode_depends_on_its_number_alone() -> None:
    few, many = (draw(PLACES, MULTI, Shots(5, 10, None, count), 3, "toy") for count in (2, 8))
    assert all(np.array_equal(a.query, b.query) for a, b in zip(few, many))
    other = draw(PLACES, MULTI, Shots(5, 10, None, 2), 4, "toy")
    assert not np.array_equal(few[0].support, other[0].support)
    assert not np.array_equal(few[0].support, draw(PLACES, MULTI, Shots(5, 10, None, 2), 3, "other")[0].support)
    assert not np.array_equal(few[0].support, few[1].support)


def test_fewer_ways_are_numbered_anew() -> None:
    seen = set()
    for episode in draw(PLACES, MULTI, Shots(2, 3, 2, 20), 0, "toy"):
        seen.add(episode.classes)
        assert set(episode.support_y) == {0, 1}
        assert (PLACES[episode.query] == np.array(episode.classes)[episode.query_y]).all()
    assert seen == {(0, 1), (0, 2), (1, 2)}
    with pytest.raises(ConfigError, match="ways=4: toy has 3 classes"):
        draw(PLACES, MULTI, Shots(2, 3, 4, 1), 0, "toy")


def test_pools_are_kept_apart_and_all_that_is_left_can_be_asked() -> None:
    pools = (np.arange(60), np.arange(60, 90))
    episode = draw(PLACES, MULTI, Shots(5, 0, None, 1), 0, "toy", pools)[0]
    assert set(episode.support) < set(range(60)) and sorted(episode.query) == list(range(60, 90))


def test_shots_from_a_range() -> None:
    counts = {len(e.support) // 3 for e in draw(PLACES, MULTI, Shots((1, 4), 5, None, 40), 0, "toy")}
    assert counts == {1, 2, 3, 4}


def test_several_labels_have_enough_with_and_without() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((120, 4)) < [0.5, 0.3, 0.15, 0.6]).astype(np.int64)
    for episode in draw(labels, LABELS, Shots(3, 4, None, 20), 0, "toy"):
        for y, least in ((episode.support_y, 3), (episode.query_y, 4)):
            assert (y.sum(0) >= least).all() and ((1 - y).sum(0) >= least).all() and len(y) <= 8 * least
        assert not set(episode.support) & set(episode.query)
        pruned = [np.delete(episode.support_y, row, axis=0) for row in range(len(episode.support_y))]
        assert all((y.sum(0) < 3).any() or ((1 - y).sum(0) < 3).any() for y in pruned), "none is there for nothing"


@pytest.mark.parametrize(
    ("places", "target", "said"),
    [
        (
            np.array([0] * 20 + [1] * 14),
            BINARY,
            "14 images of class 1 for the support, expected at least 15",
        ),
        (np.array([[0, 1], [1, 1]] * 20), LABELS, "0 images without label 1 for the support"),
    ],
)
def test_too_few_images_are_refused(places: np.ndarray, target: TaskTarget, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        draw(places, target, Shots(5, 10, None, 1), 0, "toy")


def test_episodes_are_kept_without_pickles(tmp_path: Path) -> None:
    episodes = draw(PLACES, MULTI, Shots((1, 4), 5, 2, 6), 0, "toy")
    save_episodes(tmp_path / "e.npz", episodes, {"seed": 0})
    again, about = load_episodes(tmp_path / "e.npz")
    assert about == {"format": 1, "seed": 0} and len(again) == 6
    for a, b in zip(episodes, again):
        assert a.classes == b.classes
        for name in ("support", "query", "support_y", "query_y"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
    (tmp_path / "e.npz").write_bytes(b"no")
    with pytest.raises(DatasetError, match="cannot be read as episodes"):
        load_episodes(tmp_path / "e.npz")
