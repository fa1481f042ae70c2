"""Speed of random patches from a store, beside MONAI and TorchIO pipelines that open the .nii.gz files.

    python scripts/benchmark/store.py --data FOLDER_WITH_NIFTI --repeats 5
    python scripts/benchmark/store.py --data FOLDER_WITH_NIFTI --sweep
    python scripts/benchmark/store.py --data FOLDER_WITH_NIFTI --levels

One process and one thread; the methods take turns, a few patches each, and the medians over the turns are printed.
Every patch is 96^3 at a random corner of a random scan; the peers read the files that came, as they are. Rates are
given by the clock and by the seconds of the processor, which other work on the machine disturbs less. Everything is in
the page cache, so disks do not count. Peers that are not installed are left out. Without --data, phantoms are made.
With --sweep the prepared scans are written in other chunks, filters and roundings instead, which is how the layout in
`brainfm/data/store.py` was chosen. With --levels two stores are made, with and without coarser copies of the volumes:
what the copies cost, and the reads of 64^3 blocks at each level.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import blosc2
import nibabel as nib
import numpy as np

from brainfm.data.levels import kept_levels
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.imaging.preprocess import prepare_session
from brainfm.specs import PreprocessSpec

PATCH = 96
Draw = Callable[[], np.ndarray]


def write_phantoms(folder: Path, count: int) -> None:
    """Heads of 1 mm in noise: as hard to compress as a scan."""
    folder.mkdir(parents=True, exist_ok=True)
    x, y, z = np.meshgrid(*(np.linspace(-1.1, 1.1, n, dtype=np.float32) for n in (182, 218, 182)), indexing="ij")
    radius = x**2 / 0.6 + y**2 / 0.9 + z**2 / 0.7
    for i in range(count):
        noise = np.random.default_rng(i).normal(0, 25, x.shape)
        voxels = (radius < 1) * (600 + 200 * np.sin(9 * x + i) * np.cos(7 * y) * np.cos(8 * z) + noise)
        nib.save(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)), folder / f"sub-{i:02}_T1w.nii.gz")


def find_files(folder: Path, limit: int) -> list[Path]:
    """The images below a folder; label maps are told by their names."""
    words = ("mask", "seg", "dlmuse", "label")
    return [f for f in sorted(folder.rglob("*.nii.gz")) if not any(word in f.name.lower() for word in words)][:limit]


def build_store(files: list[Path], folder: Path) -> Store:
    scans = [Scan("benchmark", str(i), "", "unknown", str(file)) for i, file in enumerate(files)]
    write_manifest(folder / "manifest.csv", scans)
    prepare(read_manifest(folder / "manifest.csv"), folder / "store", PreprocessSpec(), workers=0)
    return Store.open(folder / "store")


def draw_store(store: Store, as_float32: bool) -> Draw:
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        entry = store.sessions[rng.integers(len(store.sessions))]
        corner = [int(rng.integers(max(n - PATCH, 0) + 1)) for n in entry.shape]
        block = store.block(entry, entry.scans[0].name, corner, (PATCH,) * 3)
        return block.astype(np.float32) if as_float32 else block

    return draw


def draw_monai(files: list[Path]) -> Draw:
    from monai.transforms import Compose, LoadImaged, RandSpatialCropd, SpatialPadd

    pipeline = Compose(
        [
            LoadImaged(keys="image", ensure_channel_first=True),
            SpatialPadd(keys="image", spatial_size=(PATCH,) * 3),
            RandSpatialCropd(keys="image", roi_size=(PATCH,) * 3, random_size=False),
        ]
    )
    pipeline.set_random_state(0)
    rng = np.random.default_rng(0)
    return lambda: np.asarray(pipeline({"image": str(files[rng.integers(len(files))])})["image"])


def draw_torchio(files: list[Path]) -> Draw:
    import torchio

    sampler = torchio.UniformSampler(PATCH)
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        subject = torchio.Subject(image=torchio.ScalarImage(files[rng.integers(len(files))]))
        subject.load()
        short = [max(PATCH - n, 0) for n in subject.spatial_shape]
        if any(short):
            subject = torchio.Pad((0, short[0], 0, short[1], 0, short[2]))(subject)
        return next(iter(sampler(subject, num_patches=1)))["image"].data.numpy()

    return draw


def measure(draw: Draw, count: int) -> tuple[float, float]:
    """Patches a second, and patches a second of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(count):
        draw()
    return count / (time.perf_counter() - wall), count / (time.process_time() - processor)


def compare(store: Store, files: list[Path], repeats: int) -> None:
    methods: dict[str, tuple[Draw, int]] = {
        "brainfm": (draw_store(store, False), 200),
        "brainfm, cast to float32": (draw_store(store, True), 100),
    }
    for name, build in (("monai", draw_monai), ("torchio", draw_torchio)):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed here and is left out")
        else:
            methods[name] = build(files), 10
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
    for draw, _ in methods.values():
        measure(draw, 2 * len(files))
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, (draw, count) in methods.items():
            rates[name].append(measure(draw, count))
    size = [
        (store.path / "sessions" / entry.folder / entry.scans[0].file).stat().st_size / (4 * np.prod(entry.shape))
        for entry in store.sessions
    ]
    print(f"{len(files)} scans, one core, medians of {repeats} turns")
    print(f"{'':26}{'patches/s':>10}{'a processor second':>20}{'brainfm is faster by':>22}")
    for name, found in rates.items():
        wall, processor = (statistics.median(rate) for rate in zip(*found))
        times = statistics.median(a[0] / b[0] for a, b in zip(rates["brainfm"], found))
        print(f"{name:26}{wall:10.1f}{processor:20.1f}{times:22.1f}")
    print(f"size: {100 * np.mean(size):.1f} % of float32 (per scan {100 * min(size):.1f} to {100 * max(size):.1f} %)")
    print(json.dumps({"patches_per_s": rates, "size_of_float32": [float(s) for s in size]}))


