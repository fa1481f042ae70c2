"""Probes of features whose content is known: what is there is found, what is not is not, and who was asked is said."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from brainfm.cli import main
from brainfm.data.store import ScanEntry, SessionEntry, Store
from brainfm.errors import ConfigError, ManifestError
from brainfm.probing import brainmarks
from brainfm.probing import table as module
from brainfm.probing.features import Embedding, write
from brainfm.probing.table import ProbeTableSpec, describe, probe
from brainfm.seen import SeenSubjects
from brainfm.specs import PreprocessSpec
from tests.probing.test_features import save


def session(number: int, visit: int = 1, contrasts: tuple[str, ...] = ("t1", "flair"), **columns: str) -> SessionEntry:
    scans = tuple(ScanEntry(contrast, contrast, "", "") for contrast in contrasts)
    place = (20, 20, 20), scans, (), columns, f"toy/{number}", (0, 0, 0)
    return SessionEntry("toy", f"{number:02d}", str(visit), f"{number}-{visit}", *place)


def cohort(tmp_path: Path, sessions: list[SessionEntry]) -> Store:
    store = Store(tmp_path / "store", PreprocessSpec())
    store.sessions = tuple(sessions)
    return store


def features(store: Store, **parts: np.ndarray) -> Embedding:
    """Codes [S, F] of sessions, the same for each of their scans but for noise that averages out."""
    rows = tuple((*s.key, scan.name, scan.contrast) for s in store.sessions for scan in s.scans)
    repeat = [len(s.scans) for s in store.sessions]
    return Embedding(rows, {name: np.repeat(v, repeat, axis=0).astype(np.float32) for name, v in parts.items()}, {})


@pytest.fixture
def people(tmp_path: Path) -> tuple[Store, np.ndarray, np.ndarray]:
    """40 people, four of them twice, the last without age or sex."""
    rng = np.random.default_rng(0)
    ages, sexes = rng.uniform(20, 80, 40).round(1), rng.choice(["F", "M"], 40)
    sessions = [session(n, age=str(ages[n]), sex=sexes[n]) for n in range(39)]
    sessions += [session(n, 2, age=str(ages[n] + 1), sex=sexes[n].lower()) for n in range(4)]
    store = cohort(tmp_path, [*sessions, session(39, age="", sex="n/a")])
    own = [*range(39), *range(4), 39]
    return store, ages[own], (sexes == "M")[own]


def test_what_is_there_is_found_and_what_is_not_is_not(people, tmp_path: Path) -> None:
    store, ages, male = people
    rng = np.random.default_rng(1)
    knows = np.hstack([ages[:, None] / 20, 2.0 * male[:, None], rng.normal(size=(len(ages), 4))])
    found = features(store, knows=knows, noise=rng.normal(size=(len(ages), 6)))
    for target, model in (("age", "ridge"), ("sex", "logistic")):
        table = probe(store, tmp_path / target, ProbeTableSpec(target, repeats=2, resamples=200), features=found)
        rows = {(row.features, row.model): row for row in table.rows}
        assert next(iter(rows))[0] == "nothing" and len(rows) == 5
        assert len(table.asked.sessions) == 43 and len(set(table.asked.subjects)) == 39
        assert table.asked.left_out == (f"1 of 44 sessions have no {target}: toy/39/1",)
        if target == "age":
            assert table.asked.spec.kind == "regression"
            assert rows["knows", model].scores["mae"] < 2 < 10 < rows["nothing", "mean"].scores["mae"]
            assert rows["noise", model].scores["mae"] > 0.9 * rows["nothing", "mean"].scores["mae"]
            assert rows["knows", "knn"].scores["mae"] < rows["noise", "knn"].scores["mae"]
        else:
            assert table.asked.spec.values == ("F", "M")
            assert rows["knows", model].scores["auroc"] > 0.97
            assert rows["nothing", "prior"].scores["auroc"] == 0.5
            assert rows["noise", model].intervals["auroc"].low < 0.5 < rows["knows", model].intervals["auroc"].low
        for row in table.rows:
            for what, interval in row.intervals.items():
                assert interval.low <= row.scores[what] <= interval.high or np.isnan(row.scores[what])
                assert interval.mean == pytest.approx(row.scores[what], nan_ok=True) and interval.n == 43


def test_the_files_say_what_the_table_says(people, tmp_path: Path) -> None:
    store, ages, _ = people
    found = features(store, age=ages[:, None])
    table = probe(store, tmp_path / "out", ProbeTableSpec("age", folds=4, repeats=1, resamples=50), features=found)
    with (tmp_path / "out" / "table.csv").open() as text:
        lines = list(csv.DictReader(text))
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (document["sessions"], document["subjects"], document["folds"]) == (43, 39, 4)
    assert document["left_out"] == list(table.asked.left_out) and document["primary"] == "mae"
    for row, line, kept in zip(table.rows, lines, document["rows"], strict=True):
        assert (row.features, row.model) == (line["features"], line["model"]) == (kept["features"], kept["model"])
        assert float(line["mae"]) == row.scores["mae"] == kept["scores"]["mae"]
        assert float(line["mae_high"]) == row.intervals["mae"].high and line["subjects"] == "39"
    said = describe(table)
    assert said[0].startswith("age: regression, 43 sessions of 39 subjects, ")
    assert said[1] == "left out: 1 of 44 sessions have no age: toy/39/1"
    assert said[2].startswith("note: no random network to compare with")
    assert "ridge" in said[-1] and f"{table.rows[-1].scores['mae']:.3f} [" in said[-1]
    again = probe(store, tmp_path / "again", ProbeTableSpec("age", folds=4, repeats=1, resamples=50), features=found)
    assert describe(again) == said
    for name in ("table.csv", "scores.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_session_is_the_mean_of_its_scans_and_contrasts_can_be_chosen(tmp_path: Path) -> None:
    store = cohort(tmp_path, [session(n, y=str(n % 2)) for n in range(12)])
    found = features(store, code=np.arange(12.0)[:, None])
    values = found.parts["code"] + [[0.0], [10.0]] * 12  # t1, flair
    for contrasts, shift in ((None, 5), (["t1"], 0), (["flair"], 10)):
        question = module.ask(store, ProbeTableSpec("y"), contrasts)
        _, places = module._matched(question, found.rows)
        np.testing.assert_array_equal(module._averaged(values, places)[:, 0], np.arange(12) + shift)


def test_a_name_in_the_features_is_no_knowledge(tmp_path: Path) -> None:
    """Two visits of each person, features that tell only who it is: folds by subject see through them."""
    rng = np.random.default_rng(3)
    ages = rng.uniform(20, 80, 30)
    sessions = [session(n, visit, age=f"{ages[n]:.1f}") for n in range(30) for visit in (1, 2)]
    store = cohort(tmp_path, sessions)
    found = features(store, name=np.repeat(np.eye(30), 2, axis=0))
    table = probe(store, tmp_path / "out", ProbeTableSpec("age", repeats=1, resamples=50), features=found)
    scores = {row.model: row.scores["mae"] for row in table.rows}
    assert min(scores["ridge"], scores["knn"]) > 0.9 * scores["mean"]


@pytest.mark.parametrize(
    ("cells", "kind", "classes"),
    [
        ([str(n) for n in range(30)], "regression", ()),
        ([str(n % 3) for n in range(30)], "classification", ("0", "1", "2")),
        (["1.0", "2"] * 15, "classification", ("1", "2")),
        (["a", "B", "A", "a", "B"] * 6, "classification", ("B", "a")),
        ([str(n / 7) for n in range(29)] + ["ill"], "regression", ()),
    ],
)
def test_the_kind_is_seen_in_the_column(cells: list[str], kind: str, classes: tuple[str, ...], tmp_path: Path) -> None:
    question = module.ask(cohort(tmp_path, [session(n, y=text) for n, text in enumerate(cells)]), ProbeTableSpec("y"))
    assert question.spec.kind == kind and question.spec.values == classes
    strange = [f"1 of 30 sessions cannot be read, e.g. toy/29/1: y is {cells[29]!r}, expected a number"]
    assert list(question.left_out) == (strange if cells[29] == "ill" else [])
    assert len(question.truth) == 30 - len(question.left_out)


def test_against_a_random_network_on_real_features(toy_store: Store, tmp_path: Path, capsys) -> None:
    """Six people with an invented answer: the random row is there, the same folds are asked, features are kept."""
    seen = SeenSubjects.of(["toy/00", "toy/05", "other/01"], seed=1)
    file = save(tmp_path / "b.safetensors", subjects=seen)
    store = Store.open(toy_store.path)
    store.sessions = tuple(
        dataclasses.replace(s, columns={"side": "left" if n < 3 else "right"}) for n, s in enumerate(store.sessions)
    )
    how = {"backbone": file, "contrasts": ["t1"], "device": "cpu"}
    spec = ProbeTableSpec("side", folds=2, repeats=1, resamples=100)
    steps: list[tuple[int, int]] = []
    table = probe(store, tmp_path / "out", spec, **how, progress=lambda *at: steps.append(at))  # type: ignore[arg-type]
    assert [(row.features, row.model) for row in table.rows][:3] == [
        ("nothing", "prior"), ("random network", "knn"), ("random network", "logistic"),
    ]  # fmt: skip
    assert {row.features for row in table.rows[3:]} == {"backbone", "anatomy", "looks"}
    for row in table.rows[3:]:
        random = next(r for r in table.rows if r.features == "random network" and r.model == row.model)
        assert row.minus_random is not None and row.p_random is not None and 0 < row.p_random <= 1
        assert row.minus_random.mean == pytest.approx(row.scores["auroc"] - random.scores["auroc"])
    assert "2 of the 6 people tested here were in the pre-training of the backbone" in " ".join(table.notes)
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert document["seen_in_pretraining"] == {"seen": 2, "of": 6} and "hashes" not in json.dumps(document)
    assert steps.count((6, 6)) == 2
    kept = sorted(p.name for p in (tmp_path / "out").glob("*.npz"))
    assert [name.split("-")[0] for name in kept] == ["features", "random"]
    steps.clear()
    again = probe(store, tmp_path / "out", spec, **how, progress=lambda *at: steps.append(at))  # type: ignore[arg-type]
    assert not steps and describe(again) == describe(table)
    alone = probe(store, tmp_path / "two", dataclasses.replace(spec, random=False), **how)  # type: ignore[arg-type]
    assert "random network" not in {row.features for row in alone.rows} and alone.rows[0].minus_random is None


def test_refusals(people, tmp_path: Path) -> None:
    store, ages, _ = people
    found = features(store, code=ages[:, None])

    def asked(sessions: list[SessionEntry], target: str = "y", **spec: object) -> None:
        probe(cohort(tmp_path, sessions), tmp_path / "o", ProbeTableSpec(target, **spec), features=found)  # type: ignore

    with pytest.raises(ManifestError, match=r"no session has a value in column weight; columns in the store: age, sex"):
        probe(store, tmp_path / "o", ProbeTableSpec("weight"), features=found)
    with pytest.raises(ConfigError, match=r"column y is ill in all 9 sessions, expected two classes or more"):
        asked([session(n, y="ill") for n in range(9)])
    with pytest.raises(ConfigError, match=r"column y is 3 in all 9 sessions, expected values that differ"):
        asked([session(n, y="3") for n in range(9)], kind="regression")
    with pytest.raises(ConfigError, match=r"folds=5: expected at most the 4 subjects that have y"):
        asked([session(n, y=str(n % 2)) for n in range(4)])
    with pytest.raises(ManifestError, match=r"session toy/03/1 has age 400, expected an age from 0 to 130"):
        asked([session(n, age="400" if n == 3 else str(30 + n)) for n in range(20)], "age")
    with pytest.raises(ConfigError, match=r"column y has 20 different values in 20 subjects, expected classes"):
        asked([session(n, y=f"name{n}") for n in range(20)])
    with pytest.raises(ConfigError, match="none of the 8 sessions with y has a row in the features"):
        asked([session(50 + n, y=str(n % 2)) for n in range(8)])
    with pytest.raises(ConfigError, match="either backbone=FILE or features=FILE"):
        probe(store, tmp_path / "o", ProbeTableSpec("age"))
    with pytest.raises(ConfigError, match="parts=looks: the features have only code"):
        probe(store, tmp_path / "o", ProbeTableSpec("age"), features=found, parts=["looks"])
    for wrong, said in (({"kind": "x"}, "kind=x"), ({"folds": 1}, "folds=1"), ({"repeats": 0}, "repeats=0")):
        with pytest.raises(ConfigError, match=f"{said}: expected"):
            ProbeTableSpec("age", **wrong)  # type: ignore[arg-type]


def test_sessions_without_features_are_counted_and_named(people, tmp_path: Path) -> None:
    store, ages, _ = people
    found = features(store, code=ages[:, None])
    some = Embedding(found.rows[10:], {"code": found.parts["code"][10:]}, {})
    table = probe(store, tmp_path / "out", ProbeTableSpec("age", repeats=1, resamples=50), features=some)
    assert table.asked.left_out[-1] == ("5 sessions with age have no features: toy/00/1, toy/01/1, toy/02/1 and 2 more")
    assert len(table.asked.sessions) == 38


def test_the_verb(toy_store: Store, tmp_path: Path, capsys) -> None:
    found = features(toy_store, code=np.eye(6))
    write(found, tmp_path / "f.npz")
    words = [f"features={tmp_path / 'f.npz'}", f"store={toy_store.path}", f"out={tmp_path / 'out'}"]
    assert main(["probe", *words, "target=age"]) == 2
    assert "no session has a value in column age" in capsys.readouterr().err
    assert main(["probe", *words, "target=age", "folds=1"]) == 2
    assert "folds=1: expected 2 or more" in capsys.readouterr().err


def test_brainmarks_is_scikit_learn_called_plainly_on_one_split_by_subject(people, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegressionCV, RidgeCV
    from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score
    from sklearn.preprocessing import StandardScaler

    store, ages, male = people
    rng = np.random.default_rng(1)
    knows = np.hstack([ages[:, None] / 20, 2.0 * male[:, None], rng.normal(size=(len(ages), 4))])
    knows += rng.normal(size=knows.shape)
    found = features(store, knows=knows)
    for target in ("age", "sex"):
        asked = ProbeTableSpec(target, protocol="brainmarks", resamples=20, seed=3)
        table = probe(store, tmp_path / target, asked, features=found)
        (row,) = table.rows
        truth = table.asked.truth if target == "age" else table.asked.truth.astype(int)
        split = brainmarks.split_of(table.asked.subjects, truth, target == "sex", 3)
        people_of = [{table.asked.subjects[r] for r in rows} for rows in (split.train, split.test)]
        assert not people_of[0] & people_of[1] and len(people_of[1]) >= 5
        x = knows[:-1].astype(np.float32).astype(np.float64)
        scaler = StandardScaler().fit(x[split.train])
        near, other = scaler.transform(x[split.train]), scaler.transform(x[split.test])
        if target == "age":
            given = RidgeCV(alphas=np.logspace(-2, 6, 9)).fit(near, truth[split.train]).predict(other)
            assert row.scores["mae"] == pytest.approx(mean_absolute_error(truth[split.test], given), rel=1e-6)
            assert row.scores["r2"] == pytest.approx(r2_score(truth[split.test], given), rel=1e-6)
        else:
            model = LogisticRegressionCV(
                Cs=np.logspace(-4, 4, 9), cv=5, class_weight="balanced", scoring="neg_log_loss", max_iter=1000
            )
            given = model.fit(near, truth[split.train]).predict_proba(other)[:, 1]
            assert row.scores["auroc"] == pytest.approx(roc_auc_score(truth[split.test], given), rel=1e-6)
        assert table.notes[-1].startswith(f"brainmarks: fitted on {len(split.train)} sessions")
        assert json.loads((tmp_path / target / "scores.json").read_text())["protocol"] == "brainmarks"


def test_brainmarks_takes_300_samples_a_side_and_refuses_sides_that_say_nothing() -> None:
    many = [str(n) for n in range(2000)]
    split = brainmarks.split_of(many, np.zeros(2000), False, 0)
    assert (len(split.train), len(split.test)) == (300, 300) and not set(split.train) & set(split.test)
    with pytest.raises(ConfigError, match=r"protocol=brainmarks: a side of its split has . subjects"):
        brainmarks.split_of(many[:6], np.zeros(6), False, 0)
    with pytest.raises(ConfigError, match="lacks a class"):
        brainmarks.split_of(many, np.arange(2000) == 7, True, 0)
