"""The benchmark from the command line: every protocol, resumed, refused, and its pieces."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("h5py")

from brainfm.cli import main
from brainfm.crossdomain.adaptation import FineTune, SupervisedMethod, batches, fine_tune, loss_of, supervised
from brainfm.crossdomain.augmentation import augmented
from brainfm.crossdomain.benchmark import BenchmarkJob, answers_path, load_answers
from brainfm.crossdomain.episode_scores import episode_auroc
from brainfm.crossdomain.episodes import Episode, Shots, draw
from brainfm.crossdomain.features import CachedFeatures
from brainfm.crossdomain.layout import TaskTarget, find
from brainfm.crossdomain.medimeta import MedIMeta
from brainfm.crossdomain.methods import FewShotMethod, parse, with_floors
from brainfm.crossdomain.networks import build_network
from brainfm.crossdomain.pretraining import Maml, MultiTask, maml, multi_task, sources_for, tasks_of
from brainfm.crossdomain.twins import twins
from brainfm.errors import ConfigError, DatasetError
from tests.crossdomain.sets import write_set

METHODS = [
    "logistic@unet_tiny", "finetune@unet_tiny+mmpt", "prototypes@unet_tiny+mmmaml", "linear@unet_tiny+mmmaml1",
    "supervised@unet_tiny", "full_logistic@unet_tiny",
]  # fmt: skip
QUICK = ["size=16", "episodes=3", "shots=2", "queries=3", "steps=2", "max_epochs=1", "meta_episodes=1",
         "meta_validation=1", "resplits=2", "device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_set(folder, "one", 60, 16, 1, 1, domain_overlaps=("two",))
    write_set(folder, "two", 60, 16, 1, 2)
    write_set(folder, "three", 60, 16, 3, 3)
    return folder


def command(root: Path, out: Path, methods: list[str], *more: str) -> list[str]:
    listed = ",".join(f"'{method}'" for method in methods)
    return ["medimeta", "action=benchmark", f"root={root}", f"out={out}", f"methods=[{listed}]", *QUICK, *more]


def test_every_protocol_runs_from_one_command_and_goes_on(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(command(root, out, METHODS[:1], "datasets=[one,three]", "learn_all_tasks=false")) == 0
    with open(out / "table.csv", newline="") as file:
        assert any(row["dataset"] == "harmonic mean" for row in csv.DictReader(file))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    assert main(command(root, out, METHODS, "datasets=[one]", "learn_all_tasks=false")) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if "features" not in str(path))
    with open(out / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    few = [row for row in rows if row["setting"] == "few-shot" and row["dataset"] == "one"]
    assert [row["method"] for row in few] == [
        "logistic@statistics", "forest@pixels", "logistic@unet_tiny", "finetune@unet_tiny", "finetune@unet_tiny+mmpt",
        "prototypes@unet_tiny", "prototypes@unet_tiny+mmmaml", "linear@unet_tiny", "linear@unet_tiny+mmmaml1",
    ]  # fmt: skip
    assert {row["setting"] for row in rows} == {"few-shot", "fixed split", "re-split"}
    for row in rows:
        assert 0 <= float(row["low"]) <= float(row["auroc"]) + 1e-9 and float(row["high"]) <= 1, row
    assert all(bool(row["minus_floor"]) != ("logistic@statistics" in row["method"]) for row in rows)
    assert "Pre-trained on the other data sets" in (out / "index.html").read_text()
    assert (out / "pretrained").is_dir() and len(list((out / "pretrained").iterdir())) == 3
    capsys.readouterr()
    assert main(command(root, out, METHODS[:1], "seed=3")) == 2
    assert "was made with" in capsys.readouterr().err


def test_several_processes_give_the_same_answers(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    both = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert main(command(root, out, ["prototypes@statistics"], f"workers={workers}", "datasets=[one,two]")) == 0
        both.append(
            load_answers(answers_path(out, BenchmarkJob("two", "kind"), parse("prototypes@statistics")))[0]["few-shot"]
        )
    assert all(np.array_equal(a.scores, b.scores) for a, b in zip(*both))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["methods=[guess@unet_tiny]"], "begins with 'guess', expected one of logistic"),
        (["methods=[finetune@statistics]"], "statistics cannot be trained"),
        (["methods=[logistic@vgg]"], "unknown network 'vgg', expected one of resnet18"),
        (["datasets=[none]"], "holds no data set 'none', expected one of one, three, two"),
        (["shots=18"], "20 images of class 0 for the support, expected at least 28 for 18-shot"),
        (["ways=9"], "ways=9: one: kind has 3 classes"),
        (["episodes=0"], "episodes=0: expected at least 1"),
        (["seed=-1"], "seed=-1: expected at least 0"),
        (["max_epochs=0"], "max_epochs=0: expected at least 1"),
        (["patience=-1"], "patience=-1: expected at least 0"),
        (["meta_episodes=0"], "meta_episodes=0: expected at least 1"),
        (["meta_validation=0"], "meta_validation=0: expected at least 1"),
        (["lr=nan"], "lr=nan: expected a rate above 0"),
        (["lr=-1"], "lr=-1: expected a rate above 0"),
        (["ways=0"], "ways=0: expected 1 or more classes"),
        (["methods=[]"], "methods=[]: expected one or more, each once"),
        (["methods=[logistic@planar:none.safetensors]"], "none.safetensors: no such file"),
        (["methods=[logistic@vit_s]"], "is a transformer, which has no planar form; expected a CNN"),
        (["methods=[logistic@primus_s]"], "is a transformer, which has no planar form; expected a CNN"),
    ],
)
def test_a_wrong_word_is_one_sentence(
    words: list[str], said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    given = ["medimeta", "action=benchmark", f"root={root}", f"out={tmp_path / 'out'}", "device=cpu"]
    keys = {word.partition("=")[0] for word in words}
    more = [
        word
        for word in ("methods=[logistic@statistics]", "datasets=[one]", "size=16")
        if word.partition("=")[0] not in keys
    ]
    assert main([*given, *words, *more]) == 2
    found = capsys.readouterr().err.strip().splitlines()
    assert said in found[-1] and found[-1].startswith("brainfm: ")


def test_what_a_stopped_run_left_damaged_is_one_sentence(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever lies in OUT and is read again."""
    pytest.importorskip("matplotlib")
    words = command(root, tmp_path, ["prototypes@unet_tiny+mmpt"], "datasets=[one]", "learn_all_tasks=false")
    assert main(words) == 0
    kept = {"plan.json": "give another out=", "answers/one/twins.csv": "delete it and run again"}
    kept |= {str(p.relative_to(tmp_path)): "delete" for p in (tmp_path / "pretrained").iterdir()}
    kept |= {str(next((tmp_path / "answers" / "one" / "kind").glob("prototypes*")).relative_to(tmp_path)): "deleted"}
    for name, said in kept.items():
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 3] if name != "answers/one/twins.csv" else b"")
        if name.startswith("pretrained"):
            for answers in (tmp_path / "answers" / "one" / "kind").glob("*mmpt*"):
                answers.unlink()
        capsys.readouterr()
        assert main(words) == 2, name
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("brainfm: ") and str(path) in last and said in last
        path.write_bytes(whole)
    assert main(words) == 0


