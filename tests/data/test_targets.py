"""Anatomical targets belong to subjects, disease to places; what is not known is said to be unknown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.patches import PretrainPatches, collate
from brainfm.data.prepare import prepare
from brainfm.data.settings import TargetSpec
from brainfm.data.store import Store
from brainfm.data.targets import find_targets, ill, interval_years
from brainfm.errors import ConfigError, ManifestError
from brainfm.specs import PreprocessSpec, ViewSpec
from tests import phantoms

PATCH = (16, 16, 16)
ANATOMY = ViewSpec(PATCH, pairs=True, regions=True, volumes=True, lesions=True)


@pytest.fixture(scope="module")
def store(people_store: Store) -> Store:
    return people_store


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("volumes") / "volumes.csv"
    rows = ["dataset,subject,session,path,csf_ml,gm_ml,wm_ml,brain_ml,icv_ml,flag"]
    rows += [f"d,p{n},1,x,{200 + 20 * n},{600 + n},{500 - 9 * n},{1100 - 8 * n},{1300 + 12 * n}," for n in range(5)]
    path.write_text("\n".join(rows) + "\n")
    return path


def find(store: Store, table: Path | None = None, **spec):
    everybody = {s.subject_key for s in store.sessions}
    return find_targets(store, TargetSpec(volumes=str(table) if table else None, **spec), everybody)


def session_of(store: Store, subject: str, visit: str = "1"):
    return next(s for s in store.sessions if s.subject == subject and s.session == visit)


def record_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list:
    """(session, name, corner) of every block that is read from here on."""
    reads: list = []
    block = store.block

    def recorded(session, name, corner, size):
        reads.append((session, name, corner))
        return block(session, name, corner, size)

    monkeypatch.setattr(store, "block", recorded)
    return reads


def samples(store: Store, targets, subject: str, views: ViewSpec = ANATOMY, count: int = 40, **change):
    sessions = [dataclasses.replace(s, **change) for s in store.sessions if s.subject == subject]
    dataset = PretrainPatches(store, sessions, views, seed=5, targets=targets)
    return [dataset[i] for i in range(count)]


def test_label_maps_are_read_at_the_place_of_the_scan(store: Store) -> None:
    targets = find(store, synthesise=0.0)
    assert targets.groups == ("background", "csf", "grey", "white")
    assert set(targets.maps) == {s.key for s in store.sessions if s.subject in ("p0", "p1", "p2", "p3")}
    views = dataclasses.replace(ANATOMY, lesions=False, volumes=False)
    for sample in samples(store, targets, "p3", views):
        there = [k for k in (1, 2, 3) if (sample.regions == k).any()]
        levels = [float(sample.image[0][sample.regions == k].mean()) for k in there]
        assert levels in (sorted(levels), sorted(levels, reverse=True))  # a t1 rises with the tissue, a t2 falls
        assert all(sample.image[0][sample.regions == k].std() < 0.2 for k in there)
        assert sample.regions.min() >= 0


def test_subject_without_a_map_is_unknown_and_keeps_its_sample(store: Store, table: Path) -> None:
    targets = find(store, table)
    batch = collate(samples(store, targets, "p5", count=4))
    assert (batch.regions == -1).all() and batch.volumes.isnan().all() and batch.image.std() > 0
    batch = collate(samples(store, targets, "p4", count=4))
    assert (batch.regions == -1).all() and not batch.volumes.isnan().any()
    assert any("no anatomical target for 1 subjects" in note for note in targets.notes)


def test_volumes_are_standardised_by_those_trained_on(store: Store, table: Path) -> None:
    trained = {f"d/p{n}" for n in (0, 1, 2)}
    targets = find_targets(store, TargetSpec(volumes=str(table)), trained)
    values = np.stack([targets.volumes[key] for key in sorted(trained)])
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-4)
    assert set(targets.volumes) == {f"d/p{n}" for n in range(5)}


def test_one_map_serves_every_visit_in_its_space(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second visit, moved by known voxels in a common frame, is given the first visit's map at the right place."""
    first, second = session_of(store, "p0"), session_of(store, "p0", "2")
    assert find(store).maps[second.key].session.key == second.key  # by headers alone the visits share no space
    common = [
        dataclasses.replace(first, frame="d/p0", offset_vox=(0, 0, 0)),
        dataclasses.replace(second, frame="d/p0", offset_vox=(3, -2, 1)),
    ]
    store.sessions, before = tuple(common), store.sessions
    try:
        targets = find(store, synthesise=0.0)
    finally:
        store.sessions = before
    assert targets.maps[second.key].session.key == first.key
    views = dataclasses.replace(ANATOMY, visits=True, volumes=False, lesions=False)
    dataset = PretrainPatches(store, common, views, seed=5, targets=targets)
    reads = record_reads(store, monkeypatch)
    intervals = set()
    for i in range(30):
        reads.clear()
        intervals.add(round(dataset[i].interval_years, 3))
        (scanned, _, corner), (mapped, name, place) = reads[0], reads[-1]
        assert (mapped.key, name) == (first.key, "tissue_labels")
        assert place == tuple(c + o for c, o in zip(corner, scanned.offset_vox))
    assert intervals == {0.0, 2.5, -2.5}


