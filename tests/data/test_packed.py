"""Packed heads: windows read from them on a device are those that the store gives."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.batch import Batch
from brainfm.data import packed, regions
from brainfm.data.device_windows import DeviceWindows, outside_by_intensity
from brainfm.data.packed import PackedStore, PackedWindows, write_packed
from brainfm.data.patches import collate
from brainfm.data.settings import TargetSpec, WindowSpec
from brainfm.data.store import Store
from brainfm.data.targets import find_targets
from brainfm.data.windows import WindowPatches, level_for
from brainfm.errors import StoreError
from brainfm.specs import ViewSpec

VIEWS = ViewSpec((16, 16, 16), pairs=True, regions=True, lesions=True, windows=True)
SPEC = WindowSpec(coarse_steps=4, settle_steps=20)
STEP = 1 / 64


def from_store(store: Store) -> WindowPatches:
    targets = find_targets(store, TargetSpec(level="regions"), {s.subject_key for s in store.sessions})
    return WindowPatches(store, store.sessions, VIEWS, 3, SPEC, 1, targets)


@pytest.fixture(scope="module")
def both(people_store: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[WindowPatches, PackedWindows]:
    """The same windows from a store and from a packed file that keeps every place in the brain."""
    patches, file = from_store(people_store), tmp_path_factory.mktemp("packed") / "heads.zip"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_POINTS", 10**6)
        write_packed(file, patches, [people_store.sessions[-1].key], {"seed": 0}, STEP)
    store = PackedStore.open(file)
    return patches, PackedWindows(store, store.sessions, VIEWS, 3, SPEC, 1, store.targets())


def test_windows_on_the_device_are_those_of_the_store(both: tuple[WindowPatches, PackedWindows]) -> None:
    patches, windows = both
    device = DeviceWindows(windows, torch.device("cpu"))
    numbers = range(40)
    expected = collate([patches[n] for n in numbers]).to("cpu")
    halves = [device.finish(device.begin(numbers[:20])), device.finish(device.begin(numbers[20:]))]
    found = {f.name: [getattr(half, f.name) for half in halves] for f in dataclasses.fields(Batch)}
    lesions = 0
    for name, parts in found.items():
        wanted = getattr(expected, name)
        assert (wanted is None) == (parts[0] is None), name
        if wanted is None:
            continue
        value = torch.cat(parts)
        assert value.dtype == wanted.dtype and value.shape == wanted.shape, name
        if name in ("image", "partner"):
            apart = (value - wanted).abs().flatten(1).amax(dim=1)
            assert float(apart.max()) < 1.5 * STEP, name
        elif name == "tissue":  # a scan that lies on the border of air or of a cluster may change sides
            assert float((value != wanted).float().mean()) < 1e-3
        else:
            assert torch.allclose(value.double(), wanted.double(), atol=1e-5, equal_nan=True), name
        lesions += int(name == "lesion_weight" and (value.flatten(1).amax(dim=1) > 0).sum())
    assert lesions > 5  # the test has seen lesions put in


def test_reading_never_asks_the_device_for_a_value(both: tuple[WindowPatches, PackedWindows]) -> None:
    """A GPU would make the host wait for all that it has still to do; on the meta device there is no value to give."""
    _, windows = both
    without = dataclasses.replace(windows, targets=dataclasses.replace(windows.targets, synthesise=0.0))
    device = DeviceWindows(without, torch.device("meta"))
    batch = device.finish(device.begin(range(20)))
    assert batch.image.device.type == "meta" and batch.image.shape == (20, 1, 24, 24, 24)
    assert batch.corners is not None and batch.corners.device.type == "cpu"


def test_the_host_reads_the_same_windows(both: tuple[WindowPatches, PackedWindows]) -> None:
    patches, windows = both
    for number in range(8):
        one, other = patches[number], windows[number]
        assert np.abs(one.image.astype(np.float32) - other.image.astype(np.float32)).max() < 1.5 * STEP
        assert (one.regions == other.regions).all() and (one.lesion == other.lesion).all()


def test_coarse_heads_keep_their_coarse_level_alone(people_store: Store, tmp_path: Path) -> None:
    patches = from_store(people_store)
    patches.own_mm = lambda session: 2.6  # type: ignore[method-assign]  # of voxels of 2 mm
    write_packed(tmp_path / "heads.zip", patches, [], {})
    store = PackedStore.open(tmp_path / "heads.zip")
    session = store.sessions[0]
    assert store.finest(session) == 1 and len(store.quantised(session, "t1")) == 1
    assert level_for(store, session, 0.8) == 1
    coarse = people_store.block(people_store.sessions[0], "t1", (0, 0, 0), people_store.shape(session, 1), level=1)
    assert np.abs(store.block(session, "t1", (0, 0, 0), coarse.shape, level=1) - coarse).max() <= packed.STEP
    with pytest.raises(ValueError, match="level=0 of d/p0/1: expected 1 to 1"):
        store.block(session, "t1", (0, 0, 0), (4, 4, 4))


def test_points_keep_the_ends_and_equal_heads_make_equal_files(people_store: Store, tmp_path: Path) -> None:
    points = np.random.default_rng(0).integers(0, 90, (5000, 3))
    some = packed._some_points(points)
    assert len(some) <= 1030 and (some.min(axis=0) == points.min(axis=0)).all()
    assert (some.max(axis=0) == points.max(axis=0)).all()
    for name in ("a.zip", "b.zip"):
        write_packed(tmp_path / name, from_store(people_store), [], {})
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_outside_by_intensity_on_tensors() -> None:
    rng = np.random.default_rng(0)
    scan = rng.normal(size=(6, 7, 8)).astype(np.float32)
    scan[0] = scan.min()
    tissue = rng.choice([0, 3, regions.BY_INTENSITY], scan.shape).astype(np.uint8)
    found = outside_by_intensity(torch.from_numpy(tissue), torch.from_numpy(scan))
    assert (found.numpy() == regions.outside_by_intensity(tissue, scan)).all()


def test_refusals(people_store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none.zip: cannot be read .* expected a file of packed heads"):
        PackedStore.open(tmp_path / "none.zip")
    write_packed(tmp_path / "heads.zip", from_store(people_store), [], {})
    (tmp_path / "cut.zip").write_bytes((tmp_path / "heads.zip").read_bytes()[:-200])
    with pytest.raises(StoreError, match=r"cut.zip: cannot be read"):
        PackedStore.open(tmp_path / "cut.zip")
    with zipfile.ZipFile(tmp_path / "heads.zip") as old, zipfile.ZipFile(tmp_path / "other.zip", "w") as new:
        about = json.loads(old.read("about.json")) | {"targets": ["nose"]}
        new.writestr("about.json", json.dumps(about))
    with pytest.raises(StoreError, match=r"other.zip: was packed by another version"):
        PackedStore.open(tmp_path / "other.zip")
