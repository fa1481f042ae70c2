"""Volumes of regions: what a label map says, by whatever way it is measured; what is dropped, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainfm.data import schemes
from brainfm.data.region_volumes import find_volumes, log_volumes, part_of, voxel_effects
from brainfm.data.store import Store
from brainfm.errors import ManifestError, ScanError

NAMES = ("tissue/csf", "tissue/grey", "tissue/white", "total")


def test_against_loops() -> None:
    rng = np.random.default_rng(0)
    ids = sorted(schemes.SCHEMES["dlmuse"])
    labels = rng.choice([*ids, 9999], size=(12, 10, 8))
    names = ("tissue/grey", "group/ventricles", "group/brainstem", "total")
    found = log_volumes(labels, (10, 10, 10), "dlmuse", names)
    counts = dict.fromkeys(names, 0)
    for voxel in labels.ravel().tolist():
        group, tissue = schemes.STRUCTURES[schemes.SCHEMES["dlmuse"].get(voxel, "unclear")]
        counts["tissue/grey"] += tissue == "grey"
        counts["group/ventricles"] += group == "ventricles"
        counts["group/brainstem"] += group == "brainstem"
        counts["total"] += tissue not in (None, "background") or group not in (None, "background")
    ml = {name: count * 1.0 for name, count in counts.items()}
    expected = [np.log(ml[name] / ml["total"]) for name in names[:3]] + [np.log(ml["total"])]
    assert found == pytest.approx(expected)


def test_a_voxel_has_the_effect_that_one_more_of_it_has() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, size=(20, 20, 20))
    gradient = np.array([2.0, -1.0, 0.5, 3.0])
    effects = voxel_effects(labels, (3, 3, 3), "tissue", NAMES, gradient)
    base = gradient @ log_volumes(labels, (3, 3, 3), "tissue", NAMES)
    for kind in range(4):
        more = labels.copy()
        place = tuple(np.argwhere(labels == 0)[0])
        more[place] = kind
        there = tuple(np.argwhere(labels == kind)[0])
        change = gradient @ log_volumes(more, (3, 3, 3), "tissue", NAMES) - base
        assert effects[there] == pytest.approx(change, rel=2e-3, abs=1e-7)
    assert effects[labels == 0].tolist() == [0.0] * int((labels == 0).sum())


def test_volumes_of_a_store_are_those_of_its_maps(people_store: Store) -> None:
    sessions = [s for s in people_store.sessions if s.labels and s.subject in ("p0", "p1", "p2", "p3")]
    found, notes = find_volumes(people_store, sessions, "age")
    assert found is not None and found.source == "tissue_labels" and found.scheme == "tissue" and found.of_labels
    assert found.names == NAMES
    for session in sessions:
        again = log_volumes(people_store.volume(session, "tissue_labels"), (2, 2, 2), "tissue", NAMES)
        assert found.values[session.key] == pytest.approx(again)
        assert np.exp(again[:3]).sum() == pytest.approx(1)
    assert any("tissue_labels (tissue)" in note for note in notes)


def test_what_not_every_session_has_is_said_and_not_used(people_store: Store, toy_store: Store) -> None:
    found, notes = find_volumes(people_store, people_store.sessions, "age")
    assert found is None and "2 of 7 sessions have no tissue_labels" in notes[0]
    assert find_volumes(toy_store, toy_store.sessions, "age") == (None, []), "a lesion mask is no anatomy"
    mapped = [s for s in people_store.sessions if s.subject in ("p0", "p2")]
    assert find_volumes(people_store, mapped, "tissue")[0] is None, "what is asked for is not looked at"
    assert find_volumes(people_store, mapped, "age", "none") == (None, [])
    assert find_volumes(people_store, mapped, "age", "tissue")[0] is not None


def test_an_absent_part_is_dropped_and_said(people_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = [s for s in people_store.sessions if s.subject in ("p0", "p2")]
    original = Store.volume

    def without_csf(self: Store, entry, name):
        volume = original(self, entry, name)
        return np.where(volume == 1, 0, volume) if name == "tissue_labels" and entry.subject == "p2" else volume

    monkeypatch.setattr(Store, "volume", without_csf)
    found, notes = find_volumes(people_store, sessions, "age")
    assert found is not None and found.names == ("tissue/grey", "tissue/white", "total")
    assert "left out of them, for some sessions have none: tissue/csf" in notes


def test_a_table_says_the_same_without_a_scheme(people_store: Store, tmp_path: Path) -> None:
    sessions = [s for s in people_store.sessions if s.session == "1"]
    table = tmp_path / "volumes.csv"
    rows = [f"d,{s.subject},{s.session},{900 + 10 * n},{100 + n},1400" for n, s in enumerate(sessions)]
    table.write_text("\n".join(["dataset,subject,session,gm_ml,csf_ml,icv_ml", *rows]))
    found, _notes = find_volumes(people_store, sessions, "age", str(table))
    assert found is not None and not found.of_labels and found.names == ("gm", "csf", "total")
    assert found.values[sessions[2].key] == pytest.approx(np.log([920 / 1400, 102 / 1400, 1400]), rel=1e-5)
    with pytest.raises(ManifestError, match=r"no row of volumes.csv, expected one for every session"):
        find_volumes(people_store, people_store.sessions, "age", str(table))


def test_refusals(people_store: Store) -> None:
    with pytest.raises(ManifestError, match=r"task.volumes=nowhere: expected auto, none, a table, or a label column"):
        find_volumes(people_store, people_store.sessions, "age", "nowhere")
    with pytest.raises(ManifestError, match=r"task.volumes=tissue: 2 of 7 sessions have no tissue_labels"):
        find_volumes(people_store, people_store.sessions, "age", "tissue")
    with pytest.raises(ScanError, match=r"x.nii shows no part of a brain"):
        log_volumes(np.zeros((3, 3, 3), int), (1, 1, 1), "tissue", NAMES, "x.nii")
    assert [int(part.sum()) for part in part_of(NAMES, "tissue")] == [1, 1, 1, 3]
