"""The probe of tasks 6 and 7: SGD by hand, and why the scale of an embedding matters."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.submission.linear_probe import ProbeSpec, probe, scale_of, split
from brainfm.submission.metrics import ovr_auroc, ovr_f1


def heads(count, features=40, spread=1.0, seed=0):
    """Three classes that differ in the first features; an offset common to all, as embeddings have."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x = rng.normal(size=(count, features)) + 3.0
    x[:, :3] += 2.0 * np.eye(3)[labels]
    return x * spread, labels.tolist()


def test_steps_are_those_of_sgd_with_momentum_and_cosine():
    """One rate, two classes, four heads in two batches: every number by hand."""
    x, y = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, -1.0]]), [0, 1, 1, 0]
    spec = ProbeSpec(rates=(0.1,), epochs=2, batch=4, init=0.0)
    found = probe(x, y, x, y, x, spec)
    weight, bias, momentum = np.zeros((2, 2)), np.zeros(2), [np.zeros((2, 2)), np.zeros(2)]
    for step in range(2):
        logits = x @ weight.T + bias
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(2)[y]
        rate = 0.1 * (1 + np.cos(np.pi * step / 2)) / 2
        momentum = [0.9 * momentum[0] + p.T @ x / 4, 0.9 * momentum[1] + p.mean(0)]
        weight, bias = weight - rate * momentum[0], bias - rate * momentum[1]
    logits = x @ weight.T + bias
    by_hand = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found.scores == pytest.approx(by_hand, abs=1e-6)
    assert found.loss == pytest.approx(-np.log(by_hand[range(4), y]).mean(), abs=1e-6)


def asked(spread, scale=False):
    x, y = heads(240)
    validation, v = heads(60, seed=1)
    test, t = heads(150, seed=2)
    parts = [x * spread, validation * spread, test * spread]
    if scale:
        centre, factor = scale_of(heads(80, seed=3)[0] * spread)
        parts = [(part - centre) * factor for part in parts]
    found = probe(parts[0], y, parts[1], v, parts[2])
    return found, ovr_auroc(t, found.scores.tolist()), ovr_f1(t, found.scores.tolist())


def test_the_scale_decides():
    """Tiny vectors are under-trained after 80 steps: the order of the scores may be right and the classes are not."""
    tiny, huge = asked(1e-3), asked(1e3)
    mended = [asked(spread, scale=True) for spread in (1e-3, 1.0, 1e3)]
    assert tiny[2] < 0.4 and tiny[0].loss > 1.05
    assert all(auroc > 0.93 and f1 > 0.8 for _, auroc, f1 in mended)
    assert huge[2] < mended[2][2] - 0.05 or huge[0].loss > 1
    assert mended[0][1:] == pytest.approx(mended[2][1:], abs=0.01)
    assert sum(auroc > 0.9 for auroc in mended[1][0].every) >= 8, "most rates are good ones"


def test_a_layer_that_diverged_is_not_chosen():
    x, y = heads(60, spread=1e18)
    found = probe(x, y, x, y, x, ProbeSpec(rates=(1e-30, 1e20), epochs=5))
    assert found.every[1] == 0 and found.rate == 1e-30


def test_the_probe_repeats():
    x, y = heads(60)
    assert np.array_equal(probe(x, y, x, y, x).scores, probe(x, y, x, y, x).scores)


def test_scale_of_features_that_hardly_vary():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 5)) * [1, 1, 1, 1e-9, 0] + 7
    centre, factor = scale_of(values)
    assert centre == pytest.approx(values.mean(0), abs=1e-5)
    assert factor[:3] == pytest.approx(3 / values.std(0)[:3], rel=1e-5)
    assert np.isfinite(factor).all() and factor[3:].max() < 45
    assert scale_of(values, spread=1.0)[1][:3] == pytest.approx(1 / values.std(0)[:3], rel=1e-5)
    for wrong in (values[:1], np.ones((3, 4)), values[0]):
        with pytest.raises(ValueError, match=r"expected heads|two heads or more"):
            scale_of(wrong)


def test_split_is_by_class_and_complete():
    labels = [0] * 50 + [1] * 20
    parts = split(labels, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(70))
    assert [[labels[i] for i in part].count(1) for part in parts] == [8, 2, 10]
    assert not np.array_equal(parts[0], split(labels, seed=2)[0])


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        probe(np.ones((4, 2)), [0] * 4, np.ones((4, 2)), [0] * 4, np.ones((4, 2)))
