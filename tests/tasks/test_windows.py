"""The sliding window against monai's and against its promises."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch

from brainfm.tasks.windows import gaussian_weight, predict_windows, window_slices

PATCH = (12, 10, 8)


class Tiny(torch.nn.Module):
    """A network whose answer depends on where the window lies: padding of the convolutions is seen at its borders."""

    def __init__(self, contrasts: int = 2, classes: int = 3) -> None:
        super().__init__()
        self.first = torch.nn.Conv3d(contrasts, 6, 5, padding=2)
        self.last = torch.nn.Conv3d(6, classes, 3, padding=1)

    def forward(self, image, present):
        return self.last(torch.relu(self.first(image * present[:, :, None, None, None])))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().eval()


@pytest.mark.parametrize("shape", [(24, 20, 16), (12, 10, 8), (48, 10, 8)])
@pytest.mark.parametrize(("overlap", "batch"), [(0.5, 2), (1 / 3, 3), (0.0, 1)])
def test_equals_monai_where_windows_fit(network, shape, overlap, batch):
    """Along axes of whole steps both lie at the same places; elsewhere monai's last window is pushed back alone."""
    shape = tuple(p + int(p * (1 - overlap)) * ((s - p) // p) for s, p in zip(shape, PATCH))
    inferers = pytest.importorskip("monai.inferers")
    image = torch.randn(2, *shape)
    present = torch.tensor([True, True])
    ours = predict_windows(network, image, present, PATCH, overlap=overlap, batch=batch)
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(
            image[None],
            PATCH,
            2,
            lambda x: torch.softmax(network(x, present.expand(len(x), -1)), dim=1),
            overlap=overlap,
            mode="gaussian",
        )[0]
    assert ours.shape == (3, *shape) and ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(ours.sum(0), torch.ones(shape), atol=1e-5)


def test_a_thin_volume_is_padded_with_each_contrasts_minimum(network):
    image = torch.randn(2, 7, 20, 3)
    seen = []

    def spy(patches, present):
        seen.append(patches)
        return network(patches, present)

    out = predict_windows(spy, image, torch.tensor([True, True]), PATCH)
    assert out.shape == (3, 7, 20, 3) and torch.isfinite(out).all()
    for patches in seen:
        assert patches.shape[2:] == PATCH
        for contrast in range(2):
            assert (patches[:, contrast, :2] == image[contrast].min()).all()  # 12 - 7 = 5: two before, three after
            assert (patches[:, contrast, 9:] == image[contrast].min()).all()


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(25, 21, 17), (12, 11, 23), (40, 10, 9)])
def test_windows_cover_evenly_and_are_no_more_than_needed(shape, overlap):
    covered = torch.zeros(shape, dtype=torch.bool)
    windows = list(window_slices(shape, PATCH, overlap))
    for window in windows:
        assert tuple(s.stop - s.start for s in window) == PATCH and all(s.start >= 0 for s in window)
        covered[window] = True
    assert covered.all()
    count = 1
    for axis, (size, patch) in enumerate(zip(shape, PATCH)):
        starts = sorted({window[axis].start for window in windows})
        steps = [b - a for a, b in itertools.pairwise(starts)]
        most = int(patch * (1 - overlap))
        assert starts[0] == 0 and starts[-1] == size - patch
        assert not steps or (max(steps) <= most and max(steps) - min(steps) <= 1)
        assert (len(starts) - 2) * most < size - patch or len(starts) == 1  # one window fewer would leave larger steps
        count *= len(starts)
    assert len(windows) == count
    assert len(list(window_slices(PATCH, PATCH, 0.5))) == 1


def test_weights_are_symmetric_and_positive():
    weight = gaussian_weight((9, 8, 7))
    assert torch.allclose(weight, weight.flip(0, 1, 2)) and weight.min() >= 1e-3 and weight.argmax() > 0
    assert float(gaussian_weight((9, 9, 9))[4, 4, 4]) == 1.0


def test_bfloat16_is_near(network):
    image, present = torch.randn(2, 15, 12, 9), torch.tensor([True, False])
    full = predict_windows(network, image, present, PATCH)
    half = predict_windows(network, image, present, PATCH, autocast=torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.03
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as validation during training does
        assert torch.equal(predict_windows(network, image, present, PATCH), half)


@pytest.mark.parametrize("mirror", [(0,), (2, 0), (0, 1, 2)])
def test_mirrored_windows_are_the_mean_of_every_mirrored_volume(network, mirror):
    """Where the windows lie symmetrically, mirroring each is mirroring the volume and its answer."""
    image, present = torch.randn(2, 18, 15, 12), torch.tensor([True, True])  # a window and half of one along each axis
    got = predict_windows(network, image, present, PATCH, mirror=mirror)
    combinations = itertools.chain.from_iterable(itertools.combinations(mirror, n) for n in range(len(mirror) + 1))
    dims = [[axis + 1 for axis in axes] for axes in combinations]
    want = sum(predict_windows(network, image.flip(d), present, PATCH).flip(d) for d in dims) / len(dims)
    assert len(dims) == 2 ** len(mirror)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, predict_windows(network, image, present, PATCH), atol=1e-3)


@pytest.mark.parametrize("mirror", [(3,), (0, 0), (-1,)])
def test_strange_mirror_axes_are_refused(network, mirror):
    with pytest.raises(ValueError, match="mirror axes from 0, 1 and 2"):
        predict_windows(network, torch.zeros(2, 9, 9, 9), torch.tensor([True, True]), PATCH, mirror=mirror)


