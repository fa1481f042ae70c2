"""Answers out of a manifest, and views that always show the whole head."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from brainfm.data.loader import StepSampler, make_loader
from brainfm.data.store import Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.nets.backbone import build_backbone
from brainfm.tasks.registry import build_task
from brainfm.tasks.whole_head.cases import HeadViews, choose_view_mm, choose_view_patch, find_session_cases, views_of
from brainfm.tasks.whole_head.views import views_of_volumes, whole_view

PATCH = (16, 16, 16)


def with_columns(store: Store, name: str, cells: list[str]) -> Store:
    """The same store, its sessions with one more column."""
    changed = Store(store.path, store.spec)
    changed.sessions = tuple(
        replace(s, columns=s.columns | ({name: cell} if cell else {}))
        for s, cell in zip(store.sessions, cells, strict=True)
    )
    return changed


def classes(store: Store, cells: list[str], **changes):
    return find_session_cases(with_columns(store, "dx", cells), "classification", "dx", **changes)


def answers(found) -> list:
    return [case.answer.tolist() for case in found.cases]


# ---- who can answer --------------------------------------------------------------------------------------------------


def test_classes_are_found_and_sorted(toy_store: Store) -> None:
    found = classes(toy_store, ["ill", "Well", "well", "ILL", "n/a", "well"])
    assert found.spec.values == ("ILL", "well") and found.spec.mode == "exclusive"
    assert found.spec.contrasts == ("flair", "t1")
    assert answers(found) == [[0], [1], [1], [0], [1]]
    assert found.left_out == ("toy/04/1: no dx",)
    assert found.cases[0].scans == ((), ("t1",)) and found.cases[1].scans == (("flair",), ("t1",))


def test_numbers_are_sorted_as_numbers_and_spelt_as_one(toy_store: Store) -> None:
    found = classes(toy_store, ["10", "2.0", "2", "10.0", "1", "1"])
    assert found.spec.values == ("1", "2", "10") and answers(found)[:2] == [[2], [1]]


def test_given_classes_leave_the_others_out(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b", "c", "a", "b", "unknown"], values=["b", "a"])
    assert found.spec.values == ("b", "a") and answers(found) == [[1], [0], [1], [0]]
    assert found.left_out == ("toy/02/1: dx is 'c', expected one of b, a", "toy/05/1: no dx")
    assert len(classes(toy_store, ["a", "b", "a", "a", "b", "unknown"], values=["b", "a", "unknown"]).cases) == 6


def test_sex_in_two_codings_is_refused_and_named_classes_are_the_way_out(toy_store: Store) -> None:
    codes = ["M", "F", "1", "2", "O", "F"]
    store = with_columns(toy_store, "sex", codes)
    with pytest.raises(ConfigError, match=r"column sex is coded in two ways, 1, 2, F, M, O, expected one"):
        find_session_cases(store, "classification", "sex")
    found = find_session_cases(store, "classification", "sex", values=["M", "F"])
    assert found.spec.values == ("M", "F") and len(found.cases) == 3 and len(found.left_out) == 3
    assert len(classes(toy_store, ["M", "F", "1", "2", "O", "F"]).spec.values) == 5, "any other column may be so"


def test_ordered_classes_keep_their_order(toy_store: Store) -> None:
    found = classes(
        toy_store, ["mild", "none", "severe", "none", "mild", ""], mode="ordinal", values=["none", "mild", "severe"]
    )
    assert answers(found) == [[1], [0], [2], [0], [1]] and found.spec.mode == "ordinal"


def test_several_columns_are_labels(toy_store: Store) -> None:
    store = with_columns(toy_store, "bleed", ["yes", "no", "", "1", "0", "maybe"])
    store = with_columns(store, "stroke", ["0", "", "", "TRUE", "False", "1"])
    for mode in ("auto", "multilabel"):
        found = find_session_cases(store, "classification", "findings", mode=mode, values=["bleed", "stroke"])
        assert found.spec.mode == "multilabel" and found.spec.values == ("bleed", "stroke")
        assert np.array_equal(np.stack([c.answer for c in found.cases]), [[1, 0], [0, np.nan], [1, 1], [0, 0]], True)
        assert found.left_out == (
            "toy/02/1: none of bleed, stroke",
            "toy/05/1: bleed is 'maybe', expected 0 or 1",
        )


def test_ages(people_store: Store) -> None:
    found = find_session_cases(people_store, "regression", "age")
    assert found.spec.unit == "years" and found.spec.values == () and not found.left_out
    assert answers(found) == [[40], [42.5], [41], [42], [43], [44], [45]]


def test_numbers_that_cannot_be_read(toy_store: Store) -> None:
    store = with_columns(toy_store, "score", ["3", "4,5", "", "inf", "-200", "7e2"])
    found = find_session_cases(store, "regression", "score", unit="points")
    assert answers(found) == [[3], [-200], [700]] and found.spec.unit == "points"
    assert found.left_out == (
        "toy/01/1: score is '4,5', expected a number",
        "toy/02/1: no score",
        "toy/03/1: score is 'inf', expected a number",
    )


@pytest.mark.parametrize(("column", "cell", "unit"), [("age", "400", ""), ("age_years", "-1", ""), ("AGE", "131", "")])
def test_impossible_ages(toy_store: Store, column: str, cell: str, unit: str) -> None:
    store = with_columns(toy_store, column, ["40", "50", cell, "60", "70", "30"])
    with pytest.raises(ManifestError, match=rf"session toy/02/1 has {column} {cell}, expected an age from 0 to 130"):
        find_session_cases(store, "regression", column, unit=unit)


def test_ages_in_months_and_words_that_hold_age(toy_store: Store) -> None:
    cells = ["400", "500", "600", "10", "20", "30"]
    for column, unit in (("age", "months"), ("dosage", "mg"), ("stage", "")):
        store = with_columns(toy_store, column, cells)
        found = find_session_cases(store, "regression", column, unit=unit)
        assert len(found.cases) == 6 and found.spec.unit == unit


def test_contrasts_and_lesions(people_store: Store) -> None:
    found = find_session_cases(people_store, "regression", "age", contrasts=["t2", "flair"], lesion="lesion")
    assert found.cases[0].scans == (("t2",), ())
    assert [case.lesion for case in found.cases] == [None, None, "lesion_mask", None, None, None, None]
    with pytest.raises(ManifestError, match="none of the contrasts swi"):
        find_session_cases(people_store, "regression", "age", contrasts=["swi"])


@pytest.mark.parametrize(
    ("cells", "changes", "error", "text"),
    [
        ([""] * 6, {}, ManifestError, "no session has a value in column dx; columns in the store: none"),
        (["a"] * 6, {}, ConfigError, "column dx has one class only, 'a', expected at least two"),
        (["a", "b"] * 3, {"values": ["a", "b", "c"]}, ConfigError, "no session with dx 'c'"),
        (["a", "b"] * 3, {"values": ["a", "A"]}, ConfigError, "each once"),
        (["a", "b"] * 3, {"mode": "ordinal"}, ConfigError, "task.mode=ordinal without task.values"),
        (["a", "b"] * 3, {"mode": "binary"}, ConfigError, "expected auto, exclusive, ordinal or multilabel"),
        (["1"] * 6, {"mode": "multilabel", "values": ["dx"]}, ConfigError, "column dx is 1 in all 6 sessions"),
        (["a", "b"] * 3, {"lesion": "tumour"}, ConfigError, r"no such mask; labels in the store: lesion_mask"),
        (["x"] * 6, {"values": ["a", "b"]}, ManifestError, "the first was left out because: toy/00/1: dx is 'x'"),
    ],
)
def test_refusals(toy_store: Store, cells: list[str], changes: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        classes(toy_store, cells, **changes)


def test_a_constant_target_and_too_many_classes(toy_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="column score is 3 in all 6 sessions, expected values that differ"):
        store = with_columns(toy_store, "score", ["3", "3.0", "3", "3", "3", "3"])
        find_session_cases(store, "regression", "score")
    monkeypatch.setattr("brainfm.tasks.whole_head.cases._MANY_CLASSES", 4)
    with pytest.raises(ConfigError, match="6 different values in 6 subjects, expected classes; use task=regression"):
        classes(toy_store, ["1.5", "2.5", "3", "4", "5", "6"])


# ---- how large -------------------------------------------------------------------------------------------------------


def test_the_largest_head_just_fits(toy_store: Store) -> None:
    cases = classes(toy_store, ["a", "b"] * 3).cases
    largest_mm = max(max(c.session.shape) for c in cases) * 2.0
    view_mm = choose_view_mm(toy_store, cases, PATCH)
    assert largest_mm <= 16 * view_mm < largest_mm + 16 * 0.1 + 1e-6
    assert choose_view_mm(toy_store, cases, (96, 96, 96)) == 2.0  # the store has no finer voxels


def test_the_patch_follows_the_head(toy_store: Store) -> None:
    cases = classes(toy_store, ["a", "b"] * 3).cases
    assert choose_view_patch(toy_store, cases, 8, 96**3) == (40, 40, 40)  # 36 voxels of 2 mm and the margin
    for most in (32**3, 20000, 100):
        patch = choose_view_patch(toy_store, cases, 4, most)
        assert all(edge % 4 == 0 for edge in patch) and (np.prod(patch) <= most or patch == (8, 4, 4))


# ---- what is seen ----------------------------------------------------------------------------------------------------


def spec_of(found, crops: bool = False, view_mm: float = 5.0):
    return replace(found.spec, patch_vox=PATCH, view_mm=view_mm, crops=crops)


@pytest.fixture
def guided(toy_store: Store):
    return classes(toy_store, ["a", "b"] * 3, lesion="lesion")


def test_the_whole_head_is_always_among_the_views(toy_store: Store, guided) -> None:
    dataset = HeadViews(toy_store, guided.cases, spec_of(guided, crops=True), 0, crops=3)
    for i in range(12):
        sample, case = dataset[i], guided.cases[dataset._shuffled[i]]
        assert sample.image.shape == (4, 2, *PATCH) and sample.image.dtype == np.float16
        assert np.array_equal(sample.answer, case.answer) and sample.lesion.shape == (4, *PATCH)
        for m, scans in enumerate(case.scans):
            assert sample.present[m] == bool(scans)
            expected = np.zeros(PATCH)
            if scans:
                expected = whole_view(toy_store.volume(case.session, scans[0]), (2, 2, 2), 5.0, PATCH)
            assert np.array_equal(sample.image[0, m], expected.astype(np.float16))


def test_one_window_lies_on_the_lesion_and_masks_match(toy_store: Store, guided) -> None:
    dataset = HeadViews(toy_store, guided.cases, spec_of(guided, crops=True), 0, crops=2)
    for i in range(12):
        sample = dataset[i]
        assert sample.lesion[0].any() and sample.lesion[1].any()
        flair = sample.image[1, 0]
        if sample.present[0]:
            head = flair > flair.min()
            assert flair[sample.lesion[1] == 1].mean() > flair[head & (sample.lesion[1] == 0)].mean()


def test_a_session_without_a_mask_is_unknown(people_store: Store) -> None:
    found = find_session_cases(people_store, "regression", "age", lesion="lesion")
    dataset = HeadViews(people_store, found.cases, spec_of(found, crops=True), 0, crops=1)
    seen = {(found.cases[dataset._shuffled[i]].lesion, int(dataset[i].lesion.min())) for i in range(7)}
    assert seen == {(None, -1), ("lesion_mask", 0)}
    without = HeadViews(people_store, [c for c in found.cases if c.lesion is None], dataset.spec, 0, crops=1)
    assert without[0].lesion is None


def test_windows_are_spread_over_the_head(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b"] * 3)
    dataset = HeadViews(toy_store, found.cases, spec_of(found, crops=True), 0, crops=8)
    for i in range(10):
        case = found.cases[dataset._shuffled[i]]
        corners = np.array(dataset._corners(case, np.random.default_rng(i)))
        assert len(np.unique(corners, axis=0)) == 8
        assert (corners >= 0).all() and (corners + 16 <= case.session.shape).all()
        centre = corners + 8 - np.array(case.session.shape) / 2
        assert max(np.abs(centre[a] - centre[b]).max() for a in range(8) for b in range(a)) >= 10
    several = {tuple(map(tuple, dataset._corners(found.cases[0], np.random.default_rng(i)))) for i in range(5)}
    assert len(several) == 5


def test_without_the_whole_head_the_windows_cover_it(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b"] * 3)
    spec = spec_of(found, crops=True, view_mm=0.0)
    needed = 27 if max(found.cases[0].session.shape) > 32 else 8
    with pytest.raises(ConfigError, match=f"expected at least the {needed} windows of 16x16x16"):
        HeadViews(toy_store, found.cases, spec, 0, crops=needed - 1)
    dataset = HeadViews(toy_store, found.cases, spec, 0, crops=needed)
    case = found.cases[0]
    seen = np.zeros(case.session.shape, bool)
    for corner in dataset._corners(case, np.random.default_rng(0)):
        seen[tuple(slice(max(c, 0), c + 16) for c in corner)] = True
    assert seen.all() and dataset[0].image.shape == (needed, 2, *PATCH)


def test_dropped_contrasts_are_zero(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b"] * 3)
    dataset = HeadViews(toy_store, found.cases, spec_of(found), 0, contrast_dropout=0.5)
    seen = set()
    for i in range(40):
        sample = dataset[i]
        assert sample.present.any() and not sample.image[:, ~sample.present].any()
        seen.add(tuple(sample.present.tolist()))
    assert seen == {(True, True), (True, False), (False, True)}


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_are_the_same_for_any_number_of_workers(toy_store: Store, guided, workers: int) -> None:
    spec = spec_of(guided, crops=True)
    batches = [
        list(make_loader(HeadViews(toy_store, guided.cases, spec, 1, crops=2), StepSampler(first, 5, 2, 0, 1), count))
        for first, count in ((0, 0), (3, workers))
    ]
    for one, other in zip(batches[0][3:], batches[1], strict=True):
        for name in ("image", "present", "answer", "lesion", "sample"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert batches[0][0].answer.shape == (2, 1) and batches[0][0].lesion.dtype == torch.int8


def test_the_cache_keeps_its_bound_and_changes_nothing(toy_store: Store, guided) -> None:
    spec = spec_of(guided)
    none, some = (HeadViews(toy_store, guided.cases, spec, 0, cache_mb=mb) for mb in (0, 0.03))
    for i in range(12):
        assert np.array_equal(none[i].image, some[i].image) and np.array_equal(none[i].lesion, some[i].lesion)
    assert not none._kept and 0 < sum(v.nbytes for v in some._kept.values()) <= 0.03 * 2**20
    assert not pickle.loads(pickle.dumps(some))._kept


def test_what_is_answered_is_the_whole_head_and_all_windows(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b"] * 3)
    image, present = views_of(toy_store, found.cases[0], spec_of(found, crops=True))
    assert present.tolist() == [False, True] and not image[:, 0].any() and image.dtype == np.float32
    volumes = np.stack([np.zeros(found.cases[0].session.shape), toy_store.volume(found.cases[0].session, "t1")])
    assert np.array_equal(image, views_of_volumes(volumes.astype(np.float32), (2, 2, 2), spec_of(found, crops=True)))


def test_no_case_is_refused(toy_store: Store) -> None:
    found = classes(toy_store, ["a", "b"] * 3)
    with pytest.raises(ConfigError, match="no case to train on"):
        HeadViews(toy_store, [], spec_of(found), 0)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_task_trains_on_what_the_loader_gives(toy_store: Store, kind: str) -> None:
    cells = ["1", "2"] * 3
    found = find_session_cases(with_columns(toy_store, "dx", cells), kind, "dx", lesion="lesion")
    spec = spec_of(found, crops=True)
    task = build_task(spec, build_backbone("unet_tiny"))
    task.set_statistics(np.stack([case.answer for case in found.cases]))
    batch = next(iter(make_loader(HeadViews(toy_store, found.cases, spec, 0, crops=2), StepSampler(0, 1, 2, 0, 1), 0)))
    batch = batch.to("cpu")
    terms = task.loss(task(batch.image, batch.present), batch)
    terms.total.backward()
    assert torch.isfinite(terms.total) and set(terms.parts) == {"answer", "guidance"} and terms.parts["guidance"] > 0
