"""Patches: the same for any number of workers, at one corner for a pair, every subject once an epoch."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.patches import PretrainPatches, draw_corner, drop_contrasts
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.seeds import stream
from brainfm.specs import PreprocessSpec, ViewSpec
from brainfm.tasks.segmentation.cases import TaskPatches, class_indices, class_shares, find_cases, whole_case

PAIRS = ViewSpec((16, 16, 16), pairs=True)


def batches(dataset, workers: int, first: int = 0, last: int = 6, rank: int = 0, world: int = 1) -> list:
    return list(make_loader(dataset, StepSampler(first, last, 2, rank, world), workers))


def equal(one, other) -> bool:
    return all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(dataclasses.astuple(one), dataclasses.astuple(other))
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_sample_is_the_same_for_any_number_of_workers(toy_store: Store, workers: int) -> None:
    dataset = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=3)
    alone = batches(dataset, 0)
    assert len(alone) == 6
    assert all(equal(a, b) for a, b in zip(alone, batches(dataset, workers), strict=True))


def test_a_loader_that_begins_later_gives_the_same_batches(toy_store: Store) -> None:
    dataset = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=3)
    again = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=3)
    assert all(equal(a, b) for a, b in zip(batches(dataset, 0)[4:], batches(again, 0, first=4), strict=True))


def test_other_seed_other_patches(toy_store: Store) -> None:
    one, other = (batches(PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=s), 0) for s in (3, 4))
    assert not any(equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_share_an_epoch_without_overlap(toy_store: Store) -> None:
    dataset = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=0)
    numbers = [n for rank in (0, 1) for step in StepSampler(0, 3, 1, rank, 2) for n in step]
    assert sorted(numbers) == list(range(6))
    seen = Counter(dataset._shuffled[n] for n in numbers)
    assert seen == Counter(range(len(dataset)))  # six samples, six subjects: each once


def test_every_subject_once_an_epoch_in_another_order_each(toy_store: Store) -> None:
    shuffled = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=0)._shuffled
    epochs = [[shuffled[e * 6 + i] for i in range(6)] for e in range(4)]
    assert all(sorted(order) == list(range(6)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 1


def test_pair_is_read_at_one_corner(toy_store: Store) -> None:
    """Both scans of a phantom share the head's outline, so shifted corners would show in the background."""
    dataset = PretrainPatches(toy_store, toy_store.sessions, PAIRS, seed=1, foreground_share=0.0)
    paired = [s for s in (dataset[i] for i in range(60)) if s.paired]
    assert len(paired) > 30
    for sample in paired:
        outlines = [v[0] == v[0].min() for v in (sample.image, sample.partner)]
        if outlines[0].mean() > 0.05:
            assert (outlines[0] == outlines[1]).mean() > 0.97
        assert not np.array_equal(sample.image, sample.partner) and not sample.same_contrast


def test_single_scan_is_no_pair(toy_store: Store) -> None:
    only = [s for s in toy_store.sessions if len(s.scans) == 1]
    assert len(only) == 1
    sample = PretrainPatches(toy_store, only, PAIRS, seed=1)[0]
    assert not sample.paired and not sample.same_contrast


def test_patch_thicker_than_the_volume_is_padded_on_both_sides(toy_store: Store) -> None:
    dataset = PretrainPatches(toy_store, toy_store.sessions, ViewSpec((64, 16, 16)), seed=1)
    sample = dataset[0]
    assert sample.image.shape == (1, 64, 16, 16)
    assert np.all(sample.image[0, 0] == sample.image.min()) and np.all(sample.image[0, -1] == sample.image.min())


def test_corner_keeps_the_point_inside_the_patch() -> None:
    for i in range(300):
        point = np.array([[5, 60, 31]])
        corner = draw_corner(stream(0, "test", i), (64, 64, 64), (16, 16, 16), point, 1.0)
        assert all(0 <= c <= 48 and c <= p < c + 16 for c, p in zip(corner, point[0]))


def test_uniform_corners_reach_every_place() -> None:
    corners = [draw_corner(stream(0, "test", i), (18, 16, 20), (16, 16, 16), np.zeros((0, 3)), 1.0) for i in range(200)]
    assert {c[0] for c in corners} == {0, 1, 2} and {c[2] for c in corners} == {0, 1, 2, 3, 4}
    assert {c[1] for c in corners} == {0}


def test_labels_lie_where_the_lesion_is(toy_store: Store) -> None:
    cases, left_out = find_cases(toy_store, ["t1", "flair"], "lesion")
    assert len(cases) == 6 and not left_out
    dataset = TaskPatches(toy_store, cases, (0, 1), (16, 16, 16), seed=0, foreground_share=1.0)
    for i in range(12):
        sample = dataset[i]
        assert sample.label.any()
        flair = sample.image[1]
        if sample.present[1]:
            inside = flair[sample.label == 1].mean()
            assert inside > flair[(sample.label == 0) & (flair > flair.min())].mean()


