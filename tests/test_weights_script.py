"""scripts/weights.py: the file that ships holds what it should, says whom and what it saw, and is refused otherwise."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from brainfm.data.manifest import Scan, write_manifest
from brainfm.errors import WeightsError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, read_description, save_backbone
from brainfm.nets.decoders import DenseDecoder, DenseHead
from brainfm.reports.weights_card import receipt
from brainfm.seen import SeenSubjects
from brainfm.specs import PreprocessSpec, Provenance
from tests import phantoms

ROOT = Path(__file__).parents[1]


def _script() -> Any:
    spec = util.spec_from_file_location("weights_script", ROOT / "scripts" / "weights.py")
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["weights_script"] = module
    spec.loader.exec_module(module)
    return module


script = _script()
SEEN = ("ixi2mm/a", "cc0/b")


def rows(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "lists"
    folder.mkdir()
    rows(folder / "split.csv", "dataset,subject,side\nixi2mm,a,train\nixi2mm,h,held\ncc0,b,train\n")
    rows(
        folder / "sources.csv",
        "dataset,file,subject,side,licence,share_alike,used_for,variant\n"
        "ixi2mm,x,a,train,CC BY-SA 3.0 (IXI),yes,image,everything\n"
        "ixi2mm,y,a,train,SBIA 1.1 of CC BY-SA 3.0,yes,label target; rendering map,everything\n"
        "ixi2mm,z,h,held,CC BY-SA 3.0 (IXI),yes,test only,none\n"
        "cc0,w,b,train,CC0,no,image,permissive+everything\n",
    )
    rows(
        folder / "attributions.csv",
        "dataset,title,attribution,address\nixi2mm,IXI,the IXI people,http://ixi\ncc0,Free,nobody,http://free\n",
    )
    monkeypatch.setattr(script, "LISTS", folder)
    return folder


def scan_of(path: Path) -> Path:
    shape, affine = (34, 40, 32), phantoms.centred(np.eye(3), (5, 5, 5), (34, 40, 32))
    path.parent.mkdir(parents=True, exist_ok=True)
    phantoms.write(path, phantoms.head(shape, affine, np.random.default_rng(0), noise=0.0), affine)
    return path


@pytest.fixture
def asked(tmp_path: Path, lists: Path) -> argparse.Namespace:
    """A run whose backbone is tiny, its manifest, and a held head."""
    torch.manual_seed(0)
    backbone = build_backbone("unet_tiny")
    decoder = DenseDecoder(backbone.widths, backbone.strides, {"anatomy": 4, "pathology": 2})
    heads = {"regions": DenseHead("anatomy", 4, ("background", "head", "csf"))}
    heads |= {name: DenseHead("pathology", 2, (name,)) for name in ("lesion", "other")}
    run = tmp_path / "run"
    save_backbone(
        run / "backbone.safetensors", backbone, objective={"name": "dense_split", "config": {"code": 12}},
        objective_state={"volume_head.weight": torch.zeros(3)}, preprocess=PreprocessSpec(), patch_vox=(16, 16, 16),
        provenance=Provenance("0", "", "d", {"store": str(tmp_path / "store"), "lr": 1, "x": ["/a/b"]}, steps=7),
        decoder=decoder, heads=heads, voxel_mm=(0.8, 5), subjects=SeenSubjects.of(SEEN, 0),
    )  # fmt: skip
    rows(run / "curves.csv", "step,name,value\n" + "".join(f"{k},val_total,{1 / k}\n{k},lr,1\n" for k in range(1, 99)))
    held = scan_of(tmp_path / "data" / "ixi2mm" / "h" / "h_T1w.nii.gz")
    columns = {"age": "30", "sex": "F", "side": "train"}
    scans = [Scan(*key.split("/"), "", "t1", str(held), columns) for key in SEEN]
    scans += [Scan("ixi2mm", "h", "", "t1", str(held), {**columns, "side": "held"})]
    scans += [Scan("ixi2mm", "validation", "", "t1", str(held), columns)]  # on the training side, and never seen
    scans = [replace(scan, path=f"{scan.path}?{k}") for k, scan in enumerate(scans)]
    write_manifest(tmp_path / "manifest.csv", scans)
    return argparse.Namespace(
        source=run, name="brainfm_x", data=tmp_path / "data", manifest=None, commit="c0ffee", out=tmp_path / "out",
        ordinary=0, look_mm=(1.5, 2.5), earlier=[],
    )  # fmt: skip


def test_the_file_holds_halves_of_what_is_of_use_and_says_where_it_comes_from(asked: argparse.Namespace) -> None:
    release = script.make(asked)
    path = asked.out / "brainfm_x.safetensors"
    with safe_open(path, framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        groups = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
    assert dtypes == {torch.float16} and groups == {"backbone", "decoder", "heads", "objective"}
    whole, half = load_backbone(asked.source / "backbone.safetensors"), load_backbone(path)
    assert (
        set(half.heads) == {"regions", "lesion"}
        and set(half.extra) == set(whole.extra)
        and half.subjects == whole.subjects
    )
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(value.half().float(), half.backbone.state_dict()[name])  # read into float32
    assert half.provenance.commit == "c0ffee" and half.provenance.parents == (whole.fingerprint,)
    assert half.provenance.config == {"store": "store", "lr": 1, "x": ["b"]} and half.voxel_mm == (0.8, 5)
    assert half.release == json.loads(json.dumps(release)) and release["look_mm"] == [1.5, 2.5]
    assert release["half_precision"]["head"] == "ixi2mm/h" and min(release["half_precision"]["cosine"]) > 0.999
    assert release["licence"]["name"] == "CC-BY-SA-4.0"
    assert release["licence"]["terms"] == {"SBIA Software License 1.1": ["ixi2mm"]}
    assert [(s["dataset"], s["files"], s["people"]) for s in release["sources"]] == [("cc0", 1, 1), ("ixi2mm", 2, 1)]
    assert [(p["dataset"], p["people"], p["ages"]) for p in release["people"]] == [
        ("cc0", 1, [30, 30, 30]), ("ixi2mm", 1, [30, 30, 30]),
    ]  # fmt: skip
    steps = [step for step, _ in release["curves"]["val_total"]]
    assert set(release["curves"]) == {"val_total"} and len(steps) == 40 and (steps[0], steps[-1]) == (1, 98)


def test_permissive_sources_give_a_permissive_licence() -> None:
    source = {"dataset": "a", "share_alike": False, "licences": ["CC0"]}
    assert script.licence_of([source])["name"] == "CC-BY-4.0" and not script.licence_of([source])["terms"]


def test_curves_of_trainings_it_went_on_from_come_first(asked: argparse.Namespace, tmp_path: Path) -> None:
    """Of a run, and of a file that ships, which has them in its release; each at the steps of all before it."""
    script.make(asked)
    first = asked.out / "brainfm_x.safetensors"
    loaded = load_backbone(asked.source / "backbone.safetensors", needs_decoder=True)
    run = tmp_path / "on"
    config = {**loaded.provenance.config, "before": {"steps": 7, "samples": 7, "hours": 1.0, "cpu_hours": 2.0}}
    save_backbone(
        run / "backbone.safetensors", loaded.backbone, objective=loaded.objective, objective_state=loaded.extra,
        preprocess=loaded.preprocess, patch_vox=loaded.patch_vox, decoder=loaded.decoder, heads=loaded.heads,
        provenance=replace(loaded.provenance, config=config, steps=5), subjects=loaded.subjects,
    )  # fmt: skip
    rows(run / "curves.csv", "step,name,value\n200,val_total,.5\n250,val_total,.25\n")
    asked = argparse.Namespace(**vars(asked) | {"source": run, "earlier": [first]})
    release = script.make(asked)
    points = release["curves"]["val_total"]
    assert points[0] == [1, 1.0] and points[-1] == [257, 0.25] and len(points) <= 40
    description = read_description(asked.out / "brainfm_x.safetensors")
    said = receipt(description, 1)
    assert any("weights of 7 steps, 7 samples and 2.0 core-hours: 12 steps in all" in line for line in said)


def test_what_must_not_ship_is_refused(asked: argparse.Namespace, lists: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="expected --commit"):
        script.make(argparse.Namespace(**vars(asked) | {"commit": None}))
    with monkeypatch.context() as patch:
        patch.setattr(script, "MOST_BYTES", 1000)
        with pytest.raises(WeightsError, match="bytes, expected at most 1000"):
            script.make(asked)
    with monkeypatch.context() as patch:
        patch.setattr(script, "_LEAST_DICE", 1.1)
        with pytest.raises(WeightsError, match="half precision changes its answers"):
            script.make(asked)
    rows(lists / "attributions.csv", "dataset,title,attribution,address\ncc0,Free,nobody,http://free\n")
    with pytest.raises(WeightsError, match="has no row for ixi2mm"):
        script.make(asked)
    assert not asked.out.exists()


def test_a_held_person_is_noticed(asked: argparse.Namespace, lists: Path) -> None:
    rows(lists / "split.csv", "dataset,subject,side\nixi2mm,a,held\nixi2mm,h,held\ncc0,b,train\n")
    with pytest.raises(WeightsError, match="ixi2mm/a is held out"):
        script.make(asked)


def test_every_source_of_the_long_training_has_an_attribution() -> None:
    foundation = ROOT / "foundation"
    with (foundation / "attributions.csv").open(newline="", encoding="utf-8") as file:
        attributions = {row["dataset"]: row for row in csv.DictReader(file)}
    sources = script.sources_of(script.table(foundation / "sources.csv"), attributions)
    assert {source["dataset"] for source in sources} == set(attributions)
    assert all(source["attribution"] and source["address"].startswith("http") for source in sources)
