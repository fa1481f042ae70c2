"""Features of images, computed once: filed under the network's fingerprint, whatever asks for them.

Only the images that are asked for are computed, so that a large data set never costs more than the episodes touch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from brainfm.crossdomain.medimeta import AT_ONCE, MedIMeta
from brainfm.crossdomain.networks import ImageNetwork
from brainfm.crossdomain.statistics import image_statistics, raw_pixels
from brainfm.errors import DatasetError
from brainfm.files import read_arrays, write_arrays

FLOORS = {"statistics": image_statistics, "pixels": raw_pixels}


@dataclass
class CachedFeatures:
    """Features of the images of one data set.

    Attributes:
        source: a network, or a floor's name.
        size: edge of the images that the network reads, in pixels.
        folder: where they are kept; None: in memory alone.
        seconds: processor time spent on them so far.
    """

    items: MedIMeta
    source: ImageNetwork | str
    size: int
    folder: Path | None = None
    batch: int = 32
    device: str = "cpu"
    seconds: float = 0.0
    _known: np.ndarray = field(init=False)
    _values: np.ndarray | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._known = np.zeros(len(self.items), dtype=bool)
        self._load()

    def of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [B, F] of the items with these numbers."""
        rows = np.asarray(rows, dtype=np.int64)
        lacking = np.unique(rows[~self._known[rows]])
        if lacking.size:
            began = time.process_time()
            for start in range(0, len(lacking), self.batch):
                part = lacking[start : start + self.batch]
                found = self._compute(part)
                if self._values is None:
                    self._values = np.zeros((len(self.items), found.shape[1]), np.float32)
                self._values[part], self._known[part] = found, True
            self.seconds += time.process_time() - began
            self._save()
        assert self._values is not None
        return self._values[rows]

    @property
    def key(self) -> str:
        """What they are filed under: data set, its images, network and the size of images."""
        mark = self.source if isinstance(self.source, str) else self.source.fingerprint()
        about = [
            self.items.dataset.id,
            len(self.items),
            self.items.rows.tolist(),
            mark,
            self.size,
            self.items.images.fingerprint(),
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]

    def _compute(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self.source, str):
            return FLOORS[self.source](self.items.pixels(rows))
        return forward(self.source, self.items, rows, self.size, self.device)

    @property
    def _path(self) -> Path | None:
        return None if self.folder is None else self.folder / f"{self.items.dataset.id}_{self.key}.npz"

    def _load(self) -> None:
        if self._path is not None and self._path.is_file():
            file = read_arrays(self._path, DatasetError, "features, which are made anew where the file is deleted")
            self._known, self._values = file["known"], file["values"]
            self.seconds = float(file["seconds"])

    def _save(self) -> None:
        if self._path is not None and self._values is not None:
            seconds = np.array(self.seconds)
            write_arrays(self._path, {"known": self._known, "values": self._values, "seconds": seconds})


@torch.no_grad()
def forward(network: ImageNetwork, items: MedIMeta, rows: np.ndarray, size: int, device: str = "cpu") -> np.ndarray:
    """float32 [B, F] of a frozen network."""
    network.eval().to(device)
    found: np.ndarray = network(tensors(network, items, rows, size, device)).float().cpu().numpy()
    return found


def tensors(network: ImageNetwork, items: MedIMeta, rows: np.ndarray, size: int, device: str = "cpu") -> torch.Tensor:
    """What a network reads of items: float32 [B, C, size, size], channels last, made a few images at a time, which
    stay in the processor's cache."""
    wanted = network.pixels.channels
    shape = (len(rows), wanted, size, size)
    found = torch.empty(shape, device=device, memory_format=torch.channels_last)
    channels, items.num_channels = items.num_channels, min(wanted, items.dataset.channels)
    try:
        for start in range(0, len(rows), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            network.pixels.into(found[part], torch.from_numpy(items.pixels(rows[part])).to(device))
    finally:
        items.num_channels = channels
    return found
