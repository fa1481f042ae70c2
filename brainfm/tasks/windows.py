"""Sliding windows: a volume of any size through a network that was trained on patches."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

# (image [B, M, X, Y, Z], present [B, M]) -> logits [B, K, X, Y, Z] on the same device
Network = Callable[[Tensor, Tensor], Tensor]
Window = tuple[slice, slice, slice]

# Groups of windows in work at once on a CPU: with two, four contrasts at 96 voxels through unet_b stay under 3 GB.
_AT_ONCE = 2


@torch.no_grad()
def predict_windows(
    network: Network,
    image: Tensor,
    present: Tensor,
    patch_vox: tuple[int, int, int],
    *,
    overlap: float = 0.5,
    batch: int = 2,
    sigma: float = 0.125,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    mirror: Collection[int] = (),
    at_once: int | None = None,
    slack: float = 0.0,
) -> Tensor:
    """Class probabilities of a whole volume: the Gaussian-weighted mean over overlapping windows.

    The volume and the sums stay in main memory; only ``batch`` windows at a time are on a GPU. On a CPU of which torch
    may use several threads two such groups are computed at once, each by half of the threads, which then wait less for
    one another, in up to twice the memory. The result does not depend on which is done first. A volume thinner than the
    patch is padded on both sides with each contrast's minimum, as the training patches are, and the padding is cut off
    again. No window is skipped: prepared volumes are cropped to the head, so that empty ones are rare.

    Args:
        network: gives logits; it must already be on ``device`` and in evaluation mode. On a CPU it is called from
            several threads at once.
        image: [M, X, Y, Z] standardised voxels in main memory.
        present: [M] bool; which contrasts there are, at least one.
        patch_vox: edge lengths of a window.
        overlap: share of a window that the next one along an axis repeats, in [0, 1).
        batch: windows a forward pass.
        sigma: standard deviation of the weights as a share of the window.
        autocast: bfloat16 or float16 computes the network in that precision, None leaves a surrounding autocast as it
            is; sums are float32 always.
        mirror: axes (0 is X) along which each window is also shown mirrored; probabilities are averaged over all
            combinations, which are 2 ** axes passes.
        at_once: groups of windows in work at once; None: as above.
        slack: see window_slices.

    Returns:
        [K, X, Y, Z] float32 in main memory; sums to 1 over K.

    Raises:
        ValueError: where the shapes do not fit, no contrast is present, or the overlap is not in [0, 1), or ``mirror``
            names other axes than 0, 1 and 2 or one twice.

    Source: the weights are those of monai.inferers.sliding_window_inference(mode="gaussian"), and so is the number of
        windows; where they lie, see window_slices. Differs: probabilities are averaged, not logits, so that no window
        outvotes the others by its scale.
    """
    _check(image, present, overlap, mirror)
    padded, inner = _padded(image.float(), patch_vox)
    weight = gaussian_weight(patch_vox, sigma)
    target = torch.device(device)
    on_device, given = weight.to(target), present.to(target)
    if autocast is None and torch.is_autocast_enabled(target.type):
        autocast = torch.get_autocast_dtype(target.type)  # other threads do not know of it

    def weighted(windows: list[Window]) -> Tensor:
        patches = torch.stack([padded[(slice(None), *w)] for w in windows]).to(target)
        with torch.no_grad(), _precision(target, autocast):
            probabilities = _mirrored(network, patches, given.expand(len(windows), -1), mirror)
        return probabilities.mul_(on_device).cpu()

    groups = list(_batched(window_slices(tuple(padded.shape[1:]), patch_vox, overlap, slack), batch))
    if at_once is None:
        at_once = min(_AT_ONCE, torch.get_num_threads(), len(groups)) if target.type == "cpu" else 1
    total: Tensor | None = None
    mass = torch.zeros(padded.shape[1:])
    for windows, found in zip(groups, _in_order(weighted, groups, at_once)):
        if total is None:
            total = torch.zeros(found.shape[1], *padded.shape[1:])
        for window, values in zip(windows, found):
            total[(slice(None), *window)] += values
            mass[window] += weight
    assert total is not None  # there is always one window
    total /= mass
    return total[(slice(None), *inner)].contiguous()


def _check(image: Tensor, present: Tensor, overlap: float, mirror: Collection[int]) -> None:
    if image.ndim != 4 or present.shape != image.shape[:1] or not bool(present.any()):
        raise ValueError(f"expected [M, X, Y, Z] and [M] with a contrast present, found {image.shape}, {present}")
    if not 0 <= overlap < 1:
        raise ValueError(f"expected an overlap in [0, 1), found {overlap}")
    if not set(mirror) <= {0, 1, 2} or len(set(mirror)) < len(mirror):
        raise ValueError(f"expected mirror axes from 0, 1 and 2, each once, found {tuple(mirror)}")


def _in_order(function: Callable[[list[Window]], Tensor], groups: list[list[Window]], at_once: int) -> Iterator[Tensor]:
    """The function of each group, in the order of the groups; ``at_once`` of them are computed at a time."""
    if at_once == 1:
        yield from map(function, groups)
        return
    threads = torch.get_num_threads()
    share = max(1, threads // at_once)
    waiting: deque[Future[Tensor]] = deque()
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=(share,)) as pool:
            for group in groups:
                waiting.append(pool.submit(function, group))
                if len(waiting) > at_once:  # one more than are computed, so that no thread waits for the sum
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)  # a thread's setting is also what threads to come start with


def _mirrored(network: Network, patches: Tensor, present: Tensor, mirror: Collection[int]) -> Tensor:
    """[B, K, X, Y, Z] float32 probabilities, the mean over every combination of mirrored axes."""
    combinations = [c for n in range(len(mirror) + 1) for c in itertools.combinations(sorted(mirror), n)]
    total: Tensor | None = None
    for axes in combinations:
        flipped = [axis + 2 for axis in axes]
        logits = network(patches.flip(flipped) if axes else patches, present)
        probabilities = torch.softmax(logits.float(), dim=1)
        if total is None:
            total = probabilities
        else:
            total += probabilities.flip(flipped)
    assert total is not None  # the first combination mirrors nothing
    return total / len(combinations) if mirror else total


def _precision(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def gaussian_weight(patch_vox: tuple[int, int, int], sigma: float = 0.125) -> Tensor:
    """[X, Y, Z] weights of a window's voxels: a Gaussian about its centre, never below a thousandth."""
    weight = torch.ones(())
    for size in patch_vox:
        x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        weight = weight.unsqueeze(-1) * torch.exp(-(x**2) / (2 * (sigma * size) ** 2))
    # Corners would otherwise weigh 1e-14: a voxel seen from there alone would be 0 / 0 in float32.
    return weight.clamp_min(max(float(weight.min()), 1e-3))