def test_an_empty_root_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "sets" / ".half.tmp").mkdir(parents=True)
    (tmp_path / "sets" / ".half.tmp" / "info.yaml").write_text("id: [")
    assert main(command(tmp_path / "sets", tmp_path / "out", ["logistic@statistics"])) == 2
    assert "sets: holds no data set, expected one or more folders ID/info.yaml" in capsys.readouterr().err


def test_a_class_that_a_split_lacks_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = write_set(tmp_path, "one", 60, 16)
    lines = (folder / "splits" / "test.txt").read_text().split("\n")
    kept = [line for line in lines if int(line[-11:-5]) % 3 != 2]
    (folder / "splits" / "test.txt").write_text("\n".join(kept))
    assert main(["medimeta", "action=check", f"root={tmp_path}"]) == 1
    capsys.readouterr()
    words = command(tmp_path, tmp_path / "out", ["full_logistic@statistics"])
    assert main(words) == 2
    assert "test.txt: task 'kind' has no image of 'none' there" in capsys.readouterr().err
    (folder / "splits" / "val.txt").unlink()
    (folder / "splits" / "test.txt").write_text("\n".join(lines))
    assert main(command(tmp_path, tmp_path / "out", ["supervised@unet_tiny"])) == 2
    assert "val.txt: no such split, or no image in it" in capsys.readouterr().err