def sweep(files: list[Path], repeats: int) -> None:
    """Size and speed of other layouts."""
    volumes = [prepare_session({"scan": file}, {}, PreprocessSpec()).scans["scan"] for file in files]
    rng = np.random.default_rng(0)
    layouts = [
        (filters, chunk, block, level, bits)
        for filters in ("SHUFFLE", "BITSHUFFLE")
        for chunk, block in ((96, 32), (64, 32), (64, 16), (48, 24), (80, 20), (48, 12))
        for level in (1, 5)
        for bits in (None, 8, 7, 6)
    ]
    print("filter      chunk block level  step     size %  largest %  patches/processor s  write ms")
    for filters, chunk, block, level, bits in layouts:
        arrays, sizes, written = [], [], 0.0
        for volume in volumes:
            rounded = volume if bits is None else np.rint(volume * 2**bits) / 2**bits
            start = time.process_time()
            array = blosc2.empty(
                volume.shape,
                dtype=np.float16,
                chunks=tuple(min(chunk, -(-n // block) * block) for n in volume.shape),
                blocks=(block,) * 3,
                contiguous=True,
                cparams={
                    "codec": blosc2.Codec.LZ4,
                    "clevel": level,
                    "nthreads": 1,
                    "typesize": 2,
                    "filters": [blosc2.Filter[filters]],
                    "filters_meta": [0],
                },
                dparams={"nthreads": 1},
            )
            array[...] = np.ascontiguousarray(rounded.astype(np.float16))
            written += time.process_time() - start
            arrays.append(array)
            sizes.append(100 * len(array.to_cframe()) / volume.nbytes)

        def draw(arrays: list[blosc2.NDArray] = arrays) -> np.ndarray:
            array = arrays[rng.integers(len(arrays))]
            corner = [int(rng.integers(max(n - PATCH, 0) + 1)) for n in array.shape]
            return array[tuple(slice(c, min(c + PATCH, n)) for c, n in zip(corner, array.shape))]

        rate = statistics.median(measure(draw, 24)[1] for _ in range(repeats))
        step = "-" if bits is None else f"2^-{bits}"
        print(
            f"{filters:10}{chunk:7}{block:6}{level:6}{step:>7}{np.mean(sizes):10.1f}{max(sizes):10.1f}{rate:21.0f}"
            f"{1000 * written / len(volumes):10.0f}"
        )


def levels(files: list[Path], folder: Path, repeats: int) -> None:
    """What the coarser copies cost, and what they are good for."""
    stores, seconds = {}, {}
    for name, kept in (("without", 0), ("with", kept_levels(PreprocessSpec().spacing_mm))):
        (folder / name).mkdir()
        begin = time.process_time()
        with mock.patch("brainfm.data.store.kept_levels", return_value=kept):
            stores[name] = build_store(files, folder / name)
        seconds[name] = time.process_time() - begin
    sizes = {name: sum(f.stat().st_size for f in store.path.rglob("*.b2nd")) for name, store in stores.items()}
    more = sizes["with"] / sizes["without"]
    print(f"{len(files)} scans: {sizes['without'] / 1e6:.1f} MB, with copies {more:.3f} times that")
    print(f"prepare: {seconds['without']:.1f} s of the processor, with copies {seconds['with']:.1f} s")
    print("copies    level  blocks/processor s  blocks/s")
    for name, store in stores.items():
        for level in range(kept_levels(PreprocessSpec().spacing_mm) + 1):
            draw = draw_level(store, level)
            measure(draw, 2 * len(files))
            rates = [measure(draw, 100 if name == "with" or not level else 10) for _ in range(repeats)]
            wall, processor = (statistics.median(rate) for rate in zip(*rates))
            print(f"{name:10}{level:5}{processor:20.0f}{wall:10.0f}")


def draw_level(store: Store, level: int) -> Draw:
    rng = np.random.default_rng(0)

    def draw() -> np.ndarray:
        entry = store.sessions[rng.integers(len(store.sessions))]
        room = np.array(store.shape(entry, level)) - 64
        corner = [int(rng.integers(n, 1) if n < 0 else rng.integers(n + 1)) for n in room]
        return store.block(entry, entry.scans[0].name, corner, (64,) * 3, level)

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with .nii.gz files at any depth")
    parser.add_argument("--scans", type=int, default=6, help="how many at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", action="store_true", help="measure other layouts of the files instead of peers")
    parser.add_argument("--levels", action="store_true", help="measure the coarser copies instead of peers")
    args = parser.parse_args()
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.data:
            write_phantoms(folder / "phantoms", args.scans)
        files = find_files((args.data or folder / "phantoms").absolute(), args.scans)
        if args.sweep:
            sweep(files, args.repeats)
        elif args.levels:
            levels(files, folder, args.repeats)
        else:
            compare(build_store(files, folder), files, args.repeats)


if __name__ == "__main__":
    main()
