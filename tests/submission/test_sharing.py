"""Models for sharing: graphs, a hub's folder, MONAI's bundle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import brainfm
from brainfm.cli import main
from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone
from brainfm.nets.cpu import swap_out
from brainfm.specs import Decisions, PreprocessSpec, Provenance, TaskSpec
from brainfm.tasks.bundle import load_engine, read_bundle, write_bundle
from brainfm.tasks.registry import kind_of
from brainfm.tasks.whole_head.answer import joined, raw_answers
from brainfm.tasks.whole_head.label_maps import decisions_for
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.tasks.whole_head.reads import Reads
from tests import phantoms

OLD = Path(__file__).parents[1] / "fixtures" / "format_9328027"
LESIONS, AGE, BACKBONE = OLD / "lesion_bundle", OLD / "age_bundle", OLD / "cross_contrast.safetensors"


def exported(kind: str, out: Path, *words: str) -> Path:
    assert main(["export", f"format={kind}", f"out={out}", *words]) == 0
    return out


def windows(cases: int) -> Tensor:
    task = read_bundle(LESIONS).task
    return torch.randn(cases, len(task.contrasts), *task.patch_vox, generator=torch.Generator().manual_seed(cases))


@torch.no_grad()
def probabilities(image: Tensor) -> Tensor:
    members = [swap_out(member) for member in read_bundle(LESIONS).networks]
    return torch.stack([torch.softmax(member(image), 1) for member in members]).mean(0)


@pytest.mark.parametrize("cases", [1, 3])
@torch.no_grad()
def test_a_traced_bundle_answers_for_any_number_of_windows(tmp_path: Path, cases: int) -> None:
    path = exported("torchscript", tmp_path / "lesions.pt", f"bundle={LESIONS}")
    files = {"brainfm.json": ""}
    network = torch.jit.load(path, _extra_files=files)
    torch.testing.assert_close(network(windows(cases)), probabilities(windows(cases)), atol=1e-6, rtol=1e-5)
    assert json.loads(files["brainfm.json"])["fingerprint"] == read_bundle(LESIONS).fingerprint


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_does_so_too(tmp_path: Path) -> None:
    path = exported("torch_export", tmp_path / "lesions.pt2", f"bundle={LESIONS}")
    network = torch.export.load(path).module()
    for cases in (1, 3):
        torch.testing.assert_close(network(windows(cases)), probabilities(windows(cases)), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_onnx_gives_the_same_probabilities_in_onnxruntime(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = exported("onnx", tmp_path / "lesions.onnx", f"bundle={LESIONS}")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for cases in (1, 3):
        found = session.run(None, {"image": windows(cases).numpy()})[0]
        np.testing.assert_allclose(found, probabilities(windows(cases)).numpy(), atol=1e-5)
    held = json.loads(session.get_modelmeta().custom_metadata_map["brainfm"])
    assert held["task"]["contrasts"] == list(read_bundle(LESIONS).task.contrasts)


@torch.no_grad()
def test_onnx_gives_a_backbones_maps(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    path = exported("onnx", tmp_path / "b.onnx", f"backbone={BACKBONE}", "patch_vox=[16,16,16]")
    image = torch.randn(3, 1, 16, 16, 16)
    found = runtime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image.numpy()})
    for ours, theirs in zip(brainfm.load(BACKBONE)(image), found, strict=True):
        np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-4)


@torch.no_grad()
def test_onnx_answers_for_whole_heads_as_an_old_bundle_does(tmp_path: Path) -> None:
    path = exported("onnx", tmp_path / "age.onnx", f"bundle={AGE}")
    engine = load_engine(AGE, "cpu")
    views = torch.randn(3, len(engine.task.contrasts), *engine.task.patch_vox)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": views.numpy()})[0]
    want = [joined(raw_answers(engine, view[None]), engine.task, engine.decisions) for view in views]
    np.testing.assert_allclose(found, np.stack(want), rtol=1e-5, atol=1e-4)


REGIONS = {"part": "a", "channels": 3, "names": ["background", "csf", "grey"]}
READS = Reads(
    "dseg_labels", "sum", ("total", "csf"), decoder={"parts": {"a": 3}}, regions=REGIONS, outside=("background",)
)
SORTS = [
    ("exclusive", ("f", "m")),
    ("", ()),
    pytest.param("ordinal", (0, 1, 2, 3), marks=pytest.mark.slow),
    pytest.param("multilabel", ("a", "b"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("mode", "values"), SORTS)
@torch.no_grad()
def test_onnx_answers_for_whole_heads_with_and_without_label_maps(
    tmp_path: Path, mode: str, values: tuple[str, ...]
) -> None:
    """Every part of the mixture, members, attention between contrasts, and what cross-validation decided."""
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    kind = "classification" if mode else "regression"
    task = TaskSpec(kind, "it", ("t1", "t2"), values, (16, 16, 16), mode=mode, view_mm=4.0, fusion="attention")
    members = []
    for seed in (0, 1) if mode == "exclusive" else (0,):
        torch.manual_seed(seed)
        member = WholeHeadTask(task, build_backbone("unet_tiny"), reads=READS)
        for value in member.parameters():
            value += 0.05 * torch.randn_like(value)
        member.mix.copy_(torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.2, 0.0, 0.5, 0.3]]))
        members.append(member.bundle_state())
    decisions = Decisions(temperature=1.7) if mode else Decisions(bias=(2.0, 0.9))
    write_bundle(
        tmp_path / "bundle", task=task, backbone_config={"name": "unet_tiny"}, members=members, decisions=decisions,
        preprocess=PreprocessSpec(), provenance=Provenance("0", "", ""), reads=READS.to_dict(),
    )  # fmt: skip
    path = exported("onnx", tmp_path / "it.onnx", f"bundle={tmp_path / 'bundle'}")
    views, volumes = torch.randn(3, 2, 16, 16, 16), torch.randn(3, 2)
    volumes[1] = torch.nan
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": views.numpy(), "volumes": volumes.numpy()})[0]
    engine = load_engine(tmp_path / "bundle", "cpu")
    for answer, view, of_map in zip(found, views, volumes, strict=True):
        known = None if of_map.isnan().any() else of_map[None]
        decided = decisions_for(engine.networks, engine.decisions, known is not None)
        want = joined(raw_answers(engine, view[None], known), task, decided)
        np.testing.assert_allclose(answer, want, rtol=1e-4, atol=1e-4)
    held = json.loads(session.get_modelmeta().custom_metadata_map["brainfm"])
    assert held["volumes"]["names"] == ["total", "csf"] and held["task"]["view_mm"] == 4.0


def test_without_onnx_one_sentence_names_the_extra(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brainfm.extras.find_spec", lambda name: None)
    assert main(["export", "format=onnx", f"bundle={LESIONS}", f"out={tmp_path / 'x.onnx'}"]) == 2
    assert "pip install 'brainfm-mri[exchange]'" in capsys.readouterr().err


def test_a_folder_for_a_hub_holds_what_brainfm_reads(tmp_path: Path) -> None:
    one = exported("hub", tmp_path / "one", f"backbone={BACKBONE}", "licence=cc-by-4.0")
    assert load_backbone(one / "model.safetensors").fingerprint == load_backbone(BACKBONE).fingerprint
    card = (one / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: brainfm\n") and "million parameters" in card
    assert json.loads((one / "config.json").read_text())["backbone"] == load_backbone(BACKBONE).backbone.config
    two = exported("hub", tmp_path / "two", f"bundle={LESIONS}")
    assert read_bundle(two / "bundle").fingerprint == read_bundle(LESIONS).fingerprint
    assert (LESIONS / "README.md").read_text() in (two / "README.md").read_text()


def test_monai_runs_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ignite")
    pytest.importorskip("monai")
    from monai.bundle import run

    out = exported("monai", tmp_path / "monai", f"bundle={LESIONS}")
    shape, affine = (26, 30, 24), phantoms.centred(phantoms.axes("LPS"), (4, 4, 4), (26, 30, 24))
    for contrast in read_bundle(LESIONS).task.contrasts:
        place = out / "inputs" / "p1" / f"{contrast}.nii.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(place, phantoms.head(shape, affine, np.random.default_rng(0)), affine)
    run(config_file=str(out / "configs" / "inference.json"), bundle_root=str(out))
    (written,) = (out / "outputs").rglob("*.nii.gz")
    assert nib.load(written).shape == shape and np.allclose(nib.load(written).affine, affine)


def test_monai_can_prepare_and_name_everything_in_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("monai")
    from monai.bundle import ConfigParser

    out = exported("monai", tmp_path / "monai", f"bundle={LESIONS}")
    meta = json.loads((out / "configs" / "metadata.json").read_text())
    assert meta["network_data_format"]["inputs"]["image"]["channel_def"] == {
        str(index): contrast for index, contrast in enumerate(read_bundle(LESIONS).task.contrasts)
    }
    shape, affine = (26, 30, 24), phantoms.centred(phantoms.axes("LPS"), (4, 4, 4), (26, 30, 24))
    contrasts = read_bundle(LESIONS).task.contrasts
    for contrast in contrasts:
        place = out / "inputs" / "p1" / f"{contrast}.nii.gz"
        place.parent.mkdir(parents=True, exist_ok=True)
        phantoms.write(place, phantoms.head(shape, affine, np.random.default_rng(0)), affine)
    parser = ConfigParser()
    parser.read_config(out / "configs" / "inference.json")
    parser["bundle_root"] = str(out)
    case = parser.get_parsed_content("dataset")[0]
    network, inferer = (parser.get_parsed_content(name) for name in ("network", "inferer"))
    case["pred"] = inferer(case["image"][None], network)[0]
    done = parser.get_parsed_content("postprocessing")(case)
    assert tuple(done["pred"].shape[1:]) == shape and set(np.unique(done["pred"].numpy())) <= {0, 1}
    (written,) = (out / "outputs").rglob("*.nii.gz")
    assert nib.load(written).shape == shape and np.allclose(nib.load(written).affine, affine, atol=1e-4)


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["export", *words]) == 2
        return capsys.readouterr().err

    assert "answers for a whole head" in said("format=monai", f"bundle={AGE}", f"out={tmp_path / 'a'}")
    windows = replace(read_bundle(AGE).task, crops=True)
    with pytest.raises(ConfigError, match="as many as cover it"):
        kind_of("regression").graph(read_bundle(AGE).networks, windows, Decisions())
    assert "either backbone=FILE or bundle=DIR" in said("format=hub", f"out={tmp_path / 'a'}")
    assert "bundle must be given" in said("format=monai", f"out={tmp_path / 'a'}")
    assert "expected a file *.pt for" in said("format=torchscript", f"bundle={LESIONS}", f"out={tmp_path / 'a.onnx'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for format in ("hub", "monai"):
        assert "expected a free place" in said(f"format={format}", f"bundle={LESIONS}", f"out={tmp_path / 'full'}")
    words = ("format=torchscript", f"backbone={BACKBONE}", f"out={tmp_path / 'a.pt'}")
    assert "a window of 1,000,000,000,000 million voxels, expected at most 134 million" in said(
        *words, "patch_vox=[1000000,1000000,1000000]"
    )


@pytest.mark.parametrize("licence", ["cc-by-4.0", "other: see the card", "yes", 'a "quoted" one', "# none", ""])
def test_a_licence_in_any_words_is_one_value_of_the_front_matter(licence: str, tmp_path: Path) -> None:
    words = ["export", "format=hub", f"backbone={BACKBONE}", f"out={tmp_path / 'hub'}", f"licence={licence}"]
    assert main(words) == 0
    front = (tmp_path / "hub" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == licence