def test_one_data_set_that_cannot_be_asked_keeps_no_other_from_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    write_set(tmp_path / "sets", "few", 6, 16)
    write_set(tmp_path / "sets", "many", 60, 16)
    for workers in (1, 2):
        out = tmp_path / str(workers)
        assert main(command(tmp_path / "sets", out, ["prototypes@statistics"], f"workers={workers}")) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("brainfm: few: kind: 2 images of class 0") and "the table holds what was" in last
        assert {line.split(",")[1] for line in (out / "table.csv").read_text().splitlines()[1:]} == {"many"}


def test_tiff_files_alone_are_enough_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    both = []
    for name in ("whole", "tiff"):
        for number, dataset in enumerate(("one", "two")):
            folder = write_set(tmp_path / name, dataset, 60, 16, 1, number)
            if name == "tiff":
                (folder / "images.hdf5").unlink()
        words = command(tmp_path / name, tmp_path / f"{name}_out", ["logistic@unet_tiny+mmpt"], "datasets=[one]")
        if name == "tiff":
            assert main(words) == 2 and "images.hdf5: no such file" in capsys.readouterr().err
            assert main(["medimeta", "action=check", f"root={tmp_path / name}"]) == 1
            assert main(["medimeta", "action=check", f"root={tmp_path / name}", "tiff=true"]) == 0
            words.append("tiff=true")
        assert main(words) == 0
        both.append([line.split(",")[:7] for line in (tmp_path / f"{name}_out" / "table.csv").read_text().split()])
    assert both[0] == both[1]


def test_tasks_of_like_names_are_kept_apart(tmp_path: Path) -> None:
    places = {BenchmarkJob("one", name).folder(tmp_path) for name in ("a task", "a_task", "a-task: (1)", "a_task_ (1)")}
    assert len(places) == 4


def test_answers_of_other_images_are_not_gone_on_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    write_set(tmp_path / "a", "one", 60, 16, 1, 1)
    write_set(tmp_path / "b", "one", 60, 16, 1, 2)
    assert main(command(tmp_path / "a", tmp_path / "out", ["prototypes@statistics"])) == 0
    before = (tmp_path / "out" / "table.csv").read_bytes()
    assert main(command(tmp_path / "a", tmp_path / "out", ["prototypes@statistics"])) == 0
    assert main(command(tmp_path / "b", tmp_path / "out", ["prototypes@statistics"])) == 2
    assert "One: kind had other images, labels or splits" in capsys.readouterr().err
    assert (tmp_path / "out" / "table.csv").read_bytes() == before


def test_adding_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = (np.arange(12) % 2)[:, None]
    arrays = {
        f"{s}_{what}": value
        for s in ("train", "val", "test")
        for what, value in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "m.npz", **arrays)
    words = ["medimeta", "action=add", f"root={tmp_path / 'sets'}", "id=m", "domain=Chest X-ray",
             f"medmnist={tmp_path / 'm.npz'}", "size=28", "task=disease", "labels=[ill,well]"]  # fmt: skip
    assert main(words) == 0 and "36 images, tasks disease" in capsys.readouterr().out
    assert main(["medimeta", "action=check", f"root={tmp_path / 'sets'}"]) == 0
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    assert main(["medimeta", "action=add", "root=x", "id=m"]) == 2
    assert "expected id, domain, and one of table, medmnist, chexpert" in capsys.readouterr().err


