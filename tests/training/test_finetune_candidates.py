"""Whole-head questions from the store to the bundle: what is shipped answers new files as it was cross-validated."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from brainfm.cli import main
from brainfm.data.manifest import Scan, read_manifest, write_manifest
from brainfm.data.prepare import prepare
from brainfm.data.store import Store
from brainfm.errors import BrainfmWarning, ConfigError
from brainfm.inference.evaluate import evaluate
from brainfm.inference.explain import explain
from brainfm.inference.predict import predict
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.reports.finetuning import write_finetuning_page
from brainfm.specs import PreprocessSpec, Provenance
from brainfm.submission.sharing import bundle_graph
from brainfm.tasks.bundle import READS, read_bundle
from brainfm.tasks.study import CHOICE
from brainfm.tasks.whole_head.cases import SessionCase, views_of
from brainfm.tasks.whole_head.measured import measurements_of
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.tasks.whole_head.reads import PARTS, dense_numbers
from brainfm.tasks.whole_head.study import WholeHeadStudy
from brainfm.training.finetune import MEMBER, SHIPPED, _begin, _fresh, finetune
from brainfm.verbs.compose import resolve

COUNT = 24


def write_brains(root: Path, count: int = COUNT) -> Path:
    """Heads of three tissues; the fluid inside grows with the age, noise hides it from a network as small as these."""
    root.mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij"))
    radius, scans = np.sqrt((grid**2).sum(0)), []
    for number in range(count):
        rng = np.random.default_rng(number)
        age = 20 + 60 * (number * 7 % count) / count
        fluid = 0.25 + 0.3 * (age - 20) / 60
        labels = (radius < 0.9).astype(int) * 2 + ((radius < 0.75) & (radius >= fluid)) - (radius < fluid)
        voxels = np.choose(labels, (0, 60, 90, 120)) + (labels > 0) * rng.normal(0, 40, labels.shape)
        affine = np.diag([6.0, 6.0, 6.0, 1.0])
        nib.save(nib.Nifti1Image(np.maximum(voxels, 0).astype(np.float32), affine), root / f"{number:02d}.nii.gz")
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), root / f"{number:02d}_seg.nii.gz")
        columns = {"age": f"{age:.1f}", "old": "yes" if age > 50 else "no", "seg_labels": f"{number:02d}_seg.nii.gz"}
        scans.append(Scan("toy", f"{number:02d}", "", "t1", f"{number:02d}.nii.gz", columns))
    write_manifest(root / "manifest.csv", scans)
    return root / "manifest.csv"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_brains(tmp_path_factory.mktemp("brains") / "data")


@pytest.fixture(scope="module")
def store(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store") / "store"
    prepare(read_manifest(manifest), path, PreprocessSpec(spacing_mm=(6, 6, 6), labels="nearest"), 1)
    return Store.open(path)


def words(store: Store, run: Path, task: str, target: str, *more: str) -> list[str]:
    default = [
        f"store={store.path}", f"run={run}", "backbone_from=none", "backbone=unet_tiny", "trainer=cpu",
        f"task={task}", f"task.target={target}", "task.patch_vox=[32,32,32]", "folds=2", "trainer.max_steps=4",
        "trainer.batch_size=2", "trainer.workers=0", "trainer.threads=1", "baselines=[volumes]", "audit=false",
        "report=false", "data.augment=null",
    ]  # fmt: skip
    given = dict(word.split("=", 1) for word in (*default, *more))
    return [f"{key}={value}" for key, value in given.items()]


@pytest.fixture(scope="module")
def aged(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    assert main(["finetune", *words(store, run, "regression", "age", "report=true")]) == 0
    return run


@pytest.fixture(scope="module")
def dense_file(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with a decoder and a head that tells regions, as pre-training leaves it; untrained."""
    torch.manual_seed(3)
    backbone = build_backbone("unet_tiny")
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 6, "free": 2})
    regions = DenseHead("anatomy", 6, ("background", "head", "csf", "hippocampus", "insula", "brainstem"))
    file = tmp_path_factory.mktemp("dense") / "backbone.safetensors"
    save_backbone(
        file, backbone, objective={"name": "none", "config": {}}, objective_state={}, preprocess=store.spec,
        patch_vox=(16, 16, 16), provenance=Provenance("0", "", ""), decoder=decoder, heads={"regions": regions},
    )  # fmt: skip
    return file


