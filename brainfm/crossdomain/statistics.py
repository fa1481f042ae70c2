"""Image statistics and raw pixels: the floors that a network's features have to pass."""

from __future__ import annotations

import numpy as np

_CELLS, _BINS, _RINGS, _RAW = 4, 12, 16, 28
# Typical deviations between images, so that no group of numbers drowns the others. Groups and scales were chosen on
# the sets of docs/crossdomain.md: there the floor is flattered, not what has to pass it.
_SCALES = {"slopes": 0.02, "slope of cells": 0.015, "deviation of cells": 0.06, "spectrum": 0.5, "colours": 0.02}


def image_statistics(images: np.ndarray) -> np.ndarray:
    """float32 [B, F] of uint8 [B, C, H, W]: histogram of gradients, mean gradient and deviation in each cell of a 4x4
    grid, the logarithm of the radial power spectrum, and of a coloured image the means and deviations of its colours;
    61 numbers, 6 more of a coloured image."""
    values = images.astype(np.float32) / 255
    grey = values.mean(axis=1)
    slope = np.hypot(np.gradient(grey, axis=1), np.gradient(grey, axis=2))
    spread = np.sqrt(np.maximum(shrunk(grey**2, _CELLS) - shrunk(grey, _CELLS) ** 2, 0))
    parts = {
        "slopes": np.concatenate([_histogram(slope, _BINS, 0.5), slope.mean((1, 2))[:, None]], axis=1),
        "slope of cells": shrunk(slope, _CELLS).reshape(len(grey), -1),
        "deviation of cells": spread.reshape(len(grey), -1),
        "spectrum": _spectrum(grey),
    }
    if values.shape[1] == 3:
        parts["colours"] = np.concatenate([values.mean((2, 3)), values.std((2, 3))], axis=1)
    return np.concatenate([part / _SCALES[name] for name, part in parts.items()], axis=1).astype(np.float32)


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """float32 [B, C * 784] of uint8 [B, C, H, W]: the image at 28 x 28 pixels."""
    values = images.astype(np.float32) / 255
    small = np.stack([shrunk(values[:, c], _RAW) for c in range(values.shape[1])], axis=1)
    return small.reshape(len(images), -1)


def shrunk(images: np.ndarray, edge: int) -> np.ndarray:
    """[B, H, W] -> [B, edge, edge]: each pixel the mean of the part of the image that it covers."""
    for axis in (1, 2):
        images = np.moveaxis(np.moveaxis(images, axis, -1) @ _covering(images.shape[axis], edge), -1, axis)
    return images


def _covering(length: int, edge: int) -> np.ndarray:
    """[length, edge] shares of each old pixel in each new one; columns have the sum 1."""
    old, new = np.arange(length), np.arange(edge) * length / edge
    overlap = np.minimum(old[:, None] + 1, new + length / edge) - np.maximum(old[:, None], new)
    return (np.maximum(overlap, 0) * edge / length).astype(np.float32)


def _histogram(values: np.ndarray, bins: int, highest: float) -> np.ndarray:
    place = np.minimum((values * (bins / highest)).astype(np.int64), bins - 1).reshape(len(values), -1)
    flat = place + bins * np.arange(len(values))[:, None]
    counts = np.bincount(flat.ravel(), minlength=bins * len(values)).reshape(len(values), bins)
    return np.sqrt(counts / place.shape[1])


def _spectrum(grey: np.ndarray) -> np.ndarray:
    power = np.abs(np.fft.rfft2(grey - grey.mean((1, 2), keepdims=True))) ** 2
    far = np.hypot(np.fft.fftfreq(grey.shape[1])[:, None], np.fft.rfftfreq(grey.shape[2])[None])
    ring = np.minimum((far / 0.5 * _RINGS).astype(np.int64), _RINGS - 1).ravel()
    counts = np.maximum(np.bincount(ring, minlength=_RINGS), 1)
    return np.log(np.stack([np.bincount(ring, p.ravel(), _RINGS) for p in power]) / counts / grey[0].size + 1e-8)