# ---- pieces ----------------------------------------------------------------------------------------------------------


def test_methods_have_names() -> None:
    method = parse("finetune@resnet18:/a+b/r.pth+mmpt")
    assert method == FewShotMethod("finetune", "resnet18:/a+b/r.pth", "mmpt") and parse(str(method)) == method
    assert parse("logistic@planar:/a+b.safetensors").pretraining == ""
    assert str(with_floors(["full_logistic@resnet18"])[0]) == "full_logistic@statistics"
    assert len(with_floors(["logistic@statistics", "forest@pixels"])) == 2
    with pytest.raises(ConfigError, match="names no network"):
        parse("logistic@")


def test_other_weights_under_the_same_name_are_another_method(tmp_path: Path) -> None:
    found = []
    for content in (b"a", b"b"):
        (tmp_path / "r.pth").write_bytes(content)
        found.append(
            answers_path(tmp_path, BenchmarkJob("one", "kind"), parse(f"logistic@resnet18:{tmp_path / 'r.pth'}"))
        )
    assert found[0] != found[1] and found[0].name.startswith("logistic@r.pth_")


def test_sources_share_neither_domain_nor_people(root: Path) -> None:
    found = find(root)[0]
    assert sources_for("one", found) == ["three"] and sources_for("two", found) == ["three"]
    assert sources_for("three", found) == ["one", "two"]
    alike = dict(found, three=replace(found["three"], raw={**found["three"].raw, "domain": found["two"].domain}))
    assert sources_for("two", alike) == [], "of one domain, though neither names the other"
    assert len(tasks_of(str(root), ["one"], found, True)) == 4
    with pytest.raises(DatasetError, match="no data set is left to learn from"):
        tasks_of(str(root), [], found, True)


def test_features_are_computed_once(root: Path, tmp_path: Path) -> None:
    items, network = MedIMeta(root, "one", "kind"), build_network("unet_tiny")
    first = CachedFeatures(items, network, 16, tmp_path)
    some = first.of([3, 1, 3])
    again = CachedFeatures(MedIMeta(root, "one", "sick"), network, 16, tmp_path)
    calls: list[int] = []
    again._compute = lambda rows: calls.append(len(rows)) or np.zeros((len(rows), some.shape[1]))  # type: ignore[method-assign,func-returns-value]
    assert np.array_equal(again.of([3, 1, 3]), some) and not calls
    again.of([3, 5])
    assert calls == [1], "only the image that was not there"
    other = CachedFeatures(items, build_network("unet_tiny", seed=1), 16, tmp_path)
    assert other.key != first.key and not np.allclose(other.of([3]), some[:1])


def test_grey_and_coloured_images_reach_every_network(root: Path) -> None:
    for dataset in ("one", "three"):
        items = MedIMeta(root, dataset, "kind")
        for name in ("unet_tiny", "resnet18"):
            network = build_network(name)
            assert CachedFeatures(items, network, 32).of([0, 1]).shape == (2, network.width)
        assert items.num_channels == items.dataset.channels


@pytest.mark.parametrize("task", ["kind", "sick", "signs", "grade"])
def test_fine_tuning_learns_every_kind_of_task(task: str, root: Path) -> None:
    items = MedIMeta(root, "one", task)
    episode = draw(items.places, items.task_target, Shots(4, 4, None, 1), 0, "toy")[0]
    network = build_network("unet_tiny")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    once, again = (fine_tune(network, items, episode, FineTune(steps=12, lr=3e-3, size=16), 1) for _ in range(2))
    assert np.array_equal(once.scores, again.scores) and once.scores.shape == once.truth.shape
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    if task == "kind":
        assert episode_auroc(once) > 0.7