def held(run: Path, fold: str = "fold0") -> list[dict[str, Any]]:
    return json.loads((run / fold / "held.json").read_text())


def member_answer(network: Any, store: Store, subject: str) -> float:
    """What a member of a bundle answers for the voxels of a store, without a label map."""
    entry = next(s for s in store.sessions if s.subject == subject)
    image, present = views_of(store, SessionCase(entry, (("t1",),), np.zeros(1, np.float32), None), network.spec)
    measured = measurements_of([network], {"t1": store.volume(entry, "t1")}, store.spec.spacing_mm)
    with torch.no_grad():
        return float(
            network.decode(network(torch.from_numpy(image)[None], torch.from_numpy(present)[None], measured=measured))
        )


def test_every_candidate_is_scored_outside_and_one_is_shipped(aged: Path) -> None:
    scores = json.loads((aged / "scores.json").read_text())
    assert list(scores["candidates"]) == ["mean", "volumes", "measurements", "features", "stacked"], "too few to tune"
    found = scores["candidates"]
    assert found["volumes"]["folds_that_ship_it"] == 2 and found["volumes"]["outer"] < 4 < found["mean"]["outer"]
    assert scores["mae"] <= min(c["outer"] for c in found.values()) + 0.5
    for name, c in found.items():
        rows = [r for fold in ("fold0", "fold1") for r in held(aged, fold)]
        raw = [abs(r["candidates"][name][0] - r["truth"][0]) for r in rows]
        assert len(raw) == COUNT and c["inner_loss"] > 0 and c["outer"] <= np.mean(raw) + 0.5
    assert scores["without_label_map"] > scores["mae"]
    results = json.loads((aged / "results.json").read_text())
    assert results["scores"]["volumes"]["mae"]["mean"] < 4 and "candidates" not in results["cases"][0]
    assert not (aged / "fold0" / MEMBER).exists() and (aged / "fold0" / SHIPPED).exists()
    assert "volumes outer" in (aged / "bundle" / "README.md").read_text()
    assert "labels.seg=seg.nii.gz" in (aged / "bundle" / "README.md").read_text()
    page = (aged / "report.html").read_text()
    assert "What is shipped, and what was tried" in page and "linear on volumes of label maps" in page


def test_the_bundle_answers_files_as_it_was_cross_validated(aged: Path, manifest: Path, store: Store) -> None:
    """Each member alone, on the raw files of the cases that its fold held out. What it tells from features is compared
    on the store's voxels: these are rounded to steps of 2^-7, which features of so small heads feel."""
    bundle = read_bundle(aged / "bundle")
    for fold, network in enumerate(bundle.networks):
        alone = replace(bundle, networks=(network,), decisions=type(bundle.decisions)())
        for row in held(aged, f"fold{fold}")[:4]:
            scan, labels = (manifest.parent / f"{row['subject']}{end}.nii.gz" for end in ("", "_seg"))
            found = predict(alone, {"t1": scan}, labels={"seg": labels})
            assert (
                found.answer
                == pytest.approx(row["candidates"][row["chosen"]][0], abs=1e-3)
                == pytest.approx(row["raw"][0], abs=1e-3)
            )
            with pytest.warns(BrainfmWarning, match="no label map seg; 1 of 1 members answer from"):
                without = predict(alone, {"t1": scan})
            assert without.answer == pytest.approx(row["candidates"][row["fallback"]][0], abs=0.5)
            assert member_answer(network, store, row["subject"]) == pytest.approx(
                row["candidates"][row["fallback"]][0], abs=1e-3
            )
            assert without.low is None, "no interval is known of such answers"


def test_the_arithmetic_of_volumes_is_a_naive_one(aged: Path, store: Store) -> None:
    """The shipped linear model, from the checkpoint's numbers and the voxels counted by hand."""
    state, reads = load_file(aged / "fold0" / SHIPPED), json.loads((aged / "bundle" / READS).read_text())
    assert reads["labels"] == "seg_labels"
    assert reads["volumes"] == ["tissue/csf", "tissue/grey", "tissue/white", "total"]
    entries = {s.subject: s for s in store.sessions}
    for row in held(aged)[:3]:
        counts = np.bincount(store.volume(entries[row["subject"]], "seg_labels").ravel(), minlength=4)[1:]
        x = np.append(np.log(counts / counts.sum()), np.log(counts.sum() * 0.216))
        z = (x - state["volume_head.norm.mean"].numpy()) / state["volume_head.norm.scale"].numpy()
        weight, bias = state["volume_head.out.weight"][0].numpy(), float(state["volume_head.out.bias"])
        logit = 5 * np.arcsinh(z / 5) @ weight + bias
        assert float(state["mean"] + state["std"] * logit) == pytest.approx(row["candidates"]["volumes"][0], abs=1e-2)


