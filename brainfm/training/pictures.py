"""Pictures of what a network makes of its patches, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from brainfm.files import write_whole


def save_pictures(folder: Path, step: int, pictures: Mapping[str, Tensor], rows: int = 4) -> Path:
    """One PNG: a row a sample, a column a picture; the middle axial slice of each patch, left on the left.

    Args:
        pictures: name to [B, 1, X, Y, Z].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(pictures)
    count = min(rows, next(iter(pictures.values())).shape[0])
    figure = Figure(figsize=(2 * len(names), 2 * count + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(count, len(names), squeeze=False)
    for row in range(count):
        slices = [pictures[name][row, 0].float().cpu() for name in names]
        slices = [s[:, :, s.shape[2] // 2].T for s in slices]
        low, high = torch.quantile(slices[0].flatten(), torch.tensor([0.01, 0.99])).tolist()
        for column, (name, image) in enumerate(zip(names, slices)):
            panel = axes[row][column]
            panel.imshow(image, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-3))
            panel.set_axis_off()
            if row == 0:
                panel.set_title(name, fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:07d}.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100, format="png")
    write_whole(path, drawn.getvalue())
    return path