def test_supervised_training_keeps_its_best_epoch(root: Path) -> None:
    items = MedIMeta(root, "one", "kind")
    rows = np.arange(60)
    episode = Episode(rows[:36], rows[48:], items.places[:36], items.places[48:], (0, 1, 2))
    settings = SupervisedMethod(lr=3e-3, batch=12, max_epochs=6, size=16, augment=False)
    answers, model = supervised(build_network("unet_tiny"), items, episode, rows[36:48], settings, 0)
    assert episode_auroc(answers) > 0.7 and not model.training


def test_meta_gradients_go_through_the_inner_steps(root: Path) -> None:
    """Second order differs from first order, and both move the network; the source stays as it was."""
    sources = [MedIMeta(root, "one", "kind"), MedIMeta(root, "two", "sick")]
    network = build_network("unet_tiny")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    made = [
        maml(network, sources, Maml(max_epochs=1, episodes=1, validation=1, query=2, size=16, second_order=order), 0)
        for order in (True, False)
    ]
    states = [each.state_dict() for each in made]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert any(not torch.equal(states[1][name], before[name]) for name in before)


def test_multi_task_training_helps_on_a_task_like_its_own(root: Path) -> None:
    sources = [MedIMeta(root, "one", "kind")]
    network = build_network("unet_tiny")
    trained = multi_task(network, sources, MultiTask(lr=3e-3, batch=12, max_epochs=4, augment=False, size=16), 0)
    items = MedIMeta(root, "two", "kind")
    episodes = draw(items.places, items.task_target, Shots(2, 6, None, 6), 0, "toy")
    from brainfm.crossdomain.episode_scores import Answers
    from brainfm.crossdomain.heads import columns, prototypes

    def score(net: object) -> float:
        features = CachedFeatures(items, net, 16)  # type: ignore[arg-type]
        return float(np.mean([
            episode_auroc(Answers(e.query, columns(e.query_y, items.task_target, 3),
                                  prototypes(features.of(e.support), columns(e.support_y, items.task_target, 3),
                                             features.of(e.query)))) for e in episodes
        ]))  # fmt: skip

    assert score(trained) > score(network)


def test_unknown_labels_are_left_out_of_the_loss() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    y = torch.tensor([[1.0, float("nan")], [float("nan"), 0.0]])
    expected = (torch.nn.functional.softplus(torch.tensor(-2.0)) + torch.nn.functional.softplus(torch.tensor(3.0))) / 2
    assert torch.isclose(loss_of(logits, y, TaskTarget.MULTILABEL_CLASSIFICATION), expected)


def test_batches_cover_an_epoch_and_none_holds_one_image() -> None:
    parts = list(batches(33, 16, 0, 0))
    assert [len(part) for part in parts] == [16, 17] and sorted(np.concatenate(parts)) == list(range(33))
    assert [len(part) for part in batches(1, 16, 0, 0)] == [1]


def test_augmentation_moves_about_as_many_images_as_it_says() -> None:
    images = torch.rand(400, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    moved = augmented(images, torch.Generator().manual_seed(1))
    same = (moved - images).abs().amax((1, 2, 3)) < 1e-5
    assert 0.22 < same.float().mean() < 0.42, "0.75 ** 4 = 0.32"
    mirrored = (moved - images.flip(3)).abs().amax((1, 2, 3)) < 1e-5
    assert mirrored.any() and torch.equal(moved, augmented(images, torch.Generator().manual_seed(1)))


def test_near_duplicates_are_found(root: Path) -> None:
    items = MedIMeta(root, "one", "kind")
    test, learnt = np.arange(0, 30), np.arange(30, 60)
    plain = items.pixels

    def doubled(rows: np.ndarray) -> np.ndarray:
        pixels = plain(rows).copy()
        for place, row in enumerate(rows):
            if row == 40:
                pixels[place] = plain([7])[0] // 2 + 10
        return pixels

    items.pixels = doubled  # type: ignore[method-assign]
    found = twins(items, test, learnt, 0.99)
    assert [(twin.image, twin.other) for twin in found] == [(7, 40)] and found[0].r > 0.99
