"""Frozen features of whole heads: a row a scan, and the same bits every time on the same number of threads.

The whole head passes the network at once, in float32. Where it has more voxels than `Extent.whole_mvox` it is covered
with the fewest windows and their cells are pooled together; that rule looks at the scan and never at the machine, so
that features made elsewhere can be compared. Cells of the map count by how much of the head lies in them: how large a
margin of air was scanned does not matter.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brainfm.data.store import Store
from brainfm.errors import ConfigError, ScanError
from brainfm.extras import missing
from brainfm.files import check_writable, npy_bytes, npz_bytes, read_array, read_arrays, table_text, write_whole
from brainfm.imaging.preprocess import prepare_session
from brainfm.nets.backbone import Backbone, build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone, spacing_note
from brainfm.nets.cpu import swap_in
from brainfm.nets.latents import Latents
from brainfm.nets.transfer import transfer
from brainfm.specs import PreprocessSpec
from brainfm.tasks.engine import settle_device

WHOLE = "backbone"  # the part that is the backbone's deepest map
TOKEN = "token"  # the part that is its class token, where it has one
VECTORS = (TOKEN, "slices", "slices_random", "covariance")  # parts that are one vector, not mean and deviation of a map
IDS = ("dataset", "subject", "session", "scan", "contrast")
FORMATS = (".parquet", ".npy", ".npz", ".csv")
_ABOUT = "brainfm"  # where a Parquet file keeps its description
_FEATURE = re.compile(r"(.+)_(?:mean|std|value)_\d+")

PathLike = str | os.PathLike[str]
Triple = tuple[int, int, int]
Key = tuple[str, str, str]  # dataset, subject, session
Row = tuple[str, str, str, str, str]  # and scan, contrast
Head = tuple[Row, np.ndarray, np.ndarray]  # ids, volume, points of the head


@dataclass(frozen=True)
class Extent:
    """How much of a head passes the network at once.

    Attributes:
        whole_mvox: million voxels up to which it is the whole head; 0: always windows.
        window_vox: edges of the windows of larger heads, rounded up to multiples of the network's stride.
    """

    whole_mvox: float = 12.0
    window_vox: Triple = (160, 160, 160)

    def __post_init__(self) -> None:
        if not self.whole_mvox >= 0:
            raise ConfigError(f"whole_mvox={self.whole_mvox}: expected 0 or more million voxels")
        if len(self.window_vox) != 3 or min(self.window_vox) < 1:
            raise ConfigError(f"window_vox={list(self.window_vox)}: expected three whole numbers of voxels")


WHOLE_HEADS = Extent()


@dataclass(frozen=True)
class Encoder:
    """A frozen network and what is read from it.

    Attributes:
        backbone: in eval mode.
        latents: names parts of its maps; None where the file has none or none is asked for.
        parts: names, in order; ``backbone`` is the deepest map, ``token`` the class token of a network that has one.
        about: where the weights come from.
    """

    backbone: Backbone
    latents: Latents | None
    parts: tuple[str, ...]
    about: dict[str, Any]

    @classmethod
    def load(cls, backbone: PathLike | LoadedBackbone, parts: Sequence[str] | None = None) -> Encoder:
        """Of a backbone file.

        Args:
            parts: ``backbone``, ``token`` and names of the parts of the file's latent; None: all there are.

        Raises:
            WeightsError: the file cannot be used.
            ConfigError: a part that it does not have.
        """
        loaded = backbone if isinstance(backbone, LoadedBackbone) else load_backbone(backbone)
        latents = _latents(loaded)
        there = (*_of_any(loaded.backbone), *(latents.sizes if latents else ()))
        wanted = there if parts is None else tuple(parts)
        unknown = [part for part in wanted if part not in there]
        if unknown or not wanted:
            found = f"unknown part {unknown[0]!r}" if unknown else "no part is asked for"
            raise ConfigError(f"parts: {found}, expected one or more of {', '.join(there)}")
        about = {
            "weights": loaded.fingerprint,
            "backbone": loaded.backbone.config,
            "preprocess": loaded.preprocess.to_dict(),
            "objective": loaded.objective["name"],
        }
        if loaded.voxel_mm is not None:
            about["voxel_mm"] = list(loaded.voxel_mm)
        return cls(loaded.backbone, latents if set(wanted) - {WHOLE, TOKEN} else None, wanted, about)

    @classmethod
    def random(cls, config: Mapping[str, Any], seed: int) -> Encoder:
        """The backbone that ``config`` describes with weights that nothing was learnt with: what a probe must beat."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = swap_in(build_backbone(**config))
        about = {"weights": f"random, seed {seed}", "backbone": dict(config)}
        return cls(backbone.eval(), None, _of_any(backbone), about)

    def maps(self, image: Tensor) -> dict[str, Tensor]:
        """[1, 1, X, Y, Z] -> part -> [E, x, y, z] on the deepest map's grid; of the class token [E, 1, 1, 1]."""
        if TOKEN in self.parts:
            maps, said = self.backbone.summarised(image)
            found = {WHOLE: maps[-1][0], TOKEN: said[0, :, None, None, None]}
        else:
            maps = self.backbone.features(image)
            found = {WHOLE: maps[-1][0]}
        if self.latents is not None:
            found |= {name: code.mean[0] for name, code in self.latents(maps).items()}
        return {part: found[part] for part in self.parts}