def test_pair_across_visits_shows_one_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two corners name one voxel of the common lattice, and the voxels there are the same tissue."""
    views = ViewSpec(PATCH, pairs=True, visits=True)
    first, second = session_of(store, "p0"), session_of(store, "p0", "2")
    common = [dataclasses.replace(first, frame="f"), dataclasses.replace(second, frame="f", offset_vox=(4, 0, -1))]
    dataset = PretrainPatches(store, common, views, seed=5)
    reads = record_reads(store, monkeypatch)
    across = 0
    for i in range(40):
        reads.clear()
        sample = dataset[i]
        (one, _, corner), (other, _, place) = reads
        lattice = [tuple(np.add(c, s.offset_vox)) for s, c in ((one, corner), (other, place))]
        assert lattice[0] == lattice[1]
        assert (sample.interval_years != 0) == (one.key != other.key)
        across += one.key != other.key
    assert 15 < across < 35  # two of the three other scans are of the other visit


def test_masks_decide_before_health_and_health_before_nothing(store: Store) -> None:
    targets = find(store, synthesise=0.0)
    assert any("not taken for pathology: brain_mask" in note for note in targets.notes)
    masked = samples(store, targets, "p1")
    assert {s.pathology for s in masked} == {0.0, 1.0}
    assert all(s.pathology == float((s.lesion == 1).any()) and s.lesion.min() == 0 for s in masked)
    assert all(s.pathology == 1 and (s.lesion == -1).all() for s in samples(store, targets, "p2", count=5))
    assert all(s.pathology == 0 and (s.lesion == 0).all() for s in samples(store, targets, "p3", count=5))
    assert all(np.isnan(s.pathology) and (s.lesion == -1).all() for s in samples(store, targets, "p4", count=5))


def test_lesions_are_put_into_healthy_tissue_of_both_scans_and_nowhere_else(store: Store) -> None:
    bare = find(store, synthesise=0.0)
    targets = find(store, synthesise=0.7)
    struck = 0
    for plain, sample in zip(samples(store, bare, "p3"), samples(store, targets, "p3"), strict=True):
        lesion = sample.lesion == 1
        assert sample.pathology == float(lesion.any()) and sample.lesion.min() == 0
        if not lesion.any():
            assert np.array_equal(plain.image, sample.image) and np.array_equal(plain.partner, sample.partner)
            continue
        struck += 1
        assert (sample.regions[lesion] > 1).all()  # not in air, not in fluid
        for before, after in ((plain.image, sample.image), (plain.partner, sample.partner)):
            changed = (before != after)[0]
            assert changed[lesion].mean() > 0.9 and after.dtype == np.float16
    assert 15 <= struck <= 36
    for subject in ("p1", "p2"):  # masked, or known to be ill
        pairs = zip(samples(store, bare, subject, count=9), samples(store, targets, subject, count=9), strict=True)
        assert all(np.array_equal(a.image, b.image) for a, b in pairs)


def test_shifted_views_of_the_only_scan(store: Store) -> None:
    views = ViewSpec(PATCH, pairs=True, shift=0.4)
    one_scan = [dataclasses.replace(s, scans=s.scans[:1]) for s in store.sessions]
    dataset = PretrainPatches(store, one_scan, views, seed=1)
    drawn = [dataset[i] for i in range(20)]
    assert not any(s.paired for s in drawn)
    assert sum(not np.array_equal(s.image, s.partner) for s in drawn) > 10
    assert sorted({s.subject for s in drawn}) == list(range(6))


def test_samples_do_not_depend_on_what_else_is_asked(store: Store) -> None:
    """The voxels of sample i are those of plain pre-training: targets draw from streams of their own."""
    plain = samples(store, find(store, synthesise=0.0), "p0", ViewSpec(PATCH), count=10)
    more = samples(store, find(store, synthesise=0.0), "p0", ANATOMY, count=10)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(plain, more, strict=True))


@pytest.mark.parametrize(
    ("column", "text", "want"),
    [
        ("healthy", "1", 0.0), ("healthy", "False", 1.0), ("healthy", "perhaps", None), ("healthy", "", None),
        ("health_status", "healthy", 0.0), ("health_status", "Control", 0.0), ("health_status", "depression", 1.0),
        ("health_status", "n/a", None),
    ],
)  # fmt: skip
def test_ill(column: str, text: str, want: float | None) -> None:
    assert ill(column, text) == want


def test_interval__text_is_unknown(store: Store) -> None:
    one, other = session_of(store, "p0"), session_of(store, "p0", "2")
    assert interval_years(one, other) == 2.5
    assert np.isnan(interval_years(one, dataclasses.replace(other, columns={"age": "forty"})))
    days = [dataclasses.replace(s, columns={"days_from_baseline": d}) for s, d in ((one, "0"), (other, "731"))]
    assert interval_years(*days) == pytest.approx(731 / 365.25)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"labels": {"aseg_labels": "auto"}}, "no label column 'aseg_labels', found tissue_labels"),
        ({"lesions": ["tumour_mask"]}, "no mask column 'tumour_mask', found brain_mask, lesion_mask"),
        ({"health": "diagnosis"}, "no column 'diagnosis' tells health"),
    ],
)
def test_columns_that_are_not_there(store: Store, spec: dict, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        find(store, **spec)


def test_refusals(store: Store, tmp_path: Path) -> None:
    for spec, words in (
        ({"level": "lobes"}, "expected groups, tissues, regions or null"),
        ({"synthesise": 2.0}, "a share from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            TargetSpec(**spec)
    with pytest.raises(ConfigError, match="scheme 'aal' is not known"):
        find(store, labels={"tissue_labels": "aal"})
    with pytest.raises(ConfigError, match=r"data.targets.level=groups: .* tells tissues only"):
        find(store, level="groups")
    strangers = tmp_path / "volumes.csv"
    strangers.write_text("dataset,subject,session,path,gm_ml,icv_ml,flag\nother,q,1,x,600,1400,\n")
    with pytest.raises(ManifestError, match="none of its 1 rows belongs to a subject"):
        find(store, strangers)


def test_a_map_of_small_ids_under_a_scheme_of_large_ones(tmp_path: Path) -> None:
    """A whole-brain map without parcels is kept as uint8; the table of its scheme has more than 256 places."""
    ids = np.zeros((20, 20, 20), np.uint8)
    for place, number in enumerate((24, 3, 42, 2, 41, 4)):
        ids[2 + 2 * place : 4 + 2 * place, 3:17, 3:17] = number
    phantoms.write(tmp_path / "dseg.nii", ids, np.diag([2.0, 2, 2, 1]), dtype=np.uint8)
    phantoms.write(tmp_path / "t1.nii", 10.0 + ids, np.diag([2.0, 2, 2, 1]))
    scans = [Scan("d", name, "1", "t1", "t1.nii", {"dseg_labels": "dseg.nii"}) for name in ("a", "b")]
    write_manifest(tmp_path / "m.csv", scans)
    prepare(read_manifest(tmp_path / "m.csv"), tmp_path / "store", PreprocessSpec(spacing_mm=(2, 2, 2)), workers=1)
    store = Store.open(tmp_path / "store")
    assert store.volume(store.sessions[0], "dseg_labels").dtype == np.uint8
    targets = find(store, synthesise=0.0)
    views = dataclasses.replace(ANATOMY, lesions=False)
    (sample,) = samples(store, targets, "a", views, count=1)
    groups = {targets.groups[k] for k in np.unique(sample.regions)}
    assert {"cortex", "white", "ventricles"} <= groups and np.isfinite(sample.volumes).all()
