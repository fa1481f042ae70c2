"""The picture of README.md: what pre-training is shown, and what comes back for a scan.

    brainfm anatomy manifest=ONE_T1.csv out=anatomy workers=1
    python scripts/report/readme_picture.py --map SYNTHSEG_MAP.nii.gz --scan T1.nii.gz \\
        --tissues anatomy/labels/.../t1_tissue.nii.gz --out docs/picture.png

Above, a whole-head label map and five scans that pre-training draws from it, before artefacts are added: looks are
drawn by the library's own functions, one a kind. Below, a real scan in three planes beside the tissues that `brainfm
anatomy` wrote on its grid. The map is one of SynthSeg's training maps (scheme synthseg_head).
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm import seeds
from brainfm.data.regions import BY_INTENSITY, RENDERED, RENDERED_FAMILIES, renders_of
from brainfm.files import write_whole
from brainfm.imaging import nifti
from brainfm.reports.style import INK
from brainfm.synthesis.looks import KINDS, draw_look
from brainfm.synthesis.render import paint
from brainfm.synthesis.settings import LookSpec

Tile = tuple[str, np.ndarray]  # title, [across, up] grey or [across, up, 3]
SLAB = 9  # slices around the one that is shown: what the blur reaches
TISSUES = {1: (0.25, 0.55, 1.0), 2: (0.95, 0.55, 0.15), 3: (0.95, 0.9, 0.75)}  # CSF, grey and white matter
WIDTH_INCH, DOTS_PER_INCH, SHADES = 9.0, 92, 128


def renderings(path: Path, seed: int) -> list[Tile]:
    """The map in an axial slice, and a scan of every kind of look."""
    ids = nifti.read(path, labels=True)[0].voxels.astype(np.int64)
    ids = _cropped(ids, ids > 0)
    middle = round(0.62 * ids.shape[2])
    slab = ids[:, :, middle - SLAB // 2 : middle + SLAB // 2 + 1]
    classes = renders_of("synthseg_head")[slab]
    assert not (classes == BY_INTENSITY).any(), f"{path}: expected a map of the whole head"
    colours = np.random.default_rng(seed).uniform(0.25, 1, (len(RENDERED), 3))
    colours[0] = 0
    tiles: list[Tile] = [("a label map", colours[classes[:, :, SLAB // 2]])]
    tissue = torch.from_numpy(classes.astype(np.int64))
    for kind in KINDS:
        number = next(n for n in range(10_000) if _look(seed, n).kind == kind)
        scan = paint(tissue, _look(seed, number), seeds.torch_stream(seed, "grain", number))
        tiles.append((f"drawn from it: {'any' if kind == 'free' else kind.upper()}", scan[:, :, SLAB // 2].numpy()))
    return tiles


def _look(seed: int, number: int) -> Any:
    return draw_look(seeds.stream(seed, "look", number), RENDERED_FAMILIES, LookSpec())


def labelled(scan_file: Path, tissue_file: Path) -> list[Tile]:
    """A scan and its tissues, in three planes."""
    scan, tissue = nifti.read(scan_file)[0], nifti.read(tissue_file, labels=True)[0].voxels
    box = scan.voxels > np.percentile(scan.voxels, 60)
    grey, labels = _cropped(scan.voxels, box), _cropped(tissue, box)
    grey = np.clip(grey / np.percentile(grey, 99.7), 0, 1)
    tiles: list[Tile] = []
    for name, axis in (("axial", 2), ("coronal", 1), ("sagittal", 0)):
        inside = np.flatnonzero((labels > 0).any(axis=tuple(a for a in range(3) if a != axis)))
        place = int(inside[0] + 0.52 * (inside[-1] - inside[0]))
        cut, mark = np.take(grey, place, axis), np.take(labels, place, axis)
        shown = np.repeat(cut[..., None], 3, axis=-1)
        for value, colour in TISSUES.items():
            shown[mark == value] = 0.35 * shown[mark == value] + 0.65 * np.array(colour)
        tiles += [(f"a real T1, {name}", cut), ("its tissues", shown)]
    return tiles


def _cropped(volume: np.ndarray, inside: np.ndarray, margin: int = 4) -> np.ndarray:
    """The box around what is inside."""
    for axis in range(3):
        share = inside.mean(axis=tuple(a for a in range(3) if a != axis))
        used = np.flatnonzero(share > 0.01)
        start = max(int(used[0]) - margin, 0)
        keep = slice(start, int(used[-1]) + margin + 1)
        volume, inside = (np.moveaxis(np.moveaxis(v, axis, 0)[keep], 0, axis) for v in (volume, inside))
    return volume


def draw(rows: Sequence[Sequence[Tile]], out: Path) -> None:
    """Writes the tiles as a PNG of few colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    columns = max(map(len, rows))
    figure, axes = pyplot.subplots(len(rows), columns, figsize=(WIDTH_INCH, 1.9 * len(rows)), facecolor="white")
    for axis in axes.flat:
        axis.set_axis_off()
    for row, tiles in zip(axes, rows):
        for axis, (title, picture) in zip(row, tiles):
            shown = picture[::-1].swapaxes(0, 1)[::-1]  # the patient's left on the right side
            top = None if shown.ndim == 3 else float(np.percentile(shown, 99.8))
            axis.imshow(shown, cmap="gray", vmin=0, vmax=top, interpolation="bilinear")
            axis.set_title(title, fontsize=7.5, color=INK, pad=3)
    figure.tight_layout(pad=0.3, h_pad=0.8, w_pad=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    pyplot.close(figure)
    small = io.BytesIO()
    Image.open(buffer).convert("RGB").quantize(SHADES).save(small, format="png", optimize=True)
    write_whole(out, small.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--map", type=Path, required=True)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--tissues", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw([renderings(asked.map, asked.seed), labelled(asked.scan, asked.tissues)], asked.out)
    print(f"{asked.out}: {asked.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