def window_slices(
    shape: tuple[int, ...], patch_vox: tuple[int, int, int], overlap: float, slack: float = 0.0
) -> Iterator[Window]:
    """Windows that cover a volume which is nowhere thinner than the patch: the fewest that overlap by at least this
    share, evenly spread from one end to the other, so that none of them repeats nearly all of another.

    Args:
        slack: share by which windows may be farther apart than the overlap has it: two voxels too many along an axis
            then cost no further window.

    Source: Isensee et al. 2021 (nnU-Net, arXiv:1809.10486), its inference.
    """
    starts = []
    for size, patch in zip(shape, patch_vox):
        step = max(1, int(patch * (1 - overlap)))
        gaps = math.ceil((size - patch) / (step * (1 + slack)))
        starts.append([round(i * (size - patch) / gaps) for i in range(gaps + 1)] if gaps else [0])
    for corner in itertools.product(*starts):
        x, y, z = (slice(c, c + p) for c, p in zip(corner, patch_vox))
        yield x, y, z


def _padded(image: Tensor, patch_vox: tuple[int, int, int]) -> tuple[Tensor, tuple[slice, ...]]:
    """The image grown to at least a patch, and where the original lies in it."""
    before = [max(0, p - s) // 2 for s, p in zip(image.shape[1:], patch_vox)]
    after = [max(0, p - s) - b for s, p, b in zip(image.shape[1:], patch_vox, before)]
    inner = tuple(slice(b, b + s) for b, s in zip(before, image.shape[1:]))
    if not any(before) and not any(after):
        return image, inner
    widths = [w for b, a in zip(reversed(before), reversed(after)) for w in (b, a)]  # torch counts from the last axis
    return torch.stack([functional.pad(c, widths, value=float(c.min())) for c in image]), inner


def _batched(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while group := list(itertools.islice(windows, size)):
        yield group