def test_manifests_bring_their_label_maps(aged: Path, manifest: Path, tmp_path: Path) -> None:
    scored = evaluate(manifest, tmp_path / "with", bundle=aged / "bundle")
    assert scored.summary["metrics"]["mae"]["mean"] < 4
    bare = tmp_path / "bare.csv"
    scans = [replace(s, path=str(manifest.parent / s.path), columns={"age": s.columns["age"]})
             for s in read_manifest(manifest).scans]  # fmt: skip
    write_manifest(bare, scans)
    with pytest.warns(BrainfmWarning, match="24 of 24 sessions, first toy/00: no label map seg"):
        without = evaluate(bare, tmp_path / "without", bundle=aged / "bundle")
    assert without.summary["metrics"]["mae"]["mean"] > scored.summary["metrics"]["mae"]["mean"]


def test_the_map_of_an_answer_from_volumes_lies_on_its_regions(
    aged: Path, manifest: Path, store: Store, tmp_path: Path
) -> None:
    inputs, labels = {"t1": manifest.parent / "03.nii.gz"}, {"seg": manifest.parent / "03_seg.nii.gz"}
    found = explain(aged / "bundle", inputs, tmp_path / "why.nii.gz", labels=labels)
    assert found.answer == pytest.approx(predict(aged / "bundle", inputs, labels=labels).answer, abs=1e-3)
    entry = next(s for s in store.sessions if s.subject == "03")
    label = store.volume(entry, "seg_labels")
    by_region = {k: np.unique(found.heat[label == k].round(5)) for k in range(4)}
    assert all(len(values) == 1 for values in by_region.values()) and by_region[0] == 0
    assert by_region[1] > 0 > by_region[3], "more fluid is older"
    assert main([
        "explain", f"bundle={aged / 'bundle'}", f"input.t1={inputs['t1']}", f"labels.seg={labels['seg']}",
        f"out={tmp_path / 'cli.nii.gz'}",
    ]) == 0  # fmt: skip
    with pytest.raises(ConfigError, match=r"labels.lesion: the bundle reads no such label map, expected labels.seg"):
        predict(aged / "bundle", inputs, labels={"lesion": labels["seg"]})


def test_simple_measurements_are_shipped_where_they_tell_most(store: Store, manifest: Path, tmp_path: Path) -> None:
    """And the bundle measures a new file as the study measured its case: the same answer, whatever is missing."""
    more = ("task.volumes=none", "task.candidates=[measurements]", "baselines=[]")
    run = tmp_path / "run"
    assert main(["finetune", *words(store, run, "regression", "age", *more)]) == 0
    reads = json.loads((run / "bundle" / READS).read_text())
    assert {"head/volume_ml", "t1/p50", "t1/dark_ml"} < set(reads["measurements"])
    bundle = read_bundle(run / "bundle")
    for fold, network in enumerate(bundle.networks):
        assert isinstance(network, WholeHeadTask) and network.asks_measurements
        alone = replace(bundle, networks=(network,), decisions=type(bundle.decisions)())
        for row in held(run, f"fold{fold}")[:3]:
            assert row["chosen"] == "measurements" and row["candidates"]["measurements"] == row["raw"]
            found = predict(alone, {"t1": manifest.parent / f"{row['subject']}.nii.gz"})
            assert found.answer == pytest.approx(row["raw"][0], abs=1e-3)
    with pytest.raises(ValueError, match="answers from measurements"), torch.no_grad():
        network(torch.zeros(1, 1, 1, 32, 32, 32))
    with pytest.warns(BrainfmWarning, match="simple measurements that the answer is also made of"):
        explain(bundle, {"t1": manifest.parent / "03.nii.gz"}, tmp_path / "why.nii.gz")
    with pytest.raises(ConfigError, match="from simple measurements of the scan, which no graph makes"):
        bundle_graph(bundle)