@pytest.mark.parametrize(("shape", "overlap", "batch"), [((25, 21, 17), 0.25, 2), ((9, 30, 8), 0.5, 3)])
def test_equals_a_plain_loop_over_single_windows(network, shape, overlap, batch):
    image, present = torch.randn(2, *shape), torch.tensor([True, False])
    grown = [max(s, p) for s, p in zip(shape, PATCH)]
    before = [(g - s) // 2 for g, s in zip(grown, shape)]
    padded = torch.stack([torch.full(grown, float(c.min())) for c in image])
    inner = tuple(slice(b, b + s) for b, s in zip(before, shape))
    padded[(slice(None), *inner)] = image
    total, mass = torch.zeros(3, *grown, dtype=torch.double), torch.zeros(grown, dtype=torch.double)
    for window in window_slices(tuple(grown), PATCH, overlap):
        with torch.no_grad():
            logits = network(padded[(slice(None), *window)][None], present[None])[0]
        total[(slice(None), *window)] += torch.softmax(logits, dim=0).double() * gaussian_weight(PATCH)
        mass[window] += gaussian_weight(PATCH)
    want = (total / mass)[(slice(None), *inner)].float()
    got = predict_windows(network, image, present, PATCH, overlap=overlap, batch=batch)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "present", "overlap", "text"),
    [
        ((2, 9, 9), [True, True], 0.5, r"expected \[M, X, Y, Z\]"),
        ((2, 9, 9, 9), [False, False], 0.5, "contrast present"),
        ((2, 9, 9, 9), [True], 0.5, r"expected \[M, X, Y, Z\]"),
        ((2, 9, 9, 9), [True, True], 1.0, "overlap"),
    ],
)
def test_refusals(network, shape, present, overlap, text):
    with pytest.raises(ValueError, match=text):
        predict_windows(network, torch.zeros(shape), torch.tensor(present), PATCH, overlap=overlap)


# ---- several windows at once -----------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    """What torch may use, whatever the rest of the tests allow it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Watched:
    """A network that waits for a second one at its side, and answers later windows sooner."""

    def __init__(self, network, together=2):
        self.network, self.barrier = network, threading.Barrier(together, timeout=20)
        self.lock, self.running, self.most, self.calls = threading.Lock(), 0, 0, 0
        self.seen = []

    def __call__(self, patches, present):
        with self.lock:
            self.calls, self.running = self.calls + 1, self.running + 1
            call, self.most = self.calls, max(self.most, self.running)
            self.seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        self.barrier.wait()
        time.sleep(0.02 * (call % 2))
        logits = self.network(patches, present)
        with self.lock:
            self.running -= 1
        return logits


@pytest.mark.parametrize("batch", [1, 2])
def test_two_at_once_sum_up_as_one_after_the_other(network, two_threads, batch):
    image, present = torch.randn(2, 24, 15, 12), torch.tensor([True, True])  # 12 windows
    watched = Watched(network)
    got = predict_windows(watched, image, present, PATCH, batch=batch)
    assert watched.calls == 12 // batch and watched.most == 2
    assert set(watched.seen) == {(1, False, False)} and torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(got, predict_windows(network, image, present, PATCH, batch=batch))


def test_a_thread_of_the_caller_is_enough_for_one_thread_or_one_window(network, two_threads):
    who = set()

    def spy(patches, present):
        who.add(threading.get_ident())
        return network(patches, present)

    present = torch.tensor([True, True])
    predict_windows(spy, torch.randn(2, *PATCH), present, PATCH)
    torch.set_num_threads(1)
    predict_windows(spy, torch.randn(2, 24, 20, 16), present, PATCH)
    assert who == {threading.get_ident()}


def test_other_threads_compute_in_the_precision_around_them(network, two_threads):
    image, present = torch.randn(2, 24, 10, 8), torch.tensor([True, True])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = predict_windows(network, image, present, PATCH)
        torch.set_num_threads(1)
        assert torch.equal(got, predict_windows(network, image, present, PATCH))
    assert not torch.equal(got, predict_windows(network, image, present, PATCH))


def test_what_a_network_raises_is_raised_and_threads_are_as_before(network, two_threads):
    calls, threads = [], threading.active_count()

    def broken(patches, present):
        calls.append(len(patches))
        if len(calls) == 3:
            raise MemoryError("no room for the third window")
        return network(patches, present)

    with pytest.raises(MemoryError, match="the third window"):
        predict_windows(broken, torch.randn(2, 60, 20, 16), torch.tensor([True, True]), PATCH, batch=1)
    assert len(calls) <= 6  # of 81: it stops
    assert torch.get_num_threads() == 2 and threading.active_count() == threads


def test_slack_spares_the_windows_that_a_few_voxels_would_cost() -> None:
    """The region of a real task: 30 windows for 54, which still cover it and overlap by .475."""
    shape, edges = (146, 174, 289), (96, 96, 96)
    assert len(list(window_slices(shape, edges, 0.5))) == 54
    windows = list(window_slices(shape, edges, 0.5, slack=0.05))
    assert len(windows) == 30
    for axis, size in enumerate(shape):
        starts = sorted({window[axis].start for window in windows})
        assert starts[0] == 0 and starts[-1] + 96 == size
        assert max(b - a for a, b in itertools.pairwise(starts)) <= 96 * 0.525 + 1