def test_missing_and_dropped_contrasts_are_zero(toy_store: Store) -> None:
    cases, _ = find_cases(toy_store, ["t1", "flair"], "lesion")
    dataset = TaskPatches(toy_store, cases, (0, 1), (16, 16, 16), seed=0, contrast_dropout=0.5)
    seen = set()
    for i in range(40):
        sample = dataset[i]
        assert sample.present.any()
        assert not sample.image[~sample.present].any()
        seen.add(tuple(sample.present.tolist()))
    assert seen == {(True, True), (True, False), (False, True)}


def test_dropping_never_takes_the_last() -> None:
    assert all(any(drop_contrasts(["a", None, "b"], stream(0, "test", i), 0.99)) for i in range(100))


def test_whole_case(toy_store: Store) -> None:
    cases, _ = find_cases(toy_store, ["flair", "t1", "swi"], "lesion")
    image, present, label = whole_case(toy_store, cases[1], (0, 1))
    assert image.shape == (3, *cases[1].session.shape) and label.shape == image.shape[1:]
    assert present.tolist() == [True, True, False] and set(np.unique(label)) == {0, 1}


def test_refusals(toy_store: Store) -> None:
    with pytest.raises(ManifestError, match=r"tumour_mask.*lesion_mask"):
        find_cases(toy_store, ["t1"], "tumour")
    with pytest.raises(ManifestError, match="label value 4 found, expected one of 0, 1, 2"):
        class_indices(np.array([0, 1, 4]), (0, 1, 2))
    with pytest.raises(ConfigError, match="no case"):
        TaskPatches(toy_store, [], (0, 1), (16, 16, 16), 0)


def test_class_indices_of_gapped_labels() -> None:
    assert class_indices(np.array([0, 4, 1, 2]), (0, 1, 2, 4)).tolist() == [0, 3, 1, 2]


@pytest.fixture(scope="module")
def unequal_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two heads with a class of one voxel and one of thousands; the second shows the large one alone."""
    import nibabel as nib

    root = tmp_path_factory.mktemp("unequal")
    scans = []
    for number in range(2):
        label = np.zeros((40, 40, 40), np.uint8)
        label[20:, :, :] = 7
        if number == 0:
            label[5, 30, 8] = 3
        voxels = np.random.default_rng(number).normal(100, 5, label.shape).astype(np.float32)
        for name, array in ((f"{number}_t1", voxels), (f"{number}_x", label)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), root / f"{name}.nii")
        scans.append(Scan("d", str(number), "", "t1", f"{number}_t1.nii", {"x_labels": f"{number}_x.nii"}))
    write_manifest(root / "m.csv", scans)
    prepare(read_manifest(root / "m.csv"), root / "store", PreprocessSpec(labels="nearest", margin_mm=0), workers=1)
    return Store.open(root / "store")


def test_small_classes_are_met_as_often_as_large_ones(unequal_store: Store) -> None:
    cases, _ = find_cases(unequal_store, ["t1"], "x")
    dataset = TaskPatches(unequal_store, cases[:1], (0, 3, 7), (8, 8, 8), seed=0, foreground_share=1.0)
    small = [bool((dataset[i].label == 1).any()) for i in range(200)]
    assert 0.4 < np.mean(small) < 0.6  # of 4096 points one is of class 3: drawn by voxel it would hardly be met
    assert all(dataset[i].label.any() for i in range(50))


def test_shares_are_those_of_the_patches_that_training_draws(unequal_store: Store) -> None:
    cases, _ = find_cases(unequal_store, ["t1"], "x")
    dataset = TaskPatches(unequal_store, cases, (0, 3, 7), (8, 8, 8), seed=0)
    assert all(np.array_equal(dataset.label(i), dataset[i].label) for i in range(10))
    drawn = np.concatenate([dataset[i].label.ravel() for i in range(12)])
    shares = class_shares(unequal_store, cases, (0, 3, 7), (8, 8, 8), draws=12)
    assert shares == pytest.approx([float((drawn == k).mean()) for k in range(3)]) and sum(shares) == pytest.approx(1)
    assert 0 < shares[1] < 0.01 < shares[2]


def test_a_class_that_a_case_lacks_is_not_drawn(unequal_store: Store) -> None:
    cases, _ = find_cases(unequal_store, ["t1"], "x")
    dataset = TaskPatches(unequal_store, cases[1:], (0, 3, 7), (8, 8, 8), seed=0, foreground_share=1.0)
    assert all(set(np.unique(dataset[i].label)) <= {0, 2} and (dataset[i].label == 2).any() for i in range(30))


def test_labelled_samples_are_the_same_in_any_order_and_for_any_number_of_workers(unequal_store: Store) -> None:
    cases, _ = find_cases(unequal_store, ["t1"], "x")

    def fresh() -> TaskPatches:
        return TaskPatches(unequal_store, cases, (0, 3, 7), (8, 8, 8), seed=5, foreground_share=0.7)

    alone, other = batches(fresh(), 0), fresh()
    assert all(equal(a, b) for a, b in zip(alone, batches(fresh(), 2), strict=True))
    backwards = {i: other[i] for i in reversed(range(12))}
    for number, batch in enumerate(alone):
        for place in (0, 1):
            assert np.array_equal(batch.label[place].numpy(), backwards[2 * number + place].label)
            assert np.array_equal(batch.image[place].numpy(), backwards[2 * number + place].image)
