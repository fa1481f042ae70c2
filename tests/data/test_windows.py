"""Windows: all that belongs to a sample moves together, views lie where their corners say, schedules are of steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.regions import IGNORE
from brainfm.data.settings import TargetSpec, WindowSpec
from brainfm.data.store import Store
from brainfm.data.targets import find_targets
from brainfm.data.windows import Placed, WindowPatches, draw_voxel_mm, place_window, read_window, source_shares
from brainfm.errors import ConfigError, StoreError
from brainfm.specs import PreprocessSpec, ViewSpec

VIEWS = ViewSpec((16, 16, 16), pairs=True, regions=True, lesions=True, windows=True)
STILL = WindowSpec(
    low_mm=2, high_mm=2, whole_share=0, coarse_steps=0, settle_steps=0, rotate_deg=0, stretch=0, elastic=0, shift_vox=4
)


def windows(store: Store, spec: WindowSpec = STILL, **changes) -> WindowPatches:
    everybody = {s.subject_key for s in store.sessions}
    targets = find_targets(store, TargetSpec(level="regions"), everybody)
    changes = {"sessions": store.sessions, "views": VIEWS, "seed": 3, "steps_of": 2, "targets": targets} | changes
    return WindowPatches(store, spec=spec, **changes)


def test_whole_heads_come_first_then_finer_and_finer_windows() -> None:
    spec, rng = WindowSpec(coarse_steps=100, settle_steps=300), np.random.default_rng(0)
    early = [draw_voxel_mm(rng, spec, 99, 1.0) for _ in range(400)]
    assert all(whole and 3.5 <= mm <= 5 for mm, whole in early)
    middle = [draw_voxel_mm(rng, spec, 200, 1.0) for _ in range(4000)]
    assert np.mean([whole for _, whole in middle]) == pytest.approx(1 + 0.5 * (1 / 6 - 1), abs=0.03)
    assert min(mm for mm, whole in middle if not whole) == pytest.approx(np.sqrt(0.8 * 4), rel=0.05)
    late = [draw_voxel_mm(rng, spec, 10**6, 1.0) for _ in range(6000)]
    fine = np.log([mm for mm, whole in late if not whole])
    assert np.mean([whole for _, whole in late]) == pytest.approx(1 / 6, abs=0.02)
    assert fine.min() == pytest.approx(np.log(0.8), abs=0.03)
    assert fine.mean() == pytest.approx(np.log(3.2) / 2, abs=0.02)


def test_no_scan_is_shown_much_finer_than_it_was_taken() -> None:
    rng = np.random.default_rng(0)
    fine = [draw_voxel_mm(rng, WindowSpec(), 10**6, 2.0) for _ in range(500)]
    assert min(mm for mm, whole in fine if not whole) >= 1.6


def test_a_still_window_holds_the_store_voxels_and_left_stays_left(people_store: Store) -> None:
    session = next(s for s in people_store.sessions if s.subject == "p0")
    shape, edge = session.shape, 12
    placed = place_window(
        np.random.default_rng(5), STILL, edge_vox=edge, voxel_mm=2.0, whole=True, shape=shape, spacing_mm=2.0,
        points=np.zeros((0, 3)),
    ).placed()  # fmt: skip
    scan, ids = (read_window(people_store, session, n, placed, labels=n != "t1") for n in ("t1", "tissue_labels"))
    flipped = placed.positions[0, 0, 0, 0] > placed.positions[0, -1, 0, 0]
    nearest = np.rint(placed.positions).astype(int)
    inside = ((nearest >= 0) & (nearest < np.array(shape).reshape(3, 1, 1, 1))).all(axis=0)
    near = np.clip(nearest, 0, np.array(shape).reshape(3, 1, 1, 1) - 1)
    expected = people_store.volume(session, "tissue_labels")[tuple(near)]
    assert inside.mean() > 0.9 and (ids == expected)[inside].all()
    left, right = (3, 1) if flipped else (1, 3)  # tissue 1 is on the left of the head
    where = np.arange(edge).reshape(-1, 1, 1) * np.ones_like(ids)
    assert where[ids == left].mean() < where[ids == 2].mean() < where[ids == right].mean()
    assert scan[ids == 3].mean() > scan[ids == 2].mean() > scan[ids == 1].mean()  # t1 and its map moved together


def test_a_coarser_level_shows_the_same_places(people_store: Store) -> None:
    """A field that is linear in space is read alike from every level."""
    session = people_store.sessions[0]
    ramp = np.arange(session.shape[0], dtype=np.float32).reshape(-1, 1, 1) * np.ones(session.shape, np.float32)

    class Ramps:
        spec, levels, shape = people_store.spec, lambda self, s: 1, people_store.shape
        finest = people_store.finest

        def block(self, entry, name, corner, size, level=0):
            places = np.clip(np.arange(corner[0], corner[0] + size[0]), 0, self_shape(level) - 1)
            means = ramp[:, 0, 0][: self_shape(level) * 2**level].reshape(self_shape(level), -1).mean(axis=1)
            return (means[places].reshape(-1, 1, 1) * np.ones(size)).astype(np.float32)

    def self_shape(level: int) -> int:
        return session.shape[0] // 2**level

    at = np.stack(np.meshgrid(*[np.arange(6, 12, dtype=np.float32)] * 3, indexing="ij"))
    for voxel_mm in (2.0, 3.9, 8.0):  # the last two are read from the level of 4 mm
        found = read_window(Ramps(), session, "t1", Placed(voxel_mm, False, at))
        assert np.allclose(found, at[0], atol=1e-4)


def test_corners_say_where_both_views_lie_and_the_same_sample_comes_from_any_worker(people_store: Store) -> None:
    dataset = windows(people_store, dataclasses.replace(STILL, rotate_deg=20, elastic=0.5, stretch=0.1))
    sample = dataset[7]
    assert sample.image.shape == (1, 20, 20, 20) and sample.corners.shape == (2, 3)
    assert sample.corners.min() >= 0 and sample.corners.max() <= 4
    batches = [torch.cat([b.image for b in make_loader(dataset, StepSampler(0, 3, 2), workers)]) for workers in (0, 2)]
    assert torch.equal(*batches)


def test_unknown_heads_are_never_rendered_and_masks_decide_about_lesions(people_store: Store) -> None:
    dataset = windows(people_store, dataclasses.replace(STILL, rendered=1.0))
    seen = [dataset[i] for i in range(40)]
    mapped = [bool((s.regions != IGNORE).any()) for s in seen]
    assert 5 < sum(mapped) < 40
    for sample, known in zip(seen, mapped, strict=True):
        assert sample.rendered.all() == known and sample.tissue.any() == known
        assert (sample.tissue_shares.sum() > 0.99) == known


def test_volumes_of_whole_heads_only(people_store: Store) -> None:
    dataset = windows(people_store)
    assert dataset.targets.regions == ()  # tissue maps tell no groups
    assert dataset[0].volumes is None


def test_data_sets_share_the_samples_by_the_root_of_their_people_up_to_a_cap() -> None:
    assert np.allclose(source_shares([100, 25, 25], 1.0), [0.5, 0.25, 0.25])
    capped = source_shares([10000, 4, 4], 0.5)
    assert np.allclose(capped, [0.5, 0.25, 0.25])
    assert np.allclose(source_shares([7], 0.5), [1.0])


def test_heads_with_label_maps_get_their_share_of_the_samples(people_store: Store) -> None:
    for share in (0.9, 0.2):
        dataset = windows(people_store, dataclasses.replace(STILL, mapped_share=share))
        shown = [dataset.plan(i).session.key in dataset.targets.maps for i in range(600)]
        assert abs(np.mean(shown) - share) < 0.06
        assert np.isclose(dataset.shares.sum(), 1)
    everyone = windows(people_store, dataclasses.replace(STILL, mapped_share=None))
    assert sorted(everyone.subjects) == sorted(dataset.subjects)


def test_refusals(people_store: Store, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.windows\.rendered=1\.5: expected a share from 0 to 1"):
        WindowSpec(rendered=1.5)
    with pytest.raises(ConfigError, match=r"data\.windows\.mapped_share=-1: expected a share from 0 to 1"):
        WindowSpec(mapped_share=-1)
    with pytest.raises(ConfigError, match="coarse_steps=9, settle_steps=3"):
        WindowSpec(coarse_steps=9, settle_steps=3)
    with pytest.raises(ConfigError, match="windows need a cube"):
        windows(people_store, views=dataclasses.replace(VIEWS, patch_vox=(16, 16, 32)))
    with pytest.raises(StoreError, match="no scan to train on"):
        windows(people_store, sessions=[])
    thick = Store.create(tmp_path / "s", PreprocessSpec(spacing_mm=(1, 1, 5)))
    with pytest.raises(ConfigError, match="windows need a store of equal voxel edges"):
        WindowPatches(thick, (), VIEWS, 0, STILL, 1)
