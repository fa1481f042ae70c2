"""Rows of a store: every group is there, missing contrasts are told and not invented, tables are finite."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm.data.store import Store
from brainfm.study import descriptors
from brainfm.study.descriptors import GROUPS, describe, describe_all, table

CONTRASTS = ("flair", "t1")


def scans_of(store: Store) -> list[tuple[tuple[str, ...], ...]]:
    return [tuple(tuple(s.name for s in e.scans if s.contrast == c) for c in CONTRASTS) for e in store.sessions]


def test_every_group_is_described_and_a_missing_contrast_has_no_numbers(toy_store: Store) -> None:
    told: list[tuple[int, int]] = []
    rows = describe_all(toy_store, toy_store.sessions, CONTRASTS, scans_of(toy_store), (), lambda *n: told.append(n))
    assert told == [(i, 6) for i in range(1, 7)]
    assert all(set(row.numbers) == set(GROUPS) for row in rows)
    assert [row.contrasts for row in rows] == ["t1"] + 5 * ["flair+t1"]
    assert not any(name.startswith("flair/") for group in GROUPS for name in rows[0].numbers[group])
    assert rows[0].numbers["mask"].keys() == rows[1].numbers["mask"].keys()
    for group in GROUPS:
        values, names = table([row.numbers[group] for row in rows])
        assert values.shape == (6, len(names)) and np.isfinite(values).all()
    values, names = table([row.numbers["content"] for row in rows])
    assert values[:, names.index("flair/missing")].tolist() == [1, 0, 0, 0, 0, 0]


def test_regions_are_the_volumes_of_their_structures(people_store: Store) -> None:
    session = people_store.sessions[0]
    scans = tuple((s.name,) for s in session.scans)
    contrasts = tuple(s.contrast for s in session.scans)
    row = describe(people_store, session, contrasts, scans, ("tissue_labels", "absent_labels"))
    label = people_store.volume(session, "tissue_labels")
    found = {k: v for k, v in row.numbers["content"].items() if k.startswith("tissue_labels/")}
    assert found == pytest.approx({f"tissue_labels/{v}_ml": (label == v).sum() * 8 / 1000 for v in (1, 2, 3)})
    plain = describe(people_store, session, contrasts, scans).numbers["content"]
    assert not any("labels" in name for name in plain)


def test_what_was_described_is_remembered_and_regions_are_not_mixed_in(
    people_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = people_store.sessions[0]
    scans, contrasts = tuple((s.name,) for s in session.scans), tuple(s.contrast for s in session.scans)
    first = describe(people_store, session, contrasts, scans)
    with_regions = describe(people_store, session, contrasts, scans, ("tissue_labels",))
    monkeypatch.setattr(descriptors, "_describe", lambda *ignored: pytest.fail("it is described again"))
    assert describe(people_store, session, contrasts, scans) == first
    assert len(with_regions.numbers["content"]) == len(first.numbers["content"]) + 3
    with pytest.raises(pytest.fail.Exception, match="described again"):
        describe(people_store, session, contrasts[:1], scans[:1])


def test_a_table_fills_gaps_with_means_and_drops_what_never_varies() -> None:
    rows = [{"a/x": 1.0, "b/y": 5.0, "c": 2.0}, {"a/x": 3.0, "b/y": 7.0, "c": 2.0}, {"a/x": 2.0, "c": 2.0}]
    values, names = table(rows)
    assert names == ["a/x", "b/y", "b/missing"]
    assert values.tolist() == [[1, 5, 0], [3, 7, 0], [2, 6, 1]]
    empty, none = table([{}, {}])
    assert empty.shape == (2, 0) and none == []