def test_scored_cases_have_no_say(store: Store, aged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of held-out cases are poisoned: what is chosen and shipped stays, to the bit."""
    import brainfm.tasks.whole_head.cases as module

    away = {row["subject"] for row in held(aged)}
    original = module.read_session

    def poisoned(session: Any, spec: Any) -> np.ndarray:
        return original(session, spec) + (37 if session.subject in away else 0)

    monkeypatch.setattr(module, "read_session", poisoned)
    monkeypatch.setattr(WholeHeadStudy, "strata", lambda self: strata)
    config = resolve("finetune", words(store, tmp_path / "run", "regression", "age"))
    strata = {f"toy/{s}": str(s in away) for s in away}  # as before the poison, the folds must be those of `aged`
    tuning, splits = _begin(config)
    split = replace(
        splits[0],
        trained=tuple(c for c in tuning.study.cases if c.session.subject not in away),
        held=tuple(c for c in tuning.study.cases if c.session.subject in away),
    )
    (tmp_path / "fold").mkdir()
    rows, shipped = tuning.study.conclude(
        None, lambda: _fresh(tuning, split, None, begun=True), split, tuning.place(), tmp_path / "fold", 0
    )
    assert shipped is not None and (tmp_path / "fold" / CHOICE).read_bytes() == (aged / "fold0" / CHOICE).read_bytes()
    before = load_file(aged / "fold0" / SHIPPED)
    assert all(torch.equal(value, shipped[name]) for name, value in before.items())
    assert [r["raw"] for r in rows] == [r["raw"] for r in held(aged)]
    assert [r["truth"][0] - 37 for r in rows] == pytest.approx([r["truth"][0] for r in held(aged)], abs=1e-4)


def test_a_spoilt_network_is_not_shipped(store: Store, tmp_path: Path) -> None:
    """A rate that destroys it: a simpler candidate is shipped, nobody is worse than at step 0 on the inner cases."""
    more = ("task.candidates=[mean,volumes,features,tuned]", "optim.lr=300.0", "trainer.max_steps=6", "average=0",
            "folds=1")  # fmt: skip
    assert main(["finetune", *words(store, tmp_path / "run", "regression", "age", *more)]) == 0
    found = json.loads((tmp_path / "run" / "scores.json").read_text())["candidates"]
    assert found["tuned"]["folds_that_ship_it"] == 0 and found["volumes"]["folds_that_ship_it"] == 1
    (fold,) = json.loads((tmp_path / "run" / "results.json").read_text())["splits"]
    assert fold["inner"] == round(0.2 * (fold["inner"] + fold["trained"])), "kept although inner=0"
    curve = list(csv.reader((tmp_path / "run" / "fold0" / "curves.csv").open()))
    (last,) = [float(value) for _, name, value in curve[1:] if name == "inner_mae"]
    start = json.loads((tmp_path / "run" / "fold0" / "start.json").read_text())["best"]
    assert start < last
    choice = json.loads((tmp_path / "run" / "fold0" / CHOICE).read_text())
    assert choice["inner"]["tuned"] == pytest.approx(start, abs=1e-3) and choice["chosen"] == "volumes"
    state = load_file(tmp_path / "run" / "fold0" / MEMBER)
    torch.manual_seed(0)
    fresh = build_backbone("unet_tiny").state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in fresh.items()), "that of step 0"


def test_the_last_layer_is_refitted_after_tuning(store: Store, tmp_path: Path) -> None:
    """What is shipped answers the training cases as the linear model of its own features, not as Adam left it."""
    more = ("task.candidates=[tuned]", "optim.lr=1e-2", "average=0", "folds=2")
    assert main(["finetune", *words(store, tmp_path / "run", "regression", "age", *more)]) == 0
    tuning, splits = _begin(resolve("finetune", words(store, tmp_path / "run", "regression", "age", *more)))
    task = _fresh(tuning, splits[0], None, begun=True)
    state = load_file(tmp_path / "run" / "fold0" / MEMBER)
    task.load_state_dict(state)
    with torch.no_grad():
        tuning.study._refit(task, splits[0].trained, tuning.place())  # type: ignore[attr-defined]
    for name in ("norm.mean", "norm.scale", "out.weight", "out.bias"):
        assert torch.allclose(task.state_dict()[name], state[name], atol=1e-5), name
    assert not (tmp_path / "run" / "fold0" / SHIPPED).exists()


def test_a_backbone_s_own_regions_answer_without_a_label_map(
    store: Store, manifest: Path, dense_file: Path, tmp_path: Path
) -> None:
    more = (f"backbone_from={dense_file}", "task.volumes=none", "task.candidates=[regions,features,stacked]")
    run = tmp_path / "run"
    assert main(["finetune", *words(store, run, "regression", "age", "baselines=[scratch]", *more)]) == 0
    found = json.loads((run / "scores.json").read_text())["candidates"]
    assert list(found) == ["mean", "regions", "features", "stacked"], "measurements are a part of the mixture alone"
    reads = json.loads((run / "bundle" / READS).read_text())
    assert reads["outside"] == ["background", "head"] and not reads["volumes"]
    report = json.loads((run / "fold0" / "transfer.json").read_text())
    assert {name.split(".")[0] for name in report["loaded"]} == {"backbone", "decoder", "heads"}
    assert not report["unused"] and not [n for n in report["left_at_init"] if n.startswith(("dense.", "regions."))]
    assert reads["tissues"]["grey"] == ["insula", "hippocampus"]
    bundle = read_bundle(run / "bundle")
    loaded = load_backbone(dense_file)
    for fold, network in enumerate(bundle.networks):
        assert isinstance(network, WholeHeadTask) and network.dense is not None and loaded.decoder is not None
        for name, value in loaded.decoder.state_dict().items():
            assert torch.equal(value, network.dense.state_dict()[name])
        row = held(run, f"fold{fold}")[0]
        alone = replace(bundle, networks=(network,), decisions=type(bundle.decisions)())
        found_answer = predict(alone, {"t1": manifest.parent / f"{row['subject']}.nii.gz"}).answer
        assert found_answer == pytest.approx(row["raw"][0], abs=0.5)
        assert member_answer(network, store, row["subject"]) == pytest.approx(row["raw"][0], abs=1e-3)
    with pytest.warns(BrainfmWarning, match="not what the decoder sees; method=occlusion"):
        explain(bundle, {"t1": manifest.parent / "03.nii.gz"}, tmp_path / "why.nii.gz")
    write_finetuning_page(run)


def test_numbers_of_a_decoder_against_loops(dense_file: Path) -> None:
    loaded = load_backbone(dense_file)
    study_reads = WholeHeadStudy.reads
    assert loaded.decoder is not None
    head = loaded.heads["regions"]
    question = object.__new__(WholeHeadStudy)
    question.volumes, question.spec = None, type("S", (), {"view_mm": 5.0})()  # type: ignore[assignment]
    reads = study_reads(question, loaded)
    scan = torch.full((1, 1, 16, 16, 16), -2.0)
    scan[..., 3:13, 3:13, 3:13] = torch.randn(10, 10, 10, generator=torch.Generator().manual_seed(0)) * 0.1 + 1
    found = dense_numbers(reads, loaded.backbone, loaded.decoder, head, scan, 0.125)[0].tolist()
    with torch.no_grad():
        levels = loaded.decoder.climb(loaded.backbone.features(scan))
        parts = loaded.decoder.split(loaded.decoder.out(levels[-1]))
        p = torch.softmax(head(parts["anatomy"]), dim=1)[0]
    inside = ["csf", "hippocampus", "insula", "brainstem"]
    ml = {name: float(p[head.names.index(name)].sum()) * 0.125 for name in inside}
    groups = [["csf"], ["insula", "hippocampus"], ["brainstem"], *([name] for name in inside)]
    total = sum(ml.values()) + 0.1
    expected = [np.log((sum(ml[n] for n in names) + 0.1) / total) for names in groups] + [np.log(total)]
    assert found[: len(expected)] == pytest.approx(expected, rel=1e-4)
    assert reads.region_names == ("tissue/csf", "tissue/grey", "tissue/white", *inside, "total")
    mask = scan > -0.5
    finest = levels[-1][:, :, mask[0, 0]][0]
    start = len(expected) + 2 * loaded.backbone.widths[1]
    width = loaded.backbone.widths[0]
    assert found[start : start + width] == pytest.approx(finest.mean(dim=1).tolist(), abs=1e-4)
    assert found[start + width : start + 2 * width] == pytest.approx(finest.std(dim=1, correction=0).tolist(), abs=2e-3)
    weight = p[head.names.index("insula")]
    over = (levels[-1][0] * weight).sum(dim=(1, 2, 3)) / weight.sum()
    place = start + 2 * width + inside.index("insula") * width
    assert found[place : place + width] == pytest.approx(over.tolist(), abs=1e-4)


def test_classes_ship_their_choice_too(store: Store, manifest: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["finetune", *words(store, run, "classification", "old")]) == 0
    found = json.loads((run / "scores.json").read_text())["candidates"]
    assert found["mean"]["outer"] == 0.5 and found["volumes"]["outer"] > 0.9 and found["volumes"]["folds_that_ship_it"]
    bundle = read_bundle(run / "bundle")
    row = held(run)[0]
    alone = replace(bundle, networks=bundle.networks[:1], decisions=type(bundle.decisions)())
    scan, labels = (manifest.parent / f"{row['subject']}{end}.nii.gz" for end in ("", "_seg"))
    answer = predict(alone, {"t1": scan}, labels={"seg_labels": labels})
    assert list(answer.probabilities.values()) == pytest.approx(row["raw"], abs=1e-4)
    why = explain(bundle, {"t1": scan}, tmp_path / "why.nii.gz", labels={"seg": labels})
    assert why.heat.min() >= 0


def test_a_fold_of_another_configuration_is_refused(
    store: Store, aged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", *words(store, aged, "regression", "age", "report=true")]) == 0, "the same goes on"
    other = words(store, aged, "regression", "age", "task.volumes=none")
    assert main(["finetune", *other]) == 2
    assert "holds a run with another task" in capsys.readouterr().err


def test_no_scale_is_drawn_where_size_is_an_answer(store: Store, tmp_path: Path) -> None:
    plain = [w for w in words(store, tmp_path, "regression", "age") if not w.startswith("data.augment")]
    assert resolve("finetune", plain).data.augment["scale"] == 0
    asked = resolve("finetune", [*plain, "data.augment.scale=0.1"])
    assert asked.data.augment["scale"] == 0.1
    lesion = ["task=segmentation", "task.target=x", "store=s", "run=r", "backbone_from=none"]
    assert resolve("finetune", lesion).data.augment["scale"] == 0.15


def test_from_enough_subjects_on_the_network_is_tuned(store: Store, tmp_path: Path) -> None:
    _, few = _begin(resolve("finetune", words(store, tmp_path / "a", "regression", "age", "inner=0.3")))
    tuning, many = _begin(resolve("finetune", words(store, tmp_path / "b", "regression", "age", "task.tune_from=12")))
    assert all(not split.inner and len(split.trained) == 12 for split in few)
    assert all(len(split.inner) in (2, 3) and tuning.study.trains(split) for split in many)


def test_unknown_candidates_and_volumes(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, text in (
        ("task.candidates=[luck]", "task.candidates: found luck, expected auto or some of mean"),
        ("task.candidates=[]", "task.candidates: found none"),
        ("task.volumes=aseg", "task.volumes=aseg: expected auto, none, a table, or a label column"),
    ):
        assert main(["finetune", *words(store, tmp_path / "run", "regression", "age", more)]) == 2
        assert text in capsys.readouterr().err


def test_mixes_are_rows_of_parts(aged: Path) -> None:
    for network in read_bundle(aged / "bundle").networks:
        assert isinstance(network, WholeHeadTask)
        assert network.mix.shape == (2, len(PARTS)) and network.mix[0, PARTS.index("volumes")] == 1
        assert network.mix[1, PARTS.index("volumes")] == 0 and torch.allclose(network.mix.sum(dim=1), torch.ones(2))


def test_finetune_resumes_between_folds(
    store: Store, aged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import brainfm.tasks.whole_head.members as module

    original, calls = module.views_of, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 30:
            raise RuntimeError("power cut")
        return original(*args)

    config = resolve("finetune", words(store, tmp_path / "run", "regression", "age"))
    monkeypatch.setattr(module, "views_of", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config)
    monkeypatch.undo()
    finetune(config)
    for name in ("cases.csv", "fold1/held.json", "fold1/choice.json", "fold1/shipped.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (aged / name).read_bytes(), name