@dataclass(frozen=True)
class Embedding:
    """Features with what they are of.

    Attributes:
        rows: N times dataset, subject, session, scan, contrast.
        parts: name -> [N, F] float32; of an encoder's map E means, then E standard deviations; of ``VECTORS`` E values.
        about: weights, store, and how they were made.
    """

    rows: tuple[Row, ...]
    parts: dict[str, np.ndarray]
    about: dict[str, Any]

    @property
    def matrix(self) -> np.ndarray:
        """[N, F] of all parts side by side."""
        return np.concatenate(list(self.parts.values()), axis=1)

    @property
    def names(self) -> list[str]:
        """Of the columns of ``matrix``: ``<part>_mean_<e>``, then ``<part>_std_<e>``; or ``<part>_value_<e>``."""
        found = []
        for part, values in self.parts.items():
            if part in VECTORS:
                found += [f"{part}_value_{e}" for e in range(values.shape[1])]
                continue
            half = values.shape[1] // 2
            found += [f"{part}_{what}_{e}" for what in ("mean", "std") for e in range(half)]
        return found


def embed(
    backbone: PathLike | LoadedBackbone | Encoder,
    source: PathLike | Store | Mapping[str, PathLike],
    *,
    contrasts: Sequence[str] | None = None,
    sessions: Collection[Key] | None = None,
    parts: Sequence[str] | None = None,
    extent: Extent = WHOLE_HEADS,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedding:
    """Frozen features of whole heads.

    Args:
        backbone: a backbone file.
        source: a store; or a NIfTI file, or several files of one visit by contrast, which are prepared as the scans
            were that the backbone was trained on.
        contrasts: only scans of these.
        sessions: of a store, only these (dataset, subject, session).
        parts: see `Encoder.load`.
        progress: called with (scans done, scans in all).

    Returns:
        A row for each scan, sorted by dataset, subject, session and scan; a function of the weights and the voxels
        alone; another number of threads, or another device, changes the last digits of float32.

    Raises:
        WeightsError, StoreError: the backbone or the store cannot be used.
        ScanError: a file cannot be used.
        ConfigError: no scan has one of the contrasts, an unknown part, or an impossible device.
    """
    encoder = backbone if isinstance(backbone, Encoder) else Encoder.load(backbone, parts)
    place = settle_device(device)
    encoder.backbone.to(place)
    if encoder.latents is not None:
        encoder.latents.to(place)
    heads, total, about = _heads(
        source, contrasts, sessions, encoder.about.get("preprocess"), encoder.about.get("voxel_mm")
    )
    rows: list[Row] = []
    pooled: list[dict[str, np.ndarray]] = []
    progress(0, total)
    for row, volume, points in heads:
        rows.append(row)
        pooled.append(pool(encoder, volume, points, extent, place))
        progress(len(rows), total)
    return Embedding(
        rows=tuple(rows),
        parts={part: np.stack([values[part] for values in pooled]) for part in encoder.parts},
        about={**encoder.about, **about, "whole_mvox": extent.whole_mvox, "window_vox": list(extent.window_vox)},
    )


def pool(
    encoder: Encoder, volume: np.ndarray, points: np.ndarray, extent: Extent, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Mean and standard deviation of each channel over the head.

    Args:
        encoder: with its networks on ``device``.
        volume: [X, Y, Z], prepared.
        points: [N, 3] voxels spread evenly over the head; a cell of the map counts by the number of them in it.

    Returns:
        part -> [2E] float32, or [E] of the class token: of several windows the mean, by how much of the head they show.
    """
    stride = encoder.backbone.strides[-1]
    cells = [max(2, -(-edge // stride)) for edge in volume.shape]  # the deepest map must have more than one
    room = [n * stride - edge for n, edge in zip(cells, volume.shape)]
    padded = np.pad(volume, [(r // 2, r - r // 2) for r in room], constant_values=volume.min())
    weight = np.zeros(cells)
    np.add.at(weight, tuple(((points.astype(np.int64) + [r // 2 for r in room]) // stride).T), 1)
    windows = _windows(cells, stride, extent)
    covered = np.zeros(cells)
    for box in windows:
        covered[box] += 1
    share = weight / covered / weight.sum()
    sums: dict[str, np.ndarray] = {}
    with torch.no_grad(), torch.backends.cudnn.flags(deterministic=True, benchmark=False, allow_tf32=False):
        for box in windows:
            voxels = padded[tuple(slice(part.start * stride, part.stop * stride) for part in box)]
            image = torch.from_numpy(np.ascontiguousarray(voxels, np.float32)).to(device)
            for part, values in encoder.maps(image[None, None]).items():
                flat = values.cpu().numpy().astype(np.float64).reshape(len(values), -1)
                weight_of = share[box].reshape(-1) if part != TOKEN else share[box].sum(keepdims=True).reshape(-1)
                sums[part] = sums.get(part, 0) + np.stack([flat, flat**2]) @ weight_of
    found = {part: (mean, np.sqrt(np.maximum(square - mean**2, 0))) for part, (mean, square) in sums.items()}
    return {
        part: (mean if part in VECTORS else np.concatenate([mean, std])).astype(np.float32)
        for part, (mean, std) in found.items()
    }


def _of_any(backbone: Backbone) -> tuple[str, ...]:
    """Parts that need no latent."""
    return (WHOLE, TOKEN) if backbone.class_token else (WHOLE,)


def _windows(cells: Sequence[int], stride: int, extent: Extent) -> list[tuple[slice, ...]]:
    """Boxes of cells that together cover the map: one, or as few as can, spread evenly."""
    if math.prod(cells) * stride**3 <= extent.whole_mvox * 1e6:
        return [tuple(slice(0, n) for n in cells)]
    along = []
    for n, edge in zip(cells, extent.window_vox):
        size = min(n, max(2, -(-edge // stride)))
        starts = np.linspace(0, n - size, -(-n // size)).round().astype(int)
        along.append([slice(int(start), int(start) + size) for start in starts])
    return list(product(*along))


# -------------------------------------------------------------------------------------------------------------- scans


def heads_of(store: PathLike | Store) -> tuple[Iterator[Head], int, dict[str, Any]]:
    """The scans of a store one by one, their number, and what is to be said of where they come from."""
    return _heads(store, None, None, None, None)


def _heads(
    source: PathLike | Store | Mapping[str, PathLike],
    contrasts: Sequence[str] | None,
    sessions: Collection[Key] | None,
    preprocess: Any,
    voxel_mm: Sequence[float] | None,
) -> tuple[Iterator[Head], int, dict[str, Any]]:
    """The scans one by one, their number, and what is to be said of where they come from."""
    if isinstance(source, Mapping):
        return _of_files({name: Path(file) for name, file in source.items()}, contrasts, preprocess, voxel_mm)
    if not isinstance(source, Store) and os.path.isfile(source):
        return _of_files({"unknown": Path(source)}, contrasts, preprocess, voxel_mm)
    store = source if isinstance(source, Store) else Store.open(Path(source))
    scans = [
        (session, scan)
        for session in store.sessions
        for scan in sorted(session.scans, key=lambda scan: scan.name)
        if (contrasts is None or scan.contrast in contrasts) and (sessions is None or session.key in sessions)
    ]
    if not scans:
        there = sorted({scan.contrast for session in store.sessions for scan in session.scans})
        raise ConfigError(
            f"contrasts={', '.join(contrasts or ())}: {store.path} has none of them, expected one of {', '.join(there)}"
            if there
            else f"{store.path}: the store holds no scan, expected one or more"
        )
    about: dict[str, Any] = {"store": store.fingerprint()}
    if preprocess is not None and store.spec.to_dict() != preprocess:
        about["note"] = (
            f"the backbone was trained on scans prepared as {preprocess}, these were prepared as {store.spec.to_dict()}"
        )
    strange = spacing_note(store.spec.spacing_mm, voxel_mm)
    if strange is not None:
        about["note"] = "; ".join([*([about["note"]] if "note" in about else []), f"{store.path} has {strange}"])

    def heads() -> Iterator[Head]:
        for session, scan in scans:
            row = (*session.key, scan.name, scan.contrast)
            yield row, store.volume(session, scan.name), store.foreground(session)

    return heads(), len(scans), about


def _of_files(
    files: Mapping[str, Path], contrasts: Sequence[str] | None, preprocess: Any, voxel_mm: Sequence[float] | None
) -> tuple[Iterator[Head], int, dict[str, Any]]:
    if preprocess is None:
        raise ConfigError("a random backbone does not say how files are prepared; expected a store")
    wanted = {name: file for name, file in files.items() if contrasts is None or name in contrasts}
    if not wanted:
        raise ConfigError(f"none of the files is of {', '.join(contrasts or ())}, expected one or more")
    for file in wanted.values():
        if not file.is_file():
            raise ScanError(f"{file}: no such file, expected a NIfTI file")
    spec = PreprocessSpec.from_dict(preprocess)
    prepared = prepare_session(wanted, {}, spec)
    if prepared.failures:
        raise ScanError(next(iter(prepared.failures.values())))

    def heads() -> Iterator[Head]:
        for name in sorted(wanted):
            yield ("", wanted[name].name, "", name, name), prepared.scans[name], prepared.foreground

    strange = spacing_note(spec.spacing_mm, voxel_mm)
    note = {} if strange is None else {"note": f"the files are read in {strange}"}
    return heads(), len(wanted), {"files": {name: str(file) for name, file in wanted.items()}} | note


def _latents(loaded: LoadedBackbone) -> Latents | None:
    """The named parts of a backbone file's latent, rebuilt from its tensors; None where it has none.

    Raises: WeightsError where they do not fit.
    """
    state = {k.removeprefix("latents."): v for k, v in loaded.extra.items() if k.startswith("latents.")}
    sizes = {k.split(".")[1]: len(v) for k, v in state.items() if re.fullmatch(r"mean\.\w+\.weight", k)}
    if not sizes:
        return None
    order = [part for part in loaded.objective["config"].get("parts") or {} if part in sizes]
    names = [*order, *sorted(set(sizes) - set(order))]
    total = sum(sizes.values())
    variational = any(k.startswith("logvar.") for k in state)
    latents = Latents(loaded.backbone.widths, {n: sizes[n] / total for n in names}, total, variational)
    transfer(latents, state, origin="the latent of the backbone file")
    return swap_in(latents).eval()


# -------------------------------------------------------------------------------------------------------------- files


def check_format(path: PathLike) -> Path:
    """Raises: ConfigError where features cannot be written to such a file, before any time is spent."""
    file = Path(path)
    if file.suffix not in FORMATS:
        raise ConfigError(f"out={file}: expected a file that ends in {', '.join(FORMATS)}")
    if file.suffix == ".parquet":
        _pyarrow()
    check_writable(file.parent)
    return file


def write(embedding: Embedding, path: PathLike) -> list[Path]:
    """Writes features with their ids; every file appears whole or not at all.

    ========== ======================================================================================================
    .parquet   a column for each id and each feature, the description under the metadata key ``brainfm``
    .csv       the same columns; the description in ``<name>.about.json``
    .npz       ``features`` [N, F], ``names`` [F], ``ids`` [N, 5], ``about`` (JSON); no pickle
    .npy       ``features`` [N, F]; the ids in ``<name>.ids.csv``, names and description in ``<name>.about.json``
    ========== ======================================================================================================

    Returns: the files. Raises: ConfigError as check_format.
    """
    file = check_format(path)
    about = json.dumps({**embedding.about, "features": embedding.names}, indent=1) + "\n"
    contents: dict[Path, bytes] = {}
    if file.suffix == ".parquet":
        contents[file] = _parquet(embedding, about)
    elif file.suffix == ".npz":
        arrays = {"features": embedding.matrix, "names": np.array(embedding.names), "ids": np.array(embedding.rows)}
        contents[file] = npz_bytes(arrays | {"about": np.array(about)})
    elif file.suffix == ".npy":
        contents[file] = npy_bytes(embedding.matrix)
        contents[_beside(file, ".ids.csv")] = table_text(IDS, embedding.rows).encode()
    else:
        cells = ([f"{v:.9g}" for v in row] for row in embedding.matrix)  # nine digits are every float32 exactly
        rows = ([*ids, *values] for ids, values in zip(embedding.rows, cells))
        contents[file] = table_text([*IDS, *embedding.names], rows).encode()
    if file.suffix in (".csv", ".npy"):
        contents[_beside(file, ".about.json")] = about.encode()
    for name, content in contents.items():
        write_whole(name, content)
    return list(contents)


def read(path: PathLike) -> Embedding:
    """Features that `write` left, or another program's CSV, Parquet or NPZ of the same shape: the five id columns and
    numbers. Columns that are not named as ours are one part, ``features``.

    Raises: ConfigError where the file is missing, lacks an id column or holds other than numbers.
    """
    file = Path(path)
    if file.suffix not in FORMATS:
        raise ConfigError(f"{file}: expected features in a file that ends in {', '.join(FORMATS)}")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file, expected features as `brainfm embed` leaves them")
    try:
        ids, names, matrix, about = _READERS[file.suffix](file)
    except (ValueError, KeyError, OSError, StopIteration, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file}: cannot be read as features with ids ({error})") from None
    if matrix.ndim != 2 or matrix.shape != (len(ids), len(names)) or not names:
        raise ConfigError(f"{file}: found {matrix.shape} features, expected {len(ids)} rows of {len(names)}")
    columns: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        own = _FEATURE.fullmatch(name)
        columns.setdefault(own[1] if own else "features", []).append(number)
    parts = {part: np.ascontiguousarray(matrix[:, numbers], np.float32) for part, numbers in columns.items()}
    return Embedding(tuple((a, b, c, d, e) for a, b, c, d, e in ids), parts, about)


Contents = tuple[list[tuple[str, ...]], list[str], np.ndarray, dict[str, Any]]


def _parquet(embedding: Embedding, about: str) -> bytes:
    arrow, parquet = _pyarrow()
    columns = [arrow.array(column, arrow.string()) for column in zip(*embedding.rows)]
    columns += [arrow.array(column) for column in embedding.matrix.T]
    table = arrow.table(columns, names=[*IDS, *embedding.names]).replace_schema_metadata({_ABOUT: about})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    return buffer.getvalue()


def _read_parquet(file: Path) -> Contents:
    _, parquet = _pyarrow()
    table = parquet.read_table(file)
    missing = [name for name in IDS if name not in table.column_names]
    if missing:
        raise KeyError(f"no column {missing[0]}")
    names = [name for name in table.column_names if name not in IDS]
    matrix = np.stack([np.asarray(table[name].to_numpy(), np.float32) for name in names], axis=1)
    about = json.loads((table.schema.metadata or {}).get(_ABOUT.encode(), b"{}"))
    return list(zip(*(map(str, table[name].to_pylist()) for name in IDS))), names, matrix, about


def _read_csv(file: Path) -> Contents:
    with file.open(newline="", encoding="utf-8") as text:
        reader = csv.reader(text)
        header = next(reader)
        place = [header.index(name) for name in IDS]
        rest = [number for number, name in enumerate(header) if name not in IDS]
        rows = list(reader)
    ids = [tuple(row[number] for number in place) for row in rows]
    matrix = np.array([[float(row[number]) for number in rest] for row in rows], np.float32)
    return ids, [header[number] for number in rest], matrix, _about(file)


def _read_npz(file: Path) -> Contents:
    arrays = read_arrays(file, ConfigError, "features with ids")
    ids = [tuple(map(str, row)) for row in arrays["ids"]]
    about = json.loads(str(arrays["about"])) if "about" in arrays else {}
    return ids, [str(name) for name in arrays["names"]], arrays["features"], about


def _read_npy(file: Path) -> Contents:
    matrix = read_array(file, ConfigError, "features")
    with _beside(file, ".ids.csv").open(newline="", encoding="utf-8") as text:
        rows = [tuple(row) for row in csv.reader(text)][1:]
    about = _about(file)
    return rows, about.get("features") or [str(number) for number in range(matrix.shape[1])], matrix, about


_READERS: dict[str, Callable[[Path], Contents]] = {
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".npz": _read_npz,
    ".npy": _read_npy,
}


def _about(file: Path) -> dict[str, Any]:
    beside = _beside(file, ".about.json")
    return json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}


def _beside(file: Path, ending: str) -> Path:
    return file.with_name(file.stem + ending)


def _pyarrow() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise missing("pyarrow", "Parquet", "or write .npz, .npy or .csv") from None
